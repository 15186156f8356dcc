//! How close does a kernel come to softmax attention? Everything here is measured in `f64` against
//! the exact matrix, and comes with the trivial answer of uniform attention beside it: a kernel
//! that does not beat it approximates nothing.

mod statistics;

use crate::attention::call::Head;
use crate::attention::scratch::Scratch;
use crate::attention::softmax::options::SoftmaxAttention;
use crate::attention::{Attention, PairWeights};
use crate::check;
use crate::error::Error;
use crate::fidelity::statistics::{distance, mean_and_standard_error, slope, student_t};
use crate::mask::Mask;
use crate::scalar::Scalar;
use crate::views::columns;
use ndarray::{Array2, ArrayView2, Axis, concatenate};

/// How far a kernel is from exact softmax attention on one set of queries, keys and values.
///
/// `A` is the exact attention matrix, `Â` the kernel's, `‖·‖` the Frobenius norm.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Report {
    /// `‖ÂV − AV‖/‖AV‖`: what a model sees.
    pub output_error: f64,
    /// `‖Â − A‖/‖A‖`.
    pub attention_error: f64,
    /// Mean over queries of `KL(A_t ‖ Â_t)` in nats. Entries of `Â` are floored at the smallest
    /// normal number of the kernel's type. `None` if an entry is negative or a row does not sum to
    /// a positive number.
    pub kl: Option<f64>,
    /// The largest absolute difference between outputs.
    pub max_abs: f64,
    /// `‖K̂ − K‖/‖K‖` of the unnormalised weights, `K = exp(scale·q·k)`, over the visible pairs;
    /// `None` if the kernel has none ([`Attention::pair_weights`]).
    pub kernel_error: Option<f64>,
    /// The output error of uniform attention, `Â = 1/(number of visible keys)`.
    pub uniform_error: f64,
    /// The attention error of uniform attention.
    pub uniform_attention_error: f64,
}

/// Exact softmax attention of one set of queries, keys and values, to compare kernels with.
///
/// ```
/// use dijiang::fidelity::Reference;
/// use dijiang::{LinearAttention, Mask, Performer, SoftmaxAttention};
/// use ndarray::Array2;
///
/// let x = Array2::from_shape_fn((30, 8), |(i, j)| ((i * 8 + j) as f32).sin());
/// let reference = Reference::new(x.view(), x.view(), x.view(), Mask::Causal)?;
/// let exact = reference.compare(&SoftmaxAttention::new(8)?)?;
/// assert!(exact.output_error < 1e-6);
/// let performer = reference.compare(&LinearAttention::new(Performer::new(8, 256, 0)?))?;
/// assert!(performer.output_error < performer.uniform_error);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Reference<T> {
    q: Array2<T>,
    k: Array2<T>,
    /// The values, and beside them the identity: one forward gives `ÂV` and `Â`.
    values: Array2<T>,
    value_dim: usize,
    mask: Mask,
    /// A learned sink, which makes rows of the matrix sum to less than 1.
    has_sink: bool,
    scores: Array2<f64>,
    attention: Array2<f64>,
    output: Array2<f64>,
}

impl<T: Scalar> Reference<T> {
    /// Computes softmax attention at scale 1/√d in `f64`; it takes O(n_q·n_k) memory.
    ///
    /// # Errors
    ///
    /// Those of [`Attention::forward_into`] for the arguments, and [`Error::ZeroSize`] if there are
    /// no queries.
    pub fn new(
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mask: Mask,
    ) -> Result<Self, Error> {
        Self::with_scale(q, k, v, mask, check::default_scale(q.ncols()))
    }

    /// The same at another scale.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), and [`Error::InvalidOption`] if `scale` is not positive and finite.
    pub fn with_scale(
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mask: Mask,
        scale: f64,
    ) -> Result<Self, Error> {
        check::at_least_one("q columns", q.ncols())?;
        let softmax = SoftmaxAttention::new(q.ncols())?.with_scale(scale);
        Self::of(&softmax, q, k, v, mask)
    }

    /// The attention of a kernel with any options, in `f64`: a cap, biases, a learned sink. With a
    /// sink the rows of the matrix sum to less than 1, and `kl` counts the rest as one more key.
    ///
    /// ```
    /// use dijiang::fidelity::Reference;
    /// use dijiang::{Far, HybridAttention, Mask, SoftmaxAttention};
    /// use ndarray::Array2;
    ///
    /// let x = Array2::from_shape_fn((30, 8), |(i, j)| ((i * 8 + j) as f32).sin());
    /// let softmax = SoftmaxAttention::new(8)?.with_soft_cap(1.0)?;
    /// let reference = Reference::of(&softmax, x.view(), x.view(), x.view(), Mask::Causal)?;
    /// let hybrid = HybridAttention::builder(8).window(40).soft_cap(1.0).build()?;
    /// assert!(reference.output_error(&hybrid)? < 1e-6);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), and those of the kernel for its options.
    pub fn of(
        softmax: &SoftmaxAttention<T>,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mask: Mask,
    ) -> Result<Self, Error> {
        check::at_least_one("q rows", q.nrows())?;
        let mut out = Array2::zeros((q.nrows(), v.ncols()));
        let head = Head::new(q, k, v, out.view_mut());
        head.check_forward(softmax.head_dim(), mask)?;
        softmax.check_mask(mask)?;
        let mask = check::whole(mask, [q.nrows(), k.nrows()])?;
        head.check_finite()?;
        let wide = |x: ArrayView2<'_, T>| x.mapv(T::as_f64);
        let scores = softmax.log_weights(q, k)?;
        let sink = softmax.sink_logit();
        let (mut attention, scores_dim) = (Array2::zeros(scores.dim()), scores.dim().into());
        for (t, (scores, mut row)) in
            scores.outer_iter().zip(attention.outer_iter_mut()).enumerate()
        {
            let seen = mask.seen(t, scores_dim);
            let scores = scores.split_at(Axis(0), seen).0;
            let shift = softmax.shift(mask, [t, k.nrows()]);
            let least = sink.unwrap_or(f64::NEG_INFINITY);
            let largest = scores.fold(least, |m, &s| m.max(s + shift));
            let mut row = row.view_mut().split_at(Axis(0), seen).0;
            row.zip_mut_with(&scores, |a, s| *a = (s + shift - largest).exp());
            let total = row.sum() + sink.map_or(0.0, |sink| (sink - largest).exp());
            row /= total;
        }
        let output = attention.dot(&wide(v));
        if let Some(((row, _), _)) = output.indexed_iter().find(|(_, x)| !x.is_finite()) {
            return Err(Error::Overflow { which: "the exact output", row });
        }
        let values = concatenate![Axis(1), v, Array2::eye(k.nrows())];
        Ok(Self {
            q: q.to_owned(),
            k: k.to_owned(),
            values,
            value_dim: v.ncols(),
            mask,
            has_sink: sink.is_some(),
            scores,
            attention,
            output,
        })
    }

    /// The exact attention matrix `[n_q, n_k]`.
    #[must_use]
    pub fn attention(&self) -> ArrayView2<'_, f64> {
        self.attention.view()
    }

    /// The exact output `[n_q, d_v]`.
    #[must_use]
    pub fn output(&self) -> ArrayView2<'_, f64> {
        self.output.view()
    }

    /// Runs a kernel on the same input and measures how far it is.
    ///
    /// # Errors
    ///
    /// Those of the kernel's [`forward`](Attention::forward).
    pub fn compare(&self, kernel: &(impl Attention<T> + ?Sized)) -> Result<Report, Error> {
        let (q, k) = (self.q.view(), self.k.view());
        let mut both = Array2::zeros((q.nrows(), self.values.ncols()));
        let head = Head::new(q, k, self.values.view(), both.view_mut()).with_probes(k.nrows());
        kernel.forward_heads(&mut [head], self.mask, &mut Scratch::new())?;
        let both = both.mapv(T::as_f64);
        let (output, attention) = both.view().split_at(Axis(1), self.value_dim);
        let kernel_error = match kernel.pair_weights() {
            Some(weights) => Some(self.kernel_error(&weights.log_weights(q, k)?)),
            None => None,
        };
        let uniform = self.uniform();
        let uniform_output =
            uniform.dot(&columns(self.values.view(), 0..self.value_dim).mapv(T::as_f64));
        Ok(Report {
            output_error: distance(output, self.output.view()),
            attention_error: distance(attention, self.attention.view()),
            kl: self.kl(attention),
            max_abs: ndarray::Zip::from(output)
                .and(&self.output)
                .fold(0.0, |m: f64, a, b| m.max((a - b).abs())),
            kernel_error,
            uniform_error: distance(uniform_output.view(), self.output.view()),
            uniform_attention_error: distance(uniform.view(), self.attention.view()),
        })
    }

    /// The output error alone, at the cost of one forward: for sweeps.
    ///
    /// # Errors
    ///
    /// As [`compare`](Self::compare).
    pub fn output_error(&self, kernel: &(impl Attention<T> + ?Sized)) -> Result<f64, Error> {
        let values = columns(self.values.view(), 0..self.value_dim);
        let output =
            kernel.forward(self.q.view(), self.k.view(), values, self.mask)?.mapv(T::as_f64);
        Ok(distance(output.view(), self.output.view()))
    }

    #[allow(clippy::cast_precision_loss)]
    fn uniform(&self) -> Array2<f64> {
        let sizes = self.attention.dim().into();
        Array2::from_shape_fn(self.attention.dim(), |(t, j)| {
            let seen = self.mask.seen(t, sizes);
            if j < seen { 1.0 / seen as f64 } else { 0.0 }
        })
    }

    #[allow(clippy::cast_precision_loss)]
    fn kl(&self, attention: ArrayView2<'_, f64>) -> Option<f64> {
        let floor = T::min_positive_value().as_f64();
        let mut total = 0.0;
        for (exact, row) in self.attention.outer_iter().zip(attention.outer_iter()) {
            if row.iter().any(|&a| a < 0.0) || row.sum() <= 0.0 {
                return None;
            }
            let mut add = |a: f64, b: f64| {
                if a > 0.0 {
                    total += a * (a.ln() - b.max(floor).ln());
                }
            };
            exact.iter().zip(row).for_each(|(&a, &b)| add(a, b));
            if self.has_sink {
                add(1.0 - exact.sum(), 1.0 - row.sum());
            }
        }
        Some(total / self.attention.nrows() as f64)
    }

    /// Weights are divided by the largest of either side, so that nothing overflows.
    fn kernel_error(&self, log_weights: &Array2<f64>) -> f64 {
        let sizes = self.attention.dim().into();
        let pairs = || {
            (0..self.q.nrows()).flat_map(move |t| {
                (0..self.mask.seen(t, sizes))
                    .map(move |j| (log_weights[[t, j]], self.scores[[t, j]]))
            })
        };
        let log_scale = pairs().fold(f64::NEG_INFINITY, |m, (a, b)| m.max(a).max(b));
        let (mut difference, mut size) = (0.0, 0.0);
        for (estimate, exact) in pairs() {
            let (estimate, exact) = ((estimate - log_scale).exp(), (exact - log_scale).exp());
            difference += (estimate - exact).powi(2);
            size += exact * exact;
        }
        (difference / size).sqrt()
    }
}

/// Compares a kernel with exact softmax attention at scale 1/√d; see [`Reference`] for other
/// scales, and to compare many kernels on the same input.
///
/// ```
/// use dijiang::{LinearAttention, Mask, Performer, fidelity};
/// use ndarray::Array2;
///
/// let x = Array2::from_shape_fn((30, 8), |(i, j)| ((i * 8 + j) as f32).sin());
/// let kernel = LinearAttention::new(Performer::new(8, 256, 0)?);
/// let report = fidelity::compare(&kernel, x.view(), x.view(), x.view(), Mask::Causal)?;
/// println!(
///     "output error {:.3}, uniform attention {:.3}",
///     report.output_error, report.uniform_error
/// );
/// # Ok::<(), dijiang::Error>(())
/// ```
///
/// # Errors
///
/// Those of [`Reference::new`] and of the kernel's [`forward`](Attention::forward).
pub fn compare<T: Scalar>(
    kernel: &(impl Attention<T> + ?Sized),
    q: ArrayView2<'_, T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    mask: Mask,
) -> Result<Report, Error> {
    Reference::new(q, k, v, mask)?.compare(kernel)
}

/// How an error falls with the number of features: `error ≈ c·m^slope`.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Rate {
    /// The mean over seeds of the least-squares slope of ln error against ln m. Monte Carlo has −½.
    pub slope: f64,
    /// The 95 % confidence interval of the slope, from the spread over seeds (Student's t).
    pub confidence: [f64; 2],
    /// The numbers of features.
    pub features: Vec<usize>,
    /// The mean error over seeds at each number of features.
    pub mean_errors: Vec<f64>,
}

/// Measures how `error(num_features, seed)` falls with the number of features.
///
/// ```
/// use dijiang::{Error, fidelity};
///
/// // an error that falls as 1/√m, times a factor of its seed
/// let rate = fidelity::rate(&[16, 64, 256], 0..4, |m, seed| {
///     Ok((m as f64).powf(-0.5) * (1.0 + seed as f64))
/// })?;
/// assert!((rate.slope + 0.5).abs() < 1e-12);
/// # Ok::<(), Error>(())
/// ```
///
/// # Errors
///
/// The first error of `error`; [`Error::InvalidOption`] if there are fewer than two different
/// numbers of features or two seeds, or if a measured error is not positive and finite.
pub fn rate(
    features: &[usize],
    seeds: impl IntoIterator<Item = u64>,
    mut error: impl FnMut(usize, u64) -> Result<f64, Error>,
) -> Result<Rate, Error> {
    let seeds: Vec<u64> = seeds.into_iter().collect();
    if seeds.len() < 2 {
        let found = seeds.len().to_string();
        return Err(Error::InvalidOption {
            which: "seeds",
            found,
            needed: "at least two, for a confidence interval",
        });
    }
    if features.contains(&0) || features.iter().all(|m| *m == features[0]) {
        let found = format!("{features:?}");
        return Err(Error::InvalidOption {
            which: "features",
            found,
            needed: "at least two different positive numbers",
        });
    }
    #[allow(clippy::cast_precision_loss)]
    let logs: Vec<f64> = features.iter().map(|&m| (m as f64).ln()).collect();
    let mut mean_errors = vec![0.0; features.len()];
    let mut slopes = Vec::with_capacity(seeds.len());
    #[allow(clippy::cast_precision_loss)]
    for &seed in &seeds {
        let mut log_errors = Vec::with_capacity(features.len());
        for (&m, mean) in features.iter().zip(&mut mean_errors) {
            let value = error(m, seed)?;
            if !(value > 0.0 && value.is_finite()) {
                let found = value.to_string();
                return Err(Error::InvalidOption {
                    which: "error",
                    found,
                    needed: "positive and finite",
                });
            }
            *mean += value / seeds.len() as f64;
            log_errors.push(value.ln());
        }
        slopes.push(slope(&logs, &log_errors));
    }
    let (mean, spread) = mean_and_standard_error(&slopes);
    let reach = student_t(slopes.len() - 1) * spread;
    Ok(Rate {
        slope: mean,
        confidence: [mean - reach, mean + reach],
        features: features.to_vec(),
        mean_errors,
    })
}
