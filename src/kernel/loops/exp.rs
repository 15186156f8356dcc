//! Exponentials of the numbers of one vector.

use crate::kernel::loops::products::TwoRowsTimesMatrix;
use crate::kernel::loops::reduce::{Max, Reduce, dot_at};
use crate::kernel::simd::{Lanes, Level, Loop};

/// `x_i ← 2^(x_i − shift)`; no element may be above `shift`.
pub struct Exp2<'a, T> {
    pub(crate) x: &'a mut [T],
    pub(crate) shift: T,
}

impl<T: Lanes> Loop for Exp2<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let shift = T::splat(level, self.shift);
        let (whole, rest) = self.x.split_at_mut(self.x.len() / T::lanes::<L>() * T::lanes::<L>());
        for x in T::vectors_mut::<L>(whole) {
            *x = T::vexp2(level, T::vsub(level, *x, shift));
        }
        if !rest.is_empty() {
            let mut last = [T::vexp2(level, T::vsub(level, T::load(level, rest), shift))];
            rest.copy_from_slice(&T::elements_mut::<L>(&mut last)[..rest.len()]);
        }
    }
}

/// `x_i ← 2^(x_i − max)`; the maximum and ½ Σ v_j².
pub struct Exp2BelowMaximum<'a, T> {
    pub(crate) x: &'a mut [T],
    pub(crate) v: &'a [T],
}

impl<T: Lanes> Loop for Exp2BelowMaximum<'_, T> {
    type Output = (T, T);

    #[inline(always)]
    fn run<L: Level>(self, level: L) -> (T, T) {
        let half = T::one() / (T::one() + T::one());
        let norm = half * dot_at(level, self.v, self.v);
        let largest = Reduce { x: &*self.x, how: Max }.run(level);
        Exp2 { x: self.x, shift: largest }.run(level);
        (largest, norm)
    }
}

/// Two vectors mapped by a projection, one column of B a row of it: `y = 2^(x·B + bias − max)`, and
/// for each vector the maximum and ½ Σ x_p².
pub struct ExponentialPair<'a, T> {
    pub(crate) x: [&'a [T]; 2],
    pub(crate) b: &'a [T],
    pub(crate) ldb: usize,
    pub(crate) bias: Option<&'a [T]>,
    /// `ldb` numbers each, of which the first `features` count.
    pub(crate) y: [&'a mut [T]; 2],
    pub(crate) features: usize,
}

impl<T: Lanes> Loop for ExponentialPair<'_, T> {
    type Output = [(T, T); 2];

    #[inline(always)]
    fn run<L: Level>(self, level: L) -> [(T, T); 2] {
        let Self { x, b, ldb, bias, y: [first, second], features } = self;
        TwoRowsTimesMatrix { x, b, ldb, y: [&mut *first, &mut *second] }.run(level);
        [
            finish(level, bias, x[0], &mut first[..features]),
            finish(level, bias, x[1], &mut second[..features]),
        ]
    }
}

/// The exponentials of one vector.
#[inline(always)]
fn finish<T: Lanes, L: Level>(level: L, bias: Option<&[T]>, v: &[T], x: &mut [T]) -> (T, T) {
    if let Some(bias) = bias {
        for (x, &bias) in x.iter_mut().zip(bias) {
            *x = *x + bias;
        }
    }
    Exp2BelowMaximum { x, v }.run(level)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::loops::samples::{assert_near, numbers, wide};
    use crate::kernel::simd::machine::Machine;

    fn exp2<T: Lanes>(machine: Machine, x: T) -> T {
        let mut x = [x];
        machine.run(Exp2 { x: &mut x, shift: T::zero() });
        x[0]
    }

    #[test]
    #[allow(clippy::cast_possible_truncation)]
    fn relative_error_is_below_two_units_at_every_level() {
        for machine in Machine::all() {
            let (mut worst32, mut worst64) = (0.0_f64, 0.0_f64);
            for i in 0..1000 {
                let x: Vec<f64> =
                    (0..999).map(|j| -f64::from(i * 999 + j) * (125.0 / 999_000.0)).collect();
                let mut y: Vec<f32> = x.iter().map(|&x| x as f32).collect();
                let exact: Vec<f64> = y.iter().map(|&x| libm::exp2(f64::from(x))).collect();
                machine.run(Exp2 { x: &mut y, shift: 0.0 });
                let errors = y.iter().zip(&exact).map(|(y, e)| (f64::from(*y) / e - 1.0).abs());
                worst32 = errors.fold(worst32, f64::max);
                let x: Vec<f64> = x.iter().map(|x| x * 8.1).collect();
                let mut y = x.clone();
                machine.run(Exp2 { x: &mut y, shift: 0.0 });
                worst64 = x
                    .iter()
                    .zip(&y)
                    .map(|(x, y)| (y / libm::exp2(*x) - 1.0).abs())
                    .fold(worst64, f64::max);
            }
            assert!(worst32 < 2.0 * f64::from(f32::EPSILON), "{machine:?} f32: {worst32:e}");
            assert!(worst64 < 2.0 * f64::EPSILON, "{machine:?} f64: {worst64:e}");
        }
    }

    #[test]
    fn ends_of_the_range() {
        for machine in Machine::all() {
            assert_eq!(exp2(machine, 0.0_f32), 1.0);
            assert_eq!(exp2(machine, 0.0_f64), 1.0);
            assert_eq!(exp2(machine, f32::NEG_INFINITY), 0.0);
            assert_eq!(exp2(machine, f64::NEG_INFINITY), 0.0);
            assert_eq!(exp2(machine, -1e30_f32), 0.0);
            assert_eq!(exp2(machine, -1e300_f64), 0.0);
            assert!(exp2(machine, f32::NAN).is_nan());
            assert!(exp2(machine, f64::NAN).is_nan());
            assert_eq!(exp2(machine, -125.0_f32), 2.0_f32.powi(-125));
            assert_eq!(exp2(machine, -1021.0_f64), 2.0_f64.powi(-1021));
        }
    }

    #[test]
    fn every_length_and_a_shift() {
        for machine in Machine::all() {
            for n in 0..70_u8 {
                let mut x: Vec<f32> = (0..n).map(|i| 3.0 - f32::from(i)).collect();
                machine.run(Exp2 { x: &mut x, shift: 3.0 });
                assert!(x.iter().zip(0..).all(|(x, i)| *x == 2.0_f32.powi(-i)), "{machine:?} {n}");
            }
        }
    }

    fn check_below_maximum<T: Lanes>(machine: Machine, tolerance: f64) {
        for n in 0..=130 {
            let (x, y) = (numbers::<T>(n, 0.7), numbers::<T>(n, 1.3));
            let (a, b) = (wide(&x), wide(&y));
            let mut powers = x.clone();
            let (largest, norm) = machine.run(Exp2BelowMaximum { x: &mut powers, v: &y });
            let expected = a.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            assert_eq!(largest.to_f64().unwrap(), expected);
            let close = |found: T, expected: f64| {
                assert_near(machine, n, found, expected, tolerance);
            };
            close(norm, 0.5 * b.iter().map(|b| b * b).sum::<f64>());
            powers.iter().zip(&a).for_each(|(&power, a)| close(power, (a - expected).exp2()));
        }
    }

    #[test]
    fn powers_below_the_maximum_agree_with_their_formula_at_every_size_and_level() {
        for machine in Machine::all() {
            check_below_maximum::<f32>(machine, 1e-6);
            check_below_maximum::<f64>(machine, 1e-15);
        }
    }
}
