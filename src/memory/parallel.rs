//! One long sequence on several threads, with the result of one thread, bit for bit.
//!
//! Blocks of [`BLOCK`] chunks go through two steps, each shared out over the threads: run through
//! the mapped chunks with a part of the features each, which keeps the state before every chunk;
//! answer every chunk from that state, and map one of the next block. A block with values near the
//! largest number, or with log scales that jump within a chunk, is left to one thread; so are sums
//! whose features decay differently.

use super::linear::{
    Chunk, Engine, FEW_TOKENS, Size, State, Tokens, Workspace, decayed, key_factors, unit_ratio,
};
use crate::features::Side;
use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::loops::products::{Epilogue, Matrix, Product};
use crate::kernel::{self, chunk_len};
use crate::memory::answer::{Answer, Readout};
use crate::{Error, Scalar, views};
use core::ops::Range;
use ndarray::{ArrayView2, ArrayViewMut2, Axis};
use std::collections::VecDeque;
use std::sync::Mutex;

/// Chunks that are in work at once.
const BLOCK: usize = 32;

/// Sequences with fewer tokens than this stay on one thread.
const FEWEST: usize = 512;

/// Whether a sequence is worth several threads.
pub(crate) fn pays(tokens: usize) -> bool {
    tokens >= FEWEST && rayon::current_num_threads() > 1
}

/// Working memory of a block.
#[derive(Debug)]
pub(crate) struct Lanes<T> {
    chunks: Vec<Chunk<T>>,
    threads: Vec<Workspace<T>>,
    snapshots: Vec<Snapshots<T>>,
    before: State<T>,
}

impl<T: Scalar> Default for Lanes<T> {
    fn default() -> Self {
        Self {
            chunks: Vec::new(),
            threads: Vec::new(),
            snapshots: Vec::new(),
            before: State::new(),
        }
    }
}

impl<T: Scalar> Lanes<T> {
    /// Makes room for so many chunks on the threads there are.
    fn reserve(&mut self, chunks: usize) {
        while self.chunks.len() < chunks {
            self.chunks.push(Chunk::new());
        }
        while self.threads.len() < rayon::current_num_threads() {
            self.threads.push(Workspace::new());
        }
    }
}

/// Runs `run` in the memory of a thread with the chunk of a lane in it.
fn with_chunk<T: Scalar, R>(
    lane: &mut Chunk<T>,
    work: &mut Workspace<T>,
    run: impl FnOnce(&mut Workspace<T>) -> R,
) -> R {
    core::mem::swap(lane, &mut work.chunk);
    let result = run(work);
    core::mem::swap(lane, &mut work.chunk);
    result
}

/// The sums of some features before every chunk of a block.
#[derive(Debug)]
struct Snapshots<T> {
    features: Range<usize>,
    /// `[chunks, features, value_dim]`, rows padded.
    sums: Buffer<T>,
    /// `[chunks, features]`.
    normalizer: Buffer<T>,
}

/// The causal attention of all whole chunks; returns how many tokens they are. Blocks that one
/// thread must do are given to `in_order`.
#[allow(clippy::too_many_arguments)]
pub(crate) fn extend<T: Scalar>(
    engine: Engine<'_, T>,
    state: &mut State<T>,
    tokens: Tokens<'_, T>,
    out: &mut ArrayViewMut2<'_, T>,
    readout: Readout,
    lanes: &mut Lanes<T>,
    mut in_order: impl FnMut(
        &mut State<T>,
        &mut ArrayViewMut2<'_, T>,
        Range<usize>,
    ) -> Result<(), Error>,
) -> Result<usize, Error> {
    let (features, value_dim) = (engine.num_features(), tokens.v.ncols());
    let chunks = tokens.q.nrows() / chunk_len::<T>();
    lanes.reserve(chunks.min(BLOCK));
    let Lanes { chunks: lanes, threads, snapshots, before } = lanes;
    let map = |work: &mut Workspace<T>, c: usize, lane: &mut Chunk<T>| {
        let rows = c * chunk_len::<T>()..(c + 1) * chunk_len::<T>();
        with_chunk(lane, work, |work| {
            engine.map_tokens(tokens.rows(rows.clone()), work, rows.start)?;
            work.fade_chunk(features);
            Ok(())
        })
    };
    let mut mapped = share(threads, lanes.iter_mut().take(chunks), map);
    for first in (0..chunks).step_by(BLOCK) {
        mapped.into_iter().collect::<Result<(), Error>>()?;
        let count = BLOCK.min(chunks - first);
        let next = BLOCK.min(chunks - first - count);
        let range = first * chunk_len::<T>()..(first + count) * chunk_len::<T>();
        before.copy_from(state);
        let units = units(state, &lanes[..count]);
        if let Some(units) = &units {
            absorb(state, &mut lanes[..count], units, snapshots, threads, true);
        }
        let mut block = views::rows_mut(out.view_mut(), range.clone());
        let outputs = block.axis_chunks_iter_mut(Axis(0), chunk_len::<T>());
        let snapshots = &*snapshots;
        // answers, and the next block mapped into the memory that has done its work
        let steps =
            share(threads, lanes.iter_mut().take(count).zip(outputs), |work, c, (lane, out)| {
                let answered = match &units {
                    Some(units) => {
                        let Unit { before: old, unit } = units[c];
                        let has_past = before.tokens > 0 || c > 0;
                        let (chunk, Workspace { scores, answer, factors, .. }) =
                            (&*lane, &mut *work);
                        answer.resize(chunk_len::<T>(), chunk.width, padded::<T>(value_dim));
                        if has_past {
                            read_snapshots(snapshots, c, chunk, factors, answer);
                            scale_answer(answer, unit_ratio(old, unit));
                        } else {
                            answer.denominator.fill(T::zero());
                        }
                        if chunk.answer_itself(features, value_dim, has_past, unit, scores, answer)
                            || readout == Readout::Unnormalized
                        {
                            answer
                                .write((first + c) * chunk_len::<T>(), readout, out)
                                .map(|()| true)
                        } else {
                            Ok(false)
                        }
                    }
                    None => Ok(false),
                };
                (answered, if c < next { map(work, first + count + c, lane) } else { Ok(()) })
            });
        mapped = Vec::with_capacity(count);
        let mut all_answered = true;
        for (answered, next) in steps {
            mapped.push(next);
            if all_answered {
                all_answered = answered?;
            }
        }
        if !all_answered {
            state.copy_from(before);
            in_order(state, out, range)?;
        }
    }
    Ok(chunks * chunk_len::<T>())
}

/// Runs `run` on a thread of the pool, so that the steps of blocks need not wake another one.
pub(crate) fn inside<R: Send>(run: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| run())
}

/// The tokens from `start` on that go together as a block, if there are any worth it.
pub(crate) fn block<T: Scalar>(start: usize, tokens: usize) -> Option<Range<usize>> {
    let chunks = BLOCK.min((tokens - start) / chunk_len::<T>());
    (chunks > 1).then(|| start..start + chunks * chunk_len::<T>())
}

/// Runs `run` on every item with its index, in the memory of the thread it runs on; the results in
/// order.
///
/// Every thread begins with the same share of neighbours each time, so that what one step of a
/// block left in the caches of a core is there for the next; who is done takes from the end of
/// another's share, so that nobody waits for long.
fn share<T: Scalar, I: Send, R: Send>(
    threads: &mut [Workspace<T>],
    items: impl IntoIterator<Item = I>,
    run: impl Fn(&mut Workspace<T>, usize, I) -> R + Sync,
) -> Vec<R> {
    let mut items: VecDeque<(usize, I)> = items.into_iter().enumerate().collect();
    let count = items.len();
    let size = count.div_ceil(threads.len()).max(1);
    let mut memory = Vec::with_capacity(threads.len());
    let mut shares = Vec::with_capacity(threads.len());
    for work in threads {
        let rest = items.split_off(size.min(items.len()));
        memory.push(Mutex::new((work, Vec::with_capacity(size))));
        shares.push(Mutex::new(items));
        items = rest;
    }
    let next = |thread: usize| {
        let own = shares[thread].lock().ok()?.pop_front();
        own.or_else(|| {
            (1..shares.len())
                .find_map(|i| shares[(thread + i) % shares.len()].lock().ok()?.pop_back())
        })
    };
    rayon::broadcast(|thread| {
        if let Some(mut memory) = memory.get(thread.index()).and_then(|memory| memory.lock().ok()) {
            let (work, results) = &mut *memory;
            while let Some((i, item)) = next(thread.index()) {
                results.push((i, run(work, i, item)));
            }
        }
    });
    let mut results: Vec<(usize, R)> = Vec::with_capacity(count);
    results.extend(
        memory
            .into_iter()
            .filter_map(|memory| memory.into_inner().ok())
            .flat_map(|(_, results)| results),
    );
    results.sort_unstable_by_key(|(i, _)| *i);
    results.into_iter().map(|(_, result)| result).collect()
}

/// What happens to the log scale of the sums in a chunk.
#[derive(Clone, Copy)]
struct Unit<T> {
    /// In two parts, after the decay of the first token.
    before: [T; 2],
    /// In which the chunk is answered and absorbed.
    unit: T,
}

impl<T: Scalar> Unit<T> {
    /// The log scale after the chunk, which lets the sums decay by what its tokens after the first
    /// do.
    fn after(self, chunk: &Chunk<T>) -> [T; 2] {
        let scale = if self.unit > self.before[0] { [self.unit, T::zero()] } else { self.before };
        chunk.faded.map_or(scale, |[_, rest]| decayed(scale, rest))
    }
}

/// The unit of every chunk, if each is one group and no value is large.
fn units<T: Scalar>(state: &State<T>, lanes: &[Chunk<T>]) -> Option<Vec<Unit<T>>> {
    let mut scale = state.scale();
    let mut units = Vec::with_capacity(lanes.len());
    for chunk in lanes {
        let before = chunk.faded.map_or(scale, |[first, _]| decayed(scale, first));
        let (end, unit) = chunk.group(0, before[0]);
        if end < chunk.tokens || chunk.tokens < FEW_TOKENS || chunk.values_size == Size::Large {
            return None;
        }
        units.push(Unit { before, unit });
        scale = units[units.len() - 1].after(chunk);
    }
    Some(units)
}

/// Absorbs mapped chunks, each thread a range of the features.
fn absorb<T: Scalar>(
    state: &mut State<T>,
    lanes: &mut [Chunk<T>],
    units: &[Unit<T>],
    snapshots: &mut Vec<Snapshots<T>>,
    threads: &mut [Workspace<T>],
    keep: bool,
) {
    let (features, stride, chunks) = (state.features(), state.stride(), lanes.len());
    let after = units.iter().zip(&*lanes).next_back().map(|(unit, chunk)| unit.after(chunk));
    let had_tokens = state.tokens > 0;
    // whole tiles of a product, several for each thread
    let height = features.div_ceil(4 * threads.len()).next_multiple_of(8);
    // the keys of every chunk by ranges of features
    let mut keys: Vec<Vec<&mut [T]>> =
        (0..features.div_ceil(height)).map(|_| Vec::with_capacity(chunks)).collect();
    let mut rest: Vec<(&Buffer<T>, &Buffer<T>)> = Vec::with_capacity(chunks);
    for chunk in lanes {
        state.size = state.size.max(chunk.values_size);
        let parts = chunk.keys[..features * chunk.width].chunks_mut(height * chunk.width);
        keys.iter_mut().zip(parts).for_each(|(keys, part)| keys.push(part));
        rest.push((&chunk.key_scale, &chunk.values));
    }
    let sums =
        state.sums.chunks_mut(height * stride).zip(state.sums_low.chunks_mut(height * stride));
    let normalizer =
        state.normalizer.chunks_mut(height).zip(state.normalizer_low.chunks_mut(height));
    snapshots.resize_with(keys.len(), || Snapshots {
        features: 0..0,
        sums: Buffer::new(),
        normalizer: Buffer::new(),
    });
    let parts = sums.zip(normalizer).zip(keys).zip(snapshots);
    share(
        threads,
        parts,
        |work, i, ((((sums, low), (normalizer, normalizer_low)), keys), snapshots)| {
            let count = normalizer.len();
            snapshots.features = i * height..i * height + count;
            if keep {
                snapshots.sums.resize(chunks * count * stride);
                snapshots.normalizer.resize(chunks * count);
            }
            let Workspace { factors, key_sums, .. } = work;
            key_sums.resize(count);
            for (c, (keys, (key_scale, values))) in keys.into_iter().zip(&rest).enumerate() {
                if keep {
                    snapshots.sums[c * count * stride..(c + 1) * count * stride]
                        .copy_from_slice(sums);
                    snapshots.normalizer[c * count..(c + 1) * count].copy_from_slice(normalizer);
                }
                let Unit { before, unit } = units[c];
                if unit > before[0] && (had_tokens || c > 0) {
                    let factor = unit_ratio(before, unit);
                    for part in [&mut *sums, &mut *low, &mut *normalizer, &mut *normalizer_low] {
                        kernel::scale(part, factor);
                    }
                }
                key_factors(key_scale, unit, values.len() / stride, factors);
                kernel::scale_and_sum_rows(keys, factors, key_sums);
                Product {
                    m: count,
                    n: stride,
                    k: values.len() / stride,
                    a: Matrix::rows(keys, factors.len()),
                    b: values,
                    ldb: stride,
                    c: sums,
                    ldc: stride,
                    into: Epilogue::Compensated(low),
                }
                .run();
                kernel::add_compensated(normalizer, normalizer_low, T::one(), key_sums);
            }
        },
    );
    state.set_scale(after.unwrap_or(state.scale()));
    state.tokens += chunks * chunk_len::<T>();
}

/// Sets the answer of a chunk to what the state before it says.
fn read_snapshots<T: Scalar>(
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
            into: if i == 0 { Epilogue::Set } else { Epilogue::Add },
        }
        .run();
        normalizer[part.features.clone()]
            .copy_from_slice(&part.normalizer[c * count..(c + 1) * count]);
    }
    kernel::row_times_matrix(normalizer, &chunk.queries, width, &mut answer.denominator);
}

fn scale_answer<T: Scalar>(answer: &mut Answer<T>, factor: T) {
    if factor != T::one() {
        kernel::scale(&mut answer.numerator, factor);
        kernel::scale(&mut answer.denominator, factor);
    }
}

/// Absorbs whole chunks; `None` says that one thread must do it, and that the state is as it was.
pub(crate) fn absorb_only<T: Scalar>(
    engine: Engine<'_, T>,
    state: &mut State<T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    lanes: &mut Lanes<T>,
) -> Option<Result<(), Error>> {
    let chunks = k.nrows() / chunk_len::<T>();
    lanes.reserve(chunks);
    let Lanes { chunks: lanes, threads, snapshots, .. } = lanes;
    let lanes = &mut lanes[..chunks];
    let mapped = share(threads, lanes.iter_mut(), |work, c, lane| {
        let rows = c * chunk_len::<T>()..(c + 1) * chunk_len::<T>();
        with_chunk(lane, work, |work| {
            work.chunk.resize(chunk_len::<T>(), engine.num_features(), v.ncols());
            work.chunk.faded = None;
            engine.map(Side::Key, views::rows(k, rows.clone()), work, rows.start)?;
            work.chunk
                .set_values(views::rows(v, rows.clone()))
                .map_err(|error| error.in_chunk(rows.start))
        })
    });
    if let Err(error) = mapped.into_iter().collect::<Result<(), Error>>() {
        return Some(Err(error));
    }
    if lanes.iter().any(|chunk| chunk.values_size == Size::Large) {
        return None;
    }
    let mut scale = state.scale();
    let raise = |chunk: &Chunk<T>| {
        let unit =
            chunk.key_scale[..chunk_len::<T>()].iter().fold(scale[0], |m, &scale| m.max(scale));
        let unit = Unit { before: scale, unit };
        scale = unit.after(chunk);
        unit
    };
    let units: Vec<Unit<T>> = lanes.iter().map(raise).collect();
    absorb(state, lanes, &units, snapshots, threads, false);
    Some(Ok(()))
}

/// Answers whole chunks of queries from one state.
pub(crate) fn read<T: Scalar>(
    engine: Engine<'_, T>,
    state: &State<T>,
    q: ArrayView2<'_, T>,
    out: &mut ArrayViewMut2<'_, T>,
    readout: Readout,
    lanes: &mut Lanes<T>,
) -> Result<(), Error> {
    lanes.reserve(0);
    let answered = share(
        &mut lanes.threads,
        out.axis_chunks_iter_mut(Axis(0), chunk_len::<T>()),
        |work, c, mut out| {
            let q = views::rows(q, c * chunk_len::<T>()..(c + 1) * chunk_len::<T>());
            engine
                .read(state, q, work, |start, answer| {
                    let rows = start..start + answer.tokens;
                    answer.write(start, readout, views::rows_mut(out.view_mut(), rows))
                })
                .map_err(|error| error.in_chunk(c * chunk_len::<T>()))
        },
    );
    answered.into_iter().collect()
}
