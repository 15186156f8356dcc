//! The rule by which entries of a memory are merged.

use crate::check;
use crate::error::Error;
use crate::scalar::Scalar;
use ndarray::{Array2, ArrayView2, ArrayView3, Axis};
use std::sync::Arc;

/// How distances between keys are measured where entries are merged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Metric {
    /// `δk² = ‖Δk̄‖²`.
    Identity,
    /// `δk² = Σ_c r_c Δk̄_c²`, with `r_c` the mean of `q̂_c²` over the first 64 tokens behind the
    /// sinks (and the query heads of the group), then fixed: directions in which queries vary count
    /// more. For [`MergeCost::Ward`] `r` is scaled to mean 1.
    #[default]
    QueryDiagonal,
}

/// What it costs to merge two entries of the weights `a_i` and `a_j`, which lie `δk²` apart by the
/// [`Metric`] of keys and `δv² = ‖Δv̄‖²/ρ²` by their values.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum MergeCost {
    /// ```text
    /// δk²·(δv² + ¼·δk²) / (1/a_i + 1/a_j),    with 10⁻⁹ more than the weights
    /// ```
    ///
    /// Merging equal keys loses nothing, whatever their values: the error of a merge is mass times
    /// error of the logit times error of the value, and a term of second order of the logits alone
    /// ([derived](crate::theory)).
    #[default]
    Product,
    /// ```text
    /// a_i a_j/(a_i + a_j) · (δk² + value_weight·δv²)
    /// ```
    ///
    /// The increase of the weighted squared error (Ward, J. Am. Stat. Assoc. 58, 1963): equal keys
    /// of different values are held apart.
    Ward {
        /// The factor of `δv²`.
        value_weight: f64,
    },
}

/// What a token that leaves the window weighs at least.
pub(crate) const LEAST_WEIGHT: f64 = 1e-9;

impl MergeCost {
    /// What is added to weights where entries are merged.
    pub(crate) fn least_weight(self) -> f64 {
        if self == Self::Product { LEAST_WEIGHT } else { 0.0 }
    }

    /// Whether values count.
    pub(crate) fn counts_values(self) -> bool {
        !matches!(self, Self::Ward { value_weight } if value_weight <= 0.0)
    }

    /// Its numbers, to tell kernels apart.
    pub(crate) fn parameters(self) -> Vec<f64> {
        match self {
            Self::Ward { value_weight } => vec![value_weight],
            Self::Product => vec![-1.0],
        }
    }

    pub(crate) fn check(self) -> Result<(), Error> {
        match self {
            Self::Ward { value_weight } if !(value_weight >= 0.0 && value_weight.is_finite()) => {
                let needed = "a finite number that is not negative";
                let found = value_weight.to_string();
                Err(Error::InvalidOption { which: "value_weight", found, needed })
            }
            _ => Ok(()),
        }
    }
}

/// The units in which keys and values are compared where entries are merged, measured beforehand:
/// `r_c`, the mean of `q̂_c²` over sampled queries, and `ρ²`, the mean of `‖v‖²` over values.
///
/// Without them a memory takes both from its own first 64 tokens; with them it is the same from
/// token to token from the start.
///
/// ```
/// use dijiang::{HybridAttention, MergeUnits, Merged};
/// use ndarray::{Array2, Array3};
///
/// // two query heads of one head of keys and values, 100 sampled tokens
/// let q = Array3::from_shape_fn((2, 100, 8), |(g, t, c)| ((g + t * 8 + c) as f32).sin());
/// let v = Array2::from_shape_fn((100, 8), |(t, c)| ((t * 5 + c) as f32).cos());
/// let units = MergeUnits::from_samples(q.view(), v.view(), 8f64.sqrt().recip())?;
/// let far = Merged::new(16).units(units);
/// let kernel = HybridAttention::<f32>::builder(8).window(16).far(far).build()?;
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "SavedUnits")
)]
pub struct MergeUnits {
    query_squares: Vec<f64>,
    value_square: f64,
}

impl MergeUnits {
    /// `query_squares [head_dim]` holds `r_c`, of queries scaled with `√scale`; `value_square` is
    /// `ρ²`.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] without `query_squares`; [`Error::InvalidOption`] if one of them, or
    /// `value_square`, is negative or not finite.
    pub fn new(query_squares: Vec<f64>, value_square: f64) -> Result<Self, Error> {
        check::at_least_one("query_squares", query_squares.len())?;
        let is_bad = |x: &f64| !(x.is_finite() && *x >= 0.0);
        let needed = "finite numbers that are not negative";
        if let Some(bad) = query_squares.iter().find(|x| is_bad(x)) {
            let found = bad.to_string();
            return Err(Error::InvalidOption { which: "query_squares", found, needed });
        }
        if is_bad(&value_square) {
            let found = value_square.to_string();
            return Err(Error::InvalidOption { which: "value_square", found, needed });
        }
        Ok(Self { query_squares, value_square })
    }

    /// Of sampled queries `[group, n, head_dim]` of every query head of a head of keys and values,
    /// and its values `[n, value_dim]`, for a kernel of this `scale`. Leave out the sinks.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] without queries or values, [`Error::NotFinite`] if they hold NaN or
    /// infinity, [`Error::InvalidOption`] if `scale` is not positive and finite or a mean is beyond
    /// the range of `f64`.
    #[allow(clippy::cast_precision_loss)] // numbers of tokens
    pub fn from_samples<T: Scalar>(
        q: ArrayView3<'_, T>,
        v: ArrayView2<'_, T>,
        scale: f64,
    ) -> Result<Self, Error> {
        let (group, n, head_dim) = q.dim();
        check::at_least_one("head_dim", head_dim)?;
        check::at_least_one("queries", group * n)?;
        check::at_least_one("values", v.len())?;
        let scale = check::scale::<T>(Some(scale), head_dim)?;
        for q in q.outer_iter() {
            check::finite("q", q)?;
        }
        check::finite("v", v)?;
        let mean = |total: f64, count: usize| total / count as f64;
        let columns = q.axis_iter(Axis(2));
        let of_column = |x: ArrayView2<'_, T>| x.iter().map(|x| x.as_f64().powi(2)).sum::<f64>();
        let squares = columns.map(|x| mean(scale * of_column(x), group * n)).collect();
        Self::new(squares, mean(of_column(v), v.nrows()))
    }

    /// `r_c [head_dim]`.
    #[must_use]
    pub fn query_squares(&self) -> &[f64] {
        &self.query_squares
    }

    /// `ρ²`.
    #[must_use]
    pub fn value_square(&self) -> f64 {
        self.value_square
    }
}

/// Units as they are read, perhaps from a file that a person changed.
#[cfg(feature = "serde")]
#[derive(serde::Deserialize)]
#[serde(rename = "MergeUnits")]
struct SavedUnits {
    query_squares: Vec<f64>,
    value_square: f64,
}

#[cfg(feature = "serde")]
impl TryFrom<SavedUnits> for MergeUnits {
    type Error = Error;

    fn try_from(saved: SavedUnits) -> Result<Self, Error> {
        Self::new(saved.query_squares, saved.value_square)
    }
}

/// The rule by which entries are merged, with everything a memory needs to know.
#[derive(Clone, Debug)]
pub(crate) struct Rule {
    /// Entries that stay after merging, and how many more may be there before.
    pub(crate) entries: usize,
    pub(crate) spare: usize,
    /// Tokens that arrive at once: 1 merges pair by pair, more in rounds of mutual nearest pairs.
    pub(crate) block: usize,
    pub(crate) metric: Distance,
    pub(crate) cost: MergeCost,
    /// Units that are known; what is not is taken from the first tokens.
    pub(crate) query_squares: Option<Arc<[f64]>>,
    pub(crate) value_square: Option<f64>,
    /// Value columns that count: `None` for all of them.
    pub(crate) value_columns: Option<usize>,
    /// The factor of `q·k`.
    pub(crate) scale: f64,
}

/// See [`Metric`].
#[derive(Clone, Debug)]
pub(crate) enum Distance {
    Identity,
    QueryDiagonal,
    /// `‖R(k̄_i − k̄_j)‖²`.
    Matrix(Arc<Array2<f64>>),
}

/// More entries than this nobody asks for by intention.
pub(crate) const MOST_ENTRIES: usize = 1 << 14;

/// Refuses more entries than a memory can have.
pub(crate) fn check_entries(entries: usize) -> Result<(), Error> {
    if entries <= MOST_ENTRIES {
        return Ok(());
    }
    let needed = "at most 16384, with the tokens of a block and over all heads of a pool";
    Err(Error::InvalidOption { which: "entries", found: entries.to_string(), needed })
}
