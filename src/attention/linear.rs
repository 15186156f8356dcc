//! Linear attention over any feature map: a fixed-size state instead of a growing cache.

pub(crate) mod gradient;
pub(crate) mod stream;

use crate::attention::call::{Head, NO_FULL_DECAY};
use crate::attention::gradient::HeadGradient;
use crate::attention::linear::gradient::{BackwardScratch, LinearParts};
use crate::attention::linear::stream::{LinearStream, check_gates};
use crate::attention::scratch::Scratch;
use crate::attention::sharing::Sharing;
use crate::attention::stream::{Stream, StreamOptions};
use crate::attention::threads::Threads;
use crate::attention::{Attention, PairWeights};
use crate::check;
use crate::error::Error;
use crate::features::FeatureMap;
use crate::mask::Mask;
use crate::memory::answer::Readout;
use crate::memory::linear::LinearMemory;
use crate::memory::linear::decay::{Decay, LogDecay};
use crate::memory::linear::entry::Workspace;
use crate::memory::linear::pass::{Pass, Tokens};
use crate::memory::linear::state::State;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use ndarray::{Array1, Array2, ArrayView2};
use std::sync::Arc;

/// Attention whose weight is a product of features (Katharopoulos et al., arXiv 2006.16236):
///
/// ```text
/// o_t = φ(q̂_t)ᵀ Σ_j φ(k̂_j) v_jᵀ / φ(q̂_t)ᵀ Σ_j φ(k̂_j),
/// x̂ = √scale·x,   scale = 1/√head_dim unless set.
/// ```
///
/// The sums over `j` are the state: `2·num_features·(value_dim + 1) + 1` numbers (sums and their
/// rounding errors), however long the context. A stream has room for `16·(num_features +
/// value_dim)` more: tokens of decode steps wait there, and every sixteenth adds them to the sums
/// in one product, so that the steps between only read them (not where features
/// [decay](Self#decay) by rates of their own). A causal forward runs in chunks, in
/// O(n·num_features·(d + value_dim)) time and with scratch for one chunk only.
///
/// Sums are kept in units of a running maximum of the keys' log scales, which only looks back;
/// nothing is added to the denominator.
///
/// # Decay
///
/// The sums may forget. With `S_t [num_features, value_dim]` and `z_t` the sums after token `t`,
///
/// ```text
/// S_t = diag(α_t) S_{t−1} + φ(k̂_t) v_tᵀ,    z_t = α_t ⊙ z_{t−1} + φ(k̂_t),
/// o_t = φ(q̂_t)ᵀ S_t / φ(q̂_t)ᵀ z_t,
/// ```
///
/// where token `t` itself has not decayed in `o_t`, and `α_t` is
///
/// - one number for every token, γ: [`with_decay`](Self::with_decay) (RetNet, Sun et al., arXiv
///   2307.08621, equation 6; the released DiJiang code);
/// - one number for each feature: [`with_channel_decay`](Self::with_channel_decay) (xPos in
///   retention);
/// - data of the token, one number (Mamba-2, Dao and Gu, arXiv 2405.21060, its structured masked
///   attention) or one for each feature (gated linear attention, Yang et al., arXiv 2312.06635,
///   section 4): [`gated`](Self::gated), and log decays with every call of
///   [`Attention::forward_heads`] or [`Stream::extend_heads`].
///
/// They multiply where several are set. Most models of this kind have no denominator:
/// [`unnormalized`](Self::unnormalized). Decays are kept as logarithms, and only the decay from one
/// token to a later one is ever formed, so that nothing over- or underflows: one number for all
/// features moves the log scale of the sums, at no cost, and features that decay differently do so
/// relative to the slowest. The state has one number more than without decay, what rounding leaves
/// of the log scale. A decay needs an order of tokens, so there is none with [`Mask::Full`]. One
/// long sequence stays on one thread where features decay differently.
///
/// ```
/// use dijiang::{Attention, EluFeatures, LinearAttention, Mask};
/// use ndarray::array;
///
/// let kernel =
///     LinearAttention::new(EluFeatures::<f64>::new(1)?).unnormalized().with_decay(0.5);
/// let zero = array![[0.0], [0.0], [0.0]]; // φ(0) = 1
/// let out = kernel.forward(
///     zero.view(),
///     zero.view(),
///     array![[1.0], [1.0], [1.0]].view(),
///     Mask::Causal,
/// )?;
/// assert!((out - array![[1.0], [1.5], [1.75]]).iter().all(|e| e.abs() < 1e-14));
/// # Ok::<(), dijiang::Error>(())
/// ```
///
/// # Example
///
/// ```
/// use dijiang::{Attention, DctFeatures, LinearAttention, Mask};
/// use ndarray::Array2;
///
/// let kernel = LinearAttention::new(DctFeatures::<f32>::new(64, 128, 7)?);
/// let x = Array2::from_shape_fn((100, 64), |(i, j)| ((i * 64 + j) as f32).sin());
/// let out = kernel.forward(x.view(), x.view(), x.view(), Mask::Causal)?;
/// assert_eq!(out.dim(), (100, 64));
/// assert_eq!(kernel.stream(64)?.state_floats(), 2 * 128 * 65 + 1 + 16 * (128 + 64));
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct LinearAttention<F> {
    map: Arc<F>,
    scale: Option<f64>,
    readout: Readout,
    #[cfg_attr(feature = "serde", serde(default))]
    decay: Decay,
}

impl<F> Clone for LinearAttention<F> {
    fn clone(&self) -> Self {
        Self {
            map: Arc::clone(&self.map),
            scale: self.scale,
            readout: self.readout,
            decay: self.decay.clone(),
        }
    }
}

impl<F> LinearAttention<F> {
    /// Linear attention with the features of `map`.
    pub fn new(map: F) -> Self {
        Self {
            map: Arc::new(map),
            scale: None,
            readout: Readout::Normalized,
            decay: Decay::default(),
        }
    }

    /// Sets the scale of `q·k`, `1/√head_dim` unless set; the map is given `√scale·x`. One that is
    /// not positive and finite is reported by the first call that would use it.
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

    /// Lets the sums decay by γ with every token, from 0 (nothing is kept) to 1 (nothing is lost);
    /// see [Decay](Self#decay). Another γ is reported by the first call that would use it.
    #[must_use]
    pub fn with_decay(mut self, decay: f64) -> Self {
        self.decay.common = decay;
        self
    }

    /// Lets the sums of each feature decay by a γ of its own with every token:
    /// `decay [num_features]`, each from 0 to 1; see [Decay](Self#decay). Other numbers, or another
    /// number of them, are reported by the first call that would use them.
    #[must_use]
    pub fn with_channel_decay(mut self, decay: Array1<f64>) -> Self {
        self.decay.channels = Some(decay.to_vec());
        self
    }

    /// Lets the sums decay by what comes with each token: every call is then one of
    /// [`Attention::forward_heads`] or [`Stream::extend_heads`] with [`Head::log_decay`]; those
    /// without give [`Error::Unsupported`]. See [Decay](Self#decay).
    ///
    /// ```
    /// use dijiang::{Attention, EluFeatures, Head, LinearAttention, Mask, Scratch};
    /// use ndarray::{Array2, array};
    ///
    /// let kernel = LinearAttention::new(EluFeatures::<f64>::new(1)?).unnormalized().gated();
    /// let (zero, ones) = (array![[0.0], [0.0], [0.0]], array![[1.0], [1.0], [1.0]]); // φ(0) = 1
    /// // the second token halves what came before it, the third forgets it
    /// let log_decay = array![[0.0], [0.5_f64.ln()], [f64::NEG_INFINITY]];
    /// let mut out = Array2::zeros((3, 1));
    /// let head = Head::new(zero.view(), zero.view(), ones.view(), out.view_mut());
    /// let mut heads = [head.with_log_decay(log_decay.view())];
    /// kernel.forward_heads(&mut heads, Mask::Causal, &mut Scratch::new())?;
    /// assert!((out - array![[1.0], [1.5], [1.0]]).iter().all(|e| e.abs() < 1e-14));
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    #[must_use]
    pub fn gated(mut self) -> Self {
        self.decay.gated = true;
        self
    }

    /// The feature map.
    #[must_use]
    pub fn map(&self) -> &F {
        &self.map
    }

    /// An empty memory of this kernel: to absorb a part of a sequence elsewhere, to merge, and to
    /// go on from with [`stream_from`](Self::stream_from).
    ///
    /// # Errors
    ///
    /// Those of [`Attention::stream`]; [`Error::Unsupported`] if the sums decay: those of two
    /// ranges of tokens do not add up then.
    pub fn memory<T: Scalar>(&self, value_dim: usize) -> Result<LinearMemory<T, F>, Error>
    where
        F: FeatureMap<T>,
    {
        self.decay.check(self.map.num_features())?;
        if !self.decay.is_none() {
            let why = "each token changes the sums of those before it; use a stream";
            return Err(Error::Unsupported { what: "a memory whose sums decay", why });
        }
        self.empty(value_dim)
    }

    fn empty<T: Scalar>(&self, value_dim: usize) -> Result<LinearMemory<T, F>, Error>
    where
        F: FeatureMap<T>,
    {
        let scale = check::scale::<T>(self.scale, self.map.head_dim())?;
        LinearMemory::new(Arc::clone(&self.map), value_dim, scale)
    }
}

impl<F> LinearAttention<F> {
    /// A causal stream that goes on from what a memory of this kernel has absorbed, for example two
    /// halves of a prompt on two threads, merged.
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
        let decay =
            LogDecay::of(&self.decay, self.map.num_features()).map(|decay| decay.map(Arc::new));
        Box::new(LinearStream::new(memory, self.readout, decay, 1, Threads::default()))
    }
}

impl<F> LinearAttention<F> {
    fn parts<T: Scalar>(&self) -> LinearParts<'_, T>
    where
        F: FeatureMap<T>,
    {
        let Self { map, scale, readout, decay } = self;
        LinearParts { map: &**map, scale: *scale, readout: *readout, decay }
    }
}

/// What a forward pass keeps in the scratch.
#[derive(Debug)]
struct LinearScratch<T> {
    state: State<T>,
    work: Workspace<T>,
    log_decay: LogDecay<T>,
}

impl<T: Scalar> Default for LinearScratch<T> {
    fn default() -> Self {
        Self { state: State::new(), work: Workspace::new(), log_decay: LogDecay::new() }
    }
}

impl<F> LinearAttention<F> {
    /// A head of checked shapes, but for the log decays.
    fn forward_head<T: Scalar>(
        &self,
        head: &mut Head<'_, T>,
        mask: Mask,
        LinearScratch { state, work, log_decay }: &mut LinearScratch<T>,
    ) -> Result<(), Error>
    where
        F: FeatureMap<T>,
    {
        let scale = check::scale::<T>(self.scale, self.map.head_dim())?;
        let (features, value_dim) = (self.map.num_features(), head.v.ncols());
        let decay = log_decay.set(&self.decay, features)?.then_some(&*log_decay);
        check_gates(decay, features, head)?;
        let pass = Pass::new(&*self.map, value_dim, scale)?.with_decay(decay);
        let Head { q, k, v, log_decay, out, checkpoints, .. } = head;
        // the sums are the same for every query head
        let mut checkpoints = checkpoints.as_deref_mut();
        if mask == Mask::CausalTail {
            let heads = q.outer_iter().zip(out.outer_iter_mut());
            return pass.tail(state, heads, [*k, *v], *log_decay, self.readout, work);
        }
        q.outer_iter().zip(out.outer_iter_mut()).try_for_each(|(q, out)| {
            state.reset(features, value_dim);
            let tokens = Tokens { q, k: *k, v: *v, log_decay: *log_decay };
            match mask {
                Mask::Causal => work.keeping(checkpoints.take(), q.nrows(), |work| {
                    pass.extend(state, tokens, out, self.readout, work, false)
                }),
                Mask::Full if decay.is_some() => Err(NO_FULL_DECAY),
                Mask::Full | Mask::CausalTail => {
                    pass.full(state, q, *k, *v, out, self.readout, work)
                }
            }
        })
    }
}

impl<T: Scalar, F: FeatureMap<T> + 'static> Attention<T> for LinearAttention<F> {
    fn forward_heads(
        &self,
        heads: &mut [Head<'_, T>],
        mask: Mask,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        let threads = scratch.threads();
        scratch.with_part(|part: &mut LinearScratch<T>, _| {
            part.work.set_threads(threads.are_several());
            heads.iter_mut().try_for_each(|head| {
                head.check_no_log_normalizer()?;
                head.check_forward(self.map.head_dim(), mask)?;
                let mask = mask.settled([head.queries(), head.keys()]);
                self.forward_head(head, mask, part)
            })
        })
    }

    fn stream(&self, value_dim: usize) -> Result<Box<dyn Stream<T>>, Error> {
        self.stream_with(StreamOptions::new(value_dim))
    }

    fn stream_with(&self, options: StreamOptions) -> Result<Box<dyn Stream<T>>, Error> {
        options.check_one_head()?;
        let decay = LogDecay::of(&self.decay, self.map.num_features())?.map(Arc::new);
        let memory = self.empty(options.value_dim)?;
        let StreamOptions { group, threads, .. } = options;
        Ok(Box::new(LinearStream::new(memory, self.readout, Ok(decay), group, threads)))
    }

    fn sharing(&self) -> Sharing {
        Sharing::Head
    }

    fn backward_heads(
        &self,
        heads: &mut [HeadGradient<'_, T>],
        mask: Mask,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        scratch.with_part(|part: &mut BackwardScratch<T>, _| {
            heads.iter_mut().try_for_each(|head| {
                head.check_backward(self.map.head_dim(), mask)?;
                self.parts().backward_head(head, mask, part)
            })
        })
    }

    fn parameters(&self) -> Parameters<T> {
        self.parts().parameters()
    }

    fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Box<dyn Attention<T>>, Error> {
        let (map, decay) = self.parts().with_parameters(parameters)?;
        let Self { scale, readout, .. } = *self;
        Ok(match map {
            Some(map) => Box::new(LinearAttention { map: Arc::new(map), scale, readout, decay }),
            None => Box::new(Self { decay, ..self.clone() }),
        })
    }

    fn pair_weights(&self) -> Option<&dyn PairWeights<T>> {
        // of sums that decay the weight depends on the distance as well
        if self.decay.is_none() { Some(self) } else { None }
    }
}

impl<T: Scalar, F: FeatureMap<T> + 'static> PairWeights<T> for LinearAttention<F> {
    fn log_weights(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
    ) -> Result<Array2<f64>, Error> {
        let memory = self.empty(1)?;
        check::queries(self.map.head_dim(), q)?;
        check::size("k", "columns", self.map.head_dim(), k.ncols())?;
        check::finite("k", k)?;
        memory.log_weights(q, k)
    }
}
