//! The CSV file: one line for every measurement.

use crate::measure::Results;
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
    }
    writer.flush()?;
    Ok(())
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
    }
}
