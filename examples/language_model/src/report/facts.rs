//! What follows from the numbers of a comparison.

use crate::compare::{Comparison, Row};
use crate::decode::Decode;
use crate::kernels::Kernel;
use crate::recall::Score;

/// Perplexities beyond this multiple of the reference's are off the scale.
pub const OFF_SCALE: f64 = 1.5;

/// What the others are compared to.
pub fn reference(comparison: &Comparison) -> Option<&Row> {
    comparison.rows.first()
}

/// All rows but the first.
pub fn others(comparison: &Comparison) -> impl Iterator<Item = &Row> {
    comparison.rows.iter().skip(1)
}

/// The relative change of the perplexity in the second half; not finite where a loss is not.
pub fn change(comparison: &Comparison, row: &Row) -> f64 {
    reference(comparison).map_or(f64::NAN, |first| (row.halves[1] - first.halves[1]).exp_m1())
}

/// Whether the perplexity is near enough to the reference to be drawn beside it.
pub fn on_scale(comparison: &Comparison, row: &Row) -> bool {
    let first = reference(comparison).map_or(f64::NAN, |first| first.halves[1]);
    row.halves[1].is_finite() && (!first.is_finite() || row.halves[1] - first <= OFF_SCALE.ln())
}

/// Tokens and bytes of the state, at every length that is known, in rising order.
pub fn states(comparison: &Comparison, row: &Row) -> Vec<(usize, usize)> {
    let mut states = row.state.clone();
    states.push((comparison.context, row.state_bytes));
    states.extend(row.decode.iter().map(|step| (step.tokens, step.bytes)));
    states.sort_by_key(|(tokens, _)| *tokens);
    states.dedup_by_key(|(tokens, _)| *tokens);
    states
}

/// Whether the state has stopped to grow at the longest contexts.
pub fn is_constant(comparison: &Comparison, row: &Row) -> bool {
    let states = states(comparison, row);
    exact_heads(row).is_none()
        && matches!(states[..], [.., (_, before), (_, last)] if before == last)
}

/// Bytes of the state after so many tokens.
pub fn state_at(comparison: &Comparison, row: &Row, tokens: usize) -> Option<usize> {
    states(comparison, row).into_iter().find(|(n, _)| *n == tokens).map(|(_, bytes)| bytes)
}

/// The state at the end of the context as a share of the reference's.
pub fn state_share(comparison: &Comparison, row: &Row) -> f64 {
    reference(comparison)
        .map_or(f64::NAN, |first| row.state_bytes as f64 / first.state_bytes as f64)
}

/// Contexts at which decode steps were timed, in rising order.
pub fn lengths(comparison: &Comparison) -> Vec<usize> {
    let mut lengths: Vec<usize> =
        comparison.rows.iter().flat_map(|row| row.decode.iter().map(|d| d.tokens)).collect();
    lengths.sort_unstable();
    lengths.dedup();
    lengths
}

/// The decode steps at a length.
pub fn decode_at(row: &Row, tokens: usize) -> Option<&Decode> {
    row.decode.iter().find(|step| step.tokens == tokens)
}

/// Pairs and distances of all lists, in the order in which they were asked for.
pub fn lists(comparison: &Comparison) -> Vec<(usize, usize)> {
    let mut lists = Vec::new();
    for recall in comparison.rows.iter().flat_map(|row| &row.recall) {
        if !lists.contains(&(recall.pairs, recall.distance)) {
            lists.push((recall.pairs, recall.distance));
        }
    }
    lists
}

/// The score of a row on a list.
pub fn score(row: &Row, (pairs, distance): (usize, usize)) -> Option<Score> {
    row.recall
        .iter()
        .find(|recall| (recall.pairs, recall.distance) == (pairs, distance))
        .map(|recall| recall.score)
}

/// The sum over the lists that are at least so far apart.
pub fn recalled(row: &Row, least_distance: usize) -> Score {
    let mut sum = Score::default();
    for recall in row.recall.iter().filter(|recall| recall.distance >= least_distance) {
        sum += recall.score;
    }
    sum
}

/// Exact heads that were chosen.
pub fn exact_heads(row: &Row) -> Option<usize> {
    let planned = row.settings.as_ref().map(|plan| plan.exact_heads().len());
    row.plan.as_ref().map(|plan| plan.exact.len()).or(planned.filter(|count| *count > 0))
}

/// Whether it is a window and nothing else.
pub fn is_window(row: &Row) -> bool {
    exact_heads(row).is_none() && row.kernel.starts_with("window:")
}

/// Whether it is linear attention, with no window and no exact heads beside it.
pub fn is_map_alone(row: &Row) -> bool {
    exact_heads(row).is_none()
        && row.kernel.parse::<Kernel>().is_ok_and(|kernel| kernel.is_map_alone())
}

/// The row of constant memory with the lowest perplexity.
pub fn best_constant(comparison: &Comparison) -> Option<&Row> {
    lowest(others(comparison).filter(|row| is_constant(comparison, row)))
}

/// The row with exact heads with the lowest perplexity.
pub fn best_exact(comparison: &Comparison) -> Option<&Row> {
    lowest(others(comparison).filter(|row| exact_heads(row).is_some()))
}

fn lowest<'a>(rows: impl Iterator<Item = &'a Row>) -> Option<&'a Row> {
    rows.filter(|row| row.halves[1].is_finite()).min_by(|a, b| a.halves[1].total_cmp(&b.halves[1]))
}
