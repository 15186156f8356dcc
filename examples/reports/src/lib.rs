//! What the reports share: axes of plots, charts and marks, lines of text, pages.

pub mod axes;
pub mod page;
pub mod plots;
pub mod text;
