//! Backward passes against the golden file and against central differences of forward passes.

use crate::common::{assert_close, golden, matrix, vector};
use dijiang::{
    Attention, EluFeatures, FeatureMap, HeadGradient, IdentityFeatures, LinearAttention, Mask,
    OfficialDijiang, Performer, ReluFeatures, Scalar, Scratch,
};
use ndarray::{Array2, Axis};
use serde_json::Value;
use std::sync::Arc;

/// 1e-10, the tolerance of the file, in units of epsilon.
const TOLERANCE: f64 = 1e-10 / f64::EPSILON;

/// In f32, in units of epsilon.
const TOLERANCE_F32: f64 = 512.0;

fn narrow<T: Scalar>(x: &Array2<f64>) -> Array2<T> {
    x.mapv(T::from_f64)
}

/// The map of a case, if the library has it under its name.
fn map<T: Scalar>(
    case: &Value,
) -> Option<(Arc<dyn FeatureMap<T>>, Vec<(&'static str, &'static str)>)> {
    let name = case["name"].as_str().unwrap();
    let columns = matrix(&case["q"]).ncols();
    if !case["query_projection"].is_null() {
        return None;
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
    assert_eq!(checked, 11);
}
