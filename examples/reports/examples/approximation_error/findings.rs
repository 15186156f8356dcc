//! What was found, in sentences that are computed from the measurements.

use crate::args::Plan;
use crate::hybrids;
use crate::kernels::{Claim, Kernel};
use crate::measure::Results;
use crate::summary::{Group, Row, best, kernel_error_rate, median, rows};
use crate::table::typical_features;
use crate::text::{short, slope};

/// The norm at which slopes are compared with the claimed ones.
pub const SMALL_NORM: f64 = 1.0;
/// With fewer, the intervals are so wide that everything lies inside.
const SEEDS_TO_JUDGE: u64 = 5;

/// Sentences under a title.
pub type Found = (&'static str, Vec<String>);

/// Plain sentences in groups; those that the run has no data for are left out.
pub fn findings(results: &Results, plan: &Plan) -> Vec<Found> {
    let heads = Group::heads(results);
    let head_rows = rows(results, &heads);
    let on_heads = [
        against_uniform(results, &heads, &head_rows),
        more_features(&head_rows, heads.inputs.len()),
        weights(&head_rows),
    ];
    let on_gaussian = [small_norms(results, plan), norms_that_work(results, plan)];
    let mut slopes = slopes_at_small_norm(results, plan);
    slopes.extend(slopes_on_heads(results, &heads));
    let mut found = vec![
        ("Hybrids", hybrids::findings::findings(results, plan)),
        ("Feature maps on real heads", on_heads.into_iter().flatten().collect()),
        ("Feature maps on Gaussian inputs", on_gaussian.into_iter().flatten().collect()),
        ("How fast errors fall with the number of features", slopes),
        ("What failed", failures(results).into_iter().flatten().collect()),
    ];
    found.retain(|(_, sentences)| !sentences.is_empty());
    found
}

fn against_uniform(results: &Results, heads: &Group, rows: &[Row]) -> Option<String> {
    let most = rows.iter().max_by_key(|row| row.beats_uniform)?;
    let count = heads.inputs.len();
    let best = best(rows)?;
    let verdict = match most.beats_uniform {
        k if k == count => {
            let winners: Vec<_> = rows.iter().filter(|row| row.beats_uniform == count).collect();
            let come = if winners.len() == 1 { "comes" } else { "come" };
            let winners = names(winners.into_iter().map(|row| row.kernel));
            format!(
                "On all {count} real heads {winners} {come} closer to softmax than uniform \
                 attention does"
            )
        }
        0 => {
            format!("On the {count} real heads no feature map beats uniform attention on any head")
        }
        k => format!(
            "On the {count} real heads no feature map beats uniform attention on more than {k} \
             heads"
        ),
    };
    Some(format!(
        "{verdict}; the smallest median output error of a map of exp(q·k) is {} ({}, m = {}), \
         that of uniform attention {}.",
        short(best.output_error.median),
        best.kernel.name(),
        best.features_text(),
        short(heads.uniform(results)),
    ))
}

fn more_features(rows: &[Row], heads: usize) -> Option<String> {
    let mut changes = Vec::new();
    for kernel in Kernel::ALL {
        let of_kernel: Vec<&Row> = rows.iter().filter(|row| row.kernel == kernel).collect();
        if let [first, .., last] = of_kernel[..] {
            changes.push((kernel, first, last));
        }
    }
    let gained: Vec<Kernel> = changes
        .iter()
        .filter(|(_, first, last)| last.output_error.median < 0.9 * first.output_error.median)
        .map(|(kernel, ..)| *kernel)
        .collect();
    let examples: Vec<String> = changes
        .iter()
        .filter(|(kernel, ..)| matches!(kernel, Kernel::Performer | Kernel::Dct))
        .map(|(kernel, first, last)| {
            let [from, to] = [first, last].map(|row| short(row.output_error.median));
            format!(
                "{} {from} at m = {} and {to} at m = {}",
                kernel.name(),
                first.features[0],
                last.features[0]
            )
        })
        .collect();
    if changes.is_empty() {
        return None;
    }
    let gained = match gained.len() {
        0 => "none of them".to_owned(),
        _ => names(gained),
    };
    let examples =
        if examples.is_empty() { String::new() } else { format!(" ({})", examples.join("; ")) };
    Some(format!(
        "From the fewest to the most features the median output error over {heads} heads falls by \
         more than a tenth for {gained}, of {} maps{examples}.",
        changes.len()
    ))
}

fn small_norms(results: &Results, plan: &Plan) -> Option<String> {
    let group = Group::norm(results, SMALL_NORM)?;
    let all = rows(results, &group);
    let best = best(&all)?;
    let m = typical_features(&plan.features);
    let at_m: Vec<&Row> =
        all.iter().filter(|row| row.kernel.aims_at_softmax() && row.features[0] == m).collect();
    let useful = names(at_m.iter().filter(|row| row.is_useful()).map(|row| row.kernel));
    let error = |kernel| {
        at_m.iter().find(|row| row.kernel == kernel)?.kernel_error.map(|error| error.median)
    };
    let ratio = |kernel, name: &str| {
        let ratio = error(kernel)? / error(Kernel::Performer)?;
        Some(format!("{} times for {name}", short(ratio)))
    };
    let ratios: Vec<String> = [Kernel::Dct, Kernel::DctAntithetic, Kernel::Wpff, Kernel::WpffSobol]
        .into_iter()
        .filter_map(|kernel| ratio(kernel, kernel.name()))
        .collect();
    let ratios = if ratios.is_empty() {
        String::new()
    } else {
        format!(
            " The kernel error there, in units of that of performer (FAVOR+): {}.",
            ratios.join(", ")
        )
    };
    let useful = if useful.is_empty() { "no map of exp(q·k)".to_owned() } else { useful };
    Some(format!(
        "On Gaussian inputs with |x̂|² = {SMALL_NORM} uniform attention is off by {}; with m = {m} \
         what beats it is: {useful}; the closest of all is {} (m = {}) with {}.{ratios}",
        short(group.uniform(results)),
        best.kernel.name(),
        best.features_text(),
        short(best.output_error.median),
    ))
}

/// At which norms exponential maps are of use.
pub struct UsefulNorms {
    ends: [f64; 2],
    /// The largest at which one beats uniform attention, the closest map there, and the error of
    /// uniform attention.
    pub largest: Option<(f64, Row, f64)>,
    /// The least and the most mean |x̂|² of the real heads.
    pub of_heads: [String; 2],
}

pub fn useful_norms(results: &Results, plan: &Plan) -> Option<UsefulNorms> {
    let is_exponential = |kernel: Kernel| kernel.is_random() && kernel.aims_at_softmax();
    if !plan.kernels.iter().any(|kernel| is_exponential(*kernel)) {
        return None;
    }
    let mut largest = None;
    let mut norms = Vec::new();
    for input in results.inputs.iter().filter_map(|input| input.norm) {
        let group = Group::norm(results, input)?;
        norms.push(input);
        let useful = rows(results, &group)
            .into_iter()
            .filter(|row| is_exponential(row.kernel) && row.is_useful());
        if let Some(row) =
            useful.min_by(|a, b| a.output_error.median.total_cmp(&b.output_error.median))
        {
            largest = Some((input, row, group.uniform(results)));
        }
    }
    let [first, .., last] = norms[..] else { return None };
    let heads: Vec<f64> = results
        .inputs
        .iter()
        .filter(|input| input.is_real())
        .flat_map(super::data::Input::squared_norms)
        .collect();
    let of_heads = [f64::min, f64::max]
        .map(|pick| heads.iter().copied().reduce(pick).map_or("-".into(), short));
    Some(UsefulNorms { ends: [first, last], largest, of_heads })
}

fn norms_that_work(results: &Results, plan: &Plan) -> Option<String> {
    let UsefulNorms { ends: [first, last], largest, of_heads: [least, most] } =
        useful_norms(results, plan)?;
    let context = format!("the real heads have mean |x̂|² from {least} to {most}");
    Some(match largest {
        None => {
            format!(
                "No exponential map beats uniform attention at any norm |x̂|² from {first} to \
                 {last}; {context}."
            )
        }
        Some((norm, row, uniform)) => format!(
            "The largest |x̂|², of those measured from {first} to {last}, at which some \
             exponential map beats uniform attention is {norm} ({} with m = {}: {} against {}); \
             {context}.",
            row.kernel.name(),
            row.features_text(),
            short(row.output_error.median),
            short(uniform),
        ),
    })
}

fn slopes_at_small_norm(results: &Results, plan: &Plan) -> Vec<String> {
    let Some(input) = results.inputs.iter().position(|input| input.norm == Some(SMALL_NORM)) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for (claim, method) in
        [(Claim::InverseRoot, "Monte Carlo"), (Claim::Inverse, "quasi-Monte Carlo")]
    {
        let Some(claimed) = claim.slope() else { continue };
        let mut measured = Vec::new();
        let mut confirmed = Vec::new();
        for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.claim() == claim) {
            let Some(rate) = kernel_error_rate(results, kernel, input) else { continue };
            let [from, to] = rate.confidence;
            measured.push(format!(
                "{} {} ({} … {})",
                kernel.name(),
                slope(rate.slope),
                slope(from),
                slope(to)
            ));
            if (from..=to).contains(&claimed) {
                confirmed.push(kernel);
            }
        }
        if measured.is_empty() {
            continue;
        }
        let confirmed = match confirmed.len() {
            0 => "none of them".to_owned(),
            k if k == measured.len() => "all of them".to_owned(),
            _ => names(confirmed),
        };
        let verdict = if plan.seeds < SEEDS_TO_JUDGE {
            format!("That is too few seeds to judge the {} claimed for {method}.", slope(claimed))
        } else {
            format!(
                "The {} claimed for {method} lies inside the interval for {confirmed}.",
                slope(claimed)
            )
        };
        found.push(format!(
            "At |x̂|² = {SMALL_NORM} the kernel error changes as a power of m with these exponents \
             (95 % intervals over {} seeds): {}. {verdict}",
            plan.seeds,
            measured.join(", "),
        ));
    }
    found
}

fn slopes_on_heads(results: &Results, heads: &Group) -> Option<String> {
    let mut slopes = Vec::new();
    for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.claim() != Claim::None) {
        slopes.extend(
            heads.inputs.iter().filter_map(|i| Some(kernel_error_rate(results, kernel, *i)?.slope)),
        );
    }
    let least = slopes.iter().copied().reduce(f64::min)?;
    let most = slopes.iter().copied().reduce(f64::max)?;
    Some(format!(
        "On the real heads the same exponents lie between {} and {}, with median {}.",
        slope(least),
        slope(most),
        slope(median(slopes)?)
    ))
}

fn weights(rows: &[Row]) -> Option<String> {
    let fitted = best_of(rows, Kernel::WpffWeighted)?;
    let plain =
        rows.iter().find(|row| row.kernel == Kernel::Wpff && row.features == fitted.features)?;
    let change = fitted.output_error.median / plain.output_error.median - 1.0;
    change.is_finite().then(|| {
    format!(
        "Weights fitted on another text change the median output error of wpff on the heads by {} \
         % ({} to {} at m = {}).",
        format!("{:+.1}", 100.0 * change).replace('-', "−"),
        short(plain.output_error.median),
        short(fitted.output_error.median),
        fitted.features_text(),
    )
    })
}

fn best_of(rows: &[Row], kernel: Kernel) -> Option<&Row> {
    rows.iter()
        .filter(|row| row.kernel == kernel)
        .min_by(|a, b| a.output_error.median.total_cmp(&b.output_error.median))
}

fn failures(results: &Results) -> [Option<String>; 2] {
    let maps = results
        .measurements
        .iter()
        .map(|m| (m.kernel.name().to_owned(), m.input, m.report.as_ref().err()));
    let rivals = &results.rivals.measurements;
    let rivals =
        rivals.iter().map(|m| (m.rival.name().to_owned(), m.input, m.outcome.as_ref().err()));
    [
        failures_of("measurements", results, maps),
        failures_of("measurements of rivals", results, rivals),
    ]
}

/// How many failed, of measurements with a name, an input and perhaps a reason.
pub fn failures_of<'a>(
    what: &str,
    results: &Results,
    measurements: impl ExactSizeIterator<Item = (String, usize, Option<&'a String>)>,
) -> Option<String> {
    let all = measurements.len();
    let failed: Vec<_> =
        measurements.filter_map(|(name, input, why)| Some((name, input, why?))).collect();
    let (name, input, why) = failed.first()?;
    let input = &results.inputs[*input].name;
    Some(format!(
        "{} of {all} {what} failed and are left out; the first is {name} on {input}: {why}.",
        failed.len()
    ))
}

/// `a, b and c`, each once.
fn names(kernels: impl IntoIterator<Item = Kernel>) -> String {
    let mut names: Vec<&str> = Vec::new();
    for kernel in kernels {
        if !names.contains(&kernel.name()) {
            names.push(kernel.name());
        }
    }
    match names.split_last() {
        None => String::new(),
        Some((only, [])) => (*only).to_owned(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
    }
}
