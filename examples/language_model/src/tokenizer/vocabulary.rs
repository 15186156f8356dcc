//! The tokens of a GGUF file, what each is for, and where text ends.

use std::collections::HashSet;

use anyhow::{Context, Result, bail};
use tokenizers::models::bpe::Vocab;

use super::metadata::Metadata;
use super::sentence_piece;

/// Names that end a text or a turn, whatever the file says about their type.
const ENDS: [&str; 9] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "<EOT>",
    "<｜end▁of▁sentence｜>",
];

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// The tokens and their kinds.
pub(super) struct Vocabulary {
    pub tokens: Vec<String>,
    pub kinds: Vec<Kind>,
    pub ids: Vocab,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub ends: HashSet<u32>,
}

impl Vocabulary {
    /// Reads the tokens; `spaces` writes a space in a token as "▁".
    pub fn read(metadata: &Metadata, spaces: bool) -> Result<Self> {
        let names = metadata.strings("tokenizer.ggml.tokens")?.context(
            "tokenizer.ggml.tokens is missing: use a GGUF file that has its tokenizer in it",
        )?;
        if names.is_empty() {
            bail!("tokenizer.ggml.tokens is empty: use a GGUF file that has its tokenizer in it");
        }
        let size = names.len();
        let id = |key: &str| metadata.id(&format!("tokenizer.ggml.{key}_token_id"), size);
        let (bos, eos, turn, message) = (id("bos")?, id("eos")?, id("eot")?, id("eom")?);
        let mut kinds = match metadata.integers("tokenizer.ggml.token_type")? {
            Some(types) if types.len() != size => {
                bail!(
                    "tokenizer.ggml.token_type has {} entries for {size} tokens: the file is \
                     damaged",
                    types.len()
                )
            }
            Some(types) => types.into_iter().enumerate().map(kind).collect::<Result<Vec<_>>>()?,
            None => guessed(&names, &[bos, eos, turn, message], spaces),
        };
        let mut ends: HashSet<u32> = [eos, turn, message].into_iter().flatten().collect();
        let (mut tokens, mut ids) = (Vec::with_capacity(size), Vocab::default());
        for ((name, kind), id) in names.into_iter().zip(&mut kinds).zip(0..) {
            if ENDS.contains(&name) {
                *kind = Kind::Control;
                ends.insert(id);
            }
            let text = match kind {
                Kind::Normal | Kind::UserDefined | Kind::Unused if spaces => name.replace(' ', "▁"),
                _ => name.to_owned(),
            };
            ids.insert(text.clone(), id);
            tokens.push(text);
        }
        Ok(Self { tokens, kinds, ids, bos, eos, ends })
    }

    /// The names of the tokens of one kind; tokens without a name are left out.
    pub fn named(&self, kind: Kind) -> impl Iterator<Item = &String> {
        let of_kind = move |(token, other): (_, &Kind)| (*other == kind).then_some(token);
        self.tokens.iter().zip(&self.kinds).filter_map(of_kind).filter(|token| !token.is_empty())
    }
}

fn kind((place, number): (usize, i64)) -> Result<Kind> {
    Ok(match number {
        0 | 1 => Kind::Normal,
        2 => Kind::Unknown,
        3 => Kind::Control,
        4 => Kind::UserDefined,
        5 => Kind::Unused,
        6 => Kind::Byte,
        _ => bail!(
            "tokenizer.ggml.token_type[{place}] is {number}, not a type from 1 to 6: the file is \
             damaged"
        ),
    })
}

/// Kinds for a file that gives none: what marks begin and end is control, and bytes go by their
/// names.
fn guessed(names: &[&str], control: &[Option<u32>], bytes: bool) -> Vec<Kind> {
    let guess = |(name, id): (&&str, u32)| match name {
        _ if control.contains(&Some(id)) => Kind::Control,
        &"<unk>" if bytes => Kind::Unknown,
        name if bytes && sentence_piece::byte(name).is_some() => Kind::Byte,
        _ => Kind::Normal,
    };
    names.iter().zip(0..).map(guess).collect()
}
