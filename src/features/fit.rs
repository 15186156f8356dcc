//! Weights D of the exponential maps, by non-negative least squares in attention space.

use crate::calibration::Calibration;
use crate::calibration::pairs::log_sum_exp;
use crate::check;
use crate::error::Error;
use crate::features::FeatureMap;
use crate::features::side::Side;
use crate::mask::Mask;
use crate::scalar::Scalar;
use crate::views::rows;
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis};

/// Options of [`fit_weights`].
///
/// ```
/// use dijiang::{Mask, WeightFit};
///
/// let options = WeightFit::new().with_scale(0.125).with_mask(Mask::Full).with_ridge(0.1);
/// # let _ = options;
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WeightFit {
    scale: Option<f64>,
    mask: Mask,
    ridge: f64,
}

impl Default for WeightFit {
    fn default() -> Self {
        Self { scale: None, mask: Mask::Causal, ridge: RIDGE }
    }
}

impl WeightFit {
    /// Scale 1/√d, causal pairs, ridge 0.01.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the scale of `q·k`: the one the attention kernel will use.
    #[must_use]
    pub fn with_scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Sets which pairs are fitted.
    #[must_use]
    pub fn with_mask(mut self, mask: Mask) -> Self {
        self.mask = mask;
        self
    }

    /// Sets the pull towards the map's present weights, in units of the mean squared target per
    /// feature. At ∞ nothing changes.
    #[must_use]
    pub fn with_ridge(mut self, ridge: f64) -> Self {
        self.ridge = ridge;
        self
    }
}

/// Sweeps of coordinate descent at most.
const SWEEPS: usize = 5000;

/// Fits the weights of a positive feature map to sampled queries `q [n_q, d]` and keys `k [n_k, d]`
/// (raw, a few hundred rows), by non-negative least squares in attention space:
///
/// ```text
/// minimise  Σ_{t,j} (Σ_i w_i φ_i(q̂_t) φ_i(k̂_j) e^{−lse_t} − A_tj)²  +  λ Σ_i (w_i − 1)²,   w ≥ 0
/// lse_t = ln Σ_j e^{q̂_t·k̂_j},   A_tj = e^{q̂_t·k̂_j − lse_t},   λ = ridge·Σ A²/m
/// ```
///
/// and returns `D = √w [num_features]`, factors of the map's features on both sides: pass them to
/// `with_weights` of a map whose weights are one. The descent begins at `w = 1`, so the fit is
/// never worse on the samples than the map as it is, in this unnormalised objective.
///
/// ```
/// use dijiang::{WeightFit, Wpff, fit_weights};
/// use ndarray::Array2;
///
/// let map = Wpff::<f64>::new(4, 16, 0)?;
/// let q = Array2::from_shape_fn((40, 4), |(i, j)| ((i * 4 + j) as f64).sin());
/// let k = Array2::from_shape_fn((40, 4), |(i, j)| ((i * 5 + j) as f64).cos());
/// let weights = fit_weights(&map, q.view(), k.view(), WeightFit::new())?;
/// assert!(weights.iter().all(|d| *d >= 0.0));
/// let fitted = map.with_weights(weights)?;
/// # let _ = fitted;
/// # Ok::<(), dijiang::Error>(())
/// ```
///
/// # Errors
///
/// [`Error::Shape`], [`Error::ZeroSize`] or [`Error::NotFinite`] for bad samples,
/// [`Error::InvalidOption`] for a scale or ridge that is not a non-negative number,
/// [`Error::Overflow`] if features leave the range of `f64` in attention space, and the errors of
/// the map.
pub fn fit_weights<T: Scalar>(
    map: &(impl FeatureMap<T> + ?Sized),
    q: ArrayView2<'_, T>,
    k: ArrayView2<'_, T>,
    options: WeightFit,
) -> Result<Array1<T>, Error> {
    let (head_dim, m) = (map.head_dim(), map.num_features());
    let scale = check::scale::<T>(options.scale, head_dim)?;
    check_ridge(options.ridge)?;
    check::at_least_one("q rows", q.nrows())?;
    check::at_least_one("k rows", k.nrows())?;
    let mask = check::whole(options.mask, [q.nrows(), k.nrows()])?;
    if mask == Mask::Causal {
        check::size("k", "rows", q.nrows(), k.nrows())?;
    }
    check::queries(head_dim, q)?;
    check::keys_values(head_dim, k, k)?;
    if options.ridge.is_infinite() {
        return Ok(Array1::ones(m));
    }

    let root = T::from_f64(scale.sqrt());
    let (scaled_q, scaled_k) = (q.mapv(|x| x * root), k.mapv(|x| x * root));
    let (log_q, log_k) = (
        log_features(map, scaled_q.view(), Side::Query)?,
        log_features(map, scaled_k.view(), Side::Key)?,
    );
    let scores = q.mapv(T::as_f64).dot(&k.mapv(T::as_f64).t()) * scale;
    let mut fit = NormalEquations::new(m);
    for t in 0..q.nrows() {
        let seen = if mask == Mask::Causal { t + 1 } else { k.nrows() };
        let scores = scores.row(t).split_at(Axis(0), seen).0;
        fit.add(log_q.row(t), rows(log_k.view(), 0..seen), scores, log_sum_exp(scores));
    }
    fit.solve(options.ridge)
}

impl Calibration {
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
        let mut fit = NormalEquations::new(map.num_features());
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
}

/// Ridge of [`WeightFit`] and of the maps' `calibrated`.
const RIDGE: f64 = 0.01;

/// A ridge is a number that is not negative.
fn check_ridge(ridge: f64) -> Result<(), Error> {
    if ridge >= 0.0 {
        return Ok(());
    }
    Err(Error::InvalidOption {
        which: "ridge",
        found: ridge.to_string(),
        needed: "a number that is not negative",
    })
}

/// The normal equations of the fit, row of queries after row.
struct NormalEquations {
    gram: Array2<f64>,
    target: Array1<f64>,
    size: f64,
}

impl NormalEquations {
    fn new(num_features: usize) -> Self {
        Self {
            gram: Array2::zeros((num_features, num_features)),
            target: Array1::zeros(num_features),
            size: 0.0,
        }
    }

    /// Adds the pairs of one query, log features `[m]`, with some keys, log features `[keys, m]`,
    /// and their scores.
    fn add(
        &mut self,
        log_q: ArrayView1<'_, f64>,
        log_k: ArrayView2<'_, f64>,
        scores: ArrayView1<'_, f64>,
        log_normalizer: f64,
    ) {
        let attention = scores.mapv(|x| (x - log_normalizer).exp());
        let columns = (&log_k + &log_q - log_normalizer).mapv(f64::exp);
        self.gram += &columns.t().dot(&columns);
        self.target += &columns.t().dot(&attention);
        self.size += attention.dot(&attention);
    }

    /// `D = √w`.
    fn solve<T: Scalar>(self, ridge: f64) -> Result<Array1<T>, Error> {
        let Self { mut gram, mut target, size } = self;
        if !gram.iter().all(|x| x.is_finite()) {
            return Err(Error::Overflow { which: "the products of the sampled features", row: 0 });
        }
        #[allow(clippy::cast_precision_loss)]
        let ridge = ridge * size / target.len() as f64;
        gram.diag_mut().mapv_inplace(|x| x + ridge);
        target += ridge;
        let ones = Array1::ones(target.len());
        let weights = nonnegative_least_squares(&gram, &target, ones);
        Ok(weights.mapv(|w| T::from_f64(w.sqrt())))
    }
}

/// Logarithms of the features of scaled vectors, `[n, m]`; −∞ where a feature is zero.
fn log_features<T: Scalar>(
    map: &(impl FeatureMap<T> + ?Sized),
    scaled: ArrayView2<'_, T>,
    side: Side,
) -> Result<Array2<f64>, Error> {
    let mut values = Array2::zeros((scaled.nrows(), map.num_features()));
    let mut log_scale = Array1::zeros(scaled.nrows());
    side.map(map, scaled, values.view_mut(), log_scale.view_mut())?;
    if values.iter().any(|x| *x < T::zero()) {
        return Err(Error::Unsupported {
            what: "fitting the weights of a map with negative features",
            why: "non-negative weights keep a kernel positive only if its features are",
        });
    }
    Ok(values.mapv(|x| x.as_f64().ln()) + log_scale.mapv(T::as_f64).insert_axis(Axis(1)))
}

/// `argmin ½ wᵀGw − tᵀw` over `w ≥ 0` by cyclic coordinate descent from `start`. Each step lowers
/// the objective; it stops when no coordinate moves it by more than rounding.
fn nonnegative_least_squares(
    gram: &Array2<f64>,
    target: &Array1<f64>,
    start: Array1<f64>,
) -> Array1<f64> {
    let mut w = start;
    let mut gradient = gram.dot(&w) - target;
    for _ in 0..SWEEPS {
        let mut moved = 0.0_f64;
        for i in 0..w.len() {
            let curvature = gram[[i, i]];
            if curvature <= 0.0 {
                continue;
            }
            let new = (w[i] - gradient[i] / curvature).max(0.0);
            let change = new - w[i];
            if change != 0.0 {
                w[i] = new;
                gradient.scaled_add(change, &gram.row(i));
                moved = moved.max(change.abs() / new.abs().max(1e-3));
            }
        }
        if moved < 1e-9 {
            break;
        }
    }
    w
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn least_squares_meets_the_optimality_conditions() {
        let a = array![[1.0, 2.0, 0.5], [0.3, -1.0, 0.2], [2.0, 0.1, -0.7], [0.5, 0.5, 0.9]];
        let gram = a.t().dot(&a);
        let target = array![1.0, -2.0, 0.3];
        let w = nonnegative_least_squares(&gram, &target, Array1::ones(3));
        let gradient = gram.dot(&w) - &target;
        for (w, g) in w.iter().zip(&gradient) {
            assert!(*w >= 0.0 && *g >= -1e-8 && (w * g).abs() < 1e-8, "w {w} gradient {g}");
        }
        assert_eq!(w[1], 0.0);
    }
}
