//! The step of one token on the sums of a state, which loads every number once.

use crate::kernel::loops::decay::{DecayRows, LaneDecay, RowDecay};
use crate::kernel::loops::reduce::dot_at;
use crate::kernel::loops::vectors::{AddOuter, ScaleInPlace, compensate_with};
use crate::kernel::simd::{Lanes, Level, Loop};

/// A decode step on the sums of a state:
///
/// ```text
/// own = factor·(q·k),    denominator = own + q·z,    answer = own·v + Σ_p q_p·sum_p,
/// k ← factor·k,    z ← z + k,    sum_p ← sum_p + k_p·v
/// ```
///
/// Rows of the sums are as wide as `v`, whole vectors of it, and every number is loaded once; for
/// `low` and `z_low` see [`AddOuter`]. If rows decay, they do so before `k·v` is added, as in
/// [`DecayRows`]; the sums are read before that, by a query of their own. Returns the denominator;
/// if it is not finite, or below `least`, nothing is changed.
#[derive(Debug)]
pub struct DecodeStep<'a, T> {
    pub(crate) factor: T,
    pub(crate) least: T,
    pub(crate) q: &'a [T],
    pub(crate) decay: Option<(&'a [T], RowDecay<'a, T>)>,
    pub(crate) k: &'a mut [T],
    pub(crate) v: &'a [T],
    pub(crate) z: &'a mut [T],
    pub(crate) z_low: &'a mut [T],
    pub(crate) sum: &'a mut [T],
    pub(crate) low: &'a mut [T],
    pub(crate) answer: &'a mut [T],
}

impl<T: Lanes> Loop for DecodeStep<'_, T> {
    type Output = T;

    #[inline(always)]
    fn run<L: Level>(mut self, level: L) -> T {
        let own = self.factor * dot_at(level, self.q, self.k);
        if let Some((query, _)) = self.decay {
            self.q = query;
        }
        let denominator = own + dot_at(level, self.q, self.z);
        if !(denominator >= self.least && denominator.is_finite()) {
            return denominator;
        }
        if self.factor != T::one() {
            ScaleInPlace { x: &mut *self.k, factor: self.factor }.run(level);
        }
        match self.decay {
            None => AddOuter {
                sum: &mut *self.z,
                low: &mut *self.z_low,
                factors: &[T::one()],
                x: &*self.k,
            }
            .run(level),
            Some((_, decay)) => {
                DecayRows {
                    decay,
                    factors: &*self.k,
                    x: &[T::one()],
                    sum: &mut *self.z,
                    low: &mut *self.z_low,
                }
                .run(level);
            }
        }
        let (lanes, width) = (T::lanes::<L>(), self.v.len());
        let mut j = 0;
        while j + 4 * lanes <= width {
            self.strip::<L, 4>(level, own, j);
            j += 4 * lanes;
        }
        while j < width {
            self.strip::<L, 1>(level, own, j);
            j += lanes;
        }
        denominator
    }
}

impl<T: Lanes> DecodeStep<'_, T> {
    #[inline(always)]
    fn strip<L: Level, const V: usize>(&mut self, level: L, own: T, j: usize) {
        let (strip, width) = (V * T::lanes::<L>(), self.v.len());
        let v = T::vectors::<L>(&self.v[j..j + strip]);
        let mut total = [T::splat(level, own); V];
        for i in 0..V {
            total[i] = T::vmul(level, total[i], v[i]);
        }
        let rows = self.sum.chunks_exact_mut(width).zip(self.low.chunks_exact_mut(width));
        let rows = rows.zip(self.q.iter().zip(&*self.k));
        if let Some((_, RowDecay { kept, change })) = self.decay {
            for (((sum, low), (&q, &k)), (&kept, &change)) in rows.zip(kept.iter().zip(change)) {
                let sum = T::vectors_mut::<L>(&mut sum[j..j + strip]);
                let low = T::vectors_mut::<L>(&mut low[j..j + strip]);
                let (q, k) = (T::splat(level, q), T::splat(level, k));
                let row = LaneDecay::<T, L>::new(level, kept, change);
                for i in 0..V {
                    total[i] = T::vfma(level, q, sum[i], total[i]);
                    let addend = T::vfma(level, k, v[i], T::vmul(level, row.both, low[i]));
                    row.add(level, &mut sum[i], &mut low[i], addend);
                }
            }
        } else {
            for ((sum, low), (&q, &k)) in rows {
                let sum = T::vectors_mut::<L>(&mut sum[j..j + strip]);
                let low = T::vectors_mut::<L>(&mut low[j..j + strip]);
                let (q, k) = (T::splat(level, q), T::splat(level, k));
                for i in 0..V {
                    total[i] = T::vfma(level, q, sum[i], total[i]);
                    let addend = T::vfma(level, k, v[i], low[i]);
                    compensate_with::<T, L>(level, &mut sum[i], &mut low[i], addend);
                }
            }
        }
        T::vectors_mut::<L>(&mut self.answer[j..j + strip])[..V].copy_from_slice(&total);
    }
}

/// The reading half of [`DecodeStep`], with the same rounding: `answer = own·v + Σ_p q_p·sum_p`.
pub struct ReadSums<'a, T> {
    pub(crate) own: T,
    pub(crate) q: &'a [T],
    pub(crate) v: &'a [T],
    pub(crate) sum: &'a [T],
    pub(crate) answer: &'a mut [T],
}

impl<T: Lanes> Loop for ReadSums<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let (lanes, width) = (T::lanes::<L>(), self.v.len());
        for j in (0..width).step_by(lanes) {
            let mut total = T::vmul(
                level,
                T::splat(level, self.own),
                T::vectors::<L>(&self.v[j..j + lanes])[0],
            );
            for (sum, &q) in self.sum.chunks_exact(width).zip(self.q) {
                total = T::vfma(
                    level,
                    T::splat(level, q),
                    T::vectors::<L>(&sum[j..j + lanes])[0],
                    total,
                );
            }
            T::vectors_mut::<L>(&mut self.answer[j..j + lanes])[0] = total;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::loops::reduce::Dot;
    use crate::kernel::loops::samples::{assert_near, numbers, wide};
    use crate::kernel::simd::machine::Machine;

    /// A decode step in one pass is the same in several.
    fn check<T: Lanes>(machine: Machine, n: usize, width: usize, tolerance: f64) {
        let (q, key, v) = (numbers::<T>(n, 0.7), numbers::<T>(n, 1.3), numbers::<T>(width, 0.9));
        let (z, sum) = (numbers::<T>(n, 0.51), numbers::<T>(n * width, 0.31));
        let half = T::one() / (T::one() + T::one());
        let (decayed_q, kept, change) =
            (numbers::<T>(n, 0.2), numbers::<T>(n, 0.6), numbers::<T>(n, 0.8));
        let decaying = Some((&decayed_q[..], RowDecay { kept: &kept, change: &change }));
        for (least, decay) in
            [(T::neg_infinity(), None), (T::infinity(), None), (T::neg_infinity(), decaying)]
        {
            let (mut k, mut new_z, mut z_low) = (key.clone(), z.clone(), vec![T::zero(); n]);
            let (mut new_sum, mut low, mut answer) =
                (sum.clone(), vec![T::zero(); n * width], vec![T::nan(); width]);
            let denominator = machine.run(DecodeStep {
                factor: half,
                least,
                q: &q,
                decay,
                k: &mut k,
                v: &v,
                z: &mut new_z,
                z_low: &mut z_low,
                sum: &mut new_sum,
                low: &mut low,
                answer: &mut answer,
            });
            let close = |found: T, expected: f64| {
                assert_near(machine, n, found, expected, tolerance);
            };
            let (a, b, c, d, e) = (wide(&q), wide(&key), wide(&z), wide(&sum), wide(&v));
            let own = 0.5 * a.iter().zip(&b).map(|(a, b)| a * b).sum::<f64>();
            let query = if decay.is_some() { &decayed_q } else { &q };
            let left = |p: usize| {
                if decay.is_some() { (kept[p] + change[p]).to_f64().unwrap() } else { 1.0 }
            };
            let f = wide(query);
            close(denominator, own + f.iter().zip(&c).map(|(f, c)| f * c).sum::<f64>());
            if least > T::zero() {
                assert!(
                    k == key && new_z == z && new_sum == sum && answer.iter().all(|x| x.is_nan())
                );
                continue;
            }
            for p in 0..n {
                close(k[p], 0.5 * b[p]);
                close(new_z[p], left(p) * c[p] + 0.5 * b[p]);
                (0..width).for_each(|j| {
                    close(new_sum[p * width + j], left(p) * d[p * width + j] + 0.5 * b[p] * e[j]);
                });
            }
            let mut read = vec![T::nan(); width];
            let own_ = half * machine.run(Dot { x: &q, y: &key });
            machine.run(ReadSums { own: own_, q: query, v: &v, sum: &sum, answer: &mut read });
            assert!(read == answer, "{machine:?} {n} {width}: another rounding");
            for j in 0..width {
                close(answer[j], own * e[j] + (0..n).map(|p| f[p] * d[p * width + j]).sum::<f64>());
            }
            if let Some((_, decay)) = decay {
                // in two steps, with the same rounding
                let (mut sum, mut low_) = (sum.clone(), vec![T::zero(); n * width]);
                machine.run(DecayRows { decay, factors: &k, x: &v, sum: &mut sum, low: &mut low_ });
                assert!(sum == new_sum && low_ == low, "{machine:?} {n} {width}: another rounding");
            }
        }
    }

    #[test]
    fn one_pass_is_the_same_as_several_at_every_size_and_level() {
        for machine in Machine::all() {
            for n in 0..=130 {
                for lines in [1, 4, 5] {
                    check::<f32>(machine, n, lines * <f32 as Lanes>::PAD, 1e-6);
                    check::<f64>(machine, n, lines * <f64 as Lanes>::PAD, 1e-15);
                }
            }
        }
    }
}
