//! Every kernel and every map keeps the promises of the shared checker.

use crate::common::alibi::alibi_subject;
use crate::common::checker::{check_attention, check_feature_map, feed};
use crate::common::{
    MAPS, SIGNED_MAPS, map, optional_subjects, subjects, tokens, written_subjects,
};
use dijiang::{Attention, LinearAttention, Mask};
use proptest::prelude::*;

#[test]
fn every_attention_keeps_its_promises() {
    for (d, m) in [(8, 20), (1, 1), (3, 7), (16, 16)] {
        for subject in subjects(d, m) {
            check_attention(&subject);
        }
    }
}

#[test]
fn every_attention_with_options_keeps_its_promises() {
    for (d, m) in [(8, 20), (1, 1), (3, 7)] {
        for subject in optional_subjects(d, m) {
            check_attention(&subject);
        }
    }
}

#[test]
fn every_attention_with_positions_keeps_its_promises() {
    for (d, m) in [(8, 20), (1, 1), (3, 7), (16, 16)] {
        for subject in written_subjects(d, m) {
            check_attention(&subject);
        }
    }
}

/// A kernel of one's own, in three methods, is held to the same promises.
#[test]
fn a_kernel_of_three_methods_keeps_its_promises() {
    for d in [1, 3, 8] {
        for slope in [0.0, 0.25] {
            check_attention(&alibi_subject(d, slope));
        }
    }
}

#[test]
fn every_map_keeps_its_promises() {
    for (d, m) in
        [(1, 1), (1, 5), (3, 7), (8, 8), (8, 50), (80, 33), (96, 192), (100, 64), (128, 130)]
    {
        for name in MAPS.into_iter().chain(SIGNED_MAPS) {
            if name == "taylor" && d > 16 {
                continue; // thousands of features: once is enough, below
            }
            check_feature_map::<f32>(&format!("{name} d={d} m={m}"), &*map(name, d, m, 3));
            check_feature_map::<f64>(&format!("{name} d={d} m={m}"), &*map(name, d, m, 3));
        }
    }
    check_feature_map::<f32>("taylor d=64", &*map("taylor", 64, 0, 0));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Any kernel, any split, any sizes of head and values, any norms: the stream is the forward
    /// pass.
    #[test]
    fn any_split_equals_forward(
        which in 0..MAPS.len(),
        d in 1_usize..12,
        m in 1_usize..40,
        dv in 1_usize..5,
        sizes in prop::collection::vec(0_usize..70, 1..6),
        size in 0.01..2.0_f64,
        seed in 0_u64..1000,
    ) {
        let n: usize = sizes.iter().sum();
        prop_assume!(n > 0);
        let kernel = LinearAttention::new(map::<f64>(MAPS[which], d, m, seed));
        let input = tokens::<f64>(n, d, dv, size, seed);
        let [q, k, v] = &input;
        let whole = kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap();
        let out = feed(&mut *Attention::<f64>::stream(&kernel, dv).unwrap(), &input, &sizes);
        let what = format!("{} d={d} m={m} {sizes:?}", MAPS[which]);
        crate::common::assert_close(&what, &out, &whole, 1e5);
    }
}
