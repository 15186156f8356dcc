//! The sums before a part of a sequence.

use crate::kernel::buffer::Buffer;
use crate::memory::linear::bounds::Size;
use crate::memory::linear::log_scale::LogScale;
use crate::memory::linear::state::State;
use crate::scalar::Scalar;

/// Sums without their rounding errors, which are less than the last digit of each.
#[derive(Debug)]
pub(super) struct Checkpoint<T> {
    sums: Buffer<T>,
    normalizer: Buffer<T>,
    scale: LogScale<T>,
    tokens: usize,
    size: Size,
}

impl<T: Scalar> Checkpoint<T> {
    pub(super) fn new() -> Self {
        Self {
            sums: Buffer::new(),
            normalizer: Buffer::new(),
            scale: LogScale::empty(),
            tokens: 0,
            size: Size::Small,
        }
    }

    pub(super) fn keep(&mut self, state: &State<T>) {
        for (to, from) in [(&mut self.sums, &state.sums), (&mut self.normalizer, &state.normalizer)]
        {
            to.resize(from.len());
            to.copy_from_slice(from);
        }
        (self.scale, self.tokens, self.size) = (state.scale, state.tokens, state.size);
    }

    /// Brings a state of the same sizes back.
    pub(super) fn restore(&self, state: &mut State<T>) {
        state.sums.copy_from_slice(&self.sums);
        state.sums_low.fill(T::zero());
        state.normalizer.copy_from_slice(&self.normalizer);
        state.normalizer_low.fill(T::zero());
        (state.scale, state.tokens, state.size) = (self.scale, self.tokens, self.size);
    }
}
