//! Merged entries that are weighted by the attention they received: what was read much is merged
//! last.

use super::hybrid::{Held, Near};
use super::merged::{Bounds, Entry, read, reduce, ward_cost};
use super::options::Options;
use crate::state_format::StateFormat;
use ndarray::{Array1, Array2};

/// Tokens behind the sinks that set the units of distances.
const METRIC_TOKENS: usize = 64;

/// What a token that leaves weighs at least.
const LEAST_WEIGHT: f64 = 1e-9;

/// Entries that each head of a pool keeps.
const LEAST_OF_POOL: usize = 4;

/// How differences of scaled keys are measured.
#[derive(Clone, Debug)]
pub enum Metric {
    /// `|Δkey|²`
    Identity,
    /// `Σ_c r_c Δkey_c²`, with `r_c` the mean of `q̂_c²` over the first 64 tokens behind the sinks
    /// and the query heads of the group; for [`Cost::Ward`] over the mean of all `r`.
    QueryDiagonal,
    /// The same with `r` given.
    Diagonal(Array1<f64>),
    /// `|R Δkey|²`
    Matrix(Array2<f64>),
}

/// What it costs to merge two entries with the weights `a_i` and `a_j`, where `δk²` is their
/// distance by the [`Metric`] and `δv² = |Δvalue|²/ρ²`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Cost {
    /// `a_i a_j/(a_i + a_j)·(δk² + value_weight·δv²)`
    Ward {
        /// The factor of `δv²`.
        value_weight: f64,
    },
    /// `δk²·(δv² + δk²/4)/(1/a_i + 1/a_j)`, with `10⁻⁹` more than the weights.
    Product,
}

impl Cost {
    /// What is added to weights where entries are merged.
    fn least_weight(self) -> f64 {
        if self == Self::Product { LEAST_WEIGHT } else { 0.0 }
    }
}

/// Options of [`received`].
#[derive(Clone, Debug)]
pub struct Received {
    /// The most entries there are, for each head of keys and values.
    pub entries: usize,
    /// γ, what is kept of the attention received in each step.
    pub gamma: f64,
    /// The age in tokens from which a token in the window collects.
    pub min_age: usize,
    /// What it costs to merge.
    pub cost: Cost,
    /// The distance between keys.
    pub metric: Metric,
    /// `ρ²`; `None` for the mean of `|v|²` over the first 64 tokens behind the sinks.
    pub mean_value_square: Option<f64>,
    /// How entries are kept: keys in units of `key_unit`, `√scale` where they are scaled. Tokens
    /// are given as they are kept.
    pub format: StateFormat,
    /// The unit of keys where they are rounded; without effect in [`StateFormat::F32`].
    pub key_unit: f64,
    /// How entries are read.
    pub options: Options,
}

/// One head of keys and values with its far memory, as it goes.
#[derive(Clone, Debug)]
pub struct State {
    /// The tokens that are exact.
    pub held: Held,
    /// The attention that each token received, by position; only that of held tokens counts.
    pub received: Vec<f64>,
    /// The merged entries.
    pub entries: Vec<Entry>,
    /// Tokens, sums of `|v|²`, and sums of `q̂_c²` behind the sinks, up to 64 tokens.
    units: (usize, f64, Array1<f64>),
}

impl State {
    /// The state before the first token, for keys of `head_dim` columns.
    #[must_use]
    pub fn new(head_dim: usize) -> Self {
        Self {
            held: Held::default(),
            received: Vec::new(),
            entries: Vec::new(),
            units: (0, 0.0, Array1::zeros(head_dim)),
        }
    }

    /// `ρ²`, the mean of `|v_j|²` over the first 64 tokens behind the sinks.
    #[must_use]
    pub fn mean_value_square(&self) -> f64 {
        self.units.1 / self.units.0 as f64
    }

    fn cost(&self, a: &Entry, b: &Entry, rule: &Received) -> f64 {
        let (key, value) = (&a.key - &b.key, &a.value - &b.value);
        let weighted = |r: &Array1<f64>| {
            let mean = if rule.cost == Cost::Product { 1.0 } else { r.mean().unwrap_or(1.0) };
            (&key * &key).dot(&(r / mean))
        };
        let keys = match &rule.metric {
            Metric::Identity => key.dot(&key),
            Metric::QueryDiagonal => weighted(&(&self.units.2 / self.units.0 as f64)),
            Metric::Diagonal(r) => weighted(r),
            Metric::Matrix(metric) => metric.dot(&key).mapv(|x| x * x).sum(),
        };
        let square = rule.mean_value_square.unwrap_or_else(|| self.mean_value_square());
        let values = value.dot(&value) / square;
        match rule.cost {
            Cost::Ward { value_weight } => ward_cost(a, b, keys + value_weight * values),
            Cost::Product => {
                let [a, b] = [a, b].map(|entry| entry.weight + LEAST_WEIGHT);
                keys * (values + keys / 4.0) / (1.0 / a + 1.0 / b)
            }
        }
    }
}

/// The scaled queries of a group and the scaled keys and the values of their head.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// `q̂`, one for each query head of the group, each `[n, d]`.
    pub queries: &'a [Array2<f64>],
    /// `k̂ [n, d]`
    pub keys: &'a Array2<f64>,
    /// `v [n, d_v]`
    pub values: &'a Array2<f64>,
}

/// Token `t` arrives: it enters the window, and the tokens that leave become entries with
///
/// ```text
/// n = 1,    a = (attention received) + 10⁻⁹
/// ```
fn arrive(state: &mut State, t: usize, head: Head<'_>, near: &Near) {
    state.received.push(0.0);
    let (tokens, value_squares, query_squares) = &mut state.units;
    if t >= near.sinks && *tokens < METRIC_TOKENS {
        *tokens += 1;
        *value_squares += head.values.row(t).dot(&head.values.row(t));
        for q in head.queries {
            *query_squares += &(q.row(t).mapv(|x| x * x) / head.queries.len() as f64);
        }
    }
    for j in state.held.step(near, t) {
        let weight = state.received[j] + LEAST_WEIGHT;
        state.entries.push(Entry::token(head.keys.row(j), head.values.row(j), weight));
    }
}

/// Reduces the entries of all states together to `rule.entries` for each of them, by the cost of
/// the rule.
fn make_room(states: &mut [State], rule: &Received, least: usize, block: usize) {
    let mut lists: Vec<Vec<Entry>> =
        states.iter_mut().map(|state| core::mem::take(&mut state.entries)).collect();
    let entries = rule.entries * states.len();
    let bounds = Bounds { entries, least, block };
    let merge = |a: &Entry, b: &Entry| {
        a.merge(b, rule.cost.least_weight()).rounded(rule.format, rule.key_unit)
    };
    reduce(&mut lists, bounds, |h, a, b| states[h].cost(a, b, rule), merge);
    states.iter_mut().zip(lists).for_each(|(state, list)| state.entries = list);
}

/// The outputs of the query heads at token `t`, and what was read, summed over them:
///
/// ```text
/// window token j:  acc_j ← γ acc_j + P_j [t − j ≥ min_age]
/// heavy key j:     acc_j ← γ acc_j + P_j
/// entry i:         a_i ← γ a_i + P_i
/// ```
///
/// In a pool, and for [`Cost::Product`], the probabilities `P` are scaled so that those of all but
/// the sinks sum to the number of query heads: they are multiplied with `heads/(10⁻⁹ + sum)`.
fn answer(
    state: &mut State,
    t: usize,
    head: Head<'_>,
    rule: &Received,
    pooled: bool,
) -> Vec<Array1<f64>> {
    let exact = state.held.exact();
    let mut probabilities = Array1::<f64>::zeros(exact.len() + state.entries.len());
    let mut out = Vec::new();
    for q in head.queries {
        let (shares, mean) =
            read(q.row(t), &exact, head.keys, head.values, &state.entries, rule.options);
        probabilities += &Array1::from(shares);
        out.push(mean);
    }
    let sinks = state.held.sinks.len();
    if pooled || rule.cost == Cost::Product {
        let mass: f64 = probabilities.iter().skip(sinks).sum();
        probabilities *= head.queries.len() as f64 / (LEAST_WEIGHT + mass);
    }
    for (slot, &j) in exact.iter().enumerate().skip(sinks) {
        let in_window = slot < sinks + state.held.window.len();
        let too_young = in_window && t - j < rule.min_age;
        let own = if too_young { 0.0 } else { probabilities[slot] };
        state.received[j] = rule.gamma * state.received[j] + own;
    }
    for (entry, p) in state.entries.iter_mut().zip(probabilities.iter().skip(exact.len())) {
        entry.weight = rule.gamma * entry.weight + p;
    }
    out
}

/// One step of one head: token `t` arrives, room is made, and the query heads read.
///
/// ```text
/// o_t = Σ_near e^{q̂_t·k̂_j} v_j + Σ_i n_i e^{q̂_t·key_i} value_i    over the same without v
/// ```
///
/// Returns their outputs. Tokens must come in order, from `t = 0`.
///
/// ```
/// use dijiang::{StateFormat, attention::naive::options::Options};
/// use dijiang::attention::naive::hybrid::Near;
/// use dijiang::attention::naive::received::{self, Cost, Head, Metric, Received, State};
/// use ndarray::array;
///
/// let rule = Received {
///     entries: 1, gamma: 0.5, min_age: 0, cost: Cost::Ward { value_weight: 0.0 },
///     metric: Metric::Identity, mean_value_square: None, format: StateFormat::F32,
///     key_unit: 1.0, options: Options::default(),
/// };
/// let (q, k, v) = ([array![[0.0], [0.0]]], array![[1.0], [2.0]], array![[1.0], [3.0]]);
/// let head = Head { queries: &q, keys: &k, values: &v };
/// let mut state = State::new(1);
/// for t in 0..2 {
///     received::step(&mut state, t, head, &Near::new(1, 0), &rule);
/// }
/// // token 0 got all of the first read, and half of the second as an entry
/// assert!((state.entries[0].weight - (0.5 * (1.0 + 1e-9) + 0.5)).abs() < 1e-15);
/// assert_eq!(state.received[1], 0.5);
/// ```
pub fn step(
    state: &mut State,
    t: usize,
    head: Head<'_>,
    near: &Near,
    rule: &Received,
) -> Vec<Array1<f64>> {
    arrive(state, t, head, near);
    make_room(core::slice::from_mut(state), rule, 1, near.block);
    answer(state, t, head, rule, false)
}

/// Near keys exactly and the others as at most `entries` merged entries, weighted by the attention
/// they received (this crate; the merging rule is Ward's, J. Am. Stat. Assoc. 58, 1963), causal,
/// for the query heads `q` of one head of keys and values.
///
/// In each step, with `P` the probabilities just used, summed over the query heads:
///
/// ```text
/// a token that leaves becomes an entry with n = 1, a = acc + 10⁻⁹
/// beyond `entries`, the pairs of least cost merge
/// o_t = Σ_near e^{q̂_t·k̂_j} v_j + Σ_i n_i e^{q̂_t·key_i} value_i    over the same without v
/// window token j: acc_j ← γ acc_j + P_j [t − j ≥ min_age],    entry i: a_i ← γ a_i + P_i
/// ```
///
/// by a [`Cost`]. How pairs merge, singly
/// or in blocks, is in [`reduce`]. Returns the outputs `[n, d_v]` of the
/// query heads.
///
/// ```
/// use dijiang::{StateFormat, attention::naive::options::Options};
/// use dijiang::attention::naive::received::{self, Cost, Metric, Received};
/// use dijiang::{Mask, attention::naive::{self, hybrid::Near}};
/// use ndarray::array;
///
/// // while nothing has merged, it is softmax attention
/// let rule = Received {
///     entries: 2, gamma: 0.98, min_age: 16, cost: Cost::Product, metric: Metric::QueryDiagonal,
///     mean_value_square: None, format: StateFormat::F32,
///     key_unit: 1.0, options: Options::default(),
/// };
/// let (x, v) = (array![[0.1], [0.7], [-0.4]], array![[1.0], [2.0], [3.0]]);
/// let out = received::received(&[x.clone()], &x, &v, 1.0, &Near::new(1, 0), &rule);
/// let exact = naive::softmax(&x, &x, &v, 1.0, Mask::Causal);
/// assert!((&out[0] - exact).iter().all(|e| e.abs() < 1e-15));
/// ```
#[must_use]
pub fn received(
    q: &[Array2<f64>],
    k: &Array2<f64>,
    v: &Array2<f64>,
    scale: f64,
    near: &Near,
    rule: &Received,
) -> Vec<Array2<f64>> {
    let root = scale.sqrt();
    let (queries, keys): (Vec<Array2<f64>>, _) = (q.iter().map(|q| q * root).collect(), k * root);
    let head = Head { queries: &queries, keys: &keys, values: v };
    let mut state = State::new(k.ncols());
    let mut out = vec![Array2::zeros(v.dim()); q.len()];
    for t in 0..k.nrows() {
        for (out, row) in out.iter_mut().zip(step(&mut state, t, head, near, rule)) {
            out.row_mut(t).assign(&row);
        }
    }
    out
}

/// [`received`] for several heads of keys and values that share one budget: together they have at
/// most `entries` times as many entries as there are heads, and each keeps at least four. Pairs of
/// all heads compete by their costs, and the probabilities `P` of a head are scaled so that those
/// of all but the sinks sum to the number of its query heads.
///
/// `q [head][group]`, `k [head]` and `v [head]` give outputs `[head][group]`.
///
/// ```
/// use dijiang::{StateFormat, attention::naive::options::Options};
/// use dijiang::attention::naive::{hybrid::Near, received::{self, Cost, Metric, Received}};
/// use ndarray::Array2;
///
/// let rule = Received {
///     entries: 5, gamma: 0.98, min_age: 1, cost: Cost::Product, metric: Metric::QueryDiagonal,
///     mean_value_square: None, format: StateFormat::F32,
///     key_unit: 1.0, options: Options::default(),
/// };
/// let x = |phase: f64| {
///     Array2::from_shape_fn((20, 2), |(t, i)| (phase + (2 * t + i) as f64).sin())
/// };
/// let (q, k) = ([vec![x(0.1)], vec![x(0.2)]], [x(0.3), x(0.4)]);
/// let out = received::received_pooled(&q, &k, &k, 0.7, &Near::new(3, 1), &rule);
/// assert_eq!((out.len(), out[1].len(), out[1][0].dim()), (2, 1, (20, 2)));
/// ```
#[must_use]
pub fn received_pooled(
    q: &[Vec<Array2<f64>>],
    k: &[Array2<f64>],
    v: &[Array2<f64>],
    scale: f64,
    near: &Near,
    rule: &Received,
) -> Vec<Vec<Array2<f64>>> {
    let root = scale.sqrt();
    let queries: Vec<Vec<Array2<f64>>> =
        q.iter().map(|group| group.iter().map(|q| q * root).collect()).collect();
    let keys: Vec<Array2<f64>> = k.iter().map(|k| k * root).collect();
    let head = |h: usize| Head { queries: &queries[h], keys: &keys[h], values: &v[h] };
    let mut states: Vec<State> = k.iter().map(|k| State::new(k.ncols())).collect();
    let mut out: Vec<Vec<Array2<f64>>> =
        q.iter().zip(v).map(|(group, v)| vec![Array2::zeros(v.dim()); group.len()]).collect();
    for t in 0..k.first().map_or(0, Array2::nrows) {
        for (h, state) in states.iter_mut().enumerate() {
            arrive(state, t, head(h), near);
        }
        make_room(&mut states, rule, LEAST_OF_POOL, near.block);
        for (h, state) in states.iter_mut().enumerate() {
            for (out, row) in out[h].iter_mut().zip(answer(state, t, head(h), rule, true)) {
                out.row_mut(t).assign(&row);
            }
        }
    }
    out
}
