//! What a block of steps sees: how tokens leave the window, and what becomes of them, by the log.

use crate::attention::hybrid::backward::log::Log;
use crate::attention::hybrid::config::{Config, FarKind};
use crate::memory::seen_rows::SeenRows;
use crate::memory::softmax_gradient::Units;
use crate::scalar::Scalar;
use crate::views;
use core::ops::Range;
use ndarray::ArrayView2;

/// What is held beyond the window between two steps.
#[derive(Clone, Debug, Default)]
pub(super) struct Held<T> {
    /// Tokens that have left the window, that entries have taken in, and merges so far.
    left: usize,
    absorbed: usize,
    merges: usize,
    /// The positions of heavy keys.
    heavy: Vec<usize>,
    /// Keys and values of the entries, in their units, as padded rows; and what they count.
    keys: Vec<T>,
    values: Vec<T>,
    counts: Vec<f64>,
}

impl<T: Scalar> Held<T> {
    /// Entries.
    pub(super) fn entries(&self) -> usize {
        self.counts.len()
    }

    pub(super) fn clear(&mut self) {
        (self.left, self.absorbed, self.merges) = (0, 0, 0);
        self.heavy.clear();
        self.keys.clear();
        self.values.clear();
        self.counts.clear();
    }

    pub(super) fn copy_from(&mut self, other: &Self) {
        (self.left, self.absorbed, self.merges) = (other.left, other.absorbed, other.merges);
        self.heavy.clone_from(&other.heavy);
        self.keys.clone_from(&other.keys);
        self.values.clone_from(&other.values);
        self.counts.clone_from(&other.counts);
    }
}

/// Where a row beyond the window came from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Origin<T> {
    /// An entry from before the block.
    Before,
    /// The token at this position.
    Token(usize),
    /// The mean of two rows, with the share of the second.
    Mean([usize; 2], T),
}

/// A row that is gone while pairs are merged in rounds.
const GAP: usize = usize::MAX;

/// Keys and values of a head, and their units.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeyValues<'a, T> {
    pub(super) k: ArrayView2<'a, T>,
    pub(super) v: ArrayView2<'a, T>,
    pub(super) units: Units,
    /// Whether one more step follows, in which all that waits for its block leaves as well.
    pub(super) rest_leaves: bool,
}

impl<T: Scalar> KeyValues<'_, T> {
    fn push(self, rows: &mut SeenRows<T>, position: usize, seen: Range<usize>) -> usize {
        let [k, v] = [self.k, self.v].map(|x| views::row(x, position));
        rows.push([k, v], [self.units.k.inverse(), self.units.v.inverse()], seen)
    }
}

/// The rows of a block: those beyond the window first, in the order in which they came to be, then
/// the sinks and the window.
#[derive(Debug)]
pub(super) struct Flow<T> {
    pub(super) rows: SeenRows<T>,
    pub(super) origins: Vec<Origin<T>>,
    counts: Vec<f64>,
    /// Rows of the entries after the block, in order, and of heavy keys.
    pub(super) entries: Vec<usize>,
    heavy: Vec<usize>,
    /// Positions of the rows of sinks and window.
    pub(super) near: Vec<usize>,
    /// Positions of tokens that go to sums of features, and the first step that reads them.
    pub(super) arrivals: Vec<usize>,
    pub(super) from: Vec<usize>,
    passed: [usize; 3],
}

impl<T: Scalar> Flow<T> {
    pub(super) fn new() -> Self {
        Self {
            rows: SeenRows::new(),
            origins: Vec::new(),
            counts: Vec::new(),
            entries: Vec::new(),
            heavy: Vec::new(),
            near: Vec::new(),
            arrivals: Vec::new(),
            from: Vec::new(),
            passed: [0; 3],
        }
    }

    fn end_row(&mut self, origin: Origin<T>, count: f64) {
        self.origins.push(origin);
        self.counts.push(count);
    }

    /// Puts together what steps `steps` see beyond the window.
    pub(super) fn walk(
        &mut self,
        config: &Config<T>,
        log: &Log<T>,
        held: &Held<T>,
        steps: Range<usize>,
        tokens: KeyValues<'_, T>,
    ) {
        let n = steps.len();
        let near = config.sinks + config.window + config.block + n;
        // where heads share a budget, several pairs of one head may be merged in a step
        let absorbed = held.absorbed + n + config.block;
        let merges = log.merges.get(held.merges..).unwrap_or_default().iter();
        let merges = merges.take_while(|merge| merge.absorbed as usize <= absorbed).count();
        let beyond = held.counts.len() + held.heavy.len() + n + config.block + merges;
        self.rows.begin([tokens.k.ncols(), tokens.v.ncols()], near + beyond);
        self.origins.clear();
        self.counts.clear();
        self.entries.clear();
        self.heavy.clear();
        self.near.clear();
        self.arrivals.clear();
        self.from.clear();
        self.passed = [held.left, held.absorbed, held.merges];
        if config.is_window_only() {
            return;
        }
        let entries = held.counts.len();
        for (entry, &count) in held.counts.iter().enumerate() {
            let part = |x: &'_ [T]| x.len() / entries;
            let [stride, value_stride] = [part(&held.keys), part(&held.values)];
            let key = &held.keys[entry * stride..][..stride];
            let value = &held.values[entry * value_stride..][..value_stride];
            let row = self.rows.push_row([key, value], count, 0..n);
            self.entries.push(row);
            self.end_row(Origin::Before, count);
        }
        for &position in &held.heavy {
            let row = tokens.push(&mut self.rows, position, 0..n);
            self.heavy.push(row);
            self.end_row(Origin::Token(position), 1.0);
        }
        for (i, t) in steps.enumerate() {
            let leaving = if tokens.rest_leaves && t == tokens.k.nrows() {
                Some(config.held(t))
            } else {
                config.leaving(t)
            };
            for position in leaving.into_iter().flatten() {
                self.leave(config, log, position, i..n, tokens);
            }
            self.merge(config, log, i..n);
        }
    }

    /// A token leaves the window.
    fn leave(
        &mut self,
        config: &Config<T>,
        log: &Log<T>,
        position: usize,
        seen: Range<usize>,
        tokens: KeyValues<'_, T>,
    ) {
        let place = log.places.get(self.passed[0]).copied().flatten();
        self.passed[0] += 1;
        let is_kept = place.is_some() || matches!(config.far, FarKind::Merged { .. });
        let mut row = GAP;
        if is_kept {
            row = tokens.push(&mut self.rows, position, seen.clone());
            self.end_row(Origin::Token(position), 1.0);
        }
        let mut gone = position;
        if let Some(place) = place {
            let Some(heavy) = self.heavy.get_mut(place as usize) else {
                self.heavy.push(row);
                return;
            };
            row = core::mem::replace(heavy, row);
            if let Origin::Token(position) = self.origins[row] {
                gone = position;
            }
        }
        match &config.far {
            FarKind::Merged { .. } => {
                self.entries.push(row);
                self.passed[1] += 1;
                return;
            }
            FarKind::Linear(_) => {
                self.arrivals.push(gone);
                self.from.push(seen.start);
            }
            FarKind::None | FarKind::Own(_) => {}
        }
        if row != GAP {
            self.rows.seen[row].end = seen.start;
        }
    }

    /// Entries become one, as the log says.
    fn merge(&mut self, config: &Config<T>, log: &Log<T>, seen: Range<usize>) {
        let mut has_gaps = false;
        while let Some(merge) = log.merges.get(self.passed[2]) {
            if merge.absorbed as usize > self.passed[1] {
                break;
            }
            self.passed[2] += 1;
            let [i, j] = merge.pair.map(usize::from);
            let pair = [self.entries[i], self.entries[j]];
            let count = self.counts[pair[0]] + self.counts[pair[1]];
            for row in pair {
                self.rows.seen[row].end = seen.start;
            }
            let row = self.rows.push_mean(pair, merge.share, count, seen.clone());
            self.end_row(Origin::Mean(pair, merge.share), count);
            self.entries[i] = row;
            if config.block == 1 {
                self.entries.swap_remove(j);
            } else {
                self.entries[j] = GAP;
                has_gaps = true;
            }
        }
        if has_gaps {
            self.entries.retain(|&row| row != GAP);
        }
    }

    /// What is held after the block.
    pub(super) fn end(&self, held: &mut Held<T>) {
        held.clear();
        [held.left, held.absorbed, held.merges] = self.passed;
        for &row in &self.heavy {
            if let Origin::Token(position) = self.origins[row] {
                held.heavy.push(position);
            }
        }
        for &row in &self.entries {
            let [key, value] = self.rows.row(row);
            held.keys.extend_from_slice(key);
            held.values.extend_from_slice(value);
            held.counts.push(self.counts[row]);
        }
    }

    /// Adds the sinks and the window of the steps.
    pub(super) fn add_near(
        &mut self,
        config: &Config<T>,
        steps: Range<usize>,
        tokens: KeyValues<'_, T>,
    ) {
        let n = steps.len();
        for position in 0..config.sinks.min(steps.end) {
            tokens.push(&mut self.rows, position, position.saturating_sub(steps.start)..n);
            self.near.push(position);
        }
        let mut end = 0;
        for position in config.held(steps.start + 1).start..steps.end {
            while end < n && config.held(steps.start + end + 1).start <= position {
                end += 1;
            }
            let seen = position.saturating_sub(steps.start)..end;
            if !seen.is_empty() {
                tokens.push(&mut self.rows, position, seen);
                self.near.push(position);
            }
        }
    }

    /// Adds the sinks, and lets any query see all rows.
    pub(super) fn add_sinks(&mut self, config: &Config<T>, tokens: KeyValues<'_, T>) {
        for position in 0..config.sinks.min(tokens.k.nrows()) {
            tokens.push(&mut self.rows, position, 0..0);
            self.near.push(position);
        }
        self.rows.seen.fill(0..usize::MAX);
    }
}
