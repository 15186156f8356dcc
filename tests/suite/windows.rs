//! Softmax attention with a sliding window: against the formula, central differences, and its
//! stream.

use crate::common::gradients::{Call, Trained, check_differences, check_groups, check_views};
use crate::common::{assert_close, normal, tokens, wide};
use dijiang::attention::naive::gradient::biased_gradient;
use dijiang::attention::naive::options::{
    Options, alibi, key_masked, soft_capped, windowed, with_sink,
};
use dijiang::attention::naive::{self, formats};
use dijiang::fidelity::Reference;
use dijiang::{
    Attention, Error, Far, Head, HybridAttention, Mask, MultiHead, Rotary, RotaryAttention, Scalar,
    Scratch, SoftmaxAttention, StateFormat, StreamOptions,
};
use ndarray::{Array1, Array2, Array3, Array4, Axis, s};
use std::time::Instant;

const WINDOWS: [usize; 8] = [1, 2, 7, 63, 64, 65, 200, usize::MAX];

const SIZES: [[usize; 2]; 9] =
    [[0, 0], [1, 1], [63, 63], [64, 64], [65, 65], [130, 130], [1, 130], [30, 130], [300, 300]];

#[derive(Clone, Copy, Debug, Default)]
struct Chosen {
    soft_cap: Option<f64>,
    sink_logit: Option<f64>,
    slope: f64,
    format: StateFormat,
}

fn all_chosen() -> Vec<Chosen> {
    let plain = Chosen::default();
    vec![
        plain,
        Chosen { soft_cap: Some(0.7), ..plain },
        Chosen { sink_logit: Some(0.3), ..plain },
        Chosen { sink_logit: Some(0.3), slope: 0.1, soft_cap: Some(2.0), ..plain },
        Chosen { format: StateFormat::Q8, ..plain },
        Chosen { format: StateFormat::Bf16, sink_logit: Some(0.5), ..plain },
    ]
}

fn kernel<T: Scalar>(chosen: Chosen, window: usize) -> SoftmaxAttention<T> {
    let kernel = SoftmaxAttention::new(4).unwrap().with_state_format(chosen.format);
    let mut kernel = kernel.with_window(window).unwrap();
    if let Some(cap) = chosen.soft_cap {
        kernel = kernel.with_soft_cap(cap).unwrap();
    }
    if let Some(logit) = chosen.sink_logit {
        kernel = kernel.with_sink_logit(logit).unwrap();
    }
    if chosen.slope > 0.0 {
        kernel = kernel.with_alibi_slope(chosen.slope).unwrap();
    }
    kernel
}

/// What is added to scores: distances, and −∞ outside the window.
fn added([n_q, n_k]: [usize; 2], chosen: Chosen, window: usize) -> Array2<f64> {
    let distances = alibi(Array2::zeros((n_q, n_k)), chosen.slope, Mask::CausalTail);
    windowed(distances, window.min(n_k), Mask::CausalTail)
}

fn exact<T: Scalar>([q, k, v]: [&Array2<T>; 3], chosen: Chosen, window: usize) -> Array2<f64> {
    let [k, v] = [k, v].map(|x| formats::rounded(&wide(x), chosen.format));
    let scores = naive::scores(&wide(q), &k, 0.5).mapv(|s| soft_capped(s, chosen.soft_cap));
    let logs = scores + added([q.nrows(), k.nrows()], chosen, window);
    with_sink(&logs, &v, chosen.sink_logit, Mask::CausalTail)
}

fn check_forward<T: Scalar>() {
    for chosen in all_chosen() {
        for window in WINDOWS {
            let kernel = kernel::<T>(chosen, window);
            for [n_q, n_k] in SIZES {
                let [_, k, v] = tokens::<T>(n_k, 4, 3, 0.8, 5);
                let q = normal::<T>(n_q, 4, 0.8, 6);
                let what = format!("{chosen:?} {window} {n_q} {n_k}");
                let out = kernel.forward(q.view(), k.view(), v.view(), Mask::CausalTail).unwrap();
                assert_close(&what, &out, &exact([&q, &k, &v], chosen, window), 300.0);
                if n_q == n_k {
                    let same = kernel.forward(q.view(), k.view(), v.view(), Mask::Causal);
                    assert_eq!(same.unwrap(), out, "{what}");
                }
            }
        }
    }
}

#[test]
fn the_formula_of_a_window() {
    check_forward::<f64>();
    check_forward::<f32>();
}

#[test]
fn the_gradient_of_a_window() {
    for chosen in all_chosen().into_iter().filter(|chosen| chosen.format == StateFormat::F32) {
        for window in WINDOWS {
            let kernel = kernel::<f64>(chosen, window);
            for sizes in SIZES {
                let [_, k, v] = tokens::<f64>(sizes[1], 4, 3, 0.8, 5);
                let (q, d_out) =
                    (normal::<f64>(sizes[0], 4, 0.8, 6), normal::<f64>(sizes[0], 3, 1.0, 7));
                let mask = Mask::CausalTail;
                let views = [q.view(), k.view(), v.view(), d_out.view()];
                let [qv, kv, vv, dv] = views;
                let d = kernel.backward(qv, kv, vv, dv, mask).unwrap();
                let options = Options { soft_cap: chosen.soft_cap, sink_logit: chosen.sink_logit };
                let added = added(sizes, chosen, window);
                let arguments = [&q, &k, &v];
                let (exact, _) = biased_gradient(arguments, &d_out, 0.5, options, &added, mask);
                let what = format!("{chosen:?} {window} {sizes:?}");
                // what is zero in exact arithmetic is rounding errors of the size of others
                let with = |x: &Array2<f64>| {
                    ndarray::concatenate![Axis(0), *x, Array2::ones((1, x.ncols()))]
                };
                assert_close(&what, &with(&d.q), &with(&exact.q), 4000.0);
                assert_close(&what, &with(&d.k), &with(&exact.k), 4000.0);
                assert_close(&what, &with(&d.v), &with(&exact.v), 4000.0);
            }
            let narrow = self::kernel::<f32>(chosen, window);
            let subject = Trained {
                name: &format!("{chosen:?} {window}"),
                head_dim: 4,
                f64: &kernel,
                f32: &narrow,
                masks: &[],
                gates: 0,
                size: 0.7,
            };
            check_differences(&subject, Mask::Causal, [70, 70]);
            check_differences(&subject, Mask::CausalTail, [66, 150]);
            check_groups(&subject, Mask::Causal);
            check_views(&subject, Mask::Causal);
            let call = Call::<f32>::new(&subject, 2, [150, 150], 3);
            let mut scratch = Scratch::new();
            let found = call.gradient(&narrow, Mask::Causal, 0.0, &mut scratch).unwrap();
            let exact = call.narrowed::<f64>();
            let exact = exact.gradient(&kernel, Mask::Causal, 0.0, &mut Scratch::new()).unwrap();
            found.assert_close(subject.name, &exact, 4096.0);
        }
    }
}

/// A window with a mask of keys and biases, and behind a rotation.
#[test]
fn a_window_with_all_else() {
    let kernel = kernel::<f64>(Chosen { sink_logit: Some(0.1), ..Chosen::default() }, 9);
    let [q, k, v] = tokens::<f64>(100, 4, 3, 0.8, 5);
    let bias = normal::<f64>(100, 100, 1.0, 8);
    let key_mask: Array1<bool> = (0..100).map(|j| j % 5 > 0 && !(40..60).contains(&j)).collect();
    let mut out = Array2::zeros((100, 3));
    let head = Head::new(q.view(), k.view(), v.view(), out.view_mut());
    let bias_of_heads = bias.view().insert_axis(Axis(0));
    let mut heads = [head.with_key_mask(key_mask.view()).with_bias(bias_of_heads)];
    kernel.forward_heads(&mut heads, Mask::Causal, &mut Scratch::new()).unwrap();
    let logs = key_masked(naive::scores(&q, &k, 0.5) + &bias, &key_mask);
    let logs = windowed(logs, 9, Mask::Causal);
    assert_close("all", &out, &with_sink(&logs, &v, Some(0.1), Mask::Causal), 300.0);

    let turned = RotaryAttention::new(Rotary::new(4).unwrap(), kernel.clone());
    let whole = turned.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap();
    let mut stream = turned.stream(3).unwrap();
    for t in 0..100 {
        let row = |x: &Array2<f64>| x.slice(s![t..=t, ..]).to_owned();
        let mut out = Array2::zeros((1, 3));
        let [q, k, v] = [&q, &k, &v].map(&row);
        stream.extend(q.view(), k.view(), v.view(), out.view_mut()).unwrap();
        assert_close("rotated", &out, &row(&whole), 300.0);
    }
}

fn check_stream<T: Scalar>() {
    for chosen in all_chosen().into_iter().filter(|chosen| chosen.slope == 0.0) {
        for window in [1, 7, 64, 150] {
            let kernel = kernel::<T>(chosen, window);
            let [_, k, v] = tokens::<T>(200, 4, 3, 0.8, 5);
            let heads = [6, 7].map(|seed| normal::<T>(200, 4, 0.8, seed));
            let mut stream = kernel.stream_with(StreamOptions::new(3).group(2)).unwrap();
            let (floats, bytes) = (stream.state_floats(), stream.state_bytes());
            assert_eq!(floats, window * 7);
            assert_eq!(kernel.state_floats(3, 1).unwrap(), floats);
            assert_eq!(kernel.state_floats(3, 1_000_000).unwrap(), floats);
            assert_eq!(kernel.state_bytes(3, 1_000_000).unwrap(), bytes);
            let mut found = Array3::zeros((2, 200, 3));
            let mut start = 0;
            let mut checked = false;
            for len in [1, 1, 60, 1, 3, 64, 1, 69] {
                let range = s![start..start + len, ..];
                let q = Array3::from_shape_fn((2, len, 4), |(g, t, c)| heads[g][[start + t, c]]);
                let mut part = Array3::zeros((2, len, 3));
                if start == 63 {
                    assert!(stream.checkpoint());
                    let head =
                        Head::group(q.view(), k.slice(range), v.slice(range), part.view_mut());
                    stream.extend_heads(&mut [head]).unwrap();
                    stream.rollback().unwrap();
                    checked = true;
                }
                let head = Head::group(q.view(), k.slice(range), v.slice(range), part.view_mut());
                stream.extend_heads(&mut [head]).unwrap();
                found.slice_mut(s![.., start..start + len, ..]).assign(&part);
                start += len;
                assert_eq!((stream.len(), stream.state_floats()), (start, floats));
            }
            assert!(checked && start == 200);
            for (q, found) in heads.iter().zip(found.outer_iter()) {
                let what = format!("{chosen:?} {window}");
                let exact = exact([q, &k, &v], chosen, window);
                assert_close(&what, &found.to_owned(), &exact, 300.0);
            }
            let saved = stream.save().unwrap();
            let mut other = kernel.stream_with(StreamOptions::new(3).group(2)).unwrap();
            other.restore(&saved).unwrap();
            assert_eq!(other.len(), 200);
        }
    }
}

#[test]
fn streams_keep_the_window() {
    check_stream::<f64>();
    check_stream::<f32>();
}

#[test]
fn layers_with_a_window() {
    let layer = MultiHead::new(kernel::<f64>(Chosen::default(), 4), 4, 2).unwrap();
    let x = |heads, phase: f64| {
        Array4::from_shape_fn((2, heads, 20, 4), |(b, h, t, c)| {
            (phase + (b * 97 + h * 31 + t * 7 + c) as f64 * 0.37).sin()
        })
    };
    let (q, k, v) = (x(4, 0.1), x(2, 0.2), x(2, 0.3));
    let out = layer.forward(q.view(), k.view(), v.view(), Mask::Causal, Some(&[20, 11])).unwrap();
    let mut stream = layer.stream(2, 4).unwrap();
    let mut of_stream = Array4::zeros(out.dim());
    stream.extend(q.view(), k.view(), v.view(), Some(&[20, 11]), of_stream.view_mut()).unwrap();
    assert!((&out - &of_stream).iter().all(|e| e.abs() < 1e-13));
    assert_eq!(layer.state_bytes(4, 1000).unwrap(), 2 * 4 * 8 * 8);
}

#[test]
fn a_window_that_has_no_meaning_is_refused() {
    let kernel = SoftmaxAttention::<f64>::new(4).unwrap();
    assert_eq!(kernel.clone().with_window(0), Err(Error::ZeroSize { which: "window" }));
    assert_eq!((kernel.window(), kernel.clone().with_window(3).unwrap().window()), (None, Some(3)));
    let x = Array2::<f64>::zeros((5, 4));
    let x = x.view();
    let window = kernel.with_window(3).unwrap();
    let unsupported = |error: Error| assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    unsupported(window.forward(x, x, x, Mask::Full).unwrap_err());
    unsupported(window.backward(x, x, x, x, Mask::Full).unwrap_err());
    unsupported(Reference::of(&window, x, x, x, Mask::Full).unwrap_err());
    let slopes = window.clone().with_alibi_slope(0.1).unwrap();
    unsupported(slopes.stream(4).unwrap_err());
    unsupported(slopes.state_floats(4, 10).unwrap_err());
    assert!(slopes.forward(x, x, x, Mask::Causal).is_ok());
    let huge = window.with_window(usize::MAX).unwrap();
    assert!(huge.forward(x, x, x, Mask::Causal).is_ok());
    assert!(matches!(huge.stream(4), Err(Error::InvalidOption { .. })));
    assert!(matches!(huge.stream(0), Err(Error::ZeroSize { .. } | Error::InvalidOption { .. })));
}

/// What a window attends to is what a hybrid of the same window does.
#[test]
fn a_reference_with_a_window() {
    let [q, k, v] = tokens::<f64>(60, 4, 3, 0.8, 5);
    let window = kernel::<f64>(Chosen::default(), 8);
    let reference = Reference::of(&window, q.view(), k.view(), v.view(), Mask::Causal).unwrap();
    let hybrid = HybridAttention::builder(4).window(8).sinks(0).far(Far::none()).build().unwrap();
    assert!(reference.output_error(&hybrid).unwrap() < 1e-13);
    assert!(reference.output_error(&window).unwrap() < 1e-13);
    let longer = kernel::<f64>(Chosen::default(), 9);
    assert!(reference.output_error(&longer).unwrap() > 1e-3);
}

/// Tiles outside the window are left out.
#[test]
fn time_grows_with_the_window_only() {
    let x = normal::<f32>(4096, 4, 0.5, 1);
    let x = x.view();
    let time = |kernel: &SoftmaxAttention<f32>| {
        let runs = (0..3).map(|_| {
            let start = Instant::now();
            kernel.forward(x, x, x, Mask::Causal).unwrap();
            kernel.backward(x, x, x, x, Mask::Causal).unwrap();
            start.elapsed()
        });
        runs.min().unwrap()
    };
    let plain = SoftmaxAttention::<f32>::new(4).unwrap();
    let (all, window) = (time(&plain), time(&plain.clone().with_window(32).unwrap()));
    assert!(window * 4 < all, "{window:?} of {all:?}");
}
