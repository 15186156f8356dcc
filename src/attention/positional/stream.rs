//! The stream of a kernel whose queries and keys are changed by their positions.

use crate::attention::call::{Head, one_head};
use crate::attention::delegate::state_of_stream_inside;
use crate::attention::positional::rotate::{Positions, Rotated};
use crate::attention::stream::{Stream, StreamOptions, StreamState};
use crate::error::Error;
use crate::scalar::Scalar;
use std::sync::Arc;

/// A stream of the kernel inside, and what its calls need. The position of the next token is the
/// length of the stream inside, so that a reset, a rollback or a restored state need nothing more.
#[derive(Debug)]
pub(crate) struct PositionalStream<T: Scalar, P> {
    positions: Arc<P>,
    stream: Box<dyn Stream<T>>,
    options: StreamOptions,
    rotated: Rotated<T>,
}

impl<T: Scalar, P> PositionalStream<T, P> {
    pub(crate) fn new(
        positions: Arc<P>,
        stream: Box<dyn Stream<T>>,
        options: StreamOptions,
    ) -> Self {
        Self { positions, stream, options, rotated: Rotated::default() }
    }
}

impl<T: Scalar, P> Clone for PositionalStream<T, P> {
    fn clone(&self) -> Self {
        Self::new(Arc::clone(&self.positions), self.stream.clone(), self.options)
    }

    fn clone_from(&mut self, source: &Self) {
        self.stream.clone_from(&source.stream);
    }
}

impl<T: Scalar, P: Positions> PositionalStream<T, P> {
    /// Hands a head on, its queries and keys rotated.
    fn inside<R>(
        &mut self,
        heads: &mut [Head<'_, T>],
        call: impl FnOnce(&mut dyn Stream<T>, &mut [Head<'_, T>]) -> R,
    ) -> Result<R, Error> {
        let head = one_head(heads)?;
        let StreamOptions { value_dim, group, .. } = self.options;
        let first = self.stream.len();
        head.check_extend_biased([self.positions.head_dim(), value_dim], group, first)?;
        let (q, k) = self.rotated.rotate(&*self.positions, [first, first], head.q, head.k)?;
        Ok(call(&mut *self.stream, &mut [Head { q, k, ..head.reborrow() }]))
    }
}

impl<T: Scalar, P: Positions> Stream<T> for PositionalStream<T, P> {
    fn extend_heads(&mut self, heads: &mut [Head<'_, T>]) -> Result<(), Error> {
        self.inside(heads, |stream, heads| stream.extend_heads(heads))?
    }

    fn prepare_heads(&mut self, heads: &mut [Head<'_, T>]) -> bool {
        self.inside(heads, |stream, heads| stream.prepare_heads(heads)).unwrap_or(false)
    }

    state_of_stream_inside!();

    fn save(&self) -> Result<StreamState<T>, Error> {
        let state = self.stream.save()?;
        let kernel = format!("{} {}", P::NAME, state.kernel());
        let fingerprint = state.fingerprint().clone().and(self.positions.fingerprint());
        Ok(state.with_kernel(kernel).with_fingerprint(fingerprint))
    }

    fn restore(&mut self, state: &StreamState<T>) -> Result<(), Error> {
        match state.kernel().split_once(' ') {
            Some((name, kernel)) if name == P::NAME => {
                let inside = self.positions.fingerprint().check_end(state.fingerprint())?;
                let state = state.clone().with_kernel(kernel).with_fingerprint(inside);
                self.stream.restore(&state)
            }
            _ => {
                let found = state.kernel().to_owned();
                Err(Error::State { which: "kernel", expected: format!("{} ..", P::NAME), found })
            }
        }
    }
}
