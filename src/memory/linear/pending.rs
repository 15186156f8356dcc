//! The last tokens of a decoder, which wait beside the sums until they are added in one product.

use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::loops::decode::{BLOCK, Waiting};
use crate::scalar::Scalar;

/// Tokens that the normaliser has and the sums have not: fewer than [`BLOCK`] between calls. A
/// step then reads the sums once and stores nothing to them.
#[derive(Clone, Debug)]
pub(super) struct Pending<T> {
    tokens: usize,
    /// `[num_features, BLOCK]`, one token a column, in units of the sums; 0 beyond the tokens.
    /// Empty where no token may wait.
    pub(super) keys: Buffer<T>,
    /// `[BLOCK, value_dim]`, one token a row, rows padded.
    pub(super) values: Buffer<T>,
}

impl<T: Scalar> Pending<T> {
    pub(super) fn new() -> Self {
        Self { tokens: 0, keys: Buffer::new(), values: Buffer::new() }
    }

    /// Makes room for tokens of these sizes, of which there are none.
    pub(super) fn reserve(&mut self, features: usize, value_dim: usize) {
        self.keys.resize(features * BLOCK);
        self.values.resize(BLOCK * padded::<T>(value_dim));
        self.values.fill(T::zero());
        self.clear();
    }

    /// Forgets the tokens.
    pub(super) fn clear(&mut self) {
        self.tokens = 0;
        self.keys.fill(T::zero());
    }

    pub(super) fn copy_from(&mut self, other: &Self) {
        self.tokens = other.tokens;
        self.keys.resize(other.keys.len());
        self.values.resize(other.values.len());
        self.keys.copy_from_slice(&other.keys);
        self.values.copy_from_slice(&other.values);
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
        Waiting { keys: &mut self.keys, values: &mut self.values, count: self.tokens }
    }

    /// Counts the token that a loop has put in.
    pub(super) fn count_one(&mut self) {
        self.tokens += 1;
    }

    /// The key, without what pads it, and the value of each token that waits.
    pub(super) fn tokens(&self) -> impl Iterator<Item = (impl Iterator<Item = &T>, &[T])> {
        let values = self.values.chunks_exact((self.values.len() / BLOCK).max(1));
        let key = |token: usize| self.keys[token..].iter().step_by(BLOCK);
        (0..self.tokens).zip(values).map(move |(token, value)| (key(token), value))
    }

    /// Takes in one token as [`tokens`](Self::tokens) gives it; its value may be without padding.
    pub(super) fn push(&mut self, key: &[T], value: &[T]) {
        let token = self.tokens;
        self.keys[token..].iter_mut().step_by(BLOCK).zip(key).for_each(|(to, &x)| *to = x);
        let stride = self.values.len() / BLOCK;
        let row = &mut self.values[token * stride..(token + 1) * stride];
        row[..value.len()].copy_from_slice(value);
        row[value.len()..].fill(T::zero());
        self.tokens += 1;
    }
}
