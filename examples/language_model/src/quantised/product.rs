//! `y = x·W` for a few rows, with weights that are widened in registers.

use pulp::{Arch, Simd, WithSimd};

/// Outputs side by side: as many as the widest registers hold.
pub const GROUP: usize = 16;

/// Bits of a number, and inputs that share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Widths {
    /// 4 or 8. Numbers of 4 bits are from 0 to 15, numbers of 8 bits from −128 to 127.
    pub bits: usize,
    /// 16 or 32.
    pub block: usize,
}

impl Widths {
    /// Numbers in a word.
    #[must_use]
    #[inline(always)]
    pub const fn numbers(self) -> usize {
        32 / self.bits
    }

    /// Words of a block.
    #[must_use]
    #[inline(always)]
    pub const fn words(self) -> usize {
        self.block / self.numbers()
    }

    /// What is added to a number to store it.
    #[inline(always)]
    const fn zero(self) -> u32 {
        if self.bits == 8 { 128 } else { 0 }
    }

    /// Numbers in a word, the first in its lowest bits.
    #[must_use]
    pub fn packed(self, numbers: &[i8]) -> u32 {
        let stored = |number: i8| (i32::from(number) + self.zero() as i32) as u32;
        numbers.iter().rev().fold(0, |word, &number| word << self.bits | stored(number))
    }

    /// One of the numbers in a word.
    #[must_use]
    #[inline(always)]
    pub fn number(self, word: u32, at: usize) -> i32 {
        let stored = word >> (self.bits * at) & ((1 << self.bits) - 1);
        stored as i32 - self.zero() as i32
    }

    /// The power of two that undoes the place of an input's number in a half word: numbers are not
    /// shifted to the lowest bits.
    #[must_use]
    pub fn factor(self, input: usize) -> f32 {
        1.0 / (1_u32 << (self.bits * (input % (self.numbers() / 2)))) as f32
    }
}

/// Some groups of outputs, for all rows of `x`.
#[derive(Debug)]
pub struct Product<'a> {
    /// `[group, block, word, 16]`
    pub words: &'a [u32],
    /// `[group, block, 16]`
    pub scales: &'a [f32],
    /// `[group, block, 16]`, or nothing.
    pub mins: &'a [f32],
    /// `[row, input]`, times [`Widths::factor`].
    pub x: &'a [f32],
    /// Sums of the blocks of `x`, `[row, block]`; nothing where there are no `mins`.
    pub sums: &'a [f32],
    /// `[group, row, 16]`
    pub out: &'a mut [f32],
    /// Rows of `x`.
    pub rows: usize,
    /// Blocks of inputs.
    pub blocks: usize,
}

impl Product<'_> {
    /// Runs it at the best level of the machine.
    pub fn run(self, widths: Widths) {
        match (widths.bits, widths.block) {
            (4, 32) => Arch::new().dispatch(Sized::<4, 32>(self)),
            (4, _) => Arch::new().dispatch(Sized::<4, 16>(self)),
            (_, 32) => Arch::new().dispatch(Sized::<8, 32>(self)),
            _ => Arch::new().dispatch(Sized::<8, 16>(self)),
        }
    }
}

/// A product with numbers of `BITS` bits in blocks of `BLOCK`.
struct Sized<'a, const BITS: usize, const BLOCK: usize>(Product<'a>);

impl<const BITS: usize, const BLOCK: usize> WithSimd for Sized<'_, BITS, BLOCK> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let blocks = self.0.blocks;
        let (words, scales) = (blocks * Self::WIDTHS.words() * GROUP, blocks * GROUP);
        for group in 0..self.0.scales.len() / scales {
            let all = Group {
                words: &self.0.words[group * words..][..words],
                scales: &self.0.scales[group * scales..][..scales],
                mins: self.0.mins.get(group * scales..(group + 1) * scales).unwrap_or_default(),
            };
            let mut row = 0;
            while row < self.0.rows {
                row += match self.0.rows - row {
                    1 => self.some_rows::<S, 1>(simd, all, group, row),
                    2 | 3 => self.some_rows::<S, 2>(simd, all, group, row),
                    _ => self.some_rows::<S, 4>(simd, all, group, row),
                };
            }
        }
    }
}

/// The weights of a group.
#[derive(Clone, Copy)]
struct Group<'a> {
    words: &'a [u32],
    scales: &'a [f32],
    mins: &'a [f32],
}

/// `2²³`: the whole numbers below it are the low bits of an `f32` of its exponent.
const EXPONENT: u32 = 0x4B00_0000;

impl<const BITS: usize, const BLOCK: usize> Sized<'_, BITS, BLOCK> {
    const WIDTHS: Widths = Widths { bits: BITS, block: BLOCK };

    /// The group for the rows `first..first + R`; gives `R`. Rows do not know of each other: each
    /// adds its terms in one order, whatever `R` is.
    #[inline(always)]
    fn some_rows<S: Simd, const R: usize>(
        &mut self,
        simd: S,
        group: Group<'_>,
        index: usize,
        first: usize,
    ) -> usize {
        let Product { x, sums, out, rows, blocks, .. } = &mut self.0;
        let (rows, blocks, strips) = (*rows, *blocks, GROUP / S::F32_LANES);
        let words = S::as_simd_u32s(group.words).0;
        let (scales, mins) = (S::as_simd_f32s(group.scales).0, S::as_simd_f32s(group.mins).0);
        let out = &mut out[(index * rows + first) * GROUP..][..R * GROUP];
        let out = S::as_mut_simd_f32s(out).0;
        let x: [&[f32]; R] = std::array::from_fn(|r| &x[(first + r) * blocks * BLOCK..]);
        for strip in 0..strips {
            let mut total = [simd.splat_f32s(0.0); R];
            for block in 0..blocks {
                let x: [&[f32]; R] = std::array::from_fn(|r| &x[r][block * BLOCK..][..BLOCK]);
                let at = block * Self::WIDTHS.words() * strips;
                let words = &words[at..][..Self::WIDTHS.words() * strips];
                let found = self::block::<S, BITS, BLOCK, R>(simd, words, strip, x);
                for (r, (total, found)) in total.iter_mut().zip(found).enumerate() {
                    let at = block * strips + strip;
                    *total = simd.mul_add_e_f32s(scales[at], found, *total);
                    if !mins.is_empty() {
                        let sum = simd.splat_f32s(sums[(first + r) * blocks + block]);
                        *total = simd.mul_add_e_f32s(mins[at], sum, *total);
                    }
                }
            }
            for (r, total) in total.into_iter().enumerate() {
                out[r * strips + strip] = total;
            }
        }
        R
    }
}

/// `Σ x·q` over a block, for some rows. A number is never shifted down within its half word: it
/// comes out as `q·2ˢ`, and `x` has the factor `2⁻ˢ`.
#[inline(always)]
fn block<S: Simd, const BITS: usize, const BLOCK: usize, const R: usize>(
    simd: S,
    words: &[S::u32s],
    strip: usize,
    x: [&[f32]; R],
) -> [S::f32s; R] {
    let widths = Widths { bits: BITS, block: BLOCK };
    let (numbers, strips) = (widths.numbers(), GROUP / S::F32_LANES);
    let exponent = simd.splat_u32s(EXPONENT);
    // sums that do not wait for each other
    let mut sums = [[simd.splat_f32s(0.0); 4]; R];
    for k in 0..widths.words() {
        let word = words[k * strips + strip];
        let high = simd.wrapping_dyn_shr_u32s(word, simd.splat_u32s(16));
        for j in 0..numbers {
            let half = if j < numbers / 2 { word } else { high };
            let shift = BITS * (j % (numbers / 2));
            let mask = simd.splat_u32s(((1 << BITS) - 1) << shift);
            let zero = simd.splat_f32s(8_388_608.0 + (widths.zero() << shift) as f32);
            let number = simd.or_u32s(simd.and_u32s(half, mask), exponent);
            let number = simd.sub_f32s(simd.transmute_f32s_u32s(number), zero);
            for (sums, x) in sums.iter_mut().zip(x) {
                let x = simd.splat_f32s(x[k * numbers + j]);
                sums[j % 4] = simd.mul_add_e_f32s(x, number, sums[j % 4]);
            }
        }
    }
    sums.map(|[a, b, c, d]| simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d)))
}
