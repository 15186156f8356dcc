//! The inner loops as the other floors call them: matrix products, exponentials, reductions,
//! transforms. Speed lives here and nowhere else.
//!
//! Every loop is written once, on vectors of any width ([`simd`], [`loops`]), and compiled for each
//! SIMD level ([`compiled`]); the level is chosen at run time. Chunks of tokens are kept with
//! *tokens as columns*: `x [rows, width]`, row-major, `width` a multiple of [`Lanes::PAD`].
//! Features, scores and their sums then need no reduction across lanes, and products no transposed
//! operand.

pub(crate) mod buffer;
pub(crate) mod compiled;
pub(crate) mod gradients;
pub(crate) mod loops;
pub(crate) mod packed;
pub(crate) mod row_dct;
pub(crate) mod simd;

use crate::kernel::buffer::Buffer;
use crate::kernel::compiled::Compiled;
use crate::kernel::loops::columns::{
    DecayQueriesAndKeys, Exp2ColumnsBelowMaximum, MaskAndAddRows, MultiplyAndSumColumns,
    OnlineSoftmax, ScaleAndSumRows, ScaleRows, ScaleRowsInPlace, Transpose,
};
use crate::kernel::loops::dct::{DctColumns, LanesDct};
use crate::kernel::loops::decay::DecayRows;
use crate::kernel::loops::decode::{BLOCK, DecayStep, DecodeStep, LetWait, ReadSums};
use crate::kernel::loops::exp::{Exp2, Exp2BelowMaximum, ExponentialPair};
use crate::kernel::loops::pairs::{
    ColumnDistances, LargestAffinities, LargestWithin, Reach, Receive, RowDistances,
    ShareAffinities,
};
use crate::kernel::loops::products::{Product, RowTimesMatrix};
use crate::kernel::loops::reduce::{
    CopyAndMeasure, Dot, FiniteMark, Max, MaxAbs, Reduce, RowsDot, Sum, TakeToken,
};
use crate::kernel::loops::scores::{AddBounded, AddDistances, SoftCap};
use crate::kernel::loops::vectors::{AddOuter, ScaleInPlace, ScaleInto};
use crate::kernel::simd::Lanes;

/// Tokens of linear attention that are mapped and summed at once: four cache lines of numbers, 64
/// for `f32`.
pub(crate) const fn chunk_len<T: Lanes>() -> usize {
    4 * T::PAD
}

/// Σ xᵢ.
pub(crate) fn sum<T: Compiled>(x: &[T]) -> T {
    T::run_sum_of(Reduce { x, how: Sum })
}

/// max xᵢ, or −∞ of nothing.
pub(crate) fn max<T: Compiled>(x: &[T]) -> T {
    T::run_max_of(Reduce { x, how: Max })
}

/// max |xᵢ|, or 0 of nothing.
pub(crate) fn max_abs<T: Compiled>(x: &[T]) -> T {
    T::run_max_abs_of(Reduce { x, how: MaxAbs })
}

/// Whether every element is finite.
pub(crate) fn all_finite<T: Compiled>(x: &[T]) -> bool {
    T::run_finite_mark_of(Reduce { x, how: FiniteMark }) == T::zero()
}

/// Copies numbers; the largest of their magnitudes, or something that is not finite if one is not.
pub(crate) fn copy_and_measure<T: Compiled>(from: &[T], to: &mut [T]) -> T {
    T::run_copy_and_measure(CopyAndMeasure { from, to })
}

/// Σ xᵢyᵢ.
pub(crate) fn dot<T: Compiled>(x: &[T], y: &[T]) -> T {
    T::run_dot(Dot { x, y })
}

/// `out_j = factor·Σ_p x_p·rows_jp`: the scores of one query with many keys.
pub(crate) fn rows_dot<T: Compiled>(factor: T, x: &[T], rows: &[T], out: &mut [T]) {
    T::run_rows_dot(RowsDot { factor, x, rows, out });
}

/// `x *= factor`.
pub(crate) fn scale<T: Compiled>(x: &mut [T], factor: T) {
    T::run_scale_in_place(ScaleInPlace { x, factor });
}

/// `to = factor·from`; Σ to·0, which is 0 if every number is finite.
pub(crate) fn scale_into<T: Compiled>(factor: T, from: &[T], to: &mut [T]) -> T {
    T::run_scale_into(ScaleInto { factor, from, to })
}

/// `y += factor·x`.
#[inline]
pub(crate) fn add_scaled<T: Compiled>(y: &mut [T], factor: T, x: &[T]) {
    for (b, &a) in y.iter_mut().zip(x) {
        *b = *b + factor * a;
    }
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

impl<T: Compiled> DecayRows<'_, T> {
    /// Lets the rows decay and adds to them.
    pub(crate) fn run(self) {
        T::run_decay_rows(self);
    }
}

impl<T: Compiled> DecodeStep<'_, T> {
    /// Takes the step; the denominator.
    pub(crate) fn run(self) -> T {
        debug_assert!(self.v.len().is_multiple_of(T::PAD) && self.answer.len() == self.v.len());
        debug_assert!(self.waiting.keys.len() == BLOCK * self.waiting.stride);
        T::run_decode_step(self)
    }
}

impl<T: Compiled> DecayStep<'_, T> {
    /// Takes the step; the denominator.
    pub(crate) fn run(self) -> T {
        debug_assert!(self.v.len().is_multiple_of(T::PAD) && self.answer.len() == self.v.len());
        T::run_decay_step(self)
    }
}

impl<T: Compiled> LetWait<'_, T> {
    /// Lets the token wait.
    pub(crate) fn run(self) {
        T::run_let_wait(self);
    }
}

impl<T: Compiled> ReadSums<'_, T> {
    /// Reads.
    pub(crate) fn run(self) {
        T::run_read_sums(self);
    }
}

/// Replaces every element `x` by `2^(x − shift)`; none may be above `shift`.
pub(crate) fn exp2_slice<T: Compiled>(x: &mut [T], shift: T) {
    T::run_exp2(Exp2 { x, shift });
}

/// One vector of logits to base 2: `x_i ← 2^(x_i − max)`; returns the maximum and ½ Σ v_j².
pub(crate) fn exp2_below_maximum<T: Compiled>(x: &mut [T], v: &[T]) -> (T, T) {
    T::run_exp2_below_maximum(Exp2BelowMaximum { x, v })
}

/// `x ← limit·tanh(x/limit)` of scores to base 2, with `limit = log₂e·cap` and `factor = −2/cap`.
/// NaN and infinity become NaN.
pub(crate) fn soft_cap<T: Compiled>(x: &mut [T], limit: T, factor: T) {
    T::run_soft_cap(SoftCap { x, limit, factor });
}

/// `x_t += slope·(first + step·positions_t)`; whole numbers in the brackets are exact.
pub(crate) fn add_distances<T: Compiled>(
    x: &mut [T],
    positions: &[T],
    [first, step]: [T; 2],
    slope: T,
) {
    T::run_add_distances(AddDistances { x, positions, first, step, slope });
}

impl<T: Compiled> Product<'_, T> {
    /// Computes the product.
    pub(crate) fn run(self) {
        T::run_product(self);
    }
}

/// `y [n] = Σ_p x_p·B[p, ..n]` for any `n`, rows of B `ldb` apart: one row, several steps of the
/// depth at once.
pub(crate) fn row_times_matrix<T: Compiled>(x: &[T], b: &[T], ldb: usize, y: &mut [T]) {
    T::run_row_times_matrix(RowTimesMatrix { x, b, ldb, y, add: false });
}

/// As [`row_times_matrix`], added to `y`.
pub(crate) fn add_row_times_matrix<T: Compiled>(x: &[T], b: &[T], ldb: usize, y: &mut [T]) {
    T::run_row_times_matrix(RowTimesMatrix { x, b, ldb, y, add: true });
}

impl<T: Compiled> ExponentialPair<'_, T> {
    /// Maps them.
    pub(crate) fn run(self) -> [(T, T); 2] {
        debug_assert!(self.ldb.is_multiple_of(T::PAD) && self.y[0].len() == self.ldb);
        debug_assert!(self.x[0].len() == self.x[1].len() && self.y[1].len() == self.ldb);
        T::run_exponential_pair(self)
    }
}

impl<T: Compiled> TakeToken<'_, T> {
    /// Takes it in.
    pub(crate) fn run(self) -> [T; 2] {
        T::run_take_token(self)
    }
}

/// Copies rows to columns: `out [d, width]`, `out_pt = factor·x_tp`, with zeros in the columns
/// beyond the rows, and sums their squares, `squares_t = Σ_p out_pt²`. `row(t)` is row `t`.
pub(crate) fn transpose<'a, T: Compiled>(
    rows: usize,
    row: &'a dyn Fn(usize) -> &'a [T],
    factor: T,
    squares: &'a mut [T],
    out: &'a mut [T],
) {
    T::run_transpose(Transpose { rows, row, factor, squares, out });
}

/// `out_t = max_i x_it`, then `x_it ← 2^(x_it − out_t)`.
pub(crate) fn exp2_columns_below_maximum<T: Compiled>(x: &mut [T], out: &mut [T]) {
    T::run_exp2_columns_below_maximum(Exp2ColumnsBelowMaximum { x, out });
}

/// One tile of an online softmax (Milakov and Gimelshein, 2018): `scores [keys, width]` are
/// logarithms to base 2 and become weights relative to `2^log_scale_t`; the running maximum
/// `log_scale` and the sum of the weights `denominator` go on. `correction_t` is what sums at the
/// old log scale must be multiplied by; returns whether one of them is not 1.
pub(crate) fn online_softmax<T: Compiled>(
    scores: &mut [T],
    log_scale: &mut [T],
    denominator: &mut [T],
    correction: &mut [T],
) -> bool {
    T::run_online_softmax(OnlineSoftmax {
        scores,
        log_scale,
        denominator,
        correction,
        changed: false,
    })
}

/// `x_it ← x_it·factor_t`, and `sums_i = Σ_t` of the result.
pub(crate) fn scale_and_sum_rows<T: Compiled>(x: &mut [T], factors: &[T], sums: &mut [T]) {
    T::run_scale_and_sum_rows(ScaleAndSumRows { x, factors, sums });
}

/// `x_it ← x_it·y_it`, and `sums_t = Σ_i` of the result, of columns as many as `sums`.
pub(crate) fn multiply_and_sum_columns<T: Compiled>(x: &mut [T], y: &[T], sums: &mut [T]) {
    debug_assert!(x.len() == y.len() && sums.len().is_multiple_of(T::PAD));
    T::run_multiply_and_sum_columns(MultiplyAndSumColumns { x, y, sums });
}

/// The causal part of up to [`Lanes::PAD`] rows of scores `[rows, width]`: row `i` belongs to token
/// `first + i` and keeps its columns from that one on; the others become 0. `first` is a multiple
/// of that number; columns before it are not looked at. Adds each row to `sums`.
pub(crate) fn mask_and_add_rows<T: Compiled>(scores: &mut [T], first: usize, sums: &mut [T]) {
    debug_assert!(first.is_multiple_of(T::PAD) && scores.len() <= T::PAD * sums.len());
    T::run_mask_and_add_rows(MaskAndAddRows { scores, first, sums });
}

/// `out_t = factor_t·x_t` for rows of `length` numbers, `stride` apart in `x`; returns whether
/// every number is finite.
pub(crate) fn scale_rows<T: Compiled>(
    x: &[T],
    stride: usize,
    factors: &[T],
    length: usize,
    out: &mut [T],
) -> bool {
    T::run_scale_rows(ScaleRows { x, stride, factors, length, out }) == T::zero()
}

/// `x_t ← factor_t·x_t` for rows of `stride` numbers.
pub(crate) fn scale_rows_in_place<T: Compiled>(x: &mut [T], stride: usize, factors: &[T]) {
    T::run_scale_rows_in_place(ScaleRowsInPlace { x, stride, factors });
}

/// `f = 2^x`, `queries ← f·queries`, `keys ← keys/f`, and `x ← f`, element by element, for x from
/// −100 to 0.
pub(crate) fn decay_queries_and_keys<T: Compiled>(x: &mut [T], queries: &mut [T], keys: &mut [T]) {
    T::run_decay_queries_and_keys(DecayQueriesAndKeys { x, queries, keys });
}

/// `out_pj = Σ_c f_c·(y_cj − point_pc)²` for one or two points, with `y [factors.len(), ld]` by
/// rows, `points [1 or 2, factors.len()]`, and `out` of as many rows, each a multiple of
/// [`Lanes::PAD`].
pub(crate) fn column_distances<T: Compiled>(
    y: &[T],
    ld: usize,
    factors: &[T],
    points: &[T],
    out: &mut [T],
) {
    debug_assert!([1, 2].contains(&(points.len() / factors.len())));
    T::run_column_distances(ColumnDistances { y, ld, factors, points, out });
}

impl<T: Compiled> RowDistances<'_, T> {
    /// Measures.
    pub(crate) fn run(self) {
        debug_assert!([1, 2].contains(&(self.points.len() / self.stride)));
        debug_assert!(self.stride.is_multiple_of(T::PAD) && self.columns <= self.stride);
        debug_assert!(self.out.len().is_multiple_of(T::PAD * self.points.len() / self.stride));
        T::run_row_distances(self);
    }
}

/// Raises `bound_j` to `(own + r_j)·e_j` where `e_j ≤ limit_j`. Lengths are multiples of
/// [`Lanes::PAD`].
pub(crate) fn share_affinities<T: Compiled>(
    own: T,
    r: &[T],
    e: &[T],
    limit: &[T],
    bound: &mut [T],
) {
    debug_assert!(r.len().is_multiple_of(T::PAD));
    T::run_share_affinities(ShareAffinities { own, r, e, limit, bound });
}

/// The largest `(own + r_j)·e_j` with `e_j ≤ limit`, or 0. Lengths are multiples of
/// [`Lanes::PAD`].
pub(crate) fn largest_within<T: Compiled>(own: T, r: &[T], e: &[T], limit: T) -> T {
    debug_assert!(r.len().is_multiple_of(T::PAD));
    T::run_largest_within(LargestWithin { own, r, e, limit })
}

/// `x_t ← max(x_t + y_t, least)`, of lengths that are multiples of [`Lanes::PAD`].
pub(crate) fn add_bounded<T: Compiled>(x: &mut [T], y: &[T], least: T) {
    debug_assert!(x.len().is_multiple_of(T::PAD));
    T::run_add_bounded(AddBounded { x, y, least });
}

/// `out_j = min(2·r_j·e_j, bound_j)`. Lengths are multiples of [`Lanes::PAD`].
pub(crate) fn reach<T: Compiled>(r: &[T], e: &[T], bound: &[T], out: &mut [T]) {
    debug_assert!(r.len().is_multiple_of(T::PAD));
    T::run_reach(Reach { r, e, bound, out });
}

/// `out_i = max_j (r_i + r_j)·e_ij`, or 0, for each of `out.len()` rows of `e`, as wide as `r`: a
/// multiple of [`Lanes::PAD`].
pub(crate) fn largest_affinities<T: Compiled>(r: &[T], e: &[T], ld: usize, out: &mut [T]) {
    debug_assert!(r.len().is_multiple_of(T::PAD));
    T::run_largest_affinities(LargestAffinities { r, e, ld, out });
}

/// `w_j ← max(decay·w_j + Σ_g factor_g·p_gj, least)`, with `p [factors.len(), ld]` by rows and
/// `w.len()` a multiple of [`Lanes::PAD`].
pub(crate) fn receive<T: Compiled>(
    w: &mut [T],
    decay: T,
    least: T,
    factors: &[T],
    p: &[T],
    ld: usize,
) {
    debug_assert!(w.len().is_multiple_of(T::PAD));
    T::run_receive(Receive { w, decay, least, factors, p, ld });
}

impl<T: Compiled> LanesDct<T> {
    /// DCT-II of the columns of `x [len, width]`, row-major, `width` a multiple of [`Lanes::PAD`],
    /// not normalised:
    ///
    /// `out_k = outer_k·Σ_j inner_j·x_j·cos(πk(2j+1)/2len)` for the first `outer.len()` ≤ `len`
    /// coefficients; `out` is `[outer.len(), width]`.
    pub(crate) fn dct2(
        &self,
        x: &[T],
        width: usize,
        inner: &[T],
        outer: &[T],
        out: &mut [T],
        scratch: &mut Buffer<T>,
    ) {
        T::run_dct(DctColumns::new(self, x, width, inner, outer, out, scratch), false);
    }

    /// DCT-III of the columns of `x [len, width]`, row-major, `width` a multiple of [`Lanes::PAD`],
    /// not normalised:
    ///
    /// `out_j = outer_j·(½·inner_0·x_0 + Σ_{k≥1} inner_k·x_k·cos(πk(2j+1)/2len))` for the first
    /// `outer.len()` ≤ `len` points; `out` is `[outer.len(), width]`.
    pub(crate) fn dct3(
        &self,
        x: &[T],
        width: usize,
        inner: &[T],
        outer: &[T],
        out: &mut [T],
        scratch: &mut Buffer<T>,
    ) {
        T::run_dct(DctColumns::new(self, x, width, inner, outer, out, scratch), true);
    }
}
