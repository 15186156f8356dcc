//! A map whose sums take the tokens that leave the window.

use crate::check;
use crate::error::Error;
use crate::features::FeatureMap;
use crate::memory::linear::decay::{Decay, LogDecay};
use crate::scalar::Scalar;
use std::sync::Arc;

/// A map, and how its sums forget.
#[derive(Clone, Debug)]
pub(crate) struct FarFeatures<T: Scalar> {
    /// One for each kernel, so that its address tells kernels apart.
    pub(crate) map: Arc<Arc<dyn FeatureMap<T>>>,
    pub(crate) decay: Decay,
    /// The same in logarithms, if anything is forgotten.
    pub(crate) log_decay: Option<Arc<LogDecay<T>>>,
}

impl<T: Scalar> FarFeatures<T> {
    /// Of sums that decay by a factor for each feature, if factors are given.
    pub(crate) fn new(
        map: Arc<dyn FeatureMap<T>>,
        channels: Option<Vec<f64>>,
    ) -> Result<Self, Error> {
        check::features(map.head_dim(), map.num_features())?;
        let decay = Decay { channels, ..Decay::default() };
        let log_decay = LogDecay::of(&decay, map.num_features())?.map(Arc::new);
        Ok(Self { map: Arc::new(map), decay, log_decay })
    }

    /// Whether anything is forgotten.
    pub(crate) fn decays(&self) -> bool {
        self.log_decay.is_some()
    }
}
