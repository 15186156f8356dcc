//! What a softmax over tiles of keys hands back to queries, keys and values.

use crate::kernel;
use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::loops::gradients::SoftmaxGradient;
use crate::kernel::loops::products::{Epilogue, Matrix, Product};
use crate::memory::key_values::contiguous;
use crate::memory::score_tile::{ScoreTile, Seen, count_up, sum_over_keys};
use crate::memory::scoring::Scoring;
use crate::memory::sight::Sight;
use crate::memory::unit::{Unit, product};
use crate::scalar::Scalar;
use crate::views::{columns_mut, rows, rows_mut, to_columns};
use core::f64::consts::LOG2_E;
use core::ops::Range;
use ndarray::{ArrayView1, ArrayView2, ArrayViewMut2};

/// Queries of a block.
pub(crate) const QUERY_BLOCK: usize = 64;

/// Keys of a tile.
const KEY_BLOCK: usize = 64;

/// A block of up to [`QUERY_BLOCK`] queries with what a forward pass gave of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answered<'a, T> {
    /// `[n, d]`
    pub(crate) q: ArrayView2<'a, T>,
    /// `[n, d_v]`
    pub(crate) out: ArrayView2<'a, T>,
    /// The natural logarithms of the sums of the weights, `[n]`.
    pub(crate) log_normalizer: ArrayView1<'a, T>,
    pub(crate) sight: Sight<'a, T>,
}

/// The units of queries, keys, values and cotangents.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Units {
    pub(crate) q: Unit,
    pub(crate) k: Unit,
    pub(crate) v: Unit,
    pub(crate) d_out: Unit,
}

impl Units {
    /// Those of numbers near 1.
    pub(crate) fn ones() -> Self {
        let one = Unit::one();
        Self { q: one, k: one, v: one, d_out: one }
    }
}

/// Working memory of [`add_gradients`]: some arrays of a block of queries and of a tile of keys, in
/// their units. Never an n × n array.
#[derive(Debug)]
pub(crate) struct GradientTile<T> {
    /// Queries and cotangents as columns, `[d, width]` and `[d_v, width]`.
    columns: [Buffer<T>; 2],
    /// Copies of queries, cotangents and outputs where their rows are not contiguous.
    rows: [Buffer<T>; 3],
    /// The same of keys, of keys in their unit, and of values.
    tokens: [Buffer<T>; 3],
    /// Scores, then weights `[keys, width]`.
    scores: Buffer<T>,
    /// The scores before a cap.
    products: Buffer<T>,
    /// Gradients by weights, then by scores.
    d_scores: Buffer<T>,
    /// Of the queries, to base 2.
    log_normalizer: Buffer<T>,
    /// `d_out·out` of the queries.
    means: Buffer<T>,
    positions: Buffer<T>,
    /// Biases of a tile, then the gradients by them, and what comes beside them.
    biases: Buffer<T>,
    squares: Buffer<T>,
    /// What goes to queries, and to keys or values.
    d_q: Buffer<T>,
    d_tokens: Buffer<T>,
}

impl<T: Scalar> GradientTile<T> {
    pub(crate) fn new() -> Self {
        Self {
            columns: [(); 2].map(|()| Buffer::new()),
            rows: [(); 3].map(|()| Buffer::new()),
            tokens: [(); 3].map(|()| Buffer::new()),
            scores: Buffer::new(),
            products: Buffer::new(),
            d_scores: Buffer::new(),
            log_normalizer: Buffer::new(),
            means: Buffer::new(),
            positions: Buffer::new(),
            biases: Buffer::new(),
            squares: Buffer::new(),
            d_q: Buffer::new(),
            d_tokens: Buffer::new(),
        }
    }

    /// `d_out·out` of each query of the last block, in the units of cotangents and values.
    pub(crate) fn means(&self) -> &[T] {
        &self.means
    }
}

/// Adds the gradients of a loss by queries, keys, values and biases to `d_q`, `d_k`, `d_v` and
/// `d_bias`, from those by the outputs of a block of queries.
///
/// With weights `P_tj = exp(s_tj)/Σ`, the scores `s_tj` of products `u_tj = scale·q_t·k_j`, and
/// `D_t = d_out_t·o_t`, it is
///
/// ```text
/// d_v_j += Σ_t P_tj d_out_t,
/// d_u_tj = P_tj (d_out_t·v_j − D_t)·d s_tj/d u_tj,
/// d_q_t += scale·Σ_j d_u_tj k_j,    d_k_j += scale·Σ_t d_u_tj q_t,
/// d_bias_tj += P_tj (d_out_t·v_j − D_t)
/// ```
///
/// (Dao et al., FlashAttention, arXiv 2205.14135, algorithm 4), where `ds/du` is 1, or
/// `1 − tanh²(u/cap)` under a soft cap. Tile by tile: keys are rows, queries are columns.
pub(crate) fn add_gradients<T: Scalar>(
    block: Answered<'_, T>,
    [k, v]: [ArrayView2<'_, T>; 2],
    scoring: Scoring<T>,
    (d_out, units): (ArrayView2<'_, T>, Units),
    d_q: ArrayViewMut2<'_, T>,
    ([d_k, d_v], mut d_bias): ([&mut ArrayViewMut2<'_, T>; 2], Option<ArrayViewMut2<'_, T>>),
    tile: &mut GradientTile<T>,
) {
    let (n, d) = block.q.dim();
    let [stride, value_stride] = [d, v.ncols()].map(padded::<T>);
    let width = padded::<T>(n);
    let scale = scoring.scale.as_f64();
    let to_q = product(scale, &[units.d_out, units.v, units.k]);
    let to_k = product(scale, &[units.d_out, units.v, units.q]);
    let to_v = product(1.0, &[units.d_out]);
    let to_bias = product(1.0, &[units.d_out, units.v]);

    let GradientTile { columns: [queries, cotangents], scores, products, d_scores, .. } = tile;
    let GradientTile { biases, squares, .. } = tile;
    let GradientTile { log_normalizer, means, positions, d_q: sums, d_tokens, .. } = tile;
    let [query_rows, cotangent_rows, out_rows] = &mut tile.rows;
    let [key_copy, scaled_copy, value_copy] = &mut tile.tokens;
    means.resize(width);
    queries.resize(d * width);
    to_columns(block.q, scoring.base_2(), means, queries); // norms are not needed
    cotangents.resize(v.ncols() * width);
    to_columns(d_out, units.d_out.inverse(), means, cotangents);
    let query_rows = in_unit(block.q, 0..n, stride, units.q, query_rows);
    let cotangent_rows = in_unit(d_out, 0..n, value_stride, units.d_out, cotangent_rows);
    let out_rows = in_unit(block.out, 0..n, value_stride, units.v, out_rows);
    means.fill(T::zero());
    let row_pairs =
        cotangent_rows.chunks_exact(value_stride).zip(out_rows.chunks_exact(value_stride));
    means.iter_mut().zip(row_pairs).for_each(|(mean, (x, y))| *mean = kernel::dot(x, y));
    log_normalizer.resize(width);
    log_normalizer.fill(T::infinity()); // no weight beyond the queries
    for (to, &log) in log_normalizer.iter_mut().zip(block.log_normalizer) {
        *to = T::from_f64(log.as_f64() * LOG2_E);
    }
    if scoring.slope.is_some() {
        count_up(positions, width);
    }

    let Range { start: begin, end: keys } = block.sight.keys(n, k.nrows());
    sums.resize(n * stride);
    for start in (begin..keys).step_by(KEY_BLOCK) {
        let count = KEY_BLOCK.min(keys - start);
        let range = start..start + count;
        let k_rows = contiguous(k, start, count, stride, key_copy);
        let scaled_k = if units.k.is_one() {
            k_rows
        } else {
            in_unit(k, range.clone(), stride, units.k, scaled_copy)
        };
        let v_rows = in_unit(v, range.clone(), value_stride, units.v, value_copy);
        let offset = block.sight.first.map(|first| first.cast_signed() - start.cast_signed());
        let seen = Seen { offset, keys: count, queries: n, width };
        scores.resize(count * width);
        d_scores.resize(count * width);
        let last = keys - 1 - start;
        let scores_of = ScoreTile { k: k_rows, ldk: stride, d, queries, last, positions };
        products.resize(if scoring.soft_cap.is_some() { count * width } else { 0 });
        let before_cap = scoring.soft_cap.map(|_| &mut **products);
        scores_of.write(scoring, seen, scores, before_cap);
        if !block.sight.is_plain() {
            block.sight.apply(seen, start, scores, [&mut *biases, &mut *squares]);
        }
        let normal = (&**log_normalizer, &**means);
        weigh(seen, (v_rows, value_stride), (cotangents, v.ncols()), normal, scores, d_scores);
        if let Some(d_bias) = &mut d_bias {
            let to = columns_mut(d_bias.view_mut(), range.clone());
            add_to_bias(seen, d_scores, [biases, squares], to, to_bias);
        }
        if let Some(cap) = scoring.soft_cap {
            cap.hand_on(products, d_scores);
            if !block.sight.is_plain() {
                // the product of what is hidden may have no slope
                let weights = d_scores.iter_mut().zip(&**scores);
                weights.filter(|(_, w)| **w == T::zero()).for_each(|(d, _)| *d = T::zero());
            }
        }
        clear_unseen(seen, d_scores);

        d_tokens.resize(count * stride.max(value_stride));
        sum_over_queries(seen, scores, (cotangent_rows, value_stride), d_tokens);
        add(rows_mut(d_v.view_mut(), range.clone()), d_tokens, value_stride, to_v);
        sum_over_queries(seen, d_scores, (query_rows, stride), d_tokens);
        add(rows_mut(d_k.view_mut(), range), d_tokens, stride, to_k);
        sum_over_keys(seen, d_scores, (scaled_k, stride), start == begin, sums);
    }
    if keys > begin {
        add(d_q, sums, stride, to_q);
    }
}

/// `scores` become weights, and `d_scores` the gradients by scores. Values are rows, `value_stride`
/// apart; cotangents `[value_dim, width]` are columns, and so are the logarithms of normalisers to
/// base 2 and the means.
fn weigh<T: Scalar>(
    seen: Seen,
    (values, value_stride): (&[T], usize),
    (cotangents, value_dim): (&[T], usize),
    (log_normalizer, means): (&[T], &[T]),
    scores: &mut [T],
    d_scores: &mut [T],
) {
    let width = seen.width;
    for (keys, from) in seen.key_blocks::<T>() {
        let block = keys.start * width..keys.end * width;
        let gradients = &mut d_scores[block.clone()];
        Product {
            m: keys.len(),
            n: width - from,
            k: value_dim,
            a: Matrix::rows(&values[keys.start * value_stride..], value_stride),
            b: &cotangents[from..],
            ldb: width,
            c: &mut gradients[from..],
            ldc: width,
            into: Epilogue::Set,
        }
        .run();
        SoftmaxGradient { scores: &mut scores[block], gradients, from, log_normalizer, means }
            .run();
    }
}

/// Sets gradients to zero that are not computed, and that sums over keys read along with others.
fn clear_unseen<T: Scalar>(seen: Seen, d_scores: &mut [T]) {
    let width = seen.width;
    for (keys, from) in seen.key_blocks::<T>() {
        let unseen = seen.block_start(from)..from;
        if !unseen.is_empty() {
            let rows = d_scores[keys.start * width..keys.end * width].chunks_exact_mut(width);
            rows.for_each(|row| row[unseen.clone()].fill(T::zero()));
        }
    }
}

/// Adds the gradients by scores, of a tile `[keys, width]`, to those by biases `[queries, keys]`.
fn add_to_bias<T: Scalar>(
    seen: Seen,
    d_scores: &mut [T],
    [columns, squares]: [&mut Buffer<T>; 2],
    mut to: ArrayViewMut2<'_, T>,
    factors: [T; 2],
) {
    let width = seen.width;
    for (keys, from) in seen.key_blocks::<T>() {
        // columns before this one are not computed
        let rows = d_scores[keys.start * width..keys.end * width].chunks_exact_mut(width);
        rows.for_each(|row| row[..from].fill(T::zero()));
    }
    let stride = padded::<T>(seen.keys);
    squares.resize(stride);
    columns.resize(seen.queries * stride);
    let row = |key: usize| &d_scores[key * width..key * width + seen.queries];
    kernel::transpose(seen.keys, &row, T::one(), squares, columns);
    for factor in factors {
        kernel::scale(columns, factor);
    }
    for (mut to, from) in to.outer_iter_mut().zip(columns.chunks_exact(stride)) {
        let from = &from[..seen.keys];
        match to.as_slice_mut() {
            Some(to) => kernel::add_scaled(to, T::one(), from),
            None => to.iter_mut().zip(from).for_each(|(to, &x)| *to += x),
        }
    }
}

/// `sums_j = Σ_t weights_jt·rows_t` for every key, over the queries that see it.
fn sum_over_queries<T: Scalar>(
    seen: Seen,
    weights: &[T],
    (rows, stride): (&[T], usize),
    sums: &mut [T],
) {
    for (keys, from) in seen.key_blocks::<T>() {
        Product {
            m: keys.len(),
            n: stride,
            k: seen.queries - from,
            a: Matrix::rows(&weights[keys.start * seen.width + from..], seen.width),
            b: &rows[from * stride..],
            ldb: stride,
            c: &mut sums[keys.start * stride..],
            ldc: stride,
            into: Epilogue::Set,
        }
        .run();
    }
}

/// `to_i += factors·from_i`, with two factors.
pub(crate) fn add<T: Scalar>(
    mut to: ArrayViewMut2<'_, T>,
    from: &mut [T],
    stride: usize,
    [first, second]: [T; 2],
) {
    let factor = if second == T::one() {
        first
    } else {
        kernel::scale(from, first);
        second
    };
    let length = to.ncols();
    if let Some(to) = to.as_slice_mut() {
        kernel::gradients::add_rows(factor, from, stride, length, to);
    } else {
        for (mut to, from) in to.outer_iter_mut().zip(from.chunks(stride)) {
            to.iter_mut().zip(from).for_each(|(to, &from)| *to += factor * from);
        }
    }
}

/// Some rows in a unit, contiguous, each followed by zeros up to `stride` numbers: where they are
/// if they lie so, else copied.
pub(crate) fn in_unit<'a: 't, 't, T: Scalar>(
    x: ArrayView2<'a, T>,
    range: Range<usize>,
    stride: usize,
    unit: Unit,
    copy: &'t mut Buffer<T>,
) -> &'t [T] {
    if unit.is_one() {
        return contiguous(x, range.start, range.len(), stride, copy);
    }
    let inverse = unit.inverse::<T>();
    copy.resize(range.len() * stride);
    for (row, copy) in rows(x, range).outer_iter().zip(copy.chunks_exact_mut(stride)) {
        let (copy, padding) = copy.split_at_mut(row.len());
        copy.iter_mut().zip(row).for_each(|(copy, &x)| *copy = x * inverse);
        padding.fill(T::zero());
    }
    copy
}
