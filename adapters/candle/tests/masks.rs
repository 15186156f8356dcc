//! Masks of keys and biases: those of candle's operations, and of the core.

mod common;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use common::{D_HEAD, assert_close, normal, numbers};
use dijiang::{
    Far, HybridAttention, LinearAttention, Mask, MultiHead, Performer, SoftmaxAttention,
};
use dijiang_candle::{AttentionState, Extras, attention, attention_with};

const BATCH: usize = 3;
const N: usize = 20;

/// Of the first sequence every third token is padding, of the last the first ones are.
fn real() -> Vec<Vec<u8>> {
    let of = |b: usize, t: usize| match b {
        0 => u8::from(t % 3 != 1),
        1 => 7,
        _ => u8::from(t >= 6),
    };
    (0..BATCH).map(|b| (0..N).map(|t| of(b, t)).collect()).collect()
}

fn softmax() -> MultiHead<f64> {
    MultiHead::new(SoftmaxAttention::<f64>::new(D_HEAD).unwrap(), 2, 2).unwrap()
}

#[test]
fn they_are_candle_s_own() -> Result<()> {
    let key_mask = Tensor::new(real(), &Device::Cpu)?;
    let hidden = key_mask.ne(0u8)?.to_dtype(DType::F64)?.reshape((BATCH, 1, 1, N))?;
    let hidden = ((hidden - 1.0)? * 1e300)?;
    let [q, k] = [1, 2].map(|seed| normal((BATCH, 2, N, D_HEAD), seed).unwrap());
    let (v, u) = (normal((BATCH, 2, N, 3), 3)?, normal((BATCH, 2, N, 3), 4)?);
    for (batch, heads) in [(1, 1), (1, 2), (BATCH, 1), (BATCH, 2)] {
        for masked in [false, true] {
            let bias = normal((batch, heads, N, N), 5)?;
            let extras = Extras {
                bias: Some(&bias),
                key_mask: Some(&key_mask).filter(|_| masked),
                ..Extras::default()
            };
            let out = attention_with(&softmax(), extras, [&q, &k, &v], Mask::Full, None)?;
            let scores = (q.matmul(&k.t()?.contiguous()?)? / (D_HEAD as f64).sqrt())?;
            let mut scores = scores.broadcast_add(&bias)?;
            if masked {
                scores = scores.broadcast_add(&hidden)?;
            }
            let exact = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
            assert_close("outputs", &out, &exact, 1e-12);
            let [d, d_exact] =
                [out, exact].map(|x| (x * u.as_tensor()).unwrap().sum_all().unwrap().backward());
            let (d, d_exact) = (d?, d_exact?);
            for x in [&q, &k, &v, &bias] {
                assert_close("a gradient", d.get(x).unwrap(), d_exact.get(x).unwrap(), 1e-12);
            }
        }
    }
    Ok(())
}

/// Each sequence gets what it gets without its padding, of any kernel, whole or in a state.
#[test]
fn padding_anywhere() -> Result<()> {
    let linear = LinearAttention::new(Performer::<f64>::new(D_HEAD, 9, 1).unwrap());
    let hybrid = HybridAttention::<f64>::builder(D_HEAD).window(4).far(Far::merged(3));
    let layers = [
        softmax(),
        MultiHead::new(linear, 2, 2).unwrap(),
        MultiHead::new(hybrid.build().unwrap(), 2, 2).unwrap(),
    ];
    let key_mask = Tensor::new(real(), &Device::Cpu)?;
    let [q, k] = [1, 2].map(|seed| normal((BATCH, 2, N, D_HEAD), seed).unwrap());
    let (v, u) = (normal((BATCH, 2, N, 3), 3)?, normal((BATCH, 2, N, 3), 4)?);
    for layer in &layers {
        let extras = Extras { key_mask: Some(&key_mask), ..Extras::default() };
        let out = attention_with(layer, extras, [&q, &k, &v], Mask::Causal, None)?;
        let d = (&out * u.as_tensor())?.sum_all()?.backward()?;
        let mut state = AttentionState::new(layer, BATCH, 3)?;
        let inputs = [q.as_detached_tensor(), k.as_detached_tensor(), v.as_detached_tensor()];
        let streamed = state.forward_with(inputs.each_ref(), extras, None)?;
        assert_close("a state", &streamed, &out, 1e-12);
        for (b, real) in real().iter().enumerate() {
            let rows = (0..N as u32).filter(|&t| real[t as usize] != 0).collect::<Vec<_>>();
            let at = Tensor::new(rows.as_slice(), &Device::Cpu)?;
            let one = |x: &Tensor| x.narrow(0, b, 1)?.contiguous()?.index_select(&at, 2);
            let alone = [&q, &k, &v].map(|x| Var::from_tensor(&one(x).unwrap()).unwrap());
            let exact = attention(layer, &alone[0], &alone[1], &alone[2], Mask::Causal, None)?;
            assert_close("outputs", &one(&out)?, &exact, 1e-13);
            assert!(
                (numbers(&out.narrow(0, b, 1)?.abs()?.sum_all()?)[0]
                    - numbers(&exact.abs()?.sum_all()?)[0])
                    .abs()
                    < 1e-9
            );
            let d_exact = (&exact * one(&u)?)?.sum_all()?.backward()?;
            for (x, alone) in [&q, &k, &v].into_iter().zip(&alone) {
                let exact = d_exact.get(alone).unwrap();
                assert_close("a gradient", &one(d.get(x).unwrap())?, exact, 1e-11);
            }
        }
    }
    Ok(())
}

#[test]
fn sixteen_bits_take_both() -> Result<()> {
    let layer = MultiHead::new(SoftmaxAttention::<f32>::new(D_HEAD).unwrap(), 2, 2).unwrap();
    let key_mask = Tensor::new(real(), &Device::Cpu)?;
    let x = normal((BATCH, 2, N, D_HEAD), 1)?;
    let of = |dtype: DType, (batch, heads): (usize, usize)| -> Result<[Tensor; 3]> {
        let bias = normal((batch, heads, N, N), 5)?;
        let x = Var::from_tensor(&x.to_dtype(DType::BF16)?.to_dtype(dtype)?)?;
        let bias = Var::from_tensor(&bias.to_dtype(DType::BF16)?.to_dtype(dtype)?)?;
        let extras = Extras { key_mask: Some(&key_mask), bias: Some(&bias), ..Extras::default() };
        let out = attention_with(&layer, extras, [&x, &x, &x], Mask::Causal, None)?;
        let d = out.to_dtype(DType::F32)?.sqr()?.sum_all()?.backward()?;
        Ok([out, d.get(&x).unwrap().clone(), d.get(&bias).unwrap().clone()])
    };
    for shape in [(1, 1), (1, 2), (BATCH, 1), (BATCH, 2)] {
        for (found, exact) in of(DType::BF16, shape)?.iter().zip(&of(DType::F32, shape)?) {
            assert_close("16 bits", found, exact, 4e-2);
        }
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let x = normal((BATCH, 2, N, D_HEAD), 1)?;
    let refused = |extras: Extras<'_>, lengths: Option<&[usize]>| {
        let x = [x.as_tensor(); 3];
        attention_with(&softmax(), extras, x, Mask::Causal, lengths).unwrap_err().to_string()
    };
    let ones = |shape: &[usize], dtype| Tensor::ones(shape, dtype, &Device::Cpu).unwrap();
    let of_mask = |mask: &Tensor, lengths: Option<&[usize]>| {
        refused(Extras { key_mask: Some(mask), ..Extras::default() }, lengths)
    };
    assert!(of_mask(&ones(&[BATCH, N], DType::F64), None).contains("U8 of [batch, n_k]"));
    assert!(of_mask(&ones(&[N], DType::U8), None).contains("U8 of [batch, n_k]"));
    assert!(of_mask(&ones(&[BATCH, N + 1], DType::U8), None).contains("`key_mask`"));
    assert!(of_mask(&ones(&[BATCH, N], DType::U8), Some(&[N; BATCH])).contains("lengths"));
    let of_bias = |bias: &Tensor| refused(Extras { bias: Some(bias), ..Extras::default() }, None);
    assert!(of_bias(&ones(&[1, 3, N, N], DType::F64)).contains("`bias` has 3 heads"));
    assert!(of_bias(&ones(&[2, 1, N, N], DType::F64)).contains("`bias` has 2 sequences"));
    assert!(of_bias(&ones(&[1, 1, N, N], DType::F32)).contains("`bias` is F32"));
    // a kernel without biases says so
    let linear = LinearAttention::new(Performer::<f64>::new(D_HEAD, 9, 1).unwrap());
    let (layer, bias) = (MultiHead::new(linear, 2, 2).unwrap(), ones(&[1, 1, N, N], DType::F64));
    let extras = Extras { bias: Some(&bias), ..Extras::default() };
    let error = attention_with(&layer, extras, [&x, &x, &x], Mask::Causal, None).unwrap_err();
    assert!(error.to_string().contains("a bias of scores"), "{error}");
    Ok(())
}
