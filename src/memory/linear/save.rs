//! States as numbers, to be saved, and as they were, to be gone back to.

use crate::kernel;
use crate::memory::linear::bounds::Size;
use crate::memory::linear::state::State;
use crate::scalar::Scalar;

/// A state to return to, if there is one.
#[derive(Debug)]
pub(crate) struct SavedState<T> {
    state: State<T>,
    valid: bool,
}

impl<T: Scalar> SavedState<T> {
    pub(crate) fn new() -> Self {
        Self { state: State::new(), valid: false }
    }

    pub(crate) fn clear(&mut self) {
        self.valid = false;
    }

    /// Copies a state.
    pub(super) fn save(&mut self, state: &State<T>) {
        self.state.copy_from(state);
        self.valid = true;
    }

    /// Sets `state` to the one that was saved; returns whether there is one.
    pub(super) fn restore(&self, state: &mut State<T>) -> bool {
        if self.valid {
            state.copy_from(&self.state);
        }
        self.valid
    }
}

impl<T: Scalar> State<T> {
    /// Everything but what rounding left of the log scale: the log scale and the sums, without what
    /// pads them. Empty while no token has been absorbed.
    pub(super) fn numbers(&self) -> Vec<T> {
        if self.tokens == 0 {
            return Vec::new();
        }
        core::iter::once(&self.scale.high).chain(self.rows().flatten()).copied().collect()
    }

    /// The four arrays by rows, without padding.
    fn rows(&self) -> impl Iterator<Item = &[T]> {
        let (stride, value_dim, features) = (self.stride(), self.value_dim, self.features());
        let [sums, sums_low, normalizer, normalizer_low] = self.arrays();
        let matrices = sums
            .chunks_exact(stride)
            .chain(sums_low.chunks_exact(stride))
            .map(move |row| &row[..value_dim]);
        matrices.chain([&normalizer[..features], &normalizer_low[..features]])
    }

    /// The inverse of [`numbers`](Self::numbers), into an empty state of these sizes; the length
    /// has been checked.
    pub(super) fn set_numbers(&mut self, tokens: usize, numbers: &[T]) {
        let Some((&log_scale, mut numbers)) = numbers.split_first() else { return };
        let (stride, value_dim) = (self.stride(), self.value_dim);
        let mut take = |row: &mut [T]| {
            let (values, rest) = numbers.split_at(row.len());
            row.copy_from_slice(values);
            numbers = rest;
        };
        let [sums, sums_low, normalizer, normalizer_low] = self.arrays_mut();
        for row in sums.chunks_exact_mut(stride).chain(sums_low.chunks_exact_mut(stride)) {
            take(&mut row[..value_dim]);
        }
        take(normalizer);
        take(normalizer_low);
        self.scale.high = log_scale;
        self.tokens = tokens;
        let largest = self.arrays().into_iter().map(kernel::max_abs).fold(T::zero(), T::max);
        self.size = Size::of_sums(largest);
    }
}
