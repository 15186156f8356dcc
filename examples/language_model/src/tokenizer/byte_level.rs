//! Byte-level BPE: every byte is a printable character, text is split by a regular expression
//! first.

use std::collections::HashMap;

use anyhow::{Context, Result, anyhow, bail};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, models::bpe::BPE};

use super::metadata::Metadata;
use super::vocabulary::{Kind, Vocabulary};

const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// The model without added tokens, and which bytes have a token of their own.
pub(super) struct Built {
    pub tokenizer: tokenizers::Tokenizer,
    pub bytes: [bool; 256],
}

/// Builds the BPE of `tokenizer.ggml.model` = "gpt2".
pub(super) fn build(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<Built> {
    let pre = metadata.text("tokenizer.ggml.pre")?.unwrap_or("default");
    let merges = merges(metadata, vocabulary)?;
    let model = BPE::builder()
        .vocab_and_merges(vocabulary.ids.clone(), merges)
        .ignore_merges(matches!(pre, "llama-bpe" | "llama3" | "llama-v3"))
        .build()
        .map_err(|error| anyhow!("the merges do not fit the vocabulary: {error}"))?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(pre_tokenizer(pre)?));
    if pre == "qwen2" {
        tokenizer.with_normalizer(Some(NFC)).map_err(|error| anyhow!("{error}"))?;
    }
    let mut bytes = [false; 256];
    for (letter, byte) in alphabet() {
        bytes[usize::from(byte)] =
            vocabulary.ids.contains_key(letter.encode_utf8(&mut [0; 4]) as &str);
    }
    Ok(Built { tokenizer, bytes })
}

/// How the text is split before the merges.
fn pre_tokenizer(name: &str) -> Result<PreTokenizerWrapper> {
    let gpt2 = ByteLevel::new(false, true, true);
    let split = |pattern: &str| -> Result<PreTokenizerWrapper> {
        let pattern = SplitPattern::Regex(pattern.to_owned());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
            .map_err(|error| anyhow!("{error}"))?;
        Ok(Sequence::new(vec![split.into(), ByteLevel::new(false, true, false).into()]).into())
    };
    match name {
        "smollm" | "starcoder" | "refact" => {
            Ok(Sequence::new(vec![Digits::new(true).into(), gpt2.into()]).into())
        }
        "gpt-2" | "phi-2" | "default" => Ok(gpt2.into()),
        "llama-bpe" | "llama3" | "llama-v3" => split(LLAMA3),
        "qwen2" => split(QWEN2),
        other => bail!(
            "tokenizer.ggml.pre is \"{other}\", a way of splitting text that is not known here: \
             smollm, starcoder, refact, gpt-2, phi-2, llama-bpe and qwen2 are"
        ),
    }
}

/// The pairs to merge, in order; each pair and what it makes are in the vocabulary.
fn merges(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<Vec<(String, String)>> {
    const KEY: &str = "tokenizer.ggml.merges";
    let lines = metadata.strings(KEY)?.context(
        "tokenizer.ggml.merges is missing: use a GGUF file that was converted with its tokenizer",
    )?;
    let mut merges = Vec::with_capacity(lines.len());
    for (place, line) in lines.into_iter().enumerate() {
        let (left, right) = match line.split_once(' ') {
            Some((left, right))
                if !left.is_empty() && !right.is_empty() && !right.contains(' ') =>
            {
                (left, right)
            }
            _ => bail!(
                "{KEY}[{place}] is \"{line}\", not two pieces with a space between: the file is \
                 damaged"
            ),
        };
        for piece in [left, right, &format!("{left}{right}")] {
            if !vocabulary.ids.contains_key(piece) {
                bail!(
                    "{KEY}[{place}] needs \"{piece}\", which is not in the vocabulary: the file \
                     is damaged"
                );
            }
        }
        merges.push((left.to_owned(), right.to_owned()));
    }
    Ok(merges)
}

/// The bytes of each token.
pub(super) fn pieces(vocabulary: &Vocabulary) -> Vec<Vec<u8>> {
    let bytes: HashMap<char, u8> = alphabet().collect();
    let piece = |(token, kind): (&String, &Kind)| match kind {
        Kind::Control | Kind::UserDefined => token.clone().into_bytes(),
        _ => token
            .chars()
            .map(|letter| bytes.get(&letter).copied())
            .collect::<Option<_>>()
            .unwrap_or_else(|| token.clone().into_bytes()),
    };
    vocabulary.tokens.iter().zip(&vocabulary.kinds).map(piece).collect()
}

/// The character that stands for each byte: itself where it is printable, else one from U+0100 on.
pub(super) fn alphabet() -> impl Iterator<Item = (char, u8)> {
    let mut next = (0x100..).filter_map(char::from_u32);
    (0..=255u8).filter_map(move |byte| {
        let letter = match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => Some(char::from(byte)),
            _ => next.next(),
        };
        letter.map(|letter| (letter, byte))
    })
}
