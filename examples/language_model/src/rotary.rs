//! Rotary position embedding (Su et al., arXiv 2104.09864) on interleaved pairs, the order of GGUF files.

use anyhow::{Result, ensure};
use ndarray::{Array2, Zip};
use std::ops::Range;

/// Turns the pair of columns `(2i, 2i + 1)` of a token at position `t` by the angle `t·θ_i`, `θ_i = base^(−2i/dims)/stretch`.
#[derive(Clone, Debug)]
pub struct Rotary {
    head_dim: usize,
    /// `θ_i`
    frequencies: Vec<f64>,
}

impl Rotary {
    /// For the first `dims` columns of heads of `head_dim`; `factors` divide the frequencies (LLaMA 3).
    pub fn new(head_dim: usize, dims: usize, base: f64, stretch: f64, factors: Option<&[f32]>) -> Result<Self> {
        ensure!(
            dims.is_multiple_of(2) && dims <= head_dim,
            "the rotary embedding turns {dims} columns of heads of {head_dim}: an even number up to that was expected"
        );
        ensure!(base.is_finite() && base > 0.0, "the base of the rotary embedding is {base}");
        ensure!(stretch.is_finite() && stretch > 0.0, "the scale of the positions is {stretch}");
        let frequency = |i: usize| {
            let factor = factors.and_then(|factors| factors.get(i)).map_or(1.0, |&factor| f64::from(factor));
            base.powf(-2.0 * i as f64 / dims as f64) / stretch / factor
        };
        let frequencies: Vec<f64> = (0..dims / 2).map(frequency).collect();
        ensure!(frequencies.iter().all(|f| f.is_finite()), "the factors of the rotary embedding are damaged");
        Ok(Self { head_dim, frequencies })
    }

    /// `(cos, sin)` of every angle, `[positions, pairs]`.
    #[must_use]
    pub fn angles(&self, positions: Range<usize>) -> Array2<(f32, f32)> {
        Array2::from_shape_fn((positions.len(), self.frequencies.len()), |(t, i)| {
            let (sin, cos) = ((positions.start + t) as f64 * self.frequencies[i]).sin_cos();
            (cos as f32, sin as f32)
        })
    }

    /// Turns every head of `x [tokens, heads · head_dim]`.
    pub fn turn(&self, x: &mut Array2<f32>, angles: &Array2<(f32, f32)>) {
        Zip::from(x.rows_mut()).and(angles.rows()).par_for_each(|mut row, angles| {
            for mut head in row.exact_chunks_mut(self.head_dim) {
                for (i, &(cos, sin)) in angles.iter().enumerate() {
                    let (a, b) = (head[2 * i], head[2 * i + 1]);
                    (head[2 * i], head[2 * i + 1]) = (a * cos - b * sin, a * sin + b * cos);
                }
            }
        });
    }
}
