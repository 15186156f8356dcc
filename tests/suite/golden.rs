//! The golden files: every formula against values from independent programs, within the tolerances
//! they state.

use crate::common::{assert_close, golden, matrix, vector, wide};
use dijiang::attention::naive;
use dijiang::projection::{chi_quantile, normal_quantile};
use dijiang::{
    Attention, CalibratedTaylor, Calibration, CalibrationOptions, DctFeatures, EluFeatures,
    FeatureMap, LinearAttention, Mask, OfficialDijiang, Performer, ReluFeatures, Scalar,
    SoftmaxAttention, TaylorFit, Wpff,
};
use ndarray::{Array1, Array2, Axis, concatenate};
use serde_json::Value;

/// 1e-12, the tolerance of the files, in units of epsilon.
const TOLERANCE: f64 = 1e-12 / f64::EPSILON;

/// In f32: units of epsilon, for exponents below 50.
const TOLERANCE_F32: f64 = 1024.0;

fn narrow(x: &Array2<f64>) -> Array2<f32> {
    x.mapv(f32::from_f64)
}

/// Features in absolute terms: values·e^{log_scale}.
fn absolute<T: Scalar>(
    map: &dyn FeatureMap<T>,
    x: &Array2<T>,
    scale: f64,
    keys: bool,
) -> Array2<T> {
    let x = x.mapv(|x| x * T::from_f64(scale.sqrt()));
    let mut values = Array2::zeros((x.nrows(), map.num_features()));
    let mut log_scale = Array1::zeros(x.nrows());
    if keys {
        map.map_keys(x.view(), values.view_mut(), log_scale.view_mut()).unwrap();
    } else {
        map.map_queries(x.view(), values.view_mut(), log_scale.view_mut()).unwrap();
    }
    values * log_scale.mapv(|l: T| l.exp()).insert_axis(Axis(1))
}

/// Largest relative difference, element by element.
#[track_caller]
fn assert_relative(what: &str, a: &Array2<f64>, b: &Array2<f64>, tolerance: f64) {
    assert_eq!(a.dim(), b.dim());
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() <= tolerance * b.abs(), "{what}: {a} instead of {b}");
    }
}

#[test]
fn softmax_attention() {
    for case in golden("golden/softmax_attention")["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let (q, k, v) = (matrix(&case["q"]), matrix(&case["k"]), matrix(&case["v"]));
        let scale = case["scale"].as_f64().unwrap();
        let mask = if case["causal"].as_bool().unwrap() { Mask::Causal } else { Mask::Full };
        let kernel = SoftmaxAttention::<f64>::new(4).unwrap().with_scale(scale);
        let out = kernel.forward(q.view(), k.view(), v.view(), mask).unwrap();
        assert_close(name, &out, &matrix(&case["output"]), TOLERANCE);
        let kernel = SoftmaxAttention::<f64>::new(4).unwrap().with_scale(scale);
        let weights =
            kernel.forward(q.view(), k.view(), Array2::eye(k.nrows()).view(), mask).unwrap();
        assert_close(name, &weights, &matrix(&case["weights"]), TOLERANCE);
        if !name.contains("extreme") {
            let kernel = SoftmaxAttention::<f32>::new(4).unwrap().with_scale(scale);
            let out = kernel
                .forward(narrow(&q).view(), narrow(&k).view(), narrow(&v).view(), mask)
                .unwrap();
            assert_close(name, &out, &matrix(&case["output"]), TOLERANCE_F32);
        }
        if mask == Mask::Full {
            use dijiang::{ExactMemory, Memory, Partial};
            let mut memory = ExactMemory::<f64>::new(4, 3, scale).unwrap();
            memory.absorb(k.view(), v.view()).unwrap();
            let mut answer = Partial::new(q.nrows(), 3).unwrap();
            memory.read(q.view(), &mut answer).unwrap();
            let lse = answer.log_normalizer().insert_axis(Axis(1));
            let exact = vector(&case["logsumexp"]).insert_axis(Axis(1));
            assert_close(name, &lse, &exact, TOLERANCE);
        }
    }
}

#[test]
fn extreme_scores_in_f32() {
    for case in golden("golden/softmax_attention")["cases"].as_array().unwrap() {
        if !case["name"].as_str().unwrap().contains("extreme") {
            continue;
        }
        // Rounding the input moves scores of 500 by 500·ε: compare with f64 on the rounded input.
        let [q, k, v] = ["q", "k", "v"].map(|x| narrow(&matrix(&case[x])));
        let mask = if case["causal"].as_bool().unwrap() { Mask::Causal } else { Mask::Full };
        let out = SoftmaxAttention::<f32>::new(4)
            .unwrap()
            .forward(q.view(), k.view(), v.view(), mask)
            .unwrap();
        let exact = naive::softmax(&wide(&q), &wide(&k), &wide(&v), 0.5, mask);
        assert_close("extreme", &out, &exact, 8.0 * 500.0);
    }
}

#[test]
fn quantiles() {
    for case in golden("golden/quantiles")["cases"].as_array().unwrap() {
        for (t, x) in vector(&case["t"]).iter().zip(&vector(&case["x"])) {
            let found = match case["d"].as_u64() {
                Some(d) => chi_quantile(usize::try_from(d).unwrap(), *t).unwrap(),
                None => normal_quantile(*t).unwrap(),
            };
            assert!(
                (found - x).abs() <= 1e-12 * x.abs() + 1e-15,
                "{} at {t}: {found} instead of {x}",
                case["name"]
            );
        }
    }
}

/// `φ` of the official map at radii t is softmax(x C diag(t)): with unit vectors and large radii it
/// shows C itself.
#[test]
fn dct() {
    for case in golden("golden/dct")["cases"].as_array().unwrap() {
        let d = usize::try_from(case["d"].as_u64().unwrap()).unwrap();
        let c = naive::features::dct_matrix(d);
        if let Some(exact) = case.get("matrix_C").filter(|x| x.is_array()) {
            assert_close("C", &c, &matrix(exact), TOLERANCE);
        }
        assert_close(
            "DCT-II",
            &c.dot(&vector(&case["x"])).insert_axis(Axis(1)),
            &vector(&case["dct2"]).insert_axis(Axis(1)),
            TOLERANCE,
        );
        let (x, dct3) = (vector(&case["x"]), vector(&case["dct3"]));
        // the official map transforms by the DCT-III: ω_i is column i of C
        let map = OfficialDijiang::<f64>::new(Array1::ones(d)).unwrap();
        assert_close("columns of C", &map.projection(), &c.t().to_owned(), TOLERANCE);
        let logits = map.projection().dot(&x).insert_axis(Axis(1));
        assert_close("DCT-III", &logits, &dct3.insert_axis(Axis(1)), TOLERANCE);
        // the signed blocks: Cᵀ·ω/r = S_b C S_0, which is C up to signs
        let map = DctFeatures::<f64>::new(d, 3 * d, 9).unwrap();
        let projection = map.projection();
        for b in 0..3 {
            let rows = ndarray::s![b * d..(b + 1) * d, ..];
            let directions = &projection.slice(rows)
                / &map.radii().slice(ndarray::s![b * d..(b + 1) * d]).insert_axis(Axis(1));
            assert_close(
                "orthonormal",
                &directions.dot(&directions.t()),
                &Array2::eye(d),
                TOLERANCE,
            );
            assert_close(
                "C up to signs",
                &c.t().dot(&directions).mapv(f64::abs),
                &c.mapv(f64::abs),
                TOLERANCE,
            );
        }
    }
}

#[test]
fn wpff() {
    for case in golden("golden/wpff")["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let d = 6;
        let map = Wpff::from_parts(matrix(&case["v"]), vector(&case["radii"]), vector(&case["D"]))
            .unwrap();
        let (q, k) = (matrix(&case["q"]), matrix(&case["k"]));
        let scale = 1.0 / f64::from(d).sqrt();
        assert_relative(name, &absolute(&map, &q, scale, false), &matrix(&case["phi_q"]), 1e-12);
        assert_relative(name, &absolute(&map, &k, scale, true), &matrix(&case["phi_k"]), 1e-12);
        let log_weights = LinearAttention::new(map)
            .pair_weights()
            .unwrap()
            .log_weights(q.view(), k.view())
            .unwrap();
        assert_relative(name, &log_weights.mapv(f64::exp), &matrix(&case["kernel"]), 1e-12);
        if !name.contains("normal radii") {
            for (t, r) in vector(&case["t"]).iter().zip(&vector(&case["radii"])) {
                assert!((chi_quantile(6, *t).unwrap() - r).abs() < 1e-12 * r);
            }
        }
        // f32: relative to the largest feature
        let map = Wpff::from_parts(
            narrow(&matrix(&case["v"])),
            vector(&case["radii"]).mapv(f32::from_f64),
            vector(&case["D"]).mapv(f32::from_f64),
        )
        .unwrap();
        assert_close(
            name,
            &absolute(&map, &narrow(&q), scale, false),
            &matrix(&case["phi_q"]),
            TOLERANCE_F32,
        );
    }
}

/// Runs one case of the performer file: features and outputs, full and causal.
fn check_performer_case<F: FeatureMap<f64> + 'static, G: FeatureMap<f32> + 'static>(
    first: &Value,
    case: &Value,
    wide_map: F,
    narrow_map: G,
    scale: f64,
) {
    let name = case["name"].as_str().unwrap();
    let (q, k, v) = (matrix(&first["q"]), matrix(&first["k"]), matrix(&first["v"]));
    assert_close(
        name,
        &absolute(&wide_map, &q, scale, false),
        &matrix(&case["features_q"]),
        TOLERANCE,
    );
    assert_close(
        name,
        &absolute(&wide_map, &k, scale, true),
        &matrix(&case["features_k"]),
        TOLERANCE,
    );
    let kernel = LinearAttention::new(wide_map).with_scale(scale);
    let kernel32 = LinearAttention::new(narrow_map).with_scale(scale);
    let (q32, k32, v32) = (narrow(&q), narrow(&k), narrow(&v));
    for (mask, output) in [(Mask::Full, "output"), (Mask::Causal, "output_causal")] {
        let exact = matrix(&case[output]);
        assert_close(
            name,
            &kernel.forward(q.view(), k.view(), v.view(), mask).unwrap(),
            &exact,
            TOLERANCE,
        );
        let out = kernel32.forward(q32.view(), k32.view(), v32.view(), mask).unwrap();
        assert_close(name, &out, &exact, TOLERANCE_F32);
    }
    if let Some(estimate) = case.get("kernel_estimate") {
        let log_weights = kernel.pair_weights().unwrap().log_weights(q.view(), k.view()).unwrap();
        assert_close(name, &log_weights.mapv(f64::exp), &matrix(estimate), TOLERANCE);
    }
}

#[test]
fn performer() {
    let file = golden("golden/performer");
    let cases = file["cases"].as_array().unwrap();
    let first = &cases[0];
    let w = matrix(&first["W"]);
    let scale = 1.0 / 8_f64.sqrt();
    let mut seen = 0;
    for case in cases {
        let name = case["name"].as_str().unwrap();
        seen += 1;
        if name.starts_with("favor+") {
            let maps = (
                Performer::from_projection(w.clone()).unwrap(),
                Performer::from_projection(narrow(&w)).unwrap(),
            );
            check_performer_case(first, case, maps.0, maps.1, scale);
        } else if name.starts_with("hyperbolic") {
            let pairs = concatenate![Axis(0), w, -&w];
            let maps = (
                Performer::from_projection(pairs.clone()).unwrap(),
                Performer::from_projection(narrow(&pairs)).unwrap(),
            );
            check_performer_case(first, case, maps.0, maps.1, scale);
        } else if name.starts_with("elu") {
            let scale = if name.contains("RAW") { 1.0 } else { scale };
            check_performer_case(
                first,
                case,
                EluFeatures::new(8).unwrap(),
                EluFeatures::new(8).unwrap(),
                scale,
            );
        } else if name.starts_with("relu with projection") {
            let maps = (
                ReluFeatures::from_projection(w.clone()).unwrap(),
                ReluFeatures::from_projection(narrow(&w)).unwrap(),
            );
            check_performer_case(first, case, maps.0, maps.1, scale);
        } else if name.starts_with("relu without") {
            check_performer_case(
                first,
                case,
                ReluFeatures::new(8).unwrap(),
                ReluFeatures::new(8).unwrap(),
                scale,
            );
        } else {
            seen -= 1;
        }
    }
    assert_eq!(seen, cases.len());
}

#[test]
fn official_dijiang() {
    let case = &golden("golden/official_dijiang")["cases"][0];
    let radii = vector(&case["radii_t"]);
    let map = OfficialDijiang::new(radii.clone()).unwrap();
    assert_close("P", &map.projection().reversed_axes(), &matrix(&case["P"]), TOLERANCE);
    let map32 = OfficialDijiang::new(radii.mapv(f32::from_f64)).unwrap();
    for h in 0..2 {
        let [q, k, v] = ["q", "k", "v"].map(|x| matrix(&case[x][h]));
        assert_close(
            "φ(q)",
            &absolute(&map, &q, 1.0, false),
            &matrix(&case["phi_q"][h]),
            TOLERANCE,
        );
        assert_close("φ(k)", &absolute(&map, &k, 1.0, true), &matrix(&case["phi_k"][h]), TOLERANCE);
        let exact = matrix(&case["output_normalised_no_decay"][h]);
        let kernel = LinearAttention::new(map.clone()).with_scale(1.0);
        assert_close(
            "output",
            &kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap(),
            &exact,
            TOLERANCE,
        );
        let kernel = LinearAttention::new(map32.clone()).with_scale(1.0);
        let out = kernel
            .forward(narrow(&q).view(), narrow(&k).view(), narrow(&v).view(), Mask::Causal)
            .unwrap();
        assert_close("output", &out, &exact, TOLERANCE_F32);
    }
}

/// Every formula of the calibrated Taylor kernel.
#[test]
fn taylor2() {
    const TOLERANCE: f64 = 1e-9 / f64::EPSILON;
    let column = |x: Array1<f64>| x.insert_axis(Axis(1));
    for case in golden("golden/taylor2")["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let size = |which: &str| usize::try_from(case[which].as_u64().unwrap()).unwrap();
        let (d, rank, window, sinks) = (size("d"), size("r"), size("window"), size("sinks"));
        let options = CalibrationOptions::new()
            .with_window(window)
            .with_sinks(sinks)
            .with_shrinkage(case["shrink"].as_f64().unwrap());
        let (q, k) = (matrix(&case["calibration_q"]), matrix(&case["calibration_k"]));
        let calibration = Calibration::from_samples(q.view(), k.view(), options).unwrap();
        assert_eq!(
            calibration.rows_used(),
            case["calibration_rows_used"].as_array().unwrap().len()
        );
        for (which, found) in [
            ("a", calibration.attention()),
            ("mu_q", calibration.query_mean()),
            ("mu_k", calibration.key_mean()),
            ("lambda", calibration.spectrum()),
        ] {
            let what = format!("{name} {which}");
            assert_close(
                &what,
                &column(found.to_owned()),
                &column(vector(&case[which])),
                TOLERANCE,
            );
        }
        let covariances = [
            ("Sigma_q", calibration.query_covariance()),
            ("Sigma_k", calibration.key_covariance()),
        ];
        for (which, found) in covariances {
            assert_close(
                &format!("{name} {which}"),
                &found.to_owned(),
                &matrix(&case[which]),
                TOLERANCE,
            );
        }
        let (m, m_inv_t) = (matrix(&case["M"]), matrix(&case["M_inv_transposed"]));
        let signs =
            Array1::from_shape_fn(d, |l| calibration.query_basis().row(l).dot(&m.row(l)).signum());
        let signs = column(signs);
        assert_close("M", &(&calibration.query_basis() * &signs), &m, TOLERANCE);
        assert_close("M inverse", &(&calibration.key_basis() * &signs), &m_inv_t, TOLERANCE);
        for (fit, which) in [(TaylorFit::Unconstrained, "c_unclamped"), (TaylorFit::Clamped, "c")] {
            let c = Array1::from(calibration.taylor_coefficients(rank, fit).unwrap().to_vec());
            assert_close(
                &format!("{name} {which}"),
                &column(c),
                &column(vector(&case[which])),
                TOLERANCE,
            );
        }

        let (q, k) = (matrix(&case["q"]), matrix(&case["k"]));
        let scale = 1.0 / (d as f64).sqrt();
        let scaled = &k * scale.sqrt();
        let e = (&scaled - &calibration.key_mean()).dot(&calibration.query_mean());
        assert_close("e(k)", &column(e), &column(vector(&case["e_k"])), TOLERANCE);
        let scores = scaled.outer_iter().map(|k| calibration.static_score(k)).collect();
        assert_close(
            "static score",
            &column(scores),
            &column(vector(&case["heavy_score"])),
            TOLERANCE,
        );

        let map =
            CalibratedTaylor::<f64>::with_fit(rank, &calibration, TaylorFit::Clamped).unwrap();
        let map32 =
            CalibratedTaylor::<f32>::with_fit(rank, &calibration, TaylorFit::Clamped).unwrap();
        let (phi_q, phi_k) = (
            crate::common::features(&map, &q, scale, false),
            crate::common::features(&map, &k, scale, true),
        );
        let log_weights = naive::hybrid::log_products(&phi_q, &phi_k);
        let kernel32 = LinearAttention::new(map32)
            .pair_weights()
            .unwrap()
            .log_weights(narrow(&q).view(), narrow(&k).view())
            .unwrap();
        let largest = case["log_kernel_far"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|row| row.as_array().unwrap());
        let largest = largest.filter_map(Value::as_f64).fold(0.0, |m: f64, x| m.max(x.abs()));
        for (t, row) in case["log_kernel_far"].as_array().unwrap().iter().enumerate() {
            for (j, exact) in row.as_array().unwrap().iter().enumerate() {
                assert_eq!(exact.is_null(), t < j + window || j < sinks);
                if let Some(exact) = exact.as_f64() {
                    let found = log_weights[[t, j]];
                    assert!(
                        (found - exact).abs() < 1e-9 * largest,
                        "{name} {t} {j}: {found} instead of {exact}"
                    );
                    let found = kernel32[[t, j]];
                    assert!(
                        (found - exact).abs() < 1e-5 * largest,
                        "{name} {t} {j} in f32: {found} instead of {exact}"
                    );
                }
            }
        }
    }
}
