//! Kernels that know positions: rotary embedding, retention, cosFormer.
//!
//! Positions count from 0.

use super::{weighted_means, weighted_sums};
use crate::mask::Mask;
use core::f64::consts::PI;
use ndarray::Array2;

/// Two columns that turn together, and their angle θ for each position.
pub type Pair = ([usize; 2], f64);

/// The angles of rotary embedding over `dims` columns: `θ_i = base^(−2i/dims)`, `i < dims/2`.
///
/// ```
/// use dijiang::attention::naive::positional;
///
/// assert_eq!(positional::rotary_angles(4, 10_000.0), [1.0, 0.01]);
/// ```
#[must_use]
pub fn rotary_angles(dims: usize, base: f64) -> Vec<f64> {
    (0..dims / 2).map(|i| base.powf(-2.0 * i as f64 / dims as f64)).collect()
}

/// The angles of the released code of RetNet over `d` columns: `θ_i = 10000^(−i/(d/2 − 1))`,
/// `i < d/2`.
///
/// ```
/// use dijiang::attention::naive::positional;
///
/// let angles = positional::retention_angles(4);
/// assert!((angles[0] - 1.0).abs() < 1e-15 && (angles[1] - 1e-4).abs() < 1e-18);
/// ```
#[must_use]
pub fn retention_angles(d: usize) -> Vec<f64> {
    let last = (d / 2).max(2) - 1;
    (0..d / 2).map(|i| 10_000_f64.powf(-(i as f64) / last as f64)).collect()
}

/// Columns `(i, i + h)` for the `h` angles: GPT-NeoX, and the LLaMA of Hugging Face.
///
/// ```
/// use dijiang::attention::naive::positional;
///
/// assert_eq!(positional::halves(&[1.0, 0.1]), [([0, 2], 1.0), ([1, 3], 0.1)]);
/// ```
#[must_use]
pub fn halves(angles: &[f64]) -> Vec<Pair> {
    let half = angles.len();
    angles.iter().enumerate().map(|(i, &theta)| ([i, i + half], theta)).collect()
}

/// Columns `(2i, 2i + 1)`: the paper, Meta's LLaMA, GGUF files, GPT-J, RetNet.
///
/// ```
/// use dijiang::attention::naive::positional;
///
/// assert_eq!(positional::interleaved(&[1.0, 0.1]), [([0, 1], 1.0), ([2, 3], 0.1)]);
/// ```
#[must_use]
pub fn interleaved(angles: &[f64]) -> Vec<Pair> {
    angles.iter().enumerate().map(|(i, &theta)| ([2 * i, 2 * i + 1], theta)).collect()
}

/// Rotary position embedding of queries or keys (Su et al., arXiv 2104.09864, section 3.2.2): row
/// `t` is at position `p = first + t`, and each pair `(a, b)` of its columns turns by `p·θ`,
///
/// ```text
/// a' = a·cos(pθ) − b·sin(pθ),    b' = a·sin(pθ) + b·cos(pθ)
/// ```
///
/// Columns of no pair stay. A kernel with rotary embedding is the kernel of rotated queries and
/// keys.
///
/// ```
/// use dijiang::attention::naive::positional;
/// use ndarray::array;
///
/// let quarter = [([0, 1], std::f64::consts::FRAC_PI_2)];
/// let x = positional::rotate(&array![[1.0, 0.0, 5.0], [1.0, 0.0, 5.0]], 0, &quarter);
/// assert!((x - array![[1.0, 0.0, 5.0], [0.0, 1.0, 5.0]]).iter().all(|e| e.abs() < 1e-15));
/// ```
#[must_use]
pub fn rotate(x: &Array2<f64>, first: usize, pairs: &[Pair]) -> Array2<f64> {
    let mut rotated = x.clone();
    for t in 0..x.nrows() {
        for &([a, b], theta) in pairs {
            let (sin, cos) = ((first + t) as f64 * theta).sin_cos();
            rotated[[t, a]] = x[[t, a]] * cos - x[[t, b]] * sin;
            rotated[[t, b]] = x[[t, a]] * sin + x[[t, b]] * cos;
        }
    }
    rotated
}

/// What xPos keeps of each of `pairs` pairs over 512 positions (Sun et al., arXiv 2212.10554, with
/// its γ = 0.4): `ζ_i = (i/pairs + 0.4)/1.4`.
///
/// ```
/// use dijiang::attention::naive::positional;
///
/// let zeta = positional::xpos(2);
/// assert!((zeta[0] - 2.0 / 7.0).abs() < 1e-15 && (zeta[1] - 9.0 / 14.0).abs() < 1e-15);
/// ```
#[must_use]
pub fn xpos(pairs: usize) -> Vec<f64> {
    (0..pairs).map(|i| (i as f64 / pairs as f64 + 0.4) / 1.4).collect()
}

/// Retention, the attention of RetNet (Sun et al., arXiv 2307.08621, equations 5 to 7), pair by
/// pair:
///
/// ```text
/// o_n = scale·Σ_{m ≤ n} γ^{n−m} Σ_c ζ_c^{(n−m)/512} (R_n q_n)_c (R_m k_m)_c v_m
/// ```
///
/// with `R` the rotation of [`rotate`] and `ζ_c` that of the pair of column `c`, 1 for a column of
/// no pair. Without xPos all `zeta` are 1; with it they are those of [`xpos`], and the factor is
/// what queries times `ζ^{n/512}` and keys times `ζ^{−m/512}` come to. A decay has no meaning for
/// keys that come later, so there is no mask: it is causal.
///
/// ```
/// use dijiang::attention::naive::positional;
/// use ndarray::array;
///
/// // one column does not turn: what is left is the decay
/// let ones = array![[1.0], [1.0], [1.0]];
/// let out = positional::retention(&ones, &ones, &ones, 1.0, 0.5, &[], &[]);
/// assert_eq!(out, array![[1.0], [1.5], [1.75]]);
/// ```
#[must_use]
pub fn retention(
    q: &Array2<f64>,
    k: &Array2<f64>,
    v: &Array2<f64>,
    scale: f64,
    gamma: f64,
    pairs: &[Pair],
    zeta: &[f64],
) -> Array2<f64> {
    let (q, k) = (rotate(q, 0, pairs), rotate(k, 0, pairs));
    let mut zeta_of_column = vec![1.0; q.ncols()];
    for (([a, b], _), &zeta) in pairs.iter().zip(zeta) {
        (zeta_of_column[*a], zeta_of_column[*b]) = (zeta, zeta);
    }
    weighted_sums(q.nrows(), v, Mask::Causal, |n, m| {
        let distance = (n - m) as f64;
        let product =
            |(c, zeta): (usize, &f64)| zeta.powf(distance / 512.0) * q[[n, c]] * k[[m, c]];
        let products: f64 = zeta_of_column.iter().enumerate().map(product).sum();
        scale * gamma.powf(distance) * products
    })
}

/// cosFormer (Qin et al., arXiv 2202.08791, equations 10 to 13):
///
/// ```text
/// o_i = Σ_j w_ij v_j / Σ_j w_ij,    w_ij = φ(q_i)·φ(k_j)·cos(π/2·(i − j)/M)
/// φ(x) = max(0, x) + ε
/// ```
///
/// with `M` the longest sequence there will be, on raw vectors: a scale would cancel. With
/// [`Mask::CausalTail`] the first query is at position `n_k − n_q`.
///
/// ```
/// use dijiang::{Mask, attention::naive::positional};
/// use ndarray::array;
///
/// // two positions: cosines of 0 and 45 degrees
/// let (ones, v) = (array![[1.0], [1.0]], array![[1.0], [0.0]]);
/// let out = positional::cosformer(&ones, &ones, &v, 2, 0.0, Mask::Causal);
/// let far = 0.5_f64.sqrt();
/// assert!((out[[1, 0]] - far / (1.0 + far)).abs() < 1e-15);
/// ```
#[must_use]
pub fn cosformer(
    q: &Array2<f64>,
    k: &Array2<f64>,
    v: &Array2<f64>,
    max_len: usize,
    epsilon: f64,
    mask: Mask,
) -> Array2<f64> {
    let [q, k] = [q, k].map(|x| x.mapv(|x| x.max(0.0) + epsilon));
    let first = if mask == Mask::CausalTail { k.nrows() - q.nrows() } else { 0 };
    weighted_means(q.nrows(), v, mask, |i, j| {
        let distance = ((first + i) as f64 - j as f64) / max_len as f64;
        q.row(i).dot(&k.row(j)) * (PI / 2.0 * distance).cos()
    })
}
