//! The levels of x86-64: squares transposed with their shuffles, short numbers widened.

use crate::kernel::simd::Level;
use core::arch::x86_64::{__m128i, __m256, __m256d, __m256i, __m512, __m512d};
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

    #[inline(always)]
    fn widen_bytes_f32(self, x: &[i8]) -> pulp::f32x16 {
        let avx = self.avx512f;
        let bytes: __m128i = cast(first::<i8, 16>(x));
        cast(avx._mm512_cvtepi32_ps(avx._mm512_cvtepi8_epi32(bytes)))
    }

    #[inline(always)]
    fn widen_bytes_f64(self, x: &[i8]) -> pulp::f64x8 {
        let integers = self.avx2._mm256_cvtepi8_epi32(eight(x));
        cast(self.avx512f._mm512_cvtepi32_pd(integers))
    }

    #[inline(always)]
    fn widen_bf16_f32(self, x: &[u16]) -> pulp::f32x16 {
        let avx = self.avx512f;
        let halves: __m256i = cast(first::<u16, 16>(x));
        cast(avx._mm512_slli_epi32::<16>(avx._mm512_cvtepu16_epi32(halves)))
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

    #[inline(always)]
    fn widen_bytes_f32(self, x: &[i8]) -> pulp::f32x8 {
        cast(self.avx._mm256_cvtepi32_ps(self.avx2._mm256_cvtepi8_epi32(eight(x))))
    }

    #[inline(always)]
    fn widen_bf16_f32(self, x: &[u16]) -> pulp::f32x8 {
        let halves: __m128i = cast(first::<u16, 8>(x));
        cast(self.avx2._mm256_slli_epi32::<16>(self.avx2._mm256_cvtepu16_epi32(halves)))
    }
}

/// The first numbers of a slice.
#[inline(always)]
fn first<E: Copy, const N: usize>(x: &[E]) -> [E; N] {
    *x.first_chunk().expect("a vector of numbers")
}

/// The first eight bytes of a slice, then zeros.
#[inline(always)]
fn eight(x: &[i8]) -> __m128i {
    cast([cast::<[i8; 8], u64>(first(x)), 0])
}
