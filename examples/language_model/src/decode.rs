//! What a token costs at the end of a context of some length: time and memory.

use crate::model::{Model, State};
use crate::perplexity::CHUNK;
use anyhow::{Result, ensure};
use dijiang::MultiHead;
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Decode steps at the end of a context.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decode {
    /// Tokens in the state.
    pub tokens: usize,
    /// Microseconds of a step in the attention kernels, the median over the steps.
    pub attention: f64,
    /// Microseconds of a step in all, output head included; the median.
    pub total: f64,
    /// Bytes of the states of all layers, as they are.
    pub bytes: usize,
}

/// Steps that are timed at each length.
pub const STEPS: usize = 24;

/// Reads `tokens`, repeated where they are too few, and times single steps whenever the context has
/// reached one of `lengths`, in rising order.
pub fn decode(
    model: &Model,
    layers: &[MultiHead<f32>],
    tokens: &[u32],
    lengths: &[usize],
    bar: &ProgressBar,
) -> Result<Vec<Decode>> {
    ensure!(!tokens.is_empty(), "there is nothing to read");
    let mut state = model.state(layers)?;
    let mut source = tokens.iter().copied().cycle();
    let mut found = Vec::new();
    for &length in lengths {
        let mut missing = length.saturating_sub(STEPS).saturating_sub(state.position());
        while missing > 0 {
            let chunk: Vec<u32> = source.by_ref().take(missing.min(CHUNK)).collect();
            model.extend(&mut state, &chunk)?;
            missing -= chunk.len();
            bar.inc(chunk.len() as u64);
        }
        let mut times = Vec::new();
        while state.position() < length {
            let token = source.next().unwrap_or(0);
            times.push(step(model, &mut state, token)?);
            bar.inc(1);
        }
        ensure!(!times.is_empty(), "the lengths of contexts must rise by at least one token");
        let median = |of: fn(&[Duration; 2]) -> Duration| {
            let mut sorted: Vec<Duration> = times.iter().map(of).collect();
            sorted.sort_unstable();
            sorted[sorted.len() / 2].as_secs_f64() * 1e6
        };
        let (attention, total) = (median(|[attention, _]| *attention), median(|[_, total]| *total));
        found.push(Decode { tokens: length, attention, total, bytes: state.bytes() });
    }
    Ok(found)
}

/// One token, its logits included: time in attention, time in all.
fn step(model: &Model, state: &mut State, token: u32) -> Result<[Duration; 2]> {
    state.restart_clock();
    let hidden = model.extend(state, &[token])?;
    model.logits(state, &hidden);
    Ok([state.time().attention, state.time().total()])
}
