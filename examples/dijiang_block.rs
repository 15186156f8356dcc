//! The attention blocks of a DiJiang model, a whole text at once and token by token. The weights
//! are random; those of a released model are loaded with `DijiangBlock::from_safetensors` (feature
//! `safetensors`).
//!
//! `cargo run --release --example dijiang_block`

use dijiang::{DijiangBlock, DijiangBlockStream, DijiangWeights, Error, Performer, Rotary};
use ndarray::{Array1, Array2, ArrayView2, Axis};
use std::time::Instant;

const HIDDEN: usize = 256;
const HEADS: usize = 4;
const HEAD_DIM: usize = HIDDEN / HEADS;
const LAYERS: u64 = 4;
const TOKENS: usize = 512;

/// Seeded normal numbers.
fn normal(rows: usize, columns: usize, size: f32, seed: u64) -> Result<Array2<f32>, Error> {
    Ok(Performer::<f32>::iid(columns, rows, seed)?.projection().mapv(|x| size * x))
}

fn layer(seed: u64) -> Result<DijiangBlock<f32>, Error> {
    let size = 1.0 / (HIDDEN as f32).sqrt();
    let weights = DijiangWeights {
        query_key_value: normal(3 * HIDDEN, HIDDEN, size, 10 * seed)?,
        query_key_value_bias: Array1::zeros(3 * HIDDEN),
        dense: normal(HIDDEN, HIDDEN, size, 10 * seed + 1)?,
        dense_bias: Array1::zeros(HIDDEN),
        gate: normal(HIDDEN, HIDDEN, size, 10 * seed + 2)?,
        group_norm_weight: Array1::ones(HIDDEN),
        group_norm_bias: Array1::zeros(HIDDEN),
        radii: normal(1, HEAD_DIM, 1.0, 10 * seed + 3)?.row(0).to_owned(),
    };
    DijiangBlock::new(weights, HEADS, Rotary::gpt_neox(HEAD_DIM, 0.25)?)
}

/// New tokens through every layer, each with its residual. (A model also has a layer norm before
/// and a feed-forward part beside the block.)
fn run(
    layers: &mut [DijiangBlockStream<f32>],
    x: ArrayView2<'_, f32>,
) -> Result<Array2<f32>, Error> {
    let mut x = x.to_owned();
    let mut out = Array2::zeros(x.dim());
    for layer in layers {
        layer.extend(x.view(), out.view_mut())?;
        x += &out;
    }
    Ok(x)
}

fn main() -> Result<(), Error> {
    let blocks = (1..=LAYERS).map(layer).collect::<Result<Vec<_>, _>>()?;
    let start = || blocks.iter().map(DijiangBlock::stream).collect::<Result<Vec<_>, _>>();
    let text = normal(TOKENS, HIDDEN, 1.0, 0)?;
    println!("{LAYERS} blocks of {HEADS} heads, {HIDDEN} columns; {TOKENS} tokens");

    let clock = Instant::now();
    let whole = run(&mut start()?, text.view())?;
    let seconds = clock.elapsed().as_secs_f64();
    println!("all at once:         {:6.0} tokens a second", TOKENS as f64 / seconds);

    let mut layers = start()?;
    let mut difference = 0.0_f32;
    let clock = Instant::now();
    for (token, expected) in text.rows().into_iter().zip(whole.rows()) {
        let out = run(&mut layers, token.insert_axis(Axis(0)))?;
        difference = (&out.row(0) - &expected).fold(difference, |m, x| m.max(x.abs()));
    }
    let seconds = clock.elapsed().as_secs_f64();
    println!("one after the other: {:6.0} tokens a second", TOKENS as f64 / seconds);
    let largest = whole.fold(0.0_f32, |m, x| m.max(x.abs()));
    println!("largest difference:  {difference:.1e}, of numbers up to {largest:.1}");

    let state: usize = layers.iter().map(DijiangBlockStream::state_floats).sum();
    let of_token = blocks.len() * 2 * HIDDEN; // keys and values
    println!("state:               {state} numbers, however long the text");
    println!(
        "as keys and values:  {} numbers for {TOKENS} tokens, the same as the state at {}",
        of_token * TOKENS,
        state / of_token
    );
    Ok(())
}
