//! The state of a hybrid kernel: some heads of keys and values, what each keeps exactly and the far
//! memories behind them, and how tokens move from the one to the other.

use crate::attention::call::Head;
use crate::attention::hybrid::config::{Config, FarKind};
use crate::attention::hybrid::far_memory::dropped::Dropped;
use crate::attention::hybrid::far_memory::linear::FeatureSums;
use crate::attention::hybrid::far_memory::merging::MergingPool;
use crate::attention::hybrid::far_memory::own::OwnMemories;
use crate::attention::hybrid::far_memory::{Asked, FarMemory, FarScratch, Leaving, Sizes};
use crate::attention::hybrid::near::Near;
use crate::error::Error;
use crate::kernel::buffer::Buffer;
use crate::memory::slots::Reading;
use crate::scalar::Scalar;
use crate::views;
use core::ops::Range;
use ndarray::Axis;

/// The state of some heads.
#[derive(Clone, Debug)]
pub(crate) struct HybridState<T: Scalar> {
    pub(super) tokens: usize,
    pub(super) value_dim: usize,
    pub(super) near: Vec<Near<T>>,
    /// The far memories of all heads.
    pub(super) far: Box<dyn FarMemory<T>>,
}

/// Working memory of a hybrid kernel, which says nothing about any call.
#[derive(Debug)]
pub(crate) struct HybridScratch<T: Scalar> {
    pub(super) reading: Reading<T>,
    /// What makes probabilities of the rows of weights.
    pub(super) inverse: Buffer<T>,
    pub(super) far: FarScratch<T>,
    /// The state before a call that may fail.
    pub(super) before: Option<HybridState<T>>,
}

impl<T: Scalar> HybridScratch<T> {
    pub(crate) fn new() -> Self {
        Self {
            reading: Reading::new(),
            inverse: Buffer::new(),
            far: FarScratch::new(),
            before: None,
        }
    }
}

impl<T: Scalar> HybridState<T> {
    pub(crate) fn new() -> Self {
        Self { tokens: 0, value_dim: 0, near: Vec::new(), far: Box::new(Dropped) }
    }

    /// Makes it empty, for these sizes.
    pub(super) fn prepare(&mut self, config: &Config<T>, sizes: Sizes) -> Result<(), Error> {
        (self.tokens, self.value_dim) = (0, sizes.value_dim);
        self.near.resize_with(sizes.heads, Near::new);
        for near in &mut self.near {
            near.prepare(config, sizes.value_dim);
        }
        if !self.far.renew(config, sizes) {
            self.far = far_memory(config, sizes)?;
        }
        Ok(())
    }

    /// Forgets every token.
    pub(super) fn clear(&mut self, config: &Config<T>) {
        self.tokens = 0;
        for near in &mut self.near {
            near.prepare(config, self.value_dim);
        }
        self.far.clear();
    }

    pub(super) fn copy_from(&mut self, other: &Self) {
        (self.tokens, self.value_dim) = (other.tokens, other.value_dim);
        self.near.resize_with(other.near.len(), Near::new);
        for (to, from) in self.near.iter_mut().zip(&other.near) {
            to.copy_from(from);
        }
        other.far.copy_to(&mut self.far);
    }

    pub(super) fn state_floats(&self, config: &Config<T>) -> usize {
        self.near.len() * config.near_floats(self.value_dim) + self.far.state_floats()
    }

    pub(super) fn state_bytes(&self, config: &Config<T>) -> usize {
        self.near.len() * config.near_bytes(self.value_dim) + self.far.state_bytes()
    }

    /// Appends token `i` of the call to the sinks or the window.
    pub(super) fn take(&mut self, config: &Config<T>, calls: &[Head<'_, T>], i: usize) {
        let slot = config.slot(self.tokens);
        for (head, (near, call)) in self.near.iter_mut().zip(calls).enumerate() {
            let value = views::row(call.v, i);
            near.put(config, slot, views::row(call.k, i), value);
            // without learning there may be more keys than queries
            if config.learns() && self.tokens >= config.sinks {
                let queries = call.q.index_axis_move(Axis(1), i);
                self.far.observe(Asked { head, queries }, value);
            }
        }
    }

    /// Moves the oldest tokens out of the window, if the newest one makes that due.
    pub(super) fn leave(
        &mut self,
        config: &Config<T>,
        scratch: &mut HybridScratch<T>,
    ) -> Result<(), Error> {
        match config.leaving(self.tokens) {
            Some(leaving) => self.move_out(config, leaving, scratch),
            None => Ok(()),
        }
    }

    /// Moves everything out of the window that it still holds.
    pub(super) fn leave_rest(
        &mut self,
        config: &Config<T>,
        scratch: &mut HybridScratch<T>,
    ) -> Result<(), Error> {
        let rest = config.held(self.tokens);
        if rest.is_empty() { Ok(()) } else { self.move_out(config, rest, scratch) }
    }

    fn move_out(
        &mut self,
        config: &Config<T>,
        leaving: Range<usize>,
        scratch: &mut HybridScratch<T>,
    ) -> Result<(), Error> {
        for position in leaving {
            let slot = config.slot(position);
            for head in 0..self.near.len() {
                let near = &mut self.near[head];
                if let Some(slot) = near.evict(slot, config, &mut scratch.far.keys) {
                    self.far.absorb(Leaving { config, head, near, slot }, &mut scratch.far)?;
                }
                near.slots.empty(slot);
            }
        }
        self.far.settle(config, &mut scratch.far);
        Ok(())
    }
}

/// Empty far memories of these sizes.
fn far_memory<T: Scalar>(config: &Config<T>, sizes: Sizes) -> Result<Box<dyn FarMemory<T>>, Error> {
    Ok(match &config.far {
        FarKind::None => Box::new(Dropped),
        FarKind::Merged { rule, .. } => {
            let mut pool = MergingPool::new(rule, sizes.heads);
            pool.renew(config, sizes);
            Box::new(pool)
        }
        FarKind::Linear(features) => Box::new(FeatureSums::new(features, sizes, config.scale)?),
        FarKind::Own(make) => Box::new(OwnMemories::new(&**make, sizes, config.scale)?),
    })
}
