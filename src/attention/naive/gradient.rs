//! Gradients: what a loss by the outputs hands back to queries, keys, values and parameters.
//!
//! `d_x` is the gradient of the loss by `x`, an array of the shape of `x`.

use super::options::{Options, alibi, soft_capped};
use super::visible;
use crate::mask::Mask;
use ndarray::{Array1, Array2};

/// What [`softmax_gradient`] gives.
#[derive(Clone, Debug, PartialEq)]
pub struct SoftmaxGradient {
    /// By the queries, `[n_q, d]`.
    pub q: Array2<f64>,
    /// By the keys, `[n_k, d]`.
    pub k: Array2<f64>,
    /// By the values, `[n_k, d_v]`.
    pub v: Array2<f64>,
    /// By the logit of a learned sink; 0 if there is none.
    pub sink_logit: f64,
}

/// The gradient of softmax attention with a soft cap, linear biases and a learned sink, or none of
/// them, from the gradient `d_o [n_q, d_v]` of the loss by the outputs. With
///
/// ```text
/// u_tj = scale·q_t·k_j,    s_tj = cap·tanh(u_tj/cap) − slope·(t − j),
/// L_t = ln(e^sink + Σ_j e^{s_tj}),    P_tj = e^{s_tj − L_t},    o_t = Σ_j P_tj v_j
/// ```
///
/// over the keys that `t` sees, it is
///
/// ```text
/// d_v_j = Σ_t P_tj d_o_t,
/// D_t = d_o_t·o_t,    d_s_tj = P_tj (d_o_t·v_j − D_t),    d_u_tj = d_s_tj (1 − tanh²(u_tj/cap)),
/// d_q_t = scale·Σ_j d_u_tj k_j,    d_k_j = scale·Σ_t d_u_tj q_t,
/// d_sink = −Σ_t e^{sink − L_t} D_t
/// ```
///
/// (Dao et al., FlashAttention, arXiv 2205.14135, appendix B.2). Without a cap, `d_u = d_s`.
///
/// ```
/// use dijiang::Mask;
/// use dijiang::attention::naive::gradient::softmax_gradient;
/// use dijiang::attention::naive::options::Options;
/// use ndarray::array;
///
/// // the means of 3 and 5, and the covariance of keys and values
/// let (q, k, v) = (array![[0.0]], array![[1.0], [2.0]], array![[3.0], [5.0]]);
/// let none = Options::default();
/// let d = softmax_gradient([&q, &k, &v], &array![[1.0]], 1.0, none, 0.0, Mask::Full);
/// assert_eq!(d.v, array![[0.5], [0.5]]);
/// assert_eq!(d.q, array![[0.5]]);
/// ```
#[must_use]
pub fn softmax_gradient(
    [q, k, v]: [&Array2<f64>; 3],
    d_o: &Array2<f64>,
    scale: f64,
    options: Options,
    slope: f64,
    mask: Mask,
) -> SoftmaxGradient {
    let products = q.dot(&k.t()) * scale;
    let capped = products.mapv(|u| soft_capped(u, options.soft_cap));
    let scores = alibi(capped, slope, mask);
    let mut d = SoftmaxGradient {
        q: Array2::zeros(q.dim()),
        k: Array2::zeros(k.dim()),
        v: Array2::zeros(v.dim()),
        sink_logit: 0.0,
    };
    for t in 0..q.nrows() {
        let seen = visible(mask, t, k.nrows());
        let sink = options.sink_logit.unwrap_or(f64::NEG_INFINITY);
        let largest = (0..seen).map(|j| scores[[t, j]]).fold(sink, f64::max);
        let sum: f64 = (0..seen).map(|j| (scores[[t, j]] - largest).exp()).sum();
        let log_normalizer = largest + (sum + (sink - largest).exp()).ln();
        let weights: Vec<f64> =
            (0..seen).map(|j| (scores[[t, j]] - log_normalizer).exp()).collect();

        let mut o = Array1::<f64>::zeros(v.ncols());
        for (j, &weight) in weights.iter().enumerate() {
            o.scaled_add(weight, &v.row(j));
            d.v.row_mut(j).scaled_add(weight, &d_o.row(t));
        }
        let mean = d_o.row(t).dot(&o);
        for (j, &weight) in weights.iter().enumerate() {
            let d_score = weight * (d_o.row(t).dot(&v.row(j)) - mean);
            let slope_of_cap = match options.soft_cap {
                Some(cap) => (products[[t, j]] / cap).cosh().powi(-2), // 1 − tanh²
                None => 1.0,
            };
            let d_product = d_score * slope_of_cap;
            d.q.row_mut(t).scaled_add(scale * d_product, &k.row(j));
            d.k.row_mut(j).scaled_add(scale * d_product, &q.row(t));
        }
        d.sink_logit -= (sink - log_normalizer).exp() * mean;
    }
    d
}
