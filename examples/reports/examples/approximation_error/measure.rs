//! Runs every kernel on every input: the errors on all threads, then the times on one.

use crate::args::Plan;
use crate::data::Input;
use crate::hybrids;
use crate::kernels::Kernel;
use crate::rivals;
use dijiang::fidelity::{Reference, Report};
use dijiang::{Attention, Mask, SoftmaxAttention};
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// One kernel with one number of features and one seed on one input.
#[derive(Debug)]
pub struct Measurement {
    /// The input, by its place in the list.
    pub input: usize,
    pub kernel: Kernel,
    pub features: usize,
    pub seed: u64,
    /// The size of the state, in numbers.
    pub state_floats: usize,
    /// What was measured, or why it could not be.
    pub report: Result<Report, String>,
}

/// Exact attention in f32 on one input.
#[derive(Debug)]
pub struct Exact {
    pub report: Report,
    pub state_floats: usize,
}

/// Everything a run has measured.
#[derive(Debug)]
pub struct Results {
    pub inputs: Vec<Input>,
    pub exact: Vec<Exact>,
    pub measurements: Vec<Measurement>,
    pub hybrids: hybrids::measure::Results,
    pub rivals: rivals::measure::Results,
    times: Times,
}

/// Microseconds per token, by shape, kernel (`None` is exact attention) and number of features.
type Times = HashMap<(Shape, Option<&'static str>, usize), f64>;

/// What the time of a forward depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    queries: usize,
    keys: usize,
    head_dim: usize,
    value_dim: usize,
    mask: Mask,
}

impl Shape {
    pub fn of(input: &Input) -> Self {
        Self {
            queries: input.tokens(),
            keys: input.k.nrows(),
            head_dim: input.head_dim(),
            value_dim: input.value_dim(),
            mask: input.mask,
        }
    }
}

impl Results {
    /// Microseconds per query of one forward on one thread; `None` as the kernel is exact
    /// attention.
    pub fn time(&self, input: usize, kernel: Option<Kernel>, features: usize) -> Option<f64> {
        self.times
            .get(&(Shape::of(&self.inputs[input]), kernel.map(Kernel::name), features))
            .copied()
    }
}

/// Measures what the plan asks for on every input.
pub fn measure(inputs: Vec<Input>, plan: &Plan) -> Result<Results, String> {
    let references = inputs
        .par_iter()
        .map(|input| {
            Reference::new(input.q.view(), input.k.view(), input.v.view(), input.mask)
                .map_err(|error| format!("head `{}`: {error}", input.name))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let exact = inputs
        .par_iter()
        .zip(&references)
        .map(|(input, reference)| {
            exact(input, reference).map_err(|error| format!("head `{}`: {error}", input.name))
        })
        .collect::<Result<Vec<_>, _>>()?;

    let mut jobs = Vec::new();
    for (i, input) in inputs.iter().enumerate() {
        for &kernel in plan.kernels.iter().filter(|kernel| kernel.applies_to(input)) {
            for features in kernel.features(input.head_dim(), &plan.features) {
                let seeds = if kernel.is_random() { plan.seeds } else { 1 };
                jobs.extend((0..seeds).map(|seed| (i, kernel, features, seed)));
            }
        }
    }
    // The longest first, so that no thread is left with one at the end.
    jobs.sort_by_key(|(i, _, features, _)| std::cmp::Reverse(inputs[*i].tokens() * features));
    let progress = progress(jobs.len(), "measuring errors");
    let steps = if plan.quick { 5 } else { 300 };
    let mut measurements: Vec<_> = jobs
        .into_par_iter()
        .with_max_len(1)
        .map(|(i, kernel, features, seed)| {
            let (input, reference) = (&inputs[i], &references[i]);
            let measured = kernel.build(input, features, seed, steps).and_then(|kernel| {
                Ok((
                    reference.compare(kernel.as_ref())?,
                    kernel.stream(input.value_dim())?.state_floats(),
                ))
            });
            progress.inc(1);
            let (report, state_floats) = match measured {
                Ok((report, state_floats)) => (Ok(report), state_floats),
                Err(error) => (Err(error.to_string()), 2 * features * (input.value_dim() + 1) + 1),
            };
            Measurement { input: i, kernel, features, seed, state_floats, report }
        })
        .collect();
    progress.finish_and_clear();
    let place = |kernel| Kernel::ALL.iter().position(|other| *other == kernel);
    measurements.sort_by_key(|m| (m.input, place(m.kernel), m.features, m.seed));
    let mut hybrids = hybrids::measure::errors(&inputs, &references, plan);
    let mut rivals = rivals::measure::errors(&inputs, &references, plan)
        .map_err(|error| format!("uniform attention: {error}"))?;
    drop(references);

    let times = times(&inputs, &measurements, plan)?;
    hybrids::measure::times(&inputs, &mut hybrids, plan);
    rivals::measure::times(&inputs, &mut rivals, plan);
    Ok(Results { inputs, exact, measurements, hybrids, rivals, times })
}

fn exact(input: &Input, reference: &Reference<f32>) -> Result<Exact, dijiang::Error> {
    let kernel = SoftmaxAttention::new(input.head_dim())?;
    Ok(Exact { report: reference.compare(&kernel)?, state_floats: input.exact_floats() })
}

fn times(inputs: &[Input], measurements: &[Measurement], plan: &Plan) -> Result<Times, String> {
    let mut times = HashMap::new();
    let progress = progress(measurements.len(), "measuring times");
    for input in inputs {
        let exact = SoftmaxAttention::new(input.head_dim()).map_err(|error| error.to_string())?;
        times.entry((Shape::of(input), None, 0)).or_insert_with(|| {
            microseconds_per_token(&exact, input, plan.quick).unwrap_or(f64::NAN)
        });
    }
    for measurement in measurements {
        progress.inc(1);
        let input = &inputs[measurement.input];
        let key = (Shape::of(input), Some(measurement.kernel.name()), measurement.features);
        if measurement.report.is_err() || times.contains_key(&key) {
            continue;
        }
        // Fitted numbers cost nothing more, but take long to fit.
        let kernel = measurement.kernel.unfitted();
        let kernel =
            kernel.build(input, measurement.features, 0, 0).map_err(|error| error.to_string())?;
        if let Some(time) = microseconds_per_token(kernel.as_ref(), input, plan.quick) {
            times.insert(key, time);
        }
    }
    progress.finish_and_clear();
    Ok(times)
}

/// The shortest of a few forwards, on this thread alone.
pub fn microseconds_per_token(
    kernel: &dyn Attention<f32>,
    input: &Input,
    quick: bool,
) -> Option<f64> {
    let (least_runs, budget) =
        if quick { (1, Duration::ZERO) } else { (3, Duration::from_millis(60)) };
    let mut out = ndarray::Array2::zeros((input.tokens(), input.value_dim()));
    let mut shortest = Duration::MAX;
    let start = Instant::now();
    let mut runs = 0;
    while runs < least_runs || start.elapsed() < budget {
        let before = Instant::now();
        kernel
            .forward_into(
                input.q.view(),
                input.k.view(),
                input.v.view(),
                input.mask,
                out.view_mut(),
            )
            .ok()?;
        shortest = shortest.min(before.elapsed());
        runs += 1;
    }
    Some(shortest.as_secs_f64() * 1e6 / input.tokens() as f64)
}

/// A progress bar on standard error; hidden where that is no terminal.
pub fn progress(jobs: usize, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(jobs as u64).with_message(what);
    if let Ok(style) = ProgressStyle::with_template("{msg} {bar:40} {pos}/{len}, {eta} left") {
        bar.set_style(style);
    }
    bar
}
