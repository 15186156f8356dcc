//! Loops of backward passes.

use crate::kernel::loops::columns::{STRIP, load, store, strips};
use crate::kernel::loops::scores::tanh_slope;
use crate::kernel::simd::{Lanes, Level, Loop};

/// What a softmax hands on: `scores_it ← p = 2^(scores_it − log_normalizer_t)` and
/// `gradients_it ← p·(gradients_it − means_t)`, of arrays as wide as `means`, from column `from`
/// on.
pub struct SoftmaxGradient<'a, T> {
    pub(crate) scores: &'a mut [T],
    pub(crate) gradients: &'a mut [T],
    pub(crate) from: usize,
    pub(crate) log_normalizer: &'a [T],
    pub(crate) means: &'a [T],
}

impl<T: Lanes> Loop for SoftmaxGradient<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(mut self, level: L) {
        strips!(self, level, T, L, self.means.len(), self.from);
    }
}

impl<T: Lanes> SoftmaxGradient<'_, T> {
    #[inline(always)]
    fn strip<L: Level, const V: usize>(&mut self, level: L, j: usize) {
        let width = self.means.len();
        let shift = load::<T, L, V>(self.log_normalizer, j);
        let means = load::<T, L, V>(self.means, j);
        let rows = self.scores.chunks_exact_mut(width).zip(self.gradients.chunks_exact_mut(width));
        for (weights, gradients) in rows {
            let mut weight = load::<T, L, V>(weights, j);
            let mut gradient = load::<T, L, V>(gradients, j);
            for v in 0..V {
                weight[v] = T::vexp2(level, T::vsub(level, weight[v], shift[v]));
                let above_mean = T::vsub(level, gradient[v], means[v]);
                gradient[v] = T::vmul(level, weight[v], above_mean);
            }
            store::<T, L, V>(weights, j, weight);
            store::<T, L, V>(gradients, j, gradient);
        }
    }
}

/// `gradients ← gradients·(1 − tanh²(x/limit))`: what a soft cap hands on, for scores `x` to base 2
/// with `factor = −2/cap`. Lengths are multiples of [`Lanes::PAD`].
pub struct SoftCapGradient<'a, T> {
    pub(crate) x: &'a [T],
    pub(crate) factor: T,
    pub(crate) gradients: &'a mut [T],
}

impl<T: Lanes> Loop for SoftCapGradient<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let x = T::vectors::<L>(self.x);
        for (gradient, x) in T::vectors_mut::<L>(self.gradients).iter_mut().zip(x) {
            *gradient = T::vmul(level, *gradient, tanh_slope::<T, L>(level, *x, self.factor));
        }
    }
}

/// `to_i += factor·from_i` for rows of `length` numbers, those of `from` `stride` apart.
pub struct AddRows<'a, T> {
    pub(crate) factor: T,
    pub(crate) from: &'a [T],
    pub(crate) stride: usize,
    pub(crate) length: usize,
    pub(crate) to: &'a mut [T],
}

impl<T: Lanes> Loop for AddRows<'_, T> {
    /// Σ to·0.
    type Output = T;

    #[inline(always)]
    fn run<L: Level>(self, level: L) -> T {
        let (factor, zero) = (T::splat(level, self.factor), T::splat(level, T::zero()));
        let whole = self.length / T::lanes::<L>() * T::lanes::<L>();
        let rows = self.from.chunks(self.stride).zip(self.to.chunks_exact_mut(self.length));
        let (mut mark, mut rest_mark) = (zero, T::zero());
        for (from, to) in rows {
            let (to, rest) = to.split_at_mut(whole);
            for (to, from) in T::vectors_mut::<L>(to).iter_mut().zip(T::vectors::<L>(from)) {
                *to = T::vfma(level, factor, *from, *to);
                mark = T::vfma(level, *to, zero, mark);
            }
            for (to, &from) in rest.iter_mut().zip(&from[whole..]) {
                *to = *to + self.factor * from;
                rest_mark = rest_mark + *to * T::zero();
            }
        }
        T::vsum(level, mark) + rest_mark
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::loops::samples::{assert_near, numbers, wide};
    use crate::kernel::simd::machine::Machine;
    use core::f64::consts::LOG2_E;

    fn check<T: Lanes>(machine: Machine, tolerance: f64) {
        for (rows, width, from) in [(1, 1, 0), (3, 4, 1), (16, 9, 0), (5, 6, 5), (64, 8, 2)] {
            let (width, from) = (width * T::PAD, from * T::PAD);
            let (scores, gradients) =
                (numbers::<T>(rows * width, 0.3), numbers::<T>(rows * width, 0.7));
            let (shift, means) = (numbers::<T>(width, 1.1), numbers::<T>(width, 1.7));
            let (mut weights, mut found) = (scores.clone(), gradients.clone());
            machine.run(SoftmaxGradient {
                scores: &mut weights,
                gradients: &mut found,
                from,
                log_normalizer: &shift,
                means: &means,
            });
            for i in 0..rows * width {
                let t = i % width;
                let [score, gradient] = [&scores, &gradients].map(|x| x[i].to_f64().unwrap());
                let [shift, mean] = [&shift, &means].map(|x| x[t].to_f64().unwrap());
                let weight = (score - shift).exp2();
                if t < from {
                    assert!(weights[i] == scores[i] && found[i] == gradients[i]);
                } else {
                    assert_near(machine, 1, weights[i], weight, tolerance);
                    assert_near(machine, 1, found[i], weight * (gradient - mean), 2.0 * tolerance);
                }
            }

            let mut found = gradients.clone();
            let (cap, number) = (0.2, |x: f64| T::from(x).unwrap());
            let (x, factor) = (&scores, number(-2.0 / cap));
            machine.run(SoftCapGradient { x, factor, gradients: &mut found });
            for i in 0..rows * width {
                let slope = libm::cosh(wide(&scores)[i] / (cap * LOG2_E)).powi(-2);
                let expected = slope * gradients[i].to_f64().unwrap();
                let error = (found[i].to_f64().unwrap() - expected).abs();
                assert!(error <= 8.0 * tolerance * expected.abs(), "{machine:?} {error:e}");
            }
        }
        for length in 1..70 {
            let stride = length + 3;
            let (x, y) = (numbers::<T>(3 * stride, 0.3), numbers::<T>(3 * length, 0.9));
            let (mut found, factor) = (y.clone(), T::one() + T::one());
            machine.run(AddRows { factor, from: &x, stride, length, to: &mut found });
            for i in 0..3 * length {
                let expected = y[i] + factor * x[i / length * stride + i % length];
                assert_near(machine, 1, found[i], expected.to_f64().unwrap(), tolerance);
            }
        }
    }

    #[test]
    fn gradients_agree_with_their_formulas_at_every_level() {
        for machine in Machine::all() {
            check::<f32>(machine, 5e-7);
            check::<f64>(machine, 1e-15);
        }
    }
}
