//! The inner loops: every one is written once, on vectors of any width, and compiled for each SIMD
//! level.
#![allow(
    missing_debug_implementations, // arguments of loops, public in name only
    clippy::needless_range_loop, // only loops over plain indices keep arrays in registers
    clippy::manual_memcpy
)]
#![cfg_attr(test, allow(clippy::cast_precision_loss))]

pub(crate) mod columns;
pub(crate) mod dct;
pub(crate) mod dct_leaf;
pub(crate) mod decay;
pub(crate) mod decode;
pub(crate) mod exp;
pub(crate) mod gradient_columns;
pub(crate) mod gradients;
pub(crate) mod packed;
pub(crate) mod pairs;
pub(crate) mod products;
pub(crate) mod reduce;
#[cfg(test)]
mod samples;
pub(crate) mod scores;
pub(crate) mod vectors;
