//! Feature maps that are another map inside: pointers, and types of this crate on maps of columns.

use crate::error::Error;
use crate::features::FeatureMap;
use crate::features::columns::{ColumnMap, Columns, check_map};
use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::{self, chunk_len};
use crate::scalar::Scalar;
use crate::views;
use ndarray::{ArrayView2, ArrayViewMut1, ArrayViewMut2};
use std::sync::Arc;

/// Implements [`FeatureMap`] for a type by a reference to a map inside.
macro_rules! features_by {
    ([$($generics:tt)*] $type:ty, $this:ident => $map:expr) => {
        impl<$($generics)*> $crate::features::FeatureMap<T> for $type {
            fn head_dim(&self) -> usize {
                let $this = self;
                $crate::features::FeatureMap::<T>::head_dim($map)
            }

            fn num_features(&self) -> usize {
                let $this = self;
                $crate::features::FeatureMap::<T>::num_features($map)
            }

            fn map_queries(
                &self,
                x: ndarray::ArrayView2<'_, T>,
                values: ndarray::ArrayViewMut2<'_, T>,
                log_scale: ndarray::ArrayViewMut1<'_, T>,
            ) -> Result<(), $crate::error::Error> {
                let $this = self;
                $crate::features::FeatureMap::map_queries($map, x, values, log_scale)
            }

            fn map_keys(
                &self,
                x: ndarray::ArrayView2<'_, T>,
                values: ndarray::ArrayViewMut2<'_, T>,
                log_scale: ndarray::ArrayViewMut1<'_, T>,
            ) -> Result<(), $crate::error::Error> {
                let $this = self;
                $crate::features::FeatureMap::map_keys($map, x, values, log_scale)
            }

            fn column_map(&self) -> Option<&dyn $crate::features::columns::ColumnMap<T>> {
                let $this = self;
                $crate::features::FeatureMap::column_map($map)
            }
        }
    };
}
pub(crate) use features_by;

features_by!([T: Scalar, F: FeatureMap<T> + ?Sized] Arc<F>, this => &**this);
features_by!([T: Scalar, F: FeatureMap<T> + ?Sized] Box<F>, this => &**this);

/// A map of columns takes rows by transposing there and back.
#[doc(hidden)]
impl<T: Scalar> FeatureMap<T> for dyn ColumnMap<T> + '_ {
    fn head_dim(&self) -> usize {
        ColumnMap::head_dim(self)
    }

    fn num_features(&self) -> usize {
        ColumnMap::num_features(self)
    }

    fn map_queries(
        &self,
        x: ArrayView2<'_, T>,
        mut values: ArrayViewMut2<'_, T>,
        mut log_scale: ArrayViewMut1<'_, T>,
    ) -> Result<(), Error> {
        let (head_dim, num_features) = (ColumnMap::head_dim(self), ColumnMap::num_features(self));
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
            let mut columns = Columns {
                x: &vectors,
                squares: &squares,
                width,
                tokens,
                values: &mut features,
                log_scale: &mut scales,
            };
            self.map_columns(&mut columns, &mut scratch).map_err(|error| error.in_chunk(start))?;
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

    fn column_map(&self) -> Option<&dyn ColumnMap<T>> {
        Some(self)
    }
}
