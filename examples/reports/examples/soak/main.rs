//! Ten million tokens through streams of constant size: how far the answers drift, whether calls
//! that must be refused leave a trace, and whether a process that is killed goes on where it was.
//!
//! ```text
//! cargo run --release --features serde --example soak
//! ```
//!
//! runs every kernel of `kernels.rs` over the same endless text (`tokens.rs`), some calls of which
//! have a wrong shape or a number that is none, and compares answers with an oracle in `f64` that
//! knows the whole text. Then the same streams run in a process that is killed and started again
//! (`killed.rs`), and on many threads at once. It fails if a promise is broken.

mod kernels;
mod killed;
mod run;
mod tokens;

use clap::Parser;
use comfy_table::{CellAlignment, Table};
use indicatif::{ProgressBar, ProgressStyle};
use kernels::Subject;
use reports::lengths::lengths;
use run::{Found, Run};
use std::error::Error;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;

/// Streams millions of tokens through kernels of constant memory, and tries to break them.
#[derive(Debug, Parser)]
#[command(name = "soak", version)]
struct Args {
    /// Tokens of each stream [default: 10000000]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1_000..=1 << 40))]
    tokens: Option<u64>,

    /// A run of a few seconds: 20 000 tokens
    #[arg(long)]
    quick: bool,

    /// Streams that run at once, in threads of their own, and must all give the same
    #[arg(long, value_name = "N", default_value_t = 16)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=1024))]
    streams: u64,

    /// Used by the program itself: goes on with the stream of a kernel from a file
    #[arg(long, value_names = ["KERNEL", "FILE"], num_args = 2, hide = true)]
    go_on: Option<Vec<String>>,
}

fn main() -> ExitCode {
    match soak(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody listens if it fails.
            let _ = writeln!(std::io::stderr(), "{error}");
            ExitCode::FAILURE
        }
    }
}

fn soak(args: &Args) -> Result<(), Box<dyn Error>> {
    let tokens = args.tokens.unwrap_or(if args.quick { 20_000 } else { 10_000_000 }) as usize;
    let subjects = kernels::all()?;
    if let Some(go_on) = &args.go_on {
        let subject = subjects.iter().find(|subject| subject.name == go_on[0]);
        let subject = subject.ok_or("there is no such kernel")?;
        return killed::go_on(subject, tokens, &PathBuf::from(&go_on[1]));
    }
    let style = "{msg:>28} [{bar:30}] {percent:>3} %  {eta} left";
    let bar = ProgressBar::new((subjects.len() * tokens) as u64)
        .with_style(ProgressStyle::with_template(style)?.progress_chars("=> "));
    let mut rows = Vec::new();
    for subject in &subjects {
        bar.set_message(subject.name);
        rows.push((subject, Run::new(subject)?.to(tokens, Some(&bar))?));
    }
    bar.finish_and_clear();
    say(&table(&rows, tokens));

    // from here on a tenth is enough
    let tokens = tokens / 10;
    for subject in &subjects {
        let alone = Run::new(subject)?.to(tokens, None)?;
        let kills = killed::killed(subject, tokens, &alone)?;
        at_once(subject, tokens, &alone, args.streams)?;
        say(&format!(
            "{}: killed {kills} times, and {} streams at once: the same bits after {tokens} tokens",
            subject.name, args.streams
        ));
    }
    Ok(())
}

/// Prints a line; a closed pipe is no reason to stop.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Many streams of one kernel on threads of their own give what one gives.
fn at_once(
    subject: &Subject,
    tokens: usize,
    alone: &Found,
    streams: u64,
) -> Result<(), Box<dyn Error>> {
    let all: Vec<Result<Found, String>> = thread::scope(|scope| {
        let run = || Run::new(subject)?.to(tokens, None);
        let run = move || run().map_err(|error: Box<dyn Error>| error.to_string());
        let threads: Vec<_> = (0..streams).map(|_| scope.spawn(run)).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|_| Err("a thread panicked".to_owned()))
        };
        threads.into_iter().map(join).collect()
    });
    for found in all {
        if found?.print != alone.print {
            return Err(format!("{}: a stream beside others differs", subject.name).into());
        }
    }
    Ok(())
}

fn table(rows: &[(&Subject, Found)], tokens: usize) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::UTF8_FULL_CONDENSED);
    let lengths = lengths(tokens);
    let mut header = ["kernel", "s", "numbers kept", "refused"].map(str::to_owned).to_vec();
    header.extend(lengths.iter().map(|n| format!("at {n}")));
    table.set_header(header);
    for (subject, found) in rows {
        let mut row = vec![
            subject.name.to_owned(),
            format!("{:.1}", found.seconds),
            found.floats.to_string(),
            found.refused.to_string(),
        ];
        row.extend(found.errors.iter().map(|error| format!("{error:.1}")));
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    format!(
        "{table}\n\nErrors are the largest ones up to that token, in units of the epsilon of f32, \
         relative to the largest value.\n"
    )
}
