//! Marks and lines of the plots.

use super::axis::Axis;
use super::labels::{self, Frame};
use super::numbers::shortened;
use anyhow::Result;
use plotters::prelude::*;
use reports::page::{Block, Mark};
use reports::plots::{Area, FONT, INK, REFERENCE, Shape, inline};

/// Longer names are cut in plots.
const LONGEST_NAME: usize = 30;

/// The mark of a kernel: Okabe and Ito's colours, then the same with other shapes.
pub type Look = (RGBColor, Shape);

const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(140, 140, 140),
];

/// The look of the reference.
pub const OF_REFERENCE: Look = (INK, Shape::Disc);

/// The look of the kernel at a place.
pub fn look(place: usize) -> Look {
    let shapes = [Shape::Disc, Shape::Triangle, Shape::Cross, Shape::Ring];
    // neighbours differ in both; the first that is like another is the 29th
    (COLOURS[place % COLOURS.len()], shapes[place % shapes.len()])
}

/// Points of one kernel, in drawn units.
#[derive(Clone, Debug)]
pub struct Series {
    /// Colour and shape.
    pub look: Look,
    /// What is drawn; those beyond the axes are left out.
    pub points: Vec<(f64, f64)>,
    /// Beside the last point.
    pub name: Option<String>,
    /// Whether each point has a mark.
    pub marks: bool,
}

/// A plot.
#[derive(Clone, Debug)]
pub struct Panel {
    /// Above it.
    pub title: String,
    /// Below it.
    pub x: Axis,
    /// Left of it.
    pub y: Axis,
    /// From left to right.
    pub series: Vec<Series>,
    /// Dashed lines from side to side.
    pub across: Vec<f64>,
    /// Width and height.
    pub size: (u32, u32),
    /// Pixels of a letter, about.
    pub letters: i32,
}

impl Panel {
    /// A plot that holds nothing.
    pub fn new(title: &str, x: Axis, y: Axis) -> Self {
        let (series, across) = (Vec::new(), Vec::new());
        Self { title: title.to_owned(), x, y, series, across, size: (400, 330), letters: 17 }
    }

    /// Moves the series side by side, so that none hides another.
    pub fn spread(&mut self, share: f64) {
        let of = self.series.len() as f64;
        let step = (share * (self.x.high - self.x.low))
            .min(0.08 * (self.x.high - self.x.low) / of.max(1.0));
        for (place, series) in self.series.iter_mut().enumerate() {
            let shift = step * (place as f64 - 0.5 * (of - 1.0));
            series.points.iter_mut().for_each(|point| point.0 += shift);
        }
    }

    /// As inline SVG.
    pub fn svg(&self) -> Result<String> {
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, self.size).into_drawing_area();
            self.draw_on(&root)?;
            root.present()?;
        }
        Ok(inline(&svg, self.size, &self.title))
    }

    /// Draws it on some area.
    pub fn draw_on(&self, root: &Area<'_>) -> Result<()> {
        let font = |size: i32| (FONT, size).into_font().color(&INK);
        let mut chart = reports::plots::Frame {
            title: &self.title,
            x: self.x.scale(),
            y: self.y.scale(),
            x_label: &self.x.label,
            y_label: &self.y.label,
            x_text: &|x| self.x.text(*x),
            y_text: &|y| self.y.text(*y),
            left: 64,
            right: 18,
            letters: self.letters,
            title_letters: self.letters + 3,
        }
        .draw(root)?;
        for y in self.across.iter().filter(|y| self.y.holds(**y)) {
            let ends = vec![(self.x.low, *y), (self.x.high, *y)];
            chart.draw_series([PathElement::new(ends, REFERENCE.stroke_width(2))])?;
        }
        let mut marks = Vec::new();
        let mut names = Vec::new();
        for series in &self.series {
            let (colour, shape) = series.look;
            let inside = |(x, y): &(f64, f64)| self.x.holds(*x) && self.y.holds(*y);
            let points: Vec<(f64, f64)> = series.points.iter().copied().filter(inside).collect();
            if points.len() > 1 {
                chart
                    .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?;
            }
            let at: Vec<(i32, i32)> =
                points.iter().map(|point| chart.backend_coord(point)).collect();
            if let (Some(name), Some(last)) = (&series.name, at.last()) {
                names.push((*last, shortened(name, LONGEST_NAME)));
            }
            if !series.marks {
                continue;
            }
            marks.extend(at.into_iter().map(|at| Frame::around(at, 6)));
            shape.draw(&mut chart, points.into_iter(), colour.to_rgba(), 4)?;
        }
        let corner = |x, y| chart.backend_coord(&(x, y));
        let ((left, bottom), (right, top)) =
            (corner(self.x.low, self.y.low), corner(self.x.high, self.y.high));
        for y in self.across.iter().filter(|y| self.y.holds(**y)) {
            let (_, y) = corner(self.x.low, *y);
            marks.push(Frame { left, top: y - 2, right, bottom: y + 2 });
        }
        let places =
            labels::place(&names, self.letters - 1, &Frame { left, top, right, bottom }, &marks);
        let base = root.get_base_pixel();
        for ((_, name), (x, y)) in names.into_iter().zip(places) {
            root.draw(&Text::new(name, (x - base.0, y - base.1), font(self.letters - 1)))?;
        }
        Ok(())
    }
}

/// A key of marks; `dashed` says what the dashed line is.
pub fn key<'a>(marks: impl IntoIterator<Item = (Look, &'a str)>, dashed: Option<&str>) -> Block {
    let dashed = dashed.map(|text| Mark::line("reference", text));
    let marks =
        marks.into_iter().map(|((colour, shape), name)| shape.key(colour, shortened(name, 60)));
    Block::Key { marks: dashed.into_iter().chain(marks).collect() }
}
