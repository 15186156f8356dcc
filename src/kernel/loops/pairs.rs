//! Loops of a merging memory, whose entries are columns: distances of one entry to all, the nearest
//! of each, weights by attention received.

use crate::kernel::simd::{Lanes, Level, Loop};

/// `out_j = Σ_c (y_cj − point_c)²`.
pub struct Distances<'a, T> {
    pub(crate) y: &'a [T],
    pub(crate) ld: usize,
    pub(crate) point: &'a [T],
    pub(crate) out: &'a mut [T],
}

impl<T: Lanes> Loop for Distances<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(mut self, level: L) {
        let (lanes, width) = (T::lanes::<L>(), self.out.len());
        let mut j = 0;
        // rows are read from end to end where registers allow it, as with 64 entries and some to
        // come
        if L::REGISTER_COUNT >= 32 {
            while j + 5 * lanes <= width {
                self.strip::<L, 5>(level, j);
                j += 5 * lanes;
            }
        }
        while j + 4 * lanes <= width {
            self.strip::<L, 4>(level, j);
            j += 4 * lanes;
        }
        while j < width {
            self.strip::<L, 1>(level, j);
            j += lanes;
        }
    }
}

impl<T: Lanes> Distances<'_, T> {
    #[inline(always)]
    fn strip<L: Level, const V: usize>(&mut self, level: L, j: usize) {
        let width = V * T::lanes::<L>();
        // every fourth coordinate has a sum of its own, in the same order wherever an entry lies: a
        // distance has the same bits in both directions
        let mut a = [T::splat(level, T::zero()); V];
        let (mut b, mut c, mut d) = (a, a, a);
        let row = |coordinate: usize| &self.y[coordinate * self.ld + j..][..width];
        let mut first = 0;
        while first + 4 <= self.point.len() {
            add_squares::<T, L, V>(level, &mut a, row(first), self.point[first]);
            add_squares::<T, L, V>(level, &mut b, row(first + 1), self.point[first + 1]);
            add_squares::<T, L, V>(level, &mut c, row(first + 2), self.point[first + 2]);
            add_squares::<T, L, V>(level, &mut d, row(first + 3), self.point[first + 3]);
            first += 4;
        }
        while first < self.point.len() {
            add_squares::<T, L, V>(level, &mut a, row(first), self.point[first]);
            first += 1;
        }
        let out = T::vectors_mut::<L>(&mut self.out[j..j + width]);
        for v in 0..V {
            out[v] = T::vadd(level, T::vadd(level, a[v], b[v]), T::vadd(level, c[v], d[v]));
        }
    }
}

#[inline(always)]
fn add_squares<T: Lanes, L: Level, const V: usize>(
    level: L,
    sums: &mut [T::V<L>; V],
    row: &[T],
    point: T,
) {
    let point = T::splat(level, point);
    let row = T::vectors::<L>(row);
    for v in 0..V {
        let difference = T::vsub(level, row[v], point);
        sums[v] = T::vfma(level, difference, difference, sums[v]);
    }
}

/// `out_i = max_j (r_i + r_j)·e_ij`, or 0.
pub struct LargestAffinities<'a, T> {
    pub(crate) r: &'a [T],
    pub(crate) e: &'a [T],
    pub(crate) ld: usize,
    pub(crate) out: &'a mut [T],
}

impl<T: Lanes> Loop for LargestAffinities<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let zero = T::splat(level, T::zero());
        let r = T::vectors::<L>(self.r);
        for (i, out) in self.out.iter_mut().enumerate() {
            let own = T::splat(level, self.r[i]);
            let e = T::vectors::<L>(&self.e[i * self.ld..][..self.r.len()]);
            let (mut even, mut odd) = (zero, zero);
            let mut j = 0;
            while j + 2 <= r.len() {
                even = T::vmax(level, even, T::vmul(level, T::vadd(level, own, r[j]), e[j]));
                odd = T::vmax(level, odd, T::vmul(level, T::vadd(level, own, r[j + 1]), e[j + 1]));
                j += 2;
            }
            if j < r.len() {
                even = T::vmax(level, even, T::vmul(level, T::vadd(level, own, r[j]), e[j]));
            }
            *out = T::vmaximum(level, T::vmax(level, even, odd));
        }
    }
}

/// `w_j ← max(decay·w_j + Σ_g factor_g·p_gj, least)`.
pub struct Receive<'a, T> {
    pub(crate) w: &'a mut [T],
    pub(crate) decay: T,
    pub(crate) least: T,
    pub(crate) factors: &'a [T],
    pub(crate) p: &'a [T],
    pub(crate) ld: usize,
}

impl<T: Lanes> Loop for Receive<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let (lanes, len) = (T::lanes::<L>(), self.w.len());
        let (decay, least) = (T::splat(level, self.decay), T::splat(level, self.least));
        for (v, w) in T::vectors_mut::<L>(self.w).iter_mut().enumerate() {
            let mut sum = T::vmul(level, decay, *w);
            for (g, &factor) in self.factors.iter().enumerate() {
                let p = T::vectors::<L>(&self.p[g * self.ld..][..len])[v];
                sum = T::vfma(level, T::splat(level, factor), p, sum);
            }
            *w = T::vmax(level, sum, least);
        }
        debug_assert!(len.is_multiple_of(lanes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::simd::machine::Machine;

    fn numbers<T: Lanes>(n: usize, step: f64) -> Vec<T> {
        (0..n).map(|i| T::from((i as f64 * step + 0.2).sin().abs()).unwrap()).collect()
    }

    fn check<T: Lanes>(machine: Machine, n: usize, tolerance: f64) {
        let wide = |x: T| x.to_f64().unwrap();
        let width = n.next_multiple_of(T::PAD);
        let ld = width + T::PAD;
        let near = |a: T, b: f64| {
            assert!((wide(a) - b).abs() <= tolerance * (1.0 + b.abs()), "{machine:?} {n}");
        };
        let (y, point) = (numbers::<T>(7 * ld, 0.37), numbers::<T>(7, 0.9));
        let mut out = vec![T::nan(); width];
        machine.run(Distances { y: &y, ld, point: &point, out: &mut out });
        for j in 0..width {
            near(out[j], (0..7).map(|c| (wide(y[c * ld + j]) - wide(point[c])).powi(2)).sum());
        }
        let (r, e) = (numbers::<T>(width, 1.3), numbers::<T>(n * ld, 0.71));
        let mut out = vec![T::nan(); n];
        machine.run(LargestAffinities { r: &r, e: &e, ld, out: &mut out });
        for i in 0..n {
            let affinity = |j: usize| (wide(r[i]) + wide(r[j])) * wide(e[i * ld + j]);
            near(out[i], (0..width).map(affinity).fold(0.0, f64::max));
        }
        let mut w = numbers::<T>(width, 0.3);
        let (before, least) = (w.clone(), 0.05);
        let constant = |x: f64| T::from(x).unwrap();
        let factors = [constant(0.5), constant(0.25)];
        machine.run(Receive {
            w: &mut w,
            decay: constant(0.5),
            least: constant(least),
            factors: &factors,
            p: &e,
            ld,
        });
        for j in 0..width.min((n.max(2) - 1) * ld) {
            let other = if n > 1 { 0.25 * wide(e[ld + j]) } else { continue };
            near(w[j], (0.5 * wide(before[j]) + 0.5 * wide(e[j]) + other).max(least));
        }
    }

    #[test]
    fn loops_agree_with_their_formulas_at_every_size_and_level() {
        for machine in Machine::all() {
            for n in 2..=70 {
                check::<f32>(machine, n, 1e-5);
                check::<f64>(machine, n, 1e-13);
            }
        }
    }
}
