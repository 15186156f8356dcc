//! In how many bits the numbers of a state are kept.

use crate::scalar::Scalar;

/// Numbers of a row that have one scale in [`StateFormat::Q8`].
pub(crate) const BLOCK: usize = 32;

/// In how many bits a state keeps keys and values: caches of exact attention, and the windows,
/// sinks and entries of hybrids.
///
/// Rounding to a format is done once, when a token is absorbed (or entries are merged), row by row:
/// a row is the key, or the value, of one token. Everything is computed of the rounded numbers, in
/// the number type of the kernel, and so is a whole sequence: `forward` gives what the stream
/// gives.
///
/// | format | bytes of a row of 64 in `f32` | relative rounding error of a number |
/// |---|---|---|
/// | [`F32`](Self::F32) | 256 | 0 |
/// | [`Bf16`](Self::Bf16) | 128 | at most 2⁻⁸ of itself |
/// | [`Q8`](Self::Q8) | 68 | about 1/254 of the largest of its block |
///
/// ```
/// use dijiang::{Attention, SoftmaxAttention, StateFormat};
/// use ndarray::Array2;
///
/// let kernel = SoftmaxAttention::<f32>::new(64)?.with_state_format(StateFormat::Q8);
/// let mut stream = kernel.stream(64)?;
/// let (x, mut out) = (Array2::ones((10, 64)), Array2::zeros((10, 64)));
/// stream.extend(x.view(), x.view(), x.view(), out.view_mut())?;
/// assert_eq!(stream.state_floats(), 10 * 128); // numbers
/// assert_eq!(stream.state_bytes(), 10 * 136); // in 34 bytes for each 32 of them
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum StateFormat {
    /// The number type of the kernel: nothing is rounded, and a kernel of `f64` keeps `f64`.
    #[default]
    F32,
    /// bfloat16: the upper 16 bits of an `f32`, rounded to nearest, ties to even. What would round
    /// to infinity becomes the largest number, 3.39e38. (Of an `f64` first the nearest `f32`.)
    Bf16,
    /// Blocks of 32 numbers along a row, of which the last may be shorter, each of one scale `s`
    /// and one signed byte `c_i` a number, 34 bytes in all:
    ///
    /// ```text
    /// s = max_i |x_i| / 127, rounded to bfloat16;   c_i = x_i/s, rounded to nearest, ties to even,
    /// and brought into −127..=127;   x_i becomes s·c_i.
    /// ```
    ///
    /// This is the block of `q8_0` in GGUF files but for the scale, which there is a half float.
    /// That has three bits more and ends at 65 504 above and, losing digits, at 6·10⁻⁵ below: rows
    /// that are all small, as values of sinks are, would suffer. The bytes are rounded with the
    /// scale as it is kept, so that its few bits cost nothing.
    ///
    /// All finite numbers stay finite. `s` is at least 2⁻¹²⁶, so that what is not above
    /// 2⁻¹²⁷ becomes 0, and so small that 127·s is an `f32`: beyond its range, numbers of an
    /// `f64` become the largest. Rounding what has been rounded changes nothing.
    Q8,
}

impl StateFormat {
    /// The bytes that a row of so many numbers of a kernel of `T` takes, rows of keys and rows of
    /// values each for itself.
    ///
    /// ```
    /// use dijiang::StateFormat;
    ///
    /// assert_eq!(StateFormat::F32.row_bytes::<f32>(80), 320);
    /// assert_eq!(StateFormat::Bf16.row_bytes::<f32>(80), 160);
    /// assert_eq!(StateFormat::Q8.row_bytes::<f32>(80), 80 + 3 * 2);
    /// ```
    #[must_use]
    pub fn row_bytes<T: Scalar>(self, columns: usize) -> usize {
        match self {
            Self::F32 => columns.saturating_mul(size_of::<T>()),
            Self::Bf16 => columns.saturating_mul(2),
            Self::Q8 => columns.saturating_add(2 * columns.div_ceil(BLOCK)),
        }
    }

    /// Its name in lower case, as options of commands and fingerprints have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Q8 => "q8",
        }
    }

    /// A number that tells it from the others, for fingerprints: none of the default, so that
    /// states of kernels without a format stay what they were.
    pub(crate) fn mark(self) -> Option<f64> {
        match self {
            Self::F32 => None,
            Self::Bf16 => Some(16.0),
            Self::Q8 => Some(8.0),
        }
    }
}

/// A name that is no format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownFormat(String);

impl core::fmt::Display for UnknownFormat {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "`{}` is no format of states: say f32, bf16 or q8", self.0)
    }
}

impl core::error::Error for UnknownFormat {}

impl core::str::FromStr for StateFormat {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        [Self::F32, Self::Bf16, Self::Q8]
            .into_iter()
            .find(|format| format.name() == name)
            .ok_or_else(|| UnknownFormat(name.to_owned()))
    }
}

/// The sign of a bfloat16, and the largest.
const SIGN: u16 = 0x8000;
const LARGEST: u16 = 0x7F7F;

/// The scales of the smallest and of the largest blocks: 2⁻¹²⁶, and the largest of which 127 are
/// within `f32`.
const LEAST_SCALE: u16 = 0x0080;
const LARGEST_SCALE: u16 = 0x7C01;

/// Half the smallest scale: blocks without a larger number are zeros.
const ALL_ZERO: f64 = f64::from_bits((1023 - 127) << 52);

/// A number as the nearest bfloat16, ties to even; beyond the largest, the largest.
#[inline]
#[allow(clippy::cast_possible_truncation)]
pub(crate) fn to_bf16<T: Scalar>(x: T) -> u16 {
    let bits = (x.as_f64() as f32).to_bits();
    let half = 0x7FFF + ((bits >> 16) & 1);
    let sign = (bits >> 16) as u16 & SIGN;
    let size = (((bits & 0x7FFF_FFFF) + half) >> 16) as u16;
    sign | size.min(LARGEST)
}

/// The number that a bfloat16 is.
#[inline]
pub(crate) fn from_bf16<T: Scalar>(x: u16) -> T {
    T::from_f64(f64::from(f32::from_bits(u32::from(x) << 16)))
}

/// Writes a block as bytes, `code(i)` for number `i`; returns its scale.
#[inline]
#[allow(clippy::cast_possible_truncation)]
pub(crate) fn to_bytes<T: Scalar>(block: &[T], mut code: impl FnMut(usize, i8)) -> u16 {
    // integers compare as positive numbers do, and faster
    let largest = block.iter().fold(0, |m: u64, x| m.max(x.as_f64().abs().to_bits()));
    let largest = f64::from_bits(largest);
    let scale = match to_bf16(largest / 127.0) {
        _ if largest <= ALL_ZERO => 0,
        scale => scale.clamp(LEAST_SCALE, LARGEST_SCALE),
    };
    let by = if scale == 0 { 1.0 } else { from_bf16::<f64>(scale) };
    for (i, x) in block.iter().enumerate() {
        // 1.5·2⁵²: beyond it a double has no fraction, and the low bits are the integer
        let rounded = (x.as_f64() / by).clamp(-127.0, 127.0) + 6_755_399_441_055_744.0;
        code(i, rounded.to_bits() as i8);
    }
    scale
}

/// Whether a scale, or a bfloat16, is a finite number.
#[inline]
pub(crate) fn is_finite(x: u16) -> bool {
    x & !SIGN <= LARGEST
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)] // small numbers
mod tests {
    use super::*;

    fn rounded(block: &[f32]) -> (u16, Vec<f32>) {
        let mut codes = vec![0_i8; block.len()];
        let scale = to_bytes(block, |i, code| codes[i] = code);
        let by: f32 = from_bf16(scale);
        (scale, codes.into_iter().map(|code| by * f32::from(code)).collect())
    }

    #[test]
    fn bfloat16_rounds_to_nearest_even_and_stays_finite() {
        assert_eq!(to_bf16(1.0_f32), 0x3F80);
        assert_eq!(to_bf16(f32::from_bits(0x3F80_8000)), 0x3F80);
        assert_eq!(to_bf16(f32::from_bits(0x3F81_8000)), 0x3F82);
        assert_eq!(to_bf16(f32::from_bits(0x3F80_8001)), 0x3F81);
        assert_eq!(to_bf16(-1.0_f64), 0xBF80);
        for huge in [f64::from(f32::MAX), 1e300] {
            assert_eq!([to_bf16(huge), to_bf16(-huge)], [LARGEST, LARGEST | SIGN]);
        }
        assert!(is_finite(LARGEST | SIGN) && !is_finite(0x7F80) && !is_finite(0xFFC0));
        for bits in (0..=LARGEST).step_by(7) {
            assert_eq!(to_bf16(from_bf16::<f32>(bits)), bits);
        }
    }

    #[test]
    fn the_largest_scale_is_the_largest_of_which_127_are_finite() {
        assert!((127.0 * from_bf16::<f32>(LARGEST_SCALE)).is_finite());
        assert!(!(127.0 * from_bf16::<f32>(LARGEST_SCALE + 1)).is_finite());
    }

    #[test]
    fn blocks_of_any_size_stay_near_and_finite_and_are_rounded_once() {
        for exponent in -44..=38 {
            let size = 10_f64.powi(exponent) as f32;
            let block: Vec<f32> = (0..32_u8).map(|i| size * f32::from(i).sin() * 3.0).collect();
            let (scale, once) = rounded(&block);
            let step = from_bf16::<f64>(scale).max(2_f64.powi(-126));
            for (x, y) in block.iter().zip(&once) {
                // half a step, and of the largest hardly more beyond the last byte
                assert!(y.is_finite());
                let off = (f64::from(*x) - f64::from(*y)).abs();
                assert!(off <= step * 0.500_001, "{x} {y} {step}");
            }
            assert_eq!(rounded(&once), (scale, once), "{exponent}");
        }
        assert_eq!(rounded(&[0.0; 32]), (0, vec![0.0; 32]));
        let (_, largest) = rounded(&[f32::MAX, f32::MIN, 0.0]);
        assert!(largest[0] > 0.99 * f32::MAX && largest[1] == -largest[0]);
    }
}
