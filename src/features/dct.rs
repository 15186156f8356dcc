//! Frequency-domain maps: DiJiang's DCT features, through a fast transform.

use super::dense::{Dense, Exponents};
use super::{ColumnMap, FeatureMap, Weights, map_by_columns};
use crate::kernel::buffer::Buffer;
use crate::kernel::loops::dct::LanesDct;
use crate::projection::{self, Generator};
use crate::scalar::sealed::Dct;
use crate::{Calibration, Error, Scalar, check};
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut1, ArrayViewMut2};

/// The radii of [`DctFeatures`]: how far out along the DCT directions the features lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Radii {
    /// Stratified quantiles of the chi distribution, `chi_d^{-1}((i − ½)/m)` in random order:
    /// `E ωωᵀ = I`, the softmax kernel. Strata miss the tails a little: at d = 8, m = 16, |x|² = 1
    /// the mean is 3 % low.
    Chi,
    /// `±√d` on each direction, with an even number of features. At m = 2d the features integrate
    /// every polynomial of degree three exactly (a cubature); it is the best positive map without
    /// data that we measured at small norms. It is biased: with `z = x + y` the mean is low by
    /// about `exp(−|z|⁴/4(d + 2))`, an error that more features do not mend.
    Antithetic,
    /// Stratified quantiles of the standard normal distribution, the radii of the released DiJiang
    /// code. Then `E ωωᵀ = I/d`, so with the factors `e^{−|x|²/2}` the features aim at
    /// `exp(x·y/d − ½(1 − 1/d)(|x|² + |y|²))`, to leading order, and the error against `exp(x·y)`
    /// does not fall with m.
    Normal,
}

/// Positive features on DCT directions, DiJiang's WDCF (Chen et al., arXiv 2403.19928, section 3.3)
/// for the softmax kernel:
///
/// ```text
/// φ_i(x) = D_i·exp(ω_i·x − |x|²/2)/√m,    ω_i = r_i·(row of C S_b)·(C S_0)
/// ```
///
/// `C` is the orthonormal DCT-II matrix, the `S` are diagonals of random signs: `S_0` once, a fresh
/// `S_b` for each block of `head_dim` features (without fresh signs, blocks beyond the first repeat
/// the same directions). The first transform `y = C S_0 x` keeps lengths and spreads single large
/// coordinates, which real keys have, over all frequencies. A vector costs `1 + ⌈m/d⌉` fast
/// transforms, for any `head_dim` and `num_features`; up to `head_dim` 64 a product with the whole
/// matrix is faster and taken instead.
///
/// [`official`](Self::official) is the map of the released code, another function.
///
/// ```
/// use dijiang::{DctFeatures, FeatureMap, Radii};
/// use ndarray::{Array1, Array2, array};
///
/// let map = DctFeatures::<f64>::new(2, 4, 0)?.with_radii(Radii::Antithetic)?;
/// let x = array![[0.3, -0.5], [0.1, 0.7]];
/// let (mut values, mut log_scale) = (Array2::zeros((2, 4)), Array1::zeros(2));
/// map.map_queries(x.view(), values.view_mut(), log_scale.view_mut())?;
/// let estimate = values.row(0).dot(&values.row(1)) * (log_scale[0] + log_scale[1]).exp();
/// let exact = x.row(0).dot(&x.row(1)).exp();
/// assert!((estimate / exact - 1.0).abs() < 0.01); // four features
///     
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "Parts<T>", into = "Parts<T>"))]
#[cfg_attr(
    feature = "serde",
    serde(bound(
        serialize = "T: Scalar + serde::Serialize",
        deserialize = "T: Scalar + serde::Deserialize<'de>"
    ))
)]
pub struct DctFeatures<T> {
    head_dim: usize,
    radii: Array1<T>,
    transform: Dct<T>,
    way: Way<T>,
    kind: Kind<T>,
}

/// How the logits of a chunk are computed; which way is fastest was measured, see
/// `docs/performance.md`.
#[derive(Clone, Debug)]
enum Way<T> {
    /// A product with the whole projection: small head dimensions.
    Dense(Dense<T>),
    /// Fast transforms of many tokens at once, powers of two, with the last factors `log₂e·r_i`
    /// times norms; the product for a single token, if it is small.
    Lanes { lanes: LanesDct<T>, outer: Vec<T>, exponents: Exponents<T>, one: Option<Dense<T>> },
    /// A fast transform of one token after the other.
    Rows(Exponents<T>),
}

/// Whether transforms over lanes beat a product with the whole projection (measured, see
/// `docs/performance.md`).
fn lanes_pay(head_dim: usize, num_features: usize) -> bool {
    head_dim >= 64 && num_features >= 64
}

/// Up to this many numbers a projection is faster than a transform of one token.
const SMALL_PRODUCT: usize = 1 << 14;

/// Up to this head dimension the product also beats a transform of one token after the other.
const DENSE_UP_TO: usize = 512;

#[derive(Clone, Debug)]
enum Kind<T> {
    Softmax {
        seed: u64,
        /// Directions; feature i lies on direction i mod `directions`.
        directions: usize,
        /// The diagonal of S_0.
        mixing: Vec<T>,
        /// The diagonals of S_b, block after block.
        signs: Vec<T>,
        /// The diagonal of each S_b times the norms of the first transform.
        inner: Vec<T>,
        /// Radii times the norms of the second transform.
        outer: Vec<T>,
        weights: Weights<T>,
    },
    Official {
        /// Norms of the transform's input.
        norms: Vec<T>,
    },
}

/// The factor that makes frequency `j` of rustdct's DCT-II orthonormal.
#[allow(clippy::cast_precision_loss)]
fn norm(j: usize, head_dim: usize) -> f64 {
    let numerator = if j == 0 { 1.0 } else { 2.0 };
    (numerator / head_dim as f64).sqrt()
}

impl<T: Scalar> DctFeatures<T> {
    /// `num_features` features of vectors of `head_dim` columns, with [`Radii::Chi`] and D = 1.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `head_dim` or `num_features` is 0.
    pub fn new(head_dim: usize, num_features: usize, seed: u64) -> Result<Self, Error> {
        Self::seeded(head_dim, num_features, seed, Radii::Chi)
    }

    fn seeded(
        head_dim: usize,
        num_features: usize,
        seed: u64,
        radii: Radii,
    ) -> Result<Self, Error> {
        check::features(head_dim, num_features)?;
        let directions = if radii == Radii::Antithetic {
            check::even(num_features)?;
            num_features / 2
        } else {
            num_features
        };
        let mut generator = Generator::new(seed);
        let mixing = (0..head_dim).map(|_| generator.sign()).collect();
        let signs =
            (0..directions.div_ceil(head_dim) * head_dim).map(|_| generator.sign()).collect();
        #[allow(clippy::cast_precision_loss)]
        let radii = match radii {
            Radii::Chi => projection::stratified_chi(head_dim, num_features, &mut generator)?,
            Radii::Normal => projection::stratified_normal(num_features, &mut generator)?,
            Radii::Antithetic => {
                let length = (head_dim as f64).sqrt();
                (0..num_features).map(|i| if i < directions { length } else { -length }).collect()
            }
        };
        let radii = radii.into_iter().map(T::from_f64).collect();
        Ok(Self::assemble(head_dim, seed, directions, mixing, signs, radii))
    }

    fn assemble(
        head_dim: usize,
        seed: u64,
        directions: usize,
        mixing: Vec<f64>,
        signs: Vec<f64>,
        radii: Array1<T>,
    ) -> Self {
        let inner = (0..signs.len())
            .map(|i| T::from_f64(signs[i] * norm(i % head_dim, head_dim)))
            .collect();
        let outer = radii
            .iter()
            .enumerate()
            .map(|(i, r)| *r * T::from_f64(norm(i % directions % head_dim, head_dim)))
            .collect();
        let weights = Weights::ones(radii.len());
        let cast = |x: Vec<f64>| x.into_iter().map(T::from_f64).collect();
        let kind = Kind::Softmax {
            seed,
            directions,
            mixing: cast(mixing),
            signs: cast(signs),
            inner,
            outer,
            weights,
        };
        Self::plan(head_dim, radii, kind)
    }

    fn plan(head_dim: usize, radii: Array1<T>, kind: Kind<T>) -> Self {
        let way = Way::Rows(Exponents::new(0.0, &Weights::ones(1)));
        let mut map = Self { head_dim, radii, transform: T::plan_dct(head_dim), way, kind };
        map.choose_way();
        map
    }

    /// Sets the way, once everything else is set.
    fn choose_way(&mut self) {
        let weights = match &self.kind {
            Kind::Softmax { weights, .. } => weights.clone(),
            Kind::Official { .. } => Weights::unscaled(self.radii.len()),
        };
        // the directions have unit length
        let longest = self.radii.iter().fold(0.0, |m: f64, r| m.max(r.as_f64().abs()));
        let exponents = Exponents::new(longest, &weights);
        self.way = match LanesDct::new(self.head_dim) {
            Some(lanes) if lanes_pay(self.head_dim, self.radii.len()) => {
                let outer = match &self.kind {
                    Kind::Softmax { outer, .. } => outer.clone(),
                    Kind::Official { .. } => self.radii.to_vec(),
                };
                let base_2 = |x: T| T::from_f64(x.as_f64() * core::f64::consts::LOG2_E);
                let outer = outer.into_iter().map(base_2).collect();
                let small = self.head_dim * self.radii.len() <= SMALL_PRODUCT;
                let one = small.then(|| Dense::new(self.projection().view(), &weights));
                Way::Lanes { lanes, outer, exponents, one }
            }
            _ if self.head_dim <= DENSE_UP_TO => {
                Way::Dense(Dense::new(self.projection().view(), &weights))
            }
            _ => Way::Rows(exponents),
        };
    }

    /// The map of the released DiJiang code:
    ///
    /// ```text
    /// φ(x) = softmax(x C diag(t)),    φ(x)_i = exp(t_i (Cᵀx)_i) / Σ_l exp(t_l (Cᵀx)_l)
    /// ```
    ///
    /// with one radius `t_i` for each of the `head_dim` features. The released code takes normal
    /// quantiles of uniform numbers and *raw* queries and keys: use it with
    /// [`with_scale(1.0)`](crate::LinearAttention::with_scale). It does not estimate `exp(x·y)`.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if there are no radii, [`Error::NotFinite`] if one is NaN or infinite.
    pub fn official(radii: Array1<T>) -> Result<Self, Error> {
        let head_dim = radii.len();
        check::features(head_dim, head_dim)?;
        check::finite("radii", radii.view().insert_axis(ndarray::Axis(0)))?;
        // rustdct's DCT-III halves its first input.
        let first = |j| if j == 0 { 2.0 } else { 1.0 };
        let norms = (0..head_dim).map(|j| T::from_f64(first(j) * norm(j, head_dim))).collect();
        Ok(Self::plan(head_dim, radii, Kind::Official { norms }))
    }

    /// The [official](Self::official) map of the matrix `P = C·diag(t)`, `[d, d]`, that each layer
    /// of a released checkpoint stores as `proj_matrix`; the radii are `t_i = (CᵀP)_ii`.
    ///
    /// Numbers stored in half precision are allowed for: those of a column may differ from
    /// `C·diag(t)` by 1 % of its largest.
    ///
    /// ```
    /// use dijiang::DctFeatures;
    /// use ndarray::array;
    ///
    /// let stored =
    ///     DctFeatures::<f32>::official(array![0.5, -1.5, 0.0])?.projection().reversed_axes();
    /// let map = DctFeatures::official_from_projection(stored.view())?;
    /// assert!((map.radii() - &array![0.5, -1.5, 0.0]).iter().all(|e| e.abs() < 1e-6));
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the matrix is not square, [`Error::ZeroSize`] if it is empty,
    /// [`Error::NotFinite`] if a number is NaN or infinite, [`Error::InvalidOption`] if it is not
    /// of the form `C·diag(t)`: it was trained away from it, or it is transposed.
    pub fn official_from_projection(projection: ArrayView2<'_, T>) -> Result<Self, Error> {
        check::projection(projection)?;
        let head_dim = projection.nrows();
        check::size("projection", "columns", head_dim, projection.ncols())?;
        let directions = Self::official(Array1::ones(head_dim))?.projection();
        let mut radii = Array1::zeros(head_dim);
        for (i, (column, direction)) in
            projection.columns().into_iter().zip(directions.rows()).enumerate()
        {
            let pairs = || column.iter().zip(direction).map(|(p, c)| (p.as_f64(), c.as_f64()));
            let radius: f64 = pairs().map(|(p, c)| p * c).sum();
            let largest = pairs().fold(0.0, |m: f64, (_, c)| m.max((radius * c).abs()));
            let difference = pairs().fold(0.0, |m: f64, (p, c)| m.max((p - radius * c).abs()));
            if difference > 0.01 * largest + 1e-6 {
                return Err(Error::InvalidOption {
                    which: "projection",
                    found: format!("a matrix with a difference of {difference:.1e} in column {i}"),
                    needed: "C·diag(t), the orthonormal DCT-II matrix with a radius for each \
                             column",
                });
            }
            radii[i] = T::from_f64(radius);
        }
        Self::official(radii)
    }

    /// The same directions with other radii, and D = 1 again.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if the radii are antithetic and the number of features is odd,
    /// [`Error::Unsupported`] for the official map, whose radii are given.
    pub fn with_radii(self, radii: Radii) -> Result<Self, Error> {
        match self.kind {
            Kind::Softmax { seed, .. } => {
                Self::seeded(self.head_dim, self.radii.len(), seed, radii)
            }
            Kind::Official { .. } => Err(Error::Unsupported {
                what: "choosing radii of the official map",
                why: "pass them to `DctFeatures::official`",
            }),
        }
    }

    /// Sets the weights D of the features, see [`fit_weights`](crate::fit_weights).
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if there are not `num_features`, [`Error::InvalidOption`] if one is
    /// negative or not finite, or all are zero, [`Error::Unsupported`] for the official map, which
    /// has none.
    pub fn with_weights(mut self, new: Array1<T>) -> Result<Self, Error> {
        match &mut self.kind {
            Kind::Softmax { weights, .. } => {
                *weights = Weights::new(self.radii.len(), new)?;
                self.choose_way();
            }
            Kind::Official { .. } => {
                return Err(Error::Unsupported {
                    what: "weighting the official map",
                    why: "it has no weights; use `DctFeatures::new`",
                });
            }
        }
        Ok(self)
    }

    /// Fits the weights D to the far pairs of a calibration, from D = 1, with
    /// [`Calibration::fit_weights`] and a ridge of 0.01. The kernel must use the calibration's
    /// scale.
    ///
    /// # Errors
    ///
    /// Those of [`Calibration::fit_weights`], and [`Error::Unsupported`] for the official map,
    /// which has no weights.
    pub fn calibrated(self, calibration: &Calibration) -> Result<Self, Error> {
        calibration.refit(self, Self::with_weights)
    }

    /// The radii `[num_features]`, in the order of the features.
    #[must_use]
    pub fn radii(&self) -> &Array1<T> {
        &self.radii
    }

    /// The weights D `[num_features]`; all one for the official map.
    #[must_use]
    pub fn weights(&self) -> Array1<T> {
        match &self.kind {
            Kind::Softmax { weights, .. } => weights.weights.clone(),
            Kind::Official { .. } => Array1::ones(self.head_dim),
        }
    }

    /// The matrix `[num_features, head_dim]` whose rows are the ω of the features, `ω_i·x` being
    /// the exponent; for the official map, `t_i` times column `i` of C.
    #[must_use]
    pub fn projection(&self) -> Array2<T> {
        let mut projection = Array2::zeros((self.radii.len(), self.head_dim));
        let mut memory = vec![T::zero(); Scratch::len(self)];
        let mut scratch = Scratch::new(self, &mut memory);
        let mut logits = vec![T::zero(); self.radii.len()];
        let mut unit = vec![T::zero(); self.head_dim];
        for j in 0..self.head_dim {
            unit.fill(T::zero());
            unit[j] = T::one();
            self.logits(&unit, &mut logits, &mut scratch);
            projection.column_mut(j).iter_mut().zip(&logits).for_each(|(w, &logit)| *w = logit);
        }
        projection
    }

    /// ω_i·x of every feature.
    fn logits(&self, x: &[T], logits: &mut [T], scratch: &mut Scratch<'_, T>) {
        let Scratch { mixed, block, transform } = scratch;
        match &self.kind {
            Kind::Softmax { directions, mixing, inner, outer, .. } => {
                for ((y, &x), &sign) in mixed.iter_mut().zip(x).zip(mixing) {
                    *y = x * sign;
                }
                T::dct2(&self.transform, mixed, transform);
                for (b, inner) in inner.chunks_exact(self.head_dim).enumerate() {
                    for ((z, &y), &factor) in block.iter_mut().zip(&**mixed).zip(inner) {
                        *z = y * factor;
                    }
                    T::dct2(&self.transform, block, transform);
                    for (logits, outer) in
                        logits.chunks_exact_mut(*directions).zip(outer.chunks_exact(*directions))
                    {
                        let first = b * self.head_dim;
                        let last = (*directions).min(first + self.head_dim);
                        for ((logit, &z), &factor) in
                            logits[first..last].iter_mut().zip(&**block).zip(&outer[first..last])
                        {
                            *logit = z * factor;
                        }
                    }
                }
            }
            Kind::Official { norms } => {
                for ((y, &x), &norm) in block.iter_mut().zip(x).zip(norms) {
                    *y = x * norm;
                }
                T::dct3(&self.transform, block, transform);
                for ((logit, &y), &radius) in logits.iter_mut().zip(&**block).zip(&self.radii) {
                    *logit = y * radius;
                }
            }
        }
    }

    /// The logits to base 2 of every column, one after the other.
    fn transform_rows(
        &self,
        x: &[T],
        width: usize,
        tokens: usize,
        values: &mut [T],
        scratch: &mut Buffer<T>,
    ) {
        let (d, m) = (self.head_dim, self.radii.len());
        let log2_e = T::from_f64(core::f64::consts::LOG2_E);
        scratch.resize(d + m + Scratch::len(self));
        let (column, rest) = scratch.split_at_mut(d);
        let (logits, rest) = rest.split_at_mut(m);
        let mut work = Scratch::new(self, rest);
        for t in 0..tokens {
            column.iter_mut().zip(x[t..].iter().step_by(width)).for_each(|(c, &x)| *c = x);
            self.logits(column, logits, &mut work);
            values[t..]
                .iter_mut()
                .step_by(width)
                .zip(&*logits)
                .for_each(|(value, &logit)| *value = logit * log2_e);
        }
    }

    /// The logits to base 2 of all columns at once.
    fn transform_lanes(
        &self,
        lanes: &LanesDct<T>,
        outer: &[T],
        x: &[T],
        width: usize,
        values: &mut [T],
        [scratch, transform]: &mut [Buffer<T>; 2],
    ) {
        let d = self.head_dim;
        match &self.kind {
            Kind::Softmax { directions, mixing, inner, .. } => {
                scratch.resize(d * width + d);
                let (mixed, ones) = scratch.split_at_mut(d * width);
                ones.fill(T::one());
                lanes.dct2(x, width, mixing, ones, mixed, transform);
                for (b, inner) in inner.chunks_exact(d).enumerate() {
                    let first = b * d;
                    let last = (*directions).min(first + d);
                    // features on the same directions differ in their radii
                    for (values, outer) in values
                        .chunks_exact_mut(*directions * width)
                        .zip(outer.chunks_exact(*directions))
                    {
                        let values = &mut values[first * width..last * width];
                        lanes.dct2(mixed, width, inner, &outer[first..last], values, transform);
                    }
                }
            }
            Kind::Official { norms } => {
                lanes.dct3(x, width, norms, outer, &mut values[..d * width], transform);
            }
        }
    }
}

/// Working memory of the transforms.
struct Scratch<'a, T> {
    mixed: &'a mut [T],
    block: &'a mut [T],
    transform: &'a mut [T],
}

impl<'a, T: Scalar> Scratch<'a, T> {
    fn len(map: &DctFeatures<T>) -> usize {
        2 * map.head_dim + map.transform.scratch_len
    }

    fn new(map: &DctFeatures<T>, memory: &'a mut [T]) -> Self {
        let (mixed, rest) = memory.split_at_mut(map.head_dim);
        let (block, transform) = rest.split_at_mut(map.head_dim);
        Self { mixed, block, transform }
    }
}

impl<T: Scalar> FeatureMap<T> for DctFeatures<T> {
    fn head_dim(&self) -> usize {
        self.head_dim
    }

    fn num_features(&self) -> usize {
        self.radii.len()
    }

    fn map_queries(
        &self,
        x: ArrayView2<'_, T>,
        values: ArrayViewMut2<'_, T>,
        log_scale: ArrayViewMut1<'_, T>,
    ) -> Result<(), Error> {
        map_by_columns(self, self.radii.len(), self.head_dim, x, values, log_scale)
    }

    fn column_map(&self) -> Option<&dyn ColumnMap<T>> {
        Some(self)
    }
}

impl<T: Scalar> ColumnMap<T> for DctFeatures<T> {
    fn map_columns(
        &self,
        x: &[T],
        squares: &[T],
        width: usize,
        tokens: usize,
        values: &mut [T],
        log_scale: &mut [T],
        scratch: &mut [Buffer<T>; 2],
    ) -> Result<(), Error> {
        let m = self.radii.len();
        match &self.way {
            Way::Dense(dense) => {
                dense.map_columns(x, squares, width, tokens, values, log_scale, scratch)?
            }
            Way::Lanes { one: Some(dense), .. } if width == 1 => {
                dense.map_columns(x, squares, width, tokens, values, log_scale, scratch)?;
            }
            Way::Lanes { lanes, outer, exponents, .. } if width > 1 => {
                self.transform_lanes(lanes, outer, x, width, values, scratch);
                exponents.add_bias(values, width);
                exponents.finish(
                    x,
                    squares,
                    width,
                    tokens,
                    &mut values[..m * width],
                    log_scale,
                    scratch,
                )?;
            }
            Way::Lanes { exponents, .. } | Way::Rows(exponents) => {
                self.transform_rows(x, width, tokens, values, &mut scratch[0]);
                exponents.add_bias(values, width);
                exponents.finish(
                    x,
                    squares,
                    width,
                    tokens,
                    &mut values[..m * width],
                    log_scale,
                    scratch,
                )?;
            }
        }
        if let Kind::Official { .. } = self.kind {
            // softmax: no |x|² and a sum of one
            let (values, [totals, _]) = (&mut values[..m * width], scratch);
            totals.resize(width);
            totals.fill(T::zero());
            for row in values.chunks_exact(width) {
                totals.iter_mut().zip(row).for_each(|(total, &value)| *total += value);
            }
            for total in totals.iter_mut() {
                *total = total.recip();
            }
            for row in values.chunks_exact_mut(width) {
                row.iter_mut().zip(&**totals).for_each(|(value, &factor)| *value *= factor);
            }
            log_scale.fill(T::zero());
        }
        Ok(())
    }

    fn map_pair(
        &self,
        x: [&[T]; 2],
        [first, second]: [&mut [T]; 2],
        log_scale: [&mut [T]; 2],
        scratch: &mut [Buffer<T>; 2],
    ) -> Result<(), Error> {
        if let (Way::Dense(dense) | Way::Lanes { one: Some(dense), .. }, Kind::Softmax { .. }) =
            (&self.way, &self.kind)
        {
            return dense.map_pair(x, [first, second], log_scale, scratch);
        }
        self.map_columns(x[0], &[], 1, 1, first, log_scale[0], scratch)?;
        self.map_columns(x[1], &[], 1, 1, second, log_scale[1], scratch)
    }
}

impl<T: PartialEq> PartialEq for DctFeatures<T> {
    fn eq(&self, other: &Self) -> bool {
        let kinds = match (&self.kind, &other.kind) {
            (
                Kind::Softmax { directions: d1, mixing: m1, signs: s1, weights: w1, .. },
                Kind::Softmax { directions: d2, mixing: m2, signs: s2, weights: w2, .. },
            ) => d1 == d2 && m1 == m2 && s1 == s2 && w1 == w2,
            (Kind::Official { .. }, Kind::Official { .. }) => true,
            _ => false,
        };
        kinds && self.head_dim == other.head_dim && self.radii == other.radii
    }
}

/// What is saved: everything random, so that a later release restores the same map.
#[cfg(feature = "serde")]
#[derive(Clone, serde::Serialize, serde::Deserialize)]
enum Parts<T> {
    Softmax {
        seed: u64,
        directions: usize,
        mixing: Vec<i8>,
        signs: Vec<i8>,
        radii: Vec<T>,
        weights: Vec<T>,
    },
    Official {
        radii: Vec<T>,
    },
}

#[cfg(feature = "serde")]
impl<T: Scalar> From<DctFeatures<T>> for Parts<T> {
    fn from(map: DctFeatures<T>) -> Self {
        let radii = map.radii.to_vec();
        let sign = |s: T| if s > T::zero() { 1 } else { -1 };
        match map.kind {
            Kind::Softmax { seed, directions, mixing, signs, weights, .. } => Self::Softmax {
                seed,
                directions,
                mixing: mixing.into_iter().map(sign).collect(),
                signs: signs.into_iter().map(sign).collect(),
                radii,
                weights: weights.weights.to_vec(),
            },
            Kind::Official { .. } => Self::Official { radii },
        }
    }
}

#[cfg(feature = "serde")]
impl<T: Scalar> TryFrom<Parts<T>> for DctFeatures<T> {
    type Error = Error;

    fn try_from(parts: Parts<T>) -> Result<Self, Error> {
        match parts {
            Parts::Official { radii } => Self::official(Array1::from(radii)),
            Parts::Softmax { seed, directions, mixing, signs, radii, weights } => {
                let head_dim = mixing.len();
                check::features(head_dim, radii.len())?;
                check::at_least_one("directions", directions)?;
                check::features(head_dim, directions)?;
                check::size(
                    "signs",
                    "elements",
                    directions.div_ceil(head_dim) * head_dim,
                    signs.len(),
                )?;
                check::size(
                    "radii",
                    "elements",
                    radii.len().div_ceil(directions) * directions,
                    radii.len(),
                )?;
                let radii = Array1::from(radii);
                check::finite("radii", radii.view().insert_axis(ndarray::Axis(0)))?;
                let cast = |x: Vec<i8>| x.into_iter().map(|s| f64::from(s.signum() | 1)).collect();
                Self::assemble(head_dim, seed, directions, cast(mixing), cast(signs), radii)
                    .with_weights(Array1::from(weights))
            }
        }
    }
}
