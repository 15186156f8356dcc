//! A pretrained language model with any attention kernel of `dijiang` in any of its heads: what is
//! lost, what is gained.

pub mod args;
pub mod capture;
pub mod compare;
pub mod conversion;
pub mod convert;
pub mod decode;
pub mod elementwise;
pub mod generate;
pub mod gguf;
pub mod kernels;
pub mod linear;
pub mod model;
pub mod perplexity;
pub mod plan;
pub mod progress;
pub mod quantised;
pub mod recall;
pub mod report;
pub mod sensitivity;
pub mod session;
pub mod state_plan;
pub mod texts;
pub mod tokenizer;
