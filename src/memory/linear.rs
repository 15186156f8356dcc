//! Linear memory: sums of feature products, of a size that does not depend on the number of tokens.

pub(crate) mod backward;
mod bounds;
mod causal;
pub(crate) mod checkpoints;
mod chunk;
pub(crate) mod decay;
pub(crate) mod entry;
mod full;
mod gates;
mod groups;
mod log_scale;
pub(crate) mod pass;
mod pending;
pub(crate) mod save;
pub(crate) mod state;
mod state_decay;
mod step;
mod steps;
#[cfg(test)]
mod tests;
#[cfg(feature = "rayon")]
mod threads;
mod token;

use crate::check;
use crate::error::Error;
use crate::features::FeatureMap;
use crate::memory::Memory;
use crate::memory::answer::Answer;
use crate::memory::answer::Readout;
use crate::memory::linear::decay::LogDecay;
use crate::memory::linear::entry::Workspace;
use crate::memory::linear::pass::{Pass, PassBuffers, Tokens};
use crate::memory::linear::save::SavedState;
use crate::memory::linear::state::State;
use crate::memory::partial::Partial;
use crate::scalar::Scalar;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, ArrayViewMut3, Axis};
use std::sync::Arc;

/// The sums over every token absorbed, for a feature map φ:
///
/// ```text
/// S = Σ_j φ(k̂_j) v_jᵀ  [num_features, value_dim],    z = Σ_j φ(k̂_j)  [num_features],
/// x̂ = √scale·x
/// ```
///
/// kept in units of `e^{log_scale}`, the running maximum of the keys' log scales. It answers a
/// query with `φ(q̂)ᵀS / φ(q̂)ᵀz` (Katharopoulos et al., arXiv 2006.16236, equation 5).
///
/// Sums are compensated (Kahan): each carries its rounding error beside it, so that the error does
/// not grow with the number of tokens. Plain sums in `f32` would lose four digits in a million
/// tokens and stand still after some hundred million. The size is
/// `2·num_features·(value_dim + 1) + 1` numbers, whatever the number of tokens.
///
/// ```
/// use dijiang::{LinearMemory, Memory, Performer};
/// use ndarray::Array2;
/// use std::sync::Arc;
///
/// let map = Arc::new(Performer::<f32>::new(8, 16, 0)?);
/// let x = Array2::from_shape_fn((10, 8), |(i, j)| ((i * 8 + j) as f32).sin());
/// let (first, second) = x.view().split_at(ndarray::Axis(0), 4);
///
/// let mut whole = LinearMemory::new(map.clone(), 8, 1.0)?;
/// whole.absorb(x.view(), x.view())?;
/// let mut left = LinearMemory::new(map.clone(), 8, 1.0)?;
/// left.absorb(first, first)?;
/// let mut right = LinearMemory::new(map, 8, 1.0)?;
/// right.absorb(second, second)?;
/// left.merge(&right)?; // what two machines found, in one
/// assert_eq!(left.len(), whole.len());
/// assert_eq!(left.state_floats(), 2 * 16 * 9 + 1);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug)]
pub struct LinearMemory<T, F> {
    map: Arc<F>,
    scale_root: T,
    state: State<T>,
}

impl<T: Clone, F> Clone for LinearMemory<T, F> {
    fn clone(&self) -> Self {
        Self {
            map: Arc::clone(&self.map),
            scale_root: self.scale_root.clone(),
            state: self.state.clone(),
        }
    }
}

impl<T: Scalar, F: FeatureMap<T>> LinearMemory<T, F> {
    /// An empty memory.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `value_dim` is 0 or the map has no features, [`Error::InvalidOption`]
    /// if `scale` is not positive and finite.
    pub fn new(map: Arc<F>, value_dim: usize, scale: f64) -> Result<Self, Error> {
        let scale_root = Pass::new(&*map, value_dim, scale)?.scale_root();
        let mut state = State::new();
        state.reset(map.num_features(), value_dim);
        Ok(Self { map, scale_root, state })
    }

    /// Tokens absorbed so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.state.tokens
    }

    /// Whether no token has been absorbed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.state.tokens == 0
    }

    /// Forgets every token.
    pub fn reset(&mut self) {
        self.forget();
    }

    /// Adds the sums of other tokens, taken with the same map and scale: exact, in any order. That
    /// the maps are the same is for the caller to see to; of them only the number of features is
    /// compared.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the number of features or values differs, [`Error::InvalidOption`] if
    /// the scales do, [`Error::Overflow`] if a sum becomes too large. This memory is then
    /// unchanged.
    pub fn merge(&mut self, other: &Self) -> Result<(), Error> {
        check::size("other", "features", self.state.features(), other.state.features())?;
        check::size("other", "value columns", self.value_dim(), other.value_dim())?;
        check::same_scale(self.scale_root, other.scale_root)?;
        if other.state.tokens == 0 {
            return Ok(());
        }
        let before = self.state.clone();
        let mut other = other.state.clone();
        other.settle();
        let result = self.state.merge(&other);
        if result.is_err() {
            self.state = before;
        }
        result
    }

    fn pass(&self) -> Pass<'_, T> {
        Pass::of(&*self.map, self.scale_root)
    }

    pub(crate) fn map(&self) -> &F {
        &self.map
    }

    /// The factor of `q·k`, up to rounding.
    pub(crate) fn scale(&self) -> f64 {
        self.scale_root.as_f64().powi(2)
    }

    pub(crate) fn value_dim(&self) -> usize {
        self.state.value_dim
    }

    pub(crate) fn head_dim(&self) -> usize {
        self.map.head_dim()
    }

    pub(crate) fn num_features(&self) -> usize {
        self.map.num_features()
    }

    /// Whether it was made for these.
    pub(crate) fn is_of(&self, map: &Arc<F>, value_dim: usize) -> bool {
        Arc::ptr_eq(&self.map, map) && self.state.value_dim == value_dim
    }

    /// Lets the tokens of decode steps wait beside the sums from now on.
    pub(crate) fn let_tokens_wait(&mut self) {
        self.state.let_tokens_wait();
    }

    pub(crate) fn forget(&mut self) {
        self.state.reset(self.map.num_features(), self.state.value_dim);
    }

    /// Takes the state of a memory with the same map.
    pub(crate) fn copy_from(&mut self, other: &Self) {
        self.state.copy_from(&other.state);
    }

    /// Copies the state.
    pub(crate) fn save_to(&self, saved: &mut SavedState<T>) {
        saved.save(&self.state);
    }

    /// Takes a state that was saved; returns whether there is one.
    pub(crate) fn return_to(&mut self, saved: &SavedState<T>) -> bool {
        saved.restore(&mut self.state)
    }

    /// Everything but the map: the log scale and the sums. Empty while no token has been absorbed.
    pub(crate) fn numbers(&self) -> Vec<T> {
        self.state.numbers()
    }

    /// The number of [`numbers`](Self::numbers) that a state of these sizes can have, for `count`
    /// that are given: `count` itself, if it can.
    pub(crate) fn fitting_numbers(&self, count: usize) -> usize {
        self.state.fitting_numbers(count)
    }

    /// The inverse of [`numbers`](Self::numbers); the length has been checked.
    pub(crate) fn set_numbers(&mut self, tokens: usize, numbers: &[T]) {
        self.forget();
        self.state.set_numbers(tokens, numbers);
    }

    /// What rounding left of the log scale, which sums that decay need beside
    /// [`numbers`](Self::numbers).
    pub(crate) fn log_scale_low(&self) -> T {
        self.state.scale.low
    }

    /// Sets it, after [`set_numbers`](Self::set_numbers).
    pub(crate) fn set_log_scale_low(&mut self, low: T) {
        self.state.scale.low = low;
    }

    /// As [`Memory::absorb`] of what has been checked, in the caller's working memory, of sums that
    /// may decay. On an error the state is left half-way.
    pub(crate) fn absorb_with(
        &mut self,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        decay: Option<&LogDecay<T>>,
        work: &mut Workspace<T>,
    ) -> Result<(), Error> {
        let pass = Pass::of(&*self.map, self.scale_root).with_decay(decay);
        pass.absorb(&mut self.state, k, v, work)
    }

    /// As [`Memory::read`] of what has been checked, in the caller's working memory; `each` is
    /// given the first row of a chunk and its answer.
    pub(crate) fn read_with(
        &self,
        q: ArrayView2<'_, T>,
        work: &mut Workspace<T>,
        each: impl FnMut(usize, &mut Answer<T>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.pass().read(&self.state, q, &mut work.pass, each)
    }

    /// Causal attention of new tokens; the shapes have been checked. On an error the state is what
    /// it was.
    pub(crate) fn extend(
        &mut self,
        tokens: Tokens<'_, T>,
        decay: Option<&LogDecay<T>>,
        out: ArrayViewMut2<'_, T>,
        readout: Readout,
        work: &mut Workspace<T>,
    ) -> Result<(), Error> {
        if tokens.q.nrows() == 1 {
            let pass = Pass::of(&*self.map, self.scale_root).with_decay(decay);
            pass.map_tokens(tokens, &mut work.pass, 0)?;
            return token::extend(&mut self.state, &mut work.pass, out, readout, 0);
        }
        self.guarded(work, |pass, state, work| {
            pass.with_decay(decay).extend(state, tokens, out, readout, work, true)
        })
    }

    /// As [`extend`](Self::extend), of several query heads, each with the same keys and values:
    /// `out [group, n, d_v]`.
    pub(crate) fn extend_group<'a>(
        &mut self,
        heads: impl ExactSizeIterator<Item = Tokens<'a, T>>,
        decay: Option<&LogDecay<T>>,
        mut out: ArrayViewMut3<'_, T>,
        readout: Readout,
        work: &mut Workspace<T>,
    ) -> Result<(), Error> {
        let single = out.len_of(Axis(1)) == 1;
        let left = (1..=heads.len()).rev();
        let mut heads = heads.zip(out.outer_iter_mut()).zip(left);
        if single {
            // all but the last head only look
            return heads.try_for_each(|((tokens, out), left)| {
                if left == 1 {
                    return self.extend(tokens, decay, out, readout, work);
                }
                self.pass().with_decay(decay).map_tokens(tokens, &mut work.pass, 0)?;
                token::peek(&self.state, &mut work.pass, out, readout)
            });
        }
        let mut before = core::mem::replace(&mut work.group, State::new());
        before.copy_from(&self.state);
        let result = heads.try_for_each(|((tokens, out), _)| {
            self.state.copy_from(&before);
            self.extend(tokens, decay, out, readout, work)
        });
        if result.is_err() {
            self.state.copy_from(&before);
        }
        work.group = before;
        result
    }

    /// The first half of a decode step, which changes nothing: maps one token for each query head,
    /// with the same key, value and log decay, into the working memory. The shapes have been
    /// checked.
    ///
    /// Returns whether [`finish_step`](Self::finish_step) cannot fail any more: the values are not
    /// so large that sums could overflow, and each denominator, or without one each log scale, is
    /// known to leave the output in range. A layer of many heads that all say so needs no copy of
    /// its states to go back to. The two halves take O(`num_features`) more time than the step as a
    /// whole, [`extend_group`](Self::extend_group), and give the same bits.
    pub(crate) fn map_step<'a>(
        &self,
        heads: impl ExactSizeIterator<Item = Tokens<'a, T>>,
        decay: Option<&LogDecay<T>>,
        readout: Readout,
        work: &mut Workspace<T>,
    ) -> Result<bool, Error>
    where
        T: 'a,
    {
        let Workspace { pass: buffers, step, .. } = work;
        step.map(self.pass().with_decay(decay), &self.state, heads, readout, buffers)
    }

    /// The second half of a decode step, right after [`map_step`](Self::map_step) in the same
    /// working memory: writes the outputs, `out [group, 1, value_dim]`, and absorbs the token. On
    /// an error, of which the first half has warned, the state is what it was.
    pub(crate) fn finish_step(
        &mut self,
        out: ArrayViewMut3<'_, T>,
        readout: Readout,
        work: &mut Workspace<T>,
    ) -> Result<(), Error> {
        let Workspace { pass: buffers, step, .. } = work;
        step.finish(&mut self.state, out, readout, buffers)
    }

    /// Runs `run`; puts the state back if it fails.
    fn guarded(
        &mut self,
        work: &mut Workspace<T>,
        run: impl FnOnce(Pass<'_, T>, &mut State<T>, &mut Workspace<T>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        work.pass.before.copy_from(&self.state);
        let result = run(Pass::of(&*self.map, self.scale_root), &mut self.state, work);
        if result.is_err() {
            self.state.copy_from(&work.pass.before);
        }
        result
    }

    /// `ln φ(√scale·q_i)·φ(√scale·k_j)` of every pair of checked rows.
    pub(crate) fn log_weights(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
    ) -> Result<Array2<f64>, Error> {
        self.pass().log_weights(q, k)
    }
}

impl<T: Scalar, F: FeatureMap<T> + 'static> Memory<T> for LinearMemory<T, F> {
    fn absorb(&mut self, k: ArrayView2<'_, T>, v: ArrayView2<'_, T>) -> Result<(), Error> {
        check::size("v", "columns", self.value_dim(), v.ncols())?;
        check::keys_values(self.head_dim(), k, v)?;
        self.guarded(&mut Workspace::new(), |pass, state, work| pass.absorb(state, k, v, work))
    }

    fn read(&self, q: ArrayView2<'_, T>, answer: &mut Partial<T>) -> Result<(), Error> {
        check::queries(self.head_dim(), q)?;
        check::size("answer", "rows", q.nrows(), answer.numerator.nrows())?;
        check::size("answer", "columns", self.value_dim(), answer.numerator.ncols())?;
        self.pass().read(&self.state, q, &mut PassBuffers::new(), |start, block| {
            block.add_to(answer, start);
            Ok(())
        })
    }

    fn state_floats(&self) -> usize {
        self.state.floats() + 1
    }
}
