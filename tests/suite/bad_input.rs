//! The constructors and tools with sizes, numbers and options that cannot be used: an error that
//! says which, no panic. (The checker in `common` does the same for every kernel, stream and map.)

use crate::common::normal;
use dijiang::fidelity::{Reference, compare, rate};
use dijiang::projection::{chi_quantile, normal_quantile};
use dijiang::{
    Attention, CosFormer, DctFeatures, EluFeatures, Error, ExactMemory, FeatureMap, Head,
    HybridAttention, IdentityFeatures, LinearAttention, LinearMemory, Linformer, Mask, Memory,
    MergedMemory, OfficialDijiang, Partial, Performer, Points, Radii, ReluFeatures, Retention,
    Rotary, SoftmaxAttention, Stream, StreamState, Taylor, TaylorFeatures, WeightFit, Wpff,
    fit_weights,
};
use ndarray::{Array1, Array2, array};
use std::sync::Arc;

fn zero<T>(result: Result<T, Error>) {
    assert!(matches!(result.err(), Some(Error::ZeroSize { .. })));
}

fn shape<T>(result: Result<T, Error>) {
    assert!(matches!(result.err(), Some(Error::Shape { .. })));
}

fn option<T>(result: Result<T, Error>) {
    assert!(matches!(result.err(), Some(Error::InvalidOption { .. })));
}

fn not_finite<T>(result: Result<T, Error>) {
    assert!(matches!(result.err(), Some(Error::NotFinite { .. })));
}

#[test]
fn sizes_of_maps() {
    const HUGE: usize = usize::MAX;
    zero(SoftmaxAttention::<f32>::new(0));
    zero(TaylorFeatures::<f32>::new(0));
    option(TaylorFeatures::<f32>::new(HUGE));
    zero(EluFeatures::<f32>::new(0));
    zero(IdentityFeatures::<f32>::new(0));
    zero(ReluFeatures::<f32>::new(0));
    for (d, m) in [(0, 4), (4, 0), (0, 0)] {
        zero(Performer::<f32>::new(d, m, 0));
        zero(Performer::<f32>::iid(d, m, 0));
        zero(Performer::<f32>::hyperbolic(d, m, 0));
        zero(DctFeatures::<f32>::new(d, m, 0));
        zero(Wpff::<f32>::new(d, m, 0));
        zero(Wpff::<f32>::with_sampling(d, m, 0, Points::Sobol, Radii::Sobol));
        zero(Performer::<f32>::from_projection(Array2::zeros((m, d))));
        zero(ReluFeatures::<f32>::from_projection(Array2::zeros((m, d))));
    }
    option(Performer::<f32>::new(HUGE, 2, 0));
    option(Performer::<f32>::new(2, HUGE, 0));
    option(DctFeatures::<f32>::new(HUGE, HUGE, 0));
    option(Wpff::<f32>::new(1 << 20, 1 << 20, 0));
    option(Performer::<f32>::hyperbolic(4, 7, 0));
    option(DctFeatures::<f32>::new(4, 7, 0).unwrap().with_radii(Radii::Antithetic));
    zero(OfficialDijiang::<f32>::new(array![]));
}

#[test]
fn sizes_of_kernels() {
    const HUGE: usize = usize::MAX;
    let softmax = SoftmaxAttention::<f32>::new(HUGE).unwrap();
    assert_eq!(softmax.state_floats(3, 5), Ok(HUGE));
    option(softmax.stream(3).map(|_| ()));
    zero(CosFormer::<f32>::new(0, 4));
    zero(CosFormer::<f32>::new(4, 0));
    option(CosFormer::<f32>::new(HUGE, 4));
    CosFormer::<f32>::new(4, HUGE).unwrap();
    for epsilon in [-1.0, f64::NAN, f64::INFINITY, 1e300] {
        option(CosFormer::<f32>::new(4, 4).unwrap().with_epsilon(epsilon));
    }
    for (d, rank, max_len) in [(0, 2, 4), (2, 0, 4), (2, 4, 0)] {
        zero(Linformer::<f32>::new(d, rank, max_len, 0));
        zero(Linformer::<f32>::shared(d, rank, max_len, 0));
        zero(Linformer::<f32>::from_projections(
            d,
            Array2::zeros((rank, max_len)),
            Array2::zeros((rank, max_len)),
        ));
    }
    for (d, rank, max_len) in [(HUGE, 2, 2), (2, HUGE, 2), (2, 2, HUGE), (2, 1 << 20, 1 << 20)] {
        option(Linformer::<f32>::new(d, rank, max_len, 0));
        option(Linformer::<f32>::shared(d, rank, max_len, 0));
    }
    let parts = |f| Linformer::<f32>::from_projections(2, Array2::zeros((3, 4)), f);
    shape(parts(Array2::zeros((2, 4))));
    shape(parts(Array2::zeros((3, 5))));
    not_finite(parts(Array2::from_elem((3, 4), f32::NAN)));
    not_finite(Linformer::from_projections(2, array![[f32::INFINITY]], array![[1.0]]));
    zero(Retention::<f32>::new(0, 0.5));
    option(Retention::<f32>::new(HUGE, 0.5));
    for decay in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
        option(Retention::<f32>::new(4, decay));
    }
    shape(Retention::<f32>::new(4, 0.5).unwrap().with_rotary(Rotary::new(6).unwrap()));
}

#[test]
fn numbers_of_maps() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        not_finite(Performer::from_projection(array![[1.0, bad]]));
        not_finite(ReluFeatures::from_projection(array![[1.0, bad]]));
        not_finite(OfficialDijiang::new(array![1.0, bad]));
        not_finite(Wpff::from_parts(array![[1.0, bad]], array![1.0], array![1.0]));
        not_finite(Wpff::from_parts(array![[1.0, 0.0]], array![bad], array![1.0]));
        option(Wpff::from_parts(array![[1.0, 0.0]], array![1.0], array![bad]));
        option(Performer::<f32>::new(2, 2, 0).unwrap().with_weights(array![1.0, bad]));
        option(DctFeatures::<f32>::new(2, 2, 0).unwrap().with_weights(array![1.0, bad]));
        option(ReluFeatures::<f32>::new(2).unwrap().with_epsilon(f64::from(bad)));
    }
    // finite parts whose product is not
    not_finite(Wpff::from_parts(array![[f32::MAX, 0.0]], array![2.0], array![1.0]));
    option(ReluFeatures::<f32>::new(2).unwrap().with_epsilon(-1.0));
    option(ReluFeatures::<f32>::new(2).unwrap().with_epsilon(1e300));
    for weights in [array![1.0, -0.5], array![0.0, 0.0]] {
        option(Performer::<f32>::new(2, 2, 0).unwrap().with_weights(weights.clone()));
        option(Wpff::<f32>::new(2, 2, 0).unwrap().with_weights(weights.clone()));
        option(DctFeatures::<f32>::new(2, 2, 0).unwrap().with_weights(weights));
    }
    for weights in [array![], array![1.0], array![1.0, 1.0, 1.0]] {
        shape(Performer::<f32>::new(2, 2, 0).unwrap().with_weights(weights.clone()));
        shape(Wpff::<f32>::new(2, 2, 0).unwrap().with_weights(weights.clone()));
        shape(DctFeatures::<f32>::new(2, 2, 0).unwrap().with_weights(weights));
    }
    shape(Wpff::from_parts(array![[1.0_f32, 0.0]], array![1.0, 2.0], array![1.0]));
    shape(Wpff::from_parts(array![[1.0_f32, 0.0]], array![1.0], array![1.0, 2.0]));
    // radii of the other map
    option(DctFeatures::<f32>::new(4, 8, 0).unwrap().with_radii(Radii::Sobol));
    for radii in [Radii::Antithetic, Radii::Normal] {
        option(Wpff::<f32>::with_sampling(4, 8, 0, Points::Sobol, radii));
    }
}

/// A scale that cannot be used is reported by every call that would use it.
#[test]
fn scales() {
    let x = normal::<f32>(3, 4, 1.0, 0);
    let map = || Performer::<f32>::new(4, 8, 0).unwrap();
    for scale in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e300, 1e-300] {
        let linformer = Linformer::new(4, 2, 3, 0).unwrap().with_scale(scale);
        option(linformer.forward(x.view(), x.view(), x.view(), Mask::Full));
        let kernels: [Box<dyn Attention<f32>>; 3] = [
            Box::new(SoftmaxAttention::new(4).unwrap().with_scale(scale)),
            Box::new(LinearAttention::new(map()).with_scale(scale)),
            Box::new(Retention::new(4, 0.5).unwrap().with_scale(scale)),
        ];
        for kernel in kernels {
            option(kernel.forward(x.view(), x.view(), x.view(), Mask::Causal));
            option(kernel.stream(4));
            if let Some(weights) = kernel.pair_weights() {
                option(weights.log_weights(x.view(), x.view()));
            }
        }
        option(ExactMemory::<f32>::new(4, 4, scale));
        option(LinearMemory::<f32, _>::new(Arc::new(map()), 4, scale));
        option(fit_weights(&map(), x.view(), x.view(), WeightFit::new().with_scale(scale)));
    }
    for scale in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        option(Reference::with_scale(x.view(), x.view(), x.view(), Mask::Causal, scale));
    }
}

#[test]
fn memories() {
    let map = Arc::new(Performer::<f64>::new(4, 8, 0).unwrap());
    zero(LinearMemory::<f64, _>::new(map.clone(), 0, 1.0));
    option(LinearMemory::<f64, _>::new(map.clone(), usize::MAX, 1.0));
    zero(ExactMemory::<f64>::new(0, 2, 1.0));
    zero(ExactMemory::<f64>::new(2, 0, 1.0));
    zero(Partial::<f64>::new(2, 0));
    let (k, v) = (normal::<f64>(70, 4, 1.0, 0), normal::<f64>(70, 3, 1.0, 1));
    let memories: [Box<dyn Memory<f64>>; 2] = [
        Box::new(LinearMemory::new(map.clone(), 3, 0.5).unwrap()),
        Box::new(ExactMemory::new(4, 3, 0.5).unwrap()),
    ];
    for mut memory in memories {
        let empty = memory.clone();
        memory.absorb(k.view(), v.view()).unwrap();
        let answer = |memory: &dyn Memory<f64>| {
            let mut answer = Partial::new(70, 3).unwrap();
            memory.read(k.view(), &mut answer).unwrap();
            answer
        };
        let before = answer(&*memory);
        shape(memory.absorb(v.view(), v.view()));
        shape(memory.absorb(k.view(), k.view()));
        shape(memory.absorb(k.slice(ndarray::s![1.., ..]), v.view()));
        for row in [0, 69] {
            let mut bad = k.clone();
            bad[[row, 1]] = f64::NAN;
            not_finite(memory.absorb(bad.view(), v.view()));
            not_finite(memory.read(bad.view(), &mut Partial::new(70, 3).unwrap()));
        }
        let mut huge = k.clone();
        huge[[69, 1]] = 1e200;
        if memory.state_floats() < 100 {
            assert!(matches!(
                memory.absorb(huge.view(), v.view()),
                Err(Error::Overflow { row: 69, .. })
            ));
        }
        assert_eq!(answer(&*memory), before);
        shape(memory.read(v.view(), &mut Partial::new(70, 3).unwrap()));
        shape(memory.read(k.view(), &mut Partial::new(69, 3).unwrap()));
        shape(memory.read(k.view(), &mut Partial::new(70, 4).unwrap()));
        // nothing absorbed: nothing answered, and nothing to divide by
        let mut nothing = Partial::new(70, 3).unwrap();
        empty.read(k.view(), &mut nothing).unwrap();
        assert_eq!(nothing, Partial::new(70, 3).unwrap());
        assert!(matches!(
            nothing.normalize_into(Array2::zeros((70, 3)).view_mut()),
            Err(Error::Normalizer { row: 0 })
        ));
    }
    let mut linear = LinearMemory::new(map.clone(), 3, 0.5).unwrap();
    let mut exact = ExactMemory::new(4, 3, 0.5).unwrap();
    let mut merged = MergedMemory::new(4, 3, 5, 0.5).unwrap();
    macro_rules! counts_its_tokens {
        ($memory:ident) => {
            $memory.absorb(k.view(), v.view()).unwrap();
            shape($memory.absorb(v.view(), v.view()));
            assert_eq!(($memory.len(), $memory.is_empty()), (70, false));
            $memory.reset();
            assert_eq!(($memory.len(), $memory.is_empty()), (0, true));
            let mut nothing = Partial::new(70, 3).unwrap();
            $memory.read(k.view(), &mut nothing).unwrap();
            assert_eq!(nothing, Partial::new(70, 3).unwrap());
        };
    }
    counts_its_tokens!(linear);
    counts_its_tokens!(exact);
    counts_its_tokens!(merged);
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let mut weights = Array1::ones(70);
        weights[69] = bad;
        option(merged.absorb_weighted(k.view(), v.view(), weights.view()));
        assert!(merged.is_empty());
    }
    let mut partial = Partial::<f64>::new(2, 3).unwrap();
    shape(partial.merge(&Partial::new(3, 3).unwrap()));
    shape(partial.merge(&Partial::new(2, 2).unwrap()));
    shape(partial.normalize_into(Array2::zeros((2, 2)).view_mut()));
    let mut memory = LinearMemory::<f64, _>::new(map.clone(), 3, 0.5).unwrap();
    shape(memory.merge(&LinearMemory::new(map.clone(), 2, 0.5).unwrap()));
    option(memory.merge(&LinearMemory::new(map, 3, 0.6).unwrap()));
    shape(ExactMemory::<f64>::new(4, 3, 0.5).unwrap().merge(&ExactMemory::new(4, 2, 0.5).unwrap()));
    option(
        ExactMemory::<f64>::new(4, 3, 0.5).unwrap().merge(&ExactMemory::new(4, 3, 0.6).unwrap()),
    );
}

/// Values whose sum leaves the range of the type: an error, and the memory or stream as it was.
#[test]
fn huge_values() {
    let kernel = LinearAttention::new(Performer::<f32>::new(2, 4, 0).unwrap());
    let sums = kernel.clone().unnormalized();
    for count in [1, 3, 100] {
        let k = Array2::<f32>::zeros((count, 2));
        let huge = Array2::from_elem((count, 1), 3.4e38);
        let mut memory = kernel.memory(1).unwrap();
        memory.absorb(k.view(), Array2::ones((count, 1)).view()).unwrap();
        let before = sums.stream_from(memory.clone()).save().unwrap();
        // without a normaliser the sum is what is asked for
        let mut stream = sums.stream_from(memory.clone());
        let twice = Array2::from_elem((2, 1), 3.4e38);
        let (two, mut out) = (Array2::zeros((2, 2)), Array2::zeros((2, 1)));
        let result = stream.extend(two.view(), two.view(), twice.view(), out.view_mut());
        assert!(matches!(result, Err(Error::Overflow { .. })), "{count}");
        assert_eq!(stream.save().unwrap(), before);
        // the mean of such values is one
        memory.absorb(k.view(), huge.view()).unwrap();
        let mut answer = Partial::new(1, 1).unwrap();
        memory.read(Array2::zeros((1, 2)).view(), &mut answer).unwrap();
        let mut out = Array2::zeros((1, 1));
        answer.normalize_into(out.view_mut()).unwrap();
        assert!((out[[0, 0]] / 1.7e38 - 1.0).abs() < 1e-5, "{out}");
        assert_eq!(memory.len(), 2 * count);
    }
    let mut memories = [(); 2].map(|()| {
        let mut memory = kernel.memory(1).unwrap();
        memory.absorb(Array2::zeros((1, 2)).view(), ndarray::array![[1.5e31_f32]].view()).unwrap();
        memory
    });
    let other = memories[1].clone();
    let before = kernel.stream_from(other.clone()).save().unwrap();
    let result = (0..60).try_for_each(|_| {
        let copy = memories[0].clone();
        memories[0].merge(&copy)
    });
    assert!(matches!(result, Err(Error::Overflow { .. })));
    assert_eq!(kernel.stream_from(memories[1].clone()).save().unwrap(), before);
}

#[test]
fn sums_of_users() {
    let good = || (array![[1.0, 2.0]], array![3.0], array![-5.0]);
    assert!(Partial::from_parts(good().0, good().1, good().2).is_ok());
    assert!(Partial::from_parts(good().0, good().1, array![f64::NEG_INFINITY]).is_ok());
    shape(Partial::from_parts(good().0, array![1.0, 2.0], good().2));
    shape(Partial::from_parts(good().0, good().1, array![]));
    zero(Partial::<f64>::from_parts(Array2::zeros((1, 0)), good().1, good().2));
    for bad in [f64::NAN, f64::INFINITY] {
        not_finite(Partial::from_parts(array![[1.0, bad]], good().1, good().2));
        not_finite(Partial::from_parts(good().0, array![bad], good().2));
        not_finite(Partial::from_parts(good().0, good().1, array![bad]));
    }
    // merging is adding, in any order and at any scale
    let mut a = Partial::from_parts(array![[1.0, 2.0]], array![3.0], array![700.0]).unwrap();
    let b =
        Partial::from_parts(array![[10.0, 20.0]], array![5.0], array![700.0 + 2f64.ln()]).unwrap();
    a.merge(&b).unwrap();
    let mut out = Array2::zeros((1, 2));
    a.normalize_into(out.view_mut()).unwrap();
    assert!((out[[0, 0]] - 21.0 / 13.0).abs() < 1e-12 && (out[[0, 1]] - 42.0 / 13.0).abs() < 1e-12);
}

/// Features that would all underflow are kept in units of their largest.
#[test]
fn very_negative_coordinates_of_elu() {
    let x = normal::<f32>(6, 4, 1.0, 0) - 400.0_f32;
    let kernel = LinearAttention::new(EluFeatures::<f32>::new(4).unwrap()).with_scale(1.0);
    let out =
        kernel.forward(x.view(), x.view(), Array2::ones((6, 2)).view(), Mask::Causal).unwrap();
    assert!(out.iter().all(|x| (x - 1.0).abs() < 1e-5));
}

/// A query whose features meet nothing, far behind the first token: the error says of which token.
#[test]
fn queries_that_meet_nothing_are_reported_with_their_row() {
    let kernel = LinearAttention::new(IdentityFeatures::<f64>::new(4).unwrap());
    let k = normal::<f64>(300, 4, 1.0, 0).mapv(f64::abs);
    for row in [0, 1, 100, 257] {
        let mut q = k.clone();
        q.row_mut(row).fill(0.0);
        for mask in [Mask::Causal, Mask::Full] {
            let error = kernel.forward(q.view(), k.view(), k.view(), mask).unwrap_err();
            assert_eq!(error, Error::Normalizer { row });
        }
    }
}

#[test]
fn tools() {
    for t in [0.0, 1.0, -0.1, 1.1, f64::NAN] {
        option(normal_quantile(t));
        option(chi_quantile(3, t));
    }
    zero(chi_quantile(0, 0.5));
    // from here on another formula, in no time: the quantile of the gamma distribution goes on as
    // 1 + z/(2√a)
    let degrees = 20_000_000_000;
    for t in [1e-9, 0.3, 0.999] {
        let [a, b] = [degrees, degrees + 2].map(|n| chi_quantile(n, t).unwrap().powi(2) / 2.0);
        let step = 1.0 + normal_quantile(t).unwrap() / (2.0 * a.sqrt());
        assert!((b - a - step).abs() < 1e-3, "{t}: {a} and {b}");
        let huge = chi_quantile(usize::MAX, t).unwrap();
        assert!((huge / (usize::MAX as f64).sqrt() - 1.0).abs() < 1e-8);
    }
    let x = normal::<f64>(5, 4, 1.0, 0);
    let none = Array2::<f64>::zeros((0, 4));
    let kernel = SoftmaxAttention::<f64>::new(4).unwrap();
    zero(compare(&kernel, none.view(), x.view(), x.view(), Mask::Full));
    zero(compare(&kernel, x.view(), none.view(), none.view(), Mask::Full));
    zero(compare(
        &kernel,
        Array2::zeros((5, 0)).view(),
        Array2::zeros((5, 0)).view(),
        x.view(),
        Mask::Full,
    ));
    shape(compare(&kernel, x.view(), none.view(), none.view(), Mask::Causal));
    shape(compare(
        &SoftmaxAttention::<f64>::new(3).unwrap(),
        x.view(),
        x.view(),
        x.view(),
        Mask::Causal,
    ));
    let mut bad = x.clone();
    bad[[1, 1]] = f64::NAN;
    not_finite(compare(&kernel, x.view(), bad.view(), x.view(), Mask::Causal));

    option(rate(&[1, 2], 0..1, |_, _| Ok(1.0)));
    option(rate(&[], 0..3, |_, _| Ok(1.0)));
    option(rate(&[2, 2], 0..3, |_, _| Ok(1.0)));
    option(rate(&[0, 2], 0..3, |_, _| Ok(1.0)));
    option(rate(&[1, 2], 0..3, |_, _| Ok(0.0)));
    option(rate(&[1, 2], 0..3, |_, _| Ok(f64::NAN)));
    zero(rate(&[1, 2], 0..3, |_, _| Err(Error::ZeroSize { which: "test" })));

    let map = Performer::<f64>::new(4, 8, 0).unwrap();
    zero(fit_weights(&map, none.view(), none.view(), WeightFit::new()));
    shape(fit_weights(&map, x.view(), x.slice(ndarray::s![1.., ..]), WeightFit::new()));
    shape(fit_weights(&map, x.slice(ndarray::s![.., 1..]), x.view(), WeightFit::new()));
    not_finite(fit_weights(&map, x.view(), bad.view(), WeightFit::new()));
    option(fit_weights(&map, x.view(), x.view(), WeightFit::new().with_ridge(-1.0)));
    option(fit_weights(&map, x.view(), x.view(), WeightFit::new().with_ridge(f64::NAN)));
    let taylor = TaylorFeatures::<f64>::new(4).unwrap();
    assert!(matches!(
        fit_weights(&taylor, x.view(), x.view(), WeightFit::new()),
        Err(Error::Unsupported { .. })
    ));
    // norms at which no weight can help: a result or an error, never a panic
    for size in [1e-300, 1e3, 1e150, 1e160] {
        let x = x.mapv(|x| x * size);
        let _ = fit_weights(&map, x.view(), x.view(), WeightFit::new())
            .map(|d| assert!(d.iter().all(|d| d.is_finite())));
    }
}

/// A map of a user that breaks its contract: NaN, infinite log scales, zeros, wrong sizes.
#[test]
fn maps_of_users() {
    #[derive(Debug)]
    struct Broken(f64, f64);
    impl FeatureMap<f64> for Broken {
        fn head_dim(&self) -> usize {
            4
        }
        fn num_features(&self) -> usize {
            3
        }
        fn map_queries(
            &self,
            _: ndarray::ArrayView2<'_, f64>,
            mut values: ndarray::ArrayViewMut2<'_, f64>,
            mut log_scale: ndarray::ArrayViewMut1<'_, f64>,
        ) -> Result<(), Error> {
            values.fill(self.0);
            log_scale.fill(self.1);
            Ok(())
        }
    }
    let x = normal::<f64>(9, 4, 1.0, 0);
    for (value, log_scale, good) in [
        (1.0, 0.0, true),
        (1e300, 600.0, true),
        (1e-300, -600.0, true),
        (f64::NAN, 0.0, false),
        (f64::INFINITY, 0.0, false),
        (1.0, f64::NAN, false),
        (1.0, f64::NEG_INFINITY, false),
        (0.0, 0.0, false),
    ] {
        let kernel = LinearAttention::new(Broken(value, log_scale));
        for mask in [Mask::Causal, Mask::Full] {
            let result = kernel.forward(x.view(), x.view(), x.view(), mask);
            match result {
                Ok(out) => {
                    assert!(good && out.iter().all(|x| x.is_finite()), "{value} {log_scale}")
                }
                Err(Error::Overflow { .. } | Error::Normalizer { .. }) => {
                    assert!(!good, "{value} {log_scale}")
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
    // no feature at all
    #[derive(Debug)]
    struct Empty;
    impl FeatureMap<f64> for Empty {
        fn head_dim(&self) -> usize {
            4
        }
        fn num_features(&self) -> usize {
            0
        }
        fn map_queries(
            &self,
            _: ndarray::ArrayView2<'_, f64>,
            _: ndarray::ArrayViewMut2<'_, f64>,
            _: ndarray::ArrayViewMut1<'_, f64>,
        ) -> Result<(), Error> {
            Ok(())
        }
    }
    assert!(
        LinearAttention::new(Empty).forward(x.view(), x.view(), x.view(), Mask::Causal).is_err()
    );
    assert!(Attention::<f64>::stream(&LinearAttention::new(Empty), 2).is_err());
}

#[test]
fn states() {
    let kernel = LinearAttention::new(Performer::<f64>::new(4, 8, 0).unwrap());
    let mut stream = Attention::<f64>::stream(&kernel, 2).unwrap();
    let good = 2 * 8 * 3 + 1;
    let state = |kernel: &str, tokens, shape: Vec<usize>, numbers| {
        StreamState::new(kernel, tokens, shape, numbers)
    };
    for bad in [
        state("softmax", 1, vec![4, 8, 2], vec![1.0; good]),
        state("linear", 1, vec![4, 8, 3], vec![1.0; good]),
        state("linear", 1, vec![], vec![1.0; good]),
        state("linear", 1, vec![4, 8, 2], vec![1.0; good - 1]),
        state("linear", 0, vec![4, 8, 2], vec![1.0; good]),
    ] {
        assert!(matches!(stream.restore(&bad), Err(Error::State { .. })), "{bad:?}");
        assert!(stream.is_empty());
    }
    let mut numbers = vec![1.0; good];
    numbers[3] = f64::NAN;
    not_finite(stream.restore(&state("linear", 1, vec![4, 8, 2], numbers)));
    let mut stream = SoftmaxAttention::<f64>::new(4).unwrap().stream(2).unwrap();
    for tokens in [2, usize::MAX] {
        assert!(stream.restore(&state("softmax", tokens, vec![4, 2], vec![1.0; 6])).is_err());
    }
    stream.restore(&state("softmax", 1, vec![4, 2], vec![1.0; 6])).unwrap();
    assert_eq!(stream.len(), 1);
}

#[test]
fn errors_are_errors_and_say_what_to_do() {
    let error: Box<dyn std::error::Error + Send + Sync> =
        Box::new(Error::ZeroSize { which: "head_dim" });
    assert_eq!(error.to_string(), "`head_dim` is 0: pass at least 1");
    let weights =
        Performer::<f64>::new(2, 2, 0).unwrap().with_weights(Array1::zeros(2)).unwrap_err();
    assert_eq!(
        weights.to_string(),
        "`weights` is all zero, which cannot be used: it must be positive for at least one feature"
    );
    let (q, k) = (Array2::<f64>::zeros((2, 4)), Array2::zeros((5, 4)));
    let kernel = SoftmaxAttention::new(4).unwrap();
    let causal = kernel.forward(q.view(), k.view(), k.view(), Mask::Causal).unwrap_err();
    assert_eq!(
        causal.to_string(),
        "`k` has 5 rows where `q` has 2: with `Mask::Causal`, and in a stream, each query needs \
         its own key; give a stream the earlier tokens first, or take `Mask::Full`, which allows \
         any numbers"
    );
    let missing = HybridAttention::<f64>::builder(4).far(Taylor::new(2)).build().unwrap_err();
    assert_eq!(
        missing.to_string(),
        "`calibration` is not set: the Taylor map is fitted to one; pass it to `calibrated`"
    );
}

/// A stream of a user that keeps no checkpoints is not told to make one first.
#[test]
fn a_stream_that_has_no_checkpoints_says_so() {
    #[derive(Clone, Debug)]
    struct Plain;
    impl Stream<f64> for Plain {
        fn extend_heads(&mut self, _: &mut [Head<'_, f64>]) -> Result<(), Error> {
            Ok(())
        }

        fn len(&self) -> usize {
            0
        }

        fn state_floats(&self) -> usize {
            0
        }

        fn reset(&mut self) {}
    }
    assert!(!Plain.checkpoint());
    let error = Plain.rollback().unwrap_err().to_string();
    assert!(error.contains("clone") && !error.contains("first"), "{error}");
}
