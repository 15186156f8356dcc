//! With feature `serde`: maps, weights, kernels, reports and stream states save and restore; a
//! restored stream goes on bit for bit.
use crate::common::{checker::feed, normal, official, tokens};
use dijiang::fidelity::{Rate, Report, compare, rate};
use dijiang::{
    Attention, CosFormer, DctFeatures, EluFeatures, ExactMemory, FeatureMap, IdentityFeatures,
    LinearAttention, Linformer, Mask, Memory, Performer, Points, Radii, ReluFeatures, Retention,
    Rotary, RotaryAttention, Scalar, SoftmaxAttention, StreamState, TaylorFeatures, Wpff,
};
use ndarray::{Array1, Array2};
use serde::{Serialize, de::DeserializeOwned};
use std::fmt::Debug;

fn round_trip<S: Serialize + DeserializeOwned>(x: &S) -> S {
    serde_json::from_str(&serde_json::to_string(x).unwrap()).unwrap()
}

/// The map, its kernel and a stream of it, saved in the middle.
fn check<T, F>(map: F)
where
    T: Scalar + Serialize + DeserializeOwned,
    F: FeatureMap<T> + Serialize + DeserializeOwned + PartialEq + Debug + 'static,
{
    let restored = round_trip(&map);
    assert_eq!(restored, map);
    let d = map.head_dim();
    let input = tokens::<T>(30, d, 2, 0.7, 1);
    let (first, rest) = (
        input.clone().map(|x| x.slice(ndarray::s![..20, ..]).to_owned()),
        input.map(|x| x.slice(ndarray::s![20.., ..]).to_owned()),
    );
    let kernel = LinearAttention::new(map).with_scale(0.4).unnormalized();
    let copy: LinearAttention<F> = round_trip(&kernel);
    let mut stream = kernel.stream(2).unwrap();
    let mut continued = copy.stream(2).unwrap();
    continued.restore(&round_trip(&stream.save().unwrap())).unwrap(); // empty
    feed(&mut *stream, &first, &[7; 3]);
    continued.restore(&round_trip(&stream.save().unwrap())).unwrap();
    assert_eq!(feed(&mut *continued, &rest, &[1, 9]), feed(&mut *stream, &rest, &[1, 9]));
    assert_eq!(continued.save().unwrap(), stream.save().unwrap());
}

fn check_all<T: Scalar + Serialize + DeserializeOwned>() {
    let weights = || Array1::from_shape_fn(12, |i| T::from_f64(0.1 * i as f64));
    check::<T, _>(Performer::new(5, 12, 1).unwrap());
    check::<T, _>(Performer::hyperbolic(5, 12, 1).unwrap().with_weights(weights()).unwrap());
    check::<T, _>(DctFeatures::new(5, 12, 1).unwrap());
    check::<T, _>(
        DctFeatures::new(5, 12, 1)
            .unwrap()
            .with_radii(Radii::Antithetic)
            .unwrap()
            .with_weights(weights())
            .unwrap(),
    );
    check::<T, _>(official::<T>(5, 1));
    check::<T, _>(Wpff::new(5, 12, 1).unwrap().with_weights(weights()).unwrap());
    check::<T, _>(Wpff::with_sampling(5, 12, 1, Points::Sobol, Radii::Sobol).unwrap());
    check::<T, _>(TaylorFeatures::new(5).unwrap());
    check::<T, _>(EluFeatures::new(5).unwrap());
    check::<T, _>(IdentityFeatures::new(5).unwrap());
    check::<T, _>(ReluFeatures::new(5).unwrap().with_epsilon(0.1).unwrap());
    check::<T, _>(ReluFeatures::from_projection(normal(7, 5, 1.0, 1)).unwrap());
}

#[test]
fn maps_and_streams() {
    check_all::<f32>();
    check_all::<f64>();
}

/// A kernel, and a stream of it, saved in the middle, that goes on in one of the copy.
fn check_kernel<A: Attention<f32> + Serialize + DeserializeOwned>(kernel: &A) {
    let copy: A = round_trip(kernel);
    assert_eq!(format!("{copy:?}"), format!("{kernel:?}"));
    let input = tokens::<f32>(30, 5, 2, 0.7, 1);
    let rows = |rows| input.each_ref().map(|x| x.slice(ndarray::s![rows, ..]).to_owned());
    let (first, rest) = (rows(ndarray::Slice::from(..20)), rows(ndarray::Slice::from(20..)));
    let (mut stream, mut continued) = (kernel.stream(2).unwrap(), copy.stream(2).unwrap());
    feed(&mut *stream, &first, &[7; 3]);
    continued.restore(&round_trip(&stream.save().unwrap())).unwrap();
    assert_eq!(feed(&mut *continued, &rest, &[1, 9]), feed(&mut *stream, &rest, &[1, 9]));
}

#[test]
fn kernels_with_positions() {
    let rotary = || Rotary::partial(5, 4).unwrap().with_base(50.0).unwrap();
    check_kernel(&RotaryAttention::new(rotary(), SoftmaxAttention::<f32>::new(5).unwrap()));
    check_kernel(&RotaryAttention::new(
        rotary(),
        LinearAttention::new(EluFeatures::<f32>::new(5).unwrap()),
    ));
    check_kernel(&CosFormer::<f32>::new(5, 50).unwrap().with_epsilon(0.25).unwrap());
    check_kernel(&Retention::<f32>::new(5, 0.9).unwrap());
    let retention = Retention::<f32>::new(5, 0.9)
        .unwrap()
        .with_rotary(rotary())
        .unwrap()
        .with_scale(0.3)
        .with_xpos();
    check_kernel(&retention);
    let bad = serde_json::to_string(&retention).unwrap().replace("0.9", "1.9");
    assert!(serde_json::from_str::<Retention<f32>>(&bad).is_err());

    let [q, k, v] = tokens::<f32>(9, 5, 2, 0.7, 1);
    for kernel in [
        Linformer::<f32>::new(5, 3, 12, 1).unwrap().with_scale(0.2),
        Linformer::shared(5, 3, 12, 1).unwrap(),
    ] {
        let copy = round_trip(&kernel);
        let out = |kernel: &Linformer<f32>| {
            kernel.forward(q.view(), k.view(), v.view(), Mask::Full).unwrap()
        };
        assert_eq!(out(&copy), out(&kernel));
    }
}

#[test]
fn softmax_streams_and_memories() {
    let kernel = SoftmaxAttention::<f32>::new(4).unwrap().with_scale(0.3);
    let copy: SoftmaxAttention<f32> = round_trip(&kernel);
    assert_eq!(copy, kernel);
    let input = tokens::<f32>(10, 4, 2, 1.0, 1);
    let mut stream = kernel.stream(2).unwrap();
    feed(&mut *stream, &input, &[10]);
    let state: StreamState<f32> = round_trip(&stream.save().unwrap());
    let mut continued = copy.stream(2).unwrap();
    continued.restore(&state).unwrap();
    assert_eq!(feed(&mut *continued, &input, &[3; 4]), feed(&mut *stream, &input, &[3; 4]));

    let mut memory = ExactMemory::<f32>::new(4, 2, 0.3).unwrap();
    memory.absorb(input[1].view(), input[2].view()).unwrap();
    assert_eq!(round_trip(&memory), memory);
}

#[test]
fn reports() {
    let x = normal::<f64>(12, 4, 1.0, 1);
    let kernel = LinearAttention::new(Performer::new(4, 16, 0).unwrap());
    let report = compare(&kernel, x.view(), x.view(), x.view(), Mask::Causal).unwrap();
    let copy: Report = round_trip(&report);
    assert_eq!(copy, report);
    let measured = rate(&[4, 16], 0..3, |m, seed| Ok(1.0 / (m as f64 + seed as f64))).unwrap();
    let copy: Rate = round_trip(&measured);
    assert_eq!(copy, measured);
    let text = serde_json::to_string(&report).unwrap();
    assert!(text.contains("output_error") && text.contains("uniform_error"), "{text}");
}

fn text_of_huge(text: &str) -> String {
    text.replace("\"directions\":4", "\"directions\":18446744073709551615")
}

/// What was tampered with is refused with the error of the constructor.
#[test]
fn damaged_data_is_refused() {
    let map = Performer::<f64>::from_projection(Array2::eye(2)).unwrap();
    let text = serde_json::to_string(&map).unwrap();
    for (from, to) in
        [("\"weights\":{", "\"weight\":{"), ("[1.0,1.0]", "[1.0,-1.0]"), ("[1.0,1.0]", "[0.0,0.0]")]
    {
        assert!(text.contains(from), "{text}");
        assert!(serde_json::from_str::<Performer<f64>>(&text.replace(from, to)).is_err(), "{to}");
    }
    let text = serde_json::to_string(&ExactMemory::<f64>::new(2, 1, 0.5).unwrap()).unwrap();
    assert!(serde_json::from_str::<ExactMemory<f64>>(&text.replace("0.5", "-0.5")).is_err());
    assert!(
        serde_json::from_str::<ExactMemory<f64>>(&text.replace("[0,2]", "[0,0]")).is_err(),
        "{text}"
    );
    let map = DctFeatures::<f64>::new(3, 4, 0).unwrap();
    let text = serde_json::to_string(&map).unwrap();
    assert!(
        serde_json::from_str::<DctFeatures<f64>>(
            &text.replace("\"directions\":4", "\"directions\":3")
        )
        .is_err()
    );
    assert!(
        serde_json::from_str::<DctFeatures<f64>>(
            &text.replace("\"directions\":4", "\"directions\":0")
        )
        .is_err()
    );
    let huge = text_of_huge(&serde_json::to_string(&map).unwrap());
    assert!(serde_json::from_str::<DctFeatures<f64>>(&huge).is_err());
    assert!(serde_json::from_str::<TaylorFeatures<f64>>("0").is_err());
}

/// Options of softmax attention are saved; what was saved before there were any is read.
#[test]
fn options_of_softmax_attention() {
    let plain = SoftmaxAttention::<f32>::new(8).unwrap();
    let kernel = plain.clone().with_scale(0.3).with_soft_cap(50.0).unwrap();
    let kernel = kernel.with_sink_logits(vec![0.5, -1.0]).unwrap();
    let kernel = kernel.with_alibi_slope(0.25).unwrap();
    assert_eq!(round_trip(&kernel), kernel);
    let old: SoftmaxAttention<f32> =
        serde_json::from_str(r#"{"head_dim": 8, "scale": null}"#).unwrap();
    assert_eq!(old, plain);
    // A file that was changed by hand, or written for another number type, is found out.
    let bad: SoftmaxAttention<f32> =
        serde_json::from_str(r#"{"head_dim": 8, "scale": null, "soft_cap": -1.0}"#).unwrap();
    assert!(bad.stream(2).is_err());

    let mut memory = ExactMemory::<f64>::new(2, 1, 1.0).unwrap().with_soft_cap(3.0).unwrap();
    let x = normal::<f64>(5, 2, 1.0, 1);
    memory.absorb(x.view(), x.slice(ndarray::s![.., ..1])).unwrap();
    assert_eq!(round_trip(&memory), memory);
    let mut saved = serde_json::to_value(&memory).unwrap();
    saved.as_object_mut().unwrap().remove("soft_cap");
    let old: ExactMemory<f64> = serde_json::from_value(saved).unwrap();
    assert_eq!(old.keys(), memory.keys());
    assert_ne!(old, memory);
}

#[test]
fn small_files_ask_for_little() {
    let kernel = Retention::<f32>::new(4, 0.9).unwrap();
    let text =
        serde_json::to_string(&kernel).unwrap().replace("\"head_dim\":4", "\"head_dim\":400000000");
    let error = serde_json::from_str::<Retention<f32>>(&text).unwrap_err().to_string();
    assert!(error.contains("head_dim"), "{error}");
}
