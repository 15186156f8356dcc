//! Entries of merging memories become one until the bound holds.

use crate::memory::merged::affinities::{Pair, descending};
use crate::memory::merged::entries::{Merge, MergedMemory};
use crate::memory::slots::Slots;
use crate::scalar::Scalar;
use ndarray::ArrayView1;

/// Merges the pairs of least cost, anywhere, until all memories together have `budget` entries; at
/// least `least` stay in each.
pub(crate) fn reduce<T: Scalar>(
    heads: &mut [MergedMemory<T>],
    budget: usize,
    least: usize,
    block: usize,
    pairs: &mut Vec<Pair<T>>,
) {
    let mut total: usize = heads.iter().map(|head| head.held).sum();
    if block == 1 && total > budget {
        pairs.clear();
        let best = |head: usize, memory: &mut MergedMemory<T>| match memory.best_pair(least) {
            Some((affinity, i, j)) => Pair { affinity, head, i, j },
            None => Pair { affinity: T::neg_infinity(), head, i: 0, j: 0 },
        };
        pairs.extend(heads.iter_mut().enumerate().map(|(head, memory)| best(head, memory)));
        while total > budget {
            let mut chosen = 0;
            for (head, pair) in pairs.iter().enumerate() {
                if pair.affinity > pairs[chosen].affinity {
                    chosen = head;
                }
            }
            let Pair { affinity, head, i, j } = pairs[chosen];
            if affinity == T::neg_infinity() {
                return; // nothing may be merged
            }
            heads[head].merge_pair(i, j);
            total -= 1;
            if total > budget {
                pairs[chosen] = best(head, &mut heads[head]);
            }
        }
        return;
    }
    if block == 1 {
        // nothing is merged yet, and what came is noted, so that a later step does not do it all
        let settled = heads.iter_mut().filter(|memory| !memory.is_finding_units());
        settled.for_each(MergedMemory::refresh_neighbours);
        return;
    }
    while total > budget {
        pairs.clear();
        for (head, memory) in heads.iter_mut().enumerate() {
            memory.mutual_pairs(head, least, total - budget, pairs);
        }
        if pairs.is_empty() {
            break;
        }
        pairs.sort_unstable_by(|a, b| {
            descending(a.affinity, b.affinity).then((a.head, a.i).cmp(&(b.head, b.i)))
        });
        pairs.truncate(total - budget);
        total -= pairs.len();
        // all at once: distances to what is merged in the same round come last
        for &Pair { head, i, j, .. } in &*pairs {
            heads[head].note(i, j);
        }
        for &Pair { head, i, j, .. } in &*pairs {
            heads[head].merge_leaving_gap(i, j);
        }
        for &Pair { head, i, .. } in &*pairs {
            heads[head].refresh(i);
        }
    }
    heads.iter_mut().for_each(MergedMemory::close_gaps);
}

impl<T: Scalar> MergedMemory<T> {
    /// Merges until the bound is kept.
    pub(crate) fn reduce(&mut self) {
        let (budget, block) = (self.rule.entries, self.rule.block);
        reduce(core::slice::from_mut(self), budget, 1, block, &mut Vec::new());
    }

    /// Merges a pair; the last entry takes the place of the second.
    fn merge_pair(&mut self, i: usize, j: usize) {
        self.note(i, j);
        self.merge_into(i, j);
        let last = self.held - 1;
        if j != last {
            self.move_entry(last, j);
            self.neighbours.move_entry(last, j);
        }
        self.truncate(last);
        self.neighbours.change(i);
    }

    /// Merges a pair; the place of the second stays empty until [`close_gaps`](Self::close_gaps).
    fn merge_leaving_gap(&mut self, i: usize, j: usize) {
        self.merge_into(i, j);
        let capacity = self.slots.capacity;
        self.slots.empty(j);
        self.counts[j] = 0.0;
        self.affinity[j * capacity..(j + 1) * capacity].fill(T::zero());
        self.affinity[j..]
            .iter_mut()
            .step_by(capacity)
            .take(self.held)
            .for_each(|x| *x = T::zero());
        self.gaps += 1;
    }

    /// Moves the entries behind gaps forward, in order.
    fn close_gaps(&mut self) {
        if self.gaps == 0 {
            return;
        }
        let (capacity, len) = (self.slots.capacity, self.held);
        let first = self.counts[..len].iter().position(|&count| count == 0.0).unwrap_or(len);
        let mut to = first;
        for entry in first..len {
            if self.counts[entry] > 0.0 {
                self.move_entry(entry, to);
                self.affinity.copy_within(entry * capacity..entry * capacity + len, to * capacity);
                self.places[to] = entry;
                to += 1;
            }
        }
        for row in self.affinity.chunks_exact_mut(capacity).take(to) {
            for place in first..to {
                row[place] = row[self.places[place]];
            }
        }
        self.gaps = 0;
        self.truncate(to);
    }

    /// Makes entry `i` the mean of both; entry `j` remains.
    fn merge_into(&mut self, i: usize, j: usize) {
        let least = T::from_f64(self.rule.cost.least_weight());
        let share = (self.weights[j] + least) / (self.weights[i] + self.weights[j] + least + least);
        if let Some(log) = &mut self.log {
            #[allow(clippy::cast_possible_truncation)] // tokens of one call, at most 2^14 entries
            let (absorbed, pair) = (self.absorbed as u32, [i as u16, j as u16]);
            log.push(Merge { absorbed, pair, share });
        }
        let mean = |x: T, y: T| {
            let difference = y - x;
            if difference.is_finite() {
                x + share * difference
            } else {
                x * (T::one() - share) + y * share
            }
        };
        let Self { slots, distances, .. } = self;
        for (numbers, size, read) in [
            (
                &mut distances.keys,
                slots.head_dim,
                Slots::read_key as fn(&Slots<T>, usize, &mut [T]),
            ),
            (&mut distances.values, slots.value_dim, Slots::read_value),
        ] {
            let half = numbers.len() / 2;
            let (first, second) = numbers.split_at_mut(half);
            read(slots, i, first);
            read(slots, j, second);
            first.iter_mut().zip(&*second).take(size).for_each(|(x, &y)| *x = mean(*x, y));
        }
        let [key, value] =
            [&distances.keys[..slots.head_dim], &distances.values[..slots.value_dim]];
        slots.set(i, ArrayView1::from(key), ArrayView1::from(value));
        self.counts[i] += self.counts[j];
        let added = self.weights[j];
        self.weights[i] = (self.weights[i] + added).min(T::max_value().sqrt());
        slots.bias[i] = T::from_f64(libm::log2(self.counts[i]));
    }

    /// Tests look at what is merged, by places without gaps.
    #[allow(clippy::unused_self, clippy::needless_pass_by_ref_mut)]
    fn note(&mut self, i: usize, j: usize) {
        #[cfg(test)]
        {
            let place =
                |entry: usize| self.counts[..entry].iter().filter(|&&count| count > 0.0).count();
            self.merges.push([place(i), place(j)]);
        }
        let _ = (i, j);
    }

    fn move_entry(&mut self, from: usize, to: usize) {
        self.slots.move_slot(from, to);
        self.counts[to] = self.counts[from];
        self.weights[to] = self.weights[from];
        self.distances.move_entry(from, to, self.slots.capacity);
    }

    /// Ends at `len` entries; what lies beyond is empty.
    fn truncate(&mut self, len: usize) {
        for slot in len..self.held {
            self.slots.empty(slot);
            self.weights[slot] = T::zero();
            let column = self.affinity.iter_mut().skip(slot).step_by(self.slots.capacity);
            column.take(self.held).for_each(|x| *x = T::zero());
        }
        if self.is_by_neighbours() {
            self.neighbours.truncate(len, self.held);
        }
        self.held = len;
        self.fresh = self.fresh.min(len);
    }
}
