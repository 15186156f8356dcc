//! Tokens in fewer bits, in the layout of the loops that read them as they are.

pub(crate) mod tiles;

use crate::kernel;
use crate::memory::packed::tiles::Tiles;
use crate::scalar::Scalar;
use crate::state_format::StateFormat;
use core::ops::Range;
use ndarray::ArrayView1;

/// Keys and values of tokens, in one of the formats that are not the kernel's own.
#[derive(Clone, Debug)]
pub(crate) enum Packed {
    Bf16(Tiles<u16>),
    Q8(Tiles<i8>),
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

    /// Copies a key.
    pub(crate) fn read_key<T: Scalar>(&self, token: usize, out: &mut [T]) {
        each!(self, tiles => tiles.read_key(token, out));
    }

    /// Copies a value.
    pub(crate) fn read_value<T: Scalar>(&self, token: usize, out: &mut [T]) {
        each!(self, tiles => tiles.read_value(token, out));
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

    /// `out_rj += factor_r·q_r·k_j` for rows of queries, and tokens `j` from `first` on, where a
    /// tile begins: as many whole cache lines as `tokens` says. Rows of `out` are `ld` apart.
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

    /// Puts what another set of the same format and sizes holds of a token.
    pub(crate) fn put_from(&mut self, token: usize, other: &Self, from: usize) {
        match (self, other) {
            (Self::Bf16(own), Self::Bf16(other)) => own.put_from(token, other, from),
            (Self::Q8(own), Self::Q8(other)) => own.put_from(token, other, from),
            _ => unreachable!("the parts of a kernel have one format"),
        }
    }

    /// The same within this set.
    pub(crate) fn copy_token(&mut self, from: usize, to: usize) {
        each!(self, tiles => tiles.copy_token(from, to));
    }

    /// Makes it equal to another, in its own buffers if it has the same format.
    pub(crate) fn copy_from(&mut self, other: &Self) {
        match (&mut *self, other) {
            (Self::Bf16(own), Self::Bf16(other)) => own.copy_from(other),
            (Self::Q8(own), Self::Q8(other)) => own.copy_from(other),
            _ => *self = other.clone(),
        }
    }

    /// The keys of the tile that begins with a token, as columns: `[head_dim, TILE]`.
    pub(crate) fn unpack_keys<T: Scalar>(&self, first: usize, out: &mut [T]) {
        each!(self, tiles => tiles.unpack_keys(first, out));
    }

    /// Values of that tile as rows of `width` numbers, whole cache lines of them.
    pub(crate) fn unpack_values<T: Scalar>(&self, first: usize, out: &mut [T], width: usize) {
        each!(self, tiles => tiles.unpack_values(first, out, width));
    }
}
