//! The stream of a layer: the state of every head and sequence, all of which move or none.

mod sequences;
pub(crate) mod state;

use crate::attention::call::Head;
use crate::attention::stream::Stream;
use crate::check;
use crate::error::Error;
use crate::mask::Mask;
use crate::multi_head::arguments::{Arguments, LayerForward};
use crate::multi_head::layout::{
    LayerShape, Padding, check_bias, check_heads, check_lengths, check_log_decay, side_by_side,
};
use crate::multi_head::places::Places;
use crate::multi_head::tasks::{LayerCall, are_shared_out, share_out};
use crate::multi_head::undo::{LayerCheckpoint, Undo};
use crate::scalar::Scalar;
use ndarray::{Array4, ArrayView3, ArrayView4, ArrayViewMut3, ArrayViewMut4};

/// The causal state of every head and sequence of a layer.
///
/// ```
/// use dijiang::{LinearAttention, MultiHead, Performer};
/// use ndarray::Array4;
///
/// let layer = MultiHead::new(LinearAttention::new(Performer::<f32>::new(16, 32, 0)?), 4, 2)?;
/// let mut stream = layer.stream(1, 8)?;
/// let (q, k) = (Array4::zeros((1, 4, 1, 16)), Array4::zeros((1, 2, 1, 16)));
/// let v = Array4::ones((1, 2, 1, 8));
/// let mut out = Array4::zeros((1, 4, 1, 8));
/// // one decode step of the whole layer
/// stream.extend(q.view(), k.view(), v.view(), None, out.view_mut())?;
/// assert!(out.iter().all(|x| (x - 1.0).abs() < 1e-6));
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug)]
pub struct MultiHeadStream<T: Scalar> {
    shape: LayerShape,
    /// Sequence after sequence, unit after unit.
    streams: Vec<Box<dyn Stream<T>>>,
    /// What the caller may go back to.
    checkpoint: LayerCheckpoint<T>,
    /// What a call that fails goes back to.
    undo: Undo<T>,
    /// Memory for the heads of a pool; always empty.
    pool: Vec<Head<'static, T>>,
}

impl<T: Scalar> Clone for MultiHeadStream<T> {
    fn clone(&self) -> Self {
        Self::new(self.shape.clone(), self.streams.clone())
    }
}

impl<T: Scalar> MultiHeadStream<T> {
    pub(crate) fn new(shape: LayerShape, streams: Vec<Box<dyn Stream<T>>>) -> Self {
        let (checkpoint, undo) = (LayerCheckpoint::new(), Undo::new());
        Self { shape, streams, checkpoint, undo, pool: Vec::new() }
    }

    /// Absorbs up to `n` tokens of every sequence: `q [b, query_heads, n, d]`,
    /// `k [b, kv_heads, n, d]`, `v [b, kv_heads, n, value_dim]`,
    /// `out [b, query_heads, n, value_dim]`.
    ///
    /// `lengths`, one for each sequence, says how many of the `n` tokens are real; the rest is
    /// padding, never read, with output zero: the last of them, unless the stream has another
    /// [`Padding`](crate::MultiHead::with_padding).
    ///
    /// # Errors
    ///
    /// As [`MultiHead::forward`](crate::MultiHead::forward). On an error no head of any sequence
    /// has moved.
    pub fn extend(
        &mut self,
        q: ArrayView4<'_, T>,
        k: ArrayView4<'_, T>,
        v: ArrayView4<'_, T>,
        lengths: Option<&[usize]>,
        out: ArrayViewMut4<'_, T>,
    ) -> Result<(), Error> {
        self.extend_with(LayerForward::new([q, k, v], out), lengths)
    }

    /// As [`extend`](Self::extend), of gated kernels:
    /// `log_decay [b, kv_heads, n, 1 or num_features]`; see
    /// [`Head::log_decay`](crate::Head::log_decay).
    ///
    /// # Errors
    ///
    /// As [`MultiHead::forward_gated`](crate::MultiHead::forward_gated). On an error no head of any
    /// sequence has moved.
    pub fn extend_gated(
        &mut self,
        q: ArrayView4<'_, T>,
        k: ArrayView4<'_, T>,
        v: ArrayView4<'_, T>,
        log_decay: ArrayView4<'_, T>,
        lengths: Option<&[usize]>,
        out: ArrayViewMut4<'_, T>,
    ) -> Result<(), Error> {
        self.extend_with(LayerForward::new([q, k, v], out).with_log_decay(log_decay), lengths)
    }

    /// As [`extend`](Self::extend) and, with log decays, [`extend_gated`](Self::extend_gated), with
    /// all that a step can be called with: tokens that a
    /// [key mask](LayerForward::with_key_mask) leaves out are not absorbed.
    ///
    /// ```
    /// use dijiang::{LayerForward, MultiHead, SoftmaxAttention};
    /// use ndarray::{Array4, array};
    ///
    /// let mut stream = MultiHead::new(SoftmaxAttention::<f32>::new(8)?, 1, 1)?.stream(2, 8)?;
    /// let real = array![[true, false, true], [false, true, false]];
    /// let (x, mut out) = (Array4::ones((2, 1, 3, 8)), Array4::zeros((2, 1, 3, 8)));
    /// let step = LayerForward::new([x.view(), x.view(), x.view()], out.view_mut());
    /// stream.extend_with(step.with_key_mask(real.view()), None)?;
    /// assert_eq!(stream.lengths(), [2, 1]);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`MultiHead::forward_with`](crate::MultiHead::forward_with); [`Error::Unsupported`] if
    /// there is a [record](LayerForward::with_record), or a kernel whose streams take no biases, or
    /// biases go with lengths, a key mask or sequences of several lengths. On an error no head of
    /// any sequence has moved.
    pub fn extend_with(
        &mut self,
        step: LayerForward<'_, T>,
        lengths: Option<&[usize]>,
    ) -> Result<(), Error> {
        let LayerForward { q, k, v, log_decay, key_mask, bias, mut out, record } = step;
        if record.is_some() {
            return Err(NO_RECORD);
        }
        let arguments = Arguments { qkv: [q, k, v], log_decay, bias };
        let padding = self.shape.padding;
        let Some(key_mask) = key_mask else {
            return self.extend_all(arguments, lengths, padding, None, out);
        };
        if bias.is_some() {
            return Err(MASK_AND_BIAS);
        }
        check_heads(
            self.shape.query_heads,
            self.shape.kv_heads,
            [q.dim(), k.dim(), v.dim(), out.dim()],
        )?;
        check::size("k", "rows", q.dim().2, k.dim().2)?;
        check_log_decay(k.dim(), log_decay.map(|x| x.dim()))?;
        let places = Places::new(key_mask, lengths, Mask::Causal, [q.dim(), k.dim()])?;
        let gathered = places.gather(&arguments);
        let (batch, heads, ..) = out.dim();
        let mut packed = Array4::zeros((batch, heads, places.queries(), v.dim().3));
        let (lengths, view) = (Some(&*places.lengths), packed.view_mut());
        self.extend_all(gathered.view(), lengths, Padding::Right, Some(&places), view)?;
        out.fill(T::zero());
        places.add_queries(packed.view(), out);
        Ok(())
    }

    fn extend_all(
        &mut self,
        Arguments { qkv: [q, k, v], log_decay, bias }: Arguments<'_, T>,
        lengths: Option<&[usize]>,
        padding: Padding,
        places: Option<&Places>,
        out: ArrayViewMut4<'_, T>,
    ) -> Result<(), Error> {
        let LayerShape { query_heads, kv_heads, value_dim, units, .. } = &self.shape;
        check_heads(*query_heads, *kv_heads, [q.dim(), k.dim(), v.dim(), out.dim()])?;
        check_log_decay(k.dim(), log_decay.map(|x| x.dim()))?;
        check::size("q", "sequences", self.streams.len() / units.len(), q.dim().0)?;
        check::size("k", "rows", q.dim().2, k.dim().2)?;
        check::size("v", "columns", *value_dim, v.dim().3)?;
        check_lengths(lengths, q.dim().0, q.dim().2)?;
        let before = if bias.is_some() { self.common_length(lengths)? } else { 0 };
        check_bias(bias.map(|x| x.dim()), q.dim(), before + k.dim().2)?;
        let (group, mask) = (self.shape.group(), Mask::Causal);
        let call =
            LayerCall { q, k, v, log_decay, bias, group, lengths, padding, mask, before, places };
        // what is there, and half of what comes
        let states: usize = self.streams.iter().map(|stream| stream.state_floats()).sum();
        let tokens = k.dim().2.saturating_mul((k.dim().3 + v.dim().3) * self.streams.len());
        let reads = states.saturating_add(tokens / 2).saturating_mul(q.dim().2);
        if are_shared_out(self.streams.len(), reads) {
            self.extend_on_threads(&call, out)
        } else {
            self.extend_in_order(&call, out)
        }
    }

    /// The tokens that every sequence has, for biases.
    fn common_length(&self, lengths: Option<&[usize]>) -> Result<usize, Error> {
        let found = self.lengths();
        let first = found.first().copied().unwrap_or(0);
        if lengths.is_some() || found.iter().any(|&length| length != first) {
            return Err(SEVERAL_LENGTHS);
        }
        Ok(first)
    }

    /// One stream after the other, without an allocation.
    fn extend_in_order(
        &mut self,
        call: &LayerCall<'_, T>,
        mut out: ArrayViewMut4<'_, T>,
    ) -> Result<(), Error> {
        let Self { shape, streams, undo, pool, .. } = self;
        let units = || call.sequence_units(&shape.units);
        // a head that fails must not leave the others ahead of it; alone it goes back by itself
        let is_safe = streams.len() == 1
            || streams.iter_mut().zip(units()).all(|(stream, (sequence, unit))| {
                call.with_unit(sequence, unit, &mut out, pool, |heads| stream.prepare_heads(heads))
            });
        if !is_safe {
            undo.set(streams);
        }
        let result = streams.iter_mut().zip(units()).try_for_each(|(stream, (sequence, unit))| {
            call.with_unit(sequence, unit, &mut out, pool, |heads| stream.extend_heads(heads))
                .map_err(|error| call.error(sequence, unit, error))
        });
        if result.is_err() && !is_safe {
            undo.return_to(streams);
        }
        result
    }

    /// The streams shared out over threads.
    fn extend_on_threads(
        &mut self,
        call: &LayerCall<'_, T>,
        out: ArrayViewMut4<'_, T>,
    ) -> Result<(), Error> {
        let Self { shape, streams, undo, .. } = self;
        let mut heads = call.tasks(&shape.units, out);
        let all = heads.iter_mut().zip(&mut *streams).collect();
        let prepared =
            share_out(
                all,
                |(heads, stream)| {
                    if stream.prepare_heads(heads) { Ok(()) } else { Err(NOT_SURE) }
                },
            );
        if prepared.is_err() {
            undo.set(streams);
        }
        let all = heads.iter_mut().zip(&mut *streams).zip(call.sequence_units(&shape.units));
        let result = share_out(all.collect(), |((heads, stream), (sequence, unit))| {
            stream.extend_heads(heads).map_err(|error| call.error(sequence, unit, error))
        });
        if result.is_err() && prepared.is_err() {
            undo.return_to(streams);
        }
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
    /// let (q, k) = (Array3::zeros((1, 20, heads * d)), Array3::zeros((1, 20, kv_heads * d)));
    /// let v = Array3::ones((1, 20, kv_heads * d));
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
        let (query_heads, kv_heads) = (self.shape.query_heads, self.shape.kv_heads);
        let (q, k, v) = (
            side_by_side("q", &q, query_heads)?,
            side_by_side("k", &k, kv_heads)?,
            side_by_side("v", &v, kv_heads)?,
        );
        let (batch, n, columns) = out.dim();
        check::size("out", "columns", query_heads * self.shape.value_dim, columns)?;
        let shape = (batch, n, query_heads, self.shape.value_dim);
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

    /// Sets on which side the padding of the next calls with lengths lies: that of the
    /// [layer](crate::MultiHead::with_padding) unless set.
    ///
    /// ```
    /// use dijiang::{MultiHead, Padding, SoftmaxAttention};
    /// use ndarray::Array4;
    ///
    /// let mut stream = MultiHead::new(SoftmaxAttention::<f32>::new(8)?, 1, 1)?.stream(1, 8)?;
    /// let mut x = Array4::ones((1, 1, 2, 8));
    /// x[[0, 0, 0, 0]] = f32::NAN; // padding
    /// stream.set_padding(Padding::Left);
    /// let mut out = Array4::zeros(x.dim());
    /// stream.extend(x.view(), x.view(), x.view(), Some(&[1]), out.view_mut())?;
    /// assert_eq!((out[[0, 0, 0, 0]], out[[0, 0, 1, 0]]), (0.0, 1.0));
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    pub fn set_padding(&mut self, padding: Padding) {
        self.shape.padding = padding;
    }

    /// Tokens absorbed by each sequence.
    #[must_use]
    pub fn lengths(&self) -> Vec<usize> {
        self.streams.iter().step_by(self.shape.units.len()).map(|stream| stream.len()).collect()
    }

    /// The size of the state of all heads and sequences now, in numbers of type `T`.
    #[must_use]
    pub fn state_floats(&self) -> usize {
        self.streams.iter().map(|stream| stream.state_floats()).sum()
    }

    /// The same in bytes; see [`Stream::state_bytes`].
    #[must_use]
    pub fn state_bytes(&self) -> usize {
        self.streams.iter().map(|stream| stream.state_bytes()).sum()
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
        self.checkpoint.is_whole = false; // the caller may change one without the others
        self.streams.get_mut(index)
    }

    fn index(&self, sequence: usize, query_head: usize) -> Option<usize> {
        if query_head >= self.shape.query_heads {
            return None;
        }
        let group = self.shape.group();
        let unit = self.shape.units.iter().position(|unit| unit.serves(query_head, group))?;
        sequence.checked_mul(self.shape.units.len())?.checked_add(unit)
    }
}

/// Says that a stream is not sure to succeed; never shown.
const NOT_SURE: Error = Error::Unsupported { what: "a step that may fail", why: "see `Undo`" };

const NO_RECORD: Error = Error::Unsupported {
    what: "a record of a step",
    why: "a stream has no backward pass; use `MultiHead::forward_with`",
};

const MASK_AND_BIAS: Error = Error::Unsupported {
    what: "a mask of keys beside biases, in a stream",
    why: "biases of a stream belong to all tokens that were ever handed over",
};

const SEVERAL_LENGTHS: Error = Error::Unsupported {
    what: "biases of sequences of several lengths, in a stream",
    why: "biases have one column for each token before; use a stream for each sequence",
};
