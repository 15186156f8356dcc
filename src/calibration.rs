//! What is fitted from data: a few hundred sampled queries and keys of a head say where its far
//! attention goes.

mod linalg;
mod options;
mod taylor;
pub(crate) mod weights;

pub use options::CalibrationOptions;
pub use taylor::TaylorFit;

use crate::features::Side;
use crate::views::rows;
use crate::{Error, FeatureMap, Mask, Scalar, check};
use core::ops::Range;
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayView3, Axis};
use weights::{Fit, RIDGE, check_ridge, log_features, log_sum_exp};

/// Queries with fewer far keys than this say nothing about far attention.
const LEAST_KEYS: usize = 4;

/// Variances are at least this, so that keys or queries that are all the same can be whitened.
/// Scores are of order one.
const LEAST_VARIANCE: f64 = 1e-12;

/// .. and this, in units of the mean variance.
const LEAST_SHRINKAGE: f64 = 1e-10;

/// What [`Calibration::expected_attention`] gives to a key nobody attends to.
pub(crate) const LEAST_ATTENTION: f64 = 1e-12;

/// What [`Calibration::metric`] adds, in units of the mean eigenvalue.
const METRIC_SHRINKAGE: f64 = 1e-3;

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
/// (balancing of two covariances, Moore 1981; the derivation is in `docs/theory.md`). Everything is
/// computed in `f64` and serves kernels of both number types. A calibration belongs to one head, or
/// one group of query heads that share their keys, and to the scale, window and sinks it was made
/// for.
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
#[cfg_attr(feature = "serde", serde(try_from = "Saved", into = "Saved"))]
pub struct Calibration {
    options: CalibrationOptions,
    scale: f64,
    pairs: Pairs,
    first_used: usize,
    log_normalizers: Array1<f64>,
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

        let lower =
            linalg::cholesky(query_covariance.view()).ok_or_else(|| Error::InvalidOption {
                which: "shrinkage",
                found: options.shrinkage.to_string(),
                needed: "larger: the covariance of the queries is singular",
            })?;
        let (e, u) = linalg::symmetric_eigen(lower.t().dot(&key_covariance.dot(&lower)).view());
        let least = (e[0] * f64::EPSILON).max(f64::MIN_POSITIVE);
        let spectrum = e.mapv(|e| e.max(least).sqrt());
        let roots = spectrum.mapv(f64::sqrt).insert_axis(Axis(1));
        let query_basis = u.dot(&linalg::inverse_of_lower(lower.view())) * &roots;
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

    /// Fits `c` of the kernel `K = e^{q̂·μ_k + μ_q·(k̂ − μ_k)}·(c₀ + c₁s + c₂s²/2)`,
    /// `s = Σ_{l<rank} x_l y_l`, to the far pairs in attention space, with a small pull to one:
    ///
    /// ```text
    /// minimise Σ_{t∈R, j∈J_t} ((K_tj − e^{q̂_t·k̂_j}) e^{−lse_t})² + 0.02·Σ_i H_ii (c_i − 1)²,    lse_t over all visible keys
    /// ```
    ///
    /// with H the Gram matrix of the three columns.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if the rank is 0, [`Error::InvalidOption`] if it is above `head_dim`,
    /// [`Error::Overflow`] if the columns leave the range of `f64`.
    pub fn taylor_coefficients(&self, rank: usize, fit: TaylorFit) -> Result<[f64; 3], Error> {
        self.check_rank(rank)?;
        let x = (&self.pairs.queries - &self.query_mean)
            .dot(&rows(self.query_basis.view(), 0..rank).t());
        let centred = &self.pairs.keys - &self.key_mean;
        let y = centred.dot(&rows(self.key_basis.view(), 0..rank).t());
        let key_part = centred.dot(&self.query_mean);
        let (mut h, mut b) = (Array2::zeros((3, 3)), Array1::zeros(3));
        for row in self.first_used..self.pairs.queries.nrows() {
            let far = self.pairs.far(row);
            let normalizer = self.log_normalizers[row];
            let query_part = self.pairs.queries.row(row).dot(&self.key_mean) - normalizer;
            let s = rows(y.view(), far.clone()).dot(&x.row(row));
            for ((s, score), key_part) in s
                .iter()
                .zip(&self.pairs.scores(row, far.clone()))
                .zip(key_part.iter().skip(far.start))
            {
                let base = (query_part + key_part).exp();
                let column = [base, base * s, base * s * s * 0.5];
                let target = (score - normalizer).exp();
                for i in 0..3 {
                    b[i] += column[i] * target;
                    for j in 0..3 {
                        h[[i, j]] += column[i] * column[j];
                    }
                }
            }
        }
        taylor::coefficients(&h, &b, fit)
    }

    /// The coordinates a map may use are 1 to `head_dim`.
    pub(crate) fn check_rank(&self, rank: usize) -> Result<(), Error> {
        check::at_least_one("rank", rank)?;
        if rank <= self.head_dim() {
            return Ok(());
        }
        Err(Error::InvalidOption {
            which: "rank",
            found: rank.to_string(),
            needed: "at most the head dimension",
        })
    }

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
        let (values, vectors) = linalg::symmetric_eigen(gram.view());
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
            Mask::Causal => self.pairs.far.len() / 8 * self.pairs.group,
        };
        let range = first..self.pairs.queries.nrows();
        (
            rows(self.pairs.queries.view(), range),
            self.log_normalizers.view().split_at(Axis(0), first).1,
        )
    }

    /// A map whose weights D are set by `with_weights`, fitted from D = 1.
    pub(crate) fn refit<T: Scalar, F: FeatureMap<T>>(
        &self,
        map: F,
        with_weights: impl Fn(F, Array1<T>) -> Result<F, Error>,
    ) -> Result<F, Error> {
        let ones = Array1::ones(map.num_features());
        let map = with_weights(map, ones)?;
        let weights = self.fit_weights(&map, RIDGE)?;
        with_weights(map, weights)
    }

    /// Fits the weights D of a map of positive features, all one so far, to the far pairs, as
    /// [`fit_weights`](crate::fit_weights) does to all pairs: pass them to its `with_weights`, or
    /// call its `calibrated`. The ridge there is 0.01.
    ///
    /// ```
    /// use dijiang::{Calibration, CalibrationOptions, Wpff};
    /// use ndarray::Array2;
    ///
    /// let x = Array2::from_shape_fn((100, 4), |(t, i)| ((t * 4 + i) as f32).sin());
    /// let calibration =
    ///     Calibration::from_samples(x.view(), x.view(), CalibrationOptions::new())?;
    /// let map = Wpff::<f32>::new(4, 16, 0)?;
    /// let weights = calibration.fit_weights(&map, 0.01)?;
    /// assert_eq!(map.clone().with_weights(weights)?, map.calibrated(&calibration)?);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the map's `head_dim` is another, [`Error::InvalidOption`] for a negative
    /// ridge, [`Error::Unsupported`] for negative features, [`Error::Overflow`] if features leave
    /// the range of `f64` in attention space, and the errors of the map.
    pub fn fit_weights<T: Scalar>(
        &self,
        map: &(impl FeatureMap<T> + ?Sized),
        ridge: f64,
    ) -> Result<Array1<T>, Error> {
        check::size("map", "columns", self.head_dim(), map.head_dim())?;
        check_ridge(ridge)?;
        if ridge.is_infinite() {
            return Ok(Array1::ones(map.num_features()));
        }
        let (queries, keys) =
            (self.pairs.queries.mapv(T::from_f64), self.pairs.keys.mapv(T::from_f64));
        let log_q = log_features(map, queries.view(), Side::Query)?;
        let log_k = log_features(map, keys.view(), Side::Key)?;
        let mut fit = Fit::new(map.num_features());
        for row in self.first_used..queries.nrows() {
            let far = self.pairs.far(row);
            let scores = self.pairs.scores(row, far.clone());
            fit.add(
                log_q.row(row),
                rows(log_k.view(), far),
                scores.view(),
                self.log_normalizers[row],
            );
        }
        fit.solve(ridge)
    }
}

/// Scaled samples, and which keys each query sees.
#[derive(Clone, Debug, PartialEq)]
struct Pairs {
    /// `[n·group, d]`, token by token, head by head.
    queries: Array2<f64>,
    keys: Array2<f64>,
    group: usize,
    /// Far keys of each token; those of later tokens include those of earlier ones.
    far: Vec<Range<usize>>,
    causal: bool,
}

impl Pairs {
    fn new(
        queries: Array2<f64>,
        keys: Array2<f64>,
        group: usize,
        options: &CalibrationOptions,
    ) -> Result<Self, Error> {
        let (tokens, n) = (queries.nrows() / group, keys.nrows());
        let causal = options.mask == Mask::Causal;
        if causal {
            check::size("k", "rows", tokens, n)?;
        }
        let positions = options.positions(n)?;
        let far = if causal {
            let start = positions.partition_point(|p| *p < options.sinks);
            let end = |p: &usize| match p.checked_sub(options.window) {
                Some(last) => positions.partition_point(|p| *p <= last),
                None => 0,
            };
            positions.iter().map(|p| start..end(p).max(start)).collect()
        } else {
            vec![0..n; tokens]
        };
        Ok(Self { queries, keys, group, far, causal })
    }

    fn far(&self, row: usize) -> Range<usize> {
        self.far[row / self.group].clone()
    }

    fn visible(&self, row: usize) -> Range<usize> {
        0..if self.causal { row / self.group + 1 } else { self.keys.nrows() }
    }

    fn scores(&self, row: usize, keys: Range<usize>) -> Array1<f64> {
        rows(self.keys.view(), keys).dot(&self.queries.row(row))
    }

    /// The first row of a query with enough far keys.
    fn first_used(&self, options: &CalibrationOptions) -> Result<usize, Error> {
        if !self.causal {
            return Ok(0);
        }
        if let Some(token) = self.far.iter().position(|far| far.len() >= LEAST_KEYS) {
            return Ok(token * self.group);
        }
        let n = self.keys.nrows();
        let seen = self.far.last().map_or(0, |far| n - far.start);
        let (which, found, needed) = if n < LEAST_KEYS {
            ("k rows", n, "at least 4, or no query has four far keys")
        } else if seen < LEAST_KEYS {
            (
                "sinks",
                options.sinks,
                "smaller, or the samples from a longer text: fewer than four of their positions \
                 are no sinks",
            )
        } else {
            (
                "window",
                options.window,
                "smaller, or the samples from a longer text: no query has four far keys outside \
                 window and sinks",
            )
        };
        Err(Error::InvalidOption { which, found: found.to_string(), needed })
    }

    /// `lse_t` of each row over its visible keys, and the mean share of the far keys in them.
    fn log_normalizers(&self) -> Result<(Array1<f64>, f64), Error> {
        let mut all = Array1::zeros(self.queries.nrows());
        let (mut sum, mut count) = (0.0, 0.0);
        for (row, log_normalizer) in all.iter_mut().enumerate() {
            let scores = self.scores(row, self.visible(row));
            *log_normalizer = log_sum_exp(scores.view());
            if !(log_normalizer.is_finite() && scores.iter().all(|x| x.is_finite())) {
                return Err(Error::Overflow { which: "a score", row: row / self.group });
            }
            let far = self.far(row);
            if !far.is_empty() {
                sum += far.map(|j| (scores[j] - *log_normalizer).exp()).sum::<f64>();
                count += 1.0;
            }
        }
        Ok((all, sum / count))
    }
}

/// Weighted mean of rows, and their shrunk covariance. The weights sum to one.
fn moments(
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

fn condition(covariance: &Array2<f64>) -> f64 {
    let (values, _) = linalg::symmetric_eigen(covariance.view());
    values[0] / values[values.len() - 1]
}

/// What is saved: scaled samples, in the layout of [`Pairs`].
#[cfg(feature = "serde")]
#[derive(Clone, serde::Serialize, serde::Deserialize)]
struct Saved {
    queries: Array2<f64>,
    keys: Array2<f64>,
    group: usize,
    options: CalibrationOptions,
}

#[cfg(feature = "serde")]
impl From<Calibration> for Saved {
    fn from(calibration: Calibration) -> Self {
        let Calibration { pairs: Pairs { queries, keys, group, .. }, options, .. } = calibration;
        Self { queries, keys, group, options }
    }
}

#[cfg(feature = "serde")]
impl TryFrom<Saved> for Calibration {
    type Error = Error;

    fn try_from(saved: Saved) -> Result<Self, Error> {
        let Saved { queries, keys, group, options } = saved;
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
