//! Recall of far facts: lists of names and codes, listed again in another order, and a text copied.

use crate::model::Model;
use crate::perplexity::predictions;
use crate::texts::Text;
use crate::tokenizer::Tokenizer;
use anyhow::{Result, ensure};
use dijiang::MultiHead;
use indicatif::ProgressBar;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// A list of pairs, some prose, and the list again. The second list is given to the model as it is;
/// a pair is recalled where each token of its code is the one the model would have chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Names with a code of four digits.
    pub pairs: usize,
    /// Tokens of prose between the lists.
    pub distance: usize,
}

/// A prompt, and where in it the answers are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// All of it.
    pub tokens: Vec<u32>,
    /// For each answer the places of its tokens.
    pub answers: Vec<std::ops::Range<usize>>,
}

/// Answers found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Score {
    /// Answers that were right.
    pub right: usize,
    /// Answers asked for.
    pub asked: usize,
}

/// How many pairs a list can have.
pub const MOST_PAIRS: usize = NAMES.len();

const NAMES: [&str; 80] = [
    "Adam",
    "Alice",
    "Amanda",
    "Andrew",
    "Anna",
    "Arthur",
    "Barbara",
    "Benjamin",
    "Beth",
    "Brian",
    "Carol",
    "Charles",
    "Chris",
    "Claire",
    "Daniel",
    "David",
    "Deborah",
    "Donald",
    "Dorothy",
    "Edward",
    "Elizabeth",
    "Emily",
    "Emma",
    "Eric",
    "Frank",
    "Gary",
    "George",
    "Grace",
    "Hannah",
    "Harold",
    "Helen",
    "Henry",
    "Isaac",
    "Jack",
    "Jacob",
    "James",
    "Jane",
    "Jason",
    "Jennifer",
    "Jessica",
    "John",
    "Joseph",
    "Joshua",
    "Judy",
    "Julia",
    "Karen",
    "Kate",
    "Kenneth",
    "Kevin",
    "Larry",
    "Laura",
    "Linda",
    "Lisa",
    "Louis",
    "Lucy",
    "Margaret",
    "Maria",
    "Mark",
    "Martin",
    "Mary",
    "Matthew",
    "Michael",
    "Nancy",
    "Nathan",
    "Oliver",
    "Patrick",
    "Paul",
    "Peter",
    "Rachel",
    "Richard",
    "Robert",
    "Roger",
    "Ruth",
    "Samuel",
    "Sarah",
    "Simon",
    "Stephen",
    "Susan",
    "Thomas",
    "Victor",
];

impl Task {
    /// The prompt of a seed: names, codes and the second order are drawn from it. `prose` fills the
    /// distance, repeated where it is short.
    pub fn prompt(&self, tokenizer: &Tokenizer, prose: &[u32], seed: u64) -> Result<Prompt> {
        ensure!(
            (1..=MOST_PAIRS).contains(&self.pairs),
            "a list has 1 to {MOST_PAIRS} pairs, not {}",
            self.pairs
        );
        ensure!(
            self.distance == 0 || !prose.is_empty(),
            "there is no prose to put between the lists"
        );
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut names = NAMES;
        names.shuffle(&mut random);
        let mut pairs: Vec<(&str, String)> = names[..self.pairs]
            .iter()
            .map(|&name| (name, random.random_range(1000..10_000).to_string()))
            .collect();
        let mut prompt = Prompt {
            tokens: tokenizer.encode("Here is a list of names and their codes.\n\n")?,
            answers: vec![],
        };
        let line = |prompt: &mut Prompt, (name, code): &(&str, String)| -> Result<()> {
            prompt.tokens.extend(tokenizer.encode_more(&format!("{name}:"))?);
            let code = tokenizer.encode_more(&format!(" {code}"))?;
            // the space before the code is not part of the answer where it is a token of its own
            let first = usize::from(tokenizer.decode(&code[..1])?.trim().is_empty());
            let start = prompt.tokens.len();
            prompt.answers.push(start + first..start + code.len());
            prompt.tokens.extend(code);
            prompt.tokens.extend(tokenizer.encode_more("\n")?);
            Ok(())
        };
        for pair in &pairs {
            line(&mut prompt, pair)?;
        }
        prompt.answers.clear();
        prompt.tokens.extend(tokenizer.encode_more("\n")?);
        prompt.tokens.extend(prose.iter().cycle().take(self.distance));
        prompt
            .tokens
            .extend(tokenizer.encode_more("\nHere is the same list again, in another order.\n\n")?);
        pairs.shuffle(&mut random);
        for pair in &pairs {
            line(&mut prompt, pair)?;
        }
        Ok(prompt)
    }
}

/// A text of `length` tokens, and the same once more: every token of the second is an answer.
pub fn copying(text: &Text, length: usize) -> Result<Prompt> {
    ensure!(
        (2..=text.tokens.len()).contains(&length),
        "cannot copy {length} tokens of `{}`, which has {}: at least 2 are needed",
        text.name,
        text.tokens.len()
    );
    let once = &text.tokens[..length];
    Ok(Prompt {
        tokens: [once, once].concat(),
        answers: (length + 1..2 * length).map(|i| i..i + 1).collect(),
    })
}

impl Prompt {
    /// The answers that a model finds.
    pub fn score(
        &self,
        model: &Model,
        layers: &[MultiHead<f32>],
        bar: &ProgressBar,
    ) -> Result<Score> {
        // the token before says what comes next
        let places: Vec<usize> =
            self.answers.iter().cloned().flatten().map(|place| place - 1).collect();
        let found = predictions(model, layers, &self.tokens, &places, bar)?;
        let mut found = found.iter();
        let right = |answer: &std::ops::Range<usize>| {
            let of_answer: Vec<&u32> = found.by_ref().take(answer.len()).collect();
            of_answer.into_iter().eq(&self.tokens[answer.clone()])
        };
        Ok(Score {
            right: self.answers.iter().map(right).filter(|&right| right).count(),
            asked: self.answers.len(),
        })
    }
}

impl Score {
    /// The share that was right.
    #[must_use]
    pub fn share(&self) -> f64 {
        self.right as f64 / self.asked.max(1) as f64
    }
}

impl std::ops::AddAssign for Score {
    fn add_assign(&mut self, other: Self) {
        self.right += other.right;
        self.asked += other.asked;
    }
}
