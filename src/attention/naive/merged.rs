//! Merged entries behind the window: mean keys and mean values that stand for many tokens, made by
//! Ward's rule.

use super::formats::rounded;
use super::hybrid::{Held, Near};
use super::options::{Options, soft_capped};
use crate::mask::Mask;
use crate::state_format::StateFormat;
use ndarray::{Array1, Array2, ArrayView1, Axis};

/// Some tokens as one: read with the weight `count·e^{scale·q·key}`.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The weighted mean of the keys, `[d]`: of the raw ones in [`ward`], of the scaled ones in
    /// [`received`](super::received).
    pub key: Array1<f64>,
    /// The weighted mean of the values, `[d_v]`.
    pub value: Array1<f64>,
    /// How many tokens it stands for.
    pub count: f64,
    /// What it weighs where entries are merged.
    pub weight: f64,
}

impl Entry {
    /// A token.
    #[must_use]
    pub fn token(key: ArrayView1<'_, f64>, value: ArrayView1<'_, f64>, weight: f64) -> Self {
        Self { key: key.to_owned(), value: value.to_owned(), count: 1.0, weight }
    }

    /// Two entries as one:
    ///
    /// ```text
    /// key = key_i + a_j/(a_i + a_j)·(key_j − key_i),    value likewise
    /// n = n_i + n_j,    a = a_i + a_j
    /// ```
    ///
    /// In the means every entry weighs `least` more than its weight.
    ///
    /// ```
    /// use dijiang::attention::naive::merged::Entry;
    /// use ndarray::array;
    ///
    /// let token = |x: f64, weight| {
    ///     Entry::token(array![x].view(), array![10.0 * x].view(), weight)
    /// };
    /// let both = token(1.0, 3.0).merge(&token(5.0, 1.0), 0.0);
    /// assert_eq!((both.key, both.value), (array![2.0], array![20.0]));
    /// assert_eq!((both.count, both.weight), (2.0, 4.0));
    /// ```
    #[must_use]
    pub fn merge(&self, other: &Self, least: f64) -> Self {
        let weight = self.weight + other.weight;
        let [a, b] = [self.weight + least, other.weight + least];
        let mean = |x: &Array1<f64>, y: &Array1<f64>| x + (y - x) * (b / (a + b));
        Self {
            key: mean(&self.key, &other.key),
            value: mean(&self.value, &other.value),
            count: self.count + other.count,
            weight,
        }
    }
}

impl Entry {
    /// The entry as a state of this format keeps it; `unit` is what keys are scaled with.
    #[must_use]
    pub fn rounded(self, format: StateFormat, unit: f64) -> Self {
        let row = |x: Array1<f64>| rounded(&x.insert_axis(Axis(0)), format).remove_axis(Axis(0));
        Self { key: row(self.key / unit) * unit, value: row(self.value), ..self }
    }
}

/// What it costs to merge two entries, the increase of the weighted squared error (Ward, J. Am.
/// Stat. Assoc. 58, 1963), given their squared distance:
///
/// ```text
/// a_i a_j/(a_i + a_j)·distance
/// ```
///
/// ```
/// use dijiang::attention::naive::merged::{self, Entry};
/// use ndarray::array;
///
/// let zero = array![0.0];
/// let [a, b] = [3.0, 1.0].map(|weight| Entry::token(zero.view(), zero.view(), weight));
/// assert_eq!(merged::ward_cost(&a, &b, 8.0), 6.0);
/// ```
#[must_use]
pub fn ward_cost(a: &Entry, b: &Entry, distance: f64) -> f64 {
    a.weight * (b.weight / (a.weight + b.weight)) * distance
}

/// The bounds within which [`reduce`] merges.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Entries that are left in all lists together.
    pub entries: usize,
    /// Entries that each list keeps.
    pub least: usize,
    /// Tokens that arrive at once.
    pub block: usize,
}

/// Merges the entries of some lists until they are within `bounds`, given the cost of a pair of
/// list `h`, `cost(h, i, j)` with `i` before `j`, and what becomes of a pair, `merge(i, j)`.
///
/// The pairs that may merge are those in one list that are nearest to each other; of equal costs
/// the first counts, by list, then by place. With `block` 1 the cheapest pair becomes one entry, in
/// the place of its first, and the last entry of the list moves into the place of its second. With
/// a larger `block` as many of the cheapest pairs as are too many merge at once, and the order of
/// what is left stays; rounds follow, with new costs, until it is enough.
///
/// ```
/// use dijiang::attention::naive::merged::{self, Bounds, Entry};
/// use ndarray::array;
///
/// let bounds = Bounds { entries: 3, least: 1, block: 1 };
/// let merge = |a: &Entry, b: &Entry| a.merge(b, 0.0);
/// let token = |x: f64| Entry::token(array![x].view(), array![x].view(), 1.0);
/// let cost = |_: usize, a: &Entry, b: &Entry| {
///     merged::ward_cost(a, b, (a.key[0] - b.key[0]).powi(2))
/// };
/// let keys = |list: &[Entry]| list.iter().map(|entry| entry.key[0]).collect::<Vec<_>>();
/// let tokens: Vec<Entry> = [0.0, 10.0, 1.0, 5.0].map(token).to_vec();
///
/// let mut lists = [tokens.clone()];
/// merged::reduce(&mut lists, bounds, cost, merge);
/// assert_eq!(keys(&lists[0]), [0.5, 10.0, 5.0]);
///
/// // two pools of two, and three in all: the cheaper pair merges
/// let mut lists = [tokens[..2].to_vec(), tokens[2..].to_vec()];
/// merged::reduce(&mut lists, bounds, cost, merge);
/// assert_eq!((keys(&lists[0]), keys(&lists[1])), (vec![0.0, 10.0], vec![3.0]));
/// ```
///
/// # Panics
///
/// If every list has `least` entries and those are more than `entries` together.
pub fn reduce(
    lists: &mut [Vec<Entry>],
    Bounds { entries, least, block }: Bounds,
    cost: impl Fn(usize, &Entry, &Entry) -> f64,
    merge: impl Fn(&Entry, &Entry) -> Entry,
) {
    loop {
        let all: usize = lists.iter().map(Vec::len).sum();
        if all <= entries {
            return;
        }
        let mut pairs: Vec<MutualPair> = Vec::new();
        for (h, list) in lists.iter().enumerate().filter(|(_, list)| list.len() > least) {
            let mut own = mutual_pairs(h, list, |a, b| cost(h, a, b));
            own.truncate(list.len() - least);
            pairs.extend(own);
        }
        pairs.sort_by(|a, b| a.cost.total_cmp(&b.cost)); // stable: by list, then by place
        pairs.truncate(if block == 1 { 1 } else { all - entries });
        assert!(!pairs.is_empty(), "every list is as short as it may be");
        for &MutualPair { list, first, second, .. } in &pairs {
            lists[list][first] = merge(&lists[list][first], &lists[list][second]);
        }
        pairs.sort_by_key(|pair| pair.second);
        for &MutualPair { list, second, .. } in pairs.iter().rev() {
            if block == 1 {
                lists[list].swap_remove(second);
            } else {
                lists[list].remove(second);
            }
        }
    }
}

/// Two entries that are nearest to each other.
struct MutualPair {
    cost: f64,
    list: usize,
    first: usize,
    second: usize,
}

/// The mutual pairs of a list, the cheapest first, those of equal costs by place.
fn mutual_pairs(h: usize, list: &[Entry], cost: impl Fn(&Entry, &Entry) -> f64) -> Vec<MutualPair> {
    let cost = |i: usize, j: usize| cost(&list[i.min(j)], &list[i.max(j)]);
    let nearest = |i: usize| {
        let others = (0..list.len()).filter(|&j| j != i);
        others.min_by(|&a, &b| cost(i, a).total_cmp(&cost(i, b)))
    };
    let partners: Vec<Option<usize>> = (0..list.len()).map(nearest).collect();
    let mut pairs = Vec::new();
    for (first, &partner) in partners.iter().enumerate() {
        if let Some(second) = partner.filter(|&j| first < j && partners[j] == Some(first)) {
            pairs.push(MutualPair { cost: cost(first, second), list: h, first, second });
        }
    }
    pairs.sort_by(|a, b| a.cost.total_cmp(&b.cost));
    pairs
}

/// The shares of one softmax over exact keys and entries, in this order, and the mean of their
/// values:
///
/// ```text
/// o = Σ_near e^{q·k_j} v_j + Σ_i n_i e^{q·key_i} value_i    over the same without v
/// ```
///
/// The query is scaled as it must be for these keys. A cap is for the products `q·k`, before `ln
/// n_i` is added to them; a learned sink adds to what is divided by.
///
/// ```
/// use dijiang::attention::naive::merged::{self, Entry};
/// use dijiang::attention::naive::options::Options;
/// use ndarray::array;
///
/// let entry = Entry { count: 3.0, ..Entry::token(array![0.0].view(), array![4.0].view(), 1.0) };
/// let (query, k, v) = (array![1.0], array![[0.0]], array![[8.0]]);
/// let (shares, out) = merged::read(query.view(), &[0], &k, &v, &[entry], Options::default());
/// assert_eq!((shares, out), (vec![0.25, 0.75], array![5.0]));
/// ```
#[must_use]
pub fn read(
    query: ArrayView1<'_, f64>,
    exact: &[usize],
    k: &Array2<f64>,
    v: &Array2<f64>,
    entries: &[Entry],
    Options { soft_cap, sink_logit }: Options,
) -> (Vec<f64>, Array1<f64>) {
    let score = |key: ArrayView1<'_, f64>| soft_capped(query.dot(&key), soft_cap);
    let mut logs: Vec<f64> = exact.iter().map(|&j| score(k.row(j))).collect();
    logs.extend(entries.iter().map(|entry| score(entry.key.view()) + entry.count.ln()));
    let largest = logs.iter().copied().chain(sink_logit).fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = logs.iter().copied().chain(sink_logit).map(|l| (l - largest).exp()).sum();
    let shares: Vec<f64> = logs.iter().map(|l| (l - largest).exp() / total).collect();
    let values = exact.iter().map(|&j| v.row(j));
    let values = values.chain(entries.iter().map(|entry| entry.value.view()));
    let mut out = Array1::zeros(v.ncols());
    for (share, value) in shares.iter().zip(values) {
        out.scaled_add(*share, &value);
    }
    (shares, out)
}

/// Options of [`ward`].
#[derive(Clone, Debug)]
pub struct Ward {
    /// The most entries there are.
    pub entries: usize,
    /// What each token weighs, `[n]`.
    pub weights: Array1<f64>,
    /// `R`, of the squared distance `|R Δkey|²`; `None` for the identity.
    pub metric: Option<Array2<f64>>,
    /// How entries are kept. Tokens are given as they are kept.
    pub format: StateFormat,
    /// How entries are read.
    pub options: Options,
}

/// Near keys exactly and the others as at most `entries` merged entries, with weights that reading
/// does not change (Ward, J. Am. Stat. Assoc. 58, 1963; this crate):
///
/// ```text
/// o_t = Σ_near e^{scale·q_t·k_j} v_j + Σ_i n_i e^{scale·q_t·key_i} value_i
///     over the same without v
/// cost of merging i and j = a_i a_j/(a_i + a_j)·|R(key_i − key_j)|²
/// ```
///
/// In each step, before the output, the tokens that leave become entries with `n = 1` and their
/// weight `a`, and [`reduce`] makes room. With [`Mask::Full`] there is no window, and every query
/// reads what is left after all keys.
///
/// ```
/// use dijiang::{Mask, attention::naive::{hybrid::Near, merged::{self, Ward}, options::Options}};
/// use ndarray::{Array1, array};
///
/// // keys 0, 1, 9 become the entries 0.5 (twice) and 9, which a query of 0 sees alike
/// let (q, k, v) = (array![[0.0]], array![[0.0], [1.0], [9.0]], array![[1.0], [3.0], [8.0]]);
/// let options = Options::default();
/// let format = dijiang::StateFormat::F32;
/// let ward = Ward { entries: 2, weights: Array1::ones(3), metric: None, format, options };
/// let out = merged::ward([&q, &k, &v], 1.0, &Near::new(0, 0), &ward, Mask::Full);
/// assert!((out[[0, 0]] - 4.0).abs() < 1e-15);
/// ```
///
/// # Panics
///
/// If there is a window and `mask` is [`Mask::Full`].
#[must_use]
pub fn ward(
    [q, k, v]: [&Array2<f64>; 3],
    scale: f64,
    near: &Near,
    rule: &Ward,
    mask: Mask,
) -> Array2<f64> {
    assert!(mask != Mask::Full || near.window == 0, "a window needs an order of queries");
    let q = q * scale;
    let distance = |a: &Entry, b: &Entry| {
        let difference = &a.key - &b.key;
        match &rule.metric {
            Some(metric) => metric.dot(&difference).mapv(|x| x * x).sum(),
            None => difference.dot(&difference),
        }
    };
    let make_room = |entries: &mut Vec<Entry>| {
        let cost = |_: usize, a: &Entry, b: &Entry| ward_cost(a, b, distance(a, b));
        let bounds = Bounds { entries: rule.entries, least: 1, block: near.block };
        let merge = |a: &Entry, b: &Entry| a.merge(b, 0.0).rounded(rule.format, 1.0);
        reduce(core::slice::from_mut(entries), bounds, cost, merge);
    };
    let (mut held, mut entries) = (Held::default(), Vec::new());
    let token = |j: usize| Entry::token(k.row(j), v.row(j), rule.weights[j]);
    let mut out = Array2::zeros((q.nrows(), v.ncols()));
    let first = if mask == Mask::CausalTail { k.nrows() - q.nrows() } else { 0 };
    for t in 0..k.nrows() {
        entries.extend(held.step(near, t).into_iter().map(token));
        make_room(&mut entries);
        if mask != Mask::Full && t >= first {
            let q = q.row(t - first);
            out.row_mut(t - first).assign(&read(q, &held.exact(), k, v, &entries, rule.options).1);
        }
    }
    if mask == Mask::Full {
        // what still waits for its block goes as well
        entries.extend(held.window.drain(..).map(token));
        make_room(&mut entries);
        for (q, mut row) in q.outer_iter().zip(out.outer_iter_mut()) {
            row.assign(&read(q, &held.exact(), k, v, &entries, rule.options).1);
        }
    }
    out
}
