//! States of a layer to go back to, and to keep.

use crate::attention::stream::StreamState;
use crate::error::Error;
use crate::multi_head::stream::MultiHeadStream;
use crate::scalar::Scalar;

impl<T: Scalar> MultiHeadStream<T> {
    /// Remembers the state of every head and sequence as it is now, for
    /// [`rollback`](Self::rollback); it takes the place of an earlier checkpoint, of
    /// [single heads](Self::head_mut) too. A growing cache is only measured, states of fixed size
    /// are copied; nothing is allocated after the first time.
    ///
    /// ```
    /// use dijiang::{MultiHead, SoftmaxAttention};
    /// use ndarray::Array4;
    ///
    /// let mut stream = MultiHead::new(SoftmaxAttention::<f32>::new(8)?, 4, 2)?.stream(1, 8)?;
    /// let (q, kv) = (Array4::ones((1, 4, 3, 8)), Array4::ones((1, 2, 3, 8)));
    /// let mut out = Array4::zeros(q.dim());
    /// stream.checkpoint();
    /// stream.extend(q.view(), kv.view(), kv.view(), None, out.view_mut())?; // a draft of 3 tokens
    /// stream.rollback()?; // it was not accepted
    /// assert_eq!(stream.lengths(), [0]);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    pub fn checkpoint(&mut self) {
        self.checkpoint.set(&mut self.streams, self.shape.units.len());
    }

    /// Goes back to the state of the last [`checkpoint`](Self::checkpoint), as often as wanted: to
    /// the sequences of that time, as many and in that order.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if there is none, or the layer was reset or restored since;
    /// [`Error::InHead`] with it if a [single head](Self::head_mut) was. The layer is then
    /// unchanged.
    pub fn rollback(&mut self) -> Result<(), Error> {
        let units = self.shape.units.len();
        let result = self.checkpoint.return_to(&mut self.streams, units);
        result.map_err(|(stream, error)| match stream {
            Some(index) => self.error(index, error),
            None => error,
        })
    }

    /// Copies the state of every head and sequence out.
    ///
    /// # Errors
    ///
    /// Those of [`Stream::save`](crate::Stream::save), in an [`Error::InHead`].
    pub fn save(&self) -> Result<MultiHeadState<T>, Error> {
        let streams = self.streams.iter().enumerate();
        let saved = streams.map(|(i, stream)| stream.save().map_err(|error| self.error(i, error)));
        Ok(MultiHeadState { streams: saved.collect::<Result<_, _>>()? })
    }

    /// Replaces the state by a saved one of a layer with the same kernels and as many sequences.
    ///
    /// ```
    /// use dijiang::{MultiHead, SoftmaxAttention};
    /// use ndarray::Array4;
    ///
    /// let layer = MultiHead::new(SoftmaxAttention::<f32>::new(8)?, 4, 2)?;
    /// let (q, kv) = (Array4::ones((1, 4, 3, 8)), Array4::ones((1, 2, 3, 8)));
    /// let mut out = Array4::zeros(q.dim());
    /// let mut first = layer.stream(1, 8)?;
    /// first.extend(q.view(), kv.view(), kv.view(), None, out.view_mut())?;
    /// let mut second = layer.stream(1, 8)?;
    /// second.restore(&first.save()?)?;
    /// assert_eq!(second.lengths(), [3]);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::State`] if it has another number of states, or one is of another kernel, and those
    /// of [`Stream::restore`](crate::Stream::restore) else in an [`Error::InHead`]. The layer is
    /// then unchanged.
    pub fn restore(&mut self, state: &MultiHeadState<T>) -> Result<(), Error> {
        if state.streams.len() != self.streams.len() {
            return Err(Error::State {
                which: "number of heads and sequences",
                expected: self.streams.len().to_string(),
                found: state.streams.len().to_string(),
            });
        }
        let mut streams = self.streams.clone();
        for (i, (to, from)) in streams.iter_mut().zip(&state.streams).enumerate() {
            to.restore(from).map_err(|error| match error {
                Error::State { .. } => error,
                _ => self.error(i, error),
            })?;
        }
        self.streams = streams;
        self.checkpoint.clear();
        Ok(())
    }

    /// An error of a stream.
    fn error(&self, index: usize, error: Error) -> Error {
        let units = &self.shape.units;
        units[index % units.len()].error(index / units.len(), error)
    }
}

/// The saved state of a [`MultiHeadStream`]: those of its streams, sequence after sequence. With
/// feature `serde` it serialises.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct MultiHeadState<T> {
    streams: Vec<StreamState<T>>,
}
