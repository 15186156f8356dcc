//! The norm of rows.

use super::{ROWS, Real, operand, read, result, tensor_like, zeros};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::marker::PhantomData;

/// `x/√(mean x² + ε) ⊙ gain` of every row (Zhang and Sennrich, arXiv 1910.07467).
#[derive(Clone, Copy)]
pub(in crate::convert) struct RmsNorm<T> {
    epsilon: f64,
    numbers: PhantomData<T>,
}

impl<T: Real> RmsNorm<T> {
    pub(in crate::convert) fn new(epsilon: f64) -> Self {
        Self { epsilon, numbers: PhantomData }
    }

    /// `1/√(mean x² + ε)`
    fn factor(&self, row: &[T]) -> T {
        let squares: f64 = row.iter().map(|x| x.as_f64().powi(2)).sum();
        T::rounded(1.0 / (squares / row.len() as f64 + self.epsilon).sqrt())
    }

    pub(super) fn forward(&self, x: &[T], gain: &[T]) -> Vec<T> {
        let mut y = zeros(x.len());
        let size = ROWS * gain.len();
        y.par_chunks_mut(size).zip(x.par_chunks(size)).for_each(|(y, x)| {
            for (y, x) in y.chunks_exact_mut(gain.len()).zip(x.chunks_exact(gain.len())) {
                let factor = self.factor(x);
                y.iter_mut().zip(x).zip(gain).for_each(|((y, &x), &gain)| *y = x * factor * gain);
            }
        });
        y
    }

    /// With `f = 1/√(mean x² + ε)`: `d_x = f·(gain ⊙ d_y) − f³·(x·(gain ⊙ d_y)/columns)·x`, which
    /// is added to what `d_x` holds, and `d_gain = Σ f·x ⊙ d_y`.
    pub(super) fn add_backward(&self, x: &[T], gain: &[T], d_y: &[T], d_x: &mut [T]) -> Vec<T> {
        let (columns, size) = (gain.len(), ROWS * gain.len());
        let parts: Vec<Vec<T>> = d_x
            .par_chunks_mut(size)
            .zip(x.par_chunks(size))
            .zip(d_y.par_chunks(size))
            .map(|((d_x, x), d_y)| {
                let mut d_gain = zeros::<T>(columns);
                let chunks = d_x.chunks_exact_mut(columns).zip(x.chunks_exact(columns));
                for ((d_x, x), d_y) in chunks.zip(d_y.chunks_exact(columns)) {
                    let factor = self.factor(x);
                    let mut along = 0.0;
                    let all = d_gain.iter_mut().zip(gain).zip(x).zip(d_y);
                    for (((d_gain, &gain), &x), &d_y) in all {
                        along += (x * gain * d_y).as_f64();
                        *d_gain += factor * x * d_y;
                    }
                    let shrink = T::rounded(along / columns as f64) * factor * factor;
                    for (((d_x, &gain), &x), &d_y) in d_x.iter_mut().zip(gain).zip(x).zip(d_y) {
                        *d_x += factor * (gain * d_y - shrink * x);
                    }
                }
                d_gain
            })
            .collect();
        // in the order of the rows, whatever the threads did
        let mut d_gain = zeros::<T>(columns);
        for part in &parts {
            d_gain.iter_mut().zip(part).for_each(|(sum, &x)| *sum += x);
        }
        d_gain
    }
}

impl<T: Real> CustomOp2 for RmsNorm<T> {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        at: &Layout,
        gain: &CpuStorage,
        gain_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let y = self.forward(operand(x, at)?, operand(gain, gain_at)?);
        Ok(result(y, at.dims()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gain: &Tensor,
        _: &Tensor,
        d_y: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut d_x = zeros(x.elem_count());
        let operands = [x, gain, &d_y.contiguous()?];
        let d_gain = read(operands, |[x, gain, d_y]| self.add_backward(x, gain, d_y, &mut d_x))?;
        Ok((Some(tensor_like(d_x, x)?), Some(tensor_like(d_gain, gain)?)))
    }
}
