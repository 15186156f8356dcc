//! Many heads at once: `[batch, heads, n, d]` views, grouped-query heads, padded keys, threads.

use super::{Attention, Mask, Scratch, Stream};
use crate::views::head;
use crate::{Error, Scalar, check};
use ndarray::{Array4, ArrayView4, ArrayViewMut2, ArrayViewMut4, Axis};
use std::sync::Arc;

/// Attention of a layer: one kernel for all query heads, or one for each.
///
/// Arrays are `[batch, heads, tokens, columns]` views of any strides (permute the axes of another layout; nothing is
/// copied). With grouped-query heads (Ainslie et al., arXiv 2305.13245) `k` and `v` have fewer heads: query head `h`
/// uses kv head `h / (query_heads / kv_heads)`.
///
/// With feature `rayon`, batch × heads are shared out over the threads of the current pool; the result is the same, bit
/// for bit.
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
}

impl<T: Scalar> MultiHead<T> {
    /// The same kernel in `query_heads` heads, which share `kv_heads` heads of keys and values.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if a number of heads is 0, [`Error::InvalidOption`] if `query_heads` is not a multiple of
    /// `kv_heads`.
    pub fn new(kernel: impl Attention<T> + 'static, query_heads: usize, kv_heads: usize) -> Result<Self, Error> {
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
        Ok(Self { kernels, kv_heads })
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

    fn kv_head(&self, query_head: usize) -> usize {
        query_head / (self.kernels.len() / self.kv_heads)
    }

    /// Attends in every head: `q [b, query_heads, n_q, d]`, `k [b, kv_heads, n_k, d]`, `v [b, kv_heads, n_k, d_v]` give
    /// `[b, query_heads, n_q, d_v]`.
    ///
    /// `key_lengths`, one for each sequence of the batch, says how many keys are real; the rest is padding and never
    /// read. With [`Mask::Causal`] queries beyond the length are padding too: their output is zero. A length of 0 is thus
    /// all padding with [`Mask::Causal`], and an error with [`Mask::Full`], where queries would have nothing to see.
    ///
    /// # Errors
    ///
    /// Those of [`Attention::forward_into`] for any head, [`Error::Shape`] if the numbers of heads, sequences or lengths
    /// do not fit, [`Error::InvalidOption`] if a length is larger than the number of keys.
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
        check_heads(self, q.dim(), k.dim(), v.dim(), out.dim())?;
        check_lengths(key_lengths, q.dim().0, k.dim().2)?;
        if mask == Mask::Causal {
            check::size("k", "rows", q.dim().2, k.dim().2)?;
        }
        for_each(outputs(out), Scratch::new, Scratch::of_one_thread, |scratch, (b, h, out): Head<'_, T>| {
            let keys = key_lengths.map_or(k.dim().2, |lengths| lengths[b]);
            let queries = if mask == Mask::Causal { keys } else { q.dim().2 };
            let kv = self.kv_head(h);
            let (q, k, v) = (head(&q, b, h, queries), head(&k, b, kv, keys), head(&v, b, kv, keys));
            self.kernels[h].forward_with(q, k, v, mask, split_padding(out, queries), scratch)
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
        let mut streams = (0..batch)
            .flat_map(|_| &self.kernels)
            .map(|kernel| kernel.stream(value_dim))
            .collect::<Result<Vec<_>, _>>()?;
        if enough_for_threads(streams.len()) {
            for stream in &mut streams {
                stream.stay_on_one_thread();
            }
        }
        Ok(MultiHeadStream { heads: self.clone(), value_dim, streams, copies: Vec::new() })
    }
}

type Dim4 = (usize, usize, usize, usize);

fn check_heads<T: Scalar>(heads: &MultiHead<T>, q: Dim4, k: Dim4, v: Dim4, out: Dim4) -> Result<(), Error> {
    check::size("q", "heads", heads.query_heads(), q.1)?;
    check::size("k", "heads", heads.kv_heads, k.1)?;
    check::size("v", "heads", heads.kv_heads, v.1)?;
    check::size("k", "sequences", q.0, k.0)?;
    check::size("v", "sequences", q.0, v.0)?;
    check::size("v", "rows", k.2, v.2)?;
    for (axis, expected, found) in
        [("sequences", q.0, out.0), ("heads", q.1, out.1), ("rows", q.2, out.2), ("columns", v.3, out.3)]
    {
        check::size("out", axis, expected, found)?;
    }
    Ok(())
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

/// A sequence, a head, and the head's output.
type Head<'a, T> = (usize, usize, ArrayViewMut2<'a, T>);

/// The output of every head.
fn outputs<T>(mut out: ArrayViewMut4<'_, T>) -> Vec<Head<'_, T>> {
    let (batch, heads, ..) = out.dim();
    let mut all = Vec::with_capacity(batch * heads);
    for b in 0..batch {
        let (sequence, rest) = out.split_at(Axis(0), 1);
        let mut sequence = sequence.index_axis_move(Axis(0), 0);
        for h in 0..heads {
            let (head, rest) = sequence.split_at(Axis(0), 1);
            all.push((b, h, head.index_axis_move(Axis(0), 0)));
            sequence = rest;
        }
        out = rest;
    }
    all
}

/// The rows of real tokens; the others are set to zero.
fn split_padding<T: Scalar>(out: ArrayViewMut2<'_, T>, tokens: usize) -> ArrayViewMut2<'_, T> {
    let (real, mut padding) = out.split_at(Axis(0), tokens);
    padding.fill(T::zero());
    real
}

/// Whether there are tasks enough for every thread, so that none need be shared out itself.
fn enough_for_threads(tasks: usize) -> bool {
    #[cfg(feature = "rayon")]
    return tasks >= rayon::current_num_threads();
    #[cfg(not(feature = "rayon"))]
    return tasks > 0;
}

/// Runs every task in working memory, made by `alone` if tasks may use more threads themselves and by `among` if not; the error of
/// the first that failed, in order.
#[cfg(feature = "rayon")]
fn for_each<I: Send, W: Send>(
    tasks: Vec<I>,
    alone: impl Fn() -> W + Send + Sync,
    among: impl Fn() -> W + Send + Sync,
    run: impl Fn(&mut W, I) -> Result<(), Error> + Send + Sync,
) -> Result<(), Error> {
    use rayon::prelude::*;
    if tasks.len() == 1 {
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
    /// Sequence after sequence, head after head.
    streams: Vec<Box<dyn Stream<T>>>,
    /// Copies of those that cannot be rolled back, while they are extended.
    copies: Vec<Option<Box<dyn Stream<T>>>>,
}

impl<T: Scalar> MultiHeadStream<T> {
    /// Absorbs up to `n` tokens of every sequence: `q [b, query_heads, n, d]`, `k [b, kv_heads, n, d]`,
    /// `v [b, kv_heads, n, value_dim]`, `out [b, query_heads, n, value_dim]`.
    ///
    /// `lengths`, one for each sequence, says how many of the `n` tokens are real; the rest is padding, never read, with
    /// output zero.
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
        let heads = &self.heads;
        check_heads(heads, q.dim(), k.dim(), v.dim(), out.dim())?;
        check::size("q", "sequences", self.streams.len() / heads.query_heads(), q.dim().0)?;
        check::size("k", "rows", q.dim().2, k.dim().2)?;
        check::size("v", "columns", self.value_dim, v.dim().3)?;
        check_lengths(lengths, q.dim().0, q.dim().2)?;
        // A head that fails must not leave the others ahead of it.
        self.copies.clear();
        self.copies.extend(self.streams.iter_mut().map(|stream| (!stream.checkpoint()).then(|| stream.clone())));
        let tasks = outputs(out).into_iter().zip(&mut self.streams).collect();
        let result = for_each(
            tasks,
            || (),
            || (),
            |(), ((b, h, out), stream): (Head<'_, T>, &mut Box<dyn Stream<T>>)| {
                let tokens = lengths.map_or(q.dim().2, |lengths| lengths[b]);
                let kv = heads.kv_head(h);
                let (q, k, v) = (head(&q, b, h, tokens), head(&k, b, kv, tokens), head(&v, b, kv, tokens));
                stream.extend(q, k, v, split_padding(out, tokens))
            },
        );
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

    /// Tokens absorbed by each sequence.
    #[must_use]
    pub fn lengths(&self) -> Vec<usize> {
        self.streams.iter().step_by(self.heads.query_heads()).map(|stream| stream.len()).collect()
    }

    /// The size of the state of all heads and sequences now, in numbers of type `T`.
    #[must_use]
    pub fn state_floats(&self) -> usize {
        self.streams.iter().map(|stream| stream.state_floats()).sum()
    }

    /// The stream of one head of one sequence, to save or to look at.
    #[must_use]
    pub fn head(&self, sequence: usize, query_head: usize) -> Option<&dyn Stream<T>> {
        let index = sequence.checked_mul(self.heads.query_heads())?.checked_add(query_head)?;
        if query_head < self.heads.query_heads() { self.streams.get(index).map(|stream| &**stream) } else { None }
    }

    /// The same, to restore.
    #[must_use]
    pub fn head_mut(&mut self, sequence: usize, query_head: usize) -> Option<&mut Box<dyn Stream<T>>> {
        let index = sequence.checked_mul(self.heads.query_heads())?.checked_add(query_head)?;
        if query_head < self.heads.query_heads() { self.streams.get_mut(index) } else { None }
    }

    /// Forgets every token.
    pub fn reset(&mut self) {
        self.streams.iter_mut().for_each(|stream| stream.reset());
    }
}
