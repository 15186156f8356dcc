//! What makes scores of the products of queries and keys.

use crate::error::Error;
use crate::kernel;
use crate::scalar::Scalar;
use core::f64::consts::LOG2_E;

/// `cap·tanh(s/cap)` of scores to base 2.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct SoftCap<T> {
    cap: f64,
    limit: T,
    factor: T,
}

impl<T: Scalar> SoftCap<T> {
    /// Refuses a cap that is not positive and finite, in `T` and as what is computed of it.
    pub(crate) fn new(cap: f64) -> Result<Self, Error> {
        let (limit, factor) = (T::from_f64(cap * LOG2_E), T::from_f64(-2.0 / cap));
        if cap > 0.0 && limit.is_normal() && factor.is_normal() {
            return Ok(Self { cap, limit, factor });
        }
        Err(Error::InvalidOption {
            which: "soft_cap",
            found: cap.to_string(),
            needed: "a positive finite number whose reciprocal is one",
        })
    }

    /// The cap, as it was given.
    pub(crate) fn cap(self) -> f64 {
        self.cap
    }

    /// Caps scores to base 2.
    pub(crate) fn apply(self, scores: &mut [T]) {
        kernel::soft_cap(scores, self.limit, self.factor);
    }

    /// Gradients by capped scores become those by what they are before the cap, `scores` to
    /// base 2.
    pub(crate) fn hand_on(self, scores: &[T], gradients: &mut [T]) {
        kernel::gradients::soft_cap_gradient(scores, self.factor, gradients);
    }
}

/// `scale·q·k`, softly capped, minus `slope` times the distance of the tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Scoring<T> {
    pub(crate) scale: T,
    pub(crate) soft_cap: Option<SoftCap<T>>,
    /// To base 2.
    pub(crate) slope: Option<T>,
}

impl<T: Scalar> Scoring<T> {
    /// `scale·q·k`.
    pub(crate) fn new(scale: T) -> Self {
        Self { scale, soft_cap: None, slope: None }
    }

    /// The factor of `q·k`, for scores to base 2.
    pub(crate) fn base_2(&self) -> T {
        self.scale * T::from_f64(LOG2_E)
    }
}

/// The option of a query head, from a list of none, one for all, or one for each.
pub(crate) fn of_query_head(list: &[f64], head: usize) -> Option<f64> {
    list.get(head).or(list.first()).copied()
}
