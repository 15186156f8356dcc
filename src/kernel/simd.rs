//! SIMD levels and vectors: what an inner loop needs, written once for `f32` and `f64` and compiled
//! for every level.
//!
//! [`Machine::best`] is the best level of the machine, at run time. A loop is a [`Loop`]: a struct
//! of its arguments whose `run` is inlined into a function that has the instructions of its level.
//! Helpers of such loops must be `#[inline(always)]`: what is not inlined loses them.

use pulp::{NullaryFnOnce, Simd};

/// A level of SIMD instructions.
pub trait Level: Simd {
    /// Transposes a square of `f32` of as many rows as the level has lanes.
    #[inline(always)]
    fn transpose_f32(self, rows: &mut [Self::f32s; 16]) {
        plain_transpose::<f32, Self>(rows);
    }

    /// Transposes a square of `f64` of as many rows as the level has lanes.
    #[inline(always)]
    fn transpose_f64(self, rows: &mut [Self::f64s; 16]) {
        plain_transpose::<f64, Self>(rows);
    }
}

#[inline(always)]
fn plain_transpose<T: Lanes, L: Level>(rows: &mut [T::V<L>; 16]) {
    let lanes = T::lanes::<L>();
    let elements = T::elements_mut::<L>(rows);
    for i in 0..lanes {
        for j in 0..i {
            elements.swap(i * lanes + j, j * lanes + i);
        }
    }
}

/// Vectors of a number type at any level.
pub trait Lanes: num_traits::Float + 'static {
    /// Numbers in 64 bytes: rows of the arrays of this crate's loops are padded to a multiple of
    /// it, which is a multiple of the lanes of every level.
    const PAD: usize;

    /// A vector.
    type V<S: Simd>: Copy;

    /// Numbers in a vector.
    fn lanes<S: Simd>() -> usize;

    /// The same number in every lane.
    fn splat<S: Simd>(s: S, x: Self) -> Self::V<S>;
    /// a + b.
    fn vadd<S: Simd>(s: S, a: Self::V<S>, b: Self::V<S>) -> Self::V<S>;
    /// a − b.
    fn vsub<S: Simd>(s: S, a: Self::V<S>, b: Self::V<S>) -> Self::V<S>;
    /// a·b.
    fn vmul<S: Simd>(s: S, a: Self::V<S>, b: Self::V<S>) -> Self::V<S>;
    /// a·b + c, rounded once where the level can.
    fn vfma<S: Simd>(s: S, a: Self::V<S>, b: Self::V<S>, c: Self::V<S>) -> Self::V<S>;
    /// The larger.
    fn vmax<S: Simd>(s: S, a: Self::V<S>, b: Self::V<S>) -> Self::V<S>;
    /// |a|.
    fn vabs<S: Simd>(s: S, a: Self::V<S>) -> Self::V<S>;
    /// 2ˣ for x up to 100, see [`super::exp`].
    fn vexp2<S: Simd>(s: S, x: Self::V<S>) -> Self::V<S>;
    /// Sum of the lanes.
    fn vsum<S: Simd>(s: S, a: Self::V<S>) -> Self;
    /// Maximum of the lanes.
    fn vmaximum<S: Simd>(s: S, a: Self::V<S>) -> Self;
    /// The whole vectors of a slice; the rest is left out.
    fn vectors<S: Simd>(x: &[Self]) -> &[Self::V<S>];
    /// The whole vectors of a slice; the rest is left out.
    fn vectors_mut<S: Simd>(x: &mut [Self]) -> &mut [Self::V<S>];
    /// The numbers of vectors.
    fn elements_mut<S: Simd>(x: &mut [Self::V<S>]) -> &mut [Self];
    /// A vector of the first numbers of a slice, then zeros.
    fn load<S: Simd>(s: S, x: &[Self]) -> Self::V<S>;
    /// A square of [`PAD`](Self::PAD) rows: 1 on the diagonal and right of it, 0 elsewhere.
    fn triangle() -> &'static [Self];
    /// Transposes a square.
    fn vtranspose<L: Level>(level: L, rows: &mut [Self::V<L>; 16]);
}

/// Level methods of both types under one name.
macro_rules! lanes {
    ($t:ident, $pad:literal, $v:ident, $lanes:ident, $exp:path, $transpose:ident, $splat:ident, $add:ident, $sub:ident, $mul:ident,
     $fma:ident, $max:ident, $abs:ident, $sum:ident, $maximum:ident, $vectors:ident, $vectors_mut:ident, $load:ident) => {
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
            fn vabs<S: Simd>(s: S, a: S::$v) -> S::$v {
                s.$abs(a)
            }
            #[inline(always)]
            fn vexp2<S: Simd>(s: S, x: S::$v) -> S::$v {
                $exp(s, x)
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
    super::exp::exp2_f32,
    transpose_f32,
    splat_f32s,
    add_f32s,
    sub_f32s,
    mul_f32s,
    mul_add_e_f32s,
    max_f32s,
    abs_f32s,
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
    super::exp::exp2_f64,
    transpose_f64,
    splat_f64s,
    add_f64s,
    sub_f64s,
    mul_f64s,
    mul_add_e_f64s,
    max_f64s,
    abs_f64s,
    reduce_sum_f64s,
    reduce_max_f64s,
    as_simd_f64s,
    as_mut_simd_f64s,
    partial_load_f64s
);

/// An inner loop with its arguments.
pub trait Loop {
    /// What it returns.
    type Output;

    /// Runs it; implementations are `#[inline(always)]`.
    fn run<L: Level>(self, level: L) -> Self::Output;
}

/// The levels of this machine.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Machine {
    /// AVX-512 (x86-64-v4).
    #[cfg(target_arch = "x86_64")]
    Avx512(pulp::x86::V4),
    /// AVX2 and FMA (x86-64-v3).
    #[cfg(target_arch = "x86_64")]
    Avx2(pulp::x86::V3),
    /// NEON.
    #[cfg(target_arch = "aarch64")]
    Neon(pulp::aarch64::Neon),
    /// Whatever the build's target has; correct everywhere.
    Portable,
}

impl Machine {
    /// The best level there is.
    #[inline]
    pub(crate) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(level) = pulp::x86::V4::try_new() {
            return Self::Avx512(level);
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(level) = pulp::x86::V3::try_new() {
            return Self::Avx2(level);
        }
        #[cfg(target_arch = "aarch64")]
        if let Some(level) = pulp::aarch64::Neon::try_new() {
            return Self::Neon(level);
        }
        Self::Portable
    }

    /// Every level there is, the best first.
    #[cfg(test)]
    pub(crate) fn all() -> Vec<Self> {
        let mut all = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        all.extend(pulp::x86::V3::try_new().map(Self::Avx2));
        #[cfg(target_arch = "x86_64")]
        all.extend(pulp::x86::V4::try_new().map(Self::Avx512));
        #[cfg(target_arch = "aarch64")]
        all.extend(pulp::aarch64::Neon::try_new().map(Self::Neon));
        all.reverse();
        all
    }

    /// Runs a loop at this level.
    #[inline]
    pub(crate) fn run<F: Loop>(self, work: F) -> F::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(level) => level.vectorize(At { work, level }),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(level) => level.vectorize(At { work, level }),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(level) => level.vectorize(At { work, level }),
            Self::Portable => portable(work),
        }
    }
}

#[inline(never)]
fn portable<F: Loop>(work: F) -> F::Output {
    work.run(pulp::Scalar128b)
}

struct At<F, L> {
    work: F,
    level: L,
}

impl<F: Loop, L: Level> NullaryFnOnce for At<F, L> {
    type Output = F::Output;

    #[inline(always)]
    fn call(self) -> F::Output {
        self.work.run(self.level)
    }
}

impl Level for pulp::Scalar128b {}

#[cfg(target_arch = "aarch64")]
impl Level for pulp::aarch64::Neon {}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Level;
    use core::arch::x86_64::{__m256, __m256d, __m512, __m512d};
    use pulp::cast;
    use pulp::x86::{V3, V4};

    impl Level for V4 {
        #[inline(always)]
        fn transpose_f32(self, rows: &mut [pulp::f32x16; 16]) {
            let avx = self.avx512f;
            let mut a: [__m512; 16] = core::array::from_fn(|i| cast(rows[i]));
            let mut b = a;
            // pairs, then fours within quarters, then the quarters
            for i in 0..8 {
                b[2 * i] = avx._mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
                b[2 * i + 1] = avx._mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
            }
            for i in 0..4 {
                let [x, y, z, w]: [__m512d; 4] =
                    [cast(b[4 * i]), cast(b[4 * i + 1]), cast(b[4 * i + 2]), cast(b[4 * i + 3])];
                a[4 * i] = cast(avx._mm512_unpacklo_pd(x, z));
                a[4 * i + 1] = cast(avx._mm512_unpackhi_pd(x, z));
                a[4 * i + 2] = cast(avx._mm512_unpacklo_pd(y, w));
                a[4 * i + 3] = cast(avx._mm512_unpackhi_pd(y, w));
            }
            for i in 0..4 {
                let (x, y, z, w) = (a[i], a[4 + i], a[8 + i], a[12 + i]);
                let (xy_even, xy_odd) = (
                    avx._mm512_shuffle_f32x4::<0b10_00_10_00>(x, y),
                    avx._mm512_shuffle_f32x4::<0b11_01_11_01>(x, y),
                );
                let (zw_even, zw_odd) = (
                    avx._mm512_shuffle_f32x4::<0b10_00_10_00>(z, w),
                    avx._mm512_shuffle_f32x4::<0b11_01_11_01>(z, w),
                );
                b[i] = avx._mm512_shuffle_f32x4::<0b10_00_10_00>(xy_even, zw_even);
                b[8 + i] = avx._mm512_shuffle_f32x4::<0b11_01_11_01>(xy_even, zw_even);
                b[4 + i] = avx._mm512_shuffle_f32x4::<0b10_00_10_00>(xy_odd, zw_odd);
                b[12 + i] = avx._mm512_shuffle_f32x4::<0b11_01_11_01>(xy_odd, zw_odd);
            }
            *rows = core::array::from_fn(|i| cast(b[i]));
        }

        #[inline(always)]
        fn transpose_f64(self, rows: &mut [pulp::f64x8; 16]) {
            let avx = self.avx512f;
            let a: [__m512d; 8] = core::array::from_fn(|i| cast(rows[i]));
            let mut b = a;
            for i in 0..4 {
                b[2 * i] = avx._mm512_unpacklo_pd(a[2 * i], a[2 * i + 1]);
                b[2 * i + 1] = avx._mm512_unpackhi_pd(a[2 * i], a[2 * i + 1]);
            }
            for i in 0..2 {
                let (x, y, z, w) = (b[i], b[2 + i], b[4 + i], b[6 + i]);
                let (xy_even, xy_odd) = (
                    avx._mm512_shuffle_f64x2::<0b10_00_10_00>(x, y),
                    avx._mm512_shuffle_f64x2::<0b11_01_11_01>(x, y),
                );
                let (zw_even, zw_odd) = (
                    avx._mm512_shuffle_f64x2::<0b10_00_10_00>(z, w),
                    avx._mm512_shuffle_f64x2::<0b11_01_11_01>(z, w),
                );
                rows[i] = cast(avx._mm512_shuffle_f64x2::<0b10_00_10_00>(xy_even, zw_even));
                rows[4 + i] = cast(avx._mm512_shuffle_f64x2::<0b11_01_11_01>(xy_even, zw_even));
                rows[2 + i] = cast(avx._mm512_shuffle_f64x2::<0b10_00_10_00>(xy_odd, zw_odd));
                rows[6 + i] = cast(avx._mm512_shuffle_f64x2::<0b11_01_11_01>(xy_odd, zw_odd));
            }
        }
    }

    impl Level for V3 {
        #[inline(always)]
        fn transpose_f32(self, rows: &mut [pulp::f32x8; 16]) {
            let avx = self.avx;
            let mut a: [__m256; 8] = core::array::from_fn(|i| cast(rows[i]));
            let mut b = a;
            for i in 0..4 {
                b[2 * i] = avx._mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
                b[2 * i + 1] = avx._mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
            }
            for i in 0..2 {
                let [x, y, z, w]: [__m256d; 4] =
                    [cast(b[4 * i]), cast(b[4 * i + 1]), cast(b[4 * i + 2]), cast(b[4 * i + 3])];
                a[4 * i] = cast(avx._mm256_unpacklo_pd(x, z));
                a[4 * i + 1] = cast(avx._mm256_unpackhi_pd(x, z));
                a[4 * i + 2] = cast(avx._mm256_unpacklo_pd(y, w));
                a[4 * i + 3] = cast(avx._mm256_unpackhi_pd(y, w));
            }
            for i in 0..4 {
                rows[i] = cast(avx._mm256_permute2f128_ps::<0x20>(a[i], a[4 + i]));
                rows[4 + i] = cast(avx._mm256_permute2f128_ps::<0x31>(a[i], a[4 + i]));
            }
        }

        #[inline(always)]
        fn transpose_f64(self, rows: &mut [pulp::f64x4; 16]) {
            let avx = self.avx;
            let a: [__m256d; 4] = core::array::from_fn(|i| cast(rows[i]));
            let (x, y) = (avx._mm256_unpacklo_pd(a[0], a[1]), avx._mm256_unpackhi_pd(a[0], a[1]));
            let (z, w) = (avx._mm256_unpacklo_pd(a[2], a[3]), avx._mm256_unpackhi_pd(a[2], a[3]));
            rows[0] = cast(avx._mm256_permute2f128_pd::<0x20>(x, z));
            rows[1] = cast(avx._mm256_permute2f128_pd::<0x20>(y, w));
            rows[2] = cast(avx._mm256_permute2f128_pd::<0x31>(x, z));
            rows[3] = cast(avx._mm256_permute2f128_pd::<0x31>(y, w));
        }
    }
}
