//! Every feature map by head dimension and number of features: `cargo bench --bench feature_maps`.

mod oracle;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dijiang::attention::naive::features::{self, Features};
use dijiang::{
    DctFeatures, EluFeatures, FeatureMap, LinearAttention, Mask, Performer, Points, Radii,
    ReluFeatures, TaylorFeatures, Wpff,
};
use ndarray::{Array1, Array2, ArrayView2};

const TOKENS: usize = 512;

/// An exponential map and its projection, whose rows are ω; the oracle computes its attention from
/// that alone.
type Exponential = (&'static str, Box<dyn FeatureMap<f32>>, Array2<f32>);

fn exponential(d: usize, m: usize) -> Vec<Exponential> {
    let performer = Performer::new(d, m, 1).expect("sizes are positive");
    let dct = DctFeatures::new(d, m, 1).expect("sizes are positive");
    let antithetic = dct.clone().with_radii(Radii::Antithetic).expect("m is even");
    let wpff =
        Wpff::with_sampling(d, m, 1, Points::Sobol, Radii::Sobol).expect("sizes are positive");
    let wpff_projection = &wpff.points() * &wpff.radii().view().insert_axis(ndarray::Axis(1));
    let (omega, dct_omega, antithetic_omega) =
        (performer.projection().to_owned(), dct.projection(), antithetic.projection());
    vec![
        ("performer", Box::new(performer), omega),
        ("dct", Box::new(dct), dct_omega),
        ("dct-antithetic", Box::new(antithetic), antithetic_omega),
        ("wpff-sobol", Box::new(wpff), wpff_projection),
    ]
}

/// Refuses to time a map that does not give the attention of its formula.
fn check(name: &str, map: Box<dyn FeatureMap<f32>>, omega: ArrayView2<f32>) {
    use dijiang::Attention;
    let d = omega.ncols();
    let [q, k, v] = [2, 3, 4].map(|seed| oracle::normal(40, d, seed));
    let found = LinearAttention::new(map)
        .forward(q.view(), k.view(), v.view(), Mask::Causal)
        .expect("finite input");
    let expected = oracle::linear(omega, q.view(), k.view(), v.view(), Mask::Causal);
    oracle::assert_close(name, found.view(), &expected, oracle::TOLERANCE);
}

fn maps(c: &mut Criterion) {
    for d in [32, 64, 128] {
        for m in [64, 256] {
            let mut group = c.benchmark_group(format!("d={d} m={m}"));
            group.throughput(Throughput::Elements(TOKENS as u64)).sample_size(20);
            for ((name, map, _), (_, copy, omega)) in
                exponential(d, m).into_iter().zip(exponential(d, m))
            {
                check(name, copy, omega.view());
                time(&mut group, name, &*map);
            }
            group.finish();
        }
        let mut group = c.benchmark_group(format!("d={d}, own m"));
        group.throughput(Throughput::Elements(TOKENS as u64)).sample_size(20);
        let taylor = TaylorFeatures::new(d).expect("d is positive");
        check_product("taylor", &taylor, features::taylor);
        time(&mut group, "taylor", &taylor);
        let elu = EluFeatures::new(d).expect("d is positive");
        check_product("elu", &elu, features::elu);
        time(&mut group, "elu", &elu);
        let relu = ReluFeatures::new(d).expect("d is positive");
        check_product("relu", &relu, |x| features::relu(x, 0.001));
        time(&mut group, "relu", &relu);
        group.finish();
    }
}

/// Refuses to time a map whose products are not those of its formula.
fn check_product(
    name: &str,
    map: &dyn FeatureMap<f32>,
    formula: impl Fn(&Array2<f64>) -> Features,
) {
    let x = oracle::normal(6, map.head_dim(), 1).mapv(|x| 0.3 * x);
    let (mut values, mut log_scale) = (Array2::zeros((6, map.num_features())), Array1::zeros(6));
    map.map_queries(x.view(), values.view_mut(), log_scale.view_mut()).expect("finite input");
    let phi = formula(&oracle::wide(x.view())).absolute();
    let expected = phi.dot(&phi.t());
    let found = Array2::from_shape_fn((6, 6), |(i, j)| {
        values.row(i).dot(&values.row(j)) * (log_scale[i] + log_scale[j]).exp()
    });
    oracle::assert_close(name, found.view(), &expected, oracle::TOLERANCE);
}

fn time(
    group: &mut criterion::BenchmarkGroup<'_, criterion::measurement::WallTime>,
    name: &str,
    map: &dyn FeatureMap<f32>,
) {
    let x = oracle::normal(TOKENS, map.head_dim(), 5).mapv(|x| 0.3 * x);
    let (mut values, mut log_scale) =
        (Array2::zeros((TOKENS, map.num_features())), Array1::zeros(TOKENS));
    group.bench_function(name, |b| {
        b.iter(|| {
            map.map_queries(x.view(), values.view_mut(), log_scale.view_mut())
                .expect("finite input")
        });
    });
}

criterion_group!(benches, maps);
criterion_main!(benches);
