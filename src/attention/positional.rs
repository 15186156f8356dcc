//! Kernels whose queries and keys are changed by their positions before a kernel inside gets them.

pub(crate) mod rotate;
mod rotate_back;
pub(crate) mod stream;

use crate::attention::call::Head;
use crate::attention::gradient::{HeadGradient, KERNEL};
use crate::attention::positional::rotate::{Positions, Rotated};
use crate::attention::positional::rotate_back::RotatedGradients;
use crate::attention::positional::stream::PositionalStream;
use crate::attention::scratch::Scratch;
use crate::attention::sharing::Sharing;
use crate::attention::stream::{Stream, StreamOptions};
use crate::attention::{Attention, PairWeights};
use crate::check;
use crate::error::Error;
use crate::mask::Mask;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use ndarray::{Array2, ArrayView2, Axis};
use std::sync::Arc;

/// A kernel behind a change of queries and keys. The position of a stream's next token is the
/// length of the stream inside, so that a reset, a rollback or a restored state need nothing more.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Positional<P, A> {
    positions: Arc<P>,
    kernel: A,
}

impl<P, A> Positional<P, A> {
    pub(crate) fn new(positions: P, kernel: A) -> Self {
        Self { positions: Arc::new(positions), kernel }
    }

    pub(crate) fn positions(&self) -> &P {
        &self.positions
    }

    pub(crate) fn kernel(&self) -> &A {
        &self.kernel
    }
}

impl<T: Scalar, P: Positions, A: Attention<T>> Attention<T> for Positional<P, A> {
    fn forward_heads(
        &self,
        heads: &mut [Head<'_, T>],
        mask: Mask,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        scratch.with_part(|rotated: &mut Rotated<T>, scratch| {
            heads.iter_mut().try_for_each(|head| {
                head.check_forward_masked(self.positions.head_dim(), mask)?;
                let firsts = [mask.first([head.queries(), head.keys()]).unwrap_or(0), 0];
                let (q, k) = rotated.rotate(&*self.positions, firsts, head.q, head.k)?;
                let head = Head { q, k, ..head.reborrow() };
                self.kernel.forward_heads(&mut [head], mask, scratch)
            })
        })
    }

    fn stream(&self, value_dim: usize) -> Result<Box<dyn Stream<T>>, Error> {
        self.stream_with(StreamOptions::new(value_dim))
    }

    fn stream_with(&self, options: StreamOptions) -> Result<Box<dyn Stream<T>>, Error> {
        options.check_one_head()?;
        let stream = self.kernel.stream_with(options)?;
        Ok(Box::new(PositionalStream::new(Arc::clone(&self.positions), stream, options)))
    }

    fn state_floats(&self, value_dim: usize, tokens: usize) -> Result<usize, Error> {
        self.kernel.state_floats(value_dim, tokens)
    }

    fn state_bytes(&self, value_dim: usize, tokens: usize) -> Result<usize, Error> {
        self.kernel.state_bytes(value_dim, tokens)
    }

    fn sharing(&self) -> Sharing {
        match self.kernel.sharing() {
            // streams here are of one head of keys and values
            Sharing::Layer { .. } => Sharing::Group,
            other => other,
        }
    }

    fn gives_log_normalizer(&self) -> bool {
        self.kernel.gives_log_normalizer()
    }

    fn backward_heads(
        &self,
        heads: &mut [HeadGradient<'_, T>],
        mask: Mask,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        scratch.with_part(|rotated: &mut RotatedGradients<T>, scratch| {
            heads.iter_mut().try_for_each(|head| {
                head.check_backward_masked(self.positions.head_dim(), mask)?;
                rotated.add(&*self.positions, mask, head, |head| {
                    head.with_kernel_inside(|head| {
                        self.kernel.backward_heads(&mut [head], mask, scratch)
                    })
                })
            })
        })
    }

    fn parameters(&self) -> Parameters<T> {
        self.kernel.parameters().under(KERNEL)
    }

    fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Box<dyn Attention<T>>, Error> {
        Attention::<T>::parameters(self).check_names(parameters)?;
        let kernel = self.kernel.with_parameters(&parameters.of(KERNEL))?;
        Ok(Box::new(Positional { positions: Arc::clone(&self.positions), kernel }))
    }

    fn pair_weights(&self) -> Option<&dyn PairWeights<T>> {
        self.kernel.pair_weights().map(|_| self as &dyn PairWeights<T>)
    }
}

impl<T: Scalar, P: Positions, A: Attention<T>> PairWeights<T> for Positional<P, A> {
    fn log_weights(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
    ) -> Result<Array2<f64>, Error> {
        check::size("q", "columns", self.positions.head_dim(), q.ncols())?;
        check::size("k", "columns", self.positions.head_dim(), k.ncols())?;
        let mut rotated = Rotated::default();
        let (q, k) = rotated.rotate(&*self.positions, [0, 0], q.insert_axis(Axis(0)), k)?;
        let why = "the kernel inside has none";
        let none = Error::Unsupported { what: "the weights of single pairs", why };
        let weights = self.kernel.pair_weights().ok_or(none)?;
        weights.log_weights(q.index_axis_move(Axis(0), 0), k)
    }
}
