//! Files that are damaged, cut off or of another kind: an error that says what is wrong, never a
//! panic, never much memory.

use crate::common::{Parts, Scaling, Sizes, softmax, tensor, text};
use anyhow::Result;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, Value};
use language_model::gguf::Gguf;
use language_model::linear::Weights;
use language_model::model::Model;
use language_model::tokenizer::Tokenizer;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Once;
use tempfile::TempDir;

/// Remembers the largest piece of memory that a thread asked for.
struct Watched;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

fn note(size: usize) {
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(size)));
}

/// Far more than a tiny model needs, far less than a damaged count may say.
const MOST_BYTES: usize = 8 << 20;

// SAFETY: hands every call on as it is.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's promise
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
        // SAFETY: the caller's promise
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static WATCHED: Watched = Watched;

/// A folder to write files to; panics of the GGUF reader, which the loader catches, are not
/// printed.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        static QUIET: Once = Once::new();
        QUIET.call_once(|| {
            let print = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                if !info.location().is_some_and(|place| place.file().contains("candle")) {
                    print(info);
                }
            }));
        });
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("bad.gguf")
    }

    /// What loading these bytes says.
    fn error(&self, bytes: &[u8]) -> String {
        fs::write(self.path(), bytes).unwrap();
        refused(&self.path())
    }

    /// What loading this file says.
    fn error_of(&self, parts: &Parts) -> String {
        parts.write(&self.path());
        refused(&self.path())
    }

    fn loads(&self, parts: &Parts) {
        parts.write(&self.path());
        use_it(&load(&self.path()).unwrap());
    }
}

fn sizes() -> Sizes {
    Sizes {
        width: 32,
        heads: 4,
        feed_forward: 64,
        vocabulary: 270,
        weights: GgmlDType::F16,
        seed: 70,
        ..Sizes::default()
    }
}

/// The bytes of a good file.
fn good(sizes: &Sizes) -> Vec<u8> {
    fs::read(sizes.write().path).unwrap()
}

/// As a program does: header, tokenizer, weights. Weights that stay quantised are refused for the
/// same reasons.
fn load(path: &Path) -> Result<Model> {
    let [wide, quantised] = [Weights::F32, Weights::Quantised].map(|weights| {
        LARGEST.set(0);
        let model = Gguf::open(path).and_then(|mut file| {
            Tokenizer::from_metadata(file.metadata())?;
            Model::from_gguf(&mut file, weights)
        });
        let largest = LARGEST.get();
        assert!(largest < MOST_BYTES, "{largest} bytes at once");
        model
    });
    let said = |model: &Result<Model>| model.as_ref().err().map(|error| format!("{error:#}"));
    assert_eq!(said(&wide), said(&quantised));
    wide
}

fn refused(path: &Path) -> String {
    match load(path) {
        Ok(_) => panic!("the file was taken"),
        Err(error) => format!("{error:#}"),
    }
}

/// A model that was loaded can read: what comes out is numbers or an error.
fn use_it(model: &Model) {
    let mut state = model.state(&softmax(model)).unwrap();
    if let Ok(hidden) = model.extend(&mut state, &[0, 1, 2]) {
        model.logits(&mut state, &hidden);
    }
}

#[test]
fn what_is_not_gguf() {
    let folder = Folder::new();
    let bytes = good(&sizes());
    for bytes in [
        &b""[..],
        b"G",
        b"GGUF",
        b"not a model at all, but a text",
        &[0; 4096],
        &[0xFF; 4096],
        b"{\"a\": 1}",
    ] {
        assert!(folder.error(bytes).contains("is not a GGUF file that can be read"));
    }
    let patched = |place: usize, with: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[place..place + with.len()].copy_from_slice(with);
        bytes
    };
    assert!(folder.error(&patched(0, b"GGML")).contains("it begins with 47 47 4d 4c"));
    for version in [0, 4, 1 << 20, u32::MAX] {
        let error = folder.error(&patched(4, &version.to_le_bytes()));
        assert!(error.contains(&format!("its version is {version}")), "{error}");
    }
    for version in 1..=3_u32 {
        let error = folder.error(&patched(4, &version.to_be_bytes()));
        assert!(error.contains("big-endian") && !error.contains("complete"), "{error}");
    }
    folder.error(&patched(4, &1_u32.to_le_bytes()));
    // the layout of version 3 is that of 2, in which the file was written
    fs::write(folder.path(), patched(4, &3_u32.to_le_bytes())).unwrap();
    use_it(&load(&folder.path()).unwrap());

    assert!(refused(folder.0.path()).contains("is not a GGUF file that can be read"));
    let nowhere = refused(&folder.0.path().join("nowhere.gguf"));
    assert!(nowhere.contains("cannot open") && nowhere.contains("nowhere.gguf"), "{nowhere}");
}

/// The place of a tensor's type in the bytes of a file of matrices.
fn type_of(bytes: &[u8], name: &str) -> usize {
    let name = name.as_bytes();
    let place = bytes.windows(name.len()).position(|part| part == name).unwrap();
    // its two sizes and their number come before
    place + name.len() + 4 + 16
}

#[test]
fn weights_of_types_that_are_not_read() {
    let folder = Folder::new();
    let bytes = good(&sizes());
    let place = type_of(&bytes, "blk.0.attn_q.weight");
    assert_eq!(bytes[place..place + 4], 1_u32.to_le_bytes(), "F16");
    let of = |number: u32| {
        let mut bytes = bytes.clone();
        bytes[place..place + 4].copy_from_slice(&number.to_le_bytes());
        folder.error(&bytes)
    };
    for (number, name) in [
        (4, "Q4_2 (number 4)"),
        (16, "IQ2_XXS (number 16)"),
        (20, "IQ4_NL (number 20)"),
        (23, "IQ4_XS (number 23)"),
        (26, "I32 (number 26)"),
        (34, "TQ1_0 (number 34)"),
        (35, "TQ2_0 (number 35)"),
        (39, "MXFP4 (number 39)"),
        (41, "number 41, which is not known here"),
        (u32::MAX, "number 4294967295, which is not known here"),
        (9, "`blk.0.attn_q.weight` is of the type Q8_1"),
    ] {
        let error = of(number);
        assert!(error.contains(name) && !error.contains("complete"), "{number}: {error}");
        assert!(error.contains("F32, F16, BF16, Q4_0"), "{number}: {error}");
    }
}

#[test]
fn parts_of_a_model() {
    let folder = Folder::new();
    let parts = |part: u16, of: u16| {
        let set = |parts: Parts, key, value| parts.set(key, Some(Value::U16(value)));
        set(set(sizes().parts(), "split.no", part), "split.count", of)
    };
    let error = folder.error_of(&parts(1, 3));
    assert!(error.contains("it is part 2 of 3 of a model: join the parts"), "{error}");
    // later parts have neither an architecture nor all tensors
    let mut later = parts(2, 3);
    later.metadata.retain(|(key, _)| key.starts_with("split."));
    later.tensors.truncate(3);
    assert!(folder.error_of(&later).contains("it is part 3 of 3"));
    folder.loads(&parts(0, 1));
    folder.loads(&parts(0, 0));
    let error = folder.error_of(&sizes().parts().set("split.count", Some(text("three"))));
    assert!(error.contains("`split.count` is \"three\": a single count"), "{error}");
    // by name alone
    let path = folder.0.path().join("m-00001-of-00002.gguf");
    sizes().parts().write(&path);
    assert!(refused(&path).contains("it is part 1 of 2 of a model"));
    let path = folder.0.path().join("m-00001-of-00001.gguf");
    sizes().parts().write(&path);
    use_it(&load(&path).unwrap());
}

#[test]
fn files_that_hold_no_model() {
    let folder = Folder::new();
    for kind in ["adapter", "imatrix", "mmproj"] {
        let error = folder.error_of(&sizes().parts().set("general.type", Some(text(kind))));
        assert!(
            error.contains(&format!("holds no model (`general.type` is \"{kind}\")")),
            "{error}"
        );
    }
    folder.loads(&sizes().parts().set("general.type", Some(text("model"))));
    let mut vocabulary = sizes().parts();
    vocabulary.tensors.clear();
    assert!(folder.error_of(&vocabulary).contains("no weights"));
}

/// The table of keys has its own tests: here, that it is used, and with what words.
#[test]
fn keys_that_change_the_model() {
    let folder = Folder::new();
    let says = |key: &str, value: Value| {
        folder.error_of(&sizes().parts().set(&format!("llama.{key}"), Some(value)))
    };
    for (key, value, expected) in [
        ("attention.causal", Value::Bool(false), "`llama.attention.causal` is false: its tokens"),
        ("attention.sliding_window", Value::U32(4), "sliding_window` is 4: its attention sees a"),
        ("attn_logit_softcapping", Value::F32(50.0), "attn_logit_softcapping` is 50.0: the scores"),
        ("final_logit_softcapping", Value::F32(3.0), "softcapping` is 3.0: its scores of tokens"),
        ("logit_scale", Value::F32(0.5), "logit_scale` is 0.5: some architectures"),
        ("attention.clamp_kqv", Value::F32(8.0), "clamp_kqv` is 8.0: its queries"),
        ("attention.max_alibi_bias", Value::F32(8.0), "max_alibi_bias` is 8.0: its scores"),
        ("expert_count", Value::U32(8), "expert_count` is 8: mixtures of experts"),
        ("use_parallel_residual", Value::Bool(true), "use_parallel_residual` is true: its"),
        ("rope.scaling.attn_factor", Value::F32(1.2), "attn_factor` is 1.2: its queries"),
        ("rope.scaling.type", text("dynamic"), "rope.scaling.type` is `dynamic`: positions"),
        // of another type
        ("attention.causal", Value::U32(1), "true or false was expected"),
        ("attention.sliding_window", text("4"), "is \"4\": a single count was expected"),
        ("final_logit_softcapping", Value::U32(30), "is 30: a number was expected"),
        ("vocab_size", Value::F32(1.0), "is 1.0: a single count was expected"),
        // numbers that are none
        ("embedding_scale", Value::F32(f32::NAN), "is NaN: a positive number"),
        ("residual_scale", Value::F32(-3.0), "is -3: a positive number"),
        ("attention.scale", Value::F64(1e-300), "a positive number was expected"),
        ("rope.scaling.factor", Value::F32(-2.0), "scale of the positions is -2"),
    ] {
        let error = says(key, value);
        assert!(error.contains(expected), "{key}: {error}");
    }
    let mut harmless = sizes().parts();
    for (key, value) in [
        ("llama.attention.causal", Value::Bool(true)),
        ("llama.attention.sliding_window", Value::U32(0)),
        ("llama.expert_count", Value::U32(0)),
        ("llama.rope.scaling.factor", Value::F32(1.0)),
        ("llama.rope.scaling.type", text("none")),
        ("llama.rope.scaling.attn_factor", Value::F32(1.0)),
        ("llama.rope.scaling.finetuned", Value::Bool(true)),
        ("llama.vocab_size", Value::U32(99)),
        ("llama.pooling_type", Value::U32(1)),
        ("llama.no_such_key", Value::U32(1)),
        ("general.quantization_version", Value::U32(2)),
        ("quantize.imatrix.file", text("a")),
    ] {
        folder.loads(&sizes().parts().set(key, Some(value.clone())));
        harmless = harmless.set(key, Some(value));
    }
    folder.loads(&harmless);
}

#[test]
fn counts_and_lengths_beyond_the_file() {
    let folder = Folder::new();
    let bytes = good(&sizes());
    // tensors, keys, the length of the first key
    for place in [8, 16, 24] {
        for count in [u64::MAX, 1 << 62, 1 << 40, 1 << 30, 1 << 20, 10_000] {
            let mut bytes = bytes.clone();
            bytes[place..place + 8].copy_from_slice(&count.to_le_bytes());
            assert!(folder.error(&bytes).contains("is it complete?"));
        }
    }
    // the length of the list of tokens, and arrays in arrays
    let key = b"tokenizer.ggml.tokens";
    let place = bytes.windows(key.len()).position(|part| part == key).unwrap() + key.len();
    for count in [u64::MAX, 1 << 30, 1 << 16] {
        let mut bytes = bytes.clone();
        bytes[place + 8..place + 16].copy_from_slice(&count.to_le_bytes());
        folder.error(&bytes);
    }
    let mut nested = bytes[..place + 4].to_vec();
    for _ in 0..5000 {
        nested.extend(9_u32.to_le_bytes());
        nested.extend(1_u64.to_le_bytes());
    }
    folder.error(&nested);
}

#[test]
fn files_cut_off_anywhere() {
    let folder = Folder::new();
    let bytes = good(&sizes());
    let content = Content::read(&mut File::open(sizes().write().path).unwrap()).unwrap();
    let tensors = content.tensor_infos.values().flat_map(|tensor| {
        let start = (content.tensor_data_offset + tensor.offset) as usize;
        [start, start + 1, start + tensor.shape.elem_count()]
    });
    let mut lengths: Vec<usize> = (0..bytes.len()).step_by(97).chain(tensors).collect();
    lengths.extend([bytes.len() - 1, content.tensor_data_offset as usize - 1]);
    for length in lengths {
        let error = folder.error(&bytes[..length]);
        assert!(
            error.contains("is it complete?") || length == 0 && error.contains("not complete"),
            "{length}: {error}"
        );
    }
}

#[test]
fn keys_that_are_missing() {
    let folder = Folder::new();
    let parts = sizes().parts();
    for (key, _) in &parts.metadata {
        let without = parts.clone().set(key, None);
        match key.as_str() {
            "general.name"
            | "general.alignment"
            | "llama.attention.layer_norm_rms_epsilon"
            | "llama.rope.freq_base"
            | "tokenizer.ggml.pre"
            | "tokenizer.ggml.token_type" => folder.loads(&without),
            // every head its own keys: other shapes
            "llama.attention.head_count_kv" => {
                assert!(folder.error_of(&without).contains("`blk.0.attn_k.weight` has the shape"));
            }
            key => {
                let error = folder.error_of(&without);
                assert!(error.contains(key), "without {key}: {error}");
            }
        }
    }
}

#[test]
fn values_that_no_model_has() {
    let folder = Folder::new();
    let parts = sizes().parts();
    let number = |x: u32| Some(Value::U32(x));
    let float = |x: f32| Some(Value::F32(x));
    let list = || Some(Value::Array(vec![Value::U32(2); 2]));
    let mut cases = vec![
        ("general.architecture", Some(text("gpt2")), "the architecture is `gpt2`"),
        ("general.architecture", number(1), "general.architecture"),
        ("general.alignment", number(0), "is damaged"),
        ("llama.expert_count", number(8), "mixtures of experts"),
        ("llama.attention.head_count", number(3), "3 query heads cannot share 2"),
        ("llama.attention.head_count_kv", number(3), "4 query heads cannot share 3"),
        ("llama.attention.head_count_kv", number(0), "cannot share 0"),
        ("llama.attention.head_count_kv", list(), "single count"),
        ("llama.attention.head_count", number(6), "an embedding of 32 does not divide into 6"),
        ("llama.attention.key_length", number(0), "`llama.attention.key_length` is 0"),
        ("llama.attention.value_length", number(0), "`llama.attention.value_length` is 0"),
        ("llama.attention.layer_norm_rms_epsilon", float(f32::NAN), "epsilon"),
        ("llama.attention.layer_norm_rms_epsilon", float(-1.0), "epsilon"),
        ("llama.attention.layer_norm_rms_epsilon", number(1), "a number was expected"),
        ("llama.rope.dimension_count", number(7), "7 of 8"),
        ("llama.rope.dimension_count", number(10), "10 of 8"),
        ("llama.rope.freq_base", float(0.0), "base"),
        ("llama.rope.freq_base", float(-3.0), "base"),
        ("llama.rope.freq_base", float(f32::INFINITY), "base"),
        ("llama.rope.freq_base", Some(text("large")), "a number was expected"),
        ("llama.rope.scale_linear", float(0.0), "scale of the positions"),
        ("llama.rope.scaling.factor", float(f32::NAN), "scale of the positions"),
        ("llama.rope.scaling.type", Some(text("yarn")), "`yarn`"),
        ("llama.rope.scaling.type", Some(text("longrope")), "`longrope`"),
        ("llama.rope.scaling.type", Some(text("linear")), "factor is missing"),
        ("llama.rope.scaling.type", number(2), "a name was expected"),
        ("llama.block_count", number(1), "tensor `blk.1."),
        ("llama.block_count", number(3), "no tensor `blk.2."),
        ("llama.block_count", number(u32::MAX), "no tensor `blk.2."),
    ];
    for key in [
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
    ] {
        cases.push((key, number(0), key));
        cases.push((key, float(4.0), "a single count was expected"));
        cases.push((key, Some(text("four")), "a single count was expected"));
        cases.push((key, Some(Value::I32(-4)), "a single count was expected"));
        cases.push((key, Some(Value::U64(1 << 40)), "a single count was expected"));
        cases.push((key, list(), "a single count was expected"));
    }
    for key in ["llama.embedding_length", "llama.feed_forward_length", "llama.attention.head_count"]
    {
        cases.push((key, number(u32::MAX - 3), ""));
    }
    for (key, value, expected) in cases {
        let error = folder.error_of(&parts.clone().set(key, value.clone()));
        assert!(error.contains(expected), "{key} = {value:?}: {error}");
    }
    // counts in other types
    folder.loads(&parts.clone().set("llama.block_count", Some(Value::U64(2))));
    folder.loads(&parts.clone().set("llama.block_count", Some(Value::U8(2))));
    folder.loads(&parts.clone().set("llama.block_count", Some(Value::I32(2))));
    folder.loads(&parts.set("llama.rope.freq_base", Some(Value::F64(1e4))));
    // the largest that sizes can be, with nothing behind them
    let mut huge = sizes().parts();
    for key in [
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
    ] {
        huge = huge.set(&format!("llama.{key}"), number(u32::MAX));
    }
    assert!(folder.error_of(&huge).contains("has the shape"));
    // heads without columns would need these shapes
    let mut empty = sizes().parts().set("llama.attention.key_length", number(0));
    for l in 0..2 {
        for name in ["attn_q", "attn_k"] {
            empty = empty.put(&format!("blk.{l}.{name}.weight"), Some(tensor(vec![], &[0, 32])));
        }
    }
    assert!(folder.error_of(&empty).contains("key_length` is 0"));
}

#[test]
fn tensors_that_are_missing_misshapen_or_too_many() {
    let folder = Folder::new();
    let parts = Sizes { tied: false, rope_factors: true, ..sizes() }.parts();
    folder.loads(&parts);
    for (name, _, values) in &parts.tensors {
        let without = parts.clone().put(name, None);
        match name.as_str() {
            "output.weight" | "rope_freqs.weight" => folder.loads(&without),
            name => {
                let error = folder.error_of(&without);
                assert!(error.contains(name), "without {name}: {error}");
            }
        }
        // one row more or less, the transpose, another number of axes
        let dims = values.dims();
        let count = dims.iter().product::<usize>();
        let mut others = vec![
            [&[dims[0] + 1], &dims[1..]].concat(),
            [&[dims[0] - 1], &dims[1..]].concat(),
            vec![1, count, 1],
        ];
        if let [rows, columns] = dims
            && rows != columns
        {
            others.push(vec![*columns, *rows]);
            others.push(vec![count]);
        }
        for shape in others {
            let other = tensor(vec![0.5; shape.iter().product()], &shape);
            let error = folder.error_of(&parts.clone().put(name, Some(other)));
            // another number of rows of the embedding is another vocabulary, for which the output
            // head is the wrong one
            assert!(error.contains("has the shape"), "{name} {shape:?}: {error}");
        }
    }
    for extra in [
        "blk.0.attn_q.bias",
        "blk.1.ffn_gate_inp.weight",
        "blk.2.attn_q.weight",
        "blk.x.attn_q.weight",
        "blk.0",
        "output_norm.bias",
        "attn_q.weight",
        "",
    ] {
        let error = folder.error_of(&parts.clone().put(extra, Some(tensor(vec![0.0; 32], &[32]))));
        assert!(
            error.contains(&format!("tensor `{extra}` has no place in a LLaMA of 2 layers")),
            "{error}"
        );
    }
    let error = folder.error_of(&parts.put("token_embd.weight", Some(tensor(vec![], &[0, 32]))));
    assert!(error.contains("vocabulary is empty"), "{error}");
}

#[test]
fn weights_that_are_not_numbers() {
    let folder = Folder::new();
    for weights in [GgmlDType::F32, GgmlDType::F16] {
        let parts = Sizes { weights, tied: false, rope_factors: true, ..sizes() }.parts();
        for (name, _, values) in &parts.tensors {
            let mut numbers = values.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let last = numbers.len() - 1;
                numbers[last] = bad;
                let error = folder.error_of(
                    &parts.clone().put(name, Some(tensor(numbers.clone(), values.dims()))),
                );
                assert!(
                    error.contains(&format!("`{name}` holds values that are not finite")),
                    "{error}"
                );
            }
        }
    }
    // the scale of a block
    let sizes = Sizes { weights: GgmlDType::Q8_0, ..sizes() };
    let mut bytes = good(&sizes);
    let content = Content::read(&mut File::open(sizes.write().path).unwrap()).unwrap();
    let place =
        (content.tensor_data_offset + content.tensor_infos["blk.1.ffn_up.weight"].offset) as usize;
    bytes[place..place + 2].copy_from_slice(&0x7E00_u16.to_le_bytes());
    assert!(
        folder.error(&bytes).contains("`blk.1.ffn_up.weight` holds values that are not finite")
    );
    // a factor of 0 divides
    let parts = Sizes { rope_factors: true, ..sizes }
        .parts()
        .put("rope_freqs.weight", Some(tensor(vec![0.0; 4], &[4])));
    assert!(folder.error_of(&parts).contains("factors of the rotary embedding"));
}

#[test]
fn weights_so_large_that_sums_overflow() {
    let folder = Folder::new();
    let huge = tensor(vec![3e38; 32 * 32], &[32, 32]);
    sizes().parts().put("blk.0.attn_q.weight", Some(huge.clone())).write(&folder.path());
    let parts =
        Sizes { weights: GgmlDType::F32, ..sizes() }.parts().put("blk.0.attn_q.weight", Some(huge));
    parts.write(&folder.path());
    let model = load(&folder.path()).unwrap();
    let mut state = model.state(&softmax(&model)).unwrap();
    let error = format!("{:#}", model.extend(&mut state, &[5, 6]).unwrap_err());
    assert!(error.contains("attention of layer 0"), "{error}");
    assert!(model.extend(&mut state, &[5]).unwrap_err().to_string().contains("reset it"));
}

#[test]
fn dimensions_whose_product_overflows() {
    let folder = Folder::new();
    let bytes = good(&sizes());
    let name = b"token_embd.weight";
    let place = bytes.windows(name.len()).position(|part| part == name).unwrap() + name.len() + 4;
    for (columns, rows) in
        [(32, 1 << 59), (32, u64::MAX), (u64::MAX, u64::MAX), (1 << 32, 1 << 32), (0, 270), (32, 0)]
    {
        let mut bytes = bytes.clone();
        bytes[place..place + 8].copy_from_slice(&u64::to_le_bytes(columns));
        bytes[place + 8..place + 16].copy_from_slice(&u64::to_le_bytes(rows));
        let error = folder.error(&bytes);
        assert!(error.contains("token_embd.weight") || error.contains("vocabulary"), "{error}");
    }
}

/// Changes bytes before `end` and loads the file: an error or a model, and a model can be used.
fn damaged(sizes: &Sizes, rounds: u64, changes: usize) {
    let folder = Folder::new();
    let bytes = good(sizes);
    let content = Content::read(&mut File::open(sizes.write().path).unwrap()).unwrap();
    let end = content.tensor_data_offset as usize;
    let (mut taken, mut refused) = (0, 0);
    for seed in 0..rounds {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut bytes = bytes.clone();
        for _ in 0..changes {
            let place = random.random_range(0..end);
            match random.random_range(0..3) {
                0 => bytes[place] ^= 1 << random.random_range(0..8),
                1 => bytes[place] = random.random(),
                _ => bytes[place] = [0x00, 0xFF, 0x7F, 0x80][random.random_range(0..4)],
            }
        }
        fs::write(folder.path(), bytes).unwrap();
        match load(&folder.path()) {
            Ok(model) => {
                use_it(&model);
                taken += 1;
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                refused += 1;
            }
        }
    }
    println!("{taken} taken, {refused} refused");
    assert!(refused > 0);
}

#[test]
fn bytes_of_the_header_that_changed() {
    let sizes = Sizes {
        tied: false,
        rope_factors: true,
        scaling: Scaling::Linear(2.0),
        key_length: Some(8),
        ..sizes()
    };
    damaged(&sizes, 400, 1);
    damaged(&Sizes { rope_dims: Some(4), ..sizes }, 100, 3);
}

#[test]
fn bytes_of_sizes_and_shapes_that_changed() {
    // without most of the tokenizer, names and sizes are most of the header
    let folder = Folder::new();
    let parts = sizes().parts();
    let few = |value: Vec<&str>| Some(Value::Array(value.into_iter().map(text).collect()));
    let parts = parts
        .set("tokenizer.ggml.tokens", few(vec!["a", "b", "ab"]))
        .set("tokenizer.ggml.merges", few(vec!["a b"]))
        .set("tokenizer.ggml.token_type", None);
    parts.write(&folder.path());
    let bytes = fs::read(folder.path()).unwrap();
    let end =
        Content::read(&mut File::open(folder.path()).unwrap()).unwrap().tensor_data_offset as usize;
    assert!(end < 2500);
    let mut random = ChaCha8Rng::seed_from_u64(1);
    for place in 0..end {
        let mut bytes = bytes.clone();
        bytes[place] ^= 1 << random.random_range(0..8);
        fs::write(folder.path(), bytes).unwrap();
        if let Ok(model) = load(&folder.path()) {
            use_it(&model);
        }
    }
}
