//! The feed-forward network of a layer, of which only the norm is trained.

use super::{
    PART, Real, RmsNorm, matrix, multiply, operand, read, result, rows, tensor_like, zeros,
};
use crate::elementwise::{sigmoid, vectorised};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use ndarray::ArcArray2;
use rayon::prelude::*;
use std::sync::{Mutex, PoisonError};

/// `z + r·(silu(h·W_gate) ⊙ (h·W_up))·W_down` with `z = x + r·o`, `h` the norm of `z`, and
/// `silu(x) = x·σ(x)` (Shazeer, arXiv 2002.05202): of the residual stream `x`, what attention adds
/// to it, `o`, and the gain of the norm.
pub(in crate::convert) struct FeedForward<T: Real> {
    pub(in crate::convert) norm: RmsNorm<T>,
    /// `[width, hidden]`, `[width, hidden]`, `[hidden, width]`
    pub(in crate::convert) weights: [ArcArray2<T>; 3],
    /// `r`
    pub(in crate::convert) residual: f64,
    pub(in crate::convert) tape: Mutex<Option<Tape<T>>>,
}

/// What the backward pass needs: `z`, and the products with both matrices.
pub(in crate::convert) struct Tape<T> {
    z: Vec<T>,
    gate: Vec<T>,
    up: Vec<T>,
}

impl<T: Real> FeedForward<T> {
    fn forward(&self, [x, o, gain]: [&[T]; 3]) -> (Vec<T>, Tape<T>) {
        let [w_gate, w_up, w_down] = &self.weights;
        let residual = T::rounded(self.residual);
        let mut z = x.to_vec();
        z.par_chunks_mut(PART).zip(o.par_chunks(PART)).for_each(|(z, o)| {
            z.iter_mut().zip(o).for_each(|(z, &o)| *z += residual * o);
        });
        let h = self.norm.forward(&z, gain);
        let (tokens, width, hidden) = (z.len() / gain.len(), gain.len(), w_gate.ncols());
        let [mut gate, mut up] = [(); 2].map(|()| zeros::<T>(tokens * hidden));
        multiply(&mut gate, None, rows(&h, width), matrix(w_gate));
        multiply(&mut up, None, rows(&h, width), matrix(w_up));
        let mut gated = zeros::<T>(tokens * hidden);
        let both = gate.par_chunks(PART).zip(up.par_chunks(PART));
        gated.par_chunks_mut(PART).zip(both).for_each(|(y, (gate, up))| {
            vectorised(|| {
                for ((y, &gate), &up) in y.iter_mut().zip(gate).zip(up) {
                    *y = gate * sigmoid(gate) * up;
                }
            });
        });
        let mut y = z.clone();
        multiply(&mut y, Some(self.residual), rows(&gated, hidden), matrix(w_down));
        (y, Tape { z, gate, up })
    }

    /// The gradients by `z` and by the gain.
    fn backward(&self, tape: Tape<T>, gain: &[T], d_y: &[T]) -> [Vec<T>; 2] {
        let [w_gate, w_up, w_down] = &self.weights;
        let Tape { z, mut gate, mut up } = tape;
        let (width, hidden) = (gain.len(), w_gate.ncols());
        let mut d_gated = zeros::<T>(gate.len());
        multiply(&mut d_gated, Some(self.residual), rows(d_y, width), matrix(w_down).transpose());
        let one = T::rounded(1.0);
        let both = gate.par_chunks_mut(PART).zip(up.par_chunks_mut(PART));
        both.zip(d_gated.par_chunks(PART)).for_each(|((gates, ups), d_gated)| {
            vectorised(|| {
                for ((gate, up), &d) in gates.iter_mut().zip(ups).zip(d_gated) {
                    let s = sigmoid(*gate);
                    let d_gate = *up * d * s * (one + *gate * (one - s));
                    *up = *gate * s * d;
                    *gate = d_gate;
                }
            });
        });
        drop(d_gated);
        let mut d_h = zeros::<T>(z.len());
        multiply(&mut d_h, None, rows(&gate, hidden), matrix(w_gate).transpose());
        multiply(&mut d_h, Some(1.0), rows(&up, hidden), matrix(w_up).transpose());
        let mut d_z = d_y.to_vec();
        let d_gain = self.norm.add_backward(&z, gain, &d_h, &mut d_z);
        [d_z, d_gain]
    }
}

impl<T: Real> CustomOp3 for FeedForward<T> {
    fn name(&self) -> &'static str {
        "feed-forward"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        at: &Layout,
        o: &CpuStorage,
        o_at: &Layout,
        gain: &CpuStorage,
        gain_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let operands = [operand(x, at)?, operand(o, o_at)?, operand(gain, gain_at)?];
        let (y, tape) = self.forward(operands);
        *self.tape.lock().unwrap_or_else(PoisonError::into_inner) = Some(tape);
        Ok(result(y, at.dims()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        _: &Tensor,
        gain: &Tensor,
        _: &Tensor,
        d_y: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let tape = self.tape.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(tape) = tape else { bail!("a layer is differentiated once") };
        let operands = [gain, &d_y.contiguous()?];
        let [d_z, d_gain] = read(operands, |[gain, d_y]| self.backward(tape, gain, d_y))?;
        let d_z = tensor_like(d_z, x)?;
        let d_o = if self.residual == 1.0 { d_z.clone() } else { (&d_z * self.residual)? };
        Ok((Some(d_z), Some(d_o), Some(tensor_like(d_gain, gain)?)))
    }
}
