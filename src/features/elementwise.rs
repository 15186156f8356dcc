//! Element-wise maps: elu + 1, ReLU and the identity. They do not estimate `exp(x·y)`; they are
//! kernels that models are trained with.

use super::{ColumnMap, FeatureMap, largest_of_columns, map_by_columns};
use crate::kernel;
use crate::kernel::buffer::Buffer;
use crate::kernel::loops::products::{Epilogue, Matrix, Product};
use crate::{Error, Scalar, check};
use core::marker::PhantomData;
use ndarray::{Array2, ArrayView2, ArrayViewMut1, ArrayViewMut2};

/// What brings a largest absolute value near one, and the logarithm of its inverse.
fn normal_factor<T: Scalar>(largest: T) -> (T, T) {
    if largest <= T::one() && (largest >= T::from_f64(1.0 / 1024.0) || largest == T::zero()) {
        return (T::one(), T::zero());
    }
    // the inverse of a number below the normal ones is infinite
    let normal = largest.max(T::min_positive_value());
    (normal.recip(), normal.ln())
}

/// Brings columns to a largest absolute value near one and adds the logarithm of what was taken
/// out; a column of zeros stays as it is.
fn take_maxima<T: Scalar>(values: &mut [T], log_scale: &mut [T], scratch: &mut Buffer<T>) {
    if let [log_scale] = log_scale {
        let (factor, log) = normal_factor(kernel::max_abs(values));
        kernel::scale(values, factor);
        *log_scale += log;
        return;
    }
    scratch.resize(log_scale.len());
    scratch.fill(T::zero());
    for row in values.chunks_exact(scratch.len()) {
        scratch.iter_mut().zip(row).for_each(|(largest, &x)| *largest = largest.max(x.abs()));
    }
    for (factor, log_scale) in scratch.iter_mut().zip(log_scale) {
        let log;
        (*factor, log) = normal_factor(*factor);
        *log_scale += log;
    }
    for row in values.chunks_exact_mut(scratch.len()) {
        row.iter_mut().zip(&**scratch).for_each(|(value, &factor)| *value *= factor);
    }
}

/// A map with nothing but a number of columns, and as many features: all but its [`ColumnMap`].
macro_rules! map_of_columns {
    ($map:ident) => {
        impl<T: Scalar> $map<T> {
            /// The map of vectors of `head_dim` columns, to as many features.
            ///
            /// # Errors
            ///
            /// [`Error::ZeroSize`] if `head_dim` is 0.
            pub fn new(head_dim: usize) -> Result<Self, Error> {
                check::at_least_one("head_dim", head_dim)?;
                Ok(Self { head_dim, number: PhantomData })
            }
        }

        impl<T: Scalar> FeatureMap<T> for $map<T> {
            fn head_dim(&self) -> usize {
                self.head_dim
            }

            fn num_features(&self) -> usize {
                self.head_dim
            }

            fn map_queries(
                &self,
                x: ArrayView2<'_, T>,
                values: ArrayViewMut2<'_, T>,
                log_scale: ArrayViewMut1<'_, T>,
            ) -> Result<(), Error> {
                map_by_columns(self, self.head_dim, self.head_dim, x, values, log_scale)
            }

            fn column_map(&self) -> Option<&dyn ColumnMap<T>> {
                Some(self)
            }
        }

        #[cfg(feature = "serde")]
        impl<T> From<$map<T>> for usize {
            fn from(map: $map<T>) -> Self {
                map.head_dim
            }
        }

        #[cfg(feature = "serde")]
        impl<T: Scalar> TryFrom<usize> for $map<T> {
            type Error = Error;

            fn try_from(head_dim: usize) -> Result<Self, Error> {
                Self::new(head_dim)
            }
        }
    };
}
map_of_columns!(EluFeatures);
map_of_columns!(IdentityFeatures);

/// `φ(x)_i = elu(x_i) + 1`: `x + 1` for x > 0, `e^x` otherwise (Katharopoulos et al., arXiv
/// 2006.16236, equation 7).
///
/// The paper's code takes raw vectors: use [`with_scale(1.0)`](crate::LinearAttention::with_scale)
/// for that. It is a trained model's own kernel and does not aim at softmax attention.
///
/// ```
/// use dijiang::{EluFeatures, FeatureMap};
/// use ndarray::{Array1, Array2, array};
///
/// let map = EluFeatures::<f64>::new(2)?;
/// let (mut values, mut log_scale) = (Array2::zeros((1, 2)), Array1::zeros(1));
/// map.map_queries(array![[3.0, -1.0]].view(), values.view_mut(), log_scale.view_mut())?;
/// let features = values.row(0).mapv(|value| value * log_scale[0].exp());
/// assert!(
///     (features[0] - 4.0).abs() < 1e-14 && (features[1] - (-1f64).exp()).abs() < 1e-14
/// );
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "usize", into = "usize", bound = "T: Scalar"))]
pub struct EluFeatures<T> {
    head_dim: usize,
    number: PhantomData<T>,
}

impl<T: Scalar> ColumnMap<T> for EluFeatures<T> {
    fn map_columns(
        &self,
        x: &[T],
        _squares: &[T],
        width: usize,
        _tokens: usize,
        values: &mut [T],
        log_scale: &mut [T],
        scratch: &mut [Buffer<T>; 2],
    ) -> Result<(), Error> {
        let values = &mut values[..x.len()];
        let log2_e = T::from_f64(core::f64::consts::LOG2_E);
        // where every coordinate is negative, the largest exponent is taken out before it can
        // underflow
        largest_of_columns(x, log_scale);
        for shift in log_scale.iter_mut() {
            *shift = shift.min(T::zero());
        }
        let exponent = |x: T, shift: T| (x.min(T::zero()) - shift) * log2_e;
        if let [shift] = *log_scale {
            values.iter_mut().zip(x).for_each(|(value, &x)| *value = exponent(x, shift));
        } else {
            for (values, x) in values.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                for ((value, &x), &shift) in values.iter_mut().zip(x).zip(&*log_scale) {
                    *value = exponent(x, shift);
                }
            }
        }
        kernel::exp2_slice(values, T::zero());
        values.iter_mut().zip(x).for_each(|(value, &x)| *value += x.max(T::zero()));
        take_maxima(values, log_scale, &mut scratch[0]);
        Ok(())
    }
}

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
#[cfg_attr(feature = "serde", serde(try_from = "ReluParts<T>", into = "ReluParts<T>"))]
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

impl<T: Scalar> FeatureMap<T> for ReluFeatures<T> {
    fn head_dim(&self) -> usize {
        self.head_dim
    }

    fn num_features(&self) -> usize {
        self.projection.as_ref().map_or(self.head_dim, Array2::nrows)
    }

    fn map_queries(
        &self,
        x: ArrayView2<'_, T>,
        values: ArrayViewMut2<'_, T>,
        log_scale: ArrayViewMut1<'_, T>,
    ) -> Result<(), Error> {
        map_by_columns(self, self.num_features(), self.head_dim, x, values, log_scale)
    }

    fn column_map(&self) -> Option<&dyn ColumnMap<T>> {
        Some(self)
    }
}

impl<T: Scalar> ColumnMap<T> for ReluFeatures<T> {
    fn map_columns(
        &self,
        x: &[T],
        _squares: &[T],
        width: usize,
        tokens: usize,
        values: &mut [T],
        log_scale: &mut [T],
        scratch: &mut [Buffer<T>; 2],
    ) -> Result<(), Error> {
        let m = self.num_features();
        let values = &mut values[..m * width];
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
struct ReluParts<T> {
    head_dim: usize,
    projection: Option<Array2<T>>,
    epsilon: T,
}

#[cfg(feature = "serde")]
impl<T> From<ReluFeatures<T>> for ReluParts<T> {
    fn from(map: ReluFeatures<T>) -> Self {
        Self { head_dim: map.head_dim, projection: map.projection, epsilon: map.epsilon }
    }
}

#[cfg(feature = "serde")]
impl<T: Scalar> TryFrom<ReluParts<T>> for ReluFeatures<T> {
    type Error = Error;

    fn try_from(parts: ReluParts<T>) -> Result<Self, Error> {
        let map = match parts.projection {
            Some(projection) => Self::from_projection(projection)?,
            None => Self::new(parts.head_dim)?,
        };
        check::size("projection", "columns", parts.head_dim, map.head_dim)?;
        // checked through f64, kept as it is
        Ok(Self { epsilon: parts.epsilon, ..map.with_epsilon(parts.epsilon.as_f64())? })
    }
}

/// `φ(x) = x`: the features of retention (Sun et al., arXiv 2307.08621, equation 5;
/// [`Retention`](crate::Retention)), of gated linear attention (Yang et al., arXiv 2312.06635,
/// section 4) and of the state space duality of Mamba-2 (Dao and Gu, arXiv 2405.21060, its
/// structured masked attention).
///
/// Their products `q·k` have either sign, and so has their sum, which is no normaliser: use
/// [`unnormalized`](crate::LinearAttention::unnormalized). It does not aim at softmax attention.
///
/// ```
/// use dijiang::{Attention, IdentityFeatures, LinearAttention, Mask};
/// use ndarray::array;
///
/// let kernel = LinearAttention::new(IdentityFeatures::<f64>::new(2)?)
///     .with_scale(1.0)
///     .unnormalized();
/// let (q, k, v) =
///     (array![[1.0, 2.0]], array![[3.0, -1.0], [0.0, 5.0]], array![[1.0], [10.0]]);
/// let out = kernel.forward(q.view(), k.view(), v.view(), Mask::Full)?;
/// assert!((out[[0, 0]] - (1.0 * 1.0 + 10.0 * 10.0)).abs() < 1e-12); // Σ (q·k) v
///     
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "usize", into = "usize", bound = "T: Scalar"))]
pub struct IdentityFeatures<T> {
    head_dim: usize,
    number: PhantomData<T>,
}

impl<T: Scalar> ColumnMap<T> for IdentityFeatures<T> {
    fn map_columns(
        &self,
        x: &[T],
        _squares: &[T],
        _width: usize,
        _tokens: usize,
        values: &mut [T],
        log_scale: &mut [T],
        scratch: &mut [Buffer<T>; 2],
    ) -> Result<(), Error> {
        let values = &mut values[..x.len()];
        values.copy_from_slice(x);
        log_scale.fill(T::zero());
        take_maxima(values, log_scale, &mut scratch[0]);
        Ok(())
    }
}
