//! Softmax attention: exact, tiled, the reference for everything else.

mod answer;
mod backward;
pub(crate) mod options;
mod window;

use crate::attention::call::{Head, one_head};
use crate::attention::fingerprint::Fingerprint;
use crate::attention::gradient::HeadGradient;
use crate::attention::scratch::Scratch;
use crate::attention::sharing::Sharing;
use crate::attention::softmax::answer::{Outputs, answer, answer_group, key_values, of_query_head};
use crate::attention::softmax::options::SoftmaxAttention;
use crate::attention::stream::{NO_CHECKPOINT, Stream, StreamOptions, StreamState};
use crate::attention::threads::Threads;
use crate::attention::{Attention, PairWeights};
use crate::check;
use crate::error::Error;
use crate::kernel::max_abs;
use crate::mask::Mask;
use crate::memory::Memory;
use crate::memory::exact::ExactMemory;
use crate::memory::key_values::KeyValues;
use crate::memory::online_softmax::Tile;
use crate::memory::packed::Packed;
use crate::memory::scoring::Scoring;
use crate::memory::sight::Sight;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use crate::state_format::StateFormat;
use ndarray::{Array2, ArrayView2, ArrayView3, Axis};

/// What a forward pass keeps in the scratch.
#[derive(Debug)]
struct SoftmaxScratch<T> {
    tile: Tile<T>,
    /// The keys and values of a head in fewer bits.
    packed: Option<Packed>,
}

impl<T: Scalar> Default for SoftmaxScratch<T> {
    fn default() -> Self {
        Self { tile: Tile::new(), packed: None }
    }
}

impl<T: Scalar> Attention<T> for SoftmaxAttention<T> {
    fn forward_heads(
        &self,
        heads: &mut [Head<'_, T>],
        mask: Mask,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        let threads = scratch.threads();
        scratch.with_part(|SoftmaxScratch { tile, packed }, _| {
            heads.iter_mut().try_for_each(|head| {
                head.check_not_gated()?;
                head.check_forward_masked(self.head_dim, mask)?;
                self.check_mask(mask)?;
                head.check_finite()?;
                let scoring = self.check(head.group_len())?;
                let first = mask.first([head.queries(), head.keys()]);
                let Head { q, k, v, out, log_normalizer, key_mask, bias, .. } = head;
                let tokens = key_values(self.format, *k, *v, packed);
                let mut heads = q.outer_iter().zip(out.outer_iter_mut()).enumerate();
                heads.try_for_each(|(g, (q, out))| {
                    let log_normalizer =
                        log_normalizer.as_mut().map(|x| x.index_axis_mut(Axis(0), g));
                    let to = Outputs { out, log_normalizer };
                    let bias = bias.map(|bias| of_query_head(bias, g));
                    let sight = Sight { first, window: self.window, key_mask: *key_mask, bias };
                    answer(q, tokens, self.of_head(scoring, g), sight, to, threads, tile)
                })
            })
        })
    }

    fn stream(&self, value_dim: usize) -> Result<Box<dyn Stream<T>>, Error> {
        self.stream_with(StreamOptions::new(value_dim))
    }

    fn stream_with(&self, options: StreamOptions) -> Result<Box<dyn Stream<T>>, Error> {
        if let Some(window) = self.window {
            return self.window_stream(window, options);
        }
        let StreamOptions { value_dim, group, threads, .. } = options;
        options.check_one_head()?;
        let scoring = self.check(group)?;
        Ok(Box::new(SoftmaxStream {
            cache: ExactMemory::new(self.head_dim, value_dim, scoring.scale.as_f64())?
                .with_state_format(self.format),
            kernel: self.clone(),
            scoring,
            group,
            threads,
            tile: Tile::new(),
            largest: [T::zero(); 2],
            checkpoint: None,
        }))
    }

    fn state_floats(&self, value_dim: usize, tokens: usize) -> Result<usize, Error> {
        check::at_least_one("value_dim", value_dim)?;
        if let Some(window) = self.window {
            return self.of_window(window)?.state_floats(value_dim, tokens);
        }
        Ok(tokens.saturating_mul(self.head_dim.saturating_add(value_dim)))
    }

    fn state_bytes(&self, value_dim: usize, tokens: usize) -> Result<usize, Error> {
        check::at_least_one("value_dim", value_dim)?;
        if let Some(window) = self.window {
            return self.of_window(window)?.state_bytes(value_dim, tokens);
        }
        let rows = [self.head_dim, value_dim].map(|columns| self.format.row_bytes::<T>(columns));
        Ok(tokens.saturating_mul(rows[0].saturating_add(rows[1])))
    }

    fn sharing(&self) -> Sharing {
        if self.differs_by_head() { Sharing::Group } else { Sharing::Head }
    }

    fn gives_log_normalizer(&self) -> bool {
        true
    }

    fn backward_heads(
        &self,
        heads: &mut [HeadGradient<'_, T>],
        mask: Mask,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        scratch.with_part(|part, _| {
            heads.iter_mut().try_for_each(|head| self.backward_head(head, mask, part))
        })
    }

    fn parameters(&self) -> Parameters<T> {
        self.numbers()
    }

    fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Box<dyn Attention<T>>, Error> {
        Ok(Box::new(self.with_numbers(parameters)?))
    }

    fn pair_weights(&self) -> Option<&dyn PairWeights<T>> {
        Some(self)
    }
}

impl<T: Scalar> PairWeights<T> for SoftmaxAttention<T> {
    fn log_weights(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
    ) -> Result<Array2<f64>, Error> {
        self.check(1)?;
        check::queries(self.head_dim, q)?;
        check::size("k", "columns", self.head_dim, k.ncols())?;
        check::finite("k", k)?;
        let mut kept = ExactMemory::new(self.head_dim, 1, 1.0)?.with_state_format(self.format);
        kept.push(k, Array2::zeros((k.nrows(), 1)).view());
        let mut scores = q.mapv(T::as_f64).dot(&kept.keys().mapv(T::as_f64).t());
        for ((t, j), score) in scores.indexed_iter_mut() {
            *score = self.score(*score, [t, j]);
        }
        Ok(scores)
    }
}

/// A growing key/value cache.
#[derive(Debug)]
struct SoftmaxStream<T> {
    cache: ExactMemory<T>,
    kernel: SoftmaxAttention<T>,
    scoring: Scoring<T>,
    group: usize,
    threads: Threads,
    tile: Tile<T>,
    /// The largest magnitudes of keys and of values that the cache has ever held.
    largest: [T; 2],
    /// Tokens at the last checkpoint.
    checkpoint: Option<usize>,
}

impl<T: Scalar> Clone for SoftmaxStream<T> {
    fn clone(&self) -> Self {
        let (cache, kernel, tile) = (self.cache.clone(), self.kernel.clone(), Tile::new());
        Self { cache, kernel, tile, checkpoint: None, ..*self }
    }

    fn clone_from(&mut self, source: &Self) {
        self.cache.clone_from(&source.cache);
        self.largest = source.largest;
    }
}

const KERNEL: &str = "softmax";

impl<T: Scalar> SoftmaxStream<T> {
    fn check(&self, head: &Head<'_, T>) -> Result<(), Error> {
        let (head_dim, value_dim) = self.cache.dims();
        head.check_not_gated()?;
        head.check_no_log_normalizer()?;
        head.check_extend_biased([head_dim, value_dim], self.group, self.cache.len())
    }

    /// The largest magnitudes of keys and of values with those of new tokens; something that is
    /// not finite if one is not.
    fn largest_with(&self, head: &Head<'_, T>) -> [T; 2] {
        let [key, value] = self.largest;
        [key.max(largest(head.k)), value.max(largest(head.v))]
    }

    fn fingerprint(&self) -> Fingerprint {
        let own = Fingerprint::new().with("scale", [self.cache.scale().as_f64()]);
        own.and(self.kernel.fingerprint())
    }

    /// Whether biases of new tokens hide all keys from no query, and are none of them so large that
    /// a score could leave the range of the type.
    fn is_sure_of(&self, bias: ArrayView3<'_, T>, limit: T) -> bool {
        let (before, has_sink) =
            (self.cache.len(), self.kernel.of_head(self.scoring, 0).1.is_some());
        bias.outer_iter().all(|bias| {
            bias.outer_iter().enumerate().all(|(t, row)| {
                let seen = row.iter().take(before + t + 1);
                row.iter().all(|&x| x < limit) && (has_sink || seen.clone().any(|&x| x > -limit))
            })
        })
    }

    fn is_packed(&self) -> bool {
        self.kernel.format != StateFormat::F32
    }

    fn absorb(&mut self, head: &mut Head<'_, T>) -> Result<(), Error> {
        let largest = self.largest_with(head);
        let Head { q, k, v, out, bias, .. } = head;
        let before = self.cache.len();
        self.cache.push(*k, *v);
        let Self { cache, kernel, scoring, threads, tile, .. } = self;
        let options = |g: usize| kernel.of_head(*scoring, g);
        let result = match cache.key_values() {
            KeyValues::Packed(packed, tokens) if k.nrows() == 1 && bias.is_none() => {
                let q = q.index_axis(Axis(1), 0);
                let out = out.view_mut().index_axis_move(Axis(1), 0);
                answer_group(q, (packed, tokens), &options, out, tile)
            }
            tokens => {
                let mut heads = q.outer_iter().zip(out.outer_iter_mut()).enumerate();
                heads.try_for_each(|(g, (q, out))| {
                    let to = Outputs { out, log_normalizer: None };
                    let bias = bias.map(|bias| of_query_head(bias, g));
                    let sight = Sight { bias, ..Sight::up_to(Some(before)) };
                    answer(q, tokens, options(g), sight, to, *threads, tile)
                })
            }
        };
        match result {
            Ok(()) => self.largest = largest,
            Err(_) => self.cache.truncate(before),
        }
        result
    }
}

/// The largest magnitude.
fn largest<T: Scalar>(x: ArrayView2<'_, T>) -> T {
    match x.as_slice() {
        Some(x) => max_abs(x),
        None => x.iter().fold(T::zero(), |m, &x| m.max(x.abs())),
    }
}

impl<T: Scalar> Stream<T> for SoftmaxStream<T> {
    fn extend_heads(&mut self, heads: &mut [Head<'_, T>]) -> Result<(), Error> {
        let head = one_head(heads)?;
        self.check(head)?;
        head.check_finite()?;
        self.absorb(head)
    }

    #[allow(clippy::cast_precision_loss)]
    fn prepare_heads(&mut self, heads: &mut [Head<'_, T>]) -> bool {
        let [head] = heads else { return false };
        if self.check(head).and_then(|()| head.check_finite()).is_err() {
            return false;
        }
        // No score and no sum of weighted values can leave the range of the type; one factor after
        // the other, so that no product on the way can.
        let [key, value] = self.largest_with(head);
        let query = head.q.outer_iter().fold(T::zero(), |m, q| m.max(largest(q)));
        let limit = T::max_value() * T::from_f64(1.0 / 64.0);
        let factor =
            self.cache.scale().max(T::one()) * T::from_f64(2.0 * self.cache.dims().0 as f64);
        let tokens = T::from_f64((self.cache.len() + head.keys()) as f64);
        query * factor * key.max(T::one()) < limit
            && value * tokens < limit
            && head.bias.is_none_or(|bias| self.is_sure_of(bias, limit))
    }

    fn len(&self) -> usize {
        self.cache.len()
    }

    fn state_floats(&self) -> usize {
        self.cache.state_floats()
    }

    fn state_bytes(&self) -> usize {
        self.cache.state_bytes()
    }

    fn reset(&mut self) {
        self.cache.reset();
        self.largest = [T::zero(); 2];
        self.checkpoint = None;
    }

    fn checkpoint(&mut self) -> bool {
        self.checkpoint = Some(self.cache.len());
        true
    }

    fn rollback(&mut self) -> Result<(), Error> {
        self.cache.truncate(self.checkpoint.ok_or(NO_CHECKPOINT)?);
        Ok(())
    }

    fn save(&self) -> Result<StreamState<T>, Error> {
        let (head_dim, value_dim) = self.cache.dims();
        let (mut numbers, mut bytes) = (Vec::new(), Vec::new());
        if self.is_packed() {
            self.cache.save(&mut bytes);
        } else {
            numbers.extend(self.cache.keys().iter().chain(self.cache.values().iter()));
        }
        let state = StreamState::new(KERNEL, self.len(), vec![head_dim, value_dim], numbers);
        Ok(state.with_bytes(bytes).with_fingerprint(self.fingerprint()))
    }

    fn restore(&mut self, state: &StreamState<T>) -> Result<(), Error> {
        let (head_dim, value_dim) = self.cache.dims();
        let tokens = state.tokens();
        let packed = self.is_packed();
        let count = if packed { 0 } else { tokens.saturating_mul(head_dim + value_dim) };
        let numbers = state.numbers(KERNEL, &[head_dim, value_dim], count)?;
        self.fingerprint().check(state.fingerprint())?;
        if packed {
            let bytes = state.bytes(tokens.saturating_mul(self.cache.token_bytes()))?;
            let mut cache = self.cache.clone();
            if !cache.restore(tokens, bytes) {
                return Err(Error::NotFinite { which: "state", row: 0, column: 0 });
            }
            self.reset();
            self.largest = [largest(cache.keys().view()), largest(cache.values().view())];
            self.cache = cache;
            return Ok(());
        }
        let (k, v) = numbers.split_at(tokens * head_dim);
        self.reset();
        self.largest = [max_abs(k), max_abs(v)];
        self.cache.push(
            ArrayView2::from_shape((tokens, head_dim), k).expect("counted"),
            ArrayView2::from_shape((tokens, value_dim), v).expect("counted"),
        );
        Ok(())
    }
}
