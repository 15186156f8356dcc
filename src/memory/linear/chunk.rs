//! Tokens of one chunk, mapped: features as columns with their log scales, and values.

use crate::check;
use crate::error::Error;
use crate::kernel;
use crate::kernel::buffer::{Buffer, padded};
use crate::memory::linear::bounds::{Size, headroom};
use crate::scalar::Scalar;
use core::ops::Range;
use ndarray::ArrayView2;

/// Tokens, mapped, as columns: features `[num_features, width]` at their log scales;
/// values `[tokens, value_dim]` with padded rows. A single token has width 1.
#[derive(Debug)]
pub(super) struct Chunk<T> {
    pub(super) tokens: usize,
    pub(super) width: usize,
    pub(super) queries: Buffer<T>,
    pub(super) query_scale: Buffer<T>,
    pub(super) keys: Buffer<T>,
    pub(super) key_scale: Buffer<T>,
    pub(super) values: Buffer<T>,
    pub(super) values_size: Size,
    /// See [`headroom`]: of the values.
    pub(super) headroom: T,
    /// The log decays before the first token and from there to the last, if the scales have been
    /// shifted by them.
    #[cfg(feature = "rayon")]
    pub(super) decay: Option<[T; 2]>,
}

impl<T: Scalar> Chunk<T> {
    pub(super) fn new() -> Self {
        Self {
            tokens: 0,
            width: 0,
            queries: Buffer::new(),
            query_scale: Buffer::new(),
            keys: Buffer::new(),
            key_scale: Buffer::new(),
            values: Buffer::new(),
            values_size: Size::Small,
            headroom: T::zero(),
            #[cfg(feature = "rayon")]
            decay: None,
        }
    }

    pub(super) fn resize(&mut self, tokens: usize, features: usize, value_dim: usize) {
        let width = if tokens == 1 { 1 } else { padded::<T>(tokens) };
        self.resize_to(tokens, width, features, value_dim);
    }

    fn resize_to(&mut self, tokens: usize, width: usize, features: usize, value_dim: usize) {
        (self.tokens, self.width) = (tokens, width);
        self.queries.resize(padded::<T>(features) * self.width);
        self.keys.resize(padded::<T>(features) * self.width);
        self.query_scale.resize(self.width);
        self.key_scale.resize(self.width);
        self.values.resize(tokens * padded::<T>(value_dim));
    }

    /// Copies and checks values; the padding is zero.
    pub(super) fn set_values(&mut self, v: ArrayView2<'_, T>) -> Result<(), Error> {
        let stride = padded::<T>(v.ncols());
        let largest = match v.to_slice() {
            Some(v) if v.len() == self.values.len() => {
                kernel::copy_and_measure(v, &mut self.values)
            }
            _ => {
                let (mut largest, mut mark) = (T::zero(), T::zero());
                for (row, copy) in v.outer_iter().zip(self.values.chunks_exact_mut(stride)) {
                    let (values, padding) = copy.split_at_mut(row.len());
                    padding.fill(T::zero());
                    for (copy, &value) in values.iter_mut().zip(row) {
                        *copy = value;
                        largest = largest.max(value.abs());
                        mark += value * T::zero();
                    }
                }
                largest + mark
            }
        };
        self.note_values(largest);
        if largest.is_finite() { Ok(()) } else { check::finite("v", v) }
    }

    /// As [`resize`](Self::resize), with padded columns for a single token as well.
    pub(super) fn resize_padded(&mut self, tokens: usize, features: usize, value_dim: usize) {
        self.resize_to(tokens, padded::<T>(tokens), features, value_dim);
    }

    /// Multiplies the values.
    pub(super) fn scale_values(&mut self, factor: T) {
        kernel::scale(&mut self.values, factor);
        self.note_values(kernel::max_abs(&self.values));
    }

    /// Notes the largest magnitude of the values.
    pub(super) fn note_values(&mut self, largest: T) {
        (self.values_size, self.headroom) = (Size::of_values(largest), headroom(largest));
    }

    /// Takes tokens out of another chunk.
    pub(super) fn copy_tokens(
        &mut self,
        from: &Self,
        tokens: Range<usize>,
        features: usize,
        value_dim: usize,
    ) {
        let width = if tokens.len() == 1 { 1 } else { padded::<T>(tokens.len()) };
        self.copy_tokens_to(width, from, tokens, features, value_dim);
    }

    /// As [`copy_tokens`](Self::copy_tokens), with so many columns.
    pub(super) fn copy_tokens_to(
        &mut self,
        width: usize,
        from: &Self,
        tokens: Range<usize>,
        features: usize,
        value_dim: usize,
    ) {
        self.resize_to(tokens.len(), width, features, value_dim);
        for (to, from_features) in
            [(&mut self.queries, &from.queries), (&mut self.keys, &from.keys)]
        {
            for (to, row) in to
                .chunks_exact_mut(self.width)
                .zip(from_features.chunks_exact(from.width))
                .take(features)
            {
                to.fill(T::zero());
                to[..tokens.len()].copy_from_slice(&row[tokens.clone()]);
            }
        }
        self.query_scale[..tokens.len()].copy_from_slice(&from.query_scale[tokens.clone()]);
        self.key_scale[..tokens.len()].copy_from_slice(&from.key_scale[tokens.clone()]);
        let stride = padded::<T>(value_dim);
        self.values.copy_from_slice(&from.values[tokens.start * stride..tokens.end * stride]);
        (self.values_size, self.headroom) = (from.values_size, from.headroom);
    }

    /// The least log scale of sums that the token with this key is added to.
    pub(super) fn least_scale(&self, token: usize) -> T {
        self.key_scale[token] + self.headroom
    }

    /// Brings the keys from their own log scales to a common one, and sums the features of each.
    pub(super) fn rescale_keys(
        &mut self,
        log_scale: T,
        features: usize,
        factors: &mut Buffer<T>,
        key_sums: &mut Buffer<T>,
    ) {
        key_factors(&self.key_scale, log_scale, self.tokens, factors);
        key_sums.resize(features);
        kernel::scale_and_sum_rows(&mut self.keys[..features * self.width], factors, key_sums);
    }
}

/// What brings each key from its own log scale to a common one; 0 beyond the tokens.
pub(super) fn key_factors<T: Scalar>(
    key_scale: &[T],
    log_scale: T,
    tokens: usize,
    factors: &mut Buffer<T>,
) {
    let log2_e = T::from_f64(core::f64::consts::LOG2_E);
    factors.resize(key_scale.len());
    for (factor, &scale) in factors.iter_mut().zip(key_scale) {
        *factor = (scale - log_scale) * log2_e;
    }
    factors[tokens..].fill(T::neg_infinity());
    kernel::exp2_slice(factors, T::zero());
}
