//! Matrix products of small blocks: operands in the caches, nothing packed.
//!
//! `C = init + A·B`, with `B` and `C` row-major and as wide as whole vectors, and `A` by rows or by
//! columns. A tile of 8 rows times 2 vectors of `C` (6 times 2 where there are 16 registers) stays
//! in registers while it runs along the depth.

use crate::kernel::loops::vectors::compensate;
use crate::kernel::simd::{Lanes, Level, Loop};

/// Steps along the depth that rows of A are read at once for.
const STEPS: usize = 8;

/// Where a product goes.
#[derive(Debug)]
pub enum Epilogue<'a, T> {
    /// C = A·B.
    Set,
    /// C += A·B.
    Add,
    /// The same, where C holds the product of what comes before in `k`: with the bits of one
    /// product of both.
    #[cfg(feature = "rayon")]
    Continue,
    /// Every row of C begins as its number: C = bias + A·B.
    Bias(&'a [T]),
    /// C += A·B, with the rounding error of that addition carried in `low`, as wide as C: see
    /// [`compensate`].
    Compensated(&'a mut [T]),
}

/// A matrix by its rows or by its columns, `stride` apart.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, T> {
    data: &'a [T],
    stride: usize,
    by_columns: bool,
}

impl<'a, T> Matrix<'a, T> {
    /// Row after row, `stride` apart.
    #[inline(always)]
    pub(crate) fn rows(data: &'a [T], stride: usize) -> Self {
        Self { data, stride, by_columns: false }
    }

    /// Column after column, `stride` apart.
    #[inline(always)]
    pub(crate) fn columns(data: &'a [T], stride: usize) -> Self {
        Self { data, stride, by_columns: true }
    }
}

/// `C [m, n] = init + A [m, k]·B [k, n]`; `n` is a multiple of [`Lanes::PAD`], rows of B and C are
/// `ldb` and `ldc` apart.
#[derive(Debug)]
pub struct Product<'a, T> {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) a: Matrix<'a, T>,
    pub(crate) b: &'a [T],
    pub(crate) ldb: usize,
    pub(crate) c: &'a mut [T],
    pub(crate) ldc: usize,
    pub(crate) into: Epilogue<'a, T>,
}

impl<T: Lanes> Loop for Product<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(mut self, level: L) {
        debug_assert!(self.n.is_multiple_of(T::PAD));
        let lanes = T::lanes::<L>();
        let mut j = 0;
        if self.m == 1 {
            // a single row: more vectors at once, so that sums do not wait for each other
            while j + 8 * lanes <= self.n {
                self.tile::<L, 1, 8>(level, 0, j);
                j += 8 * lanes;
            }
            while j + 4 * lanes <= self.n {
                self.tile::<L, 1, 4>(level, 0, j);
                j += 4 * lanes;
            }
        }
        while j + 2 * lanes <= self.n {
            self.strip::<L, 2>(level, j);
            j += 2 * lanes;
        }
        while j + lanes <= self.n {
            self.strip::<L, 1>(level, j);
            j += lanes;
        }
    }
}

impl<T: Lanes> Product<'_, T> {
    /// Columns `j..` of C, `V` vectors wide.
    #[inline(always)]
    fn strip<L: Level, const V: usize>(&mut self, level: L, j: usize) {
        let mut i = 0;
        if L::REGISTER_COUNT >= 32 {
            while i + 8 <= self.m {
                self.tile::<L, 8, V>(level, i, j);
                i += 8;
            }
        } else {
            while i + 6 <= self.m {
                self.tile::<L, 6, V>(level, i, j);
                i += 6;
            }
        }
        if i + 4 <= self.m {
            self.tile::<L, 4, V>(level, i, j);
            i += 4;
        }
        if i + 2 <= self.m {
            self.tile::<L, 2, V>(level, i, j);
            i += 2;
        }
        if i < self.m {
            self.tile::<L, 1, V>(level, i, j);
        }
    }

    /// Rows `i..i + R` of a strip.
    #[inline(always)]
    fn tile<L: Level, const R: usize, const V: usize>(&mut self, level: L, i: usize, j: usize) {
        let width = V * T::lanes::<L>();
        let mut sums = [[T::splat(level, T::zero()); V]; R];
        match &self.into {
            // sums begin at zero, so that what C holds does not take digits from each addition
            Epilogue::Set | Epilogue::Add | Epilogue::Compensated(_) => {}
            #[cfg(feature = "rayon")]
            Epilogue::Continue => {
                for r in 0..R {
                    let start = (i + r) * self.ldc + j;
                    let row = T::vectors::<L>(&self.c[start..start + width]);
                    for v in 0..V {
                        sums[r][v] = row[v];
                    }
                }
            }
            Epilogue::Bias(bias) => {
                for r in 0..R {
                    let bias = T::splat(level, bias[i + r]);
                    for v in 0..V {
                        sums[r][v] = bias;
                    }
                }
            }
        }
        let b = self.b[j..].chunks(self.ldb).take(self.k);
        if self.a.by_columns {
            let columns = self.a.data[i..].chunks(self.a.stride);
            for (a, b) in columns.zip(b) {
                let a: &[T; R] = a.first_chunk().expect("a column of A has its rows");
                let b: &[T::V<L>; V] =
                    T::vectors::<L>(&b[..width]).first_chunk().expect("as many vectors");
                for r in 0..R {
                    let a = T::splat(level, a[r]);
                    for v in 0..V {
                        sums[r][v] = T::vfma(level, a, b[v], sums[r][v]);
                    }
                }
            }
        } else {
            let mut rows: [&[T]; R] = [&[]; R];
            for (r, row) in rows.iter_mut().enumerate() {
                *row = &self.a.data[(i + r) * self.a.stride..][..self.k];
            }
            // some steps at once, with one look at the length of a row for all of them
            let (mut b, mut p) = (b, 0);
            while p + STEPS <= self.k {
                let mut a: [&[T; STEPS]; R] = [rows[0].first_chunk().expect("there are"); R];
                for r in 0..R {
                    a[r] = rows[r][p..].first_chunk().expect("there are so many");
                }
                for step in 0..STEPS {
                    let b = b.next().expect("a row of B for each step");
                    let b: &[T::V<L>; V] =
                        T::vectors::<L>(&b[..width]).first_chunk().expect("as many vectors");
                    for r in 0..R {
                        let a = T::splat(level, a[r][step]);
                        for v in 0..V {
                            sums[r][v] = T::vfma(level, a, b[v], sums[r][v]);
                        }
                    }
                }
                p += STEPS;
            }
            for (p, b) in (p..self.k).zip(b) {
                let b: &[T::V<L>; V] =
                    T::vectors::<L>(&b[..width]).first_chunk().expect("as many vectors");
                for r in 0..R {
                    let a = T::splat(level, rows[r][p]);
                    for v in 0..V {
                        sums[r][v] = T::vfma(level, a, b[v], sums[r][v]);
                    }
                }
            }
        }
        if let Epilogue::Compensated(low) = &mut self.into {
            for r in 0..R {
                let start = (i + r) * self.ldc + j;
                let row = T::vectors_mut::<L>(&mut self.c[start..start + width]);
                let low = T::vectors_mut::<L>(&mut low[start..start + width]);
                for v in 0..V {
                    compensate::<T, L>(level, &mut row[v], &mut low[v], sums[r][v]);
                }
            }
        } else {
            let is_added = matches!(self.into, Epilogue::Add);
            for r in 0..R {
                let start = (i + r) * self.ldc + j;
                let row = T::vectors_mut::<L>(&mut self.c[start..start + width]);
                for v in 0..V {
                    row[v] = if is_added { T::vadd(level, row[v], sums[r][v]) } else { sums[r][v] };
                }
            }
        }
    }
}

/// `y [n] = Σ_p x_p·B[p, ..n]` for any `n`, added to `y` where `add`.
pub struct RowTimesMatrix<'a, T> {
    pub(crate) x: &'a [T],
    pub(crate) b: &'a [T],
    pub(crate) ldb: usize,
    pub(crate) y: &'a mut [T],
    pub(crate) add: bool,
}

impl<T: Lanes> Loop for RowTimesMatrix<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(mut self, level: L) {
        let lanes = T::lanes::<L>();
        let n = self.y.len();
        let mut j = 0;
        while j + 4 * lanes <= n {
            self.strip::<L, 4>(level, j);
            j += 4 * lanes;
        }
        while j + lanes <= n {
            self.strip::<L, 1>(level, j);
            j += lanes;
        }
        for j in j..n {
            let column = self.b[j..].iter().step_by(self.ldb);
            let start = if self.add { self.y[j] } else { T::zero() };
            self.y[j] = self.x.iter().zip(column).fold(start, |sum, (&x, &b)| sum + x * b);
        }
    }
}

impl<T: Lanes> RowTimesMatrix<'_, T> {
    #[inline(always)]
    fn strip<L: Level, const V: usize>(&mut self, level: L, j: usize) {
        let (width, ldb) = (V * T::lanes::<L>(), self.ldb);
        // four steps of the depth with sums of their own: additions wait for each other less
        let mut a = [T::splat(level, T::zero()); V];
        let (mut b, mut c, mut d) = (a, a, a);
        let mut start = j;
        let mut xs = self.x.chunks_exact(4);
        for x in &mut xs {
            let rows = &self.b[start..start + 3 * ldb + width];
            step::<T, L, V>(level, &mut a, x[0], &rows[..width]);
            step::<T, L, V>(level, &mut b, x[1], &rows[ldb..ldb + width]);
            step::<T, L, V>(level, &mut c, x[2], &rows[2 * ldb..2 * ldb + width]);
            step::<T, L, V>(level, &mut d, x[3], &rows[3 * ldb..3 * ldb + width]);
            start += 4 * ldb;
        }
        for &x in xs.remainder() {
            step::<T, L, V>(level, &mut a, x, &self.b[start..start + width]);
            start += ldb;
        }
        let y = T::vectors_mut::<L>(&mut self.y[j..j + width]);
        for v in 0..V {
            let sum = T::vadd(level, T::vadd(level, a[v], b[v]), T::vadd(level, c[v], d[v]));
            y[v] = if self.add { T::vadd(level, y[v], sum) } else { sum };
        }
    }
}

/// [`RowTimesMatrix`] of two rows, which loads the matrix once.
pub struct TwoRowsTimesMatrix<'a, T> {
    pub(crate) x: [&'a [T]; 2],
    pub(crate) b: &'a [T],
    pub(crate) ldb: usize,
    pub(crate) y: [&'a mut [T]; 2],
}

impl<T: Lanes> Loop for TwoRowsTimesMatrix<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(mut self, level: L) {
        let (lanes, n) = (T::lanes::<L>(), self.y[0].len());
        let mut j = 0;
        while j + 4 * lanes <= n {
            self.strip::<L, 4>(level, j);
            j += 4 * lanes;
        }
        while j < n {
            self.strip::<L, 1>(level, j);
            j += lanes;
        }
    }
}

impl<T: Lanes> TwoRowsTimesMatrix<'_, T> {
    #[inline(always)]
    fn strip<L: Level, const V: usize>(&mut self, level: L, j: usize) {
        let (width, ldb) = (V * T::lanes::<L>(), self.ldb);
        // even and odd steps of the depth with sums of their own
        let mut a = [T::splat(level, T::zero()); V];
        let (mut b, mut c, mut d) = (a, a, a);
        let mut start = j;
        let mut pairs = self.x[0].chunks_exact(2).zip(self.x[1].chunks_exact(2));
        for (x, y) in &mut pairs {
            let rows = &self.b[start..start + ldb + width];
            step::<T, L, V>(level, &mut a, x[0], &rows[..width]);
            step::<T, L, V>(level, &mut b, y[0], &rows[..width]);
            step::<T, L, V>(level, &mut c, x[1], &rows[ldb..ldb + width]);
            step::<T, L, V>(level, &mut d, y[1], &rows[ldb..ldb + width]);
            start += 2 * ldb;
        }
        if !self.x[0].len().is_multiple_of(2) {
            let last = self.x[0].len() - 1;
            step::<T, L, V>(level, &mut a, self.x[0][last], &self.b[start..start + width]);
            step::<T, L, V>(level, &mut b, self.x[1][last], &self.b[start..start + width]);
        }
        let [x, y] = &mut self.y;
        let (x, y) =
            (T::vectors_mut::<L>(&mut x[j..j + width]), T::vectors_mut::<L>(&mut y[j..j + width]));
        for v in 0..V {
            x[v] = T::vadd(level, a[v], c[v]);
            y[v] = T::vadd(level, b[v], d[v]);
        }
    }
}

#[inline(always)]
fn step<T: Lanes, L: Level, const V: usize>(level: L, sums: &mut [T::V<L>; V], x: T, row: &[T]) {
    let x = T::splat(level, x);
    let row = T::vectors::<L>(row);
    for v in 0..V {
        sums[v] = T::vfma(level, x, row[v], sums[v]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::loops::samples::numbers;
    use crate::kernel::simd::machine::Machine;

    /// Every way to write one product, against the sum as it reads, in `f64`.
    fn check<T: Lanes>(machine: Machine, [m, n, k]: [usize; 3], tolerance: f64) {
        let n = n.next_multiple_of(T::PAD);
        let (ldb, ldc) = (n + 3, n + 1);
        let wide = |x: T| x.to_f64().unwrap();
        let (a, b) = (numbers::<T>(m * k, 0.37), numbers::<T>(k * ldb, 0.73));
        let (start, bias) = (numbers::<T>(m * ldc, 1.1), numbers::<T>(m, 2.3));
        let columns: Vec<T> = (0..m * k).map(|i| a[i % m * k + i / m]).collect();
        let product: Vec<f64> = (0..m * n)
            .map(|i| (0..k).map(|p| wide(a[i / n * k + p]) * wide(b[p * ldb + i % n])).sum())
            .collect();
        for a in [Matrix::rows(&a, k), Matrix::columns(&columns, m)] {
            for kind in 0..4 {
                let (mut c, mut low) = (start.clone(), vec![T::zero(); m * ldc]);
                let into = match kind {
                    0 => Epilogue::Set,
                    1 => Epilogue::Add,
                    2 => Epilogue::Bias(&bias),
                    _ => Epilogue::Compensated(&mut low),
                };
                machine.run(Product { m, n, k, a, b: &b, ldb, c: &mut c, ldc, into });
                for i in 0..m {
                    for j in 0..n {
                        let before = [
                            0.0,
                            wide(start[i * ldc + j]),
                            wide(bias[i]),
                            wide(start[i * ldc + j]),
                        ][kind];
                        let found = wide(c[i * ldc + j]) + wide(low[i * ldc + j]);
                        let error = (found - before - product[i * n + j]).abs();
                        assert!(
                            error <= tolerance * (1.0 + k as f64),
                            "{machine:?} {m}x{n}x{k} {kind}: {error:e}"
                        );
                    }
                    assert!(c[i * ldc + n] == start[i * ldc + n], "wrote beyond the row");
                }
            }
        }
        #[cfg(feature = "rayon")]
        {
            // in two parts of k, with the bits of one
            let (mut whole, mut parts) = (start.clone(), start.clone());
            let rows = Matrix::columns(&columns, m);
            let into = Epilogue::Set;
            machine.run(Product { m, n, k, a: rows, b: &b, ldb, c: &mut whole, ldc, into });
            for (part, into) in [(0..k / 2, Epilogue::Set), (k / 2..k, Epilogue::Continue)] {
                let (a, b) =
                    (Matrix::columns(&columns[part.start * m..], m), &b[part.start * ldb..]);
                machine.run(Product { m, n, k: part.len(), a, b, ldb, c: &mut parts, ldc, into });
            }
            assert!(whole == parts, "{machine:?} {m}x{n}x{k}");
        }
        if m == 1 && n > T::PAD {
            let (mut y, mut z) = (vec![T::nan(); n], vec![T::nan(); n]);
            machine.run(TwoRowsTimesMatrix { x: [&a, &a], b: &b, ldb, y: [&mut y, &mut z] });
            assert!(
                y == z
                    && (0..n)
                        .all(|j| (wide(y[j]) - product[j]).abs() <= tolerance * (1.0 + k as f64))
            );
            let odd = n - T::PAD / 2 - 1;
            let mut y = vec![T::nan(); odd];
            machine.run(RowTimesMatrix { x: &a, b: &b, ldb, y: &mut y, add: false });
            machine.run(RowTimesMatrix { x: &a, b: &b, ldb, y: &mut y, add: true });
            for j in 0..odd {
                assert!((wide(y[j]) - 2.0 * product[j]).abs() <= tolerance * (1.0 + k as f64));
            }
        }
    }

    #[test]
    fn products_agree_with_the_sum_at_every_size_and_level() {
        for machine in Machine::all() {
            for size in 1..=130 {
                for sizes in [[size, 17, 5], [7, size, 9], [13, 40, size], [1, size, size]] {
                    check::<f32>(machine, sizes, 1e-6);
                    check::<f64>(machine, sizes, 1e-15);
                }
            }
            check::<f32>(machine, [130, 130, 130], 1e-6);
        }
    }
}
