//! One token: its answer, and what it adds to the sums, together in one pass where that is safe.

use crate::error::Error;
use crate::kernel;
use crate::kernel::loops::decay::{DecayRows, RowDecay};
use crate::kernel::loops::decode::{DecayStep, DecodeStep, LetWait, ReadSums};
use crate::memory::answer::Answer;
use crate::memory::answer::Readout;
use crate::memory::linear::bounds::{Size, least_denominator};
use crate::memory::linear::chunk::Chunk;
use crate::memory::linear::gates::Gates;
use crate::memory::linear::log_scale::LogScale;
use crate::memory::linear::pass::PassBuffers;
use crate::memory::linear::state::State;
use crate::scalar::Scalar;
use ndarray::ArrayViewMut2;

/// How a token and sums come to a common log scale.
#[derive(Clone, Copy, Debug)]
pub(super) struct Meeting<T> {
    pub(super) log_scale: T,
    /// What brings the key there.
    own: T,
    /// What brings the sums there.
    old: T,
}

impl<T: Scalar> Meeting<T> {
    /// Of a token and sums that have decayed to `scale`.
    pub(super) fn new(scale: LogScale<T>, token: &Chunk<T>, log_scale: T) -> Self {
        let moves = log_scale != scale.high;
        // relative to the sums, whose log scale may have digits that the common one lacks
        let low = if moves { T::zero() } else { scale.low };
        Self {
            log_scale,
            own: LogScale { high: token.key_scale[0], low: -low }.ratio_to(log_scale),
            old: if moves { scale.ratio_to(log_scale) } else { T::one() },
        }
    }

    /// Of a chunk of one token, with its gates.
    pub(super) fn of_chunk(scale: LogScale<T>, token: &Chunk<T>, gates: &Gates<T>) -> Self {
        let log_scale = gates.common_scale(scale, token, 0);
        Self::new(scale, token, log_scale)
    }

    /// `own·(q·k)` and the denominator, `own·(q·k) + old·(q·z)`; `decayed` is the query of the
    /// sums, if it is another.
    fn denominator(&self, state: &State<T>, token: &Chunk<T>, decayed: Option<&[T]>) -> [T; 2] {
        let features = state.features();
        let (query, key) = (&token.queries[..features], &token.keys[..features]);
        let own = self.own * kernel::dot(query, key);
        [own, own + self.old * kernel::dot(decayed.unwrap_or(query), &state.normalizer)]
    }
}

/// The answer of a token from itself and sums of other tokens:
///
/// ```text
/// numerator = own·(q·k)·v + old·qᵀS,    denominator = own·(q·k) + old·(q·z).
/// ```
///
/// `decayed` is the query of the sums where the decay of features is not in them yet.
pub(super) fn read<T: Scalar>(
    state: &State<T>,
    token: &Chunk<T>,
    meeting: Meeting<T>,
    decayed: Option<&[T]>,
    answer: &mut Answer<T>,
) {
    let [own, denominator] = meeting.denominator(state, token, decayed);
    let query = decayed.unwrap_or(&token.queries[..state.features()]);
    answer.resize(1, 1, state.stride());
    answer.denominator[0] = denominator;
    ReadSums {
        own,
        old: meeting.old,
        q: query,
        v: &token.values,
        sum: &state.sums,
        keys: &state.pending.keys,
        stride: state.pending.key_stride(),
        values: state.pending.values(),
        answer: &mut answer.numerator,
    }
    .run();
    answer.log_scale[0] = token.query_scale[0] + meeting.log_scale;
}

/// Adds a token to sums beside which none waits: `S ← old·diag(α)·S + own·k vᵀ`,
/// `z ← old·α ⊙ z + own·k`, where α is what features decay beyond the slowest, if they do. The key
/// is overwritten.
pub(super) fn absorb<T: Scalar>(
    state: &mut State<T>,
    token: &mut Chunk<T>,
    meeting: Meeting<T>,
    decay: Option<RowDecay<'_, T>>,
) {
    debug_assert!(state.pending.is_empty());
    state.rescale(meeting.log_scale);
    let keys = &mut token.keys[..state.normalizer.len()];
    if meeting.own != T::one() {
        kernel::scale(keys, meeting.own);
    }
    let (sums, sums_low) = (&mut state.sums, &mut state.sums_low);
    let (normalizer, normalizer_low) = (&mut state.normalizer, &mut state.normalizer_low);
    if let Some(decay) = decay {
        DecayRows { decay, factors: keys, x: &token.values, sum: sums, low: sums_low }.run();
        let one = &[T::one()];
        DecayRows { decay, factors: keys, x: one, sum: normalizer, low: normalizer_low }.run();
    } else {
        kernel::add_outer(sums, sums_low, keys, &token.values);
        kernel::add_compensated(normalizer, normalizer_low, T::one(), keys);
    }
    state.tokens += 1;
}

/// Lets a token wait beside the sums, and adds all that wait to them once there are enough.
fn let_wait<T: Scalar>(state: &mut State<T>, token: &Chunk<T>, meeting: Meeting<T>) {
    state.rescale(meeting.log_scale);
    let State { normalizer, normalizer_low, pending, .. } = &mut *state;
    LetWait {
        factor: meeting.own,
        k: &token.keys[..normalizer.len()],
        v: &token.values,
        z: normalizer,
        z_low: normalizer_low,
        waiting: pending.waiting(),
    }
    .run();
    count_waiting(state);
}

/// Counts a token that waits.
fn count_waiting<T: Scalar>(state: &mut State<T>) {
    state.tokens += 1;
    state.pending.count_one();
    if state.pending.is_full() {
        state.settle();
    }
}

/// The least denominator and the log scale of the answer for [`read_and_wait`] and
/// [`read_and_absorb`], and the size of all values then, if either is known to be in range.
fn in_range<T: Scalar>(
    state: &State<T>,
    token: &Chunk<T>,
    meeting: Meeting<T>,
    readout: Readout,
) -> Option<(T, T, Size)> {
    if state.tokens == 0 || meeting.log_scale != state.scale.high {
        return None;
    }
    let size = state.size.max(token.values_size);
    let log_scale = token.query_scale[0] + meeting.log_scale;
    least_denominator(readout, size, state.features(), log_scale)
        .map(|least| (least, log_scale, size))
}

/// [`read`], the output and [`let_wait`] in one pass over the sums, if they can neither fail
/// half-way nor need another log scale: `false` says that nothing was done.
fn read_and_wait<T: Scalar>(
    state: &mut State<T>,
    token: &Chunk<T>,
    meeting: Meeting<T>,
    readout: Readout,
    answer: &mut Answer<T>,
    out: &mut [T],
) -> bool {
    let Some((least, log_scale, size)) = in_range(state, token, meeting, readout) else {
        return false;
    };
    let features = state.features();
    answer.resize(1, 1, state.stride());
    let denominator = DecodeStep {
        factor: meeting.own,
        least,
        q: &token.queries[..features],
        k: &token.keys[..features],
        v: &token.values,
        z: &mut state.normalizer,
        z_low: &mut state.normalizer_low,
        sum: &state.sums,
        waiting: state.pending.waiting(),
        scale: match readout {
            Readout::Normalized => None,
            Readout::Unnormalized => Some((log_scale * T::from_f64(0.5)).exp()),
        },
        answer: &mut answer.numerator,
        out,
    }
    .run();
    if !(denominator.is_finite() && denominator >= least) {
        return false;
    }
    state.size = size;
    count_waiting(state);
    true
}

/// [`read`] and [`absorb`] in one pass over sums that decay and beside which no token waits, if
/// they can neither fail half-way nor need another log scale: `false` says that nothing was done.
fn read_and_absorb<T: Scalar>(
    state: &mut State<T>,
    token: &mut Chunk<T>,
    (past, decay): (&[T], RowDecay<'_, T>),
    meeting: Meeting<T>,
    readout: Readout,
    answer: &mut Answer<T>,
) -> bool {
    let Some((least, log_scale, size)) = in_range(state, token, meeting, readout) else {
        return false;
    };
    let features = state.features();
    answer.resize(1, 1, state.stride());
    let denominator = DecayStep {
        factor: meeting.own,
        least,
        q: &token.queries[..features],
        past,
        decay,
        k: &mut token.keys[..features],
        v: &token.values,
        z: &mut state.normalizer,
        z_low: &mut state.normalizer_low,
        sum: &mut state.sums,
        low: &mut state.sums_low,
        answer: &mut answer.numerator,
    }
    .run();
    if !(denominator.is_finite() && denominator >= least) {
        return false;
    }
    answer.denominator[0] = denominator;
    answer.log_scale[0] = log_scale;
    state.size = size;
    state.tokens += 1;
    true
}

/// The output of a chunk of one token, which is absorbed: the decode step. On an error in row 0
/// the state is what it was.
pub(super) fn extend<T: Scalar>(
    state: &mut State<T>,
    buffers: &mut PassBuffers<T>,
    mut out: ArrayViewMut2<'_, T>,
    readout: Readout,
    row: usize,
) -> Result<(), Error> {
    let PassBuffers { chunk: token, gates, answer, before, .. } = buffers;
    let old_scale = state.scale;
    state.scale = gates.decay_token(token, old_scale);
    let meeting = Meeting::of_chunk(state.scale, token, gates);
    if let Some(decay) = gates.query().zip(gates.of_features()) {
        if state.pending.is_empty()
            && read_and_absorb(state, token, decay, meeting, readout, answer)
        {
            return answer.write(row, readout, out);
        }
    } else if state.pending.has_room()
        && let Some(out) = out.as_slice_mut()
        && read_and_wait(state, token, meeting, readout, answer, out)
    {
        return Ok(());
    }
    read(state, token, meeting, gates.query(), answer);
    if let Err(error) = answer.write(row, readout, out) {
        state.scale = old_scale;
        return Err(error);
    }
    if token.values_size == Size::Large && row == 0 {
        before.copy_from(state);
        before.scale = old_scale;
    }
    if token.values_size < Size::Large && state.pending.has_room() && gates.of_features().is_none()
    {
        let_wait(state, token, meeting);
    } else {
        state.settle();
        absorb(state, token, meeting, gates.of_features());
    }
    let result = state.check_size(token.values_size, row);
    if result.is_err() && row == 0 {
        state.copy_from(before);
    }
    result
}

/// The output of a chunk of one token as if it had been absorbed; the state stays as it is.
pub(super) fn peek<T: Scalar>(
    state: &State<T>,
    buffers: &mut PassBuffers<T>,
    out: ArrayViewMut2<'_, T>,
    readout: Readout,
) -> Result<(), Error> {
    let PassBuffers { chunk: token, gates, answer, .. } = buffers;
    let scale = gates.decay_token(token, state.scale);
    let meeting = Meeting::of_chunk(scale, token, gates);
    read(state, token, meeting, gates.query(), answer);
    answer.write(0, readout, out)
}

/// Whether [`extend`] of a chunk of one token is known not to fail, and [`peek`] neither.
pub(super) fn is_safe<T: Scalar>(
    state: &State<T>,
    buffers: &mut PassBuffers<T>,
    readout: Readout,
) -> bool {
    let PassBuffers { chunk: token, gates, .. } = buffers;
    let scale = gates.decay_token(token, state.scale);
    let meeting = Meeting::of_chunk(scale, token, gates);
    let size = state.size.max(token.values_size);
    let log_scale = token.query_scale[0] + meeting.log_scale;
    // the state changes only after a denominator with the bits of this one, or of another that is
    // large enough as well
    least_denominator(readout, size, state.features(), log_scale).is_some_and(|least: T| {
        let [_, denominator] = meeting.denominator(state, token, gates.query());
        denominator.is_finite() && denominator >= least
    })
}
