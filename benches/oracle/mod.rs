//! What the benchmarks compare with before they time anything: `attention::naive` on `f32` input.
#![allow(dead_code)] // each benchmark uses a part

use dijiang::Mask;
use dijiang::attention::naive::{self, features::Features};
use ndarray::{Array1, Array2, ArrayView2};

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

/// Softmax attention with scale `1/√d`.
pub fn softmax(
    q: ArrayView2<f32>,
    k: ArrayView2<f32>,
    v: ArrayView2<f32>,
    mask: Mask,
) -> Array2<f64> {
    let scale = 1.0 / (q.ncols() as f64).sqrt();
    naive::softmax(&wide(q), &wide(k), &wide(v), scale, mask)
}

/// Linear attention with positive exponential features of the given projection, whose rows are ω,
/// and scale `1/√d`.
pub fn linear(
    projection: ArrayView2<f32>,
    q: ArrayView2<f32>,
    k: ArrayView2<f32>,
    v: ArrayView2<f32>,
    mask: Mask,
) -> Array2<f64> {
    let [phi_q, phi_k] = [q, k].map(|x| performer(projection, x));
    naive::linear::normalized(&phi_q, &phi_k, &wide(v), mask)
}

/// Positive exponential features of `x/d^¼`.
pub fn performer(projection: ArrayView2<f32>, x: ArrayView2<f32>) -> Features {
    let shrink = (x.ncols() as f64).powf(-0.25);
    let weights = Array1::ones(projection.nrows());
    naive::features::performer(&(wide(x) * shrink), &wide(projection), &weights)
}

pub fn wide(x: ArrayView2<f32>) -> Array2<f64> {
    x.mapv(f64::from)
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
