//! The HTML page: one file that needs no other.

use crate::args::Plan;
use crate::findings::SMALL_NORM;
use crate::hybrids;
use crate::kernels::Kernel;
use crate::measure::Results;
use crate::plots::{self, Failure};
use crate::rivals;
use crate::summary::{Group, describe};
use crate::table::{self, Emphasis};
use reports::plots::escaped;

const STYLE: &str = include_str!("../../src/page.css");

/// Plots of single heads that the page shows.
const MOST_PANELS: usize = 12;

/// The whole page.
pub fn page(results: &Results, plan: &Plan, findings: &[String]) -> Result<String, Failure> {
    let heads = Group::heads(results);
    let mut html = String::from(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta \
         name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>Approximation \
         error of attention kernels</title>\n<style>\n",
    );
    html.push_str(STYLE);
    html.push_str(
        "</style>\n</head>\n<body>\n<h1>How close do attention kernels come to softmax?</h1>\n",
    );
    html.push_str(&format!(
        "<p class=\"about\">dijiang {}, <code>{}</code>. {} seeds of every random map; kernels in \
         float32, the reference in float64. Errors are relative Frobenius norms: ‖ÂV − AV‖/‖AV‖ \
         for outputs, ‖K̂ − K‖/‖K‖ for kernels, K = exp(q̂·k̂). Uniform attention gives every \
         visible key the same weight; a map that does not beat it approximates nothing.</p>\n",
        env!("CARGO_PKG_VERSION"),
        escaped(&plan.command),
        plan.seeds
    ));

    section(&mut html, "What was found");
    html.push_str("<ul>\n");
    for finding in findings {
        html.push_str(&format!("<li>{}</li>\n", escaped(finding)));
    }
    html.push_str("</ul>\n");

    section(&mut html, &format!("Real heads ({})", heads.name));
    html.push_str(&summary_table(&table::HEADER, &table::summary(results, &heads), 1));
    html.push_str(&format!("<p>{}</p>\n", escaped(table::LEGEND).replace('\n', "<br>")));

    hybrid_sections(&mut html, results, plan)?;
    if !plan.kernels.is_empty() {
        map_sections(&mut html, results, plan, &heads)?;
    }
    norms_section(&mut html, results, plan);
    rival_sections(&mut html, results, plan, &heads);

    section(&mut html, "What was measured");
    html.push_str("<ul>\n");
    for input in &results.inputs {
        html.push_str(&format!("<li>{}</li>\n", escaped(&describe(input))));
    }
    html.push_str("</ul>\n<dl>\n");
    for kernel in &plan.kernels {
        html.push_str(&format!("<dt>{}</dt><dd>{}</dd>\n", kernel.name(), kernel.description()));
    }
    for hybrid in &plan.hybrids {
        html.push_str(&format!("<dt>{}</dt><dd>{}</dd>\n", hybrid.name(), hybrid.description()));
    }
    for rival in &plan.rivals {
        html.push_str(&format!("<dt>{}</dt><dd>{}</dd>\n", rival.name(), rival.description()));
    }
    html.push_str(&format!(
        "</dl>\n<p>{} measurements; every one is in <code>measurements.csv</code>. Times are of \
         one forward on one thread, and are the only numbers here that differ from run to \
         run.</p>\n</body>\n</html>\n",
        results.measurements.len()
            + results.hybrids.measurements.len()
            + results.rivals.measurements.len()
    ));
    Ok(html)
}

/// The hybrids: a table, and for each head error against state.
fn hybrid_sections(html: &mut String, results: &Results, plan: &Plan) -> Result<(), Failure> {
    let lines = hybrids::table::lines(results);
    if lines.is_empty() {
        return Ok(());
    }
    section(html, "Hybrids, head by head");
    html.push_str(&summary_table(&hybrids::table::HEADER, &lines, 2));
    let legend = hybrids::table::legend(results, &plan.sizes);
    html.push_str(&format!("<p>{}</p>\n", escaped(&legend).replace('\n', "<br>")));

    section(html, "Hybrids: error against the size of the state");
    let lines = [("reference", "uniform attention"), ("guide", "cache of exact attention")];
    html.push_str(&plots::key(hybrids::plot::marks(&plan.hybrids), &lines));
    html.push_str("<div class=\"panels\">\n");
    let heads = hybrids::rows::inputs(results);
    for &input in heads.iter().take(MOST_PANELS) {
        let plot = hybrids::plot::pareto(results, input)?;
        figure(html, plot, &hybrids::findings::caption(results, input));
    }
    html.push_str("</div>\n");
    if heads.len() > MOST_PANELS {
        html.push_str(&format!("<p>The first {MOST_PANELS} of {} heads.</p>\n", heads.len()));
    }
    Ok(())
}

/// The feature maps: errors by head, features, state and norm.
fn map_sections(
    html: &mut String,
    results: &Results,
    plan: &Plan,
    heads: &Group,
) -> Result<(), Failure> {
    let small = results.inputs.iter().position(|input| input.norm == Some(SMALL_NORM));
    let features = table::typical_features(&plan.features);
    let mut panels: Vec<Group> =
        [SMALL_NORM, 4.0].into_iter().filter_map(|n| Group::norm(results, n)).collect();
    panels.push(heads.clone());
    let small_and_heads: Vec<Group> =
        Group::norm(results, SMALL_NORM).into_iter().chain([heads.clone()]).collect();
    let uniform = ("reference", "uniform attention");
    let estimates = |kernels: &[Kernel]| {
        kernels.iter().copied().filter(|k| k.aims_at_softmax() || *k == Kernel::DctNormal).collect()
    };
    let estimates: Vec<Kernel> = estimates(&plan.kernels);

    section(html, "Error by head");
    let zeros = ("guide", "an output of zeros");
    html.push_str(&plots::legend(plan.kernels.iter().copied(), &[uniform, zeros]));
    let by_head = plots::by_head(results, &heads.inputs, features)?;
    figure(
        html,
        by_head,
        "Median over seeds, with the range over seeds. The dashed bar is uniform attention on \
         that head: marks above it are worse than looking at all keys alike. Marks at the upper \
         edge may lie beyond it.",
    );

    section(html, "Error against the number of features");
    html.push_str(&plots::legend(plan.kernels.iter().copied(), &[uniform]));
    html.push_str("<div class=\"panels\">\n");
    for group in &panels {
        let plot = plots::output_against_features(results, group)?;
        figure(html, plot, "");
    }
    html.push_str(
        "</div>\n<p>Relative output error, median over seeds with the range over seeds, both axes \
         logarithmic. Gaussian q and k of the stated norm, then the real heads. Maps whose number \
         of features follows from d are single marks.</p>\n",
    );

    section(html, "How fast the kernel error falls");
    html.push_str(&plots::legend(estimates.iter().copied(), &[("guide", "slopes −½ and −1")]));
    html.push_str("<div class=\"panels\">\n");
    for group in &small_and_heads {
        let plot = plots::kernel_against_features(results, group)?;
        figure(html, plot, "");
    }
    html.push_str(
        "</div>\n<p>Relative error of the unnormalised weights against exp(q̂·k̂). Monte Carlo \
         falls with slope −½; slope −1 is the O(1/m) claimed for quasi-Monte Carlo.</p>\n",
    );
    let slopes = plots::slopes(results, small, &heads.inputs)?;
    if slopes.is_some() {
        let lines =
            [("reference", "−1, claimed for quasi-Monte Carlo"), ("guide", "−½, Monte Carlo")];
        html.push_str(&plots::legend([], &lines));
        figure(
            html,
            slopes,
            &format!(
                "Large marks: |x̂|² = {SMALL_NORM}. Small marks: one for each real head, in the \
                 order listed below."
            ),
        );
    }
    if let Some(rows) = plots::slope_table(results, small, &heads.inputs) {
        html.push_str(&format!(
            "<div class=\"scroll\"><table><thead><tr><th>kernel</th><th>claimed</th><th>measured, \
             |x̂|² = {SMALL_NORM}</th><th>95 % interval</th><th>mean kernel error by \
             m</th><th>range over heads</th></tr></thead><tbody>{rows}</tbody></table></div>\n"
        ));
    }

    section(html, "Error against the size of the state");
    html.push_str(&plots::legend(
        plan.kernels.iter().copied(),
        &[uniform, ("guide", "state of exact attention")],
    ));
    html.push_str("<div class=\"panels\">\n");
    for group in &small_and_heads {
        let plot = plots::output_against_state(results, group)?;
        figure(html, plot, "");
    }
    html.push_str(
        "</div>\n<p>A feature map keeps 2m·(d<sub>v</sub> + 1) + 1 numbers, sums and their \
         rounding errors; exact attention keeps n·(d + d<sub>v</sub>), the upright line.</p>\n",
    );
    Ok(())
}

fn norms_section(html: &mut String, results: &Results, plan: &Plan) {
    let (header, lines) =
        table::norms(results, &Group::synthetic(results), table::typical_features(&plan.features));
    if let [] | [_] = lines[..] {
        return; // uniform attention alone
    }
    section(html, "Growing norms");
    html.push_str(&plain_table(&header, &lines));
    html.push_str(
        "<p>Output error on Gaussian q and k; in brackets: no better than uniform attention. † \
         not made to estimate exp(q·k).</p>\n",
    );
}

/// The rivals: a table of medians, and their errors by head.
fn rival_sections(html: &mut String, results: &Results, plan: &Plan, heads: &Group) {
    let lines = rivals::table::lines(results, heads);
    if lines.is_empty() {
        return;
    }
    section(html, rivals::table::TITLE);
    html.push_str(&summary_table(&rivals::table::HEADER, &lines, 1));
    let legend = rivals::table::legend(results, heads, plan);
    html.push_str(&format!("<p>{}</p>\n", escaped(&legend).replace('\n', "<br>")));

    section(html, "Rivals by head");
    let (header, lines) = rivals::table::by_head(results, heads);
    html.push_str(&plain_table(&header, &lines));
    html.push_str(
        "<p>Output error, median over seeds; in brackets after the best factor. A dash: the \
         kernel has no meaning on that head.</p>\n",
    );
}

fn section(html: &mut String, title: &str) {
    html.push_str(&format!("<h2>{}</h2>\n", escaped(title)));
}

fn figure(html: &mut String, plot: Option<String>, caption: &str) {
    if let Some(svg) = plot {
        html.push_str(&format!("<figure>{svg}"));
        if !caption.is_empty() {
            html.push_str(&format!("<figcaption>{}</figcaption>", escaped(caption)));
        }
        html.push_str("</figure>\n");
    }
}

/// The first `names` columns hold no numbers.
fn summary_table(header: &[&str], lines: &[table::Line], names: usize) -> String {
    let mut html = String::from("<div class=\"scroll\"><table><thead><tr>");
    for (i, name) in header.iter().enumerate() {
        let class = if i < names { " class=\"name\"" } else { "" };
        html.push_str(&format!("<th{class}>{}</th>", escaped(name).replace('\n', "<br>")));
    }
    html.push_str("</tr></thead><tbody>\n");
    for line in lines {
        let class = match line.emphasis {
            Emphasis::Baseline => "baseline",
            Emphasis::Best => "best",
            Emphasis::Useless => "useless",
            Emphasis::Plain => "plain",
        };
        html.push_str(&format!("<tr class=\"{class}\">{}</tr>\n", cells(&line.cells, names)));
    }
    html.push_str("</tbody></table></div>\n");
    html
}

fn plain_table(header: &[String], lines: &[Vec<String>]) -> String {
    let head: String = header.iter().map(|name| format!("<th>{}</th>", escaped(name))).collect();
    let body: String = lines.iter().map(|line| format!("<tr>{}</tr>\n", cells(line, 1))).collect();
    format!(
        "<div class=\"scroll\"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></\
         table></div>\n"
    )
}

fn cells(line: &[String], names: usize) -> String {
    let cell = |(i, text): (usize, &String)| {
        let tag = if i < names { "th" } else { "td" };
        format!("<{tag}>{}</{tag}>", escaped(text))
    };
    line.iter().enumerate().map(cell).collect()
}
