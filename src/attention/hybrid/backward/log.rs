//! What a forward pass decides, in the order of the tokens.

use crate::attention::call::Head;
use crate::attention::gradient::HeadGradient;
use crate::attention::hybrid::config::{Config, FarKind};
use crate::attention::hybrid::far_memory::merging::MergingPool;
use crate::attention::hybrid::far_memory::{Sizes, of_kind};
use crate::attention::hybrid::near::stay;
use crate::attention::hybrid::state::{HybridScratch, HybridState};
use crate::error::Error;
use crate::kernel::buffer::Buffer;
use crate::mask::Mask;
use crate::memory::linear::checkpoints::SumCheckpoints;
use crate::memory::merged::entries::Merge;
use crate::scalar::Scalar;
use crate::views::{row, rows};
use core::ops::Range;
use ndarray::{ArrayView2, ArrayView3, ArrayViewMut3, Axis, Slice};

/// Tokens of a piece.
const PIECE: usize = 256;

/// What becomes of the tokens of one head.
#[derive(Debug)]
pub(super) struct Log<T> {
    /// Of each token that leaves the window, where there are heavy keys: its place among them.
    pub(super) places: Vec<Option<u32>>,
    pub(super) merges: Vec<Merge<T>>,
}

/// Logs of some heads, and what recording them works with.
#[derive(Debug)]
pub(super) struct Recorder<T> {
    pub(super) logs: Vec<Log<T>>,
    /// Outputs, which nobody reads.
    out: Buffer<T>,
    scores: Vec<T>,
    keys: [Buffer<T>; 2],
}

impl<T: Scalar> Recorder<T> {
    pub(super) fn new() -> Self {
        Self {
            logs: Vec::new(),
            out: Buffer::new(),
            scores: Vec::new(),
            keys: [Buffer::new(), Buffer::new()],
        }
    }

    /// A forward pass over heads that share one budget, of checked shapes and finite.
    pub(super) fn record(
        &mut self,
        config: &Config<T>,
        heads: &[HeadGradient<'_, T>],
        mask: Mask,
        state: &mut HybridState<T>,
        scratch: &mut HybridScratch<T>,
    ) -> Result<(), Error> {
        self.logs.resize_with(heads.len(), || Log { places: Vec::new(), merges: Vec::new() });
        for (log, head) in self.logs.iter_mut().zip(heads) {
            log.merges.clear();
            log.places.clear();
            if config.heavy > 0 {
                self.scores.clear();
                let leaving = (0..head.keys()).filter_map(|t| config.leaving(t)).flatten();
                let rest = if mask == Mask::Full { config.held(head.keys()) } else { 0..0 };
                log.places.extend(leaving.chain(rest).map(|position| {
                    let key = row(head.k, position);
                    let score = config.static_score(key.iter().copied(), &mut self.keys);
                    #[allow(clippy::cast_possible_truncation)] // counted keys
                    stay(&mut self.scores, config.heavy, score).map(|place| place as u32)
                }));
            }
        }
        if matches!(config.far, FarKind::Merged { .. }) && !self.are_kept(config, heads, mask) {
            self.merges(config, heads, mask, state, scratch)?;
        }
        Ok(())
    }

    /// Takes the merges that the forward pass kept, if it did so for all heads.
    fn are_kept(&mut self, config: &Config<T>, heads: &[HeadGradient<'_, T>], mask: Mask) -> bool {
        let has_none =
            |head: &HeadGradient<'_, T>| head.checkpoints.is_none_or(SumCheckpoints::is_empty);
        if mask == Mask::Full || heads.iter().any(has_none) {
            return false;
        }
        let kept = |head: &HeadGradient<'_, T>| {
            let shape = config.shape(heads.len(), head.v.ncols());
            head.checkpoints.is_some_and(|kept| kept.merges(head.keys(), &shape).is_some())
        };
        // of all heads or of none
        if !heads.iter().all(kept) {
            return false;
        }
        for (log, head) in self.logs.iter_mut().zip(heads) {
            let shape = config.shape(heads.len(), head.v.ncols());
            let merges = head.checkpoints.and_then(|kept| kept.merges(head.keys(), &shape));
            log.merges.extend_from_slice(merges.unwrap_or_default());
        }
        true
    }

    /// What is merged in each head.
    fn merges(
        &mut self,
        config: &Config<T>,
        heads: &[HeadGradient<'_, T>],
        mask: Mask,
        state: &mut HybridState<T>,
        scratch: &mut HybridScratch<T>,
    ) -> Result<(), Error> {
        let (n, value_dim) = (heads[0].keys(), heads[0].v.ncols());
        let sizes = Sizes { heads: heads.len(), value_dim, deciding_columns: None };
        state.prepare(config, sizes)?;
        if let Some(MergingPool(memories)) = of_kind(&mut *state.far) {
            for (memory, log) in memories.iter_mut().zip(&mut self.logs) {
                memory.log = Some(core::mem::take(&mut log.merges));
            }
        }
        let learns = config.learns();
        let group = if learns { heads[0].group_len() } else { 0 };
        for start in (0..n).step_by(PIECE) {
            let range = start..n.min(start + PIECE);
            let shape = (group, range.len(), value_dim);
            let size = group * range.len() * value_dim;
            self.out.resize(heads.len() * size);
            let outs = self.out.chunks_exact_mut(size.max(1));
            let outs = outs.chain(core::iter::repeat_with(Default::default));
            let asked = if learns { range.clone() } else { 0..0 };
            let mut all = heads.iter().zip(outs).map(|(head, out)| {
                let out = ArrayViewMut3::from_shape(shape, out).expect("counted");
                piece(head.q, [head.k, head.v], [range.clone(), asked.clone()], out)
            });
            let mut several;
            let mut one;
            let calls = if heads.len() == 1 {
                one = all.next();
                one.as_mut_slice()
            } else {
                several = all.collect::<Vec<_>>();
                &mut several[..]
            };
            if learns {
                state.extend(config, calls, scratch).map_err(|error| error.in_chunk(start))?;
                continue;
            }
            for i in 0..range.len() {
                state.take(config, calls, i);
                state.leave(config, scratch).map_err(|error| error.in_chunk(start))?;
                state.tokens += 1;
            }
        }
        if mask == Mask::Full {
            state.leave_rest(config, scratch)?;
        }
        if let Some(MergingPool(memories)) = of_kind(&mut *state.far) {
            for (memory, log) in memories.iter_mut().zip(&mut self.logs) {
                log.merges = memory.log.take().unwrap_or_default();
            }
        }
        Ok(())
    }
}

/// Some tokens of a head, and queries. Without learning there may be more keys than queries, which
/// nobody asks.
fn piece<'a, T>(
    mut q: ArrayView3<'a, T>,
    tokens: [ArrayView2<'a, T>; 2],
    [of_tokens, asked]: [Range<usize>; 2],
    out: ArrayViewMut3<'a, T>,
) -> Head<'a, T> {
    let [k, v] = tokens.map(|x| rows(x, of_tokens.clone()));
    q.slice_axis_inplace(Axis(1), Slice::from(asked));
    Head::group(q, k, v, out)
}
