//! Many heads at once: `[batch, heads, n, d]` views, grouped-query heads, padded keys, threads.

pub(crate) mod arguments;
mod backward;
mod forward;
pub(crate) mod gradient;
pub(crate) mod layout;
mod parameters;
mod places;
mod pool;
pub(crate) mod raw;
pub(crate) mod record;
mod rows;
pub(crate) mod stream;
pub(crate) mod tasks;
pub(crate) mod undo;

use crate::attention::Attention;
use crate::attention::stream::StreamOptions;
use crate::check;
use crate::error::Error;
use crate::mask::Mask;
use crate::multi_head::arguments::{Arguments, LayerForward};
use crate::multi_head::layout::{
    Dim4, HeadUnit, LayerShape, Padding, check_bias, check_heads, check_lengths, check_log_decay,
};
use crate::multi_head::places::Places;
use crate::multi_head::stream::MultiHeadStream;
use crate::multi_head::tasks::{LayerCall, threads_of_each};
use crate::scalar::Scalar;
use ndarray::{Array4, ArrayView4, ArrayViewMut4};
use std::sync::Arc;

/// Attention of a layer: one kernel for all query heads, or one for each.
///
/// Arrays are `[batch, heads, tokens, columns]` views of any strides (permute the axes of another
/// layout: rows of a head that lie apart are put together, a head at a time, where they are read
/// often). With grouped-query heads (Ainslie et al., arXiv 2305.13245) `k` and `v` have fewer
/// heads: query head `h` uses kv head `h / (query_heads / kv_heads)`. Where the query heads of a kv
/// head have the same kernel (the same `Arc`) and that kernel can
/// ([`Attention::stream_with`], all kernels of this crate), one state serves them all; otherwise
/// each has its own.
///
/// With feature `rayon`, batch × heads are shared out over the threads of the current pool; the
/// result is the same, bit for bit.
///
/// ```
/// use dijiang::{Mask, MultiHead, SoftmaxAttention};
/// use ndarray::Array4;
///
/// // 4 query heads on 2 kv heads
/// let layer = MultiHead::new(SoftmaxAttention::<f32>::new(16)?, 4, 2)?;
/// let q = Array4::from_elem((3, 4, 10, 16), 0.1);
/// let k = Array4::from_elem((3, 2, 10, 16), 0.2);
/// let v = Array4::from_elem((3, 2, 10, 8), 0.3);
/// let lengths = [10, 7, 1]; // keys beyond are padding
/// let out = layer.forward(q.view(), k.view(), v.view(), Mask::Full, Some(&lengths))?;
/// assert_eq!(out.dim(), (3, 4, 10, 8));
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct MultiHead<T: Scalar> {
    /// One for each query head.
    kernels: Vec<Arc<dyn Attention<T>>>,
    kv_heads: usize,
    /// What has a state of its own: in the order of heads, a pool last.
    units: Arc<Vec<HeadUnit>>,
    padding: Padding,
}

impl<T: Scalar> MultiHead<T> {
    /// The same kernel in `query_heads` heads, which share `kv_heads` heads of keys and values.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if a number of heads is 0, [`Error::InvalidOption`] if `query_heads` is
    /// not a multiple of `kv_heads`.
    pub fn new(
        kernel: impl Attention<T> + 'static,
        query_heads: usize,
        kv_heads: usize,
    ) -> Result<Self, Error> {
        check::array("query_heads", query_heads, 1)?;
        let kernel: Arc<dyn Attention<T>> = Arc::new(kernel);
        Self::per_head(vec![kernel; query_heads], kv_heads)
    }

    /// One kernel for each query head, in order.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn per_head(kernels: Vec<Arc<dyn Attention<T>>>, kv_heads: usize) -> Result<Self, Error> {
        check::at_least_one("query_heads", kernels.len())?;
        check::at_least_one("kv_heads", kv_heads)?;
        if !kernels.len().is_multiple_of(kv_heads) {
            return Err(Error::InvalidOption {
                which: "kv_heads",
                found: kv_heads.to_string(),
                needed: "a divisor of the number of query heads",
            });
        }
        let group = kernels.len() / kv_heads;
        let mut units = Vec::new();
        for (kv, of_group) in kernels.chunks_exact(group).enumerate() {
            let (kernel, options) = (&of_group[0], StreamOptions::new(1).group(group));
            let same = of_group.iter().all(|other| Arc::ptr_eq(kernel, other));
            if same && (group == 1 || kernel.stream_with(options).is_ok()) {
                units.push(HeadUnit::Group(kv));
            } else {
                units.extend((kv * group..(kv + 1) * group).map(HeadUnit::Query));
            }
        }
        Ok(Self { kernels, kv_heads, units: Arc::new(units), padding: Padding::Right })
    }

    /// One kernel for each kv head, in order: for all the query heads that use it.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn per_kv_head(
        kernels: Vec<Arc<dyn Attention<T>>>,
        query_heads: usize,
    ) -> Result<Self, Error> {
        check::at_least_one("kv_heads", kernels.len())?;
        check::array("query_heads", query_heads, 1)?;
        let (kv_heads, group) = (kernels.len(), query_heads / kernels.len());
        if !query_heads.is_multiple_of(kv_heads) {
            let found = query_heads.to_string();
            return Err(Error::InvalidOption {
                which: "query_heads",
                found,
                needed: "a multiple of the number of kv heads",
            });
        }
        Self::per_head(
            kernels.iter().flat_map(|kernel| vec![Arc::clone(kernel); group]).collect(),
            kv_heads,
        )
    }

    /// Sets on which side of shorter sequences the padding lies, [`Padding::Right`] unless set: in
    /// all calls with lengths, and in the streams that this layer starts
    /// ([`MultiHeadStream::set_padding`] changes one of them).
    ///
    /// With [`Padding::Left`] the last `lengths[b]` tokens of sequence `b` are real, of the queries
    /// as of keys and values: what lies before them is never read, its output is zero, and
    /// positions count from the first real token. Each sequence gets what it would get alone.
    ///
    /// ```
    /// use dijiang::{Mask, MultiHead, Padding, SoftmaxAttention};
    /// use ndarray::{Array4, s};
    ///
    /// let layer = MultiHead::new(SoftmaxAttention::<f32>::new(8)?, 2, 1)?;
    /// let layer = layer.with_padding(Padding::Left);
    /// let mut x = Array4::from_elem((2, 2, 5, 8), 0.5);
    /// x.slice_mut(s![1, .., ..3, ..]).fill(f32::NAN); // two tokens behind three of padding
    /// let kv = x.slice(s![.., ..1, .., ..]);
    /// let out = layer.forward(x.view(), kv, kv, Mask::Causal, Some(&[5, 2]))?;
    /// assert!(out.slice(s![1, .., ..3, ..]).iter().all(|&x| x == 0.0));
    /// assert!(out.slice(s![1, .., 3.., ..]).iter().all(|&x| x == 0.5));
    ///
    /// // the prompts, then one token of each
    /// let (mut stream, mut out) = (layer.stream(2, 8)?, Array4::zeros((2, 2, 5, 8)));
    /// stream.extend(x.view(), kv, kv, Some(&[5, 2]), out.view_mut())?;
    /// let (q, kv) = (Array4::ones((2, 2, 1, 8)), Array4::ones((2, 1, 1, 8)));
    /// let mut out = Array4::zeros(q.dim());
    /// stream.extend(q.view(), kv.view(), kv.view(), None, out.view_mut())?;
    /// assert_eq!(stream.lengths(), [6, 3]);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    #[must_use]
    pub fn with_padding(self, padding: Padding) -> Self {
        Self { padding, ..self }
    }

    /// Bytes of the state of one sequence after `tokens` tokens, for values of `value_dim` columns.
    ///
    /// ```
    /// use dijiang::{MultiHead, SoftmaxAttention};
    ///
    /// let layer = MultiHead::new(SoftmaxAttention::<f32>::new(64)?, 9, 3)?;
    /// assert_eq!(layer.state_bytes(64, 1000)?, 3 * 1000 * (64 + 64) * 4);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`Attention::state_bytes`].
    pub fn state_bytes(&self, value_dim: usize, tokens: usize) -> Result<usize, Error> {
        let group = self.group();
        let mut bytes = 0_usize;
        for unit in &*self.units {
            let kernel = &self.kernels[unit.first_query_head(group)];
            let each = kernel.state_bytes(value_dim, tokens)?;
            bytes = bytes.saturating_add(each.saturating_mul(unit.kv_heads()));
        }
        Ok(bytes)
    }

    /// Query heads.
    #[must_use]
    pub fn query_heads(&self) -> usize {
        self.kernels.len()
    }

    /// Heads of keys and values.
    #[must_use]
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Query heads of a kv head.
    fn group(&self) -> usize {
        self.kernels.len() / self.kv_heads
    }

    /// Attends in every head: `q [b, query_heads, n_q, d]`, `k [b, kv_heads, n_k, d]`,
    /// `v [b, kv_heads, n_k, d_v]` give `[b, query_heads, n_q, d_v]`.
    ///
    /// `key_lengths`, one for each sequence of the batch, says how many keys are real; the rest is
    /// padding and never read. With [`Mask::Causal`] queries beyond the length are padding too:
    /// their output is zero. With [`Mask::Full`] all queries are answered. With
    /// [`Mask::CausalTail`] the last query of each sequence stands at its last real key; queries
    /// before its first key see nothing, and their output is zero. Padding comes last unless
    /// [`with_padding`](Self::with_padding) says otherwise.
    ///
    /// Queries of a sequence without keys, of a length of 0 or where `k` has no rows, have nothing
    /// to see: their outputs are zero, as in the attention of PyTorch and ONNX, and they are not
    /// read. (A kernel by itself refuses such a call.)
    ///
    /// # Errors
    ///
    /// Those of [`Attention::forward_into`], in an [`Error::InHead`] with the first sequence and
    /// head that failed; [`Error::Shape`] if the numbers of heads, sequences or lengths do not fit,
    /// [`Error::InvalidOption`] if a length is larger than the number of keys. With
    /// [`Padding::Left`] and lengths there must be as many queries as keys, else [`Error::Shape`],
    /// but with [`Mask::CausalTail`].
    pub fn forward(
        &self,
        q: ArrayView4<'_, T>,
        k: ArrayView4<'_, T>,
        v: ArrayView4<'_, T>,
        mask: Mask,
        key_lengths: Option<&[usize]>,
    ) -> Result<Array4<T>, Error> {
        let (batch, heads, tokens, _) = q.dim();
        let mut out = Array4::zeros((batch, heads, tokens, v.dim().3));
        self.forward_into(q, k, v, mask, key_lengths, out.view_mut())?;
        Ok(out)
    }

    /// As [`forward`](Self::forward), over whatever `out` held.
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward). After an error the content of `out` is unspecified.
    pub fn forward_into(
        &self,
        q: ArrayView4<'_, T>,
        k: ArrayView4<'_, T>,
        v: ArrayView4<'_, T>,
        mask: Mask,
        key_lengths: Option<&[usize]>,
        out: ArrayViewMut4<'_, T>,
    ) -> Result<(), Error> {
        self.forward_with(LayerForward::new([q, k, v], out), mask, key_lengths)
    }

    /// As [`forward_into`](Self::forward_into) with [`Mask::Causal`], of gated kernels:
    /// `log_decay [b, kv_heads, n, 1 or num_features]`; see
    /// [`Head::log_decay`](crate::Head::log_decay).
    ///
    /// ```
    /// use dijiang::{EluFeatures, LinearAttention, MultiHead};
    /// use ndarray::Array4;
    ///
    /// let layer =
    ///     MultiHead::new(LinearAttention::new(EluFeatures::<f32>::new(16)?).gated(), 4, 2)?;
    /// let q = Array4::zeros((1, 4, 10, 16));
    /// let (k, v) = (Array4::zeros((1, 2, 10, 16)), Array4::ones((1, 2, 10, 8)));
    /// let log_decay = Array4::from_elem((1, 2, 10, 1), -0.1);
    /// let mut out = Array4::zeros((1, 4, 10, 8));
    /// layer.forward_gated(
    ///     q.view(),
    ///     k.view(),
    ///     v.view(),
    ///     log_decay.view(),
    ///     None,
    ///     out.view_mut(),
    /// )?;
    /// assert!(out.iter().all(|x| (x - 1.0).abs() < 1e-6)); // a weighted mean of ones
    ///     
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward); [`Error::Unsupported`] if a kernel is not gated. After an
    /// error the content of `out` is unspecified.
    pub fn forward_gated(
        &self,
        q: ArrayView4<'_, T>,
        k: ArrayView4<'_, T>,
        v: ArrayView4<'_, T>,
        log_decay: ArrayView4<'_, T>,
        key_lengths: Option<&[usize]>,
        out: ArrayViewMut4<'_, T>,
    ) -> Result<(), Error> {
        let forward = LayerForward::new([q, k, v], out).with_log_decay(log_decay);
        self.forward_with(forward, Mask::Causal, key_lengths)
    }

    /// The arguments, if they fit together; `places` are those of gathered tokens.
    fn call<'a>(
        &self,
        Arguments { qkv: [q, k, v], log_decay, bias }: Arguments<'a, T>,
        mask: Mask,
        lengths: Option<&'a [usize]>,
        out: Dim4,
        places: Option<&'a Places>,
    ) -> Result<LayerCall<'a, T>, Error> {
        check_heads(self.query_heads(), self.kv_heads, [q.dim(), k.dim(), v.dim(), out])?;
        check_log_decay(k.dim(), log_decay.map(|x| x.dim()))?;
        check_bias(bias.map(|x| x.dim()), q.dim(), k.dim().2)?;
        check_lengths(lengths, q.dim().0, k.dim().2)?;
        let padding = if places.is_some() { Padding::Right } else { self.padding };
        match mask {
            Mask::CausalTail if lengths.is_some() => {}
            Mask::Full if lengths.is_some() && padding == Padding::Left => {
                check::size("k", "rows", q.dim().2, k.dim().2)?;
            }
            _ => check::mask(mask, [q.dim().2, k.dim().2])?,
        }
        let (group, before) = (self.group(), 0);
        Ok(LayerCall { q, k, v, log_decay, bias, group, lengths, padding, mask, before, places })
    }

    /// Starts an empty causal stream of `batch` sequences.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `batch` or `value_dim` is 0, and those of [`Attention::stream`].
    pub fn stream(&self, batch: usize, value_dim: usize) -> Result<MultiHeadStream<T>, Error> {
        check::at_least_one("batch", batch)?;
        check::array("batch", batch, self.kernels.len())?;
        let group = self.group();
        let threads = threads_of_each(batch * self.units.len());
        let mut streams = Vec::with_capacity(batch * self.units.len());
        for unit in (0..batch).flat_map(|_| &*self.units) {
            let options = StreamOptions::new(value_dim).threads(threads).heads(unit.kv_heads());
            let group = if matches!(unit, HeadUnit::Query(_)) { 1 } else { group };
            let kernel = &self.kernels[unit.first_query_head(self.group())];
            streams.push(kernel.stream_with(options.group(group))?);
        }
        let shape = LayerShape {
            query_heads: self.query_heads(),
            kv_heads: self.kv_heads,
            value_dim,
            padding: self.padding,
            units: Arc::clone(&self.units),
        };
        Ok(MultiHeadStream::new(shape, streams))
    }
}
