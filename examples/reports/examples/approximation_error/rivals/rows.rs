//! Rivals summed up over heads and seeds.

use super::Rival;
use super::measure::{Measurement, Outcome};
use crate::measure::Results;
use crate::summary::{Group, Spread, median, over_seeds};
use std::collections::BTreeMap;

/// One rival on the inputs of a group that it has a meaning on: medians over them for each seed,
/// then over seeds.
#[derive(Clone, Debug)]
pub struct Row {
    pub rival: Rival,
    /// The output error as it is, and after the best factor for each input.
    pub errors: [Spread; 2],
    /// The same of uniform attention, on the same inputs.
    pub uniform: [f64; 2],
    /// Inputs on which it is closer than uniform attention, in the median over seeds.
    pub beats_uniform: [usize; 2],
    /// Inputs that were measured.
    pub inputs: usize,
    pub state_floats: f64,
    pub microseconds: Option<f64>,
}

/// The rivals that were measured on an input of the group.
pub fn rows(results: &Results, group: &Group) -> Vec<Row> {
    let mut of_rivals: BTreeMap<Rival, Vec<(&Measurement, &Outcome)>> = BTreeMap::new();
    for m in results.rivals.measurements.iter().filter(|m| group.inputs.contains(&m.input)) {
        if let Ok(outcome) = &m.outcome {
            of_rivals.entry(m.rival).or_default().push((m, outcome));
        }
    }
    of_rivals.into_iter().filter_map(|(rival, measured)| row(results, rival, &measured)).collect()
}

fn row(results: &Results, rival: Rival, measured: &[(&Measurement, &Outcome)]) -> Option<Row> {
    let mut inputs: Vec<usize> = measured.iter().map(|(m, _)| m.input).collect();
    inputs.dedup();
    let spread = |which: usize| {
        Spread::of(&over_seeds(
            measured.iter().map(|(m, outcome)| (m.seed, errors(outcome)[which])),
        ))
    };
    let beats = |which: usize| {
        let beats = |input: &&usize| {
            let of_input = measured.iter().filter(|(m, _)| m.input == **input);
            let error = median(of_input.map(|(_, outcome)| errors(outcome)[which]));
            error.is_some_and(|error| error < uniform(results, **input)[which])
        };
        inputs.iter().filter(beats).count()
    };
    let median_uniform =
        |which: usize| median(inputs.iter().map(|input| uniform(results, *input)[which]));
    Some(Row {
        rival,
        errors: [spread(0)?, spread(1)?],
        uniform: [median_uniform(0)?, median_uniform(1)?],
        beats_uniform: [beats(0), beats(1)],
        inputs: inputs.len(),
        state_floats: median(measured.iter().map(|(m, _)| m.state_floats as f64))?,
        microseconds: median(measured.iter().filter_map(|(m, _)| m.microseconds)),
    })
}

fn errors(outcome: &Outcome) -> [f64; 2] {
    [outcome.report.output_error, outcome.factor_error]
}

/// The output error of uniform attention as it is, and after the best factor.
pub fn uniform(results: &Results, input: usize) -> [f64; 2] {
    [results.exact[input].report.uniform_error, results.rivals.uniform_factor_errors[input]]
}
