//! SentencePiece BPE: merges by score, a space is "▁", characters without a piece are spelt in
//! bytes.

use anyhow::{Context, Result, anyhow, bail};
use tokenizers::models::bpe::BPE;

use super::metadata::Metadata;
use super::vocabulary::{Kind, Vocabulary};

/// Builds the BPE of `tokenizer.ggml.model` = "llama"; `unknown` stands for what has no piece and
/// no bytes.
pub(super) fn build(
    metadata: &Metadata,
    vocabulary: &Vocabulary,
    unknown: Option<u32>,
) -> Result<tokenizers::Tokenizer> {
    let merges = merges(metadata, vocabulary)?;
    let mut builder = BPE::builder()
        .vocab_and_merges(vocabulary.ids.clone(), merges)
        .byte_fallback(true)
        .fuse_unk(true);
    if let Some(token) = unknown.and_then(|id| vocabulary.tokens.get(id as usize)) {
        builder = builder.unk_token(token.clone());
    }
    let model = builder
        .build()
        .map_err(|error| anyhow!("the merges do not fit the vocabulary: {error}"))?;
    Ok(tokenizers::Tokenizer::new(model))
}

/// Every way to make a piece of two others, the piece of the highest score first.
fn merges(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<Vec<(String, String)>> {
    const KEY: &str = "tokenizer.ggml.scores";
    let scores = metadata.floats(KEY)?.context(
        "tokenizer.ggml.scores is missing: use a GGUF file that was converted with its tokenizer",
    )?;
    let (tokens, kinds) = (&vocabulary.tokens, &vocabulary.kinds);
    if scores.len() != tokens.len() {
        bail!(
            "{KEY} has {} entries for {} tokens: the file is damaged",
            scores.len(),
            tokens.len()
        );
    }
    if let Some(place) = scores.iter().position(|score| score.is_nan()) {
        bail!("{KEY}[{place}] is not a number: the file is damaged");
    }
    let merged = |piece: &str| {
        let id = *vocabulary.ids.get(piece)?;
        matches!(kinds.get(id as usize)?, Kind::Normal | Kind::Unused).then_some(id)
    };
    let mut found = Vec::new();
    for (token, score) in tokens.iter().zip(&scores) {
        if merged(token).is_none() {
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if merged(left).is_some() && merged(right).is_some() {
                found.push((*score, left.chars().count(), left, right));
            }
        }
    }
    // Of equal scores the longer left half comes first, then the lower id.
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| b.1.cmp(&a.1)));
    Ok(found.into_iter().map(|(_, _, left, right)| (left.to_owned(), right.to_owned())).collect())
}

/// The bytes of each token.
pub(super) fn pieces(vocabulary: &Vocabulary) -> Result<Vec<Vec<u8>>> {
    let piece = |(id, (token, kind)): (usize, (&String, &Kind))| match kind {
        Kind::Byte => byte(token).map(|byte| vec![byte]).with_context(|| {
            format!(
                "token {id}, \"{token}\", is a byte by its type, but not by its name: the file is \
                 damaged"
            )
        }),
        Kind::Control | Kind::Unknown => Ok(token.clone().into_bytes()),
        _ => Ok(token.replace('▁', " ").into_bytes()),
    };
    vocabulary.tokens.iter().zip(&vocabulary.kinds).enumerate().map(piece).collect()
}

/// The byte that a token such as `<0x0A>` stands for.
pub(super) fn byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}
