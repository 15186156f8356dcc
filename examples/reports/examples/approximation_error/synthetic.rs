//! Gaussian queries and keys of a chosen norm: the inputs that the papers' bounds speak of.

use crate::data::Input;
use dijiang::{Mask, projection};
use ndarray::Array2;
use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};

/// Seeded standard normal numbers.
pub struct Normal(ChaCha8Rng);

impl Normal {
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    pub fn sample(&mut self) -> f32 {
        let uniform = ((self.0.next_u64() >> 11) as f64 + 0.5) * 0.5_f64.powi(53);
        // strictly between 0 and 1, so there is a quantile
        projection::normal_quantile(uniform).unwrap_or(0.0) as f32
    }
}

/// Independent Gaussian q, k, v `[tokens, head_dim]` with mean |q̂|² = |k̂|² = `norm`, x̂ =
/// d^(-1/4)·x; bidirectional. Half of the rows are for calibration.
pub fn gaussian(norm: f64, tokens: usize, head_dim: usize) -> Input {
    let d = head_dim as f64;
    // Σ x̂² = d^(-1/2) Σ x² and E Σ x² = d·factor²
    let factor = (norm / d.sqrt()).sqrt() as f32;
    let mut normal = Normal::new(head_dim as u64);
    let mut matrix =
        |factor: f32| Array2::from_shape_simple_fn((tokens, head_dim), || factor * normal.sample());
    Input {
        name: format!("|x̂|² = {norm}"),
        norm: Some(norm),
        mask: Mask::Full,
        q: matrix(factor),
        k: matrix(factor),
        v: matrix(1.0),
        calibration: Some((matrix(factor), matrix(factor))),
        calibration_stride: 1,
    }
}
