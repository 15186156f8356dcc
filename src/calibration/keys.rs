//! What a calibration says about a key: its metric, the attention it can expect, its static score.

use crate::calibration::Calibration;
use crate::calibration::linalg::symmetric_eigen;
use crate::check;
use crate::mask::Mask;
use crate::views::rows;
use ndarray::{Array2, ArrayView1, ArrayView2, Axis};

/// What [`Calibration::expected_attention`] gives to a key nobody attends to.
pub(crate) const LEAST_ATTENTION: f64 = 1e-12;

/// What [`Calibration::metric`] adds, in units of the mean eigenvalue.
const METRIC_SHRINKAGE: f64 = 1e-3;

impl Calibration {
    /// The metric of keys as queries see them, `R [d, d]`, symmetric: `|R(k̂ − k̂')|²` is the mean
    /// square of the difference of their scores.
    ///
    /// ```text
    /// R = (G + 0.001·tr(G)/d·I)^½,    G = mean of q̂_r q̂_rᵀ,    r ≥ ⌊n/8⌋ (all with Mask::Full)
    /// ```
    ///
    /// It does not depend on window and sinks.
    #[must_use]
    pub fn metric(&self) -> Array2<f64> {
        let (queries, _) = self.queries();
        #[allow(clippy::cast_precision_loss)]
        let (count, d) = (queries.nrows() as f64, self.head_dim() as f64);
        let mut gram = queries.t().dot(&queries) / count;
        let ridge = METRIC_SHRINKAGE * gram.diag().sum() / d;
        gram.diag_mut().mapv_inplace(|x| x + ridge);
        let (values, vectors) = symmetric_eigen(gram.view());
        let roots = values.mapv(|x| x.max(0.0).sqrt()).insert_axis(Axis(1));
        vectors.t().dot(&(&vectors * &roots))
    }

    /// The attention that a *scaled* key `k̂ [d]` can expect: its mean weight over the sampled
    /// queries, against the keys they saw,
    ///
    /// ```text
    /// mean of e^{q̂_r·k̂ − lse_r} + 10⁻¹²,    r ≥ ⌊n/8⌋ (all with Mask::Full)
    /// ```
    ///
    /// It does not depend on window and sinks, and may be above one for a key unlike the sampled
    /// ones. A key out of the range of `f64` gets its largest number; a key of a wrong length, or
    /// that is not finite, gets NaN.
    #[must_use]
    pub fn expected_attention(&self, key: ArrayView1<'_, f64>) -> f64 {
        if !self.can_score(key) {
            return f64::NAN;
        }
        let (queries, log_normalizers) = self.queries();
        let weights =
            (queries.dot(&key) - log_normalizers).mapv(|x| if x.is_nan() { 0.0 } else { x.exp() });
        (weights.mean().unwrap_or(0.0) + LEAST_ATTENTION).min(f64::MAX)
    }

    /// The static score of a *scaled* key `k̂ [d]`: the logarithm of the mean of
    /// `e^{q̂·(k̂ − μ_k)}` over queries of the normal law `N(μ_q, Σ_q)`,
    ///
    /// ```text
    /// μ_q·(k̂ − μ_k) + ½ Σ_l λ_l y_l²  =  μ_q·(k̂ − μ_k) + ½ (k̂ − μ_k)ᵀΣ_q(k̂ − μ_k)
    /// ```
    ///
    /// A key of a wrong length, or that is not finite, gets NaN.
    #[must_use]
    pub fn static_score(&self, key: ArrayView1<'_, f64>) -> f64 {
        if !self.can_score(key) {
            return f64::NAN;
        }
        let centred = &key - &self.key_mean;
        (self.query_mean.dot(&centred) + 0.5 * centred.dot(&self.query_covariance.dot(&centred)))
            .min(f64::MAX)
    }

    fn can_score(&self, key: ArrayView1<'_, f64>) -> bool {
        key.len() == self.head_dim() && check::row_is_finite(key)
    }

    /// The scaled queries `[R, d]` that expected attention is a mean over, and their log
    /// normalisers `[R]`.
    pub(crate) fn queries(&self) -> (ArrayView2<'_, f64>, ArrayView1<'_, f64>) {
        let first = match self.options.mask {
            Mask::Full => 0,
            Mask::Causal | Mask::CausalTail => self.pairs.tokens() / 8 * self.pairs.group,
        };
        let range = first..self.pairs.queries.nrows();
        (
            rows(self.pairs.queries.view(), range),
            self.log_normalizers.view().split_at(Axis(0), first).1,
        )
    }
}
