//! On the heads of trained models: the errors that independent programs found for the same methods.

use crate::common::{Head, golden, heads, map};
use dijiang::fidelity::Reference;
use dijiang::{
    Calibration, CalibrationOptions, Far, FeatureMap, HybridAttention, LinearAttention, Mask,
    MergeCost, Merged, Metric, Scalar, Taylor, TaylorFit,
};
use std::sync::Arc;

fn reference(head: &Head) -> Reference<f64> {
    let [q, k, v] = &head.test;
    Reference::new(q.view(), k.view(), v.view(), head.mask).unwrap()
}

#[test]
fn uniform_attention_has_the_known_error() {
    let known = golden("reference_errors");
    for head in heads() {
        let found = reference(&head)
            .compare(&dijiang::SoftmaxAttention::new(head.test[0].ncols()).unwrap())
            .unwrap();
        let expected = known["heads"][head.name]["errors"]["uniform"].as_f64().unwrap();
        assert!(
            (found.uniform_error / expected - 1.0).abs() < 1e-8,
            "{}: {found:?} {expected}",
            head.name
        );
        assert!(found.output_error < 1e-12, "{}: {found:?}", head.name);
    }
}

/// Rows of random maps can be compared in law only: the median over our seeds lies within the
/// spread of the five known seeds, widened by half of it on each side.
#[test]
fn random_maps_have_the_known_errors() {
    let known = golden("reference_errors");
    for head in heads() {
        let d = head.test[0].ncols();
        let reference = reference(&head);
        for (row, name, m) in [
            ("favor_m64", "performer", 64),
            ("favor_m256", "performer", 256),
            ("dct_chi_m64", "dct", 64),
            ("dct_pm_sqrtd_m128", "dct-antithetic", 128),
            ("official_dijiang", "official", d),
        ] {
            let mut errors: Vec<f64> = (0..7)
                .map(|seed| {
                    let map: Arc<dyn FeatureMap<f64>> = map(name, d, m, seed);
                    let kernel = LinearAttention::new(map);
                    let kernel = if name == "official" { kernel.with_scale(1.0) } else { kernel };
                    reference.output_error(&kernel).unwrap()
                })
                .collect();
            errors.sort_by(f64::total_cmp);
            let seeds = crate::common::vector(&known["heads"][head.name]["errors"][row]["seeds"]);
            let low = seeds.fold(f64::INFINITY, |m, &x| m.min(x));
            let high = seeds.fold(f64::NEG_INFINITY, |m, &x| m.max(x));
            let slack = 0.5 * (high - low) + 0.01 * low;
            assert!(
                errors[3] > low - slack && errors[3] < high + slack,
                "{} {row}: {errors:?}, known {low} to {high}",
                head.name
            );
        }
    }
}

/// The honest result: no map without training beats uniform attention by much on any of these
/// heads.
#[test]
fn feature_maps_alone_do_not_imitate_trained_heads() {
    for head in heads() {
        let d = head.test[0].ncols();
        let reference = reference(&head);
        for name in ["performer", "dct", "dct-antithetic", "wpff", "wpff-sobol"] {
            let mut errors: Vec<f64> = (0..3)
                .map(|seed| {
                    reference
                        .output_error(&LinearAttention::new(map::<f64>(name, d, 256, seed)))
                        .unwrap()
                })
                .collect();
            errors.sort_by(f64::total_cmp);
            assert!(errors[1] > 0.7, "{} {name}: {errors:?}: rewrite the docs", head.name);
        }
    }
}

/// Merging by Ward's cost.
fn ward(entries: usize) -> Merged {
    Merged::new(entries).cost(MergeCost::Ward { value_weight: 4.0 })
}

/// The deterministic hybrids that need no calibration: within 1e-6, in f64 and (as the heads are
/// f32) within 1 % in f32.
#[test]
fn hybrids_have_the_known_errors() {
    type Row = (&'static str, usize, fn() -> Far<f64>, fn() -> Far<f32>);
    let rows: [Row; 7] = [
        ("drop_w64_s4", 64, Far::none, Far::none),
        ("drop_w129_s4", 129, Far::none, Far::none),
        ("hybrid_ward64_uncalibrated", 64, || Far::ward(64), || Far::ward(64)),
        (
            "hybrid_received64",
            64,
            || ward(64).metric(Metric::Identity).into(),
            || ward(64).metric(Metric::Identity).into(),
        ),
        (
            "hybrid_received64_b8",
            64,
            || ward(64).metric(Metric::Identity).block(8).into(),
            || ward(64).metric(Metric::Identity).block(8).into(),
        ),
        (
            "hybrid_received64_w48_s48",
            48,
            || ward(48).metric(Metric::Identity).into(),
            || ward(48).metric(Metric::Identity).into(),
        ),
        ("hybrid_received64_diag", 64, || ward(64).into(), || ward(64).into()),
    ];
    let known = golden("reference_errors");
    for head in heads() {
        let d = head.test[0].ncols();
        let reference = reference(&head);
        let [q, k, v] = head.test.each_ref().map(|x| x.mapv(|x| x as f32));
        let narrow_reference = Reference::new(q.view(), k.view(), v.view(), head.mask).unwrap();
        for (row, window, far, narrow_far) in rows {
            let Some(expected) = known["heads"][head.name]["errors"][row].as_f64() else {
                continue;
            };
            let (window, sinks) = if head.mask == Mask::Full { (0, 0) } else { (window, 4) };
            let kernel =
                HybridAttention::builder(d).window(window).sinks(sinks).far(far()).build().unwrap();
            let found = reference.output_error(&kernel).unwrap();
            assert!(
                (found / expected - 1.0).abs() < 1e-6,
                "{} {row}: {found}, known {expected}",
                head.name
            );
            let report = reference.compare(&kernel).unwrap();
            assert!(
                (report.output_error / expected - 1.0).abs() < 1e-6,
                "{} {row}: {report:?}",
                head.name
            );
            let kernel = HybridAttention::builder(d)
                .window(window)
                .sinks(sinks)
                .far(narrow_far())
                .build()
                .unwrap();
            let found = narrow_reference.output_error(&kernel).unwrap();
            assert!(
                (found / expected - 1.0).abs() < 0.01,
                "{} {row} in f32: {found}, known {expected}",
                head.name
            );
        }
    }
}

/// The rows that are calibrated on another document, of which every third token is known
/// (bidirectional: every token).
#[test]
fn calibrated_hybrids_have_the_known_errors() {
    fn kernel<T: Scalar>(row: &str, calibration: &Calibration, mask: Mask) -> HybridAttention<T> {
        let (window, sinks) = if mask == Mask::Full { (0, 0) } else { (64, 4) };
        let builder = HybridAttention::builder(calibration.head_dim()).window(window).sinks(sinks);
        let builder = builder.calibrated(calibration);
        let taylor = |rank| Taylor::new(rank).fit(TaylorFit::Clamped);
        match row {
            "hybrid_taylor2_r6" => builder.far(taylor(6)),
            "hybrid_taylor2_r10" => builder.far(taylor(10)),
            "hybrid_ward64" => builder.far(Far::ward(64)),
            _ => builder.heavy(16).far(taylor(6)),
        }
        .build()
        .unwrap()
    }
    let known = golden("reference_errors");
    for head in heads() {
        let reference = reference(&head);
        let [q, k, v] = head.test.each_ref().map(|x| x.mapv(|x| x as f32));
        let narrow_reference = Reference::new(q.view(), k.view(), v.view(), head.mask).unwrap();
        let [q, k, _] = &head.calibration;
        let options = if head.mask == Mask::Full {
            CalibrationOptions::new().with_window(0).with_sinks(0).with_mask(Mask::Full)
        } else {
            CalibrationOptions::new().with_stride(3)
        };
        let calibration = Calibration::from_samples(q.view(), k.view(), options).unwrap();
        for row in [
            "hybrid_taylor2_r6",
            "hybrid_taylor2_r10",
            "hybrid_ward64",
            "hybrid_heavy16_taylor2_r6",
        ] {
            let expected = known["heads"][head.name]["errors"][row].as_f64().unwrap();
            let found =
                reference.output_error(&kernel::<f64>(row, &calibration, head.mask)).unwrap();
            assert!(
                (found / expected - 1.0).abs() < 1e-6,
                "{} {row}: {found}, known {expected}",
                head.name
            );
            let found = narrow_reference
                .output_error(&kernel::<f32>(row, &calibration, head.mask))
                .unwrap();
            assert!(
                (found / expected - 1.0).abs() < 0.01,
                "{} {row} in f32: {found}, known {expected}",
                head.name
            );
        }
    }
}

/// What the metric and the decay of merging memories do to the output error: `docs/theory.md` has
/// what this prints.
#[test]
fn options_of_merging_memories() {
    let mut worse = 0;
    println!(
        "{:>8}{:>10}{:>12}{:>10}{:>10}{:>10}",
        "head", "default", "calibrated", "γ = .99", "γ = .999", "γ = 1"
    );
    for head in heads().iter().filter(|head| head.mask == Mask::Causal) {
        let [q, k, _] = &head.calibration;
        let options = CalibrationOptions::new().with_stride(3);
        let calibration = Calibration::from_samples(q.view(), k.view(), options).unwrap();
        let reference = reference(head);
        let error = |far: Merged| {
            let kernel = HybridAttention::builder(64).far(far).build().unwrap();
            reference.output_error(&kernel).unwrap()
        };
        let default = error(Merged::new(64));
        let calibrated = error(Merged::new(64).calibrated(&calibration));
        let decays = [0.99, 0.999, 1.0].map(|decay| error(Merged::new(64).decay(decay)));
        println!(
            "{:>8}{default:>10.4}{calibrated:>12.4}{:>10.4}{:>10.4}{:>10.4}",
            head.name, decays[0], decays[1], decays[2]
        );
        assert!(
            calibrated < 1.3 * default && calibrated > 0.7 * default,
            "{}: rewrite the docs",
            head.name
        );
        worse += usize::from(decays[2] > 1.5 * default);
    }
    assert_eq!(worse, 4, "rewrite the docs");
}
