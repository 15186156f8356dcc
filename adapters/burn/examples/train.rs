//! A language model of characters with two layers of frequency-domain attention: trained on a text
//! of this repository, then generated from token by token, with a state of constant size.
//!
//! ```text
//! cargo run --release --example train -- [STEPS] [--weights FILE]
//! ```
//!
//! `--weights` begins from a file of safetensors, such as the example of the same name of the
//! adapter to candle saves: the model is the same, and so are its losses.

use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, RmsNorm, RmsNormConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::prelude::*;
use burn::store::{ModuleSnapshot, PyTorchToBurnAdapter, SafetensorsStore};
use burn::tensor::activation::{gelu, softmax};
use dijiang_burn::dijiang::{
    DctFeatures, Error, LinearAttention, MultiHead, Rotary, RotaryAttention,
};
use dijiang_burn::{AttentionInput, AttentionState, DijiangAttention, DijiangAttentionConfig};

const TEXT: &str = include_str!("../../../README.md");
const HIDDEN: usize = 64;
const HEADS: usize = 4;
const HEAD_DIM: usize = HIDDEN / HEADS;
const FEATURES: usize = 32;
const LAYERS: usize = 2;
const BATCH: usize = 8;
const CONTEXT: usize = 128;

/// A layer: attention, then a perceptron, each beside the hidden states.
#[derive(Module, Debug)]
struct Block {
    norm_1: RmsNorm,
    attention: DijiangAttention,
    norm_2: RmsNorm,
    up: Linear,
    down: Linear,
}

fn norm(device: &Device) -> RmsNorm {
    RmsNormConfig::new(HIDDEN).with_epsilon(1e-5).init(device)
}

fn linear(from: usize, to: usize, device: &Device) -> Linear {
    LinearConfig::new(from, to).with_bias(false).init(device)
}

impl Block {
    fn new(seed: u64, device: &Device) -> Result<Self, Error> {
        // queries and keys turn with their positions; heads share a map, whose numbers are trained
        let map = DctFeatures::<f32>::new(HEAD_DIM, FEATURES, seed)?;
        let kernel = RotaryAttention::new(Rotary::new(HEAD_DIM)?, LinearAttention::new(map));
        let layer = MultiHead::new(kernel, HEADS, HEADS)?;
        let config = DijiangAttentionConfig::new(HIDDEN, HEADS).with_query_bias(false);
        let config = config.with_key_bias(false).with_value_bias(false).with_output_bias(false);
        Ok(Self {
            norm_1: norm(device),
            attention: config.try_init_with(layer, device)?,
            norm_2: norm(device),
            up: linear(HIDDEN, 4 * HIDDEN, device),
            down: linear(4 * HIDDEN, HIDDEN, device),
        })
    }

    /// With a state the next tokens, without one whole sequences.
    fn forward(&self, x: Tensor<3>, state: Option<&mut AttentionState<f32>>) -> Tensor<3> {
        let seen = self.norm_1.forward(x.clone());
        let attended = match state {
            Some(state) => self.attention.forward_state(seen, state),
            None => self.attention.forward(AttentionInput::self_attn(seen).causal()),
        };
        let x = x + attended.context;
        let hidden = gelu(self.up.forward(self.norm_2.forward(x.clone())));
        x + self.down.forward(hidden)
    }
}

#[derive(Module, Debug)]
struct Model {
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Linear,
}

impl Model {
    fn new(characters: usize, device: &Device) -> Result<Self, Error> {
        let block = |i: usize| Block::new(i as u64, device);
        Ok(Self {
            embedding: EmbeddingConfig::new(characters, HIDDEN).init(device),
            blocks: (0..LAYERS).map(block).collect::<Result<_, _>>()?,
            norm: norm(device),
            head: linear(HIDDEN, characters, device),
        })
    }

    /// Logits `[batch, n, characters]` of `[batch, n]` characters.
    fn forward(
        &self,
        tokens: Tensor<2, Int>,
        states: Option<&mut [AttentionState<f32>]>,
    ) -> Tensor<3> {
        let mut x = self.embedding.forward(tokens);
        let mut states = states.map(|states| states.iter_mut());
        for block in &self.blocks {
            x = block.forward(x, states.as_mut().and_then(Iterator::next));
        }
        self.head.forward(self.norm.forward(x))
    }
}

/// `[rows, n]` characters.
fn rows(tokens: Vec<i32>, rows: usize, device: &Device) -> Tensor<2, Int> {
    let columns = tokens.len() / rows;
    Tensor::from_data(TensorData::new(tokens, [rows, columns]), device)
}

/// Some passages of the text, and the same one character on.
fn batch(tokens: &[i32], step: usize, device: &Device) -> [Tensor<2, Int>; 2] {
    let start = |b: usize| (step * BATCH + b) * 7919 % (tokens.len() - CONTEXT - 1);
    [0, 1].map(|shift| {
        let passage = |b: usize| &tokens[start(b) + shift..start(b) + shift + CONTEXT];
        rows((0..BATCH).flat_map(passage).copied().collect(), BATCH, device)
    })
}

/// The text goes on, one character after the other.
fn generate(
    model: &Model,
    characters: &[char],
    tokens: &[i32],
    device: &Device,
) -> Result<String, Error> {
    let states = model.blocks.iter().map(|block| block.attention.state(1));
    let mut states = states.collect::<Result<Vec<_>, _>>()?;
    let mut next = tokens.to_vec();
    let mut text = String::new();
    for _ in 0..200 {
        let logits = model.forward(rows(next, 1, device), Some(&mut states));
        let last = logits.dims()[1] - 1;
        let chances = softmax(logits.slice(s![.., last.., ..]) / 0.7, 2);
        let token = chances.categorical(1).into_scalar::<i32>();
        text.push(characters[token as usize]);
        next = vec![token];
    }
    let bytes: usize = states.iter().map(AttentionState::state_bytes).sum();
    println!("{} tokens seen, {bytes} bytes of state in {LAYERS} layers", states[0].len());
    Ok(text)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (mut steps, mut file) = (300, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--weights" => file = Some(arguments.next().ok_or("--weights needs a file")?),
            number => steps = number.parse()?,
        }
    }
    let mut characters: Vec<char> = TEXT.chars().collect();
    characters.sort_unstable();
    characters.dedup();
    let number = |c| characters.iter().position(|&other| other == c).unwrap_or_default() as i32;
    let tokens: Vec<i32> = TEXT.chars().map(number).collect();

    let device = Device::flex().autodiff();
    device.seed(0);
    let mut model = Model::new(characters.len(), &device)?;
    if let Some(file) = file {
        // projections have other names there, and linear layers the transposed weights
        let mut store = SafetensorsStore::from_file(file)
            .with_from_adapter(PyTorchToBurnAdapter)
            .with_key_remapping(r"\.q_proj\.", ".query.")
            .with_key_remapping(r"\.k_proj\.", ".key.")
            .with_key_remapping(r"\.v_proj\.", ".value.")
            .with_key_remapping(r"\.o_proj\.", ".output.");
        model.load_from(&mut store)?;
    }
    let config = AdamWConfig::new().with_beta_1(0.9).with_beta_2(0.999).with_epsilon(1e-8);
    let mut optimizer = config.with_weight_decay(0.01).init();
    let loss_of = CrossEntropyLossConfig::new().init(&device);
    for step in 0..steps {
        let [passages, next] = batch(&tokens, step, &device);
        let logits = model.forward(passages, None).flatten(0, 1);
        let loss = loss_of.forward(logits, next.flatten(0, 1));
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(2e-3, model, gradients);
        if step < 3 || step % 20 == 19 {
            println!("step {:4}  loss {:.5}", step + 1, loss.into_scalar::<f32>());
        }
    }
    let device = device.without_autodiff();
    let text = generate(&model.valid(), &characters, &tokens[..CONTEXT], &device)?;
    println!("{}|{text}", TEXT.chars().take(CONTEXT).collect::<String>());
    Ok(())
}
