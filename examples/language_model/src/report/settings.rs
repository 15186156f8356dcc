//! A plan as a picture: layers along x, kv heads along y; the area of a disc is the number of
//! entries of a head, its colour the window.

use super::heads::{ACROSS, LEFT, MOST_CELLS, colour, text};
use crate::compare::{Comparison, Row};
use dijiang::{HeadSetting, StatePlan};
use std::collections::BTreeSet;

/// Pixels of a kv head, and of the largest disc.
const TALL: usize = 30;

/// The plans there are, each with the first kernel that has it.
pub fn plans(comparison: &Comparison) -> Vec<(&Row, &StatePlan)> {
    let mut plans: Vec<(&Row, &StatePlan)> = Vec::new();
    for row in &comparison.rows {
        let Some(plan) = &row.settings else { continue };
        if !plans.iter().any(|(_, other)| *other == plan) {
            plans.push((row, plan));
        }
    }
    plans
}

/// Window, entries and decay of the heads that are not exact.
pub fn merged(plan: &StatePlan) -> impl Iterator<Item = (usize, usize, f64)> {
    plan.heads().iter().filter_map(|head| match head.setting {
        HeadSetting::Merged { window, entries, decay } => Some((window, entries, decay)),
        _ => None,
    })
}

/// The picture, as inline SVG; `None` where there are no heads, or too many.
pub fn picture(plan: &StatePlan) -> Option<String> {
    let (layers, kv_heads) = (plan.sizes().layers, plan.sizes().kv_heads);
    if layers == 0 || kv_heads == 0 || layers.checked_mul(kv_heads)? > MOST_CELLS {
        return None;
    }
    let most = merged(plan).map(|(_, entries, _)| entries).max().unwrap_or(1);
    let windows: BTreeSet<usize> = merged(plan).map(|(window, ..)| window).collect();
    let shade = |window: usize| {
        let place = windows.iter().position(|other| *other == window).unwrap_or(0);
        colour((place + 1) as f64 / windows.len().max(1) as f64 * 0.9)
    };
    let step = (ACROSS / layers).clamp(4, TALL);
    let radius = |entries: usize| {
        let share = (entries as f64 / most as f64).sqrt();
        (share * (step.min(TALL) as f64 / 2.0 - 1.0)).max(0.8)
    };
    let (width, bottom) = ((LEFT + layers * step + 16).max(LEFT + 560), 8 + kv_heads * TALL);
    let mut svg = format!(
        "<svg viewBox=\"0 0 {width} {}\" role=\"img\" aria-label=\"Settings of heads\" \
         style=\"max-width: {width}px\" font-size=\"14\">\n",
        bottom + 92
    );
    for kv_head in 0..kv_heads {
        let middle = 8 + kv_head * TALL + TALL / 2;
        svg.push_str(&text(LEFT - 10, middle + 5, "end", &kv_head.to_string()));
    }
    for head in plan.heads() {
        let (x, y) = (LEFT + head.layer * step + step / 2, 8 + head.kv_head * TALL + TALL / 2);
        let place = format!("layer {}, kv head {}", head.layer, head.kv_head);
        svg.push_str(&match head.setting {
            HeadSetting::Merged { window, entries, decay } => disc(
                (x, y),
                radius(entries),
                &shade(window),
                &format!("{place}: window {window}, {entries} entries, decay {decay}"),
            ),
            _ => square((x, y), step.min(TALL), &format!("{place}: exact")),
        });
    }
    let every = layers.div_ceil(12).max(1);
    for layer in (0..layers).step_by(every) {
        let x = LEFT + layer * step + step / 2;
        svg.push_str(&text(x, bottom + 16, "middle", &layer.to_string()));
    }
    svg.push_str(&text(LEFT + layers * step / 2, bottom + 36, "middle", "layer"));
    let middle = 8 + kv_heads * TALL / 2;
    svg.push_str(&format!(
        "<text x=\"16\" y=\"{middle}\" text-anchor=\"middle\" fill=\"#010203\" \
         transform=\"rotate(-90 16 {middle})\">kv head</text>\n"
    ));
    let (mut x, y) = (LEFT + 8, bottom + 66);
    for window in &windows {
        let label = format!("window {window}");
        svg.push_str(&disc((x, y), 6.0, &shade(*window), &label));
        svg.push_str(&text(x + 12, y + 5, "start", &label));
        x += 100;
    }
    let label = format!("{most} entries");
    svg.push_str(&disc((x + 8, y), radius(most), "none", &label));
    svg.push_str(&text(x + 28, y + 5, "start", &label));
    if merged(plan).count() < plan.heads().len() {
        svg.push_str(&square((x + 148, y), step.min(20), "exact"));
        svg.push_str(&text(x + 164, y + 5, "start", "exact"));
    }
    svg.push_str("</svg>");
    Some(svg)
}

fn disc((x, y): (usize, usize), radius: f64, fill: &str, title: &str) -> String {
    format!(
        "<circle cx=\"{x}\" cy=\"{y}\" r=\"{radius:.1}\" fill=\"{fill}\" stroke=\"#010203\" \
         stroke-width=\"0.6\"><title>{title}</title></circle>\n"
    )
}

fn square((x, y): (usize, usize), step: usize, title: &str) -> String {
    let side = step.saturating_sub(6).max(2);
    format!(
        "<rect x=\"{}\" y=\"{}\" width=\"{side}\" height=\"{side}\" fill=\"#010203\" \
         stroke=\"#010203\"><title>{title}</title></rect>\n",
        x.saturating_sub(side / 2),
        y.saturating_sub(side / 2)
    )
}
