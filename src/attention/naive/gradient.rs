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
    let distances = alibi(Array2::zeros((q.nrows(), k.nrows())), slope, mask);
    biased_gradient([q, k, v], d_o, scale, options, &distances, mask).0
}

/// The same with biases of any kind, `b [n_q, n_k]`, in the place of linear ones, and the gradient
/// by them, `d_b_tj = d_s_tj`:
///
/// ```text
/// s_tj = cap·tanh(u_tj/cap) + b_tj,    d_b_tj = P_tj (d_o_t·v_j − D_t)
/// ```
///
/// A bias of −∞ hides the key, and its gradient is 0.
///
/// ```
/// use dijiang::Mask;
/// use dijiang::attention::naive::gradient::biased_gradient;
/// use dijiang::attention::naive::options::Options;
/// use ndarray::array;
///
/// let (q, k, v) = (array![[0.0]], array![[1.0], [2.0], [9.0]], array![[3.0], [5.0], [9.0]]);
/// let (b, none) = (array![[0.0, 0.0, f64::NEG_INFINITY]], Options::default());
/// let (d, d_b) = biased_gradient([&q, &k, &v], &array![[1.0]], 1.0, none, &b, Mask::Full);
/// assert_eq!(d.v, array![[0.5], [0.5], [0.0]]);
/// assert_eq!(d_b, array![[-0.5, 0.5, 0.0]]);
/// ```
#[must_use]
pub fn biased_gradient(
    [q, k, v]: [&Array2<f64>; 3],
    d_o: &Array2<f64>,
    scale: f64,
    options: Options,
    bias: &Array2<f64>,
    mask: Mask,
) -> (SoftmaxGradient, Array2<f64>) {
    let products = q.dot(&k.t()) * scale;
    let scores = products.mapv(|u| soft_capped(u, options.soft_cap)) + bias;
    let mut d_bias = Array2::zeros(bias.dim());
    let mut d = SoftmaxGradient {
        q: Array2::zeros(q.dim()),
        k: Array2::zeros(k.dim()),
        v: Array2::zeros(v.dim()),
        sink_logit: 0.0,
    };
    for t in 0..q.nrows() {
        let seen = visible(mask, t, [q.nrows(), k.nrows()]);
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
            d_bias[[t, j]] = d_score;
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
    (d, d_bias)
}

/// Some tokens as one, with fixed shares: read with the weight `count·e^{scale·q·key}`, where
/// `key = Σ_j share_j k_j` and `value = Σ_j share_j v_j`.
#[derive(Clone, Debug, PartialEq)]
pub struct Mean {
    /// Positions and what the tokens there have of the mean.
    pub shares: Vec<(usize, f64)>,
    /// How many tokens it stands for.
    pub count: f64,
}

impl Mean {
    /// The token at a position.
    #[must_use]
    pub fn token(position: usize) -> Self {
        Self { shares: vec![(position, 1.0)], count: 1.0 }
    }

    /// The mean of two, with the share of the second.
    ///
    /// ```
    /// use dijiang::attention::naive::gradient::Mean;
    ///
    /// let both = Mean::token(0).merge(&Mean::token(4), 0.25);
    /// assert_eq!((both.shares, both.count), (vec![(0, 0.75), (4, 0.25)], 2.0));
    /// ```
    #[must_use]
    pub fn merge(&self, other: &Self, share: f64) -> Self {
        let of = |x: &Self, part: f64| x.shares.iter().map(|&(j, c)| (j, c * part)).collect();
        let parts: [Vec<_>; 2] = [of(self, 1.0 - share), of(other, share)];
        Self { shares: parts.concat(), count: self.count + other.count }
    }

    fn of(&self, x: &Array2<f64>) -> Array1<f64> {
        let mut mean = Array1::zeros(x.ncols());
        self.shares.iter().for_each(|&(j, share)| mean.scaled_add(share, &x.row(j)));
        mean
    }

    fn hand_on(&self, d: &Array1<f64>, d_x: &mut Array2<f64>) {
        self.shares.iter().for_each(|&(j, share)| d_x.row_mut(j).scaled_add(share, d));
    }
}

/// Softmax attention where each query sees means of tokens, `seen[t]`: the outputs, and the
/// gradient from the gradient `d_o [n_q, d_v]` of the loss by them. It is that of
/// [`softmax_gradient`] with logits `cap·tanh(scale·q·key_i/cap) + ln count_i`, and what goes to a
/// mean goes to its tokens by their shares:
///
/// ```text
/// d_k_j = Σ_i share_ij d_key_i,    d_v_j = Σ_i share_ij d_value_i
/// ```
///
/// This is the gradient of a hybrid with merged entries where what it decides is a constant.
///
/// ```
/// use dijiang::attention::naive::gradient::{Mean, means_gradient};
/// use dijiang::attention::naive::options::Options;
/// use ndarray::array;
///
/// let (q, x, d_o) = (array![[0.0]], array![[1.0], [3.0], [8.0]], array![[1.0]]);
/// let seen = [vec![Mean::token(0).merge(&Mean::token(1), 0.5), Mean::token(2)]];
/// let (out, d) = means_gradient([&q, &x, &x], &d_o, 1.0, Options::default(), &seen);
/// assert!((out[[0, 0]] - 4.0).abs() < 1e-15); // (2·2 + 8)/3
/// assert!((d.v - array![[1.0], [1.0], [1.0]] / 3.0).iter().all(|e| e.abs() < 1e-15));
/// ```
#[must_use]
pub fn means_gradient(
    [q, k, v]: [&Array2<f64>; 3],
    d_o: &Array2<f64>,
    scale: f64,
    options: Options,
    seen: &[Vec<Mean>],
) -> (Array2<f64>, SoftmaxGradient) {
    let mut out = Array2::zeros((q.nrows(), v.ncols()));
    let [q_zero, k_zero, v_zero] = [q, k, v].map(|x| Array2::zeros(x.dim()));
    let mut d = SoftmaxGradient { q: q_zero, k: k_zero, v: v_zero, sink_logit: 0.0 };
    for (t, seen) in seen.iter().enumerate() {
        let keys: Vec<Array1<f64>> = seen.iter().map(|mean| mean.of(k)).collect();
        let values: Vec<Array1<f64>> = seen.iter().map(|mean| mean.of(v)).collect();
        let products: Vec<f64> = keys.iter().map(|key| scale * q.row(t).dot(key)).collect();
        let logit = |(u, mean): (&f64, &Mean)| soft_capped(*u, options.soft_cap) + mean.count.ln();
        let logits: Vec<f64> = products.iter().zip(seen).map(logit).collect();
        let sink = options.sink_logit.unwrap_or(f64::NEG_INFINITY);
        let largest = logits.iter().copied().fold(sink, f64::max);
        let sum: f64 = logits.iter().chain([&sink]).map(|l| (l - largest).exp()).sum();
        let weights: Vec<f64> = logits.iter().map(|l| (l - largest).exp() / sum).collect();
        for (weight, value) in weights.iter().zip(&values) {
            out.row_mut(t).scaled_add(*weight, value);
        }
        let mean_product = d_o.row(t).dot(&out.row(t));
        d.sink_logit -= (sink - largest).exp() / sum * mean_product;
        for (i, mean) in seen.iter().enumerate() {
            mean.hand_on(&(&d_o.row(t) * weights[i]), &mut d.v);
            let d_logit = weights[i] * (d_o.row(t).dot(&values[i]) - mean_product);
            let slope_of_cap = match options.soft_cap {
                Some(cap) => (products[i] / cap).cosh().powi(-2), // 1 − tanh²
                None => 1.0,
            };
            let d_product = scale * d_logit * slope_of_cap;
            d.q.row_mut(t).scaled_add(d_product, &keys[i]);
            mean.hand_on(&(&q.row(t) * d_product), &mut d.k);
        }
    }
    (out, d)
}
