//! The HTML page: one file that needs no other.

use crate::kernels::{KERNELS, Kind};
use crate::measure::{Curve, Plan, Results};
use crate::plots;
use crate::table;
use crate::task::Sort;

const STYLE: &str = include_str!("../../src/page.css");

/// The whole page.
pub fn page(
    results: &Results,
    plan: &Plan,
    findings: &[String],
) -> Result<String, Box<dyn std::error::Error>> {
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta \
         name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>Recall of \
         attention kernels</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>What does a \
         memory of constant size recall?</h1>\n<p class=\"about\">dijiang {}, <code>{}</code>. \
         Pairs of a key and a value are planted in a stream of filler, and asked for later by \
         noisy copies of their keys. An answer is right if the planted value is the nearest of 64 \
         codes. Nothing marks a planted key: it is made as every other one, in sizes and shares \
         that were measured on real heads.</p>\n<h2>What was found</h2>\n<ul>\n",
        env!("CARGO_PKG_VERSION"),
        plan.command
    );
    for finding in findings {
        html.push_str(&format!("<li>{finding}</li>\n"));
    }
    html.push_str("</ul>\n");
    for sort in Sort::ALL {
        html.push_str(&format!(
            "<h2>{}</h2>\n{}\n<div class=\"panels\">\n",
            sort.title(),
            plots::legend()
        ));
        for curve in Curve::ALL {
            html.push_str(&format!(
                "<figure>{}</figure>\n",
                plots::accuracy(results, plan, sort, curve)?
            ));
        }
        html.push_str("</div>\n");
        for curve in Curve::ALL {
            html.push_str(&format!("<p>In %, {}:</p>\n", curve.fixed(plan)));
            html.push_str(&rows(results, plan, sort, curve));
        }
    }
    html.push_str(&format!(
        "<p>{}</p>\n<h2>The kernels</h2>\n<dl>\n",
        table::legend(plan).replace('\n', "<br>")
    ));
    for kernel in &KERNELS {
        html.push_str(&format!("<dt>{}</dt><dd>{}</dd>\n", kernel.name, kernel.about));
    }
    html.push_str("</dl>\n</body>\n</html>\n");
    Ok(html)
}

fn rows(results: &Results, plan: &Plan, sort: Sort, curve: Curve) -> String {
    // the first is the line's name
    let cells = |line: Vec<String>, tag: &str| {
        let cell = |(i, text): (usize, String)| {
            let tag = if i == 0 { "th" } else { tag };
            format!("<{tag}>{text}</{tag}>")
        };
        line.into_iter().enumerate().map(cell).collect::<String>()
    };
    let head = cells(table::header(plan, curve), "th");
    let mut html = format!("<div class=\"scroll\"><table><thead><tr>{head}</tr></thead><tbody>\n");
    for (place, kernel) in KERNELS.iter().enumerate() {
        let class = if kernel.kind == Kind::Memory { "plain" } else { "baseline" };
        let line = cells(table::line(results, sort, curve, place), "td");
        html.push_str(&format!("<tr class=\"{class}\">{line}</tr>\n"));
    }
    html.push_str("</tbody></table></div>\n");
    html
}
