//! No far memory: tokens that leave the window are forgotten.

use crate::attention::hybrid::config::{Config, FarKind};
use crate::attention::hybrid::far_memory::{FarMemory, FarScratch, Leaving, Seen, Sizes};
use crate::error::Error;
use crate::scalar::Scalar;

/// Nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dropped;

impl<T: Scalar> FarMemory<T> for Dropped {
    fn clone_box(&self) -> Box<dyn FarMemory<T>> {
        Box::new(*self)
    }

    fn copy_to(&self, target: &mut Box<dyn FarMemory<T>>) {
        *target = Box::new(*self);
    }

    fn renew(&mut self, config: &Config<T>, _sizes: Sizes) -> bool {
        matches!(config.far, FarKind::None)
    }

    fn clear(&mut self) {}

    fn state_floats(&self) -> usize {
        0
    }

    fn cannot_fail(&self) -> bool {
        true
    }

    fn absorb(&mut self, _: Leaving<'_, T>, _: &mut FarScratch<T>) -> Result<(), Error> {
        Ok(())
    }

    fn numbers(&self, _head: usize, _out: &mut Vec<T>) -> bool {
        true
    }

    fn set_numbers<'a>(&mut self, _head: usize, _: Seen, numbers: &'a [T]) -> Option<&'a [T]> {
        Some(numbers)
    }
}
