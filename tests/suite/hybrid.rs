//! What only hybrids promise: groups, pools, the same bits for any split, clear errors.

use crate::common::hybrid::{FarFormula, HybridFormula};
use crate::common::{RECEIVED, assert_close, hybrid, normal, tokens};
use dijiang::attention::naive::options::Options;
use dijiang::{
    Attention, Calibration, CalibrationOptions, Error, Far, Head, HybridAttention, Mask, Memory,
    Merged, Metric, MultiHead, Partial, Performer, Scratch, Sharing, SoftmaxAttention, StateFormat,
    Stream, StreamOptions, StreamState, Ward, fidelity,
};
use ndarray::{Array1, Array2, Array3, Array4, ArrayView2, Axis, s};
use proptest::prelude::*;
use std::sync::Arc;

fn merged(window: usize, sinks: usize, block: usize) -> HybridFormula {
    let far = FarFormula::Merged(crate::common::hybrid::Received { block, ..RECEIVED });
    let options = Options::default();
    HybridFormula {
        window,
        sinks,
        heavy: 0,
        far,
        calibration: None,
        metric: None,
        format: StateFormat::F32,
        options,
    }
}

fn random(shape: (usize, usize, usize, usize), seed: u64) -> Array4<f64> {
    let (b, h, n, d) = shape;
    Array4::from_shape_vec(
        shape,
        normal::<f64>(b * h * n, d, 1.0, seed).into_raw_vec_and_offset().0,
    )
    .unwrap()
}

/// Heads `[kv][group]` of one sequence, and what the formula gives.
fn exact(
    formula: &HybridFormula,
    [q, k, v]: [&Array4<f64>; 3],
    b: usize,
    pooled: bool,
) -> Array3<f64> {
    let group = q.dim().1 / k.dim().1;
    let head = |x: &Array4<f64>, h: usize| x.slice(s![b, h, .., ..]).to_owned();
    let heads: Vec<usize> = (0..k.dim().1).collect();
    let queries: Vec<Vec<Array2<f64>>> = heads
        .iter()
        .map(|kv| (kv * group..(kv + 1) * group).map(|h| head(q, h)).collect())
        .collect();
    let [k, v]: [Vec<Array2<f64>>; 2] =
        [k, v].map(|x| heads.iter().map(|&kv| head(x, kv)).collect());
    let out = formula.causal(&queries, &k, &v, 1.0 / (q.dim().3 as f64).sqrt(), pooled);
    let views: Vec<_> = out.iter().flatten().map(|x| x.view()).collect();
    ndarray::stack(Axis(0), &views).unwrap()
}

#[test]
fn groups_and_pools_are_their_formulas() {
    let [q, k, v] =
        [random((2, 6, 130, 8), 1), random((2, 2, 130, 8), 2), random((2, 2, 130, 5), 3)];
    for block in [1, 4] {
        let formula = merged(12, 3, block);
        for pooled in [false, true] {
            let layer = MultiHead::new(hybrid::<f64>(&formula, 8, 0), 6, 2).unwrap();
            let layer = if pooled { layer.pooled().unwrap() } else { layer };
            let out = layer.forward(q.view(), k.view(), v.view(), Mask::Causal, None).unwrap();
            for b in 0..2 {
                let exact = exact(&formula, [&q, &k, &v], b, pooled);
                for (h, exact) in exact.outer_iter().enumerate() {
                    let what = format!("block {block} pooled {pooled} sequence {b} head {h}");
                    assert_close(
                        &what,
                        &out.slice(s![b, h, .., ..]).to_owned(),
                        &exact.to_owned(),
                        1e5,
                    );
                }
            }
            // a stream, in pieces, one of which fails half-way
            let mut stream = layer.stream(2, 5).unwrap();
            let mut found = Array4::zeros(out.dim());
            for (start, end) in [(0, 1), (1, 60), (60, 61), (61, 130)] {
                let piece = |x: &Array4<f64>| x.slice(s![.., .., start..end, ..]).to_owned();
                let mut bad = piece(&v);
                bad[[1, 1, end - start - 1, 4]] = f64::NAN;
                let mut slot = Array4::zeros((2, 6, end - start, 5));
                assert!(
                    stream
                        .extend(
                            piece(&q).view(),
                            piece(&k).view(),
                            bad.view(),
                            None,
                            slot.view_mut()
                        )
                        .is_err()
                );
                assert_eq!(stream.lengths(), [start; 2]);
                stream
                    .extend(
                        piece(&q).view(),
                        piece(&k).view(),
                        piece(&v).view(),
                        None,
                        slot.view_mut(),
                    )
                    .unwrap();
                found.slice_mut(s![.., .., start..end, ..]).assign(&slot);
            }
            assert_eq!(found, out, "the same bits");
            let one = 3 * 13 + (12 + block - 1) * 14 + 12 * 15 + 8 + 1;
            assert_eq!(stream.state_floats(), 2 * 2 * one);
            assert_eq!(layer.state_bytes(5, 1_000_000).unwrap(), 2 * one * 8);
            // save, restore
            let saved = stream.head(1, 4).unwrap().save().unwrap();
            let mut other = layer.stream(2, 5).unwrap();
            other.head_mut(1, 4).unwrap().restore(&saved).unwrap();
            assert_eq!(other.head(1, 4).unwrap().save().unwrap(), saved);
        }
    }
}

/// Kernels differ by head: exact ones, pooled ones, and query heads of one kv head with kernels of
/// their own.
#[test]
fn mixtures() {
    let [q, k, v] = [random((1, 8, 90, 8), 4), random((1, 4, 90, 8), 5), random((1, 4, 90, 8), 6)];
    let formula = merged(10, 2, 1);
    let exact_kernel: Arc<dyn Attention<f64>> = Arc::new(SoftmaxAttention::new(8).unwrap());
    let kernel: Arc<dyn Attention<f64>> = Arc::new(hybrid::<f64>(&formula, 8, 0));
    let kernels = vec![kernel.clone(), exact_kernel.clone(), kernel.clone(), exact_kernel];
    let layer = MultiHead::per_kv_head(kernels, 8).unwrap();
    assert_eq!(layer.poolable(), [0, 2]);
    let layer = layer.pooled().unwrap();
    assert_eq!(layer.poolable(), [0_usize; 0], "pooled already");
    let out = layer.forward(q.view(), k.view(), v.view(), Mask::Causal, None).unwrap();
    let pick = |x: &Array4<f64>, of: &[usize]| x.select(Axis(1), of);
    let pool = exact(
        &formula,
        [&pick(&q, &[0, 1, 4, 5]), &pick(&k, &[0, 2]), &pick(&v, &[0, 2])],
        0,
        true,
    );
    for (i, h) in [0, 1, 4, 5].into_iter().enumerate() {
        let found = out.slice(s![0, h, .., ..]).to_owned();
        assert_close("pooled", &found, &pool.index_axis(Axis(0), i).to_owned(), 1e5);
    }
    for h in [2, 3, 6, 7] {
        let [q, k, v] = [
            q.slice(s![0, h, .., ..]),
            k.slice(s![0, h / 2, .., ..]),
            v.slice(s![0, h / 2, .., ..]),
        ];
        let exact = SoftmaxAttention::new(8).unwrap().forward(q, k, v, Mask::Causal).unwrap();
        assert_eq!(out.slice(s![0, h, .., ..]), exact);
    }
    let per_token = 2 * 16 * 8;
    let bytes = |tokens| layer.state_bytes(8, tokens).unwrap();
    assert_eq!(
        bytes(2000) - bytes(1000),
        1000 * per_token,
        "only the exact heads grow, one state for two query heads"
    );

    let own = vec![kernel, Arc::new(hybrid::<f64>(&merged(10, 2, 1), 8, 0))];
    let layer = MultiHead::per_head(own, 1).unwrap();
    assert!(matches!(layer.clone().pooled(), Err(Error::Unsupported { .. })));
    let (q, k, v) =
        (q.slice(s![.., ..2, .., ..]), k.slice(s![.., ..1, .., ..]), v.slice(s![.., ..1, .., ..]));
    let out = layer.forward(q, k, v, Mask::Causal, None).unwrap();
    let alone = hybrid::<f64>(&formula, 8, 0);
    for h in 0..2 {
        let [q, k, v] =
            [q.slice(s![0, h, .., ..]), k.slice(s![0, 0, .., ..]), v.slice(s![0, 0, .., ..])];
        assert_eq!(out.slice(s![0, h, .., ..]), alone.forward(q, k, v, Mask::Causal).unwrap());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// Merging depends on what was read before: any split gives the same bits all the same.
    #[test]
    fn any_split_gives_the_same_bits(
        (window, sinks, block, entries) in (0_usize..20, 0_usize..5, 1_usize..10, 1_usize..20),
        (d, dv, group) in (1_usize..20, 1_usize..20, 1_usize..4),
        kind in 0_usize..3,
        sizes in prop::collection::vec(0_usize..50, 1..6),
        seed in 0_u64..1000,
    ) {
        let n: usize = sizes.iter().sum();
        prop_assume!(n > 0);
        let far = match kind {
            0 => Merged::new(entries).block(block).min_age(3).into(),
            1 => Ward::new(entries).block(block).into(),
            _ => Far::none(),
        };
        prop_assume!(kind < 2 || window > 0);
        let builder = HybridAttention::<f32>::builder(d).window(window).sinks(sinks);
        let kernel = builder.far(far).build().unwrap();
        let [_, k, v] = tokens::<f32>(n, d, dv, 1.0, seed);
        let q = normal::<f32>(group * n, d, 1.0, seed + 7);
        let q = q.into_shape_with_order((group, n, d)).unwrap();
        let run = |sizes: &[usize]| {
            let mut stream = kernel.stream_with(StreamOptions::new(dv).group(group)).unwrap();
            let (mut out, mut start) = (Array3::zeros((group, n, dv)), 0);
            for size in sizes {
                let rows = start..start + size;
                let out = out.slice_mut(s![.., rows.clone(), ..]);
                let q = q.slice(s![.., rows.clone(), ..]);
                let (k, v) = (k.slice(s![rows.clone(), ..]), v.slice(s![rows, ..]));
                stream.extend_heads(&mut [Head::group(q, k, v, out)]).unwrap();
                start += size;
            }
            (out, stream.save().unwrap())
        };
        let whole = run(&[n]);
        prop_assert_eq!(&run(&sizes), &whole);
        prop_assert_eq!(&run(&vec![1; n]), &whole);
    }
}

fn error(far: impl Into<Far<f64>>) -> Error {
    HybridAttention::<f64>::builder(4).far(far).build().unwrap_err()
}

#[test]
fn options_that_cannot_be_used() {
    let option = |error: Error, expected: &str| match error {
        Error::InvalidOption { which, .. } => assert_eq!(which, expected),
        other => panic!("{other}"),
    };
    option(error(Merged::new(4).decay(0.0)), "decay");
    option(error(Merged::new(4).decay(f64::NAN)), "decay");
    option(error(Merged::new(4).value_weight(-1.0)), "value_weight");
    option(error(Far::taylor(2)), "calibration");
    let [q, k, _] = tokens::<f64>(100, 4, 1, 1.0, 1);
    let calibration =
        Calibration::from_samples(q.view(), k.view(), CalibrationOptions::new()).unwrap();
    option(error(Merged::new(4).metric(Metric::Identity).calibrated(&calibration)), "metric");
    assert!(matches!(error(Far::merged(0)), Error::ZeroSize { .. }));
    assert!(matches!(error(Merged::new(4).block(0)), Error::ZeroSize { .. }));
    assert!(matches!(error(Far::features(Performer::new(5, 8, 0).unwrap())), Error::Shape { .. }));
    for far in
        [Far::merged(usize::MAX / 2), Far::ward(1 << 60), Merged::new(3).block(usize::MAX).into()]
    {
        assert!(matches!(error(far), Error::InvalidOption { .. }));
    }
    let builder = || HybridAttention::<f64>::builder(4);
    option(builder().window(0).sinks(0).far(Far::none()).build().unwrap_err(), "window");
    option(builder().heavy(3).build().unwrap_err(), "calibration");
    option(builder().scale(-1.0).build().unwrap_err(), "scale");
    option(builder().window(usize::MAX).build().unwrap_err(), "window");
    assert!(matches!(HybridAttention::<f64>::builder(0).build(), Err(Error::ZeroSize { .. })));
}

/// Huge norms, denormals, zeros, equal tokens: finite, and within the values.
#[test]
fn extreme_tokens() {
    let kernels: Vec<HybridAttention<f32>> = vec![
        hybrid(&merged(6, 1, 1), 4, 0),
        hybrid(&merged(6, 1, 4), 4, 0),
        hybrid(
            &HybridFormula { far: FarFormula::Ward { entries: 5, block: 1 }, ..merged(6, 1, 1) },
            4,
            0,
        ),
    ];
    for kernel in kernels {
        for (key_size, value_size) in [
            (1e-42_f32, 1.0),
            (0.0, 1.0),
            (1e9, 1.0),
            (1e18, 1e-42),
            (1.0, 0.0),
            (1.0, 1e36),
            (1e-20, 1e25),
        ] {
            let [q, k, v] = tokens::<f32>(120, 4, 3, 1.0, 8);
            let (k, v) = (k * key_size, v * value_size);
            let q = q / key_size.clamp(1e-10, 1e10);
            let out = kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap();
            for (x, column) in out.columns().into_iter().zip(v.columns()) {
                let largest = column.fold(0.0_f32, |m, x| m.max(x.abs()));
                assert!(x.iter().all(|x| x.abs() <= largest * 1.0001), "{key_size} {value_size}");
            }
        }
        let x = Array2::<f32>::ones((100, 4));
        let out = kernel.forward(x.view(), x.view(), x.view(), Mask::Causal).unwrap();
        assert!(out.iter().all(|x| (x - 1.0).abs() < 1e-5));
    }
}

/// A stream with a far memory of one's own cannot be saved, says so, and works otherwise.
#[test]
fn a_memory_of_ones_own() {
    let far = Far::memory(|value_dim, scale| {
        Ok(Box::new(dijiang::ExactMemory::<f64>::new(4, value_dim, scale)?))
    });
    let kernel = HybridAttention::builder(4).window(3).sinks(1).far(far).build().unwrap();
    assert_eq!(kernel.sharing(), Sharing::Group); // one memory for all heads that read it
    let [q, k, v] = tokens::<f64>(40, 4, 3, 1.0, 9);
    let mut stream = kernel.stream(3).unwrap();
    let mut out = Array2::zeros((40, 3));
    stream.extend(q.view(), k.view(), v.view(), out.view_mut()).unwrap();
    let exact = SoftmaxAttention::new(4)
        .unwrap()
        .forward(q.view(), k.view(), v.view(), Mask::Causal)
        .unwrap();
    assert_close("exact far memory", &out, &exact, 64.0);
    assert!(matches!(stream.save(), Err(Error::Unsupported { .. })));
    assert!(stream.checkpoint());
    let mut bad = v.clone();
    bad[[39, 2]] = f64::INFINITY;
    assert!(stream.extend(q.view(), k.view(), bad.view(), out.view_mut()).is_err());
    assert_eq!(stream.len(), 40);
    stream.extend(q.view(), k.view(), v.view(), out.view_mut()).unwrap();
    stream.rollback().unwrap();
    assert_eq!((stream.len(), stream.state_floats()), (40, 7 + 3 * 7 + 36 * 7));
    stream.reset();
    let mut again = Array2::zeros((40, 3));
    stream.extend(q.view(), k.view(), v.view(), again.view_mut()).unwrap();
    assert_close("after a reset", &again, &exact, 64.0);
    assert_eq!(stream.state_floats(), 7 + 3 * 7 + 36 * 7);
}

/// A score that leaves the range of the type: the error says at which token, whichever head of the
/// group it is.
#[test]
fn a_score_too_large_is_reported_with_its_row() {
    let kernel =
        HybridAttention::<f64>::builder(4).window(6).sinks(1).far(Far::merged(6)).build().unwrap();
    for head in [0, 1] {
        let [q, k, v] = tokens::<f64>(20, 4, 3, 1.0, 8);
        let mut queries = ndarray::stack![Axis(0), q, q];
        queries[[head, 11, 0]] = 1e200;
        let k = k * 1e200;
        let mut out = Array3::zeros((2, 20, 3));
        let call = Head::group(queries.view(), k.view(), v.view(), out.view_mut());
        let error =
            kernel.forward_heads(&mut [call], Mask::Causal, &mut Scratch::new()).unwrap_err();
        assert!(matches!(error, Error::Overflow { row: 11, .. }), "{head}: {error}");
    }
}

/// A memory whose weight, where the first number of a query is 0, takes back that of the window.
#[derive(Clone, Debug)]
struct Owing;

impl Memory<f64> for Owing {
    fn absorb(&mut self, _: ArrayView2<'_, f64>, _: ArrayView2<'_, f64>) -> Result<(), Error> {
        Ok(())
    }

    fn read(&self, q: ArrayView2<'_, f64>, answer: &mut Partial<f64>) -> Result<(), Error> {
        let weights = q.column(0).mapv(|x| if x == 0.0 { -4.0 } else { 0.0 });
        let (nothing, log_scale) = (Array2::zeros((q.nrows(), 3)), Array1::zeros(q.nrows()));
        answer.merge(&Partial::from_parts(nothing, weights, log_scale)?)
    }

    fn state_floats(&self) -> usize {
        0
    }
}

/// Nothing to divide by: the error says at which token, whichever head of the group it is.
#[test]
fn a_weight_of_nothing_is_reported_with_its_row() {
    let far = Far::memory(|_, _| Ok(Box::new(Owing)));
    let kernel = HybridAttention::builder(4).window(3).sinks(1).far(far).build().unwrap();
    for head in [0, 1] {
        let [q, k, v] = tokens::<f64>(20, 4, 3, 1.0, 8);
        let mut queries = ndarray::stack![Axis(0), q, q];
        queries.slice_mut(s![head, 11, ..]).fill(0.0); // four tokens of weight 1
        let mut out = Array3::zeros((2, 20, 3));
        let call = Head::group(queries.view(), k.view(), v.view(), out.view_mut());
        let error =
            kernel.forward_heads(&mut [call], Mask::Causal, &mut Scratch::new()).unwrap_err();
        assert_eq!(error, Error::Normalizer { row: 11 }, "{head}");
    }
}

/// The metric of a calibration is scaled to mean 1: values weigh the same whatever its size.
#[test]
fn the_size_of_a_calibrated_metric_does_not_matter() {
    let [q, k, v] = tokens::<f64>(80, 4, 3, 1.0, 20);
    let [small, large] = [1.0, 1024.0].map(|size| {
        let samples = &q * size;
        let options = CalibrationOptions::new();
        let calibration = Calibration::from_samples(samples.view(), k.view(), options).unwrap();
        let far = Merged::new(4).value_weight(1.0).calibrated(&calibration);
        let kernel = HybridAttention::builder(4).window(3).sinks(1).far(far).build().unwrap();
        kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap()
    });
    assert_close("a larger metric", &large, &small, 1024.0);
}

/// The columns that show the weights take no part in what is merged.
#[test]
fn measuring_leaves_the_output_as_it_is() {
    let [q, k, v] = tokens::<f64>(80, 4, 3, 1.0, 20);
    let forward = |kernel: &dyn Attention<f64>| {
        kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap()
    };
    let exact = forward(&SoftmaxAttention::new(4).unwrap());
    for far in [Far::from(Ward::new(4)), Far::from(Merged::new(4).value_weight(1.0))] {
        let kernel = HybridAttention::builder(4).window(3).sinks(1).far(far).build().unwrap();
        let report =
            fidelity::compare(&kernel, q.view(), k.view(), v.view(), Mask::Causal).unwrap();
        let square = |x: &Array2<f64>| x.mapv(|x| x * x).sum();
        let error = (square(&(forward(&kernel) - &exact)) / square(&exact)).sqrt();
        assert!((report.output_error - error).abs() < 1e-12, "{report:?}, not {error}");
    }
}

/// Keys beyond all samples: weights at their bound, distances whose inverse vanishes. What is gone
/// is not merged again.
#[test]
fn calibrated_ward_with_foreign_keys() {
    let [q, k, _] = tokens::<f64>(200, 2, 1, 1.0, 20);
    let calibration =
        Calibration::from_samples(q.view(), k.view(), CalibrationOptions::new()).unwrap();
    for size in [1.0_f32, 1e12, 1e14, 1e15, 1e18] {
        let [q, k, v] = tokens::<f32>(100, 2, 2, 1.0, 21);
        let k = k.mapv(|x| (x + 2.0) * size);
        let far = Ward::new(2).calibrated(&calibration).block(6);
        let kernel = HybridAttention::builder(2).window(2).sinks(0).far(far).build().unwrap();
        let mut stream = kernel.stream(2).unwrap();
        let mut out = Array2::zeros((100, 2));
        stream.extend(q.view(), k.view(), v.view(), out.view_mut()).unwrap();
        assert!(out.iter().all(|x| x.is_finite()));
        stream.restore(&stream.save().unwrap()).unwrap(); // as many entries as there should be
    }
}

/// Whatever a stream accepts, its state can be saved and restored.
#[test]
fn large_numbers_are_saved_and_restored() {
    let [q, k, _] = tokens::<f64>(100, 4, 1, 1.0, 22);
    let calibration =
        Calibration::from_samples(q.view(), k.view(), CalibrationOptions::new().with_window(8))
            .unwrap();
    for (which, heavy) in [(0, 0), (1, 2), (2, 0)] {
        let mut input = tokens::<f32>(60, 4, 3, 1.0, 23);
        input[which].mapv_inplace(|x| x * 1e20);
        if which < 2 {
            input[1 - which].mapv_inplace(|x| x * 1e-20);
        }
        let builder =
            HybridAttention::builder(4).window(8).sinks(1).heavy(heavy).far(Far::merged(6));
        let builder = if heavy > 0 { builder.calibrated(&calibration) } else { builder };
        let kernel = builder.build().unwrap();
        let [q, k, v] = &input;
        let mut stream = kernel.stream(3).unwrap();
        let mut out = Array2::zeros((60, 3));
        stream.extend(q.view(), k.view(), v.view(), out.view_mut()).unwrap();
        let mut other = kernel.stream(3).unwrap();
        other.restore(&stream.save().unwrap()).unwrap();
        let mut again = out.clone();
        stream.extend(q.view(), k.view(), v.view(), out.view_mut()).unwrap();
        other.extend(q.view(), k.view(), v.view(), again.view_mut()).unwrap();
        assert_eq!(out, again, "input {which}");
    }
}

/// States that no stream can have are refused, before anything depends on them.
#[test]
fn damaged_states() {
    let [q, k, v] = tokens::<f64>(40, 3, 2, 1.0, 24);
    for (far, block, kind) in [(Far::merged(4), 1, 2), (Ward::new(4).block(3).into(), 3, 1)] {
        let kernel = HybridAttention::builder(3).window(5).sinks(2).far(far).build().unwrap();
        let mut stream = kernel.stream(2).unwrap();
        stream.extend(q.view(), k.view(), v.view(), Array2::zeros((40, 2)).view_mut()).unwrap();
        let saved = stream.save().unwrap();
        let shape = vec![1, 3, 2, 5, 2, 0, block, 4, kind, 1];
        let held = 2 + 5 + (40 - 2 - 5) % block;
        let count = held * 6 + 1 + 4 * 7 + 1 + 3;
        let numbers = saved.numbers("hybrid", &shape, count).unwrap().to_vec();
        let refused = |tokens: usize, numbers: Vec<f64>| {
            let state = StreamState::new("hybrid", tokens, shape.clone(), numbers);
            let before = kernel.stream(2).unwrap().save().unwrap();
            let mut stream = kernel.stream(2).unwrap();
            assert!(matches!(stream.restore(&state), Err(Error::State { .. })));
            assert_eq!(stream.save().unwrap(), before);
        };
        refused(usize::MAX, numbers.clone());
        for (at, value) in
            [(5, -1.0), (held * 6, 5.0), (held * 6, -1.0), (held * 6, 3.5), (count - 1, -1.0)]
        {
            let mut bad = numbers.clone();
            bad[at] = value;
            refused(40, bad);
        }
        for column in [5, 6] {
            let mut bad = numbers.clone();
            bad[held * 6 + 1 + column] = 0.0; // a count, a weight
            refused(40, bad);
        }
        let mut more = numbers.clone();
        let entry = more[held * 6 + 1..held * 6 + 8].to_vec();
        more[held * 6] += 1.0;
        more.splice(held * 6 + 1..held * 6 + 1, entry);
        refused(40, more);
    }
}

/// A kernel that hands its public methods on to a hybrid behaves as one in a layer.
#[test]
fn a_wrapped_hybrid() {
    #[derive(Debug)]
    struct Wrapped(HybridAttention<f64>);
    impl Attention<f64> for Wrapped {
        fn forward_heads(
            &self,
            heads: &mut [Head<'_, f64>],
            mask: Mask,
            scratch: &mut Scratch<f64>,
        ) -> Result<(), Error> {
            self.0.forward_heads(heads, mask, scratch)
        }
        fn stream(&self, value_dim: usize) -> Result<Box<dyn Stream<f64>>, Error> {
            self.0.stream(value_dim)
        }
        fn stream_with(&self, options: StreamOptions) -> Result<Box<dyn Stream<f64>>, Error> {
            self.0.stream_with(options)
        }
    }
    let [q, k, v] =
        [random((1, 4, 80, 8), 31), random((1, 2, 80, 8), 32), random((1, 2, 80, 8), 33)];
    let layer = MultiHead::new(Wrapped(hybrid(&merged(8, 2, 1), 8, 0)), 4, 2).unwrap();
    let whole = layer.forward(q.view(), k.view(), v.view(), Mask::Causal, None).unwrap();
    let mut out = Array4::zeros(whole.dim());
    layer.stream(1, 8).unwrap().extend(q.view(), k.view(), v.view(), None, out.view_mut()).unwrap();
    assert_eq!(out, whole);
    let plain = MultiHead::new(hybrid::<f64>(&merged(8, 2, 1), 8, 0), 4, 2).unwrap();
    assert_eq!(plain.forward(q.view(), k.view(), v.view(), Mask::Causal, None).unwrap(), whole);
}
