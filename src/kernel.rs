//! The inner loops: exponentials, dot products, rank-one updates, matrix products. Speed lives here and nowhere else.
//!
//! Loops run over slices in blocks of [`LANES`] independent accumulators, so that the compiler can vectorise them.
//! Matrix products go through `ndarray`.

pub(crate) mod dct;
pub(crate) mod exp;

use crate::Scalar;
use ndarray::{ArrayView2, ArrayViewMut2, linalg::general_mat_mul};

/// Tokens of linear attention that are mapped and summed at once.
pub(crate) const CHUNK: usize = 64;

/// Accumulators of a reduction: four vectors of `f32` at the baseline of x86-64, one of the widest there are.
const LANES: usize = 16;

/// `c = alpha·a·b + beta·c`.
#[inline]
pub(crate) fn matmul<T: Scalar>(
    alpha: T,
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
    beta: T,
    c: &mut ArrayViewMut2<'_, T>,
) {
    general_mat_mul(alpha, &a, &b, beta, c);
}

/// Σ f(xᵢ) over independent accumulators.
#[inline(always)]
fn reduce<T: Scalar>(x: &[T], start: T, lane: impl Fn(T, T) -> T + Copy) -> T {
    let mut sums = [start; LANES];
    let mut blocks = x.chunks_exact(LANES);
    for block in &mut blocks {
        for (s, &a) in sums.iter_mut().zip(block) {
            *s = lane(*s, a);
        }
    }
    let rest = blocks.remainder().iter().fold(start, |rest, &a| lane(rest, a));
    lane(fold(sums, lane), rest)
}

/// One number from all accumulators, by halves: a chain of four steps, where one after the other would take fifteen.
#[inline(always)]
fn fold<T: Scalar>(mut sums: [T; LANES], lane: impl Fn(T, T) -> T) -> T {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            sums[i] = lane(sums[i], sums[i + half]);
        }
    }
    sums[0]
}

/// Σ xᵢ.
#[inline]
pub(crate) fn sum<T: Scalar>(x: &[T]) -> T {
    reduce(x, T::zero(), |s, a| s + a)
}

/// max xᵢ, or −∞ of nothing.
#[inline]
pub(crate) fn max<T: Scalar>(x: &[T]) -> T {
    reduce(x, T::neg_infinity(), |s, a| if a > s { a } else { s })
}

/// max |xᵢ|, or 0 of nothing; NaN is passed over.
#[inline]
pub(crate) fn max_abs<T: Scalar>(x: &[T]) -> T {
    reduce(x, T::zero(), |s, a| if a.abs() > s { a.abs() } else { s })
}

/// Whether every element is finite.
#[inline]
pub(crate) fn all_finite<T: Scalar>(x: &[T]) -> bool {
    // x·0 is 0 for finite x and NaN otherwise
    reduce(x, T::zero(), |s, a| s + a * T::zero()) == T::zero()
}

/// Σ xᵢyᵢ.
#[inline]
pub(crate) fn dot<T: Scalar>(x: &[T], y: &[T]) -> T {
    let mut sums = [T::zero(); LANES];
    let mut xs = x.chunks_exact(LANES);
    let mut ys = y.chunks_exact(LANES);
    for (a, b) in (&mut xs).zip(&mut ys) {
        for ((s, &a), &b) in sums.iter_mut().zip(a).zip(b) {
            *s += a * b;
        }
    }
    let rest = xs.remainder().iter().zip(ys.remainder()).fold(T::zero(), |rest, (&a, &b)| rest + a * b);
    fold(sums, |s, a| s + a) + rest
}

/// `x *= factor`.
#[inline]
pub(crate) fn scale<T: Scalar>(x: &mut [T], factor: T) {
    for a in x {
        *a *= factor;
    }
}

/// `x *= factors`, element by element.
#[inline]
pub(crate) fn multiply<T: Scalar>(x: &mut [T], factors: &[T]) {
    for (a, &factor) in x.iter_mut().zip(factors) {
        *a *= factor;
    }
}

/// `y += factor·x`.
#[inline]
pub(crate) fn add_scaled<T: Scalar>(y: &mut [T], factor: T, x: &[T]) {
    for (b, &a) in y.iter_mut().zip(x) {
        *b += factor * a;
    }
}

/// `sum += factor·x` with the rounding error of every addition carried in `low` (Kahan, 1965), so that the error does
/// not grow with the number of additions.
#[inline]
pub(crate) fn add_compensated<T: Scalar>(sum: &mut [T], low: &mut [T], factor: T, x: &[T]) {
    for ((s, c), &a) in sum.iter_mut().zip(low).zip(x) {
        let addend = factor * a + *c;
        let total = *s + addend;
        *c = addend - (total - *s);
        *s = total;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reductions_agree_with_plain_loops_at_every_size() {
        for n in 0..130_u32 {
            let x: Vec<f64> = (0..n).map(|i| (f64::from(i) * 0.7).sin()).collect();
            let y: Vec<f64> = (0..n).map(|i| (f64::from(i) * 1.3).cos()).collect();
            let plain: f64 = x.iter().sum();
            assert!((sum(&x) - plain).abs() < 1e-12);
            let plain: f64 = x.iter().zip(&y).map(|(a, b)| a * b).sum();
            assert!((dot(&x, &y) - plain).abs() < 1e-12);
            assert_eq!(max(&x), x.iter().copied().fold(f64::NEG_INFINITY, f64::max));
            assert_eq!(max_abs(&x), x.iter().fold(0.0, |m: f64, a| m.max(a.abs())));
            assert!(all_finite(&x));
        }
    }

    #[test]
    fn compensated_sums_do_not_stall() {
        let (mut sum, mut low) = ([16_777_216.0_f32], [0.0]); // 2^24: adding 1 changes nothing in f32
        for _ in 0..1000 {
            add_compensated(&mut sum, &mut low, 0.5, &[2.0]);
        }
        assert_eq!(sum[0], 16_778_216.0);
    }

    #[test]
    fn all_finite_sees_every_position() {
        for n in 1..70 {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for at in 0..n {
                    let mut x = vec![1.0_f32; n];
                    x[at] = bad;
                    assert!(!all_finite(&x), "{bad} at {at} of {n}");
                }
            }
        }
        assert!(all_finite(&[f32::MAX, f32::MIN_POSITIVE / 4.0, -0.0]));
    }
}
