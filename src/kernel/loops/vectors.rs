//! Vectors scaled, and sums whose rounding errors are carried along.

use crate::kernel::simd::{Lanes, Level, Loop};

/// `x *= factor`.
pub struct ScaleInPlace<'a, T> {
    pub(crate) x: &'a mut [T],
    pub(crate) factor: T,
}

impl<T: Lanes> Loop for ScaleInPlace<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let factor = T::splat(level, self.factor);
        let (whole, rest) = self.x.split_at_mut(self.x.len() / T::lanes::<L>() * T::lanes::<L>());
        for x in T::vectors_mut::<L>(whole) {
            *x = T::vmul(level, *x, factor);
        }
        for x in rest {
            *x = *x * self.factor;
        }
    }
}

/// `to = factor·from`; Σ to·0, which is 0 if every number is finite.
pub struct ScaleInto<'a, T> {
    pub(crate) factor: T,
    pub(crate) from: &'a [T],
    pub(crate) to: &'a mut [T],
}

impl<T: Lanes> Loop for ScaleInto<'_, T> {
    type Output = T;

    #[inline(always)]
    fn run<L: Level>(self, level: L) -> T {
        let (factor, zero) = (T::splat(level, self.factor), T::splat(level, T::zero()));
        let whole = self.from.len().min(self.to.len()) / T::lanes::<L>() * T::lanes::<L>();
        let mut mark = zero;
        for (from, to) in
            T::vectors::<L>(&self.from[..whole]).iter().zip(T::vectors_mut::<L>(self.to))
        {
            *to = T::vmul(level, factor, *from);
            mark = T::vfma(level, *to, zero, mark);
        }
        let mut mark = T::vsum(level, mark);
        for (from, to) in self.from[whole..].iter().zip(&mut self.to[whole..]) {
            *to = self.factor * *from;
            mark = mark + *to * T::zero();
        }
        mark
    }
}

/// `sum_i += factor_i·x` for every row of `sum`, as wide as `x`, with the rounding error of every
/// addition carried in `low` (Kahan, 1965), so that the error does not grow with their number.
pub struct AddOuter<'a, T> {
    pub(crate) sum: &'a mut [T],
    pub(crate) low: &'a mut [T],
    pub(crate) factors: &'a [T],
    pub(crate) x: &'a [T],
}

impl<T: Lanes> Loop for AddOuter<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let width = self.x.len();
        if width == 0 {
            return;
        }
        let whole = width / T::lanes::<L>() * T::lanes::<L>();
        let x = T::vectors::<L>(self.x);
        let rows = self.sum.chunks_exact_mut(width).zip(self.low.chunks_exact_mut(width));
        for ((sum, low), &factor) in rows.zip(self.factors) {
            let (sum, sum_rest) = sum.split_at_mut(whole);
            let (low, low_rest) = low.split_at_mut(whole);
            let splat = T::splat(level, factor);
            for ((sum, low), x) in
                T::vectors_mut::<L>(sum).iter_mut().zip(T::vectors_mut::<L>(low)).zip(x)
            {
                let addend = T::vfma(level, splat, *x, *low);
                compensate_with::<T, L>(level, sum, low, addend);
            }
            for ((sum, low), &x) in sum_rest.iter_mut().zip(low_rest).zip(&self.x[whole..]) {
                let addend = factor * x + *low;
                let total = *sum + addend;
                *low = addend - (total - *sum);
                *sum = total;
            }
        }
    }
}

/// One compensated addition: `sum += addend`, the rounding error in `low`.
#[inline(always)]
pub(crate) fn compensate<T: Lanes, L: Level>(
    level: L,
    sum: &mut T::V<L>,
    low: &mut T::V<L>,
    addend: T::V<L>,
) {
    compensate_with::<T, L>(level, sum, low, T::vadd(level, addend, *low));
}

/// The same, given what `addend` and `low` come to.
#[inline(always)]
pub(crate) fn compensate_with<T: Lanes, L: Level>(
    level: L,
    sum: &mut T::V<L>,
    low: &mut T::V<L>,
    addend: T::V<L>,
) {
    let total = T::vadd(level, *sum, addend);
    *low = T::vsub(level, addend, T::vsub(level, total, *sum));
    *sum = total;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::loops::samples::{assert_near, numbers, wide};
    use crate::kernel::simd::machine::Machine;

    fn check<T: Lanes>(machine: Machine, tolerance: f64) {
        let two = T::one() + T::one();
        for n in 0..=130 {
            let (x, y) = (numbers::<T>(n, 0.7), numbers::<T>(n, 1.3));
            let (a, b) = (wide(&x), wide(&y));
            let (mut sum, mut low) = (y.clone(), vec![T::zero(); n]);
            machine.run(AddOuter { sum: &mut sum, low: &mut low, factors: &[two], x: &x });
            for i in 0..n {
                assert_near(machine, n, sum[i], b[i] + 2.0 * a[i], tolerance);
            }
            let mut scaled = vec![T::nan(); n];
            assert!(machine.run(ScaleInto { factor: two, from: &x, to: &mut scaled }) == T::zero());
            assert!(scaled.iter().zip(&x).all(|(s, &x)| *s == two * x));
            let mut twice = x.clone();
            machine.run(ScaleInPlace { x: &mut twice, factor: two });
            assert!(twice == scaled);
        }
    }

    #[test]
    fn sums_and_scaled_vectors_agree_with_plain_loops_at_every_size_and_level() {
        for machine in Machine::all() {
            check::<f32>(machine, 1e-6);
            check::<f64>(machine, 1e-15);
        }
    }

    #[test]
    fn compensated_sums_do_not_stall() {
        for machine in Machine::all() {
            // adding 1 to 2^24 changes nothing in f32
            let (mut sum, mut low) = (vec![16_777_216.0_f32; 19], vec![0.0; 19]);
            for _ in 0..1000 {
                let (sum, low) = (&mut sum[..], &mut low[..]);
                machine.run(AddOuter { sum, low, factors: &[0.5], x: &[2.0; 19] });
            }
            assert_eq!(sum, [16_778_216.0; 19]);
        }
    }
}
