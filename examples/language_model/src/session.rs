//! A loaded model with its texts; kernels by name become attention for its layers.

use crate::capture::Capture;
use crate::convert::learned::Learned;
use crate::gguf::Gguf;
use crate::kernels::{Exact, Kernel};
use crate::linear::Weights;
use crate::model::Model;
use crate::plan::{self, Choice, Plan};
use crate::recall::{Prompt, Score, Task, copying};
use crate::state_plan;
use crate::texts::{self, Corpus, Encoder, Text, TextPrint};
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result, anyhow, ensure};
use dijiang::{HeadErrors, MultiHead, StateFormat, StatePlan};
use indicatif::ProgressBar;
use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// A model, its tokenizer and the texts of a run. What is measured on the calibration text is
/// measured once.
pub struct Session {
    /// The model.
    pub model: Model,
    /// Its tokenizer, or why it cannot be used: token ids need none.
    tokenizer: Result<Tokenizer, String>,
    /// The texts.
    pub corpus: Corpus,
    /// The template of conversations, if the model has one.
    pub template: Option<String>,
    /// Tokens of the calibration text that are used.
    calibration_tokens: usize,
    capture: OnceCell<Capture>,
    errors: RefCell<HashMap<String, HeadErrors>>,
}

/// Attention for every layer of a model, with the choices it came from.
#[derive(Clone, Debug)]
pub struct Attentions {
    /// The model with what it learned for them, if it did.
    pub adapted: Option<Model>,
    /// One for each layer.
    pub layers: Vec<MultiHead<f32>>,
    /// The exact heads, if they were chosen.
    pub plan: Option<Plan>,
    /// The setting of every head, if it was planned.
    pub settings: Option<StatePlan>,
}

impl Session {
    /// Loads a GGUF file and the texts: those files, or the ones that come with the program.
    pub fn open(
        model: &Path,
        texts: &[PathBuf],
        calibration: &[PathBuf],
        calibration_tokens: usize,
        weights: Weights,
    ) -> Result<Self> {
        let mut file = Gguf::open(model)?;
        let place = || format!("in {}", model.display());
        // a model that cannot be run needs no look at its tokenizer
        let vocabulary = file.config().with_context(place)?.vocabulary;
        let tokenizer = Tokenizer::from_metadata(file.metadata()).and_then(|tokenizer| {
            let tokens = tokenizer.vocab_size();
            ensure!(
                tokens <= vocabulary,
                "it has {tokens} tokens, the embedding only {vocabulary}"
            );
            Ok(tokenizer)
        });
        let tokenizer =
            tokenizer.map_err(|why| format!("the tokenizer of the model cannot be used: {why:#}"));
        let with = Encoder { tokenizer: tokenizer.as_ref().map_err(String::as_str), vocabulary };
        let corpus = Corpus::open(texts, calibration, with)?;
        let template = file.text("tokenizer.chat_template").map(str::to_owned);
        let model = Model::from_gguf(&mut file, weights).with_context(place)?;
        Ok(Self { template, ..Self::of(model, tokenizer, corpus, calibration_tokens) })
    }

    /// A session of these parts.
    #[must_use]
    pub fn new(
        model: Model,
        tokenizer: Tokenizer,
        corpus: Corpus,
        calibration_tokens: usize,
    ) -> Self {
        Self::of(model, Ok(tokenizer), corpus, calibration_tokens)
    }

    fn of(
        model: Model,
        tokenizer: Result<Tokenizer, String>,
        corpus: Corpus,
        calibration_tokens: usize,
    ) -> Self {
        let (capture, errors) = (OnceCell::new(), RefCell::new(HashMap::new()));
        Self { model, tokenizer, corpus, template: None, calibration_tokens, capture, errors }
    }

    /// The tokenizer of the model.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().map_err(|why| {
            anyhow!(
                "{why}: use another model; `perplexity`, `plan` and `compare` can do without one \
                 where all texts are token ids (.json by `--text` and `--calibration`)"
            )
        })
    }

    /// The texts of these files.
    pub fn read(&self, files: &[PathBuf]) -> Result<Vec<Text>> {
        let tokenizer = self.tokenizer.as_ref().map_err(String::as_str);
        texts::read_all(files, Encoder { tokenizer, vocabulary: self.model.config().vocabulary })
    }

    /// The calibration text, as much of it as is used: the model is read with all of it in one
    /// context, so never more than it was trained on.
    pub fn calibration(&self) -> Result<Text> {
        let Text { name, tokens } = self.corpus.calibration()?;
        let most = self.calibration_tokens.min(self.model.config().context);
        Ok(Text { name: name.clone(), tokens: tokens[..tokens.len().min(most)].to_vec() })
    }

    /// What the heads are given on the calibration text.
    pub fn capture(&self) -> Result<&Capture> {
        if let Some(capture) = self.capture.get() {
            return Ok(capture);
        }
        let capture = Capture::of(&self.model, &self.calibration()?.tokens)?;
        Ok(self.capture.get_or_init(|| capture))
    }

    /// The error of a kernel in every kv head.
    pub fn errors(&self, kernel: &Kernel) -> Result<HeadErrors> {
        let name = kernel.alone().name().to_owned();
        if let Some(errors) = self.errors.borrow().get(&name) {
            return Ok(errors.clone());
        }
        let errors = plan::measure(kernel, self.model.config(), self.capture()?, self.warm_up()?)?;
        self.errors.borrow_mut().insert(name, errors.clone());
        Ok(errors)
    }

    /// Pairs that a model with these layers recalls in the prompts of the first seeds. The prose
    /// between lists is of the calibration text.
    pub fn recall(
        &self,
        attention: &Attentions,
        task: Task,
        prompts: usize,
        bar: &ProgressBar,
    ) -> Result<Score> {
        let mut score = Score::default();
        for seed in 0..prompts as u64 {
            let prompt = self.prompt(task, seed)?;
            score += prompt.score(attention.model(self), &attention.layers, bar)?;
        }
        Ok(score)
    }

    /// The prompt of a list.
    pub fn prompt(&self, task: Task, seed: u64) -> Result<Prompt> {
        let prose: &[u32] =
            if task.distance > 0 { &self.corpus.calibration()?.tokens } else { &[] };
        task.prompt(self.tokenizer()?, prose, seed)
    }

    /// Tokens that it copies of the first text, of so many or of all there are.
    pub fn copying(
        &self,
        attention: &Attentions,
        length: usize,
        bar: &ProgressBar,
    ) -> Result<Score> {
        let prompt = copying(self.first_text()?, self.copied(length)?)?;
        prompt.score(attention.model(self), &attention.layers, bar)
    }

    /// Tokens to copy, of so many or of all there are.
    pub fn copied(&self, length: usize) -> Result<usize> {
        Ok(length.min(self.first_text()?.tokens.len()))
    }

    /// The first text to evaluate on.
    pub fn first_text(&self) -> Result<&Text> {
        self.corpus.evaluation()?.first().context("there is no text to evaluate on")
    }

    /// The first tokens of the calibration text, which do not count in errors; a quarter of a text
    /// that is short.
    pub fn warm_up(&self) -> Result<usize> {
        Ok(plan::WARM_UP.min(self.calibration()?.tokens.len() / 4))
    }

    /// One warning where contexts are longer than those that the model was trained on; `read` says
    /// what is read at once, and how many tokens that is.
    #[must_use]
    pub fn beyond(&self, read: &[(&str, usize)]) -> Option<String> {
        let trained = self.model.config().context;
        let longer: Vec<String> = read
            .iter()
            .filter(|(_, tokens)| *tokens > trained)
            .map(|(what, tokens)| format!("{what} of {tokens} tokens"))
            .collect();
        (!longer.is_empty()).then(|| {
            format!(
                "warning: {}: more than the {trained} tokens of context that the model was trained \
                 on (`llama.context_length`), beyond which it is rarely of use",
                longer.join(", ")
            )
        })
    }

    /// Attention for the layers, by the name of a kernel.
    pub fn attention(&self, kernel: &Kernel) -> Result<Attentions> {
        let Some(path) = kernel.adapted() else { return self.attention_to_train(kernel) };
        let learned = Learned::load(path)?;
        learned.check(&self.model, path)?;
        let place = || format!("in {}", path.display());
        let for_kernel: Kernel = learned.about.kernel.parse().with_context(place)?;
        ensure!(
            for_kernel.is_same(kernel),
            "{} was learned for the kernel `{for_kernel}`: use it as `{for_kernel},adapted={}`",
            path.display(),
            path.display()
        );
        let plain = self.attention_to_train(kernel)?;
        let about = &learned.about;
        ensure!(
            plain.exact_heads() == about.exact,
            "{} was learned with other exact heads: pass the calibration text or the plan that \
             chose them",
            path.display()
        );
        ensure!(
            plain.settings_apart_from_bits() == about.settings,
            "{} was learned with another plan: pass that one",
            path.display()
        );
        let calibration = self.calibration_of(kernel)?;
        ensure!(
            calibration == about.calibration,
            "{} was learned for kernels fitted to {:?}, and these are fitted to {calibration:?}: \
             pass the same text by `--calibration`",
            path.display(),
            about.calibration
        );
        Ok(Attentions {
            adapted: Some(learned.model(&self.model).with_context(place)?),
            layers: learned.attention(&plain.layers).with_context(place)?,
            ..plain
        })
    }

    /// The calibration text, of a kernel that is fitted to it.
    pub fn calibration_of(&self, kernel: &Kernel) -> Result<Option<TextPrint>> {
        kernel.is_fitted().then(|| Ok(self.calibration()?.print())).transpose()
    }

    /// The same without what the model learned.
    pub fn attention_to_train(&self, kernel: &Kernel) -> Result<Attentions> {
        let config = self.model.config();
        let plan = match kernel.exact() {
            Exact::None => None,
            Exact::Count(count, by) => {
                let heads = config.layers * config.kv_heads;
                ensure!(
                    *count <= heads,
                    "`{kernel}` keeps {count} heads exact; the model has {heads} kv heads"
                );
                let by = by.as_deref().unwrap_or(kernel);
                let choice = self.errors(by)?.keep(*count);
                let text = self.calibration()?;
                Some(Plan::new(config, by, &text, self.warm_up()?, choice))
            }
            Exact::Plan(path) => match Choice::load(path, &self.model)? {
                Choice::Exact(plan) => Some(plan),
                Choice::Settings(settings) => {
                    let settings = match kernel.given_state() {
                        Some(format) => settings.with_state_format(format),
                        None => settings,
                    };
                    let layers = state_plan::layers(&settings, kernel, config)?;
                    return Ok(Attentions {
                        adapted: None,
                        layers,
                        plan: None,
                        settings: Some(settings),
                    });
                }
            },
        };
        let capture = if kernel.is_fitted() { Some(self.capture()?) } else { None };
        let exact = plan.as_ref().map_or(&[][..], |plan| plan.heads.heads());
        let layers =
            kernel.layers(config, capture, exact).with_context(|| format!("kernel `{kernel}`"))?;
        Ok(Attentions { adapted: None, layers, plan, settings: None })
    }
}

impl Attentions {
    /// The model that has these layers: that of the session, or what it became.
    #[must_use]
    pub fn model<'a>(&'a self, session: &'a Session) -> &'a Model {
        self.adapted.as_ref().unwrap_or(&session.model)
    }

    /// The setting of every head if it was planned, with states in full.
    #[must_use]
    pub fn settings_apart_from_bits(&self) -> Option<StatePlan> {
        self.settings.clone().map(|plan| plan.with_state_format(StateFormat::F32))
    }

    /// The kv heads that were chosen to be exact, `(layer, kv head)`.
    #[must_use]
    pub fn exact_heads(&self) -> Vec<(usize, usize)> {
        self.plan.iter().flat_map(|plan| plan.heads.heads()).copied().collect()
    }
}
