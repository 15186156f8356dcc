//! Options of the merging far memory that is weighted by the attention received.

use crate::attention::hybrid::config::{FarKind, Weighing};
use crate::calibration::Calibration;
use crate::check;
use crate::error::Error;
use crate::memory::merged::rule::{Distance, MergeCost, MergeUnits, Metric, Rule};
use crate::scalar::Scalar;
use ndarray::{Array2, Axis};
use std::sync::Arc;

/// At most so many merged entries, weighted by the attention they received: a far memory of
/// [`HybridAttention`](crate::HybridAttention).
///
/// With P the probabilities just used for an output, summed over the query heads of the group and
/// scaled so that those of all but the sinks sum to the number of these heads, after each step
///
/// ```text
/// window token j:  acc_j ← γ·acc_j + P_j [age ≥ min_age],      entry i:  a_i ← γ·a_i + P_i
/// ```
///
/// A token that leaves becomes an entry with n = 1 and a = acc + 10⁻⁹. Beyond the bound, the pair
/// with the smallest [`MergeCost`],
///
/// ```text
/// δk²·(δv² + ¼·δk²) / (1/a_i + 1/a_j),
/// δk² = Σ_c r_c Δk̄_c²,    δv² = ‖Δv̄‖²/ρ²
/// ```
///
/// becomes one entry with a-weighted means; keys are scaled (k̂). `r` and `ρ²` are [`MergeUnits`],
/// or means over the first 64 tokens behind the sinks, as far as they have come. An entry is read
/// with weight `n_i e^{q̂·k̄_i}`.
///
/// The best pair is found exactly at any number of entries, with working memory of some fifty
/// numbers for each beside the entries themselves.
///
/// ```
/// use dijiang::{HybridAttention, MergeCost, Merged, Metric};
///
/// let far = Merged::new(64).decay(0.98).min_age(16).cost(MergeCost::Product);
/// let far = far.metric(Metric::QueryDiagonal).block(1); // all of these are the defaults
/// let kernel = HybridAttention::<f32>::builder(8).window(64).far(far).build()?;
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Merged {
    entries: usize,
    decay: f64,
    min_age: Option<usize>,
    cost: MergeCost,
    metric: Option<Metric>,
    units: Option<MergeUnits>,
    pub(super) block: usize,
    pub(super) calibration: Option<Arc<Calibration>>,
}

impl Merged {
    /// At most `entries` entries, with the default options.
    #[must_use]
    pub fn new(entries: usize) -> Self {
        Self {
            entries,
            decay: 0.98,
            min_age: None,
            cost: MergeCost::Product,
            metric: None,
            units: None,
            block: 1,
            calibration: None,
        }
    }

    /// Sets the decay γ of received attention in each step, in (0, 1]: 0.98 unless set.
    #[must_use]
    pub fn decay(mut self, decay: f64) -> Self {
        self.decay = decay;
        self
    }

    /// Sets the age, in tokens, from which a token in the window collects attention: 16, or half of
    /// a window below 32, unless set; every token is looked at while it is new.
    #[must_use]
    pub fn min_age(mut self, min_age: usize) -> Self {
        self.min_age = Some(min_age);
        self
    }

    /// Sets what it costs to merge: [`MergeCost::Product`] unless set.
    #[must_use]
    pub fn cost(mut self, cost: MergeCost) -> Self {
        self.cost = cost;
        self
    }

    /// Sets the cost to [`MergeCost::Ward`] with this factor of `‖Δv̄‖²/ρ²`.
    #[must_use]
    pub fn value_weight(self, value_weight: f64) -> Self {
        self.cost(MergeCost::Ward { value_weight })
    }

    /// Sets the units of keys and values, which are otherwise those of the first tokens. With them
    /// nothing depends on what came first.
    #[must_use]
    pub fn units(mut self, units: MergeUnits) -> Self {
        self.units = Some(units);
        self
    }

    /// Sets how keys are compared: [`Metric::QueryDiagonal`] unless set.
    #[must_use]
    pub fn metric(mut self, metric: Metric) -> Self {
        self.metric = Some(metric);
        self
    }

    /// Sets how many tokens leave the window at once: 1 unless set. With more the window holds up
    /// to `block − 1` tokens more, that many tokens are read by one matrix product, and entries are
    /// merged in rounds of mutual nearest pairs.
    #[must_use]
    pub fn block(mut self, block: usize) -> Self {
        self.block = block;
        self
    }

    /// Compares keys by a calibration in place of a [`Metric`]: by the diagonal of its `E q̂q̂ᵀ`, or
    /// for [`MergeCost::Ward`] by all of it, `R = (E q̂q̂ᵀ)^½`, scaled to mean 1. Make the
    /// calibration with the window and sinks of the kernel, which is not checked.
    #[must_use]
    pub fn calibrated(mut self, calibration: &Calibration) -> Self {
        self.calibration = Some(Arc::new(calibration.clone()));
        self
    }

    /// Refuses options that are out of range.
    pub(super) fn check(&self) -> Result<(), Error> {
        let refuse = |which, found: &str, needed| {
            Err(Error::InvalidOption { which, found: found.to_owned(), needed })
        };
        let calibrated = self.calibration.is_some();
        if calibrated && self.metric.is_some() {
            return refuse("metric", "one, and a calibration, which has its own", "one of the two");
        }
        if calibrated && self.units.is_some() {
            return refuse("units", "some, and a calibration, which has its own", "one of the two");
        }
        if self.units.is_some() && self.metric == Some(Metric::Identity) {
            return refuse("units", "some, and a metric that has none", "one of the two");
        }
        if !(self.decay > 0.0 && self.decay <= 1.0) {
            return refuse("decay", &self.decay.to_string(), "above 0 and at most 1");
        }
        self.cost.check()
    }

    pub(super) fn kind<T: Scalar>(
        &self,
        head_dim: usize,
        window: usize,
        scale: f64,
    ) -> Result<FarKind<T>, Error> {
        let product = self.cost == MergeCost::Product;
        let metric = match (&self.calibration, self.metric.unwrap_or_default()) {
            (Some(calibration), _) if !product => {
                Distance::Matrix(Arc::new(unit_metric(calibration)))
            }
            (None, Metric::Identity) => Distance::Identity,
            _ => Distance::QueryDiagonal,
        };
        let of_units = self.units.as_ref().map(|units| units.query_squares().into());
        let of_calibration = self.calibration.as_ref().filter(|_| product);
        if let Some(units) = &self.units {
            check::size("units", "query_squares", head_dim, units.query_squares().len())?;
        }
        let rule = Rule {
            entries: self.entries,
            spare: self.block,
            block: self.block,
            metric,
            cost: self.cost,
            query_squares: of_units.or(of_calibration.map(|calibration| diagonal(calibration))),
            value_square: self.units.as_ref().map(MergeUnits::value_square),
            value_columns: None,
            scale,
        };
        let min_age = self.min_age.unwrap_or(MIN_AGE.min(window / 2));
        FarKind::merged(rule, Weighing::Received { decay: self.decay, min_age })
    }
}

/// The age from which a token collects attention, unless it is set or the window is small.
const MIN_AGE: usize = 16;

/// The diagonal of `RᵀR = E q̂q̂ᵀ`.
fn diagonal(calibration: &Calibration) -> Arc<[f64]> {
    let metric = calibration.metric();
    metric.axis_iter(Axis(1)).map(|column| column.dot(&column)).collect()
}

/// The metric of a calibration, scaled so that the mean of the squares it weighs with is 1: values
/// are weighed against keys.
#[allow(clippy::cast_precision_loss)]
fn unit_metric(calibration: &Calibration) -> Array2<f64> {
    let metric = calibration.metric();
    let mean = metric.iter().map(|x| x * x).sum::<f64>() / metric.nrows() as f64;
    if mean > 0.0 { metric / mean.sqrt() } else { metric }
}
