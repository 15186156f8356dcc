//! The page: what stands on it, from what to take away to every detail.

use crate::args::Plan;
use crate::findings::{Found, SMALL_NORM};
use crate::headline;
use crate::hybrids;
use crate::measure::Results;
use crate::plots::{self, Failure};
use crate::rivals;
use crate::summary::{Group, describe, rows};
use crate::table::{self, Emphasis};
use reports::page::{Block, Figure, Line, Mark, Table};

/// Plots of single heads that the page shows.
const MOST_PANELS: usize = 12;

/// The whole page.
pub fn page(
    results: &Results,
    plan: &Plan,
    findings: Vec<Found>,
    lead: Vec<String>,
) -> Result<String, Failure> {
    let heads = Group::heads(results);
    let mut blocks = Vec::new();
    if !lead.is_empty() {
        blocks.push(Block::Lead { items: lead });
    }
    blocks.extend(headline::chart(results).map(|chart| Block::Dots { charts: vec![chart] }));
    blocks.push(Block::About {
        text: format!(
            "dijiang {}: {} seed{} of every random map; kernels in float32, the reference in \
             float64. Errors are relative Frobenius norms: ‖ÂV − AV‖/‖AV‖ for outputs, ‖K̂ − \
             K‖/‖K‖ for kernels, K = exp(q̂·k̂). Uniform attention gives every visible key the \
             same weight; a map that does not beat it approximates nothing.",
            env!("CARGO_PKG_VERSION"),
            plan.seeds,
            if plan.seeds == 1 { "" } else { "s" }
        ),
        command: plan.command.clone(),
    });

    blocks.push(Block::section(format!("Real heads ({})", heads.name)));
    blocks.push(summary_table(&table::HEADER, table::summary(results, &heads), 1));
    blocks.push(Block::note(table::LEGEND));

    hybrid_sections(&mut blocks, results, plan)?;
    if !plan.kernels.is_empty() {
        map_sections(&mut blocks, results, plan, &heads)?;
    }
    norms_section(&mut blocks, results, plan);
    rival_sections(&mut blocks, results, plan, &heads);

    blocks.push(Block::section("What was found, in numbers"));
    let groups = findings.into_iter().map(|(title, items)| (title.to_owned(), items)).collect();
    blocks.push(Block::Groups { groups });

    blocks.push(Block::section("What was measured"));
    blocks.push(Block::Items { items: results.inputs.iter().map(describe).collect() });
    blocks.push(Block::terms(
        plan.kernels
            .iter()
            .map(|kernel| (kernel.name(), kernel.description()))
            .chain(plan.hybrids.iter().map(|hybrid| (hybrid.name(), hybrid.description())))
            .chain(plan.rivals.iter().map(|rival| (rival.name(), rival.description()))),
    ));
    blocks.push(Block::note(&format!(
        "{} measurements; every one is in measurements.csv. Times are of one forward on one \
         thread, and are the only numbers here that differ from run to run.",
        results.measurements.len()
            + results.hybrids.measurements.len()
            + results.rivals.measurements.len()
    )));
    Ok(reports::page::page(
        "Approximation error of attention kernels",
        "How close do attention kernels come to softmax?",
        &blocks,
    )?)
}

/// The hybrids: a table, and for each head error against state.
fn hybrid_sections(blocks: &mut Vec<Block>, results: &Results, plan: &Plan) -> Result<(), Failure> {
    let lines = hybrids::table::lines(results);
    if lines.is_empty() {
        return Ok(());
    }
    blocks.push(Block::section("Hybrids: error against the size of the state"));
    let heads = hybrids::rows::inputs(results);
    let mut figures = Vec::new();
    for &input in heads.iter().take(MOST_PANELS) {
        let plot = hybrids::plot::pareto(results, input)?;
        figures.extend(figure(plot, hybrids::findings::caption(results, input)));
    }
    blocks.push(Block::Figures { wide: false, figures });
    let first = match heads.len() {
        n if n > MOST_PANELS => format!(" The first {MOST_PANELS} of {n} heads."),
        _ => String::new(),
    };
    blocks.push(Block::note(&format!(
        "Both axes logarithmic: lower left is better. Dashed: uniform attention; dotted: the keys \
         and values of exact attention. Grey rings are variants, which the table below \
         names.{first}"
    )));

    blocks.push(Block::section("Hybrids, head by head"));
    blocks.push(summary_table(&hybrids::table::HEADER, lines, 2));
    blocks.push(Block::note(&hybrids::table::legend(results, &plan.sizes)));
    Ok(())
}

/// The feature maps: errors by head, and by the number of features.
fn map_sections(
    blocks: &mut Vec<Block>,
    results: &Results,
    plan: &Plan,
    heads: &Group,
) -> Result<(), Failure> {
    let features = table::typical_features(&plan.features);
    let charts = plots::by_head(results, &heads.inputs, features);
    if !charts.is_empty() {
        blocks.push(Block::section("Feature maps: error by head"));
        blocks.push(Block::Dots { charts });
        blocks.push(Block::note(&format!(
            "Relative output error with m = {features} features or the map's own number, medians \
             over seeds. A dot for each map of a kind, the number is that of the closest. Right \
             of the dashed line is worse than looking at all keys alike; an output of zeros has \
             error 1. Dots at the right edge may lie beyond it."
        )));
    }

    let mut figures = Vec::new();
    let groups = || Group::norm(results, SMALL_NORM).into_iter().chain([heads.clone()]);
    for group in groups() {
        for family in plots::families(&rows(results, &group)) {
            let plot = plots::output_against_features(results, &group, family)?;
            figures.extend(figure(plot, String::new()));
        }
    }
    if !figures.is_empty() {
        blocks.push(Block::section("Feature maps: more features help where norms are small"));
        blocks.push(Block::Figures { wide: false, figures });
        blocks.push(Block::note(
            "Each panel names the maps of one kind, over grey lines of the others: median over \
             seeds with the range over seeds, both axes logarithmic. Gaussian q and k of the \
             stated norm, then the real heads. Dashed: uniform attention. Dotted: from here on \
             the state is larger than the keys and values of exact attention.",
        ));
    }

    // where the norms are large nothing falls, which the slopes below say
    let mut figures = Vec::new();
    for group in groups().take(1) {
        for family in plots::families(&rows(results, &group)) {
            let plot = plots::kernel_against_features(results, &group, family)?;
            figures.extend(figure(plot, String::new()));
        }
    }
    if !figures.is_empty() {
        blocks.push(Block::section("Feature maps: how fast the kernel error falls"));
        blocks.push(Block::Key { marks: vec![Mark::line("guide", "slopes −½ and −1")] });
        blocks.push(Block::Figures { wide: false, figures });
        blocks.push(Block::note(
            "Relative error of the unnormalised weights against exp(q̂·k̂). Monte Carlo falls with \
             slope −½; slope −1 is the O(1/m) claimed for quasi-Monte Carlo.",
        ));
    }
    let small = results.inputs.iter().position(|input| input.norm == Some(SMALL_NORM));
    if let Some(mut chart) = plots::slopes(results, small, &heads.inputs) {
        chart.caption = format!(
            "Upright marks and bars: |x̂|² = {SMALL_NORM} with 95 % intervals. Dots: real heads."
        );
        blocks.push(Block::Dots { charts: vec![chart] });
    }
    let lines = plots::slope_table(results, small, &heads.inputs);
    if !lines.is_empty() {
        let at_small = format!("measured,\n|x̂|² = {SMALL_NORM}");
        let header = [
            "kernel",
            "claimed",
            &at_small,
            "95 % interval",
            "mean kernel error by m",
            "range\nover heads",
        ];
        blocks.push(plain_table(header.map(str::to_owned).to_vec(), lines));
    }
    Ok(())
}

fn norms_section(blocks: &mut Vec<Block>, results: &Results, plan: &Plan) {
    let (header, lines) =
        table::norms(results, &Group::synthetic(results), table::typical_features(&plan.features));
    if let [] | [_] = lines[..] {
        return; // uniform attention alone
    }
    blocks.push(Block::section("Growing norms"));
    blocks.push(plain_table(header, lines));
    blocks.push(Block::note(
        "Output error on Gaussian q and k; in brackets: no better than uniform attention. † not \
         made to estimate exp(q·k).",
    ));
}

/// The rivals: a table of medians, and their errors by head.
fn rival_sections(blocks: &mut Vec<Block>, results: &Results, plan: &Plan, heads: &Group) {
    let lines = rivals::table::lines(results, heads);
    if lines.is_empty() {
        return;
    }
    blocks.push(Block::section(rivals::table::TITLE));
    blocks.push(summary_table(&rivals::table::HEADER, lines, 1));
    blocks.push(Block::note(&rivals::table::legend(results, heads, plan)));

    blocks.push(Block::section("Rivals by head"));
    let (header, lines) = rivals::table::by_head(results, heads);
    blocks.push(plain_table(header, lines));
    blocks.push(Block::note(
        "Output error, median over seeds; in brackets after the best factor. A dash: the kernel \
         has no meaning on that head.",
    ));
}

fn figure(svg: Option<String>, caption: String) -> Option<Figure> {
    svg.map(|svg| Figure { svg, caption })
}

/// The first `names` columns hold no numbers.
fn summary_table(header: &[&str], lines: Vec<table::Line>, names: usize) -> Block {
    let line = |line: table::Line| {
        let class = match line.emphasis {
            Emphasis::Baseline => "baseline",
            Emphasis::Best => "best",
            Emphasis::Useless => "useless",
            Emphasis::Plain => "plain",
        };
        Line { class, cells: line.cells.into() }
    };
    Block::Table(Table {
        header: header.iter().map(|name| (*name).to_owned()).collect(),
        names,
        lines: lines.into_iter().map(line).collect(),
        ..Table::default()
    })
}

fn plain_table(header: Vec<String>, lines: Vec<Vec<String>>) -> Block {
    let lines = lines.into_iter().map(|cells| Line { class: "plain", cells }).collect();
    Block::Table(Table { header, names: 1, lines, ..Table::default() })
}
