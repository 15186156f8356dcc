//! Merged entries of the tokens that left the window.

use crate::attention::hybrid::config::{Config, FarKind, LEAST_ENTRIES, Weighing};
use crate::attention::hybrid::far_memory::{
    Asked, FarMemory, FarScratch, Leaving, Seen, Sizes, of_kind,
};
use crate::attention::hybrid::near::largest;
use crate::error::Error;
use crate::memory::merged::entries::MergedMemory;
use crate::memory::merged::reduce::reduce;
use crate::memory::merged::rule::Rule;
use crate::memory::slots::Slots;
use crate::scalar::Scalar;
use ndarray::ArrayView1;

/// A merging memory for each head, which share one budget of entries.
#[derive(Clone, Debug)]
pub(crate) struct MergingPool<T: Scalar>(pub(crate) Vec<MergedMemory<T>>);

impl<T: Scalar> MergingPool<T> {
    /// Of no sizes yet: [`renew`](FarMemory::renew) comes next.
    pub(crate) fn new(rule: &Rule, heads: usize) -> Self {
        Self(vec![MergedMemory::with_rule(rule.clone()); heads])
    }
}

impl<T: Scalar> FarMemory<T> for MergingPool<T> {
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
        let FarKind::Merged { rule, .. } = &config.far else { return false };
        let Sizes { heads, value_dim, deciding_columns } = sizes;
        if self.0.len() != heads {
            return false;
        }
        for memory in &mut self.0 {
            memory.rule = rule.clone();
            memory.rule.value_columns = deciding_columns;
            memory.rule.spare += (heads - 1) * rule.entries; // of a pool, one head may take all
            memory.slots.set_format(config.format);
            memory.prepare(config.head_dim, value_dim);
        }
        true
    }

    fn clear(&mut self) {
        for memory in &mut self.0 {
            memory.prepare(memory.slots.head_dim, memory.slots.value_dim);
        }
    }

    fn state_floats(&self) -> usize {
        self.0.iter().map(MergedMemory::floats).sum()
    }

    fn state_bytes(&self) -> usize {
        self.0.iter().map(MergedMemory::bytes).sum()
    }

    fn cannot_fail(&self) -> bool {
        true
    }

    fn observe(&mut self, asked: Asked<'_, T>, value: ArrayView1<'_, T>) {
        self.0[asked.head].observe(asked.queries.outer_iter(), value);
    }

    fn absorb(&mut self, token: Leaving<'_, T>, scratch: &mut FarScratch<T>) -> Result<(), Error> {
        let Leaving { config, head, near, slot } = token;
        let weight = match config.far.weighing() {
            Weighing::One => T::one(),
            Weighing::Expected => {
                config.expected_attention(near.slots.key(slot), &mut scratch.keys)
            }
            Weighing::Received { .. } => MergedMemory::weight_of(near.received[slot]),
        };
        let memory = &mut self.0[head];
        memory.make_room();
        let end = memory.held;
        memory.slots.put_from(end, &near.slots, slot);
        memory.enter(weight);
        Ok(())
    }

    fn settle(&mut self, config: &Config<T>, scratch: &mut FarScratch<T>) {
        let FarKind::Merged { rule, .. } = &config.far else { return };
        let heads = self.0.len();
        let least = if heads > 1 { LEAST_ENTRIES } else { 1 };
        scratch.pairs.clear();
        scratch.pairs.reserve(heads * (rule.entries + rule.block));
        reduce(&mut self.0, rule.entries * heads, least, rule.block, &mut scratch.pairs);
    }

    fn entries(&self, head: usize) -> Option<(&Slots<T>, usize)> {
        let memory = &self.0[head];
        Some((&memory.slots, memory.used()))
    }

    fn receive(&mut self, head: usize, decay: T, factors: &[T], weights: &[T], stride: usize) {
        self.0[head].receive(decay, factors, weights, stride);
    }

    fn numbers(&self, head: usize, out: &mut Vec<T>) -> bool {
        let memory = &self.0[head];
        #[allow(clippy::cast_precision_loss)] // at most 2^14 entries
        out.push(T::from_f64(memory.held as f64));
        memory.numbers(out);
        true
    }

    fn set_numbers<'a>(&mut self, head: usize, seen: Seen, numbers: &'a [T]) -> Option<&'a [T]> {
        let memory = &mut self.0[head];
        let (&entries, rest) = numbers.split_first()?;
        #[allow(clippy::cast_precision_loss)] // at most 2^14 entries
        let is_it = |n: &usize| T::from_f64(*n as f64) == entries;
        let entries = (0..=memory.most_slots()).find(is_it)?;
        let (own, rest) = rest.split_at_checked(memory.count_numbers(entries))?;
        memory.set_numbers(entries, seen.absorbed, seen.observed, own).then_some(rest)
    }

    fn is_complete(&self, absorbed: usize) -> bool {
        let held: usize = self.0.iter().map(|memory| memory.held).sum();
        let bound: usize = self.0.iter().map(|memory| memory.rule.entries.min(absorbed)).sum();
        held == bound
    }

    fn largest(&self, head: usize) -> [T; 2] {
        let memory = &self.0[head];
        [largest(memory.keys().view()), largest(memory.values().view())]
    }
}
