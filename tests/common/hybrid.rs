//! The hybrids as their formulas stand: a list of entries, one step after the other, in f64.

use super::features;
use dijiang::{Calibration, FeatureMap};
use ndarray::{Array1, Array2};
use std::sync::Arc;

/// What takes the tokens that leave.
#[derive(Clone, Debug)]
pub enum FarFormula {
    None,
    Features(Arc<dyn FeatureMap<f64>>),
    /// With a calibration: a `CalibratedTaylor` of this rank.
    Taylor(usize, Arc<dyn FeatureMap<f64>>),
    Ward {
        entries: usize,
        block: usize,
    },
    /// With a calibration: its metric and expected attention.
    WardCalibrated {
        entries: usize,
        metric: Arc<Array2<f64>>,
    },
    Merged(Received),
}

/// Options of received-attention merging.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    pub entries: usize,
    pub block: usize,
    pub gamma: f64,
    pub min_age: usize,
    pub value_weight: f64,
    pub diagonal: bool,
}

#[derive(Clone, Debug)]
pub struct HybridFormula {
    pub window: usize,
    pub sinks: usize,
    pub heavy: usize,
    pub far: FarFormula,
    pub calibration: Option<Arc<Calibration>>,
    /// The calibrated metric of received-attention merging.
    pub metric: Option<Array2<f64>>,
}

#[derive(Clone)]
struct Entry {
    key: Array1<f64>,
    value: Array1<f64>,
    count: f64,
    weight: f64,
}

/// One head of keys and values, as it goes.
struct State {
    sinks: Vec<usize>,
    window: Vec<(usize, f64)>,
    heavy: Vec<(usize, f64)>,
    /// Tokens that went on to the far memory.
    gone: Vec<usize>,
    entries: Vec<Entry>,
    /// Sums of squares of the first tokens: values, each coordinate of queries.
    seen: usize,
    value_squares: f64,
    query_squares: Array1<f64>,
}

impl HybridFormula {
    /// Causal outputs `[head][group] [n, d_v]` of some heads with their query heads; `pooled` heads
    /// share one budget of entries.
    pub fn causal(
        &self,
        q: &[Vec<Array2<f64>>],
        k: &[Array2<f64>],
        v: &[Array2<f64>],
        scale: f64,
        pooled: bool,
    ) -> Vec<Vec<Array2<f64>>> {
        let n = k[0].nrows();
        let root = scale.sqrt();
        let qh: Vec<Vec<Array2<f64>>> =
            q.iter().map(|heads| heads.iter().map(|q| q * root).collect()).collect();
        let kh: Vec<Array2<f64>> = k.iter().map(|k| k * root).collect();
        let mut out: Vec<Vec<Array2<f64>>> = q
            .iter()
            .zip(v)
            .map(|(heads, v)| vec![Array2::zeros((n, v.ncols())); heads.len()])
            .collect();
        let mut states: Vec<State> = kh.iter().map(|k| State::new(k.ncols())).collect();
        for t in 0..n {
            for (h, state) in states.iter_mut().enumerate() {
                self.arrive(state, t, &qh[h], &kh[h], &v[h]);
            }
            self.merge(&mut states, pooled);
            for (h, state) in states.iter_mut().enumerate() {
                self.answer(
                    state,
                    t,
                    &qh[h],
                    &kh[h],
                    &v[h],
                    [&q[h], &vec![k[h].clone()]],
                    scale,
                    pooled,
                    &mut out[h],
                );
            }
        }
        out
    }

    fn block(&self) -> usize {
        match &self.far {
            FarFormula::Ward { block, .. } => *block,
            FarFormula::Merged(received) => received.block,
            _ => 1,
        }
    }

    fn arrive(
        &self,
        state: &mut State,
        t: usize,
        qh: &[Array2<f64>],
        kh: &Array2<f64>,
        v: &Array2<f64>,
    ) {
        if t < self.sinks {
            state.sinks.push(t);
            return;
        }
        state.window.push((t, 0.0));
        if state.seen < 64 {
            state.seen += 1;
            state.value_squares += v.row(t).dot(&v.row(t));
            for q in qh {
                state.query_squares += &q.row(t).mapv(|x| x * x);
            }
        }
        if state.window.len() > self.window + self.block() - 1 {
            let leaving: Vec<(usize, f64)> = state.window.drain(..self.block()).collect();
            for token in leaving {
                self.leave(state, token, kh, v);
            }
        }
    }

    /// A token leaves the window: to the heavy keys, if its score is among the largest; the one it
    /// displaces goes on.
    fn leave(&self, state: &mut State, token: (usize, f64), kh: &Array2<f64>, v: &Array2<f64>) {
        let mut token = token;
        if self.heavy > 0 {
            let score = |j: usize| self.calibration.as_ref().unwrap().static_score(kh.row(j));
            if state.heavy.len() < self.heavy {
                state.heavy.push(token);
                return;
            }
            let all = 0..state.heavy.len();
            let least = all
                .min_by(|&a, &b| score(state.heavy[a].0).total_cmp(&score(state.heavy[b].0)))
                .unwrap();
            if score(token.0) > score(state.heavy[least].0) {
                std::mem::swap(&mut token, &mut state.heavy[least]);
            }
        }
        let (j, received) = token;
        state.gone.push(j);
        let weight = match &self.far {
            FarFormula::Merged(_) => received + 1e-9,
            FarFormula::WardCalibrated { .. } => {
                self.calibration.as_ref().unwrap().expected_attention(kh.row(j))
            }
            _ => 1.0,
        };
        state.entries.push(Entry {
            key: kh.row(j).to_owned(),
            value: v.row(j).to_owned(),
            count: 1.0,
            weight,
        });
    }

    fn cost(&self, state: &State, i: usize, j: usize) -> f64 {
        let (a, b) = (&state.entries[i], &state.entries[j]);
        let dk = &a.key - &b.key;
        let dv = &a.value - &b.value;
        let distance = match &self.far {
            FarFormula::Merged(received) => {
                let rho = state.value_squares / state.seen as f64;
                let mean = state.query_squares.mean().unwrap();
                let r = if received.diagonal {
                    &state.query_squares / mean
                } else {
                    Array1::ones(dk.len())
                };
                let keys = match &self.metric {
                    Some(metric) => metric.dot(&dk).mapv(|x| x * x).sum(),
                    None => (&dk * &dk).dot(&r),
                };
                keys + received.value_weight * dv.dot(&dv) / rho
            }
            FarFormula::WardCalibrated { metric, .. } => {
                let y = metric.dot(&dk);
                y.dot(&y)
            }
            _ => dk.dot(&dk),
        };
        a.weight * (b.weight / (a.weight + b.weight)) * distance
    }

    /// Reduces the lists, of each state or of all together.
    fn merge(&self, states: &mut [State], pooled: bool) {
        let (entries, block) = match &self.far {
            FarFormula::Ward { entries, block } => (*entries, *block),
            FarFormula::WardCalibrated { entries, .. } => (*entries, 1),
            FarFormula::Merged(received) => (received.entries, received.block),
            FarFormula::None | FarFormula::Features(_) | FarFormula::Taylor(..) => return,
        };
        let each = if pooled { states.len() } else { 1 };
        for states in states.chunks_mut(each) {
            let budget = entries * states.len();
            let least = if pooled { 4 } else { 1 };
            while states.iter().map(|s| s.entries.len()).sum::<usize>() > budget {
                let excess = states.iter().map(|s| s.entries.len()).sum::<usize>() - budget;
                let mut pairs = Vec::new();
                for (h, state) in states.iter().enumerate() {
                    let len = state.entries.len();
                    if len <= least {
                        continue;
                    }
                    let cost = |i: usize, j: usize| self.cost(state, i.min(j), i.max(j));
                    let nearest = |i: usize| {
                        let others = (0..len).filter(|&j| j != i);
                        others.min_by(|&a, &b| cost(i, a).total_cmp(&cost(i, b))).unwrap()
                    };
                    let all: Vec<usize> = (0..len).map(nearest).collect();
                    let mut own: Vec<(f64, usize, usize, usize)> = (0..len)
                        .filter(|&i| i < all[i] && all[all[i]] == i)
                        .map(|i| (cost(i, all[i]), h, i, all[i]))
                        .collect();
                    own.sort_by(|a, b| a.0.total_cmp(&b.0));
                    own.truncate(len - least);
                    pairs.extend(own);
                }
                pairs.sort_by(|a, b| a.0.total_cmp(&b.0).then((a.1, a.2).cmp(&(b.1, b.2))));
                pairs.truncate(if block == 1 { 1 } else { excess });
                assert!(!pairs.is_empty());
                let mut gone: Vec<(usize, usize)> = Vec::new();
                for (_, h, i, j) in pairs {
                    let list = &mut states[h].entries;
                    let (a, b) = (list[i].clone(), list[j].clone());
                    let total = a.weight + b.weight;
                    list[i] = Entry {
                        key: (&a.key * a.weight + &b.key * b.weight) / total,
                        value: (&a.value * a.weight + &b.value * b.weight) / total,
                        count: a.count + b.count,
                        weight: total,
                    };
                    gone.push((h, j));
                }
                gone.sort_unstable();
                for (h, j) in gone.into_iter().rev() {
                    let list = &mut states[h].entries;
                    _ = if block == 1 { list.swap_remove(j) } else { list.remove(j) };
                }
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn answer(
        &self,
        state: &mut State,
        t: usize,
        qh: &[Array2<f64>],
        kh: &Array2<f64>,
        v: &Array2<f64>,
        raw: [&Vec<Array2<f64>>; 2],
        scale: f64,
        pooled: bool,
        out: &mut [Array2<f64>],
    ) {
        let exact: Vec<usize> = state
            .sinks
            .iter()
            .copied()
            .chain(state.window.iter().chain(&state.heavy).map(|w| w.0))
            .collect();
        let slots = exact.len() + state.entries.len();
        let mut received = vec![0.0; slots];
        for (g, q) in qh.iter().enumerate() {
            let query = q.row(t);
            let mut logits: Vec<f64> = exact.iter().map(|&j| query.dot(&kh.row(j))).collect();
            let mut values: Vec<Array1<f64>> = exact.iter().map(|&j| v.row(j).to_owned()).collect();
            let mut signs = vec![1.0; logits.len()];
            match &self.far {
                FarFormula::None => {}
                FarFormula::Features(map) | FarFormula::Taylor(_, map) => {
                    let (fq, lq) = features(&**map, &raw[0][g], scale, false);
                    let (fk, lk) = features(&**map, &raw[1][0], scale, true);
                    for &j in &state.gone {
                        let product = fq.row(t).dot(&fk.row(j));
                        logits.push(product.abs().ln() + lq[t] + lk[j]);
                        values.push(v.row(j).to_owned());
                        signs.push(product.signum());
                    }
                }
                _ => {
                    for entry in &state.entries {
                        logits.push(query.dot(&entry.key) + entry.count.ln());
                        values.push(entry.value.clone());
                        signs.push(1.0);
                    }
                }
            }
            let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> =
                logits.iter().zip(&signs).map(|(x, s)| s * (x - largest).exp()).collect();
            let total: f64 = weights.iter().sum();
            for (weight, value) in weights.iter().zip(&values) {
                out[g].row_mut(t).scaled_add(weight / total, value);
            }
            received.iter_mut().zip(&weights).for_each(|(sum, w)| *sum += w / total);
        }
        let FarFormula::Merged(rule) = &self.far else { return };
        if pooled {
            let mass: f64 = received[state.sinks.len()..].iter().sum();
            if mass > 0.0 {
                received.iter_mut().for_each(|p| *p *= qh.len() as f64 / mass);
            }
        }
        let (sinks, window) = (state.sinks.len(), state.window.len());
        for ((j, own), p) in state.window.iter_mut().zip(&received[sinks..]) {
            *own = rule.gamma * *own + if t - *j >= rule.min_age { *p } else { 0.0 };
        }
        for ((_, own), p) in state.heavy.iter_mut().zip(&received[sinks + window..]) {
            *own = rule.gamma * *own + p;
        }
        for (entry, p) in state.entries.iter_mut().zip(&received[exact.len()..]) {
            entry.weight = rule.gamma * entry.weight + p;
        }
    }

    /// Every query sees every key: those behind the sinks have all gone to the far memory, in
    /// order.
    pub fn full(
        &self,
        q: &Array2<f64>,
        k: &Array2<f64>,
        v: &Array2<f64>,
        scale: f64,
    ) -> Array2<f64> {
        assert_eq!(self.window, 0);
        let root = scale.sqrt();
        let (qh, kh) = (q * root, k * root);
        let mut states = [State::new(k.ncols())];
        for t in 0..k.nrows() {
            self.arrive(&mut states[0], t, &[], &kh, v);
            self.merge(&mut states, false);
        }
        let [mut state] = states;
        for (j, _) in state.window.drain(..) {
            state.entries.push(Entry {
                key: kh.row(j).to_owned(),
                value: v.row(j).to_owned(),
                count: 1.0,
                weight: 1.0,
            });
        }
        let mut states = [state];
        self.merge(&mut states, false);
        let [state] = states;
        let mut out = Array2::zeros((q.nrows(), v.ncols()));
        let (fq, lq) = match &self.far {
            FarFormula::Features(map) | FarFormula::Taylor(_, map) => {
                features(&**map, q, scale, false)
            }
            _ => (Array2::zeros((0, 0)), Array1::zeros(0)),
        };
        for t in 0..q.nrows() {
            let mut all: Vec<(f64, f64, Array1<f64>)> = state
                .sinks
                .iter()
                .chain(state.heavy.iter().map(|h| &h.0))
                .map(|&j| (qh.row(t).dot(&kh.row(j)), 1.0, v.row(j).to_owned()))
                .collect();
            match &self.far {
                FarFormula::None => {}
                FarFormula::Features(map) | FarFormula::Taylor(_, map) => {
                    let (fk, lk) = features(&**map, k, scale, true);
                    for &j in &state.gone {
                        let product = fq.row(t).dot(&fk.row(j));
                        all.push((
                            product.abs().ln() + lq[t] + lk[j],
                            product.signum(),
                            v.row(j).to_owned(),
                        ));
                    }
                }
                _ => {
                    for e in &state.entries {
                        all.push((qh.row(t).dot(&e.key) + e.count.ln(), 1.0, e.value.clone()));
                    }
                }
            }
            let largest = all.iter().fold(f64::NEG_INFINITY, |m, x| m.max(x.0));
            let total: f64 = all.iter().map(|(x, sign, _)| sign * (x - largest).exp()).sum();
            for (x, sign, value) in all {
                out.row_mut(t).scaled_add(sign * (x - largest).exp() / total, &value);
            }
        }
        out
    }
}

impl State {
    fn new(d: usize) -> Self {
        Self {
            sinks: Vec::new(),
            window: Vec::new(),
            heavy: Vec::new(),
            gone: Vec::new(),
            entries: Vec::new(),
            seen: 0,
            value_squares: 0.0,
            query_squares: Array1::zeros(d),
        }
    }
}
