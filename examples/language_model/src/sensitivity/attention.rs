//! Causal attention and its gradient, by blocks of queries: no matrix of all pairs is kept.

use super::{pull, softmax};
use crate::model::Config;
use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use rayon::prelude::*;
use std::ops::Range;

/// Queries of a block.
const BLOCK: usize = 256;

/// Exact attention of the heads of a layer.
pub(super) struct Attention {
    group: usize,
    kv_heads: usize,
    scale: f64,
}

/// The part of one kv head that a block of queries reads.
struct Block {
    kv_head: usize,
    rows: Range<usize>,
}

impl Attention {
    pub(super) fn new(config: &Config) -> Self {
        let scale = config.scales.attention.unwrap_or(1.0 / (config.head_dim as f64).sqrt());
        Self { group: config.group(), kv_heads: config.kv_heads, scale }
    }

    /// `q [heads, n, d]`, `k [kv_heads, n, d]`, `v [kv_heads, n, d_v]` give `[n, heads · d_v]`.
    pub(super) fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let parts: Vec<Tensor> = self
            .blocks(q.dim(1)?)
            .par_iter()
            .map(|block| {
                let [q, k, v] = self.parts(block, q, k, v)?;
                self.block(&q, &k, &v)
            })
            .collect::<Result<_>>()?;
        let out = self.join(&parts, q.dim(1)?)?;
        let (heads, n, columns) = out.dims3()?;
        Ok(out.transpose(0, 1)?.contiguous()?.reshape((n, heads * columns))?)
    }

    /// The gradients of queries, keys and values, given that of the outputs, `[n, heads · d_v]`.
    pub(super) fn backward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        gradient: &Tensor,
    ) -> Result<[Tensor; 3]> {
        let (heads, n, _) = q.dims3()?;
        let gradient = gradient.reshape((n, heads, v.dim(2)?))?.transpose(0, 1)?.contiguous()?;
        let of_block = |block: &Block| -> Result<[Tensor; 3]> {
            let [q, k, v] = self.parts(block, q, k, v)?;
            let (q, k, v) = (Var::from_tensor(&q)?, Var::from_tensor(&k)?, Var::from_tensor(&v)?);
            let out = self.block(q.as_tensor(), k.as_tensor(), v.as_tensor())?;
            let gradient = self.queries(block, &gradient)?;
            let [q, k, v]: [Tensor; 3] = pull(&[(&out, &gradient)], &[&q, &k, &v])?
                .try_into()
                .map_err(|_| anyhow::anyhow!("three gradients"))?;
            let rest = n - block.rows.end;
            Ok([q, k.pad_with_zeros(0, 0, rest)?, v.pad_with_zeros(0, 0, rest)?])
        };
        let blocks = self.blocks(n);
        let parts: Vec<[Tensor; 3]> = blocks.par_iter().map(of_block).collect::<Result<_>>()?;
        let queries: Vec<Tensor> = parts.iter().map(|[q, _, _]| q.clone()).collect();
        // keys and values serve every block behind them
        let summed = |which: usize| -> Result<Tensor> {
            let of_head = |kv_head: usize| -> Result<Tensor> {
                let mine = blocks.iter().zip(&parts).filter(|(block, _)| block.kv_head == kv_head);
                let mut sum = Tensor::zeros_like(&parts[0][which])?;
                for (_, part) in mine {
                    sum = (sum + &part[which])?;
                }
                Ok(sum)
            };
            let heads: Vec<Tensor> = (0..self.kv_heads).map(of_head).collect::<Result<_>>()?;
            Ok(Tensor::stack(&heads, 0)?)
        };
        Ok([self.join(&queries, n)?, summed(1)?, summed(2)?])
    }

    /// `q [group, m, d]`, `k [b, d]`, `v [b, d_v]`: the queries are the last `m` of `b` tokens.
    fn block(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let ((group, m, d), b) = (q.dims3()?, k.dim(0)?);
        let scores = (q.reshape((group * m, d))?.matmul(&k.t()?)? * self.scale)?;
        let late = |row: usize| (0..b).map(move |key| key > b - m + row);
        let mask: Vec<f64> =
            (0..m).flat_map(late).map(|late| if late { f64::NEG_INFINITY } else { 0.0 }).collect();
        let mask = Tensor::from_vec(mask, (1, m, b), &Device::Cpu)?.to_dtype(q.dtype())?;
        let scores = scores.reshape((group, m, b))?.broadcast_add(&mask)?;
        let mixed = softmax(&scores)?.reshape((group * m, b))?.matmul(v)?;
        Ok(mixed.reshape((group, m, v.dim(1)?))?)
    }

    /// Blocks of every kv head, in order.
    fn blocks(&self, n: usize) -> Vec<Block> {
        let of_head = |kv_head| {
            (0..n.div_ceil(BLOCK))
                .map(move |i| Block { kv_head, rows: i * BLOCK..n.min((i + 1) * BLOCK) })
        };
        (0..self.kv_heads).flat_map(of_head).collect()
    }

    /// What a block reads of queries, keys and values.
    fn parts(&self, block: &Block, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<[Tensor; 3]> {
        let until = |x: &Tensor| x.get(block.kv_head)?.narrow(0, 0, block.rows.end)?.contiguous();
        Ok([self.queries(block, q)?, until(k)?, until(v)?])
    }

    /// The rows of a block, of its query heads.
    fn queries(&self, block: &Block, x: &Tensor) -> Result<Tensor> {
        let heads = x.narrow(0, block.kv_head * self.group, self.group)?;
        Ok(heads.narrow(1, block.rows.start, block.rows.len())?.contiguous()?)
    }

    /// Blocks `[group, m, c]` of all kv heads as `[heads, n, c]`.
    fn join(&self, parts: &[Tensor], n: usize) -> Result<Tensor> {
        let heads: Vec<Tensor> = parts
            .chunks(n.div_ceil(BLOCK))
            .map(|blocks| Tensor::cat(blocks, 1))
            .collect::<candle_core::Result<_>>()?;
        Ok(Tensor::cat(&heads, 0)?)
    }
}
