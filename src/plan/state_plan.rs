//! The plan: what every head of a model is given, and the layers made of it.

use crate::attention::Attention;
use crate::error::Error;
use crate::multi_head::MultiHead;
use crate::plan::options::Budget;
#[cfg(feature = "serde")]
use crate::plan::saved::SavedPlan;
use crate::plan::setting::{HeadPlan, KernelOptions, ModelSizes};
use crate::scalar::Scalar;
use crate::state_format::StateFormat;
use std::sync::Arc;

/// Window, entries and decay for every head of keys and values of a model, at a fixed total.
///
/// A few heads cause most of the loss of a constant memory. With `õ_t` the outputs of a setting on
/// the exact queries, keys and values of a head, `o_t` those of softmax attention, and `g_t` the
/// gradient of the loss by them, its cost is
///
/// ```text
/// E = mean_t ½ (Σ_{heads of the group} g_t·(õ_t − o_t))²
/// ```
///
/// the loss of this head alone to second order, in nats a token, where `g_t` is that of
/// `−ln p(y_t)` with `y` drawn from the model itself (then `E[g gᵀ]` is Fisher's metric). Settings
/// that minimise `Σ E` within the budget are those that minimise `E + λ·size` in every head, for
/// one λ.
///
/// Without sensitivities `E` is the relative output error, squared,
/// `Σ_t ‖õ_t − o_t‖² / Σ_t ‖o_t‖²`. That treats all heads alike: it knows neither which heads
/// matter to the loss nor which directions of an output do, so that slots go to heads whose errors
/// nobody reads. Costs are then no loss, and only compare.
///
/// ```
/// use dijiang::{Budget, HeadSample, ModelSizes, PlanOptions, PlanSample, StatePlan};
/// use ndarray::{Array2, Array3};
///
/// // two layers of one kv head for two query heads; `g` is the gradient by their outputs
/// let wave = |h: usize, at: usize| (at as f32 * (0.3 + h as f32)).sin();
/// let kv: Vec<_> =
///     (0..2).map(|h| Array2::from_shape_fn((90, 8), |(t, c)| wave(h, t * 8 + c))).collect();
/// let q = Array3::from_shape_fn((2, 90, 8), |(g, t, c)| 2.0 * wave(g, t * 8 + c));
/// let g = Array3::from_elem((2, 90, 8), 0.1);
/// let samples = [0, 1].map(|layer| {
///     let (k, v) = (kv[layer].view(), kv[layer].view());
///     PlanSample::from(HeadSample { layer, kv_head: 0, q: q.view(), k, v })
///         .with_sensitivity(g.view())
/// });
///
/// let options = PlanOptions::new(Budget::Slots(24)).fingerprint("waves, 1st training");
/// let options = options.sinks(2).grid(&[0.95, 0.98], &[(8, &[4, 8, 16, 32])]);
/// let plan = StatePlan::fit(&samples, &options)?;
/// println!("{plan}"); // the table
///
/// let sizes =
///     ModelSizes { layers: 2, query_heads: 2, kv_heads: 1, head_dim: 8, value_dim: 8 };
/// plan.check_model(&sizes, "waves, 1st training")?;
/// let layers: Vec<_> =
///     (0..2).map(|layer| plan.layer::<f32>(layer, 2)).collect::<Result<_, _>>()?;
/// let bytes: usize = plan.state_bytes::<f32>(1_000_000)?; // of one sequence, whatever its length
/// assert_eq!(bytes, plan.state_floats(10)? * 4);
/// # let _ = layers;
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "SavedPlan")
)]
pub struct StatePlan {
    pub(crate) sizes: ModelSizes,
    pub(crate) fingerprint: String,
    pub(crate) sinks: usize,
    pub(crate) scale: f64,
    pub(crate) format: StateFormat,
    pub(crate) budget: Budget,
    pub(crate) length: Option<usize>,
    pub(crate) sensitivities: bool,
    /// All heads of all layers, in order.
    pub(crate) heads: Vec<HeadPlan>,
}

impl StatePlan {
    /// What every head is given, by layer and kv head.
    #[must_use]
    pub fn heads(&self) -> &[HeadPlan] {
        &self.heads
    }

    /// What one head is given, if the model has it.
    #[must_use]
    pub fn head(&self, layer: usize, kv_head: usize) -> Option<&HeadPlan> {
        let at = layer.checked_mul(self.sizes.kv_heads)?.checked_add(kv_head)?;
        self.heads.get(at).filter(|_| kv_head < self.sizes.kv_heads)
    }

    /// Layer and kv head of the exact ones, in order.
    #[must_use]
    pub fn exact_heads(&self) -> Vec<(usize, usize)> {
        let exact = self.heads.iter().filter(|head| head.setting.is_exact());
        exact.map(|head| (head.layer, head.kv_head)).collect()
    }

    /// The sizes of the model it was made for.
    #[must_use]
    pub fn sizes(&self) -> &ModelSizes {
        &self.sizes
    }

    /// The fingerprint given with the options, perhaps empty.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The budget it was made for.
    #[must_use]
    pub fn budget(&self) -> Budget {
        self.budget
    }

    /// The length of context it was made for; none if for all tokens of the samples.
    #[must_use]
    pub fn length(&self) -> Option<usize> {
        self.length
    }

    /// The sinks of every head that is not exact.
    #[must_use]
    pub fn sinks(&self) -> usize {
        self.sinks
    }

    /// The factor of `q·k`.
    #[must_use]
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// In how many bits states are kept.
    #[must_use]
    pub fn state_format(&self) -> StateFormat {
        self.format
    }

    /// The same settings with states in another format. The budget was made for the old one.
    #[must_use]
    pub fn with_state_format(self, format: StateFormat) -> Self {
        Self { format, ..self }
    }

    /// Whether costs were weighted by sensitivities, and so predict a loss.
    #[must_use]
    pub fn has_sensitivities(&self) -> bool {
        self.sensitivities
    }

    /// The predicted cost of all heads: the sum, as if their errors were independent.
    #[must_use]
    pub fn cost(&self) -> f64 {
        self.heads.iter().map(|head| head.cost).sum()
    }

    /// The predicted cost of a token among the last half of each length, `(length, cost)`: whether
    /// the plan bears a longer context.
    #[must_use]
    pub fn cost_by_length(&self) -> Vec<(usize, f64)> {
        let lengths = self.heads.first().into_iter().flat_map(|head| &head.cost_by_length);
        let of_all = |i: usize| self.heads.iter().map(|head| head.cost_by_length[i].1).sum();
        lengths.enumerate().map(|(i, (length, _))| (*length, of_all(i))).collect()
    }

    /// Refuses another model.
    ///
    /// # Errors
    ///
    /// [`Error::Plan`] with what differs first.
    pub fn check_model(&self, sizes: &ModelSizes, fingerprint: &str) -> Result<(), Error> {
        let (own, other) = (&self.sizes, sizes);
        let pairs = [
            ("layers", own.layers, other.layers),
            ("query heads", own.query_heads, other.query_heads),
            ("kv heads", own.kv_heads, other.kv_heads),
            ("head dimension", own.head_dim, other.head_dim),
            ("value dimension", own.value_dim, other.value_dim),
        ];
        for (which, found, expected) in pairs {
            same(which, found, expected)?;
        }
        if self.fingerprint == fingerprint {
            return Ok(());
        }
        let (expected, found) = (format!("{fingerprint:?}"), format!("{:?}", self.fingerprint));
        Err(Error::Plan { which: "fingerprint", expected, found })
    }

    /// The kernel of one head of keys and values.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if the model has no such head.
    pub fn kernel<T: Scalar>(
        &self,
        layer: usize,
        kv_head: usize,
    ) -> Result<Arc<dyn Attention<T>>, Error> {
        match self.head(layer, kv_head) {
            Some(head) => self.kernel_of(head),
            None => Err(Error::InvalidOption {
                which: "kv_head",
                found: format!("{kv_head} of layer {layer}"),
                needed: "a head of the plan",
            }),
        }
    }

    /// Attention of one layer, for `query_heads` query heads: a kernel for each kv head.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if the plan has no such layer, [`Error::Plan`] if it is one for
    /// another number of query heads.
    pub fn layer<T: Scalar>(
        &self,
        layer: usize,
        query_heads: usize,
    ) -> Result<MultiHead<T>, Error> {
        if layer >= self.sizes.layers {
            return Err(Error::InvalidOption {
                which: "layer",
                found: layer.to_string(),
                needed: "a layer of the plan",
            });
        }
        same("query heads", self.sizes.query_heads, query_heads)?;
        let heads = 0..self.sizes.kv_heads;
        let kernels = heads.map(|head| self.kernel(layer, head)).collect::<Result<_, _>>()?;
        MultiHead::per_kv_head(kernels, query_heads)
    }

    /// Numbers of the state of one sequence after `tokens` tokens, over all heads.
    ///
    /// # Errors
    ///
    /// Those of [`Attention::state_floats`].
    pub fn state_floats(&self, tokens: usize) -> Result<usize, Error> {
        self.heads.iter().try_fold(0_usize, |sum, head| {
            let kernel = self.kernel_of::<f32>(head)?;
            Ok(sum.saturating_add(kernel.state_floats(self.sizes.value_dim, tokens)?))
        })
    }

    /// Bytes of the state of one sequence after `tokens` tokens, over all heads.
    ///
    /// # Errors
    ///
    /// Those of [`Attention::state_bytes`].
    pub fn state_bytes<T: Scalar>(&self, tokens: usize) -> Result<usize, Error> {
        self.heads.iter().try_fold(0_usize, |sum, head| {
            let kernel = self.kernel_of::<T>(head)?;
            Ok(sum.saturating_add(kernel.state_bytes(self.sizes.value_dim, tokens)?))
        })
    }

    fn kernel_of<T: Scalar>(&self, head: &HeadPlan) -> Result<Arc<dyn Attention<T>>, Error> {
        self.kernel_options().kernel(head.setting, head.units.as_ref())
    }

    /// What all kernels have in common.
    fn kernel_options(&self) -> KernelOptions {
        let (head_dim, scale, sinks) = (self.sizes.head_dim, self.scale, self.sinks);
        KernelOptions { head_dim, scale, sinks, format: self.format }
    }

    /// The mean of `window + entries` over the heads that are not exact.
    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn mean_slots(&self) -> f64 {
        let slots: Vec<_> = self.heads.iter().filter_map(|head| head.setting.slots()).collect();
        slots.iter().sum::<usize>() as f64 / slots.len().max(1) as f64
    }
}

fn same(which: &'static str, found: usize, expected: usize) -> Result<(), Error> {
    if found == expected {
        return Ok(());
    }
    let (expected, found) = (expected.to_string(), found.to_string());
    Err(Error::Plan { which, expected, found })
}

#[cfg(feature = "serde")]
impl TryFrom<SavedPlan> for StatePlan {
    type Error = Error;

    fn try_from(saved: SavedPlan) -> Result<Self, Error> {
        saved.check()?;
        let SavedPlan { sizes, fingerprint, sinks, scale, format, .. } = saved;
        let SavedPlan { budget, length, sensitivities, heads, .. } = saved;
        Ok(Self { sizes, fingerprint, sinks, scale, format, budget, length, sensitivities, heads })
    }
}
