//! Rows of views, and rows with padding.

use crate::kernel;
use crate::kernel::buffer::{Buffer, padded};
use crate::scalar::Scalar;
use ndarray::{ArrayView2, ArrayViewMut2};

/// Rows times their factors, padded.
pub(super) fn scaled_rows<T: Scalar>(x: ArrayView2<'_, T>, factors: &[T], out: &mut Buffer<T>) {
    let stride = padded::<T>(x.ncols());
    out.resize(x.nrows() * stride);
    if let (Some(x), true) = (x.to_slice(), x.ncols() == stride) {
        kernel::scale_rows(x, stride, factors, stride, out);
        return;
    }
    for ((x, out), &factor) in x.outer_iter().zip(out.chunks_exact_mut(stride)).zip(factors) {
        let (numbers, padding) = out.split_at_mut(x.len());
        match x.to_slice() {
            Some(x) => _ = kernel::scale_into(factor, x, numbers),
            None => numbers.iter_mut().zip(x).for_each(|(to, &x)| *to = factor * x),
        }
        padding.fill(T::zero());
    }
}

/// Adds `factor` times padded rows; returns whether all numbers are known to be finite.
pub(super) fn add_rows<T: Scalar>(rows: &[T], factor: T, mut sums: ArrayViewMut2<'_, T>) -> bool {
    let (stride, columns) = (padded::<T>(sums.ncols()), sums.ncols());
    if let Some(sums) = sums.as_slice_mut() {
        return kernel::gradients::add_rows(factor, rows, stride, columns, sums);
    }
    for (mut sum, row) in sums.outer_iter_mut().zip(rows.chunks_exact(stride)) {
        sum.iter_mut().zip(row).for_each(|(sum, &x)| *sum += factor * x);
    }
    false
}
