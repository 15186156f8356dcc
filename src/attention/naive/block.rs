//! The attention block of the released DiJiang models, token by token.

use super::features::official_dijiang;
use super::linear::decayed;
use super::positional::{halves, rotary_angles, rotate};
use ndarray::{Array1, Array2, Axis};

/// The weights of [`dijiang_block`], in the layouts of the released checkpoints, with
/// `d = hidden/heads`.
#[derive(Clone, Debug)]
pub struct Weights {
    /// `W_qkv [3·hidden, hidden]`: rows are outputs, of head 0 its `d` queries, `d` keys, `d`
    /// values, then of head 1.
    pub query_key_value: Array2<f64>,
    /// `b_qkv [3·hidden]`
    pub query_key_value_bias: Array1<f64>,
    /// `W_o [hidden, hidden]`: rows are outputs.
    pub dense: Array2<f64>,
    /// `b_o [hidden]`
    pub dense_bias: Array1<f64>,
    /// `W_G [hidden, hidden]`: *columns* are outputs.
    pub gate: Array2<f64>,
    /// `[hidden]`
    pub group_norm_weight: Array1<f64>,
    /// `[hidden]`
    pub group_norm_bias: Array1<f64>,
    /// The radii `t [d]` of the feature map.
    pub radii: Array1<f64>,
}

/// The decays of the released DiJiang code, one for each head (arXiv 2403.19928, its code):
///
/// ```text
/// γ_h = 1 − exp(linspace(ln 1/32, ln 1/512, heads)_h)
/// ```
///
/// ```
/// use dijiang::attention::naive::block;
///
/// let decays = block::decays(3);
/// assert!((decays[1] - (1.0 - 1.0 / 128.0)).abs() < 1e-15);
/// ```
#[must_use]
pub fn decays(heads: usize) -> Vec<f64> {
    let (first, last) = ((1.0_f64 / 32.0).ln(), (1.0_f64 / 512.0).ln());
    let step = if heads > 1 { (last - first) / (heads - 1) as f64 } else { 0.0 };
    (0..heads).map(|h| 1.0 - (first + step * h as f64).exp()).collect()
}

/// The attention block of the released DiJiang models (Chen et al., arXiv 2403.19928;
/// `GPTNeoXAttention` in the code at github.com/YuchuanTian/DiJiang), with the decay, gate and norm
/// of RetNet (Sun et al., arXiv 2307.08621, equation 8):
///
/// ```text
/// [q | k | v] of each head = x W_qkvᵀ + b_qkv
/// o_n = Σ_{j≤n} γ_h^{n−j} (φ(q_n)·φ(k_j)) v_j,    φ(x) = softmax(x C diag(t)),    γ from decays
/// y   = (swish(x W_G) ⊙ GroupNorm([o of head 0 | o of head 1 | …])) W_oᵀ + b_o
/// ```
///
/// with `swish(z) = z/(1 + e^{−z})` and the first `dims` columns of q and k turned by their
/// position before φ.
///
/// `x` and `y` are `[n, hidden]`; `epsilon` is that of the norm, 10⁻⁵ in the released code.
///
/// ```
/// use dijiang::attention::naive::block::{self, Weights};
/// use ndarray::{Array1, Array2, array};
///
/// // the norm of a single column is its bias, here 1, so what is left is the gate
/// let one = || Array2::ones((1, 1));
/// let weights = Weights {
///     query_key_value: Array2::ones((3, 1)),
///     query_key_value_bias: Array1::zeros(3),
///     dense: one(),
///     dense_bias: array![0.0],
///     gate: one(),
///     group_norm_weight: array![1.0],
///     group_norm_bias: array![1.0],
///     radii: array![1.0],
/// };
/// let y = block::dijiang_block(&array![[2.0]], &weights, 1, 0, 1e-5);
/// assert!((y[[0, 0]] - 2.0 / (1.0 + (-2_f64).exp())).abs() < 1e-15);
/// ```
#[must_use]
pub fn dijiang_block(
    x: &Array2<f64>,
    weights: &Weights,
    heads: usize,
    dims: usize,
    epsilon: f64,
) -> Array2<f64> {
    let hidden = x.ncols();
    let d = hidden / heads;
    let projected = x.dot(&weights.query_key_value.t()) + &weights.query_key_value_bias;
    let pairs = halves(&rotary_angles(dims, 10_000.0));
    let mut mixed = Array2::zeros(x.dim()); // heads, side by side
    for (h, gamma) in decays(heads).into_iter().enumerate() {
        let [q, k, v] = [0, 1, 2].map(|part| {
            let first = h * 3 * d + part * d;
            projected.slice_axis(Axis(1), (first..first + d).into()).to_owned()
        });
        let [phi_q, phi_k] =
            [q, k].map(|x| official_dijiang(&rotate(&x, 0, &pairs), &weights.radii).absolute());
        let mut own = mixed.slice_axis_mut(Axis(1), (h * d..(h + 1) * d).into());
        own.assign(&decayed(&phi_q, &phi_k, &v, gamma));
    }
    let normed = group_norm(&mixed, heads, epsilon);
    let normed = normed * &weights.group_norm_weight + &weights.group_norm_bias;
    let swish = x.dot(&weights.gate).mapv(|z| z / (1.0 + (-z).exp()));
    (swish * normed).dot(&weights.dense.t()) + &weights.dense_bias
}

/// The group norm of each row, of groups of `width` *neighbouring* columns, with the biased
/// variance (`torch.nn.GroupNorm(hidden/width, hidden)` of `[n, hidden]`, without weight and bias):
///
/// ```text
/// y_c = (x_c − mean)/√(variance + ε)
/// ```
///
/// ```
/// use dijiang::attention::naive::block;
/// use ndarray::array;
///
/// let y = block::group_norm(&array![[1.0, 3.0, 5.0, 5.0]], 2, 1e-30);
/// assert_eq!(y, array![[-1.0, 1.0, 0.0, 0.0]]);
/// ```
#[must_use]
pub fn group_norm(x: &Array2<f64>, width: usize, epsilon: f64) -> Array2<f64> {
    let mut out = x.clone();
    for mut row in out.outer_iter_mut() {
        for mut group in row.exact_chunks_mut(width) {
            let mean = group.sum() / width as f64;
            let variance = group.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
            group.mapv_inplace(|x| (x - mean) / (variance + epsilon).sqrt());
        }
    }
    out
}
