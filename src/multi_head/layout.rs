//! What lies where in a layer: which heads share a state, and the checks of its arrays.

use crate::check;
use crate::error::{Error, LayerHead};
use crate::scalar::Scalar;
use core::ops::Range;
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

    /// The heads of keys and values, where there are `group` query heads for each.
    pub(crate) fn all_kv_heads(&self, group: usize) -> Vec<usize> {
        match self {
            Self::Query(h) => vec![h / group],
            Self::Group(kv) => vec![*kv],
            Self::Pool(heads) => heads.clone(),
        }
    }

    /// The query heads.
    pub(crate) fn query_heads(&self, group: usize) -> Vec<usize> {
        match self {
            Self::Query(h) => vec![*h],
            _ => self
                .all_kv_heads(group)
                .into_iter()
                .flat_map(|kv| kv * group..(kv + 1) * group)
                .collect(),
        }
    }

    /// An error of this unit, in a sequence.
    pub(crate) fn error(&self, sequence: usize, error: Error) -> Error {
        let head = match self {
            Self::Query(h) => LayerHead::Query(*h),
            Self::Group(kv) => LayerHead::Kv(*kv),
            Self::Pool(heads) => LayerHead::Pool(heads.clone()),
        };
        in_head(sequence, head, error)
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

/// An error of a head in a sequence. What does not fit all heads alike stays as it is.
pub(crate) fn in_head(sequence: usize, head: LayerHead, error: Error) -> Error {
    match error {
        Error::Shape { .. } | Error::ZeroSize { .. } => error,
        error => Error::InHead { sequence, head, error: Box::new(error) },
    }
}

/// On which side of shorter sequences the padding lies, in a batch with lengths:
/// [`MultiHead::with_padding`](crate::MultiHead::with_padding).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Padding {
    /// The first tokens of a sequence are real, padding comes after them.
    #[default]
    Right,
    /// The last tokens of a sequence are real, padding comes before them.
    Left,
}

impl Padding {
    /// Where the real tokens lie, `length` of `tokens`.
    pub(crate) fn real(self, length: usize, tokens: usize) -> Range<usize> {
        match self {
            Self::Right => 0..length,
            Self::Left => tokens - length..tokens,
        }
    }
}

/// The heads of a layer.
#[derive(Clone, Debug)]
pub(crate) struct LayerShape {
    pub(crate) query_heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) value_dim: usize,
    pub(crate) padding: Padding,
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

/// Biases `[1 or batch, 1 or query_heads, n_q, n_k]`.
pub(crate) fn check_bias(bias: Option<Dim4>, q: Dim4, keys: usize) -> Result<(), Error> {
    let Some(bias) = bias else { return Ok(()) };
    if bias.0 != 1 {
        check::size("bias", "sequences", q.0, bias.0)?;
    }
    if bias.1 != 1 {
        check::size("bias", "heads", q.1, bias.1)?;
    }
    check::size("bias", "rows", q.2, bias.2)?;
    check::size("bias", "columns", keys, bias.3)
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
