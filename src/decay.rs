//! The decays of published models, one for each head: for
//! [`LinearAttention::with_decay`](crate::LinearAttention::with_decay).

/// Those of the released DiJiang code: `γ_h = 1 − exp(linspace(ln 1/32, ln 1/512, heads)_h)`.
///
/// ```
/// let decays = dijiang::decay::dijiang(3);
/// assert_eq!(decays.len(), 3);
/// assert!((decays[0] - (1.0 - 1.0 / 32.0)).abs() < 1e-15);
/// assert!((decays[1] - (1.0 - 1.0 / 128.0)).abs() < 1e-15);
/// assert!((decays[2] - (1.0 - 1.0 / 512.0)).abs() < 1e-15);
/// ```
#[must_use]
#[allow(clippy::cast_precision_loss)]
pub fn dijiang(heads: usize) -> Vec<f64> {
    let (first, last) = (libm::log(1.0 / 32.0), libm::log(1.0 / 512.0));
    let step = (last - first) / heads.saturating_sub(1).max(1) as f64;
    (0..heads).map(|h| 1.0 - libm::exp(first + step * h as f64)).collect()
}

/// Those of retention: `γ_h = 1 − 2^{−5−h}` for h = 0, 1, … (Sun et al., arXiv 2307.08621, equation
/// 8).
///
/// ```
/// assert_eq!(dijiang::decay::retention(2), [1.0 - 1.0 / 32.0, 1.0 - 1.0 / 64.0]);
/// ```
#[must_use]
#[allow(clippy::cast_precision_loss)]
pub fn retention(heads: usize) -> Vec<f64> {
    (0..heads).map(|h| 1.0 - libm::exp2(-5.0 - h as f64)).collect()
}
