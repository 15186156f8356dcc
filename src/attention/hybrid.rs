//! Hybrids: an exact window, sinks and heavy keys, and a far memory for what leaves them, under one
//! normaliser.

mod backward;
pub(crate) mod builder;
pub(crate) mod config;
pub(crate) mod far;
mod far_memory;
mod near;
mod parameters;
mod pass;
mod read;
mod save;
mod scores;
pub(crate) mod state;
mod stream;

use crate::attention::Attention;
use crate::attention::call::{Head, NO_FULL_DECAY};
use crate::attention::gradient::HeadGradient;
use crate::attention::hybrid::backward::pass::{BackwardParts, add_gradients};
use crate::attention::hybrid::config::{Config, FarKind};
use crate::attention::hybrid::far_memory::merging::MergingPool;
use crate::attention::hybrid::far_memory::{Sizes, of_kind};
use crate::attention::hybrid::state::{HybridScratch, HybridState};
use crate::attention::hybrid::stream::HybridStream;
use crate::attention::scratch::Scratch;
use crate::attention::sharing::Sharing;
use crate::attention::stream::{Stream, StreamOptions};
use crate::check;
use crate::error::Error;
use crate::mask::Mask;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use ndarray::Axis;
use std::sync::Arc;

/// Softmax attention with a memory of fixed size: the last tokens (`window`), the first ones
/// (`sinks`) and, if wanted, the keys that matter most (`heavy`) are exact; what leaves them goes
/// to a far memory ([`Far`](crate::Far)), and everything stands under ONE normaliser:
///
/// ```text
/// o_t = (Σ w_j v_j + F) / (Σ w_j + f)
/// w_j = exp(scale·q_t·k_j)
/// j ≤ t:  t − j < window, j < sinks,
///         or heavy
/// ```
///
/// with (F, f) the partial sum of the far memory for `q_t`. No share between near and far has to be
/// chosen or trained: both are in absolute terms.
///
/// A merging memory learns from what was read, so the outputs depend on the order of steps: the
/// causal forward *is* the stream, step by step, made fast, and a sequence cut into pieces gives
/// the same bits. [`Mask::Full`] has a meaning only where there is no window (and nothing to learn
/// from earlier queries): then the sinks and the heavy keys are exact and all other keys are far
/// for every query, unless they decay in their order; otherwise it is [`Error::Unsupported`]. With
/// [`Mask::CausalTail`] the first keys pass through the memory, which answers the tail only; a
/// memory that learns from what is read needs all queries and gives [`Error::Unsupported`].
///
/// # State
///
/// ```text
/// sinks · (d + d_v)
/// + held · (d + d_v [+ 1])
/// + heavy · (d + d_v + 1 [+ 1])
/// + far
/// held = window + block − 1
/// ```
///
/// numbers for each head of keys and values, from the first token on; the `[+ 1]` is the attention
/// received, which only [`Merged`](crate::Merged) needs. The far part is 0 for none,
/// `entries·(d + d_v + 2)` for [`Ward`](crate::Ward) and [`Merged`](crate::Merged) (the latter has
/// `d + 1` more, for the units of its metric), and `2·features·(d_v + 1) + 1` for feature maps, one
/// more where they forget.
///
/// # Gradient
///
/// What the kernel decides is a constant of the
/// [gradient](crate::Attention::backward_heads): which pairs of entries are merged and with which
/// shares, and which keys are heavy. So an entry is a fixed mean of keys and of values, read with
/// its count, and nothing flows back through attention received, the units of the metric or the
/// scores of a calibration. Where these depend on the arguments, gradients therefore differ from
/// differences of outputs; with [`Far::none`](crate::Far::none),
/// [`Far::features`](crate::Far::features), with decay or not, and an uncalibrated
/// [`Far::ward`](crate::Far::ward) they are those of the outputs.
/// [Parameters](crate::Attention::parameters) are those of the map, under `far`, `decay.channels`,
/// and `sink_logits`. A backward pass keeps some bytes for each token: what was decided, or
/// two numbers for each query. [Memories of your own](crate::Far::memory) and states in fewer bits
/// have no gradient.
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

const FULL_MERGED: Error = Error::Unsupported {
    what: "a full mask with `Far::merged`",
    why: "attention received needs an order of queries; use `Far::ward`",
};

const TAIL_MERGED: Error = Error::Unsupported {
    what: "the tail of a sequence with `Far::merged`",
    why: "attention received needs the queries of all tokens; use `Mask::Causal` with all of them",
};

impl<T: Scalar> HybridAttention<T> {
    /// Columns of queries and keys.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.config.head_dim
    }

    /// Causal attention of checked heads that share one budget, or attention of one head whose
    /// queries see every key; that head is query head `query_head` of the group.
    fn forward_checked(
        &self,
        heads: &mut [Head<'_, T>],
        mask: Mask,
        query_head: usize,
        HybridParts { state, work }: &mut HybridParts<T>,
    ) -> Result<(), Error> {
        let [Head { q, k, v, probes, .. }, rest @ ..] = &*heads else { return Ok(()) };
        for head in rest {
            check::size("k", "rows", k.nrows(), head.keys())?;
            check::size("q", "rows", q.len_of(Axis(1)), head.queries())?;
            check::size("q", "heads", q.len_of(Axis(0)), head.group_len())?;
            check::size("v", "columns", v.ncols(), head.v.ncols())?;
        }
        if k.nrows() == 0 || q.is_empty() {
            return Ok(());
        }
        let value_dim = v.ncols();
        let deciding_columns = (*probes > 0).then(|| value_dim.saturating_sub(*probes));
        let sizes = Sizes { heads: heads.len(), value_dim, deciding_columns };
        state.prepare(&self.config, sizes)?;
        begin_logs(state, heads);
        if mask != Mask::Full {
            state.extend(&self.config, heads, work)?;
            end_logs(&self.config, state, heads);
            return Ok(());
        }
        heads.iter_mut().try_for_each(|head| state.full(&self.config, query_head, head, work))
    }

    /// Refuses masks without a meaning for `[n_q, n_k]` queries and keys.
    fn check_mask(&self, mask: Mask, sizes: [usize; 2]) -> Result<(), Error> {
        if mask.settled(sizes) == Mask::CausalTail && self.config.learns() {
            return Err(TAIL_MERGED);
        }
        if mask == Mask::Full && self.config.window > 0 {
            let why = "a window has no meaning where every query sees every key; build the \
                       kernel with `window(0)`";
            return Err(Error::Unsupported { what: "a full mask with a window", why });
        }
        if mask == Mask::Full && self.config.learns() {
            return Err(FULL_MERGED);
        }
        if mask == Mask::Full && matches!(&self.config.far, FarKind::Linear(far) if far.decays()) {
            return Err(NO_FULL_DECAY);
        }
        Ok(())
    }
}

/// What a forward pass keeps in the scratch.
#[derive(Debug)]
struct HybridParts<T: Scalar> {
    state: HybridState<T>,
    work: HybridScratch<T>,
}

impl<T: Scalar> Default for HybridParts<T> {
    fn default() -> Self {
        Self { state: HybridState::new(), work: HybridScratch::new() }
    }
}

/// Lets the entries of the heads that ask for it write down what they merge.
fn begin_logs<T: Scalar>(state: &mut HybridState<T>, heads: &mut [Head<'_, T>]) {
    let Some(MergingPool(memories)) = of_kind(&mut *state.far) else { return };
    for (memory, head) in memories.iter_mut().zip(heads) {
        memory.log = head.checkpoints.as_mut().map(|kept| kept.take_merges());
    }
}

/// Keeps what they wrote.
fn end_logs<T: Scalar>(config: &Config<T>, state: &mut HybridState<T>, heads: &mut [Head<'_, T>]) {
    if heads.iter().all(|head| head.checkpoints.is_none()) {
        return;
    }
    let shape = config.shape(heads.len(), heads.first().map_or(0, |head| head.v.ncols()));
    let Some(MergingPool(memories)) = of_kind(&mut *state.far) else { return };
    for (memory, head) in memories.iter_mut().zip(heads) {
        let tokens = head.keys();
        if let (Some(log), Some(kept)) = (memory.log.take(), &mut head.checkpoints) {
            kept.keep_merges(log, tokens, shape.clone());
        }
    }
}

impl<T: Scalar> Attention<T> for HybridAttention<T> {
    fn forward_heads(
        &self,
        heads: &mut [Head<'_, T>],
        mask: Mask,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        for head in &*heads {
            head.check_not_gated()?;
            head.check_no_log_normalizer()?;
            head.check_forward(self.config.head_dim, mask)?;
            self.config.check_group(head.group_len())?;
            self.check_mask(mask, [head.queries(), head.keys()])?;
            head.check_finite()?;
        }
        scratch.with_part(|parts: &mut HybridParts<T>, _| {
            if mask != Mask::Full {
                return self.forward_checked(heads, mask, 0, parts);
            }
            // every query head begins with an empty state
            heads.iter_mut().try_for_each(|head| {
                let Head { q, k, v, log_decay, probes, out, .. } = head;
                let mut heads = q.outer_iter().zip(out.outer_iter_mut()).enumerate();
                heads.try_for_each(|(g, (q, out))| {
                    let head = Head {
                        log_decay: *log_decay,
                        probes: *probes,
                        ..Head::new(q, *k, *v, out)
                    };
                    self.forward_checked(&mut [head], mask, g, parts)
                })
            })
        })
    }

    fn stream(&self, value_dim: usize) -> Result<Box<dyn Stream<T>>, Error> {
        self.stream_with(StreamOptions::new(value_dim))
    }

    fn stream_with(&self, options: StreamOptions) -> Result<Box<dyn Stream<T>>, Error> {
        let StreamOptions { value_dim, group, heads, .. } = options;
        check::at_least_one("value_dim", value_dim)?;
        check::at_least_one("group", group)?;
        check::at_least_one("heads", heads)?;
        self.config.check_group(group)?;
        let max_heads = match self.sharing() {
            Sharing::Layer { max_heads, .. } => max_heads,
            _ => 1,
        };
        if heads > max_heads {
            let why = "only `Far::merged` without heavy keys can, with at least 4 entries and \
                       up to 16384 over all heads";
            return Err(Error::Unsupported { what: "a budget shared by so many heads", why });
        }
        let slots = self.config.near_slots() + self.config.far_slots(heads);
        check::array("value_dim", value_dim, slots)?;
        Ok(Box::new(HybridStream::new(Arc::clone(&self.config), options)?))
    }

    fn state_bytes(&self, value_dim: usize, _: usize) -> Result<usize, Error> {
        Ok(self.stream(value_dim)?.state_bytes())
    }

    fn sharing(&self) -> Sharing {
        self.config.sharing()
    }

    fn backward_heads(
        &self,
        heads: &mut [HeadGradient<'_, T>],
        mask: Mask,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        for head in &*heads {
            head.check_not_gated()?;
            head.check_backward(self.config.head_dim, mask)?;
            self.config.check_group(head.group_len())?;
            self.check_mask(mask, [head.queries(), head.keys()])?;
            head.check_finite()?;
            if let Some(d_parameters) = &head.d_parameters {
                self.config.parameters().check_names(d_parameters)?;
            }
        }
        scratch.with_part(|parts: &mut BackwardParts<T>, _| {
            if self.config.learns() {
                return add_gradients(&self.config, heads, mask, parts);
            }
            let one_by_one = heads.iter_mut().map(core::slice::from_mut);
            one_by_one
                .into_iter()
                .try_for_each(|head| add_gradients(&self.config, head, mask, parts))
        })
    }

    fn parameters(&self) -> Parameters<T> {
        self.config.parameters()
    }

    fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Box<dyn Attention<T>>, Error> {
        Ok(Box::new(Self { config: Arc::new(self.config.with_parameters(parameters)?) }))
    }
}
