//! Powers of two that keep what is linear in huge or tiny numbers in the range of a type.

use crate::kernel;
use crate::scalar::Scalar;
use core::f64::consts::LOG2_E;
use ndarray::ArrayView2;

/// Magnitudes from 2^−16 to 2^16 need no unit.
const COMMON: f64 = 16.0;

/// The unit of some numbers, 2^exponent: they are divided by it, and what is linear in them is
/// multiplied with it at the end. Both are exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unit {
    exponent: i32,
}

/// The largest exponent of a factor: its reciprocal is a normal number as well.
fn limit<T: Scalar>() -> i32 {
    if T::max_value().as_f64() < f64::MAX { 125 } else { 1000 }
}

fn power<T: Scalar>(exponent: i32) -> T {
    T::from_f64(0.5_f64.powi(-exponent))
}

impl Unit {
    /// One that brings the largest magnitude near 1 where it is far from that.
    pub(crate) fn of<T: Scalar>(x: ArrayView2<'_, T>) -> Self {
        Self::of_all(core::iter::once(x))
    }

    /// One for the numbers of several arrays.
    #[allow(clippy::cast_possible_truncation)] // exponents
    pub(crate) fn of_all<'a, T: Scalar>(all: impl Iterator<Item = ArrayView2<'a, T>>) -> Self {
        let largest = all.fold(T::zero(), |largest, x| match x.as_slice() {
            Some(x) => largest.max(kernel::max_abs(x)),
            None => x.iter().fold(largest, |largest, &x| largest.max(x.abs())),
        });
        let log = largest.as_f64().ln() * LOG2_E;
        if largest == T::zero() || log.abs() <= COMMON {
            return Self { exponent: 0 };
        }
        Self { exponent: (log.ceil() as i32).clamp(-limit::<T>(), limit::<T>()) }
    }

    pub(crate) fn one() -> Self {
        Self { exponent: 0 }
    }

    pub(crate) fn is_one(self) -> bool {
        self.exponent == 0
    }

    /// 1 divided by it.
    pub(crate) fn inverse<T: Scalar>(self) -> T {
        power(-self.exponent)
    }
}

/// `factor` and some units as two numbers whose product they are, each in the range of the type;
/// the second one is mostly 1.
pub(crate) fn product<T: Scalar>(factor: f64, units: &[Unit]) -> [T; 2] {
    let (fraction, exponent) = libm::frexp(factor);
    let exponent = exponent + units.iter().map(|unit| unit.exponent).sum::<i32>();
    let exponent = exponent.clamp(-2 * limit::<T>(), 2 * limit::<T>());
    let first = if exponent.abs() <= limit::<T>() { exponent } else { exponent / 2 };
    [T::from_f64(fraction) * power(first), power(exponent - first)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn units_bring_numbers_near_one_and_back() {
        for largest in [3e-45_f32, 1e-30, 1e-6, 0.3, 1.0, 7e4, 1e30, f32::MAX] {
            let unit = Unit::of(array![[0.0, -largest]].view());
            let in_unit = largest * unit.inverse::<f32>();
            assert!((1e-8..=65536.0).contains(&in_unit), "{largest} {in_unit}");
            let [first, second] = product::<f32>(0.75, &[unit]);
            assert_eq!(in_unit * first * second, 0.75 * largest);
        }
        let [huge, tiny] = [1e30_f32, 1e-30].map(|x| Unit::of(array![[x]].view()));
        assert_eq!(product::<f32>(1.0, &[huge, tiny, huge, tiny])[1], 1.0);
        let [first, second] = product::<f32>(1.0, &[huge, huge]);
        assert_eq!(f64::from(first) * f64::from(second), 2.0_f64.powi(200));
        assert!(Unit::of(array![[0.0_f64]].view()).is_one());
    }
}
