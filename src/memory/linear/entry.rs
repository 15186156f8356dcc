//! Where tokens enter: on one thread, or on several where the sequence is worth them.

use crate::error::Error;
use crate::kernel::chunk_len;
use crate::memory::answer::Readout;
use crate::memory::linear::checkpoints::SumCheckpoints;
use crate::memory::linear::gates::check_gates;
use crate::memory::linear::pass::{Pass, PassBuffers, Tokens};
use crate::memory::linear::state::State;
use crate::memory::linear::step::HeldStep;
#[cfg(feature = "rayon")]
use crate::memory::linear::threads::{self, ThreadMemory};
use crate::scalar::Scalar;
use crate::views;
use ndarray::{ArrayView2, ArrayViewMut2};

/// Working memory. It grows to the largest chunk it has met; between the two halves of a
/// decode step it holds what was mapped, and else nothing.
#[derive(Debug)]
pub(crate) struct Workspace<T> {
    pub(super) pass: PassBuffers<T>,
    pub(super) step: HeldStep<T>,
    /// The state before a group of query heads.
    pub(super) group: State<T>,
    /// Whether long sequences may be shared out over threads, and the memory for that.
    #[cfg(feature = "rayon")]
    parallel: bool,
    #[cfg(feature = "rayon")]
    threads: ThreadMemory<T>,
}

impl<T: Scalar> Workspace<T> {
    pub(crate) fn new() -> Self {
        Self {
            pass: PassBuffers::new(),
            step: HeldStep::new(),
            group: State::new(),
            #[cfg(feature = "rayon")]
            parallel: true,
            #[cfg(feature = "rayon")]
            threads: ThreadMemory::new(),
        }
    }

    /// Whether long sequences may be shared out over the threads of the pool.
    #[cfg_attr(
        not(feature = "rayon"),
        allow(clippy::unused_self, clippy::needless_pass_by_ref_mut)
    )]
    pub(crate) fn set_threads(&mut self, may_be_several: bool) {
        #[cfg(feature = "rayon")]
        {
            self.parallel = may_be_several;
        }
        #[cfg(not(feature = "rayon"))]
        let _ = may_be_several;
    }
}

impl<T: Scalar> Workspace<T> {
    /// Runs a forward pass over so many tokens that keeps sums on the way, if it is to.
    pub(crate) fn keeping(
        &mut self,
        checkpoints: Option<&mut SumCheckpoints<T>>,
        tokens: usize,
        run: impl FnOnce(&mut Self) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Some(checkpoints) = checkpoints else { return run(self) };
        checkpoints.clear();
        self.pass.checkpoints = Some(core::mem::take(checkpoints));
        let result = run(self);
        *checkpoints = self.pass.checkpoints.take().unwrap_or_default();
        match &result {
            Ok(()) => checkpoints.end(tokens),
            Err(_) => checkpoints.clear(),
        }
        result
    }
}

/// The error of the tail of a sequence that began at key `first`.
#[cold]
pub(super) fn of_tail<T: Scalar>(
    error: Error,
    first: usize,
    log_decay: Option<ArrayView2<'_, T>>,
) -> Error {
    match (&error, log_decay) {
        // which names the row
        (Error::InvalidOption { .. }, Some(all)) => check_gates(all, 0).err().unwrap_or(error),
        _ => error.of_tail(first),
    }
}

impl<T: Scalar> Pass<'_, T> {
    /// Causal attention of new tokens: each query sees the tokens absorbed before and the new ones
    /// up to its own. `keep` says whether the state will be needed afterwards. The shapes have been
    /// checked. On an error with several tokens the state is left half-way.
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
        if work.parallel && threads::pays(n) && self.decays_alike(tokens.log_decay) {
            let Workspace { pass, threads: memory, .. } = work;
            return threads::inside(|| {
                let done = threads::extend(*self, state, tokens, &mut out, readout, memory, pass)?;
                self.extend_in_order(state, tokens, &mut out, readout, pass, done..n, keep)
            });
        }
        self.extend_in_order(state, tokens, &mut out, readout, &mut work.pass, 0..n, keep)
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
        if work.parallel && threads::pays(n) && !self.decays() {
            let mut start = 0;
            while let Some(range) = threads::block::<T>(start, n) {
                let part = |x| views::rows(x, range.clone());
                match threads::absorb(*self, state, part(k), part(v), &mut work.threads) {
                    Some(result) => result.map_err(|error| error.in_chunk(start))?,
                    None => self.absorb_in_order(state, k, v, &mut work.pass, range.clone())?,
                }
                start = range.end;
            }
            return self.absorb_in_order(state, k, v, &mut work.pass, start..n);
        }
        self.absorb_in_order(state, k, v, &mut work.pass, 0..n)
    }

    /// Causal attention of the queries of some heads that stand at the last tokens, to all of them.
    pub(crate) fn tail<'a>(
        &self,
        state: &mut State<T>,
        heads: impl Iterator<Item = (ArrayView2<'a, T>, ArrayViewMut2<'a, T>)>,
        [k, v]: [ArrayView2<'a, T>; 2],
        log_decay: Option<ArrayView2<'a, T>>,
        readout: Readout,
        work: &mut Workspace<T>,
    ) -> Result<(), Error> {
        let mut before = core::mem::replace(&mut work.group, State::new());
        let mut is_first = true;
        let result = heads.into_iter().try_for_each(|(q, out)| {
            let first = k.nrows() - q.nrows();
            if core::mem::take(&mut is_first) {
                // the sums before the tail are the same for every query head
                before.reset(self.num_features(), v.ncols());
                if log_decay.is_none() && !self.decays() {
                    let part = |x| views::rows(x, 0..first);
                    self.absorb(&mut before, part(k), part(v), work)?;
                } else {
                    let tokens = Tokens { q: k, k, v, log_decay };
                    let (chunk, buffers) = (chunk_len::<T>(), &mut work.pass);
                    self.absorb_groups(&mut before, tokens, 0..first, chunk, buffers, |_| {})?;
                }
            }
            state.copy_from(&before);
            let part = |x| views::rows(x, first..k.nrows());
            let tokens = Tokens { q, k: part(k), v: part(v), log_decay: log_decay.map(part) };
            let result = self.extend(state, tokens, out, readout, work, false);
            result.map_err(|error| of_tail(error, first, log_decay))
        });
        work.group = before;
        result
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
        let start = if work.parallel && threads::pays(q.nrows()) {
            let mut start = 0;
            while let Some(range) = threads::block::<T>(start, q.nrows()) {
                let mut out = views::rows_mut(out.view_mut(), range.clone());
                threads::read(
                    *self,
                    state,
                    views::rows(q, range.clone()),
                    &mut out,
                    readout,
                    &mut work.threads,
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
        self.read(state, q, &mut work.pass, |first, answer| {
            let rows = first..first + answer.tokens;
            answer.write(first, readout, views::rows_mut(out.view_mut(), rows))
        })
        .map_err(|error| error.in_chunk(start))
    }
}
