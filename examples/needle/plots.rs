//! The plots of the page, as inline SVG. Colours of text, axes and the line of guesses are placeholders that the style sheet replaces.

use crate::kernels::{KERNELS, Kernel, Shape};
use crate::measure::{Curve, Plan, Results};
use crate::shared::Scale;
use crate::task::{CLASSES, Sort};
use plotters::prelude::*;

const INK: RGBColor = RGBColor(1, 2, 3);
const GRID: RGBColor = RGBColor(1, 2, 4);
/// Dashed by the style sheet.
const REFERENCE: RGBColor = RGBColor(1, 2, 5);

const SIZE: (u32, u32) = (560, 380);

type Failure = Box<dyn std::error::Error>;

/// Right answers of every kernel along one curve.
pub fn accuracy(results: &Results, plan: &Plan, sort: Sort, curve: Curve) -> Result<String, Failure> {
    let title = format!("{} pairs, {}", sort.name(), curve.fixed(plan));
    let mut svg = String::new();
    draw(&mut svg, &title, results, plan, sort, curve)?;
    // Inline SVG needs no namespace; its size follows the page.
    let start = svg.find("<svg").unwrap_or(0);
    let end = svg[start..].find('>').map_or(start, |i| start + i + 1);
    Ok(format!("<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{title}\">{}", SIZE.0, SIZE.1, &svg[end..]))
}

fn draw(
    svg: &mut String,
    title: &str,
    results: &Results,
    plan: &Plan,
    sort: Sort,
    curve: Curve,
) -> Result<(), Failure> {
    let points = curve.points(plan);
    let font = |size: i32| ("sans-serif", size).into_font().color(&INK);
    let last = points.len() as f64 - 1.0;
    let x = Scale { range: -0.4..last + 0.4, ticks: (0..points.len()).map(|i| i as f64).collect() };
    let y = Scale { range: -4.0..104.0, ticks: (0..=5).map(|i| f64::from(i) * 20.0).collect() };

    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 19).into_font().style(FontStyle::Bold).color(&INK))
        .margin(8)
        .margin_right(18)
        .x_label_area_size(46)
        .y_label_area_size(58)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .axis_style(INK)
        .bold_line_style(GRID)
        .max_light_lines(0)
        .x_label_formatter(&|x| points.get(x.round() as usize).map_or_else(String::new, usize::to_string))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .x_labels(40)
        .y_labels(40)
        .label_style(font(15))
        .axis_desc_style(font(16))
        .x_desc(if curve == Curve::Distance { "distance (tokens)" } else { "load (pairs)" })
        .y_desc("right answers (%)")
        .draw()?;
    let guess = 100.0 / CLASSES as f64;
    chart.draw_series([PathElement::new(vec![(-0.4, guess), (last + 0.4, guess)], REFERENCE.stroke_width(2))])?;

    for (place, kernel) in KERNELS.iter().enumerate() {
        // side by side, so that no interval hides another
        let shift = 0.05 * (place as f64 - 0.5 * (KERNELS.len() as f64 - 1.0));
        let scores = results.scores(sort, curve, place).iter().enumerate();
        let scores: Vec<_> = scores.map(|(i, score)| (i as f64 + shift, score)).collect();
        let means = || scores.iter().map(|(x, score)| (*x, 100.0 * score.accuracy()));
        let colour = kernel.colour;
        chart.draw_series(scores.iter().map(|(x, score)| {
            let ends = score.interval().map(|y| (*x, 100.0 * y));
            PathElement::new(ends.to_vec(), colour.mix(0.6).stroke_width(1))
        }))?;
        chart.draw_series(LineSeries::new(means(), colour.stroke_width(2)))?;
        match kernel.shape {
            Shape::Disc => chart.draw_series(means().map(|p| Circle::new(p, 4, colour.filled())))?,
            Shape::Ring => chart.draw_series(means().map(|p| Circle::new(p, 4, colour.stroke_width(2))))?,
            Shape::Triangle => chart.draw_series(means().map(|p| TriangleMarker::new(p, 5, colour.filled())))?,
            Shape::Cross => chart.draw_series(means().map(|p| Cross::new(p, 4, colour.stroke_width(2))))?,
        };
    }
    root.present()?;
    Ok(())
}

/// A key of the kernels, as HTML.
pub fn legend() -> String {
    let mut html = String::from("<p class=\"legend\">");
    for Kernel { name, colour: RGBColor(r, g, b), shape, .. } in &KERNELS {
        let colour = format!("#{r:02X}{g:02X}{b:02X}");
        let mark = match shape {
            Shape::Disc => format!("<circle cx=\"7\" cy=\"7\" r=\"5\" fill=\"{colour}\"/>"),
            Shape::Ring => {
                format!("<circle cx=\"7\" cy=\"7\" r=\"4\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>")
            }
            Shape::Triangle => format!("<path d=\"M7 1 13 12 1 12Z\" fill=\"{colour}\"/>"),
            Shape::Cross => format!("<path d=\"M2 2 12 12M12 2 2 12\" stroke=\"{colour}\" stroke-width=\"2.5\"/>"),
        };
        html.push_str(&format!("<span><svg viewBox=\"0 0 14 14\">{mark}</svg>{name}</span> "));
    }
    html.push_str(
        "<span><svg viewBox=\"0 0 26 14\"><line class=\"reference\" x1=\"1\" y1=\"7\" x2=\"25\" y2=\"7\"/></svg>a guess</span></p>",
    );
    html
}
