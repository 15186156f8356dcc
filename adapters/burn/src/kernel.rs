//! Which kernels a module attends with.

use burn::config::Config;
use core::fmt;
use dijiang::{
    Attention, DctFeatures, Error, Far, FeatureMap, HybridAttention, LearnedFeatures,
    LinearAttention, MultiHead, Performer, SoftmaxAttention,
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

/// What all kernels of a module have in common.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct KernelOptions {
    /// Of random directions.
    pub(crate) seed: u64,
    /// Whether a softmax has one more weight of `exp(0)` that no value belongs to.
    pub(crate) is_quiet: bool,
    /// What scores are multiplied with.
    pub(crate) scale: Option<f64>,
    /// Scores are capped softly.
    pub(crate) softcap: Option<f64>,
}

impl Kernel {
    /// The layer of these kernels.
    pub(crate) fn layer(
        &self,
        [heads, kv_heads, d]: [usize; 3],
        KernelOptions { seed, is_quiet, scale, softcap }: KernelOptions,
    ) -> Result<MultiHead<f32>, Error> {
        match *self {
            Self::Softmax => {
                let mut kernel = SoftmaxAttention::new(d)?;
                if is_quiet {
                    kernel = kernel.with_sink_logit(0.0)?;
                }
                if let Some(scale) = scale {
                    kernel = kernel.with_scale(scale);
                }
                if let Some(cap) = softcap {
                    kernel = kernel.with_soft_cap(cap)?;
                }
                return MultiHead::new(kernel, heads, kv_heads);
            }
            Self::Hybrid { window, merged } => {
                let mut builder = HybridAttention::<f32>::builder(d).window(window);
                builder = builder.far(Far::merged(merged));
                if is_quiet {
                    builder = builder.sink_logit(0.0);
                }
                if let Some(scale) = scale {
                    builder = builder.scale(scale);
                }
                if let Some(cap) = softcap {
                    builder = builder.soft_cap(cap);
                }
                return MultiHead::new(builder.build()?, heads, kv_heads);
            }
            _ if is_quiet => return Err(no_softmax("a quiet softmax in linear attention")),
            _ if softcap.is_some() => return Err(no_softmax("a soft cap in linear attention")),
            _ => {}
        }
        let kernel = |seed: u64| -> Result<Arc<dyn Attention<f32>>, Error> {
            Ok(match *self {
                Self::Dct { features } => linear(DctFeatures::new(d, features, seed)?, scale),
                Self::Performer { features } => linear(Performer::new(d, features, seed)?, scale),
                _ => linear(LearnedFeatures::hedgehog(d)?, scale),
            })
        };
        let kernels = (0..kv_heads as u64).map(|head| kernel(seed.wrapping_add(head)));
        MultiHead::per_kv_head(kernels.collect::<Result<_, _>>()?, heads)
    }
}

fn linear<F: FeatureMap<f32> + 'static>(map: F, scale: Option<f64>) -> Arc<dyn Attention<f32>> {
    let kernel = LinearAttention::new(map);
    Arc::new(if let Some(scale) = scale { kernel.with_scale(scale) } else { kernel })
}

fn no_softmax(what: &'static str) -> Error {
    let why = "it has no softmax; take `Kernel::Softmax` or `Kernel::Hybrid`";
    Error::Unsupported { what, why }
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
