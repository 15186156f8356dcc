//! Kernels whose state is in fewer bits, with their formulas.

use super::{Formula, Subject, Written, hybrid_in, hybrids, softmax};
use dijiang::attention::naive::{self, formats::rounded, options, options::Options};
use dijiang::{Mask, StateFormat};
use std::sync::Arc;

pub const FORMATS: [StateFormat; 2] = [StateFormat::Bf16, StateFormat::Q8];

/// Softmax attention over rounded keys and values, with and without options.
pub fn packed_softmax(d: usize) -> Vec<Subject> {
    let scale = 1.0 / (d as f64).sqrt();
    let cases = [
        (Options::default(), None),
        (Options { soft_cap: Some(1.5), sink_logit: Some(2.0) }, None),
        (Options { soft_cap: Some(50.0), sink_logit: None }, Some(0.25)),
    ];
    let all = FORMATS.into_iter().flat_map(|format| cases.map(|(all, slope)| (format, all, slope)));
    all.map(|(format, all, slope)| Subject {
        name: format!("{} softmax d={d} {all:?} slope {slope:?}", format.name()),
        head_dim: d,
        f64: softmax(d, format, all, slope),
        f32: softmax(d, format, all, slope),
        positive: true,
        scale,
        formula: Formula::Written(Written {
            masks: &[Mask::Causal, Mask::Full],
            normalized: all.sink_logit.is_none(),
            has_features: false,
            state: Box::new(move |dv, tokens| tokens * (d + dv)),
            output: Box::new(move |[q, k, v], mask| {
                let [k, v] = [k, v].map(|x| rounded(x, format));
                let capped = naive::scores(q, &k, scale)
                    .mapv(|score| options::soft_capped(score, all.soft_cap));
                let logs = options::alibi(capped, slope.unwrap_or(0.0), mask);
                options::with_sink(&logs, &v, all.sink_logit, mask)
            }),
        }),
    })
    .collect()
}

/// Hybrids of every far memory, in one format or the other.
pub fn packed_hybrids(d: usize, m: usize) -> Vec<Subject> {
    let all = hybrids(d, m).into_iter().zip(FORMATS.into_iter().cycle());
    all.map(|(mut subject, format)| {
        let Formula::Hybrid(formula) = &subject.formula else { unreachable!("they are hybrids") };
        subject.f64 = Arc::new(hybrid_in::<f64>(format, formula, d, m));
        subject.f32 = Arc::new(hybrid_in::<f32>(format, formula, d, m));
        subject.name = format!("{} {}", format.name(), subject.name);
        if let Formula::Hybrid(formula) = &mut subject.formula {
            formula.format = format;
        }
        subject
    })
    .collect()
}
