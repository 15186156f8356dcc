//! The builder of a hybrid kernel.

use crate::attention::hybrid::HybridAttention;
use crate::attention::hybrid::config::{
    Config, FarKind, WINDOW_ONLY_SLOTS, Weighing, missing_calibration,
};
use crate::attention::hybrid::far::Far;
use crate::attention::hybrid::scores::{ExpectedAttention, StaticScore};
use crate::calibration::Calibration;
use crate::check;
use crate::error::Error;
use crate::memory::scoring::SoftCap;
use crate::scalar::Scalar;
use crate::state_format::StateFormat;
use std::sync::Arc;

const CAPPED_FEATURES: Error = Error::Unsupported {
    what: "a soft cap with features or Taylor as the far memory",
    why: "products of features estimate the exponential of the plain score; use `Far::merged`, \
          `Far::ward` or `Far::none`",
};

/// Options of a [`HybridAttention`].
#[derive(Clone, Debug)]
pub struct HybridBuilder<T: Scalar> {
    head_dim: usize,
    scale: Option<f64>,
    soft_cap: Option<f64>,
    sink_logits: Option<Vec<f64>>,
    window: usize,
    sinks: usize,
    heavy: usize,
    far: Far<T>,
    format: StateFormat,
    calibration: Option<Arc<Calibration>>,
}

impl<T: Scalar> HybridAttention<T> {
    /// Begins with a window of 64 tokens, 4 sinks, no heavy keys and
    /// [`Far::merged(64)`](Far::merged).
    #[must_use]
    pub fn builder(head_dim: usize) -> HybridBuilder<T> {
        HybridBuilder {
            head_dim,
            scale: None,
            soft_cap: None,
            sink_logits: None,
            window: 64,
            sinks: 4,
            heavy: 0,
            far: Far::merged(64),
            format: StateFormat::default(),
            calibration: None,
        }
    }
}

impl<T: Scalar> HybridBuilder<T> {
    /// Sets how many of the last tokens are exact, the newest included.
    #[must_use]
    pub fn window(mut self, window: usize) -> Self {
        self.window = window;
        self
    }

    /// Sets how many of the first tokens stay exact.
    #[must_use]
    pub fn sinks(mut self, sinks: usize) -> Self {
        self.sinks = sinks;
        self
    }

    /// Sets how many keys of those that left the window stay exact: the ones with the largest
    /// static score, `ln E_q e^{q̂·k̂}` of the calibrated queries. Needs a calibration.
    #[must_use]
    pub fn heavy(mut self, heavy: usize) -> Self {
        self.heavy = heavy;
        self
    }

    /// Sets what takes the tokens that leave: a [`Far`], or [`Merged`](crate::Merged),
    /// [`Ward`](crate::Ward) or [`Taylor`](crate::Taylor) with options.
    #[must_use]
    pub fn far(mut self, far: impl Into<Far<T>>) -> Self {
        self.far = far.into();
        self
    }

    /// Keeps the keys and values of the window, of sinks, of heavy keys and of merged entries in
    /// this format, [`StateFormat::F32`] unless set.
    ///
    /// Tokens are rounded when they come, entries anew after each merge, and distances are taken of
    /// what is kept. The weights and counts of entries, and what far memories of features or of
    /// your own keep, stay numbers of the kernel.
    ///
    /// ```
    /// use dijiang::{Attention, Far, HybridAttention, StateFormat};
    ///
    /// let builder = HybridAttention::<f32>::builder(64).far(Far::merged(256));
    /// let bytes = |format| builder.clone().state_format(format).build()?.state_bytes(64, 2048);
    /// assert_eq!(bytes(StateFormat::Q8)?, (64 + 4 + 256) * 136 + 64 * 4 + 256 * 8 + 65 * 4);
    /// assert!(bytes(StateFormat::F32)? > 3 * bytes(StateFormat::Q8)?);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    #[must_use]
    pub fn state_format(mut self, format: StateFormat) -> Self {
        self.format = format;
        self
    }

    /// Sets the factor of `q·k`, `1/√head_dim` unless set.
    #[must_use]
    pub fn scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Caps the scores softly, see
    /// [`SoftmaxAttention::with_soft_cap`](crate::SoftmaxAttention::with_soft_cap). Entries that
    /// stand for n tokens are read with the logit `cap·tanh(scale·q·k̄/cap) + ln n`. Sums of
    /// features estimate the exponential of the plain score and cannot be capped;
    /// a [memory of your own](Far::memory) caps its scores itself. Calibrations know of no cap:
    /// they only rank and weigh keys.
    ///
    /// ```
    /// use dijiang::{Far, HybridAttention};
    ///
    /// let gemma_2 = HybridAttention::<f32>::builder(256).window(512).soft_cap(50.0);
    /// let kernel = gemma_2.clone().far(Far::merged(64)).build()?;
    /// assert!(gemma_2.far(Far::features(dijiang::Performer::new(256, 64, 0)?)).build().is_err());
    /// # let _ = kernel;
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    #[must_use]
    pub fn soft_cap(mut self, cap: f64) -> Self {
        self.soft_cap = Some(cap);
        self
    }

    /// Adds a learned sink to the normaliser, see
    /// [`SoftmaxAttention::with_sink_logit`](crate::SoftmaxAttention::with_sink_logit): all-ones
    /// values then give less than ones. It is no token, and apart from [`sinks`](Self::sinks).
    #[must_use]
    pub fn sink_logit(self, logit: f64) -> Self {
        self.sink_logits(vec![logit])
    }

    /// As [`sink_logit`](Self::sink_logit), with one logit for each query head of a group, see
    /// [`SoftmaxAttention::with_sink_logits`](crate::SoftmaxAttention::with_sink_logits).
    #[must_use]
    pub fn sink_logits(mut self, logits: Vec<f64>) -> Self {
        self.sink_logits = Some(logits);
        self
    }

    /// Sets the calibration of heavy keys, and of the far memory if it has none of its own.
    #[must_use]
    pub fn calibrated(mut self, calibration: &Calibration) -> Self {
        self.calibration = Some(Arc::new(calibration.clone()));
        self
    }

    /// The kernel.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `head_dim` or a number of entries is 0; [`Error::InvalidOption`] if
    /// an option is out of range or excluded by another, nothing could be kept at all, a
    /// calibration is missing or is one of another head dimension or scale, or sizes are so large
    /// that the state cannot be counted; [`Error::Shape`] if the map has another head dimension or
    /// there is not one decay for each feature;
    /// [`Error::Unsupported`] if there is a soft cap and sums of features behind;
    /// the errors of [`CalibratedTaylor::new`](crate::CalibratedTaylor::new).
    pub fn build(self) -> Result<HybridAttention<T>, Error> {
        let Self { head_dim, window, sinks, heavy, far, .. } = self;
        check::at_least_one("head_dim", head_dim)?;
        let scale = check::scale::<T>(self.scale, head_dim)?;
        let soft_cap = self.soft_cap.map(SoftCap::new).transpose()?;
        if let Some(logits) = &self.sink_logits {
            check::sink_logits::<T>(logits)?;
        }
        far.check()?;
        if !far.shares_calibration() && heavy == 0 && self.calibration.is_some() {
            return Err(Error::InvalidOption {
                which: "calibration",
                found: "one that nothing would use".to_owned(),
                needed: "heavy keys, `Far::ward` or `Far::taylor`",
            });
        }
        let calibration = far.calibration().or(self.calibration.as_ref());
        for calibration in [calibration, self.calibration.as_ref()].into_iter().flatten() {
            check::size("calibration", "columns", head_dim, calibration.head_dim())?;
            if (calibration.scale() / scale - 1.0).abs() > 1e-6 {
                return Err(Error::InvalidOption {
                    which: "calibration",
                    found: format!("one of scale {}", calibration.scale()),
                    needed: "the scale of the kernel",
                });
            }
        }
        if heavy > 0 && calibration.is_none() {
            return Err(missing_calibration(
                "heavy keys are chosen by one; pass it to `HybridBuilder::calibrated`",
            ));
        }
        let block = far.block();
        let kind =
            far.kind(head_dim, window, scale, calibration.map(|calibration| &**calibration))?;
        if soft_cap.is_some() && matches!(kind, FarKind::Linear(_)) {
            return Err(CAPPED_FEATURES);
        }
        if matches!(kind, FarKind::None) && window == 0 && sinks == 0 && heavy == 0 {
            return Err(Error::InvalidOption {
                which: "window",
                found: "0, with no sinks, no heavy keys and no far memory".to_owned(),
                needed: "something to attend to",
            });
        }
        let window_only = matches!(kind, FarKind::None) && heavy == 0;
        let extra = if window_only { WINDOW_ONLY_SLOTS } else { block };
        let slots =
            [window, sinks, heavy, extra, 1].into_iter().fold(T::PAD, usize::saturating_add);
        check::array("window", slots, head_dim)?;
        let config = Config {
            head_dim,
            scale,
            format: self.format,
            soft_cap,
            sink_logits: self.sink_logits.unwrap_or_default(),
            window,
            sinks,
            heavy,
            block,
            ring: window + extra,
            scores: self
                .calibration
                .as_ref()
                .or(calibration)
                .filter(|_| heavy > 0)
                .map(|calibration| StaticScore::new(calibration)),
            expected: calibration
                .filter(|_| matches!(kind.weighing(), Weighing::Expected))
                .map(|calibration| ExpectedAttention::new(calibration)),
            far: kind,
        };
        Ok(HybridAttention { config: Arc::new(config) })
    }
}
