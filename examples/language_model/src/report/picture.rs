//! One picture for a README.

use super::charts::{attention_time, distance, load, perplexity, total_time};
use super::facts::{best_constant, best_exact, is_window, reference};
use super::plot::Panel;
use crate::compare::{Comparison, Row};
use anyhow::Result;
use plotters::prelude::*;

const SIZE: (u32, u32) = (920, 370);

/// Perplexity against state beside the time of a decode step against the context, as SVG on white.
pub fn picture(comparison: &Comparison) -> Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let panels: Vec<Panel> =
            [perplexity(comparison), second(comparison)].into_iter().flatten().collect();
        let areas = root.split_evenly((1, panels.len().max(1)));
        for (mut panel, area) in panels.into_iter().zip(&areas) {
            panel.letters = 13;
            panel.draw_on(area)?;
        }
        root.present()?;
    }
    // placeholders of the page, as they look on white
    let dashed = "stroke=\"#1D2430\" stroke-dasharray=\"7 4\"";
    let svg = svg
        .replace("stroke=\"#010205\"", dashed)
        .replace("#010203", "#1D2430")
        .replace("#010204", "#E3E6EA");
    Ok(svg)
}

/// Time, or recall where no time was taken; only of the kernels that matter most, by name.
fn second(comparison: &Comparison) -> Option<Panel> {
    let timed = comparison.rows.iter().any(|row| row.decode.len() > 1);
    let panel = timed.then(|| total_time(comparison)).flatten();
    if let Some(mut panel) = panel {
        let window = comparison.rows.iter().find(|row| is_window(row));
        let constant = best_constant(comparison).or(window);
        let chosen = [reference(comparison), constant, best_exact(comparison)];
        let is_chosen = |row: &Row| chosen.iter().flatten().any(|other| std::ptr::eq(*other, row));
        for (series, row) in panel.series.iter_mut().zip(&comparison.rows) {
            series.name = Some(row.kernel.clone());
        }
        let mut rows = comparison.rows.iter();
        panel.series.retain(|_| rows.next().is_some_and(is_chosen));
        panel.title = "Time of a decode step".to_owned();
        return Some(panel);
    }
    distance(comparison)
        .or_else(|| load(comparison))
        .map(|(panel, _)| panel)
        .or_else(|| attention_time(comparison))
}
