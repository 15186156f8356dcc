//! Keys without queries, and queries without keys: what has no order, chunk after chunk.

use crate::error::Error;
use crate::features::side::Side;
use crate::kernel::buffer::padded;
use crate::kernel::{self, chunk_len};
use crate::memory::answer::Answer;
use crate::memory::linear::chunk::Chunk;
use crate::memory::linear::groups::{FirstDecay, Groups};
use crate::memory::linear::pass::{Pass, PassBuffers, Tokens};
use crate::memory::linear::state::State;
use crate::memory::linear::steps::{self, StepBuffers};
use crate::memory::linear::token::{self, Meeting};
use crate::scalar::Scalar;
use crate::views;
use core::ops::Range;
use ndarray::{Array2, ArrayView2};

impl<T: Scalar> Pass<'_, T> {
    /// Absorbs some keys and values, of checked shapes, without reading. Sums that decay take them
    /// one by one. On an error the state is left half-way.
    pub(super) fn absorb_in_order(
        &self,
        state: &mut State<T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        buffers: &mut PassBuffers<T>,
        tokens: Range<usize>,
    ) -> Result<(), Error> {
        state.settle();
        let chunk = if self.decays() { 1 } else { chunk_len::<T>() };
        for start in tokens.clone().step_by(chunk) {
            let range = start..tokens.end.min(start + chunk);
            let (k, v) = (views::rows(k, range.clone()), views::rows(v, range));
            buffers.chunk.resize(k.nrows(), self.num_features(), v.ncols());
            self.map(Side::Key, k, buffers, start)?;
            buffers.chunk.set_values(v).map_err(|error| error.in_chunk(start))?;
            let PassBuffers { chunk, gates, step, .. } = &mut *buffers;
            if chunk.tokens == 1 {
                gates.set(self.log_decay(), None, 1, start)?;
                state.scale = gates.decay_token(chunk, state.scale);
                let meeting = Meeting::of_chunk(state.scale, chunk, gates);
                token::absorb(state, chunk, meeting, gates.of_features());
            } else {
                let log_scale = largest_scale(chunk, state.scale.high);
                let StepBuffers { factors, key_sums, .. } = step;
                chunk.rescale_keys(log_scale, self.num_features(), factors, key_sums);
                steps::absorb(state, chunk, log_scale, key_sums);
            }
            state.check_size(chunk.values_size, start)?;
        }
        Ok(())
    }

    /// As [`absorb_in_order`](Self::absorb_in_order), of sums that may decay. `prepare` may change
    /// a chunk once it is mapped; queries are not looked at. Tokens enter `chunk` at a time.
    pub(super) fn absorb_groups(
        &self,
        state: &mut State<T>,
        tokens: Tokens<'_, T>,
        range: Range<usize>,
        chunk: usize,
        buffers: &mut PassBuffers<T>,
        prepare: impl Fn(&mut PassBuffers<T>),
    ) -> Result<(), Error> {
        let (features, value_dim) = (self.num_features(), tokens.v.ncols());
        for start in range.clone().step_by(chunk) {
            let rows = start..range.end.min(start + chunk);
            let part = |x| views::rows(x, rows.clone());
            let [k, v] = [tokens.k, tokens.v].map(part);
            self.map_keys(k, v, tokens.log_decay.map(part), buffers, start)?;
            prepare(buffers);
            let mut groups = Groups::new();
            while let Some(group) = groups.next(&buffers.chunk, &mut buffers.gates, state.scale) {
                let PassBuffers { chunk, part, gates, step, .. } = &mut *buffers;
                if group.first_decay == FirstDecay::InSums {
                    state.decay(gates.decay_before(group.tokens.start));
                }
                let width = padded::<T>(group.tokens.len());
                part.copy_tokens_to(width, chunk, group.tokens.clone(), features, value_dim);
                if group.is_single() {
                    let StepBuffers { factors, key_sums, .. } = &mut *step;
                    part.rescale_keys(group.log_scale, features, factors, key_sums);
                    steps::absorb(state, part, group.log_scale, &step.key_sums);
                } else {
                    steps::bring(part, &group, gates, features, step);
                    steps::update(state, part, &group, gates, &mut step.key_sums);
                }
            }
            state.check_size(buffers.chunk.values_size, start)?;
        }
        Ok(())
    }

    /// Answers queries of a checked shape chunk by chunk; `each` is given the first row of the
    /// chunk and its answer.
    pub(super) fn read(
        &self,
        state: &State<T>,
        q: ArrayView2<'_, T>,
        buffers: &mut PassBuffers<T>,
        mut each: impl FnMut(usize, &mut Answer<T>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        debug_assert!(state.pending.is_empty());
        let n = q.nrows();
        for start in (0..n).step_by(chunk_len::<T>()) {
            let q = views::rows(q, start..n.min(start + chunk_len::<T>()));
            buffers.chunk.resize(q.nrows(), self.num_features(), state.value_dim);
            self.map(Side::Query, q, buffers, start)?;
            let PassBuffers { chunk, answer, .. } = &mut *buffers;
            answer.resize(chunk.tokens, chunk.width, state.stride());
            if chunk.width == 1 {
                let query = &chunk.queries[..state.features()];
                kernel::row_times_matrix(query, &state.sums, state.stride(), &mut answer.numerator);
                answer.denominator[0] = kernel::dot(query, &state.normalizer);
            } else {
                steps::read_state(state, chunk, state.scale.high, answer);
            }
            answer.set_scales(&chunk.query_scale, state.scale.high);
            each(start, answer)?;
        }
        Ok(())
    }

    /// `ln φ(√scale·q_i)·φ(√scale·k_j)` of every pair of checked rows.
    pub(super) fn log_weights(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
    ) -> Result<Array2<f64>, Error> {
        let mut buffers = PassBuffers::new();
        let mut out = Array2::zeros((q.nrows(), k.nrows()));
        let m = self.num_features();
        let feature = |x: &[T], width: usize, t: usize| -> Vec<T> {
            x[t..].iter().step_by(width).take(m).copied().collect()
        };
        for start in (0..k.nrows()).step_by(chunk_len::<T>()) {
            let k = views::rows(k, start..k.nrows().min(start + chunk_len::<T>()));
            buffers.chunk.resize(k.nrows(), m, 1);
            self.map(Side::Key, k, &mut buffers, start)?;
            let keys: Vec<Vec<T>> = (0..k.nrows())
                .map(|j| feature(&buffers.chunk.keys, buffers.chunk.width, j))
                .collect();
            let key_scale = buffers.chunk.key_scale.to_vec();
            for first in (0..q.nrows()).step_by(chunk_len::<T>()) {
                let q = views::rows(q, first..q.nrows().min(first + chunk_len::<T>()));
                buffers.chunk.resize(q.nrows(), m, 1);
                self.map(Side::Query, q, &mut buffers, first)?;
                for i in 0..q.nrows() {
                    let query = feature(&buffers.chunk.queries, buffers.chunk.width, i);
                    for (j, key) in keys.iter().enumerate() {
                        let product = kernel::dot(&query, key).as_f64();
                        let scale = buffers.chunk.query_scale[i].as_f64() + key_scale[j].as_f64();
                        out[[first + i, start + j]] =
                            if product > 0.0 { product.ln() + scale } else { f64::NEG_INFINITY };
                    }
                }
            }
        }
        Ok(out)
    }
}

/// The log scale of sums after the keys of a chunk: the largest of all.
pub(super) fn largest_scale<T: Scalar>(chunk: &Chunk<T>, log_scale: T) -> T {
    (0..chunk.tokens).fold(log_scale, |largest, token| largest.max(chunk.least_scale(token)))
}
