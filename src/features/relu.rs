//! ReLU features, of a model trained with them.

use crate::check;
use crate::error::Error;
use crate::features::columns::{ColumnMap, Columns, take_maxima};
use crate::features::delegate::features_by;
use crate::kernel;
use crate::kernel::buffer::Buffer;
use crate::kernel::loops::products::{Epilogue, Matrix, Product};
use crate::scalar::Scalar;
use ndarray::Array2;

/// `φ(x)_i = max(0, ω_i·x) + ε`, or `max(0, x_i) + ε` without a projection (the generalised kernel
/// of Choromanski et al., arXiv 2009.14794, section 2.2; ε = 0.001 as in performer-pytorch).
///
/// ε belongs to the features: it keeps every one of them positive, so that the normaliser is never
/// zero. It does not aim at softmax attention.
///
/// ```
/// use dijiang::{FeatureMap, ReluFeatures};
/// use ndarray::{Array1, Array2, array};
///
/// let map = ReluFeatures::<f64>::new(2)?.with_epsilon(0.25)?;
/// let (mut values, mut log_scale) = (Array2::zeros((1, 2)), Array1::zeros(1));
/// map.map_queries(array![[0.5, -1.0]].view(), values.view_mut(), log_scale.view_mut())?;
/// assert_eq!((values.row(0).to_vec(), log_scale[0]), (vec![0.75, 0.25], 0.0));
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "SavedRelu<T>", into = "SavedRelu<T>"))]
#[cfg_attr(
    feature = "serde",
    serde(bound(
        serialize = "T: Scalar + serde::Serialize",
        deserialize = "T: Scalar + serde::Deserialize<'de>"
    ))
)]
pub struct ReluFeatures<T> {
    head_dim: usize,
    projection: Option<Array2<T>>,
    epsilon: T,
}

impl<T: Scalar> ReluFeatures<T> {
    /// The map without a projection: `head_dim` features.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `head_dim` is 0.
    pub fn new(head_dim: usize) -> Result<Self, Error> {
        check::at_least_one("head_dim", head_dim)?;
        Ok(Self { head_dim, projection: None, epsilon: T::from_f64(0.001) })
    }

    /// The map with a projection `[num_features, head_dim]`, whose rows are ω.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if it has no rows or columns, [`Error::NotFinite`] if it holds NaN or
    /// infinity.
    pub fn from_projection(projection: Array2<T>) -> Result<Self, Error> {
        check::projection(projection.view())?;
        Ok(Self {
            projection: Some(projection.as_standard_layout().into_owned()),
            ..Self::new(projection.ncols())?
        })
    }

    /// Sets ε. Zero is allowed: then a query whose features meet no key's gives
    /// [`Error::Normalizer`].
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if it is negative or not finite.
    pub fn with_epsilon(mut self, epsilon: f64) -> Result<Self, Error> {
        check::epsilon::<T>(epsilon)?;
        self.epsilon = T::from_f64(epsilon);
        Ok(self)
    }
}

features_by!([T: Scalar] ReluFeatures<T>, this => this as &dyn ColumnMap<T>);

impl<T: Scalar> ColumnMap<T> for ReluFeatures<T> {
    fn head_dim(&self) -> usize {
        self.head_dim
    }

    fn num_features(&self) -> usize {
        self.projection.as_ref().map_or(self.head_dim, Array2::nrows)
    }

    fn map_columns(
        &self,
        columns: &mut Columns<'_, T>,
        scratch: &mut [Buffer<T>; 2],
    ) -> Result<(), Error> {
        let m = self.num_features();
        let Columns { x, width, tokens, values, log_scale, .. } = columns.with_features(m);
        match &self.projection {
            None => values.copy_from_slice(x),
            Some(projection) => {
                let projection = projection.as_slice().unwrap_or_default();
                if width == 1 {
                    kernel::rows_dot(T::one(), x, projection, values);
                } else {
                    let (a, into) = (Matrix::rows(projection, self.head_dim), Epilogue::Set);
                    Product {
                        m,
                        n: width,
                        k: self.head_dim,
                        a,
                        b: x,
                        ldb: width,
                        c: values,
                        ldc: width,
                        into,
                    }
                    .run();
                }
            }
        }
        if !kernel::all_finite(values) {
            let finite =
                |t: &usize| values.iter().skip(*t).step_by(width).all(|value| value.is_finite());
            if let Some(row) = (0..tokens).find(|t| !finite(t)) {
                return Err(Error::Overflow { which: "a feature", row });
            }
        }
        for value in values.iter_mut() {
            *value = value.max(T::zero()) + self.epsilon;
        }
        log_scale.fill(T::zero());
        take_maxima(values, log_scale, &mut scratch[0]);
        Ok(())
    }
}

/// What is saved.
#[cfg(feature = "serde")]
#[derive(Clone, serde::Serialize, serde::Deserialize)]
struct SavedRelu<T> {
    head_dim: usize,
    projection: Option<Array2<T>>,
    epsilon: T,
}

#[cfg(feature = "serde")]
impl<T> From<ReluFeatures<T>> for SavedRelu<T> {
    fn from(map: ReluFeatures<T>) -> Self {
        Self { head_dim: map.head_dim, projection: map.projection, epsilon: map.epsilon }
    }
}

#[cfg(feature = "serde")]
impl<T: Scalar> TryFrom<SavedRelu<T>> for ReluFeatures<T> {
    type Error = Error;

    fn try_from(parts: SavedRelu<T>) -> Result<Self, Error> {
        let map = match parts.projection {
            Some(projection) => Self::from_projection(projection)?,
            None => Self::new(parts.head_dim)?,
        };
        check::size("projection", "columns", parts.head_dim, map.head_dim)?;
        // It is checked as an `f64` and kept as it is.
        Ok(Self { epsilon: parts.epsilon, ..map.with_epsilon(parts.epsilon.as_f64())? })
    }
}
