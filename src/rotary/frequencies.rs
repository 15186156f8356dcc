//! The frequencies of the pairs: the formula, and how models stretch it to longer contexts.

use crate::error::Error;
use core::f64::consts::TAU;

/// Beyond it an angle says nothing, and below it no position makes an angle infinite.
const LARGEST_FREQUENCY: f64 = 1e9;

/// `θ_i = base^(−2i/dims)`.
#[allow(clippy::cast_precision_loss)]
pub(super) fn formula(base: f64, dims: usize) -> Vec<f64> {
    (0..dims / 2).map(|i| libm::pow(base, -((2 * i) as f64) / dims as f64)).collect()
}

/// `θ_i/factor`.
pub(super) fn linear(frequencies: &[f64], factor: f64) -> Result<Vec<f64>, Error> {
    check_positive("factor", factor)?;
    checked(frequencies.iter().map(|frequency| frequency / factor).collect())
}

/// See [`Rotary::with_llama3_scaling`](crate::Rotary::with_llama3_scaling).
pub(super) fn llama3(
    frequencies: &[f64],
    factor: f64,
    [low, high]: [f64; 2],
    original_context: usize,
) -> Result<Vec<f64>, Error> {
    check_positive("factor", factor)?;
    check_positive("low_freq_factor", low)?;
    check_positive("high_freq_factor", high)?;
    if high <= low {
        return refused("high_freq_factor", high, "above `low_freq_factor`");
    }
    let context = context(original_context)?;
    let scaled = |&frequency: &f64| {
        // how often it turns in the original context
        let turns = context * frequency.abs() / TAU;
        if turns > high {
            frequency
        } else if turns < low {
            frequency / factor
        } else {
            let smooth = (turns - low) / (high - low);
            (1.0 - smooth) * frequency / factor + smooth * frequency
        }
    };
    checked(frequencies.iter().map(scaled).collect())
}

/// See [`Rotary::with_yarn_scaling`](crate::Rotary::with_yarn_scaling).
#[allow(clippy::cast_precision_loss)] // columns of a head
pub(super) fn yarn(
    frequencies: &[f64],
    base: f64,
    factor: f64,
    [fast, slow]: [f64; 2],
    original_context: usize,
) -> Result<Vec<f64>, Error> {
    check_positive("factor", factor)?;
    check_positive("beta_fast", fast)?;
    check_positive("beta_slow", slow)?;
    if fast < slow {
        return refused("beta_fast", fast, "at least `beta_slow`");
    }
    if base <= 1.0 {
        return refused("base", base, "above 1");
    }
    let (context, dims) = (context(original_context)?, 2.0 * frequencies.len() as f64);
    let pair = |beta: f64| dims * libm::log(context / (TAU * beta)) / (2.0 * libm::log(base));
    let (low, high) = (pair(fast).floor().max(0.0), pair(slow).ceil().min(dims - 1.0));
    let width = (high - low).max(0.001);
    let scaled = |(i, &frequency): (usize, &f64)| {
        let ramp = ((i as f64 - low) / width).clamp(0.0, 1.0);
        ramp * frequency / factor + (1.0 - ramp) * frequency
    };
    checked(frequencies.iter().enumerate().map(scaled).collect())
}

/// The frequencies, if they can be used.
fn checked(frequencies: Vec<f64>) -> Result<Vec<f64>, Error> {
    check_frequencies(&frequencies)?;
    Ok(frequencies)
}

pub(super) fn check_frequencies(frequencies: &[f64]) -> Result<(), Error> {
    let usable = -LARGEST_FREQUENCY..=LARGEST_FREQUENCY; // NaN is not in it.
    match frequencies.iter().find(|frequency| !usable.contains(*frequency)) {
        Some(&bad) => refused("frequencies", bad, "a number of at most 10^9 in absolute value"),
        None => Ok(()),
    }
}

pub(super) fn check_dims(head_dim: usize, dims: usize) -> Result<(), Error> {
    if dims.is_multiple_of(2) && dims <= head_dim {
        return Ok(());
    }
    Err(Error::InvalidOption {
        which: "the number of columns that turn",
        found: format!("{dims} of {head_dim}"),
        needed: "even, since they turn in pairs, and at most `head_dim`",
    })
}

fn check_positive(which: &'static str, x: f64) -> Result<(), Error> {
    if x > 0.0 && x.is_finite() { Ok(()) } else { refused(which, x, "a positive finite number") }
}

#[allow(clippy::cast_precision_loss)]
fn context(tokens: usize) -> Result<f64, Error> {
    if tokens > 0 { Ok(tokens as f64) } else { refused("original_context", 0.0, "at least 1") }
}

fn refused<R>(which: &'static str, found: f64, needed: &'static str) -> Result<R, Error> {
    Err(Error::InvalidOption { which, found: found.to_string(), needed })
}
