//! The gradients of linear attention, by recomputation in two scans.
//!
//! With `G_t = dO_t/Z_t` and `h_t = −(dO_t·O_t)/Z_t` (`G = dO`, `h = 0` without a denominator), the
//! prefix sums S and z, and the suffix sums
//!
//! ```text
//! R_j = Σ_{t≥j} φ_q(t) G_tᵀ,    r_j = Σ_{t≥j} h_t φ_q(t),
//! dφ_q(t) = S_t G_t + h_t z_t,    dφ_k(j) = R_j v_j + r_j,    dv_j = R_jᵀ φ_k(j).
//! ```
//!
//! The scan [`forward`] takes the groups of tokens of the forward pass, in their order: it has S,
//! and does all that tokens of one group do to each other. The scan in [`reverse`] takes them from
//! the last to the first, and has R: what later groups do to the keys. Between the two, a
//! [`tape`] keeps the features of a run of tokens. A sequence longer than one run is cut into
//! parts, of which the last comes first; the sums before each part are kept. Where queries stand at
//! the last tokens only, those before them have keys and values alone: [`tail`].

pub(crate) mod call;
mod forward;
mod gates;
pub(crate) mod late;
mod map;
mod reverse;
mod rows;
mod tail;
mod tape;
pub(crate) mod work;

use crate::error::Error;
use crate::features::side::Side;
use crate::kernel::buffer::padded;
use crate::memory::linear::backward::call::{Backward, TokenGradients, Units, block_len};
use crate::memory::linear::backward::work::BackwardWork;
use crate::memory::linear::checkpoints::Checkpoint;
use crate::memory::linear::entry::of_tail;
use crate::memory::linear::pass::Tokens;
use crate::scalar::Scalar;
use crate::views;
use core::ops::Range;

/// Numbers that a tape may keep: with what pads its buffers, some 3 MiB of `f32`.
const TAPE_FLOATS: usize = 1 << 19;

/// Parts that a sequence longer than a tape is cut into, and each of them again.
const PARTS: usize = 16;

impl<T: Scalar> Backward<'_, T> {
    /// Tokens of one tape.
    fn tape_tokens(&self) -> usize {
        let (features, chunk) = (self.pass.num_features(), block_len::<T>());
        let sums = if self.with_decays { features * self.value_dim() / chunk } else { 0 };
        let decays = if self.pass.decays_by_feature(self.tokens.log_decay) { features } else { 0 };
        let most = TAPE_FLOATS / (3 * features + 8 + sums + decays);
        (most / chunk * chunk).max(chunk)
    }

    /// The gradients of causal attention. Shapes have been checked, and the log decays' as well.
    pub(crate) fn causal(
        &self,
        out: &mut TokenGradients<'_, T>,
        work: &mut BackwardWork<T>,
    ) -> Result<(), Error> {
        let units = Units::of(out.d_out, self.tokens.v)?;
        let (features, value_dim) = (self.pass.num_features(), self.value_dim());
        work.state.reset(features, value_dim);
        work.suffix.reset(features, value_dim);
        work.gates.begin();
        let mut end = self.tokens.q.nrows();
        let kept = self.checkpoints.map(|all| all.of(end, features, padded::<T>(value_dim)));
        for checkpoint in kept.unwrap_or_default().iter().rev() {
            checkpoint.restore_scaled(&mut work.state, units.values_inverse);
            self.part(checkpoint.tokens()..end, 0, units, out, work)?;
            end = checkpoint.tokens();
        }
        work.state.reset(features, value_dim);
        self.part(0..end, 0, units, out, work)
    }

    /// The gradients of causal attention of queries that stand at the last tokens.
    pub(crate) fn causal_tail(
        &self,
        out: &mut TokenGradients<'_, T>,
        work: &mut BackwardWork<T>,
    ) -> Result<(), Error> {
        let units = Units::of(out.d_out, self.tokens.v)?;
        let (features, value_dim) = (self.pass.num_features(), self.value_dim());
        let (queries, keys) = (self.tokens.q.nrows(), self.tokens.k.nrows());
        let first = keys - queries;
        let [tail, before] = self.split();
        work.state.reset(features, value_dim);
        work.suffix.reset(features, value_dim);
        work.gates.begin();
        before.absorb(0..first, units, work)?;
        let mut tail_out = out.of_keys(first..keys);
        let result = tail.part(0..queries, 0, units, &mut tail_out, work);
        result.map_err(|error| of_tail(error, first, self.tokens.log_decay))?;
        let mut is_finite = tail_out.is_finite;
        work.state.reset(features, value_dim);
        let mut of_before = out.of_keys(0..first);
        before.part(0..first, 0, units, &mut of_before, work)?;
        is_finite &= of_before.is_finite;
        out.is_finite &= is_finite;
        Ok(())
    }

    /// The gradients of a part of the sequence, from the sums before it and the suffix sums after
    /// it. Leaves those before it in the place of the latter.
    fn part(
        &self,
        part: Range<usize>,
        depth: usize,
        units: Units<T>,
        out: &mut TokenGradients<'_, T>,
        work: &mut BackwardWork<T>,
    ) -> Result<(), Error> {
        let most = self.tape_tokens();
        if part.len() <= most {
            if !self.asked {
                self.scan_keys(part, units, work)?;
                return self.scan_back(units, out, work);
            }
            let Tokens { q, k, v, .. } = self.tokens;
            let TokenGradients { d_out, d_q, d_k, d_v, .. } = &*out;
            let arrays = [q, k, v, *d_out, d_q.view(), d_k.view(), d_v.view()];
            views::read_ahead(&arrays, part.clone());
            self.scan_forward(part, units, out, work)?;
            return self.scan_back(units, out, work);
        }
        let mut len = most;
        while len * PARTS < part.len() {
            len *= PARTS;
        }
        let parts = part.len().div_ceil(len);
        let place = |i: usize| part.start + i * len..part.end.min(part.start + (i + 1) * len);
        let first = depth * PARTS;
        if work.checkpoints.len() < first + parts {
            work.checkpoints.resize_with(first + parts, Checkpoint::new);
        }
        for i in 0..parts {
            work.checkpoints[first + i].keep(&work.state);
            if i + 1 < parts {
                self.absorb(place(i), units, work)?;
            }
        }
        for i in (0..parts).rev() {
            work.checkpoints[first + i].restore(&mut work.state);
            self.part(place(i), depth + 1, units, out, work)?;
        }
        Ok(())
    }

    /// Takes tokens into the sums without reading them.
    fn absorb(
        &self,
        tokens: Range<usize>,
        units: Units<T>,
        work: &mut BackwardWork<T>,
    ) -> Result<(), Error> {
        let BackwardWork { pass, state, .. } = work;
        let chunk = block_len::<T>();
        self.pass.absorb_groups(state, self.tokens, tokens, chunk, pass, |pass| units.set(pass))
    }

    /// The gradients of attention of every query to every key, without decay.
    pub(crate) fn full(
        &self,
        out: &mut TokenGradients<'_, T>,
        work: &mut BackwardWork<T>,
    ) -> Result<(), Error> {
        let units = Units::of(out.d_out, self.tokens.v)?;
        let (features, value_dim) = (self.pass.num_features(), self.value_dim());
        work.state.reset(features, value_dim);
        work.suffix.reset(features, value_dim);
        self.absorb(0..self.tokens.k.nrows(), units, work)?;
        for start in (0..self.tokens.q.nrows()).step_by(block_len::<T>()) {
            let rows = start..self.tokens.q.nrows().min(start + block_len::<T>());
            self.read_all(rows, units, out, work)?;
        }
        for start in (0..self.tokens.k.nrows()).step_by(block_len::<T>()) {
            let rows = start..self.tokens.k.nrows().min(start + block_len::<T>());
            work.tape.clear();
            let k = views::rows(self.tokens.k, rows.clone());
            let BackwardWork { pass: buffers, tape, state, .. } = work;
            buffers.chunk.resize_padded(rows.len(), features, value_dim);
            self.pass.map(Side::Key, k, buffers, start)?;
            let entry = tape.next();
            entry.begin(rows, &buffers.chunk, features);
            entry.begin_alone(state.scale.high, &mut buffers.chunk, features, &mut buffers.step);
            self.keys_from_suffix(units, out, work)?;
        }
        Ok(())
    }
}
