//! What a plan is fitted to.

use crate::check;
use crate::error::Error;
use crate::scalar::Scalar;
use crate::selection::HeadSample;
use ndarray::{ArrayView3, Axis};

/// Sampled queries, keys and values of one head, with what the loss makes of its outputs.
///
/// ```
/// use dijiang::{HeadSample, PlanSample};
/// use ndarray::{Array2, Array3};
///
/// let (q, k, v) =
///     (Array3::<f32>::ones((2, 9, 4)), Array2::ones((9, 4)), Array2::ones((9, 4)));
/// let sample =
///     HeadSample { layer: 0, kv_head: 0, q: q.view(), k: k.view(), v: v.view() };
/// let g = Array3::ones((2, 9, 4)); // ∂ loss/∂ output of both query heads
/// let sample = PlanSample::from(sample).with_sensitivity(g.view()).with_weight(0.5);
/// assert_eq!(sample.weight, 0.5);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct PlanSample<'a, T> {
    /// The head.
    pub sample: HeadSample<'a, T>,
    /// `g_t = ∂ loss/∂ o_t` of every query head, `[group, n, d_v]`; all samples of a plan have
    /// them, or none.
    pub sensitivity: Option<ArrayView3<'a, T>>,
    /// What the text counts beside the other texts of this head; 1 unless set.
    pub weight: f64,
}

impl<'a, T> From<HeadSample<'a, T>> for PlanSample<'a, T> {
    fn from(sample: HeadSample<'a, T>) -> Self {
        Self { sample, sensitivity: None, weight: 1.0 }
    }
}

impl<'a, T> PlanSample<'a, T> {
    /// Sets the gradient of the loss by the outputs, `[group, n, d_v]`.
    #[must_use]
    pub fn with_sensitivity(self, sensitivity: ArrayView3<'a, T>) -> Self {
        Self { sensitivity: Some(sensitivity), ..self }
    }

    /// Sets what the text counts beside others.
    #[must_use]
    pub fn with_weight(self, weight: f64) -> Self {
        Self { weight, ..self }
    }

    /// Tokens.
    pub(crate) fn tokens(&self) -> usize {
        self.sample.k.nrows()
    }

    pub(crate) fn shape(&self) -> SampleShape {
        SampleShape {
            group: self.sample.q.len_of(Axis(0)),
            head_dim: self.sample.q.len_of(Axis(2)),
            value_dim: self.sample.v.ncols(),
            sensitivities: self.sensitivity.is_some(),
        }
    }
}

/// What all samples of a plan have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct SampleShape {
    pub(crate) group: usize,
    pub(crate) head_dim: usize,
    pub(crate) value_dim: usize,
    /// Whether they have sensitivities.
    pub(crate) sensitivities: bool,
}

impl SampleShape {
    /// Refuses a sample of another shape, or without sense.
    pub(crate) fn check<T: Scalar>(&self, sample: &PlanSample<'_, T>) -> Result<(), Error> {
        let PlanSample { sample: HeadSample { q, k, v, .. }, sensitivity, weight } = sample;
        check::at_least_one("q heads", self.group)?;
        check::at_least_one("q columns", self.head_dim)?;
        check::at_least_one("v columns", self.value_dim)?;
        check::size("q", "heads", self.group, q.len_of(Axis(0)))?;
        check::size("q", "columns", self.head_dim, q.len_of(Axis(2)))?;
        check::size("v", "columns", self.value_dim, v.ncols())?;
        check::size("q", "rows", k.nrows(), q.len_of(Axis(1)))?;
        check::keys_values(self.head_dim, *k, *v)?;
        q.outer_iter().try_for_each(|q| check::finite("q", q))?;
        if sensitivity.is_some() != self.sensitivities {
            let of_all = |some| if some { "samples with them" } else { "samples without them" };
            return Err(Error::InvalidOption {
                which: "sensitivity",
                found: format!(
                    "mixed: {} after {}",
                    of_all(sensitivity.is_some()),
                    of_all(self.sensitivities)
                ),
                needed: "given with every sample or with none: costs have another unit without",
            });
        }
        if let Some(sensitivity) = sensitivity {
            check::size("sensitivity", "heads", self.group, sensitivity.len_of(Axis(0)))?;
            check::size("sensitivity", "rows", k.nrows(), sensitivity.len_of(Axis(1)))?;
            check::size("sensitivity", "columns", self.value_dim, sensitivity.len_of(Axis(2)))?;
            sensitivity.outer_iter().try_for_each(|g| check::finite("sensitivity", g))?;
        }
        if *weight > 0.0 && weight.is_finite() {
            return Ok(());
        }
        Err(Error::InvalidOption {
            which: "weight",
            found: weight.to_string(),
            needed: "a positive finite number",
        })
    }
}
