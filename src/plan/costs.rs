//! What the settings of a head cost, measured on its samples.

use crate::attention::Attention;
use crate::attention::call::Head;
use crate::attention::scratch::Scratch;
use crate::error::Error;
use crate::mask::Mask;
use crate::plan::options::{ALWAYS_MEASURED, Curve, PlanOptions};
use crate::plan::sample::PlanSample;
use crate::plan::setting::{KernelOptions, Units};
use crate::scalar::Scalar;
use core::ops::Range;
use ndarray::{Array3, ArrayView2, Axis};
use std::collections::BTreeMap;

/// The length that stands for all tokens of a sample.
pub(crate) const WHOLE: usize = 0;

/// Costs are also kept for tokens behind half of this, of twice this, and so on.
const FIRST_LENGTH: usize = 256;

/// A larger memory than [`ALWAYS_MEASURED`] is measured if the one before cost less than this part
/// of the one before that.
const STILL_FALLS: f64 = 0.8;

/// Where costs are interpolated in their logarithms, less than this part of the head's largest
/// counts as this part: a lossless memory, or one that differs by rounding, costs nothing.
const FLOOR: f64 = 1e-6;

/// Sums over the samples of a head, by length.
type ByLength = BTreeMap<usize, f64>;

/// One number of entries on a curve.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Point {
    pub(crate) entries: usize,
    /// `Σ weight·E` of the samples.
    pub(crate) sums: ByLength,
}

/// The measured costs of one head.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct HeadCosts {
    pub(crate) layer: usize,
    pub(crate) kv_head: usize,
    /// `Σ weight` of the samples that reach a length.
    pub(crate) weights: ByLength,
    /// As many as the grid has, in its order.
    pub(crate) curves: Vec<Vec<Point>>,
    /// `Σ weight·mean q̂_c²`
    pub(crate) metric: Vec<f64>,
    /// `Σ weight·mean ‖v‖²`
    pub(crate) value_norm_squared: f64,
}

impl HeadCosts {
    pub(crate) fn new(layer: usize, kv_head: usize, curves: usize, head_dim: usize) -> Self {
        Self {
            layer,
            kv_head,
            weights: ByLength::new(),
            curves: vec![Vec::new(); curves],
            metric: vec![0.0; head_dim],
            value_norm_squared: 0.0,
        }
    }

    /// What tells this head from others.
    pub(crate) fn number(&self) -> (usize, usize) {
        (self.layer, self.kv_head)
    }

    /// Measures all settings on one sample more. After an error the costs are of no use.
    pub(crate) fn add<T: Scalar>(
        &mut self,
        sample: &PlanSample<'_, T>,
        options: &PlanOptions,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        let (kernel, weight) = (options.kernel(self.metric.len())?, sample.weight);
        let units = units(sample, kernel);
        let ranges = lengths(sample.tokens(), options.length);
        let exact = outputs(&kernel.exact()?, sample, scratch)?;
        let deciding = options.length.unwrap_or(WHOLE);
        for (curve, points) in options.grid.iter().zip(&mut self.curves) {
            // later samples are measured where the first was
            let is_first = points.is_empty();
            let sizes = if is_first {
                curve.entries.clone()
            } else {
                points.iter().map(|point| point.entries).collect()
            };
            for (i, entries) in sizes.into_iter().enumerate() {
                if is_first && entries > ALWAYS_MEASURED && !still_falls(points, deciding) {
                    break;
                }
                if is_first {
                    points.push(Point { entries, sums: ByLength::new() });
                }
                let held = kernel.sinks + curve.window + entries;
                let errors = if sample.tokens() <= held {
                    None // nothing was merged
                } else {
                    let Curve { window, decay, .. } = *curve;
                    let merged = kernel.merged(window, entries, decay, Some(&units))?;
                    Some(TokenErrors::new(&exact, &outputs(&merged, sample, scratch)?, sample))
                };
                for (length, range) in &ranges {
                    let cost = errors.as_ref().map_or(0.0, |errors| errors.cost(range.clone()));
                    if !cost.is_finite() {
                        return Err(Error::Overflow { which: "the cost of a setting", row: 0 });
                    }
                    *points[i].sums.entry(*length).or_default() += weight * cost;
                }
            }
        }
        for (length, _) in ranges {
            *self.weights.entry(length).or_default() += weight;
        }
        for (sum, r) in self.metric.iter_mut().zip(&units.metric) {
            *sum += weight * r;
        }
        self.value_norm_squared += weight * units.value_norm_squared;
        Ok(())
    }

    /// The lengths that all samples reach, the whole of them first.
    pub(crate) fn lengths(&self) -> impl Iterator<Item = usize> {
        let all = self.weights.get(&WHOLE).copied();
        self.weights.iter().filter(move |(_, w)| Some(**w) == all).map(|(length, _)| *length)
    }

    /// The mean units over the samples.
    pub(crate) fn units(&self) -> Units {
        let weight = self.weights.get(&WHOLE).copied().unwrap_or(1.0);
        Units {
            metric: self.metric.iter().map(|sum| sum / weight).collect(),
            value_norm_squared: self.value_norm_squared / weight,
        }
    }

    /// The costs of one curve at one length, for interpolation.
    pub(crate) fn curve(&self, curve: usize, length: usize) -> CostCurve {
        let weight = self.weights.get(&length).copied().unwrap_or(1.0);
        let cost = |point: &Point| point.sums.get(&length).copied().unwrap_or(0.0) / weight;
        let largest = self.curves.iter().flatten().map(cost).fold(0.0, f64::max);
        let points = self.curves[curve].iter().map(|point| (point.entries, cost(point))).collect();
        CostCurve { points, floor: FLOOR * largest }
    }
}

/// The costs of settings that differ in their number of entries.
#[derive(Clone, Debug)]
pub(crate) struct CostCurve {
    /// Entries and costs, ascending by entries.
    points: Vec<(usize, f64)>,
    floor: f64,
}

impl CostCurve {
    /// The numbers of entries between the smallest and the largest measured.
    pub(crate) fn entries(&self) -> Range<usize> {
        match (self.points.first(), self.points.last()) {
            (Some((first, _)), Some((last, _))) => *first..last + 1,
            _ => 0..0,
        }
    }

    /// The cost measured, or between two measured ones `ln C` on a line over `ln entries`.
    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn cost(&self, entries: usize) -> f64 {
        let after = self.points.partition_point(|(at, _)| *at < entries);
        let Some(&(right, above)) = self.points.get(after) else {
            return self.points.last().map_or(0.0, |(_, cost)| *cost);
        };
        if right == entries || after == 0 {
            return above;
        }
        let (left, below) = self.points[after - 1];
        if below == above {
            return below;
        }
        let ln = |entries: usize| (entries as f64).ln();
        let part = (ln(entries) - ln(left)) / (ln(right) - ln(left));
        let (below, above) = (below.max(self.floor).ln(), above.max(self.floor).ln());
        (below + part * (above - below)).exp()
    }
}

fn still_falls(points: &[Point], length: usize) -> bool {
    let cost = |point: &Point| point.sums.get(&length).copied().unwrap_or(0.0);
    match points {
        [.., before, last] => cost(last) < STILL_FALLS * cost(before),
        _ => true,
    }
}

/// The tokens whose mean cost is kept: all, and the last half of each length.
pub(crate) fn lengths(tokens: usize, asked: Option<usize>) -> Vec<(usize, Range<usize>)> {
    let doubled = core::iter::successors(Some(FIRST_LENGTH), |length| length.checked_mul(2));
    let mut lengths: Vec<_> = doubled.take_while(|length| *length <= tokens).collect();
    lengths.extend(asked.filter(|asked| !lengths.contains(asked)));
    let half = |length| (length, length / 2..length);
    [(WHOLE, 0..tokens)].into_iter().chain(lengths.into_iter().map(half)).collect()
}

/// The outputs of a kernel for all query heads of the sample.
fn outputs<T: Scalar>(
    kernel: &dyn Attention<T>,
    sample: &PlanSample<'_, T>,
    scratch: &mut Scratch<T>,
) -> Result<Array3<T>, Error> {
    let (q, k, v) = (sample.sample.q, sample.sample.k, sample.sample.v);
    let mut out = Array3::zeros((q.len_of(Axis(0)), q.len_of(Axis(1)), v.ncols()));
    kernel.forward_heads(&mut [Head::group(q, k, v, out.view_mut())], Mask::Causal, scratch)?;
    Ok(out)
}

/// The cost of each token, and what the sum over tokens is divided by.
struct TokenErrors {
    cost: Vec<f64>,
    size: Vec<f64>,
}

impl TokenErrors {
    /// With sensitivities `½ (Σ_heads g_t·(õ_t − o_t))²` each, and the mean is over tokens;
    /// without `Σ_heads ‖õ_t − o_t‖²`, relative to `Σ_heads ‖o_t‖²`.
    fn new<T: Scalar>(
        exact: &Array3<T>,
        found: &Array3<T>,
        PlanSample { sensitivity, .. }: &PlanSample<'_, T>,
    ) -> Self {
        let tokens = exact.len_of(Axis(1));
        let mut cost = vec![0.0; tokens];
        let Some(sensitivity) = sensitivity else {
            let mut size = vec![0.0; tokens];
            for (exact, found) in exact.outer_iter().zip(found.outer_iter()) {
                let rows = exact.outer_iter().zip(found.outer_iter());
                for ((exact, found), (cost, size)) in rows.zip(cost.iter_mut().zip(&mut size)) {
                    for (exact, found) in exact.iter().zip(found) {
                        *cost += (found.as_f64() - exact.as_f64()).powi(2);
                        *size += exact.as_f64().powi(2);
                    }
                }
            }
            return Self { cost, size };
        };
        let heads = exact.outer_iter().zip(found.outer_iter()).zip(sensitivity.outer_iter());
        for ((exact, found), g) in heads {
            let rows = exact.outer_iter().zip(found.outer_iter()).zip(g.outer_iter());
            for (((exact, found), g), change) in rows.zip(&mut cost) {
                for ((exact, found), g) in exact.iter().zip(found).zip(g) {
                    *change += g.as_f64() * (found.as_f64() - exact.as_f64());
                }
            }
        }
        for change in &mut cost {
            *change = 0.5 * *change * *change;
        }
        Self { cost, size: vec![1.0; tokens] }
    }

    fn cost(&self, tokens: Range<usize>) -> f64 {
        let cost: f64 = self.cost[tokens.clone()].iter().sum();
        let size: f64 = self.size[tokens].iter().sum();
        if cost == 0.0 { 0.0 } else { cost / size }
    }
}

/// The units of one sample: `scale·mean q_c²` and the mean of `‖v‖²` behind the sinks.
#[allow(clippy::cast_precision_loss)]
fn units<T: Scalar>(sample: &PlanSample<'_, T>, kernel: KernelOptions) -> Units {
    let (q, v) = (sample.sample.q, sample.sample.v);
    let mut metric = vec![0.0; kernel.head_dim];
    for row in q.outer_iter().flat_map(ArrayView2::into_outer_iter) {
        for (sum, x) in metric.iter_mut().zip(row) {
            *sum += x.as_f64().powi(2);
        }
    }
    let rows = (q.len_of(Axis(0)) * q.len_of(Axis(1))).max(1);
    for sum in &mut metric {
        *sum *= kernel.scale / rows as f64;
    }
    let behind = v.nrows().saturating_sub(kernel.sinks).max(1);
    let squares = v.outer_iter().skip(kernel.sinks).flatten().map(|x| x.as_f64().powi(2));
    Units { metric, value_norm_squared: squares.sum::<f64>() / behind as f64 }
}
