//! Padding of a layer, on either side, is never read and its output is zero; a sequence of a batch
//! gets the bits it would get alone, with nothing at all among them.

use crate::common::normal;
use crate::layer_streams::{D, HEADS, KV_HEADS, layers};
use dijiang::{
    Attention, CosFormer, DctFeatures, EluFeatures, Error, Far, HybridAttention, LinearAttention,
    Linformer, Mask, MultiHead, Padding, Rotary, RotaryAttention, SoftmaxAttention,
};
use ndarray::{Array3, Array4, ArrayView4, s};
use std::sync::Arc;

const N: usize = 12;
const LENGTHS: [usize; 4] = [12, 5, 0, 1];

fn random(heads: usize, d: usize, seed: u64) -> Array4<f64> {
    let numbers = normal::<f64>(LENGTHS.len() * heads * N, d, 0.8, seed);
    numbers.into_shape_with_order((LENGTHS.len(), heads, N, d)).unwrap()
}

/// The real tokens moved to one side, NaN on the other.
fn padded(x: &Array4<f64>, padding: Padding) -> Array4<f64> {
    let mut to = Array4::from_elem(x.dim(), f64::NAN);
    for (b, length) in LENGTHS.into_iter().enumerate() {
        to.slice_mut(s![b, .., rows(length, padding), ..]).assign(&x.slice(s![
            b,
            ..,
            ..length,
            ..
        ]));
    }
    to
}

fn rows(length: usize, padding: Padding) -> std::ops::Range<usize> {
    if padding == Padding::Left { N - length..N } else { 0..length }
}

fn arrays(layer: &MultiHead<f64>) -> [Array4<f64>; 3] {
    let kv = layer.kv_heads();
    [random(HEADS, D, 1), random(kv, D, 2), random(kv, 3, 3)]
}

/// Real rows are those of each sequence alone, the others zero.
fn check(
    what: &str,
    out: &Array4<f64>,
    padding: Padding,
    alone: impl Fn(usize, usize) -> Array4<f64>,
) {
    for (b, length) in LENGTHS.into_iter().enumerate() {
        let real = rows(length, padding);
        if length > 0 {
            let found = out.slice(s![b..=b, .., real.clone(), ..]);
            assert_eq!(found, alone(b, length), "{what} {padding:?} sequence {b}");
        }
        for row in (0..N).filter(|row| !real.contains(row)) {
            let is_zero = out.slice(s![b, .., row, ..]).iter().all(|&x| x == 0.0);
            assert!(is_zero, "{what} {padding:?} sequence {b}, row {row}");
        }
    }
}

fn real(x: &Array4<f64>, b: usize, length: usize) -> ArrayView4<'_, f64> {
    x.slice(s![b..=b, .., ..length, ..])
}

#[test]
fn sequences_of_a_forward_pass_are_those_alone() {
    for (name, layer) in layers() {
        let x = arrays(&layer);
        for padding in [Padding::Right, Padding::Left] {
            let layer = layer.clone().with_padding(padding);
            let [q, k, v] = x.each_ref().map(|x| padded(x, padding));
            let mut out = Array4::from_elem((LENGTHS.len(), HEADS, N, 3), f64::NAN);
            layer
                .forward_into(
                    q.view(),
                    k.view(),
                    v.view(),
                    Mask::Causal,
                    Some(&LENGTHS),
                    out.view_mut(),
                )
                .unwrap();
            check(&name, &out, padding, |b, length| {
                let [q, k, v] = x.each_ref().map(|x| real(x, b, length));
                layer.forward(q, k, v, Mask::Causal, None).unwrap()
            });
        }
    }
}

/// Layers of kernels that have a full mask.
fn full_layers() -> Vec<(&'static str, MultiHead<f64>)> {
    let linear = || LinearAttention::new(DctFeatures::<f64>::new(D, 12, 1).unwrap());
    let ward = HybridAttention::<f64>::builder(D).window(0).sinks(2).far(Far::ward(4));
    let kernels: Vec<(&str, Arc<dyn Attention<f64>>)> = vec![
        ("softmax", Arc::new(SoftmaxAttention::new(D).unwrap())),
        ("linear", Arc::new(linear())),
        ("unnormalized", Arc::new(linear().unnormalized())),
        ("elu", Arc::new(LinearAttention::new(EluFeatures::new(D).unwrap()))),
        ("cosformer", Arc::new(CosFormer::new(D, 100).unwrap())),
        ("rotary", Arc::new(RotaryAttention::new(Rotary::new(D).unwrap(), linear()))),
        ("ward", Arc::new(ward.build().unwrap())),
        ("linformer", Arc::new(Linformer::new(D, 4, 20, 0).unwrap())),
        ("one's own", Arc::new(crate::common::alibi::alibi::<f64>(D, 0.1))),
    ];
    let layer = |kernel| MultiHead::new(kernel, HEADS, KV_HEADS).unwrap();
    kernels.into_iter().map(|(name, kernel)| (name, layer(kernel))).collect()
}

/// With a full mask left padding is one of queries too.
#[test]
fn full_attention_with_padding_on_the_left() {
    for (name, layer) in full_layers() {
        let x = arrays(&layer);
        let layer = layer.with_padding(Padding::Left);
        let [q, k, v] = x.each_ref().map(|x| padded(x, Padding::Left));
        let out = layer.forward(q.view(), k.view(), v.view(), Mask::Full, Some(&LENGTHS)).unwrap();
        check(name, &out, Padding::Left, |b, length| {
            let [q, k, v] = x.each_ref().map(|x| real(x, b, length));
            layer.forward(q, k, v, Mask::Full, None).unwrap()
        });
        // of other numbers of queries nobody knows where they begin; without lengths all are real
        let fewer = x[0].slice(s![.., .., 1.., ..]);
        let [_, k, v] = &x;
        let error =
            layer.forward(fewer, k.view(), v.view(), Mask::Full, Some(&LENGTHS)).unwrap_err();
        assert_eq!(error, Error::Shape { which: "k", axis: "rows", expected: N - 1, found: N });
        layer.forward(fewer, k.view(), v.view(), Mask::Full, None).unwrap();
    }
}

/// Queries that see no key get zeros and are not read; the others of the batch are not disturbed.
#[test]
fn sequences_without_keys_get_zeros() {
    for (name, layer) in full_layers() {
        let [mut q, k, v] = arrays(&layer);
        q.slice_mut(s![2, .., .., ..]).fill(f64::NAN);
        let run = |q: &Array4<f64>, k: ArrayView4<'_, f64>, v, lengths: Option<&[usize]>| {
            let mut out = Array4::from_elem((q.dim().0, HEADS, N, 3), f64::NAN);
            layer.forward_into(q.view(), k, v, Mask::Full, lengths, out.view_mut()).map(|()| out)
        };
        let out = run(&q, k.view(), v.view(), Some(&LENGTHS)).unwrap();
        for (b, length) in LENGTHS.into_iter().enumerate() {
            if length == 0 {
                assert!(out.slice(s![b, .., .., ..]).iter().all(|&x| x == 0.0), "{name}");
            } else {
                let q = q.slice(s![b..=b, .., .., ..]).to_owned();
                let alone = run(&q, real(&k, b, length), real(&v, b, length), None).unwrap();
                assert_eq!(out.slice(s![b..=b, .., .., ..]), alone, "{name}");
            }
        }
        for (k, v, lengths) in [
            (k.view(), v.view(), Some(&[0, 0, 0, 0][..])),
            (k.slice(s![.., .., ..0, ..]), v.slice(s![.., .., ..0, ..]), None),
            (k.slice(s![.., .., ..0, ..]), v.slice(s![.., .., ..0, ..]), Some(&[0, 0, 0, 0])),
        ] {
            assert!(run(&q, k, v, lengths).unwrap().iter().all(|&x| x == 0.0), "{name}");
        }
    }
    // by itself a kernel refuses
    let kernel = SoftmaxAttention::<f64>::new(D).unwrap();
    let (q, k) = (ndarray::Array2::zeros((2, D)), ndarray::Array2::zeros((0, D)));
    let error = kernel.forward(q.view(), k.view(), k.view(), Mask::Full).unwrap_err();
    assert_eq!(error, Error::ZeroSize { which: "k rows" });
}

#[test]
fn gated_layers_never_read_the_gates_of_padding() {
    let kernel = LinearAttention::new(EluFeatures::<f64>::new(D).unwrap()).gated();
    let layer = MultiHead::new(kernel, HEADS, KV_HEADS).unwrap();
    let x = arrays(&layer);
    let gates = random(KV_HEADS, 1, 4).mapv(|x| -x.abs());
    for padding in [Padding::Right, Padding::Left] {
        let layer = layer.clone().with_padding(padding);
        let [q, k, v] = x.each_ref().map(|x| padded(x, padding));
        let padded_gates = padded(&gates, padding);
        let mut out = Array4::from_elem((LENGTHS.len(), HEADS, N, 3), f64::NAN);
        let (q, k, v, g) = (q.view(), k.view(), v.view(), padded_gates.view());
        layer.forward_gated(q, k, v, g, Some(&LENGTHS), out.view_mut()).unwrap();
        let alone = |b, length| {
            let [q, k, v] = x.each_ref().map(|x| real(x, b, length));
            let mut out = Array4::zeros((1, HEADS, length, 3));
            layer.forward_gated(q, k, v, real(&gates, b, length), None, out.view_mut()).unwrap();
            out
        };
        check("forward", &out, padding, alone);
        out.fill(f64::NAN);
        let mut stream = layer.stream(LENGTHS.len(), 3).unwrap();
        stream.extend_gated(q, k, v, g, Some(&LENGTHS), out.view_mut()).unwrap();
        check("stream", &out, padding, |b, length| {
            let [q, k, v] = x.each_ref().map(|x| real(x, b, length));
            let mut out = Array4::zeros((1, HEADS, length, 3));
            let mut stream = layer.stream(1, 3).unwrap();
            stream.extend_gated(q, k, v, real(&gates, b, length), None, out.view_mut()).unwrap();
            out
        });
    }
}

/// A prefill of prompts, padded on either side, and decode steps behind it.
#[test]
fn streams_begin_with_padded_prompts() {
    for (name, layer) in layers() {
        let x = arrays(&layer);
        let step = [10, 11, 12].map(|seed| {
            let (heads, d) = (if seed == 10 { HEADS } else { layer.kv_heads() }, 8.min(D));
            random(heads, if seed == 12 { 3 } else { d }, seed)
        });
        for padding in [Padding::Right, Padding::Left] {
            let mut stream = layer.stream(LENGTHS.len(), 3).unwrap();
            stream.set_padding(padding);
            let [q, k, v] = x.each_ref().map(|x| padded(x, padding));
            let mut out = Array4::from_elem((LENGTHS.len(), HEADS, N, 3), f64::NAN);
            stream.extend(q.view(), k.view(), v.view(), Some(&LENGTHS), out.view_mut()).unwrap();
            assert_eq!(stream.lengths(), LENGTHS, "{name}");
            let mut after = Array4::from_elem((LENGTHS.len(), HEADS, 1, 3), f64::NAN);
            let [q, k, v] = step.each_ref().map(|x| x.slice(s![.., .., ..1, ..]));
            stream.extend(q, k, v, None, after.view_mut()).unwrap();
            check(&name, &out, padding, |b, length| {
                let mut alone = layer.stream(1, 3).unwrap();
                let [q, k, v] = x.each_ref().map(|x| real(x, b, length));
                let mut out = Array4::zeros((1, HEADS, length, 3));
                alone.extend(q, k, v, None, out.view_mut()).unwrap();
                let [q, k, v] = step.each_ref().map(|x| real(x, b, 1));
                let mut last = Array4::zeros((1, HEADS, 1, 3));
                alone.extend(q, k, v, None, last.view_mut()).unwrap();
                assert_eq!(after.slice(s![b..=b, .., .., ..]), last, "{name} {padding:?}");
                out
            });
        }
    }
}

/// Rows of projections too, and clones of a stream keep the side.
#[test]
fn rows_with_padding_on_the_left() {
    let layer = MultiHead::new(SoftmaxAttention::<f64>::new(D).unwrap(), HEADS, KV_HEADS).unwrap();
    let layer = layer.with_padding(Padding::Left);
    let [q, k, v] = arrays(&layer).map(|x| padded(&x, Padding::Left));
    let expected =
        layer.forward(q.view(), k.view(), v.view(), Mask::Causal, Some(&LENGTHS)).unwrap();
    let flat = |x: &Array4<f64>| {
        let (b, heads, n, d) = x.dim();
        let x = x.view().permuted_axes([0, 2, 1, 3]);
        Array3::from_shape_vec((b, n, heads * d), x.iter().copied().collect()).unwrap()
    };
    let mut stream = layer.stream(LENGTHS.len(), 3).unwrap().clone();
    let mut out = Array3::from_elem((LENGTHS.len(), N, HEADS * 3), f64::NAN);
    let (q, k, v) = (flat(&q), flat(&k), flat(&v));
    stream.extend_rows(q.view(), k.view(), v.view(), Some(&LENGTHS), out.view_mut()).unwrap();
    assert!((&out - &flat(&expected)).iter().all(|e| e.abs() < 1e-12));
}
