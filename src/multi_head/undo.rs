//! What a layer goes back to: its own undo of a call that fails, and the caller's checkpoint.

use crate::attention::stream::{NO_CHECKPOINT, Stream};
use crate::error::Error;
use crate::scalar::Scalar;

/// Copies of the streams of a layer, for a call that may fail half-way. They are apart from the
/// checkpoints of the streams, which are the caller's.
#[derive(Debug)]
pub(crate) struct Undo<T: Scalar> {
    copies: Vec<Box<dyn Stream<T>>>,
}

impl<T: Scalar> Undo<T> {
    pub(crate) fn new() -> Self {
        Self { copies: Vec::new() }
    }

    /// Copies the state of every stream, into the memory of earlier copies.
    pub(crate) fn set(&mut self, streams: &[Box<dyn Stream<T>>]) {
        if self.copies.len() == streams.len() {
            self.copies.iter_mut().zip(streams).for_each(|(to, from)| to.clone_from(from));
        } else {
            self.copies = streams.to_vec();
        }
    }

    /// Gives every stream its state back.
    pub(crate) fn return_to(&self, streams: &mut [Box<dyn Stream<T>>]) {
        streams.iter_mut().zip(&self.copies).for_each(|(to, from)| to.clone_from(from));
    }
}

/// The caller's checkpoint of a layer: those of its streams, and copies of those that have none.
#[derive(Debug)]
pub(crate) struct LayerCheckpoint<T: Scalar> {
    copies: Vec<Option<Box<dyn Stream<T>>>>,
    is_set: bool,
    /// Whether no stream can have lost its own since.
    pub(crate) is_whole: bool,
}

impl<T: Scalar> LayerCheckpoint<T> {
    pub(crate) fn new() -> Self {
        Self { copies: Vec::new(), is_set: false, is_whole: false }
    }

    pub(crate) fn clear(&mut self) {
        self.is_set = false;
    }

    pub(crate) fn set(&mut self, streams: &mut [Box<dyn Stream<T>>]) {
        self.copies.resize_with(streams.len(), || None);
        for (copy, stream) in self.copies.iter_mut().zip(streams) {
            match copy {
                _ if stream.checkpoint() => *copy = None,
                Some(copy) => copy.clone_from(stream),
                None => *copy = Some(stream.clone()),
            }
        }
        (self.is_set, self.is_whole) = (true, true);
    }

    pub(crate) fn return_to(&self, streams: &mut [Box<dyn Stream<T>>]) -> Result<(), Error> {
        if !self.is_set {
            return Err(NO_CHECKPOINT);
        }
        // Only if a stream has lost its checkpoint, the others must be put back.
        let before = if self.is_whole { None } else { Some(streams.to_vec()) };
        let result = streams.iter_mut().zip(&self.copies).try_for_each(|(stream, copy)| {
            match copy {
                Some(copy) => stream.clone_from(copy),
                None => stream.rollback()?,
            }
            Ok(())
        });
        if let (Err(_), Some(before)) = (&result, before) {
            streams.iter_mut().zip(&before).for_each(|(to, from)| to.clone_from(from));
        }
        result
    }
}
