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
    /// Everything but what rounding left of the log scale: the log scale, the sums without what
    /// pads them, and key and value of each token that waits. Empty while no token has been
    /// absorbed.
    pub(super) fn numbers(&self) -> Vec<T> {
        if self.tokens == 0 {
            return Vec::new();
        }
        let (features, value_dim) = (self.features(), self.value_dim);
        let pending = self.pending.tokens();
        let pending =
            pending.flat_map(|[key, value]| key[..features].iter().chain(&value[..value_dim]));
        let sums = core::iter::once(&self.scale.high).chain(self.rows().flatten());
        sums.chain(pending).copied().collect()
    }

    /// How many of so many [`numbers`](Self::numbers) belong to tokens that wait, or the least that
    /// there can be where they are not those of any state of these sizes.
    pub(super) fn fitting_numbers(&self, count: usize) -> usize {
        let sums = 1 + 2 * self.features() * (self.value_dim + 1);
        let waiting = count.saturating_sub(sums);
        let tokens = waiting / self.token_floats();
        if tokens < self.pending.room() { sums + tokens * self.token_floats() } else { sums }
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
        for token in numbers.chunks_exact(self.token_floats()) {
            let (key, value) = token.split_at(self.features());
            self.pending.push(key, value);
        }
        self.scale.high = log_scale;
        self.tokens = tokens;
        let largest = self.arrays().into_iter().map(kernel::max_abs).fold(T::zero(), T::max);
        let of_values = Size::of_values(kernel::max_abs(self.pending.values()));
        self.size = Size::of_sums(largest).max(of_values);
    }
}
