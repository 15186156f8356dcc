//! The model against a forward pass in `f64` written for reading.

use crate::common::naive::Naive;
use crate::common::{Scaling, Sizes, difference, logits, softmax, tokens};
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use language_model::model::{Model, Scales};

/// Within this of the largest logit: what `f32` gives, times four.
const TOLERANCE: f64 = 4e-6;

fn check(sizes: &Sizes) {
    let written = sizes.write();
    let model = written.model();
    let naive = Naive::read(sizes, &written.path);
    let layers = softmax(&model);
    for count in [1, 2, 3, 17, 61] {
        let read = tokens(count, sizes.vocabulary, sizes.seed + count as u64);
        let found = logits(&model, &mut model.state(&layers).unwrap(), &read, &[]);
        let difference = difference(&found, &naive.logits(&read));
        println!("{count} tokens: {difference:e}");
        assert!(difference < TOLERANCE, "{count} tokens of {sizes:?}: {difference:e}");
    }
}

#[test]
fn heads_grouped_or_not() {
    check(&Sizes::default());
    check(&Sizes { kv_heads: 4, layers: 3, seed: 2, ..Sizes::default() });
    check(&Sizes { kv_heads: 1, seed: 3, ..Sizes::default() });
    check(&Sizes {
        width: 96,
        heads: 6,
        kv_heads: 3,
        feed_forward: 64,
        seed: 4,
        ..Sizes::default()
    });
}

#[test]
fn keys_and_values_of_other_lengths() {
    check(&Sizes { width: 32, heads: 4, key_length: Some(16), seed: 5, ..Sizes::default() });
    check(&Sizes { key_length: Some(16), value_length: Some(8), seed: 6, ..Sizes::default() });
    check(&Sizes { key_length: Some(8), value_length: Some(24), seed: 7, ..Sizes::default() });
    check(&Sizes {
        width: 40,
        heads: 3,
        kv_heads: 3,
        key_length: Some(10),
        seed: 8,
        ..Sizes::default()
    });
}

#[test]
fn an_output_head_of_its_own() {
    check(&Sizes { tied: false, seed: 9, ..Sizes::default() });
}

#[test]
fn every_way_of_storing_weights() {
    for (i, weights) in
        [GgmlDType::F16, GgmlDType::BF16, GgmlDType::Q8_0, GgmlDType::Q4_1, GgmlDType::Q4_0]
            .into_iter()
            .enumerate()
    {
        check(&Sizes { weights, tied: i % 2 == 0, seed: 10 + i as u64, ..Sizes::default() });
    }
    // blocks of 256
    for weights in [GgmlDType::Q4K, GgmlDType::Q6K] {
        check(&Sizes {
            weights,
            width: 256,
            heads: 4,
            feed_forward: 256,
            layers: 1,
            seed: 16,
            ..Sizes::default()
        });
    }
}

#[test]
fn rotary_embeddings() {
    check(&Sizes { rope_base: 500_000.0, seed: 20, ..Sizes::default() });
    check(&Sizes { rope_dims: Some(8), seed: 21, ..Sizes::default() });
    check(&Sizes { rope_factors: true, seed: 22, ..Sizes::default() });
    check(&Sizes {
        rope_factors: true,
        rope_dims: Some(10),
        scaling: Scaling::Linear(2.5),
        seed: 23,
        ..Sizes::default()
    });
}

#[test]
fn positions_that_are_scaled() {
    for scaling in
        [Scaling::Linear(4.0), Scaling::FactorOnly(4.0), Scaling::Old(4.0), Scaling::Off(4.0)]
    {
        check(&Sizes { scaling, seed: 24, ..Sizes::default() });
    }
}

#[test]
fn factors_on_the_way() {
    let none = Scales::default();
    for (i, scales) in [
        Scales { embedding: Some(2.5), ..none },
        Scales { residual: Some(0.3), ..none },
        Scales { attention: Some(0.6), ..none },
        Scales { embedding: Some(0.5), residual: Some(1.5), attention: Some(0.1) },
    ]
    .into_iter()
    .enumerate()
    {
        let tied = i % 2 == 0;
        check(&Sizes {
            scales,
            tied,
            key_length: Some(8),
            seed: 30 + i as u64,
            ..Sizes::default()
        });
    }
    // 0 says that there is none
    let written = Sizes::default().write();
    let read = tokens(9, 300, 1);
    let of = |path: &std::path::Path| {
        let model = Model::load(path).unwrap();
        logits(&model, &mut model.state(&softmax(&model)).unwrap(), &read, &[])
    };
    let expected = of(&written.path);
    let mut parts = Sizes::default().parts();
    for key in [
        "embedding_scale",
        "residual_scale",
        "logit_scale",
        "attention.scale",
        "final_logit_softcapping",
    ] {
        parts = parts.set(&format!("llama.{key}"), Some(Value::F32(0.0)));
    }
    parts.write(&written.path);
    assert_eq!(of(&written.path), expected);
}

#[test]
fn no_tokens_change_nothing() {
    let written = Sizes::default().write();
    let model = written.model();
    let mut state = model.state(&softmax(&model)).unwrap();
    assert_eq!(model.extend(&mut state, &[]).unwrap().dim(), (0, 64));
    assert_eq!((state.position(), state.bytes()), (0, 0));
    let read = tokens(9, 300, 1);
    let found = logits(&model, &mut state, &read[..5], &[]);
    assert_eq!(model.extend(&mut state, &[]).unwrap().nrows(), 0);
    let more = logits(&model, &mut state, &read[5..], &[]);
    let whole = logits(&model, &mut model.state(&softmax(&model)).unwrap(), &read, &[]);
    assert_eq!(ndarray::concatenate![ndarray::Axis(0), found, more], whole);
}
