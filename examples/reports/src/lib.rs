//! What the reports share: axes of plots, charts and marks, lines of text.

pub mod axes;
pub mod plots;
pub mod text;
