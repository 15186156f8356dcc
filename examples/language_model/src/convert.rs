//! A pretrained model learns to live with another attention: its weights are trained until it says
//! what the exact model says.

pub mod contexts;
pub mod distill;
pub mod exact;
pub mod held_out;
pub mod learned;
pub mod loss;
mod ops;
pub mod options;
pub mod student;
pub mod variables;

pub use ops::Real;

use crate::convert::contexts::contexts;
use crate::convert::exact::Exact;
use crate::convert::held_out::HeldOut;
use crate::convert::learned::{About, History, Learned, Point, Step};
use crate::convert::loss::{Found, Goal, Question};
use crate::convert::options::{CHECKPOINT, LossKind, Options};
use crate::convert::student::Student;
use crate::convert::variables::AdamW;
use crate::kernels::Kernel;
use crate::model::Model;
use crate::session::Session;
use crate::texts::Text;
use anyhow::{Context, Error, Result, anyhow};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor};
use dijiang::MultiHead;
use indicatif::ProgressBar;
use ndarray::{ArrayD, IxDyn};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Predictions of a held-out window.
const HELD_OUT: usize = 2048;

/// A conversion to be done.
pub struct Conversion<'a> {
    /// The model and the held-out texts.
    pub session: &'a Session,
    /// The kernel that it learns to live with.
    pub kernel: &'a Kernel,
    /// What it is trained on.
    pub texts: &'a [Text],
    /// How.
    pub options: Options,
    /// Where what was learned is written.
    pub output: &'a Path,
    /// Keeps what the exact model says.
    pub exact: Option<&'a Path>,
}

/// What a checkpoint says of itself.
#[derive(Serialize, Deserialize)]
struct Saved {
    about: About,
    steps: usize,
}

/// A training on its way.
struct Run<'a> {
    conversion: &'a Conversion<'a>,
    layers: Vec<MultiHead<f32>>,
    student: Student<f32>,
    optimizer: AdamW,
    about: About,
    exact: Exact<'a>,
    held_out: HeldOut<'a>,
}

impl Conversion<'_> {
    /// Trains, from the last checkpoint if there is one, and writes the file, in a folder that is
    /// made if need be; one that is there already, and was made in the same way, is read. The bar
    /// is advanced by the tokens.
    pub fn run(&self, bar: &ProgressBar) -> Result<Learned> {
        let (options, session) = (&self.options, self.session);
        let mut order = contexts(self.texts, options.context, options.seed)?.peekable();
        let plain = session.attention_to_train(&self.kernel.in_full())?;
        let is_read = |text: &&Text| text.tokens.len() > options.context;
        let held_out = if options.points > 0 { session.corpus.evaluation()? } else { &[] };
        let about = About {
            model: session.model.fingerprint(),
            kernel: self.kernel.name().to_owned(),
            exact: plain.exact_heads(),
            settings: plain.settings_apart_from_bits(),
            calibration: session.calibration_of(self.kernel)?,
            options: options.clone(),
            texts: self.texts.iter().filter(is_read).map(Text::print).collect(),
            held_out: held_out.iter().map(Text::print).collect(),
            history: History::default(),
        };
        if self.output.exists() {
            let found = Learned::load(self.output)?;
            about.check_same(&found.about, self.output)?;
            bar.inc(options.tokens_of(options.steps()) as u64);
            return Ok(found);
        }
        if let Some(folder) = self.output.parent() {
            let made = fs::create_dir_all(folder);
            made.with_context(|| format!("cannot make {}", folder.display()))?;
        }
        let mut run = Run::new(self, plain.layers, about)?;
        let first = match run.resume()? {
            Some(first) => first,
            None => {
                run.prepare(order.peek().copied().unwrap_or_default(), bar)?;
                0
            }
        };
        bar.inc(options.tokens_of(first) as u64);
        for step in 0..options.steps() {
            let batch: Vec<&[u32]> = order.by_ref().take(options.batch).collect();
            if step < first {
                continue;
            }
            let start = Instant::now();
            let found = match run.gradients(step, &batch) {
                Ok(found) => found,
                Err(error) => return run.stopped(step, error),
            };
            if run.about.history.diverges(found.loss) {
                return run.stopped(step, anyhow!("diverged, to a loss of {:.3}", found.loss));
            }
            if step.is_multiple_of(CHECKPOINT) && step > first {
                run.checkpoint(step)?;
            }
            let gradient = run.optimizer.step(options.learning_rate(step))?;
            if !gradient.is_finite() {
                return run.stopped(step, anyhow!("diverged, to a gradient of {gradient}"));
            }
            let history = &mut run.about.history;
            history.seconds += start.elapsed().as_secs_f64();
            history.steps.push(Step { gradient, ..found });
            bar.inc(options.tokens_of(1) as u64);
            bar.set_message(history.message(options));
            let done = step + 1;
            if options.is_point(done)
                && let Err(error) = run.point(done)
            {
                return run.stopped(done, error);
            }
        }
        let learned = Learned::of(run.student.variables(), run.about.clone())?;
        learned.save(self.output)?;
        let _ = fs::remove_file(self.checkpoint_path());
        Ok(learned)
    }

    fn checkpoint_path(&self) -> PathBuf {
        let mut path = self.output.as_os_str().to_owned();
        path.push(".checkpoint");
        path.into()
    }
}

/// What a step has for each of its contexts.
struct Lesson<'a> {
    model: &'a Model,
    student: &'a Student<f32>,
    exact: &'a Exact<'a>,
    options: &'a Options,
    /// Where the loss is computed.
    places: Vec<usize>,
}

impl Lesson<'_> {
    /// The loss of a context and the token behind it, and its gradients.
    fn learn(&self, tokens: &[u32]) -> Result<(Found, GradStore)> {
        let Self { model, student, exact, options, places } = self;
        let (next, read) = (&tokens[1..], &tokens[..options.context]);
        let exact = match options.loss {
            LossKind::Kl => Some(exact.hidden(read)?),
            LossKind::Ce => None,
        };
        let embedded = model.embedded(read)?;
        let shape = embedded.dim();
        let embedded = Tensor::from_vec(embedded.into_raw_vec_and_offset().0, shape, &Device::Cpu)?;
        let hidden = student.forward(embedded)?;
        let goal = exact.as_deref().map_or(Goal::Text, Goal::Exact);
        let (found, gradient) = ops::read([&hidden], |[hidden]| {
            Question { hidden, head: student.head(), places, next, goal }.gradient()
        })??;
        let weights = Tensor::from_vec(gradient, shape, &Device::Cpu)?;
        let gradients = (&hidden * weights)?.sum_all()?.backward()?;
        Ok((found, gradients))
    }
}

/// What is trained, with these layers of attention, before its first step.
fn begin(conversion: &Conversion<'_>, layers: &[MultiHead<f32>]) -> Result<(Student<f32>, AdamW)> {
    let options = &conversion.options;
    let model = &conversion.session.model;
    let student = Student::new(model, layers, options.trained, options.seed)?;
    let optimizer = AdamW::new(student.variables(), options.weight_decay, options.clip);
    Ok((student, optimizer))
}

impl<'a> Run<'a> {
    fn new(
        conversion: &'a Conversion<'a>,
        layers: Vec<MultiHead<f32>>,
        about: About,
    ) -> Result<Self> {
        let options = &conversion.options;
        let (student, optimizer) = begin(conversion, &layers)?;
        let exact = Exact::new(&conversion.session.model, conversion.exact)?;
        // the first window of each text
        let texts = if options.points > 0 { conversion.session.corpus.evaluation()? } else { &[] };
        let first = |text: &'a Text| &text.tokens[..text.tokens.len().min(HELD_OUT + 1)];
        let held_out = HeldOut::new(texts.iter().map(first).collect(), &exact)?;
        Ok(Self { conversion, layers, student, optimizer, about, exact, held_out })
    }

    /// Before the first step: maps learn to answer as exact attention does, the first point, and
    /// the first checkpoint.
    fn prepare(&mut self, tokens: &[u32], bar: &ProgressBar) -> Result<()> {
        let (conversion, options) = (self.conversion, &self.conversion.options);
        if options.distill > 0 && self.layers.iter().any(|layer| !layer.parameters().is_empty()) {
            let tokens = &tokens[..options.context];
            let model = &conversion.session.model;
            self.layers = distill::distill(model, &self.layers, tokens, options.distill, bar)?;
            (self.student, self.optimizer) = begin(conversion, &self.layers)?;
        }
        if options.is_point(0) {
            self.point(0)?;
        }
        self.checkpoint(0)
    }

    /// The mean loss of some contexts; its gradients wait in the optimizer.
    fn gradients(&mut self, step: usize, batch: &[&[u32]]) -> Result<Step> {
        let Self { conversion: Conversion { session, options, .. }, student, exact, .. } = self;
        let places = options.places(step).collect();
        let lesson = Lesson { model: &session.model, student, exact, options, places };
        // each on a thread of its own: what is too small to be shared out is then done at once
        let found: Vec<(Found, GradStore)> =
            batch.par_iter().map(|tokens| lesson.learn(tokens)).collect::<Result<_>>()?;
        let share = 1.0 / batch.len() as f64;
        let mut mean = Step { loss: 0.0, nats: 0.0, exact: 0.0, gradient: 0.0 };
        for (Found { loss, nats: [nats, exact] }, gradients) in &found {
            mean.loss += share * loss;
            mean.nats += share * nats;
            mean.exact += share * exact;
            self.optimizer.add(gradients, share)?;
        }
        Ok(mean)
    }

    /// Measures the model as it is now.
    fn point(&mut self, done: usize) -> Result<()> {
        let learned = Learned::of(self.student.variables(), self.about.clone())?;
        let model = learned.model(&self.conversion.session.model)?;
        let layers = learned.attention(&self.layers)?;
        let said = self.held_out.measure(&model, &layers, &ProgressBar::hidden())?;
        let tokens = self.conversion.options.tokens_of(done);
        self.about.history.points.push(Point { tokens, said });
        Ok(())
    }

    /// Writes all that is needed to go on.
    fn checkpoint(&self, steps: usize) -> Result<()> {
        let mut arrays = BTreeMap::new();
        for (variable, slot) in self.optimizer.iter() {
            let shape = IxDyn(variable.var.dims());
            let numbers = variable.var.flatten_all()?.to_vec1::<f32>()?;
            let parts = [("", numbers), (MEAN, slot.mean.clone()), (SQUARE, slot.square.clone())];
            for (part, numbers) in parts {
                let array = ArrayD::from_shape_vec(shape.clone(), numbers)?;
                arrays.insert(format!("{}{part}", variable.name), array);
            }
        }
        let saved = Saved { about: self.about.clone(), steps };
        let about = serde_json::to_string(&saved)?;
        learned::save(&self.conversion.checkpoint_path(), &arrays, &about)
    }

    /// Goes on from the last checkpoint, if there is one; gives the steps that were made.
    fn resume(&mut self) -> Result<Option<usize>> {
        let path = self.conversion.checkpoint_path();
        if !path.exists() {
            return Ok(None);
        }
        let (mut arrays, about) = learned::load(&path)?;
        let saved: Saved = serde_json::from_str(&about)
            .with_context(|| format!("{} was written by another version", path.display()))?;
        self.about.check_same(&saved.about, &path)?;
        let mut take = |name: String| -> Result<ArrayD<f32>> {
            arrays.remove(&name).with_context(|| format!("`{name}` is missing in a checkpoint"))
        };
        let mut means = Vec::new();
        for variable in self.student.variables().iter() {
            let name = &variable.name;
            let numbers = take(name.clone())?.into_raw_vec_and_offset().0;
            variable.var.set(&Tensor::from_vec(numbers, variable.var.shape(), &Device::Cpu)?)?;
            let [mean, square] = [MEAN, SQUARE].map(|part| take(format!("{name}{part}")));
            means.push([mean?, square?].map(|array| array.into_raw_vec_and_offset().0));
        }
        self.optimizer.resume(saved.steps, means)?;
        self.about = saved.about;
        Ok(Some(saved.steps))
    }

    /// Keeps the last good state, and says so; there is none before the first step.
    fn stopped(&mut self, step: usize, why: Error) -> Result<Learned> {
        let good = self.resume()?.unwrap_or(0);
        if step == 0 {
            return Err(why.context("the training cannot begin"));
        }
        let learned = Learned::of(self.student.variables(), self.about.clone())?;
        learned.save(self.conversion.output)?;
        Err(why.context(format!(
            "the training stopped at step {step}: {} holds what was learned in {good} steps, the \
             last good state; try a lower `--learning-rate`",
            self.conversion.output.display()
        )))
    }
}

const MEAN: &str = "#mean";
const SQUARE: &str = "#square";

impl History {
    /// The mean loss of the last steps, and of the first ones.
    fn trend(&self) -> Option<[f64; 2]> {
        const STEPS: usize = 8;
        let mean =
            |steps: &[Step]| steps.iter().map(|step| step.loss).sum::<f64>() / steps.len() as f64;
        let count = self.steps.len().min(STEPS);
        let last = &self.steps[self.steps.len() - count..];
        (count > 0).then(|| [mean(last), mean(&self.steps[..count])])
    }

    /// Whether a loss is no number, or far above those of the beginning.
    fn diverges(&self, loss: f64) -> bool {
        !loss.is_finite() || self.trend().is_some_and(|[_, first]| loss > 3.0 * first + 1.0)
    }

    /// The loss and the speed.
    fn message(&self, options: &Options) -> String {
        let tokens = options.tokens_of(1) as f64 * self.steps.len() as f64;
        let loss = self.trend().map_or(f64::NAN, |[last, _]| last);
        format!("loss {loss:.4}, {:.0} tokens/s", tokens / self.seconds.max(1e-9))
    }
}
