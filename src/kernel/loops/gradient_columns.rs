//! Loops of backward passes, over arrays whose columns are tokens: `x [rows, width]`, row-major,
//! `width` a multiple of [`Lanes::PAD`].

use crate::kernel::loops::columns::{STRIP, load, store, strips};
use crate::kernel::simd::{Lanes, Level, Loop};

/// `sums_t += Σ_i x_it·y_it` for columns from `from` on, a multiple of [`Lanes::PAD`].
pub struct DotColumns<'a, T> {
    pub(crate) x: &'a [T],
    pub(crate) y: &'a [T],
    pub(crate) from: usize,
    pub(crate) sums: &'a mut [T],
}

impl<T: Lanes> Loop for DotColumns<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(mut self, level: L) {
        strips!(self, level, T, L, self.sums.len(), self.from);
    }
}

impl<T: Lanes> DotColumns<'_, T> {
    #[inline(always)]
    fn strip<L: Level, const V: usize>(&mut self, level: L, j: usize) {
        let width = self.sums.len();
        let mut sums = load::<T, L, V>(self.sums, j);
        for (x, y) in self.x.chunks_exact(width).zip(self.y.chunks_exact(width)) {
            let (x, y) = (load::<T, L, V>(x, j), load::<T, L, V>(y, j));
            for v in 0..V {
                sums[v] = T::vfma(level, x[v], y[v], sums[v]);
            }
        }
        store::<T, L, V>(self.sums, j, sums);
    }
}

/// `x_it ← x_it·a_t + r_i·b_t`.
pub struct AffineColumns<'a, T> {
    pub(crate) x: &'a mut [T],
    pub(crate) r: &'a [T],
    pub(crate) a: &'a [T],
    pub(crate) b: &'a [T],
}

impl<T: Lanes> Loop for AffineColumns<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(mut self, level: L) {
        strips!(self, level, T, L, self.a.len());
    }
}

impl<T: Lanes> AffineColumns<'_, T> {
    #[inline(always)]
    fn strip<L: Level, const V: usize>(&mut self, level: L, j: usize) {
        let width = self.a.len();
        let (a, b) = (load::<T, L, V>(self.a, j), load::<T, L, V>(self.b, j));
        for (row, &r) in self.x.chunks_exact_mut(width).zip(self.r) {
            let r = T::splat(level, r);
            let mut x = load::<T, L, V>(row, j);
            for v in 0..V {
                x[v] = T::vfma(level, x[v], a[v], T::vmul(level, r, b[v]));
            }
            store::<T, L, V>(row, j, x);
        }
    }
}

/// The causal part of up to [`Lanes::PAD`] rows: `x_it ← x_it·a_t + b_t` where `t ≥ first + i`, and
/// 0 in the columns from `first` before it. `first` is a multiple of that number; columns before it
/// are not looked at.
pub struct CausalAffine<'a, T> {
    pub(crate) x: &'a mut [T],
    pub(crate) first: usize,
    pub(crate) a: &'a [T],
    pub(crate) b: &'a [T],
}

impl<T: Lanes> Loop for CausalAffine<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let (lanes, width, first) = (T::lanes::<L>(), self.a.len(), self.first);
        let mut j = first;
        while j < width {
            let a = load::<T, L, 1>(self.a, j)[0];
            let b = load::<T, L, 1>(self.b, j)[0];
            for (i, row) in self.x.chunks_exact_mut(width).enumerate() {
                let x = &mut T::vectors_mut::<L>(&mut row[j..j + lanes])[0];
                *x = T::vfma(level, *x, a, b);
                if j < first + T::PAD {
                    let seen = &T::triangle()[i * T::PAD + j - first..][..lanes];
                    *x = T::vmul(level, *x, T::vectors::<L>(seen)[0]);
                }
            }
            j += lanes;
        }
    }
}

/// `x_it ← (x_it + factor·y_it)·scales_t`.
pub struct AddAndScaleColumns<'a, T> {
    pub(crate) x: &'a mut [T],
    pub(crate) factor: T,
    pub(crate) y: &'a [T],
    pub(crate) scales: &'a [T],
}

impl<T: Lanes> Loop for AddAndScaleColumns<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(mut self, level: L) {
        strips!(self, level, T, L, self.scales.len());
    }
}

impl<T: Lanes> AddAndScaleColumns<'_, T> {
    #[inline(always)]
    fn strip<L: Level, const V: usize>(&mut self, level: L, j: usize) {
        let width = self.scales.len();
        let (factor, scales) = (T::splat(level, self.factor), load::<T, L, V>(self.scales, j));
        for (row, y) in self.x.chunks_exact_mut(width).zip(self.y.chunks_exact(width)) {
            let (mut x, y) = (load::<T, L, V>(row, j), load::<T, L, V>(y, j));
            for v in 0..V {
                x[v] = T::vmul(level, T::vfma(level, factor, y[v], x[v]), scales[v]);
            }
            store::<T, L, V>(row, j, x);
        }
    }
}

/// `sum_t += root·(y_t − total_t·root·x_t)` for rows of `length` numbers, those of `y` `stride`
/// apart.
pub struct AddExponentialRows<'a, T> {
    pub(crate) y: &'a [T],
    pub(crate) stride: usize,
    pub(crate) x: &'a [T],
    pub(crate) totals: &'a [T],
    pub(crate) root: T,
    pub(crate) length: usize,
    pub(crate) sum: &'a mut [T],
}

impl<T: Lanes> Loop for AddExponentialRows<'_, T> {
    /// Σ sum·0.
    type Output = T;

    #[inline(always)]
    fn run<L: Level>(self, level: L) -> T {
        let whole = self.length / T::lanes::<L>() * T::lanes::<L>();
        let (root, zero) = (T::splat(level, self.root), T::splat(level, T::zero()));
        let rows = self.sum.chunks_exact_mut(self.length).zip(self.y.chunks_exact(self.stride));
        let (mut mark, mut rest_mark) = (zero, T::zero());
        for ((sum, y), (x, &total)) in rows.zip(self.x.chunks_exact(self.length).zip(self.totals)) {
            let own = -(self.root * self.root * total);
            let splat = T::splat(level, own);
            let (sum, rest) = sum.split_at_mut(whole);
            let terms = T::vectors::<L>(y).iter().zip(T::vectors::<L>(x));
            for (sum, (y, x)) in T::vectors_mut::<L>(sum).iter_mut().zip(terms) {
                *sum = T::vfma(level, root, *y, T::vfma(level, splat, *x, *sum));
                mark = T::vfma(level, *sum, zero, mark);
            }
            for ((sum, &y), &x) in rest.iter_mut().zip(&y[whole..]).zip(&x[whole..]) {
                *sum = *sum + self.root * y + own * x;
                rest_mark = rest_mark + *sum * T::zero();
            }
        }
        T::vsum(level, mark) + rest_mark
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::simd::machine::Machine;

    fn numbers<T: Lanes>(n: usize, seed: f64) -> Vec<T> {
        #[allow(clippy::cast_precision_loss)]
        (0..n).map(|i| T::from((i as f64 * 0.7 + seed).sin()).unwrap()).collect()
    }

    fn check<T: Lanes + core::fmt::Debug>(machine: Machine, tolerance: f64) {
        let close = |found: T, exact: T| {
            let difference = (found - exact).abs().to_f64().unwrap();
            assert!(difference <= tolerance, "{machine:?}: {found:?} instead of {exact:?}");
        };
        for width in [T::PAD, 2 * T::PAD, 4 * T::PAD, 5 * T::PAD] {
            for rows in [1, 3, T::PAD, 20] {
                let (x, y) = (numbers::<T>(rows * width, 0.1), numbers::<T>(rows * width, 0.9));
                let [a, b] = [0.3, 0.5].map(|seed| numbers::<T>(width, seed));
                let r = numbers::<T>(rows, 0.7);
                for from in [0, T::PAD, 3 * T::PAD].into_iter().filter(|from| *from < width) {
                    let mut sums = a.clone();
                    machine.run(DotColumns { x: &x, y: &y, from, sums: &mut sums });
                    for t in 0..width {
                        let product = |i: usize| x[i * width + t] * y[i * width + t];
                        let all = (0..rows).fold(a[t], |sum, i| sum + product(i));
                        close(sums[t], if t < from { a[t] } else { all });
                    }
                    if rows <= T::PAD && from + rows <= width {
                        let mut z = x.clone();
                        machine.run(CausalAffine { x: &mut z, first: from, a: &a, b: &b });
                        for (i, row) in z.chunks_exact(width).enumerate() {
                            for t in from..width {
                                let seen = x[i * width + t] * a[t] + b[t];
                                close(row[t], if t < from + i { T::zero() } else { seen });
                            }
                        }
                    }
                }
                let mut z = x.clone();
                machine.run(AffineColumns { x: &mut z, r: &r, a: &a, b: &b });
                for (i, z) in z.iter().enumerate() {
                    close(*z, x[i] * a[i % width] + r[i / width] * b[i % width]);
                }
                let mut z = x.clone();
                machine.run(AddAndScaleColumns { x: &mut z, factor: r[0], y: &y, scales: &a });
                for (i, z) in z.iter().enumerate() {
                    close(*z, (x[i] + r[0] * y[i]) * a[i % width]);
                }
            }
        }
    }

    fn check_rows<T: Lanes + core::fmt::Debug>(machine: Machine, tolerance: f64) {
        let close = |found: T, exact: T| {
            let difference = (found - exact).abs().to_f64().unwrap();
            assert!(difference <= tolerance, "{machine:?}: {found:?} instead of {exact:?}");
        };
        for length in [1, 3, T::PAD, 2 * T::PAD + 5] {
            let stride = length.next_multiple_of(T::PAD);
            let y = numbers::<T>(5 * stride, 0.2);
            let [x, sum] = [0.6, 0.8].map(|seed| numbers::<T>(5 * length, seed));
            let (totals, root) = (numbers::<T>(5, 0.4), y[1]);
            let at = |i: usize| y[i / length * stride + i % length];
            let mut z = sum.clone();
            let (x, totals) = (&x[..], &totals[..]);
            machine.run(AddExponentialRows { y: &y, stride, x, totals, root, length, sum: &mut z });
            for i in 0..5 * length {
                close(z[i], sum[i] + root * (at(i) - totals[i / length] * root * x[i]));
            }
        }
    }

    #[test]
    fn loops_agree_with_their_formulas_at_every_level() {
        for machine in Machine::all() {
            check::<f32>(machine, 2e-5);
            check::<f64>(machine, 1e-13);
            check_rows::<f32>(machine, 2e-5);
            check_rows::<f64>(machine, 1e-13);
        }
    }
}
