//! Sums of features of the tokens that left the window.

use crate::attention::hybrid::config::{Config, FarKind};
use crate::attention::hybrid::far_memory::{
    Asked, FarMemory, FarScratch, Leaving, Seen, Sizes, of_kind,
};
use crate::error::Error;
use crate::features::FeatureMap;
use crate::kernel::buffer::padded;
use crate::memory::Memory;
use crate::memory::answer::Answer;
use crate::memory::linear::LinearMemory;
use crate::scalar::Scalar;
use std::sync::Arc;

type SharedMap<T> = Arc<dyn FeatureMap<T>>;

/// A linear memory for each head.
#[derive(Clone, Debug)]
pub(crate) struct FeatureSums<T: Scalar>(Vec<LinearMemory<T, SharedMap<T>>>);

impl<T: Scalar> FeatureSums<T> {
    pub(crate) fn new(
        map: &Arc<SharedMap<T>>,
        Sizes { heads, value_dim, .. }: Sizes,
        scale: f64,
    ) -> Result<Self, Error> {
        let memory = || LinearMemory::new(Arc::clone(map), value_dim, scale);
        Ok(Self((0..heads).map(|_| memory()).collect::<Result<_, _>>()?))
    }
}

impl<T: Scalar> FarMemory<T> for FeatureSums<T> {
    fn clone_box(&self) -> Box<dyn FarMemory<T>> {
        Box::new(self.clone())
    }

    fn copy_to(&self, target: &mut Box<dyn FarMemory<T>>) {
        match of_kind::<T, Self>(&mut **target) {
            Some(Self(all)) if all.len() == self.0.len() => {
                all.iter_mut().zip(&self.0).for_each(|(to, from)| to.copy_from(from));
            }
            _ => *target = self.clone_box(),
        }
    }

    fn renew(&mut self, config: &Config<T>, sizes: Sizes) -> bool {
        let FarKind::Linear(map) = &config.far else { return false };
        let Sizes { heads, value_dim, .. } = sizes;
        if self.0.len() != heads || !self.0.iter().all(|memory| memory.is_of(map, value_dim)) {
            return false;
        }
        self.clear();
        true
    }

    fn clear(&mut self) {
        self.0.iter_mut().for_each(LinearMemory::forget);
    }

    fn state_floats(&self) -> usize {
        self.0.iter().map(Memory::state_floats).sum()
    }

    fn absorb(&mut self, token: Leaving<'_, T>, scratch: &mut FarScratch<T>) -> Result<(), Error> {
        let (k, v, workspace) = scratch.token(token);
        self.0[token.head].absorb_with(k, v, workspace)
    }

    fn add_to(
        &self,
        Asked { head, queries }: Asked<'_, T>,
        answer: &mut Answer<T>,
        scratch: &mut FarScratch<T>,
    ) -> Result<(), Error> {
        let memory = &self.0[head];
        if memory.is_empty() {
            return Ok(());
        }
        let stride = padded::<T>(memory.value_dim());
        memory.read_with(queries, &mut scratch.linear, |first, part| {
            for (i, numerator) in part.numerator.chunks_exact(stride).enumerate() {
                answer.add_row(first + i, numerator, part.denominator[i], part.log_scale[i]);
            }
            Ok(())
        })
    }

    fn numbers(&self, head: usize, out: &mut Vec<T>) -> bool {
        out.extend(self.0[head].numbers());
        true
    }

    fn set_numbers<'a>(&mut self, head: usize, seen: Seen, numbers: &'a [T]) -> Option<&'a [T]> {
        let memory = &mut self.0[head];
        let count = if seen.absorbed == 0 { 0 } else { memory.state_floats() };
        let (own, rest) = numbers.split_at_checked(count)?;
        memory.set_numbers(seen.absorbed, own);
        Some(rest)
    }
}
