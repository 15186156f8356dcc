//! Any memory as a kernel: a whole sequence and a stream for the three methods of a memory.

use crate::attention::Attention;
use crate::attention::call::{Head, one_head};
use crate::attention::scratch::Scratch;
use crate::attention::stream::{NO_CHECKPOINT, Stream, StreamOptions};
use crate::check;
use crate::error::Error;
use crate::mask::Mask;
use crate::memory::Memory;
use crate::memory::partial::Partial;
use crate::scalar::Scalar;
use crate::views;
use core::fmt;
use ndarray::{Array2, ArrayView2, Axis};
use std::sync::Arc;

/// The kernel of a [`Memory`]: each token is absorbed, then its query is answered by what the
/// memory holds, and the answer is normalised.
///
/// ```text
/// o_t = numerator_t / denominator_t    of the memory's answer to q_t after tokens 0..=t
/// ```
///
/// With [`Mask::Full`] all tokens are absorbed first, with [`Mask::CausalTail`] those before the
/// first query. A memory answers in absolute terms and knows
/// its own scale.
///
/// This is how to write a kernel of one's own: three methods of a memory, and the kernel has a
/// forward pass, a stream with checkpoints, groups of query heads, and a place in a
/// [`MultiHead`](crate::MultiHead). Here is softmax attention with linear biases (ALiBi, Press et
/// al., arXiv 2108.12409, section 3): `w(q_t, k_j) = exp(q_t·k_j/√d − slope·(t − j))`.
///
/// ```
/// use dijiang::{Attention, Error, Mask, Memory, MemoryAttention, Partial, SoftmaxAttention};
/// use ndarray::{Array1, Array2, ArrayView2};
///
/// #[derive(Clone, Debug, Default)]
/// struct Alibi {
///     slope: f64,
///     tokens: Vec<(Array1<f64>, Array1<f64>)>,
/// }
///
/// impl Memory<f64> for Alibi {
///     fn absorb(&mut self, k: ArrayView2<f64>, v: ArrayView2<f64>) -> Result<(), Error> {
///         let tokens = k.outer_iter().zip(v.outer_iter());
///         self.tokens.extend(tokens.map(|(k, v)| (k.to_owned(), v.to_owned())));
///         Ok(())
///     }
///
///     fn read(&self, q: ArrayView2<f64>, answer: &mut Partial<f64>) -> Result<(), Error> {
///         let (scale, last) = ((q.ncols() as f64).sqrt().recip(), self.tokens.len());
///         for (j, (k, v)) in self.tokens.iter().enumerate() {
///             let log_weights = q.dot(k) * scale - self.slope * (last - 1 - j) as f64;
///             let values = v.broadcast((q.nrows(), v.len())).expect("one for each query");
///             // each token is a partial sum of its own: weight 1 at the log scale of its score
///             let ones = Array1::ones(q.nrows());
///             answer.merge(&Partial::from_parts(values.to_owned(), ones, log_weights)?)?;
///         }
///         Ok(())
///     }
///
///     fn state_floats(&self) -> usize {
///         self.tokens.iter().map(|(k, v)| k.len() + v.len()).sum()
///     }
/// }
///
/// let x = Array2::from_shape_fn((20, 4), |(i, j)| ((i * 4 + j) as f64).sin());
/// let alibi = |slope| MemoryAttention::new(4, move |_| Ok(Alibi { slope, tokens: vec![] }));
/// // without a slope it is softmax attention ..
/// let plain = alibi(0.0)?.forward(x.view(), x.view(), x.view(), Mask::Causal)?;
/// let exact = SoftmaxAttention::new(4)?.forward(x.view(), x.view(), x.view(), Mask::Causal)?;
/// assert!((plain - exact).iter().all(|e| e.abs() < 1e-14));
/// // .. and with a steep one a token sees little but itself
/// let near = alibi(50.0)?.forward(x.view(), x.view(), x.view(), Mask::Causal)?;
/// assert!((near - x).iter().all(|e| e.abs() < 1e-14));
/// # Ok::<(), Error>(())
/// ```
///
/// A call that can fail is made on a copy of the memory, so that a stream stays as it was: for each
/// call of a stream the memory is cloned once.
#[derive(Clone)]
pub struct MemoryAttention<T: Scalar> {
    head_dim: usize,
    make: Arc<MakeMemory<T>>,
}

/// An empty memory for values of so many columns.
type MakeMemory<T> = dyn Fn(usize) -> Result<Box<dyn Memory<T>>, Error> + Send + Sync;

impl<T: Scalar> fmt::Debug for MemoryAttention<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryAttention").field("head_dim", &self.head_dim).finish_non_exhaustive()
    }
}

impl<T: Scalar> MemoryAttention<T> {
    /// The kernel over queries and keys of `head_dim` columns whose empty memory, for values of as
    /// many columns as it is given, is made by `make_memory`.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `head_dim` is 0.
    pub fn new<M: Memory<T> + 'static>(
        head_dim: usize,
        make_memory: impl Fn(usize) -> Result<M, Error> + Send + Sync + 'static,
    ) -> Result<Self, Error> {
        check::at_least_one("head_dim", head_dim)?;
        let make = move |value_dim| Ok(Box::new(make_memory(value_dim)?) as Box<dyn Memory<T>>);
        Ok(Self { head_dim, make: Arc::new(make) })
    }
}

/// Answers queries `[rows, d]` and tells the memory what all weights came to.
fn answer<T: Scalar>(
    memory: &mut dyn Memory<T>,
    q: ArrayView2<'_, T>,
    first_row: usize,
    learn: bool,
    answer: &mut Partial<T>,
) -> Result<Array2<T>, Error> {
    answer.reset();
    memory.read(q, answer).map_err(|error| error.in_chunk(first_row))?;
    let mut out = Array2::zeros(answer.numerator().dim());
    answer.normalize_into(out.view_mut()).map_err(|error| error.in_chunk(first_row))?;
    if learn {
        memory.received(q, answer.log_normalizer().view());
    }
    Ok(out)
}

/// Absorbs and answers token after token, the query heads of a group together.
fn extend<T: Scalar>(memory: &mut dyn Memory<T>, head: &mut Head<'_, T>) -> Result<(), Error> {
    let Head { q, k, v, out, .. } = head;
    let group = q.len_of(Axis(0));
    let mut partial = Partial::new(group, v.ncols())?;
    for t in 0..k.nrows() {
        let token = t..t + 1;
        memory
            .absorb(views::rows(*k, token.clone()), views::rows(*v, token))
            .map_err(|error| error.in_chunk(t))?;
        // rows are the query heads, which all stand at token t
        let queries = q.index_axis(Axis(1), t);
        let rows =
            answer(memory, queries, 0, true, &mut partial).map_err(|error| at_row(error, t))?;
        out.index_axis_mut(Axis(1), t).assign(&rows);
    }
    Ok(())
}

/// The same error, of token `t`.
fn at_row(mut error: Error, t: usize) -> Error {
    if let Error::NotFinite { row, .. } | Error::Overflow { row, .. } | Error::Normalizer { row } =
        &mut error
    {
        *row = t;
    }
    error
}

impl<T: Scalar> Attention<T> for MemoryAttention<T> {
    fn forward_heads(
        &self,
        heads: &mut [Head<'_, T>],
        mask: Mask,
        _scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        heads.iter_mut().try_for_each(|head| {
            head.check_not_gated()?;
            head.check_no_log_normalizer()?;
            head.check_forward(self.head_dim, mask)?;
            head.check_finite()?;
            let mut memory = (self.make)(head.v.ncols())?;
            if let Some(first) = mask.first([head.queries(), head.keys()]) {
                if first > 0 {
                    let [k, v] = [head.k, head.v].map(|x| views::rows(x, 0..first));
                    memory.absorb(k, v)?;
                }
                let [k, v] = [head.k, head.v].map(|x| views::rows(x, first..x.nrows()));
                return extend(&mut *memory, &mut Head { k, v, ..head.reborrow() });
            }
            memory.absorb(head.k, head.v)?;
            let mut partial = Partial::new(head.queries(), head.v.ncols())?;
            for (q, mut out) in head.q.outer_iter().zip(head.out.outer_iter_mut()) {
                out.assign(&answer(&mut *memory, q, 0, false, &mut partial)?);
            }
            Ok(())
        })
    }

    fn stream(&self, value_dim: usize) -> Result<Box<dyn Stream<T>>, Error> {
        self.stream_with(StreamOptions::new(value_dim))
    }

    fn stream_with(&self, options: StreamOptions) -> Result<Box<dyn Stream<T>>, Error> {
        options.check_one_head()?;
        let empty = (self.make)(options.value_dim)?;
        let memory = empty.clone();
        let head_dim = self.head_dim;
        Ok(Box::new(MemoryStream { head_dim, options, empty, memory, tokens: 0, checkpoint: None }))
    }

    fn state_floats(&self, value_dim: usize, tokens: usize) -> Result<usize, Error> {
        Ok(self.memory_after(value_dim, tokens)?.state_floats())
    }

    fn state_bytes(&self, value_dim: usize, tokens: usize) -> Result<usize, Error> {
        Ok(self.memory_after(value_dim, tokens)?.state_bytes())
    }
}

impl<T: Scalar> MemoryAttention<T> {
    /// Only the memory knows how it grows: it is shown as many tokens of zeros.
    fn memory_after(&self, value_dim: usize, tokens: usize) -> Result<Box<dyn Memory<T>>, Error> {
        check::array("tokens", tokens, self.head_dim.max(value_dim))?;
        let mut memory = (self.make)(value_dim)?;
        memory.absorb(
            Array2::zeros((tokens, self.head_dim)).view(),
            Array2::zeros((tokens, value_dim)).view(),
        )?;
        Ok(memory)
    }
}

/// A memory that grows, or learns, with every token.
#[derive(Clone, Debug)]
struct MemoryStream<T: Scalar> {
    head_dim: usize,
    options: StreamOptions,
    empty: Box<dyn Memory<T>>,
    memory: Box<dyn Memory<T>>,
    tokens: usize,
    checkpoint: Option<(Box<dyn Memory<T>>, usize)>,
}

impl<T: Scalar> Stream<T> for MemoryStream<T> {
    fn extend_heads(&mut self, heads: &mut [Head<'_, T>]) -> Result<(), Error> {
        let head = one_head(heads)?;
        let StreamOptions { value_dim, group, .. } = self.options;
        head.check_not_gated()?;
        head.check_no_log_normalizer()?;
        head.check_extend(self.head_dim, value_dim, group)?;
        head.check_finite()?;
        let mut memory = self.memory.clone();
        extend(&mut *memory, head)?;
        self.memory = memory;
        self.tokens += head.keys();
        Ok(())
    }

    fn len(&self) -> usize {
        self.tokens
    }

    fn state_floats(&self) -> usize {
        self.memory.state_floats()
    }

    fn state_bytes(&self) -> usize {
        self.memory.state_bytes()
    }

    fn reset(&mut self) {
        (self.memory, self.tokens, self.checkpoint) = (self.empty.clone(), 0, None);
    }

    fn checkpoint(&mut self) -> bool {
        self.checkpoint = Some((self.memory.clone(), self.tokens));
        true
    }

    fn rollback(&mut self) -> Result<(), Error> {
        (self.memory, self.tokens) = self.checkpoint.clone().ok_or(NO_CHECKPOINT)?;
        Ok(())
    }
}
