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
///
/// It belongs to the sequences that the layer had when it was set, wherever they are since.
#[derive(Debug)]
pub(crate) struct LayerCheckpoint<T: Scalar> {
    copies: Vec<Option<Box<dyn Stream<T>>>>,
    is_set: bool,
    /// Whether no stream can have lost its own since.
    pub(crate) is_whole: bool,
    /// Where each sequence is now: in the batch, or, from its length on, among those that left it.
    places: Vec<usize>,
    /// The streams of sequences that left the batch since.
    left: Vec<Box<dyn Stream<T>>>,
}

impl<T: Scalar> LayerCheckpoint<T> {
    pub(crate) fn new() -> Self {
        Self {
            copies: Vec::new(),
            is_set: false,
            is_whole: false,
            places: Vec::new(),
            left: Vec::new(),
        }
    }

    pub(crate) fn clear(&mut self) {
        self.is_set = false;
        self.places.clear();
        self.left = Vec::new();
    }

    /// Of streams of which each sequence has so many.
    pub(crate) fn set(&mut self, streams: &mut [Box<dyn Stream<T>>], units: usize) {
        self.clear();
        self.places.extend(0..streams.len() / units);
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

    /// Follows the sequences of the batch to other places, `moves_to` for each; the batch is now
    /// one of `batch`. Streams of sequences that move to none are still in `old`.
    pub(crate) fn follow(
        &mut self,
        moves_to: &[Option<usize>],
        batch: usize,
        mut old: Vec<Option<Box<dyn Stream<T>>>>,
    ) {
        let units = old.len() / moves_to.len();
        for place in &mut self.places {
            *place = match moves_to.get(*place) {
                Some(Some(to)) => *to,
                Some(None) => {
                    let states = &mut old[*place * units..(*place + 1) * units];
                    self.left.extend(states.iter_mut().filter_map(Option::take));
                    batch + self.left.len() / units - 1
                }
                None => *place - moves_to.len() + batch,
            };
        }
    }

    /// Keeps the states of a sequence that is about to begin anew, and puts copies in their place,
    /// if the sequence has to be gone back to.
    pub(crate) fn keep(
        &mut self,
        sequence: usize,
        states: &mut [Box<dyn Stream<T>>],
        batch: usize,
    ) {
        let units = states.len();
        if let Some(place) = self.places.iter_mut().find(|place| **place == sequence) {
            for state in states {
                let copy = state.clone();
                self.left.push(core::mem::replace(state, copy));
            }
            *place = batch + self.left.len() / units - 1;
        }
    }

    /// Gives every sequence its state back, and the batch its sequences. With an error, and where
    /// it is one of a stream its index at the checkpoint, nothing has changed.
    pub(crate) fn return_to(
        &mut self,
        streams: &mut Vec<Box<dyn Stream<T>>>,
        units: usize,
    ) -> Result<(), (Option<usize>, Error)> {
        if !self.is_set {
            return Err((None, NO_CHECKPOINT));
        }
        let in_batch = streams.len();
        streams.append(&mut self.left);
        let places = &self.places;
        let now = |index: usize| places[index / units] * units + index % units;
        // Only if a stream has lost its checkpoint, the others must be put back.
        let before = if self.is_whole { None } else { Some(streams.clone()) };
        let result = self.copies.iter().enumerate().try_for_each(|(index, copy)| {
            let stream = &mut streams[now(index)];
            match copy {
                Some(copy) => stream.clone_from(copy),
                None => stream.rollback().map_err(|error| (Some(index), error))?,
            }
            Ok(())
        });
        if result.is_err() {
            let before = before.unwrap_or_default();
            streams.iter_mut().zip(&before).for_each(|(to, from)| to.clone_from(from));
            self.left = streams.split_off(in_batch);
            return result;
        }
        let has_moved = streams.len() != self.copies.len()
            || places.iter().enumerate().any(|(i, &place)| i != place);
        if has_moved {
            let mut all: Vec<_> = core::mem::take(streams).into_iter().map(Some).collect();
            streams.extend((0..self.copies.len()).filter_map(|index| all[now(index)].take()));
            self.places.iter_mut().enumerate().for_each(|(i, place)| *place = i);
        }
        Ok(())
    }
}
