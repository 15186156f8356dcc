//! What a group of tokens and the sums do to each other: two reads and an update.
//!
//! With the decay b since where the sums begin, the common log scale L, and each key's own l, a
//! group is first brought to
//!
//! ```text
//! q̃_t = e^{b_t}·φ(q_t),    k̃_s = e^{l_s − b_s − L}·φ(k_s),
//! ```
//!
//! so that products `q̃_t·k̃_s` have the decay between the two tokens, and the steps know nothing of
//! it but where the sums go on to the end of the group.

use crate::kernel;
use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::loops::products::{Epilogue, Matrix, Product};
use crate::memory::answer::Answer;
use crate::memory::linear::chunk::Chunk;
use crate::memory::linear::gates::{Gates, Rates};
use crate::memory::linear::groups::Group;
use crate::memory::linear::state::State;
use crate::scalar::Scalar;

/// Queries of a group whose masked scores meet the values at once.
const VALUE_BLOCK: usize = 8;

/// Memory of the steps, whose content is theirs.
#[derive(Debug)]
pub(super) struct StepBuffers<T> {
    /// `[width, width]`, the masked scores of keys and queries.
    pub(super) scores: Buffer<T>,
    /// `[width]`, what has brought keys to the common log scale.
    pub(super) factors: Buffer<T>,
    /// `[num_features]`, the sums of the keys of a group.
    pub(super) key_sums: Buffer<T>,
}

impl<T: Scalar> StepBuffers<T> {
    pub(super) fn new() -> Self {
        Self { scores: Buffer::new(), factors: Buffer::new(), key_sums: Buffer::new() }
    }
}

/// Brings the mapped tokens of a group to q̃ and k̃, for the steps, and sums the latter. The decay b
/// of tokens since where the sums begin is one number, which moves log scales (q̃ then keeps it
/// there), or one for each feature, which changes the features themselves, or none.
pub(super) fn bring<T: Scalar>(
    tokens: &mut Chunk<T>,
    group: &Group<T>,
    gates: &mut Gates<T>,
    features: usize,
    buffers: &mut StepBuffers<T>,
) {
    if gates.rates() != Rates::None {
        gates.decay_group(tokens, features, group.tokens.clone());
    }
    tokens.rescale_keys(group.log_scale, features, &mut buffers.factors, &mut buffers.key_sums);
}

/// Inter-chunk read, the answer of the sums S and z, of log scale l, at the common log scale L:
///
/// ```text
/// numerator_t = e^{l − L}·q̃_tᵀS,    denominator_t = e^{l − L}·q̃_t·z.
/// ```
pub(super) fn read_state<T: Scalar>(
    state: &State<T>,
    tokens: &Chunk<T>,
    log_scale: T,
    answer: &mut Answer<T>,
) {
    let stride = state.stride();
    Product {
        m: tokens.tokens,
        n: stride,
        k: state.features(),
        a: Matrix::columns(&tokens.queries, tokens.width),
        b: &state.sums,
        ldb: stride,
        c: &mut answer.numerator,
        ldc: stride,
        into: Epilogue::Set,
    }
    .run();
    kernel::row_times_matrix(
        &state.normalizer,
        &tokens.queries,
        tokens.width,
        &mut answer.denominator,
    );
    scale_answer(answer, state.scale.ratio_to(log_scale));
}

/// Brings an answer to another log scale.
pub(super) fn scale_answer<T: Scalar>(answer: &mut Answer<T>, factor: T) {
    if factor != T::one() {
        kernel::scale(&mut answer.numerator, factor);
        kernel::scale(&mut answer.denominator, factor);
    }
}

/// The masked scores of keys and queries, `Aᵀ [width, width]`, with `A_ts = q̃_t·k̃_s` for s ≤ t,
/// else 0, and what they add to the denominators. Rows go in blocks of `T::PAD` keys; the columns
/// before the first of a block are not written.
pub(super) fn score_tokens<T: Scalar>(
    tokens: &Chunk<T>,
    features: usize,
    scores: &mut Buffer<T>,
    denominator: &mut [T],
) {
    let (count, width) = (tokens.tokens, tokens.width);
    scores.resize(width * width);
    // what lies above the diagonal of a block is wasted work
    for first in (0..count).step_by(T::PAD) {
        let last = count.min(first + T::PAD);
        Product {
            m: last - first,
            n: width - first,
            k: features,
            a: Matrix::columns(&tokens.keys[first..], width),
            b: &tokens.queries[first..],
            ldb: width,
            c: &mut scores[first * width + first..],
            ldc: width,
            into: Epilogue::Set,
        }
        .run();
        kernel::mask_and_add_rows(&mut scores[first * width..last * width], first, denominator);
    }
}

/// Intra-chunk read, what the tokens themselves add to the answer:
///
/// ```text
/// A_ts = q̃_t·k̃_s for s ≤ t, else 0,    numerator_t += Σ_s A_ts v_s,    denominator_t += Σ_s A_ts.
/// ```
///
/// Leaves Aᵀ in `scores`. If there was no inter-chunk read, numerators are set, and denominators
/// begin at 0.
pub(super) fn read_tokens<T: Scalar>(
    tokens: &Chunk<T>,
    features: usize,
    value_dim: usize,
    state_was_read: bool,
    scores: &mut Buffer<T>,
    answer: &mut Answer<T>,
) {
    let (count, width, stride) = (tokens.tokens, tokens.width, padded::<T>(value_dim));
    if !state_was_read {
        answer.denominator.fill(T::zero());
    }
    score_tokens(tokens, features, scores, &mut answer.denominator);
    for first in (0..count).step_by(VALUE_BLOCK) {
        let last = count.min(first + VALUE_BLOCK);
        Product {
            m: last - first,
            n: stride,
            k: last,
            a: Matrix::columns(&scores[first..], width),
            b: &tokens.values,
            ldb: stride,
            c: &mut answer.numerator[first * stride..],
            ldc: stride,
            into: if state_was_read { Epilogue::Add } else { Epilogue::Set },
        }
        .run();
    }
}

/// State update: with the decay B from where the sums began to the end of the group,
///
/// ```text
/// S ← e^B·(e^{l − L}·S + Σ_s k̃_s v_sᵀ),    z ← e^B·(e^{l − L}·z + Σ_s k̃_s),    l ← L.
/// ```
///
/// One decay for all features moves the log scale of the result. One for each is taken into both
/// terms before they are added, and into the keys themselves.
pub(super) fn update<T: Scalar>(
    state: &mut State<T>,
    tokens: &mut Chunk<T>,
    group: &Group<T>,
    gates: &mut Gates<T>,
    key_sums: &mut [T],
) {
    let last = group.tokens.end - 1;
    if gates.rates() == Rates::PerFeature {
        state.decay(gates.decay_since(last));
        gates.bring_keys_to_end(tokens, key_sums);
    }
    absorb(state, tokens, group.log_scale, key_sums);
    if gates.rates() == Rates::Common {
        state.decay(gates.decay_since(last));
    }
}

/// As [`update`], of tokens that let nothing decay, with keys at `log_scale`.
pub(super) fn absorb<T: Scalar>(
    state: &mut State<T>,
    tokens: &Chunk<T>,
    log_scale: T,
    key_sums: &[T],
) {
    state.rescale(log_scale);
    state.all_rows().add(&tokens.keys, tokens.width, &tokens.values, key_sums);
    state.tokens += tokens.tokens;
}
