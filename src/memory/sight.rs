//! Which keys some queries see, and what is added to their scores.

use crate::kernel;
use crate::kernel::buffer::Buffer;
use crate::memory::score_tile::Seen;
use crate::scalar::Scalar;
use crate::views::{columns, rows, to_columns};
use core::f64::consts::LOG2_E;
use core::ops::Range;
use ndarray::{ArrayView1, ArrayView2};

/// What a block of queries sees of some keys.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sight<'a, T> {
    /// Query `i` sees no key behind position `first + i`, or all where there is none.
    pub(crate) first: Option<usize>,
    /// Of those up to its position, the last so many.
    pub(crate) window: Option<usize>,
    /// Whether any query may see a key, `[n_k]`.
    pub(crate) key_mask: Option<ArrayView1<'a, bool>>,
    /// What is added to scores, `[n_q, n_k]`.
    pub(crate) bias: Option<ArrayView2<'a, T>>,
}

/// The score of keys that are not seen: so little that its weight is 0 beside any other, and a
/// number, so that a query may first see nothing and later something.
fn hidden<T: Scalar>() -> T {
    -T::max_value() * T::from_f64(0.25)
}

/// Whether a natural log scale is that of a query that sees nothing.
pub(crate) fn is_blind<T: Scalar>(log_scale: T) -> bool {
    log_scale < hidden::<T>() * T::from_f64(0.5)
}

impl<T: Scalar> Sight<'_, T> {
    /// All keys up to the position of each query, or all.
    pub(crate) fn up_to(first: Option<usize>) -> Self {
        Self { first, window: None, key_mask: None, bias: None }
    }

    /// That of some of the queries.
    pub(crate) fn of(&self, range: Range<usize>) -> Sight<'_, T> {
        Sight {
            first: self.first.map(|first| first + range.start),
            window: self.window,
            key_mask: self.key_mask.map(ArrayView1::reborrow),
            bias: self.bias.map(|bias| rows(bias.reborrow(), range)),
        }
    }

    /// The keys, of so many, among which are all that one of `n` queries sees.
    pub(crate) fn keys(&self, n: usize, keys: usize) -> Range<usize> {
        let end = self.first.map_or(keys, |first| keys.min(first + n));
        let start = match (self.first, self.window) {
            (Some(first), Some(window)) => (first + 1).saturating_sub(window),
            _ => 0,
        };
        start.min(end)..end
    }

    /// Whether positions alone say what is seen, all up to each query.
    pub(crate) fn is_plain(&self) -> bool {
        self.window.is_none() && !self.may_hide_all()
    }

    /// Whether a query may see nothing.
    pub(crate) fn may_hide_all(&self) -> bool {
        self.key_mask.is_some() || self.bias.is_some()
    }

    /// Adds biases to scores to base 2, `[keys, width]` of the keys from `start` on, and hides
    /// what is not seen.
    pub(crate) fn apply(
        &self,
        seen: Seen,
        start: usize,
        scores: &mut [T],
        [biases, squares]: [&mut Buffer<T>; 2],
    ) {
        let (width, hidden) = (seen.width, hidden());
        if let Some(bias) = self.bias {
            biases.resize(seen.keys * width);
            squares.resize(width);
            let bias = columns(bias, start..start + seen.keys);
            to_columns(bias, T::from_f64(LOG2_E), squares, biases);
            kernel::add_bounded(scores, biases, hidden);
        }
        for (key, row) in scores.chunks_exact_mut(width).enumerate() {
            if self.key_mask.is_some_and(|key_mask| !key_mask[start + key]) {
                row.fill(hidden);
                continue;
            }
            let from = seen.first_query(key);
            row[..from].fill(hidden);
            if let (Some(window), Some(offset)) = (self.window, seen.offset) {
                let to = key.cast_signed().saturating_sub(offset).saturating_add_unsigned(window);
                let to = to.clamp(0, width.cast_signed()).cast_unsigned();
                row[to..].fill(hidden);
            }
        }
    }
}
