//! How much a loss changes with what every attention head puts out: `g_t = ∂ loss/∂ o_t`, by one
//! backward pass of the exact model.
//!
//! The layers are gone through one by one: on the way forward the input of each is kept, on the way
//! back each is built again from its input and differentiated by `candle`. Weights are read from
//! the file where they are needed. So the memory is that of one layer, and of a few arrays of
//! `[tokens, width]` for each; attention goes by blocks of queries.

mod attention;
mod layer;
mod loss;

pub use loss::Loss;

use crate::gguf::Gguf;
use crate::model::Config;
use anyhow::{Context, Result, ensure};
use attention::Attention;
use candle_core::{D, DType, Device, Tensor, Var};
use indicatif::ProgressBar;
use layer::{Layer, Tables, norm};
use ndarray::{Array3, ArrayView3, Axis, s};

/// `∂ loss/∂ o_t` of every head, `o_t` being its output before the matrix that mixes heads.
#[derive(Clone, Debug)]
pub struct Sensitivities {
    /// `[heads, n, d_v]` of each layer.
    layers: Vec<Array3<f32>>,
    /// What the loss was, in nats.
    pub loss: f64,
    /// For each position the next token that the loss is about, if it is about one.
    pub targets: Vec<Option<u32>>,
}

impl Sensitivities {
    /// Those of the query heads that one kv head serves, `[group, n, d_v]`.
    #[must_use]
    pub fn of(&self, layer: usize, kv_head: usize, group: usize) -> ArrayView3<'_, f32> {
        self.layers[layer].slice(s![kv_head * group..(kv_head + 1) * group, .., ..])
    }

    /// Those of all query heads of each layer, `[heads, n, d_v]`.
    #[must_use]
    pub fn layers(&self) -> &[Array3<f32>] {
        &self.layers
    }
}

/// A model to be differentiated: its file, from which weights are read layer by layer.
pub struct Exact {
    file: Gguf,
    config: Config,
    precision: DType,
    embedding: Tensor,
    output: Option<Tensor>,
    norm: Tensor,
}

/// Advances of the bar for one text.
#[must_use]
pub fn steps(config: &Config) -> usize {
    2 * config.layers + 1
}

impl Exact {
    /// A model in `f32`, which is what it runs in, or in `f64`, which is exact.
    pub fn new(mut file: Gguf, precision: DType) -> Result<Self> {
        let config = file.config()?;
        let (width, vocabulary) = (config.width, config.vocabulary);
        let mut matrix = |name: &str, shape: &[usize]| -> Result<Tensor> {
            Ok(file.widened(name, shape)?.to_dtype(precision)?)
        };
        let embedding = matrix("token_embd.weight", &[vocabulary, width])?;
        let norm = matrix("output_norm.weight", &[width])?;
        let output = match file.has("output.weight") {
            true => Some(file.widened("output.weight", &[vocabulary, width])?.to_dtype(precision)?),
            false => None,
        };
        Ok(Self { file, config, precision, embedding, output, norm })
    }

    /// Reads `tokens` forward and the loss back. The bar advances by [`steps`].
    pub fn backward(
        &mut self,
        tokens: &[u32],
        loss: &Loss,
        bar: &ProgressBar,
    ) -> Result<Sensitivities> {
        ensure!(!tokens.is_empty(), "there is no text to differentiate on");
        let config = self.config.clone();
        let known = |&&token: &&u32| token as usize >= config.vocabulary;
        if let Some(token) = tokens.iter().find(known) {
            anyhow::bail!("token {token} is beyond the vocabulary of {}", config.vocabulary);
        }
        let rotary = self.file.rotary(&config)?;
        let tables = Tables::new(&rotary, tokens.len(), self.precision)?;
        let attention = Attention::new(&config);

        let read = Tensor::from_slice(tokens, tokens.len(), &Device::Cpu)?;
        let mut x = self.embedding.index_select(&read, 0)?;
        x = (x * config.scales.embedding.unwrap_or(1.0))?;
        let mut kept = Vec::with_capacity(config.layers);
        for l in 0..config.layers {
            let layer = Layer::read(&mut self.file, &config, l, self.precision)?;
            let [q, k, v] = layer.project(&x, &tables)?;
            let o = attention.forward(&q, &k, &v)?;
            let next = layer.finish(&x, &o)?;
            kept.push((x, o));
            x = next;
            bar.inc(1);
        }

        let head = self.output.as_ref().unwrap_or(&self.embedding);
        let x = Var::from_tensor(&x)?;
        let hidden = norm(x.as_tensor(), &self.norm, config.rms_epsilon)?;
        let found = loss.gradient(&hidden.detach(), head, tokens)?;
        let mut gradient = one(&pull(&[(&hidden, &found.hidden)], &[&x])?)?;
        bar.inc(1);

        let mut layers = Vec::with_capacity(config.layers);
        for l in (0..config.layers).rev() {
            let layer = Layer::read(&mut self.file, &config, l, self.precision)?;
            let (x, o) = kept.pop().context("a layer was not kept")?;
            let (x, o) = (Var::from_tensor(&x)?, Var::from_tensor(&o)?);
            // [x, o] → next x, cut at o: there the sensitivity is read
            let next = layer.finish(x.as_tensor(), o.as_tensor())?;
            let behind = pull(&[(&next, &gradient)], &[&x, &o])?;
            drop(next);
            layers.push(heads(&behind[1], &config)?);
            // x → q, k, v, cut there as well: attention goes by blocks
            let [q, k, v] = layer.project(x.as_tensor(), &tables)?;
            let [dq, dk, dv] =
                attention.backward(&q.detach(), &k.detach(), &v.detach(), &behind[1])?;
            let before = pull(&[(&q, &dq), (&k, &dk), (&v, &dv)], &[&x])?;
            gradient = (&behind[0] + one(&before)?)?;
            bar.inc(1);
        }
        layers.reverse();
        ensure!(
            layers.iter().flatten().all(|x| x.is_finite()),
            "the sensitivities are not finite numbers: the weights of the model are damaged, or \
             too large for f32"
        );
        Ok(Sensitivities { layers, loss: found.loss, targets: found.targets })
    }
}

/// `Σᵢ ∂(yᵢ·gᵢ)/∂x` for each of the variables.
fn pull(outputs: &[(&Tensor, &Tensor)], variables: &[&Var]) -> Result<Vec<Tensor>> {
    let mut sum: Option<Tensor> = None;
    for (y, g) in outputs {
        let term = (*y * *g)?.sum_all()?;
        sum = Some(match sum {
            Some(sum) => (sum + term)?,
            None => term,
        });
    }
    let gradients = sum.context("nothing to differentiate")?.backward()?;
    let of = |variable: &&Var| match gradients.get(variable.as_tensor()) {
        Some(gradient) => Ok(gradient.detach()),
        None => Ok(variable.as_tensor().zeros_like()?),
    };
    variables.iter().map(of).collect()
}

fn one(gradients: &[Tensor]) -> Result<Tensor> {
    Ok(gradients.first().context("one variable")?.clone())
}

/// `[n, heads · d_v]` as `[heads, n, d_v]`.
fn heads(o: &Tensor, config: &Config) -> Result<Array3<f32>> {
    let (n, _) = o.dims2()?;
    let values = o.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let rows = Array3::from_shape_vec((n, config.heads, config.value_dim), values)?;
    let mut heads = Array3::zeros((config.heads, n, config.value_dim));
    for (mut head, from) in heads.outer_iter_mut().zip(rows.axis_iter(Axis(1))) {
        head.assign(&from);
    }
    Ok(heads)
}

/// `e^x / Σ e^x` along the last axis.
fn softmax(x: &Tensor) -> candle_core::Result<Tensor> {
    // what is subtracted makes no difference, so it has no gradient
    let largest = x.max_keepdim(D::Minus1)?.detach();
    let exp = x.broadcast_sub(&largest)?.exp()?;
    let sum = exp.sum_keepdim(D::Minus1)?;
    exp.broadcast_div(&sum)
}
