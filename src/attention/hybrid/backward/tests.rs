//! Gradients by merged entries against the formula, given what a forward pass decided.
#![allow(clippy::cast_precision_loss)]

use crate::attention::Attention;
use crate::attention::call::Head;
use crate::attention::gradient::HeadGradient;
use crate::attention::hybrid::HybridAttention;
use crate::attention::hybrid::backward::log::{Log, Recorder};
use crate::attention::hybrid::builder::HybridBuilder;
use crate::attention::hybrid::config::FarKind;
use crate::attention::hybrid::far::Far;
use crate::attention::hybrid::far::merged::Merged;
use crate::attention::hybrid::far::ward::Ward;
use crate::attention::hybrid::state::{HybridScratch, HybridState};
use crate::attention::naive::gradient::{Mean, means_gradient};
use crate::attention::naive::hybrid::{Held, Near as NaiveNear};
use crate::attention::naive::options::Options;
use crate::attention::scratch::Scratch;
use crate::calibration::Calibration;
use crate::calibration::options::CalibrationOptions;
use crate::kernel::buffer::Buffer;
use crate::mask::Mask;
use crate::memory::linear::checkpoints::SumCheckpoints;
use crate::memory::merged::rule::{MergeCost, Metric};
use crate::memory::scoring::SoftCap;
use crate::scalar::Scalar;
use ndarray::{Array1, Array2, Array3, ArrayView2, Axis};

const D: usize = 5;
const D_V: usize = 3;

/// Numbers that look random, from −2 to 2.
fn numbers(n: usize, d: usize, seed: usize) -> Array2<f64> {
    let number = |i: usize| {
        let x = (i as f64 * 12.9898 + seed as f64 * 78.233 + 1.0).sin() * 43_758.547;
        4.0 * (x - x.floor()) - 2.0
    };
    Array2::from_shape_fn((n, d), |(t, c)| number(t * d + c))
}

/// Heads of keys and values with some query heads each: arguments, cotangents, and gradients.
struct Call<T> {
    q: Array3<T>,
    k: Array2<T>,
    v: Array2<T>,
    d_out: Array3<T>,
    d_q: Array3<T>,
    d_k: Array2<T>,
    d_v: Array2<T>,
}

impl Call<f64> {
    fn new(group: usize, n: usize, seed: usize) -> Self {
        let heads = |d: usize, seed: usize| {
            numbers(group * n, d, seed).into_shape_with_order((group, n, d)).unwrap()
        };
        Self {
            q: heads(D, seed),
            k: numbers(n, D, seed + 1),
            v: numbers(n, D_V, seed + 2),
            d_out: heads(D_V, seed + 3),
            d_q: Array3::zeros((group, n, D)),
            d_k: Array2::zeros((n, D)),
            d_v: Array2::zeros((n, D_V)),
        }
    }
}

impl<T: Scalar> Call<T> {
    fn without_gradients(&self) -> Self {
        Self {
            q: self.q.clone(),
            k: self.k.clone(),
            v: self.v.clone(),
            d_out: self.d_out.clone(),
            d_q: Array3::zeros(self.d_q.dim()),
            d_k: Array2::zeros(self.d_k.dim()),
            d_v: Array2::zeros(self.d_v.dim()),
        }
    }

    fn head(&mut self) -> HeadGradient<'_, T> {
        HeadGradient::group(
            self.q.view(),
            [self.k.view(), self.v.view()],
            self.d_out.view(),
            self.d_q.view_mut(),
            [self.d_k.view_mut(), self.d_v.view_mut()],
        )
    }
}

/// What each step sees: exact tokens, and, if what leaves them is kept, means by the merges of the
/// log.
fn seen(near: &NaiveNear, keeps: bool, log: &Log<f64>, n: usize, mask: Mask) -> Vec<Vec<Mean>> {
    let (mut held, mut entries, mut absorbed) = (Held::default(), Vec::<Option<Mean>>::new(), 0);
    let mut merges = log.merges.iter().peekable();
    let mut all = Vec::new();
    for t in 0..=n {
        let leaving = match mask {
            _ if t < n => held.step(near, t),
            Mask::Causal | Mask::CausalTail => break,
            // a step of its own for what still waits for its block
            Mask::Full => held.window.drain(..).collect(),
        };
        if keeps {
            absorbed += leaving.len();
            entries.extend(leaving.into_iter().map(|j| Some(Mean::token(j))));
        }
        while let Some(merge) = merges.next_if(|merge| merge.absorbed as usize <= absorbed) {
            let [i, j] = merge.pair.map(usize::from);
            let mean =
                entries[i].as_ref().unwrap().merge(entries[j].as_ref().unwrap(), merge.share);
            entries[i] = Some(mean);
            entries[j] = None;
            if near.block == 1 {
                entries.swap_remove(j);
            }
        }
        entries.retain(Option::is_some);
        let exact = held.exact().into_iter().map(Mean::token);
        all.push(exact.chain(entries.iter().flatten().cloned()).collect());
    }
    assert!(merges.next().is_none());
    match mask {
        Mask::Causal | Mask::CausalTail => all,
        Mask::Full => vec![all.pop().unwrap(); n],
    }
}

#[track_caller]
fn near_to(what: &str, found: ArrayView2<'_, f64>, exact: &Array2<f64>) {
    let size = exact.iter().fold(1e-3_f64, |m, x| m.max(x.abs()));
    let error = (&found - exact).iter().fold(0.0_f64, |m, x| m.max(x.abs()));
    assert!(error <= 1e-11 * size, "{what}: off by {error} of {size}");
}

fn check(what: &str, kernel: &HybridAttention<f64>, calls: &mut [Call<f64>], mask: Mask) {
    let config = &kernel.config;
    let mut recorder = Recorder::new();
    {
        let heads: Vec<_> = calls.iter_mut().map(Call::head).collect();
        let (mut state, mut scratch) = (HybridState::new(), HybridScratch::new());
        recorder.record(config, &heads, mask, &mut state, &mut scratch).unwrap();
    }
    let parameters = Attention::<f64>::parameters(kernel);
    let mut d_sinks = vec![parameters.zeros_like(); calls.len()];
    let mut outs: Vec<Array3<f64>> = calls.iter().map(|c| Array3::zeros(c.d_out.dim())).collect();
    let heads = calls.iter().zip(&mut outs);
    let mut heads: Vec<_> = heads
        .map(|(c, out)| Head::group(c.q.view(), c.k.view(), c.v.view(), out.view_mut()))
        .collect();
    kernel.forward_heads(&mut heads, mask, &mut Scratch::new()).unwrap();
    let mut kept: Vec<_> = calls.iter().map(|_| SumCheckpoints::new()).collect();
    let heads = heads.iter_mut().zip(&mut kept);
    let mut heads: Vec<_> = heads.map(|(h, kept)| h.reborrow().with_checkpoints(kept)).collect();
    kernel.forward_heads(&mut heads, mask, &mut Scratch::new()).unwrap();
    let heads = calls.iter_mut().zip(&mut d_sinks);
    let mut heads: Vec<_> = heads.map(|(c, d)| c.head().with_parameters(d)).collect();
    kernel.backward_heads(&mut heads, mask, &mut Scratch::new()).unwrap();
    drop(heads);

    // with what the forward pass kept, bit for bit the same
    let merges = matches!(config.far, FarKind::Merged { .. }) && mask != Mask::Full;
    assert!(kept.iter().all(|kept| kept.is_empty() != merges), "{what}");
    let mut again: Vec<_> = calls.iter().map(Call::without_gradients).collect();
    let heads = again.iter_mut().zip(&kept);
    let mut heads: Vec<_> = heads.map(|(c, kept)| c.head().with_checkpoints(kept)).collect();
    kernel.backward_heads(&mut heads, mask, &mut Scratch::new()).unwrap();
    drop(heads);
    for (call, again) in calls.iter().zip(&again) {
        assert_eq!((&call.d_q, &call.d_k, &call.d_v), (&again.d_q, &again.d_k, &again.d_v));
    }
    // and what another kernel kept is of no use, and does no harm
    let other = HybridAttention::<f64>::builder(D).window(2).far(Merged::new(3)).build().unwrap();
    let mut others = SumCheckpoints::new();
    let Call { q, k, v, .. } = &calls[0];
    let mut out = Array3::zeros((q.dim().0, q.dim().1, D_V));
    let head = Head::group(q.view(), k.view(), v.view(), out.view_mut());
    other
        .forward_heads(&mut [head.with_checkpoints(&mut others)], Mask::Causal, &mut Scratch::new())
        .unwrap();
    for of_first in [&others, &kept[0]] {
        let mut again: Vec<_> = calls.iter().map(Call::without_gradients).collect();
        let all = core::iter::once(of_first).chain(core::iter::repeat(&others));
        let heads = again.iter_mut().zip(all);
        let mut heads: Vec<_> = heads.map(|(c, kept)| c.head().with_checkpoints(kept)).collect();
        kernel.backward_heads(&mut heads, mask, &mut Scratch::new()).unwrap();
        drop(heads);
        assert!(calls.iter().zip(&again).all(|(call, again)| call.d_k == again.d_k), "{what}");
    }

    for (h, (call, log)) in calls.iter().zip(&recorder.logs).enumerate() {
        let n = call.k.nrows();
        let scores = match &config.scores {
            Some(_) => {
                let mut scratch = [Buffer::new(), Buffer::new()];
                let keys = call.k.outer_iter();
                keys.map(|k| config.static_score(k.iter().copied(), &mut scratch)).collect()
            }
            None => Array1::zeros(0),
        };
        let near = NaiveNear {
            sinks: config.sinks,
            window: config.window,
            block: config.block,
            heavy: config.heavy,
            scores,
        };
        let keeps = matches!(config.far, FarKind::Merged { .. });
        let seen = seen(&near, keeps, log, n, mask);
        let [mut d_k, mut d_v] = [call.k.dim(), call.v.dim()].map(Array2::zeros);
        let mut d_sink = vec![0.0; config.sink_logits.len()];
        for (g, q) in call.q.outer_iter().enumerate() {
            let options = Options {
                soft_cap: config.soft_cap.map(SoftCap::cap),
                sink_logit: config.sink_logit(g),
            };
            let of = |x: &Array3<f64>| x.index_axis(Axis(0), g).to_owned();
            let x = [&q.to_owned(), &call.k, &call.v];
            let (out, d) = means_gradient(x, &of(&call.d_out), config.scale, options, &seen);
            let what = format!("{what}, head {h}, query head {g}");
            near_to(&format!("{what}: out"), of(&outs[h]).view(), &out);
            near_to(&format!("{what}: d_q"), of(&call.d_q).view(), &d.q);
            d_k += &d.k;
            d_v += &d.v;
            let place = if d_sink.len() > 1 { g } else { 0 };
            d_sink.iter_mut().skip(place).take(1).for_each(|sum| *sum += d.sink_logit);
        }
        near_to(&format!("{what}, head {h}: d_k"), call.d_k.view(), &d_k);
        near_to(&format!("{what}, head {h}: d_v"), call.d_v.view(), &d_v);
        if let Some(found) = d_sinks[h].get("sink_logits") {
            let found = Array2::from_shape_vec((1, d_sink.len()), found.iter().copied().collect());
            let exact = Array1::from(d_sink).insert_axis(Axis(0));
            near_to(&format!("{what}: sinks"), found.unwrap().view(), &exact);
        }
    }
}

fn builder(window: usize, sinks: usize) -> HybridBuilder<f64> {
    HybridAttention::builder(D).window(window).sinks(sinks)
}

fn calibration() -> Calibration {
    let [q, k] = [0, 1].map(|seed| numbers(300, D, seed + 50));
    let options = CalibrationOptions::new().with_window(8).with_sinks(1);
    Calibration::from_samples(q.view(), k.view(), options).unwrap()
}

/// Entries that are weighted by the attention received, of every rule, with heavy keys, caps and
/// sinks.
#[test]
fn merged_entries_hand_gradients_on() {
    let ward = MergeCost::Ward { value_weight: 4.0 };
    let calibration = calibration();
    let kernels = [
        ("merged", builder(9, 2).far(Merged::new(6).min_age(2))),
        ("window 40", builder(40, 1).far(Merged::new(3))),
        ("one entry", builder(1, 1).far(Merged::new(1).decay(0.9))),
        ("no window", builder(0, 0).far(Merged::new(5).block(2))),
        ("blocks", builder(7, 2).far(Merged::new(6).block(4).cost(ward))),
        ("large blocks", builder(3, 0).far(Merged::new(4).block(40))),
        ("identity", builder(5, 0).far(Merged::new(7).metric(Metric::Identity).cost(ward))),
        ("cap", builder(6, 2).far(Merged::new(6)).soft_cap(1.5)),
        ("sink", builder(6, 2).far(Merged::new(6)).sink_logit(0.3)),
        ("heavy", builder(6, 2).far(Merged::new(6)).heavy(4).calibrated(&calibration)),
        ("heavy in blocks", {
            let far = Merged::new(6).block(5);
            builder(6, 0).far(far).heavy(3).calibrated(&calibration)
        }),
        ("ward", builder(6, 2).far(Ward::new(6).calibrated(&calibration))),
        ("ward in blocks", builder(6, 2).far(Ward::new(6).block(3).calibrated(&calibration))),
    ];
    for (name, builder) in kernels {
        let kernel = builder.build().unwrap();
        for n in [1, 2, 7, 31, 32, 33, 64, 100, 150] {
            for group in [1, 3] {
                let mut calls = [Call::new(group, n, n + group)];
                check(&format!("{name} n={n}"), &kernel, &mut calls, Mask::Causal);
            }
        }
    }
    // more steps than the parts of one cut have, and sinks of each query head
    let far = Merged::new(6);
    let kernel = builder(6, 1).far(far).sink_logits(vec![0.3, -1.0]).build().unwrap();
    check("long", &kernel, &mut [Call::new(2, 1100, 3)], Mask::Causal);
}

/// Where every query sees every key, what still waits for its block leaves in the end.
#[test]
fn full_masks_hand_gradients_on() {
    let calibration = calibration();
    let far = || Ward::new(6).calibrated(&calibration);
    let kernels = [
        ("ward", builder(0, 2).far(far())),
        ("blocks", builder(0, 0).far(far().block(7))),
        ("heavy", builder(0, 1).far(far().block(3)).heavy(4).calibrated(&calibration)),
        ("heavy alone", builder(0, 1).far(Far::none()).heavy(4).calibrated(&calibration)),
        ("sinks", builder(0, 3).far(Far::none()).sink_logit(0.2)),
    ];
    for (name, builder) in kernels {
        let kernel = builder.build().unwrap();
        for n in [1, 2, 7, 32, 33, 100, 150] {
            let mut calls = [Call::new(2, n, n)];
            check(&format!("{name} n={n}"), &kernel, &mut calls, Mask::Full);
        }
    }
}

/// Heads of keys and values that share one budget.
#[test]
fn pools_hand_gradients_on() {
    for block in [1, 4] {
        let kernel = builder(5, 1).far(Merged::new(6).block(block)).build().unwrap();
        let mut calls: Vec<_> = (0..3).map(|h| Call::new(2, 90, 20 * h)).collect();
        calls[1].k.mapv_inplace(|x| 0.2 * x); // it takes fewer of the entries
        check(&format!("a pool, block {block}"), &kernel, &mut calls, Mask::Causal);
    }
    // entries go from one head to the others, several in a step
    let kernel = builder(3, 1).far(Merged::new(20)).build().unwrap();
    let mut calls: Vec<_> = (0..3).map(|h| Call::new(1, 260, 20 * h)).collect();
    for (h, call) in calls.iter_mut().enumerate() {
        for (t, mut k) in call.k.outer_iter_mut().enumerate() {
            k *= if (t / 80) % 3 == h { 1.0 } else { 1e-3 };
        }
    }
    check("a pool that moves", &kernel, &mut calls, Mask::Causal);
}
