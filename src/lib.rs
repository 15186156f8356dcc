//! Attention kernels whose memory does not grow with the context.
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

mod attention;
mod calibration;
mod check;
mod error;
mod features;
pub mod fidelity;
mod kernel;
mod memory;
pub mod projection;
mod scalar;
mod views;

pub use attention::heads::{MultiHead, MultiHeadStream};
pub use attention::linear::LinearAttention;
pub use attention::softmax::SoftmaxAttention;
pub use attention::{Attention, Mask, Stream, StreamState};
pub use calibration::{WeightFit, fit_weights};
pub use error::Error;
pub use features::FeatureMap;
pub use features::dct::{DctFeatures, Radii};
pub use features::elementwise::{EluFeatures, ReluFeatures};
pub use features::performer::Performer;
pub use features::taylor::TaylorFeatures;
pub use features::wpff::{Points, RadiusPoints, Wpff};
pub use memory::{ExactMemory, LinearMemory, Memory, Partial};
pub use scalar::Scalar;
