//! The stream of a hybrid kernel.

use crate::attention::HeadCall;
use crate::attention::hybrid::config::{Config, FarKind};
use crate::attention::hybrid::state::{HybridScratch, HybridState};
use crate::attention::{NO_CHECKPOINT, NOT_GATED};
use crate::attention::{Stream, StreamState};
use crate::check;
use crate::error::Error;
use crate::scalar::Scalar;
use ndarray::{ArrayView2, ArrayView3, ArrayViewMut2, ArrayViewMut3, Axis};
use std::sync::Arc;

/// The state of a hybrid kernel, for one or several heads of keys and values.
#[derive(Debug)]
pub(crate) struct HybridStream<T: Scalar> {
    pub(super) config: Arc<Config<T>>,
    pub(super) heads: usize,
    pub(super) group: usize,
    pub(super) value_dim: usize,
    pub(super) state: HybridState<T>,
    pub(super) scratch: HybridScratch<T>,
    pub(super) checkpoint: Option<(HybridState<T>, bool)>,
}

const KERNEL: &str = "hybrid";

const OWN_MEMORY: Error = Error::Unsupported {
    what: "saving and restoring this stream",
    why: "only its far memory, a type of your own, knows its state",
};

impl<T: Scalar> HybridStream<T> {
    fn check(&self, calls: &[HeadCall<'_, T>]) -> Result<(), Error> {
        check::size("q", "kv heads", self.heads, calls.len())?;
        for HeadCall { q, k, v, log_decay, out } in calls {
            if log_decay.is_some() {
                return Err(NOT_GATED);
            }
            check::extend_group(self.config.head_dim, self.value_dim, self.group, *q, *k, *v, out)?;
        }
        check::finite_calls(calls)
    }

    fn shape(&self) -> Vec<usize> {
        let mut shape = self.config.shape(self.heads, self.value_dim);
        shape.push(self.group);
        shape
    }
}

impl<T: Scalar> Clone for HybridStream<T> {
    fn clone(&self) -> Self {
        Self {
            config: Arc::clone(&self.config),
            heads: self.heads,
            group: self.group,
            value_dim: self.value_dim,
            state: self.state.clone(),
            scratch: HybridScratch::new(),
            checkpoint: None,
        }
    }
}

impl<T: Scalar> Stream<T> for HybridStream<T> {
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
        out: ArrayViewMut3<'_, T>,
    ) -> Result<(), Error> {
        self.extend_heads(&mut [HeadCall { q, k, v, log_decay: None, out }])
    }

    fn extend_heads(&mut self, calls: &mut [HeadCall<'_, T>]) -> Result<(), Error> {
        self.check(calls)?;
        if calls[0].k.nrows() == 0 {
            Ok(())
        } else {
            self.state.extend(&self.config, calls, &mut self.scratch)
        }
    }

    fn cannot_fail(&self, calls: &[HeadCall<'_, T>]) -> bool {
        self.check(calls).is_ok() && self.state.is_safe(&self.config, calls)
    }

    fn len(&self) -> usize {
        self.state.tokens
    }

    fn state_floats(&self) -> usize {
        self.state.state_floats(&self.config)
    }

    fn clone_box(&self) -> Box<dyn Stream<T>> {
        Box::new(self.clone())
    }

    fn reset(&mut self) {
        self.state.clear(&self.config);
        if let Some((_, valid)) = &mut self.checkpoint {
            *valid = false;
        }
    }

    fn checkpoint(&mut self) -> bool {
        let (copy, valid) = self.checkpoint.get_or_insert_with(|| (HybridState::new(), true));
        copy.copy_from(&self.state);
        *valid = true;
        true
    }

    fn rollback(&mut self) -> Result<(), Error> {
        match &self.checkpoint {
            Some((copy, true)) => {
                self.state.copy_from(copy);
                Ok(())
            }
            _ => Err(NO_CHECKPOINT),
        }
    }

    fn save(&self) -> Result<StreamState<T>, Error> {
        match self.state.numbers(&self.config) {
            Some(numbers) => Ok(StreamState::new(KERNEL, self.len(), self.shape(), numbers)),
            None => Err(OWN_MEMORY),
        }
    }

    fn restore(&mut self, state: &StreamState<T>) -> Result<(), Error> {
        let count = state.count();
        let numbers = state.numbers(KERNEL, &self.shape(), count)?;
        if matches!(self.config.far, FarKind::Own(_)) {
            return Err(OWN_MEMORY);
        }
        let mut restored = self.state.clone();
        if !restored.set_numbers(&self.config, state.tokens(), numbers) {
            let found = count.to_string();
            return Err(Error::State {
                which: "size",
                expected: "as many numbers as its tokens need".to_owned(),
                found,
            });
        }
        self.state = restored;
        self.checkpoint = None;
        Ok(())
    }
}
