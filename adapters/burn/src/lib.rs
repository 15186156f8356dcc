#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![deny(missing_docs, missing_debug_implementations)]
#![warn(clippy::pedantic)]
#![allow(
    clippy::module_name_repetitions,
    clippy::many_single_char_names, // formulas
    clippy::similar_names,
    clippy::needless_pass_by_value, // tensors are handles
    clippy::doc_markdown // names such as DiJiang
)]

mod attention;
mod backend;
mod call;
mod input;
mod kernel;
mod kernel_parameters;
mod layer;
mod linear;
mod parameters;
mod real;
mod state;

pub use attention::{AttentionOptions, attention, attention_with};
pub use input::AttentionInput;
pub use kernel::Kernel;
pub use kernel_parameters::KernelParameters;
pub use layer::{AttentionOutput, DijiangAttention, DijiangAttentionConfig};
pub use linear::{LinearOptions, linear_attention};
pub use parameters::TensorParameters;
pub use real::Real;
pub use state::{AttentionState, StateError};

/// The crate of the kernels, in the version that this one uses.
#[doc(no_inline)]
pub use dijiang;
