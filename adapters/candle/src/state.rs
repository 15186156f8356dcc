//! The state of a layer in place of a cache.

use crate::attention::{Extras, real_tokens};
use crate::element::{
    Element, Numbers, Operand, check_device, check_dtype, refused, storage_of, view_mut,
};
use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Storage, Tensor, bail};
use dijiang::{LayerForward, MultiHead, MultiHeadState, MultiHeadStream};
use std::sync::Mutex;

/// What a layer keeps of the tokens it has seen, in place of a cache of keys and values: of a size
/// that does not depend on their number, unless a kernel is exact.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use dijiang::{LinearAttention, MultiHead, Performer};
/// use dijiang_candle::AttentionState;
///
/// let layer = MultiHead::new(LinearAttention::new(Performer::<f32>::new(16, 64, 0)?), 4, 2)?;
/// let mut state = AttentionState::new(&layer, 1, 16)?;
/// let x = |heads, n| Tensor::randn(0f32, 1., (1, heads, n, 16), &Device::Cpu);
/// state.forward(&x(4, 100)?, &x(2, 100)?, &x(2, 100)?)?; // the prompt
/// let bytes = state.state_bytes();
/// for _ in 0..10 {
///     let out = state.forward(&x(4, 1)?, &x(2, 1)?, &x(2, 1)?)?; // a token
///     assert_eq!(out.dims(), [1, 4, 1, 16]);
/// }
/// assert_eq!((state.len(), state.state_bytes()), (110, bytes));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct AttentionState<T: Element> {
    stream: MultiHeadStream<T>,
}

impl<T: Element> AttentionState<T> {
    /// An empty state of `batch` sequences, for values of `value_dim` columns.
    ///
    /// # Errors
    ///
    /// Those of [`MultiHead::stream`].
    pub fn new(layer: &MultiHead<T>, batch: usize, value_dim: usize) -> Result<Self> {
        Ok(Self { stream: layer.stream(batch, value_dim).map_err(refused)? })
    }

    /// Takes new tokens in and answers their queries: `q [batch, query_heads, n, d]`,
    /// `k [batch, kv_heads, n, d]`, `v [batch, kv_heads, n, value_dim]` give
    /// `[batch, query_heads, n, value_dim]`. Each query sees all tokens up to its own.
    ///
    /// A state has no backward pass: asking for a gradient by what went through it is an error.
    ///
    /// # Errors
    ///
    /// Those of [`attention`](crate::attention()). The state is then as it was.
    pub fn forward(&mut self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        self.forward_with([q, k, v], Extras::default(), None)
    }

    /// As [`forward`](Self::forward), of gated kernels: `log_decay [batch, kv_heads, n, 1 or m]`.
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward).
    pub fn forward_gated(
        &mut self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        log_decay: &Tensor,
    ) -> Result<Tensor> {
        let extras = Extras { log_decay: Some(log_decay), ..Extras::default() };
        self.forward_with([q, k, v], extras, None)
    }

    /// As [`forward`](Self::forward), with log decays if the kernel is gated, and with what is
    /// real: a mask of the new tokens, or the number of those of each sequence. The rest is
    /// padding, with lengths on the side of [`MultiHead::with_padding`]; it is never read, and its
    /// output is zero. Biases have a column for each token, those before included.
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward); if there are parameters, which a state has since it was made.
    pub fn forward_with(
        &mut self,
        [q, k, v]: [&Tensor; 3],
        Extras { log_decay, key_mask, bias, parameters }: Extras<'_>,
        lengths: Option<&[usize]>,
    ) -> Result<Tensor> {
        if !parameters.is_empty() {
            bail!("a state has the parameters of the layer that it was made of: make a new one");
        }
        let named = [("q", q), ("k", k), ("v", v)].into_iter();
        let more = [log_decay.map(|x| ("log_decay", x)), bias.map(|x| ("bias", x))];
        for (which, tensor) in named.chain(more.into_iter().flatten()) {
            check_device(which, tensor)?;
            check_dtype::<T>(which, tensor.dtype())?;
        }
        let ((batch, heads, n, _), (.., value_dim)) = (q.dims4()?, v.dims4()?);
        let dims = [batch, heads, n, value_dim];
        let key_mask = key_mask.map(real_tokens).transpose()?;
        let mut out = vec![T::default(); batch * heads * n * value_dim];
        {
            let all = [q, k, v].map(Tensor::storage_and_layout);
            let gates = log_decay.map(Tensor::storage_and_layout);
            let biases = bias.map(Tensor::storage_and_layout);
            let mut numbers = Vec::with_capacity(5);
            for (storage, layout) in all.iter().chain(&gates).chain(&biases) {
                let Storage::Cpu(storage) = &**storage else { bail!("a tensor is not on the CPU") };
                numbers.push(Operand::new(storage, layout).read::<T>()?);
            }
            let qkv = [numbers[0].view()?, numbers[1].view()?, numbers[2].view()?];
            let mut more = numbers[3..].iter().map(Numbers::view);
            let step = LayerForward {
                log_decay: log_decay.and_then(|_| more.next()).transpose()?,
                bias: bias.and_then(|_| more.next()).transpose()?,
                key_mask: key_mask.as_ref().map(|real| real.view()),
                ..LayerForward::new(qkv, view_mut(&mut out, dims)?)
            };
            self.stream.extend_with(step, lengths).map_err(refused)?;
        }
        if let Some(tracked) =
            [q, k, v].into_iter().chain(log_decay).chain(bias).find(|x| x.track_op())
        {
            // an operation of anything with a history, which says that it has no gradient
            let storage = Mutex::new(Some(storage_of(out, q.dtype())));
            return tracked.apply_op1(Answered { storage, dims });
        }
        Tensor::from_vec(out, &dims[..], &Device::Cpu)?.to_dtype(q.dtype())
    }

    /// Tokens of the longest sequence.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lengths().into_iter().max().unwrap_or_default()
    }

    /// Whether no sequence has a token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens of each sequence.
    #[must_use]
    pub fn lengths(&self) -> Vec<usize> {
        self.stream.lengths()
    }

    /// Bytes of the state now.
    #[must_use]
    pub fn state_bytes(&self) -> usize {
        self.stream.state_bytes()
    }

    /// Forgets all tokens.
    pub fn reset(&mut self) {
        self.stream.reset();
    }

    /// Forgets the tokens of one sequence, whose place a new one can take.
    ///
    /// # Errors
    ///
    /// Those of [`MultiHeadStream::reset_sequence`].
    pub fn reset_sequence(&mut self, sequence: usize) -> Result<()> {
        self.stream.reset_sequence(sequence).map_err(refused)
    }

    /// Puts sequence `beams[i]` in place `i`, for beam search: as many as there are places now.
    ///
    /// # Errors
    ///
    /// Those of [`MultiHeadStream::reorder`].
    pub fn reorder(&mut self, beams: &[usize]) -> Result<()> {
        self.stream.reorder(beams).map_err(refused)
    }

    /// Remembers the state as it is now, for [`rollback`](Self::rollback): before a draft of
    /// speculative decoding.
    pub fn checkpoint(&mut self) {
        self.stream.checkpoint();
    }

    /// Goes back to the last [`checkpoint`](Self::checkpoint).
    ///
    /// # Errors
    ///
    /// Those of [`MultiHeadStream::rollback`].
    pub fn rollback(&mut self) -> Result<()> {
        self.stream.rollback().map_err(refused)
    }

    /// Copies the state out, to be written with any format of `serde`.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use dijiang::{LinearAttention, MultiHead, MultiHeadState, Performer};
    /// # use dijiang_candle::AttentionState;
    /// # let layer = MultiHead::new(LinearAttention::new(Performer::<f32>::new(4, 8, 0)?), 1, 1)?;
    /// # let mut state = AttentionState::new(&layer, 1, 4)?;
    /// # let x = Tensor::ones((1, 1, 3, 4), candle_core::DType::F32, &Device::Cpu)?;
    /// # state.forward(&x, &x, &x)?;
    /// let text = serde_json::to_string(&state.save()?)?;
    /// let saved: MultiHeadState<f32> = serde_json::from_str(&text)?;
    /// let mut other = AttentionState::new(&layer, 1, 4)?;
    /// other.load(&saved)?;
    /// assert_eq!(other.len(), 3);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`MultiHeadStream::save`].
    pub fn save(&self) -> Result<MultiHeadState<T>> {
        self.stream.save().map_err(refused)
    }

    /// Goes on from a saved state of the same kernels and as many sequences.
    ///
    /// # Errors
    ///
    /// Those of [`MultiHeadStream::restore`]. The state is then as it was.
    pub fn load(&mut self, saved: &MultiHeadState<T>) -> Result<()> {
        self.stream.restore(saved).map_err(refused)
    }
}

/// An answer that is there already, of a tensor with a history that ends here.
struct Answered {
    storage: Mutex<Option<CpuStorage>>,
    dims: [usize; 4],
}

impl CustomOp1 for Answered {
    fn name(&self) -> &'static str {
        "dijiang-state"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        match self.storage.lock().ok().and_then(|mut storage| storage.take()) {
            Some(storage) => Ok((storage, Shape::from(&self.dims[..]))),
            None => bail!("an answer of a state is there once"),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        bail!(
            "an `AttentionState` has no backward pass: train with `attention`, or `detach` what \
             comes out of the state"
        )
    }
}
