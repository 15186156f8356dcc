use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value;
use proptest::prelude::*;

use super::{Tokenizer, byte_level};

type Metadata = HashMap<String, Value>;

fn text(value: &str) -> Value {
    Value::String(value.to_owned())
}

fn texts(values: &[&str]) -> Value {
    Value::Array(values.iter().map(|value| text(value)).collect())
}

fn set(metadata: &mut Metadata, key: &str, value: Value) {
    metadata.insert(format!("tokenizer.ggml.{key}"), value);
}

/// Ids 0 to 255 are the bytes, then `merges`, then `special` as control tokens.
fn byte_level_metadata(pre: &str, merges: &[&str], special: &[&str]) -> Metadata {
    let mut letters: Vec<_> = byte_level::alphabet().collect();
    letters.sort_by_key(|(_, byte)| *byte);
    let mut tokens: Vec<String> =
        letters.into_iter().map(|(letter, _)| letter.to_string()).collect();
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let mut types = vec![Value::I32(1); tokens.len()];
    tokens.extend(special.iter().map(|name| (*name).to_owned()));
    types.resize(tokens.len(), Value::I32(3));
    let mut metadata = Metadata::new();
    set(&mut metadata, "model", text("gpt2"));
    set(&mut metadata, "pre", text(pre));
    set(&mut metadata, "tokens", Value::Array(tokens.into_iter().map(Value::String).collect()));
    set(&mut metadata, "token_type", Value::Array(types));
    set(&mut metadata, "merges", texts(merges));
    metadata
}

/// A tokenizer of bytes, four merges (256 to 259) and two special tokens (260, 261).
pub(crate) fn byte_level() -> Tokenizer {
    let merges = ["h e", "l l", "he ll", "Ġ hell"];
    Tokenizer::from_metadata(&byte_level_metadata(
        "smollm",
        &merges,
        &["<|im_start|>", "<|im_end|>"],
    ))
    .unwrap()
}

/// Ids 0 to 258 are `<unk>`, `<s>`, `</s>` and the bytes, then the pieces in order of falling
/// score.
fn sentence_piece_metadata(pieces: &[&str]) -> Metadata {
    let bytes: Vec<String> = (0..=255).map(|byte| format!("<0x{byte:02X}>")).collect();
    let mut tokens = vec!["<unk>", "<s>", "</s>"];
    tokens.extend(bytes.iter().map(String::as_str));
    tokens.extend(pieces);
    let mut types = vec![2, 3, 3];
    types.resize(259, 6);
    types.resize(tokens.len(), 1);
    let scores = (0..tokens.len()).map(|id| if id < 259 { 0.0 } else { 258.0 - id as f32 });
    let mut metadata = Metadata::new();
    set(&mut metadata, "model", text("llama"));
    set(&mut metadata, "tokens", texts(&tokens));
    set(&mut metadata, "scores", Value::Array(scores.map(Value::F32).collect()));
    set(&mut metadata, "token_type", Value::Array(types.into_iter().map(Value::I32).collect()));
    set(&mut metadata, "bos_token_id", Value::U32(1));
    set(&mut metadata, "eos_token_id", Value::U32(2));
    set(&mut metadata, "add_bos_token", Value::Bool(false));
    metadata
}

const PIECES: [&str; 9] = ["lo", "he", "▁he", "hel", "▁", "h", "e", "l", "o"];

fn error(metadata: &Metadata) -> String {
    match Tokenizer::from_metadata(metadata) {
        Ok(_) => panic!("the metadata was taken"),
        Err(error) => format!("{error:#}"),
    }
}

#[test]
fn merges_apply_in_order() {
    let tokenizer = byte_level();
    assert_eq!(
        tokenizer.encode("hello hello").unwrap(),
        [258, u32::from(b'o'), 259, u32::from(b'o')]
    );
    assert_eq!(tokenizer.vocab_size(), 262);
    assert_eq!(tokenizer.encode("").unwrap(), [] as [u32; 0]);
}

#[test]
fn digits_stand_alone_where_the_model_wants_them_to() {
    let ids = |pre| {
        Tokenizer::from_metadata(&byte_level_metadata(pre, &["1 2", "12 3"], &[]))
            .unwrap()
            .encode("1234")
            .unwrap()
    };
    assert_eq!(ids("smollm"), "1234".bytes().map(u32::from).collect::<Vec<_>>());
    assert_eq!(ids("qwen2"), ids("starcoder"));
    assert_eq!(ids("gpt-2"), [257, u32::from(b'4')]);
    assert_eq!(ids("llama-bpe"), [257, u32::from(b'4')]);
}

#[test]
fn qwen_composes_letters() {
    let tokenizer = Tokenizer::from_metadata(&byte_level_metadata("qwen2", &[], &[])).unwrap();
    assert_eq!(tokenizer.decode(&tokenizer.encode("e\u{301}").unwrap()).unwrap(), "é");
}

#[test]
fn special_tokens_count_only_when_asked_for() {
    let tokenizer = byte_level();
    let prompt = "<|im_start|>hello<|im_end|>";
    assert_eq!(tokenizer.encode(prompt).unwrap().len(), 27 - 3);
    assert_eq!(tokenizer.encode_special(prompt).unwrap(), [260, 258, u32::from(b'o'), 261]);
    assert_eq!(tokenizer.decode(&[260, 258, 261]).unwrap(), "<|im_start|>hell<|im_end|>");
    assert!(tokenizer.is_end(261) && !tokenizer.is_end(260));
    assert_eq!(tokenizer.token_id("<|im_start|>"), Some(260));
}

#[test]
fn user_defined_tokens_always_count() {
    let mut metadata = byte_level_metadata("gpt-2", &[], &["<a b>"]);
    let types = (0..257).map(|id| Value::U8(if id == 256 { 4 } else { 1 })).collect();
    set(&mut metadata, "token_type", Value::Array(types));
    let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
    assert_eq!(tokenizer.encode("x<a b>y").unwrap(), [u32::from(b'x'), 256, u32::from(b'y')]);
    assert_eq!(tokenizer.decode(&[256]).unwrap(), "<a b>");
}

#[test]
fn text_begins_with_the_token_for_it() {
    let mut metadata = byte_level_metadata("gpt-2", &[], &["<s>"]);
    set(&mut metadata, "bos_token_id", Value::U32(256));
    set(&mut metadata, "add_bos_token", Value::Bool(true));
    let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
    assert_eq!(tokenizer.bos(), Some(256));
    assert_eq!(tokenizer.encode("a").unwrap(), [256, 97]);
    assert_eq!(tokenizer.encode_special("a").unwrap(), [256, 97]);
    assert_eq!(tokenizer.encode_special("<s>a").unwrap(), [256, 97]);
    metadata.remove("tokenizer.ggml.bos_token_id");
    assert!(error(&metadata).contains("add_bos_token is set without"));
}

#[test]
fn a_stream_gives_whole_characters() {
    let tokenizer = byte_level();
    let mut decoder = tokenizer.decoder();
    let pushed: Vec<_> = "é€".bytes().map(|byte| decoder.push(byte.into()).unwrap()).collect();
    assert_eq!(pushed, [None, Some("é".to_owned()), None, None, Some("€".to_owned())]);
    assert_eq!(decoder.push(0xE2).unwrap(), None);
    assert_eq!(decoder.push(258).unwrap().as_deref(), Some("\u{FFFD}hell"));
    assert!(
        decoder
            .push(262)
            .unwrap_err()
            .to_string()
            .contains("token 262 is not in the vocabulary of 262 tokens")
    );
    assert_eq!(decoder.push(0xE2).unwrap(), None);
    assert_eq!(decoder.finish().as_deref(), Some("\u{FFFD}"));
    assert!(tokenizer.decode(&[u32::MAX]).is_err());
}

#[test]
fn sentence_pieces_merge_by_score() {
    let tokenizer = Tokenizer::from_metadata(&sentence_piece_metadata(&PIECES)).unwrap();
    // "lo" scores above "hel": ▁he l lo, not ▁hel lo.
    let named = |names: &[&str]| {
        names.iter().map(|name| tokenizer.token_id(name).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(tokenizer.encode("hello").unwrap(), named(&["▁he", "l", "lo"]));
    assert_eq!(tokenizer.encode(" ho").unwrap(), named(&["▁", "▁", "h", "o"]));
    assert_eq!(tokenizer.encode("é").unwrap(), named(&["▁", "<0xC3>", "<0xA9>"]));
    assert_eq!(tokenizer.encode("</s>").unwrap()[0], named(&["▁"])[0]);
    assert_eq!(tokenizer.encode_special("hel</s>").unwrap(), named(&["▁he", "l", "</s>"]));
    assert_eq!(tokenizer.decode(&tokenizer.encode("  hello é\n").unwrap()).unwrap(), "  hello é\n");
    assert!(tokenizer.is_end(2) && tokenizer.eos() == Some(2));
    // a file that does not say begins its texts
    let mut silent = sentence_piece_metadata(&PIECES);
    silent.remove("tokenizer.ggml.add_bos_token");
    assert_eq!(
        Tokenizer::from_metadata(&silent).unwrap().encode("hello").unwrap(),
        named(&["<s>", "▁he", "l", "lo"])
    );
}

#[test]
fn sentence_pieces_without_prefix_bytes_or_unknown() {
    let mut metadata = sentence_piece_metadata(&PIECES);
    set(&mut metadata, "add_space_prefix", Value::Bool(false));
    let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
    assert_eq!(tokenizer.decode(&tokenizer.encode(" he").unwrap()).unwrap(), " he");
    assert_eq!(tokenizer.encode("h").unwrap(), [tokenizer.token_id("h").unwrap()]);

    let mut metadata = Metadata::new();
    set(&mut metadata, "model", text("llama"));
    set(&mut metadata, "tokens", texts(&["▁", "a"]));
    set(&mut metadata, "scores", Value::Array(vec![Value::F32(0.0); 2]));
    let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
    assert_eq!(tokenizer.encode("a a").unwrap(), [0, 1, 0, 1]);
    assert!(tokenizer.encode("ab").unwrap_err().to_string().contains("no token for 'b' (U+0062)"));
    set(&mut metadata, "unknown_token_id", Value::U32(1));
    assert_eq!(Tokenizer::from_metadata(&metadata).unwrap().encode("bb").unwrap(), [0, 1]);
}

#[test]
fn types_are_guessed_where_the_file_has_none() {
    let mut metadata = sentence_piece_metadata(&PIECES);
    let with = Tokenizer::from_metadata(&metadata).unwrap();
    metadata.remove("tokenizer.ggml.token_type");
    let without = Tokenizer::from_metadata(&metadata).unwrap();
    for sample in ["hello <s> é", "<unk><0x0A>"] {
        assert_eq!(with.encode(sample).unwrap(), without.encode(sample).unwrap());
        assert_eq!(with.encode_special(sample).unwrap(), without.encode_special(sample).unwrap());
    }
}

#[test]
fn byte_level_vocabularies_with_gaps() {
    let mut metadata = Metadata::new();
    set(&mut metadata, "model", text("gpt2"));
    set(&mut metadata, "tokens", texts(&["a", "b", "ab", "ab", ""]));
    set(&mut metadata, "merges", texts(&["a b"]));
    let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
    assert_eq!(tokenizer.encode("ab").unwrap(), [3]);
    assert_eq!(tokenizer.decode(&[2, 3, 4, 0]).unwrap(), "ababa");
    assert!(tokenizer.encode("a c").unwrap_err().to_string().contains("no token for ' ' (U+0020)"));
}

#[test]
fn malformed_metadata_is_refused() {
    let whole = || byte_level_metadata("gpt-2", &["a b"], &["<s>"]);
    let cases: [(&str, Option<Value>, &str); 19] = [
        ("model", None, "tokenizer.ggml.model is missing"),
        ("model", Some(text("bert")), "only \"gpt2\""),
        ("model", Some(Value::U32(1)), "holds U32 where a string was expected"),
        ("model", Some(text("llama")), "tokenizer.ggml.scores is missing"),
        ("pre", Some(text("martian")), "\"martian\", a way of splitting text that is not known"),
        ("tokens", None, "tokenizer.ggml.tokens is missing"),
        ("tokens", Some(texts(&[])), "tokenizer.ggml.tokens is empty"),
        ("tokens", Some(text("a")), "where a list of strings was expected"),
        (
            "tokens",
            Some(Value::Array(vec![Value::U8(1)])),
            "tokenizer.ggml.tokens[0] holds U8 where strings was expected",
        ),
        ("merges", None, "tokenizer.ggml.merges is missing"),
        (
            "merges",
            Some(texts(&["a b", "ab c"])),
            "merges[1] needs \"abc\", which is not in the vocabulary",
        ),
        ("merges", Some(texts(&["xyz ab"])), "needs \"xyz\""),
        ("merges", Some(texts(&["ab"])), "not two pieces"),
        ("merges", Some(texts(&["a b c"])), "not two pieces"),
        (
            "token_type",
            Some(Value::Array(vec![Value::I32(1)])),
            "token_type has 1 entries for 258 tokens",
        ),
        ("token_type", Some(Value::Array(vec![Value::I32(9); 258])), "token_type[0] is 9"),
        ("token_type", Some(Value::Array(vec![Value::F32(1.0); 258])), "whole numbers"),
        (
            "eos_token_id",
            Some(Value::U32(258)),
            "eos_token_id is 258, but the vocabulary has 258 tokens",
        ),
        ("add_bos_token", Some(Value::U8(1)), "where true or false was expected"),
    ];
    for (key, value, expected) in cases {
        let mut metadata = whole();
        metadata.remove(&format!("tokenizer.ggml.{key}"));
        if let Some(value) = value {
            set(&mut metadata, key, value);
        }
        let message = error(&metadata);
        assert!(message.contains(expected), "{message} does not say {expected}");
    }
}

#[test]
fn malformed_sentence_pieces_are_refused() {
    let mut metadata = sentence_piece_metadata(&PIECES);
    set(&mut metadata, "scores", Value::Array(vec![Value::F32(0.0)]));
    assert!(error(&metadata).contains("scores has 1 entries for 268 tokens"));
    set(&mut metadata, "scores", Value::Array(vec![Value::F32(f32::NAN); 268]));
    assert!(error(&metadata).contains("scores[0] is not a number"));
    let mut metadata = sentence_piece_metadata(&PIECES);
    set(&mut metadata, "token_type", Value::Array(vec![Value::I32(6); 268]));
    assert!(error(&metadata).contains("is a byte by its type, but not by its name"));
}

proptest! {
    #[test]
    fn any_text_comes_back(sample in any::<String>()) {
        let sentence_piece = Tokenizer::from_metadata(&sentence_piece_metadata(&PIECES)).unwrap();
        // SentencePiece writes a space as "▁", so the one comes back as the other.
        let spaced = sample.replace('▁', " ");
        for (tokenizer, sample) in [(byte_level(), &sample), (sentence_piece, &spaced)] {
            let ids = tokenizer.encode(sample).unwrap();
            prop_assert_eq!(&tokenizer.decode(&ids).unwrap(), sample);
            let mut decoder = tokenizer.decoder();
            let pushed: String = ids.iter().filter_map(|id| decoder.push(*id).unwrap()).collect();
            prop_assert!(pushed.ends_with(sample.as_str()));
        }
    }

    #[test]
    fn any_tokens_decode(ids in prop::collection::vec(0u32..262, 0..40)) {
        let tokenizer = byte_level();
        let mut decoder = tokenizer.decoder();
        let mut pushed: String = ids.iter().filter_map(|id| decoder.push(*id).unwrap()).collect();
        pushed.extend(decoder.finish());
        prop_assert_eq!(pushed, tokenizer.decode(&ids).unwrap());
    }
}
