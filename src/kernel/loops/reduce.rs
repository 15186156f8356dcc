//! Vectors made one number: sums, maxima, dot products.

use crate::kernel::loops::vectors::ScaleInto;
use crate::kernel::simd::{Lanes, Level, Loop};

/// Vectors of a reduction that are summed apart, so that additions do not wait for each other.
const ACCUMULATORS: usize = 4;

/// How numbers are made one.
pub trait Reduction<T: Lanes> {
    const START: fn() -> T;
    /// Takes one more vector in.
    fn step<L: Level>(level: L, state: T::V<L>, x: T::V<L>) -> T::V<L>;
    /// Joins two states.
    fn join<L: Level>(level: L, a: T::V<L>, b: T::V<L>) -> T::V<L>;
    /// Joins the lanes.
    fn finish<L: Level>(level: L, state: T::V<L>) -> T;
}

/// A slice made one number.
#[derive(Debug)]
pub struct Reduce<'a, T, R> {
    pub(crate) x: &'a [T],
    pub(crate) how: R,
}

impl<T: Lanes, R: Reduction<T>> Loop for Reduce<'_, T, R> {
    type Output = T;

    #[inline(always)]
    fn run<L: Level>(self, level: L) -> T {
        let _ = self.how;
        let lanes = T::lanes::<L>();
        let mut states = [T::splat(level, R::START()); ACCUMULATORS];
        let mut blocks = self.x.chunks_exact(ACCUMULATORS * lanes);
        for block in &mut blocks {
            for (state, x) in states.iter_mut().zip(T::vectors::<L>(block)) {
                *state = R::step(level, *state, *x);
            }
        }
        let mut vectors = blocks.remainder().chunks_exact(lanes);
        for x in &mut vectors {
            states[0] = R::step(level, states[0], T::vectors::<L>(x)[0]);
        }
        let rest = vectors.remainder();
        if !rest.is_empty() {
            let mut last = [T::splat(level, R::START())];
            T::elements_mut::<L>(&mut last)[..rest.len()].copy_from_slice(rest);
            states[1] = R::step(level, states[1], last[0]);
        }
        let [a, b, c, d] = states;
        R::finish(level, R::join(level, R::join(level, a, b), R::join(level, c, d)))
    }
}

macro_rules! reduction {
    (
        $(#[$doc:meta])* $reduction:ident, $alias:ident, $start:expr,
        |$level:ident, $s:ident, $x:ident| $step:expr, $join:ident, $finish:ident
    ) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $reduction;

        /// The reduction of a slice.
        pub type $alias<'a, T> = Reduce<'a, T, $reduction>;

        impl<T: Lanes> Reduction<T> for $reduction {
            const START: fn() -> T = $start;

            #[inline(always)]
            fn step<L: Level>($level: L, $s: T::V<L>, $x: T::V<L>) -> T::V<L> {
                $step
            }
            #[inline(always)]
            fn join<L: Level>(level: L, a: T::V<L>, b: T::V<L>) -> T::V<L> {
                T::$join(level, a, b)
            }
            #[inline(always)]
            fn finish<L: Level>(level: L, state: T::V<L>) -> T {
                T::$finish(level, state)
            }
        }
    };
}
reduction!(
    /// Σ xᵢ.
    Sum, SumOf, T::zero,
    |level, s, x| T::vadd(level, s, x), vadd, vsum
);
reduction!(
    /// max xᵢ, or −∞ of nothing.
    Max, MaxOf, T::neg_infinity,
    |level, s, x| T::vmax(level, s, x), vmax, vmaximum
);
reduction!(
    /// max |xᵢ|, or 0 of nothing.
    MaxAbs, MaxAbsOf, T::zero,
    |level, s, x| T::vmax(level, s, T::vabs(level, x)), vmax, vmaximum
);
reduction!(
    /// Σ xᵢ·0: 0 if every element is finite, else NaN.
    FiniteMark, FiniteMarkOf, T::zero,
    |level, s, x| T::vfma(level, x, T::splat(level, T::zero()), s), vadd, vsum
);

/// `to = from`; max |fromᵢ|, or something that is not finite if a number is not.
pub struct CopyAndMeasure<'a, T> {
    pub(crate) from: &'a [T],
    pub(crate) to: &'a mut [T],
}

impl<T: Lanes> Loop for CopyAndMeasure<'_, T> {
    type Output = T;

    #[inline(always)]
    fn run<L: Level>(self, level: L) -> T {
        let zero = T::splat(level, T::zero());
        let whole = self.from.len().min(self.to.len()) / T::lanes::<L>() * T::lanes::<L>();
        let (mut mark, mut largest) = (zero, zero);
        for (from, to) in
            T::vectors::<L>(&self.from[..whole]).iter().zip(T::vectors_mut::<L>(self.to))
        {
            *to = *from;
            mark = T::vfma(level, *from, zero, mark);
            largest = T::vmax(level, largest, T::vabs(level, *from));
        }
        let (mut largest, mut mark) = (T::vmaximum(level, largest), T::vsum(level, mark));
        for (from, to) in self.from[whole..].iter().zip(&mut self.to[whole..]) {
            *to = *from;
            mark = mark + *from * T::zero();
            largest = largest.max(from.abs());
        }
        largest + mark
    }
}

/// What a decode step takes in: `scaled = factor·vectors`, `copy = values`. Returns a number that
/// is 0 if everything scaled is finite, and what [`CopyAndMeasure`] does.
pub struct TakeToken<'a, T> {
    pub(crate) factor: T,
    pub(crate) vectors: [&'a [T]; 2],
    pub(crate) scaled: [&'a mut [T]; 2],
    pub(crate) values: &'a [T],
    pub(crate) copy: &'a mut [T],
}

impl<T: Lanes> Loop for TakeToken<'_, T> {
    type Output = [T; 2];

    #[inline(always)]
    fn run<L: Level>(self, level: L) -> [T; 2] {
        let Self { factor, vectors: [q, k], scaled: [to_q, to_k], values, copy } = self;
        let marks = ScaleInto { factor, from: q, to: to_q }.run(level)
            + ScaleInto { factor, from: k, to: to_k }.run(level);
        [marks, CopyAndMeasure { from: values, to: copy }.run(level)]
    }
}

/// Σ xᵢyᵢ.
pub struct Dot<'a, T> {
    pub(crate) x: &'a [T],
    pub(crate) y: &'a [T],
}

impl<T: Lanes> Loop for Dot<'_, T> {
    type Output = T;

    #[inline(always)]
    fn run<L: Level>(self, level: L) -> T {
        dot_at(level, self.x, self.y)
    }
}

/// Σ xᵢyᵢ, inside of a loop.
#[inline(always)]
pub(crate) fn dot_at<T: Lanes, L: Level>(level: L, x: &[T], y: &[T]) -> T {
    let lanes = T::lanes::<L>();
    let n = x.len().min(y.len());
    let (x, y) = (&x[..n], &y[..n]);
    let mut sums = [T::splat(level, T::zero()); ACCUMULATORS];
    let (mut xs, mut ys) =
        (x.chunks_exact(ACCUMULATORS * lanes), y.chunks_exact(ACCUMULATORS * lanes));
    for (x, y) in (&mut xs).zip(&mut ys) {
        for ((sum, x), y) in sums.iter_mut().zip(T::vectors::<L>(x)).zip(T::vectors::<L>(y)) {
            *sum = T::vfma(level, *x, *y, *sum);
        }
    }
    for (x, y) in xs.remainder().chunks(lanes).zip(ys.remainder().chunks(lanes)) {
        sums[0] = T::vfma(level, T::load(level, x), T::load(level, y), sums[0]);
    }
    let [a, b, c, d] = sums;
    T::vsum(level, T::vadd(level, T::vadd(level, a, b), T::vadd(level, c, d)))
}

/// `out_j = factor·Σ_p x_p·rows_jp`.
pub struct RowsDot<'a, T> {
    pub(crate) factor: T,
    pub(crate) x: &'a [T],
    pub(crate) rows: &'a [T],
    pub(crate) out: &'a mut [T],
}

impl<T: Lanes> Loop for RowsDot<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        for (row, out) in self.rows.chunks_exact(self.x.len()).zip(self.out) {
            *out = self.factor * dot_at(level, self.x, row);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::loops::samples::{assert_near, numbers, wide};
    use crate::kernel::simd::machine::Machine;

    fn check<T: Lanes>(machine: Machine, tolerance: f64) {
        for n in 0..=130 {
            let (x, y) = (numbers::<T>(n, 0.7), numbers::<T>(n, 1.3));
            let (a, b) = (wide(&x), wide(&y));
            let close = |found: T, expected: f64| {
                assert_near(machine, n, found, expected, tolerance);
            };
            close(machine.run(Reduce { x: &x, how: Sum }), a.iter().sum());
            close(machine.run(Dot { x: &x, y: &y }), a.iter().zip(&b).map(|(a, b)| a * b).sum());
            let largest = machine.run(Reduce { x: &x, how: Max }).to_f64().unwrap();
            assert_eq!(largest, a.iter().copied().fold(f64::NEG_INFINITY, f64::max));
            let largest = machine.run(Reduce { x: &x, how: MaxAbs }).to_f64().unwrap();
            assert_eq!(largest, a.iter().fold(0.0, |m: f64, a| m.max(a.abs())));
            assert!(machine.run(Reduce { x: &x, how: FiniteMark }) == T::zero());
            let mut copy = vec![T::nan(); n];
            let largest = machine.run(CopyAndMeasure { from: &x, to: &mut copy }).to_f64().unwrap();
            assert!(copy == x && largest == a.iter().fold(0.0, |m: f64, a| m.max(a.abs())));
            if n > 0 {
                let (rows, mut out) = (numbers::<T>(3 * n, 0.4), vec![T::nan(); 3]);
                let factor = T::one() + T::one();
                machine.run(RowsDot { factor, x: &x, rows: &rows, out: &mut out });
                let rows = wide(&rows);
                for j in 0..3 {
                    close(
                        out[j],
                        2.0 * a.iter().zip(&rows[j * n..]).map(|(a, b)| a * b).sum::<f64>(),
                    );
                }
            }
        }
    }

    #[test]
    fn reductions_agree_with_plain_loops_at_every_size_and_level() {
        for machine in Machine::all() {
            check::<f32>(machine, 1e-6);
            check::<f64>(machine, 1e-15);
        }
    }

    #[test]
    fn finite_marks_see_every_position() {
        for machine in Machine::all() {
            for n in 1..70 {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    for at in 0..n {
                        let mut x = vec![1.0_f32; n];
                        x[at] = bad;
                        let mark = machine.run(Reduce { x: &x, how: FiniteMark });
                        assert!(mark.is_nan(), "{bad} at {at} of {n}");
                        let largest =
                            machine.run(CopyAndMeasure { from: &x, to: &mut vec![0.0; n] });
                        assert!(!largest.is_finite(), "{bad} at {at} of {n}");
                    }
                }
            }
        }
        let ends = [f32::MAX, f32::MIN_POSITIVE / 4.0, -0.0];
        assert_eq!(Machine::best().run(Reduce { x: &ends, how: FiniteMark }), 0.0);
    }
}
