//! Attention transfer makes maps better, or says that it did not.

use crate::common::{assert_close, features, normal, tokens};
use dijiang::{
    Attention, DctFeatures, DistillLoss, DistillOptions, DistillSample, EluFeatures, Error,
    LearnedFeatures, LearnedForm, LinearAttention, Mask, Performer, SoftmaxAttention, distill,
    distill_with, fidelity,
};
use ndarray::{Array2, Axis, array, s};

/// Tokens whose scores vary along a few directions, as those of heads do.
fn head(n: usize, d: usize, seed: u64) -> [Array2<f64>; 3] {
    let [q, k, v] = tokens::<f64>(n, d, d, 0.3, seed);
    let [a, b] = [1, 2].map(|i| normal::<f64>(n, 1, 2.0, seed + 50 + i));
    let mut q = q;
    let mut k = k;
    for t in 0..n {
        q[[t, 0]] += a[[t, 0]];
        k[[t, 0]] += b[[t, 0]];
        k[[t, 1]] += 1.0;
    }
    [q, k, v]
}

fn sample([q, k, v]: &[Array2<f64>; 3]) -> DistillSample<'_, f64> {
    DistillSample { q: q.view(), k: k.view(), v: v.view() }
}

#[test]
fn learned_maps_come_nearer_to_softmax_on_tokens_they_have_not_seen() {
    let (d, train, test) = (8, head(300, 8, 1), head(200, 8, 2));
    let teacher = SoftmaxAttention::<f64>::new(d).unwrap();
    let maps: [LearnedFeatures<f64>; 2] = [
        LearnedFeatures::from_map(&DctFeatures::<f64>::new(d, 16, 0).unwrap()).unwrap(),
        LearnedFeatures::hedgehog(d).unwrap(),
    ];
    for map in maps {
        for loss in [DistillLoss::Output, DistillLoss::CrossEntropy] {
            let kernel = LinearAttention::new(map.clone());
            let options = DistillOptions::new().steps(120).learning_rate(0.05).loss(loss);
            let fitted = distill(&kernel, &teacher, &[sample(&train)], options).unwrap();
            assert_eq!(fitted.steps.len(), 121);
            assert!(fitted.validation_ratio() < 0.8, "{loss:?} {}", fitted.validation_ratio());
            let error = |kernel: &dyn Attention<f64>| {
                let [q, k, v] = &test;
                let report =
                    fidelity::compare(kernel, q.view(), k.view(), v.view(), Mask::Causal).unwrap();
                report.output_error
            };
            let (before, after) = (error(&kernel), error(&*fitted.kernel));
            assert!(after < 0.95 * before, "{loss:?}: {before} before, {after} after");
            let again =
                LinearAttention::new(map.with_parameters(&fitted.parameters.of("map")).unwrap());
            assert!((error(&again) - after).abs() < 1e-12);
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_numbers_and_the_callback_ends_it() {
    let samples = [head(80, 4, 3), head(90, 4, 4), head(70, 4, 5)];
    let samples = samples.each_ref().map(sample);
    let teacher = SoftmaxAttention::<f64>::new(4).unwrap();
    let kernel = LinearAttention::new(Performer::<f64>::new(4, 8, 1).unwrap());
    let run = |seed: u64, most: usize| {
        let options = DistillOptions::new().steps(40).seed(seed);
        distill_with(&kernel, &teacher, &samples, options, |step| step.index < most).unwrap()
    };
    let [a, b, c] = [(7, 100), (7, 100), (8, 100)].map(|(seed, most)| run(seed, most));
    assert_eq!((&a.parameters, &a.steps), (&b.parameters, &b.steps));
    assert_ne!(a.steps, c.steps);
    assert_eq!(run(7, 5).steps.len(), 6);
    assert_eq!(run(7, 5).steps[..], a.steps[..6]);
}

#[test]
fn chosen_parameters_alone_move_and_patience_ends() {
    let train = head(100, 4, 6);
    let teacher = SoftmaxAttention::<f64>::new(4).unwrap();
    let map = Performer::<f64>::new(4, 8, 1).unwrap();
    let kernel = LinearAttention::new(map.clone()).with_decay(0.99);
    let options = DistillOptions::new().steps(30).only("map.weights");
    let fitted = distill(&kernel, &teacher, &[sample(&train)], options).unwrap();
    assert_eq!(fitted.parameters.names().collect::<Vec<_>>(), ["map.weights"]);
    let all = fitted.kernel.parameters();
    let projection = kernel.parameters();
    assert_eq!(all.get("map.projection"), projection.get("map.projection"));
    assert_ne!(all.get("map.weights"), projection.get("map.weights"));

    // what cannot become better stays as it is
    let exact = distill(&kernel, &kernel, &[sample(&train)], options.patience(3)).unwrap();
    assert_eq!((exact.best, exact.steps.len()), (0, 4));
    assert_eq!(exact.validation_ratio(), 1.0);
    assert_eq!(exact.kernel.parameters(), kernel.parameters());
}

/// A learned map of a map has its features, but for those of weight 0.
#[test]
fn a_learned_map_begins_as_its_map() {
    let map = Performer::<f64>::new(4, 5, 1).unwrap();
    let map = map.with_weights(array![1.0, 0.0, 0.5, 2.0, 0.0]).unwrap();
    let learned = LearnedFeatures::from_map(&map).unwrap();
    let x = normal::<f64>(6, 4, 1.0, 2);
    let exact = features(&map, &x, 1.0, false).absolute().select(Axis(1), &[0, 2, 3]);
    assert_close("features", &features(&learned, &x, 1.0, false).absolute(), &exact, 64.0);
}

/// Every number of a learned map makes it another one.
#[test]
fn learned_maps_are_equal_where_all_their_numbers_are() {
    let map = |form, is_mirrored, at: Option<usize>| {
        let size = |i| if at == Some(i) { 2.0 } else { 1.0 };
        let projections = [0, 1].map(|i| normal::<f64>(3, 4, size(i), i as u64));
        let biases = [2, 3].map(|i| normal::<f64>(1, 3, size(i), i as u64).row(0).to_owned());
        LearnedFeatures::from_parts(form, is_mirrored, projections, biases).unwrap()
    };
    let one = map(LearnedForm::Softmax, true, None);
    assert_eq!(one, map(LearnedForm::Softmax, true, None));
    assert_ne!(one, map(LearnedForm::Softmax, false, None));
    assert_ne!(one, map(LearnedForm::Exponential, true, None));
    for at in 0..4 {
        assert_ne!(one, map(LearnedForm::Softmax, true, Some(at)), "{at}");
    }
}

#[test]
fn options_that_cannot_be_used_are_refused() {
    let train = head(30, 4, 7);
    let teacher = SoftmaxAttention::<f64>::new(4).unwrap();
    let kernel = LinearAttention::new(Performer::<f64>::new(4, 8, 1).unwrap());
    let run = |options| distill(&kernel, &teacher, &[sample(&train)], options).unwrap_err();
    let options = DistillOptions::new;
    for (options, argument) in [
        (options().learning_rate(0.0), "learning_rate"),
        (options().learning_rate(f64::NAN), "learning_rate"),
        (options().validation(1.0), "validation"),
        (options().validation(-0.1), "validation"),
        (options().only("far"), "parameters"),
    ] {
        let error = run(options);
        assert!(
            matches!(error, Error::InvalidOption { which, .. } if which == argument),
            "{error}"
        );
    }
    let error = distill(&kernel, &teacher, &[], options()).unwrap_err();
    assert!(matches!(error, Error::ZeroSize { which: "samples" }), "{error}");
    let elu = LinearAttention::new(EluFeatures::<f64>::new(4).unwrap());
    let error = distill(&elu, &teacher, &[sample(&train)], options()).unwrap_err();
    assert!(matches!(error, Error::InvalidOption { which: "parameters", .. }), "{error}");
    let mut bad = train.clone();
    bad[0].slice_mut(s![3, 0]).fill(f64::NAN);
    let error = distill(&kernel, &teacher, &[sample(&bad)], options()).unwrap_err();
    assert!(matches!(error, Error::NotFinite { which: "q", row: 3, .. }), "{error}");
}
