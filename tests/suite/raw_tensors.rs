//! Layers over slices with a shape and strides give what they give over views.

use crate::common::normal;
use dijiang::{
    EluFeatures, Error, LinearAttention, Mask, MultiHead, Performer, RawGradients, RawTensor,
    SoftmaxAttention,
};
use ndarray::{Array4, ArrayView4};

const D: usize = 6;

fn array(shape: (usize, usize, usize, usize), seed: u64) -> Array4<f64> {
    let (b, h, n, d) = shape;
    normal::<f64>(b * h * n, d, 0.7, seed).into_shape_with_order(shape).unwrap()
}

/// A view as a slice from its first number on.
fn raw<'a>(x: &'a Array4<f64>, view: ArrayView4<'_, f64>) -> RawTensor<'a, f64> {
    let strides = view.strides().iter().map(|&s| usize::try_from(s).unwrap()).collect::<Vec<_>>();
    let shape = view.dim();
    RawTensor::new(x.as_slice().unwrap(), shape.into(), strides.try_into().unwrap()).unwrap()
}

#[test]
fn slices_with_strides_are_views() {
    let [b, h, g, n] = [2, 4, 2, 37];
    // tokens before heads, as projections leave them
    let [q, k, v] = [h, g, g].map(|heads| array((b, n, heads, D), heads as u64));
    let [d_out, gates] = [array((b, h, n, D), 7), array((b, g, n, 1), 8).mapv(|x| -x * x)];
    let order = [0, 2, 1, 3];
    let views = [&q, &k, &v].map(|x| x.view().permuted_axes(order));
    let raws = [(&q, views[0]), (&k, views[1]), (&v, views[2])].map(|(x, view)| raw(x, view));
    assert_eq!(raws[0].shape(), [b, h, n, D]);
    let gated = LinearAttention::new(EluFeatures::<f64>::new(D).unwrap()).gated();
    let linear = LinearAttention::new(Performer::<f64>::new(D, 9, 1).unwrap());
    let softmax = SoftmaxAttention::<f64>::new(D).unwrap();
    let layers = [
        (MultiHead::new(gated, h, g).unwrap(), true),
        (MultiHead::new(linear, h, g).unwrap(), false),
        (MultiHead::new(softmax, h, g).unwrap(), false),
    ];
    for (layer, is_gated) in layers {
        let lengths = [n, 20];
        let gates_raw = is_gated.then(|| raw(&gates, gates.view()));
        let [q, k, v] = views;
        let mut exact = Array4::zeros((b, h, n, D));
        let mut stream = layer.stream(b, D).unwrap();
        let mut streamed = Array4::zeros((b, h, n, D));
        let (causal, some) = (Mask::Causal, Some(&lengths[..]));
        let d = if is_gated {
            layer.forward_gated(q, k, v, gates.view(), some, exact.view_mut()).unwrap();
            stream.extend_gated(q, k, v, gates.view(), some, streamed.view_mut()).unwrap();
            layer.backward_gated(q, k, v, gates.view(), some, d_out.view()).unwrap()
        } else {
            layer.forward_into(q, k, v, causal, some, exact.view_mut()).unwrap();
            stream.extend(q, k, v, some, streamed.view_mut()).unwrap();
            layer.backward(q, k, v, causal, some, d_out.view()).unwrap()
        };
        let mut out = vec![f64::NAN; exact.len()];
        layer.forward_raw(raws, gates_raw, causal, some, &mut out).unwrap();
        assert_eq!(out, exact.as_slice().unwrap());
        let mut stream = layer.stream(b, D).unwrap();
        stream.extend_raw(raws, gates_raw, some, &mut out).unwrap();
        assert_eq!(out, streamed.as_slice().unwrap());

        let [mut d_q, mut d_k, mut d_v] = [q, k, v].map(|x| vec![0.0; x.len()]);
        let mut d_gates = vec![0.0; gates.len()];
        let mut d_parameters = layer.parameters().zeros_like();
        let gradients = RawGradients {
            d_q: &mut d_q,
            d_k: &mut d_k,
            d_v: &mut d_v,
            d_log_decay: is_gated.then_some(&mut d_gates),
            d_parameters: Some(&mut d_parameters),
        };
        let raw_d_out = raw(&d_out, d_out.view());
        layer.backward_raw(raws, gates_raw, causal, some, raw_d_out, gradients).unwrap();
        assert_eq!((&d_q[..], &d_k[..]), (d.q.as_slice().unwrap(), d.k.as_slice().unwrap()));
        assert_eq!((&d_v[..], d_parameters), (d.v.as_slice().unwrap(), d.parameters));
        if let Some(exact) = d.log_decay {
            assert_eq!(d_gates, exact.as_slice().unwrap());
        }
    }
}

#[test]
fn axes_may_be_broadcast() {
    let data: Vec<f64> = (0..5 * D).map(|i| (i as f64).sin()).collect();
    let all = RawTensor::new(&data, [2, 3, 5, D], [0, 0, D, 1]).unwrap();
    let one = RawTensor::contiguous(&data, [1, 1, 5, D]).unwrap();
    let softmax = SoftmaxAttention::<f64>::new(D).unwrap();
    let mut once = vec![0.0; 5 * D];
    let layer = MultiHead::new(softmax.clone(), 1, 1).unwrap();
    layer.forward_raw([one; 3], None, Mask::Full, None, &mut once).unwrap();
    let mut out = vec![0.0; 6 * 5 * D];
    let layer = MultiHead::new(softmax, 3, 3).unwrap();
    layer.forward_raw([all; 3], None, Mask::Full, None, &mut out).unwrap();
    assert!(out.chunks_exact(5 * D).all(|part| part == once));
}

#[test]
fn slices_that_do_not_fit() {
    let data = [0.0_f64; 24];
    for (shape, strides) in [
        ([1, 1, 4, 6], [24, 24, 7, 1]),
        ([2, 1, 4, 6], [24, 24, 6, 1]),
        ([usize::MAX, 2, 1, 1], [1, 1, 1, 1]),
        ([1, 1, 4, 6], [24, 24, usize::MAX, 1]),
    ] {
        let error = RawTensor::new(&data, shape, strides).unwrap_err();
        assert!(matches!(error, Error::InvalidOption { which: "strides", .. }), "{error}");
    }
    RawTensor::contiguous(&data, [0, 1, usize::MAX, usize::MAX]).unwrap_err();
    assert_eq!(RawTensor::new(&data, [0, 3, 5, 7], [1, 1, 1, 1]).unwrap().shape(), [0, 3, 5, 7]);
    let x = RawTensor::contiguous(&data, [1, 1, 4, 6]).unwrap();
    let layer = MultiHead::new(SoftmaxAttention::<f64>::new(6).unwrap(), 1, 1).unwrap();
    let error = layer.forward_raw([x; 3], None, Mask::Full, None, &mut [0.0; 23]).unwrap_err();
    assert_eq!(error, Error::Shape { which: "out", axis: "numbers", expected: 24, found: 23 });
    let gradients = RawGradients {
        d_q: &mut [0.0; 24],
        d_k: &mut [0.0; 25],
        d_v: &mut [0.0; 24],
        d_log_decay: None,
        d_parameters: None,
    };
    let error = layer.backward_raw([x; 3], None, Mask::Full, None, x, gradients).unwrap_err();
    assert_eq!(error, Error::Shape { which: "d_k", axis: "numbers", expected: 24, found: 25 });
}
