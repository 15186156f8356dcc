//! One long sequence on several threads, with the result of one thread, bit for bit.
//!
//! Blocks of [`BLOCK`] chunks go through two steps, each shared out over the threads: run through
//! the mapped chunks with a part of the features each, which keeps the state before every chunk;
//! answer every chunk from that state, and map one of the next block. A block with values near the
//! largest number, or with log scales that jump within a chunk, is left to one thread; so are sums
//! whose features decay differently.

mod scan;
mod share;

use crate::error::Error;
use crate::features::side::Side;
use crate::kernel::buffer::padded;
use crate::kernel::chunk_len;
use crate::memory::answer::Readout;
use crate::memory::linear::bounds::Size;
use crate::memory::linear::chunk::Chunk;
use crate::memory::linear::gates::Rates;
use crate::memory::linear::pass::{Pass, PassBuffers, Tokens};
use crate::memory::linear::state::State;
use crate::memory::linear::steps::{self, StepBuffers};
use crate::memory::linear::threads::scan::{ChunkScale, Snapshots, absorbed_scales, causal_scales};
use crate::memory::linear::threads::share::share;
use crate::scalar::Scalar;
use crate::views;
use core::ops::Range;
use ndarray::{ArrayView2, ArrayViewMut2, Axis};

/// Chunks that are in work at once.
const BLOCK: usize = 32;

/// Sequences with fewer tokens than this stay on one thread.
const FEWEST: usize = 512;

/// Whether a sequence is worth several threads.
pub(super) fn pays(tokens: usize) -> bool {
    tokens >= FEWEST && rayon::current_num_threads() > 1
}

/// The tokens from `start` on that go together as a block, if there are any worth it.
pub(super) fn block<T: Scalar>(start: usize, tokens: usize) -> Option<Range<usize>> {
    let chunks = BLOCK.min((tokens - start) / chunk_len::<T>());
    (chunks > 1).then(|| start..start + chunks * chunk_len::<T>())
}

/// Runs `run` on a thread of the pool, so that the steps of blocks need not wake another one.
pub(super) fn inside<R: Send>(run: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| run())
}

/// Working memory of a block.
#[derive(Debug)]
pub(super) struct ThreadMemory<T> {
    chunks: Vec<Chunk<T>>,
    threads: Vec<PassBuffers<T>>,
    snapshots: Vec<Snapshots<T>>,
    before: State<T>,
}

impl<T: Scalar> ThreadMemory<T> {
    pub(super) fn new() -> Self {
        Self {
            chunks: Vec::new(),
            threads: Vec::new(),
            snapshots: Vec::new(),
            before: State::new(),
        }
    }

    /// Makes room for so many chunks on the threads there are.
    fn reserve(&mut self, chunks: usize) {
        while self.chunks.len() < chunks {
            self.chunks.push(Chunk::new());
        }
        while self.threads.len() < rayon::current_num_threads() {
            self.threads.push(PassBuffers::new());
        }
    }
}

/// Runs `run` in the memory of a thread with another chunk in it.
fn with_chunk<T: Scalar, R>(
    chunk: &mut Chunk<T>,
    buffers: &mut PassBuffers<T>,
    run: impl FnOnce(&mut PassBuffers<T>) -> R,
) -> R {
    core::mem::swap(chunk, &mut buffers.chunk);
    let result = run(buffers);
    core::mem::swap(chunk, &mut buffers.chunk);
    result
}

/// Shifts the log scales of the chunk by the decay of its tokens, the same for all features.
fn decay_chunk<T: Scalar>(buffers: &mut PassBuffers<T>, features: usize) {
    let PassBuffers { chunk, gates, .. } = buffers;
    chunk.decay = None;
    if gates.rates() == Rates::Common {
        gates.sum_from(0, false);
        gates.decay_group(chunk, features, 0..chunk.tokens);
        chunk.decay = Some([gates.row(0)[0], gates.since(chunk.tokens - 1)[0]]);
    }
}

/// The causal attention of all whole chunks; returns how many tokens they are. Blocks that one
/// thread must do are done in `in_order`.
pub(super) fn extend<T: Scalar>(
    pass: Pass<'_, T>,
    state: &mut State<T>,
    tokens: Tokens<'_, T>,
    out: &mut ArrayViewMut2<'_, T>,
    readout: Readout,
    memory: &mut ThreadMemory<T>,
    in_order: &mut PassBuffers<T>,
) -> Result<usize, Error> {
    let features = pass.num_features();
    let count = tokens.q.nrows() / chunk_len::<T>();
    memory.reserve(count.min(BLOCK));
    state.settle();
    let ThreadMemory { chunks, threads, snapshots, before } = memory;
    let map = |buffers: &mut PassBuffers<T>, c: usize, chunk: &mut Chunk<T>| {
        let rows = c * chunk_len::<T>()..(c + 1) * chunk_len::<T>();
        with_chunk(chunk, buffers, |buffers| {
            pass.map_tokens(tokens.rows(rows.clone()), buffers, rows.start)?;
            decay_chunk(buffers, features);
            Ok(())
        })
    };
    let mut mapped = share(threads, chunks.iter_mut().take(count), map);
    for first in (0..count).step_by(BLOCK) {
        mapped.into_iter().collect::<Result<(), Error>>()?;
        let here = BLOCK.min(count - first);
        let next = BLOCK.min(count - first - here);
        let range = first * chunk_len::<T>()..(first + here) * chunk_len::<T>();
        before.copy_from(state);
        if let Some(checkpoints) = &mut in_order.checkpoints {
            checkpoints.offer(tokens.q.nrows(), state);
        }
        let scales = causal_scales(state, &chunks[..here]);
        if let Some(scales) = &scales {
            scan::absorb(state, &mut chunks[..here], scales, snapshots, threads, true);
        }
        let block = Block {
            row: range.start,
            features,
            readout,
            had_tokens: before.tokens > 0,
            snapshots,
            scales,
        };
        let mut rows = views::rows_mut(out.view_mut(), range.clone());
        let outputs = rows.axis_chunks_iter_mut(Axis(0), chunk_len::<T>());
        // answers, and the next block mapped into the memory that has done its work
        let done = share(
            threads,
            chunks.iter_mut().take(here).zip(outputs),
            |buffers, c, (chunk, out)| {
                let answered = block.answer(c, chunk, out, buffers);
                (answered, if c < next { map(buffers, first + here + c, chunk) } else { Ok(()) })
            },
        );
        mapped = Vec::with_capacity(here);
        let mut all_answered = true;
        for (answered, next) in done {
            mapped.push(next);
            if all_answered {
                all_answered = answered?;
            }
        }
        if !all_answered {
            state.copy_from(before);
            pass.extend_in_order(state, tokens, out, readout, in_order, range, true)?;
        }
    }
    Ok(count * chunk_len::<T>())
}

/// What the answers of a block need to know.
struct Block<'a, T> {
    /// Its first row.
    row: usize,
    features: usize,
    readout: Readout,
    /// Whether there were tokens before the block.
    had_tokens: bool,
    snapshots: &'a [Snapshots<T>],
    scales: Option<Vec<ChunkScale<T>>>,
}

impl<T: Scalar> Block<'_, T> {
    /// Answers the queries of chunk `c` from the sums before it and from the chunk itself; `false`
    /// says that one thread must do it.
    fn answer(
        &self,
        c: usize,
        chunk: &Chunk<T>,
        out: ArrayViewMut2<'_, T>,
        buffers: &mut PassBuffers<T>,
    ) -> Result<bool, Error> {
        let Some(scales) = &self.scales else { return Ok(false) };
        let ChunkScale { before, common } = scales[c];
        let (value_dim, has_past) = (out.ncols(), self.had_tokens || c > 0);
        let PassBuffers { step: StepBuffers { scores, factors, .. }, answer, .. } = buffers;
        answer.resize(chunk.tokens, chunk.width, padded::<T>(value_dim));
        if has_past {
            scan::read(self.snapshots, c, chunk, factors, answer);
            steps::scale_answer(answer, before.ratio_to(common));
        }
        steps::read_tokens(chunk, self.features, value_dim, has_past, scores, answer);
        let divisible = answer.set_scales(&chunk.query_scale, common);
        if divisible || self.readout == Readout::Unnormalized {
            answer.write(self.row + c * chunk_len::<T>(), self.readout, out).map(|()| true)
        } else {
            Ok(false)
        }
    }
}

/// Absorbs whole chunks; `None` says that one thread must do it, and that the state is as it was.
pub(super) fn absorb<T: Scalar>(
    pass: Pass<'_, T>,
    state: &mut State<T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    memory: &mut ThreadMemory<T>,
) -> Option<Result<(), Error>> {
    let count = k.nrows() / chunk_len::<T>();
    memory.reserve(count);
    state.settle();
    let ThreadMemory { chunks, threads, snapshots, .. } = memory;
    let chunks = &mut chunks[..count];
    let mapped = share(threads, chunks.iter_mut(), |buffers, c, chunk| {
        let rows = c * chunk_len::<T>()..(c + 1) * chunk_len::<T>();
        with_chunk(chunk, buffers, |buffers| {
            buffers.chunk.resize(chunk_len::<T>(), pass.num_features(), v.ncols());
            buffers.chunk.decay = None;
            pass.map(Side::Key, views::rows(k, rows.clone()), buffers, rows.start)?;
            buffers
                .chunk
                .set_values(views::rows(v, rows.clone()))
                .map_err(|error| error.in_chunk(rows.start))
        })
    });
    if let Err(error) = mapped.into_iter().collect::<Result<(), Error>>() {
        return Some(Err(error));
    }
    if chunks.iter().any(|chunk| chunk.values_size == Size::Large) {
        return None;
    }
    let scales = absorbed_scales(state, chunks);
    scan::absorb(state, chunks, &scales, snapshots, threads, false);
    Some(Ok(()))
}

/// Answers whole chunks of queries from one state.
pub(super) fn read<T: Scalar>(
    pass: Pass<'_, T>,
    state: &State<T>,
    q: ArrayView2<'_, T>,
    out: &mut ArrayViewMut2<'_, T>,
    readout: Readout,
    memory: &mut ThreadMemory<T>,
) -> Result<(), Error> {
    memory.reserve(0);
    let answered = share(
        &mut memory.threads,
        out.axis_chunks_iter_mut(Axis(0), chunk_len::<T>()),
        |buffers, c, mut out| {
            let q = views::rows(q, c * chunk_len::<T>()..(c + 1) * chunk_len::<T>());
            pass.read(state, q, buffers, |start, answer| {
                let rows = start..start + answer.tokens;
                answer.write(start, readout, views::rows_mut(out.view_mut(), rows))
            })
            .map_err(|error| error.in_chunk(c * chunk_len::<T>()))
        },
    );
    answered.into_iter().collect()
}
