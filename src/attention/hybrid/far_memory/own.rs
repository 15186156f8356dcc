//! Far memories of a type of the user's own.

use crate::attention::hybrid::config::{Config, MakeMemory};
use crate::attention::hybrid::far_memory::{Asked, FarMemory, FarScratch, Leaving, Seen, Sizes};
use crate::error::Error;
use crate::memory::Memory;
use crate::memory::answer::Answer;
use crate::memory::partial::Partial;
use crate::scalar::Scalar;
use ndarray::ArrayView1;
use std::sync::{Arc, Mutex, PoisonError};

/// A memory for each head.
#[derive(Clone, Debug)]
pub(crate) struct OwnMemories<T: Scalar> {
    memories: Vec<Box<dyn Memory<T>>>,
    /// What each of them was at first, to forget every token. It is shared, so that copies of the
    /// state do not copy it.
    empty: Arc<Mutex<Box<dyn Memory<T>>>>,
    value_dim: usize,
}

impl<T: Scalar> OwnMemories<T> {
    pub(crate) fn new(
        make: &MakeMemory<T>,
        Sizes { heads, value_dim, .. }: Sizes,
        scale: f64,
    ) -> Result<Self, Error> {
        let empty = make(value_dim, scale)?;
        let memories = (0..heads).map(|_| empty.clone()).collect();
        Ok(Self { memories, empty: Arc::new(Mutex::new(empty)), value_dim })
    }
}

impl<T: Scalar> FarMemory<T> for OwnMemories<T> {
    fn clone_box(&self) -> Box<dyn FarMemory<T>> {
        Box::new(self.clone())
    }

    fn copy_to(&self, target: &mut Box<dyn FarMemory<T>>) {
        *target = self.clone_box();
    }

    fn renew(&mut self, _config: &Config<T>, _sizes: Sizes) -> bool {
        false // nobody can say which function has made these
    }

    fn clear(&mut self) {
        let empty = self.empty.lock().unwrap_or_else(PoisonError::into_inner);
        self.memories.iter_mut().for_each(|memory| *memory = empty.clone());
    }

    fn state_floats(&self) -> usize {
        self.memories.iter().map(|memory| memory.state_floats()).sum()
    }

    fn state_bytes(&self) -> usize {
        self.memories.iter().map(|memory| memory.state_bytes()).sum()
    }

    fn absorb(&mut self, token: Leaving<'_, T>, scratch: &mut FarScratch<T>) -> Result<(), Error> {
        let (k, v, _) = scratch.token(token);
        self.memories[token.head].absorb(k, v)
    }

    fn add_to(
        &self,
        Asked { head, queries }: Asked<'_, T>,
        answer: &mut Answer<T>,
        scratch: &mut FarScratch<T>,
    ) -> Result<(), Error> {
        let partial = &mut scratch.partial;
        if partial.numerator().dim() == (queries.nrows(), self.value_dim) {
            partial.reset();
        } else {
            *partial = Partial::new(queries.nrows(), self.value_dim)?;
        }
        self.memories[head].read(queries, partial)?;
        for (i, numerator) in partial.numerator.outer_iter().enumerate() {
            let numerator = numerator.to_slice().unwrap_or_default();
            answer.add_row(i, numerator, partial.denominator[i], partial.log_scale[i]);
        }
        Ok(())
    }

    fn answered(&mut self, asked: Asked<'_, T>, answer: &Answer<T>, scratch: &mut FarScratch<T>) {
        let Asked { head, queries } = asked;
        let log_normalizer = &mut scratch.log_normalizer;
        log_normalizer.clear();
        log_normalizer.extend(
            (0..queries.nrows()).map(|row| answer.denominator[row].ln() + answer.log_scale[row]),
        );
        self.memories[head].received(queries, ArrayView1::from(&**log_normalizer));
    }

    fn numbers(&self, _head: usize, _out: &mut Vec<T>) -> bool {
        false
    }

    fn set_numbers<'a>(&mut self, _head: usize, _: Seen, _: &'a [T]) -> Option<&'a [T]> {
        None
    }
}
