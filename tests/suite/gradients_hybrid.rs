//! Backward passes of hybrids: against the golden file, central differences, and the formula of
//! softmax attention over means of tokens.

use crate::common::gradients::{
    Trained, check_bad_input, check_causality, check_gradients, check_units, check_views,
};
use crate::common::hybrid::FarFormula;
use crate::common::{
    Formula, Subject, assert_close, golden, hybrids, matrix, optional_subjects, tokens, vector,
};
use dijiang::{
    Attention, Error, ExactMemory, Far, HeadGradient, HybridAttention, Mask, Parameters, Performer,
    Scalar, Scratch, SoftmaxAttention, StateFormat,
};
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

fn trained<'a>(subject: &'a Subject) -> Trained<'a> {
    Trained {
        name: &subject.name,
        head_dim: subject.head_dim,
        f64: &*subject.f64,
        f32: &*subject.f32,
        masks: subject.masks(),
        gates: 0,
        size: 0.7,
    }
}

/// Whether a small change of queries or keys changes weights that are constants of the gradient.
fn decides(subject: &Subject) -> bool {
    let Formula::Hybrid(formula) = &subject.formula else { unreachable!() };
    matches!(formula.far, FarFormula::Merged(_) | FarFormula::WardCalibrated { .. })
}

/// Where such weights are none, gradients agree with central differences.
#[test]
fn hybrids_that_do_not_learn_have_their_gradient() {
    for (d, m) in [(8, 20), (1, 1)] {
        for subject in hybrids(d, m).iter().filter(|subject| !decides(subject)) {
            check_gradients(&trained(subject));
        }
    }
}

/// So do they with a cap, a learned sink or both.
#[test]
fn hybrids_with_options_have_their_gradient() {
    for subject in optional_subjects(4, 7) {
        if matches!(subject.formula, Formula::Hybrid(_)) && !decides(&subject) {
            check_gradients(&trained(&subject));
        }
    }
}

/// What holds of any backward pass. (The formula is checked where decisions are known: in the
/// crate.)
#[test]
fn merging_hybrids_keep_the_other_promises() {
    for subject in hybrids(8, 20).iter().filter(|subject| decides(subject)) {
        let trained = trained(subject);
        for &mask in trained.masks {
            check_units::<f64>(&trained, trained.f64, mask);
            check_units::<f32>(&trained, trained.f32, mask);
            check_views(&trained, mask);
            check_bad_input::<f64>(&trained, trained.f64, mask);
            check_bad_input::<f32>(&trained, trained.f32, mask);
        }
        check_causality(&trained);
    }
}

/// While nothing has left the window, it is the gradient of softmax attention.
#[test]
fn a_window_over_all_is_softmax_attention() {
    let [q, k, v] = tokens::<f64>(50, 6, 4, 1.0, 3);
    let d_out = tokens::<f64>(50, 6, 4, 1.0, 4)[2].clone();
    let exact = SoftmaxAttention::new(6).unwrap();
    let gradient = |kernel: &dyn Attention<f64>| {
        kernel.backward(q.view(), k.view(), v.view(), d_out.view(), Mask::Causal).unwrap()
    };
    let exact = gradient(&exact);
    let features = || Far::features(Performer::new(6, 10, 1).unwrap());
    for far in [Far::none(), Far::merged(5), Far::ward(5), features()] {
        let kernel = HybridAttention::builder(6).window(49).sinks(1).far(far).build().unwrap();
        let found = gradient(&kernel);
        for (x, y) in [(&found.q, &exact.q), (&found.k, &exact.k), (&found.v, &exact.v)] {
            assert_close("a window over all", x, y, 256.0);
        }
    }
}

/// Parameters have the names of their places, and can be replaced.
#[test]
fn the_parameters_of_a_hybrid() {
    let builder = || HybridAttention::<f64>::builder(4).window(3);
    let map = Performer::new(4, 6, 1).unwrap();
    let kernel = builder().far(Far::features(map)).sink_logits(vec![0.5, 1.0]).build().unwrap();
    let mut parameters = kernel.parameters();
    let names: Vec<&str> = parameters.names().collect();
    assert_eq!(names, ["far.projection", "far.weights", "sink_logits"]);
    parameters.get_mut("far.weights").unwrap()[2] = 0.25;
    parameters.get_mut("sink_logits").unwrap()[1] = -2.0;
    let changed = kernel.with_parameters(&parameters).unwrap();
    assert_eq!(changed.parameters(), parameters);
    assert_ne!(kernel.parameters(), parameters);
    let wrong =
        Parameters::new().with("projection", parameters.get("far.weights").unwrap().to_owned());
    assert!(matches!(kernel.with_parameters(&wrong), Err(Error::Parameter { .. })));
    let plain = builder().far(Far::merged(4)).build().unwrap();
    assert!(plain.parameters().is_empty());
}

/// What has no gradient says so, and what to use.
#[test]
fn hybrids_without_a_gradient_say_so() {
    let x = tokens::<f64>(20, 4, 4, 1.0, 3)[0].clone();
    let why = |kernel: HybridAttention<f64>, mask| {
        let x = x.view();
        kernel.backward(x, x, x, x, mask).unwrap_err().to_string()
    };
    let builder = || HybridAttention::<f64>::builder(4).window(3);
    let packed = builder().state_format(StateFormat::Q8).build().unwrap();
    assert!(why(packed, Mask::Causal).contains("StateFormat::F32"));
    let far =
        Far::memory(|value_dim, scale| Ok(Box::new(ExactMemory::<f64>::new(4, value_dim, scale)?)));
    let own = builder().far(far).build().unwrap();
    assert!(why(own, Mask::Causal).contains("Far::features"));
    assert!(why(builder().build().unwrap(), Mask::Full).contains("window(0)"));
}

/// Arguments of any size scale gradients, by powers of two.
#[test]
fn huge_and_tiny_arguments_scale_gradients() {
    let [q, k, v] = tokens::<f32>(90, 6, 4, 1.0, 3);
    let d_out = tokens::<f32>(90, 6, 4, 1.0, 4)[2].clone();
    let power = |x: &Array2<f32>, power: i32| x.mapv(|x| x * 2.0_f32.powi(power));
    let features = || Far::features(Performer::new(6, 10, 1).unwrap());
    // features, and the least distances that merging knows of, have a size of their own
    for (far, scales) in [(Far::none(), true), (Far::ward(5), false), (features(), false)] {
        let kernel = HybridAttention::builder(6).window(9).sinks(1).far(far).build().unwrap();
        let gradient = |[of_q, of_v, of_d]: [i32; 3]| {
            let [q, k] = [power(&q, of_q), power(&k, -of_q)];
            let [v, d_out] = [power(&v, of_v), power(&d_out, of_d)];
            kernel.backward(q.view(), k.view(), v.view(), d_out.view(), Mask::Causal).unwrap()
        };
        let exact = gradient([0; 3]);
        for powers in [[0, 100, -90], [0, -100, 90], [0, 60, 50], [30, 0, 0], [-40, 70, 0]] {
            let [of_q, of_v, of_d] = powers;
            if !scales && of_q != 0 {
                continue;
            }
            let found = gradient(powers);
            for (name, found, exact, unit) in [
                ("q", &found.q, &exact.q, of_v + of_d - of_q),
                ("k", &found.k, &exact.k, of_v + of_d + of_q),
                ("v", &found.v, &exact.v, of_d),
            ] {
                let what = format!("{kernel:?} {powers:?}: d_{name}");
                let exact = exact.mapv(|x| f64::from(x) * 2.0_f64.powi(unit));
                assert_close(&what, found, &exact, 64.0);
            }
        }
    }
}

/// A key whose features are tiny, before others whose are not, counts where it is all there is.
#[test]
fn keys_of_very_different_sizes_have_their_gradient() {
    let [q, mut k, v] = tokens::<f32>(70, 4, 3, 0.5, 3);
    let d_out = tokens::<f32>(70, 4, 3, 1.0, 4)[2].clone();
    for (size, rows) in [(40.0, 0..3), (20.0, 3..9)] {
        rows.for_each(|row| k.row_mut(row).mapv_inplace(|x| x * size));
    }
    let wide = [&q, &k, &v, &d_out].map(crate::common::wide);
    for window in [0, 3] {
        let builder = HybridAttention::<f32>::builder(4).window(window).sinks(0);
        let kernel = builder.far(Far::features(Performer::new(4, 8, 1).unwrap())).build().unwrap();
        let builder = HybridAttention::<f64>::builder(4).window(window).sinks(0);
        let exact = builder.far(Far::features(Performer::new(4, 8, 1).unwrap())).build().unwrap();
        let found =
            kernel.backward(q.view(), k.view(), v.view(), d_out.view(), Mask::Causal).unwrap();
        let [q, k, v, d_out] = wide.each_ref().map(|x| x.view());
        let exact = exact.backward(q, k, v, d_out, Mask::Causal).unwrap();
        assert!(exact.v.row(0).iter().all(|x| x.abs() > 1e-3));
        assert_close("d_q", &found.q, &exact.q, 4096.0);
        assert_close("d_k", &found.k, &exact.k, 4096.0);
        assert_close("d_v", &found.v, &exact.v, 4096.0);
    }
}

/// Decays of 0, of 1, too small for a long block, and keys of very different sizes beside them.
#[test]
fn extreme_decays() {
    let [q, k, v] = tokens::<f64>(70, 4, 3, 1.0, 5);
    let d_out = tokens::<f64>(70, 4, 3, 1.0, 6)[2].clone();
    let map = || Performer::<f64>::new(4, 6, 1).unwrap();
    let kernel = |decay: [f64; 6]| {
        let far = Far::decaying_features(map(), decay.to_vec().into());
        HybridAttention::<f64>::builder(4).window(0).sinks(2).far(far).build().unwrap()
    };
    let gradient = |kernel: &dyn Attention<f64>, k: &Array2<f64>| {
        kernel.backward(q.view(), k.view(), v.view(), d_out.view(), Mask::Causal).unwrap()
    };
    // nothing is forgotten
    let all = kernel([1.0; 6]);
    let plain = HybridAttention::<f64>::builder(4).window(0).sinks(2).far(Far::features(map()));
    let (found, exact) = (gradient(&all, &k), gradient(&plain.build().unwrap(), &k));
    assert_close("d_k", &found.k, &exact.k, 4096.0);
    assert_close("d_q", &found.q, &exact.q, 4096.0);
    // everything is: a token behind the sinks sees them and itself
    let none = kernel([0.0; 6]);
    let out = none.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap();
    let single = |t: usize| {
        let rows = [0, 1, t];
        let [q, k, v] = [&q, &k, &v].map(|x| x.select(Axis(0), &rows));
        let far = Far::features(map());
        let kernel = HybridAttention::<f64>::builder(4).window(0).sinks(2).far(far);
        kernel.build().unwrap().forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap()
    };
    for t in [2, 3, 33, 69] {
        let error = (&out.row(t) - &single(t).row(2)).iter().fold(0.0_f64, |m, x| m.max(x.abs()));
        assert!(error < 1e-12, "{t}: {error}");
    }
    let why = none.backward(q.view(), k.view(), v.view(), d_out.view(), Mask::Causal).unwrap_err();
    assert!(why.to_string().contains("a decay of 0"), "{why}");
    // by differences, from one token to a long memory
    let decays = [1e-6, 1e-4, 0.02, 0.5, 0.99, 1.0 - 1e-6];
    let found = gradient(&kernel(decays), &k).parameters;
    let found = found.get("decay.channels").unwrap();
    let loss = |decays: [f64; 6]| {
        let out = kernel(decays).forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap();
        (&out * &d_out).sum()
    };
    for (i, &found) in found.iter().enumerate() {
        let step = (1e-2 * decays[i].min(1.0 - decays[i])).min(1e-5);
        let moved = |sign: f64| {
            let mut moved = decays;
            moved[i] += sign * step;
            moved
        };
        let slope = (loss(moved(1.0)) - loss(moved(-1.0))) / (2.0 * step);
        assert!((found - slope).abs() < 1e-4 * (1.0 + slope.abs()), "{i}: {found} {slope}");
    }
    // keys that grow and shrink
    let sizes = |t: usize| [1.0, 9.0, 0.1][t % 3];
    let jumping = Array2::from_shape_fn(k.dim(), |(t, c)| k[[t, c]] * sizes(t));
    let kernel = kernel([0.9, 1e-3, 0.5, 1.0, 0.97, 0.3]);
    let wide = gradient(&kernel, &jumping);
    let map = Performer::<f32>::new(4, 6, 1).unwrap();
    let far = Far::decaying_features(map, vec![0.9, 1e-3, 0.5, 1.0, 0.97, 0.3].into());
    let kernel = HybridAttention::<f32>::builder(4).window(0).sinks(2).far(far).build().unwrap();
    let [q, k, v, d_out] = [&q, &jumping, &v, &d_out].map(narrow::<f32>);
    let found = kernel.backward(q.view(), k.view(), v.view(), d_out.view(), Mask::Causal).unwrap();
    for (what, found, exact) in [("d_k", found.k, wide.k), ("d_v", found.v, wide.v)] {
        assert_close(what, &found, &exact, 4096.0);
    }
}

#[test]
fn decays_that_cannot_be_used() {
    let build = |decay: Vec<f64>| {
        let far = Far::decaying_features(Performer::<f64>::new(4, 3, 1).unwrap(), decay.into());
        HybridAttention::<f64>::builder(4).window(0).far(far).build()
    };
    assert!(matches!(build(vec![0.5; 2]).unwrap_err(), Error::Shape { .. }));
    for bad in [-0.1, 1.1, f64::NAN] {
        assert!(matches!(build(vec![0.5, bad, 1.0]).unwrap_err(), Error::InvalidOption { .. }));
    }
    let kernel = build(vec![0.5; 3]).unwrap();
    let x = Array2::<f64>::ones((5, 4));
    let full = kernel.forward(x.view(), x.view(), x.view(), Mask::Full).unwrap_err();
    assert!(full.to_string().contains("full attention with decay"), "{full}");
    let full = kernel.backward(x.view(), x.view(), x.view(), x.view(), Mask::Full).unwrap_err();
    assert!(full.to_string().contains("full attention with decay"), "{full}");
    // a state is that of its decays
    let mut stream = kernel.stream(4).unwrap();
    stream.extend(x.view(), x.view(), x.view(), Array2::zeros((5, 4)).view_mut()).unwrap();
    let state = stream.save().unwrap();
    let mut other = build(vec![0.5, 0.5, 0.6]).unwrap().stream(4).unwrap();
    assert!(other.restore(&state).is_err());
    kernel.stream(4).unwrap().restore(&state).unwrap();
}

/// Units of cotangents and values whose product is out of range alone, and that of the gradient by
/// the keys is not.
#[test]
fn gradients_near_the_largest_number() {
    let builder = HybridAttention::<f64>::builder(4).window(6).sinks(2);
    let kernel = builder.far(Far::none()).build().unwrap();
    let [q, k, v] = tokens::<f64>(30, 4, 3, 0.7, 5);
    let d_out = tokens::<f64>(30, 4, 3, 0.7, 6)[2].clone();
    let gradient = |[of_v, of_out]: [i32; 2]| {
        let [v, d_out] = [&v * 2.0_f64.powi(of_v), &d_out * 2.0_f64.powi(of_out)];
        kernel.backward(q.view(), k.view(), v.view(), d_out.view(), Mask::Causal).unwrap()
    };
    let (plain, large) = (gradient([0, 0]), gradient([510, 500]));
    let unit = 2.0_f64.powi(1010);
    assert_close("d_q", &(large.q / unit), &plain.q, 64.0);
    assert_close("d_k", &(large.k / unit), &plain.k, 64.0);
}
