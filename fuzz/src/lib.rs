//! The functions that are fuzzed, and the formulas that they are held to: those of the tests.
#![allow(dead_code)]

#[path = "../../tests/suite/common/mod.rs"]
pub mod common;
#[path = "../../tests/suite/fuzzed/mod.rs"]
pub mod fuzzed;
