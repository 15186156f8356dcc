//! The stream: filler, planted pairs, and the questions.
//!
//! Sizes are |x̂|², x̂ = d^(-1/4)·x, so that the score is q̂·k̂. The keys of the heads in
//! `data/heads.safetensors` (causal ones, without their first four tokens) have |k̂|² = 27 … 44, of
//! which .48 … .67 is one common mean, .07 … .11 what tells eight clusters apart, and .24 … .41 the
//! rest; values have .09 … .27, .15 … .51 and .39 … .69. So here:
//!
//! ```text
//! key of a token:     k = mean + topic + own                    |k̂|² = 18 + 4 + 14
//! its query:          q = mean + gain·(topic + own') + noise    |q̂|² = 18 + 1.25²·(4 + 14) + 3
//! a query for key k:  q = mean + gain·(k − mean) + noise
//! ```
//!
//! with `own'` of the law of `own`. One of eight topics holds for 64 tokens on average, then
//! another comes. So filler queries look at the present topic, and at a few tokens of it by chance.
//! A planted key is made as every other one: nothing marks it, so no memory can know it from its
//! key. The first four tokens are sinks: keys along the mean, values near zero. A planted value is
//! one of 64 random codes, filler values are `mean + topic + own` of the same size. The pairs come
//! in a row, as a list of facts, behind 128 tokens of filler. Each question is asked exactly
//! `distance` tokens after its pair, and forgotten again: it changes nothing for the next one.

use dijiang::projection;
use ndarray::{Array1, Array2, ArrayView1};
use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};

pub const HEAD_DIM: usize = 64;
pub const CLASSES: usize = 64;
pub const SINKS: usize = 4;

const LEAD: usize = 128;
/// More pairs of one stream are not asked for: they have much in common.
const MOST_ASKED: usize = 16;

const TOPICS: usize = 8;
const TOPIC_TOKENS: f64 = 64.0;
const MEAN: f32 = 18.0;
const TOPIC: f32 = 4.0;
const OWN: f32 = 14.0;
const GAIN: f32 = 1.25;
const NOISE: f32 = 3.0;
/// Keys of the sinks, in units of the mean key.
const SINK_KEY: f32 = 1.75;

const VALUE: f32 = 8.0;
const VALUE_SHARES: [f32; 3] = [0.2, 0.2, 0.6];
const SINK_VALUE: f32 = 0.1;

const READS: usize = 3;
const READ_WITHIN: usize = 100;

/// Whether a pair is looked at before it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    /// Never: the worst case of a memory that learns from the attention received.
    Silent,
    /// Three times within 100 tokens, as heads look again at what matters; less often where there
    /// are so many pairs that tokens do not suffice, since each token has one query.
    Refreshed,
}

impl Sort {
    pub const ALL: [Self; 2] = [Self::Silent, Self::Refreshed];

    pub fn name(self) -> &'static str {
        match self {
            Self::Silent => "silent",
            Self::Refreshed => "refreshed",
        }
    }

    pub fn title(self) -> String {
        match self {
            Self::Silent => {
                "Silent needles: no query asks for a pair before the question".to_owned()
            }
            Self::Refreshed => {
                format!(
                    "Refreshed needles: up to {READS} queries ask for each pair within \
                     {READ_WITHIN} tokens after it came"
                )
            }
        }
    }
}

/// A stream and its questions, in the order in which they are asked.
#[derive(Debug)]
pub struct Task {
    pub tokens: Tokens,
    pub questions: Vec<Question>,
    /// The row of a question is its place in the list.
    pub asking: Tokens,
    codes: Array2<f32>,
}

/// Queries, keys and values, `[tokens, HEAD_DIM]` each.
#[derive(Debug)]
pub struct Tokens {
    pub q: Array2<f32>,
    pub k: Array2<f32>,
    pub v: Array2<f32>,
}

#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// Tokens that come before it.
    pub position: usize,
    /// Its place among the distances.
    pub distance: usize,
    pub answer: usize,
    pair: usize,
}

impl Task {
    /// A stream with `load` pairs, each of which is asked for at every distance. The two sorts
    /// differ in nothing but the queries that look again.
    pub fn new(sort: Sort, load: usize, distances: &[usize], seed: u64) -> Self {
        let mut normal = Normal::new(seed);
        let codes = normal.codes();
        let place = |pair: usize| SINKS + LEAD + pair;
        let answers: Vec<usize> = (0..load).map(|_| normal.below(CLASSES)).collect();

        let asked = load.min(MOST_ASKED);
        let mut questions: Vec<Question> = (0..asked)
            .map(|i| i * load / asked)
            .flat_map(|pair| {
                distances.iter().enumerate().map(move |(i, distance)| (pair, i, distance))
            })
            .map(|(pair, i, tokens)| Question {
                position: place(pair) + tokens,
                distance: i,
                answer: answers[pair],
                pair,
            })
            .collect();
        questions.sort_by_key(|question| question.position);

        let mut filler = Filler::new(&mut normal);
        let count = questions.last().map_or(0, |question| question.position);
        let mut tokens = filler.tokens(&mut normal, count);
        for (mut key, mut value) in
            tokens.k.outer_iter_mut().zip(tokens.v.outer_iter_mut()).take(SINKS)
        {
            key.assign(&(&filler.key_mean * SINK_KEY));
            value *= SINK_VALUE;
        }
        for (pair, answer) in answers.iter().enumerate().filter(|(pair, _)| place(*pair) < count) {
            tokens.v.row_mut(place(pair)).assign(&codes.row(*answer));
        }
        let mut asking = filler.tokens(&mut normal, questions.len());
        for (mut query, question) in asking.q.outer_iter_mut().zip(&questions) {
            query.assign(&filler.query_for(&mut normal, tokens.k.row(place(question.pair))));
        }
        if sort == Sort::Refreshed {
            let mut taken = vec![false; count];
            for pair in 0..load {
                for _ in 0..READS {
                    let wished = place(pair) + 1 + normal.below(READ_WITHIN);
                    // the next token that reads nothing yet
                    let last = (place(pair) + READ_WITHIN).min(count - 1);
                    let Some(position) = (wished..=last).find(|position| !taken[*position]) else {
                        continue;
                    };
                    taken[position] = true;
                    let query = filler.query_for(&mut normal, tokens.k.row(place(pair)));
                    tokens.q.row_mut(position).assign(&query);
                }
            }
        }
        Self { tokens, questions, asking, codes }
    }

    /// The class whose code is nearest; codes have one length.
    pub fn nearest(&self, output: ArrayView1<'_, f32>) -> usize {
        let scores = self.codes.dot(&output);
        (0..CLASSES).max_by(|a, b| scores[*a].total_cmp(&scores[*b])).unwrap_or(0)
    }
}

struct Filler {
    key_mean: Array1<f32>,
    value_mean: Array1<f32>,
    key_topics: Vec<Array1<f32>>,
    value_topics: Vec<Array1<f32>>,
    topic: usize,
}

impl Filler {
    fn new(normal: &mut Normal) -> Self {
        let [mean, topic, _] = VALUE_SHARES.map(|share| share * VALUE);
        Self {
            key_mean: normal.vector(MEAN),
            value_mean: normal.vector(mean),
            key_topics: (0..TOPICS).map(|_| normal.vector(TOPIC)).collect(),
            value_topics: (0..TOPICS).map(|_| normal.vector(topic)).collect(),
            topic: 0,
        }
    }

    fn tokens(&mut self, normal: &mut Normal, count: usize) -> Tokens {
        let [mut q, mut k, mut v] = [(); 3].map(|()| Array2::zeros((count, HEAD_DIM)));
        for ((mut q, mut k), mut v) in
            q.outer_iter_mut().zip(k.outer_iter_mut()).zip(v.outer_iter_mut())
        {
            if normal.uniform() < 1.0 / TOPIC_TOKENS {
                self.topic = normal.below(TOPICS);
            }
            let key = |normal: &mut Normal| {
                &self.key_mean + &self.key_topics[self.topic] + normal.vector(OWN)
            };
            k.assign(&key(normal));
            let wanted = key(normal);
            q.assign(&self.query_for(normal, wanted.view()));
            let own = normal.vector(VALUE_SHARES[2] * VALUE);
            v.assign(&(&self.value_mean + &self.value_topics[self.topic] + own));
        }
        Tokens { q, k, v }
    }

    fn query_for(&self, normal: &mut Normal, key: ArrayView1<'_, f32>) -> Array1<f32> {
        &self.key_mean + (&key - &self.key_mean) * GAIN + normal.vector(NOISE)
    }
}

/// Seeded random numbers.
struct Normal(ChaCha8Rng);

impl Normal {
    fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Strictly between 0 and 1.
    fn uniform(&mut self) -> f64 {
        ((self.0.next_u64() >> 11) as f64 + 0.5) * 0.5_f64.powi(53)
    }

    fn below(&mut self, count: usize) -> usize {
        (self.uniform() * count as f64) as usize
    }

    /// A Gaussian vector with this mean |x̂|².
    fn vector(&mut self, squared: f32) -> Array1<f32> {
        // Σ x̂² = d^(-1/2) Σ x²
        let factor = (squared / (HEAD_DIM as f32).sqrt()).sqrt();
        let sample =
            || projection::normal_quantile(self.uniform()).map_or(0.0, |x| x as f32 * factor);
        Array1::from_shape_simple_fn(HEAD_DIM, sample)
    }

    /// `[CLASSES, HEAD_DIM]` random directions, of the length of values.
    fn codes(&mut self) -> Array2<f32> {
        let mut codes = Array2::zeros((CLASSES, HEAD_DIM));
        for mut code in codes.outer_iter_mut() {
            let vector = self.vector(VALUE);
            let length = vector.dot(&vector).sqrt();
            code.assign(&(vector * ((VALUE * (HEAD_DIM as f32).sqrt()).sqrt() / length)));
        }
        codes
    }
}
