//! The sums before every chunk of a block, by ranges of features.

use crate::kernel::buffer::Buffer;
use crate::kernel::loops::products::{Epilogue, Matrix, Product};
use crate::kernel::{self, chunk_len};
use crate::memory::answer::Answer;
use crate::memory::linear::bounds::Size;
use crate::memory::linear::chunk::{Chunk, key_factors};
use crate::memory::linear::full::largest_scale;
use crate::memory::linear::groups::{FEW_TOKENS, run};
use crate::memory::linear::log_scale::LogScale;
use crate::memory::linear::pass::PassBuffers;
use crate::memory::linear::state::State;
use crate::memory::linear::steps::StepBuffers;
use crate::memory::linear::threads::share::share;
use crate::scalar::Scalar;
use core::ops::Range;

/// What happens to the log scale of the sums in a chunk.
#[derive(Clone, Copy, Debug)]
pub(super) struct ChunkScale<T> {
    /// After the decay of the first token.
    pub(super) before: LogScale<T>,
    /// At which the chunk is answered and absorbed.
    pub(super) common: T,
}

impl<T: Scalar> ChunkScale<T> {
    /// The log scale after the chunk, which lets the sums decay by what its tokens after the first
    /// do.
    fn after(self, chunk: &Chunk<T>) -> LogScale<T> {
        let grows = self.common > self.before.high;
        let scale = if grows { LogScale::of(self.common) } else { self.before };
        chunk.decay.map_or(scale, |[_, rest]| scale.decayed(rest))
    }
}

/// The log scales of every chunk, if each is one group and no value is large.
pub(super) fn causal_scales<T: Scalar>(
    state: &State<T>,
    chunks: &[Chunk<T>],
) -> Option<Vec<ChunkScale<T>>> {
    let mut scale = state.scale;
    let mut scales = Vec::with_capacity(chunks.len());
    for chunk in chunks {
        let before = chunk.decay.map_or(scale, |[first, _]| scale.decayed(first));
        let (end, common) = run(chunk, 0, before.high);
        if end < chunk.tokens || chunk.tokens < FEW_TOKENS || chunk.values_size == Size::Large {
            return None;
        }
        let of_chunk = ChunkScale { before, common };
        scales.push(of_chunk);
        scale = of_chunk.after(chunk);
    }
    Some(scales)
}

/// The log scales of every chunk whose keys are absorbed without reading.
pub(super) fn absorbed_scales<T: Scalar>(
    state: &State<T>,
    chunks: &[Chunk<T>],
) -> Vec<ChunkScale<T>> {
    let mut scale = state.scale;
    let rescale = |chunk: &Chunk<T>| {
        let of_chunk = ChunkScale { before: scale, common: largest_scale(chunk, scale.high) };
        scale = of_chunk.after(chunk);
        of_chunk
    };
    chunks.iter().map(rescale).collect()
}

/// The sums of some features before every chunk of a block.
#[derive(Debug)]
pub(super) struct Snapshots<T> {
    features: Range<usize>,
    /// `[chunks, features, value_dim]`, rows padded.
    sums: Buffer<T>,
    /// `[chunks, features]`.
    normalizer: Buffer<T>,
}

impl<T: Scalar> Snapshots<T> {
    fn new() -> Self {
        Self { features: 0..0, sums: Buffer::new(), normalizer: Buffer::new() }
    }
}

/// Absorbs mapped chunks, each thread a range of the features; `keep` says whether to keep the sums
/// before each.
pub(super) fn absorb<T: Scalar>(
    state: &mut State<T>,
    chunks: &mut [Chunk<T>],
    scales: &[ChunkScale<T>],
    snapshots: &mut Vec<Snapshots<T>>,
    threads: &mut [PassBuffers<T>],
    keep: bool,
) {
    let (features, stride, count) = (state.features(), state.stride(), chunks.len());
    let after = scales.iter().zip(&*chunks).next_back().map(|(scale, chunk)| scale.after(chunk));
    let had_tokens = state.tokens > 0;
    // whole tiles of a product, several for each thread
    let height = features.div_ceil(4 * threads.len()).next_multiple_of(8);
    // the keys of every chunk by ranges of features
    let mut keys: Vec<Vec<&mut [T]>> =
        (0..features.div_ceil(height)).map(|_| Vec::with_capacity(count)).collect();
    let mut rest: Vec<(&Buffer<T>, &Buffer<T>)> = Vec::with_capacity(count);
    for chunk in chunks {
        state.size = state.size.max(chunk.values_size);
        let parts = chunk.keys[..features * chunk.width].chunks_mut(height * chunk.width);
        keys.iter_mut().zip(parts).for_each(|(keys, part)| keys.push(part));
        rest.push((&chunk.key_scale, &chunk.values));
    }
    snapshots.resize_with(keys.len(), Snapshots::new);
    let parts = state.parts(height).zip(keys).zip(snapshots);
    share(threads, parts, |buffers, i, ((mut part, keys), snapshots)| {
        let height_here = part.normalizer.len();
        snapshots.features = i * height..i * height + height_here;
        if keep {
            snapshots.sums.resize(count * height_here * stride);
            snapshots.normalizer.resize(count * height_here);
        }
        let StepBuffers { factors, key_sums, .. } = &mut buffers.step;
        key_sums.resize(height_here);
        for (c, (keys, (key_scale, values))) in keys.into_iter().zip(&rest).enumerate() {
            if keep {
                snapshots.sums[c * height_here * stride..(c + 1) * height_here * stride]
                    .copy_from_slice(part.sums);
                snapshots.normalizer[c * height_here..(c + 1) * height_here]
                    .copy_from_slice(part.normalizer);
            }
            let ChunkScale { before, common } = scales[c];
            if common > before.high && (had_tokens || c > 0) {
                part.scale(before.ratio_to(common));
            }
            key_factors(key_scale, common, values.len() / stride, factors);
            kernel::scale_and_sum_rows(keys, factors, key_sums);
            part.add(keys, factors.len(), values, key_sums);
        }
    });
    state.scale = after.unwrap_or(state.scale);
    state.tokens += count * chunk_len::<T>();
}

/// Inter-chunk read: the answer of the sums before chunk `c` of a block, at their own log scale.
pub(super) fn read<T: Scalar>(
    snapshots: &[Snapshots<T>],
    c: usize,
    chunk: &Chunk<T>,
    normalizer: &mut Buffer<T>,
    answer: &mut Answer<T>,
) {
    let (width, stride) = (chunk.width, answer.numerator.len() / chunk.tokens);
    let features = snapshots.iter().map(|part| part.features.len()).sum();
    normalizer.resize(features);
    for (i, part) in snapshots.iter().enumerate() {
        let count = part.features.len();
        Product {
            m: chunk.tokens,
            n: stride,
            k: count,
            a: Matrix::columns(&chunk.queries[part.features.start * width..], width),
            b: &part.sums[c * count * stride..(c + 1) * count * stride],
            ldb: stride,
            c: &mut answer.numerator,
            ldc: stride,
            into: if i == 0 { Epilogue::Set } else { Epilogue::Continue },
        }
        .run();
        normalizer[part.features.clone()]
            .copy_from_slice(&part.normalizer[c * count..(c + 1) * count]);
    }
    kernel::row_times_matrix(normalizer, &chunk.queries, width, &mut answer.denominator);
}
