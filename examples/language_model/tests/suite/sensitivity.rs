//! Sensitivities are what a change of the output of a head does to the loss.

use crate::common::naive::Naive;
use crate::common::{Scaling, Sizes, softmax, tokens};
use candle_core::DType;
use candle_core::quantized::GgmlDType;
use indicatif::ProgressBar;
use language_model::gguf::Gguf;
use language_model::model::Scales;
use language_model::perplexity::loss_of;
use language_model::sensitivity::{Exact, Loss, Sensitivities, steps};
use ndarray::ArrayView1;
use std::path::Path;

fn backward(path: &Path, precision: DType, tokens: &[u32], loss: &Loss) -> Sensitivities {
    let bar = ProgressBar::hidden();
    let mut model = Exact::new(Gguf::open(path).unwrap(), precision).unwrap();
    let found = model.backward(tokens, loss, &bar).unwrap();
    assert_eq!(bar.position(), steps(&Gguf::open(path).unwrap().config().unwrap()) as u64);
    found
}

/// `−ln p` of a token.
fn surprise(row: ArrayView1<'_, f64>, token: u32) -> f64 {
    let largest = row.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
    let sum: f64 = row.iter().map(|x| (x - largest).exp()).sum();
    sum.ln() + largest - row[token as usize]
}

/// The loss by its formula.
fn formula(
    naive: &Naive,
    tokens: &[u32],
    loss: &Loss,
    targets: &[Option<u32>],
    change: &dyn Fn(usize, &mut [Vec<f64>]),
) -> f64 {
    let logits = naive.logits_changed(tokens, change);
    let of = |(row, target): (ArrayView1<'_, f64>, &Option<u32>)| match (loss, target) {
        (_, None) => 0.0,
        (Loss::OwnWords { .. }, Some(y)) => surprise(row, *y),
        (Loss::LogOdds(_), Some(y)) => {
            let p = (-surprise(row, *y)).exp();
            (p / (1.0 - p)).ln()
        }
    };
    logits.outer_iter().zip(targets).map(of).sum()
}

/// Central differences along one direction at some heads and places, against `f64`.
fn check(sizes: &Sizes, loss: &Loss) {
    const STEP: f64 = 1e-4;
    let written = sizes.write();
    let naive = Naive::read(sizes, &written.path);
    let read = tokens(19, sizes.vocabulary, sizes.seed + 40);
    let exact = backward(&written.path, DType::F64, &read, loss);
    let found = formula(&naive, &read, loss, &exact.targets, &|_, _| {});
    assert!((found - exact.loss).abs() < 1e-9 * found.abs(), "{found} {}", exact.loss);

    let d = sizes.value_dim();
    let mut largest = 0.0_f64;
    for layer in 0..sizes.layers {
        for (head, t) in [(0, 0), (sizes.heads - 1, 7), (1, read.len() - 1)] {
            let direction = |c: usize| ((1 + c * 7 + t) as f64).sin();
            let along = |size: f64| {
                formula(&naive, &read, loss, &exact.targets, &|l, mixed| {
                    if l == layer {
                        let o = &mut mixed[t][head * d..(head + 1) * d];
                        o.iter_mut().enumerate().for_each(|(c, o)| *o += size * direction(c));
                    }
                })
            };
            let slope = (along(STEP) - along(-STEP)) / (2.0 * STEP);
            let g = exact.layers()[layer].slice(ndarray::s![head, t, ..]);
            let product: f64 =
                g.iter().enumerate().map(|(c, &g)| f64::from(g) * direction(c)).sum();
            let size: f64 = g.iter().map(|&g| f64::from(g).abs()).sum::<f64>() + 1e-3;
            assert!(
                (slope - product).abs() < 1e-6 * size,
                "layer {layer}, head {head}, token {t}: {slope} by differences, {product}"
            );
            largest = largest.max(slope.abs());
        }
    }
    assert!(largest > 1e-3, "nothing was tested");
}

#[test]
fn they_are_what_central_differences_of_the_formula_give() {
    check(&Sizes::default(), &Loss::OwnWords { seed: 3 });
    check(&Sizes { kv_heads: 1, tied: false, seed: 2, ..Sizes::default() }, &Loss::LogOdds(9..17));
    check(
        &Sizes { key_length: Some(8), value_length: Some(24), seed: 3, ..Sizes::default() },
        &Loss::OwnWords { seed: 0 },
    );
    check(&Sizes { weights: GgmlDType::Q4_1, seed: 4, ..Sizes::default() }, &Loss::LogOdds(1..19));
}

#[test]
fn every_option_of_a_model_has_its_part() {
    let scales = Scales { embedding: Some(1.5), residual: Some(0.7), attention: Some(0.4) };
    // without a head of its own an embedding scaled up leaves the model no doubt, and no gradient
    let tied = false;
    let sizes = Sizes { scales, tied, rope_factors: true, rope_dims: Some(12), ..Sizes::default() };
    check(&sizes, &Loss::OwnWords { seed: 5 });
    let sizes = Sizes { scaling: Scaling::Linear(2.0), kv_heads: 4, layers: 3, ..sizes };
    check(&sizes, &Loss::LogOdds(4..12));
}

/// More tokens than a block of queries and than the rows of logits that are held at once.
#[test]
fn single_precision_and_blocks_change_little() {
    let sizes = Sizes::default();
    let written = sizes.write();
    let read = tokens(530, sizes.vocabulary, 8);
    for loss in [Loss::OwnWords { seed: 1 }, Loss::LogOdds(300..530)] {
        let exact = backward(&written.path, DType::F64, &read, &loss);
        let single = backward(&written.path, DType::F32, &read, &loss);
        let same = exact.targets.iter().zip(&single.targets).filter(|(a, b)| a == b).count();
        if same < read.len() {
            continue; // a draw at the edge of two tokens
        }
        for (exact, single) in exact.layers().iter().zip(single.layers()) {
            let largest = exact.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
            let off = exact.iter().zip(single).fold(0.0_f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(off < 2e-4 * largest, "{off:e} of {largest}");
        }
        assert!((exact.loss - single.loss).abs() < 1e-4 * exact.loss.abs());
    }
}

/// Later tokens feel what earlier heads put out, and the loss is that of the fast model.
#[test]
fn the_forward_pass_is_that_of_the_model() {
    let sizes = Sizes::default();
    let written = sizes.write();
    let model = written.model();
    let read = tokens(300, sizes.vocabulary, 9);
    let found = backward(&written.path, DType::F32, &read, &Loss::OwnWords { seed: 7 });
    let mut state = model.state(&softmax(&model)).unwrap();
    let hidden = model.extend(&mut state, &read).unwrap();
    let logits = model.logits(&mut state, &hidden);
    let targets = found.targets.iter().map(|target| target.unwrap());
    let loss: f64 = logits.outer_iter().zip(targets).map(|(row, y)| loss_of(row, y)).sum();
    assert!((loss - found.loss).abs() < 1e-4 * loss, "{loss} {}", found.loss);
    // drawn from the model: on average as surprising as it says
    assert!(loss / (read.len() as f64) < f64::from(sizes.vocabulary as u32).ln());
}

#[test]
fn the_same_seed_draws_the_same_words() {
    let sizes = Sizes::default();
    let written = sizes.write();
    let read = tokens(40, sizes.vocabulary, 10);
    let of = |seed| backward(&written.path, DType::F32, &read, &Loss::OwnWords { seed });
    assert_eq!(of(1).targets, of(1).targets);
    assert_eq!(of(1).layers(), of(1).layers());
    assert_ne!(of(1).targets, of(2).targets);
}

#[test]
fn bad_places_and_tokens_are_refused() {
    let sizes = Sizes::default();
    let written = sizes.write();
    let mut model = Exact::new(Gguf::open(&written.path).unwrap(), DType::F32).unwrap();
    let mut error = |tokens: &[u32], loss: &Loss| {
        format!("{:#}", model.backward(tokens, loss, &ProgressBar::hidden()).unwrap_err())
    };
    let own = Loss::OwnWords { seed: 0 };
    assert!(error(&[], &own).contains("no text"));
    assert!(error(&[1, 300], &own).contains("token 300 is beyond the vocabulary of 300"));
    for places in [0..2, 2..9, 2..2] {
        let error = error(&[1, 2, 3], &Loss::LogOdds(places.clone()));
        assert!(error.contains(&format!("{places:?}")), "{error}");
    }
}
