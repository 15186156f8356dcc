//! A gated kernel together with the log decays of a sequence, for what knows queries, keys and
//! values only.

use super::{Attention, Mask, Scratch, Stream, StreamState};
use crate::{Error, Scalar, check, views};
use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use std::sync::Arc;

/// A gated kernel and the log decays of one sequence: an [`Attention`] without gates, for tools
/// that know `q`, `k` and `v` only, such as [`fidelity`](crate::fidelity).
///
/// Token `t` of any call, and of a stream from its first token on, has row `t` of the log decays. A
/// model calls [`Attention::forward_gated`] instead.
///
/// ```
/// use dijiang::{EluFeatures, LinearAttention, Mask, WithLogDecay, fidelity};
/// use ndarray::Array2;
///
/// let x = Array2::from_shape_fn((30, 8), |(i, j)| ((i * 8 + j) as f32).sin());
/// let log_decay =
///     Array2::from_shape_fn(
///         (30, 1),
///         |(t, _)| if t == 20 { f32::NEG_INFINITY } else { -0.01 },
///     );
/// let kernel = WithLogDecay::new(
///     LinearAttention::new(EluFeatures::<f32>::new(8)?).gated(),
///     log_decay,
/// );
/// let report = fidelity::compare(&kernel, x.view(), x.view(), x.view(), Mask::Causal)?;
/// assert!(report.output_error > 0.0);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct WithLogDecay<A, T> {
    kernel: A,
    log_decay: Arc<Array2<T>>,
}

impl<A, T: Scalar> WithLogDecay<A, T> {
    /// `log_decay [n, 1 or num_features]` serves sequences of up to `n` tokens. Numbers that cannot
    /// be used are reported by the first call that would use them.
    pub fn new(kernel: A, log_decay: Array2<T>) -> Self {
        Self { kernel, log_decay: Arc::new(log_decay) }
    }

    /// The kernel.
    #[must_use]
    pub fn kernel(&self) -> &A {
        &self.kernel
    }
}

/// Some rows of the log decays, if there are so many.
fn rows<T>(log_decay: &Array2<T>, first: usize, tokens: usize) -> Result<ArrayView2<'_, T>, Error> {
    let end = first.saturating_add(tokens);
    if end > log_decay.nrows() {
        return Err(Error::Shape {
            which: "log_decay",
            axis: "rows",
            expected: end,
            found: log_decay.nrows(),
        });
    }
    Ok(views::rows(log_decay.view(), first..end))
}

impl<T: Scalar, A: Attention<T>> Attention<T> for WithLogDecay<A, T> {
    fn forward_into(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mask: Mask,
        out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        self.forward_with(q, k, v, mask, out, &mut Scratch::new())
    }

    fn forward_with(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mask: Mask,
        out: ArrayViewMut2<'_, T>,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        if mask != Mask::Causal {
            return Err(super::NO_FULL_DECAY);
        }
        self.kernel.forward_gated(q, k, v, rows(&self.log_decay, 0, q.nrows())?, out, scratch)
    }

    fn stream(&self, value_dim: usize) -> Result<Box<dyn Stream<T>>, Error> {
        Ok(Box::new(Gated {
            stream: self.kernel.stream(value_dim)?,
            log_decay: Arc::clone(&self.log_decay),
        }))
    }

    fn state_floats(&self, value_dim: usize, tokens: usize) -> Result<usize, Error> {
        self.kernel.state_floats(value_dim, tokens)
    }
}

/// A stream whose next token has the row of its position.
#[derive(Debug)]
struct Gated<T: Scalar> {
    stream: Box<dyn Stream<T>>,
    log_decay: Arc<Array2<T>>,
}

impl<T: Scalar> Stream<T> for Gated<T> {
    fn extend(
        &mut self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        check::size("k", "rows", q.nrows(), k.nrows())?;
        let log_decay = rows(&self.log_decay, self.stream.len(), q.nrows())?;
        self.stream.extend_gated(q, k, v, log_decay, out)
    }

    fn len(&self) -> usize {
        self.stream.len()
    }

    fn state_floats(&self) -> usize {
        self.stream.state_floats()
    }

    fn clone_box(&self) -> Box<dyn Stream<T>> {
        Box::new(Self { stream: self.stream.clone(), log_decay: Arc::clone(&self.log_decay) })
    }

    fn reset(&mut self) {
        self.stream.reset();
    }

    fn stay_on_one_thread(&mut self) {
        self.stream.stay_on_one_thread();
    }

    fn checkpoint(&mut self) -> bool {
        self.stream.checkpoint()
    }

    fn rollback(&mut self) -> Result<(), Error> {
        self.stream.rollback()
    }

    fn save(&self) -> Result<StreamState<T>, Error> {
        self.stream.save()
    }

    fn restore(&mut self, state: &StreamState<T>) -> Result<(), Error> {
        self.stream.restore(state)
    }
}
