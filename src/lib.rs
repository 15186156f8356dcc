//! Attention kernels whose memory does not grow with the context.
#![forbid(unsafe_code)]
#![deny(missing_docs, missing_debug_implementations)]
#![warn(clippy::pedantic)]
#![allow(clippy::module_name_repetitions, clippy::many_single_char_names, clippy::similar_names)]

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
