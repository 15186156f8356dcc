//! Linear attention of given features: sums over pairs, and the recurrence where sums decay.

use super::features::Features;
use super::visible;
use crate::mask::Mask;
use ndarray::{Array1, Array2, ArrayView1};

/// Linear attention (Katharopoulos et al., arXiv 2006.16236, equations 4 to 6):
///
/// ```text
/// o_t = Σ_j (φ(q_t)·φ(k_j)) v_j / Σ_j φ(q_t)·φ(k_j)
/// ```
///
/// over the keys that `t` sees, of features `φ(q) [n_q, m]` and `φ(k) [n_k, m]`.
///
/// ```
/// use dijiang::{Mask, attention::naive::{features, linear}};
/// use ndarray::array;
///
/// let phi = features::relu(&array![[1.0], [3.0]], 0.0); // weights 1 and 3 for each query
/// let out = linear::normalized(&phi, &phi, &array![[1.0], [5.0]], Mask::Full);
/// assert_eq!(out, array![[4.0], [4.0]]);
/// ```
#[must_use]
pub fn normalized(phi_q: &Features, phi_k: &Features, v: &Array2<f64>, mask: Mask) -> Array2<f64> {
    let mut out = Array2::zeros((phi_q.values.nrows(), v.ncols()));
    for (t, mut row) in out.outer_iter_mut().enumerate() {
        let (weights, _) = weights_of_query(phi_q, phi_k, t, mask);
        let total: f64 = weights.iter().sum();
        for (j, w) in weights.iter().enumerate() {
            row.scaled_add(w / total, &v.row(j));
        }
    }
    out
}

/// Linear attention without the division, as most models with decay have it:
///
/// ```text
/// o_t = Σ_j (φ(q_t)·φ(k_j)) v_j
/// ```
///
/// ```
/// use dijiang::{Mask, attention::naive::{features, linear}};
/// use ndarray::array;
///
/// let phi = features::identity(&array![[1.0], [-3.0]]);
/// let out = linear::unnormalized(&phi, &phi, &array![[1.0], [5.0]], Mask::Causal);
/// assert_eq!(out, array![[1.0], [42.0]]); // −3·1·1 + (−3)²·5
/// ```
#[must_use]
pub fn unnormalized(
    phi_q: &Features,
    phi_k: &Features,
    v: &Array2<f64>,
    mask: Mask,
) -> Array2<f64> {
    let mut out = Array2::zeros((phi_q.values.nrows(), v.ncols()));
    for (t, mut row) in out.outer_iter_mut().enumerate() {
        let (weights, log_unit) = weights_of_query(phi_q, phi_k, t, mask);
        for (j, w) in weights.iter().enumerate() {
            row.scaled_add(w * log_unit.exp(), &v.row(j));
        }
    }
    out
}

/// `φ(q_t)·φ(k_j)` of the keys that `t` sees, over a factor whose logarithm comes with them.
fn weights_of_query(phi_q: &Features, phi_k: &Features, t: usize, mask: Mask) -> (Vec<f64>, f64) {
    let logs = &phi_k.log_scale;
    let seen = visible(mask, t, [phi_q.log_scale.len(), logs.len()]);
    let largest = (0..seen).map(|j| logs[j]).fold(f64::NEG_INFINITY, f64::max);
    let product = |j: usize| phi_q.values.row(t).dot(&phi_k.values.row(j));
    let weights = (0..seen).map(|j| product(j) * (logs[j] - largest).exp()).collect();
    (weights, phi_q.log_scale[t] + largest)
}

/// The state of linear attention whose sums decay, and its step:
///
/// ```text
/// S_t = diag(α_t) S_{t−1} + φ(k_t) v_tᵀ,    z_t = α_t ⊙ z_{t−1} + φ(k_t)
/// ```
///
/// from `S_{−1} = 0`, `z_{−1} = 0`, with features in absolute terms (Katharopoulos et al., arXiv
/// 2006.16236, equations 16 to 20, without decay; RetNet, Sun et al., arXiv 2307.08621, equation 6,
/// with a constant α; Mamba-2, Dao and Gu, arXiv 2405.21060, with one number for each token; gated
/// linear attention, Yang et al., arXiv 2312.06635, section 4, with one for each feature).
///
/// ```
/// use dijiang::attention::naive::linear::Recurrence;
/// use ndarray::array;
///
/// let mut state = Recurrence::new(1, 1);
/// for _ in 0..3 {
///     state.step(array![2.0].view(), array![1.0].view(), |_| 0.5);
/// }
/// assert_eq!(state.sums, array![[3.5]]); // 2 + 2/2 + 2/4
/// assert_eq!(state.read(array![1.0].view()), array![3.5]);
/// assert_eq!(state.read_normalized(array![1.0].view()), array![1.0]);
/// ```
#[derive(Clone, Debug)]
pub struct Recurrence {
    /// `S [m, d_v]`
    pub sums: Array2<f64>,
    /// `z [m]`
    pub normalizer: Array1<f64>,
}

impl Recurrence {
    /// The state before the first token.
    #[must_use]
    pub fn new(num_features: usize, value_dim: usize) -> Self {
        Self {
            sums: Array2::zeros((num_features, value_dim)),
            normalizer: Array1::zeros(num_features),
        }
    }

    /// Takes in the features and the value of a token, before which feature `i` keeps the share
    /// `alpha(i)` of all that was.
    pub fn step(
        &mut self,
        phi_k: ArrayView1<'_, f64>,
        v: ArrayView1<'_, f64>,
        alpha: impl Fn(usize) -> f64,
    ) {
        for (i, mut row) in self.sums.outer_iter_mut().enumerate() {
            let kept = alpha(i);
            row.mapv_inplace(|s| kept * s);
            row.scaled_add(phi_k[i], &v);
            self.normalizer[i] = kept * self.normalizer[i] + phi_k[i];
        }
    }

    /// `φ(q)ᵀ S`
    #[must_use]
    pub fn read(&self, phi_q: ArrayView1<'_, f64>) -> Array1<f64> {
        phi_q.dot(&self.sums)
    }

    /// `φ(q)ᵀ S / φ(q)ᵀ z`
    #[must_use]
    pub fn read_normalized(&self, phi_q: ArrayView1<'_, f64>) -> Array1<f64> {
        self.read(phi_q) / phi_q.dot(&self.normalizer)
    }
}

/// Causal linear attention whose tokens bring their decay, by the [`Recurrence`]:
///
/// ```text
/// o_t = φ(q_t)ᵀ S_t / φ(q_t)ᵀ z_t,    ln α_t = log_decay[t]
/// ```
///
/// with features in absolute terms, `φ(q)` and `φ(k) [n, m]`. `log_decay` is `[n, m]`; a single
/// column is of every feature, and a single row of every token. Token `t` itself has not decayed in
/// `o_t`; `−∞` forgets all that came before.
///
/// ```
/// use dijiang::attention::naive::linear;
/// use ndarray::array;
///
/// let (ones, v) = (array![[1.0], [1.0]], array![[1.0], [4.0]]);
/// let out = linear::gated(&ones, &ones, &v, &array![[0.0], [0.5_f64.ln()]]);
/// assert_eq!(out, array![[1.0], [3.0]]); // (1/2 + 4)/(1/2 + 1)
/// ```
#[must_use]
pub fn gated(
    phi_q: &Array2<f64>,
    phi_k: &Array2<f64>,
    v: &Array2<f64>,
    log_decay: &Array2<f64>,
) -> Array2<f64> {
    by_recurrence([phi_q, phi_k, v], log_decay, Recurrence::read_normalized)
}

/// [`gated`] without the division: `o_t = φ(q_t)ᵀ S_t`.
///
/// ```
/// use dijiang::attention::naive::linear;
/// use ndarray::array;
///
/// let (ones, v) = (array![[1.0], [1.0]], array![[1.0], [4.0]]);
/// let out = linear::gated_unnormalized(&ones, &ones, &v, &array![[0.0], [0.5_f64.ln()]]);
/// assert_eq!(out, array![[1.0], [4.5]]);
/// ```
#[must_use]
pub fn gated_unnormalized(
    phi_q: &Array2<f64>,
    phi_k: &Array2<f64>,
    v: &Array2<f64>,
    log_decay: &Array2<f64>,
) -> Array2<f64> {
    by_recurrence([phi_q, phi_k, v], log_decay, Recurrence::read)
}

/// Causal linear attention with one decay γ for all tokens and features, without the division:
///
/// ```text
/// o_t = φ(q_t)ᵀ S_t = Σ_{j ≤ t} γ^{t−j} (φ(q_t)·φ(k_j)) v_j
/// ```
///
/// (RetNet, Sun et al., arXiv 2307.08621, equation 6; the released DiJiang code).
///
/// ```
/// use dijiang::attention::naive::linear;
/// use ndarray::array;
///
/// let ones = array![[1.0], [1.0], [1.0]];
/// assert_eq!(linear::decayed(&ones, &ones, &ones, 0.5), array![[1.0], [1.5], [1.75]]);
/// ```
#[must_use]
pub fn decayed(
    phi_q: &Array2<f64>,
    phi_k: &Array2<f64>,
    v: &Array2<f64>,
    gamma: f64,
) -> Array2<f64> {
    gated_unnormalized(phi_q, phi_k, v, &Array2::from_elem((1, 1), gamma.ln()))
}

fn by_recurrence(
    [phi_q, phi_k, v]: [&Array2<f64>; 3],
    log_decay: &Array2<f64>,
    read: fn(&Recurrence, ArrayView1<'_, f64>) -> Array1<f64>,
) -> Array2<f64> {
    let (rows, columns) = log_decay.dim();
    let mut state = Recurrence::new(phi_q.ncols(), v.ncols());
    let mut out = Array2::zeros(v.dim());
    for (t, mut row) in out.outer_iter_mut().enumerate() {
        let alpha = |i: usize| log_decay[[t.min(rows - 1), i.min(columns - 1)]].exp();
        state.step(phi_k.row(t), v.row(t), alpha);
        row.assign(&read(&state, phi_q.row(t)));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::{weighted_means, weighted_sums};
    use super::*;

    /// `w_tj = Σ_i φ_i(q_t) φ_i(k_j) e^{Σ_{s=j+1..t} ln α_si}`, which is what the recurrence comes
    /// to.
    #[test]
    fn the_recurrence_is_the_sum_over_pairs() {
        let number = |phase: f64| move |(t, i)| (phase + 1.7 * t as f64 + 0.9 * i as f64).sin();
        let (n, m) = (20, 4);
        let [q, k, v] = [0.1, 0.2, 0.3].map(|phase| Array2::from_shape_fn((n, m), number(phase)));
        let [phi_q, phi_k] = [q, k].map(|x| x.mapv(|x| x.abs() + 0.1));
        for (rows, columns) in [(1, 1), (1, m), (n, 1), (n, m)] {
            let mut log_decay =
                Array2::from_shape_fn((rows, columns), number(0.4)).mapv(|x| -x * x);
            if rows == n {
                log_decay.row_mut(7).fill(f64::NEG_INFINITY);
            }
            let weight = |t: usize, j: usize| {
                let own = |s: usize, i: usize| log_decay[[s.min(rows - 1), i.min(columns - 1)]];
                let kept = |i: usize| (j + 1..=t).map(|s| own(s, i)).sum::<f64>().exp();
                (0..m).map(|i| phi_q[[t, i]] * phi_k[[j, i]] * kept(i)).sum()
            };
            let close = |a: Array2<f64>, b: Array2<f64>| {
                assert!((a - b).iter().all(|e| e.abs() < 1e-13), "{rows} {columns}");
            };
            let causal = Mask::Causal;
            close(gated(&phi_q, &phi_k, &v, &log_decay), weighted_means(n, &v, causal, weight));
            close(
                gated_unnormalized(&phi_q, &phi_k, &v, &log_decay),
                weighted_sums(n, &v, causal, weight),
            );
        }
    }
}
