//! What is fuzzed: a function of the tests of the language model.
#![allow(dead_code)]

#[path = "../../../examples/language_model/tests/suite/common/mod.rs"]
pub mod common;
#[path = "../../../examples/language_model/tests/suite/fuzzed.rs"]
pub mod fuzzed;
