//! The exponential of numbers up to 100, as vectors. (Most are not positive.)
//!
//! 2ˣ = 2ⁿ·2ᶠ with n the integer next to x and |f| ≤ ½. The integer is read off the low bits of x +
//! 1.5·2^(mantissa bits), 2ᶠ is a polynomial, and n is added to the exponent's bits. The
//! polynomials are minimax in relative error with the constant 1, so that 2⁰ is 1 exactly: 9.2e-8
//! at degree 5, 3.4e-18 at degree 11. Where 2ˣ would be below twice the smallest normal number it
//! is 0, so 2^−∞ = 0; NaN gives NaN.

use pulp::Simd;

#[allow(clippy::approx_constant)] // near ln 2, but not it
const F32: [f32; 5] = [0.693_147, 0.240_222_42, 0.055_507_34, 0.009_671_514, 0.001_326_470_9];

/// Of (2ᶠ − 1)/f, right to 2e-9: below one unit near 0 as well.
#[allow(clippy::approx_constant)]
const MINUS_1_F32: [f32; 6] =
    [0.693_147_2, 0.240_226_5, 0.055_503_57, 0.009_618_083, 0.001_339_086_3, 0.000_154_531_63];

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

/// x = n + f: the integer in the bits of an exponent, and the rest.
#[inline(always)]
fn split_f32<S: Simd>(s: S, x: S::f32s) -> (S::u32s, S::f32s) {
    const SHIFT: f32 = 12_582_912.0; // 1.5·2^23
    let shifted = s.add_f32s(x, s.splat_f32s(SHIFT));
    let f = s.sub_f32s(x, s.sub_f32s(shifted, s.splat_f32s(SHIFT)));
    let n = s.wrapping_dyn_shl_u32s(s.transmute_u32s_f32s(shifted), s.splat_u32s(23));
    (n, f)
}

/// 2ˣ for x up to 100.
#[inline(always)]
pub(crate) fn exp2_f32<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    let (n, f) = split_f32(s, x);
    let mut p = s.splat_f32s(F32[4]);
    for c in [F32[3], F32[2], F32[1], F32[0], 1.0] {
        p = s.mul_add_e_f32s(p, f, s.splat_f32s(c));
    }
    let y = s.transmute_f32s_u32s(s.add_u32s(s.transmute_u32s_f32s(p), n));
    s.select_f32s(s.less_than_f32s(x, s.splat_f32s(-125.0)), s.splat_f32s(0.0), y)
}

/// 2ˣ − 1 for x that are not positive, with an error relative to itself near 0 as well.
///
/// With 2ᶠ − 1 = q it is 2ⁿ·q + (2ⁿ − 1), whose second term is exact where it counts.
#[inline(always)]
pub(crate) fn exp2_minus_1_f32<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    let (n, f) = split_f32(s, x);
    let mut q = s.splat_f32s(MINUS_1_F32[5]);
    for c in MINUS_1_F32[..5].iter().rev().copied().chain([0.0]) {
        q = s.mul_add_e_f32s(q, f, s.splat_f32s(c));
    }
    let one = s.splat_f32s(1.0);
    let power = s.transmute_f32s_u32s(s.add_u32s(s.transmute_u32s_f32s(one), n));
    let y = s.mul_add_e_f32s(power, q, s.sub_f32s(power, one));
    s.select_f32s(s.less_than_f32s(x, s.splat_f32s(-125.0)), s.splat_f32s(-1.0), y)
}

/// x = n + f: the integer in the bits of an exponent, and the rest.
#[inline(always)]
fn split_f64<S: Simd>(s: S, x: S::f64s) -> (S::u64s, S::f64s) {
    const SHIFT: f64 = 6_755_399_441_055_744.0; // 1.5·2^52
    let shifted = s.add_f64s(x, s.splat_f64s(SHIFT));
    let f = s.sub_f64s(x, s.sub_f64s(shifted, s.splat_f64s(SHIFT)));
    // a shift by 52 bits
    let n = s.mul_u64s(s.transmute_u64s_f64s(shifted), s.splat_u64s(1 << 52));
    (n, f)
}

/// 2ˣ for x up to 100.
#[inline(always)]
pub(crate) fn exp2_f64<S: Simd>(s: S, x: S::f64s) -> S::f64s {
    let (n, f) = split_f64(s, x);
    let mut p = s.splat_f64s(F64[10]);
    for c in F64[..10].iter().rev().copied().chain([1.0]) {
        p = s.mul_add_e_f64s(p, f, s.splat_f64s(c));
    }
    let y = s.transmute_f64s_u64s(s.add_u64s(s.transmute_u64s_f64s(p), n));
    s.select_f64s(s.less_than_f64s(x, s.splat_f64s(-1021.0)), s.splat_f64s(0.0), y)
}

/// 2ˣ − 1 for x that are not positive, with an error relative to itself near 0 as well.
#[inline(always)]
pub(crate) fn exp2_minus_1_f64<S: Simd>(s: S, x: S::f64s) -> S::f64s {
    let (n, f) = split_f64(s, x);
    let mut q = s.splat_f64s(F64[10]);
    for c in F64[..10].iter().rev().copied().chain([0.0]) {
        q = s.mul_add_e_f64s(q, f, s.splat_f64s(c));
    }
    let one = s.splat_f64s(1.0);
    let power = s.transmute_f64s_u64s(s.add_u64s(s.transmute_u64s_f64s(one), n));
    let y = s.mul_add_e_f64s(power, q, s.sub_f64s(power, one));
    s.select_f64s(s.less_than_f64s(x, s.splat_f64s(-1021.0)), s.splat_f64s(-1.0), y)
}
