//! The options of softmax attention.

use crate::attention::fingerprint::Fingerprint;
use crate::attention::hybrid::builder::HybridBuilder;
use crate::check;
use crate::error::Error;
use crate::mask::Mask;
use crate::memory::scoring::{Scoring, SoftCap, of_query_head};
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use crate::state_format::StateFormat;
use core::f64::consts::LOG2_E;
use core::marker::PhantomData;
use ndarray::Array1;

/// Exact softmax attention (Vaswani et al., arXiv 1706.03762, equation 1):
///
/// ```text
/// o_t = Σ_j e^{scale·q_t·k_j} v_j / Σ_j e^{scale·q_t·k_j},   scale = 1/√head_dim unless set.
/// ```
///
/// Scores are computed tile by tile with a running maximum: there is never an n × n array, and
/// scores of any finite size give finite output. Time is O(n_q·n_k·(d + d_v)); the stream is a
/// growing key/value cache.
///
/// What models change of it are options, which go together: scores that are capped softly
/// ([`with_soft_cap`](Self::with_soft_cap)), linear biases
/// ([`with_alibi_slope`](Self::with_alibi_slope)), a learned sink
/// ([`with_sink_logit`](Self::with_sink_logit)), a sliding window
/// ([`with_window`](Self::with_window)). Keys and values may be kept in fewer bits
/// ([`with_state_format`](Self::with_state_format)).
///
/// ```
/// use dijiang::{Attention, Mask, SoftmaxAttention};
/// use ndarray::array;
///
/// let kernel = SoftmaxAttention::<f64>::new(2)?.with_scale(1.0);
/// let q = array![[1000.0, 0.0]];
/// let k = array![[1.0, 0.0], [0.0, 1.0]];
/// let v = array![[1.0], [2.0]];
/// let out = kernel.forward(q.view(), k.view(), v.view(), Mask::Full)?;
/// assert_eq!(out, array![[1.0]]); // e^1000 does not overflow
///     
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(bound = ""))]
pub struct SoftmaxAttention<T> {
    pub(super) head_dim: usize,
    scale: Option<f64>,
    #[cfg_attr(feature = "serde", serde(default))]
    soft_cap: Option<f64>,
    /// None, one, or one for each query head of a group; so are the slopes.
    #[cfg_attr(feature = "serde", serde(default))]
    sink_logits: Vec<f64>,
    #[cfg_attr(feature = "serde", serde(default))]
    slopes: Vec<f64>,
    #[cfg_attr(feature = "serde", serde(default))]
    pub(super) window: Option<usize>,
    #[cfg_attr(feature = "serde", serde(default))]
    pub(super) format: StateFormat,
    #[cfg_attr(feature = "serde", serde(skip))]
    number: PhantomData<T>,
}

impl<T: Scalar> SoftmaxAttention<T> {
    /// Softmax attention over queries and keys of `head_dim` columns.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `head_dim` is 0.
    pub fn new(head_dim: usize) -> Result<Self, Error> {
        check::at_least_one("head_dim", head_dim)?;
        Ok(Self {
            head_dim,
            scale: None,
            soft_cap: None,
            sink_logits: Vec::new(),
            slopes: Vec::new(),
            window: None,
            format: StateFormat::default(),
            number: PhantomData,
        })
    }

    /// Sets the factor of the scores, `1/√head_dim` unless set. One that is not positive and finite
    /// is reported by the first call that would use it.
    #[must_use]
    pub fn with_scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Caps the scores softly, as Gemma 2 does (arXiv 2408.00118, section 2):
    ///
    /// ```text
    /// s = scale·q·k   becomes   cap·tanh(s/cap)
    /// ```
    ///
    /// ```
    /// use dijiang::{Attention, Mask, SoftmaxAttention};
    /// use ndarray::array;
    ///
    /// let kernel = SoftmaxAttention::<f64>::new(1)?.with_soft_cap(2.0)?;
    /// let (q, k, v) = (array![[1e6]], array![[1.0], [-1.0]], array![[1.0], [0.0]]);
    /// let out = kernel.forward(q.view(), k.view(), v.view(), Mask::Full)?;
    /// // scores of a million are capped at 2, and e²/(e² + e⁻²) is left
    /// assert!((out[[0, 0]] - 1.0 / (1.0 + (-4f64).exp())).abs() < 1e-15);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if `cap` is not positive and finite in `T`, or 2/`cap` is not.
    pub fn with_soft_cap(mut self, cap: f64) -> Result<Self, Error> {
        SoftCap::<T>::new(cap)?;
        self.soft_cap = Some(cap);
        Ok(self)
    }

    /// Adds a learned sink: a logit that takes part in the normaliser and has no value, as GPT-OSS
    /// has it in each head (arXiv 2508.10925; Xiao et al., arXiv 2309.17453, section 3.3).
    ///
    /// ```text
    /// o_t = Σ_j e^{s_tj} v_j / (e^logit + Σ_j e^{s_tj})
    /// ```
    ///
    /// The logit is in units of scores, and neither scaled nor capped. **Outputs are no weighted
    /// means any more**: all-ones values give less than ones, and outputs lie in the hull of the
    /// values and 0.
    ///
    /// ```
    /// use dijiang::{Attention, Mask, SoftmaxAttention};
    /// use ndarray::array;
    ///
    /// let kernel = SoftmaxAttention::<f64>::new(1)?.with_sink_logit(2f64.ln())?;
    /// let (x, v) = (array![[0.0], [0.0]], array![[1.0], [1.0]]);
    /// let out = kernel.forward(x.view(), x.view(), v.view(), Mask::Causal)?;
    /// assert!((out - array![[1.0 / 3.0], [0.5]]).iter().all(|e| e.abs() < 1e-15));
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if the logit is not finite in `T`.
    pub fn with_sink_logit(self, logit: f64) -> Result<Self, Error> {
        self.with_sink_logits(vec![logit])
    }

    /// As [`with_sink_logit`](Self::with_sink_logit), with one logit for each query head of a
    /// group that shares its keys and values: in a layer with grouped-query heads, a kernel for
    /// each kv head ([`MultiHead::per_kv_head`](crate::MultiHead::per_kv_head)).
    ///
    /// Calls must then be of as many query heads, or they report [`Error::Shape`]. The logits, one
    /// or several, are the [parameter](crate::Attention::parameters) `sink_logits`.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if there are none, [`Error::InvalidOption`] if one is not finite in `T`.
    pub fn with_sink_logits(mut self, logits: Vec<f64>) -> Result<Self, Error> {
        check::sink_logits::<T>(&logits)?;
        self.sink_logits = logits;
        Ok(self)
    }

    /// Adds linear biases (ALiBi, Press et al., arXiv 2108.12409, section 3), after the cap if
    /// there is one:
    ///
    /// ```text
    /// s_tj = scale·q_t·k_j − slope·(t − j)
    /// ```
    ///
    /// The slopes of published models are [`alibi_slopes`](crate::alibi_slopes). Distances are
    /// exact up to 2²⁴ tokens in `f32`. With [`Mask::Full`] every query is at the position of the
    /// last key, and any later one would give the same: the bias is not that of |t − j|. With
    /// [`Mask::CausalTail`] `t` counts from the first key.
    ///
    /// ```
    /// use dijiang::{Attention, Mask, SoftmaxAttention};
    /// use ndarray::array;
    ///
    /// let kernel = SoftmaxAttention::<f64>::new(1)?.with_alibi_slope(3f64.ln())?;
    /// let (x, v) = (array![[0.0], [0.0]], array![[0.0], [1.0]]);
    /// let out = kernel.forward(x.view(), x.view(), v.view(), Mask::Causal)?;
    /// assert!((out[[1, 0]] - 0.75).abs() < 1e-15); // weights of 1/3 and 1
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if the slope is negative, or 2⁴¹ times it is not finite in `T`.
    pub fn with_alibi_slope(self, slope: f64) -> Result<Self, Error> {
        self.with_alibi_slopes(vec![slope])
    }

    /// As [`with_alibi_slope`](Self::with_alibi_slope), with one slope for each query head of a
    /// group, as [`with_sink_logits`](Self::with_sink_logits).
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if there are none, [`Error::InvalidOption`] as
    /// [`with_alibi_slope`](Self::with_alibi_slope).
    pub fn with_alibi_slopes(mut self, slopes: Vec<f64>) -> Result<Self, Error> {
        check_slopes::<T>(&slopes)?;
        self.slopes = slopes;
        Ok(self)
    }

    /// Keeps keys and values in this format, [`StateFormat::F32`] unless set: those of the cache of
    /// a stream, and, so that both give the same, those of a whole sequence.
    ///
    /// ```text
    /// o_t = Σ_j e^{scale·q_t·r(k_j)} r(v_j) / Σ_j e^{scale·q_t·r(k_j)}
    /// ```
    ///
    /// with r the rounding of a row to the format.
    ///
    /// ```
    /// use dijiang::{Attention, Mask, SoftmaxAttention, StateFormat};
    /// use ndarray::array;
    ///
    /// let kernel = SoftmaxAttention::<f64>::new(1)?.with_state_format(StateFormat::Q8);
    /// let (x, v) = (array![[1.0]], array![[254.0, 1.4]]);
    /// let out = kernel.forward(x.view(), x.view(), v.view(), Mask::Causal)?;
    /// assert_eq!(out, array![[254.0, 2.0]]); // in steps of 254/127
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    #[must_use]
    pub fn with_state_format(mut self, format: StateFormat) -> Self {
        self.format = format;
        self
    }

    /// Columns of queries and keys.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// What tells these options from others, but for the scale.
    pub(super) fn fingerprint(&self) -> Fingerprint {
        let own = Fingerprint::new()
            .with("soft cap", self.soft_cap)
            .with("sink logits", self.sink_logits.iter().copied())
            .with("slopes", self.slopes.iter().copied());
        match self.format.mark() {
            Some(mark) => own.with("state format", [mark]),
            None => own,
        }
    }

    /// The learned sink, if there is one: the same for all query heads.
    pub(crate) fn sink_logit(&self) -> Option<f64> {
        self.sink_logits.first().copied()
    }

    pub(super) fn has_slopes(&self) -> bool {
        !self.slopes.is_empty()
    }

    /// A hybrid with the same scores and sinks.
    pub(super) fn with_options(&self, mut builder: HybridBuilder<T>) -> HybridBuilder<T> {
        if let Some(scale) = self.scale {
            builder = builder.scale(scale);
        }
        if let Some(cap) = self.soft_cap {
            builder = builder.soft_cap(cap);
        }
        if !self.sink_logits.is_empty() {
            builder = builder.sink_logits(self.sink_logits.clone());
        }
        builder
    }

    /// Whether the query heads of a group differ.
    pub(super) fn differs_by_head(&self) -> bool {
        self.sink_logits.len().max(self.slopes.len()) > 1
    }

    /// What all query heads of a group of `group` have in common, if the options can be used.
    pub(super) fn check(&self, group: usize) -> Result<Scoring<T>, Error> {
        // a saved kernel may have been changed, or be of another number type
        check::at_least_one("head_dim", self.head_dim)?;
        let scale = check::scale::<T>(self.scale, self.head_dim)?;
        let soft_cap = self.soft_cap.map(SoftCap::new).transpose()?;
        if !self.sink_logits.is_empty() {
            check::sink_logits::<T>(&self.sink_logits)?;
        }
        if !self.slopes.is_empty() {
            check_slopes::<T>(&self.slopes)?;
        }
        check::query_heads(&self.sink_logits, group)?;
        check::query_heads(&self.slopes, group)?;
        Ok(Scoring { soft_cap, ..Scoring::new(T::from_f64(scale)) })
    }

    /// What a query head computes, and its learned sink.
    pub(super) fn of_head(&self, common: Scoring<T>, g: usize) -> (Scoring<T>, Option<T>) {
        let slope = of_query_head(&self.slopes, g).map(|slope| T::from_f64(slope * LOG2_E));
        (Scoring { slope, ..common }, of_query_head(&self.sink_logits, g).map(T::from_f64))
    }

    /// What can be trained: the logits of learned sinks.
    pub(super) fn numbers(&self) -> Parameters<T> {
        if self.sink_logits.is_empty() {
            return Parameters::new();
        }
        let logits = self.sink_logits.iter().map(|&logit| T::from_f64(logit)).collect();
        Parameters::new().with(SINK_LOGITS, Array1::from_vec(logits).into_dyn())
    }

    /// The same with other numbers.
    pub(super) fn with_numbers(&self, parameters: &Parameters<T>) -> Result<Self, Error> {
        self.numbers().check_names(parameters)?;
        match parameters.get(SINK_LOGITS) {
            Some(logits) => {
                self.clone().with_sink_logits(logits.iter().map(|logit| logit.as_f64()).collect())
            }
            None => Ok(self.clone()),
        }
    }

    /// The score of a query and a key from their product, at positions `t` and `j`; −∞ where the
    /// window of `t` has gone on.
    #[allow(clippy::cast_precision_loss)] // positions
    pub(super) fn score(&self, product: f64, [t, j]: [usize; 2]) -> f64 {
        if self.window.is_some_and(|window| j.saturating_add(window) <= t) {
            return f64::NEG_INFINITY;
        }
        let score = product * self.scale.unwrap_or_else(|| check::default_scale(self.head_dim));
        let score = self.soft_cap.map_or(score, |cap| cap * libm::tanh(score / cap));
        self.slopes.first().map_or(score, |slope| score + slope * (j as f64 - t as f64))
    }

    /// What is added to the scores of query `t` of [`score`](Self::score) where all `keys` are
    /// seen, since it then is at the position of the last one.
    #[allow(clippy::cast_precision_loss)] // positions
    pub(crate) fn shift(&self, mask: Mask, [t, keys]: [usize; 2]) -> f64 {
        let last = keys.saturating_sub(1) as f64;
        match self.slopes.first() {
            Some(slope) if mask == Mask::Full => slope * (t as f64 - last),
            _ => 0.0,
        }
    }
}

/// The name of the logits of learned sinks among the parameters.
pub(super) const SINK_LOGITS: &str = "sink_logits";

/// 2⁴¹: the longest distance, times log₂e and more.
const MOST_TOKENS: f64 = 2_199_023_255_552.0;

fn check_slopes<T: Scalar>(slopes: &[f64]) -> Result<(), Error> {
    check::at_least_one("slopes", slopes.len())?;
    // no product with a distance may leave the range
    let usable = |slope: f64| slope >= 0.0 && T::from_f64(slope * MOST_TOKENS).is_finite();
    match slopes.iter().find(|slope| !usable(**slope)) {
        Some(bad) => Err(Error::InvalidOption {
            which: "slope",
            found: bad.to_string(),
            needed: "a number from 0 to 2^-41 times the largest of the type",
        }),
        None => Ok(()),
    }
}
