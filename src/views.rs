//! Parts of views by ranges of rows and columns. (`ndarray`'s macro `s!` expands to `unsafe`, which this crate forbids.)

use core::ops::Range;
use ndarray::{ArrayView2, ArrayView4, ArrayViewMut2, Axis, Slice};

/// Rows of a view.
pub(crate) fn rows<T>(mut x: ArrayView2<'_, T>, range: Range<usize>) -> ArrayView2<'_, T> {
    x.slice_axis_inplace(Axis(0), Slice::from(range));
    x
}

/// Columns of a view.
pub(crate) fn columns<T>(mut x: ArrayView2<'_, T>, range: Range<usize>) -> ArrayView2<'_, T> {
    x.slice_axis_inplace(Axis(1), Slice::from(range));
    x
}

/// Rows of a mutable view.
pub(crate) fn rows_mut<T>(mut x: ArrayViewMut2<'_, T>, range: Range<usize>) -> ArrayViewMut2<'_, T> {
    x.slice_axis_inplace(Axis(0), Slice::from(range));
    x
}

/// The first rows and columns of a mutable view.
pub(crate) fn corner_mut<T>(x: ArrayViewMut2<'_, T>, height: usize, width: usize) -> ArrayViewMut2<'_, T> {
    let mut x = rows_mut(x, 0..height);
    x.slice_axis_inplace(Axis(1), Slice::from(0..width));
    x
}

/// The first rows of one head of one sequence of `[batch, heads, n, d]`.
pub(crate) fn head<'a, T>(x: &ArrayView4<'a, T>, sequence: usize, head: usize, length: usize) -> ArrayView2<'a, T> {
    rows((*x).index_axis_move(Axis(0), sequence).index_axis_move(Axis(0), head), 0..length)
}
