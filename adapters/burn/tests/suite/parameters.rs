use crate::common::{assert_close, device, for_query_heads, means, wave};
use burn::tensor::{Device, Tensor};
use dijiang::{
    DctFeatures, LearnedFeatures, LinearAttention, MultiHead, Performer, SoftmaxAttention,
};
use dijiang_burn::{AttentionOptions, TensorParameters, attention, attention_with};
use std::sync::Arc;

const D: usize = 4;
const M: usize = 9;

fn performer(seed: u64) -> LinearAttention<Performer<f64>> {
    LinearAttention::new(Performer::<f64>::new(D, M, seed).unwrap())
}

/// φ of the Performer, in tensor operations.
fn phi(x: Tensor<4>, projection: Tensor<2>, weights: Tensor<1>) -> Tensor<4> {
    let x = x * (D as f64).powf(-0.25);
    let norms = x.clone().powi_scalar(2).sum_dim(3) * 0.5;
    let logits = x.matmul(projection.transpose().unsqueeze::<4>()) - norms;
    logits.exp() * weights.unsqueeze::<4>() * (M as f64).sqrt().recip()
}

#[test]
fn parameters_get_their_gradient() {
    let device = device();
    let q = wave([2, 4, 11, D], 1, &device).require_grad();
    let k = wave([2, 2, 11, D], 2, &device).require_grad();
    let v = wave([2, 2, 11, 3], 3, &device);
    let layer = MultiHead::new(performer(1), 4, 2).unwrap();
    let projection = wave([M, D], 4, &device).require_grad();
    let weights = (wave([M], 5, &device) + 1.5).detach().require_grad();
    let parameters = TensorParameters::new()
        .with("heads.0.map.projection", projection.clone())
        .with("heads.0.map.weights", weights.clone());
    let options = AttentionOptions::causal();
    let found = attention_with(&layer, &parameters, q.clone(), k.clone(), v.clone(), &options);
    let map = |x: Tensor<4>| phi(x, projection.clone(), weights.clone());
    let products = map(q.clone()).matmul(map(for_query_heads(k.clone(), 4)).transpose());
    let expected = means(products, for_query_heads(v, 4), |_, t, s| s <= t);
    assert_close(found.clone(), expected.clone(), 1e-12);
    let [found, expected] = [found, expected].map(|x| {
        let weights = wave(x.dims(), 6, &device);
        (x * weights).sum().backward()
    });
    for x in [&q, &k] {
        assert_close(x.grad(&found).unwrap(), x.grad(&expected).unwrap(), 1e-11);
    }
    let [a, b] = [&found, &expected].map(|gradients| projection.grad(gradients).unwrap());
    assert_close(a, b, 1e-11);
    let [a, b] = [&found, &expected].map(|gradients| weights.grad(gradients).unwrap());
    assert_close(a, b, 1e-11);
}

#[test]
fn all_parameters_of_other_kernels() {
    let dct = |seed| LinearAttention::new(DctFeatures::<f64>::new(D, M, seed).unwrap());
    let hedgehog = LinearAttention::new(LearnedFeatures::<f64>::hedgehog(D).unwrap());
    let softmax = SoftmaxAttention::new(D).unwrap().with_sink_logits(vec![0.3, -0.4]).unwrap();
    let layers = [
        MultiHead::per_kv_head(vec![Arc::new(dct(1)), Arc::new(dct(2))], 4),
        MultiHead::new(hedgehog, 4, 2),
        MultiHead::new(softmax, 4, 2),
    ]
    .map(Result::unwrap);
    let device = device();
    let q = wave([2, 4, 11, D], 1, &device);
    let [k, v] = [2, 3].map(|seed| wave([2, 2, 11, D], seed, &device));
    for layer in layers {
        let all = TensorParameters::of(&layer, &device);
        let loss = |parameters: &TensorParameters| {
            let [q, k, v] = [&q, &k, &v].map(Tensor::clone);
            let out = attention_with(&layer, parameters, q, k, v, &AttentionOptions::causal());
            let weights = wave(out.dims(), 9, &device);
            (out * weights).sum()
        };
        for name in all.names() {
            // the slope along some direction, from both sides and by the gradient
            let slope = match all.get::<1>(name) {
                Some(x) => slope_along(x, &|x| loss(&all.clone().with(name, x))),
                None => {
                    let x = all.get::<2>(name).unwrap();
                    slope_along(x, &|x| loss(&all.clone().with(name, x)))
                }
            };
            let [found, expected] = slope;
            let error = (found - expected).abs();
            assert!(error < 1e-7 * expected.abs().max(1e-2), "{name}: {found} {expected}");
        }
    }
}

/// The slope of a loss by the gradient, and by a difference.
fn slope_along<const R: usize>(x: Tensor<R>, loss: &dyn Fn(Tensor<R>) -> Tensor<1>) -> [f64; 2] {
    const STEP: f64 = 1e-5;
    let x = x.require_grad();
    let direction = wave(x.dims(), 8, &x.device());
    let gradient = x.grad(&loss(x.clone()).backward()).unwrap();
    let found = (gradient * direction.clone().inner()).sum().into_scalar::<f64>();
    let at = |step: f64| loss(x.clone() + direction.clone() * step).into_scalar::<f64>();
    [found, (at(STEP) - at(-STEP)) / (2.0 * STEP)]
}

#[test]
fn some_parameters_of_some_heads() {
    let device = device();
    let [q, k, v] = [1, 2, 3].map(|seed| wave([1, 2, 7, D], seed, &device));
    let layer = MultiHead::per_head(vec![Arc::new(performer(1)), Arc::new(performer(2))], 2);
    let layer = layer.unwrap();
    let all = TensorParameters::of(&layer, &device);
    assert_eq!(all.names().count(), 4);
    let weights: Tensor<1> = all.get("heads.1.map.weights").unwrap();
    let weights = (weights * 2.0).detach().require_grad();
    let some = TensorParameters::new().with("heads.1.map.weights", weights.clone());
    let options = AttentionOptions::full();
    let [a, b, c] = [&q, &k, &v].map(Tensor::clone);
    let found = attention_with(&layer, &some, a, b, c, &options);
    // all weights of a map twice as large change nothing
    let expected = attention(&layer, q, k, v, &options);
    assert_close(found.clone(), expected, 1e-12);
    let d_weights = weights.grad(&found.sum().backward()).unwrap();
    assert_eq!(d_weights.dims(), [M]);
}

#[test]
fn arrays_there_and_back() {
    let layer = MultiHead::new(performer(3), 2, 1).unwrap();
    let parameters = TensorParameters::of(&layer, &Device::flex());
    assert_eq!(parameters.to_arrays::<f64>(), layer.parameters());
    assert!(parameters.get::<1>("heads.0.map.projection").is_none());
    assert_eq!(parameters.get::<2>("heads.0.map.projection").unwrap().dims(), [M, D]);
}

#[test]
#[should_panic(expected = "`heads.0.map.weights`")]
fn shapes_of_parameters() {
    let device = Device::flex();
    let [q, k, v] = [1, 2, 3].map(|seed| wave([1, 2, 7, D], seed, &device));
    let layer = MultiHead::new(performer(1), 2, 2).unwrap();
    let some = TensorParameters::new().with("heads.0.map.weights", wave([M + 1], 1, &device));
    let _ = attention_with(&layer, &some, q, k, v, &AttentionOptions::full());
}

#[test]
#[should_panic(expected = "none at all")]
fn kernels_without_parameters() {
    let device = Device::flex();
    let [q, k, v] = [1, 2, 3].map(|seed| wave([1, 2, 7, D], seed, &device));
    let layer = MultiHead::new(SoftmaxAttention::<f64>::new(D).unwrap(), 2, 2).unwrap();
    let some = TensorParameters::new().with("heads.0.map.weights", wave([M], 1, &device));
    let _ = attention_with(&layer, &some, q, k, v, &AttentionOptions::full());
}
