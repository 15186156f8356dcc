//! What conversions gained: their curves, and the models before and behind them.

use crate::convert::exact::Exact;
use crate::convert::held_out::{HeldOut, Said};
use crate::convert::learned::{About, Learned};
use crate::convert::options::Options;
use crate::convert::student::{Student, Trained};
use crate::kernels::Kernel;
use crate::perplexity::{longest, predicted, windows};
use crate::progress;
use crate::recall::{Score, Task};
use crate::session::{Attentions, Session};
use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Conversions of one model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Conversions {
    /// The model, as its file names it.
    pub model: String,
    /// What is evaluated on.
    pub texts: Vec<String>,
    /// Predictions in the longest window.
    pub context: usize,
    /// The exact model.
    pub exact: Measured,
    /// One for each file.
    pub rows: Vec<Row>,
}

/// A conversion.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// The file.
    pub file: PathBuf,
    /// What it says of itself.
    pub about: About,
    /// The model with the kernel, as its training found it.
    pub before: Measured,
    /// The model with what it learned.
    pub after: Measured,
}

/// What was found of one model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// What it says of the windows.
    pub said: Said,
    /// Pairs recalled of each list.
    pub recall: Vec<(Task, Score)>,
    /// Tokens copied.
    pub copying: Score,
}

/// What is measured.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Predictions of a window.
    pub context: usize,
    /// Lists of pairs.
    pub tasks: Vec<Task>,
    /// Prompts of each.
    pub prompts: usize,
    /// Tokens to copy.
    pub copied: usize,
}

/// Reads and measures the conversions of these files, all of the model of the session.
pub fn conversions(session: &Session, files: &[PathBuf], asked: &Asked) -> Result<Conversions> {
    ensure!(!files.is_empty(), "there is no conversion to compare: name files of `convert`");
    let texts = session.corpus.evaluation()?;
    let each = predicted(texts, asked.context);
    let bar = progress::bar(each * (2 * files.len() + 1))?;
    let windows = texts.iter().flat_map(|text| windows(text, asked.context)).collect();
    let held_out = HeldOut::new(windows, &Exact::new(&session.model, None)?)?;
    let measure = |attention: &Attentions| -> Result<Measured> {
        let model = attention.model(session);
        let said = held_out.measure(model, &attention.layers, &bar)?;
        let hidden = ProgressBar::hidden();
        let recall = |&task: &Task| -> Result<(Task, Score)> {
            Ok((task, session.recall(attention, task, asked.prompts, &hidden)?))
        };
        Ok(Measured {
            said,
            recall: asked.tasks.iter().map(recall).collect::<Result<_>>()?,
            copying: session.copying(attention, asked.copied, &hidden)?,
        })
    };
    bar.set_message("softmax");
    let exact = measure(&session.attention(&"softmax".parse()?)?)?;
    let mut rows: Vec<Row> = Vec::with_capacity(files.len());
    for file in files {
        let about = Learned::load(file)?.about;
        bar.set_message(about.kernel.clone());
        let kernel: Kernel =
            about.kernel.parse().with_context(|| format!("in {}", file.display()))?;
        let same = rows.iter().find(|row| row.about.begins_as(&about));
        let before = match same.map(|row| row.before.clone()) {
            Some(before) => {
                bar.inc(each as u64);
                before
            }
            None => measure(&untrained(session, &kernel, &about)?)?,
        };
        let after = measure(&session.attention(&kernel.with_adapted(file))?)?;
        rows.push(Row { file: file.clone(), about, before, after });
    }
    bar.finish_and_clear();
    Ok(Conversions {
        model: session.model.config().name.clone(),
        texts: texts.iter().map(|text| text.name.clone()).collect(),
        context: longest(texts, asked.context),
        exact,
        rows,
    })
}

/// The model with the kernel, as its training found it; maps are not fitted.
fn untrained(session: &Session, kernel: &Kernel, about: &About) -> Result<Attentions> {
    let mut attention = session.attention_to_train(kernel)?;
    let Options { trained, seed, .. } = about.options;
    if trained == Trained::RandomAttention {
        let student = Student::<f32>::new(&session.model, &attention.layers, trained, seed)?;
        let learned = Learned::of(student.variables(), about.clone())?;
        attention.adapted = Some(learned.model(&session.model)?);
    }
    Ok(attention)
}

impl Row {
    /// The kernel and what was trained of it.
    #[must_use]
    pub fn name(&self) -> String {
        let Options { trained, loss, seed, .. } = &self.about.options;
        let trained = match trained {
            Trained::LowRank(rank) => format!("rank {rank}"),
            Trained::Attention => "attention".to_owned(),
            Trained::RandomAttention => "random attention".to_owned(),
        };
        format!("{}, {trained}, {}, seed {seed}", self.about.kernel, loss.name())
    }

    /// Tokens trained on.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.about.options.tokens_of(self.about.history.steps.len())
    }
}

/// `divergence = a·tokens^slope`, fitted to a curve.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trend {
    /// The exponent.
    pub slope: f64,
    /// The logarithm of the factor.
    pub log_factor: f64,
}

impl Trend {
    /// By least squares of the logarithms over the points from an eighth of the tokens on; none
    /// where they are fewer than three.
    #[must_use]
    pub fn of(about: &About, half: usize) -> Option<Self> {
        let points = divergences(about, half);
        let last = points.last()?.0;
        let logs: Vec<[f64; 2]> = points
            .iter()
            .filter(|(tokens, nats)| *tokens >= last / 8.0 && *nats > 0.0)
            .map(|(tokens, nats)| [tokens.ln(), nats.ln()])
            .collect();
        if logs.len() < 3 {
            return None;
        }
        let mean = |i: usize| logs.iter().map(|log| log[i]).sum::<f64>() / logs.len() as f64;
        let [x, y] = [mean(0), mean(1)];
        let sum =
            |i: usize| logs.iter().map(|log| (log[0] - x) * (log[i] - [x, y][i])).sum::<f64>();
        let slope = sum(1) / sum(0);
        Some(Self { slope, log_factor: y - slope * x })
    }

    /// What it says for so many tokens.
    #[must_use]
    pub fn at(self, tokens: f64) -> f64 {
        (self.log_factor + self.slope * tokens.ln()).exp()
    }
}

/// `KL(exact ‖ trained)` on held-out text, by tokens trained; the point before the training is left
/// out.
#[must_use]
pub fn divergences(about: &About, half: usize) -> Vec<(f64, f64)> {
    let trained = about.history.points.iter().filter(|point| point.tokens > 0);
    trained.filter_map(|point| Some((point.tokens as f64, point.said.divergence[half]?))).collect()
}
