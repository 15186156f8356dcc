//! Queries that stand at the last tokens: the tokens before the first of them have keys and values
//! only.

use crate::error::Error;
use crate::kernel::buffer::padded;
use crate::memory::linear::backward::call::{Backward, TokenGradients, Units, block_len};
use crate::memory::linear::backward::work::BackwardWork;
use crate::memory::linear::groups::{FirstDecay, Groups};
use crate::memory::linear::pass::{PassBuffers, Tokens};
use crate::memory::linear::steps::{self, StepBuffers};
use crate::scalar::Scalar;
use crate::views::{rows, rows_mut};
use core::ops::Range;

impl<T: Scalar> TokenGradients<'_, T> {
    /// The same for some of the keys.
    pub(super) fn of_keys(&mut self, keys: Range<usize>) -> TokenGradients<'_, T> {
        TokenGradients {
            d_out: self.d_out,
            d_q: self.d_q.view_mut(),
            d_k: rows_mut(self.d_k.view_mut(), keys.clone()),
            d_v: rows_mut(self.d_v.view_mut(), keys.clone()),
            d_log_decay: self.d_log_decay.as_mut().map(|d| rows_mut(d.view_mut(), keys)),
            is_finite: self.is_finite,
        }
    }
}

impl<T: Scalar> Backward<'_, T> {
    /// The tail of queries, and the tokens before it, which nobody asks.
    pub(super) fn split(&self) -> [Self; 2] {
        let (tokens, keys) = (self.tokens, self.tokens.k.nrows());
        let first = keys - tokens.q.nrows();
        let of = |range: Range<usize>| {
            let part = |x| rows(x, range.clone());
            let [k, v] = [tokens.k, tokens.v].map(part);
            Tokens { q: tokens.q, k, v, log_decay: tokens.log_decay.map(part) }
        };
        let none = Self { checkpoints: None, ..*self };
        [
            Self { tokens: of(first..keys), ..none },
            Self { tokens: of(0..first), asked: false, ..none },
        ]
    }

    /// The scan over some tokens that have no queries, onto an empty tape.
    pub(super) fn scan_keys(
        &self,
        tokens: Range<usize>,
        units: Units<T>,
        work: &mut BackwardWork<T>,
    ) -> Result<(), Error> {
        let (m, value_dim) = (self.pass.num_features(), self.value_dim());
        let BackwardWork { pass: buffers, tape, state, .. } = work;
        tape.clear();
        for start in tokens.clone().step_by(block_len::<T>()) {
            let range = start..tokens.end.min(start + block_len::<T>());
            let part = |x| rows(x, range.clone());
            let [k, v] = [self.tokens.k, self.tokens.v].map(part);
            self.pass.map_keys(k, v, self.tokens.log_decay.map(part), buffers, start)?;
            units.set(buffers);
            let mut groups = Groups::new();
            while let Some(group) = groups.next(&buffers.chunk, &mut buffers.gates, state.scale) {
                let PassBuffers { chunk, part, gates, step, .. } = &mut *buffers;
                let in_sums = group.first_decay == FirstDecay::InSums;
                if in_sums {
                    state.decay(gates.decay_before(group.tokens.start));
                }
                let width = padded::<T>(group.tokens.len());
                part.copy_tokens_to(width, chunk, group.tokens.clone(), m, value_dim);
                let entry = tape.next();
                entry.begin(start + group.tokens.start..start + group.tokens.end, part, m);
                if group.is_single() {
                    let StepBuffers { factors, key_sums, .. } = &mut *step;
                    part.rescale_keys(group.log_scale, m, factors, key_sums);
                } else {
                    steps::bring(part, &group, gates, m, step);
                }
                if self.with_decays {
                    entry.keep_sums(state);
                }
                entry.key_factors.resize(width);
                entry.key_factors.copy_from_slice(&step.factors[..width]);
                entry.log_scale = group.log_scale;
                entry.d_keys.fill(T::zero());
                entry.set_decays(&group, in_sums, gates);
                if group.is_single() {
                    steps::absorb(state, part, group.log_scale, &step.key_sums);
                } else {
                    steps::update(state, part, &group, gates, &mut step.key_sums);
                }
            }
        }
        Ok(())
    }
}
