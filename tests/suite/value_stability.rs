//! The streams of every seeded algorithm, as they were first released: a release never changes
//! results silently. A failure here means a breaking change, to be named in CHANGELOG.md.

use dijiang::{DctFeatures, Linformer, Performer, Points, Radii, Wpff};
use ndarray::{Array2, ArrayView2};

/// The first two and the last number, and the sum of all absolute values, to 1e-13.
#[track_caller]
fn check(name: &str, x: ArrayView2<'_, f64>, expected: [f64; 4]) {
    let last = x[[x.nrows() - 1, x.ncols() - 1]];
    let found = [x[[0, 0]], x[[0, 1]], last, x.mapv(f64::abs).sum()];
    let same = found.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 1e-13 * (1.0 + b.abs()));
    assert!(same, "{name}: {found:?} instead of {expected:?}");
}

fn row(x: &ndarray::Array1<f64>) -> Array2<f64> {
    x.clone().insert_axis(ndarray::Axis(0))
}

#[test]
fn performer() {
    check(
        "iid",
        Performer::<f64>::iid(5, 7, 42).unwrap().projection(),
        [0.47300779854805475, 1.6475298562196277, 0.7237726950599805, 27.041514857479708],
    );
    check(
        "orthogonal",
        Performer::<f64>::new(5, 7, 42).unwrap().projection(),
        [0.6307567902049236, 2.1969841661506897, 2.493477874772752, 31.001543181225315],
    );
    check(
        "hyperbolic",
        Performer::<f64>::hyperbolic(5, 8, 42).unwrap().projection(),
        [0.36584800320972793, 1.2742823902196734, 0.12929431643126274, 25.090861003518476],
    );
}

#[test]
fn dct() {
    let map = DctFeatures::<f64>::new(6, 9, 42).unwrap();
    check(
        "chi",
        map.projection().view(),
        [0.6968651893763584, -0.5922920517075658, 0.3712874596820879, 42.644376667778076],
    );
    check(
        "chi radii",
        row(map.radii()).view(),
        [2.5128823572318786, 1.913798789406727, 2.1181884385352325, 21.10365990637342],
    );
    let map = map.with_radii(Radii::Normal).unwrap();
    check(
        "normal",
        map.projection().view(),
        [0.07826335689841983, -0.0665189837827465, -0.04946836382345887, 14.530503396662995],
    );
    let map = DctFeatures::<f64>::new(6, 10, 42).unwrap().with_radii(Radii::Antithetic).unwrap();
    check(
        "antithetic",
        map.projection().view(),
        [0.6792853348536344, -0.5773502691896256, 0.6283178020216299, 49.46745172621632],
    );
}

#[test]
fn wpff() {
    let map = Wpff::<f64>::new(5, 7, 42).unwrap();
    check(
        "wpff orthogonal",
        map.points(),
        [0.25698541638934397, 0.8951039441931379, 0.902164937850495, 13.3187369972794],
    );
    check(
        "stratified",
        row(map.radii()).view(),
        [2.662049540387386, 1.561597488435817, 1.8362661557006579, 14.843119478182304],
    );
    let map = Wpff::<f64>::with_sampling(5, 7, 42, Points::Sobol, Radii::Sobol).unwrap();
    check(
        "sobol",
        map.points(),
        [-0.22633101092654395, 0.26277964545343124, 0.5511220455518137, 12.811896511092277],
    );
    check(
        "sobol radii",
        row(map.radii()).view(),
        [2.0614528961939933, 2.392794160637572, 2.977416866255767, 15.43736057676194],
    );
    let map = Wpff::<f64>::with_sampling(5, 7, 42, Points::Orthogonal, Radii::Sobol).unwrap();
    check(
        "orthogonal, sobol radii",
        row(map.radii()).view(),
        [2.527039013543406, 1.9850781165357088, 2.3057909354145214, 15.98960708355459],
    );
    // beyond the tables: more than 256 dimensions
    let map = Wpff::<f64>::with_sampling(300, 2, 42, Points::Sobol, Radii::Sobol).unwrap();
    check(
        "sobol beyond the tables",
        map.points(),
        [-0.046165368889649075, 0.05359989874735321, 0.001049674149441842, 27.43184744111649],
    );
}

/// E is the independent projection of the same seed, divided by √rank.
#[test]
fn linformer() {
    let kernel = Linformer::<f64>::new(3, 5, 7, 42).unwrap();
    let [e, f] = kernel.projections();
    check(
        "keys",
        e,
        [0.21153551828819533, 0.7367977506935084, 0.3236809892824685, 12.093333087179031],
    );
    check(
        "values",
        f,
        [0.22956698116273813, -0.08533460732116525, -0.32732524667210705, 12.084813844602618],
    );
}

/// The same seed, the same map in f32 as in f64, rounded.
#[test]
fn both_number_types_share_a_stream() {
    let (wide, narrow) =
        (Performer::<f64>::new(5, 7, 1).unwrap(), Performer::<f32>::new(5, 7, 1).unwrap());
    assert_eq!(wide.projection().mapv(|x| x as f32), narrow.projection());
    let (wide, narrow) =
        (DctFeatures::<f64>::new(5, 7, 1).unwrap(), DctFeatures::<f32>::new(5, 7, 1).unwrap());
    assert_eq!(wide.radii().mapv(|x| x as f32), narrow.radii());
}

/// Another seed, another map.
#[test]
fn seeds_differ() {
    assert_ne!(Performer::<f64>::new(5, 7, 1).unwrap(), Performer::<f64>::new(5, 7, 2).unwrap());
    assert_ne!(
        DctFeatures::<f64>::new(5, 7, 1).unwrap(),
        DctFeatures::<f64>::new(5, 7, 2).unwrap()
    );
    assert_ne!(Wpff::<f64>::new(5, 7, 1).unwrap(), Wpff::<f64>::new(5, 7, 2).unwrap());
}

/// Scrambled Sobol points are a net: of 2^k points, each interval of length 2^−k of every
/// coordinate holds one; also where the tables end, seen through the radii, which are one more
/// coordinate.
#[test]
fn sobol_radii_are_stratified() {
    for d in [3, 256, 300] {
        let map = Wpff::<f64>::with_sampling(d, 16, 7, Points::Sobol, Radii::Sobol).unwrap();
        let mut radii = map.radii().to_vec();
        radii.sort_by(f64::total_cmp);
        for (i, r) in radii.iter().enumerate() {
            let (low, high) = (i as f64 / 16.0, (i + 1) as f64 / 16.0);
            let low = if i == 0 { 0.0 } else { dijiang::projection::chi_quantile(d, low).unwrap() };
            let high = if i == 15 {
                f64::INFINITY
            } else {
                dijiang::projection::chi_quantile(d, high).unwrap()
            };
            assert!(low <= *r && *r <= high, "d={d}: radius {i} is {r}, outside [{low}, {high}]");
        }
    }
}
