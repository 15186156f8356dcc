//! What can be trained of a hybrid kernel.

use crate::attention::hybrid::config::{Config, FarKind};
use crate::attention::hybrid::far::features::FarFeatures;
use crate::check;
use crate::error::Error;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use ndarray::Array1;
use std::sync::Arc;

/// The name of the logits of learned sinks among the parameters.
pub(super) const SINK_LOGITS: &str = "sink_logits";

/// The place of the map of a far memory among them.
pub(super) const FAR: &str = "far";

impl<T: Scalar> Config<T> {
    /// The parameters of the map of the far memory, under `far`, its decays, and the logits of
    /// learned sinks.
    pub(super) fn parameters(&self) -> Parameters<T> {
        let mut all = match &self.far {
            FarKind::Linear(FarFeatures { map, decay, .. }) => {
                let mut all = map.parameters().under(FAR);
                decay.add_parameters(&mut all);
                all
            }
            _ => Parameters::new(),
        };
        if !self.sink_logits.is_empty() {
            let logits: Array1<T> = self.sink_logits.iter().map(|&x| T::from_f64(x)).collect();
            all.insert(SINK_LOGITS, logits.into_dyn());
        }
        all
    }

    /// The same with others in their places.
    pub(super) fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Self, Error> {
        self.parameters().check_names(parameters)?;
        let mut config = self.clone();
        if let Some(logits) = parameters.get(SINK_LOGITS) {
            config.sink_logits = logits.iter().map(|logit| logit.as_f64()).collect();
            check::sink_logits::<T>(&config.sink_logits)?;
        }
        if let FarKind::Linear(FarFeatures { map, decay, .. }) = &self.far {
            let of_map = parameters.of(FAR);
            let map = if of_map.is_empty() {
                Arc::clone(&**map)
            } else {
                Arc::from(map.with_parameters(&of_map)?)
            };
            let decay = decay.with_parameters(parameters);
            config.far = FarKind::Linear(FarFeatures::new(map, decay.channels)?);
        }
        Ok(config)
    }
}
