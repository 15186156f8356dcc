//! What was found, in sentences that follow from the numbers.

use super::facts::{
    best_constant, change, decode_at, exact_heads, is_constant, is_map_alone, is_window, lengths,
    on_scale, others, recalled, reference, state_at, state_share,
};
use super::numbers::{self, count, extremes, list, mib, perplexity, plain, range, share};
use crate::compare::{Comparison, Row};
use crate::kernels::without_choice;

mod cautions;

pub use cautions::cautions;

/// What was found, then what was not shown; sentences that there is no data for are left out.
#[must_use]
pub fn findings(comparison: &Comparison) -> Vec<String> {
    let mut sentences = found(comparison);
    sentences
        .extend(cautions(comparison).into_iter().map(|caution| format!("Not shown: {caution}")));
    sentences
}

/// The first part of [`findings`].
pub fn found(comparison: &Comparison) -> Vec<String> {
    let Some(first) = reference(comparison) else {
        return vec!["Nothing was measured.".to_owned()];
    };
    if comparison.rows.len() == 1 {
        return vec![format!(
            "Only {} was measured: perplexity {} in the second half of {} tokens. There is \
             nothing to compare it to.",
            first.kernel,
            perplexity(first.halves[1]),
            count(comparison.context)
        )];
    }
    let mut sentences: Vec<String> = best(comparison, first).into_iter().collect();
    sentences.extend(against_windows(comparison));
    sentences.extend(exact(comparison, first));
    let rest = [
        maps(comparison),
        recall(comparison, first),
        memory(comparison, first),
        decode(comparison, first),
    ];
    sentences.extend(rest.into_iter().flatten());
    sentences.extend(reading(comparison, first));
    sentences
}

fn best(comparison: &Comparison, first: &Row) -> Option<String> {
    let best = best_constant(comparison)?;
    let of = others(comparison).filter(|row| is_constant(comparison, row)).count();
    let among = if of == 1 {
        "The one kernel of constant memory,".to_owned()
    } else {
        format!("Of {of} kernels of constant memory")
    };
    let verb = if of == 1 { "has" } else { "has the lowest" };
    Some(format!(
        "{among} {} {verb} perplexity: {} in the second half of {} tokens, where {} has {} ({}), \
         from a state of {} MiB, {} of the size.",
        best.kernel,
        perplexity(best.halves[1]),
        count(comparison.context),
        first.kernel,
        perplexity(first.halves[1]),
        numbers::change(change(comparison, best)),
        plain(mib(best.state_bytes)),
        share(state_share(comparison, best)),
    ))
}

/// What a memory behind the window brings over a window alone of the same size.
fn against_windows(comparison: &Comparison) -> Vec<String> {
    let windows = others(comparison).filter(|row| is_window(row) && row.halves[1].is_finite());
    let sentence = |window: &Row| {
        let near = |row: &&Row| {
            let ratio = row.state_bytes as f64 / window.state_bytes.max(1) as f64;
            is_constant(comparison, row)
                && on_scale(comparison, row)
                && !is_window(row)
                && (0.85..1.15).contains(&ratio)
        };
        let (better, worse): (Vec<&Row>, Vec<&Row>) =
            others(comparison).filter(near).partition(|row| row.halves[1] < window.halves[1]);
        let changes = |rows: &[&Row]| -> Vec<String> {
            rows.iter().map(|row| with_change(comparison, row)).collect()
        };
        let mut parts = Vec::new();
        if !better.is_empty() {
            parts.push(format!("lower in {}", list(&changes(&better))));
        }
        if !worse.is_empty() {
            parts.push(format!("no lower in {}", list(&changes(&worse))));
        }
        (!parts.is_empty()).then(|| {
            format!(
                "The window that costs as much, {}, is what a memory behind a window has to beat: \
                 the perplexity is {}.",
                with_change(comparison, window),
                parts.join(", ")
            )
        })
    };
    windows.filter_map(sentence).collect()
}

fn exact(comparison: &Comparison, first: &Row) -> Vec<String> {
    let of = comparison.layers.saturating_mul(comparison.kv_heads);
    let sentence = |row: &Row| {
        let heads = exact_heads(row)?;
        let name = without_choice(&row.kernel);
        let base =
            comparison.rows.iter().find(|base| exact_heads(base).is_none() && base.kernel == name);
        let (from, recall) = match base {
            Some(base) => (
                format!(" from {}", numbers::change(change(comparison, base))),
                format!("from {} to", right(base)),
            ),
            None => (String::new(), "to".to_owned()),
        };
        let asked = recalled(row, 0).asked;
        let recall = if asked == 0 {
            String::new()
        } else {
            format!(
                ", and the codes recalled {recall} {} of {} ({}: {})",
                right(row),
                count(asked),
                first.kernel,
                right(first)
            )
        };
        Some(format!(
            "{heads} exact of {of} kv heads take the change of the perplexity of {name}{from} to \
             {}{recall}; the state is {} MiB, {} of the size, and grows with the context.",
            numbers::change(change(comparison, row)),
            plain(mib(row.state_bytes)),
            share(state_share(comparison, row)),
        ))
    };
    others(comparison).filter_map(sentence).collect()
}

fn maps(comparison: &Comparison) -> Option<String> {
    let all: Vec<&Row> = others(comparison).filter(|row| is_map_alone(row)).collect();
    let lost: Vec<&Row> = all.iter().copied().filter(|row| !on_scale(comparison, row)).collect();
    let (least, most) = extremes(lost.iter().map(|row| row.halves[1].exp()))?;
    let every =
        if lost.len() == all.len() { "Feature maps alone" } else { "These feature maps alone" };
    Some(format!(
        "{every} cannot stand in for softmax in a model that was not trained with them: \
         perplexities of {} ({}).",
        range(least, most),
        list(&names(&lost))
    ))
}

fn recall(comparison: &Comparison, first: &Row) -> Option<String> {
    let whole = recalled(first, 0);
    if whole.right == 0 {
        return (whole.asked > 0)
            .then(|| format!("{} itself recalls none of {} codes.", first.kernel, whole.asked));
    }
    let kept = |row: &&Row| recalled(row, 0).right as f64 / whole.right as f64;
    let rows: Vec<&Row> = others(comparison).filter(|row| recalled(row, 0).asked > 0).collect();
    let within = |from: f64, to: f64| -> Vec<String> {
        let rows = rows.iter().filter(|row| (from..to).contains(&kept(row)));
        rows.map(|row| {
            if right(row) == "0" {
                row.kernel.clone()
            } else {
                format!("{} ({})", row.kernel, right(row))
            }
        })
        .collect()
    };
    let zero = f64::MIN_POSITIVE;
    let groups = [
        ("at least nine tenths of that", within(0.9, f64::INFINITY)),
        ("more than half", within(0.5, 0.9)),
        ("less than half", within(zero, 0.5)),
        ("none", within(0.0, zero)),
    ];
    let groups: Vec<String> = groups
        .iter()
        .filter(|(_, rows)| !rows.is_empty())
        .map(|(what, rows)| format!("{what}: {}", list(rows)))
        .collect();
    let far: Vec<String> = {
        let lost = |row: &&&Row| recalled(row, 1).right == 0 && recalled(row, 0).right > 0;
        rows.iter().filter(lost).map(|row| row.kernel.clone()).collect()
    };
    let far = match recalled(first, 1) {
        across if across.right > 0 && !far.is_empty() => format!(
            " Across prose, {} recalls {} of {}; {} recall{} none.",
            first.kernel,
            across.right,
            across.asked,
            list(&far),
            if far.len() == 1 { "s" } else { "" }
        ),
        _ => String::new(),
    };
    Some(format!(
        "{} recalls {} of {} codes. By what they recall, {}.{far}",
        first.kernel,
        whole.right,
        whole.asked,
        groups.join("; ")
    ))
}

fn memory(comparison: &Comparison, first: &Row) -> Option<String> {
    let longest = lengths(comparison).last().copied().unwrap_or(comparison.context);
    let whole = state_at(comparison, first, longest)?;
    let times = |bytes: usize| whole as f64 / bytes.max(1) as f64;
    let useful = || others(comparison).filter(|row| on_scale(comparison, row));
    let sizes: Vec<usize> = useful()
        .filter(|row| is_constant(comparison, row))
        .filter_map(|row| state_at(comparison, row, longest))
        .collect();
    let mut parts = Vec::new();
    if let Some((least, most)) = extremes(sizes.iter().map(|bytes| *bytes as f64)) {
        let (least, most) = (least as usize, most as usize);
        let sizes = range(mib(least), mib(most));
        parts.push(format!(
            "kernels of constant memory {sizes} MiB, {} times less",
            range(times(most), times(least))
        ));
    }
    for row in useful().filter(|row| exact_heads(row).is_some()) {
        let Some(bytes) = state_at(comparison, row, longest) else { continue };
        parts.push(format!(
            "{} {} MiB, {} times less",
            row.kernel,
            plain(mib(bytes)),
            plain(times(bytes))
        ));
    }
    (!parts.is_empty()).then(|| {
        format!(
            "At {} tokens, {} keeps {} MiB; {}.",
            count(longest),
            first.kernel,
            plain(mib(whole)),
            parts.join("; ")
        )
    })
}

fn decode(comparison: &Comparison, first: &Row) -> Option<String> {
    let longest = *lengths(comparison).last()?;
    let whole = decode_at(first, longest)?;
    let useful = || others(comparison).filter(|row| on_scale(comparison, row));
    let describe = |what: &str, rows: &[&Row]| {
        let steps: Vec<_> = rows.iter().filter_map(|row| decode_at(row, longest)).collect();
        let (least, most) = extremes(steps.iter().map(|step| step.total / 1e3))?;
        let faster = extremes(steps.iter().map(|step| whole.total / step.total))?;
        let attention = extremes(steps.iter().map(|step| whole.attention / step.attention))?;
        Some(format!(
            "{what} {} ms, {} as fast (attention alone {})",
            range(least, most),
            multiple(faster),
            multiple(attention)
        ))
    };
    let constant: Vec<&Row> = useful().filter(|row| is_constant(comparison, row)).collect();
    let mut parts: Vec<String> =
        describe("kernels of constant memory", &constant).into_iter().collect();
    parts.extend(
        useful()
            .filter(|row| exact_heads(row).is_some())
            .filter_map(|row| describe(&row.kernel, &[row])),
    );
    if parts.is_empty() {
        return None;
    }
    let shortest = *lengths(comparison).first()?;
    let at_shortest = decode_at(first, shortest).filter(|_| shortest < longest).and_then(|whole| {
        let steps = useful().filter_map(|row| decode_at(row, shortest));
        Some(format!(
            " At {} tokens they are {} as fast.",
            count(shortest),
            multiple(extremes(steps.map(|step| whole.total / step.total))?)
        ))
    });
    Some(format!(
        "At {} tokens a decode step takes {} ms with {}, {} of them in attention; {}.{}",
        count(longest),
        plain(whole.total / 1e3),
        first.kernel,
        plain(whole.attention / 1e3),
        parts.join("; "),
        at_shortest.unwrap_or_default()
    ))
}

fn reading(comparison: &Comparison, first: &Row) -> Option<String> {
    let rows = others(comparison).filter(|row| on_scale(comparison, row));
    let (least, most) = extremes(rows.map(|row| row.tokens_per_second / first.tokens_per_second))?;
    Some(format!(
        "Reading {} tokens at once is {} as fast as with {} ({} tokens a second).",
        count(comparison.context),
        multiple((least, most)),
        first.kernel,
        plain(first.tokens_per_second)
    ))
}

fn multiple((least, most): (f64, f64)) -> String {
    format!("{} times", range(least, most))
}

fn names(rows: &[&Row]) -> Vec<String> {
    rows.iter().map(|row| row.kernel.clone()).collect()
}

fn with_change(comparison: &Comparison, row: &Row) -> String {
    format!("{} ({})", row.kernel, numbers::change(change(comparison, row)))
}

fn right(row: &Row) -> String {
    count(recalled(row, 0).right)
}
