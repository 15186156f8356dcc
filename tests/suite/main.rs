//! The tests of the promises, in one program: they share their helpers, and are compiled and linked
//! once. `cargo test --test suite decay` runs those of one file.

mod common;

mod approximation;
mod approximation_error_cli;
mod bad_input;
mod block;
#[cfg(feature = "safetensors")]
mod block_checkpoint;
mod block_states;
mod calibration;
mod content;
mod dct_ways;
mod decay;
mod distill;
mod formats;
mod fuzzed;
mod golden;
mod golden_hybrid;
mod golden_naive;
mod gradients;
mod gradients_hybrid;
mod gradients_inside;
mod gradients_kept;
mod gradients_softmax;
mod hybrid;
mod layer_batches;
mod layer_errors;
mod layer_gradients;
mod layer_masks;
mod layer_padding;
mod layer_streams;
mod masks;
mod masks_softmax;
mod multi_head;
mod needle_cli;
mod options;
mod peers_bugs;
mod plan;
mod positions;
mod promises;
mod range;
mod raw_tensors;
mod real_heads;
mod rotary;
#[cfg(feature = "serde")]
mod save_restore;
mod saved_states;
mod selection;
mod threads;
mod value_stability;
mod windows;
