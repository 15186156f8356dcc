//! The slopes of linear biases.

use crate::check;
use crate::error::Error;

/// The slopes of ALiBi for a layer of `heads` query heads (Press et al., arXiv 2108.12409, section
/// 3): `2^(−8i/heads)`, `i = 1..=heads`, where `heads` is a power of two.
///
/// For other numbers, as the code of the paper has it: those of the largest power of two below,
/// then every second one of those of twice as many.
///
/// ```
/// use dijiang::{Attention, Error, MultiHead, SoftmaxAttention, alibi_slopes};
/// use std::sync::Arc;
///
/// assert_eq!(alibi_slopes(4)?, [1.0 / 4.0, 1.0 / 16.0, 1.0 / 64.0, 1.0 / 256.0]);
///
/// let heads = alibi_slopes(12)?.into_iter().map(|slope| {
///     let kernel = SoftmaxAttention::<f32>::new(64)?.with_alibi_slope(slope)?;
///     Ok(Arc::new(kernel) as Arc<dyn Attention<f32>>)
/// });
/// let layer = MultiHead::per_head(heads.collect::<Result<_, Error>>()?, 12)?;
/// # let _ = layer;
/// # Ok::<(), dijiang::Error>(())
/// ```
///
/// # Errors
///
/// [`Error::ZeroSize`] if `heads` is 0, [`Error::InvalidOption`] if there are over 2³².
pub fn alibi_slopes(heads: usize) -> Result<Vec<f64>, Error> {
    check::at_least_one("heads", heads)?;
    check::array("heads", heads, 1)?;
    let below = 1 << heads.ilog2();
    let mut slopes: Vec<f64> = (1..=below).map(|i| slope(i, below)).collect();
    slopes.extend((0..heads - below).map(|i| slope(2 * i + 1, 2 * below)));
    Ok(slopes)
}

/// `2^(−8i/heads)`.
#[allow(clippy::cast_precision_loss)]
fn slope(i: usize, heads: usize) -> f64 {
    libm::exp2(-8.0 * i as f64 / heads as f64)
}
