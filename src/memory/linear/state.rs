//! The sums of a linear memory, with their rounding errors and their log scale.

use crate::error::Error;
use crate::kernel;
use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::loops::decay::DecayRows;
use crate::kernel::loops::products::{Epilogue, Matrix, Product};
use crate::memory::linear::bounds::Size;
use crate::memory::linear::log_scale::LogScale;
use crate::memory::linear::pending::Pending;
use crate::memory::linear::state_decay::StateDecay;
use crate::scalar::Scalar;

/// The sums and their rounding errors, in units of `e^{scale}`; −∞ while empty. Rows of the sums
/// are padded.
#[derive(Clone, Debug)]
pub(crate) struct State<T> {
    pub(super) value_dim: usize,
    /// `[num_features, value_dim]`.
    pub(super) sums: Buffer<T>,
    pub(super) sums_low: Buffer<T>,
    /// `[num_features]`.
    pub(super) normalizer: Buffer<T>,
    pub(super) normalizer_low: Buffer<T>,
    /// Tokens that the sums have not taken in yet, and the normaliser has.
    pub(super) pending: Pending<T>,
    pub(super) scale: LogScale<T>,
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
            pending: Pending::new(),
            scale: LogScale::empty(),
            tokens: 0,
            size: Size::Small,
        }
    }

    /// Makes it empty, for these sizes. Whether tokens may wait stays as it was.
    pub(crate) fn reset(&mut self, features: usize, value_dim: usize) {
        self.value_dim = value_dim;
        self.sums.resize(features * padded::<T>(value_dim));
        self.sums_low.resize(features * padded::<T>(value_dim));
        self.normalizer.resize(features);
        self.normalizer_low.resize(features);
        self.arrays_mut().into_iter().for_each(|array| array.fill(T::zero()));
        if self.pending.has_room() {
            self.pending.reserve(features, value_dim);
        }
        self.scale = LogScale::empty();
        self.tokens = 0;
        self.size = Size::Small;
    }

    /// Lets the tokens of decode steps wait beside the sums from now on.
    pub(super) fn let_tokens_wait(&mut self) {
        if !self.pending.has_room() {
            self.pending.reserve(self.features(), self.value_dim);
        }
    }

    /// As [`Clone::clone_from`], into the memory there is.
    pub(super) fn copy_from(&mut self, other: &Self) {
        self.value_dim = other.value_dim;
        self.sums.resize(other.sums.len());
        self.sums_low.resize(other.sums_low.len());
        self.normalizer.resize(other.normalizer.len());
        self.normalizer_low.resize(other.normalizer_low.len());
        self.arrays_mut()
            .into_iter()
            .zip(other.arrays())
            .for_each(|(array, other)| array.copy_from_slice(other));
        self.pending.copy_from(&other.pending);
        self.scale = other.scale;
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
    pub(super) fn arrays(&self) -> [&[T]; 4] {
        [&self.sums, &self.sums_low, &self.normalizer, &self.normalizer_low]
    }

    /// As [`arrays`](Self::arrays).
    pub(super) fn arrays_mut(&mut self) -> [&mut [T]; 4] {
        [&mut self.sums, &mut self.sums_low, &mut self.normalizer, &mut self.normalizer_low]
    }

    /// Numbers that it holds but for its log scale, with the room for tokens that wait.
    pub(super) fn floats(&self) -> usize {
        2 * self.features() * (self.value_dim + 1) + self.pending.room() * self.token_floats()
    }

    /// Numbers of a token that waits.
    pub(super) fn token_floats(&self) -> usize {
        self.features() + self.value_dim
    }

    /// Adds the tokens that wait to the sums.
    pub(super) fn settle(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let (features, stride, tokens) = (self.features(), self.stride(), self.pending.len());
        Product {
            m: features,
            n: stride,
            k: tokens,
            a: Matrix::columns(&self.pending.keys, self.pending.key_stride()),
            b: self.pending.values(),
            ldb: stride,
            c: &mut self.sums,
            ldc: stride,
            into: Epilogue::Compensated(&mut self.sums_low),
        }
        .run();
        self.pending.clear();
    }

    /// Adds the sums of other tokens, none of which wait. On an error the sums are left half-way.
    pub(super) fn merge(&mut self, other: &Self) -> Result<(), Error> {
        debug_assert!(other.pending.is_empty());
        self.settle();
        let zero = |array: &[T]| array.iter().all(|x| *x == T::zero());
        if other.arrays().into_iter().all(zero) {
            // they weigh nothing, whatever their log scale
            self.tokens += other.tokens;
            return Ok(());
        }
        if self.arrays().into_iter().all(zero) {
            self.scale = LogScale::of(other.scale.high);
        }
        self.rescale(other.scale.high);
        let factor = (other.scale.high - self.scale.high).exp();
        let [sums, sums_low, normalizer, normalizer_low] = other.arrays();
        self.add(factor, sums, normalizer);
        self.add(factor, sums_low, normalizer_low);
        self.tokens += other.tokens;
        self.check_size(Size::Large, 0)
    }

    /// Adds `factor·delta` to the sums and `factor·features` to the normaliser.
    fn add(&mut self, factor: T, delta: &[T], features: &[T]) {
        let [sums, sums_low, normalizer, normalizer_low] = self.arrays_mut();
        kernel::add_compensated(sums, sums_low, factor, delta);
        kernel::add_compensated(normalizer, normalizer_low, factor, features);
    }

    /// Whether a sum has come so near to the largest number of the type that more tokens could
    /// overflow it.
    fn is_too_large(&self) -> bool {
        let limit = T::max_value() * T::from_f64(0.5_f64.powi(14));
        self.arrays()
            .into_iter()
            .any(|array| !kernel::all_finite(array) || kernel::max_abs(array) > limit)
    }

    /// Fails if the values were large and their sum has become so.
    pub(super) fn check_size(&mut self, values: Size, row: usize) -> Result<(), Error> {
        self.size = self.size.max(values);
        if values == Size::Large && self.is_too_large() {
            Err(Error::Overflow { which: "the sum of values", row })
        } else {
            Ok(())
        }
    }

    /// Brings the sums to a log scale that is at least as large.
    pub(super) fn rescale(&mut self, log_scale: T) {
        if log_scale > self.scale.high {
            if self.tokens > 0 {
                let factor = self.scale.ratio_to(log_scale);
                self.all_rows().scale(factor);
                self.pending.scale(factor);
            }
            self.scale = LogScale::of(log_scale);
        }
    }

    /// Lets the sums decay: `S ← diag(α)·S`, `z ← α ⊙ z`.
    pub(super) fn decay(&mut self, decay: &StateDecay<T>) {
        self.scale = self.scale.decayed(decay.slowest);
        if let Some(features) = decay.of_features() {
            debug_assert!(self.pending.is_empty());
            for (sum, low) in [
                (&mut self.sums, &mut self.sums_low),
                (&mut self.normalizer, &mut self.normalizer_low),
            ] {
                DecayRows { decay: features, factors: &[], x: &[], sum, low }.run();
            }
        }
    }

    /// The sums of all features.
    pub(super) fn all_rows(&mut self) -> StateRows<'_, T> {
        StateRows {
            sums: &mut self.sums,
            sums_low: &mut self.sums_low,
            normalizer: &mut self.normalizer,
            normalizer_low: &mut self.normalizer_low,
        }
    }

    /// The sums of ranges of features, `height` of them at a time.
    #[cfg(feature = "rayon")]
    pub(super) fn parts(&mut self, height: usize) -> impl Iterator<Item = StateRows<'_, T>> {
        let stride = self.stride();
        let sums =
            self.sums.chunks_mut(height * stride).zip(self.sums_low.chunks_mut(height * stride));
        let normalizer =
            self.normalizer.chunks_mut(height).zip(self.normalizer_low.chunks_mut(height));
        sums.zip(normalizer).map(|((sums, sums_low), (normalizer, normalizer_low))| StateRows {
            sums,
            sums_low,
            normalizer,
            normalizer_low,
        })
    }
}

/// The sums of some features, all at one log scale.
#[derive(Debug)]
pub(super) struct StateRows<'a, T> {
    pub(super) sums: &'a mut [T],
    pub(super) sums_low: &'a mut [T],
    pub(super) normalizer: &'a mut [T],
    pub(super) normalizer_low: &'a mut [T],
}

impl<T: Scalar> StateRows<'_, T> {
    /// Multiplies them.
    pub(super) fn scale(&mut self, factor: T) {
        let Self { sums, sums_low, normalizer, normalizer_low } = self;
        for array in [sums, sums_low, normalizer, normalizer_low] {
            kernel::scale(array, factor);
        }
    }

    /// `S ← S + Σ_s k_s v_sᵀ`, `z ← z + Σ_s k_s` of keys `[features, width]` at the log scale of
    /// the sums, values `[tokens, value_dim]` with padded rows, and the sums of keys.
    pub(super) fn add(&mut self, keys: &[T], width: usize, values: &[T], key_sums: &[T]) {
        let features = self.normalizer.len();
        let stride = self.sums.len() / features;
        Product {
            m: features,
            n: stride,
            k: values.len() / stride,
            a: Matrix::rows(keys, width),
            b: values,
            ldb: stride,
            c: &mut *self.sums,
            ldc: stride,
            into: Epilogue::Compensated(&mut *self.sums_low),
        }
        .run();
        kernel::add_compensated(self.normalizer, self.normalizer_low, T::one(), key_sums);
    }
}
