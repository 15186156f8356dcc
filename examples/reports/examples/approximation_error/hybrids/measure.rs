//! Runs every hybrid on every real head, and beside it the window of as many floats.

use super::{Contestant, calibration};
use crate::args::Plan;
use crate::data::Input;
use crate::measure::{Shape, microseconds_per_token, progress};
use dijiang::fidelity::{Reference, Report};
use dijiang::{Calibration, Error, Far, HybridAttention, Mask};
use rayon::prelude::*;

/// One hybrid with one seed on one input.
#[derive(Debug)]
pub struct Measurement {
    /// The input, by its place in the list.
    pub input: usize,
    pub contestant: Contestant,
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
    /// `None` for a window itself, and where there is none.
    pub equal_window: Option<EqualWindow>,
}

/// The window that keeps as many floats, the same sinks included, and drops the rest.
#[derive(Clone, Copy, Debug)]
pub struct EqualWindow {
    pub tokens: usize,
    pub error: f64,
}

/// What the hybrids of one input are held against.
#[derive(Clone, Copy, Debug)]
pub struct Baseline {
    /// The share of attention outside the window and the sinks: the mean over queries with a key
    /// there.
    pub far_share: f64,
    /// The output error of the same window with its far part dropped; `None` where there is no
    /// window.
    pub dropped_error: Option<f64>,
}

/// Everything that was measured of hybrids.
#[derive(Debug, Default)]
pub struct Results {
    pub measurements: Vec<Measurement>,
    /// For each input, `None` for those where no hybrid was measured.
    pub baselines: Vec<Option<Baseline>>,
}

/// The errors, on all threads.
pub fn errors(inputs: &[Input], references: &[Reference<f32>], plan: &Plan) -> Results {
    let calibrations: Vec<_> = inputs
        .par_iter()
        .map(|input| {
            if plan.hybrids.is_empty() || !input.is_real() {
                None
            } else {
                calibration(input, &plan.sizes)
            }
        })
        .collect();
    let mut jobs = Vec::new();
    for (i, input) in inputs.iter().enumerate().filter(|(_, input)| input.is_real()) {
        for contestant in Contestant::all(&plan.hybrids, &plan.sizes, input) {
            let seeds = if contestant.is_random() { plan.seeds } else { 1 };
            jobs.extend((0..seeds).map(|seed| (i, contestant, seed)));
        }
    }
    let progress = progress(jobs.len(), "measuring hybrids");
    let measurements: Vec<_> = jobs
        .into_par_iter()
        .with_max_len(1)
        .filter_map(|(i, contestant, seed)| {
            let measured =
                measure(&inputs[i], &references[i], calibrations[i].as_ref(), contestant, seed);
            progress.inc(1);
            let (state_floats, outcome) = match measured? {
                Ok((state_floats, outcome)) => (state_floats, Ok(outcome)),
                Err(error) => (0, Err(error.to_string())),
            };
            Some(Measurement {
                input: i,
                contestant,
                seed,
                state_floats,
                microseconds: None,
                outcome,
            })
        })
        .collect();
    progress.finish_and_clear();
    let baselines = (0..inputs.len())
        .map(|i| {
            measurements.iter().find(|m| m.input == i)?;
            baseline(&inputs[i], &references[i], plan)
        })
        .collect();
    Results { measurements, baselines }
}

/// `None` if the state is no smaller than the keys and values themselves.
fn measure(
    input: &Input,
    reference: &Reference<f32>,
    calibration: Option<&Result<Calibration, Error>>,
    contestant: Contestant,
    seed: u64,
) -> Option<Result<(usize, Outcome), Error>> {
    let measured = || {
        let calibration = match calibration {
            Some(Err(error)) if contestant.needs_calibration() => return Err(error.clone()),
            Some(Ok(calibration)) => Some(calibration),
            _ => None,
        };
        let kernel = contestant.build(input.head_dim(), calibration, seed)?;
        let state_floats = kernel.state_floats(input.value_dim(), input.k.nrows())?;
        if state_floats >= input.exact_floats() {
            return Ok(None);
        }
        let report = reference.compare(kernel.as_ref())?;
        let equal_window = equal_window(input, reference, &contestant, state_floats)?;
        Ok(Some((state_floats, Outcome { report, equal_window })))
    };
    measured().transpose()
}

fn equal_window(
    input: &Input,
    reference: &Reference<f32>,
    contestant: &Contestant,
    state_floats: usize,
) -> Result<Option<EqualWindow>, Error> {
    if input.mask != Mask::Causal || contestant.memory == super::Memory::Dropped {
        return Ok(None);
    }
    let tokens = state_floats / (input.head_dim() + input.value_dim()) - contestant.sinks;
    let error = reference.output_error(&window(input, tokens, contestant.sinks)?)?;
    Ok(Some(EqualWindow { tokens, error }))
}

fn window(input: &Input, tokens: usize, sinks: usize) -> Result<HybridAttention<f32>, Error> {
    HybridAttention::builder(input.head_dim()).window(tokens).sinks(sinks).far(Far::none()).build()
}

fn baseline(input: &Input, reference: &Reference<f32>, plan: &Plan) -> Option<Baseline> {
    if input.mask != Mask::Causal {
        return Some(Baseline { far_share: 1.0, dropped_error: None });
    }
    let (tokens, sinks) = (plan.sizes.window, plan.sizes.sinks);
    let far: Vec<f64> = reference
        .attention()
        .outer_iter()
        .enumerate()
        .filter(|(t, _)| *t >= sinks + tokens)
        .map(|(t, row)| row.iter().take(t + 1 - tokens).skip(sinks).sum())
        .collect();
    let far_share = if far.is_empty() { 0.0 } else { far.iter().sum::<f64>() / far.len() as f64 };
    let dropped_error =
        window(input, tokens, sinks).and_then(|kernel| reference.output_error(&kernel)).ok()?;
    Some(Baseline { far_share, dropped_error: Some(dropped_error) })
}

/// The times, on this thread alone.
pub fn times(inputs: &[Input], results: &mut Results, plan: &Plan) {
    let mut known: Vec<(Shape, Contestant, Option<f64>)> = Vec::new();
    let progress = progress(results.measurements.len(), "measuring times of hybrids");
    for measurement in results.measurements.iter_mut().filter(|m| m.outcome.is_ok()) {
        progress.inc(1);
        let input = &inputs[measurement.input];
        let (shape, contestant) = (Shape::of(input), measurement.contestant);
        let same = known.iter().find(|(s, c, _)| (s, c) == (&shape, &contestant));
        measurement.microseconds = match same {
            Some((.., time)) => *time,
            None => {
                let calibration = calibration(input, &plan.sizes).and_then(Result::ok);
                let kernel = contestant.build(input.head_dim(), calibration.as_ref(), 0).ok();
                let time = kernel
                    .and_then(|kernel| microseconds_per_token(kernel.as_ref(), input, plan.quick));
                known.push((shape, contestant, time));
                time
            }
        };
    }
    progress.finish_and_clear();
}
