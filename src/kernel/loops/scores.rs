//! What happens to scores between the product of queries and keys and the softmax.

use crate::kernel::simd::{Lanes, Level, Loop};

/// `x ← limit·tanh(x/limit)` of scores to base 2, with `limit = log₂e·cap` and `factor = −2/cap`.
///
/// tanh|y| = −t/(2 + t) with t = e^{−2|y|} − 1, which keeps its digits near 0. What divides is
/// between 1 and 2: its reciprocal is a parabola, right to 1/99, and Newton's steps.
pub struct SoftCap<'a, T> {
    pub(crate) x: &'a mut [T],
    pub(crate) limit: T,
    pub(crate) factor: T,
}

impl<T: Lanes> Loop for SoftCap<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let Self { x, limit, factor } = self;
        let (whole, rest) = x.split_at_mut(x.len() / T::lanes::<L>() * T::lanes::<L>());
        for x in T::vectors_mut::<L>(whole) {
            *x = capped::<T, L>(level, *x, limit, factor);
        }
        if !rest.is_empty() {
            let mut last = [capped::<T, L>(level, T::load(level, rest), limit, factor)];
            rest.copy_from_slice(&T::elements_mut::<L>(&mut last)[..rest.len()]);
        }
    }
}

#[inline(always)]
fn capped<T: Lanes, L: Level>(level: L, x: T::V<L>, limit: T, factor: T) -> T::V<L> {
    let t = T::vexp2_minus_1(level, T::vmul(level, T::vabs(level, x), T::splat(level, factor)));
    let reciprocal = reciprocal::<T, L>(level, T::vadd(level, t, number::<T, L>(level, 2.0)));
    let size = T::vmul(level, T::vmul(level, t, reciprocal), T::splat(level, limit));
    // 0·x is NaN where a product of queries and keys has left the range
    T::vfma(level, x, T::splat(level, T::zero()), T::vwith_sign(level, size, x))
}

/// 1 − tanh²(x/limit) = 4e/(1 + e)² with e = e^{−2|x/limit|}, which keeps its digits where it is
/// small.
#[inline(always)]
pub(crate) fn tanh_slope<T: Lanes, L: Level>(level: L, x: T::V<L>, factor: T) -> T::V<L> {
    let e = T::vexp2(level, T::vmul(level, T::vabs(level, x), T::splat(level, factor)));
    let reciprocal = reciprocal::<T, L>(level, T::vadd(level, e, number::<T, L>(level, 1.0)));
    let half = T::vmul(level, T::vmul(level, e, number::<T, L>(level, 4.0)), reciprocal);
    T::vfma(level, x, T::splat(level, T::zero()), T::vmul(level, half, reciprocal))
}

#[inline(always)]
fn number<T: Lanes, L: Level>(level: L, x: f64) -> T::V<L> {
    T::splat(level, T::from(x).unwrap_or_else(T::nan))
}

/// 1/x for x from 1 to 2.
#[inline(always)]
fn reciprocal<T: Lanes, L: Level>(level: L, x: T::V<L>) -> T::V<L> {
    let [square, line, constant] = [32.0 / 99.0, -144.0 / 99.0, 210.0 / 99.0];
    let slope = T::vfma(level, x, number::<T, L>(level, square), number::<T, L>(level, line));
    let mut reciprocal = T::vfma(level, x, slope, number::<T, L>(level, constant));
    let steps = if T::epsilon() > T::from(1e-10).unwrap_or_else(T::nan) { 2 } else { 3 };
    for _ in 0..steps {
        let error = T::vsub(level, number::<T, L>(level, 1.0), T::vmul(level, x, reciprocal));
        reciprocal = T::vfma(level, reciprocal, error, reciprocal);
    }
    reciprocal
}

/// `x_t += slope·(first + step·positions_t)`; whole numbers in the brackets are exact.
pub struct AddDistances<'a, T> {
    pub(crate) x: &'a mut [T],
    pub(crate) positions: &'a [T],
    pub(crate) first: T,
    pub(crate) step: T,
    pub(crate) slope: T,
}

impl<T: Lanes> Loop for AddDistances<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let splat = |x: T| T::splat(level, x);
        let (first, step, slope) = (splat(self.first), splat(self.step), splat(self.slope));
        let next = |x: T::V<L>, position: T::V<L>| {
            let distance = T::vfma(level, step, position, first);
            T::vfma(level, slope, distance, x)
        };
        let whole = self.x.len() / T::lanes::<L>() * T::lanes::<L>();
        let (x, rest) = self.x.split_at_mut(whole);
        for (x, position) in T::vectors_mut::<L>(x).iter_mut().zip(T::vectors::<L>(self.positions))
        {
            *x = next(*x, *position);
        }
        if !rest.is_empty() {
            let positions = &self.positions[whole..whole + rest.len()];
            let mut last = [next(T::load(level, rest), T::load(level, positions))];
            rest.copy_from_slice(&T::elements_mut::<L>(&mut last)[..rest.len()]);
        }
    }
}

/// `x_t ← max(x_t + y_t, least)`; what is NaN stays. Lengths are multiples of [`Lanes::PAD`].
pub struct AddBounded<'a, T> {
    pub(crate) x: &'a mut [T],
    pub(crate) y: &'a [T],
    pub(crate) least: T,
}

impl<T: Lanes> Loop for AddBounded<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let least = T::splat(level, self.least);
        for (x, y) in T::vectors_mut::<L>(self.x).iter_mut().zip(T::vectors::<L>(self.y)) {
            let sum = T::vadd(level, *x, *y);
            *x = T::vselect_greater(level, least, sum, least, sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::simd::machine::Machine;
    use core::f64::consts::LOG2_E;

    fn number<T: Lanes>(x: f64) -> T {
        T::from(x).unwrap()
    }

    fn cap<T: Lanes>(machine: Machine, x: &mut [T], cap: f64) {
        let (limit, factor) = (number(cap * LOG2_E), number(-2.0 / cap));
        machine.run(SoftCap { x, limit, factor });
    }

    /// The largest relative error, in units of epsilon.
    fn worst<T: Lanes>(machine: Machine, limit: f64) -> f64 {
        let mut worst = 0.0_f64;
        for exponent in -400..400 {
            let size = limit * 1.09_f64.powi(exponent / 2);
            let scores: Vec<T> =
                (0..37).map(|i| number(size * (1.0 - f64::from(i) / 18.0))).collect();
            let mut found = scores.clone();
            cap(machine, &mut found, limit);
            for (score, found) in scores.iter().zip(&found) {
                let (score, found) = (score.to_f64().unwrap(), found.to_f64().unwrap());
                let exact = limit * LOG2_E * libm::tanh(score / (limit * LOG2_E));
                let size = exact.abs().max(f64::MIN_POSITIVE);
                worst = worst.max((found - exact).abs() / size);
            }
        }
        worst / T::epsilon().to_f64().unwrap()
    }

    #[test]
    fn the_cap_is_right_to_a_few_units_at_every_level() {
        for machine in Machine::all() {
            for limit in [0.01, 1.0, 30.0, 50.0, 1e6] {
                let (narrow, wide) = (worst::<f32>(machine, limit), worst::<f64>(machine, limit));
                assert!(narrow < 5.0, "{machine:?} {limit} f32: {narrow}");
                assert!(wide < 5.0, "{machine:?} {limit} f64: {wide}");
            }
        }
    }

    #[test]
    fn bounded_sums() {
        for machine in Machine::all() {
            let y: Vec<f32> = (0_u8..).map(|i| f32::from(i) - 9.0).take(2 * f32::PAD).collect();
            let mut x = vec![0.5_f32; y.len()];
            (x[1], x[2], x[3]) = (f32::NAN, f32::NEG_INFINITY, f32::INFINITY);
            let expected: Vec<f32> = x.iter().zip(&y).map(|(x, y)| (x + y).max(-4.0)).collect();
            machine.run(AddBounded { x: &mut x, y: &y, least: -4.0 });
            assert!(x[1].is_nan());
            (0..y.len()).filter(|i| *i != 1).for_each(|i| assert_eq!(x[i], expected[i]));
        }
    }

    #[test]
    fn ends_of_the_range() {
        for machine in Machine::all() {
            let mut x = [0.0_f32, 3e38, -3e38, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
            cap(machine, &mut x, 50.0);
            assert_eq!(x[0], 0.0);
            assert!((x[1] - 50.0 * core::f32::consts::LOG2_E).abs() < 1e-5);
            assert_eq!(x[1], -x[2]);
            assert!(x[3..].iter().all(|x| x.is_nan()));
            let mut x = [1e308_f64, -1e308];
            cap(machine, &mut x, 1e-3);
            assert!((x[0] - 1e-3 * LOG2_E).abs() < 1e-18 && x[0] == -x[1]);
        }
    }

    #[test]
    fn distances_are_added_at_every_size_and_level() {
        for machine in Machine::all() {
            for n in 0..70_u16 {
                let positions: Vec<f32> = (0..n).map(f32::from).collect();
                let mut x: Vec<f32> = (0..n).map(|t| f32::from(t) * 0.5).collect();
                let (first, step, slope) = (1e6, -1.0, -0.25);
                machine.run(AddDistances { x: &mut x, positions: &positions, first, step, slope });
                for (t, x) in (0..n).zip(x) {
                    assert_eq!(x, f32::from(t) * 0.5 - 0.25 * (1e6 - f32::from(t)));
                }
            }
        }
    }
}
