//! Softmax attention: exact, tiled, the reference for everything else.

use super::{Attention, Mask, NO_CHECKPOINT, Scratch, Stream, StreamState};
use crate::memory::Memory;
use crate::memory::answer::Readout;
use crate::memory::exact::ExactMemory;
use crate::memory::online_softmax::{QUERY_BLOCK, Tile, online_softmax};
use crate::views::{rows, rows_mut};
use crate::{Error, Scalar, check};
use core::marker::PhantomData;
use ndarray::{Array2, ArrayView2, ArrayView3, ArrayViewMut2, ArrayViewMut3, Axis};

/// Exact softmax attention (Vaswani et al., arXiv 1706.03762, equation 1):
///
/// ```text
/// o_t = Σ_j e^{scale·q_t·k_j} v_j / Σ_j e^{scale·q_t·k_j},   scale = 1/√head_dim unless set.
/// ```
///
/// Scores are computed tile by tile with a running maximum: there is never an n × n array, and
/// scores of any finite size give finite output. Time is O(n_q·n_k·(d + d_v)); the stream is a
/// growing key/value cache.
///
/// ```
/// use dijiang::{Attention, Mask, SoftmaxAttention};
/// use ndarray::array;
///
/// let kernel = SoftmaxAttention::<f64>::new(2)?.with_scale(1.0);
/// let q = array![[1000.0, 0.0]];
/// let k = array![[1.0, 0.0], [0.0, 1.0]];
/// let v = array![[1.0], [2.0]];
/// let out = kernel.forward(q.view(), k.view(), v.view(), Mask::Full)?;
/// assert_eq!(out, array![[1.0]]); // e^1000 does not overflow
///     
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(bound = ""))]
pub struct SoftmaxAttention<T> {
    head_dim: usize,
    scale: Option<f64>,
    #[cfg_attr(feature = "serde", serde(skip))]
    number: PhantomData<T>,
}

impl<T: Scalar> SoftmaxAttention<T> {
    /// Softmax attention over queries and keys of `head_dim` columns.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `head_dim` is 0.
    pub fn new(head_dim: usize) -> Result<Self, Error> {
        check::at_least_one("head_dim", head_dim)?;
        Ok(Self { head_dim, scale: None, number: PhantomData })
    }

    /// Sets the factor of the scores, `1/√head_dim` unless set. One that is not positive and finite
    /// is reported by the first call that would use it.
    #[must_use]
    pub fn with_scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }

    /// An empty cache for so many query heads.
    fn stream_of(&self, group: usize, value_dim: usize) -> Result<SoftmaxStream<T>, Error> {
        let scale = check::scale::<T>(self.scale, self.head_dim)?;
        let cache = ExactMemory::new(self.head_dim, value_dim, scale)?;
        Ok(SoftmaxStream { cache, group, tile: Tile::new(), checkpoint: None })
    }
}

/// With fewer scores than this, one thread answers.
#[cfg(feature = "rayon")]
const FEWEST_SCORES: usize = 1 << 18;

/// Answers the queries block by block; query `i` sees keys `0..=first + i`, or all.
fn answer<T: Scalar>(
    q: ArrayView2<'_, T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    scale: T,
    first: Option<usize>,
    mut out: ArrayViewMut2<'_, T>,
    tile: &mut Tile<T>,
) -> Result<(), Error> {
    let n = q.nrows();
    #[cfg(feature = "rayon")]
    if tile.parallel
        && n.saturating_mul(k.nrows()) >= FEWEST_SCORES
        && n > QUERY_BLOCK
        && rayon::current_num_threads() > 1
    {
        use rayon::prelude::*;
        let blocks: Vec<_> = out.axis_chunks_iter_mut(ndarray::Axis(0), QUERY_BLOCK).collect();
        let answered =
            blocks.into_par_iter().enumerate().map_init(Tile::new, |tile, (block, out)| {
                let start = block * QUERY_BLOCK;
                let q = rows(q, start..n.min(start + QUERY_BLOCK));
                online_softmax(q, k, v, scale, first.map(|first| first + start), tile);
                tile.answer.write(start, Readout::Normalized, out)
            });
        let results: Vec<_> = answered.collect();
        return results.into_iter().collect();
    }
    for start in (0..n).step_by(QUERY_BLOCK) {
        let end = n.min(start + QUERY_BLOCK);
        online_softmax(rows(q, start..end), k, v, scale, first.map(|first| first + start), tile);
        tile.answer.write(start, Readout::Normalized, rows_mut(out.view_mut(), start..end))?;
    }
    Ok(())
}

impl<T: Scalar> Attention<T> for SoftmaxAttention<T> {
    fn forward_into(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mask: Mask,
        out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        self.forward_with(q, k, v, mask, out, &mut Scratch::new())
    }

    fn forward_with(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mask: Mask,
        out: ArrayViewMut2<'_, T>,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        let scale = T::from_f64(check::scale::<T>(self.scale, self.head_dim)?);
        check::forward(self.head_dim, q, k, v, mask, &out)?;
        check::all_finite(q, k, v)?;
        let first = match mask {
            Mask::Causal => Some(0),
            Mask::Full => None,
        };
        answer(q, k, v, scale, first, out, &mut scratch.tile)
    }

    fn stream(&self, value_dim: usize) -> Result<Box<dyn Stream<T>>, Error> {
        Ok(Box::new(self.stream_of(1, value_dim)?))
    }

    fn group_stream(
        &self,
        group: usize,
        value_dim: usize,
    ) -> Result<Option<Box<dyn Stream<T>>>, Error> {
        check::at_least_one("group", group)?;
        Ok(Some(Box::new(self.stream_of(group, value_dim)?)))
    }

    fn heads_are_independent(&self) -> bool {
        true
    }

    fn state_floats(&self, value_dim: usize, tokens: usize) -> Result<usize, Error> {
        check::at_least_one("value_dim", value_dim)?;
        Ok(tokens.saturating_mul(self.head_dim + value_dim))
    }

    fn log_weights(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
    ) -> Result<Option<Array2<f64>>, Error> {
        let scale = check::scale::<T>(self.scale, self.head_dim)?;
        check::queries(self.head_dim, q)?;
        check::size("k", "columns", self.head_dim, k.ncols())?;
        check::finite("k", k)?;
        let (q, k) = (q.mapv(|x| x.as_f64() * scale), k.mapv(T::as_f64));
        Ok(Some(q.dot(&k.t())))
    }
}

/// A growing key/value cache.
#[derive(Debug)]
struct SoftmaxStream<T> {
    cache: ExactMemory<T>,
    group: usize,
    tile: Tile<T>,
    /// Tokens at the last checkpoint.
    checkpoint: Option<usize>,
}

const KERNEL: &str = "softmax";

impl<T: Scalar> Stream<T> for SoftmaxStream<T> {
    fn extend(
        &mut self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        self.extend_group(q.insert_axis(Axis(0)), k, v, out.insert_axis(Axis(0)))
    }

    fn group(&self) -> usize {
        self.group
    }

    fn extend_group(
        &mut self,
        q: ArrayView3<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mut out: ArrayViewMut3<'_, T>,
    ) -> Result<(), Error> {
        let (head_dim, value_dim) = self.cache.dims();
        check::extend_group(head_dim, value_dim, self.group, q, k, v, &out)?;
        check::finite_group(q, k, v)?;
        let before = self.cache.len();
        self.cache.push(k, v);
        let Self { cache, tile, .. } = self;
        let (keys, values, scale) = (cache.keys(), cache.values(), cache.scale());
        let mut heads = q.outer_iter().zip(out.outer_iter_mut());
        let result =
            heads.try_for_each(|(q, out)| answer(q, keys, values, scale, Some(before), out, tile));
        if result.is_err() {
            self.cache.truncate(before);
        }
        result
    }

    fn len(&self) -> usize {
        self.cache.len()
    }

    fn state_floats(&self) -> usize {
        self.cache.state_floats()
    }

    fn clone_box(&self) -> Box<dyn Stream<T>> {
        Box::new(Self {
            cache: self.cache.clone(),
            group: self.group,
            tile: self.tile.like(),
            checkpoint: None,
        })
    }

    fn reset(&mut self) {
        self.cache.reset();
        self.checkpoint = None;
    }

    fn stay_on_one_thread(&mut self) {
        self.tile.stay_on_one_thread();
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
        let numbers = self.cache.keys().iter().chain(self.cache.values().iter()).copied().collect();
        Ok(StreamState::new(KERNEL, self.len(), vec![head_dim, value_dim], numbers))
    }

    fn restore(&mut self, state: &StreamState<T>) -> Result<(), Error> {
        let (head_dim, value_dim) = self.cache.dims();
        let tokens = state.tokens();
        let count = tokens.saturating_mul(head_dim + value_dim);
        let numbers = state.numbers(KERNEL, &[head_dim, value_dim], count)?;
        let (k, v) = numbers.split_at(tokens * head_dim);
        self.reset();
        self.cache.push(
            ArrayView2::from_shape((tokens, head_dim), k).expect("counted"),
            ArrayView2::from_shape((tokens, value_dim), v).expect("counted"),
        );
        Ok(())
    }
}
