//! Token-by-token decoding: the cache of softmax attention grows, the state of linear attention
//! does not.
//!
//! `cargo run --release --example decode_with_constant_memory`

use dijiang::{Attention, LinearAttention, Performer, SoftmaxAttention, Stream};
use ndarray::{Array2, s};

fn main() -> Result<(), dijiang::Error> {
    let head_dim = 64;
    let kernels: [(&str, Box<dyn Attention<f32>>); 2] = [
        ("softmax", Box::new(SoftmaxAttention::new(head_dim)?)),
        ("linear", Box::new(LinearAttention::new(Performer::new(head_dim, 64, 7)?))),
    ];

    // What a model would compute for a prompt of 1 000 tokens.
    let prompt = Performer::<f32>::iid(head_dim, 1000, 1)?.projection().to_owned();
    let mut prompt_out = Array2::zeros(prompt.dim());
    // What a decoder gives and gets at each step: one row.
    let mut out = Array2::zeros((1, head_dim));

    println!("kernel    tokens    numbers kept");
    for (name, kernel) in &kernels {
        let mut stream: Box<dyn Stream<f32>> = kernel.stream(head_dim)?;
        let report = |stream: &dyn Stream<f32>| {
            println!("{name:<10}{:<10}{}", stream.len(), stream.state_floats())
        };

        // Decode ten tokens, one call each.
        for t in 0..10 {
            let row = s![t..=t, ..];
            stream.extend(
                prompt.slice(row),
                prompt.slice(row),
                prompt.slice(row),
                out.view_mut(),
            )?;
        }
        report(&*stream);

        // Many tokens in one call are a prefill: the same numbers, much faster.
        for calls in [1, 9] {
            for _ in 0..calls {
                stream.extend(
                    prompt.view(),
                    prompt.view(),
                    prompt.view(),
                    prompt_out.view_mut(),
                )?;
            }
            report(&*stream);
        }

        // A stream can be forked, to try a continuation, and go on from there.
        let mut fork = stream.clone();
        let row = s![..1, ..];
        fork.extend(prompt.slice(row), prompt.slice(row), prompt.slice(row), out.view_mut())?;
        assert_eq!(fork.len(), stream.len() + 1);
    }
    Ok(())
}
