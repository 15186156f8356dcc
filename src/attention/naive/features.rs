//! Feature maps: `φ(q̂)·φ(k̂)` takes the place of `exp(q̂·k̂)`.
//!
//! All of them map rows `x [n, d]` to rows of features `[n, m]`. The vectors are scaled already
//! (`x̂ = √scale·x`; the released DiJiang map and elu + 1 as their authors use it have scale 1).

use core::f64::consts::{FRAC_1_SQRT_2, PI};
use ndarray::{Array1, Array2, ArrayView1, Axis};

/// Features of `n` tokens, kept in range: token `t` has the features
/// `φ(x_t)_i = values[t, i]·e^{log_scale[t]}`.
///
/// ```
/// use dijiang::attention::naive::features::Features;
/// use ndarray::array;
///
/// // e^800 and e^799, which no f64 can hold
/// let features = Features::from_logs(&array![[800.0, 799.0]]);
/// assert_eq!(features.values, array![[1.0, (-1_f64).exp()]]);
/// assert_eq!(features.log_scale, array![800.0]);
/// ```
#[derive(Clone, Debug)]
pub struct Features {
    /// `[n, m]`
    pub values: Array2<f64>,
    /// `[n]`
    pub log_scale: Array1<f64>,
}

impl Features {
    /// Features as they are, with `log_scale` 0.
    #[must_use]
    pub fn from_values(values: Array2<f64>) -> Self {
        let log_scale = Array1::zeros(values.nrows());
        Self { values, log_scale }
    }

    /// Positive features from their logarithms, relative to the largest of each token.
    #[must_use]
    pub fn from_logs(logs: &Array2<f64>) -> Self {
        let log_scale: Array1<f64> =
            logs.outer_iter().map(|row| row.fold(f64::NEG_INFINITY, |m, &l| m.max(l))).collect();
        let values = (logs - &log_scale.view().insert_axis(Axis(1))).mapv(f64::exp);
        Self { values, log_scale }
    }

    /// The features themselves, `[n, m]`, where they are in the range of `f64`.
    ///
    /// ```
    /// use dijiang::attention::naive::features::Features;
    /// use ndarray::array;
    ///
    /// let features = Features { values: array![[1.0, 0.5]], log_scale: array![2_f64.ln()] };
    /// assert!((features.absolute() - array![[2.0, 1.0]]).iter().all(|e| e.abs() < 1e-15));
    /// ```
    #[must_use]
    pub fn absolute(&self) -> Array2<f64> {
        &self.values * &self.log_scale.mapv(f64::exp).insert_axis(Axis(1))
    }
}

/// Positive random features, FAVOR+ (Choromanski et al., arXiv 2009.14794, lemma 1):
///
/// ```text
/// φ_i(x) = D_i·exp(ω_i·x − |x|²/2)/√m
/// ```
///
/// with the rows ω of `omega [m, d]`, drawn from N(0, I), and weights `D [m]` that are all one in
/// the paper. Then `E φ(x)·φ(y) = exp(x·y)`. D stands on both sides, so products see D².
///
/// ```
/// use dijiang::attention::naive::features;
/// use ndarray::{Array1, array};
///
/// let phi = features::performer(&array![[2.0]], &array![[0.5], [1.0]], &Array1::ones(2));
/// let exact = [-1.0_f64, 0.0].map(|exponent| exponent.exp() / 2_f64.sqrt());
/// assert!(phi.absolute().iter().zip(exact).all(|(a, b)| (a - b).abs() < 1e-15));
/// ```
#[must_use]
pub fn performer(x: &Array2<f64>, omega: &Array2<f64>, weights: &Array1<f64>) -> Features {
    let m = omega.nrows() as f64;
    Features::from_logs(&Array2::from_shape_fn((x.nrows(), omega.nrows()), |(t, i)| {
        let x = x.row(t);
        weights[i].ln() + omega.row(i).dot(&x) - x.dot(&x) / 2.0 - m.ln() / 2.0
    }))
}

/// Weighted positive fixed features, WPFF (Chen et al., DiJiang, arXiv 2403.19928, theorems 3.2 and
/// 3.3):
///
/// ```text
/// φ_i(x) = D_i·exp(r_i v_i·x − |x|²/2)/√m
/// ```
///
/// with fixed directions `v [m, d]` on the sphere, radii `r [m]` that are quantiles of the chi
/// distribution, and weights `D [m]`. The paper prints `e^{−|x|²}`; the identity
/// `E φ(x)·φ(y) = exp(x·y)` needs the half.
///
/// ```
/// use dijiang::attention::naive::features;
/// use ndarray::array;
///
/// let phi = features::wpff(&array![[1.0]], &array![[-1.0]], &array![0.5], &array![3.0]);
/// assert!((phi.absolute()[[0, 0]] - 3.0 * (-1_f64).exp()).abs() < 1e-15);
/// ```
#[must_use]
pub fn wpff(
    x: &Array2<f64>,
    directions: &Array2<f64>,
    radii: &Array1<f64>,
    weights: &Array1<f64>,
) -> Features {
    performer(x, &(directions * &radii.view().insert_axis(Axis(1))), weights)
}

/// The orthonormal DCT-II matrix `C [d, d]`, rows are frequencies:
///
/// ```text
/// C[a][i] = s_a cos(π(2i + 1)a/2d),    s_0 = √(1/d),    s_a = √(2/d) otherwise
/// ```
///
/// `C x` is the DCT-II of `x` and `Cᵀ x` its DCT-III (Ahmed, Natarajan and Rao, IEEE Trans. Comput.
/// C-23, 1974).
///
/// ```
/// use dijiang::attention::naive::features;
/// use ndarray::Array2;
///
/// let c = features::dct_matrix(5);
/// assert!((c.dot(&c.t()) - Array2::<f64>::eye(5)).iter().all(|e| e.abs() < 1e-14));
/// ```
#[must_use]
pub fn dct_matrix(d: usize) -> Array2<f64> {
    Array2::from_shape_fn((d, d), |(a, i)| {
        let norm = if a == 0 { 1.0 } else { 2.0 } / d as f64;
        norm.sqrt() * (PI * ((2 * i + 1) * a) as f64 / (2 * d) as f64).cos()
    })
}

/// The projection `ω [m, d]` of DiJiang's DCT features (Chen et al., arXiv 2403.19928, section
/// 3.3), which are [`performer`] of it:
///
/// ```text
/// ω_i = r_i·(row a of C S_b)·(C S_0),    i = b·d + a,    0 ≤ a < d
/// ```
///
/// with `C` the [`dct_matrix`], radii `r [m]`, and diagonals of signs: `S_0` is `mixing [d]`, `S_b`
/// of block `b` is a row of `signs [⌈m/d⌉, d]`.
///
/// ```
/// use dijiang::attention::naive::features;
/// use ndarray::{Array2, array};
///
/// // one dimension: C = 1
/// let (radii, signs) = (array![2.0, 3.0], array![[1.0], [-1.0]]);
/// let omega = features::dct_projection(&radii, &array![-1.0], &signs);
/// assert_eq!(omega, array![[-2.0], [3.0]]);
/// ```
#[must_use]
pub fn dct_projection(
    radii: &Array1<f64>,
    mixing: &Array1<f64>,
    signs: &Array2<f64>,
) -> Array2<f64> {
    let d = mixing.len();
    let c = dct_matrix(d);
    let mixed = &c * mixing;
    let mut omega = Array2::zeros((radii.len(), d));
    for (i, mut row) in omega.outer_iter_mut().enumerate() {
        let direction = (&c.row(i % d) * &signs.row(i / d)).dot(&mixed);
        row.assign(&(direction * radii[i]));
    }
    omega
}

/// The map of the released DiJiang code (github.com/YuchuanTian/DiJiang), with radii `t [d]`:
///
/// ```text
/// φ(x) = softmax(x C diag(t)),    φ_i(x) = e^{t_i (Cᵀx)_i} / Σ_l e^{t_l (Cᵀx)_l}
/// ```
///
/// on raw vectors, with as many features as columns. It is another function than the paper's.
///
/// ```
/// use dijiang::attention::naive::features;
/// use ndarray::array;
///
/// let phi = features::official_dijiang(&array![[1.0, 2.0]], &array![0.0, 0.0]);
/// assert!((phi.absolute() - array![[0.5, 0.5]]).iter().all(|e| e.abs() < 1e-15));
/// ```
#[must_use]
pub fn official_dijiang(x: &Array2<f64>, radii: &Array1<f64>) -> Features {
    let logits = x.dot(&dct_matrix(x.ncols())) * radii;
    let mut features = Features::from_logs(&logits);
    for (values, log_scale) in features.values.outer_iter().zip(&mut features.log_scale) {
        *log_scale = -values.sum().ln();
    }
    features
}

/// The Taylor expansion of the exponential to second order (used by Arora et al., Based, arXiv
/// 2402.18668):
///
/// ```text
/// φ(x) = (1, x_1, .., x_d, x_1²/√2, x_1 x_2, .., x_d²/√2),    φ(x)·φ(y) = 1 + s + s²/2,    s = x·y
/// ```
///
/// ```
/// use dijiang::attention::naive::features;
/// use ndarray::array;
///
/// let phi = features::taylor(&array![[0.1, 0.2], [0.3, -0.5]]).values;
/// let s: f64 = 0.03 - 0.1;
/// assert!((phi.row(0).dot(&phi.row(1)) - (1.0 + s + s * s / 2.0)).abs() < 1e-15);
/// ```
#[must_use]
pub fn taylor(x: &Array2<f64>) -> Features {
    let d = x.ncols();
    let mut values = Array2::zeros((x.nrows(), (d + 1) * (d + 2) / 2));
    for (x, mut values) in x.outer_iter().zip(values.outer_iter_mut()) {
        values.assign(&monomials(x));
    }
    Features::from_values(values)
}

/// 1, the coordinates, and their products with squares over √2.
fn monomials(x: ArrayView1<'_, f64>) -> Array1<f64> {
    let mut all = vec![1.0];
    all.extend(x);
    for (l, a) in x.iter().enumerate() {
        for (m, b) in x.iter().enumerate().skip(l) {
            all.push(if l == m { a * b * FRAC_1_SQRT_2 } else { a * b });
        }
    }
    Array1::from(all)
}

/// What a calibrated Taylor map knows of its queries and keys; `docs/theory.md` says how it is
/// found.
#[derive(Clone, Debug)]
pub struct TaylorCalibration {
    /// `μ_q [d]`, the mean of the scaled queries.
    pub query_mean: Array1<f64>,
    /// `μ_k [d]`, the mean of the scaled keys, weighted by their attention.
    pub key_mean: Array1<f64>,
    /// The first rows of `M [r, d]`.
    pub query_basis: Array2<f64>,
    /// The first rows of `M⁻ᵀ [r, d]`.
    pub key_basis: Array2<f64>,
    /// `c_0, c_1, c_2`.
    pub coefficients: [f64; 3],
}

/// The second-order map calibrated to data, of queries and of keys:
///
/// ```text
/// φ_q(q)·φ_k(k) = e^{q·μ_k + μ_q·(k − μ_k)} (c_0 + c_1 s + c_2 s²/2)
/// s = Σ_{l<r} x_l y_l,    x = M(q − μ_q),    y = M⁻ᵀ(k − μ_k)
/// ```
///
/// With `r = d` and the whole exponential in place of the polynomial it would be `e^{q·k}`, up to
/// the identity `q·k = q·μ_k + μ_q·(k − μ_k) + (q − μ_q)·(k − μ_k)` (this crate).
///
/// ```
/// use dijiang::attention::naive::features::{self, TaylorCalibration};
/// use ndarray::array;
///
/// let calibration = TaylorCalibration {
///     query_mean: array![0.5],
///     key_mean: array![-1.0],
///     query_basis: array![[2.0]],
///     key_basis: array![[0.5]],
///     coefficients: [1.0, 1.0, 1.0],
/// };
/// let [q, k] = features::calibrated_taylor(&array![[0.7]], &array![[-0.8]], &calibration);
/// let estimate = q.values.row(0).dot(&k.values.row(0)) * (q.log_scale[0] + k.log_scale[0]).exp();
/// assert!((estimate / (0.7_f64 * -0.8).exp() - 1.0).abs() < 1e-4);
/// ```
#[must_use]
pub fn calibrated_taylor(
    q: &Array2<f64>,
    k: &Array2<f64>,
    calibration: &TaylorCalibration,
) -> [Features; 2] {
    let TaylorCalibration { query_mean, key_mean, query_basis, key_basis, coefficients } =
        calibration;
    let x = (q - query_mean).dot(&query_basis.t());
    let y = (k - key_mean).dot(&key_basis.t());
    let (queries, mut keys) = (taylor(&x).values, taylor(&y).values);
    let rank = x.ncols();
    for (i, mut column) in keys.columns_mut().into_iter().enumerate() {
        let order = usize::from(i > 0) + usize::from(i > rank);
        column *= coefficients[order];
    }
    [
        Features { values: queries, log_scale: q.dot(key_mean) },
        Features { values: keys, log_scale: (k - key_mean).dot(query_mean) },
    ]
}

/// elu + 1 (Katharopoulos et al., arXiv 2006.16236, equation 7):
///
/// ```text
/// φ(x)_i = x_i + 1 for x_i > 0,    e^{x_i} otherwise
/// ```
///
/// ```
/// use dijiang::attention::naive::features;
/// use ndarray::array;
///
/// let phi = features::elu(&array![[1.5, -1.0]]).values;
/// assert_eq!(phi, array![[2.5, (-1_f64).exp()]]);
/// ```
#[must_use]
pub fn elu(x: &Array2<f64>) -> Features {
    Features::from_values(x.mapv(|x| if x > 0.0 { x + 1.0 } else { x.exp() }))
}

/// Rectified coordinates (the generalised kernel of Choromanski et al., arXiv 2009.14794, section
/// 2.2; ε = 0.001 in performer-pytorch):
///
/// ```text
/// φ(x)_i = max(0, x_i) + ε
/// ```
///
/// With a projection `ω [m, d]` it is `relu(&x.dot(&omega.t()), ε)`: `φ(x)_i = max(0, ω_i·x) + ε`.
///
/// ```
/// use dijiang::attention::naive::features;
/// use ndarray::array;
///
/// assert_eq!(features::relu(&array![[1.5, -1.0]], 0.25).values, array![[1.75, 0.25]]);
/// ```
#[must_use]
pub fn relu(x: &Array2<f64>, epsilon: f64) -> Features {
    Features::from_values(x.mapv(|x| x.max(0.0) + epsilon))
}

/// The vectors themselves, `φ(x) = x`, of either sign: retention, gated linear attention, Mamba-2.
///
/// ```
/// use dijiang::attention::naive::features;
/// use ndarray::array;
///
/// assert_eq!(features::identity(&array![[1.5, -1.0]]).values, array![[1.5, -1.0]]);
/// ```
#[must_use]
pub fn identity(x: &Array2<f64>) -> Features {
    Features::from_values(x.clone())
}
