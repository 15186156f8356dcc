//! Sums over tokens from which the gradients by the parameters of a map follow.

use crate::kernel;
use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::loops::products::{Epilogue, Matrix, Product};
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use ndarray::{Array2, ArrayView2};

/// Of logits `Ωx + b`, the gradients by Ω and b: with `a_it` that by logit i of token t,
///
/// ```text
/// dΩ_i = Σ_t a_it x_t,    db_i = Σ_t a_it.
/// ```
///
/// Sums are compensated.
#[derive(Debug)]
pub struct ProjectionSums<T> {
    head_dim: usize,
    /// `[logits, head_dim]` with padded rows.
    projection: Buffer<T>,
    projection_low: Buffer<T>,
    /// `[logits]`.
    bias: Buffer<T>,
    bias_low: Buffer<T>,
    /// The vectors of a chunk as rows, and the sums of one.
    rows: Buffer<T>,
    chunk: Buffer<T>,
}

impl<T: Scalar> ProjectionSums<T> {
    pub(crate) fn new() -> Self {
        Self {
            head_dim: 0,
            projection: Buffer::new(),
            projection_low: Buffer::new(),
            bias: Buffer::new(),
            bias_low: Buffer::new(),
            rows: Buffer::new(),
            chunk: Buffer::new(),
        }
    }

    /// Makes them zero, for so many logits.
    pub(crate) fn reset(&mut self, logits: usize, head_dim: usize) {
        self.head_dim = head_dim;
        for array in [&mut self.projection, &mut self.projection_low] {
            array.resize(logits * padded::<T>(head_dim));
            array.fill(T::zero());
        }
        for array in [&mut self.bias, &mut self.bias_low] {
            array.resize(logits);
            array.fill(T::zero());
        }
    }

    /// Adds a chunk of vectors `[head_dim, width]` with the gradients by their logits `[logits,
    /// width]`, both zero beyond the tokens.
    pub(crate) fn add(&mut self, x: &[T], [tokens, width]: [usize; 2], a: &[T]) {
        let stride = padded::<T>(self.head_dim);
        let mut rows = core::mem::replace(&mut self.rows, Buffer::new());
        rows.resize(width * stride);
        self.chunk.resize(stride);
        let row = |p: usize| &x[p * width..(p + 1) * width];
        kernel::transpose(self.head_dim, &row, T::one(), &mut self.chunk, &mut rows);
        self.add_rows(&rows, [tokens, width], a);
        self.rows = rows;
    }

    /// The same of vectors as rows with padding.
    pub(crate) fn add_rows(&mut self, rows: &[T], [tokens, width]: [usize; 2], a: &[T]) {
        let (logits, stride) = (self.bias.len(), padded::<T>(self.head_dim));
        Product {
            m: logits,
            n: stride,
            k: tokens,
            a: Matrix::rows(a, width),
            b: rows,
            ldb: stride,
            c: &mut self.projection,
            ldc: stride,
            into: Epilogue::Compensated(&mut self.projection_low),
        }
        .run();
        self.chunk.resize(logits);
        for (sum, row) in self.chunk.iter_mut().zip(a.chunks_exact(width)) {
            *sum = kernel::sum(&row[..tokens]);
        }
        let Self { bias, bias_low, chunk, .. } = self;
        kernel::add_compensated(bias, bias_low, T::one(), chunk);
    }

    /// The gradient by Ω, `[logits, head_dim]`, or nothing if none was asked for.
    pub(crate) fn projection(&self) -> Array2<T> {
        let stride = padded::<T>(self.head_dim).max(1);
        Array2::from_shape_fn((self.bias.len(), self.head_dim), |(i, p)| {
            self.projection[i * stride + p] + self.projection_low[i * stride + p]
        })
    }

    /// The gradient by b, `[logits]`.
    pub(crate) fn bias(&self) -> impl Iterator<Item = T> {
        self.bias.iter().zip(&*self.bias_low).map(|(&sum, &low)| sum + low)
    }
}

/// Adds the gradient by a projection `[m, head_dim]`, the same for queries and keys.
pub(crate) fn add_projection<T: Scalar>(
    sums: [&ProjectionSums<T>; 2],
    d_parameters: &mut Parameters<T>,
    name: &str,
) {
    if let Some(gradient) = d_parameters.get_mut(name) {
        for sums in sums {
            let own = sums.projection();
            if !own.is_empty() {
                gradient.zip_mut_with(&own.into_dyn(), |sum, &x| *sum += x);
            }
        }
    }
}

/// Adds the gradient by weights D, the same for queries and keys: `dD_i = db_i/D_i`, as the logits
/// have `ln D_i`. It is 0 for weights that are: both sides have the factor, so that attention
/// depends on its square.
pub(crate) fn add_weights<'a, T: Scalar>(
    sums: [&ProjectionSums<T>; 2],
    d_parameters: &mut Parameters<T>,
    name: &str,
    weights: impl Iterator<Item = &'a T> + Clone,
) {
    let Some(gradient) = d_parameters.vector_mut(name) else { return };
    for sums in sums {
        for ((gradient, sum), &weight) in gradient.iter_mut().zip(sums.bias()).zip(weights.clone())
        {
            if weight > T::zero() {
                *gradient += sum / weight;
            }
        }
    }
}

/// Adds the gradient by radii r of directions `[m, head_dim]`, with `ω_i = r_i·u_i`, the same for
/// queries and keys.
pub(crate) fn add_radii<T: Scalar>(
    sums: [&ProjectionSums<T>; 2],
    d_parameters: &mut Parameters<T>,
    directions: ArrayView2<'_, T>,
) {
    let Some(gradient) = d_parameters.vector_mut("radii") else { return };
    for d_projection in sums.map(ProjectionSums::projection) {
        let rows = d_projection.outer_iter().zip(directions.outer_iter());
        for (gradient, (row, direction)) in gradient.iter_mut().zip(rows) {
            *gradient += row.dot(&direction);
        }
    }
}
