//! Scores and sums over tokens that are kept in fewer bits: bytes with a scale for each block, or
//! bfloat16, widened in registers.
//!
//! Tokens lie in tiles of [`TILE`]: of keys a tile is `[columns, TILE]`, so that the lanes are
//! tokens and scores need no sum across lanes; of values every token is a row. The scales of a tile
//! are `[blocks, TILE]` for both.

use crate::kernel::simd::{Lanes, Level, Loop};

/// Tokens of a tile.
pub(crate) const TILE: usize = 64;

/// Numbers of a row that have one scale.
pub(crate) const BLOCK: usize = 32;

/// Rows of queries that are answered at once, where there are registers enough.
const ROWS: usize = 4;

/// A number in fewer bits.
pub trait Code: Copy + 'static {
    /// Whether it is in units of the scale of its block.
    const SCALED: bool;

    /// A vector of the first numbers of a slice.
    fn widen<T: Lanes, L: Level>(level: L, x: &[Self]) -> T::V<L>;
}

impl Code for i8 {
    const SCALED: bool = true;

    #[inline(always)]
    fn widen<T: Lanes, L: Level>(level: L, x: &[Self]) -> T::V<L> {
        T::vwiden_bytes(level, x)
    }
}

/// A bfloat16.
impl Code for u16 {
    const SCALED: bool = false;

    #[inline(always)]
    fn widen<T: Lanes, L: Level>(level: L, x: &[Self]) -> T::V<L> {
        T::vwiden_bf16(level, x)
    }
}

/// Numbers of a row whose products are summed before they meet a scale.
const fn block_of<C: Code>(columns: usize) -> usize {
    if C::SCALED { BLOCK } else { columns }
}

/// `out_rj += Σ_b factor_r·scale_bj·Σ_{c in b} q_rc·k_cj`, for rows of queries `[rows, columns]`
/// and the tokens `j` of `out [rows, ld]`: whole cache lines of them.
///
/// The bits of a score do not depend on how many rows and tokens there are.
#[derive(Debug)]
pub struct PackedScores<'a, T, C> {
    pub(crate) columns: usize,
    pub(crate) queries: &'a [T],
    pub(crate) factors: &'a [T],
    pub(crate) keys: &'a [C],
    pub(crate) scales: &'a [u16],
    pub(crate) tokens: usize,
    pub(crate) out: &'a mut [T],
    pub(crate) ld: usize,
}

/// [`PackedScores`] of bytes.
pub type ScoresOfBytes<'a, T> = PackedScores<'a, T, i8>;

/// [`PackedScores`] of bfloat16.
pub type ScoresOfBf16<'a, T> = PackedScores<'a, T, u16>;

impl<T: Lanes, C: Code> Loop for PackedScores<'_, T, C> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(mut self, level: L) {
        debug_assert!(self.tokens.is_multiple_of(T::PAD) && TILE.is_multiple_of(T::PAD));
        let rows = self.factors.len();
        for first in (0..self.tokens).step_by(TILE) {
            let width = TILE.min(self.tokens - first);
            let mut r = 0;
            while r < rows {
                // groups of queries are of three and four, and of many
                r += match rows - r {
                    1 => self.rows::<L, 1>(level, first, r, width),
                    2 => self.rows::<L, 2>(level, first, r, width),
                    3 => self.rows::<L, 3>(level, first, r, width),
                    _ => self.rows::<L, ROWS>(level, first, r, width),
                };
            }
        }
    }
}

impl<T: Lanes, C: Code> PackedScores<'_, T, C> {
    /// Rows `r..r + R` of a tile; returns how many rows.
    #[inline(always)]
    fn rows<L: Level, const R: usize>(
        &mut self,
        level: L,
        first: usize,
        r: usize,
        width: usize,
    ) -> usize {
        let lanes = T::lanes::<L>();
        let mut j = 0;
        while j < width {
            j += if j + 4 * lanes <= width && (R == 1 || L::REGISTER_COUNT >= 32) {
                self.strip::<L, R, 4>(level, first, r, j)
            } else if j + 2 * lanes <= width && R > 1 && L::REGISTER_COUNT < 32 {
                self.strip::<L, R, 2>(level, first, r, j)
            } else {
                self.strip::<L, R, 1>(level, first, r, j)
            };
        }
        R
    }

    /// Rows `r..r + R` and `V` vectors of tokens from `first + j` on; returns how many tokens.
    #[inline(always)]
    fn strip<L: Level, const R: usize, const V: usize>(
        &mut self,
        level: L,
        first: usize,
        r: usize,
        j: usize,
    ) -> usize {
        let (lanes, columns) = (T::lanes::<L>(), self.columns);
        let width = V * lanes;
        let keys = &self.keys[first * columns..][..TILE * columns];
        let blocks = columns.div_ceil(BLOCK);
        let queries: [&[T]; R] =
            core::array::from_fn(|i| &self.queries[(r + i) * columns..][..columns]);
        let factors: [T::V<L>; R] = core::array::from_fn(|i| T::splat(level, self.factors[r + i]));
        let size = block_of::<C>(columns);
        for (block, keys) in keys.chunks(TILE * size).enumerate() {
            let mut sums = [[T::splat(level, T::zero()); V]; R];
            let start = block * size;
            let queries: [&[T]; R] =
                core::array::from_fn(|i| &queries[i][start..start + keys.len() / TILE]);
            for (c, keys) in keys.chunks_exact(TILE).enumerate() {
                let keys = &keys[j..j + width];
                for v in 0..V {
                    let key = C::widen::<T, L>(level, &keys[v * lanes..]);
                    for i in 0..R {
                        sums[i][v] =
                            T::vfma(level, T::splat(level, queries[i][c]), key, sums[i][v]);
                    }
                }
            }
            for v in 0..V {
                let scale = if C::SCALED {
                    let at = first * blocks + block * TILE + j + v * lanes;
                    Some(T::vwiden_bf16(level, &self.scales[at..at + lanes]))
                } else {
                    None
                };
                for i in 0..R {
                    let factor = match scale {
                        Some(scale) => T::vmul(level, scale, factors[i]),
                        None => factors[i],
                    };
                    let at = (r + i) * self.ld + first + j;
                    let out = &mut T::vectors_mut::<L>(&mut self.out[at..at + width])[v];
                    *out = T::vfma(level, sums[i][v], factor, *out);
                }
            }
        }
        width
    }
}

/// `out_r += Σ_j weight_rj·v_j` for rows of weights `[rows, ld]`, the first `tokens` tokens and
/// `out [rows, width]`: whole cache lines of columns. Rows of values are `stride` apart.
///
/// The bits of a row do not depend on the others.
#[derive(Debug)]
pub struct PackedSums<'a, T, C> {
    pub(crate) weights: &'a [T],
    pub(crate) ld: usize,
    pub(crate) tokens: usize,
    pub(crate) values: &'a [C],
    pub(crate) stride: usize,
    /// Scales of a tile: as many as there are blocks in a row of values.
    pub(crate) scales: &'a [u16],
    pub(crate) blocks: usize,
    pub(crate) out: &'a mut [T],
    pub(crate) width: usize,
}

/// [`PackedSums`] of bytes.
pub type SumsOfBytes<'a, T> = PackedSums<'a, T, i8>;

/// [`PackedSums`] of bfloat16.
pub type SumsOfBf16<'a, T> = PackedSums<'a, T, u16>;

impl<T: Lanes, C: Code> Loop for PackedSums<'_, T, C> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(mut self, level: L) {
        debug_assert!(self.width.is_multiple_of(T::PAD) && self.width <= self.stride);
        let rows = self.out.len() / self.width;
        let mut r = 0;
        while r < rows {
            r += match rows - r {
                1 => self.rows::<L, 1>(level, r),
                2 => self.rows::<L, 2>(level, r),
                3 => self.rows::<L, 3>(level, r),
                _ => self.rows::<L, ROWS>(level, r),
            };
        }
    }
}

impl<T: Lanes, C: Code> PackedSums<'_, T, C> {
    /// Rows `r..r + R`; returns how many.
    #[inline(always)]
    fn rows<L: Level, const R: usize>(&mut self, level: L, r: usize) -> usize {
        // a strip begins with a block, and ends with one or within it
        let lanes = T::lanes::<L>();
        let four = 4 * lanes <= 2 * BLOCK && (R == 1 || L::REGISTER_COUNT >= 32);
        let mut j = 0;
        while j < self.width {
            j += if j + 4 * lanes <= self.width && four {
                self.strip::<L, R, 4>(level, r, j)
            } else if j + 2 * lanes <= self.width && R > 1 && L::REGISTER_COUNT < 32 {
                self.strip::<L, R, 2>(level, r, j)
            } else {
                self.strip::<L, R, 1>(level, r, j)
            };
        }
        R
    }

    /// Rows `r..r + R` and `V` vectors of columns from `j` on, of one block or two; returns how
    /// many columns.
    #[inline(always)]
    fn strip<L: Level, const R: usize, const V: usize>(
        &mut self,
        level: L,
        r: usize,
        j: usize,
    ) -> usize {
        let lanes = T::lanes::<L>();
        let width = V * lanes;
        let mut sums = [[T::splat(level, T::zero()); V]; R];
        // weights times scales, of the blocks of the first and of the last vector
        let mut scaled = [[[T::zero(); TILE]; 2]; R];
        let two = C::SCALED && width > BLOCK;
        for first in (0..self.tokens).step_by(TILE) {
            let count = TILE.min(self.tokens - first);
            for i in 0..R {
                let weights = &self.weights[(r + i) * self.ld + first..][..count];
                if C::SCALED {
                    for b in 0..=usize::from(two) {
                        let at = first * self.blocks + (j / BLOCK + b) * TILE;
                        let scales = &self.scales[at..at + TILE];
                        times_scales(level, weights, scales, &mut scaled[i][b]);
                    }
                } else {
                    scaled[i][0][..count].copy_from_slice(weights);
                }
            }
            let rows = self.values[first * self.stride..].chunks_exact(self.stride);
            for (t, row) in (0..count).zip(rows) {
                let row = &row[j..j + width];
                let mut weights = [[T::splat(level, T::zero()); 2]; R];
                for i in 0..R {
                    let one = T::splat(level, scaled[i][0][t]);
                    weights[i] = [one, if two { T::splat(level, scaled[i][1][t]) } else { one }];
                }
                for v in 0..V {
                    let value = C::widen::<T, L>(level, &row[v * lanes..]);
                    let b = v * lanes / BLOCK;
                    for i in 0..R {
                        sums[i][v] = T::vfma(level, weights[i][b], value, sums[i][v]);
                    }
                }
            }
        }
        for i in 0..R {
            let at = (r + i) * self.width + j;
            let out = T::vectors_mut::<L>(&mut self.out[at..at + width]);
            for v in 0..V {
                out[v] = T::vadd(level, out[v], sums[i][v]);
            }
        }
        width
    }
}

/// `out_t = weight_t·scale_t` for a tile, or its first tokens.
#[inline(always)]
fn times_scales<T: Lanes, L: Level>(level: L, weights: &[T], scales: &[u16], out: &mut [T; TILE]) {
    let lanes = T::lanes::<L>();
    let out = T::vectors_mut::<L>(out);
    for ((weights, scales), out) in weights.chunks(lanes).zip(scales.chunks_exact(lanes)).zip(out) {
        *out = T::vmul(level, T::load(level, weights), T::vwiden_bf16(level, scales));
    }
}

/// The keys of a tile as numbers, `out [columns, TILE]`.
#[derive(Debug)]
pub struct UnpackKeys<'a, T, C> {
    pub(crate) keys: &'a [C],
    pub(crate) scales: &'a [u16],
    pub(crate) out: &'a mut [T],
}

/// [`UnpackKeys`] of bytes.
pub type UnpackKeysOfBytes<'a, T> = UnpackKeys<'a, T, i8>;

/// [`UnpackKeys`] of bfloat16.
pub type UnpackKeysOfBf16<'a, T> = UnpackKeys<'a, T, u16>;

impl<T: Lanes, C: Code> Loop for UnpackKeys<'_, T, C> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let lanes = T::lanes::<L>();
        let rows = self.keys.chunks_exact(TILE).zip(self.out.chunks_exact_mut(TILE));
        for (c, (keys, out)) in rows.enumerate() {
            let out = T::vectors_mut::<L>(out);
            for (v, (key, out)) in keys.chunks_exact(lanes).zip(out).enumerate() {
                *out = C::widen::<T, L>(level, key);
                if C::SCALED {
                    let at = c / BLOCK * TILE + v * lanes;
                    let scale = T::vwiden_bf16(level, &self.scales[at..at + lanes]);
                    *out = T::vmul(level, *out, scale);
                }
            }
        }
    }
}

/// Values of a tile as numbers, `out [up to TILE, width]`, whole cache lines of columns.
#[derive(Debug)]
pub struct UnpackValues<'a, T, C> {
    pub(crate) values: &'a [C],
    pub(crate) stride: usize,
    pub(crate) scales: &'a [u16],
    pub(crate) out: &'a mut [T],
    pub(crate) width: usize,
}

/// [`UnpackValues`] of bytes.
pub type UnpackValuesOfBytes<'a, T> = UnpackValues<'a, T, i8>;

/// [`UnpackValues`] of bfloat16.
pub type UnpackValuesOfBf16<'a, T> = UnpackValues<'a, T, u16>;

impl<T: Lanes, C: Code> Loop for UnpackValues<'_, T, C> {
    type Output = ();

    #[inline(always)]
    fn run<L: Level>(self, level: L) {
        let lanes = T::lanes::<L>();
        let rows = self.values.chunks(self.stride).zip(self.out.chunks_exact_mut(self.width));
        for (t, (values, out)) in rows.enumerate() {
            let out = T::vectors_mut::<L>(out);
            for (v, (value, out)) in values.chunks_exact(lanes).zip(out).enumerate() {
                *out = C::widen::<T, L>(level, value);
                if C::SCALED {
                    let scale = self.scales[v * lanes / BLOCK * TILE + t];
                    let scale = f32::from_bits(u32::from(scale) << 16);
                    let scale = T::from(scale).unwrap_or_else(T::nan);
                    *out = T::vmul(level, *out, T::splat(level, scale));
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap)] // small numbers
mod tests {
    use super::*;
    use crate::kernel::loops::samples::{assert_near, numbers, wide};
    use crate::kernel::simd::machine::Machine;

    /// Tokens as tiles, and their numbers.
    struct Sample<C> {
        keys: Vec<C>,
        values: Vec<C>,
        scales: [Vec<u16>; 2],
        wide_keys: Vec<Vec<f64>>,
        wide_values: Vec<Vec<f64>>,
    }

    const STRIDE: usize = 80;

    fn number(bits: u16) -> f64 {
        f64::from(f32::from_bits(u32::from(bits) << 16))
    }

    fn sample<C: Code>(
        [tokens, d, dv]: [usize; 3],
        zero: C,
        code: impl Fn(usize) -> (C, f64),
    ) -> Sample<C> {
        let tiles = tokens.div_ceil(TILE);
        let scale = |i: usize| 0x3C00 + (i * 37 % 600) as u16;
        let scales = [d, dv].map(|columns| {
            (0..tiles * TILE * columns.div_ceil(BLOCK)).map(scale).collect::<Vec<_>>()
        });
        let by = |side: usize, columns: usize, t: usize, c: usize| {
            let at = t / TILE * TILE * columns.div_ceil(BLOCK) + c / BLOCK * TILE + t % TILE;
            if C::SCALED { number(scales[side][at]) } else { 1.0 }
        };
        let (mut keys, mut values) =
            (vec![zero; tiles * TILE * d], vec![zero; tiles * TILE * STRIDE]);
        let (mut wide_keys, mut wide_values) =
            (vec![vec![0.0; d]; tokens], vec![vec![0.0; dv]; tokens]);
        for t in 0..tokens {
            for c in 0..d {
                let (code, x) = code(t * 131 + c * 7);
                keys[t / TILE * TILE * d + c * TILE + t % TILE] = code;
                wide_keys[t][c] = x * by(0, d, t, c);
            }
            for c in 0..dv {
                let (code, x) = code(t * 17 + c * 29 + 5);
                values[t * STRIDE + c] = code;
                wide_values[t][c] = x * by(1, dv, t, c);
            }
        }
        Sample { keys, values, scales, wide_keys, wide_values }
    }

    fn check<T: Lanes, C: Code>(
        machine: Machine,
        [rows, tokens, d, dv]: [usize; 4],
        sample: &Sample<C>,
        tolerance: f64,
    ) {
        let padded = tokens.next_multiple_of(T::PAD);
        let ld = padded + T::PAD;
        let queries = numbers::<T>(rows * d, 0.7);
        let factors: Vec<T> = (0..rows).map(|r| T::from(0.5 + r as f64).unwrap()).collect();
        let start = numbers::<T>(rows * ld, 0.1);
        let mut scores = start.clone();
        machine.run(PackedScores {
            columns: d,
            queries: &queries,
            factors: &factors,
            keys: &sample.keys,
            scales: &sample.scales[0],
            tokens: padded,
            out: &mut scores,
            ld,
        });
        let (wide_queries, wide_start) = (wide(&queries), wide(&start));
        for r in 0..rows {
            for t in 0..tokens {
                let dot: f64 =
                    (0..d).map(|c| wide_queries[r * d + c] * sample.wide_keys[t][c]).sum();
                let expected = wide_start[r * ld + t] + (0.5 + r as f64) * dot;
                assert_near(machine, 4 * d, scores[r * ld + t], expected, tolerance);
            }
            assert!(scores[r * ld + padded..(r + 1) * ld] == start[r * ld + padded..(r + 1) * ld]);
        }
        let width = dv.next_multiple_of(T::PAD);
        check_unpacked::<T, C>(machine, [tokens, d, dv], sample, tolerance);
        let weights = numbers::<T>(rows * ld, 1.3);
        let mut sums = vec![T::one(); rows * width];
        let blocks = dv.div_ceil(BLOCK);
        machine.run(PackedSums {
            weights: &weights,
            ld,
            tokens,
            values: &sample.values,
            stride: STRIDE,
            scales: &sample.scales[1],
            blocks,
            out: &mut sums,
            width,
        });
        let wide_weights = wide(&weights);
        for r in 0..rows {
            for c in 0..dv {
                let sum: f64 =
                    (0..tokens).map(|t| wide_weights[r * ld + t] * sample.wide_values[t][c]).sum();
                assert_near(machine, 4 * tokens, sums[r * width + c], 1.0 + sum, tolerance);
            }
            // a row by itself has the same bits
            let (mut one, mut row) = (vec![T::one(); width], start[r * ld..(r + 1) * ld].to_vec());
            machine.run(PackedSums {
                weights: &weights[r * ld..],
                ld,
                tokens,
                values: &sample.values,
                stride: STRIDE,
                scales: &sample.scales[1],
                blocks,
                out: &mut one,
                width,
            });
            machine.run(PackedScores {
                columns: d,
                queries: &queries[r * d..(r + 1) * d],
                factors: &factors[r..=r],
                keys: &sample.keys,
                scales: &sample.scales[0],
                tokens: padded,
                out: &mut row,
                ld,
            });
            assert!(one == sums[r * width..(r + 1) * width] && row == scores[r * ld..(r + 1) * ld]);
        }
    }

    /// Tiles as numbers are what they stand for.
    fn check_unpacked<T: Lanes, C: Code>(
        machine: Machine,
        [tokens, d, dv]: [usize; 3],
        sample: &Sample<C>,
        tolerance: f64,
    ) {
        let width = dv.next_multiple_of(T::PAD);
        let blocks = [d, dv].map(|columns| columns.div_ceil(BLOCK) * TILE);
        for first in (0..tokens).step_by(TILE) {
            let count = TILE.min(tokens - first);
            let mut keys = vec![T::nan(); d * TILE];
            machine.run(UnpackKeys {
                keys: &sample.keys[first * d..][..d * TILE],
                scales: &sample.scales[0][first / TILE * blocks[0]..],
                out: &mut keys,
            });
            let mut values = vec![T::nan(); count * width];
            machine.run(UnpackValues {
                values: &sample.values[first * STRIDE..],
                stride: STRIDE,
                scales: &sample.scales[1][first / TILE * blocks[1]..],
                out: &mut values,
                width,
            });
            for t in 0..count {
                for c in 0..d {
                    let expected = sample.wide_keys[first + t][c];
                    assert_near(machine, 1, keys[c * TILE + t], expected, tolerance);
                }
                for c in 0..dv {
                    let expected = sample.wide_values[first + t][c];
                    assert_near(machine, 1, values[t * width + c], expected, tolerance);
                }
            }
        }
    }

    #[test]
    fn scores_and_sums_agree_with_their_formulas_at_every_size_and_level() {
        for tokens in [1, 2, 15, 16, 33, 63, 64, 65, 130, 200] {
            for (rows, d, dv) in
                [(1, 64, 64), (2, 33, 80), (3, 64, 64), (4, 32, 31), (7, 7, 1), (9, 80, 48)]
            {
                let bytes = sample([tokens, d, dv], 0_i8, |i| {
                    let code = (i * 73 % 255) as u8 as i8;
                    (code, f64::from(code))
                });
                let halves = sample([tokens, d, dv], 0_u16, |i| {
                    let bits = 0x3C00 + (i * 73 % 900) as u16 + if i % 3 == 0 { 0x8000 } else { 0 };
                    (bits, number(bits))
                });
                for machine in Machine::all() {
                    let size = [rows, tokens, d, dv];
                    check::<f32, _>(machine, size, &bytes, 3e-5);
                    check::<f64, _>(machine, size, &bytes, 1e-13);
                    check::<f32, _>(machine, size, &halves, 1e-6);
                    check::<f64, _>(machine, size, &halves, 1e-14);
                }
            }
        }
    }
}
