//! However the features of a DCT map are computed, they are those of its projection: products,
//! transforms over lanes, transforms one by one; chunks and single tokens.

mod common;

use common::normal;
use dijiang::{DctFeatures, FeatureMap, OfficialDijiang, Radii, Scalar};
use ndarray::{Array1, Array2, s};

/// φ_i(x) = exp(ω_i·x − |x|²/2)/√m, or softmax(ω·x) for the official map, in `f64`.
fn expected(omega: &Array2<f64>, x: &Array2<f64>, official: bool) -> Array2<f64> {
    let logits = x.dot(&omega.t());
    let m = omega.nrows() as f64;
    Array2::from_shape_fn(logits.dim(), |(t, i)| {
        let row = x.row(t);
        if official {
            let largest = logits.row(t).fold(f64::NEG_INFINITY, |a, &b| a.max(b));
            let total: f64 = logits.row(t).iter().map(|l| (l - largest).exp()).sum();
            (logits[[t, i]] - largest).exp() / total
        } else {
            (logits[[t, i]] - 0.5 * row.dot(&row)).exp() / m.sqrt()
        }
    })
}

fn check_dct<T: Scalar>(map: &DctFeatures<T>, tolerance: f64) {
    check(map, map.projection(), false, tolerance);
}

fn check_official<T: Scalar>(map: &OfficialDijiang<T>, tolerance: f64) {
    check(map, map.projection(), true, tolerance);
}

fn check<T: Scalar>(
    map: &impl FeatureMap<T>,
    projection: Array2<T>,
    official: bool,
    tolerance: f64,
) {
    let (d, m) = (map.head_dim(), map.num_features());
    let omega = projection.mapv(T::as_f64);
    let size = 1.5 / (d as f64).sqrt();
    let x = normal::<T>(70, d, 1.0, 1).mapv(|x| x * T::from_f64(size));
    let wide = x.mapv(T::as_f64);
    let exact = expected(&omega, &wide, official);
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
        check_official(&OfficialDijiang::<f64>::new(radii.clone()).unwrap(), 1e-12);
        check_official(&OfficialDijiang::<f32>::new(radii.mapv(|r| r as f32)).unwrap(), 2e-5);
    }
}
