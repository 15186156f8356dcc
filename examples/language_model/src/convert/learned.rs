//! What a conversion learned, as a file, and the model with it.

use crate::convert::held_out::Said;
use crate::convert::options::Options;
use crate::convert::student::{MATRICES, SCALE, Trained};
use crate::convert::variables::Variables;
use crate::linear::Linear;
use crate::model::Model;
use crate::texts::TextPrint;
use anyhow::{Context, Result, bail, ensure};
use candle_core::DType;
use dijiang::{MultiHead, Parameters, StatePlan};
use ndarray::{Array1, Array2, ArrayD, Dimension, IxDyn};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

/// The place of all that is no tensor in a file.
const ABOUT: &str = "dijiang";

/// What a file says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct About {
    /// The fingerprint of the model that was converted.
    pub model: String,
    /// The kernel.
    pub kernel: String,
    /// The exact kv heads `(layer, kv head)` beside it.
    pub exact: Vec<(usize, usize)>,
    /// The setting of every head, if it was planned.
    pub settings: Option<StatePlan>,
    /// The calibration text, if the kernel was fitted to it.
    pub calibration: Option<TextPrint>,
    /// How it was trained.
    pub options: Options,
    /// What it was trained on.
    pub texts: Vec<TextPrint>,
    /// What the points of the curve were measured on.
    pub held_out: Vec<TextPrint>,
    /// How it went.
    pub history: History,
}

impl About {
    /// Refuses what was done in another way: says in what.
    pub fn check_same(&self, found: &Self, path: &Path) -> Result<()> {
        let without_history = |about: &Self| {
            serde_json::to_value(Self { history: History::default(), ..about.clone() })
        };
        let (mine, other) = (without_history(self)?, without_history(found)?);
        let all = mine.as_object().into_iter().flatten();
        let differs = all.filter(|(name, value)| other.get(name) != Some(value));
        let differs: Vec<String> = differs
            .map(|(name, value)| {
                let other = other.get(name).unwrap_or(&serde_json::Value::Null);
                format!("`{name}` {other} there, {value} here")
            })
            .collect();
        ensure!(
            differs.is_empty(),
            "{} is of another conversion: {}. Give another name by `--output`, or remove it",
            path.display(),
            differs.join("; ")
        );
        Ok(())
    }

    /// Whether the model was the same before this training and the other.
    #[must_use]
    pub fn begins_as(&self, other: &Self) -> bool {
        let random = |about: &Self| {
            let Options { trained, seed, .. } = about.options;
            (trained == Trained::RandomAttention).then_some(seed)
        };
        self.kernel == other.kernel && random(self) == random(other)
    }

    /// What was gained, on held-out text.
    #[must_use]
    pub fn summary(&self) -> String {
        let Self { kernel, history, options, .. } = self;
        let mut lines = vec![format!(
            "{kernel}: {} tokens in {:.0} s, {:.0} tokens/s",
            options.tokens_of(history.steps.len()),
            history.seconds,
            options.tokens_of(history.steps.len()) as f64 / history.seconds.max(1e-9)
        )];
        let half = |point: &Point, i: usize| -> Option<String> {
            let Said { halves, exact, divergence } = point.said;
            let (nats, exact) = (halves[i]?, exact[i]?);
            let (ppl, more) = (nats.exp(), 100.0 * (nats - exact).exp_m1());
            Some(format!("{ppl:>10.3} {more:>+9.2} %  KL {:.4}", divergence[i]?))
        };
        if !history.points.is_empty() {
            lines.push(format!("{:>10}  {:>32}  {:>32}", "tokens", "first half", "second half"));
        }
        for point in &history.points {
            let tokens = point.tokens;
            let of = |i| format!("{:>32}", half(point, i).unwrap_or("–".to_owned()));
            let [first, second] = [0, 1].map(of);
            lines.push(format!("{tokens:>10}  {first}  {second}"));
        }
        lines.join("\n")
    }
}

/// How a training went.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// Of the steps.
    pub steps: Vec<Step>,
    /// Held-out losses on the way.
    pub points: Vec<Point>,
    /// Seconds of training, without those of the points.
    pub seconds: f64,
}

/// A step of a training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// The loss, before the step.
    pub loss: f64,
    /// The mean of `−ln p` of the next tokens.
    pub nats: f64,
    /// The same of the exact model, where it was asked.
    pub exact: f64,
    /// The norm of the gradient.
    pub gradient: f64,
}

/// What was found on held-out text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Tokens trained on.
    pub tokens: usize,
    /// What the model said then.
    pub said: Said,
}

/// What a conversion learned: numbers by name.
#[derive(Clone, Debug, PartialEq)]
pub struct Learned {
    /// Where they come from.
    pub about: About,
    /// `layers.0.query.down` and the like.
    pub arrays: BTreeMap<String, ArrayD<f32>>,
}

impl Learned {
    /// What the variables say now.
    pub fn of(variables: &Variables, about: About) -> Result<Self> {
        let mut arrays = BTreeMap::new();
        for variable in variables.iter() {
            let used = variable.rule.used(variable.var.as_tensor())?.to_dtype(DType::F32)?;
            let numbers = used.flatten_all()?.to_vec1::<f32>()?;
            let array = ArrayD::from_shape_vec(IxDyn(variable.var.dims()), numbers)?;
            arrays.insert(variable.name.clone(), array);
        }
        Ok(Self { about, arrays })
    }

    /// Writes a file of safetensors, whole or not at all.
    pub fn save(&self, path: &Path) -> Result<()> {
        let bad = self.arrays.iter().find(|(_, array)| !array.iter().all(|x| x.is_finite()));
        if let Some((name, _)) = bad {
            bail!("`{name}` has numbers that are not finite: try a lower `--learning-rate`");
        }
        save(path, &self.arrays, &serde_json::to_string(&self.about)?)
    }

    /// Reads what [`save`](Self::save) wrote.
    pub fn load(path: &Path) -> Result<Self> {
        let (arrays, about) = load(path)?;
        let about = serde_json::from_str(&about)
            .with_context(|| format!("{} was written by another version", path.display()))?;
        Ok(Self { about, arrays })
    }

    /// Refuses another model than the one it was learned for.
    pub fn check(&self, model: &Model, path: &Path) -> Result<()> {
        let found = model.fingerprint();
        ensure!(
            self.about.model == found,
            "{} was learned for the model `{}`, and this is `{found}`",
            path.display(),
            self.about.model
        );
        Ok(())
    }

    /// The model with what was learned of its weights.
    pub fn model(&self, model: &Model) -> Result<Model> {
        let mut changed = model.clone();
        *changed.norm_mut() = self.vector("norm", model.norm().len())?;
        for (l, layer) in changed.layers_mut().iter_mut().enumerate() {
            let name = |of: &str| format!("layers.{l}.{of}");
            let width = layer.attention_norm.len();
            layer.attention_norm = self.vector(&name("attention_norm"), width)?;
            layer.feed_forward_norm = self.vector(&name("feed_forward_norm"), width)?;
            let matrices = [&mut layer.query, &mut layer.key, &mut layer.value, &mut layer.output];
            for (which, linear) in MATRICES.iter().zip(matrices) {
                *linear = self.matrix(&name(which), linear)?;
            }
        }
        Ok(changed)
    }

    /// The layers of attention with what was learned of their parameters.
    pub fn attention(&self, layers: &[MultiHead<f32>]) -> Result<Vec<MultiHead<f32>>> {
        let changed = |(l, layer): (usize, &MultiHead<f32>)| {
            let place = format!("layers.{l}.attention.");
            let mine = self.arrays.iter().filter_map(|(name, array)| {
                Some((name.strip_prefix(&place)?.to_owned(), array.clone()))
            });
            let parameters: Parameters<f32> = mine.collect();
            let asked: Vec<_> = layer.parameters().names().map(str::to_owned).collect();
            let found: Vec<_> = parameters.names().map(str::to_owned).collect();
            ensure!(
                asked == found,
                "the kernels of layer {l} have the parameters {asked:?}, and the file {found:?}"
            );
            if found.is_empty() {
                return Ok(layer.clone());
            }
            layer.with_parameters(&parameters).with_context(|| format!("layer {l}"))
        };
        layers.iter().enumerate().map(changed).collect()
    }

    fn array(&self, name: &str) -> Result<&ArrayD<f32>> {
        self.arrays.get(name).with_context(|| format!("`{name}` is missing"))
    }

    fn vector(&self, name: &str, length: usize) -> Result<Array1<f32>> {
        let array = self.array(name)?.clone().into_dimensionality()?;
        ensure!(array.len() == length, "`{name}` has {} numbers, not {length}", array.len());
        Ok(array)
    }

    /// The layer in the place of one.
    fn matrix(&self, name: &str, of: &Linear) -> Result<Linear> {
        let (inputs, outputs) = of.dim();
        let matrix = |part: &str, shape: [Option<usize>; 2]| -> Result<Array2<f32>> {
            let name = format!("{name}.{part}");
            let array: Array2<f32> = self.array(&name)?.clone().into_dimensionality()?;
            let found = array.raw_dim();
            let fits = |(asked, &found): (Option<usize>, &usize)| asked.is_none_or(|n| n == found);
            ensure!(
                shape.into_iter().zip(found.slice()).all(fits),
                "`{name}` has shape {:?}, which does not fit the model",
                found.slice()
            );
            Ok(array)
        };
        if self.arrays.contains_key(&format!("{name}.weight")) {
            return Ok(Linear::new(matrix("weight", [Some(inputs), Some(outputs)])?));
        }
        let down = matrix("down", [Some(inputs), None])? * SCALE as f32;
        let up = matrix("up", [Some(down.ncols()), Some(outputs)])?;
        Ok(of.with_low_rank(down, up))
    }
}

/// Writes arrays and a text, whole or not at all.
pub(super) fn save(path: &Path, arrays: &BTreeMap<String, ArrayD<f32>>, about: &str) -> Result<()> {
    let bytes: Vec<(&String, &[usize], Vec<u8>)> = arrays
        .iter()
        .map(|(name, array)| {
            let bytes = array.iter().flat_map(|x| x.to_le_bytes()).collect();
            (name, array.shape(), bytes)
        })
        .collect();
    let views = bytes
        .iter()
        .map(|(name, shape, bytes)| {
            Ok((*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes)?))
        })
        .collect::<Result<Vec<_>>>()?;
    let metadata = HashMap::from([(ABOUT.to_owned(), about.to_owned())]);
    let place = || format!("cannot write {}", path.display());
    let mut beside = path.as_os_str().to_owned();
    beside.push(".part");
    fs::write(&beside, safetensors::serialize(views, Some(metadata))?).with_context(place)?;
    fs::rename(&beside, path).with_context(place)
}

/// Reads what [`save`] wrote.
pub(super) fn load(path: &Path) -> Result<(BTreeMap<String, ArrayD<f32>>, String)> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let read = || -> Result<(BTreeMap<String, ArrayD<f32>>, String)> {
        let (_, header) = SafeTensors::read_metadata(&bytes)?;
        let about = header.metadata().as_ref().and_then(|metadata| metadata.get(ABOUT));
        let about = about.context("it is no file of a conversion")?.clone();
        let mut arrays = BTreeMap::new();
        for (name, tensor) in SafeTensors::deserialize(&bytes)?.iter() {
            if tensor.dtype() != Dtype::F32 {
                bail!("`{name}` is {:?}, not F32", tensor.dtype());
            }
            let numbers: Vec<f32> = tensor
                .data()
                .as_chunks::<4>()
                .0
                .iter()
                .map(|&bytes| f32::from_le_bytes(bytes))
                .collect();
            ensure!(
                numbers.iter().all(|x| x.is_finite()),
                "`{name}` has numbers that are not finite"
            );
            let array = ArrayD::from_shape_vec(IxDyn(tensor.shape()), numbers)?;
            arrays.insert(name.to_owned(), array);
        }
        Ok((arrays, about))
    };
    read().with_context(|| format!("{} cannot be used", path.display()))
}
