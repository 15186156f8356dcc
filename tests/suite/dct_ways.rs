//! However the features of a DCT map are computed, they are those of its projection: products,
//! transforms over lanes, transforms one by one; chunks and single tokens.

use crate::common::normal;
use dijiang::attention::naive::features;
use dijiang::{DctFeatures, FeatureMap, OfficialDijiang, Radii, Scalar};
use ndarray::{Array1, Array2, s};

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
