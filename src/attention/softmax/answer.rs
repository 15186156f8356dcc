//! How softmax attention answers blocks of queries, or the query heads of a group.

use crate::attention::threads::Threads;
use crate::error::Error;
use crate::memory::answer::Readout;
use crate::memory::key_values::KeyValues;
use crate::memory::online_softmax::{
    QUERY_BLOCK, Tile, online_softmax_in_range, softmax_of_group_in_range,
};
use crate::memory::packed::Packed;
use crate::memory::scoring::Scoring;
use crate::memory::sight::{Sight, is_blind};
use crate::scalar::Scalar;
use crate::state_format::StateFormat;
use crate::views::rows;
use ndarray::{ArrayView2, ArrayView3, ArrayViewMut1, ArrayViewMut2, Axis};

/// With fewer scores than this, one thread answers.
#[cfg(feature = "rayon")]
const FEWEST_SCORES: usize = 1 << 18;

/// Answers query heads that see all of some packed tokens, one query of each.
pub(super) fn answer_group<T: Scalar>(
    q: ArrayView2<'_, T>,
    packed: (&Packed, usize),
    options: &dyn Fn(usize) -> (Scoring<T>, Option<T>),
    mut out: ArrayViewMut2<'_, T>,
    tile: &mut Tile<T>,
) -> Result<(), Error> {
    softmax_of_group_in_range(q, packed, &|g| options(g).0, tile, |answer| {
        for g in 0..answer.tokens {
            if let Some(logit) = options(g).1 {
                answer.add_sink(g, logit);
            }
        }
        // an error is about the one token of all of them
        let write = answer.write(0, Readout::Normalized, out.view_mut());
        write.map_err(Error::of_first_row)
    })
}

/// Where the answers to some queries go, `[n, d_v]`, and the natural logarithms of the sums of the
/// weights, `[n]`, if they are asked for.
#[derive(Debug)]
pub(super) struct Outputs<'a, T> {
    pub(super) out: ArrayViewMut2<'a, T>,
    pub(super) log_normalizer: Option<ArrayViewMut1<'a, T>>,
}

impl<T> Outputs<'_, T> {
    /// The first `n`, and the rest.
    fn split_at(self, n: usize) -> (Self, Self) {
        let (out, out_rest) = self.out.split_at(Axis(0), n);
        let (log_normalizer, rest) = match self.log_normalizer {
            Some(all) => {
                let (log_normalizer, rest) = all.split_at(Axis(0), n);
                (Some(log_normalizer), Some(rest))
            }
            None => (None, None),
        };
        (Self { out, log_normalizer }, Self { out: out_rest, log_normalizer: rest })
    }
}

/// Answers the queries of a block, with a learned sink if there is one; errors count rows from
/// `row`.
pub(super) fn answer_block<T: Scalar>(
    q: ArrayView2<'_, T>,
    key_values: KeyValues<'_, T>,
    (scoring, sink_logit): (Scoring<T>, Option<T>),
    sight: Sight<'_, T>,
    row: usize,
    mut to: Outputs<'_, T>,
    tile: &mut Tile<T>,
) -> Result<(), Error> {
    online_softmax_in_range(q, key_values, scoring, sight, tile, |answer| {
        if sight.may_hide_all() && sink_logit.is_none() {
            let blind = (0..answer.tokens).find(|&t| is_blind(answer.log_scale[t]));
            if let Some(t) = blind {
                return Err(Error::NothingSeen { row: row + t });
            }
        }
        if let Some(logit) = sink_logit {
            (0..answer.tokens).for_each(|row| _ = answer.add_sink(row, logit));
        }
        if let Some(log_normalizer) = &mut to.log_normalizer {
            let sums = answer.log_scale.iter().zip(&*answer.denominator);
            log_normalizer.iter_mut().zip(sums).for_each(|(to, (&scale, sum))| {
                *to = scale + sum.ln();
            });
        }
        answer.write(row, Readout::Normalized, to.out.view_mut())
    })
}

/// The biases of a query head.
pub(super) fn of_query_head<T>(bias: ArrayView3<'_, T>, g: usize) -> ArrayView2<'_, T> {
    let head = if bias.len_of(Axis(0)) == 1 { 0 } else { g };
    bias.index_axis_move(Axis(0), head)
}

/// Answers the queries block by block.
#[allow(clippy::too_many_arguments)]
pub(super) fn answer<T: Scalar>(
    q: ArrayView2<'_, T>,
    key_values: KeyValues<'_, T>,
    options: (Scoring<T>, Option<T>),
    sight: Sight<'_, T>,
    to: Outputs<'_, T>,
    #[cfg_attr(not(feature = "rayon"), allow(unused_variables))] threads: Threads,
    tile: &mut Tile<T>,
) -> Result<(), Error> {
    let n = q.nrows();
    #[cfg(feature = "rayon")]
    if threads.are_several()
        && n.saturating_mul(key_values.tokens()) >= FEWEST_SCORES
        && n > QUERY_BLOCK
        && rayon::current_num_threads() > 1
    {
        use rayon::prelude::*;
        let (mut blocks, mut rest) = (Vec::new(), to);
        for start in (0..n).step_by(QUERY_BLOCK) {
            let (block, after) = rest.split_at(QUERY_BLOCK.min(n - start));
            blocks.push(block);
            rest = after;
        }
        let answered =
            blocks.into_par_iter().enumerate().map_init(Tile::new, |tile, (block, to)| {
                let start = block * QUERY_BLOCK;
                let range = start..n.min(start + QUERY_BLOCK);
                let (q, sight) = (rows(q, range.clone()), sight.of(range));
                answer_block(q, key_values, options, sight, start, to, tile)
            });
        let results: Vec<_> = answered.collect();
        return results.into_iter().collect();
    }
    let mut rest = to;
    for start in (0..n).step_by(QUERY_BLOCK) {
        let count = QUERY_BLOCK.min(n - start);
        let (to, after) = rest.split_at(count);
        rest = after;
        let sight = sight.of(start..start + count);
        let q = rows(q, start..start + count);
        answer_block(q, key_values, options, sight, start, to, tile)?;
    }
    Ok(())
}

/// Keys and values as a cache of this format would have them.
pub(super) fn key_values<'a, T: Scalar>(
    format: StateFormat,
    k: ArrayView2<'a, T>,
    v: ArrayView2<'a, T>,
    kept: &'a mut Option<Packed>,
) -> KeyValues<'a, T> {
    if format == StateFormat::F32 {
        return KeyValues::Wide(k, v);
    }
    if kept
        .as_ref()
        .is_none_or(|kept| kept.format() != format || kept.dims() != [k.ncols(), v.ncols()])
    {
        *kept = Packed::new(format, k.ncols(), v.ncols());
    }
    let Some(packed) = kept else { return KeyValues::Wide(k, v) };
    packed.make_room(k.nrows());
    for (token, (k, v)) in k.outer_iter().zip(v.outer_iter()).enumerate() {
        packed.put(token, k, v);
    }
    KeyValues::Packed(packed, k.nrows())
}
