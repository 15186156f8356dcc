//! Projected keys and values.

use crate::error::Error;
use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::loops::products::{Epilogue, Matrix, Product};
use crate::kernel::{all_finite, chunk_len};
use crate::scalar::Scalar;
use crate::views;
use ndarray::{Array2, ArrayView2, Axis};

/// A projection times the rows of a call, `[rank, columns]`, and what it takes. Grows to the
/// largest call.
#[derive(Debug)]
pub(super) struct Projected<T> {
    /// Some rows, each as wide as whole vectors.
    rows: Buffer<T>,
    sums: Buffer<T>,
    /// The rounding errors of the sums.
    low: Buffer<T>,
}

impl<T: Scalar> Projected<T> {
    pub(super) fn new() -> Self {
        Self { rows: Buffer::new(), sums: Buffer::new(), low: Buffer::new() }
    }

    /// Sets the sums to `projection[.., ..n]·x`, `x [n, columns]`.
    pub(super) fn set(
        &mut self,
        which: &'static str,
        projection: &Array2<T>,
        x: ArrayView2<'_, T>,
    ) -> Result<(), Error> {
        let ((rank, max_len), stride) = (projection.dim(), padded::<T>(x.ncols()));
        let (weights, block) = (projection.as_slice().unwrap_or_default(), chunk_len::<T>());
        self.sums.resize(rank * stride);
        self.low.resize(rank * stride);
        self.sums.fill(T::zero());
        self.low.fill(T::zero());
        for (start, x) in
            x.axis_chunks_iter(Axis(0), block).enumerate().map(|(i, x)| (i * block, x))
        {
            self.rows.resize(x.nrows() * stride);
            for (row, x) in self.rows.chunks_exact_mut(stride).zip(x.outer_iter()) {
                let (numbers, padding) = row.split_at_mut(x.len());
                numbers.iter_mut().zip(x).for_each(|(to, &x)| *to = x);
                padding.fill(T::zero());
            }
            Product {
                m: rank,
                n: stride,
                k: x.nrows(),
                a: Matrix::rows(&weights[start..], max_len),
                b: &self.rows,
                ldb: stride,
                c: &mut self.sums,
                ldc: stride,
                into: Epilogue::Compensated(&mut self.low),
            }
            .run();
        }
        match self.sums.chunks_exact(stride).position(|row| !all_finite(row)) {
            Some(row) => Err(Error::Overflow { which, row }),
            None => Ok(()),
        }
    }

    /// The sums `[rank, columns]`.
    pub(super) fn view(&self, rank: usize, columns: usize) -> ArrayView2<'_, T> {
        let all = ArrayView2::from_shape((rank, padded::<T>(columns)), &self.sums)
            .expect("set for these");
        views::columns(all, 0..columns)
    }
}
