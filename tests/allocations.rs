//! A decode loop, and steady forward and backward passes, allocate nothing.

#[path = "suite/common/mod.rs"]
mod common;

use common::normal;
use dijiang::{
    Attention, Calibration, CalibrationOptions, CosFormer, DctFeatures, EluFeatures, Far,
    FeatureMap, FixedGates, ForwardRecord, Head, HeadGradient, HybridAttention, IdentityFeatures,
    LinearAttention, Linformer, Mask, Merged, MultiHead, OfficialDijiang, Performer, Radii,
    Retention, Rotary, RotaryAttention, Scratch, SoftmaxAttention, StateFormat, TaylorFeatures,
};
use ndarray::{Array1, Array2, Array3, Array4, Axis, s};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// Counts the allocations of this thread, and their bytes.
struct Counter;

thread_local! {
    static COUNT: Cell<usize> = const { Cell::new(0) };
    static BYTES: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: hands every call on to the system allocator.
unsafe impl GlobalAlloc for Counter {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|count| count.set(count.get() + 1));
        BYTES.with(|bytes| bytes.set(bytes.get() + layout.size()));
        // SAFETY: as called.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as called.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTER: Counter = Counter;

/// How often `work` allocates.
fn allocations(work: impl FnOnce()) -> usize {
    let before = COUNT.with(Cell::get);
    work();
    COUNT.with(Cell::get) - before
}

fn decays(features: usize) -> Array1<f64> {
    Array1::from_shape_fn(features, |i| [0.5, 0.9, 0.99, 0.999][i % 4])
}

fn maps(d: usize) -> Vec<Box<dyn FeatureMap<f32>>> {
    let antithetic = DctFeatures::new(d, 2 * d, 0).unwrap().with_radii(Radii::Antithetic).unwrap();
    vec![
        Box::new(Performer::new(d, 64, 0).unwrap()),
        Box::new(
            Performer::new(d, 33, 0).unwrap().with_weights(Array1::linspace(0.5, 1.5, 33)).unwrap(),
        ),
        Box::new(DctFeatures::new(d, 64, 0).unwrap()),
        Box::new(antithetic),
        Box::new(OfficialDijiang::new(Array1::linspace(-2.0, 2.0, d)).unwrap()),
        Box::new(EluFeatures::new(d).unwrap()),
        Box::new(TaylorFeatures::new(d.min(16)).unwrap()),
    ]
}

/// Several calls in the same memory, some of fewer tokens than the first.
fn check_kernel(name: &str, kernel: &dyn Attention<f32>, d: usize, grows: bool) {
    check_masks(name, kernel, d, grows, &[Mask::Causal, Mask::Full]);
}

fn check_causal(name: &str, kernel: &dyn Attention<f32>, d: usize, grows: bool) {
    check_masks(name, kernel, d, grows, &[Mask::Causal]);
}

fn check_masks(name: &str, kernel: &dyn Attention<f32>, d: usize, grows: bool, masks: &[Mask]) {
    let [q, k, v] =
        [1, 2, 3].map(|seed| normal::<f32>(300, if seed == 3 { 20 } else { d }, 0.5, seed));
    let mut out = Array2::zeros((300, 20));
    let mut scratch = Scratch::new();
    for &mask in masks {
        let mut forward = |n: usize| {
            let rows = s![..n, ..];
            let out = out.slice_mut(rows);
            kernel
                .forward_heads(
                    &mut [Head::new(q.slice(rows), k.slice(rows), v.slice(rows), out)],
                    mask,
                    &mut scratch,
                )
                .unwrap();
        };
        [300, 1].into_iter().for_each(&mut forward);
        let count = allocations(|| [300, 1, 70, 300].into_iter().for_each(&mut forward));
        assert_eq!(count, 0, "{name}, {mask:?}: a steady forward pass allocates");
    }
    if grows {
        return;
    }
    let mut stream = kernel.stream(20).unwrap();
    let mut extend = |n: usize| {
        let rows = s![..n, ..];
        stream.extend(q.slice(rows), k.slice(rows), v.slice(rows), out.slice_mut(rows)).unwrap();
    };
    [300, 3, 1].into_iter().for_each(&mut extend);
    let count = allocations(|| (0..50).for_each(|_| extend(1)));
    assert_eq!(count, 0, "{name}: a decode step allocates");
    let count = allocations(|| [300, 3, 64].into_iter().for_each(&mut extend));
    assert_eq!(count, 0, "{name}: a prefill allocates");
}

/// Several backward passes in the same memory, with and without what a forward pass gave.
fn check_backward(name: &str, kernel: &dyn Attention<f32>, d: usize) {
    let [q, k, v, d_out] =
        [1, 2, 3, 4].map(|seed| normal::<f32>(300, if seed < 3 { d } else { 20 }, 0.5, seed));
    let (mut out, mut logs) = (Array3::zeros((1, 300, 20)), Array2::zeros((1, 300)));
    let [mut d_q, mut d_k, mut d_v] = [&q, &k, &v].map(|x| Array2::zeros(x.dim()));
    let mut scratch = Scratch::new();
    for mask in [Mask::Causal, Mask::Full] {
        let mut backward = |n: usize, has_record: bool| {
            let rows = s![..n, ..];
            let [q, k, v] = [&q, &k, &v].map(|x| x.slice(rows));
            let (mut out, mut logs) = (out.slice_mut(s![.., ..n, ..]), logs.slice_mut(s![.., ..n]));
            let d = [&mut d_q, &mut d_k, &mut d_v].map(|x| x.slice_mut(rows));
            let mut head = HeadGradient::new([q, k, v], d_out.slice(rows), d);
            if has_record {
                let forward = Head::new(q, k, v, out.index_axis_mut(Axis(0), 0));
                let mut heads = [forward.with_log_normalizer(logs.view_mut())];
                kernel.forward_heads(&mut heads, mask, &mut scratch).unwrap();
                let (out, log_normalizer) = (out.view(), logs.view());
                head = head.with_record(ForwardRecord { out, log_normalizer });
            }
            kernel.backward_heads(&mut [head], mask, &mut scratch).unwrap();
        };
        let calls = [(300, false), (300, true), (1, false), (70, true)];
        calls.into_iter().for_each(|(n, has_record)| backward(n, has_record));
        let again = calls.into_iter().rev();
        let count = allocations(|| again.for_each(|(n, has_record)| backward(n, has_record)));
        assert_eq!(count, 0, "{name}, {mask:?}: a steady backward pass allocates");
    }
}

/// A cache has room for more tokens than it holds.
fn check_cache(kernel: &dyn Attention<f32>, d: usize) {
    let [q, k, v] = [1, 2, 3].map(|seed| normal::<f32>(100, d, 0.5, seed));
    let (mut stream, mut out) = (kernel.stream(d).unwrap(), Array2::zeros((100, d)));
    let mut extend = |rows: std::ops::Range<usize>| {
        let rows = s![rows, ..];
        stream.extend(q.slice(rows), k.slice(rows), v.slice(rows), out.slice_mut(rows)).unwrap();
    };
    (0..3).for_each(|t| extend(t..t + 1));
    extend(3..70);
    extend(70..71);
    let count = allocations(|| (71..100).for_each(|t| extend(t..t + 1)));
    assert_eq!(count, 0, "a step of a cache with room");
}

#[test]
fn steady_calls_allocate_nothing() {
    for d in [8, 64, 80, 128] {
        for (i, map) in maps(d).into_iter().enumerate() {
            let d = map.head_dim();
            check_kernel(&format!("map {i}, d = {d}"), &LinearAttention::new(map), d, false);
        }
        let softmax = SoftmaxAttention::new(d).unwrap();
        check_kernel("softmax", &softmax, d, true);
        check_backward("softmax", &softmax, d);
        let capped = softmax.with_soft_cap(3.0).unwrap().with_sink_logit(0.5).unwrap();
        check_backward("capped softmax with a sink", &capped, d);
        for format in [StateFormat::Bf16, StateFormat::Q8] {
            let softmax = SoftmaxAttention::new(d).unwrap().with_state_format(format);
            check_kernel(&format!("softmax {format:?}"), &softmax, d, true);
            check_cache(&softmax, d);
            let hybrid = HybridAttention::builder(d).far(Far::merged(20)).state_format(format);
            check_causal(&format!("hybrid {format:?}"), &hybrid.build().unwrap(), d, false);
        }
        let [q, k] = [1, 2].map(|seed| normal::<f32>(200, d, 0.5, seed));
        let calibration =
            Calibration::from_samples(q.view(), k.view(), CalibrationOptions::new()).unwrap();
        let builder = || HybridAttention::builder(d).window(20).sinks(3);
        let rotary = || Rotary::new(d).unwrap();
        check_kernel("cosformer", &CosFormer::new(d, 10_000).unwrap(), d, false);
        check_kernel(
            "rotary softmax",
            &RotaryAttention::new(rotary(), SoftmaxAttention::new(d).unwrap()),
            d,
            true,
        );
        let nested = RotaryAttention::new(rotary(), CosFormer::new(d, 10_000).unwrap());
        check_kernel("rotary cosformer", &nested, d, false);
        check_masks("linformer", &Linformer::new(d, 8, 300, 0).unwrap(), d, true, &[Mask::Full]);
        for retention in
            [Retention::new(d, 0.9).unwrap(), Retention::new(d, 0.9).unwrap().with_xpos()]
        {
            check_causal("retention", &retention, d, false);
        }
        for columns in [1, d] {
            let log_decay = normal::<f32>(10_000, columns, 0.1, 9).mapv(|x| -x.abs());
            let gated =
                LinearAttention::new(IdentityFeatures::new(d).unwrap()).unnormalized().gated();
            check_causal("gated", &FixedGates::new(gated, log_decay), d, false);
        }
        let hybrids = [
            builder().far(Far::none()),
            builder().far(Far::merged(12)),
            builder().far(Merged::new(12).block(8)),
            builder().far(Far::ward(12)).calibrated(&calibration),
            builder().far(Far::merged(12)).heavy(4).calibrated(&calibration),
            builder().far(Far::features(Performer::new(d, 32, 0).unwrap())),
            builder().far(Far::decaying_features(Performer::new(d, 32, 0).unwrap(), decays(32))),
            builder().far(Far::taylor(4)).calibrated(&calibration),
        ];
        for (i, hybrid) in hybrids.into_iter().enumerate() {
            check_causal(&format!("hybrid {i}, d = {d}"), &hybrid.build().unwrap(), d, false);
        }
        // states that outgrow the room they begin with
        for far in [Far::none(), Far::merged(140)] {
            let kernel = HybridAttention::builder(d).window(150).sinks(3).far(far);
            check_causal("a wide window", &kernel.build().unwrap(), d, true);
        }
    }
}

/// A cache that grows must allocate now and then, but seldom.
#[test]
fn a_softmax_cache_grows_by_doubling() {
    let x = normal::<f32>(1, 64, 1.0, 0);
    let mut out = Array2::zeros((1, 64));
    let mut stream = SoftmaxAttention::<f32>::new(64).unwrap().stream(64).unwrap();
    let count = allocations(|| {
        for _ in 0..4096 {
            stream.extend(x.view(), x.view(), x.view(), out.view_mut()).unwrap();
        }
    });
    assert!(count < 50, "{count} allocations in 4096 steps");
}

/// What may be large one day is small until then: windows, sinks, heavy keys and far memories.
#[test]
fn a_state_costs_what_it_holds_not_what_it_may_hold() {
    let d = 64;
    let x = normal::<f32>(10, d, 1.0, 0);
    let builder = || HybridAttention::<f32>::builder(d);
    for (name, kernel) in [
        ("window", builder().window(1 << 22).sinks(4).far(Far::none())),
        ("sinks", builder().window(4).sinks(1 << 22).far(Far::none())),
        ("merged", builder().window(1 << 22).sinks(4).far(Far::merged(16_000))),
        ("ward", builder().window(64).sinks(4).far(Far::ward(16_000))),
    ] {
        let kernel = kernel.build().unwrap();
        let before = BYTES.with(Cell::get);
        let mut stream = kernel.stream(d).unwrap();
        let mut out = Array2::zeros((10, d));
        stream.extend(x.view(), x.view(), x.view(), out.view_mut()).unwrap();
        assert!(stream.checkpoint());
        stream.rollback().unwrap();
        kernel.forward(x.view(), x.view(), x.view(), Mask::Causal).unwrap();
        let bytes = BYTES.with(Cell::get) - before;
        assert!(bytes < 2 << 20, "{name}: {bytes} bytes for ten tokens");
    }
}

/// All heads of a layer move or none, and nothing is allocated for that.
#[test]
fn a_step_of_a_layer_allocates_nothing() {
    let d = 16;
    let linear = || LinearAttention::new(Performer::<f32>::new(d, 32, 0).unwrap());
    let hybrid = |far: Far<f32>| HybridAttention::builder(d).window(20).sinks(3).far(far).build();
    let layer = |kernel: Box<dyn Attention<f32>>| MultiHead::new(kernel, 4, 2).unwrap();
    let map = || Performer::new(d, 32, 0).unwrap();
    let features = Far::features(map());
    let forgetting = Far::decaying_features(map(), decays(32));
    let layers = [
        ("linear", layer(Box::new(linear()))),
        ("unnormalized", layer(Box::new(linear().unnormalized()))),
        ("decay", layer(Box::new(linear().with_decay(0.97)))),
        ("retention", layer(Box::new(Retention::new(d, 0.9).unwrap().with_xpos()))),
        ("cosformer", layer(Box::new(CosFormer::new(d, 10_000).unwrap()))),
        ("window", layer(Box::new(hybrid(Far::none()).unwrap()))),
        ("merged", layer(Box::new(hybrid(Far::merged(12)).unwrap()))),
        ("pooled", layer(Box::new(hybrid(Far::merged(12)).unwrap())).pooled().unwrap()),
        ("features", layer(Box::new(hybrid(features).unwrap()))),
        ("forgetting", layer(Box::new(hybrid(forgetting).unwrap()))),
    ];
    for (name, layer) in layers {
        let draw = |heads: usize, seed: u64| {
            normal::<f32>(2 * heads * 300, d, 0.5, seed)
                .into_shape_with_order((2, heads, 300, d))
                .unwrap()
        };
        let (q, k, v) = (draw(4, 1), draw(2, 2), draw(2, 3));
        let mut out = Array4::<f32>::zeros((2, 4, 300, d));
        let mut stream = layer.stream(2, d).unwrap();
        let mut extend = |n: usize| {
            let rows = s![.., .., ..n, ..];
            let (q, k, v) = (q.slice(rows), k.slice(rows), v.slice(rows));
            stream.extend(q, k, v, None, out.slice_mut(rows)).unwrap();
        };
        [300, 3, 1, 1].into_iter().for_each(&mut extend);
        let count = allocations(|| (0..50).for_each(|_| extend(1)));
        assert_eq!(count, 0, "{name}: a decode step allocates");
        let count = allocations(|| [3, 8, 1].into_iter().for_each(&mut extend));
        assert_eq!(count, 0, "{name}: some tokens allocate");
        stream.checkpoint();
        stream.rollback().unwrap();
        let count = allocations(|| {
            stream.checkpoint();
            stream.rollback().unwrap();
        });
        assert_eq!(count, 0, "{name}: a checkpoint allocates");
    }
}

/// So does one of a hybrid, whatever is behind the window.
#[test]
fn steady_gradients_of_hybrids() {
    let d = 8;
    let builder = || HybridAttention::<f32>::builder(d).window(16).sinks(2);
    let features = Far::features(Performer::new(d, 24, 0).unwrap());
    for far in [Far::none(), Far::merged(12), Merged::new(12).block(8).into(), features] {
        let kernel = builder().far(far).sink_logit(0.5).build().unwrap();
        let [q, k, v, d_out] = [1, 2, 3, 4].map(|seed| normal::<f32>(300, d, 0.5, seed));
        let [mut d_q, mut d_k, mut d_v] = [&q, &k, &v].map(|x| Array2::zeros(x.dim()));
        let mut scratch = Scratch::new();
        let mut backward = |n: usize| {
            let rows = s![..n, ..];
            let inputs = [&q, &k, &v].map(|x| x.slice(rows));
            let gradients = [&mut d_q, &mut d_k, &mut d_v].map(|x| x.slice_mut(rows));
            let head = HeadGradient::new(inputs, d_out.slice(rows), gradients);
            kernel.backward_heads(&mut [head], Mask::Causal, &mut scratch).unwrap();
        };
        [300, 1].into_iter().for_each(&mut backward);
        let count = allocations(|| [300, 1, 70, 300].into_iter().for_each(&mut backward));
        assert_eq!(count, 0, "{kernel:?}: a steady backward pass allocates");
    }
}

/// A backward pass keeps what does not depend on the number of tokens, and in memory it has met
/// allocates nothing.
#[test]
fn gradients_of_linear_attention_in_constant_memory() {
    let d = 64;
    let map = Performer::<f32>::new(d, d, 0).unwrap();
    for (n, most) in [(300, 1 << 20), (131_072, 4 << 20)] {
        for kernel in
            [LinearAttention::new(map.clone()), LinearAttention::new(map.clone()).with_decay(0.9)]
        {
            let [q, k, v, d_out] = [1, 2, 3, 4].map(|seed| normal::<f32>(300, d, 0.5, seed));
            let [q, k, v, d_out] = [&q, &k, &v, &d_out]
                .map(|x| Array2::from_shape_fn((n, d), |(t, i)| x[[t % 300, i]]));
            let [mut d_q, mut d_k, mut d_v] = [(); 3].map(|()| Array2::zeros((n, d)));
            let mut scratch = Scratch::new();
            let mut backward = |scratch: &mut Scratch<f32>| {
                let gradients = [d_q.view_mut(), d_k.view_mut(), d_v.view_mut()];
                let inputs = [q.view(), k.view(), v.view()];
                let head = HeadGradient::new(inputs, d_out.view(), gradients);
                kernel.backward_heads(&mut [head], Mask::Causal, scratch).unwrap();
            };
            let before = BYTES.with(Cell::get);
            backward(&mut scratch);
            let bytes = BYTES.with(Cell::get) - before;
            assert!(bytes <= most, "{bytes} bytes for {n} tokens");
            if n == 300 {
                assert_eq!(allocations(|| backward(&mut scratch)), 0, "a second time");
            }
        }
    }
}

/// Nor do calls with a tail of queries, masks of keys and biases.
#[test]
fn steady_calls_with_masks() {
    let d = 8;
    let window = SoftmaxAttention::<f32>::new(d).unwrap().with_window(40).unwrap();
    check_causal("a sliding window", &window, d, false);
    let map = || Performer::<f32>::new(d, 24, 0).unwrap();
    let hybrid = |far: Far<f32>| HybridAttention::builder(d).window(16).sinks(2).far(far);
    let kernels: [Box<dyn Attention<f32>>; 9] = [
        Box::new(SoftmaxAttention::new(d).unwrap()),
        Box::new(window),
        Box::new(SoftmaxAttention::new(d).unwrap().with_soft_cap(3.0).unwrap()),
        Box::new(LinearAttention::new(map())),
        Box::new(LinearAttention::new(map()).with_decay(0.9)),
        Box::new(RotaryAttention::new(Rotary::new(d).unwrap(), LinearAttention::new(map()))),
        Box::new(hybrid(Far::ward(12)).build().unwrap()),
        Box::new(hybrid(Far::features(map())).build().unwrap()),
        Box::new(hybrid(Far::decaying_features(map(), decays(24))).build().unwrap()),
    ];
    let [q, k, v, d_out] = [1, 2, 3, 4].map(|seed| normal::<f32>(300, d, 0.5, seed));
    let key_mask = Array1::from_shape_fn(300, |j| j % 4 > 0);
    let (bias, mut d_bias) = (Array3::ones((1, 300, 300)), Array3::zeros((1, 300, 300)));
    for (i, kernel) in kernels.iter().enumerate() {
        let mut out = Array2::zeros((300, d));
        let [mut d_q, mut d_k, mut d_v] = [&q, &k, &v].map(|x| Array2::zeros(x.dim()));
        let mut scratch = Scratch::new();
        let mut call = |[n_q, n_k]: [usize; 2]| {
            let [rows, keys] = [n_q, n_k].map(|n| s![..n, ..]);
            let inputs = [q.slice(rows), k.slice(keys), v.slice(keys)];
            let [q, k, v] = inputs;
            let mut head = Head::new(q, k, v, out.slice_mut(rows));
            let gradients = [d_q.slice_mut(rows), d_k.slice_mut(keys), d_v.slice_mut(keys)];
            let mut of_head = HeadGradient::new([q, k, v], d_out.slice(rows), gradients);
            if i < 3 {
                let of_pairs = s![.., ..n_q, ..n_k];
                let key_mask = key_mask.slice(s![..n_k]);
                let bias = bias.slice(of_pairs);
                head = head.with_key_mask(key_mask).with_bias(bias);
                let d_bias = d_bias.slice_mut(of_pairs);
                of_head = of_head.with_key_mask(key_mask).with_bias(bias, Some(d_bias));
            }
            kernel.forward_heads(&mut [head], Mask::CausalTail, &mut scratch).unwrap();
            kernel.backward_heads(&mut [of_head], Mask::CausalTail, &mut scratch).unwrap();
        };
        let sizes = [[60, 300], [1, 300], [7, 70]];
        sizes.into_iter().for_each(&mut call);
        let count = allocations(|| sizes.into_iter().rev().for_each(&mut call));
        assert_eq!(count, 0, "{kernel:?}: a steady call allocates");
    }
}
