//! How far entries lie apart in the units of the rule: `1/distance` of one or two entries to all.

use crate::kernel;
use crate::kernel::buffer::padded;
use crate::memory::merged::distances::Distances;
use crate::memory::merged::entries::MergedMemory;
use crate::memory::merged::rule::{Distance, MergeCost};
use crate::scalar::Scalar;

/// What a sum of squares is cut off at: products of two of them stay in range.
fn most<T: Scalar>() -> T {
    T::from_f64(if T::NAME == "f32" { 1e18 } else { 1e150 })
}

/// The least distance: of what is nearer, the first pair is merged. Times the smallest sum of
/// weights its inverse is still in range.
fn least<T: Scalar>(cost: MergeCost) -> T {
    T::from_f64(match (cost, T::NAME == "f32") {
        (MergeCost::Product, true) => 1e-28,
        (MergeCost::Product, false) => 1e-290,
        (MergeCost::Ward { .. }, true) => 1e-18,
        (MergeCost::Ward { .. }, false) => 1e-148,
    })
}

impl<T: Scalar> MergedMemory<T> {
    /// Sets the factors by the units that are known now.
    #[allow(clippy::cast_precision_loss)] // tokens and columns
    pub(super) fn set_factors(&mut self) {
        let Self { rule, units, slots, distances, .. } = self;
        let product = rule.cost == MergeCost::Product;
        let tokens = units.tokens.max(1) as f64;
        let in_range = |x: f64| T::from_f64(if T::from_f64(x).is_finite() { x } else { 0.0 });
        distances.key_factors.fill(in_range(rule.scale));
        if matches!(rule.metric, Distance::QueryDiagonal) {
            let fixed = rule.query_squares.as_deref();
            // of scaled queries
            let square = |c: usize| {
                fixed.map_or_else(
                    || units.squared_queries[c].as_f64() / tokens * rule.scale,
                    |all| all[c],
                )
            };
            let mean = (0..slots.head_dim).map(square).sum::<f64>() / slots.head_dim as f64;
            let unit = if product { 1.0 } else { mean };
            if unit > 0.0 && unit.is_finite() {
                for (c, factor) in distances.key_factors.iter_mut().enumerate() {
                    *factor = in_range(rule.scale * square(c) / unit);
                }
            }
        }
        let square = rule.value_square.unwrap_or_else(|| units.squared_values.as_f64() / tokens);
        let weight =
            if let MergeCost::Ward { value_weight } = rule.cost { value_weight } else { 1.0 };
        let columns = rule.value_columns.unwrap_or(slots.value_dim).min(slots.value_dim);
        let factor = in_range((weight / square).sqrt());
        (distances.value_factor, distances.value_columns) = (factor, columns);
    }

    /// Notes an entry that is new or has changed.
    pub(super) fn project(&mut self, entry: usize) {
        let Distance::Matrix(metric) = &self.rule.metric else { return };
        let Self {
            slots, distances: Distances { metric: by_columns, projected, keys, .. }, ..
        } = self;
        // squares of numbers within this limit can be summed
        let limit = T::max_value().sqrt() * T::from_f64(1e-4);
        let (key, point) = keys.split_at_mut(slots.head_dim.max(metric.nrows()));
        let clamped = slots.key(entry).map(|x| x.max(-limit).min(limit));
        key.iter_mut().zip(clamped).for_each(|(to, x)| *to = x);
        let (rows, point) = (padded::<T>(metric.nrows()), &mut point[..metric.nrows()]);
        kernel::row_times_matrix(&key[..slots.head_dim], by_columns, rows, point);
        let column = projected[entry..].iter_mut().step_by(slots.capacity);
        column.zip(&*point).for_each(|(to, &x)| *to = x);
    }

    /// Measures one or two entries against all: afterwards row `p` of
    /// [`closeness`](Distances::closeness), rows `used` long, holds `1/distance` of entry `p`.
    pub(super) fn measure(&mut self, entries: &[usize]) {
        let (used, held) = (self.used(), self.held);
        let Self { rule, slots, distances, counts, gaps, .. } = self;
        if slots.packed().is_some() {
            distances.squares_of_packed(slots, rule.cost, entries, used);
        } else {
            distances.squares(slots, rule.cost, entries, used);
        }
        let Distances { key_squares, closeness, .. } = distances;
        let key_squares = &key_squares[..entries.len() * used];
        let closeness = &mut closeness[..entries.len() * used];
        let (least, most, quarter) = (least::<T>(rule.cost), most::<T>(), T::from_f64(0.25));
        let product = rule.cost == MergeCost::Product;
        for (closeness, &square) in closeness.iter_mut().zip(key_squares) {
            // a NaN is cut off as well
            let (square, value) = (square.min(most), closeness.min(most));
            let distance =
                if product { square * (value + quarter * square) } else { square + value };
            *closeness = distance.max(least).recip();
        }
        for (&entry, row) in entries.iter().zip(closeness.chunks_exact_mut(used)) {
            row[held..].fill(T::zero());
            row[entry] = T::zero();
            if *gaps > 0 {
                let all = row.iter_mut().zip(&*counts);
                all.filter(|(_, count)| **count == 0.0).for_each(|(x, _)| *x = T::zero());
            }
        }
    }
}
