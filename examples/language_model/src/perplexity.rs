//! Perplexity: how well a model foretells a text, by position in the context.

use crate::model::{Model, Time};
use crate::texts::Text;
use anyhow::{Result, ensure};
use dijiang::MultiHead;
use indicatif::ProgressBar;
use ndarray::{Array2, ArrayView1, Axis, Zip};
use std::ops::Range;

/// Tokens that are read at once.
pub const CHUNK: usize = 512;

/// Negative log likelihoods of the tokens of some windows of text.
#[derive(Clone, Debug, Default)]
pub struct Losses {
    /// For each window its text and, for each position, −ln of the probability that the model gave
    /// to the next token, in nats.
    pub windows: Vec<(String, Vec<f64>)>,
    /// Where the time went.
    pub time: Time,
}

/// The windows of a text, `context` predictions each, one after the other: a rest is left out,
/// unless there is nothing else.
#[must_use]
pub fn windows(text: &Text, context: usize) -> Vec<&[u32]> {
    let tokens = &text.tokens;
    let context = context.max(1);
    if tokens.len() <= context {
        return vec![tokens];
    }
    (0..(tokens.len() - 1) / context).map(|i| &tokens[i * context..=(i + 1) * context]).collect()
}

/// Predictions in the windows of all texts.
#[must_use]
pub fn predicted(texts: &[Text], context: usize) -> usize {
    let of = |window: &[u32]| window.len().saturating_sub(1);
    texts.iter().flat_map(|text| windows(text, context)).map(of).sum()
}

/// Predictions in the longest window of all texts.
#[must_use]
pub fn longest(texts: &[Text], context: usize) -> usize {
    let of = |text: &Text| text.tokens.len().saturating_sub(1).min(context);
    texts.iter().map(of).max().unwrap_or(0)
}

/// Reads every window of every text from an empty state. Advances the bar by one for each
/// prediction.
pub fn losses(
    model: &Model,
    layers: &[MultiHead<f32>],
    texts: &[Text],
    context: usize,
    bar: &ProgressBar,
) -> Result<Losses> {
    ensure!(context > 0, "a context of 0 tokens predicts nothing");
    let mut state = model.state(layers)?;
    let mut losses = Losses::default();
    for text in texts {
        ensure!(
            text.tokens.len() > 1,
            "the text `{}` has a single token: there is nothing to predict",
            text.name
        );
        for window in windows(text, context) {
            state.reset();
            let mut nats = Vec::with_capacity(window.len() - 1);
            let (read, next) = (&window[..window.len() - 1], &window[1..]);
            for (read, next) in read.chunks(CHUNK).zip(next.chunks(CHUNK)) {
                let hidden = model.extend(&mut state, read)?;
                let logits = model.scores(&mut state, &hidden)?;
                let mut of_chunk = vec![0.0; next.len()];
                Zip::from(&mut of_chunk[..]).and(logits.rows()).and(next).par_for_each(
                    |loss, logits, &token| {
                        *loss = loss_of(logits, token);
                    },
                );
                nats.extend(of_chunk);
                bar.inc(read.len() as u64);
            }
            losses.windows.push((text.name.clone(), nats));
        }
    }
    losses.time = state.time();
    Ok(losses)
}

/// `ln Σ e^{x_i} − x_token`
#[must_use]
pub fn loss_of(logits: ArrayView1<'_, f32>, token: u32) -> f64 {
    let largest = logits.fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let sum: f64 = logits.iter().map(|&x| f64::from((x - largest).exp())).sum();
    sum.ln() + f64::from(largest) - f64::from(logits[token as usize])
}

impl Losses {
    /// The mean over all windows of the positions in a range, in nats; none if no window reaches
    /// it.
    #[must_use]
    pub fn mean(&self, positions: Range<usize>) -> Option<f64> {
        let within = |(_, nats): &(String, Vec<f64>)| {
            let range = positions.start.min(nats.len())..positions.end.min(nats.len());
            (range.len(), nats[range].iter().sum::<f64>())
        };
        let (count, sum) =
            self.windows.iter().map(within).fold((0, 0.0), |(n, s), (m, t)| (n + m, s + t));
        (count > 0).then(|| sum / count as f64)
    }

    /// `e^mean` over a range of positions.
    #[must_use]
    pub fn perplexity(&self, positions: Range<usize>) -> Option<f64> {
        self.mean(positions).map(f64::exp)
    }

    /// The means over the first half of the longest window and over the second, in nats; none where
    /// a half has no predictions: one alone is in the second.
    #[must_use]
    pub fn halves(&self) -> [Option<f64>; 2] {
        let length = self.longest();
        [0..length / 2, length / 2..length].map(|half| self.mean(half))
    }

    /// Predictions of the longest window.
    #[must_use]
    pub fn longest(&self) -> usize {
        self.windows.iter().map(|(_, nats)| nats.len()).max().unwrap_or(0)
    }
}

/// The token with the highest score in each row.
fn best(logits: &Array2<f32>) -> Vec<u32> {
    let best = |row: ArrayView1<'_, f32>| {
        let largest = row
            .iter()
            .enumerate()
            .fold((0, f32::NEG_INFINITY), |a, (i, &x)| if x > a.1 { (i, x) } else { a });
        largest.0 as u32
    };
    logits.outer_iter().map(best).collect()
}

/// Reads tokens in chunks and returns the token with the highest score after each of the given
/// places, in order.
pub(crate) fn predictions(
    model: &Model,
    layers: &[MultiHead<f32>],
    tokens: &[u32],
    places: &[usize],
    bar: &ProgressBar,
) -> Result<Vec<u32>> {
    let mut state = model.state(layers)?;
    let mut found = Vec::with_capacity(places.len());
    for (i, chunk) in tokens.chunks(CHUNK).enumerate() {
        let hidden = model.extend(&mut state, chunk)?;
        let start = i * CHUNK;
        let rows: Vec<usize> = places
            .iter()
            .filter(|&&p| (start..start + chunk.len()).contains(&p))
            .map(|p| p - start)
            .collect();
        if !rows.is_empty() {
            found.extend(best(&model.scores(&mut state, &hidden.select(Axis(0), &rows))?));
        }
        bar.inc(chunk.len() as u64);
    }
    Ok(found)
}
