//! What the exponential maps have in common: exponents that are linear in the vectors.

use crate::features::exponential::Weights;
use crate::scalar::Scalar;
use ndarray::{Array1, Array2, ArrayView2};

/// What is made of exponents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum LearnedForm {
    /// `φ_i = exp(z_i − |x|²/2)`: the softmax kernel, if z are random projections.
    Exponential,
    /// `φ_i = exp(z_i)/Σ_l exp(z_l)`: features sum to one.
    Softmax,
}

/// Exponents `z = Ωx + b`, and what is made of them.
#[derive(Clone, Debug)]
pub struct Logits<T> {
    pub(crate) form: LearnedForm,
    /// `[num_features, head_dim]`.
    pub(crate) projection: Array2<T>,
    /// `[num_features]`.
    pub(crate) bias: Array1<T>,
}

impl<T: Scalar> Logits<T> {
    /// Those of `D_i·exp(ω_i·x − |x|²/2)/√m`, without features that are always zero.
    pub(crate) fn of_weights(projection: ArrayView2<'_, T>, weights: &Weights<T>) -> Self {
        let kept: Vec<usize> =
            (0..projection.nrows()).filter(|&i| weights.factors[i] > T::zero()).collect();
        #[allow(clippy::cast_precision_loss)]
        let common = -0.5 * libm::log(projection.nrows() as f64);
        let bias = kept
            .iter()
            .map(|&i| T::from_f64(libm::log(weights.factors[i].as_f64()) + common))
            .collect();
        let projection = projection.select(ndarray::Axis(0), &kept);
        Self { form: LearnedForm::Exponential, projection, bias }
    }
}
