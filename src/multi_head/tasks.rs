//! The calls of a layer: what each unit of heads computes, one after the other or on threads.

use crate::attention::Attention;
use crate::attention::call::Head;
use crate::attention::scratch::Scratch;
use crate::attention::sharing::Sharing;
use crate::attention::threads::Threads;
use crate::error::{Error, LayerHead};
use crate::mask::Mask;
use crate::multi_head::layout::{HeadUnit, Padding, in_head};
use crate::multi_head::places::Places;
use crate::multi_head::record::LayerRecord;
use crate::multi_head::rows::Rows;
use crate::scalar::Scalar;
use crate::views::{head, heads, pairs};
use core::ops::Range;
use ndarray::{ArrayView4, ArrayViewMut3, ArrayViewMut4, Axis, Slice};
use std::sync::Arc;

/// A call of a layer but for its outputs.
#[derive(Clone, Copy)]
pub(crate) struct LayerCall<'a, T> {
    pub(crate) q: ArrayView4<'a, T>,
    pub(crate) k: ArrayView4<'a, T>,
    pub(crate) v: ArrayView4<'a, T>,
    pub(crate) log_decay: Option<ArrayView4<'a, T>>,
    pub(crate) bias: Option<ArrayView4<'a, T>>,
    /// Query heads of a kv head.
    pub(crate) group: usize,
    /// Real keys of each sequence; all where there is none.
    pub(crate) lengths: Option<&'a [usize]>,
    pub(crate) padding: Padding,
    /// Where it is causal, queries beyond the real keys are padding as well.
    pub(crate) mask: Mask,
    /// Tokens of a stream before these.
    pub(crate) before: usize,
    /// Where the tokens come from, if they were gathered: for rows in errors.
    pub(crate) places: Option<&'a Places>,
}

impl<'a, T: Scalar> LayerCall<'a, T> {
    /// The real queries and keys of a sequence. Without keys there is nothing to answer.
    pub(super) fn real(&self, sequence: usize) -> [Range<usize>; 2] {
        let (queries, tokens) = (self.q.dim().2, self.k.dim().2);
        let keys = match self.lengths {
            Some(lengths) => self.padding.real(lengths[sequence], tokens),
            None => 0..tokens,
        };
        let is_left = self.lengths.is_some() && self.padding == Padding::Left;
        let queries = match self.mask {
            _ if keys.is_empty() => 0..0,
            Mask::CausalTail => {
                let most = queries.min(keys.len());
                let count = self.places.map_or(most, |places| places.queries_of(sequence));
                queries - count..queries
            }
            Mask::Full if !is_left => 0..queries,
            Mask::Causal | Mask::Full => keys.clone(),
        };
        [queries, keys]
    }

    /// An error of a unit, of the head in which it is found; rows are those of the arrays.
    #[cold]
    pub(crate) fn error(&self, sequence: usize, unit: &HeadUnit, mut error: Error) -> Error {
        if matches!(error, Error::Unsupported { .. }) {
            return error; // such a call is refused whatever the sequences hold
        }
        let [queries, keys] = self.real(sequence);
        let of_keys = keys.start;
        let kv_heads = unit.all_kv_heads(self.group);
        if let Error::NotFinite { which: "bias", column, .. } = &mut error {
            let key = of_keys + *column;
            *column = self.places.map_or(key, |places| places.key(sequence, key));
        }
        let head = match &mut error {
            Error::NotFinite { which, row, column } => {
                let first = if *which == "q" { queries.start } else { of_keys };
                let find = |x: &ArrayView4<'_, T>, heads: Vec<usize>| {
                    let is_bad = |&head: &usize| {
                        let number = x.get([sequence, head, first + *row, *column]);
                        number.is_some_and(|x| !x.is_finite())
                    };
                    heads.into_iter().find(is_bad)
                };
                match *which {
                    "q" => find(&self.q, unit.query_heads(self.group)).map(LayerHead::Query),
                    "k" => find(&self.k, kv_heads).map(LayerHead::Kv),
                    "v" => find(&self.v, kv_heads).map(LayerHead::Kv),
                    _ => None,
                }
            }
            Error::InvalidOption { which: "log_decay", found, .. } => {
                let gates = self.log_decay.map(|x| head(&x, sequence, kv_heads[0], keys));
                let mut gates = gates.iter().flat_map(|gates| gates.indexed_iter());
                let bad = gates.find(|(_, gate)| gate.is_nan() || **gate > T::zero());
                if let Some(((row, column), bad)) = bad {
                    let row = self.places.map_or(row, |places| places.key(sequence, row));
                    *found = format!("{bad} at row {}, column {column}", of_keys + row);
                }
                Some(LayerHead::Kv(kv_heads[0]))
            }
            _ => None,
        };
        let of_key = matches!(
            error,
            Error::NotFinite { which: "k" | "v", .. }
                | Error::Overflow { which: "the gradient by `k`" | "the gradient by `v`", .. }
        );
        let error = error.in_chunk(if of_key { of_keys } else { queries.start });
        let error = self.in_place(sequence, of_key, error);
        match head {
            Some(head) => in_head(sequence, head, error),
            None => unit.error(sequence, error),
        }
    }

    /// The same error, with the row that a gathered token comes from.
    pub(super) fn in_place(&self, sequence: usize, of_key: bool, error: Error) -> Error {
        let Some(places) = self.places else { return error };
        let of = if of_key { Places::key } else { Places::query };
        error.map_row(|row| of(places, sequence, row))
    }

    /// The head of the query heads from `first` on, as many as there are outputs
    /// `[heads, n, d_v]`; what lies beside the real queries there becomes zero.
    fn head<'b>(&self, sequence: usize, first: usize, out: ArrayViewMut3<'b, T>) -> Head<'b, T>
    where
        'a: 'b,
    {
        let Self { q, k, v, log_decay, bias, group, .. } = self;
        let [queries, keys] = self.real(sequence);
        let query_heads = first..first + out.len_of(Axis(0));
        let kv = first / group;
        let out = if queries.len() < out.len_of(Axis(1)) {
            let (out, mut after) = out.split_at(Axis(1), queries.end);
            let (mut before, out) = out.split_at(Axis(1), queries.start);
            before.fill(T::zero());
            after.fill(T::zero());
            out
        } else {
            out
        };
        Head {
            q: heads(q, sequence, query_heads.clone(), queries.clone()),
            k: head(k, sequence, kv, keys.clone()),
            v: head(v, sequence, kv, keys.clone()),
            log_decay: log_decay.map(|x| head(&x, sequence, kv, keys.clone())),
            key_mask: None,
            bias: bias.map(|bias| {
                let keys = if self.before > 0 { 0..self.before + keys.end } else { keys };
                pairs(&bias, sequence, query_heads, [queries, keys])
            }),
            probes: 0,
            out,
            log_normalizer: None,
            checkpoints: None,
        }
    }

    /// Runs `run` with the heads of a unit. `memory` is for the heads of a pool.
    #[inline]
    pub(crate) fn with_unit<R>(
        &self,
        sequence: usize,
        unit: &HeadUnit,
        out: &mut ArrayViewMut4<'_, T>,
        memory: &mut Vec<Head<'static, T>>,
        run: impl FnOnce(&mut [Head<'_, T>]) -> R,
    ) -> R {
        let mut out = out.index_axis_mut(Axis(0), sequence);
        let (first, count) = match unit {
            HeadUnit::Query(h) => (*h, 1),
            HeadUnit::Group(kv) => (kv * self.group, self.group),
            HeadUnit::Pool(pool) => {
                let mut calls = recycled(core::mem::take(memory));
                let of_kv = out.axis_chunks_iter_mut(Axis(0), self.group).enumerate();
                calls.extend(
                    of_kv
                        .filter(|(kv, _)| pool.contains(kv))
                        .map(|(kv, out)| self.head(sequence, kv * self.group, out)),
                );
                let result = run(&mut calls);
                *memory = recycled(calls);
                return result;
            }
        };
        out.slice_axis_inplace(Axis(0), Slice::from(first..first + count));
        run(&mut [self.head(sequence, first, out)])
    }

    /// Every unit of every sequence, in the order of [`tasks`](Self::tasks).
    pub(crate) fn sequence_units<'u>(
        &self,
        units: &'u [HeadUnit],
    ) -> impl Iterator<Item = (usize, &'u HeadUnit)> + use<'u, T> {
        (0..self.q.dim().0).flat_map(|sequence| units.iter().map(move |unit| (sequence, unit)))
    }

    /// The heads of every unit, sequence after sequence, unit after unit.
    pub(crate) fn tasks<'b>(
        &self,
        units: &[HeadUnit],
        mut out: ArrayViewMut4<'b, T>,
    ) -> Vec<Vec<Head<'b, T>>>
    where
        'a: 'b,
    {
        let ((batch, query_heads, ..), group) = (out.dim(), self.group);
        let mut all = Vec::with_capacity(batch * units.len());
        for sequence in 0..batch {
            let (first, rest) = out.split_at(Axis(0), 1);
            out = rest;
            let mut left = first.index_axis_move(Axis(0), 0);
            let mut of_kv = Vec::with_capacity(query_heads / group);
            while left.len_of(Axis(0)) > 0 {
                let (first, rest) = left.split_at(Axis(0), group);
                of_kv.push(Some(first));
                left = rest;
            }
            for unit in units {
                let mut take =
                    |kv: usize| of_kv[kv].take().map(|out| self.head(sequence, kv * group, out));
                all.push(match unit {
                    // units of query heads are in order: the first that is left is the one
                    HeadUnit::Query(h) => {
                        let split = of_kv[h / group].take().map(|out| out.split_at(Axis(0), 1));
                        let (first, rest) = split.unzip();
                        of_kv[h / group] = rest;
                        first.map(|out| self.head(sequence, *h, out)).into_iter().collect()
                    }
                    HeadUnit::Group(kv) => take(*kv).into_iter().collect(),
                    HeadUnit::Pool(pool) => pool.iter().filter_map(|&kv| take(kv)).collect(),
                });
            }
        }
        all
    }
}

impl<T: Scalar> LayerCall<'_, T> {
    /// Attends in every head, with one kernel for each query head.
    pub(crate) fn forward(
        &self,
        kernels: &[Arc<dyn Attention<T>>],
        units: &[HeadUnit],
        out: ArrayViewMut4<'_, T>,
        record: Option<&mut LayerRecord<T>>,
    ) -> Result<(), Error> {
        let (group, mask) = (self.group, self.mask);
        let mut tasks = Vec::with_capacity(kernels.len());
        for unit in units {
            match unit {
                // query heads that do not depend on each other are tasks of their own
                HeadUnit::Group(kv) if kernels[kv * group].sharing() == Sharing::Head => {
                    tasks.extend((kv * group..(kv + 1) * group).map(HeadUnit::Query));
                }
                _ => tasks.push(unit.clone()),
            }
        }
        let mut heads = self.tasks(&tasks, out);
        if let Some(record) = record {
            let units = self.sequence_units(units).map(|(_, unit)| unit);
            record.attach(kernels, units, group, &mut heads);
        }
        let calls = heads.into_iter().zip(self.sequence_units(&tasks)).collect();
        for_each(calls, Scratch::with_threads, |scratch, (mut heads, (sequence, unit))| {
            let kernel = &kernels[unit.first_query_head(group)];
            let result = if let [head] = &mut heads[..] {
                scratch.with_part(|rows: &mut Rows<T>, scratch| {
                    kernel.forward_heads(&mut [rows.of_head(head)], mask, scratch)
                })
            } else {
                kernel.forward_heads(&mut heads, mask, scratch)
            };
            result.map_err(|error| self.error(sequence, unit, error))
        })
    }
}

/// A vector without elements in the memory of another.
fn recycled<'b, T>(mut heads: Vec<Head<'_, T>>) -> Vec<Head<'b, T>> {
    heads.clear();
    // an iterator of nothing, collected in place
    heads.into_iter().map_while(|_| None).collect()
}

/// Numbers read, below which waking other threads (some 70 µs, if they sleep) takes longer than
/// they save: a decode step of states of constant size, or of eight heads over 2 000 keys.
const WORTH_A_THREAD: usize = 1 << 21;

/// Whether so many tasks, which together read so many numbers, are shared out over threads.
pub(crate) fn are_shared_out(tasks: usize, reads: usize) -> bool {
    cfg!(feature = "rayon") && tasks > 1 && reads >= WORTH_A_THREAD
}

/// The threads that each of so many tasks may use: where there are enough tasks for all, one.
pub(crate) fn threads_of_each(tasks: usize) -> Threads {
    if tasks >= all_threads() { Threads::One } else { Threads::Pool }
}

/// Threads for so many tasks.
pub(crate) fn threads_at_most(tasks: usize) -> usize {
    all_threads().min(tasks).max(1)
}

/// Those of the pool.
fn all_threads() -> usize {
    #[cfg(feature = "rayon")]
    let threads = rayon::current_num_threads();
    #[cfg(not(feature = "rayon"))]
    let threads = 1;
    threads
}

/// Runs every task, in parts of which this thread takes the first and others of the pool the rest:
/// for what is so short that handing all of it over would take longer than it saves. The error of
/// the first that failed, in order.
#[cfg(feature = "rayon")]
pub(crate) fn share_out<I: Send>(
    tasks: Vec<I>,
    run: impl Fn(I) -> Result<(), Error> + Sync,
) -> Result<(), Error> {
    let each = tasks.len().div_ceil(threads_at_most(tasks.len())).max(1);
    let mut results = vec![Ok(()); tasks.len().div_ceil(each)];
    let (mut tasks, run) = (tasks.into_iter(), &run);
    let mut parts =
        results.iter_mut().map(|to| (to, tasks.by_ref().take(each).collect::<Vec<_>>()));
    rayon::in_place_scope(|scope| {
        let first = parts.next();
        for (to, part) in parts {
            scope.spawn(move |_| *to = part.into_iter().try_for_each(run));
        }
        if let Some((to, part)) = first {
            *to = part.into_iter().try_for_each(run);
        }
    });
    results.into_iter().collect()
}

/// As with feature `rayon`, on one thread.
#[cfg(not(feature = "rayon"))]
pub(crate) fn share_out<I>(
    tasks: Vec<I>,
    run: impl Fn(I) -> Result<(), Error>,
) -> Result<(), Error> {
    tasks.into_iter().try_for_each(run)
}

/// Runs every task, shared out over the threads there are, in memory that each thread makes for
/// itself; the error of the first that failed, in order.
#[cfg(feature = "rayon")]
pub(crate) fn for_each<I: Send, W: Send>(
    tasks: Vec<I>,
    memory: impl Fn(Threads) -> W + Send + Sync,
    run: impl Fn(&mut W, I) -> Result<(), Error> + Send + Sync,
) -> Result<(), Error> {
    use rayon::prelude::*;
    if tasks.len() == 1 {
        let mut memory = memory(Threads::Pool);
        return tasks.into_iter().try_for_each(|task| run(&mut memory, task));
    }
    let threads = threads_of_each(tasks.len());
    let results: Vec<_> = tasks.into_par_iter().map_init(|| memory(threads), run).collect();
    results.into_iter().collect()
}

/// As with feature `rayon`, on one thread.
#[cfg(not(feature = "rayon"))]
pub(crate) fn for_each<I, W>(
    tasks: Vec<I>,
    memory: impl Fn(Threads) -> W,
    run: impl Fn(&mut W, I) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut memory = memory(Threads::One);
    tasks.into_iter().try_for_each(|task| run(&mut memory, task))
}
