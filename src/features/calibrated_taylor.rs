//! The Taylor map of second order, calibrated to the far pairs of a head.

mod gradient;

use crate::calibration::Calibration;
use crate::calibration::taylor::TaylorFit;
use crate::check;
use crate::error::Error;
use crate::features::FeatureMap;
use crate::features::columns::check_map;
use crate::features::gradient::MapGradient;
use crate::features::side::Side;
use crate::kernel;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use crate::views::rows;
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis};

/// The Taylor expansion around the mean far score of a head, on the few coordinates that its scores
/// vary most along:
///
/// ```text
/// exp(q̂·k̂) ≈ e^{q̂·μ_k + μ_q·(k̂ − μ_k)}·(c₀ + c₁s + c₂s²/2),    s = Σ_{l<r} x_l y_l
/// x = M(q̂ − μ_q),    y = M⁻ᵀ(k̂ − μ_k)
/// φ(x) = (√c₀, √c₁·x_1, .., √c₁·x_r, √c₂·x_1²/√2, √c₂·x_1x_2, .., √c₂·x_r²/√2)
/// ```
///
/// with `(r + 1)(r + 2)/2` features; the exponentials are the log scales. Means, bases and
/// coefficients come from a [`Calibration`]. Single features are signed, but every weight is
/// positive, for `c₁² < 2c₀c₂`. It models *far* pairs, and is meant for the far part of a kernel
/// with an exact window; alone it gives near keys too little. Queries and keys are mapped
/// differently.
///
/// ```
/// use dijiang::{CalibratedTaylor, Calibration, CalibrationOptions, FeatureMap};
/// use ndarray::Array2;
///
/// let sample = |phase: f64| {
///     Array2::from_shape_fn((300, 4), |(t, i)| {
///         0.5 * (phase + (t * 4 + i * i) as f64).sin()
///     })
/// };
/// let calibration = Calibration::from_samples(
///     sample(0.0).view(),
///     sample(1.0).view(),
///     CalibrationOptions::new(),
/// )?;
/// let map = CalibratedTaylor::<f32>::new(2, &calibration)?;
/// assert_eq!((map.head_dim(), map.num_features()), (4, 6));
/// let [c0, c1, c2] = map.coefficients();
/// assert!(c1 * c1 < 2.0 * c0 * c2);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(
    feature = "serde",
    serde(try_from = "SavedCalibratedTaylor<T>", into = "SavedCalibratedTaylor<T>")
)]
#[cfg_attr(
    feature = "serde",
    serde(bound(
        serialize = "T: Scalar + serde::Serialize",
        deserialize = "T: Scalar + serde::Deserialize<'de>"
    ))
)]
pub struct CalibratedTaylor<T> {
    query_mean: Array1<T>,
    key_mean: Array1<T>,
    query_basis: Array2<T>,
    key_basis: Array2<T>,
    coefficients: [T; 3],
}

/// Columns that are centred at once, on the stack.
const BLOCK: usize = 64;

impl<T: Scalar> CalibratedTaylor<T> {
    /// The map on the `rank` leading coordinates of a calibration, with [`TaylorFit::Constrained`]
    /// coefficients.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if the rank is 0, [`Error::InvalidOption`] if it is above the head
    /// dimension or if the coefficients, in `T`, are not those of a positive kernel,
    /// [`Error::NotFinite`] if a mean or basis leaves the range of `T`, [`Error::Overflow`] if the
    /// fit leaves that of `f64`.
    pub fn new(rank: usize, calibration: &Calibration) -> Result<Self, Error> {
        Self::with_fit(rank, calibration, TaylorFit::default())
    }

    /// The same with coefficients fitted as chosen.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn with_fit(rank: usize, calibration: &Calibration, fit: TaylorFit) -> Result<Self, Error> {
        let coefficients = calibration.taylor_coefficients(rank, fit)?;
        Self::from_parts(
            calibration.query_mean().mapv(T::from_f64),
            calibration.key_mean().mapv(T::from_f64),
            rows(calibration.query_basis(), 0..rank).mapv(T::from_f64),
            rows(calibration.key_basis(), 0..rank).mapv(T::from_f64),
            coefficients.map(T::from_f64),
        )
    }

    /// The map of given means `μ_q`, `μ_k` `[head_dim]`, bases `M`, `M⁻ᵀ` `[rank, head_dim]` and
    /// coefficients `c`.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`], [`Error::Shape`] if the sizes do not fit together, [`Error::NotFinite`]
    /// if a mean or a basis holds NaN or infinity, [`Error::InvalidOption`] unless `c₀ > 0`,
    /// `c₁, c₂ ≥ 0` are finite with `c₁² < 2c₀c₂` or `c₁ = 0`.
    pub fn from_parts(
        query_mean: Array1<T>,
        key_mean: Array1<T>,
        query_basis: Array2<T>,
        key_basis: Array2<T>,
        coefficients: [T; 3],
    ) -> Result<Self, Error> {
        let (rank, head_dim) = query_basis.dim();
        check::at_least_one("rank", rank)?;
        check::at_least_one("head_dim", head_dim)?;
        check::array("rank", rank.saturating_add(1), rank.saturating_add(2))?;
        check::size("key_basis", "rows", rank, key_basis.nrows())?;
        check::size("key_basis", "columns", head_dim, key_basis.ncols())?;
        check::size("query_mean", "elements", head_dim, query_mean.len())?;
        check::size("key_mean", "elements", head_dim, key_mean.len())?;
        check::finite("query_mean", query_mean.view().insert_axis(Axis(0)))?;
        check::finite("key_mean", key_mean.view().insert_axis(Axis(0)))?;
        check::finite("query_basis", query_basis.view())?;
        check::finite("key_basis", key_basis.view())?;
        let [c0, c1, c2] = coefficients.map(T::as_f64);
        let positive = c0 > 0.0 && c1 >= 0.0 && c2 >= 0.0 && (c1 == 0.0 || c1 * c1 < 2.0 * c0 * c2);
        if !(positive && [c0, c1, c2].iter().all(|c| c.is_finite())) {
            return Err(Error::InvalidOption {
                which: "coefficients",
                found: format!("[{c0}, {c1}, {c2}]"),
                needed: "those of a positive kernel: c0 > 0, c1 and c2 not negative, c1^2 < 2 c0 \
                         c2",
            });
        }
        let standard = |x: Array2<T>| x.as_standard_layout().into_owned();
        let (query_basis, key_basis) = (standard(query_basis), standard(key_basis));
        Ok(Self { query_mean, key_mean, query_basis, key_basis, coefficients })
    }

    /// Coordinates it uses.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.query_basis.nrows()
    }

    /// `(c₀, c₁, c₂)`.
    #[must_use]
    pub fn coefficients(&self) -> [T; 3] {
        self.coefficients
    }

    /// `μ_q [head_dim]`.
    #[must_use]
    pub fn query_mean(&self) -> ArrayView1<'_, T> {
        self.query_mean.view()
    }

    /// `μ_k [head_dim]`.
    #[must_use]
    pub fn key_mean(&self) -> ArrayView1<'_, T> {
        self.key_mean.view()
    }

    /// The leading rows of `M`, `[rank, head_dim]`.
    #[must_use]
    pub fn query_basis(&self) -> ArrayView2<'_, T> {
        self.query_basis.view()
    }

    /// The leading rows of `M⁻ᵀ`, `[rank, head_dim]`.
    #[must_use]
    pub fn key_basis(&self) -> ArrayView2<'_, T> {
        self.key_basis.view()
    }

    /// Maps rows, as coordinates `basis·(x − mean)` and log scales `other·(x − origin)`.
    fn map_rows(
        &self,
        side: Side,
        x: ArrayView2<'_, T>,
        mut values: ArrayViewMut2<'_, T>,
        mut log_scale: ArrayViewMut1<'_, T>,
    ) -> Result<(), Error> {
        check_map(self.head_dim(), self.num_features(), x, &values, &log_scale)?;
        let zero = T::zero();
        let origin = ArrayView1::from(core::slice::from_ref(&zero));
        let origin = origin.broadcast(self.head_dim()).unwrap_or(origin);
        let (query_mean, key_mean) = (self.query_mean(), self.key_mean());
        let ([mean, origin, other], basis) = match side {
            Side::Query => ([query_mean, origin, key_mean], self.query_basis()),
            Side::Key => ([key_mean, key_mean, query_mean], self.key_basis()),
        };
        let roots = self.coefficients.map(T::sqrt);
        let (one, rank) = (T::one(), basis.nrows());
        for (i, (x, mut values)) in x.outer_iter().zip(values.outer_iter_mut()).enumerate() {
            let log: f64 = x
                .iter()
                .zip(origin)
                .zip(other)
                .map(|((x, o), m)| (x.as_f64() - o.as_f64()) * m.as_f64())
                .sum();
            // Rows are divided by max(1, |x|_∞), so that no coordinate overflows.
            let inverse = x.fold(one, |m, a| m.max(a.abs())).recip();
            // The coordinates stand where the linear features will.
            values.fill(T::zero());
            for start in (0..x.len()).step_by(BLOCK) {
                let part = start..x.len().min(start + BLOCK);
                let mut centred = [T::zero(); BLOCK];
                for (to, column) in centred.iter_mut().zip(part.clone()) {
                    *to = x[column] * inverse - mean[column] * inverse;
                }
                for (l, row) in basis.outer_iter().enumerate() {
                    let row = row.to_slice().unwrap_or_default();
                    values[1 + l] += kernel::dot(&row[part.clone()], &centred[..part.len()]);
                }
            }
            // So are these by their largest, whatever the rows were divided by.
            let largest = (1..=rank).fold(T::zero(), |m, l| m.max(values[l].abs()));
            let mut scale = log;
            let (rescale, factor) = if largest > inverse {
                scale += 2.0 * (largest.as_f64().ln() - inverse.as_f64().ln());
                (inverse / largest, largest.recip())
            } else {
                (one, inverse.recip())
            };
            log_scale[i] = T::from_f64(scale);
            if !(log_scale[i].is_finite()
                && largest.is_finite()
                && values.iter().all(|x| x.is_finite()))
            {
                return Err(Error::Overflow { which: "a coordinate or log scale", row: i });
            }
            (1..=rank).for_each(|l| values[l] *= factor);
            write_features(values, rank, rescale, roots);
        }
        Ok(())
    }
}

/// The features of the coordinates at `1..=rank`, which were multiplied by `rescale`: times its
/// square.
fn write_features<T: Scalar>(
    mut values: ArrayViewMut1<'_, T>,
    rank: usize,
    rescale: T,
    [constant, linear, quadratic]: [T; 3],
) {
    let half_root = T::from_f64(core::f64::consts::FRAC_1_SQRT_2);
    let mut to = 1 + rank;
    for l in 1..=rank {
        let a = values[l];
        values[to] = quadratic * half_root * a * a;
        for m in l + 1..=rank {
            values[to + m - l] = quadratic * a * values[m];
        }
        to += 1 + rank - l;
    }
    values[0] = constant * rescale * rescale;
    (1..=rank).for_each(|l| values[l] *= linear * rescale);
}

impl<T: Scalar> FeatureMap<T> for CalibratedTaylor<T> {
    fn head_dim(&self) -> usize {
        self.query_basis.ncols()
    }

    fn num_features(&self) -> usize {
        (self.rank() + 1) * (self.rank() + 2) / 2
    }

    fn map_queries(
        &self,
        x: ArrayView2<'_, T>,
        values: ArrayViewMut2<'_, T>,
        log_scale: ArrayViewMut1<'_, T>,
    ) -> Result<(), Error> {
        self.map_rows(Side::Query, x, values, log_scale)
    }

    fn map_keys(
        &self,
        x: ArrayView2<'_, T>,
        values: ArrayViewMut2<'_, T>,
        log_scale: ArrayViewMut1<'_, T>,
    ) -> Result<(), Error> {
        self.map_rows(Side::Key, x, values, log_scale)
    }

    fn backward(&self, gradient: MapGradient<'_, T>) -> Result<(), Error> {
        self.gradient(gradient)
    }

    fn parameters(&self) -> Parameters<T> {
        self.all_parameters()
    }

    fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Box<dyn FeatureMap<T>>, Error> {
        Ok(Box::new(self.with_parameters(parameters)?))
    }
}

/// What is saved.
#[cfg(feature = "serde")]
#[derive(Clone, serde::Serialize, serde::Deserialize)]
struct SavedCalibratedTaylor<T> {
    query_mean: Array1<T>,
    key_mean: Array1<T>,
    query_basis: Array2<T>,
    key_basis: Array2<T>,
    coefficients: [T; 3],
}

#[cfg(feature = "serde")]
impl<T: Scalar> From<CalibratedTaylor<T>> for SavedCalibratedTaylor<T> {
    fn from(map: CalibratedTaylor<T>) -> Self {
        let CalibratedTaylor { query_mean, key_mean, query_basis, key_basis, coefficients } = map;
        Self { query_mean, key_mean, query_basis, key_basis, coefficients }
    }
}

#[cfg(feature = "serde")]
impl<T: Scalar> TryFrom<SavedCalibratedTaylor<T>> for CalibratedTaylor<T> {
    type Error = Error;

    fn try_from(parts: SavedCalibratedTaylor<T>) -> Result<Self, Error> {
        let SavedCalibratedTaylor { query_mean, key_mean, query_basis, key_basis, coefficients } =
            parts;
        Self::from_parts(query_mean, key_mean, query_basis, key_basis, coefficients)
    }
}
