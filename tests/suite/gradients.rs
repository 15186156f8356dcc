//! Backward passes against the golden file and against central differences of forward passes.

use crate::common::gradients::{Trained, check_gradients};
use crate::common::{
    Formula, MAPS, SIGNED_MAPS, assert_close, golden, map as map_of, matrix, normal, subjects,
    tokens, vector,
};
use dijiang::{
    Attention, EluFeatures, Error, FeatureMap, Head, HeadGradient, IdentityFeatures,
    LearnedFeatures, LearnedForm, LinearAttention, Mask, OfficialDijiang, Parameters, Performer,
    ReluFeatures, Scalar, Scratch,
};
use ndarray::{Array2, Axis, array, s};
use serde_json::Value;
use std::sync::Arc;

/// 1e-10, the tolerance of the file, in units of epsilon.
const TOLERANCE: f64 = 1e-10 / f64::EPSILON;

/// In f32, in units of epsilon.
const TOLERANCE_F32: f64 = 512.0;

fn narrow<T: Scalar>(x: &Array2<f64>) -> Array2<T> {
    x.mapv(T::from_f64)
}

/// A map, and what the file calls the gradients by its parameters.
type NamedMap<T> = (Arc<dyn FeatureMap<T>>, Vec<(&'static str, &'static str)>);

/// The map of a case, if the library has it under its name.
fn map<T: Scalar>(case: &Value) -> Option<NamedMap<T>> {
    let name = case["name"].as_str().unwrap();
    let columns = matrix(&case["q"]).ncols();
    if !case["query_projection"].is_null() {
        let projections =
            ["query_projection", "key_projection"].map(|name| narrow(&matrix(&case[name])));
        let biases = ["query_bias", "key_bias"].map(|name| vector(&case[name]).mapv(T::from_f64));
        let map = LearnedFeatures::from_parts(LearnedForm::Softmax, true, projections, biases);
        let names = [
            ("map.query_projection", "d_query_projection"),
            ("map.key_projection", "d_key_projection"),
            ("map.query_bias", "d_query_bias"),
            ("map.key_bias", "d_key_bias"),
        ];
        return Some((Arc::new(map.unwrap()), names.to_vec()));
    }
    if !case["projection"].is_null() {
        let map = Performer::<T>::from_projection(narrow(&matrix(&case["projection"]))).unwrap();
        let map = match case["weights"].is_null() {
            true => map,
            false => map.with_weights(vector(&case["weights"]).mapv(T::from_f64)).unwrap(),
        };
        let names = vec![("map.projection", "d_projection"), ("map.weights", "d_weights")];
        return Some((Arc::new(map), names));
    }
    if !case["radii"].is_null() {
        let map = OfficialDijiang::<T>::new(vector(&case["radii"]).mapv(T::from_f64)).unwrap();
        return Some((Arc::new(map), vec![("map.radii", "d_radii")]));
    }
    let map: Arc<dyn FeatureMap<T>> = match name.split([',', ' ']).next().unwrap() {
        "elu" => Arc::new(EluFeatures::new(columns).unwrap()),
        "relu" => Arc::new(ReluFeatures::new(columns).unwrap().with_epsilon(0.01).unwrap()),
        "identity" => Arc::new(IdentityFeatures::new(columns).unwrap()),
        _ => return None,
    };
    Some((map, Vec::new()))
}

fn check_linear<T: Scalar>(case: &Value, tolerance: f64) -> bool {
    let name = case["name"].as_str().unwrap();
    if !case["window"].is_null() {
        return false;
    }
    let Some((map, names)) = map::<T>(case) else { return false };
    let mut kernel = LinearAttention::new(map).with_scale(case["scale"].as_f64().unwrap());
    if !case["normalized"].as_bool().unwrap() {
        kernel = kernel.unnormalized();
    }
    if let Some(decay) = case["decay"].as_f64() {
        kernel = kernel.with_decay(decay);
    }
    let gated = !case["log_decay"].is_null();
    if gated {
        kernel = kernel.gated();
    }
    let mask = if case["causal"].as_bool() == Some(false) { Mask::Full } else { Mask::Causal };
    let [q, k, v, d_out] = ["q", "k", "v", "d_output"].map(|x| narrow::<T>(&matrix(&case[x])));
    // gradients are added to what is there
    let [mut d_q, mut d_k, mut d_v] = [&q, &k, &v].map(|x| Array2::from_elem(x.dim(), T::one()));
    let mut parameters = kernel.parameters().zeros_like();
    let gates =
        if gated { narrow::<T>(&matrix(&case["log_decay"])) } else { Array2::zeros((0, 0)) };
    let mut d_gates = Array2::from_elem(gates.dim(), T::one());
    let views = [d_q.view_mut(), d_k.view_mut(), d_v.view_mut()];
    let mut head = HeadGradient::new([q.view(), k.view(), v.view()], d_out.view(), views)
        .with_parameters(&mut parameters);
    if gated {
        head = head.with_log_decay(gates.view(), d_gates.view_mut());
    }
    kernel.backward_heads(&mut [head], mask, &mut Scratch::new()).unwrap();
    let mut found = vec![("d_q", d_q), ("d_k", d_k), ("d_v", d_v)];
    if gated {
        found.push(("d_log_decay", d_gates));
    }
    for (which, gradient) in found {
        let what = format!("{name}: {which}");
        assert_close(&what, &gradient.mapv(|x| x - T::one()), &matrix(&case[which]), tolerance);
    }
    for (place, which) in names {
        if case[which].is_null() {
            continue;
        }
        let found = parameters.get(place).unwrap();
        let exact = match found.ndim() {
            1 => vector(&case[which]).insert_axis(Axis(0)),
            _ => matrix(&case[which]),
        };
        let found = Array2::from_shape_vec(exact.dim(), found.iter().copied().collect()).unwrap();
        assert_close(&format!("{name}: {which}"), &found, &exact, tolerance);
    }
    if let Some(exact) = case["d_decay"].as_f64() {
        let found = parameters.get("decay.common").unwrap().sum().as_f64();
        let tolerance = tolerance * T::epsilon().as_f64();
        assert!((found - exact).abs() <= tolerance * exact.abs(), "{name}: {found} for {exact}");
    }
    true
}

#[test]
fn the_golden_gradients_of_linear_attention() {
    let mut checked = 0;
    for case in golden("golden/gradients")["cases"].as_array().unwrap() {
        if check_linear::<f64>(case, TOLERANCE) {
            check_linear::<f32>(case, TOLERANCE_F32);
            checked += 1;
        }
    }
    assert_eq!(checked, 12);
}

/// Linear attention over every map keeps the promises of the shared checker.
#[test]
fn every_linear_kernel_has_its_gradient() {
    for (d, m) in [(8, 20), (1, 1), (3, 7)] {
        for subject in subjects(d, m) {
            if !matches!(subject.formula, Formula::Linear(..)) {
                continue;
            }
            check_gradients(&Trained {
                name: &subject.name,
                head_dim: d,
                f64: &*subject.f64,
                f32: &*subject.f32,
                masks: subject.masks(),
                gates: 0,
                size: 0.7,
            });
        }
    }
}

/// So does every kind of decay.
#[test]
fn every_decay_has_its_gradient() {
    for name in MAPS.into_iter().chain(SIGNED_MAPS) {
        if name.starts_with("performer-") || name.starts_with("dct-") || name == "taylor" {
            continue;
        }
        for (kind, gates) in
            [("common", 0), ("channels", 0), ("gate", 1), ("gates", 9), ("both", 1), ("both", 9)]
        {
            for normalized in [true, false] {
                // features of either sign that decay differently may add up to nothing
                let signed = SIGNED_MAPS.contains(&name)
                    || name == "taylor-calibrated" && (kind == "channels" || gates == 9);
                if normalized && (signed || name == "taylor-calibrated" && kind == "both") {
                    continue;
                }
                let what = format!("{name} {kind} {gates} normalized {normalized}");
                let (wide, features) = kernel::<f64>(name, kind, normalized);
                let narrow = kernel::<f32>(name, kind, normalized).0;
                check_gradients(&Trained {
                    name: &what,
                    head_dim: 4,
                    f64: &*wide,
                    f32: &*narrow,
                    masks: &[Mask::Causal],
                    gates: if gates == 9 { features } else { gates },
                    size: 0.7,
                });
            }
        }
    }
}

/// A kernel that forgets in some way, and its features.
fn kernel<T: Scalar>(name: &str, kind: &str, normalized: bool) -> (Box<dyn Attention<T>>, usize) {
    let map = map_of::<T>(name, 4, 6, 3);
    let features = map.num_features();
    let mut kernel = LinearAttention::new(map).with_scale(0.5);
    if !normalized {
        kernel = kernel.unnormalized();
    }
    let channels = (0..features).map(|i| 0.99 - 0.6 * (i as f64 / features as f64)).collect();
    kernel = match kind {
        "common" => kernel.with_decay(0.9),
        "channels" => kernel.with_channel_decay(channels),
        "both" => kernel.with_channel_decay(channels).with_decay(0.95).gated(),
        _ => kernel.gated(),
    };
    (Box::new(kernel), features)
}

/// Sequences that are cut into parts, once and twice, have the gradients that differences say.
#[test]
fn sequences_longer_than_what_is_kept_between_the_scans() {
    let (d, dv) = (8, 3);
    for (m, n, gates) in [(3000, 1200, 0), (6000, 700, 0), (3000, 300, 1), (2000, 300, 2000)] {
        let map = Performer::<f64>::new(d, m, 1).unwrap();
        let kernel = LinearAttention::new(map);
        let is_gated = gates > 0;
        let kernel = if is_gated { kernel.gated() } else { kernel };
        let [q, k, v] = tokens::<f64>(n, d, dv, 0.6, 21);
        let gates = normal::<f64>(n, gates.max(1), 0.3, 22).mapv(|x| -x * x);
        let [d_out, u] = [23, 24].map(|seed| normal::<f64>(n, dv, 1.0, seed));
        let forward = |k: &Array2<f64>, v: &Array2<f64>, gates: &Array2<f64>| {
            let mut out = Array2::zeros((n, dv));
            let head = Head::new(q.view(), k.view(), v.view(), out.view_mut());
            let head = if is_gated { head.with_log_decay(gates.view()) } else { head };
            kernel.forward_heads(&mut [head], Mask::Causal, &mut Scratch::new()).unwrap();
            (&out * &d_out).sum()
        };
        let [mut d_q, mut d_k, mut d_v] = [d, d, dv].map(|columns| Array2::zeros((n, columns)));
        let mut d_gates = Array2::zeros(gates.dim());
        let views = [d_q.view_mut(), d_k.view_mut(), d_v.view_mut()];
        let head = HeadGradient::new([q.view(), k.view(), v.view()], d_out.view(), views);
        let head =
            if is_gated { head.with_log_decay(gates.view(), d_gates.view_mut()) } else { head };
        kernel.backward_heads(&mut [head], Mask::Causal, &mut Scratch::new()).unwrap();
        let step = 1e-5;
        let check = |what: &str, found: f64, difference: f64| {
            let error = (found - difference).abs() / found.abs().max(1e-3);
            assert!(error < 1e-5, "m={m} n={n} {what}: {found}, by difference {difference}");
        };
        let by_values = (&d_v * &u).sum();
        let [up, down] = [step, -step].map(|step| forward(&k, &(&v + &(&u * step)), &gates));
        check("v", by_values, (up - down) / (2.0 * step));
        let w = normal::<f64>(n, d, 1.0, 25);
        let [up, down] = [step, -step].map(|step| forward(&(&k + &(&w * step)), &v, &gates));
        check("k", (&d_k * &w).sum(), (up - down) / (2.0 * step));
        if is_gated {
            // a decay is 0 or less
            let w = normal::<f64>(n, gates.ncols(), 1.0, 26).mapv(f64::abs) * &gates;
            let [up, down] = [step, -step].map(|step| forward(&k, &v, &(&gates + &(&w * step))));
            check("log_decay", (&d_gates * &w).sum(), (up - down) / (2.0 * step));
        }
    }
}

/// Over thousands of tokens f32 agrees with f64, log decays included, however strong.
#[test]
fn long_sequences_in_f32() {
    let (d, m, n) = (16, 32, 8192);
    for (decay, gates) in [(None, 0), (Some(0.5), 1), (Some(0.999), 1), (None, 32)] {
        let [q, k, v] = tokens::<f32>(n, d, 8, 0.5, 31);
        let d_out = normal::<f32>(n, 8, 1.0, 32);
        let strength = if decay == Some(0.5) { 1.0 } else { 0.1 };
        let log_decay =
            normal::<f32>(n, gates.max(1), 1.0, 33).mapv(|x| -(x * x * strength).min(30.0));
        let run = |wide: bool| -> Vec<Array2<f64>> {
            fn of<T: Scalar>(
                [q, k, v, d_out, gates]: [&Array2<f32>; 5],
                m: usize,
                decay: Option<f64>,
                gated: bool,
            ) -> Vec<Array2<f64>> {
                let cast = |x: &Array2<f32>| x.mapv(|x| T::from_f64(f64::from(x)));
                let [q, k, v, d_out, gates] = [q, k, v, d_out, gates].map(cast);
                let map = Performer::<T>::new(q.ncols(), m, 1).unwrap();
                let mut kernel = LinearAttention::new(map);
                if let Some(decay) = decay {
                    kernel = kernel.with_decay(decay);
                }
                if gated {
                    kernel = kernel.gated();
                }
                let [mut d_q, mut d_k, mut d_v] = [&q, &k, &v].map(|x| Array2::zeros(x.dim()));
                let mut d_gates = Array2::zeros(gates.dim());
                let views = [d_q.view_mut(), d_k.view_mut(), d_v.view_mut()];
                let inputs = [q.view(), k.view(), v.view()];
                let mut parameters = kernel.parameters().zeros_like();
                let mut head =
                    HeadGradient::new(inputs, d_out.view(), views).with_parameters(&mut parameters);
                if gated {
                    head = head.with_log_decay(gates.view(), d_gates.view_mut());
                }
                let mut scratch = Scratch::new();
                kernel.backward_heads(&mut [head], Mask::Causal, &mut scratch).unwrap();
                let mut all: Vec<_> =
                    [d_q, d_k, d_v, d_gates].iter().map(|x| x.mapv(T::as_f64)).collect();
                for (_, x) in parameters.iter() {
                    let flat = x.iter().map(|x| x.as_f64()).collect();
                    all.push(Array2::from_shape_vec((1, x.len()), flat).unwrap());
                }
                all
            }
            let arguments = [&q, &k, &v, &d_out, &log_decay];
            if wide {
                of::<f64>(arguments, m, decay, gates > 0)
            } else {
                of::<f32>(arguments, m, decay, gates > 0)
            }
        };
        let names = ["q", "k", "v", "log_decay", "p", "p", "p"];
        for ((found, exact), name) in run(false).iter().zip(run(true)).zip(names) {
            if exact.iter().all(|x| *x == 0.0) {
                continue;
            }
            // relative to the root mean square, so that the largest does not hide the others
            let size = (exact.mapv(|x| x * x).mean().unwrap()).sqrt();
            let errors = (found - &exact).mapv(|x| x * x).mean().unwrap().sqrt();
            let units = errors / size / f64::from(f32::EPSILON);
            assert!(units < 256.0, "decay {decay:?} gates {gates}, by {name}: {units} epsilons");
        }
    }
}

/// Parameters that a kernel does not have, or of another shape, are refused.
#[test]
fn gradients_by_parameters_that_are_not_there() {
    let kernel = LinearAttention::new(Performer::<f64>::new(4, 6, 1).unwrap()).with_decay(0.9);
    let [q, k, v] = tokens::<f64>(20, 4, 3, 0.5, 41);
    for (name, shape) in [("map.radii", 6), ("map.weights", 5), ("decay.common", 0)] {
        let mut parameters = Parameters::new().with(name, ndarray::Array1::zeros(shape).into_dyn());
        let [mut d_q, mut d_k, mut d_v] = [&q, &k, &v].map(|x| Array2::zeros(x.dim()));
        let views = [d_q.view_mut(), d_k.view_mut(), d_v.view_mut()];
        let head = HeadGradient::new([q.view(), k.view(), v.view()], v.view(), views);
        let mut heads = [head.with_parameters(&mut parameters)];
        let error =
            kernel.backward_heads(&mut heads, Mask::Causal, &mut Scratch::new()).unwrap_err();
        assert!(matches!(&error, Error::Parameter { name: found, .. } if found == name), "{error}");
    }
}

/// As in a forward pass: features of early queries and keys overlap by e^{−60} only, which in the
/// unit of the last key, 8 natural units higher, f32 cannot divide by.
#[test]
fn a_later_key_does_not_make_an_earlier_gradient_fail() {
    fn gradients<T: Scalar>() -> [Array2<T>; 3] {
        let omega = array![[6.0, 0.0], [0.0, 6.0]].mapv(T::from_f64);
        let map = Performer::<T>::from_projection(omega).unwrap();
        let kernel = LinearAttention::new(map).with_scale(1.0);
        let n = 16; // a few tokens would go one by one
        let mut q = Array2::from_shape_fn((n, 2), |(_, i)| T::from_f64([10.0, 0.0][i]));
        let mut k = Array2::from_shape_fn((n, 2), |(t, i)| {
            T::from_f64([0.04 * t as f64, 10.0 - 0.01 * t as f64][i])
        });
        for x in [&mut q, &mut k] {
            x.row_mut(n - 1).assign(&array![T::zero(), T::from_f64(6.0)]);
        }
        let [v, d_out] = [1, 2].map(|seed| normal::<f64>(n, 2, 1.0, seed).mapv(T::from_f64));
        let inputs = [q.view(), k.view(), v.view()];
        let [mut d_q, mut d_k, mut d_v] = [(); 3].map(|()| Array2::zeros((n, 2)));
        let views = [d_q.view_mut(), d_k.view_mut(), d_v.view_mut()];
        let head = HeadGradient::new(inputs, d_out.view(), views);
        kernel.backward_heads(&mut [head], Mask::Causal, &mut Scratch::new()).unwrap();
        [d_q, d_k, d_v]
    }
    for (found, exact) in gradients::<f32>().iter().zip(gradients::<f64>()) {
        // exponents reach 60, which f32 rounds by 60·ε
        assert_close("the gradient", found, &exact, 60.0 * TOLERANCE_F32);
    }
}

/// Gradients by features that are in range, and by vectors that are not: however the arrays lie.
#[test]
fn gradients_beyond_the_largest_number_are_an_error() {
    let map = Performer::<f32>::from_projection(normal(6, 4, 1e37, 1)).unwrap();
    let kernel = LinearAttention::new(map).with_scale(1.0);
    let [q, k] = [2, 3].map(|seed| normal::<f32>(5, 4, 1e-37, seed));
    let [v, d_out] = [4, 5].map(|seed| normal::<f32>(5, 3, 1e3, seed));
    for columns in [4, 8] {
        // a part of a wider array is not contiguous
        let [mut d_q, mut d_k] = [(); 2].map(|()| Array2::zeros((5, columns)));
        let mut d_v = Array2::zeros((5, 3));
        let part = s![.., ..4];
        let views = [d_q.slice_mut(part), d_k.slice_mut(part), d_v.view_mut()];
        let head = HeadGradient::new([q.view(), k.view(), v.view()], d_out.view(), views);
        let error =
            kernel.backward_heads(&mut [head], Mask::Causal, &mut Scratch::new()).unwrap_err();
        assert!(matches!(error, Error::Overflow { which: "the gradient by `q`", .. }), "{error}");
    }
}

#[test]
fn gradients_by_parameters_out_of_range_are_reported() {
    // those of single tokens are in range, their sum is not
    let map = Performer::<f32>::hyperbolic(2, 4, 1).unwrap();
    let kernel = LinearAttention::new(map).unnormalized();
    let zeros = Array2::<f32>::zeros((60, 2));
    let (v, d_out) = (&zeros + 1e25, &zeros + 3e10);
    let found = kernel.backward(zeros.view(), zeros.view(), v.view(), d_out.view(), Mask::Causal);
    let which = "the gradient by a parameter";
    assert_eq!(found.unwrap_err(), Error::Overflow { which, row: 0 });
}
