//! Many heads at once: `[batch, heads, n, d]` views, grouped-query heads, padded keys, threads.

pub(crate) mod layout;
pub(crate) mod stream;
pub(crate) mod tasks;
pub(crate) mod undo;

use crate::attention::Attention;
use crate::attention::scratch::Scratch;
use crate::attention::sharing::Sharing;
use crate::attention::stream::StreamOptions;
use crate::check;
use crate::error::Error;
use crate::mask::Mask;
use crate::multi_head::layout::{
    HeadUnit, LayerShape, check_heads, check_lengths, check_log_decay,
};
use crate::multi_head::stream::MultiHeadStream;
use crate::multi_head::tasks::{LayerCall, for_each, threads_of_each};
use crate::scalar::Scalar;
use ndarray::{Array4, ArrayView4, ArrayViewMut4};
use std::sync::Arc;

/// Attention of a layer: one kernel for all query heads, or one for each.
///
/// Arrays are `[batch, heads, tokens, columns]` views of any strides (permute the axes of another
/// layout; nothing is copied). With grouped-query heads (Ainslie et al., arXiv 2305.13245) `k` and
/// `v` have fewer heads: query head `h` uses kv head `h / (query_heads / kv_heads)`. Where the
/// query heads of a kv head have the same kernel (the same `Arc`) and that kernel can
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
        Ok(Self { kernels, kv_heads, units: Arc::new(units) })
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

    /// Lets all kv heads with [`Far::merged`](crate::Far::merged) share one budget of entries, as
    /// many as they have together: the pair that costs least merges, in whichever head, and at
    /// least 4 entries stay in each. So that heads compare, the attention a head received in a step
    /// is scaled: what its query heads give to all but the sinks sums to their number. Heads with
    /// other kernels stay as they are.
    ///
    /// ```
    /// use dijiang::{Far, HybridAttention, MultiHead};
    ///
    /// let kernel =
    ///     HybridAttention::<f32>::builder(16).window(8).far(Far::merged(10)).build()?;
    /// let layer = MultiHead::new(kernel, 6, 3)?.pooled()?; // 30 entries for three kv heads
    ///     
    /// # let _ = layer;
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if fewer than two kv heads merge with one kernel for all their query
    /// heads (those with several are left as they are), or they are pooled already;
    /// [`Error::InvalidOption`] if the kernels that merge differ in an option, keep heavy keys or
    /// fewer than 4 entries, or have more than 16 384 of them together.
    pub fn pooled(mut self) -> Result<Self, Error> {
        let heads = self.poolable();
        if heads.len() < 2 {
            let why = "it needs two kv heads with `Far::merged` that are not pooled yet, each with \
                       one kernel for all its query heads";
            return Err(Error::Unsupported { what: "pooling the entries of heads", why });
        }
        let sharing = |kv: usize| self.kernels[kv * self.group()].sharing();
        let first = sharing(heads[0]);
        let most = if let Sharing::Layer { max_heads, .. } = first { max_heads } else { 1 };
        if most < 2 || heads.iter().any(|&kv| sharing(kv) != first) {
            return Err(Error::InvalidOption {
                which: "the kernels of pooled heads",
                found: "different ones, with heavy keys, or with fewer than 4 entries".to_owned(),
                needed: "the same options in each, no heavy keys, at least 4 entries",
            });
        }
        if heads.len() > most {
            return Err(Error::InvalidOption {
                which: "entries",
                found: format!("those of {} heads", heads.len()),
                needed: "at most 16384 over all heads of a pool, with the tokens of a block",
            });
        }
        let pooled = |unit: &&HeadUnit| matches!(unit, HeadUnit::Group(kv) if heads.contains(kv));
        let mut units: Vec<HeadUnit> =
            self.units.iter().filter(|unit| !pooled(unit)).cloned().collect();
        units.push(HeadUnit::Pool(heads));
        self.units = Arc::new(units);
        Ok(self)
    }

    /// The kv heads that [`pooled`](Self::pooled) would let share their entries: those with
    /// [`Far::merged`](crate::Far::merged), one kernel for all their query heads, and no pool yet.
    /// It needs two; where a choice of exact heads leaves a layer fewer, there is nothing to share.
    #[must_use]
    pub fn poolable(&self) -> Vec<usize> {
        let group = self.group();
        let merges =
            |kv: usize| matches!(self.kernels[kv * group].sharing(), Sharing::Layer { .. });
        (0..self.kv_heads)
            .filter(|&kv| self.units.contains(&HeadUnit::Group(kv)) && merges(kv))
            .collect()
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
    /// Those of [`Attention::state_floats`].
    pub fn state_bytes(&self, value_dim: usize, tokens: usize) -> Result<usize, Error> {
        let group = self.group();
        let mut floats = 0_usize;
        for unit in &*self.units {
            let kernel = &self.kernels[unit.first_query_head(group)];
            let each = kernel.state_floats(value_dim, tokens)?;
            floats = floats.saturating_add(each.saturating_mul(unit.kv_heads()));
        }
        Ok(floats.saturating_mul(size_of::<T>()))
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
    /// their output is zero. A length of 0 is thus all padding with [`Mask::Causal`], and an error
    /// with [`Mask::Full`], where queries would have nothing to see.
    ///
    /// # Errors
    ///
    /// Those of [`Attention::forward_into`] for any head, [`Error::Shape`] if the numbers of heads,
    /// sequences or lengths do not fit, [`Error::InvalidOption`] if a length is larger than the
    /// number of keys.
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
        self.forward_all([q, k, v], None, mask, key_lengths, out)
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
        self.forward_all([q, k, v], Some(log_decay), Mask::Causal, key_lengths, out)
    }

    fn forward_all(
        &self,
        [q, k, v]: [ArrayView4<'_, T>; 3],
        log_decay: Option<ArrayView4<'_, T>>,
        mask: Mask,
        key_lengths: Option<&[usize]>,
        out: ArrayViewMut4<'_, T>,
    ) -> Result<(), Error> {
        let dims = [q.dim(), k.dim(), v.dim(), out.dim()];
        check_heads(self.query_heads(), self.kv_heads, dims)?;
        check_log_decay(k.dim(), log_decay.map(|x| x.dim()))?;
        check_lengths(key_lengths, q.dim().0, k.dim().2)?;
        let is_causal = mask == Mask::Causal;
        if is_causal {
            check::size("k", "rows", q.dim().2, k.dim().2)?;
        }
        let group = self.group();
        let mut units = Vec::with_capacity(self.kernels.len());
        for unit in &*self.units {
            match unit {
                // query heads that do not depend on each other are tasks of their own
                HeadUnit::Group(kv) if self.kernels[kv * group].sharing() == Sharing::Head => {
                    units.extend((kv * group..(kv + 1) * group).map(HeadUnit::Query));
                }
                _ => units.push(unit.clone()),
            }
        }
        let call = LayerCall { q, k, v, log_decay, group, lengths: key_lengths, is_causal };
        let kernels = units.iter().map(|unit| &self.kernels[unit.first_query_head(group)]);
        let tasks = call.tasks(&units, out).into_iter().zip(kernels.cycle()).collect();
        for_each(tasks, Scratch::with_threads, |scratch, (mut heads, kernel)| {
            kernel.forward_heads(&mut heads, mask, scratch)
        })
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
            units: Arc::clone(&self.units),
        };
        Ok(MultiHeadStream::new(shape, streams))
    }
}
