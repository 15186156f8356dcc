//! The tables on the terminal.

use crate::kernels::Kernel;
use crate::measure::Results;
use crate::rivals::{self, Rival};
use crate::summary::{Group, Row, best, best_rows, median, rows};
use crate::text::{count, short, short_or_dash};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{Attribute, Cell, CellAlignment, Color, Table};

/// The columns of [`summary`], two lines each.
pub const HEADER: [&str; 10] = [
    "kernel",
    "m",
    "output\nerror",
    "over\nseeds",
    "matrix\nerror",
    "KL\n(nats)",
    "kernel\nerror",
    "beats\nuniform",
    "state\n(floats)",
    "µs per\ntoken",
];

/// How a line of the summary is to be set off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emphasis {
    Baseline,
    Best,
    Plain,
    /// No better than uniform attention.
    Useless,
}

/// One line of the summary, or of the table of hybrids.
#[derive(Debug)]
pub struct Line {
    pub cells: [String; 10],
    pub emphasis: Emphasis,
}

/// The summary of a group: the baselines, then each kernel at its best number of features.
pub fn summary(results: &Results, group: &Group) -> Vec<Line> {
    let mut lines = baselines(results, group);
    let rows = best_rows(&rows(results, group));
    let best = best(&rows).map(|row| row.kernel);
    lines.extend(rows.iter().map(|row| line(row, best == Some(row.kernel))));
    lines
}

fn baselines(results: &Results, group: &Group) -> Vec<Line> {
    let over = |value: &dyn Fn(usize) -> f64| {
        short_or_dash(median(group.inputs.iter().map(|i| value(*i))))
    };
    let report = |i: usize| &results.exact[i].report;
    let blank = || "-".to_owned();
    let uniform = [
        "uniform".to_owned(),
        blank(),
        over(&|i| report(i).uniform_error),
        blank(),
        over(&|i| report(i).uniform_attention_error),
        blank(),
        blank(),
        blank(),
        median(group.inputs.iter().map(|i| results.inputs[*i].value_dim() as f64 + 1.0))
            .map_or_else(blank, count),
        blank(),
    ];
    let softmax = [
        "softmax in f32".to_owned(),
        blank(),
        over(&|i| report(i).output_error),
        blank(),
        over(&|i| report(i).attention_error),
        short_or_dash(
            median(group.inputs.iter().filter_map(|i| report(*i).kl))
                .map(|kl| if kl < 1e-6 { 0.0 } else { kl }),
        ),
        short_or_dash(median(group.inputs.iter().filter_map(|i| report(*i).kernel_error))),
        format!("{0}/{0}", group.inputs.len()),
        median(group.inputs.iter().map(|i| results.exact[*i].state_floats as f64))
            .map_or_else(blank, count),
        short_or_dash(median(group.inputs.iter().filter_map(|i| results.time(*i, None, 0)))),
    ];
    [uniform, softmax].map(|cells| Line { cells, emphasis: Emphasis::Baseline }).into()
}

fn line(row: &Row, is_best: bool) -> Line {
    let seeds = if row.kernel.is_random() {
        format!("{}-{}", short(row.output_error.least), short(row.output_error.most))
    } else {
        "-".to_owned()
    };
    let useful = row.is_useful();
    let verdict = if useful { "" } else { "no: " };
    Line {
        cells: [
            format!("{}{}", name(row.kernel), if is_best { " *" } else { "" }),
            row.features_text(),
            short(row.output_error.median),
            seeds,
            short(row.attention_error),
            short_or_dash(row.kl),
            short_or_dash(
                row.kernel_error.map(|error| error.median).filter(|_| row.kernel.aims_at_softmax()),
            ),
            format!("{verdict}{}/{}", row.beats_uniform, row.inputs),
            count(row.state_floats),
            short_or_dash(row.microseconds),
        ],
        emphasis: match (useful, is_best) {
            (false, _) => Emphasis::Useless,
            (true, true) => Emphasis::Best,
            (true, false) => Emphasis::Plain,
        },
    }
}

fn name(kernel: Kernel) -> String {
    marked(kernel.name(), kernel.aims_at_softmax())
}

fn marked(name: &str, aims_at_softmax: bool) -> String {
    format!("{name}{}", if aims_at_softmax { "" } else { "†" })
}

/// What the marks of the summary mean.
pub const LEGEND: &str = "\
Relative errors of output, attention matrix and exp(q·k) against softmax in f64;
medians over heads, then over seeds; each kernel at its best m.
* smallest output error of the maps of exp(q·k).  † not made to estimate it.
\"no: k/n\": no better than uniform attention on at least half of the inputs, so it approximates \
                          nothing there.
An output of zeros has error 1.";

/// The output error of every kernel on inputs of growing norm, with about `features` features.
pub fn norms(
    results: &Results,
    groups: &[Group],
    features: usize,
) -> (Vec<String>, Vec<Vec<String>>) {
    let header = std::iter::once("kernel".to_owned())
        .chain(std::iter::once("m".to_owned()))
        .chain(groups.iter().map(|group| group.name.clone()))
        .collect();
    let mut uniform = vec!["uniform".to_owned(), "-".to_owned()];
    uniform.extend(groups.iter().map(|group| short(group.uniform(results))));
    let mut lines = vec![uniform];
    let of_groups: Vec<Vec<Row>> = groups.iter().map(|group| rows(results, group)).collect();
    for kernel in Kernel::ALL {
        let nearest = |rows: &[Row]| {
            rows.iter()
                .filter(|row| row.kernel == kernel)
                .min_by_key(|row| row.features[0].abs_diff(features))
                .cloned()
        };
        let rows: Vec<Option<Row>> = of_groups.iter().map(|rows| nearest(rows)).collect();
        let Some(any) = rows.iter().flatten().next() else { continue };
        let mut line = vec![name(kernel), any.features_text()];
        line.extend(rows.iter().map(|row| match row {
            None => "-".to_owned(),
            Some(row) if row.is_useful() => short(row.output_error.median),
            Some(row) => format!("({})", short(row.output_error.median)),
        }));
        lines.push(line);
    }
    let of_groups: Vec<Vec<rivals::rows::Row>> =
        groups.iter().map(|group| rivals::rows::rows(results, group)).collect();
    for rival in Rival::ALL {
        let rows = of_groups.iter().map(|rows| rows.iter().find(|row| row.rival == rival));
        let errors: Vec<_> =
            rows.map(|row| row.map(|row| (row.errors[0].median, row.uniform[0]))).collect();
        if errors.iter().all(Option::is_none) {
            continue;
        }
        let head_dim = results.inputs[groups[0].inputs[0]].head_dim();
        let mut line = vec![
            marked(rival.name(), rival.aims_at_softmax()),
            rival.features(head_dim).map_or_else(|| "-".to_owned(), |m| m.to_string()),
        ];
        line.extend(errors.into_iter().map(|error| match error {
            None => "-".to_owned(),
            Some((error, uniform)) if error < uniform => short(error),
            Some((error, _)) => format!("({})", short(error)),
        }));
        lines.push(line);
    }
    (header, lines)
}

/// The number of features that [`norms`] shows: the one asked for that is nearest to 256.
pub fn typical_features(asked: &[usize]) -> usize {
    asked.iter().copied().min_by_key(|m| m.abs_diff(256)).unwrap_or(256)
}

/// Lines as text, at most 120 columns wide; the first `names` columns hold no numbers.
pub fn terminal(header: &[&str], lines: &[Line], names: usize) -> String {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header(header);
    for line in lines {
        table.add_row(line.cells.iter().map(|text| {
            let cell = Cell::new(text);
            match line.emphasis {
                Emphasis::Best => cell.fg(Color::Green).add_attribute(Attribute::Bold),
                Emphasis::Useless => cell.add_attribute(Attribute::Dim),
                Emphasis::Baseline => cell.add_attribute(Attribute::Bold),
                Emphasis::Plain => cell,
            }
        }));
    }
    aligned(table, names)
}

/// The table of [`norms`] as text.
pub fn terminal_norms(header: &[String], lines: &[Vec<String>]) -> String {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header(header).add_rows(lines);
    aligned(table, 1)
}

fn aligned(mut table: Table, first_number: usize) -> String {
    for column in table.column_iter_mut().skip(first_number) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}
