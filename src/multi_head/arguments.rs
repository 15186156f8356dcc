//! What a layer is called with.

use crate::multi_head::record::LayerRecord;
use ndarray::{ArrayView2, ArrayView4, ArrayViewMut4};

/// The arguments of a layer and where its outputs go: what
/// [`MultiHead::forward_with`](crate::MultiHead::forward_with) and
/// [`MultiHeadStream::extend_with`](crate::MultiHeadStream::extend_with) are called with. Views may
/// have any strides.
///
/// ```
/// use dijiang::{LayerForward, Mask, MultiHead, SoftmaxAttention};
/// use ndarray::{Array4, array, s};
///
/// let layer = MultiHead::new(SoftmaxAttention::<f32>::new(8)?, 2, 1)?;
/// let (q, kv) = (Array4::ones((2, 2, 4, 8)), Array4::ones((2, 1, 4, 8)));
/// // of the second sequence two tokens are real
/// let real = array![[true, true, true, true], [false, true, false, true]];
/// let mut out = Array4::zeros(q.dim());
/// let call = LayerForward::new([q.view(), kv.view(), kv.view()], out.view_mut());
/// layer.forward_with(call.with_key_mask(real.view()), Mask::Causal, None)?;
/// let second = out.slice(s![1, 0, .., 0]);
/// assert_eq!(second, array![0.0, 1.0, 0.0, 1.0]);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug)]
pub struct LayerForward<'a, T> {
    /// Queries `[batch, query_heads, n_q, d]`.
    pub q: ArrayView4<'a, T>,
    /// Keys `[batch, kv_heads, n_k, d]`.
    pub k: ArrayView4<'a, T>,
    /// Values `[batch, kv_heads, n_k, d_v]`.
    pub v: ArrayView4<'a, T>,
    /// Log decays `[batch, kv_heads, n_k, 1 or num_features]`, of gated kernels.
    pub log_decay: Option<ArrayView4<'a, T>>,
    /// Which tokens are real, `[batch, n_k]`: [`with_key_mask`](Self::with_key_mask).
    pub key_mask: Option<ArrayView2<'a, bool>>,
    /// What is added to scores, `[1 or batch, 1 or query_heads, n_q, n_k]`:
    /// [`with_bias`](Self::with_bias).
    pub bias: Option<ArrayView4<'a, T>>,
    /// Outputs `[batch, query_heads, n_q, d_v]`, written over whatever they held.
    pub out: ArrayViewMut4<'a, T>,
    /// What is kept for the backward pass, if it is to be:
    /// [`with_record`](Self::with_record).
    pub record: Option<&'a mut LayerRecord<T>>,
}

impl<'a, T> LayerForward<'a, T> {
    /// Queries, keys and values, and room for the outputs: shapes are those of the
    /// [fields](Self#fields).
    #[must_use]
    pub fn new([q, k, v]: [ArrayView4<'a, T>; 3], out: ArrayViewMut4<'a, T>) -> Self {
        Self { q, k, v, log_decay: None, key_mask: None, bias: None, out, record: None }
    }

    /// Brings the log decays of the tokens, `[batch, kv_heads, n_k, 1 or num_features]`; the mask
    /// is then [`Mask::Causal`](crate::Mask::Causal).
    #[must_use]
    pub fn with_log_decay(self, log_decay: ArrayView4<'a, T>) -> Self {
        Self { log_decay: Some(log_decay), ..self }
    }

    /// Says which tokens are real, `[batch, n_k]`, where padding may lie anywhere: each sequence
    /// gets what it would get alone, without the others, whatever they hold, of any kernel.
    /// Positions count real tokens only; those of queries under [`Mask::Full`](crate::Mask::Full),
    /// which need not be those of the keys, are their rows. (So where kernels have positions and
    /// padding of self-attention comes first, use lengths and
    /// [`Padding::Left`](crate::Padding::Left).)
    ///
    /// With [`Mask::Full`](crate::Mask::Full) all queries are answered. With other masks, and in a
    /// stream, the query of a token that is not real is padding as well: its output is zero. So
    /// are all outputs of a sequence without real tokens. What is real is copied once.
    ///
    /// (A kernel by itself, [`Head::with_key_mask`](crate::Head::with_key_mask), answers all
    /// queries, and positions stay. A [bias](Self::with_bias) of −∞ does so here.)
    #[must_use]
    pub fn with_key_mask(self, key_mask: ArrayView2<'a, bool>) -> Self {
        Self { key_mask: Some(key_mask), ..self }
    }

    /// Adds biases to the scores, `[1 or batch, 1 or query_heads, n_q, n_k]`, as
    /// [`Head::with_bias`](crate::Head::with_bias) says, in kernels that take them. In a stream
    /// `n_k` counts the tokens before as well, and all sequences must have as many.
    #[must_use]
    pub fn with_bias(self, bias: ArrayView4<'a, T>) -> Self {
        Self { bias: Some(bias), ..self }
    }

    /// Keeps there what makes the backward pass of this call faster.
    #[must_use]
    pub fn with_record(self, record: &'a mut LayerRecord<T>) -> Self {
        Self { record: Some(record), ..self }
    }
}

/// What a layer is called with, but for what it writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arguments<'a, T> {
    pub(crate) qkv: [ArrayView4<'a, T>; 3],
    pub(crate) log_decay: Option<ArrayView4<'a, T>>,
    pub(crate) bias: Option<ArrayView4<'a, T>>,
}
