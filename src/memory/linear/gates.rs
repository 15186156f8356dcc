//! Log decays of the tokens of a chunk, and what they do to a group of them.

use crate::error::Error;
use crate::kernel;
use crate::kernel::buffer::Buffer;
use crate::kernel::loops::decay::RowDecay;
use crate::memory::linear::bounds::Size;
use crate::memory::linear::chunk::Chunk;
use crate::memory::linear::decay::LogDecay;
use crate::memory::linear::log_scale::LogScale;
use crate::memory::linear::state_decay::StateDecay;
use crate::scalar::Scalar;
use crate::views;
use core::ops::Range;
use ndarray::ArrayView2;

/// The most that the features of a group of tokens may decay from its first to its last, in
/// natural-log units: their factors stay well within the range of the number types.
const GROUP_DECAY: f64 = 20.0;

/// The most that the log scale of a single token may lie above that of a state whose sums decay,
/// before they are brought to it, in natural-log units: a decode step then changes sums only now
/// and then.
const STEP_RISE: f64 = 8.0;

/// What a token lets decay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rates {
    /// Nothing.
    None,
    /// All features alike.
    Common,
    /// Each feature by a rate of its own.
    PerFeature,
}

/// Log decays of the tokens of a chunk, each of all that came before its token.
#[derive(Debug)]
pub(super) struct Gates<T> {
    /// Numbers of each token.
    width: usize,
    /// `[tokens, width]`.
    values: Buffer<T>,
    /// `[tokens, width]`: what has been forgotten since a group began.
    since: Buffer<T>,
    /// The log scales of queries before they were shifted.
    query_scale: Buffer<T>,
    /// What is to be done to sums.
    state_decay: StateDecay<T>,
    /// The query of a single token as the decay of its features leaves it.
    query: Buffer<T>,
    squares: Buffer<T>,
    factors: Buffer<T>,
}

impl<T: Scalar> Gates<T> {
    pub(super) fn new() -> Self {
        Self {
            width: 0,
            values: Buffer::new(),
            since: Buffer::new(),
            query_scale: Buffer::new(),
            state_decay: StateDecay::new(),
            query: Buffer::new(),
            squares: Buffer::new(),
            factors: Buffer::new(),
        }
    }

    /// Takes the log decays of a chunk, `gates [tokens, 1 or features]`, together with those of the
    /// kernel. Rows count from `first_row`.
    pub(super) fn set(
        &mut self,
        decay: Option<&LogDecay<T>>,
        gates: Option<ArrayView2<'_, T>>,
        tokens: usize,
        first_row: usize,
    ) -> Result<(), Error> {
        let Some(decay) = decay else {
            self.width = 0;
            return Ok(());
        };
        self.width = gates.map_or(1, |gates| gates.ncols()).max(decay.channels.len());
        self.values.resize(tokens * self.width);
        if let Some(gates) = gates {
            check_gates(gates, first_row)?;
        }
        for (t, row) in self.values.chunks_exact_mut(self.width).enumerate() {
            match &*decay.channels {
                [] => row.fill(decay.common),
                channels => row.copy_from_slice(channels),
            }
            let Some(gates) = gates else { continue };
            let gates = views::row(gates, t);
            match gates.to_slice() {
                _ if gates.len() < row.len() => row.iter_mut().for_each(|value| *value += gates[0]),
                Some(gates) => row.iter_mut().zip(gates).for_each(|(value, &gate)| *value += gate),
                None => row.iter_mut().zip(gates).for_each(|(value, &gate)| *value += gate),
            }
        }
        Ok(())
    }

    /// What decays.
    pub(super) fn rates(&self) -> Rates {
        match self.width {
            0 => Rates::None,
            1 => Rates::Common,
            _ => Rates::PerFeature,
        }
    }

    /// The log decays of one token.
    pub(super) fn row(&self, token: usize) -> &[T] {
        &self.values[token * self.width..(token + 1) * self.width]
    }

    /// What one token does to sums.
    pub(super) fn decay_before(&mut self, token: usize) -> &StateDecay<T> {
        self.state_decay.set(&self.values[token * self.width..(token + 1) * self.width]);
        &self.state_decay
    }

    /// What a group does to sums between its beginning and this token, its last.
    pub(super) fn decay_since(&mut self, token: usize) -> &StateDecay<T> {
        self.state_decay.set(&self.since[token * self.width..(token + 1) * self.width]);
        &self.state_decay
    }

    /// The log scale to which the decay of a token takes sums.
    pub(super) fn scale_before(&self, token: usize, scale: LogScale<T>) -> LogScale<T> {
        scale.decayed(kernel::max(self.row(token)))
    }

    /// What has been forgotten between the first token of a group and this one.
    pub(super) fn since(&self, token: usize) -> &[T] {
        &self.since[token * self.width..(token + 1) * self.width]
    }

    /// Whether features decay differently, and one token lets them by so little that they may do so
    /// within a group.
    pub(super) fn is_in_range(&self, token: usize) -> bool {
        self.rates() == Rates::PerFeature && in_range(self.row(token))
    }

    /// Sums the log decays from `start` on, its own with them or without, see
    /// [`since`](Self::since).
    pub(super) fn sum_from(&mut self, start: usize, with_first: bool) {
        let width = self.width;
        self.since.resize(self.values.len());
        let (values, since) = (&self.values[start * width..], &mut self.since[start * width..]);
        if with_first {
            since[..width].copy_from_slice(&values[..width]);
        } else {
            since[..width].fill(T::zero());
        }
        if width == 1 {
            let mut sum = since[0];
            for (since, &value) in since.iter_mut().zip(values).skip(1) {
                sum += value;
                *since = sum;
            }
            return;
        }
        for t in 1..values.len() / width {
            let (before, after) = since.split_at_mut(t * width);
            let before = &before[(t - 1) * width..];
            for ((after, &before), &value) in after.iter_mut().zip(before).zip(&values[t * width..])
            {
                *after = before + value;
            }
        }
    }

    /// The end of the tokens from `start` on whose features stay in range, of a chunk of so many;
    /// where all features are the same, log scales tell.
    pub(super) fn last(&self, start: usize, tokens: usize) -> usize {
        // sums only fall, so the last one tells whether a search is needed
        if self.width == 1 || in_range(self.since(tokens - 1)) {
            return tokens;
        }
        (start..tokens).find(|&t| !in_range(self.since(t))).unwrap_or(tokens)
    }

    /// Writes the decay of a group into its queries and keys, as seen from where its sums begin:
    /// `e^b·φ(q)` and `e^{−b}·φ(k)`, with the log decay b since then. It goes into their log
    /// scales, or where features differ, into these.
    pub(super) fn decay_group(
        &mut self,
        group: &mut Chunk<T>,
        features: usize,
        tokens: Range<usize>,
    ) {
        let width = self.width;
        let since = &self.since[tokens.start * width..tokens.end * width];
        if width == 1 {
            self.query_scale.resize(since.len());
            self.query_scale.copy_from_slice(&group.query_scale[..since.len()]);
            let scales = group.query_scale.iter_mut().zip(group.key_scale.iter_mut());
            for ((query, key), &since) in scales.zip(since) {
                *query += since;
                *key -= since;
            }
            return;
        }
        self.squares.resize(group.width);
        self.factors.resize(features * group.width);
        let row = |t: usize| &since[t * width..(t + 1) * width];
        let log2_e = T::from_f64(core::f64::consts::LOG2_E);
        kernel::transpose(tokens.len(), &row, log2_e, &mut self.squares, &mut self.factors);
        let size = features * group.width;
        kernel::decay_queries_and_keys(
            &mut self.factors,
            &mut group.queries[..size],
            &mut group.keys[..size],
        );
    }

    /// After [`decay_group`](Self::decay_group) of features: `e^b`, `[features, width]`.
    pub(super) fn feature_decays(&self) -> &[T] {
        &self.factors
    }

    /// Takes [`decay_group`](Self::decay_group) back from the log scales of queries.
    pub(super) fn restore_query_scales(&self, group: &mut Chunk<T>) {
        group.query_scale[..self.query_scale.len()].copy_from_slice(&self.query_scale);
    }

    /// After [`decay_group`](Self::decay_group) of features: the keys and their sums as seen from
    /// the last token.
    pub(super) fn bring_keys_to_end(&self, group: &mut Chunk<T>, key_sums: &mut [T]) {
        let (width, last) = (group.width, group.tokens - 1);
        let rows = group.keys.chunks_exact_mut(width).zip(self.factors.chunks_exact(width));
        for ((keys, factors), sum) in rows.zip(key_sums) {
            kernel::scale(keys, factors[last]);
            *sum *= factors[last];
        }
    }

    /// For a chunk of one token: the log scale to which its decay takes sums of this one. Keeps
    /// what that does to [features](Self::of_features) and to a [query](Self::query).
    pub(super) fn decay_token(&mut self, token: &Chunk<T>, scale: LogScale<T>) -> LogScale<T> {
        if self.width == 0 {
            return scale;
        }
        self.state_decay.set(&self.values);
        if let Some(RowDecay { kept, change }) = self.state_decay.of_features() {
            self.query.resize(kept.len());
            let left = kept.iter().zip(change);
            for ((decayed, &query), (&kept, &change)) in
                self.query.iter_mut().zip(&*token.queries).zip(left)
            {
                *decayed = query * (kept + change);
            }
        }
        scale.decayed(self.state_decay.slowest)
    }

    /// What the features of a single token decay beyond the slowest, if they differ; see
    /// [`decay_token`](Self::decay_token).
    pub(super) fn of_features(&self) -> Option<RowDecay<'_, T>> {
        if self.rates() == Rates::PerFeature { self.state_decay.of_features() } else { None }
    }

    /// The query of a single token for sums whose features have not decayed yet, if they differ in
    /// that.
    pub(super) fn query(&self) -> Option<&[T]> {
        self.of_features().map(|_| &*self.query)
    }

    /// The common log scale of a token of a chunk and of sums that have decayed to `scale`. Sums
    /// that decay are brought to a larger one only now and then.
    pub(super) fn common_scale(&self, scale: LogScale<T>, chunk: &Chunk<T>, token: usize) -> T {
        // sums of large values leave no room
        let exact = self.width == 0 || chunk.values_size == Size::Large;
        let rise = if exact { T::zero() } else { T::from_f64(STEP_RISE) };
        let least = chunk.least_scale(token);
        if least <= scale.high + rise { scale.high } else { least }
    }
}

/// Every log decay must be 0 or less.
pub(super) fn check_gates<T: Scalar>(
    gates: ArrayView2<'_, T>,
    first_row: usize,
) -> Result<(), Error> {
    // one comparison after the other, with no way out: that is fast
    let usable = |all: bool, gate: &T| all & (*gate <= T::zero());
    if gates
        .as_slice()
        .map_or_else(|| gates.iter().fold(true, usable), |gates| gates.iter().fold(true, usable))
    {
        return Ok(());
    }
    match gates.indexed_iter().find(|(_, gate)| !usable(true, gate)) {
        Some(((row, column), bad)) => Err(Error::InvalidOption {
            which: "log_decay",
            found: format!("{bad} at row {}, column {column}", first_row + row),
            needed: "0 or less; −∞ forgets all that came before",
        }),
        None => Ok(()),
    }
}

/// Whether the features of a group may have decayed so far.
fn in_range<T: Scalar>(log_decay: &[T]) -> bool {
    kernel::max_abs(log_decay) <= T::from_f64(GROUP_DECAY)
}
