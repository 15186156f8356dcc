//! The texts that a model reads: three that come with the program, or files of text or of token
//! ids.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::tokenizer::Tokenizer;

/// A text as tokens.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Text {
    /// What to call it in tables.
    pub name: String,
    /// Its tokens, all of them in the model's vocabulary.
    pub tokens: Vec<u32>,
}

/// What tells a text from others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextPrint {
    /// What it is called.
    pub name: String,
    /// How many tokens it has.
    pub tokens: usize,
    /// A hash of them.
    pub hash: String,
}

impl Text {
    /// What tells it from others.
    #[must_use]
    pub fn print(&self) -> TextPrint {
        let bytes = self.tokens.iter().flat_map(|token| token.to_le_bytes());
        let hash = format!("{:016x}", crate::model::hash(bytes));
        TextPrint { name: self.name.clone(), tokens: self.tokens.len(), hash }
    }
}

/// The texts of one run. Those that come with the program may be impossible to make tokens of,
/// which matters where they are used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corpus {
    /// Not empty.
    calibration: Result<Vec<Text>, String>,
    evaluation: Result<Vec<Text>, String>,
}

/// The texts of one file.
#[derive(Deserialize)]
struct Both {
    calibration: Option<Text>,
    #[serde(default)]
    evaluation: Vec<Text>,
}

/// What makes tokens of text, or why nothing does.
#[derive(Clone, Copy)]
pub struct Encoder<'a> {
    /// The tokenizer of the model.
    pub tokenizer: Result<&'a Tokenizer, &'a str>,
    /// The tokens that the model knows.
    pub vocabulary: usize,
}

impl Encoder<'_> {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match self.tokenizer {
            Ok(tokenizer) => tokenizer.encode(text),
            Err(why) => bail!("it cannot be made tokens, because {why}"),
        }
    }
}

impl Corpus {
    /// The texts of a run: those files and that calibration text, or what comes with the program in
    /// place of what is not given.
    ///
    /// `.json` files hold token ids, alone, with a name, or for several texts; all others are UTF-8
    /// text. A calibration text may also come from a `.json` file that names one.
    pub fn open(files: &[PathBuf], calibration: &[PathBuf], with: Encoder<'_>) -> Result<Self> {
        let mut evaluation = Vec::new();
        let mut named = Vec::new();
        for file in files {
            let read = read(file, with).with_context(|| file.display().to_string())?;
            evaluation.extend(read.evaluation);
            named.extend(read.calibration.map(|text| (file, text)));
        }
        let of_file = |file: &PathBuf| only(file, with).with_context(|| file.display().to_string());
        let calibration = match (calibration, named.as_slice()) {
            ([_, ..], _) => Ok(calibration.iter().map(of_file).collect::<Result<_>>()?),
            ([], [(one, _), (other, _), ..]) => bail!(
                "both {} and {} name a calibration text: give a calibration file to choose",
                one.display(),
                other.display()
            ),
            ([], [(_, text)]) => Ok(vec![text.clone()]),
            ([], []) => CALIBRATION
                .iter()
                .map(|(name, text)| embedded(name, text, with, "--calibration"))
                .collect(),
        };
        let evaluation = if files.is_empty() {
            EVALUATION.iter().map(|(name, text)| embedded(name, text, with, "--text")).collect()
        } else {
            Ok(evaluation)
        };
        if evaluation.as_ref().is_ok_and(Vec::is_empty) {
            bail!("there is no text to evaluate: give at least one file of text or of token ids");
        }
        Ok(Self { calibration, evaluation })
    }

    /// These texts; `evaluation` is not empty.
    #[must_use]
    pub fn new(calibration: Text, evaluation: Vec<Text>) -> Self {
        Self { calibration: Ok(vec![calibration]), evaluation: Ok(evaluation) }
    }

    /// What kernels are calibrated to, and exact heads chosen by: the first of those below.
    pub fn calibration(&self) -> Result<&Text> {
        self.planning()?.first().context("there is no calibration text")
    }

    /// What plans are made by; never empty.
    pub fn planning(&self) -> Result<&[Text]> {
        self.calibration.as_deref().map_err(|why| anyhow!("{why}"))
    }

    /// What the model is evaluated on; never empty.
    pub fn evaluation(&self) -> Result<&[Text]> {
        self.evaluation.as_deref().map_err(|why| anyhow!("{why}"))
    }
}

/// All texts of these files.
pub fn read_all(files: &[PathBuf], with: Encoder<'_>) -> Result<Vec<Text>> {
    let mut texts = Vec::new();
    for file in files {
        let found = read(file, with).with_context(|| file.display().to_string())?;
        texts.extend(found.calibration.into_iter().chain(found.evaluation));
    }
    Ok(texts)
}

/// The texts to calibrate to that come with the program; none is evaluated on.
const CALIBRATION: [(&str, &str); 5] = [
    ("Forests (Roosevelt, 1908)", include_str!("../texts/calibration.txt")),
    ("Lighthouses", include_str!("../texts/lighthouses.txt")),
    ("The Tell-Tale Heart (Poe, 1843)", include_str!("../texts/poe_tell_tale_heart.txt")),
    ("The River Commission", include_str!("../texts/river_commission.txt")),
    ("Repairs", include_str!("../texts/repairs.txt")),
];

/// The texts to evaluate on that come with the program.
const EVALUATION: [(&str, &str); 2] = [
    ("Opticks (Newton, 1730)", include_str!("../texts/newton_opticks.txt")),
    ("Persuasion (Austen, 1817)", include_str!("../texts/austen_persuasion.txt")),
];

/// A text that comes with the program; `option` gives another.
fn embedded(name: &str, text: &str, with: Encoder<'_>, option: &str) -> Result<Text, String> {
    match with.encode(text.trim_end()) {
        Ok(tokens) => Ok(Text { name: name.to_owned(), tokens }),
        Err(why) => Err(format!(
            "the text {name}: {why:#}: give token ids in a .json file by `{option}`, or use \
             another model"
        )),
    }
}

/// The one text of a file that is for calibration.
fn only(file: &Path, with: Encoder<'_>) -> Result<Text> {
    let mut read = read(file, with)?;
    match (read.calibration, read.evaluation.len()) {
        (Some(text), _) => Ok(text),
        (None, 1) => Ok(read.evaluation.remove(0)),
        (None, count) => {
            bail!("{count} texts, none named \"calibration\": give a file of one text")
        }
    }
}

fn read(file: &Path, with: Encoder<'_>) -> Result<Both> {
    let name = || {
        file.file_stem()
            .map_or_else(|| "text".to_owned(), |stem| stem.to_string_lossy().into_owned())
    };
    let bytes = fs::read(file).context("cannot be read")?;
    let text = match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => bail!(
            "not UTF-8 text at byte {}: convert it to UTF-8",
            error.utf8_error().valid_up_to()
        ),
    };
    let text = text.strip_prefix('\u{FEFF}').unwrap_or(&text);
    let json = file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
    let both = if json {
        ids(text, name)?
    } else if text.trim().is_empty() {
        bail!("the file has no text in it")
    } else {
        Both {
            calibration: None,
            evaluation: vec![Text { name: name(), tokens: encoded(text, with)? }],
        }
    };
    for text in both.calibration.iter().chain(&both.evaluation) {
        if text.tokens.is_empty() {
            bail!("the text {:?} has no tokens", text.name);
        }
        let size = with.tokenizer.map_or(with.vocabulary, Tokenizer::vocab_size);
        if let Some(place) = text.tokens.iter().position(|id| *id as usize >= size) {
            let id = text.tokens[place];
            bail!(
                "token {place} of the text {:?} is {id}, but the model's vocabulary has {size} \
                 tokens: the ids are of another tokenizer",
                text.name
            );
        }
    }
    Ok(both)
}

fn encoded(text: &str, with: Encoder<'_>) -> Result<Vec<u32>> {
    let tokens = with.encode(text);
    if with.tokenizer.is_err() {
        return tokens.context("give token ids in a .json file, or use another model");
    }
    tokens
}

/// Token ids in one of the three shapes.
fn ids(text: &str, name: impl FnOnce() -> String) -> Result<Both> {
    const SHAPES: &str = "expected [1, 2, 3], {\"name\": \"...\", \"tokens\": [1, 2, 3]}, or \
                          {\"calibration\": {...}, \"evaluation\": [{...}]} with a name and \
                          tokens in each";
    fn to<T: DeserializeOwned>(value: Value) -> Result<T> {
        serde_json::from_value(value).context(SHAPES)
    }
    let value: Value = serde_json::from_str(text).context("not JSON")?;
    let single = |text| Both { calibration: None, evaluation: vec![text] };
    match &value {
        Value::Array(_) => Ok(single(Text { name: name(), tokens: to(value)? })),
        Value::Object(map) if map.contains_key("tokens") => Ok(single(to(value)?)),
        Value::Object(map) if map.contains_key("evaluation") || map.contains_key("calibration") => {
            to(value)
        }
        _ => bail!(SHAPES),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::byte_level;

    struct Files(tempfile::TempDir);

    impl Files {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
            let path = self.0.path().join(name);
            fs::write(&path, content).unwrap();
            path
        }
    }

    fn text(name: &str, tokens: &[u32]) -> Text {
        Text { name: name.to_owned(), tokens: tokens.to_vec() }
    }

    fn open(files: &[PathBuf], calibration: Option<&Path>) -> Result<Corpus> {
        let tokenizer = byte_level();
        let calibration = calibration.map(Path::to_owned);
        let calibration = calibration.as_slice();
        Corpus::open(files, calibration, Encoder { tokenizer: Ok(&tokenizer), vocabulary: 300 })
    }

    fn error(files: &[PathBuf], calibration: Option<&Path>) -> String {
        format!("{:#}", open(files, calibration).unwrap_err())
    }

    #[test]
    fn the_texts_that_come_along_are_read_whole() {
        let tokenizer = byte_level();
        let corpus = open(&[], None).unwrap();
        assert_eq!(corpus.evaluation().unwrap().len(), 2);
        for text in corpus.evaluation().unwrap().iter().chain(corpus.planning().unwrap()) {
            let decoded = tokenizer.decode(&text.tokens).unwrap();
            assert!((10_000..11_000).contains(&decoded.len()), "{}: {}", text.name, decoded.len());
            assert!(
                decoded.ends_with('.') && !decoded.contains('\r') && decoded.is_ascii(),
                "{}",
                text.name
            );
            assert!(
                decoded.split("\n\n").all(|paragraph| !paragraph.contains('\n')),
                "{}",
                text.name
            );
        }
    }

    const BOTH: &str = concat!(
        r#"{"calibration": {"name": "C", "tokens": [5]}, "#,
        r#""evaluation": [{"name": "E", "tokens": [6]}]}"#
    );

    #[test]
    fn files_of_every_shape() {
        let files = Files::new();
        let corpus = open(
            &[
                files.file("plain.txt", "\u{FEFF}hello\n"),
                files.file("bare.json", "[1, 2, 3]"),
                files.file("one.JSON", r#"{"name": "One", "tokens": [4]}"#),
                files.file("both.json", BOTH),
            ],
            None,
        );
        let evaluation = vec![
            text("plain", &[258, 111, 10]),
            text("bare", &[1, 2, 3]),
            text("One", &[4]),
            text("E", &[6]),
        ];
        assert_eq!(corpus.unwrap(), Corpus::new(text("C", &[5]), evaluation));
    }

    #[test]
    fn the_calibration_file_decides() {
        let files = Files::new();
        let (one, other) = (files.file("one.json", BOTH), files.file("other.json", BOTH));
        let plain = files.file("plain.txt", "a");
        let calibration = |file: &Path| {
            open(&[one.clone(), other.clone()], Some(file)).unwrap().calibration().unwrap().clone()
        };
        assert_eq!(calibration(&one), text("C", &[5]));
        assert_eq!(calibration(&plain), text("plain", &[97]));
        assert!(error(&[one.clone(), other.clone()], None).contains("name a calibration text"));
        assert!(open(&[plain], None).unwrap().calibration().unwrap().name.contains("Roosevelt"));
        let two = files.file(
            "two.json",
            r#"{"evaluation": [{"name": "a", "tokens": [1]}, {"name": "b", "tokens": [1]}]}"#,
        );
        assert!(error(&[one], Some(&two)).contains("2 texts, none named \"calibration\""));
    }

    #[test]
    fn bad_files_are_refused_by_name() {
        let files = Files::new();
        let cases: [(&str, &[u8], &str); 12] = [
            ("a.txt", b"", "no text in it"),
            ("b.txt", b" \n", "no text in it"),
            ("c.txt", b"ab\xFF", "not UTF-8 text at byte 2"),
            ("d.json", b"[1, 2", "not JSON"),
            ("e.json", b"[]", "has no tokens"),
            (
                "f.json",
                b"[1, 262]",
                "token 1 of the text \"f\" is 262, but the model's vocabulary has 262 tokens",
            ),
            ("g.json", b"[-1]", "expected [1, 2, 3]"),
            ("h.json", b"[\"a\"]", "expected [1, 2, 3]"),
            ("i.json", b"7", "expected [1, 2, 3]"),
            ("j.json", b"{\"tokens\": [1]}", "missing field `name`"),
            ("k.json", b"{\"words\": [1]}", "expected [1, 2, 3]"),
            (
                "l.json",
                b"{\"calibration\": null, \"evaluation\": [{\"name\": \"x\", \"tokens\": []}]}",
                "has no tokens",
            ),
        ];
        for (name, content, expected) in cases {
            let message = error(&[files.file(name, content)], None);
            assert!(
                message.contains(name) && message.contains(expected),
                "{message} does not say {expected}"
            );
        }
        assert!(error(&[files.0.path().join("none.txt")], None).contains("cannot be read"));
        let only = files.file("m.json", r#"{"calibration": {"name": "C", "tokens": [5]}}"#);
        assert!(error(&[only], None).contains("no text to evaluate"));
    }

    /// A tokenizer is needed for text only: ids do without, and so does what is not used.
    #[test]
    fn ids_need_no_tokenizer() {
        let files = Files::new();
        let with = Encoder { tokenizer: Err("its tokenizer is odd"), vocabulary: 10 };
        let ids = files.file("ids.json", "[1, 9]");
        let corpus = Corpus::open(std::slice::from_ref(&ids), &[], with).unwrap();
        assert_eq!(corpus.evaluation().unwrap(), [text("ids", &[1, 9])]);
        let error = corpus.calibration().unwrap_err().to_string();
        assert!(error.contains("Roosevelt") && error.contains("its tokenizer is odd"), "{error}");
        assert!(error.contains("give token ids in a .json file by `--calibration`"), "{error}");
        let corpus = Corpus::open(&[], std::slice::from_ref(&ids), with).unwrap();
        assert_eq!(*corpus.calibration().unwrap(), text("ids", &[1, 9]));
        let error = corpus.evaluation().unwrap_err().to_string();
        assert!(error.contains("Opticks") && error.contains("by `--text`"), "{error}");

        let refused =
            |file: PathBuf| format!("{:#}", Corpus::open(&[file], &[], with).unwrap_err());
        let error = refused(files.file("words.txt", "words"));
        assert!(error.contains("words.txt: give token ids in a .json file"), "{error}");
        assert!(error.contains("its tokenizer is odd"), "{error}");
        let error = refused(files.file("far.json", "[10]"));
        assert!(error.contains("the model's vocabulary has 10 tokens"), "{error}");
    }
}
