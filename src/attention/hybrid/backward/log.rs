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
use crate::memory::merged::entries::Merge;
use crate::scalar::Scalar;
use crate::views::{row, rows};
use ndarray::{Array3, ArrayView3, Axis, Slice};

/// Tokens of a piece.
const PIECE: usize = 256;

/// What becomes of the tokens of one head.
#[derive(Debug, Default)]
pub(super) struct Log<T> {
    /// Of each token that leaves the window, where there are heavy keys: its place among them.
    pub(super) places: Vec<Option<u32>>,
    pub(super) merges: Vec<Merge<T>>,
}

/// A forward pass over heads that share one budget, of checked shapes and finite.
pub(super) fn record<T: Scalar>(
    config: &Config<T>,
    heads: &[HeadGradient<'_, T>],
    mask: Mask,
    state: &mut HybridState<T>,
    scratch: &mut HybridScratch<T>,
) -> Result<Vec<Log<T>>, Error> {
    let places = heads.iter().map(|head| places(config, head, mask));
    let mut logs: Vec<Log<T>> = places.map(|places| Log { places, merges: Vec::new() }).collect();
    if matches!(config.far, FarKind::Merged { .. }) {
        let merges = merges(config, heads, mask, state, scratch)?;
        logs.iter_mut().zip(merges).for_each(|(log, merges)| log.merges = merges);
    }
    Ok(logs)
}

/// Which tokens become heavy keys.
fn places<T: Scalar>(
    config: &Config<T>,
    head: &HeadGradient<'_, T>,
    mask: Mask,
) -> Vec<Option<u32>> {
    let (mut scores, mut scratch) = (Vec::new(), [Buffer::new(), Buffer::new()]);
    if config.heavy == 0 {
        return Vec::new();
    }
    let leaving = (0..head.keys()).filter_map(|t| config.leaving(t)).flatten();
    let rest = if mask == Mask::Full { config.held(head.keys()) } else { 0..0 };
    let place = |position| {
        let key = row(head.k, position);
        let score = config.static_score(key.iter().copied(), &mut scratch);
        #[allow(clippy::cast_possible_truncation)] // counted keys
        stay(&mut scores, config.heavy, score).map(|place| place as u32)
    };
    leaving.chain(rest).map(place).collect()
}

/// What is merged in each head.
fn merges<T: Scalar>(
    config: &Config<T>,
    heads: &[HeadGradient<'_, T>],
    mask: Mask,
    state: &mut HybridState<T>,
    scratch: &mut HybridScratch<T>,
) -> Result<Vec<Vec<Merge<T>>>, Error> {
    let value_dim = heads[0].v.ncols();
    let sizes = Sizes { heads: heads.len(), value_dim, deciding_columns: None };
    state.prepare(config, sizes)?;
    if let Some(MergingPool(memories)) = of_kind(&mut *state.far) {
        for memory in memories {
            memory.log = Some(Vec::new());
        }
    }
    let n = heads[0].keys();
    let piece = PIECE.min(n);
    let (group, learns) = (heads[0].group_len(), config.learns());
    // outputs, which nobody reads
    let shape = (if learns { group } else { 0 }, piece, value_dim);
    let mut out = vec![Array3::zeros(shape); heads.len()];
    for start in (0..n).step_by(PIECE) {
        let range = start..n.min(start + PIECE);
        let calls = heads.iter().zip(&mut out).map(|(head, out)| {
            let part = |x| rows(x, range.clone());
            let mut out = out.view_mut();
            out.slice_axis_inplace(Axis(1), Slice::from(..range.len()));
            let mut q: ArrayView3<'_, T> = head.q;
            // without learning there may be more keys than queries, which nobody asks
            let asked = if learns { range.clone() } else { 0..0 };
            q.slice_axis_inplace(Axis(1), Slice::from(asked));
            Head::group(q, part(head.k), part(head.v), out)
        });
        let mut calls: Vec<Head<'_, T>> = calls.collect();
        if learns {
            state.extend(config, &mut calls, scratch).map_err(|error| error.in_chunk(start))?;
            continue;
        }
        for i in 0..range.len() {
            state.take(config, &calls, i);
            state.leave(config, scratch).map_err(|error| error.in_chunk(start))?;
            state.tokens += 1;
        }
    }
    if mask == Mask::Full {
        state.leave_rest(config, scratch)?;
    }
    let Some(MergingPool(memories)) = of_kind(&mut *state.far) else { return Ok(Vec::new()) };
    Ok(memories.iter_mut().map(|memory| memory.log.take().unwrap_or_default()).collect())
}
