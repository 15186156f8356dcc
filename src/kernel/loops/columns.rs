//! Loops over arrays whose columns are tokens: `x [rows, width]`, row-major, `width` a multiple of
//! [`Lanes::PAD`]. A number for each token is then a row of its own, and no sum or maximum runs
//! across the lanes of a vector.
//!
//! Loops over the vectors of a strip are written out: a closure (as in `array::from_fn`) may not be
//! inlined and then runs without the instructions of its level, a hundred times slower.

use crate::kernel::simd::{Lanes, Level, Loop};

/// Columns that are worked on at once, in vectors.
pub(crate) const STRIP: usize = 4;

/// Calls `strip` for every strip of columns, from the first or from another one on.
macro_rules! strips {
    ($self:ident, $level:ident, $T:ident, $L:ident, $width:expr) => {
        strips!($self, $level, $T, $L, $width, 0);
    };
    ($self:ident, $level:ident, $T:ident, $L:ident, $width:expr, $from:expr) => {
        let (lanes, width) = ($T::lanes::<$L>(), $width);
        let mut j = $from;
        while j + STRIP * lanes <= width {
            $self.strip::<$L, STRIP>($level, j);
            j += STRIP * lanes;
        }
        while j < width {
            $self.strip::<$L, 1>($level, j);
            j += lanes;
        }
    };
}
pub(super) use strips;

/// `V` vectors of a slice from `j` on.
#[inline(always)]
pub(crate) fn load<T: Lanes, L: Level, const V: usize>(x: &[T], j: usize) -> [T::V<L>; V] {
    *T::vectors::<L>(&x[j..j + V * T::lanes::<L>()]).first_chunk().expect("as many vectors")
}

#[inline(always)]
pub(crate) fn store<T: Lanes, L: Level, const V: usize>(
    x: &mut [T],
    j: usize,
    values: [T::V<L>; V],
) {
    let x = T::vectors_mut::<L>(&mut x[j..j + V * T::lanes::<L>()]);
    x[..V].copy_from_slice(&values);
}

/// `out_t = max_i x_it`, then `x_it ← 2^(x_it − out_t)`.
pub struct Exp2ColumnsBelowMaximum<'a, T> {
    pub(crate) x: &'a mut [T],
    pub(crate) out: &'a mut [T],
}

impl<T: Lanes> Loop for Exp2ColumnsBelowMaximum<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(mut self, level: L) {
        strips!(self, level, T, L, self.out.len());
    }
}

impl<T: Lanes> Exp2ColumnsBelowMaximum<'_, T> {
    #[inline(always)]
    fn strip<L: Level, const V: usize>(&mut self, level: L, j: usize) {
        let width = self.out.len();
        let mut largest = [T::splat(level, T::neg_infinity()); V];
        for row in self.x.chunks_exact(width) {
            let x = load::<T, L, V>(row, j);
            for v in 0..V {
                largest[v] = T::vmax(level, largest[v], x[v]);
            }
        }
        for row in self.x.chunks_exact_mut(width) {
            let mut x = load::<T, L, V>(row, j);
            for v in 0..V {
                x[v] = T::vexp2(level, T::vsub(level, x[v], largest[v]));
            }
            store::<T, L, V>(row, j, x);
        }
        store::<T, L, V>(self.out, j, largest);
    }
}

/// One tile of an online softmax: `log_scale_t ← max(log_scale_t, max_i scores_it)`, then
/// `scores_it ← 2^(scores_it − log_scale_t)`; `correction_t = 2^(old log_scale_t − log_scale_t)`
/// and `denominator_t ← correction_t·denominator_t + Σ_i scores_it`.
pub struct OnlineSoftmax<'a, T> {
    pub(crate) scores: &'a mut [T],
    pub(crate) log_scale: &'a mut [T],
    pub(crate) denominator: &'a mut [T],
    pub(crate) correction: &'a mut [T],
    pub(crate) changed: bool,
}

impl<T: Lanes> Loop for OnlineSoftmax<'_, T> {
    type Output = bool;

    #[inline(always)]
    fn run<L: Level>(mut self, level: L) -> bool {
        strips!(self, level, T, L, self.log_scale.len());
        self.changed
    }
}

impl<T: Lanes> OnlineSoftmax<'_, T> {
    #[inline(always)]
    fn strip<L: Level, const V: usize>(&mut self, level: L, j: usize) {
        let width = self.log_scale.len();
        let old = load::<T, L, V>(self.log_scale, j);
        let mut new = old;
        for row in self.scores.chunks_exact(width) {
            let x = load::<T, L, V>(row, j);
            for v in 0..V {
                new[v] = T::vmax(level, new[v], x[v]);
            }
        }
        let mut sums = [T::splat(level, T::zero()); V];
        for row in self.scores.chunks_exact_mut(width) {
            let mut x = load::<T, L, V>(row, j);
            for v in 0..V {
                x[v] = T::vexp2(level, T::vsub(level, x[v], new[v]));
                sums[v] = T::vadd(level, sums[v], x[v]);
            }
            store::<T, L, V>(row, j, x);
        }
        let (mut correction, mut denominator) = (old, load::<T, L, V>(self.denominator, j));
        for v in 0..V {
            correction[v] = T::vexp2(level, T::vsub(level, old[v], new[v]));
            denominator[v] = T::vfma(level, denominator[v], correction[v], sums[v]);
        }
        store::<T, L, V>(self.denominator, j, denominator);
        store::<T, L, V>(self.log_scale, j, new);
        store::<T, L, V>(self.correction, j, correction);
        self.changed |= self.correction[j..j + V * T::lanes::<L>()].iter().any(|&c| c != T::one());
    }
}

/// `x_it ← x_it·factor_t`, and `sums_i = Σ_t` of the result.
pub struct ScaleAndSumRows<'a, T> {
    pub(crate) x: &'a mut [T],
    pub(crate) factors: &'a [T],
    pub(crate) sums: &'a mut [T],
}

impl<T: Lanes> Loop for ScaleAndSumRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let factors = T::vectors::<L>(self.factors);
        for (row, sum) in self.x.chunks_exact_mut(self.factors.len()).zip(self.sums) {
            let mut total = T::splat(level, T::zero());
            for (x, factor) in T::vectors_mut::<L>(row).iter_mut().zip(factors) {
                *x = T::vmul(level, *x, *factor);
                total = T::vadd(level, total, *x);
            }
            *sum = T::vsum(level, total);
        }
    }
}

/// `x_it ← x_it·y_it`, and `sums_t = Σ_i` of the result.
pub struct MultiplyAndSumColumns<'a, T> {
    pub(crate) x: &'a mut [T],
    pub(crate) y: &'a [T],
    pub(crate) sums: &'a mut [T],
}

impl<T: Lanes> Loop for MultiplyAndSumColumns<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(mut self, level: L) {
        strips!(self, level, T, L, self.sums.len());
    }
}

impl<T: Lanes> MultiplyAndSumColumns<'_, T> {
    #[inline(always)]
    fn strip<L: Level, const V: usize>(&mut self, level: L, j: usize) {
        let width = self.sums.len();
        let mut sums = [T::splat(level, T::zero()); V];
        for (row, y) in self.x.chunks_exact_mut(width).zip(self.y.chunks_exact(width)) {
            let (mut x, y) = (load::<T, L, V>(row, j), load::<T, L, V>(y, j));
            for v in 0..V {
                x[v] = T::vmul(level, x[v], y[v]);
                sums[v] = T::vadd(level, sums[v], x[v]);
            }
            store::<T, L, V>(row, j, x);
        }
        store::<T, L, V>(self.sums, j, sums);
    }
}

/// `scores_it ← 0` where `t < first + i`, and `sums_t += Σ_i` of the result.
pub struct MaskAndAddRows<'a, T> {
    pub(crate) scores: &'a mut [T],
    pub(crate) first: usize,
    pub(crate) sums: &'a mut [T],
}

impl<T: Lanes> Loop for MaskAndAddRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let (lanes, width, first) = (T::lanes::<L>(), self.sums.len(), self.first);
        let mut j = first;
        while j < width {
            let mut sum = T::vectors::<L>(&self.sums[j..j + lanes])[0];
            for (i, row) in self.scores.chunks_exact_mut(width).enumerate() {
                let x = &mut T::vectors_mut::<L>(&mut row[j..j + lanes])[0];
                if j < first + T::PAD {
                    let seen = &T::triangle()[i * T::PAD + j - first..][..lanes];
                    *x = T::vmul(level, *x, T::vectors::<L>(seen)[0]);
                }
                sum = T::vadd(level, sum, *x);
            }
            T::vectors_mut::<L>(&mut self.sums[j..j + lanes])[0] = sum;
            j += lanes;
        }
    }
}

/// `out_t = factor_t·x_t` for rows of `length` numbers, `stride` apart in `x`.
pub struct ScaleRows<'a, T> {
    pub(crate) x: &'a [T],
    pub(crate) stride: usize,
    pub(crate) factors: &'a [T],
    pub(crate) length: usize,
    pub(crate) out: &'a mut [T],
}

impl<T: Lanes> Loop for ScaleRows<'_, T> {
    /// Σ out·0.
    type Output = T;

    #[inline(always)]
    fn run<L: Level>(self, level: L) -> T {
        let whole = self.length / T::lanes::<L>() * T::lanes::<L>();
        let zero = T::splat(level, T::zero());
        let (mut mark, mut rest_mark) = (zero, T::zero());
        let rows = self.x.chunks_exact(self.stride).zip(self.out.chunks_exact_mut(self.length));
        for ((x, out), &factor) in rows.zip(self.factors) {
            let (out, out_rest) = out.split_at_mut(whole);
            let splat = T::splat(level, factor);
            for (out, x) in T::vectors_mut::<L>(out).iter_mut().zip(T::vectors::<L>(x)) {
                *out = T::vmul(level, splat, *x);
                mark = T::vfma(level, *out, zero, mark);
            }
            for (out, &x) in out_rest.iter_mut().zip(&x[whole..]) {
                *out = factor * x;
                rest_mark = rest_mark + *out * T::zero();
            }
        }
        T::vsum(level, mark) + rest_mark
    }
}

/// `x_t ← factor_t·x_t` for rows of `stride` numbers.
pub struct ScaleRowsInPlace<'a, T> {
    pub(crate) x: &'a mut [T],
    pub(crate) stride: usize,
    pub(crate) factors: &'a [T],
}

impl<T: Lanes> Loop for ScaleRowsInPlace<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        for (row, &factor) in self.x.chunks_exact_mut(self.stride).zip(self.factors) {
            let factor = T::splat(level, factor);
            for x in T::vectors_mut::<L>(row) {
                *x = T::vmul(level, *x, factor);
            }
        }
    }
}

/// `f = 2^x`, `queries ← f·queries`, `keys ← keys/f`, and `x ← f`, element by element.
pub struct DecayQueriesAndKeys<'a, T> {
    pub(crate) x: &'a mut [T],
    pub(crate) queries: &'a mut [T],
    pub(crate) keys: &'a mut [T],
}

impl<T: Lanes> Loop for DecayQueriesAndKeys<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let zero = T::splat(level, T::zero());
        let queries = T::vectors_mut::<L>(self.queries);
        let keys = T::vectors_mut::<L>(self.keys);
        for ((x, query), key) in T::vectors_mut::<L>(self.x).iter_mut().zip(queries).zip(keys) {
            let (factor, inverse) =
                (T::vexp2(level, *x), T::vexp2(level, T::vsub(level, zero, *x)));
            *query = T::vmul(level, *query, factor);
            *key = T::vmul(level, *key, inverse);
            *x = factor;
        }
    }
}

/// `out_pt = factor·x_tp`, with zeros in the columns beyond the rows, and
/// `squares_t = Σ_p out_pt²`.
pub struct Transpose<'a, T> {
    pub(crate) rows: usize,
    pub(crate) row: &'a dyn Fn(usize) -> &'a [T],
    pub(crate) factor: T,
    pub(crate) squares: &'a mut [T],
    pub(crate) out: &'a mut [T],
}

impl<T: Lanes> Loop for Transpose<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let lanes = T::lanes::<L>();
        let (factor, width) = (T::splat(level, self.factor), self.squares.len());
        for t in (0..width).step_by(lanes) {
            let mut rows: [&[T]; 16] = [&[]; 16];
            let real = lanes.min(self.rows.saturating_sub(t));
            for i in 0..real {
                rows[i] = (self.row)(t + i);
            }
            let length = self.out.len() / width;
            // two sums, so that additions wait for each other less
            let mut even = T::splat(level, T::zero());
            let mut odd = even;
            let mut p = 0;
            while p < length {
                let zeros: [T::V<L>; 16] = [T::splat(level, T::zero()); 16];
                // a square of its own, which no index of unknown value keeps out of the registers
                let mut square = zeros;
                if real == lanes && p + lanes <= length {
                    for i in 0..lanes {
                        square[i] = T::vectors::<L>(&rows[i][p..p + lanes])[0];
                    }
                    T::vtranspose(level, &mut square);
                    for i in 0..lanes {
                        square[i] = T::vmul(level, factor, square[i]);
                        let out = &mut self.out[(p + i) * width + t..][..lanes];
                        T::vectors_mut::<L>(out)[0] = square[i];
                    }
                    for i in 0..lanes / 2 {
                        even = T::vfma(level, square[2 * i], square[2 * i], even);
                        odd = T::vfma(level, square[2 * i + 1], square[2 * i + 1], odd);
                    }
                } else {
                    let mut square = zeros;
                    for i in 0..real {
                        square[i] = T::load(level, &rows[i][p..length.min(p + lanes)]);
                    }
                    T::vtranspose(level, &mut square);
                    for i in 0..lanes.min(length - p) {
                        let out = &mut self.out[(p + i) * width + t..][..lanes];
                        let x = T::vmul(level, factor, square[i]);
                        T::vectors_mut::<L>(out)[0] = x;
                        even = T::vfma(level, x, x, even);
                    }
                }
                p += lanes;
            }
            T::vectors_mut::<L>(&mut self.squares[t..t + lanes])[0] = T::vadd(level, even, odd);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::buffer::padded;
    use crate::kernel::loops::samples::wide;
    use crate::kernel::simd::machine::Machine;

    /// Numbers between −1 and 1.
    fn numbers<T: Lanes>(n: usize, seed: f64) -> Vec<T> {
        (0..n).map(|i| T::from((i as f64 * 0.7 + seed).sin()).unwrap()).collect()
    }

    fn assert_close<T: Lanes>(
        machine: Machine,
        what: &str,
        found: T,
        expected: f64,
        tolerance: f64,
    ) {
        let found = found.to_f64().unwrap();
        assert!(
            (found - expected).abs() <= tolerance * (1.0 + expected.abs()),
            "{machine:?} {what}: {found} {expected}"
        );
    }

    fn check<T: Lanes + core::fmt::Debug>(machine: Machine, tolerance: f64) {
        let close = |what: &str, found: T, expected: f64| {
            assert_close(machine, what, found, expected, tolerance);
        };
        for rows in [1, 2, 3, 7, 16, 17, 64, 130] {
            for width in [T::PAD, 2 * T::PAD, 4 * T::PAD, 5 * T::PAD, 9 * T::PAD] {
                let x = numbers::<T>(rows * width, 0.3);
                let wide_x = wide(&x);
                let column = |t: usize| (0..rows).map(move |i| i * width + t);
                let (mut y, mut largest) = (x.clone(), vec![T::nan(); width]);
                machine.run(Exp2ColumnsBelowMaximum { x: &mut y, out: &mut largest });
                for t in 0..width {
                    let expected = column(t).map(|i| wide_x[i]).fold(f64::NEG_INFINITY, f64::max);
                    close("maximum", largest[t], expected);
                    column(t).for_each(|i| close("exp2", y[i], (wide_x[i] - expected).exp2()));
                }

                let mut y = x.clone();
                let (old, sums) = (numbers::<T>(width, 0.1), numbers::<T>(width, 2.0));
                let (mut scale, mut total, mut correction) =
                    (old.clone(), sums.clone(), vec![T::nan(); width]);
                let (scores, log_scale) = (&mut y[..], &mut scale[..]);
                let changed = machine.run(OnlineSoftmax {
                    scores,
                    log_scale,
                    denominator: &mut total,
                    correction: &mut correction,
                    changed: false,
                });
                assert_eq!(changed, scale != old);
                for t in 0..width {
                    let (old, sum) = (old[t].to_f64().unwrap(), sums[t].to_f64().unwrap());
                    let new = column(t).map(|i| wide_x[i]).fold(old, f64::max);
                    close("running maximum", scale[t], new);
                    close("correction", correction[t], (old - new).exp2());
                    column(t).for_each(|i| close("weight", y[i], (wide_x[i] - new).exp2()));
                    let expected = sum * (old - new).exp2()
                        + column(t).map(|i| (wide_x[i] - new).exp2()).sum::<f64>();
                    close("denominator", total[t], expected);
                }

                let (mut y, factors, mut sums) =
                    (x.clone(), numbers::<T>(width, 1.0), vec![T::nan(); rows]);
                machine.run(ScaleAndSumRows { x: &mut y, factors: &factors, sums: &mut sums });
                let factors = wide(&factors);
                for i in 0..rows {
                    let row: Vec<f64> =
                        (0..width).map(|t| wide_x[i * width + t] * factors[t]).collect();
                    (0..width).for_each(|t| close("scaled", y[i * width + t], row[t]));
                    close("row sum", sums[i], row.iter().sum());
                }

                let mut factors: Vec<T> =
                    x.iter().map(|&x| T::from(40.0).unwrap() * (x - T::one())).collect();
                let exponents = wide(&factors);
                let (mut queries, mut keys) = (x.clone(), x.clone());
                machine.run(DecayQueriesAndKeys {
                    x: &mut factors,
                    queries: &mut queries,
                    keys: &mut keys,
                });
                for (i, &exponent) in exponents.iter().enumerate() {
                    let relative = |found: T, expected: f64| found / T::from(expected).unwrap();
                    close("factor", relative(factors[i], exponent.exp2()), 1.0);
                    close("decayed query", relative(queries[i], wide_x[i] * exponent.exp2()), 1.0);
                    close("decayed key", relative(keys[i], wide_x[i] * (-exponent).exp2()), 1.0);
                }

                if rows <= T::PAD {
                    for first in
                        [0, T::PAD, 3 * T::PAD].into_iter().filter(|first| first + rows <= width)
                    {
                        let (mut y, old) = (x.clone(), numbers::<T>(width, 5.0));
                        let mut sums = old.clone();
                        machine.run(MaskAndAddRows { scores: &mut y, first, sums: &mut sums });
                        for t in first..width {
                            let seen =
                                |i: usize| if first + i <= t { wide_x[i * width + t] } else { 0.0 };
                            (0..rows).for_each(|i| close("masked", y[i * width + t], seen(i)));
                            let total = old[t].to_f64().unwrap() + (0..rows).map(seen).sum::<f64>();
                            close("column sum", sums[t], total);
                        }
                    }
                }
            }
        }
    }

    fn check_transpose<T: Lanes + core::fmt::Debug>(machine: Machine, tolerance: f64) {
        for (n, d) in [(1, 1), (1, 64), (3, 5), (16, 16), (17, 80), (64, 64), (63, 31), (130, 9)] {
            let x = numbers::<T>(n * d, 0.9);
            let width = padded::<T>(n) + T::PAD;
            let mut out = vec![T::nan(); d * width];
            let two = T::one() + T::one();
            let row = &|t: usize| &x[t * d..(t + 1) * d];
            let mut squares = vec![T::nan(); width];
            machine.run(Transpose {
                rows: n,
                row,
                factor: two,
                squares: &mut squares,
                out: &mut out,
            });
            for t in 0..width {
                let expected = (0..d).map(|p| out[p * width + t].to_f64().unwrap().powi(2)).sum();
                assert_close(machine, "squares", squares[t], expected, tolerance);
            }
            for p in 0..d {
                for t in 0..width {
                    let expected = if t < n { two * x[t * d + p] } else { T::zero() };
                    assert_eq!(out[p * width + t], expected, "{machine:?} {n} {d}");
                }
            }
        }
    }

    #[test]
    fn loops_agree_with_their_formulas_at_every_level() {
        for machine in Machine::all() {
            check::<f32>(machine, 2e-5);
            check::<f64>(machine, 1e-13);
            check_transpose::<f32>(machine, 2e-5);
            check_transpose::<f64>(machine, 1e-13);
        }
    }
}
