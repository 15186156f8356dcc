//! What decay leaves of sums: the factors of features, relative to the slowest.

use crate::kernel;
use crate::kernel::buffer::Buffer;
use crate::kernel::loops::decay::RowDecay;
use crate::scalar::Scalar;

/// What decay leaves of sums: as much of all as of the slowest feature, and of each `kept + change`
/// beyond that, which are empty if all are the same.
#[derive(Debug)]
pub(super) struct StateDecay<T> {
    /// In logarithms.
    pub(super) slowest: T,
    kept: Buffer<T>,
    change: Buffer<T>,
}

impl<T: Scalar> StateDecay<T> {
    /// Nothing is lost.
    pub(super) fn new() -> Self {
        Self { slowest: T::zero(), kept: Buffer::new(), change: Buffer::new() }
    }

    /// That of features beyond the slowest, if they differ.
    pub(super) fn of_features(&self) -> Option<RowDecay<'_, T>> {
        (!self.kept.is_empty()).then(|| RowDecay { kept: &self.kept, change: &self.change })
    }

    /// The decays of features that these log decays come to, or of all of them.
    pub(super) fn set(&mut self, log_decay: &[T]) {
        self.slowest = kernel::max(log_decay);
        let differ = if log_decay.len() > 1 { log_decay.len() } else { 0 };
        self.kept.resize(differ);
        self.change.resize(differ);
        self.kept.fill(T::one());
        if differ == 0 || self.slowest == T::neg_infinity() {
            self.change.fill(T::zero());
            return;
        }
        // a small change is to be added, with its own digits; a large one leaves few of the sum
        let mut all_small = true;
        for (change, &log_decay) in self.change.iter_mut().zip(log_decay) {
            let beyond = log_decay - self.slowest;
            all_small &= beyond > -T::one();
            *change = exp_minus_one(beyond.max(-T::one()));
        }
        if !all_small {
            for ((kept, change), &log_decay) in
                self.kept.iter_mut().zip(self.change.iter_mut()).zip(log_decay)
            {
                let beyond = log_decay - self.slowest;
                if beyond <= -T::one() {
                    (*kept, *change) = (beyond.exp(), T::zero());
                }
            }
        }
    }
}

/// `e^x − 1` for x from −1 to 0, to a few units in the last place: the series at x/8, and
/// `e^{2y} − 1 = (e^y − 1)(e^y − 1 + 2)` three times. Without branches, so that loops over it
/// become vectors.
#[inline]
fn exp_minus_one<T: Scalar>(x: T) -> T {
    const INVERSE_FACTORIALS: [f64; 10] = [
        1.0 / 39_916_800.0,
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
    ];
    let y = x * T::from_f64(0.125);
    let mut series = T::zero();
    for inverse in INVERSE_FACTORIALS {
        series = (series + T::from_f64(inverse)) * y;
    }
    let mut result = y + y * series;
    for _ in 0..3 {
        result = result * (result + T::from_f64(2.0));
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_changes_keep_their_digits() {
        for i in 0..2000 {
            let x = -f64::from(i) / 2000.0;
            for x in [x, x * 1e-3, x * 1e-9, x * 1e-300] {
                let (found, exact) = (exp_minus_one(x), x.exp_m1());
                assert!(
                    (found - exact).abs() <= 8.0 * f64::EPSILON * exact.abs(),
                    "{x}: {found} {exact}"
                );
            }
            #[allow(clippy::cast_possible_truncation)]
            let narrow = x as f32;
            let (found, exact) = (f64::from(exp_minus_one(narrow)), f64::from(narrow).exp_m1());
            assert!(
                (found - exact).abs() <= 8.0 * f64::from(f32::EPSILON) * exact.abs(),
                "{x}: {found} {exact}"
            );
        }
    }
}
