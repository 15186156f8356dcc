//! Parts of views by ranges of rows and columns. (`ndarray`'s macro `s!` expands to `unsafe`, which
//! this crate forbids.)

use crate::kernel;
use crate::scalar::Scalar;
use core::ops::Range;
use ndarray::{
    ArrayView1, ArrayView2, ArrayView3, ArrayView4, ArrayViewMut2, ArrayViewMut3, ArrayViewMut4,
    Axis, Slice,
};

/// Rows of a view.
#[inline]
pub(crate) fn rows<T>(mut x: ArrayView2<'_, T>, range: Range<usize>) -> ArrayView2<'_, T> {
    if range == (0..x.nrows()) {
        return x;
    }
    x.slice_axis_inplace(Axis(0), Slice::from(range));
    x
}

/// What stays in the second cache of most machines.
const CACHE_BYTES: usize = 1 << 20;

/// Reads some rows of arrays that are too large for a cache once, each array in its order, so that
/// they are in a cache when they are read in pieces and mixed: machines load ahead what is read in
/// order. Does nothing if the arrays do fit, or the rows do not.
pub(crate) fn read_ahead<T: Scalar>(arrays: &[ArrayView2<'_, T>], range: Range<usize>) {
    let bytes = |rows: usize| {
        let numbers = |x: &ArrayView2<'_, T>| rows.saturating_mul(x.ncols() * size_of::<T>());
        arrays.iter().map(numbers).fold(0, usize::saturating_add)
    };
    let all = arrays.first().map_or(0, ArrayView2::nrows);
    if bytes(all) <= CACHE_BYTES || bytes(range.len()) > CACHE_BYTES {
        return;
    }
    for x in arrays {
        if let Some(x) = rows(*x, range.clone()).to_slice() {
            core::hint::black_box(kernel::max_abs(x));
        }
    }
}

/// One row of a view.
#[inline]
pub(crate) fn row<T>(x: ArrayView2<'_, T>, row: usize) -> ArrayView1<'_, T> {
    x.index_axis_move(Axis(0), row)
}

/// Columns of a view.
pub(crate) fn columns<T>(mut x: ArrayView2<'_, T>, range: Range<usize>) -> ArrayView2<'_, T> {
    x.slice_axis_inplace(Axis(1), Slice::from(range));
    x
}

/// Columns of a mutable view.
pub(crate) fn columns_mut<T>(
    mut x: ArrayViewMut2<'_, T>,
    range: Range<usize>,
) -> ArrayViewMut2<'_, T> {
    x.slice_axis_inplace(Axis(1), Slice::from(range));
    x
}

/// Rows of a mutable view.
#[inline]
pub(crate) fn rows_mut<T>(
    mut x: ArrayViewMut2<'_, T>,
    range: Range<usize>,
) -> ArrayViewMut2<'_, T> {
    if range == (0..x.nrows()) {
        return x;
    }
    x.slice_axis_inplace(Axis(0), Slice::from(range));
    x
}

/// Rows of some heads of one sequence of `[batch, heads, n, d]`.
pub(crate) fn heads<'a, T>(
    x: &ArrayView4<'a, T>,
    sequence: usize,
    heads: Range<usize>,
    rows: Range<usize>,
) -> ArrayView3<'a, T> {
    let mut x = (*x).index_axis_move(Axis(0), sequence);
    x.slice_axis_inplace(Axis(0), Slice::from(heads));
    x.slice_axis_inplace(Axis(1), Slice::from(rows));
    x
}

/// Rows of one of them.
pub(crate) fn head<'a, T>(
    x: &ArrayView4<'a, T>,
    sequence: usize,
    head: usize,
    range: Range<usize>,
) -> ArrayView2<'a, T> {
    rows((*x).index_axis_move(Axis(0), sequence).index_axis_move(Axis(0), head), range)
}

/// What belongs to queries and keys in `[1 or batch, 1 or heads, n_q, n_k]`: of some query heads of
/// one sequence.
pub(crate) fn pairs<'a, T>(
    x: &ArrayView4<'a, T>,
    sequence: usize,
    heads: Range<usize>,
    [queries, keys]: [Range<usize>; 2],
) -> ArrayView3<'a, T> {
    let (batch, of_heads, ..) = x.dim();
    let mut x = (*x).index_axis_move(Axis(0), if batch == 1 { 0 } else { sequence });
    if of_heads > 1 {
        x.slice_axis_inplace(Axis(0), Slice::from(heads));
    }
    x.slice_axis_inplace(Axis(1), Slice::from(queries));
    x.slice_axis_inplace(Axis(2), Slice::from(keys));
    x
}

/// The same, to write.
pub(crate) fn pairs_mut<'b, T>(
    x: &'b mut ArrayViewMut4<'_, T>,
    sequence: usize,
    heads: Range<usize>,
    [queries, keys]: [Range<usize>; 2],
) -> ArrayViewMut3<'b, T> {
    let (batch, of_heads, ..) = x.dim();
    let mut x = x.view_mut().index_axis_move(Axis(0), if batch == 1 { 0 } else { sequence });
    if of_heads > 1 {
        x.slice_axis_inplace(Axis(0), Slice::from(heads));
    }
    x.slice_axis_inplace(Axis(1), Slice::from(queries));
    x.slice_axis_inplace(Axis(2), Slice::from(keys));
    x
}

/// Copies rows to columns, times a factor: `out [columns, width]`, zero beyond the rows, and sums
/// the squares of each column, `squares [width]`. Rows may have any strides.
pub(crate) fn to_columns<T: Scalar>(
    x: ArrayView2<'_, T>,
    factor: T,
    squares: &mut [T],
    out: &mut [T],
) {
    let (rows, length) = x.dim();
    let width = squares.len();
    let out = &mut out[..length * width];
    if let Some(x) = x.to_slice() {
        kernel::transpose(rows, &|t| &x[t * length..(t + 1) * length], factor, squares, out);
    } else if x.strides()[1] == 1 {
        kernel::transpose(
            rows,
            &|t| x.index_axis_move(Axis(0), t).to_slice().unwrap_or_default(),
            factor,
            squares,
            out,
        );
    } else {
        squares.fill(T::zero());
        for (column, out) in x.axis_iter(Axis(1)).zip(out.chunks_exact_mut(width)) {
            let (real, padding) = out.split_at_mut(rows);
            padding.fill(T::zero());
            for ((y, &x), square) in real.iter_mut().zip(column).zip(&mut *squares) {
                *y = factor * x;
                *square += *y * *y;
            }
        }
    }
}
