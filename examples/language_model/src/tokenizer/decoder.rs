//! Text out of one token after the other.

use anyhow::Result;

use super::Tokenizer;

/// Turns tokens into text as they come; a character split over several tokens comes out with the
/// last of them.
pub struct Decoder<'a> {
    tokenizer: &'a Tokenizer,
    pending: Vec<u8>,
}

impl<'a> Decoder<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, pending: Vec::new() }
    }

    /// The text that this token completes; none while a character is still incomplete.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.pending.extend_from_slice(self.tokenizer.piece(id)?);
        let mut text = String::new();
        let mut incomplete = Vec::new();
        let mut chunks = self.pending.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            match std::str::from_utf8(chunk.invalid()) {
                Ok(_) => {}
                Err(error) if error.error_len().is_none() && chunks.peek().is_none() => {
                    incomplete = chunk.invalid().to_vec()
                }
                Err(_) => text.push(char::REPLACEMENT_CHARACTER),
            }
        }
        self.pending = incomplete;
        Ok((!text.is_empty()).then_some(text))
    }

    /// What is left when no more tokens come: a replacement character for an unfinished one.
    pub fn finish(self) -> Option<String> {
        (!self.pending.is_empty()).then(|| String::from_utf8_lossy(&self.pending).into_owned())
    }
}
