//! What was found, in sentences that are computed from the measurements.

use crate::kernels::{KERNELS, Kind};
use crate::measure::{Curve, Plan, Results, Score};
use crate::task::{CLASSES, Sort};

/// The accuracies of which it is told how far they reach.
const LEVELS: [f64; 2] = [0.9, 0.5];

/// A few plain sentences; those that the run has no data for are left out.
pub fn findings(results: &Results, plan: &Plan) -> Vec<String> {
    let mut found = vec![reference(results)];
    for sort in Sort::ALL {
        found.push(reach(results, plan, sort, Curve::Distance));
        found.extend(farthest(results, plan, sort));
    }
    found.push(reach(results, plan, Sort::Refreshed, Curve::Load));
    found.extend(reading(results, plan));
    found
}

fn of_kind(kinds: &[Kind]) -> impl Iterator<Item = usize> {
    (0..KERNELS.len()).filter(move |kernel| kinds.contains(&KERNELS[*kernel].kind))
}

fn percent(score: Score) -> String {
    let [from, to] = score.interval();
    format!("{:.0} % ({:.0}–{:.0})", 100.0 * score.accuracy(), 100.0 * from, 100.0 * to)
}

fn reference(results: &Results) -> String {
    let places = Sort::ALL.into_iter().flat_map(|sort| Curve::ALL.map(|curve| (sort, curve)));
    let least = places
        .flat_map(|(sort, curve)| {
            of_kind(&[Kind::Reference]).flat_map(move |kernel| results.scores(sort, curve, kernel))
        })
        .fold(1.0_f64, |least, score| least.min(score.accuracy()));
    format!(
        "Exact softmax gives at least {:.0} % right answers at every distance and load; a guess \
         is right in {:.1} %.",
        100.0 * least,
        100.0 / CLASSES as f64
    )
}

/// How far each constant memory recalls.
fn reach(results: &Results, plan: &Plan, sort: Sort, curve: Curve) -> String {
    let points = curve.points(plan);
    let (mut reaches, mut never) = (Vec::new(), Vec::new());
    let constant = of_kind(&[Kind::Baseline, Kind::Memory]);
    for kernel in constant.filter(|kernel| KERNELS[*kernel].name != "uniform") {
        let scores = results.scores(sort, curve, kernel);
        let reach = LEVELS.map(|level| {
            scores.iter().take_while(|score| score.accuracy() >= level).count().checked_sub(1)
        });
        if reach == LEVELS.map(|_| None) {
            never.push(KERNELS[kernel].name);
        } else {
            let reach = reach
                .map(|last| last.map_or_else(|| "–".to_owned(), |last| points[last].to_string()));
            reaches.push(format!("{} ({})", reach.join(" / "), KERNELS[kernel].name));
        }
    }
    if !never.is_empty() {
        reaches.push(format!("none ({})", never.join("; ")));
    }
    let [high, low] = LEVELS.map(|level| 100.0 * level);
    format!(
        "{} pairs, {}: at least {high:.0} % / {low:.0} % are right up to {} {}.",
        capital(sort.name()),
        curve.fixed(plan),
        curve.name(),
        reaches.join(", ")
    )
}

/// The best constant memory at the largest distance.
fn farthest(results: &Results, plan: &Plan, sort: Sort) -> Option<String> {
    let distance = plan.distances.last()?;
    let last = |kernel: usize| {
        results.scores(sort, Curve::Distance, kernel).last().copied().unwrap_or_default()
    };
    let best = of_kind(&[Kind::Memory])
        .max_by(|a, b| last(*a).accuracy().total_cmp(&last(*b).accuracy()))?;
    let softmax = of_kind(&[Kind::Reference]).next()?;
    Some(format!(
        "{} pairs {distance} tokens back: the best constant memory is {} with {}; softmax has {}, \
         in {} times as many numbers.",
        capital(sort.name()),
        KERNELS[best].name,
        percent(last(best)),
        percent(last(softmax)),
        results.state_floats[softmax] / results.state_floats[best],
    ))
}

/// Where it helps most that a pair was read, and whom it does not help.
fn reading(results: &Results, plan: &Plan) -> Option<String> {
    let [silent, refreshed] =
        Sort::ALL.map(|sort| move |kernel: usize| results.scores(sort, Curve::Distance, kernel));
    let gain = |&(kernel, point): &(usize, usize)| {
        refreshed(kernel)[point].accuracy() - silent(kernel)[point].accuracy()
    };
    let places = of_kind(&[Kind::Memory])
        .flat_map(|kernel| (0..plan.distances.len()).map(move |point| (kernel, point)));
    let (kernel, point) =
        places.max_by(|a, b| gain(a).total_cmp(&gain(b))).filter(|place| gain(place) > 0.0)?;
    let unmoved: Vec<&str> = of_kind(&[Kind::Memory])
        .filter(|kernel| (0..plan.distances.len()).all(|point| gain(&(*kernel, point)) == 0.0))
        .map(|kernel| KERNELS[kernel].name)
        .collect();
    let mut sentence = format!(
        "That a pair was read before helps {} most, {} tokens back: {} instead of {}.",
        KERNELS[kernel].name,
        plan.distances[point],
        percent(refreshed(kernel)[point]),
        percent(silent(kernel)[point]),
    );
    if !unmoved.is_empty() {
        sentence.push_str(&format!(" It changes nothing for {}.", unmoved.join("; ")));
    }
    Some(sentence)
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}
