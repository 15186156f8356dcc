//! Many heads at once: `[batch, heads, n, d]` views, grouped-query heads, padded keys, threads.

use super::hybrid::FULL_MERGED;
use super::{Attention, HeadCall, Mask, Scratch, Stream};
use crate::views::{head, heads};
use crate::{Error, Scalar, check};
use ndarray::{Array4, ArrayView3, ArrayView4, ArrayViewMut3, ArrayViewMut4, Axis, CowArray, Ix4};
use std::sync::Arc;

/// Attention of a layer: one kernel for all query heads, or one for each.
///
/// Arrays are `[batch, heads, tokens, columns]` views of any strides (permute the axes of another
/// layout; nothing is copied). With grouped-query heads (Ainslie et al., arXiv 2305.13245) `k` and
/// `v` have fewer heads: query head `h` uses kv head `h / (query_heads / kv_heads)`. Where the
/// query heads of a kv head have the same kernel (the same `Arc`) and that kernel can
/// ([`Attention::group_stream`], all kernels of this crate), one state serves them all; otherwise
/// each has its own.
///
/// With feature `rayon`, batch × heads are shared out over the threads of the current pool; the
/// result is the same, bit for bit.
///
/// ```
/// use dijiang::{Mask, MultiHead, SoftmaxAttention};
/// use ndarray::Array4;
///
/// let layer = MultiHead::new(SoftmaxAttention::<f32>::new(16)?, 4, 2)?; // 4 query heads on 2 kv heads
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
    units: Arc<Vec<Unit>>,
}

/// Heads with one state.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Unit {
    /// A query head.
    Query(usize),
    /// All query heads of a kv head.
    Group(usize),
    /// All query heads of some kv heads, whose entries share one budget.
    Pool(Vec<usize>),
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
            let same = of_group.iter().all(|kernel| Arc::ptr_eq(kernel, &of_group[0]));
            if same
                && (of_group[0].as_hybrid().is_some()
                    || matches!(of_group[0].group_stream(group, 1), Ok(Some(_))))
            {
                units.push(Unit::Group(kv));
            } else {
                units.extend((kv * group..(kv + 1) * group).map(Unit::Query));
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
        let kernels = &self.kernels;
        let group = self.group();
        let merging = |kv: usize| kernels[kv * group].as_hybrid();
        if heads.len() < 2 {
            let why = "it needs two kv heads with `Far::merged` that are not pooled yet, each \
                       with one kernel for all its query heads";
            return Err(Error::Unsupported { what: "pooling the entries of heads", why });
        }
        let first = merging(heads[0]);
        if !heads.iter().all(|&kv| {
            merging(kv).zip(first).is_some_and(|(a, b)| a.config().pools_with(b.config()))
        }) {
            return Err(Error::InvalidOption {
                which: "the kernels of pooled heads",
                found: "different ones, with heavy keys, or with fewer than 4 entries".to_owned(),
                needed: "the same options in each, no heavy keys, at least 4 entries",
            });
        }
        first.map_or(Ok(()), |kernel| kernel.config().check_pool(heads.len()))?;
        let mut units: Vec<Unit> = self
            .units
            .iter()
            .filter(|unit| !matches!(unit, Unit::Group(kv) if heads.contains(kv)))
            .cloned()
            .collect();
        units.push(Unit::Pool(heads));
        self.units = Arc::new(units);
        Ok(self)
    }

    /// The kv heads that [`pooled`](Self::pooled) would let share their entries: those with
    /// [`Far::merged`](crate::Far::merged), one kernel for all their query heads, and no pool yet.
    /// It needs two; where a choice of exact heads leaves a layer fewer, there is nothing to share.
    #[must_use]
    pub fn poolable(&self) -> Vec<usize> {
        let group = self.group();
        let merges = |kv: usize| {
            self.kernels[kv * group].as_hybrid().is_some_and(|kernel| kernel.config().learns())
        };
        (0..self.kv_heads)
            .filter(|&kv| merges(kv) && self.units.contains(&Unit::Group(kv)))
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
            let (kernel, heads) = match unit {
                Unit::Query(h) => (*h, 1),
                Unit::Group(kv) => (kv * group, 1),
                Unit::Pool(heads) => (heads[0] * group, heads.len()),
            };
            let each = self.kernels[kernel].state_floats(value_dim, tokens)?;
            floats = floats.saturating_add(each.saturating_mul(heads));
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
    /// `log_decay [b, kv_heads, n, 1 or num_features]`; see [`Attention::forward_gated`].
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
    /// As [`forward`](Self::forward), and those of [`Attention::forward_gated`]. After an error the
    /// content of `out` is unspecified.
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
        check_heads(self, q.dim(), k.dim(), v.dim(), out.dim())?;
        check_log_decay(k.dim(), log_decay)?;
        check_lengths(key_lengths, q.dim().0, k.dim().2)?;
        if mask == Mask::Causal {
            check::size("k", "rows", q.dim().2, k.dim().2)?;
        }
        let group = self.group();
        let coupled = |unit: &Unit| match unit {
            Unit::Query(_) => false,
            Unit::Group(kv) => {
                mask == Mask::Causal && !self.kernels[kv * group].heads_are_independent()
            }
            Unit::Pool(_) => true,
        };
        // query heads that do not depend on each other are tasks of their own
        let units: Vec<Unit> = self
            .units
            .iter()
            .flat_map(|unit| match unit {
                Unit::Group(kv) if !coupled(unit) => {
                    (kv * group..(kv + 1) * group).map(Unit::Query).collect()
                }
                _ => vec![unit.clone()],
            })
            .collect();
        for_each(
            tasks(out, &units, group),
            usize::MAX,
            Scratch::new,
            Scratch::of_one_thread,
            |scratch, task: Task<'_, T>| {
                let keys = key_lengths.map_or(k.dim().2, |lengths| lengths[task.sequence]);
                let queries = if mask == Mask::Causal { keys } else { q.dim().2 };
                let kernel = &self.kernels[task.outputs[0].0];
                let mut calls = task.calls([&q, &k, &v], log_decay.as_ref(), group, queries, keys);
                match (&mut *calls, kernel.as_hybrid()) {
                    ([HeadCall { q, k, v, log_decay: Some(log_decay), out }], _) => {
                        let mut heads = q.outer_iter().zip(out.outer_iter_mut());
                        heads.try_for_each(|(q, out)| {
                            kernel.forward_gated(q, *k, *v, *log_decay, out, scratch)
                        })
                    }
                    ([call], _) => kernel.forward_group(
                        call.q,
                        call.k,
                        call.v,
                        mask,
                        call.out.view_mut(),
                        scratch,
                    ),
                    (calls, Some(kernel)) if mask == Mask::Causal => {
                        kernel.forward_pool(calls, scratch)
                    }
                    _ => Err(FULL_MERGED),
                }
            },
        )
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
        let mut streams = Vec::with_capacity(batch * self.units.len());
        for unit in (0..batch).flat_map(|_| &*self.units) {
            streams.push(match unit {
                Unit::Query(h) => self.kernels[*h].stream(value_dim)?,
                Unit::Group(kv) => match self.kernels[kv * group].group_stream(group, value_dim)? {
                    Some(stream) => stream,
                    None => {
                        return Err(Error::Unsupported {
                            what: "a stream of a group",
                            why: "the kernel had one before",
                        });
                    }
                },
                Unit::Pool(heads) => match self.kernels[heads[0] * group].as_hybrid() {
                    Some(kernel) => Box::new(kernel.heads_stream(heads.len(), group, value_dim)?),
                    None => {
                        return Err(Error::Unsupported {
                            what: "a pool of heads",
                            why: "the kernel was one before",
                        });
                    }
                },
            });
        }
        if enough_for_threads(streams.len()) {
            for stream in &mut streams {
                stream.stay_on_one_thread();
            }
        }
        Ok(MultiHeadStream { heads: self.clone(), value_dim, streams, copies: Vec::new() })
    }

    /// The place of a query head among the units.
    fn unit_of(&self, query_head: usize) -> Option<usize> {
        let kv = query_head / self.group();
        self.units.iter().position(|unit| match unit {
            Unit::Query(h) => *h == query_head,
            Unit::Group(of) => *of == kv,
            Unit::Pool(heads) => heads.contains(&kv),
        })
    }
}

type Dim4 = (usize, usize, usize, usize);

/// Log decays of the tokens of every kv head.
fn check_log_decay<T>(k: Dim4, log_decay: Option<ArrayView4<'_, T>>) -> Result<(), Error> {
    let Some(log_decay) = log_decay else { return Ok(()) };
    let found = log_decay.dim();
    for (axis, expected, found) in
        [("sequences", k.0, found.0), ("heads", k.1, found.1), ("rows", k.2, found.2)]
    {
        check::size("log_decay", axis, expected, found)?;
    }
    Ok(())
}

fn check_heads<T: Scalar>(
    heads: &MultiHead<T>,
    q: Dim4,
    k: Dim4,
    v: Dim4,
    out: Dim4,
) -> Result<(), Error> {
    check::size("q", "heads", heads.query_heads(), q.1)?;
    check::size("k", "heads", heads.kv_heads, k.1)?;
    check::size("v", "heads", heads.kv_heads, v.1)?;
    check::size("k", "sequences", q.0, k.0)?;
    check::size("v", "sequences", q.0, v.0)?;
    check::size("v", "rows", k.2, v.2)?;
    for (axis, expected, found) in [
        ("sequences", q.0, out.0),
        ("heads", q.1, out.1),
        ("rows", q.2, out.2),
        ("columns", v.3, out.3),
    ] {
        check::size("out", axis, expected, found)?;
    }
    Ok(())
}

/// Rows `[b, n, heads · d]` seen as `[b, n, heads, d]`.
fn side_by_side<'a, T: Scalar>(
    which: &'static str,
    x: &'a ArrayView3<'_, T>,
    heads: usize,
) -> Result<CowArray<'a, T, Ix4>, Error> {
    let (batch, n, columns) = x.dim();
    let d = columns / heads;
    x.to_shape((batch, n, heads, d)).map_err(|_| Error::Shape {
        which,
        axis: "columns",
        expected: heads * d,
        found: columns,
    })
}

fn check_lengths(lengths: Option<&[usize]>, batch: usize, tokens: usize) -> Result<(), Error> {
    let Some(lengths) = lengths else { return Ok(()) };
    check::size("key_lengths", "elements", batch, lengths.len())?;
    match lengths.iter().find(|&&length| length > tokens) {
        Some(length) => Err(Error::InvalidOption {
            which: "key_lengths",
            found: length.to_string(),
            needed: "at most the number of rows of `k`",
        }),
        None => Ok(()),
    }
}

/// A unit of one sequence: for each of its kv heads the first query head, and the output of all.
struct Task<'a, T> {
    sequence: usize,
    outputs: Vec<(usize, ArrayViewMut3<'a, T>)>,
}

/// The arguments of a unit, and its state.
type Work<'a, 's, T> = (Vec<HeadCall<'a, T>>, &'s mut Box<dyn Stream<T>>);

/// The work on every unit.
fn tasks<'a, T>(mut out: ArrayViewMut4<'a, T>, units: &[Unit], group: usize) -> Vec<Task<'a, T>> {
    let (batch, query_heads, ..) = out.dim();
    let mut all = Vec::with_capacity(batch * units.len());
    for sequence in 0..batch {
        let (first, rest) = out.split_at(Axis(0), 1);
        out = rest;
        let mut heads = first.index_axis_move(Axis(0), 0);
        let mut of_kv = Vec::with_capacity(query_heads / group);
        while heads.len_of(Axis(0)) > 0 {
            let (first, rest) = heads.split_at(Axis(0), group);
            of_kv.push(Some(first));
            heads = rest;
        }
        for unit in units {
            let outputs = match unit {
                Unit::Query(h) => of_kv[h / group]
                    .take()
                    .map(|heads| {
                        let (first, rest) = heads.split_at(Axis(0), 1);
                        of_kv[h / group] = Some(rest);
                        (*h, first)
                    })
                    .into_iter()
                    .collect(),
                Unit::Group(kv) => {
                    of_kv[*kv].take().map(|heads| (kv * group, heads)).into_iter().collect()
                }
                Unit::Pool(pool) => {
                    pool.iter().filter_map(|&kv| Some((kv * group, of_kv[kv].take()?))).collect()
                }
            };
            all.push(Task { sequence, outputs });
        }
    }
    all
}

impl<'a, T: Scalar> Task<'a, T> {
    /// The arguments of each kv head, of so many queries and keys; what lies beyond in the output
    /// becomes zero.
    fn calls<'b>(
        self,
        [q, k, v]: [&ArrayView4<'b, T>; 3],
        log_decay: Option<&ArrayView4<'b, T>>,
        group: usize,
        queries: usize,
        keys: usize,
    ) -> Vec<HeadCall<'b, T>>
    where
        'a: 'b,
    {
        let sequence = self.sequence;
        let call = |(first, out): (usize, ArrayViewMut3<'a, T>)| {
            let (out, mut padding) = out.split_at(Axis(1), queries);
            padding.fill(T::zero());
            let of_group = first..first + out.len_of(Axis(0));
            let kv = first / group;
            let q = heads(q, sequence, of_group, queries);
            HeadCall {
                q,
                k: head(k, sequence, kv, keys),
                v: head(v, sequence, kv, keys),
                log_decay: log_decay.map(|x| head(x, sequence, kv, keys)),
                out,
            }
        };
        self.outputs.into_iter().map(call).collect()
    }
}

/// Numbers read, below which waking other threads takes longer than they save: a decode step of
/// states of constant size, or over a few hundred keys.
#[cfg(feature = "rayon")]
const WORTH_A_THREAD: usize = 1 << 18;

/// Whether there are tasks enough for every thread, so that none need be shared out itself.
fn enough_for_threads(tasks: usize) -> bool {
    #[cfg(feature = "rayon")]
    return tasks >= rayon::current_num_threads();
    #[cfg(not(feature = "rayon"))]
    return tasks > 0;
}

/// Runs every task in working memory, made by `alone` if tasks may use more threads themselves and
/// by `among` if not; the error of the first that failed, in order. Together they read so many
/// numbers.
#[cfg(feature = "rayon")]
fn for_each<I: Send, W: Send>(
    tasks: Vec<I>,
    reads: usize,
    alone: impl Fn() -> W + Send + Sync,
    among: impl Fn() -> W + Send + Sync,
    run: impl Fn(&mut W, I) -> Result<(), Error> + Send + Sync,
) -> Result<(), Error> {
    use rayon::prelude::*;
    if tasks.len() == 1 || reads < WORTH_A_THREAD {
        let mut memory = alone();
        return tasks.into_iter().try_for_each(|task| run(&mut memory, task));
    }
    let enough = enough_for_threads(tasks.len());
    let memory = || if enough { among() } else { alone() };
    let results: Vec<_> = tasks.into_par_iter().map_init(memory, run).collect();
    results.into_iter().collect()
}

/// As with feature `rayon`, on one thread.
#[cfg(not(feature = "rayon"))]
fn for_each<I, W>(
    tasks: Vec<I>,
    _reads: usize,
    alone: impl Fn() -> W,
    _among: impl Fn() -> W,
    run: impl Fn(&mut W, I) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut memory = alone();
    tasks.into_iter().try_for_each(|task| run(&mut memory, task))
}

/// The causal state of every head and sequence of a layer.
///
/// ```
/// use dijiang::{LinearAttention, MultiHead, Performer};
/// use ndarray::Array4;
///
/// let layer = MultiHead::new(LinearAttention::new(Performer::<f32>::new(16, 32, 0)?), 4, 2)?;
/// let mut stream = layer.stream(1, 8)?;
/// let (q, k, v) = (Array4::zeros((1, 4, 1, 16)), Array4::zeros((1, 2, 1, 16)), Array4::ones((1, 2, 1, 8)));
/// let mut out = Array4::zeros((1, 4, 1, 8));
/// stream.extend(q.view(), k.view(), v.view(), None, out.view_mut())?; // one decode step of the whole layer
/// assert!(out.iter().all(|x| (x - 1.0).abs() < 1e-6));
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct MultiHeadStream<T: Scalar> {
    heads: MultiHead<T>,
    value_dim: usize,
    /// Sequence after sequence, unit after unit.
    streams: Vec<Box<dyn Stream<T>>>,
    /// Copies of those that cannot be rolled back, while they are extended.
    copies: Vec<Option<Box<dyn Stream<T>>>>,
}

impl<T: Scalar> MultiHeadStream<T> {
    /// Absorbs up to `n` tokens of every sequence: `q [b, query_heads, n, d]`,
    /// `k [b, kv_heads, n, d]`, `v [b, kv_heads, n, value_dim]`,
    /// `out [b, query_heads, n, value_dim]`.
    ///
    /// `lengths`, one for each sequence, says how many of the `n` tokens are real; the rest is
    /// padding, never read, with output zero.
    ///
    /// # Errors
    ///
    /// As [`MultiHead::forward`]. On an error no head of any sequence has moved.
    pub fn extend(
        &mut self,
        q: ArrayView4<'_, T>,
        k: ArrayView4<'_, T>,
        v: ArrayView4<'_, T>,
        lengths: Option<&[usize]>,
        out: ArrayViewMut4<'_, T>,
    ) -> Result<(), Error> {
        self.extend_all([q, k, v], None, lengths, out)
    }

    /// As [`extend`](Self::extend), of gated kernels:
    /// `log_decay [b, kv_heads, n, 1 or num_features]`; see [`Attention::forward_gated`].
    ///
    /// # Errors
    ///
    /// As [`MultiHead::forward_gated`]. On an error no head of any sequence has moved.
    pub fn extend_gated(
        &mut self,
        q: ArrayView4<'_, T>,
        k: ArrayView4<'_, T>,
        v: ArrayView4<'_, T>,
        log_decay: ArrayView4<'_, T>,
        lengths: Option<&[usize]>,
        out: ArrayViewMut4<'_, T>,
    ) -> Result<(), Error> {
        self.extend_all([q, k, v], Some(log_decay), lengths, out)
    }

    fn extend_all(
        &mut self,
        [q, k, v]: [ArrayView4<'_, T>; 3],
        log_decay: Option<ArrayView4<'_, T>>,
        lengths: Option<&[usize]>,
        out: ArrayViewMut4<'_, T>,
    ) -> Result<(), Error> {
        let heads = &self.heads;
        check_heads(heads, q.dim(), k.dim(), v.dim(), out.dim())?;
        check_log_decay(k.dim(), log_decay)?;
        check::size("q", "sequences", self.streams.len() / heads.units.len(), q.dim().0)?;
        check::size("k", "rows", q.dim().2, k.dim().2)?;
        check::size("v", "columns", self.value_dim, v.dim().3)?;
        check_lengths(lengths, q.dim().0, q.dim().2)?;
        let group = heads.group();
        let lengths = |sequence: usize| lengths.map_or(q.dim().2, |lengths| lengths[sequence]);
        let mut work: Vec<Work<'_, '_, T>> = tasks(out, &heads.units, group)
            .into_iter()
            .zip(&mut self.streams)
            .map(|(task, stream)| {
                let tokens = lengths(task.sequence);
                (task.calls([&q, &k, &v], log_decay.as_ref(), group, tokens, tokens), stream)
            })
            .collect();
        self.copies.clear();
        // a head that fails must not leave the others ahead of it; alone it goes back by itself
        if work.len() > 1 && !work.iter().all(|(calls, stream)| stream.cannot_fail(calls)) {
            self.copies.extend(
                work.iter_mut().map(|(_, stream)| (!stream.checkpoint()).then(|| stream.clone())),
            );
        }
        let extend =
            |(): &mut (), (mut calls, stream): Work<'_, '_, T>| stream.extend_heads(&mut calls);
        let reads: usize = work.iter().map(|(_, stream)| stream.state_floats()).sum();
        let result = for_each(work, reads.saturating_mul(q.dim().2), || (), || (), extend);
        if result.is_err() {
            for (stream, copy) in self.streams.iter_mut().zip(&mut self.copies) {
                match copy.take() {
                    Some(copy) => *stream = copy,
                    None => stream.rollback()?,
                }
            }
        }
        self.copies.clear();
        result
    }

    /// As [`extend`](Self::extend), on rows as the projections of a model leave them, heads side by
    /// side: `q [b, n, query_heads · d]`, `k [b, n, kv_heads · d]`,
    /// `v [b, n, kv_heads · value_dim]`, `out [b, n, query_heads · value_dim]`.
    ///
    /// Rows that are contiguous are seen as heads without a copy; others are copied.
    ///
    /// ```
    /// use dijiang::{Far, HybridAttention, MultiHead};
    /// use ndarray::Array3;
    ///
    /// let (heads, kv_heads, d) = (9, 3, 16);
    /// let kernel = HybridAttention::<f32>::builder(d).window(8).far(Far::merged(8)).build()?;
    /// let mut stream = MultiHead::new(kernel, heads, kv_heads)?.stream(1, d)?;
    /// // q = x·W_q and so on, for 20 tokens of one sequence
    /// let (q, k, v) = (Array3::zeros((1, 20, heads * d)), Array3::zeros((1, 20, kv_heads * d)), Array3::ones((1, 20, kv_heads * d)));
    /// let mut out = Array3::zeros((1, 20, heads * d));
    /// stream.extend_rows(q.view(), k.view(), v.view(), None, out.view_mut())?; // on to out·W_o
    /// assert!(out.iter().all(|x| (x - 1.0).abs() < 1e-6));
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`extend`](Self::extend); [`Error::Shape`] if the columns do not divide into the
    /// heads.
    pub fn extend_rows(
        &mut self,
        q: ArrayView3<'_, T>,
        k: ArrayView3<'_, T>,
        v: ArrayView3<'_, T>,
        lengths: Option<&[usize]>,
        mut out: ArrayViewMut3<'_, T>,
    ) -> Result<(), Error> {
        let (query_heads, kv_heads) = (self.heads.query_heads(), self.heads.kv_heads);
        let (q, k, v) = (
            side_by_side("q", &q, query_heads)?,
            side_by_side("k", &k, kv_heads)?,
            side_by_side("v", &v, kv_heads)?,
        );
        let (batch, n, columns) = out.dim();
        check::size("out", "columns", query_heads * self.value_dim, columns)?;
        let shape = (batch, n, query_heads, self.value_dim);
        let order = [0, 2, 1, 3]; // heads before tokens
        let [q, k, v] = [q.view(), k.view(), v.view()].map(|x| x.permuted_axes(order));
        if let Ok(out) = out.view_mut().into_shape_with_order(shape) {
            return self.extend(q, k, v, lengths, out.permuted_axes(order));
        }
        let mut rows = Array4::zeros(shape);
        self.extend(q, k, v, lengths, rows.view_mut().permuted_axes(order))?;
        out.iter_mut().zip(rows).for_each(|(out, x)| *out = x); // both in the order of rows
        Ok(())
    }

    /// Tokens absorbed by each sequence.
    #[must_use]
    pub fn lengths(&self) -> Vec<usize> {
        self.streams.iter().step_by(self.heads.units.len()).map(|stream| stream.len()).collect()
    }

    /// The size of the state of all heads and sequences now, in numbers of type `T`.
    #[must_use]
    pub fn state_floats(&self) -> usize {
        self.streams.iter().map(|stream| stream.state_floats()).sum()
    }

    /// The stream that serves one query head of one sequence, to save or to look at. It may serve
    /// others as well: those of its group, or of its pool.
    #[must_use]
    pub fn head(&self, sequence: usize, query_head: usize) -> Option<&dyn Stream<T>> {
        self.streams.get(self.index(sequence, query_head)?).map(|stream| &**stream)
    }

    /// The same, to restore.
    #[must_use]
    pub fn head_mut(
        &mut self,
        sequence: usize,
        query_head: usize,
    ) -> Option<&mut Box<dyn Stream<T>>> {
        let index = self.index(sequence, query_head)?;
        self.streams.get_mut(index)
    }

    fn index(&self, sequence: usize, query_head: usize) -> Option<usize> {
        if query_head >= self.heads.query_heads() {
            return None;
        }
        sequence.checked_mul(self.heads.units.len())?.checked_add(self.heads.unit_of(query_head)?)
    }

    /// Forgets every token.
    pub fn reset(&mut self) {
        self.streams.iter_mut().for_each(|stream| stream.reset());
    }
}
