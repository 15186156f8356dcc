//! Sums of features of the tokens that left the window.

use crate::attention::hybrid::config::{Config, FarKind};
use crate::attention::hybrid::far::features::FarFeatures;
use crate::attention::hybrid::far_memory::{
    Asked, FarMemory, FarScratch, Leaving, Seen, Sizes, of_kind,
};
use crate::error::Error;
use crate::features::FeatureMap;
use crate::kernel::buffer::padded;
use crate::memory::Memory;
use crate::memory::answer::Answer;
use crate::memory::linear::LinearMemory;
use crate::memory::linear::decay::LogDecay;
use crate::scalar::Scalar;
use std::sync::Arc;

type SharedMap<T> = Arc<dyn FeatureMap<T>>;

/// A linear memory for each head, and how they forget.
#[derive(Clone, Debug)]
pub(crate) struct FeatureSums<T: Scalar> {
    all: Vec<LinearMemory<T, SharedMap<T>>>,
    decay: Option<Arc<LogDecay<T>>>,
}

impl<T: Scalar> FeatureSums<T> {
    pub(crate) fn new(
        FarFeatures { map, log_decay, .. }: &FarFeatures<T>,
        Sizes { heads, value_dim, .. }: Sizes,
        scale: f64,
    ) -> Result<Self, Error> {
        let memory = || LinearMemory::new(Arc::clone(map), value_dim, scale);
        let all = (0..heads).map(|_| memory()).collect::<Result<_, _>>()?;
        Ok(Self { all, decay: log_decay.clone() })
    }
}

impl<T: Scalar> FarMemory<T> for FeatureSums<T> {
    fn clone_box(&self) -> Box<dyn FarMemory<T>> {
        Box::new(self.clone())
    }

    fn copy_to(&self, target: &mut Box<dyn FarMemory<T>>) {
        match of_kind::<T, Self>(&mut **target) {
            Some(Self { all, decay }) if all.len() == self.all.len() => {
                all.iter_mut().zip(&self.all).for_each(|(to, from)| to.copy_from(from));
                decay.clone_from(&self.decay);
            }
            _ => *target = self.clone_box(),
        }
    }

    fn renew(&mut self, config: &Config<T>, sizes: Sizes) -> bool {
        let FarKind::Linear(FarFeatures { map, .. }) = &config.far else { return false };
        let Sizes { heads, value_dim, .. } = sizes;
        if self.all.len() != heads || !self.all.iter().all(|memory| memory.is_of(map, value_dim)) {
            return false;
        }
        self.clear();
        true
    }

    fn clear(&mut self) {
        self.all.iter_mut().for_each(LinearMemory::forget);
    }

    fn state_floats(&self) -> usize {
        let of_decay = if self.decay.is_some() { self.all.len() } else { 0 };
        self.all.iter().map(Memory::state_floats).sum::<usize>() + of_decay
    }

    fn absorb(&mut self, token: Leaving<'_, T>, scratch: &mut FarScratch<T>) -> Result<(), Error> {
        let (k, v, workspace) = scratch.token(token);
        self.all[token.head].absorb_with(k, v, self.decay.as_deref(), workspace)
    }

    fn add_to(
        &self,
        Asked { head, queries }: Asked<'_, T>,
        answer: &mut Answer<T>,
        scratch: &mut FarScratch<T>,
    ) -> Result<(), Error> {
        let memory = &self.all[head];
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
        let memory = &self.all[head];
        out.extend(memory.numbers());
        if self.decay.is_some() && !memory.is_empty() {
            out.push(memory.log_scale_low());
        }
        true
    }

    fn set_numbers<'a>(&mut self, head: usize, seen: Seen, numbers: &'a [T]) -> Option<&'a [T]> {
        let memory = &mut self.all[head];
        let count = if seen.absorbed == 0 { 0 } else { memory.state_floats() };
        let (own, rest) = numbers.split_at_checked(count)?;
        memory.set_numbers(seen.absorbed, own);
        if self.decay.is_none() || seen.absorbed == 0 {
            return Some(rest);
        }
        let (low, rest) = rest.split_first()?;
        memory.set_log_scale_low(*low);
        Some(rest)
    }
}
