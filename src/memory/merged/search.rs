//! The pair of least cost among many entries, exactly, without the distances of all pairs.
//!
//! The affinity of a pair is the inverse of its cost, `(1/a_i + 1/a_j)·closeness`, with
//! `closeness = 1/distance²`, which stays as it is while neither entry changes. Each entry i is
//! linked with those nearest to it, and has four bounds ([`neighbours`](super::neighbours)): of
//! closenesses and affinities, with linked entries and with all others.
//!
//! - If i is the lighter of a pair, `1/a_j ≤ 1/a_i`: its affinity is at most `2/a_i` times the
//!   bound of the closeness.
//! - In a step all weights decay by γ and then only grow, so no affinity grows by more than 1/γ:
//!   bounds of affinities stay bounds if they grow so.
//!
//! The smaller of the two bounds the affinities of the pairs in which i is the lighter, and every
//! pair has a lighter entry. So the best pair is found by going through the links of the entries
//! that reach as far as the best pair so far, and by measuring the few entries whose bound of all
//! others does. Entries that have changed of late are not linked with any: their closenesses to all
//! others are kept ([`recent`](super::recent)), so that an entry that many are near to, and that
//! changes all the time, is not linked with them anew in every step. Working memory is some
//! fifty numbers for each entry.

use crate::kernel;
use crate::memory::merged::entries::MergedMemory;
use crate::memory::merged::row::{Found, Row};
use crate::scalar::Scalar;

impl<T: Scalar> MergedMemory<T> {
    /// Measures entries that are new or have changed.
    pub(super) fn refresh_neighbours(&mut self) {
        self.set_reciprocals();
        if self.fresh == 0 {
            self.set_factors();
            self.neighbours.clear();
        }
        let changed = self.neighbours.changed.take();
        let mut changed = changed.into_iter().chain(self.fresh..self.held);
        for entry in changed.clone() {
            self.project(entry);
            self.neighbours.forget(entry);
        }
        while let Some(first) = changed.next() {
            let both = [first, changed.next().unwrap_or(first)];
            let pair = if both[0] == both[1] { &both[..1] } else { &both };
            self.measure(pair);
            for (place, &entry) in pair.iter().enumerate() {
                let closeness = &self.distances.closeness;
                let row = row(&self.reciprocal, closeness, entry, place, self.used());
                self.neighbours.add(row);
            }
        }
        self.fresh = self.held;
    }

    /// Measures an entry and links it anew: its best pair if that is as good as `enough`.
    fn look_at(&mut self, entry: usize, enough: T) -> Option<Found<T>> {
        #[cfg(test)]
        {
            self.looks += 1;
        }
        self.measure(&[entry]);
        let row = row(&self.reciprocal, &self.distances.closeness, entry, 0, self.used());
        self.neighbours.find_nearest(row);
        row.best(enough, Self::tied)
    }

    /// The pair of least cost; of equal ones the lowest first entry, then the lowest second.
    pub(super) fn best_by_neighbours(&mut self) -> Option<(T, usize, usize)> {
        self.refresh_neighbours();
        let (used, held, tied) = (self.used(), self.held, Self::tied);
        let enough = |best: Option<Found<T>>| best.map_or(T::zero(), |best| tied(best.affinity));
        let mut best = None;
        let reciprocal = &self.reciprocal[..used];
        for recent in 0..self.neighbours.recent.entries().len() {
            let row = self.neighbours.recent.row(recent, reciprocal);
            best = Found::better(best, row.best(enough(best), tied), tied);
        }
        // what is found first should be good, so that little else has to be looked at
        let top = kernel::max(self.neighbours.reach(reciprocal, true));
        if let Some(entry) = self.neighbours.next(0, held, top) {
            best = Found::better(best, self.neighbours.best_linked(entry, reciprocal, tied), tied);
        }
        let mut start = 0;
        while let Some(entry) = self.neighbours.next(start, held, enough(best)) {
            best = Found::better(best, self.neighbours.best_linked(entry, reciprocal, tied), tied);
            start = entry + 1;
        }
        self.neighbours.reach(reciprocal, false);
        start = 0;
        while let Some(entry) = self.neighbours.next(start, held, enough(best)) {
            best = Found::better(best, self.look_at(entry, enough(best)), tied);
            start = entry + 1;
        }
        best.map(|best| (best.affinity, best.i, best.j))
    }
}

/// A row of what has been measured.
fn row<'a, T>(
    reciprocal: &'a [T],
    closeness: &'a [T],
    entry: usize,
    place: usize,
    used: usize,
) -> Row<'a, T> {
    let closeness = &closeness[place * used..(place + 1) * used];
    Row { entry, reciprocal: &reciprocal[..used], closeness }
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
        let mut other = memory.clone();
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut measured = 0;
        let numbers = |n: usize, spread: f64, random: &mut ChaCha8Rng| -> Array1<f64> {
            (0..n).map(|_| spread * uniform(random, -1.0, 1.0)).collect()
        };
        for t in 0..tokens {
            if t % 700 == 699 {
                // what comes is new, or goes on in another memory
                if random.next_u64() % 4 == 0 {
                    memory.reset();
                } else {
                    other.copy_from(&memory);
                    core::mem::swap(&mut memory, &mut other);
                }
            }
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
            measured += core::mem::take(&mut memory.looks);
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
