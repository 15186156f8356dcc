//! Writing text, token by token.

use crate::model::{Model, State, Time};
use crate::perplexity::CHUNK;
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result, bail, ensure};
use dijiang::MultiHead;
use minijinja::{Environment, ErrorKind, context};
use ndarray::{ArrayView1, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How the next token is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Scores are divided by it; at 0 the highest score wins.
    pub temperature: f64,
    /// Only the likeliest tokens that together have this probability are drawn from.
    pub top_p: f64,
    /// Of the random numbers.
    pub seed: u64,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Written {
    /// The tokens, without the one that ended them.
    pub tokens: Vec<u32>,
    /// Time for reading the prompt.
    pub reading: Time,
    /// Time for the tokens written.
    pub writing: Time,
    /// The state at the end.
    pub state: State,
}

/// Reads a prompt and writes up to `most` tokens, each given to `show` as text as soon as it is a
/// whole one.
pub fn generate(
    model: &Model,
    tokenizer: &Tokenizer,
    layers: &[MultiHead<f32>],
    prompt: &[u32],
    most: usize,
    sampling: Sampling,
    show: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<Written> {
    let Some((&last, before)) = prompt.split_last() else { bail!("the prompt is empty") };
    let Sampling { temperature, top_p, seed } = sampling;
    ensure!(
        temperature >= 0.0 && temperature.is_finite(),
        "the temperature is {temperature}: it cannot be negative"
    );
    ensure!(top_p > 0.0 && top_p <= 1.0, "top-p is {top_p}: it must be a probability above 0");
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut state = model.state(layers)?;
    for chunk in before.chunks(CHUNK) {
        model.extend(&mut state, chunk)?;
    }
    let reading = state.time();
    state.restart_clock();
    let (mut tokens, mut decoder, mut next) = (Vec::new(), tokenizer.decoder(), last);
    while tokens.len() < most {
        let hidden = model.extend(&mut state, &[next])?;
        let logits = model.scores(&mut state, &hidden)?;
        next = draw(logits.slice(s![0, ..]), sampling, &mut random);
        if tokenizer.is_end(next) {
            break;
        }
        tokens.push(next);
        if let Some(text) = decoder.push(next)? {
            show(&text)?;
        }
    }
    if let Some(text) = decoder.finish() {
        show(&text)?;
    }
    Ok(Written { tokens, reading, writing: state.time(), state })
}

/// A token, by its score.
fn draw(logits: ArrayView1<'_, f32>, sampling: Sampling, random: &mut ChaCha8Rng) -> u32 {
    let largest = logits.fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    if sampling.temperature == 0.0 {
        return logits.iter().position(|&x| x == largest).unwrap_or(0) as u32;
    }
    let weight = |&x: &f32| (f64::from(x - largest) / sampling.temperature).exp();
    let mut weights: Vec<(usize, f64)> = logits.iter().map(weight).enumerate().collect();
    weights.sort_by(|a, b| b.1.total_cmp(&a.1));
    let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
    let mut kept = 0;
    let mut mass = 0.0;
    while kept < weights.len() && (kept == 0 || mass < sampling.top_p * total) {
        mass += weights[kept].1;
        kept += 1;
    }
    let mut place = random.random::<f64>() * mass;
    for &(token, weight) in &weights[..kept] {
        place -= weight;
        if place < 0.0 {
            return token as u32;
        }
    }
    weights[kept - 1].0 as u32
}

/// The prompt of a conversation that a user has just begun, by the template of the model.
pub fn chat(template: &str, tokenizer: &Tokenizer, text: &str) -> Result<String> {
    let mut environment = Environment::new();
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function(
        "raise_exception",
        |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        },
    );
    let special =
        |id: Option<u32>| id.and_then(|id| tokenizer.decode(&[id]).ok()).unwrap_or_default();
    environment
        .render_str(
            template,
            context! {
                messages => [context! { role => "user", content => text }],
                add_generation_prompt => true,
                bos_token => special(tokenizer.bos()),
                eos_token => special(tokenizer.eos()),
            },
        )
        .context("the model's template for conversations cannot be used")
}
