//! The exponential of numbers up to 100, as vectors. (Most are not positive.)
//!
//! 2ˣ = 2ⁿ·2ᶠ with n the integer next to x and |f| ≤ ½. The integer is read off the low bits of x +
//! 1.5·2^(mantissa bits), 2ᶠ is a polynomial, and n is added to the exponent's bits. The
//! polynomials are minimax in relative error with the constant 1, so that 2⁰ is 1 exactly: 9.2e-8
//! at degree 5, 3.4e-18 at degree 11. Where 2ˣ would be below twice the smallest normal number it
//! is 0, so 2^−∞ = 0; NaN gives NaN.

use super::compiled::Compiled;
use super::simd::{Lanes, Level, Loop};
use pulp::Simd;

#[allow(clippy::approx_constant)] // near ln 2, but not it
const F32: [f32; 5] = [0.693_147, 0.240_222_42, 0.055_507_34, 0.009_671_514, 0.001_326_470_9];

const F64: [f64; 11] = [
    core::f64::consts::LN_2, // to the last bit
    0.240_226_506_959_101_3,
    0.055_504_108_664_820_08,
    0.009_618_129_107_594_08,
    0.001_333_355_814_677_542_4,
    0.000_154_035_304_571_540_24,
    0.000_015_252_733_492_459_916,
    1.321_543_526_396_640_7e-6,
    1.017_819_981_931_305_1e-7,
    7.073_786_074_772_303e-9,
    4.434_737_455_636_01e-10,
];

/// 2ˣ for x up to 100.
#[inline(always)]
pub(crate) fn exp2_f32<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    const SHIFT: f32 = 12_582_912.0; // 1.5·2^23
    let shifted = s.add_f32s(x, s.splat_f32s(SHIFT));
    let f = s.sub_f32s(x, s.sub_f32s(shifted, s.splat_f32s(SHIFT)));
    let mut p = s.splat_f32s(F32[4]);
    for c in [F32[3], F32[2], F32[1], F32[0], 1.0] {
        p = s.mul_add_e_f32s(p, f, s.splat_f32s(c));
    }
    let n = s.wrapping_dyn_shl_u32s(s.transmute_u32s_f32s(shifted), s.splat_u32s(23));
    let y = s.transmute_f32s_u32s(s.add_u32s(s.transmute_u32s_f32s(p), n));
    s.select_f32s(s.less_than_f32s(x, s.splat_f32s(-125.0)), s.splat_f32s(0.0), y)
}

/// 2ˣ for x up to 100.
#[inline(always)]
pub(crate) fn exp2_f64<S: Simd>(s: S, x: S::f64s) -> S::f64s {
    const SHIFT: f64 = 6_755_399_441_055_744.0; // 1.5·2^52
    let shifted = s.add_f64s(x, s.splat_f64s(SHIFT));
    let f = s.sub_f64s(x, s.sub_f64s(shifted, s.splat_f64s(SHIFT)));
    let mut p = s.splat_f64s(F64[10]);
    for c in F64[..10].iter().rev().copied().chain([1.0]) {
        p = s.mul_add_e_f64s(p, f, s.splat_f64s(c));
    }
    // a shift by 52 bits
    let n = s.mul_u64s(s.transmute_u64s_f64s(shifted), s.splat_u64s(1 << 52));
    let y = s.transmute_f64s_u64s(s.add_u64s(s.transmute_u64s_f64s(p), n));
    s.select_f64s(s.less_than_f64s(x, s.splat_f64s(-1021.0)), s.splat_f64s(0.0), y)
}

/// Replaces every element `x` by `2^(x − shift)`; none may be above `shift`.
pub(crate) fn exp2_slice<T: Compiled>(x: &mut [T], shift: T) {
    T::run_exp2(Exp2 { x, shift });
}

pub struct Exp2<'a, T> {
    pub(super) x: &'a mut [T],
    pub(super) shift: T,
}

impl<T: Lanes> Loop for Exp2<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let shift = T::splat(level, self.shift);
        let (whole, rest) = self.x.split_at_mut(self.x.len() / T::lanes::<L>() * T::lanes::<L>());
        for x in T::vectors_mut::<L>(whole) {
            *x = T::vexp2(level, T::vsub(level, *x, shift));
        }
        if !rest.is_empty() {
            let mut last = [T::vexp2(level, T::vsub(level, T::load(level, rest), shift))];
            rest.copy_from_slice(&T::elements_mut::<L>(&mut last)[..rest.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::Machine;
    use super::*;

    fn exp2<T: Lanes>(machine: Machine, x: T) -> T {
        let mut x = [x];
        machine.run(Exp2 { x: &mut x, shift: T::zero() });
        x[0]
    }

    #[test]
    #[allow(clippy::cast_possible_truncation)]
    fn relative_error_is_below_two_units_at_every_level() {
        for machine in Machine::all() {
            let (mut worst32, mut worst64) = (0.0_f64, 0.0_f64);
            for i in 0..1000 {
                let x: Vec<f64> =
                    (0..999).map(|j| -f64::from(i * 999 + j) * (125.0 / 999_000.0)).collect();
                let mut y: Vec<f32> = x.iter().map(|&x| x as f32).collect();
                let exact: Vec<f64> = y.iter().map(|&x| libm::exp2(f64::from(x))).collect();
                machine.run(Exp2 { x: &mut y, shift: 0.0 });
                let errors = y.iter().zip(&exact).map(|(y, e)| (f64::from(*y) / e - 1.0).abs());
                worst32 = errors.fold(worst32, f64::max);
                let x: Vec<f64> = x.iter().map(|x| x * 8.1).collect();
                let mut y = x.clone();
                machine.run(Exp2 { x: &mut y, shift: 0.0 });
                worst64 = x
                    .iter()
                    .zip(&y)
                    .map(|(x, y)| (y / libm::exp2(*x) - 1.0).abs())
                    .fold(worst64, f64::max);
            }
            assert!(worst32 < 2.0 * f64::from(f32::EPSILON), "{machine:?} f32: {worst32:e}");
            assert!(worst64 < 2.0 * f64::EPSILON, "{machine:?} f64: {worst64:e}");
        }
    }

    #[test]
    fn ends_of_the_range() {
        for machine in Machine::all() {
            assert_eq!(exp2(machine, 0.0_f32), 1.0);
            assert_eq!(exp2(machine, 0.0_f64), 1.0);
            assert_eq!(exp2(machine, f32::NEG_INFINITY), 0.0);
            assert_eq!(exp2(machine, f64::NEG_INFINITY), 0.0);
            assert_eq!(exp2(machine, -1e30_f32), 0.0);
            assert_eq!(exp2(machine, -1e300_f64), 0.0);
            assert!(exp2(machine, f32::NAN).is_nan());
            assert!(exp2(machine, f64::NAN).is_nan());
            assert_eq!(exp2(machine, -125.0_f32), 2.0_f32.powi(-125));
            assert_eq!(exp2(machine, -1021.0_f64), 2.0_f64.powi(-1021));
        }
    }

    #[test]
    fn every_length_and_a_shift() {
        for machine in Machine::all() {
            for n in 0..70_u8 {
                let mut x: Vec<f32> = (0..n).map(|i| 3.0 - f32::from(i)).collect();
                machine.run(Exp2 { x: &mut x, shift: 3.0 });
                assert!(x.iter().zip(0..).all(|(x, i)| *x == 2.0_f32.powi(-i)), "{machine:?} {n}");
            }
        }
    }
}
