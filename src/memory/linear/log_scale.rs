//! The log scale of sums, in two parts, so that a long decay loses no digits.

use crate::scalar::Scalar;

/// A log scale, and what rounding left of it when the sums decayed.
#[derive(Clone, Copy, Debug)]
pub(super) struct LogScale<T> {
    pub(super) high: T,
    pub(super) low: T,
}

impl<T: Scalar> LogScale<T> {
    pub(super) fn of(high: T) -> Self {
        Self { high, low: T::zero() }
    }

    /// That of no tokens at all: −∞.
    pub(super) fn empty() -> Self {
        Self::of(T::neg_infinity())
    }

    /// The sum of this and a log decay.
    pub(super) fn decayed(self, log_decay: T) -> Self {
        let sum = self.high + log_decay;
        if sum == T::neg_infinity() {
            return Self::of(sum);
        }
        // what was lost of either (Knuth's two-sum)
        let of_decay = sum - self.high;
        let low = self.low + (self.high - (sum - of_decay)) + (log_decay - of_decay);
        let whole = sum + low;
        Self { high: whole, low: low - (whole - sum) }
    }

    /// `e^{self − log_scale}`: what brings numbers of this log scale to one that is at least as
    /// large.
    pub(super) fn ratio_to(self, log_scale: T) -> T {
        if self.low == T::zero() {
            // not a difference of infinities
            return if self.high == log_scale { T::one() } else { (self.high - log_scale).exp() };
        }
        T::from_f64(libm::exp((self.high.as_f64() - log_scale.as_f64()) + self.low.as_f64()))
    }
}
