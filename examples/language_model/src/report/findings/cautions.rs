//! What a comparison does not show.

use super::super::facts::{exact_heads, lists, score};
use super::super::numbers::{count, extremes, list, range};
use crate::compare::Comparison;
use crate::decode::STEPS;

/// What the reader should not conclude.
pub fn cautions(comparison: &Comparison) -> Vec<String> {
    let mut cautions = vec![format!(
        "other models and other text. This is one small model ({}, {} layers of {} kv heads) on \
         English prose ({}), contexts of {} tokens.",
        comparison.model,
        comparison.layers,
        comparison.kv_heads,
        list(&comparison.texts),
        count(comparison.context)
    )];
    cautions.push(
        "what training would repair. Nothing was trained: a kernel takes the place of softmax in \
         a model made with softmax."
            .to_owned(),
    );
    cautions.extend(recall(comparison));
    cautions.extend(times(comparison));
    cautions
}

fn recall(comparison: &Comparison) -> Option<String> {
    let first = comparison.rows.first()?;
    let lists = lists(comparison);
    let prompts =
        |list: &(usize, usize)| Some(score(first, *list)?.asked as f64 / list.0.max(1) as f64);
    let (least, most) = extremes(lists.iter().filter_map(prompts))?;
    let number = if (least, most) == (1.0, 1.0) {
        "one prompt".to_owned()
    } else {
        format!(
            "{} prompts",
            if least == most { format!("{least:.0}") } else { format!("{least:.0} to {most:.0}") }
        )
    };
    let chosen = comparison.rows.iter().any(|row| exact_heads(row).is_some());
    let prose = if chosen && lists.iter().any(|(_, distance)| *distance > 0) {
        " The prose between the lists is of the calibration text, on which exact heads were chosen."
    } else {
        ""
    };
    Some(format!(
        "recall in real use. The lists of names and codes are synthetic, {number} a point: a \
         difference of a few codes may be chance.{prose}"
    ))
}

/// The work outside attention is the same for every kernel: how much it varies is how much times
/// vary.
fn times(comparison: &Comparison) -> Option<String> {
    let steps = comparison.rows.iter().flat_map(|row| &row.decode);
    let (least, most) = extremes(steps.map(|step| (step.total - step.attention) / 1e3))?;
    let threads = if comparison.threads == 1 {
        "one thread".to_owned()
    } else {
        format!("{} threads", comparison.threads)
    };
    Some(format!(
        "times elsewhere. These are medians of {STEPS} steps on {threads} of one machine, a \
         kernel after the other. All that is not attention is the same work for every kernel and \
         took {} ms: differences of that kind are noise.",
        range(least, most)
    ))
}
