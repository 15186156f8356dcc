//! Merging memory: a bounded set of mean keys and mean values; the two entries whose union costs
//! least become one.

pub(crate) mod affinities;
mod distances;
pub(crate) mod entries;
mod measure;
mod neighbours;
mod recent;
pub(crate) mod reduce;
mod row;
pub(crate) mod rule;
mod save;
mod search;

use crate::check;
use crate::error::Error;
use crate::memory::Memory;
use crate::memory::answer::in_range;
use crate::memory::merged::entries::MergedMemory;
use crate::memory::merged::rule::{Distance, MergeCost, Rule, check_entries};
use crate::memory::partial::Partial;
use crate::memory::slots::{Reading, attend};
use crate::scalar::Scalar;
use crate::state_format::StateFormat;
use crate::views;
use ndarray::{Array2, ArrayView1, ArrayView2};
use std::sync::Arc;

/// Rows that are answered at once.
const QUERY_BLOCK: usize = 32;

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
            cost: MergeCost::Ward { value_weight: 0.0 },
            query_squares: None,
            value_square: None,
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
        check::size("metric", "columns", self.slots.head_dim, metric.ncols())?;
        check::at_least_one("metric rows", metric.nrows())?;
        check::finite("metric", metric.view())?;
        if self.absorbed > 0 {
            let why = "distances of its entries are known already; set it before the first token";
            return Err(Error::Unsupported { what: "another metric", why });
        }
        self.rule.metric = Distance::Matrix(Arc::new(metric));
        self.prepare(self.slots.head_dim, self.slots.value_dim);
        Ok(self)
    }

    /// Keeps the means of keys and values in this format: rounded when a token comes, and anew
    /// after each merge; distances are taken of what is kept.
    ///
    /// # Errors
    ///
    /// The memory must be empty: [`Error::Unsupported`] if it is not.
    pub fn with_state_format(mut self, format: StateFormat) -> Result<Self, Error> {
        if self.absorbed > 0 {
            let why = "its entries are rounded already, or not; set it before the first token";
            return Err(Error::Unsupported { what: "another format", why });
        }
        self.slots.set_format(format);
        self.prepare(self.slots.head_dim, self.slots.value_dim);
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
        check::size("v", "columns", self.slots.value_dim, v.ncols())?;
        check::keys_values(self.slots.head_dim, k, v)?;
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
            self.make_room();
            self.slots.put(self.held, k, v);
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
        rows(self.slots.head_dim, (0..self.held).map(|i| self.slots.key(i)))
    }

    /// The mean values `[entries, value_dim]`.
    #[must_use]
    pub fn values(&self) -> Array2<T> {
        rows(self.slots.value_dim, (0..self.held).map(|i| self.slots.value(i)))
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

    /// Tokens absorbed so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.absorbed
    }

    /// Whether no token has been absorbed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.absorbed == 0
    }
}

/// Rows of so many columns as an array.
fn rows<T: Scalar, R: Iterator<Item = T>>(
    columns: usize,
    rows: impl Iterator<Item = R>,
) -> Array2<T> {
    let numbers: Vec<T> = rows.flatten().collect();
    Array2::from_shape_vec((numbers.len() / columns, columns), numbers).expect("whole rows")
}

impl<T: Scalar> Memory<T> for MergedMemory<T> {
    fn absorb(&mut self, k: ArrayView2<'_, T>, v: ArrayView2<'_, T>) -> Result<(), Error> {
        let ones = ndarray::Array1::ones(k.nrows());
        self.absorb_weighted(k, v, ones.view())
    }

    fn read(&self, q: ArrayView2<'_, T>, answer: &mut Partial<T>) -> Result<(), Error> {
        check::queries(self.slots.head_dim, q)?;
        check::size("answer", "rows", q.nrows(), answer.numerator.nrows())?;
        check::size("answer", "columns", self.slots.value_dim, answer.numerator.ncols())?;
        let mut reading = Reading::new();
        let factor = T::from_f64(self.rule.scale * core::f64::consts::LOG2_E);
        let used = self.used();
        for start in (0..q.nrows()).step_by(QUERY_BLOCK) {
            let q = views::rows(q, start..q.nrows().min(start + QUERY_BLOCK));
            reading.prepare(q.nrows(), q.ncols(), used, self.slots.value_dim);
            in_range(used, |share| {
                for (row, q) in q.outer_iter().enumerate() {
                    reading.set_query(row, q, factor);
                    reading.row(row).copy_from_slice(&self.slots.bias[..used]);
                }
                attend(&[(&self.slots, used)], q.nrows(), None, share, &mut reading);
                reading.answer.add_in_range_to(answer, start)
            })?;
        }
        Ok(())
    }

    fn state_floats(&self) -> usize {
        self.floats()
    }

    fn state_bytes(&self) -> usize {
        self.bytes()
    }
}
