//! One head of keys and values in a backward pass.

use crate::attention::gradient::HeadGradient;
use crate::attention::hybrid::backward::flow::{Flow, KeyValues, Origin};
use crate::attention::hybrid::config::Config;
use crate::attention::hybrid::parameters::SINK_LOGITS;
use crate::mask::Mask;
use crate::memory::scoring::Scoring;
use crate::memory::seen_rows::SeenRows;
use crate::memory::softmax_gradient::Units;
use crate::memory::unit::{Unit, product};
use crate::scalar::Scalar;
use crate::views;
use core::ops::Range;
use ndarray::{ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis};

/// Steps of a block.
pub(super) const BLOCK: usize = 32;

/// A head with what all its blocks have in common.
#[derive(Debug)]
pub(super) struct OneHead<'a, 'b, T: Scalar> {
    pub(super) config: &'a Config<T>,
    pub(super) head: &'a mut HeadGradient<'b, T>,
    pub(super) units: Units,
    pub(super) scoring: Scoring<T>,
    pub(super) mask: Mask,
    /// By the logit of the sink of each query head.
    d_sinks: &'a mut Vec<f64>,
}

impl<'a, 'b, T: Scalar> OneHead<'a, 'b, T> {
    pub(super) fn new(
        config: &'a Config<T>,
        head: &'a mut HeadGradient<'b, T>,
        mask: Mask,
        d_sinks: &'a mut Vec<f64>,
    ) -> Self {
        let units = Units {
            q: Unit::of_all(head.q.outer_iter()),
            k: Unit::of(head.k),
            v: Unit::of(head.v),
            d_out: Unit::of_all(head.d_out.outer_iter()),
        };
        let scale = T::from_f64(config.scale);
        let scoring = Scoring { soft_cap: config.soft_cap, ..Scoring::new(scale) };
        d_sinks.clear();
        d_sinks.resize(head.group_len(), 0.0);
        Self { config, head, units, scoring, mask, d_sinks }
    }

    /// Steps in which tokens leave the window.
    pub(super) fn steps(&self) -> usize {
        self.head.keys() + usize::from(self.mask == Mask::Full)
    }

    /// The step of the first query; those before it have none.
    pub(super) fn first(&self) -> usize {
        self.mask.first([self.head.queries(), self.head.keys()]).unwrap_or(0)
    }

    /// The rows of the queries of some steps.
    pub(super) fn asked(&self, steps: Range<usize>) -> Range<usize> {
        let first = self.first();
        steps.start - first..steps.end - first
    }

    pub(super) fn tokens(&self) -> KeyValues<'b, T> {
        let rest_leaves = self.mask == Mask::Full;
        KeyValues { k: self.head.k, v: self.head.v, units: self.units, rest_leaves }
    }

    /// Some queries of a query head and their cotangents.
    pub(super) fn asking(&self, g: usize, range: Range<usize>) -> [ArrayView2<'b, T>; 2] {
        [self.head.q, self.head.d_out]
            .map(|x| views::rows(x.index_axis_move(Axis(0), g), range.clone()))
    }

    /// Where the gradient by those queries goes.
    pub(super) fn d_q(&mut self, g: usize, range: Range<usize>) -> ArrayViewMut2<'_, T> {
        views::rows_mut(self.head.d_q.index_axis_mut(Axis(0), g), range)
    }

    /// The sum of the weights of a sink times the means.
    pub(super) fn add_sink(&mut self, g: usize, sum: f64) {
        let [first, second] = product::<f64>(1.0, &[self.units.d_out, self.units.v]);
        self.d_sinks[g] -= sum * first * second;
    }

    /// Hands the gradients by the rows of a block on to tokens, and to the entries before it.
    pub(super) fn hand_on(&mut self, flow: &mut Flow<T>) {
        let Flow { rows, origins, near, .. } = flow;
        for (row, origin) in origins.iter().enumerate().rev() {
            match *origin {
                Origin::Mean(pair, share) => rows.split_gradient(row, pair, share),
                Origin::Token(position) => self.add(rows, row, position),
                Origin::Before => {}
            }
        }
        for (i, &position) in near.iter().enumerate() {
            self.add(rows, origins.len() + i, position);
        }
    }

    /// Adds the gradient by a row to that by a token.
    fn add(&mut self, rows: &mut SeenRows<T>, row: usize, position: usize) {
        let Units { q, v, d_out, .. } = self.units;
        let to_k = product(self.scoring.scale.as_f64(), &[d_out, v, q]);
        let [key, value] = rows.gradient(row);
        add_row(self.head.d_k.index_axis_mut(Axis(0), position), key, to_k);
        let to_v = product(1.0, &[d_out]);
        add_row(self.head.d_v.index_axis_mut(Axis(0), position), value, to_v);
    }

    /// Adds the gradients by the sinks.
    pub(super) fn end(self) {
        let d = self.head.d_parameters.as_mut().and_then(|d| d.get_mut(SINK_LOGITS));
        let Some(d) = d else { return };
        for (g, &sum) in self.d_sinks.iter().enumerate() {
            let of_head = if d.len() > 1 { g } else { 0 };
            d.iter_mut().skip(of_head).take(1).for_each(|d| *d += T::from_f64(sum));
        }
    }
}

/// `to += factors·from`.
fn add_row<T: Scalar>(mut to: ArrayViewMut1<'_, T>, from: &[T], [first, second]: [T; 2]) {
    if let (Some(to), true) = (to.as_slice_mut(), second == T::one()) {
        crate::kernel::add_scaled(to, first, from);
        return;
    }
    to.iter_mut().zip(from).for_each(|(to, &x)| *to += first * x * second);
}
