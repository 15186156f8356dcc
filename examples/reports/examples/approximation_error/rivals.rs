//! The rivals under test, by name: kernels that models are trained with. They are measured and not
//! ranked.

pub mod measure;
pub mod rows;
pub mod table;

use crate::data::Input;
use crate::kernels::{linear, official};
use crate::synthetic::Normal;
use dijiang::{
    Attention, CosFormer, EluFeatures, Error, FixedGates, IdentityFeatures, LinearAttention,
    Linformer, Mask, ReluFeatures, Retention, Rotary, RotaryPairs, decay,
};
use ndarray::{Array1, Array2, Axis};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rival {
    Elu,
    Relu,
    CosFormer,
    DijiangFirst,
    DijiangLast,
    RetentionFirst,
    RetentionLast,
    RetentionXpos,
    Ssd,
    Gla,
    Linformer,
}

/// Heads of a layer, for the decays of the first and the last.
const DIJIANG_HEADS: usize = 16;
const RETENTION_HEADS: usize = 8;
/// Projected keys of Linformer.
const RANK: usize = 64;

impl Rival {
    pub const ALL: [Self; 11] = [
        Self::Elu,
        Self::Relu,
        Self::CosFormer,
        Self::DijiangFirst,
        Self::DijiangLast,
        Self::RetentionFirst,
        Self::RetentionLast,
        Self::RetentionXpos,
        Self::Ssd,
        Self::Gla,
        Self::Linformer,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Elu => "elu",
            Self::Relu => "relu",
            Self::CosFormer => "cosformer",
            Self::DijiangFirst => "dijiang-decay-first",
            Self::DijiangLast => "dijiang-decay-last",
            Self::RetentionFirst => "retention-first",
            Self::RetentionLast => "retention-last",
            Self::RetentionXpos => "retention-xpos",
            Self::Ssd => "ssd",
            Self::Gla => "gla",
            Self::Linformer => "linformer",
        }
    }

    pub fn description(self) -> &'static str {
        match self {
            Self::Elu => {
                "the linear Transformer: elu + 1, m = d, at scale 1/√d (the paper's code has 1)"
            }
            Self::Relu => "the Performer with ReLU: m = d, no projection, at scale 1/√d",
            Self::CosFormer => {
                "ReLU features and a cosine of the distance, which reaches 0 at the number of \
                 tokens"
            }
            Self::DijiangFirst => {
                "the released DiJiang kernel: its map on raw q and k, random radii, γ = 31/32 \
                 (head 1 of 16), no normaliser"
            }
            Self::DijiangLast => "the same with γ = 511/512 (head 16 of 16)",
            Self::RetentionFirst => {
                "q·k/√d, γ = 1 − 2⁻⁵ (head 1 of 8), no normaliser; without RetNet's rotation, \
                 since q and k come turned"
            }
            Self::RetentionLast => "the same with γ = 1 − 2⁻¹² (head 8 of 8)",
            Self::RetentionXpos => {
                "the same as retention-last with the decays of xPos by pair of columns"
            }
            Self::Ssd => {
                "Mamba-2: q·k/√d, a gate for each token, exp(−softplus(b + w·k)) with w random of \
                 variance 1/d and softplus(b) = 0.01"
            }
            Self::Gla => {
                "gated linear attention: q·k/√d, a gate for each column of k, sigmoid(k)^(1/16)"
            }
            Self::Linformer => "softmax over 64 projected keys and values; random projections",
        }
    }

    /// Whether it is meant to imitate softmax attention.
    pub fn aims_at_softmax(self) -> bool {
        self == Self::Linformer
    }

    pub fn is_random(self) -> bool {
        matches!(self, Self::DijiangFirst | Self::DijiangLast | Self::Ssd | Self::Linformer)
    }

    pub fn features(self, head_dim: usize) -> Option<usize> {
        match self {
            Self::CosFormer => Some(2 * head_dim),
            Self::Linformer => None,
            _ => Some(head_dim),
        }
    }

    /// Decay needs an order of tokens. Linformer mixes all positions, and shortens nothing below
    /// its rank.
    pub fn applies_to(self, input: &Input) -> bool {
        match self {
            Self::Elu | Self::Relu | Self::CosFormer => true,
            Self::Linformer => input.mask == Mask::Full && input.k.nrows() > RANK,
            _ => input.mask == Mask::Causal,
        }
    }

    /// The kernel for the heads of `input`; gates are those of its keys.
    fn build(self, input: &Input, seed: u64) -> Result<Box<dyn Attention<f32>>, Error> {
        let (d, tokens) = (input.head_dim(), input.tokens().max(input.k.nrows()));
        let dijiang = |head: usize| -> Result<Box<dyn Attention<f32>>, Error> {
            Ok(Box::new(
                official(d, seed)?.unnormalized().with_decay(decay::dijiang(DIJIANG_HEADS)[head]),
            ))
        };
        let retention = |head: usize| {
            let still = Rotary::partial(d, 0)?.with_frequencies(vec![0.0; d / 2])?;
            Retention::new(d, decay::retention(RETENTION_HEADS)[head])?
                .with_rotary(still.with_pairs(RotaryPairs::Interleaved))
        };
        let gated = |log_decay| -> Result<Box<dyn Attention<f32>>, Error> {
            let kernel = LinearAttention::new(IdentityFeatures::new(d)?).unnormalized().gated();
            Ok(Box::new(FixedGates::new(kernel, log_decay)))
        };
        Ok(match self {
            Self::Elu => linear(EluFeatures::new(d)?),
            Self::Relu => linear(ReluFeatures::new(d)?),
            Self::CosFormer => Box::new(CosFormer::new(d, tokens)?),
            Self::DijiangFirst => dijiang(0)?,
            Self::DijiangLast => dijiang(DIJIANG_HEADS - 1)?,
            Self::RetentionFirst => Box::new(retention(0)?),
            Self::RetentionLast => Box::new(retention(RETENTION_HEADS - 1)?),
            Self::RetentionXpos => Box::new(retention(RETENTION_HEADS - 1)?.with_xpos()),
            Self::Ssd => gated(token_gates(&input.k, seed))?,
            Self::Gla => gated(input.k.mapv(|x| -softplus(-x) / 16.0))?,
            Self::Linformer => Box::new(Linformer::new(d, RANK, tokens, seed)?),
        })
    }

    /// The size of the state; for Linformer, that of the projected keys and values.
    fn state_floats(self, kernel: &dyn Attention<f32>, input: &Input) -> Result<usize, Error> {
        match self {
            Self::Linformer => Ok(RANK * (input.head_dim() + input.value_dim())),
            _ => kernel.state_floats(input.value_dim(), input.tokens()),
        }
    }
}

/// Log decays `[n, 1]` with the weights that Mamba-2 starts from, about: its softplus(b) lie
/// between 0.001 and 0.1.
fn token_gates(k: &Array2<f32>, seed: u64) -> Array2<f32> {
    let mut normal = Normal::new(seed);
    let size = (k.ncols() as f32).sqrt().recip();
    let w = Array1::from_shape_simple_fn(k.ncols(), || size * normal.sample());
    let b = 0.01_f32.exp_m1().ln();
    k.dot(&w).mapv(|x| -softplus(b + x)).insert_axis(Axis(1))
}

fn softplus(x: f32) -> f32 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}
