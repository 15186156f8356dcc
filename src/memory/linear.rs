//! Linear memory: sums of feature products, of a size that does not depend on the number of tokens.

use super::decay::{Fade, Gates, LogDecay};
#[cfg(feature = "rayon")]
use super::parallel;
use crate::features::Side;
use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::loops::decay::{DecayRows, RowDecay};
use crate::kernel::loops::decode::DecodeStep;
use crate::kernel::loops::products::{Epilogue, Matrix, Product};
use crate::kernel::{self, chunk_len};
use crate::memory::Memory;
use crate::memory::answer::{Answer, Readout};
use crate::memory::partial::Partial;
use crate::{Error, FeatureMap, Scalar, check, views};
use core::ops::Range;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, ArrayViewMut3, Axis};
use std::sync::Arc;

/// Queries of a chunk whose masked scores meet the values at once.
const VALUE_BLOCK: usize = 8;

/// Chunks with fewer tokens than this are absorbed token by token.
pub(super) const FEW_TOKENS: usize = 6;

/// The most that the running maximum of the log scales may rise within tokens that share one unit,
/// in natural-log units. Larger jumps begin a new group, so that a huge later key cannot push the
/// sums of earlier queries out of range.
const GROUP_RISE: f64 = 16.0;

/// The most that the log scale of a single token may lie above that of a state whose sums decay,
/// before they are brought to it, in natural-log units: a decode step then changes sums only now
/// and then.
const STEP_RISE: f64 = 8.0;

/// Values up to this are small: as many of them as there will be, times the largest features, at
/// the largest log scale, leave sums that can be read without a denominator, up to
/// [`MOST_FEATURES`] of them and [`LARGEST_SCALE`].
const SMALL_VALUE: f64 = 1e6;

/// What 2⁴⁰ small values may sum to.
const SMALL_SUM: f64 = 1e24;

/// See [`SMALL_VALUE`].
const MOST_FEATURES: usize = 1 << 13;

/// See [`SMALL_VALUE`]; in natural-log units.
const LARGEST_SCALE: f64 = 12.0;

/// Rows of features whose maximum is above this, or below its inverse, are brought to a maximum of
/// one, so that their products stay in range.
const LARGEST_FEATURE: f64 = 1024.0;

/// The sums over every token absorbed, for a feature map φ:
///
/// ```text
/// S = Σ_j φ(k̂_j) v_jᵀ  [num_features, value_dim],    z = Σ_j φ(k̂_j)  [num_features],    x̂ = √scale·x
/// ```
///
/// kept in units of `e^{log_scale}`, the running maximum of the keys' log scales. It answers a
/// query with `φ(q̂)ᵀS / φ(q̂)ᵀz` (Katharopoulos et al., arXiv 2006.16236, equation 5).
///
/// Sums are compensated (Kahan): each carries its rounding error beside it, so that the error does
/// not grow with the number of tokens. Plain sums in `f32` would lose four digits in a million
/// tokens and stand still after some hundred million. The size is
/// `2·num_features·(value_dim + 1) + 1` numbers, whatever the number of tokens.
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
        Self {
            map: Arc::clone(&self.map),
            scale_root: self.scale_root.clone(),
            state: self.state.clone(),
        }
    }
}

/// The largest of the values that have been absorbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Size {
    /// No output can overflow.
    Small,
    /// No sum can overflow.
    Ordinary,
    /// Sums may overflow: see [`State::is_too_large`].
    Large,
}

impl Size {
    fn of(largest: f64, small: f64, ordinary: f64) -> Self {
        match largest {
            x if x <= small => Self::Small,
            x if x <= ordinary => Self::Ordinary,
            _ => Self::Large,
        }
    }
}

/// The sums and their rounding errors, in units of `e^{log_scale}`; −∞ while empty. Rows of the
/// sums are padded.
#[derive(Clone, Debug)]
pub(crate) struct State<T> {
    pub(super) value_dim: usize,
    pub(super) sums: Buffer<T>,
    pub(super) sums_low: Buffer<T>,
    pub(super) normalizer: Buffer<T>,
    pub(super) normalizer_low: Buffer<T>,
    pub(super) log_scale: T,
    /// What rounding left of the log scale when the sums decayed.
    log_scale_low: T,
    pub(super) tokens: usize,
    /// Of the values absorbed.
    pub(super) size: Size,
}

impl<T: Scalar> State<T> {
    pub(crate) fn new() -> Self {
        Self {
            value_dim: 0,
            sums: Buffer::new(),
            sums_low: Buffer::new(),
            normalizer: Buffer::new(),
            normalizer_low: Buffer::new(),
            log_scale: T::neg_infinity(),
            log_scale_low: T::zero(),
            tokens: 0,
            size: Size::Small,
        }
    }

    /// Makes it empty, for these sizes.
    pub(crate) fn reset(&mut self, features: usize, value_dim: usize) {
        self.value_dim = value_dim;
        self.sums.resize(features * padded::<T>(value_dim));
        self.sums_low.resize(features * padded::<T>(value_dim));
        self.normalizer.resize(features);
        self.normalizer_low.resize(features);
        self.parts_mut().into_iter().for_each(|part| part.fill(T::zero()));
        self.set_scale([T::neg_infinity(), T::zero()]);
        self.tokens = 0;
        self.size = Size::Small;
    }

    /// As [`Clone::clone_from`], into the memory there is.
    pub(super) fn copy_from(&mut self, other: &Self) {
        self.value_dim = other.value_dim;
        self.sums.resize(other.sums.len());
        self.sums_low.resize(other.sums_low.len());
        self.normalizer.resize(other.normalizer.len());
        self.normalizer_low.resize(other.normalizer_low.len());
        self.parts_mut()
            .into_iter()
            .zip(other.parts())
            .for_each(|(part, other)| part.copy_from_slice(other));
        self.set_scale(other.scale());
        self.tokens = other.tokens;
        self.size = other.size;
    }

    pub(super) fn features(&self) -> usize {
        self.normalizer.len()
    }

    /// Numbers between rows of the sums.
    pub(super) fn stride(&self) -> usize {
        padded::<T>(self.value_dim)
    }

    /// Every number of the sums and what pads them, in a fixed order.
    fn parts(&self) -> [&[T]; 4] {
        [&self.sums, &self.sums_low, &self.normalizer, &self.normalizer_low]
    }

    /// As [`parts`](Self::parts).
    fn parts_mut(&mut self) -> [&mut [T]; 4] {
        [&mut self.sums, &mut self.sums_low, &mut self.normalizer, &mut self.normalizer_low]
    }

    /// The four parts by rows, without padding: as many numbers as each row holds, and the rows.
    fn rows(&self) -> impl Iterator<Item = &[T]> {
        let (stride, value_dim, features) = (self.stride(), self.value_dim, self.features());
        let [sums, sums_low, normalizer, normalizer_low] = self.parts();
        let matrices = sums
            .chunks_exact(stride)
            .chain(sums_low.chunks_exact(stride))
            .map(move |row| &row[..value_dim]);
        matrices.chain([&normalizer[..features], &normalizer_low[..features]])
    }

    /// Adds `factor·delta` to the sums and `factor·features` to the normaliser.
    fn add(&mut self, factor: T, delta: &[T], features: &[T]) {
        let [sums, sums_low, normalizer, normalizer_low] = self.parts_mut();
        kernel::add_compensated(sums, sums_low, factor, delta);
        kernel::add_compensated(normalizer, normalizer_low, factor, features);
    }

    /// Whether a sum has come so near to the largest number of the type that more tokens could
    /// overflow it.
    fn is_too_large(&self) -> bool {
        let limit = T::max_value() * T::from_f64(0.5_f64.powi(24));
        self.parts()
            .into_iter()
            .any(|part| !kernel::all_finite(part) || kernel::max_abs(part) > limit)
    }

    /// Fails if the values were large and their sum has become so.
    fn check_size(&mut self, values: Size, row: usize) -> Result<(), Error> {
        self.size = self.size.max(values);
        if values == Size::Large && self.is_too_large() {
            Err(Error::Overflow { which: "the sum of values", row })
        } else {
            Ok(())
        }
    }

    /// The log scale and what rounding left of it.
    pub(super) fn scale(&self) -> [T; 2] {
        [self.log_scale, self.log_scale_low]
    }

    pub(super) fn set_scale(&mut self, [log_scale, low]: [T; 2]) {
        (self.log_scale, self.log_scale_low) = (log_scale, low);
    }

    /// Brings the sums to a unit that is at least as large.
    fn raise(&mut self, log_scale: T) {
        if log_scale > self.log_scale {
            if self.tokens > 0 {
                let factor = unit_ratio(self.scale(), log_scale);
                self.parts_mut().into_iter().for_each(|part| kernel::scale(part, factor));
            }
            self.set_scale([log_scale, T::zero()]);
        }
    }

    /// Lets the sums decay.
    fn fade(&mut self, fade: &Fade<T>) {
        self.set_scale(decayed(self.scale(), fade.slowest));
        if let Some(fade) = fade.of_features() {
            for (sum, low) in [
                (&mut self.sums, &mut self.sums_low),
                (&mut self.normalizer, &mut self.normalizer_low),
            ] {
                DecayRows { decay: fade, factors: &[], x: &[], sum, low }.run();
            }
        }
    }

    /// Adds the tokens of a group, whose keys are in `unit`.
    fn absorb_group(&mut self, group: &Chunk<T>, unit: T, key_sums: &[T]) {
        self.raise(unit);
        let (features, stride) = (self.features(), self.stride());
        Product {
            m: features,
            n: stride,
            k: group.tokens,
            a: Matrix::rows(&group.keys, group.width),
            b: &group.values,
            ldb: stride,
            c: &mut self.sums,
            ldc: stride,
            into: Epilogue::Compensated(&mut self.sums_low),
        }
        .run();
        kernel::add_compensated(&mut self.normalizer, &mut self.normalizer_low, T::one(), key_sums);
        self.tokens += group.tokens;
    }

    /// The log scale to which the decay of a single token takes the sums.
    fn scale_before(&self, token: &Chunk<T>, gates: &mut Gates<T>) -> [T; 2] {
        if gates.width == 0 {
            return self.scale();
        }
        gates.fade_one(&token.queries);
        decayed(self.scale(), gates.fade.slowest)
    }

    /// The unit for a state and a token, after the sums have decayed to `scale`.
    fn unit_with(scale: [T; 2], token: &Chunk<T>, gates: &Gates<T>) -> T {
        // sums of large values leave no room
        let exact = gates.width == 0 || token.values_size == Size::Large;
        let rise = if exact { T::zero() } else { T::from_f64(STEP_RISE) };
        if token.key_scale[0] <= scale[0] + rise { scale[0] } else { token.key_scale[0] }
    }

    /// Adds a single token, after its features have faded where they differ in that; its own are
    /// overwritten.
    fn absorb_token(
        &mut self,
        token: &mut Chunk<T>,
        gates: &Gates<T>,
        fade: Option<RowDecay<'_, T>>,
    ) {
        self.raise(Self::unit_with(self.scale(), token, gates));
        let factor = unit_ratio([token.key_scale[0], -self.log_scale_low], self.log_scale);
        let keys = &mut token.keys[..self.normalizer.len()];
        if factor != T::one() {
            kernel::scale(keys, factor);
        }
        let (sums, sums_low) = (&mut self.sums, &mut self.sums_low);
        let (normalizer, normalizer_low) = (&mut self.normalizer, &mut self.normalizer_low);
        if let Some(fade) = fade {
            DecayRows { decay: fade, factors: keys, x: &token.values, sum: sums, low: sums_low }
                .run();
            let one = &[T::one()];
            DecayRows { decay: fade, factors: keys, x: one, sum: normalizer, low: normalizer_low }
                .run();
        } else {
            kernel::add_outer(sums, sums_low, keys, &token.values);
            kernel::add_compensated(normalizer, normalizer_low, T::one(), keys);
        }
        self.tokens += 1;
    }

    /// Answers a single token and adds it, in one pass over the sums, if that can neither fail
    /// half-way nor needs another unit: `false` says that nothing was done.
    fn read_and_absorb_token(
        &mut self,
        token: &mut Chunk<T>,
        gates: &Gates<T>,
        readout: Readout,
        answer: &mut Answer<T>,
    ) -> bool {
        let unit = Self::unit_with(self.scale(), token, gates);
        if self.tokens == 0 || unit != self.log_scale {
            return false;
        }
        let features = self.features();
        let size = self.size.max(token.values_size);
        let log_scale = token.query_scale[0] + self.log_scale;
        let (safe, least) = match readout {
            // with such a denominator the quotient of any sums of ordinary values stays in range
            Readout::Normalized => (size < Size::Large, T::from_f64(1.0 / LARGEST_FEATURE)),
            Readout::Unnormalized => {
                let in_range = features <= MOST_FEATURES && log_scale <= T::from_f64(LARGEST_SCALE);
                (size == Size::Small && in_range, T::neg_infinity())
            }
        };
        if !safe {
            return false;
        }
        answer.resize(1, 1, self.stride());
        let denominator = DecodeStep {
            factor: unit_ratio([token.key_scale[0], -self.log_scale_low], self.log_scale),
            least,
            q: &token.queries[..features],
            decay: gates.of_features().map(|fade| (&*gates.query, fade)),
            k: &mut token.keys[..features],
            v: &token.values,
            z: &mut self.normalizer,
            z_low: &mut self.normalizer_low,
            sum: &mut self.sums,
            low: &mut self.sums_low,
            answer: &mut answer.numerator,
        }
        .run();
        if !(denominator.is_finite() && denominator >= least) {
            return false;
        }
        answer.denominator[0] = denominator;
        answer.log_scale[0] = log_scale;
        self.size = size;
        self.tokens += 1;
        true
    }

    /// Answers a single token from itself and the state, whose sums have decayed to `scale`; where
    /// features differ in that, so has `faded`, the query of the sums.
    fn read_token(
        &self,
        token: &Chunk<T>,
        scale: [T; 2],
        gates: &Gates<T>,
        faded: Option<&[T]>,
        answer: &mut Answer<T>,
    ) {
        let features = self.features();
        let (query, key) = (&token.queries[..features], &token.keys[..features]);
        let unit = Self::unit_with(scale, token, gates);
        // relative to the sums, whose log scale has digits that the unit lacks
        let low = if unit == scale[0] { scale[1] } else { T::zero() };
        let own = unit_ratio([token.key_scale[0], -low], unit) * kernel::dot(query, key);
        let old = if unit == scale[0] { T::one() } else { unit_ratio(scale, unit) };
        let query = faded.unwrap_or(query);
        answer.resize(1, 1, self.stride());
        answer.denominator[0] = own + old * kernel::dot(query, &self.normalizer);
        if old == T::one() {
            kernel::read_sums(own, [query, &token.values, &self.sums], &mut answer.numerator);
        } else {
            kernel::row_times_matrix(query, &self.sums, self.stride(), &mut answer.numerator);
            kernel::scale(&mut answer.numerator, old);
            kernel::add_scaled(&mut answer.numerator, own, &token.values);
        }
        answer.log_scale[0] = token.query_scale[0] + unit;
    }

    /// Answers the queries of a group, in `unit`, which its keys are brought to: block by block,
    /// masked scores give the part of the group itself and the state the rest. Returns whether
    /// every normaliser can be divided by.
    fn read_group(
        &self,
        group: &Chunk<T>,
        unit: T,
        scores: &mut Buffer<T>,
        answer: &mut Answer<T>,
    ) -> bool {
        let features = self.features();
        answer.resize(group.tokens, group.width, self.stride());
        if self.tokens == 0 {
            answer.denominator.fill(T::zero());
        } else {
            self.read_state(group, unit, answer);
        }
        group.answer_itself(features, self.value_dim, self.tokens > 0, unit, scores, answer)
    }

    /// Answers all queries of a chunk from the state alone.
    fn read_state(&self, group: &Chunk<T>, unit: T, answer: &mut Answer<T>) {
        let (features, stride) = (self.features(), self.stride());
        Product {
            m: group.tokens,
            n: stride,
            k: features,
            a: Matrix::columns(&group.queries, group.width),
            b: &self.sums,
            ldb: stride,
            c: &mut answer.numerator,
            ldc: stride,
            into: Epilogue::Set,
        }
        .run();
        kernel::row_times_matrix(
            &self.normalizer,
            &group.queries,
            group.width,
            &mut answer.denominator,
        );
        let old = unit_ratio(self.scale(), unit);
        if old != T::one() {
            kernel::scale(&mut answer.numerator, old);
            kernel::scale(&mut answer.denominator, old);
        }
    }
}

/// `e^{scale − unit}` of a log scale in two parts.
pub(super) fn unit_ratio<T: Scalar>([log_scale, low]: [T; 2], unit: T) -> T {
    if low == T::zero() {
        return exp_difference(log_scale, unit);
    }
    T::from_f64(libm::exp((log_scale.as_f64() - unit.as_f64()) + low.as_f64()))
}

/// A log scale in two parts, and what is added to it.
pub(super) fn decayed<T: Scalar>([log_scale, low]: [T; 2], log_decay: T) -> [T; 2] {
    let sum = log_scale + log_decay;
    if sum == T::neg_infinity() {
        return [sum, T::zero()];
    }
    // what was lost of either (Knuth's two-sum)
    let of_decay = sum - log_scale;
    let low = low + (log_scale - (sum - of_decay)) + (log_decay - of_decay);
    let whole = sum + low;
    [whole, low - (whole - sum)]
}

/// `e^{a − b}` for a ≤ b.
fn exp_difference<T: Scalar>(a: T, b: T) -> T {
    if a == b { T::one() } else { (a - b).exp() }
}

/// Tokens, mapped, as columns: features `[num_features, width]` in units of their log scales;
/// values `[tokens, value_dim]` with padded rows. A single token has width 1.
#[derive(Debug)]
pub(crate) struct Chunk<T> {
    pub(super) tokens: usize,
    pub(super) width: usize,
    pub(super) queries: Buffer<T>,
    pub(super) query_scale: Buffer<T>,
    pub(super) keys: Buffer<T>,
    pub(super) key_scale: Buffer<T>,
    pub(super) values: Buffer<T>,
    pub(super) values_size: Size,
    /// The log decays before the first token and from there to the last, if the scales have been
    /// shifted by them.
    #[cfg(feature = "rayon")]
    pub(super) faded: Option<[T; 2]>,
}

impl<T: Scalar> Chunk<T> {
    pub(super) fn new() -> Self {
        Self {
            tokens: 0,
            width: 0,
            queries: Buffer::new(),
            query_scale: Buffer::new(),
            keys: Buffer::new(),
            key_scale: Buffer::new(),
            values: Buffer::new(),
            values_size: Size::Small,
            #[cfg(feature = "rayon")]
            faded: None,
        }
    }

    pub(super) fn resize(&mut self, tokens: usize, features: usize, value_dim: usize) {
        self.tokens = tokens;
        self.width = if tokens == 1 { 1 } else { padded::<T>(tokens) };
        self.queries.resize(padded::<T>(features) * self.width);
        self.keys.resize(padded::<T>(features) * self.width);
        self.query_scale.resize(self.width);
        self.key_scale.resize(self.width);
        self.values.resize(tokens * padded::<T>(value_dim));
    }

    /// The longest run of tokens from `start` whose running maximum stays within [`GROUP_RISE`] of
    /// where it begins, and the maximum it reaches: their common unit.
    pub(super) fn group(&self, start: usize, log_scale: T) -> (usize, T) {
        let lowest = log_scale.max(self.key_scale[start]);
        let limit = lowest + T::from_f64(GROUP_RISE);
        let largest = kernel::max(&self.key_scale[start..self.tokens]);
        if largest <= limit {
            return (self.tokens, lowest.max(largest));
        }
        let mut unit = lowest;
        let mut stop = start;
        while stop < self.tokens && self.key_scale[stop] <= limit {
            unit = unit.max(self.key_scale[stop]);
            stop += 1;
        }
        (stop, unit)
    }

    /// As [`group`](Self::group), of sums that decay: scales count as seen from the first token,
    /// and features must stay in range.
    fn group_that_fades(&self, start: usize, log_scale: T, gates: &Gates<T>) -> (usize, T) {
        let last = gates.last(start, self.tokens);
        let one = gates.width == 1;
        let mut unit = log_scale.max(self.key_scale[start]);
        let limit = unit + T::from_f64(GROUP_RISE);
        let mut stop = start + 1;
        while stop < last {
            let scale = self.key_scale[stop] - if one { gates.since(stop)[0] } else { T::zero() };
            if scale > limit {
                break;
            }
            unit = unit.max(scale);
            stop += 1;
        }
        (stop, unit)
    }

    /// Copies and checks values; the padding is zero.
    pub(super) fn set_values(&mut self, v: ArrayView2<'_, T>) -> Result<(), Error> {
        let stride = padded::<T>(v.ncols());
        let largest = match v.to_slice() {
            Some(v) if v.len() == self.values.len() => {
                kernel::copy_and_measure(v, &mut self.values)
            }
            _ => {
                let (mut largest, mut mark) = (T::zero(), T::zero());
                for (row, copy) in v.outer_iter().zip(self.values.chunks_exact_mut(stride)) {
                    let (values, padding) = copy.split_at_mut(row.len());
                    padding.fill(T::zero());
                    for (copy, &value) in values.iter_mut().zip(row) {
                        *copy = value;
                        largest = largest.max(value.abs());
                        mark += value * T::zero();
                    }
                }
                largest + mark
            }
        };
        self.values_size = Size::of(largest.as_f64(), SMALL_VALUE, T::SAFE_VALUE);
        if largest.is_finite() { Ok(()) } else { check::finite("v", v) }
    }

    /// Takes tokens out of another chunk.
    fn copy_tokens(
        &mut self,
        from: &Self,
        tokens: Range<usize>,
        features: usize,
        value_dim: usize,
    ) {
        self.resize(tokens.len(), features, value_dim);
        for (to, from_features) in
            [(&mut self.queries, &from.queries), (&mut self.keys, &from.keys)]
        {
            for (to, row) in to
                .chunks_exact_mut(self.width)
                .zip(from_features.chunks_exact(from.width))
                .take(features)
            {
                to.fill(T::zero());
                to[..tokens.len()].copy_from_slice(&row[tokens.clone()]);
            }
        }
        self.query_scale[..tokens.len()].copy_from_slice(&from.query_scale[tokens.clone()]);
        self.key_scale[..tokens.len()].copy_from_slice(&from.key_scale[tokens.clone()]);
        let stride = padded::<T>(value_dim);
        self.values.copy_from_slice(&from.values[tokens.start * stride..tokens.end * stride]);
        self.values_size = from.values_size;
    }

    /// Answers the queries from the keys and values of this chunk that each sees, the keys in
    /// `unit`; sets the numerators or adds to them, adds to the denominators. Returns whether every
    /// normaliser can be divided by.
    pub(super) fn answer_itself(
        &self,
        features: usize,
        value_dim: usize,
        add: bool,
        unit: T,
        scores: &mut Buffer<T>,
        answer: &mut Answer<T>,
    ) -> bool {
        let (tokens, width, stride) = (self.tokens, self.width, padded::<T>(value_dim));
        scores.resize(width * width);
        // what lies above the diagonal of a block is wasted work
        for first in (0..tokens).step_by(T::PAD) {
            let last = tokens.min(first + T::PAD);
            Product {
                m: last - first,
                n: width - first,
                k: features,
                a: Matrix::columns(&self.keys[first..], width),
                b: &self.queries[first..],
                ldb: width,
                c: &mut scores[first * width + first..],
                ldc: width,
                into: Epilogue::Set,
            }
            .run();
            kernel::mask_and_add_rows(
                &mut scores[first * width..last * width],
                first,
                &mut answer.denominator,
            );
        }
        for first in (0..tokens).step_by(VALUE_BLOCK) {
            let last = tokens.min(first + VALUE_BLOCK);
            Product {
                m: last - first,
                n: stride,
                k: last,
                a: Matrix::columns(&scores[first..], width),
                b: &self.values,
                ldb: stride,
                c: &mut answer.numerator[first * stride..],
                ldc: stride,
                into: if add { Epilogue::Add } else { Epilogue::Set },
            }
            .run();
        }
        answer.set_scales(&self.query_scale, unit)
    }

    /// Brings the keys from their own log scales to one unit, and sums the features of each.
    fn bring_keys_to(
        &mut self,
        unit: T,
        features: usize,
        factors: &mut Buffer<T>,
        key_sums: &mut Buffer<T>,
    ) {
        key_factors(&self.key_scale, unit, self.tokens, factors);
        key_sums.resize(features);
        kernel::scale_and_sum_rows(&mut self.keys[..features * self.width], factors, key_sums);
    }
}

/// What brings each key from its log scale to `unit`; 0 beyond the tokens.
pub(super) fn key_factors<T: Scalar>(
    key_scale: &[T],
    unit: T,
    tokens: usize,
    factors: &mut Buffer<T>,
) {
    let log2_e = T::from_f64(core::f64::consts::LOG2_E);
    factors.resize(key_scale.len());
    for (factor, &scale) in factors.iter_mut().zip(key_scale) {
        *factor = (scale - unit) * log2_e;
    }
    factors[tokens..].fill(T::neg_infinity());
    kernel::exp2_slice(factors, T::zero());
}

/// Scratch of one chunk. It grows to the largest chunk it has met and holds nothing between calls.
#[derive(Debug)]
pub(crate) struct Workspace<T> {
    x: Buffer<T>,
    x_key: Buffer<T>,
    squares: Buffer<T>,
    map: [Buffer<T>; 2],
    /// For maps that take tokens as rows.
    rows: [Array2<T>; 2],
    pub(super) chunk: Chunk<T>,
    gates: Gates<T>,
    /// A part of a chunk.
    part: Chunk<T>,
    pub(super) scores: Buffer<T>,
    pub(super) factors: Buffer<T>,
    pub(super) key_sums: Buffer<T>,
    pub(super) answer: Answer<T>,
    before: State<T>,
    /// The state before a group of query heads.
    group: State<T>,
    /// Whether long sequences may be shared out over threads, and the memory for that.
    #[cfg(feature = "rayon")]
    pub(crate) parallel: bool,
    #[cfg(feature = "rayon")]
    lanes: Box<parallel::Lanes<T>>,
}

impl<T: Scalar> Workspace<T> {
    pub(crate) fn new() -> Self {
        Self {
            x: Buffer::new(),
            x_key: Buffer::new(),
            squares: Buffer::new(),
            map: [Buffer::new(), Buffer::new()],
            rows: [Array2::zeros((0, 0)), Array2::zeros((0, 0))],
            chunk: Chunk::new(),
            gates: Gates::new(),
            part: Chunk::new(),
            scores: Buffer::new(),
            factors: Buffer::new(),
            key_sums: Buffer::new(),
            answer: Answer::new(),
            before: State::new(),
            group: State::new(),
            #[cfg(feature = "rayon")]
            parallel: true,
            #[cfg(feature = "rayon")]
            lanes: Box::default(),
        }
    }

    /// Empty scratch for a copy of a stream.
    #[cfg_attr(not(feature = "rayon"), allow(clippy::unused_self))]
    pub(crate) fn like(&self) -> Self {
        Self {
            #[cfg(feature = "rayon")]
            parallel: self.parallel,
            ..Self::new()
        }
    }

    /// Shifts the scales of the chunk by the decay of its tokens, the same for all features.
    #[cfg(feature = "rayon")]
    pub(super) fn fade_chunk(&mut self, features: usize) {
        let Self { chunk, gates, .. } = self;
        chunk.faded = None;
        if gates.width == 1 {
            gates.sum_from(0, false);
            gates.fade_group(chunk, features, 0..chunk.tokens);
            chunk.faded = Some([gates.row(0)[0], gates.since(chunk.tokens - 1)[0]]);
        }
    }

    /// Leaves the threads to others.
    #[cfg_attr(
        not(feature = "rayon"),
        allow(clippy::unused_self, clippy::needless_pass_by_ref_mut)
    )]
    pub(crate) fn stay_on_one_thread(&mut self) {
        #[cfg(feature = "rayon")]
        {
            self.parallel = false;
        }
    }
}

/// A state to return to, if there is one.
#[derive(Debug)]
pub(crate) struct Checkpoint<T> {
    state: State<T>,
    valid: bool,
}

impl<T: Scalar> Checkpoint<T> {
    pub(crate) fn new() -> Self {
        Self { state: State::new(), valid: false }
    }

    pub(crate) fn clear(&mut self) {
        self.valid = false;
    }
}

fn too_large(row: usize) -> Error {
    Error::Overflow { which: "the size of the vector", row }
}

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

/// Linear attention by a map; the sums are elsewhere.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Engine<'a, T> {
    map: &'a dyn FeatureMap<T>,
    scale_root: T,
    decay: Option<&'a LogDecay<T>>,
}

impl<'a, T: Scalar> Engine<'a, T> {
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
        Ok(Self { map, scale_root: T::from_f64(scale.sqrt()), decay: None })
    }

    /// The same, of sums that decay.
    pub(crate) fn with_decay(self, decay: Option<&'a LogDecay<T>>) -> Self {
        Self { decay, ..self }
    }

    pub(crate) fn num_features(&self) -> usize {
        self.map.num_features()
    }

    /// Causal attention of new tokens: each query sees the tokens absorbed before and the new ones
    /// up to its own. The shapes have been checked. On an error with several tokens the state is
    /// left half-way.
    pub(crate) fn extend(
        &self,
        state: &mut State<T>,
        tokens: Tokens<'_, T>,
        mut out: ArrayViewMut2<'_, T>,
        readout: Readout,
        work: &mut Workspace<T>,
        keep: bool,
    ) -> Result<(), Error> {
        let n = tokens.q.nrows();
        #[cfg(feature = "rayon")]
        if work.parallel
            && parallel::pays(n)
            && self.decay.is_none_or(|decay| decay.is_common(tokens.log_decay))
        {
            return parallel::inside(|| {
                self.extend_blocks(state, tokens, out, readout, work, keep)
            });
        }
        self.extend_in_order(state, tokens, &mut out, readout, work, 0..n, keep)
    }

    /// The output of a token as if it had been absorbed; the state stays as it is.
    fn peek(
        &self,
        state: &State<T>,
        tokens: Tokens<'_, T>,
        out: ArrayViewMut2<'_, T>,
        readout: Readout,
        work: &mut Workspace<T>,
    ) -> Result<(), Error> {
        self.map_tokens(tokens, work, 0)?;
        let Workspace { chunk, gates, answer, .. } = work;
        let scale = state.scale_before(chunk, gates);
        state.read_token(chunk, scale, gates, gates.of_features().map(|_| &*gates.query), answer);
        answer.write(0, readout, out)
    }

    /// Takes tokens of a chunk in: maps queries and keys, copies values and log decays.
    pub(super) fn map_tokens(
        &self,
        tokens: Tokens<'_, T>,
        work: &mut Workspace<T>,
        first_row: usize,
    ) -> Result<(), Error> {
        let Tokens { q, k, v, log_decay } = tokens;
        work.chunk.resize(q.nrows(), self.num_features(), v.ncols());
        if q.nrows() == 1 {
            self.map_one(q, k, work, first_row)?;
        } else {
            self.map(Side::Query, q, work, first_row)?;
            self.map(Side::Key, k, work, first_row)?;
        }
        work.chunk.set_values(v).map_err(|error| error.in_chunk(first_row))?;
        work.gates.set(self.decay, log_decay, q.nrows(), first_row)
    }

    /// As [`extend`](Self::extend), on several threads.
    #[cfg(feature = "rayon")]
    fn extend_blocks(
        &self,
        state: &mut State<T>,
        tokens: Tokens<'_, T>,
        mut out: ArrayViewMut2<'_, T>,
        readout: Readout,
        work: &mut Workspace<T>,
        keep: bool,
    ) -> Result<(), Error> {
        let mut lanes = core::mem::take(&mut work.lanes);
        let done = parallel::extend(
            *self,
            state,
            tokens,
            &mut out,
            readout,
            &mut lanes,
            |state, out, range| {
                self.extend_in_order(state, tokens, out, readout, work, range, true)
            },
        );
        work.lanes = lanes;
        self.extend_in_order(state, tokens, &mut out, readout, work, done?..tokens.q.nrows(), keep)
    }

    /// As [`extend`](Self::extend), some of the tokens, chunk after chunk.
    #[allow(clippy::too_many_arguments)]
    fn extend_in_order(
        &self,
        state: &mut State<T>,
        tokens: Tokens<'_, T>,
        out: &mut ArrayViewMut2<'_, T>,
        readout: Readout,
        work: &mut Workspace<T>,
        all: Range<usize>,
        keep: bool,
    ) -> Result<(), Error> {
        for start in all.clone().step_by(chunk_len::<T>()) {
            let range = start..all.end.min(start + chunk_len::<T>());
            let last = range.end == all.end;
            self.map_tokens(tokens.rows(range.clone()), work, start)?;
            let out = views::rows_mut(out.view_mut(), range);
            self.extend_chunk(state, out, readout, work, start, keep || !last)?;
        }
        Ok(())
    }

    /// Maps the rows of `√scale·x` to features, each finite and of a size near one.
    pub(super) fn map(
        &self,
        side: Side,
        x: ArrayView2<'_, T>,
        work: &mut Workspace<T>,
        first_row: usize,
    ) -> Result<(), Error> {
        let width = work.chunk.width;
        if width == 1 {
            self.scale_one(side, x, &mut work.x, first_row)?;
        } else {
            work.x.resize(self.map.head_dim() * width);
            work.squares.resize(width);
            views::to_columns(x, self.scale_root, &mut work.squares, &mut work.x);
            if !kernel::all_finite(&work.squares) {
                check::finite(side.name(), x).map_err(|error| error.in_chunk(first_row))?;
                let scaled = |t: usize| work.x[t..].iter().step_by(width).all(|x| x.is_finite());
                if let Some(t) = (0..x.nrows()).find(|&t| !scaled(t)) {
                    return Err(too_large(first_row + t));
                }
            }
        }
        self.map_again(side, work).map_err(|error| error.in_chunk(first_row))
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
        work: &mut Workspace<T>,
        row: usize,
    ) -> Result<(), Error> {
        let Some(map) = self.map.column_map() else {
            self.map(Side::Query, q, work, row)?;
            return self.map(Side::Key, k, work, row);
        };
        let Workspace { x, x_key, map: scratch, chunk, .. } = work;
        self.scale_one(Side::Query, q, x, row)?;
        self.scale_one(Side::Key, k, x_key, row)?;
        let values: [&mut [T]; 2] = [&mut chunk.queries, &mut chunk.keys];
        map.map_pair([x, x_key], values, [&mut chunk.query_scale, &mut chunk.key_scale], scratch)
            .map_err(|error| error.in_chunk(row))
    }

    /// Maps the vectors that are in the scratch.
    fn map_again(&self, side: Side, work: &mut Workspace<T>) -> Result<(), Error> {
        let Workspace { x, squares, map: scratch, rows, chunk, .. } = work;
        let (tokens, width) = (chunk.tokens, chunk.width);
        let (values, log_scale) = match side {
            Side::Query => (&mut chunk.queries, &mut chunk.query_scale),
            Side::Key => (&mut chunk.keys, &mut chunk.key_scale),
        };
        if let Some(map) = self.map.column_map() {
            return map.map_columns(x, squares, width, tokens, values, log_scale, scratch);
        }
        self.map_rows(side, x, width, tokens, values, log_scale, rows)
    }

    /// Maps through a map that takes tokens as rows.
    #[allow(clippy::too_many_arguments)]
    fn map_rows(
        &self,
        side: Side,
        x: &[T],
        width: usize,
        tokens: usize,
        values: &mut [T],
        log_scale: &mut [T],
        rows: &mut [Array2<T>; 2],
    ) -> Result<(), Error> {
        let (d, m) = (self.map.head_dim(), self.map.num_features());
        let [vectors, features] = rows;
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
            if largest > limit || (largest > T::zero() && largest < limit.recip()) {
                kernel::scale(features, largest.recip());
                log_scale[t] += largest.ln();
            }
            values[t..]
                .iter_mut()
                .step_by(width)
                .zip(&*features)
                .for_each(|(to, &feature)| *to = feature);
        }
        Ok(())
    }

    /// One chunk, already mapped: in groups of tokens whose log scales rise little, or token by
    /// token. `keep` says whether the state will be needed afterwards.
    fn extend_chunk(
        &self,
        state: &mut State<T>,
        mut out: ArrayViewMut2<'_, T>,
        readout: Readout,
        work: &mut Workspace<T>,
        first_row: usize,
        keep: bool,
    ) -> Result<(), Error> {
        let (n, features, value_dim) = (out.nrows(), self.num_features(), out.ncols());
        if n == 1 {
            let Workspace { chunk, gates, answer, before, .. } = work;
            let old_scale = state.scale();
            let scale = state.scale_before(chunk, gates);
            state.set_scale(scale);
            if state.read_and_absorb_token(chunk, gates, readout, answer) {
                return answer.write(first_row, readout, out);
            }
            let fade = gates.of_features();
            state.read_token(chunk, scale, gates, fade.map(|_| &*gates.query), answer);
            if let Err(error) = answer.write(first_row, readout, out) {
                state.set_scale(old_scale);
                return Err(error);
            }
            if chunk.values_size == Size::Large && first_row == 0 {
                before.copy_from(state);
                before.set_scale(old_scale);
            }
            state.absorb_token(chunk, gates, fade);
            let result = state.check_size(chunk.values_size, first_row);
            if result.is_err() && first_row == 0 {
                state.copy_from(before);
            }
            return result;
        }
        let mut start = 0;
        let mut one_by_one_until = 0;
        while start < n {
            let decays = work.gates.width;
            // the decay before a group is that of its sums, or if there is little that of its
            // features
            let mild = work.gates.is_mild(start);
            let (mut end, unit) = if decays == 0 {
                work.chunk.group(start, state.log_scale)
            } else {
                if !mild {
                    state.fade(work.gates.fade_before(start));
                }
                work.gates.sum_from(start, mild);
                work.chunk.group_that_fades(start, state.log_scale, &work.gates)
            };
            let mut grouped = end - start >= FEW_TOKENS && start >= one_by_one_until;
            // features that fade differently do so in a copy
            let whole = start == 0 && end == n && decays <= 1;
            if grouped {
                if !whole {
                    work.part.copy_tokens(&work.chunk, start..end, features, value_dim);
                }
                let Workspace { chunk, part, gates, scores, factors, key_sums, answer, .. } = work;
                let group = if whole { chunk } else { part };
                if decays > 0 {
                    gates.fade_group(group, features, start..end);
                }
                group.bring_keys_to(unit, features, factors, key_sums);
                if !state.read_group(group, unit, scores, answer) && readout == Readout::Normalized
                {
                    // The unit of the group, set by its largest key, may be too large for an early
                    // query.
                    one_by_one_until = end;
                    grouped = false;
                    if whole {
                        if decays > 0 {
                            work.gates.restore_query_scales(&mut work.chunk);
                        }
                        self.map_again(Side::Key, work)
                            .map_err(|error| error.in_chunk(first_row))?;
                    }
                }
            }
            let Workspace { chunk, part, gates, key_sums, answer, .. } = work;
            if !grouped {
                end = start + 1;
                part.copy_tokens(chunk, start..end, features, value_dim);
                if mild {
                    state.fade(gates.fade_before(start));
                }
                state.read_token(part, state.scale(), gates, None, answer);
            }
            answer.write(
                first_row + start,
                readout,
                views::rows_mut(out.view_mut(), start..end),
            )?;
            if !grouped {
                state.absorb_token(part, gates, None);
            } else if keep || end < n {
                let group = if whole { chunk } else { part };
                if decays > 1 {
                    state.fade(gates.fade_since(end - 1));
                    gates.bring_keys_to_end(group, key_sums);
                }
                state.absorb_group(group, unit, key_sums);
                if decays == 1 {
                    state.fade(gates.fade_since(end - 1));
                }
            }
            state.check_size(work.chunk.values_size, first_row + start)?;
            start = end;
        }
        Ok(())
    }

    /// Absorbs keys and values, of checked shapes, without reading. On an error the state is left
    /// half-way.
    pub(crate) fn absorb(
        &self,
        state: &mut State<T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        work: &mut Workspace<T>,
    ) -> Result<(), Error> {
        let n = k.nrows();
        #[cfg(feature = "rayon")]
        if work.parallel && parallel::pays(n) {
            let mut start = 0;
            while let Some(range) = parallel::block::<T>(start, n) {
                let part = |x| views::rows(x, range.clone());
                match parallel::absorb_only(*self, state, part(k), part(v), &mut work.lanes) {
                    Some(result) => result.map_err(|error| error.in_chunk(start))?,
                    None => self.absorb_in_order(state, k, v, work, range.clone())?,
                }
                start = range.end;
            }
            return self.absorb_in_order(state, k, v, work, start..n);
        }
        self.absorb_in_order(state, k, v, work, 0..n)
    }

    /// As [`absorb`](Self::absorb), some of the tokens, chunk after chunk.
    fn absorb_in_order(
        &self,
        state: &mut State<T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        work: &mut Workspace<T>,
        tokens: Range<usize>,
    ) -> Result<(), Error> {
        for start in tokens.clone().step_by(chunk_len::<T>()) {
            let range = start..tokens.end.min(start + chunk_len::<T>());
            let (k, v) = (views::rows(k, range.clone()), views::rows(v, range));
            work.chunk.resize(k.nrows(), self.num_features(), v.ncols());
            self.map(Side::Key, k, work, start)?;
            work.chunk.set_values(v).map_err(|error| error.in_chunk(start))?;
            let Workspace { chunk, gates, factors, key_sums, .. } = work;
            if chunk.tokens == 1 {
                gates.width = 0;
                state.absorb_token(chunk, gates, None);
            } else {
                let unit = chunk.key_scale[..chunk.tokens]
                    .iter()
                    .fold(state.log_scale, |m, &scale| m.max(scale));
                chunk.bring_keys_to(unit, self.num_features(), factors, key_sums);
                state.absorb_group(chunk, unit, key_sums);
            }
            state.check_size(chunk.values_size, start)?;
        }
        Ok(())
    }

    /// Answers queries of a checked shape chunk by chunk; `each` is given the first row of the
    /// chunk and its answer.
    pub(crate) fn read(
        &self,
        state: &State<T>,
        q: ArrayView2<'_, T>,
        work: &mut Workspace<T>,
        mut each: impl FnMut(usize, &mut Answer<T>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let n = q.nrows();
        for start in (0..n).step_by(chunk_len::<T>()) {
            let q = views::rows(q, start..n.min(start + chunk_len::<T>()));
            work.chunk.resize(q.nrows(), self.num_features(), state.value_dim);
            self.map(Side::Query, q, work, start)?;
            let Workspace { chunk, answer, .. } = work;
            answer.resize(chunk.tokens, chunk.width, state.stride());
            if chunk.width == 1 {
                let query = &chunk.queries[..state.features()];
                kernel::row_times_matrix(query, &state.sums, state.stride(), &mut answer.numerator);
                answer.denominator[0] = kernel::dot(query, &state.normalizer);
            } else {
                state.read_state(chunk, state.log_scale, answer);
            }
            answer.set_scales(&chunk.query_scale, state.log_scale);
            each(start, answer)?;
        }
        Ok(())
    }

    /// Attention of every query to every key.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn full(
        &self,
        state: &mut State<T>,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        #[cfg_attr(not(feature = "rayon"), allow(unused_mut))] mut out: ArrayViewMut2<'_, T>,
        readout: Readout,
        work: &mut Workspace<T>,
    ) -> Result<(), Error> {
        self.absorb(state, k, v, work)?;
        let start = 0;
        #[cfg(feature = "rayon")]
        let start = if work.parallel && parallel::pays(q.nrows()) {
            let mut start = 0;
            while let Some(range) = parallel::block::<T>(start, q.nrows()) {
                let mut out = views::rows_mut(out.view_mut(), range.clone());
                parallel::read(
                    *self,
                    state,
                    views::rows(q, range.clone()),
                    &mut out,
                    readout,
                    &mut work.lanes,
                )
                .map_err(|error| error.in_chunk(start))?;
                start = range.end;
            }
            start
        } else {
            start
        };
        let q = views::rows(q, start..q.nrows());
        let mut out = views::rows_mut(out, start..start + q.nrows());
        self.read(state, q, work, |first, answer| {
            let rows = first..first + answer.tokens;
            answer.write(first, readout, views::rows_mut(out.view_mut(), rows))
        })
        .map_err(|error| error.in_chunk(start))
    }

    /// `ln φ(√scale·q_i)·φ(√scale·k_j)` of every pair of checked rows.
    pub(crate) fn log_weights(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
    ) -> Result<Array2<f64>, Error> {
        let mut work = Workspace::new();
        let mut out = Array2::zeros((q.nrows(), k.nrows()));
        let m = self.num_features();
        let feature = |x: &[T], width: usize, t: usize| -> Vec<T> {
            x[t..].iter().step_by(width).take(m).copied().collect()
        };
        for start in (0..k.nrows()).step_by(chunk_len::<T>()) {
            let k = views::rows(k, start..k.nrows().min(start + chunk_len::<T>()));
            work.chunk.resize(k.nrows(), m, 1);
            self.map(Side::Key, k, &mut work, start)?;
            let keys: Vec<Vec<T>> =
                (0..k.nrows()).map(|j| feature(&work.chunk.keys, work.chunk.width, j)).collect();
            let key_scale = work.chunk.key_scale.to_vec();
            for first in (0..q.nrows()).step_by(chunk_len::<T>()) {
                let q = views::rows(q, first..q.nrows().min(first + chunk_len::<T>()));
                work.chunk.resize(q.nrows(), m, 1);
                self.map(Side::Query, q, &mut work, first)?;
                for i in 0..q.nrows() {
                    let query = feature(&work.chunk.queries, work.chunk.width, i);
                    for (j, key) in keys.iter().enumerate() {
                        let product = kernel::dot(&query, key).as_f64();
                        let scale = work.chunk.query_scale[i].as_f64() + key_scale[j].as_f64();
                        out[[first + i, start + j]] =
                            if product > 0.0 { product.ln() + scale } else { f64::NEG_INFINITY };
                    }
                }
            }
        }
        Ok(out)
    }
}

impl<T: Scalar, F: FeatureMap<T>> LinearMemory<T, F> {
    /// An empty memory.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `value_dim` is 0 or the map has no features, [`Error::InvalidOption`]
    /// if `scale` is not positive and finite.
    pub fn new(map: Arc<F>, value_dim: usize, scale: f64) -> Result<Self, Error> {
        let scale_root = Engine::new(&*map, value_dim, scale)?.scale_root;
        let mut state = State::new();
        state.reset(map.num_features(), value_dim);
        Ok(Self { map, scale_root, state })
    }

    /// Tokens absorbed so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.state.tokens
    }

    /// Whether no token has been absorbed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.state.tokens == 0
    }

    /// Forgets every token.
    pub fn reset(&mut self) {
        self.forget();
    }

    /// Adds the sums of other tokens, taken with the same map and scale: exact, in any order. That
    /// the maps are the same is for the caller to see to; of them only the number of features is
    /// compared.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the number of features or values differs, [`Error::InvalidOption`] if
    /// the scales do, [`Error::Overflow`] if a sum becomes too large. This memory is then
    /// unchanged.
    pub fn merge(&mut self, other: &Self) -> Result<(), Error> {
        check::size("other", "features", self.state.features(), other.state.features())?;
        check::size("other", "value columns", self.value_dim(), other.value_dim())?;
        check::same_scale(self.scale_root, other.scale_root)?;
        if other.state.tokens == 0 {
            return Ok(());
        }
        let before = self.state.clone();
        self.state.raise(other.state.log_scale);
        let factor = (other.state.log_scale - self.state.log_scale).exp();
        let [sums, sums_low, normalizer, normalizer_low] = other.state.parts();
        self.state.add(factor, sums, normalizer);
        self.state.add(factor, sums_low, normalizer_low);
        self.state.tokens += other.state.tokens;
        let result = self.state.check_size(Size::Large, 0);
        if result.is_err() {
            self.state = before;
        }
        result
    }

    fn engine(&self) -> Engine<'_, T> {
        Engine { map: &*self.map, scale_root: self.scale_root, decay: None }
    }

    pub(crate) fn value_dim(&self) -> usize {
        self.state.value_dim
    }

    pub(crate) fn head_dim(&self) -> usize {
        self.map.head_dim()
    }

    pub(crate) fn num_features(&self) -> usize {
        self.map.num_features()
    }

    /// Everything but the map: the log scale and the sums. Empty while no token has been absorbed.
    pub(crate) fn numbers(&self) -> Vec<T> {
        if self.state.tokens == 0 {
            return Vec::new();
        }
        core::iter::once(&self.state.log_scale)
            .chain(self.state.rows().flatten())
            .copied()
            .collect()
    }

    /// What rounding left of the log scale, which sums that decay need beside
    /// [`numbers`](Self::numbers).
    pub(crate) fn log_scale_low(&self) -> T {
        self.state.log_scale_low
    }

    /// Sets it, after [`set_numbers`](Self::set_numbers).
    pub(crate) fn set_log_scale_low(&mut self, low: T) {
        self.state.log_scale_low = low;
    }

    /// Whether it was made for these.
    pub(crate) fn is_of(&self, map: &Arc<F>, value_dim: usize) -> bool {
        Arc::ptr_eq(&self.map, map) && self.state.value_dim == value_dim
    }

    pub(crate) fn forget(&mut self) {
        self.state.reset(self.map.num_features(), self.state.value_dim);
    }

    /// As [`Memory::absorb`] of what has been checked, in the caller's working memory. On an error
    /// the state is left half-way.
    pub(crate) fn absorb_with(
        &mut self,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        work: &mut Workspace<T>,
    ) -> Result<(), Error> {
        Engine { map: &*self.map, scale_root: self.scale_root, decay: None }.absorb(
            &mut self.state,
            k,
            v,
            work,
        )
    }

    /// As [`Memory::read`] of what has been checked, in the caller's working memory; `each` is
    /// given the first row of a chunk and its answer.
    pub(crate) fn read_with(
        &self,
        q: ArrayView2<'_, T>,
        work: &mut Workspace<T>,
        each: impl FnMut(usize, &mut Answer<T>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.engine().read(&self.state, q, work, each)
    }

    /// Takes the state of a memory with the same map.
    pub(crate) fn copy_from(&mut self, other: &Self) {
        self.state.copy_from(&other.state);
    }

    /// The inverse of [`numbers`](Self::numbers); the length has been checked.
    pub(crate) fn set_numbers(&mut self, tokens: usize, numbers: &[T]) {
        self.forget();
        if let Some((&log_scale, mut numbers)) = numbers.split_first() {
            let (stride, value_dim) = (self.state.stride(), self.state.value_dim);
            let mut take = |row: &mut [T]| {
                let (values, rest) = numbers.split_at(row.len());
                row.copy_from_slice(values);
                numbers = rest;
            };
            let [sums, sums_low, normalizer, normalizer_low] = self.state.parts_mut();
            for row in sums.chunks_exact_mut(stride).chain(sums_low.chunks_exact_mut(stride)) {
                take(&mut row[..value_dim]);
            }
            take(normalizer);
            take(normalizer_low);
            self.state.log_scale = log_scale;
            self.state.tokens = tokens;
            let largest =
                self.state.parts().into_iter().map(kernel::max_abs).fold(T::zero(), T::max);
            self.state.size = Size::of(largest.as_f64(), SMALL_SUM, 0.0);
        }
    }

    /// Causal attention of new tokens; the shapes have been checked. On an error the state is what
    /// it was.
    pub(crate) fn extend(
        &mut self,
        tokens: Tokens<'_, T>,
        decay: Option<&LogDecay<T>>,
        out: ArrayViewMut2<'_, T>,
        readout: Readout,
        work: &mut Workspace<T>,
    ) -> Result<(), Error> {
        // a single token leaves the state as it was by itself
        self.guarded(tokens.q.nrows() > 1, work, |engine, state, work| {
            engine.with_decay(decay).extend(state, tokens, out, readout, work, true)
        })
    }

    /// As [`extend`](Self::extend), of several query heads, each with the same keys and values:
    /// `out [group, n, d_v]`.
    pub(crate) fn extend_group<'a>(
        &mut self,
        heads: impl ExactSizeIterator<Item = Tokens<'a, T>>,
        decay: Option<&LogDecay<T>>,
        mut out: ArrayViewMut3<'_, T>,
        readout: Readout,
        work: &mut Workspace<T>,
    ) -> Result<(), Error> {
        let single = out.len_of(Axis(1)) == 1;
        let left = (1..=heads.len()).rev();
        let mut heads = heads.zip(out.outer_iter_mut()).zip(left);
        if single {
            // all but the last head only look
            return heads.try_for_each(|((tokens, out), left)| match left {
                1 => self.extend(tokens, decay, out, readout, work),
                _ => self.engine().with_decay(decay).peek(&self.state, tokens, out, readout, work),
            });
        }
        let mut before = core::mem::replace(&mut work.group, State::new());
        before.copy_from(&self.state);
        let result = heads.try_for_each(|((tokens, out), _)| {
            self.state.copy_from(&before);
            self.extend(tokens, decay, out, readout, work)
        });
        if result.is_err() {
            self.state.copy_from(&before);
        }
        work.group = before;
        result
    }

    /// Copies the state.
    pub(crate) fn save_to(&self, checkpoint: &mut Checkpoint<T>) {
        checkpoint.state.copy_from(&self.state);
        checkpoint.valid = true;
    }

    /// Takes the state of a checkpoint; returns whether there is one.
    pub(crate) fn return_to(&mut self, checkpoint: &Checkpoint<T>) -> bool {
        if checkpoint.valid {
            self.state.copy_from(&checkpoint.state);
        }
        checkpoint.valid
    }

    /// Runs `run`; puts the state back if it fails. `risky` says whether it can fail after the
    /// state has changed.
    fn guarded(
        &mut self,
        risky: bool,
        work: &mut Workspace<T>,
        run: impl FnOnce(Engine<'_, T>, &mut State<T>, &mut Workspace<T>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if risky {
            work.before.copy_from(&self.state);
        }
        let engine = Engine { map: &*self.map, scale_root: self.scale_root, decay: None };
        let result = run(engine, &mut self.state, work);
        if result.is_err() && risky {
            self.state.copy_from(&work.before);
        }
        result
    }

    /// `ln φ(√scale·q_i)·φ(√scale·k_j)` of every pair of checked rows.
    pub(crate) fn log_weights(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
    ) -> Result<Array2<f64>, Error> {
        self.engine().log_weights(q, k)
    }
}

impl<T: Scalar, F: FeatureMap<T> + 'static> Memory<T> for LinearMemory<T, F> {
    fn absorb(&mut self, k: ArrayView2<'_, T>, v: ArrayView2<'_, T>) -> Result<(), Error> {
        check::size("v", "columns", self.value_dim(), v.ncols())?;
        check::keys_values(self.head_dim(), k, v)?;
        self.guarded(true, &mut Workspace::new(), |engine, state, work| {
            engine.absorb(state, k, v, work)
        })
    }

    fn read(&self, q: ArrayView2<'_, T>, answer: &mut Partial<T>) -> Result<(), Error> {
        check::queries(self.head_dim(), q)?;
        check::size("answer", "rows", q.nrows(), answer.numerator.nrows())?;
        check::size("answer", "columns", self.value_dim(), answer.numerator.ncols())?;
        self.engine().read(&self.state, q, &mut Workspace::new(), |start, block| {
            block.add_to(answer, start);
            Ok(())
        })
    }

    fn state_floats(&self) -> usize {
        2 * self.state.features() * (self.state.value_dim + 1) + 1
    }
}
