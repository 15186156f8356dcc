//! A pretrained language model with any attention kernel of `dijiang` in any of its heads: what is lost, what is gained.

pub mod capture;
pub mod gguf;
pub mod linear;
pub mod model;
pub mod rotary;
pub mod texts;
pub mod tokenizer;
