//! Options of the merging far memory that is weighted by the attention received.

use crate::attention::hybrid::config::{FarKind, Weighing};
use crate::calibration::Calibration;
use crate::error::Error;
use crate::memory::merged::rule::Metric;
use crate::memory::merged::rule::{Distance, Rule};
use crate::scalar::Scalar;
use ndarray::Array2;
use std::sync::Arc;

/// At most so many merged entries, weighted by the attention they received: a far memory of
/// [`HybridAttention`](crate::HybridAttention).
///
/// With P the probabilities just used for an output (summed over the query heads of the group),
/// after each step
///
/// ```text
/// window token j:  acc_j ← γ·acc_j + P_j [age ≥ min_age],      entry i:  a_i ← γ·a_i + P_i
/// ```
///
/// A token that leaves becomes an entry with n = 1 and a = acc + 10⁻⁹. Beyond the bound, the pair
/// with the smallest
///
/// ```text
/// a_i a_j/(a_i + a_j) · (‖Δk̄‖² + value_weight·‖Δv̄‖²/ρ²),
/// ρ² = mean of ‖v_j‖² over the first 64 tokens behind the sinks
/// ```
///
/// becomes one entry with a-weighted means; keys are scaled (k̂), and ‖Δk̄‖² is taken in a
/// [`Metric`]. It is read with weight `n_i e^{q̂·k̄_i}`.
///
/// ```
/// use dijiang::{HybridAttention, Merged, Metric};
///
/// let far = Merged::new(64).decay(0.98).min_age(16).value_weight(4.0);
/// let far = far.metric(Metric::QueryDiagonal).block(1); // all of these are the defaults
/// let kernel = HybridAttention::<f32>::builder(8).window(64).far(far).build()?;
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Merged {
    entries: usize,
    decay: f64,
    min_age: usize,
    value_weight: f64,
    metric: Option<Metric>,
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
            min_age: 16,
            value_weight: 4.0,
            metric: None,
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

    /// Sets the age, in tokens, from which a token in the window collects attention: 16 unless set;
    /// every token is looked at while it is new.
    #[must_use]
    pub fn min_age(mut self, min_age: usize) -> Self {
        self.min_age = min_age;
        self
    }

    /// Sets the factor of `‖Δv̄‖²/ρ²` in the cost of a merge: 4 unless set.
    #[must_use]
    pub fn value_weight(mut self, value_weight: f64) -> Self {
        self.value_weight = value_weight;
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

    /// Compares keys by the metric `R = (E q̂q̂ᵀ)^½` of a calibration, scaled to mean 1, in place
    /// of a [`Metric`]. Make the calibration with the window and sinks of the kernel, which is not
    /// checked.
    #[must_use]
    pub fn calibrated(mut self, calibration: &Calibration) -> Self {
        self.calibration = Some(Arc::new(calibration.clone()));
        self
    }

    /// Refuses options that are out of range.
    pub(super) fn check(&self) -> Result<(), Error> {
        let refuse = |which, found, needed| Err(Error::InvalidOption { which, found, needed });
        if self.calibration.is_some() && self.metric.is_some() {
            let found = "one, and a calibration, which has its own".to_owned();
            return refuse("metric", found, "one of the two");
        }
        if !(self.decay > 0.0 && self.decay <= 1.0) {
            return refuse("decay", self.decay.to_string(), "above 0 and at most 1");
        }
        if !(self.value_weight >= 0.0 && self.value_weight.is_finite()) {
            let needed = "a finite number that is not negative";
            return refuse("value_weight", self.value_weight.to_string(), needed);
        }
        Ok(())
    }

    pub(super) fn kind<T: Scalar>(&self, scale: f64) -> Result<FarKind<T>, Error> {
        let metric = match (&self.calibration, self.metric.unwrap_or_default()) {
            (Some(calibration), _) => Distance::Matrix(Arc::new(unit_metric(calibration))),
            (None, Metric::Identity) => Distance::Identity,
            (None, Metric::QueryDiagonal) => Distance::QueryDiagonal,
        };
        let rule = Rule {
            entries: self.entries,
            spare: self.block,
            block: self.block,
            metric,
            value_weight: self.value_weight,
            value_columns: None,
            scale,
        };
        FarKind::merged(rule, Weighing::Received { decay: self.decay, min_age: self.min_age })
    }
}

/// The metric of a calibration, scaled so that the mean of the squares it weighs with is 1: values
/// are weighed against keys.
#[allow(clippy::cast_precision_loss)]
fn unit_metric(calibration: &Calibration) -> Array2<f64> {
    let metric = calibration.metric();
    let mean = metric.iter().map(|x| x * x).sum::<f64>() / metric.nrows() as f64;
    if mean > 0.0 { metric / mean.sqrt() } else { metric }
}
