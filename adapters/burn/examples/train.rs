//! Trains a small model of the characters of a text and goes on writing it, in a state whose size
//! does not grow.
//!
//! ```sh
//! cargo run --release --example train -- 600
//! ```

use burn::grad_clipping::GradientClippingConfig;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, RmsNorm, RmsNormConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::prelude::*;
use burn::tensor::activation::{gelu, softmax};
use dijiang_burn::{
    AttentionInput, AttentionState, DijiangAttention, DijiangAttentionConfig, Kernel,
};

const TEXT: &str = include_str!("../../../README.md");
/// Characters of a training sequence, and sequences of a batch.
const N: usize = 96;
const BATCH: usize = 8;
/// Characters whose embeddings a token has beside each other: what tells the order of neighbours.
const NEAR: usize = 3;

#[derive(Config, Debug)]
struct ModelConfig {
    characters: usize,
    #[config(default = 2)]
    layers: usize,
    #[config(default = 64)]
    d_model: usize,
    #[config(default = 4)]
    n_heads: usize,
    #[config(default = "Kernel::Dct { features: 32 }")]
    kernel: Kernel,
}

#[derive(Module, Debug)]
struct Layer {
    norms: [RmsNorm; 2],
    attention: DijiangAttention,
    up: Linear,
    down: Linear,
}

#[derive(Module, Debug)]
struct Model {
    embedding: Embedding,
    near: Linear,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Linear,
}

impl ModelConfig {
    fn init(&self, device: &Device) -> Model {
        let d = self.d_model;
        let norm = || RmsNormConfig::new(d).init(device);
        let linear = |from, to| LinearConfig::new(from, to).init(device);
        let attention = DijiangAttentionConfig::new(d, self.n_heads);
        let layer = |seed| Layer {
            norms: [norm(), norm()],
            attention: attention
                .clone()
                .with_kernel(self.kernel.clone())
                .with_seed(seed * 100)
                .init(device),
            up: linear(d, 4 * d),
            down: linear(4 * d, d),
        };
        Model {
            embedding: EmbeddingConfig::new(self.characters, d).init(device),
            near: linear(NEAR * d, d),
            layers: (0..self.layers as u64).map(layer).collect(),
            norm: norm(),
            head: linear(d, self.characters),
        }
    }
}

impl Layer {
    /// With a state the tokens are the next ones of its sequences, else they are all.
    fn forward(&self, x: Tensor<3>, state: Option<&mut AttentionState<f32>>) -> Tensor<3> {
        let tokens = self.norms[0].forward(x.clone());
        let out = match state {
            Some(state) => self.attention.forward_state(tokens, state),
            None => self.attention.forward(AttentionInput::self_attn(tokens).causal()),
        };
        let x = x + out.context;
        let hidden = gelu(self.up.forward(self.norms[1].forward(x.clone())));
        x + self.down.forward(hidden)
    }
}

impl Model {
    /// Logits `[batch, n, characters]` of what follows each of `n` characters, from
    /// `n + NEAR - 1`.
    fn forward(
        &self,
        characters: Tensor<2, Int>,
        states: Option<&mut [AttentionState<f32>]>,
    ) -> Tensor<3> {
        let x = self.embedding.forward(characters);
        let n = x.dims()[1] - (NEAR - 1);
        let near = (0..NEAR).map(|i| x.clone().slice(s![.., i..i + n, ..]));
        let mut x = self.near.forward(Tensor::cat(near.collect(), 2));
        let mut states = states.map(|states| states.iter_mut());
        for layer in &self.layers {
            x = layer.forward(x, states.as_mut().and_then(Iterator::next));
        }
        self.head.forward(self.norm.forward(x))
    }

    /// Reads a prompt and writes `count` characters.
    fn generate(&self, prompt: &[usize], count: usize, device: &Device) -> Vec<usize> {
        let mut states: Vec<_> =
            self.layers.iter().map(|layer| layer.attention.state(1).unwrap()).collect();
        let mut written = prompt.to_vec();
        let mut from = 0;
        for _ in 0..count {
            let next = written[from..].iter().map(|&c| c as i32).collect::<Vec<_>>();
            let next = Tensor::<1, Int>::from_data(next.as_slice(), device).unsqueeze();
            let logits = self.forward(next, Some(&mut states));
            let last = logits.dims()[1] - 1;
            let chances = softmax(logits.slice(s![.., last.., ..]) / 0.6, 2);
            let next = chances.categorical(1).into_scalar::<i32>();
            from = written.len() + 1 - NEAR; // the characters that the next one stands beside
            written.push(next as usize);
        }
        let bytes: usize = states.iter().map(AttentionState::state_bytes).sum();
        println!("state: {bytes} bytes after {} characters", states[0].len());
        written
    }
}

fn main() {
    let steps = std::env::args().nth(1).map_or(300, |steps| steps.parse().expect("a number"));
    let mut alphabet: Vec<char> = TEXT.chars().collect();
    alphabet.sort_unstable();
    alphabet.dedup();
    let index = |c: char| alphabet.binary_search(&c).expect("a character of the text");
    let text: Vec<usize> = TEXT.chars().map(index).collect();

    let device = Device::flex().autodiff();
    device.seed(1);
    let mut model = ModelConfig::new(alphabet.len()).init(&device);
    println!("{} characters, {} parameters", text.len(), model.num_params());
    let mut optimizer =
        AdamWConfig::new().with_grad_clipping(Some(GradientClippingConfig::Norm(1.0))).init();
    let loss_of = CrossEntropyLossConfig::new().init(&device);
    let (tokens, mut mean) = (N + NEAR - 1, 0.0);
    for step in 0..steps {
        let starts = (0..BATCH).map(|b| (step * BATCH + b) * 7919 % (text.len() - tokens - 1));
        let rows = |shift: usize, length: usize| {
            let rows = starts.clone().flat_map(|at| &text[at + shift..at + shift + length]);
            let rows: Vec<i32> = rows.map(|&c| c as i32).collect();
            Tensor::<1, Int>::from_data(rows.as_slice(), &device)
        };
        let logits = model.forward(rows(0, tokens).reshape([BATCH, tokens]), None);
        let logits = logits.reshape([BATCH * N, alphabet.len()]);
        let loss = loss_of.forward(logits, rows(NEAR, N));
        mean += loss.clone().into_scalar::<f32>() / 20.0;
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(3e-3, model, gradients);
        if step % 20 == 19 {
            println!("step {:4}  loss {mean:.3}", step + 1);
            mean = 0.0;
        }
    }
    let written = model.valid().generate(&text[..40], 200, &device.without_autodiff());
    println!("{}", written.into_iter().map(|c| alphabet[c]).collect::<String>());
}
