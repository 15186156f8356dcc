//! What the page leads with: one chart of every kind of kernel, and what to take away from it.

use crate::args::Plan;
use crate::findings::useful_norms;
use crate::hybrids::rows::{Row as HybridRow, table_rows};
use crate::hybrids::{Hybrid, Memory};
use crate::kernels::Family;
use crate::measure::Results;
use crate::plots::tick;
use crate::summary::{Group, Row, best_rows, median, rows};
use crate::text::{percent, short};
use dijiang::Mask;
use reports::axes::log_ticks;
use reports::page::{Axis, DotRow, Dots};

/// Errors beyond are drawn at the edge.
const MOST_ERROR: f64 = 10.0;

/// One kernel on the heads that it has a meaning on.
struct Entry {
    name: String,
    /// The median over heads, and over seeds.
    error: f64,
    /// Errors, and the heads they are of.
    errors: Vec<(f64, usize)>,
    /// Of the keys and values of exact attention, in the median.
    share: f64,
    /// Errors of windows that cost as much.
    equal: Vec<f64>,
    /// What to write, of a hybrid.
    code: &'static str,
}

impl Entry {
    /// Uniform attention on the same heads.
    fn uniform(&self, results: &Results) -> f64 {
        let of = |(_, input): &(f64, usize)| results.exact[*input].report.uniform_error;
        median(self.errors.iter().map(of)).unwrap_or(f64::NAN)
    }

    /// Whether it is closer than uniform attention on most heads, and than the window that costs as
    /// much.
    fn is_useful(&self, results: &Results) -> bool {
        let closer =
            |(error, input): &&(f64, usize)| *error < results.exact[*input].report.uniform_error;
        2 * self.errors.iter().filter(closer).count() > self.errors.len()
            && median(self.equal.iter().copied()).is_none_or(|equal| self.error < equal)
    }

    fn range(&self) -> String {
        let errors = || self.errors.iter().map(|(error, _)| *error);
        match (errors().reduce(f64::min), errors().reduce(f64::max)) {
            (Some(least), Some(most)) if self.errors.len() > 1 => {
                format!(
                    " (median of {} heads, {} to {})",
                    self.errors.len(),
                    short(least),
                    short(most)
                )
            }
            _ => String::new(),
        }
    }
}

/// The chart; `None` if there is no real head, or nothing was measured.
pub fn chart(results: &Results) -> Option<Dots> {
    let heads = Group::heads(results);
    let uniform = heads.uniform(results);
    let hybrids: Vec<Entry> = Hybrid::ALL
        .into_iter()
        .filter_map(|hybrid| {
            let of_kind = hybrid_entries(results, &heads.inputs)
                .into_iter()
                .filter(|(kind, _)| *kind == hybrid)
                .map(|(_, entry)| entry);
            of_kind.reduce(|a, b| {
                let better = (b.errors.len(), -b.error) > (a.errors.len(), -a.error);
                if better { b } else { a }
            })
        })
        .collect();
    let maps = map_entries(results, &heads);
    let baseline = Entry {
        name: "uniform attention: looks at no key".to_owned(),
        error: uniform,
        errors: heads.inputs.iter().map(|i| (results.exact[*i].report.uniform_error, *i)).collect(),
        share: 0.0,
        equal: Vec::new(),
        code: "",
    };
    if hybrids.is_empty() && maps.is_empty() {
        return None;
    }
    let errors = || {
        [&hybrids, &maps]
            .into_iter()
            .flatten()
            .chain([&baseline])
            .flat_map(|entry| entry.errors.iter().map(|(error, _)| *error))
            .filter(|error| *error > 0.0)
    };
    let low = 0.8 * errors().reduce(f64::min)?;
    let high = 1.25 * errors().reduce(f64::max)?.min(MOST_ERROR);
    let axis = Axis { low, high, logarithmic: true };
    let mut dots = Dots::new(
        format!("Distance from softmax on real heads ({})", heads.name),
        "relative output error ‖ÂV − AV‖/‖AV‖, logarithmic: further left is closer",
        axis,
    );
    let ticks = log_ticks(low.log10(), high.log10(), 2.6);
    dots.ticks(ticks.into_iter().map(|value| (value, tick(value))));
    dots.line("reference", uniform, format!("uniform attention {}", short(uniform)));
    let best = hybrids
        .iter()
        .chain(&maps)
        .filter(|entry| entry.is_useful(results))
        .map(|entry| entry.error)
        .reduce(f64::min);
    let titles = [
        "An exact window of recent tokens, and a memory behind it",
        "Feature maps alone, each kind at its best",
    ];
    for (title, mut entries) in titles.into_iter().zip([hybrids, maps]) {
        entries.sort_by(|a, b| a.error.total_cmp(&b.error));
        for (i, entry) in entries.iter().enumerate() {
            let kind = match entry.is_useful(results) {
                true if best == Some(entry.error) => "best",
                true => "plain",
                false => "useless",
            };
            let group = (i == 0).then(|| title.to_owned());
            dots.row(row(results, &heads, entry, kind, group));
        }
    }
    let mut last = row(results, &heads, &baseline, "baseline", Some("To compare".to_owned()));
    last.value = short(uniform);
    dots.row(last);
    dots.value = "error, memory";
    dots.caption = "Upright marks are medians over heads, dots are heads. Memory: the size of \
                    the state, of the keys and values that exact attention keeps. Grey: no closer \
                    than uniform attention on most heads, or than a window that costs as much. \
                    Exact attention has error 0 and 100 %."
        .to_owned();
    Some(dots)
}

fn row(
    results: &Results,
    heads: &Group,
    entry: &Entry,
    kind: &'static str,
    group: Option<String>,
) -> DotRow {
    let named = |(error, input): &(f64, usize)| {
        (*error, format!("{}: {}", results.inputs[*input].name, short(*error)))
    };
    let some = match (entry.errors.len(), heads.inputs.len()) {
        (n, all) if n < all => format!(" ({n} of {all} heads)"),
        _ => String::new(),
    };
    DotRow {
        group,
        name: format!("{}{some}", entry.name),
        value: format!("{}, {}", short(entry.error), percent(entry.share)),
        kind,
        dots: entry.errors.iter().map(named).collect(),
        middle: Some(entry.error),
        bar: None,
    }
}

/// Every hybrid of the table on those of the inputs that have it.
fn hybrid_entries(results: &Results, inputs: &[usize]) -> Vec<(Hybrid, Entry)> {
    let mut found: Vec<(Memory, Vec<(usize, HybridRow)>)> = Vec::new();
    for &input in inputs {
        for row in table_rows(results, input) {
            let memory = row.contestant.memory;
            match found.iter_mut().find(|(other, _)| *other == memory) {
                Some((_, rows)) => rows.push((input, row)),
                None => found.push((memory, vec![(input, row)])),
            }
        }
    }
    let entry = |(_, rows): (Memory, Vec<(usize, HybridRow)>)| {
        let contestant = rows.first()?.1.contestant;
        let window = rows.iter().map(|(_, row)| row.contestant.window).max()?;
        let name = match contestant.hybrid() {
            Hybrid::Window => format!("{} alone", contestant.label()),
            _ if window > 0 => format!("window {window} + {}", contestant.label()),
            _ => contestant.label(),
        };
        let share = median(rows.iter().map(|(input, row)| {
            row.state_floats as f64 / results.exact[*input].state_floats as f64
        }))?;
        let error = median(rows.iter().map(|(_, row)| row.error.median))?;
        let errors = rows.iter().map(|(input, row)| (row.error.median, *input)).collect();
        let equal = rows.iter().filter_map(|(_, row)| Some(row.equal_window?.error)).collect();
        Some((
            contestant.hybrid(),
            Entry { name, error, errors, share, equal, code: contestant.hybrid().code() },
        ))
    };
    found.into_iter().filter_map(entry).collect()
}

/// The closest map of each kind.
fn map_entries(results: &Results, heads: &Group) -> Vec<Entry> {
    let all = best_rows(&rows(results, heads));
    let entry = |family: Family| {
        let of_family = all.iter().filter(|row| row.kernel.family() == family);
        let row =
            of_family.min_by(|a, b| a.output_error.median.total_cmp(&b.output_error.median))?;
        Some(map_entry(results, heads, row, format!("{}: ", family.name())))
    };
    Family::ALL.into_iter().filter_map(entry).collect()
}

fn map_entry(results: &Results, heads: &Group, row: &Row, before: String) -> Entry {
    let of_input = |input: &usize| {
        let found = rows(results, &Group::one(results, *input)).into_iter().find(|other| {
            other.kernel == row.kernel && (row.kernel.is_fixed() || other.features == row.features)
        })?;
        let exact = results.exact[*input].state_floats as f64;
        Some((found.output_error.median, *input, found.state_floats / exact))
    };
    let found: Vec<_> = heads.inputs.iter().filter_map(of_input).collect();
    Entry {
        name: format!("{before}{}, m = {}", row.kernel.name(), row.features_text()),
        error: row.output_error.median,
        errors: found.iter().map(|(error, input, _)| (*error, *input)).collect(),
        share: median(found.iter().map(|(.., share)| *share)).unwrap_or(f64::NAN),
        equal: Vec::new(),
        code: "",
    }
}

/// What to take away, in two or three sentences.
pub fn take_away(results: &Results, plan: &Plan) -> Vec<String> {
    let heads = Group::heads(results);
    let of_masks = [(Mask::Causal, "causal"), (Mask::Full, "bidirectional")].map(|(mask, name)| {
        let inputs: Vec<usize> =
            heads.inputs.iter().copied().filter(|i| results.inputs[*i].mask == mask).collect();
        choice(results, &inputs, name)
    });
    of_masks.into_iter().chain([maps(results, plan, &heads)]).flatten().collect()
}

/// Of the names of hybrids that merge by another cost than the default.
const WARD: &str = "Ward's cost";
/// What the errors of single heads do not see.
const BY_LOSS: &str = " Where the heads are those of a language model, judge by its loss: there \
                       the default cost lost less than Ward's with as many entries \
                       (docs/models.md).";

/// Which hybrid to choose on these heads.
fn choice(results: &Results, inputs: &[usize], mask: &str) -> Option<String> {
    let mut entries: Vec<(Hybrid, Entry)> = hybrid_entries(results, inputs);
    let most = entries.iter().map(|(_, entry)| entry.errors.len()).max()?;
    entries.retain(|(kind, entry)| *kind != Hybrid::Window && entry.errors.len() == most);
    let (_, best) = entries.into_iter().min_by(|(_, a), (_, b)| a.error.total_cmp(&b.error))?;
    let uniform = best.uniform(results);
    if uniform == 0.0 {
        return None; // nothing is to be approximated
    }
    let equal = median(best.equal.iter().copied()).map_or_else(String::new, |error| {
        format!(", a window that costs as much by {}", short(error))
    });
    let memory = percent(best.share);
    let measured = format!(
        "its output is off by {}{}, from {memory} of the memory of exact attention; uniform \
         attention, which looks at no key, is off by {}{equal}",
        short(best.error),
        best.range(),
        short(uniform)
    );
    Some(if !best.is_useful(results) {
        format!(
            "On {mask} heads keep exact softmax: the closest hybrid is {}, but {measured}.",
            best.name
        )
    } else if best.error < 0.25 * uniform {
        let caution = if best.name.contains(WARD) { BY_LOSS } else { "" };
        format!("On {mask} heads choose {} ({}): {measured}.{caution}", best.name, best.code)
    } else {
        format!(
            "On {mask} heads nothing comes close; the closest is {} ({}): {measured}.",
            best.name, best.code
        )
    })
}

/// Whether feature maps alone will do.
fn maps(results: &Results, plan: &Plan, heads: &Group) -> Option<String> {
    let best = best_rows(&rows(results, heads));
    let useful: Vec<&str> =
        best.iter().filter(|row| row.is_useful()).map(|row| row.kernel.name()).collect();
    let closest =
        best.iter().min_by(|a, b| a.output_error.median.total_cmp(&b.output_error.median))?;
    let (error, uniform) = (closest.output_error.median, heads.uniform(results));
    if uniform == 0.0 {
        return None;
    }
    let entry = map_entry(results, heads, closest, String::new());
    let verdict = if useful.is_empty() || error > 0.5 * uniform {
        "Do not put feature maps alone in place of softmax on such heads"
    } else {
        "Feature maps alone come close on such heads"
    };
    let useful = match useful.len() {
        0 => "none".to_owned(),
        n if n <= 3 => useful.join(", "),
        n => n.to_string(),
    };
    let norms = useful_norms(results, plan).map_or_else(String::new, |norms| {
        let [least, most] = norms.of_heads;
        let up_to = norms.largest.map_or_else(
            || "at none of the norms measured".to_owned(),
            |(norm, ..)| format!("up to mean |x̂|² = {norm} of queries and keys"),
        );
        format!(
            " On Gaussian inputs exponential maps beat it {up_to}; on these heads it is {least} \
             to {most}."
        )
    });
    Some(format!(
        "{verdict}: of {} maps, {useful} beat{} uniform attention ({}) on most heads; the \
         closest is {} with {}, from {} of the memory of exact attention.{norms}",
        best.len(),
        if useful.contains(',') { "" } else { "s" },
        short(uniform),
        entry.name,
        short(error),
        percent(entry.share)
    ))
}
