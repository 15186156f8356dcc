//! Frequency-domain maps: DiJiang's DCT features, through a fast transform.

mod directions;
pub(crate) mod transform;

use crate::calibration::Calibration;
use crate::check;
use crate::error::Error;
use crate::features::FeatureMap;
use crate::features::columns::ColumnMap;
use crate::features::dct::directions::MixedDirections;
use crate::features::dct::transform::{FastDirections, FastExponential};
use crate::features::delegate::features_by;
use crate::features::exponential::Weights;
use crate::features::logits::Logits;
use crate::features::official_dijiang::OfficialDijiang;
use crate::features::radii::Radii;
use crate::features::sums::{ProjectionSums, add_radii, add_weights};
use crate::parameters::Parameters;
use crate::projection::{self, Generator};
use crate::scalar::Scalar;
use ndarray::{Array1, Array2, ArrayView2};

/// Positive features on DCT directions, DiJiang's WDCF (Chen et al., arXiv 2403.19928, section 3.3)
/// for the softmax kernel:
///
/// ```text
/// φ_i(x) = D_i·exp(ω_i·x − |x|²/2)/√m,    ω_i = r_i·(row of C S_b)·(C S_0)
/// ```
///
/// `C` is the orthonormal DCT-II matrix, the `S` are diagonals of random signs: `S_0` once, a fresh
/// `S_b` for each block of `head_dim` features (without fresh signs, blocks beyond the first repeat
/// the same directions). The first transform `y = C S_0 x` keeps lengths and spreads single large
/// coordinates, which real keys have, over all frequencies. A vector costs `1 + ⌈m/d⌉` fast
/// transforms, for any `head_dim` and `num_features`; up to `head_dim` 64 a product with the whole
/// matrix is faster and taken instead.
///
/// [`OfficialDijiang`] is the map of the released code, another function.
///
/// ```
/// use dijiang::{DctFeatures, FeatureMap, Radii};
/// use ndarray::{Array1, Array2, array};
///
/// let map = DctFeatures::<f64>::new(2, 4, 0)?.with_radii(Radii::Antithetic)?;
/// let x = array![[0.3, -0.5], [0.1, 0.7]];
/// let (mut values, mut log_scale) = (Array2::zeros((2, 4)), Array1::zeros(2));
/// map.map_queries(x.view(), values.view_mut(), log_scale.view_mut())?;
/// let estimate = values.row(0).dot(&values.row(1)) * (log_scale[0] + log_scale[1]).exp();
/// let exact = x.row(0).dot(&x.row(1)).exp();
/// assert!((estimate / exact - 1.0).abs() < 0.01); // four features
///     
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "SavedDct<T>", into = "SavedDct<T>"))]
#[cfg_attr(
    feature = "serde",
    serde(bound(
        serialize = "T: Scalar + serde::Serialize",
        deserialize = "T: Scalar + serde::Deserialize<'de>"
    ))
)]
pub struct DctFeatures<T> {
    seed: u64,
    weights: Weights<T>,
    features: FastExponential<T, MixedDirections<T>>,
}

impl<T: Scalar> DctFeatures<T> {
    /// `num_features` features of vectors of `head_dim` columns, with [`Radii::Chi`] and D = 1.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `head_dim` or `num_features` is 0.
    pub fn new(head_dim: usize, num_features: usize, seed: u64) -> Result<Self, Error> {
        Self::seeded(head_dim, num_features, seed, Radii::Chi)
    }

    fn seeded(
        head_dim: usize,
        num_features: usize,
        seed: u64,
        radii: Radii,
    ) -> Result<Self, Error> {
        check::features(head_dim, num_features)?;
        let count = if radii == Radii::Antithetic {
            check::even(num_features)?;
            num_features / 2
        } else {
            num_features
        };
        let mut generator = Generator::new(seed);
        let mixing = (0..head_dim).map(|_| generator.sign()).collect();
        let signs = (0..count.div_ceil(head_dim) * head_dim).map(|_| generator.sign()).collect();
        #[allow(clippy::cast_precision_loss)]
        let radii = match radii {
            Radii::Chi => projection::stratified_chi(head_dim, num_features, &mut generator)?,
            Radii::Normal => projection::stratified_normal(num_features, &mut generator)?,
            Radii::Antithetic => {
                let length = (head_dim as f64).sqrt();
                (0..num_features).map(|i| if i < count { length } else { -length }).collect()
            }
            Radii::Sobol => {
                return Err(Error::InvalidOption {
                    which: "radii",
                    found: "`Sobol`".to_owned(),
                    needed: "`Chi`, `Antithetic` or `Normal`; `Wpff` has Sobol points",
                });
            }
        };
        let radii = radii.into_iter().map(T::from_f64).collect();
        Ok(Self::assemble(seed, MixedDirections::new(count, mixing, signs, radii)))
    }

    fn assemble(seed: u64, directions: MixedDirections<T>) -> Self {
        let weights = Weights::ones(directions.radii().len());
        let features = FastExponential::new(directions, &weights);
        Self { seed, weights, features }
    }

    /// [`OfficialDijiang::new`]: the map of the released code.
    ///
    /// # Errors
    ///
    /// Those of [`OfficialDijiang::new`].
    pub fn official(radii: Array1<T>) -> Result<OfficialDijiang<T>, Error> {
        OfficialDijiang::new(radii)
    }

    /// [`OfficialDijiang::from_projection`]: the map of the released code, from a checkpoint.
    ///
    /// # Errors
    ///
    /// Those of [`OfficialDijiang::from_projection`].
    pub fn official_from_projection(
        projection: ArrayView2<'_, T>,
    ) -> Result<OfficialDijiang<T>, Error> {
        OfficialDijiang::from_projection(projection)
    }

    /// The same directions with other radii, and D = 1 again.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if the radii are [`Radii::Antithetic`] and the number of features
    /// is odd, or if they are [`Radii::Sobol`].
    pub fn with_radii(self, radii: Radii) -> Result<Self, Error> {
        Self::seeded(self.head_dim(), self.num_features(), self.seed, radii)
    }

    /// Sets the weights D of the features, see [`fit_weights`](crate::fit_weights).
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if there are not `num_features`, [`Error::InvalidOption`] if one is
    /// negative or not finite, or all are zero.
    pub fn with_weights(mut self, weights: Array1<T>) -> Result<Self, Error> {
        self.weights = Weights::new(self.num_features(), weights)?;
        self.features.set_weights(&self.weights);
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

    /// The same map with other `radii` or `weights`, as [`FeatureMap::with_parameters`] makes it.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] if there is no parameter of a name, or it has another shape;
    /// [`Error::NotFinite`] if a radius is NaN or infinite; those of
    /// [`with_weights`](Self::with_weights).
    pub fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Self, Error> {
        let mut all = FeatureMap::parameters(self);
        all.set(parameters)?;
        let radii = all.vector("radii");
        check::finite("radii", radii.view().insert_axis(ndarray::Axis(0)))?;
        let directions = self.features.directions().clone().with_radii(radii);
        Self::assemble(self.seed, directions).with_weights(all.vector("weights"))
    }

    /// The radii `[num_features]`, in the order of the features.
    #[must_use]
    pub fn radii(&self) -> &Array1<T> {
        self.features.directions().radii()
    }

    /// The weights D `[num_features]`.
    #[must_use]
    pub fn weights(&self) -> Array1<T> {
        self.weights.factors.clone()
    }

    /// The matrix `[num_features, head_dim]` whose rows are the ω of the features, `ω_i·x` being
    /// the exponent.
    #[must_use]
    pub fn projection(&self) -> Array2<T> {
        self.features.projection()
    }
}

features_by!([T: Scalar] DctFeatures<T>, this => &this.features as &dyn ColumnMap<T>, {
    fn parameters(&self) -> Parameters<T> {
        Parameters::new()
            .with("radii", self.radii().clone().into_dyn())
            .with("weights", self.weights().into_dyn())
    }

    fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Box<dyn FeatureMap<T>>, Error> {
        Ok(Box::new(self.with_parameters(parameters)?))
    }

    fn logits(&self) -> Option<Logits<T>> {
        Some(Logits::of_weights(self.projection().view(), &self.weights))
    }

    fn add_parameters(&self, sums: [&ProjectionSums<T>; 2], d_parameters: &mut Parameters<T>) {
        if d_parameters.get("radii").is_some() {
            add_radii(sums, d_parameters, self.features.unit_projection().view());
        }
        add_weights(sums, d_parameters, "weights", self.weights.factors.iter());
    }
});

impl<T: PartialEq> PartialEq for DctFeatures<T> {
    fn eq(&self, other: &Self) -> bool {
        self.weights == other.weights && self.features.directions() == other.features.directions()
    }
}

/// What is saved: everything random, so that a later release restores the same map.
#[cfg(feature = "serde")]
#[derive(Clone, serde::Serialize, serde::Deserialize)]
struct SavedDct<T> {
    seed: u64,
    directions: usize,
    mixing: Vec<i8>,
    signs: Vec<i8>,
    radii: Vec<T>,
    weights: Vec<T>,
}

#[cfg(feature = "serde")]
impl<T: Scalar> From<DctFeatures<T>> for SavedDct<T> {
    fn from(map: DctFeatures<T>) -> Self {
        let DctFeatures { seed, weights, features } = map;
        let (directions, [mixing, signs], radii) = features.directions().parts();
        Self { seed, directions, mixing, signs, radii, weights: weights.factors.to_vec() }
    }
}

#[cfg(feature = "serde")]
impl<T: Scalar> TryFrom<SavedDct<T>> for DctFeatures<T> {
    type Error = Error;

    fn try_from(saved: SavedDct<T>) -> Result<Self, Error> {
        let SavedDct { seed, directions, mixing, signs, radii, weights } = saved;
        let head_dim = mixing.len();
        check::features(head_dim, radii.len())?;
        check::at_least_one("directions", directions)?;
        check::features(head_dim, directions)?;
        let len = directions.div_ceil(head_dim) * head_dim;
        check::size("signs", "elements", len, signs.len())?;
        let len = radii.len().div_ceil(directions) * directions;
        check::size("radii", "elements", len, radii.len())?;
        let radii = Array1::from(radii);
        check::finite("radii", radii.view().insert_axis(ndarray::Axis(0)))?;
        let cast = |x: Vec<i8>| x.into_iter().map(|s| f64::from(s.signum() | 1)).collect();
        let directions = MixedDirections::new(directions, cast(mixing), cast(signs), radii);
        Self::assemble(seed, directions).with_weights(Array1::from(weights))
    }
}
