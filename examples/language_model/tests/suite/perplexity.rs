//! Losses, windows of texts, recall: against the forward pass in `f64` and by hand.

use crate::common::naive::Naive;
use crate::common::{Sizes, Written, argmax, session, softmax, tokens};
use indicatif::ProgressBar;
use language_model::perplexity::{CHUNK, loss_of, losses, windows};
use language_model::recall::{MOST_PAIRS, Prompt, Score, Task, copying};
use language_model::session::Session;
use language_model::texts::Text;
use ndarray::{Array1, s};
use std::collections::BTreeSet;
use std::ops::Range;

fn tiny() -> (Session, Written, Naive) {
    let sizes = Sizes { seed: 80, ..Sizes::default() };
    let (session, written) = session(&sizes, 100);
    let naive = Naive::read(&sizes, &written.path);
    (session, written, naive)
}

fn named(name: &str, tokens: Vec<u32>) -> Text {
    Text { name: name.to_owned(), tokens }
}

#[test]
fn losses_are_those_of_the_formula() {
    let (session, _file, naive) = tiny();
    let model = &session.model;
    let bar = ProgressBar::hidden();
    // one window and a rest that is left out; a text shorter than the context; a window of several
    // chunks
    let texts = [named("one", tokens(150, 300, 1)), named("two", tokens(31, 300, 2))];
    let found = losses(model, &softmax(model), &texts, 70, &bar).unwrap();
    let expected = [&texts[0].tokens[..71], &texts[0].tokens[70..141], &texts[1].tokens]
        .map(|read| naive.losses(read));
    assert_eq!(
        found.windows.iter().map(|w| w.0.as_str()).collect::<Vec<_>>(),
        ["one", "one", "two"]
    );
    assert_eq!(bar.position(), 70 + 70 + 30);
    for ((_, found), expected) in found.windows.iter().zip(&expected) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-4, "{found} {expected}");
        }
    }
    let all: Vec<f64> = expected.concat();
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    assert!((found.mean(0..usize::MAX).unwrap() - mean(&all)).abs() < 1e-4);
    let second: Vec<f64> =
        expected.iter().flat_map(|window| window.iter().skip(20)).copied().collect();
    assert!((found.perplexity(20..70).unwrap().ln() - mean(&second)).abs() < 1e-4);
    let last: Vec<f64> = expected[..2].iter().flat_map(|window| &window[40..]).copied().collect();
    assert!((found.mean(40..500).unwrap() - mean(&last)).abs() < 1e-4);
    assert_eq!((found.mean(70..80), found.mean(5..5), found.longest()), (None, None, 70));
}

#[test]
fn chunks_do_not_show() {
    let (session, _file, naive) = tiny();
    let model = &session.model;
    let text = named("long", tokens(CHUNK + 40, 300, 3));
    let found =
        losses(model, &softmax(model), std::slice::from_ref(&text), 2048, &ProgressBar::hidden())
            .unwrap();
    let expected = naive.losses(&text.tokens);
    assert_eq!(found.windows[0].1.len(), expected.len());
    for (found, expected) in found.windows[0].1.iter().zip(&expected) {
        assert!((found - expected).abs() < 1e-4, "{found} {expected}");
    }
}

#[test]
fn windows_follow_each_other() {
    let text = |count: u32| named("text", (0..count).collect());
    let of = |count, context| {
        let text = text(count);
        windows(&text, context).into_iter().map(|w| (w[0], w[w.len() - 1])).collect::<Vec<_>>()
    };
    assert_eq!(of(21, 10), [(0, 10), (10, 20)]);
    assert_eq!(of(20, 10), [(0, 10)]);
    assert_eq!(of(30, 10), [(0, 10), (10, 20)]);
    assert_eq!(of(31, 10), [(0, 10), (10, 20), (20, 30)]);
    assert_eq!(of(11, 10), [(0, 10)]);
    assert_eq!(of(10, 10), [(0, 9)]);
    assert_eq!(of(2, 10), [(0, 1)]);
}

#[test]
fn what_predicts_nothing_is_refused() {
    let (session, _file, _) = tiny();
    let layers = softmax(&session.model);
    let of = |texts: &[Text], context| {
        losses(&session.model, &layers, texts, context, &ProgressBar::hidden())
    };
    let error = of(&[named("short", vec![5])], 10).unwrap_err().to_string();
    assert!(error.contains("`short` has a single token"), "{error}");
    assert!(of(&[named("none", vec![])], 10).is_err());
    assert!(
        of(&[named("some", vec![1, 2, 3])], 0).unwrap_err().to_string().contains("context of 0")
    );
    assert!(
        of(&[named("far", vec![1, 300, 3])], 10).unwrap_err().to_string().contains("token 300")
    );
    assert_eq!(of(&[], 10).unwrap().mean(0..10), None);
}

#[test]
fn losses_of_large_and_small_scores() {
    let logits = Array1::from(vec![1000.0_f32, 1000.0, -1000.0]);
    assert!((loss_of(logits.view(), 0) - 2.0_f64.ln()).abs() < 1e-6);
    assert!((loss_of(logits.view(), 2) - 2000.0 - 2.0_f64.ln()).abs() < 1e-3);
}

/// Names and codes of the lines of a list.
fn pairs(list: &str) -> Vec<(&str, &str)> {
    list.lines().map(|line| line.split_once(": ").unwrap()).collect()
}

#[test]
fn lists_are_what_they_say() {
    let (session, _file, _) = tiny();
    let tokenizer = session.tokenizer().unwrap();
    let prose: Vec<u32> = tokenizer.encode("Some prose. ").unwrap();
    for (count, distance, seed) in [(1, 0, 0), (5, 7, 1), (20, 100, 2), (MOST_PAIRS, 0, 3)] {
        let task = Task { pairs: count, distance };
        let prompt = task.prompt(tokenizer, &prose, seed).unwrap();
        assert_eq!(prompt, task.prompt(tokenizer, &prose, seed).unwrap());
        let text = tokenizer.decode(&prompt.tokens).unwrap();
        let (first, second) =
            text.split_once("\nHere is the same list again, in another order.\n\n").unwrap();
        let (first, between) = first
            .strip_prefix("Here is a list of names and their codes.\n\n")
            .unwrap()
            .split_once("\n\n")
            .unwrap();
        assert_eq!(tokenizer.encode_more(between).unwrap().len(), distance);
        assert!("Some prose. ".repeat(distance).starts_with(between));
        let (first, second) = (pairs(first), pairs(second));
        assert_eq!((first.len(), second.len()), (count, count));
        assert_eq!(first.iter().collect::<BTreeSet<_>>(), second.iter().collect::<BTreeSet<_>>());
        assert_eq!(first.iter().map(|pair| pair.0).collect::<BTreeSet<_>>().len(), count);
        assert_eq!(first == second, count == 1);
        // the places of the answers hold the digits of the second list, and nothing else
        let answers: Vec<String> = prompt
            .answers
            .iter()
            .map(|answer| tokenizer.decode(&prompt.tokens[answer.clone()]).unwrap())
            .collect();
        assert_eq!(answers, second.iter().map(|pair| pair.1).collect::<Vec<_>>());
        assert!(
            answers
                .iter()
                .all(|code| code.len() == 4 && code.bytes().all(|byte| byte.is_ascii_digit()))
        );
        for (answer, (name, _)) in prompt.answers.iter().zip(&second) {
            let before = tokenizer.decode(&prompt.tokens[..answer.start]).unwrap();
            assert!(before.ends_with(&format!("\n{name}: ")), "{before}");
        }
    }
    let other = |seed| Task { pairs: 5, distance: 0 }.prompt(tokenizer, &[], seed).unwrap();
    assert_ne!(other(0), other(1));
    for pairs in [0, MOST_PAIRS + 1] {
        assert!(
            Task { pairs, distance: 0 }
                .prompt(tokenizer, &prose, 0)
                .unwrap_err()
                .to_string()
                .contains("1 to 80")
        );
    }
    let error = Task { pairs: 2, distance: 1 }.prompt(tokenizer, &[], 0).unwrap_err().to_string();
    assert!(error.contains("no prose"), "{error}");
}

#[test]
fn copies_ask_for_all_but_the_first_token() {
    let text = named("text", vec![7, 8, 9, 10]);
    let prompt = copying(&text, 3).unwrap();
    assert_eq!(prompt.tokens, [7, 8, 9, 7, 8, 9]);
    assert_eq!(prompt.answers, [4..5, 5..6]);
    assert_eq!(copying(&text, 4).unwrap().answers.len(), 3);
    for length in [0, 1, 5] {
        let error = copying(&text, length).unwrap_err().to_string();
        assert!(
            error.contains(&format!("cannot copy {length} tokens of `text`, which has 4")),
            "{error}"
        );
    }
}

/// Answers that the naive model would give.
fn by_hand(naive: &Naive, prompt: &Prompt) -> Score {
    let logits = naive.logits(&prompt.tokens);
    let right = |answer: &mut Range<usize>| {
        answer.all(|place| argmax(logits.row(place - 1)) == prompt.tokens[place])
    };
    Score {
        right: prompt
            .answers
            .iter()
            .cloned()
            .map(|mut answer| right(&mut answer))
            .filter(|&right| right)
            .count(),
        asked: prompt.answers.len(),
    }
}

#[test]
fn answers_are_counted_right() {
    let (session, _file, naive) = tiny();
    let (model, layers) = (&session.model, softmax(&session.model));
    // a text of the model's own choosing in which some tokens are changed: right answers and wrong
    // ones, in both chunks and across them
    let mut read = tokens(20, 300, 5);
    let mut state = model.state(&layers).unwrap();
    let mut hidden = model.extend(&mut state, &read).unwrap();
    while read.len() < CHUNK + 60 {
        let last = hidden.slice(s![hidden.nrows() - 1.., ..]).to_owned();
        let best = argmax(model.logits(&mut state, &last).mapv(f64::from).row(0));
        let next = if read.len().is_multiple_of(7) { (best + 1) % 300 } else { best };
        read.push(next);
        hidden = model.extend(&mut state, &[next]).unwrap();
    }
    let answers = vec![
        22..25,
        26..30,
        29..31,
        35..36,
        36..37,
        41..43,
        508..511,
        510..514,
        512..518,
        519..523,
        560..567,
    ];
    let prompt = Prompt { tokens: read, answers };
    let bar = ProgressBar::hidden();
    let found = prompt.score(model, &layers, &bar).unwrap();
    assert_eq!(found, by_hand(&naive, &prompt));
    // wrong where 7 divides a place
    assert_eq!(found, Score { right: 6, asked: 11 });
    assert_eq!(bar.position(), prompt.tokens.len() as u64);
    assert!((found.share() - 6.0 / 11.0).abs() < 1e-12);
}

#[test]
fn prompts_are_scored_as_by_hand() {
    let (session, _file, naive) = tiny();
    let (model, layers) = (&session.model, softmax(&session.model));
    let mut sum = Score::default();
    let mut prompts = vec![copying(&named("text", tokens(40, 300, 6)), 40).unwrap()];
    // a text of one token over and over is what a model without training copies
    prompts.extend((0..20).map(|token| copying(&named("text", vec![token; 12]), 12).unwrap()));
    prompts.push(
        Task { pairs: 3, distance: 10 }
            .prompt(session.tokenizer().unwrap(), &[5, 6, 7], 0)
            .unwrap(),
    );
    for prompt in &prompts {
        let found = prompt.score(model, &layers, &ProgressBar::hidden()).unwrap();
        assert_eq!(found, by_hand(&naive, prompt));
        sum += found;
    }
    assert_eq!(sum.asked, 39 + 20 * 11 + 3);
    assert!((20..240).contains(&sum.right), "{} right: the test sees little", sum.right);
    assert_eq!(Score::default().share(), 0.0);
}
