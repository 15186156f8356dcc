use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use dijiang_candle::dijiang::{DctFeatures, LinearAttention, MultiHead};
use dijiang_candle::{AttentionState, DijiangAttention, DijiangAttentionConfig};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A layer of 4 heads of 16 columns.
fn layer(seed: u64, vb: VarBuilder) -> Result<DijiangAttention<f32>> {
    let kernel = LinearAttention::new(DctFeatures::<f32>::new(16, 64, seed)?);
    let layer = MultiHead::new(kernel, 4, 4)?;
    Ok(DijiangAttention::new(layer, DijiangAttentionConfig::new(64, 16), vb)?)
}

fn main() -> Result<()> {
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let layers = [layer(0, vb.pp("0"))?, layer(1, vb.pp("1"))?];

    // each token should say what came before it: projections and maps are trained
    let mut optimizer = AdamW::new(varmap.all_vars(), ParamsAdamW::default())?;
    let x = Tensor::randn(0f32, 1., (2, 101, 64), &Device::Cpu)?;
    let (seen, target) = (x.narrow(1, 1, 100)?, x.narrow(1, 0, 100)?);
    for step in 0..20 {
        let out = layers.iter().try_fold(seen.clone(), |x, layer| &x + layer.forward(&x)?)?;
        let loss = (out - &target)?.sqr()?.mean_all()?;
        optimizer.backward_step(&loss)?;
        println!("step {step}: {}", loss.to_scalar::<f32>()?);
    }

    // token by token, in states whose size does not grow
    let mut states = [layers[0].state(2)?, layers[1].state(2)?];
    for t in 0..100 {
        let mut x = seen.narrow(1, t, 1)?;
        for (layer, state) in layers.iter().zip(&mut states) {
            x = (&x + layer.forward_step(&x, state)?.detach())?;
        }
    }
    println!("{} bytes", states.iter().map(AttentionState::state_bytes).sum::<usize>());
    Ok(())
}
