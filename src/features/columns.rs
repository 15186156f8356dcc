//! Maps in the layout of the inner loops, tokens as columns, and what they share.

use crate::check;
use crate::error::Error;
use crate::features::side::Side;
use crate::features::sums::ProjectionSums;
use crate::kernel;
use crate::kernel::buffer::Buffer;
use crate::scalar::Scalar;
use core::fmt::Debug;
use ndarray::{ArrayView2, ArrayViewMut1, ArrayViewMut2};

/// Vectors as columns, and room for their features.
///
/// The columns behind the vectors are zero in `x` and unspecified in what is written.
#[derive(Debug)]
pub struct Columns<'a, T> {
    /// The vectors, `[head_dim, width]`, which are finite.
    pub x: &'a [T],
    /// Their squared norms, `[width]`; a width of 1 does not need them.
    pub squares: &'a [T],
    /// Columns: a multiple of 64 bytes' numbers; or 1, and then `values` has room for its padded
    /// length.
    pub width: usize,
    /// How many of the columns are vectors: the first.
    pub tokens: usize,
    /// Their features, `[num_features, width]`.
    pub values: &'a mut [T],
    /// The log scales of their features, `[width]`.
    pub log_scale: &'a mut [T],
}

impl<'a, T> Columns<'a, T> {
    /// One vector.
    pub(crate) fn one(x: &'a [T], values: &'a mut [T], log_scale: &'a mut [T]) -> Self {
        Self { x, squares: &[], width: 1, tokens: 1, values, log_scale }
    }

    /// The same for a while, without the room behind so many features.
    pub(crate) fn with_features(&mut self, num_features: usize) -> Columns<'_, T> {
        let values = &mut self.values[..num_features * self.width];
        Columns { values, log_scale: &mut *self.log_scale, ..*self }
    }
}

/// Vectors as columns that have been mapped, and the gradients by their features.
#[derive(Debug)]
pub struct ColumnGradient<'a, T> {
    /// The vectors, `[head_dim, width]`.
    pub x: &'a [T],
    /// Columns, a multiple of 64 bytes' numbers.
    pub width: usize,
    /// How many of the columns are vectors: the first.
    pub tokens: usize,
    /// Their features, `[num_features, width]`.
    pub values: &'a [T],
    /// The gradients by the features, times `e^{log_scale}`: `[num_features, width]`, zero beyond
    /// the vectors. They may be changed.
    pub d_values: &'a mut [T],
    /// Where the gradients by the vectors go, `[head_dim, width]`, over what was there.
    pub d_x: &'a mut [T],
}

/// A map, the same for queries and keys, in the layout of the inner loops: tokens as columns.
pub trait ColumnMap<T: Scalar>: Debug + Send + Sync {
    /// Numbers of a vector.
    fn head_dim(&self) -> usize;

    /// Features of a vector.
    fn num_features(&self) -> usize;

    /// Maps vectors. Features become finite, of a maximum between 1/1024 and 1024 in each column.
    ///
    /// # Errors
    ///
    /// [`Error::Overflow`] with the column as row.
    fn map_columns(
        &self,
        columns: &mut Columns<'_, T>,
        scratch: &mut [Buffer<T>; 2],
    ) -> Result<(), Error>;

    /// Maps two vectors, each of width 1, as [`map_columns`](Self::map_columns) does.
    ///
    /// # Errors
    ///
    /// Those of [`map_columns`](Self::map_columns) for either.
    fn map_pair(
        &self,
        [first, second]: [&mut Columns<'_, T>; 2],
        scratch: &mut [Buffer<T>; 2],
    ) -> Result<(), Error> {
        self.map_columns(first, scratch)?;
        self.map_columns(second, scratch)
    }

    /// The matrix Ω of an exponential map `φ_i(x) = D_i·exp(ω_i·x − |x|²/2)/√m`, `[num_features,
    /// head_dim]` with padded rows, where its gradient is best computed with it: see
    /// [`exponential_rows`](crate::features::exponential::exponential_rows).
    fn omega(&self) -> Option<&[T]> {
        None
    }

    /// Logits that the vectors are projected to by parameters; 0 if there are none.
    fn projected(&self) -> usize {
        0
    }

    /// The gradients by vectors and, where there are sums for them, by parameters.
    fn backward_columns(
        &self,
        side: Side,
        gradient: &mut ColumnGradient<'_, T>,
        sums: Option<&mut ProjectionSums<T>>,
        scratch: &mut [Buffer<T>; 2],
    );
}

/// Checks the arguments of a map.
pub(crate) fn check_map<T: Scalar>(
    head_dim: usize,
    num_features: usize,
    x: ArrayView2<'_, T>,
    values: &ArrayViewMut2<'_, T>,
    log_scale: &ArrayViewMut1<'_, T>,
) -> Result<(), Error> {
    check::size("x", "columns", head_dim, x.ncols())?;
    check::size("values", "rows", x.nrows(), values.nrows())?;
    check::size("values", "columns", num_features, values.ncols())?;
    check::size("log_scale", "rows", x.nrows(), log_scale.len())?;
    check::finite("x", x)
}

/// The largest element of every column.
///
/// Not inlined, as [`take_maxima`]: as arguments, slices are known not to overlap, which those of a
/// [`Columns`] are not, and the loops over rows need no check for that.
#[inline(never)]
pub(crate) fn largest_of_columns<T: Scalar>(x: &[T], out: &mut [T]) {
    if let [largest] = out {
        *largest = kernel::max(x);
        return;
    }
    out.fill(T::neg_infinity());
    for row in x.chunks_exact(out.len()) {
        out.iter_mut().zip(row).for_each(|(largest, &x)| *largest = largest.max(x));
    }
}

/// The log scale of features that are all zero: they weigh nothing, and must not move the log scale
/// of any sums. It is finite, so that differences of two are.
pub(crate) const OF_NOTHING: f64 = -1e30;

/// What brings a largest absolute value near one, and the logarithm of its inverse.
fn normal_factor<T: Scalar>(largest: T) -> (T, T) {
    if largest == T::zero() {
        return (T::one(), T::from_f64(OF_NOTHING));
    }
    if largest <= T::one() && largest >= T::from_f64(1.0 / 1024.0) {
        return (T::one(), T::zero());
    }
    // The inverse of a number below the normal ones would be infinite.
    let normal = largest.max(T::min_positive_value());
    (normal.recip(), normal.ln())
}

/// The factors of [`take_maxima`] for columns that are a map's features as they are.
pub(crate) fn factors_of_columns<T: Scalar>(x: &[T], width: usize, factors: &mut Buffer<T>) {
    factors.resize(width);
    factors.fill(T::zero());
    for row in x.chunks_exact(width) {
        factors.iter_mut().zip(row).for_each(|(largest, &x)| *largest = largest.max(x.abs()));
    }
    factors.iter_mut().for_each(|factor| *factor = normal_factor(*factor).0);
}

/// Brings columns to a largest absolute value near one and adds the logarithm of what was taken
/// out; a column of zeros gets the log scale [`OF_NOTHING`].
#[inline(never)]
pub(crate) fn take_maxima<T: Scalar>(
    values: &mut [T],
    log_scale: &mut [T],
    scratch: &mut Buffer<T>,
) {
    if let [log_scale] = log_scale {
        let (factor, log) = normal_factor(kernel::max_abs(values));
        kernel::scale(values, factor);
        *log_scale += log;
        return;
    }
    scratch.resize(log_scale.len());
    scratch.fill(T::zero());
    for row in values.chunks_exact(scratch.len()) {
        scratch.iter_mut().zip(row).for_each(|(largest, &x)| *largest = largest.max(x.abs()));
    }
    for (factor, log_scale) in scratch.iter_mut().zip(log_scale) {
        let log;
        (*factor, log) = normal_factor(*factor);
        *log_scale += log;
    }
    for row in values.chunks_exact_mut(scratch.len()) {
        row.iter_mut().zip(&**scratch).for_each(|(value, &factor)| *value *= factor);
    }
}
