//! A model that is trained: its layers as operations of candle, the attention by this crate.

use crate::convert::ops::{FeedForward, Heads, Projection, Real, RmsNorm, Side};
use crate::convert::variables::{OfKernels, Rule, Variables};
use crate::model::{Config, Layer, Model};
use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor, Var};
use dijiang::ndarray::ArcArray2;
use dijiang::{Mask, MultiHead, Rotary};
use dijiang_candle::{Extras, attention_with};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex};

/// What is trained of the weights of attention; the gains of all norms and the parameters of the
/// kernels always are.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Trained {
    /// Factors beside the four matrices of every layer: `W + A·B` with `A [in, rank]` and
    /// `B [rank, out]` (Hu et al., arXiv 2106.09685), whose `α/rank` is [`SCALE`].
    LowRank(usize),
    /// The four matrices.
    Attention,
    /// The four matrices, which begin as random numbers: what inherited weights are worth.
    RandomAttention,
}

/// The factor of the low-rank products, `α/rank`.
pub const SCALE: f64 = 2.0;

/// The matrices of attention, by the names of their variables.
pub const MATRICES: [&str; 4] = ["query", "key", "value", "output"];

/// A model in training.
pub struct Student<T: Real> {
    config: Config,
    rotary: Rotary,
    layers: Vec<StudentLayer<T>>,
    norm: Var,
    /// `[width, vocabulary]`
    head: ArcArray2<T>,
    variables: Variables,
}

struct StudentLayer<T: Real> {
    attention: MultiHead<T>,
    of_kernels: OfKernels,
    attention_norm: Var,
    feed_forward_norm: Var,
    /// Queries, keys, values, output.
    matrices: [Matrix<T>; 4],
    /// Of the feed-forward network.
    feed_forward: [ArcArray2<T>; 3],
}

/// A matrix of attention.
struct Matrix<T: Real> {
    /// `[in, out]`; that of the model as it came.
    weight: ArcArray2<T>,
    trained: Vars,
}

enum Vars {
    LowRank { down: Var, up: Var },
    Whole(Var),
}

impl<T: Real> Matrix<T> {
    fn apply(&self, x: &Tensor, heads: Heads, side: Side<T>) -> candle_core::Result<Tensor> {
        let product = Projection { weight: self.weight.clone(), scale: SCALE, side, heads };
        match &self.trained {
            Vars::LowRank { down, up } => x.apply_op3(down, up, product),
            Vars::Whole(weight) => x.apply_op2(weight, product),
        }
    }
}

/// The name of a variable of a layer.
fn name(layer: usize, of: &str) -> String {
    format!("layers.{layer}.{of}")
}

/// A variable of these numbers.
fn variable<T: Real>(numbers: Vec<T>, shape: &[usize]) -> Result<Var> {
    Ok(Var::from_vec(numbers, shape, &Device::Cpu)?)
}

impl<T: Real> Student<T> {
    /// The model with these layers of attention. Random numbers are of the seed.
    pub fn new(
        model: &Model,
        attention: &[MultiHead<T>],
        trained: Trained,
        seed: u64,
    ) -> Result<Self> {
        let config = model.config().clone();
        ensure!(attention.len() == config.layers, "a layer of attention for each of the model's");
        let mut variables = Variables::default();
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut layers = Vec::with_capacity(config.layers);
        for (l, (layer, attention)) in model.layers().iter().zip(attention).enumerate() {
            let made = StudentLayer::new(l, layer, attention, trained, &mut random, &mut variables);
            layers.push(made.with_context(|| format!("layer {l}"))?);
        }
        let norm = gain::<T>(model.norm().iter())?;
        variables.add("norm".to_owned(), Rule::Free, false, &norm);
        let (rotary, head) = (model.rotary().clone(), T::weight(model.head()));
        Ok(Self { config, rotary, layers, norm, head, variables })
    }

    /// What is trained.
    #[must_use]
    pub fn variables(&self) -> &Variables {
        &self.variables
    }

    /// `[width, vocabulary]`
    #[must_use]
    pub fn head(&self) -> &ArcArray2<T> {
        &self.head
    }

    /// The last hidden states of a sequence, `[n, width]`, from the embeddings of its tokens.
    pub fn forward(&self, embedded: Tensor) -> Result<Tensor> {
        let Config { heads, kv_heads, head_dim, value_dim, .. } = self.config;
        let scales = &self.config.scales;
        let tokens = embedded.dim(0)?;
        let of = |heads, columns| Heads { heads, tokens, columns };
        let angles = Arc::new(self.rotary.angles::<T>(0, tokens)?);
        let turned = |factor| Side::Turned(Arc::clone(&angles), factor);
        // the kernels scale by 1/√head_dim themselves
        let scale = scales.attention.map_or(1.0, |scale| scale * (head_dim as f64).sqrt());
        let norm = RmsNorm::<T>::new(self.config.rms_epsilon);
        let mut x = embedded;
        for (l, layer) in self.layers.iter().enumerate() {
            // x ← x + W_o · Attention(q, k, v), and then x ← x + FeedForward(x)
            let h = x.apply_op2(&layer.attention_norm, norm)?;
            let [query, key, value, output] = &layer.matrices;
            let q = query.apply(&h, of(heads, head_dim), turned(scale))?;
            let k = key.apply(&h, of(kv_heads, head_dim), turned(1.0))?;
            let v = value.apply(&h, of(kv_heads, value_dim), Side::Output)?;
            let mixed = layer.attend([&q, &k, &v]);
            let mixed = mixed.with_context(|| format!("attention of layer {l}"))?;
            let o = output.apply(&mixed, of(heads, value_dim), Side::Input)?;
            let feed_forward = FeedForward {
                norm,
                weights: layer.feed_forward.clone(),
                residual: scales.residual.unwrap_or(1.0),
                tape: Mutex::default(),
            };
            x = x.apply_op3(&o, &layer.feed_forward_norm, feed_forward)?;
        }
        Ok(x.apply_op2(&self.norm, norm)?)
    }
}

/// The gain of a norm.
fn gain<'a, T: Real>(gains: impl Iterator<Item = &'a f32>) -> Result<Var> {
    let gains: Vec<T> = gains.map(|&x| T::rounded(f64::from(x))).collect();
    let count = gains.len();
    variable(gains, &[count])
}

impl<T: Real> StudentLayer<T> {
    /// Attention, `[1, heads, n, d_v]`.
    fn attend(&self, qkv: [&Tensor; 3]) -> Result<Tensor> {
        let parameters = self.of_kernels.used()?;
        let extras = Extras { parameters: &parameters, ..Extras::default() };
        Ok(attention_with(&self.attention, extras, qkv, Mask::Causal, None)?)
    }

    fn new(
        l: usize,
        layer: &Layer,
        attention: &MultiHead<T>,
        trained: Trained,
        random: &mut ChaCha8Rng,
        variables: &mut Variables,
    ) -> Result<Self> {
        let mut matrix = |which: &str, of| -> Result<Matrix<T>> {
            let weight = T::weight(of);
            let (inputs, outputs) = weight.dim();
            let mut normal = |count: usize| -> Vec<T> {
                let size = 1.0 / (inputs as f64).sqrt();
                (0..count).map(|_| T::rounded(size * normal(random))).collect()
            };
            let mut add = |part: &str, numbers, shape: [usize; 2]| -> Result<Var> {
                let var = variable::<T>(numbers, &shape)?;
                variables.add(name(l, &format!("{which}.{part}")), Rule::Free, true, &var);
                Ok(var)
            };
            let trained = match trained {
                Trained::LowRank(rank) => {
                    let down = add("down", normal(inputs * rank), [inputs, rank])?;
                    let zeros = vec![T::rounded(0.0); rank * outputs];
                    let up = add("up", zeros, [rank, outputs])?;
                    Vars::LowRank { down, up }
                }
                Trained::Attention => {
                    let numbers = weight.iter().copied().collect();
                    Vars::Whole(add("weight", numbers, [inputs, outputs])?)
                }
                Trained::RandomAttention => {
                    let numbers = normal(inputs * outputs);
                    Vars::Whole(add("weight", numbers, [inputs, outputs])?)
                }
            };
            Ok(Matrix { weight, trained })
        };
        let matrices = [
            matrix(MATRICES[0], &layer.query)?,
            matrix(MATRICES[1], &layer.key)?,
            matrix(MATRICES[2], &layer.value)?,
            matrix(MATRICES[3], &layer.output)?,
        ];
        let attention_norm = gain::<T>(layer.attention_norm.iter())?;
        variables.add(name(l, "attention_norm"), Rule::Free, false, &attention_norm);
        let feed_forward_norm = gain::<T>(layer.feed_forward_norm.iter())?;
        variables.add(name(l, "feed_forward_norm"), Rule::Free, false, &feed_forward_norm);
        let of_kernels = OfKernels::new(attention, &name(l, "attention."), variables)?;
        Ok(Self {
            attention: attention.clone(),
            of_kernels,
            attention_norm,
            feed_forward_norm,
            matrices,
            feed_forward: [&layer.gate, &layer.up, &layer.down].map(T::weight),
        })
    }
}

/// A standard normal number (Box and Muller).
fn normal(random: &mut ChaCha8Rng) -> f64 {
    let [a, b]: [f64; 2] = [random.random(), random.random()];
    (-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()
}
