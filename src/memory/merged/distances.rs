//! How far entries lie apart: squared distances of keys and of values, of one or two entries to
//! all.

use crate::kernel;
use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::loops::packed::TILE;
use crate::kernel::loops::pairs::RowDistances;
use crate::memory::merged::rule::{Distance, MergeCost};
use crate::memory::slots::Slots;
use crate::scalar::Scalar;

/// What distances are taken with. Nothing of it is state: all follows from the entries and the
/// units.
#[derive(Clone, Debug)]
pub(super) struct Distances<T> {
    /// Factors of squared differences of keys, and of differences of so many columns of values.
    pub(super) key_factors: Buffer<T>,
    pub(super) value_factor: T,
    pub(super) value_columns: usize,
    /// `Rᵀ`, rows padded, if distances are taken through a matrix; and `R k̄` of every entry as
    /// columns.
    pub(super) metric: Buffer<T>,
    pub(super) projected: Buffer<T>,
    /// Scratch: keys and values of the entries that are measured, and the squares of keys.
    pub(super) keys: Buffer<T>,
    pub(super) values: Buffer<T>,
    pub(super) key_squares: Buffer<T>,
    /// `1/distance` of each to all, zero to itself and beyond the entries.
    pub(super) closeness: Buffer<T>,
    /// Scratch: a tile of what is kept in fewer bits, and the distances to it.
    tile: [Buffer<T>; 2],
}

impl<T: Scalar> Distances<T> {
    pub(super) fn new() -> Self {
        Self {
            key_factors: Buffer::new(),
            value_factor: T::zero(),
            value_columns: 0,
            metric: Buffer::new(),
            projected: Buffer::new(),
            keys: Buffer::new(),
            values: Buffer::new(),
            key_squares: Buffer::new(),
            closeness: Buffer::new(),
            tile: [Buffer::new(), Buffer::new()],
        }
    }

    /// Sets the sizes; entries are as yet unknown.
    pub(super) fn prepare(&mut self, metric: &Distance, slots: &Slots<T>) {
        let keys = match metric {
            Distance::Identity | Distance::QueryDiagonal => slots.head_dim,
            Distance::Matrix(metric) => {
                let rows = padded::<T>(metric.nrows());
                self.metric.resize(slots.head_dim * rows);
                self.metric.fill(T::zero());
                for ((row, column), &x) in metric.indexed_iter() {
                    self.metric[column * rows + row] = T::from_f64(x);
                }
                metric.nrows()
            }
        };
        self.key_factors.resize(keys);
        self.keys.resize(2 * keys.max(slots.head_dim));
        self.values.resize(2 * padded::<T>(slots.value_dim));
        self.make_room(slots.capacity);
    }

    /// Makes it equal to another of the same sizes; what is scratch stays.
    pub(super) fn copy_from(&mut self, other: &Self) {
        for (to, from) in [
            (&mut self.key_factors, &other.key_factors),
            (&mut self.metric, &other.metric),
            (&mut self.projected, &other.projected),
        ] {
            to.resize(from.len());
            to.copy_from_slice(from);
        }
        self.keys.resize(other.keys.len());
        self.values.resize(other.values.len());
        (self.value_factor, self.value_columns) = (other.value_factor, other.value_columns);
    }

    /// Makes room for so many entries, of which nothing is known.
    pub(super) fn make_room(&mut self, capacity: usize) {
        if !self.metric.is_empty() {
            self.projected.resize(self.key_factors.len() * capacity);
            self.projected.fill(T::zero());
        }
        self.key_squares.resize(2 * capacity);
        self.closeness.resize(2 * capacity);
    }

    /// Copies keys, or what the metric makes of them, and values of the entries that are measured.
    fn take_points(&mut self, slots: &Slots<T>, entries: &[usize]) {
        let (length, stride) = (self.key_factors.len(), self.values.len() / 2);
        let Self { metric, projected, keys, values, .. } = self;
        let points = keys.chunks_exact_mut(length).zip(values.chunks_exact_mut(stride));
        for (&entry, (key, value)) in entries.iter().zip(points) {
            if metric.is_empty() {
                slots.read_key(entry, key);
            } else {
                let column = projected[entry..].iter().step_by(slots.capacity);
                key.iter_mut().zip(column).for_each(|(to, &x)| *to = x);
            }
            slots.read_value(entry, value);
        }
    }

    /// Measures keys and values of one or two entries against all: the squares of keys, and, in
    /// `closeness`, those of values.
    pub(super) fn squares(
        &mut self,
        slots: &Slots<T>,
        cost: MergeCost,
        entries: &[usize],
        used: usize,
    ) {
        let (length, stride) = (self.key_factors.len(), self.values.len() / 2);
        let count = entries.len();
        self.take_points(slots, entries);
        let (factor, columns) = (self.value_factor, self.value_columns);
        let Self { key_factors, metric, projected, keys, values, key_squares, closeness, .. } =
            self;
        let y: &[T] = if metric.is_empty() { slots.key_columns() } else { projected };
        let key_squares = &mut key_squares[..count * used];
        let points = &keys[..count * length];
        kernel::column_distances(y, slots.capacity, key_factors, points, key_squares);
        let closeness = &mut closeness[..count * used];
        if cost.counts_values() {
            let points = &values[..count * stride];
            let y = slots.value_rows();
            RowDistances { y, stride, columns, factor, points, out: closeness }.run();
        } else {
            closeness.fill(T::zero());
        }
    }

    /// The same of entries in fewer bits, tile by tile of what they stand for.
    pub(super) fn squares_of_packed(
        &mut self,
        slots: &Slots<T>,
        cost: MergeCost,
        entries: &[usize],
        used: usize,
    ) {
        let Some(packed) = slots.packed() else { return };
        let (length, stride) = (self.key_factors.len(), self.values.len() / 2);
        let count = entries.len();
        self.take_points(slots, entries);
        let Self {
            key_factors,
            value_factor: factor,
            value_columns: columns,
            metric,
            projected,
            keys,
            values,
            key_squares,
            closeness,
            tile: [tile, squares],
        } = self;
        tile.resize(TILE * length.max(slots.head_dim).max(stride));
        squares.resize(count * TILE);
        let place = |from: &[T], to: &mut [T], first: usize, width: usize| {
            for (p, row) in from.chunks_exact(width).enumerate() {
                to[p * used + first..][..width].copy_from_slice(row);
            }
        };
        if !metric.is_empty() {
            let out = &mut key_squares[..count * used];
            let points = &keys[..count * length];
            kernel::column_distances(projected, slots.capacity, key_factors, points, out);
        }
        for first in (0..used).step_by(TILE) {
            let width = TILE.min(used - first);
            let squares = &mut squares[..count * width];
            if metric.is_empty() {
                packed.unpack_keys(first, &mut tile[..TILE * length]);
                let points = &keys[..count * length];
                kernel::column_distances(tile, TILE, key_factors, points, squares);
                place(squares, key_squares, first, width);
            }
            if cost.counts_values() {
                let rows = &mut tile[..width * stride];
                packed.unpack_values(first, rows, stride);
                let points = &values[..count * stride];
                let (factor, columns, out) = (*factor, *columns, &mut *squares);
                RowDistances { y: rows, stride, columns, factor, points, out }.run();
                place(squares, closeness, first, width);
            }
        }
        if !cost.counts_values() {
            closeness[..count * used].fill(T::zero());
        }
    }

    /// What is known of an entry is known of another place now.
    pub(super) fn move_entry(&mut self, from: usize, to: usize, capacity: usize) {
        if !self.metric.is_empty() {
            self.projected.chunks_exact_mut(capacity).for_each(|row| row[to] = row[from]);
        }
    }
}
