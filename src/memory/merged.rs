//! Merging memory: a bounded set of mean keys and mean values; the two entries whose union costs
//! least become one.

use super::slab::{Reading, Slab, attend};
use super::{Memory, Partial};
use crate::kernel;
use crate::kernel::buffer::{Buffer, padded};
use crate::{Error, Scalar, check, views};
use ndarray::{Array2, ArrayView1, ArrayView2};
use std::sync::Arc;

/// Tokens whose queries and values set the units of the metric.
pub(crate) const METRIC_TOKENS: usize = 64;

/// What a token that leaves the window weighs at least.
const LEAST_WEIGHT: f64 = 1e-9;

/// Where a number that is sorted holds its entry: there are no more of them, and 32 bits of the
/// mantissa are left.
const ENTRY_BITS: u64 = (1 << 20) - 1;

/// A memory, or a pool of them, holds the distances of all pairs: at 2^14 entries a gigabyte of
/// `f32`.
const MOST_ENTRIES: usize = 1 << 14;

/// Refuses more entries than a memory can have.
pub(crate) fn check_entries(entries: usize) -> Result<(), Error> {
    if entries <= MOST_ENTRIES {
        return Ok(());
    }
    let needed = "at most 16384, with the tokens of a block and over all heads of a pool";
    Err(Error::InvalidOption { which: "entries", found: entries.to_string(), needed })
}

/// Rows that are answered at once.
const QUERY_BLOCK: usize = 32;

/// How distances between keys are measured where entries are merged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Metric {
    /// `‖Δk̄‖²`.
    Identity,
    /// `Σ_c r_c Δk̄_c²`, with `r_c` the mean of `q̂_c²` over the first 64 tokens behind the sinks
    /// (and the query heads of the group), scaled to mean 1, then fixed: directions in which
    /// queries vary count more.
    #[default]
    QueryDiagonal,
}

/// The rule by which entries are merged, with everything a memory needs to know.
#[derive(Clone, Debug)]
pub(crate) struct Rule {
    /// Entries that stay after merging, and how many more may be there before.
    pub(crate) entries: usize,
    pub(crate) spare: usize,
    /// Tokens that arrive at once: 1 merges pair by pair, more in rounds of mutual nearest pairs.
    pub(crate) block: usize,
    pub(crate) metric: Distance,
    /// The factor of `‖Δv̄‖²/ρ²`.
    pub(crate) value_weight: f64,
    /// Value columns that count there: `None` for all of them.
    pub(crate) value_columns: Option<usize>,
    /// The factor of `q·k`.
    pub(crate) scale: f64,
}

/// See [`Metric`].
#[derive(Clone, Debug)]
pub(crate) enum Distance {
    Identity,
    QueryDiagonal,
    /// `‖R(k̄_i − k̄_j)‖²`.
    Matrix(Arc<Array2<f64>>),
}

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
    pub(crate) slab: Slab<T>,
    /// Entries now.
    pub(crate) held: usize,
    counts: Vec<f64>,
    pub(crate) weights: Buffer<T>,
    absorbed: usize,
    units: Units<T>,
    /// What distances are taken of, entries as columns; and `1/distance²` of every pair, zero on
    /// the diagonal and beyond the entries. Both follow from the entries; those from `fresh` on are
    /// not yet there.
    points: Buffer<T>,
    affinity: Buffer<T>,
    fresh: usize,
    /// `Rᵀ`, rows padded, if distances are taken through a matrix.
    metric: Buffer<T>,
    /// Scratch: factors of the coordinates, a point, its distances, 1/a, the best of each row.
    factors: Buffer<T>,
    point: Buffer<T>,
    distance: Buffer<T>,
    reciprocal: Buffer<T>,
    best: Buffer<T>,
    order: Vec<u64>,
    places: Vec<usize>,
    /// Entries that are gone while pairs are merged in rounds.
    gaps: usize,
    #[cfg(test)]
    pub(crate) merges: Vec<[usize; 2]>,
}

/// Sums over the first tokens, which set the units of keys and values.
#[derive(Clone, Debug)]
struct Units<T> {
    tokens: usize,
    squared_values: T,
    squared_queries: Vec<T>,
}

impl<T: Scalar> MergedMemory<T> {
    /// An empty memory of at most `entries` entries, with weights `exp(scale·q·k)` and distances
    /// `‖Δk̄‖²`.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if a size is 0, [`Error::InvalidOption`] if `scale` is not positive and
    /// finite or there are more than 16 384 entries.
    pub fn new(
        head_dim: usize,
        value_dim: usize,
        entries: usize,
        scale: f64,
    ) -> Result<Self, Error> {
        check::at_least_one("head_dim", head_dim)?;
        check::at_least_one("value_dim", value_dim)?;
        check_entries(entries.saturating_add(1))?;
        check::at_least_one("entries", entries)?;
        let scale = check::scale::<T>(Some(scale), head_dim)?;
        let rule = Rule {
            entries,
            spare: 1,
            block: 1,
            metric: Distance::Identity,
            value_weight: 0.0,
            value_columns: None,
            scale,
        };
        let mut memory = Self::with_rule(rule);
        memory.prepare(head_dim, value_dim);
        Ok(memory)
    }

    /// Measures distances as `‖R(k̄_i − k̄_j)‖²` with the matrix `R [any, head_dim]`.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if `metric` has another number of columns, [`Error::NotFinite`] if it holds
    /// NaN or infinity. The memory must be empty: [`Error::Unsupported`] if it is not.
    pub fn with_metric(mut self, metric: Array2<f64>) -> Result<Self, Error> {
        check::size("metric", "columns", self.slab.head_dim, metric.ncols())?;
        check::at_least_one("metric rows", metric.nrows())?;
        check::finite("metric", metric.view())?;
        if self.absorbed > 0 {
            let why = "distances of its entries are known already; set it before the first token";
            return Err(Error::Unsupported { what: "another metric", why });
        }
        self.rule.metric = Distance::Matrix(Arc::new(metric));
        self.prepare(self.slab.head_dim, self.slab.value_dim);
        Ok(self)
    }

    /// Takes tokens in that weigh `weights [n]` where entries are merged: the attention expected,
    /// or received.
    ///
    /// # Errors
    ///
    /// As [`absorb`](Memory::absorb); [`Error::InvalidOption`] if a weight is not positive and
    /// finite.
    pub fn absorb_weighted(
        &mut self,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        weights: ArrayView1<'_, T>,
    ) -> Result<(), Error> {
        check::size("v", "columns", self.slab.value_dim, v.ncols())?;
        check::keys_values(self.slab.head_dim, k, v)?;
        check::size("weights", "elements", k.nrows(), weights.len())?;
        if let Some(bad) = weights.iter().find(|w| !(w.is_finite() && **w > T::zero())) {
            let found = bad.to_string();
            return Err(Error::InvalidOption {
                which: "weights",
                found,
                needed: "positive finite numbers",
            });
        }
        for ((k, v), &weight) in k.outer_iter().zip(v.outer_iter()).zip(weights) {
            self.slab.put(self.held, k, v);
            self.enter(weight);
            self.reduce();
        }
        Ok(())
    }

    /// Entries now.
    #[must_use]
    pub fn entries(&self) -> usize {
        self.held
    }

    /// The mean keys `[entries, head_dim]`.
    #[must_use]
    pub fn keys(&self) -> Array2<T> {
        let number = |(i, c)| self.slab.key(i).nth(c).unwrap_or(T::zero());
        Array2::from_shape_fn((self.held, self.slab.head_dim), number)
    }

    /// The mean values `[entries, value_dim]`.
    #[must_use]
    pub fn values(&self) -> Array2<T> {
        Array2::from_shape_fn((self.held, self.slab.value_dim), |(i, c)| self.slab.value(i)[c])
    }

    /// The number of tokens each entry stands for.
    #[must_use]
    pub fn counts(&self) -> &[f64] {
        &self.counts[..self.held]
    }

    /// The weights of the entries where they are merged.
    #[must_use]
    pub fn weights(&self) -> &[T] {
        &self.weights[..self.held]
    }

    pub(crate) fn with_rule(rule: Rule) -> Self {
        Self {
            rule,
            slab: Slab::new(),
            held: 0,
            counts: Vec::new(),
            weights: Buffer::new(),
            absorbed: 0,
            units: Units { tokens: 0, squared_values: T::zero(), squared_queries: Vec::new() },
            points: Buffer::new(),
            affinity: Buffer::new(),
            fresh: 0,
            metric: Buffer::new(),
            factors: Buffer::new(),
            point: Buffer::new(),
            distance: Buffer::new(),
            reciprocal: Buffer::new(),
            best: Buffer::new(),
            order: Vec::new(),
            places: Vec::new(),
            gaps: 0,
            #[cfg(test)]
            merges: Vec::new(),
        }
    }

    /// Makes it empty, for these sizes.
    pub(crate) fn prepare(&mut self, head_dim: usize, value_dim: usize) {
        self.slab.prepare(head_dim, value_dim, self.rule.entries + self.rule.spare);
        let capacity = self.slab.capacity;
        self.weights.resize(capacity);
        self.points.resize(self.coordinates() * capacity);
        self.affinity.resize(capacity * capacity);
        self.distance.resize(capacity.max(head_dim));
        self.reciprocal.resize(capacity);
        self.best.resize(capacity);
        self.factors.resize(self.coordinates());
        self.point.resize(self.coordinates().max(head_dim));
        if let Distance::Matrix(metric) = &self.rule.metric {
            let rows = padded::<T>(metric.nrows());
            self.metric.resize(head_dim * rows);
            self.metric.fill(T::zero());
            for ((row, column), &x) in metric.indexed_iter() {
                self.metric[column * rows + row] = T::from_f64(x);
            }
        }
        self.counts.resize(capacity, 0.0);
        self.places.resize(capacity, 0);
        self.order.reserve(capacity);
        self.units.squared_queries.resize(head_dim, T::zero());
        self.clear();
    }

    fn clear(&mut self) {
        self.weights.fill(T::zero());
        self.points.fill(T::zero());
        self.affinity.fill(T::zero());
        self.slab.bias.fill(T::neg_infinity());
        self.counts.fill(0.0);
        self.units.squared_queries.fill(T::zero());
        (self.units.tokens, self.units.squared_values) = (0, T::zero());
        (self.held, self.absorbed, self.fresh) = (0, 0, 0);
        #[cfg(test)]
        self.merges.clear();
    }

    pub(crate) fn copy_from(&mut self, other: &Self) {
        self.rule.clone_from(&other.rule);
        self.slab.copy_from(&other.slab);
        self.weights.resize(other.weights.len());
        self.weights.copy_from_slice(&other.weights);
        // points and distances follow from the entries, when they are next needed
        self.points.resize(other.points.len());
        self.affinity.resize(other.affinity.len());
        self.metric.resize(other.metric.len());
        self.metric.copy_from_slice(&other.metric);
        self.distance.resize(other.distance.len());
        self.reciprocal.resize(other.reciprocal.len());
        self.best.resize(other.best.len());
        self.factors.resize(other.factors.len());
        self.point.resize(other.point.len());
        self.places.resize(other.places.len(), 0);
        self.counts.clone_from(&other.counts);
        self.units.squared_queries.clone_from(&other.units.squared_queries);
        (self.units.tokens, self.units.squared_values) =
            (other.units.tokens, other.units.squared_values);
        (self.held, self.absorbed, self.fresh) = (other.held, other.absorbed, 0);
    }

    /// Coordinates of a point.
    fn coordinates(&self) -> usize {
        let keys = match &self.rule.metric {
            Distance::Identity | Distance::QueryDiagonal => self.slab.head_dim,
            Distance::Matrix(metric) => metric.nrows(),
        };
        keys + self.value_columns()
    }

    fn value_columns(&self) -> usize {
        if self.rule.value_weight > 0.0 {
            self.rule
                .value_columns
                .map_or(self.slab.value_dim, |columns| columns.min(self.slab.value_dim))
        } else {
            0
        }
    }

    /// Slots to read: all entries and what pads them.
    pub(crate) fn used(&self) -> usize {
        padded::<T>(self.held)
    }

    /// Whether distances depend on the first tokens.
    fn has_units(&self) -> bool {
        self.value_columns() > 0 || matches!(self.rule.metric, Distance::QueryDiagonal)
    }

    /// Takes one token into the units of the metric: its queries (a row for each head of the group)
    /// and its value.
    pub(crate) fn observe<'a>(
        &mut self,
        queries: impl Iterator<Item = ArrayView1<'a, T>>,
        value: ArrayView1<'_, T>,
    ) {
        if self.units.tokens >= METRIC_TOKENS || !self.has_units() {
            return;
        }
        self.units.tokens += 1;
        let columns = self.value_columns();
        let squared = value.iter().take(columns).fold(T::zero(), |sum, &x| sum + x * x);
        self.units.squared_values = (self.units.squared_values + squared).min(T::max_value());
        if matches!(self.rule.metric, Distance::QueryDiagonal) {
            for q in queries {
                for (sum, &x) in self.units.squared_queries.iter_mut().zip(q) {
                    *sum = (*sum + x * x).min(T::max_value());
                }
            }
        }
        self.fresh = 0; // other units, other distances
    }

    /// The slot behind the entries has been filled: makes it an entry.
    pub(crate) fn enter(&mut self, weight: T) {
        debug_assert!(self.held < self.slab.capacity);
        self.counts[self.held] = 1.0;
        self.weights[self.held] = weight.max(Self::least_weight()).min(T::max_value().sqrt());
        self.held += 1;
        self.absorbed += 1;
    }

    /// Weights that decay end here, before they become denormal.
    pub(crate) fn least_weight() -> T {
        T::from_f64(if T::NAME == "f32" { 1e-20 } else { 1e-150 })
    }

    /// The largest inverse squared distance: of what is nearer, the first pair is merged.
    fn largest_affinity() -> T {
        Self::least_weight().recip() * T::from_f64(0.01)
    }

    /// The weight of a token that received `attention` in the window.
    pub(crate) fn weight_of(attention: T) -> T {
        attention + T::from_f64(LEAST_WEIGHT)
    }

    /// Sets the factors of the coordinates. Distances are in units in which keys count as they are;
    /// these units do not change what is least.
    #[allow(clippy::cast_precision_loss)]
    fn set_factors(&mut self) {
        let (head_dim, columns) = (self.slab.head_dim, self.value_columns());
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
    fn refresh(&mut self, entry: usize) {
        let columns = self.value_columns();
        let keys = self.factors.len() - columns;
        // squares of numbers within this limit can be summed
        let limit = T::max_value().sqrt() * T::from_f64(1e-4);
        let clamp = |x: T| x.max(-limit).min(limit); // a NaN as well
        let Self { slab, points, point, factors, affinity, distance, metric, .. } = self;
        match &self.rule.metric {
            Distance::Identity | Distance::QueryDiagonal => {
                point.iter_mut().zip(slab.key(entry)).for_each(|(to, x)| *to = x);
            }
            Distance::Matrix(_) => {
                distance.iter_mut().zip(slab.key(entry)).for_each(|(to, x)| *to = clamp(x));
                let rows = padded::<T>(keys);
                kernel::row_times_matrix(
                    &distance[..slab.head_dim],
                    metric,
                    rows,
                    &mut point[..keys],
                );
            }
        }
        point[keys..keys + columns].copy_from_slice(&slab.value(entry)[..columns]);
        point.iter_mut().zip(&**factors).for_each(|(x, &factor)| *x = clamp(*x * factor));
        let capacity = slab.capacity;
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
            self.slab.capacity,
            &mut self.best[..self.held],
        );
    }

    fn affinity_of(&self, i: usize, j: usize) -> T {
        (self.reciprocal[i] + self.reciprocal[j]) * self.affinity[i * self.slab.capacity + j]
    }

    /// What is as good as `best` but for rounding.
    fn tied(best: T) -> T {
        best * (T::one() - T::epsilon() * T::from_f64(64.0))
    }

    /// The pair of least cost; of equal ones the lowest first entry, then the lowest second. `None`
    /// if all but `least` entries are gone.
    fn best_pair(&mut self, least: usize) -> Option<(T, usize, usize)> {
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

    /// Makes entry `i` the mean of both; entry `j` remains.
    fn merge_into(&mut self, i: usize, j: usize) {
        let share = self.weights[j] / (self.weights[i] + self.weights[j]);
        let mean = |x: T, y: T| {
            let difference = y - x;
            if difference.is_finite() {
                x + share * difference
            } else {
                x * (T::one() - share) + y * share
            }
        };
        // columns of the slab are apart: a copy of one
        let Self { slab, point, .. } = self;
        point.iter_mut().zip(slab.key(j)).for_each(|(to, x)| *to = x);
        slab.key_mut(i).zip(&**point).for_each(|(x, &y)| *x = mean(*x, y));
        for c in 0..slab.value_dim {
            let y = slab.value(j)[c];
            let x = &mut slab.value_mut(i)[c];
            *x = mean(*x, y);
        }
        self.counts[i] += self.counts[j];
        let added = self.weights[j];
        self.weights[i] = (self.weights[i] + added).min(T::max_value().sqrt());
        slab.bias[i] = T::from_f64(libm::log2(self.counts[i]));
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
        self.slab.move_slot(from, to);
        self.counts[to] = self.counts[from];
        self.weights[to] = self.weights[from];
        for row in self.points.chunks_exact_mut(self.slab.capacity) {
            row[to] = row[from];
        }
    }

    /// Ends at `len` entries; what lies beyond is empty.
    fn truncate(&mut self, len: usize) {
        for slot in len..self.held {
            self.slab.empty(slot);
            self.weights[slot] = T::zero();
            let column = self.affinity[slot..].iter_mut().step_by(self.slab.capacity);
            column.take(self.held).for_each(|x| *x = T::zero());
        }
        self.held = len;
        self.fresh = self.fresh.min(len);
    }

    /// Merges a pair; the last entry takes the place of the second.
    fn merge_pair(&mut self, i: usize, j: usize) {
        self.note(i, j);
        self.merge_into(i, j);
        let (last, capacity) = (self.held - 1, self.slab.capacity);
        if j != last {
            self.move_entry(last, j);
            self.affinity.copy_within(last * capacity..(last + 1) * capacity, j * capacity);
            for row in self.affinity.chunks_exact_mut(capacity).take(self.held) {
                row[j] = row[last];
            }
            self.affinity[j * capacity + j] = T::zero();
        }
        self.truncate(last);
        self.refresh(i);
    }

    /// Merges a pair; the place of the second stays empty until [`close_gaps`](Self::close_gaps).
    fn merge_leaving_gap(&mut self, i: usize, j: usize) {
        self.merge_into(i, j);
        let capacity = self.slab.capacity;
        self.slab.empty(j);
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
        let (capacity, len) = (self.slab.capacity, self.held);
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

    /// Merges until the bound is kept.
    pub(crate) fn reduce(&mut self) {
        let (budget, block) = (self.rule.entries, self.rule.block);
        reduce(core::slice::from_mut(self), budget, 1, block, &mut Vec::new());
    }

    /// After a read in which entry `i` received the probability `Σ_g factors_g·p_gi`:
    /// `a_i ← decay·a_i + it`.
    pub(crate) fn receive(&mut self, decay: T, factors: &[T], p: &[T], ld: usize) {
        let used = self.used();
        kernel::receive(&mut self.weights[..used], decay, Self::least_weight(), factors, p, ld);
        self.weights[self.held..].fill(T::zero());
    }

    /// What has to be kept to go on from here: the entries, then the sums that set the units.
    pub(crate) fn numbers(&self, out: &mut Vec<T>) {
        for entry in 0..self.held {
            out.extend(self.slab.key(entry));
            out.extend(self.slab.value(entry));
            out.extend([T::from_f64(self.counts[entry]), self.weights[entry]]);
        }
        out.push(self.units.squared_values);
        out.extend(&self.units.squared_queries);
    }

    /// How many [`numbers`](Self::numbers) there are, of so many entries.
    pub(crate) fn count_numbers(&self, entries: usize) -> usize {
        entries * (self.slab.head_dim + self.slab.value_dim + 2) + 1 + self.slab.head_dim
    }

    /// The inverse; `seen` tokens have been observed. `false` if the numbers are none of a memory.
    pub(crate) fn set_numbers(
        &mut self,
        entries: usize,
        absorbed: usize,
        seen: usize,
        numbers: &[T],
    ) -> bool {
        self.clear();
        let (d, dv) = (self.slab.head_dim, self.slab.value_dim);
        let (all, units) = numbers.split_at(entries * (d + dv + 2));
        for (slot, entry) in all.chunks_exact(d + dv + 2).enumerate() {
            if slot >= self.slab.capacity
                || !(entry[d + dv] >= T::one() && entry[d + dv + 1] > T::zero())
            {
                return false;
            }
            self.slab.put(slot, ArrayView1::from(&entry[..d]), ArrayView1::from(&entry[d..d + dv]));
            self.enter(entry[d + dv + 1]);
            self.counts[slot] = entry[d + dv].as_f64();
            self.slab.bias[slot] = T::from_f64(libm::log2(self.counts[slot]));
        }
        self.absorbed = absorbed;
        if units.iter().any(|&sum| sum < T::zero()) {
            return false;
        }
        if let Some((&values, queries)) = units.split_first() {
            self.units.squared_values = values;
            self.units.squared_queries.copy_from_slice(queries);
        }
        self.units.tokens = if self.has_units() { seen.min(METRIC_TOKENS) } else { 0 };
        true
    }

    /// Numbers of the state: d + d_v + 2 of each entry, and the units of the metric.
    pub(crate) fn floats(&self) -> usize {
        let (d, dv) = (self.slab.head_dim, self.slab.value_dim);
        let queries = if matches!(self.rule.metric, Distance::QueryDiagonal) { d } else { 0 };
        self.rule.entries * (d + dv + 2) + queries + usize::from(self.value_columns() > 0)
    }
}

/// Two entries of one of several memories, and how little it costs to merge them.
#[derive(Clone, Debug)]
pub(crate) struct Pair<T> {
    affinity: T,
    head: usize,
    i: usize,
    j: usize,
}

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

fn descending<T: Scalar>(a: T, b: T) -> core::cmp::Ordering {
    b.partial_cmp(&a).unwrap_or(core::cmp::Ordering::Equal)
}

impl<T: Scalar> MergedMemory<T> {
    /// Adds the pairs of entries that are the nearest to each other: the `most` that cost least,
    /// and no more than leave `least` entries.
    fn mutual_pairs(&mut self, head: usize, least: usize, most: usize, pairs: &mut Vec<Pair<T>>) {
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
        let row = &self.affinity[i * self.slab.capacity..][..self.held];
        let mut all = row.iter().zip(&self.reciprocal[..self.held]).enumerate();
        all.find(|&(j, (&affinity, &other))| is_other(j) && (own + other) * affinity >= enough)
            .map(|(j, _)| j)
    }
}

impl<T: Scalar> Memory<T> for MergedMemory<T> {
    fn absorb(&mut self, k: ArrayView2<'_, T>, v: ArrayView2<'_, T>) -> Result<(), Error> {
        let ones = ndarray::Array1::ones(k.nrows());
        self.absorb_weighted(k, v, ones.view())
    }

    fn read(&self, q: ArrayView2<'_, T>, answer: &mut Partial<T>) -> Result<(), Error> {
        check::queries(self.slab.head_dim, q)?;
        check::size("answer", "rows", q.nrows(), answer.numerator.nrows())?;
        check::size("answer", "columns", self.slab.value_dim, answer.numerator.ncols())?;
        let mut reading = Reading::new();
        let factor = T::from_f64(self.rule.scale * core::f64::consts::LOG2_E);
        let used = self.used();
        for start in (0..q.nrows()).step_by(QUERY_BLOCK) {
            let q = views::rows(q, start..q.nrows().min(start + QUERY_BLOCK));
            reading.prepare(q.nrows(), q.ncols(), used, self.slab.value_dim);
            for (row, q) in q.outer_iter().enumerate() {
                reading.set_query(row, q, factor);
                reading.row(row).copy_from_slice(&self.slab.bias[..used]);
            }
            attend(&[(&self.slab, used)], q.nrows(), &mut reading);
            if let Some(row) = reading.answer.first_overflow() {
                return Err(Error::Overflow { which: "a score", row: start + row });
            }
            reading.answer.add_to(answer, start);
        }
        Ok(())
    }

    fn len(&self) -> usize {
        self.absorbed
    }

    fn state_floats(&self) -> usize {
        self.floats()
    }

    fn reset(&mut self) {
        self.clear();
    }

    fn clone_box(&self) -> Box<dyn Memory<T>> {
        Box::new(self.clone())
    }
}
