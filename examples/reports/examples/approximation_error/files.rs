//! What a file is, if it is no file of heads.

use safetensors::tensor::{SafeTensorError, SafeTensors};

/// More tensors are counted, not listed.
const MOST_LISTED: usize = 8;

/// How heads are saved.
const SAVE: &str = "save q, k and v with `safetensors.torch.save_file`, see --help";

/// The tensors of a file, or what is wrong with it and what to do, to go after its name.
pub fn tensors(bytes: &[u8]) -> Result<SafeTensors<'_>, String> {
    if let Some(other) = other_kind(bytes) {
        return Err(other);
    }
    let header = header(bytes)?;
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| {
        let why = match error {
            SafeTensorError::MetadataIncompleteBuffer => {
                "it is shorter or longer than its header says, so copy it again".to_owned()
            }
            SafeTensorError::InvalidOffset(name) => format!(
                "the bytes of `{name}` overlap those of another tensor, or leave a gap, so write \
                 it again"
            ),
            SafeTensorError::TensorInvalidInfo => {
                "the shape of a tensor does not fit its bytes, so write it again".to_owned()
            }
            error => format!("{error}; {SAVE}"),
        };
        format!("is not a whole safetensors file: {why}")
    })?;
    for name in tensors.names() {
        if times(header, name) > 1 {
            return Err(format!(
                "is not a whole safetensors file: `{name}` is there twice, so write it again"
            ));
        }
    }
    Ok(tensors)
}

/// Files that are taken for safetensors files.
fn other_kind(bytes: &[u8]) -> Option<String> {
    let starts: [(&[u8], &str); 7] = [
        (
            b"version https://git-lfs",
            "a Git LFS pointer, not the file itself: fetch that with `git lfs pull`",
        ),
        (b"\x80\x02", "a pickle of Python"),
        (b"\x80\x03", "a pickle of Python"),
        (b"\x80\x04", "a pickle of Python"),
        (b"PK\x03\x04", "a zip archive, as `torch.save` and `numpy.savez` write"),
        (b"\x93NUMPY", "an array of NumPy"),
        (b"GGUF", "a GGUF file of weights, not of queries, keys and values"),
    ];
    if bytes.is_empty() {
        return Some(format!("is empty: {SAVE}"));
    }
    let (_, kind) = starts.iter().find(|(start, _)| bytes.starts_with(start))?;
    let advice = if kind.contains(':') { String::new() } else { format!(": {SAVE}") };
    Some(format!("is {kind}{advice}"))
}

/// The JSON before the tensors.
fn header(bytes: &[u8]) -> Result<&str, String> {
    let whole = || {
        let (length, rest) = bytes.split_first_chunk()?;
        let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
        rest.get(..length)
    };
    let header = whole().ok_or_else(|| {
        format!(
            "is not a whole safetensors file: it ends before its header does, so it was cut off, \
             or is another kind of file; copy it again, or {SAVE}"
        )
    })?;
    std::str::from_utf8(header).map_err(|_| {
        format!(
            "is not a whole safetensors file: its header is not text, so it was cut off, or is \
             another kind of file; {SAVE}"
        )
    })
}

/// How often a name stands before a colon.
fn times(header: &str, name: &str) -> usize {
    let quoted = format!("\"{name}\"");
    let is_key =
        |(at, _): &(usize, &str)| header[at + quoted.len()..].trim_start().starts_with(':');
    header.match_indices(&quoted).filter(is_key).count()
}

/// The tensors of a file, as a list.
pub fn contents(tensors: &SafeTensors<'_>) -> String {
    let mut all = tensors.tensors();
    all.sort_by(|(a, _), (b, _)| a.cmp(b));
    if all.is_empty() {
        return "no tensors".to_owned();
    }
    let mut listed: Vec<String> = all
        .iter()
        .take(MOST_LISTED)
        .map(|(name, tensor)| format!("`{name}` ({:?} {:?})", tensor.dtype(), tensor.shape()))
        .collect();
    if all.len() > MOST_LISTED {
        listed.push(format!("{} more", all.len() - MOST_LISTED));
    }
    listed.join(", ")
}
