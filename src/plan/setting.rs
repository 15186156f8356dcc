//! What one head of keys and values is given, and the kernel made of it.

use crate::attention::Attention;
use crate::attention::hybrid::HybridAttention;
use crate::attention::hybrid::far::merged::Merged;
use crate::attention::softmax::options::SoftmaxAttention;
use crate::check;
use crate::error::Error;
use crate::memory::merged::rule::MergeUnits;
use crate::scalar::Scalar;
use crate::state_format::StateFormat;
use std::sync::Arc;

/// What one head of keys and values is given.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum HeadSetting {
    /// Softmax attention over a cache that grows.
    Exact,
    /// An exact window with merged entries behind it: a state of fixed size.
    Merged {
        /// How many of the last tokens are exact.
        window: usize,
        /// The most merged entries.
        entries: usize,
        /// The decay γ of received attention.
        decay: f64,
    },
}

impl HeadSetting {
    /// `window + entries`; none where the cache grows.
    #[must_use]
    pub fn slots(&self) -> Option<usize> {
        match *self {
            Self::Exact => None,
            Self::Merged { window, entries, .. } => Some(window + entries),
        }
    }

    /// Whether the head stays exact.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        matches!(self, Self::Exact)
    }
}

/// The sizes that a plan and its model must have in common.
///
/// ```
/// use dijiang::ModelSizes;
///
/// let smollm2_135m = ModelSizes {
///     layers: 30,
///     query_heads: 9,
///     kv_heads: 3,
///     head_dim: 64,
///     value_dim: 64,
/// };
/// assert_eq!(smollm2_135m.all_heads(), 90);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct ModelSizes {
    /// Layers that have attention.
    pub layers: usize,
    /// Query heads of each layer.
    pub query_heads: usize,
    /// Heads of keys and values of each layer.
    pub kv_heads: usize,
    /// Columns of queries and keys.
    pub head_dim: usize,
    /// Columns of values.
    pub value_dim: usize,
}

impl ModelSizes {
    /// Heads of keys and values of all layers.
    #[must_use]
    pub fn all_heads(&self) -> usize {
        self.layers.saturating_mul(self.kv_heads)
    }

    /// Refuses sizes that no model has.
    pub(crate) fn check(&self) -> Result<(), Error> {
        check::at_least_one("layers", self.layers)?;
        check::at_least_one("kv_heads", self.kv_heads)?;
        check::at_least_one("query_heads", self.query_heads)?;
        check::at_least_one("head_dim", self.head_dim)?;
        check::at_least_one("value_dim", self.value_dim)?;
        check::array("layers", self.layers, self.kv_heads)?;
        if self.query_heads.is_multiple_of(self.kv_heads) {
            return Ok(());
        }
        Err(Error::InvalidOption {
            which: "query_heads",
            found: self.query_heads.to_string(),
            needed: "a multiple of the number of kv heads",
        })
    }
}

/// What the plan says of one head of keys and values.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct HeadPlan {
    /// The layer.
    pub layer: usize,
    /// The head of keys and values in its layer.
    pub kv_head: usize,
    /// What it is given.
    pub setting: HeadSetting,
    /// The predicted cost of this setting, interpolated where it was not measured; 0 if exact.
    pub cost: f64,
    /// The same by length: the cost of a token among the last half of so many.
    pub cost_by_length: Vec<(usize, f64)>,
    /// In what its entries are compared: means over its samples.
    pub units: Option<MergeUnits>,
}

/// What the kernels of all heads have in common.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct KernelOptions {
    pub(crate) head_dim: usize,
    pub(crate) scale: f64,
    pub(crate) sinks: usize,
    pub(crate) format: StateFormat,
}

impl KernelOptions {
    /// Softmax attention as costs are measured against it: nothing is rounded.
    pub(crate) fn exact<T: Scalar>(&self) -> Result<SoftmaxAttention<T>, Error> {
        Ok(SoftmaxAttention::new(self.head_dim)?.with_scale(self.scale))
    }

    /// THE kernel of a window with merged entries: whatever a plan measures or builds is this.
    pub(crate) fn merged<T: Scalar>(
        &self,
        window: usize,
        entries: usize,
        decay: f64,
        units: Option<&MergeUnits>,
    ) -> Result<HybridAttention<T>, Error> {
        let far = Merged::new(entries).decay(decay);
        let far = units.map_or(far.clone(), |units| far.units(units.clone()));
        let builder = HybridAttention::builder(self.head_dim).window(window).sinks(self.sinks);
        builder.scale(self.scale).state_format(self.format).far(far).build()
    }

    /// The kernel of a setting.
    pub(crate) fn kernel<T: Scalar>(
        &self,
        setting: HeadSetting,
        units: Option<&MergeUnits>,
    ) -> Result<Arc<dyn Attention<T>>, Error> {
        Ok(match setting {
            HeadSetting::Exact => Arc::new(self.exact()?.with_state_format(self.format)),
            HeadSetting::Merged { window, entries, decay } => {
                Arc::new(self.merged(window, entries, decay, units)?)
            }
        })
    }
}
