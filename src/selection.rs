//! How far a kernel is from exact attention in every head of a model.

pub(crate) mod exact_heads;

use crate::attention::Attention;
use crate::attention::call::Head;
use crate::attention::scratch::Scratch;
#[cfg(feature = "rayon")]
use crate::attention::threads::Threads;
use crate::check;
use crate::error::Error;
use crate::mask::Mask;
use crate::scalar::Scalar;
use core::fmt;
use ndarray::{Array3, ArrayView2, ArrayView3, Axis};

/// Sampled queries, keys and values of one head of keys and values: the first tokens of ordinary
/// text, in order.
#[derive(Clone, Copy, Debug)]
pub struct HeadSample<'a, T> {
    /// The layer.
    pub layer: usize,
    /// The head of keys and values in its layer.
    pub kv_head: usize,
    /// The queries of every query head it serves, `[group, n, d]`.
    pub q: ArrayView3<'a, T>,
    /// `[n, d]`
    pub k: ArrayView2<'a, T>,
    /// `[n, d_v]`
    pub v: ArrayView2<'a, T>,
}

/// How far a kernel is from exact attention in one head.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct HeadError {
    /// The layer.
    pub layer: usize,
    /// The head of keys and values in its layer.
    pub kv_head: usize,
    /// `‖ÂV − AV‖_F/‖AV‖_F` over all query heads of the group and all tokens behind the warm-up.
    pub output_error: f64,
}

/// The errors of a kernel in every head of a model, the worst first: the table from which exact
/// heads are chosen.
///
/// Constant memory in *every* head loses the recall of far facts; a tenth of the heads kept exact
/// repairs most of it ([what was measured](crate::guide::exact_heads)). The heads in which the
/// kernel itself errs most are those to keep.
///
/// ```
/// use dijiang::{
///     Attention, Far, HeadErrors, HeadSample, HybridAttention, SoftmaxAttention,
/// };
/// use ndarray::{Array2, Array3};
/// use std::sync::Arc;
///
/// let exact: Arc<dyn Attention<f32>> = Arc::new(SoftmaxAttention::new(8)?);
/// let small: Arc<dyn Attention<f32>> =
///     Arc::new(HybridAttention::builder(8).window(8).far(Far::merged(8)).build()?);
/// // two layers of two kv heads, each for three query heads
/// let q: Vec<_> = (0..4)
///     .map(|h| {
///         Array3::from_shape_fn((3, 50, 8), |(g, t, c)| {
///             ((h + g * 7 + t * 8 + c) as f32).sin()
///         })
///     })
///     .collect();
/// let kv: Vec<_> = (0..4)
///     .map(|h| {
///         Array2::from_shape_fn((50, 8), |(t, c)| ((h * 3 + t * 9 + c) as f32).cos())
///     })
///     .collect();
/// let samples: Vec<_> = (0..4)
///     .map(|i| HeadSample {
///         layer: i / 2,
///         kv_head: i % 2,
///         q: q[i].view(),
///         k: kv[i].view(),
///         v: kv[i].view(),
///     })
///     .collect();
///
/// let errors = HeadErrors::measure(&*exact, &*small, &samples, 10)?;
/// println!("{errors}"); // the table
/// let choice = errors.keep(1);
/// let layers: Vec<_> = (0..2)
///     .map(|layer| choice.layer(layer, 6, &exact, &small))
///     .collect::<Result<_, _>>()?;
/// assert_eq!(choice.heads().len(), 1);
/// # let _ = layers;
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct HeadErrors {
    /// The worst first.
    ranked: Vec<HeadError>,
    value_dim: usize,
}

impl HeadErrors {
    /// Runs `kernel` and `exact` on the samples of every head, causally, and ranks the heads by the
    /// error of the first. The first `warm_up` tokens are left out: as long as nothing has left the
    /// window, a hybrid is exact.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if there are no samples, or one has no query heads;
    /// [`Error::InvalidOption`] if a head appears twice or has no tokens behind the warm-up;
    /// [`Error::Shape`] if the values of heads have different numbers of columns; the errors of
    /// both kernels.
    pub fn measure<T: Scalar>(
        exact: &dyn Attention<T>,
        kernel: &dyn Attention<T>,
        samples: &[HeadSample<'_, T>],
        warm_up: usize,
    ) -> Result<Self, Error> {
        Self::measure_each(exact, |_| kernel, samples, warm_up)
    }

    /// As [`measure`](Self::measure), with a kernel for each head: where kernels are calibrated,
    /// each to its own head.
    ///
    /// # Errors
    ///
    /// As [`measure`](Self::measure).
    pub fn measure_each<'a, T: Scalar>(
        exact: &dyn Attention<T>,
        kernel: impl (Fn(&HeadSample<'_, T>) -> &'a dyn Attention<T>) + Send + Sync,
        samples: &[HeadSample<'_, T>],
        warm_up: usize,
    ) -> Result<Self, Error> {
        check::at_least_one("samples", samples.len())?;
        let value_dim = samples[0].v.ncols();
        for (i, sample) in samples.iter().enumerate() {
            check::size("v", "columns", value_dim, sample.v.ncols())?;
            check::at_least_one("q heads", sample.q.len_of(Axis(0)))?;
            if samples[..i]
                .iter()
                .any(|other| (other.layer, other.kv_head) == (sample.layer, sample.kv_head))
            {
                return Err(Error::InvalidOption {
                    which: "samples",
                    found: format!("kv head {} of layer {} twice", sample.kv_head, sample.layer),
                    needed: "each head once",
                });
            }
            if sample.k.nrows() <= warm_up {
                return Err(Error::InvalidOption {
                    which: "warm_up",
                    found: warm_up.to_string(),
                    needed: "fewer tokens than each sample has",
                });
            }
        }
        let mut ranked = each(samples, |scratch, sample| {
            let output_error = output_error(exact, kernel(sample), sample, warm_up, scratch)?;
            Ok(HeadError { layer: sample.layer, kv_head: sample.kv_head, output_error })
        })?;
        ranked.sort_by(|a, b| {
            let number = |error: &HeadError| (error.layer, error.kv_head);
            b.output_error.total_cmp(&a.output_error).then(number(a).cmp(&number(b)))
        });
        Ok(Self { ranked, value_dim })
    }

    /// The table, the worst head first.
    #[must_use]
    pub fn ranked(&self) -> &[HeadError] {
        &self.ranked
    }
}

/// A table for people.
impl fmt::Display for HeadErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:>5} {:>6} {:>8} {:>13}", "rank", "layer", "kv head", "output error")?;
        for (rank, error) in self.ranked.iter().enumerate() {
            writeln!(
                f,
                "{:>5} {:>6} {:>8} {:>13.4}",
                rank + 1,
                error.layer,
                error.kv_head,
                error.output_error
            )?;
        }
        Ok(())
    }
}

/// `‖ÂV − AV‖_F/‖AV‖_F` behind the warm-up.
fn output_error<T: Scalar>(
    exact: &dyn Attention<T>,
    kernel: &dyn Attention<T>,
    sample: &HeadSample<'_, T>,
    warm_up: usize,
    scratch: &mut Scratch<T>,
) -> Result<f64, Error> {
    let HeadSample { q, k, v, .. } = *sample;
    let mut run = |kernel: &dyn Attention<T>| {
        let mut out = Array3::zeros((q.len_of(Axis(0)), q.len_of(Axis(1)), v.ncols()));
        let head = Head::group(q, k, v, out.view_mut());
        kernel.forward_heads(&mut [head], Mask::Causal, scratch)?;
        Ok::<_, Error>(out)
    };
    let (exact, found) = (run(exact)?, run(kernel)?);
    let (mut difference, mut size) = (0.0_f64, 0.0_f64);
    for (exact, found) in exact.outer_iter().zip(found.outer_iter()) {
        for (exact, found) in exact.outer_iter().zip(found.outer_iter()).skip(warm_up) {
            for (exact, found) in exact.iter().zip(found) {
                difference += (found.as_f64() - exact.as_f64()).powi(2);
                size += exact.as_f64().powi(2);
            }
        }
    }
    Ok(if difference == 0.0 { 0.0 } else { (difference / size).sqrt() })
}

/// Runs `run` on every item, with feature `rayon` on the threads of the current pool; the first
/// error, in order.
pub(crate) fn each<T: Scalar, I: Sync, R: Send>(
    items: &[I],
    run: impl Fn(&mut Scratch<T>, &I) -> Result<R, Error> + Send + Sync,
) -> Result<Vec<R>, Error> {
    #[cfg(feature = "rayon")]
    {
        use rayon::prelude::*;
        let memory = || Scratch::with_threads(Threads::One);
        let results: Vec<_> = items.par_iter().map_init(memory, run).collect();
        results.into_iter().collect()
    }
    #[cfg(not(feature = "rayon"))]
    {
        let mut scratch = Scratch::new();
        items.iter().map(|item| run(&mut scratch, item)).collect()
    }
}
