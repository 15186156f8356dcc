//! Losses whose gradients say what a head is good for.

use anyhow::{Result, ensure};
use candle_core::{DType, Tensor};
use ndarray::{Array1, Array2, ArrayView1, ArrayViewMut1, Axis, Zip};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::ops::Range;

/// What is differentiated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Loss {
    /// `Σ_t −ln p(y_t)`, each `y_t` drawn from the model's own `p` after token `t`: the mean of
    /// `g·gᵀ` is then the Fisher metric, by which half of `δᵀ g gᵀ δ` is the divergence that a
    /// small error `δ` causes.
    OwnWords {
        /// Of the random numbers.
        seed: u64,
    },
    /// `Σ ln(p/(1 − p))` of the tokens at these places of the text, each given those before it:
    /// what a model needs to copy them is not small where it is sure of them.
    LogOdds(Range<usize>),
}

/// A loss and its gradient.
pub(super) struct Found {
    /// In nats.
    pub loss: f64,
    /// `[n, width]`
    pub hidden: Tensor,
    pub targets: Vec<Option<u32>>,
}

/// Rows whose logits are held at once.
const ROWS: usize = 256;

impl Loss {
    /// The loss of a text and its gradient by the hidden states `[n, width]`, whose products with
    /// `head [vocabulary, width]` are the logits.
    pub(super) fn gradient(&self, hidden: &Tensor, head: &Tensor, tokens: &[u32]) -> Result<Found> {
        let n = tokens.len();
        if let Self::LogOdds(places) = self {
            ensure!(
                places.start > 0 && places.end <= n && !places.is_empty(),
                "the places {places:?} of a text of {n} tokens cannot be predicted"
            );
        }
        let mut found = (0.0, Vec::new(), Vec::with_capacity(n));
        for start in (0..n).step_by(ROWS) {
            let rows = start..n.min(start + ROWS);
            let hidden = hidden.narrow(0, start, rows.len())?;
            let logits = hidden.matmul(&head.t()?)?.to_dtype(DType::F64)?;
            let shape = logits.dims2()?;
            let mut logits = Array2::from_shape_vec(shape, logits.flatten_all()?.to_vec1()?)?;
            ensure!(
                logits.iter().all(|x: &f64| x.is_finite()),
                "the model gives its tokens scores that are not finite numbers: its weights are \
                 damaged, or too large for f32"
            );
            let mut of_rows = Array1::from_elem(rows.len(), (0.0, None));
            Zip::indexed(logits.axis_iter_mut(Axis(0))).and(&mut of_rows).par_for_each(
                |row, logits, found| *found = self.row(rows.start + row, logits, tokens),
            );
            found.0 += of_rows.iter().map(|(loss, _)| loss).sum::<f64>();
            found.2.extend(of_rows.iter().map(|(_, target)| *target));
            let (values, _) = logits.into_raw_vec_and_offset();
            let gradient =
                Tensor::from_vec(values, shape, head.device())?.to_dtype(head.dtype())?;
            found.1.push(gradient.matmul(head)?);
        }
        let (loss, hidden, targets) = found;
        Ok(Found { loss, hidden: Tensor::cat(&hidden, 0)?, targets })
    }

    /// Makes the gradient out of the logits after token `t`; gives the loss and its token.
    fn row(
        &self,
        t: usize,
        mut logits: ArrayViewMut1<'_, f64>,
        tokens: &[u32],
    ) -> (f64, Option<u32>) {
        match self {
            Self::OwnWords { seed } => {
                let p = probabilities(&mut logits);
                let mut random = ChaCha8Rng::seed_from_u64(*seed);
                random.set_stream(t as u64);
                let y = drawn(p, random.random());
                let loss = -logits[y].ln();
                logits[y] -= 1.0;
                (loss, Some(y as u32))
            }
            Self::LogOdds(places) if places.contains(&(t + 1)) => {
                let y = tokens[t + 1];
                // p_j/(1 − p_y) of the others is softmax without y, and not a ratio of small
                // numbers where p is near 1
                let score = logits[y as usize];
                logits[y as usize] = f64::NEG_INFINITY;
                let largest = logits.fold(f64::NEG_INFINITY, |a, &b| a.max(b));
                let sum: f64 = logits.iter().map(|x| (x - largest).exp()).sum();
                logits.mapv_inplace(|x| -(x - largest).exp() / sum);
                logits[y as usize] = 1.0;
                (score - largest - sum.ln(), Some(y))
            }
            Self::LogOdds(_) => {
                logits.fill(0.0);
                (0.0, None)
            }
        }
    }
}

/// `e^x/Σ e^x` in place.
fn probabilities<'a>(x: &'a mut ArrayViewMut1<'_, f64>) -> ArrayView1<'a, f64> {
    let largest = x.fold(f64::NEG_INFINITY, |a, &b| a.max(b));
    x.mapv_inplace(|x| (x - largest).exp());
    let sum = x.sum();
    *x /= sum;
    x.view()
}

/// The index at which the running sum of `p` passes `uniform`, which is in `[0, 1)`.
fn drawn(p: ArrayView1<'_, f64>, uniform: f64) -> usize {
    let mut sum = 0.0;
    let mut last = 0;
    for (i, &p) in p.iter().enumerate().filter(|(_, p)| **p > 0.0) {
        sum += p;
        last = i;
        if uniform < sum {
            break;
        }
    }
    last
}
