use crate::common::{assert_close, device, exponentials, for_query_heads, means, numbers, wave};
use burn::backend::GradientCheckpointingStrategy;
use burn::module::Param;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{DType, Device, Tensor, activation, s};
use dijiang::ndarray::ArrayView4;
use dijiang::{EluFeatures, LinearAttention, Mask, MultiHead, SoftmaxAttention};
use dijiang_burn::{AttentionOptions, Real, attention};

const B: usize = 2;
const N: usize = 13;
const D: usize = 6;
/// Values have columns of their own.
const E: usize = 5;

fn inputs(heads: usize, kv_heads: usize, device: &Device) -> [Tensor<4>; 3] {
    let all = [
        wave([B, heads, N, D], 1, device),
        wave([B, kv_heads, N, D], 2, device),
        wave([B, kv_heads, N, E], 3, device),
    ];
    if device.is_autodiff() { all.map(Tensor::require_grad) } else { all }
}

/// Compares outputs, and the gradients of a weighted sum of them by each input.
#[track_caller]
fn assert_same(found: Tensor<4>, expected: Tensor<4>, by: &[&Tensor<4>]) {
    assert_close(found.clone(), expected.clone(), 1e-12);
    let weights = wave(found.dims(), 9, &found.device());
    let found = (found * weights.clone()).sum().backward();
    let expected = (expected * weights).sum().backward();
    for input in by {
        assert_close(input.grad(&found).unwrap(), input.grad(&expected).unwrap(), 1e-11);
    }
}

fn softmax_layer(heads: usize, kv_heads: usize) -> MultiHead<f64> {
    MultiHead::new(SoftmaxAttention::new(D).unwrap(), heads, kv_heads).unwrap()
}

#[test]
fn softmax_of_all_group_sizes_equals_tensor_operations() {
    for (heads, kv_heads) in [(1, 1), (4, 4), (4, 2), (6, 1)] {
        let device = device();
        let [q, k, v] = inputs(heads, kv_heads, &device);
        let layer = softmax_layer(heads, kv_heads);
        let check = |options, is_seen: fn(usize, usize, usize) -> bool| {
            let [all_k, all_v] = [&k, &v].map(|x| for_query_heads(x.clone(), heads));
            let expected = means(exponentials(q.clone(), all_k), all_v, is_seen);
            let found = attention(&layer, q.clone(), k.clone(), v.clone(), &options);
            assert_same(found, expected, &[&q, &k, &v]);
        };
        check(AttentionOptions::causal(), |_, t, s| s <= t);
        check(AttentionOptions::full(), |_, _, _| true);
        check(AttentionOptions::full().with_key_lengths(vec![N, 4]), |b, _, s| s < [N, 4][b]);
    }
}

#[test]
fn softmax_equals_the_attention_of_burn() {
    let device = device();
    let [q, k, v] = inputs(4, 4, &device);
    let found =
        attention(&softmax_layer(4, 4), q.clone(), k.clone(), v.clone(), &AttentionOptions::full());
    let scores = q.clone().matmul(k.clone().transpose()) * (D as f64).sqrt().recip();
    let expected = activation::softmax(scores, 3).matmul(v.clone());
    assert_same(found, expected, &[&q, &k, &v]);

    let found = attention(
        &softmax_layer(4, 4),
        q.clone(),
        k.clone(),
        v.clone(),
        &AttentionOptions::causal(),
    );
    let options = AttentionModuleOptions { is_causal: true, ..Default::default() };
    let [a, b, c] = [&q, &k, &v].map(Tensor::clone);
    let expected = burn::tensor::module::attention(a, b, c, None, None, options);
    assert_close(found.clone(), expected.clone(), 1e-7); // its scale is one of f32
    let [found, expected] = [found, expected].map(|x| x.powi_scalar(2).sum().backward());
    for x in [&q, &k, &v] {
        assert_close(x.grad(&found).unwrap(), x.grad(&expected).unwrap(), 1e-6);
    }
}

#[test]
fn padded_queries_of_a_causal_pass_are_zero() {
    let device = device();
    let [q, k, v] = inputs(2, 1, &device);
    let options = AttentionOptions::causal().with_key_lengths(vec![N, 4]);
    let out = attention(&softmax_layer(2, 1), q.clone(), k.clone(), v, &options);
    assert!(numbers(out.clone().slice(s![1, .., 4.., ..])).iter().all(|&x| x == 0.0));
    let gradients = out.sum().backward();
    let d_q = q.grad(&gradients).unwrap();
    assert!(numbers(d_q.slice(s![1, .., 4.., ..])).iter().all(|&x| x == 0.0));
    let d_k = k.grad(&gradients).unwrap();
    assert!(numbers(d_k.slice(s![1, .., 4.., ..])).iter().all(|&x| x == 0.0));
}

#[test]
fn linear_attention_equals_tensor_operations() {
    let device = device();
    let [q, k, v] = inputs(4, 2, &device);
    let layer = MultiHead::new(LinearAttention::new(EluFeatures::<f64>::new(D).unwrap()), 4, 2);
    let found =
        attention(&layer.unwrap(), q.clone(), k.clone(), v.clone(), &AttentionOptions::causal());
    let scale = (D as f64).powf(-0.25);
    let phi = |x: Tensor<4>| activation::elu(x * scale, 1.0) + 1.0;
    let [all_k, all_v] = [&k, &v].map(|x| for_query_heads(x.clone(), 4));
    let weights = phi(q.clone()).matmul(phi(all_k).transpose());
    assert_same(found, means(weights, all_v, |_, t, s| s <= t), &[&q, &k, &v]);
}

#[test]
fn gates_get_their_gradient() {
    let device = device();
    let [q, k, v] = inputs(2, 2, &device);
    let log_decay = (wave([B, 2, N, 1], 4, &device) - 1.5).detach().require_grad();
    let kernel = LinearAttention::new(EluFeatures::<f64>::new(D).unwrap()).gated();
    let layer = MultiHead::new(kernel, 2, 2).unwrap();
    let options = AttentionOptions::causal().with_log_decay(log_decay.clone());
    let found = attention(&layer, q.clone(), k.clone(), v.clone(), &options);
    let scale = (D as f64).powf(-0.25);
    let phi = |x: Tensor<4>| activation::elu(x * scale, 1.0) + 1.0;
    let weights = phi(q.clone()).matmul(phi(k.clone()).transpose());
    // what is left of key s at query t: the exponential of the log decays after s, up to t
    let sums = log_decay.clone().cumsum(2);
    let left = (sums.clone() - sums.transpose()).exp();
    let expected = means(weights * left, v.clone(), |_, t, s| s <= t);
    assert_same(found, expected, &[&q, &k, &v, &log_decay]);
}

#[test]
fn views_are_read_where_they_lie() {
    let device = device();
    // tokens before heads, twice as many columns, one more token, in the reverse order
    let all = wave([B, N + 1, 3, 2 * D], 5, &device).require_grad();
    let views = |x: &Tensor<4>| {
        let x = x.clone().swap_dims(1, 2);
        [
            x.clone().slice(s![.., .., 1.., ..D as i64]),
            x.clone().slice(s![.., ..1, ..N as i64, D as i64..]).expand([B, 3, N, D]),
            x.slice(s![.., .., 1.., D as i64..]).flip([2]),
        ]
    };
    let [q, k, v] = views(&all);
    let layer = softmax_layer(3, 3);
    let found = attention(&layer, q, k, v, &AttentionOptions::causal());
    let [q, k, v] = views(&all);
    let expected = means(exponentials(q, k), v, |_, t, s| s <= t);
    assert_same(found, expected, &[&all]);
}

#[test]
fn one_tensor_in_all_places() {
    let device = device();
    let x = wave([B, 3, N, D], 1, &device).require_grad();
    let [a, b, c] = [&x, &x, &x].map(Tensor::clone);
    let found = attention(&softmax_layer(3, 3), a, b, c, &AttentionOptions::causal());
    let expected = means(exponentials(x.clone(), x.clone()), x.clone(), |_, t, s| s <= t);
    assert_same(found, expected, &[&x]);
}

#[test]
fn gradients_may_be_views() {
    let device = device();
    let [q, k, v] = inputs(4, 2, &device);
    let merged = |x: Tensor<4>| x.swap_dims(1, 2).reshape([B, N, 4 * E]);
    // the last one is a gradient that is broadcast
    for loss in [|x: Tensor<3>| x.powi_scalar(3).sum(), |x: Tensor<3>| x.sum()] {
        let [a, b, c] = [&q, &k, &v].map(Tensor::clone);
        let found = attention(&softmax_layer(4, 2), a, b, c, &AttentionOptions::causal());
        let [all_k, all_v] = [&k, &v].map(|x| for_query_heads(x.clone(), 4));
        let expected = means(exponentials(q.clone(), all_k), all_v, |_, t, s| s <= t);
        let [found, expected] = [found, expected].map(|x| loss(merged(x)).backward());
        for input in [&q, &k, &v] {
            assert_close(input.grad(&found).unwrap(), input.grad(&expected).unwrap(), 1e-10);
        }
    }
}

#[test]
fn constants_get_no_gradient() {
    let [q, k, v] = inputs(2, 2, &Device::flex()).map(Tensor::autodiff);
    let v = v.require_grad();
    let layer = softmax_layer(2, 2);
    let out = attention(&layer, q.clone(), k, v.clone(), &AttentionOptions::full());
    let gradients = out.sum().backward();
    assert!(v.grad(&gradients).is_some() && q.grad(&gradients).is_none());
}

#[test]
fn tensors_without_autodiff_are_constants() {
    let [q, k, v] = inputs(2, 2, &Device::flex());
    let v = v.autodiff().require_grad();
    let out = attention(&softmax_layer(2, 2), q, k, v.clone(), &AttentionOptions::full());
    assert!(v.grad(&out.sum().backward()).is_some());
}

#[test]
fn devices_without_gradients() {
    let [q, k, v] = inputs(2, 2, &device());
    let layer = softmax_layer(2, 2);
    let tracked = attention(&layer, q.clone(), k.clone(), v.clone(), &AttentionOptions::causal());
    let [q, k, v] = [q, k, v].map(Tensor::inner);
    let plain = attention(&layer, q.clone(), k, v, &AttentionOptions::causal());
    assert_eq!(plain.device(), q.device());
    assert_eq!(numbers(tracked), numbers(plain));
}

#[test]
fn f32_is_the_core_bit_for_bit() {
    fn check<T: Real>(dtype: DType) {
        let device = Device::flex();
        let [q, k, v] = inputs(4, 2, &device).map(|x| x.cast(dtype));
        let layer = MultiHead::new(SoftmaxAttention::<T>::new(D).unwrap(), 4, 2).unwrap();
        let arrays = [&q, &k, &v].map(|x| (x.dims(), x.to_data().try_to_vec::<T>().unwrap()));
        let [q_array, k_array, v_array] =
            [0, 1, 2].map(|i| ArrayView4::from_shape(arrays[i].0, &arrays[i].1).unwrap());
        let exact = layer.forward(q_array, k_array, v_array, Mask::Causal, None).unwrap();
        let found = attention(&layer, q, k, v, &AttentionOptions::causal());
        let found = found.into_data().try_to_vec::<T>().unwrap();
        assert_eq!(found, exact.as_slice().unwrap());
    }
    check::<f32>(DType::F32);
    check::<f64>(DType::F64);
}

#[test]
#[should_panic(expected = "attention: `k` has 2 heads")]
fn heads_that_do_not_fit() {
    let [q, k, v] = inputs(4, 2, &Device::flex());
    let _ = attention(&softmax_layer(4, 4), q, k, v, &AttentionOptions::causal());
}

#[test]
#[should_panic(expected = "`q` is F64, the layer is F32; cast one of them")]
fn numbers_of_another_type() {
    let [q, k, v] = inputs(4, 4, &Device::flex());
    let layer = MultiHead::new(SoftmaxAttention::<f32>::new(D).unwrap(), 4, 4).unwrap();
    let _ = attention(&layer, q, k, v, &AttentionOptions::causal());
}

#[test]
#[should_panic(expected = "attention: sequence 1, query head 0: `q` is NaN or infinite")]
fn numbers_that_are_not_finite() {
    let [q, k, v] = inputs(2, 2, &Device::flex());
    let q = q.slice_fill(s![1, 0, 3, 2], f64::NAN);
    let _ = attention(&softmax_layer(2, 2), q, k, v, &AttentionOptions::causal());
}

#[test]
fn parameters_of_modules_can_be_inputs() {
    let device = device();
    let [q, k, v] = inputs(2, 2, &device);
    let v = Param::from_tensor(v.detach());
    let out = attention(&softmax_layer(2, 2), q, k, v.val(), &AttentionOptions::full());
    assert!(v.val().grad(&out.sum().backward()).is_some());
}

#[test]
fn with_gradient_checkpointing() {
    let device = Device::flex().autodiff();
    let plain = inputs(4, 2, &device);
    let strategy = GradientCheckpointingStrategy::Balanced;
    let balanced = plain
        .clone()
        .map(|x| x.detach().with_gradient_checkpointing_strategy(strategy).require_grad());
    let [plain, balanced] = [plain, balanced].map(|[q, k, v]| {
        // operations around that are computed again in the backward pass
        let near = |x: &Tensor<4>| (x.clone() * 0.5).exp();
        let (layer, options) = (softmax_layer(4, 2), AttentionOptions::causal());
        let out = attention(&layer, near(&q), near(&k), near(&v), &options);
        let gradients = (out.exp() * 0.5).sum().backward();
        [q, k, v].map(|x| numbers(x.grad(&gradients).unwrap()))
    });
    assert_eq!(plain, balanced);
}

#[test]
fn a_backward_pass_that_panics_leaves_the_next_one_alone() {
    let device = device();
    let run = |weight: f64| {
        let [q, k, v] = inputs(2, 2, &device);
        let out = attention(&softmax_layer(2, 2), q.clone(), k, v, &AttentionOptions::full());
        q.grad(&(out * weight).sum().backward()).unwrap()
    };
    let expected = numbers(run(1.0));
    let error = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(f64::NAN)));
    let error = error.unwrap_err().downcast::<String>().unwrap();
    assert!(error.contains("attention: sequence 0, query head 0: `d_out` is NaN"), "{error}");
    assert_eq!(numbers(run(1.0)), expected);
}
