//! The sums before some places of a sequence.

use crate::kernel;
use crate::kernel::buffer::Buffer;
use crate::kernel::chunk_len;
use crate::memory::linear::bounds::Size;
use crate::memory::linear::log_scale::LogScale;
use crate::memory::linear::state::State;
use crate::memory::merged::entries::Merge;
use crate::scalar::Scalar;

/// Sums without their rounding errors, which are less than the last digit of each.
#[derive(Clone, Debug)]
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

    /// Tokens before it.
    pub(super) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Brings a state of the same sizes back.
    pub(super) fn restore(&self, state: &mut State<T>) {
        state.sums.copy_from_slice(&self.sums);
        state.sums_low.fill(T::zero());
        state.normalizer.copy_from_slice(&self.normalizer);
        state.normalizer_low.fill(T::zero());
        (state.scale, state.tokens, state.size) = (self.scale, self.tokens, self.size);
    }

    /// As [`restore`](Self::restore), of values that are multiplied with a power of two.
    pub(super) fn restore_scaled(&self, state: &mut State<T>, factor: T) {
        self.restore(state);
        if factor != T::one() {
            kernel::scale(&mut state.sums, factor);
            state.size = Size::of_sums(kernel::max_abs(&state.sums));
        }
    }
}

/// At most this many places of a sequence.
const MOST: usize = 32;

/// Tokens between two places, at least: what a backward pass keeps of so many stays in a cache.
const APART: usize = 256;

/// The sums of [`LinearAttention`](crate::LinearAttention) before some tokens of a sequence, which
/// a forward pass keeps for the backward pass: with them it need not absorb every key a second
/// time, and is faster by a quarter at 8 192 tokens.
///
/// They are the `num_features·(value_dim + 1)` sums before every 256th token, and of sequences of
/// more than 8 192 tokens before every 32nd part, so that their size is bounded. A causal forward
/// pass on several threads keeps fewer. Kernels without such sums, full attention and streams leave
/// it empty, and a backward pass with an empty one computes what it needs.
///
/// A [hybrid](crate::HybridAttention) with [`Far::merged`](crate::Far::merged) keeps which entries
/// it merged instead, 12 bytes a token: its backward pass then need not find that out again.
///
/// ```
/// use dijiang::{Attention, Head, HeadGradient, LinearAttention, Mask, Performer, Scratch};
/// use dijiang::SumCheckpoints;
/// use ndarray::Array2;
///
/// let kernel = LinearAttention::new(Performer::<f32>::new(8, 16, 0)?);
/// let (mut scratch, mut sums) = (Scratch::new(), SumCheckpoints::new());
/// let x = Array2::from_shape_fn((1000, 8), |(t, c)| ((t * 8 + c) as f32).sin());
/// let mut out = Array2::zeros((1000, 8));
/// let head = Head::new(x.view(), x.view(), x.view(), out.view_mut());
/// kernel.forward_heads(&mut [head.with_checkpoints(&mut sums)], Mask::Causal, &mut scratch)?;
/// assert!(!sums.is_empty());
///
/// let d_out = Array2::ones((1000, 8)); // the loss is the sum of all outputs
/// let [mut d_q, mut d_k, mut d_v] = [(); 3].map(|()| Array2::zeros((1000, 8)));
/// let d = [d_q.view_mut(), d_k.view_mut(), d_v.view_mut()];
/// let head = HeadGradient::new([x.view(), x.view(), x.view()], d_out.view(), d);
/// kernel.backward_heads(&mut [head.with_checkpoints(&sums)], Mask::Causal, &mut scratch)?;
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct SumCheckpoints<T> {
    kept: Vec<Checkpoint<T>>,
    /// How many of them are of the last sequence.
    used: usize,
    /// Of the sequence, once all of it has been seen.
    tokens: Option<usize>,
    merges: Vec<Merge<T>>,
    /// Of the kernel whose merges these are: none where there are none.
    shape: Vec<usize>,
}

impl<T: Scalar> SumCheckpoints<T> {
    /// Empty.
    #[must_use]
    pub const fn new() -> Self {
        Self { kept: Vec::new(), used: 0, tokens: None, merges: Vec::new(), shape: Vec::new() }
    }

    /// How many places there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.used
    }

    /// Whether nothing is kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.used == 0 && self.shape.is_empty()
    }

    /// Removes all of them; their memory stays for the next sequence.
    pub fn clear(&mut self) {
        (self.used, self.tokens) = (0, None);
        self.merges.clear();
        self.shape.clear();
    }

    /// Room for merges, empty.
    pub(crate) fn take_merges(&mut self) -> Vec<Merge<T>> {
        self.clear();
        core::mem::take(&mut self.merges)
    }

    /// Keeps the merges of a whole sequence, by a kernel of this shape.
    pub(crate) fn keep_merges(&mut self, merges: Vec<Merge<T>>, tokens: usize, shape: Vec<usize>) {
        (self.merges, self.tokens, self.shape) = (merges, Some(tokens), shape);
    }

    /// The merges of a sequence of so many tokens by a kernel of this shape, if they are here.
    pub(crate) fn merges(&self, tokens: usize, shape: &[usize]) -> Option<&[Merge<T>]> {
        (self.tokens == Some(tokens) && self.shape == shape).then_some(&self.merges)
    }

    /// Keeps the sums before the next token of a sequence of so many, if it is time to.
    pub(super) fn offer(&mut self, all: usize, state: &State<T>) {
        let chunk = chunk_len::<T>();
        let apart = APART.max(all.div_ceil(MOST).div_ceil(chunk) * chunk);
        if state.tokens < apart + self.places().last().map_or(0, |last| last.tokens) {
            return;
        }
        debug_assert!(state.pending.is_empty());
        if self.used == self.kept.len() {
            self.kept.push(Checkpoint::new());
        }
        self.kept[self.used].keep(state);
        self.used += 1;
    }

    /// Says that the sequence is over.
    pub(super) fn end(&mut self, tokens: usize) {
        self.tokens = Some(tokens);
    }

    pub(super) fn places(&self) -> &[Checkpoint<T>] {
        &self.kept[..self.used]
    }

    /// Those of a sequence of so many tokens and sums of these sizes, or none.
    pub(super) fn of(&self, tokens: usize, features: usize, stride: usize) -> &[Checkpoint<T>] {
        let fits = |place: &Checkpoint<T>| {
            (place.normalizer.len(), place.sums.len()) == (features, features * stride)
        };
        let all = self.places();
        if self.tokens == Some(tokens) && all.iter().all(fits) { all } else { &[] }
    }
}

impl<T: Scalar> Default for SumCheckpoints<T> {
    fn default() -> Self {
        Self::new()
    }
}
