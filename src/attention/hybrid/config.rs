//! Everything a hybrid kernel knows: sizes, which position has which slot, which leave when, and
//! scores of single keys.

use super::options::MakeMemory;
use crate::calibration::Calibration;
use crate::calibration::keys::LEAST_ATTENTION;
use crate::features::FeatureMap;
use crate::kernel::{self, Buffer, padded};
use crate::memory::merged::{self, Distance, Rule};
use crate::{Error, Scalar};
use core::fmt;
use core::ops::Range;
use ndarray::ArrayView1;
use std::sync::Arc;

/// Entries that stay in every head where heads share one budget.
pub(crate) const LEAST_ENTRIES: usize = 4;

/// Tokens behind the window whose slots are not yet used again, where nothing but the window holds
/// tokens.
pub(super) const TRAIL: usize = 16;

/// How entries are weighed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Weighing {
    One,
    Expected,
    Received { decay: f64, min_age: usize },
}

#[derive(Clone)]
pub(super) enum FarKind<T: Scalar> {
    None,
    Merged {
        rule: Rule,
        weighing: Weighing,
    },
    /// One for each kernel, so that its address tells kernels apart.
    Linear(Arc<Arc<dyn FeatureMap<T>>>),
    Own(Arc<MakeMemory<T>>),
}

/// Everything a kernel knows.
pub(crate) struct Config<T: Scalar> {
    pub(super) head_dim: usize,
    pub(super) scale: f64,
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

/// `ln E_q e^{q̂·k̂}` up to a constant, for queries of the calibrated mean and covariance: see
/// [`Calibration::static_score`].
pub(super) struct StaticScore<T> {
    query_mean: Vec<T>,
    key_mean: Vec<T>,
    /// Σ_q `[d, padded d]`
    covariance: Buffer<T>,
}

impl<T: Scalar> StaticScore<T> {
    pub(super) fn new(calibration: &Calibration) -> Self {
        let d = calibration.head_dim();
        let stride = padded::<T>(d);
        let mut covariance = Buffer::zeros(d * stride);
        for (row, exact) in
            covariance.chunks_exact_mut(stride).zip(calibration.query_covariance().outer_iter())
        {
            row.iter_mut().zip(exact).for_each(|(to, &x)| *to = T::from_f64(x));
        }
        let narrow = |x: ArrayView1<'_, f64>| x.iter().map(|&x| T::from_f64(x)).collect();
        Self {
            query_mean: narrow(calibration.query_mean()),
            key_mean: narrow(calibration.key_mean()),
            covariance,
        }
    }

    /// Of a scaled key, which is overwritten.
    pub(super) fn of(&self, key: &mut [T], scratch: &mut Buffer<T>) -> T {
        key.iter_mut().zip(&self.key_mean).for_each(|(x, &mean)| *x -= mean);
        let stride = padded::<T>(key.len());
        scratch.resize(stride);
        kernel::row_times_matrix(key, &self.covariance, stride, scratch);
        let score = kernel::dot(&self.query_mean, key)
            + T::from_f64(0.5) * kernel::dot(key, &scratch[..key.len()]);
        if score.is_nan() {
            -T::max_value()
        } else {
            score.max(-T::max_value()).min(T::max_value())
        }
    }
}

/// The mean softmax weight of the calibrated queries on a key: see
/// [`Calibration::expected_attention`].
pub(super) struct ExpectedAttention<T> {
    /// Queries as columns `[d, padded queries]`, for scores to base 2.
    queries: Buffer<T>,
    log2_normalizers: Vec<T>,
}

impl<T: Scalar> ExpectedAttention<T> {
    pub(super) fn new(calibration: &Calibration) -> Self {
        let (exact, log_normalizers) = calibration.queries();
        let log2_e = core::f64::consts::LOG2_E;
        let width = padded::<T>(exact.nrows());
        let mut queries = Buffer::zeros(exact.ncols() * width);
        for ((query, column), &x) in exact.indexed_iter() {
            queries[column * width + query] = T::from_f64(x * log2_e);
        }
        Self {
            queries,
            log2_normalizers: log_normalizers.iter().map(|&x| T::from_f64(x * log2_e)).collect(),
        }
    }

    /// Of a scaled key.
    #[allow(clippy::cast_precision_loss)]
    pub(super) fn of(&self, key: &[T], scratch: &mut Buffer<T>) -> T {
        let count = self.log2_normalizers.len();
        scratch.resize(count);
        kernel::row_times_matrix(key, &self.queries, padded::<T>(count), scratch);
        scratch.iter_mut().zip(&self.log2_normalizers).for_each(|(x, &log2)| *x -= log2);
        let largest = kernel::max(scratch);
        if !largest.is_finite() {
            return if largest > T::zero() {
                T::max_value().sqrt()
            } else {
                T::from_f64(LEAST_ATTENTION)
            };
        }
        kernel::exp2_slice(scratch, largest);
        let mean = kernel::sum(scratch) / T::from_f64(count as f64) * largest.exp2();
        (mean + T::from_f64(LEAST_ATTENTION)).min(T::max_value().sqrt())
    }
}

impl<T: Scalar> fmt::Debug for Config<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let far: &dyn fmt::Debug = match &self.far {
            FarKind::None => &"none",
            FarKind::Merged { rule, .. } => rule,
            FarKind::Linear(map) => map,
            FarKind::Own(_) => &"a memory of the user",
        };
        let sizes = (self.head_dim, self.window, self.sinks, self.heavy, self.block);
        f.debug_struct("Config")
            .field("head_dim, window, sinks, heavy, block", &sizes)
            .field("scale", &self.scale)
            .field("far", far)
            .finish_non_exhaustive()
    }
}

impl<T: Scalar> Config<T> {
    /// The factor of queries: scores are to base 2.
    pub(super) fn factor(&self) -> T {
        T::from_f64(self.scale * core::f64::consts::LOG2_E)
    }

    /// Whether tokens that leave the window are just dropped.
    pub(super) fn trails(&self) -> bool {
        matches!(self.far, FarKind::None) && self.heavy == 0
    }

    pub(super) fn weighing(&self) -> Weighing {
        match &self.far {
            FarKind::Merged { weighing, .. } => *weighing,
            _ => Weighing::One,
        }
    }

    /// Whether what is read changes the state.
    pub(crate) fn learns(&self) -> bool {
        matches!(self.weighing(), Weighing::Received { .. })
    }

    /// Whether heads of this kernel and another may share one budget of entries.
    pub(crate) fn pools_with(&self, other: &Self) -> bool {
        let FarKind::Merged { rule: a, weighing: Weighing::Received { decay: x, min_age: m } } =
            &self.far
        else {
            return false;
        };
        let FarKind::Merged { rule: b, weighing: Weighing::Received { decay: y, min_age: n } } =
            &other.far
        else {
            return false;
        };
        let same_metric = matches!(
            (&a.metric, &b.metric),
            (Distance::Identity, Distance::Identity)
                | (Distance::QueryDiagonal, Distance::QueryDiagonal)
        );
        let sizes = |config: &Self, rule: &Rule| {
            [config.head_dim, config.window, config.sinks, config.heavy, config.block, rule.entries]
        };
        sizes(self, a) == sizes(other, b)
            && same_metric
            && (x, m, self.scale, a.value_weight) == (y, n, other.scale, b.value_weight)
            && self.heavy == 0
            && a.entries >= LEAST_ENTRIES
    }

    /// Whether a pool of so many heads is not too large.
    pub(crate) fn check_pool(&self, heads: usize) -> Result<(), Error> {
        match &self.far {
            FarKind::Merged { rule, .. } => {
                merged::check_entries(rule.entries.saturating_mul(heads).saturating_add(rule.block))
            }
            _ => Ok(()),
        }
    }

    /// Slots of exact tokens: sinks, window, heavy keys, and one for a change of places.
    pub(super) fn near_slots(&self) -> usize {
        self.sinks + self.ring + self.heavy + usize::from(self.heavy > 0)
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
        if self.trails() || beyond == 0 || !beyond.is_multiple_of(self.block) {
            return None;
        }
        let first = self.sinks + beyond - self.block;
        Some(first..first + self.block)
    }

    /// How many steps from token `t` on, at least 1, are read before more tokens leave.
    pub(super) fn steps_at_once(&self, t: usize) -> usize {
        match &self.far {
            FarKind::Linear(_) | FarKind::Own(_) => 1,
            FarKind::None if self.trails() => TRAIL,
            FarKind::None | FarKind::Merged { .. } => {
                // the next t that makes `beyond` a positive multiple of the block
                let beyond = (t + 1).saturating_sub(self.sinks + self.window);
                let next = (beyond / self.block + 1) * self.block + self.sinks + self.window - 1;
                next - t
            }
        }
    }

    /// The positions in the window once `tokens` have come.
    pub(super) fn held(&self, tokens: usize) -> Range<usize> {
        let count = tokens.saturating_sub(self.sinks);
        let end = self.sinks.max(tokens);
        let held = match count.checked_sub(self.window) {
            Some(_) if self.trails() => self.window,
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
        let gone = if self.trails() { self.expired(first, t) } else { 0..0 };
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
            FarKind::Linear(map) => [map.num_features(), 3],
            FarKind::Own(_) => [0, 4],
        };
        let near =
            [heads, self.head_dim, value_dim, self.window, self.sinks, self.heavy, self.block];
        near.into_iter().chain(far).collect()
    }
}
