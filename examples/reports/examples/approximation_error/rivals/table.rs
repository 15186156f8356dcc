//! The tables of rivals, for the terminal and the page.

use super::Rival;
use super::rows::{Row, rows, uniform};
use crate::args::Plan;
use crate::measure::Results;
use crate::summary::{Group, Spread};
use crate::table::{Emphasis, Line};
use crate::text::{count, short, short_or_dash};

pub const TITLE: &str = "Rivals: kernels that models are trained with, not ranked";

/// Two lines each.
pub const HEADER: [&str; 10] = [
    "kernel",
    "output\nerror",
    "over\nseeds",
    "uniform",
    "beats\nuniform",
    "error, best\nfactor",
    "uniform,\nbest factor",
    "beats\nuniform",
    "state\n(floats)",
    "µs per\ntoken",
];

/// The rivals on real heads, none set off.
pub fn lines(results: &Results, heads: &Group) -> Vec<Line> {
    rows(results, heads).iter().map(line).collect()
}

fn line(row: &Row) -> Line {
    let [error, with_factor] = row.errors;
    let seeds = if row.rival.is_random() { over_seeds(error) } else { "-".to_owned() };
    let [uniform, uniform_with_factor] = row.uniform.map(short);
    let [beats, beats_with_factor] =
        row.beats_uniform.map(|heads| format!("{heads}/{}", row.inputs));
    Line {
        cells: [
            row.rival.name().to_owned(),
            short(error.median),
            seeds,
            uniform,
            beats,
            short(with_factor.median),
            uniform_with_factor,
            beats_with_factor,
            count(row.state_floats),
            short_or_dash(row.microseconds),
        ],
        emphasis: Emphasis::Plain,
    }
}

fn over_seeds(error: Spread) -> String {
    format!("{}-{}", short(error.least), short(error.most))
}

/// What the columns mean, as far as the run has them.
pub fn legend(results: &Results, heads: &Group, plan: &Plan) -> String {
    let mut text = String::from(
        "Models are trained with these kernels as they are: the distance from softmax says \
         nothing about their quality.\nMedians over the heads that a kernel has a meaning on, \
         then over seeds; uniform attention on the same heads.\nBest factor: each head's output \
         times the one number that fits best. A norm after the kernels that have no\nnormaliser \
         removes any such number.\n",
    );
    let chosen = |rivals: &[Rival]| rivals.iter().any(|rival| plan.rivals.contains(rival));
    if chosen(&[Rival::Ssd, Rival::Gla]) {
        text.push_str(
            "No gates are trained for these heads: those of ssd and gla come from the keys by the \
             papers' formulas with\nuntrained weights.\n",
        );
    }
    if chosen(&[Rival::Linformer]) {
        text.push_str(
            "linformer does aim at softmax, with trained projections; here they are random.\n",
        );
    }
    let missing = |rival: &Rival| {
        plan.rivals.contains(rival)
            && heads.inputs.iter().any(|i| !rival.applies_to(&results.inputs[*i]))
    };
    if Rival::ALL.iter().any(missing) {
        text.push_str(
            "Kernels that decay need an order of tokens, so bidirectional heads have none; \
             linformer mixes all positions, so\ncausal heads, and heads of no more tokens than \
             its rank, have none.\n",
        );
    }
    text.trim_end().to_owned()
}

/// The errors head by head, those after the best factor in brackets.
pub fn by_head(results: &Results, heads: &Group) -> (Vec<String>, Vec<Vec<String>>) {
    let name = |i: &usize| results.inputs[*i].name.clone();
    let header =
        std::iter::once("kernel".to_owned()).chain(heads.inputs.iter().map(name)).collect();
    let both =
        |[error, with_factor]: [f64; 2]| format!("{} ({})", short(error), short(with_factor));
    let of_heads: Vec<Vec<Row>> =
        heads.inputs.iter().map(|i| rows(results, &Group::one(results, *i))).collect();
    let mut lines = vec![vec!["uniform".to_owned()]];
    lines[0].extend(heads.inputs.iter().map(|i| both(uniform(results, *i))));
    for rival in rows(results, heads).iter().map(|row| row.rival) {
        let cell = |rows: &Vec<Row>| {
            let row = rows.iter().find(|row| row.rival == rival);
            row.map_or_else(|| "-".to_owned(), |row| both(row.errors.map(|error| error.median)))
        };
        lines.push(
            std::iter::once(rival.name().to_owned()).chain(of_heads.iter().map(cell)).collect(),
        );
    }
    (header, lines)
}
