//! A language model of characters with two layers of frequency-domain attention: trained on a text
//! of this repository, then generated from token by token, with a state of constant size.
//!
//! ```text
//! cargo run --release -p dijiang-candle --example train -- [STEPS] [--save FILE]
//! ```
//!
//! `--save` writes the weights before the first step, as safetensors. The example of the same name
//! of the adapter to burn is the same model, and begins from such a file with the same losses.

use candle_core::{D, DType, Device, Module, Result, Tensor};
use candle_nn::{
    AdamW, Embedding, Linear, Optimizer, ParamsAdamW, RmsNorm, VarBuilder, VarMap, embedding,
    linear_no_bias, loss, ops, rms_norm,
};
use dijiang::{DctFeatures, LinearAttention, MultiHead, Rotary, RotaryAttention};
use dijiang_candle::{AttentionState, DijiangAttention, DijiangAttentionConfig};
use rand::SeedableRng;
use rand::distr::{Distribution, weighted::WeightedIndex};
use rand::rngs::StdRng;

const TEXT: &str = include_str!("../../../README.md");
const HIDDEN: usize = 64;
const HEADS: usize = 4;
const HEAD_DIM: usize = HIDDEN / HEADS;
const FEATURES: usize = 32;
const LAYERS: usize = 2;
const BATCH: usize = 8;
const CONTEXT: usize = 128;

/// A layer: attention, then a perceptron, each beside the hidden states.
struct Block {
    norm_1: RmsNorm,
    attention: DijiangAttention<f32>,
    norm_2: RmsNorm,
    up: Linear,
    down: Linear,
}

impl Block {
    fn new(seed: u64, vb: &VarBuilder) -> std::result::Result<Self, Box<dyn std::error::Error>> {
        // queries and keys turn with their positions; heads share a map, whose numbers are trained
        let map = DctFeatures::<f32>::new(HEAD_DIM, FEATURES, seed)?;
        let kernel = RotaryAttention::new(Rotary::new(HEAD_DIM)?, LinearAttention::new(map));
        let layer = MultiHead::new(kernel, HEADS, HEADS)?;
        let config = DijiangAttentionConfig::new(HIDDEN, HEAD_DIM);
        Ok(Self {
            norm_1: rms_norm(HIDDEN, 1e-5, vb.pp("norm_1"))?,
            attention: DijiangAttention::new(layer, config, vb.pp("attention"))?,
            norm_2: rms_norm(HIDDEN, 1e-5, vb.pp("norm_2"))?,
            up: linear_no_bias(HIDDEN, 4 * HIDDEN, vb.pp("up"))?,
            down: linear_no_bias(4 * HIDDEN, HIDDEN, vb.pp("down"))?,
        })
    }

    /// With a state the next tokens, without one whole sequences. (Norms by `forward_diff`: the
    /// faster `forward` of candle has no gradient, and stops those of all that comes before.)
    fn forward(&self, x: &Tensor, state: Option<&mut AttentionState<f32>>) -> Result<Tensor> {
        let seen = self.norm_1.forward_diff(x)?;
        let attended = match state {
            Some(state) => self.attention.forward_step(&seen, state)?,
            None => self.attention.forward(&seen)?,
        };
        let x = (x + attended)?;
        let hidden = self.up.forward(&self.norm_2.forward_diff(&x)?)?.gelu_erf()?;
        x + self.down.forward(&hidden)?
    }
}

struct Model {
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Linear,
}

impl Model {
    fn new(
        characters: usize,
        vb: &VarBuilder,
    ) -> std::result::Result<Self, Box<dyn std::error::Error>> {
        let block = |i: usize| Block::new(i as u64, &vb.pp(format!("blocks.{i}")));
        Ok(Self {
            embedding: embedding(characters, HIDDEN, vb.pp("embedding"))?,
            blocks: (0..LAYERS).map(block).collect::<std::result::Result<_, _>>()?,
            norm: rms_norm(HIDDEN, 1e-5, vb.pp("norm"))?,
            head: linear_no_bias(HIDDEN, characters, vb.pp("head"))?,
        })
    }

    /// Logits `[batch, n, characters]` of `[batch, n]` characters.
    fn forward(
        &self,
        tokens: &Tensor,
        states: Option<&mut [AttentionState<f32>]>,
    ) -> Result<Tensor> {
        let mut x = self.embedding.forward(tokens)?;
        let mut states = states.map(|states| states.iter_mut());
        for block in &self.blocks {
            x = block.forward(&x, states.as_mut().and_then(Iterator::next))?;
        }
        self.head.forward(&self.norm.forward_diff(&x)?)
    }
}

/// Some passages of the text, and the same one character on.
fn batch(tokens: &[u32], step: usize) -> Result<[Tensor; 2]> {
    let start = |b: usize| (step * BATCH + b) * 7919 % (tokens.len() - CONTEXT - 1);
    let passages = |shift: usize| {
        let passage = |b: usize| &tokens[start(b) + shift..start(b) + shift + CONTEXT];
        let all: Vec<u32> = (0..BATCH).flat_map(passage).copied().collect();
        Tensor::from_vec(all, (BATCH, CONTEXT), &Device::Cpu)
    };
    Ok([passages(0)?, passages(1)?])
}

/// The text goes on, one character after the other.
fn generate(
    model: &Model,
    characters: &[char],
    tokens: &[u32],
    rng: &mut StdRng,
) -> Result<String> {
    let mut states =
        model.blocks.iter().map(|block| block.attention.state(1)).collect::<Result<Vec<_>>>()?;
    let mut next = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
    let mut text = String::new();
    for _ in 0..200 {
        let logits = model.forward(&next, Some(&mut states))?.detach();
        let last = logits.narrow(1, logits.dim(1)? - 1, 1)?.flatten_all()?;
        let weights = ops::softmax(&(last / 0.7)?, D::Minus1)?.to_vec1::<f32>()?;
        let token = WeightedIndex::new(weights).map_err(candle_core::Error::wrap)?.sample(rng);
        text.push(characters[token]);
        next = Tensor::new(&[[token as u32]], &Device::Cpu)?;
    }
    let bytes: usize = states.iter().map(AttentionState::state_bytes).sum();
    println!("{} tokens seen, {bytes} bytes of state in {LAYERS} layers", states[0].len());
    Ok(text)
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let (mut steps, mut file) = (300, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--save" => file = Some(arguments.next().ok_or("--save needs a file")?),
            number => steps = number.parse()?,
        }
    }
    let mut characters: Vec<char> = TEXT.chars().collect();
    characters.sort_unstable();
    characters.dedup();
    let number = |c| characters.iter().position(|&other| other == c).unwrap_or_default() as u32;
    let tokens: Vec<u32> = TEXT.chars().map(number).collect();

    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let model = Model::new(characters.len(), &vb)?;
    if let Some(file) = file {
        varmap.save(file)?;
    }
    let options = ParamsAdamW { lr: 2e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
    let mut optimizer = AdamW::new(varmap.all_vars(), options)?;
    for step in 0..steps {
        let [passages, next] = batch(&tokens, step)?;
        let logits = model.forward(&passages, None)?.flatten_to(1)?;
        let loss = loss::cross_entropy(&logits, &next.flatten_all()?)?;
        optimizer.backward_step(&loss)?;
        if step < 3 || step % 20 == 19 {
            println!("step {:4}  loss {:.5}", step + 1, loss.to_scalar::<f32>()?);
        }
    }
    let text = generate(&model, &characters, &tokens[..CONTEXT], &mut StdRng::seed_from_u64(0))?;
    println!("{}|{text}", TEXT.chars().take(CONTEXT).collect::<String>());
    Ok(())
}
