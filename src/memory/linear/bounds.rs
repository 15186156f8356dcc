//! How large numbers may be for sums and outputs to stay in range.

use crate::memory::answer::Readout;
use crate::scalar::Scalar;

/// Values up to this are small: as many of them as there will be, times the largest features, at
/// the largest log scale, leave sums that can be read without a denominator, up to
/// [`MOST_FEATURES`] of them and [`LARGEST_SCALE`].
const SMALL_VALUE: f64 = 1e6;

/// What 2⁴⁰ small values may sum to.
const SMALL_SUM: f64 = 1e24;

/// See [`SMALL_VALUE`].
const MOST_FEATURES: usize = 1 << 13;

/// See [`SMALL_VALUE`]; in natural-log units.
const LARGEST_SCALE: f64 = 12.0;

/// Rows of features whose maximum is above this, or below its inverse, are brought to a maximum of
/// one, so that their products stay in range.
pub(super) const LARGEST_FEATURE: f64 = 1024.0;

/// How far a log scale must lie above that of keys with values up to `largest`, so that 2³⁰ of
/// them can be summed: the larger the unit, the smaller the numbers.
pub(super) fn headroom<T: Scalar>(largest: T) -> T {
    let comfortable = T::max_value() * T::from_f64(0.5_f64.powi(44));
    if largest > comfortable { (largest / comfortable).ln() } else { T::zero() }
}

/// The largest of the values that have been absorbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Size {
    /// No output can overflow.
    Small,
    /// No sum can overflow.
    Ordinary,
    /// Sums may overflow, and are looked at after every change.
    Large,
}

impl Size {
    /// Of new values, up to `largest`.
    pub(super) fn of_values<T: Scalar>(largest: T) -> Self {
        Self::of(largest.as_f64(), SMALL_VALUE, T::SAFE_VALUE)
    }

    /// Of the values behind sums, which are up to `largest`.
    pub(super) fn of_sums<T: Scalar>(largest: T) -> Self {
        Self::of(largest.as_f64(), SMALL_SUM, 0.0)
    }

    fn of(largest: f64, small: f64, ordinary: f64) -> Self {
        match largest {
            x if x <= small => Self::Small,
            x if x <= ordinary => Self::Ordinary,
            _ => Self::Large,
        }
    }
}

/// The least denominator with which the output of a token is known to be in range, where sums are
/// of values of this size and the answer has this log scale; `None` if that is not known for any.
pub(super) fn least_denominator<T: Scalar>(
    readout: Readout,
    size: Size,
    features: usize,
    log_scale: T,
) -> Option<T> {
    match readout {
        // with such a denominator the quotient of any sums of ordinary values stays in range
        Readout::Normalized => (size < Size::Large).then(|| T::from_f64(1.0 / LARGEST_FEATURE)),
        Readout::Unnormalized => {
            let in_range = features <= MOST_FEATURES && log_scale <= T::from_f64(LARGEST_SCALE);
            (size == Size::Small && in_range).then(T::neg_infinity)
        }
    }
}
