//! Partial sums over tokens, which merge exactly in any order.

use crate::check;
use crate::error::{Error, SUM_OF_VALUES};
use crate::kernel;
use crate::scalar::Scalar;
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut2};

/// What a set of tokens answers to `n` queries: for each a numerator (`value_dim` numbers), a
/// denominator and one log scale.
///
/// ```text
/// e^{log_scale}·(numerator, denominator) = Σ_j w(q, k_j)·(v_j, 1)
/// ```
///
/// Partial sums of disjoint sets of tokens merge exactly, in any order: both are brought to the log
/// scale of the one that weighs more and added. Nothing overflows, whatever the weights, and sums
/// of no weight change nothing, whatever their log scale.
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
                return Err(Error::Overflow { which: SUM_OF_VALUES, row });
            }
        }
        Ok(())
    }
}

/// Adds sums of other tokens to those of a row. Both are brought to the log scale of the one that
/// weighs more: the one with the larger `|denominator|·e^{log_scale}`. A log scale alone says
/// little: sums without any weight may have a large one.
pub(crate) fn add_sums<T: Scalar>(
    sums: &mut [T],
    (sum_of_weights, own_scale): (&mut T, &mut T),
    numerator: &[T],
    denominator: T,
    log_scale: T,
) {
    if is_nothing(numerator, denominator, log_scale) {
        return;
    }
    if is_nothing(sums, *sum_of_weights, *own_scale) {
        let (values, rest) = sums.split_at_mut(numerator.len().min(sums.len()));
        values.copy_from_slice(&numerator[..values.len()]);
        rest.fill(T::zero());
        (*sum_of_weights, *own_scale) = (denominator, log_scale);
        return;
    }
    let weight = |denominator: T, log_scale: T| denominator.abs().ln() + log_scale;
    let (own, other) = (weight(*sum_of_weights, *own_scale), weight(denominator, log_scale));
    // of two that are zero, where terms have cancelled, the larger log scale
    let other_is_more = other > own || (other == own && log_scale > *own_scale);
    let common = if other_is_more { log_scale } else { *own_scale } + room(sums, numerator);
    let [first, second] = factors(*own_scale - common);
    for factor in [first, second] {
        if factor != T::one() {
            kernel::scale(sums, factor);
            *sum_of_weights *= factor;
        }
    }
    let [first, second] = factors(log_scale - common);
    *sum_of_weights += denominator * first * second;
    if second == T::one() {
        kernel::add_scaled(sums, first, numerator);
    } else {
        sums.iter_mut().zip(numerator).for_each(|(sum, &x)| *sum += x * first * second);
    }
    *own_scale = common;
}

/// What to add to a log scale so that two sums together stay in the range of the type.
fn room<T: Scalar>(sums: &[T], others: &[T]) -> T {
    let limit = T::max_value() * T::from_f64(0.25);
    let is_near = kernel::max_abs(sums).max(kernel::max_abs(others)) > limit;
    if is_near { T::from_f64(core::f64::consts::LN_2 * 16.0) } else { T::zero() }
}

/// Whether sums have no weight at all.
fn is_nothing<T: Scalar>(numerator: &[T], denominator: T, log_scale: T) -> bool {
    log_scale == T::neg_infinity()
        || (denominator == T::zero() && numerator.iter().all(|x| *x == T::zero()))
}

/// Two factors whose product is `e^difference`, which alone may leave the range of the type where
/// what it is multiplied with does not.
fn factors<T: Scalar>(difference: T) -> [T; 2] {
    let whole = difference.exp();
    if whole.is_finite() {
        return [whole, T::one()];
    }
    let half = (difference * T::from_f64(0.5)).exp();
    [half, half]
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
