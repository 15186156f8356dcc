//! How a kernel is fitted.

use crate::error::Error;
use crate::mask::Mask;
use crate::parameters::Parameters;
use crate::scalar::Scalar;

/// What is made small.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum DistillLoss {
    /// The squared error of the outputs, `Σ_t |o_t − o*_t|²/Σ_t |o*_t|²`: the square of the output
    /// error of [`fidelity`](crate::fidelity).
    #[default]
    Output,
    /// The divergence of the rows of the attention matrix from the teacher's, in nats a query,
    /// `1/n Σ_t Σ_j P*_tj ln(P*_tj/P_tj)`: their cross entropy less the teacher's own entropy. It
    /// takes O(n²) memory, and needs weights that are positive.
    CrossEntropy,
}

/// The losses of a step of [`distill`](crate::distill), before its change.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct DistillStep {
    /// Counts from 0.
    pub index: usize,
    /// Over the training rows of the sample of the step.
    pub training: f64,
    /// Over the validation rows of all samples; where no rows are held out, over all of them.
    pub validation: f64,
}

/// The options of [`distill`](crate::distill).
///
/// ```
/// use dijiang::{DistillLoss, DistillOptions};
///
/// let options = DistillOptions::new()
///     .steps(500)
///     .learning_rate(0.03)
///     .loss(DistillLoss::CrossEntropy)
///     .patience(100)
///     .seed(7);
/// # let _ = options;
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DistillOptions {
    pub(super) steps: usize,
    pub(super) learning_rate: f64,
    pub(super) loss: DistillLoss,
    pub(super) validation: f64,
    pub(super) patience: usize,
    pub(super) seed: u64,
    pub(super) only: Option<&'static str>,
    pub(super) mask: Mask,
}

impl Default for DistillOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl DistillOptions {
    /// 300 steps with a learning rate of 0.02, the squared error of the outputs, causal, a fifth of
    /// each sequence held out, no early end, seed 0, all parameters.
    #[must_use]
    pub fn new() -> Self {
        Self {
            steps: 300,
            learning_rate: 0.02,
            loss: DistillLoss::Output,
            validation: 0.2,
            patience: usize::MAX,
            seed: 0,
            only: None,
            mask: Mask::Causal,
        }
    }

    /// The most steps that are taken.
    #[must_use]
    pub fn steps(self, steps: usize) -> Self {
        Self { steps, ..self }
    }

    /// About how far each number of a parameter moves in the first step; it falls to zero along
    /// half a cosine.
    #[must_use]
    pub fn learning_rate(self, learning_rate: f64) -> Self {
        Self { learning_rate, ..self }
    }

    /// What is made small.
    #[must_use]
    pub fn loss(self, loss: DistillLoss) -> Self {
        Self { loss, ..self }
    }

    /// The share of each sequence, its last queries, that is held out; from 0 to below 1.
    #[must_use]
    pub fn validation(self, share: f64) -> Self {
        Self { validation: share, ..self }
    }

    /// Ends after so many steps without a smaller validation loss.
    #[must_use]
    pub fn patience(self, steps: usize) -> Self {
        Self { patience: steps, ..self }
    }

    /// The order of the samples.
    #[must_use]
    pub fn seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// Trains only parameters whose names begin like this: `"map.weights"`, or `"far"` of a hybrid.
    #[must_use]
    pub fn only(self, names: &'static str) -> Self {
        Self { only: Some(names), ..self }
    }

    /// Which keys a query sees.
    #[must_use]
    pub fn mask(self, mask: Mask) -> Self {
        Self { mask, ..self }
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        let numbers = [
            ("learning_rate", self.learning_rate, self.learning_rate > 0.0),
            ("validation", self.validation, (0.0..1.0).contains(&self.validation)),
        ];
        for (which, value, is_usable) in numbers {
            if !is_usable || !value.is_finite() {
                let needed = if which == "validation" {
                    "from 0 to below 1"
                } else {
                    "a positive finite number"
                };
                return Err(Error::InvalidOption { which, found: value.to_string(), needed });
            }
        }
        Ok(())
    }

    /// The parameters that are trained.
    pub(super) fn chosen<T: Scalar>(&self, all: Parameters<T>) -> Result<Parameters<T>, Error> {
        let is_chosen = |name: &str| self.only.is_none_or(|only| name.starts_with(only));
        let chosen: Parameters<T> = all
            .iter()
            .filter(|(name, _)| is_chosen(name))
            .map(|(name, array)| (name.to_owned(), array.clone()))
            .collect();
        if chosen.is_empty() {
            let names = all.names().collect::<Vec<_>>().join(", ");
            let found = format!("{:?} of a kernel with {names:?}", self.only.unwrap_or("all"));
            let needed = "the beginning of the name of a parameter of the kernel";
            return Err(Error::InvalidOption { which: "parameters", found, needed });
        }
        Ok(chosen)
    }
}
