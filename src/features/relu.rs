//! ReLU features, of a model trained with them.

use crate::check;
use crate::error::Error;
use crate::features::FeatureMap;
use crate::features::columns::{
    ColumnGradient, ColumnMap, Columns, factors_of_columns, take_maxima,
};
use crate::features::delegate::features_by;
use crate::features::side::Side;
use crate::features::sums::{ProjectionSums, add_projection};
use crate::kernel;
use crate::kernel::buffer::Buffer;
use crate::kernel::loops::products::{Epilogue, Matrix, Product};
use crate::parameters::Parameters;
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

features_by!([T: Scalar] ReluFeatures<T>, this => this as &dyn ColumnMap<T>, {
    fn parameters(&self) -> Parameters<T> {
        let projection = self.projection.clone().map(|x| ("projection".to_owned(), x.into_dyn()));
        projection.into_iter().collect()
    }

    fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Box<dyn FeatureMap<T>>, Error> {
        Ok(Box::new(self.with_parameters(parameters)?))
    }

    fn add_parameters(&self, sums: [&ProjectionSums<T>; 2], d_parameters: &mut Parameters<T>) {
        add_projection(sums, d_parameters, "projection");
    }
});

impl<T: Scalar> ReluFeatures<T> {
    /// The same map with another `projection`, if it has one, as [`FeatureMap::with_parameters`]
    /// makes it.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] if there is no parameter of a name, or it has another shape; those of
    /// [`from_projection`](Self::from_projection).
    pub fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Self, Error> {
        let mut all = FeatureMap::parameters(self);
        all.set(parameters)?;
        if self.projection.is_none() {
            return Ok(self.clone());
        }
        let map = Self::from_projection(all.matrix("projection").to_owned())?;
        Ok(Self { epsilon: self.epsilon, ..map })
    }

    /// Ωx, or x itself.
    fn logits(&self, x: &[T], width: usize, values: &mut [T]) {
        let m = values.len() / width;
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
    }
}

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
        let m = ColumnMap::num_features(self);
        let Columns { x, width, tokens, values, log_scale, .. } = columns.with_features(m);
        self.logits(x, width, values);
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

    fn projected(&self) -> usize {
        self.projection.as_ref().map_or(0, Array2::nrows)
    }

    fn backward_columns(
        &self,
        _: Side,
        gradient: &mut ColumnGradient<'_, T>,
        sums: Option<&mut ProjectionSums<T>>,
        [logits, factors]: &mut [Buffer<T>; 2],
    ) {
        let ColumnGradient { x, width, ref mut d_values, ref mut d_x, .. } = *gradient;
        logits.resize(d_values.len());
        self.logits(x, width, logits);
        // where the logit is positive, the gradient passes, by the factor of the values
        for (d_value, logit) in d_values.iter_mut().zip(logits.iter_mut()) {
            *d_value = if *logit > T::zero() { *d_value } else { T::zero() };
            *logit = logit.max(T::zero()) + self.epsilon;
        }
        factors_of_columns(logits, width, factors);
        for row in d_values.chunks_exact_mut(width) {
            row.iter_mut().zip(&**factors).for_each(|(d_value, &factor)| *d_value *= factor);
        }
        let Some(projection) = &self.projection else { return d_x.copy_from_slice(d_values) };
        Product {
            m: self.head_dim,
            n: width,
            k: projection.nrows(),
            a: Matrix::columns(projection.as_slice().unwrap_or_default(), self.head_dim),
            b: d_values,
            ldb: width,
            c: d_x,
            ldc: width,
            into: Epilogue::Set,
        }
        .run();
        if let Some(sums) = sums {
            let ColumnGradient { x, width, tokens, ref d_values, .. } = *gradient;
            sums.add(x, [tokens, width], d_values);
        }
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
