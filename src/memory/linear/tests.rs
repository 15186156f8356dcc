//! Tests of the two halves of a decode step.
#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]

use super::*;
use crate::features::elementwise::IdentityFeatures;
use crate::features::performer::Performer;
use crate::memory::linear::decay::Decay;
use crate::views;
use ndarray::{Array3, Axis};

const HEAD_DIM: usize = 4;
const VALUE_DIM: usize = 3;
const TOKENS: usize = 40;

/// Tokens of one kind, with queries for three heads.
struct Case {
    q: Array3<f32>,
    k: Array2<f32>,
    v: Array2<f32>,
    log_decay: Option<Array2<f32>>,
    decay: Decay,
    readout: Readout,
}

/// Numbers that look random, from −1 to 1.
fn number(i: usize) -> f32 {
    let x = (i as f64 * 12.9898 + 1.0).sin() * 43_758.547;
    (2.0 * (x - x.floor()) - 1.0) as f32
}

fn cases(features: usize) -> Vec<Case> {
    let mut cases = Vec::new();
    for (sizes, readout) in [
        ([1.0, 1.0], Readout::Normalized),
        ([1.0, 1.0], Readout::Unnormalized),
        ([1.0, 1e4], Readout::Unnormalized),
        ([1.0, 1e20], Readout::Normalized),
        ([1.0, 1e20], Readout::Unnormalized),
        ([1.0, 1e36], Readout::Normalized),
        ([1.0, 3e38], Readout::Unnormalized),
        ([1.0, 1e-41], Readout::Normalized),
        ([1e-41, 1.0], Readout::Normalized),
        ([1e-41, 1e-41], Readout::Unnormalized),
        ([9.0, 1.0], Readout::Normalized),
        ([9.0, 1e6], Readout::Unnormalized),
        ([1e4, 1.0], Readout::Normalized),
        ([1e19, 1e36], Readout::Normalized),
    ] {
        for decays in 0..5 {
            let [of_key, of_value] = sizes;
            let mut decay = Decay::default();
            let mut log_decay = None;
            match decays {
                1 => decay.common = 0.9,
                2 => decay.channels = Some((0..features).map(|i| 1.0 / (1.0 + i as f64)).collect()),
                3 | 4 => {
                    decay.gated = true;
                    let width = if decays == 3 { 1 } else { features };
                    let gate = |(t, i)| match t % 9 {
                        5 => f32::NEG_INFINITY,
                        7 => -80.0,
                        _ => -number(t * 31 + i).abs(),
                    };
                    log_decay = Some(Array2::from_shape_fn((TOKENS, width), gate));
                }
                _ => {}
            }
            cases.push(Case {
                q: Array3::from_shape_fn((3, TOKENS, HEAD_DIM), |(h, t, i)| {
                    of_key * number(h * 999 + t * HEAD_DIM + i)
                }),
                k: Array2::from_shape_fn((TOKENS, HEAD_DIM), |(t, i)| {
                    of_key * number(5000 + t * HEAD_DIM + i)
                }),
                v: Array2::from_shape_fn((TOKENS, VALUE_DIM), |(t, i)| {
                    of_value * number(9000 + t * VALUE_DIM + i)
                }),
                log_decay,
                decay,
                readout,
            });
        }
    }
    cases
}

impl Case {
    fn heads(&self, token: usize, heads: usize) -> impl ExactSizeIterator<Item = Tokens<'_, f32>> {
        (0..heads).map(move |head| Tokens {
            q: views::rows(self.q.index_axis(Axis(0), head), token..token + 1),
            k: views::rows(self.k.view(), token..token + 1),
            v: views::rows(self.v.view(), token..token + 1),
            log_decay: self.log_decay.as_ref().map(|x| views::rows(x.view(), token..token + 1)),
        })
    }
}

/// Every bit of a state.
fn bits<F: FeatureMap<f32>>(memory: &LinearMemory<f32, F>) -> (Vec<u32>, usize) {
    let numbers = memory.numbers();
    let all = numbers.iter().chain([&memory.state.scale.high, &memory.state.scale.low]);
    (all.map(|x| x.to_bits()).collect(), memory.state.tokens)
}

/// Runs all cases as steps and as halves of steps; returns how many were safe, and how many not.
fn compare<F: FeatureMap<f32> + 'static>(map: F) -> [usize; 2] {
    let map = Arc::new(map);
    let mut counts = [0; 2];
    for (case, heads) in cases(map.num_features()).iter().flat_map(|case| [(case, 1), (case, 3)]) {
        let mut whole = LinearMemory::new(Arc::clone(&map), VALUE_DIM, 0.5).unwrap();
        let mut halves = whole.clone();
        let (mut work, mut other_work) = (Workspace::new(), Workspace::new());
        let decay = LogDecay::of(&case.decay, map.num_features()).unwrap();
        for token in 0..TOKENS {
            let [mut expected, mut found] =
                [(); 2].map(|()| Array3::from_elem((heads, 1, VALUE_DIM), f32::NAN));
            let result = whole.extend_group(
                case.heads(token, heads),
                decay.as_ref(),
                expected.view_mut(),
                case.readout,
                &mut work,
            );
            let before = bits(&halves);
            let safe = halves.map_step(
                case.heads(token, heads),
                decay.as_ref(),
                case.readout,
                &mut other_work,
            );
            assert_eq!(bits(&halves), before, "the first half changes nothing");
            let Ok(safe) = safe else {
                assert!(result.is_err());
                continue;
            };
            counts[usize::from(!safe)] += 1;
            let finished = halves.finish_step(found.view_mut(), case.readout, &mut other_work);
            assert_eq!(finished, result);
            assert!(!safe || finished.is_ok(), "{finished:?} after a first half that was safe");
            if finished.is_ok() {
                let bits = |x: &Array3<f32>| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&found), bits(&expected));
            }
            assert_eq!(bits(&halves), bits(&whole));
        }
    }
    counts
}

#[test]
fn halves_of_a_step_are_the_step_and_what_is_safe_succeeds() {
    let positive = compare(Performer::new(HEAD_DIM, 13, 1).unwrap());
    let signed = compare(IdentityFeatures::new(HEAD_DIM).unwrap());
    for [safe, unsafe_] in [positive, signed] {
        assert!(safe > 500 && unsafe_ > 500, "both happen: {safe} {unsafe_}");
    }
}

#[test]
fn ordinary_steps_are_safe_from_the_first_token_on() {
    for case in cases(13).iter().take(10) {
        let map = Arc::new(Performer::new(HEAD_DIM, 13, 1).unwrap());
        let mut memory = LinearMemory::new(map, VALUE_DIM, 0.5).unwrap();
        let decay = LogDecay::of(&case.decay, 13).unwrap();
        let mut work = Workspace::new();
        let mut out = Array3::zeros((3, 1, VALUE_DIM));
        for token in 0..TOKENS {
            let heads = case.heads(token, 3);
            assert!(memory.map_step(heads, decay.as_ref(), case.readout, &mut work).unwrap());
            memory.finish_step(out.view_mut(), case.readout, &mut work).unwrap();
        }
    }
}
