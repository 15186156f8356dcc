//! The sampled pairs of query and key, and which of them are far.

use crate::calibration::options::CalibrationOptions;
use crate::check;
use crate::error::Error;
use crate::mask::Mask;
use crate::views::rows;
use core::ops::Range;
use ndarray::{Array1, Array2, ArrayView1};

/// Queries with fewer far keys than this say nothing about far attention.
const LEAST_KEYS: usize = 4;

/// Scaled samples, and which keys each query sees.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Pairs {
    /// `[n·group, d]`, token by token, head by head.
    pub(crate) queries: Array2<f64>,
    pub(crate) keys: Array2<f64>,
    pub(crate) group: usize,
    /// Far keys of each token; those of later tokens include those of earlier ones.
    far: Vec<Range<usize>>,
    causal: bool,
}

impl Pairs {
    pub(crate) fn new(
        queries: Array2<f64>,
        keys: Array2<f64>,
        group: usize,
        options: &CalibrationOptions,
    ) -> Result<Self, Error> {
        let (tokens, n) = (queries.nrows() / group, keys.nrows());
        let causal = check::whole(options.mask, [tokens, n])? == Mask::Causal;
        if causal {
            check::size("k", "rows", tokens, n)?;
        }
        let positions = options.positions(n)?;
        let far = if causal {
            let start = positions.partition_point(|p| *p < options.sinks);
            let end = |p: &usize| match p.checked_sub(options.window) {
                Some(last) => positions.partition_point(|p| *p <= last),
                None => 0,
            };
            positions.iter().map(|p| start..end(p).max(start)).collect()
        } else {
            vec![0..n; tokens]
        };
        Ok(Self { queries, keys, group, far, causal })
    }

    pub(crate) fn tokens(&self) -> usize {
        self.far.len()
    }

    pub(crate) fn far(&self, row: usize) -> Range<usize> {
        self.far[row / self.group].clone()
    }

    fn visible(&self, row: usize) -> Range<usize> {
        0..if self.causal { row / self.group + 1 } else { self.keys.nrows() }
    }

    pub(crate) fn scores(&self, row: usize, keys: Range<usize>) -> Array1<f64> {
        rows(self.keys.view(), keys).dot(&self.queries.row(row))
    }

    /// The first row of a query with enough far keys.
    pub(crate) fn first_used(&self, options: &CalibrationOptions) -> Result<usize, Error> {
        if !self.causal {
            return Ok(0);
        }
        if let Some(token) = self.far.iter().position(|far| far.len() >= LEAST_KEYS) {
            return Ok(token * self.group);
        }
        let n = self.keys.nrows();
        let seen = self.far.last().map_or(0, |far| n - far.start);
        let (which, found, needed) = if n < LEAST_KEYS {
            ("k rows", n, "at least 4, or no query has four far keys")
        } else if seen < LEAST_KEYS {
            (
                "sinks",
                options.sinks,
                "smaller, or the samples from a longer text: fewer than four of their positions \
                 are no sinks",
            )
        } else {
            (
                "window",
                options.window,
                "smaller, or the samples from a longer text: no query has four far keys outside \
                 window and sinks",
            )
        };
        Err(Error::InvalidOption { which, found: found.to_string(), needed })
    }

    /// `lse_t` of each row over its visible keys, and the mean share of the far keys in them.
    pub(crate) fn log_normalizers(&self) -> Result<(Array1<f64>, f64), Error> {
        let mut all = Array1::zeros(self.queries.nrows());
        let (mut sum, mut count) = (0.0, 0.0);
        for (row, log_normalizer) in all.iter_mut().enumerate() {
            let scores = self.scores(row, self.visible(row));
            *log_normalizer = log_sum_exp(scores.view());
            if !(log_normalizer.is_finite() && scores.iter().all(|x| x.is_finite())) {
                return Err(Error::Overflow { which: "a score", row: row / self.group });
            }
            let far = self.far(row);
            if !far.is_empty() {
                sum += far.map(|j| (scores[j] - *log_normalizer).exp()).sum::<f64>();
                count += 1.0;
            }
        }
        Ok((all, sum / count))
    }
}

/// `ln Σ e^x`.
pub(crate) fn log_sum_exp(x: ArrayView1<'_, f64>) -> f64 {
    let largest = x.fold(f64::NEG_INFINITY, |a, &b| a.max(b));
    largest + x.mapv(|x| (x - largest).exp()).sum().ln()
}
