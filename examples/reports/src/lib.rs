//! What the reports share: axes of plots, charts and marks, lines of text, pages, and what is
//! measured over long texts.

pub mod axes;
pub mod lengths;
pub mod page;
pub mod plots;
pub mod text;
