//! Exact softmax of a few queries over packed tokens, which are read as they are.

use crate::kernel;
use crate::kernel::buffer::{Buffer, padded};
use crate::memory::answer::{Answer, SPAN, Total};
use crate::memory::packed::Packed;
use crate::memory::scoring::Scoring;
use crate::scalar::Scalar;

/// Keys that are scored at once.
const KEY_BLOCK: usize = SPAN;

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
    /// Sets the answer, which has the size of the queries, with log scales to base 2; its
    /// numerators have rows of `stride` numbers. `positions` begins with 0, 1, 2, .. where there
    /// are slopes.
    #[allow(clippy::cast_precision_loss)] // positions
    pub(crate) fn answer(
        self,
        positions: &mut Buffer<T>,
        scores: &mut Buffer<T>,
        factors: &mut Buffer<T>,
        stride: usize,
        (answer, total): (&mut Answer<T>, &mut Total<T>),
    ) {
        let Self { packed, keys, row: of_row, queries, share } = self;
        let rows = answer.tokens;
        factors.resize(rows);
        for (r, factor) in factors.iter_mut().enumerate() {
            *factor = of_row(r).0.base_2();
        }
        packed.set_units(queries, factors);
        let adds_up = keys > SPAN;
        if adds_up {
            total.begin(answer);
        }
        scores.resize(rows * KEY_BLOCK);
        if (0..rows).any(|r| of_row(r).0.slope.is_some()) {
            positions.resize(KEY_BLOCK);
            (0..KEY_BLOCK).zip(positions.iter_mut()).for_each(|(i, x)| *x = T::from_f64(i as f64));
        }
        for first in (0..keys).step_by(KEY_BLOCK) {
            if first > 0 {
                total.add(answer);
            }
            answer.numerator.fill(T::zero());
            answer.denominator.fill(T::zero());
            answer.log_scale.fill(T::neg_infinity());
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
                let largest = kernel::max(scores);
                kernel::exp2_slice(scores, largest);
                answer.denominator[r] = kernel::sum(scores);
                answer.log_scale[r] = largest;
                if share != T::one() {
                    kernel::scale(scores, share);
                }
            }
            let scores = (&**scores, KEY_BLOCK);
            packed.add_sums([first, count], scores, &mut answer.numerator, stride);
        }
        if adds_up {
            total.end(answer);
        }
    }
}
