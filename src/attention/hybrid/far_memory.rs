//! What takes the tokens that leave the window: one trait, and a file for each kind.

pub(crate) mod dropped;
pub(crate) mod linear;
pub(crate) mod merging;
pub(crate) mod own;

use crate::attention::hybrid::config::Config;
use crate::attention::hybrid::near::Near;
use crate::error::Error;
use crate::kernel::buffer::Buffer;
use crate::memory::answer::Answer;
use crate::memory::linear::entry::Workspace;
use crate::memory::merged::affinities::Pair;
use crate::memory::partial::Partial;
use crate::memory::slots::Slots;
use crate::scalar::Scalar;
use core::any::Any;
use core::fmt::Debug;
use ndarray::{ArrayView1, ArrayView2, Axis};

/// What far memories are made for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) heads: usize,
    pub(crate) value_dim: usize,
    /// What is merged is decided by so many columns of the values, the first, or by all.
    pub(crate) deciding_columns: Option<usize>,
}

/// A token that leaves the window of a head: the slot that holds it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leaving<'a, T: Scalar> {
    pub(crate) config: &'a Config<T>,
    pub(crate) head: usize,
    pub(crate) near: &'a Near<T>,
    pub(crate) slot: usize,
}

/// Queries `[n, d]` of a head.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked<'a, T> {
    pub(crate) head: usize,
    pub(crate) queries: ArrayView2<'a, T>,
}

/// How many tokens a far memory has absorbed and observed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub(crate) absorbed: usize,
    pub(crate) observed: usize,
}

/// The far memories of some heads. They are called for a head and a token or a step, never for a
/// number.
pub(crate) trait FarMemory<T: Scalar>: Any + Debug + Send {
    fn clone_box(&self) -> Box<dyn FarMemory<T>>;

    /// Makes `target` equal to this, in its own buffers where it is of the same kind.
    fn copy_to(&self, target: &mut Box<dyn FarMemory<T>>);

    /// Makes it empty for these sizes, unless it is none of such a kernel: `false`.
    fn renew(&mut self, config: &Config<T>, sizes: Sizes) -> bool;

    /// Forgets every token.
    fn clear(&mut self);

    fn state_floats(&self) -> usize;

    fn state_bytes(&self) -> usize {
        self.state_floats() * size_of::<T>()
    }

    /// Whether no call fails half-way, as long as nothing leaves the range of `T`.
    fn cannot_fail(&self) -> bool {
        false
    }

    /// A token has come: its queries `[group, d]` and its value.
    fn observe(&mut self, asked: Asked<'_, T>, value: ArrayView1<'_, T>) {
        let _ = (asked, value);
    }

    /// Takes in a token that leaves the window.
    fn absorb(&mut self, token: Leaving<'_, T>, scratch: &mut FarScratch<T>) -> Result<(), Error>;

    /// Every token that leaves in this step has been absorbed.
    fn settle(&mut self, config: &Config<T>, scratch: &mut FarScratch<T>) {
        let _ = (config, scratch);
    }

    /// Entries that are read as exact tokens are: the slots that hold them, and how many to read.
    fn entries(&self, head: usize) -> Option<(&Slots<T>, usize)> {
        let _ = head;
        None
    }

    /// Adds what it answers to the queries `[n, d]`, beside its entries.
    fn add_to(
        &self,
        asked: Asked<'_, T>,
        answer: &mut Answer<T>,
        scratch: &mut FarScratch<T>,
    ) -> Result<(), Error> {
        let _ = (asked, answer, scratch);
        Ok(())
    }

    /// The queries `[n, d]` of new tokens have had this answer, of all memories together.
    fn answered(&mut self, asked: Asked<'_, T>, answer: &Answer<T>, scratch: &mut FarScratch<T>) {
        let _ = (asked, answer, scratch);
    }

    /// Entry `i` has received the probability `Σ_g factors_g·weights_gi`, rows `stride` apart.
    fn receive(&mut self, head: usize, decay: T, factors: &[T], weights: &[T], stride: usize) {
        let _ = (head, decay, factors, weights, stride);
    }

    /// Appends what has to be kept to go on from here; `false` if that is not known.
    fn numbers(&self, head: usize, out: &mut Vec<T>) -> bool;

    /// The inverse: takes its part of the numbers and returns the rest. `None` if they are none of
    /// such a memory.
    fn set_numbers<'a>(&mut self, head: usize, seen: Seen, numbers: &'a [T]) -> Option<&'a [T]>;

    /// Whether all heads together hold what so many absorbed tokens of each leave in them.
    fn is_complete(&self, absorbed: usize) -> bool {
        let _ = absorbed;
        true
    }

    /// The largest magnitudes of any key and any value of the entries.
    fn largest(&self, head: usize) -> [T; 2] {
        let _ = head;
        [T::zero(); 2]
    }
}

impl<T: Scalar> Clone for Box<dyn FarMemory<T>> {
    fn clone(&self) -> Self {
        (**self).clone_box()
    }
}

/// `target` as a memory of this kind.
pub(super) fn of_kind<T: Scalar, F: FarMemory<T>>(target: &mut dyn FarMemory<T>) -> Option<&mut F> {
    let target: &mut dyn Any = target;
    target.downcast_mut()
}

/// Working memory of far memories, which says nothing about any of them.
#[derive(Debug)]
pub(crate) struct FarScratch<T: Scalar> {
    /// A scaled key, and what its score takes.
    pub(super) keys: [Buffer<T>; 2],
    value: Buffer<T>,
    linear: Workspace<T>,
    partial: Partial<T>,
    pairs: Vec<Pair<T>>,
    log_normalizer: Vec<T>,
}

impl<T: Scalar> FarScratch<T> {
    pub(super) fn new() -> Self {
        Self {
            keys: [Buffer::new(), Buffer::new()],
            value: Buffer::new(),
            linear: Workspace::new(),
            partial: Partial::empty(),
            pairs: Vec::new(),
            log_normalizer: Vec::new(),
        }
    }

    /// Copies a token, as rows: its key `[1, d]`, its value `[1, d_v]`, and what a linear memory
    /// works with.
    fn token(
        &mut self,
        Leaving { near: Near { slots, .. }, slot, .. }: Leaving<'_, T>,
    ) -> (ArrayView2<'_, T>, ArrayView2<'_, T>, &mut Workspace<T>) {
        let [key, _] = &mut self.keys;
        key.resize(slots.head_dim);
        key.iter_mut().zip(slots.key(slot)).for_each(|(to, x)| *to = x);
        self.value.resize(slots.value_dim);
        self.value.iter_mut().zip(slots.value(slot)).for_each(|(to, x)| *to = x);
        (
            ArrayView1::from(&**key).insert_axis(Axis(0)),
            ArrayView1::from(&*self.value).insert_axis(Axis(0)),
            &mut self.linear,
        )
    }
}
