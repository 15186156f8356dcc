//! Hybrids: an exact window, sinks and heavy keys, and a far memory for what leaves them, under one normaliser.

mod layer;

use super::{Attention, HeadCall, Mask, NO_CHECKPOINT, Scratch, Stream, StreamState};
use crate::calibration::{Calibration, LEAST_ATTENTION, TaylorFit};
use crate::features::FeatureMap;
use crate::features::taylor::CalibratedTaylor;
use crate::kernel::{self, Buffer, padded};
use crate::memory::merged::{self, Distance, Metric, Rule};
use crate::{Error, Memory, Scalar, check};
use core::fmt;
use core::ops::Range;
pub(crate) use layer::{Layer, Work};
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayView3, ArrayViewMut2, ArrayViewMut3, Axis};
use std::sync::Arc;

/// Entries that stay in every head where heads share one budget.
pub(crate) const LEAST_ENTRIES: usize = 4;

/// Softmax attention with a memory of fixed size: the last tokens (`window`), the first ones (`sinks`) and, if wanted, the keys that matter most
/// (`heavy`) are exact; what leaves them goes to a far memory ([`Far`]), and everything stands under ONE normaliser:
///
/// ```text
/// o_t = [Σ_near e^{scale·q_t·k_j} v_j + F(q_t)] / [Σ_near e^{scale·q_t·k_j} + f(q_t)],
/// near(t) = { j ≤ t : t − j < window or j < sinks } and the heavy keys
/// ```
///
/// with (F, f) the partial sum of the far memory. No share between near and far has to be chosen or trained: both are in absolute terms.
///
/// A merging memory learns from what was read, so the outputs depend on the order of steps: the causal forward *is* the stream, step by step,
/// made fast, and a sequence cut into pieces gives the same bits. [`Mask::Full`] has a meaning only where there is no window (and nothing
/// to learn from earlier queries): then the sinks and the heavy keys are exact and all other keys are far for every query; otherwise
/// it is [`Error::Unsupported`].
///
/// # State
///
/// ```text
/// sinks·(d + d_v) + held·(d + d_v [+ 1]) + heavy·(d + d_v + 1 [+ 1]) + far,   held = window + block − 1
/// ```
///
/// numbers for each head of keys and values, from the first token on; the `[+ 1]` is the attention received, which only [`Far::merged`] needs. The
/// far part is 0 for none, `entries·(d + d_v + 2)` for Ward and merging memories (and `d + 1` for the units of the metric of [`Far::merged`]), and
/// `2·features·(d_v + 1) + 1` for feature maps.
///
/// ```
/// use dijiang::{Attention, Far, HybridAttention, Mask, SoftmaxAttention};
/// use ndarray::Array2;
///
/// let kernel = HybridAttention::<f32>::builder(8).window(16).sinks(2).far(Far::merged(12)).build()?;
/// let x = Array2::from_shape_fn((60, 8), |(i, j)| ((i * 8 + j) as f32 * 0.3).sin());
/// let out = kernel.forward(x.view(), x.view(), x.view(), Mask::Causal)?;
/// // while nothing has left the window, it is softmax attention
/// let exact = SoftmaxAttention::new(8)?.forward(x.view(), x.view(), x.view(), Mask::Causal)?;
/// assert!((0..18).all(|t| (0..8).all(|c| (out[[t, c]] - exact[[t, c]]).abs() < 1e-5)));
///
/// let stream = kernel.stream(8)?;
/// assert_eq!(stream.state_floats(), 2 * 16 + 16 * 17 + 12 * 18 + 8 + 1);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct HybridAttention<T: Scalar> {
    config: Arc<Config<T>>,
}

pub(crate) const FULL_MERGED: Error = Error::Unsupported {
    what: "a full mask with `Far::merged`",
    why: "attention received needs an order of queries; use `Far::ward`",
};

/// What takes the tokens that leave the window.
///
/// | | memory | needs a calibration | its place |
/// |---|---|---|---|
/// | [`none`](Self::none) | nothing | no | the control: a window alone |
/// | [`features`](Self::features) | sums of features | no | any feature map |
/// | [`taylor`](Self::taylor) | sums of features | yes | broad far attention, smallest state |
/// | [`ward`](Self::ward) | merged entries, static weights | better with | encoders; where reading must not write |
/// | [`merged`](Self::merged) | merged entries, weighted by the attention received | no | the default |
/// | [`memory`](Self::memory) | yours | | |
///
/// Options that a far memory does not have are an [`Error::InvalidOption`] of [`HybridBuilder::build`].
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

type MakeMemory<T> = dyn Fn(usize, f64) -> Result<Box<dyn Memory<T>>, Error> + Send + Sync;

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

    /// Sums of the features of any map. The map's estimate of `exp(q̂·k̂)` must be right in absolute terms, since it stands beside exact
    /// weights. With [`calibrated`](Self::calibrated) nothing changes: calibrate the map.
    #[must_use]
    pub fn features(map: impl FeatureMap<T> + 'static) -> Self {
        Self::of(Kind::Features(Arc::new(map)))
    }

    /// Sums of the features of a [`CalibratedTaylor`] map of this rank, `(rank + 1)(rank + 2)/2` of them. Needs a calibration.
    #[must_use]
    pub fn taylor(rank: usize) -> Self {
        Self::of(Kind::Taylor(rank))
    }

    /// At most `entries` merged entries by Ward's rule with weights that do not change: the expected attention of a token, by a calibration, or 1.
    /// Calibrated distances are `‖R(k̄_i − k̄_j)‖²`, R = (E q̂q̂ᵀ)^½; else R = I. See [`MergedMemory`](crate::MergedMemory).
    #[must_use]
    pub fn ward(entries: usize) -> Self {
        Self::of(Kind::Ward(entries))
    }

    /// At most `entries` merged entries, weighted by the attention they received.
    ///
    /// With P the probabilities just used for an output (summed over the query heads of the group), after each step
    ///
    /// ```text
    /// window token j:  acc_j ← γ·acc_j + P_j [age ≥ min_age],      entry i:  a_i ← γ·a_i + P_i
    /// ```
    ///
    /// A token that leaves becomes an entry with n = 1 and a = acc + 10⁻⁹. Beyond the bound, the pair with the smallest
    ///
    /// ```text
    /// a_i a_j/(a_i + a_j) · (‖Δk̄‖² + value_weight·‖Δv̄‖²/ρ²),    ρ² = mean of ‖v_j‖² over the first 64 tokens behind the sinks
    /// ```
    ///
    /// becomes one entry with a-weighted means; keys are scaled (k̂), and ‖Δk̄‖² is taken in a [`Metric`]. It is read with weight
    /// `n_i e^{q̂·k̄_i}`. Options: [`with_decay`](Self::with_decay), [`with_min_age`](Self::with_min_age),
    /// [`with_value_weight`](Self::with_value_weight), [`with_metric`](Self::with_metric), [`with_block`](Self::with_block).
    #[must_use]
    pub fn merged(entries: usize) -> Self {
        Self::of(Kind::Merged(entries))
    }

    /// A memory of your own: `make(value_dim, scale)` makes an empty one for each stream. Tokens are given to it one by one as they leave,
    /// and each step reads it. `absorb` must leave it unchanged where it fails. Before each call of a stream it is cloned, to go back to
    /// if the call fails.
    ///
    /// ```
    /// use dijiang::{Attention, ExactMemory, Far, HybridAttention, Mask, SoftmaxAttention};
    /// use ndarray::Array2;
    ///
    /// // a far memory that forgets nothing: softmax attention, the long way round
    /// let far = Far::memory(|value_dim, scale| Ok(Box::new(ExactMemory::<f64>::new(4, value_dim, scale)?)));
    /// let kernel = HybridAttention::builder(4).window(3).sinks(1).far(far).build()?;
    /// let x = Array2::from_shape_fn((20, 4), |(i, j)| ((i * 4 + j) as f64).sin());
    /// let out = kernel.forward(x.view(), x.view(), x.view(), Mask::Causal)?;
    /// let exact = SoftmaxAttention::new(4)?.forward(x.view(), x.view(), x.view(), Mask::Causal)?;
    /// assert!((out - exact).iter().all(|e| e.abs() < 1e-14));
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    #[must_use]
    pub fn memory(make: impl Fn(usize, f64) -> Result<Box<dyn Memory<T>>, Error> + Send + Sync + 'static) -> Self {
        Self::of(Kind::Own(Arc::new(make)))
    }

    /// Draws what it needs from a calibration: [`taylor`](Self::taylor) its map, [`ward`](Self::ward) its metric and weights.
    #[must_use]
    pub fn calibrated(mut self, calibration: &Calibration) -> Self {
        self.calibration = Some(Arc::new(calibration.clone()));
        self
    }

    /// Sets the decay γ of received attention in each step, in (0, 1]: 0.98 unless set. For [`merged`](Self::merged).
    #[must_use]
    pub fn with_decay(mut self, decay: f64) -> Self {
        self.decay = Some(decay);
        self
    }

    /// Sets the age, in tokens, from which a token in the window collects attention: 16 unless set; every token is looked at while it is
    /// new. For [`merged`](Self::merged).
    #[must_use]
    pub fn with_min_age(mut self, min_age: usize) -> Self {
        self.min_age = Some(min_age);
        self
    }

    /// Sets the factor of `‖Δv̄‖²/ρ²` in the cost of a merge: 4 unless set. For [`merged`](Self::merged).
    #[must_use]
    pub fn with_value_weight(mut self, value_weight: f64) -> Self {
        self.value_weight = Some(value_weight);
        self
    }

    /// Sets how keys are compared: [`Metric::QueryDiagonal`] unless set. For [`merged`](Self::merged).
    #[must_use]
    pub fn with_metric(mut self, metric: Metric) -> Self {
        self.metric = Some(metric);
        self
    }

    /// Sets how many tokens leave the window at once: 1 unless set. With more the window holds up to `block − 1` tokens more, that many tokens
    /// are read by one matrix product, and entries are merged in rounds of mutual nearest pairs. For [`merged`](Self::merged) and
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
        refuse(
            self.calibration.is_some(),
            taylor || ward,
            "calibration of the far memory",
            "`Far::taylor` or `Far::ward`",
        )?;
        let out_of = |which, found: f64, needed| Err(Error::InvalidOption { which, found: found.to_string(), needed });
        match (self.decay, self.value_weight) {
            (Some(decay), _) if !(decay > 0.0 && decay <= 1.0) => out_of("decay", decay, "above 0 and at most 1"),
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
    head_dim: usize,
    scale: Option<f64>,
    window: usize,
    sinks: usize,
    heavy: usize,
    far: Far<T>,
    calibration: Option<Arc<Calibration>>,
}

impl<T: Scalar> HybridAttention<T> {
    /// Begins with a window of 64 tokens, 4 sinks, no heavy keys and [`Far::merged(64)`](Far::merged).
    #[must_use]
    pub fn builder(head_dim: usize) -> HybridBuilder<T> {
        HybridBuilder { head_dim, scale: None, window: 64, sinks: 4, heavy: 0, far: Far::merged(64), calibration: None }
    }

    /// Columns of queries and keys.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.config.head_dim
    }

    pub(crate) fn config(&self) -> &Arc<Config<T>> {
        &self.config
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

    /// Sets how many keys of those that left the window stay exact: the ones with the largest static score, `ln E_q e^{q̂·k̂}` of the calibrated
    /// queries. Needs a calibration.
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
    /// [`Error::ZeroSize`] if `head_dim` or a number of entries is 0; [`Error::InvalidOption`] if an option is out of range or does not fit the far
    /// memory, nothing could be kept at all, a calibration is missing or is one of another head dimension or scale, or sizes are so large that the state
    /// cannot be counted; [`Error::Shape`] if the map has another head dimension; the errors of [`CalibratedTaylor::new`].
    pub fn build(self) -> Result<HybridAttention<T>, Error> {
        let Self { head_dim, window, sinks, heavy, far, .. } = self;
        check::at_least_one("head_dim", head_dim)?;
        let scale = check::scale::<T>(self.scale, head_dim)?;
        far.check_options()?;
        if !matches!(far.kind, Kind::Taylor(_) | Kind::Ward(_)) && heavy == 0 && self.calibration.is_some() {
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
            Ok::<_, Error>(Rule { entries, spare: block, block, metric, value_weight, value_columns: None, scale })
        };
        let kind = match &far.kind {
            Kind::None => FarKind::None,
            Kind::Features(map) => {
                check::size("map", "columns", head_dim, map.head_dim())?;
                FarKind::Linear(Arc::new(Arc::clone(map)))
            }
            Kind::Taylor(rank) => {
                let calibration = calibration.as_ref().ok_or_else(|| missing("the Taylor map"))?;
                let map = CalibratedTaylor::<T>::with_fit(*rank, calibration, far.fit.unwrap_or_default())?;
                FarKind::Linear(Arc::new(Arc::new(map)))
            }
            Kind::Ward(entries) => {
                let (metric, weighing) = match &calibration {
                    Some(calibration) => (Distance::Matrix(Arc::new(calibration.metric())), Weighing::Expected),
                    None => (Distance::Identity, Weighing::One),
                };
                FarKind::Merged { rule: rule(*entries, metric, 0.0)?, weighing }
            }
            Kind::Merged(entries) => {
                let metric = match far.metric.unwrap_or_default() {
                    Metric::Identity => Distance::Identity,
                    Metric::QueryDiagonal => Distance::QueryDiagonal,
                };
                let weighing =
                    Weighing::Received { decay: far.decay.unwrap_or(0.98), min_age: far.min_age.unwrap_or(16) };
                FarKind::Merged { rule: rule(*entries, metric, far.value_weight.unwrap_or(4.0))?, weighing }
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
        let extra = if trails { layer::TRAIL } else { block };
        let slots = [window, sinks, heavy, extra, 1].into_iter().fold(T::PAD, usize::saturating_add);
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
            expected: calibration.filter(|_| matches!(far.kind, Kind::Ward(_))).map(|c| ExpectedAttention::new(&c)),
        };
        Ok(HybridAttention { config: Arc::new(config) })
    }
}

fn missing(which: &'static str) -> Error {
    Error::InvalidOption {
        which: "calibration",
        found: format!("none, with {which}"),
        needed: "one, set with `calibrated`",
    }
}

/// How entries are weighed.
#[derive(Clone, Copy, Debug)]
enum Weighing {
    One,
    Expected,
    Received { decay: f64, min_age: usize },
}

#[derive(Clone)]
enum FarKind<T: Scalar> {
    None,
    Merged {
        rule: Rule,
        weighing: Weighing,
    },
    /// One for each kernel, so that its address tells kernels apart.
    Linear(Arc<Arc<dyn FeatureMap<T>>>),
    Own(Arc<MakeMemory<T>>),
}

/// Everything a kernel knows.
pub(crate) struct Config<T: Scalar> {
    head_dim: usize,
    scale: f64,
    window: usize,
    sinks: usize,
    heavy: usize,
    /// Tokens that leave the window at once.
    block: usize,
    /// Slots of the window; tokens behind the sinks take them in turn.
    ring: usize,
    far: FarKind<T>,
    /// For heavy keys, and for the weights of entries.
    scores: Option<StaticScore<T>>,
    expected: Option<ExpectedAttention<T>>,
}

/// `ln E_q e^{q̂·k̂}` up to a constant, for queries of the calibrated mean and covariance: see [`Calibration::static_score`].
struct StaticScore<T> {
    query_mean: Vec<T>,
    key_mean: Vec<T>,
    /// Σ_q `[d, padded d]`
    covariance: Buffer<T>,
}

impl<T: Scalar> StaticScore<T> {
    fn new(calibration: &Calibration) -> Self {
        let d = calibration.head_dim();
        let stride = padded::<T>(d);
        let mut covariance = Buffer::zeros(d * stride);
        for (row, exact) in covariance.chunks_exact_mut(stride).zip(calibration.query_covariance().outer_iter()) {
            row.iter_mut().zip(exact).for_each(|(to, &x)| *to = T::from_f64(x));
        }
        let narrow = |x: ArrayView1<'_, f64>| x.iter().map(|&x| T::from_f64(x)).collect();
        Self { query_mean: narrow(calibration.query_mean()), key_mean: narrow(calibration.key_mean()), covariance }
    }

    /// Of a scaled key, which is overwritten.
    fn of(&self, key: &mut [T], scratch: &mut Buffer<T>) -> T {
        key.iter_mut().zip(&self.key_mean).for_each(|(x, &mean)| *x -= mean);
        let stride = padded::<T>(key.len());
        scratch.resize(stride);
        kernel::row_times_matrix(key, &self.covariance, stride, scratch);
        let score = kernel::dot(&self.query_mean, key) + T::from_f64(0.5) * kernel::dot(key, &scratch[..key.len()]);
        if score.is_nan() { T::neg_infinity() } else { score }
    }
}

/// The mean softmax weight of the calibrated queries on a key: see [`Calibration::expected_attention`].
struct ExpectedAttention<T> {
    /// Queries as columns `[d, padded queries]`, for scores to base 2.
    queries: Buffer<T>,
    log2_normalizers: Vec<T>,
}

impl<T: Scalar> ExpectedAttention<T> {
    fn new(calibration: &Calibration) -> Self {
        let (exact, log_normalizers) = calibration.queries();
        let log2_e = core::f64::consts::LOG2_E;
        let width = padded::<T>(exact.nrows());
        let mut queries = Buffer::zeros(exact.ncols() * width);
        for ((query, column), &x) in exact.indexed_iter() {
            queries[column * width + query] = T::from_f64(x * log2_e);
        }
        Self { queries, log2_normalizers: log_normalizers.iter().map(|&x| T::from_f64(x * log2_e)).collect() }
    }

    /// Of a scaled key.
    #[allow(clippy::cast_precision_loss)]
    fn of(&self, key: &[T], scratch: &mut Buffer<T>) -> T {
        let count = self.log2_normalizers.len();
        scratch.resize(count);
        kernel::row_times_matrix(key, &self.queries, padded::<T>(count), scratch);
        scratch.iter_mut().zip(&self.log2_normalizers).for_each(|(x, &log2)| *x -= log2);
        let largest = kernel::max(scratch);
        if !largest.is_finite() {
            return if largest > T::zero() { T::max_value().sqrt() } else { T::from_f64(LEAST_ATTENTION) };
        }
        kernel::exp2_slice(scratch, largest);
        let mean = kernel::sum(scratch) / T::from_f64(count as f64) * largest.exp2();
        (mean + T::from_f64(LEAST_ATTENTION)).min(T::max_value().sqrt())
    }
}

impl<T: Scalar> fmt::Debug for Config<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let far: &dyn fmt::Debug = match &self.far {
            FarKind::None => &"none",
            FarKind::Merged { rule, .. } => rule,
            FarKind::Linear(map) => map,
            FarKind::Own(_) => &"a memory of the user",
        };
        let sizes = (self.head_dim, self.window, self.sinks, self.heavy, self.block);
        f.debug_struct("Config")
            .field("head_dim, window, sinks, heavy, block", &sizes)
            .field("scale", &self.scale)
            .field("far", far)
            .finish_non_exhaustive()
    }
}

impl<T: Scalar> Config<T> {
    /// The factor of queries: scores are to base 2.
    fn factor(&self) -> T {
        T::from_f64(self.scale * core::f64::consts::LOG2_E)
    }

    /// Whether tokens that leave the window are just dropped.
    fn trails(&self) -> bool {
        matches!(self.far, FarKind::None) && self.heavy == 0
    }

    fn weighing(&self) -> Weighing {
        match &self.far {
            FarKind::Merged { weighing, .. } => *weighing,
            _ => Weighing::One,
        }
    }

    /// Whether what is read changes the state.
    pub(crate) fn learns(&self) -> bool {
        matches!(self.weighing(), Weighing::Received { .. })
    }

    /// Whether heads of this kernel and another may share one budget of entries.
    pub(crate) fn pools_with(&self, other: &Self) -> bool {
        let FarKind::Merged { rule: a, weighing: Weighing::Received { decay: x, min_age: m } } = &self.far else {
            return false;
        };
        let FarKind::Merged { rule: b, weighing: Weighing::Received { decay: y, min_age: n } } = &other.far else {
            return false;
        };
        let same_metric = matches!(
            (&a.metric, &b.metric),
            (Distance::Identity, Distance::Identity) | (Distance::QueryDiagonal, Distance::QueryDiagonal)
        );
        let sizes = |config: &Self, rule: &Rule| {
            [config.head_dim, config.window, config.sinks, config.heavy, config.block, rule.entries]
        };
        sizes(self, a) == sizes(other, b)
            && same_metric
            && (x, m, self.scale, a.value_weight) == (y, n, other.scale, b.value_weight)
            && self.heavy == 0
            && a.entries >= LEAST_ENTRIES
    }

    /// Slots of exact tokens: sinks, window, heavy keys, and one for a change of places.
    fn near_slots(&self) -> usize {
        self.sinks + self.ring + self.heavy + usize::from(self.heavy > 0)
    }

    fn far_slots(&self, heads: usize) -> usize {
        match &self.far {
            FarKind::Merged { rule, .. } => rule.entries * heads + rule.block,
            _ => 0,
        }
    }

    /// Numbers of the exact part of the state.
    fn near_floats(&self, value_dim: usize) -> usize {
        let token = self.head_dim + value_dim;
        let received = usize::from(self.learns());
        self.sinks * token + (self.window + self.block - 1) * (token + received) + self.heavy * (token + 1 + received)
    }

    /// The slot of the token at this position.
    fn slot(&self, position: usize) -> usize {
        match position.checked_sub(self.sinks) {
            None => position,
            Some(behind) => self.sinks + behind % self.ring,
        }
    }

    /// The positions that fell out of the window between token `first` and token `t`; with a window of 0, `first` itself.
    fn expired(&self, first: usize, t: usize) -> Range<usize> {
        self.outside(first).saturating_sub(1).max(self.sinks)..self.outside(t)
    }

    /// The first position behind the sinks that is in the window of token `t`.
    fn outside(&self, t: usize) -> usize {
        (t + 1).saturating_sub(self.window).max(self.sinks)
    }

    /// The positions that leave when token `t` has come, the oldest of the window.
    fn leaving(&self, t: usize) -> Option<Range<usize>> {
        let count = (t + 1).checked_sub(self.sinks)?;
        let beyond = count.checked_sub(self.window)?;
        if self.trails() || beyond == 0 || !beyond.is_multiple_of(self.block) {
            return None;
        }
        let first = self.sinks + beyond - self.block;
        Some(first..first + self.block)
    }

    /// How many steps from token `t` on, at least 1, are read before more tokens leave.
    fn steps_at_once(&self, t: usize) -> usize {
        match &self.far {
            FarKind::Linear(_) | FarKind::Own(_) => 1,
            FarKind::None if self.trails() => layer::TRAIL,
            FarKind::None | FarKind::Merged { .. } => {
                // the next t that makes `beyond` a positive multiple of the block
                let beyond = (t + 1).saturating_sub(self.sinks + self.window);
                let next = (beyond / self.block + 1) * self.block + self.sinks + self.window - 1;
                next - t
            }
        }
    }

    /// The positions in the window once `tokens` have come.
    fn held(&self, tokens: usize) -> Range<usize> {
        let count = tokens.saturating_sub(self.sinks);
        let end = self.sinks.max(tokens);
        let held = match count.checked_sub(self.window) {
            Some(_) if self.trails() => self.window,
            Some(beyond) => self.window + beyond % self.block,
            None => count,
        };
        end - held..end
    }

    /// The slots' positions that a step `t` must not see, of steps `first..newest`: later tokens, and what fell out of its window only since `first`.
    fn hidden(&self, first: usize, t: usize, newest: usize) -> impl Iterator<Item = usize> {
        let gone = if self.trails() { self.expired(first, t) } else { 0..0 };
        gone.chain(t + 1..newest)
    }

    /// The score of a heavy key.
    fn static_score(&self, key: impl Iterator<Item = T>, [scaled, scratch]: &mut [Buffer<T>; 2]) -> T {
        self.scaled(key, scaled);
        self.scores.as_ref().map_or(T::zero(), |score| score.of(scaled, scratch))
    }

    /// The attention a key is expected to receive.
    fn expected_attention(&self, key: impl Iterator<Item = T>, [scaled, scratch]: &mut [Buffer<T>; 2]) -> T {
        self.scaled(key, scaled);
        self.expected.as_ref().map_or(T::one(), |expected| expected.of(scaled, scratch))
    }

    fn scaled(&self, key: impl Iterator<Item = T>, scaled: &mut Buffer<T>) {
        let root = T::from_f64(self.scale.sqrt());
        scaled.resize(self.head_dim);
        scaled.iter_mut().zip(key).for_each(|(to, x)| *to = x * root);
    }

    /// Numbers that say which state belongs to which kernel.
    fn shape(&self, heads: usize, value_dim: usize) -> Vec<usize> {
        let far = match &self.far {
            FarKind::None => [0, 0],
            FarKind::Merged { rule, weighing } => {
                [rule.entries, if matches!(weighing, Weighing::Received { .. }) { 2 } else { 1 }]
            }
            FarKind::Linear(map) => [map.num_features(), 3],
            FarKind::Own(_) => [0, 4],
        };
        let near = [heads, self.head_dim, value_dim, self.window, self.sinks, self.heavy, self.block];
        near.into_iter().chain(far).collect()
    }
}

impl<T: Scalar> HybridAttention<T> {
    /// Attention of checked shapes; of several heads of a causal group, or one.
    fn forward_checked(
        &self,
        mut call: HeadCall<'_, T>,
        mask: Mask,
        deciding_columns: Option<usize>,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        for q in call.q.outer_iter() {
            check::all_finite(q, call.k, call.v)?;
        }
        if mask != Mask::Causal {
            if self.config.window > 0 {
                let why = "a window has no meaning where every query sees every key; build the kernel with `window(0)`";
                return Err(Error::Unsupported { what: "a full mask with a window", why });
            }
            if self.config.learns() {
                return Err(FULL_MERGED);
            }
        }
        if call.q.len_of(Axis(1)) == 0 {
            return Ok(());
        }
        let (layer, work) = scratch.hybrid();
        layer.prepare(&self.config, 1, call.v.ncols(), deciding_columns)?;
        if mask == Mask::Causal {
            layer.extend(&self.config, &mut [call], work)
        } else {
            layer.full(&self.config, &mut call, work)
        }
    }

    /// Causal attention of heads that share one budget.
    pub(crate) fn forward_pool(&self, calls: &mut [HeadCall<'_, T>], scratch: &mut Scratch<T>) -> Result<(), Error> {
        for HeadCall { q, k, v, .. } in &*calls {
            check::size("q", "columns", self.config.head_dim, q.len_of(Axis(2)))?;
            check::size("k", "columns", self.config.head_dim, k.ncols())?;
            check::at_least_one("v columns", v.ncols())?;
            q.outer_iter().try_for_each(|q| check::finite("q", q))?;
            check::finite("k", *k)?;
            check::finite("v", *v)?;
        }
        if calls[0].k.nrows() == 0 {
            return Ok(());
        }
        let (layer, work) = scratch.hybrid();
        layer.prepare(&self.config, calls.len(), calls[0].v.ncols(), None)?;
        layer.extend(&self.config, calls, work)
    }
}

impl<T: Scalar> Attention<T> for HybridAttention<T> {
    fn forward_into(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mask: Mask,
        out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        self.forward_with(q, k, v, mask, out, &mut Scratch::new())
    }

    fn forward_with(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mask: Mask,
        out: ArrayViewMut2<'_, T>,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        check::forward(self.config.head_dim, q, k, v, mask, &out)?;
        let (q, out) = (q.insert_axis(Axis(0)), out.insert_axis(Axis(0)));
        self.forward_checked(HeadCall { q, k, v, out }, mask, None, scratch)
    }

    fn forward_group(
        &self,
        q: ArrayView3<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mask: Mask,
        mut out: ArrayViewMut3<'_, T>,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        check::size("out", "heads", q.len_of(Axis(0)), out.len_of(Axis(0)))?;
        for (q, out) in q.outer_iter().zip(out.outer_iter_mut()) {
            check::forward(self.config.head_dim, q, k, v, mask, &out)?;
            if mask != Mask::Causal {
                self.forward_with(q, k, v, mask, out, scratch)?;
            }
        }
        if mask == Mask::Causal && !q.is_empty() {
            self.forward_checked(HeadCall { q, k, v, out }, mask, None, scratch)?;
        }
        Ok(())
    }

    fn forward_probed(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        value_dim: usize,
        mask: Mask,
    ) -> Result<Array2<T>, Error> {
        let mut out = Array2::zeros((q.nrows(), v.ncols()));
        check::forward(self.config.head_dim, q, k, v, mask, &out.view_mut())?;
        let call = HeadCall { q: q.insert_axis(Axis(0)), k, v, out: out.view_mut().insert_axis(Axis(0)) };
        self.forward_checked(call, mask, Some(value_dim), &mut Scratch::new())?;
        Ok(out)
    }

    fn stream(&self, value_dim: usize) -> Result<Box<dyn Stream<T>>, Error> {
        Ok(Box::new(self.heads_stream(1, 1, value_dim)?))
    }

    fn group_stream(&self, group: usize, value_dim: usize) -> Result<Option<Box<dyn Stream<T>>>, Error> {
        Ok(Some(Box::new(self.heads_stream(1, group, value_dim)?)))
    }

    fn as_hybrid(&self) -> Option<&HybridAttention<T>> {
        Some(self)
    }
}

impl<T: Scalar> HybridAttention<T> {
    /// An empty stream of some heads of keys and values that share one budget of entries, each with `group` query heads.
    pub(crate) fn heads_stream(&self, heads: usize, group: usize, value_dim: usize) -> Result<HybridStream<T>, Error> {
        check::at_least_one("value_dim", value_dim)?;
        check::at_least_one("group", group)?;
        check::array("value_dim", value_dim, self.config.near_slots() + self.config.far_slots(heads))?;
        let mut layer = Layer::new();
        layer.prepare(&self.config, heads, value_dim, None)?;
        Ok(HybridStream {
            config: Arc::clone(&self.config),
            heads,
            group,
            value_dim,
            layer,
            work: Work::new(),
            checkpoint: None,
        })
    }
}

/// The state of a hybrid kernel, for one or several heads of keys and values.
#[derive(Debug)]
pub(crate) struct HybridStream<T: Scalar> {
    config: Arc<Config<T>>,
    heads: usize,
    group: usize,
    value_dim: usize,
    layer: Layer<T>,
    work: Work<T>,
    checkpoint: Option<(Layer<T>, bool)>,
}

const KERNEL: &str = "hybrid";

impl<T: Scalar> HybridStream<T> {
    /// Absorbs tokens of every head, of checked shapes.
    fn absorb(&mut self, calls: &mut [HeadCall<'_, T>]) -> Result<(), Error> {
        for call in &*calls {
            for q in call.q.outer_iter() {
                check::finite("q", q)?;
            }
            check::finite("k", call.k)?;
            check::finite("v", call.v)?;
        }
        if calls[0].k.nrows() == 0 { Ok(()) } else { self.layer.extend(&self.config, calls, &mut self.work) }
    }

    fn shape(&self) -> Vec<usize> {
        let mut shape = self.config.shape(self.heads, self.value_dim);
        shape.push(self.group);
        shape
    }
}

impl<T: Scalar> Clone for HybridStream<T> {
    fn clone(&self) -> Self {
        Self {
            config: Arc::clone(&self.config),
            heads: self.heads,
            group: self.group,
            value_dim: self.value_dim,
            layer: self.layer.clone(),
            work: Work::new(),
            checkpoint: None,
        }
    }
}

impl<T: Scalar> Stream<T> for HybridStream<T> {
    fn extend(
        &mut self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        self.extend_group(q.insert_axis(Axis(0)), k, v, out.insert_axis(Axis(0)))
    }

    fn group(&self) -> usize {
        self.group
    }

    fn extend_group(
        &mut self,
        q: ArrayView3<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        out: ArrayViewMut3<'_, T>,
    ) -> Result<(), Error> {
        self.extend_heads(&mut [HeadCall { q, k, v, out }])
    }

    fn extend_heads(&mut self, calls: &mut [HeadCall<'_, T>]) -> Result<(), Error> {
        check::size("q", "kv heads", self.heads, calls.len())?;
        for HeadCall { q, k, v, out } in &*calls {
            check::extend_group(self.config.head_dim, self.value_dim, self.group, *q, *k, *v, out)?;
        }
        self.absorb(calls)
    }

    fn len(&self) -> usize {
        self.layer.tokens
    }

    fn state_floats(&self) -> usize {
        self.layer.state_floats(&self.config)
    }

    fn clone_box(&self) -> Box<dyn Stream<T>> {
        Box::new(self.clone())
    }

    fn reset(&mut self) {
        self.layer.clear(&self.config);
        if let Some((_, valid)) = &mut self.checkpoint {
            *valid = false;
        }
    }

    fn checkpoint(&mut self) -> bool {
        let (copy, valid) = self.checkpoint.get_or_insert_with(|| (Layer::new(), true));
        copy.copy_from(&self.layer);
        *valid = true;
        true
    }

    fn rollback(&mut self) -> Result<(), Error> {
        match &self.checkpoint {
            Some((copy, true)) => {
                self.layer.copy_from(copy);
                Ok(())
            }
            _ => Err(NO_CHECKPOINT),
        }
    }

    fn save(&self) -> Result<StreamState<T>, Error> {
        match self.layer.numbers(&self.config) {
            Some(numbers) => Ok(StreamState::new(KERNEL, self.len(), self.shape(), numbers)),
            None => Err(Error::Unsupported {
                what: "saving this stream",
                why: "only its far memory, a type of your own, knows its state",
            }),
        }
    }

    fn restore(&mut self, state: &StreamState<T>) -> Result<(), Error> {
        let count = state.count();
        let numbers = state.numbers(KERNEL, &self.shape(), count)?;
        let mut layer = self.layer.clone();
        if !layer.set_numbers(&self.config, state.tokens(), numbers) {
            let found = count.to_string();
            return Err(Error::State {
                which: "size",
                expected: "as many numbers as its tokens need".to_owned(),
                found,
            });
        }
        self.layer = layer;
        self.checkpoint = None;
        Ok(())
    }
}
