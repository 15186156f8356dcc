//! The scores of a tile: some keys, which are rows, and a block of queries, which are columns.

use crate::kernel;
use crate::kernel::buffer::Buffer;
use crate::kernel::loops::products::{Epilogue, Matrix, Product};
use crate::memory::scoring::Scoring;
use crate::scalar::Scalar;
use core::ops::Range;

/// Where the mask cuts through a tile, keys and queries go in blocks of this many, so that little
/// of the masked half is computed.
const MASK_BLOCK: usize = 16;

/// Which keys of a tile each query of a block sees.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    /// Query `i` sees keys `0..=i + offset` of the tile, or all where there is none.
    pub(crate) offset: Option<isize>,
    /// Keys of the tile.
    pub(crate) keys: usize,
    /// Queries of the block.
    pub(crate) queries: usize,
    /// Columns of the tile: the queries, and room beyond them.
    pub(crate) width: usize,
}

impl Seen {
    /// Whether every query sees every key.
    fn all(self) -> bool {
        self.offset.is_none_or(|offset| offset + 1 >= self.keys.cast_signed())
    }

    /// The first query that sees a key, or `width`.
    pub(crate) fn first_query(self, key: usize) -> usize {
        self.offset
            .map_or(0, |offset| (key.cast_signed() - offset).max(0).cast_unsigned())
            .min(self.width)
    }

    /// The keys in blocks, each with the first query that sees one of its keys, down to a whole
    /// cache line.
    pub(crate) fn key_blocks<T: Scalar>(self) -> impl Iterator<Item = (Range<usize>, usize)> {
        let step = if self.all() { self.keys.max(1) } else { MASK_BLOCK };
        (0..self.keys).step_by(step).map(move |first| {
            let from = self.first_query(first) / T::PAD * T::PAD;
            (first..self.keys.min(first + step), from)
        })
    }

    /// The first query of the block that holds query `from`, or `from` where there are no blocks.
    pub(crate) fn block_start(self, from: usize) -> usize {
        if self.all() { from } else { from / MASK_BLOCK * MASK_BLOCK }
    }

    /// The queries in blocks, each with the number of keys that one of its queries sees.
    pub(crate) fn query_blocks(self) -> impl Iterator<Item = (Range<usize>, usize)> {
        let step = if self.all() { self.queries.max(1) } else { MASK_BLOCK };
        (0..self.queries).step_by(step).map(move |first| {
            let last = self.queries.min(first + step);
            let keys = self.offset.map_or(self.keys, |offset| {
                (offset + last.cast_signed()).clamp(0, self.keys.cast_signed()).cast_unsigned()
            });
            (first..last, keys)
        })
    }
}

/// What scores are computed of.
#[derive(Debug)]
pub(crate) struct ScoreTile<'a, T> {
    /// Keys by rows of `d` numbers, `ldk` apart.
    pub(crate) k: &'a [T],
    pub(crate) ldk: usize,
    pub(crate) d: usize,
    /// Queries `[d, width]` times the factor of scores to base 2.
    pub(crate) queries: &'a [T],
    /// The last key that any query sees, counted from the first of the tile.
    pub(crate) last: usize,
    /// 0, 1, 2, .. where there is a slope.
    pub(crate) positions: &'a [T],
}

impl<T: Scalar> ScoreTile<'_, T> {
    /// Writes the scores `[keys, width]` to base 2; −∞ where the mask hides the key. What they are
    /// before a cap goes to `products`, but for columns that see no key of a block.
    pub(crate) fn write(
        self,
        scoring: Scoring<T>,
        seen: Seen,
        scores: &mut [T],
        mut products: Option<&mut [T]>,
    ) {
        let width = seen.width;
        for (keys, from) in seen.key_blocks::<T>() {
            let block = keys.start * width..keys.end * width;
            let rows = &mut scores[block.clone()];
            if from < width {
                Product {
                    m: keys.len(),
                    n: width - from,
                    k: self.d,
                    a: Matrix::rows(&self.k[keys.start * self.ldk..], self.ldk),
                    b: &self.queries[from..],
                    ldb: width,
                    c: &mut rows[from..],
                    ldc: width,
                    into: Epilogue::Set,
                }
                .run();
                if let Some(products) = &mut products {
                    products[block].copy_from_slice(rows);
                }
                if let Some(cap) = scoring.soft_cap {
                    rows.chunks_exact_mut(width).for_each(|row| cap.apply(&mut row[from..]));
                }
                if let Some(slope) = scoring.slope {
                    self.add_distances(slope, seen.offset, keys.clone(), from, rows);
                }
            }
            if !seen.all() {
                for (key, row) in keys.zip(rows.chunks_exact_mut(width)) {
                    row[..seen.first_query(key)].fill(T::neg_infinity());
                }
            }
        }
    }

    #[allow(clippy::cast_precision_loss)] // positions
    fn add_distances(
        &self,
        slope: T,
        offset: Option<isize>,
        keys: Range<usize>,
        from: usize,
        rows: &mut [T],
    ) {
        let width = rows.len() / keys.len();
        for (key, row) in keys.zip(rows.chunks_exact_mut(width)) {
            // minus the distance: of query t it is t + offset − key, or last − key
            let (of_0, step) = match offset {
                Some(offset) => (key.cast_signed() - offset, -T::one()),
                None => (key.cast_signed() - self.last.cast_signed(), T::zero()),
            };
            let line = [T::from_f64(of_0 as f64), step];
            kernel::add_distances(&mut row[from..], &self.positions[from..], line, slope);
        }
    }
}

/// Writes 0, 1, 2, .. up to `count` numbers.
#[allow(clippy::cast_precision_loss)] // sizes of tiles
pub(crate) fn count_up<T: Scalar>(positions: &mut Buffer<T>, count: usize) {
    positions.resize(count);
    positions.iter_mut().enumerate().for_each(|(i, position)| *position = T::from_f64(i as f64));
}

/// `sums_t = Σ_j weights_jt·rows_j` for every query, over the keys that it sees; added unless
/// `set`.
pub(crate) fn sum_over_keys<T: Scalar>(
    seen: Seen,
    weights: &[T],
    (rows, stride): (&[T], usize),
    set: bool,
    sums: &mut [T],
) {
    for (queries, keys) in seen.query_blocks() {
        if keys == 0 && !set {
            continue;
        }
        Product {
            m: queries.len(),
            n: stride,
            k: keys,
            a: Matrix::columns(&weights[queries.start..], seen.width),
            b: rows,
            ldb: stride,
            c: &mut sums[queries.start * stride..],
            ldc: stride,
            into: if set { Epilogue::Set } else { Epilogue::Add },
        }
        .run();
    }
}
