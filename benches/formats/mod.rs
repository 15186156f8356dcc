//! Exact softmax over caches in fewer bits: a decode step over a long cache, of one query head and
//! of a group, and the whole sequence.

use super::{Contestant, D, D_V, Input, Targets, decode, oracle, race};
use dijiang::attention::naive;
use dijiang::{
    Attention, Far, Head, HybridAttention, Mask, SoftmaxAttention, StateFormat, Stream,
    StreamOptions,
};
use ndarray::{Array2, Array3, s};

const FORMATS: [StateFormat; 3] = [StateFormat::F32, StateFormat::Bf16, StateFormat::Q8];

fn softmax(format: StateFormat) -> SoftmaxAttention<f32> {
    SoftmaxAttention::new(D).expect("sizes are positive").with_state_format(format)
}

/// Refuses to go on unless a kernel is softmax over what the format makes of keys and values, at
/// once and token by token.
fn check(format: StateFormat) {
    let sample = [2, 3, 4].map(|seed| oracle::normal(200, D, seed));
    let [q, k, v] = sample.each_ref().map(|x| x.mapv(f64::from));
    let [k, v] = [k, v].map(|x| naive::formats::rounded(&x, format));
    let exact = naive::softmax(&q, &k, &v, 1.0 / (D as f64).sqrt(), Mask::Causal);
    super::check(format.name(), &softmax(format), &exact, &sample);
}

/// Heads of a model, whose caches together do not stay in the caches of a processor.
const HEADS: usize = 12;

/// Steps of so many heads in turn, one in each call.
fn decode_heads<'a>(
    mut stream: Box<dyn Stream<f32>>,
    input: &'a Input<f32>,
    prefill: usize,
) -> impl FnMut() + 'a {
    let mut out = Array2::zeros((prefill, D_V));
    let rows = s![..prefill, ..];
    stream
        .extend(input.q.slice(rows), input.k.slice(rows), input.v.slice(rows), out.view_mut())
        .expect("the input is finite");
    let mut streams: Vec<_> = (0..HEADS).map(|_| stream.clone()).collect();
    drop(stream);
    for stream in &mut streams {
        stream.checkpoint();
    }
    let (mut out, mut t) = (Array2::zeros((1, D_V)), 0);
    move || {
        let stream = &mut streams[t % HEADS];
        let row = s![t..=t, ..];
        stream
            .extend(input.q.slice(row), input.k.slice(row), input.v.slice(row), out.view_mut())
            .expect("the input is finite");
        t += 1;
        if t == 8 * HEADS {
            for stream in &mut streams {
                stream.rollback().expect("there is a checkpoint");
            }
            t = 0;
        }
    }
}

/// A step of a group of three query heads.
fn decode_group<'a>(
    mut stream: Box<dyn Stream<f32>>,
    input: &'a Input<f32>,
    prefill: usize,
) -> impl FnMut() + 'a {
    let group = |n: usize| Array3::from_shape_fn((3, n, D), |(g, t, c)| input.q[[t + 64 * g, c]]);
    let (first, one) = (group(prefill), group(1));
    let mut out = Array3::zeros((3, prefill, D_V));
    let rows = s![..prefill, ..];
    let (k, v) = (input.k.slice(rows), input.v.slice(rows));
    stream
        .extend_heads(&mut [Head::group(first.view(), k, v, out.view_mut())])
        .expect("the input is finite");
    stream.checkpoint();
    let (mut out, mut t) = (Array3::zeros((3, 1, D_V)), 0);
    move || {
        let row = s![t..=t, ..];
        let (k, v) = (input.k.slice(row), input.v.slice(row));
        stream
            .extend_heads(&mut [Head::group(one.view(), k, v, out.view_mut())])
            .expect("the input is finite");
        t += 1;
        if t == 64 {
            stream.rollback().expect("there is a checkpoint");
            t = 0;
        }
    }
}

pub fn formats(rounds: usize, quick: bool, targets: &mut Targets) {
    FORMATS.into_iter().for_each(check);
    let cache = if quick { 2048 } else { 16_384 };
    let input = Input::<f32>::new(cache + 256);
    let ratios = |what: &str, racers: &[Contestant<'_>]| {
        let times = racers.iter().map(Contestant::seconds).collect::<Vec<_>>();
        println!("{what:<42}{:>12}{:>12}", "µs", "f32 is 1");
        for (racer, time) in racers.iter().zip(&times) {
            println!("{:<42}{:>12.1}{:>12.2}", racer.name, time * 1e6, times[0] / time);
        }
        println!();
        [times[0] / times[1], times[0] / times[2]]
    };

    let mut racers = FORMATS.map(|format| {
        let stream = softmax(format).stream(D_V).expect("sizes are positive");
        Contestant::new(format.name(), decode(stream, &input, cache))
    });
    race(&mut racers, rounds);
    ratios(&format!("softmax, decode step, one cache of {cache}"), &racers);

    let mut racers = FORMATS.map(|format| {
        let stream = softmax(format).stream(D_V).expect("sizes are positive");
        Contestant::new(format.name(), decode_heads(stream, &input, cache))
    });
    race(&mut racers, rounds);
    let [_, one] = ratios(&format!("the same, {HEADS} heads in turn"), &racers);

    let mut racers = FORMATS.map(|format| {
        let options = StreamOptions::new(D_V).group(3);
        let stream = softmax(format).stream_with(options).expect("sizes are positive");
        Contestant::new(format.name(), decode_group(stream, &input, cache))
    });
    race(&mut racers, rounds);
    let [_, group] = ratios("the same for a group of 3 query heads", &racers);

    let kernels = FORMATS.map(softmax);
    let n = 2048;
    let mut racers =
        [0, 1, 2].map(|i: usize| Contestant::new(FORMATS[i].name(), input.run(&kernels[i], n)));
    race(&mut racers, rounds);
    let [_, forward] = ratios(&format!("softmax, whole sequence, n = {n}"), &racers);

    let kernels = FORMATS.map(|format| {
        HybridAttention::<f32>::builder(D)
            .far(Far::merged(256))
            .state_format(format)
            .build()
            .expect("the options are valid")
    });
    let mut racers = [0, 1, 2].map(|i: usize| {
        let stream = kernels[i].stream(D_V).expect("sizes are positive");
        Contestant::new(FORMATS[i].name(), decode(stream, &input, 1024))
    });
    race(&mut racers, rounds);
    ratios("hybrid, decode step, 64 + 4 + 256 entries", &racers);

    targets.at_least(
        &format!("softmax decode over {cache}, {HEADS} heads, q8 against f32"),
        one,
        1.5,
        3.0,
    );
    targets.at_least(&format!("softmax decode over {cache}, group of 3"), group, 1.5, 3.0);
    targets.at_least("softmax forward, q8 against f32", forward, 0.7, 0.9);
    println!();
}
