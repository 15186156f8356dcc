//! Every kernel with sizes, numbers, splits and slips that nobody would write down.

use crate::common::checker::{Snapshot, feed, units};
use crate::common::{Subject, assert_close, tokens, wide};
use crate::fuzzed::input::{Arrays, pieces, with_kernel};
use arbitrary::{Result, Unstructured};
use dijiang::{Attention, Error, Mask, Scalar, Stream};
use ndarray::{Array2, concatenate, s};
use std::sync::Arc;

/// A forward pass and a stream of one kernel.
pub fn kernels(bytes: &[u8]) {
    let _ = with_kernel(&mut Unstructured::new(bytes), check::<f32>, check::<f64>);
}

fn check<T: Scalar>(
    subject: &Subject,
    kernel: &Arc<dyn Attention<T>>,
    u: &mut Unstructured<'_>,
) -> Result<()> {
    let n = u.int_in_range(0..=140)?;
    let dv = u.int_in_range(1..=5)?;
    let arrays = Arrays::<T>::of(u, n, subject.head_dim, dv)?;
    let mask = *u.choose(&[Mask::Causal, Mask::Full])?;
    let whole = forward(subject, &**kernel, &arrays, mask);
    if subject.has_streams() {
        let whole = whole.filter(|_| mask == Mask::Causal && arrays.is_mild);
        stream(subject, &**kernel, &arrays, whole, u)?;
    }
    Ok(())
}

/// What an error may be.
fn assert_documented(subject: &Subject, error: &Error, is_bad: bool) {
    let is_documented = match error {
        Error::NotFinite { .. } => is_bad,
        Error::Overflow { .. } | Error::Normalizer { .. } | Error::NothingSeen { .. } => true,
        Error::Unsupported { .. } | Error::ZeroSize { .. } | Error::TooLong { .. } => true,
        Error::Shape { .. } => true,
        _ => false,
    };
    assert!(is_documented, "{}: {error}", subject.name);
    assert!(!error.to_string().is_empty());
}

/// The formula, or an error.
fn forward<T: Scalar>(
    subject: &Subject,
    kernel: &dyn Attention<T>,
    arrays: &Arrays<T>,
    mask: Mask,
) -> Option<Array2<T>> {
    let [q, k, v] = &arrays.qkv;
    let name = &subject.name;
    let mut out = Array2::from_elem((q.nrows(), v.ncols()), T::nan());
    match kernel.forward_into(q.view(), k.view(), v.view(), mask, out.view_mut()) {
        Ok(()) => {
            assert!(!arrays.is_bad, "{name}: bad numbers give numbers");
            assert!(out.iter().all(|x| x.is_finite()), "{name}: not finite");
            if arrays.is_mild && q.nrows() > 0 && subject.masks().contains(&mask) {
                let exact = subject.oracle(&wide(q), &wide(k), &wide(v), mask);
                assert_close(name, &out, &exact, subject.units::<T>());
            }
            Some(out)
        }
        Err(error) => {
            assert_documented(subject, &error, arrays.is_bad);
            None
        }
    }
}

/// Pieces of any size; pieces that fail change nothing; saved, restored, rolled back, cloned.
fn stream<T: Scalar>(
    subject: &Subject,
    kernel: &dyn Attention<T>,
    arrays: &Arrays<T>,
    whole: Option<Array2<T>>,
    u: &mut Unstructured<'_>,
) -> Result<()> {
    let name = &subject.name;
    let [q, k, v] = &arrays.qkv;
    let mut stream = kernel.stream(v.ncols()).expect("a stream");
    let probe = tokens::<T>(3, subject.head_dim, v.ncols(), 0.7, 9);
    let mut taken: [Vec<Array2<T>>; 3] = Default::default();
    let mut start = 0;
    for size in pieces(u, q.nrows())? {
        let rows = s![start..start + size, ..];
        let piece = [q, k, v].map(|x| x.slice(rows).to_owned());
        slip(subject, &mut *stream, &piece, &probe, u)?;
        if extend(
            subject,
            &mut *stream,
            &piece,
            &probe,
            whole.as_ref().map(|x| x.slice(rows).to_owned()),
        ) {
            taken.iter_mut().zip(piece).for_each(|(all, x)| all.push(x));
        }
        start += size;
    }
    // what it is now is what the same tokens at once make of it, but for rounding
    let taken: [Array2<T>; 3] = std::array::from_fn(|i| {
        let none = Array2::zeros((0, arrays.qkv[i].ncols()));
        let all: Vec<_> =
            std::iter::once(none.view()).chain(taken[i].iter().map(|x| x.view())).collect();
        concatenate(ndarray::Axis(0), &all).expect("the same columns")
    });
    assert_eq!(stream.len(), taken[0].nrows(), "{name}");
    if !arrays.is_mild || taken[0].nrows() == 0 || subject.merges() {
        return Ok(());
    }
    let last = taken.each_ref().map(|x| x.slice(s![..1, ..]).to_owned());
    let mut fresh = kernel.stream(v.ncols()).expect("a stream");
    feed(&mut *fresh, &taken, &[taken[0].nrows()]);
    let [a, b] = [&mut stream, &mut fresh].map(|stream| feed(&mut **stream, &last, &[1]));
    assert_close(&format!("{name} in pieces"), &a, &wide(&b), 2.0 * units::<T>(60.0));
    Ok(())
}

/// Whether the stream took the piece.
fn extend<T: Scalar>(
    subject: &Subject,
    stream: &mut dyn Stream<T>,
    piece: &[Array2<T>; 3],
    probe: &[Array2<T>; 3],
    whole: Option<Array2<T>>,
) -> bool {
    let name = &subject.name;
    let [q, k, v] = piece;
    let before = Snapshot::of(&*stream, probe);
    let mut out = Array2::from_elem((q.nrows(), v.ncols()), T::nan());
    match stream.extend(q.view(), k.view(), v.view(), out.view_mut()) {
        Ok(()) => {
            let is_bad = piece.iter().flatten().any(|x| !x.is_finite());
            assert!(!is_bad, "{name}: bad numbers are taken");
            assert!(out.iter().all(|x| x.is_finite()), "{name}: not finite");
            if let Some(whole) = whole.filter(|_| q.nrows() > 0 && !subject.merges()) {
                assert_close(&format!("{name} in pieces"), &out, &wide(&whole), units::<T>(60.0));
            }
            true
        }
        Err(error) => {
            let is_bad = piece.iter().flatten().any(|x| !x.is_finite());
            assert_documented(subject, &error, is_bad);
            assert_eq!(Snapshot::of(&*stream, probe), before, "{name}: {error}");
            false
        }
    }
}

/// Something that must leave no trace.
fn slip<T: Scalar>(
    subject: &Subject,
    stream: &mut dyn Stream<T>,
    piece: &[Array2<T>; 3],
    probe: &[Array2<T>; 3],
    u: &mut Unstructured<'_>,
) -> Result<()> {
    let name = &subject.name;
    let before = Snapshot::of(&*stream, probe);
    match u.int_in_range(0..=6)? {
        0 => {
            // a wrong shape
            let [q, k, v] = piece;
            let (more_rows, more_columns) = (u.arbitrary::<bool>()?, u.arbitrary::<bool>()?);
            let shape = (q.nrows() + usize::from(more_rows), v.ncols() + usize::from(more_columns));
            let mut out = Array2::zeros(shape);
            let found = stream.extend(q.view(), k.view(), v.view(), out.view_mut());
            if more_rows || more_columns {
                assert!(found.is_err(), "{name}: an output of {shape:?}");
            } else if found.is_ok() {
                // it was no slip
                stream_back(stream, &before);
            }
        }
        1 if stream.checkpoint() => {
            let [q, k, v] = piece;
            let mut out = Array2::zeros((q.nrows(), v.ncols()));
            for _ in 0..u.int_in_range(0..=3)? {
                let _ = stream.extend(q.view(), k.view(), v.view(), out.view_mut());
            }
            stream.rollback().expect("there is a checkpoint");
        }
        2 => {
            let mut other = stream.clone_box();
            let _ = extend(subject, &mut *other, piece, probe, None);
        }
        3 => stream_back(stream, &before),
        _ => {}
    }
    assert_eq!(Snapshot::of(&*stream, probe), before, "{name}: a trace is left");
    Ok(())
}

/// Empties a stream and restores its state.
fn stream_back<T: Scalar>(stream: &mut dyn Stream<T>, state: &Snapshot<T>) {
    if let Snapshot::Saved(state) = state {
        stream.reset();
        stream.restore(state).expect("its own state");
    }
}
