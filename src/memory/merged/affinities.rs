//! Which entries of a merging memory are the nearest: distances, and pairs of least cost.

use crate::kernel;
use crate::kernel::buffer::padded;
use crate::memory::merged::entries::MergedMemory;
use crate::memory::merged::rule::Distance;
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
    /// Sets the factors of the coordinates. Distances are in units in which keys count as they are;
    /// these units do not change what is least.
    #[allow(clippy::cast_precision_loss)]
    fn set_factors(&mut self) {
        let (head_dim, columns) = (self.slots.head_dim, self.value_columns());
        let keys = self.factors.len() - columns;
        self.factors.fill(T::one());
        if matches!(self.rule.metric, Distance::QueryDiagonal) {
            let total: f64 = self.units.squared_queries.iter().map(|sum| sum.as_f64()).sum();
            if total > 0.0 && total.is_finite() {
                for (factor, sum) in self.factors.iter_mut().zip(&self.units.squared_queries) {
                    *factor = T::from_f64((sum.as_f64() / total * head_dim as f64).sqrt());
                }
            }
        }
        let rho_squared = self.units.squared_values.as_f64() / self.units.tokens.max(1) as f64;
        let values = (self.rule.value_weight / rho_squared / self.rule.scale).sqrt();
        let values = T::from_f64(if values.is_finite() { values } else { 0.0 });
        self.factors[keys..].fill(if values.is_finite() { values } else { T::zero() });
    }

    /// Computes the point of an entry, and its distances to all others.
    pub(super) fn refresh(&mut self, entry: usize) {
        let columns = self.value_columns();
        let keys = self.factors.len() - columns;
        // squares of numbers within this limit can be summed
        let limit = T::max_value().sqrt() * T::from_f64(1e-4);
        let clamp = |x: T| x.max(-limit).min(limit); // a NaN as well
        let Self { slots, points, point, factors, affinity, distance, metric, .. } = self;
        match &self.rule.metric {
            Distance::Identity | Distance::QueryDiagonal => {
                point.iter_mut().zip(slots.key(entry)).for_each(|(to, x)| *to = x);
            }
            Distance::Matrix(_) => {
                distance.iter_mut().zip(slots.key(entry)).for_each(|(to, x)| *to = clamp(x));
                let rows = padded::<T>(keys);
                kernel::row_times_matrix(
                    &distance[..slots.head_dim],
                    metric,
                    rows,
                    &mut point[..keys],
                );
            }
        }
        point[keys..keys + columns].copy_from_slice(&slots.value(entry)[..columns]);
        point.iter_mut().zip(&**factors).for_each(|(x, &factor)| *x = clamp(*x * factor));
        let capacity = slots.capacity;
        points[entry..].iter_mut().step_by(capacity).zip(&**point).for_each(|(to, &x)| *to = x);
        let used = padded::<T>(self.held);
        kernel::distances(points, capacity, &point[..factors.len()], &mut distance[..used]);
        let largest = Self::largest_affinity();
        let least = largest.recip();
        for x in &mut distance[..used] {
            *x = x.max(least).recip();
        }
        distance[self.held..].fill(T::zero());
        distance[entry] = T::zero();
        if self.gaps > 0 {
            distance
                .iter_mut()
                .zip(&self.counts)
                .filter(|(_, count)| **count == 0.0)
                .for_each(|(x, _)| *x = T::zero());
        }
        affinity[entry * capacity..][..capacity].copy_from_slice(&distance[..capacity]);
        affinity[entry..]
            .iter_mut()
            .step_by(capacity)
            .zip(&distance[..self.held])
            .for_each(|(to, &x)| *to = x);
    }

    /// Brings points and distances up to date.
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
        for (r, w) in self.reciprocal.iter_mut().zip(&*self.weights).take(self.held) {
            *r = w.recip(); // of a gap as well, whose affinities are zero
        }
        self.reciprocal[self.held..].fill(T::zero());
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
    fn tied(best: T) -> T {
        best * (T::one() - T::epsilon() * T::from_f64(64.0))
    }

    /// The largest inverse squared distance: of what is nearer, the first pair is merged.
    fn largest_affinity() -> T {
        Self::least_weight().recip() * T::from_f64(0.01)
    }
}

pub(super) fn descending<T: Scalar>(a: T, b: T) -> core::cmp::Ordering {
    b.partial_cmp(&a).unwrap_or(core::cmp::Ordering::Equal)
}
