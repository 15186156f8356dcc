//! How far the answers of kernels are from their formulas after a thousand tokens, and after ten
//! million.
//!
//! ```text
//! cargo run --release --example accuracy
//! ```
//!
//! Streams of linear attention take tokens in pieces; exact softmax answers the last query of a
//! text. Each is held to its formula in sums of twice the digits of `f64` (`oracle.rs`), over three
//! texts: normal tokens, one token again and again, and values with heavy tails.

mod kernels;
mod oracle;
mod text;

use clap::Parser;
use comfy_table::{CellAlignment, Table};
use dijiang::{Error, Scalar};
use indicatif::{ProgressBar, ProgressStyle};
use kernels::Kernel;
use reports::lengths::lengths;
use std::io::Write;
use std::process::ExitCode;
use text::{Kind, Text};

/// Measures the errors of kernels in units of epsilon, by length.
#[derive(Debug, Parser)]
#[command(name = "accuracy", version)]
struct Args {
    /// Tokens of the longest streams [default: 10000000]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1_000..=1 << 32))]
    tokens: Option<u64>,

    /// A run of a few seconds: 10 000 tokens
    #[arg(long)]
    quick: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let tokens = args.tokens.unwrap_or(if args.quick { 10_000 } else { 10_000_000 }) as usize;
    match table(tokens) {
        Ok(table) => {
            // a closed pipe is no reason to stop
            let _ = writeln!(std::io::stdout(), "{table}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{error}");
            ExitCode::FAILURE
        }
    }
}

fn table(tokens: usize) -> Result<String, Error> {
    let lengths = lengths(tokens);
    let mut table = Table::new();
    table.load_style(comfy_table::presets::UTF8_FULL_CONDENSED);
    let mut header = ["kernel", "numbers", "text"].map(str::to_owned).to_vec();
    header.extend(lengths.iter().map(|n| format!("to {n}")));
    table.set_header(header);
    let bar = ProgressBar::new((Kernel::ALL.len() * Kind::ALL.len() * 2) as u64).with_style(
        ProgressStyle::with_template("{msg:>30} [{bar:30}] {eta} left")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    for kernel in Kernel::ALL {
        for kind in Kind::ALL {
            bar.set_message(format!("{} {}", kernel.name(), kind.name()));
            let text = Text::new(kind)?;
            let of = [
                ("f32", measured::<f32>(kernel, &text, &lengths)?),
                ("f64", measured::<f64>(kernel, &text, &lengths)?),
            ];
            bar.inc(2);
            for (numbers, errors) in of {
                let mut row = [kernel.name(), numbers, kind.name()].map(str::to_owned).to_vec();
                row.extend(errors.iter().map(|error| format!("{error:.1}")));
                table.add_row(row);
            }
        }
    }
    bar.finish_and_clear();
    for column in table.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    Ok(format!(
        "{table}\n\nThe largest error of the answers that were looked at up to that token (forty \
         for each power of ten; of softmax the last ones only), in units of the epsilon of the \
         type, relative to the weighted mean of the sizes of the values."
    ))
}

/// The largest errors up to each length.
fn measured<T: Scalar>(kernel: Kernel, text: &Text, lengths: &[usize]) -> Result<Vec<f64>, Error> {
    let mut all = kernel.errors::<T>(text, lengths)?;
    // an error once made is there for good
    let mut worst = 0.0_f64;
    for error in &mut all {
        worst = worst.max(*error);
        *error = worst;
    }
    Ok(all)
}
