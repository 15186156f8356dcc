//! Plans: window, entries and decay of every kv head, from what the exact model does on calibration
//! texts and how much its loss feels each head.

use crate::capture::Capture;
use crate::gguf::Gguf;
use crate::kernels::Kernel;
use crate::model::{Config, Model};
use crate::sensitivity::{self, Exact, Loss};
use crate::texts::Text;
use anyhow::{Context, Result, ensure};
use candle_core::DType;
use dijiang::{ModelSizes, MultiHead, PlanOptions, PlanSample, StatePlan, StatePlanner};
use indicatif::ProgressBar;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// A text to plan by, with what is differentiated on it.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanText {
    /// The text.
    pub text: Text,
    /// What its sensitivities are of.
    pub loss: Loss,
    /// What it counts beside the others.
    pub weight: f64,
}

/// Windows of prose at most: more take long, and change little.
const MOST_WINDOWS: usize = 6;
/// What a copy counts: log odds are tens of nats where likelihoods are a few.
const WEIGHT_OF_COPIES: f64 = 0.002;
/// The fewest tokens of a text to plan by.
const FEWEST: usize = 64;

/// Windows of `length` tokens of these texts, for the model's own words, and two copies: a passage
/// twice; a passage, another text, the passage again.
///
/// Where no text is so long, each window is the texts joined, from one of them on.
pub fn plan_texts(texts: &[Text], length: usize) -> Result<Vec<PlanText>> {
    ensure!(length >= FEWEST, "a plan needs at least {FEWEST} tokens of text, not {length}");
    let mut windows: Vec<Text> = Vec::new();
    let most = texts.iter().map(|text| text.tokens.len() / length).max().unwrap_or(0);
    for i in 0..most {
        for text in texts.iter().filter(|text| text.tokens.len() / length > i) {
            let tokens = text.tokens[i * length..(i + 1) * length].to_vec();
            windows.push(Text { name: text.name.clone(), tokens });
        }
    }
    windows.truncate(MOST_WINDOWS);
    if windows.is_empty() {
        let all: usize = texts.iter().map(|text| text.tokens.len()).sum();
        ensure!(
            all >= length,
            "the calibration texts have {all} tokens together, but a plan for {length} needs as \
             many: give longer ones by `--calibration`, or ask for a shorter `--length`"
        );
        for first in [0, texts.len() / 2] {
            let joined = texts[first..].iter().chain(&texts[..first]);
            let tokens = joined.flat_map(|text| text.tokens.iter().copied()).take(length);
            let name = format!("{} and others", texts[first].name);
            windows.push(Text { name, tokens: tokens.collect() });
        }
        windows.dedup();
    }
    let (passages, others) = (&windows[0], &windows[windows.len() / 2]);
    let half = length.div_ceil(2);
    let mut twice = passages.tokens[..half].repeat(2);
    twice.truncate(length);
    let again = length - length / 4;
    let mut apart = others.tokens.clone();
    apart[..length / 4].copy_from_slice(&passages.tokens[..length / 4]);
    if windows.len() == 1 {
        // another part of the one text
        apart[length / 4..again].copy_from_slice(&passages.tokens[length / 4..again]);
    }
    apart[again..].copy_from_slice(&passages.tokens[..length / 4]);
    let copy = |what: &str, tokens: Vec<u32>, places| PlanText {
        text: Text { name: format!("{}, {what}", passages.name), tokens },
        loss: Loss::LogOdds(places),
        weight: WEIGHT_OF_COPIES,
    };
    let copies = [
        copy("twice", twice, half..length),
        copy("again after another text", apart, again..length),
    ];
    let own = windows.into_iter().zip(0..).map(|(text, seed)| PlanText {
        text,
        loss: Loss::OwnWords { seed },
        weight: 1.0,
    });
    Ok(own.chain(copies).collect())
}

/// Steps of the bar for one text.
#[must_use]
pub fn steps(config: &Config) -> usize {
    sensitivity::steps(config) + config.layers * config.kv_heads
}

/// Where the time of planning went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Took {
    /// In forward and backward passes.
    pub sensitivities: Duration,
    /// In running every setting in every head.
    pub costs: Duration,
}

/// Measures what every setting costs in every head, text by text. The bar advances by [`steps`] for
/// each.
pub fn costs(
    model: &Model,
    file: Gguf,
    texts: &[PlanText],
    options: &PlanOptions,
    bar: &ProgressBar,
) -> Result<(StatePlanner, Took)> {
    let config = model.config();
    let mut planner = StatePlanner::new(options)?;
    let mut exact = Exact::new(file, DType::F32)?;
    let mut took = Took::default();
    for PlanText { text, loss, weight } in texts {
        let place = || format!("planning by `{}`", text.name);
        bar.set_message(format!("{}: sensitivities", text.name));
        let start = Instant::now();
        let sensitivities = exact.backward(&text.tokens, loss, bar).with_context(place)?;
        let capture = Capture::of(model, &text.tokens).with_context(place)?;
        took.sensitivities += start.elapsed();
        let samples: Vec<_> = capture
            .samples()
            .into_iter()
            .map(|sample| {
                let g = sensitivities.of(sample.layer, sample.kv_head, config.group());
                PlanSample::from(sample).with_sensitivity(g).with_weight(*weight)
            })
            .collect();
        bar.set_message(format!("{}: costs of settings", text.name));
        let start = Instant::now();
        planner.add_with_progress(&samples, &|_, _| bar.inc(1)).with_context(place)?;
        took.costs += start.elapsed();
    }
    Ok((planner, took))
}

/// The sizes that a plan must have.
#[must_use]
pub fn sizes(config: &Config) -> ModelSizes {
    ModelSizes {
        layers: config.layers,
        query_heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        value_dim: config.value_dim,
    }
}

/// Plans that come along, by name.
const BUILT_IN: [(&str, &str); 3] = [
    ("smollm2-135m-128", include_str!("../plans/smollm2-135m-128.json")),
    ("smollm2-135m-q8-256", include_str!("../plans/smollm2-135m-q8-256.json")),
    ("smollm2-135m-q8-256-exact-5", include_str!("../plans/smollm2-135m-q8-256-exact-5.json")),
];

/// The plan of this name that comes along, as JSON.
#[must_use]
pub fn built_in(name: &str) -> Option<&'static str> {
    BUILT_IN.iter().find(|(other, _)| *other == name).map(|(_, json)| *json)
}

/// Writes a plan as JSON.
pub fn save(plan: &StatePlan, path: &Path) -> Result<()> {
    write(path, &serde_json::to_string(plan)?)
}

/// Writes measured costs as JSON.
pub fn save_costs(costs: &StatePlanner, path: &Path) -> Result<()> {
    write(path, &serde_json::to_string(costs)?)
}

fn write(path: &Path, json: &str) -> Result<()> {
    fs::write(path, format!("{json}\n")).with_context(|| format!("cannot write {}", path.display()))
}

/// Reads what [`save_costs`] wrote.
pub fn load_costs(path: &Path) -> Result<StatePlanner> {
    let json =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&json)
        .with_context(|| format!("{} does not hold the costs of a plan", path.display()))
}

/// Refuses a plan for another model.
pub fn check(plan: &StatePlan, name: &str, model: &Model) -> Result<()> {
    plan.check_model(&sizes(model.config()), &model.fingerprint()).with_context(|| {
        format!(
            "{name} is a plan for another model than `{}`: make one by `plan`",
            model.config().name
        )
    })
}

/// Attention of every layer, by a plan.
pub fn layers(plan: &StatePlan, kernel: &Kernel, config: &Config) -> Result<Vec<MultiHead<f32>>> {
    ensure!(
        kernel.is_plain_merged(),
        "`{kernel}`: the plan says window, entries and decay of every head, so its name is \
         `merged,plan=FILE`, with `state=FORMAT` or without"
    );
    (0..config.layers).map(|layer| Ok(plan.layer(layer, config.heads)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(name: &str, first: u32, count: u32) -> Text {
        Text { name: name.to_owned(), tokens: (first..first + count).collect() }
    }

    #[test]
    fn each_text_is_read_and_one_is_copied() {
        let texts = [text("a", 0, 250), text("b", 1000, 120), text("c", 2000, 90)];
        let found = plan_texts(&texts, 100).unwrap();
        let names: Vec<&str> = found.iter().map(|text| text.text.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "a", "a, twice", "a, again after another text"]);
        assert!(found.iter().all(|text| text.text.tokens.len() == 100));
        assert_eq!(found[2].text.tokens[0], 100);
        assert_eq!(found[1].loss, Loss::OwnWords { seed: 1 });
        let [twice, apart] = [&found[3], &found[4]];
        assert_eq!(twice.text.tokens[..50], twice.text.tokens[50..]);
        assert_eq!((&twice.loss, twice.weight), (&Loss::LogOdds(50..100), 0.002));
        assert_eq!(apart.text.tokens[..25], apart.text.tokens[75..]);
        assert_eq!(apart.text.tokens[25..75], texts[1].tokens[25..75]);
        assert_eq!(apart.loss, Loss::LogOdds(75..100));
    }

    #[test]
    fn short_texts_are_joined() {
        let texts = [text("a", 0, 70), text("b", 1000, 90)];
        let found = plan_texts(&texts, 101).unwrap();
        let names: Vec<&str> = found.iter().map(|text| text.text.name.as_str()).collect();
        let copies = ["a and others, twice", "a and others, again after another text"];
        assert_eq!(names, [&["a and others", "b and others"][..], &copies].concat());
        assert_eq!(found[0].text.tokens[69..71], [69, 1000]);
        assert_eq!(found[1].text.tokens[89..91], [1089, 0]);
        // an odd length: the passage is not copied to its end
        assert_eq!((found[2].text.tokens.len(), &found[2].loss), (101, &Loss::LogOdds(51..101)));
        let one = plan_texts(&texts[1..], 80).unwrap();
        assert_eq!((one.len(), one[2].text.tokens[20]), (3, 1020));
        let error = plan_texts(&texts, 161).unwrap_err().to_string();
        assert!(error.contains("160 tokens together, but a plan for 161"), "{error}");
        assert!(plan_texts(&texts, 3).unwrap_err().to_string().contains("at least 64"));
    }
}
