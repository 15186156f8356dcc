//! The positive exponential maps of a dense projection: one matrix product, one pass for the
//! maximum, one for the exponential.

use crate::check;
use crate::error::Error;
use crate::features::columns::{ColumnGradient, ColumnMap, Columns};
use crate::features::side::Side;
use crate::features::sums::ProjectionSums;
use crate::kernel;
use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::loops::exp::ExponentialPair;
use crate::kernel::loops::products::{Epilogue, Matrix, Product};
use crate::scalar::Scalar;
use ndarray::{Array1, ArrayView2};

/// φ_i(x) = D_i·exp(ω_i·x − |x|²/2)/√m with any ω, in powers of two: the logits are
/// `log₂e·(ω_i·x + ln D_i)`.
#[derive(Clone, Debug)]
pub(crate) struct Dense<T> {
    head_dim: usize,
    num_features: usize,
    /// log₂e·Ωᵀ, `[head_dim, num_features]` with padded rows.
    projection: Buffer<T>,
    /// Ω, `[num_features, head_dim]` with padded rows.
    omega: Buffer<T>,
    exponents: Exponents<T>,
}

impl<T: Scalar> Dense<T> {
    pub(crate) fn new(omega: ArrayView2<'_, T>, weights: &Weights<T>) -> Self {
        Self::of(omega, |longest| Exponents::new(longest, weights))
    }

    /// The map of logits `Ωx + b`, not divided by √m.
    pub(crate) fn with_bias(omega: ArrayView2<'_, T>, bias: &Array1<T>) -> Self {
        let base_2 = |b: &T| T::from_f64(b.as_f64() * core::f64::consts::LOG2_E);
        let bias = bias.iter().map(base_2).collect();
        Self::of(omega, |longest| Exponents {
            bias: Some(bias),
            ..Exponents::new(longest, &Weights::unscaled(omega.nrows()))
        })
    }

    /// `exponents` is given the largest |ω_i|.
    fn of(omega: ArrayView2<'_, T>, exponents: impl FnOnce(f64) -> Exponents<T>) -> Self {
        let (num_features, head_dim) = omega.dim();
        let stride = padded::<T>(num_features);
        let mut projection = Buffer::zeros(head_dim * stride);
        let width = padded::<T>(head_dim);
        let mut rows = Buffer::zeros(num_features * width);
        for (i, row) in omega.outer_iter().enumerate() {
            for (p, &w) in row.iter().enumerate() {
                rows[i * width + p] = w;
                projection[p * stride + i] = T::from_f64(w.as_f64() * core::f64::consts::LOG2_E);
            }
        }
        let longest = omega
            .outer_iter()
            .map(|row| row.iter().map(|w| w.as_f64().powi(2)).sum::<f64>())
            .fold(0.0, f64::max);
        Self {
            head_dim,
            num_features,
            projection,
            omega: rows,
            exponents: exponents(longest.sqrt()),
        }
    }

    /// From the gradients by the logits, those by the vectors without their end and by `log₂e`:
    /// `log₂e·Σ_i a_i ω_i`.
    pub(crate) fn backward_of_logits(&self, gradient: &mut ColumnGradient<'_, T>) {
        let width = gradient.width;
        Product {
            m: self.head_dim,
            n: width,
            k: self.num_features,
            a: Matrix::rows(&self.projection, padded::<T>(self.num_features)),
            b: gradient.d_values,
            ldb: width,
            c: gradient.d_x,
            ldc: width,
            into: Epilogue::Set,
        }
        .run();
    }
}

impl<T: Scalar> ColumnMap<T> for Dense<T> {
    fn head_dim(&self) -> usize {
        self.head_dim
    }

    fn num_features(&self) -> usize {
        self.num_features
    }

    fn map_columns(
        &self,
        columns: &mut Columns<'_, T>,
        scratch: &mut [Buffer<T>; 2],
    ) -> Result<(), Error> {
        let (m, stride) = (self.num_features, padded::<T>(self.num_features));
        let Columns { x, width, ref mut values, .. } = *columns;
        if width == 1 {
            kernel::row_times_matrix(x, &self.projection, stride, &mut values[..stride]);
            self.exponents.add_bias(values, 1);
        } else {
            Product {
                m,
                n: width,
                k: self.head_dim,
                a: Matrix::columns(&self.projection, stride),
                b: x,
                ldb: width,
                c: values,
                ldc: width,
                into: self.exponents.bias.as_deref().map_or(Epilogue::Set, Epilogue::Bias),
            }
            .run();
        }
        self.exponents.finish(columns, scratch)
    }

    fn map_pair(
        &self,
        [first, second]: [&mut Columns<'_, T>; 2],
        _: &mut [Buffer<T>; 2],
    ) -> Result<(), Error> {
        let stride = padded::<T>(self.num_features);
        let ends = ExponentialPair {
            x: [first.x, second.x],
            b: &self.projection,
            ldb: stride,
            bias: self.exponents.bias.as_deref(),
            y: [&mut first.values[..stride], &mut second.values[..stride]],
            features: self.num_features,
        }
        .run();
        for (columns, (largest, norm)) in [first, second].into_iter().zip(ends) {
            columns.log_scale[0] = self.exponents.log_scale(largest, norm)?;
        }
        Ok(())
    }

    fn omega(&self) -> Option<&[T]> {
        Some(&self.omega)
    }

    fn projected(&self) -> usize {
        self.num_features
    }

    fn backward_columns(
        &self,
        _: Side,
        gradient: &mut ColumnGradient<'_, T>,
        sums: Option<&mut ProjectionSums<T>>,
        [totals, _]: &mut [Buffer<T>; 2],
    ) {
        to_logits(gradient, totals);
        self.backward_of_logits(gradient);
        subtract_norms(gradient, totals, T::from_f64(core::f64::consts::LN_2));
        if let Some(sums) = sums {
            let ColumnGradient { x, width, tokens, ref d_values, .. } = *gradient;
            sums.add(x, [tokens, width], d_values);
        }
    }
}

/// Brings features of an exponential map to a sum of one: a softmax, which has no |x|².
pub(crate) fn to_softmax<T: Scalar>(columns: &mut Columns<'_, T>, totals: &mut Buffer<T>) {
    let Columns { width, ref mut values, ref mut log_scale, .. } = *columns;
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

/// The gradients by the logits of a softmax y, `a_i = y_i·(dy_i − Σ_l y_l dy_l)`.
pub(crate) fn softmax_to_logits<T: Scalar>(
    gradient: &mut ColumnGradient<'_, T>,
    totals: &mut Buffer<T>,
) {
    to_logits(gradient, totals);
    let ColumnGradient { values, width, ref mut d_values, .. } = *gradient;
    for (a, y) in d_values.chunks_exact_mut(width).zip(values.chunks_exact(width)) {
        for ((a, &y), &total) in a.iter_mut().zip(y).zip(&**totals) {
            *a -= y * total;
        }
    }
}

/// The gradients by vectors of an exponential map as rows with padding, `Σ_i a_i ω_i`, of the
/// gradients a by the logits as columns: without the end, `−(Σ_i a_i)·x`.
pub(crate) fn exponential_rows<T: Scalar>(
    omega: &[T],
    [tokens, num_features, head_dim]: [usize; 3],
    a: &[T],
    out: &mut [T],
) {
    let stride = padded::<T>(head_dim);
    Product {
        m: tokens,
        n: stride,
        k: num_features,
        a: Matrix::columns(a, a.len() / num_features),
        b: omega,
        ldb: stride,
        c: out,
        ldc: stride,
        into: Epilogue::Set,
    }
    .run();
}

/// Brings the gradients by the features of an exponential map to those by its logits,
/// `a_i = φ_i·∂L/∂φ_i`, and sums these over the features: minus the gradient by `½|x|²`.
pub(crate) fn to_logits<T: Scalar>(gradient: &mut ColumnGradient<'_, T>, totals: &mut Buffer<T>) {
    totals.resize(gradient.width);
    kernel::multiply_and_sum_columns(gradient.d_values, gradient.values, totals);
}

/// The end of the gradient by the vectors of an exponential map,
/// `dx = Σ_i a_i ω_i − (Σ_i a_i)·x`: the first sum is `factor·d_x`.
pub(crate) fn subtract_norms<T: Scalar>(
    gradient: &mut ColumnGradient<'_, T>,
    totals: &[T],
    factor: T,
) {
    let ColumnGradient { x, width, ref mut d_x, .. } = *gradient;
    for (d_x, x) in d_x.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
        for ((d_x, &x), &total) in d_x.iter_mut().zip(x).zip(totals) {
            *d_x = factor * *d_x - total * x;
        }
    }
}

/// The end of every exponential map, once the logits are there.
#[derive(Clone, Debug)]
pub(crate) struct Exponents<T> {
    num_features: usize,
    /// `log₂e·ln D_i`, unless every D is 1.
    bias: Option<Vec<T>>,
    /// `−½ ln m`, of the log scale.
    common: T,
    /// The largest `½|x|²` for which no logit can leave the range of `T`, by Cauchy–Schwarz.
    largest_norm: T,
}

impl<T: Scalar> Exponents<T> {
    /// `longest` is the largest |ω_i|.
    pub(crate) fn new(longest: f64, weights: &Weights<T>) -> Self {
        let bias = |d: &T| T::from_f64(libm::log2(d.as_f64()));
        let bias = weights
            .factors
            .iter()
            .any(|&d| d != T::one())
            .then(|| weights.factors.iter().map(bias).collect());
        // There is room for the rounding of long sums, the bias and the difference of two logits.
        let largest_logit = T::max_value().as_f64() * 2.0_f64.powi(-12);
        let root = largest_logit / (core::f64::consts::LOG2_E * longest.max(1.0));
        let largest_norm = if T::from_f64(longest * core::f64::consts::LOG2_E).is_finite() {
            T::from_f64((0.5 * root * root).min(T::max_value().as_f64()))
        } else {
            -T::one() // No vector will do.
        };
        Self { num_features: weights.factors.len(), bias, common: weights.common, largest_norm }
    }

    /// Adds the bias to logits to base 2, `[num_features, width]`.
    pub(crate) fn add_bias(&self, values: &mut [T], width: usize) {
        if let Some(bias) = &self.bias {
            for (row, &bias) in values.chunks_exact_mut(width).zip(bias) {
                for value in row {
                    *value += bias;
                }
            }
        }
    }

    /// The natural log scale of features whose largest logit, to base 2, and half the squared norm
    /// of whose vector are these.
    fn log_scale(&self, largest: T, norm: T) -> Result<T, Error> {
        if norm <= self.largest_norm {
            return Ok(largest * T::from_f64(core::f64::consts::LN_2) + (self.common - norm));
        }
        Err(Error::Overflow { which: "the size of the vector", row: 0 }) // NaN is out of range too
    }

    /// Turns logits to base 2, bias included, to features of a maximum of one, and sets the log
    /// scales (natural).
    pub(crate) fn finish(
        &self,
        columns: &mut Columns<'_, T>,
        [scratch, _]: &mut [Buffer<T>; 2],
    ) -> Result<(), Error> {
        let columns = columns.with_features(self.num_features);
        let Columns { x, squares, width, tokens, values, log_scale } = columns;
        if width == 1 {
            let (largest, norm) = kernel::exp2_below_maximum(values, x);
            log_scale[0] = self.log_scale(largest, norm)?;
            return Ok(());
        }
        scratch.resize(width);
        let half = T::from_f64(0.5);
        scratch.iter_mut().zip(squares).for_each(|(norm, &square)| *norm = half * square);
        kernel::exp2_columns_below_maximum(values, log_scale);
        let ln_2 = T::from_f64(core::f64::consts::LN_2);
        let mut in_range = true;
        for (log_scale, &norm) in log_scale.iter_mut().zip(&**scratch).take(tokens) {
            in_range &= norm <= self.largest_norm; // NaN is out of it too.
            *log_scale = *log_scale * ln_2 + (self.common - norm);
        }
        if in_range {
            return Ok(());
        }
        let bad = |norm: &T| norm.is_nan() || *norm > self.largest_norm;
        let row = scratch.iter().take(tokens).position(bad).unwrap_or(0);
        Err(Error::Overflow { which: "the size of the vector", row })
    }
}

/// Weights D of the features of an exponential map, and the `−½ ln m` of its log scales.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Weights<T> {
    pub(crate) factors: Array1<T>,
    /// `−½ ln m`, or zero where features are not divided by `√m`.
    common: T,
}

impl<T: Scalar> Weights<T> {
    /// D = 1.
    pub(crate) fn ones(num_features: usize) -> Self {
        Self::scaled(Array1::ones(num_features))
    }

    /// D = 1 for features that are not divided by √m.
    pub(crate) fn unscaled(num_features: usize) -> Self {
        Self { factors: Array1::ones(num_features), common: T::zero() }
    }

    /// D as given: as many as features, none negative, not all zero.
    pub(crate) fn new(num_features: usize, weights: Array1<T>) -> Result<Self, Error> {
        check::size("weights", "elements", num_features, weights.len())?;
        if let Some((_, bad)) =
            weights.indexed_iter().find(|(_, w)| !(w.is_finite() && **w >= T::zero()))
        {
            return Err(Error::InvalidOption {
                which: "weights",
                found: bad.to_string(),
                needed: "finite numbers that are not negative",
            });
        }
        if weights.iter().all(|w| *w == T::zero()) {
            return Err(Error::InvalidOption {
                which: "weights",
                found: "all zero".to_owned(),
                needed: "positive for at least one feature",
            });
        }
        Ok(Self::scaled(weights))
    }

    #[allow(clippy::cast_precision_loss)]
    fn scaled(factors: Array1<T>) -> Self {
        let common = T::from_f64(-0.5 * libm::log(factors.len() as f64));
        Self { factors, common }
    }
}
