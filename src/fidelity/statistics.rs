//! Slopes, how sure a mean of them is, and other sums over samples.

use ndarray::ArrayView2;

/// The slope of the least-squares line through points.
#[allow(clippy::cast_precision_loss)]
pub(crate) fn slope(x: &[f64], y: &[f64]) -> f64 {
    let n = x.len() as f64;
    let (mean_x, mean_y) = (x.iter().sum::<f64>() / n, y.iter().sum::<f64>() / n);
    let covariance: f64 = x.iter().zip(y).map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
    let variance: f64 = x.iter().map(|x| (x - mean_x).powi(2)).sum();
    covariance / variance
}

/// The mean of numbers, and its standard error.
#[allow(clippy::cast_precision_loss)]
pub(crate) fn mean_and_standard_error(x: &[f64]) -> (f64, f64) {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean, (variance / n).sqrt())
}

/// The two-sided 95 % quantile of Student's t.
#[allow(clippy::cast_precision_loss)]
pub(crate) fn student_t(degrees: usize) -> f64 {
    const TABLE: [f64; 30] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
        2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
        2.052, 2.048, 2.045, 2.042,
    ];
    // Beyond the table stand the first terms of the expansion in 1/degrees.
    let z = 1.959_964;
    TABLE
        .get(degrees.wrapping_sub(1))
        .copied()
        .unwrap_or(z + (z * z * z + z) / (4.0 * degrees as f64))
}

/// ‖a − b‖/‖b‖.
pub(super) fn distance(a: ArrayView2<'_, f64>, b: ArrayView2<'_, f64>) -> f64 {
    let difference = ndarray::Zip::from(a).and(b).fold(0.0, |sum, a, b| sum + (a - b).powi(2));
    let size: f64 = b.iter().map(|x| x * x).sum();
    if difference == 0.0 { 0.0 } else { (difference / size).sqrt() }
}
