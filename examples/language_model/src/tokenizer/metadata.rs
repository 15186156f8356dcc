//! Typed reading of a GGUF file's metadata, with errors that name the key.

use std::collections::HashMap;

use anyhow::{Result, anyhow, bail};
use candle_core::quantized::gguf_file::Value;

/// The metadata of a GGUF file, read by key.
pub(super) struct Metadata<'a>(pub &'a HashMap<String, Value>);

impl<'a> Metadata<'a> {
    /// A string; none where the key is missing.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(key, "a string", other)),
        }
    }

    /// A flag; `default` where the key is missing.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.0.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(wrong(key, "true or false", other)),
        }
    }

    /// A token id below `vocab_size`; none where the key is missing.
    pub fn id(&self, key: &str, vocab_size: usize) -> Result<Option<u32>> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        let id = integer(value).ok_or_else(|| wrong(key, "a token id", value))?;
        match u32::try_from(id) {
            Ok(id) if (id as usize) < vocab_size => Ok(Some(id)),
            _ => bail!(
                "{key} is {id}, but the vocabulary has {vocab_size} tokens: the file is damaged"
            ),
        }
    }

    /// A list of strings; none where the key is missing.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        self.list(key, "strings", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A list of whole numbers; none where the key is missing.
    pub fn integers(&self, key: &str) -> Result<Option<Vec<i64>>> {
        self.list(key, "whole numbers", integer)
    }

    /// A list of numbers; none where the key is missing.
    pub fn floats(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.list(key, "numbers", |value| match value {
            Value::F32(number) => Some(f64::from(*number)),
            Value::F64(number) => Some(*number),
            _ => None,
        })
    }

    fn list<T>(
        &self,
        key: &str,
        what: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let values = match self.0.get(key) {
            None => return Ok(None),
            Some(Value::Array(values)) => values,
            Some(other) => return Err(wrong(key, &format!("a list of {what}"), other)),
        };
        let read = |(place, value)| {
            read(value).ok_or_else(|| wrong(&format!("{key}[{place}]"), what, value))
        };
        values.iter().enumerate().map(read).collect::<Result<_>>().map(Some)
    }
}

fn integer(value: &Value) -> Option<i64> {
    match *value {
        Value::U8(n) => Some(n.into()),
        Value::I8(n) => Some(n.into()),
        Value::U16(n) => Some(n.into()),
        Value::I16(n) => Some(n.into()),
        Value::U32(n) => Some(n.into()),
        Value::I32(n) => Some(n.into()),
        Value::U64(n) => i64::try_from(n).ok(),
        Value::I64(n) => Some(n),
        _ => None,
    }
}

fn wrong(key: &str, expected: &str, value: &Value) -> anyhow::Error {
    anyhow!(
        "{key} holds {:?} where {expected} was expected: the file is damaged",
        value.value_type()
    )
}
