//! Backward passes against the forward pass of the same kernel.

use super::{Contestant, D, D_V, Input, M, Targets, linear_flops, oracle, race_for, softmax_flops};
use dijiang::attention::naive::gradient::softmax_gradient;
use dijiang::attention::naive::options::Options;
use dijiang::bench::Product;
use dijiang::{
    Attention, Far, ForwardRecord, Head, HeadGradient, HybridAttention, LinearAttention, Mask,
    Performer, Scratch, SoftmaxAttention, SumCheckpoints,
};
use ndarray::{Array2, Array3, ArrayView2, Axis};
use std::hint::black_box;

/// How far `f32` may be from the formula, relative to the largest element: gradients by queries
/// and keys are sums of differences.
const TOLERANCE: f64 = 3e-5;

/// One head with all that its passes read and write.
struct Passes<'a> {
    input: [ArrayView2<'a, f32>; 3],
    d_out: ArrayView2<'a, f32>,
    mask: Mask,
    out: Array3<f32>,
    log_normalizer: Array2<f32>,
    d: [Array2<f32>; 3],
    kept: SumCheckpoints<f32>,
    scratch: Scratch<f32>,
}

impl<'a> Passes<'a> {
    fn new(input: [ArrayView2<'a, f32>; 3], d_out: ArrayView2<'a, f32>, mask: Mask) -> Self {
        let n = d_out.nrows();
        Self {
            input,
            d_out,
            mask,
            out: Array3::zeros((1, n, d_out.ncols())),
            log_normalizer: Array2::zeros((1, n)),
            d: input.map(|x| Array2::zeros(x.dim())),
            kept: SumCheckpoints::new(),
            scratch: Scratch::new(),
        }
    }

    fn forward(&mut self, kernel: &dyn Attention<f32>, is_recorded: bool) {
        let [q, k, v] = self.input;
        let out = self.out.index_axis_mut(Axis(0), 0);
        let mut head = Head::new(black_box(q), k, v, out);
        if is_recorded {
            head = head.with_log_normalizer(self.log_normalizer.view_mut());
        }
        kernel
            .forward_heads(&mut [head], self.mask, &mut self.scratch)
            .expect("the input is finite");
    }

    /// Of linear attention, which keeps what its backward pass needs, and adds to what is there.
    fn forward_and_backward(&mut self, kernel: &dyn Attention<f32>) {
        let [q, k, v] = black_box(self.input);
        let out = self.out.index_axis_mut(Axis(0), 0);
        let head = Head::new(q, k, v, out).with_checkpoints(&mut self.kept);
        kernel
            .forward_heads(&mut [head], self.mask, &mut self.scratch)
            .expect("the input is finite");
        let [d_q, d_k, d_v] = &mut self.d;
        let d = [d_q.view_mut(), d_k.view_mut(), d_v.view_mut()];
        let head = HeadGradient::new([q, k, v], self.d_out, d).with_checkpoints(&self.kept);
        kernel
            .backward_heads(&mut [head], self.mask, &mut self.scratch)
            .expect("the input is finite");
    }

    /// Begins with zeros, as a sum over all calls of softmax would leave the range.
    fn backward(&mut self, kernel: &dyn Attention<f32>, has_record: bool) {
        self.d.iter_mut().for_each(|d| d.fill(0.0));
        self.add_backward(kernel, has_record);
    }

    /// Adds to what is there.
    fn add_backward(&mut self, kernel: &dyn Attention<f32>, has_record: bool) {
        let [d_q, d_k, d_v] = &mut self.d;
        let d = [d_q.view_mut(), d_k.view_mut(), d_v.view_mut()];
        let mut head = HeadGradient::new(black_box(self.input), self.d_out, d);
        if has_record {
            let log_normalizer = self.log_normalizer.view();
            head = head.with_record(ForwardRecord { out: self.out.view(), log_normalizer });
        }
        kernel
            .backward_heads(&mut [head], self.mask, &mut self.scratch)
            .expect("the input is finite");
    }
}

/// Refuses to go on if a backward pass does not compute its formula.
fn check(kernel: &SoftmaxAttention<f32>, mask: Mask) {
    let x = [2, 3, 4, 5].map(|seed| oracle::normal(200, D, seed));
    let [q, k, v, d_out] = x.each_ref().map(|x| oracle::wide(x.view()));
    let (scale, none) = (1.0 / (D as f64).sqrt(), Options::default());
    let exact = softmax_gradient([&q, &k, &v], &d_out, scale, none, 0.0, mask);
    let [q, k, v, d_out] = x.each_ref().map(|x| x.view());
    let mut passes = Passes::new([q, k, v], d_out, mask);
    for has_record in [false, true] {
        if has_record {
            passes.forward(kernel, true);
        }
        passes.backward(kernel, has_record);
        for (found, exact) in passes.d.iter().zip([&exact.q, &exact.k, &exact.v]) {
            oracle::assert_close("a gradient", found.view(), exact, TOLERANCE);
        }
    }
}

/// Softmax, linear attention, and a hybrid with a merging memory.
pub fn gradients(rounds: usize, quick: bool, targets: &mut Targets) {
    softmax(rounds, quick, targets);
    linear(rounds, quick, targets);
}

/// Floating-point operations that any chunked backward pass of linear attention does for one token,
/// beside those of the forward pass: the gradients by features of queries, keys and values from the
/// two sums, the update of the second, those within a chunk of 64 tokens, and through the maps.
/// What is computed a second time does not count.
fn backward_flops() -> f64 {
    let (d, m, d_v) = (D as f64, M as f64, D_V as f64);
    8.0 * m * d_v + 4.0 * d * m + 32.5 * (4.0 * m + 4.0 * d_v)
}

/// The best GFLOP/s of a product of two matrices of 64 by 64.
fn product_rate(rounds: usize) -> f64 {
    let mut product = Product::new(64, 64, 64);
    let mut racer = [Contestant::new("product", || product.run())];
    race_for(0.002, &mut racer, rounds);
    let fastest = racer[0].rounds.iter().min().expect("there are rounds").as_secs_f64();
    2.0 * 64.0_f64.powi(3) / fastest / 1e9
}

/// Linear attention and a hybrid: what a backward pass costs beside its forward pass.
fn linear(rounds: usize, quick: bool, targets: &mut Targets) {
    let map = Performer::<f32>::new(D, M, 1).expect("sizes are positive");
    let linear = LinearAttention::new(map);
    let merged = HybridAttention::<f32>::builder(D)
        .window(64)
        .sinks(4)
        .far(Far::merged(64))
        .build()
        .expect("the options are those of the guide");
    check_linear();
    println!("{:<66}{:>8}{:>8}{:>12}", "gradients, causal", "ms", "ratio", "GFLOP/s");
    let peak = product_rate(if quick { 1 } else { 200 });
    for (name, kernel, n) in [
        ("linear, n = 2048", &linear as &dyn Attention<f32>, 2048),
        ("linear, n = 8192", &linear, 8192),
        ("window 64 and merged 64, n = 2048", &merged, 2048),
    ] {
        let input = Input::<f32>::new(n);
        let d_out = oracle::normal(n, D_V, 17);
        let new = || {
            let x = [input.q.view(), input.k.view(), input.v.view()];
            Passes::new(x, d_out.view(), Mask::Causal)
        };
        let [mut forward, mut backward, mut both] = [new(), new(), new()];
        let mut racers = [
            Contestant::new(format!("{name}, forward"), || forward.forward(kernel, false)),
            Contestant::new(format!("{name}, backward"), || backward.add_backward(kernel, false)),
            Contestant::new(format!("{name}, both"), || both.forward_and_backward(kernel)),
        ];
        race_for(if quick { 0.004 } else { 0.05 }, &mut racers, if quick { 1 } else { rounds });
        let [forward, backward, both] = racers.each_ref().map(Contestant::seconds);
        let flops = [linear_flops(), linear_flops() + backward_flops()].map(|x| n as f64 * x / 1e9);
        let is_linear = name.starts_with("linear");
        let rows = [
            ("forward", forward, flops[0]),
            ("forward + backward", forward + backward, flops[1]),
            ("forward + backward, sums kept", both, flops[1]),
        ];
        // hybrids keep nothing
        for (what, seconds, flops) in rows.into_iter().take(if is_linear { 3 } else { 2 }) {
            let rate = match is_linear {
                true => format!("{:>12.1}", flops / seconds),
                false => format!("{:>12}", "-"),
            };
            let label = format!("{name}, {what}");
            println!("{label:<66}{:>8.3}{:>8.2}{rate}", seconds * 1e3, seconds / forward);
        }
        if is_linear {
            let what = format!("{name}, (forward + backward) / forward");
            targets.at_most(&what, both / forward, 3.5);
            let share = flops[1] / both / peak;
            let what = format!("{name}, useful operations, share of the peak");
            targets.at_least(&what, share, 0.65, 0.75);
        } else {
            targets.at_most(&format!("{name}, backward / forward"), backward / forward, 6.0);
        }
    }
    println!();
}

/// Refuses to go on if `f32` does not give the gradients of `f64`.
fn check_linear() {
    let x = [2, 3, 4, 5].map(|seed| oracle::normal(700, D, seed));
    let wide = x.each_ref().map(|x| oracle::wide(x.view()));
    let kernel = LinearAttention::new(Performer::<f64>::new(D, M, 1).expect("positive"));
    let [q, k, v, d_out] = wide.each_ref().map(|x| x.view());
    let exact = kernel.backward(q, k, v, d_out, Mask::Causal).expect("the input is finite");
    let kernel = LinearAttention::new(Performer::<f32>::new(D, M, 1).expect("positive"));
    let [q, k, v, d_out] = x.each_ref().map(|x| x.view());
    let mut passes = Passes::new([q, k, v], d_out, Mask::Causal);
    for keeps_sums in [false, true] {
        passes.d.iter_mut().for_each(|d| d.fill(0.0));
        if keeps_sums {
            passes.forward_and_backward(&kernel);
        } else {
            passes.add_backward(&kernel, false);
        }
        for (found, exact) in passes.d.iter().zip([&exact.q, &exact.k, &exact.v]) {
            oracle::assert_close("a gradient", found.view(), exact, TOLERANCE);
        }
    }
}

/// Softmax attention: five products for a pair of tokens where the forward pass has two.
fn softmax(rounds: usize, quick: bool, targets: &mut Targets) {
    let n = 2048;
    let input = Input::<f32>::new(n);
    let d_out = oracle::normal(n, D_V, 17);
    let softmax = SoftmaxAttention::<f32>::new(D).expect("sizes are positive");
    println!("{:<40}{:>12}{:>12}{:>12}", format!("gradients, n = {n}"), "ms", "ratio", "GFLOP/s");
    let mut shares = Vec::new();
    for (mask, name, pairs) in [(Mask::Causal, "causal", 1.0), (Mask::Full, "full", 2.0)] {
        check(&softmax, mask);
        let new = || {
            let x = [input.q.view(), input.k.view(), input.v.view()];
            Passes::new(x, d_out.view(), mask)
        };
        let [mut forward, mut recorded, mut again] = [new(), new(), new()];
        recorded.forward(&softmax, true);
        let mut racers = [
            Contestant::new(format!("softmax {name}, forward"), || forward.forward(&softmax, true)),
            Contestant::new(format!("softmax {name}, backward with record"), || {
                recorded.backward(&softmax, true);
            }),
            Contestant::new(format!("softmax {name}, backward without"), || {
                again.backward(&softmax, false);
            }),
        ];
        race_for(if quick { 0.004 } else { 0.05 }, &mut racers, if quick { 1 } else { rounds });
        let flops = pairs * n as f64 * softmax_flops(n);
        let [forward, ..] = racers.each_ref().map(Contestant::seconds);
        let mut rates = Vec::new();
        // products of two matrices: those of the forward pass, of the backward pass, of both
        for (racer, products) in racers.iter().zip([2.0, 5.0, 7.0]) {
            let seconds = racer.seconds();
            let rate = flops * products / 2.0 / seconds / 1e9;
            rates.push(rate);
            println!(
                "{:<40}{:>12.3}{:>12.2}{rate:>12.1}",
                racer.name,
                seconds * 1e3,
                seconds / forward
            );
        }
        shares.push((name, rates[1] / rates[0]));
    }
    println!();
    for (name, share) in shares {
        let what = format!("softmax {name}, GFLOP/s of the backward pass / forward pass");
        targets.at_least(&what, share, 0.65, 0.9);
    }
    println!();
}
