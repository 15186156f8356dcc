//! What weighs nothing changes nothing, and what is empty costs nothing.

use crate::common::hybrid::{FarFormula, HybridFormula};
use crate::common::{RECEIVED, assert_close, hybrid, normal, tokens, wide};
use dijiang::attention::naive::options::Options;
use dijiang::{
    Attention, Error, Far, FeatureMap, HybridAttention, IdentityFeatures, LinearAttention, Mask,
    Memory, MergedMemory, Partial, ReluFeatures, Scalar, StateFormat, attention::naive,
};
use ndarray::{Array2, ArrayView2, ArrayViewMut1, ArrayViewMut2, array, s};

fn part<T: Scalar>(numerator: [f64; 2], denominator: f64, log_scale: f64) -> Partial<T> {
    let number = T::from_f64;
    Partial::from_parts(
        array![[number(numerator[0]), number(numerator[1])]],
        array![number(denominator)],
        array![number(log_scale)],
    )
    .unwrap()
}

/// The mean of some parts, merged in the order given.
fn mean<T: Scalar>(parts: &[Partial<T>]) -> Result<Array2<T>, Error> {
    let mut answer = Partial::new(1, 2).unwrap();
    parts.iter().for_each(|part| answer.merge(part).unwrap());
    let mut out = Array2::from_elem((1, 2), T::nan());
    answer.normalize_into(out.view_mut()).map(|()| out)
}

#[test]
fn sums_of_no_weight_change_nothing_whatever_their_log_scale() {
    fn check<T: Scalar>(least: f64) {
        for log_scale in [-1e4, least, 0.0, 500.0, 1e4] {
            let nothing = part::<T>([0.0; 2], 0.0, log_scale);
            for own in [-900.0, -200.0, -50.0, 0.0, 80.0] {
                let near = part::<T>([2.0, 4.0], 2.0, own);
                for parts in [
                    vec![near.clone(), nothing.clone()],
                    vec![nothing.clone(), near.clone()],
                    vec![nothing.clone(), near.clone(), nothing.clone(), near.clone()],
                ] {
                    assert_eq!(mean(&parts).unwrap(), array![[T::from_f64(1.0), T::from_f64(2.0)]]);
                }
            }
            assert!(matches!(mean(&[nothing]), Err(Error::Normalizer { row: 0 })));
        }
    }
    check::<f32>(-80.0);
    check::<f64>(-700.0);
}

/// A thousand terms below the smallest normal number, which have lost their digits, may be missing
/// from a sum: one that they could change is not divided by.
#[test]
fn sums_that_may_have_lost_terms_are_not_divided_by() {
    fn check<T: Scalar>() {
        let least = 1024.0 * T::min_positive_value().as_f64() / T::epsilon().as_f64();
        for (size, is_divided) in [(2.0, true), (0.5, false), (1e-3, false)] {
            for denominator in [size * least, -size * least] {
                let found = mean(&[part::<T>([denominator, 0.0], denominator, 0.0)]);
                match is_divided {
                    true => assert_eq!(found.unwrap(), array![[T::one(), T::zero()]]),
                    false => assert!(matches!(found, Err(Error::Normalizer { row: 0 }))),
                }
            }
        }
    }
    check::<f32>();
    check::<f64>();
}

/// The right value by logarithms in `f64`: a part of denominator `d` at log scale `l` weighs
/// `ln d + l`.
#[test]
fn the_part_that_weighs_more_sets_the_log_scale() {
    for (first, second) in [
        ((2.0, -50.0), (1e-25, 0.0)),
        ((2.0, -58.0), (1e-25, 0.0)),
        ((2.0, -100.0), (1e-25, 0.0)),
        ((1e-20, 60.0), (1e-25, 80.0)),
        ((1e20, -120.0), (1e-20, -10.0)),
        ((1e25, -150.0), (1e-25, -20.0)),
        ((3.0, 5.0), (0.5, 6.0)),
        ((1.0, -1e4), (1.0, 1e4)),
    ] {
        let means = [[1.0, -2.0], [5.0, 3.0]];
        let weights = [first, second].map(|(d, l): (f64, f64)| d.ln() + l);
        let largest = weights[0].max(weights[1]);
        let [a, b] = weights.map(|w| (w - largest).exp());
        let right = [0, 1].map(|c| (a * means[0][c] + b * means[1][c]) / (a + b));
        let parts = [(first, means[0]), (second, means[1])]
            .map(|((d, l), m)| part::<f32>([m[0] * d, m[1] * d], d, l));
        let [x, y] = parts;
        for order in [[x.clone(), y.clone()], [y, x]] {
            let out = mean(&order).unwrap();
            assert_close("mean", &out, &array![[right[0], right[1]]], 16.0);
        }
    }
}

#[test]
fn where_the_far_part_weighs_nothing_the_window_answers_alone() {
    let (n, d) = (30, 4);
    let signs = |x: f64| Array2::from_elem((n, d), x as f32);
    for score in [-50.0, -90.0, -110.0, -300.0, -5000.0] {
        let size = f64::sqrt(-score / d as f64);
        let (q, k, v) = (signs(size), signs(-size), normal::<f32>(n, 2, 1.0, 3));
        let sees = |i: usize, j: usize| j <= i && (i - j < 4 || j < 1);
        let right = Array2::from_shape_fn((n, 2), |(i, c)| {
            let seen: Vec<_> = (0..n).filter(|&j| sees(i, j)).collect();
            seen.iter().map(|&j| f64::from(v[[j, c]])).sum::<f64>() / seen.len() as f64
        });
        let relu = ReluFeatures::<f32>::new(d).unwrap().with_epsilon(0.0).unwrap();
        let identity = IdentityFeatures::<f32>::new(d).unwrap();
        let maps: [Box<dyn FeatureMap<f32>>; 2] = [Box::new(relu), Box::new(Silent(identity))];
        for map in maps {
            let kernel = HybridAttention::<f32>::builder(d).window(4).sinks(1).scale(1.0);
            let kernel = kernel.far(Far::features(map)).build().unwrap();
            let out = kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap();
            assert_close("window alone", &out, &right, 64.0);
        }
    }
}

/// Features that are zero, at a log scale that is not.
#[derive(Clone, Debug)]
struct Silent(IdentityFeatures<f32>);

impl FeatureMap<f32> for Silent {
    fn head_dim(&self) -> usize {
        FeatureMap::<f32>::head_dim(&self.0)
    }

    fn num_features(&self) -> usize {
        FeatureMap::<f32>::num_features(&self.0)
    }

    fn map_queries(
        &self,
        _: ArrayView2<'_, f32>,
        mut values: ArrayViewMut2<'_, f32>,
        mut log_scale: ArrayViewMut1<'_, f32>,
    ) -> Result<(), Error> {
        values.fill(0.0);
        log_scale.fill(1000.0);
        Ok(())
    }
}

/// Keys whose features are all zero, among keys whose features are tiny.
#[test]
fn keys_without_weight_do_not_move_the_log_scale_of_the_others() {
    let (n, d) = (40, 3);
    let map = ReluFeatures::<f32>::new(d).unwrap().with_epsilon(0.0).unwrap();
    let kernel = LinearAttention::new(map).with_scale(1.0);
    let q = normal::<f32>(n, d, 1.0, 1).mapv(|x| x.abs() + 0.1);
    let v = normal::<f32>(n, 2, 1.0, 3);
    for size in [1e-10, 1e-20, 1e-37] {
        let mut k = normal::<f32>(n, d, 1.0, 2).mapv(|x| (x.abs() + 0.1) * size);
        for t in (2..n).step_by(3) {
            k.row_mut(t).fill(-1.0);
        }
        let weight = |i: usize, j: usize| -> f64 {
            (0..d).map(|c| f64::from(q[[i, c]]) * f64::from(k[[j, c]]).max(0.0)).sum()
        };
        let right = Array2::from_shape_fn((n, 2), |(i, c)| {
            let sum: f64 = (0..=i).map(|j| weight(i, j) * f64::from(v[[j, c]])).sum();
            sum / (0..=i).map(|j| weight(i, j)).sum::<f64>()
        });
        let out = kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap();
        assert_close("forward", &out, &right, 64.0);
        let mut stream = kernel.stream(2).unwrap();
        let mut out = Array2::zeros((n, 2));
        for t in 0..n {
            let r = s![t..t + 1, ..];
            stream.extend(q.slice(r), k.slice(r), v.slice(r), out.slice_mut(r)).unwrap();
        }
        assert_close("steps", &out, &right, 64.0);

        // and in a memory that is merged with one that has seen such keys only
        let halves = [0..1, 2..3, 3..n].map(|range| {
            let mut memory = kernel.memory::<f32>(2).unwrap();
            memory.absorb(k.slice(s![range.clone(), ..]), v.slice(s![range, ..])).unwrap();
            memory
        });
        for order in [[0, 1, 2], [1, 0, 2], [2, 1, 0]] {
            let mut all = kernel.memory(2).unwrap();
            order.iter().for_each(|&i| all.merge(&halves[i]).unwrap());
            let mut answer = Partial::new(1, 2).unwrap();
            all.read(q.slice(s![n - 1.., ..]), &mut answer).unwrap();
            let mut out = Array2::zeros((1, 2));
            answer.normalize_into(out.view_mut()).unwrap();
            let rest: Vec<_> = (0..n).filter(|&j| j != 1).collect();
            let sum = |c: usize| -> f64 {
                rest.iter().map(|&j| weight(n - 1, j) * f64::from(v[[j, c]])).sum()
            };
            let total: f64 = rest.iter().map(|&j| weight(n - 1, j)).sum();
            let right = array![[sum(0) / total, sum(1) / total]];
            assert_close("merged", &out, &right, 512.0);
        }
    }
}

/// Windows, sinks and far memories that do not fit into the room they begin with.
#[test]
fn memories_that_grow_are_their_formulas_and_the_same_bits_for_any_split() {
    let (n, d, dv) = (400, 5, 3);
    let [q, k, v] = tokens::<f64>(n, d, dv, 1.0, 9);
    let far = |entries, block| {
        FarFormula::Merged(crate::common::hybrid::Received { entries, block, ..RECEIVED })
    };
    for (window, sinks, heavy, far) in [
        (200, 4, 0, FarFormula::None),
        (130, 150, 0, FarFormula::None),
        (200, 3, 0, far(40, 1)),
        (16, 1, 0, far(140, 9)),
        (140, 0, 0, far(200, 1)),
        (4096, 4, 0, far(16_000, 1)),
    ] {
        let (calibration, metric, format, options) =
            (None, None, StateFormat::F32, Options::default());
        let formula =
            HybridFormula { window, sinks, heavy, far, calibration, metric, format, options };
        let kernel = hybrid::<f64>(&formula, d, 0);
        let scale = 1.0 / (d as f64).sqrt();
        let queries = [vec![q.clone()]];
        let [keys, values] = [&k, &v].map(std::slice::from_ref);
        let right = formula.causal(&queries, keys, values, scale, false);
        let whole = kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap();
        let what = format!("window {window}, sinks {sinks}");
        assert_close(&what, &whole, &right[0][0], 1e4);
        for cuts in [vec![1; n], vec![127, 2, 126, 1, 144], vec![399, 1]] {
            let mut stream = kernel.stream(dv).unwrap();
            let mut out = Array2::zeros((n, dv));
            let mut at = 0;
            for cut in cuts {
                // at each cut a stream that was saved and restored, or went back, takes over
                let state = stream.save().unwrap();
                let mut other = kernel.stream(dv).unwrap();
                other.restore(&state).unwrap();
                assert!(other.checkpoint());
                let r = s![..140.min(n), ..];
                let mut unused = Array2::zeros((140, dv));
                other.extend(q.slice(r), k.slice(r), v.slice(r), unused.view_mut()).unwrap();
                other.rollback().unwrap();
                if cut > 1 || at % 97 == 0 {
                    stream = other;
                }
                let r = s![at..at + cut, ..];
                stream.extend(q.slice(r), k.slice(r), v.slice(r), out.slice_mut(r)).unwrap();
                at += cut;
            }
            assert_eq!(out, whole, "{what}");
        }
    }
}

#[test]
fn a_merged_memory_by_itself_grows_and_stays_exact_while_it_has_room() {
    let (n, d) = (500, 4);
    let [q, k, v] = tokens::<f64>(n, d, 3, 1.0, 4);
    let mut memory = MergedMemory::<f64>::new(d, 3, 16_000, 0.5).unwrap();
    memory.absorb(k.view(), v.view()).unwrap();
    let mut answer = Partial::new(n, 3).unwrap();
    memory.read(q.view(), &mut answer).unwrap();
    let mut out = Array2::zeros((n, 3));
    answer.normalize_into(out.view_mut()).unwrap();
    let right = naive::softmax(&wide(&q), &wide(&k), &wide(&v), 0.5, Mask::Full);
    assert_close("merged", &out, &right, 1e3);
    assert_eq!(memory.counts(), vec![1.0; n]);
}
