//! The pair of least cost among many entries, exactly, without the distances of all pairs.
//!
//! Of every pair, the affinity `a = (1/a_i + 1/a_j)/distance²` (the inverse of its cost) is at most
//! the bound of one of its two entries: of the lighter one, when it was last looked at. In a step
//! all weights decay by γ and then only grow, so no affinity grows by more than 1/γ, and the bounds
//! with it stay bounds. The best pair is found by measuring the entries with the largest bounds
//! until what is left cannot be better: a few of them, whatever the number of entries. Working
//! memory is some numbers for each entry.

use crate::kernel;
use crate::memory::merged::entries::MergedMemory;
use crate::scalar::Scalar;

/// A pair and its affinity.
#[derive(Clone, Copy, Debug)]
struct Found<T> {
    affinity: T,
    i: usize,
    j: usize,
}

impl<T: Scalar> MergedMemory<T> {
    /// Brings bounds up to date with entries that are new or have changed.
    pub(super) fn refresh_bounds(&mut self) {
        self.bounds.at_hand.clear();
        self.set_reciprocals();
        if self.fresh == 0 {
            self.set_factors();
            self.bounds.clear();
        }
        for new in self.fresh..self.held {
            self.bounds.bound[new] = T::zero();
        }
        let mut changed = core::mem::take(&mut self.bounds.changed);
        changed.retain(|&entry| entry < self.fresh);
        changed.extend(self.fresh..self.held);
        for &entry in &changed {
            self.project(entry);
        }
        for pair in changed.chunks(2) {
            self.measure(pair);
            for (row, &entry) in pair.iter().enumerate() {
                self.share(entry, row);
            }
            self.bounds.at_hand.clear();
            self.bounds.at_hand.extend(pair);
        }
        changed.clear();
        self.bounds.changed = changed;
        self.fresh = self.held;
    }

    /// Gives the affinities of a measured entry to the lighter of each pair; returns the largest.
    fn share(&mut self, entry: usize, row: usize) -> T {
        let used = self.used();
        let own = self.reciprocal[entry];
        let affinities = &self.distances.affinities[row * used..(row + 1) * used];
        let bound = &mut self.bounds.bound[..used];
        let (owned, all) =
            kernel::share_affinities(own, &self.reciprocal[..used], affinities, bound);
        bound[entry] = owned;
        all
    }

    /// Measures an entry; its best pair if that is as good as `enough`.
    fn look_at(&mut self, entry: usize, enough: T) -> Option<Found<T>> {
        self.bounds.seen.push(entry);
        let row = self.bounds.at_hand.iter().position(|&at_hand| at_hand == entry);
        let row = row.unwrap_or_else(|| {
            self.measure(&[entry]);
            self.bounds.at_hand.clear();
            self.bounds.at_hand.push(entry);
            0
        });
        let best = self.share(entry, row);
        if best < enough {
            return None;
        }
        let (own, tied) = (self.reciprocal[entry], Self::tied(best));
        let row = self.distances.affinities[row * self.used()..][..self.held].iter();
        let partner = row
            .zip(&*self.reciprocal)
            .enumerate()
            .find(|&(j, (&affinity, &other))| j != entry && (own + other) * affinity >= tied);
        partner.map(|(j, _)| Found { affinity: best, i: entry.min(j), j: entry.max(j) })
    }

    /// The pair of least cost; of equal ones the lowest first entry, then the lowest second.
    pub(super) fn best_by_bounds(&mut self) -> Option<(T, usize, usize)> {
        self.refresh_bounds();
        self.bounds.seen.clear();
        let used = self.used();
        let top = kernel::max(&self.bounds.bound[..used]);
        let first = self.bounds.bound[..self.held].iter().position(|&bound| bound == top);
        let mut best = self.look_at(first?, T::zero())?;
        let mut start = 0;
        while start < self.held {
            let end = used.min(start + 64);
            let enough = Self::tied(best.affinity);
            if kernel::max(&self.bounds.bound[start..end]) < enough {
                start = end;
                continue;
            }
            for entry in start..end.min(self.held) {
                let enough = Self::tied(best.affinity);
                if self.bounds.bound[entry] < enough || self.bounds.seen.contains(&entry) {
                    continue;
                }
                let Some(found) = self.look_at(entry, enough) else { continue };
                let is_lower = (found.i, found.j) < (best.i, best.j);
                if Self::tied(found.affinity) > best.affinity || is_lower {
                    let affinity = best.affinity.max(found.affinity);
                    best = Found { affinity, ..found };
                }
            }
            start = end;
        }
        Some((best.affinity, best.i, best.j))
    }
}

#[cfg(test)]
#[allow(clippy::cast_precision_loss)] // random numbers, and means over tokens
mod tests {
    use super::*;
    use crate::memory::merged::rule::{Distance, MergeCost, Rule};
    use ndarray::Array1;
    use rand_chacha::ChaCha8Rng;
    use rand_core::{Rng, SeedableRng};

    fn uniform(random: &mut ChaCha8Rng, from: f64, to: f64) -> f64 {
        from + (to - from) * (random.next_u64() >> 11) as f64 * 2f64.powi(-53)
    }

    /// The pair of least cost of all pairs, by the formula.
    fn full_search<T: Scalar>(memory: &MergedMemory<T>) -> [usize; 2] {
        let [keys, values] = [memory.keys(), memory.values()].map(|x| x.mapv(Scalar::as_f64));
        let rule = &memory.rule;
        let tokens = memory.units.tokens as f64;
        let r: Array1<f64> = memory
            .units
            .squared_queries
            .iter()
            .map(|sum| sum.as_f64() / tokens * rule.scale)
            .collect();
        let r = match rule.cost {
            MergeCost::Product => r,
            MergeCost::Ward { .. } => &r / r.mean().unwrap(),
        };
        let square = memory.units.squared_values.as_f64() / tokens;
        let mut best = (f64::INFINITY, [0, 0]);
        for i in 0..memory.held {
            for j in i + 1..memory.held {
                let key = &keys.row(i) - &keys.row(j);
                let value = &values.row(i) - &values.row(j);
                let key = rule.scale * (&key * &key).dot(&r);
                let value = value.dot(&value) / square;
                let [a, b] = [i, j].map(|i| memory.weights[i].as_f64());
                let cost = match rule.cost {
                    MergeCost::Product => {
                        let [a, b] = [a, b].map(|a| a + rule.cost.least_weight());
                        key * (value + key / 4.0) / (1.0 / a + 1.0 / b)
                    }
                    MergeCost::Ward { value_weight } => {
                        a * (b / (a + b)) * (key + value_weight * value)
                    }
                };
                if cost < best.0 {
                    best = (cost, [i, j]);
                }
            }
        }
        best.1
    }

    /// A random stream: tokens come with weights of all sizes, entries receive much, little or
    /// nothing. Returns how many entries were measured in a step.
    fn search(cost: MergeCost, entries: usize, decay: f64, tokens: usize, seed: u64) -> f64 {
        let (d, dv) = (6, 5);
        let mut memory = MergedMemory::<f64>::with_rule(Rule {
            entries,
            spare: 1,
            block: 1,
            metric: Distance::QueryDiagonal,
            cost,
            query_squares: None,
            value_square: None,
            value_columns: None,
            scale: 0.4,
        });
        memory.prepare(d, dv);
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut measured = 0;
        let numbers = |n: usize, spread: f64, random: &mut ChaCha8Rng| -> Array1<f64> {
            (0..n).map(|_| spread * uniform(random, -1.0, 1.0)).collect()
        };
        for t in 0..tokens {
            let key = numbers(d, if t % 7 == 0 { 5.0 } else { 1.0 }, &mut random);
            let value = numbers(dv, 2.0, &mut random);
            let query = numbers(d, 1.0, &mut random);
            memory.observe([query.view()].into_iter(), value.view());
            memory.make_room();
            memory.slots.put(memory.held, key.view(), value.view());
            let weight = (2.0_f64).powf(uniform(&mut random, -30.0, 2.0));
            memory.enter(weight);
            let expected = (memory.held > entries).then(|| full_search(&memory));
            memory.reduce();
            assert_eq!(memory.merges, expected.into_iter().collect::<Vec<_>>(), "token {t}");
            memory.merges.clear();
            measured += memory.bounds.seen.len();
            let used = memory.used();
            let received: Vec<f64> = (0..used)
                .map(|i| {
                    let is_read = i < memory.held && uniform(&mut random, 0.0, 3.0) < 1.0;
                    if is_read { (2.0_f64).powf(uniform(&mut random, -40.0, 0.0)) } else { 0.0 }
                })
                .collect();
            memory.receive(decay, &[1.0], &received, used);
        }
        measured as f64 / tokens as f64
    }

    #[test]
    fn the_pairs_of_the_full_search() {
        let ward = MergeCost::Ward { value_weight: 4.0 };
        for (seed, (cost, entries, decay, tokens)) in [
            (MergeCost::Product, 40, 0.98, 10_000),
            (ward, 40, 0.95, 10_000),
            (MergeCost::Product, 5, 0.95, 2_000),
            (MergeCost::Product, 1, 0.95, 100),
            (MergeCost::Product, 2, 1.0, 1_000),
            (MergeCost::Product, 100, 1.0, 1_000),
            (ward, 70, 1.0, 1_000),
        ]
        .into_iter()
        .enumerate()
        {
            let measured = search(cost, entries, decay, tokens, seed as u64);
            println!("{cost:?} {entries} {decay}: {measured:.2} entries measured in a step");
        }
    }
}
