//! [performance]: crate::guide::performance

#![doc = include_str!("../docs/theory.md")]
