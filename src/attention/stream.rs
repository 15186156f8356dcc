//! The state of causal attention that a decoder keeps.

mod bytes;

use crate::attention::call::{Head, ONE_HEAD};
use crate::attention::fingerprint::Fingerprint;
use crate::attention::threads::Threads;
use crate::check;
use crate::error::Error;
use crate::scalar::Scalar;
use core::any::Any;
use core::fmt::Debug;
use ndarray::{ArrayView2, ArrayViewMut2};

/// The state of causal attention over the tokens seen so far.
///
/// Feeding a sequence in any pieces gives what [`Attention::forward`](crate::Attention::forward)
/// gives for the whole with [`Mask::Causal`](crate::Mask::Causal), up to rounding.
///
/// ```
/// use dijiang::{Attention, LinearAttention, Mask, Performer};
/// use ndarray::{Array2, s};
///
/// let kernel = LinearAttention::new(Performer::<f64>::new(8, 32, 0)?);
/// let x = Array2::from_shape_fn((6, 8), |(i, j)| ((i * 8 + j) as f64).sin());
/// let whole = kernel.forward(x.view(), x.view(), x.view(), Mask::Causal)?;
///
/// let mut stream = kernel.stream(8)?;
/// let mut out = Array2::zeros((6, 8));
/// for piece in [0..4, 4..5, 5..6] {
///     let x = x.slice(s![piece.clone(), ..]);
///     stream.extend(x, x, x, out.slice_mut(s![piece, ..]))?;
/// }
/// assert_eq!(stream.len(), 6);
/// assert!((out - whole).iter().all(|e| e.abs() < 1e-12));
/// # Ok::<(), dijiang::Error>(())
/// ```
///
/// # Implementing it
///
/// Four methods are required: [`extend_heads`](Self::extend_heads), [`len`](Self::len),
/// [`state_floats`](Self::state_floats) and [`reset`](Self::reset). The type must be [`Clone`];
/// where a kernel is a sum over memories, [`MemoryAttention`](crate::MemoryAttention) has a stream
/// already.
///
/// <style>pre.item-decl { max-height: 11em; overflow: auto; }</style>
pub trait Stream<T: Scalar>: CloneStream<T> + Debug + Send {
    /// Absorbs `n` tokens and writes their outputs, for every query head.
    ///
    /// `heads` are as many as the [options](StreamOptions) of the stream say: one, unless heads of
    /// keys and values share the state. `n = 1` is a decode step, a large `n` a prefill; `n = 0`
    /// does nothing.
    ///
    /// # Errors
    ///
    /// Those of [`Attention::forward_heads`](crate::Attention::forward_heads), and
    /// [`Error::Shape`] if there are other numbers of heads, query heads or value columns than the
    /// stream is for. On an error the state is what it was before the call; the content of the
    /// outputs is unspecified.
    fn extend_heads(&mut self, heads: &mut [Head<'_, T>]) -> Result<(), Error>;

    /// Tokens absorbed so far.
    fn len(&self) -> usize;

    /// The size of the state now, in numbers of type `T`. Constants of the kernel and working
    /// memory do not count.
    fn state_floats(&self) -> usize;

    /// The size of the state now, in bytes: less than [`state_floats`](Self::state_floats) numbers
    /// of type `T` take where they are kept in fewer bits ([`StateFormat`](crate::StateFormat)).
    fn state_bytes(&self) -> usize {
        self.state_floats().saturating_mul(size_of::<T>())
    }

    /// Forgets every token, and the checkpoint.
    fn reset(&mut self);

    /// Absorbs `n` tokens of one query head: `q [n, d]`, `k [n, d]`, `v [n, value_dim]`,
    /// `out [n, value_dim]`.
    ///
    /// # Errors
    ///
    /// As [`extend_heads`](Self::extend_heads).
    fn extend(
        &mut self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        self.extend_heads(&mut [Head::new(q, k, v, out)])
    }

    /// Whether no token has been absorbed.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Remembers the state as it is now, for [`rollback`](Self::rollback); returns whether this
    /// stream can. It takes the place of an earlier checkpoint. A fixed-size state is copied, a
    /// growing cache only measured; nothing is allocated after the first time. No other method
    /// changes the checkpoint but [`reset`](Self::reset) and [`restore`](Self::restore).
    ///
    /// ```
    /// use dijiang::{Attention, LinearAttention, Performer};
    /// use ndarray::Array2;
    ///
    /// let mut stream = LinearAttention::new(Performer::<f32>::new(8, 16, 0)?).stream(8)?;
    /// let (draft, mut out) = (Array2::ones((5, 8)), Array2::zeros((5, 8)));
    /// assert!(stream.checkpoint());
    /// stream.extend(draft.view(), draft.view(), draft.view(), out.view_mut())?;
    /// stream.rollback()?; // the draft was not accepted
    /// assert_eq!(stream.len(), 0);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    fn checkpoint(&mut self) -> bool {
        false
    }

    /// Goes back to the state of the last [`checkpoint`](Self::checkpoint), as often as wanted.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if there is none, or the stream was reset or restored since. The
    /// stream is then unchanged.
    fn rollback(&mut self) -> Result<(), Error> {
        let why = "its type does not implement `Stream::checkpoint`; keep a clone of it instead";
        Err(Error::Unsupported { what: "rolling this stream back", why })
    }

    /// Copies the state out, to store it or to send it elsewhere.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] for a stream that has not implemented it; every stream of this crate
    /// has, unless it holds a [`Memory`](crate::Memory) of your own, which alone knows its state.
    fn save(&self) -> Result<StreamState<T>, Error> {
        let why = "its type does not implement `Stream::save`";
        Err(Error::Unsupported { what: "saving this stream", why })
    }

    /// Replaces the state by a saved one; the stream then continues bit for bit as the saved one
    /// would have.
    ///
    /// ```
    /// use dijiang::{Attention, SoftmaxAttention};
    /// use ndarray::Array2;
    ///
    /// let kernel = SoftmaxAttention::<f32>::new(4)?;
    /// let x = Array2::from_elem((3, 4), 0.5);
    /// let mut out = Array2::zeros((3, 4));
    /// let mut first = kernel.stream(4)?;
    /// first.extend(x.view(), x.view(), x.view(), out.view_mut())?;
    ///
    /// let mut second = kernel.stream(4)?;
    /// second.restore(&first.save()?)?;
    /// assert_eq!(second.len(), 3);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::State`] if the state was saved by another kernel: another kind, another shape or
    /// other parameters ([`Fingerprint`]), [`Error::NotFinite`] if it holds NaN or infinity,
    /// [`Error::Unsupported`] as for [`save`](Self::save). The stream is then unchanged.
    fn restore(&mut self, state: &StreamState<T>) -> Result<(), Error> {
        let _ = state;
        let why = "its type does not implement `Stream::restore`";
        Err(Error::Unsupported { what: "restoring this stream", why })
    }

    /// For a layer of several streams, all of which must move or none: does what can be done ahead
    /// of [`extend_heads`](Self::extend_heads) without a change of the state, and says whether that
    /// call, which must be the next one and with the same arguments, is then sure to succeed.
    #[doc(hidden)]
    fn prepare_heads(&mut self, heads: &mut [Head<'_, T>]) -> bool {
        let _ = heads;
        false
    }
}

/// Copies of a boxed stream. Every stream that is [`Clone`] has it.
pub trait CloneStream<T: Scalar> {
    /// A copy of this stream with a state of its own, in which no checkpoint need be kept.
    /// `Box<dyn Stream<T>>` is [`Clone`] through it.
    fn clone_box(&self) -> Box<dyn Stream<T>>;

    /// Takes the state of another stream of the same kernel, by [`Clone::clone_from`]: streams of
    /// this crate keep their own checkpoint and allocate nothing.
    fn clone_from_box(&mut self, source: &dyn Stream<T>);

    /// This stream, to find out its type.
    fn as_any(&self) -> &dyn Any;
}

impl<T: Scalar, S: Stream<T> + Clone + 'static> CloneStream<T> for S {
    fn clone_box(&self) -> Box<dyn Stream<T>> {
        Box::new(self.clone())
    }

    fn clone_from_box(&mut self, source: &dyn Stream<T>) {
        if let Some(source) = source.as_any().downcast_ref() {
            self.clone_from(source);
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl<T: Scalar> Clone for Box<dyn Stream<T>> {
    fn clone(&self) -> Self {
        (**self).clone_box()
    }

    fn clone_from(&mut self, source: &Self) {
        if (**self).as_any().type_id() == (**source).as_any().type_id() {
            (**self).clone_from_box(&**source);
        } else {
            *self = source.clone();
        }
    }
}

/// What a stream is for: [`Attention::stream_with`](crate::Attention::stream_with).
///
/// ```
/// use dijiang::{Attention, Head, SoftmaxAttention, StreamOptions};
/// use ndarray::{Array2, Array3};
///
/// let kernel = SoftmaxAttention::<f32>::new(8)?;
/// let mut stream = kernel.stream_with(StreamOptions::new(4).group(3))?;
/// let (q, k) = (Array3::zeros((3, 1, 8)), Array2::zeros((1, 8))); // three query heads, one token
/// let (v, mut out) = (Array2::ones((1, 4)), Array3::zeros((3, 1, 4)));
/// stream.extend_heads(&mut [Head::group(q.view(), k.view(), v.view(), out.view_mut())])?;
/// assert_eq!((stream.state_floats(), out), (8 + 4, Array3::<f32>::ones((3, 1, 4))));
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StreamOptions {
    /// Columns of the values.
    pub value_dim: usize,
    /// Query heads of each head of keys and values, which share its state. 1 unless set.
    pub group: usize,
    /// Heads of keys and values that share one budget. 1 unless set.
    pub heads: usize,
    /// The threads that calls may use.
    pub threads: Threads,
}

impl StreamOptions {
    /// A stream of one query head, for values of `value_dim` columns.
    #[must_use]
    pub fn new(value_dim: usize) -> Self {
        Self { value_dim, group: 1, heads: 1, threads: Threads::default() }
    }

    /// Sets the query heads of each head of keys and values.
    #[must_use]
    pub fn group(self, group: usize) -> Self {
        Self { group, ..self }
    }

    /// Sets the heads of keys and values that share one budget.
    #[must_use]
    pub fn heads(self, heads: usize) -> Self {
        Self { heads, ..self }
    }

    /// Sets the threads that calls may use.
    #[must_use]
    pub fn threads(self, threads: Threads) -> Self {
        Self { threads, ..self }
    }

    /// Checks the sizes, for kernels whose state is of one head of keys and values.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if a number is 0, [`Error::Unsupported`] if there are several heads of
    /// keys and values.
    pub fn check_one_head(&self) -> Result<(), Error> {
        check::at_least_one("value_dim", self.value_dim)?;
        check::at_least_one("group", self.group)?;
        check::at_least_one("heads", self.heads)?;
        if self.heads == 1 { Ok(()) } else { Err(ONE_HEAD) }
    }
}

pub(crate) const NO_CHECKPOINT: Error = Error::Unsupported {
    what: "rolling this stream back",
    why: "it has no checkpoint; call `checkpoint` first",
};

/// The saved state of a [`Stream`]: plain numbers and what they belong to. With feature `serde` it
/// serialises.
///
/// It does not hold the kernel, only its [`Fingerprint`]: save the kernel beside it, and restore
/// the state into a stream of the same kernel. Another seed, map, scale or decay is refused.
/// Formats must keep floats exactly (with `serde_json`, its feature `float_roundtrip`).
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct StreamState<T> {
    kernel: String,
    /// Empty in states that were saved without one.
    #[cfg_attr(feature = "serde", serde(default))]
    fingerprint: Fingerprint,
    tokens: usize,
    shape: Vec<usize>,
    numbers: Vec<T>,
    /// What is kept in fewer bits.
    #[cfg_attr(feature = "serde", serde(default))]
    bytes: Vec<u8>,
}

impl<T: Scalar> StreamState<T> {
    /// A state of `tokens` absorbed tokens; `kernel` and `shape` are compared when it is restored.
    pub fn new(
        kernel: impl Into<String>,
        tokens: usize,
        shape: Vec<usize>,
        numbers: Vec<T>,
    ) -> Self {
        let (kernel, fingerprint, bytes) = (kernel.into(), Fingerprint::new(), Vec::new());
        Self { kernel, fingerprint, tokens, shape, numbers, bytes }
    }

    /// The same state with the parameters of its kernel.
    #[must_use]
    pub fn with_fingerprint(self, fingerprint: Fingerprint) -> Self {
        Self { fingerprint, ..self }
    }

    /// The parameters of the kernel it was saved by: to be [checked](Fingerprint::check) where it
    /// is restored.
    #[must_use]
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// The name of the kernel it was saved by.
    #[must_use]
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// The same state under another name, for kernels with one inside.
    #[must_use]
    pub fn with_kernel(self, kernel: impl Into<String>) -> Self {
        Self { kernel: kernel.into(), ..self }
    }

    /// How many numbers it holds.
    pub(crate) fn count(&self) -> usize {
        self.numbers.len()
    }

    /// Tokens absorbed when it was saved.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The numbers of the state, once `kernel`, `shape` and their count have been compared.
    ///
    /// # Errors
    ///
    /// [`Error::State`] if one differs, [`Error::NotFinite`] if a number is NaN or infinite.
    pub fn numbers(&self, kernel: &str, shape: &[usize], count: usize) -> Result<&[T], Error> {
        let differs =
            |which, expected: String, found: String| Err(Error::State { which, expected, found });
        if self.kernel != kernel {
            return differs("kernel", kernel.to_owned(), self.kernel.clone());
        }
        if self.shape != shape {
            return differs("shape", format!("{shape:?}"), format!("{:?}", self.shape));
        }
        if self.tokens > usize::MAX / 2 {
            return differs(
                "tokens",
                "a number that can be counted on".to_owned(),
                self.tokens.to_string(),
            );
        }
        if self.numbers.len() != count {
            return differs("size", count.to_string(), self.numbers.len().to_string());
        }
        match self.numbers.iter().position(|x| !x.is_finite()) {
            Some(column) => Err(Error::NotFinite { which: "state", row: 0, column }),
            None => Ok(&self.numbers),
        }
    }
}
