//! What has been measured of an entry, and the best pair in it.

use crate::kernel;
use crate::scalar::Scalar;

/// Numbers that are skipped at once where none of them counts.
pub(super) const STRIP: usize = 64;

/// A pair of entries and its affinity.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found<T> {
    pub(super) affinity: T,
    pub(super) i: usize,
    pub(super) j: usize,
}

impl<T: Scalar> Found<T> {
    pub(super) fn new(affinity: T, i: usize, j: usize) -> Self {
        Self { affinity, i: i.min(j), j: i.max(j) }
    }

    /// The better of two pairs, if there are any.
    pub(super) fn better(
        best: Option<Self>,
        found: Option<Self>,
        tied: impl Fn(T) -> T,
    ) -> Option<Self> {
        match (best, found) {
            (Some(best), Some(found)) => Some(best.or(found, tied)),
            (best, found) => best.or(found),
        }
    }

    /// The better of two; of equal ones the lower.
    fn or(self, other: Self, tied: impl Fn(T) -> T) -> Self {
        let affinity = self.affinity.max(other.affinity);
        let is_lower = (other.i, other.j) < (self.i, self.j);
        let is_taken = if is_lower {
            other.affinity >= tied(self.affinity)
        } else {
            tied(other.affinity) > self.affinity
        };
        if is_taken { Self { affinity, ..other } } else { Self { affinity, ..self } }
    }
}

/// Numbers of measured entries: `1/a` of each, and `1/distance²` of one to each.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row<'a, T> {
    pub(super) entry: usize,
    pub(super) reciprocal: &'a [T],
    pub(super) closeness: &'a [T],
}

impl<T: Scalar> Row<'_, T> {
    /// The largest affinity of those whose closeness is within the limit.
    pub(super) fn largest(self, limit: T) -> T {
        let own = self.reciprocal[self.entry];
        kernel::largest_within(own, self.reciprocal, self.closeness, limit)
    }

    /// The pair of largest affinity, if that is as good as `enough`.
    pub(super) fn best(self, enough: T, tied: impl Fn(T) -> T + Copy) -> Option<Found<T>> {
        let Self { entry, reciprocal, closeness } = self;
        let largest = self.largest(T::infinity());
        if largest < enough {
            return None;
        }
        let (own, as_good) = (reciprocal[entry], tied(largest));
        let mut best: Option<Found<T>> = None;
        for start in (0..closeness.len()).step_by(STRIP) {
            let strip = start..closeness.len().min(start + STRIP);
            let (r, e) = (&reciprocal[strip.clone()], &closeness[strip.clone()]);
            if kernel::largest_within(own, r, e, T::infinity()) < as_good {
                continue;
            }
            for other in strip {
                let affinity = (own + reciprocal[other]) * closeness[other];
                if affinity >= as_good && other != entry {
                    best = Found::better(best, Some(Found::new(affinity, entry, other)), tied);
                }
            }
        }
        best
    }
}
