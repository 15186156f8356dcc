//! The command line.

use crate::hybrids::{Hybrid, Sizes};
use crate::kernels::Kernel;
use crate::rivals::Rival;
use clap::Parser;
use std::path::PathBuf;

const LONG_HELP: &str = "\
Measures how close attention kernels come to softmax attention.

Without arguments it runs on five real attention heads that are embedded in the program, and on \
                         synthetic Gaussian queries and keys of growing norm. It prints a table, \
                         and writes a CSV file and one HTML page.

YOUR OWN QUERIES, KEYS AND VALUES

--input takes a safetensors file. For each head it needs the tensors

    <head>/q   <head>/k   <head>/v        (or <head>/test/q, <head>/test/k, <head>/test/v)

of shape [tokens, d], [heads, tokens, d] or [batch, heads, tokens, d] and type F32, F16, BF16 or \
                         F64; k and v may have fewer heads than q, each for a group of them; q \
                         and k as the model multiplies them, after the rotary embedding and \
                         without the factor 1/sqrt(d). `wpff-weighted`, \
                         `hybrid-taylor`, `hybrid-heavy` and one `hybrid-ward` are fitted to

    <head>/calibration/q   <head>/calibration/k        (optional; v may be there too)

of another text. If those are every third token, say, the metadata entry \
                         `<head>/calibration/stride` must be \"3\". The metadata entry \
                         `<head>/causal`, \"true\" or \"false\", tells whether a token sees later \
                         ones; without it a head is causal. To dump a head from a PyTorch model:

    from safetensors.torch import save_file
    tensors = {}
    # in the attention layer, after the rotary embedding; q, k, v are [batch, heads, tokens, d]
    for name, x in {\"q\": q, \"k\": k, \"v\": v}.items():
        tensors[f\"layer5/{name}\"] = x.float().contiguous().cpu()
    save_file(tensors, \"heads.safetensors\", metadata={\"layer5/causal\": \"true\"})";

/// Measures how close attention kernels come to softmax attention.
#[derive(Debug, Parser)]
#[command(name = "approximation_error", version, long_about = LONG_HELP)]
pub struct Args {
    /// A safetensors file with your own q, k, v, instead of the embedded heads (see --help for the
    /// names)
    #[arg(long, value_name = "FILE")]
    pub input: Option<PathBuf>,

    /// Kernels to measure, by name; `maps`, `hybrids` and `rivals` stand for all of a kind
    /// [default: all]
    #[arg(long, value_name = "A,B,..", value_delimiter = ',')]
    kernels: Vec<String>,

    /// Numbers of features to measure [default: 16,64,256,1024]
    #[arg(long, value_name = "M,M,..", value_delimiter = ',')]
    features: Vec<usize>,

    /// Seeds of every random map [default: 5]
    #[arg(long, value_name = "N")]
    seeds: Option<u64>,

    /// Take every head as causal
    #[arg(long, conflicts_with = "full")]
    causal: bool,

    /// Take every head as bidirectional
    #[arg(long)]
    full: bool,

    /// A run of a few seconds: fewer tokens, features, seeds and norms
    #[arg(long)]
    pub quick: bool,

    /// Where the CSV file and the HTML page go
    #[arg(long, value_name = "DIR", default_value = "target/approximation_error")]
    pub output: PathBuf,
}

/// What a run measures: the arguments, checked, with their defaults filled in.
#[derive(Debug)]
pub struct Plan {
    pub kernels: Vec<Kernel>,
    pub hybrids: Vec<Hybrid>,
    pub rivals: Vec<Rival>,
    /// The sizes of the hybrids.
    pub sizes: Sizes,
    pub features: Vec<usize>,
    pub seeds: u64,
    /// `Some` overrides what the file says.
    pub causal: Option<bool>,
    /// Tokens of a head that are measured, at most.
    pub tokens: usize,
    /// The norms |x̂|² of the synthetic inputs.
    pub norms: Vec<f64>,
    pub quick: bool,
    /// The command that repeats this run, free of paths.
    pub command: String,
}

/// What was named, by kind.
type Chosen = (Vec<Kernel>, Vec<Hybrid>, Vec<Rival>);

/// More tokens would need gigabytes for the exact attention matrix.
pub const MOST_TOKENS: usize = 8192;
const MOST_FEATURES: usize = 65_536;

impl Args {
    /// Checks the arguments and fills in the defaults.
    pub fn plan(&self) -> Result<Plan, String> {
        let (kernels, hybrids, rivals) = self.chosen_kernels()?;
        let mut features = match (self.features.is_empty(), self.quick) {
            (false, _) => self.features.clone(),
            (true, true) => vec![16, 64],
            (true, false) => vec![16, 64, 256, 1024],
        };
        features.sort_unstable();
        features.dedup();
        if let Some(m) = features.iter().find(|m| **m == 0 || **m > MOST_FEATURES) {
            return Err(format!(
                "--features {m} cannot be used: pass numbers from 1 to {MOST_FEATURES}"
            ));
        }
        let seeds = self.seeds.unwrap_or(if self.quick { 2 } else { 5 });
        if !(1..=1000).contains(&seeds) {
            return Err(format!("--seeds {seeds} cannot be used: pass a number from 1 to 1000"));
        }
        Ok(Plan {
            kernels,
            hybrids,
            rivals,
            sizes: if self.quick { Sizes::quick() } else { Sizes::standard() },
            features,
            seeds,
            causal: if self.causal { Some(true) } else { self.full.then_some(false) },
            tokens: if self.quick { 128 } else { MOST_TOKENS },
            norms: if self.quick { vec![1.0, 4.0] } else { vec![0.5, 1.0, 2.0, 4.0, 8.0, 16.0] },
            quick: self.quick,
            command: self.command(),
        })
    }

    /// Each once, in the order they were named.
    fn chosen_kernels(&self) -> Result<Chosen, String> {
        if self.kernels.is_empty() {
            return Ok((Kernel::ALL.to_vec(), Hybrid::ALL.to_vec(), Rival::ALL.to_vec()));
        }
        let (mut kernels, mut hybrids, mut rivals) = (Vec::new(), Vec::new(), Vec::new());
        for name in &self.kernels {
            let chosen = |kind: &str, kernel: &str| [kind, kernel].contains(&name.trim());
            let before = kernels.len() + hybrids.len() + rivals.len();
            kernels.extend(Kernel::ALL.into_iter().filter(|kernel| chosen("maps", kernel.name())));
            hybrids
                .extend(Hybrid::ALL.into_iter().filter(|hybrid| chosen("hybrids", hybrid.name())));
            rivals.extend(Rival::ALL.into_iter().filter(|rival| chosen("rivals", rival.name())));
            if kernels.len() + hybrids.len() + rivals.len() == before {
                let names = Kernel::ALL.iter().map(|kernel| kernel.name());
                let names = names.chain(Hybrid::ALL.iter().map(|hybrid| hybrid.name()));
                let names: Vec<_> =
                    names.chain(Rival::ALL.iter().map(|rival| rival.name())).collect();
                return Err(format!(
                    "`{name}` is not a kernel: choose from maps, hybrids, rivals, {}",
                    names.join(", ")
                ));
            }
        }
        Ok((each_once(&kernels), each_once(&hybrids), each_once(&rivals)))
    }

    fn command(&self) -> String {
        let mut command = "cargo run --release --example approximation_error".to_owned();
        let mut options = Vec::new();
        if let Some(name) = self.input.as_ref().and_then(|path| path.file_name()) {
            options.push(format!("--input {}", name.to_string_lossy()));
        }
        if !self.kernels.is_empty() {
            options.push(format!("--kernels {}", self.kernels.join(",")));
        }
        if !self.features.is_empty() {
            let features: Vec<_> = self.features.iter().map(usize::to_string).collect();
            options.push(format!("--features {}", features.join(",")));
        }
        options.extend(self.seeds.map(|seeds| format!("--seeds {seeds}")));
        let flags = [(self.causal, "--causal"), (self.full, "--full"), (self.quick, "--quick")];
        options.extend(flags.into_iter().filter(|(on, _)| *on).map(|(_, flag)| flag.to_owned()));
        if !options.is_empty() {
            command.push_str(" -- ");
            command.push_str(&options.join(" "));
        }
        command
    }
}

fn each_once<K: Copy + PartialEq>(all: &[K]) -> Vec<K> {
    all.iter()
        .enumerate()
        .filter(|(i, kernel)| !all[..*i].contains(kernel))
        .map(|(_, kernel)| *kernel)
        .collect()
}
