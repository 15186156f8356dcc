//! The entries that have changed last, with their `1/distance²` to all others.

use crate::kernel::buffer::Buffer;
use crate::memory::merged::row::Row;
use crate::scalar::Scalar;

/// As many are kept: an entry that many others are near to changes often, and its change then
/// costs no more than that of another.
const MOST: usize = 8;

/// See [`search`](super::search).
#[derive(Clone, Debug)]
pub(super) struct Recent<T> {
    /// Entries and their rows, the one that has changed last at the end: the first `len` of them.
    order: [(usize, usize); MOST],
    len: usize,
    rows: Buffer<T>,
    capacity: usize,
}

impl<T: Scalar> Recent<T> {
    pub(super) fn new() -> Self {
        Self { order: [(0, 0); MOST], len: 0, rows: Buffer::new(), capacity: 0 }
    }

    /// Makes room for so many entries; what is known of those there are stays.
    pub(super) fn make_room(&mut self, capacity: usize) {
        if capacity <= self.capacity {
            return;
        }
        let mut rows = Buffer::zeros(MOST * capacity);
        if self.capacity > 0 {
            let old = self.rows.chunks_exact(self.capacity);
            for (to, from) in rows.chunks_exact_mut(capacity).zip(old) {
                to[..from.len()].copy_from_slice(from);
            }
        }
        (self.rows, self.capacity) = (rows, capacity);
    }

    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    pub(super) fn copy_from(&mut self, other: &Self) {
        (self.order, self.len) = (other.order, other.len);
        self.rows.resize(other.rows.len());
        self.rows.copy_from_slice(&other.rows);
        self.capacity = other.capacity;
    }

    /// An entry has changed, or is no more: nothing is known of it.
    pub(super) fn forget(&mut self, entry: usize) {
        self.leave(entry);
        for &(_, row) in &self.order[..self.len] {
            self.rows[row * self.capacity + entry] = T::zero();
        }
    }

    /// An entry takes the place of another, which is no more.
    pub(super) fn move_entry(&mut self, from: usize, to: usize) {
        self.leave(to);
        for (entry, row) in &mut self.order[..self.len] {
            if *entry == from {
                *entry = to;
            }
            let row = &mut self.rows[*row * self.capacity..][..self.capacity];
            row[to] = row[from];
        }
    }

    /// The entry that has not changed for the longest time, if another has to leave.
    pub(super) fn oldest(&self) -> Option<usize> {
        (self.len == MOST).then(|| self.order[0].0)
    }

    /// An entry is settled, or is no more.
    pub(super) fn leave(&mut self, entry: usize) {
        let at = self.entries().position(|of| of == entry);
        if let Some(at) = at {
            self.order[at..self.len].rotate_left(1);
            self.len -= 1;
        }
    }

    /// Adds an entry that has changed and been measured.
    pub(super) fn add(&mut self, new: Row<'_, T>) {
        let Row { entry, closeness, .. } = new;
        debug_assert!(self.len < MOST);
        for &(other, row) in &self.order[..self.len] {
            self.rows[row * self.capacity + entry] = closeness[other];
        }
        let taken = &self.order[..self.len];
        let free = (0..MOST).find(|row| taken.iter().all(|(_, used)| used != row));
        let row = free.unwrap_or_default();
        let (known, none) =
            self.rows[row * self.capacity..][..self.capacity].split_at_mut(closeness.len());
        known.copy_from_slice(closeness);
        none.fill(T::zero());
        self.order[self.len] = (entry, row);
        self.len += 1;
    }

    /// The entries.
    pub(super) fn entries(&self) -> impl ExactSizeIterator<Item = usize> {
        self.order[..self.len].iter().map(|&(entry, _)| entry)
    }

    /// An entry and its row.
    pub(super) fn row<'a>(&'a self, index: usize, reciprocal: &'a [T]) -> Row<'a, T> {
        let (entry, row) = self.order[index];
        let closeness = &self.rows[row * self.capacity..][..reciprocal.len()];
        Row { entry, reciprocal, closeness }
    }
}
