//! Gradients through a projection of the rows of a call.

use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::chunk_len;
use crate::kernel::loops::products::{Epilogue, Matrix, Product};
use crate::scalar::Scalar;
use crate::views;
use ndarray::{Array2, ArrayView2, ArrayViewMut2};

/// What it takes to hand a gradient back through `P·x`. Grows to the largest call.
#[derive(Debug)]
pub(super) struct ProjectionGradient<T> {
    /// The gradient by the product, in rows as wide as whole vectors.
    d_out: Buffer<T>,
    /// Some rows of `x` as columns.
    columns: Buffer<T>,
    squares: Buffer<T>,
    /// What is added for these rows.
    sums: Buffer<T>,
}

impl<T: Scalar> ProjectionGradient<T> {
    pub(super) fn new() -> Self {
        let [d_out, columns, squares, sums] = [(); 4].map(|()| Buffer::new());
        Self { d_out, columns, squares, sums }
    }

    /// With `y = P[.., ..n]·x`, `x [n, columns]`, adds `Pᵀ d_y` to `d_x`, and `d_y xᵀ` to the first
    /// n columns of `d_projection`.
    pub(super) fn add(
        &mut self,
        projection: &Array2<T>,
        x: ArrayView2<'_, T>,
        d_y: ArrayView2<'_, T>,
        mut d_x: ArrayViewMut2<'_, T>,
        mut d_projection: Option<ArrayViewMut2<'_, T>>,
    ) {
        let ((rank, max_len), (n, columns)) = (projection.dim(), x.dim());
        let stride = padded::<T>(columns);
        let weights = projection.as_slice().unwrap_or_default();
        let Self { d_out, columns: x_columns, squares, sums } = self;
        d_out.resize(rank * stride);
        d_out.fill(T::zero());
        for (row, d_y) in d_out.chunks_exact_mut(stride).zip(d_y.outer_iter()) {
            row.iter_mut().zip(d_y).for_each(|(to, &d_y)| *to = d_y);
        }
        let block = chunk_len::<T>();
        for start in (0..n).step_by(block) {
            let tokens = start..n.min(start + block);
            let len = tokens.len();
            sums.resize(len * stride);
            Product {
                m: len,
                n: stride,
                k: rank,
                a: Matrix::columns(&weights[start..], max_len),
                b: d_out,
                ldb: stride,
                c: sums,
                ldc: stride,
                into: Epilogue::Set,
            }
            .run();
            let mut rows = views::rows_mut(d_x.view_mut(), tokens.clone());
            for (mut d_x, sums) in rows.outer_iter_mut().zip(sums.chunks_exact(stride)) {
                d_x.iter_mut().zip(sums).for_each(|(d_x, &sum)| *d_x += sum);
            }

            let Some(d_projection) = &mut d_projection else { continue };
            let width = padded::<T>(len);
            x_columns.resize(columns * width);
            squares.resize(width);
            views::to_columns(views::rows(x, tokens.clone()), T::one(), squares, x_columns);
            sums.resize(rank * width);
            Product {
                m: rank,
                n: width,
                k: columns,
                a: Matrix::rows(d_out, stride),
                b: x_columns,
                ldb: width,
                c: sums,
                ldc: width,
                into: Epilogue::Set,
            }
            .run();
            let rows = d_projection.outer_iter_mut().zip(sums.chunks_exact(width));
            for (mut row, sums) in rows {
                let row = row.iter_mut().skip(start).take(len);
                row.zip(sums).for_each(|(d, &sum)| *d += sum);
            }
        }
    }
}
