//! Exact heads and the errors of all, as a picture: layers along x, kv heads along y.

use super::numbers::{plain, shortened};
use crate::compare::{Chosen, Comparison};

/// Pixels for the names of kv heads.
pub const LEFT: usize = 64;
/// Pixels for all the layers.
pub const ACROSS: usize = 820;
/// Larger models are not drawn.
pub const MOST_CELLS: usize = 20_000;

/// From no error to the largest.
const COLOURS: [[f64; 3]; 5] = [
    [255.0, 243.0, 205.0],
    [254.0, 196.0, 94.0],
    [239.0, 116.0, 55.0],
    [176.0, 38.0, 72.0],
    [74.0, 12.0, 84.0],
];

/// The plans there are, each with the kernels that have it.
pub fn plans(comparison: &Comparison) -> Vec<(Vec<&str>, &Chosen)> {
    let mut plans: Vec<(Vec<&str>, &Chosen)> = Vec::new();
    for row in &comparison.rows {
        let Some(plan) = &row.plan else { continue };
        match plans.iter_mut().find(|(_, other)| *other == plan) {
            Some((names, _)) => names.push(&row.kernel),
            None => plans.push((vec![&row.kernel], plan)),
        }
    }
    plans
}

/// Error and place of the worst head.
pub fn worst(plan: &Chosen) -> Option<(f64, usize, usize)> {
    let finite = plan.errors.ranked().iter().filter(|head| head.output_error.is_finite());
    let worst = finite.max_by(|a, b| a.output_error.total_cmp(&b.output_error))?;
    Some((worst.output_error, worst.layer, worst.kv_head))
}

/// The picture, as inline SVG; `None` where there are no heads, or too many.
pub fn picture(comparison: &Comparison, plan: &Chosen) -> Option<String> {
    let (layers, kv_heads) = (comparison.layers, comparison.kv_heads);
    if layers == 0 || kv_heads == 0 || layers.checked_mul(kv_heads)? > MOST_CELLS {
        return None;
    }
    let most = worst(plan).map_or(0.0, |(error, ..)| error);
    let step = (ACROSS / layers).clamp(4, 30);
    // room between cells for the outline
    let (gap, tall) = (if step >= 12 { 6 } else { 2 }, 30);
    let (width, bottom) = (LEFT + layers * step + 16, 8 + kv_heads * tall);
    let width = width.max(LEFT + 320);
    let mut svg = format!(
        "<svg viewBox=\"0 0 {width} {}\" role=\"img\" aria-label=\"Errors of heads\" \
         style=\"max-width: {width}px\" font-size=\"14\">\n",
        bottom + 92
    );
    let mut missing = false;
    for kv_head in 0..kv_heads {
        let top = 8 + kv_head * tall;
        svg.push_str(&text(LEFT - 10, top + 18, "end", &kv_head.to_string()));
        for layer in 0..layers {
            let found = plan
                .errors
                .ranked()
                .iter()
                .find(|head| (head.layer, head.kv_head) == (layer, kv_head));
            let error = found.map(|head| head.output_error).filter(|error| error.is_finite());
            let (x, is_exact) = (LEFT + layer * step, plan.exact.contains(&(layer, kv_head)));
            let (w, h) = (step - gap, tall - 8);
            let fill = match error {
                Some(error) => colour(if most > 0.0 { error / most } else { 0.0 }),
                None => "none".to_owned(),
            };
            missing |= error.is_none();
            let title = format!(
                "layer {layer}, kv head {kv_head}: error {}{}",
                error.map_or_else(|| "unknown".to_owned(), plain),
                if is_exact { ", exact" } else { "" }
            );
            let dots = if error.is_none() { " stroke=\"#010204\"" } else { "" };
            svg.push_str(&format!(
                "<rect x=\"{}\" y=\"{}\" width=\"{w}\" height=\"{h}\" \
                 fill=\"{fill}\"{dots}><title>{title}</title></rect>\n",
                x + gap / 2,
                top + 4
            ));
            if is_exact {
                svg.push_str(&format!(
                    "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"none\" \
                     stroke=\"#010203\" stroke-width=\"2\"/>\n",
                    x + 1,
                    top + 2,
                    step - 2,
                    tall - 4
                ));
            }
        }
    }
    let every = layers.div_ceil(12).max(1);
    for layer in (0..layers).step_by(every) {
        svg.push_str(&text(
            LEFT + layer * step + step / 2,
            bottom + 16,
            "middle",
            &layer.to_string(),
        ));
    }
    svg.push_str(&text(LEFT + layers * step / 2, bottom + 36, "middle", "layer"));
    let middle = 8 + kv_heads * tall / 2;
    svg.push_str(&format!(
        "<text x=\"16\" y=\"{middle}\" text-anchor=\"middle\" fill=\"#010203\" \
         transform=\"rotate(-90 16 {middle})\">kv head</text>\n"
    ));
    svg.push_str(&scale(most, bottom + 58, missing));
    svg.push_str("</svg>");
    Some(svg)
}

/// The scale of colours, below.
fn scale(most: f64, top: usize, missing: bool) -> String {
    let (steps, wide) = (40, 5);
    let mut svg = text(LEFT, top + 12, "start", "error 0");
    let left = LEFT + 58;
    for i in 0..steps {
        let fill = colour(i as f64 / (steps - 1) as f64);
        svg.push_str(&format!(
            "<rect x=\"{}\" y=\"{top}\" width=\"{}\" height=\"14\" fill=\"{fill}\"/>",
            left + i * wide,
            wide + usize::from(i + 1 < steps)
        ));
    }
    let right = left + steps * wide;
    let note = if missing { format!("{} (empty: unknown)", plain(most)) } else { plain(most) };
    svg.push_str(&text(right + 8, top + 12, "start", &shortened(&note, 30)));
    svg
}

/// A label.
pub fn text(x: usize, y: usize, anchor: &str, text: &str) -> String {
    format!("<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\" fill=\"#010203\">{text}</text>\n")
}

/// The colour of a share of the largest error.
pub fn colour(share: f64) -> String {
    let place = share.clamp(0.0, 1.0) * (COLOURS.len() - 1) as f64;
    let below = (place.floor() as usize).min(COLOURS.len() - 2);
    let part = place - below as f64;
    let mixed: Vec<u8> = COLOURS[below]
        .iter()
        .zip(COLOURS[below + 1])
        .map(|(a, b)| (a + part * (b - a)).round() as u8)
        .collect();
    mixed.iter().fold(String::from("#"), |text, byte| text + &format!("{byte:02X}"))
}
