//! What the backward pass of a feature map takes and gives.

use crate::check;
use crate::error::Error;
use crate::features::side::Side;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use ndarray::{ArrayView1, ArrayView2, ArrayViewMut2};

/// Vectors that a map has mapped, the gradient of a loss by their features, and where the gradients
/// by the vectors and by the parameters of the map go: what
/// [`FeatureMap::backward`](crate::FeatureMap::backward) is called with.
///
/// With features `φ_i = values_i·e^{log_scale}` of a row, `d_values_i = e^{log_scale}·∂L/∂φ_i`:
/// the gradient by the values where the log scale is a constant. So
/// `φ_i·∂L/∂φ_i = values_i·d_values_i`, and nothing overflows. Gradients are
/// *added* to what `d_x` and `d_parameters` hold.
///
/// ```
/// use dijiang::{Error, FeatureMap, MapGradient, Side};
/// use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut1, ArrayViewMut2, array};
///
/// /// φ(x) = exp(x), element by element.
/// #[derive(Debug)]
/// struct Exponential(usize);
///
/// impl FeatureMap<f64> for Exponential {
///     fn head_dim(&self) -> usize {
///         self.0
///     }
///     fn num_features(&self) -> usize {
///         self.0
///     }
///     fn map_queries(
///         &self,
///         x: ArrayView2<f64>,
///         mut values: ArrayViewMut2<f64>,
///         mut log_scale: ArrayViewMut1<f64>,
///     ) -> Result<(), Error> {
///         values.assign(&x.mapv(f64::exp));
///         log_scale.fill(0.0);
///         Ok(())
///     }
///     fn backward(&self, mut gradient: MapGradient<f64>) -> Result<(), Error> {
///         // ∂φ_i/∂x_i = φ_i
///         gradient.d_x += &(&gradient.values * &gradient.d_values);
///         Ok(())
///     }
/// }
///
/// let (map, x) = (Exponential(1), array![[2.0]]);
/// let (mut values, mut log_scale) = (Array2::zeros((1, 1)), Array1::zeros(1));
/// map.map_queries(x.view(), values.view_mut(), log_scale.view_mut())?;
/// let mut d_x = Array2::zeros((1, 1));
/// map.backward(MapGradient {
///     side: Side::Query,
///     x: x.view(),
///     values: values.view(),
///     log_scale: log_scale.view(),
///     d_values: array![[1.0]].view(),
///     d_x: d_x.view_mut(),
///     d_parameters: None,
/// })?;
/// assert_eq!(d_x[[0, 0]], 2.0_f64.exp());
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug)]
pub struct MapGradient<'a, T> {
    /// Whether the vectors are queries or keys.
    pub side: Side,
    /// The vectors `[n, head_dim]`.
    pub x: ArrayView2<'a, T>,
    /// What the map has made of them, `[n, num_features]`.
    pub values: ArrayView2<'a, T>,
    /// The log scales of these, `[n]`.
    pub log_scale: ArrayView1<'a, T>,
    /// `e^{log_scale}` times the gradient by the features, `[n, num_features]`.
    pub d_values: ArrayView2<'a, T>,
    /// The gradient by the vectors, `[n, head_dim]`.
    pub d_x: ArrayViewMut2<'a, T>,
    /// The gradient by the parameters of these names; none is computed for names that are not
    /// there.
    pub d_parameters: Option<&'a mut Parameters<T>>,
}

impl<T: Scalar> MapGradient<'_, T> {
    /// Checks the shapes for a map of `head_dim` numbers to `num_features`, and that the numbers
    /// are finite.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if a shape differs, [`Error::NotFinite`] if a number is NaN or infinite.
    pub fn check(&self, head_dim: usize, num_features: usize) -> Result<(), Error> {
        let Self { x, values, log_scale, d_values, d_x, .. } = self;
        check::size("x", "columns", head_dim, x.ncols())?;
        check::size("log_scale", "rows", x.nrows(), log_scale.len())?;
        for (which, columns, array) in [
            ("values", num_features, *values),
            ("d_values", num_features, *d_values),
            ("d_x", head_dim, d_x.view()),
        ] {
            check::size(which, "rows", x.nrows(), array.nrows())?;
            check::size(which, "columns", columns, array.ncols())?;
        }
        check::finite("x", *x)?;
        check::finite("values", *values)?;
        check::finite("d_values", *d_values)
    }
}
