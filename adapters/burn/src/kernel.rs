//! Which kernels a module attends with.

use burn::config::Config;
use core::fmt;
use dijiang::{
    Attention, DctFeatures, Error, Far, HybridAttention, LearnedFeatures, LinearAttention,
    MultiHead, Performer, SoftmaxAttention,
};
use std::sync::Arc;

/// The kernel of the heads of a [`DijiangAttention`](crate::DijiangAttention). Those with random
/// directions have other ones in every kv head.
#[derive(Config, Debug, PartialEq)]
#[non_exhaustive]
pub enum Kernel {
    /// Exact softmax attention, whose state grows with the context.
    Softmax,
    /// Linear attention with the frequency-domain map of DiJiang; trains `radii` and `weights`.
    Dct {
        /// Features of each head.
        features: usize,
    },
    /// Linear attention with positive random features; trains `projection` and `weights`.
    Performer {
        /// Features of each head.
        features: usize,
    },
    /// Linear attention with the learned map of Hedgehog, of `2·d_k` features; trains
    /// `query_projection`, `query_bias`, `key_projection` and `key_bias`.
    Hedgehog,
    /// Softmax over the last `window` keys and `merged` entries that stand for all before; causal.
    Hybrid {
        /// Keys that are kept as they are.
        window: usize,
        /// Entries for those before.
        merged: usize,
    },
}

impl Kernel {
    /// The layer of these kernels. With `quiet`, a softmax has one more weight of `exp(0)` that no
    /// value belongs to.
    pub(crate) fn layer(
        &self,
        [heads, kv_heads, d]: [usize; 3],
        seed: u64,
        is_quiet: bool,
    ) -> Result<MultiHead<f32>, Error> {
        let unsupported = Error::Unsupported {
            what: "a quiet softmax in linear attention",
            why: "it has no softmax; take `Kernel::Softmax` or `Kernel::Hybrid`",
        };
        let per_kv_head = |kernel: &dyn Fn(u64) -> Result<Arc<dyn Attention<f32>>, Error>| {
            if is_quiet {
                return Err(unsupported);
            }
            let kernels = (0..kv_heads as u64).map(|head| kernel(seed.wrapping_add(head)));
            MultiHead::per_kv_head(kernels.collect::<Result<_, _>>()?, heads)
        };
        match *self {
            Self::Softmax => {
                let kernel = SoftmaxAttention::new(d)?;
                let kernel = if is_quiet { kernel.with_sink_logit(0.0)? } else { kernel };
                MultiHead::new(kernel, heads, kv_heads)
            }
            Self::Dct { features } => per_kv_head(&|seed| {
                Ok(Arc::new(LinearAttention::new(DctFeatures::<f32>::new(d, features, seed)?)))
            }),
            Self::Performer { features } => per_kv_head(&|seed| {
                Ok(Arc::new(LinearAttention::new(Performer::<f32>::new(d, features, seed)?)))
            }),
            Self::Hedgehog => per_kv_head(&|_| {
                Ok(Arc::new(LinearAttention::new(LearnedFeatures::<f32>::hedgehog(d)?)))
            }),
            Self::Hybrid { window, merged } => {
                let builder = HybridAttention::<f32>::builder(d).window(window);
                let builder = builder.far(Far::merged(merged));
                let builder = if is_quiet { builder.sink_logit(0.0) } else { builder };
                MultiHead::new(builder.build()?, heads, kv_heads)
            }
        }
    }
}

/// A layer in a module, whose numbers are not shown one by one.
#[derive(Clone)]
pub(crate) struct Layer(pub(crate) MultiHead<f32>);

impl fmt::Debug for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (heads, kv_heads) = (self.0.query_heads(), self.0.kv_heads());
        write!(f, "Layer {{ query_heads: {heads}, kv_heads: {kv_heads} }}")
    }
}
