//! What the benchmarks compare with before they time anything: attention as its formula reads, in
//! `f64`, pair by pair. Nothing here is shared with the crate's own loops, and nothing here is
//! fast.
#![allow(dead_code)] // each benchmark uses a part

use dijiang::Mask;
use ndarray::{Array2, ArrayView2};

/// `[rows, columns]` standard normal numbers (SplitMix64 and Box-Muller), the same on every
/// machine.
pub fn normal(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut state = seed;
    let mut uniform = move || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    };
    Array2::from_shape_simple_fn((rows, columns), || {
        let radius = (-2.0 * (1.0 - uniform()).ln()).sqrt();
        (radius * (std::f64::consts::TAU * uniform()).cos()) as f32
    })
}

/// `o_t = Σ_j w(q_t, k_j) v_j / Σ_j w(q_t, k_j)` for any weight given by its logarithm.
pub fn attention(
    q: ArrayView2<f32>,
    k: ArrayView2<f32>,
    v: ArrayView2<f32>,
    mask: Mask,
    log_weight: impl Fn(&[f64], &[f64]) -> f64,
) -> Array2<f64> {
    let (q, k) = (wide_rows(q), wide_rows(k));
    let mut out = Array2::zeros((q.len(), v.ncols()));
    for (t, q) in q.iter().enumerate() {
        let seen = if mask == Mask::Causal { t + 1 } else { k.len() };
        let logs: Vec<f64> = k[..seen].iter().map(|k| log_weight(q, k)).collect();
        let largest = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = logs.iter().map(|log| (log - largest).exp()).collect();
        let total: f64 = weights.iter().sum();
        for (weight, v) in weights.iter().zip(v.outer_iter()) {
            for (o, &v) in out.row_mut(t).iter_mut().zip(v) {
                *o += weight / total * f64::from(v);
            }
        }
    }
    out
}

/// Softmax attention: `w(q, k) = exp(q·k/√d)`.
pub fn softmax(
    q: ArrayView2<f32>,
    k: ArrayView2<f32>,
    v: ArrayView2<f32>,
    mask: Mask,
) -> Array2<f64> {
    let scale = 1.0 / (q.ncols() as f64).sqrt();
    attention(q, k, v, mask, |q, k| scale * dot(q, k))
}

/// Linear attention with positive exponential features of the given projection, whose rows are ω:
/// `w(q, k) = Σ_i φ_i(q̂) φ_i(k̂)`, `ln φ_i(x̂) = ω_i·x̂ − |x̂|²/2 − ½ ln m`, `x̂ = x/d^¼`.
pub fn linear(
    projection: ArrayView2<f32>,
    q: ArrayView2<f32>,
    k: ArrayView2<f32>,
    v: ArrayView2<f32>,
    mask: Mask,
) -> Array2<f64> {
    let shrink = (q.ncols() as f64).powf(-0.25);
    let projection = wide_rows(projection);
    let log_features = |x: &[f64]| {
        let x: Vec<f64> = x.iter().map(|x| x * shrink).collect();
        log_exponential_features(&projection, &x)
    };
    attention(q, k, v, mask, |q, k| {
        let logs: Vec<f64> =
            log_features(q).iter().zip(log_features(k)).map(|(a, b)| a + b).collect();
        let largest = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        logs.iter().map(|log| (log - largest).exp()).sum::<f64>().ln() + largest
    })
}

/// `ln φ_i(x) = ω_i·x − |x|²/2 − ½ ln m`.
pub fn log_exponential_features(projection: &[Vec<f64>], x: &[f64]) -> Vec<f64> {
    let common = 0.5 * dot(x, x) + 0.5 * (projection.len() as f64).ln();
    projection.iter().map(|omega| dot(omega, x) - common).collect()
}

/// The rows of a matrix, in `f64`.
pub fn wide_rows(x: ArrayView2<f32>) -> Vec<Vec<f64>> {
    x.outer_iter().map(|row| row.iter().map(|&x| f64::from(x)).collect()).collect()
}

/// Σ xᵢyᵢ.
pub fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// Panics unless `found` is within `tolerance` of `expected`, relative to the largest element
/// expected.
pub fn assert_close(what: &str, found: ArrayView2<f32>, expected: &Array2<f64>, tolerance: f64) {
    assert_eq!(found.dim(), expected.dim(), "{what}: wrong shape");
    let largest = expected.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    for ((at, &found), &expected) in found.indexed_iter().zip(expected) {
        let error = (f64::from(found) - expected).abs() / largest;
        assert!(
            error <= tolerance, // false for NaN too
            "{what}: {found} at {at:?} where the formula gives {expected}, so nothing is timed"
        );
    }
}

/// How far `f32` may be from the formula: a few dozen roundings of logarithms of size ten.
pub const TOLERANCE: f64 = 1e-5;
