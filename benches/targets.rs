//! The speed targets of the crate, in one run: `cargo bench --bench targets`.
//!
//! One thread, `f32`, 8192 tokens, d = m = d_v = 64. Rounds of the four contestants are interleaved, so that a slow spell
//! of the machine meets all of them, and medians are reported. The unit of comparison is what `ndarray`'s `dot` reaches
//! on 512 × 512 × 512 in the same run. `--strict` turns a missed target into a failing exit code; `--quick` (or
//! `--test`) runs one short round.

mod oracle;

use dijiang::{Attention, DctFeatures, LinearAttention, Mask, Performer, SoftmaxAttention};
use ndarray::{Array2, linalg::general_mat_mul};
use std::hint::black_box;
use std::process::ExitCode;
use std::time::{Duration, Instant};

const D: usize = 64;
const M: usize = 64;
const D_V: usize = 64;
const DOT: usize = 512;

/// Targets.
const SHARE_OF_DOT: f64 = 0.35;
const SPEEDUP: f64 = 8.0;

/// Floating-point operations of linear attention that any chunked causal kernel does for one token: the map of a query
/// and a key as dense products, the read-out, the state update, and scores and values within a chunk of 64 tokens, of which
/// a token sees 32½ on average. A kernel with other chunks or a fast transform is measured by the same count.
fn linear_flops() -> f64 {
    let (d, m, d_v) = (D as f64, M as f64, D_V as f64);
    4.0 * d * m + 4.0 * m * d_v + 32.5 * (2.0 * m + 2.0 * d_v)
}

/// Those of causal softmax attention for one token of `n`, exponentials not counted.
fn softmax_flops(n: usize) -> f64 {
    2.0 * (D + D_V) as f64 * (n + 1) as f64 / 2.0
}

/// Something to time: what one call does, how often a round calls it, and how many operations a call counts.
struct Contestant<'a> {
    name: &'a str,
    flops: f64,
    calls: u32,
    run: Box<dyn FnMut() + 'a>,
    rounds: Vec<Duration>,
}

impl Contestant<'_> {
    fn round(&mut self) {
        let start = Instant::now();
        for _ in 0..self.calls {
            (self.run)();
        }
        self.rounds.push(start.elapsed() / self.calls);
    }

    /// Seconds of one call: the median over rounds.
    fn seconds(&self) -> f64 {
        let mut rounds = self.rounds.clone();
        rounds.sort();
        rounds[rounds.len() / 2].as_secs_f64()
    }

    fn gflops(&self) -> f64 {
        self.flops / self.seconds() / 1e9
    }
}

fn main() -> ExitCode {
    let has = |name: &str| std::env::args().any(|argument| argument == name);
    let quick = has("--quick") || has("--test");
    let (n, rounds) = if quick { (1024, 1) } else { (8192, 15) };

    let performer_map = Performer::<f32>::new(D, M, 1).expect("sizes are positive");
    let dct_map = DctFeatures::<f32>::new(D, M, 1).expect("sizes are positive");
    let (omega, dct_omega) = (performer_map.projection().to_owned(), dct_map.projection());
    let performer = LinearAttention::new(performer_map);
    let dct = LinearAttention::new(dct_map);
    let softmax = SoftmaxAttention::<f32>::new(D).expect("sizes are positive");

    // 200 tokens: three whole chunks and a piece
    let [q, k, v] = [2, 3, 4].map(|seed| oracle::normal(200, D, seed));
    let (q, k, v) = (q.view(), k.view(), v.view());
    let check = |name, kernel: &dyn Attention<f32>, expected| {
        let found = kernel.forward(q, k, v, Mask::Causal).expect("the input is finite");
        oracle::assert_close(name, found.view(), &expected, oracle::TOLERANCE);
    };
    check("Performer", &performer, oracle::linear(omega.view(), q, k, v, Mask::Causal));
    check("DctFeatures", &dct, oracle::linear(dct_omega.view(), q, k, v, Mask::Causal));
    check("softmax", &softmax, oracle::softmax(q, k, v, Mask::Causal));

    let [q, k, v] = [5, 6, 7].map(|seed| oracle::normal(n, D, seed));
    let forward = |kernel: &'static str, attention: &dyn Attention<f32>, out: &mut Array2<f32>| {
        attention
            .forward_into(black_box(q.view()), k.view(), v.view(), Mask::Causal, out.view_mut())
            .unwrap_or_else(|error| panic!("{kernel}: {error}"));
    };
    let outs = || Array2::<f32>::zeros((n, D_V));
    let (mut out_performer, mut out_dct, mut out_softmax) = (outs(), outs(), outs());
    let [a, b] = [8, 9].map(|seed| oracle::normal(DOT, DOT, seed));
    let mut c = Array2::zeros((DOT, DOT));
    let linear_flops = n as f64 * linear_flops();
    let mut contestants = [
        Contestant {
            name: "ndarray dot, 512 x 512 x 512",
            flops: 2.0 * (DOT * DOT * DOT) as f64,
            calls: 10,
            run: Box::new(|| general_mat_mul(1.0, black_box(&a), &b, 0.0, &mut c)),
            rounds: Vec::new(),
        },
        Contestant {
            name: "linear, Performer",
            flops: linear_flops,
            calls: 4,
            run: Box::new(|| forward("Performer", &performer, &mut out_performer)),
            rounds: Vec::new(),
        },
        Contestant {
            name: "linear, DctFeatures",
            flops: linear_flops,
            calls: 4,
            run: Box::new(|| forward("DctFeatures", &dct, &mut out_dct)),
            rounds: Vec::new(),
        },
        Contestant {
            name: "softmax",
            flops: n as f64 * softmax_flops(n),
            calls: 1,
            run: Box::new(|| forward("softmax", &softmax, &mut out_softmax)),
            rounds: Vec::new(),
        },
    ];
    contestants.iter_mut().for_each(|contestant| (contestant.run)()); // caches, clocks
    for _ in 0..rounds {
        contestants.iter_mut().for_each(Contestant::round);
    }

    let [dot, kernels @ ..] = &contestants;
    let [performer, dct, softmax] = kernels;
    println!("causal, f32, n = {n}, d = m = d_v = 64, one thread, median of {rounds} interleaved rounds\n");
    println!("{:<30}{:>10}{:>12}{:>10}{:>12}", "", "ms", "tokens/s", "GFLOP/s", "% of dot");
    println!("{:<30}{:>10.3}{:>12}{:>10.1}{:>12.0}", dot.name, dot.seconds() * 1e3, "", dot.gflops(), 100.0);
    for kernel in kernels {
        let share = 100.0 * kernel.gflops() / dot.gflops();
        let tokens = n as f64 / kernel.seconds();
        println!(
            "{:<30}{:>10.3}{tokens:>12.0}{:>10.1}{share:>12.1}",
            kernel.name,
            kernel.seconds() * 1e3,
            kernel.gflops()
        );
    }
    println!();

    let mut passed = true;
    let mut target = |what: String, found: f64, needed: f64| {
        let verdict = if found >= needed { "PASS" } else { "FAIL" };
        passed &= found >= needed;
        println!("{verdict}  {what}: {found:.2}, target {needed}");
    };
    for linear in [performer, dct] {
        target(format!("{}: times faster than softmax", linear.name), softmax.seconds() / linear.seconds(), SPEEDUP);
    }
    for kernel in kernels {
        target(format!("{}: share of dot's GFLOP/s", kernel.name), kernel.gflops() / dot.gflops(), SHARE_OF_DOT);
    }
    if quick {
        println!("(one short round: the figures above mean little)");
    }
    if passed || !has("--strict") { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
