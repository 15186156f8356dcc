//! The state of a block is gone back to, saved and restored, bit for bit; that of another block is
//! refused.

use crate::block::build;
use crate::common::normal;
use dijiang::{DijiangBlock, DijiangBlockStream, Error, Rotary, Scalar};
use ndarray::{Array2, s};

fn extend<T: Scalar>(stream: &mut DijiangBlockStream<T>, x: &Array2<T>) -> Array2<T> {
    let mut out = Array2::from_elem(x.dim(), T::nan());
    stream.extend(x.view(), out.view_mut()).unwrap();
    out
}

fn check<T: Scalar>() {
    let (_, block) = build::<T>(15, 3, 4, 4);
    let x = normal::<T>(20, 15, 1.0, 9);
    let draft = normal::<T>(4, 15, 1.0, 10);
    let (prompt, rest) = (x.slice(s![..8, ..]).to_owned(), x.slice(s![8.., ..]).to_owned());

    let mut stream = block.stream().unwrap();
    assert!(matches!(stream.rollback(), Err(Error::Unsupported { .. })));
    extend(&mut stream, &prompt);
    let mut twin = stream.clone();
    let expected = extend(&mut twin, &rest);

    stream.checkpoint();
    for _ in 0..3 {
        extend(&mut stream, &draft);
        let mut bad = draft.clone();
        bad[[3, 2]] = T::nan();
        let error = stream.extend(bad.view(), Array2::zeros((4, 15)).view_mut()).unwrap_err();
        assert_eq!(error, Error::NotFinite { which: "x", row: 3, column: 2 });
        stream.rollback().unwrap();
        assert_eq!(stream.len(), 8);
    }
    let saved = stream.save().unwrap();
    assert_eq!(extend(&mut stream, &rest), expected);

    // of the same weights, elsewhere, with a state and a checkpoint of its own
    let (_, same) = build::<T>(15, 3, 4, 4);
    let mut other = same.stream().unwrap();
    extend(&mut other, &draft);
    other.checkpoint();
    other.restore(&saved).unwrap();
    assert!(matches!(other.rollback(), Err(Error::Unsupported { .. })), "restored since");
    assert_eq!((other.len(), extend(&mut other, &rest)), (8, expected));

    other.checkpoint();
    other.reset();
    assert!(other.is_empty() && other.rollback().is_err());
}

#[test]
fn a_block_goes_back_and_is_restored() {
    check::<f64>();
    check::<f32>();
}

#[test]
fn the_state_of_another_block_is_refused() {
    let (weights, block) = build::<f64>(16, 2, 8, 1);
    let mut stream = block.stream().unwrap();
    let x = normal::<f64>(6, 16, 1.0, 9);
    extend(&mut stream, &x);
    let saved = stream.save().unwrap();
    let mut turned = weights.clone();
    turned.radii[3] += 1e-9;
    let new = |weights, heads, rotary| DijiangBlock::new(weights, heads, rotary).unwrap();
    for (what, other) in [
        ("weights", build(16, 2, 8, 2).1),
        ("heads", build(16, 4, 4, 1).1),
        ("hidden size", build(8, 1, 2, 1).1),
        ("rotary", build(16, 2, 4, 1).1),
        ("base", new(weights.clone(), 2, Rotary::new(8).unwrap().with_base(500.0).unwrap())),
        ("radii", new(turned, 2, Rotary::new(8).unwrap())),
    ] {
        let hidden = other.hidden();
        let mut stream = other.stream().unwrap();
        let y = normal::<f64>(5, hidden, 1.0, 11);
        extend(&mut stream, &y);
        stream.checkpoint();
        let mut twin = stream.clone();
        let error = stream.restore(&saved).unwrap_err();
        assert!(matches!(error, Error::State { .. }), "{what}: {error}");
        assert_eq!(extend(&mut stream, &y), extend(&mut twin, &y), "{what}");
        stream.rollback().unwrap(); // the checkpoint is still there
        assert_eq!(stream.len(), 5, "{what}");
    }
    // what the state does not depend on may differ
    let mut gate = weights.clone();
    gate.gate *= 2.0;
    let block = new(gate, 2, Rotary::new(8).unwrap()).with_epsilon(1e-3).unwrap();
    block.stream().unwrap().restore(&saved).unwrap();
}

#[cfg(feature = "serde")]
#[test]
fn a_saved_block_serialises() {
    let (_, block) = build::<f32>(12, 3, 4, 5);
    let x = normal::<f32>(10, 12, 1.0, 9);
    let mut stream = block.stream().unwrap();
    extend(&mut stream, &x);
    let text = serde_json::to_string(&stream.save().unwrap()).unwrap();
    let mut other = block.stream().unwrap();
    other.restore(&serde_json::from_str(&text).unwrap()).unwrap();
    assert_eq!(extend(&mut other, &x), extend(&mut stream, &x));
    // a state with a number that is none
    let bad = text.replacen("\"tokens\":10", "\"tokens\":11", 1);
    let bad = serde_json::from_str(&bad).unwrap();
    let before = other.clone().save().unwrap();
    let _ = other.restore(&bad); // taken or refused, never half
    let after = other.save().unwrap();
    assert!(after == before || after == bad);
}
