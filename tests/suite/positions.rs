//! Kernels that know positions, and Linformer: what is theirs alone. (The checker in `common` has
//! the rest.)

use crate::common::checker::feed;
use crate::common::written::{RetentionFormula, retention_kernel};
use crate::common::{assert_close, normal, tokens, wide};
use dijiang::attention::naive::{linear::Recurrence, positional};
use dijiang::{
    Attention, CosFormer, EluFeatures, Error, FixedGates, Head, IdentityFeatures, LinearAttention,
    Linformer, Mask, MultiHead, Retention, Rotary, RotaryAttention, RotaryPairs, Scratch,
    SoftmaxAttention, StreamOptions,
};
use ndarray::{Array2, Array4, Axis, array, s};
use std::sync::Arc;

fn elu(d: usize) -> LinearAttention<EluFeatures<f64>> {
    LinearAttention::new(EluFeatures::new(d).unwrap())
}

fn kernels(d: usize) -> Vec<Arc<dyn Attention<f64>>> {
    let rotary = || Rotary::new(d).unwrap();
    vec![
        Arc::new(RotaryAttention::new(rotary(), elu(d))),
        Arc::new(RotaryAttention::new(rotary(), SoftmaxAttention::new(d).unwrap())),
        Arc::new(RotaryAttention::new(rotary(), CosFormer::new(d, 100).unwrap())),
        Arc::new(CosFormer::new(d, 100).unwrap()),
        Arc::new(Retention::new(d, 0.9).unwrap()),
        Arc::new(Retention::new(d, 0.99).unwrap().with_xpos()),
    ]
}

/// The query heads of a group get what each would get alone, from one state.
#[test]
fn groups_are_their_heads() {
    let (d, group, n) = (6, 3, 40);
    for kernel in kernels(d) {
        let q = Array4::from_shape_fn((2, 2 * group, n, d), |(b, h, t, i)| {
            (b + 7 * h + t * d + i) as f64
        })
        .mapv(f64::sin);
        let k =
            Array4::from_shape_fn((2, 2, n, d), |(b, h, t, i)| (b + 5 * h + t * d + 2 * i) as f64)
                .mapv(f64::cos);
        let layer = MultiHead::per_head(vec![kernel.clone(); 2 * group], 2).unwrap();
        for mask in [Mask::Causal, Mask::Full] {
            if mask == Mask::Full && format!("{kernel:?}").starts_with("Retention") {
                continue;
            }
            let out = layer.forward(q.view(), k.view(), k.view(), mask, None).unwrap();
            for (b, h) in [(0, 0), (1, 2), (1, 3), (0, 5)] {
                let (q, k) = (q.slice(s![b, h, .., ..]), k.slice(s![b, h / group, .., ..]));
                let alone = kernel.forward(q, k, k, mask).unwrap();
                assert_close(
                    &format!("{kernel:?}"),
                    &out.slice(s![b, h, .., ..]).to_owned(),
                    &alone,
                    64.0,
                );
            }
        }
        let whole = layer.forward(q.view(), k.view(), k.view(), Mask::Causal, None).unwrap();
        let mut stream = kernel.stream_with(StreamOptions::new(d).group(group)).unwrap();
        let mut out = Array4::<f64>::zeros((1, group, n, d));
        for rows in [0..1, 1..2, 2..30, 30..40] {
            let q = q.slice(s![1, group.., rows.clone(), ..]);
            let k = k.slice(s![1, 1, rows.clone(), ..]);
            stream
                .extend_heads(&mut [Head::group(q, k, k, out.slice_mut(s![0, .., rows, ..]))])
                .unwrap();
        }
        for h in 0..group {
            let exact = whole.slice(s![1, group + h, .., ..]).to_owned();
            assert_close("a group stream", &out.slice(s![0, h, .., ..]).to_owned(), &exact, 256.0);
        }
        let one = q.slice(s![0, 0, ..1, ..]);
        let error = stream.extend(one, one, one, out.slice_mut(s![0, 0, ..1, ..])).unwrap_err();
        assert!(matches!(error, Error::Shape { which: "q", axis: "heads", .. }));
        assert_eq!(stream.len(), n);
    }
}

/// A scratch serves any of them, nested or not, and says nothing of earlier calls.
#[test]
fn one_scratch_for_all() {
    let mut scratch = Scratch::new();
    for n in [30, 5, 90] {
        let [q, k, v] = tokens::<f64>(n, 4, 2, 1.0, n as u64);
        for kernel in kernels(4) {
            let mut out = Array2::from_elem((n, 2), f64::NAN);
            kernel
                .forward_heads(
                    &mut [Head::new(q.view(), k.view(), v.view(), out.view_mut())],
                    Mask::Causal,
                    &mut scratch,
                )
                .unwrap();
            assert_eq!(out, kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap());
        }
    }
}

/// A state of another kind of stream is refused, even of the same shape.
#[test]
fn states_belong_to_their_kernel() {
    let plain = elu(4);
    let turned = RotaryAttention::new(Rotary::new(4).unwrap(), plain.clone());
    let (mut plain, mut turned) = (plain.stream(2).unwrap(), turned.stream(2).unwrap());
    let input = tokens::<f64>(7, 4, 2, 1.0, 1);
    feed(&mut *plain, &input, &[7]);
    let state = plain.save().unwrap();
    let error = turned.restore(&state).unwrap_err();
    assert!(matches!(error, Error::State { which: "kernel", .. }), "{error}");
    assert!(turned.is_empty());
    feed(&mut *turned, &input, &[7]);
    let error = plain.restore(&turned.save().unwrap()).unwrap_err();
    assert!(matches!(error, Error::State { which: "kernel", .. }), "{error}");
    assert_eq!(plain.save().unwrap(), state);
}

/// Weights of the log weights are those of the forward pass.
#[test]
fn log_weights_know_positions() {
    let [q, k, _] = tokens::<f64>(9, 4, 1, 1.0, 3);
    let identity = Array2::eye(9);
    for kernel in kernels(4) {
        let Some(weights) = kernel.pair_weights() else {
            assert!(format!("{kernel:?}").starts_with("Retention")); // its weights have either sign
            continue;
        };
        let mut weights = weights.log_weights(q.view(), k.view()).unwrap().mapv(f64::exp);
        let out = kernel.forward(q.view(), k.view(), identity.view(), Mask::Full).unwrap();
        for mut row in weights.rows_mut() {
            let total = row.sum();
            row /= total;
        }
        assert_close(&format!("{kernel:?}"), &out, &weights, 4096.0);
    }
}

/// A rotation of other vectors than the kernel takes.
#[test]
fn a_rotation_of_another_size_is_reported() {
    let kernel = RotaryAttention::new(Rotary::new(6).unwrap(), elu(4));
    for d in [4, 6] {
        let x = normal::<f64>(3, d, 1.0, 0);
        let error = kernel.forward(x.view(), x.view(), x.view(), Mask::Causal).unwrap_err();
        assert!(matches!(error, Error::Shape { which: "q", .. }), "{error}");
    }
}

/// Numbers that leave the range when they are turned: the error says of which token.
#[test]
fn a_vector_too_large_to_turn_is_reported_with_its_row() {
    let kernel = RotaryAttention::new(Rotary::new(4).unwrap(), elu(4));
    for (in_keys, row) in [(false, 3), (false, 4), (true, 3)] {
        let [mut q, mut k] = [0, 1].map(|seed| normal::<f64>(5, 4, 1.0, seed));
        // by an angle of 3 or 4, with a cosine and a sine that add up to more than 1
        let x = if in_keys { &mut k } else { &mut q };
        x.row_mut(row).fill(f64::MAX);
        let error = kernel.forward(q.view(), k.view(), k.view(), Mask::Causal).unwrap_err();
        assert!(matches!(error, Error::Overflow { row: found, .. } if found == row), "{error}");
    }
}

/// The last position of cosFormer works, the one after it is an error that leaves the stream as it
/// was.
#[test]
fn cosformer_ends_at_its_length() {
    let kernel = CosFormer::<f32>::new(3, 20).unwrap();
    assert_eq!(kernel.max_len(), 20);
    let input = tokens::<f32>(21, 3, 2, 1.0, 1);
    let [q, k, v] = input.each_ref().map(|x| x.view());
    let [short_q, short_k, short_v] = [q, k, v].map(|x| x.split_at(Axis(0), 20).0);
    for mask in [Mask::Causal, Mask::Full] {
        kernel.forward(short_q, short_k, short_v, mask).unwrap();
        let error = kernel.forward(q, k, v, mask).unwrap_err();
        assert_eq!(error, Error::TooLong { max_len: 20, found: 21 });
    }
    assert!(kernel.forward(q, short_k, short_v, Mask::Full).is_err());
    assert!(kernel.forward(short_q, k, v, Mask::Full).is_err());
    let mut stream = kernel.stream(2).unwrap();
    let mut out = Array2::zeros((20, 2));
    stream.extend(short_q, short_k, short_v, out.view_mut()).unwrap();
    let state = stream.save().unwrap();
    let one = [q, k, v].map(|x| x.split_at(Axis(0), 20).1);
    let error = stream.extend(one[0], one[1], one[2], out.slice_mut(s![..1, ..])).unwrap_err();
    assert_eq!(error, Error::TooLong { max_len: 20, found: 21 });
    assert!(error.to_string().contains("21 tokens") && error.to_string().contains("at most 20"));
    assert_eq!(stream.save().unwrap(), state);
}

/// Without ε, a query that shares no positive column with any key has no weights.
#[test]
fn cosformer_without_epsilon_says_where_nothing_meets() {
    let kernel = CosFormer::<f64>::new(2, 10).unwrap().with_epsilon(0.0).unwrap();
    let (q, k) = (array![[1.0, 1.0], [0.0, 1.0]], array![[1.0, -1.0], [1.0, -1.0]]);
    let out = kernel.forward(q.view(), k.view(), k.view(), Mask::Full);
    assert_eq!(out, Err(Error::Normalizer { row: 1 }));
    let kernel = CosFormer::<f64>::new(2, 10).unwrap();
    let out = kernel.forward(q.view(), k.view(), k.view(), Mask::Full).unwrap();
    assert_close("the default", &out, &k, 1e3);
}

/// With E = F = 1 Linformer is softmax attention; with fewer tokens than columns, the first count.
#[test]
fn linformer_of_the_identity_is_softmax() {
    let identity = Array2::<f64>::eye(30);
    let kernel = Linformer::from_projections(5, identity.clone(), identity).unwrap();
    let softmax = SoftmaxAttention::<f64>::new(5).unwrap();
    let [q, k, v] = tokens::<f64>(30, 5, 3, 1.0, 2);
    let exact = softmax.forward(q.view(), k.view(), v.view(), Mask::Full).unwrap();
    let out = kernel.forward(q.view(), k.view(), v.view(), Mask::Full).unwrap();
    assert_close("identity", &out, &exact, 64.0);
    // a shorter sequence is one of zeros behind
    let zeros = |x: &Array2<f64>| {
        let mut x = x.clone();
        x.slice_mut(s![20.., ..]).fill(0.0);
        x
    };
    let kernel = Linformer::<f64>::new(5, 7, 30, 1).unwrap();
    let long = kernel.forward(q.view(), zeros(&k).view(), zeros(&v).view(), Mask::Full).unwrap();
    let rows = s![..20, ..];
    let short = kernel.forward(q.view(), k.slice(rows), v.slice(rows), Mask::Full).unwrap();
    assert_close("padding", &short, &long, 64.0);
    let more = normal::<f64>(31, 5, 1.0, 0);
    let error = kernel.forward(q.view(), more.view(), more.view(), Mask::Full).unwrap_err();
    assert_eq!(error, Error::TooLong { max_len: 30, found: 31 });
}

/// Entries of E and F are independent, of variance 1/rank; a shared projection is E.
#[test]
fn random_projections_of_linformer() {
    let kernel = Linformer::<f64>::new(5, 20, 3000, 9).unwrap();
    let [e, f] = kernel.projections();
    for x in [e, f] {
        assert_eq!(x.dim(), (20, 3000));
        assert!(x.mean().unwrap().abs() < 5.0 / (60_000.0 * 20.0_f64).sqrt());
        assert!((x.mapv(|x| x * x).mean().unwrap() * 20.0 - 1.0).abs() < 0.03);
    }
    assert!((&e * &f).mean().unwrap().abs() * 20.0 < 0.03);
    let shared = Linformer::<f64>::shared(5, 20, 3000, 9).unwrap();
    assert_eq!(shared.projections(), [e, e]);
    assert_eq!(shared.max_len(), 3000);
}

/// Long sums keep their digits: values and weights of one sign, in f32.
#[test]
fn linformer_of_many_tokens_stays_accurate() {
    let n = 100_000;
    let ones = Array2::<f32>::from_elem((2, n), 0.1);
    let kernel = Linformer::from_projections(1, ones.clone(), ones).unwrap();
    let v = normal::<f32>(n, 1, 1.0, 1) + 1.0_f32;
    let out = kernel.forward(v.slice(s![..1, ..]), v.view(), v.view(), Mask::Full).unwrap();
    let exact = v.iter().map(|x| f64::from(*x) * f64::from(0.1_f32)).sum::<f64>();
    assert_close("a sum", &out, &Array2::from_elem((1, 1), exact), 16.0);
}

/// What a map of the products themselves makes of zeros, and of the smallest numbers there are.
#[test]
fn identity_features_of_zeros_and_of_the_smallest_numbers() {
    let kernel = LinearAttention::new(IdentityFeatures::<f32>::new(2).unwrap())
        .with_scale(1.0)
        .unnormalized();
    let k = array![[0.0, 0.0], [1e-40, -1e-41], [0.0, 0.0]];
    let q = array![[1e10_f32, 0.0], [1e30, 1e30], [0.0, 0.0]];
    let v = array![[3.0], [2.0], [1.0]];
    for size in [1, 3] {
        let out = feed(
            &mut *kernel.stream(1).unwrap(),
            &[q.clone(), k.clone(), v.clone()],
            &vec![size; 3 / size],
        );
        let exact = array![[0.0], [2.0 * 1e30 * f64::from(1e-40_f32 - 1e-41)], [0.0]];
        assert_close("tiny", &out, &exact, 64.0);
    }
    assert_eq!(wide(&k)[[0, 0]], 0.0);
}

/// Over 100 000 tokens in f32, of which xPos would multiply keys by up to e^245, retention is the
/// recurrence in f64.
#[test]
fn long_retention_stays_accurate() {
    let (n, d, dv, period) = (100_000, 8, 3, 1024);
    let [q, k, v] = tokens::<f32>(period, d, dv, 1.0, 8);
    for (decay, pairs) in [
        (1.0, RotaryPairs::Interleaved),
        (1.0, RotaryPairs::Halves),
        (0.9995, RotaryPairs::Interleaved),
    ] {
        let angles = positional::rotary_angles(d, 10_000.0);
        let formula = RetentionFormula::new(d, decay, 0.5, pairs, true, &angles);
        let mut kept = vec![decay; d];
        for (([a, b], _), zeta) in formula.pairs.iter().zip(&formula.zeta) {
            for column in [*a, *b] {
                kept[column] *= zeta.powf(1.0 / 512.0);
            }
        }
        let rotary = Rotary::new(d).unwrap().with_pairs(pairs);
        let kernel = retention_kernel::<f32>(&formula, Some(&rotary), true);
        let mut stream = kernel.stream(dv).unwrap();
        let floats = stream.state_floats();
        let mut out = Array2::<f32>::zeros((period, dv));
        let mut state = Recurrence::new(d, dv);
        let (mut worst, mut size) = (0.0_f64, 0.0_f64);
        let mut t = 0;
        // prefills of many lengths, and single tokens
        for piece in [700, 1, 1, 130, 1, 64, 127].into_iter().cycle() {
            let start = t % period;
            let count = usize::min(piece, period - start).min(n - t);
            let rows = s![start..start + count, ..];
            stream
                .extend(q.slice(rows), k.slice(rows), v.slice(rows), out.slice_mut(rows))
                .unwrap();
            for row in start..start + count {
                let turned = |x: &Array2<f32>| {
                    let x = wide(&x.slice(s![row..=row, ..]).to_owned());
                    positional::rotate(&x, t, &formula.pairs)
                };
                state.step(turned(&k).row(0), v.row(row).mapv(f64::from).view(), |i| kept[i]);
                let exact = state.read(turned(&q).row(0)) * formula.scale;
                size = size.max(exact.iter().fold(0.0, |m, x| m.max(x.abs())));
                worst = worst.max(
                    (&exact - &out.row(row).mapv(f64::from))
                        .iter()
                        .fold(0.0, |m, x| m.max(x.abs())),
                );
                t += 1;
            }
            if t == n {
                break;
            }
        }
        assert_eq!((stream.len(), stream.state_floats()), (n, floats));
        let units = worst / size / f64::from(f32::EPSILON);
        assert!(units < 32.0, "decay {decay} {pairs:?}: {units} units of epsilon");
    }
}

/// Retention without rotation and decay is linear attention over the products; with decay it has no
/// full form.
#[test]
fn retention_without_positions_is_products() {
    let [q, k, v] = tokens::<f64>(20, 5, 2, 1.0, 3);
    let still = Rotary::partial(5, 0).unwrap();
    let kernel = Retention::new(5, 1.0).unwrap().with_rotary(still.clone()).unwrap();
    assert_eq!((kernel.decay(), kernel.rotary()), (1.0, &still));
    let products = LinearAttention::new(IdentityFeatures::<f64>::new(5).unwrap()).unnormalized();
    for mask in [Mask::Causal, Mask::Full] {
        let exact = products.forward(q.view(), k.view(), v.view(), mask).unwrap();
        let out = kernel.forward(q.view(), k.view(), v.view(), mask).unwrap();
        assert_close("products", &out, &exact, 4.0);
    }
    for kernel in [Retention::new(5, 0.9).unwrap(), Retention::new(5, 1.0).unwrap().with_xpos()] {
        let error = kernel.forward(q.view(), k.view(), v.view(), Mask::Full).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }
}

/// A gated kernel inside a rotation gets the log decays of its tokens.
#[test]
fn gated_kernels_turn() {
    let (n, d) = (70, 4);
    let [q, k, v] = tokens::<f64>(n, d, 2, 1.0, 5);
    let log_decay = normal::<f64>(n, d, 0.1, 9).mapv(|x| -x.abs());
    let rotary = Rotary::new(d).unwrap();
    let turned = [&q, &k].map(|x| {
        let mut x = x.clone();
        rotary.rotate_in_place(x.view_mut(), 0).unwrap();
        x
    });
    let exact = FixedGates::new(elu(d).gated(), log_decay.clone());
    let exact = exact.forward(turned[0].view(), turned[1].view(), v.view(), Mask::Causal).unwrap();
    let kernel = RotaryAttention::new(rotary, elu(d).gated());
    let kernel = FixedGates::new(kernel, log_decay);
    assert_close(
        "forward",
        &kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap(),
        &exact,
        4.0,
    );
    let out = feed(&mut *kernel.stream(2).unwrap(), &[q, k, v], &[3, 1, 1, 60, 5]);
    assert_close("a stream", &out, &exact, 256.0);
}

/// The same for the query heads of a group, in a layer and in its streams.
#[test]
fn gated_groups_turn() {
    let (n, d, group) = (40, 4, 3);
    let q =
        Array4::from_shape_fn((1, group, n, d), |(_, h, t, i)| ((7 * h + t * d + i) as f64).sin());
    let [_, k, v] = tokens::<f64>(n, d, 2, 1.0, 6);
    let log_decay = normal::<f64>(n, 1, 0.1, 9).mapv(|x| -x.abs());
    let kernel = RotaryAttention::new(Rotary::new(d).unwrap(), elu(d).gated());
    let layer = MultiHead::new(kernel.clone(), group, 1).unwrap();
    let head = |x: &Array2<f64>| x.clone().insert_axis(Axis(0)).insert_axis(Axis(0));
    let (k4, v4, decay4) = (head(&k), head(&v), head(&log_decay));
    let [mut whole, mut parts] = [(); 2].map(|()| Array4::<f64>::zeros((1, group, n, 2)));
    layer
        .forward_gated(q.view(), k4.view(), v4.view(), decay4.view(), None, whole.view_mut())
        .unwrap();
    let mut stream = layer.stream(1, 2).unwrap();
    for rows in [0..1, 1..30, 30..40] {
        let at = s![.., .., rows, ..];
        let (q, k, v, decay) = (q.slice(&at), k4.slice(&at), v4.slice(&at), decay4.slice(&at));
        stream.extend_gated(q, k, v, decay, None, parts.slice_mut(&at)).unwrap();
    }
    let alone = FixedGates::new(kernel, log_decay);
    for h in 0..group {
        let at = s![0, h, .., ..];
        let exact = alone.forward(q.slice(at), k.view(), v.view(), Mask::Causal).unwrap();
        assert_close("a layer", &whole.slice(at).to_owned(), &exact, 4.0);
        assert_close("its streams", &parts.slice(at).to_owned(), &exact, 256.0);
    }
}
