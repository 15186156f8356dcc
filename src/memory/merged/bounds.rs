//! Bounds of the affinities of entries, which [`search`](super::search) goes by.

use crate::kernel;
use crate::kernel::buffer::Buffer;
use crate::scalar::Scalar;

/// See [`search`](super::search).
#[derive(Clone, Debug)]
pub(super) struct Bounds<T> {
    /// Of each entry that is not listed as changed.
    pub(super) bound: Buffer<T>,
    /// Entries that no bound knows of, beside the newest.
    pub(super) changed: Vec<usize>,
    /// Entries that were looked at in this search.
    pub(super) seen: Vec<usize>,
    /// Entries whose affinities are at hand: the last that were measured, in this search.
    pub(super) at_hand: Vec<usize>,
}

impl<T: Scalar> Bounds<T> {
    pub(super) fn new() -> Self {
        Self {
            bound: Buffer::new(),
            changed: Vec::new(),
            seen: Vec::new(),
            at_hand: Vec::with_capacity(2),
        }
    }

    /// Makes room for so many entries; what is known of those there are stays.
    pub(super) fn make_room(&mut self, capacity: usize) {
        self.bound.grow(capacity.max(self.bound.len()));
        for (list, most) in
            [(&mut self.changed, capacity), (&mut self.seen, capacity), (&mut self.at_hand, 2)]
        {
            list.reserve(most.saturating_sub(list.len()));
        }
    }

    /// Nothing is known any more.
    pub(super) fn clear(&mut self) {
        self.bound.fill(T::zero());
        self.changed.clear();
    }

    pub(super) fn copy_from(&mut self, other: &Self) {
        self.bound.resize(other.bound.len());
        self.bound.copy_from_slice(&other.bound);
        self.changed.clone_from(&other.changed);
    }

    /// An entry has changed.
    pub(super) fn change(&mut self, entry: usize) {
        self.bound[entry] = T::zero();
        if !self.changed.contains(&entry) {
            self.changed.push(entry);
        }
    }

    /// The last entry takes the place of another.
    pub(super) fn move_entry(&mut self, from: usize, to: usize) {
        self.bound[to] = self.bound[from];
        self.changed.retain(|&entry| entry != to);
        self.changed.iter_mut().filter(|entry| **entry == from).for_each(|entry| *entry = to);
    }

    /// Entries from this one on are gone.
    pub(super) fn truncate(&mut self, len: usize, old: usize) {
        self.bound[len..old].fill(T::zero());
        self.changed.retain(|&entry| entry < len);
    }

    /// No affinity has grown by more than 1/`decay`.
    pub(super) fn grow(&mut self, used: usize, decay: T) {
        // what rounding adds to weights, their inverses and affinities
        let factor = (T::one() + T::epsilon() * T::from_f64(32.0)) / decay;
        kernel::scale(&mut self.bound[..used], factor);
    }
}
