//! Feature maps φ with `exp(x·y) ≈ φ_q(x)·φ_k(y)`: the trait, and what the maps share.

pub(crate) mod dct;
pub(crate) mod dense;
pub(crate) mod elementwise;
pub(crate) mod performer;
pub(crate) mod taylor;
pub(crate) mod wpff;

use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::{self, chunk_len};
use crate::{Error, Scalar, check, views};
use core::fmt::Debug;
use ndarray::{Array1, ArrayView2, ArrayViewMut1, ArrayViewMut2};
use std::sync::Arc;

/// A map from `head_dim` numbers to `num_features` features whose products estimate `exp(x·y)`:
///
/// ```text
/// exp(x·y) ≈ Σ_i φ_q(x)_i φ_k(y)_i,     φ(x)_i = values_i·e^{log_scale}.
/// ```
///
/// The estimate is in absolute terms: the factor `e^{−|x|²/2}` of the exponential maps is part of
/// the log scale. A log scale per row keeps the values near one, so that nothing overflows for any
/// norm. Maps get *scaled* vectors: [`LinearAttention`](crate::LinearAttention) multiplies by
/// `√scale` first.
///
/// Maps are immutable and cheap to share; `Arc<F>` and `Box<F>` are maps where `F` is one.
///
/// # Implementing it
///
/// Write every element of `values [n, num_features]` and `log_scale [n]` (they may hold anything
/// before), in terms of row `i` of `x [n, head_dim]` alone: a value that depends on other rows
/// leaks the future. Values must be finite.
///
/// ```
/// use dijiang::{Attention, Error, FeatureMap, LinearAttention, Mask};
/// use ndarray::{Array2, ArrayView2, ArrayViewMut1, ArrayViewMut2};
///
/// /// φ(x) = exp(x), element by element.
/// #[derive(Debug)]
/// struct Exponential(usize);
///
/// impl FeatureMap<f32> for Exponential {
///     fn head_dim(&self) -> usize {
///         self.0
///     }
///     fn num_features(&self) -> usize {
///         self.0
///     }
///     fn map_queries(
///         &self,
///         x: ArrayView2<f32>,
///         mut values: ArrayViewMut2<f32>,
///         mut log_scale: ArrayViewMut1<f32>,
///     ) -> Result<(), Error> {
///         for ((x, mut values), log_scale) in
///             x.outer_iter().zip(values.outer_iter_mut()).zip(&mut log_scale)
///         {
///             *log_scale = x.fold(f32::NEG_INFINITY, |m, &a| m.max(a));
///             values.zip_mut_with(&x, |value, a| *value = (a - *log_scale).exp());
///         }
///         Ok(())
///     }
/// }
///
/// let kernel = LinearAttention::new(Exponential(4));
/// let ones = Array2::ones((3, 4));
/// assert_eq!(kernel.forward(ones.view(), ones.view(), ones.view(), Mask::Causal)?, ones);
/// # Ok::<(), Error>(())
/// ```
pub trait FeatureMap<T: Scalar>: Debug + Send + Sync {
    /// Columns of the vectors it maps.
    fn head_dim(&self) -> usize;

    /// Features of one vector.
    fn num_features(&self) -> usize;

    /// Maps the rows of `x [n, head_dim]` as queries, into `values [n, num_features]` and
    /// `log_scale [n]`.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if a shape differs, [`Error::NotFinite`] if `x` holds NaN or infinity,
    /// [`Error::Overflow`] if a row is too large for `T` (its squared norm overflows). The content
    /// of the outputs is then unspecified.
    fn map_queries(
        &self,
        x: ArrayView2<'_, T>,
        values: ArrayViewMut2<'_, T>,
        log_scale: ArrayViewMut1<'_, T>,
    ) -> Result<(), Error>;

    /// Maps the rows of `x` as keys; the same as [`map_queries`](Self::map_queries) unless
    /// overridden.
    ///
    /// # Errors
    ///
    /// As [`map_queries`](Self::map_queries).
    fn map_keys(
        &self,
        x: ArrayView2<'_, T>,
        values: ArrayViewMut2<'_, T>,
        log_scale: ArrayViewMut1<'_, T>,
    ) -> Result<(), Error> {
        self.map_queries(x, values, log_scale)
    }

    /// The same map on tokens as columns, which maps of this crate have.
    #[doc(hidden)]
    fn column_map(&self) -> Option<&dyn ColumnMap<T>> {
        None
    }
}

/// Whether queries or keys are mapped.
#[derive(Clone, Copy)]
pub(crate) enum Side {
    Query,
    Key,
}

impl Side {
    /// The argument.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Query => "q",
            Self::Key => "k",
        }
    }

    pub(crate) fn map<T: Scalar>(
        self,
        map: &(impl FeatureMap<T> + ?Sized),
        x: ArrayView2<'_, T>,
        values: ArrayViewMut2<'_, T>,
        log_scale: ArrayViewMut1<'_, T>,
    ) -> Result<(), Error> {
        match self {
            Self::Query => map.map_queries(x, values, log_scale),
            Self::Key => map.map_keys(x, values, log_scale),
        }
    }
}

/// A map, the same for queries and keys, in the layout of the inner loops: tokens as columns.
pub trait ColumnMap<T: Scalar>: Debug + Send + Sync {
    /// Maps the first `tokens` columns of `x [head_dim, width]` to those of
    /// `values [num_features, width]` and to `log_scale [width]`. The other columns of `x` are
    /// zero, those of the outputs unspecified. `width` is a multiple of 64 bytes' numbers; or it is
    /// 1, then `values` has room for its padded length.
    ///
    /// `squares [width]` are the squared norms of the columns; a width of 1 does not need them. The
    /// vectors are finite. Features become finite, of a maximum between 1/1024 and 1024 in each
    /// column.
    ///
    /// # Errors
    ///
    /// [`Error::Overflow`] with the column as row.
    #[allow(clippy::too_many_arguments)]
    fn map_columns(
        &self,
        x: &[T],
        squares: &[T],
        width: usize,
        tokens: usize,
        values: &mut [T],
        log_scale: &mut [T],
        scratch: &mut [Buffer<T>; 2],
    ) -> Result<(), Error>;

    /// Maps two vectors, as [`map_columns`](Self::map_columns) with width 1.
    ///
    /// # Errors
    ///
    /// Those of [`map_columns`](Self::map_columns) for either.
    fn map_pair(
        &self,
        x: [&[T]; 2],
        [first, second]: [&mut [T]; 2],
        log_scale: [&mut [T]; 2],
        scratch: &mut [Buffer<T>; 2],
    ) -> Result<(), Error> {
        self.map_columns(x[0], &[], 1, 1, first, log_scale[0], scratch)?;
        self.map_columns(x[1], &[], 1, 1, second, log_scale[1], scratch)
    }
}

/// [`FeatureMap::map_queries`] of a column map: checks, and transposes there and back.
fn map_by_columns<T: Scalar>(
    map: &dyn ColumnMap<T>,
    num_features: usize,
    head_dim: usize,
    x: ArrayView2<'_, T>,
    mut values: ArrayViewMut2<'_, T>,
    mut log_scale: ArrayViewMut1<'_, T>,
) -> Result<(), Error> {
    check_map(head_dim, num_features, x, &values, &log_scale)?;
    let width = padded::<T>(x.nrows().min(chunk_len::<T>()));
    let (mut vectors, mut features) =
        (Buffer::zeros(head_dim * width), Buffer::zeros(num_features * width));
    let mut squares = Buffer::zeros(width);
    let (mut scales, mut scratch) = (Buffer::zeros(width), [Buffer::new(), Buffer::new()]);
    let stride = padded::<T>(num_features);
    let (mut copy, mut unused) = (Buffer::zeros(width * stride), Buffer::zeros(stride));
    for start in (0..x.nrows()).step_by(chunk_len::<T>()) {
        let rows = start..x.nrows().min(start + chunk_len::<T>());
        let tokens = rows.len();
        views::to_columns(views::rows(x, rows.clone()), T::one(), &mut squares, &mut vectors);
        map.map_columns(
            &vectors,
            &squares,
            width,
            tokens,
            &mut features,
            &mut scales,
            &mut scratch,
        )
        .map_err(|error| error.in_chunk(start))?;
        kernel::transpose(
            num_features,
            &|i| &features[i * width..(i + 1) * width],
            T::one(),
            &mut unused,
            &mut copy,
        );
        for (mut row, copy) in views::rows_mut(values.view_mut(), rows.clone())
            .outer_iter_mut()
            .zip(copy.chunks(stride))
        {
            row.iter_mut().zip(copy).for_each(|(value, &new)| *value = new);
        }
        log_scale
            .iter_mut()
            .skip(start)
            .zip(&scales[..tokens])
            .for_each(|(scale, &new)| *scale = new);
    }
    Ok(())
}

macro_rules! map_behind_pointer {
    ($pointer:ident) => {
        impl<T: Scalar, F: FeatureMap<T> + ?Sized> FeatureMap<T> for $pointer<F> {
            fn head_dim(&self) -> usize {
                (**self).head_dim()
            }

            fn num_features(&self) -> usize {
                (**self).num_features()
            }

            fn map_queries(
                &self,
                x: ArrayView2<'_, T>,
                values: ArrayViewMut2<'_, T>,
                log_scale: ArrayViewMut1<'_, T>,
            ) -> Result<(), Error> {
                (**self).map_queries(x, values, log_scale)
            }

            fn map_keys(
                &self,
                x: ArrayView2<'_, T>,
                values: ArrayViewMut2<'_, T>,
                log_scale: ArrayViewMut1<'_, T>,
            ) -> Result<(), Error> {
                (**self).map_keys(x, values, log_scale)
            }

            fn column_map(&self) -> Option<&dyn ColumnMap<T>> {
                (**self).column_map()
            }
        }
    };
}
map_behind_pointer!(Arc);
map_behind_pointer!(Box);

/// Checks the arguments of a map.
fn check_map<T: Scalar>(
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
fn largest_of_columns<T: Scalar>(x: &[T], out: &mut [T]) {
    if let [largest] = out {
        *largest = kernel::max(x);
        return;
    }
    out.fill(T::neg_infinity());
    for row in x.chunks_exact(out.len()) {
        out.iter_mut().zip(row).for_each(|(largest, &x)| *largest = largest.max(x));
    }
}

/// Weights D of the features of an exponential map, and the `−½ ln m` of its log scales.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Weights<T> {
    weights: Array1<T>,
    common: T,
}

impl<T: Scalar> Weights<T> {
    /// D = 1.
    fn ones(num_features: usize) -> Self {
        Self::scaled(Array1::ones(num_features))
    }

    /// D = 1 for features that are not divided by √m.
    fn unscaled(num_features: usize) -> Self {
        Self { weights: Array1::ones(num_features), common: T::zero() }
    }

    /// D as given: as many as features, none negative, not all zero.
    fn new(num_features: usize, weights: Array1<T>) -> Result<Self, Error> {
        check::size("weights", "elements", num_features, weights.len())?;
        if let Some((_, bad)) =
            weights.indexed_iter().find(|(_, w)| !(w.is_finite() && **w >= T::zero()))
        {
            return Err(Error::InvalidOption {
                which: "weights",
                found: bad.to_string(),
                needed: "finite numbers that are not negative",
            });
        }
        if weights.iter().all(|w| *w == T::zero()) {
            return Err(Error::InvalidOption {
                which: "weights",
                found: "all zero".to_owned(),
                needed: "positive for at least one feature",
            });
        }
        Ok(Self::scaled(weights))
    }

    #[allow(clippy::cast_precision_loss)]
    fn scaled(weights: Array1<T>) -> Self {
        let common = T::from_f64(-0.5 * libm::log(weights.len() as f64));
        Self { weights, common }
    }
}
