//! The golden files: the formulas of `attention::naive` against values from independent programs,
//! within the tolerances they state.

use crate::common::{assert_close, golden, matrix, vector};
use dijiang::attention::naive::features::{self, Features, TaylorCalibration};
use dijiang::attention::naive::hybrid::{self, Near};
use dijiang::attention::naive::merged::{self, Bounds, Entry, Ward, ward};
use dijiang::attention::naive::options::Options;
use dijiang::attention::naive::received::{self, Cost, Head, Metric, Received, State};
use dijiang::attention::naive::{self, block, linear};
use dijiang::{DctFeatures, Mask, StateFormat};
use ndarray::{Array1, Array2, Axis, concatenate, s};
use serde_json::Value;

/// A relative tolerance in units of epsilon.
fn units(tolerance: f64) -> f64 {
    tolerance / f64::EPSILON
}

fn column(x: &Array1<f64>) -> Array2<f64> {
    x.clone().insert_axis(Axis(1))
}

fn number(value: &Value) -> usize {
    usize::try_from(value.as_u64().unwrap()).unwrap()
}

fn cases(file: &Value) -> &Vec<Value> {
    file["cases"].as_array().unwrap()
}

fn name(case: &Value) -> &str {
    case["name"].as_str().unwrap()
}

fn inputs(case: &Value) -> [Array2<f64>; 3] {
    ["q", "k", "v"].map(|x| matrix(&case[x]))
}

/// The scaled vectors `x/d^¼`.
fn scaled(x: &Array2<f64>) -> Array2<f64> {
    x * (x.ncols() as f64).powf(-0.25)
}

#[test]
fn softmax_attention() {
    for case in cases(&golden("golden/softmax_attention")) {
        let [q, k, v] = inputs(case);
        let scale = case["scale"].as_f64().unwrap();
        let mask = if case["causal"].as_bool().unwrap() { Mask::Causal } else { Mask::Full };
        let out = naive::softmax(&q, &k, &v, scale, mask);
        assert_close(name(case), &out, &matrix(&case["output"]), units(1e-12));
        let (weights, log_normalizer) = naive::attention_matrix(&q, &k, scale, mask);
        assert_close(name(case), &weights, &matrix(&case["weights"]), units(1e-12));
        let exact = column(&vector(&case["logsumexp"]));
        assert_close(name(case), &column(&log_normalizer), &exact, units(1e-12));
    }
}

#[test]
fn dct() {
    for case in cases(&golden("golden/dct")) {
        let c = features::dct_matrix(number(&case["d"]));
        if case["matrix_C"].is_array() {
            assert_close("C", &c, &matrix(&case["matrix_C"]), units(1e-12));
        }
        let x = vector(&case["x"]);
        let [dct2, dct3] = ["dct2", "dct3"].map(|which| column(&vector(&case[which])));
        assert_close("DCT-II", &column(&c.dot(&x)), &dct2, units(1e-12));
        assert_close("DCT-III", &column(&c.t().dot(&x)), &dct3, units(1e-12));
    }
}

/// The projection of the fast map, from signs that are read off it.
#[test]
fn dct_projection() {
    for (d, m) in [(1, 3), (5, 5), (8, 19), (64, 150)] {
        let map = DctFeatures::<f64>::new(d, m, 9).unwrap();
        let (c, omega) = (features::dct_matrix(d), map.projection());
        let blocks = m.div_ceil(d);
        let directions = &omega / &column(map.radii());
        // Cᵀ·(rows of block b) = S_b C S_0 with whole blocks; columns 0 of C are positive
        let whole = DctFeatures::<f64>::new(d, blocks * d, 9).unwrap();
        let whole = &whole.projection() / &column(whole.radii());
        assert_close("blocks", &whole.slice(s![..m, ..]).to_owned(), &directions, units(1e-12));
        let turned: Vec<Array2<f64>> =
            (0..blocks).map(|b| c.t().dot(&whole.slice(s![b * d..(b + 1) * d, ..]))).collect();
        let mixing = turned[0].row(0).mapv(f64::signum);
        let signs =
            Array2::from_shape_fn((blocks, d), |(b, a)| (turned[b][[a, 0]] * mixing[0]).signum());
        let found = features::dct_projection(map.radii(), &mixing, &signs);
        assert_close("ω", &found, &omega, units(1e-12));
    }
}

#[test]
fn wpff() {
    for case in cases(&golden("golden/wpff")) {
        let (directions, radii, weights) =
            (matrix(&case["v"]), vector(&case["radii"]), vector(&case["D"]));
        let [phi_q, phi_k] = ["q", "k"]
            .map(|x| features::wpff(&scaled(&matrix(&case[x])), &directions, &radii, &weights));
        for (found, exact) in [
            (phi_q.absolute(), "phi_q"),
            (phi_k.absolute(), "phi_k"),
            (hybrid::log_products(&phi_q, &phi_k).mapv(f64::exp), "kernel"),
        ] {
            let exact = matrix(&case[exact]);
            let relative = found / &exact;
            assert_close(name(case), &relative, &Array2::ones(exact.dim()), units(1e-12));
        }
    }
}

#[test]
fn performer_elu_relu() {
    let file = golden("golden/performer");
    let first = &cases(&file)[0];
    let (w, [q, k, v]) = (matrix(&first["W"]), inputs(first));
    let ones = Array1::ones(w.nrows());
    for case in cases(&file) {
        let raw = name(case).contains("RAW");
        let map = |x: &Array2<f64>| -> Features {
            let x = if raw { x.clone() } else { scaled(x) };
            match name(case) {
                name if name.starts_with("favor+") => features::performer(&x, &w, &ones),
                name if name.starts_with("hyperbolic") => {
                    let pairs = concatenate![Axis(0), w, -&w];
                    features::performer(&x, &pairs, &Array1::ones(pairs.nrows()))
                }
                name if name.starts_with("elu") => features::elu(&x),
                name if name.starts_with("relu without") => features::relu(&x, 1e-3),
                name if name.starts_with("relu with") => features::relu(&x.dot(&w.t()), 1e-3),
                name => panic!("{name}"),
            }
        };
        let (phi_q, phi_k) = (map(&q), map(&k));
        let close = |found: &Array2<f64>, exact: &str| {
            assert_close(name(case), found, &matrix(&case[exact]), units(1e-12));
        };
        close(&phi_q.absolute(), "features_q");
        close(&phi_k.absolute(), "features_k");
        close(&linear::normalized(&phi_q, &phi_k, &v, Mask::Full), "output");
        close(&linear::normalized(&phi_q, &phi_k, &v, Mask::Causal), "output_causal");
    }
}

#[test]
fn official_dijiang() {
    for case in cases(&golden("golden/official_dijiang")) {
        let radii = vector(&case["radii_t"]);
        for (h, gamma) in vector(&case["gamma"]).into_iter().enumerate() {
            let [q, k, v] = ["q", "k", "v"].map(|x| matrix(&case[x][h]));
            let [phi_q, phi_k] = [q, k].map(|x| features::official_dijiang(&x, &radii));
            let close = |found: &Array2<f64>, exact: &str| {
                assert_close(exact, found, &matrix(&case[exact][h]), units(1e-12));
            };
            close(&phi_q.absolute(), "phi_q");
            close(&phi_k.absolute(), "phi_k");
            let out = linear::normalized(&phi_q, &phi_k, &v, Mask::Causal);
            close(&out, "output_normalised_no_decay");
            let out = linear::decayed(&phi_q.absolute(), &phi_k.absolute(), &v, gamma);
            close(&out, "output_unnormalised_decay");
            let decays = block::decays(number(&case["heads"]));
            assert!((decays[h] - gamma).abs() < 1e-15);
        }
    }
}

#[test]
fn dijiang_block() {
    for case in cases(&golden("golden/dijiang_block")) {
        let (hidden, heads) = (number(&case["hidden"]), number(&case["heads"]));
        let dims = (hidden / heads) as f64 * case["rotary_pct"].as_f64().unwrap();
        let weights = block::Weights {
            query_key_value: matrix(&case["query_key_value.weight"]),
            query_key_value_bias: vector(&case["query_key_value.bias"]),
            dense: matrix(&case["dense.weight"]),
            dense_bias: vector(&case["dense.bias"]),
            gate: matrix(&case["W_G"]),
            group_norm_weight: vector(&case["group_norm.weight"]),
            group_norm_bias: vector(&case["group_norm.bias"]),
            radii: vector(&case["radii"]),
        };
        let x = matrix(&case["x"]);
        let out = block::dijiang_block(&x, &weights, heads, dims as usize, 1e-5);
        assert_close(name(case), &out, &matrix(&case["output"]), units(1e-12));
    }
}

#[test]
fn decay() {
    for case in cases(&golden("golden/decay")) {
        let [q, k, v] = inputs(case);
        let log_decay = match (&case["gamma"], &case["a"]) {
            (Value::Null, Value::Null) => matrix(&case["alpha"]).mapv(f64::ln),
            (Value::Null, a) => column(&vector(a).mapv(f64::ln)),
            (gamma, _) => Array2::from_elem((1, 1), gamma.as_f64().unwrap().ln()),
        };
        let out = linear::gated_unnormalized(&q, &k, &v, &log_decay);
        assert_close(name(case), &out, &matrix(&case["output"]), units(1e-12));
        let mut state = linear::Recurrence::new(k.ncols(), v.ncols());
        let (rows, columns) = log_decay.dim();
        for t in 0..k.nrows() {
            let alpha = |i: usize| log_decay[[t.min(rows - 1), i.min(columns - 1)]].exp();
            state.step(k.row(t), v.row(t), alpha);
        }
        assert_close(name(case), &state.sums, &matrix(&case["final_state"]), units(1e-12));
        if let Some(gamma) = case["gamma"].as_f64() {
            let out = linear::decayed(&q, &k, &v, gamma);
            assert_close(name(case), &out, &matrix(&case["output"]), units(1e-12));
        }
    }
}

#[test]
fn hybrid_with_features() {
    let file = golden("golden/hybrid");
    let near = Near::new(number(&file["window"]), number(&file["sinks"]));
    for case in cases(&file) {
        let ([q, k, v], w) = (inputs(case), matrix(&case["W"]));
        let scale = 1.0 / (q.ncols() as f64).sqrt();
        let [phi_q, phi_k] =
            [&q, &k].map(|x| features::performer(&scaled(x), &w, &Array1::ones(w.nrows())));
        let close = |found: &Array2<f64>, exact: &str| {
            assert_close(name(case), found, &matrix(&case[exact]), units(1e-11));
        };
        let phi = [&phi_q, &phi_k];
        close(&hybrid::with_features([&q, &k, &v], scale, &near, phi, Mask::Causal), "output");
        let dropped = hybrid::window_only(&q, &k, &v, scale, &near, Mask::Causal);
        close(&dropped, "output_far_dropped");
        close(&naive::softmax(&q, &k, &v, scale, Mask::Causal), "output_exact_softmax");
        let far = hybrid::log_products(&phi_q, &phi_k);
        let logs = hybrid::log_weights(&q, &k, scale, &near, &far, Mask::Causal);
        let (weights, log_normalizer) = naive::normalize(&logs, Mask::Causal);
        close(&weights, "weights");
        for (found, exact) in log_normalizer.iter().zip(&vector(&case["log_normaliser"])) {
            assert!((found - exact).abs() <= 1e-12 * exact.abs(), "{found} {exact}");
        }
    }
}

#[test]
fn calibrated_taylor_and_heavy_keys() {
    for case in cases(&golden("golden/taylor2")) {
        let [q, k, v] = inputs(case);
        let rank = number(&case["r"]);
        let scale = 1.0 / (q.ncols() as f64).sqrt();
        let first = s![..rank, ..];
        let coefficients = vector(&case["c"]);
        let calibration = TaylorCalibration {
            query_mean: vector(&case["mu_q"]),
            key_mean: vector(&case["mu_k"]),
            query_basis: matrix(&case["M"]).slice(first).to_owned(),
            key_basis: matrix(&case["M_inv_transposed"]).slice(first).to_owned(),
            coefficients: [coefficients[0], coefficients[1], coefficients[2]],
        };
        let [phi_q, phi_k] = features::calibrated_taylor(&scaled(&q), &scaled(&k), &calibration);
        let found = hybrid::log_products(&phi_q, &phi_k);
        let exact = case["log_kernel_far"].as_array().unwrap();
        let exact: Vec<&[Value]> = exact.iter().map(|row| &row.as_array().unwrap()[..]).collect();
        let known = exact.concat();
        let largest = known.iter().filter_map(Value::as_f64).fold(0.0, |m: f64, x| m.max(x.abs()));
        for ((t, j), found) in found.indexed_iter() {
            if let Some(exact) = exact[t][j].as_f64() {
                assert!((found - exact).abs() < 1e-9 * largest, "{t} {j}: {found} {exact}");
            }
        }
        let near = Near::new(number(&case["window"]), number(&case["sinks"]));
        let heavy = Near {
            heavy: number(&case["heavy"]),
            scores: vector(&case["heavy_score"]),
            ..near.clone()
        };
        for (near, exact) in [(near, "output"), (heavy, "output_heavy")] {
            let phi = [&phi_q, &phi_k];
            let out = hybrid::with_features([&q, &k, &v], scale, &near, phi, Mask::Causal);
            assert_close(name(case), &out, &matrix(&case[exact]), units(1e-9));
        }
    }
}

fn check_entries(what: &str, entries: &[Entry], exact: &Value) {
    let exact = exact.as_array().unwrap();
    assert_eq!(entries.len(), exact.len(), "{what}");
    let rows = |x: &str, rows: Vec<Array1<f64>>| {
        for (found, exact) in rows.iter().zip(exact) {
            let exact = match &exact[x] {
                Value::Array(_) => vector(&exact[x]),
                number => Array1::from_elem(1, number.as_f64().unwrap()),
            };
            assert_close(what, &column(found), &column(&exact), units(1e-11));
        }
    };
    rows("key", entries.iter().map(|entry| entry.key.clone()).collect());
    rows("value", entries.iter().map(|entry| entry.value.clone()).collect());
    rows("count", entries.iter().map(|entry| Array1::from_elem(1, entry.count)).collect());
    let weights: Array1<f64> = entries.iter().map(|entry| entry.weight).collect();
    let exact: Array1<f64> = exact.iter().map(|entry| entry["weight"].as_f64().unwrap()).collect();
    if !entries.is_empty() {
        assert_close(what, &column(&weights), &column(&exact), units(1e-11));
    }
}

#[test]
fn merged_by_ward() {
    for case in cases(&golden("golden/merged")) {
        let [q, k, v] = inputs(case);
        let scale = 1.0 / (q.ncols() as f64).sqrt();
        let near = Near::new(number(&case["window"]), number(&case["sinks"]));
        let (entries, metric) = (number(&case["entries_max"]), matrix(&case["R"]));
        let weights = vector(&case["a"]);
        let rule = Ward {
            entries,
            weights: weights.clone(),
            metric: Some(metric.clone()),
            format: StateFormat::F32,
            options: Options::default(),
        };
        let out = ward([&q, &k, &v], scale, &near, &rule, Mask::Causal);
        assert_close(name(case), &out, &matrix(&case["output"]), units(1e-11));
        // the list, step by step
        let cost = |_: usize, a: &Entry, b: &Entry| {
            let difference = metric.dot(&(&a.key - &b.key));
            merged::ward_cost(a, b, difference.dot(&difference))
        };
        let (_, gone) = near.split(k.nrows());
        let steps = case["trace"].as_array().unwrap();
        assert_eq!(gone.len(), steps.len());
        let mut lists = [Vec::new()];
        for (j, step) in gone.into_iter().zip(steps) {
            lists[0].push(Entry::token(k.row(j), v.row(j), weights[j]));
            let bounds = Bounds { entries, least: 1, block: 1 };
            merged::reduce(&mut lists, bounds, cost, |a, b| a.merge(b, 0.0));
            check_entries(name(case), &lists[0], &step["entries"]);
        }
    }
}

#[test]
fn merged_by_received_attention() {
    for case in cases(&golden("golden/received")) {
        let q: Vec<Array2<f64>> = case["q"].as_array().unwrap().iter().map(matrix).collect();
        let (k, v) = (matrix(&case["k"]), matrix(&case["v"]));
        let scale = 1.0 / (k.ncols() as f64).sqrt();
        let block = number(&case["block"]);
        let near = Near { block, ..Near::new(number(&case["window"]), number(&case["sinks"])) };
        let rule = Received {
            entries: number(&case["entries_max"]),
            gamma: case["gamma"].as_f64().unwrap(),
            min_age: number(&case["min_age"]),
            cost: Cost::Ward { value_weight: case["beta"].as_f64().unwrap().powi(2) },
            metric: Metric::Identity,
            mean_value_square: None,
            format: StateFormat::F32,
            key_unit: 1.0,
            options: Options::default(),
        };
        let out = received::received(&q, &k, &v, scale, &near, &rule);
        for (found, exact) in out.iter().zip(case["output"].as_array().unwrap()) {
            assert_close(name(case), found, &matrix(exact), units(1e-11));
        }
        // the state, step by step
        let (queries, keys) = (q.iter().map(scaled).collect::<Vec<_>>(), scaled(&k));
        let head = Head { queries: &queries, keys: &keys, values: &v };
        let mut state = State::new(k.ncols());
        let trace = case["trace"].as_array().unwrap();
        for t in 0..k.nrows() {
            received::step(&mut state, t, head, &near, &rule);
            for exact in trace.iter().filter(|step| number(&step["t"]) == t) {
                check_entries(name(case), &state.entries, &exact["entries"]);
                let rho_squared = exact["rho_squared"].as_f64().unwrap();
                assert!((state.mean_value_square() / rho_squared - 1.0).abs() < 1e-11);
            }
        }
        let (window, end) = (&state.held.window, &case["window_end"]);
        assert_eq!(window[0], number(&end["first"]));
        let exact = vector(&end["acc"]);
        let found: Array1<f64> = window.iter().map(|&j| state.received[j]).collect();
        assert_close(name(case), &column(&found), &column(&exact), units(1e-11));
    }
}

#[test]
fn merged_by_the_product_cost() {
    for case in cases(&golden("golden/product_cost")) {
        let q: Vec<Array2<f64>> = case["q"].as_array().unwrap().iter().map(matrix).collect();
        let (k, v) = (matrix(&case["k"]), matrix(&case["v"]));
        let scale = case["scale"].as_f64().unwrap();
        let near = Near::new(number(&case["window"]), number(&case["sinks"]));
        let rule = Received {
            entries: number(&case["entries"]),
            gamma: case["decay"].as_f64().unwrap(),
            min_age: number(&case["min_age"]),
            cost: Cost::Product,
            metric: Metric::Diagonal(vector(&case["metric"])),
            mean_value_square: case["value_norm_squared"].as_f64(),
            format: StateFormat::F32,
            key_unit: 1.0,
            options: Options::default(),
        };
        let out = received::received(&q, &k, &v, scale, &near, &rule);
        for (found, exact) in out.iter().zip(case["output"].as_array().unwrap()) {
            assert_close(name(case), found, &matrix(exact), units(1e-10));
        }
        let scaled = |x: &Array2<f64>| x * scale.sqrt();
        let (queries, keys) = (q.iter().map(scaled).collect::<Vec<_>>(), scaled(&k));
        let head = Head { queries: &queries, keys: &keys, values: &v };
        let mut state = State::new(k.ncols());
        for t in 0..k.nrows() {
            received::step(&mut state, t, head, &near, &rule);
        }
        let all = |of: fn(&Entry) -> Array1<f64>| {
            let rows: Vec<Array1<f64>> = state.entries.iter().map(of).collect();
            Array2::from_shape_fn((rows.len(), rows[0].len()), |(i, c)| rows[i][c])
        };
        assert_close(
            name(case),
            &all(|e| e.key.clone()),
            &matrix(&case["final_keys"]),
            units(1e-10),
        );
        assert_close(
            name(case),
            &all(|e| e.value.clone()),
            &matrix(&case["final_values"]),
            units(1e-10),
        );
        let counts = column(&vector(&case["final_counts"]));
        assert_close(name(case), &all(|e| ndarray::array![e.count]), &counts, units(1e-10));
        let weights = column(&vector(&case["final_weights"]));
        assert_close(name(case), &all(|e| ndarray::array![e.weight]), &weights, units(1e-10));
    }
}
