//! Attention over tensors is that of the core, with candle's own gradients.

mod common;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use common::{D_HEAD, assert_close, normal, numbers};
use dijiang::{
    DctFeatures, EluFeatures, Far, FeatureMap, HybridAttention, LearnedFeatures, LinearAttention,
    Mask, MultiHead, Performer, RawGradients, RawTensor, SoftmaxAttention,
};
use dijiang_candle::{Extras, attention, attention_with, parameters, via_host};

/// Softmax attention in operations of candle.
fn in_operations(q: &Tensor, k: &Tensor, v: &Tensor, mask: Mask) -> Result<Tensor> {
    let (b, h, n, d) = q.dims4()?;
    let (_, kv, n_k, d_v) = v.dims4()?;
    let group = h / kv;
    let of_group = |x: &Tensor, columns: usize| -> Result<Tensor> {
        let x = x.unsqueeze(2)?.expand((b, kv, group, n_k, columns))?;
        x.reshape((b, h, n_k, columns))
    };
    let scores =
        (q.contiguous()?.matmul(&of_group(k, d)?.t()?.contiguous()?)? / (d as f64).sqrt())?;
    let scores = match mask {
        Mask::Causal => {
            let seen = Tensor::tril2(n, DType::F64, q.device())?;
            scores.broadcast_add(&((seen - 1.0)? * 1e300)?)?
        }
        _ => scores,
    };
    candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&of_group(v, d_v)?)
}

#[test]
fn softmax_is_candle_s_own() -> Result<()> {
    for (b, h, kv, n) in [(1, 1, 1, 1), (2, 4, 2, 37), (1, 6, 1, 70), (3, 2, 2, 64)] {
        let layer = MultiHead::new(SoftmaxAttention::<f64>::new(D_HEAD).unwrap(), h, kv).unwrap();
        for mask in [Mask::Causal, Mask::Full] {
            // tokens before heads, as projections leave them: strided views
            let [q, k] =
                [(h, 1), (kv, 2)].map(|(h, seed)| normal((b, n, h, D_HEAD), seed).unwrap());
            let v = normal((b, n, kv, 3), 3)?;
            let views = [&q, &k, &v].map(|x| x.transpose(1, 2).unwrap());
            let u = normal((b, h, n, 3), 4)?;
            let run = |out: Tensor| -> Result<_> {
                let d = (&out * u.as_tensor())?.sum_all()?.backward()?;
                let found = [&q, &k, &v].map(|x| d.get(x).unwrap().clone());
                Ok((out, found))
            };
            let found = run(attention(&layer, &views[0], &views[1], &views[2], mask, None)?)?;
            let exact = run(in_operations(&views[0], &views[1], &views[2], mask)?)?;
            let what = format!("{b} {h} {kv} {n} {mask:?}");
            assert_close(&what, &found.0, &exact.0, 1e-12);
            for (found, exact) in found.1.iter().zip(&exact.1) {
                assert_close(&what, found, exact, 1e-12);
            }
        }
    }
    Ok(())
}

/// What the core gives for the same numbers.
fn of_core(
    layer: &MultiHead<f64>,
    [q, k, v]: [&Tensor; 3],
    mask: Mask,
    lengths: Option<&[usize]>,
    d_out: &Tensor,
) -> (Tensor, [Tensor; 3], dijiang::Parameters<f64>) {
    let dims = |x: &Tensor| -> [usize; 4] { x.dims4().unwrap().into() };
    let all = [q, k, v, d_out].map(numbers);
    let raw = |i: usize, x: &Tensor| RawTensor::contiguous(&all[i], dims(x)).unwrap();
    let (inputs, d_raw) = ([raw(0, q), raw(1, k), raw(2, v)], raw(3, d_out));
    let mut out = vec![0.0; all[3].len()];
    layer.forward_raw(inputs, None, mask, lengths, &mut out).unwrap();
    let [mut d_q, mut d_k, mut d_v] = [0, 1, 2].map(|i| vec![0.0; all[i].len()]);
    let mut d_parameters = layer.parameters().zeros_like();
    let gradients = RawGradients {
        d_q: &mut d_q,
        d_k: &mut d_k,
        d_v: &mut d_v,
        d_log_decay: None,
        d_parameters: Some(&mut d_parameters),
    };
    layer.backward_raw(inputs, None, mask, lengths, d_raw, gradients).unwrap();
    let tensor = |x: Vec<f64>, of: &Tensor| Tensor::from_vec(x, of.dims(), &Device::Cpu).unwrap();
    let d = [tensor(d_q, q), tensor(d_k, k), tensor(d_v, v)];
    (tensor(out, d_out), d, d_parameters)
}

#[test]
fn kernels_are_those_of_the_core() -> Result<()> {
    let performer = LinearAttention::new(Performer::<f64>::new(D_HEAD, 9, 1).unwrap());
    let dct = LinearAttention::new(DctFeatures::<f64>::new(D_HEAD, 12, 1).unwrap());
    let hybrid = HybridAttention::<f64>::builder(D_HEAD).window(8).sinks(2).far(Far::merged(8));
    let learned = LinearAttention::new(LearnedFeatures::<f64>::hedgehog(D_HEAD).unwrap());
    let layers = [
        MultiHead::new(performer, 4, 2).unwrap(),
        MultiHead::new(dct, 4, 2).unwrap(),
        MultiHead::new(hybrid.build().unwrap(), 4, 2).unwrap(),
        MultiHead::new(learned, 4, 2).unwrap(),
    ];
    for layer in &layers {
        for lengths in [None, Some(&[50, 20][..])] {
            let [q, k] = [(4, 1), (2, 2)].map(|(h, s)| normal((2, h, 50, D_HEAD), s).unwrap());
            let (v, u) = (normal((2, 2, 50, 3), 3)?, normal((2, 4, 50, 3), 4)?);
            let vars: Vec<_> = parameters(layer)?
                .into_iter()
                .map(|(name, tensor)| (name, Var::from_tensor(&tensor).unwrap()))
                .collect();
            let named: Vec<_> =
                vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
            let (exact, d_exact, d_parameters) =
                of_core(layer, [&q, &k, &v], Mask::Causal, lengths, &u);
            let plain = attention(layer, &q, &k, &v, Mask::Causal, lengths)?;
            assert_eq!(numbers(&plain), numbers(&exact));
            let extras = Extras { parameters: &named, ..Extras::default() };
            let out = attention_with(layer, extras, [&q, &k, &v], Mask::Causal, lengths)?;
            assert_close("parameters of its own", &out, &exact, 1e-14);
            for out in [plain, out] {
                let d = (&out * u.as_tensor())?.sum_all()?.backward()?;
                for (x, exact) in [&q, &k, &v].into_iter().zip(&d_exact) {
                    assert_close("a gradient", d.get(x).unwrap(), exact, 1e-12);
                }
                for (name, var) in &vars {
                    let Some(found) = d.get(var) else { continue };
                    let exact = d_parameters.get(name).unwrap();
                    let exact = Tensor::from_iter(exact.iter().copied(), &Device::Cpu)?;
                    assert_close(name, &found.flatten_all()?, &exact, 1e-12);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn gates_are_trained() -> Result<()> {
    let layer = |kernel: LinearAttention<EluFeatures<f64>>| MultiHead::new(kernel, 2, 1).unwrap();
    let kernel = LinearAttention::new(EluFeatures::<f64>::new(D_HEAD).unwrap());
    let gated = layer(kernel.clone().gated());
    let [q, k] = [(2, 1), (1, 2)].map(|(h, s)| normal((2, h, 40, D_HEAD), s).unwrap());
    let v = normal((2, 1, 40, 3), 3)?;
    for columns in [1, D_HEAD] {
        let gates = Var::from_tensor(&normal((2, 1, 40, columns), 5)?.abs()?.neg()?)?;
        let run = |gates: &Tensor| {
            let extras = Extras { log_decay: Some(gates), ..Extras::default() };
            attention_with(&gated, extras, [&q, &k, &v], Mask::Causal, None)?.sqr()?.sum_all()
        };
        let d = run(&gates)?.backward()?;
        let way = normal((2, 1, 40, columns), 6)?.abs()?.neg()?;
        let found = (d.get(&gates).unwrap() * &way)?.sum_all()?.to_scalar::<f64>()?;
        let at = |step: f64| -> Result<f64> {
            run(&(gates.as_tensor() + (&way * step)?)?)?.to_scalar::<f64>()
        };
        let difference = (at(1e-6)? - at(-1e-6)?) / 2e-6;
        assert!((found - difference).abs() < 1e-6 * found.abs().max(1.0), "{found} {difference}");
        // zero gates are none
        let extras = Extras { log_decay: Some(&gates.zeros_like()?), ..Extras::default() };
        let none = attention_with(&gated, extras, [&q, &k, &v], Mask::Causal, None)?;
        let plain = attention(&layer(kernel.clone()), &q, &k, &v, Mask::Causal, None)?;
        assert_close("no decay", &none, &plain, 1e-13);
    }
    Ok(())
}

#[test]
fn types_of_sixteen_bits() -> Result<()> {
    let layer = MultiHead::new(SoftmaxAttention::<f32>::new(D_HEAD).unwrap(), 4, 2).unwrap();
    let [q, k] = [(4, 1), (2, 2)].map(|(h, s)| normal((3, h, 30, D_HEAD), s).unwrap());
    let v = normal((3, 2, 30, 3), 3)?;
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F16, 2e-3), (DType::BF16, 2e-2)] {
        let [q, k, v] =
            [&q, &k, &v].map(|x| Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap());
        let lengths = [30, 7, 1];
        let out = attention(&layer, &q, &k, &v, Mask::Causal, Some(&lengths))?;
        assert_eq!(out.dtype(), dtype);
        let d = out.to_dtype(DType::F32)?.sqr()?.sum_all()?.backward()?;
        // the same numbers in 64 bits
        let wide = MultiHead::new(SoftmaxAttention::<f64>::new(D_HEAD).unwrap(), 4, 2).unwrap();
        let [q64, k64, v64] =
            [&q, &k, &v].map(|x| Var::from_tensor(&x.to_dtype(DType::F64).unwrap()).unwrap());
        let exact = attention(&wide, &q64, &k64, &v64, Mask::Causal, Some(&lengths))?;
        let d_exact = exact.sqr()?.sum_all()?.backward()?;
        assert_close("outputs", &out, &exact, tolerance);
        for (x, wide) in [(&q, &q64), (&k, &k64), (&v, &v64)] {
            let found = d.get(x).unwrap();
            assert_eq!(found.dtype(), dtype);
            assert_close("a gradient", found, d_exact.get(wide).unwrap(), 4.0 * tolerance);
        }
    }
    Ok(())
}

#[test]
fn sixteen_bits_round_no_parameter_and_name_the_sequence() -> Result<()> {
    let kernel = LinearAttention::new(LearnedFeatures::<f32>::hedgehog(D_HEAD).unwrap());
    let layer = MultiHead::new(kernel, 1, 1).unwrap();
    let x = normal((3, 1, 20, D_HEAD), 1)?.to_dtype(DType::BF16)?.detach();
    let named = parameters(&layer)?;
    let vars: Vec<_> = named.iter().map(|(_, x)| Var::from_tensor(x).unwrap()).collect();
    let named: Vec<_> =
        named.iter().zip(&vars).map(|((n, _), var)| (n.clone(), var.as_tensor().clone())).collect();
    let extras = Extras { parameters: &named, ..Extras::default() };
    let out = attention_with(&layer, extras, [&x, &x, &x], Mask::Causal, None)?;
    assert_eq!(out.dtype(), DType::BF16);
    let d = (out.to_dtype(DType::F32)? * 1e6)?.sum_all()?.backward()?;
    assert!(vars.iter().all(|var| d.get(var).unwrap().dtype() == DType::F32));
    let nan = (x.narrow(0, 2, 1)? * f64::NAN)?;
    let bad = Tensor::cat(&[&x.narrow(0, 0, 2)?, &nan], 0)?;
    let error = attention(&layer, &x, &bad, &x, Mask::Causal, None).unwrap_err().to_string();
    assert!(error.contains("sequence 2"), "{error}");
    Ok(())
}

#[test]
fn bad_input_is_refused_in_words() -> Result<()> {
    let layer = MultiHead::new(SoftmaxAttention::<f32>::new(D_HEAD).unwrap(), 2, 1).unwrap();
    let x = |dtype, heads, d| Tensor::ones((1, heads, 5, d), dtype, &Device::Cpu).unwrap();
    let (q, k) = (x(DType::F32, 2, D_HEAD), x(DType::F32, 1, D_HEAD));
    let refused = |q: &Tensor, k: &Tensor, v: &Tensor, lengths: Option<&[usize]>| {
        attention(&layer, q, k, v, Mask::Causal, lengths).unwrap_err().to_string()
    };
    assert!(refused(&x(DType::F64, 2, D_HEAD), &k, &k, None).contains("`q` is F64"));
    assert!(refused(&x(DType::BF16, 2, D_HEAD), &k, &k, None).contains("`k` is F32 and `q` BF16"));
    assert!(refused(&q, &x(DType::U8, 1, D_HEAD), &k, None).contains("`k` is U8"));
    assert!(refused(&q, &k, &x(DType::F32, 1, 3).squeeze(0)?, None).contains("`v` has shape"));
    assert!(refused(&x(DType::F32, 3, D_HEAD), &k, &k, None).contains("heads"));
    assert!(refused(&x(DType::F32, 2, 5), &k, &k, None).contains("columns"));
    assert!(refused(&q, &k, &k, Some(&[6])).contains('6'));
    assert!(refused(&q, &k, &k, Some(&[1, 2])).contains("lengths"));
    let more = Tensor::cat(&[&k, &k], 0)?;
    assert!(refused(&q, &more, &more, None).contains("sequences"));
    assert!(refused(&Tensor::cat(&[&q, &q], 0)?, &k, &k, None).contains("sequences"));
    let nan = (&k * f64::NAN)?;
    assert!(refused(&q, &nan, &k, None).contains("NaN"));
    let gates = x(DType::F32, 1, 1);
    let extras = Extras { log_decay: Some(&gates), ..Extras::default() };
    attention_with(&layer, extras, [&q, &k, &k], Mask::Causal, None).unwrap_err();
    let named = [("heads.0.map.weights".to_owned(), gates)];
    let extras = Extras { parameters: &named, ..Extras::default() };
    let error = attention_with(&layer, extras, [&q, &k, &k], Mask::Causal, None).unwrap_err();
    assert!(error.to_string().contains("heads.0.map.weights"), "{error}");
    Ok(())
}

/// A map without a backward pass, of somebody's own.
#[derive(Debug)]
struct OneWay;

impl FeatureMap<f32> for OneWay {
    fn head_dim(&self) -> usize {
        D_HEAD
    }
    fn num_features(&self) -> usize {
        1
    }
    fn map_queries(
        &self,
        _: dijiang::ndarray::ArrayView2<'_, f32>,
        mut values: dijiang::ndarray::ArrayViewMut2<'_, f32>,
        mut log_scale: dijiang::ndarray::ArrayViewMut1<'_, f32>,
    ) -> std::result::Result<(), dijiang::Error> {
        values.fill(1.0);
        log_scale.fill(0.0);
        Ok(())
    }
}

#[test]
fn a_gradient_that_is_not_there_is_an_error() -> Result<()> {
    let layer = MultiHead::new(LinearAttention::new(OneWay), 1, 1).unwrap();
    let x = Var::ones((1, 1, 5, D_HEAD), DType::F32, &Device::Cpu)?;
    let out = attention(&layer, &x, &x, &x, Mask::Causal, None)?;
    let error = out.sum_all()?.backward().unwrap_err();
    assert!(error.to_string().contains("gradient of this feature map"), "{error}");
    Ok(())
}

#[test]
fn by_way_of_the_host() -> Result<()> {
    let layer = MultiHead::new(SoftmaxAttention::<f64>::new(D_HEAD).unwrap(), 1, 1).unwrap();
    let x = normal((1, 1, 5, D_HEAD), 1)?;
    let out = via_host([&x, &x, &x], |[q, k, v]| attention(&layer, &q, &k, &v, Mask::Full, None))?;
    let plain = attention(&layer, &x, &x, &x, Mask::Full, None)?;
    assert_eq!(numbers(&out), numbers(&plain));
    assert!(out.sum_all()?.backward()?.get(&x).is_some());
    Ok(())
}

#[test]
fn two_threads_train_at_once() {
    let layer = LinearAttention::new(Performer::<f64>::new(D_HEAD, 9, 1).unwrap());
    let layer = MultiHead::new(layer, 2, 2).unwrap();
    let run = |seed: usize| -> Vec<f64> {
        let x = normal((2, 2, 60, D_HEAD), seed).unwrap();
        for _ in 0..5 {
            let out = attention(&layer, &x, &x, &x, Mask::Causal, None).unwrap();
            let d = out.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            x.set(&(x.as_tensor() - (d.get(&x).unwrap() * 0.1).unwrap()).unwrap()).unwrap();
        }
        numbers(&x)
    };
    let alone: Vec<_> = [1, 2, 3].map(run).into();
    let run = &run;
    let together = std::thread::scope(|scope| {
        let threads = [1, 2, 3].map(|seed| scope.spawn(move || run(seed)));
        threads.map(|thread| thread.join().unwrap()).to_vec()
    });
    assert_eq!(alone, together);
}
