//! Conversions as a page with curves, and as a table.

use super::axis::Axis;
use super::numbers::{self, change, count, list, plain};
use super::plot::{Look, Panel, Series, key, look};
use super::table::STYLE;
use crate::conversion::{Conversions, Measured, Row, Trend, divergences};
use crate::convert::learned::Point;
use anyhow::Result;
use comfy_table::{CellAlignment, ContentArrangement, Table};
use reports::page::{self, Block, Figure};

/// Steps whose losses are averaged for a point of the curve.
const SMOOTHED: usize = 16;

/// The page; `command` is what was typed to get it.
pub fn page(conversions: &Conversions, command: &str) -> Result<String> {
    let Conversions { model, texts, context, .. } = conversions;
    let about = format!(
        "{model}, held-out texts: {}, windows of {} tokens. Curves were measured while training, \
         on the first window of the texts that were given there.",
        list(texts),
        count(*context)
    );
    let mut blocks = vec![
        Block::Lead { items: findings(conversions) },
        Block::About { text: about, command: command.to_owned() },
        Block::section("Before and behind"),
        Block::note(
            "Perplexity over both halves of the windows and its change against exact attention; \
             KL(exact ‖ converted) there, in nats; what is gone of the excess in nats in the \
             second half; codes recalled and tokens copied.",
        ),
        block(conversions),
    ];
    let marks = looks(conversions);
    let names: Vec<String> = conversions.rows.iter().map(Row::name).collect();
    let keyed = || marks.iter().zip(&names).map(|(look, name)| (*look, name.as_str()));
    blocks.push(Block::section("Held-out perplexity against tokens trained"));
    blocks.push(key(keyed(), Some("exact attention")));
    let halves = [(0, "first half"), (1, "second half")];
    let mut figures = Vec::new();
    for (half, name) in halves {
        if let Some(panel) = perplexity(conversions, half, name) {
            let caption = format!(
                "Perplexity in the {name} of the windows, both axes logarithmic. The leftmost mark \
                 is the model before its training."
            );
            figures.push(Figure { svg: panel.svg()?, caption });
        }
    }
    blocks.push(Block::Figures { wide: false, figures });
    let mut figures = Vec::new();
    for (half, name) in halves {
        if let Some(panel) = divergence(conversions, half, name) {
            let caption = format!(
                "KL(exact ‖ trained) in the {name}, both axes logarithmic. A straight line is a \
                 power law. Noise of the training that happens to suit the text can lower the \
                 perplexity; this it cannot."
            );
            figures.push(Figure { svg: panel.svg()?, caption });
        }
    }
    if !figures.is_empty() {
        blocks.push(Block::section("How far it is from what exact attention says"));
        blocks.push(key(keyed(), None));
        blocks.push(Block::Figures { wide: false, figures });
        blocks.push(Block::Items { items: slopes(conversions) });
    }
    if let Some(panel) = training(conversions) {
        blocks.push(Block::section("The loss that was trained"));
        let caption = format!(
            "Means of {SMOOTHED} steps, both axes logarithmic: divergences from the exact model, \
             or surprises at the text where `--loss ce` was asked for."
        );
        blocks.push(Block::Figures {
            wide: true,
            figures: vec![Figure { svg: panel.svg()?, caption }],
        });
    }
    let items = conversions.rows.iter().map(how).collect();
    blocks.push(Block::section("How they were trained"));
    blocks.push(Block::Items { items });
    Ok(reports::page::page(
        "Conversions of a language model",
        "How well does a pretrained model learn to live with another attention?",
        &blocks,
    )?)
}

/// How a conversion was done, in a line.
fn how(row: &Row) -> String {
    let history = &row.about.history;
    format!(
        "{}: {} tokens of {} in {} s, {} tokens a second; {:?}",
        row.name(),
        count(row.tokens()),
        list(&row.about.texts.iter().map(|text| &text.name).collect::<Vec<_>>()),
        plain(history.seconds),
        plain(row.tokens() as f64 / history.seconds.max(1e-9)),
        row.about.options
    )
}

/// The share of the excess in the second half that is gone, where there is one.
fn gone(row: &Row, exact: &Measured) -> Option<f64> {
    let [before, after, exact] = [&row.before, &row.after, exact].map(|of| of.said.halves[1]);
    let (before, after, exact) = (before?, after?, exact?);
    (before > exact).then(|| 1.0 - (after - exact) / (before - exact))
}

/// Sentences on what was found.
#[must_use]
pub fn findings(conversions: &Conversions) -> Vec<String> {
    let exact = &conversions.exact;
    let of = |row: &Row| -> Option<String> {
        let [before, after] = [&row.before, &row.after].map(|measured| measured.said.halves[1]);
        let (b, a, e) = (before?, after?, exact.said.halves[1]?);
        let share = match gone(row, exact) {
            Some(share) if share >= 0.0 => {
                format!("{} of the excess in nats is gone", numbers::share(share))
            }
            Some(_) => "it got worse".to_owned(),
            None => "it had no excess".to_owned(),
        };
        Some(format!(
            "{}: perplexity in the second half {} before, {} behind {} tokens, {} with exact \
             attention ({} and {}): {share}. Pairs recalled: {} before, {} after, {} by exact \
             attention.",
            row.name(),
            numbers::perplexity(b),
            numbers::perplexity(a),
            count(row.tokens()),
            numbers::perplexity(e),
            change((b - e).exp_m1()),
            change((a - e).exp_m1()),
            recalled(&row.before),
            recalled(&row.after),
            recalled(exact)
        ))
    };
    conversions.rows.iter().filter_map(of).collect()
}

/// Right and asked, over all lists.
fn recalled(measured: &Measured) -> String {
    let sum = |of: fn(&crate::recall::Score) -> usize| -> usize {
        measured.recall.iter().map(|(_, score)| of(score)).sum()
    };
    format!("{} of {}", sum(|score| score.right), sum(|score| score.asked))
}

/// What the curves say of more tokens, if they went on as they did.
#[must_use]
pub fn slopes(conversions: &Conversions) -> Vec<String> {
    let of = |row: &Row| -> Option<String> {
        let trend = Trend::of(&row.about, 1).filter(|trend| trend.slope < 0.0)?;
        let tokens = row.tokens() as f64;
        Some(format!(
            "{}: the divergence in the second half falls as tokens^{:.2}. If it went on so, which \
             nobody has measured, it would be {:.3} nats at {} tokens, {:.3} at ten times as many.",
            row.name(),
            trend.slope,
            trend.at(tokens),
            count(row.tokens()),
            trend.at(10.0 * tokens)
        ))
    };
    conversions.rows.iter().filter_map(of).collect()
}

const HEADER: [&str; 12] = [
    "conversion",
    "tokens",
    "",
    "ppl 1st",
    "change",
    "KL 1st",
    "ppl 2nd",
    "change",
    "KL 2nd",
    "gone",
    "recalled",
    "copied",
];

/// The lines of the table.
fn lines(conversions: &Conversions) -> Vec<[String; 12]> {
    let exact = &conversions.exact;
    let line = |[name, tokens, which]: [&str; 3], of: &Measured, gone: Option<f64>| {
        let ppl = |half: usize| of.said.halves[half].map_or("–".to_owned(), numbers::perplexity);
        let changed = |half: usize| match of.said.halves[half].zip(exact.said.halves[half]) {
            Some((nats, exact)) => change((nats - exact).exp_m1()),
            None => "–".to_owned(),
        };
        let divergence = |half: usize| {
            of.said.divergence[half].map_or("–".to_owned(), |nats| format!("{nats:.4}"))
        };
        [
            name.to_owned(),
            tokens.to_owned(),
            which.to_owned(),
            ppl(0),
            changed(0),
            divergence(0),
            ppl(1),
            changed(1),
            divergence(1),
            gone.map_or_else(String::new, |gone| format!("{:.0} %", 100.0 * gone)),
            recalled(of),
            format!("{:.3}", of.copying.share()),
        ]
    };
    let mut lines = vec![line(["softmax", "", ""], exact, None)];
    for row in &conversions.rows {
        lines.push(line([&row.name(), "0", "before"], &row.before, None));
        lines.push(line(["", &count(row.tokens()), "after"], &row.after, gone(row, exact)));
    }
    lines
}

/// The table for the terminal.
#[must_use]
pub fn table(conversions: &Conversions) -> String {
    let mut table = Table::new();
    table.load_style(STYLE).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(HEADER);
    for line in lines(conversions) {
        table.add_row(line);
    }
    for column in table.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// The table for the page.
fn block(conversions: &Conversions) -> Block {
    let lines = lines(conversions).into_iter().enumerate().map(|(i, cells)| page::Line {
        class: if i == 0 { "baseline" } else { "plain" },
        cells: cells.into(),
    });
    Block::Table(page::Table {
        class: "compared",
        groups: Vec::new(),
        header: HEADER.map(str::to_owned).into(),
        names: 3,
        lines: lines.collect(),
    })
}

fn looks(conversions: &Conversions) -> Vec<Look> {
    (0..conversions.rows.len()).map(look).collect()
}

/// Points of a curve, where the first, before any training, stands an octave left of the next.
fn curve(points: &[Point], half: usize) -> Vec<(f64, f64)> {
    let next = points.iter().map(|point| point.tokens).find(|&tokens| tokens > 0);
    let left = next.map_or(1.0, |tokens| tokens as f64 / 2.0);
    let of = |point: &Point| {
        let tokens = if point.tokens == 0 { left } else { point.tokens as f64 };
        Some((tokens, point.said.halves[half]?.exp()))
    };
    points.iter().filter_map(of).collect()
}

/// A panel of curves on logarithmic axes.
fn panel(title: &str, y: &str, curves: &[Vec<(f64, f64)>], across: &[f64]) -> Option<Panel> {
    let all = || curves.iter().flatten();
    let x = Axis::log("tokens trained", all().map(|point| point.0))?;
    let y = Axis::log(y, all().map(|point| point.1).chain(across.iter().copied()))?;
    let mut panel = Panel::new(title, x, y);
    panel.across = across.iter().map(|y| y.log10()).collect();
    panel.series = curves
        .iter()
        .enumerate()
        .map(|(i, points)| Series {
            look: look(i),
            points: points
                .iter()
                .filter(|(_, y)| *y > 0.0)
                .map(|(x, y)| (x.log10(), y.log10()))
                .collect(),
            name: None,
            marks: points.len() <= 40,
        })
        .collect();
    Some(panel)
}

fn perplexity(conversions: &Conversions, half: usize, name: &str) -> Option<Panel> {
    let curves: Vec<_> =
        conversions.rows.iter().map(|row| curve(&row.about.history.points, half)).collect();
    let mut across: Vec<f64> = conversions
        .rows
        .iter()
        .filter_map(|row| Some(row.about.history.points.first()?.said.exact[half]?.exp()))
        .collect();
    across.dedup();
    panel(&format!("Perplexity, {name}"), "perplexity", &curves, &across)
}

fn divergence(conversions: &Conversions, half: usize, name: &str) -> Option<Panel> {
    let curves: Vec<_> = conversions.rows.iter().map(|row| divergences(&row.about, half)).collect();
    panel(&format!("Divergence, {name}"), "KL(exact ‖ trained), nats", &curves, &[])
}

fn training(conversions: &Conversions) -> Option<Panel> {
    let of = |row: &Row| -> Vec<(f64, f64)> {
        let chunks = row.about.history.steps.chunks(SMOOTHED).enumerate();
        let point = |(i, steps): (usize, &[crate::convert::learned::Step])| {
            let mean = steps.iter().map(|step| step.loss).sum::<f64>() / steps.len() as f64;
            let middle = i as f64 * SMOOTHED as f64 + steps.len() as f64 / 2.0;
            (middle * row.about.options.tokens_of(1) as f64, mean)
        };
        chunks.map(point).collect()
    };
    let curves: Vec<_> = conversions.rows.iter().map(of).collect();
    let mut panel = panel("Loss of the training", "nats", &curves, &[])?;
    panel.size = (900, 400);
    Some(panel)
}
