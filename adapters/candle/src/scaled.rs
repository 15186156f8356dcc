//! Features that come with their log scales.

use dijiang::ndarray::{ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis, Slice};
use dijiang::{Error, FeatureMap, MapGradient, Scalar};

/// The first columns of a vector are features, the last one their log scale.
#[derive(Debug)]
pub(crate) struct ScaledFeatures {
    features: usize,
}

impl ScaledFeatures {
    pub(crate) fn new(features: usize) -> Self {
        Self { features }
    }
}

impl<T: Scalar> FeatureMap<T> for ScaledFeatures {
    fn head_dim(&self) -> usize {
        self.features + 1
    }

    fn num_features(&self) -> usize {
        self.features
    }

    fn map_queries(
        &self,
        x: ArrayView2<'_, T>,
        mut values: ArrayViewMut2<'_, T>,
        mut log_scale: ArrayViewMut1<'_, T>,
    ) -> Result<(), Error> {
        values.assign(&x.slice_axis(Axis(1), Slice::from(..self.features)));
        log_scale.assign(&x.column(self.features));
        Ok(())
    }

    fn backward(&self, gradient: MapGradient<'_, T>) -> Result<(), Error> {
        let MapGradient { mut d_x, d_values, log_scale, x, .. } = gradient;
        // the caller may have brought the values to another unit
        for (((mut d_x, d_values), x), &unit) in
            d_x.outer_iter_mut().zip(d_values.outer_iter()).zip(x.outer_iter()).zip(log_scale)
        {
            let factor = (x[self.features] - unit).exp();
            for (d_x, &d) in d_x.iter_mut().zip(d_values) {
                *d_x += d * factor;
            }
        }
        Ok(())
    }
}
