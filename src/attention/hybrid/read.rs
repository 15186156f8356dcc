//! How a hybrid kernel answers queries, and what it learns from them.

use crate::attention::call::Head;
use crate::attention::hybrid::config::{Config, Weighing};
use crate::attention::hybrid::far_memory::Asked;
use crate::attention::hybrid::state::{HybridScratch, HybridState};
use crate::error::{Error, SUM_OF_VALUES};
use crate::kernel;
use crate::kernel::buffer::padded;
use crate::memory::answer::in_range;
use crate::memory::merged::entries::MergedMemory;
use crate::memory::merged::rule::LEAST_WEIGHT;
use crate::memory::partial::divisor;
use crate::memory::slots::{Reading, attend};
use crate::scalar::Scalar;
use crate::views;
use ndarray::Axis;

/// Steps `start..start + run` of a head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Steps {
    pub(super) head: usize,
    pub(super) start: usize,
    pub(super) run: usize,
    /// Whether the last of these steps is the newest token, and none sees those after it.
    pub(super) causal: bool,
    /// The first query head of the call, of those of the group.
    pub(super) query_head: usize,
}

impl Steps {
    /// Their queries, as rows: of one step those of all heads, of several steps those of one head.
    fn asked<'a, T: Scalar>(self, call: &Head<'a, T>) -> Asked<'a, T> {
        let Self { head, start, run, .. } = self;
        let queries = if run == 1 {
            call.q.index_axis_move(Axis(1), start)
        } else {
            views::rows(call.q.index_axis_move(Axis(0), 0), start..start + run)
        };
        Asked { head, queries }
    }
}

impl<T: Scalar> HybridState<T> {
    /// Answers some steps, and tells the memories what they received.
    pub(super) fn read(
        &mut self,
        config: &Config<T>,
        steps: Steps,
        call: &mut Head<'_, T>,
        scratch: &mut HybridScratch<T>,
    ) -> Result<(), Error> {
        let Steps { head, causal, .. } = steps;
        let width = self.near[head].slots.capacity + self.far.entries(head).map_or(0, |of| of.1);
        in_range(width, |share| self.answer(config, steps, share, call, scratch))?;
        if causal {
            self.receive(config, steps, call, scratch);
        }
        Ok(())
    }

    /// Answers some steps, with weights that are multiplied with `share`.
    fn answer(
        &self,
        config: &Config<T>,
        steps: Steps,
        share: T,
        call: &mut Head<'_, T>,
        scratch: &mut HybridScratch<T>,
    ) -> Result<(), Error> {
        let Steps { head, start, run, causal, query_head } = steps;
        let group = call.q.len_of(Axis(0));
        let rows = run * group;
        let near = &self.near[head];
        let own = near.slots.capacity;
        let entries = self.far.entries(head);
        let (slots, far) = entries.unwrap_or((&near.slots, 0));
        let HybridScratch { reading, inverse, far: far_scratch, .. } = scratch;
        reading.prepare(rows, config.head_dim, own + far, self.value_dim);
        for row in 0..rows {
            let (step, g) = (row / group, row % group);
            let q = call.q.index_axis(Axis(0), g).index_axis_move(Axis(0), start + step);
            reading.set_query(row, q, config.factor());
            let (exact, merged) = reading.row(row).split_at_mut(own);
            exact.copy_from_slice(&near.slots.bias);
            if causal {
                let first = self.tokens - run;
                for hidden in config.hidden(first, first + step, self.tokens) {
                    exact[config.slot(hidden)] = T::neg_infinity();
                }
            }
            if entries.is_some() {
                merged.copy_from_slice(&slots.bias[..far]);
            }
        }
        attend(&[(&near.slots, own), (slots, far)], rows, config.soft_cap, share, reading);
        if let Some(row) = reading.answer.first_overflow() {
            return Err(Error::Overflow { which: "a score", row: start + row / group });
        }
        inverse.resize(rows);
        self.far
            .add_to(steps.asked(call), &mut reading.answer, far_scratch)
            .map_err(|error| error.in_chunk(start))?;
        for row in 0..rows {
            if let Some(logit) = config.sink_logit(query_head + row % group) {
                let factor = reading.answer.add_sink(row, logit);
                kernel::scale(reading.row(row), factor); // they stay in its units
            }
        }
        if share != T::one() && self.far.cannot_fail() {
            reading.answer.clamp();
        }
        for (row, inverse) in inverse.iter_mut().enumerate() {
            *inverse = divisor(reading.answer.denominator[row], start + row / group)?.recip();
        }
        write_rows(reading, inverse, call, start, self.value_dim)
    }

    /// Weights by the attention just received; the factors `inverse` make probabilities of the rows
    /// of weights.
    #[allow(clippy::cast_precision_loss)] // heads of a group
    fn receive(
        &mut self,
        config: &Config<T>,
        steps: Steps,
        call: &Head<'_, T>,
        scratch: &mut HybridScratch<T>,
    ) {
        let Steps { head, run, .. } = steps;
        let group = call.q.len_of(Axis(0));
        let HybridScratch { reading, inverse, far, .. } = scratch;
        self.far.answered(steps.asked(call), &reading.answer, far);
        let Weighing::Received { decay, min_age } = config.far.weighing() else { return };
        let decay = T::from_f64(decay);
        let scaled = self.near.len() > 1 || config.scales_received();
        let near = &mut self.near[head];
        let (own, width) = (near.slots.capacity, reading.width);
        for step in 0..run {
            let t = self.tokens - run + step;
            let rows = step * group..(step + 1) * group;
            let factors = &mut inverse[rows.clone()];
            if scaled {
                // heads, and sizes of what is far, compare by what goes to all but the sinks
                let mut mass = T::zero();
                for (row, &factor) in rows.clone().zip(&*factors) {
                    mass += factor * kernel::sum(&reading.row(row)[config.sinks.min(own)..]);
                }
                let per_query = T::from_f64(group as f64) / (mass + T::from_f64(LEAST_WEIGHT));
                kernel::scale(factors, per_query);
            }
            for row in rows.clone() {
                let young = min_age.min(config.ring).min((t + 1).saturating_sub(config.sinks));
                for position in t + 1 - young..=t {
                    reading.row(row)[config.slot(position)] = T::zero();
                }
            }
            let scores = &reading.scores[rows.start * width..];
            kernel::receive(
                &mut near.received,
                decay,
                MergedMemory::<T>::least_weight(),
                factors,
                scores,
                width,
            );
            self.far.receive(head, decay, factors, &scores[own..], width);
        }
    }
}

/// Writes numerators times factors.
fn write_rows<T: Scalar>(
    reading: &Reading<T>,
    factors: &[T],
    call: &mut Head<'_, T>,
    start: usize,
    value_dim: usize,
) -> Result<(), Error> {
    let group = call.out.len_of(Axis(0));
    let stride = padded::<T>(value_dim);
    for (row, &factor) in factors.iter().enumerate() {
        let numerator = &reading.answer.numerator[row * stride..][..value_dim];
        let mut out = call.out.index_axis_mut(Axis(0), row % group);
        let mut out = out.index_axis_mut(Axis(0), start + row / group);
        let mark = if let Some(out) = out.as_slice_mut() {
            kernel::scale_into(factor, numerator, out)
        } else {
            let mut mark = T::zero();
            for (out, &x) in out.iter_mut().zip(numerator) {
                *out = x * factor;
                mark += *out * T::zero();
            }
            mark
        };
        if mark != T::zero() {
            return Err(Error::Overflow { which: SUM_OF_VALUES, row: start + row / group });
        }
    }
    Ok(())
}
