//! Hybrids against exact softmax: decode steps and whole sequences from 1 k to 64 k tokens.

use super::{Contestant, D, D_V, Input, Targets, decode, oracle, race_for};
use dijiang::{
    Attention, Far, HybridAttention, Mask, Merged, Performer, Scalar, SoftmaxAttention, Stream,
};
use ndarray::{Array2, s};

/// A window of 64 tokens and 4 sinks.
fn hybrid<T: Scalar>(far: impl Into<Far<T>>) -> HybridAttention<T> {
    HybridAttention::builder(D).window(64).sinks(4).far(far).build().expect("the options are valid")
}

/// Refuses to go on unless a hybrid is softmax attention while nothing has left its window, the
/// same in `f64` afterwards, and the same bits token by token.
fn check(name: &str, kernel: &HybridAttention<f32>, wide: &HybridAttention<f64>) {
    let [q, k, v] = [2, 3, 4].map(|seed| oracle::normal(200, D, seed));
    let exact = oracle::softmax(q.view(), k.view(), v.view(), Mask::Causal);
    let found =
        kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).expect("the input is finite");
    let first = s![..68, ..];
    oracle::assert_close(
        name,
        found.slice(first),
        &exact.slice(first).to_owned(),
        oracle::TOLERANCE,
    );
    let [wide_q, wide_k, wide_v] = [&q, &k, &v].map(|x| x.mapv(f64::from));
    let exact = wide
        .forward(wide_q.view(), wide_k.view(), wide_v.view(), Mask::Causal)
        .expect("the input is finite");
    oracle::assert_close(name, found.view(), &exact, oracle::TOLERANCE);
    let mut stream = kernel.stream(D_V).expect("sizes are positive");
    let mut steps = Array2::zeros(found.dim());
    for t in 0..q.nrows() {
        let row = s![t..=t, ..];
        stream
            .extend(q.slice(row), k.slice(row), v.slice(row), steps.slice_mut(row))
            .expect("the input is finite");
    }
    assert!(found == steps || name == "features", "{name}: token by token");
}

/// A stream that has read some tokens and goes on for ever, over all of them.
fn endless<'a>(
    mut stream: Box<dyn Stream<f32>>,
    input: &'a Input<f32>,
    read: usize,
) -> impl FnMut() + 'a {
    let mut out = Array2::zeros((1, D_V));
    let tokens = input.q.nrows();
    let mut all = Array2::zeros((read, D_V));
    let view = |x: &'a Array2<f32>| x.slice(s![..read, ..]);
    stream
        .extend(view(&input.q), view(&input.k), view(&input.v), all.view_mut())
        .expect("the input is finite");
    let mut t = 0;
    move || {
        let row = s![t..=t, ..];
        stream
            .extend(input.q.slice(row), input.k.slice(row), input.v.slice(row), out.view_mut())
            .expect("the input is finite");
        t = (t + 1) % tokens;
    }
}

pub fn hybrids(rounds: usize, quick: bool, targets: &mut Targets) {
    let kernels = [
        ("window alone", hybrid(Far::none()), hybrid(Far::none())),
        ("merged", hybrid(Far::merged(64)), hybrid(Far::merged(64))),
        ("merged, blocks of 8", hybrid(Merged::new(64).block(8)), hybrid(Merged::new(64).block(8))),
        ("ward", hybrid(Far::ward(64)), hybrid(Far::ward(64))),
        (
            "features",
            hybrid(Far::features(Performer::new(D, 64, 1).expect("sizes are positive"))),
            hybrid(Far::features(Performer::new(D, 64, 1).expect("sizes are positive"))),
        ),
    ];
    for (name, kernel, wide) in &kernels {
        check(name, kernel, wide);
    }
    let softmax = SoftmaxAttention::<f32>::new(D).expect("sizes are positive");
    let lengths: &[usize] = if quick { &[1024, 2048] } else { &[1024, 2048, 4096, 16_384, 65_536] };
    let input = Input::<f32>::new(lengths[lengths.len() - 1]);

    let mut racers: Vec<Contestant> = Vec::new();
    for &n in lengths {
        let stream = softmax.stream(D_V).expect("sizes are positive");
        racers.push(Contestant::new(format!("softmax, cache of {n}"), decode(stream, &input, n)));
    }
    for (name, kernel, _) in &kernels {
        let stream = kernel.stream(D_V).expect("sizes are positive");
        racers.push(Contestant::new(
            format!("{name}, {} floats", stream.state_floats()),
            endless(stream, &input, 1024),
        ));
    }
    race_for(if quick { 0.004 } else { 0.02 }, &mut racers, rounds);
    let softmax_4k = racers[if quick { 1 } else { 2 }].seconds();
    let header = ["decode step", "µs", "softmax at 4096 / it"];
    println!("{:<36}{:>12}{:>24}", header[0], header[1], header[2]);
    for racer in &racers {
        println!(
            "{:<36}{:>12.2}{:>24.1}",
            racer.name,
            racer.seconds() * 1e6,
            softmax_4k / racer.seconds()
        );
    }
    println!();
    let merged = lengths.len() + 1;
    if !quick {
        targets.at_least(
            "softmax decode at 4096 against merged(64)",
            softmax_4k / racers[merged].seconds(),
            3.0,
            10.0,
        );
        println!();
    }

    let titles =
        ["causal, µs/token", "softmax", "window", "merged", "blocks of 8", "ward", "features"];
    println!(
        "{:<20}{}",
        titles[0],
        titles[1..].iter().map(|title| format!("{title:>13}")).collect::<String>()
    );
    let mut first = [usize::MAX; 2];
    let between: &[usize] = if quick {
        lengths
    } else {
        &[1024, 1536, 2048, 2560, 3072, 3584, 4096, 8192, 16_384, 65_536]
    };
    for &n in between {
        let mut racers = vec![Contestant::new("softmax", input.run(&softmax, n))];
        for (name, kernel, _) in &kernels {
            racers.push(Contestant::new(*name, input.run(kernel, n)));
        }
        race_for(0.01, &mut racers, if n > 8192 { rounds.min(3) } else { rounds });
        let times: Vec<f64> = racers.iter().map(|racer| racer.seconds() / n as f64 * 1e6).collect();
        println!(
            "{:<20}{}",
            format!("n = {n}"),
            times.iter().map(|us| format!("{us:>13.2}")).collect::<String>()
        );
        for (first, column) in first.iter_mut().zip([3, 4]) {
            match times[column - 1] {
                us if us > times[0] => *first = usize::MAX,
                _ if *first == usize::MAX => *first = n,
                _ => {}
            }
        }
    }
    println!();
    for (name, n) in ["merged", "merged, blocks of 8"].into_iter().zip(first) {
        let passed = n <= 4096;
        if !quick {
            println!(
                "  {:<14} {name} is faster than exact softmax from n = {n} on",
                if passed { "PASS" } else { "FAIL" }
            );
            targets.passed &= passed;
        }
    }
    println!();
}

/// Steps of memories of many entries, which are full: of what one step costs, most is the read.
pub fn many_entries(rounds: usize, quick: bool, targets: &mut Targets) {
    let sizes: &[usize] = if quick { &[64, 256] } else { &[64, 256, 1024, 4096] };
    let largest = sizes[sizes.len() - 1];
    let input = Input::<f32>::new(largest + 2048);
    let mut racers: Vec<Contestant> = Vec::new();
    for &entries in sizes {
        let window = HybridAttention::builder(D).window(64 + entries).sinks(4).far(Far::none());
        let window = window.build().expect("the options are valid");
        for (name, kernel) in [("merged", hybrid(Far::merged(entries))), ("window", window)] {
            let stream = kernel.stream(D_V).expect("sizes are positive");
            let stream = endless(stream, &input, input.q.nrows());
            racers.push(Contestant::new(format!("{name}, {entries}"), stream));
        }
    }
    race_for(if quick { 0.004 } else { 0.02 }, &mut racers, rounds);
    println!("{:<36}{:>12}{:>24}", "decode step", "µs", "a window as large");
    for pair in racers.chunks(2) {
        let [us, window] = [0, 1].map(|i| pair[i].seconds() * 1e6);
        println!("{:<36}{us:>12.2}{:>24.2}", pair[0].name, window / us);
    }
    println!();
    if !quick {
        let us = racers[4].seconds() * 1e6;
        targets.at_most("µs of a step of a merged memory with 1024 entries, one head", us, 25.0);
        println!();
    }
}
