//! The plots of a comparison.

use super::axis::Axis;
use super::facts::{
    exact_heads, is_constant, lengths, lists, on_scale, recalled, reference, score, state_at,
    states,
};
use super::numbers::mib;
use super::plot::{Look, OF_REFERENCE, Panel, Series, look};
use crate::compare::{Comparison, Row};
use crate::decode::Decode;
use crate::kernels::without_choice;

/// Every row and its look: those on the scale have the first colours.
pub fn looks(comparison: &Comparison) -> Vec<(&Row, Look)> {
    let (mut near, mut far) =
        (0, comparison.rows.iter().skip(1).filter(|row| on_scale(comparison, row)).count());
    let of = |(i, row)| {
        let place = if on_scale(comparison, row) { &mut near } else { &mut far };
        let look = if i == 0 { OF_REFERENCE } else { look(*place) };
        *place += usize::from(i > 0);
        (row, look)
    };
    comparison.rows.iter().enumerate().map(of).collect()
}

/// Rows whose perplexity is far from the reference's.
pub fn off_scale(comparison: &Comparison) -> Vec<&Row> {
    comparison.rows.iter().skip(1).filter(|row| !on_scale(comparison, row)).collect()
}

/// Rows that recall at least one code.
pub fn recalling(comparison: &Comparison) -> Vec<(&Row, Look)> {
    let mut rows = looks(comparison);
    rows.retain(|(row, _)| recalled(row, 0).right > 0);
    rows
}

/// Perplexity in the second half against the state.
pub fn perplexity(comparison: &Comparison) -> Option<Panel> {
    let drawn: Vec<(&Row, Look)> =
        looks(comparison).into_iter().filter(|(row, _)| on_scale(comparison, row)).collect();
    let x = Axis::log(
        &format!("state at {} tokens (MiB)", comparison.context),
        drawn.iter().map(|(row, _)| mib(row.state_bytes)),
    )?;
    let y =
        Axis::linear("perplexity, second half", drawn.iter().map(|(row, _)| row.halves[1].exp()))?;
    let mut panel = Panel::new("Perplexity against the size of the state", x, y);
    let point = |row: &Row| (mib(row.state_bytes).log10(), row.halves[1].exp());
    // the same kernel with fewer and with more exact heads
    for (row, look) in drawn.iter().filter(|(row, _)| exact_heads(row).is_none()) {
        let exact = drawn.iter().filter(|(other, _)| {
            exact_heads(other).is_some() && without_choice(&other.kernel) == row.kernel
        });
        let mut points: Vec<(f64, f64)> =
            exact.map(|(other, _)| point(other)).chain([point(row)]).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        panel.series.push(Series { look: *look, points, name: None, marks: false });
    }
    panel.series.extend(drawn.iter().map(|(row, look)| Series {
        look: *look,
        points: vec![point(row)],
        name: Some(row.kernel.clone()),
        marks: true,
    }));
    panel.across.extend(reference(comparison).map(|row| row.halves[1].exp()));
    panel.size = (900, 440);
    Some(panel)
}

/// What is lost at each position.
pub fn positions(comparison: &Comparison) -> Option<Panel> {
    let first = &reference(comparison)?.by_position;
    let of = |row: &Row| -> Vec<(f64, f64)> {
        let steps = row.by_position.iter().zip(first).enumerate();
        steps
            .map(|(i, (loss, of_first))| {
                ((i as f64 + 0.5) * comparison.bucket as f64, loss - of_first)
            })
            .collect()
    };
    let mut series = Vec::new();
    for (row, look) in
        looks(comparison).into_iter().skip(1).filter(|(row, _)| on_scale(comparison, row))
    {
        series.push(Series { look, points: of(row), name: None, marks: true });
    }
    let values = series.iter().flat_map(|series| &series.points);
    let y = Axis::linear("nats above the reference", values.map(|(_, y)| *y).chain([0.0]))?;
    let last = first.len() as f64 * comparison.bucket as f64;
    if series.is_empty() || last <= 0.0 {
        return None;
    }
    let mut panel =
        Panel::new("Loss by position", Axis::between("position (tokens)", 0.0, last), y);
    panel.series = series;
    panel.across.push(0.0);
    panel.size = (900, 400);
    Some(panel)
}

/// Codes recalled against pairs of a list, at the least distance there is.
pub fn load(comparison: &Comparison) -> Option<(Panel, usize)> {
    let lists = lists(comparison);
    let distance = lists.iter().map(|(_, distance)| *distance).min()?;
    let mut pairs: Vec<usize> =
        lists.iter().filter(|(_, d)| *d == distance).map(|(pairs, _)| *pairs).collect();
    pairs.sort_unstable();
    let along: Vec<(usize, usize)> = pairs.iter().map(|pairs| (*pairs, distance)).collect();
    Some((
        recall(comparison, "Recall against load", Axis::places("load (pairs)", &pairs), &along),
        distance,
    ))
}

/// Codes recalled against distance, with the load that has most distances.
pub fn distance(comparison: &Comparison) -> Option<(Panel, usize)> {
    let lists = lists(comparison);
    let of = |pairs: usize| {
        lists.iter().filter(|(other, _)| *other == pairs).map(|(_, d)| *d).collect::<Vec<_>>()
    };
    let pairs = lists.iter().map(|(pairs, _)| *pairs).max_by_key(|pairs| of(*pairs).len())?;
    let mut distances = of(pairs);
    distances.sort_unstable();
    let along: Vec<(usize, usize)> = distances.iter().map(|distance| (pairs, *distance)).collect();
    let x = Axis::places("prose between the lists (tokens)", &distances);
    (along.len() > 1).then(|| (recall(comparison, "Recall against distance", x, &along), pairs))
}

fn recall(comparison: &Comparison, title: &str, x: Axis, along: &[(usize, usize)]) -> Panel {
    let mut y = Axis::between("codes recalled (%)", 0.0, 100.0);
    (y.low, y.high) = (-4.0, 104.0);
    let mut panel = Panel::new(title, x, y);
    for (row, look) in recalling(comparison) {
        let scores =
            along.iter().enumerate().filter_map(|(i, list)| Some((i as f64, score(row, *list)?)));
        let points = scores
            .filter(|(_, score)| score.asked > 0)
            .map(|(x, score)| (x, 100.0 * score.share()))
            .collect();
        panel.series.push(Series { look, points, name: None, marks: true });
    }
    panel.spread(0.015);
    panel
}

/// Bytes of the state against the context.
pub fn memory(comparison: &Comparison) -> Option<Panel> {
    let all: Vec<Vec<(usize, usize)>> =
        comparison.rows.iter().map(|row| states(comparison, row)).collect();
    let mut contexts: Vec<usize> = all.iter().flatten().map(|(n, _)| *n).collect();
    contexts.sort_unstable();
    contexts.dedup();
    let bytes = all.iter().flatten().map(|(_, bytes)| mib(*bytes));
    let (x, y) = (Axis::contexts("context (tokens)", &contexts)?, Axis::log("state (MiB)", bytes)?);
    let mut panel = Panel::new("Memory against context", x, y);
    for (states, (_, look)) in all.into_iter().zip(looks(comparison)) {
        let points =
            states.iter().map(|(n, bytes)| ((*n as f64).log10(), mib(*bytes).log10())).collect();
        panel.series.push(Series { look, points, name: None, marks: true });
    }
    Some(panel)
}

/// Milliseconds of attention in a decode step against the context; both axes logarithmic.
pub fn attention_time(comparison: &Comparison) -> Option<Panel> {
    let of = |step: &Decode| step.attention / 1e3;
    let values = comparison.rows.iter().flat_map(|row| &row.decode).map(of);
    let y = Axis::log("attention (ms a token)", values)?;
    time(comparison, "Time in attention", y, |step| of(step).log10())
}

/// Milliseconds of a decode step against the context.
pub fn total_time(comparison: &Comparison) -> Option<Panel> {
    let of = |step: &Decode| step.total / 1e3;
    let values = comparison.rows.iter().flat_map(|row| &row.decode).map(of);
    let y = Axis::linear("decode step (ms a token)", values.chain([0.0]))?;
    time(comparison, "Time of a whole step", y, of)
}

fn time(
    comparison: &Comparison,
    title: &str,
    y: Axis,
    of: impl Fn(&Decode) -> f64,
) -> Option<Panel> {
    let mut panel = Panel::new(title, Axis::contexts("context (tokens)", &lengths(comparison))?, y);
    for (row, look) in looks(comparison) {
        let points =
            row.decode.iter().map(|step| ((step.tokens as f64).log10(), of(step))).collect();
        panel.series.push(Series { look, points, name: None, marks: true });
    }
    Some(panel)
}

/// Rows of constant memory whose states are of nearly one size at the longest context, where lines
/// hide each other.
pub fn alike(comparison: &Comparison) -> Option<(Vec<&Row>, usize, usize)> {
    let longest = lengths(comparison).last().copied().unwrap_or(comparison.context);
    let mut sizes: Vec<(usize, &Row)> = comparison
        .rows
        .iter()
        .filter(|row| is_constant(comparison, row))
        .filter_map(|row| Some((state_at(comparison, row, longest)?, row)))
        .collect();
    sizes.sort_by_key(|(bytes, _)| *bytes);
    let group = |i: usize| -> Vec<(usize, &Row)> {
        let near = |(bytes, _): &&(usize, &Row)| *bytes as f64 <= 1.05 * sizes[i].0 as f64;
        sizes[i..].iter().take_while(near).copied().collect()
    };
    let largest = (0..sizes.len()).map(group).max_by_key(Vec::len)?;
    match largest[..] {
        [(least, _), .., (most, _)] => {
            Some((largest.iter().map(|(_, row)| *row).collect(), least, most))
        }
        _ => None,
    }
}
