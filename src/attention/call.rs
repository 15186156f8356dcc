//! What a kernel is called with: one head of keys and values, and the query heads that read it.

mod checks;

use crate::error::Error;
use crate::memory::linear::checkpoints::SumCheckpoints;
use crate::scalar::Scalar;
use ndarray::{ArrayView1, ArrayView2, ArrayView3, ArrayViewMut2, ArrayViewMut3, Axis};

/// One head of keys and values with the query heads that read it (grouped-query attention,
/// Ainslie et al., arXiv 2305.13245): the arguments of
/// [`Attention::forward_heads`](crate::Attention::forward_heads) and
/// [`Stream::extend_heads`](crate::Stream::extend_heads).
///
/// Views may have any strides.
///
/// ```
/// use dijiang::{Attention, Head, Mask, Scratch, SoftmaxAttention};
/// use ndarray::{Array2, Array3};
///
/// let kernel = SoftmaxAttention::<f32>::new(8)?;
/// let (q, k) = (Array3::zeros((3, 10, 8)), Array2::zeros((10, 8))); // three query heads
/// let (v, mut out) = (Array2::ones((10, 4)), Array3::zeros((3, 10, 4)));
/// let mut heads = [Head::group(q.view(), k.view(), v.view(), out.view_mut())];
/// kernel.forward_heads(&mut heads, Mask::Causal, &mut Scratch::new())?;
/// assert_eq!(out, Array3::<f32>::ones((3, 10, 4)));
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug)]
pub struct Head<'a, T> {
    /// Queries `[group, n_q, d]`, a matrix for each query head.
    pub q: ArrayView3<'a, T>,
    /// Keys `[n_k, d]`.
    pub k: ArrayView2<'a, T>,
    /// Values `[n_k, d_v]`.
    pub v: ArrayView2<'a, T>,
    /// Log decays `[n_k, 1 or num_features]`, of gated kernels
    /// ([`LinearAttention::gated`](crate::LinearAttention::gated)). Row `t` is the logarithm of
    /// what token `t` leaves of all that came before it: 0 keeps it, −∞ forgets it.
    pub log_decay: Option<ArrayView2<'a, T>>,
    /// Which keys may be seen, `[n_k]`, for kernels that take it:
    /// [`with_key_mask`](Self::with_key_mask).
    pub key_mask: Option<ArrayView1<'a, bool>>,
    /// What is added to scores, `[1 or group, n_q, n_k]`, for kernels that take it:
    /// [`with_bias`](Self::with_bias).
    pub bias: Option<ArrayView3<'a, T>>,
    /// How many of the last columns of `v` only show the weights, for tools that measure: no
    /// decision of a kernel may depend on them. 0 unless set.
    pub probes: usize,
    /// Outputs `[group, n_q, d_v]`, written over whatever they held.
    pub out: ArrayViewMut3<'a, T>,
    /// Where the natural logarithms of the sums of the weights go, `[group, n_q]`, if they are
    /// asked for: [`with_log_normalizer`](Self::with_log_normalizer).
    pub log_normalizer: Option<ArrayViewMut2<'a, T>>,
    /// Where linear attention keeps sums for the backward pass, if it is to:
    /// [`with_checkpoints`](Self::with_checkpoints).
    pub checkpoints: Option<&'a mut SumCheckpoints<T>>,
}

impl<'a, T> Head<'a, T> {
    /// One query head: `q [n_q, d]`, `k [n_k, d]`, `v [n_k, d_v]`, `out [n_q, d_v]`.
    #[inline]
    #[must_use]
    pub fn new(
        q: ArrayView2<'a, T>,
        k: ArrayView2<'a, T>,
        v: ArrayView2<'a, T>,
        out: ArrayViewMut2<'a, T>,
    ) -> Self {
        Self::group(q.insert_axis(Axis(0)), k, v, out.insert_axis(Axis(0)))
    }

    /// Several query heads: `q [group, n_q, d]`, `k [n_k, d]`, `v [n_k, d_v]`,
    /// `out [group, n_q, d_v]`.
    #[inline]
    #[must_use]
    pub fn group(
        q: ArrayView3<'a, T>,
        k: ArrayView2<'a, T>,
        v: ArrayView2<'a, T>,
        out: ArrayViewMut3<'a, T>,
    ) -> Self {
        Self {
            q,
            k,
            v,
            log_decay: None,
            key_mask: None,
            bias: None,
            probes: 0,
            out,
            log_normalizer: None,
            checkpoints: None,
        }
    }

    /// Brings the log decays of the tokens, `[n_k, 1 or num_features]`.
    #[must_use]
    pub fn with_log_decay(self, log_decay: ArrayView2<'a, T>) -> Self {
        Self { log_decay: Some(log_decay), ..self }
    }

    /// Says which keys may be seen, `[n_k]`: the others are to no query what keys behind the mask
    /// are, whatever they hold, but their numbers must be finite. Positions stay.
    ///
    /// [`SoftmaxAttention`](crate::SoftmaxAttention) takes it, and what is built of it, in forward
    /// and backward passes. Other kernels, and streams, report [`Error::Unsupported`]: leave the
    /// tokens out. A query that sees no key at all gives [`Error::NothingSeen`], or zero where
    /// there is a learned sink.
    ///
    /// ```
    /// use dijiang::{Attention, Head, Mask, Scratch, SoftmaxAttention};
    /// use ndarray::{Array2, array};
    ///
    /// let kernel = SoftmaxAttention::<f64>::new(1)?;
    /// let (q, k) = (array![[0.0], [0.0], [0.0]], array![[1.0], [9.0], [2.0]]);
    /// let (key_mask, mut out) = (array![true, false, true], Array2::zeros((3, 1)));
    /// let head = Head::new(q.view(), k.view(), k.view(), out.view_mut());
    /// let mut heads = [head.with_key_mask(key_mask.view())];
    /// kernel.forward_heads(&mut heads, Mask::Causal, &mut Scratch::new())?;
    /// assert_eq!(out, array![[1.0], [1.0], [1.5]]);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    #[must_use]
    pub fn with_key_mask(self, key_mask: ArrayView1<'a, bool>) -> Self {
        Self { key_mask: Some(key_mask), ..self }
    }

    /// Adds biases to the scores, `[1 or group, n_q, n_k]`: one array for all query heads, or one
    /// for each.
    ///
    /// ```text
    /// s_tj = cap(scale·q_t·k_j) − slope·(t − j) + bias_tj
    /// ```
    ///
    /// A bias of −∞, and one below an eighth of the range of the type, hides the key. Use −∞ for
    /// that: where all that a query sees has a bias of −1e9, say, a backward pass in `f32` cannot
    /// tell its weights apart, as numbers of that size are 64 apart. NaN and +∞ are errors. Biases
    /// of keys that the mask hides are not read, but must be none of these.
    ///
    /// [`SoftmaxAttention`](crate::SoftmaxAttention) takes them, and what is built of it, in
    /// forward and backward passes, and in streams without a window: `n_k` then counts the tokens
    /// before as well. Others report [`Error::Unsupported`]. Queries that see no key are as with a
    /// [key mask](Self::with_key_mask).
    ///
    /// ```
    /// use dijiang::{Attention, Head, Mask, Scratch, SoftmaxAttention};
    /// use ndarray::{Array2, array};
    ///
    /// let kernel = SoftmaxAttention::<f64>::new(1)?;
    /// let (q, k, v) = (array![[0.0]], array![[1.0], [2.0], [3.0]], array![[4.0], [8.0], [9.0]]);
    /// let bias = array![[[0.0, 3f64.ln(), f64::NEG_INFINITY]]];
    /// let mut out = Array2::zeros((1, 1));
    /// let head = Head::new(q.view(), k.view(), v.view(), out.view_mut());
    /// let mut heads = [head.with_bias(bias.view())];
    /// kernel.forward_heads(&mut heads, Mask::Full, &mut Scratch::new())?;
    /// assert!((out[[0, 0]] - 7.0).abs() < 1e-14); // weights of 1, 3 and 0
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    #[must_use]
    pub fn with_bias(self, bias: ArrayView3<'a, T>) -> Self {
        Self { bias: Some(bias), ..self }
    }

    /// Says that the last `probes` columns of `v` only show the weights.
    #[must_use]
    pub fn with_probes(self, probes: usize) -> Self {
        Self { probes, ..self }
    }

    /// Asks for the natural logarithms of the sums of the weights, `[group, n_q]`, those of learned
    /// sinks included. With them and the outputs, a backward pass computes nothing of the forward
    /// pass again ([`ForwardRecord`](crate::ForwardRecord)).
    ///
    /// [`SoftmaxAttention`](crate::SoftmaxAttention) and what is built of it give them in a forward
    /// pass; other kernels, and streams, report [`Error::Unsupported`].
    ///
    /// ```
    /// use dijiang::{Attention, Mask, Scratch, SoftmaxAttention};
    /// use dijiang::{ForwardRecord, Head, HeadGradient};
    /// use ndarray::{Array2, Array3};
    ///
    /// let (kernel, mut scratch) = (SoftmaxAttention::<f32>::new(8)?, Scratch::new());
    /// let x = Array2::from_shape_fn((20, 8), |(t, c)| ((t * 8 + c) as f32).sin());
    /// let (mut out, mut log_normalizer) = (Array3::zeros((1, 20, 8)), Array2::zeros((1, 20)));
    /// let q = x.view().insert_axis(ndarray::Axis(0));
    /// let head = Head::group(q, x.view(), x.view(), out.view_mut());
    /// let mut heads = [head.with_log_normalizer(log_normalizer.view_mut())];
    /// kernel.forward_heads(&mut heads, Mask::Causal, &mut scratch)?;
    /// // the first query sees one key only
    /// assert!((log_normalizer[[0, 0]] - x.row(0).dot(&x.row(0)) / 8_f32.sqrt()).abs() < 1e-5);
    ///
    /// let d_out = Array2::ones((20, 8)); // the loss is the sum of all outputs
    /// let [mut d_q, mut d_k, mut d_v] = [(); 3].map(|()| Array2::zeros((20, 8)));
    /// let d = [d_q.view_mut(), d_k.view_mut(), d_v.view_mut()];
    /// let head = HeadGradient::new([x.view(), x.view(), x.view()], d_out.view(), d);
    /// let record = ForwardRecord { out: out.view(), log_normalizer: log_normalizer.view() };
    /// kernel.backward_heads(&mut [head.with_record(record)], Mask::Causal, &mut scratch)?;
    /// assert!((d_v.sum() - 160.0).abs() < 1e-3); // each query hands on a weight of one in all
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    #[must_use]
    pub fn with_log_normalizer(self, log_normalizer: ArrayViewMut2<'a, T>) -> Self {
        Self { log_normalizer: Some(log_normalizer), ..self }
    }

    /// Asks [`LinearAttention`](crate::LinearAttention), and what is built of it, to keep sums for
    /// the backward pass there, and a hybrid with merged entries to keep what it merged, which then
    /// is faster
    /// ([`HeadGradient::with_checkpoints`](crate::HeadGradient::with_checkpoints)). What they held
    /// is removed; a call that has no use for them leaves them empty.
    #[must_use]
    pub fn with_checkpoints(self, checkpoints: &'a mut SumCheckpoints<T>) -> Self
    where
        T: Scalar,
    {
        checkpoints.clear();
        Self { checkpoints: Some(checkpoints), ..self }
    }

    /// The same head, borrowed for a shorter time.
    #[inline]
    pub fn reborrow(&mut self) -> Head<'_, T> {
        Head {
            q: self.q,
            k: self.k,
            v: self.v,
            log_decay: self.log_decay,
            key_mask: self.key_mask,
            bias: self.bias,
            probes: self.probes,
            out: self.out.view_mut(),
            log_normalizer: self.log_normalizer.as_mut().map(|x| x.view_mut()),
            checkpoints: self.checkpoints.as_deref_mut(),
        }
    }

    /// Query heads.
    #[inline]
    #[must_use]
    pub fn group_len(&self) -> usize {
        self.q.len_of(Axis(0))
    }

    /// Queries of each query head.
    #[inline]
    #[must_use]
    pub fn queries(&self) -> usize {
        self.q.len_of(Axis(1))
    }

    /// Keys.
    #[inline]
    #[must_use]
    pub fn keys(&self) -> usize {
        self.k.nrows()
    }
}

/// The only head of a call, for streams of one head of keys and values.
///
/// # Errors
///
/// [`Error::Unsupported`] if there are several, or none.
pub(crate) fn one_head<'b, 'a, T>(
    heads: &'b mut [Head<'a, T>],
) -> Result<&'b mut Head<'a, T>, Error> {
    match heads {
        [head] => Ok(head),
        _ => Err(ONE_HEAD),
    }
}

pub(crate) const NOT_GATED: Error = Error::Unsupported {
    what: "a log decay of each token",
    why: "this kernel is not one of `LinearAttention::gated`",
};

pub(crate) const NO_LOG_NORMALIZER: Error = Error::Unsupported {
    what: "the logarithms of the sums of the weights",
    why: "only a forward pass of `SoftmaxAttention`, and of what is built of it, gives them",
};

pub(crate) const NO_FULL_DECAY: Error = Error::Unsupported {
    what: "full attention with decay",
    why: "a decay needs an order of tokens; use `Mask::Causal`",
};

pub(crate) const ONE_HEAD: Error = Error::Unsupported {
    what: "several heads of keys and values in one stream",
    why: "the stream is one of a single head",
};
