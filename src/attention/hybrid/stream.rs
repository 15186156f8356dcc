//! The stream of a hybrid kernel.

use crate::attention::call::Head;
use crate::attention::hybrid::config::{Config, FarKind};
use crate::attention::hybrid::far_memory::Sizes;
use crate::attention::hybrid::state::{HybridScratch, HybridState};
use crate::attention::stream::{NO_CHECKPOINT, Stream, StreamOptions, StreamState};
use crate::check;
use crate::error::Error;
use crate::scalar::Scalar;
use std::sync::Arc;

/// The state of a hybrid kernel, for one or several heads of keys and values.
#[derive(Debug)]
pub(crate) struct HybridStream<T: Scalar> {
    config: Arc<Config<T>>,
    options: StreamOptions,
    state: HybridState<T>,
    scratch: HybridScratch<T>,
    /// A state to return to, and whether it is valid.
    checkpoint: Option<(HybridState<T>, bool)>,
}

const KERNEL: &str = "hybrid";

const OWN_MEMORY: Error = Error::Unsupported {
    what: "saving and restoring this stream",
    why: "only its far memory, a type of your own, knows its state",
};

impl<T: Scalar> HybridStream<T> {
    /// Empty, for sizes that the kernel has checked.
    pub(crate) fn new(config: Arc<Config<T>>, options: StreamOptions) -> Result<Self, Error> {
        let mut state = HybridState::new();
        let StreamOptions { heads, value_dim, .. } = options;
        state.prepare(&config, Sizes { heads, value_dim, deciding_columns: None })?;
        Ok(Self { config, options, state, scratch: HybridScratch::new(), checkpoint: None })
    }

    fn check(&self, heads: &[Head<'_, T>]) -> Result<(), Error> {
        let StreamOptions { value_dim, group, .. } = self.options;
        check::size("q", "kv heads", self.options.heads, heads.len())?;
        for head in heads {
            head.check_not_gated()?;
            head.check_no_log_normalizer()?;
            head.check_extend(self.config.head_dim, value_dim, group)?;
        }
        heads.iter().try_for_each(Head::check_finite)
    }

    fn shape(&self) -> Vec<usize> {
        let StreamOptions { value_dim, group, heads, .. } = self.options;
        let mut shape = self.config.shape(heads, value_dim);
        shape.push(group);
        shape
    }
}

impl<T: Scalar> Clone for HybridStream<T> {
    fn clone(&self) -> Self {
        let (config, state) = (Arc::clone(&self.config), self.state.clone());
        let options = self.options;
        Self { config, options, state, scratch: HybridScratch::new(), checkpoint: None }
    }

    fn clone_from(&mut self, source: &Self) {
        self.state.copy_from(&source.state);
    }
}

impl<T: Scalar> Stream<T> for HybridStream<T> {
    fn extend_heads(&mut self, heads: &mut [Head<'_, T>]) -> Result<(), Error> {
        self.check(heads)?;
        if heads[0].keys() == 0 {
            Ok(())
        } else {
            self.state.extend(&self.config, heads, &mut self.scratch)
        }
    }

    fn prepare_heads(&mut self, heads: &mut [Head<'_, T>]) -> bool {
        self.check(heads).is_ok() && self.state.is_safe(&self.config, heads)
    }

    fn len(&self) -> usize {
        self.state.tokens
    }

    fn state_floats(&self) -> usize {
        self.state.state_floats(&self.config)
    }

    fn state_bytes(&self) -> usize {
        self.state.state_bytes(&self.config)
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
            Some(numbers) => {
                let state = StreamState::new(KERNEL, self.len(), self.shape(), numbers);
                Ok(state.with_fingerprint(self.config.fingerprint()?))
            }
            None => Err(OWN_MEMORY),
        }
    }

    fn restore(&mut self, state: &StreamState<T>) -> Result<(), Error> {
        let count = state.count();
        let numbers = state.numbers(KERNEL, &self.shape(), count)?;
        if matches!(self.config.far, FarKind::Own(_)) {
            return Err(OWN_MEMORY);
        }
        self.config.fingerprint()?.check(state.fingerprint())?;
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
