//! Exponential features on directions that fast transforms project on: by whichever way is
//! fastest.

use crate::error::Error;
use crate::features::columns::{ColumnGradient, ColumnMap, Columns};
use crate::features::exponential::{Dense, Exponents, Weights, subtract_norms, to_logits};
use crate::features::side::Side;
use crate::features::sums::ProjectionSums;
use crate::kernel::buffer::Buffer;
use crate::kernel::loops::dct::LanesDct;
use crate::scalar::Scalar;
use core::fmt::Debug;
use ndarray::{Array1, Array2};

/// Directions of features with their radii, ω_i, whose products with a vector are fast transforms.
pub(crate) trait FastDirections<T: Scalar>: Debug + Send + Sync {
    /// Numbers of a direction.
    fn head_dim(&self) -> usize;

    /// The radii: the lengths of the ω_i, up to their signs.
    fn radii(&self) -> &Array1<T>;

    /// The same directions with other radii.
    fn with_radii(self, radii: Array1<T>) -> Self
    where
        Self: Sized;

    /// The factors of the last transform of [`logits_of_columns`](Self::logits_of_columns), to be
    /// multiplied by `log₂e`.
    fn last_factors(&self) -> &[T];

    /// How many numbers [`logits`](Self::logits) works in.
    fn scratch_len(&self) -> usize;

    /// ω_i·x of every feature.
    fn logits(&self, x: &[T], logits: &mut [T], scratch: &mut [T]);

    /// The gradient by one vector from that by its logits, without its end: `Σ_i a_i ω_i`.
    fn backward_of_row(&self, a: &[T], d_x: &mut [T], scratch: &mut [T]);

    /// The same of columns, with last factors in the place of those of the logits.
    fn backward_of_columns(
        &self,
        lanes: &LanesDct<T>,
        last_factors: &[T],
        gradient: &mut ColumnGradient<'_, T>,
        scratch: &mut [Buffer<T>; 2],
    );

    /// `log₂e·ω_i·x` of every feature for all columns at once, into their values.
    fn logits_of_columns(
        &self,
        lanes: &LanesDct<T>,
        last_factors: &[T],
        columns: &mut Columns<'_, T>,
        scratch: &mut [Buffer<T>; 2],
    );
}

/// The factor that makes frequency `j` of rustdct's DCT-II orthonormal.
#[allow(clippy::cast_precision_loss)]
pub(crate) fn norm(j: usize, head_dim: usize) -> f64 {
    let numerator = if j == 0 { 1.0 } else { 2.0 };
    (numerator / head_dim as f64).sqrt()
}

/// The exponential features of such directions: `D_i·exp(ω_i·x − |x|²/2)`, divided by `√m` unless
/// the weights say otherwise.
#[derive(Clone, Debug)]
pub(crate) struct FastExponential<T, D> {
    directions: D,
    way: Way<T>,
}

impl<T: Scalar, D: FastDirections<T>> FastExponential<T, D> {
    pub(crate) fn new(directions: D, weights: &Weights<T>) -> Self {
        let way = Way::choose(&directions, weights);
        Self { directions, way }
    }

    /// The same features with other weights.
    pub(crate) fn set_weights(&mut self, weights: &Weights<T>) {
        self.way = Way::choose(&self.directions, weights);
    }

    /// The matrix `[num_features, head_dim]` whose rows are the ω_i.
    pub(crate) fn projection(&self) -> Array2<T> {
        projection(&self.directions)
    }

    /// The logits to base 2 of every column, one after the other.
    fn transform_rows(&self, columns: &mut Columns<'_, T>, scratch: &mut Buffer<T>) {
        let (d, m) = (self.directions.head_dim(), self.directions.radii().len());
        let Columns { x, width, tokens, values, .. } = columns.with_features(m);
        let log2_e = T::from_f64(core::f64::consts::LOG2_E);
        scratch.resize(d + m + self.directions.scratch_len());
        let (column, rest) = scratch.split_at_mut(d);
        let (logits, scratch) = rest.split_at_mut(m);
        for t in 0..tokens {
            column.iter_mut().zip(x[t..].iter().step_by(width)).for_each(|(c, &x)| *c = x);
            self.directions.logits(column, logits, scratch);
            values[t..]
                .iter_mut()
                .step_by(width)
                .zip(&*logits)
                .for_each(|(value, &logit)| *value = logit * log2_e);
        }
    }
}

impl<T, D> FastExponential<T, D> {
    pub(crate) fn directions(&self) -> &D {
        &self.directions
    }
}

/// [`FastExponential::projection`], from the images of the unit vectors.
fn projection<T: Scalar>(directions: &impl FastDirections<T>) -> Array2<T> {
    let (head_dim, num_features) = (directions.head_dim(), directions.radii().len());
    let mut projection = Array2::zeros((num_features, head_dim));
    let mut scratch = vec![T::zero(); directions.scratch_len()];
    let mut logits = vec![T::zero(); num_features];
    let mut unit = vec![T::zero(); head_dim];
    for j in 0..head_dim {
        unit.fill(T::zero());
        unit[j] = T::one();
        directions.logits(&unit, &mut logits, &mut scratch);
        projection.column_mut(j).iter_mut().zip(&logits).for_each(|(w, &logit)| *w = logit);
    }
    projection
}

/// How the logits of a chunk are computed; which way is fastest was measured, see
/// `docs/performance.md`.
#[derive(Clone, Debug)]
enum Way<T> {
    /// A product with the whole projection: small head dimensions.
    Dense(Dense<T>),
    /// Fast transforms of many tokens at once, powers of two, with the last factors `log₂e·r_i`
    /// times norms; the product for a single token, if it is small.
    Columns {
        lanes: LanesDct<T>,
        last_factors: Vec<T>,
        exponents: Exponents<T>,
        one: Option<Dense<T>>,
    },
    /// A fast transform of one token after the other.
    Rows(Exponents<T>),
}

/// Whether transforms of many tokens at once beat a product with the whole projection (measured,
/// see `docs/performance.md`).
fn columns_pay(head_dim: usize, num_features: usize) -> bool {
    head_dim >= 64 && num_features >= 64
}

/// Up to this many numbers a projection is faster than a transform of one token.
const SMALL_PRODUCT: usize = 1 << 14;

/// Up to this head dimension the product also beats a transform of one token after the other.
const DENSE_UP_TO: usize = 512;

impl<T: Scalar> Way<T> {
    fn choose(directions: &impl FastDirections<T>, weights: &Weights<T>) -> Self {
        let (head_dim, radii) = (directions.head_dim(), directions.radii());
        // The directions have length one.
        let longest = radii.iter().fold(0.0, |m: f64, r| m.max(r.as_f64().abs()));
        let exponents = Exponents::new(longest, weights);
        match LanesDct::new(head_dim) {
            Some(lanes) if columns_pay(head_dim, radii.len()) => {
                let base_2 = |x: &T| T::from_f64(x.as_f64() * core::f64::consts::LOG2_E);
                let last_factors = directions.last_factors().iter().map(base_2).collect();
                let small = head_dim * radii.len() <= SMALL_PRODUCT;
                let one = small.then(|| Dense::new(projection(directions).view(), weights));
                Self::Columns { lanes, last_factors, exponents, one }
            }
            _ if head_dim <= DENSE_UP_TO => {
                Self::Dense(Dense::new(projection(directions).view(), weights))
            }
            _ => Self::Rows(exponents),
        }
    }
}

impl<T: Scalar, D: FastDirections<T> + Clone> FastExponential<T, D> {
    /// The matrix whose rows are the directions of length one.
    pub(crate) fn unit_projection(&self) -> Array2<T> {
        let radii = Array1::ones(self.directions.radii().len());
        projection(&self.directions.clone().with_radii(radii))
    }
}

impl<T: Scalar, D: FastDirections<T>> FastExponential<T, D> {
    /// From the gradients by the logits, those by the vectors without their end and by `log₂e`:
    /// `log₂e·Σ_i a_i ω_i`.
    pub(crate) fn backward_of_logits(
        &self,
        gradient: &mut ColumnGradient<'_, T>,
        scratch: &mut [Buffer<T>; 2],
    ) {
        match &self.way {
            Way::Dense(dense) => dense.backward_of_logits(gradient),
            Way::Columns { lanes, last_factors, .. } => {
                self.directions.backward_of_columns(lanes, last_factors, gradient, scratch);
            }
            Way::Rows(_) => {
                let (d, m) = (self.directions.head_dim(), self.directions.radii().len());
                let ColumnGradient { width, tokens, ref d_values, ref mut d_x, .. } = *gradient;
                let log2_e = T::from_f64(core::f64::consts::LOG2_E);
                let [scratch, _] = scratch;
                scratch.resize(d + m + self.directions.scratch_len());
                let (column, rest) = scratch.split_at_mut(d);
                let (a, scratch) = rest.split_at_mut(m);
                d_x.fill(T::zero());
                for t in 0..tokens {
                    let of_token = d_values[t..].iter().step_by(width);
                    a.iter_mut().zip(of_token).for_each(|(to, &a)| *to = a * log2_e);
                    self.directions.backward_of_row(a, column, scratch);
                    let to = d_x[t..].iter_mut().step_by(width);
                    to.zip(&*column).for_each(|(to, &x)| *to = x);
                }
            }
        }
    }
}

impl<T: Scalar, D: FastDirections<T>> ColumnMap<T> for FastExponential<T, D> {
    fn head_dim(&self) -> usize {
        self.directions.head_dim()
    }

    fn num_features(&self) -> usize {
        self.directions.radii().len()
    }

    fn map_columns(
        &self,
        columns: &mut Columns<'_, T>,
        scratch: &mut [Buffer<T>; 2],
    ) -> Result<(), Error> {
        let exponents = match &self.way {
            Way::Dense(dense) => return dense.map_columns(columns, scratch),
            Way::Columns { one: Some(dense), .. } if columns.width == 1 => {
                return dense.map_columns(columns, scratch);
            }
            Way::Columns { lanes, last_factors, exponents, .. } if columns.width > 1 => {
                self.directions.logits_of_columns(lanes, last_factors, columns, scratch);
                exponents
            }
            Way::Columns { exponents, .. } | Way::Rows(exponents) => {
                self.transform_rows(columns, &mut scratch[0]);
                exponents
            }
        };
        exponents.add_bias(columns.values, columns.width);
        exponents.finish(columns, scratch)
    }

    fn map_pair(
        &self,
        pair: [&mut Columns<'_, T>; 2],
        scratch: &mut [Buffer<T>; 2],
    ) -> Result<(), Error> {
        if let Way::Dense(dense) | Way::Columns { one: Some(dense), .. } = &self.way {
            return dense.map_pair(pair, scratch);
        }
        let [first, second] = pair;
        self.map_columns(first, scratch)?;
        self.map_columns(second, scratch)
    }

    fn omega(&self) -> Option<&[T]> {
        match &self.way {
            Way::Dense(dense) | Way::Columns { one: Some(dense), .. } => dense.omega(),
            Way::Columns { .. } | Way::Rows(_) => None,
        }
    }

    fn projected(&self) -> usize {
        self.directions.radii().len()
    }

    fn backward_columns(
        &self,
        _: Side,
        gradient: &mut ColumnGradient<'_, T>,
        sums: Option<&mut ProjectionSums<T>>,
        scratch: &mut [Buffer<T>; 2],
    ) {
        let mut totals = core::mem::replace(&mut scratch[0], Buffer::new());
        to_logits(gradient, &mut totals);
        self.backward_of_logits(gradient, scratch);
        subtract_norms(gradient, &totals, T::from_f64(core::f64::consts::LN_2));
        scratch[0] = totals;
        if let Some(sums) = sums {
            let ColumnGradient { x, width, tokens, ref d_values, .. } = *gradient;
            sums.add(x, [tokens, width], d_values);
        }
    }
}
