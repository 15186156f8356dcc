//! Runs every rival on every input that it has a meaning on.

use super::Rival;
use crate::args::Plan;
use crate::data::Input;
use crate::measure::{Shape, microseconds_per_token, progress};
use dijiang::fidelity::{Reference, Report};
use dijiang::{Attention, Error, SoftmaxAttention};
use ndarray::{Array2, ArrayView2, Zip};
use rayon::prelude::*;
use std::collections::HashMap;

/// One rival with one seed on one input.
#[derive(Debug)]
pub struct Measurement {
    /// The input, by its place in the list.
    pub input: usize,
    pub rival: Rival,
    pub seed: u64,
    /// The size of the state, in numbers.
    pub state_floats: usize,
    pub microseconds: Option<f64>,
    /// What was measured, or why it could not be.
    pub outcome: Result<Outcome, String>,
}

#[derive(Clone, Debug)]
pub struct Outcome {
    pub report: Report,
    /// The output error after the best factor.
    pub factor_error: f64,
}

/// Everything that was measured of rivals.
#[derive(Debug, Default)]
pub struct Results {
    pub measurements: Vec<Measurement>,
    /// The output error of uniform attention after the best factor, by input.
    pub uniform_factor_errors: Vec<f64>,
}

/// The errors, on all threads.
pub fn errors(
    inputs: &[Input],
    references: &[Reference<f32>],
    plan: &Plan,
) -> Result<Results, Error> {
    let mut jobs = Vec::new();
    for (i, input) in inputs.iter().enumerate() {
        for &rival in plan.rivals.iter().filter(|rival| rival.applies_to(input)) {
            let seeds = if rival.is_random() { plan.seeds } else { 1 };
            jobs.extend((0..seeds).map(|seed| (i, rival, seed)));
        }
    }
    let progress = progress(jobs.len(), "measuring rivals");
    let measurements = jobs
        .into_par_iter()
        .with_max_len(1)
        .map(|(i, rival, seed)| {
            let measured = measure(&inputs[i], &references[i], rival, seed);
            progress.inc(1);
            let (state_floats, outcome) = match measured {
                Ok((state_floats, outcome)) => (state_floats, Ok(outcome)),
                Err(error) => (0, Err(error.to_string())),
            };
            Measurement { input: i, rival, seed, state_floats, microseconds: None, outcome }
        })
        .collect();
    progress.finish_and_clear();
    let uniform =
        inputs.par_iter().zip(references).map(|(input, reference)| uniform(input, reference));
    Ok(Results { measurements, uniform_factor_errors: uniform.collect::<Result<_, _>>()? })
}

fn measure(
    input: &Input,
    reference: &Reference<f32>,
    rival: Rival,
    seed: u64,
) -> Result<(usize, Outcome), Error> {
    let kernel = rival.build(input, seed)?;
    let output = kernel.forward(input.q.view(), input.k.view(), input.v.view(), input.mask)?;
    let factor_error = after_best_factor(&output, reference.output());
    let outcome = Outcome { report: reference.compare(kernel.as_ref())?, factor_error };
    Ok((rival.state_floats(kernel.as_ref(), input)?, outcome))
}

/// Queries of zeros look at all keys alike.
fn uniform(input: &Input, reference: &Reference<f32>) -> Result<f64, Error> {
    let zeros = Array2::zeros(input.q.dim());
    let softmax = SoftmaxAttention::new(input.head_dim())?;
    let output = softmax.forward(zeros.view(), input.k.view(), input.v.view(), input.mask)?;
    Ok(after_best_factor(&output, reference.output()))
}

/// `min_c ‖c·a − b‖/‖b‖`.
fn after_best_factor(a: &Array2<f32>, b: ArrayView2<'_, f64>) -> f64 {
    let a = a.mapv(f64::from);
    let dot = |x: ArrayView2<'_, f64>, y: ArrayView2<'_, f64>| {
        Zip::from(x).and(y).fold(0.0, |sum, x, y| sum + x * y)
    };
    let size = dot(a.view(), a.view());
    let factor = if size > 0.0 { dot(a.view(), b) / size } else { 0.0 };
    let difference = a * factor - b;
    match dot(difference.view(), difference.view()) {
        0.0 => 0.0,
        square => (square / dot(b, b)).sqrt(),
    }
}

/// The times, on this thread alone.
pub fn times(inputs: &[Input], results: &mut Results, plan: &Plan) {
    let mut known = HashMap::new();
    let progress = progress(results.measurements.len(), "measuring times of rivals");
    for measurement in results.measurements.iter_mut().filter(|m| m.outcome.is_ok()) {
        progress.inc(1);
        let (input, rival) = (&inputs[measurement.input], measurement.rival);
        measurement.microseconds = *known.entry((Shape::of(input), rival)).or_insert_with(|| {
            let kernel = rival.build(input, 0).ok()?;
            microseconds_per_token(kernel.as_ref(), input, plan.quick)
        });
    }
    progress.finish_and_clear();
}
