//! The options of a hybrid kernel.

use super::HybridAttention;
use super::config::{Config, ExpectedAttention, FarKind, StaticScore, TRAIL, Weighing};
use crate::calibration::Calibration;
use crate::calibration::taylor::TaylorFit;
use crate::features::FeatureMap;
use crate::features::calibrated_taylor::CalibratedTaylor;
use crate::memory::merged::{self, Distance, Metric, Rule};
use crate::{Error, Memory, Scalar, check};
use core::fmt;
use ndarray::Array2;
use std::sync::Arc;

/// What takes the tokens that leave the window.
///
/// | | memory | needs a calibration | its place |
/// |---|---|---|---|
/// | [`none`](Self::none) | nothing | no | the control: a window alone |
/// | [`features`](Self::features) | sums of features | no | any feature map |
/// | [`taylor`](Self::taylor) | sums of features | yes | broad far attention, smallest state |
/// | [`ward`](Self::ward) | merged entries, static weights | better with | encoders; where reading must not write |
/// | [`merged`](Self::merged) | merged entries, weighted by the attention received | no; may have one | the default |
/// | [`memory`](Self::memory) | yours | | |
///
/// Options that a far memory does not have are an [`Error::InvalidOption`] of
/// [`HybridBuilder::build`].
#[derive(Clone, Debug)]
pub struct Far<T: Scalar> {
    kind: Kind<T>,
    calibration: Option<Arc<Calibration>>,
    decay: Option<f64>,
    min_age: Option<usize>,
    value_weight: Option<f64>,
    metric: Option<Metric>,
    block: Option<usize>,
    fit: Option<TaylorFit>,
}

pub(super) type MakeMemory<T> =
    dyn Fn(usize, f64) -> Result<Box<dyn Memory<T>>, Error> + Send + Sync;

#[derive(Clone)]
enum Kind<T: Scalar> {
    None,
    Features(Arc<dyn FeatureMap<T>>),
    Taylor(usize),
    Ward(usize),
    Merged(usize),
    Own(Arc<MakeMemory<T>>),
}

impl<T: Scalar> fmt::Debug for Kind<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::Features(map) => f.debug_tuple("Features").field(map).finish(),
            Self::Taylor(rank) => f.debug_tuple("Taylor").field(rank).finish(),
            Self::Ward(entries) => f.debug_tuple("Ward").field(entries).finish(),
            Self::Merged(entries) => f.debug_tuple("Merged").field(entries).finish(),
            Self::Own(_) => f.write_str("Own"),
        }
    }
}

impl<T: Scalar> Far<T> {
    fn of(kind: Kind<T>) -> Self {
        Self {
            kind,
            calibration: None,
            decay: None,
            min_age: None,
            value_weight: None,
            metric: None,
            block: None,
            fit: None,
        }
    }

    /// Forgets what leaves the window: the honest control.
    #[must_use]
    pub fn none() -> Self {
        Self::of(Kind::None)
    }

    /// Sums of the features of any map. The map's estimate of `exp(q̂·k̂)` must be right in
    /// absolute terms, since it stands beside exact weights. To calibrate it, calibrate the map. A
    /// key beyond the range of the map is found out when it leaves the window: the call in which it
    /// does then fails, as does every later one.
    #[must_use]
    pub fn features(map: impl FeatureMap<T> + 'static) -> Self {
        Self::of(Kind::Features(Arc::new(map)))
    }

    /// Sums of the features of a [`CalibratedTaylor`] map of this rank, `(rank + 1)(rank + 2)/2` of
    /// them. Needs a calibration.
    #[must_use]
    pub fn taylor(rank: usize) -> Self {
        Self::of(Kind::Taylor(rank))
    }

    /// At most `entries` merged entries by Ward's rule with weights that do not change: the
    /// expected attention of a token, by a calibration, or 1. Calibrated distances are
    /// `‖R(k̄_i − k̄_j)‖²`, R = (E q̂q̂ᵀ)^½; else R = I. See [`MergedMemory`](crate::MergedMemory).
    #[must_use]
    pub fn ward(entries: usize) -> Self {
        Self::of(Kind::Ward(entries))
    }

    /// At most `entries` merged entries, weighted by the attention they received.
    ///
    /// With P the probabilities just used for an output (summed over the query heads of the group),
    /// after each step
    ///
    /// ```text
    /// window token j:  acc_j ← γ·acc_j + P_j [age ≥ min_age],      entry i:  a_i ← γ·a_i + P_i
    /// ```
    ///
    /// A token that leaves becomes an entry with n = 1 and a = acc + 10⁻⁹. Beyond the bound, the
    /// pair with the smallest
    ///
    /// ```text
    /// a_i a_j/(a_i + a_j) · (‖Δk̄‖² + value_weight·‖Δv̄‖²/ρ²),    ρ² = mean of ‖v_j‖² over the first 64 tokens behind the sinks
    /// ```
    ///
    /// becomes one entry with a-weighted means; keys are scaled (k̂), and ‖Δk̄‖² is taken in a
    /// [`Metric`]. It is read with weight `n_i e^{q̂·k̄_i}`. Options:
    /// [`with_decay`](Self::with_decay), [`with_min_age`](Self::with_min_age),
    /// [`with_value_weight`](Self::with_value_weight), [`with_metric`](Self::with_metric),
    /// [`with_block`](Self::with_block).
    #[must_use]
    pub fn merged(entries: usize) -> Self {
        Self::of(Kind::Merged(entries))
    }

    /// A memory of your own: `make(value_dim, scale)` makes an empty one for each stream. Tokens
    /// are given to it one by one as they leave, and each step reads it. `absorb` must leave it
    /// unchanged where it fails. Before each call of a stream it is cloned, to go back to if the
    /// call fails.
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
        Self::of(Kind::Own(Arc::new(make)))
    }

    /// Draws what it needs from a calibration: [`taylor`](Self::taylor) its map,
    /// [`ward`](Self::ward) its metric R and weights, [`merged`](Self::merged) the metric R, scaled
    /// to mean 1, in place of a [`Metric`]. Make it with the window and sinks of the kernel, which
    /// is not checked.
    #[must_use]
    pub fn calibrated(mut self, calibration: &Calibration) -> Self {
        self.calibration = Some(Arc::new(calibration.clone()));
        self
    }

    /// Sets the decay γ of received attention in each step, in (0, 1]: 0.98 unless set. For
    /// [`merged`](Self::merged).
    #[must_use]
    pub fn with_decay(mut self, decay: f64) -> Self {
        self.decay = Some(decay);
        self
    }

    /// Sets the age, in tokens, from which a token in the window collects attention: 16 unless set;
    /// every token is looked at while it is new. For [`merged`](Self::merged).
    #[must_use]
    pub fn with_min_age(mut self, min_age: usize) -> Self {
        self.min_age = Some(min_age);
        self
    }

    /// Sets the factor of `‖Δv̄‖²/ρ²` in the cost of a merge: 4 unless set. For
    /// [`merged`](Self::merged).
    #[must_use]
    pub fn with_value_weight(mut self, value_weight: f64) -> Self {
        self.value_weight = Some(value_weight);
        self
    }

    /// Sets how keys are compared: [`Metric::QueryDiagonal`] unless set. For
    /// [`merged`](Self::merged).
    #[must_use]
    pub fn with_metric(mut self, metric: Metric) -> Self {
        self.metric = Some(metric);
        self
    }

    /// Sets how many tokens leave the window at once: 1 unless set. With more the window holds up
    /// to `block − 1` tokens more, that many tokens are read by one matrix product, and entries are
    /// merged in rounds of mutual nearest pairs. For [`merged`](Self::merged) and
    /// [`ward`](Self::ward).
    #[must_use]
    pub fn with_block(mut self, block: usize) -> Self {
        self.block = Some(block);
        self
    }

    /// Sets how the coefficients are fitted. For [`taylor`](Self::taylor).
    #[must_use]
    pub fn with_fit(mut self, fit: TaylorFit) -> Self {
        self.fit = Some(fit);
        self
    }

    /// Options that were set and have no meaning here.
    fn check_options(&self) -> Result<(), Error> {
        let merged = matches!(self.kind, Kind::Merged(_));
        let ward = matches!(self.kind, Kind::Ward(_));
        let taylor = matches!(self.kind, Kind::Taylor(_));
        let refuse = |set: bool, fits: bool, which, needed| {
            let found = "an option of another far memory".to_owned();
            if set && !fits { Err(Error::InvalidOption { which, found, needed }) } else { Ok(()) }
        };
        refuse(self.decay.is_some(), merged, "decay", "`Far::merged`")?;
        refuse(self.min_age.is_some(), merged, "min_age", "`Far::merged`")?;
        refuse(self.value_weight.is_some(), merged, "value_weight", "`Far::merged`")?;
        refuse(self.metric.is_some(), merged, "metric", "`Far::merged`")?;
        refuse(self.block.is_some(), merged || ward, "block", "`Far::merged` or `Far::ward`")?;
        refuse(self.fit.is_some(), taylor, "fit", "`Far::taylor`")?;
        let draws = taylor || ward || merged;
        refuse(
            self.calibration.is_some(),
            draws,
            "calibration of the far memory",
            "`Far::taylor`, `ward` or `merged`",
        )?;
        if self.calibration.is_some() && self.metric.is_some() {
            let found = "one, and a calibration, which has its own".to_owned();
            return Err(Error::InvalidOption { which: "metric", found, needed: "one of the two" });
        }
        let out_of = |which, found: f64, needed| {
            Err(Error::InvalidOption { which, found: found.to_string(), needed })
        };
        match (self.decay, self.value_weight) {
            (Some(decay), _) if !(decay > 0.0 && decay <= 1.0) => {
                out_of("decay", decay, "above 0 and at most 1")
            }
            (_, Some(weight)) if !(weight >= 0.0 && weight.is_finite()) => {
                out_of("value_weight", weight, "a finite number that is not negative")
            }
            _ => Ok(()),
        }
    }
}

/// Options of a [`HybridAttention`].
#[derive(Clone, Debug)]
pub struct HybridBuilder<T: Scalar> {
    pub(super) head_dim: usize,
    pub(super) scale: Option<f64>,
    pub(super) window: usize,
    pub(super) sinks: usize,
    pub(super) heavy: usize,
    pub(super) far: Far<T>,
    pub(super) calibration: Option<Arc<Calibration>>,
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

    /// Sets what takes the tokens that leave.
    #[must_use]
    pub fn far(mut self, far: Far<T>) -> Self {
        self.far = far;
        self
    }

    /// Sets the factor of `q·k`, `1/√head_dim` unless set.
    #[must_use]
    pub fn scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
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
    /// an option is out of range or does not fit the far memory, nothing could be kept at all, a
    /// calibration is missing or is one of another head dimension or scale, or sizes are so large
    /// that the state cannot be counted; [`Error::Shape`] if the map has another head dimension;
    /// the errors of [`CalibratedTaylor::new`].
    pub fn build(self) -> Result<HybridAttention<T>, Error> {
        let Self { head_dim, window, sinks, heavy, far, .. } = self;
        check::at_least_one("head_dim", head_dim)?;
        let scale = check::scale::<T>(self.scale, head_dim)?;
        far.check_options()?;
        if !matches!(far.kind, Kind::Taylor(_) | Kind::Ward(_))
            && heavy == 0
            && self.calibration.is_some()
        {
            return Err(Error::InvalidOption {
                which: "calibration",
                found: "one that nothing would use".to_owned(),
                needed: "heavy keys, `Far::ward` or `Far::taylor`",
            });
        }
        let calibration = far.calibration.clone().or_else(|| self.calibration.clone());
        for calibration in [&calibration, &self.calibration].into_iter().flatten() {
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
            return Err(missing("heavy keys"));
        }
        let block = far.block.unwrap_or(1);
        check::at_least_one("block", block)?;
        let rule = |entries: usize, metric, value_weight| {
            check::at_least_one("entries", entries)?;
            merged::check_entries(entries.saturating_add(block))?;
            Ok::<_, Error>(Rule {
                entries,
                spare: block,
                block,
                metric,
                value_weight,
                value_columns: None,
                scale,
            })
        };
        let kind = match &far.kind {
            Kind::None => FarKind::None,
            Kind::Features(map) => {
                check::size("map", "columns", head_dim, map.head_dim())?;
                FarKind::Linear(Arc::new(Arc::clone(map)))
            }
            Kind::Taylor(rank) => {
                let calibration = calibration.as_ref().ok_or_else(|| missing("the Taylor map"))?;
                let map = CalibratedTaylor::<T>::with_fit(
                    *rank,
                    calibration,
                    far.fit.unwrap_or_default(),
                )?;
                FarKind::Linear(Arc::new(Arc::new(map)))
            }
            Kind::Ward(entries) => {
                let (metric, weighing) = match &calibration {
                    Some(calibration) => {
                        (Distance::Matrix(Arc::new(calibration.metric())), Weighing::Expected)
                    }
                    None => (Distance::Identity, Weighing::One),
                };
                FarKind::Merged { rule: rule(*entries, metric, 0.0)?, weighing }
            }
            Kind::Merged(entries) => {
                let metric = match (&far.calibration, far.metric.unwrap_or_default()) {
                    (Some(calibration), _) => Distance::Matrix(Arc::new(unit_metric(calibration))),
                    (None, Metric::Identity) => Distance::Identity,
                    (None, Metric::QueryDiagonal) => Distance::QueryDiagonal,
                };
                let weighing = Weighing::Received {
                    decay: far.decay.unwrap_or(0.98),
                    min_age: far.min_age.unwrap_or(16),
                };
                FarKind::Merged {
                    rule: rule(*entries, metric, far.value_weight.unwrap_or(4.0))?,
                    weighing,
                }
            }
            Kind::Own(make) => FarKind::Own(Arc::clone(make)),
        };
        if matches!(kind, FarKind::None) && window == 0 && sinks == 0 && heavy == 0 {
            return Err(Error::InvalidOption {
                which: "window",
                found: "0, with no sinks, no heavy keys and no far memory".to_owned(),
                needed: "something to attend to",
            });
        }
        let trails = matches!(kind, FarKind::None) && heavy == 0;
        let extra = if trails { TRAIL } else { block };
        let slots =
            [window, sinks, heavy, extra, 1].into_iter().fold(T::PAD, usize::saturating_add);
        check::array("window", slots, head_dim)?;
        let config = Config {
            head_dim,
            scale,
            window,
            sinks,
            heavy,
            block,
            ring: window + extra,
            far: kind,
            scores: self
                .calibration
                .as_ref()
                .or(calibration.as_ref())
                .filter(|_| heavy > 0)
                .map(|c| StaticScore::new(c)),
            expected: calibration
                .filter(|_| matches!(far.kind, Kind::Ward(_)))
                .map(|c| ExpectedAttention::new(&c)),
        };
        Ok(HybridAttention { config: Arc::new(config) })
    }
}

/// The metric of a calibration, scaled so that the mean of the squares it weighs with is 1: values
/// are weighed against keys.
#[allow(clippy::cast_precision_loss)]
fn unit_metric(calibration: &Calibration) -> Array2<f64> {
    let metric = calibration.metric();
    let mean = metric.iter().map(|x| x * x).sum::<f64>() / metric.nrows() as f64;
    if mean > 0.0 { metric / mean.sqrt() } else { metric }
}

fn missing(which: &'static str) -> Error {
    Error::InvalidOption {
        which: "calibration",
        found: format!("none, with {which}"),
        needed: "one, set with `calibrated`",
    }
}
