//! A block over tokens: a whole sequence, or its state token by token.

use crate::attention::fingerprint::Fingerprint;
use crate::block::{DijiangBlock, as_heads, heads_first, thirds};
use crate::check;
use crate::error::Error;
use crate::multi_head::stream::MultiHeadStream;
use crate::multi_head::stream::state::MultiHeadState;
use crate::scalar::Scalar;
use ndarray::{Array2, ArrayView2, ArrayViewMut2};

impl<T: Scalar> DijiangBlock<T> {
    /// The output `[n, hidden]` of a whole sequence `x [n, hidden]`.
    ///
    /// # Errors
    ///
    /// Those of [`DijiangBlockStream::extend`].
    pub fn forward(&self, x: ArrayView2<'_, T>) -> Result<Array2<T>, Error> {
        let mut out = Array2::zeros(x.dim());
        self.forward_into(x, out.view_mut())?;
        Ok(out)
    }

    /// As [`forward`](Self::forward), over whatever `out` held.
    ///
    /// # Errors
    ///
    /// Those of [`DijiangBlockStream::extend`].
    pub fn forward_into(
        &self,
        x: ArrayView2<'_, T>,
        out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        self.stream()?.extend(x, out)
    }

    /// An empty stream: what a decoder keeps of this block. It shares the weights.
    ///
    /// # Errors
    ///
    /// Those of [`MultiHead::stream`](crate::MultiHead::stream).
    pub fn stream(&self) -> Result<DijiangBlockStream<T>, Error> {
        Ok(DijiangBlockStream {
            block: self.clone(),
            state: self.heads.stream(1, self.head_dim())?,
        })
    }
}

/// The state of a [`DijiangBlock`] over the tokens seen so far, made by [`DijiangBlock::stream`].
///
/// A sequence in any pieces gives what [`DijiangBlock::forward`] gives for the whole, up to
/// rounding.
///
/// It is the state of one sequence. A batch, or the beams of a search, are several streams; a
/// [clone](Clone) has a state of its own and shares the weights.
///
/// ```
/// # use dijiang::{DijiangBlock, DijiangWeights, Rotary};
/// # use ndarray::{Array1, Array2, Axis};
/// # let matrix = |rows, phase: f32| {
/// #     Array2::from_shape_fn((rows, 8), |(i, j)| (phase + (7 * i + 3 * j) as f32).sin())
/// # };
/// # let weights = DijiangWeights {
/// #     query_key_value: matrix(24, 0.0),
/// #     query_key_value_bias: Array1::zeros(24),
/// #     dense: matrix(8, 1.0),
/// #     dense_bias: Array1::zeros(8),
/// #     gate: matrix(8, 2.0),
/// #     group_norm_weight: Array1::ones(8),
/// #     group_norm_bias: Array1::zeros(8),
/// #     radii: Array1::linspace(-1.5, 1.5, 4),
/// # };
/// # let block = DijiangBlock::new(weights, 2, Rotary::gpt_neox(4, 0.5)?)?;
/// # let (prompt, draft) = (matrix(5, 3.0), matrix(2, 4.0));
/// // `block` as in the example of `DijiangBlock`, `prompt [5, 8]`, `draft [2, 8]`
/// let mut stream = block.stream()?;
/// stream.extend(prompt.view(), Array2::zeros((5, 8)).view_mut())?;
/// let saved = stream.save()?;
///
/// // a draft that is not accepted
/// stream.checkpoint();
/// stream.extend(draft.view(), Array2::zeros((2, 8)).view_mut())?;
/// stream.rollback()?;
/// assert_eq!(stream.len(), 5);
///
/// // a second beam from here
/// let mut beam = stream.clone();
/// beam.extend(draft.view(), Array2::zeros((2, 8)).view_mut())?;
/// assert_eq!((stream.len(), beam.len()), (5, 7));
///
/// // later, elsewhere: a stream of the same block goes on from the saved state
/// let mut other = block.stream()?;
/// other.restore(&saved)?;
/// assert_eq!(other.len(), 5);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct DijiangBlockStream<T: Scalar> {
    block: DijiangBlock<T>,
    state: MultiHeadStream<T>,
}

impl<T: Scalar> DijiangBlockStream<T> {
    /// Absorbs `n` tokens `x [n, hidden]` and writes their outputs, `out [n, hidden]`, over
    /// whatever it held.
    ///
    /// `n = 1` is a decode step, a large `n` a prefill; `n = 0` does nothing. Working memory is six
    /// times the size of `x`.
    ///
    /// # Errors
    ///
    /// - [`Error::Shape`]: `x` has not [`hidden`](DijiangBlock::hidden) columns, or `out` another
    ///   shape;
    /// - [`Error::NotFinite`]: NaN or infinity in `x`;
    /// - [`Error::Overflow`]: finite input led out of the range of `T`, or might have behind the
    ///   attention; in the attention itself in an [`Error::InHead`], which names the head.
    ///
    /// On an error the state is what it was before the call; the content of `out` is unspecified.
    pub fn extend(&mut self, x: ArrayView2<'_, T>, out: ArrayViewMut2<'_, T>) -> Result<(), Error> {
        let first_position = self.len();
        let Self { block, state } = self;
        check::size("x", "columns", block.hidden(), x.ncols())?;
        check::size("out", "rows", x.nrows(), out.nrows())?;
        check::size("out", "columns", x.ncols(), out.ncols())?;
        check::finite("x", x)?;
        if x.nrows() == 0 {
            return Ok(());
        }
        let x = x.as_standard_layout();
        let gate = block.gate(x.view())?;
        let mut mixed = Array2::zeros(x.dim());
        {
            let mut rows = block.query_key_value(x.view(), first_position)?;
            let [q, k, v] = thirds(as_heads(&mut rows, block.heads())?).map(heads_first);
            let mixed = heads_first(as_heads(&mut mixed, block.heads())?);
            state.extend(q.view(), k.view(), v.view(), None, mixed)?;
        }
        block.finish(mixed, &gate, out);
        Ok(())
    }

    /// Tokens absorbed so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.state.lengths().first().copied().unwrap_or(0)
    }

    /// Whether no token has been absorbed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The size of the state, in numbers of type `T`. It does not grow.
    #[must_use]
    pub fn state_floats(&self) -> usize {
        self.state.state_floats()
    }

    /// Forgets every token, and the checkpoint.
    pub fn reset(&mut self) {
        self.state.reset();
    }

    /// Remembers the state as it is now, for [`rollback`](Self::rollback); it takes the place of an
    /// earlier checkpoint. The state is copied; nothing is allocated after the first time.
    pub fn checkpoint(&mut self) {
        self.state.checkpoint();
    }

    /// Goes back to the state of the last [`checkpoint`](Self::checkpoint), as often as wanted.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if there is none, or the stream was reset or restored since. The
    /// stream is then unchanged.
    pub fn rollback(&mut self) -> Result<(), Error> {
        self.state.rollback()
    }

    /// Copies the state out, to store it or to send it elsewhere. It does not hold the weights.
    ///
    /// # Errors
    ///
    /// Those of [`MultiHeadStream::save`]; there is none in practice.
    pub fn save(&self) -> Result<DijiangBlockState<T>, Error> {
        let block = self.block.shared.fingerprint.clone();
        Ok(DijiangBlockState { block, heads: self.state.save()? })
    }

    /// Replaces the state by one that a stream of this block saved, or of one with the same
    /// weights; the stream then goes on bit for bit as the saved one would have.
    ///
    /// # Errors
    ///
    /// [`Error::State`] if another block saved it, and those of [`MultiHeadStream::restore`]. The
    /// stream is then unchanged.
    pub fn restore(&mut self, state: &DijiangBlockState<T>) -> Result<(), Error> {
        self.block.shared.fingerprint.check(&state.block)?;
        self.state.restore(&state.heads)
    }
}

/// The saved state of a [`DijiangBlockStream`]: those of its heads, and the [`Fingerprint`] of what
/// they depend on, the projection to queries, keys and values, the radii and the rotary embedding.
/// With feature `serde` it serialises.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct DijiangBlockState<T> {
    block: Fingerprint,
    heads: MultiHeadState<T>,
}
