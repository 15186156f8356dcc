//! Kernels whose formula is written out as a function: those that know positions, and Linformer.

use super::{Formula, Subject, Written, features, linear_floats, map, normal};
use dijiang::attention::naive::{self, features::identity, linear, positional};
use dijiang::{
    Attention, CosFormer, FixedGates, LinearAttention, Linformer, Mask, Retention, Rotary,
    RotaryAttention, RotaryPairs, Scalar,
};
use ndarray::Array2;
use std::rc::Rc;
use std::sync::Arc;

/// Every kernel of this kind, around some of the others.
pub fn written(d: usize, others: Vec<Subject>) -> Vec<Subject> {
    let even = d - d % 2;
    let rotaries = [
        Rotary::partial(d, even).unwrap(),
        Rotary::partial(d, even)
            .unwrap()
            .with_base(20.0)
            .unwrap()
            .with_pairs(RotaryPairs::Interleaved),
        Rotary::partial(d, even / 2 - even / 2 % 2).unwrap().with_base(100.0).unwrap(),
    ];
    let others = others.into_iter().chain([cosformer(d, 1000, 0.1)]);
    let turned = others.enumerate().map(|(i, other)| turned(rotaries[i % 3].clone(), other));
    let cosines = [cosformer(d, 200, 1e-6), cosformer(d, 1_000_000, 0.001), cosformer(d, 180, 0.5)];
    let linformers =
        [linformer(d, 1, 130, 0.7), linformer(d, 5, 200, 0.1), linformer(d, 40, 131, 2.0)];
    turned.chain(cosines).chain(linformers).chain(retentions(d)).chain(decays(d)).collect()
}

/// Linear attention whose sums decay, by one number, by one for each feature, and by what comes
/// with the tokens.
fn decays(d: usize) -> Vec<Subject> {
    let gates = |columns, strength| {
        let mut gates =
            normal::<f64>(200, columns, strength, 9).mapv(|x| f64::from((-x.abs()) as f32));
        gates.row_mut(3).fill(f64::NEG_INFINITY);
        gates.row_mut(67)[0] = f64::NEG_INFINITY;
        gates.row_mut(68).fill(0.0);
        gates
    };
    let constant = Array2::from_elem((1, 1), (1.0 - 1.0 / 32.0_f64).ln());
    let channels = normal::<f64>(1, d, 0.1, 8).mapv(|x| -x.abs());
    let all = |name, normalized: bool| {
        [
            decayed(name, d, normalized, constant.clone()),
            decayed(name, d, normalized, channels.clone()),
            decayed(name, d, normalized, gates(1, 0.1)),
            decayed(name, d, normalized, gates(d, 0.1)),
            decayed(name, d, normalized, gates(d, 4.0)),
        ]
    };
    ["elu", "relu"]
        .into_iter()
        .flat_map(|name| all(name, true))
        .chain(all("identity", false))
        .collect()
}

/// With log decays `[1 or tokens, 1 or d]`: a single row is one of the kernel.
fn decayed(name: &str, d: usize, normalized: bool, log_decay: Array2<f64>) -> Subject {
    fn kernel<T: Scalar>(
        name: &str,
        d: usize,
        normalized: bool,
        log_decay: &Array2<f64>,
    ) -> Arc<dyn Attention<T>> {
        let kernel = LinearAttention::new(map::<T>(name, d, d, 5)).with_scale(1.0);
        let kernel = if normalized { kernel } else { kernel.unnormalized() };
        match log_decay.dim() {
            (1, 1) => Arc::new(kernel.with_decay(log_decay[[0, 0]].exp())),
            (1, _) => Arc::new(kernel.with_channel_decay(log_decay.row(0).mapv(f64::exp))),
            _ => Arc::new(FixedGates::new(kernel.gated(), log_decay.mapv(T::from_f64))),
        }
    }
    let map = map::<f64>(name, d, d, 5);
    let is_of_features = log_decay.nrows() == 1 && log_decay.ncols() > 1;
    Subject {
        name: format!("decayed {name} d={d} normalized={normalized} {:?}", log_decay.dim()),
        head_dim: d,
        f64: kernel(name, d, normalized, &log_decay),
        f32: kernel(name, d, normalized, &log_decay),
        positive: normalized,
        scale: 1.0,
        formula: Formula::Written(Written {
            masks: &[Mask::Causal],
            normalized,
            has_features: true,
            // where every feature has a decay of its own, no token waits
            state: Box::new(move |dv, _| match is_of_features {
                true => 2 * d * (dv + 1) + 2,
                false => linear_floats(d, dv) + 1,
            }),
            output: Box::new(move |[q, k, v], _| {
                let phi_q = features(&*map, q, 1.0, false).absolute();
                let phi_k = features(&*map, k, 1.0, true).absolute();
                if normalized {
                    linear::gated(&phi_q, &phi_k, v, &log_decay)
                } else {
                    linear::gated_unnormalized(&phi_q, &phi_k, v, &log_decay)
                }
            }),
        }),
    }
}

/// The columns that turn together, and their angles.
pub fn paired(pairs: RotaryPairs, angles: &[f64]) -> Vec<positional::Pair> {
    match pairs {
        RotaryPairs::Halves => positional::halves(angles),
        _ => positional::interleaved(angles),
    }
}

/// A kernel with rotary position embedding inside.
fn turned(rotary: Rotary, other: Subject) -> Subject {
    let name = format!(
        "rotary {} of {} {:?} {}",
        rotary.dims(),
        rotary.head_dim(),
        rotary.pairs(),
        other.name
    );
    let (dims, pairs) = (rotary.dims(), rotary.pairs());
    // θ_1 = base^(−2/dims)
    let base = rotary.frequencies().get(1).map_or(1.0, |second| second.powf(-0.5 * dims as f64));
    let other = Rc::new(other);
    let inner = Rc::clone(&other);
    Subject {
        name,
        head_dim: other.head_dim,
        f64: Arc::new(RotaryAttention::new(rotary.clone(), other.f64.clone())),
        f32: Arc::new(RotaryAttention::new(rotary, other.f32.clone())),
        positive: other.positive,
        scale: other.scale,
        formula: Formula::Written(Written {
            masks: other.masks(),
            normalized: other.normalized(),
            has_features: other.has_features(),
            state: Box::new(move |dv, tokens| other.state_floats(dv, tokens)),
            output: Box::new(move |[q, k, v], mask| {
                let pairs = paired(pairs, &positional::rotary_angles(dims, base));
                let [q, k] = [q, k].map(|x| positional::rotate(x, 0, &pairs));
                inner.oracle(&q, &k, v, mask)
            }),
        }),
    }
}

fn cosformer(d: usize, max_len: usize, epsilon: f64) -> Subject {
    fn kernel<T: Scalar>(d: usize, max_len: usize, epsilon: f64) -> Arc<dyn Attention<T>> {
        Arc::new(CosFormer::new(d, max_len).unwrap().with_epsilon(epsilon).unwrap())
    }
    Subject {
        name: format!("cosformer d={d} max_len={max_len} epsilon={epsilon}"),
        head_dim: d,
        f64: kernel(d, max_len, epsilon),
        f32: kernel(d, max_len, epsilon),
        positive: true,
        scale: 1.0,
        formula: Formula::Written(Written {
            masks: &[Mask::Causal, Mask::Full],
            normalized: true,
            has_features: true,
            state: Box::new(move |dv, _| linear_floats(2 * d, dv)),
            output: Box::new(move |[q, k, v], mask| {
                positional::cosformer(q, k, v, max_len, epsilon, mask)
            }),
        }),
    }
}

/// What retention is made of.
#[derive(Clone)]
pub struct RetentionFormula {
    pub decay: f64,
    pub scale: f64,
    pub pairs: Vec<positional::Pair>,
    /// ζ of each pair, 1 without xPos.
    pub zeta: Vec<f64>,
    pub head_dim: usize,
}

impl RetentionFormula {
    /// Of a dimension that is even or leaves the last column alone, with an angle for each pair.
    pub fn new(
        d: usize,
        decay: f64,
        scale: f64,
        pairs: RotaryPairs,
        xpos: bool,
        angles: &[f64],
    ) -> Self {
        let zeta = if xpos { positional::xpos(d / 2) } else { vec![1.0; d / 2] };
        Self { decay, scale, head_dim: d, pairs: paired(pairs, angles), zeta }
    }

    pub fn output(&self, [q, k, v]: [&Array2<f64>; 3], mask: Mask) -> Array2<f64> {
        if mask == Mask::Causal {
            return positional::retention(q, k, v, self.scale, self.decay, &self.pairs, &self.zeta);
        }
        // without decay there is a full form
        let [q, k] = [q, k].map(|x| identity(&positional::rotate(x, 0, &self.pairs)));
        linear::unnormalized(&q, &k, v, mask) * self.scale
    }
}

fn retentions(d: usize) -> Vec<Subject> {
    let (even, usual) = (d - d % 2, 1.0 / (d as f64).sqrt());
    let (released, su) = (positional::retention_angles(d), positional::rotary_angles(even, 300.0));
    let rotary =
        |pairs| Rotary::partial(d, even).unwrap().with_base(300.0).unwrap().with_pairs(pairs);
    let interleaved = RotaryPairs::Interleaved;
    let formula =
        |decay, scale, pairs, xpos| RetentionFormula::new(d, decay, scale, pairs, xpos, &released);
    let own = |decay, scale, pairs, xpos| RetentionFormula::new(d, decay, scale, pairs, xpos, &su);
    vec![
        retention(formula(0.9, usual, interleaved, false), None, false),
        retention(formula(0.9375, 0.5, interleaved, true), None, true),
        retention(formula(0.0, 1.0, interleaved, true), None, true),
        retention(formula(1.0, 1.0, interleaved, false), None, false),
        retention(
            own(1.0, usual, RotaryPairs::Halves, true),
            Some(rotary(RotaryPairs::Halves)),
            true,
        ),
        retention(
            own(0.98, usual, RotaryPairs::Halves, false),
            Some(rotary(RotaryPairs::Halves)),
            false,
        ),
        retention(own(0.999, 2.0, interleaved, true), Some(rotary(interleaved)), true),
    ]
}

/// The kernel of a formula.
pub fn retention_kernel<T: Scalar>(
    formula: &RetentionFormula,
    rotary: Option<&Rotary>,
    xpos: bool,
) -> Retention<T> {
    let kernel = Retention::new(formula.head_dim, formula.decay).unwrap().with_scale(formula.scale);
    let kernel = if xpos { kernel.with_xpos() } else { kernel };
    match rotary {
        Some(rotary) => kernel.with_rotary(rotary.clone()).unwrap(),
        None => kernel,
    }
}

fn retention(formula: RetentionFormula, rotary: Option<Rotary>, xpos: bool) -> Subject {
    let (d, decays) = (formula.head_dim, formula.decay < 1.0 || xpos);
    Subject {
        name: format!("retention d={d} decay={} xpos={xpos} {rotary:?}", formula.decay),
        head_dim: d,
        f64: Arc::new(retention_kernel(&formula, rotary.as_ref(), xpos)),
        f32: Arc::new(retention_kernel(&formula, rotary.as_ref(), xpos)),
        positive: false,
        scale: formula.scale,
        formula: Formula::Written(Written {
            masks: if decays { &[Mask::Causal] } else { &[Mask::Causal, Mask::Full] },
            normalized: false,
            has_features: true,
            state: Box::new(move |dv, _| match (decays, xpos) {
                (_, true) => 2 * d * (dv + 1) + 2,
                (true, false) => linear_floats(d, dv) + 1,
                (false, false) => linear_floats(d, dv),
            }),
            output: Box::new(move |inputs, mask| formula.output(inputs, mask)),
        }),
    }
}

fn linformer(d: usize, rank: usize, max_len: usize, scale: f64) -> Subject {
    let [e, f] = [1, 2].map(|seed| normal::<f64>(rank, max_len, 0.3, seed));
    // rounded to f32 first, so that both number types have the same
    let [e, f] = [e, f].map(|x| x.mapv(|x| x as f32));
    fn kernel<T: Scalar>(d: usize, [e, f]: [&Array2<f32>; 2], scale: f64) -> Arc<dyn Attention<T>> {
        let [e, f] = [e, f].map(|x| x.mapv(|x| T::from_f64(x.as_f64())));
        Arc::new(Linformer::from_projections(d, e, f).unwrap().with_scale(scale))
    }
    Subject {
        name: format!("linformer d={d} rank={rank} max_len={max_len}"),
        head_dim: d,
        f64: kernel(d, [&e, &f], scale),
        f32: kernel(d, [&e, &f], scale),
        positive: false,
        scale,
        formula: Formula::Written(Written {
            masks: &[Mask::Full],
            normalized: false,
            has_features: false,
            state: Box::new(|_, _| 0),
            output: Box::new(move |[q, k, v], _| {
                let [e, f] = [&e, &f].map(|x| x.mapv(f64::from));
                naive::linformer(q, k, v, [&e, &f], scale)
            }),
        }),
    }
}
