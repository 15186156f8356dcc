//! GGUF files that a fuzzer makes up (`fuzz/model`), and those of them that are kept.

use crate::common::{Sizes, softmax};
use arbitrary::{Result, Unstructured};
use candle_core::quantized::GgmlDType;
use language_model::gguf::Gguf;
use language_model::linear::Weights;
use language_model::model::Model;
use language_model::tokenizer::Tokenizer;
use std::cell::OnceCell;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

#[path = "../../../../tests/suite/fuzzed/damage.rs"]
mod damage;

/// A file: an error, or a model that can read.
pub fn gguf(bytes: &[u8]) {
    let _ = run(&mut Unstructured::new(bytes));
}

/// Bytes of the header, about.
const HEADER: usize = 9000;

/// A folder, where the file that is tried lies, and a good one.
struct Tried {
    folder: TempDir,
    good: Vec<u8>,
}

impl Tried {
    fn new() -> Self {
        let sizes = Sizes {
            layers: 1,
            width: 32,
            heads: 2,
            kv_heads: 1,
            feed_forward: 32,
            vocabulary: 262,
            weights: GgmlDType::Q8_0,
            ..Sizes::default()
        };
        let written = sizes.write();
        let good = fs::read(&written.path).expect("it was written");
        Self { folder: written.folder, good }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("tried.gguf")
    }
}

fn run(u: &mut Unstructured<'_>) -> Result<()> {
    thread_local! {
        static TRIED: OnceCell<Tried> = const { OnceCell::new() };
    }
    TRIED.with(|tried| {
        let tried = tried.get_or_init(Tried::new);
        let bytes = match u.ratio(1, 8)? {
            true => u.bytes(u.len())?.to_vec(),
            false => damage::damaged(u, tried.good.clone(), HEADER)?,
        };
        fs::write(tried.path(), bytes).expect("a file");
        for weights in [Weights::F32, Weights::Quantised] {
            match load(&tried.path(), weights) {
                Ok(model) => {
                    let mut state = model.state(&softmax(&model)).expect("a state");
                    if let Ok(hidden) = model.extend(&mut state, &[0, 1, 2]) {
                        model.logits(&mut state, &hidden);
                    }
                }
                Err(error) => assert!(!error.to_string().is_empty()),
            }
        }
        Ok(())
    })
}

fn load(path: &Path, weights: Weights) -> anyhow::Result<Model> {
    let mut file = Gguf::open(path)?;
    Tokenizer::from_metadata(file.metadata())?;
    Model::from_gguf(&mut file, weights)
}

#[test]
fn kept_files_are_read_or_refused() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/model/corpus/gguf");
    let files = fs::read_dir(corpus).unwrap();
    files.for_each(|file| gguf(&fs::read(file.unwrap().path()).unwrap()));
}
