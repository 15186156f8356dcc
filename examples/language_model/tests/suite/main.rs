//! The tests of the language model, in one program: they share a small model, and are compiled and
//! linked once.

mod common;

mod bad_files;
mod check_values;
mod cli;
mod convert;
mod forward;
mod fuzzed;
mod kernels;
mod perplexity;
mod quantised;
mod sensitivity;
mod splits;
