//! Modules with any layer of the core.

use crate::common::{assert_close, numbers};
use crate::module::{D_MODEL, Halve, causal, config, random};
use burn::module::Module;
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Tensor, s};
use dijiang::{
    Attention, DctFeatures, LinearAttention, MultiHead, Rotary, RotaryAttention, SoftmaxAttention,
};
use dijiang_burn::{DijiangAttentionConfig, Kernel};
use std::sync::Arc;

/// Queries and keys of 6 columns turn with their positions.
fn rotary_layer() -> MultiHead<f32> {
    let kernel = LinearAttention::new(DctFeatures::<f32>::new(6, 16, 3).unwrap());
    let kernel = RotaryAttention::new(Rotary::new(6).unwrap(), kernel);
    MultiHead::new(kernel, 4, 2).unwrap()
}

#[test]
fn layers_of_the_core_are_those_of_the_configuration() {
    let device = Device::flex();
    let kernel = |seed| -> Arc<dyn Attention<f32>> {
        Arc::new(LinearAttention::new(DctFeatures::<f32>::new(6, 16, seed).unwrap()))
    };
    let layer = MultiHead::per_kv_head(vec![kernel(0), kernel(1)], 4).unwrap();
    let expected = config(Kernel::Dct { features: 16 }).init(&device).map(&mut Halve);
    for kv_heads in [None, Some(2)] {
        let config = DijiangAttentionConfig::new(D_MODEL, 4).with_n_kv_heads(kv_heads);
        let found = config.init_with(layer.clone(), &device);
        let found = found.load_record(expected.clone().into_record());
        let x = random(9, &device);
        assert_eq!(numbers(causal(&found, x.clone())), numbers(causal(&expected, x)));
    }
}

#[test]
fn layers_with_positions_are_trained_and_decode() {
    let device = Device::flex().autodiff();
    let mut model = DijiangAttentionConfig::new(D_MODEL, 4).init_with(rotary_layer(), &device);
    let before = model.kernel.tensors().to_arrays::<f32>();
    let names: Vec<_> = before.iter().map(|(name, _)| name.to_owned()).collect();
    assert_eq!(names, ["heads.0.kernel.map.radii", "heads.0.kernel.map.weights"]);
    let (x, target) = (random(12, &device), random(12, &device));
    let mut optimizer = AdamConfig::new().init();
    for _ in 0..3 {
        let loss = (causal(&model, x.clone()) - target.clone()).powi_scalar(2).mean();
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(1e-2, model, gradients);
    }
    let after = model.kernel.tensors().to_arrays::<f32>();
    for (name, array) in before.iter() {
        assert_ne!(after.get(name).unwrap(), array, "{name}");
    }

    let (model, x) = (model.valid(), x.inner());
    let mut state = model.state(2).unwrap();
    let step = |t| model.forward_state(x.clone().slice(s![.., t..=t, ..]), &mut state).context;
    assert_close(Tensor::cat((0..12).map(step).collect(), 1), causal(&model, x.clone()), 2e-5);
}

#[test]
fn all_parameters_of_a_layer_or_none_are_trained() {
    let device = Device::flex();
    let softmax = SoftmaxAttention::<f32>::new(6).unwrap().with_sink_logit(0.5).unwrap();
    let layer = MultiHead::new(softmax, 4, 4).unwrap();
    let config = DijiangAttentionConfig::new(D_MODEL, 4);
    assert_eq!(config.init_with(layer.clone(), &device).kernel.num_params(), 1);
    let fixed = config.with_train_kernel(false);
    assert_eq!(fixed.init_with(layer, &device).kernel.num_params(), 0);
}

#[test]
fn layers_that_do_not_fit() {
    let device = Device::flex();
    let new = DijiangAttentionConfig::new;
    for (config, expected) in [
        (new(24, 5), "a divisor of `d_model`"),
        (new(24, 8), "`n_heads`"),
        (new(24, 4).with_n_kv_heads(Some(4)), "`n_kv_heads`"),
        (new(32, 4), "`q` has 8 columns where 6 are needed"),
    ] {
        let error = config.try_init_with(rotary_layer(), &device).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
