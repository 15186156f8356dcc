//! The inner loops of backward passes.

use crate::kernel::buffer::padded;
use crate::kernel::compiled::Compiled;
use crate::kernel::loops::gradient_columns::{
    AddAndScaleColumns, AddExponentialRows, AffineColumns, CausalAffine, DotColumns,
};
use crate::kernel::loops::gradients::{AddRows, SoftCapGradient, SoftmaxGradient};
use crate::kernel::loops::products::{Epilogue, Matrix, Product};

impl<T: Compiled> SoftmaxGradient<'_, T> {
    /// Computes weights and gradients.
    pub(crate) fn run(self) {
        debug_assert!(self.means.len().is_multiple_of(T::PAD) && self.from.is_multiple_of(T::PAD));
        T::run_softmax_gradient(self);
    }
}

/// `gradients ← gradients·(1 − tanh²(x/limit))` for scores `x` to base 2, with `factor = −2/cap`:
/// what [`soft_cap`](crate::kernel::soft_cap) hands on. Lengths are multiples of [`Lanes::PAD`].
pub(crate) fn soft_cap_gradient<T: Compiled>(x: &[T], factor: T, gradients: &mut [T]) {
    debug_assert!(x.len().is_multiple_of(T::PAD) && x.len() == gradients.len());
    T::run_soft_cap_gradient(SoftCapGradient { x, factor, gradients });
}

/// `to_i += factor·from_i` for rows of `length` numbers, those of `from` `stride` apart; returns
/// whether every number is finite.
pub(crate) fn add_rows<T: Compiled>(
    factor: T,
    from: &[T],
    stride: usize,
    length: usize,
    to: &mut [T],
) -> bool {
    T::run_add_rows(AddRows { factor, from, stride, length, to }) == T::zero()
}

/// `sums_t += Σ_i x_it·y_it` for columns from `from` on, a multiple of 64 bytes' numbers.
pub(crate) fn dot_columns<T: Compiled>(x: &[T], y: &[T], from: usize, sums: &mut [T]) {
    debug_assert!(x.len() == y.len() && from.is_multiple_of(T::PAD));
    T::run_dot_columns(DotColumns { x, y, from, sums });
}

/// `x_it ← x_it·a_t + r_i·b_t`.
pub(crate) fn affine_columns<T: Compiled>(x: &mut [T], r: &[T], a: &[T], b: &[T]) {
    T::run_affine_columns(AffineColumns { x, r, a, b });
}

/// `x_it ← x_it·a_t + b_t` where `t ≥ first + i`, and 0 in the columns from `first` before it, of
/// up to as many rows as numbers in 64 bytes.
pub(crate) fn causal_affine<T: Compiled>(x: &mut [T], first: usize, a: &[T], b: &[T]) {
    debug_assert!(first.is_multiple_of(T::PAD) && x.len() <= T::PAD * a.len());
    T::run_causal_affine(CausalAffine { x, first, a, b });
}

/// `x_it ← (x_it + factor·y_it)·scales_t`.
pub(crate) fn add_and_scale_columns<T: Compiled>(x: &mut [T], factor: T, y: &[T], scales: &[T]) {
    debug_assert_eq!(x.len(), y.len());
    T::run_add_and_scale_columns(AddAndScaleColumns { x, factor, y, scales });
}

/// `sum_t += root·(y_t − total_t·root·x_t)` for rows of `length` numbers, those of `y` padded;
/// returns whether every number is finite.
pub(crate) fn add_exponential_rows<T: Compiled>(
    y: &[T],
    x: &[T],
    totals: &[T],
    root: T,
    length: usize,
    sum: &mut [T],
) -> bool {
    let stride = padded::<T>(length);
    let work = AddExponentialRows { y, stride, x, totals, root, length, sum };
    T::run_add_exponential_rows(work) == T::zero()
}

/// `C [m, n] (+)= A [m, k]·B [k, n]` of rows of B and C `ld` apart.
pub(crate) fn product<T: Compiled>(
    [m, n, k]: [usize; 3],
    a: Matrix<'_, T>,
    b: &[T],
    c: &mut [T],
    ld: usize,
    add: bool,
) {
    let into = if add { Epilogue::Add } else { Epilogue::Set };
    Product { m, n, k, a, b, ldb: ld, c, ldc: ld, into }.run();
}
