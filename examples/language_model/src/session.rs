//! A loaded model with its texts; kernels by name become attention for its layers.

use crate::capture::Capture;
use crate::gguf::Gguf;
use crate::kernels::{Exact, Kernel};
use crate::model::Model;
use crate::plan::{self, Plan};
use crate::recall::{Score, Task, copying};
use crate::texts::{Corpus, Text};
use crate::tokenizer::Tokenizer;
use anyhow::{Context, Result, ensure};
use dijiang::{HeadErrors, MultiHead};
use indicatif::ProgressBar;
use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// A model, its tokenizer and the texts of a run. What is measured on the calibration text is
/// measured once.
pub struct Session {
    /// The model.
    pub model: Model,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// The texts.
    pub corpus: Corpus,
    /// The template of conversations, if the model has one.
    pub template: Option<String>,
    /// Tokens of the calibration text that are used.
    calibration_tokens: usize,
    capture: OnceCell<Capture>,
    errors: RefCell<HashMap<String, HeadErrors>>,
}

/// Attention for every layer of a model, with the choice of heads it came from.
#[derive(Clone, Debug)]
pub struct Attentions {
    /// One for each layer.
    pub layers: Vec<MultiHead<f32>>,
    /// The exact heads.
    pub plan: Option<Plan>,
}

impl Session {
    /// Loads a GGUF file and the texts: those files, or the ones that come with the program.
    pub fn open(
        model: &Path,
        texts: &[PathBuf],
        calibration: Option<&Path>,
        calibration_tokens: usize,
    ) -> Result<Self> {
        let mut file = Gguf::open(model)?;
        let tokenizer =
            Tokenizer::from_metadata(file.metadata()).context("the tokenizer of the model")?;
        let model =
            Model::from_gguf(&mut file).with_context(|| format!("in {}", model.display()))?;
        ensure!(
            tokenizer.vocab_size() <= model.config().vocabulary,
            "the tokenizer has {} tokens, the embedding only {}",
            tokenizer.vocab_size(),
            model.config().vocabulary
        );
        let corpus = Corpus::open(texts, calibration, &tokenizer)?;
        let template = file.text("tokenizer.chat_template").map(str::to_owned);
        Ok(Self { template, ..Self::new(model, tokenizer, corpus, calibration_tokens) })
    }

    /// A session of these parts.
    #[must_use]
    pub fn new(
        model: Model,
        tokenizer: Tokenizer,
        corpus: Corpus,
        calibration_tokens: usize,
    ) -> Self {
        let (capture, errors) = (OnceCell::new(), RefCell::new(HashMap::new()));
        Self { model, tokenizer, corpus, template: None, calibration_tokens, capture, errors }
    }

    /// The calibration text, as much of it as is used.
    #[must_use]
    pub fn calibration(&self) -> Text {
        let Text { name, tokens } = &self.corpus.calibration;
        Text {
            name: name.clone(),
            tokens: tokens[..tokens.len().min(self.calibration_tokens)].to_vec(),
        }
    }

    /// What the heads are given on the calibration text.
    pub fn capture(&self) -> Result<&Capture> {
        if let Some(capture) = self.capture.get() {
            return Ok(capture);
        }
        let capture = Capture::of(&self.model, &self.calibration().tokens)?;
        Ok(self.capture.get_or_init(|| capture))
    }

    /// The error of a kernel in every kv head.
    pub fn errors(&self, kernel: &Kernel) -> Result<HeadErrors> {
        let name = kernel.alone().name().to_owned();
        if let Some(errors) = self.errors.borrow().get(&name) {
            return Ok(errors.clone());
        }
        let errors = plan::measure(kernel, self.model.config(), self.capture()?, self.warm_up())?;
        self.errors.borrow_mut().insert(name, errors.clone());
        Ok(errors)
    }

    /// Pairs that a model with these layers recalls in the prompts of the first seeds. The prose
    /// between lists is of the calibration text.
    pub fn recall(
        &self,
        layers: &[MultiHead<f32>],
        task: Task,
        prompts: u64,
        bar: &ProgressBar,
    ) -> Result<Score> {
        let mut score = Score::default();
        for seed in 0..prompts {
            let prompt = task.prompt(&self.tokenizer, &self.corpus.calibration.tokens, seed)?;
            score += prompt.score(&self.model, layers, bar)?;
        }
        Ok(score)
    }

    /// Tokens that it copies of the first text, of so many or of all there are.
    pub fn copying(
        &self,
        layers: &[MultiHead<f32>],
        length: usize,
        bar: &ProgressBar,
    ) -> Result<Score> {
        let text = &self.corpus.evaluation[0];
        copying(text, length.min(text.tokens.len()))?.score(&self.model, layers, bar)
    }

    /// The first tokens of the calibration text, which do not count in errors; a quarter of a text
    /// that is short.
    #[must_use]
    pub fn warm_up(&self) -> usize {
        plan::WARM_UP.min(self.calibration().tokens.len() / 4)
    }

    /// Attention for the layers, by the name of a kernel.
    pub fn attention(&self, kernel: &Kernel) -> Result<Attentions> {
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
                Some(Plan::new(config, by, &self.calibration(), self.warm_up(), choice))
            }
            Exact::Plan(path) => Some(Plan::load(path, config)?),
        };
        let capture = if kernel.is_fitted() { Some(self.capture()?) } else { None };
        let layers = kernel
            .layers(config, capture, plan.as_ref())
            .with_context(|| format!("kernel `{kernel}`"))?;
        Ok(Attentions { layers, plan })
    }
}
