//! A LLaMA (Touvron et al., arXiv 2302.13971): the forward pass, with any attention of this crate
//! in its heads.

use crate::elementwise;
use crate::gguf::Gguf;
use crate::linear::{Linear, Weights};
use anyhow::{Context, Result, ensure};
use dijiang::{MultiHead, MultiHeadStream, Rotary, RotaryAngles, SoftmaxAttention};
use ndarray::{Array1, Array2, ArrayView3, Axis};
use std::path::Path;
use std::time::{Duration, Instant};

/// The sizes of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// As the file says.
    pub name: String,
    /// Layers of attention and feed-forward network.
    pub layers: usize,
    /// Columns of the residual stream.
    pub width: usize,
    /// Query heads of a layer.
    pub heads: usize,
    /// Heads of keys and values of a layer.
    pub kv_heads: usize,
    /// Columns of a query and a key.
    pub head_dim: usize,
    /// Columns of a value.
    pub value_dim: usize,
    /// Hidden columns of the feed-forward network.
    pub feed_forward: usize,
    /// Tokens it was trained on.
    pub context: usize,
    /// Tokens it knows.
    pub vocabulary: usize,
    /// ε of the norms.
    pub rms_epsilon: f64,
    /// Factors that most models do not have.
    pub scales: Scales,
}

/// Factors on the way through a model; none are 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Scales {
    /// Of the embeddings.
    pub embedding: Option<f64>,
    /// Of what every block of a layer adds.
    pub residual: Option<f64>,
    /// Of the products of queries and keys, in place of `1/√head_dim`.
    pub attention: Option<f64>,
}

impl Config {
    /// Query heads of a kv head.
    #[must_use]
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// The weights of a model.
#[derive(Clone, Debug)]
pub struct Model {
    config: Config,
    layers: Vec<Layer>,
    norm: Array1<f32>,
    rotary: Rotary,
    /// `[width, vocabulary]`; its columns embed the tokens, also where the output head has a weight
    /// of its own.
    embedding: Linear,
    /// The output head, where it is not the embedding.
    output: Option<Linear>,
}

/// The weights of a layer.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) attention_norm: Array1<f32>,
    pub(crate) query: Linear,
    pub(crate) key: Linear,
    pub(crate) value: Linear,
    pub(crate) output: Linear,
    pub(crate) feed_forward_norm: Array1<f32>,
    pub(crate) gate: Linear,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
}

/// What a model remembers of the tokens it has read: one attention state for each layer.
#[derive(Clone, Debug)]
pub struct State {
    attention: Vec<MultiHeadStream<f32>>,
    position: usize,
    /// An error left some layers ahead of others.
    broken: bool,
    time: Time,
}

/// Where the time went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Time {
    /// In the kernels of this crate.
    pub attention: Duration,
    /// In the matrix products of the layers, the output head included.
    pub products: Duration,
    /// Norms, rotary embedding, activations, copies.
    pub rest: Duration,
}

/// What the attention of a layer is given: queries `[heads, n, d]`, keys `[kv_heads, n, d]` after
/// the rotary embedding, values `[kv_heads, n, d_v]`.
#[derive(Clone, Copy, Debug)]
pub struct Projections<'a> {
    /// The layer, from 0.
    pub layer: usize,
    /// Queries.
    pub q: ArrayView3<'a, f32>,
    /// Keys.
    pub k: ArrayView3<'a, f32>,
    /// Values.
    pub v: ArrayView3<'a, f32>,
}

impl Model {
    /// Reads a GGUF file, with `f32` weights.
    pub fn load(path: &Path) -> Result<Self> {
        Self::from_gguf(&mut Gguf::open(path)?, Weights::F32)
            .with_context(|| format!("in {}", path.display()))
    }

    /// Reads the weights of an open file.
    pub fn from_gguf(file: &mut Gguf, weights: Weights) -> Result<Self> {
        let config = file.config()?;
        let Config { width, heads, kv_heads, head_dim, value_dim, feed_forward, .. } = config;
        let (queries, keys, values) = (heads * head_dim, kv_heads * head_dim, kv_heads * value_dim);
        let mut layers = Vec::new();
        for l in 0..config.layers {
            let mut linear = |name: &str, inputs, outputs| -> Result<Linear> {
                file.linear(&format!("blk.{l}.{name}.weight"), inputs, outputs, weights)
            };
            let (query, key) = (linear("attn_q", width, queries)?, linear("attn_k", width, keys)?);
            let (value, output) = (
                linear("attn_v", width, values)?,
                linear("attn_output", heads * value_dim, width)?,
            );
            let (gate, up) =
                (linear("ffn_gate", width, feed_forward)?, linear("ffn_up", width, feed_forward)?);
            let down = linear("ffn_down", feed_forward, width)?;
            let attention_norm = file.vector(&format!("blk.{l}.attn_norm.weight"), width)?;
            let feed_forward_norm = file.vector(&format!("blk.{l}.ffn_norm.weight"), width)?;
            layers.push(Layer {
                attention_norm,
                query,
                key,
                value,
                output,
                feed_forward_norm,
                gate,
                up,
                down,
            });
        }
        let output = match file.has("output.weight") {
            true => Some(file.linear("output.weight", width, config.vocabulary, weights)?),
            false => None,
        };
        Ok(Self {
            layers,
            norm: file.vector("output_norm.weight", width)?,
            rotary: file.rotary(&config)?,
            embedding: file.linear("token_embd.weight", width, config.vocabulary, weights)?,
            output,
            config,
        })
    }

    /// The sizes.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The layers.
    pub(crate) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The layers, to be changed.
    pub(crate) fn layers_mut(&mut self) -> &mut [Layer] {
        &mut self.layers
    }

    /// The gain of the last norm.
    pub(crate) fn norm(&self) -> &Array1<f32> {
        &self.norm
    }

    /// The same, to be changed.
    pub(crate) fn norm_mut(&mut self) -> &mut Array1<f32> {
        &mut self.norm
    }

    pub(crate) fn rotary(&self) -> &Rotary {
        &self.rotary
    }

    /// What makes scores of hidden states.
    pub(crate) fn head(&self) -> &Linear {
        self.output.as_ref().unwrap_or(&self.embedding)
    }

    /// What the first layer is given, `[n, width]`.
    pub fn embedded(&self, tokens: &[u32]) -> Result<Array2<f32>> {
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= self.config.vocabulary)
        {
            anyhow::bail!("token {token} is beyond the vocabulary of {}", self.config.vocabulary);
        }
        Ok(scaled(self.embed(tokens), self.config.scales.embedding))
    }

    /// Bytes of the weights of linear layers and embeddings in memory.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        let layers = self.layers.iter().flat_map(|layer| {
            let Layer { query, key, value, output, gate, up, down, .. } = layer;
            [query, key, value, output, gate, up, down]
        });
        layers.chain([&self.embedding]).chain(&self.output).map(Linear::bytes).sum()
    }

    /// Names the model by its sizes and the gains of its norms: these are kept in full where
    /// matrices are quantised, so that one model has one fingerprint, however its weights are
    /// stored, and a model trained further has another.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let Config { name, layers, width, heads, kv_heads, head_dim, value_dim, .. } = &self.config;
        let gains = self.layers.iter().flat_map(|l| [&l.attention_norm, &l.feed_forward_norm]);
        let bytes = gains.chain([&self.norm]).flatten().flat_map(|gain| gain.to_le_bytes());
        let hash = hash(bytes);
        format!("{name}, {layers}x{width}, {heads}/{kv_heads}x{head_dim}/{value_dim}, {hash:016x}")
    }

    /// A hash of the sizes and of some of the numbers of every matrix, as they are in memory:
    /// another for other weights, and where the same are stored with fewer bits.
    #[must_use]
    pub fn hash_of_weights(&self) -> u64 {
        let of = |linear: &Linear| -> Vec<f32> {
            let (inputs, outputs) = linear.dim();
            let mut rows = Array2::zeros((4, inputs));
            for (i, row) in rows.outer_iter_mut().enumerate() {
                linear.copy_output(i * (outputs - 1) / 3, row);
            }
            rows.into_raw_vec_and_offset().0
        };
        let layers = self.layers.iter().flat_map(|layer| {
            let Layer { query, key, value, output, gate, up, down, .. } = layer;
            [query, key, value, output, gate, up, down]
        });
        let matrices = layers.chain([&self.embedding]).chain(&self.output);
        let numbers = matrices.flat_map(of).flat_map(f32::to_le_bytes);
        let sizes = format!("{:?} {:?}", self.config, self.rotary);
        hash(sizes.into_bytes().into_iter().chain(numbers))
    }

    /// The layers of exact attention.
    pub fn exact_layers(&self) -> Result<Vec<MultiHead<f32>>> {
        let Config { layers, heads, kv_heads, head_dim, .. } = self.config;
        let softmax = SoftmaxAttention::new(head_dim)?;
        Ok(vec![MultiHead::new(softmax, heads, kv_heads)?; layers])
    }

    /// An empty state, with this attention in each layer.
    pub fn state(&self, attention: &[MultiHead<f32>]) -> Result<State> {
        let config = &self.config;
        ensure!(
            attention.len() == config.layers,
            "{} layers of attention for {}",
            attention.len(),
            config.layers
        );
        let attention = attention
            .iter()
            .map(|heads| heads.stream(1, config.value_dim))
            .collect::<Result<_, _>>()?;
        Ok(State { attention, position: 0, broken: false, time: Time::default() })
    }

    /// Reads tokens and returns the last hidden state of each, `[n, width]`. How the tokens are
    /// split over calls makes no difference.
    pub fn extend(&self, state: &mut State, tokens: &[u32]) -> Result<Array2<f32>> {
        self.extend_observed(state, tokens, &mut |_| Ok(()))
    }

    /// As [`extend`](Self::extend); shows what the attention of each layer is given.
    pub fn extend_observed(
        &self,
        state: &mut State,
        tokens: &[u32],
        observe: &mut dyn FnMut(Projections<'_>) -> Result<()>,
    ) -> Result<Array2<f32>> {
        ensure!(!state.broken, "this state failed before: reset it");
        let x = self.embedded(tokens)?;
        state.broken = true;
        let hidden = self.forward(state, x, observe)?;
        state.position += tokens.len();
        state.broken = false;
        Ok(hidden)
    }

    fn forward(
        &self,
        state: &mut State,
        mut x: Array2<f32>,
        observe: &mut dyn FnMut(Projections<'_>) -> Result<()>,
    ) -> Result<Array2<f32>> {
        let State { attention, position, time, .. } = state;
        let Scales { residual, attention: scale, .. } = self.config.scales;
        // the kernels scale by 1/√head_dim themselves
        let scale = scale.map(|scale| scale * (self.config.head_dim as f64).sqrt());
        let start = Instant::now();
        let before = *time;
        let angles = self.rotary.angles(*position, x.nrows())?;
        for (l, (layer, attention)) in self.layers.iter().zip(attention).enumerate() {
            // x ← x + W_o · Attention(q, k, v)
            let h = self.rms_norm(&x, &layer.attention_norm)?;
            let mut q = scaled(time.product(&layer.query, &h), scale);
            let mut k = time.product(&layer.key, &h);
            let v = time.product(&layer.value, &h);
            turn(&mut q, &angles, self.config.head_dim)?;
            turn(&mut k, &angles, self.config.head_dim)?;
            let mixed = self.attend(attention, l, [&q, &k, &v], time, observe)?;
            x += &scaled(time.product(&layer.output, &mixed), residual);
            // x ← x + W_down · (silu(W_gate · h) ⊙ W_up · h)
            let h = self.rms_norm(&x, &layer.feed_forward_norm)?;
            let mut gated = time.product(&layer.gate, &h);
            let up = time.product(&layer.up, &h);
            elementwise::gate(numbers(&mut gated)?, up.as_slice().context("rows in order")?);
            x += &scaled(time.product(&layer.down, &gated), residual);
        }
        let hidden = self.rms_norm(&x, &self.norm)?;
        let timed = time.attention + time.products - before.attention - before.products;
        time.rest += start.elapsed().saturating_sub(timed);
        Ok(hidden)
    }

    /// Scores of every token of the vocabulary, `[n, vocabulary]`, from hidden states.
    pub fn logits(&self, state: &mut State, hidden: &Array2<f32>) -> Array2<f32> {
        state.time.product(self.head(), hidden)
    }

    /// The same, where each must be a finite number.
    pub fn scores(&self, state: &mut State, hidden: &Array2<f32>) -> Result<Array2<f32>> {
        let scores = self.logits(state, hidden);
        ensure!(
            scores.iter().all(|x| x.is_finite()),
            "the model gives its tokens scores that are not finite numbers: its weights are \
             damaged, or too large for f32"
        );
        Ok(scores)
    }

    /// Attention of one layer, `[n, heads · d_v]`.
    fn attend(
        &self,
        attention: &mut MultiHeadStream<f32>,
        layer: usize,
        [q, k, v]: [&Array2<f32>; 3],
        time: &mut Time,
        observe: &mut dyn FnMut(Projections<'_>) -> Result<()>,
    ) -> Result<Array2<f32>> {
        let Config { heads, kv_heads, head_dim, value_dim, .. } = self.config;
        let n = q.nrows();
        let mut mixed = Array2::zeros((n, heads * value_dim));
        // [n, heads · d] seen as [heads, n, d]
        observe(Projections {
            layer,
            q: q.to_shape((n, heads, head_dim))?.view().permuted_axes([1, 0, 2]),
            k: k.to_shape((n, kv_heads, head_dim))?.view().permuted_axes([1, 0, 2]),
            v: v.to_shape((n, kv_heads, value_dim))?.view().permuted_axes([1, 0, 2]),
        })?;
        let start = Instant::now();
        let [q, k, v] = [q, k, v].map(|x| x.view().insert_axis(Axis(0)));
        attention
            .extend_rows(q, k, v, None, mixed.view_mut().insert_axis(Axis(0)))
            .with_context(|| format!("attention of layer {layer}"))?;
        time.attention += start.elapsed();
        Ok(mixed)
    }

    /// The rows of the embedding.
    fn embed(&self, tokens: &[u32]) -> Array2<f32> {
        let mut x = Array2::zeros((tokens.len(), self.config.width));
        for (row, &token) in x.outer_iter_mut().zip(tokens) {
            self.embedding.copy_output(token as usize, row);
        }
        x
    }

    /// `x/√(mean x² + ε) ⊙ g` of every row.
    fn rms_norm(&self, x: &Array2<f32>, gain: &Array1<f32>) -> Result<Array2<f32>> {
        let (mut y, gain) = (x.clone(), gain.as_slice().context("a vector in order")?);
        elementwise::rms_norm(numbers(&mut y)?, gain, self.config.rms_epsilon);
        Ok(y)
    }
}

impl State {
    /// Tokens read.
    #[must_use]
    pub fn position(&self) -> usize {
        self.position
    }

    /// Bytes of the attention states of all layers now.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.attention.iter().map(|heads| heads.state_bytes()).sum()
    }

    /// Where the time went since [`restart_clock`](Self::restart_clock).
    #[must_use]
    pub fn time(&self) -> Time {
        self.time
    }

    /// Times from here on.
    pub fn restart_clock(&mut self) {
        self.time = Time::default();
    }

    /// Forgets every token, and that it failed.
    pub fn reset(&mut self) {
        self.attention.iter_mut().for_each(MultiHeadStream::reset);
        (self.position, self.broken) = (0, false);
    }
}

impl Time {
    fn product(&mut self, linear: &Linear, x: &Array2<f32>) -> Array2<f32> {
        let start = Instant::now();
        let y = linear.apply(x);
        self.products += start.elapsed();
        y
    }

    /// All of it.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.attention + self.products + self.rest
    }
}

fn scaled(mut x: Array2<f32>, factor: Option<f64>) -> Array2<f32> {
    if let Some(factor) = factor {
        x *= factor as f32;
    }
    x
}

/// Turns every head of `x [tokens, heads · head_dim]`.
fn turn(x: &mut Array2<f32>, angles: &RotaryAngles<f32>, head_dim: usize) -> Result<()> {
    let (tokens, columns) = x.dim();
    let heads = x.view_mut().into_shape_with_order((tokens, columns / head_dim, head_dim))?;
    Ok(angles.rotate_heads_in_place(heads)?)
}

/// FNV-1a.
pub fn hash(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The numbers of an array in its usual order.
fn numbers(x: &mut Array2<f32>) -> Result<&mut [f32]> {
    x.as_slice_mut().context("rows in order")
}
