//! Charts and marks of the reports. Colours of text, axes and reference lines are placeholders that
//! the style sheets replace, so that they follow the reader's light or dark theme.

use crate::axes::Scale;
use crate::page::Mark;
use plotters::chart::ChartContext;
use plotters::coord::Shift;
use plotters::prelude::*;

/// Text and axes.
pub const INK: RGBColor = RGBColor(1, 2, 3);
/// Lines behind the plot.
pub const GRID: RGBColor = RGBColor(1, 2, 4);
/// Dashed by the style sheet.
pub const REFERENCE: RGBColor = RGBColor(1, 2, 5);

pub const FONT: &str = "sans-serif";

pub type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
pub type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Scale, Scale>>;
pub type Failure = DrawingAreaErrorKind<std::io::Error>;

/// The shape of a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    Disc,
    Ring,
    Triangle,
    Cross,
}

impl Shape {
    /// A mark at every point, `size` pixels from its middle to its edge.
    pub fn draw(
        self,
        chart: &mut Chart<'_, '_>,
        points: impl Iterator<Item = (f64, f64)>,
        colour: RGBAColor,
        size: i32,
    ) -> Result<(), Failure> {
        match self {
            Self::Disc => {
                chart.draw_series(points.map(|p| Circle::new(p, size, colour.filled())))?
            }
            Self::Ring => {
                chart.draw_series(points.map(|p| Circle::new(p, size, colour.stroke_width(2))))?
            }
            Self::Triangle => chart
                .draw_series(points.map(|p| TriangleMarker::new(p, size + 1, colour.filled())))?,
            Self::Cross => {
                chart.draw_series(points.map(|p| Cross::new(p, size, colour.stroke_width(2))))?
            }
        };
        Ok(())
    }

    /// The mark and what it stands for, in a key.
    pub fn key(self, RGBColor(r, g, b): RGBColor, name: impl Into<String>) -> Mark {
        let shape = match self {
            Self::Disc => "disc",
            Self::Ring => "ring",
            Self::Triangle => "triangle",
            Self::Cross => "cross",
        };
        Mark { shape, colour: format!("#{r:02X}{g:02X}{b:02X}"), name: name.into() }
    }
}

/// What stands around a chart.
pub struct Frame<'a> {
    pub title: &'a str,
    pub x: Scale,
    pub y: Scale,
    pub x_label: &'a str,
    pub y_label: &'a str,
    /// The text of a tick.
    pub x_text: &'a dyn Fn(&f64) -> String,
    pub y_text: &'a dyn Fn(&f64) -> String,
    /// Pixels left of it, and right of it.
    pub left: u32,
    pub right: u32,
    /// Pixels of a letter, about; of the title.
    pub letters: i32,
    pub title_letters: i32,
}

impl Frame<'_> {
    /// An empty chart with its axes.
    pub fn draw<'a, 'b>(self, root: &'a Area<'b>) -> Result<Chart<'a, 'b>, Failure> {
        let font = |size: i32| (FONT, size).into_font().color(&INK);
        let mut chart = ChartBuilder::on(root)
            .caption(
                self.title,
                (FONT, self.title_letters).into_font().style(FontStyle::Bold).color(&INK),
            )
            .margin(8)
            .margin_right(self.right)
            .x_label_area_size(46)
            .y_label_area_size(self.left)
            .build_cartesian_2d(self.x, self.y)?;
        chart
            .configure_mesh()
            .axis_style(INK)
            .bold_line_style(GRID)
            .max_light_lines(0)
            .x_labels(40)
            .y_labels(40)
            .x_label_formatter(self.x_text)
            .y_label_formatter(self.y_text)
            .label_style(font(self.letters))
            .axis_desc_style(font(self.letters + 1))
            .x_desc(self.x_label)
            .y_desc(self.y_label)
            .draw()?;
        Ok(chart)
    }
}

/// A drawn SVG as a part of a page: it needs no namespace, and its size follows the page.
pub fn inline(svg: &str, (width, height): (u32, u32), title: &str) -> String {
    let start = svg.find("<svg").unwrap_or(0);
    let end = svg[start..].find('>').map_or(start, |i| start + i + 1);
    let label = escaped(title);
    format!(
        "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{label}\">{}",
        &svg[end..]
    )
}

/// Text for HTML and its attributes.
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
