//! The Taylor map of second order: exp(s) ≈ 1 + s + s²/2.

use crate::check;
use crate::error::Error;
use crate::features::FeatureMap;
use crate::features::columns::{ColumnGradient, ColumnMap, Columns};
use crate::features::delegate::features_by;
use crate::features::side::Side;
use crate::features::sums::ProjectionSums;
use crate::kernel::buffer::Buffer;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use core::marker::PhantomData;

/// The Taylor expansion of the exponential to second order, on all coordinates:
///
/// ```text
/// φ(x) = (1, x_1, .., x_d, x_1²/√2, x_1x_2, .., x_d²/√2)
/// φ(x)·φ(y) = 1 + s + s²/2 = ((1 + s)² + 1)/2 ≥ ½,    s = x·y
/// ```
///
/// with `(d + 1)(d + 2)/2` features (2 145 at d = 64). Single features are signed, but every weight
/// is positive. It is exact to second order at `s = 0`, with an error of s³/6, and grows as s²/2 on
/// both sides, so strongly *negative* scores get large weights: good for |s| < 1, poor for the
/// scores of trained heads (Arora et al., Based, arXiv 2402.18668, use it on few coordinates).
///
/// ```
/// use dijiang::{FeatureMap, TaylorFeatures};
/// use ndarray::{Array1, Array2, array};
///
/// let map = TaylorFeatures::<f64>::new(2)?;
/// assert_eq!(map.num_features(), 6);
/// let x = array![[0.3, -0.5], [0.1, 0.7]];
/// let (mut values, mut log_scale) = (Array2::zeros((2, 6)), Array1::zeros(2));
/// map.map_queries(x.view(), values.view_mut(), log_scale.view_mut())?;
/// let s: f64 = x.row(0).dot(&x.row(1));
/// let estimate = values.row(0).dot(&values.row(1)) * (log_scale[0] + log_scale[1]).exp();
/// assert!((estimate - (1.0 + s + s * s / 2.0)).abs() < 1e-15);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "usize", into = "usize", bound = "T: Scalar"))]
pub struct TaylorFeatures<T> {
    head_dim: usize,
    number: PhantomData<T>,
}

impl<T: Scalar> TaylorFeatures<T> {
    /// The map of vectors of `head_dim` columns.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `head_dim` is 0, [`Error::InvalidOption`] if it is so large that the
    /// features cannot be counted.
    pub fn new(head_dim: usize) -> Result<Self, Error> {
        check::at_least_one("head_dim", head_dim)?;
        check::array("head_dim", head_dim.saturating_add(1), head_dim.saturating_add(2))?;
        Ok(Self { head_dim, number: PhantomData })
    }
}

features_by!([T: Scalar] TaylorFeatures<T>, this => this as &dyn ColumnMap<T>, {
    fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Box<dyn FeatureMap<T>>, Error> {
        Parameters::new().check_names(parameters)?;
        Ok(Box::new(self.clone()))
    }
});

impl<T: Scalar> ColumnMap<T> for TaylorFeatures<T> {
    fn head_dim(&self) -> usize {
        self.head_dim
    }

    fn num_features(&self) -> usize {
        (self.head_dim + 1) * (self.head_dim + 2) / 2
    }

    fn map_columns(
        &self,
        columns: &mut Columns<'_, T>,
        scratch: &mut [Buffer<T>; 2],
    ) -> Result<(), Error> {
        let Columns { x, width, values, log_scale, .. } =
            columns.with_features(ColumnMap::num_features(self));
        let half_root = T::from_f64(core::f64::consts::FRAC_1_SQRT_2);
        // Divided by max(1, |x|_∞)², nothing overflows.
        let [scratch, _] = scratch;
        scratch.resize(width + x.len());
        let (inverse, scaled) = scratch.split_at_mut(width);
        inverse.fill(T::one());
        for row in x.chunks_exact(width) {
            inverse.iter_mut().zip(row).for_each(|(size, x)| *size = size.max(x.abs()));
        }
        for (inverse, log_scale) in inverse.iter_mut().zip(log_scale) {
            *log_scale =
                if *inverse == T::one() { T::zero() } else { inverse.ln() * T::from_f64(2.0) };
            *inverse = inverse.recip();
        }
        let mut rows = values.chunks_exact_mut(width);
        let mut product = |a: &[T], b: &[T], factor: T| {
            if let Some(row) = rows.next() {
                row.iter_mut()
                    .zip(a.iter().zip(b))
                    .for_each(|(value, (&a, &b))| *value = a * b * factor);
            }
        };
        product(inverse, inverse, T::one());
        for (scaled, x) in scaled.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            scaled
                .iter_mut()
                .zip(x.iter().zip(&*inverse))
                .for_each(|(scaled, (&x, &inverse))| *scaled = x * inverse);
            product(scaled, inverse, T::one());
        }
        for (l, a) in scaled.chunks_exact(width).enumerate() {
            product(a, a, half_root);
            for b in scaled.chunks_exact(width).skip(l + 1) {
                product(a, b, T::one());
            }
        }
        Ok(())
    }

    fn backward_columns(
        &self,
        _: Side,
        gradient: &mut ColumnGradient<'_, T>,
        _: Option<&mut ProjectionSums<T>>,
        [scratch, _]: &mut [Buffer<T>; 2],
    ) {
        // with u = x/max(1, |x|_∞): dx_l = inverse·(inverse·d_l + √2·u_l·d_ll + Σ_m u_m·d_lm)
        let ColumnGradient { x, width, ref d_values, ref mut d_x, .. } = *gradient;
        scratch.resize(width);
        scratch.fill(T::one());
        for row in x.chunks_exact(width) {
            scratch.iter_mut().zip(row).for_each(|(size, x)| *size = size.max(x.abs()));
        }
        scratch.iter_mut().for_each(|size| *size = size.recip());
        let row = |i: usize| i * width..(i + 1) * width;
        for l in 0..self.head_dim {
            let linear = d_values[row(1 + l)].iter().zip(&**scratch);
            d_x[row(l)].iter_mut().zip(linear).for_each(|(d_x, (&d, &inverse))| *d_x = d * inverse);
        }
        let root = T::from_f64(core::f64::consts::SQRT_2);
        let mut add = |to: usize, pair: usize, from: usize, factor: T| {
            let terms = d_values[row(pair)].iter().zip(&x[row(from)]).zip(&**scratch);
            for (d_x, ((&d, &x), &inverse)) in d_x[row(to)].iter_mut().zip(terms) {
                *d_x += d * (x * inverse) * factor;
            }
        };
        let mut pair = 1 + self.head_dim;
        for l in 0..self.head_dim {
            add(l, pair, l, root);
            for m in l + 1..self.head_dim {
                add(l, pair + m - l, m, T::one());
                add(m, pair + m - l, l, T::one());
            }
            pair += self.head_dim - l;
        }
        for d_x in d_x.chunks_exact_mut(width) {
            d_x.iter_mut().zip(&**scratch).for_each(|(d_x, &inverse)| *d_x *= inverse);
        }
    }
}

#[cfg(feature = "serde")]
impl<T> From<TaylorFeatures<T>> for usize {
    fn from(map: TaylorFeatures<T>) -> Self {
        map.head_dim
    }
}

#[cfg(feature = "serde")]
impl<T: Scalar> TryFrom<usize> for TaylorFeatures<T> {
    type Error = Error;

    fn try_from(head_dim: usize) -> Result<Self, Error> {
        Self::new(head_dim)
    }
}
