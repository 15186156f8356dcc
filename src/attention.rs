//! The traits: [`Attention`], what a model holds, and [`Stream`], what a decoder keeps.

pub(crate) mod cosformer;
pub(crate) mod heads;
pub(crate) mod hybrid;
pub(crate) mod linear;
pub(crate) mod linformer;
pub mod naive;
pub(crate) mod positional;
pub(crate) mod retention;
pub(crate) mod rotary;
pub(crate) mod softmax;
pub(crate) mod with_log_decay;

use crate::memory::{LogDecay, State, Tile, Workspace};
use crate::{Error, Scalar, check};
use core::fmt::Debug;
use ndarray::{Array2, ArrayView2, ArrayView3, ArrayViewMut2, ArrayViewMut3, Axis};

/// Which keys a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Mask {
    /// Every query sees every key (encoders, cross attention).
    Full,
    /// Query `t` sees keys `0..=t` (decoders); needs as many queries as keys.
    Causal,
}

/// An attention kernel: every kernel of the crate implements it, and a model holds it as
/// `Box<dyn Attention<T>>`.
///
/// The output is a weighted mean of the values,
///
/// ```text
/// o_t = Σ_j w(q_t, k_j) v_j / Σ_j w(q_t, k_j),
/// ```
///
/// and the kernels differ in the weight `w`. Softmax attention has `w(q, k) = exp(scale·q·k)`.
///
/// `Arc<A>` and `Box<A>` are kernels where `A` is one.
///
/// # Shapes
///
/// Tokens are rows: `q [n_q, d]`, `k [n_k, d]`, `v [n_k, d_v]`, `out [n_q, d_v]`. Views may have
/// any strides.
///
/// # Example
///
/// ```
/// use dijiang::{Attention, LinearAttention, Mask, Performer, SoftmaxAttention};
/// use ndarray::Array2;
///
/// let kernels: Vec<Box<dyn Attention<f32>>> = vec![
///     Box::new(SoftmaxAttention::new(8)?),
///     Box::new(LinearAttention::new(Performer::new(8, 32, 0)?)),
/// ];
/// let x = Array2::from_shape_fn((5, 8), |(i, j)| ((i * 8 + j) as f32).sin());
/// for kernel in &kernels {
///     let out = kernel.forward(x.view(), x.view(), x.view(), Mask::Causal)?;
///     assert_eq!(out.dim(), (5, 8));
///     // the first token sees only itself
///     assert!((&out.row(0) - &x.row(0)).iter().all(|e| e.abs() < 1e-6));
/// }
/// # Ok::<(), dijiang::Error>(())
/// ```
pub trait Attention<T: Scalar>: Debug + Send + Sync {
    /// Attends to `k` and `v` with every row of `q`, and allocates the output `[n_q, d_v]`.
    ///
    /// # Errors
    ///
    /// Those of [`forward_into`](Self::forward_into).
    fn forward(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mask: Mask,
    ) -> Result<Array2<T>, Error> {
        let mut out = Array2::zeros((q.nrows(), v.ncols()));
        self.forward_into(q, k, v, mask, out.view_mut())?;
        Ok(out)
    }

    /// Attends to `k` and `v` with every row of `q`, and writes the output over whatever `out`
    /// held.
    ///
    /// # Errors
    ///
    /// - [`Error::Shape`]: the shapes do not fit together, or `mask` is [`Mask::Causal`] and
    ///   `n_q ≠ n_k`;
    /// - [`Error::ZeroSize`]: there are queries but no keys, or `v` has no columns;
    /// - [`Error::NotFinite`]: NaN or infinity in `q`, `k` or `v`;
    /// - [`Error::Overflow`], [`Error::Normalizer`]: finite input led out of the range of `T`;
    /// - [`Error::InvalidOption`]: an option of the kernel cannot be used, such as a scale that is
    ///   not positive.
    ///
    /// After an error the content of `out` is unspecified.
    fn forward_into(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mask: Mask,
        out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error>;

    /// As [`forward_into`](Self::forward_into), in working memory of the caller: a kernel of this
    /// crate allocates nothing once the memory has met arguments of these sizes. Any kernel may use
    /// the memory of any other.
    ///
    /// ```
    /// use dijiang::{Attention, LinearAttention, Mask, Performer, Scratch};
    /// use ndarray::Array2;
    ///
    /// let kernel = LinearAttention::new(Performer::<f32>::new(8, 16, 0)?);
    /// let mut scratch = Scratch::new();
    /// let mut out = Array2::zeros((100, 8));
    /// for layer in 0..3 {
    ///     let x = Array2::from_elem((100, 8), layer as f32);
    ///     kernel.forward_with(
    ///         x.view(),
    ///         x.view(),
    ///         x.view(),
    ///         Mask::Causal,
    ///         out.view_mut(),
    ///         &mut scratch,
    ///     )?;
    ///     assert!(out.iter().all(|y| (y - layer as f32).abs() < 1e-5));
    /// }
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`forward_into`](Self::forward_into).
    fn forward_with(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mask: Mask,
        out: ArrayViewMut2<'_, T>,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        let _ = scratch;
        self.forward_into(q, k, v, mask, out)
    }

    /// As [`forward_with`](Self::forward_with) with [`Mask::Causal`], of a kernel whose tokens
    /// bring their decay: `log_decay [n, 1]`, or one for each feature, `[n, num_features]`. Row `t`
    /// is the logarithm of what token `t` leaves of all that came before it: 0 keeps it, −∞ forgets
    /// it.
    ///
    /// A decay of this kind is data, computed from the token as its key and value are, so it is an
    /// argument of the call and not an option of the kernel. It is a method of its own beside
    /// [`forward_with`](Self::forward_with), as [`Stream::extend_gated`] is beside
    /// [`Stream::extend`], because most kernels have none: they say so, and their callers need not
    /// pass an empty one. What only knows `q`, `k` and `v` ([`fidelity`](crate::fidelity), for
    /// example) takes a kernel together with the log decays of a sequence:
    /// [`WithLogDecay`](crate::WithLogDecay).
    ///
    /// # Errors
    ///
    /// Those of [`forward_into`](Self::forward_into); [`Error::Unsupported`] unless the kernel is
    /// gated ([`LinearAttention::gated`](crate::LinearAttention::gated)); [`Error::Shape`] if
    /// `log_decay` has other rows or columns; [`Error::InvalidOption`] if one is positive or NaN.
    fn forward_gated(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        log_decay: ArrayView2<'_, T>,
        out: ArrayViewMut2<'_, T>,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        let _ = (q, k, v, log_decay, out, scratch);
        Err(NOT_GATED)
    }

    /// Whether calls must bring log decays: [`forward_gated`](Self::forward_gated).
    fn is_gated(&self) -> bool {
        false
    }

    /// Attends with the query heads of one head of keys and values (grouped-query attention):
    /// `q [group, n_q, d]`, `out [group, n_q, d_v]`. A kernel that learns from what is read sums
    /// over them.
    ///
    /// # Errors
    ///
    /// As [`forward_into`](Self::forward_into).
    fn forward_group(
        &self,
        q: ArrayView3<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mask: Mask,
        mut out: ArrayViewMut3<'_, T>,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        check::size("out", "heads", q.len_of(Axis(0)), out.len_of(Axis(0)))?;
        for (q, out) in q.outer_iter().zip(out.outer_iter_mut()) {
            self.forward_with(q, k, v, mask, out, scratch)?;
        }
        Ok(())
    }

    /// As [`forward`](Self::forward), for values to which columns were added that only show the
    /// weights: `v [n_k, d_v + more]`, of which no decision of the kernel may depend on more than
    /// the first `d_v`.
    #[doc(hidden)]
    fn forward_probed(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        value_dim: usize,
        mask: Mask,
    ) -> Result<Array2<T>, Error> {
        let _ = value_dim;
        self.forward(q, k, v, mask)
    }

    /// The size of the state of a stream that has absorbed `tokens` tokens, in numbers of type `T`:
    /// what [`Stream::state_floats`] will say. To be overridden where it depends on the number of
    /// tokens.
    ///
    /// # Errors
    ///
    /// As [`stream`](Self::stream).
    fn state_floats(&self, value_dim: usize, tokens: usize) -> Result<usize, Error> {
        let _ = tokens;
        Ok(self.stream(value_dim)?.state_floats())
    }

    /// Starts an empty causal stream for values of `value_dim` columns: the state a decoder keeps.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `value_dim` is 0, [`Error::InvalidOption`] if an option of the kernel
    /// cannot be used.
    fn stream(&self, value_dim: usize) -> Result<Box<dyn Stream<T>>, Error>;

    /// Starts an empty causal stream that serves the `group` query heads of one head of keys and
    /// values with one state (grouped-query attention); feed it with [`Stream::extend_group`].
    /// `None`, unless overridden: each query head needs a stream of its own.
    ///
    /// # Errors
    ///
    /// As [`stream`](Self::stream); [`Error::ZeroSize`] if `group` is 0.
    fn group_stream(
        &self,
        group: usize,
        value_dim: usize,
    ) -> Result<Option<Box<dyn Stream<T>>>, Error> {
        let _ = (group, value_dim);
        Ok(None)
    }

    /// Whether each query head of a group gets what it would get alone. Where a kernel says so,
    /// [`MultiHead`](crate::MultiHead) answers the query heads of a group one by one, on as many
    /// threads as there are; unless overridden, by [`forward_group`](Self::forward_group).
    fn heads_are_independent(&self) -> bool {
        false
    }

    /// The kernel, if it is a hybrid: its heads may share one budget.
    #[doc(hidden)]
    fn as_hybrid(&self) -> Option<&hybrid::HybridAttention<T>> {
        None
    }

    /// The natural logarithm of the unnormalised weight `w(q_i, k_j)` of every pair, `[n_q, n_k]`,
    /// for kernels whose weight depends on the pair alone; weights that are not positive give −∞.
    ///
    /// This shows how well a kernel estimates `exp(scale·q·k)` before the normaliser hides a common
    /// factor. The default is `None`. It is a tool for measuring: it takes O(n_q·n_k) memory.
    ///
    /// # Errors
    ///
    /// As [`forward_into`](Self::forward_into).
    fn log_weights(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
    ) -> Result<Option<Array2<f64>>, Error> {
        let _ = (q, k);
        Ok(None)
    }
}

/// Working memory for [`Attention::forward_with`]: it grows to what the largest call needed and
/// says nothing about any call.
///
/// One for each thread that computes; a stream has its own.
#[derive(Debug)]
pub struct Scratch<T: Scalar> {
    pub(crate) state: State<T>,
    pub(crate) work: Workspace<T>,
    pub(crate) tile: Tile<T>,
    pub(crate) log_decay: LogDecay<T>,
    /// Of kernels with positions inside, the outermost last.
    pub(crate) placed: Vec<positional::Placed<T>>,
    /// Projected keys and values.
    pub(crate) projected: [linformer::Projected<T>; 2],
    hybrid: Option<Box<(hybrid::Layer<T>, hybrid::Work<T>)>>,
}

impl<T: Scalar> Scratch<T> {
    /// Memory that has allocated nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            state: State::new(),
            work: Workspace::new(),
            tile: Tile::new(),
            log_decay: LogDecay::new(),
            placed: Vec::new(),
            projected: [linformer::Projected::new(), linformer::Projected::new()],
            hybrid: None,
        }
    }

    /// What hybrids need.
    pub(crate) fn hybrid(&mut self) -> (&mut hybrid::Layer<T>, &mut hybrid::Work<T>) {
        let (layer, work) = &mut **self
            .hybrid
            .get_or_insert_with(|| Box::new((hybrid::Layer::new(), hybrid::Work::new())));
        (layer, work)
    }

    /// Memory of one of many threads.
    #[cfg_attr(not(feature = "rayon"), allow(unused_mut))]
    pub(crate) fn of_one_thread() -> Self {
        let mut scratch = Self::new();
        #[cfg(feature = "rayon")]
        {
            scratch.work.parallel = false;
            scratch.tile.parallel = false;
        }
        scratch
    }
}

impl<T: Scalar> Default for Scratch<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// Query heads on one head of keys and values.
#[doc(hidden)]
#[derive(Debug)]
pub struct HeadCall<'a, T> {
    /// `[group, n, d]`
    pub(crate) q: ArrayView3<'a, T>,
    pub(crate) k: ArrayView2<'a, T>,
    pub(crate) v: ArrayView2<'a, T>,
    /// `[n, 1 or num_features]`, of gated kernels
    pub(crate) log_decay: Option<ArrayView2<'a, T>>,
    /// `[group, n, d_v]`
    pub(crate) out: ArrayViewMut3<'a, T>,
}

/// The state of causal attention over the tokens seen so far.
///
/// Feeding a sequence in any pieces gives what [`Attention::forward`] gives for the whole with
/// [`Mask::Causal`], up to rounding.
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
pub trait Stream<T: Scalar>: Debug + Send {
    /// Absorbs `n` tokens and writes their outputs: `q [n, d]`, `k [n, d]`, `v [n, value_dim]`,
    /// `out [n, value_dim]`.
    ///
    /// `n = 1` is a decode step, a large `n` a prefill; `n = 0` does nothing.
    ///
    /// # Errors
    ///
    /// Those of [`Attention::forward_into`]. On an error the state is what it was before the call;
    /// the content of `out` is unspecified.
    fn extend(
        &mut self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error>;

    /// As [`extend`](Self::extend), of a stream of a gated kernel, with the log decays of the
    /// tokens: `[n, 1]` or `[n, num_features]`; see [`Attention::forward_gated`].
    ///
    /// # Errors
    ///
    /// Those of [`Attention::forward_gated`]. On an error the state is what it was before the call.
    fn extend_gated(
        &mut self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        log_decay: ArrayView2<'_, T>,
        out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        let _ = (q, k, v, log_decay, out);
        Err(NOT_GATED)
    }

    /// Query heads this stream serves: 1 unless it is a [group stream](Attention::group_stream).
    fn group(&self) -> usize {
        1
    }

    /// Absorbs `n` tokens and writes the outputs of every query head: `q [group, n, d]`,
    /// `k [n, d]`, `v [n, value_dim]`, `out [group, n, value_dim]`.
    ///
    /// # Errors
    ///
    /// As [`extend`](Self::extend); [`Error::Shape`] if the stream serves another number of query
    /// heads.
    fn extend_group(
        &mut self,
        q: ArrayView3<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        out: ArrayViewMut3<'_, T>,
    ) -> Result<(), Error> {
        check::size("q", "heads", 1, q.len_of(Axis(0)))?;
        check::size("out", "heads", 1, out.len_of(Axis(0)))?;
        self.extend(q.index_axis_move(Axis(0), 0), k, v, out.index_axis_move(Axis(0), 0))
    }

    /// Whether these calls are sure to succeed.
    #[doc(hidden)]
    fn cannot_fail(&self, calls: &[HeadCall<'_, T>]) -> bool {
        let _ = calls;
        false
    }

    /// As [`extend_group`](Self::extend_group), of several heads of keys and values that share one
    /// state.
    #[doc(hidden)]
    fn extend_heads(&mut self, calls: &mut [HeadCall<'_, T>]) -> Result<(), Error> {
        let [HeadCall { q, k, v, log_decay, out }] = calls else { return Err(ONE_HEAD) };
        let Some(log_decay) = log_decay else {
            return self.extend_group(*q, *k, *v, out.view_mut());
        };
        if self.group() > 1 {
            return Err(NOT_GATED);
        }
        check::size("q", "heads", 1, q.len_of(Axis(0)))?;
        check::size("out", "heads", 1, out.len_of(Axis(0)))?;
        self.extend_gated(
            q.index_axis_move(Axis(0), 0),
            *k,
            *v,
            *log_decay,
            out.index_axis_mut(Axis(0), 0),
        )
    }

    /// Tokens absorbed so far.
    fn len(&self) -> usize;

    /// Whether no token has been absorbed.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The size of the state now, in numbers of type `T`. Constants of the kernel and working
    /// memory do not count.
    fn state_floats(&self) -> usize;

    /// A copy of this stream with a state of its own. `Box<dyn Stream<T>>` is [`Clone`] through it.
    fn clone_box(&self) -> Box<dyn Stream<T>>;

    /// Forgets every token.
    fn reset(&mut self);

    /// Says that the caller has work for every thread already.
    #[doc(hidden)]
    fn stay_on_one_thread(&mut self) {}

    /// Remembers the state as it is now, for [`rollback`](Self::rollback); returns whether this
    /// stream can. It takes the place of an earlier checkpoint. A fixed-size state is copied, a
    /// growing cache only measured; nothing is allocated after the first time.
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
        Err(NO_CHECKPOINT)
    }

    /// Copies the state out, to store it or to send it elsewhere.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] for a stream that has not implemented it; every stream of this crate
    /// has.
    fn save(&self) -> Result<StreamState<T>, Error> {
        Err(Error::Unsupported {
            what: "saving this stream",
            why: "its type does not implement `Stream::save`",
        })
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
    /// [`Error::State`] if the state was saved by another kind of stream or another shape,
    /// [`Error::NotFinite`] if it holds NaN or infinity, [`Error::Unsupported`] as for
    /// [`save`](Self::save). The stream is then unchanged.
    fn restore(&mut self, state: &StreamState<T>) -> Result<(), Error> {
        let _ = state;
        Err(Error::Unsupported {
            what: "restoring this stream",
            why: "its type does not implement `Stream::restore`",
        })
    }
}

pub(crate) const NOT_GATED: Error = Error::Unsupported {
    what: "a log decay of each token",
    why: "this kernel is not one of `LinearAttention::gated`",
};

pub(crate) const NO_FULL_DECAY: Error = Error::Unsupported {
    what: "full attention with decay",
    why: "a decay needs an order of tokens; use `Mask::Causal`",
};

const ONE_HEAD: Error = Error::Unsupported {
    what: "several heads in one stream",
    why: "the stream is one of a single head",
};

pub(crate) const NO_CHECKPOINT: Error = Error::Unsupported {
    what: "rolling this stream back",
    why: "it has no checkpoint; call `checkpoint` first",
};

impl<T: Scalar> Clone for Box<dyn Stream<T>> {
    fn clone(&self) -> Self {
        self.clone_box()
    }
}

/// The saved state of a [`Stream`]: plain numbers and what they belong to. With feature `serde` it
/// serialises.
///
/// It does not hold the kernel: save that beside it, and restore the state into a stream of the
/// same kernel. Formats must keep floats exactly (with `serde_json`, its feature
/// `float_roundtrip`).
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct StreamState<T> {
    kernel: String,
    tokens: usize,
    shape: Vec<usize>,
    numbers: Vec<T>,
}

impl<T: Scalar> StreamState<T> {
    /// A state of `tokens` absorbed tokens; `kernel` and `shape` are compared when it is restored.
    pub fn new(
        kernel: impl Into<String>,
        tokens: usize,
        shape: Vec<usize>,
        numbers: Vec<T>,
    ) -> Self {
        Self { kernel: kernel.into(), tokens, shape, numbers }
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
