//! The entries of a merging memory: how they come in, and what is known of them.

use crate::kernel;
use crate::kernel::buffer::{Buffer, padded};
use crate::memory::merged::distances::Distances;
use crate::memory::merged::neighbours::Neighbours;
use crate::memory::merged::rule::{Distance, LEAST_WEIGHT, Rule};
use crate::memory::slots::{Slots, room_for};
use crate::scalar::Scalar;
use ndarray::ArrayView1;

/// Tokens whose queries and values set the units of the metric.
pub(super) const METRIC_TOKENS: usize = 64;

/// A bounded set of entries, each a mean key k̄, a mean value v̄, the number n of tokens it stands
/// for and their weight a. It answers a query with `Σ_i n_i e^{scale·q·k̄_i} (v̄_i, 1)`.
///
/// A token enters with n = 1 and the weight it is given. Beyond the bound, the two entries with the
/// smallest
///
/// ```text
/// a_i a_j/(a_i + a_j) · ‖R(k̄_i − k̄_j)‖²
/// ```
///
/// become one, with a-weighted means of keys and values (Ward's method, J. Am. Stat. Assoc. 58,
/// 1963): the least increase of the weighted squared error.
/// [`HybridAttention`](crate::HybridAttention) builds such memories
/// ([`Far::ward`](crate::Far::ward), [`Far::merged`](crate::Far::merged)); this type is for use by
/// itself.
///
/// ```
/// use dijiang::{Memory, MergedMemory, Partial};
/// use ndarray::array;
///
/// let mut memory = MergedMemory::<f64>::new(1, 1, 2, 1.0)?; // two entries
/// memory
///     .absorb(array![[0.0], [5.0], [0.2]].view(), array![[1.0], [2.0], [3.0]].view())?;
/// assert_eq!(memory.keys(), array![[0.1], [5.0]]); // 0.0 and 0.2 were the nearest
/// assert_eq!(memory.counts(), [2.0, 1.0]);
/// let mut answer = Partial::new(1, 1)?;
/// memory.read(array![[0.0]].view(), &mut answer)?;
/// assert!((answer.log_normalizer()[0] - 3f64.ln()).abs() < 1e-15);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct MergedMemory<T> {
    pub(crate) rule: Rule,
    pub(crate) slots: Slots<T>,
    /// Entries now.
    pub(crate) held: usize,
    pub(super) counts: Vec<f64>,
    pub(crate) weights: Buffer<T>,
    pub(super) absorbed: usize,
    pub(super) units: Units<T>,
    pub(super) distances: Distances<T>,
    /// What is known of distances, which all follows from the entries; nothing is of those from
    /// `fresh` on. The nearest of each where one pair is merged at a time, else `1/distance` of
    /// every pair, zero on the diagonal and beyond the entries.
    pub(super) neighbours: Neighbours<T>,
    pub(super) affinity: Buffer<T>,
    pub(super) fresh: usize,
    /// Scratch: 1/a, the best of each row.
    pub(super) reciprocal: Buffer<T>,
    pub(super) best: Buffer<T>,
    pub(super) order: Vec<u64>,
    pub(super) places: Vec<usize>,
    /// Entries that are gone while pairs are merged in rounds.
    pub(super) gaps: usize,
    /// What is merged, where that is to be known.
    pub(crate) log: Option<Vec<Merge<T>>>,
    #[cfg(test)]
    pub(crate) merges: Vec<[usize; 2]>,
    /// Entries that were measured for a search, beside those that had changed.
    #[cfg(test)]
    pub(super) looks: usize,
}

/// Two entries that became one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Merge<T> {
    /// Tokens that the memory had absorbed, of one call.
    pub(crate) absorbed: u32,
    /// Their places at that time; there are at most 2^14.
    pub(crate) pair: [u16; 2],
    /// What the second has of the mean.
    pub(crate) share: T,
}

/// Sums over the first tokens, which set the units of keys and values.
#[derive(Clone, Debug)]
pub(super) struct Units<T> {
    pub(super) tokens: usize,
    pub(super) squared_values: T,
    pub(super) squared_queries: Vec<T>,
}

impl<T: Scalar> MergedMemory<T> {
    pub(crate) fn with_rule(rule: Rule) -> Self {
        Self {
            rule,
            slots: Slots::new(),
            held: 0,
            counts: Vec::new(),
            weights: Buffer::new(),
            absorbed: 0,
            units: Units { tokens: 0, squared_values: T::zero(), squared_queries: Vec::new() },
            distances: Distances::new(),
            neighbours: Neighbours::new(),
            affinity: Buffer::new(),
            fresh: 0,
            reciprocal: Buffer::new(),
            best: Buffer::new(),
            order: Vec::new(),
            places: Vec::new(),
            gaps: 0,
            log: None,
            #[cfg(test)]
            merges: Vec::new(),
            #[cfg(test)]
            looks: 0,
        }
    }

    /// Makes it empty, for these sizes.
    pub(crate) fn prepare(&mut self, head_dim: usize, value_dim: usize) {
        self.slots.prepare(head_dim, value_dim, room_for(0, self.most_slots()));
        self.distances.prepare(&self.rule.metric, &self.slots);
        self.resize_columns();
        self.units.squared_queries.resize(head_dim, T::zero());
        self.reset();
    }

    /// The entries of the rule, and those that come before a merge.
    pub(crate) fn most_slots(&self) -> usize {
        self.rule.entries + self.rule.spare
    }

    /// What there is of each slot, or each pair of slots: of any content.
    fn resize_columns(&mut self) {
        let capacity = self.slots.capacity;
        self.weights.resize(capacity);
        self.reciprocal.resize(capacity);
        self.counts.resize(capacity, 0.0);
        self.distances.make_room(capacity);
        if self.is_by_neighbours() {
            self.neighbours.make_room(capacity);
        } else {
            self.affinity.resize(capacity * capacity);
            self.best.resize(capacity);
            self.places.resize(capacity, 0);
            self.order.reserve(capacity);
        }
    }

    /// Whether one pair is merged at a time.
    pub(super) fn is_by_neighbours(&self) -> bool {
        self.rule.block == 1
    }

    /// Sets 1/a, of a gap as well, whose affinities are zero.
    pub(super) fn set_reciprocals(&mut self) {
        let least = T::from_f64(self.rule.cost.least_weight());
        for (r, &w) in self.reciprocal.iter_mut().zip(&*self.weights).take(self.held) {
            *r = (w + least).recip();
        }
        self.reciprocal[self.held..].fill(T::zero());
    }

    /// Makes room for one more entry.
    pub(crate) fn make_room(&mut self) {
        if self.held < self.slots.capacity {
            return;
        }
        self.slots.grow(room_for(self.held + 1, self.most_slots()));
        self.weights.grow(self.slots.capacity);
        self.resize_columns();
        if !self.is_by_neighbours() || matches!(self.rule.metric, Distance::Matrix(_)) {
            self.fresh = 0; // what is known of distances lay elsewhere
        }
    }

    /// Forgets every token.
    pub fn reset(&mut self) {
        self.weights.fill(T::zero());
        self.affinity.fill(T::zero());
        self.neighbours.clear();
        self.slots.bias.fill(T::neg_infinity());
        self.counts.fill(0.0);
        self.units.squared_queries.fill(T::zero());
        (self.units.tokens, self.units.squared_values) = (0, T::zero());
        (self.held, self.absorbed, self.fresh) = (0, 0, 0);
        #[cfg(test)]
        self.merges.clear();
    }

    pub(crate) fn copy_from(&mut self, other: &Self) {
        self.rule.clone_from(&other.rule);
        self.slots.copy_from(&other.slots);
        self.weights.resize(other.weights.len());
        self.weights.copy_from_slice(&other.weights);
        self.resize_columns();
        self.distances.copy_from(&other.distances);
        self.neighbours.copy_from(&other.neighbours);
        self.affinity.resize(other.affinity.len());
        self.affinity.copy_from_slice(&other.affinity);
        self.counts.clone_from(&other.counts);
        self.units.squared_queries.clone_from(&other.units.squared_queries);
        (self.units.tokens, self.units.squared_values) =
            (other.units.tokens, other.units.squared_values);
        (self.held, self.absorbed, self.fresh) = (other.held, other.absorbed, other.fresh);
    }

    /// Slots to read: all entries and what pads them.
    pub(crate) fn used(&self) -> usize {
        padded::<T>(self.held)
    }

    /// Whether the first tokens set the units of keys.
    pub(super) fn has_query_units(&self) -> bool {
        matches!(self.rule.metric, Distance::QueryDiagonal) && self.rule.query_squares.is_none()
    }

    /// Whether the first tokens set the units of values.
    pub(super) fn has_value_units(&self) -> bool {
        self.rule.cost.counts_values() && self.rule.value_square.is_none()
    }

    /// Whether another token may change the units.
    pub(super) fn is_finding_units(&self) -> bool {
        self.units.tokens < METRIC_TOKENS && (self.has_query_units() || self.has_value_units())
    }

    /// Takes one token into the units of the metric: its queries (a row for each head of the group)
    /// and its value.
    #[allow(clippy::cast_precision_loss)] // heads of a group
    pub(crate) fn observe<'a>(
        &mut self,
        queries: impl ExactSizeIterator<Item = ArrayView1<'a, T>>,
        value: ArrayView1<'_, T>,
    ) {
        if !self.is_finding_units() {
            return;
        }
        self.units.tokens += 1;
        if self.has_value_units() {
            let columns = self.rule.value_columns.unwrap_or(value.len());
            let squared = value.iter().take(columns).fold(T::zero(), |sum, &x| sum + x * x);
            self.units.squared_values = (self.units.squared_values + squared).min(T::max_value());
        }
        if self.has_query_units() {
            let share = T::from_f64(1.0 / queries.len() as f64);
            for q in queries {
                for (sum, &x) in self.units.squared_queries.iter_mut().zip(q) {
                    *sum = (*sum + share * (x * x)).min(T::max_value());
                }
            }
        }
        self.fresh = 0; // other units, other distances
    }

    /// The slot behind the entries has been filled: makes it an entry.
    pub(crate) fn enter(&mut self, weight: T) {
        debug_assert!(self.held < self.slots.capacity);
        self.counts[self.held] = 1.0;
        self.weights[self.held] = weight.max(Self::least_weight()).min(T::max_value().sqrt());
        self.held += 1;
        self.absorbed += 1;
    }

    /// Weights that decay end here, before they become denormal.
    pub(crate) fn least_weight() -> T {
        T::from_f64(if T::NAME == "f32" { 1e-20 } else { 1e-150 })
    }

    /// The weight of a token that received `attention` in the window.
    pub(crate) fn weight_of(attention: T) -> T {
        attention + T::from_f64(LEAST_WEIGHT)
    }

    /// After a read in which entry `i` received the probability `Σ_g factors_g·p_gi`:
    /// `a_i ← decay·a_i + it`.
    pub(crate) fn receive(&mut self, decay: T, factors: &[T], p: &[T], ld: usize) {
        let used = self.used();
        kernel::receive(&mut self.weights[..used], decay, Self::least_weight(), factors, p, ld);
        self.weights[self.held..].fill(T::zero());
        if self.is_by_neighbours() {
            self.neighbours.grow(used, decay);
        }
    }
}
