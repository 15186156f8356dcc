//! Loops of a merging memory: distances of one or two entries to all, which pairs cost least,
//! weights by attention received.

use crate::kernel::simd::{Lanes, Level, Loop};

/// `out_pj = Σ_c f_c·(y_cj − point_pc)²` for one or two points and entries that are columns;
/// points and rows of `out` lie as far apart as each is long.
pub struct ColumnDistances<'a, T> {
    pub(crate) y: &'a [T],
    pub(crate) ld: usize,
    pub(crate) factors: &'a [T],
    pub(crate) points: &'a [T],
    pub(crate) out: &'a mut [T],
}

impl<T: Lanes> Loop for ColumnDistances<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        if self.points.len() == self.factors.len() {
            self.of::<L, 1>(level);
        } else {
            self.of::<L, 2>(level);
        }
    }
}

impl<T: Lanes> ColumnDistances<'_, T> {
    #[inline(always)]
    fn of<L: Level, const P: usize>(mut self, level: L) {
        let (lanes, width) = (T::lanes::<L>(), self.out.len() / P);
        let mut j = 0;
        while j + 4 * lanes <= width {
            self.strip::<L, P, 4>(level, j);
            j += 4 * lanes;
        }
        while j < width {
            self.strip::<L, P, 1>(level, j);
            j += lanes;
        }
    }

    #[inline(always)]
    fn strip<L: Level, const P: usize, const V: usize>(&mut self, level: L, j: usize) {
        // in one order wherever an entry lies: a distance has the same bits in both directions
        let width = V * T::lanes::<L>();
        let mut sums = [[T::splat(level, T::zero()); V]; P];
        let n = self.factors.len();
        for (c, &factor) in self.factors.iter().enumerate() {
            let row = T::vectors::<L>(&self.y[c * self.ld + j..][..width]);
            let factor = T::splat(level, factor);
            for p in 0..P {
                let point = T::splat(level, self.points[p * n + c]);
                for v in 0..V {
                    let difference = T::vsub(level, row[v], point);
                    let weighted = T::vmul(level, factor, difference);
                    sums[p][v] = T::vfma(level, weighted, difference, sums[p][v]);
                }
            }
        }
        let stride = self.out.len() / P;
        for (p, sums) in sums.iter().enumerate() {
            let out = &mut self.out[p * stride + j..][..width];
            T::vectors_mut::<L>(out).copy_from_slice(sums);
        }
    }
}

/// `out_pj = Σ_c (factor·(y_jc − point_pc))²` over the first `columns` for one or two points and
/// entries that are rows of `y`, as long as a point.
pub struct RowDistances<'a, T> {
    pub(crate) y: &'a [T],
    pub(crate) stride: usize,
    pub(crate) columns: usize,
    pub(crate) factor: T,
    pub(crate) points: &'a [T],
    pub(crate) out: &'a mut [T],
}

impl<T: Lanes> Loop for RowDistances<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        if self.points.len() == self.stride {
            self.of::<L, 1>(level);
        } else {
            self.of::<L, 2>(level);
        }
    }
}

impl<T: Lanes> RowDistances<'_, T> {
    #[inline(always)]
    fn of<L: Level, const P: usize>(self, level: L) {
        let Self { y, stride, columns, factor, points, out } = self;
        let (lanes, count) = (T::lanes::<L>(), out.len() / P);
        let (whole, factor) = (columns / lanes * lanes, T::splat(level, factor));
        let points: [&[T]; P] = core::array::from_fn(|p| &points[p * stride..][..columns]);
        for (j, y) in y.chunks_exact(stride).take(count).enumerate() {
            let mut sums = [T::splat(level, T::zero()); P];
            for (c, &y) in T::vectors::<L>(&y[..columns]).iter().enumerate() {
                for p in 0..P {
                    let difference = T::vsub(level, y, T::vectors::<L>(points[p])[c]);
                    let difference = T::vmul(level, factor, difference);
                    sums[p] = T::vfma(level, difference, difference, sums[p]);
                }
            }
            for p in 0..P {
                if whole < columns {
                    let y = T::load(level, &y[whole..columns]);
                    let difference = T::vsub(level, y, T::load(level, &points[p][whole..]));
                    let difference = T::vmul(level, factor, difference);
                    sums[p] = T::vfma(level, difference, difference, sums[p]);
                }
                out[p * count + j] = T::vsum(level, sums[p]);
            }
        }
    }
}

/// `(own + r)·e` where e is not above the limit, else 0.
#[inline(always)]
fn affinity_within<T: Lanes, L: Level>(
    level: L,
    own: T::V<L>,
    r: T::V<L>,
    e: T::V<L>,
    limit: T::V<L>,
) -> T::V<L> {
    let affinity = T::vmul(level, T::vadd(level, own, r), e);
    T::vselect_greater(level, e, limit, T::splat(level, T::zero()), affinity)
}

/// Raises `bound_j` to `(own + r_j)·e_j` where `e_j` is not above `limit_j`.
pub struct ShareAffinities<'a, T> {
    pub(crate) own: T,
    pub(crate) r: &'a [T],
    pub(crate) e: &'a [T],
    pub(crate) limit: &'a [T],
    pub(crate) bound: &'a mut [T],
}

impl<T: Lanes> Loop for ShareAffinities<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let own = T::splat(level, self.own);
        let columns = T::vectors::<L>(self.r).iter().zip(T::vectors::<L>(self.e));
        let bounds = T::vectors_mut::<L>(self.bound).iter_mut();
        for ((bound, &limit), (&r, &e)) in bounds.zip(T::vectors::<L>(self.limit)).zip(columns) {
            let affinity = affinity_within::<T, L>(level, own, r, e, limit);
            *bound = T::vmax(level, *bound, affinity);
        }
    }
}

/// The largest `(own + r_j)·e_j` where `e_j` is not above the limit, or 0.
pub struct LargestWithin<'a, T> {
    pub(crate) own: T,
    pub(crate) r: &'a [T],
    pub(crate) e: &'a [T],
    pub(crate) limit: T,
}

impl<T: Lanes> Loop for LargestWithin<'_, T> {
    type Output = T;

    #[inline(always)]
    fn run<L: Level>(self, level: L) -> T {
        let (own, limit) = (T::splat(level, self.own), T::splat(level, self.limit));
        let mut largest = T::splat(level, T::zero());
        for (&r, &e) in T::vectors::<L>(self.r).iter().zip(T::vectors::<L>(self.e)) {
            let affinity = affinity_within::<T, L>(level, own, r, e, limit);
            largest = T::vmax(level, largest, affinity);
        }
        T::vmaximum(level, largest)
    }
}

/// `out_j = min(2·r_j·e_j, bound_j)`.
pub struct Reach<'a, T> {
    pub(crate) r: &'a [T],
    pub(crate) e: &'a [T],
    pub(crate) bound: &'a [T],
    pub(crate) out: &'a mut [T],
}

impl<T: Lanes> Loop for Reach<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let columns = T::vectors::<L>(self.r).iter().zip(T::vectors::<L>(self.e));
        let columns = columns.zip(T::vectors::<L>(self.bound));
        for (out, ((&r, &e), &bound)) in T::vectors_mut::<L>(self.out).iter_mut().zip(columns) {
            let most = T::vmul(level, T::vadd(level, r, r), e);
            *out = T::vselect_greater(level, most, bound, bound, most);
        }
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
        let (y, points) = (numbers::<T>(16 * ld, 0.37), numbers::<T>(32, 0.9));
        let factors = numbers::<T>(16, 0.6);
        let square = |y: T, point: T, factor: T| (wide(y) - wide(point)).powi(2) * wide(factor);
        for count in 1..=2 {
            let mut out = vec![T::nan(); count * width];
            machine.run(ColumnDistances {
                y: &y,
                ld,
                factors: &factors[..7],
                points: &points[..count * 7],
                out: &mut out,
            });
            for (p, j) in (0..count).flat_map(|p| (0..width).map(move |j| (p, j))) {
                let of = |c: usize| square(y[c * ld + j], points[p * 7 + c], factors[c]);
                near(out[p * width + j], (0..7).map(of).sum());
            }
            let (mut out, factor) = (vec![T::nan(); count * width], factors[3]);
            let columns = 16 - n % 5;
            machine.run(RowDistances {
                y: &y,
                stride: 16,
                columns,
                factor,
                points: &points[..count * 16],
                out: &mut out,
            });
            for (p, j) in (0..count).flat_map(|p| (0..n).map(move |j| (p, j))) {
                let of = |c: usize| square(y[j * 16 + c], points[p * 16 + c], factor * factor);
                near(out[p * width + j], (0..columns).map(of).sum());
            }
        }
        let (r, e) = (numbers::<T>(width, 1.3), numbers::<T>(n * ld, 0.71));
        let mut out = vec![T::nan(); n];
        machine.run(LargestAffinities { r: &r, e: &e, ld, out: &mut out });
        for i in 0..n {
            let affinity = |j: usize| (wide(r[i]) + wide(r[j])) * wide(e[i * ld + j]);
            near(out[i], (0..width).map(affinity).fold(0.0, f64::max));
        }
        let (own, before) = (r[n / 2], numbers::<T>(width, 0.2));
        let (mut bound, limit, e) = (before.clone(), numbers::<T>(width, 1.9), &e[..width]);
        machine.run(ShareAffinities { own, r: &r, e, limit: &limit, bound: &mut bound });
        let affinity = |j: usize| (wide(own) + wide(r[j])) * wide(e[j]);
        for j in 0..width {
            let raised = if e[j] > limit[j] { 0.0 } else { affinity(j) };
            near(bound[j], raised.max(wide(before[j])));
        }
        let within = |&j: &usize| e[j] <= limit[0];
        let largest = (0..width).filter(within).map(affinity).fold(0.0, f64::max);
        near(machine.run(LargestWithin { own, r: &r, e, limit: limit[0] }), largest);
        let mut out = before.clone();
        machine.run(Reach { r: &r, e, bound: &before, out: &mut out });
        for j in 0..width {
            near(out[j], (2.0 * wide(r[j]) * wide(e[j])).min(wide(before[j])));
        }
        let e = numbers::<T>(n * ld, 0.71);
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
