//! Maps in the layout of the inner loops, tokens as columns, and what they share.

use crate::check;
use crate::error::Error;
use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::{self, chunk_len};
use crate::scalar::Scalar;
use crate::views;
use core::fmt::Debug;
use ndarray::{ArrayView2, ArrayViewMut1, ArrayViewMut2};

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

/// [`FeatureMap::map_queries`](crate::FeatureMap::map_queries) of a column map: checks, and
/// transposes there and back.
pub(crate) fn map_by_columns<T: Scalar>(
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

/// What brings a largest absolute value near one, and the logarithm of its inverse.
fn normal_factor<T: Scalar>(largest: T) -> (T, T) {
    if largest <= T::one() && (largest >= T::from_f64(1.0 / 1024.0) || largest == T::zero()) {
        return (T::one(), T::zero());
    }
    // The inverse of a number below the normal ones would be infinite.
    let normal = largest.max(T::min_positive_value());
    (normal.recip(), normal.ln())
}

/// Brings columns to a largest absolute value near one and adds the logarithm of what was taken
/// out; a column of zeros stays as it is.
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
