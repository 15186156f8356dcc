//! The last tokens of a decoder, which wait beside the sums until they are added in one product.

use crate::kernel;
use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::loops::decode::{BLOCK, Waiting};
use crate::scalar::Scalar;

/// Tokens that the normaliser has and the sums have not: fewer than [`BLOCK`] between calls. A
/// step then reads the sums once and stores nothing to them.
#[derive(Clone, Debug)]
pub(super) struct Pending<T> {
    tokens: usize,
    /// `[BLOCK, num_features]`, rows padded, in units of the sums. Empty where no token may wait.
    pub(super) keys: Buffer<T>,
    /// `[BLOCK, value_dim]`, rows padded.
    pub(super) values: Buffer<T>,
}

impl<T: Scalar> Pending<T> {
    pub(super) fn new() -> Self {
        Self { tokens: 0, keys: Buffer::new(), values: Buffer::new() }
    }

    /// Makes room for tokens of these sizes, of which there are none.
    pub(super) fn reserve(&mut self, features: usize, value_dim: usize) {
        self.keys.resize(BLOCK * padded::<T>(features));
        self.values.resize(BLOCK * padded::<T>(value_dim));
        self.clear();
    }

    /// Forgets the tokens.
    pub(super) fn clear(&mut self) {
        self.tokens = 0;
    }

    pub(super) fn copy_from(&mut self, other: &Self) {
        self.tokens = other.tokens;
        self.keys.resize(other.keys.len());
        self.values.resize(other.values.len());
        let [keys, values] = [other.held_keys(), other.values()];
        self.keys[..keys.len()].copy_from_slice(keys);
        self.values[..values.len()].copy_from_slice(values);
    }

    /// Brings the keys to another unit.
    pub(super) fn scale(&mut self, factor: T) {
        let held = self.tokens * self.key_stride();
        kernel::scale(&mut self.keys[..held], factor);
    }

    /// Numbers between two keys.
    pub(super) fn key_stride(&self) -> usize {
        self.keys.len() / BLOCK
    }

    fn held_keys(&self) -> &[T] {
        &self.keys[..self.tokens * self.key_stride()]
    }

    /// Whether tokens may wait.
    pub(super) fn has_room(&self) -> bool {
        !self.keys.is_empty()
    }

    /// How many can be held.
    pub(super) fn room(&self) -> usize {
        if self.has_room() { BLOCK } else { 0 }
    }

    /// Tokens that wait.
    pub(super) fn len(&self) -> usize {
        self.tokens
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// Whether one more cannot wait.
    pub(super) fn is_full(&self) -> bool {
        self.tokens == BLOCK
    }

    /// The values of the tokens that wait.
    pub(super) fn values(&self) -> &[T] {
        &self.values[..self.values.len() / BLOCK * self.tokens]
    }

    /// What a loop is to put one more token in.
    pub(super) fn waiting(&mut self) -> Waiting<'_, T> {
        let stride = self.key_stride();
        Waiting { keys: &mut self.keys, stride, values: &mut self.values, count: self.tokens }
    }

    /// Counts the token that a loop has put in.
    pub(super) fn count_one(&mut self) {
        self.tokens += 1;
    }

    /// Padded key and padded value of each token that waits.
    pub(super) fn tokens(&self) -> impl Iterator<Item = [&[T]; 2]> {
        let values = self.values.chunks((self.values.len() / BLOCK).max(1));
        let keys = self.held_keys().chunks(self.key_stride().max(1));
        keys.zip(values).map(|(key, value)| [key, value])
    }

    /// Takes in one token, of which neither need be padded.
    pub(super) fn push(&mut self, key: &[T], value: &[T]) {
        let (key_stride, stride) = (self.key_stride(), self.values.len() / BLOCK);
        let token = self.tokens;
        self.keys[token * key_stride..][..key.len()].copy_from_slice(key);
        let row = &mut self.values[token * stride..(token + 1) * stride];
        row[..value.len()].copy_from_slice(value);
        row[value.len()..].fill(T::zero());
        self.tokens += 1;
    }
}
