//! The hybrids of one head, summed up over seeds.

use super::measure::{EqualWindow, Measurement};
use super::{Contestant, Hybrid};
use crate::measure::Results;
use crate::summary::{Spread, median};

/// One hybrid of one size on one head: medians over seeds.
#[derive(Clone, Debug)]
pub struct Row {
    pub contestant: Contestant,
    pub error: Spread,
    pub state_floats: usize,
    pub equal_window: Option<EqualWindow>,
    pub microseconds: Option<f64>,
}

impl Row {
    /// How many times smaller its error is than that of the window of equal size, if there is any.
    pub fn gain(&self) -> Option<f64> {
        let gain = self.equal_window?.error / self.error.median;
        gain.is_finite().then_some(gain)
    }

    /// Whether it is closer than the window of equal size, or where there is none than uniform
    /// attention.
    pub fn is_useful(&self, uniform: f64) -> bool {
        self.error.median < self.equal_window.map_or(uniform, |window| window.error)
    }

    pub fn is_window(&self) -> bool {
        self.contestant.hybrid() == Hybrid::Window
    }
}

/// The hybrids of an input, in the order they were measured.
pub fn rows(results: &Results, input: usize) -> Vec<Row> {
    let mut of_contestants: Vec<Vec<&Measurement>> = Vec::new();
    for measurement in results.hybrids.measurements.iter().filter(|m| m.input == input) {
        match of_contestants.last_mut().filter(|last| last[0].contestant == measurement.contestant)
        {
            Some(last) => last.push(measurement),
            None => of_contestants.push(vec![measurement]),
        }
    }
    of_contestants.iter().filter_map(|measurements| row(measurements)).collect()
}

fn row(measurements: &[&Measurement]) -> Option<Row> {
    let good: Vec<_> =
        measurements.iter().filter_map(|m| Some((*m, m.outcome.as_ref().ok()?))).collect();
    let errors: Vec<f64> = good.iter().map(|(_, outcome)| outcome.report.output_error).collect();
    let (first, outcome) = good.first()?;
    Some(Row {
        contestant: first.contestant,
        error: Spread::of(&errors)?,
        state_floats: first.state_floats,
        equal_window: outcome.equal_window,
        microseconds: median(good.iter().filter_map(|(m, _)| m.microseconds)),
    })
}

/// The rows of the table.
pub fn table_rows(results: &Results, input: usize) -> Vec<Row> {
    rows(results, input).into_iter().filter(|row| row.contestant.in_table).collect()
}

/// The smallest error that is not a window's.
pub fn best(rows: &[Row]) -> Option<&Row> {
    let hybrids = rows.iter().filter(|row| !row.is_window());
    hybrids.min_by(|a, b| a.error.median.total_cmp(&b.error.median))
}

/// The inputs that are in the table.
pub fn inputs(results: &Results) -> Vec<usize> {
    (0..results.inputs.len()).filter(|i| !table_rows(results, *i).is_empty()).collect()
}
