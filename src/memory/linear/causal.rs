//! Causal attention, chunk after chunk and in each chunk group after group.

use crate::error::Error;
use crate::features::side::Side;
use crate::kernel::chunk_len;
use crate::memory::answer::Readout;
use crate::memory::linear::gates::Rates;
use crate::memory::linear::groups::{FirstDecay, Group, Groups};
use crate::memory::linear::pass::{Pass, PassBuffers, Tokens};
use crate::memory::linear::state::State;
use crate::memory::linear::steps;
use crate::memory::linear::token::{self, Meeting};
use crate::scalar::Scalar;
use crate::views;
use core::ops::Range;
use ndarray::ArrayViewMut2;

/// Tokens that are brought to a cache at once.
const AHEAD: usize = 256;

impl<T: Scalar> Pass<'_, T> {
    /// Causal attention of some of the new tokens: each query sees the tokens absorbed before and
    /// the new ones up to its own. `keep` says whether the state will be needed afterwards. The
    /// shapes have been checked. On an error with several tokens the state is left half-way.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn extend_in_order(
        &self,
        state: &mut State<T>,
        tokens: Tokens<'_, T>,
        out: &mut ArrayViewMut2<'_, T>,
        readout: Readout,
        buffers: &mut PassBuffers<T>,
        all: Range<usize>,
        keep: bool,
    ) -> Result<(), Error> {
        for start in all.clone().step_by(chunk_len::<T>()) {
            let range = start..all.end.min(start + chunk_len::<T>());
            let last = range.end == all.end;
            if (start - all.start).is_multiple_of(AHEAD) && all.len() > AHEAD {
                let ahead = start..all.end.min(start + AHEAD);
                views::read_ahead(&[tokens.q, tokens.k, tokens.v, out.view()], ahead);
            }
            if let Some(checkpoints) = &mut buffers.checkpoints {
                checkpoints.offer(tokens.q.nrows(), state);
            }
            self.map_tokens(tokens.rows(range.clone()), buffers, start)?;
            let out = views::rows_mut(out.view_mut(), range);
            if out.nrows() == 1 {
                token::extend(state, buffers, out, readout, start)?;
            } else {
                state.settle();
                self.extend_chunk(state, out, readout, buffers, start, keep || !last)?;
            }
        }
        Ok(())
    }

    /// One chunk of several tokens, already mapped: each group reads the sums, then itself, and is
    /// absorbed. `keep` says whether the state will be needed afterwards.
    fn extend_chunk(
        &self,
        state: &mut State<T>,
        mut out: ArrayViewMut2<'_, T>,
        readout: Readout,
        buffers: &mut PassBuffers<T>,
        first_row: usize,
        keep: bool,
    ) -> Result<(), Error> {
        let mut groups = Groups::new();
        while let Some(group) = groups.next(&buffers.chunk, &mut buffers.gates, state.scale) {
            if group.first_decay == FirstDecay::InSums {
                state.decay(buffers.gates.decay_before(group.tokens.start));
            }
            let is_read = if group.is_single() {
                read_single(state, &group, buffers);
                true
            } else {
                read_group(state, &group, buffers) || readout == Readout::Unnormalized
            };
            if !is_read {
                // The log scale of the group, set by its largest key, may be too large for an early
                // query.
                groups.split(&group);
                self.take_back(&group, buffers).map_err(|error| error.in_chunk(first_row))?;
                continue;
            }
            let rows = group.tokens.clone();
            let row = first_row + rows.start;
            let last = rows.end == buffers.chunk.tokens;
            buffers.answer.write(row, readout, views::rows_mut(out.view_mut(), rows))?;
            if group.is_single() {
                let meeting = Meeting::new(state.scale, &buffers.part, group.log_scale);
                token::absorb(state, &mut buffers.part, meeting, None);
            } else if keep || !last {
                let PassBuffers { chunk, part, gates, step, .. } = &mut *buffers;
                let tokens = if group.is_in_place(chunk, gates) { chunk } else { part };
                steps::update(state, tokens, &group, gates, &mut step.key_sums);
            }
            state.check_size(buffers.chunk.values_size, row)?;
        }
        Ok(())
    }

    /// Undoes what [`read_group`] has done to the tokens of a chunk.
    fn take_back(&self, group: &Group<T>, buffers: &mut PassBuffers<T>) -> Result<(), Error> {
        if !group.is_in_place(&buffers.chunk, &buffers.gates) {
            return Ok(());
        }
        if buffers.gates.rates() != Rates::None {
            buffers.gates.restore_query_scales(&mut buffers.chunk);
        }
        self.map_again(Side::Key, buffers)
    }
}

/// Answers a single token of a chunk, whose decay is in the sums.
fn read_single<T: Scalar>(state: &State<T>, group: &Group<T>, buffers: &mut PassBuffers<T>) {
    let PassBuffers { chunk, part, answer, .. } = buffers;
    part.copy_tokens(chunk, group.tokens.clone(), state.features(), state.value_dim);
    token::read(state, part, Meeting::new(state.scale, part, group.log_scale), None, answer);
}

/// Answers the queries of a group from the sums and from the group itself; returns whether every
/// normaliser can be divided by.
fn read_group<T: Scalar>(state: &State<T>, group: &Group<T>, buffers: &mut PassBuffers<T>) -> bool {
    let (features, value_dim) = (state.features(), state.value_dim);
    let PassBuffers { chunk, part, gates, step, answer, .. } = buffers;
    let tokens = if group.is_in_place(chunk, gates) {
        chunk
    } else {
        part.copy_tokens(chunk, group.tokens.clone(), features, value_dim);
        part
    };
    steps::bring(tokens, group, gates, features, step);
    answer.resize(tokens.tokens, tokens.width, state.stride());
    let has_past = state.tokens > 0;
    if has_past {
        steps::read_state(state, tokens, group.log_scale, answer);
    }
    steps::read_tokens(tokens, features, value_dim, has_past, &mut step.scores, answer);
    answer.set_scales(&tokens.query_scale, group.log_scale)
}
