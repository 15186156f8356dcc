//! Exact softmax of a few queries over packed tokens, which are read as they are.

use crate::kernel;
use crate::kernel::buffer::{Buffer, padded};
use crate::memory::answer::Answer;
use crate::memory::packed::Packed;
use crate::memory::scoring::Scoring;
use crate::scalar::Scalar;

/// Keys that are scored at once.
const KEY_BLOCK: usize = 512;

/// Some queries over the first `keys` tokens.
pub(crate) struct PackedSoftmax<'a, T> {
    pub(crate) packed: &'a Packed,
    pub(crate) keys: usize,
    /// How each row is scored, and how many of the keys it sees: at least one.
    pub(crate) row: &'a dyn Fn(usize) -> (Scoring<T>, usize),
    /// `[rows, head_dim]`; what becomes of them is unspecified.
    pub(crate) queries: &'a mut [T],
    pub(crate) share: T,
}

impl<T: Scalar> PackedSoftmax<'_, T> {
    /// Sets the answer, whose denominators are 0 and whose log scales, to base 2, are −∞; its
    /// numerators have rows of `stride` numbers. `positions` begins with 0, 1, 2, .. where there
    /// are slopes.
    #[allow(clippy::cast_precision_loss)] // positions
    pub(crate) fn answer(
        self,
        positions: &mut Buffer<T>,
        scores: &mut Buffer<T>,
        factors: &mut Buffer<T>,
        stride: usize,
        answer: &mut Answer<T>,
    ) {
        let Self { packed, keys, row: of_row, queries, share } = self;
        let Answer { numerator, denominator, log_scale, tokens: rows, .. } = answer;
        let rows = *rows;
        factors.resize(rows);
        for (r, factor) in factors.iter_mut().enumerate() {
            *factor = of_row(r).0.base_2();
        }
        packed.set_units(queries, factors);
        numerator.fill(T::zero());
        scores.resize(rows * KEY_BLOCK);
        if (0..rows).any(|r| of_row(r).0.slope.is_some()) {
            positions.resize(KEY_BLOCK);
            (0..KEY_BLOCK).zip(positions.iter_mut()).for_each(|(i, x)| *x = T::from_f64(i as f64));
        }
        for first in (0..keys).step_by(KEY_BLOCK) {
            let count = KEY_BLOCK.min(keys - first);
            scores.fill(T::zero());
            packed.add_scores([first, padded::<T>(count)], [queries, factors], scores, KEY_BLOCK);
            for (r, scores) in scores.chunks_exact_mut(KEY_BLOCK).enumerate() {
                let (scoring, seen) = of_row(r);
                let (scores, hidden) = scores.split_at_mut(seen.saturating_sub(first).min(count));
                hidden.fill(T::zero());
                if scores.is_empty() {
                    continue;
                }
                if let Some(cap) = scoring.soft_cap {
                    cap.apply(scores);
                }
                if let Some(slope) = scoring.slope {
                    let to_first = T::from_f64((seen - 1 - first) as f64);
                    kernel::add_distances(scores, positions, [-to_first, T::one()], slope);
                }
                let old = log_scale[r];
                let new = old.max(kernel::max(scores));
                kernel::exp2_slice(scores, new);
                let correction = if old == new { T::one() } else { (old - new).exp2() };
                if correction != T::one() {
                    kernel::scale(&mut numerator[r * stride..(r + 1) * stride], correction);
                }
                denominator[r] = denominator[r] * correction + kernel::sum(scores);
                log_scale[r] = new;
                if share != T::one() {
                    kernel::scale(scores, share);
                }
            }
            packed.add_sums([first, count], (&*scores, KEY_BLOCK), numerator, stride);
        }
    }
}
