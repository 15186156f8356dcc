//! WPFF: weighted positive fixed features.

use crate::calibration::Calibration;
use crate::check;
use crate::error::Error;
use crate::features::FeatureMap;
use crate::features::delegate::features_by;
use crate::features::logits::Logits;
use crate::features::performer::Performer;
use crate::features::radii::Radii;
use crate::features::sums::{ProjectionSums, add_radii, add_weights};
use crate::parameters::Parameters;
use crate::projection::{self, Generator};
use crate::scalar::Scalar;
use ndarray::{Array1, Array2, ArrayView2};

/// Weighted positive fixed features (Chen et al., DiJiang, arXiv 2403.19928, theorems 3.2 and 3.3):
///
/// ```text
/// φ_i(x) = D_i·exp(r_i v_i·x − |x|²/2)/√m
/// ```
///
/// with fixed directions `v_i` on the sphere, radii `r_i = chi_d^{-1}(t_i)` and weights `D_i ≥ 0`,
/// all one until they are fitted to data by [`fit_weights`](crate::fit_weights). D stands on both
/// sides, so the kernel sees D².
///
/// The paper prints `e^{−|x|²}`; the identity `E exp(ω·x − |x|²/2)·exp(ω·y − |y|²/2) = exp(x·y)`
/// needs the half. Its claim of an O(1/m) error is not what we measure; see [the
/// theory](crate::theory#11-convergence-claimed-and-measured).
///
/// ```
/// use dijiang::{FeatureMap, Points, Radii, Wpff};
///
/// let map = Wpff::<f32>::new(64, 128, 3)?; // orthogonal directions, stratified radii
/// let sobol = Wpff::<f32>::with_sampling(64, 128, 3, Points::Sobol, Radii::Sobol)?;
/// assert_eq!(map.num_features(), sobol.num_features());
/// // a trained map comes in by its parts
/// let copy = Wpff::from_parts(
///     map.points().to_owned(),
///     map.radii().clone(),
///     map.weights().clone(),
/// )?;
/// assert_eq!(copy, map);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "SavedWpff<T>", into = "SavedWpff<T>"))]
#[cfg_attr(
    feature = "serde",
    serde(bound(
        serialize = "T: Scalar + serde::Serialize",
        deserialize = "T: Scalar + serde::Deserialize<'de>"
    ))
)]
pub struct Wpff<T> {
    points: Array2<T>,
    radii: Array1<T>,
    /// The same map by its projection `r_i v_i`.
    map: Performer<T>,
}

/// How [`Wpff`] places its directions on the sphere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Points {
    /// Blocks of `head_dim` orthogonal directions, each block turned at random (Haar).
    Orthogonal,
    /// Owen-scrambled Sobol points sent to the sphere by the normal quantile. Where the tables end,
    /// see [`projection`](crate::projection).
    Sobol,
}

impl<T: Scalar> Wpff<T> {
    /// [`Points::Orthogonal`] and [`Radii::Chi`], D = 1.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `head_dim` or `num_features` is 0.
    pub fn new(head_dim: usize, num_features: usize, seed: u64) -> Result<Self, Error> {
        Self::with_sampling(head_dim, num_features, seed, Points::Orthogonal, Radii::Chi)
    }

    /// Directions and radii as chosen, D = 1.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), and [`Error::InvalidOption`] unless the radii are [`Radii::Chi`] or
    /// [`Radii::Sobol`].
    pub fn with_sampling(
        head_dim: usize,
        num_features: usize,
        seed: u64,
        points: Points,
        radii: Radii,
    ) -> Result<Self, Error> {
        check::features(head_dim, num_features)?;
        let mut generator = Generator::new(seed);
        let (directions, sobol_radii) = match points {
            Points::Orthogonal => {
                let directions =
                    projection::orthogonal_directions(head_dim, num_features, &mut generator);
                let radius = projection::Sobol::new(&mut generator);
                (directions, (0..num_features).map(|i| radius.point(i, 0)).collect::<Vec<_>>())
            }
            Points::Sobol => {
                let sobol = projection::Sobol::new(&mut generator);
                let directions = projection::sobol_directions(head_dim, num_features, &sobol);
                (directions, (0..num_features).map(|i| sobol.point(i, head_dim)).collect())
            }
        };
        let radii = match radii {
            Radii::Chi => projection::stratified_chi(head_dim, num_features, &mut generator)?,
            Radii::Sobol => sobol_radii
                .into_iter()
                .map(|t| projection::chi_quantile(head_dim, t))
                .collect::<Result<_, _>>()?,
            Radii::Antithetic | Radii::Normal => {
                return Err(Error::InvalidOption {
                    which: "radii",
                    found: format!("`{radii:?}`"),
                    needed: "`Chi` or `Sobol`, quantiles of the chi distribution",
                });
            }
        };
        Self::from_parts(
            directions.mapv(T::from_f64),
            Array1::from(radii).mapv(T::from_f64),
            Array1::ones(num_features),
        )
    }

    /// The map of given directions `[num_features, head_dim]`, radii `[num_features]` and weights D
    /// `[num_features]`. Directions are used as they are, of length one or not.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`], [`Error::Shape`] if the sizes do not fit together, [`Error::NotFinite`]
    /// if a number is NaN or infinite, [`Error::InvalidOption`] if a weight is negative, or all are
    /// zero.
    pub fn from_parts(
        points: Array2<T>,
        radii: Array1<T>,
        weights: Array1<T>,
    ) -> Result<Self, Error> {
        check::size("radii", "elements", points.nrows(), radii.len())?;
        check::finite("points", points.view())?;
        check::finite("radii", radii.view().insert_axis(ndarray::Axis(0)))?;
        let projection = &points * &radii.view().insert_axis(ndarray::Axis(1));
        let map = Performer::from_projection(projection)?.with_weights(weights)?;
        Ok(Self { points, radii, map })
    }

    /// Sets the weights D, see [`fit_weights`](crate::fit_weights).
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if there are not `num_features`, [`Error::InvalidOption`] if one is
    /// negative or not finite, or all are zero.
    pub fn with_weights(mut self, weights: Array1<T>) -> Result<Self, Error> {
        self.map = self.map.with_weights(weights)?;
        Ok(self)
    }

    /// Fits the weights D to the far pairs of a calibration, from D = 1, with
    /// [`Calibration::fit_weights`] and a ridge of 0.01. The kernel must use the calibration's
    /// scale.
    ///
    /// # Errors
    ///
    /// Those of [`Calibration::fit_weights`].
    pub fn calibrated(self, calibration: &Calibration) -> Result<Self, Error> {
        calibration.refit(self, Self::with_weights)
    }

    /// The same map with other `points`, `radii` or `weights`, as [`FeatureMap::with_parameters`]
    /// makes it.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] if there is no parameter of a name, or it has another shape; those of
    /// [`from_parts`](Self::from_parts).
    pub fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Self, Error> {
        let mut all = FeatureMap::parameters(self);
        all.set(parameters)?;
        let points = all.matrix("points").to_owned();
        Self::from_parts(points, all.vector("radii"), all.vector("weights"))
    }

    /// The directions `[num_features, head_dim]`.
    #[must_use]
    pub fn points(&self) -> ArrayView2<'_, T> {
        self.points.view()
    }

    /// The radii `[num_features]`.
    #[must_use]
    pub fn radii(&self) -> &Array1<T> {
        &self.radii
    }

    /// The weights D `[num_features]`.
    #[must_use]
    pub fn weights(&self) -> &Array1<T> {
        self.map.weights()
    }
}

features_by!([T: Scalar] Wpff<T>, this => &this.map, {
    fn parameters(&self) -> Parameters<T> {
        Parameters::new()
            .with("points", self.points.clone().into_dyn())
            .with("radii", self.radii.clone().into_dyn())
            .with("weights", self.weights().clone().into_dyn())
    }

    fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Box<dyn FeatureMap<T>>, Error> {
        Ok(Box::new(self.with_parameters(parameters)?))
    }

    fn logits(&self) -> Option<Logits<T>> {
        self.map.logits()
    }

    fn add_parameters(&self, sums: [&ProjectionSums<T>; 2], d_parameters: &mut Parameters<T>) {
        // ω_i = r_i·u_i
        add_radii(sums, d_parameters, self.points.view());
        if let Some(d_points) = d_parameters.get_mut("points") {
            for d_projection in sums.map(ProjectionSums::projection) {
                if !d_projection.is_empty() {
                    let radii = self.radii.view().insert_axis(ndarray::Axis(1));
                    *d_points += &(d_projection * radii);
                }
            }
        }
        add_weights(sums, d_parameters, "weights", self.weights().iter());
    }
});

/// What is saved.
#[cfg(feature = "serde")]
#[derive(Clone, serde::Serialize, serde::Deserialize)]
struct SavedWpff<T> {
    points: Array2<T>,
    radii: Array1<T>,
    weights: Array1<T>,
}

#[cfg(feature = "serde")]
impl<T: Scalar> From<Wpff<T>> for SavedWpff<T> {
    fn from(map: Wpff<T>) -> Self {
        Self { weights: map.weights().clone(), points: map.points, radii: map.radii }
    }
}

#[cfg(feature = "serde")]
impl<T: Scalar> TryFrom<SavedWpff<T>> for Wpff<T> {
    type Error = Error;

    fn try_from(parts: SavedWpff<T>) -> Result<Self, Error> {
        Self::from_parts(parts.points, parts.radii, parts.weights)
    }
}
