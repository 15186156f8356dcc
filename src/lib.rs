//! Attention kernels whose memory does not grow with the context.
//!
//! The softmax attention of a transformer costs O(N²) and keeps a cache that grows for ever. This
//! crate has kernels with a state of fixed size: linear attention over feature maps, among them the
//! frequency-domain maps of DiJiang (arXiv 2403.19928) and the positive random features of the
//! Performer (arXiv 2009.14794), and hybrids of an exact window and a merging memory. Exact softmax
//! attention is here as the honest reference, and [`fidelity`] *measures* how close each comes to
//! it, on your own queries, keys and values.
//!
//! # Quick start
//!
//! Every kernel is an [`Attention`]:
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
//! let report = fidelity::compare(&kernel, q.view(), k.view(), v.view(), Mask::Causal)?;
//! println!("output error {:.3}, uniform {:.3}", report.output_error, report.uniform_error);
//! # Ok::<(), dijiang::Error>(())
//! ```
//!
//! and gives a [`Stream`], the state that a decoder keeps:
//!
//! ```
//! use dijiang::{Attention, LinearAttention, Performer};
//! use ndarray::Array2;
//!
//! let kernel = LinearAttention::new(Performer::<f32>::new(64, 64, 7)?);
//! let mut stream = kernel.stream(64)?;
//! let token = Array2::from_elem((1, 64), 0.1);
//! let mut out = Array2::zeros((1, 64));
//! let size = stream.state_floats();
//! for _ in 0..100 {
//!     stream.extend(token.view(), token.view(), token.view(), out.view_mut())?;
//! }
//! assert_eq!((stream.len(), stream.state_floats()), (100, size)); // it does not grow
//!
//! # Ok::<(), dijiang::Error>(())
//! ```
//!
//! # Which kernel?
//!
//! The error is `‖ÂV − AV‖/‖AV‖` against exact softmax, on Gaussian queries and keys of norm
//! `|x̂|² = 1` (d = 64, m = 256) and as the median over five heads of trained models, where `|x̂|²`
//! is 9 to 43. Uniform attention, which looks at nothing, has .130 and .955. Measured by
//! `cargo run --release --example approximation_error` on 2026-11-24 (m = 256 on the left, the best
//! m up to 1024 on the right).
//!
//! | kernel | for | error at norm 1 | error on trained heads |
//! |---|---|---|---|
//! | [`SoftmaxAttention`] | a trained softmax model, as it is; the reference | 0 | 0 |
//! | [`HybridAttention`] with [`Far::merged`] | the same with a state of fixed size, in most heads | – | .029, four causal heads |
//! | [`DctFeatures`] with [`Radii::Antithetic`] | small norms, no training; use m = 2d or more | .069 | 1.02 |
//! | [`DctFeatures`] | as FAVOR+, with no matrix to store | .125 | 1.04 |
//! | [`Performer`] | models trained with FAVOR+ | .123 | 1.04 |
//! | [`Wpff`] with fitted weights | sampled data to fit to | .101 | 1.06 |
//! | [`TaylorFeatures`] | scores below 1; (d + 1)(d + 2)/2 features | .001 | .970 |
//! | [`OfficialDijiang`] | models trained with the released DiJiang code | .124 | .924 |
//! | [`EluFeatures`], [`ReluFeatures`] | models trained with them | .129, .249 | .949, .916 |
//! | [`Retention`], [`CosFormer`], [`LinearAttention`] with decay or gates | models trained with them: they do not aim at softmax | – | – |
//! | [`DijiangBlock`] | the attention block of the released DiJiang models | – | – |
//! | [`Linformer`] | bidirectional models trained with it | – | – |
//!
//! Read the last column again: **no feature map imitates the softmax attention of a trained
//! model.** More features do not help there, since the variance of the estimate is of order
//! `e^{|q̂ + k̂|²}/m`. The maps make sense at small norms and in models that were trained with
//! them. What does stand in for softmax is an exact window, the first tokens, and a memory that
//! merges what leaves the window by the attention it receives ([`HybridAttention`]): 17 153 numbers
//! where the cache of 768 tokens has 98 304; a window of equal size has an error of .21. It loses
//! facts that nothing asks for (the example `needle`), so keep exact the heads where its own error
//! is largest ([`HeadErrors`]).
//!
//! Other kernels do not aim at softmax and are for models trained with them: [`Retention`]
//! (RetNet), [`CosFormer`], [`Linformer`] (no causal form), and with [`IdentityFeatures`] and
//! decays of the tokens ([`LinearAttention::gated`]) gated linear attention and Mamba-2.
//! [`RotaryAttention`] puts rotary position embedding into any of them. Soft caps (Gemma 2),
//! learned sinks (GPT-OSS) and linear biases (ALiBi) are options of [`SoftmaxAttention`], the first
//! two of hybrids as well.
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
//!
//! # Performance
//!
//! Inner loops are compiled for AVX-512, AVX2 with FMA, NEON and the build's own target, and chosen
//! at run time: a plain `cargo build --release` is the fast one. Feed long sequences in one call:
//! [`Attention::forward`] and a [`Stream::extend`] of many tokens work in chunks, by matrix
//! products. Keep the last axis of arrays contiguous, and a [`Scratch`] for
//! [`Attention::forward_heads`]. Feature `rayon` shares heads and sequences, or one long sequence,
//! over threads. `cargo bench --bench targets` measures the machine; `docs/performance.md` has what
//! was measured.
//!
//! # Features
//!
//! - `rayon`: threads over heads, sequences and within one long sequence; the same result bit for
//!   bit.
//! - `serde`: maps, calibrations, kernels (of hybrids the stream states only), [`StreamState`] and
//!   reports serialise; a restored stream goes on bit for bit.
//! - `safetensors`: [`DijiangBlock`] from the checkpoint of a released model, with
//!   `DijiangBlock::from_safetensors`.
//!
//! # A kernel of your own
//!
//! [`MemoryAttention`] makes a kernel of any [`Memory`]: three methods, and it has a forward pass,
//! a stream, groups of query heads, and a place in a [`MultiHead`]. A [`FeatureMap`] of your own
//! goes into [`LinearAttention`]. Where neither fits, [`Attention`] has two required methods.
//!
//! Every formula stands in [`attention::naive`] as plain loops in `f64`: to be read, and to test
//! against. The guide (`docs/guide.md`) shows the use in a model, the theory (`docs/theory.md`)
//! derives every formula, and `docs/architecture.md` shows the plan of the code.
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
mod error;
mod features;
pub mod fidelity;
mod kernel;
mod mask;
mod memory;
mod multi_head;
pub mod projection;
mod rotary;
mod scalar;
mod selection;
mod views;

pub use attention::alibi::alibi_slopes;
pub use attention::call::Head;
pub use attention::cosformer::CosFormer;
pub use attention::fingerprint::Fingerprint;
pub use attention::fixed_gates::FixedGates;
pub use attention::gradient::HeadGradient;
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
pub use block::stream::{DijiangBlockState, DijiangBlockStream};
pub use block::weights::DijiangWeights;
pub use calibration::Calibration;
pub use calibration::options::CalibrationOptions;
pub use calibration::taylor::TaylorFit;
pub use error::{Error, LayerHead};
pub use features::FeatureMap;
pub use features::calibrated_taylor::CalibratedTaylor;
pub use features::dct::DctFeatures;
pub use features::elementwise::{EluFeatures, IdentityFeatures};
pub use features::fit::{WeightFit, fit_weights};
pub use features::official_dijiang::OfficialDijiang;
pub use features::performer::Performer;
pub use features::radii::Radii;
pub use features::relu::ReluFeatures;
pub use features::taylor::TaylorFeatures;
pub use features::wpff::{Points, Wpff};
pub use mask::Mask;
pub use memory::exact::ExactMemory;
pub use memory::linear::LinearMemory;
pub use memory::merged::entries::MergedMemory;
pub use memory::merged::rule::Metric;
pub use memory::partial::Partial;
pub use memory::{CloneMemory, Memory};
pub use multi_head::MultiHead;
pub use multi_head::layout::Padding;
pub use multi_head::stream::MultiHeadStream;
pub use multi_head::stream::state::MultiHeadState;
pub use rotary::Rotary;
pub use rotary::angles::{RotaryAngles, RotaryPairs};
pub use scalar::Scalar;
pub use selection::exact_heads::ExactHeads;
pub use selection::{HeadError, HeadErrors, HeadSample};

/// The snippets of the README and the guide, as tests.
#[cfg(doctest)]
mod documents {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../docs/models.md")]
    struct Models;
    #[doc = include_str!("../docs/guide.md")]
    struct Guide;
}
