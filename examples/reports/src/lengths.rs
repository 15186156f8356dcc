//! What is measured over long texts.

use dijiang::attention::naive::features::Features;
use dijiang::{Error, FeatureMap};
use ndarray::{Array1, Array2};

/// The lengths at which errors are told: powers of ten from a thousand on, and the last.
#[must_use]
pub fn lengths(last: usize) -> Vec<usize> {
    let mut all: Vec<usize> = (3..).map(|i| 10_usize.pow(i)).take_while(|&n| n < last).collect();
    all.push(last);
    all
}

/// `φ(√scale·x)` of keys or queries `[n, head_dim]`, in absolute terms, `[n, num_features]`.
///
/// # Errors
///
/// Those of the map.
pub fn features(
    map: &dyn FeatureMap<f64>,
    x: &Array2<f64>,
    scale: f64,
    keys: bool,
) -> Result<Array2<f64>, Error> {
    let x = x * scale.sqrt();
    let mut values = Array2::zeros((x.nrows(), map.num_features()));
    let mut log_scale = Array1::zeros(x.nrows());
    match keys {
        true => map.map_keys(x.view(), values.view_mut(), log_scale.view_mut())?,
        false => map.map_queries(x.view(), values.view_mut(), log_scale.view_mut())?,
    }
    Ok(Features { values, log_scale }.absolute())
}
