//! Choosing the heads that stay exact.

use crate::common::{heads, normal, wide};
use dijiang::{
    Attention, Error, Far, Head, HeadErrors, HeadSample, HybridAttention, Mask, SoftmaxAttention,
    StreamOptions,
};
use ndarray::{Array2, Array3, Axis, s};
use std::sync::Arc;

fn kernels(d: usize) -> (Arc<dyn Attention<f64>>, Arc<dyn Attention<f64>>) {
    let small = HybridAttention::builder(d).window(8).sinks(2).far(Far::merged(6)).build().unwrap();
    (Arc::new(SoftmaxAttention::new(d).unwrap()), Arc::new(small))
}

struct Model {
    q: Vec<Array3<f64>>,
    kv: Vec<[Array2<f64>; 2]>,
}

impl Model {
    /// Three layers of two kv heads for four query heads; larger queries are sharper, and harder.
    fn new() -> Self {
        let q = (0..6).map(|h| {
            let size = [0.3, 2.0, 0.1, 0.7, 3.0, 0.5][h];
            Array3::from_shape_vec(
                (2, 60, 4),
                normal::<f64>(120, 4, size, h as u64).into_raw_vec_and_offset().0,
            )
            .unwrap()
        });
        let kv = (0..6).map(|h| [normal(60, 4, 1.0, 20 + h), normal(60, 3, 1.0, 40 + h)]);
        Self { q: q.collect(), kv: kv.collect() }
    }

    fn samples(&self) -> Vec<HeadSample<'_, f64>> {
        (0..6)
            .map(|i| {
                let [k, v] = &self.kv[i];
                HeadSample {
                    layer: i / 2,
                    kv_head: i % 2,
                    q: self.q[i].view(),
                    k: k.view(),
                    v: v.view(),
                }
            })
            .collect()
    }
}

#[test]
fn heads_are_ranked_by_their_error() {
    let (exact, small) = kernels(4);
    let model = Model::new();
    let samples = model.samples();
    let errors = HeadErrors::measure(&*exact, &*small, &samples, 12).unwrap();
    assert_eq!(errors.ranked().len(), 6);
    assert!(errors.ranked().windows(2).all(|pair| pair[0].output_error >= pair[1].output_error));
    for error in errors.ranked() {
        let sample = &samples[error.layer * 2 + error.kv_head];
        let mut stream = small.stream_with(StreamOptions::new(3).group(2)).unwrap();
        let mut found = Array3::zeros((2, 60, 3));
        stream
            .extend_heads(&mut [Head::group(sample.q, sample.k, sample.v, found.view_mut())])
            .unwrap();
        let (mut difference, mut size) = (0.0, 0.0);
        for g in 0..2 {
            let exact = exact
                .forward(sample.q.index_axis(Axis(0), g), sample.k, sample.v, Mask::Causal)
                .unwrap();
            let delta = &found.index_axis(Axis(0), g) - &exact;
            difference += delta.slice(s![12.., ..]).mapv(|x| x * x).sum();
            size += exact.slice(s![12.., ..]).mapv(|x| x * x).sum();
        }
        assert!((error.output_error - (difference / size).sqrt()).abs() < 1e-12);
    }
    let table = errors.to_string();
    assert_eq!(table.lines().count(), 7, "{table}");

    let choice = errors.keep(2);
    assert_eq!(choice.heads().len(), 2);
    for error in errors.ranked() {
        let kept = errors.ranked()[..2].contains(error);
        assert_eq!(choice.contains(error.layer, error.kv_head), kept);
    }
    assert_eq!(choice.errors(), &errors);
    assert_eq!((errors.keep(0).heads().len(), errors.keep(99).heads().len()), (0, 6));
}

#[test]
fn a_budget_keeps_as_many_as_fit() {
    let (exact, small) = kernels(4);
    let model = Model::new();
    let errors = HeadErrors::measure(&*exact, &*small, &model.samples(), 12).unwrap();
    let tokens = 1000;
    let (large, little) = (tokens * 7 * 8, small.state_floats(3, tokens).unwrap() * 8);
    for kept in 0..=6 {
        let bytes = kept * large + (6 - kept) * little;
        let choice = errors.keep_within(bytes, tokens, &*exact, &*small).unwrap();
        assert_eq!(choice.heads().len(), kept);
        assert_eq!(choice.state_bytes(tokens, &*exact, &*small).unwrap(), bytes);
        let layers: usize = (0..3)
            .map(|layer| {
                choice.layer(layer, 4, &exact, &small).unwrap().state_bytes(3, tokens).unwrap()
            })
            .sum();
        assert_eq!(layers, bytes);
        if kept < 6 {
            assert_eq!(
                errors.keep_within(bytes + large - little - 1, tokens, &*exact, &*small).unwrap(),
                choice
            );
        }
    }
    let error = errors.keep_within(6 * little - 1, tokens, &*exact, &*small).unwrap_err();
    assert!(matches!(error, Error::InvalidOption { which: "bytes", .. }));
    // a context so short that exact caches are smaller
    assert_eq!(errors.keep_within(6 * 7 * 8 * 5, 5, &*exact, &*small).unwrap().heads().len(), 6);
    let error = errors.keep_within(6 * 7 * 8 * 5 - 1, 5, &*exact, &*small).unwrap_err();
    assert!(matches!(error, Error::InvalidOption { which: "bytes", .. }));
}

/// A kernel for each head: the table takes each error from the kernel of its head.
#[test]
fn kernels_differ_by_head() {
    let (exact, small) = kernels(4);
    let model = Model::new();
    let samples = model.samples();
    let same = HeadErrors::measure(&*exact, &*small, &samples, 12).unwrap();
    assert_eq!(HeadErrors::measure_each(&*exact, |_| &*small, &samples, 12).unwrap(), same);
    let of = |head: &HeadSample<'_, f64>| if head.kv_head == 0 { &*small } else { &*exact };
    let errors = HeadErrors::measure_each(&*exact, of, &samples, 12).unwrap();
    assert!(
        errors.ranked()[..3]
            .iter()
            .all(|error| error.kv_head == 0 && same.ranked().contains(error))
    );
    assert!(
        errors.ranked()[3..].iter().all(|error| error.kv_head == 1 && error.output_error == 0.0)
    );
}

#[test]
fn a_choice_of_ones_own() {
    let (exact, small) = kernels(4);
    let model = Model::new();
    let errors = HeadErrors::measure(&*exact, &*small, &model.samples(), 12).unwrap();
    let choice = errors.choose(&[(2, 1), (0, 1), (1, 0)]).unwrap();
    assert_eq!(choice.heads(), [(0, 1), (1, 0), (2, 1)]);
    assert!(choice.contains(2, 1) && !choice.contains(2, 0));
    assert_eq!(errors.choose(errors.keep(4).heads()).unwrap(), errors.keep(4));
    for bad in [&[(0, 2)][..], &[(3, 0)], &[(0, 1), (0, 1)]] {
        assert!(
            matches!(errors.choose(bad), Err(Error::InvalidOption { which: "heads", .. })),
            "{bad:?}"
        );
    }
}

/// A file that a person changed is read with care.
#[cfg(feature = "serde")]
#[test]
fn choices_are_checked_when_they_are_read() {
    let (exact, small) = kernels(4);
    let model = Model::new();
    let choice = HeadErrors::measure(&*exact, &*small, &model.samples(), 12)
        .unwrap()
        .choose(&[(0, 1), (2, 1)])
        .unwrap();
    let json = serde_json::to_value(&choice).unwrap();
    assert_eq!(serde_json::from_value::<dijiang::ExactHeads>(json.clone()).unwrap(), choice);
    let with = |heads: &[[usize; 2]]| {
        let mut json = json.clone();
        json["heads"] = serde_json::json!(heads);
        serde_json::from_value::<dijiang::ExactHeads>(json).map_err(|error| error.to_string())
    };
    assert_eq!(with(&[[2, 1], [0, 1]]).unwrap(), choice, "in any order");
    assert!(with(&[[0, 1], [0, 1]]).unwrap_err().contains("kv head 1 of layer 0"));
    assert!(with(&[[7, 0]]).unwrap_err().contains("kv head 0 of layer 7"));
}

#[test]
fn bad_samples() {
    let (exact, small) = kernels(4);
    let model = Model::new();
    let measure = |samples: &[HeadSample<'_, f64>], warm_up| {
        HeadErrors::measure(&*exact, &*small, samples, warm_up)
    };
    assert!(matches!(measure(&[], 0), Err(Error::ZeroSize { .. })));
    let samples = model.samples();
    assert!(matches!(
        measure(&[samples[0], samples[0]], 0),
        Err(Error::InvalidOption { which: "samples", .. })
    ));
    assert!(matches!(measure(&samples, 60), Err(Error::InvalidOption { which: "warm_up", .. })));
    let mut nan = model.kv[0][0].clone();
    nan[[3, 3]] = f64::NAN;
    let bad = HeadSample { k: nan.view(), ..samples[0] };
    assert!(matches!(measure(&[bad], 0), Err(Error::NotFinite { which: "k", .. })));
    let errors = measure(&samples[1..], 0).unwrap();
    let error = errors.keep(1).layer(0, 4, &exact, &small).unwrap_err();
    assert!(
        matches!(error, Error::InvalidOption { which: "layer", .. }),
        "head 0 of layer 0 was not measured"
    );
    assert!(errors.keep(1).layer(9, 4, &exact, &small).is_err());
    assert!(errors.keep(1).layer(1, 3, &exact, &small).is_err(), "3 query heads on 2 kv heads");
}

/// Of the real heads the one that looks for single keys is the worst, and is kept first.
#[test]
fn real_heads() {
    let heads: Vec<_> = heads().into_iter().filter(|head| head.mask == Mask::Causal).collect();
    let exact = SoftmaxAttention::new(64).unwrap();
    let small = HybridAttention::builder(64).build().unwrap();
    let samples: Vec<_> = heads
        .iter()
        .enumerate()
        .map(|(layer, head)| {
            let [q, k, v] = &head.test;
            HeadSample {
                layer,
                kv_head: 0,
                q: q.view().insert_axis(Axis(0)),
                k: k.view(),
                v: v.view(),
            }
        })
        .collect();
    let errors = HeadErrors::measure(&exact, &small, &samples, 128).unwrap();
    let worst = &heads[errors.ranked()[0].layer];
    assert_eq!(worst.name, "L17H4", "{errors}");
    assert!(wide(&worst.test[0]).iter().all(|x| x.is_finite()));
}
