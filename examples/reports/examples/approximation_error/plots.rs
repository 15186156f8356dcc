//! The plots of the page, as inline SVG.

use crate::kernels::{Family, Kernel};
use crate::measure::Results;
use crate::summary::{Group, Row, kernel_error_rate, median, rows};
use crate::text::{short, slope};
use plotters::prelude::*;
use reports::axes::{Scale, log_ends, log_ticks};
use reports::page::{self, DotRow, Dots};
pub use reports::plots::Shape;
use reports::plots::{Area, Chart, FONT, Frame, INK, REFERENCE, inline};
use reports::text::shortened;

/// Dotted by the style sheet.
pub const GUIDE: RGBColor = RGBColor(1, 2, 6);

/// So wide that text keeps its size on a phone.
const WIDTH: u32 = 360;
const HEIGHT: u32 = 290;
/// Of the text, about; and the room for names of lines.
const LETTERS: i32 = 17;
const RIGHT: u32 = 90;
/// More heads make a page too long.
const MOST_HEADS: usize = 24;

/// The mark of a kernel; colours are of Okabe and Ito's palette.
pub type Look = (RGBColor, Shape);

pub const BLUE: RGBColor = RGBColor(0, 114, 178);
pub const VERMILLION: RGBColor = RGBColor(213, 94, 0);
pub const GREEN: RGBColor = RGBColor(0, 158, 115);
pub const PURPLE: RGBColor = RGBColor(204, 121, 167);
pub const GREY: RGBColor = RGBColor(140, 140, 140);

/// A colour for each member of a family.
fn look(kernel: Kernel) -> Look {
    match kernel {
        Kernel::Performer | Kernel::Dct | Kernel::Wpff | Kernel::Learned => (BLUE, Shape::Disc),
        Kernel::PerformerIid | Kernel::DctAntithetic | Kernel::WpffSobol | Kernel::Hedgehog => {
            (VERMILLION, Shape::Triangle)
        }
        Kernel::PerformerHyperbolic | Kernel::DctNormal | Kernel::WpffWeighted => {
            (GREEN, Shape::Cross)
        }
        Kernel::Taylor => (PURPLE, Shape::Disc),
        Kernel::Official => (PURPLE, Shape::Triangle),
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

    fn scale(&self) -> Scale {
        Scale { range: self.low..self.high, ticks: self.ticks.iter().map(|(x, _)| *x).collect() }
    }

    fn text(&self, x: f64) -> String {
        let near = |(a, _): &&(f64, String)| (a - x).abs() < 1e-9;
        self.ticks.iter().find(near).map_or_else(String::new, |(_, text)| text.clone())
    }
}

/// The text of a tick.
pub fn tick(x: f64) -> String {
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
    /// Written at its right end.
    pub name: Option<&'static str>,
}

/// A line that is no kernel's.
struct Reference {
    ends: [(f64, f64); 2],
    colour: RGBColor,
    name: Option<&'static str>,
}

pub struct Panel {
    title: String,
    x: Axis,
    y: Axis,
    pub series: Vec<Series>,
    references: Vec<Reference>,
}

impl Panel {
    pub fn new(title: impl Into<String>, x: Axis, y: Axis) -> Self {
        let (series, references) = (Vec::new(), Vec::new());
        Self { title: title.into(), x, y, series, references }
    }

    pub fn across(&mut self, y: f64, name: &'static str) {
        let ends = [(self.x.low, y), (self.x.high, y)];
        if y.is_finite() {
            self.references.push(Reference { ends, colour: REFERENCE, name: Some(name) });
        }
    }

    pub fn upright(&mut self, x: f64) {
        let ends = [(x, self.y.low), (x, self.y.high)];
        self.references.push(Reference { ends, colour: GUIDE, name: None });
    }

    pub fn draw(&self) -> Result<String, Failure> {
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT)).into_drawing_area();
            self.draw_on(&root)?;
            root.present()?;
        }
        Ok(inline(&svg, (WIDTH, HEIGHT), &self.title))
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
            left: 62,
            right: RIGHT,
            letters: LETTERS,
            title_letters: 19,
        }
        .draw(root)?;
        for reference in &self.references {
            chart.draw_series(std::iter::once(PathElement::new(
                reference.ends.to_vec(),
                reference.colour.stroke_width(2),
            )))?;
        }
        for series in &self.series {
            let (colour, shape) = series.look;
            let colour = colour.mix(series.alpha);
            if series.joined {
                let width = if series.name.is_some() { 2 } else { 1 };
                chart.draw_series(LineSeries::new(
                    series.points.iter().copied(),
                    colour.stroke_width(width),
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
        self.names(root, &chart)
    }

    /// The names of lines at their right ends, moved apart.
    fn names(&self, root: &Area<'_>, chart: &Chart<'_, '_>) -> Result<(), Failure> {
        let of_lines =
            self.references.iter().filter_map(|line| Some((line.ends[1], line.name?, INK)));
        let of_series = self
            .series
            .iter()
            .filter_map(|series| Some((*series.points.last()?, series.name?, series.look.0)));
        let place = |(end, name, colour)| (chart.backend_coord(&end).1, name, colour);
        let mut names: Vec<(i32, &str, RGBColor)> = of_lines.chain(of_series).map(place).collect();
        names.sort_by_key(|(y, ..)| *y);
        for i in 1..names.len() {
            names[i].0 = names[i].0.max(names[i - 1].0 + LETTERS);
        }
        let (x, mut lowest) = chart.backend_coord(&(self.x.high, self.y.low));
        for name in names.iter_mut().rev() {
            name.0 = name.0.min(lowest);
            lowest = name.0 - LETTERS;
        }
        for (y, name, colour) in names {
            let style = (FONT, LETTERS).into_font().color(&colour);
            root.draw(&Text::new(name, (x + 6, y - LETTERS / 2), style))?;
        }
        Ok(())
    }
}

fn joined(
    rows: &[Row],
    kernel: Kernel,
    family: Family,
    y: impl Fn(&Row) -> Option<[f64; 3]>,
) -> Series {
    let is_shown = kernel.family() == family;
    let (mut points, mut bars) = (Vec::new(), Vec::new());
    for row in rows.iter().filter(|row| row.kernel == kernel) {
        let Some(values) = y(row) else { continue };
        let [median, least, most] = values.map(f64::log10);
        if [median, least, most].iter().all(|y| y.is_finite()) {
            let x = (row.features[1] as f64).log10();
            points.push((x, median));
            if is_shown {
                bars.push([(x, least), (x, most)]);
            }
        }
    }
    let joined = points.len() > 1;
    if is_shown {
        let name = Some(kernel.short_name());
        Series { look: look(kernel), points, bars, joined, size: 4, alpha: 1.0, name }
    } else {
        // single marks are named wherever they stand
        let name = kernel.is_fixed().then(|| kernel.short_name());
        let size = if name.is_some() { 3 } else { 2 };
        Series { look: (GREY, Shape::Disc), points, bars, joined, size, alpha: 0.5, name }
    }
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

/// The lines of a family over those of the others.
fn of_family(rows: &[Row], family: Family, y: impl Fn(&Row) -> Option<[f64; 3]>) -> Vec<Series> {
    let (mut others, shown): (Vec<_>, Vec<_>) =
        kernels(rows).into_iter().partition(|kernel| kernel.family() != family);
    others.extend(shown);
    others.into_iter().map(|kernel| joined(rows, kernel, family, &y)).collect()
}

/// The families with lines of their own: those whose number of features can be chosen.
pub fn families(rows: &[Row]) -> Vec<Family> {
    let has_line = |family: &Family| {
        rows.iter().any(|row| row.kernel.family() == *family && !row.kernel.is_fixed())
    };
    Family::ALL.into_iter().filter(has_line).collect()
}

/// Output error of one family against m; upright where its state is as large as the cache.
pub fn output_against_features(
    results: &Results,
    group: &Group,
    family: Family,
) -> Result<Option<String>, Failure> {
    let rows = rows(results, group);
    let uniform = group.uniform(results);
    let values: Vec<f64> = rows.iter().filter_map(output).flatten().chain([uniform]).collect();
    let (Some(x), Some(y)) = (Axis::features(&rows), Axis::log("relative output error", &values))
    else {
        return Ok(None);
    };
    let mut panel = Panel::new(format!("{}, {}", family.name(), group.name), x, y);
    panel.across(uniform.log10(), "uniform");
    let exact = group.inputs.iter().map(|i| {
        results.exact[*i].state_floats as f64 / (2 * (results.inputs[*i].value_dim() + 1)) as f64
    });
    if let Some(m) =
        median(exact).map(f64::log10).filter(|m| (panel.x.low..panel.x.high).contains(m))
    {
        panel.upright(m);
    }
    panel.series = of_family(&rows, family, output);
    panel.draw().map(Some)
}

/// Kernel error of one family against m, with the claimed slopes.
pub fn kernel_against_features(
    results: &Results,
    group: &Group,
    family: Family,
) -> Result<Option<String>, Failure> {
    let rows: Vec<Row> =
        rows(results, group).into_iter().filter(|row| kernel(row).is_some()).collect();
    let values: Vec<f64> = rows.iter().filter_map(kernel).flatten().collect();
    let (Some(x), Some(y)) = (Axis::features(&rows), Axis::log("relative kernel error", &values))
    else {
        return Ok(None);
    };
    let mut panel = Panel::new(format!("{}, {}", family.name(), group.name), x, y);
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
            panel.references.push(Reference { ends, colour: GUIDE, name: None });
        }
    }
    panel.series = of_family(&rows, family, kernel);
    panel.draw().map(Some)
}

fn shown_slopes() -> impl Iterator<Item = Kernel> {
    Kernel::ALL.into_iter().filter(|k| k.aims_at_softmax() || *k == Kernel::DctNormal)
}

/// Measured slopes of the kernel error: on `small` with its 95 % interval, and on each head.
pub fn slopes(results: &Results, small: Option<usize>, heads: &[usize]) -> Option<Dots> {
    let kernels = || {
        shown_slopes().map(|kernel| {
            let rate = |input: usize| kernel_error_rate(results, kernel, input);
            let on_heads = heads.iter().filter_map(|i| Some((rate(*i)?.slope, *i)));
            (kernel, small.and_then(rate), on_heads.collect::<Vec<_>>())
        })
    };
    let (mut low, mut high) = (-1.15_f64, 0.15_f64);
    for (_, rate, on_heads) in kernels() {
        let ends = rate.iter().flat_map(|rate| rate.confidence);
        for x in ends.chain(on_heads.iter().map(|(slope, _)| *slope)) {
            (low, high) = (low.min(x - 0.05).max(-2.0), high.max(x + 0.05).min(1.0));
        }
    }
    let axis = page::Axis { low, high, logarithmic: false };
    let mut dots = Dots::new(
        "The kernel error falls as a power of m: its exponent",
        "slope of ln(kernel error) against ln m",
        axis,
    );
    let ticks = (-8..=4).map(|i| f64::from(i) * 0.25).filter(|x| (low..=high).contains(x));
    dots.ticks(ticks.map(|x| (x, tick(x))));
    dots.line("reference", -1.0, "quasi-Monte Carlo");
    dots.line("guide", -0.5, "Monte Carlo");
    for (kernel, rate, on_heads) in kernels() {
        if rate.is_none() && on_heads.is_empty() {
            continue;
        }
        let interval = rate.as_ref().map(|rate| rate.confidence);
        dots.row(DotRow {
            name: kernel.name().to_owned(),
            value: rate.as_ref().map_or_else(String::new, |rate| slope(rate.slope)),
            kind: "plain",
            dots: on_heads
                .into_iter()
                .map(|(x, i)| (x, format!("{}: {}", results.inputs[i].name, slope(x))))
                .collect(),
            middle: rate.map(|rate| rate.slope),
            bar: interval,
            ..DotRow::default()
        });
    }
    (!dots.is_empty()).then_some(dots)
}

/// Output error by head at about `features` features: a chart for each head, a row for each family.
pub fn by_head(results: &Results, heads: &[usize], features: usize) -> Vec<Dots> {
    let heads = &heads[..heads.len().min(MOST_HEADS)];
    let of_heads: Vec<Vec<Row>> = heads
        .iter()
        .map(|i| {
            let all = rows(results, &Group::one(results, *i));
            let nearest = |kernel: Kernel| {
                let of_kernel = all.iter().filter(|row| row.kernel == kernel);
                of_kernel.min_by_key(|row| row.features[0].abs_diff(features)).cloned()
            };
            Kernel::ALL.into_iter().filter_map(nearest).collect()
        })
        .collect();
    let errors = of_heads.iter().flatten().map(|row| row.output_error.median.min(4.0));
    let uniform = |input: usize| results.exact[input].report.uniform_error;
    let highest = errors.chain(heads.iter().map(|i| uniform(*i))).fold(1.0, f64::max);
    let mut charts = Vec::new();
    for (&input, rows) in heads.iter().zip(&of_heads) {
        let axis = page::Axis { low: 0.0, high: 1.08 * highest, logarithmic: false };
        let title = format!("Head {}", shortened(&results.inputs[input].name, 30));
        let mut dots = Dots::new(title, "relative output error", axis);
        let step = if highest > 2.0 { 1.0 } else { 0.5 };
        dots.ticks(
            (0..=8)
                .map(|i| f64::from(i) * step)
                .take_while(|x| *x <= highest)
                .map(|x| (x, tick(x))),
        );
        dots.line("reference", uniform(input), format!("uniform {}", short(uniform(input))));
        for family in Family::ALL {
            let members: Vec<&Row> =
                rows.iter().filter(|row| row.kernel.family() == family).collect();
            let errors = || members.iter().map(|row| row.output_error.median);
            let Some(least) = errors().reduce(f64::min) else { continue };
            dots.row(DotRow {
                name: family.name().to_owned(),
                value: short(least),
                kind: if least < uniform(input) { "plain" } else { "useless" },
                dots: members
                    .iter()
                    .map(|row| {
                        let error = row.output_error.median;
                        (error, format!("{}: {}", row.kernel.name(), short(error)))
                    })
                    .collect(),
                middle: Some(least),
                ..DotRow::default()
            });
        }
        if !dots.is_empty() {
            charts.push(dots);
        }
    }
    charts
}

/// The measured slopes: on `small`, and the range over heads.
pub fn slope_table(results: &Results, small: Option<usize>, heads: &[usize]) -> Vec<Vec<String>> {
    let mut lines = Vec::new();
    for kernel in shown_slopes() {
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
        lines.push(vec![kernel.name().to_owned(), claimed, measured, interval, errors, range]);
    }
    lines
}
