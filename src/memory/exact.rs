//! Exact memory: the keys and values themselves, read by a tiled softmax with a running maximum.

use super::{Memory, Partial};
use crate::views::{corner_mut, rows, rows_mut};
use crate::{Error, Scalar, check, kernel};
use ndarray::{Array2, ArrayView2};

/// Queries that are answered at once.
pub(crate) const QUERY_BLOCK: usize = 128;

/// Keys that are scored at once.
const KEY_BLOCK: usize = 256;

/// With fewer queries than this, products run row by row: packing for a matrix product would cost more.
const FEW_QUERIES: usize = 4;

/// Working memory of [`attend`]: the scores of one tile, never an n × n array.
#[derive(Debug)]
pub(crate) struct Tile<T> {
    scores: Array2<T>,
}

impl<T: Scalar> Tile<T> {
    pub(crate) fn new(queries: usize, keys: usize) -> Self {
        Self { scores: Array2::zeros((queries.min(QUERY_BLOCK), keys.min(KEY_BLOCK))) }
    }
}

/// Adds `Σ_j exp(scale·q_i·k_j)·(v_j, 1)` to row `i` of `answer`, tile by tile, for the keys that query `i` sees: all of
/// them, or keys `0..=first + i` if `first` is given. Rows of `k` and `v` must be contiguous.
///
/// The log scale of a row is the running maximum of its scores (Milakov & Gimelshein, arXiv 1805.02867; Dao et al.,
/// FlashAttention, arXiv 2205.14135, algorithm 1).
pub(crate) fn attend<T: Scalar>(
    q: ArrayView2<'_, T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    scale: T,
    first: Option<usize>,
    tile: &mut Tile<T>,
    answer: &mut Partial<T>,
) {
    let queries = q.nrows();
    let keys = first.map_or(k.nrows(), |first| k.nrows().min(first + queries));
    let step = tile.scores.ncols().max(1);
    for start in (0..keys).step_by(step) {
        let count = step.min(keys - start);
        let k = rows(k, start..start + count);
        let v = rows(v, start..start + count);
        let mut scores = corner_mut(tile.scores.view_mut(), queries, count);
        if queries < FEW_QUERIES {
            for (q, mut row) in q.outer_iter().zip(scores.outer_iter_mut()) {
                let q = q.to_slice().unwrap_or_default();
                for (k, score) in k.outer_iter().zip(&mut row) {
                    *score = scale * kernel::dot(q, k.to_slice().unwrap_or_default());
                }
            }
        } else {
            kernel::matmul(scale, q, k.t(), T::zero(), &mut scores);
        }
        for (i, mut row) in scores.outer_iter_mut().enumerate() {
            let visible = first.map_or(count, |first| (first + i + 1).saturating_sub(start).min(count));
            let row = row.as_slice_mut().unwrap_or_default();
            let (row, hidden) = row.split_at_mut(visible);
            hidden.fill(T::zero());
            if visible == 0 {
                continue;
            }
            let old = answer.log_scale[i];
            let new = old.max(kernel::max(row));
            T::exp_slice(row, new);
            let correction = (old - new).exp();
            if correction != T::one() {
                kernel::scale(answer.numerator.row_mut(i).into_slice().unwrap_or_default(), correction);
            }
            answer.denominator[i] = answer.denominator[i] * correction + kernel::sum(row);
            answer.log_scale[i] = new;
        }
        let mut numerator = rows_mut(answer.numerator.view_mut(), 0..queries);
        if queries < FEW_QUERIES {
            for (row, mut sums) in scores.outer_iter().zip(numerator.outer_iter_mut()) {
                let sums = sums.as_slice_mut().unwrap_or_default();
                for (weight, v) in row.iter().zip(v.outer_iter()) {
                    kernel::add_scaled(sums, *weight, v.to_slice().unwrap_or_default());
                }
            }
        } else {
            kernel::matmul(T::one(), scores.view(), v, T::one(), &mut numerator);
        }
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
    serde(bound(serialize = "T: Scalar + serde::Serialize", deserialize = "T: Scalar + serde::Deserialize<'de>"))
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
    /// [`Error::ZeroSize`] if a dimension is 0, [`Error::InvalidOption`] if `scale` is not positive and finite.
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
        let mut tile = Tile::new(q.nrows(), self.tokens);
        let mut block = Partial::new(q.nrows().min(QUERY_BLOCK), self.value_dim)?;
        for start in (0..q.nrows()).step_by(QUERY_BLOCK) {
            let q = rows(q, start..q.nrows().min(start + QUERY_BLOCK));
            block.reset();
            attend(q.as_standard_layout().view(), self.keys(), self.values(), self.scale, None, &mut tile, &mut block);
            for i in 0..q.nrows() {
                if !block.denominator[i].is_finite() {
                    return Err(Error::Overflow { which: "a score", row: start + i });
                }
                let sums = block.numerator.row(i);
                answer.add(start + i, sums.to_slice().unwrap_or_default(), block.denominator[i], block.log_scale[i]);
            }
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
        Self { scale: memory.scale, keys: memory.keys().to_owned(), values: memory.values().to_owned() }
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
