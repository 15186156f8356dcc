//! Hybrids: an exact window, sinks and heavy keys, and a far memory for what leaves them, under one
//! normaliser.

pub(crate) mod builder;
pub(crate) mod config;
pub(crate) mod far;
mod far_memory;
mod near;
mod pass;
mod read;
mod save;
mod scores;
pub(crate) mod state;
mod stream;

use crate::attention::HeadCall;
use crate::attention::Mask;
use crate::attention::Scratch;
use crate::attention::hybrid::config::{Config, FarKind};
use crate::attention::hybrid::state::{HybridScratch, HybridState};
use crate::attention::hybrid::stream::HybridStream;
use crate::attention::{Attention, Stream};
use crate::check;
use crate::error::Error;
use crate::scalar::Scalar;
use ndarray::{Array2, ArrayView2, ArrayView3, ArrayViewMut2, ArrayViewMut3, Axis};
use std::sync::Arc;

/// Softmax attention with a memory of fixed size: the last tokens (`window`), the first ones
/// (`sinks`) and, if wanted, the keys that matter most (`heavy`) are exact; what leaves them goes
/// to a far memory ([`Far`](crate::Far)), and everything stands under ONE normaliser:
///
/// ```text
/// o_t = [Σ_near e^{scale·q_t·k_j} v_j + F(q_t)] / [Σ_near e^{scale·q_t·k_j} + f(q_t)],
/// near(t) = { j ≤ t : t − j < window or j < sinks } and the heavy keys
/// ```
///
/// with (F, f) the partial sum of the far memory. No share between near and far has to be chosen or
/// trained: both are in absolute terms.
///
/// A merging memory learns from what was read, so the outputs depend on the order of steps: the
/// causal forward *is* the stream, step by step, made fast, and a sequence cut into pieces gives
/// the same bits. [`Mask::Full`] has a meaning only where there is no window (and nothing to learn
/// from earlier queries): then the sinks and the heavy keys are exact and all other keys are far
/// for every query; otherwise it is [`Error::Unsupported`].
///
/// # State
///
/// ```text
/// sinks·(d + d_v) + held·(d + d_v [+ 1]) + heavy·(d + d_v + 1 [+ 1]) + far,
/// held = window + block − 1
/// ```
///
/// numbers for each head of keys and values, from the first token on; the `[+ 1]` is the attention
/// received, which only [`Merged`](crate::Merged) needs. The far part is 0 for none,
/// `entries·(d + d_v + 2)` for [`Ward`](crate::Ward) and [`Merged`](crate::Merged) (the latter has
/// `d + 1` more, for the units of its metric), and `2·features·(d_v + 1) + 1` for feature maps.
///
/// ```
/// use dijiang::{Attention, Far, HybridAttention, Mask, SoftmaxAttention};
/// use ndarray::Array2;
///
/// let kernel = HybridAttention::<f32>::builder(8)
///     .window(16)
///     .sinks(2)
///     .far(Far::merged(12))
///     .build()?;
/// let x = Array2::from_shape_fn((60, 8), |(i, j)| ((i * 8 + j) as f32 * 0.3).sin());
/// let out = kernel.forward(x.view(), x.view(), x.view(), Mask::Causal)?;
/// // while nothing has left the window, it is softmax attention
/// let exact =
///     SoftmaxAttention::new(8)?.forward(x.view(), x.view(), x.view(), Mask::Causal)?;
/// assert!((0..18).all(|t| (0..8).all(|c| (out[[t, c]] - exact[[t, c]]).abs() < 1e-5)));
///
/// let stream = kernel.stream(8)?;
/// assert_eq!(stream.state_floats(), 2 * 16 + 16 * 17 + 12 * 18 + 8 + 1);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct HybridAttention<T: Scalar> {
    config: Arc<Config<T>>,
}

pub(crate) const FULL_MERGED: Error = Error::Unsupported {
    what: "a full mask with `Far::merged`",
    why: "attention received needs an order of queries; use `Far::ward`",
};

impl<T: Scalar> HybridAttention<T> {
    /// Columns of queries and keys.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.config.head_dim
    }

    pub(crate) fn config(&self) -> &Arc<Config<T>> {
        &self.config
    }

    /// Attention of checked shapes; of several heads of a causal group, or one.
    fn forward_checked(
        &self,
        mut call: HeadCall<'_, T>,
        mask: Mask,
        deciding_columns: Option<usize>,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        check::finite_calls(core::slice::from_ref(&call))?;
        if mask != Mask::Causal {
            if self.config.window > 0 {
                let why = "a window has no meaning where every query sees every key; build the \
                           kernel with `window(0)`";
                return Err(Error::Unsupported { what: "a full mask with a window", why });
            }
            if self.config.learns() {
                return Err(FULL_MERGED);
            }
        }
        if call.q.len_of(Axis(1)) == 0 {
            return Ok(());
        }
        let (state, scratch) = scratch.hybrid();
        state.prepare(&self.config, 1, call.v.ncols(), deciding_columns)?;
        if mask == Mask::Causal {
            state.extend(&self.config, &mut [call], scratch)
        } else {
            state.full(&self.config, &mut call, scratch)
        }
    }

    /// Causal attention of heads that share one budget.
    pub(crate) fn forward_pool(
        &self,
        calls: &mut [HeadCall<'_, T>],
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        for HeadCall { q, k, v, .. } in &*calls {
            check::size("q", "columns", self.config.head_dim, q.len_of(Axis(2)))?;
            check::size("k", "columns", self.config.head_dim, k.ncols())?;
            check::at_least_one("v columns", v.ncols())?;
        }
        check::finite_calls(calls)?;
        if calls[0].k.nrows() == 0 {
            return Ok(());
        }
        let (state, scratch) = scratch.hybrid();
        state.prepare(&self.config, calls.len(), calls[0].v.ncols(), None)?;
        state.extend(&self.config, calls, scratch)
    }
}

impl<T: Scalar> Attention<T> for HybridAttention<T> {
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
        check::forward(self.config.head_dim, q, k, v, mask, &out)?;
        let (q, out) = (q.insert_axis(Axis(0)), out.insert_axis(Axis(0)));
        self.forward_checked(HeadCall { q, k, v, log_decay: None, out }, mask, None, scratch)
    }

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
        let mut heads = q.outer_iter().zip(out.outer_iter_mut());
        if mask != Mask::Causal {
            return heads.try_for_each(|(q, out)| self.forward_with(q, k, v, mask, out, scratch));
        }
        heads.try_for_each(|(q, out)| check::forward(self.config.head_dim, q, k, v, mask, &out))?;
        if q.is_empty() {
            return Ok(());
        }
        self.forward_checked(HeadCall { q, k, v, log_decay: None, out }, mask, None, scratch)
    }

    fn forward_probed(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        value_dim: usize,
        mask: Mask,
    ) -> Result<Array2<T>, Error> {
        let mut out = Array2::zeros((q.nrows(), v.ncols()));
        check::forward(self.config.head_dim, q, k, v, mask, &out.view_mut())?;
        let call = HeadCall {
            q: q.insert_axis(Axis(0)),
            k,
            v,
            log_decay: None,
            out: out.view_mut().insert_axis(Axis(0)),
        };
        self.forward_checked(call, mask, Some(value_dim), &mut Scratch::new())?;
        Ok(out)
    }

    fn stream(&self, value_dim: usize) -> Result<Box<dyn Stream<T>>, Error> {
        Ok(Box::new(self.heads_stream(1, 1, value_dim)?))
    }

    fn group_stream(
        &self,
        group: usize,
        value_dim: usize,
    ) -> Result<Option<Box<dyn Stream<T>>>, Error> {
        Ok(Some(Box::new(self.heads_stream(1, group, value_dim)?)))
    }

    fn heads_are_independent(&self) -> bool {
        !self.config.learns() && !matches!(self.config.far, FarKind::Own(_))
    }

    fn as_hybrid(&self) -> Option<&HybridAttention<T>> {
        Some(self)
    }
}

impl<T: Scalar> HybridAttention<T> {
    /// An empty stream of some heads of keys and values that share one budget of entries, each with
    /// `group` query heads.
    pub(crate) fn heads_stream(
        &self,
        heads: usize,
        group: usize,
        value_dim: usize,
    ) -> Result<HybridStream<T>, Error> {
        check::at_least_one("value_dim", value_dim)?;
        check::at_least_one("group", group)?;
        check::array(
            "value_dim",
            value_dim,
            self.config.near_slots() + self.config.far_slots(heads),
        )?;
        let mut state = HybridState::new();
        state.prepare(&self.config, heads, value_dim, None)?;
        Ok(HybridStream {
            config: Arc::clone(&self.config),
            heads,
            group,
            value_dim,
            state,
            scratch: HybridScratch::new(),
            checkpoint: None,
        })
    }
}
