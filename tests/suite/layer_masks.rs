//! Layers with padding anywhere, with biases, and with a record of the forward pass: each sequence
//! and head gets what it gets alone.

use crate::common::{assert_close, normal};
use dijiang::{
    Attention, EluFeatures, Error, Far, Head, HeadGradient, HybridAttention, LayerForward,
    LayerGradient, LayerGradients, LayerHead, LayerRecord, LinearAttention, Mask, MultiHead,
    Performer, ReluFeatures, Rotary, RotaryAttention, Scratch, SoftmaxAttention,
};
use ndarray::{Array2, Array4, ArrayD, Axis, array, s};
use std::sync::Arc;

type Kernel = Arc<dyn Attention<f64>>;

const BATCH: usize = 4;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const GROUP: usize = 2;
const D: usize = 4;
const DV: usize = 3;

fn random([b, h, n, d]: [usize; 4], seed: u64) -> Array4<f64> {
    normal::<f64>(b * h * n, d, 1.0, seed).into_shape_with_order((b, h, n, d)).unwrap()
}

fn performer(seed: u64) -> LinearAttention<Performer<f64>> {
    LinearAttention::new(Performer::new(D, 9, seed).unwrap())
}

fn layers() -> Vec<(&'static str, MultiHead<f64>)> {
    let softmax = || SoftmaxAttention::<f64>::new(D).unwrap();
    let rotary = RotaryAttention::new(Rotary::new(D).unwrap(), softmax());
    let hybrid = |far| HybridAttention::<f64>::builder(D).window(4).far(far).build().unwrap();
    let of = |kernel: Kernel| MultiHead::new(kernel, HEADS, KV_HEADS).unwrap();
    let mixed: Vec<Kernel> = vec![
        Arc::new(softmax().with_sink_logit(0.3).unwrap()),
        Arc::new(performer(1)),
        Arc::new(rotary.clone()),
        Arc::new(performer(2)),
    ];
    vec![
        ("softmax", of(Arc::new(softmax()))),
        ("window", of(Arc::new(softmax().with_window(5).unwrap()))),
        ("slope", of(Arc::new(softmax().with_alibi_slope(0.3).unwrap()))),
        ("rotary", of(Arc::new(rotary))),
        ("linear", of(Arc::new(performer(0)))),
        ("features", of(Arc::new(hybrid(Far::features(Performer::new(D, 9, 0).unwrap()))))),
        ("merged", of(Arc::new(hybrid(Far::merged(3))))),
        ("mixed", MultiHead::per_head(mixed, KV_HEADS).unwrap()),
    ]
}

fn has_full(name: &str) -> bool {
    !["window", "slope", "features", "merged"].contains(&name)
}

/// Which of `n` tokens of each sequence are real: some, all, none, and the last ones.
fn real(n: usize) -> Array2<bool> {
    Array2::from_shape_fn((BATCH, n), |(b, t)| match b {
        0 => t * 5 % 7 > 2,
        1 => true,
        2 => false,
        _ => t >= n / 3,
    })
}

struct Call {
    qkv: [Array4<f64>; 3],
    d_out: Array4<f64>,
    real: Array2<bool>,
    mask: Mask,
}

impl Call {
    /// Tokens that are not real hold something that must not be read.
    fn new([n_q, n_k]: [usize; 2], mask: Mask, dirt: f64) -> Self {
        let real = real(n_k);
        let mut qkv = [
            random([BATCH, HEADS, n_q, D], 1),
            random([BATCH, KV_HEADS, n_k, D], 2),
            random([BATCH, KV_HEADS, n_k, DV], 3),
        ];
        let mut d_out = random([BATCH, HEADS, n_q, DV], 4);
        for ((b, t), _) in real.indexed_iter().filter(|(_, real)| !**real) {
            qkv[1].slice_mut(s![b, .., t, ..]).fill(dirt);
            qkv[2].slice_mut(s![b, .., t, ..]).fill(dirt);
            if mask != Mask::Full && t + n_q >= n_k {
                qkv[0].slice_mut(s![b, .., t + n_q - n_k, ..]).fill(dirt);
                d_out.slice_mut(s![b, .., t + n_q - n_k, ..]).fill(dirt);
            }
        }
        Self { qkv, d_out, real, mask }
    }

    fn views(&self) -> [ndarray::ArrayView4<'_, f64>; 3] {
        self.qkv.each_ref().map(|x| x.view())
    }

    /// The real queries and keys of a sequence.
    fn rows(&self, b: usize) -> [Vec<usize>; 2] {
        let [n_q, n_k] = [0, 1].map(|i| self.qkv[i].dim().2);
        let keys: Vec<_> = (0..n_k).filter(|&t| self.real[[b, t]]).collect();
        let queries = match self.mask {
            _ if keys.is_empty() => vec![],
            Mask::Full => (0..n_q).collect(),
            _ => keys.iter().filter(|&&t| t + n_q >= n_k).map(|t| t + n_q - n_k).collect(),
        };
        [queries, keys]
    }

    fn forward(&self, layer: &MultiHead<f64>) -> Array4<f64> {
        let mut out = Array4::from_elem(self.d_out.dim(), f64::NAN);
        let call = LayerForward::new(self.views(), out.view_mut());
        layer.forward_with(call.with_key_mask(self.real.view()), self.mask, None).unwrap();
        out
    }

    /// Sequence by sequence, without what is not real.
    fn alone(&self, layer: &MultiHead<f64>) -> Array4<f64> {
        let mut out = Array4::zeros(self.d_out.dim());
        for b in 0..BATCH {
            let [queries, keys] = self.rows(b);
            let one = |x: &Array4<f64>, rows: &[usize]| {
                x.slice(s![b..=b, .., .., ..]).select(Axis(2), rows)
            };
            let [q, k, v] =
                [0, 1, 2].map(|i| one(&self.qkv[i], if i == 0 { &queries } else { &keys }));
            let found = layer.forward(q.view(), k.view(), v.view(), self.mask, None).unwrap();
            for (i, &t) in queries.iter().enumerate() {
                out.slice_mut(s![b, .., t, ..]).assign(&found.slice(s![0, .., i, ..]));
            }
        }
        out
    }

    fn backward(&self, layer: &MultiHead<f64>, kept: bool) -> LayerGradients<f64> {
        let (mut record, mut out) = (LayerRecord::new(), Array4::zeros(self.d_out.dim()));
        let call = LayerForward::new(self.views(), out.view_mut());
        let call = call.with_key_mask(self.real.view()).with_record(&mut record);
        layer.forward_with(call, self.mask, None).unwrap();
        let mut d = zeros(self.views(), layer);
        let views = [d.q.view_mut(), d.k.view_mut(), d.v.view_mut()];
        let mut call = LayerGradient::new(self.views(), self.d_out.view(), views)
            .with_key_mask(self.real.view())
            .with_parameters(&mut d.parameters);
        if kept {
            call = call.with_record(&record, out.view());
        }
        layer.backward_into(call, self.mask, None).unwrap();
        d
    }

    fn backward_alone(&self, layer: &MultiHead<f64>) -> LayerGradients<f64> {
        let mut d = zeros(self.views(), layer);
        for b in 0..BATCH {
            let [queries, keys] = self.rows(b);
            let one = |x: &Array4<f64>, rows: &[usize]| {
                x.slice(s![b..=b, .., .., ..]).select(Axis(2), rows)
            };
            let [q, d_out] = [&self.qkv[0], &self.d_out].map(|x| one(x, &queries));
            let [k, v] = [&self.qkv[1], &self.qkv[2]].map(|x| one(x, &keys));
            let found = layer.backward(q.view(), k.view(), v.view(), self.mask, None, d_out.view());
            let found = found.unwrap();
            for (to, from, rows) in [
                (&mut d.q, &found.q, &queries),
                (&mut d.k, &found.k, &keys),
                (&mut d.v, &found.v, &keys),
            ] {
                for (i, &t) in rows.iter().enumerate() {
                    to.slice_mut(s![b, .., t, ..]).assign(&from.slice(s![0, .., i, ..]));
                }
            }
            d.parameters.add_scaled(1.0, &found.parameters).unwrap();
        }
        d
    }
}

fn zeros(qkv: [ndarray::ArrayView4<'_, f64>; 3], layer: &MultiHead<f64>) -> LayerGradients<f64> {
    let [q, k, v] = qkv.map(|x| Array4::zeros(x.dim()));
    LayerGradients { q, k, v, log_decay: None, parameters: layer.parameters().zeros_like() }
}

fn rows(x: &Array4<f64>) -> Array2<f64> {
    let (b, h, n, d) = x.dim();
    x.to_shape((b * h * n, d)).unwrap().to_owned()
}

fn assert_same(what: &str, found: &LayerGradients<f64>, exact: &LayerGradients<f64>, units: f64) {
    for (name, found, exact) in
        [("q", &found.q, &exact.q), ("k", &found.k, &exact.k), ("v", &found.v, &exact.v)]
    {
        assert_close(&format!("{what} {name}"), &rows(found), &rows(exact), units);
    }
    for (name, exact) in exact.parameters.iter() {
        let flat = |x: ArrayD<f64>| Array2::from_shape_vec((1, x.len()), x.into_iter().collect());
        let found = found.parameters.get(name).unwrap().to_owned();
        let [found, exact] = [found, exact.to_owned()].map(|x| flat(x).unwrap());
        assert_close(&format!("{what} {name}"), &found, &exact, units);
    }
}

#[test]
fn sequences_get_what_they_get_without_padding() {
    for (name, layer) in layers() {
        let calls = [
            ([17, 17], Mask::Causal),
            ([1, 1], Mask::Causal),
            ([0, 0], Mask::Causal),
            ([6, 17], Mask::CausalTail),
            ([5, 17], Mask::Full),
        ];
        for (sizes, mask) in calls {
            let is_refused = mask == Mask::Full && !has_full(name)
                || mask == Mask::CausalTail && name == "merged";
            if is_refused {
                continue;
            }
            for dirt in [0.0, f64::NAN, 1e300] {
                let what = format!("{name} {mask:?} {sizes:?} {dirt}");
                let call = Call::new(sizes, mask, dirt);
                let [found, exact] = [call.forward(&layer), call.alone(&layer)];
                if mask == Mask::CausalTail {
                    // queries lie elsewhere in their chunks
                    assert_close(&what, &rows(&found), &rows(&exact), 64.0);
                } else {
                    assert_eq!(found, exact, "{what}");
                }
                let exact = call.backward_alone(&layer);
                assert_same(&what, &call.backward(&layer, false), &exact, 64.0);
                assert_same(&what, &call.backward(&layer, true), &exact, 1e4);
            }
        }
    }
}

#[test]
fn streams_leave_out_what_is_not_real() {
    for (name, layer) in layers() {
        if name == "slope" || name == "window" {
            // their sums differ by rounding: see the tests of windows
            continue;
        }
        let call = Call::new([17, 17], Mask::Causal, f64::NAN);
        let exact = call.forward(&layer);
        let mut stream = layer.stream(BATCH, DV).unwrap();
        let mut at = 0;
        for n in [5, 1, 1, 0, 3, 7] {
            let piece = s![.., .., at..at + n, ..];
            let [q, k, v] = call.qkv.each_ref().map(|x| x.slice(piece));
            let mut out = Array4::from_elem((BATCH, HEADS, n, DV), f64::NAN);
            let step = LayerForward::new([q, k, v], out.view_mut());
            let real = call.real.slice(s![.., at..at + n]);
            stream.extend_with(step.with_key_mask(real), None).unwrap();
            let expected = exact.slice(piece).to_owned();
            assert_close(&format!("{name} {at}"), &rows(&out), &rows(&expected), 1e3);
            at += n;
        }
        let real = call.real.outer_iter().map(|row| row.iter().filter(|real| **real).count());
        assert_eq!(stream.lengths(), real.collect::<Vec<_>>());
    }
}

#[test]
fn gates_of_tokens_that_are_not_real_are_left_out() {
    let kernel = LinearAttention::new(EluFeatures::<f64>::new(D).unwrap()).gated();
    let layer = MultiHead::new(kernel, HEADS, KV_HEADS).unwrap();
    let mut call = Call::new([17, 17], Mask::Causal, f64::NAN);
    let mut gates = random([BATCH, KV_HEADS, 17, 1], 8).mapv(|x| -x * x);
    for ((b, t), real) in call.real.indexed_iter() {
        if !real {
            gates.slice_mut(s![b, .., t, ..]).fill(7.0); // no log decay
        }
    }
    let mut out = Array4::zeros(call.d_out.dim());
    let forward = LayerForward::new(call.views(), out.view_mut()).with_log_decay(gates.view());
    layer.forward_with(forward.with_key_mask(call.real.view()), Mask::Causal, None).unwrap();
    let mut d = zeros(call.views(), &layer);
    let mut d_gates = Array4::zeros(gates.dim());
    let views = [d.q.view_mut(), d.k.view_mut(), d.v.view_mut()];
    let gradient = LayerGradient::new(call.views(), call.d_out.view(), views)
        .with_log_decay(gates.view(), d_gates.view_mut())
        .with_key_mask(call.real.view());
    layer.backward_into(gradient, Mask::Causal, None).unwrap();
    for b in 0..BATCH {
        let [queries, keys] = call.rows(b);
        let one = |x: &Array4<f64>| x.slice(s![b..=b, .., .., ..]).select(Axis(2), &keys);
        let [q, k, v] = call.qkv.each_ref().map(one);
        let (gates, d_out) = (one(&gates), one(&call.d_out));
        let mut exact = Array4::zeros((1, HEADS, queries.len(), DV));
        let [qv, kv, vv] = [&q, &k, &v].map(|x| x.view());
        layer.forward_gated(qv, kv, vv, gates.view(), None, exact.view_mut()).unwrap();
        let of = layer.backward_gated(qv, kv, vv, gates.view(), None, d_out.view()).unwrap();
        assert_eq!(one(&out), exact);
        assert_eq!(one(&d_gates), of.log_decay.unwrap());
        assert_eq!(one(&d.k), of.k);
    }
    // a bad gate is found at its row in the arrays
    gates[[0, 1, 5, 0]] = 0.5;
    let forward = LayerForward::new(call.views(), out.view_mut()).with_log_decay(gates.view());
    let error = layer.forward_with(forward.with_key_mask(call.real.view()), Mask::Causal, None);
    assert!(error.unwrap_err().to_string().contains("0.5 at row 5"));
    // and so are numbers
    gates.fill(-0.1);
    call.qkv[1][[3, 1, 9, 2]] = f64::NAN;
    let forward = LayerForward::new(call.views(), out.view_mut()).with_log_decay(gates.view());
    let error = layer.forward_with(forward.with_key_mask(call.real.view()), Mask::Causal, None);
    let inside = Error::NotFinite { which: "k", row: 9, column: 2 };
    let (sequence, head) = (3, LayerHead::Kv(1));
    assert_eq!(error.unwrap_err(), Error::InHead { sequence, head, error: Box::new(inside) });
}

/// Biases of a layer, for all or for each, some of them −∞.
fn biases(shape: [usize; 4]) -> Array4<f64> {
    let mut bias = random(shape, 11);
    for ((_, h, t, j), bias) in bias.indexed_iter_mut() {
        if j > 0 && (h + t * 7 + j * 3) % 11 < 3 {
            *bias = f64::NEG_INFINITY;
        }
    }
    bias
}

#[test]
fn biases_of_layers_are_those_of_their_heads() {
    let softmax = || SoftmaxAttention::<f64>::new(D).unwrap();
    let each: Vec<Kernel> = vec![
        Arc::new(softmax()),
        Arc::new(softmax().with_soft_cap(2.0).unwrap()),
        Arc::new(softmax().with_sink_logit(0.5).unwrap()),
        Arc::new(softmax().with_scale(0.3)),
    ];
    let layers = [
        MultiHead::new(softmax(), HEADS, KV_HEADS).unwrap(),
        MultiHead::per_head(each.clone(), KV_HEADS).unwrap(),
    ];
    for (layer, is_mixed) in layers.iter().zip([false, true]) {
        for (batch, heads) in [(1, 1), (1, HEADS), (BATCH, 1), (BATCH, HEADS)] {
            for ([n_q, n_k], mask) in
                [([9, 9], Mask::Causal), ([4, 9], Mask::CausalTail), ([4, 9], Mask::Full)]
            {
                let mut call = Call::new([n_q, n_k], mask, 0.5);
                call.real.fill(true);
                let bias = biases([batch, heads, n_q, n_k]);
                let what = format!("{is_mixed} {batch} {heads} {mask:?}");
                let (mut record, mut out) = (LayerRecord::new(), Array4::zeros(call.d_out.dim()));
                let forward = LayerForward::new(call.views(), out.view_mut());
                let forward = forward.with_bias(bias.view()).with_record(&mut record);
                layer.forward_with(forward, mask, None).unwrap();
                let mut d = zeros(call.views(), layer);
                let mut d_bias = Array4::ones(bias.dim());
                let views = [d.q.view_mut(), d.k.view_mut(), d.v.view_mut()];
                let gradient = LayerGradient::new(call.views(), call.d_out.view(), views)
                    .with_bias(bias.view(), Some(d_bias.view_mut()));
                layer.backward_into(gradient, mask, None).unwrap();
                let mut kept = zeros(call.views(), layer);
                let views = [kept.q.view_mut(), kept.k.view_mut(), kept.v.view_mut()];
                let gradient = LayerGradient::new(call.views(), call.d_out.view(), views)
                    .with_bias(bias.view(), None)
                    .with_record(&record, out.view());
                layer.backward_into(gradient, mask, None).unwrap();
                assert_same(&what, &kept, &d, 1e4);

                let mut exact = zeros(call.views(), layer);
                let mut exact_bias = Array4::ones(bias.dim());
                for (b, h) in (0..BATCH).flat_map(|b| (0..HEADS).map(move |h| (b, h))) {
                    let kernel =
                        if is_mixed { &*each[h] } else { &softmax() as &dyn Attention<f64> };
                    let at = s![b.min(batch - 1), h.min(heads - 1), .., ..];
                    let kv = s![b, h / GROUP, .., ..];
                    let [q, k, v] = &call.qkv;
                    let [q, k, v] = [q.slice(s![b, h, .., ..]), k.slice(kv), v.slice(kv)];
                    let of_head = bias.slice(at).insert_axis(Axis(0));
                    let mut one = Array2::zeros((n_q, DV));
                    let head = Head::new(q, k, v, one.view_mut()).with_bias(of_head);
                    kernel.forward_heads(&mut [head], mask, &mut Scratch::new()).unwrap();
                    assert_eq!(one, out.slice(s![b, h, .., ..]), "{what}");
                    let views = [
                        exact.q.slice_mut(s![b, h, .., ..]),
                        exact.k.slice_mut(kv),
                        exact.v.slice_mut(kv),
                    ];
                    let d_out = call.d_out.slice(s![b, h, .., ..]);
                    let d_of_head = exact_bias.slice_mut(at).insert_axis(Axis(0));
                    let head = HeadGradient::new([q, k, v], d_out, views);
                    let head = head.with_bias(of_head, Some(d_of_head));
                    kernel.backward_heads(&mut [head], mask, &mut Scratch::new()).unwrap();
                }
                assert_same(&what, &d, &exact, 1e3);
                assert_close(&what, &rows(&d_bias), &rows(&exact_bias), 1e3);
            }
        }
    }
}

#[test]
fn biases_go_with_padding() {
    let layer = MultiHead::new(SoftmaxAttention::<f64>::new(D).unwrap(), HEADS, KV_HEADS).unwrap();
    for (sizes, mask) in [([9, 9], Mask::Causal), ([4, 9], Mask::CausalTail), ([4, 9], Mask::Full)]
    {
        let call = Call::new(sizes, mask, f64::NAN);
        let mut bias = random([1, HEADS, sizes[0], sizes[1]], 3);
        bias[[0, 1, 2, 1]] = f64::NEG_INFINITY;
        let mut out = Array4::zeros(call.d_out.dim());
        let forward = LayerForward::new(call.views(), out.view_mut());
        let forward = forward.with_bias(bias.view()).with_key_mask(call.real.view());
        layer.forward_with(forward, mask, None).unwrap();
        let mut d = zeros(call.views(), &layer);
        let mut d_bias = Array4::zeros(bias.dim());
        let views = [d.q.view_mut(), d.k.view_mut(), d.v.view_mut()];
        let gradient = LayerGradient::new(call.views(), call.d_out.view(), views)
            .with_bias(bias.view(), Some(d_bias.view_mut()))
            .with_key_mask(call.real.view());
        layer.backward_into(gradient, mask, None).unwrap();
        let mut exact_bias = Array4::zeros(bias.dim());
        for b in 0..BATCH {
            let [queries, keys] = call.rows(b);
            let one = |x: &Array4<f64>, rows: &[usize]| {
                x.slice(s![b..=b, .., .., ..]).select(Axis(2), rows)
            };
            let [q, d_out] = [&call.qkv[0], &call.d_out].map(|x| one(x, &queries));
            let [k, v] = [&call.qkv[1], &call.qkv[2]].map(|x| one(x, &keys));
            let bias = bias.select(Axis(2), &queries).select(Axis(3), &keys);
            let mut exact = Array4::zeros(d_out.dim());
            let views = [&q, &k, &v].map(|x| x.view());
            let forward = LayerForward::new(views, exact.view_mut()).with_bias(bias.view());
            layer.forward_with(forward, mask, None).unwrap();
            assert_eq!(one(&out, &queries), exact, "{mask:?}");
            let mut of = zeros(views, &layer);
            let mut d_of = Array4::zeros(bias.dim());
            let gradients = [of.q.view_mut(), of.k.view_mut(), of.v.view_mut()];
            let gradient = LayerGradient::new(views, d_out.view(), gradients)
                .with_bias(bias.view(), Some(d_of.view_mut()));
            layer.backward_into(gradient, mask, None).unwrap();
            assert_close("q", &rows(&one(&d.q, &queries)), &rows(&of.q), 64.0);
            assert_close("k", &rows(&one(&d.k, &keys)), &rows(&of.k), 64.0);
            for ((_, h, i, j), x) in d_of.indexed_iter() {
                exact_bias[[0, h, queries[i], keys[j]]] += x;
            }
        }
        assert_close("bias", &rows(&d_bias), &rows(&exact_bias), 1e3);
    }
}

#[test]
fn streams_take_biases() {
    let layer = MultiHead::new(SoftmaxAttention::<f64>::new(D).unwrap(), HEADS, KV_HEADS).unwrap();
    let mut call = Call::new([9, 9], Mask::Causal, 0.5);
    call.real.fill(true);
    for (batch, heads) in [(1, 1), (BATCH, HEADS)] {
        let bias = biases([batch, heads, 9, 9]);
        let mut exact = Array4::zeros(call.d_out.dim());
        let forward = LayerForward::new(call.views(), exact.view_mut()).with_bias(bias.view());
        layer.forward_with(forward, Mask::Causal, None).unwrap();
        let mut stream = layer.stream(BATCH, DV).unwrap();
        let mut at = 0;
        for n in [1, 3, 1, 4] {
            let piece = s![.., .., at..at + n, ..];
            let qkv = call.qkv.each_ref().map(|x| x.slice(piece));
            let mut out = Array4::zeros((BATCH, HEADS, n, DV));
            let of = bias.slice(s![.., .., at..at + n, ..at + n]);
            // one that hides all: an error, and no head has moved
            let blind = of.mapv(|_| f64::NEG_INFINITY);
            let step = LayerForward::new(qkv, out.view_mut()).with_bias(blind.view());
            let error = stream.extend_with(step, None).unwrap_err();
            assert!(error.to_string().contains("sees no key"), "{error}");
            assert_eq!(stream.lengths(), [at; BATCH]);
            let step = LayerForward::new(qkv, out.view_mut()).with_bias(of);
            stream.extend_with(step, None).unwrap();
            assert_close("bias", &rows(&out), &rows(&exact.slice(piece).to_owned()), 1e3);
            at += n;
        }
        // too few columns
        let qkv = call.qkv.each_ref().map(|x| x.slice(s![.., .., ..1, ..]));
        let mut out = Array4::zeros((BATCH, HEADS, 1, DV));
        let step =
            LayerForward::new(qkv, out.view_mut()).with_bias(bias.slice(s![.., .., ..1, ..]));
        let error = stream.extend_with(step, None).unwrap_err();
        let expected = Error::Shape { which: "bias", axis: "columns", expected: 10, found: 9 };
        assert_eq!(error, expected);
    }
}

#[test]
fn records_are_of_their_layer_and_call() {
    for (name, layer) in layers() {
        let mut call = Call::new([600, 600], Mask::Causal, 0.5);
        call.real.fill(true);
        let (mut record, mut out) = (LayerRecord::new(), Array4::zeros(call.d_out.dim()));
        let forward = LayerForward::new(call.views(), out.view_mut());
        layer.forward_with(forward.with_record(&mut record), Mask::Causal, None).unwrap();
        let expected = name == "features";
        assert_eq!(record.is_empty(), expected, "{name}");
        let gradients = |record: Option<&LayerRecord<f64>>| {
            let mut d = zeros(call.views(), &layer);
            let views = [d.q.view_mut(), d.k.view_mut(), d.v.view_mut()];
            let gradient = LayerGradient::new(call.views(), call.d_out.view(), views);
            let mut gradient = gradient.with_parameters(&mut d.parameters);
            gradient.record = record.map(|record| (record, out.view()));
            layer.backward_into(gradient, Mask::Causal, None).unwrap();
            d
        };
        assert_same(name, &gradients(Some(&record)), &gradients(None), 1e4);
        // a call without use for a record leaves an empty one
        if name == "linear" {
            let forward = LayerForward::new(call.views(), out.view_mut());
            layer.forward_with(forward.with_record(&mut record), Mask::Full, None).unwrap();
            assert!(record.is_empty());
        }
    }
    let layer = &layers()[0].1;
    let call = Call::new([9, 9], Mask::Causal, 0.0);
    let (mut record, mut out) = (LayerRecord::new(), Array4::zeros((1, HEADS, 9, DV)));
    let of_first = call.views().map(|x| x.slice_move(s![..1, .., .., ..]));
    let forward = LayerForward::new(of_first, out.view_mut()).with_record(&mut record);
    layer.forward_with(forward, Mask::Causal, None).unwrap();
    let mut d = zeros(call.views(), layer);
    let views = [d.q.view_mut(), d.k.view_mut(), d.v.view_mut()];
    let outputs = Array4::zeros(call.d_out.dim());
    let gradient = LayerGradient::new(call.views(), call.d_out.view(), views);
    let gradient = gradient.with_record(&record, outputs.view());
    let error = layer.backward_into(gradient, Mask::Causal, None).unwrap_err();
    assert!(error.to_string().contains("`record`"), "{error}");
    let mut stream = layer.stream(BATCH, DV).unwrap();
    let mut out = Array4::zeros(call.d_out.dim());
    let step = LayerForward::new(call.views(), out.view_mut()).with_record(&mut record);
    assert!(matches!(stream.extend_with(step, None), Err(Error::Unsupported { .. })));
}

#[test]
fn what_does_not_fit_is_refused() {
    let layer = &layers()[0].1;
    let call = Call::new([9, 9], Mask::Causal, 0.0);
    let mut out = Array4::zeros(call.d_out.dim());
    let mut run = |real: &Array2<bool>, lengths: Option<&[usize]>| {
        let forward = LayerForward::new(call.views(), out.view_mut()).with_key_mask(real.view());
        layer.forward_with(forward, Mask::Causal, lengths).unwrap_err()
    };
    let shape = |axis, expected, found| Error::Shape { which: "key_mask", axis, expected, found };
    assert_eq!(run(&Array2::default((3, 9)), None), shape("sequences", BATCH, 3));
    assert_eq!(run(&Array2::default((BATCH, 8)), None), shape("columns", 9, 8));
    let both = run(&call.real, Some(&[9; BATCH]));
    assert!(matches!(both, Error::Unsupported { .. }), "{both}");
    let run = |layer: &MultiHead<f64>, bias: [usize; 4], of_bias: Option<[usize; 4]>| {
        let bias = Array4::zeros(bias);
        let mut out = Array4::zeros(call.d_out.dim());
        let forward = LayerForward::new(call.views(), out.view_mut()).with_bias(bias.view());
        layer.forward_with(forward, Mask::Causal, None)?;
        let mut d = zeros(call.views(), layer);
        let mut d_bias = of_bias.map(Array4::zeros);
        let views = [d.q.view_mut(), d.k.view_mut(), d.v.view_mut()];
        let gradient = LayerGradient::new(call.views(), call.d_out.view(), views)
            .with_bias(bias.view(), d_bias.as_mut().map(|x| x.view_mut()));
        layer.backward_into(gradient, Mask::Causal, None)
    };
    let shape = |which, axis, expected, found| Error::Shape { which, axis, expected, found };
    let error = run(layer, [2, 1, 9, 9], None).unwrap_err();
    assert_eq!(error, shape("bias", "sequences", BATCH, 2));
    assert_eq!(run(layer, [1, 3, 9, 9], None).unwrap_err(), shape("bias", "heads", HEADS, 3));
    assert_eq!(run(layer, [1, 1, 8, 9], None).unwrap_err(), shape("bias", "rows", 9, 8));
    assert_eq!(run(layer, [1, 1, 9, 10], None).unwrap_err(), shape("bias", "columns", 9, 10));
    let error = run(layer, [1, 1, 9, 9], Some([1, 2, 9, 9])).unwrap_err();
    assert_eq!(error, shape("d_bias", "heads", 1, 2));
    // kernels without biases say so
    let linear = &layers()[4].1;
    assert!(matches!(run(linear, [1, 1, 9, 9], None), Err(Error::Unsupported { .. })));
}

#[test]
fn tails_without_a_real_query_answer_nothing() {
    // a query of zeros has no features at all here
    let relu =
        LinearAttention::new(ReluFeatures::<f64>::new(D).unwrap().with_epsilon(0.0).unwrap());
    let layer = MultiHead::new(relu, HEADS, KV_HEADS).unwrap();
    let mut call = Call::new([2, 5], Mask::CausalTail, 0.5);
    call.qkv.iter_mut().for_each(|x| x.mapv_inplace(f64::abs));
    call.real.assign(&array![
        [true, true, true, true, true],
        [true, true, true, false, true],
        [true, true, true, false, false],
        [false; 5]
    ]);
    let (found, exact) = (call.forward(&layer), call.alone(&layer));
    assert_close("relu", &rows(&found), &rows(&exact), 64.0);
    for (name, layer) in layers() {
        if name != "merged" {
            let exact = call.backward_alone(&layer);
            assert_same(name, &call.backward(&layer, true), &exact, 1e4);
        }
    }
}

#[test]
fn bad_biases_are_found_at_their_place() {
    let layer = &layers()[0].1;
    let mut call = Call::new([4, 4], Mask::Causal, 0.0);
    call.real.fill(true);
    call.real[[1, 1]] = false;
    let mut bias = Array4::zeros((BATCH, HEADS, 4, 4));
    bias[[1, 2, 3, 2]] = f64::NAN;
    let mut out = Array4::zeros(call.d_out.dim());
    let forward = LayerForward::new(call.views(), out.view_mut());
    let forward = forward.with_bias(bias.view()).with_key_mask(call.real.view());
    let error = layer.forward_with(forward, Mask::Causal, None).unwrap_err();
    assert!(error.to_string().contains("`bias` is NaN or infinite at row 3, column 2"), "{error}");
}
