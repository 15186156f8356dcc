#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![deny(missing_docs, missing_debug_implementations)]

mod attention;
mod element;
mod features;
mod linear;
mod module;
mod op;
mod parameters;
mod scaled;
mod state;

/// The library whose kernels these are.
pub use dijiang;

pub use attention::{Extras, attention, attention_with, via_host};
pub use element::Element;
pub use features::features;
pub use linear::{linear_attention, linear_attention_in_operations, linear_attention_scaled};
pub use module::{DijiangAttention, DijiangAttentionConfig};
pub use parameters::parameters;
pub use state::AttentionState;
