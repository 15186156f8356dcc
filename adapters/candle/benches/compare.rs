//! Attention of this crate in candle beside candle's own: prefill, decode, training, and what the
//! adapter costs over the core.
//!
//! ```text
//! cargo bench -p dijiang-candle --bench compare [-- quick]
//! ```
//!
//! One sequence, 8 heads of 64 columns, `f32`, the threads of the machine on both sides. Outputs
//! are compared before anything is timed; times are medians of interleaved rounds.

use candle_core::{D, Device, Result, Tensor, Var};
use candle_nn::attention::cpu_flash::causal::causal_decode_f32_interleaved;
use candle_nn::attention::{AttnMask, flash_attn};
use dijiang::{
    DctFeatures, Far, HybridAttention, LinearAttention, Mask, MultiHead, Performer, RawTensor,
    SoftmaxAttention,
};
use dijiang_candle::{AttentionState, attention, linear_attention_in_operations};
use std::hint::black_box;
use std::time::Instant;

const HEADS: usize = 8;
const D_HEAD: usize = 64;

/// A name, and what is timed.
type Racer<'a> = (&'static str, Box<dyn FnMut() -> Result<()> + 'a>);

/// Medians in seconds, of rounds in which everyone takes a turn.
fn race(racers: &mut [Racer<'_>], rounds: usize, repeats: usize) -> Result<Vec<f64>> {
    let mut times = vec![Vec::new(); racers.len()];
    for _ in 0..rounds {
        for ((_, run), times) in racers.iter_mut().zip(&mut times) {
            let start = Instant::now();
            (0..repeats).try_for_each(|_| run())?;
            times.push(start.elapsed().as_secs_f64() / repeats as f64);
        }
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    Ok(times.into_iter().map(median).collect())
}

fn layers() -> Vec<(&'static str, MultiHead<f32>)> {
    let layer = |kernel: Box<dyn dijiang::Attention<f32>>| {
        MultiHead::new(kernel, HEADS, HEADS).expect("as many heads")
    };
    let softmax = SoftmaxAttention::<f32>::new(D_HEAD).expect("positive");
    let performer = Performer::<f32>::new(D_HEAD, 64, 0).expect("positive");
    let dct = DctFeatures::<f32>::new(D_HEAD, 64, 0).expect("positive");
    let merged = HybridAttention::<f32>::builder(D_HEAD).window(64).sinks(4);
    let merged = merged.far(Far::merged(64)).build().expect("the options are those of the guide");
    vec![
        ("softmax", layer(Box::new(softmax))),
        ("performer", layer(Box::new(LinearAttention::new(performer)))),
        ("dct", layer(Box::new(LinearAttention::new(dct)))),
        ("merged", layer(Box::new(merged))),
    ]
}

/// Queries, keys and values as projections leave them, `[1, n, heads, d]`.
fn input(n: usize) -> Result<[Tensor; 3]> {
    let x = || Tensor::randn(0f32, 0.6, (1, n, HEADS, D_HEAD), &Device::Cpu);
    Ok([x()?, x()?, x()?])
}

fn heads(x: &Tensor) -> Result<Tensor> {
    x.transpose(1, 2)
}

fn check(what: &str, ours: &Tensor, theirs: &Tensor) -> Result<()> {
    let error = (ours - theirs)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(error < 1e-3, "{what}: outputs differ by {error}");
    Ok(())
}

fn flash([q, k, v]: [&Tensor; 3], mask: AttnMask) -> Result<Tensor> {
    let scale = 1.0 / (D_HEAD as f32).sqrt();
    flash_attn::<f32>(q, k, v, scale, mask, None, None)
}

fn prefill_and_decode(sizes: &[usize]) -> Result<()> {
    println!("prefill, ms, and in brackets how many times as fast as candle-nn's flash attention");
    let layers = layers();
    for &n in sizes {
        let [q, k, v] = input(n)?;
        let views = [heads(&q)?, heads(&k)?, heads(&v)?];
        let theirs = flash([&q, &k, &v], AttnMask::causal())?;
        let [qh, kh, vh] = &views;
        check("prefill", &attention(&layers[0].1, qh, kh, vh, Mask::Causal, None)?, &theirs)?;
        let run = || flash([&q, &k, &v], AttnMask::causal()).map(|out| drop(black_box(out)));
        let mut racers: Vec<Racer> = vec![("candle flash", Box::new(run))];
        for (name, layer) in &layers {
            racers.push((
                name,
                Box::new(|| {
                    attention(layer, qh, kh, vh, Mask::Causal, None).map(|out| drop(black_box(out)))
                }),
            ));
        }
        let rounds = if n > 4096 { 1 } else { 5 };
        print_row(n, &racers_times(&mut racers, rounds, 1)?, 1e3);
    }
    println!("\na decode step after n tokens, µs");
    for &n in sizes {
        let [q, k, v] = input(n)?;
        let token = |x: &Tensor| x.narrow(1, n - 1, 1);
        let scale = 1.0 / (D_HEAD as f32).sqrt();
        let past = AttnMask::causal_with_offset(n - 1);
        let last = token(&q)?;
        let theirs = flash([&last, &k, &v], past.clone())?;
        // keys and values side by side, [n, heads, 2·d]
        let kv = Tensor::cat(&[&k, &v], D::Minus1)?.flatten_all()?.to_vec1::<f32>()?;
        let row = last.flatten_all()?.to_vec1::<f32>()?;
        let [qh, kh, vh] = [heads(&q)?, heads(&k)?, heads(&v)?];
        let of_token = |x: &Tensor| x.narrow(2, n - 1, 1);
        let (q1, k1, v1) = (of_token(&qh)?, of_token(&kh)?, of_token(&vh)?);
        let mut states = Vec::new();
        for (name, layer) in &layers {
            let mut state = AttentionState::new(layer, 1, D_HEAD)?;
            let before = |x: &Tensor| x.narrow(2, 0, n - 1);
            if n > 1 {
                state.forward(&before(&qh)?, &before(&kh)?, &before(&vh)?)?;
            }
            state.checkpoint();
            if *name == "softmax" {
                check("decode", &state.forward(&q1, &k1, &v1)?, &theirs)?;
                state.rollback()?;
            }
            states.push((*name, state));
        }
        let mut racers: Vec<Racer> = vec![
            (
                "candle flash",
                Box::new(|| flash([&last, &k, &v], past.clone()).map(|out| drop(black_box(out)))),
            ),
            (
                "candle interleaved",
                Box::new(|| {
                    causal_decode_f32_interleaved(&row, &kv, HEADS, HEADS, D_HEAD, n, scale)
                        .map(|out| drop(black_box(out)))
                }),
            ),
        ];
        for (name, state) in &mut states {
            let (q1, k1, v1) = (&q1, &k1, &v1);
            racers.push((
                name,
                Box::new(move || state.forward(q1, k1, v1).map(|out| drop(black_box(out)))),
            ));
        }
        print_row(n, &racers_times(&mut racers, 9, if n > 4096 { 5 } else { 20 })?, 1e6);
    }
    Ok(())
}

fn racers_times(
    racers: &mut [Racer<'_>],
    rounds: usize,
    repeats: usize,
) -> Result<Vec<(&'static str, f64)>> {
    let times = race(racers, rounds, repeats)?;
    Ok(racers.iter().map(|(name, _)| *name).zip(times).collect())
}

fn print_row(n: usize, times: &[(&'static str, f64)], unit: f64) {
    print!("n = {n:5}");
    for (name, seconds) in times {
        print!("  {name} {:.3} ({:.1})", seconds * unit, times[0].1 / seconds);
    }
    println!();
}

/// A forward and a backward pass of one layer.
fn training(n: usize, rounds: usize) -> Result<()> {
    let [q, k, v] = input(n)?;
    let vars = [&q, &k, &v].map(|x| {
        let heads = heads(x).and_then(|x| x.contiguous());
        heads.and_then(|x| Var::from_tensor(&x)).expect("a tensor")
    });
    let [q, k, v] = [&vars[0], &vars[1], &vars[2]];
    let map = Performer::<f32>::new(D_HEAD, 64, 0).expect("positive");
    let omega: Vec<f32> = map.projection().iter().copied().collect();
    let omega = Tensor::from_vec(omega, (64, D_HEAD), &Device::Cpu)?.t()?.contiguous()?;
    let root = (D_HEAD as f64).sqrt().sqrt();
    let phi = |x: &Tensor, norm: bool| -> Result<Tensor> {
        let x = (x / root)?;
        let logits = x.broadcast_matmul(&omega)?;
        let logits = if norm {
            logits.broadcast_sub(&(x.sqr()?.sum_keepdim(D::Minus1)? * 0.5)?)?
        } else {
            logits
        };
        logits.broadcast_sub(&logits.max_all()?.detach())?.exp()
    };
    let in_operations =
        || linear_attention_in_operations([&phi(q, false)?, &phi(k, true)?, v], None, None);
    let exact = || -> Result<Tensor> {
        let scores = (q.matmul(&k.t()?.contiguous()?)? / (D_HEAD as f64).sqrt())?;
        let seen = Tensor::tril2(n, candle_core::DType::F32, &Device::Cpu)?;
        let scores = scores.broadcast_add(&((seen - 1.0)? * 1e30)?)?;
        candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(v)
    };
    let linear = MultiHead::new(LinearAttention::new(map), HEADS, HEADS).expect("as many heads");
    let softmax = &layers()[0].1;
    let ours = |layer: &MultiHead<f32>| attention(layer, q, k, v, Mask::Causal, None);
    check("linear", &ours(&linear)?, &in_operations()?)?;
    check("softmax", &ours(softmax)?, &exact()?)?;
    let step = |out: Tensor| out.sqr()?.sum_all()?.backward().map(|d| drop(black_box(d)));
    let mut racers: Vec<Racer> = vec![
        ("linear, here", Box::new(|| step(ours(&linear)?))),
        ("linear, candle operations", Box::new(|| step(in_operations()?))),
        ("softmax, here", Box::new(|| step(ours(softmax)?))),
        ("softmax, candle operations", Box::new(|| step(exact()?))),
    ];
    let times = racers_times(&mut racers, rounds, 1)?;
    println!("\na training step of one layer, n = {n}");
    for (name, seconds) in &times {
        println!("{name:<28}{:>10.2} ms{:>8.1}", seconds * 1e3, seconds / times[0].1);
    }
    Ok(())
}

/// What the adapter costs over the core.
fn overhead(n: usize, rounds: usize) -> Result<()> {
    let [q, k, v] = input(n)?;
    let numbers = [&q, &k, &v].map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    let shape = |n: usize| [1, HEADS, n, D_HEAD];
    let raw = |x: usize, n: usize| {
        let strides = [n * HEADS * D_HEAD, D_HEAD, HEADS * D_HEAD, 1];
        RawTensor::new(&numbers[x], shape(n), strides).expect("it fits")
    };
    let views = [heads(&q)?, heads(&k)?, heads(&v)?];
    let [qh, kh, vh] = &views;
    println!("\nthe adapter and the core, n = {n}, and a decode step");
    for (name, layer) in layers() {
        let wrap = candle_core::Error::wrap;
        let mut core = layer.stream(1, D_HEAD).map_err(wrap)?;
        let mut state = AttentionState::new(&layer, 1, D_HEAD)?;
        let token = [qh, kh, vh].map(|x| x.narrow(2, 0, 1).unwrap());
        let mut racers: Vec<Racer> = vec![
            (
                "core",
                Box::new(|| {
                    // as a user of the core, who has room for the outputs
                    let mut out = vec![0.0; n * HEADS * D_HEAD];
                    let raw = [raw(0, n), raw(1, n), raw(2, n)];
                    layer.forward_raw(raw, None, Mask::Causal, None, &mut out).map_err(wrap)?;
                    black_box(&out);
                    Ok(())
                }),
            ),
            (
                "adapter",
                Box::new(|| {
                    attention(&layer, qh, kh, vh, Mask::Causal, None)
                        .map(|out| drop(black_box(out)))
                }),
            ),
        ];
        let whole = racers_times(&mut racers, rounds, 1)?;
        drop(racers);
        let mut out = vec![0.0; HEADS * D_HEAD];
        let mut racers: Vec<Racer> = vec![
            (
                "core",
                Box::new(|| {
                    let raw = [raw(0, 1), raw(1, 1), raw(2, 1)];
                    core.extend_raw(raw, None, None, &mut out).map_err(wrap)
                }),
            ),
            (
                "adapter",
                Box::new(|| {
                    let [q, k, v] = &token;
                    state.forward(q, k, v).map(|out| drop(black_box(out)))
                }),
            ),
        ];
        // states of exact attention grow: few repeats
        let step = racers_times(&mut racers, 4 * rounds, 50)?;
        println!(
            "{name:<12}{:>9.3} ms, adapter {:.3}; step {:>8.2} µs, adapter {:+.2}",
            whole[0].1 * 1e3,
            whole[1].1 / whole[0].1,
            step[0].1 * 1e6,
            (step[1].1 - step[0].1) * 1e6
        );
    }
    Ok(())
}

fn main() -> Result<()> {
    let is_quick = std::env::args().any(|argument| argument == "quick" || argument == "--test");
    if is_quick {
        prefill_and_decode(&[64])?;
        training(128, 1)?;
        return overhead(64, 1);
    }
    prefill_and_decode(&[256, 1024, 4096, 16_384])?;
    training(2048, 5)?;
    overhead(2048, 21)
}
