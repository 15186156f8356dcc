//! The first pass: what tokens answer, and the gradients by queries.

use crate::error::Error;
use crate::features::side::Side;
use crate::kernel;
use crate::kernel::buffer::padded;
use crate::kernel::gradients::{affine_columns, dot_columns, product};
use crate::kernel::loops::products::Matrix;
use crate::memory::linear::backward::late::decay::Brought;
use crate::memory::linear::backward::late::sums::{Asking, Entering, LateSums};
use crate::memory::linear::backward::map::Mapped;
use crate::memory::linear::chunk::key_factors;
use crate::memory::linear::pass::Pass;
use crate::memory::seen_rows::Others;
use crate::memory::unit;
use crate::scalar::Scalar;
use core::f64::consts::LOG2_E;
use ndarray::ArrayViewMut2;

impl<T: Scalar> LateSums<T> {
    /// Tokens that enter, before the queries of their block. `false` says that nothing was done:
    /// keys of so different sizes, some of which not all queries see, take shorter blocks.
    pub(crate) fn enter(
        &mut self,
        pass: &Pass<'_, T>,
        tokens: Entering<'_, T>,
        may_fail: bool,
    ) -> Result<bool, Error> {
        self.map_entering(pass, tokens)?;
        if self.entering == 0 {
            self.decay.begin_block(0);
            return Ok(true);
        }
        let scales = &self.key_scale[..self.entering];
        let largest = kernel::max(scales);
        let least = scales.iter().fold(largest, |least, &scale| least.min(scale));
        let before = if self.state.tokens > 0 { self.state.scale.high } else { largest };
        if may_fail && largest - least.min(before) > T::max_value().ln() * T::from_f64(0.4) {
            return Ok(false);
        }
        self.decay.begin_block(self.entering);
        self.decay.sums_by_half(&mut self.state);
        self.state.rescale(largest);
        let scale = self.state.scale.high;
        key_factors(&self.key_scale, scale, self.entering, &mut self.factors);
        self.brought.resize(self.keys.len());
        self.brought.copy_from_slice(&self.keys);
        self.decay.bring(&mut self.brought, self.width, Brought::Keys);
        self.key_sums.resize(pass.num_features());
        kernel::scale_and_sum_rows(&mut self.brought, &self.factors, &mut self.key_sums);
        Ok(true)
    }

    /// What the tokens answer to queries, of cotangents `[d_v, width]` in their unit; those that
    /// enter within the block are seen from the queries `from` on, which do not decrease.
    pub(crate) fn answer(
        &mut self,
        pass: &Pass<'_, T>,
        asking: Asking<'_, T>,
        cotangents: &[T],
        from: &[usize],
    ) -> Result<Others<'_, T>, Error> {
        let (m, value_dim, n) = (pass.num_features(), self.state.value_dim, asking.q.nrows());
        let (width, stride) = (padded::<T>(n), padded::<T>(value_dim));
        self.pass.chunk.resize_padded(n, m, value_dim);
        pass.map(Side::Query, asking.q, &mut self.pass, asking.row)?;
        let mut queries = &self.pass.chunk.queries[..m * width];
        let Self { state, denominator, products, d_features, scores, d_scores, .. } = self;
        if !self.decay.is_none() {
            self.asked.resize(queries.len());
            self.asked.copy_from_slice(queries);
            self.decay.bring(&mut self.asked, width, Brought::Queries(from));
            queries = &self.asked;
        }
        for sums in [&mut *denominator, &mut *products] {
            sums.resize(width);
            sums.fill(T::zero());
        }
        d_features.resize(m * width);
        if state.tokens > 0 {
            kernel::row_times_matrix(&state.normalizer, queries, width, denominator);
            let sums = Matrix::rows(&state.sums, stride);
            product([m, width, value_dim], sums, cotangents, d_features, width, false);
            dot_columns(queries, d_features, 0, products);
        } else {
            d_features.fill(T::zero());
        }
        scores.resize(self.entering * width);
        d_scores.resize(self.entering * width);
        if self.entering > 0 {
            let keys = Matrix::columns(&self.brought, self.width);
            product([self.entering, width, m], keys, queries, scores, width, false);
            let rows = Matrix::rows(&self.value_rows, stride);
            product([self.entering, width, value_dim], rows, cotangents, d_scores, width, false);
            for (row, &from) in scores.chunks_exact_mut(width).zip(from) {
                row[..from].fill(T::zero());
            }
            dot_columns(scores, d_scores, 0, products);
            for row in scores.chunks_exact(width) {
                denominator.iter_mut().zip(row).for_each(|(sum, &x)| *sum += x);
            }
        }
        self.log_scale.resize(width);
        let (scale, log2_e) = (self.state.scale.high, T::from_f64(LOG2_E));
        let scales = self.log_scale.iter_mut().zip(&*self.pass.chunk.query_scale);
        scales.for_each(|(to, &query)| *to = (query + scale) * log2_e);
        Ok(Others {
            log_scale: &self.log_scale,
            denominator: &self.denominator,
            products: &self.products,
        })
    }

    /// Adds the gradient by the queries of the last answer, given what makes weights of the
    /// denominators, and the means.
    pub(crate) fn add_to_queries(
        &mut self,
        pass: &Pass<'_, T>,
        asking: Asking<'_, T>,
        [shares, means]: [&[T]; 2],
        from: &[usize],
        d_q: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        let (m, width) = (pass.num_features(), shares.len());
        let Self { minus, d_features, d_scores, .. } = self;
        minus.resize(width);
        let products = shares.iter().zip(means);
        minus.iter_mut().zip(products).for_each(|(to, (&share, &mean))| *to = -mean * share);
        if self.state.tokens > 0 {
            affine_columns(d_features, &self.state.normalizer, shares, minus);
            if !self.decay.is_none() {
                self.decay.add_queries(&self.asked, d_features, width);
            }
        }
        if self.entering > 0 {
            self.ones.resize(self.entering);
            self.ones.fill(T::one());
            affine_columns(d_scores, &self.ones, shares, minus);
            for (row, &from) in d_scores.chunks_exact_mut(width).zip(from) {
                row[..from].fill(T::zero());
            }
            let keys = Matrix::rows(&self.brought, self.width);
            product([m, width, self.entering], keys, d_scores, d_features, width, true);
        }
        self.decay.add(&self.asked, d_features, width, Brought::Queries(from));
        self.decay.bring(d_features, width, Brought::Queries(from));
        for factor in unit::product(1.0, &[self.units.d_out, self.units.v]) {
            if factor != T::one() {
                kernel::scale(d_features, factor);
            }
        }
        let chunk = &self.pass.chunk;
        let mapped = Mapped {
            side: Side::Query,
            x: asking.q,
            width,
            values: &chunk.queries[..m * width],
            log_scale: &chunk.query_scale,
            d_values: d_features,
        };
        self.map.add((pass.feature_map(), pass.scale_root()), mapped, d_q)?;
        Ok(())
    }

    /// Adds the tokens that have entered to the sums, after the queries of their block.
    pub(crate) fn absorb(&mut self) {
        if self.entering > 0 {
            let Self { state, brought, value_rows, key_sums, width, .. } = self;
            state.all_rows().add(brought, *width, value_rows, key_sums);
            state.tokens += self.entering;
            self.decay.sums_by_half(&mut self.state);
        }
    }
}
