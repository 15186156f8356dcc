//! The table of hybrids, for the terminal and the page.

use super::Sizes;
use super::rows::{Row, best, inputs, table_rows};
use crate::measure::Results;
use crate::table::{Emphasis, Line};
use crate::text::{count, short, short_or_dash};
use dijiang::Mask;
use reports::text::shortened;

/// Two lines each.
pub const HEADER: [&str; 10] = [
    "head",
    "kernel",
    "state\n(floats)",
    "output\nerror",
    "equal\nwindow",
    "times\ncloser",
    "far\ndropped",
    "uniform",
    "far\nshare",
    "µs per\ntoken",
];

/// The hybrids of every head.
pub fn lines(results: &Results) -> Vec<Line> {
    inputs(results).into_iter().flat_map(|input| of_head(results, input)).collect()
}

fn of_head(results: &Results, input: usize) -> Vec<Line> {
    let rows = table_rows(results, input);
    let best = best(&rows).map(|row| row.contestant);
    rows.iter()
        .enumerate()
        .map(|(i, row)| {
            let name =
                if i == 0 { shortened(&results.inputs[input].name, 14) } else { String::new() };
            line(results, input, name, row, best == Some(row.contestant))
        })
        .collect()
}

fn line(results: &Results, input: usize, name: String, row: &Row, is_best: bool) -> Line {
    let uniform = results.exact[input].report.uniform_error;
    let baseline = results.hybrids.baselines[input];
    let useful = row.is_window() || row.is_useful(uniform);
    let verdict = if useful { "" } else { "no: " };
    Line {
        cells: [
            name,
            format!("{}{}", row.contestant.label(), if is_best { " *" } else { "" }),
            count(row.state_floats as f64),
            short(row.error.median),
            short_or_dash(row.equal_window.map(|window| window.error)),
            row.gain().map_or_else(|| "-".to_owned(), |gain| format!("{verdict}{}", short(gain))),
            short_or_dash(baseline.and_then(|baseline| baseline.dropped_error)),
            short(uniform),
            short_or_dash(baseline.map(|baseline| baseline.far_share)),
            short_or_dash(row.microseconds),
        ],
        emphasis: match (row.is_window(), useful, is_best) {
            (true, ..) => Emphasis::Baseline,
            (_, false, _) => Emphasis::Useless,
            (_, true, true) => Emphasis::Best,
            (_, true, false) => Emphasis::Plain,
        },
    }
}

/// What the columns mean, as far as the run has them.
pub fn legend(results: &Results, sizes: &Sizes) -> String {
    let Sizes { window, sinks, .. } = sizes;
    let shown = inputs(results);
    let any = |mask| shown.iter().any(|i| results.inputs[*i].mask == mask);
    let mut text = String::new();
    if any(Mask::Causal) {
        text.push_str(&format!(
            "Causal heads: a window of {window} tokens and {sinks} sinks exact, a far memory \
             behind them, one normaliser.\nEqual window: the error of a window of as many floats \
             with no far memory. \"no\": the hybrid is no closer.\nFar dropped: the error of the \
             same window alone. Far share: of attention, the mean over queries with a far key.\n"
        ));
    }
    if any(Mask::Full) {
        text.push_str(
            "Bidirectional heads: no window, every key is far; merging by received attention \
             needs an order of queries.\n",
        );
    }
    text.push_str("* smallest output error of the head. Features: median over seeds.");
    text
}
