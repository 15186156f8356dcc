//! Text to tokens and back, with the tokenizer that a GGUF file carries in its metadata.

mod byte_level;
mod decoder;
mod metadata;
mod sentence_piece;
#[cfg(test)]
pub(crate) mod tests;
mod vocabulary;

use std::collections::{HashMap, HashSet};

use anyhow::{Context, Result, anyhow, bail};
use candle_core::quantized::gguf_file::Value;
use tokenizers::AddedToken;
use tokenizers::models::bpe::Vocab;

pub use self::decoder::Decoder;
use self::metadata::Metadata;
use self::vocabulary::{Kind, Vocabulary};

/// A byte-level or SentencePiece BPE tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The bytes of each token.
    pieces: Vec<Vec<u8>>,
    ids: Vocab,
    /// Tokens that no text makes, longest name first.
    special: Vec<(String, u32)>,
    special_ids: HashSet<u32>,
    family: Family,
    bos: Option<u32>,
    eos: Option<u32>,
    ends: HashSet<u32>,
    adds_bos: bool,
}

/// What differs between the two kinds of BPE.
enum Family {
    ByteLevel { bytes: Box<[bool; 256]> },
    SentencePiece { prefix: bool, covers_all: bool },
}

/// A part of a text in which special tokens count.
enum Part<'a> {
    Text(&'a str),
    Special(u32),
}

impl Tokenizer {
    /// Reads the tokenizer out of a GGUF file's metadata.
    pub fn from_metadata(metadata: &HashMap<String, Value>) -> Result<Self> {
        let metadata = Metadata(metadata);
        let model = metadata.text("tokenizer.ggml.model")?.context(
            "tokenizer.ggml.model is missing: use a GGUF file that has its tokenizer in it",
        )?;
        let vocabulary = Vocabulary::read(&metadata, model == "llama")?;
        let (mut inner, pieces, family) = match model {
            "gpt2" => {
                let built = byte_level::build(&metadata, &vocabulary)?;
                let family = Family::ByteLevel { bytes: Box::new(built.bytes) };
                (built.tokenizer, byte_level::pieces(&vocabulary), family)
            }
            "llama" => {
                let key =
                    metadata.id("tokenizer.ggml.unknown_token_id", vocabulary.tokens.len())?;
                let unknown = key.or_else(|| {
                    (0..)
                        .zip(&vocabulary.kinds)
                        .find(|(_, kind)| **kind == Kind::Unknown)
                        .map(|(id, _)| id)
                });
                let prefix = metadata.flag("tokenizer.ggml.add_space_prefix", true)?;
                let family = Family::SentencePiece { prefix, covers_all: unknown.is_some() };
                (
                    sentence_piece::build(&metadata, &vocabulary, unknown)?,
                    sentence_piece::pieces(&vocabulary)?,
                    family,
                )
            }
            other => bail!(
                "tokenizer.ggml.model is \"{other}\", but only \"gpt2\" (byte-level BPE) and \
                 \"llama\" (SentencePiece BPE) are known here"
            ),
        };
        let user_defined = vocabulary.named(Kind::UserDefined);
        inner
            .add_tokens(
                user_defined.map(|token| AddedToken::from(token.clone(), false).normalized(false)),
            )
            .map_err(|error| anyhow!("the user-defined tokens cannot be used: {error}"))?;
        let special = |token: &String| vocabulary.ids.get(token).map(|id| (token.clone(), *id));
        let mut special: Vec<_> = vocabulary.named(Kind::Control).filter_map(special).collect();
        special.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
        // files made before the key existed rely on it
        let default = model == "llama" && vocabulary.bos.is_some();
        let adds_bos = metadata.flag("tokenizer.ggml.add_bos_token", default)?;
        if adds_bos && vocabulary.bos.is_none() {
            bail!(
                "tokenizer.ggml.add_bos_token is set without tokenizer.ggml.bos_token_id: the \
                 file is damaged"
            );
        }
        let Vocabulary { ids, bos, eos, ends, .. } = vocabulary;
        let special_ids = special.iter().map(|(_, id)| *id).collect();
        Ok(Self { inner, pieces, ids, special, special_ids, family, bos, eos, ends, adds_bos })
    }

    /// The tokens of a text, in which names of special tokens are plain text. The token that begins
    /// a text comes first where the model wants one.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.begin();
        self.encode_part(text, &mut ids)?;
        Ok(ids)
    }

    /// The tokens of a text that goes on where another ended.
    pub fn encode_more(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        self.encode_part(text, &mut ids)?;
        Ok(ids)
    }

    /// The tokens of a text in which names of special tokens stand for them, as in chat templates.
    /// The token that begins a text is not added to a text that has it already.
    pub fn encode_special(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        for part in self.parts(text) {
            match part {
                Part::Text(text) => self.encode_part(text, &mut ids)?,
                Part::Special(id) => ids.push(id),
            }
        }
        if self.adds_bos && ids.first().copied() != self.bos {
            ids.splice(0..0, self.begin());
        }
        Ok(ids)
    }

    /// The text of these tokens; special tokens come out as their names, broken characters as
    /// U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let mut bytes = Vec::new();
        let mut starts = matches!(self.family, Family::SentencePiece { prefix: true, .. });
        for id in ids {
            let piece = self.piece(*id)?;
            let special = self.special_ids.contains(id);
            let added = if starts && !special { piece.strip_prefix(b" ") } else { None };
            bytes.extend_from_slice(added.unwrap_or(piece));
            starts = special && matches!(self.family, Family::SentencePiece { prefix: true, .. });
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A decoder for tokens that come one after the other.
    pub fn decoder(&self) -> Decoder<'_> {
        Decoder::new(self)
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether a model that writes this token has finished its text or its turn.
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.contains(&id)
    }

    /// The number of tokens: every id is below it.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// The token of this name, such as `<|im_start|>`.
    pub fn token_id(&self, name: &str) -> Option<u32> {
        self.ids.get(name).copied()
    }

    fn begin(&self) -> Vec<u32> {
        self.bos.filter(|_| self.adds_bos).into_iter().collect()
    }

    fn piece(&self, id: u32) -> Result<&[u8]> {
        let size = self.pieces.len();
        self.pieces.get(id as usize).map(Vec::as_slice).with_context(|| {
            format!("token {id} is not in the vocabulary of {size} tokens: it is of another model")
        })
    }

    /// Adds the tokens of a text without special tokens.
    fn encode_part(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        if let Some(letter) = text.chars().find(|letter| !self.covers(*letter)) {
            bail!(
                "the vocabulary has no token for {letter:?} (U+{:04X}): take it out of the text",
                u32::from(letter)
            );
        }
        let encoded = match self.family {
            Family::SentencePiece { prefix, .. } => {
                let spaced = text.replace(' ', "▁");
                self.inner.encode_fast(if prefix { format!("▁{spaced}") } else { spaced }, false)
            }
            Family::ByteLevel { .. } => self.inner.encode_fast(text, false),
        };
        ids.extend_from_slice(
            encoded
                .map_err(|error| anyhow!("the text cannot be split into tokens: {error}"))?
                .get_ids(),
        );
        Ok(())
    }

    /// Whether some tokens make this character.
    fn covers(&self, letter: char) -> bool {
        let mut buffer = [0; 4];
        match &self.family {
            Family::ByteLevel { bytes } => {
                letter.encode_utf8(&mut buffer).bytes().all(|byte| bytes[usize::from(byte)])
            }
            Family::SentencePiece { covers_all: true, .. } => true,
            Family::SentencePiece { .. } => {
                let text: &str =
                    if letter == ' ' { "▁" } else { letter.encode_utf8(&mut buffer) };
                self.ids.contains_key(text)
                    || text.bytes().all(|byte| self.ids.contains_key(&format!("<0x{byte:02X}>")))
            }
        }
    }

    /// The text cut at special tokens; where several begin, the longest counts.
    fn parts<'a>(&self, text: &'a str) -> Vec<Part<'a>> {
        let first: HashSet<u8> =
            self.special.iter().filter_map(|(name, _)| name.bytes().next()).collect();
        let mut parts = Vec::new();
        let (mut start, mut at) = (0, 0);
        while let Some(byte) = text.as_bytes().get(at) {
            let rest = text.get(at..).filter(|_| first.contains(byte)).unwrap_or("");
            let Some((name, id)) =
                self.special.iter().find(|(name, _)| rest.starts_with(name.as_str()))
            else {
                at += 1;
                continue;
            };
            parts.extend(text.get(start..at).filter(|text| !text.is_empty()).map(Part::Text));
            parts.push(Part::Special(*id));
            at += name.len();
            start = at;
        }
        parts.extend(text.get(start..).filter(|text| !text.is_empty()).map(Part::Text));
        parts
    }
}
