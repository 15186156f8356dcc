//! What the exact model makes of a context: computed, or read from a folder that keeps it.

use crate::model::{Model, hash};
use anyhow::{Context, Result};
use dijiang::MultiHead;
use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The model as it came.
pub struct Exact<'a> {
    model: &'a Model,
    layers: Vec<MultiHead<f32>>,
    folder: Option<Folder>,
}

/// Where hidden states are kept.
struct Folder {
    path: PathBuf,
    /// Of the model and its weights.
    fingerprint: String,
}

impl<'a> Exact<'a> {
    /// With a folder, hidden states are kept there and read again.
    pub fn new(model: &'a Model, folder: Option<&Path>) -> Result<Self> {
        let keep = |path: &Path| -> Result<Folder> {
            fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
            let fingerprint = format!("{} {:016x}", model.fingerprint(), model.hash_of_weights());
            Ok(Folder { path: path.to_owned(), fingerprint })
        };
        let folder = folder.map(keep).transpose()?;
        Ok(Self { model, layers: model.exact_layers()?, folder })
    }

    /// The last hidden states `[n, width]` of a context.
    pub fn hidden(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        let size = tokens.len() * self.model.config().width;
        let path = self.folder.as_ref().map(|folder| folder.file(tokens));
        if let Some(bytes) = path.as_ref().and_then(|path| fs::read(path).ok())
            && bytes.len() == size * size_of::<f32>()
        {
            let numbers = bytes.as_chunks::<4>().0.iter();
            return Ok(numbers.map(|&bytes| f32::from_le_bytes(bytes)).collect());
        }
        let mut state = self.model.state(&self.layers)?;
        let hidden = self.model.extend(&mut state, tokens)?;
        let hidden: Vec<f32> = hidden.iter().copied().collect();
        if let Some(path) = path {
            let bytes: Vec<u8> = hidden.iter().flat_map(|x| x.to_le_bytes()).collect();
            // others may be at the same context
            static PARTS: AtomicUsize = AtomicUsize::new(0);
            let part = PARTS.fetch_add(1, Ordering::Relaxed);
            let part = path.with_extension(format!("{}-{part}.part", process::id()));
            let written = fs::write(&part, bytes).and_then(|()| fs::rename(&part, &path));
            written.with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(hidden)
    }
}

impl Folder {
    /// The file of a context: a hash of the model and the tokens.
    fn file(&self, tokens: &[u32]) -> PathBuf {
        let bytes = self.fingerprint.bytes().chain(tokens.iter().flat_map(|t| t.to_le_bytes()));
        self.path.join(format!("{:016x}.f32", hash(bytes)))
    }
}
