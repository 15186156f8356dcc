//! What a linear memory forgets before it absorbs a token: decays of the kernel, and log decays
//! that come with the tokens.

use super::linear::Chunk;
use crate::kernel;
use crate::kernel::buffer::Buffer;
use crate::kernel::loops::decay::RowDecay;
use crate::{Error, Scalar, check, views};
use core::ops::Range;
use ndarray::ArrayView2;

/// The most that the features of a group of tokens may decay from its first to its last, in
/// natural-log units: their factors stay well within the range of the number types.
const GROUP_FADE: f64 = 20.0;

/// How a kernel forgets: `ln α_ti = ln γ + ln γ_i + g_ti` for token t and feature i, each part if
/// there is one.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Decay {
    /// γ.
    pub(crate) common: f64,
    /// γ_i.
    pub(crate) channels: Option<Vec<f64>>,
    /// Whether each token brings g.
    pub(crate) gated: bool,
}

impl Default for Decay {
    fn default() -> Self {
        Self { common: 1.0, channels: None, gated: false }
    }
}

impl Decay {
    /// Whether nothing is forgotten.
    pub(crate) fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Fails unless it can be used.
    pub(crate) fn check(&self, features: usize) -> Result<(), Error> {
        let channels = self.channels.as_deref().unwrap_or_default();
        if self.channels.is_some() {
            check::size("decay", "elements", features, channels.len())?;
        }
        match channels.iter().chain([&self.common]).find(|&&decay| !(0.0..=1.0).contains(&decay)) {
            Some(bad) => {
                let found = bad.to_string();
                Err(Error::InvalidOption { which: "decay", found, needed: "from 0 to 1" })
            }
            None => Ok(()),
        }
    }
}

/// [`Decay`] in logarithms.
#[derive(Clone, Debug)]
pub(crate) struct LogDecay<T> {
    common: T,
    /// With the common one; empty if all are the same.
    channels: Vec<T>,
    pub(crate) gated: bool,
}

impl<T: Scalar> LogDecay<T> {
    pub(crate) fn new() -> Self {
        Self { common: T::zero(), channels: Vec::new(), gated: false }
    }

    /// Takes that of a kernel of so many features; returns whether anything is forgotten.
    pub(crate) fn set(&mut self, decay: &Decay, features: usize) -> Result<bool, Error> {
        decay.check(features)?;
        let log = |decay: f64| T::from_f64(libm::log(decay));
        self.common = log(decay.common);
        self.channels.clear();
        self.channels
            .extend(decay.channels.iter().flatten().map(|channel| log(channel * decay.common)));
        self.gated = decay.gated;
        Ok(!decay.is_none())
    }

    /// Whether all features decay alike, with these gates.
    #[cfg(feature = "rayon")]
    pub(crate) fn is_common(&self, gates: Option<ArrayView2<'_, T>>) -> bool {
        self.channels.is_empty() && gates.is_none_or(|gates| gates.ncols() == 1)
    }

    /// That of a kernel, if anything is forgotten.
    pub(crate) fn of(decay: &Decay, features: usize) -> Result<Option<Self>, Error> {
        let mut log_decay = Self::new();
        Ok(log_decay.set(decay, features)?.then_some(log_decay))
    }
}

/// Every log decay must be 0 or less.
fn check_gates<T: Scalar>(gates: ArrayView2<'_, T>, first_row: usize) -> Result<(), Error> {
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

/// Whether the features of a group may have faded so far.
fn in_range<T: Scalar>(log_decay: &[T]) -> bool {
    kernel::max_abs(log_decay) <= T::from_f64(GROUP_FADE)
}

/// What decay leaves of sums: as much of all as of the slowest feature, and of each `kept + change`
/// beyond that, which are empty if all are the same.
#[derive(Debug)]
pub(super) struct Fade<T> {
    /// In logarithms.
    pub(super) slowest: T,
    kept: Buffer<T>,
    change: Buffer<T>,
}

impl<T: Scalar> Fade<T> {
    /// If they differ.
    pub(super) fn of_features(&self) -> Option<RowDecay<'_, T>> {
        (!self.kept.is_empty()).then(|| RowDecay { kept: &self.kept, change: &self.change })
    }

    fn set(&mut self, log_decay: &[T]) {
        self.slowest = kernel::max(log_decay);
        let differ = if log_decay.len() > 1 { log_decay.len() } else { 0 };
        self.kept.resize(differ);
        self.change.resize(differ);
        self.kept.fill(T::one());
        if differ == 0 || self.slowest == T::neg_infinity() {
            self.change.fill(T::zero());
            return;
        }
        // a small change is to be added, with its own digits; a large one leaves few of the sum
        let mut all_small = true;
        for (change, &log_decay) in self.change.iter_mut().zip(log_decay) {
            let beyond = log_decay - self.slowest;
            all_small &= beyond > -T::one();
            *change = exp_minus_one(beyond.max(-T::one()));
        }
        if !all_small {
            for ((kept, change), &log_decay) in
                self.kept.iter_mut().zip(self.change.iter_mut()).zip(log_decay)
            {
                let beyond = log_decay - self.slowest;
                if beyond <= -T::one() {
                    (*kept, *change) = (beyond.exp(), T::zero());
                }
            }
        }
    }
}

/// `e^x − 1` for x from −1 to 0, to a few units in the last place: the series at x/8, and
/// `e^{2y} − 1 = (e^y − 1)(e^y − 1 + 2)` three times. Without branches, so that loops over it
/// become vectors.
#[inline]
fn exp_minus_one<T: Scalar>(x: T) -> T {
    const INVERSE_FACTORIALS: [f64; 10] = [
        1.0 / 39_916_800.0,
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
    ];
    let y = x * T::from_f64(0.125);
    let mut series = T::zero();
    for inverse in INVERSE_FACTORIALS {
        series = (series + T::from_f64(inverse)) * y;
    }
    let mut result = y + y * series;
    for _ in 0..3 {
        result = result * (result + T::from_f64(2.0));
    }
    result
}

/// Log decays of the tokens of a chunk, each of all that came before its token.
#[derive(Debug)]
pub(crate) struct Gates<T> {
    /// Numbers of each token: none, one for the whole state, or one for each feature.
    pub(super) width: usize,
    /// `[tokens, width]`.
    values: Buffer<T>,
    /// `[tokens, width]`: what has been forgotten since a group began.
    since: Buffer<T>,
    /// The log scales of queries before they were shifted.
    query_scale: Buffer<T>,
    /// What is to be done to sums.
    pub(super) fade: Fade<T>,
    /// One query, of which features have faded.
    pub(super) query: Buffer<T>,
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
            fade: Fade { slowest: T::zero(), kept: Buffer::new(), change: Buffer::new() },
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

    /// The log decays of one token.
    pub(super) fn row(&self, token: usize) -> &[T] {
        &self.values[token * self.width..(token + 1) * self.width]
    }

    /// Sets [`fade`](Self::fade) to the decay of one token.
    pub(super) fn fade_before(&mut self, token: usize) -> &Fade<T> {
        self.fade.set(&self.values[token * self.width..(token + 1) * self.width]);
        &self.fade
    }

    /// Sets [`fade`](Self::fade) to the decay up to the last token of a group.
    pub(super) fn fade_since(&mut self, token: usize) -> &Fade<T> {
        self.fade.set(&self.since[token * self.width..(token + 1) * self.width]);
        &self.fade
    }

    /// What has been forgotten between the first token of a group and this one.
    pub(super) fn since(&self, token: usize) -> &[T] {
        &self.since[token * self.width..(token + 1) * self.width]
    }

    /// Whether what one token lets fade is little enough for the features of a group.
    pub(super) fn is_mild(&self, token: usize) -> bool {
        self.width > 1 && in_range(self.row(token))
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
    /// into their log scales, or where features differ, into these.
    pub(super) fn fade_group(
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

    /// Takes [`fade_group`](Self::fade_group) back from the log scales of queries.
    pub(super) fn restore_query_scales(&self, group: &mut Chunk<T>) {
        group.query_scale[..self.query_scale.len()].copy_from_slice(&self.query_scale);
    }

    /// After [`fade_group`](Self::fade_group) of features: the keys and their sums as seen from the
    /// last token.
    pub(super) fn bring_keys_to_end(&self, group: &mut Chunk<T>, key_sums: &mut [T]) {
        let (width, last) = (group.width, group.tokens - 1);
        let rows = group.keys.chunks_exact_mut(width).zip(self.factors.chunks_exact(width));
        for ((keys, factors), sum) in rows.zip(key_sums) {
            kernel::scale(keys, factors[last]);
            *sum *= factors[last];
        }
    }

    /// What features of a single token decay beyond the slowest, after
    /// [`fade_one`](Self::fade_one).
    pub(super) fn of_features(&self) -> Option<RowDecay<'_, T>> {
        if self.width > 1 { self.fade.of_features() } else { None }
    }

    /// For a chunk of one token: sets [`fade`](Self::fade) to its decay, and [`query`](Self::query)
    /// to what that leaves of a query.
    pub(super) fn fade_one(&mut self, query: &[T]) {
        self.fade.set(&self.values);
        self.query.resize(self.fade.kept.len());
        let left = self.fade.kept.iter().zip(&*self.fade.change);
        for ((faded, &query), (&kept, &change)) in self.query.iter_mut().zip(query).zip(left) {
            *faded = query * (kept + change);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_changes_keep_their_digits() {
        for i in 0..2000 {
            let x = -f64::from(i) / 2000.0;
            for x in [x, x * 1e-3, x * 1e-9, x * 1e-300] {
                let (found, exact) = (exp_minus_one(x), x.exp_m1());
                assert!(
                    (found - exact).abs() <= 8.0 * f64::EPSILON * exact.abs(),
                    "{x}: {found} {exact}"
                );
            }
            #[allow(clippy::cast_possible_truncation)]
            let narrow = x as f32;
            let (found, exact) = (f64::from(exp_minus_one(narrow)), f64::from(narrow).exp_m1());
            assert!(
                (found - exact).abs() <= 8.0 * f64::from(f32::EPSILON) * exact.abs(),
                "{x}: {found} {exact}"
            );
        }
    }
}
