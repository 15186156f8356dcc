//! The gradient of the calibrated Taylor map.

use crate::check;
use crate::error::Error;
use crate::features::calibrated_taylor::CalibratedTaylor;
use crate::features::gradient::MapGradient;
use crate::features::side::Side;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use ndarray::{Array1, Array2, ArrayView1, Axis};

/// Gradients by the parameters of one side, in f64.
#[derive(Debug)]
struct SideSums {
    /// By the mean that is taken from vectors, and by that which they are multiplied with.
    mean: Array1<f64>,
    other: Array1<f64>,
    basis: Array2<f64>,
    /// By the roots of the coefficients.
    roots: [f64; 3],
}

fn wide<T: Scalar>(x: ArrayView1<'_, T>) -> Array1<f64> {
    x.mapv(T::as_f64)
}

impl<T: Scalar> CalibratedTaylor<T> {
    pub(super) fn all_parameters(&self) -> Parameters<T> {
        Parameters::new()
            .with("query_mean", self.query_mean.clone().into_dyn())
            .with("key_mean", self.key_mean.clone().into_dyn())
            .with("query_basis", self.query_basis.clone().into_dyn())
            .with("key_basis", self.key_basis.clone().into_dyn())
            .with("coefficients", Array1::from(self.coefficients.to_vec()).into_dyn())
    }

    /// The same map with other means, bases or `coefficients`, as
    /// [`FeatureMap::with_parameters`](crate::FeatureMap::with_parameters) makes it.
    ///
    /// A coefficient of 0 gets no gradient: it stands under a root.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] if there is no parameter of a name, or it has another shape; those of
    /// [`from_parts`](Self::from_parts).
    pub fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Self, Error> {
        let mut all = self.all_parameters();
        all.set(parameters)?;
        let coefficients = all.vector("coefficients");
        Self::from_parts(
            all.vector("query_mean"),
            all.vector("key_mean"),
            all.matrix("query_basis").to_owned(),
            all.matrix("key_basis").to_owned(),
            [coefficients[0], coefficients[1], coefficients[2]],
        )
    }

    /// With `y = B(x − mean)`, `l = (x − origin)·other` and features `φ_i = e^l·p_i(y)`,
    ///
    /// ```text
    /// dx = (Σ_i φ_i dφ_i)·other + Bᵀ dy,    dy_l = e^l Σ_i dφ_i ∂p_i/∂y_l.
    /// ```
    pub(super) fn gradient(&self, gradient: MapGradient<'_, T>) -> Result<(), Error> {
        let (rank, head_dim) = self.query_basis.dim();
        gradient.check(head_dim, (rank + 1) * (rank + 2) / 2)?;
        let MapGradient { side, x, values, log_scale, d_values, mut d_x, d_parameters } = gradient;
        let [query_mean, key_mean] = [&self.query_mean, &self.key_mean].map(|x| wide(x.view()));
        let zero = Array1::zeros(head_dim);
        let (mean, origin, other, basis) = match side {
            Side::Query => (&query_mean, &zero, &key_mean, &self.query_basis),
            Side::Key => (&key_mean, &key_mean, &query_mean, &self.key_basis),
        };
        let basis = basis.mapv(T::as_f64);
        let roots = self.coefficients.map(|c| c.as_f64().sqrt());
        let mut sums = SideSums {
            mean: Array1::zeros(head_dim),
            other: Array1::zeros(head_dim),
            basis: Array2::zeros(basis.dim()),
            roots: [0.0; 3],
        };
        for (t, mut d_x) in d_x.outer_iter_mut().enumerate() {
            let x = wide(x.index_axis_move(Axis(0), t));
            let centred = &x - mean;
            let y = basis.dot(&centred);
            let log = (&x - origin).dot(other) - log_scale[t].as_f64();
            let d = wide(d_values.index_axis_move(Axis(0), t));
            // e^l·dφ = e^{l − log_scale}·d_values
            let (d_log, unit) = (wide(values.index_axis_move(Axis(0), t)).dot(&d), log.exp());
            let d_y = terms(y.view(), d.view(), roots, &mut sums.roots, unit);
            let own = other * d_log + basis.t().dot(&d_y);
            d_x.iter_mut().zip(&own).for_each(|(sum, &x)| *sum += T::from_f64(x));
            sums.mean -= &basis.t().dot(&d_y);
            sums.other.scaled_add(d_log, &(&x - origin));
            if side == Side::Key {
                sums.mean.scaled_add(-d_log, other); // which is the origin as well
            }
            for (mut row, &d) in sums.basis.outer_iter_mut().zip(&d_y) {
                row.scaled_add(d, &centred);
            }
        }
        if let Some(d_parameters) = d_parameters {
            self.add_sums(side, &sums, d_parameters);
        }
        check::gradient("the gradient by `x`", d_x.view())
    }

    fn add_sums(&self, side: Side, sums: &SideSums, d_parameters: &mut Parameters<T>) {
        let (mean, other, basis) = match side {
            Side::Query => ("query_mean", "key_mean", "query_basis"),
            Side::Key => ("key_mean", "query_mean", "key_basis"),
        };
        let mut add = |name: &str, own: &mut dyn Iterator<Item = f64>| {
            if let Some(gradient) = d_parameters.get_mut(name) {
                gradient.iter_mut().zip(own).for_each(|(sum, x)| *sum += T::from_f64(x));
            }
        };
        add(mean, &mut sums.mean.iter().copied());
        add(other, &mut sums.other.iter().copied());
        add(basis, &mut sums.basis.iter().copied());
        let of_root = |(&d_root, c): (&f64, &T)| {
            if *c == T::zero() { 0.0 } else { 0.5 * d_root / c.as_f64().sqrt() }
        };
        add("coefficients", &mut sums.roots.iter().zip(&self.coefficients).map(of_root));
    }
}

/// `unit·Σ_i d_i ∂p_i/∂y`, with `p = (√c0, √c1·y_l, √(c2/2)·y_l², √c2·y_l y_m)`. Adds the gradients
/// by the roots.
fn terms(
    y: ArrayView1<'_, f64>,
    d: ArrayView1<'_, f64>,
    [_, linear, quadratic]: [f64; 3],
    d_roots: &mut [f64; 3],
    unit: f64,
) -> Array1<f64> {
    let rank = y.len();
    let half_root = core::f64::consts::FRAC_1_SQRT_2;
    let mut d_y = Array1::zeros(rank);
    d_roots[0] += unit * d[0];
    let mut at = 1 + rank;
    for l in 0..rank {
        d_y[l] += unit * linear * d[1 + l];
        d_roots[1] += unit * d[1 + l] * y[l];
        d_y[l] += unit * 2.0 * quadratic * half_root * y[l] * d[at];
        d_roots[2] += unit * half_root * y[l] * y[l] * d[at];
        for m in l + 1..rank {
            let d = unit * d[at + m - l];
            d_y[l] += quadratic * y[m] * d;
            d_y[m] += quadratic * y[l] * d;
            d_roots[2] += y[l] * y[m] * d;
        }
        at += rank - l;
    }
    d_y
}
