//! Reading a model from a GGUF file: its sizes and its weights.

mod foreign;
mod keys;

use crate::linear::{Linear, Weights};
use crate::model::{Config, Scales};
use crate::quantised::Quantised;
use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use dijiang::{Rotary, RotaryPairs};
use ndarray::{Array1, Array2};
use std::cell::Cell;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufReader, Read, Seek};
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::path::Path;
use std::sync::Once;

/// An open GGUF file of the LLaMA architecture.
pub struct Gguf {
    content: Content,
    file: BufReader<File>,
}

impl Gguf {
    /// Reads the header. Says what a file is that is not GGUF, that is cut off, that is a part of a
    /// model or holds weights of a type that is not read.
    pub fn open(path: &Path) -> Result<Self> {
        let cannot_open = || format!("cannot open {}", path.display());
        let kind = fs::metadata(path).with_context(cannot_open)?;
        let unusable = || format!("{} is not a GGUF file that can be read", path.display());
        if !kind.is_file() {
            let what = if kind.is_dir() { "a folder" } else { "not a file" };
            return Err(anyhow::anyhow!("it is {what}: pass the .gguf file itself"))
                .with_context(unusable);
        }
        let file = File::open(path).with_context(cannot_open)?;
        Self::read(BufReader::new(file), kind.len(), path).with_context(unusable)
    }

    fn read(mut file: BufReader<File>, length: u64, path: &Path) -> Result<Self> {
        let mut head = Vec::new();
        file.by_ref().take(foreign::SEEN as u64).read_to_end(&mut head)?;
        if let Some(what) = foreign::foreign(&head, path) {
            bail!(what);
        }
        if let Some((part, parts)) = foreign::part(path).filter(|(_, parts)| *parts > 1) {
            bail!(split(part, parts));
        }
        if let Some(version) = head.get(4..8).and_then(|bytes| bytes.try_into().ok()) {
            let version = u32::from_le_bytes(version);
            ensure!(
                !(1..=3).contains(&version.swap_bytes()),
                "it is for machines with the bytes of numbers in the other order (big-endian): \
                 its version, {version}, is {} there. Use a little-endian file",
                version.swap_bytes()
            );
            ensure!(
                (1..=3).contains(&version),
                "its version is {version}, and 1 to 3 can be read: use a file of another version, \
                 or get it anew if it is damaged"
            );
        }
        file.rewind()?;
        let content = match caught(|| Content::read(&mut file)) {
            Ok(content) => content,
            // the reader names no more than the number of the type
            Err(error) => match error.to_string().split_once(UNKNOWN_TYPE) {
                Some((_, number)) => {
                    let digits = number.chars().take_while(char::is_ascii_digit);
                    let number = digits.collect::<String>().parse().unwrap_or(u32::MAX);
                    bail!(foreign::unread(number))
                }
                None => {
                    return Err(
                        error.context("its header ends early or is damaged: is it complete?")
                    );
                }
            },
        };
        let parts = content.metadata.get("split.count");
        if let Some(parts) = parts {
            let parts = keys::count(parts).with_context(|| {
                format!("`split.count` is {}: a single count was expected", keys::shown(parts))
            })?;
            let part = content.metadata.get("split.no").and_then(keys::count).unwrap_or(0);
            ensure!(parts < 2, split(u64::from(part) + 1, parts.into()));
        }
        let mut end = ("", 0);
        for (name, tensor) in &content.tensor_infos {
            let of_tensor = stored(tensor, content.tensor_data_offset).with_context(|| {
                let shape = tensor.shape.dims();
                format!("`{name}` has the shape {shape:?}, which no file can hold: it is damaged")
            })?;
            end = if of_tensor > end.1 { (name, of_tensor) } else { end };
        }
        ensure!(
            end.1 <= length,
            "it has {length} bytes, but `{}` ends at byte {}: is it complete? Get it anew, or go \
             on with the download",
            end.0,
            end.1
        );
        Ok(Self { content, file })
    }

    /// The values of the header, by key.
    #[must_use]
    pub fn metadata(&self) -> &HashMap<String, Value> {
        &self.content.metadata
    }

    /// The sizes of the model, or why this program cannot run it.
    pub fn config(&self) -> Result<Config> {
        let architecture = match self.metadata().get("general.architecture") {
            Some(Value::String(name)) => name.as_str(),
            _ => bail!("the GGUF file does not say its architecture (`general.architecture`)"),
        };
        ensure!(
            architecture == "llama",
            "the architecture is `{architecture}`; this program runs `llama` (LLaMA, SmolLM, \
             TinyLlama, Mistral, ...)"
        );
        if let Some(kind @ ("adapter" | "imatrix" | "mmproj")) = self.text("general.type") {
            bail!("the file holds no model (`general.type` is \"{kind}\"): pass that of the model");
        }
        keys::check(self.metadata(), architecture)?;
        let (width, heads) = (self.size("embedding_length")?, self.size("attention.head_count")?);
        let kv_heads = self.optional("attention.head_count_kv")?.unwrap_or(heads);
        ensure!(
            kv_heads > 0 && heads.is_multiple_of(kv_heads),
            "{heads} query heads cannot share {kv_heads} heads of keys and values"
        );
        let head_dim = match self.positive("attention.key_length")? {
            Some(length) => length,
            None => {
                ensure!(
                    width.is_multiple_of(heads),
                    "an embedding of {width} does not divide into {heads} heads"
                );
                width / heads
            }
        };
        let vocabulary = match self.content.tensor_infos.get("token_embd.weight") {
            Some(tensor) => *tensor.shape.dims().first().unwrap_or(&0),
            None if self.content.tensor_infos.is_empty() => {
                bail!("the GGUF file has no weights (no `token_embd.weight`): pass a whole model")
            }
            None => bail!("the GGUF file has no embedding (`token_embd.weight`)"),
        };
        let config = Config {
            name: self.text("general.name").unwrap_or("unnamed").to_owned(),
            layers: self.size("block_count")?,
            width,
            heads,
            kv_heads,
            head_dim,
            value_dim: self.positive("attention.value_length")?.unwrap_or(head_dim),
            feed_forward: self.size("feed_forward_length")?,
            context: self.size("context_length")?,
            vocabulary,
            rms_epsilon: self.number("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-5),
            scales: Scales {
                embedding: self.factor("embedding_scale")?,
                residual: self.factor("residual_scale")?,
                attention: self.factor("attention.scale")?,
            },
        };
        ensure!(
            config.rms_epsilon.is_finite() && config.rms_epsilon >= 0.0,
            "`llama.attention.layer_norm_rms_epsilon` is {}",
            config.rms_epsilon
        );
        ensure!(config.vocabulary > 0, "the vocabulary is empty");
        ensure!(
            u32::try_from(config.vocabulary).is_ok(),
            "a vocabulary of {} tokens is too large",
            config.vocabulary
        );
        self.check_names(&config)?;
        Ok(config)
    }

    /// The rotary embedding of the model.
    pub fn rotary(&mut self, config: &Config) -> Result<Rotary> {
        let dims = self.optional("rope.dimension_count")?.unwrap_or(config.head_dim);
        let base = self.number("rope.freq_base")?.unwrap_or(10_000.0);
        // a factor without a type is linear; old files have it by another name
        let factor = self.number("rope.scaling.factor")?.or(self.number("rope.scale_linear")?);
        let stretch = match (self.metadata().get("llama.rope.scaling.type"), factor) {
            (None, factor) => factor.unwrap_or(1.0),
            (Some(Value::String(kind)), _) if kind == "none" => 1.0,
            (Some(Value::String(kind)), Some(1.0)) if kind == "yarn" => 1.0, // it stretches nothing
            (Some(Value::String(kind)), Some(factor)) if kind == "linear" => factor,
            (Some(Value::String(kind)), None) if kind == "linear" => {
                bail!("`llama.rope.scaling.type` is linear, but its factor is missing")
            }
            (Some(Value::String(kind)), _) => bail!(
                "`llama.rope.scaling.type` is `{kind}`: positions scaled in that way are not \
                 supported; `linear` and `none` are"
            ),
            (Some(other), _) => {
                bail!("`llama.rope.scaling.type` is {}: a name was expected", keys::shown(other))
            }
        };
        let factors = match self.content.tensor_infos.contains_key("rope_freqs.weight") {
            true => Some(self.vector("rope_freqs.weight", dims / 2)?.to_vec()),
            false => None,
        };
        ensure!(stretch.is_finite() && stretch > 0.0, "the scale of the positions is {stretch}");
        let rotary = Rotary::partial(config.head_dim, dims)
            .and_then(|rotary| rotary.with_base(base))
            .context("the rotary embedding cannot be used")?;
        let factor = |i: usize| factors.as_ref().map_or(1.0, |factors| f64::from(factors[i]));
        let frequencies = rotary.frequencies().iter().enumerate();
        let frequencies =
            frequencies.map(|(i, frequency)| frequency / stretch / factor(i)).collect();
        let rotary = rotary
            .with_frequencies(frequencies)
            .context("the factors of the rotary embedding are damaged")?;
        Ok(rotary.with_pairs(RotaryPairs::Interleaved))
    }

    /// Whether the file has a tensor of this name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    /// A linear layer, whose weight the file has as `[out, in]`. What is not quantised in the file
    /// becomes `f32` in any case.
    pub fn linear(
        &mut self,
        name: &str,
        inputs: usize,
        outputs: usize,
        weights: Weights,
    ) -> Result<Linear> {
        let stored = self.tensor(name, &[outputs, inputs])?;
        if weights == Weights::Quantised && Quantised::can_hold(stored.dtype(), inputs) {
            let bytes = stored.data().with_context(|| damaged(name))?;
            let weight = Quantised::new(stored.dtype(), &bytes, inputs, outputs)
                .with_context(|| damaged(name))?;
            ensure!(weight.is_finite(), not_finite(name));
            return Ok(Linear::quantised(weight));
        }
        let stored = Array2::from_shape_vec((outputs, inputs), widened(name, &stored)?)?;
        Ok(Linear::new(stored.t().as_standard_layout().into_owned()))
    }

    /// A tensor of `f32` as the file has it: of a linear layer `[out, in]`.
    pub fn widened(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let values = widened(name, &self.tensor(name, shape)?)?;
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    /// A vector.
    pub fn vector(&mut self, name: &str, length: usize) -> Result<Array1<f32>> {
        Ok(Array1::from(widened(name, &self.tensor(name, &[length])?)?))
    }

    /// A tensor as it is stored.
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<QTensor> {
        let Some(info) = self.content.tensor_infos.get(name) else {
            bail!("the GGUF file has no tensor `{name}`")
        };
        let found = info.shape.dims();
        ensure!(
            found == shape,
            "`{name}` has the shape {found:?}, but the header's sizes need {shape:?}"
        );
        let readable = !matches!(info.ggml_dtype, GgmlDType::Q8_1 | GgmlDType::Q8K);
        ensure!(readable, "`{name}` is of the type {:?}; {}", info.ggml_dtype, foreign::READ);
        caught(|| info.read(&mut self.file, self.content.tensor_data_offset, &Device::Cpu))
            .with_context(|| damaged(name))
    }

    /// Every tensor must be one that the forward pass uses: a bias left out would give wrong
    /// numbers without a word.
    fn check_names(&self, config: &Config) -> Result<()> {
        let known =
            |name: &str| match name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
                Some((layer, part)) => {
                    layer.parse::<usize>().is_ok_and(|l| l < config.layers) && LAYER.contains(&part)
                }
                None => MODEL.contains(&name),
            };
        let mut unknown: Vec<_> =
            self.content.tensor_infos.keys().filter(|name| !known(name)).collect();
        unknown.sort();
        match unknown.first() {
            Some(name) => bail!(
                "tensor `{name}` has no place in a LLaMA of {} layers ({} such tensors): {} not \
                 supported",
                config.layers,
                unknown.len(),
                if name.ends_with(".bias") { "biases are" } else { "this variant is" }
            ),
            None => Ok(()),
        }
    }

    /// A text of the header.
    #[must_use]
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.metadata().get(key) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        }
    }

    /// A size that must be there and positive.
    fn size(&self, key: &str) -> Result<usize> {
        self.positive(key)?.with_context(|| format!("the GGUF file does not say `llama.{key}`"))
    }

    /// A size that may be missing, but not 0.
    fn positive(&self, key: &str) -> Result<Option<usize>> {
        match self.optional(key)? {
            Some(0) => bail!("`llama.{key}` is 0"),
            size => Ok(size),
        }
    }

    fn optional(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.metadata().get(&format!("llama.{key}")) else { return Ok(None) };
        match keys::count(value) {
            Some(size) => Ok(Some(size as usize)),
            None => bail!("`llama.{key}` is {}: a single count was expected", keys::shown(value)),
        }
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.metadata().get(&format!("llama.{key}")) else { return Ok(None) };
        match value {
            Value::F32(x) => Ok(Some(f64::from(*x))),
            Value::F64(x) => Ok(Some(*x)),
            _ => bail!("`llama.{key}` is {}: a number was expected", keys::shown(value)),
        }
    }

    /// A positive number; none where it is missing or 0, which says the same.
    fn factor(&self, key: &str) -> Result<Option<f64>> {
        let factor = self.number(key)?.filter(|factor| *factor != 0.0);
        if let Some(factor) = factor {
            // it is used as `f32`
            let usable = factor > 0.0 && (factor as f32).is_normal();
            ensure!(usable, "`llama.{key}` is {factor}: a positive number was expected");
        }
        Ok(factor)
    }
}

/// The values of a tensor.
fn widened(name: &str, tensor: &QTensor) -> Result<Vec<f32>> {
    let values = caught(|| tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>())
        .with_context(|| damaged(name))?;
    ensure!(values.iter().all(|x| x.is_finite()), not_finite(name));
    Ok(values)
}

fn damaged(name: &str) -> String {
    format!("cannot read `{name}`: the file is damaged")
}

fn not_finite(name: &str) -> String {
    format!("`{name}` holds values that are not finite")
}

/// What to say of a part of a model.
fn split(part: u64, parts: u64) -> String {
    format!(
        "it is part {part} of {parts} of a model: join the parts (`llama-gguf-split --merge \
         FIRST-PART.gguf WHOLE.gguf`) and pass the whole"
    )
}

/// The byte behind a tensor; none where that is no number.
fn stored(tensor: &TensorInfo, start: u64) -> Option<u64> {
    let count = tensor.shape.dims().iter().try_fold(1_usize, |n, &size| n.checked_mul(size))?;
    let blocks = count.div_ceil(tensor.ggml_dtype.block_size());
    let size = blocks.checked_mul(tensor.ggml_dtype.type_size())?;
    start.checked_add(tensor.offset)?.checked_add(u64::try_from(size).ok()?)
}

/// What the reader says before the number of a type that it does not know.
const UNKNOWN_TYPE: &str = "unknown dtype for tensor ";

/// Tensors of the model as a whole.
const MODEL: [&str; 4] =
    ["token_embd.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"];

/// Tensors of a layer.
const LAYER: [&str; 9] = [
    "attn_norm.weight",
    "attn_q.weight",
    "attn_k.weight",
    "attn_v.weight",
    "attn_output.weight",
    "ffn_norm.weight",
    "ffn_gate.weight",
    "ffn_up.weight",
    "ffn_down.weight",
];

thread_local! {
    /// This thread reads a header: what panics there is caught, and not printed.
    static READS: Cell<bool> = const { Cell::new(false) };
}

/// The reader panics on some damaged headers (an alignment of 0, sizes whose product overflows): an
/// error like the others.
fn caught<R>(read: impl FnOnce() -> candle_core::Result<R>) -> Result<R> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let print = take_hook();
        set_hook(Box::new(move |info| {
            if !READS.get() {
                print(info);
            }
        }));
    });
    READS.set(true);
    let result = catch_unwind(AssertUnwindSafe(read));
    READS.set(false);
    match result {
        Ok(result) => Ok(result?),
        Err(_) => bail!("the header is damaged"),
    }
}
