//! The stream of linear attention: a state of fixed size.

use crate::attention::call::{Head, NOT_GATED, one_head};
use crate::attention::fingerprint::Fingerprint;
use crate::attention::stream::{NO_CHECKPOINT, Stream, StreamState};
use crate::attention::threads::Threads;
use crate::check;
use crate::error::Error;
use crate::features::FeatureMap;
use crate::memory::Memory;
use crate::memory::answer::Readout;
use crate::memory::linear::LinearMemory;
use crate::memory::linear::decay::LogDecay;
use crate::memory::linear::entry::Workspace;
use crate::memory::linear::pass::Tokens;
use crate::memory::linear::save::SavedState;
use crate::scalar::Scalar;
use ndarray::Axis;
use std::sync::Arc;

/// A fixed-size state and the scratch of one chunk.
#[derive(Debug)]
pub(crate) struct LinearStream<T, F> {
    memory: LinearMemory<T, F>,
    group: usize,
    readout: Readout,
    decay: Result<Option<Arc<LogDecay<T>>>, Error>,
    threads: Threads,
    work: Workspace<T>,
    /// A state to return to, if there is one.
    checkpoint: SavedState<T>,
    /// The token that the working memory holds mapped, if the next call brings it.
    prepared: Option<Place>,
}

/// Where the arguments of a call are: the same ones are not mapped again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place([usize; 3]);

impl Place {
    fn of<T>(head: &Head<'_, T>) -> Self {
        Self([head.q.as_ptr().addr(), head.k.as_ptr().addr(), head.v.as_ptr().addr()])
    }
}

const KERNEL: &str = "linear";

impl<T: Scalar, F: FeatureMap<T> + 'static> LinearStream<T, F> {
    /// Goes on from what `memory` holds, for `group` query heads.
    pub(crate) fn new(
        mut memory: LinearMemory<T, F>,
        readout: Readout,
        decay: Result<Option<Arc<LogDecay<T>>>, Error>,
        group: usize,
        threads: Threads,
    ) -> Self {
        let alike = |decay: &Option<Arc<LogDecay<T>>>| {
            decay.as_ref().is_none_or(|decay| decay.may_be_common())
        };
        if decay.as_ref().is_ok_and(alike) {
            memory.let_tokens_wait();
        }
        let mut work = Workspace::new();
        work.set_threads(threads.are_several());
        let checkpoint = SavedState::new();
        Self { memory, group, readout, decay, threads, work, checkpoint, prepared: None }
    }

    fn decays(&self) -> bool {
        !matches!(self.decay, Ok(None))
    }

    fn shape(&self) -> [usize; 3] {
        [self.memory.head_dim(), self.memory.num_features(), self.memory.value_dim()]
    }

    fn fingerprint(&self) -> Result<Fingerprint, Error> {
        let decay = self.decay.as_ref().map_err(Error::clone)?;
        let readout = f64::from(u8::from(self.readout == Readout::Normalized));
        let own = Fingerprint::new()
            .with("scale", [self.memory.scale()])
            .with("normaliser", [readout])
            .with("log decay", decay.iter().flat_map(|decay| decay.parameters()));
        own.with_map(self.memory.map())
    }

    fn check(&self, head: &Head<'_, T>) -> Result<(), Error> {
        head.check_no_log_normalizer()?;
        head.check_extend(self.memory.head_dim(), self.memory.value_dim(), self.group)?;
        let decay = self.decay.as_ref().map_err(Error::clone)?.as_deref();
        check_gates(decay, self.memory.num_features(), head)
    }
}

/// Gated kernels need log decays `[n, 1 or features]`, others take none.
pub(crate) fn check_gates<T: Scalar>(
    decay: Option<&LogDecay<T>>,
    features: usize,
    head: &Head<'_, T>,
) -> Result<(), Error> {
    match (decay.is_some_and(|decay| decay.gated), head.log_decay) {
        (false, None) => Ok(()),
        (false, Some(_)) => Err(NOT_GATED),
        (true, None) => Err(Error::Unsupported {
            what: "a call of a gated kernel without log decays",
            why: "set `Head::log_decay` and call `forward_heads` or `extend_heads`",
        }),
        (true, Some(log_decay)) => {
            check::size("log_decay", "rows", head.keys(), log_decay.nrows())?;
            if log_decay.ncols() == 1 {
                Ok(())
            } else {
                check::size("log_decay", "columns", features, log_decay.ncols())
            }
        }
    }
}

impl<T: Scalar, F: FeatureMap<T> + 'static> Clone for LinearStream<T, F> {
    fn clone(&self) -> Self {
        let (memory, decay) = (self.memory.clone(), self.decay.clone());
        Self::new(memory, self.readout, decay, self.group, self.threads)
    }

    fn clone_from(&mut self, source: &Self) {
        self.memory.copy_from(&source.memory);
        self.prepared = None;
    }
}

impl<T: Scalar, F: FeatureMap<T> + 'static> Stream<T> for LinearStream<T, F> {
    fn extend_heads(&mut self, heads: &mut [Head<'_, T>]) -> Result<(), Error> {
        let head = one_head(heads)?;
        self.check(head)?;
        if self.prepared.take().is_some_and(|place| place == Place::of(head)) {
            return self.memory.finish_step(head.out.view_mut(), self.readout, &mut self.work);
        }
        let decay = self.decay.as_ref().map_err(Error::clone)?.as_deref();
        let Head { q, k, v, log_decay, out, .. } = head;
        let tokens = |q| Tokens { q, k: *k, v: *v, log_decay: *log_decay };
        let (readout, work) = (self.readout, &mut self.work);
        if self.group == 1 {
            let (tokens, out) = (tokens(q.index_axis(Axis(0), 0)), out.index_axis_mut(Axis(0), 0));
            return self.memory.extend(tokens, decay, out, readout, work);
        }
        self.memory.extend_group(q.outer_iter().map(tokens), decay, out.view_mut(), readout, work)
    }

    fn prepare_heads(&mut self, heads: &mut [Head<'_, T>]) -> bool {
        self.prepared = None;
        let [head] = heads else { return false };
        if head.keys() != 1 || self.check(head).is_err() {
            return false;
        }
        let Ok(decay) = &self.decay else { return false };
        let Head { q, k, v, log_decay, .. } = head;
        let tokens = q.outer_iter().map(|q| Tokens { q, k: *k, v: *v, log_decay: *log_decay });
        let mapped = self.memory.map_step(tokens, decay.as_deref(), self.readout, &mut self.work);
        if mapped.is_ok() {
            self.prepared = Some(Place::of(head));
        }
        mapped.unwrap_or(false)
    }

    fn len(&self) -> usize {
        self.memory.len()
    }

    fn state_floats(&self) -> usize {
        self.memory.state_floats() + usize::from(self.decays())
    }

    fn reset(&mut self) {
        self.memory.reset();
        self.checkpoint.clear();
        self.prepared = None;
    }

    fn checkpoint(&mut self) -> bool {
        self.memory.save_to(&mut self.checkpoint);
        true
    }

    fn rollback(&mut self) -> Result<(), Error> {
        self.prepared = None;
        if self.memory.return_to(&self.checkpoint) { Ok(()) } else { Err(NO_CHECKPOINT) }
    }

    fn save(&self) -> Result<StreamState<T>, Error> {
        let mut numbers = self.memory.numbers();
        if self.decays() && !numbers.is_empty() {
            numbers.push(self.memory.log_scale_low());
        }
        let state = StreamState::new(KERNEL, self.len(), self.shape().to_vec(), numbers);
        Ok(state.with_fingerprint(self.fingerprint()?))
    }

    fn restore(&mut self, state: &StreamState<T>) -> Result<(), Error> {
        let low = usize::from(self.decays());
        let count = match state.tokens() {
            0 => 0,
            _ => self.memory.fitting_numbers(state.count().saturating_sub(low)) + low,
        };
        let numbers = state.numbers(KERNEL, &self.shape(), count)?;
        self.fingerprint()?.check(state.fingerprint())?;
        match numbers {
            [numbers @ .., low] if self.decays() => {
                self.memory.set_numbers(state.tokens(), numbers);
                self.memory.set_log_scale_low(*low);
            }
            numbers => self.memory.set_numbers(state.tokens(), numbers),
        }
        self.checkpoint.clear();
        self.prepared = None;
        Ok(())
    }
}
