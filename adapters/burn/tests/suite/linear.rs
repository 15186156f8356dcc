use crate::common::{assert_close, device, for_query_heads, means, wave};
use burn::tensor::{DType, Device, Int, Tensor, activation};
use dijiang::{EluFeatures, LinearAttention, MultiHead, Performer};
use dijiang_burn::{
    AttentionOptions, LinearOptions, TensorParameters, attention, linear_attention,
};

const B: usize = 2;
const N: usize = 23;
const M: usize = 5;

/// The same with a matrix of all weights.
fn naive(
    [q, k, v]: [Tensor<4>; 3],
    log_scale: Option<Tensor<3>>,
    log_decay: Option<Tensor<3>>,
) -> Tensor<4> {
    let heads = q.dims()[1];
    let row = |x: Tensor<3>| for_query_heads(x.unsqueeze_dim(3), heads);
    let mut weights = q.matmul(for_query_heads(k, heads).transpose());
    if let Some(log_scale) = log_scale {
        weights = weights * row(log_scale).transpose().exp();
    }
    if let Some(log_decay) = log_decay {
        let sums = row(log_decay.cumsum(2));
        weights = weights * (sums.clone() - sums.transpose()).exp();
    }
    means(weights, for_query_heads(v, heads), |_, t, s| s <= t)
}

#[test]
fn all_options_equal_the_matrix_of_weights() {
    let device = device();
    let positive = |x: Tensor<4>| (x + 1.5).detach().require_grad();
    let q = positive(wave([B, 4, N, M], 1, &device));
    let k = positive(wave([B, 2, N, M], 2, &device));
    let v = wave([B, 2, N, 3], 3, &device).require_grad();
    let log_scale = (wave([B, 2, N], 4, &device) * 3.0).detach().require_grad();
    let log_decay = (wave([B, 2, N], 5, &device) - 1.2).detach().require_grad();
    for (has_scale, has_decay) in [(false, false), (true, false), (false, true), (true, true)] {
        for chunk in [1, 4, 23, 64] {
            let some = |is_there: bool, x: &Tensor<3>| is_there.then(|| x.clone());
            let (scale, decay) = (some(has_scale, &log_scale), some(has_decay, &log_decay));
            let options =
                LinearOptions { log_scale: scale.clone(), log_decay: decay.clone(), chunk };
            let found = linear_attention(q.clone(), k.clone(), v.clone(), &options);
            let expected = naive([q.clone(), k.clone(), v.clone()], scale, decay);
            assert_close(found.clone(), expected.clone(), 1e-12);
            let weights = wave(found.dims(), 6, &device);
            let [found, expected] =
                [found, expected].map(|x| (x * weights.clone()).sum().backward());
            for x in [&q, &k, &v] {
                assert_close(x.grad(&found).unwrap(), x.grad(&expected).unwrap(), 1e-11);
            }
            for (is_there, x) in [(has_scale, &log_scale), (has_decay, &log_decay)] {
                if is_there {
                    assert_close(x.grad(&found).unwrap(), x.grad(&expected).unwrap(), 1e-10);
                }
            }
        }
    }
}

#[test]
fn gates_are_those_of_the_core() {
    let device = Device::flex();
    let [q, k, v] = [1, 2, 3].map(|seed| wave([B, 2, N, M], seed, &device));
    let log_decay = wave([B, 2, N], 4, &device) - 1.2;
    let kernel = LinearAttention::new(EluFeatures::<f64>::new(M).unwrap()).gated();
    let layer = MultiHead::new(kernel, 2, 2).unwrap();
    let options = AttentionOptions::causal().with_log_decay(log_decay.clone().unsqueeze_dim(3));
    let [a, b, c] = [&q, &k, &v].map(Tensor::clone);
    let expected = attention(&layer, a, b, c, &options);
    let scale = (M as f64).powf(-0.25);
    let phi = |x: Tensor<4>| activation::elu(x * scale, 1.0) + 1.0;
    let options = LinearOptions::default().with_log_decay(log_decay).with_chunk(7);
    assert_close(linear_attention(phi(q), phi(k), v, &options), expected, 1e-12);
}

#[test]
fn log_scales_keep_exponentials_in_range() {
    let device = Device::flex();
    let layer = MultiHead::new(LinearAttention::new(Performer::<f32>::new(M, 9, 1).unwrap()), 2, 2);
    let layer = layer.unwrap();
    let projection: Tensor<2> =
        TensorParameters::of(&layer, &device).get("heads.0.map.projection").unwrap();
    // exponents of some hundreds, which grow from key to key and jump
    let [q, k, v] = [1, 2, 3].map(|seed| wave([B, 2, N, M], seed, &device).cast(DType::F32));
    let lengths = Tensor::<1, Int>::arange(0..N as i64, &device).float().reshape([1, 1, N, 1]);
    let k = k * lengths;
    let [a, b, c] = [&q, &k, &v].map(Tensor::clone);
    let expected = attention(&layer, a, b, c, &AttentionOptions::causal());
    let logits = |x: Tensor<4>| {
        let x = x * (M as f64).powf(-0.25);
        let norms = x.clone().powi_scalar(2).sum_dim(3) * 0.5;
        x.matmul(projection.clone().transpose().unsqueeze::<4>()) - norms
    };
    let scaled = |x: Tensor<4>| {
        let largest = x.clone().max_dim(3);
        ((x - largest.clone()).exp(), largest.squeeze_dim::<3>(3))
    };
    let ((phi_q, _), (phi_k, log_scale)) = (scaled(logits(q)), scaled(logits(k)));
    assert!(log_scale.clone().min().into_scalar::<f32>() < -110.0); // exp() would be 0
    let options = LinearOptions::default().with_log_scale(log_scale).with_chunk(8);
    assert_close(linear_attention(phi_q, phi_k, v, &options), expected, 1e-4);
}

#[test]
#[should_panic(expected = "`phi_k` is [2, 2, 23, 4] where [2, 2, 23, 5] fits")]
fn features_that_do_not_fit() {
    let device = Device::flex();
    let [q, v] = [1, 2].map(|seed| wave([B, 2, N, M], seed, &device));
    let _ = linear_attention(q, wave([B, 2, N, 4], 3, &device), v, &LinearOptions::default());
}

#[test]
#[should_panic(expected = "`log_scale` is [2, 4, 23] where [2, 2, 23] fits")]
fn log_scales_that_do_not_fit() {
    let device = Device::flex();
    let [k, v] = [1, 2].map(|seed| wave([B, 2, N, M], seed, &device));
    let options = LinearOptions::default().with_log_scale(wave([B, 4, N], 3, &device));
    let _ = linear_attention(wave([B, 4, N, M], 3, &device), k, v, &options);
}
