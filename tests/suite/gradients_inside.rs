//! Backward passes of kernels with another kernel inside: positions, fixed gates, Linformer.

use crate::common::gradients::{Trained, check_gradients};
use crate::common::{assert_close, normal, tokens};
use dijiang::{
    Attention, CosFormer, EluFeatures, Error, FixedGates, ForwardRecord, Head, HeadGradient,
    LinearAttention, Linformer, Mask, Parameters, Performer, Retention, Rotary, RotaryAttention,
    RotaryPairs, Scalar, Scratch, SoftmaxAttention,
};
use ndarray::{Array1, Array2, Array3, ArrayD, Axis, array, s};

const BOTH: &[Mask] = &[Mask::Causal, Mask::Full];
const CAUSAL: &[Mask] = &[Mask::Causal];

/// A kernel in both number types, of no gates.
fn check(
    name: &str,
    head_dim: usize,
    masks: &[Mask],
    f64: &dyn Attention<f64>,
    f32: &dyn Attention<f32>,
) {
    check_gradients(&Trained { name, head_dim, f64, f32, masks, gates: 0, size: 0.7 });
}

fn names<T: Scalar>(kernel: &dyn Attention<T>) -> Vec<String> {
    kernel.parameters().names().map(str::to_owned).collect()
}

#[test]
fn rotated_kernels_have_their_gradients() {
    let halves = Rotary::new(6).unwrap();
    let interleaved = Rotary::partial(6, 4).unwrap().with_pairs(RotaryPairs::Interleaved);
    fn softmax<T: Scalar>(rotary: &Rotary) -> impl Attention<T> + use<T> {
        let kernel = SoftmaxAttention::<T>::new(6).unwrap().with_sink_logits(vec![0.3]).unwrap();
        RotaryAttention::new(rotary.clone(), kernel)
    }
    fn performer<T: Scalar>(rotary: &Rotary) -> impl Attention<T> + use<T> {
        let map = Performer::<T>::new(6, 12, 1).unwrap();
        RotaryAttention::new(rotary.clone(), LinearAttention::new(map).with_scale(0.4))
    }
    for rotary in [&halves, &interleaved] {
        let softmax = (softmax::<f64>(rotary), softmax::<f32>(rotary));
        check("rotary softmax", 6, BOTH, &softmax.0, &softmax.1);
        assert_eq!(names(&softmax.0), ["kernel.sink_logits"]);
        let performer = (performer::<f64>(rotary), performer::<f32>(rotary));
        check("rotary performer", 6, BOTH, &performer.0, &performer.1);
        assert_eq!(names(&performer.0), ["kernel.map.projection", "kernel.map.weights"]);
    }
    fn gated<T: Scalar>() -> impl Attention<T> {
        let kernel = LinearAttention::new(EluFeatures::<T>::new(6).unwrap()).gated();
        RotaryAttention::new(Rotary::new(6).unwrap(), kernel.with_decay(0.95).unnormalized())
    }
    for gates in [1, 6] {
        let (f64, f32) = (&gated::<f64>(), &gated::<f32>());
        let name = "rotary gates";
        check_gradients(&Trained { name, head_dim: 6, f64, f32, masks: CAUSAL, gates, size: 0.7 });
    }
    assert_eq!(names::<f64>(&gated()), ["kernel.decay.common"]);
}

/// What a forward pass gave goes to the kernel inside.
#[test]
fn records_are_handed_on() {
    let kernel =
        RotaryAttention::new(Rotary::new(6).unwrap(), SoftmaxAttention::<f64>::new(6).unwrap());
    let [q, k, v] = tokens::<f64>(40, 6, 3, 1.0, 1);
    let d_out = normal::<f64>(40, 3, 1.0, 2);
    let (mut out, mut logs) = (Array3::zeros((1, 40, 3)), Array2::zeros((1, 40)));
    let q3 = q.view().insert_axis(Axis(0));
    let head = Head::group(q3, k.view(), v.view(), out.view_mut());
    let mut heads = [head.with_log_normalizer(logs.view_mut())];
    kernel.forward_heads(&mut heads, Mask::Causal, &mut Scratch::new()).unwrap();
    let exact = kernel.backward(q.view(), k.view(), v.view(), d_out.view(), Mask::Causal).unwrap();
    let run = |shift: f64| {
        let [mut d_q, mut d_k] = [(); 2].map(|()| Array2::zeros((40, 6)));
        let mut d_v = Array2::zeros((40, 3));
        let d = [d_q.view_mut(), d_k.view_mut(), d_v.view_mut()];
        let head = HeadGradient::new([q.view(), k.view(), v.view()], d_out.view(), d);
        let logs = &logs + shift;
        let record = ForwardRecord { out: out.view(), log_normalizer: logs.view() };
        let mut heads = [head.with_record(record)];
        kernel.backward_heads(&mut heads, Mask::Causal, &mut Scratch::new()).unwrap();
        (d_q, d_k, d_v)
    };
    let found = run(0.0);
    assert_close("q", &found.0, &exact.q, 64.0);
    assert_close("k", &found.1, &exact.k, 64.0);
    assert_close("v", &found.2, &exact.v, 64.0);
    // it is read: weights of half the size
    assert_close("v", &run(2.0_f64.ln()).2, &(exact.v * 0.5), 64.0);
}

#[test]
fn retention_has_its_gradient() {
    fn kernel<T: Scalar>(d: usize, decay: f64, xpos: bool) -> Retention<T> {
        let kernel = Retention::new(d, decay).unwrap();
        if xpos { kernel.with_xpos() } else { kernel }
    }
    for (d, decay, xpos) in [(6, 0.9, false), (5, 0.99, true), (6, 1.0, true), (1, 0.5, false)] {
        let (wide, narrow) = (kernel::<f64>(d, decay, xpos), kernel::<f32>(d, decay, xpos));
        let name = format!("retention d={d} decay={decay} xpos={xpos}");
        check(&name, d, CAUSAL, &wide, &narrow);
        let expected: &[&str] = if decay < 1.0 { &["decay"] } else { &[] };
        assert_eq!(names(&wide), expected);
    }
    check("retention", 4, BOTH, &kernel::<f64>(4, 1.0, false), &kernel::<f32>(4, 1.0, false));

    // the recurrence by hand: one column does not turn, and Σ o = 1 + (1 + γ) + (1 + γ + γ²)
    let (kernel, ones) = (Retention::<f64>::new(1, 0.5).unwrap(), Array2::ones((3, 1)));
    let x = ones.view();
    let d = kernel.backward(x, x, x, x, Mask::Causal).unwrap();
    let found = d.parameters.get("decay").unwrap();
    assert!((found.sum() - (2.0 + 2.0 * 0.5)).abs() < 1e-14, "{found}");
    let other = Parameters::new().with("decay", array![0.25].into_dyn());
    let out = kernel.with_parameters(&other).unwrap().forward(x, x, x, Mask::Causal).unwrap();
    assert!((out - array![[1.0], [1.25], [1.3125]]).iter().all(|e| e.abs() < 1e-14));
    let wrong = Parameters::new().with("decay", array![1.5].into_dyn());
    let error = kernel.with_parameters(&wrong).unwrap_err();
    assert!(matches!(error, Error::InvalidOption { which: "decay", .. }), "{error}");
    let name = "kernel.decay.common";
    for (name, size) in [(name, 1), ("decay", 0), ("decay", 2)] {
        let mut wrong = Parameters::new().with(name, Array1::ones(size).into_dyn());
        let error = kernel.with_parameters(&wrong).unwrap_err();
        assert!(matches!(error, Error::Parameter { .. }), "{error}");
        let mut d = [(); 3].map(|()| Array2::zeros((3, 1)));
        let views = d.each_mut().map(|d| d.view_mut());
        let mut heads = [HeadGradient::new([x, x, x], x, views).with_parameters(&mut wrong)];
        let error = kernel.backward_heads(&mut heads, Mask::Causal, &mut Scratch::new());
        assert!(matches!(error, Err(Error::Parameter { .. })), "{error:?}");
    }
}

#[test]
fn cosformer_has_its_gradient() {
    fn kernel<T: Scalar>(d: usize, epsilon: f64) -> CosFormer<T> {
        CosFormer::new(d, 900).unwrap().with_epsilon(epsilon).unwrap()
    }
    for (d, epsilon) in [(8, 1e-6), (5, 0.01), (1, 0.5)] {
        let (wide, narrow) = (kernel::<f64>(d, epsilon), kernel::<f32>(d, epsilon));
        check(&format!("cosformer {d} {epsilon}"), d, BOTH, &wide, &narrow);
        assert!(names(&wide).is_empty());
    }
    let long = Array2::<f64>::ones((901, 1));
    let error = kernel(1, 0.5)
        .backward(long.view(), long.view(), long.view(), long.view(), Mask::Causal)
        .unwrap_err();
    assert_eq!(error, Error::TooLong { max_len: 900, found: 901 });
}

/// Parameters of the kernel inside have its place in their names.
#[test]
fn parameters_of_kernels_inside() {
    let map = Performer::<f64>::new(4, 8, 2).unwrap();
    let kernel = RotaryAttention::new(Rotary::new(4).unwrap(), LinearAttention::new(map));
    let changed = Parameters::new().with("kernel.map.weights", Array1::ones(8).into_dyn() * 0.5);
    let other = kernel.with_parameters(&changed).unwrap();
    assert_eq!(other.parameters().get("kernel.map.weights"), changed.get("kernel.map.weights"));
    let again = other.with_parameters(&Attention::<f64>::parameters(&kernel)).unwrap();
    let x = Array2::from_shape_fn((9, 4), |(t, c)| ((t * 4 + c) as f64).sin());
    let [first, second] = [&kernel as &dyn Attention<f64>, &*again]
        .map(|kernel| kernel.forward(x.view(), x.view(), x.view(), Mask::Causal).unwrap());
    assert_eq!(first, second);
    let wrong = Parameters::new().with("map.weights", Array1::ones(8).into_dyn());
    let error = kernel.with_parameters(&wrong).unwrap_err();
    assert!(matches!(error, Error::Parameter { .. }), "{error}");
}

/// Log decays that are the same numbers in both types.
fn log_decays<T: Scalar>(n: usize, width: usize) -> Array2<T> {
    let gates = normal::<f32>(n, width, 1.0, 21).mapv(|x| -0.3 * x.powi(4) - 0.001);
    gates.mapv(|x| T::from_f64(f64::from(x)))
}

#[test]
fn fixed_gates_are_a_parameter() {
    fn elu<T: Scalar>(width: usize, n: usize) -> FixedGates<impl Attention<T>, T> {
        let map = EluFeatures::new(5).unwrap();
        let kernel = LinearAttention::new(map).gated().with_decay(0.9).unnormalized();
        FixedGates::new(kernel, log_decays(n, width))
    }
    fn performer<T: Scalar>() -> impl Attention<T> {
        let kernel = LinearAttention::new(Performer::<T>::new(5, 9, 1).unwrap()).gated();
        FixedGates::new(kernel, log_decays(700, 1))
    }
    for width in [1, 5] {
        let (wide, narrow) = (elu::<f64>(width, 700), elu::<f32>(width, 700));
        check(&format!("fixed gates {width}"), 5, CAUSAL, &wide, &narrow);
        assert_eq!(names(&wide), ["kernel.decay.common", "log_decay"]);
    }
    let (wide, narrow) = (performer::<f64>(), performer::<f32>());
    check("fixed gates of random features", 5, CAUSAL, &wide, &narrow);
    let expected = ["kernel.map.projection", "kernel.map.weights", "log_decay"];
    assert_eq!(names(&wide), expected);

    // the gradient is that by the log decays of a call, and 0 beyond it
    let kernel = elu::<f64>(1, 30);
    let [q, k, v] = tokens::<f64>(20, 5, 3, 1.0, 1);
    let [q, k, v, d_out] = [q.view(), k.view(), v.view(), v.view()];
    let found = kernel.backward(q, k, v, d_out, Mask::Causal).unwrap();
    let d_log_decay = found.parameters.get("log_decay").unwrap();
    let gates = log_decays::<f64>(30, 1);
    let mut d_gates = Array2::zeros((20, 1));
    let [mut d_q, mut d_k, mut d_v] = [5, 5, 3].map(|columns| Array2::zeros((20, columns)));
    let d = [d_q.view_mut(), d_k.view_mut(), d_v.view_mut()];
    let head = HeadGradient::new([q, k, v], d_out, d);
    let mut heads = [head.with_log_decay(gates.slice(s![..20, ..]), d_gates.view_mut())];
    kernel.kernel().backward_heads(&mut heads, Mask::Causal, &mut Scratch::new()).unwrap();
    assert_eq!((found.q, found.k, found.v), (d_q, d_k, d_v));
    assert_eq!(d_log_decay.slice(s![..20, ..]).into_dyn(), d_gates.into_dyn());
    assert!(d_log_decay.slice(s![20.., ..]).iter().all(|x| *x == 0.0));

    let error = kernel.backward(q, k, v, d_out, Mask::Full).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    let error = elu::<f64>(1, 19).backward(q, k, v, d_out, Mask::Causal).unwrap_err();
    assert!(matches!(error, Error::Shape { which: "log_decay", .. }), "{error}");
    let mut wrong = Parameters::new().with("log_decay", Array2::zeros((20, 1)).into_dyn());
    let error = kernel.with_parameters(&wrong).unwrap_err();
    assert!(matches!(error, Error::Parameter { .. }), "{error}");
    let [mut d_q, mut d_k, mut d_v] = [5, 5, 3].map(|columns| Array2::zeros((20, columns)));
    let d = [d_q.view_mut(), d_k.view_mut(), d_v.view_mut()];
    let mut heads = [HeadGradient::new([q, k, v], d_out, d).with_parameters(&mut wrong)];
    let error = kernel.backward_heads(&mut heads, Mask::Causal, &mut Scratch::new()).unwrap_err();
    assert!(matches!(error, Error::Parameter { .. }), "{error}");
}

#[test]
fn linformer_has_its_gradient() {
    fn kernel<T: Scalar>(d: usize, rank: usize, shared: bool) -> Box<dyn Attention<T>> {
        let kernel = match shared {
            true => Linformer::shared(d, rank, 700, 5).unwrap(),
            false => Linformer::new(d, rank, 700, 5).unwrap().with_scale(0.3),
        };
        // the same numbers in both types
        let round = |x: &ArrayD<T>| x.mapv(|x| T::from_f64(f64::from(x.as_f64() as f32)));
        let rounded = kernel.parameters();
        let rounded = rounded.iter().map(|(name, x)| (name.to_owned(), round(x))).collect();
        kernel.with_parameters(&rounded).unwrap()
    }
    for (d, rank, shared) in [(8, 16, false), (5, 7, true), (1, 1, false), (3, 40, true)] {
        let (wide, narrow) = (kernel::<f64>(d, rank, shared), kernel::<f32>(d, rank, shared));
        check(&format!("linformer {d} {rank} {shared}"), d, &[Mask::Full], &*wide, &*narrow);
        let expected: &[&str] = if shared { &["e"] } else { &["e", "f"] };
        assert_eq!(names(&*wide), expected);
        let [q, k, v] = tokens::<f64>(20, d, 3, 1.0, 1);
        let [q, k, v, d_out] = [q.view(), k.view(), v.view(), v.view()];
        let found = wide.backward(q, k, v, d_out, Mask::Full).unwrap();
        for (name, d) in found.parameters.iter() {
            assert!(d.slice(s![.., 20..]).iter().all(|x| *x == 0.0), "{name}");
            let is_of_all = d.slice(s![.., ..20]).iter().all(|x| *x != 0.0);
            assert!(rank == 1 || is_of_all, "{name}");
        }
        let error = wide.backward(q, k, v, d_out, Mask::Causal).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }

    // what is shared stays so, and the scale stays as well
    let kernel = Linformer::<f64>::shared(2, 3, 9, 1).unwrap().with_scale(0.25);
    let other = Parameters::new().with("e", Array2::from_elem((3, 9), 0.5).into_dyn());
    let other = kernel.with_parameters(&other).unwrap();
    assert_eq!(names(&*other), ["e"]);
    let e = Array2::from_elem((3, 9), 0.5);
    let written = Linformer::from_projections(2, e.clone(), e).unwrap().with_scale(0.25);
    let x = normal::<f64>(9, 2, 1.0, 3);
    let [first, second] = [&*other, &written]
        .map(|kernel| kernel.forward(x.view(), x.view(), x.view(), Mask::Full).unwrap());
    assert_eq!(first, second);
    let wrong = Parameters::new().with("f", Array2::zeros((3, 9)).into_dyn());
    let error = kernel.with_parameters(&wrong).unwrap_err();
    assert!(matches!(error, Error::Parameter { .. }), "{error}");
    let long = normal::<f64>(10, 2, 1.0, 3);
    let long = long.view();
    let error = kernel.backward(long, long, long, long, Mask::Full).unwrap_err();
    assert_eq!(error, Error::TooLong { max_len: 9, found: 10 });
}
