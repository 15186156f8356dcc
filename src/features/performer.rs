//! FAVOR+: positive random features.

use crate::calibration::Calibration;
use crate::check;
use crate::error::Error;
use crate::features::FeatureMap;
use crate::features::columns::ColumnMap;
use crate::features::delegate::features_by;
use crate::features::exponential::{Dense, Weights};
use crate::features::logits::Logits;
use crate::features::sums::{ProjectionSums, add_projection, add_weights};
use crate::parameters::Parameters;
use crate::projection;
use crate::scalar::Scalar;
use ndarray::{Array1, Array2, ArrayView2, Axis, concatenate};

/// Positive random features of the softmax kernel, FAVOR+ (Choromanski et al., arXiv 2009.14794,
/// lemma 1):
///
/// ```text
/// φ_i(x) = D_i·exp(ω_i·x − |x|²/2)/√m,    ω_i ~ N(0, I),    D_i = 1 unless set
/// ```
///
/// so that `E φ(x)·φ(y) = exp(x·y)`, exactly. The relative variance of the estimate is
/// `(e^{|x + y|²} − 1)/m` for independent ω: on the heads of trained language models, where
/// `|x + y|²` is 25 to 100, it is useless without a part that is exact.
///
/// ```
/// use dijiang::{FeatureMap, Performer};
/// use ndarray::{Array1, Array2, array};
///
/// let map = Performer::<f64>::new(2, 4096, 0)?;
/// let x = array![[0.3, -0.5], [0.1, 0.7]];
/// let (mut values, mut log_scale) = (Array2::zeros((2, 4096)), Array1::zeros(2));
/// map.map_queries(x.view(), values.view_mut(), log_scale.view_mut())?;
/// let estimate = values.row(0).dot(&values.row(1)) * (log_scale[0] + log_scale[1]).exp();
/// let exact = x.row(0).dot(&x.row(1)).exp();
/// assert!((estimate / exact - 1.0).abs() < 0.05);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "SavedPerformer<T>", into = "SavedPerformer<T>"))]
#[cfg_attr(
    feature = "serde",
    serde(bound(
        serialize = "T: Scalar + serde::Serialize",
        deserialize = "T: Scalar + serde::Deserialize<'de>"
    ))
)]
pub struct Performer<T> {
    projection: Array2<T>,
    weights: Weights<T>,
    /// What they come to.
    dense: Dense<T>,
}

impl<T: PartialEq> PartialEq for Performer<T> {
    fn eq(&self, other: &Self) -> bool {
        self.projection == other.projection && self.weights == other.weights
    }
}

impl<T: Scalar> Performer<T> {
    /// FAVOR+ with orthogonal projections: blocks of `head_dim` directions that are orthogonal to
    /// each other (Haar), each with an independent length of the chi distribution.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `head_dim` or `num_features` is 0.
    pub fn new(head_dim: usize, num_features: usize, seed: u64) -> Result<Self, Error> {
        Self::from_f64(projection::orthogonal_gaussian(head_dim, num_features, seed)?)
    }

    /// Independent `ω_i ~ N(0, I)`.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn iid(head_dim: usize, num_features: usize, seed: u64) -> Result<Self, Error> {
        Self::from_f64(projection::gaussian(head_dim, num_features, seed)?)
    }

    /// Orthogonal projections in pairs: the second half of the features has −ω where the first has
    /// ω (the hyperbolic features of the same paper, whose variance is never larger).
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), and [`Error::InvalidOption`] if `num_features` is odd.
    pub fn hyperbolic(head_dim: usize, num_features: usize, seed: u64) -> Result<Self, Error> {
        check::even(num_features)?;
        let half = projection::orthogonal_gaussian(head_dim, num_features / 2, seed)?;
        let negated = half.mapv(|w| -w);
        Self::from_f64(concatenate![Axis(0), half, negated])
    }

    fn from_f64(projection: Array2<f64>) -> Result<Self, Error> {
        Self::from_projection(projection.mapv(T::from_f64))
    }

    /// The map of a given projection `[num_features, head_dim]`, whose rows are ω.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if it has no rows or columns, [`Error::NotFinite`] if it holds NaN or
    /// infinity.
    pub fn from_projection(projection: Array2<T>) -> Result<Self, Error> {
        check::projection(projection.view())?;
        let weights = Weights::ones(projection.nrows());
        let dense = Dense::new(projection.view(), &weights);
        Ok(Self { projection: projection.as_standard_layout().into_owned(), weights, dense })
    }

    /// Sets the weights D of the features, see [`fit_weights`](crate::fit_weights).
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if there are not `num_features`, [`Error::InvalidOption`] if one is
    /// negative or not finite, or all are zero.
    pub fn with_weights(mut self, weights: Array1<T>) -> Result<Self, Error> {
        self.weights = Weights::new(self.projection.nrows(), weights)?;
        self.dense = Dense::new(self.projection.view(), &self.weights);
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

    /// The same map with another `projection` or other `weights`, as
    /// [`FeatureMap::with_parameters`] makes it.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] if there is no parameter of a name, or it has another shape; those of
    /// [`from_projection`](Self::from_projection) and [`with_weights`](Self::with_weights).
    pub fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Self, Error> {
        let mut all = FeatureMap::parameters(self);
        all.set(parameters)?;
        Self::from_projection(all.matrix("projection").to_owned())?
            .with_weights(all.vector("weights"))
    }

    /// The projection `[num_features, head_dim]`.
    #[must_use]
    pub fn projection(&self) -> ArrayView2<'_, T> {
        self.projection.view()
    }

    /// The weights D.
    #[must_use]
    pub fn weights(&self) -> &Array1<T> {
        &self.weights.factors
    }
}

features_by!([T: Scalar] Performer<T>, this => &this.dense as &dyn ColumnMap<T>, {
    fn parameters(&self) -> Parameters<T> {
        Parameters::new()
            .with("projection", self.projection.clone().into_dyn())
            .with("weights", self.weights.factors.clone().into_dyn())
    }

    fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Box<dyn FeatureMap<T>>, Error> {
        Ok(Box::new(self.with_parameters(parameters)?))
    }

    fn logits(&self) -> Option<Logits<T>> {
        Some(Logits::of_weights(self.projection.view(), &self.weights))
    }

    fn add_parameters(&self, sums: [&ProjectionSums<T>; 2], d_parameters: &mut Parameters<T>) {
        add_projection(sums, d_parameters, "projection");
        add_weights(sums, d_parameters, "weights", self.weights.factors.iter());
    }
});

/// What is saved.
#[cfg(feature = "serde")]
#[derive(Clone, serde::Serialize, serde::Deserialize)]
struct SavedPerformer<T> {
    projection: Array2<T>,
    weights: Array1<T>,
}

#[cfg(feature = "serde")]
impl<T> From<Performer<T>> for SavedPerformer<T> {
    fn from(map: Performer<T>) -> Self {
        Self { projection: map.projection, weights: map.weights.factors }
    }
}

#[cfg(feature = "serde")]
impl<T: Scalar> TryFrom<SavedPerformer<T>> for Performer<T> {
    type Error = Error;

    fn try_from(parts: SavedPerformer<T>) -> Result<Self, Error> {
        Self::from_projection(parts.projection)?.with_weights(parts.weights)
    }
}
