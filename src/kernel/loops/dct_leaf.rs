//! Transforms of up to 32 points, written out so that they stay in registers, and the rotations and
//! sums that larger ones share with them. Letters are those of the split of larger ones.

use crate::kernel::simd::{Lanes, Level, Loop};

/// Points of the largest transform that is written out.
pub(crate) const LEAF: usize = 32;

/// Twiddles of the transforms that are written out.
pub(crate) type Twiddles<T> = [[T; 2]; LEAF / 2];

/// A transform of `N` points, from `points` to `coefficients`, or the other way where `BACK`.
pub(crate) struct Leaf<'a, T, const BACK: bool, const N: usize> {
    pub(crate) points: &'a mut [T],
    pub(crate) coefficients: &'a mut [T],
    pub(crate) twiddles: &'a [[T; 2]],
}

impl<T: Lanes, const BACK: bool, const N: usize> Loop for Leaf<'_, T, BACK, N>
where
    Written: Points<N>,
{
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let twiddles: &Twiddles<T> =
            self.twiddles.first_chunk().expect("twiddles of the largest leaf");
        let (points, coefficients) =
            (T::vectors_mut::<L>(self.points), T::vectors_mut::<L>(self.coefficients));
        let points: &mut [T::V<L>; N] = points.first_chunk_mut().expect("as many points");
        let coefficients: &mut [T::V<L>; N] =
            coefficients.first_chunk_mut().expect("as many coefficients");
        if BACK {
            *points = Written::dct3::<T, L>(level, coefficients, twiddles);
        } else {
            *coefficients = Written::dct2::<T, L>(level, points, twiddles);
        }
    }
}

/// Written-out transforms of `N` points.
///
/// Arrays are listed, not filled in loops, and indices are literals: else the compiler would keep
/// the arrays of 32 in memory.
pub(crate) trait Points<const N: usize> {
    /// A DCT-II.
    fn dct2<T: Lanes, L: Level>(level: L, x: &[T::V<L>; N], twiddles: &Twiddles<T>)
    -> [T::V<L>; N];
    /// The transpose of a DCT-II.
    fn dct3<T: Lanes, L: Level>(level: L, x: &[T::V<L>; N], twiddles: &Twiddles<T>)
    -> [T::V<L>; N];
}

/// The points of which transforms are written out.
pub(crate) struct Written;

impl Points<1> for Written {
    #[inline(always)]
    fn dct2<T: Lanes, L: Level>(_: L, x: &[T::V<L>; 1], _: &Twiddles<T>) -> [T::V<L>; 1] {
        *x
    }

    #[inline(always)]
    fn dct3<T: Lanes, L: Level>(_: L, x: &[T::V<L>; 1], _: &Twiddles<T>) -> [T::V<L>; 1] {
        *x
    }
}

impl Points<2> for Written {
    #[inline(always)]
    fn dct2<T: Lanes, L: Level>(
        level: L,
        x: &[T::V<L>; 2],
        twiddles: &Twiddles<T>,
    ) -> [T::V<L>; 2] {
        let cos = T::splat(level, twiddles[0][0]);
        [T::vadd(level, x[0], x[1]), T::vmul(level, cos, T::vsub(level, x[0], x[1]))]
    }

    #[inline(always)]
    fn dct3<T: Lanes, L: Level>(
        level: L,
        x: &[T::V<L>; 2],
        twiddles: &Twiddles<T>,
    ) -> [T::V<L>; 2] {
        let cos = T::splat(level, twiddles[0][0]);
        [T::vfma(level, cos, x[1], x[0]), T::vfma(level, neg::<T, L>(level, cos), x[1], x[0])]
    }
}

macro_rules! points {
    ($n:literal: $($q:literal)*, $($h:literal)*, $($r:literal)*) => {
        impl Points<$n> for Written {
            #[inline(always)]
            fn dct2<T: Lanes, L: Level>(
                level: L,
                x: &[T::V<L>; $n],
                twiddles: &Twiddles<T>,
            ) -> [T::V<L>; $n] {
                const Q: usize = $n / 4;
                let parts = [$(split::<T, L>(
                    level,
                    [x[$q], x[2 * Q - 1 - $q], x[2 * Q + $q], x[$n - 1 - $q]],
                    &twiddles[Q + $q],
                    $q % 2 == 1,
                )),*];
                let u = [$(parts[$q][0],)* $(parts[2 * Q - 1 - $h][1]),*];
                let u: [T::V<L>; 2 * Q] = Self::dct2::<T, L>(level, &u, twiddles);
                let c: [T::V<L>; Q] = Self::dct2::<T, L>(level, &[$(parts[$q][2]),*], twiddles);
                let s: [T::V<L>; Q] =
                    Self::dct2::<T, L>(level, &[$(parts[Q - 1 - $q][3]),*], twiddles);
                [
                    $(coefficient::<T, L>(level, [&u, &c, &s], $q),)*
                    $(coefficient::<T, L>(level, [&u, &c, &s], $h),)*
                    $(coefficient::<T, L>(level, [&u, &c, &s], $r)),*
                ]
            }

            #[inline(always)]
            fn dct3<T: Lanes, L: Level>(
                level: L,
                x: &[T::V<L>; $n],
                twiddles: &Twiddles<T>,
            ) -> [T::V<L>; $n] {
                const Q: usize = $n / 4;
                const H: usize = $n / 2;
                let pairs = [$(if $q == 0 {
                    (x[1], x[$n - 1])
                } else {
                    parted::<T, L>(level, x[(4 * $q + $n - 1) % $n], x[4 * $q + 1], $q % 2 == 1)
                }),*];
                let u: [T::V<L>; H] =
                    Self::dct3::<T, L>(level, &[$(x[2 * $q],)* $(x[2 * $h]),*], twiddles);
                let c: [T::V<L>; Q] = Self::dct3::<T, L>(level, &[$(pairs[$q].0),*], twiddles);
                let s: [T::V<L>; Q] = Self::dct3::<T, L>(
                    level,
                    &[$(pairs[if $q == 0 { 0 } else { Q - $q }].1),*],
                    twiddles,
                );
                let parts = [$(unsplit::<T, L>(
                    level,
                    [u[$q], u[H - 1 - $q], c[$q], s[Q - 1 - $q]],
                    &twiddles[Q + $q],
                    $q % 2 == 1,
                )),*];
                [
                    $(parts[$q][0],)*
                    $(parts[H - 1 - $h][1],)*
                    $(if $r < H + Q {
                        parts[$r & (Q - 1)][2]
                    } else {
                        parts[($n - 1 - $r) & (Q - 1)][3]
                    }),*
                ]
            }
        }
    };
}
points!(4: 0, 1, 2 3);
points!(8: 0 1, 2 3, 4 5 6 7);
points!(16: 0 1 2 3, 4 5 6 7, 8 9 10 11 12 13 14 15);
points!(32: 0 1 2 3 4 5 6 7, 8 9 10 11 12 13 14 15,
    16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31);

/// −a.
#[inline(always)]
fn neg<T: Lanes, L: Level>(level: L, a: T::V<L>) -> T::V<L> {
    T::vsub(level, T::splat(level, T::neg_zero()), a)
}

/// (c_j, s_{q−1−j}) of (d_j, e_j).
#[inline(always)]
fn rotated<T: Lanes, L: Level>(
    level: L,
    twiddle: &[T; 2],
    d: T::V<L>,
    e: T::V<L>,
    j_is_odd: bool,
) -> (T::V<L>, T::V<L>) {
    let (cos, sin) = (T::splat(level, twiddle[0]), T::splat(level, twiddle[1]));
    let c = T::vfma(level, sin, e, T::vmul(level, cos, d));
    let s = if j_is_odd {
        T::vfma(level, neg::<T, L>(level, sin), d, T::vmul(level, cos, e))
    } else {
        T::vfma(level, neg::<T, L>(level, cos), e, T::vmul(level, sin, d))
    };
    (c, s)
}

/// (d_j, e_j) of (c_j, s_{q−1−j}): the transpose of [`rotated`].
#[inline(always)]
fn rotated_back<T: Lanes, L: Level>(
    level: L,
    twiddle: &[T; 2],
    c: T::V<L>,
    s: T::V<L>,
    j_is_odd: bool,
) -> (T::V<L>, T::V<L>) {
    let (cos, sin) = (T::splat(level, twiddle[0]), T::splat(level, twiddle[1]));
    let (d, e) = (T::vmul(level, cos, c), T::vmul(level, sin, c));
    if j_is_odd {
        (T::vfma(level, neg::<T, L>(level, sin), s, d), T::vfma(level, cos, s, e))
    } else {
        (T::vfma(level, sin, s, d), T::vfma(level, neg::<T, L>(level, cos), s, e))
    }
}

/// (X_{4k−1}, X_{4k+1}) of (C_k, S_{q−k}).
#[inline(always)]
pub(crate) fn joined<T: Lanes, L: Level>(
    level: L,
    c: T::V<L>,
    s: T::V<L>,
    k_is_odd: bool,
) -> (T::V<L>, T::V<L>) {
    let (sum, difference) = (T::vadd(level, c, s), T::vsub(level, c, s));
    if k_is_odd { (difference, sum) } else { (sum, difference) }
}

/// (C_k, S_{q−k}) of (X_{4k−1}, X_{4k+1}): the transpose of [`joined`].
#[inline(always)]
pub(crate) fn parted<T: Lanes, L: Level>(
    level: L,
    before: T::V<L>,
    after: T::V<L>,
    k_is_odd: bool,
) -> (T::V<L>, T::V<L>) {
    let s = if k_is_odd { T::vsub(level, after, before) } else { T::vsub(level, before, after) };
    (T::vadd(level, before, after), s)
}

/// u_j, u_{h−1−j}, c_j and s_{q−1−j} of x_j, x_{h−1−j}, x_{h+j} and x_{M−1−j}.
#[inline(always)]
pub(crate) fn split<T: Lanes, L: Level>(
    level: L,
    [a, b, y, z]: [T::V<L>; 4],
    twiddle: &[T; 2],
    j_is_odd: bool,
) -> [T::V<L>; 4] {
    let (c, s) =
        rotated::<T, L>(level, twiddle, T::vsub(level, a, z), T::vsub(level, b, y), j_is_odd);
    [T::vadd(level, a, z), T::vadd(level, b, y), c, s]
}

/// x_j, x_{h−1−j}, x_{h+j} and x_{M−1−j} of u_j, u_{h−1−j}, c_j and s_{q−1−j}: the transpose of
/// [`split`].
#[inline(always)]
pub(crate) fn unsplit<T: Lanes, L: Level>(
    level: L,
    [u, v, c, s]: [T::V<L>; 4],
    twiddle: &[T; 2],
    j_is_odd: bool,
) -> [T::V<L>; 4] {
    let (d, e) = rotated_back::<T, L>(level, twiddle, c, s, j_is_odd);
    [T::vadd(level, u, d), T::vadd(level, v, e), T::vsub(level, v, e), T::vsub(level, u, d)]
}

/// X_i of U, C and S.
#[inline(always)]
fn coefficient<T: Lanes, L: Level>(level: L, [u, c, s]: [&[T::V<L>]; 3], i: usize) -> T::V<L> {
    let (k, q) = (i.div_ceil(4), s.len());
    match i % 4 {
        0 | 2 => u[i / 2],
        1 if i == 1 => c[0],
        3 if k == q => s[0],
        1 => joined::<T, L>(level, c[k - 1], s[q + 1 - k], k % 2 == 0).1,
        _ => joined::<T, L>(level, c[k], s[q - k], k % 2 == 1).0,
    }
}
