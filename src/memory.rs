//! Memories answer queries with partial sums, and partial sums merge exactly.

mod exact;
pub(crate) mod linear;
pub(crate) mod merged;
pub(crate) mod slab;

pub use exact::ExactMemory;
pub(crate) use exact::{QUERY_BLOCK, Tile, attend};
pub use merged::{MergedMemory, Metric};

use crate::kernel::{self, Buffer, columns, padded};
use crate::{Error, Scalar, check};
use core::fmt::Debug;
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut2};

/// What a set of tokens answers to `n` queries: for each a numerator (`value_dim` numbers), a
/// denominator and one log scale.
///
/// ```text
/// e^{log_scale}·(numerator, denominator) = Σ_j w(q, k_j)·(v_j, 1)
/// ```
///
/// Partial sums of disjoint sets of tokens merge exactly, in any order: both are brought to the
/// larger log scale and added. Nothing overflows, whatever the weights.
///
/// ```
/// use dijiang::{Attention, ExactMemory, Mask, Memory, Partial, SoftmaxAttention};
/// use ndarray::{Array2, s};
///
/// let x = Array2::from_shape_fn((6, 4), |(i, j)| ((i * 4 + j) as f64).sin());
/// let scale = 0.5;
/// let mut answer = Partial::new(6, 4)?;
/// for half in [0..2, 2..6] {
///     let mut memory = ExactMemory::new(4, 4, scale)?;
///     memory.absorb(x.slice(s![half.clone(), ..]), x.slice(s![half, ..]))?;
///     memory.read(x.view(), &mut answer)?; // merges
/// }
/// let mut out = Array2::zeros((6, 4));
/// answer.normalize_into(out.view_mut())?;
/// let whole = SoftmaxAttention::new(4)?.with_scale(scale).forward(
///     x.view(),
///     x.view(),
///     x.view(),
///     Mask::Full,
/// )?;
/// assert!((out - whole).iter().all(|e| e.abs() < 1e-14));
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Partial<T> {
    pub(crate) numerator: Array2<T>,
    pub(crate) denominator: Array1<T>,
    pub(crate) log_scale: Array1<T>,
}

impl<T: Scalar> Partial<T> {
    /// The answer of no tokens at all to `queries` queries: zero sums at log scale −∞.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `value_dim` is 0.
    pub fn new(queries: usize, value_dim: usize) -> Result<Self, Error> {
        check::at_least_one("value_dim", value_dim)?;
        Ok(Self {
            numerator: Array2::zeros((queries, value_dim)),
            denominator: Array1::zeros(queries),
            log_scale: Array1::from_elem(queries, T::neg_infinity()),
        })
    }

    /// Of no queries.
    pub(crate) fn empty() -> Self {
        Self {
            numerator: Array2::zeros((0, 1)),
            denominator: Array1::zeros(0),
            log_scale: Array1::zeros(0),
        }
    }

    /// The sums of a memory of your own: `numerator [n, value_dim]`, `denominator [n]`,
    /// `log_scale [n]`. A log scale of −∞ says that no token has been seen.
    ///
    /// ```
    /// use dijiang::Partial;
    /// use ndarray::array;
    ///
    /// let far = Partial::from_parts(array![[3.0, 6.0]], array![1.5], array![700.0])?;
    /// assert!((far.log_normalizer()[0] - (1.5f64.ln() + 700.0)).abs() < 1e-12);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if there are no values, [`Error::Shape`] if the numbers of rows differ,
    /// [`Error::NotFinite`] if a sum is NaN or infinite, or a log scale is NaN or +∞.
    pub fn from_parts(
        numerator: Array2<T>,
        denominator: Array1<T>,
        log_scale: Array1<T>,
    ) -> Result<Self, Error> {
        check::at_least_one("numerator columns", numerator.ncols())?;
        check::size("denominator", "elements", numerator.nrows(), denominator.len())?;
        check::size("log_scale", "elements", numerator.nrows(), log_scale.len())?;
        check::finite("numerator", numerator.view())?;
        check::finite("denominator", denominator.view().insert_axis(ndarray::Axis(0)))?;
        match log_scale.iter().position(|l| !(l.is_finite() || *l == T::neg_infinity())) {
            Some(row) => Err(Error::NotFinite { which: "log_scale", row, column: 0 }),
            None => Ok(Self {
                numerator: numerator.as_standard_layout().into_owned(),
                denominator,
                log_scale,
            }),
        }
    }

    /// Back to the answer of no tokens.
    pub fn reset(&mut self) {
        self.numerator.fill(T::zero());
        self.denominator.fill(T::zero());
        self.log_scale.fill(T::neg_infinity());
    }

    /// The numerators `[n, value_dim]`, in units of `e^{log_scale}`.
    #[must_use]
    pub fn numerator(&self) -> ArrayView2<'_, T> {
        self.numerator.view()
    }

    /// The denominators `[n]`, in units of `e^{log_scale}`.
    #[must_use]
    pub fn denominator(&self) -> ArrayView1<'_, T> {
        self.denominator.view()
    }

    /// The log scales `[n]`; −∞ where no token has been seen.
    #[must_use]
    pub fn log_scale(&self) -> ArrayView1<'_, T> {
        self.log_scale.view()
    }

    /// `ln Σ_j w(q, k_j)` of each query: `ln denominator + log_scale`.
    #[must_use]
    pub fn log_normalizer(&self) -> Array1<T> {
        ndarray::Zip::from(&self.denominator).and(&self.log_scale).map_collect(|d, l| d.ln() + *l)
    }

    /// Adds the sums of other tokens.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if `other` has another number of queries or values.
    pub fn merge(&mut self, other: &Self) -> Result<(), Error> {
        check::size("other", "rows", self.numerator.nrows(), other.numerator.nrows())?;
        check::size("other", "columns", self.numerator.ncols(), other.numerator.ncols())?;
        for i in 0..self.denominator.len() {
            let numerator = other.numerator.row(i);
            self.add(
                i,
                numerator.as_slice().unwrap_or_default(),
                other.denominator[i],
                other.log_scale[i],
            );
        }
        Ok(())
    }

    /// Adds one row of sums.
    pub(crate) fn add(&mut self, row: usize, numerator: &[T], denominator: T, log_scale: T) {
        let mut sums = self.numerator.row_mut(row);
        let sums = sums.as_slice_mut().unwrap_or_default();
        let scalars = (&mut self.denominator[row], &mut self.log_scale[row]);
        add_sums(sums, scalars, numerator, denominator, log_scale);
    }

    /// Writes numerator / denominator of each query to `out [n, value_dim]`.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if `out` has another shape, [`Error::Normalizer`] if a denominator is zero
    /// or too small to divide by, [`Error::Overflow`] if a sum is not finite. The content of `out`
    /// is then unspecified.
    pub fn normalize_into(&self, mut out: ArrayViewMut2<'_, T>) -> Result<(), Error> {
        check::size("out", "rows", self.numerator.nrows(), out.nrows())?;
        check::size("out", "columns", self.numerator.ncols(), out.ncols())?;
        for (row, mut out) in out.outer_iter_mut().enumerate() {
            let factor = divisor(self.denominator[row], row)?.recip();
            out.zip_mut_with(&self.numerator.row(row), |out, &sum| *out = sum * factor);
            if !check::row_is_finite(out.view()) {
                return Err(Error::Overflow { which: "the weighted sum of values", row });
            }
        }
        Ok(())
    }
}

/// A [`Partial`] in the making, as inner loops want it: `numerator [tokens, value_dim]` with padded
/// rows, and room beyond the tokens.
#[derive(Debug)]
pub(crate) struct Answer<T> {
    pub(crate) numerator: Buffer<T>,
    pub(crate) denominator: Buffer<T>,
    pub(crate) log_scale: Buffer<T>,
    factors: Buffer<T>,
    pub(crate) tokens: usize,
}

impl<T: Scalar> Answer<T> {
    pub(crate) fn new() -> Self {
        Self {
            numerator: Buffer::new(),
            denominator: Buffer::new(),
            log_scale: Buffer::new(),
            factors: Buffer::new(),
            tokens: 0,
        }
    }

    pub(crate) fn resize(&mut self, tokens: usize, width: usize, stride: usize) {
        self.tokens = tokens;
        self.numerator.resize(tokens * stride);
        self.denominator.resize(width);
        self.log_scale.resize(width);
    }

    /// Sets the log scales; returns whether every normaliser can be divided by.
    pub(crate) fn set_scales(&mut self, query_scale: &[T], unit: T) -> bool {
        self.log_scale
            .iter_mut()
            .zip(query_scale)
            .for_each(|(log_scale, &query)| *log_scale = query + unit);
        self.denominator
            .iter()
            .take(self.tokens)
            .all(|&denominator| divisor(denominator, 0).is_ok())
    }

    /// Writes the rows to `out`, normalised or in absolute terms; errors count rows from
    /// `first_row`.
    pub(crate) fn write(
        &mut self,
        first_row: usize,
        readout: Readout,
        mut out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        let value_dim = out.ncols();
        let stride = padded::<T>(value_dim);
        self.factors.resize(self.tokens);
        for (t, factor) in self.factors.iter_mut().enumerate() {
            *factor = match readout {
                Readout::Normalized => divisor(self.denominator[t], first_row + t)?.recip(),
                // in two steps: the factor alone may leave the range of a product that does not
                Readout::Unnormalized => (self.log_scale[t] * T::from_f64(0.5)).exp(),
            };
        }
        if readout == Readout::Unnormalized {
            columns::scale_rows_in_place(&mut self.numerator, stride, &self.factors);
        }
        let finite = if let Some(out) = out.as_slice_mut() {
            columns::scale_rows(&self.numerator, stride, &self.factors, value_dim, out)
        } else {
            columns::scale_rows_in_place(&mut self.numerator, stride, &self.factors);
            for (mut out, row) in out.outer_iter_mut().zip(self.numerator.chunks_exact(stride)) {
                out.iter_mut().zip(row).for_each(|(out, &sum)| *out = sum);
            }
            kernel::all_finite(&self.numerator)
        };
        if finite {
            return Ok(());
        }
        let row = out.outer_iter().position(|row| !check::row_is_finite(row)).unwrap_or(0);
        Err(Error::Overflow { which: "the weighted sum of values", row: first_row + row })
    }
}

impl<T: Scalar> Answer<T> {
    /// Adds one row of sums of other tokens.
    pub(crate) fn add_row(&mut self, row: usize, numerator: &[T], denominator: T, log_scale: T) {
        let stride = self.numerator.len() / self.tokens;
        let sums = &mut self.numerator[row * stride..(row + 1) * stride];
        let scalars = (&mut self.denominator[row], &mut self.log_scale[row]);
        add_sums(sums, scalars, numerator, denominator, log_scale);
    }

    /// The first row whose denominator is not finite: a score has overflowed.
    pub(crate) fn first_overflow(&self) -> Option<usize> {
        self.denominator.iter().take(self.tokens).position(|denominator| !denominator.is_finite())
    }

    /// Merges the rows into `answer` from row `first` on.
    pub(crate) fn add_to(&self, answer: &mut Partial<T>, first: usize) {
        let value_dim = answer.numerator.ncols();
        for (i, numerator) in self.numerator.chunks_exact(padded::<T>(value_dim)).enumerate() {
            answer.add(first + i, &numerator[..value_dim], self.denominator[i], self.log_scale[i]);
        }
    }
}

/// Adds sums of other tokens to those of a row: both are brought to the larger log scale.
fn add_sums<T: Scalar>(
    sums: &mut [T],
    (sum_of_weights, unit): (&mut T, &mut T),
    numerator: &[T],
    denominator: T,
    log_scale: T,
) {
    if log_scale == T::neg_infinity() {
        return;
    }
    let common = unit.max(log_scale);
    let (old, new) = ((*unit - common).exp(), (log_scale - common).exp());
    if old != T::one() {
        kernel::scale(sums, old);
    }
    kernel::add_scaled(sums, new, numerator);
    *sum_of_weights = *sum_of_weights * old + denominator * new;
    *unit = common;
}

/// Whether sums are divided by the sum of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Readout {
    Normalized,
    Unnormalized,
}

/// A denominator that can be divided by: finite, and large enough for its terms to have kept their
/// digits.
pub(crate) fn divisor<T: Scalar>(denominator: T, row: usize) -> Result<T, Error> {
    if !denominator.is_finite() {
        return Err(Error::Overflow { which: "the normaliser", row });
    }
    // Terms below the smallest normal number are lost; a thousand of them stay below one unit of
    // this.
    let smallest = T::min_positive_value() / T::epsilon() * T::from_f64(1024.0);
    if denominator.abs() < smallest { Err(Error::Normalizer { row }) } else { Ok(denominator) }
}

/// A set of tokens that absorbs (key, value) pairs and answers queries with partial sums.
///
/// An exact memory keeps the pairs, a linear memory a sum of features; several memories under one
/// normaliser make a hybrid. Implement it to bring a memory of your own.
pub trait Memory<T: Scalar>: Debug + Send {
    /// Takes `k [n, d]` and `v [n, value_dim]` in.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`], [`Error::NotFinite`], [`Error::Overflow`]. The memory is then unchanged.
    fn absorb(&mut self, k: ArrayView2<'_, T>, v: ArrayView2<'_, T>) -> Result<(), Error>;

    /// Merges this memory's sums for the queries `q [n, d]` into `answer`.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`], [`Error::NotFinite`], [`Error::Overflow`]. The content of `answer` is then
    /// unspecified.
    fn read(&self, q: ArrayView2<'_, T>, answer: &mut Partial<T>) -> Result<(), Error>;

    /// Tokens absorbed so far.
    fn len(&self) -> usize;

    /// Whether no token has been absorbed.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The size of the memory now, in numbers of type `T`.
    fn state_floats(&self) -> usize;

    /// Forgets every token.
    fn reset(&mut self);

    /// A copy with a state of its own. `Box<dyn Memory<T>>` is [`Clone`] through it.
    fn clone_box(&self) -> Box<dyn Memory<T>>;

    /// Told after a read of `q [n, d]` what all memories under the common normaliser came to:
    /// `log_normalizer [n]`, the logarithms of the sums of all weights. So an entry with weight w
    /// received the probability `w·e^{−log_normalizer}`, and a memory can learn what is asked for.
    /// It does nothing unless overridden.
    fn received(&mut self, q: ArrayView2<'_, T>, log_normalizer: ArrayView1<'_, T>) {
        let _ = (q, log_normalizer);
    }
}

impl<T: Scalar> Clone for Box<dyn Memory<T>> {
    fn clone(&self) -> Self {
        self.clone_box()
    }
}
