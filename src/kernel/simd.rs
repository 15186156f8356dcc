//! SIMD levels and vectors: what an inner loop needs, written once for `f32` and `f64` and compiled
//! for every level.
//!
//! A loop is a [`Loop`]: a struct of its arguments whose `run` is inlined into a function that has
//! the instructions of its level. Helpers of such loops must be `#[inline(always)]`: what is not
//! inlined loses them.

pub(crate) mod exp2;
pub(crate) mod machine;
pub(crate) mod numbers;
#[cfg(target_arch = "x86_64")]
mod x86;

use pulp::Simd;

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

    /// A vector of the first bytes of a slice.
    #[inline(always)]
    fn widen_bytes_f32(self, x: &[i8]) -> Self::f32s {
        plain_widened::<f32, Self>(self, |i| f32::from(x[i]))
    }

    /// A vector of the first bytes of a slice.
    #[inline(always)]
    fn widen_bytes_f64(self, x: &[i8]) -> Self::f64s {
        plain_widened::<f64, Self>(self, |i| f64::from(x[i]))
    }

    /// A vector of the first bfloat16 of a slice.
    #[inline(always)]
    fn widen_bf16_f32(self, x: &[u16]) -> Self::f32s {
        plain_widened::<f32, Self>(self, |i| f32::from_bits(u32::from(x[i]) << 16))
    }

    /// A vector of the first bfloat16 of a slice.
    #[inline(always)]
    fn widen_bf16_f64(self, x: &[u16]) -> Self::f64s {
        plain_widened::<f64, Self>(self, |i| f64::from(f32::from_bits(u32::from(x[i]) << 16)))
    }
}

#[inline(always)]
fn plain_widened<T: Lanes, L: Level>(level: L, number: impl Fn(usize) -> T) -> T::V<L> {
    let mut vector = [T::splat(level, T::zero())];
    for (i, to) in T::elements_mut::<L>(&mut vector).iter_mut().enumerate() {
        *to = number(i);
    }
    vector[0]
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
    /// `x` where a > b, else `y`.
    fn vselect_greater<S: Simd>(
        s: S,
        a: Self::V<S>,
        b: Self::V<S>,
        x: Self::V<S>,
        y: Self::V<S>,
    ) -> Self::V<S>;
    /// |a|.
    fn vabs<S: Simd>(s: S, a: Self::V<S>) -> Self::V<S>;
    /// 2ˣ for x up to 100, see [`exp2`].
    fn vexp2<S: Simd>(s: S, x: Self::V<S>) -> Self::V<S>;
    /// 2ˣ − 1 for x that are not positive, see [`exp2`].
    fn vexp2_minus_1<S: Simd>(s: S, x: Self::V<S>) -> Self::V<S>;
    /// |a| with the sign of b.
    fn vwith_sign<S: Simd>(s: S, a: Self::V<S>, b: Self::V<S>) -> Self::V<S>;
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
    /// A vector of the first bytes of a slice.
    fn vwiden_bytes<L: Level>(level: L, x: &[i8]) -> Self::V<L>;
    /// A vector of the first bfloat16 of a slice.
    fn vwiden_bf16<L: Level>(level: L, x: &[u16]) -> Self::V<L>;
    /// A square of [`PAD`](Self::PAD) rows: 1 on the diagonal and right of it, 0 elsewhere.
    fn triangle() -> &'static [Self];
    /// Transposes a square.
    fn vtranspose<L: Level>(level: L, rows: &mut [Self::V<L>; 16]);
}

/// An inner loop with its arguments.
pub trait Loop {
    /// What it returns.
    type Output;

    /// Runs it; implementations are `#[inline(always)]`.
    fn run<L: Level>(self, level: L) -> Self::Output;
}
