//! Tokens in fewer bits, in the layout of the loops that read them as they are.

use crate::kernel;
use crate::kernel::buffer::Buffer;
use crate::kernel::loops::packed::{PackedScores, PackedSums, TILE};
use crate::memory::row_code::RowCode;
use crate::scalar::Scalar;
use crate::state_format::{BLOCK, StateFormat};
use core::ops::Range;
use ndarray::ArrayView1;

/// Rows of values are padded to a multiple of this many numbers, a vector of any level.
const ROW: usize = 16;

/// Keys and values of tokens, in one of the formats that are not the kernel's own.
#[derive(Clone, Debug)]
pub(crate) enum Packed {
    Bf16(Tiles<u16>),
    Q8(Tiles<i8>),
}

/// Tiles of [`TILE`] tokens: see [`packed`](crate::kernel::loops::packed).
#[derive(Clone, Debug)]
pub(crate) struct Tiles<C> {
    head_dim: usize,
    value_dim: usize,
    /// Tokens that there is room for, whole tiles of them.
    room: usize,
    keys: Buffer<C>,
    values: Buffer<C>,
    /// Of keys and of values, where the format has them.
    scales: [Buffer<u16>; 2],
}

/// Scores or sums of a format as its loops take them.
macro_rules! each {
    ($packed:expr, $tiles:ident => $do:expr) => {
        match $packed {
            Packed::Bf16($tiles) => $do,
            Packed::Q8($tiles) => $do,
        }
    };
}

impl Packed {
    /// Room for no token yet; `None` for the numbers of the kernel, which are not packed.
    pub(crate) fn new(format: StateFormat, head_dim: usize, value_dim: usize) -> Option<Self> {
        match format {
            StateFormat::F32 => None,
            StateFormat::Bf16 => Some(Self::Bf16(Tiles::new(head_dim, value_dim))),
            StateFormat::Q8 => Some(Self::Q8(Tiles::new(head_dim, value_dim))),
        }
    }

    pub(crate) fn format(&self) -> StateFormat {
        match self {
            Self::Bf16(_) => StateFormat::Bf16,
            Self::Q8(_) => StateFormat::Q8,
        }
    }

    /// Columns of keys and of values.
    pub(crate) fn dims(&self) -> [usize; 2] {
        each!(self, tiles => [tiles.head_dim, tiles.value_dim])
    }

    /// Makes room for so many tokens, and for twice what there was if that is more; what is there
    /// stays. The rest is zeros.
    pub(crate) fn make_room(&mut self, tokens: usize) {
        each!(self, tiles => if tokens > tiles.room {
            tiles.resize(tokens.max(2 * tiles.room));
        });
    }

    /// Puts a token, for which there is room.
    pub(crate) fn put<T: Scalar>(
        &mut self,
        token: usize,
        key: ArrayView1<'_, T>,
        value: ArrayView1<'_, T>,
    ) {
        each!(self, tiles => {
            tiles.put_key(token, |c| key[c]);
            tiles.put_value(token, |c| value[c]);
        });
    }

    /// Number `c` of a key.
    #[inline]
    pub(crate) fn key<T: Scalar>(&self, token: usize, c: usize) -> T {
        each!(self, tiles => tiles.key(token, c))
    }

    /// Number `c` of a value.
    #[inline]
    pub(crate) fn value<T: Scalar>(&self, token: usize, c: usize) -> T {
        each!(self, tiles => tiles.value(token, c))
    }

    /// Copies the keys and values of some tokens of one tile to rows, those of values padded with
    /// zeros to `stride` numbers.
    pub(crate) fn read<T: Scalar>(
        &self,
        tokens: Range<usize>,
        stride: usize,
        keys: &mut [T],
        values: &mut [T],
    ) {
        each!(self, tiles => {
            tiles.read_keys(tokens.clone(), keys);
            tiles.read_values(tokens, stride, values);
        });
    }

    /// `out_rj += factor_r·q_r·k_j` for rows of queries, and tokens `j` from `first` on, which is a
    /// multiple of [`TILE`]: as many whole cache lines as `tokens` says. Rows of `out` are `ld`
    /// apart.
    pub(crate) fn add_scores<T: Scalar>(
        &self,
        [first, tokens]: [usize; 2],
        [queries, factors]: [&[T]; 2],
        out: &mut [T],
        ld: usize,
    ) {
        each!(self, tiles => tiles.add_scores([first, tokens], [queries, factors], out, ld));
    }

    /// `out_r += Σ_j weight_rj·v_j`, of tokens as in [`add_scores`](Self::add_scores), of which any
    /// number is taken; rows of `out` have `width` columns.
    pub(crate) fn add_sums<T: Scalar>(
        &self,
        [first, tokens]: [usize; 2],
        (weights, ld): (&[T], usize),
        out: &mut [T],
        width: usize,
    ) {
        each!(self, tiles => tiles.add_sums([first, tokens], (weights, ld), out, width));
    }

    /// Brings queries into a unit in which their products with bytes are in range, and their
    /// factors with them. Nothing is rounded.
    pub(crate) fn set_units<T: Scalar>(&self, queries: &mut [T], factors: &mut [T]) {
        let Self::Q8(tiles) = self else { return };
        for (query, factor) in queries.chunks_exact_mut(tiles.head_dim).zip(factors) {
            let largest = kernel::max_abs(query).as_f64();
            let unit = f64::from_bits(largest.to_bits() & 0x7FF0_0000_0000_0000);
            let (unit, inverse) = (T::from_f64(unit), T::from_f64(unit.recip()));
            if unit.is_normal() && inverse.is_normal() && (*factor * unit).is_normal() {
                kernel::scale(query, inverse);
                *factor *= unit;
            }
        }
    }

    /// Appends a token as bytes: the row of its key, then that of its value, block by block, each
    /// with its scale before it.
    pub(crate) fn save(&self, token: usize, out: &mut Vec<u8>) {
        each!(self, tiles => tiles.save(token, out));
    }

    /// Puts a token that was saved; false if a number is not finite.
    #[must_use]
    pub(crate) fn restore(&mut self, token: usize, bytes: &[u8]) -> bool {
        each!(self, tiles => tiles.restore(token, bytes))
    }
}

impl<C: RowCode> Tiles<C> {
    fn new(head_dim: usize, value_dim: usize) -> Self {
        Self {
            head_dim,
            value_dim,
            room: 0,
            keys: Buffer::new(),
            values: Buffer::new(),
            scales: [Buffer::new(), Buffer::new()],
        }
    }

    fn stride(&self) -> usize {
        self.value_dim.next_multiple_of(ROW)
    }

    fn blocks(columns: usize) -> usize {
        if C::SCALED { columns.div_ceil(BLOCK) } else { 0 }
    }

    fn resize(&mut self, tokens: usize) {
        self.room = tokens.next_multiple_of(TILE);
        self.keys.grow(self.room * self.head_dim);
        self.values.grow(self.room * self.stride());
        for (scales, columns) in self.scales.iter_mut().zip([self.head_dim, self.value_dim]) {
            scales.grow(self.room * Self::blocks(columns));
        }
    }

    /// Where number `c` of a key is.
    #[inline]
    fn key_at(&self, token: usize, c: usize) -> usize {
        (token / TILE * self.head_dim + c) * TILE + token % TILE
    }

    /// Where the scale of number `c` of a row of so many columns is.
    #[inline]
    fn scale_at(columns: usize, token: usize, c: usize) -> usize {
        (token / TILE * Self::blocks(columns) + c / BLOCK) * TILE + token % TILE
    }

    /// The scale of number `c` of a key, or of a value.
    #[inline]
    fn scale(&self, side: usize, token: usize, c: usize) -> u16 {
        let columns = [self.head_dim, self.value_dim][side];
        if C::SCALED { self.scales[side][Self::scale_at(columns, token, c)] } else { 0 }
    }

    #[inline]
    fn key<T: Scalar>(&self, token: usize, c: usize) -> T {
        self.keys[self.key_at(token, c)].decode(self.scale(0, token, c))
    }

    #[inline]
    fn value<T: Scalar>(&self, token: usize, c: usize) -> T {
        self.values[token * self.stride() + c].decode(self.scale(1, token, c))
    }

    fn set_scale(&mut self, side: usize, token: usize, c: usize, scale: u16) {
        if C::SCALED {
            let columns = [self.head_dim, self.value_dim][side];
            self.scales[side][Self::scale_at(columns, token, c)] = scale;
        }
    }

    fn put_key<T: Scalar>(&mut self, token: usize, number: impl Fn(usize) -> T) {
        let mut block = [T::zero(); BLOCK];
        for first in (0..self.head_dim).step_by(BLOCK) {
            let block = &mut block[..BLOCK.min(self.head_dim - first)];
            block.iter_mut().enumerate().for_each(|(i, to)| *to = number(first + i));
            let at = self.key_at(token, first);
            let keys = &mut self.keys[at..];
            let scale = C::encode(block, |i, code| keys[i * TILE] = code);
            self.set_scale(0, token, first, scale);
        }
    }

    fn put_value<T: Scalar>(&mut self, token: usize, number: impl Fn(usize) -> T) {
        let mut block = [T::zero(); BLOCK];
        for first in (0..self.value_dim).step_by(BLOCK) {
            let block = &mut block[..BLOCK.min(self.value_dim - first)];
            block.iter_mut().enumerate().for_each(|(i, to)| *to = number(first + i));
            let at = token * self.stride() + first;
            let values = &mut self.values[at..at + block.len()];
            let scale = C::encode(block, |i, code| values[i] = code);
            self.set_scale(1, token, first, scale);
        }
    }

    fn read_keys<T: Scalar>(&self, tokens: Range<usize>, out: &mut [T]) {
        let (d, start, count) = (self.head_dim, tokens.start, tokens.len());
        debug_assert!(count <= TILE - start % TILE);
        for c in 0..d {
            let keys = &self.keys[self.key_at(start, c)..][..count];
            let out = out[c..].iter_mut().step_by(d);
            if C::SCALED {
                let scales = &self.scales[0][Self::scale_at(d, start, c)..][..count];
                for ((out, key), &scale) in out.zip(keys).zip(scales) {
                    *out = key.decode(scale);
                }
            } else {
                out.zip(keys).for_each(|(out, key)| *out = key.decode(0));
            }
        }
    }

    fn read_values<T: Scalar>(&self, tokens: Range<usize>, stride: usize, out: &mut [T]) {
        for (token, out) in tokens.zip(out.chunks_exact_mut(stride)) {
            let row = &self.values[token * self.stride()..][..self.value_dim];
            let (out, padding) = out.split_at_mut(self.value_dim);
            padding.fill(T::zero());
            for (block, (out, row)) in out.chunks_mut(BLOCK).zip(row.chunks(BLOCK)).enumerate() {
                let scale = self.scale(1, token, block * BLOCK);
                out.iter_mut().zip(row).for_each(|(out, value)| *out = value.decode(scale));
            }
        }
    }

    fn add_scores<T: Scalar>(
        &self,
        [first, tokens]: [usize; 2],
        [queries, factors]: [&[T]; 2],
        out: &mut [T],
        ld: usize,
    ) {
        C::add_scores(PackedScores {
            columns: self.head_dim,
            queries,
            factors,
            keys: &self.keys[first * self.head_dim..],
            scales: &self.scales[0][first * Self::blocks(self.head_dim)..],
            tokens,
            out,
            ld,
        });
    }

    fn add_sums<T: Scalar>(
        &self,
        [first, tokens]: [usize; 2],
        (weights, ld): (&[T], usize),
        out: &mut [T],
        width: usize,
    ) {
        let blocks = Self::blocks(self.value_dim);
        C::add_sums(PackedSums {
            weights,
            ld,
            tokens,
            values: &self.values[first * self.stride()..],
            stride: self.stride(),
            scales: &self.scales[1][first * blocks..],
            blocks,
            out,
            width,
        });
    }

    fn save(&self, token: usize, out: &mut Vec<u8>) {
        for (side, columns) in [self.head_dim, self.value_dim].into_iter().enumerate() {
            for first in (0..columns).step_by(BLOCK) {
                let code = |c: usize| match side {
                    0 => self.keys[self.key_at(token, c)],
                    _ => self.values[token * self.stride() + c],
                };
                let codes = (first..columns.min(first + BLOCK)).map(code);
                C::save(self.scale(side, token, first), codes, out);
            }
        }
    }

    fn restore(&mut self, token: usize, mut bytes: &[u8]) -> bool {
        for (side, columns) in [self.head_dim, self.value_dim].into_iter().enumerate() {
            for first in (0..columns).step_by(BLOCK) {
                let count = BLOCK.min(columns - first);
                let size = count * size_of::<C>() + if C::SCALED { 2 } else { 0 };
                let Some((block, rest)) = bytes.split_at_checked(size) else { return false };
                bytes = rest;
                let mut codes = [C::zero(); BLOCK];
                let Some(scale) = C::restore(block, |i, code| codes[i] = code) else {
                    return false;
                };
                for (c, code) in (first..).zip(&codes[..count]) {
                    let at = if side == 0 {
                        &mut self.keys[(token / TILE * self.head_dim + c) * TILE + token % TILE]
                    } else {
                        let stride = self.value_dim.next_multiple_of(ROW);
                        &mut self.values[token * stride + c]
                    };
                    *at = *code;
                }
                self.set_scale(side, token, first, scale);
            }
        }
        bytes.is_empty()
    }
}
