//! The sequences of a batch: which there are, in which order.

use crate::check;
use crate::error::Error;
use crate::multi_head::stream::MultiHeadStream;
use crate::scalar::Scalar;

impl<T: Scalar> MultiHeadStream<T> {
    /// Forgets every token, and the checkpoint.
    pub fn reset(&mut self) {
        self.streams.iter_mut().for_each(|stream| stream.reset());
        self.checkpoint.clear();
    }

    /// Makes the batch one of `rows.len()` sequences, of which the `i`-th is a copy of the
    /// `rows[i]`-th before: the step of a beam search. Sequences may be left out or come several
    /// times. One is copied only where it comes a second time, so a permutation copies nothing;
    /// copies share no state.
    ///
    /// A [`checkpoint`](Self::checkpoint) stays with the sequences that were there when it was set:
    /// [`rollback`](Self::rollback) brings them back, as many and in the order of that time.
    ///
    /// ```
    /// use dijiang::{MultiHead, SoftmaxAttention};
    /// use ndarray::Array4;
    ///
    /// let mut stream = MultiHead::new(SoftmaxAttention::<f32>::new(8)?, 4, 2)?.stream(3, 8)?;
    /// let (q, kv) = (Array4::ones((3, 4, 5, 8)), Array4::ones((3, 2, 5, 8)));
    /// let mut out = Array4::zeros(q.dim());
    /// stream.extend(q.view(), kv.view(), kv.view(), Some(&[5, 4, 3]), out.view_mut())?;
    /// stream.reorder(&[2, 0, 2])?; // the beam of sequence 1 ends, that of 2 goes on twice
    /// assert_eq!(stream.lengths(), [3, 5, 3]);
    /// stream.reorder(&[1])?; // the best one is left
    /// assert_eq!(stream.lengths(), [5]);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `rows` is empty, [`Error::InvalidOption`] if there is no sequence of
    /// an index. The stream is then unchanged.
    pub fn reorder(&mut self, rows: &[usize]) -> Result<(), Error> {
        check::at_least_one("rows", rows.len())?;
        check::array("rows", rows.len(), self.shape.query_heads)?;
        let (batch, units) = (self.batch(), self.shape.units.len());
        // where the state itself goes: to the last place, after the copies were made of it
        let mut moves_to = vec![None; batch];
        for (to, &from) in rows.iter().enumerate() {
            match moves_to.get_mut(from) {
                Some(last) => *last = Some(to),
                None => return Err(no_sequence("rows", format!("{from} at index {to}"))),
            }
        }
        let mut old: Vec<_> = core::mem::take(&mut self.streams).into_iter().map(Some).collect();
        for (to, &from) in rows.iter().enumerate() {
            let states = &mut old[from * units..(from + 1) * units];
            self.streams.extend(states.iter_mut().filter_map(|state| {
                if moves_to[from] == Some(to) { state.take() } else { state.clone() }
            }));
        }
        self.checkpoint.follow(&moves_to, rows.len(), old);
        Ok(())
    }

    /// Begins one sequence of the batch anew, as for the next request in its place; the others go
    /// on. To have more sequences first, copy any by [`reorder`](Self::reorder).
    ///
    /// A [`checkpoint`](Self::checkpoint) stays with the sequence that was here when it was set:
    /// [`rollback`](Self::rollback) brings it back.
    ///
    /// ```
    /// use dijiang::{MultiHead, SoftmaxAttention};
    /// use ndarray::Array4;
    ///
    /// let mut stream = MultiHead::new(SoftmaxAttention::<f32>::new(8)?, 4, 2)?.stream(2, 8)?;
    /// let (q, kv) = (Array4::ones((2, 4, 5, 8)), Array4::ones((2, 2, 5, 8)));
    /// let mut out = Array4::zeros(q.dim());
    /// stream.extend(q.view(), kv.view(), kv.view(), None, out.view_mut())?;
    /// stream.reset_sequence(1)?;
    /// assert_eq!(stream.lengths(), [5, 0]);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if there is no such sequence. The stream is then unchanged.
    pub fn reset_sequence(&mut self, sequence: usize) -> Result<(), Error> {
        let batch = self.batch();
        if sequence >= batch {
            return Err(no_sequence("sequence", sequence.to_string()));
        }
        let units = self.shape.units.len();
        let states = &mut self.streams[sequence * units..(sequence + 1) * units];
        self.checkpoint.keep(sequence, states, batch);
        for state in states {
            state.reset();
        }
        Ok(())
    }

    fn batch(&self) -> usize {
        self.streams.len() / self.shape.units.len()
    }
}

fn no_sequence(which: &'static str, found: String) -> Error {
    Error::InvalidOption { which, found, needed: "less than the number of sequences in the batch" }
}
