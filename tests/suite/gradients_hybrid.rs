//! Backward passes of hybrids: against the golden file, central differences, and the formula of
//! softmax attention over means of tokens.

use crate::common::gradients::{Trained, check_gradients};
use crate::common::hybrid::FarFormula;
use crate::common::{Formula, assert_close, golden, hybrids, matrix, vector};
use dijiang::{Attention, Far, HeadGradient, HybridAttention, Mask, Performer, Scalar, Scratch};
use ndarray::{Array2, Array3, Axis};
use serde_json::Value;

fn narrow<T: Scalar>(x: &Array2<f64>) -> Array2<T> {
    x.mapv(T::from_f64)
}

/// The matrices of the query heads of a group.
fn heads<T: Scalar>(value: &Value) -> Array3<T> {
    let all: Vec<Array2<T>> =
        value.as_array().unwrap().iter().map(|x| narrow(&matrix(x))).collect();
    let views: Vec<_> = all.iter().map(|x| x.view()).collect();
    ndarray::stack(Axis(0), &views).unwrap()
}

fn check_golden<T: Scalar>(case: &Value, tolerance: f64) {
    let name = case["name"].as_str().unwrap();
    let number = |x: &str| usize::try_from(case[x].as_u64().unwrap()).unwrap();
    let map = Performer::<T>::from_projection(narrow(&matrix(&case["projection"]))).unwrap();
    let map = map.with_weights(vector(&case["weights"]).mapv(T::from_f64)).unwrap();
    let [q, d_out] = ["q", "d_output"].map(|x| heads::<T>(&case[x]));
    let [k, v] = ["k", "v"].map(|x| narrow::<T>(&matrix(&case[x])));
    let kernel = HybridAttention::builder(k.ncols())
        .window(number("window"))
        .sinks(number("sinks"))
        .scale(case["scale"].as_f64().unwrap())
        .far(Far::features(map))
        .build()
        .unwrap();
    let mut d_q = Array3::from_elem(q.dim(), T::one());
    let [mut d_k, mut d_v] = [&k, &v].map(|x| Array2::from_elem(x.dim(), T::one()));
    let mut parameters = kernel.parameters().zeros_like();
    let head = HeadGradient::group(
        q.view(),
        [k.view(), v.view()],
        d_out.view(),
        d_q.view_mut(),
        [d_k.view_mut(), d_v.view_mut()],
    );
    let mut all = [head.with_parameters(&mut parameters)];
    kernel.backward_heads(&mut all, Mask::Causal, &mut Scratch::new()).unwrap();
    let minus_one = |x: &Array2<T>| x.mapv(|x| x - T::one());
    for (g, d_q) in d_q.outer_iter().enumerate() {
        let exact = matrix(&case["d_q"][g]);
        assert_close(&format!("{name}: d_q"), &minus_one(&d_q.to_owned()), &exact, tolerance);
    }
    for (which, found) in [("d_k", &d_k), ("d_v", &d_v)] {
        let what = format!("{name}: {which}");
        assert_close(&what, &minus_one(found), &matrix(&case[which]), tolerance);
    }
    let of = |name: &str| parameters.get(name).unwrap().iter().copied().collect::<Vec<_>>();
    let exact = matrix(&case["d_projection"]);
    let found = Array2::from_shape_vec(exact.dim(), of("far.projection")).unwrap();
    assert_close(&format!("{name}: d_projection"), &found, &exact, tolerance);
    let exact = vector(&case["d_weights"]).insert_axis(Axis(0));
    let found = Array2::from_shape_vec(exact.dim(), of("far.weights")).unwrap();
    assert_close(&format!("{name}: d_weights"), &found, &exact, tolerance);
}

#[test]
fn the_golden_gradients_of_a_hybrid() {
    let mut checked = 0;
    for case in golden("golden/gradients")["cases"].as_array().unwrap() {
        if !case["window"].is_null() {
            check_golden::<f64>(case, 1e-10 / f64::EPSILON);
            check_golden::<f32>(case, 512.0);
            checked += 1;
        }
    }
    assert_eq!(checked, 1);
}

/// Where nothing is decided by what was read, gradients agree with central differences.
#[test]
fn hybrids_that_do_not_learn_have_their_gradient() {
    for (d, m) in [(8, 20), (3, 7)] {
        for subject in hybrids(d, m) {
            let Formula::Hybrid(formula) = &subject.formula else { unreachable!() };
            if matches!(formula.far, FarFormula::Merged(_) | FarFormula::WardCalibrated { .. }) {
                continue;
            }
            println!("{}", subject.name);
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
