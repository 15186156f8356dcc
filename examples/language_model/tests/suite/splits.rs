//! How tokens are split over calls makes no difference, whatever the kernel.

use crate::common::{Sizes, difference, logits, session, tokens};
use anyhow::bail;
use dijiang::MultiHead;
use language_model::kernels::{Kernel, state_bytes};
use language_model::session::Session;
use ndarray::{Array2, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Every name and option, so small that windows and budgets overflow.
const KERNELS: [&str; 47] = [
    "softmax",
    "softmax,state=q8",
    "window:16,state=q8",
    "window:16",
    "window,window=9,sinks=2",
    "window:8,sinks=0",
    "window:16,heavy=5",
    "window:16,exact=2",
    "merged:8,window=16",
    "merged:8,window=0,sinks=0",
    "merged:8,window=16,pool",
    "merged:8,window=16,exact=2",
    "merged:8,window=16,pool,exact=1",
    "merged:8,window=16,pool,exact=2",
    "merged:8,window=16,calibrated",
    "merged:8,window=16,heavy=3",
    "merged:8,window=16,heavy=3,calibrated,exact=2",
    "merged:8,window=16,sinks=0,decay=0.9,min-age=4,block=5,value-weight=0.5",
    "merged:8,window=16,metric=identity,pool,block=3",
    "merged:8,window=16,metric=query-diagonal",
    "merged:8,window=16,state=q8",
    "merged:8,window=16,pool,exact=1,state=bf16",
    "merged:8,window=16,sinks=0,block=5,state=q8",
    "ward:8,window=16",
    "ward:8,window=16,block=4,calibrated",
    "ward:8,window=16,heavy=3,sinks=1,exact=3",
    "taylor:3,window=16",
    "taylor:3,window=16,calibrated",
    "taylor:3,window=16,sinks=0,heavy=2",
    "performer:32",
    "performer:32,seed=7",
    "performer:32,calibrated",
    "performer:32,window=16",
    "performer:32,window=16,sinks=0,heavy=3,calibrated",
    "performer:32,exact=2",
    "dct:32",
    "dct:32,calibrated,seed=3",
    "dct:32,window=16",
    "dct:32,window=16,calibrated,heavy=2",
    "wpff:32",
    "wpff:32,calibrated",
    "wpff:32,window=16,sinks=2,seed=5",
    "official",
    "official,seed=4",
    "elu",
    "relu",
    "relu,exact=2",
];

/// Of the largest logit. Here, windows and everything behind one gave the same bits however the
/// tokens were split; softmax and linear attention did not, nor what keeps heads exact.
const TOLERANCE: f64 = 1e-4;

const TOKENS: usize = 101;

fn tiny() -> (Session, crate::common::Written) {
    session(&Sizes { seed: 40, ..Sizes::default() }, 256)
}

/// Runs a check on every kernel.
fn each(mut check: impl FnMut(&Session, &str, &[MultiHead<f32>])) {
    let (session, _file) = tiny();
    for name in KERNELS {
        let kernel: Kernel = name.parse().unwrap();
        let attention =
            session.attention(&kernel).unwrap_or_else(|error| panic!("{name}: {error:#}"));
        check(&session, name, &attention.layers);
    }
}

/// Lengths of pieces, one token often among them.
fn pieces(seed: u64) -> Vec<usize> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let most = [1, 3, 12, 40][seed as usize % 4];
    (0..TOKENS).map(|_| random.random_range(1..=most)).collect()
}

fn as_f64(x: &Array2<f32>) -> Array2<f64> {
    x.mapv(f64::from)
}

#[test]
fn pieces_make_no_difference() {
    let read = tokens(TOKENS, 300, 1);
    each(|session, name, layers| {
        let model = &session.model;
        let fed = |pieces: &[usize]| {
            let mut state = model.state(layers).unwrap();
            let found = logits(model, &mut state, &read, pieces);
            assert_eq!(state.position(), TOKENS);
            assert_eq!(
                state.bytes(),
                state_bytes(layers, model.config(), TOKENS).unwrap(),
                "{name}"
            );
            found
        };
        let whole = fed(&[]);
        assert!(whole.iter().all(|x| x.is_finite()), "{name}");
        let (mut same, mut worst) = (true, 0.0_f64);
        for seed in 0..6 {
            let split = fed(&pieces(seed));
            let found = difference(&split, &as_f64(&whole));
            worst = worst.max(found);
            assert!(found < TOLERANCE, "`{name}` in pieces {:?}: {found:e}", pieces(seed));
            same &= split == whole;
        }
        println!("{name}: {}, {worst:e}", if same { "the same bits" } else { "other bits" });
    });
}

#[test]
fn kernels_differ() {
    // what is fed to them is long enough to tell them from exact attention
    let read = tokens(TOKENS, 300, 2);
    let mut exact = None;
    each(|session, name, layers| {
        let found = logits(&session.model, &mut session.model.state(layers).unwrap(), &read, &[]);
        let exact = exact.get_or_insert_with(|| as_f64(&found));
        let difference = difference(&found, exact);
        assert_eq!(difference > 1e-3, name != "softmax", "{name}: {difference:e}");
    });
}

#[test]
fn reset_forgets_and_a_clone_goes_on() {
    let (first, second) = (tokens(TOKENS, 300, 3), tokens(TOKENS, 300, 4));
    each(|session, name, layers| {
        let model = &session.model;
        let fresh = logits(model, &mut model.state(layers).unwrap(), &second, &[40]);
        let mut state = model.state(layers).unwrap();
        logits(model, &mut state, &first, &[]);
        state.reset();
        assert_eq!(state.position(), 0);
        assert_eq!(
            logits(model, &mut state, &second[..40], &[]),
            fresh.slice(s![..40, ..]),
            "{name}"
        );
        let mut clone = state.clone();
        for state in [&mut state, &mut clone] {
            assert_eq!(
                logits(model, state, &second[40..], &[]),
                fresh.slice(s![40.., ..]),
                "{name}"
            );
        }
        assert_eq!((clone.position(), clone.bytes()), (state.position(), state.bytes()));
    });
}

#[test]
fn an_unknown_token_changes_nothing() {
    let read = tokens(TOKENS, 300, 5);
    each(|session, name, layers| {
        let model = &session.model;
        let whole = logits(model, &mut model.state(layers).unwrap(), &read, &[50]);
        let mut state = model.state(layers).unwrap();
        let before = logits(model, &mut state, &read[..50], &[]);
        let bytes = state.bytes();
        for wrong in [vec![300], vec![1, 2, u32::MAX], vec![300, 5]] {
            let error = model.extend(&mut state, &wrong).unwrap_err().to_string();
            assert!(error.contains("beyond the vocabulary of 300"), "{error}");
        }
        assert_eq!((state.position(), state.bytes()), (50, bytes));
        let after = logits(model, &mut state, &read[50..], &[]);
        assert_eq!(ndarray::concatenate![ndarray::Axis(0), before, after], whole, "{name}");
    });
}

#[test]
fn a_failure_between_layers_breaks_the_state_until_it_is_reset() {
    let read = tokens(TOKENS, 300, 6);
    each(|session, name, layers| {
        let model = &session.model;
        let fresh = logits(model, &mut model.state(layers).unwrap(), &read, &[]);
        let mut state = model.state(layers).unwrap();
        logits(model, &mut state, &read[..30], &[]);
        // the first layer has read the tokens, the second has not
        let error =
            model.extend_observed(&mut state, &read[30..40], &mut |seen| match seen.layer {
                0 => Ok(()),
                layer => bail!("enough seen in layer {layer}"),
            });
        assert_eq!(error.unwrap_err().to_string(), "enough seen in layer 1");
        for state in [&mut state.clone(), &mut state] {
            let error = model.extend(state, &read[30..]).unwrap_err().to_string();
            assert!(error.contains("failed before: reset it"), "{error}");
            assert_eq!(state.position(), 30);
        }
        state.reset();
        assert_eq!(logits(model, &mut state, &read, &[]), fresh, "{name}");
    });
}

#[test]
fn observers_see_what_attention_gets() {
    let (session, _file) = tiny();
    let attention = session.attention(&"softmax".parse().unwrap()).unwrap();
    let mut state = session.model.state(&attention.layers).unwrap();
    let mut seen = Vec::new();
    for piece in [3, 1] {
        session
            .model
            .extend_observed(&mut state, &tokens(piece, 300, 7), &mut |of| {
                seen.push((of.layer, of.q.dim(), of.k.dim(), of.v.dim()));
                Ok(())
            })
            .unwrap();
    }
    let of = |layer, n| (layer, (4, n, 16), (2, n, 16), (2, n, 16));
    assert_eq!(seen, [of(0, 3), of(1, 3), of(0, 1), of(1, 1)]);
}

#[test]
fn layers_must_fit_the_model() {
    let (session, _file) = tiny();
    let layers = crate::common::softmax(&session.model);
    let error = session.model.state(&layers[..1]).unwrap_err().to_string();
    assert!(error.contains("1 layers of attention for 2"), "{error}");
    let other = Sizes { key_length: Some(8), ..Sizes::default() }.write().model();
    let mut state = session.model.state(&crate::common::softmax(&other)).unwrap();
    let error = format!("{:#}", session.model.extend(&mut state, &[1]).unwrap_err());
    assert!(error.contains("attention of layer 0"), "{error}");
}
