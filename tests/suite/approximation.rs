//! How closely each map approximates softmax attention, where theory says it must.

use crate::common::{map, normal};
use dijiang::{Attention, LinearAttention, Mask, fidelity::Reference};
use ndarray::Array2;

/// `n` vectors of head dimension `d` with |x̂|² = `square` each, in raw units (x̂ = d^{−1/4} x).
fn shell(n: usize, d: usize, square: f64, seed: u64) -> Array2<f64> {
    let mut x = normal::<f64>(n, d, 1.0, seed);
    for mut row in x.outer_iter_mut() {
        let size = (square / row.dot(&row)).sqrt() * (d as f64).powf(0.25);
        row.mapv_inplace(|x| x * size);
    }
    x
}

fn kernel_error(name: &str, d: usize, m: usize, square: f64, seed: u64) -> f64 {
    let (q, k) = (shell(32, d, square, 2 * seed + 1000), shell(32, d, square, 2 * seed + 1001));
    let reference = Reference::new(q.view(), k.view(), k.view(), Mask::Full).unwrap();
    reference
        .compare(&LinearAttention::new(map::<f64>(name, d, m, seed)))
        .unwrap()
        .kernel_error
        .unwrap()
}

fn mean_error(name: &str, d: usize, m: usize, square: f64) -> f64 {
    (0..12).map(|seed| kernel_error(name, d, m, square, seed)).sum::<f64>() / 12.0
}

/// The mean over seeds of `K̂/K` of 36 pairs, and its distance from one in standard errors, at
/// |x̂|² = 1.
fn bias(name: &str, seeds: u64) -> (f64, f64) {
    let (d, m) = (8, 16);
    let (q, k) = (shell(6, d, 1.0, 1), shell(6, d, 1.0, 2));
    let exact = q.dot(&k.t()) / (d as f64).sqrt();
    let (mut sum, mut squares) = (Array2::<f64>::zeros((6, 6)), Array2::<f64>::zeros((6, 6)));
    for seed in 0..seeds {
        let kernel = LinearAttention::new(map::<f64>(name, d, m, seed));
        let log_weights = Attention::<f64>::pair_weights(&kernel).unwrap();
        let log_weights = log_weights.log_weights(q.view(), k.view()).unwrap();
        let ratio = (log_weights - &exact).mapv(f64::exp);
        squares += &(&ratio * &ratio);
        sum += &ratio;
    }
    let mean = sum / seeds as f64;
    let error = (squares / seeds as f64 - &mean * &mean).mapv(|x| (x / seeds as f64).sqrt());
    let z = ((&mean - 1.0) / error).fold(0.0_f64, |m, z| m.max(z.abs()));
    (mean.mean().unwrap(), z)
}

/// The largest of 36 correlated z-scores stays below 3.5 with probability above 98 %; the seeds are
/// fixed.
#[test]
fn unbiased_maps_are_unbiased() {
    for name in ["performer", "performer-iid", "performer-hyperbolic", "wpff-sobol"] {
        let (mean, z) = bias(name, 2000);
        assert!(z < 3.5, "{name}: mean ratio {mean}, z {z}");
    }
}

/// Stratified radii sit at the middle of their strata and miss the tails, DCT rows are not quite
/// uniform on the sphere, a cubature has no randomness left in its radii, and normal radii aim
/// elsewhere: these are biased, and the docs say so.
#[test]
fn biased_maps_are_biased_as_the_docs_say() {
    for (name, low, high) in [
        ("wpff", 0.95, 1.0),
        ("dct", 0.95, 1.0),
        ("dct-antithetic", 0.85, 0.95),
        ("dct-normal", 0.3, 0.45),
    ] {
        let (mean, _) = bias(name, 2000);
        assert!(low < mean && mean < high, "{name}: mean ratio {mean}");
    }
}

/// At |x̂|² = 1 the mean error over seeds falls from m = d/2 to 2d to 16d.
#[test]
fn error_falls_with_the_number_of_features() {
    for d in [8, 64] {
        for name in [
            "performer",
            "performer-iid",
            "performer-hyperbolic",
            "dct",
            "dct-antithetic",
            "wpff",
            "wpff-sobol",
        ] {
            let errors = [d / 2, 2 * d, 16 * d].map(|m| mean_error(name, d, m, 1.0));
            assert!(errors[0] > errors[1] && errors[1] > errors[2], "{name} d={d}: {errors:?}");
        }
    }
}

/// The measured slopes of error against m are near −½, the Monte Carlo rate, for all of them: not
/// the −1 claimed for quasi-Monte Carlo.
#[test]
fn slopes_are_those_of_monte_carlo() {
    for (name, low, high) in [
        ("performer", -0.65, -0.35),
        ("performer-iid", -0.65, -0.35),
        ("performer-hyperbolic", -0.9, -0.4),
        ("dct", -0.7, -0.35),
        ("wpff", -0.65, -0.35),
        ("wpff-sobol", -0.85, -0.4),
    ] {
        let rate = dijiang::fidelity::rate(&[32, 128, 512], 0..12, |m, seed| {
            Ok(kernel_error(name, 64, m, 0.5, seed))
        })
        .unwrap();
        assert!(low < rate.slope && rate.slope < high, "{name}: {rate:?}");
        assert!(rate.confidence[0] > -1.0, "{name}: {rate:?}");
    }
}

/// The interval is that of Student's t, of few seeds and of many.
#[test]
fn the_interval_of_a_slope_is_that_of_its_seeds() {
    // half of the slopes are −0.4, half −0.6; the quantiles of 5 and 39 degrees of freedom
    for (seeds, quantile) in [(6, 2.571), (40, 2.0227)] {
        let rate = dijiang::fidelity::rate(&[16, 64, 256], 0..seeds, |m, seed| {
            Ok((m as f64).powf(if seed % 2 == 0 { -0.4 } else { -0.6 }))
        })
        .unwrap();
        let reach = quantile * 0.1 / (seeds as f64 - 1.0).sqrt();
        assert!((rate.slope + 0.5).abs() < 1e-12, "{rate:?}");
        for (found, exact) in rate.confidence.into_iter().zip([-0.5 - reach, -0.5 + reach]) {
            assert!((found - exact).abs() < 2e-3 * reach, "{rate:?}, not {exact}");
        }
    }
}

/// At small norms the relative error of a pair is about √((e^{|q̂ + k̂|²} − 1)/m), the standard
/// deviation of independent features, with |q̂ + k̂|² ≈ 2|x̂|²: no map is more than half worse.
/// Taylor's remainder is |s|³e^{|s|}/6.
#[test]
fn small_norms_are_estimated_well() {
    for name in [
        "performer",
        "performer-iid",
        "performer-hyperbolic",
        "dct",
        "dct-antithetic",
        "wpff",
        "wpff-sobol",
    ] {
        for square in [0.1, 0.5, 1.0_f64] {
            let bound = 1.5 * ((2.0 * square).exp_m1() / 256.0).sqrt();
            let error = mean_error(name, 64, 256, square);
            assert!(error < bound, "{name} at |x̂|² = {square}: {error}");
        }
    }
    for (square, bound) in [(0.1, 1e-4), (0.5, 1e-3), (1.0, 0.01)] {
        assert!(mean_error("taylor", 64, 0, square) < bound);
    }
}

#[test]
fn antithetic_radii_beat_favor_at_two_features_per_dimension() {
    for d in [8, 64] {
        for square in [0.5, 1.0, 2.0] {
            let (antithetic, favor) = (
                mean_error("dct-antithetic", d, 2 * d, square),
                mean_error("performer", d, 2 * d, square),
            );
            assert!(antithetic < 0.7 * favor, "d={d} |x̂|²={square}: {antithetic} against {favor}");
        }
    }
}

/// Normal radii aim at exp(x·y/d): more features change nothing, and neither does the released map
/// at any m = d.
#[test]
fn official_radii_do_not_converge() {
    let errors = [32, 128, 1024].map(|m| mean_error("dct-normal", 64, m, 1.0));
    assert!(errors[0] - errors[2] < 0.01 * errors[0], "{errors:?}");
    assert!(errors[2] > 0.5, "{errors:?}");
    for d in [16, 64, 256] {
        let (mut error, mut uniform) = (0.0, 0.0);
        for seed in 0..6 {
            let [q, k] = [shell(64, d, 1.0, 2 * seed), shell(64, d, 1.0, 2 * seed + 1)];
            let reference = Reference::new(q.view(), k.view(), k.view(), Mask::Full).unwrap();
            let kernel =
                LinearAttention::new(crate::common::official::<f64>(d, seed)).with_scale(1.0);
            let report = reference.compare(&kernel).unwrap();
            error += report.attention_error / 6.0;
            uniform += report.uniform_attention_error / 6.0;
        }
        assert!(error > 0.8 * uniform, "d={d}: {error}, uniform {uniform}");
    }
}

/// Without fresh signs, blocks beyond the first would repeat its directions and the error would
/// stop falling there.
#[test]
fn blocks_of_dct_directions_differ() {
    let map = dijiang::DctFeatures::<f64>::new(16, 64, 3).unwrap();
    let projection = map.projection();
    let cosine = |i: usize, j: usize| {
        let (a, b) = (projection.row(i), projection.row(j));
        a.dot(&b).abs() / (a.dot(&a) * b.dot(&b)).sqrt()
    };
    for i in 0..16 {
        for j in 16..64 {
            assert!(cosine(i, j) < 0.999, "directions {i} and {j}");
        }
    }
    assert!(mean_error("dct", 16, 512, 0.5) < 0.6 * mean_error("dct", 16, 64, 0.5));
}

/// Large single coordinates, as keys of trained models have them, are spread over all frequencies
/// first.
#[test]
fn dct_features_do_not_depend_on_the_axes() {
    let d = 64;
    let mean = |axis: bool| {
        let errors = (0..12).map(|seed| {
            let (mut q, mut k) = (shell(32, d, 1.0, 2 * seed), shell(32, d, 1.0, 2 * seed + 1));
            if axis {
                // the same Gram matrix, carried by few coordinates
                for x in [&mut q, &mut k] {
                    for mut row in x.outer_iter_mut() {
                        let size = row.dot(&row).sqrt();
                        let sign = row[0].signum();
                        row.fill(0.0);
                        row[0] = sign * size;
                    }
                }
            }
            let reference = Reference::new(q.view(), k.view(), k.view(), Mask::Full).unwrap();
            let kernel = LinearAttention::new(map::<f64>("dct", d, 256, seed));
            reference.compare(&kernel).unwrap().kernel_error.unwrap()
        });
        errors.sum::<f64>() / 12.0
    };
    let (axis, random) = (mean(true), mean(false));
    assert!(axis < 2.5 * random, "{axis} against {random}");
}

/// Fitted weights lower the error of attention on the fitted pairs, and D = 1 is where the fit
/// begins.
#[test]
fn fitted_weights_help_on_their_own_data() {
    use dijiang::{WeightFit, Wpff, fit_weights};
    for seed in 0..4 {
        let (q, k) = (shell(64, 16, 2.0, 2 * seed), shell(64, 16, 2.0, 2 * seed + 1));
        let reference = Reference::new(q.view(), k.view(), k.view(), Mask::Full).unwrap();
        let map = Wpff::<f64>::new(16, 48, seed).unwrap();
        let options = WeightFit::new().with_mask(Mask::Full);
        let unchanged =
            fit_weights(&map, q.view(), k.view(), options.with_ridge(f64::INFINITY)).unwrap();
        assert!(unchanged.iter().all(|d| *d == 1.0));
        let nearly = fit_weights(&map, q.view(), k.view(), options.with_ridge(1e12)).unwrap();
        assert!(nearly.iter().all(|d| (*d - 1.0).abs() < 1e-6));
        let weights = fit_weights(&map, q.view(), k.view(), options).unwrap();
        assert!(
            weights.iter().all(|d| *d >= 0.0) && weights.iter().any(|d| (*d - 1.0).abs() > 0.05)
        );
        let fitted = map.clone().with_weights(weights).unwrap();
        let before = reference.compare(&LinearAttention::new(map)).unwrap();
        let after = reference.compare(&LinearAttention::new(fitted)).unwrap();
        assert!(after.kernel_error.unwrap() < before.kernel_error.unwrap(), "{before:?} {after:?}");
        assert!(after.output_error < before.output_error, "{before:?} {after:?}");
    }
}

/// The maps and the tool that measures them see no difference between exact attention and itself.
#[test]
fn softmax_measures_zero() {
    for mask in [Mask::Causal, Mask::Full] {
        let x = shell(50, 8, 4.0, 1);
        let reference = Reference::new(x.view(), x.view(), x.view(), mask).unwrap();
        let report = reference.compare(&dijiang::SoftmaxAttention::new(8).unwrap()).unwrap();
        assert!(
            report.output_error < 1e-14 && report.attention_error < 1e-14 && report.max_abs < 1e-13,
            "{report:?}"
        );
        assert!(
            report.kl.unwrap().abs() < 1e-14 && report.kernel_error.unwrap() < 1e-14,
            "{report:?}"
        );
        assert!(report.uniform_error > 0.1, "{report:?}");
    }
}
