//! Calibration: the known coefficients of real heads, the identities behind it, samples that hardly
//! say anything, and options that cannot be used.

use crate::common::{Head, assert_close, golden, heads, normal, tokens, vector, wide};
use dijiang::attention::naive;
use dijiang::{
    Attention, CalibratedTaylor, Calibration, CalibrationOptions, DctFeatures, Error, FeatureMap,
    LinearAttention, Mask, Performer, Scalar, TaylorFeatures, TaylorFit, WeightFit, Wpff,
    fit_weights,
};
use ndarray::{Array1, Array2, Array3, ArrayView1, Axis, array, concatenate, s, stack};

/// The options the reference errors were computed with.
fn options(head: &Head) -> CalibrationOptions {
    match head.mask {
        Mask::Causal => CalibrationOptions::new().with_window(64).with_sinks(4).with_stride(3),
        mask => CalibrationOptions::new().with_mask(mask).with_window(0).with_sinks(0),
    }
}

fn calibrate(head: &Head) -> Calibration {
    let [q, k, _] = &head.calibration;
    Calibration::from_samples(q.view(), k.view(), options(head)).unwrap()
}

fn calibrate_with(
    q: &Array2<f64>,
    k: &Array2<f64>,
    options: CalibrationOptions,
) -> Result<Calibration, Error> {
    Calibration::from_samples(q.view(), k.view(), options)
}

/// Scaled rows.
fn scaled(x: &Array2<f64>, calibration: &Calibration) -> Array2<f64> {
    x * calibration.scale().sqrt()
}

#[test]
fn known_coefficients_of_real_heads() {
    let known = golden("reference_errors");
    for head in heads() {
        let calibration = calibrate(&head);
        for rank in [6, 10] {
            let c = |fit| calibration.taylor_coefficients(rank, fit).unwrap();
            for (fit, ending) in
                [(TaylorFit::Clamped, ""), (TaylorFit::Unconstrained, "_unclamped")]
            {
                let exact =
                    vector(&known["heads"][head.name][format!("taylor2_r{rank}_c{ending}")]);
                for (found, exact) in c(fit).iter().zip(&exact) {
                    assert!(
                        (found - exact).abs() < 1e-6 * exact.abs(),
                        "{} {rank} {fit:?}: {found} {exact}",
                        head.name
                    );
                }
            }
            let [c0, c1, c2] = c(TaylorFit::Constrained);
            assert!(
                c0 >= 1e-3
                    && c1 >= 0.0
                    && c2 >= 0.0
                    && c1 * c1 <= 2.0 * 0.98 * 0.98 * c0 * c2 * (1.0 + 1e-12)
            );
            if c(TaylorFit::Clamped) == c(TaylorFit::Unconstrained) {
                assert_eq!(c(TaylorFit::Constrained), c(TaylorFit::Unconstrained));
            }
            println!(
                "{} rank {rank}: constrained {:.4?}, clamped {:.4?}, unconstrained {:.4?}; far \
                 share {:.3}",
                head.name,
                [c0, c1, c2],
                c(TaylorFit::Clamped),
                c(TaylorFit::Unconstrained),
                calibration.far_share()
            );
        }
    }
}

/// Exact near pairs and the map's far pairs under one normaliser, naively: the known errors of the
/// clamped fit, and what the constrained one has.
#[test]
fn known_output_errors_of_real_heads() {
    let known = golden("reference_errors");
    for head in heads() {
        let calibration = calibrate(&head);
        let [q, k, v] = &head.test;
        let n = q.nrows();
        let scores = q.dot(&k.t()) * calibration.scale();
        let output = |weights: &dyn Fn(usize, usize) -> f64| {
            let logs = Array2::from_shape_fn((n, n), |(t, j)| weights(t, j));
            naive::from_log_weights(&logs, v, head.mask)
        };
        let exact = output(&|t, j| scores[[t, j]]);
        let norm = |x: &Array2<f64>| (x * x).sum().sqrt();
        for rank in [6, 10] {
            let [clamped, constrained] = [TaylorFit::Clamped, TaylorFit::Constrained].map(|fit| {
                let map = CalibratedTaylor::<f64>::with_fit(rank, &calibration, fit).unwrap();
                let far = LinearAttention::new(map)
                    .pair_weights()
                    .unwrap()
                    .log_weights(q.view(), k.view())
                    .unwrap();
                let near = |t: usize, j: usize| head.mask == Mask::Causal && (t < j + 64 || j < 4);
                norm(
                    &(output(&|t, j| if near(t, j) { scores[[t, j]] } else { far[[t, j]] })
                        - &exact),
                ) / norm(&exact)
            });
            let reference = known["heads"][head.name]["errors"][format!("hybrid_taylor2_r{rank}")]
                .as_f64()
                .unwrap();
            assert!(
                (clamped / reference - 1.0).abs() < 1e-8,
                "{} {rank}: {clamped} {reference}",
                head.name
            );
            println!(
                "{} rank {rank}: output error {constrained:.4}, clamped {clamped:.4}",
                head.name
            );
            assert!(constrained < 1.03 * clamped);
        }
    }
}

/// Far pairs, softmax, moments: each as its formula stands, pair by pair.
#[test]
fn statistics_are_their_formulas_at_any_positions() {
    let (n, d, group, window, sinks, scale) = (40, 3, 2, 17, 5, 0.4);
    let positions: Vec<usize> =
        (0..n).map(|i| 2 * i + usize::from(i % 5 == 1) + i / 30 * 8).collect();
    let q = stack![Axis(0), normal::<f64>(n, d, 1.0, 1), normal::<f64>(n, d, 1.5, 2)];
    let k = normal::<f64>(n, d, 1.2, 3);
    let options = CalibrationOptions::new()
        .with_window(window)
        .with_sinks(sinks)
        .with_scale(scale)
        .with_shrinkage(0.1)
        .with_positions(positions.clone());
    let calibration = Calibration::from_group(q.view(), k.view(), options).unwrap();
    assert_eq!(
        (calibration.head_dim(), calibration.scale(), calibration.mask()),
        (d, scale, Mask::Causal)
    );
    assert_eq!((calibration.window(), calibration.sinks()), (window, sinks));

    let score = |h: usize, t: usize, j: usize| scale * q.slice(s![h, t, ..]).dot(&k.row(j));
    let query = |h: usize, t: usize| q.slice(s![h, t, ..]).to_owned() * scale.sqrt();
    let key = |j: usize| k.row(j).to_owned() * scale.sqrt();
    let far = |t: usize, j: usize| positions[t] >= positions[j] + window && positions[j] >= sinks;
    let lse = |h: usize, t: usize| (0..=t).map(|j| score(h, t, j).exp()).sum::<f64>().ln();
    let (mut rows, mut a, mut mean, mut share) =
        (Vec::new(), Array1::<f64>::zeros(n), Array1::zeros(d), Vec::new());
    for (t, h) in (0..n).flat_map(|t| (0..group).map(move |h| (t, h))) {
        let keys: Vec<usize> = (0..n).filter(|j| far(t, *j)).collect();
        let total: f64 = keys.iter().map(|j| score(h, t, *j).exp()).sum();
        if !keys.is_empty() {
            share.push(total / lse(h, t).exp());
        }
        if keys.len() >= 4 {
            rows.push((t, h));
            mean += &query(h, t);
            keys.iter().for_each(|j| a[*j] += score(h, t, *j).exp() / total);
        }
    }
    let count = rows.len() as f64;
    assert_eq!(calibration.rows_used(), rows.len());
    assert!(count > 10.0);
    let (a, mean) = (a / count, mean / count);
    let one = |x: ArrayView1<f64>| x.to_owned().insert_axis(Axis(0));
    assert_close("a", &one(calibration.attention()), &one(a.view()), 256.0);
    assert_close("mean of queries", &one(calibration.query_mean()), &one(mean.view()), 256.0);
    let share = share.iter().sum::<f64>() / share.len() as f64;
    assert!((calibration.far_share() - share).abs() < 1e-12);
    let key_mean = (0..n).fold(Array1::zeros(d), |m, j| m + key(j) * a[j]);
    assert_close("mean of keys", &one(calibration.key_mean()), &one(key_mean.view()), 256.0);
    let outer = |x: Array1<f64>| x.clone().insert_axis(Axis(1)).dot(&x.insert_axis(Axis(0)));
    let shrunk = |x: Array2<f64>| &x + &(Array2::<f64>::eye(d) * (0.1 * x.diag().sum() / d as f64));
    let query_covariance = rows
        .iter()
        .fold(Array2::zeros((d, d)), |m, (t, h)| m + outer(query(*h, *t) - &mean) / count);
    assert_close(
        "Σ_q",
        &calibration.query_covariance().to_owned(),
        &shrunk(query_covariance),
        256.0,
    );
    let key_covariance =
        (0..n).fold(Array2::zeros((d, d)), |m, j| m + outer(key(j) - &key_mean) * a[j]);
    assert_close("Σ_k", &calibration.key_covariance().to_owned(), &shrunk(key_covariance), 256.0);

    let late = || (n / 8..n).flat_map(|t| (0..group).map(move |h| (t, h)));
    let size = late().count() as f64;
    let x = key(3) * 0.7;
    let expected =
        late().map(|(t, h)| (query(h, t).dot(&x) - lse(h, t)).exp()).sum::<f64>() / size + 1e-12;
    assert!((calibration.expected_attention(x.view()) / expected - 1.0).abs() < 1e-12);
    let gram = late().fold(Array2::<f64>::zeros((d, d)), |m, (t, h)| m + outer(query(h, t)) / size);
    let gram = &gram + &(Array2::<f64>::eye(d) * (1e-3 * gram.diag().sum() / d as f64));
    let metric = calibration.metric();
    assert_close("the metric squared", &metric.dot(&metric), &gram, 256.0);
    assert_close("a symmetric root", &metric.t().to_owned(), &metric, 256.0);
}

/// Balanced bases: both covariances become diag(λ), and scores are exactly the sum of their parts.
#[test]
fn identities_of_the_bases() {
    for head in heads() {
        let calibration = calibrate(&head);
        let (m, m_inv_t) = (calibration.query_basis(), calibration.key_basis());
        let d = calibration.head_dim();
        let lambda = Array2::from_diag(&calibration.spectrum());
        assert_close("inverse", &m.dot(&m_inv_t.t()), &Array2::eye(d), 1e5);
        assert_close("queries", &m.dot(&calibration.query_covariance()).dot(&m.t()), &lambda, 1e5);
        assert_close(
            "keys",
            &m_inv_t.dot(&calibration.key_covariance()).dot(&m_inv_t.t()),
            &lambda,
            1e5,
        );
        assert!(calibration.spectrum().windows(2).into_iter().all(|w| w[0] >= w[1]));
        assert!((calibration.attention().sum() - 1.0).abs() < 1e-12);
        for condition in [calibration.query_condition(), calibration.key_condition()] {
            assert!(
                condition > 1.0 && condition < d as f64 / 0.02 + 1.0,
                "{}: {condition}",
                head.name
            );
        }
        let (q, k) = (scaled(&head.test[0], &calibration), scaled(&head.test[1], &calibration));
        let (x, y) = (
            (&q - &calibration.query_mean()).dot(&m.t()),
            (&k - &calibration.key_mean()).dot(&m_inv_t.t()),
        );
        let parts = x.dot(&y.t())
            + q.dot(&calibration.key_mean()).insert_axis(Axis(1))
            + (&k - &calibration.key_mean()).dot(&calibration.query_mean());
        assert_close("scores", &parts, &q.dot(&k.t()), 1e5);
        // the static score is the logarithm of a normal mean
        let lambda = calibration.spectrum().to_owned();
        for (k, y) in k.outer_iter().zip(y.outer_iter()).take(20) {
            let e = (&k - &calibration.key_mean()).dot(&calibration.query_mean());
            let score = e + 0.5 * (&lambda * &y * y).sum();
            assert!((calibration.static_score(k) - score).abs() < 1e-10 * (1.0 + score.abs()));
        }
    }
}

/// Every option of the kernel of a rank reaches its map: features multiply to the formula, in both
/// types.
fn check_map<T: Scalar>(
    calibration: &Calibration,
    rank: usize,
    q: &Array2<f64>,
    k: &Array2<f64>,
    slack: f64,
) {
    let map = CalibratedTaylor::<T>::new(rank, calibration).unwrap();
    assert_eq!((map.rank(), map.num_features()), (rank, (rank + 1) * (rank + 2) / 2));
    let kernel = LinearAttention::new(map.clone()).with_scale(calibration.scale());
    let (narrow_q, narrow_k) = (q.mapv(T::from_f64), k.mapv(T::from_f64));
    let found =
        kernel.pair_weights().unwrap().log_weights(narrow_q.view(), narrow_k.view()).unwrap();
    let [c0, c1, c2] = calibration.taylor_coefficients(rank, TaylorFit::Constrained).unwrap();
    let (q, k) = (scaled(&wide(&narrow_q), calibration), scaled(&wide(&narrow_k), calibration));
    for (t, q) in q.outer_iter().enumerate() {
        for (j, k) in k.outer_iter().enumerate() {
            let (q, k) = (&q - &calibration.query_mean(), &k - &calibration.key_mean());
            let (x, y) = (calibration.query_basis().dot(&q), calibration.key_basis().dot(&k));
            let s = x.slice(s![..rank]).dot(&y.slice(s![..rank]));
            let base = (&q + &calibration.query_mean()).dot(&calibration.key_mean())
                + calibration.query_mean().dot(&k);
            let exact = base + (c0 + c1 * s + 0.5 * c2 * s * s).ln();
            assert!(
                (found[[t, j]] - exact).abs() < slack,
                "{}: {} {exact}",
                T::NAME,
                found[[t, j]]
            );
        }
    }
}

#[test]
fn maps_multiply_to_their_kernel() {
    for head in heads() {
        let calibration = calibrate(&head);
        let [q, k, _] = head.test.each_ref().map(|x| x.slice(s![200..240, ..]).to_owned());
        for rank in [1, 6] {
            check_map::<f64>(&calibration, rank, &q, &k, 1e-10);
            check_map::<f32>(&calibration, rank, &q, &k, 2e-3);
        }
    }
    let [q, k, _] = tokens::<f64>(30, 5, 1, 0.7, 3);
    let options = CalibrationOptions::new().with_window(3).with_sinks(0).with_scale(0.3);
    let calibration = calibrate_with(&q, &k, options).unwrap();
    for rank in 1..=5 {
        check_map::<f64>(&calibration, rank, &q, &k, 1e-11);
        check_map::<f32>(&calibration, rank, &q, &k, 1e-4);
    }
}

/// At full rank and small scores the kernel is the exponential itself to second order.
#[test]
fn small_scores_are_modelled_closely() {
    let [q, k, _] = tokens::<f64>(200, 4, 1, 0.1, 7);
    let (q, k) = (&q + 1.0, &k - 2.0);
    let calibration = calibrate_with(&q, &k, CalibrationOptions::new()).unwrap();
    let kernel = LinearAttention::new(CalibratedTaylor::<f64>::new(4, &calibration).unwrap());
    let found = kernel.pair_weights().unwrap().log_weights(q.view(), k.view()).unwrap();
    let exact = q.dot(&k.t()) * 0.5;
    assert!((&found - &exact).iter().all(|x| x.abs() < 0.01));
    let plain = LinearAttention::new(TaylorFeatures::<f64>::new(4).unwrap());
    let plain = plain.pair_weights().unwrap().log_weights(q.view(), k.view()).unwrap();
    assert!((&plain - &exact).iter().any(|x| x.abs() > 1.0));
}

#[test]
fn single_precision_samples_agree() {
    for head in heads() {
        let [q, k, _] = head.calibration.each_ref().map(|x| x.mapv(f32::from_f64));
        // the file holds f32: the same numbers
        let narrow = Calibration::from_samples(q.view(), k.view(), options(&head)).unwrap();
        assert_eq!(narrow, calibrate(&head));
    }
    let [q, k, _] = tokens::<f64>(100, 4, 1, 1.0, 5);
    let (q32, k32) = (q.mapv(f32::from_f64), k.mapv(f32::from_f64));
    let narrow =
        Calibration::from_samples(q32.view(), k32.view(), CalibrationOptions::new()).unwrap();
    let exact = calibrate_with(&q, &k, CalibrationOptions::new()).unwrap();
    let c = |x: &Calibration| {
        Array1::from(x.taylor_coefficients(2, TaylorFit::Constrained).unwrap().to_vec())
    };
    assert!((c(&narrow) - c(&exact)).iter().all(|x| x.abs() < 1e-5));
    assert_close(
        "Σ_k",
        &narrow.key_covariance().to_owned(),
        &exact.key_covariance().to_owned(),
        1e-6 / f64::EPSILON,
    );
}

#[test]
fn a_group_is_all_the_rows_of_its_heads() {
    let [q, k, _] = tokens::<f64>(100, 4, 1, 1.0, 9);
    let alone = calibrate_with(&q, &k, CalibrationOptions::new()).unwrap();
    let one =
        Calibration::from_group(q.view().insert_axis(Axis(0)), k.view(), CalibrationOptions::new())
            .unwrap();
    assert_eq!(one, alone);
    // the same head three times: three times the rows, and the same everything
    let group = q.broadcast((3, 100, 4)).unwrap();
    let three = Calibration::from_group(group, k.view(), CalibrationOptions::new()).unwrap();
    assert_eq!(three.rows_used(), 3 * alone.rows_used());
    assert_close(
        "Σ_q",
        &three.query_covariance().to_owned(),
        &alone.query_covariance().to_owned(),
        256.0,
    );
    assert_close("metric", &three.metric(), &alone.metric(), 256.0);
    let (a, b) =
        [&three, &alone].map(|c| c.taylor_coefficients(3, TaylorFit::default()).unwrap()).into();
    assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-10));
    let key = k.row(3).to_owned() * 0.5_f64.sqrt();
    assert!(
        (three.expected_attention(key.view()) / alone.expected_attention(key.view()) - 1.0).abs()
            < 1e-12
    );
}

/// With every pair far, calibrated weights are those of `fit_weights`.
#[test]
fn weights_of_all_pairs_are_fit_weights() {
    let [q, k, _] = tokens::<f64>(60, 6, 1, 0.8, 2);
    let map = Wpff::<f64>::new(6, 32, 1).unwrap();
    let calibration =
        calibrate_with(&q, &k, CalibrationOptions::new().with_mask(Mask::Full)).unwrap();
    let weights =
        fit_weights(&map, q.view(), k.view(), WeightFit::new().with_mask(Mask::Full)).unwrap();
    let one = |x: &Array1<f64>| x.clone().insert_axis(Axis(0));
    assert_close("D", &one(&calibration.fit_weights(&map, 0.01).unwrap()), &one(&weights), 1e6);
    assert_eq!(calibration.fit_weights(&map, f64::INFINITY).unwrap(), Array1::<f64>::ones(32));
}

/// On the far pairs of the samples, in attention space: never worse than D = 1, whatever the
/// weights were before.
#[test]
fn calibrated_weights_fit_the_far_pairs() {
    fn check(
        name: &str,
        calibration: &Calibration,
        input: [&Array2<f64>; 2],
        plain: impl FeatureMap<f64> + 'static,
        fitted: impl FeatureMap<f64> + 'static,
    ) {
        let [q, k] = input;
        let scores = q.dot(&k.t()) * calibration.scale();
        let lse: Array1<f64> =
            (0..100).map(|t| scores.slice(s![t, ..=t]).mapv(f64::exp).sum().ln()).collect();
        let error = |map: Box<dyn FeatureMap<f64>>| -> f64 {
            let found = LinearAttention::new(map)
                .pair_weights()
                .unwrap()
                .log_weights(q.view(), k.view())
                .unwrap();
            let far =
                (0..100_usize).flat_map(|t| (4..(t + 1).saturating_sub(20)).map(move |j| (t, j)));
            far.map(|(t, j)| {
                ((found[[t, j]] - lse[t]).exp() - (scores[[t, j]] - lse[t]).exp()).powi(2)
            })
            .sum()
        };
        let (before, after) = (error(Box::new(plain)), error(Box::new(fitted)));
        assert!(after < 0.9 * before, "{name}: {after} against {before}");
    }
    let [q, k, _] = tokens::<f64>(100, 6, 1, 0.8, 2);
    let calibration = calibrate_with(&q, &k, CalibrationOptions::new().with_window(20)).unwrap();
    let odd = Array1::from_shape_fn(32, |i| i as f64);
    let map = Wpff::<f64>::new(6, 32, 1).unwrap();
    check(
        "wpff",
        &calibration,
        [&q, &k],
        map.clone(),
        map.clone().calibrated(&calibration).unwrap(),
    );
    let again = map.clone().with_weights(odd.clone()).unwrap().calibrated(&calibration).unwrap();
    assert_eq!(again, map.calibrated(&calibration).unwrap());
    let map = Performer::<f64>::new(6, 32, 1).unwrap();
    check(
        "performer",
        &calibration,
        [&q, &k],
        map.clone(),
        map.with_weights(odd.clone()).unwrap().calibrated(&calibration).unwrap(),
    );
    let map = DctFeatures::<f64>::new(6, 32, 1).unwrap();
    check(
        "dct",
        &calibration,
        [&q, &k],
        map.clone(),
        map.with_weights(odd).unwrap().calibrated(&calibration).unwrap(),
    );

    assert!(matches!(
        Wpff::<f32>::new(5, 8, 0).unwrap().calibrated(&calibration),
        Err(Error::Shape { .. })
    ));
    let map = Wpff::<f32>::new(6, 8, 0).unwrap();
    for ridge in [-1.0, f64::NAN] {
        assert!(matches!(
            calibration.fit_weights(&map, ridge),
            Err(Error::InvalidOption { which: "ridge", .. })
        ));
    }
    let signed = CalibratedTaylor::<f64>::new(2, &calibration).unwrap();
    assert!(matches!(calibration.fit_weights(&signed, 0.1), Err(Error::Unsupported { .. })));
}

/// Samples that say little still give a map whose kernel is close to the truth on them.
#[test]
fn degenerate_samples() {
    let n = 60;
    let options = || CalibrationOptions::new().with_window(10).with_sinks(2);
    let repeat = |row: Array1<f64>| row.broadcast((n, row.len())).unwrap().to_owned();
    let x = normal::<f64>(n, 5, 1.0, 1);
    let constant = repeat(array![1.0, -2.0, 0.5, 3.0, 0.0]);
    let flat = &x * &array![1.0, 1.0, 0.0, 0.0, 0.0];
    let zeros = Array2::zeros((n, 5));
    let cases = [
        ("constant keys", x.clone(), constant.clone()),
        ("constant queries", constant.clone(), x.clone()),
        ("both constant", constant.clone(), constant.clone()),
        ("zero keys", x.clone(), zeros.clone()),
        ("zero queries", zeros.clone(), x.clone()),
        ("nothing but zeros", zeros.clone(), zeros.clone()),
        ("two dimensions of five", flat.clone() * 0.3, flat * 0.3),
        ("tiny", &x * 1e-160, &x * 1e-160),
    ];
    for (name, q, k) in cases {
        for shrinkage in [0.0, 0.02] {
            for (mask, rank) in [(Mask::Causal, 1), (Mask::Causal, 5), (Mask::Full, 3)] {
                let options = options().with_shrinkage(shrinkage).with_mask(mask);
                let calibration = calibrate_with(&q, &k, options).unwrap();
                assert!(
                    calibration.query_condition().is_finite()
                        && calibration.key_condition().is_finite(),
                    "{name}"
                );
                assert!(calibration.metric().iter().all(|x| x.is_finite()));
                let key = scaled(&k, &calibration);
                assert!(calibration.expected_attention(key.row(0)) > 0.0);
                assert!(calibration.static_score(key.row(0)).is_finite());
                for fit in [TaylorFit::Clamped, TaylorFit::Unconstrained] {
                    assert!(
                        calibration
                            .taylor_coefficients(rank, fit)
                            .unwrap()
                            .iter()
                            .all(|c| c.is_finite())
                    );
                }
                let map = CalibratedTaylor::<f64>::new(rank, &calibration).unwrap();
                let found = LinearAttention::new(map)
                    .pair_weights()
                    .unwrap()
                    .log_weights(q.view(), k.view())
                    .unwrap();
                let exact = q.dot(&k.t()) * calibration.scale();
                let worst = (&found - &exact).iter().fold(0.0_f64, |m, x| m.max(x.abs()));
                let slack = if name.starts_with("two") { 0.5 } else { 1e-3 };
                assert!(
                    worst < slack,
                    "{name} {mask:?} rank {rank} shrinkage {shrinkage}: {worst}"
                );
                let weights =
                    calibration.fit_weights(&Wpff::<f64>::new(5, 8, 0).unwrap(), 0.01).unwrap();
                assert!(weights.iter().all(|d| d.is_finite() && *d >= 0.0));
            }
        }
    }
    // fewer tokens than dimensions
    for mask in [Mask::Causal, Mask::Full] {
        let [q, k, _] = tokens::<f64>(8, 32, 1, 0.5, 4);
        for shrinkage in [0.0, 0.02] {
            let options = CalibrationOptions::new()
                .with_window(1)
                .with_sinks(0)
                .with_mask(mask)
                .with_shrinkage(shrinkage);
            let calibration = calibrate_with(&q, &k, options).unwrap();
            let map = CalibratedTaylor::<f32>::new(8, &calibration).unwrap();
            let kernel = LinearAttention::new(map);
            let (q, k) = (q.mapv(f32::from_f64), k.mapv(f32::from_f64));
            let out = kernel.forward(q.view(), k.view(), k.view(), mask).unwrap();
            assert!(out.iter().all(|x| x.is_finite()));
        }
    }
    // one key and one query, of one dimension
    let one = array![[2.0]];
    let calibration = calibrate_with(&one, &one, options().with_mask(Mask::Full)).unwrap();
    assert_eq!((calibration.rows_used(), calibration.far_share()), (1, 1.0));
    let map = CalibratedTaylor::<f64>::new(1, &calibration).unwrap();
    let found = LinearAttention::new(map)
        .pair_weights()
        .unwrap()
        .log_weights(one.view(), one.view())
        .unwrap();
    assert!((found[[0, 0]] - 4.0).abs() < 1e-9);
    // more queries than keys
    let calibration =
        calibrate_with(&x, &x.slice(s![..7, ..]).to_owned(), options().with_mask(Mask::Full))
            .unwrap();
    assert_eq!((calibration.rows_used(), calibration.attention().len()), (n, 7));
}

#[test]
fn no_far_pairs() {
    let x = normal::<f64>(60, 4, 1.0, 1);
    let which = |n: usize, options: CalibrationOptions| match calibrate_with(
        &x.slice(s![..n, ..]).to_owned(),
        &x.slice(s![..n, ..]).to_owned(),
        options,
    ) {
        Err(Error::InvalidOption { which, .. }) => which,
        other => panic!("{other:?}"),
    };
    let new = CalibrationOptions::new;
    assert_eq!(which(60, new()), "window"); // window 64, positions up to 59
    assert_eq!(which(60, new().with_window(usize::MAX)), "window");
    assert_eq!(which(60, new().with_window(20).with_sinks(37)), "window"); // three far keys at most
    assert_eq!(which(60, new().with_window(0).with_sinks(57)), "sinks");
    assert_eq!(which(60, new().with_sinks(usize::MAX)), "sinks");
    assert_eq!(which(3, new().with_window(0).with_sinks(0)), "k rows");
    // what does not need far pairs: any window that has some gives the same
    let [a, b] = [0, 50].map(|window| calibrate_with(&x, &x, new().with_window(window)).unwrap());
    assert_eq!(a.metric(), b.metric());
    assert_eq!(a.expected_attention(x.row(1)), b.expected_attention(x.row(1)));
    assert_ne!(a.attention(), b.attention());
    assert_eq!((a.rows_used(), b.rows_used()), (60 - 4 - 3, 60 - 4 - 3 - 50));
}

#[test]
fn bad_samples_and_options() {
    let x = normal::<f64>(100, 4, 1.0, 1);
    let new = CalibrationOptions::new;
    let option = |options: CalibrationOptions| match calibrate_with(&x, &x, options) {
        Err(Error::InvalidOption { which, .. }) => which,
        other => panic!("{other:?}"),
    };
    for scale in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert_eq!(option(new().with_scale(scale)), "scale");
    }
    for shrinkage in [-0.1, f64::NAN, f64::INFINITY] {
        assert_eq!(option(new().with_shrinkage(shrinkage)), "shrinkage");
    }
    assert_eq!(option(new().with_stride(0)), "stride");
    assert_eq!(option(new().with_stride(usize::MAX)), "stride");
    let mut positions: Vec<usize> = (0..100).collect();
    assert_eq!(
        calibrate_with(&x, &x, new().with_positions(positions.clone())).unwrap().attention(),
        calibrate_with(&x, &x, new()).unwrap().attention()
    );
    positions[7] = 6;
    assert_eq!(option(new().with_positions(positions.clone())), "positions");
    positions.pop();
    let error = calibrate_with(&x, &x, new().with_positions(positions)).unwrap_err();
    assert!(matches!(error, Error::Shape { which: "positions", expected: 100, found: 99, .. }));

    for bad in [f64::NAN, f64::INFINITY] {
        let mut y = x.clone();
        y[[99, 3]] = bad;
        assert_eq!(
            calibrate_with(&y, &x, new()).unwrap_err(),
            Error::NotFinite { which: "q", row: 99, column: 3 }
        );
        assert_eq!(
            calibrate_with(&x, &y, new()).unwrap_err(),
            Error::NotFinite { which: "k", row: 99, column: 3 }
        );
    }
    let shape = |q: &Array2<f64>, k: &Array2<f64>| {
        assert!(matches!(calibrate_with(q, k, new()), Err(Error::Shape { which: "k", .. })));
    };
    shape(&x, &x.slice(s![1.., ..]).to_owned());
    shape(&x, &x.slice(s![.., 1..]).to_owned());
    for (q, k) in [((0, 4), (0, 4)), ((5, 0), (5, 0)), ((5, 4), (0, 4))] {
        let error = calibrate_with(&Array2::zeros(q), &Array2::zeros(k), new()).unwrap_err();
        assert!(matches!(error, Error::ZeroSize { .. }), "{error}");
    }
    let none = Array3::<f64>::zeros((0, 100, 4));
    assert!(matches!(
        Calibration::from_group(none.view(), x.view(), new()),
        Err(Error::ZeroSize { .. })
    ));
    for huge in [1e100, 1e153, 1e200, 1e300] {
        match calibrate_with(&(&x * huge), &(&x * huge), new()) {
            Ok(calibration) => {
                if let Ok(c) = calibration.taylor_coefficients(2, TaylorFit::default()) {
                    assert!(c.iter().all(|c| c.is_finite()));
                }
            }
            Err(error) => assert!(matches!(error, Error::Overflow { .. }), "{error}"),
        }
    }

    let calibration = calibrate_with(&x, &x, new()).unwrap();
    assert!(matches!(
        CalibratedTaylor::<f32>::new(0, &calibration),
        Err(Error::ZeroSize { which: "rank" })
    ));
    assert!(matches!(
        CalibratedTaylor::<f32>::new(5, &calibration),
        Err(Error::InvalidOption { which: "rank", .. })
    ));
    assert!(matches!(
        calibration.taylor_coefficients(5, TaylorFit::Clamped),
        Err(Error::InvalidOption { .. })
    ));
    for key in
        [array![1.0, 2.0], array![1.0, 2.0, f64::NAN, 3.0], array![1.0, 2.0, 3.0, f64::INFINITY]]
    {
        assert!(
            calibration.expected_attention(key.view()).is_nan()
                && calibration.static_score(key.view()).is_nan()
        );
    }
    let huge = Array1::from_elem(4, 1e300);
    assert!(
        calibration.expected_attention(huge.view()).is_finite()
            && !calibration.static_score(huge.view()).is_nan()
    );
}

#[test]
fn parts_of_a_map() {
    let (mean, basis) = (Array1::<f64>::zeros(3), Array2::<f64>::eye(3));
    let build = |c| {
        CalibratedTaylor::from_parts(mean.clone(), mean.clone(), basis.clone(), basis.clone(), c)
    };
    // without means and with an identity it is the plain Taylor map
    let map = build([1.0, 1.0, 1.0]).unwrap();
    let plain = TaylorFeatures::<f64>::new(3).unwrap();
    let x = normal::<f64>(9, 3, 2.0, 5);
    for keys in [false, true] {
        let (a, b) = (
            crate::common::features(&map, &x, 1.0, keys),
            crate::common::features(&plain, &x, 1.0, keys),
        );
        assert_close("features", &a.values, &b.values, 8.0);
        assert!((&a.log_scale - &b.log_scale).iter().all(|x| x.abs() < 1e-14));
    }
    for c in [[1.0, 0.0, 0.0], [1.0, 0.0, 3.0], [1e-3, 0.04, 1.0]] {
        assert_eq!(build(c).unwrap().coefficients(), c);
    }
    for c in [
        [0.0, 0.0, 1.0],
        [-1.0, 1.0, 1.0],
        [1.0, -0.1, 1.0],
        [1.0, 0.0, -1.0],
        [0.5, 1.0, 1.0],
        [1.0, 1.0, 0.0],
        [f64::NAN, 1.0, 1.0],
        [1.0, 1.0, f64::INFINITY],
    ] {
        assert!(
            matches!(build(c), Err(Error::InvalidOption { which: "coefficients", .. })),
            "{c:?}"
        );
    }
    let shape = |mq: usize, mk: usize, q: (usize, usize), k: (usize, usize)| {
        let map = CalibratedTaylor::<f32>::from_parts(
            Array1::zeros(mq),
            Array1::zeros(mk),
            Array2::zeros(q),
            Array2::zeros(k),
            [1.0; 3],
        );
        assert!(matches!(map, Err(Error::Shape { .. })));
    };
    shape(3, 3, (2, 3), (3, 3));
    shape(3, 3, (2, 3), (2, 4));
    shape(4, 3, (2, 3), (2, 3));
    shape(3, 2, (2, 3), (2, 3));
    let empty = Array1::<f32>::zeros(0);
    let map = CalibratedTaylor::from_parts(
        empty.clone(),
        empty,
        Array2::zeros((0, 0)),
        Array2::zeros((0, 0)),
        [1.0; 3],
    );
    assert!(matches!(map, Err(Error::ZeroSize { .. })));
    let bad = Array2::from_elem((3, 3), f64::NAN);
    let map =
        CalibratedTaylor::from_parts(mean.clone(), mean.clone(), basis.clone(), bad, [1.0; 3]);
    assert!(matches!(map, Err(Error::NotFinite { which: "key_basis", .. })));
}

/// Coordinates may overflow where features in units of a log scale do not.
#[test]
fn huge_vectors() {
    let mean = Array1::<f32>::zeros(2);
    let basis = array![[1.0_f32, 1.0], [3.0, -5.0]];
    let map =
        CalibratedTaylor::from_parts(mean.clone(), mean, basis.clone(), basis, [1.0; 3]).unwrap();
    for size in [1e-30_f32, 1.0, 1e10, 1e19, 1e30, 3e38] {
        let x = array![[size, size], [size, -size]];
        let (mut values, mut log_scale) =
            (Array2::from_elem((2, 6), f32::NAN), Array1::from_elem(2, f32::NAN));
        for keys in [false, true] {
            if keys {
                map.map_keys(x.view(), values.view_mut(), log_scale.view_mut()).unwrap();
            } else {
                map.map_queries(x.view(), values.view_mut(), log_scale.view_mut()).unwrap();
            }
            let found =
                f64::from(values.row(1).dot(&values.row(1))).ln() + 2.0 * f64::from(log_scale[1]);
            let s = 64.0 * f64::from(size).powi(2);
            let exact = (1.0 + s + s * s / 2.0).ln();
            assert!((found - exact).abs() < 1e-5 * (1.0 + exact), "{size}: {found} {exact}");
        }
    }
    let calibration =
        calibrate_with(&normal(100, 2, 1.0, 1), &normal(100, 2, 1.0, 2), CalibrationOptions::new())
            .unwrap();
    let map = CalibratedTaylor::<f32>::new(2, &calibration).unwrap();
    let x = concatenate![Axis(0), Array2::zeros((70, 2)), array![[3e38_f32, -3e38]]];
    let (mut values, mut log_scale) = (Array2::zeros((71, 3 * 2)), Array1::zeros(71));
    match map.map_keys(x.view(), values.view_mut(), log_scale.view_mut()) {
        Ok(()) => assert!(values.iter().chain(&log_scale).all(|x| x.is_finite())),
        Err(error) => assert!(matches!(error, Error::Overflow { row: 70, .. }), "{error}"),
    }
}

#[cfg(feature = "serde")]
#[test]
fn saved_and_loaded() {
    use serde::{Serialize, de::DeserializeOwned};
    fn round_trip<S: Serialize + DeserializeOwned>(x: &S) -> S {
        serde_json::from_str(&serde_json::to_string(x).unwrap()).unwrap()
    }
    let [q, k, _] = tokens::<f64>(80, 3, 1, 1.0, 9);
    let group = stack![Axis(0), q, normal::<f64>(80, 3, 1.0, 10)];
    let options = CalibrationOptions::new().with_window(9).with_stride(2).with_scale(0.3);
    for options in [
        options.clone(),
        options.with_mask(Mask::Full),
        CalibrationOptions::new().with_positions((5..85).collect()),
    ] {
        assert_eq!(round_trip(&options), options);
        let calibration = Calibration::from_group(group.view(), k.view(), options).unwrap();
        assert_eq!(round_trip(&calibration), calibration);
        let map = CalibratedTaylor::<f64>::new(2, &calibration).unwrap();
        assert_eq!(round_trip(&map), map);
        let map = CalibratedTaylor::<f32>::new(2, &calibration).unwrap();
        assert_eq!(round_trip(&map), map);
    }
    assert_eq!(round_trip(&TaylorFit::Clamped), TaylorFit::Clamped);
    let calibration = calibrate_with(&q, &k, CalibrationOptions::new()).unwrap();
    let saved = serde_json::to_value(&calibration).unwrap();
    for (field, value) in [("group", 0), ("group", 7), ("group", 3)] {
        let mut damaged = saved.clone();
        damaged[field] = value.into();
        assert!(serde_json::from_value::<Calibration>(damaged).is_err(), "{field} {value}");
    }
    for window in [70, 1000] {
        let mut damaged = saved.clone();
        damaged["options"]["window"] = window.into();
        assert_eq!(serde_json::from_value::<Calibration>(damaged).is_err(), window > 72);
    }
    let map = CalibratedTaylor::<f64>::new(2, &calibration).unwrap();
    let mut damaged = serde_json::to_value(&map).unwrap();
    damaged["coefficients"][1] = 100.0.into();
    assert!(serde_json::from_value::<CalibratedTaylor<f64>>(damaged).is_err());
}
