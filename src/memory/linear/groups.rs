//! Which tokens of a chunk meet the sums at once, and at which log scale.

use crate::kernel;
use crate::memory::linear::chunk::Chunk;
use crate::memory::linear::gates::{Gates, Rates};
use crate::memory::linear::log_scale::LogScale;
use crate::scalar::Scalar;
use core::ops::Range;

/// Groups with fewer tokens than this go token by token.
pub(super) const FEW_TOKENS: usize = 6;

/// The most that the running maximum of the log scales may rise within tokens that share one, in
/// natural-log units. Larger jumps begin a new group, so that a huge later key cannot push the
/// sums of earlier queries out of range.
const GROUP_RISE: f64 = 16.0;

/// Where the decay takes effect that the first token of a group brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FirstDecay {
    /// There is none, or the sums have it already.
    Done,
    /// In the sums, before they meet the group.
    InSums,
    /// In the group, which counts its decay from the sums as they are.
    InGroup,
}

/// Tokens of a chunk that meet the sums at once: one, or [`FEW_TOKENS`] and more.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Group<T> {
    /// Of the chunk.
    pub(super) tokens: Range<usize>,
    /// The log scale of the sums and of all keys, as seen from where the sums begin.
    pub(super) log_scale: T,
    pub(super) first_decay: FirstDecay,
}

impl<T: Scalar> Group<T> {
    pub(super) fn is_single(&self) -> bool {
        self.tokens.len() == 1
    }

    /// Whether it is all of a chunk, and may be changed where it lies.
    pub(super) fn is_in_place(&self, chunk: &Chunk<T>, gates: &Gates<T>) -> bool {
        // the features of a decay of each are not to be had back
        self.tokens == (0..chunk.tokens) && gates.rates() != Rates::PerFeature
    }
}

/// The groups of a chunk, in order. Where the next one ends depends on the sums that the last one
/// left, so each is asked for with their log scale.
#[derive(Debug)]
pub(super) struct Groups {
    start: usize,
    /// Tokens before this go one by one.
    alone_until: usize,
    /// Whether the sums have the decay of the next token.
    has_decayed: bool,
}

impl Groups {
    pub(super) fn new() -> Self {
        Self { start: 0, alone_until: 0, has_decayed: false }
    }

    /// The next group, for sums of this log scale: the longest run of tokens whose log scales rise
    /// little and whose features stay in range, or a single token where it would be short. Leaves
    /// in the gates the [sums](Gates::since) of decays from its beginning.
    pub(super) fn next<T: Scalar>(
        &mut self,
        chunk: &Chunk<T>,
        gates: &mut Gates<T>,
        scale: LogScale<T>,
    ) -> Option<Group<T>> {
        let start = self.start;
        if start == chunk.tokens {
            return None;
        }
        let decays = gates.rates() != Rates::None && !core::mem::take(&mut self.has_decayed);
        let decayed = if decays { gates.scale_before(start, scale) } else { scale };
        if start >= self.alone_until {
            let in_group = gates.is_in_range(start);
            let (end, log_scale) = if gates.rates() == Rates::None {
                run(chunk, start, scale.high)
            } else {
                gates.sum_from(start, in_group);
                let scale = if in_group { scale } else { decayed };
                run_with_decay(chunk, gates, start, scale.high)
            };
            if end - start >= FEW_TOKENS {
                self.start = end;
                let first_decay = match (decays, in_group) {
                    (false, _) => FirstDecay::Done,
                    (true, false) => FirstDecay::InSums,
                    (true, true) => FirstDecay::InGroup,
                };
                return Some(Group { tokens: start..end, log_scale, first_decay });
            }
        }
        self.start = start + 1;
        Some(Group {
            tokens: start..start + 1,
            log_scale: gates.common_scale(decayed, chunk, start),
            first_decay: if decays { FirstDecay::InSums } else { FirstDecay::Done },
        })
    }

    /// Goes back to the beginning of the last group, which has been read but not absorbed, and
    /// takes its tokens one by one.
    pub(super) fn split<T: Scalar>(&mut self, group: &Group<T>) {
        self.start = group.tokens.start;
        self.alone_until = group.tokens.end;
        self.has_decayed = group.first_decay == FirstDecay::InSums;
    }
}

/// The longest run of tokens from `start` whose running maximum stays within [`GROUP_RISE`] of
/// where it begins, for sums of this log scale: its end, and the maximum that it reaches.
pub(super) fn run<T: Scalar>(chunk: &Chunk<T>, start: usize, log_scale: T) -> (usize, T) {
    let lowest = log_scale.max(chunk.least_scale(start));
    let limit = lowest + T::from_f64(GROUP_RISE);
    let largest = kernel::max(&chunk.key_scale[start..chunk.tokens]) + chunk.headroom;
    if largest <= limit {
        return (chunk.tokens, lowest.max(largest));
    }
    let mut maximum = lowest;
    let mut stop = start;
    while stop < chunk.tokens && chunk.least_scale(stop) <= limit {
        maximum = maximum.max(chunk.least_scale(stop));
        stop += 1;
    }
    (stop, maximum)
}

/// As [`run`], of sums that decay: log scales count as seen from the first token, and features
/// must stay in range.
fn run_with_decay<T: Scalar>(
    chunk: &Chunk<T>,
    gates: &Gates<T>,
    start: usize,
    log_scale: T,
) -> (usize, T) {
    let last = gates.last(start, chunk.tokens);
    let common = gates.rates() == Rates::Common;
    let mut maximum = log_scale.max(chunk.least_scale(start));
    let limit = maximum + T::from_f64(GROUP_RISE);
    let mut stop = start + 1;
    while stop < last {
        let scale = chunk.least_scale(stop) - if common { gates.since(stop)[0] } else { T::zero() };
        if scale > limit {
            break;
        }
        maximum = maximum.max(scale);
        stop += 1;
    }
    (stop, maximum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::linear::decay::{Decay, LogDecay};

    /// Tokens whose keys have these log scales, and gates of a decay.
    fn chunk(scales: &[f64], decay: Option<&Decay>) -> (Chunk<f64>, Gates<f64>) {
        let (mut chunk, mut gates) = (Chunk::new(), Gates::new());
        chunk.resize(scales.len(), 2, 1);
        chunk.key_scale[..scales.len()].copy_from_slice(scales);
        let decay = decay.map(|decay| LogDecay::of(decay, 2).unwrap().unwrap());
        gates.set(decay.as_ref(), None, scales.len(), 0).unwrap();
        (chunk, gates)
    }

    /// The groups of a chunk, for sums that rise with them.
    fn all(chunk: &Chunk<f64>, gates: &mut Gates<f64>) -> Vec<Group<f64>> {
        let mut groups = Groups::new();
        let mut scale = LogScale::empty();
        core::iter::from_fn(|| {
            let group = groups.next(chunk, gates, scale)?;
            scale = LogScale::of(scale.high.max(group.log_scale));
            Some(group)
        })
        .collect()
    }

    #[test]
    fn a_jump_of_log_scales_begins_a_group_and_few_tokens_go_one_by_one() {
        let mut scales = [0.0; 20];
        scales[9] = 15.0;
        scales[12] = 40.0;
        scales[18] = 80.0;
        let (chunk, mut gates) = chunk(&scales, None);
        let groups = all(&chunk, &mut gates);
        let found: Vec<_> =
            groups.iter().map(|group| (group.tokens.clone(), group.log_scale)).collect();
        let expected = [(0..12, 15.0), (12..18, 40.0), (18..19, 80.0), (19..20, 80.0)];
        assert_eq!(found, expected);
    }

    #[test]
    fn decay_counts_from_the_first_token_of_a_group() {
        let common = Decay { common: (-0.9_f64).exp(), ..Decay::default() };
        let (chunk, mut gates) = chunk(&[0.0; 40], Some(&common));
        let groups = all(&chunk, &mut gates);
        // as seen from the first token, the key of token t has log scale 0.9·t
        assert_eq!(groups[0].tokens, 0..18);
        assert!((groups[0].log_scale - 15.3).abs() < 1e-12);
        assert!(groups.iter().all(|group| group.first_decay == FirstDecay::InSums));

        let channels = Decay { channels: Some(vec![1.0, (-2.1_f64).exp()]), ..Decay::default() };
        let (chunk, mut gates) = self::chunk(&[0.0; 40], Some(&channels));
        let groups = all(&chunk, &mut gates);
        assert_eq!(groups[0].tokens, 0..9, "features stay in range");
        assert_eq!(groups[0].first_decay, FirstDecay::InGroup);
    }

    #[test]
    fn a_group_that_is_split_goes_one_by_one_and_decays_once() {
        for (decay, in_sums) in [(None, false), (Some(0.5), true)] {
            let decay = decay.map(|common| Decay { common, ..Decay::default() });
            let (chunk, mut gates) = chunk(&[0.0; 16], decay.as_ref());
            let (mut groups, scale) = (Groups::new(), LogScale::of(0.0));
            let group = groups.next(&chunk, &mut gates, scale).unwrap();
            assert_eq!(group.tokens, 0..16);
            groups.split(&group);
            for t in 0..16 {
                let single = groups.next(&chunk, &mut gates, scale).unwrap();
                assert_eq!(single.tokens, t..t + 1);
                assert_eq!(single.first_decay == FirstDecay::InSums, in_sums && t > 0);
            }
            assert!(groups.next(&chunk, &mut gates, scale).is_none());
        }
    }
}
