//! The second pass: what queries hand on to the tokens before them.

use crate::error::Error;
use crate::features::side::Side;
use crate::kernel;
use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::gradients::product;
use crate::kernel::loops::products::{Epilogue, Matrix, Product};
use crate::memory::linear::backward::late::decay::Brought;
use crate::memory::linear::backward::late::sums::{Asking, Entering, LateSums};
use crate::memory::linear::backward::map::Mapped;
use crate::memory::linear::backward::rows::scaled_rows;
use crate::memory::linear::chunk::key_factors;
use crate::memory::linear::pass::Pass;
use crate::memory::softmax_gradient::add as add_rows;
use crate::memory::unit;
use crate::scalar::Scalar;
use crate::views::to_columns;
use ndarray::ArrayViewMut2;

impl<T: Scalar> LateSums<T> {
    /// The second pass: tokens that enter in a block, and what the queries of later blocks hand on
    /// to them.
    pub(crate) fn enter_again(
        &mut self,
        pass: &Pass<'_, T>,
        tokens: Entering<'_, T>,
    ) -> Result<(), Error> {
        self.map_entering(pass, tokens)?;
        let (m, value_dim) = (pass.num_features(), tokens.v.ncols());
        let (width, stride) = (self.width, padded::<T>(value_dim));
        self.decay.begin_block_again(self.entering);
        if self.entering == 0 {
            return Ok(());
        }
        self.decay.sums_by_half(&mut self.state);
        self.brought.resize(self.keys.len());
        self.brought.copy_from_slice(&self.keys);
        self.decay.bring(&mut self.brought, width, Brought::Keys);
        self.values.resize(value_dim * width);
        self.scratch.resize(width);
        to_columns(tokens.v, self.units.v.inverse(), &mut self.scratch, &mut self.values);
        self.d_keys.resize(m * width);
        self.d_values.resize(self.entering * stride);
        if self.state.tokens == 0 {
            self.d_keys.fill(T::zero());
            self.d_values.fill(T::zero());
            return Ok(());
        }
        Product {
            m,
            n: width,
            k: value_dim,
            a: Matrix::rows(&self.state.sums, stride),
            b: &self.values,
            ldb: width,
            c: &mut self.d_keys,
            ldc: width,
            into: Epilogue::Bias(&self.state.normalizer),
        }
        .run();
        let keys = Matrix::columns(&self.brought, width);
        let to = &mut self.d_values;
        product([self.entering, stride, m], keys, &self.state.sums, to, stride, false);
        exponentials(&self.key_scale, self.state.scale.high, self.entering, &mut self.factors);
        self.key_sums.resize(m);
        kernel::scale_and_sum_rows(&mut self.d_keys, &self.factors, &mut self.key_sums);
        self.decay.take_keys(&self.brought, &self.d_keys, width);
        kernel::scale_rows_in_place(to, stride, &self.factors[..self.entering]);
        Ok(())
    }

    /// Queries of a block, with the logarithms of their normalisers and their means: what they hand
    /// on to the tokens that enter within it, and to the sums for tokens before.
    pub(crate) fn ask_again(
        &mut self,
        pass: &Pass<'_, T>,
        asking: Asking<'_, T>,
        [log_normalizer, means]: [&[T]; 2],
        from: &[usize],
    ) -> Result<(), Error> {
        let (m, value_dim, n) = (pass.num_features(), self.state.value_dim, asking.q.nrows());
        let (width, stride) = (padded::<T>(n), padded::<T>(value_dim));
        self.pass.chunk.resize_padded(n, m, value_dim);
        pass.map(Side::Query, asking.q, &mut self.pass, asking.row)?;
        let chunk = &mut self.pass.chunk;
        let queries = &mut chunk.queries[..m * width];
        self.decay.bring(queries, width, Brought::Queries(from));
        self.log_scale.resize(width);
        let logs = chunk.query_scale.iter().zip(log_normalizer);
        self.log_scale.iter_mut().zip(logs).for_each(|(to, (&own, &all))| *to = own - all);
        let largest = kernel::max(&self.log_scale[..n]);
        key_factors(&self.log_scale, largest, n, &mut self.denominator);
        self.key_sums.resize(m);
        kernel::scale_and_sum_rows(queries, &self.denominator, &mut self.key_sums);
        self.scratch.resize(n);
        self.scratch.fill(self.units.d_out.inverse());
        scaled_rows(asking.d_out, &self.scratch, &mut self.d_out_rows);

        if self.entering > 0 {
            let (a, of_a) = (self.entering, self.width);
            // gradients by the products `[queries, tokens]`
            let Self { scores, d_scores, d_features, .. } = self;
            d_scores.resize(n * of_a);
            let rows = Matrix::rows(&self.d_out_rows, stride);
            product([n, of_a, value_dim], rows, &self.values, d_scores, of_a, false);
            for (t, row) in d_scores.chunks_exact_mut(of_a).enumerate() {
                let seen = from.partition_point(|&from| from <= t);
                row[..seen].iter_mut().for_each(|x| *x -= means[t]);
                row[seen..].fill(T::zero());
            }
            d_features.resize(m * of_a);
            let rows = Matrix::rows(queries, width);
            product([m, of_a, n], rows, d_scores, d_features, of_a, false);
            exponentials(&self.key_scale, largest, a, &mut self.factors);
            self.key_sums.resize(m);
            kernel::scale_and_sum_rows(d_features, &self.factors, &mut self.key_sums);
            kernel::add_scaled(&mut self.d_keys, T::one(), d_features);
            // the products themselves
            scores.resize(a * width);
            let keys = Matrix::columns(&self.brought, of_a);
            product([a, width, m], keys, queries, scores, width, false);
            let rows = scores.chunks_exact_mut(width).zip(from).zip(&*self.factors);
            for ((row, &from), &factor) in rows {
                row[..from].fill(T::zero());
                kernel::scale(row, factor);
            }
            let rows = Matrix::rows(scores, width);
            product([a, stride, n], rows, &self.d_out_rows, &mut self.d_values, stride, true);
        }

        self.state.rescale(largest);
        let share = (largest - self.state.scale.high).exp();
        kernel::scale(&mut self.d_out_rows, share);
        self.minus.resize(width);
        self.minus.fill(T::zero());
        self.minus.iter_mut().zip(&means[..n]).for_each(|(to, &mean)| *to = -mean);
        kernel::rows_dot(share, &self.minus, queries, &mut self.key_sums);
        self.state.all_rows().add(queries, width, &self.d_out_rows, &self.key_sums);
        self.state.tokens += n;
        Ok(())
    }

    /// Adds the gradients by the tokens that entered in a block, after its queries.
    pub(crate) fn add_to_tokens(
        &mut self,
        pass: &Pass<'_, T>,
        tokens: Entering<'_, T>,
        d_k: ArrayViewMut2<'_, T>,
        d_v: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        let (m, width) = (pass.num_features(), self.width);
        if self.entering == 0 {
            return Ok(());
        }
        self.decay.add(&self.brought, &self.d_keys, width, Brought::Keys);
        self.decay.bring(&mut self.d_keys, width, Brought::Keys);
        self.decay.sums_by_half(&mut self.state);
        for factor in unit::product(1.0, &[self.units.d_out, self.units.v]) {
            if factor != T::one() {
                kernel::scale(&mut self.d_keys, factor);
            }
        }
        let factor = unit::product(1.0, &[self.units.d_out]);
        let stride = padded::<T>(tokens.v.ncols());
        add_rows(d_v, &mut self.d_values, stride, factor);
        let mapped = Mapped {
            side: Side::Key,
            x: tokens.k,
            width,
            values: &self.keys[..m * width],
            log_scale: &self.key_scale,
            d_values: &mut self.d_keys,
        };
        self.map.add((pass.feature_map(), pass.scale_root()), mapped, d_k)?;
        Ok(())
    }
}

/// `e^{x + shift}` of some numbers, and 0 beyond.
fn exponentials<T: Scalar>(x: &[T], shift: T, count: usize, out: &mut Buffer<T>) {
    out.resize(x.len());
    out.iter_mut().zip(x).for_each(|(to, &x)| *to = (x + shift).exp());
    out[count..].fill(T::zero());
}
