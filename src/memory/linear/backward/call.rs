//! What a backward pass over tokens is called with.

use crate::check;
use crate::error::Error;
use crate::kernel;
use crate::kernel::simd::Lanes;
use crate::memory::answer::Readout;
use crate::memory::linear::checkpoints::SumCheckpoints;
use crate::memory::linear::pass::{Pass, PassBuffers, Tokens};
use crate::memory::unit::{self, Unit};
use crate::scalar::Scalar;
use ndarray::{ArrayView2, ArrayViewMut2};

/// The gradient by the outputs, and where those by the arguments are added.
#[derive(Debug)]
pub(crate) struct TokenGradients<'a, T> {
    pub(crate) d_out: ArrayView2<'a, T>,
    pub(crate) d_q: ArrayViewMut2<'a, T>,
    pub(crate) d_k: ArrayViewMut2<'a, T>,
    pub(crate) d_v: ArrayViewMut2<'a, T>,
    pub(crate) d_log_decay: Option<ArrayViewMut2<'a, T>>,
    /// Whether all that was added is known to be finite.
    pub(crate) is_finite: bool,
}

/// Tokens that meet the sums at once: half as many as in a forward pass, as what tokens do to each
/// other is five products here where it is two there.
pub(super) const fn block_len<T: Lanes>() -> usize {
    2 * T::PAD
}

/// Powers of two by which cotangents and values are divided, so that products of the two stay in
/// range: gradients are linear in the former, those by queries and keys in the latter as well.
#[derive(Clone, Copy, Debug)]
pub(super) struct Units<T> {
    pub(super) d_out: T,
    pub(super) d_out_inverse: T,
    pub(super) values_inverse: T,
    /// Whose product gradients by features are to be multiplied with.
    features: [T; 2],
}

impl<T: Scalar> Units<T> {
    pub(super) fn of(d_out: ArrayView2<'_, T>, v: ArrayView2<'_, T>) -> Result<Self, Error> {
        // what the largest magnitude hides is found chunk by chunk
        for (which, x) in [("d_out", d_out), ("v", v)] {
            if x.first().is_some_and(|x| !x.is_finite()) {
                check::finite(which, x)?;
            }
        }
        let [d_out, values] = [d_out, v].map(Unit::of);
        Ok(Self {
            d_out: unit::product(1.0, &[d_out])[0],
            d_out_inverse: d_out.inverse(),
            values_inverse: values.inverse(),
            features: unit::product(1.0, &[d_out, values]),
        })
    }

    /// Brings gradients by features to absolute terms.
    pub(super) fn bring(&self, gradients: &mut [T]) {
        for factor in self.features {
            if factor != T::one() {
                kernel::scale(gradients, factor);
            }
        }
    }

    /// Brings the values of a chunk to their unit.
    pub(super) fn set(&self, buffers: &mut PassBuffers<T>) {
        if self.values_inverse != T::one() {
            buffers.chunk.scale_values(self.values_inverse);
        }
    }
}

/// A backward pass over tokens: what it knows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backward<'a, T> {
    pub(crate) pass: Pass<'a, T>,
    pub(crate) tokens: Tokens<'a, T>,
    pub(crate) readout: Readout,
    /// Whether gradients by decays are wanted.
    pub(crate) with_decays: bool,
    /// Whether the tokens have queries.
    pub(crate) asked: bool,
    /// What the forward pass kept.
    pub(crate) checkpoints: Option<&'a SumCheckpoints<T>>,
}

impl<T: Scalar> Backward<'_, T> {
    pub(super) fn value_dim(&self) -> usize {
        self.tokens.v.ncols()
    }
}
