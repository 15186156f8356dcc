//! Feature maps that are another map inside: pointers, and types of this crate on maps of columns.

use crate::check;
use crate::error::Error;
use crate::features::columns::{ColumnGradient, ColumnMap, Columns, check_map};
use crate::features::gradient::MapGradient;
use crate::features::side::Side;
use crate::features::sums::ProjectionSums;
use crate::features::{FeatureMap, NO_GRADIENT};
use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::{self, chunk_len};
use crate::scalar::Scalar;
use crate::views;
use ndarray::{ArrayView2, ArrayViewMut1, ArrayViewMut2};
use std::sync::Arc;

/// Implements [`FeatureMap`] for a type by a reference to a map inside.
macro_rules! features_by {
    // a pointer to a map
    ([$($generics:tt)*] $type:ty, $this:ident => $map:expr) => {
        features_by!(@ [$($generics)*] $type, $this => $map, {
            fn backward(
                &self,
                gradient: $crate::features::gradient::MapGradient<'_, T>,
            ) -> Result<(), $crate::error::Error> {
                let $this = self;
                $crate::features::FeatureMap::backward($map, gradient)
            }

            fn parameters(&self) -> $crate::parameters::Parameters<T> {
                let $this = self;
                $crate::features::FeatureMap::parameters($map)
            }

            fn with_parameters(
                &self,
                parameters: &$crate::parameters::Parameters<T>,
            ) -> Result<Box<dyn $crate::features::FeatureMap<T>>, $crate::error::Error> {
                let $this = self;
                $crate::features::FeatureMap::with_parameters($map, parameters)
            }

            fn logits(&self) -> Option<$crate::features::logits::Logits<T>> {
                let $this = self;
                $crate::features::FeatureMap::logits($map)
            }

            fn add_parameters(
                &self,
                sums: [&$crate::features::sums::ProjectionSums<T>; 2],
                d_parameters: &mut $crate::parameters::Parameters<T>,
            ) {
                let $this = self;
                $crate::features::FeatureMap::add_parameters($map, sums, d_parameters);
            }
        });
    };
    // a type on a map of columns, with what it says of its parameters
    ([$($generics:tt)*] $type:ty, $this:ident => $map:expr, { $($parameters:item)* }) => {
        features_by!(@ [$($generics)*] $type, $this => $map, {
            fn backward(
                &self,
                gradient: $crate::features::gradient::MapGradient<'_, T>,
            ) -> Result<(), $crate::error::Error> {
                $crate::features::delegate::backward_by_columns(self, gradient)
            }

            $($parameters)*
        });
    };
    (@ [$($generics:tt)*] $type:ty, $this:ident => $map:expr, { $($items:item)* }) => {
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

            fn column_map(
                &self,
                side: $crate::features::side::Side,
            ) -> Option<&dyn $crate::features::columns::ColumnMap<T>> {
                let $this = self;
                $crate::features::FeatureMap::column_map($map, side)
            }

            $($items)*
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

    fn column_map(&self, _: Side) -> Option<&dyn ColumnMap<T>> {
        Some(self)
    }
}

/// The backward pass of a map of columns, chunk after chunk.
pub(crate) fn backward_by_columns<T: Scalar>(
    map: &dyn FeatureMap<T>,
    gradient: MapGradient<'_, T>,
) -> Result<(), Error> {
    let Some(columns) = map.column_map(gradient.side) else { return Err(NO_GRADIENT) };
    let (head_dim, num_features) = (map.head_dim(), map.num_features());
    gradient.check(head_dim, num_features)?;
    let MapGradient { side, x, values, d_values, mut d_x, d_parameters, .. } = gradient;
    let mut sums = [ProjectionSums::new(), ProjectionSums::new()];
    let own = &mut sums[usize::from(side == Side::Key)];
    if d_parameters.is_some() {
        own.reset(columns.projected(), head_dim);
    }
    let width = padded::<T>(x.nrows().min(chunk_len::<T>()));
    let [mut x_columns, mut d_x_columns] = [(); 2].map(|()| Buffer::zeros(head_dim * width));
    let [mut features, mut d_features] = [(); 2].map(|()| Buffer::zeros(num_features * width));
    let (mut squares, mut scratch) = (Buffer::zeros(width), [Buffer::new(), Buffer::new()]);
    for start in (0..x.nrows()).step_by(chunk_len::<T>()) {
        let rows = start..x.nrows().min(start + chunk_len::<T>());
        for (from, to) in
            [(x, &mut x_columns), (values, &mut features), (d_values, &mut d_features)]
        {
            views::to_columns(views::rows(from, rows.clone()), T::one(), &mut squares, to);
        }
        let mut gradient = ColumnGradient {
            x: &x_columns,
            width,
            tokens: rows.len(),
            values: &features,
            d_values: &mut d_features,
            d_x: &mut d_x_columns,
        };
        let own = d_parameters.is_some().then_some(&mut *own);
        columns.backward_columns(side, &mut gradient, own, &mut scratch);
        for (t, mut row) in views::rows_mut(d_x.view_mut(), rows).outer_iter_mut().enumerate() {
            let column = d_x_columns[t..].iter().step_by(width);
            row.iter_mut().zip(column).for_each(|(sum, &x)| *sum += x);
        }
    }
    if let Some(d_parameters) = d_parameters {
        map.add_parameters(sums.each_ref(), d_parameters);
    }
    check::gradient("the gradient by `x`", d_x.view())
}
