//! The CSV file: one line for every measurement.

use crate::hybrids::measure::Measurement;
use crate::measure::Results;
use crate::rivals;
use dijiang::Mask;
use dijiang::fidelity::Report;
use serde::Serialize;
use std::path::Path;

#[derive(Serialize)]
struct Record<'a> {
    input: &'a str,
    real: bool,
    causal: bool,
    queries: usize,
    keys: usize,
    head_dim: usize,
    value_dim: usize,
    query_squared_norm: f64,
    key_squared_norm: f64,
    kernel: &'a str,
    features: Option<usize>,
    seed: Option<u64>,
    estimates_softmax: bool,
    output_error: Option<f64>,
    attention_error: Option<f64>,
    kl: Option<f64>,
    kernel_error: Option<f64>,
    max_abs: Option<f64>,
    uniform_error: f64,
    uniform_attention_error: f64,
    state_floats: usize,
    microseconds_per_token: Option<f64>,
    failure: &'a str,
    variant: Option<String>,
    equal_window: Option<usize>,
    equal_window_error: Option<f64>,
    dropped_error: Option<f64>,
    far_share: Option<f64>,
    /// Rivals are not ranked.
    kind: &'static str,
    best_factor_error: Option<f64>,
    uniform_best_factor_error: Option<f64>,
}

/// Writes every measurement, the baselines included.
pub fn write(results: &Results, path: &Path) -> Result<(), csv::Error> {
    let mut writer = csv::Writer::from_path(path)?;
    for (i, exact) in results.exact.iter().enumerate() {
        let baseline = record(results, i, Some(&exact.report));
        writer.serialize(Record {
            kernel: "uniform",
            output_error: Some(exact.report.uniform_error),
            attention_error: Some(exact.report.uniform_attention_error),
            kl: None,
            kernel_error: None,
            max_abs: None,
            estimates_softmax: false,
            state_floats: results.inputs[i].value_dim() + 1,
            ..baseline
        })?;
        writer.serialize(Record {
            kernel: "softmax",
            state_floats: exact.state_floats,
            microseconds_per_token: results.time(i, None, 0),
            ..record(results, i, Some(&exact.report))
        })?;
        for m in results.measurements.iter().filter(|m| m.input == i) {
            writer.serialize(Record {
                kind: "map",
                kernel: m.kernel.name(),
                features: Some(m.features),
                seed: Some(m.seed).filter(|_| m.kernel.is_random()),
                estimates_softmax: m.kernel.aims_at_softmax(),
                state_floats: m.state_floats,
                microseconds_per_token: results.time(i, Some(m.kernel), m.features),
                failure: m.report.as_ref().err().map_or("", String::as_str),
                ..record(results, i, m.report.as_ref().ok())
            })?;
        }
        for m in results.hybrids.measurements.iter().filter(|m| m.input == i) {
            writer.serialize(hybrid(results, m))?;
        }
        for m in results.rivals.measurements.iter().filter(|m| m.input == i) {
            writer.serialize(rival(results, m))?;
        }
    }
    writer.flush()?;
    Ok(())
}

fn hybrid<'a>(results: &'a Results, m: &'a Measurement) -> Record<'a> {
    let outcome = m.outcome.as_ref().ok();
    let window = outcome.and_then(|outcome| outcome.equal_window);
    let baseline = results.hybrids.baselines[m.input];
    Record {
        kind: "hybrid",
        kernel: m.contestant.hybrid().name(),
        features: m.contestant.features(),
        seed: Some(m.seed).filter(|_| m.contestant.is_random()),
        state_floats: m.state_floats,
        microseconds_per_token: m.microseconds,
        failure: m.outcome.as_ref().err().map_or("", String::as_str),
        variant: Some(m.contestant.label()),
        equal_window: window.map(|window| window.tokens),
        equal_window_error: window.map(|window| window.error),
        dropped_error: baseline.and_then(|baseline| baseline.dropped_error),
        far_share: baseline.map(|baseline| baseline.far_share),
        ..record(results, m.input, outcome.map(|outcome| &outcome.report))
    }
}

fn rival<'a>(results: &'a Results, m: &'a rivals::measure::Measurement) -> Record<'a> {
    let outcome = m.outcome.as_ref().ok();
    Record {
        kind: "rival",
        kernel: m.rival.name(),
        features: m.rival.features(results.inputs[m.input].head_dim()),
        seed: Some(m.seed).filter(|_| m.rival.is_random()),
        estimates_softmax: m.rival.aims_at_softmax(),
        state_floats: m.state_floats,
        microseconds_per_token: m.microseconds,
        failure: m.outcome.as_ref().err().map_or("", String::as_str),
        best_factor_error: outcome.map(|outcome| outcome.factor_error),
        uniform_best_factor_error: Some(results.rivals.uniform_factor_errors[m.input]),
        ..record(results, m.input, outcome.map(|outcome| &outcome.report))
    }
}

fn record<'a>(results: &'a Results, i: usize, report: Option<&Report>) -> Record<'a> {
    let input = &results.inputs[i];
    let exact = &results.exact[i].report;
    let [query_squared_norm, key_squared_norm] = input.squared_norms();
    Record {
        input: &input.name,
        real: input.is_real(),
        causal: input.mask == Mask::Causal,
        queries: input.tokens(),
        keys: input.k.nrows(),
        head_dim: input.head_dim(),
        value_dim: input.value_dim(),
        query_squared_norm,
        key_squared_norm,
        kernel: "",
        features: None,
        seed: None,
        estimates_softmax: true,
        output_error: report.map(|r| r.output_error),
        attention_error: report.map(|r| r.attention_error),
        kl: report.and_then(|r| r.kl),
        kernel_error: report.and_then(|r| r.kernel_error),
        max_abs: report.map(|r| r.max_abs),
        uniform_error: exact.uniform_error,
        uniform_attention_error: exact.uniform_attention_error,
        state_floats: 0,
        microseconds_per_token: None,
        failure: "",
        variant: None,
        equal_window: None,
        equal_window_error: None,
        dropped_error: None,
        far_share: None,
        kind: "baseline",
        best_factor_error: None,
        uniform_best_factor_error: None,
    }
}
