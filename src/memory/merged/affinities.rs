//! The pairs of least cost where many entries are merged in rounds: the distances of all pairs are
//! kept.

use crate::kernel;
use crate::memory::merged::entries::MergedMemory;
use crate::scalar::Scalar;

/// Where a number that is sorted holds its entry: there are no more of them, and 32 bits of the
/// mantissa are left.
const ENTRY_BITS: u64 = (1 << 20) - 1;

/// Two entries of one of several memories, and how little it costs to merge them.
#[derive(Clone, Debug)]
pub(crate) struct Pair<T> {
    pub(super) affinity: T,
    pub(super) head: usize,
    pub(super) i: usize,
    pub(super) j: usize,
}

impl<T: Scalar> MergedMemory<T> {
    /// Measures an entry that is new or has changed.
    pub(super) fn refresh(&mut self, entry: usize) {
        self.project(entry);
        self.measure(&[entry]);
        let (capacity, used) = (self.slots.capacity, self.used());
        let row = &self.distances.closeness[..used];
        self.affinity[entry * capacity..][..used].copy_from_slice(row);
        let column = self.affinity[entry..].iter_mut().step_by(capacity);
        column.zip(&row[..self.held]).for_each(|(to, &x)| *to = x);
    }

    /// Brings affinities up to date.
    fn refresh_all(&mut self) {
        if self.fresh == self.held {
            return;
        }
        if self.fresh == 0 {
            self.set_factors();
            self.affinity.fill(T::zero());
        }
        for entry in self.fresh..self.held {
            self.refresh(entry);
        }
        self.fresh = self.held;
    }

    /// Finds for each entry the largest `(1/a_i + 1/a_j)/distance²`: the inverse of the least cost
    /// of a pair.
    fn find_best(&mut self) {
        let used = self.used();
        self.set_reciprocals();
        kernel::largest_affinities(
            &self.reciprocal[..used],
            &self.affinity,
            self.slots.capacity,
            &mut self.best[..self.held],
        );
    }

    /// The pair of least cost; of equal ones the lowest first entry, then the lowest second. `None`
    /// if all but `least` entries are gone.
    pub(super) fn best_pair(&mut self, least: usize) -> Option<(T, usize, usize)> {
        if self.held - self.gaps <= least.max(1) {
            return None;
        }
        if self.is_by_neighbours() {
            return self.best_by_neighbours();
        }
        self.refresh_all();
        self.find_best();
        let best = self.best[..self.held].iter().fold(T::zero(), |m, &x| m.max(x));
        let i =
            (0..self.held).find(|&i| self.counts[i] > 0.0 && self.best[i] >= Self::tied(best))?;
        let j = self.first_partner(i, best)?;
        Some((best, i.min(j), i.max(j)))
    }

    /// Adds the pairs of entries that are the nearest to each other: the `most` that cost least,
    /// and no more than leave `least` entries.
    pub(super) fn mutual_pairs(
        &mut self,
        head: usize,
        least: usize,
        most: usize,
        pairs: &mut Vec<Pair<T>>,
    ) {
        let most = most.min((self.held - self.gaps).saturating_sub(least.max(1)));
        if most == 0 {
            return;
        }
        self.refresh_all();
        self.find_best();
        let start = pairs.len();
        // The best of both entries is the affinity of the pair: they stand side by side in the
        // order of the best.
        self.order.clear();
        for entry in (0..self.held).filter(|&entry| self.counts[entry] > 0.0) {
            // bits of positive numbers have the order of the numbers, and integers are sorted
            // faster; the last bits make room for the entry
            self.order.push((!self.best[entry].as_f64().to_bits() & !ENTRY_BITS) | entry as u64);
        }
        self.order.sort_unstable();
        let mut from = 0;
        while from < self.order.len() && pairs.len() < start + most {
            let at = |place: usize| (self.order[place] & ENTRY_BITS) as usize;
            let enough = Self::tied(Self::tied(self.best[at(from)])) * T::from_f64(1.0 - 1e-9);
            let mut to = from + 1;
            while to < self.order.len() && self.best[at(to)] >= enough {
                to += 1;
            }
            if to > from + 1 {
                for place in from..to {
                    let i = at(place);
                    let j = self.nearest(i);
                    if i < j && self.nearest(j) == i {
                        pairs.push(Pair { affinity: self.affinity_of(i, j), head, i, j });
                    }
                }
            }
            from = to;
        }
        if pairs.len() == start
            && let Some((affinity, i, j)) = self.best_pair(least)
        {
            pairs.push(Pair { affinity, head, i, j }); // rounding hid that the best pair is one
        }
        if pairs.len() - start > most {
            pairs[start..]
                .sort_unstable_by(|a, b| descending(a.affinity, b.affinity).then(a.i.cmp(&b.i)));
            pairs.truncate(start + most);
        }
    }

    /// The entry that costs least to merge with this one; of equal ones the lowest.
    fn nearest(&self, i: usize) -> usize {
        self.first_partner(i, self.best[i]).unwrap_or(i)
    }

    /// The lowest entry whose affinity with this one is as good as `best`.
    fn first_partner(&self, i: usize, best: T) -> Option<usize> {
        let (own, enough) = (self.reciprocal[i], Self::tied(best));
        let is_other = |j: usize| j != i && self.counts[j] > 0.0; // an entry, not a gap
        let row = &self.affinity[i * self.slots.capacity..][..self.held];
        let mut all = row.iter().zip(&self.reciprocal[..self.held]).enumerate();
        all.find(|&(j, (&affinity, &other))| is_other(j) && (own + other) * affinity >= enough)
            .map(|(j, _)| j)
    }

    fn affinity_of(&self, i: usize, j: usize) -> T {
        (self.reciprocal[i] + self.reciprocal[j]) * self.affinity[i * self.slots.capacity + j]
    }

    /// What is as good as `best` but for rounding.
    pub(super) fn tied(best: T) -> T {
        best * (T::one() - T::epsilon() * T::from_f64(64.0))
    }
}

pub(super) fn descending<T: Scalar>(a: T, b: T) -> core::cmp::Ordering {
    b.partial_cmp(&a).unwrap_or(core::cmp::Ordering::Equal)
}
