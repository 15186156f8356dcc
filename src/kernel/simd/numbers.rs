//! The vectors of `f32` and of `f64`.

use crate::kernel::simd::{Lanes, Level, exp2};
use pulp::Simd;

/// Level methods of both types under one name.
macro_rules! lanes {
    (
        $t:ident, $pad:literal, $v:ident, $lanes:ident, $exp:path, $exp_minus_1:path,
        $transpose:ident, $widen_bytes:ident, $widen_bf16:ident, $and:ident, $or:ident,
        $splat:ident, $add:ident, $sub:ident, $mul:ident, $fma:ident, $max:ident, $abs:ident,
        $greater:ident, $select:ident, $sum:ident, $maximum:ident, $vectors:ident,
        $vectors_mut:ident, $load:ident
    ) => {
        impl Lanes for $t {
            const PAD: usize = $pad;
            type V<S: Simd> = S::$v;

            #[inline(always)]
            fn lanes<S: Simd>() -> usize {
                S::$lanes
            }
            #[inline(always)]
            fn splat<S: Simd>(s: S, x: Self) -> S::$v {
                s.$splat(x)
            }
            #[inline(always)]
            fn vadd<S: Simd>(s: S, a: S::$v, b: S::$v) -> S::$v {
                s.$add(a, b)
            }
            #[inline(always)]
            fn vsub<S: Simd>(s: S, a: S::$v, b: S::$v) -> S::$v {
                s.$sub(a, b)
            }
            #[inline(always)]
            fn vmul<S: Simd>(s: S, a: S::$v, b: S::$v) -> S::$v {
                s.$mul(a, b)
            }
            #[inline(always)]
            fn vfma<S: Simd>(s: S, a: S::$v, b: S::$v, c: S::$v) -> S::$v {
                s.$fma(a, b, c)
            }
            #[inline(always)]
            fn vmax<S: Simd>(s: S, a: S::$v, b: S::$v) -> S::$v {
                s.$max(a, b)
            }
            #[inline(always)]
            fn vselect_greater<S: Simd>(s: S, a: S::$v, b: S::$v, x: S::$v, y: S::$v) -> S::$v {
                s.$select(s.$greater(a, b), x, y)
            }
            #[inline(always)]
            fn vabs<S: Simd>(s: S, a: S::$v) -> S::$v {
                s.$abs(a)
            }
            #[inline(always)]
            fn vexp2<S: Simd>(s: S, x: S::$v) -> S::$v {
                $exp(s, x)
            }
            #[inline(always)]
            fn vexp2_minus_1<S: Simd>(s: S, x: S::$v) -> S::$v {
                $exp_minus_1(s, x)
            }
            #[inline(always)]
            fn vwith_sign<S: Simd>(s: S, a: S::$v, b: S::$v) -> S::$v {
                s.$or(s.$abs(a), s.$and(b, s.$splat(-0.0)))
            }
            #[inline(always)]
            fn vsum<S: Simd>(s: S, a: S::$v) -> Self {
                s.$sum(a)
            }
            #[inline(always)]
            fn vmaximum<S: Simd>(s: S, a: S::$v) -> Self {
                s.$maximum(a)
            }
            #[inline(always)]
            fn vectors<S: Simd>(x: &[Self]) -> &[S::$v] {
                S::$vectors(x).0
            }
            #[inline(always)]
            fn vectors_mut<S: Simd>(x: &mut [Self]) -> &mut [S::$v] {
                S::$vectors_mut(x).0
            }
            #[inline(always)]
            fn elements_mut<S: Simd>(x: &mut [S::$v]) -> &mut [Self] {
                pulp::bytemuck::cast_slice_mut(x)
            }
            #[inline(always)]
            fn load<S: Simd>(s: S, x: &[Self]) -> S::$v {
                s.$load(x)
            }
            #[inline(always)]
            fn vwiden_bytes<L: Level>(level: L, x: &[i8]) -> L::$v {
                level.$widen_bytes(x)
            }
            #[inline(always)]
            fn vwiden_bf16<L: Level>(level: L, x: &[u16]) -> L::$v {
                level.$widen_bf16(x)
            }
            #[inline(always)]
            fn triangle() -> &'static [Self] {
                const TRIANGLE: [$t; $pad * $pad] = {
                    let mut square = [0.0; $pad * $pad];
                    let mut i = 0;
                    while i < $pad * $pad {
                        if i % $pad >= i / $pad {
                            square[i] = 1.0;
                        }
                        i += 1;
                    }
                    square
                };
                &TRIANGLE
            }
            #[inline(always)]
            fn vtranspose<L: Level>(level: L, rows: &mut [L::$v; 16]) {
                level.$transpose(rows);
            }
        }
    };
}
lanes!(
    f32,
    16,
    f32s,
    F32_LANES,
    exp2::exp2_f32,
    exp2::exp2_minus_1_f32,
    transpose_f32,
    widen_bytes_f32,
    widen_bf16_f32,
    and_f32s,
    or_f32s,
    splat_f32s,
    add_f32s,
    sub_f32s,
    mul_f32s,
    mul_add_e_f32s,
    max_f32s,
    abs_f32s,
    greater_than_f32s,
    select_f32s,
    reduce_sum_f32s,
    reduce_max_f32s,
    as_simd_f32s,
    as_mut_simd_f32s,
    partial_load_f32s
);
lanes!(
    f64,
    8,
    f64s,
    F64_LANES,
    exp2::exp2_f64,
    exp2::exp2_minus_1_f64,
    transpose_f64,
    widen_bytes_f64,
    widen_bf16_f64,
    and_f64s,
    or_f64s,
    splat_f64s,
    add_f64s,
    sub_f64s,
    mul_f64s,
    mul_add_e_f64s,
    max_f64s,
    abs_f64s,
    greater_than_f64s,
    select_f64s,
    reduce_sum_f64s,
    reduce_max_f64s,
    as_simd_f64s,
    as_mut_simd_f64s,
    partial_load_f64s
);
