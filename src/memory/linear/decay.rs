//! How a kernel forgets: a decay for all features, one for each, or data of the token.

use crate::check;
use crate::error::Error;
use crate::scalar::Scalar;
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
