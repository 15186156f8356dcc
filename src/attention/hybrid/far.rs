//! The choice of a far memory: what takes the tokens that leave the window.

pub(crate) mod features;
pub(crate) mod merged;
pub(crate) mod taylor;
pub(crate) mod ward;

use crate::attention::hybrid::config::{FarKind, MakeMemory};
use crate::attention::hybrid::far::features::FarFeatures;
use crate::attention::hybrid::far::merged::Merged;
use crate::attention::hybrid::far::taylor::Taylor;
use crate::attention::hybrid::far::ward::Ward;
use crate::calibration::Calibration;
use crate::check;
use crate::error::Error;
use crate::features::FeatureMap;
use crate::memory::Memory;
use crate::scalar::Scalar;
use core::fmt;
use ndarray::Array1;
use std::sync::Arc;

/// What takes the tokens that leave the window.
///
/// | | memory | calibration | its place |
/// |---|---|---|---|
/// | [`none`](Self::none) | nothing | – | the control: a window alone |
/// | [`features`](Self::features) | sums of features | of the map | any feature map |
/// | [`decaying_features`](Self::decaying_features) | the same, forgetting | of the map | trained |
/// | [`taylor`](Self::taylor) | sums of features | needed | broad far attention, smallest state |
/// | [`ward`](Self::ward) | entries, static weights | wanted | where reading must not write |
/// | [`merged`](Self::merged) | entries by attention received | may be | the default |
/// | [`memory`](Self::memory) | yours | | |
///
/// [`Taylor`], [`Ward`] and [`Merged`] hold the options of those and convert into this type:
/// `Far::merged(64)` is `Merged::new(64).into()`.
///
/// ```
/// use dijiang::{Far, HybridAttention, Merged};
///
/// let builder = || HybridAttention::<f32>::builder(8).window(16);
/// let by_default = builder().far(Far::merged(12)).build()?;
/// let in_blocks = builder().far(Merged::new(12).block(8)).build()?;
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Far<T: Scalar> {
    choice: Choice<T>,
}

#[derive(Clone)]
enum Choice<T: Scalar> {
    None,
    Features { map: Arc<dyn FeatureMap<T>>, decay: Option<Vec<f64>> },
    Taylor(Taylor),
    Ward(Ward),
    Merged(Merged),
    Own(Arc<MakeMemory<T>>),
}

impl<T: Scalar> Far<T> {
    /// Forgets what leaves the window: the honest control.
    #[must_use]
    pub fn none() -> Self {
        Self { choice: Choice::None }
    }

    /// Sums of the features of any map. The map's estimate of `exp(q̂·k̂)` must be right in
    /// absolute terms, since it stands beside exact weights. To calibrate it, calibrate the map. A
    /// key beyond the range of the map is found out when it leaves the window: the call in which it
    /// does then fails, as does every later one.
    #[must_use]
    pub fn features(map: impl FeatureMap<T> + 'static) -> Self {
        Self { choice: Choice::Features { map: Arc::new(map), decay: None } }
    }

    /// The same, of sums that forget: before a token enters, those of each feature decay by a γ of
    /// its own, `decay [num_features]`, each from 0 to 1. A token that entered is then weighed by
    /// `Σ_i φ(q̂)_i φ(k̂)_i γ_i^n` where `n` have entered after it. With `window(0)` and some sinks,
    /// linear attention with [decay](crate::LinearAttention#decay) behind exact first tokens. There
    /// is none with [`Mask::Full`](crate::Mask::Full). Gradients by the decays are those by
    /// `decay.channels`, computed from those by `ln γ`: their error is some `ε/γ`.
    ///
    /// ```
    /// use dijiang::{Attention, EluFeatures, Far, HybridAttention, Mask};
    /// use ndarray::{Array2, array};
    ///
    /// let far = Far::decaying_features(EluFeatures::<f64>::new(1)?, array![0.5]);
    /// let kernel = HybridAttention::builder(1).window(0).sinks(1).far(far).build()?;
    /// let zero = Array2::zeros((4, 1)); // every weight is 1 but for the decay
    /// let values = array![[8.0], [0.0], [0.0], [7.0]];
    /// let out = kernel.forward(zero.view(), zero.view(), values.view(), Mask::Causal)?;
    /// // the sink does not decay; of those behind it there is ¼, ½ and 1
    /// assert!((out[[3, 0]] - 15.0 / 2.75).abs() < 1e-14);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    #[must_use]
    pub fn decaying_features(map: impl FeatureMap<T> + 'static, decay: Array1<f64>) -> Self {
        Self { choice: Choice::Features { map: Arc::new(map), decay: Some(decay.to_vec()) } }
    }

    /// [`Taylor`] of this rank with its default options. Needs a calibration.
    #[must_use]
    pub fn taylor(rank: usize) -> Self {
        Taylor::new(rank).into()
    }

    /// [`Ward`] of at most `entries` entries with its default options.
    #[must_use]
    pub fn ward(entries: usize) -> Self {
        Ward::new(entries).into()
    }

    /// [`Merged`] of at most `entries` entries with its default options.
    #[must_use]
    pub fn merged(entries: usize) -> Self {
        Merged::new(entries).into()
    }

    /// A memory of your own: `make(value_dim, scale)` makes an empty one for each stream. Tokens
    /// are given to it one by one as they leave, and each step reads it. `absorb` must leave it
    /// unchanged where it fails. Before each call of a stream it is cloned, to go back to if the
    /// call fails. In a hybrid with a [soft cap](crate::HybridBuilder::soft_cap) it caps its scores
    /// itself.
    ///
    /// ```
    /// use dijiang::{Attention, ExactMemory, Far, HybridAttention, Mask, SoftmaxAttention};
    /// use ndarray::Array2;
    ///
    /// // a far memory that forgets nothing: softmax attention, the long way round
    /// let far = Far::memory(|value_dim, scale| {
    ///     Ok(Box::new(ExactMemory::<f64>::new(4, value_dim, scale)?))
    /// });
    /// let kernel = HybridAttention::builder(4).window(3).sinks(1).far(far).build()?;
    /// let x = Array2::from_shape_fn((20, 4), |(i, j)| ((i * 4 + j) as f64).sin());
    /// let out = kernel.forward(x.view(), x.view(), x.view(), Mask::Causal)?;
    /// let exact =
    ///     SoftmaxAttention::new(4)?.forward(x.view(), x.view(), x.view(), Mask::Causal)?;
    /// assert!((out - exact).iter().all(|e| e.abs() < 1e-14));
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    #[must_use]
    pub fn memory(
        make: impl Fn(usize, f64) -> Result<Box<dyn Memory<T>>, Error> + Send + Sync + 'static,
    ) -> Self {
        Self { choice: Choice::Own(Arc::new(make)) }
    }

    /// Refuses options that are out of range, whatever the kernel.
    pub(super) fn check(&self) -> Result<(), Error> {
        match &self.choice {
            Choice::Merged(merged) => merged.check(),
            _ => Ok(()),
        }
    }

    /// Whether it draws what it needs from the calibration of the kernel, if it has none itself.
    pub(super) fn shares_calibration(&self) -> bool {
        matches!(self.choice, Choice::Taylor(_) | Choice::Ward(_))
    }

    /// A calibration of its own.
    pub(super) fn calibration(&self) -> Option<&Arc<Calibration>> {
        match &self.choice {
            Choice::Taylor(taylor) => taylor.calibration.as_ref(),
            Choice::Ward(ward) => ward.calibration.as_ref(),
            Choice::Merged(merged) => merged.calibration.as_ref(),
            Choice::None | Choice::Features { .. } | Choice::Own(_) => None,
        }
    }

    /// Tokens that leave the window at once.
    pub(super) fn block(&self) -> usize {
        match &self.choice {
            Choice::Ward(ward) => ward.block,
            Choice::Merged(merged) => merged.block,
            _ => 1,
        }
    }

    /// What a kernel of this head dimension, window and scale makes it by; `calibration` is its own
    /// or the kernel's.
    pub(super) fn kind(
        &self,
        head_dim: usize,
        window: usize,
        scale: f64,
        calibration: Option<&Calibration>,
    ) -> Result<FarKind<T>, Error> {
        match &self.choice {
            Choice::None => Ok(FarKind::None),
            Choice::Features { map, decay } => {
                check::size("map", "columns", head_dim, map.head_dim())?;
                Ok(FarKind::Linear(FarFeatures::new(Arc::clone(map), decay.clone())?))
            }
            Choice::Taylor(taylor) => taylor.kind(calibration),
            Choice::Ward(ward) => ward.kind(scale, calibration),
            Choice::Merged(merged) => merged.kind(head_dim, window, scale),
            Choice::Own(make) => Ok(FarKind::Own(Arc::clone(make))),
        }
    }
}

impl<T: Scalar> From<Merged> for Far<T> {
    fn from(merged: Merged) -> Self {
        Self { choice: Choice::Merged(merged) }
    }
}

impl<T: Scalar> From<Ward> for Far<T> {
    fn from(ward: Ward) -> Self {
        Self { choice: Choice::Ward(ward) }
    }
}

impl<T: Scalar> From<Taylor> for Far<T> {
    fn from(taylor: Taylor) -> Self {
        Self { choice: Choice::Taylor(taylor) }
    }
}

impl<T: Scalar> fmt::Debug for Choice<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::Features { map, decay } => {
                f.debug_struct("Features").field("map", map).field("decay", decay).finish()
            }
            Self::Taylor(taylor) => taylor.fmt(f),
            Self::Ward(ward) => ward.fmt(f),
            Self::Merged(merged) => merged.fmt(f),
            Self::Own(_) => f.write_str("Own"),
        }
    }
}
