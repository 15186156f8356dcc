//! All measurements for a list of kernels.

use crate::decode::{Decode, decode};
use crate::kernels::{Kernel, state_bytes};
use crate::perplexity::{Losses, longest, losses, predicted};
use crate::progress;
use crate::recall::{Score, Task};
use crate::session::Session;
use anyhow::{Context, Result, bail, ensure};
use dijiang::{HeadErrors, StatePlan};
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};
use std::time::Instant;

/// What is measured of each kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    /// Predictions in a window of text.
    pub context: usize,
    /// Lists of names and codes.
    pub tasks: Vec<Task>,
    /// Prompts of each task, a seed each.
    pub prompts: usize,
    /// Tokens that are copied.
    pub copied: usize,
    /// Lengths of contexts at which decode steps are timed.
    pub lengths: Vec<usize>,
}

/// Everything that was found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// The model, as its file names it.
    pub model: String,
    /// Its layers.
    pub layers: usize,
    /// Heads of keys and values of a layer.
    pub kv_heads: usize,
    /// Predictions in a window of text.
    pub context: usize,
    /// Names of the texts.
    pub texts: Vec<String>,
    /// Name of the calibration text.
    pub calibration: String,
    /// Threads that were used.
    pub threads: usize,
    /// Steps of positions by which losses are averaged.
    pub bucket: usize,
    /// One for each kernel; the first is what the others are compared to.
    pub rows: Vec<Row>,
    /// Seconds it all took.
    pub seconds: f64,
}

/// What was found of a kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Its name.
    pub kernel: String,
    /// Mean negative log likelihood over the first half of the context and over the second, in
    /// nats.
    pub halves: [f64; 2],
    /// The same for each step of positions.
    pub by_position: Vec<f64>,
    /// The share of the time of reading spent in attention.
    pub attention_share: f64,
    /// Tokens a second in reading.
    pub tokens_per_second: f64,
    /// Pairs, distance and score of each list.
    pub recall: Vec<Recall>,
    /// Tokens copied.
    pub copying: Score,
    /// Decode steps at each length.
    pub decode: Vec<Decode>,
    /// Bytes of the state at the end of the context, by the formula.
    pub state_bytes: usize,
    /// Tokens and bytes of the state by the formula, at each length.
    pub state: Vec<(usize, usize)>,
    /// The setting of every head, if it was planned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<StatePlan>,
    /// The exact heads, if they were chosen, and the errors of all.
    pub plan: Option<Chosen>,
}

/// The score of one kind of list.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recall {
    /// Pairs of a list.
    pub pairs: usize,
    /// Tokens between the lists.
    pub distance: usize,
    /// Pairs recalled.
    pub score: Score,
}

/// A choice of exact heads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Chosen {
    /// Layer and kv head of each.
    pub exact: Vec<(usize, usize)>,
    /// Errors of all heads.
    pub errors: HeadErrors,
}

/// Positions over which losses are averaged.
const BUCKET: usize = 128;

/// Measures every kernel; `kernels` begins with the reference.
pub fn compare(session: &Session, kernels: &[Kernel], program: &Program) -> Result<Comparison> {
    let start = Instant::now();
    let texts = session.corpus.evaluation()?;
    let context = longest(texts, program.context);
    ensure!(
        context > 1,
        "the texts are too short to compare kernels: the longest window makes {context} \
         prediction{}, and both halves of a context need one: give longer texts by `--text`",
        if context == 1 { "" } else { "s" }
    );
    let bar = progress::bar(tokens(session, program)? * kernels.len())?;
    let mut rows = Vec::with_capacity(kernels.len());
    for kernel in kernels {
        bar.set_message(kernel.name().to_owned());
        rows.push(
            row(session, kernel, program, &bar).with_context(|| format!("measuring `{kernel}`"))?,
        );
    }
    bar.finish_and_clear();
    let config = session.model.config();
    Ok(Comparison {
        model: config.name.clone(),
        layers: config.layers,
        kv_heads: config.kv_heads,
        context,
        texts: texts.iter().map(|text| text.name.clone()).collect(),
        calibration: session.corpus.calibration().map_or("none", |text| &text.name).to_owned(),
        threads: rayon::current_num_threads(),
        bucket: BUCKET,
        rows,
        seconds: start.elapsed().as_secs_f64(),
    })
}

fn row(session: &Session, kernel: &Kernel, program: &Program, bar: &ProgressBar) -> Result<Row> {
    let attention = session.attention(kernel)?;
    let (model, layers) = (attention.model(session), &attention.layers);
    let config = model.config();
    let texts = session.corpus.evaluation()?;
    let found = losses(model, layers, texts, program.context, bar)?;
    let [Some(first), Some(second)] = found.halves() else { bail!("a half has no predictions") };
    let recall = |&task: &Task| -> Result<Recall> {
        let score = session.recall(&attention, task, program.prompts, bar)?;
        Ok(Recall { pairs: task.pairs, distance: task.distance, score })
    };
    let recall = program.tasks.iter().map(recall).collect::<Result<_>>()?;
    let copying = session.copying(&attention, program.copied, bar)?;
    let decode = decode(model, layers, &session.first_text()?.tokens, &program.lengths, bar)?;
    let read = predicted(texts, program.context);
    Ok(Row {
        kernel: kernel.name().to_owned(),
        halves: [first, second],
        by_position: by_position(&found),
        attention_share: found.time.attention.as_secs_f64() / found.time.total().as_secs_f64(),
        tokens_per_second: read as f64 / found.time.total().as_secs_f64(),
        recall,
        copying,
        decode,
        state_bytes: state_bytes(layers, config, found.longest())?,
        state: program
            .lengths
            .iter()
            .map(|&n| Ok((n, state_bytes(layers, config, n)?)))
            .collect::<Result<_>>()?,
        settings: attention.settings,
        plan: attention.plan.map(|plan| Chosen {
            exact: plan.heads.heads().to_vec(),
            errors: plan.heads.errors().clone(),
        }),
    })
}

/// Means over steps of [`BUCKET`] positions.
fn by_position(found: &Losses) -> Vec<f64> {
    let steps = found.longest().div_ceil(BUCKET);
    (0..steps).filter_map(|i| found.mean(i * BUCKET..(i + 1) * BUCKET)).collect()
}

/// Tokens that are read for one kernel.
fn tokens(session: &Session, program: &Program) -> Result<usize> {
    let mut sum = predicted(session.corpus.evaluation()?, program.context);
    for &task in &program.tasks {
        sum += session.prompt(task, 0)?.tokens.len() * program.prompts;
    }
    Ok(sum + 2 * session.copied(program.copied)? + program.lengths.last().unwrap_or(&0))
}
