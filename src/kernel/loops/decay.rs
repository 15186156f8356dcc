//! Rows of sums that decay.

use crate::kernel::loops::vectors::compensate_with;
use crate::kernel::simd::{Lanes, Level, Loop};

/// `sum_i ← kept_i·sum_i + (change_i·sum_i + factor_i·x)` for every row of `sum`, of which there
/// are as many as kept numbers; what is added to `kept_i·sum_i` is compensated, as in
/// [`compensate_with`]. No factors add nothing.
#[derive(Debug)]
pub struct DecayRows<'a, T> {
    pub(crate) decay: RowDecay<'a, T>,
    pub(crate) factors: &'a [T],
    pub(crate) x: &'a [T],
    pub(crate) sum: &'a mut [T],
    pub(crate) low: &'a mut [T],
}

/// What is left of rows: `kept + change` of each.
#[derive(Clone, Copy, Debug)]
pub struct RowDecay<'a, T> {
    pub(crate) kept: &'a [T],
    pub(crate) change: &'a [T],
}

impl<T: Lanes> Loop for DecayRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let RowDecay { kept, change } = self.decay;
        let width = self.sum.len() / kept.len().max(1);
        if width == 0 {
            return;
        }
        let whole = width / T::lanes::<L>() * T::lanes::<L>();
        let rows = self.sum.chunks_exact_mut(width).zip(self.low.chunks_exact_mut(width));
        for (i, ((sum, low), (&kept, &change))) in rows.zip(kept.iter().zip(change)).enumerate() {
            let (sum, sum_rest) = sum.split_at_mut(whole);
            let (low, low_rest) = low.split_at_mut(whole);
            let row = LaneDecay::<T, L>::new(level, kept, change);
            let (sum, low) = (T::vectors_mut::<L>(sum), T::vectors_mut::<L>(low));
            let factor = if self.factors.is_empty() { T::zero() } else { self.factors[i] };
            if self.factors.is_empty() {
                for (sum, low) in sum.iter_mut().zip(low) {
                    row.add(level, sum, low, T::vmul(level, row.both, *low));
                }
            } else {
                let splat = T::splat(level, factor);
                for ((sum, low), x) in sum.iter_mut().zip(low).zip(T::vectors::<L>(self.x)) {
                    row.add(
                        level,
                        sum,
                        low,
                        T::vfma(level, splat, *x, T::vmul(level, row.both, *low)),
                    );
                }
            }
            for (j, (sum, low)) in sum_rest.iter_mut().zip(low_rest).enumerate() {
                let x = self.x.get(whole + j).copied().unwrap_or(T::zero());
                let addend = change * *sum + (factor * x + (kept + change) * *low);
                let before = kept * *sum;
                *sum = before + addend;
                *low = addend - (*sum - before);
            }
        }
    }
}

/// The decay of a row, in every lane of a vector.
pub(crate) struct LaneDecay<T: Lanes, L: Level> {
    kept: T::V<L>,
    change: T::V<L>,
    pub(crate) both: T::V<L>,
}

impl<T: Lanes, L: Level> LaneDecay<T, L> {
    #[inline(always)]
    pub(crate) fn new(level: L, kept: T, change: T) -> Self {
        let [kept, change, both] =
            [T::splat(level, kept), T::splat(level, change), T::splat(level, kept + change)];
        Self { kept, change, both }
    }

    /// Lets a sum decay and adds to it, `addend` being what is added and `both·low`.
    #[inline(always)]
    pub(crate) fn add(&self, level: L, sum: &mut T::V<L>, low: &mut T::V<L>, addend: T::V<L>) {
        let addend = T::vfma(level, self.change, *sum, addend);
        *sum = T::vmul(level, self.kept, *sum);
        compensate_with::<T, L>(level, sum, low, addend);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::loops::samples::{assert_near, numbers, wide};
    use crate::kernel::simd::machine::Machine;

    fn check<T: Lanes>(machine: Machine, tolerance: f64) {
        for n in 1..=130 {
            let x = numbers::<T>(n, 0.7);
            let (kept, change) = (numbers::<T>(3, 1.0), numbers::<T>(3, 2.0));
            let old = numbers::<T>(3 * n, 4.0);
            let decay = RowDecay { kept: &kept, change: &change };
            for (factors, x) in [(&[][..], &[][..]), (&kept[..], &x[..])] {
                let (mut sum, mut low) = (old.clone(), vec![T::zero(); 3 * n]);
                machine.run(DecayRows { decay, factors, x, sum: &mut sum, low: &mut low });
                let (x, old, kept, change) = (wide(x), wide(&old), wide(&kept), wide(&change));
                for i in 0..3 * n {
                    let added = if x.is_empty() { 0.0 } else { kept[i / n] * x[i % n] };
                    let expected = (kept[i / n] + change[i / n]) * old[i] + added;
                    assert_near(machine, n, sum[i], expected, tolerance);
                }
            }
        }
    }

    #[test]
    fn decayed_rows_agree_with_plain_loops_at_every_size_and_level() {
        for machine in Machine::all() {
            check::<f32>(machine, 1e-6);
            check::<f64>(machine, 1e-15);
        }
    }
}
