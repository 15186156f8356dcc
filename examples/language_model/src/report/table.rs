//! The table, for the terminal and for the page.

use super::facts::{
    best_constant, change, decode_at, exact_heads, lengths, lists, on_scale, reference, score,
    state_share,
};
use super::numbers::{self, count, mib, perplexity, plain, share, shortened};
use crate::compare::{Comparison, Row};
use comfy_table::{
    Attribute, Cell, CellAlignment, ColumnConstraint, ContentArrangement, LineStyle, Table,
    TableStyle, Width,
};

use reports::page::{self, Block, Line};

/// Lines above, below and under the header.
pub(super) const STYLE: TableStyle = TableStyle::new()
    .top_border(LineStyle::none().fill('─').junction('─'))
    .header_separator(LineStyle::none().fill('─').junction('─'))
    .bottom_border(LineStyle::none().fill('─').junction('─'));
/// Columns of the terminal.
const WIDTH: u16 = 130;
/// Longer names are cut.
const LONGEST_NAME: usize = 80;

/// The table for the terminal, and what its columns are.
#[must_use]
pub fn table(comparison: &Comparison) -> String {
    let mut table = Table::new();
    table.load_style(STYLE).set_content_arrangement(ContentArrangement::Dynamic).set_width(WIDTH);
    let bold = |text: String| Cell::new(text).add_attribute(Attribute::Bold);
    let mut header: Vec<String> = [
        "\n\nkernel",
        "\nexact\nheads",
        "\nstate\nMiB",
        "\nof\nwhole",
        "\nppl\n1st",
        "\nppl\n2nd",
        "\n\nchange",
    ]
    .map(str::to_owned)
    .to_vec();
    for list in lists(comparison) {
        let asked = comparison
            .rows
            .iter()
            .filter_map(|row| score(row, list))
            .map(|score| score.asked)
            .max();
        let (pairs, distance) = list;
        let asked = asked.unwrap_or(0);
        header.push(match distance {
            0 => format!("\n{pairs}\n/{asked}"),
            _ => format!("{pairs}\n+{distance}\n/{asked}"),
        });
    }
    header.extend(["\n\ncopied", "µs\nin at-\ntention", "µs\nin\nall"].map(str::to_owned));
    table.set_header(header.into_iter().map(bold));
    let best = best_constant(comparison);
    for row in &comparison.rows {
        let line = cells(comparison, row, |right, _| right.to_string());
        let stands_out = [best, reference(comparison)]
            .into_iter()
            .flatten()
            .any(|other| std::ptr::eq(other, row));
        table.add_row(
            line.into_iter().map(|text| if stands_out { bold(text) } else { Cell::new(text) }),
        );
    }
    for (i, column) in table.column_iter_mut().enumerate() {
        if i == 0 {
            column
                .set_padding((0, 0))
                .set_constraint(ColumnConstraint::UpperBoundary(Width::Fixed(28)));
        } else {
            column.set_padding((1, 0)).set_cell_alignment(CellAlignment::Right);
        }
    }
    format!("{table}\n{}\n", legend(comparison))
}

/// What the columns of the terminal are.
fn legend(comparison: &Comparison) -> String {
    let first = reference(comparison).map_or("the first", |row| &row.kernel);
    let first = shortened(first, 24);
    let mut text = format!(
        "State at {} tokens, of whole: as a share of {first}'s. Perplexity in both halves of the \
         context, the change of the second against\n{first}. Copied: tokens of a text given twice.",
        comparison.context
    );
    if !lists(comparison).is_empty() {
        text.push_str(
            " Numbered columns: codes recalled of lists of so many pairs, +tokens of\nprose \
             between, /codes asked for.",
        );
    }
    if let Some(longest) = lengths(comparison).last() {
        text.push_str(&format!(
            " µs of a decode step at {longest} tokens. Bold: {first}, and the best of constant \
             memory."
        ));
    }
    text
}

/// The table for the page.
pub fn block(comparison: &Comparison) -> Block {
    let lists = lists(comparison);
    let longest =
        lengths(comparison).last().map_or_else(String::new, |n| format!(" at {}", count(*n)));
    let group = |title: &str, columns: usize| (title.to_owned(), columns);
    let mut groups = vec![
        group("", 1),
        group("", 1),
        group(&format!("state at {}", count(comparison.context)), 2),
        group("perplexity", 3),
    ];
    if !lists.is_empty() {
        groups.push(group("codes recalled, by pairs + tokens between", lists.len()));
    }
    groups.push(group("copied", 1));
    groups.push(group(&format!("decode{longest}, µs a token"), 2));
    let mut header: Vec<String> =
        ["kernel", "exact heads", "MiB", "share", "1st half", "2nd half", "change"]
            .map(str::to_owned)
            .to_vec();
    header.extend(lists.iter().map(|(pairs, distance)| match distance {
        0 => count(*pairs),
        _ => format!("{} + {}", count(*pairs), count(*distance)),
    }));
    header.extend(["tokens", "attention", "all"].map(str::to_owned));
    let best = best_constant(comparison);
    let line = |(i, row): (usize, &Row)| Line {
        class: match best {
            _ if i == 0 => "baseline",
            Some(best) if std::ptr::eq(best, row) => "best",
            _ if !on_scale(comparison, row) => "useless",
            _ => "plain",
        },
        cells: cells(comparison, row, |right, asked| format!("{right}/{asked}")),
    };
    let lines = comparison.rows.iter().enumerate().map(line).collect();
    Block::Table(page::Table { class: "compared", groups, header, names: 1, lines })
}

/// The line of a kernel.
fn cells(
    comparison: &Comparison,
    row: &Row,
    recalled: impl Fn(usize, usize) -> String,
) -> Vec<String> {
    let none = || "–".to_owned();
    let is_first = reference(comparison).is_some_and(|first| std::ptr::eq(first, row));
    let mut cells = vec![
        shortened(&row.kernel, LONGEST_NAME),
        exact_heads(row).map_or_else(none, count),
        plain(mib(row.state_bytes)),
        share(state_share(comparison, row)),
        perplexity(row.halves[0]),
        perplexity(row.halves[1]),
        if is_first { none() } else { numbers::change(change(comparison, row)) },
    ];
    for list in lists(comparison) {
        cells.push(score(row, list).map_or_else(none, |score| recalled(score.right, score.asked)));
    }
    cells.push(if row.copying.asked == 0 { none() } else { share(row.copying.share()) });
    let step = lengths(comparison).last().and_then(|longest| decode_at(row, *longest));
    cells.extend(match step {
        Some(step) => [plain(step.attention), plain(step.total)],
        None => [none(), none()],
    });
    cells
}
