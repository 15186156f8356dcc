//! What models change of the softmax: soft caps, learned sinks, linear biases.

use crate::common::checker::feed;
use crate::common::hybrid::{FarFormula, HybridFormula};
use crate::common::{RECEIVED, assert_close, hybrid, normal, tokens, wide};
use dijiang::attention::naive;
use dijiang::attention::naive::options::{Options, alibi, soft_capped, with_sink};
use dijiang::fidelity::Reference;
use dijiang::{
    Attention, Calibration, CalibrationOptions, Error, ExactMemory, Far, HybridAttention, Mask,
    Memory, MultiHead, Partial, Performer, Scalar, SoftmaxAttention, StateFormat, StreamOptions,
    alibi_slopes,
};
use ndarray::{Array2, Array4, Axis, s};
use std::sync::Arc;

fn softmax<T: Scalar>(d: usize) -> SoftmaxAttention<T> {
    SoftmaxAttention::new(d).unwrap()
}

/// The formula of everything together.
fn formula(
    [q, k, v]: [&Array2<f64>; 3],
    Options { soft_cap, sink_logit }: Options,
    slope: f64,
    mask: Mask,
) -> Array2<f64> {
    let scores = naive::scores(q, k, 1.0 / (q.ncols() as f64).sqrt());
    let logs = alibi(scores.mapv(|score| soft_capped(score, soft_cap)), slope, mask);
    with_sink(&logs, v, sink_logit, mask)
}

/// Scores of any size under usual caps: errors of the type, relative to the largest output.
fn check_capped<T: Scalar>(units: f64) {
    for (cap, size) in
        [(50.0, 0.01), (50.0, 1.0), (50.0, 10.0), (30.0, 100.0), (50.0, 1e6), (1.0, 1e15)]
    {
        let input = tokens::<T>(150, 16, 5, size, 3);
        let [q, k, v] = input.each_ref().map(wide);
        let kernel = softmax::<T>(16).with_soft_cap(cap).unwrap();
        let options = Options { soft_cap: Some(cap), sink_logit: None };
        for mask in [Mask::Causal, Mask::Full] {
            let exact = formula([&q, &k, &v], options, 0.0, mask);
            let out =
                kernel.forward(input[0].view(), input[1].view(), input[2].view(), mask).unwrap();
            // Exponents of up to the cap carry their rounding.
            assert_close(&format!("{cap} {size} {mask:?}"), &out, &exact, units);
            if mask == Mask::Causal {
                let mut stream = kernel.stream(5).unwrap();
                let out = feed(&mut *stream, &input, &[1; 150]);
                assert_close(&format!("{cap} {size} steps"), &out, &exact, units);
            }
        }
    }
}

#[test]
fn capped_scores_of_any_size() {
    check_capped::<f32>(200.0);
    check_capped::<f64>(400.0);
}

/// Without a cap that binds, nothing changes.
#[test]
fn a_high_cap_is_none() {
    let input = tokens::<f64>(70, 8, 3, 1.0, 1);
    let [q, k, v] = input.each_ref().map(|x| x.view());
    let plain = softmax(8).forward(q, k, v, Mask::Causal).unwrap();
    let high = softmax(8).with_soft_cap(1e9).unwrap().forward(q, k, v, Mask::Causal).unwrap();
    assert_close("cap of 1e9", &high, &plain, 64.0);
}

#[test]
fn bad_options_are_refused_at_once() {
    fn check<T: Scalar>() {
        let invalid = |error: Error, name: &str| {
            assert!(
                matches!(&error, Error::InvalidOption { which, .. } if *which == name),
                "{error}"
            );
        };
        for cap in [0.0, -1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e-320] {
            invalid(softmax::<T>(4).with_soft_cap(cap).unwrap_err(), "soft_cap");
            let builder = HybridAttention::<T>::builder(4).soft_cap(cap);
            invalid(builder.build().unwrap_err(), "soft_cap");
            let memory = ExactMemory::<T>::new(4, 2, 1.0).unwrap();
            invalid(memory.with_soft_cap(cap).unwrap_err(), "soft_cap");
        }
        for logit in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            invalid(softmax::<T>(4).with_sink_logit(logit).unwrap_err(), "sink_logit");
            let builder = HybridAttention::<T>::builder(4).sink_logit(logit);
            invalid(builder.build().unwrap_err(), "sink_logit");
            invalid(softmax::<T>(4).with_alibi_slope(logit).unwrap_err(), "slope");
        }
        invalid(softmax::<T>(4).with_alibi_slope(-0.1).unwrap_err(), "slope");
        let empty = Error::ZeroSize { which: "sink_logits" };
        assert_eq!(softmax::<T>(4).with_sink_logits(vec![]).unwrap_err(), empty);
        assert!(softmax::<T>(4).with_alibi_slopes(vec![]).is_err());
        assert!(HybridAttention::<T>::builder(4).sink_logits(vec![]).build().is_err());
    }
    check::<f32>();
    check::<f64>();
    assert!(softmax::<f32>(4).with_soft_cap(1e39).is_err());
    assert!(softmax::<f64>(4).with_soft_cap(1e39).is_ok());
    assert!(softmax::<f32>(4).with_sink_logit(1e39).is_err());
    assert!(softmax::<f32>(4).with_alibi_slope(1e39).is_err());
}

#[test]
fn sums_of_features_cannot_be_capped() {
    let [q, k, _] = tokens::<f64>(100, 4, 1, 0.7, 2);
    let options = CalibrationOptions::new().with_window(8).with_sinks(1);
    let calibration = Calibration::from_samples(q.view(), k.view(), options).unwrap();
    let builder = || HybridAttention::<f64>::builder(4).window(8).sinks(1).soft_cap(5.0);
    let features = builder().far(Far::features(Performer::new(4, 8, 0).unwrap()));
    let taylor = builder().far(Far::taylor(2)).calibrated(&calibration);
    for refused in [features, taylor] {
        let error = refused.build().unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains("plain score"), "{error}");
    }
    assert!(builder().far(Far::ward(4)).build().is_ok());
}

/// Where nothing has left the window, a hybrid is softmax attention; and cut anywhere, its bits are
/// the same.
#[test]
fn hybrids_with_options_agree_with_softmax_and_with_themselves() {
    let input = tokens::<f32>(90, 8, 3, 1.0, 4);
    let [q, k, v] = input.each_ref().map(|x| x.view());
    let builder = || HybridAttention::<f32>::builder(8).soft_cap(2.0).sink_logit(1.0);
    let exact = softmax(8).with_soft_cap(2.0).unwrap().with_sink_logit(1.0).unwrap();
    let exact = exact.forward(q, k, v, Mask::Causal).unwrap();
    let whole = builder().window(90).build().unwrap().forward(q, k, v, Mask::Causal).unwrap();
    assert_close("window of all", &whole, &wide(&exact), 32.0);
    for far in [Far::none(), Far::ward(5), Far::merged(5)] {
        let kernel = builder().window(10).sinks(2).far(far).build().unwrap();
        let whole = kernel.forward(q, k, v, Mask::Causal).unwrap();
        for size in [1, 7, 40] {
            let mut stream = kernel.stream(3).unwrap();
            assert_eq!(feed(&mut *stream, &input, &vec![size; 90]), whole, "pieces of {size}");
        }
    }
}

/// A memory of one's own caps its scores itself.
#[test]
fn a_far_memory_that_caps_its_scores() {
    let input = tokens::<f64>(60, 4, 2, 2.0, 5);
    let [q, k, v] = input.each_ref().map(|x| x.view());
    let far = Far::memory(|value_dim, scale| {
        Ok(Box::new(ExactMemory::<f64>::new(4, value_dim, scale)?.with_soft_cap(1.5)?))
    });
    let builder = HybridAttention::builder(4).window(5).sinks(1).far(far).soft_cap(1.5);
    let out = builder.build().unwrap().forward(q, k, v, Mask::Causal).unwrap();
    let exact = softmax(4).with_soft_cap(1.5).unwrap().forward(q, k, v, Mask::Causal).unwrap();
    assert_close("exact far memory", &out, &exact, 64.0);

    let mut capped = ExactMemory::<f64>::new(4, 2, 0.5).unwrap().with_soft_cap(1.5).unwrap();
    capped.absorb(k, v).unwrap();
    assert!(ExactMemory::new(4, 2, 0.5).unwrap().merge(&capped).is_err());
    let mut answer = Partial::new(60, 2).unwrap();
    capped.read(q, &mut answer).unwrap();
    let logs = naive::scores(&input[0], &input[1], 0.5).mapv(|s| soft_capped(s, Some(1.5)));
    let (_, log_normalizer) = naive::normalize(&logs, Mask::Full);
    let difference = &log_normalizer - &answer.log_normalizer();
    assert!(difference.iter().all(|e| e.abs() < 1e-13));
}

/// With a sink all-ones values give 1 minus what the sink takes.
#[test]
fn ones_and_a_sink() {
    let [q, k, _] = tokens::<f64>(40, 8, 1, 1.0, 6);
    let ones = Array2::ones((40, 1));
    for logit in [-800.0, -1.0, 0.0, 3.0, 800.0] {
        let kernels: [Box<dyn Attention<f64>>; 2] = [
            Box::new(softmax(8).with_sink_logit(logit).unwrap()),
            Box::new(HybridAttention::builder(8).window(40).sink_logit(logit).build().unwrap()),
        ];
        let scores = naive::scores(&q, &k, 1.0 / 8f64.sqrt());
        let (_, log_normalizer) = naive::normalize(&scores, Mask::Causal);
        for kernel in kernels {
            let out = kernel.forward(q.view(), k.view(), ones.view(), Mask::Causal).unwrap();
            for (out, log) in out.iter().zip(&log_normalizer) {
                let share = 1.0 / (1.0 + (logit - log).exp());
                assert!((out - share).abs() < 1e-14, "{logit}: {out} {share}");
            }
        }
    }
}

/// One sink and one slope for each query head: of a layer of single kernels, and of kernels for a
/// whole group.
#[test]
fn sinks_and_slopes_of_every_head() {
    let (heads, kv_heads, n, d) = (6, 2, 40, 8);
    let slopes = alibi_slopes(heads).unwrap();
    let logits: Vec<f64> = (0..heads).map(|h| h as f64 - 2.0).collect();
    let random = |h: usize, seed: u64| {
        let numbers = normal::<f64>(h * n, d, 1.0, seed).into_raw_vec_and_offset().0;
        Array4::from_shape_vec((1, h, n, d), numbers).unwrap()
    };
    let (q, k, v) = (random(heads, 1), random(kv_heads, 2), random(kv_heads, 3));
    let head = |x: &Array4<f64>, h: usize| x.slice(s![0, h, .., ..]).to_owned();
    let group = heads / kv_heads;

    let single = |h: usize| {
        let kernel = softmax::<f64>(d).with_sink_logit(logits[h]).unwrap();
        Arc::new(kernel.with_alibi_slope(slopes[h]).unwrap()) as Arc<dyn Attention<f64>>
    };
    let of_group = |kv: usize| {
        let heads = kv * group..(kv + 1) * group;
        let kernel = softmax::<f64>(d).with_sink_logits(logits[heads.clone()].to_vec()).unwrap();
        Arc::new(kernel.with_alibi_slopes(slopes[heads].to_vec()).unwrap())
            as Arc<dyn Attention<f64>>
    };
    let singles = MultiHead::per_head((0..heads).map(single).collect(), kv_heads).unwrap();
    let groups = (0..kv_heads).map(of_group).collect();
    let groups = MultiHead::per_kv_head(groups, heads).unwrap();
    // The layer of groups keeps each head of keys and values once.
    assert_eq!(groups.state_bytes(d, n).unwrap() * group, singles.state_bytes(d, n).unwrap());

    for mask in [Mask::Causal, Mask::Full] {
        for layer in [&singles, &groups] {
            let out = layer.forward(q.view(), k.view(), v.view(), mask, None).unwrap();
            for h in 0..heads {
                let [q, k, v] = [head(&q, h), head(&k, h / group), head(&v, h / group)];
                let options = Options { soft_cap: None, sink_logit: Some(logits[h]) };
                let exact = formula([&q, &k, &v], options, slopes[h], mask);
                assert_close(&format!("head {h} {mask:?}"), &head(&out, h), &exact, 64.0);
            }
        }
    }
    let whole = groups.forward(q.view(), k.view(), v.view(), Mask::Causal, None).unwrap();
    let mut stream = groups.stream(1, d).unwrap();
    let mut out = Array4::zeros((1, heads, 1, d));
    for t in 0..n {
        let at = s![.., .., t..=t, ..];
        stream.extend(q.slice(at), k.slice(at), v.slice(at), None, out.view_mut()).unwrap();
        let exact = head(&whole, 0).slice(s![t..=t, ..]).to_owned();
        assert_close(&format!("token {t}"), &head(&out, 0), &exact, 64.0);
    }

    // A kernel of three heads serves no other number.
    let kernel = softmax::<f64>(d).with_sink_logits(vec![0.0; 3]).unwrap();
    let (q, k) = (head(&q, 0), head(&k, 0));
    assert!(matches!(
        kernel.forward(q.view(), k.view(), k.view(), Mask::Full),
        Err(Error::Shape { which: "q", axis: "heads", expected: 3, found: 1 })
    ));
    assert!(kernel.stream(2).is_err());
    assert!(kernel.stream_with(StreamOptions::new(2).group(3)).is_ok());
    let hybrid = HybridAttention::<f64>::builder(d).sink_logits(vec![0.0; 3]).build().unwrap();
    assert!(hybrid.stream(2).is_err());
    assert!(hybrid.stream_with(StreamOptions::new(2).group(3)).is_ok());
}

/// The same of hybrids, whose entries learn from what all heads of the group read.
#[test]
fn sinks_of_every_head_of_a_hybrid() {
    let (group, n, d) = (3, 50, 4);
    let logits = [-1.0, 0.5, 3.0];
    let q = normal::<f64>(group * n, d, 1.0, 1).into_raw_vec_and_offset().0;
    let q = Array4::from_shape_vec((1, group, n, d), q).unwrap();
    let [_, k, v] = tokens::<f64>(n, d, 2, 1.0, 3);
    let alone = |x: &Array2<f64>| x.clone().insert_axis(Axis(0)).insert_axis(Axis(0));
    let (keys, values) = (alone(&k), alone(&v));
    let cases: [(FarFormula, usize, &[Mask]); 3] = [
        (FarFormula::None, 7, &[Mask::Causal]),
        (FarFormula::Ward { entries: 5, block: 2 }, 7, &[Mask::Causal]),
        (FarFormula::Ward { entries: 5, block: 2 }, 0, &[Mask::Full]),
    ];
    for (far, window, masks) in cases {
        let options = Options { soft_cap: Some(2.0), sink_logit: None };
        let formula = HybridFormula {
            window,
            sinks: 1,
            heavy: 0,
            far: far.clone(),
            calibration: None,
            metric: None,
            format: StateFormat::F32,
            options,
        };
        let builder = HybridAttention::<f64>::builder(d).window(window).sinks(1).soft_cap(2.0);
        let far = match far {
            FarFormula::Ward { entries, block } => dijiang::Ward::new(entries).block(block).into(),
            _ => Far::none(),
        };
        let kernel = builder.far(far).sink_logits(logits.to_vec()).build().unwrap();
        let layer = MultiHead::new(kernel, group, 1).unwrap();
        for &mask in masks {
            let out = layer.forward(q.view(), keys.view(), values.view(), mask, None).unwrap();
            for (h, logit) in logits.into_iter().enumerate() {
                let q = q.slice(s![0, h, .., ..]).to_owned();
                let options = Options { sink_logit: Some(logit), ..options };
                let formula = HybridFormula { options, ..formula.clone() };
                let exact = if mask == Mask::Full {
                    formula.full(&q, &k, &v, 0.5)
                } else {
                    let (k, v) = (std::slice::from_ref(&k), std::slice::from_ref(&v));
                    formula.causal(&[vec![q]], k, v, 0.5, false).remove(0).remove(0)
                };
                let found = out.slice(s![0, h, .., ..]).to_owned();
                assert_close(&format!("window {window}, head {h}"), &found, &exact, 256.0);
            }
        }
    }
}

/// Pools learn with caps and sinks as the formula has it.
#[test]
fn pools_with_a_cap_and_a_sink() {
    let (heads, n, d) = (2, 60, 4);
    let options = Options { soft_cap: Some(1.5), sink_logit: Some(1.0) };
    let far = FarFormula::Merged(crate::common::hybrid::Received { entries: 6, ..RECEIVED });
    let (calibration, metric, format) = (None, None, StateFormat::F32);
    let formula =
        HybridFormula { window: 8, sinks: 1, heavy: 0, far, calibration, metric, format, options };
    let x = |seed| {
        let numbers = normal::<f64>(heads * n, d, 1.0, seed).into_raw_vec_and_offset().0;
        Array4::from_shape_vec((1, heads, n, d), numbers).unwrap()
    };
    let (q, k, v) = (x(1), x(2), x(3));
    let layer = MultiHead::new(hybrid::<f64>(&formula, d, 0), heads, heads).unwrap();
    let layer = layer.pooled().unwrap();
    let out = layer.forward(q.view(), k.view(), v.view(), Mask::Causal, None).unwrap();
    let head = |x: &Array4<f64>, h: usize| x.slice(s![0, h, .., ..]).to_owned();
    let all = |x: &Array4<f64>| (0..heads).map(|h| head(x, h)).collect::<Vec<_>>();
    let queries: Vec<_> = all(&q).into_iter().map(|q| vec![q]).collect();
    let exact = formula.causal(&queries, &all(&k), &all(&v), 0.5, true);
    for (h, exact) in exact.iter().enumerate() {
        assert_close(&format!("head {h}"), &head(&out, h), &exact[0], 256.0);
    }

    // Heads of other caps or sinks do not share a budget.
    let plain = |builder: fn() -> dijiang::HybridBuilder<f64>| {
        Arc::new(builder().build().unwrap()) as Arc<dyn Attention<f64>>
    };
    let first = plain(|| HybridAttention::builder(4).soft_cap(1.0));
    for other in [
        plain(|| HybridAttention::builder(4).soft_cap(2.0)),
        plain(|| HybridAttention::builder(4)),
        plain(|| HybridAttention::builder(4).soft_cap(1.0).sink_logit(0.0)),
    ] {
        let layer = MultiHead::per_head(vec![first.clone(), other], 2).unwrap();
        assert!(matches!(layer.pooled(), Err(Error::InvalidOption { .. })));
    }
}

/// Weights of pairs and the reference of `fidelity` have the options of the kernel.
#[test]
fn measures_know_the_options() {
    let input = tokens::<f64>(30, 8, 3, 2.0, 7);
    let [q, k, v] = input.each_ref().map(|x| x.view());
    let kernel = softmax::<f64>(8).with_soft_cap(2.0).unwrap().with_alibi_slope(0.1).unwrap();
    let with_sink = kernel.clone().with_sink_logit(1.0).unwrap();
    let logs = kernel.pair_weights().unwrap().log_weights(q, k).unwrap();
    let scores = naive::scores(&input[0], &input[1], 1.0 / 8f64.sqrt());
    let exact = alibi(scores.mapv(|s| soft_capped(s, Some(2.0))), 0.1, Mask::Causal);
    assert!((logs - exact).iter().all(|e| e.abs() < 1e-13));
    for mask in [Mask::Causal, Mask::Full] {
        for kernel in [&kernel, &with_sink] {
            let reference = Reference::of(kernel, q, k, v, mask).unwrap();
            let report = reference.compare(kernel).unwrap();
            assert!(report.output_error < 1e-14, "{report:?}");
            assert!(report.attention_error < 1e-14, "{report:?}");
            assert!(report.kl.unwrap().abs() < 1e-12, "{report:?}");
            assert!(report.kernel_error.unwrap() < 1e-13, "{report:?}");
            let plain = reference.compare(&softmax(8)).unwrap();
            assert!(plain.output_error > 0.01 && plain.kl.unwrap() > 0.0, "{plain:?}");
        }
    }
}

/// Far into a sequence: distances are exact, and so are the weights.
#[test]
fn linear_biases_at_position_100_000() {
    let (n, d) = (100_001, 4);
    let [_, k, v] = tokens::<f32>(n, d, 2, 1.0, 8);
    let wide_input = [wide(&k), wide(&v)];
    for slope in [0.5, 1.0 / 256.0, 1e-4, 1e-6] {
        let kernel = softmax::<f32>(d).with_alibi_slope(slope).unwrap();
        for queries in [1, 40] {
            let q = normal::<f32>(queries, d, 2.0, 9);
            let out = kernel.forward(q.view(), k.view(), v.view(), Mask::Full).unwrap();
            let [k, v] = &wide_input;
            let exact = formula([&wide(&q), k, v], Options::default(), slope, Mask::Full);
            // Values are of size 1, and a mean of many of them is far below.
            let worst = (wide(&out) - exact).iter().fold(0.0_f64, |m, e| m.max(e.abs()));
            assert!(worst < 1e-6, "{slope}, {queries} queries: {worst:e}");
        }
    }
    // Causal, a stream whose last tokens come in one block and one by one.
    let n = 3000;
    let input = tokens::<f32>(n, d, 2, 1.0, 10);
    let kernel = softmax::<f32>(d).with_alibi_slope(1.0 / 64.0).unwrap();
    let mut stream = kernel.stream(2).unwrap();
    let out = feed(&mut *stream, &input, &[2900, 90, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]);
    let [q, k, v] = input.each_ref().map(wide);
    let exact = formula([&q, &k, &v], Options::default(), 1.0 / 64.0, Mask::Causal);
    assert_close("stream", &out, &exact, 64.0);
}

/// The code of the paper, as it is written.
#[test]
fn slopes_are_those_of_the_paper() {
    fn power_of_two(n: usize) -> Vec<f64> {
        let start = 2f64.powf(-(2f64.powf(-((n as f64).log2() - 3.0))));
        (0..n).map(|i| start * start.powi(i as i32)).collect()
    }
    fn slopes(n: usize) -> Vec<f64> {
        if n.is_power_of_two() {
            return power_of_two(n);
        }
        let closest = 1 << n.ilog2();
        let rest = slopes(2 * closest).into_iter().step_by(2).take(n - closest);
        power_of_two(closest).into_iter().chain(rest).collect()
    }
    for heads in 1..=70 {
        let (found, exact) = (alibi_slopes(heads).unwrap(), slopes(heads));
        assert_eq!(found.len(), heads);
        assert!(found.iter().zip(&exact).all(|(a, b)| (a / b - 1.0).abs() < 1e-13), "{heads}");
    }
    assert!(alibi_slopes(0).is_err());
}
