//! The inner loops of backward passes.

use crate::kernel::compiled::Compiled;
use crate::kernel::loops::gradients::{AddRows, SoftCapGradient, SoftmaxGradient};

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

/// `to_i += factor·from_i` for rows of `length` numbers, those of `from` `stride` apart.
pub(crate) fn add_rows<T: Compiled>(
    factor: T,
    from: &[T],
    stride: usize,
    length: usize,
    to: &mut [T],
) {
    T::run_add_rows(AddRows { factor, from, stride, length, to });
}
