//! Whole sequences by length, causal and full, and the decode step: `cargo bench --bench forward`.
//! f32, d = d_v = m = 64.

mod oracle;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dijiang::{Attention, DctFeatures, LinearAttention, Mask, Performer, SoftmaxAttention};
use ndarray::{Array2, s};

const D: usize = 64;

fn kernels() -> [(&'static str, Box<dyn Attention<f32>>); 3] {
    let performer = Performer::new(D, D, 1).expect("sizes are positive");
    let dct = DctFeatures::new(D, D, 1).expect("sizes are positive");
    [
        ("softmax", Box::new(SoftmaxAttention::new(D).expect("d is positive"))),
        ("performer", Box::new(LinearAttention::new(performer))),
        ("dct", Box::new(LinearAttention::new(dct))),
    ]
}

/// Refuses to time a kernel that does not compute its formula, at once and token by token.
fn check(name: &str, kernel: &dyn Attention<f32>) {
    let [q, k, v] = [2, 3, 4].map(|seed| oracle::normal(200, D, seed));
    for mask in [Mask::Causal, Mask::Full] {
        let expected = match name {
            "softmax" => oracle::softmax(q.view(), k.view(), v.view(), mask),
            _ => {
                let performer = Performer::<f32>::new(D, D, 1)
                    .expect("sizes are positive")
                    .projection()
                    .to_owned();
                let dct =
                    DctFeatures::<f32>::new(D, D, 1).expect("sizes are positive").projection();
                let omega = if name == "dct" { dct } else { performer };
                oracle::linear(omega.view(), q.view(), k.view(), v.view(), mask)
            }
        };
        let found = kernel.forward(q.view(), k.view(), v.view(), mask).expect("finite input");
        oracle::assert_close(name, found.view(), &expected, oracle::TOLERANCE);
        if mask == Mask::Causal {
            let mut stream = kernel.stream(D).expect("d is positive");
            let mut found = Array2::zeros((200, D));
            for t in 0..200 {
                let row = s![t..=t, ..];
                stream
                    .extend(q.slice(row), k.slice(row), v.slice(row), found.slice_mut(row))
                    .expect("finite input");
            }
            oracle::assert_close(name, found.view(), &expected, oracle::TOLERANCE);
        }
    }
}

fn forward(c: &mut Criterion) {
    let kernels = kernels();
    kernels.iter().for_each(|(name, kernel)| check(name, &**kernel));
    for (mask, title) in [(Mask::Causal, "causal"), (Mask::Full, "full")] {
        let mut group = c.benchmark_group(title);
        group.sample_size(10);
        for n in [512, 2048, 8192] {
            let [q, k, v] = [5, 6, 7].map(|seed| oracle::normal(n, D, seed));
            let mut out = Array2::zeros((n, D));
            group.throughput(Throughput::Elements(n as u64));
            for (name, kernel) in &kernels {
                group.bench_function(BenchmarkId::new(*name, n), |b| {
                    b.iter(|| {
                        kernel
                            .forward_into(q.view(), k.view(), v.view(), mask, out.view_mut())
                            .expect("finite")
                    });
                });
            }
        }
        group.finish();
    }
}

/// One token: linear attention at any context, softmax with a cache of 2 048 tokens.
fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("decode");
    group.throughput(Throughput::Elements(1)).sample_size(50);
    let x = oracle::normal(2048, D, 5);
    let token = oracle::normal(1, D, 6);
    let (mut all, mut out) = (Array2::zeros((2048, D)), Array2::zeros((1, D)));
    for (name, kernel) in kernels() {
        let mut prefilled = kernel.stream(D).expect("d is positive");
        prefilled.extend(x.view(), x.view(), x.view(), all.view_mut()).expect("finite input");
        group.bench_function(name, |b| {
            b.iter_batched_ref(
                || prefilled.clone(),
                |stream| {
                    stream
                        .extend(token.view(), token.view(), token.view(), out.view_mut())
                        .expect("finite input")
                },
                criterion::BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, forward, decode);
criterion_main!(benches);
