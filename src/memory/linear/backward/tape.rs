//! What the forward scan keeps of each group of tokens for the scan back.

use crate::kernel::buffer::{Buffer, padded};
use crate::memory::linear::backward::call::block_len;
use crate::memory::linear::chunk::Chunk;
use crate::memory::linear::gates::Rates;
use crate::memory::linear::log_scale::LogScale;
use crate::memory::linear::state::State;
use crate::scalar::Scalar;
use core::ops::Range;

/// A group of tokens that met the sums at once: its features, and the gradients by its keys from
/// within it. Arrays of features are `[num_features, width]`.
#[derive(Debug)]
pub(super) struct Entry<T> {
    /// Rows of the sequence.
    pub(super) rows: Range<usize>,
    pub(super) width: usize,
    /// As they were mapped, with their log scales.
    pub(super) queries: Buffer<T>,
    pub(super) query_scale: Buffer<T>,
    pub(super) keys: Buffer<T>,
    pub(super) key_scale: Buffer<T>,
    /// What brings keys to the log scale of the group.
    pub(super) key_factors: Buffer<T>,
    /// `e^b` where features decay differently, else empty.
    pub(super) decays: Buffer<T>,
    /// The gradient by the keys as they were brought, from the queries of the group.
    pub(super) d_keys: Buffer<T>,
    /// `[width]`, in units of `e^unit`: what cotangents are multiplied with, `1/Z`, and the
    /// gradient by Z, `−(dO·O)/Z`.
    pub(super) inverse: Buffer<T>,
    pub(super) d_normalizer: Buffer<T>,
    pub(super) unit: T,
    /// Of the group, as seen from where the sums begin.
    pub(super) log_scale: T,
    pub(super) rates: Rates,
    /// The log decay that the sums took before the group, and those from there to its last token;
    /// empty if there are none.
    pub(super) decay_before: Vec<T>,
    pub(super) decay_within: Vec<T>,
    /// Where decays are trained: the sums before the group, if there are any.
    pub(super) sums: Buffer<T>,
    pub(super) normalizer: Buffer<T>,
    pub(super) sums_scale: LogScale<T>,
}

impl<T: Scalar> Entry<T> {
    fn new() -> Self {
        Self {
            rows: 0..0,
            width: 0,
            queries: Buffer::new(),
            query_scale: Buffer::new(),
            keys: Buffer::new(),
            key_scale: Buffer::new(),
            key_factors: Buffer::new(),
            decays: Buffer::new(),
            d_keys: Buffer::new(),
            inverse: Buffer::new(),
            d_normalizer: Buffer::new(),
            unit: T::zero(),
            log_scale: T::zero(),
            rates: Rates::None,
            decay_before: Vec::new(),
            decay_within: Vec::new(),
            sums: Buffer::new(),
            normalizer: Buffer::new(),
            sums_scale: LogScale::empty(),
        }
    }

    pub(super) fn tokens(&self) -> usize {
        self.rows.len()
    }

    /// Begins with tokens that have been mapped.
    pub(super) fn begin(&mut self, rows: Range<usize>, mapped: &Chunk<T>, features: usize) {
        (self.rows, self.width) = (rows, mapped.width);
        let size = features * mapped.width;
        for (to, from, len) in [
            (&mut self.queries, &mapped.queries, size),
            (&mut self.keys, &mapped.keys, size),
            (&mut self.query_scale, &mapped.query_scale, mapped.width),
            (&mut self.key_scale, &mapped.key_scale, mapped.width),
        ] {
            to.resize(len);
            to.copy_from_slice(&from[..len]);
        }
        self.begin_gradients();
    }

    fn begin_gradients(&mut self) {
        self.d_keys.resize(self.queries.len());
        self.inverse.resize(self.width);
        self.d_normalizer.resize(self.width);
        self.rates = Rates::None;
        self.decay_before.clear();
        self.decay_within.clear();
        self.decays.resize(0);
        self.sums.resize(0);
    }

    /// As [`begin`](Self::begin), of all tokens of a chunk, whose features go over to the entry.
    pub(super) fn take(&mut self, rows: Range<usize>, chunk: &mut Chunk<T>, features: usize) {
        (self.rows, self.width) = (rows, chunk.width);
        // what the chunk gets in return has room for any other
        for array in [&mut self.queries, &mut self.keys] {
            array.resize(padded::<T>(features) * block_len::<T>());
        }
        self.swap(chunk);
        for (to, from) in
            [(&mut self.query_scale, &chunk.query_scale), (&mut self.key_scale, &chunk.key_scale)]
        {
            to.resize(chunk.width);
            to.copy_from_slice(&from[..chunk.width]);
        }
        // what pads the number of features goes
        for array in [&mut self.queries, &mut self.keys] {
            array.resize(features * chunk.width);
        }
        self.begin_gradients();
    }

    /// Exchanges features with a chunk: of one that was taken, this gives them back.
    pub(super) fn swap(&mut self, chunk: &mut Chunk<T>) {
        core::mem::swap(&mut self.queries, &mut chunk.queries);
        core::mem::swap(&mut self.keys, &mut chunk.keys);
    }

    /// Keeps the sums before the group.
    pub(super) fn keep_sums(&mut self, state: &State<T>) {
        if state.tokens == 0 {
            return;
        }
        self.sums.resize(state.sums.len());
        self.sums.copy_from_slice(&state.sums);
        self.normalizer.resize(state.normalizer.len());
        self.normalizer.copy_from_slice(&state.normalizer);
        self.sums_scale = state.scale;
    }
}

/// Entries in the order of the tokens. It grows to the longest run of groups it has met.
#[derive(Debug)]
pub(super) struct Tape<T> {
    entries: Vec<Entry<T>>,
    used: usize,
}

impl<T: Scalar> Tape<T> {
    pub(super) fn new() -> Self {
        Self { entries: Vec::new(), used: 0 }
    }

    pub(super) fn clear(&mut self) {
        self.used = 0;
    }

    /// The next entry, of any content.
    pub(super) fn next(&mut self) -> &mut Entry<T> {
        if self.used == self.entries.len() {
            self.entries.push(Entry::new());
        }
        self.used += 1;
        &mut self.entries[self.used - 1]
    }

    /// Gives the last entry that was taken back.
    pub(super) fn drop_last(&mut self) {
        self.used -= 1;
    }

    /// The entries that were taken, the last one first.
    pub(super) fn backwards(&mut self) -> impl Iterator<Item = &mut Entry<T>> {
        self.entries[..self.used].iter_mut().rev()
    }
}
