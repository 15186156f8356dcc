//! Scores of single keys that a calibration gives: how much attention a key may expect.

use crate::calibration::Calibration;
use crate::calibration::keys::LEAST_ATTENTION;
use crate::kernel;
use crate::kernel::buffer::{Buffer, padded};
use crate::scalar::Scalar;
use ndarray::ArrayView1;

/// `ln E_q e^{q̂·k̂}` up to a constant, for queries of the calibrated mean and covariance: see
/// [`Calibration::static_score`].
#[derive(Clone)]
pub(super) struct StaticScore<T> {
    query_mean: Vec<T>,
    key_mean: Vec<T>,
    /// Σ_q `[d, padded d]`
    covariance: Buffer<T>,
}

impl<T: Scalar> StaticScore<T> {
    pub(super) fn new(calibration: &Calibration) -> Self {
        let d = calibration.head_dim();
        let stride = padded::<T>(d);
        let mut covariance = Buffer::zeros(d * stride);
        for (row, exact) in
            covariance.chunks_exact_mut(stride).zip(calibration.query_covariance().outer_iter())
        {
            row.iter_mut().zip(exact).for_each(|(to, &x)| *to = T::from_f64(x));
        }
        let narrow = |x: ArrayView1<'_, f64>| x.iter().map(|&x| T::from_f64(x)).collect();
        Self {
            query_mean: narrow(calibration.query_mean()),
            key_mean: narrow(calibration.key_mean()),
            covariance,
        }
    }

    /// What tells it from others.
    pub(super) fn parameters(&self) -> impl Iterator<Item = f64> {
        let all = self.query_mean.iter().chain(&self.key_mean).chain(&*self.covariance);
        all.map(|x| x.as_f64())
    }

    /// Of a scaled key, which is overwritten.
    pub(super) fn of(&self, key: &mut [T], scratch: &mut Buffer<T>) -> T {
        key.iter_mut().zip(&self.key_mean).for_each(|(x, &mean)| *x -= mean);
        let stride = padded::<T>(key.len());
        scratch.resize(stride);
        kernel::row_times_matrix(key, &self.covariance, stride, scratch);
        let score = kernel::dot(&self.query_mean, key)
            + T::from_f64(0.5) * kernel::dot(key, &scratch[..key.len()]);
        if score.is_nan() {
            -T::max_value()
        } else {
            score.max(-T::max_value()).min(T::max_value())
        }
    }
}

/// The mean softmax weight of the calibrated queries on a key: see
/// [`Calibration::expected_attention`].
#[derive(Clone)]
pub(super) struct ExpectedAttention<T> {
    /// Queries as columns `[d, padded queries]`, for scores to base 2.
    queries: Buffer<T>,
    log2_normalizers: Vec<T>,
}

impl<T: Scalar> ExpectedAttention<T> {
    pub(super) fn new(calibration: &Calibration) -> Self {
        let (exact, log_normalizers) = calibration.queries();
        let log2_e = core::f64::consts::LOG2_E;
        let width = padded::<T>(exact.nrows());
        let mut queries = Buffer::zeros(exact.ncols() * width);
        for ((query, column), &x) in exact.indexed_iter() {
            queries[column * width + query] = T::from_f64(x * log2_e);
        }
        Self {
            queries,
            log2_normalizers: log_normalizers.iter().map(|&x| T::from_f64(x * log2_e)).collect(),
        }
    }

    /// What tells it from others.
    pub(super) fn parameters(&self) -> impl Iterator<Item = f64> {
        self.queries.iter().chain(&self.log2_normalizers).map(|x| x.as_f64())
    }

    /// Of a scaled key.
    #[allow(clippy::cast_precision_loss)]
    pub(super) fn of(&self, key: &[T], scratch: &mut Buffer<T>) -> T {
        let count = self.log2_normalizers.len();
        scratch.resize(count);
        kernel::row_times_matrix(key, &self.queries, padded::<T>(count), scratch);
        scratch.iter_mut().zip(&self.log2_normalizers).for_each(|(x, &log2)| *x -= log2);
        let largest = kernel::max(scratch);
        if !largest.is_finite() {
            return if largest > T::zero() {
                T::max_value().sqrt()
            } else {
                T::from_f64(LEAST_ATTENTION)
            };
        }
        kernel::exp2_slice(scratch, largest);
        let mean = kernel::sum(scratch) / T::from_f64(count as f64) * largest.exp2();
        (mean + T::from_f64(LEAST_ATTENTION)).min(T::max_value().sqrt())
    }
}
