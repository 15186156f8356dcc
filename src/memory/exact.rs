//! Exact memory: the keys and values themselves, read by a tiled softmax with a running maximum.

use super::{Answer, Memory, Partial};
use crate::kernel;
use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::loops::products::{Epilogue, Matrix, Product};
use crate::views::{self, rows};
use crate::{Error, Scalar, check};
#[cfg(feature = "serde")]
use ndarray::Array2;
use ndarray::ArrayView2;

/// Queries that are answered at once.
pub(crate) const QUERY_BLOCK: usize = 128;

/// Keys that are scored at once: by many queries, and by one.
const KEY_BLOCK: usize = 64;
const KEY_BLOCK_OF_ONE: usize = 512;

/// Where the mask cuts through a tile, keys and queries go in blocks of this many, so that little
/// of the masked half is computed.
const MASK_BLOCK: usize = 16;

/// Working memory of [`attend`]: the queries of a block, the scores of one tile, copies of its keys
/// and values where their rows are not contiguous. Never an n × n array.
#[derive(Debug)]
pub(crate) struct Tile<T> {
    queries: Buffer<T>,
    scores: Buffer<T>,
    keys: Buffer<T>,
    values: Buffer<T>,
    correction: Buffer<T>,
    pub(crate) answer: Answer<T>,
    /// Whether many queries may be shared out over threads.
    #[cfg(feature = "rayon")]
    pub(crate) parallel: bool,
}

impl<T: Scalar> Tile<T> {
    pub(crate) fn new() -> Self {
        Self {
            queries: Buffer::new(),
            scores: Buffer::new(),
            keys: Buffer::new(),
            values: Buffer::new(),
            correction: Buffer::new(),
            answer: Answer::new(),
            #[cfg(feature = "rayon")]
            parallel: true,
        }
    }

    /// Empty memory for a copy of a stream.
    #[cfg_attr(not(feature = "rayon"), allow(clippy::unused_self))]
    pub(crate) fn like(&self) -> Self {
        Self {
            #[cfg(feature = "rayon")]
            parallel: self.parallel,
            ..Self::new()
        }
    }

    /// Leaves the threads to others.
    #[cfg_attr(
        not(feature = "rayon"),
        allow(clippy::unused_self, clippy::needless_pass_by_ref_mut)
    )]
    pub(crate) fn stay_on_one_thread(&mut self) {
        #[cfg(feature = "rayon")]
        {
            self.parallel = false;
        }
    }
}

/// Some rows, contiguous, each followed by zeros up to `stride` numbers: where they are if they lie
/// so, else copied.
fn contiguous<'a, T: Scalar>(
    x: ArrayView2<'a, T>,
    first: usize,
    count: usize,
    stride: usize,
    copy: &'a mut Buffer<T>,
) -> &'a [T] {
    if x.ncols() == stride
        && let Some(all) = x.to_slice()
    {
        return &all[first * stride..(first + count) * stride];
    }
    copy.resize(count * stride);
    for (row, copy) in rows(x, first..first + count).outer_iter().zip(copy.chunks_exact_mut(stride))
    {
        let (copy, padding) = copy.split_at_mut(row.len());
        copy.iter_mut().zip(row).for_each(|(copy, &x)| *copy = x);
        padding.fill(T::zero());
    }
    copy
}

/// Sets the answer to `Σ_j exp(scale·q_i·k_j)·(v_j, 1)` for up to [`QUERY_BLOCK`] queries, tile by
/// tile, for the keys that query `i` sees: all of them, or keys `0..=first + i` if `first` is
/// given.
///
/// The log scale of a row is the running maximum of its scores (Milakov & Gimelshein, arXiv
/// 1805.02867; Dao et al., FlashAttention, arXiv 2205.14135, algorithm 1). Scores are kept to base
/// 2, with queries as columns.
pub(crate) fn attend<T: Scalar>(
    q: ArrayView2<'_, T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    scale: T,
    first: Option<usize>,
    tile: &mut Tile<T>,
) {
    let (n, d) = q.dim();
    let stride = padded::<T>(v.ncols());
    let base_2 = scale * T::from_f64(core::f64::consts::LOG2_E);
    let keys = first.map_or(k.nrows(), |first| k.nrows().min(first + n));
    let Tile { queries, scores, keys: key_copy, values: value_copy, correction, answer, .. } = tile;
    let width = if n == 1 { 1 } else { padded::<T>(n) };
    queries.resize(d * width);
    correction.resize(width);
    answer.resize(n, width, stride);
    answer.denominator.fill(T::zero());
    answer.log_scale.fill(T::neg_infinity());
    if n == 1 {
        queries.iter_mut().zip(q).for_each(|(query, &q)| *query = q);
        attend_one(queries, k, v, base_2, keys, scores, key_copy, value_copy, answer);
    } else {
        views::to_columns(q, base_2, correction, queries); // whose norms are not needed
        for start in (0..keys).step_by(KEY_BLOCK) {
            let count = KEY_BLOCK.min(keys - start);
            let k = contiguous(k, start, count, d, key_copy);
            let v = contiguous(v, start, count, stride, value_copy);
            scores.resize(count * width);
            // query i sees keys 0..=i + offset of the tile
            let offset = first.map(|first| first.cast_signed() - start.cast_signed());
            score(k, queries, d, width, offset, scores);
            let changed = kernel::online_softmax(
                scores,
                &mut answer.log_scale,
                &mut answer.denominator,
                correction,
            );
            if changed && start > 0 {
                kernel::scale_rows_in_place(&mut answer.numerator, stride, &correction[..n]);
            }
            add_values(scores, v, n, width, stride, offset, start == 0, &mut answer.numerator);
        }
    }
    if keys == 0 {
        answer.numerator.fill(T::zero());
    }
    let ln_2 = T::from_f64(core::f64::consts::LN_2);
    answer.log_scale.iter_mut().for_each(|log_scale| *log_scale *= ln_2);
}

/// Scores of a tile `[keys, width]`; −∞ where the mask hides the key.
#[allow(clippy::cast_sign_loss, clippy::cast_possible_wrap)]
fn score<T: Scalar>(
    k: &[T],
    queries: &[T],
    d: usize,
    width: usize,
    offset: Option<isize>,
    scores: &mut [T],
) {
    let count = scores.len() / width;
    let all_seen = offset.is_none_or(|offset| offset + 1 >= count.cast_signed());
    let step = if all_seen { count } else { MASK_BLOCK };
    for first in (0..count).step_by(step) {
        let last = count.min(first + step);
        // the first query that sees the first key of the block, down to a whole vector
        let seen_by = |key: usize| {
            offset
                .map_or(0, |offset| (key.cast_signed() - offset).max(0).cast_unsigned())
                .min(width)
        };
        let from = seen_by(first) / T::PAD * T::PAD;
        let rows = &mut scores[first * width..last * width];
        if from < width {
            Product {
                m: last - first,
                n: width - from,
                k: d,
                a: Matrix::rows(&k[first * d..], d),
                b: &queries[from..],
                ldb: width,
                c: &mut rows[from..],
                ldc: width,
                into: Epilogue::Set,
            }
            .run();
        }
        if !all_seen {
            for (key, row) in (first..last).zip(rows.chunks_exact_mut(width)) {
                row[..seen_by(key)].fill(T::neg_infinity());
            }
        }
    }
}

/// Adds the weighted values of a tile.
#[allow(clippy::too_many_arguments, clippy::cast_sign_loss, clippy::cast_possible_wrap)]
fn add_values<T: Scalar>(
    weights: &[T],
    v: &[T],
    n: usize,
    width: usize,
    stride: usize,
    offset: Option<isize>,
    set: bool,
    numerator: &mut [T],
) {
    let count = weights.len() / width;
    let all_seen = offset.is_none_or(|offset| offset + 1 >= count.cast_signed());
    let step = if all_seen { n } else { MASK_BLOCK };
    for first in (0..n).step_by(step) {
        let last = n.min(first + step);
        let seen = offset.map_or(count, |offset| {
            (offset + last.cast_signed()).clamp(0, count.cast_signed()).cast_unsigned()
        });
        if seen == 0 && !set {
            continue;
        }
        Product {
            m: last - first,
            n: stride,
            k: seen,
            a: Matrix::columns(&weights[first..], width),
            b: v,
            ldb: stride,
            c: &mut numerator[first * stride..],
            ldc: stride,
            into: if set { Epilogue::Set } else { Epilogue::Add },
        }
        .run();
    }
}

/// One query: a decode step.
#[allow(clippy::too_many_arguments)]
fn attend_one<T: Scalar>(
    q: &[T],
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    base_2: T,
    keys: usize,
    scores: &mut Buffer<T>,
    key_copy: &mut Buffer<T>,
    value_copy: &mut Buffer<T>,
    answer: &mut Answer<T>,
) {
    let Answer { numerator, denominator, log_scale, .. } = answer;
    numerator.fill(T::zero());
    let value_dim = v.ncols();
    scores.resize(KEY_BLOCK_OF_ONE);
    for start in (0..keys).step_by(KEY_BLOCK_OF_ONE) {
        let count = KEY_BLOCK_OF_ONE.min(keys - start);
        let k = contiguous(k, start, count, q.len(), key_copy);
        let v = contiguous(v, start, count, value_dim, value_copy);
        let scores = &mut scores[..count];
        kernel::rows_dot(base_2, q, k, scores);
        let old = log_scale[0];
        let new = old.max(kernel::max(scores));
        kernel::exp2_slice(scores, new);
        let correction = if old == new { T::one() } else { (old - new).exp2() };
        if correction != T::one() {
            kernel::scale(numerator, correction);
        }
        denominator[0] = denominator[0] * correction + kernel::sum(scores);
        log_scale[0] = new;
        kernel::add_row_times_matrix(scores, v, value_dim, &mut numerator[..value_dim]);
    }
}

/// The keys and values of every token absorbed: `w(q, k) = exp(scale·q·k)`, exactly.
///
/// It grows by `head_dim + value_dim` numbers a token.
///
/// ```
/// use dijiang::{ExactMemory, Memory, Partial};
/// use ndarray::array;
///
/// let mut memory = ExactMemory::<f64>::new(2, 1, 1.0)?;
/// memory.absorb(array![[0.0, 0.0], [1.0, 0.0]].view(), array![[10.0], [20.0]].view())?;
/// let mut answer = Partial::new(1, 1)?;
/// memory.read(array![[3.0, 0.0]].view(), &mut answer)?;
/// // ln(e⁰ + e³)
/// assert!((answer.log_normalizer()[0] - (1.0 + 3f64.exp()).ln()).abs() < 1e-15);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "Parts<T>", into = "Parts<T>"))]
#[cfg_attr(
    feature = "serde",
    serde(bound(
        serialize = "T: Scalar + serde::Serialize",
        deserialize = "T: Scalar + serde::Deserialize<'de>"
    ))
)]
pub struct ExactMemory<T> {
    head_dim: usize,
    value_dim: usize,
    scale: T,
    keys: Vec<T>,
    values: Vec<T>,
    tokens: usize,
}

impl<T: Scalar> ExactMemory<T> {
    /// An empty memory with weights `exp(scale·q·k)`.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if a dimension is 0, [`Error::InvalidOption`] if `scale` is not positive
    /// and finite.
    pub fn new(head_dim: usize, value_dim: usize, scale: f64) -> Result<Self, Error> {
        check::at_least_one("head_dim", head_dim)?;
        check::at_least_one("value_dim", value_dim)?;
        let scale = T::from_f64(check::scale::<T>(Some(scale), head_dim)?);
        Ok(Self { head_dim, value_dim, scale, keys: Vec::new(), values: Vec::new(), tokens: 0 })
    }

    /// The keys `[len, head_dim]`.
    #[must_use]
    pub fn keys(&self) -> ArrayView2<'_, T> {
        matrix(&self.keys, self.tokens, self.head_dim)
    }

    /// The values `[len, value_dim]`.
    #[must_use]
    pub fn values(&self) -> ArrayView2<'_, T> {
        matrix(&self.values, self.tokens, self.value_dim)
    }

    /// Appends the tokens of another memory of the same shape and scale.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the dimensions differ, [`Error::InvalidOption`] if the scales do.
    pub fn merge(&mut self, other: &Self) -> Result<(), Error> {
        check::size("other", "key columns", self.head_dim, other.head_dim)?;
        check::size("other", "value columns", self.value_dim, other.value_dim)?;
        check::same_scale(self.scale, other.scale)?;
        self.keys.extend_from_slice(&other.keys);
        self.values.extend_from_slice(&other.values);
        self.tokens += other.tokens;
        Ok(())
    }

    pub(crate) fn dims(&self) -> (usize, usize) {
        (self.head_dim, self.value_dim)
    }

    pub(crate) fn scale(&self) -> T {
        self.scale
    }

    /// Appends tokens that have been checked.
    pub(crate) fn push(&mut self, k: ArrayView2<'_, T>, v: ArrayView2<'_, T>) {
        self.keys.extend(k.iter());
        self.values.extend(v.iter());
        self.tokens += k.nrows();
    }

    /// Forgets all but the first `tokens` tokens.
    pub(crate) fn truncate(&mut self, tokens: usize) {
        self.keys.truncate(tokens * self.head_dim);
        self.values.truncate(tokens * self.value_dim);
        self.tokens = self.tokens.min(tokens);
    }
}

fn matrix<T>(data: &[T], rows: usize, columns: usize) -> ArrayView2<'_, T> {
    ArrayView2::from_shape((rows, columns), data).expect("the memory holds whole rows")
}

impl<T: Scalar> Memory<T> for ExactMemory<T> {
    fn absorb(&mut self, k: ArrayView2<'_, T>, v: ArrayView2<'_, T>) -> Result<(), Error> {
        check::size("v", "columns", self.value_dim, v.ncols())?;
        check::keys_values(self.head_dim, k, v)?;
        self.push(k, v);
        Ok(())
    }

    fn read(&self, q: ArrayView2<'_, T>, answer: &mut Partial<T>) -> Result<(), Error> {
        check::queries(self.head_dim, q)?;
        check::size("answer", "rows", q.nrows(), answer.numerator.nrows())?;
        check::size("answer", "columns", self.value_dim, answer.numerator.ncols())?;
        let mut tile = Tile::new();
        for start in (0..q.nrows()).step_by(QUERY_BLOCK) {
            let q = rows(q, start..q.nrows().min(start + QUERY_BLOCK));
            attend(q, self.keys(), self.values(), self.scale, None, &mut tile);
            let block = &tile.answer;
            if let Some(i) = block.first_overflow() {
                return Err(Error::Overflow { which: "a score", row: start + i });
            }
            block.add_to(answer, start);
        }
        Ok(())
    }

    fn len(&self) -> usize {
        self.tokens
    }

    fn state_floats(&self) -> usize {
        self.keys.len() + self.values.len()
    }

    fn reset(&mut self) {
        self.truncate(0);
    }

    fn clone_box(&self) -> Box<dyn Memory<T>> {
        Box::new(self.clone())
    }
}

/// What is saved.
#[cfg(feature = "serde")]
#[derive(Clone, serde::Serialize, serde::Deserialize)]
struct Parts<T> {
    scale: T,
    keys: Array2<T>,
    values: Array2<T>,
}

#[cfg(feature = "serde")]
impl<T: Scalar> From<ExactMemory<T>> for Parts<T> {
    fn from(memory: ExactMemory<T>) -> Self {
        Self {
            scale: memory.scale,
            keys: memory.keys().to_owned(),
            values: memory.values().to_owned(),
        }
    }
}

#[cfg(feature = "serde")]
impl<T: Scalar> TryFrom<Parts<T>> for ExactMemory<T> {
    type Error = Error;

    fn try_from(parts: Parts<T>) -> Result<Self, Error> {
        let mut memory = Self::new(parts.keys.ncols(), parts.values.ncols(), parts.scale.as_f64())?;
        memory.absorb(parts.keys.view(), parts.values.view())?;
        Ok(memory)
    }
}
