//! Values that another program found for SmolLM2-135M-Instruct (Q4_1), where the file of the model
//! is there.
//!
//! `DIJIANG_MODEL` is the GGUF file, `DIJIANG_TOKENS` a JSON file of token ids,
//! `{"calibration": {"name": .., "tokens": [..]}, "evaluation": [{"name": .., "tokens": [..]},
//! ..]}`: the articles Art, Abraham Lincoln and Apollo 11 of Wikipedia, 2049 tokens each of the
//! last two.

use dijiang::MultiHead;
use indicatif::ProgressBar;
use language_model::gguf::Gguf;
use language_model::kernels::Kernel;
use language_model::linear::Weights;
use language_model::model::Model;
use language_model::perplexity::{Losses, losses};
use language_model::recall::{Score, Task};
use language_model::session::{Attentions, Session};
use std::env;
use std::path::PathBuf;

const FIRST: std::ops::Range<usize> = 0..1024;
const SECOND: std::ops::Range<usize> = 1024..2048;

/// Mean losses of softmax in nats, over the first 1024 predictions and the rest.
const SOFTMAX: [(&str, [f64; 2]); 2] =
    [("Abraham Lincoln", [2.54681, 2.73820]), ("Apollo 11", [2.72909, 3.12152])];

/// Perplexity over both articles, in percent above softmax.
const ABOVE: [(&str, [f64; 2]); 4] = [
    ("merged:64", [1.13, 5.81]),
    ("merged:64,pool", [0.84, 4.66]),
    ("merged:64,pool,exact=9", [0.76, 1.13]),
    ("window:128", [5.66, 14.75]),
];

/// The heads in which `merged:64` errs most on the calibration article, layer and kv head.
const EXACT: [(usize, usize); 9] =
    [(7, 2), (8, 0), (14, 1), (17, 1), (18, 2), (20, 1), (20, 2), (23, 0), (24, 0)];

fn file(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).filter(|path| !path.is_empty()).map(PathBuf::from)
}

#[test]
fn smollm2_gives_the_values_that_were_found() {
    let (Some(model), Some(tokens)) = (file("DIJIANG_MODEL"), file("DIJIANG_TOKENS")) else {
        println!("skipped: DIJIANG_MODEL and DIJIANG_TOKENS name no files");
        return;
    };
    let session = Session::open(&model, &[tokens], &[], 2048, Weights::F32).unwrap();
    let attention = |name: &str| session.attention(&name.parse::<Kernel>().unwrap()).unwrap();
    let read = |layers: &[MultiHead<f32>]| -> Losses {
        let texts = session.corpus.evaluation().unwrap();
        losses(&session.model, layers, texts, 2048, &ProgressBar::hidden()).unwrap()
    };

    let exact = read(&attention("softmax").layers);
    for ((name, nats), (expected_name, expected)) in exact.windows.iter().zip(&SOFTMAX) {
        assert_eq!((name.as_str(), nats.len()), (*expected_name, 2048));
        for (range, expected) in [FIRST, SECOND].into_iter().zip(expected) {
            let mean = nats[range].iter().sum::<f64>() / 1024.0;
            println!("{name}: {mean:.5} nats, {expected:.5} expected");
            assert!((mean - expected).abs() < 0.003, "{name}: {mean} for {expected}");
        }
    }

    // weights that stay quantised: the same in chunks, nearly the same token by token
    let quantised = Model::from_gguf(&mut Gguf::open(&model).unwrap(), Weights::Quantised).unwrap();
    let texts = session.corpus.evaluation().unwrap();
    for name in ["softmax", "merged:64,pool"] {
        let layers = attention(name).layers;
        let [chunks, steps] = [(&session.model, 512), (&quantised, 1)].map(|(model, size)| {
            let mut state = model.state(&layers).unwrap();
            let mut nats = Vec::new();
            for (read, next) in
                texts[0].tokens[..512].chunks(size).zip(texts[0].tokens[1..513].chunks(size))
            {
                let hidden = model.extend(&mut state, read).unwrap();
                let scores = model.logits(&mut state, &hidden);
                nats.extend(scores.outer_iter().zip(next).map(|(row, &next)| {
                    let top = row.fold(f32::NEG_INFINITY, |a, &b| a.max(b));
                    let sum: f64 = row.iter().map(|x| f64::from(x - top).exp()).sum();
                    sum.ln() - f64::from(row[next as usize] - top)
                }));
            }
            nats
        });
        let differences = || chunks.iter().zip(&steps).map(|(a, b)| b - a);
        let largest = differences().fold(0.0, |a: f64, b| a.max(b.abs()));
        let mean = differences().sum::<f64>() / 512.0;
        println!("{name}, quantised, token by token: {mean:+.1e} nats, {largest:.1e} at most");
        assert!(mean.abs() < 1e-3, "{name}: {mean:e}");
    }
    let whole =
        losses(&quantised, &attention("softmax").layers, texts, 2048, &ProgressBar::hidden())
            .unwrap();
    for range in [FIRST, SECOND] {
        let (found, expected) = (whole.mean(range.clone()), exact.mean(range));
        println!("quantised, in chunks: {found:?} nats for {expected:?}");
        assert!((found.unwrap() - expected.unwrap()).abs() < 1e-5);
    }

    for (name, expected) in ABOVE {
        let Attentions { layers, plan, .. } = attention(name);
        let found = read(&layers);
        for (range, expected) in [FIRST, SECOND].into_iter().zip(expected) {
            let above = found.mean(range.clone()).unwrap() - exact.mean(range.clone()).unwrap();
            let percent = 100.0 * above.exp_m1();
            println!("{name}, {range:?}: {percent:+.2} %, {expected:+.2} % expected");
            assert!(
                (percent - expected).abs() < 0.4,
                "{name}, {range:?}: {percent:+.2} % for {expected:+.2} %"
            );
        }
        let Some(plan) = plan else { continue };
        let same = plan.heads.heads().iter().filter(|head| EXACT.contains(head)).count();
        println!("exact heads: {:?}", plan.heads.heads());
        assert!(plan.heads.heads().len() == 9 && same >= 8, "{:?}", plan.heads.heads());
        let mut score = Score::default();
        for seed in 0..2 {
            let prompt = Task { pairs: 20, distance: 0 }
                .prompt(session.tokenizer().unwrap(), &[], seed)
                .unwrap();
            score += prompt.score(&session.model, &layers, &ProgressBar::hidden()).unwrap();
        }
        println!("{} of {} pairs recalled", score.right, score.asked);
        assert!(score.asked == 40 && score.right >= 32, "{score:?}");
    }
}
