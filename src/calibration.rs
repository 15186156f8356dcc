//! What is fitted from data: a few hundred sampled queries and keys of a head say where its far
//! attention goes.

pub(crate) mod keys;
mod linalg;
mod moments;
pub(crate) mod options;
pub(crate) mod pairs;
pub(crate) mod taylor;

use crate::calibration::linalg::{cholesky, inverse_of_lower, symmetric_eigen};
use crate::calibration::moments::{condition, moments};
use crate::calibration::options::CalibrationOptions;
use crate::calibration::pairs::{Pairs, log_sum_exp};
use crate::check;
use crate::error::Error;
use crate::mask::Mask;
use crate::scalar::Scalar;
use crate::views::rows;
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayView3, Axis};

/// What sampled queries and keys of one head say about the part of attention that is far: outside
/// the exact window and the sinks.
///
/// With scaled vectors `x̂ = √scale·x`, far pairs `J_t = {j : p_t − p_j ≥ window, p_j ≥ sinks}` of
/// positions p, and R the queries with at least four far keys,
///
/// ```text
/// A_tj = softmax of q̂_t·k̂_j over j ∈ J_t,       a_j = mean over t ∈ R of A_tj
/// μ_q = mean over R of q̂_t,                      Σ_q = mean over R of (q̂_t − μ_q)(q̂_t − μ_q)ᵀ
/// μ_k = Σ_j a_j k̂_j,                             Σ_k = Σ_j a_j (k̂_j − μ_k)(k̂_j − μ_k)ᵀ
/// ```
///
/// both Σ shrunk, `Σ + shrinkage·tr(Σ)/d·I`. The coordinates in which the variance of the scores is
/// largest are those of
///
/// ```text
/// Σ_q = LLᵀ,    LᵀΣ_kL = U diag(e) Uᵀ,    λ = √e descending
/// M = diag(e^¼) Uᵀ L⁻¹,    x = M(q̂ − μ_q),    y = M⁻ᵀ(k̂ − μ_k)
/// q̂·k̂ = q̂·μ_k + μ_q·(k̂ − μ_k) + x·y        exactly,  with both covariances equal to diag(λ)
/// ```
///
/// (balancing of two covariances, Moore 1981; [the derivation](crate::theory#13-calibration)).
/// Everything is computed in `f64` and serves kernels of both number types. A calibration belongs
/// to one head, or one group of query heads that share their keys, and to the scale, window and
/// sinks it was made for.
///
/// ```
/// use dijiang::{CalibratedTaylor, Calibration, CalibrationOptions, FeatureMap};
/// use ndarray::Array2;
///
/// let sample = |phase: f32| {
///     Array2::from_shape_fn((200, 8), |(t, i)| (phase + (t * 8 + i * i) as f32).sin())
/// };
/// let (q, k) = (sample(0.0), sample(1.0));
/// let calibration =
///     Calibration::from_samples(q.view(), k.view(), CalibrationOptions::new())?;
/// assert_eq!(calibration.rows_used(), 200 - 64 - 4 - 3);
/// println!("{:.2} of the attention is far", calibration.far_share());
/// let map = CalibratedTaylor::<f32>::new(4, &calibration)?;
/// assert_eq!(map.num_features(), 15);
/// # Ok::<(), dijiang::Error>(())
/// ```
///
/// With feature `serde` the samples and the options are saved, and everything is computed again
/// when it is loaded.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "SavedCalibration", into = "SavedCalibration"))]
pub struct Calibration {
    options: CalibrationOptions,
    scale: f64,
    pub(crate) pairs: Pairs,
    /// The first row of a query with enough far keys.
    pub(crate) first_used: usize,
    /// Of each row, over its visible keys.
    pub(crate) log_normalizers: Array1<f64>,
    attention: Array1<f64>,
    query_mean: Array1<f64>,
    key_mean: Array1<f64>,
    query_covariance: Array2<f64>,
    key_covariance: Array2<f64>,
    query_condition: f64,
    key_condition: f64,
    query_basis: Array2<f64>,
    key_basis: Array2<f64>,
    spectrum: Array1<f64>,
    far_share: f64,
}

impl Calibration {
    /// Calibrates to the tokens `q [n, d]`, `k [n, d]` of one head: raw rows, a few hundred of
    /// them, at the positions the options say. With [`Mask::Full`] there may be more or fewer
    /// queries than keys.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`], [`Error::Shape`] or [`Error::NotFinite`] for bad samples or a wrong
    /// number of positions, [`Error::InvalidOption`] for a scale, shrinkage, stride or positions
    /// that cannot be used, and for a window, sinks or number of rows that leave no query four far
    /// keys, [`Error::Overflow`] if scores or moments leave the range of `f64`.
    pub fn from_samples<T: Scalar>(
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        options: CalibrationOptions,
    ) -> Result<Self, Error> {
        Self::from_group(q.insert_axis(Axis(0)), k, options)
    }

    /// Calibrates to the query heads `q [group, n, d]` that share the keys `k [n, d]`: each mean
    /// over queries is over those of every head.
    ///
    /// # Errors
    ///
    /// As [`from_samples`](Self::from_samples).
    pub fn from_group<T: Scalar>(
        q: ArrayView3<'_, T>,
        k: ArrayView2<'_, T>,
        options: CalibrationOptions,
    ) -> Result<Self, Error> {
        let (group, n, d) = q.dim();
        check::at_least_one("q heads", group)?;
        check::at_least_one("q rows", n)?;
        check::at_least_one("q columns", d)?;
        check::at_least_one("k rows", k.nrows())?;
        check::size("k", "columns", d, k.ncols())?;
        for head in q.outer_iter() {
            check::finite("q", head)?;
        }
        check::finite("k", k)?;
        let scale = check::scale::<f64>(options.scale, d)?;
        let root = scale.sqrt();
        let queries = Array2::from_shape_fn((n * group, d), |(r, i)| {
            q[[r % group, r / group, i]].as_f64() * root
        });
        let keys = k.mapv(|x| x.as_f64() * root);
        Self::fit(queries, keys, group, options)
    }

    /// Calibrates to scaled rows; those of the queries are token by token, head by head.
    fn fit(
        queries: Array2<f64>,
        keys: Array2<f64>,
        group: usize,
        options: CalibrationOptions,
    ) -> Result<Self, Error> {
        let scale = check::scale::<f64>(options.scale, keys.ncols())?;
        let pairs = Pairs::new(queries, keys, group, &options)?;
        let first_used = pairs.first_used(&options)?;
        let (log_normalizers, far_share) = pairs.log_normalizers()?;

        let mut attention = Array1::<f64>::zeros(pairs.keys.nrows());
        for row in first_used..pairs.queries.nrows() {
            let far = pairs.far(row);
            let scores = pairs.scores(row, far.clone());
            let log_normalizer = log_sum_exp(scores.view());
            let mine = scores.mapv(|x| (x - log_normalizer).exp());
            attention.iter_mut().skip(far.start).zip(&mine).for_each(|(a, x)| *a += x);
        }
        let used = rows(pairs.queries.view(), first_used..pairs.queries.nrows());
        #[allow(clippy::cast_precision_loss)]
        let share = 1.0 / used.nrows() as f64;
        attention *= share;
        let shares = Array1::from_elem(used.nrows(), share);
        let (query_mean, query_covariance) = moments(used, &shares, options.shrinkage)?;
        let (key_mean, key_covariance) = moments(pairs.keys.view(), &attention, options.shrinkage)?;

        let lower = cholesky(query_covariance.view()).ok_or_else(|| Error::InvalidOption {
            which: "shrinkage",
            found: options.shrinkage.to_string(),
            needed: "larger: the covariance of the queries is singular",
        })?;
        let (e, u) = symmetric_eigen(lower.t().dot(&key_covariance.dot(&lower)).view());
        let least = (e[0] * f64::EPSILON).max(f64::MIN_POSITIVE);
        let spectrum = e.mapv(|e| e.max(least).sqrt());
        let roots = spectrum.mapv(f64::sqrt).insert_axis(Axis(1));
        let query_basis = u.dot(&inverse_of_lower(lower.view())) * &roots;
        let key_basis = u.dot(&lower.t()) / &roots;
        if !query_basis.iter().chain(&key_basis).all(|x| x.is_finite()) {
            return Err(Error::Overflow { which: "the bases of the samples", row: 0 });
        }
        Ok(Self {
            query_condition: condition(&query_covariance),
            key_condition: condition(&key_covariance),
            options,
            scale,
            pairs,
            first_used,
            log_normalizers,
            attention,
            query_mean,
            key_mean,
            query_covariance,
            key_covariance,
            query_basis,
            key_basis,
            spectrum,
            far_share,
        })
    }

    /// Columns of queries and keys.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.pairs.keys.ncols()
    }

    /// The scale of `q·k`.
    #[must_use]
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// The window it was made for, in tokens.
    #[must_use]
    pub fn window(&self) -> usize {
        self.options.window
    }

    /// The sinks it was made for.
    #[must_use]
    pub fn sinks(&self) -> usize {
        self.options.sinks
    }

    /// The mask it was made for.
    #[must_use]
    pub fn mask(&self) -> Mask {
        self.options.mask
    }

    /// The mean far attention `a_j` on each sampled key, `[n]`: not negative, of sum one.
    #[must_use]
    pub fn attention(&self) -> ArrayView1<'_, f64> {
        self.attention.view()
    }

    /// `μ_q [d]`, of the scaled queries.
    #[must_use]
    pub fn query_mean(&self) -> ArrayView1<'_, f64> {
        self.query_mean.view()
    }

    /// `μ_k [d]`, of the scaled keys, weighted by the attention they get.
    #[must_use]
    pub fn key_mean(&self) -> ArrayView1<'_, f64> {
        self.key_mean.view()
    }

    /// `Σ_q [d, d]`, shrunk.
    #[must_use]
    pub fn query_covariance(&self) -> ArrayView2<'_, f64> {
        self.query_covariance.view()
    }

    /// `Σ_k [d, d]`, weighted by attention, shrunk.
    #[must_use]
    pub fn key_covariance(&self) -> ArrayView2<'_, f64> {
        self.key_covariance.view()
    }

    /// `M [d, d]`; each row, with that of [`key_basis`](Self::key_basis), is defined up to a sign.
    #[must_use]
    pub fn query_basis(&self) -> ArrayView2<'_, f64> {
        self.query_basis.view()
    }

    /// `M⁻ᵀ [d, d]`: the inverse, transposed.
    #[must_use]
    pub fn key_basis(&self) -> ArrayView2<'_, f64> {
        self.key_basis.view()
    }

    /// `λ [d]`, descending: the standard deviation each coordinate gives to the scores.
    #[must_use]
    pub fn spectrum(&self) -> ArrayView1<'_, f64> {
        self.spectrum.view()
    }

    /// The largest eigenvalue of `Σ_q` divided by the smallest.
    #[must_use]
    pub fn query_condition(&self) -> f64 {
        self.query_condition
    }

    /// The largest eigenvalue of `Σ_k` divided by the smallest.
    #[must_use]
    pub fn key_condition(&self) -> f64 {
        self.key_condition
    }

    /// The share of softmax attention over all visible sampled keys that far keys get: the mean
    /// over the queries with at least one far key. Where samples are strided the near keys are too.
    #[must_use]
    pub fn far_share(&self) -> f64 {
        self.far_share
    }

    /// Queries in the means: those with at least four far keys (all with [`Mask::Full`]), of every
    /// head of the group.
    #[must_use]
    pub fn rows_used(&self) -> usize {
        self.pairs.queries.nrows() - self.first_used
    }
}

/// What is saved: scaled samples, in the layout of [`Pairs`].
#[cfg(feature = "serde")]
#[derive(Clone, serde::Serialize, serde::Deserialize)]
struct SavedCalibration {
    queries: Array2<f64>,
    keys: Array2<f64>,
    group: usize,
    options: CalibrationOptions,
}

#[cfg(feature = "serde")]
impl From<Calibration> for SavedCalibration {
    fn from(calibration: Calibration) -> Self {
        let Calibration { pairs: Pairs { queries, keys, group, .. }, options, .. } = calibration;
        Self { queries, keys, group, options }
    }
}

#[cfg(feature = "serde")]
impl TryFrom<SavedCalibration> for Calibration {
    type Error = Error;

    fn try_from(saved: SavedCalibration) -> Result<Self, Error> {
        let SavedCalibration { queries, keys, group, options } = saved;
        check::at_least_one("group", group)?;
        check::at_least_one("queries", queries.nrows())?;
        check::at_least_one("keys", keys.nrows())?;
        check::at_least_one("keys columns", keys.ncols())?;
        check::size("queries", "columns", keys.ncols(), queries.ncols())?;
        check::size("queries", "rows", queries.nrows().next_multiple_of(group), queries.nrows())?;
        check::finite("queries", queries.view())?;
        check::finite("keys", keys.view())?;
        Self::fit(queries, keys, group, options)
    }
}
