//! The scan from the last token to the first: what later queries do to keys and values.

use crate::error::Error;
use crate::features::side::Side;
use crate::kernel;
use crate::kernel::buffer::padded;
use crate::kernel::gradients::{add_and_scale_columns, product};
use crate::kernel::loops::products::{Epilogue, Matrix, Product};
use crate::memory::linear::backward::call::{Backward, TokenGradients, Units};
use crate::memory::linear::backward::map::{MapBuffers, Mapped};
use crate::memory::linear::backward::rows::{add_rows, scaled_rows};
use crate::memory::linear::backward::tape::Entry;
use crate::memory::linear::backward::work::{BackwardWork, Buffers};
use crate::memory::linear::chunk::Chunk;
use crate::memory::linear::gates::{Gates, Rates};
use crate::memory::linear::groups::Group;
use crate::memory::linear::state::State;
use crate::memory::linear::state_decay::StateDecay;
use crate::memory::linear::steps::StepBuffers;
use crate::scalar::Scalar;
use crate::views;
use ndarray::ArrayView2;

impl<T: Scalar> Entry<T> {
    /// Keeps what the tokens of a group let decay, that of the first perhaps in the sums already.
    pub(super) fn set_decays(&mut self, group: &Group<T>, has_decayed: bool, gates: &Gates<T>) {
        self.rates = gates.rates();
        if has_decayed {
            self.decay_before.extend_from_slice(gates.row(group.tokens.start));
        }
        if gates.rates() == Rates::None || group.is_single() {
            return;
        }
        self.decay_within.extend_from_slice(gates.since(group.tokens.end - 1));
        if gates.rates() == Rates::PerFeature {
            let size = self.queries.len();
            self.decays.resize(size);
            self.decays.copy_from_slice(&gates.feature_decays()[..size]);
        }
    }

    /// For keys that no query of this entry sees, at the log scale of the sums of all.
    pub(super) fn begin_alone(
        &mut self,
        log_scale: T,
        chunk: &mut Chunk<T>,
        features: usize,
        step: &mut StepBuffers<T>,
    ) {
        chunk.rescale_keys(log_scale, features, &mut step.factors, &mut step.key_sums);
        self.key_factors.resize(self.width);
        self.key_factors.copy_from_slice(&step.factors[..self.width]);
        self.log_scale = log_scale;
        self.d_keys.fill(T::zero());
    }
}

/// Lets sums decay by log decays, if there are any.
fn let_decay<T: Scalar>(sums: &mut State<T>, log_decay: &[T], decay: &mut StateDecay<T>) {
    if !log_decay.is_empty() {
        decay.set(log_decay);
        sums.decay(decay);
    }
}

impl<T: Scalar> Backward<'_, T> {
    /// The scan over a tape.
    pub(super) fn scan_back(
        &self,
        units: Units<T>,
        out: &mut TokenGradients<'_, T>,
        work: &mut BackwardWork<T>,
    ) -> Result<(), Error> {
        let BackwardWork { tape, suffix, map, gates, buffers, decay, .. } = work;
        for entry in tape.backwards() {
            // back to where the group began, as its keys count
            let_decay(suffix, &entry.decay_within, decay);
            let has_future = suffix.tokens > 0;
            if has_future {
                self.later_queries(entry, suffix, units, out, buffers);
            }
            if self.with_decays && has_future {
                let later = (&*suffix, &*buffers.d_features, factor(entry, suffix));
                gates.add_later(entry, later, units, out);
            }
            let factor = has_future.then(|| factor(entry, suffix));
            self.keys(entry, factor, units, out, map, buffers)?;
            if self.asked {
                self.add_queries(entry, suffix, units, out.d_out, buffers);
            }
            let_decay(suffix, &entry.decay_before, decay);
        }
        Ok(())
    }

    /// Adds the gradient by values from later queries; leaves that by keys, in units of the suffix
    /// sums, among the buffers.
    fn later_queries(
        &self,
        entry: &Entry<T>,
        suffix: &State<T>,
        units: Units<T>,
        out: &mut TokenGradients<'_, T>,
        buffers: &mut Buffers<T>,
    ) {
        let (m, value_dim, width) = (self.pass.num_features(), self.value_dim(), entry.width);
        let stride = padded::<T>(value_dim);
        let rows = entry.rows.clone();
        let Buffers { values, squares, d_features, features, d_values, .. } = buffers;
        let v = views::rows(self.tokens.v, rows.clone());
        values.resize(value_dim * width);
        squares.resize(width);
        views::to_columns(v, units.values_inverse, squares, values);
        d_features.resize(m * width);
        Product {
            m,
            n: width,
            k: value_dim,
            a: Matrix::rows(&suffix.sums, stride),
            b: values,
            ldb: width,
            c: d_features,
            ldc: width,
            into: Epilogue::Bias(&suffix.normalizer),
        }
        .run();
        let keys: &[T] = if entry.decays.is_empty() {
            &entry.keys
        } else {
            features.resize(m * width);
            let quotients = entry.keys.iter().zip(&*entry.decays);
            features.iter_mut().zip(quotients).for_each(|(to, (&key, &decay))| *to = key / decay);
            features
        };
        d_values.resize(rows.len() * stride);
        let sizes = [rows.len(), stride, m];
        product(sizes, Matrix::columns(keys, width), &suffix.sums, d_values, stride, false);
        let factor = factor(entry, suffix);
        squares.iter_mut().zip(&*entry.key_factors).for_each(|(to, &key)| *to = key * factor);
        kernel::scale_rows_in_place(d_values, stride, &squares[..rows.len()]);
        let d_v = views::rows_mut(out.d_v.view_mut(), rows);
        out.is_finite &= add_rows(d_values, units.d_out, d_v);
    }

    /// Adds the gradient by keys.
    fn keys(
        &self,
        entry: &mut Entry<T>,
        factor: Option<T>,
        units: Units<T>,
        out: &mut TokenGradients<'_, T>,
        map: &mut MapBuffers<T>,
        buffers: &Buffers<T>,
    ) -> Result<(), Error> {
        let Entry { d_keys, keys, key_factors, decays, .. } = entry;
        if let Some(factor) = factor {
            add_and_scale_columns(d_keys, factor, &buffers.d_features, key_factors);
        } else {
            add_and_scale_columns(d_keys, T::zero(), keys, key_factors);
        }
        if !decays.is_empty() {
            d_keys.iter_mut().zip(&**decays).for_each(|(d_key, &decay)| *d_key /= decay);
        }
        units.bring(d_keys);
        let rows = entry.rows.clone();
        let mapped = Mapped {
            side: Side::Key,
            x: views::rows(self.tokens.k, rows.clone()),
            width: entry.width,
            values: &entry.keys,
            log_scale: &entry.key_scale,
            d_values: &mut entry.d_keys,
        };
        let d_k = views::rows_mut(out.d_k.view_mut(), rows);
        let map_and_root = (self.pass.feature_map(), self.pass.scale_root());
        out.is_finite &= map.add(map_and_root, mapped, d_k)?;
        Ok(())
    }

    /// Adds the queries of a group to the suffix sums.
    fn add_queries(
        &self,
        entry: &Entry<T>,
        suffix: &mut State<T>,
        units: Units<T>,
        d_out: ArrayView2<'_, T>,
        buffers: &mut Buffers<T>,
    ) {
        let (m, width) = (self.pass.num_features(), entry.width);
        let own = entry.unit - entry.log_scale;
        suffix.rescale(own);
        let share = (own - suffix.scale.high).exp();
        let Buffers { d_out_rows, squares, features, sums, .. } = buffers;
        squares.resize(width);
        kernel::scale_into(share * units.d_out_inverse, &entry.inverse, squares);
        let cotangents = views::rows(d_out, entry.rows.clone());
        scaled_rows(cotangents, squares, d_out_rows);
        let queries: &[T] = if entry.decays.is_empty() {
            &entry.queries
        } else {
            features.resize(m * width);
            let products = entry.queries.iter().zip(&*entry.decays);
            features
                .iter_mut()
                .zip(products)
                .for_each(|(to, (&query, &decay))| *to = query * decay);
            features
        };
        sums.resize(m);
        kernel::rows_dot(share, &entry.d_normalizer, queries, sums);
        suffix.all_rows().add(queries, width, d_out_rows, sums);
        suffix.tokens += entry.tokens();
    }

    /// Adds the queries of a tape of one entry to the suffix sums.
    pub(super) fn queries_to_suffix(
        &self,
        units: Units<T>,
        d_out: ArrayView2<'_, T>,
        work: &mut BackwardWork<T>,
    ) {
        let BackwardWork { tape, suffix, buffers, .. } = work;
        for entry in tape.backwards() {
            self.add_queries(entry, suffix, units, d_out, buffers);
        }
    }

    /// The gradients by the keys and values of a tape of one entry, from the suffix sums alone.
    pub(super) fn keys_from_suffix(
        &self,
        units: Units<T>,
        out: &mut TokenGradients<'_, T>,
        work: &mut BackwardWork<T>,
    ) -> Result<(), Error> {
        let BackwardWork { tape, suffix, map, buffers, .. } = work;
        for entry in tape.backwards() {
            let has_future = suffix.tokens > 0;
            if has_future {
                self.later_queries(entry, suffix, units, out, buffers);
            }
            let factor = has_future.then(|| factor(entry, suffix));
            self.keys(entry, factor, units, out, map, buffers)?;
        }
        Ok(())
    }
}

/// What brings gradients by keys from the unit of the suffix sums to that of a group:
/// `e^{w + L}`.
fn factor<T: Scalar>(entry: &Entry<T>, suffix: &State<T>) -> T {
    (suffix.scale.high + entry.log_scale + suffix.scale.low).exp()
}
