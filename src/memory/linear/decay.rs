//! How a kernel forgets: a decay for all features, one for each, or data of the token.

use crate::check;
use crate::error::Error;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use ndarray::Array1;
#[cfg(feature = "rayon")]
use ndarray::ArrayView2;

/// How a kernel forgets: `ln α_ti = ln γ + ln γ_i + g_ti` for token t and feature i, each part if
/// there is one.
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
    /// Whether nothing is forgotten.
    pub(crate) fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Fails unless it can be used.
    pub(crate) fn check(&self, features: usize) -> Result<(), Error> {
        let channels = self.channels.as_deref().unwrap_or_default();
        if self.channels.is_some() {
            check::size("decay", "elements", features, channels.len())?;
        }
        match channels.iter().chain([&self.common]).find(|&&decay| !(0.0..=1.0).contains(&decay)) {
            Some(bad) => {
                let found = bad.to_string();
                Err(Error::InvalidOption { which: "decay", found, needed: "from 0 to 1" })
            }
            None => Ok(()),
        }
    }
}

/// The names of decays among the parameters of a kernel.
const COMMON: &str = "decay.common";
const CHANNELS: &str = "decay.channels";

impl Decay {
    /// Whether gradients by decays are among those that are asked for.
    pub(crate) fn is_trained<T: Scalar>(asked: Option<&Parameters<T>>) -> bool {
        asked.is_some_and(|asked| !asked.of("decay").is_empty())
    }

    /// Adds those that can be trained.
    pub(crate) fn add_parameters<T: Scalar>(&self, all: &mut Parameters<T>) {
        let mut add = |name: &str, decays: &[f64]| {
            let decays: Array1<T> = decays.iter().map(|&decay| T::from_f64(decay)).collect();
            all.insert(name, decays.into_dyn());
        };
        if self.common != 1.0 {
            add(COMMON, &[self.common]);
        }
        if let Some(channels) = &self.channels {
            add(CHANNELS, channels);
        }
    }

    /// The same with those that are given; to be checked.
    pub(crate) fn with_parameters<T: Scalar>(&self, parameters: &Parameters<T>) -> Self {
        let mut decay = self.clone();
        let wide = |name| -> Option<Vec<f64>> {
            parameters.get(name).map(|x| x.iter().map(|x| x.as_f64()).collect())
        };
        if let Some(&[common]) = wide(COMMON).as_deref() {
            decay.common = common;
        }
        if let Some(channels) = wide(CHANNELS) {
            decay.channels = Some(channels);
        }
        decay
    }

    /// Adds the gradient by γ and by γ_i, of that by their logarithms, for one or all features, to
    /// those that are asked for.
    pub(crate) fn add_gradients<T: Scalar>(
        &self,
        by_logarithms: &[f64],
        all: &mut Parameters<T>,
    ) -> Result<(), Error> {
        const ZERO: Error = Error::Unsupported {
            what: "the gradient by a decay of 0",
            why: "it is computed from that by the logarithm; begin with a small decay instead",
        };
        if let Some(common) = all.vector_mut(COMMON) {
            if self.common == 0.0 {
                return Err(ZERO);
            }
            common[0] += T::from_f64(by_logarithms.iter().sum::<f64>() / self.common);
        }
        let values = self.channels.as_deref().unwrap_or_default();
        if let Some(channels) = all.vector_mut(CHANNELS) {
            for ((gradient, sum), &value) in channels.iter_mut().zip(by_logarithms).zip(values) {
                if value == 0.0 {
                    return Err(ZERO);
                }
                *gradient += T::from_f64(sum / value);
            }
        }
        let finite = |name| {
            let gradient = all.get(name)?;
            gradient.iter().position(|x| !x.is_finite())
        };
        match finite(COMMON).or_else(|| finite(CHANNELS)) {
            Some(row) => Err(Error::Overflow { which: "the gradient by a decay", row }),
            None => Ok(()),
        }
    }
}

/// [`Decay`] in logarithms.
#[derive(Clone, Debug)]
pub(crate) struct LogDecay<T> {
    pub(super) common: T,
    /// With the common one; empty if all are the same.
    pub(super) channels: Vec<T>,
    pub(crate) gated: bool,
}

impl<T: Scalar> LogDecay<T> {
    pub(crate) fn new() -> Self {
        Self { common: T::zero(), channels: Vec::new(), gated: false }
    }

    /// Takes that of a kernel of so many features; returns whether anything is forgotten.
    pub(crate) fn set(&mut self, decay: &Decay, features: usize) -> Result<bool, Error> {
        decay.check(features)?;
        let log = |decay: f64| T::from_f64(libm::log(decay));
        self.common = log(decay.common);
        self.channels.clear();
        self.channels
            .extend(decay.channels.iter().flatten().map(|channel| log(channel * decay.common)));
        self.gated = decay.gated;
        Ok(!decay.is_none())
    }

    /// What tells it from others.
    pub(crate) fn parameters(&self) -> impl Iterator<Item = f64> {
        let gated = f64::from(u8::from(self.gated));
        [gated, self.common.as_f64()].into_iter().chain(self.channels.iter().map(|x| x.as_f64()))
    }

    /// Whether all features may decay alike, as far as is known without gates.
    pub(crate) fn may_be_common(&self) -> bool {
        self.channels.is_empty()
    }

    /// Whether all features decay alike, with these gates.
    #[cfg(feature = "rayon")]
    pub(crate) fn is_common(&self, gates: Option<ArrayView2<'_, T>>) -> bool {
        self.channels.is_empty() && gates.is_none_or(|gates| gates.ncols() == 1)
    }

    /// That of a kernel, if anything is forgotten.
    pub(crate) fn of(decay: &Decay, features: usize) -> Result<Option<Self>, Error> {
        let mut log_decay = Self::new();
        Ok(log_decay.set(decay, features)?.then_some(log_decay))
    }
}
