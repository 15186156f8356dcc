//! Associative recall, the needle test: what does a memory of constant size lose, and when?
//!
//! ```text
//! cargo run --release --example needle
//! ```
//!
//! plants pairs of keys and values in a stream of filler, and later asks for them: with growing
//! distance, and with a growing number of pairs (the load). Exact softmax and the trivial baselines
//! stand beside every kernel, and all constant memories have about the same size. It prints a table
//! for each sort of needle and writes `index.html` to `target/needle/` (`--out DIR`). What the
//! stream is made of stands in `task.rs`; nothing was tuned to a kernel.

mod findings;
mod kernels;
mod measure;
mod page;
mod plots;
mod table;
mod task;

use clap::Parser;
use measure::Plan;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Measures how much of what was planted in a stream each attention kernel can recall.
#[derive(Debug, Parser)]
#[command(name = "needle", version)]
struct Args {
    /// Streams for each point of a curve [default: 60]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    seeds: Option<u64>,

    /// A run of a few seconds: fewer seeds, distances and loads
    #[arg(long)]
    quick: bool,

    /// Where the HTML page goes
    #[arg(long, value_name = "DIR", default_value = "target/needle")]
    out: PathBuf,
}

impl Args {
    fn plan(&self) -> Plan {
        let powers =
            |from: u32, to: u32, step| (from..=to).step_by(step).map(|i| 1_usize << i).collect();
        let mut command = "cargo run --release --example needle".to_owned();
        let options = [
            self.quick.then(|| "--quick".to_owned()),
            self.seeds.map(|seeds| format!("--seeds {seeds}")),
        ];
        let options: Vec<String> = options.into_iter().flatten().collect();
        if !options.is_empty() {
            command.push_str(&format!(" -- {}", options.join(" ")));
        }
        if self.quick {
            let (distances, loads) = (powers(4, 10, 3), powers(0, 6, 3));
            Plan {
                distances,
                loads,
                load: 8,
                distance: 256,
                seeds: self.seeds.unwrap_or(2),
                command,
            }
        } else {
            let (distances, loads) = (powers(4, 12, 1), powers(0, 8, 1));
            Plan {
                distances,
                loads,
                load: 8,
                distance: 256,
                seeds: self.seeds.unwrap_or(60),
                command,
            }
        }
    }
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            // Nobody listens if it fails.
            let _ = writeln!(std::io::stderr(), "{sentence}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args) -> Result<(), String> {
    let plan = args.plan();
    let cannot = |what: &str, error: &dyn std::fmt::Display| {
        format!("`{}` cannot be {what}: {error}", args.out.display())
    };
    std::fs::create_dir_all(&args.out).map_err(|error| cannot("created", &error))?;
    let results = measure::measure(&plan).map_err(|error| error.to_string())?;
    let findings = findings::findings(&results, &plan);

    let mut text = String::new();
    for sort in task::Sort::ALL {
        text.push_str(&format!("{}\n{}\n\n", sort.title(), table::terminal(&results, &plan, sort)));
    }
    text.push_str(&format!("{}\n\n", table::legend(&plan)));
    for finding in &findings {
        text.push_str(&reports::text::wrapped(finding));
    }
    // A closed pipe is no reason to lose the page.
    let _ = write!(std::io::stdout(), "{text}");

    let page = page::page(&results, &plan, &findings)
        .map_err(|error| format!("a plot cannot be drawn: {error}"))?;
    std::fs::write(args.out.join("index.html"), page)
        .map_err(|error| cannot("written to", &error))?;
    let _ = writeln!(std::io::stdout(), "\nWritten: {}/index.html", args.out.display());
    Ok(())
}
