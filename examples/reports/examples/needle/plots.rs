//! The plots of the page, as inline SVG.

use crate::kernels::KERNELS;
use crate::measure::{Curve, Plan, Results};
use crate::task::{CLASSES, Sort};
use plotters::prelude::*;
use reports::axes::Scale;
use reports::plots::{Frame, REFERENCE, inline};

const SIZE: (u32, u32) = (400, 330);

type Failure = Box<dyn std::error::Error>;

/// Right answers of every kernel along one curve.
pub fn accuracy(
    results: &Results,
    plan: &Plan,
    sort: Sort,
    curve: Curve,
) -> Result<String, Failure> {
    let title = format!("{} pairs, {}", sort.name(), curve.fixed(plan));
    let mut svg = String::new();
    draw(&mut svg, &title, results, plan, sort, curve)?;
    Ok(inline(&svg, SIZE, &title))
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
    let last = points.len() as f64 - 1.0;
    let x = Scale { range: -0.4..last + 0.4, ticks: (0..points.len()).map(|i| i as f64).collect() };
    let y = Scale { range: -4.0..104.0, ticks: (0..=5).map(|i| f64::from(i) * 20.0).collect() };

    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let mut chart = Frame {
        title,
        x,
        y,
        x_label: if curve == Curve::Distance { "distance (tokens)" } else { "load (pairs)" },
        y_label: "right answers (%)",
        x_text: &|x| points.get(x.round() as usize).map_or_else(String::new, usize::to_string),
        y_text: &|y| format!("{y:.0}"),
        left: 62,
        right: 18,
        letters: 17,
        title_letters: 19,
    }
    .draw(&root)?;
    let guess = 100.0 / CLASSES as f64;
    chart.draw_series([PathElement::new(
        vec![(-0.4, guess), (last + 0.4, guess)],
        REFERENCE.stroke_width(2),
    )])?;

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
        kernel.shape.draw(&mut chart, means(), colour.to_rgba(), 4)?;
    }
    root.present()?;
    Ok(())
}
