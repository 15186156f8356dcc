//! Times causal attention and its backward pass: dijiang's kernels and burn's own operation, which
//! on a device with gradients is one of tensor operations.
//!
//! ```sh
//! cargo run --release --features rayon --example speed -- 256 1024 4096
//! ```

use burn::prelude::*;
use burn::tensor::module::attention as attention_of_burn;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Distribution, Gradients};
use dijiang_burn::dijiang::{
    DctFeatures, Error, LearnedFeatures, LinearAttention, MultiHead, SoftmaxAttention,
};
use dijiang_burn::{AttentionOptions, LinearOptions, attention, linear_attention};
use std::time::Instant;

const HEADS: usize = 8;
const D: usize = 64;

type Operation = Box<dyn Fn(Tensor<4>, Tensor<4>, Tensor<4>) -> Tensor<4>>;

fn operations() -> Result<Vec<(&'static str, Operation)>, Error> {
    let of = |layer: MultiHead<f32>| -> Operation {
        Box::new(move |q, k, v| attention(&layer, q, k, v, &AttentionOptions::causal()))
    };
    let softmax = MultiHead::new(SoftmaxAttention::new(D)?, HEADS, HEADS)?;
    let dct = LinearAttention::new(DctFeatures::<f32>::new(D, 64, 0)?);
    let hedgehog = LinearAttention::new(LearnedFeatures::<f32>::hedgehog(D)?);
    let options = AttentionModuleOptions { is_causal: true, ..Default::default() };
    Ok(vec![
        (
            "softmax of burn",
            Box::new(move |q, k, v| attention_of_burn(q, k, v, None, None, options)),
        ),
        ("softmax", of(softmax)),
        ("DctFeatures, 64", of(MultiHead::new(dct, HEADS, HEADS)?)),
        ("Hedgehog, 128", of(MultiHead::new(hedgehog, HEADS, HEADS)?)),
        (
            "linear_attention, 64",
            Box::new(|q, k, v| linear_attention(q.exp(), k.exp(), v, &LinearOptions::default())),
        ),
    ])
}

/// Milliseconds of the fastest of some runs.
fn fastest<T>(run: impl Fn() -> T) -> f64 {
    let time = |_| {
        let start = Instant::now();
        let _result = run();
        start.elapsed().as_secs_f64() * 1e3
    };
    (0..5).map(time).fold(f64::INFINITY, f64::min)
}

/// The most memory since the last call, in MiB, where Linux tells.
fn peak() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    kib.unwrap_or(f64::NAN) / 1024.0
}

fn main() -> Result<(), Error> {
    let lengths = std::env::args().skip(1).map(|n| n.parse().expect("a number of tokens"));
    let mut lengths: Vec<usize> = lengths.collect();
    if lengths.is_empty() {
        lengths = vec![256, 1024];
    }
    let plain = Device::flex();
    println!("{HEADS} heads of {D} columns, one sequence; ms, and MiB at most");
    println!("{:>6}  {:<22}{:>10}{:>12}{:>8}", "tokens", "", "forward", "+ backward", "MiB");
    for n in lengths {
        for (name, operation) in operations()? {
            let x = || Tensor::random([1, HEADS, n, D], Distribution::Normal(0.0, 0.5), &plain);
            let (q, k, v): (Tensor<4>, Tensor<4>, Tensor<4>) = (x(), x(), x());
            let forward = fastest(|| operation(q.clone(), k.clone(), v.clone()));
            let [q, k, v] = [q, k, v].map(|x| x.autodiff().require_grad());
            let pass = || -> Gradients {
                operation(q.clone(), k.clone(), v.clone()).powi_scalar(2).sum().backward()
            };
            peak();
            let both = fastest(pass);
            println!("{n:>6}  {name:<22}{forward:>10.2}{both:>12.2}{:>8.0}", peak());
        }
    }
    Ok(())
}
