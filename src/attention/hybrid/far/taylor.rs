//! Options of the far memory of a calibrated Taylor map.

use crate::attention::hybrid::config::{FarKind, missing_calibration};
use crate::attention::hybrid::far::features::FarFeatures;
use crate::calibration::Calibration;
use crate::calibration::taylor::TaylorFit;
use crate::error::Error;
use crate::features::calibrated_taylor::CalibratedTaylor;
use crate::scalar::Scalar;
use std::sync::Arc;

/// Sums of the features of a [`CalibratedTaylor`] map of some rank, `(rank + 1)(rank + 2)/2` of
/// them: a far memory of [`HybridAttention`](crate::HybridAttention).
///
/// It needs a calibration, by [`calibrated`](Self::calibrated) or by
/// [`HybridBuilder::calibrated`](crate::HybridBuilder::calibrated).
///
/// ```
/// use dijiang::{Calibration, CalibrationOptions, HybridAttention, Taylor, TaylorFit};
/// use ndarray::Array2;
///
/// let x = Array2::from_shape_fn((100, 8), |(i, j)| ((i * 8 + j) as f64 * 0.3).sin());
/// let options = CalibrationOptions::new().with_window(16).with_sinks(2);
/// let calibration = Calibration::from_samples(x.view(), x.view(), options)?;
/// let far = Taylor::new(2).fit(TaylorFit::Clamped).calibrated(&calibration);
/// let kernel = HybridAttention::<f32>::builder(8).window(16).sinks(2).far(far).build()?;
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Taylor {
    rank: usize,
    fit: TaylorFit,
    pub(super) calibration: Option<Arc<Calibration>>,
}

impl Taylor {
    /// A map of this rank, with the default options.
    #[must_use]
    pub fn new(rank: usize) -> Self {
        Self { rank, fit: TaylorFit::default(), calibration: None }
    }

    /// Sets how the coefficients are fitted.
    #[must_use]
    pub fn fit(mut self, fit: TaylorFit) -> Self {
        self.fit = fit;
        self
    }

    /// Draws the map from a calibration, in place of one of
    /// [`HybridBuilder::calibrated`](crate::HybridBuilder::calibrated). Make it with the window and
    /// sinks of the kernel, which is not checked.
    #[must_use]
    pub fn calibrated(mut self, calibration: &Calibration) -> Self {
        self.calibration = Some(Arc::new(calibration.clone()));
        self
    }

    pub(super) fn kind<T: Scalar>(
        &self,
        calibration: Option<&Calibration>,
    ) -> Result<FarKind<T>, Error> {
        let calibration = calibration.ok_or_else(|| {
            missing_calibration("the Taylor map is fitted to one; pass it to `calibrated`")
        })?;
        let map = CalibratedTaylor::<T>::with_fit(self.rank, calibration, self.fit)?;
        Ok(FarKind::Linear(FarFeatures::new(Arc::new(map), None)?))
    }
}
