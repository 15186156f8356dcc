//! The scan from the first token to the last: gradients by queries, and what tokens of one group
//! do to each other.

use crate::check;
use crate::error::Error;
use crate::features::side::Side;
use crate::kernel;
use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::gradients::{affine_columns, causal_affine, dot_columns, product};
use crate::kernel::loops::products::Matrix;
use crate::memory::answer::Readout;
use crate::memory::linear::backward::call::{Backward, TokenGradients, Units, block_len};
use crate::memory::linear::backward::gates::GroupDecays;
use crate::memory::linear::backward::map::{MapBuffers, Mapped};
use crate::memory::linear::backward::rows::{add_rows, scaled_rows};
use crate::memory::linear::backward::tape::Entry;
use crate::memory::linear::backward::work::{BackwardWork, Buffers};
use crate::memory::linear::groups::{FirstDecay, Group, Groups};
use crate::memory::linear::pass::PassBuffers;
use crate::memory::linear::steps::{self, StepBuffers, score_tokens};
use crate::memory::partial::divisor;
use crate::scalar::Scalar;
use crate::views;
use core::ops::Range;
use ndarray::ArrayView2;

impl<T: Scalar> Backward<'_, T> {
    /// The scan over some tokens, onto an empty tape.
    pub(super) fn scan_forward(
        &self,
        tokens: Range<usize>,
        units: Units<T>,
        out: &mut TokenGradients<'_, T>,
        work: &mut BackwardWork<T>,
    ) -> Result<(), Error> {
        work.tape.clear();
        for start in tokens.clone().step_by(block_len::<T>()) {
            let rows = start..tokens.end.min(start + block_len::<T>());
            self.pass.map_tokens(self.tokens.rows(rows), &mut work.pass, start)?;
            units.set(&mut work.pass);
            let mut groups = Groups::new();
            // whether the sums have the decay of the next token from a group that was split
            let mut has_decayed = false;
            loop {
                let BackwardWork { pass: buffers, state, .. } = &mut *work;
                let PassBuffers { chunk, gates, .. } = buffers;
                let Some(group) = groups.next(chunk, gates, state.scale) else { break };
                if group.first_decay == FirstDecay::InSums {
                    state.decay(gates.decay_before(group.tokens.start));
                }
                let row = start + group.tokens.start;
                let in_sums = group.first_decay == FirstDecay::InSums || has_decayed;
                if self.group(&group, in_sums, start, units, out, work)? {
                    work.state.check_size(work.pass.chunk.values_size, row)?;
                    has_decayed = false;
                } else {
                    groups.split(&group);
                    has_decayed = in_sums;
                }
            }
        }
        Ok(())
    }

    /// One group of a chunk; returns whether it could be answered at once.
    #[allow(clippy::too_many_lines)] // the formulas of a group, one after the other
    fn group(
        &self,
        group: &Group<T>,
        has_decayed: bool,
        chunk_row: usize,
        units: Units<T>,
        out: &mut TokenGradients<'_, T>,
        work: &mut BackwardWork<T>,
    ) -> Result<bool, Error> {
        let (m, value_dim) = (self.pass.num_features(), self.value_dim());
        let (stride, count) = (padded::<T>(value_dim), group.tokens.len());
        let BackwardWork { pass: buffers, tape, state, map, gates: gate_gradients, .. } = work;
        let PassBuffers { chunk, part, gates, step, .. } = buffers;
        let width = padded::<T>(count);
        part.copy_tokens_to(width, chunk, group.tokens.clone(), m, value_dim);
        let rows = chunk_row + group.tokens.start..chunk_row + group.tokens.end;
        let entry = tape.next();
        let is_whole = group.tokens == (0..chunk.tokens) && chunk.width == width;
        if is_whole {
            entry.take(rows.clone(), chunk, m);
        } else {
            entry.begin(rows.clone(), part, m);
        }
        if group.is_single() {
            let StepBuffers { factors, key_sums, .. } = &mut *step;
            part.rescale_keys(group.log_scale, m, factors, key_sums);
        } else {
            steps::bring(part, group, gates, m, step);
        }
        let (q, k) = (&part.queries[..m * width], &part.keys[..m * width]);
        let Buffers {
            d_out,
            d_out_rows,
            squares,
            denominator,
            inverse,
            d_normalizer,
            of_sums,
            d_scores,
            d_scores_by_query,
            d_features,
            d_values,
            ..
        } = &mut work.buffers;
        // Z_t = q̃_t·z + Σ_s A_ts
        denominator.resize(width);
        let has_past = state.tokens > 0;
        let ratio = if has_past { state.scale.ratio_to(group.log_scale) } else { T::zero() };
        if has_past {
            kernel::row_times_matrix(&state.normalizer, q, width, denominator);
            kernel::scale(denominator, ratio);
        } else {
            denominator.fill(T::zero());
        }
        score_tokens(part, m, &mut step.scores, denominator);
        inverse.resize(width);
        inverse.fill(T::zero());
        for t in 0..count {
            inverse[t] = match self.readout {
                Readout::Normalized => match divisor(denominator[t], rows.start + t) {
                    Ok(divisor) => divisor.recip(),
                    Err(error) if group.is_single() => return Err(error),
                    Err(_) => {
                        if is_whole {
                            entry.swap(chunk);
                        }
                        tape.drop_last();
                        return Ok(false);
                    }
                },
                Readout::Unnormalized => (part.query_scale[t] + group.log_scale).exp(),
            };
        }
        let cotangents = views::rows(out.d_out, rows.clone());
        set_cotangents(cotangents, (rows.start, width), units, squares, d_out)?;

        // S dO_t of the sums, and dO_t·v_s of the group
        d_features.resize(m * width);
        if has_past {
            let sums = Matrix::rows(&state.sums, stride);
            product([m, width, value_dim], sums, d_out, d_features, width, false);
        } else {
            d_features.fill(T::zero());
        }
        d_scores.resize(width * width);
        for first in (0..count).step_by(T::PAD) {
            let last = count.min(first + T::PAD);
            let values = Matrix::rows(&part.values[first * stride..], stride);
            let to = &mut d_scores[first * width + first..];
            let sizes = [last - first, width - first, value_dim];
            product(sizes, values, &d_out[first..], to, width, false);
        }
        // h_t = −dO_t·O_t/Z_t
        d_normalizer.resize(width);
        d_normalizer.fill(T::zero());
        if self.readout == Readout::Normalized {
            dot_columns(q, d_features, 0, d_normalizer);
            kernel::scale(d_normalizer, ratio);
            for first in (0..count).step_by(T::PAD) {
                let block = first * width..count.min(first + T::PAD) * width;
                dot_columns(&step.scores[block.clone()], &d_scores[block], first, d_normalizer);
            }
            for (d_normalizer, &inverse) in d_normalizer.iter_mut().zip(&**inverse) {
                *d_normalizer = -(*d_normalizer * inverse) * inverse;
            }
        }
        // dq̃_t = S G_t + h_t z + Σ_{s≤t} k̃_s (v_s·G_t + h_t)
        if has_past {
            for (to, from) in of_sums.iter_mut().zip([&*inverse, &*d_normalizer]) {
                to.resize(width);
                to.iter_mut().zip(&**from).for_each(|(to, &x)| *to = x * ratio);
            }
            affine_columns(d_features, &state.normalizer, &of_sums[0], &of_sums[1]);
        }
        if self.with_decays {
            entry.keep_sums(state);
            gate_gradients.of_sums(gates.rates(), q, d_features, width);
        }
        for first in (0..count).step_by(T::PAD) {
            let block = first * width..count.min(first + T::PAD) * width;
            causal_affine(&mut d_scores[block], first, inverse, d_normalizer);
        }
        for first in (0..count).step_by(T::PAD) {
            let to = &mut d_features[first..];
            let sizes = [m, T::PAD, count.min(first + T::PAD)];
            product(sizes, Matrix::rows(k, width), &d_scores[first..], to, width, true);
        }
        // dk̃_s = Σ_{t≥s} q̃_t (v_s·G_t + h_t)
        let by_query = d_scores_by_query;
        by_query.resize(width * width);
        let row = |s: usize| &d_scores[s * width..(s + 1) * width];
        kernel::transpose(count, &row, T::one(), squares, by_query);
        for first in (0..count).step_by(T::PAD) {
            let scores = &by_query[first * width + first..];
            let queries = Matrix::rows(&q[first..], width);
            let to = &mut entry.d_keys[first..];
            let sizes = [m, T::PAD, count - first];
            product(sizes, queries, scores, to, width, false);
        }
        // dv_s = Σ_{t≥s} A_ts G_t
        scale_by(units.d_out_inverse, inverse, &mut of_sums[0]);
        scaled_rows(cotangents, &of_sums[0], d_out_rows);
        d_values.resize(count * stride);
        for first in (0..count).step_by(T::PAD) {
            let last = count.min(first + T::PAD);
            let scores = Matrix::rows(&step.scores[first * width + first..], width);
            let to = &mut d_values[first * stride..];
            let from = &d_out_rows[first * stride..];
            product([last - first, stride, count - first], scores, from, to, stride, false);
        }
        let d_v = views::rows_mut(out.d_v.view_mut(), rows.clone());
        out.is_finite &= add_rows(d_values, units.d_out, d_v);

        // what the scan back needs
        entry.key_factors.resize(width);
        entry.key_factors.copy_from_slice(&step.factors[..width]);
        entry.log_scale = group.log_scale;
        let largest = kernel::max_abs(inverse);
        let unit = if largest > T::zero() { largest } else { T::one() };
        entry.unit = unit.ln();
        for (to, from) in
            [(&mut entry.inverse, &*inverse), (&mut entry.d_normalizer, &*d_normalizer)]
        {
            to.iter_mut().zip(&**from).for_each(|(to, &x)| *to = x / unit);
        }
        entry.set_decays(group, has_decayed, gates);
        if self.with_decays {
            let decays = GroupDecays { q, k, entry, d_features };
            let scores = [&*step.scores, &**d_scores];
            gate_gradients.within(decays, scores, units, out);
        }
        if !entry.decays.is_empty() {
            let decays = d_features.iter_mut().zip(&*entry.decays);
            decays.for_each(|(d_feature, &decay)| *d_feature *= decay);
        }
        self.queries(entry, d_features, units, out, map)?;
        if group.is_single() {
            steps::absorb(state, part, group.log_scale, &step.key_sums);
        } else {
            steps::update(state, part, group, gates, &mut step.key_sums);
        }
        Ok(true)
    }

    /// Adds the gradient by the queries of an entry from that by their features, which it brings to
    /// absolute terms.
    fn queries(
        &self,
        entry: &Entry<T>,
        d_features: &mut [T],
        units: Units<T>,
        out: &mut TokenGradients<'_, T>,
        map: &mut MapBuffers<T>,
    ) -> Result<(), Error> {
        units.bring(d_features);
        let mapped = Mapped {
            side: Side::Query,
            x: views::rows(self.tokens.q, entry.rows.clone()),
            width: entry.width,
            values: &entry.queries,
            log_scale: &entry.query_scale,
            d_values: d_features,
        };
        let d_q = views::rows_mut(out.d_q.view_mut(), entry.rows.clone());
        let map_and_root = (self.pass.feature_map(), self.pass.scale_root());
        out.is_finite &= map.add(map_and_root, mapped, d_q)?;
        Ok(())
    }

    /// Queries that see all keys, whose sums there are: their gradients, and what they add to the
    /// suffix sums.
    pub(super) fn read_all(
        &self,
        rows: Range<usize>,
        units: Units<T>,
        out: &mut TokenGradients<'_, T>,
        work: &mut BackwardWork<T>,
    ) -> Result<(), Error> {
        let (m, value_dim) = (self.pass.num_features(), self.value_dim());
        let BackwardWork { pass: buffers, tape, state, map, .. } = work;
        buffers.chunk.resize_padded(rows.len(), m, value_dim);
        self.pass.map(
            Side::Query,
            views::rows(self.tokens.q, rows.clone()),
            buffers,
            rows.start,
        )?;
        tape.clear();
        let entry = tape.next();
        entry.begin(rows.clone(), &buffers.chunk, m);
        let (width, q, log_scale) = (entry.width, &entry.queries, state.scale.high);
        entry.log_scale = log_scale;
        let Buffers { d_out, squares, denominator, d_features, .. } = &mut work.buffers;
        denominator.resize(width);
        kernel::row_times_matrix(&state.normalizer, q, width, denominator);
        entry.inverse.fill(T::zero());
        entry.d_normalizer.fill(T::zero());
        for t in 0..rows.len() {
            entry.inverse[t] = match self.readout {
                Readout::Normalized => divisor(denominator[t], rows.start + t)?.recip(),
                Readout::Unnormalized => (entry.query_scale[t] + log_scale).exp(),
            };
        }
        let cotangents = views::rows(out.d_out, rows.clone());
        set_cotangents(cotangents, (rows.start, width), units, squares, d_out)?;
        d_features.resize(m * width);
        let sums = Matrix::rows(&state.sums, padded::<T>(value_dim));
        product([m, width, value_dim], sums, d_out, d_features, width, false);
        if self.readout == Readout::Normalized {
            dot_columns(q, d_features, 0, &mut entry.d_normalizer);
            for (d_normalizer, &inverse) in entry.d_normalizer.iter_mut().zip(&*entry.inverse) {
                *d_normalizer = -(*d_normalizer * inverse) * inverse;
            }
        }
        affine_columns(d_features, &state.normalizer, &entry.inverse, &entry.d_normalizer);
        self.queries(entry, d_features, units, out, map)?;
        let largest = kernel::max_abs(&entry.inverse);
        let unit = if largest > T::zero() { largest } else { T::one() };
        entry.unit = unit.ln();
        for factors in [&mut entry.inverse, &mut entry.d_normalizer] {
            kernel::scale(factors, unit.recip());
        }
        self.queries_to_suffix(units, out.d_out, work);
        Ok(())
    }
}

/// Cotangents as columns, in their unit; fails if one is not finite, with rows from the first on.
fn set_cotangents<T: Scalar>(
    cotangents: ArrayView2<'_, T>,
    (first_row, width): (usize, usize),
    units: Units<T>,
    squares: &mut Buffer<T>,
    out: &mut Buffer<T>,
) -> Result<(), Error> {
    out.resize(cotangents.ncols() * width);
    squares.resize(width);
    views::to_columns(cotangents, units.d_out_inverse, squares, out);
    if kernel::all_finite(squares) {
        return Ok(());
    }
    check::finite("d_out", cotangents).map_err(|error| error.in_chunk(first_row))
}

/// `out = factor·x`.
fn scale_by<T: Scalar>(factor: T, x: &[T], out: &mut Buffer<T>) {
    out.resize(x.len());
    kernel::scale_into(factor, x, out);
}
