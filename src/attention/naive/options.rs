//! What models change of the softmax: scores that are capped softly, biases of any kind, a learned
//! sink, masks of keys, a sliding window.

use super::{normalize, visible};
use crate::mask::Mask;
use ndarray::{Array1, Array2, Axis, concatenate};

/// A cap and a sink, or neither.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// The cap of scores, in their units.
    pub soft_cap: Option<f64>,
    /// The logit of a learned sink.
    pub sink_logit: Option<f64>,
}

/// A score under a cap (Gemma 2, arXiv 2408.00118, section 2): `cap·tanh(score/cap)`. A score of −∞
/// is a key that is not seen, and stays.
///
/// ```
/// use dijiang::attention::naive::options::soft_capped;
///
/// assert_eq!(soft_capped(7.0, None), 7.0);
/// assert_eq!(soft_capped(1e9, Some(50.0)), 50.0);
/// assert!((soft_capped(1e-3, Some(50.0)) - 1e-3).abs() < 1e-12);
/// assert_eq!(soft_capped(f64::NEG_INFINITY, Some(50.0)), f64::NEG_INFINITY);
/// ```
#[must_use]
pub fn soft_capped(score: f64, cap: Option<f64>) -> f64 {
    match cap {
        Some(cap) if score > f64::NEG_INFINITY => cap * (score / cap).tanh(),
        _ => score,
    }
}

/// Attention of any positive weights, given by their logarithms `l [n_q, n_k]`, with a learned sink
/// (GPT-OSS, arXiv 2508.10925; Xiao et al., arXiv 2309.17453, section 3.3):
///
/// ```text
/// o_t = Σ_j e^{l_tj} v_j / (e^sink + Σ_j e^{l_tj})
/// ```
///
/// over the keys that `t` sees: as if there were one more key, whose value is 0. Without a sink it
/// is [`from_log_weights`](super::from_log_weights).
///
/// ```
/// use dijiang::{Mask, attention::naive::options};
/// use ndarray::array;
///
/// let (logs, v) = (array![[0.0, 0.0]], array![[3.0], [6.0]]);
/// let out = options::with_sink(&logs, &v, Some(0.0), Mask::Full);
/// assert!((out[[0, 0]] - 3.0).abs() < 1e-15);
/// ```
#[must_use]
pub fn with_sink(
    log_weights: &Array2<f64>,
    v: &Array2<f64>,
    sink_logit: Option<f64>,
    mask: Mask,
) -> Array2<f64> {
    let Some(logit) = sink_logit else { return normalize(log_weights, mask).0.dot(v) };
    let (mut seen, sizes) = (log_weights.clone(), log_weights.dim().into());
    for ((t, j), log_weight) in seen.indexed_iter_mut() {
        if j >= visible(mask, t, sizes) {
            *log_weight = f64::NEG_INFINITY;
        }
    }
    let sinks = Array2::from_elem((seen.nrows(), 1), logit);
    let values = concatenate![Axis(0), Array1::zeros(v.ncols()).insert_axis(Axis(0)), *v];
    normalize(&concatenate![Axis(1), sinks, seen], Mask::Full).0.dot(&values)
}

/// Scores with linear biases (ALiBi, Press et al., arXiv 2108.12409, section 3), in place:
///
/// ```text
/// l_tj = s_tj − slope·(t − j)
/// ```
///
/// With [`Mask::CausalTail`] query `t` stands at the last key it sees, and with [`Mask::Full`] all
/// queries stand at the last key.
///
/// ```
/// use dijiang::{Mask, attention::naive::options};
/// use ndarray::Array2;
///
/// let logs = options::alibi(Array2::zeros((2, 2)), 0.5, Mask::Causal);
/// assert_eq!((logs[[1, 0]], logs[[1, 1]]), (-0.5, 0.0));
/// assert_eq!(options::alibi(Array2::zeros((1, 3)), 0.5, Mask::Full)[[0, 0]], -1.0);
/// ```
#[must_use]
pub fn alibi(mut scores: Array2<f64>, slope: f64, mask: Mask) -> Array2<f64> {
    let sizes = scores.dim().into();
    for ((t, j), score) in scores.indexed_iter_mut() {
        let last_seen = visible(mask, t, sizes) as f64 - 1.0;
        *score -= slope * (last_seen - j as f64);
    }
    scores
}

/// Scores with biases, `l_tj = s_tj + b_tj`; a bias of −∞ hides the key.
///
/// ```
/// use dijiang::attention::naive::options;
/// use ndarray::array;
///
/// let logs = options::biased(array![[1.0, 2.0]], &array![[0.5, f64::NEG_INFINITY]]);
/// assert_eq!(logs, array![[1.5, f64::NEG_INFINITY]]);
/// ```
#[must_use]
pub fn biased(scores: Array2<f64>, bias: &Array2<f64>) -> Array2<f64> {
    scores + bias
}

/// Scores of the keys that may be seen, by a mask of keys; −∞ of the others.
///
/// ```
/// use dijiang::attention::naive::options;
/// use ndarray::array;
///
/// let logs = options::key_masked(array![[1.0, 2.0]], &array![true, false]);
/// assert_eq!(logs, array![[1.0, f64::NEG_INFINITY]]);
/// ```
#[must_use]
pub fn key_masked(mut scores: Array2<f64>, key_mask: &Array1<bool>) -> Array2<f64> {
    for ((_, j), score) in scores.indexed_iter_mut() {
        if !key_mask[j] {
            *score = f64::NEG_INFINITY;
        }
    }
    scores
}

/// Scores within a sliding window (Mistral 7B, Jiang et al., arXiv 2310.06825, section 2): of the
/// keys that the mask shows to query `t` only the last `window`; −∞ of the others.
///
/// ```
/// use dijiang::{Mask, attention::naive::options};
/// use ndarray::{Array2, array};
///
/// let logs = options::windowed(Array2::zeros((2, 2)), 1, Mask::Causal);
/// assert_eq!(logs, array![[0.0, 0.0], [f64::NEG_INFINITY, 0.0]]);
/// ```
#[must_use]
pub fn windowed(mut scores: Array2<f64>, window: usize, mask: Mask) -> Array2<f64> {
    let sizes = scores.dim().into();
    for ((t, j), score) in scores.indexed_iter_mut() {
        if j + window < visible(mask, t, sizes) {
            *score = f64::NEG_INFINITY;
        }
    }
    scores
}
