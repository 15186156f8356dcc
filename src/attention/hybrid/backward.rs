//! The backward pass of hybrids.
//!
//! What is decided on the way (which pair is merged, by which weights; which keys are heavy) is a
//! constant: outputs are softmax attention over exact tokens and means of tokens with fixed
//! shares, beside sums of features.
//!
//! A [`log`] holds what was decided, some bytes a token. With it, what a block of steps sees is
//! put together as rows ([`flow`]): the window, the sinks and every entry there was during the
//! block, each seen by a run of its steps, so that the block is computed by matrix products. Blocks
//! go from the last to the first ([`entries`]), from copies of the entries made on the way, and
//! hand the gradients by the entries on to the block before. Sums of features have two passes of
//! their own ([`features`]).

mod entries;
mod features;
mod flow;
pub(super) mod head;
mod log;
pub(super) mod pass;
#[cfg(test)]
mod tests;
