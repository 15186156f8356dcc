//! Hybrids: keys that are read exactly beside others that are dropped or read through features,
//! under one normaliser.

use super::features::Features;
use super::{from_log_weights, scores, visible};
use crate::mask::Mask;
use ndarray::{Array1, Array2};

/// Which keys are read exactly: the first ones (*sinks*; Xiao et al., arXiv 2309.17453), the last
/// ones, and the *heavy* ones, those of the largest score among all that have left the window.
///
/// ```text
/// near(t) = { j ≤ t : j < sinks or t − j < window } and the heavy keys
/// ```
#[derive(Clone, Debug)]
pub struct Near {
    /// How many of the first tokens stay for ever.
    pub sinks: usize,
    /// How many of the last tokens are held.
    pub window: usize,
    /// Tokens leave the window this many at once, so it holds up to `block − 1` more.
    pub block: usize,
    /// How many keys stay for their score.
    pub heavy: usize,
    /// A score of each key, `[n]`; only read where there are heavy keys.
    pub scores: Array1<f64>,
}

impl Near {
    /// A window and sinks, without heavy keys, which tokens leave one by one.
    ///
    /// ```
    /// use dijiang::attention::naive::hybrid::Near;
    ///
    /// let (exact, gone) = Near::new(2, 1).split(5);
    /// assert_eq!((exact, gone), (vec![0, 3, 4], vec![1, 2]));
    /// ```
    #[must_use]
    pub fn new(window: usize, sinks: usize) -> Self {
        Self { sinks, window, block: 1, heavy: 0, scores: Array1::zeros(0) }
    }

    /// After the first `tokens` tokens: the positions that are exact, and those that are gone, in
    /// the order in which they went.
    #[must_use]
    pub fn split(&self, tokens: usize) -> (Vec<usize>, Vec<usize>) {
        let mut held = Held::default();
        let gone = (0..tokens).flat_map(|t| held.step(self, t)).collect();
        (held.exact(), gone)
    }
}

/// The positions of the tokens that are held, step by step.
#[derive(Clone, Debug, Default)]
pub struct Held {
    /// The first tokens.
    pub sinks: Vec<usize>,
    /// The last tokens, oldest first.
    pub window: Vec<usize>,
    /// Those with the largest scores of all that have left the window, in no order.
    pub heavy: Vec<usize>,
}

impl Held {
    /// Takes in token `t` and returns the tokens that go: from the window those that no longer fit,
    /// and for a token with a larger score than a heavy key, the heavy key in its place.
    ///
    /// ```
    /// use dijiang::attention::naive::hybrid::{Held, Near};
    /// use ndarray::array;
    ///
    /// let near = Near { heavy: 1, scores: array![1.0, 3.0, 2.0, 0.0], ..Near::new(1, 0) };
    /// let mut held = Held::default();
    /// let gone: Vec<Vec<usize>> = (0..4).map(|t| held.step(&near, t)).collect();
    /// assert_eq!(gone, [vec![], vec![], vec![0], vec![2]]);
    /// assert_eq!((held.window, held.heavy), (vec![3], vec![1]));
    /// ```
    pub fn step(&mut self, near: &Near, t: usize) -> Vec<usize> {
        if t < near.sinks {
            self.sinks.push(t);
            return Vec::new();
        }
        self.window.push(t);
        if self.window.len() < near.window + near.block {
            return Vec::new();
        }
        let leaving: Vec<usize> = self.window.drain(..near.block).collect();
        leaving.into_iter().filter_map(|j| self.displace(near, j)).collect()
    }

    /// A token leaves the window: the one that is not among the heavy keys after that.
    fn displace(&mut self, near: &Near, j: usize) -> Option<usize> {
        if self.heavy.len() < near.heavy {
            self.heavy.push(j);
            return None;
        }
        let score = |j: usize| near.scores[j];
        let least = self.heavy.iter_mut().min_by(|a, b| score(**a).total_cmp(&score(**b)));
        match least {
            Some(least) if score(j) > score(*least) => Some(core::mem::replace(least, j)),
            _ => Some(j),
        }
    }

    /// All of them: sinks, window, heavy keys.
    #[must_use]
    pub fn exact(&self) -> Vec<usize> {
        [&self.sinks[..], &self.window, &self.heavy].concat()
    }
}

/// Softmax attention to the near keys alone; the others are forgotten:
///
/// ```text
/// o_t = Σ_{j ∈ near(t)} e^{scale·q_t·k_j} v_j / Σ_{j ∈ near(t)} e^{scale·q_t·k_j}
/// ```
///
/// With [`Mask::Full`] there is no window, and the near keys of every query are those that are held
/// after all keys.
///
/// ```
/// use dijiang::{Mask, attention::naive::hybrid::{self, Near}};
/// use ndarray::array;
///
/// let (x, v) = (array![[0.0], [0.0], [0.0], [0.0]], array![[1.0], [2.0], [3.0], [4.0]]);
/// let out = hybrid::window_only(&x, &x, &v, 1.0, &Near::new(1, 1), Mask::Causal);
/// assert_eq!(out, array![[1.0], [1.5], [2.0], [2.5]]); // itself and the first
/// ```
///
/// # Panics
///
/// If there is a window and `mask` is [`Mask::Full`].
#[must_use]
pub fn window_only(
    q: &Array2<f64>,
    k: &Array2<f64>,
    v: &Array2<f64>,
    scale: f64,
    near: &Near,
    mask: Mask,
) -> Array2<f64> {
    let dropped = Array2::from_elem((q.nrows(), k.nrows()), f64::NEG_INFINITY);
    from_log_weights(&log_weights(q, k, scale, near, &dropped, mask), v, mask)
}

/// Near keys exactly and the others through features, under one normaliser:
///
/// ```text
/// o_t = [Σ_near e^{scale·q_t·k_j} v_j + Σ_far (φ(q_t)·φ(k_j)) v_j]
///     / [Σ_near e^{scale·q_t·k_j}     + Σ_far  φ(q_t)·φ(k_j)]
/// ```
///
/// where the far keys of `t` are those it sees that are not near. All products of features must be
/// positive. [`Mask::Full`] as in [`window_only`].
///
/// ```
/// use dijiang::{Mask, attention::naive::{features, hybrid::{self, Near}}};
/// use ndarray::array;
///
/// let (x, v) = (array![[0.0], [0.0]], array![[1.0], [4.0]]);
/// let phi = features::relu(&x, 2_f64.sqrt()); // far weights of 2
/// let near = Near::new(1, 0);
/// let out = hybrid::with_features([&x, &x, &v], 1.0, &near, [&phi, &phi], Mask::Causal);
/// assert!((out - array![[1.0], [2.0]]).iter().all(|e| e.abs() < 1e-15)); // (2·1 + 4)/(2 + 1)
/// ```
///
/// # Panics
///
/// If there is a window and `mask` is [`Mask::Full`].
#[must_use]
pub fn with_features(
    [q, k, v]: [&Array2<f64>; 3],
    scale: f64,
    near: &Near,
    [phi_q, phi_k]: [&Features; 2],
    mask: Mask,
) -> Array2<f64> {
    let far = log_products(phi_q, phi_k);
    from_log_weights(&log_weights(q, k, scale, near, &far, mask), v, mask)
}

/// `ln φ(q_t)·φ(k_j)` of all pairs, `[n_q, n_k]`, of features whose products are positive.
///
/// ```
/// use dijiang::attention::naive::{features, hybrid};
/// use ndarray::{Array1, array};
///
/// // one positive feature, with ω = 0: its products are e^{−(|x|² + |y|²)/2}
/// let phi = features::performer(&array![[30.0], [40.0]], &array![[0.0]], &Array1::ones(1));
/// assert_eq!(hybrid::log_products(&phi, &phi), array![[-900.0, -1250.0], [-1250.0, -1600.0]]);
/// ```
#[must_use]
pub fn log_products(phi_q: &Features, phi_k: &Features) -> Array2<f64> {
    Array2::from_shape_fn((phi_q.values.nrows(), phi_k.values.nrows()), |(t, j)| {
        let product = phi_q.values.row(t).dot(&phi_k.values.row(j));
        product.ln() + phi_q.log_scale[t] + phi_k.log_scale[j]
    })
}

/// As [`log_products`], `ln Σ_i φ(q_t)_i φ(k_j)_i γ_i^n`, of features that decay by `decay` with
/// each token that leaves a window of this length: `n` have left after `j` before the query reads.
///
/// ```
/// use dijiang::attention::naive::{features::Features, hybrid};
/// use ndarray::Array2;
///
/// let phi = Features::from_values(Array2::ones((3, 1)));
/// let logs = hybrid::log_decaying_products(&phi, &phi, &[0.5], 1);
/// assert_eq!(logs[[2, 0]], 0.5_f64.ln()); // token 1 has left since
/// ```
#[must_use]
pub fn log_decaying_products(
    phi_q: &Features,
    phi_k: &Features,
    decay: &[f64],
    window: usize,
) -> Array2<f64> {
    let (n_q, n_k) = (phi_q.values.nrows(), phi_k.values.nrows());
    Array2::from_shape_fn((n_q, n_k), |(t, j)| {
        let position = n_k - n_q + t;
        let after = position.saturating_sub(window + j);
        let products = phi_q.values.row(t).into_iter().zip(phi_k.values.row(j)).zip(decay);
        let product: f64 = products.map(|((q, k), decay)| q * k * decay.powf(after as f64)).sum();
        product.ln() + phi_q.log_scale[t] + phi_k.log_scale[j]
    })
}

/// The logarithms of the weights of a hybrid, `[n_q, n_k]`: `scale·q_t·k_j` of near keys, those of
/// `far` elsewhere, and −∞ for keys that `t` does not see. With [`normalize`](super::normalize)
/// they give its attention matrix and log normalisers.
///
/// ```
/// use dijiang::{Mask, attention::naive::hybrid::{self, Near}};
/// use ndarray::{Array2, array};
///
/// let x = array![[1.0], [2.0]];
/// let far = Array2::from_elem((2, 2), 7.0);
/// let logs = hybrid::log_weights(&x, &x, 1.0, &Near::new(1, 0), &far, Mask::Causal);
/// assert_eq!(logs, array![[1.0, f64::NEG_INFINITY], [7.0, 4.0]]);
/// ```
///
/// # Panics
///
/// If there is a window and `mask` is [`Mask::Full`].
#[must_use]
pub fn log_weights(
    q: &Array2<f64>,
    k: &Array2<f64>,
    scale: f64,
    near: &Near,
    far: &Array2<f64>,
    mask: Mask,
) -> Array2<f64> {
    assert!(mask != Mask::Full || near.window == 0, "a window needs an order of queries");
    let exact = scores(q, k, scale);
    let mut logs = Array2::from_elem(exact.dim(), f64::NEG_INFINITY);
    for t in 0..q.nrows() {
        let (held, gone) = near.split(visible(mask, t, [q.nrows(), k.nrows()]));
        for j in held {
            logs[[t, j]] = exact[[t, j]];
        }
        for j in gone {
            logs[[t, j]] = far[[t, j]];
        }
    }
    logs
}
