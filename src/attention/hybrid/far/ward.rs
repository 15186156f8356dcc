//! Options of the merging far memory whose weights do not change.

use crate::attention::hybrid::config::{FarKind, Weighing};
use crate::calibration::Calibration;
use crate::error::Error;
use crate::memory::merged::rule::{Distance, MergeCost, Rule};
use crate::scalar::Scalar;
use std::sync::Arc;

/// At most so many merged entries by Ward's rule with weights that do not change: the expected
/// attention of a token, by a calibration, or 1. A far memory of
/// [`HybridAttention`](crate::HybridAttention).
///
/// Calibrated distances are `‖R(k̄_i − k̄_j)‖²`, R = (E q̂q̂ᵀ)^½; else R = I. See
/// [`MergedMemory`](crate::MergedMemory).
///
/// ```
/// use dijiang::{Attention, HybridAttention, Mask, Ward};
/// use ndarray::Array2;
///
/// // an encoder: every query sees every key, most of them through 12 entries
/// let far = Ward::new(12).block(4);
/// let kernel = HybridAttention::<f32>::builder(8).window(0).sinks(2).far(far).build()?;
/// let x = Array2::from_shape_fn((60, 8), |(i, j)| ((i * 8 + j) as f32 * 0.3).sin());
/// let out = kernel.forward(x.view(), x.view(), x.view(), Mask::Full)?;
/// assert_eq!(out.dim(), (60, 8));
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Ward {
    entries: usize,
    pub(super) block: usize,
    pub(super) calibration: Option<Arc<Calibration>>,
}

impl Ward {
    /// At most `entries` entries, with the default options.
    #[must_use]
    pub fn new(entries: usize) -> Self {
        Self { entries, block: 1, calibration: None }
    }

    /// Sets how many tokens leave the window at once: 1 unless set. With more the window holds up
    /// to `block − 1` tokens more, that many tokens are read by one matrix product, and entries are
    /// merged in rounds of mutual nearest pairs.
    #[must_use]
    pub fn block(mut self, block: usize) -> Self {
        self.block = block;
        self
    }

    /// Draws the metric R and the weights from a calibration, in place of one of
    /// [`HybridBuilder::calibrated`](crate::HybridBuilder::calibrated). Make it with the window and
    /// sinks of the kernel, which is not checked.
    #[must_use]
    pub fn calibrated(mut self, calibration: &Calibration) -> Self {
        self.calibration = Some(Arc::new(calibration.clone()));
        self
    }

    pub(super) fn kind<T: Scalar>(
        &self,
        scale: f64,
        calibration: Option<&Calibration>,
    ) -> Result<FarKind<T>, Error> {
        let (metric, weighing) = match calibration {
            Some(calibration) => {
                (Distance::Matrix(Arc::new(calibration.metric())), Weighing::Expected)
            }
            None => (Distance::Identity, Weighing::One),
        };
        let rule = Rule {
            entries: self.entries,
            spare: self.block,
            block: self.block,
            metric,
            cost: MergeCost::Ward { value_weight: 0.0 },
            query_squares: None,
            value_square: None,
            value_columns: None,
            scale,
        };
        FarKind::merged(rule, weighing)
    }
}
