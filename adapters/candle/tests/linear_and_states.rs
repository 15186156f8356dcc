//! Linear attention over features of one's own, feature maps, and states in place of a cache.

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use common::{D_HEAD, assert_close, normal, numbers};
use dijiang::{
    DctFeatures, EluFeatures, Far, HybridAttention, LinearAttention, Mask, MultiHead, Performer,
    Side, SoftmaxAttention,
};
use dijiang_candle::{
    AttentionState, Extras, attention, features, linear_attention, linear_attention_in_operations,
    linear_attention_scaled,
};
use std::sync::Arc;

#[test]
fn linear_attention_is_that_of_tensor_operations() -> Result<()> {
    for (b, h, kv, n) in [(1, 1, 1, 1), (2, 4, 2, 64), (2, 2, 1, 65), (1, 3, 3, 200)] {
        for gated in [false, true] {
            let [q, k] = [(h, 1), (kv, 2)].map(|(h, seed)| normal((b, h, n, 5), seed).unwrap());
            let v = normal((b, kv, n, 3), 3)?;
            let gates = Var::from_tensor(&normal((b, kv, n, 1), 5)?.abs()?.neg()?)?;
            let phi = |x: &Var| x.elu(1.0)? + 1.0;
            let log_decay = gated.then_some(gates.as_tensor());
            let run = |out: Tensor| -> Result<_> {
                let u = normal((b, h, n, 3), 6)?;
                let d = (&out * u.as_tensor())?.sum_all()?.backward()?;
                let mut found = vec![out];
                for x in [&q, &k, &v].into_iter().chain(gated.then_some(&gates)) {
                    found.push(d.get(x).unwrap().clone());
                }
                Ok(found)
            };
            let found = run(linear_attention(&phi(&q)?, &phi(&k)?, &v, log_decay)?)?;
            let (phi_q, phi_k) = (phi(&q)?, phi(&k)?);
            let tensors = [&phi_q, &phi_k, v.as_tensor()];
            let exact = run(linear_attention_in_operations(tensors, None, log_decay)?)?;
            for (i, (found, exact)) in found.iter().zip(&exact).enumerate() {
                assert_close(&format!("{b} {h} {kv} {n} {gated} {i}"), found, exact, 1e-12);
            }
        }
    }
    Ok(())
}

#[test]
fn operations_refuse_what_the_kernel_refuses() -> Result<()> {
    let x = |heads, n, d| normal((2, heads, n, d), 1).unwrap().abs().unwrap();
    let (q, k, v) = (x(4, 9, 5), x(2, 9, 5), x(2, 9, 3));
    for [phi_q, phi_k, v] in [
        [&q, &x(1, 9, 5), &v],
        [&q, &k.narrow(0, 0, 1)?, &v],
        [&q, &x(2, 10, 5), &x(2, 10, 3)],
        [&q, &x(2, 9, 4), &v],
        [&x(3, 9, 5), &k, &v],
    ] {
        linear_attention(phi_q, phi_k, v, None).unwrap_err();
        linear_attention_in_operations([phi_q, phi_k, v], None, None).unwrap_err();
    }
    let none = |x: &Tensor| x.narrow(2, 0, 0).unwrap();
    let out = linear_attention_in_operations([&none(&q), &none(&k), &none(&v)], None, None)?;
    assert_eq!(out.dims(), [2, 4, 0, 3]);
    // a token that forgets
    let mut gates = vec![-0.1; 18];
    gates[4] = f64::NEG_INFINITY;
    let gates = Tensor::from_vec(gates, (2, 1, 9, 1), &Device::Cpu)?;
    let gates = Tensor::cat(&[&gates, &gates], 1)?;
    let exact = linear_attention(&q, &k, &v, Some(&gates))?;
    let found = linear_attention_in_operations([&q, &k, &v], None, Some(&gates))?;
    assert_close("forgotten", &found, &exact, 1e-12);
    Ok(())
}

#[test]
fn features_of_sixteen_bits_keep_their_log_scales() -> Result<()> {
    let map = Arc::new(Performer::<f32>::new(D_HEAD, 9, 1).unwrap());
    let x = (normal((1, 1, 30, D_HEAD), 1)?.as_tensor() * 3.0)?.to_dtype(DType::BF16)?;
    let (values, log_scale) = features(&map, Side::Key, &x)?;
    let exact = features(&map, Side::Key, &x.to_dtype(DType::F32)?)?;
    assert_eq!(numbers(&log_scale), numbers(&exact.1));
    let out = linear_attention_scaled((&values, &log_scale), (&values, &log_scale), &x, None)?;
    assert_eq!(out.dtype(), DType::BF16);
    Ok(())
}

#[test]
fn features_and_their_sums_are_the_kernel() -> Result<()> {
    let [q, k] = [(4, 1), (2, 2)].map(|(h, seed)| normal((2, h, 70, D_HEAD), seed).unwrap());
    let v = normal((2, 2, 70, 3), 3)?;
    // the scale of scores, which the kernel applies and a bare map does not
    let root = (D_HEAD as f64).sqrt().sqrt();
    let scaled = |x: &Var| x.as_tensor() / root;
    let run = |out: Tensor| -> Result<_> {
        let d = out.sqr()?.sum_all()?.backward()?;
        Ok((out, [&q, &k, &v].map(|x| d.get(x).unwrap().clone())))
    };
    let map = Arc::new(Performer::<f64>::new(D_HEAD, 9, 1).unwrap());
    let (phi_q, ls_q) = features(&map, Side::Query, &scaled(&q)?)?;
    let (phi_k, ls_k) = features(&map, Side::Key, &scaled(&k)?)?;
    assert_eq!((phi_q.dims(), ls_k.dims()), (&[2, 4, 70, 9][..], &[2, 2, 70, 1][..]));
    let layer = MultiHead::new(LinearAttention::new(map), 4, 2).unwrap();
    let exact = run(attention(&layer, &q, &k, &v, Mask::Causal, None)?)?;
    let of_core = linear_attention_scaled((&phi_q, &ls_q), (&phi_k, &ls_k), &v, None)?;
    let tensors = [&phi_q, &phi_k, v.as_tensor()];
    let of_candle = linear_attention_in_operations(tensors, Some(&ls_k), None)?;
    for (what, out) in [("core", of_core), ("candle", of_candle)] {
        let found = run(out)?;
        assert_close(what, &found.0, &exact.0, 1e-12);
        for (found, exact) in found.1.iter().zip(&exact.1) {
            assert_close(what, found, exact, 1e-11);
        }
    }
    let error = features(&Arc::new(Performer::<f64>::new(4, 9, 1).unwrap()), Side::Key, &k);
    assert!(error.unwrap_err().to_string().contains("6 columns where 4 are needed"));
    Ok(())
}

/// Kernels with a state of a fixed size and with a growing one.
fn layers() -> Vec<MultiHead<f32>> {
    let dct = LinearAttention::new(DctFeatures::<f32>::new(D_HEAD, 12, 1).unwrap());
    let hybrid = HybridAttention::<f32>::builder(D_HEAD).window(8).sinks(2).far(Far::merged(8));
    vec![
        MultiHead::new(dct, 4, 2).unwrap(),
        MultiHead::new(hybrid.build().unwrap(), 4, 2).unwrap(),
        MultiHead::new(SoftmaxAttention::<f32>::new(D_HEAD).unwrap(), 4, 2).unwrap(),
    ]
}

fn narrow(x: &Tensor, start: usize, len: usize) -> Tensor {
    x.narrow(2, start, len).unwrap()
}

#[test]
fn a_state_answers_as_the_whole_pass() -> Result<()> {
    let of = |heads: usize, d: usize, seed: usize| -> Tensor {
        normal((2, heads, 60, d), seed).unwrap().to_dtype(DType::F32).unwrap().detach()
    };
    let (q, k, v) = (of(4, D_HEAD, 1), of(2, D_HEAD, 2), of(2, 3, 3));
    for layer in layers() {
        let whole = attention(&layer, &q, &k, &v, Mask::Causal, None)?;
        let mut state = AttentionState::new(&layer, 2, 3)?;
        let mut outputs = Vec::new();
        for (start, len) in [(0, 33), (33, 1), (34, 6), (40, 20)] {
            let part = |x: &Tensor| narrow(x, start, len);
            if start == 34 {
                // a draft that is not accepted
                state.checkpoint();
                state.forward(&part(&q), &part(&q).narrow(1, 0, 2)?, &part(&v))?;
                state.rollback()?;
            }
            outputs.push(state.forward(&part(&q), &part(&k), &part(&v))?);
        }
        assert_eq!((state.len(), state.lengths()), (60, vec![60, 60]));
        assert_close("the whole", &Tensor::cat(&outputs, 2)?, &whole, 1e-5);
        // saved, and loaded elsewhere
        let text = serde_json::to_string(&state.save()?).unwrap();
        let mut other = AttentionState::new(&layer, 2, 3)?;
        other.load(&serde_json::from_str(&text).unwrap())?;
        let token = |x: &Tensor| narrow(x, 7, 1);
        let step = |state: &mut AttentionState<f32>| {
            numbers(&state.forward(&token(&q), &token(&k), &token(&v)).unwrap())
        };
        let mut swapped = state.clone();
        let expected = step(&mut state);
        assert_eq!(step(&mut other), expected);
        // sequences in another order
        swapped.reorder(&[1, 0])?;
        let turn = |x: &Tensor| Tensor::cat(&[x.narrow(0, 1, 1)?, x.narrow(0, 0, 1)?], 0);
        let (q1, k1, v1) = (turn(&token(&q))?, turn(&token(&k))?, turn(&token(&v))?);
        assert_eq!(numbers(&turn(&swapped.forward(&q1, &k1, &v1)?)?), expected);
        // a new sequence in one place
        state.reset_sequence(0)?;
        assert_eq!(state.lengths(), [0, 61]);
        state.reset();
        assert!(state.is_empty());
    }
    Ok(())
}

#[test]
fn sizes_and_types_of_states() -> Result<()> {
    let layers = layers();
    let x = |heads, n, dtype| Tensor::ones((1, heads, n, D_HEAD), dtype, &Device::Cpu);
    for (layer, grows) in layers.iter().zip([false, false, true]) {
        let mut state = AttentionState::new(layer, 1, D_HEAD)?;
        let mut step = |n, dtype| {
            let kv = x(2, n, dtype)?;
            let out = state.forward(&x(4, n, dtype)?, &kv, &kv)?;
            Ok::<_, candle_core::Error>((out, state.state_bytes()))
        };
        let before = step(100, DType::F32)?.1;
        let (out, after) = step(50, DType::BF16)?;
        assert_eq!(out.dtype(), DType::BF16);
        assert_eq!(after > before, grows);
    }
    // what is refused leaves the state as it was
    let mut state = AttentionState::new(&layers[0], 1, D_HEAD)?;
    let (q, kv) = (x(4, 3, DType::F32)?, x(2, 3, DType::F32)?);
    state.forward(&q, &kv, &kv)?;
    let nan = (&kv * f64::NAN)?;
    let error = state.forward(&q, &kv, &nan).unwrap_err().to_string();
    assert!(error.contains("NaN"), "{error}");
    state.forward(&q, &kv, &x(2, 3, DType::F64)?).unwrap_err();
    state.forward(&q, &kv, &kv.narrow(2, 0, 2)?).unwrap_err();
    assert_eq!(state.len(), 3);
    let out = state.forward_with([&q, &kv, &kv], Extras::default(), Some(&[1]))?;
    assert_eq!(state.len(), 4);
    assert_eq!(numbers(&narrow(&out, 1, 2)).iter().map(|x| x.abs()).sum::<f64>(), 0.0);
    Ok(())
}

#[test]
fn gates_of_a_state() -> Result<()> {
    let kernel = LinearAttention::new(EluFeatures::<f32>::new(D_HEAD).unwrap()).gated();
    let layer = MultiHead::new(kernel, 1, 1).unwrap();
    let x = normal((1, 1, 20, D_HEAD), 1)?.to_dtype(DType::F32)?.detach();
    let gates = Tensor::full(-0.1f32, (1, 1, 20, 1), &Device::Cpu)?;
    let mut state = AttentionState::new(&layer, 1, D_HEAD)?;
    state.forward(&x, &x, &x).unwrap_err();
    let out = state.forward_gated(&x, &x, &x, &gates)?;
    let extras = Extras { log_decay: Some(&gates), ..Extras::default() };
    let whole = dijiang_candle::attention_with(&layer, extras, [&x, &x, &x], Mask::Causal, None)?;
    assert_close("gates", &out, &whole, 1e-6);
    // no silent end of a gradient by gates alone
    let gates = Var::from_tensor(&gates)?;
    let out = state.forward_gated(&x, &x, &x, &gates)?;
    out.sum_all()?.backward().unwrap_err();
    Ok(())
}

#[test]
fn a_state_has_no_gradient() -> Result<()> {
    let layer = &layers()[0];
    let mut state = AttentionState::new(layer, 1, D_HEAD)?;
    let q = Var::ones((1, 4, 3, D_HEAD), DType::F32, &Device::Cpu)?;
    let kv = Tensor::ones((1, 2, 3, D_HEAD), DType::F32, &Device::Cpu)?;
    let out = state.forward(&q, &kv, &kv)?;
    let error = out.sum_all()?.backward().unwrap_err().to_string();
    assert!(error.contains("no backward pass"), "{error}");
    assert!(out.detach().sum_all()?.backward().is_ok());
    Ok(())
}
