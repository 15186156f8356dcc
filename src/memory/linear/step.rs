//! A decode step in two halves: everything that may fail, and then what changes the sums.

use crate::error::Error;
use crate::kernel::buffer::Buffer;
use crate::memory::answer::Readout;
use crate::memory::linear::pass::{Pass, PassBuffers, Tokens};
use crate::memory::linear::state::State;
use crate::memory::linear::token;
use crate::scalar::Scalar;
use ndarray::ArrayViewMut3;

/// The mapped queries of a step, whose key and value are in the memory of the pass.
#[derive(Debug)]
pub(super) struct HeldStep<T> {
    heads: usize,
    /// `[heads, num_features]`, rows padded; of a single head they stay where they were mapped.
    queries: Buffer<T>,
    /// `[heads]`.
    query_scale: Buffer<T>,
}

impl<T: Scalar> HeldStep<T> {
    pub(super) fn new() -> Self {
        Self { heads: 0, queries: Buffer::new(), query_scale: Buffer::new() }
    }

    /// Maps one token for each query head, the key and the value being the same; returns whether
    /// [`finish`](Self::finish) is known not to fail.
    pub(super) fn map<'a>(
        &mut self,
        pass: Pass<'_, T>,
        state: &State<T>,
        heads: impl ExactSizeIterator<Item = Tokens<'a, T>>,
        readout: Readout,
        buffers: &mut PassBuffers<T>,
    ) -> Result<bool, Error>
    where
        T: 'a,
    {
        self.heads = heads.len();
        self.query_scale.resize(self.heads);
        let mut safe = true;
        for (head, tokens) in heads.enumerate() {
            pass.map_tokens(tokens, buffers, 0)?;
            safe = safe && token::is_safe(state, buffers, readout);
            if self.heads > 1 {
                let query = &buffers.chunk.queries;
                self.queries.resize(self.heads * query.len());
                self.queries[head * query.len()..(head + 1) * query.len()].copy_from_slice(query);
                self.query_scale[head] = buffers.chunk.query_scale[0];
            }
        }
        Ok(safe)
    }

    /// Writes the outputs of the heads, `out [heads, 1, value_dim]`, and absorbs the token. On an
    /// error the state is what it was.
    pub(super) fn finish(
        &self,
        state: &mut State<T>,
        mut out: ArrayViewMut3<'_, T>,
        readout: Readout,
        buffers: &mut PassBuffers<T>,
    ) -> Result<(), Error> {
        debug_assert_eq!(out.dim(), (self.heads, 1, state.value_dim));
        for (head, out) in out.outer_iter_mut().enumerate() {
            if self.heads > 1 {
                let query = &mut buffers.chunk.queries;
                let held = head * query.len()..(head + 1) * query.len();
                query.copy_from_slice(&self.queries[held]);
                buffers.chunk.query_scale[0] = self.query_scale[head];
            }
            // all but the last head only look
            if head + 1 < self.heads {
                token::peek(state, buffers, out, readout)?;
            } else {
                token::extend(state, buffers, out, readout, 0)?;
            }
        }
        Ok(())
    }
}
