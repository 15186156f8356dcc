//! The module: trained, saved, loaded, and the same token by token.

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use dijiang::{LearnedFeatures, LinearAttention, MultiHead, SoftmaxAttention};
use dijiang_candle::{DijiangAttention, DijiangAttentionConfig};

fn layer() -> MultiHead<f32> {
    let kernel = LinearAttention::new(LearnedFeatures::<f32>::hedgehog(8).unwrap());
    MultiHead::new(kernel, 4, 2).unwrap()
}

fn module(varmap: &VarMap) -> Result<DijiangAttention<f32>> {
    let vb = VarBuilder::from_varmap(varmap, DType::F32, &Device::Cpu);
    DijiangAttention::new(layer(), DijiangAttentionConfig::new(24, 8), vb)
}

fn input() -> Tensor {
    let number = |i: usize| ((i * 7919 + 17) as f32 * 0.618).sin();
    Tensor::from_iter((0..2 * 30 * 24).map(number), &Device::Cpu)
        .and_then(|x| x.reshape((2, 30, 24)))
        .unwrap()
}

fn difference(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).and_then(|x| x.abs()?.max_all()?.to_scalar()).unwrap()
}

#[test]
fn variables_have_the_names_of_the_core_and_begin_as_the_layer() -> Result<()> {
    let varmap = VarMap::new();
    let module = module(&varmap)?;
    let mut names: Vec<_> = varmap.data().lock().unwrap().keys().cloned().collect();
    names.sort();
    let mut expected: Vec<_> =
        layer().parameters().names().map(|name| format!("kernel.{name}")).collect();
    expected.extend(["k", "o", "q", "v"].map(|which| format!("{which}_proj.weight")));
    expected.sort();
    assert_eq!(names, expected);
    assert_eq!(module.layer()?.parameters(), layer().parameters());
    Ok(())
}

#[test]
fn every_variable_is_trained_and_survives_a_file() -> Result<()> {
    let varmap = VarMap::new();
    let first = module(&varmap)?;
    let x = input();
    let before: Vec<_> = varmap.all_vars().iter().map(|var| var.copy().unwrap()).collect();
    let mut optimizer = AdamW::new(varmap.all_vars(), ParamsAdamW::default())?;
    let loss = || (first.forward(&x)? - &x)?.sqr()?.mean_all();
    let at_first = loss()?.to_scalar::<f32>()?;
    for _ in 0..20 {
        optimizer.backward_step(&loss()?)?;
    }
    assert!(loss()?.to_scalar::<f32>()? < at_first);
    for (var, before) in varmap.all_vars().iter().zip(&before) {
        assert!(difference(var, before) > 0.0, "a variable of shape {:?}", var.shape());
    }
    let out = first.forward(&x)?;
    let path = std::env::temp_dir().join(format!("dijiang-{}.safetensors", std::process::id()));
    varmap.save(&path)?;
    let mut other = VarMap::new();
    let second = module(&other)?;
    assert!(difference(&second.forward(&x)?, &out) > 1e-3);
    other.load(&path)?;
    assert_eq!(difference(&second.forward(&x)?, &out), 0.0);
    // weights for inference only
    let file = candle_core::safetensors::load(&path, &Device::Cpu)?;
    let vb = VarBuilder::from_tensors(file, DType::F32, &Device::Cpu);
    let config = DijiangAttentionConfig::new(24, 8);
    let third = DijiangAttention::new(layer(), config, vb.clone())?;
    assert_eq!(difference(&third.forward(&x)?, &out), 0.0);
    std::fs::remove_file(path)?;
    // what is not there cannot begin
    let vb = VarBuilder::from_tensors(Default::default(), DType::F32, &Device::Cpu);
    DijiangAttention::new(layer(), config, vb).unwrap_err();

    // token by token
    let mut state = first.state(2)?;
    let prompt = first.forward_step(&x.narrow(1, 0, 20)?, &mut state)?;
    assert!(difference(&prompt, &out.narrow(1, 0, 20)?) < 1e-5);
    for t in 20..30 {
        let step = first.forward_step(&x.narrow(1, t, 1)?, &mut state)?;
        assert!(difference(&step, &out.narrow(1, t, 1)?) < 1e-5);
    }
    Ok(())
}

#[test]
fn padding_and_biases() -> Result<()> {
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let layer = MultiHead::new(SoftmaxAttention::<f32>::new(8).unwrap(), 4, 2).unwrap();
    let config =
        DijiangAttentionConfig { bias: true, value_dim: 5, ..DijiangAttentionConfig::new(24, 8) };
    let module = DijiangAttention::new(layer, config, vb)?;
    assert_eq!(varmap.all_vars().len(), 8);
    let x = input();
    let out = module.forward_padded(&x, Some(&[30, 7]))?;
    let alone = module.forward(&x.narrow(0, 1, 1)?.narrow(1, 0, 7)?)?;
    assert!(difference(&out.narrow(0, 1, 1)?.narrow(1, 0, 7)?, &alone) < 1e-5);
    Ok(())
}

/// The guide shows the program that is compiled here.
#[test]
fn the_guide_shows_an_example_that_runs() {
    let guide = include_str!("../../../docs/guide/frameworks.md");
    assert!(guide.contains(include_str!("../examples/two_layers.rs")));
}
