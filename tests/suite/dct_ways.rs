//! However the features of a DCT map are computed, they are those of its projection: products,
//! transforms over lanes, transforms one by one; chunks and single tokens.

use crate::common::{assert_close, normal};
use dijiang::attention::naive::features;
use dijiang::{DctFeatures, FeatureMap, MapGradient, OfficialDijiang, Radii, Scalar, Side};
use ndarray::{Array1, Array2, Axis, s};

fn check_dct<T: Scalar>(map: &DctFeatures<T>, tolerance: f64) {
    let omega = map.projection().mapv(T::as_f64);
    let ones = Array1::ones(map.num_features());
    check(map, |x| features::performer(x, &omega, &ones).absolute(), tolerance);
}

fn check_official<T: Scalar>(map: &OfficialDijiang<T>, tolerance: f64) {
    let radii = map.radii().mapv(T::as_f64);
    check(map, |x| features::official_dijiang(x, &radii).absolute(), tolerance);
}

fn check<T: Scalar>(
    map: &impl FeatureMap<T>,
    exact: impl Fn(&Array2<f64>) -> Array2<f64>,
    tolerance: f64,
) {
    let (d, m) = (map.head_dim(), map.num_features());
    let size = 1.5 / (d as f64).sqrt();
    let x = normal::<T>(70, d, 1.0, 1).mapv(|x| x * T::from_f64(size));
    let exact = exact(&x.mapv(T::as_f64));
    for rows in [0..70, 0..1, 69..70, 3..20] {
        let n = rows.len();
        let (mut values, mut scale) =
            (Array2::from_elem((n, m), T::nan()), Array1::from_elem(n, T::nan()));
        map.map_queries(x.slice(s![rows.clone(), ..]), values.view_mut(), scale.view_mut())
            .unwrap();
        for (i, t) in rows.enumerate() {
            let largest = exact.row(t).fold(0.0, |a: f64, &b| a.max(b));
            for j in 0..m {
                let found = values[[i, j]].as_f64() * scale[i].as_f64().exp();
                let error = (found - exact[[t, j]]).abs() / largest;
                assert!(
                    error <= tolerance,
                    "{} d={d} m={m} row {t} feature {j}: {error:e}",
                    T::NAME
                );
            }
        }
    }
}

#[test]
fn every_way_gives_the_features_of_the_projection() {
    for d in [32, 64, 80, 128, 256, 512, 600, 1024] {
        for m in [10, 64, d + 6] {
            check_dct(&DctFeatures::<f64>::new(d, m, 3).unwrap(), 1e-12);
            check_dct(&DctFeatures::<f32>::new(d, m, 3).unwrap(), 2e-5);
            let antithetic =
                DctFeatures::<f64>::new(d, m, 3).unwrap().with_radii(Radii::Antithetic).unwrap();
            check_dct(&antithetic, 1e-12);
        }
        let radii = normal::<f64>(1, d, 1.0, 4).into_shape_with_order(d).unwrap();
        check_official(&DctFeatures::<f64>::official(radii.clone()).unwrap(), 1e-12);
        check_official(&DctFeatures::<f32>::official(radii.mapv(|r| r as f32)).unwrap(), 2e-5);
    }
}

/// Of features `φ_i = w_i·exp(ω_i·x − |x|²/2)` the gradient is `Σ_i a_i (ω_i − x)`, with
/// `a_i = φ_i·∂L/∂φ_i`; of a softmax, `Σ_i (a_i − φ_i Σ_l a_l)·ω_i`. It is added to what is there.
fn check_gradient<T: Scalar>(map: &impl FeatureMap<T>, omega: &Array2<T>, is_softmax: bool) {
    let (d, m) = (map.head_dim(), map.num_features());
    let x = normal::<T>(5, d, 1.0 / (d as f64).sqrt(), 1);
    let mut values = Array2::from_elem((5, m), T::nan());
    let mut log_scale = Array1::from_elem(5, T::nan());
    map.map_queries(x.view(), values.view_mut(), log_scale.view_mut()).unwrap();
    let d_values = normal::<T>(5, m, 1.0, 2);
    let mut d_x = Array2::ones((5, d));
    map.backward(MapGradient {
        side: Side::Query,
        x: x.view(),
        values: values.view(),
        log_scale: log_scale.view(),
        d_values: d_values.view(),
        d_x: d_x.view_mut(),
        d_parameters: None,
    })
    .unwrap();
    let [x, omega, values, d_values] =
        [&x, omega, &values, &d_values].map(|array| array.mapv(T::as_f64));
    let mut a = &values * &d_values;
    let totals = a.sum_axis(Axis(1)).insert_axis(Axis(1));
    let exact = if is_softmax {
        a -= &(values * totals);
        a.dot(&omega)
    } else {
        a.dot(&omega) - x * totals
    };
    assert_close(&format!("d={d} m={m}"), &d_x, &(exact + 1.0), 64.0);
}

#[test]
fn every_way_has_the_gradient_of_the_projection() {
    // a product, transforms over lanes with and without one for single tokens, one by one
    for (d, m) in [(32, 40), (64, 70), (128, 300), (600, 10), (600, 606)] {
        let map = DctFeatures::<f64>::new(d, m, 3).unwrap();
        check_gradient(&map, &map.projection(), false);
        let map = DctFeatures::<f32>::new(d, m, 3).unwrap();
        check_gradient(&map, &map.projection(), false);
        let radii = normal::<f64>(1, d, 1.0, 4).into_shape_with_order(d).unwrap();
        let map = OfficialDijiang::new(radii).unwrap();
        check_gradient(&map, &map.projection(), true);
    }
}
