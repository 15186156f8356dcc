//! A saved state belongs to the kernel that saved it: another one of the same sizes refuses it.

use crate::common::{normal, tokens};
use dijiang::{
    Attention, Calibration, CalibrationOptions, CosFormer, DctFeatures, EluFeatures, Error, Far,
    FixedGates, HybridAttention, IdentityFeatures, LinearAttention, Merged, Metric, MultiHead,
    Performer, Radii, ReluFeatures, Retention, Rotary, RotaryAttention, RotaryPairs, Scalar,
    SoftmaxAttention, Stream, StreamState, Taylor, Ward, Wpff,
};
use ndarray::{Array1, Array2, Array4, s};

const D: usize = 6;
const N: usize = 30;

type Kernels<T> = Vec<(&'static str, Box<dyn Attention<T>>)>;

fn linear<T: Scalar>() -> Kernels<T> {
    let performer = |seed| LinearAttention::new(Performer::<T>::new(D, D, seed).unwrap());
    let elu = || LinearAttention::new(EluFeatures::<T>::new(D).unwrap());
    let relu = |epsilon| {
        LinearAttention::new(ReluFeatures::<T>::new(D).unwrap().with_epsilon(epsilon).unwrap())
    };
    let channels = |at: usize| Array1::from_shape_fn(D, |i| if i == at { 0.5 } else { 0.9 });
    let fixed = |seed| {
        let decays = normal::<T>(N, 1, 1.0, seed).mapv(|x| -x.abs());
        FixedGates::new(elu().gated(), decays)
    };
    let weights = |seed| {
        let weights = normal::<T>(1, D, 1.0, seed).mapv(|x| x.abs() + T::from_f64(0.1));
        let map = Performer::<T>::new(D, D, 0).unwrap();
        LinearAttention::new(map.with_weights(weights.row(0).to_owned()).unwrap())
    };
    vec![
        ("performer", Box::new(performer(0))),
        ("another seed", Box::new(performer(1))),
        ("i.i.d.", Box::new(LinearAttention::new(Performer::<T>::iid(D, D, 0).unwrap()))),
        ("another scale", Box::new(performer(0).with_scale(1.0))),
        ("a close scale", Box::new(performer(0).with_scale(1.001))),
        ("unnormalised", Box::new(performer(0).unnormalized())),
        ("decay", Box::new(performer(0).with_decay(0.9))),
        ("another decay", Box::new(performer(0).with_decay(0.901))),
        ("decay of all", Box::new(performer(0).with_decay(0.0))),
        ("channels", Box::new(performer(0).with_channel_decay(channels(0)))),
        ("other channels", Box::new(performer(0).with_channel_decay(channels(1)))),
        ("fixed gates", Box::new(fixed(1))),
        ("other gates", Box::new(fixed(2))),
        ("weights", Box::new(weights(1))),
        ("other weights", Box::new(weights(2))),
        ("dct", Box::new(LinearAttention::new(DctFeatures::<T>::new(D, D, 0).unwrap()))),
        (
            "dct of other radii",
            Box::new(LinearAttention::new(
                DctFeatures::<T>::new(D, D, 0).unwrap().with_radii(Radii::Normal).unwrap(),
            )),
        ),
        ("wpff", Box::new(LinearAttention::new(Wpff::<T>::new(D, D, 0).unwrap()))),
        ("elu", Box::new(elu())),
        ("relu", Box::new(relu(1e-3))),
        ("another epsilon", Box::new(relu(0.1))),
        (
            "identity",
            Box::new(LinearAttention::new(IdentityFeatures::<T>::new(D).unwrap()).unnormalized()),
        ),
    ]
}

fn positional<T: Scalar>() -> Kernels<T> {
    let rotary = || Rotary::new(D).unwrap();
    let rotated = |rotary: Rotary| {
        let kernel: Box<dyn Attention<T>> =
            Box::new(RotaryAttention::new(rotary, SoftmaxAttention::<T>::new(D).unwrap()));
        kernel
    };
    let softmax = || SoftmaxAttention::<T>::new(D).unwrap();
    vec![
        ("softmax", Box::new(softmax())),
        ("softmax of another scale", Box::new(softmax().with_scale(0.25))),
        ("soft cap", Box::new(softmax().with_soft_cap(20.0).unwrap())),
        ("another soft cap", Box::new(softmax().with_soft_cap(30.0).unwrap())),
        ("sink logit", Box::new(softmax().with_sink_logit(1.0).unwrap())),
        ("another sink logit", Box::new(softmax().with_sink_logit(0.0).unwrap())),
        ("slope", Box::new(softmax().with_alibi_slope(0.5).unwrap())),
        ("another slope", Box::new(softmax().with_alibi_slope(0.25).unwrap())),
        ("rotary", rotated(rotary())),
        ("another base", rotated(rotary().with_base(5e5).unwrap())),
        ("partial", rotated(Rotary::partial(D, 4).unwrap())),
        ("interleaved", rotated(rotary().with_pairs(RotaryPairs::Interleaved))),
        (
            "rotary of another scale",
            Box::new(RotaryAttention::new(rotary(), softmax().with_scale(1.0))),
        ),
        ("rotary twice", Box::new(RotaryAttention::new(rotary(), rotated(rotary())))),
        (
            "rotary twice, in another order",
            Box::new(RotaryAttention::new(rotary(), rotated(rotary().with_base(5e5).unwrap()))),
        ),
        ("retention", Box::new(Retention::<T>::new(D, 0.9).unwrap())),
        ("another retention", Box::new(Retention::<T>::new(D, 0.5).unwrap())),
        ("xpos", Box::new(Retention::<T>::new(D, 0.9).unwrap().with_xpos())),
        ("cosformer", Box::new(CosFormer::<T>::new(D, 500).unwrap())),
        ("a longer one", Box::new(CosFormer::<T>::new(D, 501).unwrap())),
        (
            "another epsilon",
            Box::new(CosFormer::<T>::new(D, 500).unwrap().with_epsilon(1e-3).unwrap()),
        ),
    ]
}

fn hybrids<T: Scalar>() -> Kernels<T> {
    let builder = || HybridAttention::<T>::builder(D).window(5).sinks(2);
    let build = |far: Far<T>| {
        let kernel: Box<dyn Attention<T>> = Box::new(builder().far(far).build().unwrap());
        kernel
    };
    let merged = || Merged::new(6);
    let calibration = |seed| {
        let [q, k, _] = tokens::<f64>(90, D, 1, 1.0, seed);
        let options = CalibrationOptions::default();
        Calibration::from_samples(q.view(), k.view(), options).unwrap()
    };
    let calibrated = |far: Far<T>, seed| {
        let kernel = builder().far(far).calibrated(&calibration(seed)).build().unwrap();
        let kernel: Box<dyn Attention<T>> = Box::new(kernel);
        kernel
    };
    let map = |seed| Performer::<T>::new(D, 10, seed).unwrap();
    vec![
        ("merged", build(merged().into())),
        ("identity", build(merged().metric(Metric::Identity).into())),
        ("another decay", build(merged().decay(0.9).into())),
        ("another age", build(merged().min_age(3).into())),
        ("another weight of values", build(merged().value_weight(1.0).into())),
        ("block", build(merged().block(2).into())),
        ("more entries", build(Merged::new(7).into())),
        ("scale", Box::new(builder().far(Far::merged(6)).scale(1.0).build().unwrap())),
        ("window", Box::new(builder().window(6).far(Far::merged(6)).build().unwrap())),
        ("soft cap", Box::new(builder().far(Far::merged(6)).soft_cap(20.0).build().unwrap())),
        ("sink logit", Box::new(builder().far(Far::merged(6)).sink_logit(1.0).build().unwrap())),
        ("ward", build(Ward::new(6).into())),
        ("ward, calibrated", calibrated(Ward::new(6).into(), 1)),
        ("ward, of another calibration", calibrated(Ward::new(6).into(), 2)),
        ("features", build(Far::features(map(0)))),
        ("features of another seed", build(Far::features(map(1)))),
        ("taylor", calibrated(Taylor::new(3).into(), 1)),
        ("taylor of another calibration", calibrated(Taylor::new(3).into(), 2)),
        ("none", build(Far::none())),
    ]
}

fn check<T: Scalar>(kernels: fn() -> Kernels<T>) {
    let [q, k, v] = tokens::<T>(N, D, 4, 1.0, 3);
    let states: Vec<StreamState<T>> = kernels()
        .iter()
        .map(|(_, kernel)| {
            let mut stream = kernel.stream(4).unwrap();
            let mut out = Array2::zeros((N, 4));
            // gated kernels bring their gates themselves here
            stream.extend(q.view(), k.view(), v.view(), out.view_mut()).unwrap();
            stream.save().unwrap()
        })
        .collect();
    for (i, (name, kernel)) in kernels().iter().enumerate() {
        for (j, state) in states.iter().enumerate() {
            let mut stream = kernel.stream(4).unwrap();
            let before = stream.save().unwrap();
            let result = stream.restore(state);
            if i == j {
                assert_eq!(result, Ok(()), "{name}");
                assert_eq!(&stream.save().unwrap(), state, "{name}");
            } else {
                let other = kernels()[j].0;
                assert!(matches!(result, Err(Error::State { .. })), "{name} took {other}");
                assert_eq!(stream.save().unwrap(), before, "{name}");
            }
        }
    }
}

#[test]
fn no_kernel_takes_the_state_of_another() {
    check::<f32>(linear);
    check::<f64>(linear);
    check::<f32>(positional);
    check::<f64>(positional);
    check::<f32>(hybrids);
    check::<f64>(hybrids);
}

#[test]
fn the_message_names_the_parameter_that_differs() {
    let softmax = |scale| SoftmaxAttention::<f32>::new(D).unwrap().with_scale(scale);
    let state = softmax(0.5).stream(4).unwrap().save().unwrap();
    let error = softmax(0.25).stream(4).unwrap().restore(&state).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the saved state has scale 0.5 where this stream has 0.25: restore it into a stream of the \
         kernel that saved it"
    );
}

#[test]
fn a_layer_does_not_take_the_state_of_another() {
    let layer = |seed| {
        let kernel = LinearAttention::new(Performer::<f32>::new(D, 8, seed).unwrap());
        MultiHead::new(kernel, 4, 2).unwrap()
    };
    let mut stream = layer(0).stream(1, 4).unwrap();
    let x = |heads| Array4::from_elem((1, heads, 3, D), 0.1);
    let (v, mut out) = (Array4::ones((1, 2, 3, 4)), Array4::zeros((1, 4, 3, 4)));
    stream.extend(x(4).view(), x(2).view(), v.view(), None, out.view_mut()).unwrap();
    let state = stream.save().unwrap();
    layer(0).stream(1, 4).unwrap().restore(&state).unwrap();
    let mut other = layer(1).stream(1, 4).unwrap();
    assert!(other.restore(&state).is_err());
    assert_eq!(other.lengths(), [0]);
}

/// A state holds the tokens that wait to be added to the sums, whatever their number, and one that
/// was saved without any is read as well.
#[test]
fn tokens_that_wait_are_saved_with_the_sums() {
    let (features, value_dim) = (10, 3);
    for decay in [1.0, 0.9] {
        let map = Performer::<f32>::new(D, features, 0).unwrap();
        let kernel = LinearAttention::new(map).with_decay(decay);
        let [q, k, v] = tokens::<f32>(40, D, value_dim, 1.0, 3);
        let row = |x: &Array2<f32>, t: usize| x.slice(s![t..=t, ..]).to_owned();
        let mut stream = kernel.stream(value_dim).unwrap();
        let step = |stream: &mut dyn Stream<f32>, t: usize| {
            let mut out = Array2::zeros((1, value_dim));
            stream
                .extend(row(&q, t).view(), row(&k, t).view(), row(&v, t).view(), out.view_mut())
                .unwrap();
            out
        };
        let mut counts = Vec::new();
        for t in 0..40 {
            let saved = stream.save().unwrap();
            let mut restored = kernel.stream(value_dim).unwrap();
            step(&mut *restored, 39); // dirty
            restored.restore(&saved).unwrap();
            assert_eq!(step(&mut *restored, t), step(&mut *stream, t));
            assert_eq!(restored.save().unwrap(), stream.save().unwrap(), "{t}");
            let low = usize::from(decay < 1.0);
            let sums = 2 * features * (value_dim + 1) + 1 + low;
            let waiting = (t + 1) % 16 * (features + value_dim);
            let state = stream.save().unwrap();
            let shape = [D, features, value_dim];
            let numbers = state.numbers("linear", &shape, sums + waiting).unwrap();
            assert!(numbers.len() <= stream.state_floats());
            for bad in [&numbers[1..], &[numbers, &[0.0]].concat()] {
                let bad = StreamState::new("linear", t + 1, shape.to_vec(), bad.to_vec());
                let bad = bad.with_fingerprint(state.fingerprint().clone());
                let error = restored.restore(&bad).unwrap_err();
                assert!(matches!(error, Error::State { which: "size", .. }), "{error}");
                assert_eq!(restored.save().unwrap(), stream.save().unwrap());
            }
            counts.push(waiting);
        }
        assert_eq!(counts.iter().filter(|&&count| count == 0).count(), 2);
        // several tokens at once leave none waiting
        let mut whole = kernel.stream(value_dim).unwrap();
        let mut out = Array2::zeros((40, value_dim));
        whole.extend(q.view(), k.view(), v.view(), out.view_mut()).unwrap();
        let sums = 2 * features * (value_dim + 1) + 1 + usize::from(decay < 1.0);
        let state = whole.save().unwrap();
        assert!(state.numbers("linear", &[D, features, value_dim], sums).is_ok());
    }
}
