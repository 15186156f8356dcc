//! What a head keeps exactly: the sinks, the window (a ring) and the heavy keys.

use crate::attention::hybrid::config::Config;
use crate::kernel;
use crate::kernel::buffer::Buffer;
use crate::memory::slots::Slots;
use crate::scalar::Scalar;
use ndarray::{ArrayView1, ArrayView2};

/// Tokens that are kept exactly: the sinks, the window (a ring), and the heavy keys.
#[derive(Clone, Debug)]
pub(crate) struct Near<T> {
    pub(super) slots: Slots<T>,
    /// Attention received, of the window and the heavy keys.
    pub(super) received: Buffer<T>,
    pub(super) heavy_scores: Vec<T>,
    /// The largest magnitudes of any key and any value so far.
    pub(super) largest_key: T,
    pub(super) largest_value: T,
}

impl<T: Scalar> Near<T> {
    pub(super) fn new() -> Self {
        Self {
            slots: Slots::new(),
            received: Buffer::new(),
            heavy_scores: Vec::new(),
            largest_key: T::zero(),
            largest_value: T::zero(),
        }
    }

    pub(super) fn prepare(&mut self, config: &Config<T>, value_dim: usize) {
        self.slots.set_format(config.format);
        self.slots.prepare(config.head_dim, value_dim, config.near_room(0));
        self.received.resize(self.slots.capacity);
        self.received.fill(T::zero());
        self.heavy_scores.clear();
        self.heavy_scores.reserve(config.heavy);
        (self.largest_key, self.largest_value) = (T::zero(), T::zero());
    }

    pub(super) fn copy_from(&mut self, other: &Self) {
        self.slots.copy_from(&other.slots);
        self.received.resize(other.received.len());
        self.received.copy_from_slice(&other.received);
        self.heavy_scores.clone_from(&other.heavy_scores);
        (self.largest_key, self.largest_value) = (other.largest_key, other.largest_value);
    }

    /// Makes room for the first `used` slots.
    pub(super) fn make_room(&mut self, config: &Config<T>, used: usize) {
        if used > self.slots.capacity {
            self.slots.grow(config.near_room(used));
            self.received.grow(self.slots.capacity);
        }
    }

    pub(super) fn put(
        &mut self,
        config: &Config<T>,
        slot: usize,
        key: ArrayView1<'_, T>,
        value: ArrayView1<'_, T>,
    ) {
        self.make_room(config, slot + 1);
        self.slots.put(slot, key, value);
        self.received[slot] = T::zero();
    }

    /// Finds the largest key and value.
    pub(super) fn measure(&mut self) {
        for slot in 0..self.slots.capacity {
            self.largest_key = self.slots.key(slot).fold(self.largest_key, |m, x| m.max(x.abs()));
            self.largest_value =
                self.slots.value(slot).fold(self.largest_value, |m, x| m.max(x.abs()));
        }
    }

    /// Decides what becomes of a token that leaves the window: it may stay as a heavy key. Returns
    /// the slot of the token that goes on to the far memory, if one does.
    pub(super) fn evict(
        &mut self,
        slot: usize,
        config: &Config<T>,
        keys: &mut [Buffer<T>; 2],
    ) -> Option<usize> {
        if config.heavy == 0 {
            return Some(slot);
        }
        self.make_room(config, config.near_slots());
        let score = config.static_score(self.slots.key(slot), keys);
        let (first, before) = (config.sinks + config.ring, self.heavy_scores.len());
        let Some(place) = stay(&mut self.heavy_scores, config.heavy, score) else {
            return Some(slot);
        };
        let to = first + place;
        if place == before {
            self.slots.move_slot(slot, to);
            self.received[to] = self.received[slot];
            return None;
        }
        // they change places
        let spare = config.near_slots() - 1;
        self.slots.move_slot(to, spare);
        self.slots.move_slot(slot, to);
        self.slots.move_slot(spare, slot);
        self.slots.empty(spare);
        self.received.swap(slot, to);
        Some(slot)
    }
}

/// The place of a key with this score among at most `most` heavy ones with theirs, if it is one:
/// behind them, or that of the one with the least score.
pub(super) fn stay<T: Scalar>(scores: &mut Vec<T>, most: usize, score: T) -> Option<usize> {
    if scores.len() < most {
        scores.push(score);
        return Some(scores.len() - 1);
    }
    let mut least = 0;
    for (i, other) in scores.iter().enumerate() {
        if *other < scores[least] {
            least = i;
        }
    }
    if score > scores[least] {
        scores[least] = score;
        return Some(least);
    }
    None
}

/// The largest magnitude.
pub(super) fn largest<T: Scalar>(x: ArrayView2<'_, T>) -> T {
    match x.to_slice() {
        Some(x) => kernel::max_abs(x),
        None => x.iter().fold(T::zero(), |m, x| m.max(x.abs())),
    }
}
