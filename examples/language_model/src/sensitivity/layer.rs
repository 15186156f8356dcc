//! One layer of a model, in `candle`: the parts before attention and behind it.

use crate::gguf::Gguf;
use crate::model::Config;
use anyhow::Result;
use candle_core::{D, DType, Device, Tensor};
use dijiang::Rotary;

/// The weights of a layer, `[out, in]`.
pub(super) struct Layer<'a> {
    config: &'a Config,
    attention_norm: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    feed_forward_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

/// Cosines and sines of all positions, `[1, n, pairs, 1]`.
pub(super) struct Tables {
    cos: Tensor,
    sin: Tensor,
}

impl<'a> Layer<'a> {
    pub(super) fn read(
        file: &mut Gguf,
        config: &'a Config,
        layer: usize,
        precision: DType,
    ) -> Result<Self> {
        let Config { width, heads, kv_heads, head_dim, value_dim, feed_forward, .. } = *config;
        let mut weight = |name: &str, shape: &[usize]| -> Result<Tensor> {
            let weight = file.widened(&format!("blk.{layer}.{name}.weight"), shape)?;
            Ok(weight.to_dtype(precision)?)
        };
        Ok(Self {
            config,
            attention_norm: weight("attn_norm", &[width])?,
            query: weight("attn_q", &[heads * head_dim, width])?,
            key: weight("attn_k", &[kv_heads * head_dim, width])?,
            value: weight("attn_v", &[kv_heads * value_dim, width])?,
            output: weight("attn_output", &[width, heads * value_dim])?,
            feed_forward_norm: weight("ffn_norm", &[width])?,
            gate: weight("ffn_gate", &[feed_forward, width])?,
            up: weight("ffn_up", &[feed_forward, width])?,
            down: weight("ffn_down", &[width, feed_forward])?,
        })
    }

    /// `x [n, width]` as queries `[heads, n, d]` and keys `[kv_heads, n, d]`, turned, and values
    /// `[kv_heads, n, d_v]`.
    pub(super) fn project(&self, x: &Tensor, tables: &Tables) -> Result<[Tensor; 3]> {
        let Config { heads, kv_heads, head_dim, value_dim, rms_epsilon, .. } = *self.config;
        let h = norm(x, &self.attention_norm, rms_epsilon)?;
        let n = x.dim(0)?;
        let of = |weight: &Tensor, heads, columns| {
            linear(&h, weight)?.reshape((n, heads, columns))?.transpose(0, 1)?.contiguous()
        };
        Ok([
            tables.turn(&of(&self.query, heads, head_dim)?)?,
            tables.turn(&of(&self.key, kv_heads, head_dim)?)?,
            of(&self.value, kv_heads, value_dim)?,
        ])
    }

    /// What attention `o [n, heads · d_v]` and the feed-forward network make of `x`.
    pub(super) fn finish(&self, x: &Tensor, o: &Tensor) -> Result<Tensor> {
        let residual = self.config.scales.residual.unwrap_or(1.0);
        let x = (x + (linear(o, &self.output)? * residual)?)?;
        let h = norm(&x, &self.feed_forward_norm, self.config.rms_epsilon)?;
        let gated = (linear(&h, &self.gate)?.silu()? * linear(&h, &self.up)?)?;
        Ok((x + (linear(&gated, &self.down)? * residual)?)?)
    }
}

impl Tables {
    pub(super) fn new(rotary: &Rotary, tokens: usize, precision: DType) -> Result<Self> {
        let frequencies = rotary.frequencies();
        let table = |of: fn(f64) -> f64| -> Result<Tensor> {
            let angles = (0..tokens)
                .flat_map(|t| frequencies.iter().map(move |frequency| t as f64 * frequency));
            let values: Vec<f64> = angles.map(of).collect();
            let shape = (1, tokens, frequencies.len(), 1);
            Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(precision)?)
        };
        Ok(Self { cos: table(f64::cos)?, sin: table(f64::sin)? })
    }

    /// Turns the pairs `(2i, 2i + 1)` of `x [heads, n, d]`; columns beyond the pairs stay.
    fn turn(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (heads, n, d) = x.dims3()?;
        let pairs = self.cos.dim(2)?;
        if pairs == 0 {
            return Ok(x.clone());
        }
        let turned = x.narrow(D::Minus1, 0, 2 * pairs)?.reshape((heads, n, pairs, 2))?;
        let (a, b) = (turned.narrow(D::Minus1, 0, 1)?, turned.narrow(D::Minus1, 1, 1)?);
        let first = (a.broadcast_mul(&self.cos)? - b.broadcast_mul(&self.sin)?)?;
        let second = (a.broadcast_mul(&self.sin)? + b.broadcast_mul(&self.cos)?)?;
        let turned = Tensor::cat(&[first, second], D::Minus1)?.reshape((heads, n, 2 * pairs))?;
        match d - 2 * pairs {
            0 => Ok(turned),
            rest => Tensor::cat(&[turned, x.narrow(D::Minus1, 2 * pairs, rest)?], D::Minus1),
        }
    }
}

/// `x/√(mean x² + ε) ⊙ g` of every row.
pub(super) fn norm(x: &Tensor, gain: &Tensor, epsilon: f64) -> candle_core::Result<Tensor> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean + epsilon)?.sqrt()?)?.broadcast_mul(gain)
}

/// `x [n, in]` times the transpose of `weight [out, in]`.
fn linear(x: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
    x.matmul(&weight.t()?)
}
