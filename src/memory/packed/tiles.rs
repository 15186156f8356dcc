//! Tiles of tokens of one format.

use crate::kernel::buffer::Buffer;
use crate::kernel::loops::packed::{PackedScores, PackedSums, TILE, UnpackKeys, UnpackValues};
use crate::memory::row_code::RowCode;
use crate::scalar::Scalar;
use crate::state_format::BLOCK;
use core::ops::Range;

/// Rows of values are padded to a multiple of this many numbers, a vector of any level.
const ROW: usize = 16;

/// Tiles of [`TILE`] tokens: see [`packed`](crate::kernel::loops::packed).
#[derive(Clone, Debug)]
pub(crate) struct Tiles<C> {
    pub(super) head_dim: usize,
    pub(super) value_dim: usize,
    /// Tokens that there is room for, whole tiles of them.
    pub(super) room: usize,
    keys: Buffer<C>,
    values: Buffer<C>,
    /// Of keys and of values, where the format has them.
    scales: [Buffer<u16>; 2],
}

impl<C: RowCode> Tiles<C> {
    pub(super) fn new(head_dim: usize, value_dim: usize) -> Self {
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

    pub(super) fn resize(&mut self, tokens: usize) {
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
    pub(super) fn key<T: Scalar>(&self, token: usize, c: usize) -> T {
        self.keys[self.key_at(token, c)].decode(self.scale(0, token, c))
    }

    #[inline]
    pub(super) fn value<T: Scalar>(&self, token: usize, c: usize) -> T {
        self.values[token * self.stride() + c].decode(self.scale(1, token, c))
    }

    /// Copies a key.
    pub(super) fn read_key<T: Scalar>(&self, token: usize, out: &mut [T]) {
        for (block, out) in out.chunks_mut(BLOCK).enumerate() {
            let first = block * BLOCK;
            let scale = self.scale(0, token, first);
            let keys = self.keys[self.key_at(token, first)..].iter().step_by(TILE);
            out.iter_mut().zip(keys).for_each(|(to, key)| *to = key.decode(scale));
        }
    }

    /// Copies a value.
    pub(super) fn read_value<T: Scalar>(&self, token: usize, out: &mut [T]) {
        let row = &self.values[token * self.stride()..];
        for (block, (out, values)) in out.chunks_mut(BLOCK).zip(row.chunks(BLOCK)).enumerate() {
            let scale = self.scale(1, token, block * BLOCK);
            out.iter_mut().zip(values).for_each(|(to, value)| *to = value.decode(scale));
        }
    }

    fn set_scale(&mut self, side: usize, token: usize, c: usize, scale: u16) {
        if C::SCALED {
            let columns = [self.head_dim, self.value_dim][side];
            self.scales[side][Self::scale_at(columns, token, c)] = scale;
        }
    }

    pub(super) fn put_key<T: Scalar>(&mut self, token: usize, number: impl Fn(usize) -> T) {
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

    pub(super) fn put_value<T: Scalar>(&mut self, token: usize, number: impl Fn(usize) -> T) {
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

    pub(super) fn read_keys<T: Scalar>(&self, tokens: Range<usize>, out: &mut [T]) {
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

    /// Of tokens from the first of a tile on; rows of `out` are whole cache lines.
    pub(super) fn read_values<T: Scalar>(
        &self,
        tokens: Range<usize>,
        stride: usize,
        out: &mut [T],
    ) {
        debug_assert!(tokens.start.is_multiple_of(TILE) && tokens.len() <= TILE);
        self.unpack_values(tokens.start, &mut out[..tokens.len() * stride], stride);
    }

    pub(super) fn add_scores<T: Scalar>(
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

    pub(super) fn add_sums<T: Scalar>(
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

    pub(super) fn save(&self, token: usize, out: &mut Vec<u8>) {
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

    pub(super) fn restore(&mut self, token: usize, mut bytes: &[u8]) -> bool {
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

    /// Puts what another set of the same sizes holds of a token.
    pub(super) fn put_from(&mut self, token: usize, other: &Self, from: usize) {
        for c in 0..self.head_dim {
            let at = self.key_at(token, c);
            self.keys[at] = other.keys[other.key_at(from, c)];
        }
        let stride = self.stride();
        let row = &other.values[from * stride..(from + 1) * stride];
        self.values[token * stride..(token + 1) * stride].copy_from_slice(row);
        for (side, columns) in [self.head_dim, self.value_dim].into_iter().enumerate() {
            for c in (0..columns).step_by(BLOCK) {
                self.set_scale(side, token, c, other.scale(side, from, c));
            }
        }
    }

    /// The same within this set.
    pub(super) fn copy_token(&mut self, from: usize, to: usize) {
        for c in 0..self.head_dim {
            let at = self.key_at(to, c);
            self.keys[at] = self.keys[self.key_at(from, c)];
        }
        let stride = self.stride();
        self.values.copy_within(from * stride..(from + 1) * stride, to * stride);
        for (side, columns) in [self.head_dim, self.value_dim].into_iter().enumerate() {
            for c in (0..columns).step_by(BLOCK) {
                self.set_scale(side, to, c, self.scale(side, from, c));
            }
        }
    }

    pub(super) fn copy_from(&mut self, other: &Self) {
        fn copy<E: Copy + num_traits::Zero>(to: &mut Buffer<E>, from: &Buffer<E>) {
            to.resize(from.len());
            to.copy_from_slice(from);
        }
        (self.head_dim, self.value_dim) = (other.head_dim, other.value_dim);
        self.room = other.room;
        copy(&mut self.keys, &other.keys);
        copy(&mut self.values, &other.values);
        for (to, from) in self.scales.iter_mut().zip(&other.scales) {
            copy(to, from);
        }
    }

    /// The keys of the tile that begins with a token, as columns: `[head_dim, TILE]`.
    pub(super) fn unpack_keys<T: Scalar>(&self, first: usize, out: &mut [T]) {
        let blocks = Self::blocks(self.head_dim) * TILE;
        C::unpack_keys(UnpackKeys {
            keys: &self.keys[first * self.head_dim..][..TILE * self.head_dim],
            scales: &self.scales[0][first / TILE * blocks..][..blocks],
            out,
        });
    }

    /// Values of that tile as rows of `width` numbers, whole cache lines of them.
    pub(super) fn unpack_values<T: Scalar>(&self, first: usize, out: &mut [T], width: usize) {
        let blocks = Self::blocks(self.value_dim) * TILE;
        C::unpack_values(UnpackValues {
            values: &self.values[first * self.stride()..],
            stride: self.stride(),
            scales: &self.scales[1][first / TILE * blocks..][..blocks],
            out,
            width,
        });
    }
}
