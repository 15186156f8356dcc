//! Feature maps φ with `exp(x·y) ≈ φ_q(x)·φ_k(y)`: the trait.

pub(crate) mod calibrated_taylor;
pub(crate) mod columns;
pub(crate) mod dct;
pub(crate) mod delegate;
pub(crate) mod elementwise;
pub(crate) mod exponential;
pub(crate) mod fit;
pub(crate) mod gradient;
pub(crate) mod learned;
pub(crate) mod logits;
pub(crate) mod official_dijiang;
pub(crate) mod performer;
pub(crate) mod radii;
pub(crate) mod relu;
pub(crate) mod side;
pub(crate) mod sums;
pub(crate) mod taylor;
pub(crate) mod wpff;

use crate::error::Error;
use crate::features::columns::ColumnMap;
use crate::features::gradient::MapGradient;
use crate::features::logits::Logits;
use crate::features::side::Side;
use crate::features::sums::ProjectionSums;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use core::fmt::Debug;
use ndarray::{ArrayView2, ArrayViewMut1, ArrayViewMut2};

/// A map from `head_dim` numbers to `num_features` features whose products estimate `exp(x·y)`:
///
/// ```text
/// exp(x·y) ≈ Σ_i φ_q(x)_i φ_k(y)_i,     φ(x)_i = values_i·e^{log_scale}.
/// ```
///
/// The estimate is in absolute terms: the factor `e^{−|x|²/2}` of the exponential maps is part of
/// the log scale. A log scale per row keeps the values near one, so that nothing overflows for any
/// norm. Maps get *scaled* vectors: [`LinearAttention`](crate::LinearAttention) multiplies by
/// `√scale` first.
///
/// Maps are immutable and cheap to share; `Arc<F>` and `Box<F>` are maps where `F` is one.
///
/// # Implementing it
///
/// Write every element of `values [n, num_features]` and `log_scale [n]` (they may hold anything
/// before), in terms of row `i` of `x [n, head_dim]` alone: a value that depends on other rows
/// leaks the future. Values must be finite.
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
///     fn head_dim(&self) -> usize {
///         self.0
///     }
///     fn num_features(&self) -> usize {
///         self.0
///     }
///     fn map_queries(
///         &self,
///         x: ArrayView2<f32>,
///         mut values: ArrayViewMut2<f32>,
///         mut log_scale: ArrayViewMut1<f32>,
///     ) -> Result<(), Error> {
///         for ((x, mut values), log_scale) in
///             x.outer_iter().zip(values.outer_iter_mut()).zip(&mut log_scale)
///         {
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
///
/// <style>pre.item-decl { max-height: 11em; overflow: auto; }</style>
pub trait FeatureMap<T: Scalar>: Debug + Send + Sync {
    /// Columns of the vectors it maps.
    fn head_dim(&self) -> usize;

    /// Features of one vector.
    fn num_features(&self) -> usize;

    /// Maps the rows of `x [n, head_dim]` as queries, into `values [n, num_features]` and
    /// `log_scale [n]`.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if a shape differs, [`Error::NotFinite`] if `x` holds NaN or infinity,
    /// [`Error::Overflow`] if a row is too large for `T` (its squared norm overflows). The content
    /// of the outputs is then unspecified.
    fn map_queries(
        &self,
        x: ArrayView2<'_, T>,
        values: ArrayViewMut2<'_, T>,
        log_scale: ArrayViewMut1<'_, T>,
    ) -> Result<(), Error>;

    /// Maps the rows of `x` as keys; the same as [`map_queries`](Self::map_queries) unless
    /// overridden.
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

    /// Computes the gradient of a loss by vectors and parameters from that by their features, and
    /// adds it to what is there ([`MapGradient`]). Without it, the kernels that use the map can be
    /// run and not trained.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] unless overridden; those of [`map_queries`](Self::map_queries).
    fn backward(&self, gradient: MapGradient<'_, T>) -> Result<(), Error> {
        let _ = gradient;
        Err(NO_GRADIENT)
    }

    /// The numbers of the map that can be trained, by the names they are saved under: what
    /// [`backward`](Self::backward) gives gradients by. None unless overridden.
    fn parameters(&self) -> Parameters<T> {
        Parameters::new()
    }

    /// The same map with other numbers in the place of those of these names. Maps are immutable, so
    /// this is a new one.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] if there is no parameter of a name, or it has another shape, and the
    /// errors of the constructors; [`Error::Unsupported`] unless overridden.
    fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Box<dyn FeatureMap<T>>, Error> {
        let _ = parameters;
        let why = "its type does not implement `FeatureMap::with_parameters`";
        Err(Error::Unsupported { what: "this feature map with other parameters", why })
    }

    /// The same map, of queries or of keys, on tokens as columns, which maps of this crate have.
    #[doc(hidden)]
    fn column_map(&self, side: Side) -> Option<&dyn ColumnMap<T>> {
        let _ = side;
        None
    }

    /// The same map in logits `Ωx + b`, for maps that are exponentials of these.
    #[doc(hidden)]
    fn logits(&self) -> Option<Logits<T>> {
        None
    }

    /// Adds what the [column map](Self::column_map) has summed for queries and for keys to the
    /// gradient by the parameters.
    #[doc(hidden)]
    fn add_parameters(&self, sums: [&ProjectionSums<T>; 2], d_parameters: &mut Parameters<T>) {
        let _ = (sums, d_parameters);
    }
}

pub(crate) const NO_GRADIENT: Error = Error::Unsupported {
    what: "the gradient of this feature map",
    why: "its type does not implement `FeatureMap::backward`; every map of the crate does",
};

impl Side {
    /// Maps vectors as queries or as keys.
    pub(crate) fn map<T: Scalar>(
        self,
        map: &(impl FeatureMap<T> + ?Sized),
        x: ArrayView2<'_, T>,
        values: ArrayViewMut2<'_, T>,
        log_scale: ArrayViewMut1<'_, T>,
    ) -> Result<(), Error> {
        match self {
            Self::Query => map.map_queries(x, values, log_scale),
            Self::Key => map.map_keys(x, values, log_scale),
        }
    }
}
