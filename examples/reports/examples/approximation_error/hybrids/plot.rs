//! The plot of one head: output error against the size of the state, a line for each family.

use super::Memory;
use super::rows::{Row, rows};
use crate::measure::Results;
use crate::plots::{
    Axis, BLUE, Failure, GREEN, GREY, Look, PURPLE, Panel, Series, Shape, VERMILLION,
};

/// A line of the plot, or single marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Window,
    Features,
    Taylor,
    Heavy,
    Ward,
    CalibratedWard,
    Merged,
    Blocks,
    WardsCost,
}

impl Family {
    const ALL: [Self; 9] = [
        Self::Heavy,
        Self::Ward,
        Self::Blocks,
        Self::WardsCost,
        Self::Window,
        Self::Features,
        Self::Taylor,
        Self::CalibratedWard,
        Self::Merged,
    ];

    fn of(memory: Memory) -> Self {
        match memory {
            Memory::Dropped => Self::Window,
            Memory::Features(_) => Self::Features,
            Memory::Taylor { heavy: 0, .. } => Self::Taylor,
            Memory::Taylor { .. } => Self::Heavy,
            Memory::Ward { calibrated: true, .. } => Self::CalibratedWard,
            Memory::Ward { calibrated: false, .. } => Self::Ward,
            Memory::Merged { block: 1, ward: false, .. } => Self::Merged,
            Memory::Merged { block: 1, .. } => Self::WardsCost,
            Memory::Merged { .. } => Self::Blocks,
        }
    }

    /// `None` for variants, which are muted.
    fn name(self) -> Option<&'static str> {
        match self {
            Self::Window => Some("window"),
            Self::Features => Some("features"),
            Self::Taylor => Some("taylor"),
            Self::CalibratedWard => Some("ward"),
            Self::Merged => Some("merged"),
            Self::Heavy | Self::Ward | Self::Blocks | Self::WardsCost => None,
        }
    }

    fn look(self) -> Look {
        match self {
            Self::Window => (GREY, Shape::Disc),
            Self::Features => (BLUE, Shape::Triangle),
            Self::Taylor => (PURPLE, Shape::Disc),
            Self::CalibratedWard => (GREEN, Shape::Disc),
            Self::Merged => (VERMILLION, Shape::Disc),
            Self::Heavy | Self::Ward | Self::Blocks | Self::WardsCost => (GREY, Shape::Ring),
        }
    }
}

/// Output error against state floats on one head; upright the cache of exact attention, across
/// uniform attention.
pub fn pareto(results: &Results, input: usize) -> Result<Option<String>, Failure> {
    let rows = rows(results, input);
    let uniform = results.exact[input].report.uniform_error;
    let exact = results.exact[input].state_floats as f64;
    let all: Vec<Series> = Family::ALL
        .into_iter()
        .filter_map(|family| series(results, input, &rows, family))
        .collect();
    let back = |x: f64| 10_f64.powf(x);
    let points =
        || all.iter().flat_map(|series| series.points.iter().chain(series.bars.iter().flatten()));
    let states: Vec<f64> = points().map(|(x, _)| back(*x)).chain([exact]).collect();
    let errors: Vec<f64> = points().map(|(_, y)| back(*y)).chain([uniform]).collect();
    let (Some(x), Some(y)) =
        (Axis::log("state (floats)", &states), Axis::log("relative output error", &errors))
    else {
        return Ok(None);
    };
    if all.is_empty() {
        return Ok(None);
    }
    let mut panel = Panel::new(&results.inputs[input].name, x, y);
    panel.across(uniform.log10(), "uniform");
    panel.upright(exact.log10());
    panel.series = all;
    panel.draw().map(Some)
}

fn series(results: &Results, input: usize, rows: &[Row], family: Family) -> Option<Series> {
    let mut values: Vec<(usize, [f64; 3])> = rows
        .iter()
        .filter(|row| Family::of(row.contestant.memory) == family)
        .map(|row| (row.state_floats, [row.error.median, row.error.least, row.error.most]))
        .collect();
    if family == Family::Window {
        let of_token = results.inputs[input].head_dim() + results.inputs[input].value_dim();
        values.extend(rows.iter().filter_map(|row| {
            let window = row.equal_window?;
            Some(((window.tokens + row.contestant.sinks) * of_token, [window.error; 3]))
        }));
    }
    values.sort_by_key(|(floats, _)| *floats);
    values.dedup_by_key(|(floats, _)| *floats);
    let drawn: Vec<(f64, [f64; 3])> = values
        .into_iter()
        .map(|(floats, errors)| ((floats as f64).log10(), errors.map(f64::log10)))
        .filter(|(_, errors)| errors.iter().all(|y| y.is_finite()))
        .collect();
    let points: Vec<_> = drawn.iter().map(|(x, [median, ..])| (*x, *median)).collect();
    let bars = drawn
        .iter()
        .filter(|(_, [_, a, b])| a < b)
        .map(|(x, [_, a, b])| [(*x, *a), (*x, *b)])
        .collect();
    let is_muted = family.name().is_none();
    let joined = points.len() > 1 && !is_muted;
    let size = if is_muted || family == Family::Window { 3 } else { 4 };
    (!points.is_empty()).then(|| Series {
        look: family.look(),
        points,
        bars,
        joined,
        size,
        alpha: if is_muted { 0.6 } else { 1.0 },
        name: family.name(),
    })
}
