//! The plots of the page, as inline SVG.

use crate::kernels::Kernel;
use crate::measure::Results;
use crate::summary::{Group, Row, kernel_error_rate, median, rows};
use crate::text::{short, slope};
use plotters::prelude::*;
use reports::axes::Scale;
use reports::axes::{log_ends, log_ticks};
use reports::plots::{Area, Frame, inline};
pub use reports::plots::{REFERENCE, Shape};
use reports::text::shortened;

/// Dotted by the style sheet.
pub const GUIDE: RGBColor = RGBColor(1, 2, 6);

const WIDTH: u32 = 560;
const HEIGHT: u32 = 380;
/// More heads do not fit side by side.
const MOST_HEADS: usize = 24;

/// The mark of a kernel: one colour for each family (Okabe and Ito's palette), one shape for each
/// member.
pub type Look = (RGBColor, Shape);

pub const BLUE: RGBColor = RGBColor(0, 114, 178);
pub const SKY: RGBColor = RGBColor(86, 180, 233);
pub const VERMILLION: RGBColor = RGBColor(213, 94, 0);
pub const ORANGE: RGBColor = RGBColor(230, 159, 0);
pub const GREEN: RGBColor = RGBColor(0, 158, 115);
pub const PURPLE: RGBColor = RGBColor(204, 121, 167);
pub const GREY: RGBColor = RGBColor(140, 140, 140);

fn look(kernel: Kernel) -> Look {
    match kernel {
        Kernel::Performer => (BLUE, Shape::Disc),
        Kernel::PerformerIid => (SKY, Shape::Triangle),
        Kernel::PerformerHyperbolic => (BLUE, Shape::Cross),
        Kernel::Dct => (VERMILLION, Shape::Disc),
        Kernel::DctAntithetic => (ORANGE, Shape::Triangle),
        Kernel::DctNormal => (VERMILLION, Shape::Cross),
        Kernel::Official => (PURPLE, Shape::Triangle),
        Kernel::Wpff => (GREEN, Shape::Disc),
        Kernel::WpffSobol => (GREEN, Shape::Triangle),
        Kernel::WpffWeighted => (GREEN, Shape::Cross),
        Kernel::Taylor => (PURPLE, Shape::Disc),
    }
}

pub type Failure = Box<dyn std::error::Error>;

/// An axis in the units that are drawn: logarithms where `log`.
pub struct Axis {
    label: &'static str,
    low: f64,
    high: f64,
    ticks: Vec<(f64, String)>,
}

impl Axis {
    /// A logarithmic axis around the values, with ticks at 1, 2, 5 or at powers of ten.
    pub fn log(label: &'static str, values: &[f64]) -> Option<Self> {
        let good = values.iter().copied().filter(|x| *x > 0.0 && x.is_finite()).map(f64::log10);
        let (low, high) =
            good.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), x| (a.min(x), b.max(x)));
        if low > high {
            return None;
        }
        let (low, high) = log_ends(low, high);
        let ticks = log_ticks(low, high, 2.2)
            .into_iter()
            .map(|value| (value.log10(), tick(value)))
            .collect();
        Some(Self { label, low, high, ticks })
    }

    /// A logarithmic axis with ticks at the given numbers of features.
    fn features(rows: &[Row]) -> Option<Self> {
        let all: Vec<f64> = rows.iter().flat_map(|row| row.features).map(|m| m as f64).collect();
        let mut axis = Self::log("features m", &all)?;
        let mut asked: Vec<usize> =
            rows.iter().filter(|row| !row.kernel.is_fixed()).map(|row| row.features[0]).collect();
        asked.sort_unstable();
        asked.dedup();
        if (2..=10).contains(&asked.len()) {
            axis.ticks = asked.into_iter().map(|m| ((m as f64).log10(), m.to_string())).collect();
        }
        Some(axis)
    }

    fn linear(label: &'static str, low: f64, high: f64) -> Self {
        let step = [0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 5.0]
            .into_iter()
            .find(|step| (high - low) / step <= 9.0)
            .unwrap_or((high - low) / 5.0);
        let first = (low / step).ceil() as i64;
        let ticks = (first..)
            .map(|i| i as f64 * step)
            .take_while(|x| *x <= high + 1e-9)
            .map(|x| (x, tick(x)));
        Self { label, low, high, ticks: ticks.collect() }
    }

    fn categories(label: &'static str, names: Vec<String>) -> Self {
        let high = names.len() as f64;
        let ticks = names.into_iter().enumerate().map(|(i, name)| (i as f64 + 0.5, name)).collect();
        Self { label, low: 0.0, high, ticks }
    }

    fn scale(&self) -> Scale {
        Scale { range: self.low..self.high, ticks: self.ticks.iter().map(|(x, _)| *x).collect() }
    }

    fn text(&self, x: f64) -> String {
        let near = |(a, _): &&(f64, String)| (a - x).abs() < 1e-9;
        self.ticks.iter().find(near).map_or_else(String::new, |(_, text)| text.clone())
    }
}

fn tick(x: f64) -> String {
    if x == 0.0 {
        return "0".to_owned();
    }
    if x.abs() >= 1e4 || x.abs() < 1e-3 {
        return format!("{x:.0e}");
    }
    let text = format!("{x:.3}");
    text.trim_end_matches('0').trim_end_matches('.').replace('-', "−")
}

/// Points of one kernel, in drawn units.
pub struct Series {
    pub look: Look,
    pub points: Vec<(f64, f64)>,
    /// From, to.
    pub bars: Vec<[(f64, f64); 2]>,
    pub joined: bool,
    pub size: i32,
    pub alpha: f64,
}

/// A line that is no kernel's.
struct Reference {
    ends: [(f64, f64); 2],
    colour: RGBColor,
    width: u32,
}

pub struct Panel {
    title: String,
    x: Axis,
    y: Axis,
    pub series: Vec<Series>,
    references: Vec<Reference>,
    left: u32,
    size: (u32, u32),
}

impl Panel {
    pub fn new(title: impl Into<String>, x: Axis, y: Axis) -> Self {
        let (series, references) = (Vec::new(), Vec::new());
        Self { title: title.into(), x, y, series, references, left: 64, size: (WIDTH, HEIGHT) }
    }

    pub fn across(&mut self, y: f64, colour: RGBColor) {
        self.references.push(Reference {
            ends: [(self.x.low, y), (self.x.high, y)],
            colour,
            width: 2,
        });
    }

    pub fn upright(&mut self, x: f64, colour: RGBColor) {
        self.references.push(Reference {
            ends: [(x, self.y.low), (x, self.y.high)],
            colour,
            width: 2,
        });
    }

    pub fn draw(&self) -> Result<String, Failure> {
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, self.size).into_drawing_area();
            self.draw_on(&root)?;
            root.present()?;
        }
        Ok(inline(&svg, self.size, &self.title))
    }

    fn draw_on(&self, root: &Area<'_>) -> Result<(), Failure> {
        let mut chart = Frame {
            title: &self.title,
            x: self.x.scale(),
            y: self.y.scale(),
            x_label: self.x.label,
            y_label: self.y.label,
            x_text: &|x| self.x.text(*x),
            y_text: &|y| self.y.text(*y),
            left: self.left,
            letters: 15,
            title_letters: 19,
        }
        .draw(root)?;
        for reference in &self.references {
            chart.draw_series(std::iter::once(PathElement::new(
                reference.ends.to_vec(),
                reference.colour.stroke_width(reference.width),
            )))?;
        }
        for series in &self.series {
            let (colour, shape) = series.look;
            let colour = colour.mix(series.alpha);
            if series.joined {
                chart.draw_series(LineSeries::new(
                    series.points.iter().copied(),
                    colour.stroke_width(2),
                ))?;
            }
            chart.draw_series(
                series
                    .bars
                    .iter()
                    .map(|bar| PathElement::new(bar.to_vec(), colour.mix(0.6).stroke_width(2))),
            )?;
            shape.draw(&mut chart, series.points.iter().copied(), colour, series.size)?;
        }
        Ok(())
    }
}

/// A key of the kernels, as HTML.
pub fn legend(kernels: impl IntoIterator<Item = Kernel>, references: &[(&str, &str)]) -> String {
    key(kernels.into_iter().map(|kernel| (look(kernel), kernel.name())), references)
}

/// A key of marks and lines, as HTML.
pub fn key(
    marks: impl IntoIterator<Item = (Look, &'static str)>,
    references: &[(&str, &str)],
) -> String {
    let mut html = String::from("<p class=\"legend\">");
    for (class, text) in references {
        html.push_str(&format!(
            "<span><svg viewBox=\"0 0 26 14\"><line class=\"{class}\" x1=\"1\" y1=\"7\" x2=\"25\" \
             y2=\"7\"/></svg>{text}</span> "
        ));
    }
    for ((colour, shape), name) in marks {
        html.push_str(&shape.key(colour, name));
    }
    html.push_str("</p>");
    html
}

fn joined(
    rows: &[Row],
    kernel: Kernel,
    x: impl Fn(&Row) -> f64,
    y: impl Fn(&Row) -> Option<[f64; 3]>,
) -> Series {
    let (mut points, mut bars) = (Vec::new(), Vec::new());
    for row in rows.iter().filter(|row| row.kernel == kernel) {
        let Some(values) = y(row) else { continue };
        let [median, least, most] = values.map(f64::log10);
        if [median, least, most].iter().all(|y| y.is_finite()) {
            let x = x(row).log10();
            points.push((x, median));
            bars.push([(x, least), (x, most)]);
        }
    }
    let joined = points.len() > 1;
    Series { look: look(kernel), points, bars, joined, size: 4, alpha: 1.0 }
}

fn kernels(rows: &[Row]) -> Vec<Kernel> {
    Kernel::ALL.into_iter().filter(|kernel| rows.iter().any(|row| row.kernel == *kernel)).collect()
}

fn output(row: &Row) -> Option<[f64; 3]> {
    let error = row.output_error;
    Some([error.median, error.least, error.most])
}

fn kernel(row: &Row) -> Option<[f64; 3]> {
    let estimates = row.kernel.aims_at_softmax() || row.kernel == Kernel::DctNormal;
    row.kernel_error.filter(|_| estimates).map(|error| [error.median, error.least, error.most])
}

/// Output error against m.
pub fn output_against_features(
    results: &Results,
    group: &Group,
) -> Result<Option<String>, Failure> {
    let rows = rows(results, group);
    let uniform = group.uniform(results);
    let values: Vec<f64> = rows.iter().filter_map(output).flatten().chain([uniform]).collect();
    let (Some(x), Some(y)) = (Axis::features(&rows), Axis::log("relative output error", &values))
    else {
        return Ok(None);
    };
    let mut panel = Panel::new(&group.name, x, y);
    panel.across(uniform.log10(), REFERENCE);
    panel.series.extend(
        kernels(&rows).into_iter().map(|k| joined(&rows, k, |row| row.features[1] as f64, output)),
    );
    panel.draw().map(Some)
}

/// Kernel error against m, with the claimed slopes.
pub fn kernel_against_features(
    results: &Results,
    group: &Group,
) -> Result<Option<String>, Failure> {
    let rows: Vec<Row> =
        rows(results, group).into_iter().filter(|row| kernel(row).is_some()).collect();
    let values: Vec<f64> = rows.iter().filter_map(kernel).flatten().collect();
    let (Some(x), Some(y)) = (Axis::features(&rows), Axis::log("relative kernel error", &values))
    else {
        return Ok(None);
    };
    let mut panel = Panel::new(&group.name, x, y);
    let first = rows.iter().filter(|row| !row.kernel.is_fixed()).map(|row| row.features[0]).min();
    let at_first = rows
        .iter()
        .filter(|row| Some(row.features[0]) == first)
        .filter_map(kernel)
        .map(|[y, ..]| y);
    // A slope cannot be seen where nothing falls.
    let tall = panel.y.high - panel.y.low > 0.8;
    if let (Some(first), Some(start), true) = (first, median(at_first), tall) {
        let (first, start) = ((first as f64).log10(), start.log10());
        for claimed in [-0.5, -1.0] {
            // as far as the frame goes
            let last = panel.x.high.min(first + (start - panel.y.low) / -claimed);
            let ends = [(first, start), (last, start + claimed * (last - first))];
            panel.references.push(Reference { ends, colour: GUIDE, width: 2 });
        }
    }
    panel.series.extend(
        kernels(&rows).into_iter().map(|k| joined(&rows, k, |row| row.features[1] as f64, kernel)),
    );
    panel.draw().map(Some)
}

/// Output error against the size of the state; upright where exact attention lies.
pub fn output_against_state(results: &Results, group: &Group) -> Result<Option<String>, Failure> {
    let rows = rows(results, group);
    let uniform = group.uniform(results);
    let exact =
        median(group.inputs.iter().map(|i| results.exact[*i].state_floats as f64)).unwrap_or(1.0);
    let values: Vec<f64> = rows.iter().filter_map(output).flatten().chain([uniform]).collect();
    let states: Vec<f64> = rows.iter().map(|row| row.state_floats).chain([exact]).collect();
    let (Some(x), Some(y)) =
        (Axis::log("state (floats)", &states), Axis::log("relative output error", &values))
    else {
        return Ok(None);
    };
    let mut panel = Panel::new(&group.name, x, y);
    panel.across(uniform.log10(), REFERENCE);
    panel.upright(exact.log10(), GUIDE);
    panel.series.extend(
        kernels(&rows).into_iter().map(|k| joined(&rows, k, |row| row.state_floats, output)),
    );
    panel.draw().map(Some)
}

/// Measured slopes of the kernel error with their 95 % intervals: large marks for `small`, small
/// ones for each head.
pub fn slopes(
    results: &Results,
    small: Option<usize>,
    heads: &[usize],
) -> Result<Option<String>, Failure> {
    let inputs: Vec<(usize, bool)> = small
        .map(|i| (i, true))
        .into_iter()
        .chain(heads.iter().take(MOST_HEADS).map(|i| (*i, false)))
        .collect();
    let mut series = Vec::new();
    let mut names = Vec::new();
    let (mut low, mut high) = (-1.15_f64, 0.15_f64);
    for kernel in
        Kernel::ALL.into_iter().rev().filter(|k| k.aims_at_softmax() || *k == Kernel::DctNormal)
    {
        let rates: Vec<_> = inputs
            .iter()
            .filter_map(|(i, small)| Some((kernel_error_rate(results, kernel, *i)?, *small)))
            .collect();
        if rates.is_empty() {
            continue;
        }
        let row = names.len() as f64;
        names.push(kernel.name().to_owned());
        for (n, (rate, small)) in rates.iter().enumerate() {
            let y = row + 0.85 - 0.7 * (n as f64 + 0.5) / inputs.len() as f64;
            let [from, to] = rate.confidence.map(|x| x.clamp(-2.0, 1.0));
            (low, high) = (low.min(from - 0.05), high.max(to + 0.05));
            series.push(Series {
                look: look(kernel),
                points: vec![(rate.slope.clamp(-2.0, 1.0), y)],
                bars: vec![[(from, y), (to, y)]],
                joined: false,
                size: if *small { 6 } else { 3 },
                alpha: if *small { 1.0 } else { 0.55 },
            });
        }
    }
    if names.is_empty() {
        return Ok(None);
    }
    let height = 120 + 52 * names.len() as u32;
    let x = Axis::linear("slope of ln(kernel error) against ln m", low, high);
    let mut panel =
        Panel::new("Measured slopes with 95 % intervals", x, Axis::categories("", names));
    panel.left = 150;
    panel.size = (900, height);
    panel.upright(-1.0, REFERENCE);
    panel.upright(-0.5, GUIDE);
    panel.series = series;
    panel.draw().map(Some)
}

/// Output error by head at about `features` features, with uniform attention as a bar across each.
pub fn by_head(
    results: &Results,
    heads: &[usize],
    features: usize,
) -> Result<Option<String>, Failure> {
    let heads = &heads[..heads.len().min(MOST_HEADS)];
    let of_heads: Vec<Vec<Row>> =
        heads.iter().map(|i| rows(results, &Group::one(results, *i))).collect();
    let shown: Vec<Kernel> = Kernel::ALL
        .into_iter()
        .filter(|k| of_heads.iter().flatten().any(|row| row.kernel == *k))
        .collect();
    let mut series: Vec<Series> = shown
        .iter()
        .map(|kernel| Series {
            look: look(*kernel),
            points: Vec::new(),
            bars: Vec::new(),
            joined: false,
            size: 5,
            alpha: 1.0,
        })
        .collect();
    let mut references = Vec::new();
    let mut highest = 1.0_f64;
    for (column, (input, rows)) in heads.iter().zip(&of_heads).enumerate() {
        let uniform = results.exact[*input].report.uniform_error;
        let column = column as f64;
        highest = highest.max(uniform);
        references.push(Reference {
            ends: [(column + 0.06, uniform), (column + 0.94, uniform)],
            colour: REFERENCE,
            width: 3,
        });
        for (place, (series, kernel)) in series.iter_mut().zip(&shown).enumerate() {
            let nearest = rows
                .iter()
                .filter(|row| row.kernel == *kernel)
                .min_by_key(|row| row.features[0].abs_diff(features));
            let Some(error) = nearest.map(|row| row.output_error) else { continue };
            let x = column + 0.12 + 0.76 * (place as f64 + 0.5) / shown.len() as f64;
            highest = highest.max(error.median.min(4.0));
            series.points.push((x, error.median));
            series.bars.push([(x, error.least), (x, error.most)]);
        }
    }
    if heads.is_empty() || shown.is_empty() {
        return Ok(None);
    }
    let high = 1.08 * highest;
    for series in &mut series {
        series.points.iter_mut().for_each(|point| point.1 = point.1.min(high));
        series.bars.iter_mut().flatten().for_each(|point| point.1 = point.1.min(high));
    }
    let width = (620 / heads.len() / 8).max(6);
    let names = heads.iter().map(|i| shortened(&results.inputs[*i].name, width)).collect();
    let x = Axis::categories("head", names);
    let mut panel = Panel::new(
        format!("Output error by head, m = {features} or the kernel's own"),
        x,
        Axis::linear("relative output error", 0.0, high),
    );
    panel.size = (900, 440);
    panel.across(1.0, GUIDE);
    panel.series = series;
    panel.references.extend(references);
    panel.draw().map(Some)
}

/// The measured slopes as an HTML table: on `small`, and the range over heads.
pub fn slope_table(results: &Results, small: Option<usize>, heads: &[usize]) -> Option<String> {
    let mut html = String::new();
    for kernel in Kernel::ALL.into_iter().filter(|k| k.aims_at_softmax() || *k == Kernel::DctNormal)
    {
        let at_small = small.and_then(|i| kernel_error_rate(results, kernel, i));
        let on_heads: Vec<f64> = heads
            .iter()
            .filter_map(|i| Some(kernel_error_rate(results, kernel, *i)?.slope))
            .collect();
        if at_small.is_none() && on_heads.is_empty() {
            continue;
        }
        let claimed = kernel.claim().slope().map_or_else(|| "-".to_owned(), slope);
        let (measured, interval, errors) = at_small.map_or_else(
            || ("-".to_owned(), "-".to_owned(), "-".to_owned()),
            |rate| {
                let errors: Vec<_> = rate.mean_errors.iter().map(|x| short(*x)).collect();
                let [from, to] = rate.confidence.map(slope);
                (slope(rate.slope), format!("{from} … {to}"), errors.join(" → "))
            },
        );
        let range = match (
            on_heads.iter().copied().reduce(f64::min),
            on_heads.iter().copied().reduce(f64::max),
        ) {
            (Some(least), Some(most)) => format!("{} … {}", slope(least), slope(most)),
            _ => "-".to_owned(),
        };
        html.push_str(&format!(
            "<tr><th>{}</th><td>{claimed}</td><td>{measured}</td><td>{interval}</td><td>{errors}</\
             td><td>{range}</td></tr>",
            kernel.name()
        ));
    }
    (!html.is_empty()).then_some(html)
}
