//! The batch of a layer's stream: sequences change places, are copied, leave, and begin anew, each
//! as if it had always been alone; a checkpoint brings back the batch of its time.

use crate::common::normal;
use crate::layer_streams::{D, HEADS, layers};
use dijiang::{
    Attention, Error, Head, Mask, MultiHead, MultiHeadStream, Scratch, SoftmaxAttention, Stream,
};
use ndarray::{Array4, Axis, concatenate};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Queries, keys and values of one sequence.
#[derive(Clone)]
struct Tokens([Array4<f64>; 3]);

fn tokens(layer: &MultiHead<f64>, n: usize, seed: u64) -> Tokens {
    let draw = |heads: usize, d: usize, seed: u64| {
        normal::<f64>(heads * n, d, 0.8, seed).into_shape_with_order((1, heads, n, d)).unwrap()
    };
    let kv = layer.kv_heads();
    Tokens([draw(HEADS, D, 3 * seed), draw(kv, D, 3 * seed + 1), draw(kv, 3, 3 * seed + 2)])
}

/// One call with as many tokens of each sequence.
fn extend(stream: &mut MultiHeadStream<f64>, all: &[Tokens]) -> Array4<f64> {
    let [q, k, v] = [0, 1, 2].map(|i| {
        let views: Vec<_> = all.iter().map(|tokens| tokens.0[i].view()).collect();
        concatenate(Axis(0), &views).unwrap()
    });
    let mut out = Array4::from_elem((all.len(), HEADS, q.dim().2, 3), f64::NAN);
    stream.extend(q.view(), k.view(), v.view(), None, out.view_mut()).unwrap();
    out
}

/// The same sequences, each with a stream of its own.
struct Alone(Vec<MultiHeadStream<f64>>);

impl Alone {
    fn new(layer: &MultiHead<f64>, batch: usize) -> Self {
        Self((0..batch).map(|_| layer.stream(1, 3).unwrap()).collect())
    }

    fn check(&mut self, what: &str, stream: &mut MultiHeadStream<f64>, all: &[Tokens]) {
        let found = extend(stream, all);
        for (i, (alone, tokens)) in self.0.iter_mut().zip(all).enumerate() {
            let expected = extend(alone, std::slice::from_ref(tokens));
            assert_eq!(found.index_axis(Axis(0), i), expected.index_axis(Axis(0), 0), "{what} {i}");
        }
        let lengths: Vec<_> = self.0.iter().flat_map(|alone| alone.lengths()).collect();
        assert_eq!(stream.lengths(), lengths, "{what}");
        let floats: usize = self.0.iter().map(|alone| alone.state_floats()).sum();
        assert_eq!(stream.state_floats(), floats, "{what}");
    }

    fn reorder(&mut self, rows: &[usize]) {
        self.0 = rows.iter().map(|&row| self.0[row].clone()).collect();
    }
}

/// A batch of sequences of 3, 8 and 5 tokens, in one stream and alone.
fn ragged(layer: &MultiHead<f64>) -> (MultiHeadStream<f64>, Alone) {
    let (mut stream, mut alone) = (layer.stream(3, 3).unwrap(), Alone::new(layer, 3));
    let lengths = [3, 8, 5];
    let all = [1, 2, 3].map(|seed| tokens(layer, 8, seed));
    let [q, k, v] = [0, 1, 2].map(|i| {
        concatenate(Axis(0), &[all[0].0[i].view(), all[1].0[i].view(), all[2].0[i].view()]).unwrap()
    });
    let mut out = Array4::zeros((3, HEADS, 8, 3));
    stream.extend(q.view(), k.view(), v.view(), Some(&lengths), out.view_mut()).unwrap();
    for ((alone, tokens), length) in alone.0.iter_mut().zip(&all).zip(lengths) {
        let [q, k, v] = &tokens.0;
        let mut out = Array4::zeros((1, HEADS, 8, 3));
        alone.extend(q.view(), k.view(), v.view(), Some(&[length]), out.view_mut()).unwrap();
    }
    (stream, alone)
}

fn fresh(layer: &MultiHead<f64>, batch: usize, n: usize, seed: u64) -> Vec<Tokens> {
    (0..batch).map(|i| tokens(layer, n, 100 * seed + i as u64)).collect()
}

#[test]
fn reordered_sequences_go_on_as_alone() {
    for (name, layer) in layers() {
        for rows in [&[2, 0, 1][..], &[2, 0, 2], &[1, 1, 1], &[1], &[0, 0, 1, 2, 2], &[0, 1, 2]] {
            let (mut stream, mut alone) = ragged(&layer);
            stream.reorder(rows).unwrap();
            alone.reorder(rows);
            for (n, seed) in [(1, 1), (9, 2), (1, 3)] {
                let what = format!("{name} {rows:?}");
                alone.check(&what, &mut stream, &fresh(&layer, rows.len(), n, seed));
            }
            // and again, back to three
            let again = [rows.len() - 1, 0, 0];
            stream.reorder(&again).unwrap();
            alone.reorder(&again);
            alone.check(&name, &mut stream, &fresh(&layer, 3, 2, 4));
        }
    }
}

#[test]
fn one_sequence_begins_anew() {
    for (name, layer) in layers() {
        let (mut stream, mut alone) = ragged(&layer);
        stream.reset_sequence(1).unwrap();
        alone.0[1] = layer.stream(1, 3).unwrap();
        assert_eq!(stream.lengths(), [3, 0, 5], "{name}");
        for (n, seed) in [(7, 1), (1, 2)] {
            alone.check(&name, &mut stream, &fresh(&layer, 3, n, seed));
        }
    }
}

#[test]
fn what_is_not_in_the_batch_is_refused() {
    for (name, layer) in layers() {
        let (mut stream, mut alone) = ragged(&layer);
        assert_eq!(stream.reorder(&[]), Err(Error::ZeroSize { which: "rows" }));
        for (rows, found) in [
            (&[3][..], "3 at index 0"),
            (&[0, 1, usize::MAX, 7], "18446744073709551615 at index 2"),
        ] {
            let error = stream.reorder(rows).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(found) && text.contains("`rows`"), "{name}: {text}");
        }
        for sequence in [3, usize::MAX] {
            let error = stream.reset_sequence(sequence).unwrap_err();
            assert!(
                matches!(&error, Error::InvalidOption { which: "sequence", found, .. }
                    if *found == sequence.to_string()),
                "{name}: {error}"
            );
        }
        alone.check(&name, &mut stream, &fresh(&layer, 3, 2, 1));
    }
}

/// The checkpoint belongs to the sequences of its time, wherever they went.
#[test]
fn a_rollback_brings_the_batch_of_the_checkpoint_back() {
    for (name, layer) in layers() {
        let (mut stream, mut alone) = ragged(&layer);
        stream.checkpoint();
        let first = fresh(&layer, 3, 4, 1);
        for round in 0..3 {
            extend(&mut stream, &first);
            stream.reorder(&[2, 2]).unwrap(); // 0 and 1 leave
            extend(&mut stream, &fresh(&layer, 2, 1, 10 + round));
            stream.reorder(&[1, 0, 0, 1]).unwrap();
            stream.reset_sequence(3).unwrap();
            stream.reset_sequence(0).unwrap();
            extend(&mut stream, &fresh(&layer, 4, 3, 20 + round));
            stream.reorder(&[0]).unwrap();
            stream.rollback().unwrap();
            assert_eq!(stream.lengths(), [3, 8, 5], "{name}");
        }
        // a permutation and a slot that began anew
        stream.reorder(&[1, 2, 0]).unwrap();
        stream.reset_sequence(1).unwrap();
        stream.rollback().unwrap();
        stream.rollback().unwrap();
        alone.check(&name, &mut stream, &first);
        // a new checkpoint is of the batch as it is now
        stream.reorder(&[2, 0]).unwrap();
        alone.reorder(&[2, 0]);
        stream.checkpoint();
        stream.reorder(&[1, 1, 1]).unwrap();
        stream.rollback().unwrap();
        alone.check(&name, &mut stream, &fresh(&layer, 2, 1, 30));
        stream.reset();
        assert!(stream.rollback().is_err(), "{name}");
    }
}

#[test]
fn a_rollback_that_fails_changes_nothing() {
    for (name, layer) in layers() {
        let (mut stream, _) = ragged(&layer);
        stream.checkpoint();
        stream.reorder(&[2, 1, 2]).unwrap(); // 0 leaves; its own states are in places 1 and 2
        stream.head_mut(1, 0).unwrap().reset();
        let mut copy = stream.clone();
        let error = stream.rollback().unwrap_err();
        assert!(matches!(error, Error::InHead { sequence: 1, .. }), "{name}: {error}");
        let next = fresh(&layer, 3, 2, 1);
        assert_eq!(extend(&mut stream, &next), extend(&mut copy, &next), "{name}");
    }
}

/// Saved after a change of the batch, restored into a stream of as many sequences.
#[test]
fn a_reordered_batch_is_saved_and_restored() {
    let layer = MultiHead::new(SoftmaxAttention::<f64>::new(D).unwrap(), HEADS, 2).unwrap();
    let (mut stream, mut alone) = ragged(&layer);
    stream.reorder(&[2, 1]).unwrap();
    alone.reorder(&[2, 1]);
    let mut other = layer.stream(2, 3).unwrap();
    other.restore(&stream.save().unwrap()).unwrap();
    alone.check("restored", &mut other, &fresh(&layer, 2, 3, 1));
    assert!(matches!(
        layer.stream(3, 3).unwrap().restore(&stream.save().unwrap()),
        Err(Error::State { .. })
    ));
}

/// A kernel whose streams count their copies.
#[derive(Clone, Debug)]
struct Counting(Arc<AtomicUsize>);

#[derive(Debug)]
struct CountingStream(Counting, usize);

impl Clone for CountingStream {
    fn clone(&self) -> Self {
        self.0.0.fetch_add(1, Ordering::Relaxed);
        Self(self.0.clone(), self.1)
    }
}

impl Attention<f64> for Counting {
    fn forward_heads(
        &self,
        _: &mut [Head<'_, f64>],
        _: Mask,
        _: &mut Scratch<f64>,
    ) -> Result<(), Error> {
        Ok(())
    }

    fn stream(&self, _: usize) -> Result<Box<dyn Stream<f64>>, Error> {
        Ok(Box::new(CountingStream(self.clone(), 0)))
    }
}

impl Stream<f64> for CountingStream {
    fn extend_heads(&mut self, heads: &mut [Head<'_, f64>]) -> Result<(), Error> {
        self.1 += heads[0].keys();
        Ok(())
    }

    fn len(&self) -> usize {
        self.1
    }

    fn state_floats(&self) -> usize {
        0
    }

    fn reset(&mut self) {
        self.1 = 0;
    }
}

#[test]
fn only_what_comes_twice_is_copied() {
    let copies = Arc::new(AtomicUsize::new(0));
    let layer = MultiHead::new(Counting(Arc::clone(&copies)), HEADS, HEADS).unwrap();
    let mut stream = layer.stream(3, 3).unwrap();
    for (rows, expected) in [
        (&[2, 0, 1][..], 0),
        (&[0, 1, 2], 0),
        (&[1, 2], 0),
        (&[1, 0, 1], HEADS),
        (&[2, 2, 2, 0], 2 * HEADS),
    ] {
        copies.store(0, Ordering::Relaxed);
        stream.reorder(rows).unwrap();
        assert_eq!(copies.load(Ordering::Relaxed), expected, "{rows:?}");
    }
}
