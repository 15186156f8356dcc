//! How close do the kernels of this crate come to softmax attention?
//!
//! ```text
//! cargo run --release --example approximation_error
//! ```
//!
//! measures every feature map, with several numbers of features and several seeds, on real
//! attention heads (embedded, see `data/README.md`) and on synthetic Gaussian queries and keys of
//! growing norm. It prints a table and writes `measurements.csv` and `index.html` to
//! `target/approximation_error/` (`--output DIR`). Uniform attention stands on top of every table:
//! a map that does not beat it approximates nothing.
//!
//! Then come the hybrids, head by head: an exact window with each far memory of the crate behind
//! it, beside the window that keeps as many floats, the same window with nothing behind it, and
//! uniform attention. `--kernels hybrids` measures them alone.
//!
//! Last come the rivals, kernels that models are trained with (the linear Transformer, cosFormer,
//! retention, Mamba-2 and others), in a table of their own and not ranked: `--kernels rivals`.
//!
//! Your own heads come in as a safetensors file, `--input FILE`, with tensors `<head>/q`,
//! `<head>/k`, `<head>/v` of shape `[tokens, d]`, `[heads, tokens, d]` or
//! `[batch, heads, tokens, d]`, raw after the rotary embedding; k and v may have fewer heads, each
//! of them for a group of heads of q. Optional:
//! `<head>/calibration/q` and `/k` of another text, to which weights are fitted, and the metadata
//! entries `<head>/causal` and `<head>/calibration/stride`. From a PyTorch model:
//!
//! ```python
//! from safetensors.torch import save_file
//! tensors = {}
//! # in the attention layer, after the rotary embedding; q, k, v are [batch, heads, tokens, d]
//! for name, x in {"q": q, "k": k, "v": v}.items():
//!     tensors[f"layer5/{name}"] = x.float().contiguous().cpu()
//! save_file(tensors, "heads.safetensors", metadata={"layer5/causal": "true"})
//! ```

mod args;
mod data;
mod files;
mod findings;
mod headline;
mod hybrids;
mod kernels;
mod measure;
mod page;
mod plots;
mod records;
mod rivals;
mod summary;
mod synthetic;
mod table;
mod text;

use args::{Args, Plan};
use clap::Parser;
use findings::Found;
use measure::Results;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use summary::Group;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(help) if !help.use_stderr() => {
            // Nobody listens if it fails.
            let _ = help.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            let text = error.to_string();
            let sentence = text.lines().next().unwrap_or_default();
            return refuse(sentence.strip_prefix("error: ").unwrap_or(sentence));
        }
    };
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => refuse(&sentence),
    }
}

fn refuse(sentence: &str) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "{sentence}");
    ExitCode::from(2)
}

fn run(args: &Args) -> Result<(), String> {
    let plan = args.plan()?;
    let mut inputs = match &args.input {
        Some(path) => data::from_file(path, &plan)?,
        None => data::embedded(&plan)?,
    };
    let head_dim = inputs.first().map_or(64, data::Input::head_dim);
    let tokens = if plan.quick { 64 } else { 256 };
    if !plan.kernels.is_empty() || !plan.rivals.is_empty() {
        inputs.extend(plan.norms.iter().map(|norm| synthetic::gaussian(*norm, tokens, head_dim)));
    }
    create(&args.output)?;

    let results = measure::measure(inputs, &plan)?;
    let findings = findings::findings(&results, &plan);
    let lead = headline::take_away(&results, &plan);
    // A closed pipe is no reason to lose the files.
    let _ = write!(std::io::stdout(), "{}", terminal(&results, &plan, &findings, &lead));

    let written = |name: &str, error: &dyn std::fmt::Display| {
        format!("`{}` cannot be written: {error}", args.output.join(name).display())
    };
    records::write(&results, &args.output.join("measurements.csv"))
        .map_err(|e| written("measurements.csv", &e))?;
    let page = page::page(&results, &plan, findings, lead)
        .map_err(|error| format!("a plot cannot be drawn: {error}"))?;
    std::fs::write(args.output.join("index.html"), page)
        .map_err(|error| written("index.html", &error))?;
    let shown = args.output.display();
    let _ =
        writeln!(std::io::stdout(), "\nWritten: {shown}/index.html and {shown}/measurements.csv");
    Ok(())
}

fn create(output: &Path) -> Result<(), String> {
    std::fs::create_dir_all(output)
        .map_err(|error| format!("`{}` cannot be created: {error}", output.display()))
}

fn terminal(results: &Results, plan: &Plan, findings: &[Found], lead: &[String]) -> String {
    let heads = Group::heads(results);
    let mut text = format!("Approximation error on real heads ({})\n", heads.name);
    text.push_str(&table::terminal(&table::HEADER, &table::summary(results, &heads), 1));
    text.push_str(&format!("\n{}\n", table::LEGEND));
    text.push_str(&norms(results, plan));
    let hybrids = hybrids::table::lines(results);
    if !hybrids.is_empty() {
        text.push_str("\nHybrids, head by head\n");
        text.push_str(&table::terminal(&hybrids::table::HEADER, &hybrids, 2));
        text.push_str(&format!("\n{}\n", hybrids::table::legend(results, &plan.sizes)));
    }
    let rivals = rivals::table::lines(results, &heads);
    if !rivals.is_empty() {
        text.push_str(&format!("\n{}\n", rivals::table::TITLE));
        text.push_str(&table::terminal(&rivals::table::HEADER, &rivals, 1));
        text.push_str(&format!("\n{}\n", rivals::table::legend(results, &heads, plan)));
    }
    text.push('\n');
    for finding in findings.iter().flat_map(|(_, sentences)| sentences) {
        text.push_str(&reports::text::wrapped(finding));
    }
    if !lead.is_empty() {
        text.push_str("\nTo take away\n");
        lead.iter().for_each(|sentence| text.push_str(&reports::text::wrapped(sentence)));
    }
    text
}

fn norms(results: &Results, plan: &Plan) -> String {
    let features = table::typical_features(&plan.features);
    let (header, lines) = table::norms(results, &Group::synthetic(results), features);
    if let [] | [_] = lines[..] {
        return String::new(); // uniform attention alone
    }
    format!(
        "\nOutput error on Gaussian q and k of growing norm (in brackets: no better than \
         uniform)\n{}\n",
        table::terminal_norms(&header, &lines)
    )
}
