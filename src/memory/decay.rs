//! What a linear memory forgets before it absorbs a token: decays of the kernel, and log decays that come with the tokens.

use super::linear::Chunk;
use crate::kernel::{self, Buffer, columns};
use crate::{Error, Scalar, check, views};
use core::ops::Range;
use ndarray::ArrayView2;

/// The most that the features of a group of tokens may decay from its first to its last, in natural-log units: their factors stay well
/// within the range of the number types.
const GROUP_FADE: f64 = 20.0;

/// How a kernel forgets: `ln α_ti = ln γ + ln γ_i + g_ti` for token t and feature i, each part if there is one.
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
    /// In logarithms, or `None` if nothing is forgotten.
    pub(crate) fn prepare<T: Scalar>(&self, features: usize) -> Result<Option<LogDecay<T>>, Error> {
        if *self == Self::default() {
            return Ok(None);
        }
        let channels = self.channels.as_deref().unwrap_or_default();
        if self.channels.is_some() {
            check::size("decay", "elements", features, channels.len())?;
        }
        if let Some(bad) = channels.iter().chain([&self.common]).find(|&&decay| !(0.0..=1.0).contains(&decay)) {
            return Err(Error::InvalidOption { which: "decay", found: bad.to_string(), needed: "from 0 to 1" });
        }
        let log = |decay: f64| T::from_f64(libm::log(decay));
        let channels = channels.iter().map(|decay| log(decay * self.common)).collect();
        Ok(Some(LogDecay { common: log(self.common), channels, gated: self.gated }))
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

/// Log decays of the tokens of a chunk, each of all that came before its token.
#[derive(Debug)]
pub(crate) struct Gates<T> {
    /// Numbers of each token: none, one for the whole state, or one for each feature.
    pub(super) width: usize,
    /// `[tokens, width]`.
    values: Buffer<T>,
    /// `[tokens, width]`: what has been forgotten since the first token of a group, which is taken as 0.
    since: Buffer<T>,
    /// The log scales of queries before they were shifted.
    query_scale: Buffer<T>,
    /// What one token leaves of each feature, see [`kernel::FadeAndAdd`].
    pub(super) kept: Buffer<T>,
    pub(super) change: Buffer<T>,
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
            kept: Buffer::new(),
            change: Buffer::new(),
            query: Buffer::new(),
            squares: Buffer::new(),
            factors: Buffer::new(),
        }
    }

    /// Takes the log decays of a chunk, `gates [tokens, 1 or features]`, together with those of the kernel. Rows count from `first_row`.
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
        for (t, row) in self.values.chunks_exact_mut(self.width).enumerate() {
            match &*decay.channels {
                [] => row.fill(decay.common),
                channels => row.copy_from_slice(channels),
            }
            let Some(gates) = gates else { continue };
            let gates = views::row(gates, t);
            if let Some((column, bad)) = gates.iter().enumerate().find(|(_, gate)| gate.is_nan() || **gate > T::zero())
            {
                return Err(Error::InvalidOption {
                    which: "log_decay",
                    found: format!("{bad} at row {}, column {column}", first_row + t),
                    needed: "0 or less; −∞ forgets all that came before",
                });
            }
            let last = gates.len() - 1;
            row.iter_mut().enumerate().for_each(|(i, value)| *value += gates[i.min(last)]);
        }
        Ok(())
    }

    /// The log decays of one token.
    pub(super) fn row(&self, token: usize) -> &[T] {
        &self.values[token * self.width..(token + 1) * self.width]
    }

    /// What has been forgotten between the first token of a group and this one.
    pub(super) fn since(&self, token: usize) -> &[T] {
        &self.since[token * self.width..(token + 1) * self.width]
    }

    /// Sums the log decays from after `start` on, as far as the features stay in range; returns the token after the last.
    pub(super) fn sum_from(&mut self, start: usize) -> usize {
        let (width, limit) = (self.width, T::from_f64(GROUP_FADE));
        self.since.resize(self.values.len());
        let (values, since) = (&self.values[start * width..], &mut self.since[start * width..]);
        since[..width].fill(T::zero());
        if width == 1 {
            let mut sum = T::zero();
            for (since, &value) in since.iter_mut().zip(values).skip(1) {
                sum += value;
                *since = sum;
            }
            return start + values.len(); // the scales tell where it ends
        }
        for t in 1..values.len() / width {
            let (before, after) = since.split_at_mut(t * width);
            let before = &before[(t - 1) * width..];
            for ((after, &before), &value) in after.iter_mut().zip(before).zip(&values[t * width..]) {
                *after = before + value;
            }
        }
        // sums only fall, so the last one tells whether a search is needed
        let in_range = |row: &[T]| kernel::max_abs(row) <= limit;
        let rows = || since.chunks_exact(width);
        let tokens = if rows().next_back().is_some_and(in_range) {
            rows().len()
        } else {
            rows().take_while(|row| in_range(row)).count()
        };
        start + tokens
    }

    /// Writes the decay of a group into its queries and keys, as seen from its first token: into their log scales, or where features differ,
    /// into these.
    pub(super) fn fade(&mut self, group: &mut Chunk<T>, features: usize, tokens: Range<usize>) {
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
        columns::transpose(tokens.len(), &row, log2_e, &mut self.squares, &mut self.factors);
        let size = features * group.width;
        columns::fade(&mut self.factors, &mut group.queries[..size], &mut group.keys[..size]);
    }

    /// Takes [`fade`](Self::fade) back from the log scales of queries.
    pub(super) fn restore_query_scales(&self, group: &mut Chunk<T>) {
        group.query_scale[..self.query_scale.len()].copy_from_slice(&self.query_scale);
    }

    /// After [`fade`](Self::fade) of features: the keys and their sums as seen from the last token.
    pub(super) fn bring_keys_to_end(&self, group: &mut Chunk<T>, key_sums: &mut [T]) {
        let (width, last) = (group.width, group.tokens - 1);
        let rows = group.keys.chunks_exact_mut(width).zip(self.factors.chunks_exact(width));
        for ((keys, factors), sum) in rows.zip(key_sums) {
            kernel::scale(keys, factors[last]);
            *sum *= factors[last];
        }
    }

    /// For a chunk of one token: sets [`kept`](Self::kept), [`change`](Self::change) and [`query`](Self::query) to what the slowest feature
    /// decays less than the others, and returns by how much that one does.
    pub(super) fn fade_one(&mut self, query: &[T]) -> T {
        let slowest = kernel::max(&self.values);
        if self.width > 1 {
            self.kept.resize(self.width);
            self.change.resize(self.width);
            self.query.resize(self.width);
            let kept = self.kept.iter_mut().zip(self.change.iter_mut());
            for (((kept, change), faded), (&value, &query)) in
                kept.zip(self.query.iter_mut()).zip(self.values.iter().zip(query))
            {
                let fade = if value == slowest { T::zero() } else { value - slowest };
                // a small change is added, with its own digits; a large one leaves few of the sum
                (*kept, *change) = if fade > -T::one() { (T::one(), fade.exp_m1()) } else { (fade.exp(), T::zero()) };
                *faded = query * (*kept + *change);
            }
        }
        slowest
    }
}
