//! Tiny LLaMAs with weights drawn from a seed, written as GGUF files, and a forward pass in `f64`
//! that is easy to check by eye.
#![allow(dead_code)] // every test file uses a part

pub mod naive;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use dijiang::MultiHead;
use language_model::gguf::Gguf;
use language_model::model::{Model, Scales, State};
use language_model::session::Session;
use language_model::texts::{Corpus, Encoder, Text};
use language_model::tokenizer::Tokenizer;
use ndarray::{Array2, concatenate};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::fs::File;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// What a tiny model is made of.
#[derive(Clone, Debug)]
pub struct Sizes {
    pub layers: usize,
    pub width: usize,
    pub heads: usize,
    pub kv_heads: usize,
    /// `attention.key_length`, where it is not `width / heads`.
    pub key_length: Option<usize>,
    /// `attention.value_length`, where it is not the length of keys.
    pub value_length: Option<usize>,
    pub feed_forward: usize,
    pub vocabulary: usize,
    /// The output head is the embedding.
    pub tied: bool,
    /// How matrices are stored; vectors are `f32`.
    pub weights: GgmlDType,
    pub rope_base: f64,
    pub scaling: Scaling,
    /// `rope_freqs.weight`
    pub rope_factors: bool,
    /// `rope.dimension_count`, where it is not the length of keys.
    pub rope_dims: Option<usize>,
    /// Factors on the way.
    pub scales: Scales,
    pub seed: u64,
}

/// How a file says that positions are divided by a factor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    None,
    /// `rope.scaling.type` = linear and its factor.
    Linear(f32),
    /// The factor alone: readers take the type to be linear.
    FactorOnly(f32),
    /// `rope.scale_linear` of old files.
    Old(f32),
    /// The type "none" and a factor that means nothing.
    Off(f32),
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            layers: 2,
            width: 64,
            heads: 4,
            kv_heads: 2,
            key_length: None,
            value_length: None,
            feed_forward: 96,
            vocabulary: 300,
            tied: true,
            weights: GgmlDType::F32,
            rope_base: 10_000.0,
            scaling: Scaling::None,
            rope_factors: false,
            rope_dims: None,
            scales: Scales::default(),
            seed: 1,
        }
    }
}

impl Sizes {
    pub fn head_dim(&self) -> usize {
        self.key_length.unwrap_or(self.width / self.heads)
    }

    pub fn value_dim(&self) -> usize {
        self.value_length.unwrap_or(self.head_dim())
    }

    pub fn rope_dims(&self) -> usize {
        self.rope_dims.unwrap_or(self.head_dim())
    }

    /// What positions are divided by.
    pub fn stretch(&self) -> f64 {
        match self.scaling {
            Scaling::None | Scaling::Off(_) => 1.0,
            Scaling::Linear(x) | Scaling::FactorOnly(x) | Scaling::Old(x) => f64::from(x),
        }
    }

    /// The file, not yet written.
    pub fn parts(&self) -> Parts {
        let mut metadata = vec![
            ("general.architecture".to_owned(), text("llama")),
            ("general.name".to_owned(), text("tiny")),
            ("general.alignment".to_owned(), Value::U32(32)),
        ];
        let mut set = |key: &str, value| metadata.push((format!("llama.{key}"), value));
        let count = |n: usize| Value::U32(n as u32);
        set("block_count", count(self.layers));
        set("context_length", count(512));
        set("embedding_length", count(self.width));
        set("feed_forward_length", count(self.feed_forward));
        set("attention.head_count", count(self.heads));
        set("attention.head_count_kv", count(self.kv_heads));
        set("attention.layer_norm_rms_epsilon", Value::F32(RMS_EPSILON));
        set("rope.freq_base", Value::F32(self.rope_base as f32));
        let optional = [
            ("attention.key_length", self.key_length),
            ("attention.value_length", self.value_length),
            ("rope.dimension_count", self.rope_dims),
        ];
        for (key, size) in optional {
            size.into_iter().for_each(|size| set(key, count(size)));
        }
        match self.scaling {
            Scaling::None => {}
            Scaling::Linear(_) => set("rope.scaling.type", text("linear")),
            Scaling::Off(_) => set("rope.scaling.type", text("none")),
            Scaling::FactorOnly(_) | Scaling::Old(_) => {}
        }
        match self.scaling {
            Scaling::None => {}
            Scaling::Linear(x) | Scaling::FactorOnly(x) | Scaling::Off(x) => {
                set("rope.scaling.factor", Value::F32(x))
            }
            Scaling::Old(x) => set("rope.scale_linear", Value::F32(x)),
        }
        let Scales { embedding, residual, attention } = self.scales;
        let factors = [
            ("embedding_scale", embedding),
            ("residual_scale", residual),
            ("attention.scale", attention),
        ];
        for (key, factor) in factors {
            factor.into_iter().for_each(|factor| set(key, Value::F64(factor)));
        }
        metadata.extend(tokenizer_metadata());

        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        let mut tensors = Vec::new();
        let vector = |tensors: &mut Vec<_>, random: &mut _, name: &str, length: usize| {
            let values: Vec<f32> = (0..length).map(|_| 1.0 + 0.2 * normal(random)).collect();
            tensors.push((format!("{name}.weight"), GgmlDType::F32, tensor(values, &[length])));
        };
        let matrix = |tensors: &mut Vec<_>,
                      random: &mut _,
                      name: &str,
                      outputs: usize,
                      inputs: usize,
                      size: f32| {
            let scale = size / (inputs as f32).sqrt();
            let values = (0..inputs * outputs).map(|_| scale * normal(random)).collect();
            tensors.push((
                format!("{name}.weight"),
                self.weights,
                tensor(values, &[outputs, inputs]),
            ));
        };
        let (queries, keys) = (self.heads * self.head_dim(), self.kv_heads * self.head_dim());
        let (values, mixed) = (self.kv_heads * self.value_dim(), self.heads * self.value_dim());
        matrix(&mut tensors, &mut random, "token_embd", self.vocabulary, self.width, 6.0);
        for l in 0..self.layers {
            let name = |part: &str| format!("blk.{l}.{part}");
            vector(&mut tensors, &mut random, &name("attn_norm"), self.width);
            // scores of a few units: attention that is neither uniform nor all on one token
            matrix(&mut tensors, &mut random, &name("attn_q"), queries, self.width, 1.5);
            matrix(&mut tensors, &mut random, &name("attn_k"), keys, self.width, 1.5);
            matrix(&mut tensors, &mut random, &name("attn_v"), values, self.width, 1.0);
            matrix(&mut tensors, &mut random, &name("attn_output"), self.width, mixed, 1.0);
            vector(&mut tensors, &mut random, &name("ffn_norm"), self.width);
            matrix(
                &mut tensors,
                &mut random,
                &name("ffn_gate"),
                self.feed_forward,
                self.width,
                1.0,
            );
            matrix(&mut tensors, &mut random, &name("ffn_up"), self.feed_forward, self.width, 1.0);
            matrix(
                &mut tensors,
                &mut random,
                &name("ffn_down"),
                self.width,
                self.feed_forward,
                1.0,
            );
        }
        vector(&mut tensors, &mut random, "output_norm", self.width);
        if !self.tied {
            matrix(&mut tensors, &mut random, "output", self.vocabulary, self.width, 2.0);
        }
        if self.rope_factors {
            let values =
                (0..self.rope_dims() / 2).map(|_| random.random_range(1.0..8.0_f32)).collect();
            tensors.push((
                "rope_freqs.weight".to_owned(),
                GgmlDType::F32,
                tensor(values, &[self.rope_dims() / 2]),
            ));
        }
        Parts { metadata, tensors }
    }

    /// The file, in a folder of its own.
    pub fn write(&self) -> Written {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.gguf");
        self.parts().write(&path);
        Written { folder, path }
    }
}

pub const RMS_EPSILON: f32 = 1e-5;

/// A file in a folder that goes when this does.
pub struct Written {
    pub folder: TempDir,
    pub path: PathBuf,
}

impl Written {
    pub fn model(&self) -> Model {
        Model::load(&self.path).unwrap()
    }
}

/// A file to change and to write.
#[derive(Clone)]
pub struct Parts {
    pub metadata: Vec<(String, Value)>,
    /// Name, how it is stored, values `[out, in]`.
    pub tensors: Vec<(String, GgmlDType, Tensor)>,
}

impl Parts {
    /// Sets a key, or removes it.
    pub fn set(mut self, key: &str, value: Option<Value>) -> Self {
        self.metadata.retain(|(other, _)| other != key);
        self.metadata.extend(value.map(|value| (key.to_owned(), value)));
        self
    }

    /// Replaces a tensor, adds it, or removes it.
    pub fn put(mut self, name: &str, value: Option<Tensor>) -> Self {
        let stored = value
            .is_some()
            .then(|| self.tensors.iter().find(|t| t.0 == name).map_or(GgmlDType::F32, |t| t.1));
        self.tensors.retain(|tensor| tensor.0 != name);
        self.tensors
            .extend(value.zip(stored).map(|(value, stored)| (name.to_owned(), stored, value)));
        self
    }

    pub fn write(&self, path: &Path) {
        let quantise = |(_, stored, values): &(String, GgmlDType, Tensor)| {
            QTensor::quantize(values, *stored).unwrap()
        };
        let stored: Vec<QTensor> = self.tensors.iter().map(quantise).collect();
        let tensors: Vec<(&str, &QTensor)> =
            self.tensors.iter().map(|t| t.0.as_str()).zip(&stored).collect();
        let metadata: Vec<(&str, &Value)> =
            self.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
    }
}

pub fn text(value: &str) -> Value {
    Value::String(value.to_owned())
}

pub fn tensor(values: Vec<f32>, shape: &[usize]) -> Tensor {
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Of mean 0 and variance 1; the sum of twelve uniform numbers is near enough.
fn normal(random: &mut ChaCha8Rng) -> f32 {
    (0..12).map(|_| random.random::<f32>()).sum::<f32>() - 6.0
}

/// Ids 0 to 255 are the bytes, 256 to 259 four merges, 260 and 261 special tokens; the embedding
/// has more rows than that.
fn tokenizer_metadata() -> Vec<(String, Value)> {
    let mut others = (0x100..).filter_map(char::from_u32);
    let mut letter = |byte: u8| match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
        _ => others.next().unwrap(),
    };
    let mut tokens: Vec<String> = (0..=255).map(|byte| letter(byte).to_string()).collect();
    let merges = ["t h", "th e", "Ġ the", "Ġ a"];
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    tokens.extend(["<|im_start|>", "<|im_end|>"].map(str::to_owned));
    let kinds = (0..tokens.len()).map(|id| Value::I32(if id < 260 { 1 } else { 3 })).collect();
    let list = |list: Vec<String>| Value::Array(list.into_iter().map(Value::String).collect());
    vec![
        ("tokenizer.ggml.model".to_owned(), text("gpt2")),
        ("tokenizer.ggml.pre".to_owned(), text("smollm")),
        ("tokenizer.ggml.tokens".to_owned(), list(tokens)),
        ("tokenizer.ggml.token_type".to_owned(), Value::Array(kinds)),
        ("tokenizer.ggml.merges".to_owned(), list(merges.map(str::to_owned).to_vec())),
    ]
}

pub fn tokenizer(path: &Path) -> Tokenizer {
    Tokenizer::from_metadata(Gguf::open(path).unwrap().metadata()).unwrap()
}

/// Tokens drawn from a seed, with some that return: text is not noise.
pub fn tokens(count: usize, vocabulary: usize, seed: u64) -> Vec<u32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut tokens: Vec<u32> = Vec::with_capacity(count);
    for i in 0..count {
        let again = i > 0 && random.random_bool(0.3);
        let token = if again {
            tokens[random.random_range(0..i)]
        } else {
            random.random_range(0..vocabulary) as u32
        };
        tokens.push(token);
    }
    tokens
}

/// A tiny model with its texts; `calibration_tokens` of the text that comes with the program are
/// used.
pub fn session(sizes: &Sizes, calibration_tokens: usize) -> (Session, Written) {
    let written = sizes.write();
    let tokenizer = tokenizer(&written.path);
    let with = Encoder { tokenizer: Ok(&tokenizer), vocabulary: sizes.vocabulary };
    let corpus = Corpus::open(&[], &[], with).unwrap();
    let evaluation = [("one", 90, 3), ("two", 60, 4)].map(|(name, count, seed)| Text {
        name: name.to_owned(),
        tokens: tokens(count, 262, seed),
    });
    let corpus = Corpus::new(corpus.calibration().unwrap().clone(), evaluation.to_vec());
    (Session::new(written.model(), tokenizer, corpus, calibration_tokens), written)
}

/// Exact attention in every layer.
pub fn softmax(model: &Model) -> Vec<MultiHead<f32>> {
    "softmax"
        .parse::<language_model::kernels::Kernel>()
        .unwrap()
        .layers(model.config(), None, &[])
        .unwrap()
}

/// The logits of some tokens, fed in pieces of these lengths and then the rest.
pub fn logits(model: &Model, state: &mut State, tokens: &[u32], pieces: &[usize]) -> Array2<f32> {
    let mut found = Array2::zeros((0, model.config().vocabulary));
    let mut rest = tokens;
    for &piece in pieces.iter().chain([&tokens.len()]) {
        let (now, later) = rest.split_at(piece.min(rest.len()));
        rest = later;
        if !now.is_empty() {
            let hidden = model.extend(state, now).unwrap();
            found = concatenate![ndarray::Axis(0), found, model.logits(state, &hidden)];
        }
    }
    found
}

/// The largest difference, relative to the largest number of `b`.
pub fn difference(a: &Array2<f32>, b: &Array2<f64>) -> f64 {
    assert_eq!(a.dim(), b.dim());
    let largest = b.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    a.iter().zip(b).map(|(&a, b)| (f64::from(a) - b).abs()).fold(0.0, f64::max) / largest
}

/// The index of the largest number.
pub fn argmax(row: ndarray::ArrayView1<'_, f64>) -> u32 {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32
}
