//! What lies where in a layer: which heads share a state, and the checks of its arrays.

use crate::check;
use crate::error::Error;
use crate::scalar::Scalar;
use ndarray::{ArrayView3, CowArray, Ix4};
use std::sync::Arc;

/// Heads with one state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum HeadUnit {
    /// A query head.
    Query(usize),
    /// All query heads of a kv head.
    Group(usize),
    /// All query heads of some kv heads, in ascending order, whose entries share one budget.
    Pool(Vec<usize>),
}

impl HeadUnit {
    /// The first query head, where there are `group` for each kv head.
    pub(crate) fn first_query_head(&self, group: usize) -> usize {
        match self {
            Self::Query(h) => *h,
            Self::Group(kv) => kv * group,
            Self::Pool(heads) => heads[0] * group,
        }
    }

    /// Heads of keys and values.
    pub(crate) fn kv_heads(&self) -> usize {
        match self {
            Self::Query(_) | Self::Group(_) => 1,
            Self::Pool(heads) => heads.len(),
        }
    }

    /// Whether it serves a query head.
    pub(crate) fn serves(&self, query_head: usize, group: usize) -> bool {
        match self {
            Self::Query(h) => *h == query_head,
            Self::Group(kv) => *kv == query_head / group,
            Self::Pool(heads) => heads.contains(&(query_head / group)),
        }
    }
}

/// The heads of a layer.
#[derive(Clone, Debug)]
pub(crate) struct LayerShape {
    pub(crate) query_heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) value_dim: usize,
    /// What has a state of its own.
    pub(crate) units: Arc<Vec<HeadUnit>>,
}

impl LayerShape {
    /// Query heads of a kv head.
    pub(crate) fn group(&self) -> usize {
        self.query_heads / self.kv_heads
    }
}

/// `(batch, heads, tokens, columns)`.
pub(crate) type Dim4 = (usize, usize, usize, usize);

/// The arrays of a layer fit together, and have `query_heads` and `kv_heads`.
pub(crate) fn check_heads(
    query_heads: usize,
    kv_heads: usize,
    [q, k, v, out]: [Dim4; 4],
) -> Result<(), Error> {
    check::size("q", "heads", query_heads, q.1)?;
    check::size("k", "heads", kv_heads, k.1)?;
    check::size("v", "heads", kv_heads, v.1)?;
    check::size("k", "sequences", q.0, k.0)?;
    check::size("v", "sequences", q.0, v.0)?;
    check::size("v", "rows", k.2, v.2)?;
    check::size("out", "sequences", q.0, out.0)?;
    check::size("out", "heads", q.1, out.1)?;
    check::size("out", "rows", q.2, out.2)?;
    check::size("out", "columns", v.3, out.3)
}

/// Log decays of the tokens of every kv head.
pub(crate) fn check_log_decay(k: Dim4, log_decay: Option<Dim4>) -> Result<(), Error> {
    let Some(log_decay) = log_decay else { return Ok(()) };
    check::size("log_decay", "sequences", k.0, log_decay.0)?;
    check::size("log_decay", "heads", k.1, log_decay.1)?;
    check::size("log_decay", "rows", k.2, log_decay.2)
}

/// A number of real tokens for each sequence.
pub(crate) fn check_lengths(
    lengths: Option<&[usize]>,
    batch: usize,
    tokens: usize,
) -> Result<(), Error> {
    let Some(lengths) = lengths else { return Ok(()) };
    check::size("key_lengths", "elements", batch, lengths.len())?;
    match lengths.iter().find(|&&length| length > tokens) {
        Some(length) => Err(Error::InvalidOption {
            which: "key_lengths",
            found: length.to_string(),
            needed: "at most the number of rows of `k`",
        }),
        None => Ok(()),
    }
}

/// Rows `[b, n, heads · d]` seen as `[b, n, heads, d]`.
pub(crate) fn side_by_side<'a, T: Scalar>(
    which: &'static str,
    x: &'a ArrayView3<'_, T>,
    heads: usize,
) -> Result<CowArray<'a, T, Ix4>, Error> {
    let (batch, n, columns) = x.dim();
    let d = columns / heads;
    x.to_shape((batch, n, heads, d)).map_err(|_| Error::Shape {
        which,
        axis: "columns",
        expected: heads * d,
        found: columns,
    })
}
