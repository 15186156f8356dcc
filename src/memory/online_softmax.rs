//! Exact softmax of a block of queries over tiles of keys, with a running maximum.

use crate::error::Error;
use crate::kernel;
use crate::kernel::buffer::{Buffer, padded};
use crate::memory::answer::{Answer, SPAN, Total, in_range};
use crate::memory::key_values::{KeyValues, contiguous};
use crate::memory::packed::Packed;
use crate::memory::packed_softmax::PackedSoftmax;
use crate::memory::score_tile::{ScoreTile, Seen, count_up, sum_over_keys};
use crate::memory::scoring::Scoring;
use crate::memory::sight::Sight;
use crate::scalar::Scalar;
use crate::views;
use core::ops::Range;
use ndarray::ArrayView2;

/// Queries that are answered at once.
pub(crate) const QUERY_BLOCK: usize = 128;

/// Keys that are scored at once: by many queries, and by one.
const KEY_BLOCK: usize = 64;
const KEY_BLOCK_OF_ONE: usize = SPAN;

/// The [`SPAN`] of many queries, whose tiles are added one by one.
const SPAN_OF_MANY: usize = 4 * SPAN;

/// Packed tokens are read by up to so many queries as they are, and tile by tile unpacked for more.
const FEW_QUERIES: usize = 16;

/// Working memory of [`online_softmax`]: the queries of a block, the scores of one tile, copies of
/// its keys and values where their rows are not contiguous. Never an n × n array.
#[derive(Debug)]
pub(crate) struct Tile<T> {
    queries: Buffer<T>,
    scores: Buffer<T>,
    keys: Buffer<T>,
    values: Buffer<T>,
    correction: Buffer<T>,
    biases: Buffer<T>,
    /// 0, 1, 2, .. of the queries, or of the keys where there is one query.
    positions: Buffer<T>,
    pub(crate) answer: Answer<T>,
    total: Total<T>,
}

impl<T: Scalar> Tile<T> {
    pub(crate) fn new() -> Self {
        Self {
            queries: Buffer::new(),
            scores: Buffer::new(),
            keys: Buffer::new(),
            values: Buffer::new(),
            correction: Buffer::new(),
            biases: Buffer::new(),
            positions: Buffer::new(),
            answer: Answer::new(),
            total: Total::new(),
        }
    }
}

/// [`online_softmax`], for values of any size: `done` takes the answer, and says with
/// [`Error::Overflow`] that a sum of weighted values has left the range of the type; it is then
/// called again with an answer in a larger unit, in which none can.
pub(crate) fn online_softmax_in_range<T: Scalar>(
    q: ArrayView2<'_, T>,
    key_values: KeyValues<'_, T>,
    scoring: Scoring<T>,
    sight: Sight<'_, T>,
    tile: &mut Tile<T>,
    mut done: impl FnMut(&mut Answer<T>) -> Result<(), Error>,
) -> Result<(), Error> {
    in_range(key_values.tokens(), |share| {
        match key_values {
            KeyValues::Packed(packed, keys) if q.nrows() <= FEW_QUERIES && sight.is_plain() => {
                let seen = |row: usize| sight.keys(row + 1, keys).end;
                let row = |row| (scoring, seen(row));
                let last = seen(q.nrows().saturating_sub(1));
                softmax_of_rows(q, packed, last, &row, share, tile);
            }
            _ => online_softmax(q, key_values, scoring, sight, share, tile),
        }
        if share != T::one() {
            tile.answer.clamp();
        }
        done(&mut tile.answer)
    })
}

/// The same for the query heads of a group `[group, d]` that all see all of some packed tokens,
/// each with a way to score them of its own. They are read once for a few heads.
pub(crate) fn softmax_of_group_in_range<T: Scalar>(
    q: ArrayView2<'_, T>,
    (packed, keys): (&Packed, usize),
    scoring: &dyn Fn(usize) -> Scoring<T>,
    tile: &mut Tile<T>,
    mut done: impl FnMut(&mut Answer<T>) -> Result<(), Error>,
) -> Result<(), Error> {
    in_range(keys, |share| {
        softmax_of_rows(q, packed, keys, &|row| (scoring(row), keys), share, tile);
        if share != T::one() {
            tile.answer.clamp();
        }
        done(&mut tile.answer)
    })
}

/// Sets the answer to sums over packed tokens, read as they are; see [`PackedSoftmax`].
fn softmax_of_rows<T: Scalar>(
    q: ArrayView2<'_, T>,
    packed: &Packed,
    keys: usize,
    row: &dyn Fn(usize) -> (Scoring<T>, usize),
    share: T,
    tile: &mut Tile<T>,
) {
    let stride = padded::<T>(packed.dims()[1]);
    let Tile { queries, scores, correction, positions, answer, total, .. } = tile;
    queries.resize(q.len());
    queries.iter_mut().zip(q).for_each(|(query, &q)| *query = q);
    answer.resize(q.nrows(), q.nrows(), stride);
    let work = PackedSoftmax { packed, keys, row, queries, share };
    work.answer(positions, scores, correction, stride, (answer, total));
    to_natural_units(answer, share);
}

/// Sets the answer to `Σ_j exp(score_ij)·(v_j, 1)` for up to [`QUERY_BLOCK`] queries, tile by
/// tile, for the keys that query `i` sees: all of them, or keys `0..=first + i` if `first` is
/// given, less what the rest of `sight` hides. Query `i` is at position `first + i`; where all keys
/// are seen, every query is at that of the last key.
///
/// Weights are multiplied with `share`, a power of two.
///
/// The log scale of a row is the running maximum of its scores, less `ln share` (Milakov &
/// Gimelshein, arXiv 1805.02867; Dao et al., FlashAttention, arXiv 2205.14135, algorithm 1), within
/// a [`SPAN`]; spans are added up as a [`Total`]. Scores are kept to base 2, with queries as
/// columns.
fn online_softmax<T: Scalar>(
    q: ArrayView2<'_, T>,
    key_values: KeyValues<'_, T>,
    scoring: Scoring<T>,
    sight: Sight<'_, T>,
    share: T,
    tile: &mut Tile<T>,
) {
    let (n, d) = q.dim();
    let stride = padded::<T>(key_values.value_dim());
    let base_2 = scoring.base_2();
    let Range { start: begin, end: keys } = sight.keys(n, key_values.tokens());
    let Tile { queries, scores, keys: key_copy, values: value_copy, .. } = tile;
    let Tile { correction, biases, positions, answer, total, .. } = tile;
    let is_one = n == 1 && !sight.may_hide_all() && matches!(key_values, KeyValues::Wide(..));
    let width = if is_one { 1 } else { padded::<T>(n) };
    // tiles of packed tokens begin there
    let begin = if is_one { begin } else { begin / KEY_BLOCK * KEY_BLOCK };
    queries.resize(d * width);
    correction.resize(width);
    answer.resize(n, width, stride);
    if scoring.slope.is_some() {
        count_up(positions, if is_one { KEY_BLOCK_OF_ONE } else { width });
    }
    if let KeyValues::Wide(k, v) = key_values
        && is_one
    {
        queries.iter_mut().zip(q).for_each(|(query, &q)| *query = q);
        softmax_of_one(
            queries,
            k,
            v,
            scoring,
            begin..keys,
            scores,
            [key_copy, value_copy],
            positions,
            share,
            (answer, total),
        );
    } else {
        let adds_up = keys - begin > SPAN_OF_MANY;
        if adds_up {
            total.begin(answer);
        }
        views::to_columns(q, base_2, correction, queries); // whose norms are not needed
        for start in (begin..keys).step_by(KEY_BLOCK) {
            let count = KEY_BLOCK.min(keys - start);
            // query i sees keys 0..=i + offset of the tile
            let offset = sight.first.map(|first| first.cast_signed() - start.cast_signed());
            let seen = Seen { offset, keys: count, queries: n, width };
            let begins = (start - begin).is_multiple_of(SPAN_OF_MANY);
            if begins {
                if start > begin {
                    total.add(answer);
                }
                answer.denominator.fill(T::zero());
                answer.log_scale.fill(T::neg_infinity());
                // of queries before the span: its keys weigh nothing beside one
                answer.log_scale[..seen.first_query(0)].fill(T::zero());
            }
            let [k, v] = key_values.tile(start, count, stride, [&mut *key_copy, &mut *value_copy]);
            scores.resize(count * width);
            let scores_of = ScoreTile { k, ldk: d, d, queries, last: keys - 1 - start, positions };
            scores_of.write(scoring, seen, scores, None);
            if !sight.is_plain() {
                sight.apply(seen, start, scores, [&mut *biases, &mut *correction]);
            }
            let changed = kernel::online_softmax(
                scores,
                &mut answer.log_scale,
                &mut answer.denominator,
                correction,
            );
            if changed && !begins {
                kernel::scale_rows_in_place(&mut answer.numerator, stride, &correction[..n]);
            }
            if share != T::one() {
                kernel::scale(scores, share);
            }
            sum_over_keys(seen, scores, (v, stride), begins, &mut answer.numerator);
        }
        if adds_up {
            total.end(answer);
        }
    }
    if keys == begin {
        answer.numerator.fill(T::zero());
        answer.denominator.fill(T::zero());
        answer.log_scale.fill(T::neg_infinity());
    }
    to_natural_units(answer, share);
}

/// Log scales to base 2 become natural ones, of sums with this share of the weights.
fn to_natural_units<T: Scalar>(answer: &mut Answer<T>, share: T) {
    let ln_2 = T::from_f64(core::f64::consts::LN_2);
    answer.log_scale.iter_mut().for_each(|log_scale| *log_scale *= ln_2);
    if share != T::one() {
        kernel::scale(&mut answer.denominator, share);
        answer.log_scale.iter_mut().for_each(|log_scale| *log_scale -= share.ln());
    }
}

/// One query: a decode step.
#[allow(clippy::too_many_arguments, clippy::cast_precision_loss)]
fn softmax_of_one<T: Scalar>(
    q: &[T],
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    scoring: Scoring<T>,
    keys: Range<usize>,
    scores: &mut Buffer<T>,
    [key_copy, value_copy]: [&mut Buffer<T>; 2],
    positions: &[T],
    share: T,
    (answer, total): (&mut Answer<T>, &mut Total<T>),
) {
    let value_dim = v.ncols();
    scores.resize(KEY_BLOCK_OF_ONE);
    let (begin, end) = (keys.start, keys.end);
    let adds_up = keys.len() > SPAN;
    if adds_up {
        total.begin(answer);
    }
    for start in keys.step_by(KEY_BLOCK_OF_ONE) {
        if start > begin {
            total.add(answer);
        }
        let count = KEY_BLOCK_OF_ONE.min(end - start);
        let k = contiguous(k, start, count, q.len(), key_copy);
        let v = contiguous(v, start, count, value_dim, value_copy);
        let scores = &mut scores[..count];
        kernel::rows_dot(scoring.base_2(), q, k, scores);
        if let Some(cap) = scoring.soft_cap {
            cap.apply(scores);
        }
        if let Some(slope) = scoring.slope {
            let to_first = T::from_f64((end - 1 - start) as f64);
            kernel::add_distances(scores, positions, [-to_first, T::one()], slope);
        }
        let largest = kernel::max(scores);
        kernel::exp2_slice(scores, largest);
        answer.denominator[0] = kernel::sum(scores);
        answer.log_scale[0] = largest;
        if share != T::one() {
            kernel::scale(scores, share);
        }
        answer.numerator.fill(T::zero());
        kernel::add_row_times_matrix(scores, v, value_dim, &mut answer.numerator[..value_dim]);
    }
    if adds_up {
        total.end(answer);
    }
}
