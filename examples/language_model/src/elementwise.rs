//! Exponentials and norms of many numbers at once, as vectors of whatever machine this is.

use pulp::Arch;
use rayon::prelude::*;
use std::ops::{Add, Div, Neg};

/// Rows that a thread takes at once.
const ROWS: usize = 32;

/// Numbers that can be exponentiated as vectors.
pub trait Exponential: Copy + Send + Sync + 'static {
    /// `e^x`.
    #[must_use]
    fn exponential(self) -> Self;
    /// A number rounded to this type.
    #[must_use]
    fn rounded(x: f64) -> Self;
}

impl Exponential for f32 {
    /// Within two units of the last place; 0 below −87, where the result is hardly a normal number,
    /// and no more than at 88.7.
    #[inline(always)]
    fn exponential(self) -> Self {
        // x = n·ln 2 + r, with n read off the low bits of x/ln 2 + 1.5·2^23
        const SHIFT: f32 = 12_582_912.0;
        // NaN is no more and no less than any number, and goes through
        let x = if self > 88.7 { 88.7 } else { self };
        let shifted = x * std::f32::consts::LOG2_E + SHIFT;
        let n = shifted - SHIFT;
        let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
        let mut p = 1.987_569_2e-4;
        for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
            p = p * r + c;
        }
        let fraction = p * r * r + r + 1.0;
        let y = f32::from_bits(fraction.to_bits().wrapping_add(shifted.to_bits() << 23));
        if x < -87.0 { 0.0 } else { y }
    }

    #[inline(always)]
    fn rounded(x: f64) -> Self {
        x as f32
    }
}

impl Exponential for f64 {
    #[inline(always)]
    fn exponential(self) -> Self {
        self.exp()
    }

    #[inline(always)]
    fn rounded(x: f64) -> Self {
        x
    }
}

/// Runs a loop with the widest vectors of this machine.
#[inline(always)]
pub fn vectorised<R>(run: impl FnOnce() -> R) -> R {
    Arch::new().dispatch(run)
}

/// `x·σ(x)` by parts: `σ(x)`.
#[inline(always)]
pub fn sigmoid<T>(x: T) -> T
where
    T: Exponential + Add<Output = T> + Div<Output = T> + Neg<Output = T>,
{
    let one = T::rounded(1.0);
    one / (one + (-x).exponential())
}

/// `gate ← silu(gate) ⊙ up`, on all threads (Shazeer, arXiv 2002.05202).
pub fn gate(gate: &mut [f32], up: &[f32]) {
    const LENGTH: usize = 1 << 14;
    gate.par_chunks_mut(LENGTH).zip(up.par_chunks(LENGTH)).for_each(|(gate, up)| {
        vectorised(|| {
            gate.iter_mut().zip(up).for_each(|(gate, &up)| *gate *= sigmoid(*gate) * up);
        });
    });
}

/// `x/√(mean x² + ε) ⊙ gain` of every row, on all threads (Zhang and Sennrich, arXiv 1910.07467).
pub fn rms_norm(x: &mut [f32], gain: &[f32], epsilon: f64) {
    x.par_chunks_mut(ROWS * gain.len()).for_each(|rows| {
        for row in rows.chunks_exact_mut(gain.len()) {
            let squares: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum();
            let scale = (1.0 / (squares / row.len() as f64 + epsilon).sqrt()) as f32;
            row.iter_mut().zip(gain).for_each(|(x, &gain)| *x *= scale * gain);
        }
    });
}
