//! The order in which a training reads its texts.

use crate::texts::Text;
use anyhow::{Result, ensure};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// `count` contexts of `context` tokens and the one behind, of all texts in a random order; once
/// all have been read, others that begin elsewhere.
pub fn contexts(texts: &[Text], context: usize, count: usize, seed: u64) -> Result<Vec<&[u32]>> {
    let longest = texts.iter().map(|text| text.tokens.len()).max().unwrap_or(0);
    ensure!(
        longest > context,
        "no training text has the {} tokens of a context and what follows: the longest has \
         {longest}. Give longer ones by `--train-text`, or a smaller `--context`",
        context + 1
    );
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut all: Vec<&[u32]> = Vec::with_capacity(count);
    let mut round = 0;
    while all.len() < count {
        let mut windows: Vec<&[u32]> = Vec::new();
        for text in texts {
            let rest = text.tokens.len().saturating_sub(1) % context;
            // the first round is the same for every seed, but for its order
            let start = if round == 0 { 0 } else { random.random_range(0..=rest) };
            let last = text.tokens.len().saturating_sub(context);
            windows
                .extend((start..last).step_by(context).map(|at| &text.tokens[at..=at + context]));
        }
        // Fisher and Yates
        for i in (1..windows.len()).rev() {
            windows.swap(i, random.random_range(0..=i));
        }
        windows.truncate(count - all.len());
        all.extend(windows);
        round += 1;
    }
    Ok(all)
}
