use burn::module::Module;
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Distribution, Tensor, s};
use dijiang_burn::{
    AttentionInput, AttentionState, DijiangAttention, DijiangAttentionConfig, Kernel,
};

#[derive(Module, Debug)]
struct Model {
    layers: Vec<DijiangAttention>,
}

impl Model {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        self.layers.iter().fold(x, |x, layer| {
            let out = layer.forward(AttentionInput::self_attn(x.clone()).causal());
            x + out.context
        })
    }
}

fn main() {
    // two layers of 4 heads of 16 columns
    let device = Device::flex().autodiff();
    let config = DijiangAttentionConfig::new(64, 4).with_kernel(Kernel::Dct { features: 64 });
    let layer = |seed| config.clone().with_seed(seed).init(&device);
    let mut model = Model { layers: (0..2).map(layer).collect() };

    // each token should say what came before it: projections and maps are trained
    let mut optimizer = AdamConfig::new().init();
    let x = Tensor::<3>::random([2, 101, 64], Distribution::Default, &device);
    let (seen, target) = (x.clone().slice(s![.., 1.., ..]), x.slice(s![.., ..100, ..]));
    for step in 0..20 {
        let loss = (model.forward(seen.clone()) - target.clone()).powi_scalar(2).mean();
        println!("step {step}: {}", loss.clone().into_scalar::<f32>());
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(1e-3, model, gradients);
    }

    // token by token, in states whose size does not grow
    let (model, seen) = (model.valid(), seen.inner());
    let mut states: Vec<_> = model.layers.iter().map(|layer| layer.state(2).unwrap()).collect();
    for t in 0..100 {
        let token = seen.clone().slice(s![.., t..=t, ..]);
        model.layers.iter().zip(&mut states).fold(token, |x, (layer, state)| {
            let out = layer.forward_state(x.clone(), state);
            x + out.context
        });
    }
    println!("{} bytes", states.iter().map(AttentionState::state_bytes).sum::<usize>());
}
