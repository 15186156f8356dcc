//! A layer's stream: all heads move or none, and the caller's checkpoints stay the caller's.

use crate::common::alibi::alibi;
use crate::common::normal;
use dijiang::{
    Attention, CosFormer, EluFeatures, Error, Far, HybridAttention, LinearAttention, MultiHead,
    MultiHeadStream, Performer, Retention, Rotary, RotaryAttention, SoftmaxAttention,
};
use ndarray::{Array2, Array4, s};
use std::sync::Arc;

pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const D: usize = 8;

pub fn kernels() -> Vec<(&'static str, Arc<dyn Attention<f64>>)> {
    let linear = || LinearAttention::new(Performer::<f64>::new(D, 12, 1).unwrap());
    let hybrid = || HybridAttention::<f64>::builder(D).window(6).sinks(2);
    let far = Arc::new(Performer::<f64>::new(D, 12, 1).unwrap());
    vec![
        ("softmax", Arc::new(SoftmaxAttention::new(D).unwrap())),
        ("linear", Arc::new(linear())),
        ("unnormalized", Arc::new(linear().unnormalized())),
        ("decay", Arc::new(linear().with_decay(0.9))),
        ("elu", Arc::new(LinearAttention::new(EluFeatures::new(D).unwrap()))),
        ("retention", Arc::new(Retention::new(D, 0.95).unwrap().with_xpos())),
        ("cosformer", Arc::new(CosFormer::new(D, 1000).unwrap())),
        ("rotary", Arc::new(RotaryAttention::new(Rotary::new(D).unwrap(), linear()))),
        ("window", Arc::new(hybrid().far(Far::none()).build().unwrap())),
        ("merged", Arc::new(hybrid().far(Far::merged(5)).build().unwrap())),
        ("features", Arc::new(hybrid().far(Far::features(far)).build().unwrap())),
        ("one's own", Arc::new(alibi::<f64>(D, 0.1))),
    ]
}

/// Layers of one kernel: a state for each kv head, for each query head, and a pool.
pub fn layers() -> Vec<(String, MultiHead<f64>)> {
    let mut layers = Vec::new();
    for (name, kernel) in kernels() {
        let shared = MultiHead::new(Arc::clone(&kernel), HEADS, KV_HEADS).unwrap();
        if let Ok(pooled) = shared.clone().pooled() {
            layers.push((format!("{name}, pooled"), pooled));
        }
        layers.push((name.to_owned(), shared));
        layers.push((format!("{name}, alone"), MultiHead::new(kernel, HEADS, HEADS).unwrap()));
    }
    layers
}

/// Tokens of two sequences.
struct Tokens {
    q: Array4<f64>,
    k: Array4<f64>,
    v: Array4<f64>,
}

fn tokens(layer: &MultiHead<f64>, n: usize, seed: u64) -> Tokens {
    let draw = |heads: usize, d: usize, seed: u64| {
        let numbers: Array2<f64> = normal(2 * heads * n, d, 0.8, seed);
        numbers.into_shape_with_order((2, heads, n, d)).unwrap()
    };
    let kv = layer.kv_heads();
    Tokens { q: draw(HEADS, D, seed), k: draw(kv, D, seed + 1), v: draw(kv, 3, seed + 2) }
}

fn extend(stream: &mut MultiHeadStream<f64>, x: &Tokens) -> Result<Array4<f64>, Error> {
    let mut out = Array4::from_elem((2, HEADS, x.q.dim().2, 3), f64::NAN);
    stream.extend(x.q.view(), x.k.view(), x.v.view(), None, out.view_mut())?;
    Ok(out)
}

#[test]
fn steps_of_a_layer_leave_the_checkpoints_of_its_heads() {
    for (name, layer) in layers() {
        let mut stream = layer.stream(2, 3).unwrap();
        extend(&mut stream, &tokens(&layer, 10, 1)).unwrap();
        for (sequence, head) in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)] {
            assert!(stream.head_mut(sequence, head).unwrap().checkpoint(), "{name}");
        }
        let draft = tokens(&layer, 1, 50);
        let first = extend(&mut stream, &draft).unwrap();
        for seed in [60, 70] {
            extend(&mut stream, &tokens(&layer, 1, seed)).unwrap();
        }
        let mut bad = tokens(&layer, 4, 80);
        bad.q[[1, 3, 3, 0]] = f64::NAN;
        extend(&mut stream, &bad).unwrap_err();
        assert_eq!(stream.lengths(), [13, 13]);
        for (sequence, head) in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)] {
            stream.head_mut(sequence, head).unwrap().rollback().unwrap();
        }
        assert_eq!(stream.lengths(), [10, 10], "{name}");
        assert_eq!(extend(&mut stream, &draft).unwrap(), first, "{name}: as from the checkpoint");
    }
}

#[test]
fn a_layer_goes_back_to_its_checkpoint() {
    for (name, layer) in layers() {
        let mut stream = layer.stream(2, 3).unwrap();
        assert!(matches!(stream.rollback(), Err(Error::Unsupported { .. })), "{name}");
        extend(&mut stream, &tokens(&layer, 20, 1)).unwrap();
        stream.checkpoint();
        let draft = tokens(&layer, 5, 9);
        let first = extend(&mut stream, &draft).unwrap();
        for _ in 0..3 {
            extend(&mut stream, &tokens(&layer, 1, 30)).unwrap();
            stream.rollback().unwrap();
            assert_eq!(stream.lengths(), [20, 20], "{name}");
            assert_eq!(extend(&mut stream, &draft).unwrap(), first, "{name}");
        }
        // one head has lost its checkpoint: nobody moves
        stream.head_mut(1, 3).unwrap().reset();
        let lengths = stream.lengths();
        let error = stream.rollback().unwrap_err();
        assert!(matches!(error, Error::InHead { sequence: 1, .. }), "{name}: {error}");
        assert!(matches!(error.inner(), Error::Unsupported { .. }), "{name}: {error}");
        assert_eq!(stream.lengths(), lengths, "{name}");
        assert_eq!(stream.head(0, 0).unwrap().len(), 25, "{name}");
        stream.reset();
        assert!(matches!(stream.rollback(), Err(Error::Unsupported { .. })), "{name}");
        assert_eq!(stream.lengths(), [0, 0]);
    }
}

#[test]
fn a_layer_is_saved_and_restored() {
    for (name, layer) in layers() {
        let mut stream = layer.stream(2, 3).unwrap();
        extend(&mut stream, &tokens(&layer, 20, 1)).unwrap();
        let saved = match stream.save() {
            Ok(saved) => saved,
            Err(error) => {
                assert!(name.starts_with("one's own"), "{name}: {error}");
                continue;
            }
        };
        let next = tokens(&layer, 3, 5);
        let expected = extend(&mut stream, &next).unwrap();
        let mut other = layer.stream(2, 3).unwrap();
        extend(&mut other, &tokens(&layer, 7, 40)).unwrap(); // dirty
        other.checkpoint();
        other.restore(&saved).unwrap();
        assert!(other.rollback().is_err(), "{name}: restored since");
        assert_eq!(extend(&mut other, &next).unwrap(), expected, "{name}");
        let mut single = layer.stream(1, 3).unwrap();
        assert!(matches!(single.restore(&saved), Err(Error::State { .. })), "{name}");
        assert_eq!(single.lengths(), [0]);
    }
}

/// A head that fails in the middle of a layer, by bad input or out of range, moves none.
#[test]
fn a_failing_head_leaves_the_others_bit_for_bit() {
    for (name, layer) in layers() {
        let mut stream = layer.stream(2, 3).unwrap();
        let mut twin = layer.stream(2, 3).unwrap();
        for stream in [&mut stream, &mut twin] {
            extend(stream, &tokens(&layer, 12, 1)).unwrap();
        }
        let last = layer.kv_heads() - 1;
        for n in [1, 2, 9] {
            for (bad, is_refused) in [(f64::NAN, true), (f64::INFINITY, true), (1e300, false)] {
                for which in 0..4 {
                    let mut x = tokens(&layer, n, 100 + n as u64);
                    match which {
                        0 => x.q[[1, HEADS - 1, n - 1, 2]] = bad,
                        1 => x.k[[1, last, n - 1, 2]] = bad,
                        2 => x.v[[1, last, n - 1, 2]] = bad,
                        _ => {
                            // alone they are in range, their score is not
                            x.q[[1, HEADS - 1, n - 1, 2]] = bad;
                            x.k[[1, last, n - 1, 2]] = bad;
                        }
                    }
                    let mut copy = stream.clone();
                    match extend(&mut copy, &x) {
                        Ok(out) => {
                            assert!(!is_refused, "{name} {bad} in argument {which}");
                            assert!(out.iter().all(|x| x.is_finite()), "{name}");
                            continue;
                        }
                        Err(_) => assert_eq!(copy.lengths(), stream.lengths(), "{name}"),
                    }
                    // the same call on the stream itself, then one that both make
                    extend(&mut stream, &x).unwrap_err();
                    let next = tokens(&layer, n, 7);
                    let found = extend(&mut stream, &next).unwrap();
                    assert_eq!(found, extend(&mut twin, &next).unwrap(), "{name} n={n} {bad}");
                }
            }
        }
    }
}

/// Steps of large numbers, which a head cannot promise to survive, are steps all the same.
#[test]
fn a_layer_of_huge_numbers_is_its_heads() {
    let kernel: Arc<dyn Attention<f64>> =
        Arc::new(LinearAttention::new(EluFeatures::new(D).unwrap()));
    let layer = MultiHead::new(Arc::clone(&kernel), HEADS, KV_HEADS).unwrap();
    let mut stream = layer.stream(2, 3).unwrap();
    let mut single = kernel.stream(3).unwrap();
    for t in 0..40 {
        let mut x = tokens(&layer, 1, t);
        if t % 3 == 0 {
            x.v.mapv_inplace(|v| v * 1e290);
            x.k.mapv_inplace(|k| k * 1e20);
        }
        let out = extend(&mut stream, &x).unwrap();
        let mut alone = Array2::zeros((1, 3));
        let (q, k) = (x.q.slice(s![1, 2, .., ..]), x.k.slice(s![1, 1, .., ..]));
        single.extend(q, k, x.v.slice(s![1, 1, .., ..]), alone.view_mut()).unwrap();
        assert_eq!(out.slice(s![1, 2, .., ..]), alone, "step {t}");
    }
}
