//! Mean and covariance of weighted samples.

use crate::calibration::linalg::symmetric_eigen;
use crate::error::Error;
use ndarray::{Array1, Array2, ArrayView2, Axis};

/// Variances are at least this, so that keys or queries that are all the same can be whitened.
/// Scores are of order one.
const LEAST_VARIANCE: f64 = 1e-12;

/// .. and this, in units of the mean variance.
const LEAST_SHRINKAGE: f64 = 1e-10;

/// Weighted mean of rows, and their shrunk covariance. The weights sum to one.
pub(crate) fn moments(
    x: ArrayView2<'_, f64>,
    weights: &Array1<f64>,
    shrinkage: f64,
) -> Result<(Array1<f64>, Array2<f64>), Error> {
    let mean = weights.dot(&x);
    let centred = &x - &mean;
    let mut covariance = centred.t().dot(&(&centred * &weights.view().insert_axis(Axis(1))));
    #[allow(clippy::cast_precision_loss)]
    let variance = covariance.diag().sum() / mean.len() as f64;
    let ridge = (shrinkage.max(LEAST_SHRINKAGE) * variance).max(LEAST_VARIANCE);
    covariance.diag_mut().mapv_inplace(|x| x + ridge);
    if mean.iter().chain(&covariance).all(|x| x.is_finite()) {
        Ok((mean, covariance))
    } else {
        Err(Error::Overflow { which: "a moment of the samples", row: 0 })
    }
}

/// The largest eigenvalue of a covariance divided by the smallest.
pub(crate) fn condition(covariance: &Array2<f64>) -> f64 {
    let (values, _) = symmetric_eigen(covariance.view());
    values[0] / values[values.len() - 1]
}
