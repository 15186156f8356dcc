//! The step of one token on the sums of a state.

use crate::kernel::loops::decay::{DecayRows, LaneDecay, RowDecay};
use crate::kernel::loops::products::RowTimesMatrix;
use crate::kernel::loops::reduce::dot_at;
use crate::kernel::loops::vectors::{AddOuter, ScaleInPlace};
use crate::kernel::simd::{Lanes, Level, Loop};

/// Tokens that wait beside the sums before they are added in one product: so many, that a step
/// seldom stores to the sums, and so few, that reading them costs little.
pub const BLOCK: usize = 16;

/// The first `count` of [`BLOCK`] tokens, one a row: keys, `stride` apart, and values.
#[derive(Debug)]
pub struct Waiting<'a, T> {
    pub(crate) keys: &'a mut [T],
    pub(crate) stride: usize,
    pub(crate) values: &'a mut [T],
    pub(crate) count: usize,
}

impl<T: Lanes> Waiting<'_, T> {
    /// Takes in `factor·k` and `v`, and adds the first to `z`; for `low` see [`AddOuter`].
    #[inline(always)]
    fn take<L: Level>(self, level: L, factor: T, [k, v]: [&[T]; 2], [z, low]: [&mut [T]; 2]) {
        AddOuter { sum: z, low, factors: &[factor], x: k }.run(level);
        let key = &mut self.keys[self.count * self.stride..][..k.len()];
        key.copy_from_slice(k);
        ScaleInPlace { x: key, factor }.run(level);
        self.values[self.count * v.len()..(self.count + 1) * v.len()].copy_from_slice(v);
    }
}

/// A decode step on the sums of a state and on the tokens that wait beside them:
///
/// ```text
/// own = factor·(q·k),    denominator = own + q·z,
/// answer = own·v + Σ_p q_p·sum_p + Σ_j (q·key_j)·value_j,
/// z ← z + factor·k,    the token waits
/// ```
///
/// Rows of the sums are as wide as `v`, whole vectors of it, and only read. Returns the
/// denominator; if it is not finite, or below `least`, nothing is changed. Else `out` is the first
/// numbers of `answer/denominator`, or of `answer·scale²` if there is a scale.
#[derive(Debug)]
pub struct DecodeStep<'a, T> {
    pub(crate) factor: T,
    pub(crate) least: T,
    pub(crate) q: &'a [T],
    pub(crate) k: &'a [T],
    pub(crate) v: &'a [T],
    pub(crate) z: &'a mut [T],
    pub(crate) z_low: &'a mut [T],
    pub(crate) sum: &'a [T],
    pub(crate) waiting: Waiting<'a, T>,
    pub(crate) scale: Option<T>,
    pub(crate) answer: &'a mut [T],
    pub(crate) out: &'a mut [T],
}

impl<T: Lanes> Loop for DecodeStep<'_, T> {
    type Output = T;

    #[inline(always)]
    fn run<L: Level>(self, level: L) -> T {
        let Self { factor, q, k, v, z, waiting, answer, .. } = self;
        let own = factor * dot_at(level, q, k);
        let denominator = own + dot_at(level, q, z);
        if !(denominator >= self.least && denominator.is_finite()) {
            return denominator;
        }
        ReadSums {
            own,
            old: T::one(),
            q,
            v,
            sum: self.sum,
            keys: &*waiting.keys,
            stride: waiting.stride,
            values: &waiting.values[..waiting.count * v.len()],
            answer: &mut *answer,
        }
        .run(level);
        let factor_ = self.scale.unwrap_or_else(|| denominator.recip());
        ScaleInPlace { x: &mut *answer, factor: factor_ }.run(level);
        if let Some(factor) = self.scale {
            ScaleInPlace { x: &mut *answer, factor }.run(level);
        }
        self.out.copy_from_slice(&answer[..self.out.len()]);
        waiting.take(level, factor, [k, v], [z, self.z_low]);
        denominator
    }
}

/// The second half of [`DecodeStep`], with the same rounding.
#[derive(Debug)]
pub struct LetWait<'a, T> {
    pub(crate) factor: T,
    pub(crate) k: &'a [T],
    pub(crate) v: &'a [T],
    pub(crate) z: &'a mut [T],
    pub(crate) z_low: &'a mut [T],
    pub(crate) waiting: Waiting<'a, T>,
}

impl<T: Lanes> Loop for LetWait<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        self.waiting.take(level, self.factor, [self.k, self.v], [self.z, self.z_low]);
    }
}

/// The reading half of [`DecodeStep`], with the same rounding, of sums to be multiplied by `old`:
///
/// ```text
/// answer = own·v + old·(Σ_p q_p·sum_p + Σ_j (q·key_j)·value_j)
/// ```
pub struct ReadSums<'a, T> {
    pub(crate) own: T,
    pub(crate) old: T,
    pub(crate) q: &'a [T],
    pub(crate) v: &'a [T],
    pub(crate) sum: &'a [T],
    /// Rows of as many numbers as `q`, `stride` apart.
    pub(crate) keys: &'a [T],
    pub(crate) stride: usize,
    /// As many rows as wide as `v`.
    pub(crate) values: &'a [T],
    pub(crate) answer: &'a mut [T],
}

impl<T: Lanes> Loop for ReadSums<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let Self { own, old, q, v, sum, keys, stride, values, answer } = self;
        let ldb = v.len();
        RowTimesMatrix { x: q, b: sum, ldb, y: &mut *answer, add: false }.run(level);
        if !values.is_empty() {
            let mut scores = [T::zero(); BLOCK];
            let scores = &mut scores[..values.len() / ldb];
            for (score, key) in scores.iter_mut().zip(keys.chunks(stride)) {
                *score = dot_at(level, q, key);
            }
            let x = &*scores;
            RowTimesMatrix { x, b: values, ldb, y: &mut *answer, add: true }.run(level);
        }
        let (own, old) = (T::splat(level, own), T::splat(level, old));
        for (answer, v) in T::vectors_mut::<L>(answer).iter_mut().zip(T::vectors::<L>(v)) {
            *answer = T::vfma(level, own, *v, T::vmul(level, old, *answer));
        }
    }
}

/// A decode step on sums whose features decay by rates of their own, which loads every number
/// once:
///
/// ```text
/// own = factor·(q·k),    denominator = own + p·z,    answer = own·v + Σ_p p_p·sum_p,
/// k ← factor·k,    z ← α ⊙ z + k,    sum_p ← α_p·sum_p + k_p·v
/// ```
///
/// where `p` is the query for sums that have not decayed yet; see [`DecayRows`], and for `low` and
/// `z_low` [`AddOuter`]. Rows of the sums are as wide as `v`, whole vectors of it. Returns the
/// denominator; if it is not finite, or below `least`, nothing is changed.
#[derive(Debug)]
pub struct DecayStep<'a, T> {
    pub(crate) factor: T,
    pub(crate) least: T,
    pub(crate) q: &'a [T],
    pub(crate) past: &'a [T],
    pub(crate) decay: RowDecay<'a, T>,
    pub(crate) k: &'a mut [T],
    pub(crate) v: &'a [T],
    pub(crate) z: &'a mut [T],
    pub(crate) z_low: &'a mut [T],
    pub(crate) sum: &'a mut [T],
    pub(crate) low: &'a mut [T],
    pub(crate) answer: &'a mut [T],
}

impl<T: Lanes> Loop for DecayStep<'_, T> {
    type Output = T;

    #[inline(always)]
    fn run<L: Level>(mut self, level: L) -> T {
        let own = self.factor * dot_at(level, self.q, self.k);
        let denominator = own + dot_at(level, self.past, self.z);
        if !(denominator >= self.least && denominator.is_finite()) {
            return denominator;
        }
        if self.factor != T::one() {
            ScaleInPlace { x: &mut *self.k, factor: self.factor }.run(level);
        }
        DecayRows {
            decay: self.decay,
            factors: &*self.k,
            x: &[T::one()],
            sum: &mut *self.z,
            low: &mut *self.z_low,
        }
        .run(level);
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

impl<T: Lanes> DecayStep<'_, T> {
    #[inline(always)]
    fn strip<L: Level, const V: usize>(&mut self, level: L, own: T, j: usize) {
        let (strip, width) = (V * T::lanes::<L>(), self.v.len());
        let v = T::vectors::<L>(&self.v[j..j + strip]);
        let mut total = [T::splat(level, own); V];
        for i in 0..V {
            total[i] = T::vmul(level, total[i], v[i]);
        }
        let rows = self.sum.chunks_exact_mut(width).zip(self.low.chunks_exact_mut(width));
        let rows = rows.zip(self.past.iter().zip(&*self.k));
        let RowDecay { kept, change } = self.decay;
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
        T::vectors_mut::<L>(&mut self.answer[j..j + strip])[..V].copy_from_slice(&total);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::loops::reduce::Dot;
    use crate::kernel::loops::samples::{assert_near, numbers, wide};
    use crate::kernel::simd::machine::Machine;

    /// The arguments of a step and what it is to give, but for the tokens that wait.
    struct Case<T> {
        q: Vec<T>,
        key: Vec<T>,
        v: Vec<T>,
        z: Vec<T>,
        sum: Vec<T>,
        past: Vec<T>,
        kept: Vec<T>,
        change: Vec<T>,
    }

    impl<T: Lanes> Case<T> {
        fn new(n: usize, width: usize) -> Self {
            Self {
                q: numbers(n, 0.7),
                key: numbers(n, 1.3),
                v: numbers(width, 0.9),
                z: numbers(n, 0.51),
                sum: numbers(n * width, 0.31),
                past: numbers(n, 0.2),
                kept: numbers(n, 0.6),
                change: numbers(n, 0.8),
            }
        }

        /// `½·q·k`, and what `query` finds in the normaliser and the sums.
        fn read(&self, query: &[T]) -> (f64, f64, Vec<f64>) {
            let dot = |x: &[T], y: &[T]| -> f64 {
                wide(x).iter().zip(&wide(y)).map(|(x, y)| x * y).sum()
            };
            let width = self.v.len();
            let column =
                |j: usize| -> Vec<T> { self.sum.iter().skip(j).step_by(width).copied().collect() };
            let sums = (0..width).map(|j| dot(query, &column(j))).collect();
            (0.5 * dot(&self.q, &self.key), dot(query, &self.z), sums)
        }
    }

    /// A step beside which `count` tokens wait.
    fn check<T: Lanes>(machine: Machine, n: usize, width: usize, count: usize, tolerance: f64) {
        let case = Case::<T>::new(n, width);
        let Case { q, key, v, z, sum, .. } = &case;
        let half = T::one() / (T::one() + T::one());
        let stride = n.next_multiple_of(T::PAD).max(T::PAD);
        let (mut keys, mut values) =
            (numbers::<T>(BLOCK * stride, 0.4), numbers(BLOCK * width, 1.1));
        let (own, of_sums, read) = case.read(q);
        let scores: Vec<f64> = (0..count)
            .map(|j| (0..n).map(|p| wide(q)[p] * wide(&keys)[j * stride + p]).sum())
            .collect();
        let expected: Vec<f64> = (0..width)
            .map(|c| {
                let waiting = (0..count).map(|j| scores[j] * wide(&values)[j * width + c]);
                own * wide(v)[c] + read[c] + waiting.sum::<f64>()
            })
            .collect();
        let close = |found: T, expected: f64| assert_near(machine, n, found, expected, tolerance);
        let before = (keys.clone(), values.clone());
        for least in [T::infinity(), T::neg_infinity()] {
            let (mut new_z, mut z_low) = (z.clone(), vec![T::zero(); n]);
            let mut answer = vec![T::nan(); width];
            let denominator = machine.run(DecodeStep {
                factor: half,
                least,
                q,
                k: key,
                v,
                z: &mut new_z,
                z_low: &mut z_low,
                sum,
                waiting: Waiting { keys: &mut keys, stride, values: &mut values, count },
                scale: Some(half),
                answer: &mut vec![T::nan(); width],
                out: &mut answer,
            });
            close(denominator, own + of_sums);
            if least > T::zero() {
                assert!(new_z == *z && answer.iter().all(|x| x.is_nan()));
                assert!(keys == before.0 && values == before.1);
                continue;
            }
            let quarter = answer.iter().zip(&expected);
            quarter.for_each(|(&found, &expected)| close(found, 0.25 * expected));
            assert!(values[count * width..][..width] == v[..]);
            for p in 0..n {
                close(new_z[p], wide(z)[p] + 0.5 * wide(key)[p]);
                assert!(keys[count * stride + p] == half * key[p]);
            }
            assert!(keys[..count * stride] == before.0[..count * stride], "others stay");

            // in two halves, with the same rounding
            let (mut keys_, mut values_) = before.clone();
            let mut read = vec![T::nan(); width];
            machine.run(ReadSums {
                own: half * machine.run(Dot { x: q, y: key }),
                old: T::one(),
                q,
                v,
                sum,
                keys: &keys_,
                stride,
                values: &values_[..count * width],
                answer: &mut read,
            });
            let (mut z_, mut low_) = (z.clone(), vec![T::zero(); n]);
            machine.run(LetWait {
                factor: half,
                k: key,
                v,
                z: &mut z_,
                z_low: &mut low_,
                waiting: Waiting { keys: &mut keys_, stride, values: &mut values_, count },
            });
            for x in &mut read {
                *x = *x * half * half;
            }
            assert!(read == answer && keys_ == keys && values_ == values);
            assert!(z_ == new_z && low_ == z_low, "{machine:?} {n} {width}: another rounding");
        }
    }

    /// A step on sums that decay, in one pass as in several.
    fn check_decay<T: Lanes>(machine: Machine, n: usize, width: usize, tolerance: f64) {
        let case = Case::<T>::new(n, width);
        let Case { q, key, v, z, sum, past, kept, change } = &case;
        let half = T::one() / (T::one() + T::one());
        let decay = RowDecay { kept, change };
        let (own, of_sums, read) = case.read(past);
        let close = |found: T, expected: f64| assert_near(machine, n, found, expected, tolerance);
        for least in [T::infinity(), T::neg_infinity()] {
            let (mut k, mut new_z, mut z_low) = (key.clone(), z.clone(), vec![T::zero(); n]);
            let (mut new_sum, mut low, mut answer) =
                (sum.clone(), vec![T::zero(); n * width], vec![T::nan(); width]);
            let denominator = machine.run(DecayStep {
                factor: half,
                least,
                q,
                past,
                decay,
                k: &mut k,
                v,
                z: &mut new_z,
                z_low: &mut z_low,
                sum: &mut new_sum,
                low: &mut low,
                answer: &mut answer,
            });
            close(denominator, own + of_sums);
            if least > T::zero() {
                assert!(k == *key && new_z == *z && new_sum == *sum);
                assert!(answer.iter().all(|x| x.is_nan()));
                continue;
            }
            let left = |p: usize| wide(kept)[p] + wide(change)[p];
            for p in 0..n {
                close(k[p], 0.5 * wide(key)[p]);
                close(new_z[p], left(p) * wide(z)[p] + 0.5 * wide(key)[p]);
            }
            for (i, &found) in new_sum.iter().enumerate() {
                let (p, j) = (i / width, i % width);
                close(found, left(p) * wide(sum)[i] + 0.5 * wide(key)[p] * wide(v)[j]);
            }
            (0..width).for_each(|j| close(answer[j], own * wide(v)[j] + read[j]));
            // in two steps, with the same rounding
            let (mut sum, mut low_) = (sum.clone(), vec![T::zero(); n * width]);
            machine.run(DecayRows { decay, factors: &k, x: v, sum: &mut sum, low: &mut low_ });
            assert!(sum == new_sum && low_ == low, "{machine:?} {n} {width}: another rounding");
        }
    }

    #[test]
    fn one_pass_is_the_same_as_several_at_every_size_and_level() {
        for machine in Machine::all() {
            for n in 0..=130 {
                for lines in [1, 4, 5] {
                    for count in [0, n % BLOCK, BLOCK - 1] {
                        let width = lines * <f32 as Lanes>::PAD;
                        check::<f32>(machine, n, width, count, 2e-6);
                        check::<f64>(machine, n, lines * <f64 as Lanes>::PAD, count, 4e-15);
                    }
                    check_decay::<f32>(machine, n, lines * <f32 as Lanes>::PAD, 1e-6);
                    check_decay::<f64>(machine, n, lines * <f64 as Lanes>::PAD, 1e-15);
                }
            }
        }
    }
}
