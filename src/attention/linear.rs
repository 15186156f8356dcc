//! Linear attention over any feature map: a fixed-size state instead of a growing cache.

use super::{Attention, Mask, NO_CHECKPOINT, Scratch, Stream, StreamState};
use crate::memory::{Checkpoint, Engine, LinearMemory, Memory, Readout, Workspace};
use crate::{Error, FeatureMap, Scalar, check};
use ndarray::{Array2, ArrayView2, ArrayView3, ArrayViewMut2, ArrayViewMut3, Axis};
use std::sync::Arc;

/// Attention whose weight is a product of features (Katharopoulos et al., arXiv 2006.16236):
///
/// ```text
/// o_t = φ(q̂_t)ᵀ Σ_j φ(k̂_j) v_jᵀ / φ(q̂_t)ᵀ Σ_j φ(k̂_j),   x̂ = √scale·x,   scale = 1/√head_dim unless set.
/// ```
///
/// The sums over `j` are the state: `2·num_features·(value_dim + 1) + 1` numbers (sums and their rounding errors),
/// however long the context. A causal
/// forward runs in chunks, in O(n·num_features·(d + value_dim)) time and with scratch for one chunk only.
///
/// Sums are kept in units of a running maximum of the keys' log scales, which only looks back; nothing is added to the
/// denominator.
///
/// ```
/// use dijiang::{Attention, DctFeatures, LinearAttention, Mask};
/// use ndarray::Array2;
///
/// let kernel = LinearAttention::new(DctFeatures::<f32>::new(64, 128, 7)?);
/// let x = Array2::from_shape_fn((100, 64), |(i, j)| ((i * 64 + j) as f32).sin());
/// let out = kernel.forward(x.view(), x.view(), x.view(), Mask::Causal)?;
/// assert_eq!(out.dim(), (100, 64));
/// assert_eq!(kernel.stream(64)?.state_floats(), 2 * 128 * 65 + 1);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct LinearAttention<F> {
    map: Arc<F>,
    scale: Option<f64>,
    readout: Readout,
}

impl<F> Clone for LinearAttention<F> {
    fn clone(&self) -> Self {
        Self { map: Arc::clone(&self.map), scale: self.scale, readout: self.readout }
    }
}

impl<F> LinearAttention<F> {
    /// Linear attention with the features of `map`.
    pub fn new(map: F) -> Self {
        Self { map: Arc::new(map), scale: None, readout: Readout::Normalized }
    }

    /// Sets the scale of `q·k`, `1/√head_dim` unless set; the map is given `√scale·x`. One that is not positive and
    /// finite is reported by the first call that would use it.
    #[must_use]
    pub fn with_scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Leaves the denominator out: `o_t = Σ_j φ(q̂_t)·φ(k̂_j) v_j` in absolute terms.
    #[must_use]
    pub fn unnormalized(mut self) -> Self {
        self.readout = Readout::Unnormalized;
        self
    }

    /// The feature map.
    #[must_use]
    pub fn map(&self) -> &F {
        &self.map
    }

    /// An empty memory of this kernel: to absorb a part of a sequence elsewhere, to merge, and to go on from with
    /// [`stream_from`](Self::stream_from).
    ///
    /// # Errors
    ///
    /// Those of [`Attention::stream`].
    pub fn memory<T: Scalar>(&self, value_dim: usize) -> Result<LinearMemory<T, F>, Error>
    where
        F: FeatureMap<T>,
    {
        let scale = check::scale::<T>(self.scale, self.map.head_dim())?;
        LinearMemory::new(Arc::clone(&self.map), value_dim, scale)
    }
}

impl<F> LinearAttention<F> {
    /// A causal stream that goes on from what a memory of this kernel has absorbed, for example two halves of a prompt on
    /// two threads, merged.
    ///
    /// ```
    /// use dijiang::{LinearAttention, Memory, Performer, Stream};
    /// use ndarray::{Array2, Axis};
    ///
    /// let kernel = LinearAttention::new(Performer::<f32>::new(8, 16, 0)?);
    /// let prompt = Array2::from_shape_fn((10, 8), |(i, j)| ((i * 8 + j) as f32).sin());
    /// let (first, second) = prompt.view().split_at(Axis(0), 4);
    /// let (mut left, mut right) = (kernel.memory(8)?, kernel.memory(8)?);
    /// left.absorb(first, first)?;
    /// right.absorb(second, second)?;
    /// left.merge(&right)?;
    /// let stream = kernel.stream_from(left);
    /// assert_eq!(stream.len(), 10);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    pub fn stream_from<T: Scalar>(&self, memory: LinearMemory<T, F>) -> Box<dyn Stream<T>>
    where
        F: FeatureMap<T> + 'static,
    {
        Box::new(LinearStream::new(memory, self.readout))
    }
}

impl<T: Scalar, F: FeatureMap<T> + 'static> Attention<T> for LinearAttention<F> {
    fn forward_into(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mask: Mask,
        out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        self.forward_with(q, k, v, mask, out, &mut Scratch::new())
    }

    fn forward_with(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mask: Mask,
        out: ArrayViewMut2<'_, T>,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        check::forward(self.map.head_dim(), q, k, v, mask, &out)?;
        let scale = check::scale::<T>(self.scale, self.map.head_dim())?;
        let engine = Engine::new(&*self.map, v.ncols(), scale)?;
        let Scratch { state, work, .. } = scratch;
        state.reset(engine.num_features(), v.ncols());
        match mask {
            Mask::Causal => engine.extend(state, q, k, v, out, self.readout, work, false),
            Mask::Full => engine.full(state, q, k, v, out, self.readout, work),
        }
    }

    fn stream(&self, value_dim: usize) -> Result<Box<dyn Stream<T>>, Error> {
        Ok(self.stream_from(self.memory(value_dim)?))
    }

    fn group_stream(&self, group: usize, value_dim: usize) -> Result<Option<Box<dyn Stream<T>>>, Error> {
        check::at_least_one("group", group)?;
        Ok(Some(Box::new(LinearStream { group, ..LinearStream::new(self.memory(value_dim)?, self.readout) })))
    }

    fn heads_are_independent(&self) -> bool {
        true
    }

    fn state_floats(&self, value_dim: usize, _tokens: usize) -> Result<usize, Error> {
        Ok(self.memory(value_dim)?.state_floats())
    }

    fn log_weights(&self, q: ArrayView2<'_, T>, k: ArrayView2<'_, T>) -> Result<Option<Array2<f64>>, Error> {
        let memory = self.memory(1)?;
        check::queries(self.map.head_dim(), q)?;
        check::size("k", "columns", self.map.head_dim(), k.ncols())?;
        check::finite("k", k)?;
        memory.log_weights(q, k).map(Some)
    }
}

/// A fixed-size state and the scratch of one chunk.
#[derive(Debug)]
struct LinearStream<T, F> {
    memory: LinearMemory<T, F>,
    group: usize,
    readout: Readout,
    work: Workspace<T>,
    checkpoint: Checkpoint<T>,
}

const KERNEL: &str = "linear";

impl<T: Scalar, F: FeatureMap<T> + 'static> LinearStream<T, F> {
    fn new(memory: LinearMemory<T, F>, readout: Readout) -> Self {
        Self { memory, group: 1, readout, work: Workspace::new(), checkpoint: Checkpoint::new() }
    }

    fn shape(&self) -> [usize; 3] {
        [self.memory.head_dim(), self.memory.num_features(), self.memory.value_dim()]
    }
}

impl<T: Scalar, F: FeatureMap<T> + 'static> Stream<T> for LinearStream<T, F> {
    fn extend(
        &mut self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        if self.group > 1 {
            return self.extend_group(q.insert_axis(Axis(0)), k, v, out.insert_axis(Axis(0)));
        }
        check::extend(self.memory.head_dim(), self.memory.value_dim(), q, k, v, &out)?;
        self.memory.extend(q, k, v, out, self.readout, &mut self.work)
    }

    fn group(&self) -> usize {
        self.group
    }

    fn extend_group(
        &mut self,
        q: ArrayView3<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mut out: ArrayViewMut3<'_, T>,
    ) -> Result<(), Error> {
        check::extend_group(self.memory.head_dim(), self.memory.value_dim(), self.group, q, k, v, &out)?;
        if self.group == 1 {
            let (q, out) = (q.index_axis_move(Axis(0), 0), out.index_axis_mut(Axis(0), 0));
            return self.memory.extend(q, k, v, out, self.readout, &mut self.work);
        }
        self.memory.extend_group(q, k, v, out, self.readout, &mut self.work)
    }

    fn len(&self) -> usize {
        self.memory.len()
    }

    fn state_floats(&self) -> usize {
        self.memory.state_floats()
    }

    fn clone_box(&self) -> Box<dyn Stream<T>> {
        Box::new(Self { group: self.group, work: self.work.like(), ..Self::new(self.memory.clone(), self.readout) })
    }

    fn reset(&mut self) {
        self.memory.reset();
        self.checkpoint.clear();
    }

    fn stay_on_one_thread(&mut self) {
        self.work.stay_on_one_thread();
    }

    fn checkpoint(&mut self) -> bool {
        self.memory.save_to(&mut self.checkpoint);
        true
    }

    fn rollback(&mut self) -> Result<(), Error> {
        if self.memory.return_to(&self.checkpoint) { Ok(()) } else { Err(NO_CHECKPOINT) }
    }

    fn save(&self) -> Result<StreamState<T>, Error> {
        Ok(StreamState::new(KERNEL, self.len(), self.shape().to_vec(), self.memory.numbers()))
    }

    fn restore(&mut self, state: &StreamState<T>) -> Result<(), Error> {
        let count = if state.tokens() == 0 { 0 } else { self.state_floats() };
        let numbers = state.numbers(KERNEL, &self.shape(), count)?;
        self.memory.set_numbers(state.tokens(), numbers);
        self.checkpoint.clear();
        Ok(())
    }
}
