//! A pass over new tokens: what it knows, its memory, and how it maps a chunk of them.

use crate::check;
use crate::error::Error;
use crate::features::FeatureMap;
use crate::features::columns::{ColumnMap, Columns, OF_NOTHING};
use crate::features::side::Side;
use crate::kernel;
use crate::kernel::buffer::Buffer;
use crate::kernel::loops::reduce::TakeToken;
use crate::memory::answer::Answer;
use crate::memory::linear::bounds::LARGEST_FEATURE;
use crate::memory::linear::checkpoints::SumCheckpoints;
use crate::memory::linear::chunk::Chunk;
use crate::memory::linear::decay::LogDecay;
use crate::memory::linear::gates::Gates;
use crate::memory::linear::state::State;
use crate::memory::linear::steps::StepBuffers;
use crate::scalar::Scalar;
use crate::views;
use core::ops::Range;
use ndarray::{Array2, ArrayView2};

/// New tokens: `q [n, d]`, `k [n, d]`, `v [n, value_dim]`, and log decays `[n, 1 or num_features]`
/// if they have gates.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tokens<'a, T> {
    pub(crate) q: ArrayView2<'a, T>,
    pub(crate) k: ArrayView2<'a, T>,
    pub(crate) v: ArrayView2<'a, T>,
    pub(crate) log_decay: Option<ArrayView2<'a, T>>,
}

impl<T> Tokens<'_, T> {
    pub(super) fn rows(&self, range: Range<usize>) -> Self {
        let part = |x| views::rows(x, range.clone());
        Self {
            q: part(self.q),
            k: part(self.k),
            v: part(self.v),
            log_decay: self.log_decay.map(part),
        }
    }
}

/// Memory of one pass. It grows to the largest chunk it has met and holds nothing between calls.
#[derive(Debug)]
pub(super) struct PassBuffers<T> {
    x: Buffer<T>,
    x_key: Buffer<T>,
    squares: Buffer<T>,
    map: [Buffer<T>; 2],
    /// For maps that take tokens as rows.
    rows: [Array2<T>; 2],
    pub(super) chunk: Chunk<T>,
    pub(super) gates: Gates<T>,
    /// A part of the chunk.
    pub(super) part: Chunk<T>,
    pub(super) step: StepBuffers<T>,
    pub(super) answer: Answer<T>,
    /// Where sums are kept for a backward pass, if they are.
    pub(super) checkpoints: Option<SumCheckpoints<T>>,
    /// The state before a change that may fail.
    pub(super) before: State<T>,
}

impl<T: Scalar> PassBuffers<T> {
    pub(super) fn new() -> Self {
        Self {
            x: Buffer::new(),
            x_key: Buffer::new(),
            squares: Buffer::new(),
            map: [Buffer::new(), Buffer::new()],
            rows: [Array2::zeros((0, 0)), Array2::zeros((0, 0))],
            chunk: Chunk::new(),
            gates: Gates::new(),
            part: Chunk::new(),
            step: StepBuffers::new(),
            answer: Answer::new(),
            checkpoints: None,
            before: State::new(),
        }
    }
}

/// Linear attention by a map: what one pass over tokens needs to know. The sums are elsewhere.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pass<'a, T> {
    map: &'a dyn FeatureMap<T>,
    scale_root: T,
    decay: Option<&'a LogDecay<T>>,
}

impl<'a, T: Scalar> Pass<'a, T> {
    /// For values of `value_dim` columns.
    pub(crate) fn new(
        map: &'a dyn FeatureMap<T>,
        value_dim: usize,
        scale: f64,
    ) -> Result<Self, Error> {
        check::at_least_one("value_dim", value_dim)?;
        check::features(map.head_dim(), map.num_features())?;
        check::array("value_dim", value_dim, map.num_features())?;
        let scale = check::scale::<T>(Some(scale), map.head_dim())?;
        Ok(Self::of(map, T::from_f64(scale.sqrt())))
    }

    /// By a map that has been checked, with the square root of a scale that has.
    pub(super) fn of(map: &'a dyn FeatureMap<T>, scale_root: T) -> Self {
        Self { map, scale_root, decay: None }
    }

    pub(super) fn feature_map(&self) -> &'a dyn FeatureMap<T> {
        self.map
    }

    pub(super) fn scale_root(&self) -> T {
        self.scale_root
    }

    /// The same, of sums that decay.
    pub(crate) fn with_decay(self, decay: Option<&'a LogDecay<T>>) -> Self {
        Self { decay, ..self }
    }

    pub(crate) fn num_features(&self) -> usize {
        self.map.num_features()
    }

    pub(super) fn log_decay(&self) -> Option<&'a LogDecay<T>> {
        self.decay
    }

    /// Whether the sums decay.
    pub(super) fn decays(&self) -> bool {
        self.decay.is_some()
    }

    /// Whether features may decay differently, with these gates.
    pub(super) fn decays_by_feature(&self, gates: Option<ArrayView2<'_, T>>) -> bool {
        let common = gates.is_none_or(|gates| gates.ncols() == 1);
        self.decay.is_some_and(|decay| !(decay.may_be_common() && common))
    }

    /// Whether all features decay alike, with these gates.
    #[cfg(feature = "rayon")]
    pub(super) fn decays_alike(&self, gates: Option<ArrayView2<'_, T>>) -> bool {
        self.decay.is_none_or(|decay| decay.is_common(gates))
    }

    fn column_maps(&self) -> Option<[&'a dyn ColumnMap<T>; 2]> {
        Some([self.map.column_map(Side::Query)?, self.map.column_map(Side::Key)?])
    }

    /// Takes tokens of a chunk in: maps queries and keys, copies values and log decays.
    pub(super) fn map_tokens(
        &self,
        tokens: Tokens<'_, T>,
        buffers: &mut PassBuffers<T>,
        first_row: usize,
    ) -> Result<(), Error> {
        let Tokens { q, k, v, log_decay } = tokens;
        buffers.chunk.resize(q.nrows(), self.num_features(), v.ncols());
        if q.nrows() == 1 {
            if self.map_token(tokens, buffers, first_row)? {
                return buffers.gates.set(self.decay, log_decay, 1, first_row);
            }
            self.map_one(q, k, buffers, first_row)?;
        } else {
            self.map(Side::Query, q, buffers, first_row)?;
            self.map(Side::Key, k, buffers, first_row)?;
        }
        buffers.chunk.set_values(v).map_err(|error| error.in_chunk(first_row))?;
        buffers.gates.set(self.decay, log_decay, q.nrows(), first_row)
    }

    /// As [`map_tokens`](Self::map_tokens), of keys alone: those of queries may hold anything.
    pub(super) fn map_keys(
        &self,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        log_decay: Option<ArrayView2<'_, T>>,
        buffers: &mut PassBuffers<T>,
        first_row: usize,
    ) -> Result<(), Error> {
        buffers.chunk.resize(k.nrows(), self.num_features(), v.ncols());
        self.map(Side::Key, k, buffers, first_row)?;
        buffers.chunk.set_values(v).map_err(|error| error.in_chunk(first_row))?;
        buffers.gates.set(self.decay, log_decay, k.nrows(), first_row)
    }

    /// Maps the query and the key of one token and copies its values, all at once, if its rows are
    /// contiguous and finite and the map can; `false` says that nothing was done.
    fn map_token(
        &self,
        Tokens { q, k, v, .. }: Tokens<'_, T>,
        PassBuffers { x, x_key, map: memory, chunk, .. }: &mut PassBuffers<T>,
        row: usize,
    ) -> Result<bool, Error> {
        let (Some(maps), Some(q), Some(k), Some(v)) =
            (self.column_maps(), q.to_slice(), k.to_slice(), v.to_slice())
        else {
            return Ok(false);
        };
        x.resize(q.len());
        x_key.resize(k.len());
        let [mark, largest] = TakeToken {
            factor: self.scale_root,
            vectors: [q, k],
            scaled: [x, x_key],
            values: v,
            copy: &mut chunk.values,
        }
        .run();
        if mark != T::zero() || !largest.is_finite() {
            return Ok(false);
        }
        chunk.values[v.len()..].fill(T::zero());
        chunk.note_values(largest);
        let mut query = Columns::one(x, &mut chunk.queries, &mut chunk.query_scale);
        let mut key = Columns::one(x_key, &mut chunk.keys, &mut chunk.key_scale);
        map_pair(maps, [&mut query, &mut key], memory).map_err(|error| error.in_chunk(row))?;
        Ok(true)
    }

    /// Maps the rows of `√scale·x` to features, each finite and of a size near one.
    pub(super) fn map(
        &self,
        side: Side,
        x: ArrayView2<'_, T>,
        buffers: &mut PassBuffers<T>,
        first_row: usize,
    ) -> Result<(), Error> {
        let width = buffers.chunk.width;
        if width == 1 {
            self.scale_one(side, x, &mut buffers.x, first_row)?;
        } else {
            buffers.x.resize(self.map.head_dim() * width);
            buffers.squares.resize(width);
            views::to_columns(x, self.scale_root, &mut buffers.squares, &mut buffers.x);
            if !kernel::all_finite(&buffers.squares) {
                check::finite(side.name(), x).map_err(|error| error.in_chunk(first_row))?;
                let scaled = |t: usize| buffers.x[t..].iter().step_by(width).all(|x| x.is_finite());
                if let Some(t) = (0..x.nrows()).find(|&t| !scaled(t)) {
                    return Err(too_large(first_row + t));
                }
            }
        }
        self.map_again(side, buffers).map_err(|error| error.in_chunk(first_row))
    }

    /// Sets `scaled` to the one row of `√scale·x`.
    fn scale_one(
        &self,
        side: Side,
        x: ArrayView2<'_, T>,
        scaled: &mut Buffer<T>,
        row: usize,
    ) -> Result<(), Error> {
        scaled.resize(self.map.head_dim());
        if let Some(x) = x.to_slice() {
            if kernel::scale_into(self.scale_root, x, scaled) == T::zero() {
                return Ok(());
            }
        } else {
            scaled.iter_mut().zip(x).for_each(|(scaled, &x)| *scaled = x * self.scale_root);
        }
        check::finite(side.name(), x).map_err(|error| error.in_chunk(row))?;
        if kernel::all_finite(scaled) { Ok(()) } else { Err(too_large(row)) }
    }

    /// Maps the query and the key of one token.
    fn map_one(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        buffers: &mut PassBuffers<T>,
        row: usize,
    ) -> Result<(), Error> {
        let Some(maps) = self.column_maps() else {
            self.map(Side::Query, q, buffers, row)?;
            return self.map(Side::Key, k, buffers, row);
        };
        let PassBuffers { x, x_key, map: memory, chunk, .. } = buffers;
        self.scale_one(Side::Query, q, x, row)?;
        self.scale_one(Side::Key, k, x_key, row)?;
        let mut query = Columns::one(x, &mut chunk.queries, &mut chunk.query_scale);
        let mut key = Columns::one(x_key, &mut chunk.keys, &mut chunk.key_scale);
        map_pair(maps, [&mut query, &mut key], memory).map_err(|error| error.in_chunk(row))
    }

    /// Maps the vectors that the last [`map`](Self::map) was given.
    pub(super) fn map_again(&self, side: Side, buffers: &mut PassBuffers<T>) -> Result<(), Error> {
        let PassBuffers { x, squares, map: memory, rows, chunk, .. } = buffers;
        let (tokens, width) = (chunk.tokens, chunk.width);
        let (values, log_scale) = match side {
            Side::Query => (&mut chunk.queries, &mut chunk.query_scale),
            Side::Key => (&mut chunk.keys, &mut chunk.key_scale),
        };
        let mut columns = Columns { x, squares, width, tokens, values, log_scale };
        match self.map.column_map(side) {
            Some(map) => map.map_columns(&mut columns, memory),
            None => self.map_rows(side, columns, rows),
        }
    }

    /// Maps through a map that takes tokens as rows.
    fn map_rows(
        &self,
        side: Side,
        columns: Columns<'_, T>,
        [vectors, features]: &mut [Array2<T>; 2],
    ) -> Result<(), Error> {
        let Columns { x, width, tokens, values, log_scale, .. } = columns;
        let (d, m) = (self.map.head_dim(), self.map.num_features());
        if vectors.nrows() < tokens || vectors.ncols() != d || features.ncols() != m {
            (*vectors, *features) = (Array2::zeros((tokens, d)), Array2::zeros((tokens, m)));
        }
        let mut vectors = views::rows_mut(vectors.view_mut(), 0..tokens);
        for (mut vector, t) in vectors.outer_iter_mut().zip(0..) {
            vector.iter_mut().zip(x[t..].iter().step_by(width)).for_each(|(to, &x)| *to = x);
        }
        let mut features = views::rows_mut(features.view_mut(), 0..tokens);
        let scales = ndarray::ArrayViewMut1::from(&mut log_scale[..tokens]);
        side.map(self.map, vectors.view(), features.view_mut(), scales)?;
        let limit = T::from_f64(LARGEST_FEATURE);
        values.fill(T::zero());
        for (t, mut features) in features.outer_iter_mut().enumerate() {
            let features = features.as_slice_mut().unwrap_or_default();
            if !kernel::all_finite(features) || !log_scale[t].is_finite() {
                return Err(Error::Overflow { which: "a feature", row: t });
            }
            let largest = kernel::max_abs(features);
            if largest == T::zero() {
                log_scale[t] = T::from_f64(OF_NOTHING);
            } else if largest > limit || largest < limit.recip() {
                // the inverse of a number below the normal ones would be infinite
                let normal = largest.max(T::min_positive_value());
                kernel::scale(features, normal.recip());
                log_scale[t] += normal.ln();
            }
            values[t..]
                .iter_mut()
                .step_by(width)
                .zip(&*features)
                .for_each(|(to, &feature)| *to = feature);
        }
        Ok(())
    }
}

/// Maps a query and a key, at once if they have the same map.
fn map_pair<T: Scalar>(
    [query_map, key_map]: [&dyn ColumnMap<T>; 2],
    [query, key]: [&mut Columns<'_, T>; 2],
    memory: &mut [Buffer<T>; 2],
) -> Result<(), Error> {
    if core::ptr::addr_eq(query_map, key_map) {
        return query_map.map_pair([query, key], memory);
    }
    query_map.map_columns(query, memory)?;
    key_map.map_columns(key, memory)
}

fn too_large(row: usize) -> Error {
    Error::Overflow { which: "the size of the vector", row }
}
