//! Compares the public API of the library, all features on, with `docs/public_api.txt`.
//!
//! `cargo run -p public_api` fails with the lines that differ; `cargo run -p public_api -- --renew`
//! writes the file. A compiler whose rustdoc writes another format than this program reads is told,
//! and nothing is compared.

use std::collections::BTreeSet;
use std::error::Error;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::{env, fs};

const FEATURES: &str = "rayon,serde,safetensors";

/// Columns of the file.
const MOST_COLUMNS: usize = 100;

/// An item of the API in lines: those after the first are indented.
fn wrapped(item: &str) -> String {
    let (mut text, mut columns) = (String::new(), 0);
    for piece in item.split_inclusive([' ', '(']) {
        if columns > 0 && columns + piece.trim_end().chars().count() > MOST_COLUMNS {
            text.truncate(text.trim_end().len());
            text.push_str("\n    ");
            columns = 4;
        }
        text.push_str(piece);
        columns += piece.chars().count();
    }
    text + "\n"
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let program = env::current_exe()?;
    let target = program.ancestors().nth(2).ok_or("no target folder")?;
    // a stable rustdoc writes its description of a crate only if it is told to act as a nightly one
    let done = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["rustdoc", "--quiet", "-p", "dijiang", "--lib", "--features", FEATURES])
        .arg("--target-dir")
        .arg(target)
        .args(["--", "-Zunstable-options", "--output-format=json"])
        .env("RUSTC_BOOTSTRAP", "1")
        .current_dir(&root)
        .status()?;
    if !done.success() {
        return Err("cargo rustdoc failed".into());
    }
    let description = target.join("doc/dijiang.json");
    let json: serde_json::Value = serde_json::from_slice(&fs::read(&description)?)?;
    let (written, read) = (&json["format_version"], rustdoc_types::FORMAT_VERSION);
    if *written != read {
        println!("skipped: this rustdoc writes format {written}, public-api reads {read}");
        return Ok(ExitCode::SUCCESS);
    }

    let api = public_api::Builder::from_rustdoc_json(description)
        .omit_blanket_impls(true)
        .omit_auto_trait_impls(true)
        .omit_auto_derived_impls(true)
        .build()?;
    let now: String = api.items().map(|item| wrapped(&item.to_string())).collect();
    let file = root.join("docs/public_api.txt");
    if env::args().any(|argument| argument == "--renew") {
        fs::write(file, now)?;
        return Ok(ExitCode::SUCCESS);
    }
    let before = fs::read_to_string(file)?.replace("\r\n", "\n");
    if before == now {
        println!("the public API is that of docs/public_api.txt: {} items", api.items().count());
        return Ok(ExitCode::SUCCESS);
    }
    let [before, now] = [&before, &now].map(|text| text.lines().collect::<BTreeSet<_>>());
    before.difference(&now).for_each(|line| println!("- {line}"));
    now.difference(&before).for_each(|line| println!("+ {line}"));
    println!("The public API has changed. If it is meant: cargo run -p public_api -- --renew");
    Ok(ExitCode::FAILURE)
}
