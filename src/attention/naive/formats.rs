//! States in fewer bits: what the numbers of a row become.

use crate::state_format::StateFormat;
use ndarray::Array2;

/// The bfloat16 next to a number, ties to even: eight significant bits, and nothing below 2⁻¹³³.
///
/// ```text
/// r(x) = u·round(x/u),   u = 2^(max(⌊log₂|x|⌋, −126) − 7)
/// ```
///
/// within ±(2 − 2⁻⁷)·2¹²⁷, of the nearest `f32` where x is none.
///
/// ```
/// use dijiang::attention::naive::formats::bfloat16;
///
/// assert_eq!(bfloat16(1.0 + 1.0 / 128.0), 1.0 + 1.0 / 128.0);
/// assert_eq!(bfloat16(1.0 + 1.0 / 256.0), 1.0); // the even one of two
/// assert_eq!(bfloat16(-1e300), -3.3895313892515355e38);
/// ```
#[must_use]
pub fn bfloat16(x: f64) -> f64 {
    let most = f64::from(f32::MAX);
    #[allow(clippy::cast_possible_truncation)] // that is the formula
    let x = f64::from(x.clamp(-most, most) as f32);
    let exponent = if x == 0.0 { -126.0 } else { x.abs().log2().floor().max(-126.0) };
    let unit = (exponent - 7.0).exp2();
    let largest = (2.0 - 2_f64.powi(-7)) * 2_f64.powi(127);
    (unit * (x / unit).round_ties_even()).clamp(-largest, largest)
}

/// One block of [`StateFormat::Q8`]:
///
/// ```text
/// s = bfloat16(max_i |x_i| / 127),   x_i becomes s·clamp(round(x_i/s), −127, 127)
/// ```
///
/// with `s` at least 2⁻¹²⁶, and at most such that 127·s is an `f32`.
///
/// ```
/// use dijiang::attention::naive::formats::block;
///
/// assert_eq!(block(&[127.0, -63.4, 0.2]), [127.0, -63.0, 0.0]);
/// assert_eq!(block(&[0.0, 0.0]), [0.0, 0.0]);
/// ```
#[must_use]
pub fn block(x: &[f64]) -> Vec<f64> {
    let largest = x.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
    if largest == 0.0 {
        return x.to_vec();
    }
    let mut scale = bfloat16(largest / 127.0).max(2_f64.powi(-126));
    while 127.0 * scale > f64::from(f32::MAX) {
        scale = bfloat16(scale * (1.0 - 2_f64.powi(-7)));
    }
    x.iter().map(|x| scale * (x / scale).round_ties_even().clamp(-127.0, 127.0)).collect()
}

/// Every row of `x [n, d]` as a state in this format has it: keys, or values.
///
/// ```
/// use dijiang::StateFormat;
/// use dijiang::attention::naive::formats::rounded;
/// use ndarray::array;
///
/// let x = array![[1.0, 0.3337], [254.0, 1.4]];
/// assert_eq!(rounded(&x, StateFormat::F32), x);
/// assert_eq!(rounded(&x, StateFormat::Q8).row(1), array![254.0, 2.0]);
/// ```
#[must_use]
pub fn rounded(x: &Array2<f64>, format: StateFormat) -> Array2<f64> {
    let mut rounded = x.clone();
    for mut row in rounded.outer_iter_mut() {
        let numbers = row.to_vec();
        let numbers: Vec<f64> = match format {
            StateFormat::F32 => numbers,
            StateFormat::Bf16 => numbers.into_iter().map(bfloat16).collect(),
            StateFormat::Q8 => numbers.chunks(32).flat_map(block).collect(),
        };
        row.iter_mut().zip(numbers).for_each(|(to, x)| *to = x);
    }
    rounded
}
