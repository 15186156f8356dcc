//! The inner loops: matrix products, exponentials, reductions, transforms. Speed lives here and
//! nowhere else.
//!
//! Every loop is written once, on vectors of any width ([`simd`]), and compiled for each SIMD
//! level; the level is chosen at run time. Chunks of tokens are kept with *tokens as columns*
//! ([`columns`]): features, scores and their sums then need no reduction across lanes, and products
//! no transposed operand.
#![allow(
    missing_debug_implementations, // arguments of loops, public in name only
    missing_docs,
    clippy::needless_range_loop, // arrays stay in registers only where loops over them have plain indices
    clippy::manual_memcpy
)]
#![cfg_attr(test, allow(clippy::cast_precision_loss))]

pub(crate) mod buffer;
pub(crate) mod columns;
pub(crate) mod compiled;
pub(crate) mod dct;
pub(crate) mod exp;
pub(crate) mod gemm;
pub(crate) mod lanes_dct;
pub(crate) mod pairs;
pub(crate) mod simd;

pub(crate) use buffer::{Buffer, padded};
pub(crate) use exp::exp2_slice;
pub(crate) use gemm::{
    Into, Matrix, Product, add_row_times_matrix, row_times_matrix, two_rows_times_matrix,
};

use compiled::Compiled;
use simd::{Lanes, Level, Loop};

/// Tokens of linear attention that are mapped and summed at once: four cache lines of numbers, 64
/// for `f32`.
pub(crate) const fn chunk_len<T: Lanes>() -> usize {
    4 * T::PAD
}

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

#[derive(Debug)]
pub struct Reduce<'a, T, R> {
    x: &'a [T],
    how: R,
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
    ($(#[$doc:meta])* $name:ident, $reduction:ident, $of:ident, $alias:ident, $start:expr, |$level:ident, $s:ident, $x:ident| $step:expr, $join:ident, $finish:ident) => {
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

        $(#[$doc])*
        pub(crate) fn $name<T: Compiled>(x: &[T]) -> T {
            T::$of(Reduce { x, how: $reduction })
        }
    };
}
reduction!(
    /// Σ xᵢ.
    sum, Sum, run_sum_of, SumOf, T::zero, |level, s, x| T::vadd(level, s, x), vadd, vsum
);
reduction!(
    /// max xᵢ, or −∞ of nothing.
    max, Max, run_max_of, MaxOf, T::neg_infinity, |level, s, x| T::vmax(level, s, x), vmax, vmaximum
);
reduction!(
    /// max |xᵢ|, or 0 of nothing.
    max_abs, MaxAbs, run_max_abs_of, MaxAbsOf, T::zero, |level, s, x| T::vmax(level, s, T::vabs(level, x)), vmax, vmaximum
);
reduction!(
    /// Σ xᵢ·0: 0 if every element is finite, else NaN.
    finite_mark, FiniteMark, run_finite_mark_of, FiniteMarkOf, T::zero, |level, s, x| T::vfma(level, x, T::splat(level, T::zero()), s), vadd, vsum
);

/// Whether every element is finite.
pub(crate) fn all_finite<T: Compiled>(x: &[T]) -> bool {
    finite_mark(x) == T::zero()
}

/// Copies numbers; the largest of their magnitudes, or something that is not finite if one is not.
pub(crate) fn copy_and_measure<T: Compiled>(from: &[T], to: &mut [T]) -> T {
    T::run_copy_and_measure(CopyAndMeasure { from, to })
}

pub struct CopyAndMeasure<'a, T> {
    from: &'a [T],
    to: &'a mut [T],
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

/// Σ xᵢyᵢ.
pub(crate) fn dot<T: Compiled>(x: &[T], y: &[T]) -> T {
    T::run_dot(Dot { x, y })
}

pub struct Dot<'a, T> {
    x: &'a [T],
    y: &'a [T],
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
fn dot_at<T: Lanes, L: Level>(level: L, x: &[T], y: &[T]) -> T {
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

/// `out_j = factor·Σ_p x_p·rows_jp`: the scores of one query with many keys.
pub(crate) fn rows_dot<T: Compiled>(factor: T, x: &[T], rows: &[T], out: &mut [T]) {
    T::run_rows_dot(RowsDot { factor, x, rows, out });
}

pub struct RowsDot<'a, T> {
    factor: T,
    x: &'a [T],
    rows: &'a [T],
    out: &'a mut [T],
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

/// `x *= factor`.
pub(crate) fn scale<T: Compiled>(x: &mut [T], factor: T) {
    T::run_scale_in_place(ScaleInPlace { x, factor });
}

pub struct ScaleInPlace<'a, T> {
    x: &'a mut [T],
    factor: T,
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

/// `y += factor·x`.
#[inline]
pub(crate) fn add_scaled<T: Compiled>(y: &mut [T], factor: T, x: &[T]) {
    for (b, &a) in y.iter_mut().zip(x) {
        *b = *b + factor * a;
    }
}

/// One compensated addition: `sum += addend`, the rounding error in `low`.
#[inline(always)]
fn compensate<T: Lanes, L: Level>(level: L, sum: &mut T::V<L>, low: &mut T::V<L>, addend: T::V<L>) {
    compensate_with::<T, L>(level, sum, low, T::vadd(level, addend, *low));
}

/// The same, given what `addend` and `low` come to.
#[inline(always)]
fn compensate_with<T: Lanes, L: Level>(
    level: L,
    sum: &mut T::V<L>,
    low: &mut T::V<L>,
    addend: T::V<L>,
) {
    let total = T::vadd(level, *sum, addend);
    *low = T::vsub(level, addend, T::vsub(level, total, *sum));
    *sum = total;
}

/// `sum += factor·x` with the rounding error of every addition carried in `low` (Kahan, 1965), so
/// that the error does not grow with the number of additions.
pub(crate) fn add_compensated<T: Compiled>(sum: &mut [T], low: &mut [T], factor: T, x: &[T]) {
    add_outer(sum, low, &[factor], x);
}

/// `sum_i += factor_i·x` for every row of `sum`, as wide as `x`; see [`add_compensated`].
pub(crate) fn add_outer<T: Compiled>(sum: &mut [T], low: &mut [T], factors: &[T], x: &[T]) {
    T::run_add_outer(AddOuter { sum, low, factors, x });
}

pub struct AddOuter<'a, T> {
    sum: &'a mut [T],
    low: &'a mut [T],
    factors: &'a [T],
    x: &'a [T],
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

/// `sum_i ← kept_i·sum_i + (change_i·sum_i + factor_i·x)` for every row of `sum`, of which there
/// are as many as kept numbers; what is added to `kept_i·sum_i` is compensated, see
/// [`add_compensated`]. No factors add nothing.
#[derive(Debug)]
pub struct FadeRows<'a, T> {
    pub(crate) fade: Fading<'a, T>,
    pub(crate) factors: &'a [T],
    pub(crate) x: &'a [T],
    pub(crate) sum: &'a mut [T],
    pub(crate) low: &'a mut [T],
}

/// What is left of rows: `kept + change` of each.
#[derive(Clone, Copy, Debug)]
pub struct Fading<'a, T> {
    pub(crate) kept: &'a [T],
    pub(crate) change: &'a [T],
}

impl<T: Compiled> FadeRows<'_, T> {
    pub(crate) fn run(self) {
        T::run_fade_rows(self);
    }
}

impl<T: Lanes> Loop for FadeRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let Fading { kept, change } = self.fade;
        let width = self.sum.len() / kept.len().max(1);
        if width == 0 {
            return;
        }
        let whole = width / T::lanes::<L>() * T::lanes::<L>();
        let rows = self.sum.chunks_exact_mut(width).zip(self.low.chunks_exact_mut(width));
        for (i, ((sum, low), (&kept, &change))) in rows.zip(kept.iter().zip(change)).enumerate() {
            let (sum, sum_rest) = sum.split_at_mut(whole);
            let (low, low_rest) = low.split_at_mut(whole);
            let row = FadedRow::<T, L>::new(level, kept, change);
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

/// The numbers of a row that fades.
struct FadedRow<T: Lanes, L: Level> {
    kept: T::V<L>,
    change: T::V<L>,
    both: T::V<L>,
}

impl<T: Lanes, L: Level> FadedRow<T, L> {
    #[inline(always)]
    fn new(level: L, kept: T, change: T) -> Self {
        let [kept, change, both] =
            [T::splat(level, kept), T::splat(level, change), T::splat(level, kept + change)];
        Self { kept, change, both }
    }

    /// Lets a sum fade and adds to it, `addend` being what is added and `both·low`.
    #[inline(always)]
    fn add(&self, level: L, sum: &mut T::V<L>, low: &mut T::V<L>, addend: T::V<L>) {
        let addend = T::vfma(level, self.change, *sum, addend);
        *sum = T::vmul(level, self.kept, *sum);
        compensate_with::<T, L>(level, sum, low, addend);
    }
}

/// `to = factor·from`; Σ to·0, which is 0 if every number is finite.
pub(crate) fn scale_into<T: Compiled>(factor: T, from: &[T], to: &mut [T]) -> T {
    T::run_scale_into(ScaleInto { factor, from, to })
}

pub struct ScaleInto<'a, T> {
    factor: T,
    from: &'a [T],
    to: &'a mut [T],
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

/// One vector of logits to base 2: `x_i ← 2^(x_i − max)`; returns the maximum and ½ Σ v_j².
pub(crate) fn exp2_below_maximum<T: Compiled>(x: &mut [T], v: &[T]) -> (T, T) {
    T::run_exp2_one(Exp2BelowMaximum { x, v })
}

pub struct Exp2BelowMaximum<'a, T> {
    x: &'a mut [T],
    v: &'a [T],
}

impl<T: Lanes> Loop for Exp2BelowMaximum<'_, T> {
    type Output = (T, T);

    #[inline(always)]
    fn run<L: Level>(self, level: L) -> (T, T) {
        let half = T::one() / (T::one() + T::one());
        let norm = half * dot_at(level, self.v, self.v);
        let largest = Reduce { x: &*self.x, how: Max }.run(level);
        exp::Exp2 { x: self.x, shift: largest }.run(level);
        (largest, norm)
    }
}

/// A decode step on the sums of a state:
///
/// ```text
/// own = factor·(q·k),    denominator = own + q·z,    answer = own·v + Σ_p q_p·sum_p,
/// k ← factor·k,    z ← z + k,    sum_p ← sum_p + k_p·v
/// ```
///
/// Rows of the sums are as wide as `v`, whole vectors of it, and every number is loaded once; for
/// `low` and `z_low` see [`add_compensated`]. If rows fade, they do so before `k·v` is added, as in
/// [`FadeRows`]; the sums are read before that, by a query of their own. Returns the denominator;
/// if it is not finite, or below `least`, nothing is changed.
#[derive(Debug)]
pub struct DecodeStep<'a, T> {
    pub(crate) factor: T,
    pub(crate) least: T,
    pub(crate) q: &'a [T],
    pub(crate) fade: Option<(&'a [T], Fading<'a, T>)>,
    pub(crate) k: &'a mut [T],
    pub(crate) v: &'a [T],
    pub(crate) z: &'a mut [T],
    pub(crate) z_low: &'a mut [T],
    pub(crate) sum: &'a mut [T],
    pub(crate) low: &'a mut [T],
    pub(crate) answer: &'a mut [T],
}

impl<T: Compiled> DecodeStep<'_, T> {
    pub(crate) fn run(self) -> T {
        debug_assert!(self.v.len().is_multiple_of(T::PAD) && self.answer.len() == self.v.len());
        T::run_decode_step(self)
    }
}

impl<T: Lanes> Loop for DecodeStep<'_, T> {
    type Output = T;

    #[inline(always)]
    fn run<L: Level>(mut self, level: L) -> T {
        let own = self.factor * dot_at(level, self.q, self.k);
        if let Some((query, _)) = self.fade {
            self.q = query;
        }
        let denominator = own + dot_at(level, self.q, self.z);
        if !(denominator >= self.least && denominator.is_finite()) {
            return denominator;
        }
        if self.factor != T::one() {
            ScaleInPlace { x: &mut *self.k, factor: self.factor }.run(level);
        }
        match self.fade {
            None => AddOuter {
                sum: &mut *self.z,
                low: &mut *self.z_low,
                factors: &[T::one()],
                x: &*self.k,
            }
            .run(level),
            Some((_, fade)) => {
                FadeRows {
                    fade,
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
        if let Some((_, Fading { kept, change })) = self.fade {
            for (((sum, low), (&q, &k)), (&kept, &change)) in rows.zip(kept.iter().zip(change)) {
                let sum = T::vectors_mut::<L>(&mut sum[j..j + strip]);
                let low = T::vectors_mut::<L>(&mut low[j..j + strip]);
                let (q, k) = (T::splat(level, q), T::splat(level, k));
                let row = FadedRow::<T, L>::new(level, kept, change);
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
pub(crate) fn read_sums<T: Compiled>(own: T, [q, v, sum]: [&[T]; 3], answer: &mut [T]) {
    T::run_read_sums(ReadSums { own, q, v, sum, answer });
}

pub struct ReadSums<'a, T> {
    own: T,
    q: &'a [T],
    v: &'a [T],
    sum: &'a [T],
    answer: &'a mut [T],
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
    use super::simd::Machine;
    use super::*;

    fn numbers<T: Lanes>(n: usize, step: f64) -> Vec<T> {
        (0..n).map(|i| T::from((i as f64 * step + 0.2).sin()).unwrap()).collect()
    }

    fn wide<T: Lanes>(x: &[T]) -> Vec<f64> {
        x.iter().map(|x| x.to_f64().unwrap()).collect()
    }

    fn check_reductions<T: Lanes>(machine: Machine, tolerance: f64) {
        for n in 0..=130 {
            let (x, y) = (numbers::<T>(n, 0.7), numbers::<T>(n, 1.3));
            let (a, b) = (wide(&x), wide(&y));
            let close = |found: T, expected: f64| {
                let found = found.to_f64().unwrap();
                assert!(
                    (found - expected).abs() <= tolerance * (1.0 + n as f64),
                    "{machine:?} {n}: {found} {expected}"
                );
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
            let (mut sum, mut low) = (y.clone(), vec![T::zero(); n]);
            let factors = [T::one() + T::one()];
            machine.run(AddOuter { sum: &mut sum, low: &mut low, factors: &factors, x: &x });
            for i in 0..n {
                close(sum[i], b[i] + 2.0 * a[i]);
            }
            if n > 0 {
                let (kept, change) = (numbers::<T>(3, 1.0), numbers::<T>(3, 2.0));
                let old = numbers::<T>(3 * n, 4.0);
                let fade = Fading { kept: &kept, change: &change };
                for (factors, addend) in [(&[][..], &[][..]), (&kept[..], &x[..])] {
                    let (mut sum, mut low) = (old.clone(), vec![T::zero(); 3 * n]);
                    machine.run(FadeRows {
                        fade,
                        factors,
                        x: addend,
                        sum: &mut sum,
                        low: &mut low,
                    });
                    let (old, kept, change) = (wide(&old), wide(&kept), wide(&change));
                    for i in 0..3 * n {
                        let added = if addend.is_empty() { 0.0 } else { kept[i / n] * a[i % n] };
                        close(sum[i], (kept[i / n] + change[i / n]) * old[i] + added);
                    }
                }
            }
            let mut scaled = vec![T::nan(); n];
            assert!(
                machine.run(ScaleInto { factor: factors[0], from: &x, to: &mut scaled })
                    == T::zero()
            );
            assert!(scaled.iter().zip(&x).all(|(s, &x)| *s == factors[0] * x));
            let mut powers = x.clone();
            let (largest, norm) = machine.run(Exp2BelowMaximum { x: &mut powers, v: &y });
            let expected = a.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            assert_eq!(largest.to_f64().unwrap(), expected);
            close(norm, 0.5 * b.iter().map(|b| b * b).sum::<f64>());
            powers.iter().zip(&a).for_each(|(&power, a)| close(power, (a - expected).exp2()));
            for width in [T::PAD, 4 * T::PAD, 5 * T::PAD] {
                check_decode::<T>(machine, n, width, tolerance);
            }
            let mut twice = x.clone();
            machine.run(ScaleInPlace { x: &mut twice, factor: factors[0] });
            assert!(twice == scaled);
            if n > 0 {
                let (rows, mut out) = (numbers::<T>(3 * n, 0.4), vec![T::nan(); 3]);
                machine.run(RowsDot { factor: factors[0], x: &x, rows: &rows, out: &mut out });
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

    /// A decode step in one pass is the same in several.
    fn check_decode<T: Lanes>(machine: Machine, n: usize, width: usize, tolerance: f64) {
        let (q, key, v) = (numbers::<T>(n, 0.7), numbers::<T>(n, 1.3), numbers::<T>(width, 0.9));
        let (z, sum) = (numbers::<T>(n, 0.51), numbers::<T>(n * width, 0.31));
        let half = T::one() / (T::one() + T::one());
        let (faded_q, kept, change) =
            (numbers::<T>(n, 0.2), numbers::<T>(n, 0.6), numbers::<T>(n, 0.8));
        let fading = Some((&faded_q[..], Fading { kept: &kept, change: &change }));
        for (least, fade) in
            [(T::neg_infinity(), None), (T::infinity(), None), (T::neg_infinity(), fading)]
        {
            let (mut k, mut new_z, mut z_low) = (key.clone(), z.clone(), vec![T::zero(); n]);
            let (mut new_sum, mut low, mut answer) =
                (sum.clone(), vec![T::zero(); n * width], vec![T::nan(); width]);
            let denominator = machine.run(DecodeStep {
                factor: half,
                least,
                q: &q,
                fade,
                k: &mut k,
                v: &v,
                z: &mut new_z,
                z_low: &mut z_low,
                sum: &mut new_sum,
                low: &mut low,
                answer: &mut answer,
            });
            let close = |found: T, expected: f64| {
                let found = found.to_f64().unwrap();
                assert!(
                    (found - expected).abs() <= tolerance * (1.0 + n as f64),
                    "{machine:?} {n}: {found} {expected}"
                );
            };
            let (a, b, c, d, e) = (wide(&q), wide(&key), wide(&z), wide(&sum), wide(&v));
            let own = 0.5 * a.iter().zip(&b).map(|(a, b)| a * b).sum::<f64>();
            let query = if fade.is_some() { &faded_q } else { &q };
            let left = |p: usize| {
                if fade.is_some() { (kept[p] + change[p]).to_f64().unwrap() } else { 1.0 }
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
                    close(new_sum[p * width + j], left(p) * d[p * width + j] + 0.5 * b[p] * e[j])
                });
            }
            let mut read = vec![T::nan(); width];
            let own_ = half * machine.run(Dot { x: &q, y: &key });
            machine.run(ReadSums { own: own_, q: query, v: &v, sum: &sum, answer: &mut read });
            assert!(read == answer, "{machine:?} {n} {width}: another rounding");
            for j in 0..width {
                close(answer[j], own * e[j] + (0..n).map(|p| f[p] * d[p * width + j]).sum::<f64>());
            }
            if let Some((_, fade)) = fade {
                // in two steps, with the same rounding
                let (mut sum, mut low_) = (sum.clone(), vec![T::zero(); n * width]);
                machine.run(FadeRows { fade, factors: &k, x: &v, sum: &mut sum, low: &mut low_ });
                assert!(sum == new_sum && low_ == low, "{machine:?} {n} {width}: another rounding");
            }
        }
    }

    #[test]
    fn reductions_agree_with_plain_loops_at_every_size_and_level() {
        for machine in Machine::all() {
            check_reductions::<f32>(machine, 1e-6);
            check_reductions::<f64>(machine, 1e-15);
        }
    }

    #[test]
    fn compensated_sums_do_not_stall() {
        for machine in Machine::all() {
            let (mut sum, mut low) = (vec![16_777_216.0_f32; 19], vec![0.0; 19]); // 2^24: adding 1 changes nothing in f32
            for _ in 0..1000 {
                let (sum, low) = (&mut sum[..], &mut low[..]);
                machine.run(AddOuter { sum, low, factors: &[0.5], x: &[2.0; 19] });
            }
            assert_eq!(sum, [16_778_216.0; 19]);
        }
    }

    #[test]
    fn all_finite_sees_every_position() {
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
        assert!(all_finite(&[f32::MAX, f32::MIN_POSITIVE / 4.0, -0.0]));
    }
}
