//! The contestant of this crate for `benches/peers/llama.mjs`: reads tokens and takes decode steps
//! as it is told by lines on standard input, and answers each with a line of JSON.
//!
//! ```text
//! tokens N     the first N tokens of the text that comes along, repeated where they are too few
//! kernel NAME  starts anew with this kernel in every layer: bytes of the weights in memory
//! read N       reads so many tokens: seconds
//! step N       reads so many, one at a time, each with the likeliest next one: seconds of each,
//!              and of its attention, products and the rest; the likeliest tokens
//! ```
//!
//! `cargo bench -p language_model --bench steps -- MODEL f32|quantised`

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use language_model::linear::Weights;
use language_model::model::State;
use language_model::perplexity::CHUNK;
use language_model::session::Session;
use serde_json::json;
use std::env;
use std::io::{Write, stdin, stdout};
use std::path::Path;
use std::time::Instant;

fn main() -> Result<()> {
    let args: Vec<String> = env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let [model, weights] = &args[..] else {
        println!("nothing to do: pass MODEL and `f32` or `quantised`");
        return Ok(());
    };
    rayon::scope(|_| answer(Path::new(model), weights))
}

fn answer(model: &Path, weights: &str) -> Result<()> {
    let weights = Weights::from_str(weights, true).map_err(anyhow::Error::msg)?;
    let session = Session::open(model, &[], &[], 2048, weights)?;
    let mut source = session.first_text()?.tokens.iter().copied().cycle();
    let text = source.clone();
    let mut state: Option<State> = None;
    for line in stdin().lines() {
        let line = line?;
        let (command, argument) = line.split_once(' ').context("a command has an argument")?;
        if command == "kernel" {
            let layers = session.attention(&argument.parse()?)?.layers;
            state = Some(session.model.state(&layers)?);
            source = text.clone();
            println!("{}", json!(session.model.weight_bytes()));
            continue;
        }
        let count: usize = argument.parse()?;
        if command == "tokens" {
            println!("{}", json!(text.clone().take(count).collect::<Vec<_>>()));
            continue;
        }
        let state = state.as_mut().context("`kernel` comes first")?;
        let tokens: Vec<u32> = source.by_ref().take(count).collect();
        match command {
            "read" => {
                let start = Instant::now();
                for chunk in tokens.chunks(CHUNK) {
                    session.model.extend(state, chunk)?;
                }
                println!("{}", json!(start.elapsed().as_secs_f64()));
            }
            "step" => {
                let (mut seconds, mut next) = (Vec::new(), Vec::new());
                for &token in &tokens {
                    state.restart_clock();
                    let start = Instant::now();
                    let hidden = session.model.extend(state, &[token])?;
                    let scores = session.model.logits(state, &hidden);
                    next.push(likeliest(scores.iter()));
                    let (all, time) = (start.elapsed(), state.time());
                    let parts = [all, time.attention, time.products, time.rest];
                    seconds.push(parts.map(|part| part.as_secs_f64()));
                }
                println!("{}", json!({ "seconds": seconds, "next": next }));
            }
            _ => bail!("`{command}` is not a command"),
        }
        stdout().flush()?;
    }
    Ok(())
}

/// The place of the largest score.
fn likeliest<'a>(scores: impl Iterator<Item = &'a f32>) -> usize {
    let best = |best: (usize, f32), (i, &x)| if x > best.1 { (i, x) } else { best };
    scores.enumerate().fold((0, f32::NEG_INFINITY), best).0
}
