//! The exponential as a polynomial without branches, so that loops over it vectorise.
//!
//! eˣ = 2ⁿ·eʳ with n = round(x/ln 2) and |r| ≤ ½ ln 2. The integer n is read off the low bits of x/ln 2 + 1.5·2^(mantissa bits).
//! Arguments below the logarithm of the smallest normal number give exactly 0 (so e^{−∞} = 0), arguments that
//! would need n above the largest exponent (88.37 and 709.4; half of the last binade) give ∞, NaN gives NaN.

/// eˣ within 2 units in the last place for normal results.
#[inline(always)]
pub(crate) fn exp_f32(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5·2^23
    const LN2_HIGH: f32 = 0.693_359_4; // 355/512: n·LN2_HIGH is exact
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const LOWEST: f32 = -87.336_54; // ln of the smallest normal number, rounded up
    const HIGHEST: f32 = 88.37; // n = 127 at most
    let clamped = if x < LOWEST { LOWEST } else { x };
    let clamped = if clamped > HIGHEST { HIGHEST } else { clamped };
    let shifted = clamped * core::f32::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.987_569_1e-4_f32;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5.0e-1;
    let y = (p * (r * r) + r) + 1.0;
    let power = f32::from_bits((shifted.to_bits().wrapping_add(127)) << 23);
    let result = y * power;
    let result = if x < LOWEST { 0.0 } else { result };
    if x > HIGHEST { f32::INFINITY } else { result }
}

/// eˣ within 2 units in the last place for normal results.
#[inline(always)]
pub(crate) fn exp_f64(x: f64) -> f64 {
    const SHIFT: f64 = 6_755_399_441_055_744.0; // 1.5·2^52
    const LN2_HIGH: f64 = 6.931_471_803_691_238e-1; // 32 bits: n·LN2_HIGH is exact
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    const LOWEST: f64 = -708.396_418_532_264; // ln of the smallest normal number, rounded up
    const HIGHEST: f64 = 709.43; // n = 1023 at most
    let clamped = if x < LOWEST { LOWEST } else { x };
    let clamped = if clamped > HIGHEST { HIGHEST } else { clamped };
    let shifted = clamped * core::f64::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    // Taylor to order 13: the next term is below 5e-18 on |r| ≤ ½ ln 2.
    let mut p = 1.0 / 6_227_020_800.0;
    p = p * r + 1.0 / 479_001_600.0;
    p = p * r + 1.0 / 39_916_800.0;
    p = p * r + 1.0 / 3_628_800.0;
    p = p * r + 1.0 / 362_880.0;
    p = p * r + 1.0 / 40_320.0;
    p = p * r + 1.0 / 5_040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    let y = (p * (r * r) + r) + 1.0;
    let power = f64::from_bits((shifted.to_bits().wrapping_add(1023)) << 52);
    let result = y * power;
    let result = if x < LOWEST { 0.0 } else { result };
    if x > HIGHEST { f64::INFINITY } else { result }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::cast_possible_truncation)]
    fn relative_error_is_below_two_units() {
        let mut worst = (0.0_f64, 0.0_f64);
        for i in 0..2_000_000 {
            let x = -87.3 + f64::from(i) * (175.6 / 2_000_000.0);
            let x32 = x as f32;
            let exact = libm::exp(f64::from(x32));
            worst.0 = worst.0.max((f64::from(exp_f32(x32)) / exact - 1.0).abs());
            let x64 = x * 8.0;
            if x64 > -708.0 && x64 < 709.4 {
                worst.1 = worst.1.max((exp_f64(x64) / libm::exp(x64) - 1.0).abs());
            }
        }
        assert!(worst.0 < 2.0 * f64::from(f32::EPSILON), "f32: {:e}", worst.0);
        assert!(worst.1 < 2.0 * f64::EPSILON, "f64: {:e}", worst.1);
    }

    #[test]
    fn ends_of_the_range() {
        assert_eq!(exp_f32(0.0), 1.0);
        assert_eq!(exp_f64(0.0), 1.0);
        assert_eq!(exp_f32(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_f64(f64::NEG_INFINITY), 0.0);
        assert_eq!(exp_f32(-1e30), 0.0);
        assert_eq!(exp_f64(-1e300), 0.0);
        assert_eq!(exp_f32(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp_f64(1e300), f64::INFINITY);
        assert!(exp_f32(f32::NAN).is_nan());
        assert!(exp_f64(f64::NAN).is_nan());
        assert!(exp_f32(88.36) < f32::INFINITY && exp_f32(88.36) > 2e38);
        assert!(exp_f64(709.42) < f64::INFINITY && exp_f64(709.42) > 1e308);
    }
}
