//! Attention kernels whose memory does not grow with the context.
//!
//! The softmax attention of a transformer costs O(N²) and keeps a cache that grows for ever. This
//! crate has kernels with a state of fixed size: linear attention over feature maps, among them the
//! frequency-domain maps of DiJiang (arXiv 2403.19928) and the positive random features of the
//! Performer (arXiv 2009.14794), and hybrids of an exact window and a merging memory. Exact softmax
//! attention is here as the honest reference, and [`fidelity`] *measures* how close each comes to
//! it, on your own queries, keys and values.
//!
//! - **[The guide](guide)**: from [a new crate](guide::start) to kernels [in a
//!   model](guide::decoding) and [of your own](guide::own_kernel).
//! - **[The theory](theory)**: every formula, derived, and what was measured of what is claimed.
//!   [`attention::naive`] has them as plain loops, to read and to test against.
//!
//! # Quick start
//!
//! Every kernel is an [`Attention`], and gives a [`Stream`], the state that a decoder keeps:
//!
//! ```
//! use dijiang::{Attention, DctFeatures, LinearAttention, Mask, fidelity};
//! use ndarray::Array2;
//!
//! let (n, d) = (100, 64);
//! let wave = |phase: f32, at: usize| 0.5 * (phase + at as f32).sin();
//! let make = |phase: f32| Array2::from_shape_fn((n, d), |(t, i)| wave(phase, t * d + i));
//! let (q, k, v) = (make(0.0), make(1.0), make(2.0));
//!
//! let kernel = LinearAttention::new(DctFeatures::<f32>::new(d, 128, 7)?); // 128 features, seed 7
//! let out = kernel.forward(q.view(), k.view(), v.view(), Mask::Causal)?;
//! assert_eq!(out.dim(), (n, d));
//!
//! let mut stream = kernel.stream(d)?;
//! let size = stream.state_floats();
//! let mut again = Array2::zeros((n, d));
//! stream.extend(q.view(), k.view(), v.view(), again.view_mut())?;
//! assert_eq!((stream.len(), stream.state_floats()), (n, size)); // it does not grow
//!
//! let report = fidelity::compare(&kernel, q.view(), k.view(), v.view(), Mask::Causal)?;
//! println!("output error {:.3}, uniform {:.3}", report.output_error, report.uniform_error);
//! # Ok::<(), dijiang::Error>(())
//! ```
//!
//! # Which kernel?
//!
//! | what you have | kernel |
//! |---|---|
//! | a trained softmax model | [`SoftmaxAttention`], exact |
//! | the same, and its cache is too large | [`HybridAttention`] with [`Far::merged`] in most heads, the worst exact ([`HeadErrors`]), or a budget for every head ([`StatePlan`]) |
//! | a model trained with another kernel | its own: [`Performer`], [`EluFeatures`], [`ReluFeatures`], [`TaylorFeatures`] or [`OfficialDijiang`] in [`LinearAttention`], [`DijiangBlock`], [`Retention`], [`CosFormer`], [`Linformer`], [gated sums](LinearAttention::gated); [the table](guide::families) |
//! | a model that will be trained | any map; [`Performer`] is the plainest, [`DctFeatures`] has no matrix to store |
//! | small norms, no training | [`DctFeatures`] with [`Radii::Antithetic`] |
//! | an idea | three methods of a [`Memory`] for a [`MemoryAttention`], or a [`FeatureMap`] |
//!
//! **No feature map imitates the softmax attention of a trained model.** Its norms are large, the
//! variance of an estimate is of order `e^{|q̂ + k̂|²}/m`, and more features do not help. What does
//! stand in for softmax is an exact window with a merging memory behind it ([`HybridAttention`]).
//! It loses facts that nothing asks for, so keep the heads exact where its own error is largest.
//! [The figures](guide::choosing). Soft caps (Gemma 2), learned sinks (GPT-OSS) and linear biases
//! (ALiBi) are options of [`SoftmaxAttention`], the first two of hybrids as well.
//!
//! # Conventions
//!
//! - Tokens are rows: `q [n_q, d]`, `k [n_k, d]`, `v [n_k, d_v]`, output `[n_q, d_v]`;
//!   [`MultiHead`] takes `[batch, heads, n, d]`. Views may have any strides.
//! - Queries and keys are *raw*: kernels apply the scale, `1/√d` unless `with_scale` says
//!   otherwise. A [`FeatureMap`] alone gets scaled vectors `x̂ = √scale·x`, and its products
//!   estimate `exp(q̂·k̂)` in absolute terms. [`OfficialDijiang`] wants scale 1.
//! - Outputs are weighted means: divided by the sum of the weights, to which nothing is added but
//!   the learned sink of a model that has one ([`SoftmaxAttention::with_sink_logit`]).
//!   [`LinearAttention::unnormalized`] leaves the division out.
//! - Bad input gives an [`Error`] that says which argument and what to do; no function panics, and
//!   a stream that failed is as it was.
//! - Seeds are explicit and give the same map on every machine; see [`projection`].
//! - SIMD is chosen at run time: a plain `cargo build --release` is the [fast one](guide::speed).
//!
//! # Features
//!
//! - `rayon`: threads over heads, sequences and within one long sequence; the same result bit for
//!   bit.
//! - `serde`: maps, calibrations, kernels (of hybrids the stream states only), [`StreamState`],
//!   plans and reports serialise; a restored stream goes on bit for bit.
//! - `safetensors`: [`DijiangBlock`] from the checkpoint of a released model.
#![cfg_attr(docsrs, feature(doc_cfg))]
#![forbid(unsafe_code)]
#![deny(missing_docs, missing_debug_implementations)]
#![warn(clippy::pedantic)]
#![allow(
    clippy::module_name_repetitions,
    clippy::many_single_char_names, // formulas
    clippy::similar_names,
    clippy::needless_pass_by_value, // views are small and passed by value
    clippy::float_cmp, // exact comparisons are meant
    clippy::doc_markdown, // names such as DiJiang
    clippy::inline_always // reductions must be inlined to be vectorised
)]

pub mod attention;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod bench;
mod block;
mod calibration;
mod check;
pub mod decay;
mod distill;
mod error;
mod features;
pub mod fidelity;
pub mod guide;
mod kernel;
mod mask;
mod memory;
mod multi_head;
mod parameters;
mod plan;
pub mod projection;
mod rotary;
mod scalar;
mod selection;
mod state_format;
pub mod theory;
mod views;

pub use attention::alibi::alibi_slopes;
pub use attention::call::Head;
pub use attention::cosformer::CosFormer;
pub use attention::fingerprint::Fingerprint;
pub use attention::fixed_gates::FixedGates;
pub use attention::gradient::{ForwardRecord, Gradients, HeadGradient};
pub use attention::hybrid::HybridAttention;
pub use attention::hybrid::builder::HybridBuilder;
pub use attention::hybrid::far::Far;
pub use attention::hybrid::far::merged::Merged;
pub use attention::hybrid::far::taylor::Taylor;
pub use attention::hybrid::far::ward::Ward;
pub use attention::linear::LinearAttention;
pub use attention::linformer::Linformer;
pub use attention::memory_attention::MemoryAttention;
pub use attention::retention::Retention;
pub use attention::rotary::RotaryAttention;
pub use attention::scratch::Scratch;
pub use attention::sharing::Sharing;
pub use attention::softmax::options::SoftmaxAttention;
pub use attention::stream::{CloneStream, Stream, StreamOptions, StreamState};
pub use attention::threads::Threads;
#[doc(inline)]
pub use attention::{Attention, PairWeights};
pub use block::DijiangBlock;
pub use block::gradient::DijiangBlockGradients;
pub use block::stream::{DijiangBlockState, DijiangBlockStream};
pub use block::weights::DijiangWeights;
pub use calibration::Calibration;
pub use calibration::options::CalibrationOptions;
pub use calibration::taylor::TaylorFit;
pub use distill::options::{DistillLoss, DistillOptions, DistillStep};
pub use distill::{DistillSample, Distilled, distill, distill_with};
pub use error::{Error, LayerHead};
pub use features::FeatureMap;
pub use features::calibrated_taylor::CalibratedTaylor;
pub use features::dct::DctFeatures;
pub use features::elementwise::{EluFeatures, IdentityFeatures};
pub use features::fit::{WeightFit, fit_weights};
pub use features::gradient::MapGradient;
pub use features::learned::LearnedFeatures;
pub use features::logits::LearnedForm;
pub use features::official_dijiang::OfficialDijiang;
pub use features::performer::Performer;
pub use features::radii::Radii;
pub use features::relu::ReluFeatures;
pub use features::side::Side;
pub use features::taylor::TaylorFeatures;
pub use features::wpff::{Points, Wpff};
pub use mask::Mask;
pub use memory::exact::ExactMemory;
pub use memory::linear::LinearMemory;
pub use memory::linear::checkpoints::SumCheckpoints;
pub use memory::merged::entries::MergedMemory;
pub use memory::merged::rule::{MergeCost, MergeUnits, Metric};
pub use memory::partial::Partial;
pub use memory::{CloneMemory, Memory};
pub use multi_head::MultiHead;
pub use multi_head::arguments::LayerForward;
pub use multi_head::gradient::{LayerGradient, LayerGradients};
pub use multi_head::layout::Padding;
pub use multi_head::raw::{RawGradients, RawTensor};
pub use multi_head::record::LayerRecord;
pub use multi_head::stream::MultiHeadStream;
pub use multi_head::stream::state::MultiHeadState;
pub use parameters::Parameters;
pub use plan::options::{Budget, PlanOptions};
pub use plan::planner::StatePlanner;
pub use plan::sample::PlanSample;
pub use plan::setting::{HeadPlan, HeadSetting, ModelSizes};
pub use plan::state_plan::StatePlan;
pub use rotary::Rotary;
pub use rotary::angles::{RotaryAngles, RotaryPairs};
pub use scalar::Scalar;
pub use selection::exact_heads::ExactHeads;
pub use selection::{HeadError, HeadErrors, HeadSample};
pub use state_format::{StateFormat, UnknownFormat};

/// The crate of the arrays that arguments and results are, in the version that this one uses.
#[doc(no_inline)]
pub use ndarray;

/// The snippets of what is not a page of the guide, as tests.
#[cfg(doctest)]
mod documents {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../docs/models.md")]
    struct Models;
}
