//! The bar that says how long it will take.

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

/// A bar of so many steps.
pub fn bar(steps: usize) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{bar:30} {percent:>3} %  {eta:>4} left  {msg}")?;
    Ok(ProgressBar::new(steps as u64).with_style(style))
}
