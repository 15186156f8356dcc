//! Feature maps φ with `exp(x·y) ≈ φ_q(x)·φ_k(y)`: the trait, and what the maps share.

pub(crate) mod dct;
pub(crate) mod elementwise;
pub(crate) mod performer;
pub(crate) mod taylor;
pub(crate) mod wpff;

use crate::{Error, Scalar, check, kernel};
use core::fmt::Debug;
use ndarray::{Array1, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2};
use std::sync::Arc;

/// A map from `head_dim` numbers to `num_features` features whose products estimate `exp(x·y)`:
///
/// ```text
/// exp(x·y) ≈ Σ_i φ_q(x)_i φ_k(y)_i,     φ(x)_i = values_i·e^{log_scale}.
/// ```
///
/// The estimate is in absolute terms: the factor `e^{−|x|²/2}` of the exponential maps is part of the log scale. A log
/// scale per row keeps the values near one, so that nothing overflows for any norm. Maps get *scaled* vectors:
/// [`LinearAttention`](crate::LinearAttention) multiplies by `√scale` first.
///
/// Maps are immutable and cheap to share; `Arc<F>` and `Box<F>` are maps where `F` is one.
///
/// # Implementing it
///
/// Write every element of `values [n, num_features]` and `log_scale [n]` (they may hold anything before), in terms of
/// row `i` of `x [n, head_dim]` alone: a value that depends on other rows leaks the future. Values must be finite.
///
/// ```
/// use dijiang::{Attention, Error, FeatureMap, LinearAttention, Mask};
/// use ndarray::{Array2, ArrayView2, ArrayViewMut1, ArrayViewMut2};
///
/// /// φ(x) = exp(x), element by element.
/// #[derive(Debug)]
/// struct Exponential(usize);
///
/// impl FeatureMap<f32> for Exponential {
///     fn head_dim(&self) -> usize { self.0 }
///     fn num_features(&self) -> usize { self.0 }
///     fn map_queries(&self, x: ArrayView2<f32>, mut values: ArrayViewMut2<f32>, mut log_scale: ArrayViewMut1<f32>) -> Result<(), Error> {
///         for ((x, mut values), log_scale) in x.outer_iter().zip(values.outer_iter_mut()).zip(&mut log_scale) {
///             *log_scale = x.fold(f32::NEG_INFINITY, |m, &a| m.max(a));
///             values.zip_mut_with(&x, |value, a| *value = (a - *log_scale).exp());
///         }
///         Ok(())
///     }
/// }
///
/// let kernel = LinearAttention::new(Exponential(4));
/// let ones = Array2::ones((3, 4));
/// assert_eq!(kernel.forward(ones.view(), ones.view(), ones.view(), Mask::Causal)?, ones);
/// # Ok::<(), Error>(())
/// ```
pub trait FeatureMap<T: Scalar>: Debug + Send + Sync {
    /// Columns of the vectors it maps.
    fn head_dim(&self) -> usize;

    /// Features of one vector.
    fn num_features(&self) -> usize;

    /// Maps the rows of `x [n, head_dim]` as queries, into `values [n, num_features]` and `log_scale [n]`.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if a shape differs, [`Error::NotFinite`] if `x` holds NaN or infinity, [`Error::Overflow`] if a
    /// row is too large for `T` (its squared norm overflows). The content of the outputs is then unspecified.
    fn map_queries(
        &self,
        x: ArrayView2<'_, T>,
        values: ArrayViewMut2<'_, T>,
        log_scale: ArrayViewMut1<'_, T>,
    ) -> Result<(), Error>;

    /// Maps the rows of `x` as keys; the same as [`map_queries`](Self::map_queries) unless overridden.
    ///
    /// # Errors
    ///
    /// As [`map_queries`](Self::map_queries).
    fn map_keys(
        &self,
        x: ArrayView2<'_, T>,
        values: ArrayViewMut2<'_, T>,
        log_scale: ArrayViewMut1<'_, T>,
    ) -> Result<(), Error> {
        self.map_queries(x, values, log_scale)
    }
}

macro_rules! map_behind_pointer {
    ($pointer:ident) => {
        impl<T: Scalar, F: FeatureMap<T> + ?Sized> FeatureMap<T> for $pointer<F> {
            fn head_dim(&self) -> usize {
                (**self).head_dim()
            }

            fn num_features(&self) -> usize {
                (**self).num_features()
            }

            fn map_queries(
                &self,
                x: ArrayView2<'_, T>,
                values: ArrayViewMut2<'_, T>,
                log_scale: ArrayViewMut1<'_, T>,
            ) -> Result<(), Error> {
                (**self).map_queries(x, values, log_scale)
            }

            fn map_keys(
                &self,
                x: ArrayView2<'_, T>,
                values: ArrayViewMut2<'_, T>,
                log_scale: ArrayViewMut1<'_, T>,
            ) -> Result<(), Error> {
                (**self).map_keys(x, values, log_scale)
            }
        }
    };
}
map_behind_pointer!(Arc);
map_behind_pointer!(Box);

/// Checks the arguments of a map.
fn check_map<T: Scalar>(
    head_dim: usize,
    num_features: usize,
    x: ArrayView2<'_, T>,
    values: &ArrayViewMut2<'_, T>,
    log_scale: &ArrayViewMut1<'_, T>,
) -> Result<(), Error> {
    check::size("x", "columns", head_dim, x.ncols())?;
    check::size("values", "rows", x.nrows(), values.nrows())?;
    check::size("values", "columns", num_features, values.ncols())?;
    check::size("log_scale", "rows", x.nrows(), log_scale.len())?;
    check::finite("x", x)
}

/// Runs `map` on each row of `x` and the slice of `values` it fills; `map` returns the row's log scale.
fn map_rows<T: Scalar>(
    x: ArrayView2<'_, T>,
    mut values: ArrayViewMut2<'_, T>,
    mut log_scale: ArrayViewMut1<'_, T>,
    mut map: impl FnMut(ArrayView1<'_, T>, &mut [T]) -> T,
) -> Result<(), Error> {
    let mut copy = Vec::new();
    for (row, ((x, mut values), log_scale)) in
        x.outer_iter().zip(values.outer_iter_mut()).zip(&mut log_scale).enumerate()
    {
        if let Some(values) = values.as_slice_mut() {
            *log_scale = map(x, values);
        } else {
            copy.clear();
            copy.extend(values.iter());
            *log_scale = map(x, &mut copy);
            values.iter_mut().zip(&copy).for_each(|(value, &new)| *value = new);
        }
        if !log_scale.is_finite() {
            return Err(Error::Overflow { which: "the size of the vector", row });
        }
    }
    Ok(())
}

/// The common end of the positive exponential maps
///
/// ```text
/// φ_i(x) = D_i·exp(ω_i·x − |x|²/2)/√m
/// ```
///
/// once `values` holds the logits `ω_i·x`: adds `bias_i = ln D_i − ½ ln m`, takes the row maximum out and exponentiates.
/// Returns the log scale: that maximum minus `|x|²/2`.
fn exponentiate<T: Scalar>(x: ArrayView1<'_, T>, bias: &[T], values: &mut [T]) -> T {
    for (value, &bias) in values.iter_mut().zip(bias) {
        *value += bias;
    }
    let largest = kernel::max(values);
    T::exp_slice(values, largest);
    largest - half_squared_norm(x)
}

/// |x|²/2.
fn half_squared_norm<T: Scalar>(x: ArrayView1<'_, T>) -> T {
    let half = T::from_f64(0.5);
    match x.to_slice() {
        Some(x) => half * kernel::dot(x, x),
        None => half * x.iter().map(|&a| a * a).sum(),
    }
}

/// Weights D of the features of an exponential map, and the bias `ln D_i − ½ ln m` they give its logits.
#[derive(Clone, Debug, PartialEq)]
struct Weights<T> {
    weights: Array1<T>,
    bias: Vec<T>,
}

impl<T: Scalar> Weights<T> {
    /// D = 1.
    fn ones(num_features: usize) -> Self {
        Self::with_bias(Array1::ones(num_features))
    }

    /// D as given: as many as features, none negative, not all zero.
    fn new(num_features: usize, weights: Array1<T>) -> Result<Self, Error> {
        check::size("weights", "elements", num_features, weights.len())?;
        if let Some((_, bad)) = weights.indexed_iter().find(|(_, w)| !(w.is_finite() && **w >= T::zero())) {
            return Err(Error::InvalidOption {
                which: "weights",
                found: bad.to_string(),
                needed: "finite numbers that are not negative",
            });
        }
        if weights.iter().all(|w| *w == T::zero()) {
            return Err(Error::InvalidOption {
                which: "weights",
                found: "all zero".to_owned(),
                needed: "positive for at least one feature",
            });
        }
        Ok(Self::with_bias(weights))
    }

    #[allow(clippy::cast_precision_loss)]
    fn with_bias(weights: Array1<T>) -> Self {
        let half_log_count = 0.5 * libm::log(weights.len() as f64);
        let bias = weights.iter().map(|w| T::from_f64(libm::log(w.as_f64()) - half_log_count)).collect();
        Self { weights, bias }
    }
}
