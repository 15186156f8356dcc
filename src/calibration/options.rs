//! What a calibration takes for granted of the kernel it is for: window, sinks, scale, mask, and
//! where the samples stood.

use crate::check;
use crate::error::Error;
use crate::mask::Mask;

/// Options of [`Calibration`](crate::Calibration): those of the kernel it is for, and the positions
/// of the samples.
///
/// Window and sinks say which pairs of query and key are *far*, the ones a map has to model. All
/// distances are between positions, in tokens.
///
/// ```
/// use dijiang::{CalibrationOptions, Mask};
///
/// // every third token of a text, for a kernel with an exact window of 128 tokens and 4 sinks
/// let options = CalibrationOptions::new().with_window(128).with_stride(3);
/// // an encoder: every pair is far
/// let encoder = CalibrationOptions::new().with_mask(Mask::Full);
/// # let _ = (options, encoder);
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct CalibrationOptions {
    pub(super) window: usize,
    pub(super) sinks: usize,
    pub(super) scale: Option<f64>,
    pub(super) positions: Positions,
    pub(super) shrinkage: f64,
    pub(super) mask: Mask,
}

/// Where the samples stood in their text.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(super) enum Positions {
    Stride(usize),
    Given(Vec<usize>),
}

impl Default for CalibrationOptions {
    fn default() -> Self {
        Self {
            window: 64,
            sinks: 4,
            scale: None,
            positions: Positions::Stride(1),
            shrinkage: 0.02,
            mask: Mask::Causal,
        }
    }
}

impl CalibrationOptions {
    /// A window of 64 tokens, 4 sinks, scale 1/√d, samples of consecutive tokens, shrinkage 0.02,
    /// causal.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the tokens that are exact: a key is far from a query if it is at least this many
    /// positions back. 0 makes every visible key far.
    #[must_use]
    pub fn with_window(mut self, window: usize) -> Self {
        self.window = window;
        self
    }

    /// Sets the first positions that are exact for every query.
    #[must_use]
    pub fn with_sinks(mut self, sinks: usize) -> Self {
        self.sinks = sinks;
        self
    }

    /// Sets the scale of `q·k`: the one the attention kernel will use.
    #[must_use]
    pub fn with_scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Sets the positions of the sampled tokens, strictly increasing, one per row of the keys.
    #[must_use]
    pub fn with_positions(mut self, positions: Vec<usize>) -> Self {
        self.positions = Positions::Given(positions);
        self
    }

    /// Sets the positions to `0, stride, 2·stride, ..`: every `stride`-th token was sampled.
    #[must_use]
    pub fn with_stride(mut self, stride: usize) -> Self {
        self.positions = Positions::Stride(stride);
        self
    }

    /// Sets what is added to the covariances, in units of their mean variance:
    /// `Σ + shrinkage·tr(Σ)/d·I`.
    #[must_use]
    pub fn with_shrinkage(mut self, shrinkage: f64) -> Self {
        self.shrinkage = shrinkage;
        self
    }

    /// Sets which keys a query sees. With [`Mask::Full`] every pair is far, and window, sinks and
    /// positions mean nothing.
    #[must_use]
    pub fn with_mask(mut self, mask: Mask) -> Self {
        self.mask = mask;
        self
    }

    /// The positions of `n` samples, and a check of the shrinkage.
    pub(super) fn positions(&self, n: usize) -> Result<Vec<usize>, Error> {
        if !(self.shrinkage >= 0.0 && self.shrinkage.is_finite()) {
            return Err(Error::InvalidOption {
                which: "shrinkage",
                found: self.shrinkage.to_string(),
                needed: "a finite number that is not negative",
            });
        }
        match &self.positions {
            Positions::Stride(stride) => (0..n)
                .map(|i| i.checked_mul(*stride).filter(|_| *stride > 0))
                .collect::<Option<Vec<_>>>()
                .ok_or_else(|| Error::InvalidOption {
                    which: "stride",
                    found: stride.to_string(),
                    needed: "at least 1, and small enough for the positions to be counted",
                }),
            Positions::Given(positions) => {
                check::size("positions", "elements", n, positions.len())?;
                if let Some((before, after)) =
                    positions.iter().zip(positions.iter().skip(1)).find(|(a, b)| a >= b)
                {
                    return Err(Error::InvalidOption {
                        which: "positions",
                        found: format!("{before} before {after}"),
                        needed: "strictly increasing",
                    });
                }
                Ok(positions.clone())
            }
        }
    }
}
