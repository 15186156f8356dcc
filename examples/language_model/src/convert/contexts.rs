//! The order in which a training reads its texts.

use crate::texts::Text;
use anyhow::{Result, ensure};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Contexts of `context` tokens and the one behind, of all texts in a random order; once all have
/// been read, others that begin elsewhere, without end.
pub fn contexts(texts: &[Text], context: usize, seed: u64) -> Result<impl Iterator<Item = &[u32]>> {
    let longest = texts.iter().map(|text| text.tokens.len()).max().unwrap_or(0);
    ensure!(
        longest > context,
        "no training text has the {} tokens of a context and what follows: the longest has \
         {longest}. Give longer ones by `--train-text`, or a smaller `--context`",
        context + 1
    );
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let round = move |round: u64| {
        let mut windows: Vec<&[u32]> = Vec::new();
        for Text { tokens, .. } in texts {
            let rest = tokens.len().saturating_sub(1) % context;
            // the first round is the same for every seed, but for its order
            let start = if round == 0 { 0 } else { random.random_range(0..=rest) };
            let last = tokens.len().saturating_sub(context);
            windows.extend((start..last).step_by(context).map(|at| &tokens[at..=at + context]));
        }
        // Fisher and Yates
        for i in (1..windows.len()).rev() {
            windows.swap(i, random.random_range(0..=i));
        }
        windows
    };
    Ok((0..).flat_map(round))
}
