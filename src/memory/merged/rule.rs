//! The rule by which entries of a memory are merged.

use crate::error::Error;
use ndarray::Array2;
use std::sync::Arc;

/// How distances between keys are measured where entries are merged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Metric {
    /// `‖Δk̄‖²`.
    Identity,
    /// `Σ_c r_c Δk̄_c²`, with `r_c` the mean of `q̂_c²` over the first 64 tokens behind the sinks
    /// (and the query heads of the group), scaled to mean 1, then fixed: directions in which
    /// queries vary count more.
    #[default]
    QueryDiagonal,
}

/// The rule by which entries are merged, with everything a memory needs to know.
#[derive(Clone, Debug)]
pub(crate) struct Rule {
    /// Entries that stay after merging, and how many more may be there before.
    pub(crate) entries: usize,
    pub(crate) spare: usize,
    /// Tokens that arrive at once: 1 merges pair by pair, more in rounds of mutual nearest pairs.
    pub(crate) block: usize,
    pub(crate) metric: Distance,
    /// The factor of `‖Δv̄‖²/ρ²`.
    pub(crate) value_weight: f64,
    /// Value columns that count there: `None` for all of them.
    pub(crate) value_columns: Option<usize>,
    /// The factor of `q·k`.
    pub(crate) scale: f64,
}

/// See [`Metric`].
#[derive(Clone, Debug)]
pub(crate) enum Distance {
    Identity,
    QueryDiagonal,
    /// `‖R(k̄_i − k̄_j)‖²`.
    Matrix(Arc<Array2<f64>>),
}

/// A memory, or a pool of them, holds the distances of all pairs: at 2^14 entries a gigabyte of
/// `f32`.
pub(crate) const MOST_ENTRIES: usize = 1 << 14;

/// Refuses more entries than a memory can have.
pub(crate) fn check_entries(entries: usize) -> Result<(), Error> {
    if entries <= MOST_ENTRIES {
        return Ok(());
    }
    let needed = "at most 16384, with the tokens of a block and over all heads of a pool";
    Err(Error::InvalidOption { which: "entries", found: entries.to_string(), needed })
}
