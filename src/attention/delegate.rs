//! Kernels that are another kernel inside: pointers, and types with a kernel of their own.

use crate::attention::Attention;
use crate::scalar::Scalar;
use std::sync::Arc;

/// Implements [`Attention`] for a type by a kernel inside.
macro_rules! attention_by {
    ([$($generics:tt)*] $type:ty, $this:ident => $kernel:expr) => {
        impl<$($generics)*> $crate::attention::Attention<T> for $type {
            $crate::attention::delegate::forward_by!($this => $kernel);
            $crate::attention::delegate::backward_by!($this => $kernel);
        }
    };
}
pub(crate) use attention_by;

/// The methods of [`Attention`] but for those of gradients, by a kernel inside.
macro_rules! forward_by {
    ($this:ident => $kernel:expr) => {
        fn forward_heads(
            &self,
            heads: &mut [$crate::attention::call::Head<'_, T>],
            mask: $crate::mask::Mask,
            scratch: &mut $crate::attention::scratch::Scratch<T>,
        ) -> Result<(), $crate::error::Error> {
            let $this = self;
            $kernel.forward_heads(heads, mask, scratch)
        }

        fn stream(
            &self,
            value_dim: usize,
        ) -> Result<Box<dyn $crate::attention::stream::Stream<T>>, $crate::error::Error> {
            let $this = self;
            $kernel.stream(value_dim)
        }

        fn stream_with(
            &self,
            options: $crate::attention::stream::StreamOptions,
        ) -> Result<Box<dyn $crate::attention::stream::Stream<T>>, $crate::error::Error> {
            let $this = self;
            $kernel.stream_with(options)
        }

        fn state_floats(
            &self,
            value_dim: usize,
            tokens: usize,
        ) -> Result<usize, $crate::error::Error> {
            let $this = self;
            $kernel.state_floats(value_dim, tokens)
        }

        fn state_bytes(
            &self,
            value_dim: usize,
            tokens: usize,
        ) -> Result<usize, $crate::error::Error> {
            let $this = self;
            $kernel.state_bytes(value_dim, tokens)
        }

        fn sharing(&self) -> $crate::attention::sharing::Sharing {
            let $this = self;
            $kernel.sharing()
        }

        fn gives_log_normalizer(&self) -> bool {
            let $this = self;
            $kernel.gives_log_normalizer()
        }

        fn pair_weights(&self) -> Option<&dyn $crate::attention::PairWeights<T>> {
            let $this = self;
            $kernel.pair_weights()
        }
    };
}
pub(crate) use forward_by;

/// The methods of gradients.
macro_rules! backward_by {
    ($this:ident => $kernel:expr) => {
        fn backward_heads(
            &self,
            heads: &mut [$crate::attention::gradient::HeadGradient<'_, T>],
            mask: $crate::mask::Mask,
            scratch: &mut $crate::attention::scratch::Scratch<T>,
        ) -> Result<(), $crate::error::Error> {
            let $this = self;
            $kernel.backward_heads(heads, mask, scratch)
        }

        fn parameters(&self) -> $crate::parameters::Parameters<T> {
            let $this = self;
            $kernel.parameters()
        }

        fn with_parameters(
            &self,
            parameters: &$crate::parameters::Parameters<T>,
        ) -> Result<Box<dyn $crate::attention::Attention<T>>, $crate::error::Error> {
            let $this = self;
            $kernel.with_parameters(parameters)
        }
    };
}
pub(crate) use backward_by;

/// The methods of a [`Stream`](crate::attention::stream::Stream) whose state is that of another
/// one, in its field `stream`.
macro_rules! state_of_stream_inside {
    () => {
        fn len(&self) -> usize {
            self.stream.len()
        }

        fn state_floats(&self) -> usize {
            self.stream.state_floats()
        }

        fn state_bytes(&self) -> usize {
            self.stream.state_bytes()
        }

        fn reset(&mut self) {
            self.stream.reset();
        }

        fn checkpoint(&mut self) -> bool {
            self.stream.checkpoint()
        }

        fn rollback(&mut self) -> Result<(), $crate::error::Error> {
            self.stream.rollback()
        }
    };
}
pub(crate) use state_of_stream_inside;

attention_by!([T: Scalar, A: Attention<T> + ?Sized] Arc<A>, this => (**this));
attention_by!([T: Scalar, A: Attention<T> + ?Sized] Box<A>, this => (**this));
