//! The speed targets of the crate, in one run: `cargo bench --bench targets`; with
//! `--features rayon` also those of two threads.
//!
//! d = m = d_v = 64, `f32` and one thread unless said otherwise. Every kernel is compared with its
//! formula first. Then rounds of all contestants of a table are interleaved, so that a slow spell
//! of the machine meets all of them, and medians are reported.
//!
//! The unit is the peak of this run: the best GFLOP/s among matrix products of several sizes, of
//! this crate and of `ndarray`. Name tables to run only these: `forward`, `decode`, `maps`,
//! `crossover`, `decay`, `hybrids`, `layers`, `formats`, `gradients`, `threads`. `--strict` turns a
//! missed target into a failing exit code; `--quick` (or `--test`) runs one short round.

mod decay;
mod formats;
mod gradients;
mod hybrids;
mod layers;
mod oracle;

use dijiang::{
    Attention, DctFeatures, FeatureMap, Head, LinearAttention, Mask, Performer, Scalar, Scratch,
    SoftmaxAttention, Stream,
};
use ndarray::{Array1, Array2, ArrayView1, linalg::general_mat_mul, s};
use std::hint::black_box;
use std::process::ExitCode;
use std::time::{Duration, Instant};

const D: usize = 64;
const M: usize = 64;
const D_V: usize = 64;

/// Floating-point operations of linear attention that any chunked causal kernel does for one token:
/// the map of a query and a key as dense products, the read-out, the state update, and scores and
/// values within a chunk of 64 tokens, of which a token sees 32½ on average. A kernel with other
/// chunks or a fast transform is measured by the same count.
fn linear_flops() -> f64 {
    let (d, m, d_v) = (D as f64, M as f64, D_V as f64);
    4.0 * d * m + 4.0 * m * d_v + 32.5 * (2.0 * m + 2.0 * d_v)
}

/// Those of causal softmax attention for one token of `n`, exponentials not counted.
fn softmax_flops(n: usize) -> f64 {
    2.0 * (D + D_V) as f64 * (n + 1) as f64 / 2.0
}

/// Something to time: what one call does, and how often a round calls it.
struct Contestant<'a> {
    name: String,
    calls: u32,
    run: Box<dyn FnMut() + 'a>,
    rounds: Vec<Duration>,
}

impl<'a> Contestant<'a> {
    fn new(name: impl Into<String>, run: impl FnMut() + 'a) -> Self {
        Self { name: name.into(), calls: 1, run: Box::new(run), rounds: Vec::new() }
    }

    /// Seconds of one call: the median over rounds.
    fn seconds(&self) -> f64 {
        let mut rounds = self.rounds.clone();
        rounds.sort();
        rounds[rounds.len() / 2].as_secs_f64()
    }
}

/// Interleaved rounds of some milliseconds for each contestant.
fn race(contestants: &mut [Contestant<'_>], rounds: usize) {
    race_for(0.004, contestants, rounds);
}

/// Interleaved rounds of so many seconds for each contestant, each after one untimed call.
fn race_for(seconds: f64, contestants: &mut [Contestant<'_>], rounds: usize) {
    for contestant in contestants.iter_mut() {
        (contestant.run)(); // caches, clocks
        let start = Instant::now();
        (contestant.run)();
        contestant.calls = (seconds / start.elapsed().as_secs_f64()).ceil().clamp(1.0, 1e5) as u32;
    }
    for _ in 0..rounds {
        for contestant in contestants.iter_mut() {
            (contestant.run)();
            let start = Instant::now();
            for _ in 0..contestant.calls {
                (contestant.run)();
            }
            contestant.rounds.push(start.elapsed() / contestant.calls);
        }
    }
}

/// The verdict, line by line.
struct Targets {
    passed: bool,
}

impl Targets {
    fn at_least(&mut self, what: &str, found: f64, needed: f64, aim: f64) {
        let verdict = match found {
            f if f >= aim => "PASS, aim met",
            f if f >= needed => "PASS",
            _ => "FAIL",
        };
        self.passed &= found >= needed;
        println!("  {verdict:<14} {what}: {found:.2} (at least {needed}, aim {aim})");
    }

    fn at_most(&mut self, what: &str, found: f64, allowed: f64) {
        self.passed &= found <= allowed;
        println!(
            "  {:<14} {what}: {found:.2} (at most {allowed})",
            if found <= allowed { "PASS" } else { "FAIL" }
        );
    }
}

struct Input<T> {
    q: Array2<T>,
    k: Array2<T>,
    v: Array2<T>,
}

impl<T: Scalar> Input<T> {
    fn new(n: usize) -> Self {
        let [q, k, v] =
            [5, 6, 7].map(|seed| oracle::normal(n, D, seed).mapv(|x| T::from_f64(f64::from(x))));
        Self { q, k, v }
    }

    fn run<'a>(&'a self, kernel: &'a dyn Attention<T>, n: usize) -> impl FnMut() + 'a {
        let mut out = Array2::<T>::zeros((n, D_V));
        let mut scratch = Scratch::new();
        move || {
            let rows = s![..n, ..];
            let (q, k, v) = (self.q.slice(rows), self.k.slice(rows), self.v.slice(rows));
            kernel
                .forward_heads(
                    &mut [Head::new(black_box(q), k, v, out.view_mut())],
                    Mask::Causal,
                    &mut scratch,
                )
                .expect("the input is finite");
        }
    }
}

/// The same decode step through `ndarray`'s `dot` and `std`'s `exp`: what a user would write
/// without this crate.
struct PlainDecode {
    omega: Array2<f32>,
    sums: Array2<f32>,
    normalizer: Array1<f32>,
    log_scale: f32,
}

impl PlainDecode {
    fn new(omega: Array2<f32>) -> Self {
        let m = omega.nrows();
        Self {
            omega,
            sums: Array2::zeros((m, D_V)),
            normalizer: Array1::zeros(m),
            log_scale: f32::NEG_INFINITY,
        }
    }

    fn features(&self, x: ArrayView1<f32>) -> (Array1<f32>, f32) {
        let x = &x * (D as f32).powf(-0.25);
        let logits = self.omega.dot(&x);
        let largest = logits.fold(f32::NEG_INFINITY, |m, &l| m.max(l));
        (logits.mapv(|l| (l - largest).exp()), largest - 0.5 * x.dot(&x))
    }

    fn step(&mut self, q: ArrayView1<f32>, k: ArrayView1<f32>, v: ArrayView1<f32>) -> Array1<f32> {
        let (query, _) = self.features(q);
        let (key, scale) = self.features(k);
        let new = self.log_scale.max(scale);
        let (old, own) = ((self.log_scale - new).exp(), (scale - new).exp());
        let (key_column, v) =
            (key.view().insert_axis(ndarray::Axis(1)), v.insert_axis(ndarray::Axis(0)));
        general_mat_mul(own, &key_column, &v, old, &mut self.sums);
        self.normalizer = &self.normalizer * old + &key * own;
        self.log_scale = new;
        query.dot(&self.sums) / query.dot(&self.normalizer)
    }
}

/// Refuses to go on if a kernel does not compute its formula, at once and token by token.
fn check(
    name: &str,
    kernel: &dyn Attention<f32>,
    expected: &Array2<f64>,
    [q, k, v]: &[Array2<f32>; 3],
) {
    let found =
        kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).expect("the input is finite");
    oracle::assert_close(name, found.view(), expected, oracle::TOLERANCE);
    let mut stream = kernel.stream(D_V).expect("sizes are positive");
    let mut found = Array2::zeros(found.dim());
    for t in 0..q.nrows() {
        let row = s![t..=t, ..];
        stream
            .extend(q.slice(row), k.slice(row), v.slice(row), found.slice_mut(row))
            .expect("the input is finite");
    }
    oracle::assert_close(name, found.view(), expected, oracle::TOLERANCE);
}

fn decode<'a>(
    mut stream: Box<dyn Stream<f32>>,
    input: &'a Input<f32>,
    prefill: usize,
) -> impl FnMut() + 'a {
    let mut out = Array2::zeros((input.q.nrows(), D_V));
    let rows = s![..prefill, ..];
    stream
        .extend(input.q.slice(rows), input.k.slice(rows), input.v.slice(rows), out.slice_mut(rows))
        .expect("the input is finite");
    stream.checkpoint();
    let mut t = 0;
    move || {
        let row = s![t..=t, ..];
        let out = out.slice_mut(row);
        stream
            .extend(input.q.slice(row), input.k.slice(row), input.v.slice(row), out)
            .expect("the input is finite");
        t += 1;
        if t == 64 {
            // the cache of a softmax stays near its length
            stream.rollback().expect("there is a checkpoint");
            t = 0;
        }
    }
}

fn main() -> ExitCode {
    let has = |name: &str| std::env::args().any(|argument| argument == name);
    let quick = has("--quick") || has("--test");
    let rounds = if quick { 1 } else { 15 };
    #[cfg(feature = "rayon")]
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().expect("the first pool");

    let performer_map = Performer::<f32>::new(D, M, 1).expect("sizes are positive");
    let dct_map = DctFeatures::<f32>::new(D, M, 1).expect("sizes are positive");
    let (omega, dct_omega) = (performer_map.projection().to_owned(), dct_map.projection());
    let performer = LinearAttention::new(performer_map);
    let dct = LinearAttention::new(dct_map);
    let softmax = SoftmaxAttention::<f32>::new(D).expect("sizes are positive");
    let performer_f64 =
        LinearAttention::new(Performer::<f64>::new(D, M, 1).expect("sizes are positive"));

    // 200 tokens: three whole chunks and a piece
    let sample = [2, 3, 4].map(|seed| oracle::normal(200, D, seed));
    let [q, k, v] = sample.each_ref().map(|x| x.view());
    let exact_linear = oracle::linear(omega.view(), q, k, v, Mask::Causal);
    check("Performer", &performer, &exact_linear, &sample);
    check("DctFeatures", &dct, &oracle::linear(dct_omega.view(), q, k, v, Mask::Causal), &sample);
    check("softmax", &softmax, &oracle::softmax(q, k, v, Mask::Causal), &sample);
    let mut plain = PlainDecode::new(omega.clone());
    for t in 0..200 {
        let found = plain.step(q.row(t), k.row(t), v.row(t)).insert_axis(ndarray::Axis(0));
        oracle::assert_close(
            "plain decode",
            found.view(),
            &exact_linear.slice(s![t..=t, ..]).to_owned(),
            oracle::TOLERANCE,
        );
    }
    println!(
        "d = m = d_v = 64, f32, one thread unless said otherwise, medians of {rounds} interleaved \
         rounds\n"
    );
    let mut targets = Targets { passed: true };

    let longest = if quick { 2048 } else { 8192 };
    let input = Input::<f32>::new(longest);
    let tables = ["forward", "decode", "maps", "crossover", "decay", "hybrids", "layers"];
    let named = tables.into_iter().chain(["formats", "gradients", "threads"]).any(has);
    let wanted = |table: &str| !named || has(table);
    if wanted("forward") {
        whole_sequences(
            &input,
            [&performer, &dct, &softmax],
            &performer_f64,
            rounds,
            quick,
            &mut targets,
        );
    }
    if wanted("decode") {
        decode_steps(&input, &performer, &dct, &softmax, plain, rounds, &mut targets);
    }
    if wanted("maps") {
        maps(rounds, &mut targets);
    }
    if wanted("crossover") {
        crossover(&input, [&performer, &dct, &softmax], rounds, &mut targets);
    }
    if wanted("decay") {
        decay::decay(rounds, quick, &mut targets);
    }
    if wanted("hybrids") {
        hybrids::hybrids(rounds, quick, &mut targets);
        hybrids::many_entries(rounds, quick, &mut targets);
    }
    if wanted("layers") {
        layers::layers(rounds, &mut targets);
    }
    if wanted("formats") {
        formats::formats(rounds, quick, &mut targets);
    }
    if wanted("gradients") {
        gradients::gradients(rounds, quick, &mut targets);
    }
    #[cfg(feature = "rayon")]
    if wanted("threads") {
        threads(&performer, rounds, quick, &mut targets);
    }
    if quick {
        println!("(one short round: the figures above mean little)");
    }
    if targets.passed || !has("--strict") { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Causal forward passes, as a share of the peak.
fn whole_sequences(
    input: &Input<f32>,
    [performer, dct, softmax]: [&dyn Attention<f32>; 3],
    performer_f64: &dyn Attention<f64>,
    rounds: usize,
    quick: bool,
    targets: &mut Targets,
) {
    let n = 2048;
    let long = input.q.nrows();
    let input_f64 = Input::<f64>::new(n);
    let mut contestants: Vec<(Contestant, f64)> = Vec::new();
    // candidates for the peak
    for size in [64, 128, 512] {
        let [a, b] = [8, 9].map(|seed| oracle::normal(size, size, seed));
        let mut c = Array2::zeros((size, size));
        let run = move || general_mat_mul(1.0, black_box(&a), &b, 0.0, &mut c);
        contestants.push((
            Contestant::new(format!("ndarray dot, {size}³"), run),
            2.0 * (size * size * size) as f64,
        ));
    }
    for [m, n, k] in [[64, 64, 64], [128, 64, 64], [512, 64, 64], [64, 64, 256]] {
        let mut product = dijiang::bench::Product::new(m, n, k);
        let run = move || product.run();
        contestants.push((
            Contestant::new(format!("product, {m}×{n}×{k}"), run),
            2.0 * (m * n * k) as f64,
        ));
    }
    let peaks = contestants.len();
    contestants.push((
        Contestant::new(format!("Performer, n = {n}"), input.run(performer, n)),
        n as f64 * linear_flops(),
    ));
    contestants.push((
        Contestant::new(format!("DctFeatures, n = {n}"), input.run(dct, n)),
        n as f64 * linear_flops(),
    ));
    contestants.push((
        Contestant::new(format!("softmax, n = {n}"), input.run(softmax, n)),
        n as f64 * softmax_flops(n),
    ));
    contestants.push((
        Contestant::new(format!("Performer f64, n = {n}"), input_f64.run(performer_f64, n)),
        n as f64 * linear_flops(),
    ));
    contestants.push((
        Contestant::new(format!("Performer, n = {long}"), input.run(performer, long)),
        long as f64 * linear_flops(),
    ));
    contestants.push((
        Contestant::new(format!("DctFeatures, n = {long}"), input.run(dct, long)),
        long as f64 * linear_flops(),
    ));
    contestants.push((
        Contestant::new(format!("softmax, n = {long}"), input.run(softmax, long)),
        long as f64 * softmax_flops(long),
    ));
    let (mut racers, flops): (Vec<Contestant>, Vec<f64>) = contestants.into_iter().unzip();
    race_for(if quick { 0.004 } else { 0.03 }, &mut racers, if quick { 1 } else { rounds });
    let gflops: Vec<f64> =
        racers.iter().zip(&flops).map(|(racer, flops)| flops / racer.seconds() / 1e9).collect();
    let peak = gflops[..peaks].iter().copied().fold(0.0, f64::max);
    println!(
        "{:<30}{:>12}{:>12}{:>10}{:>12}",
        "causal forward", "ms", "tokens/s", "GFLOP/s", "% of peak"
    );
    for (i, racer) in racers.iter().enumerate() {
        let tokens = if i < peaks {
            String::new()
        } else {
            let n = if i < peaks + 4 { n } else { long };
            format!("{:.0}", n as f64 / racer.seconds())
        };
        let (ms, share) = (racer.seconds() * 1e3, 100.0 * gflops[i] / peak);
        println!("{:<30}{ms:>12.4}{tokens:>12}{:>10.1}{share:>12.1}", racer.name, gflops[i]);
    }
    println!();
    targets.at_least("Performer, n = 2048, share of the peak", gflops[peaks] / peak, 0.70, 0.85);
    targets.at_least(
        "DctFeatures, n = 2048, share of the peak",
        gflops[peaks + 1] / peak,
        0.70,
        0.85,
    );
    targets.at_least(
        "f64 against f32, Performer, n = 2048",
        racers[peaks].seconds() / racers[peaks + 3].seconds(),
        0.45,
        0.5,
    );
    let speedup = racers[peaks + 6].seconds() / racers[peaks + 4].seconds();
    println!(
        "  {:<14} Performer is {speedup:.1} times as fast as exact softmax at n = {long}\n",
        ""
    );
}

/// One token at a time.
fn decode_steps(
    input: &Input<f32>,
    performer: &dyn Attention<f32>,
    dct: &dyn Attention<f32>,
    softmax: &dyn Attention<f32>,
    mut plain: PlainDecode,
    rounds: usize,
    targets: &mut Targets,
) {
    let stream = |kernel: &dyn Attention<f32>| kernel.stream(D_V).expect("sizes are positive");
    let cache = input.q.nrows().min(4096);
    let mut t = 0;
    let plain_step = || {
        black_box(plain.step(input.q.row(t), input.k.row(t), input.v.row(t)));
        t = (t + 1) % 64;
    };
    let mut racers = [
        Contestant::new("Performer", decode(stream(performer), input, 64)),
        Contestant::new("DctFeatures", decode(stream(dct), input, 64)),
        Contestant::new("Performer by ndarray dot", plain_step),
        Contestant::new(
            format!("softmax, cache of {cache}"),
            decode(stream(softmax), input, cache),
        ),
    ];
    race(&mut racers, rounds);
    println!("{:<30}{:>12}{:>12}", "decode step", "ns", "ratio");
    for racer in &racers {
        println!(
            "{:<30}{:>12.0}{:>12.2}",
            racer.name,
            racer.seconds() * 1e9,
            racer.seconds() / racers[0].seconds()
        );
    }
    println!();
    let ratio = racers[2].seconds() / racers[0].seconds();
    targets.at_least(
        "decode step against the same through ndarray dot and std exp",
        ratio,
        10.0,
        13.0,
    );
    println!();
}

/// Fast transforms against the dense product of the same features, both of this crate.
fn maps(rounds: usize, targets: &mut Targets) {
    println!("{:<30}{:>12}{:>12}{:>12}", "map, 512 tokens, m = d", "DCT ns/row", "dense", "ratio");
    let mut ratios = Vec::new();
    for d in [64, 128, 256, 512] {
        let dct = DctFeatures::<f32>::new(d, d, 1).expect("sizes are positive");
        let dense = Performer::from_projection(dct.projection()).expect("the projection is finite");
        let x = oracle::normal(512, d, 5).mapv(|x| 0.3 * x);
        let mapped = |map: &dyn FeatureMap<f32>| {
            let (mut values, mut scale) = (Array2::<f32>::zeros((512, d)), Array1::zeros(512));
            map.map_queries(x.view(), values.view_mut(), scale.view_mut())
                .expect("the input is finite");
            values
        };
        // exponents of some dozens, rounded in `f32`
        oracle::assert_close(
            "DCT map",
            mapped(&dct).view(),
            &mapped(&dense).mapv(f64::from),
            10.0 * oracle::TOLERANCE,
        );
        let run = |map: Box<dyn FeatureMap<f32>>| {
            let mut chunk = dijiang::bench::Map::new(map, x.view());
            move || assert!(chunk.run(), "the input is in range")
        };
        let mut racers = [
            Contestant::new(format!("d = {d}"), run(Box::new(dct.clone()))),
            Contestant::new("dense", run(Box::new(dense))),
        ];
        race(&mut racers, rounds);
        let [fast, dense] = [0, 1].map(|i: usize| racers[i].seconds() / 512.0 * 1e9);
        println!("{:<30}{fast:>12.0}{dense:>12.0}{:>12.2}", racers[0].name, dense / fast);
        ratios.push(dense / fast);
    }
    println!();
    targets.at_least("DCT map against dense map, d = 128", ratios[1], 1.5, 2.0);
    targets.at_least("DCT map against dense map, d = 256", ratios[2], 2.0, 3.0);
    println!();
}

/// The length from which linear attention is faster than exact softmax.
fn crossover(
    input: &Input<f32>,
    [performer, dct, softmax]: [&dyn Attention<f32>; 3],
    rounds: usize,
    targets: &mut Targets,
) {
    println!("{:<30}{:>12}{:>12}{:>12}", "causal, ns/token", "Performer", "DctFeatures", "softmax");
    let mut first = [usize::MAX; 2];
    for n in [32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 512] {
        let mut racers =
            [performer, dct, softmax].map(|kernel| Contestant::new("", input.run(kernel, n)));
        race(&mut racers, rounds);
        let ns = racers.each_ref().map(|racer| racer.seconds() / n as f64 * 1e9);
        println!("{:<30}{:>12.0}{:>12.0}{:>12.0}", format!("n = {n}"), ns[0], ns[1], ns[2]);
        for i in 0..2 {
            if ns[i] > ns[2] {
                first[i] = usize::MAX;
            } else if first[i] == usize::MAX {
                first[i] = n;
            }
        }
    }
    println!();
    for (name, n) in ["Performer", "DctFeatures"].into_iter().zip(first) {
        println!(
            "  {:<14} {name} is faster than exact softmax from n = {n} on",
            if n <= 192 { "PASS" } else { "FAIL" }
        );
        targets.passed &= n <= 192;
    }
    println!();
}

/// Two threads against one.
#[cfg(feature = "rayon")]
fn threads(
    performer: &LinearAttention<Performer<f32>>,
    rounds: usize,
    quick: bool,
    targets: &mut Targets,
) {
    use dijiang::MultiHead;
    use ndarray::Array4;
    let pools =
        [1, 2].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("threads"));
    let n = if quick { 4096 } else { 65_536 };
    let long = Input::<f32>::new(n);
    let heads =
        Array4::from_shape_fn((1, 8, 2048, D), |(_, h, t, i)| long.q[[(h * 311 + t) % n, i]]);
    let layer = MultiHead::new(performer.clone(), 8, 8).expect("eight heads");
    let decaying = performer.clone().with_decay(1.0 - 1.0 / 32.0);
    let mut racers = Vec::new();
    for pool in &pools {
        let mut out = Array4::zeros((1, 8, 2048, D_V));
        let (heads, layer) = (&heads, &layer);
        racers.push(Contestant::new("8 heads", move || {
            let x = heads.view();
            pool.install(|| layer.forward_into(x, x, x, Mask::Causal, None, out.view_mut()))
                .expect("finite");
        }));
    }
    for (name, kernel) in [("one head", performer), ("one head that decays", &decaying)] {
        for pool in &pools {
            let (long, mut out, mut scratch) = (&long, Array2::zeros((n, D_V)), Scratch::new());
            racers.push(Contestant::new(name, move || {
                let (q, k, v) = (long.q.view(), long.k.view(), long.v.view());
                pool.install(|| {
                    let heads = &mut [Head::new(q, k, v, out.view_mut())];
                    kernel.forward_heads(heads, Mask::Causal, &mut scratch)
                })
                .expect("finite");
            }));
        }
    }
    // a core that has slept needs some milliseconds to come back, on virtual machines above all:
    // rounds are longer here
    race_for(if quick { 0.004 } else { 0.6 }, &mut racers, rounds.min(5));
    println!("{:<30}{:>12}{:>12}{:>12}", "threads, ms", "one", "two", "ratio");
    let mut ratios = Vec::new();
    for pair in racers.chunks(2) {
        let [one, two] = [0, 1].map(|i: usize| pair[i].seconds() * 1e3);
        println!("{:<30}{one:>12.3}{two:>12.3}{:>12.2}", pair[0].name, one / two);
        ratios.push(one / two);
    }
    println!();
    targets.at_least("two threads, 8 heads of 2048 tokens", ratios[0], 1.8, 1.95);
    targets.at_least(&format!("two threads, one head of {n} tokens"), ratios[1], 1.7, 1.9);
    println!();
}
