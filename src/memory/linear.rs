//! Linear memory: sums of feature products, of a size that does not depend on the number of tokens.

use super::{Memory, Partial, divisor};
use crate::kernel::{self, CHUNK};
use crate::views::{self, corner_mut};
use crate::{Error, FeatureMap, Scalar, check};
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis};
use std::sync::Arc;

/// Queries of a chunk whose masked scores are computed at once; the part above the diagonal of a block is wasted work.
const ROW_BLOCK: usize = 32;

/// Chunks with fewer tokens than this are absorbed token by token.
const FEW_TOKENS: usize = 6;

/// The most that the running maximum of the log scales may rise within tokens that share one unit, in natural-log
/// units. Larger jumps begin a new group, so that a huge later key cannot push the sums of earlier queries out of range.
const GROUP_RISE: f64 = 16.0;

/// Rows of features whose maximum is above this, or below its inverse, are brought to a maximum of one, so that their
/// products stay in range.
const LARGEST_FEATURE: f64 = 1024.0;

/// Whether sums are divided by the sum of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Readout {
    Normalized,
    Unnormalized,
}

/// The sums over every token absorbed, for a feature map φ:
///
/// ```text
/// S = Σ_j φ(k̂_j) v_jᵀ  [num_features, value_dim],    z = Σ_j φ(k̂_j)  [num_features],    x̂ = √scale·x
/// ```
///
/// kept in units of `e^{log_scale}`, the running maximum of the keys' log scales. It answers a query with
/// `φ(q̂)ᵀS / φ(q̂)ᵀz` (Katharopoulos et al., arXiv 2006.16236, equation 5).
///
/// Sums are compensated (Kahan): each carries its rounding error beside it, so that the error does not grow with the
/// number of tokens. Plain sums in `f32` would lose four digits in a million tokens and stand still after some hundred
/// million. The size is `2·num_features·(value_dim + 1) + 1` numbers, whatever the number of tokens.
///
/// ```
/// use dijiang::{LinearMemory, Memory, Performer};
/// use ndarray::Array2;
/// use std::sync::Arc;
///
/// let map = Arc::new(Performer::<f32>::new(8, 16, 0)?);
/// let x = Array2::from_shape_fn((10, 8), |(i, j)| ((i * 8 + j) as f32).sin());
/// let (first, second) = x.view().split_at(ndarray::Axis(0), 4);
///
/// let mut whole = LinearMemory::new(map.clone(), 8, 1.0)?;
/// whole.absorb(x.view(), x.view())?;
/// let mut left = LinearMemory::new(map.clone(), 8, 1.0)?;
/// left.absorb(first, first)?;
/// let mut right = LinearMemory::new(map, 8, 1.0)?;
/// right.absorb(second, second)?;
/// left.merge(&right)?; // what two machines found, in one
/// assert_eq!(left.len(), whole.len());
/// assert_eq!(left.state_floats(), 2 * 16 * 9 + 1);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug)]
pub struct LinearMemory<T, F> {
    map: Arc<F>,
    scale_root: T,
    state: State<T>,
}

impl<T: Clone, F> Clone for LinearMemory<T, F> {
    fn clone(&self) -> Self {
        Self { map: Arc::clone(&self.map), scale_root: self.scale_root.clone(), state: self.state.clone() }
    }
}

/// The sums and their rounding errors, in units of `e^{log_scale}`; −∞ while empty.
#[derive(Clone, Debug)]
struct State<T> {
    sums: Array2<T>,
    sums_low: Array2<T>,
    normalizer: Array1<T>,
    normalizer_low: Array1<T>,
    log_scale: T,
    tokens: usize,
}

impl<T: Scalar> State<T> {
    fn new(features: usize, value_dim: usize) -> Self {
        Self {
            sums: Array2::zeros((features, value_dim)),
            sums_low: Array2::zeros((features, value_dim)),
            normalizer: Array1::zeros(features),
            normalizer_low: Array1::zeros(features),
            log_scale: T::neg_infinity(),
            tokens: 0,
        }
    }

    /// Every number of the sums, in a fixed order.
    fn parts(&self) -> [&[T]; 4] {
        [self.sums.as_slice(), self.sums_low.as_slice(), self.normalizer.as_slice(), self.normalizer_low.as_slice()]
            .map(Option::unwrap_or_default)
    }

    /// As [`parts`](Self::parts).
    fn parts_mut(&mut self) -> [&mut [T]; 4] {
        [
            slice_mut(&mut self.sums),
            slice_mut(&mut self.sums_low),
            slice_mut(&mut self.normalizer),
            slice_mut(&mut self.normalizer_low),
        ]
    }

    /// Adds `factor·delta` to the sums and `factor·features` to the normaliser.
    fn add(&mut self, factor: T, delta: &[T], features: &[T]) {
        let [sums, sums_low, normalizer, normalizer_low] = self.parts_mut();
        kernel::add_compensated(sums, sums_low, factor, delta);
        kernel::add_compensated(normalizer, normalizer_low, factor, features);
    }

    /// Whether a sum has come so near to the largest number of the type that more tokens could overflow it.
    fn is_too_large(&self) -> bool {
        let limit = T::max_value() * T::from_f64(0.5_f64.powi(24));
        self.parts().into_iter().any(|part| !kernel::all_finite(part) || kernel::max_abs(part) > limit)
    }

    /// Brings the sums to a unit that is at least as large.
    fn raise(&mut self, log_scale: T) {
        if log_scale > self.log_scale {
            if self.tokens > 0 {
                let factor = (self.log_scale - log_scale).exp();
                self.parts_mut().into_iter().for_each(|part| kernel::scale(part, factor));
            }
            self.log_scale = log_scale;
        }
    }
}

/// Scratch of one chunk. It grows to the largest chunk it has met and holds nothing between calls.
#[derive(Debug)]
pub(crate) struct Workspace<T> {
    x: Array2<T>,
    values: Array2<T>,
    queries: Array2<T>,
    keys: Array2<T>,
    query_scale: Array1<T>,
    key_scale: Array1<T>,
    /// Values so large that sums of them may overflow: see [`State::is_too_large`].
    large_values: bool,
    scores: Array2<T>,
    /// What a group adds to the state.
    delta: Array2<T>,
    key_sum: Array1<T>,
    answer: Partial<T>,
}

impl<T: Scalar> Workspace<T> {
    pub(crate) fn new() -> Self {
        let nothing = || Array2::zeros((0, 0));
        Self {
            x: nothing(),
            values: nothing(),
            queries: nothing(),
            keys: nothing(),
            query_scale: Array1::zeros(0),
            key_scale: Array1::zeros(0),
            large_values: false,
            scores: nothing(),
            delta: nothing(),
            key_sum: Array1::zeros(0),
            answer: Partial { numerator: nothing(), denominator: Array1::zeros(0), log_scale: Array1::zeros(0) },
        }
    }

    /// The longest run of tokens from `start` whose running maximum stays within [`GROUP_RISE`] of where it begins, and
    /// the maximum it reaches: their common unit.
    fn group(&self, start: usize, end: usize, log_scale: T) -> (usize, T) {
        let lowest = log_scale.max(self.key_scale[start]);
        let limit = lowest + T::from_f64(GROUP_RISE);
        let mut unit = lowest;
        let mut stop = start;
        while stop < end && self.key_scale[stop] <= limit {
            unit = unit.max(self.key_scale[stop]);
            stop += 1;
        }
        (stop, unit)
    }

    /// Copies the values of a chunk.
    fn set_values(&mut self, v: ArrayView2<'_, T>) {
        self.large_values = is_large(v);
        first_rows(&mut self.values, v.nrows()).assign(&v);
    }

    fn reserve(&mut self, tokens: usize, head_dim: usize, features: usize, value_dim: usize) {
        let rows = tokens.min(CHUNK);
        if self.x.nrows() >= rows {
            return;
        }
        self.x = Array2::zeros((rows, head_dim));
        self.values = Array2::zeros((rows, value_dim));
        self.queries = Array2::zeros((rows, features));
        self.keys = Array2::zeros((rows, features));
        self.query_scale = Array1::zeros(rows);
        self.key_scale = Array1::zeros(rows);
        self.scores = Array2::zeros((rows.min(ROW_BLOCK), rows));
        self.answer = Partial {
            numerator: Array2::zeros((rows, value_dim)),
            denominator: Array1::zeros(rows),
            log_scale: Array1::zeros(rows),
        };
    }
}

/// The elements of an array that this crate allocated in standard layout.
fn slice_mut<T, D: ndarray::Dimension>(x: &mut ndarray::Array<T, D>) -> &mut [T] {
    x.as_slice_mut().unwrap_or_default()
}

/// The first rows of scratch.
fn first_rows<T>(x: &mut Array2<T>, count: usize) -> ArrayViewMut2<'_, T> {
    views::rows_mut(x.view_mut(), 0..count)
}

/// The first elements of scratch.
fn first<T>(x: &mut Array1<T>, count: usize) -> ArrayViewMut1<'_, T> {
    x.view_mut().split_at(Axis(0), count).0
}

fn slice<T>(x: &Array1<T>) -> &[T] {
    x.as_slice().unwrap_or_default()
}

/// The rows of an array that this crate allocated; at least one column each.
fn rows<T>(x: &Array2<T>) -> core::slice::ChunksExact<'_, T> {
    x.as_slice().unwrap_or_default().chunks_exact(x.ncols())
}

fn row<T>(x: &Array2<T>, i: usize) -> &[T] {
    let columns = x.ncols();
    x.as_slice().map_or(&[], |all| &all[i * columns..(i + 1) * columns])
}

fn row_mut<T>(x: &mut Array2<T>, i: usize) -> &mut [T] {
    let columns = x.ncols();
    &mut slice_mut(x)[i * columns..(i + 1) * columns]
}

/// Whether a sum of such values could overflow.
fn is_large<T: Scalar>(v: ArrayView2<'_, T>) -> bool {
    let limit = T::from_f64(T::SAFE_VALUE);
    match v.as_slice() {
        Some(v) => kernel::max_abs(v) > limit,
        None => v.iter().any(|x| x.abs() > limit),
    }
}

/// Whether queries or keys are mapped.
#[derive(Clone, Copy)]
enum Side {
    Query,
    Key,
}

impl<T: Scalar, F: FeatureMap<T>> LinearMemory<T, F> {
    /// An empty memory.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `value_dim` is 0 or the map has no features, [`Error::InvalidOption`] if `scale` is not
    /// positive and finite.
    pub fn new(map: Arc<F>, value_dim: usize, scale: f64) -> Result<Self, Error> {
        check::at_least_one("value_dim", value_dim)?;
        check::features(map.head_dim(), map.num_features())?;
        check::array("value_dim", value_dim, map.num_features())?;
        let scale = check::scale::<T>(Some(scale), map.head_dim())?;
        let state = State::new(map.num_features(), value_dim);
        Ok(Self { map, scale_root: T::from_f64(scale.sqrt()), state })
    }

    /// Adds the sums of other tokens, taken with the same map and scale: exact, in any order. That the maps are the same
    /// is for the caller to see to; of them only the number of features is compared.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the number of features or values differs, [`Error::InvalidOption`] if the scales do,
    /// [`Error::Overflow`] if a sum becomes too large. This memory is then unchanged.
    pub fn merge(&mut self, other: &Self) -> Result<(), Error> {
        check::size("other", "features", self.state.sums.nrows(), other.state.sums.nrows())?;
        check::size("other", "value columns", self.state.sums.ncols(), other.state.sums.ncols())?;
        check::same_scale(self.scale_root, other.scale_root)?;
        if other.state.tokens == 0 {
            return Ok(());
        }
        self.guarded(true, |memory| {
            memory.state.raise(other.state.log_scale);
            let factor = (other.state.log_scale - memory.state.log_scale).exp();
            let [sums, sums_low, normalizer, normalizer_low] = other.state.parts();
            memory.state.add(factor, sums, normalizer);
            memory.state.add(factor, sums_low, normalizer_low);
            memory.state.tokens += other.state.tokens;
            memory.check_size(true, 0)
        })
    }

    /// Fails if the values were `large` and their sum has become so.
    fn check_size(&self, large: bool, row: usize) -> Result<(), Error> {
        if large && self.state.is_too_large() {
            Err(Error::Overflow { which: "the sum of values", row })
        } else {
            Ok(())
        }
    }

    pub(crate) fn value_dim(&self) -> usize {
        self.state.sums.ncols()
    }

    pub(crate) fn head_dim(&self) -> usize {
        self.map.head_dim()
    }

    pub(crate) fn num_features(&self) -> usize {
        self.map.num_features()
    }

    /// Everything but the map: the log scale and the sums. Empty while no token has been absorbed.
    pub(crate) fn numbers(&self) -> Vec<T> {
        let state = &self.state;
        if state.tokens == 0 {
            return Vec::new();
        }
        core::iter::once(&state.log_scale).chain(state.parts().into_iter().flatten()).copied().collect()
    }

    /// The inverse of [`numbers`](Self::numbers); the length has been checked.
    pub(crate) fn set_numbers(&mut self, tokens: usize, numbers: &[T]) {
        self.reset();
        if let Some((&log_scale, mut sums)) = numbers.split_first() {
            for part in self.state.parts_mut() {
                let (values, rest) = sums.split_at(part.len());
                part.copy_from_slice(values);
                sums = rest;
            }
            self.state.log_scale = log_scale;
            self.state.tokens = tokens;
        }
    }

    /// Runs `work`; puts the state back if it fails. `risky` says whether it can fail after the state has changed.
    fn guarded(&mut self, risky: bool, work: impl FnOnce(&mut Self) -> Result<(), Error>) -> Result<(), Error> {
        let before = risky.then(|| self.state.clone());
        let result = work(self);
        if result.is_err()
            && let Some(before) = before
        {
            self.state = before;
        }
        result
    }

    /// Causal attention of new tokens: each query sees the tokens absorbed before and the new ones up to its own.
    /// The arguments have been checked.
    pub(crate) fn extend(
        &mut self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mut out: ArrayViewMut2<'_, T>,
        readout: Readout,
        work: &mut Workspace<T>,
    ) -> Result<(), Error> {
        let n = q.nrows();
        work.reserve(n, self.head_dim(), self.num_features(), self.value_dim());
        // A single token is read before it is absorbed; only several, or a huge one, can fail half-way.
        self.guarded(n > 1 || is_large(v), |memory| {
            for start in (0..n).step_by(CHUNK) {
                let chunk = start..n.min(start + CHUNK);
                memory.map(Side::Query, views::rows(q, chunk.clone()), work, start)?;
                memory.map(Side::Key, views::rows(k, chunk.clone()), work, start)?;
                work.set_values(views::rows(v, chunk.clone()));
                memory.extend_chunk(views::rows_mut(out.view_mut(), chunk), readout, work, start)?;
            }
            Ok(())
        })
    }

    /// Maps the rows of `√scale·x` to features, each finite and of a size near one.
    fn map(&self, side: Side, x: ArrayView2<'_, T>, work: &mut Workspace<T>, first_row: usize) -> Result<(), Error> {
        let n = x.nrows();
        let mut scaled = first_rows(&mut work.x, n);
        scaled.zip_mut_with(&x, |a, &b| *a = b * self.scale_root);
        let (values, log_scale) = match side {
            Side::Query => (&mut work.queries, &mut work.query_scale),
            Side::Key => (&mut work.keys, &mut work.key_scale),
        };
        {
            let (values, log_scale) = (first_rows(values, n), first(log_scale, n));
            match side {
                Side::Query => self.map.map_queries(scaled.view(), values, log_scale),
                Side::Key => self.map.map_keys(scaled.view(), values, log_scale),
            }
            .map_err(|error| error.in_chunk(first_row))?;
        }
        let limit = T::from_f64(LARGEST_FEATURE);
        let all_finite = kernel::all_finite(&slice_mut(values)[..n * self.map.num_features()]);
        for i in 0..n {
            let features = row_mut(values, i);
            if !(all_finite || kernel::all_finite(features)) || !log_scale[i].is_finite() {
                return Err(Error::Overflow { which: "a feature", row: first_row + i });
            }
            let largest = kernel::max_abs(features);
            if largest > limit || (largest > T::zero() && largest < limit.recip()) {
                kernel::scale(features, largest.recip());
                log_scale[i] += largest.ln();
            }
        }
        Ok(())
    }

    /// One chunk, already mapped: in groups of tokens whose log scales rise little, or token by token.
    fn extend_chunk(
        &mut self,
        mut out: ArrayViewMut2<'_, T>,
        readout: Readout,
        work: &mut Workspace<T>,
        first_row: usize,
    ) -> Result<(), Error> {
        let n = out.nrows();
        let mut start = 0;
        let mut one_by_one_until = 0;
        while start < n {
            let (mut end, unit) = work.group(start, n, self.state.log_scale);
            let mut grouped = end - start >= FEW_TOKENS && start >= one_by_one_until;
            if grouped {
                let in_range = self.read_group(start, end, unit, work);
                if readout == Readout::Normalized && !in_range {
                    // The unit of the group, set by its largest key, may be too large for an early query.
                    one_by_one_until = end;
                    grouped = false;
                }
            }
            if !grouped {
                end = start + 1;
                self.read_token(start, work);
            }
            let out = &mut views::rows_mut(out.view_mut(), start..end);
            work.answer.write(first_row + start, readout == Readout::Normalized, out)?;
            if grouped {
                self.absorb_group(start, end, work);
            } else {
                self.absorb_token(start, work);
            }
            self.check_size(work.large_values, first_row + start)?;
            start = end;
        }
        Ok(())
    }

    /// Answers query `i` from the state and its own token, into row 0 of the answer.
    fn read_token(&self, i: usize, work: &mut Workspace<T>) {
        let Workspace { queries, query_scale, keys, key_scale, values, answer, .. } = work;
        let (query, key) = (row(queries, i), row(keys, i));
        let unit = self.state.log_scale.max(key_scale[i]);
        let (old, new) = ((self.state.log_scale - unit).exp(), (key_scale[i] - unit).exp());
        let numerator = row_mut(&mut answer.numerator, 0);
        numerator.fill(T::zero());
        for (&feature, sums) in query.iter().zip(rows(&self.state.sums)) {
            kernel::add_scaled(numerator, feature, sums);
        }
        let own = new * kernel::dot(query, key);
        kernel::scale(numerator, old);
        kernel::add_scaled(numerator, own, row(values, i));
        answer.denominator[0] = old * kernel::dot(query, slice(&self.state.normalizer)) + own;
        answer.log_scale[0] = query_scale[i] + unit;
    }

    /// Adds token `i` to the state.
    fn absorb_token(&mut self, i: usize, work: &Workspace<T>) {
        self.state.raise(work.key_scale[i]);
        let factor = (work.key_scale[i] - self.state.log_scale).exp();
        let (key, value) = (row(&work.keys, i), row(&work.values, i));
        let rows = value.len();
        let [sums, sums_low, normalizer, normalizer_low] = self.state.parts_mut();
        for ((&feature, sums), low) in key.iter().zip(sums.chunks_exact_mut(rows)).zip(sums_low.chunks_exact_mut(rows))
        {
            kernel::add_compensated(sums, low, factor * feature, value);
        }
        kernel::add_compensated(normalizer, normalizer_low, factor, key);
        self.state.tokens += 1;
    }

    /// Answers the queries `start..end` into the first rows of the answer, in `unit`: block by block, masked scores give
    /// the part of the group itself and the state the rest. Returns whether every normaliser can be divided by.
    fn read_group(&self, start: usize, end: usize, unit: T, work: &mut Workspace<T>) -> bool {
        let Workspace { queries, query_scale, keys, key_scale, values, scores, answer, .. } = work;
        let old = (self.state.log_scale - unit).exp();
        let mut factors = [T::zero(); CHUNK];
        for (factor, &scale) in factors.iter_mut().zip(key_scale.iter().take(end).skip(start)) {
            *factor = (scale - unit).exp();
        }
        let mut in_range = true;
        let mut numerator = first_rows(&mut answer.numerator, end - start);
        let group_queries = views::rows(queries.view(), start..end);
        kernel::matmul(old, group_queries, self.state.sums.view(), T::zero(), &mut numerator);
        for first in (start..end).step_by(ROW_BLOCK) {
            let last = end.min(first + ROW_BLOCK);
            let mut scores = corner_mut(scores.view_mut(), last - first, last - start);
            let block = views::rows(queries.view(), first..last);
            kernel::matmul(T::one(), block, views::rows(keys.view(), start..last).t(), T::zero(), &mut scores);
            for (i, mut scores) in (first..last).zip(scores.outer_iter_mut()) {
                let (seen, hidden) = scores.as_slice_mut().unwrap_or_default().split_at_mut(i + 1 - start);
                hidden.fill(T::zero());
                kernel::multiply(seen, &factors);
                let denominator = old * kernel::dot(row(queries, i), slice(&self.state.normalizer)) + kernel::sum(seen);
                in_range &= divisor(denominator, i).is_ok();
                answer.denominator[i - start] = denominator;
                answer.log_scale[i - start] = query_scale[i] + unit;
            }
            let mut numerator = views::rows_mut(numerator.view_mut(), first - start..last - start);
            kernel::matmul(T::one(), scores.view(), views::rows(values.view(), start..last), T::one(), &mut numerator);
        }
        in_range
    }

    /// Adds the tokens `start..end`, in units of the largest key so far.
    fn absorb_group(&mut self, start: usize, end: usize, work: &mut Workspace<T>) {
        let unit = work.key_scale.iter().take(end).skip(start).fold(self.state.log_scale, |m, &scale| m.max(scale));
        self.state.raise(unit);
        for j in start..end {
            kernel::scale(row_mut(&mut work.keys, j), (work.key_scale[j] - unit).exp());
        }
        let (keys, values) = (views::rows(work.keys.view(), start..end), views::rows(work.values.view(), start..end));
        if work.delta.dim() != self.state.sums.dim() {
            // not needed by a stream that only decodes
            work.delta = Array2::zeros(self.state.sums.dim());
            work.key_sum = Array1::zeros(self.state.normalizer.len());
        }
        kernel::matmul(T::one(), keys.t(), values, T::zero(), &mut work.delta.view_mut());
        work.key_sum.fill(T::zero());
        for j in start..end {
            kernel::add_scaled(slice_mut(&mut work.key_sum), T::one(), row(&work.keys, j));
        }
        self.state.add(T::one(), work.delta.as_slice().unwrap_or_default(), slice(&work.key_sum));
        self.state.tokens += end - start;
    }

    /// Absorbs checked keys and values without reading.
    pub(crate) fn absorb_with(
        &mut self,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        work: &mut Workspace<T>,
    ) -> Result<(), Error> {
        let n = k.nrows();
        work.reserve(n, self.head_dim(), self.num_features(), self.value_dim());
        self.guarded(n > CHUNK || is_large(v), |memory| {
            for start in (0..n).step_by(CHUNK) {
                let chunk = start..n.min(start + CHUNK);
                let (k, v) = (views::rows(k, chunk.clone()), views::rows(v, chunk));
                memory.map(Side::Key, k, work, start)?;
                work.set_values(v);
                memory.absorb_group(0, k.nrows(), work);
                memory.check_size(work.large_values, start)?;
            }
            Ok(())
        })
    }

    /// Answers checked queries block by block; `each` is given the first row of the block and its answer, of which the
    /// rows of the block count.
    pub(crate) fn read_with(
        &self,
        q: ArrayView2<'_, T>,
        work: &mut Workspace<T>,
        mut each: impl FnMut(usize, usize, &Partial<T>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let n = q.nrows();
        work.reserve(n, self.head_dim(), self.num_features(), self.value_dim());
        for start in (0..n).step_by(CHUNK) {
            let end = n.min(start + CHUNK);
            let count = end - start;
            self.map(Side::Query, views::rows(q, start..end), work, start)?;
            let queries = views::rows(work.queries.view(), 0..count);
            let mut numerator = first_rows(&mut work.answer.numerator, count);
            kernel::matmul(T::one(), queries, self.state.sums.view(), T::zero(), &mut numerator);
            for i in 0..count {
                work.answer.denominator[i] = kernel::dot(row(&work.queries, i), slice(&self.state.normalizer));
                work.answer.log_scale[i] = work.query_scale[i] + self.state.log_scale;
            }
            each(start, count, &work.answer)?;
        }
        Ok(())
    }

    /// `ln φ(√scale·q_i)·φ(√scale·k_j)` of every pair of checked rows.
    pub(crate) fn log_weights(&self, q: ArrayView2<'_, T>, k: ArrayView2<'_, T>) -> Result<Array2<f64>, Error> {
        let mut work = Workspace::new();
        work.reserve(CHUNK, self.head_dim(), self.num_features(), self.value_dim());
        let mut out = Array2::zeros((q.nrows(), k.nrows()));
        for start in (0..k.nrows()).step_by(CHUNK) {
            let k = views::rows(k, start..k.nrows().min(start + CHUNK));
            self.map(Side::Key, k, &mut work, start)?;
            for first in (0..q.nrows()).step_by(CHUNK) {
                let q = views::rows(q, first..q.nrows().min(first + CHUNK));
                self.map(Side::Query, q, &mut work, first)?;
                for i in 0..q.nrows() {
                    for j in 0..k.nrows() {
                        let product = kernel::dot(row(&work.queries, i), row(&work.keys, j)).as_f64();
                        let scale = work.query_scale[i].as_f64() + work.key_scale[j].as_f64();
                        out[[first + i, start + j]] =
                            if product > 0.0 { product.ln() + scale } else { f64::NEG_INFINITY };
                    }
                }
            }
        }
        Ok(out)
    }
}

impl<T: Scalar, F: FeatureMap<T>> Memory<T> for LinearMemory<T, F> {
    fn absorb(&mut self, k: ArrayView2<'_, T>, v: ArrayView2<'_, T>) -> Result<(), Error> {
        check::size("v", "columns", self.value_dim(), v.ncols())?;
        check::keys_values(self.head_dim(), k, v)?;
        self.absorb_with(k, v, &mut Workspace::new())
    }

    fn read(&self, q: ArrayView2<'_, T>, answer: &mut Partial<T>) -> Result<(), Error> {
        check::queries(self.head_dim(), q)?;
        check::size("answer", "rows", q.nrows(), answer.numerator.nrows())?;
        check::size("answer", "columns", self.value_dim(), answer.numerator.ncols())?;
        self.read_with(q, &mut Workspace::new(), |start, count, block| {
            for i in 0..count {
                answer.add(start + i, row(&block.numerator, i), block.denominator[i], block.log_scale[i]);
            }
            Ok(())
        })
    }

    fn len(&self) -> usize {
        self.state.tokens
    }

    fn state_floats(&self) -> usize {
        self.state.parts().map(<[T]>::len).iter().sum::<usize>() + 1
    }

    fn reset(&mut self) {
        self.state.parts_mut().into_iter().for_each(|part| part.fill(T::zero()));
        self.state.log_scale = T::neg_infinity();
        self.state.tokens = 0;
    }
}
