//! The table of one sort of needle on the terminal.

use crate::kernels::{KERNELS, Kind};
use crate::measure::{Curve, Plan, Results, Score};
use crate::task::{CLASSES, Sort};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{Attribute, Cell, CellAlignment, Table};

/// Both curves, one below the other.
pub fn terminal(results: &Results, plan: &Plan, sort: Sort) -> String {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    let bold = |text: String| Cell::new(text).add_attribute(Attribute::Bold);
    for curve in Curve::ALL {
        let header = header(plan, curve).into_iter().map(bold);
        if curve == Curve::Distance {
            table.set_header(header)
        } else {
            table.add_row(header)
        };
        for (kernel, about) in KERNELS.iter().enumerate() {
            let line = line(results, sort, curve, kernel).into_iter();
            table.add_row(
                line.map(
                    |text| if about.kind == Kind::Memory { Cell::new(text) } else { bold(text) },
                ),
            );
        }
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

pub fn header(plan: &Plan, curve: Curve) -> Vec<String> {
    let first = format!("{}, by {}", curve.fixed(plan), curve.name());
    [first, "state".to_owned()]
        .into_iter()
        .chain(curve.points(plan).iter().map(usize::to_string))
        .collect()
}

pub fn line(results: &Results, sort: Sort, curve: Curve, kernel: usize) -> Vec<String> {
    let scores = results.scores(sort, curve, kernel).iter().map(|score| percent_and_half(*score));
    [KERNELS[kernel].name.to_owned(), count(results.state_floats[kernel])]
        .into_iter()
        .chain(scores)
        .collect()
}

/// The mean and half of the width of its interval.
fn percent_and_half(score: Score) -> String {
    let [from, to] = score.interval();
    format!("{:.0}±{:.0}", 100.0 * score.accuracy(), 50.0 * (to - from))
}

/// What the numbers mean.
pub fn legend(plan: &Plan) -> String {
    format!(
        "Right answers in %, ± half of a 95 % binomial interval ({} streams for each point; \
         answers of one stream are not independent).\nA guess is right in {:.1} %. State: numbers \
         kept after the longest stream; that of softmax grows by {} with each token.",
        plan.seeds,
        100.0 / CLASSES as f64,
        2 * crate::task::HEAD_DIM,
    )
}

/// A count with spaces between thousands.
fn count(x: usize) -> String {
    if x < 1000 { x.to_string() } else { format!("{} {:03}", count(x / 1000), x % 1000) }
}
