//! DCT-II and DCT-III of many tokens at once, a token in each lane, of powers of two up to 512
//! points.
//!
//! The DCT-II of M points, h = M/2 and q = M/4, is split (split radix) into one of h points and two
//! of q points:
//!
//! ```text
//! θ_j       = π(2j+1)/2M
//! u_j       = x_j + x_{M−1−j}                                                0 ≤ j < h
//! d_j       = x_j − x_{M−1−j},   e_j = x_{h−1−j} − x_{h+j}                   0 ≤ j < q
//! c_j       = cos θ_j·d_j + sin θ_j·e_j
//! s_{q−1−j} = (−1)^j·(sin θ_j·d_j − cos θ_j·e_j)
//!
//! U, C, S   = DCT-II of u, c, s
//!
//! X_{2k}    = U_k
//! X_{4k−1}  = C_k + (−1)^k·S_{q−k},   X_{4k+1} = C_k − (−1)^k·S_{q−k}        0 < k < q
//! X_1       = C_0,   X_{M−1} = S_0
//! ```
//!
//! The rotations keep norms, so rounding errors stay small; factors 1/(2 cos θ_j), as in Lee's
//! recursion, would let them grow. The DCT-III is the transpose of the DCT-II but for its halved
//! X_0: the same steps, each transposed, from the last to the first.
//!
//! Up to [`LEAF`] points a transform is written out and stays in registers. Larger ones go through
//! a list of [`Step`]s, for one vector of columns after the other, so that what is in between stays
//! in the first cache. Every step is a [`Loop`] of its own: calls that recurse would lose the
//! instructions of their level, and in one large loop the addresses of all steps would fight for
//! registers.

use crate::kernel::buffer::Buffer;
use crate::kernel::loops::dct_leaf::{LEAF, Leaf, Points, Written, joined, parted, split, unsplit};
use crate::kernel::simd::machine::Machine;
use crate::kernel::simd::{Lanes, Level, Loop};
use core::marker::PhantomData;

/// Points of the largest transform there is.
const MAX: usize = 512;

/// Blocks of the scratch memory.
const BLOCKS: usize = 3;

/// Cache lines between two blocks, so that they do not lie whole pages apart.
const GAP: usize = 24;

/// Plan of transforms of `len` points, a power of two up to 512, of the columns of arrays.
#[derive(Clone, Debug)]
pub struct LanesDct<T> {
    len: usize,
    /// (cos θ_j, sin θ_j) of M points at M/4 + j; those of 2 points at 0.
    twiddles: Vec<[T; 2]>,
    /// The steps of a DCT-II, in order; none if all of it is written out.
    steps: Vec<Step>,
}

/// A step of a DCT-II, on blocks of `len` vectors.
///
/// The points are split, then each of their parts is, all in place in block 0; coefficients of a
/// part are at the same place of another block. The coefficients of a transform and those of its c
/// and s are in different ones of blocks 1 and 2. U, and U of U and so on, is not put together: its
/// coefficients go straight to their places among those of the transform, `stride` apart.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// Splits `len` points from `at` on: u stays at `at`, c goes to `at + h`, s to `at + h + q`.
    Split { at: usize, len: usize },
    /// Transforms `len` points, 16 or 32, from `at` on, into block `to`.
    Leaf { at: usize, len: usize, to: usize },
    /// Joins C and S, from `at + h` on in the block that is not `to`, to the odd ones of `len`
    /// coefficients in block `to`. The first such step of a transform, the one with the largest
    /// stride, also brings the even ones, U from `at` on. Coefficients are `stride` apart.
    Merge { at: usize, len: usize, stride: usize, is_first: bool, to: usize },
}

/// Block 2 for 1, and 1 for 2.
fn other(block: usize) -> usize {
    3 - block
}

/// Appends the steps of a transform of `len` points from `at` on, into block `to`.
fn plan(steps: &mut Vec<Step>, at: usize, len: usize, to: usize) {
    let leaf = len.min(LEAF);
    let mut sizes = vec![];
    let mut size = len;
    while size > leaf {
        steps.push(Step::Split { at, len: size });
        sizes.push(size);
        size /= 2;
    }
    for &size in &sizes {
        plan(steps, at + size / 2, size / 4, other(to));
        plan(steps, at + size / 2 + size / 4, size / 4, other(to));
    }
    steps.push(Step::Leaf { at, len: leaf, to: if sizes.is_empty() { to } else { other(to) } });
    for &size in sizes.iter().rev() {
        steps.push(Step::Merge {
            at,
            len: size,
            stride: len / size,
            is_first: size == 2 * leaf,
            to,
        });
    }
}

impl<T: Lanes> LanesDct<T> {
    /// A plan, if there is one for `len` points.
    pub(crate) fn new(len: usize) -> Option<Self> {
        if !len.is_power_of_two() || len > MAX {
            return None;
        }
        let mut twiddles = vec![];
        for at in 0..u32::try_from(len.max(LEAF) / 2).ok()? {
            let q = (at + 1).next_power_of_two() / 2;
            let (numerator, denominator) = if at == 0 { (1, 4) } else { (2 * (at - q) + 1, 8 * q) };
            let angle = core::f64::consts::PI * f64::from(numerator) / f64::from(denominator);
            twiddles.push([T::from(libm::cos(angle))?, T::from(libm::sin(angle))?]);
        }
        let mut steps = vec![];
        if len > LEAF {
            plan(&mut steps, 0, len, 1);
        }
        Some(Self { len, twiddles, steps })
    }
}

/// Columns to transform.
pub struct DctColumns<'a, T> {
    plan: &'a LanesDct<T>,
    x: &'a [T],
    width: usize,
    inner: &'a [T],
    outer: &'a [T],
    out: &'a mut [T],
    scratch: &'a mut [T],
}

impl<'a, T: Lanes> DctColumns<'a, T> {
    pub(crate) fn new(
        plan: &'a LanesDct<T>,
        x: &'a [T],
        width: usize,
        inner: &'a [T],
        outer: &'a [T],
        out: &'a mut [T],
        scratch: &'a mut Buffer<T>,
    ) -> Self {
        assert!(width.is_multiple_of(T::PAD), "whole vectors of columns");
        assert!(
            x.len() == plan.len * width && inner.len() == plan.len,
            "as many rows and factors as points"
        );
        assert!(
            outer.len() <= plan.len && out.len() == outer.len() * width,
            "as many rows as factors"
        );
        scratch.resize(BLOCKS * (plan.len + GAP) * T::PAD);
        Self { plan, x, width, inner, outer, out, scratch }
    }

    /// The DCT-II, or the DCT-III where `BACK`.
    pub(crate) fn run<const BACK: bool>(self, machine: Machine) {
        match self.plan.len {
            1 => machine.run(Small::<T, BACK, 1>(self)),
            2 => machine.run(Small::<T, BACK, 2>(self)),
            4 => machine.run(Small::<T, BACK, 4>(self)),
            8 => machine.run(Small::<T, BACK, 8>(self)),
            16 => machine.run(Small::<T, BACK, 16>(self)),
            32 => machine.run(Small::<T, BACK, 32>(self)),
            _ => self.run_steps::<BACK>(machine),
        }
    }

    fn run_steps<const BACK: bool>(self, machine: Machine) {
        let Self { plan, x, width, inner, outer, out, scratch } = self;
        let (len, twiddles, lanes) =
            (plan.len, &plan.twiddles[..], machine.run(LaneCount(PhantomData::<T>)));
        let (first, rest) = scratch.split_at_mut((len + GAP) * T::PAD);
        let (second, third) = rest.split_at_mut((len + GAP) * T::PAD);
        let mut blocks =
            [&mut first[..len * lanes], &mut second[..len * lanes], &mut third[..len * lanes]];
        for j in (0..width).step_by(lanes) {
            let block = &mut *blocks[usize::from(BACK)];
            machine.run(Load { x, width, j, factors: inner, halve_first: BACK, block });
            for i in 0..plan.steps.len() {
                let step = plan.steps[if BACK { plan.steps.len() - 1 - i } else { i }];
                let [points, a, b] = &mut blocks;
                match step {
                    Step::Split { at, len } => {
                        let block = &mut points[at * lanes..(at + len) * lanes];
                        machine.run(Split::<T, BACK> { block, twiddles });
                    }
                    Step::Leaf { at, len, to } => {
                        let coefficients = if to == 1 { a } else { b };
                        let points = &mut points[at * lanes..(at + len) * lanes];
                        let coefficients = &mut coefficients[at * lanes..(at + len) * lanes];
                        if len == 16 {
                            machine.run(Leaf::<T, BACK, 16> { points, coefficients, twiddles });
                        } else {
                            machine.run(Leaf::<T, BACK, 32> { points, coefficients, twiddles });
                        }
                    }
                    Step::Merge { at, len, stride, is_first, to } => {
                        let (parts, whole) = if to == 1 { (b, a) } else { (a, b) };
                        let parts = &mut parts[at * lanes..(at + len) * lanes];
                        let whole = &mut whole[at * lanes..(at + len * stride) * lanes];
                        machine.run(Merge::<T, BACK> { parts, whole, stride, is_first });
                    }
                }
            }
            machine.run(Store { block: blocks[usize::from(!BACK)], factors: outer, out, width, j });
        }
    }
}

/// Lanes of a level.
struct LaneCount<T>(PhantomData<T>);

impl<T: Lanes> Loop for LaneCount<T> {
    type Output = usize;

    #[inline(always)]
    fn run<L: Level>(self, _: L) -> usize {
        T::lanes::<L>()
    }
}

/// `block_i = factor_i` times the vector at column `j` of row i; half of it at 0 if wanted.
struct Load<'a, T> {
    x: &'a [T],
    width: usize,
    j: usize,
    factors: &'a [T],
    halve_first: bool,
    block: &'a mut [T],
}

impl<T: Lanes> Loop for Load<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let block = T::vectors_mut::<L>(self.block);
        for ((to, row), &factor) in
            block.iter_mut().zip(self.x.chunks_exact(self.width)).zip(self.factors)
        {
            let row = T::vectors::<L>(&row[self.j..self.j + T::lanes::<L>()])[0];
            *to = T::vmul(level, T::splat(level, factor), row);
        }
        if self.halve_first {
            block[0] = T::vmul(level, T::splat(level, T::one() / (T::one() + T::one())), block[0]);
        }
    }
}

/// The vector at column `j` of row i becomes factor_i·block_i.
struct Store<'a, T> {
    block: &'a [T],
    factors: &'a [T],
    out: &'a mut [T],
    width: usize,
    j: usize,
}

impl<T: Lanes> Loop for Store<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let rows = self.out.chunks_exact_mut(self.width);
        for ((row, from), &factor) in rows.zip(T::vectors::<L>(self.block)).zip(self.factors) {
            let row = T::vectors_mut::<L>(&mut row[self.j..self.j + T::lanes::<L>()]);
            row[0] = T::vmul(level, T::splat(level, factor), *from);
        }
    }
}

/// All of a transform that is written out.
struct Small<'a, T, const BACK: bool, const N: usize>(DctColumns<'a, T>);

impl<T: Lanes, const BACK: bool, const N: usize> Loop for Small<'_, T, BACK, N>
where
    Written: Points<N>,
{
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let DctColumns { plan, x, width, inner, outer, out, scratch } = self.0;
        let lanes = T::lanes::<L>();
        let (points, coefficients) = scratch.split_at_mut(N * lanes);
        for j in (0..width).step_by(lanes) {
            let block = if BACK { &mut *coefficients } else { &mut *points };
            Load { x, width, j, factors: inner, halve_first: BACK, block }.run(level);
            Leaf::<T, BACK, N> { points, coefficients, twiddles: &plan.twiddles }.run(level);
            let block = if BACK { &*points } else { &*coefficients };
            Store { block, factors: outer, out, width, j }.run(level);
        }
    }
}

/// The four quarters of a slice, in pairs.
#[inline(always)]
fn quarters<V>(x: &mut [V]) -> [&mut [[V; 2]]; 4] {
    let (low, high) = x.split_at_mut(x.len() / 2);
    let (a, b) = low.split_at_mut(low.len() / 2);
    let (c, d) = high.split_at_mut(high.len() / 2);
    [a.as_chunks_mut().0, b.as_chunks_mut().0, c.as_chunks_mut().0, d.as_chunks_mut().0]
}

/// [`Step::Split`].
struct Split<'a, T, const BACK: bool> {
    block: &'a mut [T],
    twiddles: &'a [[T; 2]],
}

impl<T: Lanes, const BACK: bool> Loop for Split<'_, T, BACK> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let block = T::vectors_mut::<L>(self.block);
        let q = block.len() / 4;
        let [u, v, c, s] = quarters(block);
        let parts = u.iter_mut().zip(v.iter_mut().rev()).zip(c).zip(s.iter_mut().rev());
        for ((((u, v), c), s), twiddles) in parts.zip(self.twiddles[q..2 * q].as_chunks::<2>().0) {
            for i in 0..2 {
                let (r, four) = (1 - i, [u[i], v[1 - i], c[i], s[1 - i]]);
                [u[i], v[r], c[i], s[r]] = if BACK {
                    unsplit::<T, L>(level, four, &twiddles[i], i == 1)
                } else {
                    split::<T, L>(level, four, &twiddles[i], i == 1)
                };
            }
        }
    }
}

/// [`Step::Merge`].
struct Merge<'a, T, const BACK: bool> {
    parts: &'a mut [T],
    whole: &'a mut [T],
    stride: usize,
    is_first: bool,
}

impl<T: Lanes, const BACK: bool> Loop for Merge<'_, T, BACK> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let stride = self.stride;
        let (parts, whole) = (T::vectors_mut::<L>(self.parts), T::vectors_mut::<L>(self.whole));
        let (u, parts) = parts.split_at_mut(parts.len() / 2);
        let (c, s) = parts.split_at_mut(parts.len() / 2);
        let u = if self.is_first { u } else { &mut [] };
        for (x, u) in whole.chunks_exact_mut(2 * stride).zip(u) {
            if BACK {
                *u = x[0];
            } else {
                x[0] = *u;
            }
        }
        let q = c.len();
        // two k at once: 8·stride coefficients; C_q = S_q = 0 stand in at both ends
        let zero = T::splat(level, T::zero());
        if BACK {
            let mut before = None;
            for (p, x) in whole.chunks_exact(8 * stride).enumerate() {
                let k = 2 * p;
                match before {
                    None => c[0] = x[stride],
                    Some(before) => {
                        (c[k], s[q - k]) = parted::<T, L>(level, before, x[stride], false);
                    }
                }
                (c[k + 1], s[q - 1 - k]) =
                    parted::<T, L>(level, x[3 * stride], x[5 * stride], true);
                before = Some(x[7 * stride]);
            }
            s[0] = before.unwrap_or(zero);
        } else {
            let mut even = (c[0], zero);
            for (p, x) in whole.chunks_exact_mut(8 * stride).enumerate() {
                let k = 2 * p;
                x[stride] = T::vsub(level, even.0, even.1);
                (x[3 * stride], x[5 * stride]) =
                    joined::<T, L>(level, c[k + 1], s[q - 1 - k], true);
                even = (c.get(k + 2).copied().unwrap_or(zero), s[q - 2 - k]);
                x[7 * stride] = T::vadd(level, even.0, even.1);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::cast_precision_loss)]
mod tests {
    use super::*;

    const SIZES: [usize; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];

    /// Numbers between −1 and 1 without a pattern.
    fn numbers<T: Lanes>(n: usize, seed: u32) -> Vec<T> {
        let mut state = seed;
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                T::from(f64::from(state) / f64::from(u32::MAX) * 2.0 - 1.0).unwrap()
            })
            .collect()
    }

    fn wide<T: Lanes>(x: T) -> f64 {
        x.to_f64().unwrap()
    }

    /// Row-major `[len, len]`: cos(πk(2j+1)/2len) of row k and column j, or its transpose with ½ in
    /// column 0.
    fn matrix(len: usize, is_dct3: bool) -> Vec<f64> {
        let radians = |n: usize| core::f64::consts::PI * n as f64 / (2 * len) as f64;
        // cos(πn/2len), of an angle that is at most π/4: else its rounding would show
        let cos = |k: usize, j: usize| {
            let n = k * (2 * j + 1) % (4 * len);
            let n = n.min(4 * len - n);
            let (n, sign) = if n > len { (2 * len - n, -1.0) } else { (n, 1.0) };
            sign * if 2 * n > len { libm::sin(radians(len - n)) } else { libm::cos(radians(n)) }
        };
        (0..len * len)
            .map(|at| match (at / len, at % len) {
                (k, j) if !is_dct3 => cos(k, j),
                (_, 0) => 0.5,
                (j, k) => cos(k, j),
            })
            .collect()
    }

    /// Σ x_i·y_i, as if in twice the precision.
    fn dot(x: &[f64], y: &[f64]) -> f64 {
        let (mut sum, mut low) = (0.0, 0.0);
        for (&x, &y) in x.iter().zip(y) {
            let product = x * y;
            let total = sum + product;
            let from_sum = total - product;
            low += (sum - from_sum) + (product - (total - from_sum)) + x.mul_add(y, -product);
            sum = total;
        }
        sum + low
    }

    fn run<T: Lanes>(machine: Machine, is_dct3: bool, columns: DctColumns<'_, T>) {
        if is_dct3 {
            columns.run::<true>(machine);
        } else {
            columns.run::<false>(machine);
        }
    }

    #[test]
    fn plans_are_for_powers_of_two_up_to_512() {
        for len in 0..=1100 {
            let plan = LanesDct::<f32>::new(len);
            assert_eq!(plan.as_ref().map(|plan| plan.len), SIZES.contains(&len).then_some(len));
        }
    }

    /// Errors are at most 3 + √len/8 epsilons of the norm of the input, times the outer factor.
    fn check<T: Lanes>() {
        for (len, is_dct3) in SIZES.into_iter().flat_map(|len| [(len, false), (len, true)]) {
            let (plan, matrix) = (LanesDct::<T>::new(len).unwrap(), matrix(len, is_dct3));
            let mut scratch = Buffer::new();
            for width in [T::PAD, 3 * T::PAD, 64] {
                let (x, inner) = (numbers::<T>(len * width, 1), numbers::<T>(len, 2));
                let (mut norms, mut sums) = (vec![0.0; width], vec![0.0; len * width]);
                for t in 0..width {
                    let column: Vec<f64> =
                        (0..len).map(|i| wide(inner[i]) * wide(x[i * width + t])).collect();
                    norms[t] = column.iter().map(|x| x * x).sum::<f64>().sqrt();
                    for i in 0..len {
                        sums[i * width + t] = dot(&column, &matrix[i * len..]);
                    }
                }
                for (machine, rows) in Machine::all()
                    .into_iter()
                    .flat_map(|machine| [len, len.div_ceil(3), 1, 0].map(|rows| (machine, rows)))
                {
                    let outer = numbers::<T>(rows, 3);
                    let mut out = vec![T::nan(); rows * width];
                    scratch.resize(4 * MAX * T::PAD);
                    scratch.fill(T::nan());
                    run(
                        machine,
                        is_dct3,
                        DctColumns::new(&plan, &x, width, &inner, &outer, &mut out, &mut scratch),
                    );
                    for (at, &found) in out.iter().enumerate() {
                        let (i, t) = (at / width, at % width);
                        let error =
                            (wide(found) - wide(outer[i]) * sums[at]).abs() / wide(T::epsilon());
                        let error = error / (norms[t] * wide(outer[i]).abs());
                        assert!(
                            error <= 3.0 + (len as f64).sqrt() / 8.0,
                            "{machine:?} {len}x{width} {rows} {is_dct3} {i} {t}: {error}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn transforms_agree_with_their_sums_at_every_size_and_level() {
        check::<f32>();
        check::<f64>();
    }

    fn check_inverse<T: Lanes>(machine: Machine) {
        for len in SIZES {
            let plan = LanesDct::<T>::new(len).unwrap();
            let (width, ones) = (2 * T::PAD, vec![T::one(); len]);
            let x = numbers::<T>(len * width, 7);
            let (mut y, mut z) = (vec![T::nan(); len * width], vec![T::nan(); len * width]);
            let mut scratch = Buffer::new();
            run(
                machine,
                false,
                DctColumns::new(&plan, &x, width, &ones, &ones, &mut y, &mut scratch),
            );
            run(
                machine,
                true,
                DctColumns::new(&plan, &y, width, &ones, &ones, &mut z, &mut scratch),
            );
            for (x, z) in x.iter().zip(&z) {
                let error = (wide(*z) / (0.5 * len as f64) - wide(*x)).abs() / wide(T::epsilon());
                assert!(error <= 4.0, "{machine:?} {len}: {error}");
            }
        }
    }

    #[test]
    fn dct3_undoes_dct2_up_to_half_the_length() {
        for machine in Machine::all() {
            check_inverse::<f32>(machine);
            check_inverse::<f64>(machine);
        }
    }
}
