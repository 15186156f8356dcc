//! Medians over heads and seeds, and how errors fall with the number of features.

use crate::data::Input;
use crate::kernels::Kernel;
use crate::measure::{Measurement, Results};
use dijiang::fidelity::{self, Rate, Report};
use std::collections::BTreeMap;

/// Inputs that are summed up together.
#[derive(Clone, Debug)]
pub struct Group {
    pub name: String,
    pub inputs: Vec<usize>,
}

impl Group {
    /// All real heads.
    pub fn heads(results: &Results) -> Self {
        let inputs: Vec<_> =
            (0..results.inputs.len()).filter(|i| results.inputs[*i].is_real()).collect();
        let name = match inputs.len() {
            1 => "1 head".to_owned(),
            n => format!("median of {n} heads"),
        };
        Self { name, inputs }
    }

    /// One input.
    pub fn one(results: &Results, input: usize) -> Self {
        Self { name: results.inputs[input].name.clone(), inputs: vec![input] }
    }

    /// The synthetic inputs, by growing norm.
    pub fn synthetic(results: &Results) -> Vec<Self> {
        (0..results.inputs.len())
            .filter(|i| !results.inputs[*i].is_real())
            .map(|i| Self::one(results, i))
            .collect()
    }

    /// The synthetic input of this norm.
    pub fn norm(results: &Results, norm: f64) -> Option<Self> {
        results
            .inputs
            .iter()
            .position(|input| input.norm == Some(norm))
            .map(|i| Self::one(results, i))
    }

    /// The output error of uniform attention, median over the inputs.
    pub fn uniform(&self, results: &Results) -> f64 {
        median(self.inputs.iter().map(|i| results.exact[*i].report.uniform_error))
            .unwrap_or(f64::NAN)
    }
}

/// The median over the seeds and the range they span.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

impl Spread {
    pub fn of(values: &[f64]) -> Option<Self> {
        let least = values.iter().copied().reduce(f64::min)?;
        let most = values.iter().copied().reduce(f64::max)?;
        Some(Self { median: median(values.iter().copied())?, least, most })
    }
}

/// One kernel with one number of features on a group: medians over the inputs for each seed, then
/// over seeds.
#[derive(Clone, Debug)]
pub struct Row {
    pub kernel: Kernel,
    /// The number of features; a range for kernels whose number follows from the head's size.
    pub features: [usize; 2],
    pub output_error: Spread,
    pub attention_error: f64,
    pub kl: Option<f64>,
    pub kernel_error: Option<Spread>,
    /// Inputs on which it beats uniform attention, in the median over seeds.
    pub beats_uniform: usize,
    /// Inputs that were measured.
    pub inputs: usize,
    pub state_floats: f64,
    pub microseconds: Option<f64>,
}

impl Row {
    pub fn features_text(&self) -> String {
        let [least, most] = self.features;
        if least == most { least.to_string() } else { format!("{least}-{most}") }
    }

    /// Whether it beats uniform attention on most inputs.
    pub fn is_useful(&self) -> bool {
        2 * self.beats_uniform > self.inputs
    }
}

/// Every kernel and number of features on the group, in order. A kernel that failed on an input is
/// left out there.
pub fn rows(results: &Results, group: &Group) -> Vec<Row> {
    let mut cells: BTreeMap<(usize, usize), Vec<&Measurement>> = BTreeMap::new();
    for measurement in results.measurements.iter().filter(|m| group.inputs.contains(&m.input)) {
        let place = Kernel::ALL
            .iter()
            .position(|kernel| *kernel == measurement.kernel)
            .unwrap_or(usize::MAX);
        let features = if measurement.kernel.is_fixed() { 0 } else { measurement.features };
        cells.entry((place, features)).or_default().push(measurement);
    }
    cells.values().filter_map(|measurements| row(results, measurements)).collect()
}

/// The row with the smallest output error for each kernel.
pub fn best_rows(rows: &[Row]) -> Vec<Row> {
    let mut best: Vec<Row> = Vec::new();
    for row in rows {
        match best.iter_mut().find(|other| other.kernel == row.kernel) {
            Some(other) if row.output_error.median < other.output_error.median => {
                *other = row.clone()
            }
            Some(_) => {}
            None => best.push(row.clone()),
        }
    }
    best
}

/// The smallest output error of the maps that aim at softmax attention.
pub fn best(rows: &[Row]) -> Option<&Row> {
    let aiming = rows.iter().filter(|row| row.kernel.aims_at_softmax());
    aiming.min_by(|a, b| a.output_error.median.total_cmp(&b.output_error.median))
}

fn row(results: &Results, measurements: &[&Measurement]) -> Option<Row> {
    let good: Vec<_> =
        measurements.iter().filter_map(|m| Some((*m, m.report.as_ref().ok()?))).collect();
    let kernel = good.first()?.0.kernel;
    let mut inputs: Vec<_> = good.iter().map(|(m, _)| m.input).collect();
    inputs.dedup();
    let over_seeds = |value: &dyn Fn(&Report) -> Option<f64>| {
        over_seeds(good.iter().filter_map(|(m, report)| Some((m.seed, value(report)?))))
    };
    let beats = |input: &&usize| {
        let errors = good.iter().filter(|(m, _)| m.input == **input).map(|(_, r)| r.output_error);
        median(errors).is_some_and(|error| error < results.exact[**input].report.uniform_error)
    };
    let features: Vec<_> = good.iter().map(|(m, _)| m.features).collect();
    Some(Row {
        kernel,
        features: [*features.iter().min()?, *features.iter().max()?],
        output_error: Spread::of(&over_seeds(&|r| Some(r.output_error)))?,
        attention_error: median(over_seeds(&|r| Some(r.attention_error)))?,
        kl: median(over_seeds(&|r| r.kl)),
        kernel_error: Spread::of(&over_seeds(&|r| r.kernel_error)),
        beats_uniform: inputs.iter().filter(beats).count(),
        inputs: inputs.len(),
        state_floats: median(good.iter().map(|(m, _)| m.state_floats as f64))?,
        microseconds: median(
            inputs.iter().filter_map(|i| results.time(*i, Some(kernel), row_features(&good, *i)?)),
        ),
    })
}

fn row_features(good: &[(&Measurement, &Report)], input: usize) -> Option<usize> {
    good.iter().find(|(m, _)| m.input == input).map(|(m, _)| m.features)
}

/// How the kernel error of a kernel falls with the number of features on one input; `None` if it
/// was not measured at two numbers of features with two seeds.
pub fn kernel_error_rate(results: &Results, kernel: Kernel, input: usize) -> Option<Rate> {
    let mut errors: BTreeMap<usize, BTreeMap<u64, f64>> = BTreeMap::new();
    for m in results.measurements.iter().filter(|m| m.kernel == kernel && m.input == input) {
        if let Some(error) = m.report.as_ref().ok().and_then(|report| report.kernel_error) {
            errors.entry(m.features).or_default().insert(m.seed, error);
        }
    }
    let features: Vec<_> = errors.keys().copied().collect();
    if features.len() < 2 {
        return None;
    }
    let seeds: Vec<u64> = errors.values().next()?.keys().copied().collect();
    let missing = dijiang::Error::Unsupported { what: "a slope", why: "an error was not measured" };
    fidelity::rate(&features, seeds, |m, seed| {
        errors[&m].get(&seed).copied().ok_or(missing.clone())
    })
    .ok()
}

/// What a reader should know of one input.
pub fn describe(input: &Input) -> String {
    let [q, k] = input.squared_norms();
    let attention = if input.mask == dijiang::Mask::Causal { "causal" } else { "bidirectional" };
    format!(
        "{}: {} tokens, d = {}, {attention}, mean |q̂|² = {q:.1}, mean |k̂|² = {k:.1}",
        input.name,
        input.tokens(),
        input.head_dim()
    )
}

/// The median of the values of each seed.
pub fn over_seeds(values: impl Iterator<Item = (u64, f64)>) -> Vec<f64> {
    let mut of_seeds: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
    for (seed, value) in values {
        of_seeds.entry(seed).or_default().push(value);
    }
    of_seeds.into_values().filter_map(median).collect()
}

pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let (n, middle) = (values.len(), values.len() / 2);
    match n {
        0 => None,
        _ if n % 2 == 1 => Some(values[middle]),
        _ => Some(0.5 * (values[middle - 1] + values[middle])),
    }
}
