//! Everything a hybrid kernel knows: sizes, which position has which slot, which leave when.

use crate::attention::hybrid::far::features::FarFeatures;
use crate::attention::hybrid::scores::{ExpectedAttention, StaticScore};
use crate::attention::sharing::Sharing;
use crate::check;
use crate::error::Error;
use crate::features::FeatureMap;
use crate::kernel::buffer::Buffer;
use crate::memory::Memory;
use crate::memory::merged::rule::{Distance, MOST_ENTRIES, MergeCost, Rule, check_entries};
use crate::memory::scoring::{SoftCap, of_query_head};
use crate::memory::slots::room_for;
use crate::scalar::Scalar;
use crate::state_format::StateFormat;
use core::fmt;
use core::ops::Range;
use std::sync::Arc;

/// Entries that stay in every head where heads share one budget.
pub(crate) const LEAST_ENTRIES: usize = 4;

/// Slots beyond a window that drops its tokens: so many steps are read at once, and the slots of
/// the tokens they drop are not yet used again.
pub(super) const WINDOW_ONLY_SLOTS: usize = 16;

/// How entries are weighed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Weighing {
    One,
    Expected,
    Received { decay: f64, min_age: usize },
}

/// Makes an empty memory of the user's own, for values of `value_dim` columns and a scale.
pub(super) type MakeMemory<T> =
    dyn Fn(usize, f64) -> Result<Box<dyn Memory<T>>, Error> + Send + Sync;

/// What the far memory is made by.
#[derive(Clone)]
pub(super) enum FarKind<T: Scalar> {
    None,
    Merged { rule: Rule, weighing: Weighing },
    Linear(FarFeatures<T>),
    Own(Arc<MakeMemory<T>>),
}

/// Everything a kernel knows.
#[derive(Clone)]
pub(crate) struct Config<T: Scalar> {
    pub(super) head_dim: usize,
    pub(super) scale: f64,
    /// Of exact tokens and merged entries.
    pub(super) format: StateFormat,
    pub(super) soft_cap: Option<SoftCap<T>>,
    /// None, one, or one for each query head of a group.
    pub(super) sink_logits: Vec<f64>,
    pub(super) window: usize,
    pub(super) sinks: usize,
    pub(super) heavy: usize,
    /// Tokens that leave the window at once.
    pub(super) block: usize,
    /// Slots of the window; tokens behind the sinks take them in turn.
    pub(super) ring: usize,
    pub(super) far: FarKind<T>,
    /// For heavy keys, and for the weights of entries.
    pub(super) scores: Option<StaticScore<T>>,
    pub(super) expected: Option<ExpectedAttention<T>>,
}

impl<T: Scalar> FarKind<T> {
    /// Merged entries, unless no memory can have so many.
    pub(super) fn merged(rule: Rule, weighing: Weighing) -> Result<Self, Error> {
        check::at_least_one("block", rule.block)?;
        check::at_least_one("entries", rule.entries)?;
        check_entries(rule.entries.saturating_add(rule.block))?;
        Ok(Self::Merged { rule, weighing })
    }

    pub(super) fn weighing(&self) -> Weighing {
        match self {
            Self::Merged { weighing, .. } => *weighing,
            _ => Weighing::One,
        }
    }
}

/// What needs a calibration has none.
pub(super) fn missing_calibration(needed: &'static str) -> Error {
    Error::InvalidOption { which: "calibration", found: "not set".to_owned(), needed }
}

impl<T: Scalar> fmt::Debug for Config<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let far: &dyn fmt::Debug = match &self.far {
            FarKind::None => &"none",
            FarKind::Merged { rule, .. } => rule,
            FarKind::Linear(features) => features,
            FarKind::Own(_) => &"a memory of the user",
        };
        let sizes = (self.head_dim, self.window, self.sinks, self.heavy, self.block);
        f.debug_struct("Config")
            .field("head_dim, window, sinks, heavy, block", &sizes)
            .field("scale", &self.scale)
            .field("soft_cap", &self.soft_cap.map(SoftCap::cap))
            .field("sink_logits", &self.sink_logits)
            .field("far", far)
            .finish_non_exhaustive()
    }
}

impl<T: Scalar> Config<T> {
    /// The factor of queries: scores are to base 2.
    pub(super) fn factor(&self) -> T {
        T::from_f64(self.scale * core::f64::consts::LOG2_E)
    }

    /// The learned sink of a query head.
    pub(super) fn sink_logit(&self, query_head: usize) -> Option<T> {
        of_query_head(&self.sink_logits, query_head).map(T::from_f64)
    }

    /// Refuses groups of other query heads than there are learned sinks.
    pub(super) fn check_group(&self, group: usize) -> Result<(), Error> {
        check::query_heads(&self.sink_logits, group)
    }

    /// Whether tokens that leave the window are just dropped.
    pub(super) fn is_window_only(&self) -> bool {
        matches!(self.far, FarKind::None) && self.heavy == 0
    }

    /// Whether what tokens receive is scaled to the number of query heads, as the product cost
    /// wants it.
    pub(super) fn scales_received(&self) -> bool {
        matches!(&self.far, FarKind::Merged { rule, .. } if rule.cost == MergeCost::Product)
    }

    /// Whether what is read changes the state.
    pub(crate) fn learns(&self) -> bool {
        matches!(self.far.weighing(), Weighing::Received { .. })
    }

    /// What heads share: entries that learn from what is read, of one head or of a pool.
    pub(crate) fn sharing(&self) -> Sharing {
        let (rule, decay, min_age) = match &self.far {
            FarKind::Merged { rule, weighing: Weighing::Received { decay, min_age } } => {
                (rule, decay, min_age)
            }
            FarKind::Own(_) => return Sharing::Group,
            _ if self.sink_logits.len() > 1 => return Sharing::Group,
            _ => return Sharing::Head,
        };
        let metric = match rule.metric {
            Distance::Identity => "identity",
            Distance::QueryDiagonal => "query diagonal",
            Distance::Matrix(_) => "calibrated",
        };
        let calibrated = metric == "calibrated" || rule.query_squares.is_some();
        let fits = !calibrated && self.heavy == 0 && rule.entries >= LEAST_ENTRIES;
        let most = MOST_ENTRIES.saturating_sub(rule.block) / rule.entries;
        let Self { head_dim, window, sinks, heavy, block, scale, sink_logits, .. } = self;
        let cap = self.soft_cap.map(SoftCap::cap);
        Sharing::Layer {
            options: format!(
                "head_dim {head_dim}, window {window}, sinks {sinks}, heavy {heavy}, \
                 block {block}, scale {scale}, soft_cap {cap:?}, sink_logits {sink_logits:?}, \
                 entries {}, metric {metric}, decay {decay}, \
                 min_age {min_age}, cost {:?}, {}",
                rule.entries,
                rule.cost,
                self.format.name()
            ),
            max_heads: if fits { most.max(1) } else { 1 },
        }
    }

    /// Slots of exact tokens: sinks, window, heavy keys, and one for a change of places.
    pub(super) fn near_slots(&self) -> usize {
        self.sinks + self.ring + self.heavy + usize::from(self.heavy > 0)
    }

    /// Of the [`near_slots`](Self::near_slots) those that have come into use with so many tokens;
    /// heavy keys only once a token has left the window.
    pub(super) fn near_used(&self, tokens: usize, has_left: bool) -> usize {
        if has_left && self.heavy > 0 {
            self.near_slots()
        } else {
            tokens.min(self.sinks + self.ring)
        }
    }

    /// Of the [`near_slots`](Self::near_slots) those to make room for, where the first `used` are
    /// taken. They are taken in order, so that this depends on the number of tokens alone.
    pub(super) fn near_room(&self, used: usize) -> usize {
        room_for(used, self.near_slots())
    }

    pub(super) fn far_slots(&self, heads: usize) -> usize {
        match &self.far {
            FarKind::Merged { rule, .. } => rule.entries * heads + rule.block,
            _ => 0,
        }
    }

    /// Numbers of the exact part of the state.
    pub(super) fn near_floats(&self, value_dim: usize) -> usize {
        let token = self.head_dim + value_dim;
        let received = usize::from(self.learns());
        self.sinks * token
            + (self.window + self.block - 1) * (token + received)
            + self.heavy * (token + 1 + received)
    }

    /// Bytes of the exact part of the state: keys and values in their format, all else in numbers.
    pub(super) fn near_bytes(&self, value_dim: usize) -> usize {
        let tokens = self.sinks + self.window + self.block - 1 + self.heavy;
        let wide = self.near_floats(value_dim) - tokens * (self.head_dim + value_dim);
        let rows = [self.head_dim, value_dim].map(|columns| self.format.row_bytes::<T>(columns));
        tokens * (rows[0] + rows[1]) + wide * size_of::<T>()
    }

    /// The slot of the token at this position.
    pub(super) fn slot(&self, position: usize) -> usize {
        match position.checked_sub(self.sinks) {
            None => position,
            Some(behind) => self.sinks + behind % self.ring,
        }
    }

    /// The positions that fell out of the window between token `first` and token `t`; with a window
    /// of 0, `first` itself.
    pub(super) fn expired(&self, first: usize, t: usize) -> Range<usize> {
        self.outside(first).saturating_sub(1).max(self.sinks)..self.outside(t)
    }

    /// The first position behind the sinks that is in the window of token `t`.
    pub(super) fn outside(&self, t: usize) -> usize {
        (t + 1).saturating_sub(self.window).max(self.sinks)
    }

    /// The positions that leave when token `t` has come, the oldest of the window.
    pub(super) fn leaving(&self, t: usize) -> Option<Range<usize>> {
        let count = (t + 1).checked_sub(self.sinks)?;
        let beyond = count.checked_sub(self.window)?;
        if self.is_window_only() || beyond == 0 || !beyond.is_multiple_of(self.block) {
            return None;
        }
        let first = self.sinks + beyond - self.block;
        Some(first..first + self.block)
    }

    /// How many steps from token `t` on, at least 1, are read before more tokens leave.
    pub(super) fn steps_at_once(&self, t: usize) -> usize {
        match &self.far {
            FarKind::Linear(_) | FarKind::Own(_) => 1,
            FarKind::None if self.is_window_only() => WINDOW_ONLY_SLOTS,
            FarKind::None | FarKind::Merged { .. } => {
                // the next t that makes `beyond` a positive multiple of the block
                let beyond = (t + 1).saturating_sub(self.sinks + self.window);
                let next = (beyond / self.block + 1) * self.block + self.sinks + self.window - 1;
                next - t
            }
        }
    }

    /// Tokens from this position on whose slots there is room for, once there is for the first: the
    /// rows of one product are of one width.
    pub(super) fn steps_of_room(&self, t: usize) -> usize {
        let slot = self.slot(t);
        let room = self.near_room(slot + 1);
        if room == self.near_slots() { usize::MAX } else { room - slot }
    }

    /// The positions in the window once `tokens` have come.
    pub(super) fn held(&self, tokens: usize) -> Range<usize> {
        let count = tokens.saturating_sub(self.sinks);
        let end = self.sinks.max(tokens);
        let held = match count.checked_sub(self.window) {
            Some(_) if self.is_window_only() => self.window,
            Some(beyond) => self.window + beyond % self.block,
            None => count,
        };
        end - held..end
    }

    /// The slots' positions that a step `t` must not see, of steps `first..newest`: later tokens,
    /// and what fell out of its window only since `first`.
    pub(super) fn hidden(
        &self,
        first: usize,
        t: usize,
        newest: usize,
    ) -> impl Iterator<Item = usize> {
        let gone = if self.is_window_only() { self.expired(first, t) } else { 0..0 };
        gone.chain(t + 1..newest)
    }

    /// The score of a heavy key.
    pub(super) fn static_score(
        &self,
        key: impl Iterator<Item = T>,
        [scaled, scratch]: &mut [Buffer<T>; 2],
    ) -> T {
        self.scaled(key, scaled);
        self.scores.as_ref().map_or(T::zero(), |score| score.of(scaled, scratch))
    }

    /// The attention a key is expected to receive.
    pub(super) fn expected_attention(
        &self,
        key: impl Iterator<Item = T>,
        [scaled, scratch]: &mut [Buffer<T>; 2],
    ) -> T {
        self.scaled(key, scaled);
        self.expected.as_ref().map_or(T::one(), |expected| expected.of(scaled, scratch))
    }

    pub(super) fn scaled(&self, key: impl Iterator<Item = T>, scaled: &mut Buffer<T>) {
        let root = T::from_f64(self.scale.sqrt());
        scaled.resize(self.head_dim);
        scaled.iter_mut().zip(key).for_each(|(to, x)| *to = x * root);
    }

    /// Numbers that say which state belongs to which kernel.
    pub(super) fn shape(&self, heads: usize, value_dim: usize) -> Vec<usize> {
        let far = match &self.far {
            FarKind::None => [0, 0],
            FarKind::Merged { rule, weighing } => {
                [rule.entries, if matches!(weighing, Weighing::Received { .. }) { 2 } else { 1 }]
            }
            FarKind::Linear(FarFeatures { map, .. }) => [map.num_features(), 3],
            FarKind::Own(_) => [0, 4],
        };
        let near =
            [heads, self.head_dim, value_dim, self.window, self.sinks, self.heavy, self.block];
        near.into_iter().chain(far).collect()
    }
}
