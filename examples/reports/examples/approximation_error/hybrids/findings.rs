//! What was found of hybrids, in sentences that are computed from the measurements.

use super::rows::{Row, best, inputs, rows, table_rows};
use super::{Contestant, Hybrid, Memory};
use crate::args::Plan;
use crate::findings::failures_of;
use crate::measure::Results;
use crate::summary::median;
use crate::text::{count, percent, short};

/// More heads are counted, not named.
const MOST_NAMED: usize = 8;

/// A few plain sentences; those that the run has no data for are left out.
pub fn findings(results: &Results, plan: &Plan) -> Vec<String> {
    let heads: Vec<Head> =
        inputs(results).into_iter().map(|input| Head::new(results, input)).collect();
    [
        closest(&heads),
        against_windows(&heads),
        against_uniform(&heads),
        more_entries(&heads),
        options(&heads),
        too_short(results, plan, &heads),
        failures(results),
    ]
    .into_iter()
    .flatten()
    .collect()
}

struct Head<'a> {
    results: &'a Results,
    input: usize,
    rows: Vec<Row>,
    of_table: Vec<Row>,
}

impl<'a> Head<'a> {
    fn new(results: &'a Results, input: usize) -> Self {
        Self { results, input, rows: rows(results, input), of_table: table_rows(results, input) }
    }

    fn name(&self) -> &str {
        &self.results.inputs[self.input].name
    }

    fn uniform(&self) -> f64 {
        self.results.exact[self.input].report.uniform_error
    }

    fn dropped(&self) -> Option<f64> {
        self.results.hybrids.baselines[self.input]?.dropped_error
    }

    fn share_of_exact(&self, row: &Row) -> f64 {
        row.state_floats as f64 / self.results.exact[self.input].state_floats as f64
    }

    /// The error of this memory behind the window of the table.
    fn error(&self, memory: Memory) -> Option<f64> {
        self.rows.iter().find(|row| row.contestant.memory == memory).map(|row| row.error.median)
    }
}

/// What the plot of one head shows, in a sentence.
pub fn caption(results: &Results, input: usize) -> String {
    let head = Head::new(results, input);
    let Some(best) = best(&head.of_table) else {
        return String::new();
    };
    let far = results.hybrids.baselines[input].map_or(1.0, |baseline| baseline.far_share);
    let far = if far < 1.0 {
        format!("{} of attention is far", percent(far))
    } else {
        "Every key is far".to_owned()
    };
    let against = match (best.equal_window, best.gain()) {
        (Some(window), Some(gain)) if gain > 1.0 => {
            format!(
                "{} times closer than the window of equal size ({})",
                short(gain),
                short(window.error)
            )
        }
        (Some(window), _) => {
            format!("no closer than the window of equal size ({})", short(window.error))
        }
        (None, _) => format!("uniform attention has {}", short(head.uniform())),
    };
    format!(
        "{far}; the closest hybrid of the table is {} with error {} from {} floats, {} of the \
         exact cache; {against}.",
        best.contestant.label(),
        short(best.error.median),
        count(best.state_floats as f64),
        percent(head.share_of_exact(best)),
    )
}

fn closest(heads: &[Head<'_>]) -> Option<String> {
    let best: Vec<(&Head<'_>, &Row)> =
        heads.iter().filter_map(|head| Some((head, best(&head.of_table)?))).collect();
    let hybrids = || heads.iter().flat_map(|head| head.of_table.iter().map(move |row| (head, row)));
    let floats = hybrids().map(|(_, row)| row.state_floats).max()?;
    let share = hybrids().map(|(head, row)| head.share_of_exact(row)).reduce(f64::max)?;
    let start = format!(
        "Among the hybrids of the table, of at most {} floats and {} of the exact cache, the \
         closest to softmax",
        count(floats as f64),
        percent(share)
    );
    if best.is_empty() {
        return None;
    }
    if best.len() <= MOST_NAMED {
        let each: Vec<String> = best.iter().map(|(head, row)| one(head, row)).collect();
        return Some(format!("{start}: {}.", each.join("; ")));
    }
    let mut counts: Vec<(String, usize)> = Vec::new();
    for (_, row) in &best {
        let label = row.contestant.label();
        match counts.iter_mut().find(|(other, _)| *other == label) {
            Some((_, count)) => *count += 1,
            None => counts.push((label, 1)),
        }
    }
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let counts: Vec<String> =
        counts.iter().map(|(label, count)| format!("{label} on {count}")).collect();
    let gains = median(best.iter().filter_map(|(_, row)| row.gain()));
    let gains = gains.map_or_else(String::new, |gain| {
        format!("; in the median {} times closer than the window of equal size", short(gain))
    });
    Some(format!("{start}, by number of heads: {}{gains}.", counts.join(", ")))
}

fn one(head: &Head<'_>, row: &Row) -> String {
    let beside = match (row.equal_window, row.gain(), head.dropped()) {
        (Some(window), Some(gain), Some(dropped)) => format!(
            "window of equal size {}, {} times the error; far part dropped {}",
            short(window.error),
            short(gain),
            short(dropped)
        ),
        _ => format!("uniform attention {}", short(head.uniform())),
    };
    format!(
        "on {} {} with {} ({beside})",
        head.name(),
        row.contestant.label(),
        short(row.error.median)
    )
}

/// What does not beat the window that costs as much.
fn against_windows(heads: &[Head<'_>]) -> Option<String> {
    let (lost, won) = tally(heads, |_, row| row.gain().map(|gain| gain > 1.0))?;
    Some(match (lost.is_empty(), won.is_empty()) {
        (true, _) => {
            format!("Closer to softmax than the window of equal size, on every causal head: {won}.")
        }
        (_, true) => format!("Not closer to softmax than the window of equal size: {lost}."),
        _ => {
            format!(
                "Not closer to softmax than the window of equal size: {lost}. Closer on every \
                 causal head: {won}."
            )
        }
    })
}

/// What approximates nothing, windows included.
fn against_uniform(heads: &[Head<'_>]) -> Option<String> {
    let (lost, _) = tally(heads, |head, row| Some(row.error.median < head.uniform()))?;
    (!lost.is_empty()).then(|| format!("Not closer to softmax than uniform attention: {lost}."))
}

/// The kernels of the table that failed somewhere, with the heads, and those that never did; `None`
/// if `passes` says of none whether it did.
fn tally(
    heads: &[Head<'_>],
    passes: impl Fn(&Head<'_>, &Row) -> Option<bool>,
) -> Option<(String, String)> {
    let mut kernels: Vec<(String, Vec<&str>, usize)> = Vec::new();
    for head in heads {
        for row in &head.of_table {
            let Some(passed) = passes(head, row) else { continue };
            let label = row.contestant.label();
            let place =
                kernels.iter().position(|(other, ..)| *other == label).unwrap_or_else(|| {
                    kernels.push((label, Vec::new(), 0));
                    kernels.len() - 1
                });
            kernels[place].2 += 1;
            if !passed {
                kernels[place].1.push(head.name());
            }
        }
    }
    if kernels.is_empty() {
        return None;
    }
    let (lost, won): (Vec<_>, Vec<_>) =
        kernels.into_iter().partition(|(_, heads, _)| !heads.is_empty());
    let lost: Vec<String> = lost
        .into_iter()
        .map(|(label, heads, of)| match heads.len() {
            n if n == of && of > 1 => format!("{label} (on all {of} heads)"),
            n if n <= MOST_NAMED => format!("{label} (on {})", heads.join(", ")),
            n => format!("{label} (on {n} of {of} heads)"),
        })
        .collect();
    let won: Vec<String> = won.into_iter().map(|(label, ..)| label).collect();
    Some((lost.join("; "), won.join("; ")))
}

/// How the error of the merging memory falls with its entries, beside that of windows of equal
/// size.
fn more_entries(heads: &[Head<'_>]) -> Option<String> {
    let curve = |contestant: &Contestant| match contestant.memory {
        Memory::Merged { entries, block: 1, ward: false } => Some(entries),
        _ => None,
    };
    let mut entries: Vec<usize> = heads
        .iter()
        .flat_map(|head| head.rows.iter().filter_map(|row| curve(&row.contestant)))
        .collect();
    entries.sort_unstable();
    entries.dedup();
    // only sizes that every causal head has
    let causal = heads.iter().filter(|head| head.dropped().is_some()).count();
    let mut points = Vec::new();
    for size in entries {
        let rows: Vec<&Row> = heads
            .iter()
            .filter_map(|head| head.rows.iter().find(|row| curve(&row.contestant) == Some(size)))
            .collect();
        if rows.len() == causal {
            let window =
                median(rows.iter().filter_map(|row| row.equal_window.map(|window| window.error)))?;
            points.push((size, median(rows.iter().map(|row| row.error.median))?, window));
        }
    }
    let [_, _, ..] = points[..] else { return None };
    let each: Vec<String> = points
        .iter()
        .map(|(size, error, window)| format!("{} with {size} ({})", short(*error), short(*window)))
        .collect();
    let over =
        if causal == 1 { String::new() } else { format!(" median over {causal} causal heads,") };
    Some(format!(
        "The error of the merging memory by number of entries,{over} in brackets that of the \
         window of equal size: {}.",
        each.join(", ")
    ))
}

/// What single choices change.
fn options(heads: &[Head<'_>]) -> Option<String> {
    let mut changes: Vec<String> = Vec::new();
    let mut change = |what: &str, mut ratios: Vec<f64>| {
        ratios.retain(|ratio| ratio.is_finite());
        let of = ratios.len();
        if let Some(ratio) = median(ratios) {
            let percent = 100.0 * (ratio - 1.0);
            let digits = usize::from(percent.abs() < 1.0);
            let change = format!("{percent:+.digits$} %").replace('-', "−");
            changes.push(format!("{what} {change} ({of} head{})", if of == 1 { "" } else { "s" }));
        }
    };
    let rows_of = |hybrid: Hybrid| {
        heads.iter().flat_map(move |head| {
            head.of_table
                .iter()
                .filter(move |row| row.contestant.hybrid() == hybrid)
                .map(move |row| (head, row))
        })
    };
    let from = |pick: &dyn Fn(Memory) -> Option<Memory>, hybrid| -> Vec<f64> {
        rows_of(hybrid)
            .filter_map(|(head, row)| {
                Some(row.error.median / head.error(pick(row.contestant.memory)?)?)
            })
            .collect()
    };
    let features = rows_of(Hybrid::Features)
        .filter_map(|(head, row)| Some(row.error.median / head.dropped()?));
    change("features behind the window instead of nothing", features.collect());
    let uncalibrated = |memory| match memory {
        Memory::Ward { entries, calibrated: true } => {
            Some(Memory::Ward { entries, calibrated: false })
        }
        _ => None,
    };
    change("calibrating Ward's rule", from(&uncalibrated, Hybrid::Ward));
    let light = |memory| match memory {
        Memory::Taylor { rank, heavy } if heavy > 0 => Some(Memory::Taylor { rank, heavy: 0 }),
        _ => None,
    };
    change("heavy keys before the Taylor map", from(&light, Hybrid::Heavy));
    let one_by_one = |memory| match memory {
        Memory::Merged { entries, block, ward } if block > 1 => {
            Some(Memory::Merged { entries, block: 1, ward })
        }
        _ => None,
    };
    change("merging in blocks", from(&one_by_one, Hybrid::Merged));
    let by_product = |memory| match memory {
        Memory::Merged { entries, block, ward: true } => {
            Some(Memory::Merged { entries, block, ward: false })
        }
        _ => None,
    };
    change("merging by Ward's cost", from(&by_product, Hybrid::Merged));
    (!changes.is_empty())
        .then(|| format!("The median change of the output error by: {}.", changes.join("; ")))
}

fn too_short(results: &Results, plan: &Plan, heads: &[Head<'_>]) -> Option<String> {
    let real = results.inputs.iter().filter(|input| input.is_real()).count();
    let without = real - heads.len();
    if plan.hybrids.is_empty() || without == 0 {
        return None;
    }
    Some(format!(
        "No hybrid was measured on {without} of {real} heads: none of those chosen is smaller \
         there than the keys and values themselves, or has a meaning."
    ))
}

fn failures(results: &Results) -> Option<String> {
    let measurements = results.hybrids.measurements.iter();
    let measurements =
        measurements.map(|m| (m.contestant.label(), m.input, m.outcome.as_ref().err()));
    failures_of("measurements of hybrids", results, measurements)
}
