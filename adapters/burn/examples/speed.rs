//! Times of one sequence, in burn's own operation and in kernels of dijiang: prompts, steps of
//! decoding and a training step. Outputs and gradients are compared first.
//!
//! ```sh
//! cargo run --release --features rayon,burn/simd --example speed -- 256 1024 4096 16384
//! ```

use burn::optim::{AdamWConfig, GradientsParams};
use burn::prelude::*;
use burn::tensor::Distribution;
use burn::tensor::module::attention as attention_of_burn;
use burn::tensor::ops::AttentionModuleOptions;
use dijiang_burn::dijiang::{
    DctFeatures, Error, Far, HybridAttention, LinearAttention, MultiHead, Performer,
    SoftmaxAttention,
};
use dijiang_burn::{
    AttentionInput, AttentionOptions, AttentionState, DijiangAttention, DijiangAttentionConfig,
    attention,
};
use std::time::Instant;

const HEADS: usize = 8;
const D: usize = 64;
/// Tokens of a training step.
const TRAINED: usize = 2048;
/// Milliseconds: what would take longer is left out.
const LONGEST: f64 = 60e3;

/// The exact operation of burn, or a layer of dijiang.
enum Operation {
    Burn,
    Dijiang(MultiHead<f32>),
}

fn operations() -> Result<Vec<(&'static str, Operation)>, Error> {
    let hybrid = HybridAttention::<f32>::builder(D).window(64).far(Far::merged(64)).build()?;
    let dct = LinearAttention::new(DctFeatures::<f32>::new(D, 64, 0)?);
    let performer = LinearAttention::new(Performer::<f32>::new(D, 64, 0)?);
    let layers = [
        ("SoftmaxAttention, exact", MultiHead::new(SoftmaxAttention::new(D)?, HEADS, HEADS)?),
        ("Performer, 64 features", MultiHead::new(performer, HEADS, HEADS)?),
        ("DctFeatures, 64 features", MultiHead::new(dct, HEADS, HEADS)?),
        ("window 64 + merged 64", MultiHead::new(hybrid, HEADS, HEADS)?),
    ];
    let layers = layers.map(|(name, layer)| (name, Operation::Dijiang(layer)));
    Ok([("burn's attention, exact", Operation::Burn)].into_iter().chain(layers).collect())
}

fn burns([q, k, v]: [Tensor<4>; 3], is_causal: bool) -> Tensor<4> {
    let options = AttentionModuleOptions { is_causal, ..Default::default() };
    attention_of_burn(q, k, v, None, None, options)
}

/// Queries, keys and values.
fn random(n: usize, device: &Device) -> [Tensor<4>; 3] {
    let normal = Distribution::Normal(0.0, 1.0);
    [(); 3].map(|()| Tensor::random([1, HEADS, n, D], normal, device))
}

/// Some tokens.
fn part(qkv: &[Tensor<4>; 3], from: usize, to: usize) -> [Tensor<4>; 3] {
    [0, 1, 2].map(|i| qkv[i].clone().slice(s![.., .., from..to, ..]))
}

/// Answers the last token of a sequence, of which it knows the others.
type Decoder = Box<dyn FnMut([Tensor<4>; 3]) -> Tensor<4>>;

impl Operation {
    /// All tokens of a sequence, causally.
    fn forward(&self, qkv: [Tensor<4>; 3]) -> Tensor<4> {
        match (self, qkv) {
            (Self::Burn, qkv) => burns(qkv, true),
            (Self::Dijiang(layer), [q, k, v]) => {
                attention(layer, q, k, v, &AttentionOptions::causal())
            }
        }
    }

    /// That of burn has all keys and values, with those of the last token: what a cache takes to
    /// store them is not in its times.
    fn decoder(&self, qkv: &[Tensor<4>; 3]) -> Result<Decoder, Error> {
        let Self::Dijiang(layer) = self else {
            let [_, keys, values] = qkv.clone();
            return Ok(Box::new(move |[q, _, _]| burns([q, keys.clone(), values.clone()], false)));
        };
        let mut state = AttentionState::new(layer, 1, D)?;
        let [q, k, v] = part(qkv, 0, qkv[0].dims()[2] - 1);
        state.forward(q, k, v);
        Ok(Box::new(move |[q, k, v]| state.forward(q, k, v)))
    }

    /// With projections, which are the same for all.
    fn forward_module(&self, model: &DijiangAttention, x: Tensor<3>) -> Tensor<3> {
        let Self::Burn = self else {
            return model.forward(AttentionInput::self_attn(x).causal()).context;
        };
        let [batch, n, columns] = x.dims();
        let qkv = [&model.query, &model.key, &model.value]
            .map(|linear| linear.forward(x.clone()).reshape([batch, n, HEADS, D]).swap_dims(1, 2));
        let out = burns(qkv, true).swap_dims(1, 2).reshape([batch, n, columns]);
        model.output.forward(out)
    }

    fn module(&self, device: &Device) -> Result<DijiangAttention, Error> {
        let config = DijiangAttentionConfig::new(HEADS * D, HEADS);
        match self {
            Self::Burn => config.try_init(device),
            Self::Dijiang(layer) => config.try_init_with(layer.clone(), device),
        }
    }

    /// Milliseconds of a step, and the most memory of the process in MiB.
    fn training_step(&self) -> Result<[f64; 2], Error> {
        let device = Device::flex().autodiff();
        let mut model = self.module(&device)?;
        let mut optimizer = AdamWConfig::new().init();
        let normal = Distribution::Normal(0.0, 1.0);
        let x = Tensor::<3>::random([1, TRAINED, HEADS * D], normal, &device);
        peak();
        let step = || {
            let out = self.forward_module(&model, x.clone());
            let loss = (out - x.clone()).powi_scalar(2).mean();
            let gradients = GradientsParams::from_grads(loss.backward(), &model);
            model = optimizer.step(1e-3, model.clone(), gradients);
        };
        Ok([fastest(step), peak()])
    }
}

/// Milliseconds of the fastest of some runs.
fn fastest<T>(mut run: impl FnMut() -> T) -> f64 {
    let (begin, mut fastest) = (Instant::now(), f64::INFINITY);
    for _ in 0..50 {
        let start = Instant::now();
        let _result = run();
        fastest = fastest.min(start.elapsed().as_secs_f64() * 1e3);
        if begin.elapsed().as_secs_f64() > 2.0 {
            break;
        }
    }
    fastest
}

/// The most memory since the last call, in MiB, where Linux tells.
fn peak() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    kib.unwrap_or(f64::NAN) / 1024.0
}

fn assert_close(what: &str, found: Tensor<4>, expected: Tensor<4>) {
    let largest = expected.clone().abs().max().into_scalar::<f32>();
    let error = (found - expected).abs().max().into_scalar::<f32>();
    assert!(error <= 1e-4 * largest, "{what}: {error:e} of numbers up to {largest:e}");
}

/// Exact outputs and gradients are the same, and each decoder goes on where its prompt ends.
fn check(operations: &[(&'static str, Operation)]) -> Result<(), Error> {
    let qkv = random(300, &Device::flex());
    let last = part(&qkv, 299, 300);
    for (name, operation) in operations {
        let [whole] = [operation.forward(qkv.clone())].map(|x| x.slice(s![.., .., 299.., ..]));
        assert_close(name, operation.decoder(&qkv)?(last.clone()), whole);
    }
    let [burn, exact] = [0, 1].map(|i| {
        let qkv = qkv.clone().map(|x| x.autodiff().require_grad());
        let out = operations[i].1.forward(qkv.clone());
        let gradients = out.clone().powi_scalar(2).sum().backward();
        (out.inner(), qkv.map(|x| x.grad(&gradients).expect("a gradient")))
    });
    assert_close("outputs", exact.0, burn.0);
    for (exact, burn) in exact.1.into_iter().zip(burn.1) {
        assert_close("gradients", exact, burn);
    }
    Ok(())
}

fn main() -> Result<(), Error> {
    let lengths = std::env::args().skip(1).map(|n| n.parse().expect("a number of tokens"));
    let mut lengths: Vec<usize> = lengths.collect();
    if lengths.is_empty() {
        lengths = vec![256, 1024];
    }
    let operations = operations()?;
    check(&operations)?;
    println!("{HEADS} heads of {D} columns, f32, one sequence, causal; milliseconds");
    println!("{:<26}{:>8}{:>12}{:>12}", "", "tokens", "prompt", "next token");
    for (name, operation) in &operations {
        let mut before: Option<(usize, f64)> = None;
        for &n in &lengths {
            let longest = before.map_or(0.0, |(m, ms)| ms * (n as f64 / m as f64).powi(2));
            if longest > LONGEST {
                continue;
            }
            let qkv = random(n, &Device::flex());
            let prompt = fastest(|| operation.forward(qkv.clone()));
            let (mut decoder, last) = (operation.decoder(&qkv)?, part(&qkv, n - 1, n));
            let step = fastest(|| decoder(last.clone()));
            println!("{name:<26}{n:>8}{prompt:>12.2}{step:>12.4}");
            before = Some((n, prompt));
        }
    }
    println!("\na training step of {TRAINED} tokens, with projections and AdamW");
    println!("{:<26}{:>8}{:>12}", "", "ms", "MiB at most");
    for (name, operation) in &operations {
        let [ms, mib] = operation.training_step()?;
        println!("{name:<26}{ms:>8.0}{mib:>12.0}");
    }
    Ok(())
}
