//! Every kernel as its formula reads: `f64`, plain loops, pair by pair, one function for each.
//!
//! This is where a formula is looked up, and what the fast kernels are tested against. Nothing here
//! is shared with them, nothing is fast, and nothing is optional: what a kernel takes from a
//! constructor (a scale, a projection, a window) is an argument here. Formulas of your own kernel
//! can be checked against these in the same way.
//!
//! | module | what it has |
//! |---|---|
//! | this page | softmax attention, Linformer, attention of any weights |
//! | [`features`] | feature maps φ |
//! | [`linear`] | linear attention of features, with decay and gates |
//! | [`positional`] | rotary embedding, retention, cosFormer |
//! | [`hybrid`] | a window, sinks and heavy keys, with nothing or features behind |
//! | [`merged`] | the same with merged entries behind (Ward's method) |
//! | [`received`] | merged entries that are weighted by the attention received |
//! | [`options`] | soft caps, linear biases, learned sinks |
//! | [`formats`] | states in fewer bits |
//! | [`gradient`] | what a loss by outputs hands back to arguments |
//! | [`block`] | the attention block of the released DiJiang models |
//!
//! # Notation
//!
//! Tokens are rows: queries `q [n_q, d]`, keys `k [n_k, d]`, values `v [n_k, d_v]`, outputs
//! `o [n_q, d_v]`. `t` counts queries and `j` keys, both from 0. Query `t` sees all keys with
//! [`Mask::Full`], the keys `j ≤ t` with [`Mask::Causal`], and `j ≤ n_k − n_q + t` with
//! [`Mask::CausalTail`]: [`visible`] many. `scale` multiplies the product `q·k` of raw vectors and
//! is `1/√d` in most models; a vector with a hat is scaled, `x̂ = √scale·x`, so that
//! `q̂·k̂ = scale·q·k`. Weights may leave the range of `f64`; they are kept as logarithms, relative
//! to the largest, wherever they are divided by their sum.
//!
//! # Panics
//!
//! All functions panic where shapes do not fit together, as an index out of bounds does.
#![allow(clippy::cast_precision_loss)] // positions, ages and counts are far below 2^53

pub mod block;
pub mod features;
pub mod formats;
pub mod gradient;
pub mod hybrid;
pub mod linear;
pub mod merged;
pub mod options;
pub mod positional;
pub mod received;

use crate::mask::Mask;
use ndarray::{Array1, Array2, Axis};

/// How many keys query `t` sees, of `[n_q, n_k]` queries and keys: the first `t + 1` with
/// [`Mask::Causal`], the first `n_k − n_q + t + 1` with [`Mask::CausalTail`], else all.
///
/// ```
/// use dijiang::{Mask, attention::naive};
///
/// assert_eq!(naive::visible(Mask::Causal, 2, [10, 10]), 3);
/// assert_eq!(naive::visible(Mask::CausalTail, 2, [4, 10]), 9);
/// assert_eq!(naive::visible(Mask::Full, 2, [4, 10]), 10);
/// ```
#[must_use]
pub fn visible(mask: Mask, t: usize, [queries, keys]: [usize; 2]) -> usize {
    match mask {
        Mask::Full => keys,
        Mask::Causal => t + 1,
        Mask::CausalTail => keys - queries + t + 1,
    }
}

/// Weights from their logarithms, and the logarithms of their sums:
///
/// ```text
/// A_tj = e^{l_tj} / Σ_i e^{l_ti},    L_t = ln Σ_j e^{l_tj}
/// ```
///
/// over the keys that `t` sees; the weights of others are 0. `l [n_q, n_k]` gives `A [n_q, n_k]`
/// and `L [n_q]`. Any size of `l` is in range: the largest of a row is taken out first (Milakov and
/// Gimelshein, arXiv 1805.02867, algorithm 2).
///
/// ```
/// use dijiang::{Mask, attention::naive};
/// use ndarray::array;
///
/// let logs = array![[1000.0, 1000.0 + 3_f64.ln()]];
/// let (weights, log_normalizer) = naive::normalize(&logs, Mask::Full);
/// assert!((weights - array![[0.25, 0.75]]).iter().all(|e| e.abs() < 1e-12));
/// assert!((log_normalizer[0] - 1000.0 - 4_f64.ln()).abs() < 1e-12);
/// ```
#[must_use]
pub fn normalize(log_weights: &Array2<f64>, mask: Mask) -> (Array2<f64>, Array1<f64>) {
    let mut weights = Array2::zeros(log_weights.dim());
    let mut log_normalizer = Array1::zeros(log_weights.nrows());
    for t in 0..log_weights.nrows() {
        let seen = visible(mask, t, log_weights.dim().into());
        let logs: Vec<f64> = (0..seen).map(|j| log_weights[[t, j]]).collect();
        let largest = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = logs.iter().map(|l| (l - largest).exp()).sum();
        for (j, l) in logs.iter().enumerate() {
            weights[[t, j]] = (l - largest).exp() / total;
        }
        log_normalizer[t] = largest + total.ln();
    }
    (weights, log_normalizer)
}

/// Attention of any positive weights, given by their logarithms `l [n_q, n_k]`:
///
/// ```text
/// o_t = Σ_j e^{l_tj} v_j / Σ_j e^{l_tj}
/// ```
///
/// over the keys that `t` sees. A weight of zero is `l = −∞`.
///
/// ```
/// use dijiang::{Mask, attention::naive};
/// use ndarray::array;
///
/// let logs = array![[0.0, 3_f64.ln(), f64::NEG_INFINITY]];
/// let out = naive::from_log_weights(&logs, &array![[1.0], [5.0], [7.0]], Mask::Full);
/// assert!((out[[0, 0]] - 4.0).abs() < 1e-15);
/// ```
#[must_use]
pub fn from_log_weights(log_weights: &Array2<f64>, v: &Array2<f64>, mask: Mask) -> Array2<f64> {
    normalize(log_weights, mask).0.dot(v)
}

/// `scale·q_t·k_j` of all pairs, `[n_q, n_k]`: the logarithms of softmax attention's weights.
///
/// ```
/// use dijiang::attention::naive;
/// use ndarray::array;
///
/// let scores = naive::scores(&array![[1.0, 2.0]], &array![[3.0, 1.0], [0.0, 1.0]], 0.5);
/// assert_eq!(scores, array![[2.5, 1.0]]);
/// ```
#[must_use]
pub fn scores(q: &Array2<f64>, k: &Array2<f64>, scale: f64) -> Array2<f64> {
    Array2::from_shape_fn((q.nrows(), k.nrows()), |(t, j)| scale * q.row(t).dot(&k.row(j)))
}

/// The attention matrix of softmax attention and the logarithms of its normalisers:
///
/// ```text
/// A_tj = e^{scale·q_t·k_j} / Σ_i e^{scale·q_t·k_i},    L_t = ln Σ_j e^{scale·q_t·k_j}
/// ```
///
/// `A [n_q, n_k]`, `L [n_q]` (Vaswani et al., arXiv 1706.03762, equation 1, without V).
///
/// ```
/// use dijiang::{Mask, attention::naive};
/// use ndarray::array;
///
/// let x = array![[0.0], [1.0]];
/// let (weights, log_normalizer) = naive::attention_matrix(&x, &x, 1.0, Mask::Causal);
/// let e = 1_f64.exp();
/// assert_eq!(weights.row(0).to_vec(), [1.0, 0.0]);
/// assert!((weights[[1, 1]] - e / (1.0 + e)).abs() < 1e-15);
/// assert!((log_normalizer[1] - (1.0 + e).ln()).abs() < 1e-15);
/// ```
#[must_use]
pub fn attention_matrix(
    q: &Array2<f64>,
    k: &Array2<f64>,
    scale: f64,
    mask: Mask,
) -> (Array2<f64>, Array1<f64>) {
    normalize(&scores(q, k, scale), mask)
}

/// Softmax attention, full, causal or across sequences (Vaswani et al., arXiv 1706.03762,
/// equation 1):
///
/// ```text
/// o_t = Σ_j e^{scale·q_t·k_j} v_j / Σ_j e^{scale·q_t·k_j}
/// ```
///
/// ```
/// use dijiang::{Mask, attention::naive};
/// use ndarray::array;
///
/// // equal scores: the mean of what is seen
/// let (x, v) = (array![[0.0], [0.0]], array![[1.0], [3.0]]);
/// assert_eq!(naive::softmax(&x, &x, &v, 1.0, Mask::Causal), array![[1.0], [2.0]]);
/// assert_eq!(naive::softmax(&x, &x, &v, 1.0, Mask::Full), array![[2.0], [2.0]]);
/// ```
#[must_use]
pub fn softmax(
    q: &Array2<f64>,
    k: &Array2<f64>,
    v: &Array2<f64>,
    scale: f64,
    mask: Mask,
) -> Array2<f64> {
    from_log_weights(&scores(q, k, scale), v, mask)
}

/// Linformer (Wang et al., arXiv 2006.04768, equation 7): softmax attention over projected keys and
/// values,
///
/// ```text
/// O = softmax(scale·Q (E K)ᵀ) (F V)
/// ```
///
/// with `E, F [rank, max_len]`, of which a sequence of `n ≤ max_len` keys uses the first `n`
/// columns, as if it were padded with zeros. There is no causal form.
///
/// ```
/// use dijiang::attention::naive;
/// use ndarray::array;
///
/// // one projected token, the mean of two; the third column meets no token
/// let mean = array![[0.5, 0.5, 9.0]];
/// let (q, k, v) = (array![[1.0]], array![[1.0], [3.0]], array![[2.0], [4.0]]);
/// assert_eq!(naive::linformer(&q, &k, &v, [&mean, &mean], 1.0), array![[3.0]]);
/// ```
#[must_use]
pub fn linformer(
    q: &Array2<f64>,
    k: &Array2<f64>,
    v: &Array2<f64>,
    [e, f]: [&Array2<f64>; 2],
    scale: f64,
) -> Array2<f64> {
    let project = |projection: &Array2<f64>, x: &Array2<f64>| {
        projection.slice_axis(Axis(1), (..x.nrows()).into()).dot(x)
    };
    softmax(q, &project(e, k), &project(f, v), scale, Mask::Full)
}

/// Attention of any weights, of either sign, divided by their sum:
///
/// ```text
/// o_t = Σ_j w_tj v_j / Σ_j w_tj
/// ```
///
/// over the keys that `t` sees, with `w_tj = weight(t, j)` as it stands: it must be in the range of
/// `f64`.
///
/// ```
/// use dijiang::{Mask, attention::naive};
/// use ndarray::array;
///
/// let v = array![[1.0], [5.0]];
/// let out = naive::weighted_means(2, &v, Mask::Causal, |_, j| [3.0, 1.0][j]);
/// assert_eq!(out, array![[1.0], [2.0]]);
/// ```
#[must_use]
pub fn weighted_means(
    queries: usize,
    v: &Array2<f64>,
    mask: Mask,
    weight: impl Fn(usize, usize) -> f64,
) -> Array2<f64> {
    let mut out = weighted_sums(queries, v, mask, &weight);
    for (t, mut row) in out.outer_iter_mut().enumerate() {
        row /= (0..visible(mask, t, [queries, v.nrows()])).map(|j| weight(t, j)).sum::<f64>();
    }
    out
}

/// Attention of any weights, not divided by anything:
///
/// ```text
/// o_t = Σ_j w_tj v_j
/// ```
///
/// over the keys that `t` sees, with `w_tj = weight(t, j)`.
///
/// ```
/// use dijiang::{Mask, attention::naive};
/// use ndarray::array;
///
/// let v = array![[1.0], [5.0]];
/// let out = naive::weighted_sums(2, &v, Mask::Causal, |_, j| [3.0, -1.0][j]);
/// assert_eq!(out, array![[3.0], [-2.0]]);
/// ```
#[must_use]
pub fn weighted_sums(
    queries: usize,
    v: &Array2<f64>,
    mask: Mask,
    weight: impl Fn(usize, usize) -> f64,
) -> Array2<f64> {
    let mut out = Array2::zeros((queries, v.ncols()));
    for (t, mut row) in out.outer_iter_mut().enumerate() {
        for j in 0..visible(mask, t, [queries, v.nrows()]) {
            row.scaled_add(weight(t, j), &v.row(j));
        }
    }
    out
}
