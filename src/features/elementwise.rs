//! Element-wise maps of models trained with them: elu + 1 and the identity.

use crate::check;
use crate::error::Error;
use crate::features::FeatureMap;
use crate::features::columns::{
    ColumnGradient, ColumnMap, Columns, factors_of_columns, largest_of_columns, take_maxima,
};
use crate::features::delegate::features_by;
use crate::features::side::Side;
use crate::features::sums::ProjectionSums;
use crate::kernel;
use crate::kernel::buffer::Buffer;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use core::marker::PhantomData;

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

        features_by!([T: Scalar] $map<T>, this => this as &dyn ColumnMap<T>, {
            fn with_parameters(
                &self,
                parameters: &Parameters<T>,
            ) -> Result<Box<dyn FeatureMap<T>>, Error> {
                Parameters::new().check_names(parameters)?;
                Ok(Box::new(self.clone()))
            }
        });

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
    fn head_dim(&self) -> usize {
        self.head_dim
    }

    fn num_features(&self) -> usize {
        self.head_dim
    }

    fn map_columns(
        &self,
        columns: &mut Columns<'_, T>,
        scratch: &mut [Buffer<T>; 2],
    ) -> Result<(), Error> {
        let Columns { x, values, log_scale, .. } = columns.with_features(self.head_dim);
        let log2_e = T::from_f64(core::f64::consts::LOG2_E);
        // Where every coordinate is negative, the largest exponent is taken out before it can
        // underflow.
        largest_of_columns(x, log_scale);
        for shift in log_scale.iter_mut() {
            *shift = shift.min(T::zero());
        }
        exponents(x, log_scale, log2_e, values);
        kernel::exp2_slice(values, T::zero());
        add_positive(x, values);
        take_maxima(values, log_scale, &mut scratch[0]);
        Ok(())
    }

    fn backward_columns(
        &self,
        _: Side,
        ColumnGradient { x, values, d_values, d_x, .. }: &mut ColumnGradient<'_, T>,
        _: Option<&mut ProjectionSums<T>>,
        _: &mut [Buffer<T>; 2],
    ) {
        // φ' = φ where x ≤ 0, else 1 = φ/(1 + x)
        for (((d_x, d_value), &value), &x) in d_x.iter_mut().zip(&**d_values).zip(*values).zip(*x) {
            *d_x = *d_value * (value / (T::one() + x.max(T::zero())));
        }
    }
}

/// The exponents of negative coordinates, less the shift of their column, to base 2. Not inlined:
/// as arguments, slices are known not to overlap.
#[inline(never)]
fn exponents<T: Scalar>(x: &[T], shifts: &[T], log2_e: T, values: &mut [T]) {
    let exponent = |x: T, shift: T| (x.min(T::zero()) - shift) * log2_e;
    if let [shift] = *shifts {
        values.iter_mut().zip(x).for_each(|(value, &x)| *value = exponent(x, shift));
        return;
    }
    let width = shifts.len();
    for (values, x) in values.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
        for ((value, &x), &shift) in values.iter_mut().zip(x).zip(shifts) {
            *value = exponent(x, shift);
        }
    }
}

/// Adds the positive coordinates.
#[inline(never)]
fn add_positive<T: Scalar>(x: &[T], values: &mut [T]) {
    values.iter_mut().zip(x).for_each(|(value, &x)| *value += x.max(T::zero()));
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
    fn head_dim(&self) -> usize {
        self.head_dim
    }

    fn num_features(&self) -> usize {
        self.head_dim
    }

    fn map_columns(
        &self,
        columns: &mut Columns<'_, T>,
        scratch: &mut [Buffer<T>; 2],
    ) -> Result<(), Error> {
        let Columns { x, values, log_scale, .. } = columns.with_features(self.head_dim);
        values.copy_from_slice(x);
        log_scale.fill(T::zero());
        take_maxima(values, log_scale, &mut scratch[0]);
        Ok(())
    }

    fn backward_columns(
        &self,
        _: Side,
        ColumnGradient { x, width, d_values, d_x, .. }: &mut ColumnGradient<'_, T>,
        _: Option<&mut ProjectionSums<T>>,
        [factors, _]: &mut [Buffer<T>; 2],
    ) {
        factors_of_columns(x, *width, factors);
        let rows = d_x.chunks_exact_mut(*width).zip(d_values.chunks_exact(*width));
        for (d_x, d_value) in rows {
            for ((d_x, &d_value), &factor) in d_x.iter_mut().zip(d_value).zip(&**factors) {
                *d_x = d_value * factor;
            }
        }
    }
}
