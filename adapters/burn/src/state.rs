//! The state of a decoder, in the place of a cache of keys and values.

use crate::attention::{AttentionOptions, real_tokens};
use crate::backend::or_panic;
use crate::call::{Primitive, primitive, raw, readable, view_mut};
use crate::real::{Real, check_dtype};
use burn::backend::Flex;
use burn::tensor::Tensor;
use core::fmt;
use dijiang::ndarray::Array2;
use dijiang::{Error, LayerForward, Mask, MultiHead, MultiHeadState, MultiHeadStream};
use std::error;

/// The causal state of all sequences and heads of a layer: what a cache of keys and values is for,
/// of a size that does not grow with the context where the kernel has one.
///
/// It takes tensors of the Flex backend, with autodiff or without, and gives outputs without a
/// history: it is for decoding, not for training.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use dijiang_burn::AttentionState;
/// use dijiang_burn::dijiang::{DctFeatures, LinearAttention, MultiHead};
///
/// let layer = MultiHead::new(LinearAttention::new(DctFeatures::<f32>::new(16, 32, 0)?), 4, 2)?;
/// let device = Device::flex();
/// let mut state = AttentionState::new(&layer, 3, 8)?; // three sequences, values of 8 columns
/// let bytes = state.state_bytes();
/// for _ in 0..50 {
///     let (q, k) = (Tensor::ones([3, 4, 1, 16], &device), Tensor::ones([3, 2, 1, 16], &device));
///     let out = state.forward(q, k, Tensor::ones([3, 2, 1, 8], &device));
///     assert_eq!(out.dims(), [3, 4, 1, 8]);
/// }
/// assert_eq!((state.len(), state.state_bytes()), (50, bytes));
/// # Ok::<(), dijiang_burn::dijiang::Error>(())
/// ```
#[derive(Clone)]
pub struct AttentionState<T: Real> {
    stream: MultiHeadStream<T>,
}

impl<T: Real> AttentionState<T> {
    /// The empty state of `batch` sequences, for values of `value_dim` columns.
    ///
    /// # Errors
    ///
    /// Those of [`MultiHead::stream`].
    pub fn new(layer: &MultiHead<T>, batch: usize, value_dim: usize) -> Result<Self, Error> {
        Ok(Self { stream: layer.stream(batch, value_dim)? })
    }

    /// Absorbs `n` tokens of every sequence and answers their queries:
    /// `q [batch, query_heads, n, d]`, `k [batch, kv_heads, n, d]`,
    /// `v [batch, kv_heads, n, value_dim]` give `[batch, query_heads, n, value_dim]`. One token or
    /// a whole prompt: the result is that of one causal pass over all tokens.
    ///
    /// # Panics
    ///
    /// With the words of an error of [`MultiHeadStream::extend`]; the state is then unchanged. If a
    /// tensor has other numbers than `T`, or is not on the device of the Flex backend.
    pub fn forward(&mut self, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
        self.forward_with(q, k, v, &AttentionOptions::causal())
    }

    /// As [`forward`](Self::forward), where the first `lengths[b]` tokens of sequence `b` are real;
    /// the others are padding, never read, with outputs of zero.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward).
    pub fn forward_padded(
        &mut self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        lengths: &[usize],
    ) -> Tensor<4> {
        let options = AttentionOptions::causal().with_key_lengths(lengths.to_vec());
        self.forward_with(q, k, v, &options)
    }

    /// As [`forward`](Self::forward), of gated kernels:
    /// `log_decay [batch, kv_heads, n, 1 or num_features]`.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward), and if the kernels are not gated.
    pub fn forward_gated(
        &mut self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        log_decay: Tensor<4>,
    ) -> Tensor<4> {
        self.forward_with(q, k, v, &AttentionOptions::causal().with_log_decay(log_decay))
    }

    /// As [`forward`](Self::forward), with all that a step can be called with: lengths and padding
    /// of the new tokens, log decays, and biases, which have a column for each token so far.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward), and with another mask than [`Mask::Causal`].
    pub fn forward_with(
        &mut self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        options: &AttentionOptions,
    ) -> Tensor<4> {
        let AttentionOptions { mask, key_lengths, mask_pad, attn_bias, log_decay } = options;
        assert!(*mask == Mask::Causal, "attention: the mask of a state is `Mask::Causal`");
        let is_autodiff = q.is_autodiff();
        let [q, k, v] =
            [("q", q), ("k", k), ("v", v)].map(|(which, x)| primitive_of::<T>(which, x));
        let log_decay = log_decay.clone().map(|x| primitive_of::<T>("log_decay", x));
        let bias = attn_bias.clone().map(|x| primitive_of::<T>("attn_bias", x));
        let real = mask_pad.as_ref().map(real_tokens);
        let more = [log_decay.as_ref(), bias.as_ref()];
        let lengths = key_lengths.as_deref();
        let out = or_panic(self.extend([&q, &k, &v], more, real.as_ref(), lengths));
        let out = Tensor::from_primitive::<Flex>(out);
        if is_autodiff { out.autodiff() } else { out }
    }

    fn extend(
        &mut self,
        [q, k, v]: [&Primitive; 3],
        more: [Option<&Primitive>; 2],
        real: Option<&Array2<bool>>,
        lengths: Option<&[usize]>,
    ) -> Result<Primitive, Error> {
        let qkv = [raw(q)?.view(), raw(k)?.view(), raw(v)?.view()];
        let ((batch, heads, n, _), (.., columns)) = (qkv[0].dim(), qkv[2].dim());
        let mut out = vec![T::zero(); batch * heads * n * columns];
        let [log_decay, bias] = more.map(|x| x.map(|x| Ok(raw(x)?.view())).transpose());
        let step = LayerForward {
            log_decay: log_decay?,
            bias: bias?,
            key_mask: real.map(|real| real.view()),
            ..LayerForward::new(qkv, view_mut(&mut out, (batch, heads, n, columns)))
        };
        self.stream.extend_with(step, lengths)?;
        Ok(primitive(out, &[batch, heads, n, columns]))
    }

    /// Tokens of the longest sequence.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lengths().into_iter().max().unwrap_or(0)
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

    /// The size of the state of all sequences and heads now, in bytes.
    #[must_use]
    pub fn state_bytes(&self) -> usize {
        self.stream.state_bytes()
    }

    /// Forgets every token, and the checkpoint.
    pub fn reset(&mut self) {
        self.stream.reset();
    }

    /// Begins one sequence anew; the others go on.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if there is no such sequence.
    pub fn reset_sequence(&mut self, sequence: usize) -> Result<(), Error> {
        self.stream.reset_sequence(sequence)
    }

    /// Makes the batch one of `rows.len()` sequences, of which the `i`-th is a copy of the
    /// `rows[i]`-th before: the step of a beam search.
    ///
    /// # Errors
    ///
    /// Those of [`MultiHeadStream::reorder`]; the state is then unchanged.
    pub fn reorder(&mut self, rows: &[usize]) -> Result<(), Error> {
        self.stream.reorder(rows)
    }

    /// Remembers the state as it is now, for [`rollback`](Self::rollback).
    pub fn checkpoint(&mut self) {
        self.stream.checkpoint();
    }

    /// Goes back to the last [`checkpoint`](Self::checkpoint), as often as wanted.
    ///
    /// # Errors
    ///
    /// Those of [`MultiHeadStream::rollback`]; the state is then unchanged.
    pub fn rollback(&mut self) -> Result<(), Error> {
        self.stream.rollback()
    }

    /// The state as bytes (CBOR), to go on elsewhere or later.
    ///
    /// ```
    /// use burn::tensor::{Device, Tensor};
    /// use dijiang_burn::AttentionState;
    /// use dijiang_burn::dijiang::{MultiHead, SoftmaxAttention};
    ///
    /// let layer = MultiHead::new(SoftmaxAttention::<f32>::new(8)?, 1, 1)?;
    /// let x = Tensor::ones([1, 1, 5, 8], &Device::flex());
    /// let mut state = AttentionState::new(&layer, 1, 8)?;
    /// state.forward(x.clone(), x.clone(), x);
    /// let mut other = AttentionState::new(&layer, 1, 8)?;
    /// other.load(&state.save()?)?;
    /// assert_eq!(other.len(), 5);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`StateError::Kernel`] with an error of [`MultiHeadStream::save`].
    pub fn save(&self) -> Result<Vec<u8>, StateError> {
        let state = self.stream.save()?;
        let mut bytes = Vec::new();
        ciborium::into_writer(&state, &mut bytes).map_err(|e| StateError::Bytes(e.to_string()))?;
        Ok(bytes)
    }

    /// Replaces the state by a [saved](Self::save) one of the same kernels, with the same
    /// parameters, and as many sequences.
    ///
    /// # Errors
    ///
    /// [`StateError::Bytes`] if these are no bytes of a state, [`StateError::Kernel`] with an error
    /// of [`MultiHeadStream::restore`]. The state is then unchanged.
    pub fn load(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        let state: MultiHeadState<T> =
            ciborium::from_reader(bytes).map_err(|e| StateError::Bytes(e.to_string()))?;
        Ok(self.stream.restore(&state)?)
    }
}

impl<T: Real> fmt::Debug for AttentionState<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttentionState")
            .field("lengths", &self.lengths())
            .field("state_bytes", &self.state_bytes())
            .finish()
    }
}

/// Why a state cannot be saved or loaded.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum StateError {
    /// The bytes are no state, or of another number type.
    Bytes(String),
    /// What the kernels say.
    Kernel(Error),
}

impl fmt::Display for StateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(error) => write!(f, "these bytes are no attention state: {error}"),
            Self::Kernel(error) => error.fmt(f),
        }
    }
}

impl error::Error for StateError {}

impl From<Error> for StateError {
    fn from(error: Error) -> Self {
        Self::Kernel(error)
    }
}

/// A tensor as the backend has it, without its history.
fn primitive_of<T: Real>(which: &str, x: Tensor<4>) -> Primitive {
    check_dtype::<T>(which, x.dtype());
    match x.without_autodiff().try_into_primitive::<Flex>() {
        Ok(x) => readable(x),
        Err(error) => panic!("attention: `{which}` is not on the device of Flex: {error:?}"),
    }
}
