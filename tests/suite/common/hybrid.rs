//! The hybrids by their formulas: options, and which function of `attention::naive` they are for.

use super::features;
use dijiang::attention::naive::hybrid::{Near, log_decaying_products, log_products, log_weights};
use dijiang::attention::naive::merged::{Ward, ward};
use dijiang::attention::naive::options::{Options, soft_capped, with_sink};
use dijiang::attention::naive::received::{self, received, received_pooled};
use dijiang::{Calibration, FeatureMap, Mask, MergeCost, StateFormat};
use ndarray::{Array1, Array2, ArrayView1, Axis};
use std::sync::Arc;

/// What takes the tokens that leave.
#[derive(Clone, Debug)]
pub enum FarFormula {
    None,
    Features(Arc<dyn FeatureMap<f64>>),
    /// With these decays of features.
    Decaying(Arc<dyn FeatureMap<f64>>, Vec<f64>),
    /// With a calibration: a `CalibratedTaylor` of this rank.
    Taylor(usize, Arc<dyn FeatureMap<f64>>),
    Ward {
        entries: usize,
        block: usize,
    },
    /// With a calibration: its metric and expected attention.
    WardCalibrated {
        entries: usize,
        metric: Arc<Array2<f64>>,
    },
    Merged(Received),
}

impl FarFormula {
    /// Whether it is sums of features.
    pub fn has_features(&self) -> bool {
        matches!(self, Self::Features(_) | Self::Decaying(..) | Self::Taylor(..))
    }
}

/// Options of received-attention merging.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    pub entries: usize,
    pub block: usize,
    pub gamma: f64,
    pub min_age: usize,
    pub cost: MergeCost,
    pub diagonal: bool,
}

impl Received {
    /// Whether values count where entries are merged.
    pub fn counts_values(&self) -> bool {
        self.cost != MergeCost::Ward { value_weight: 0.0 }
    }
}

#[derive(Clone, Debug)]
pub struct HybridFormula {
    pub window: usize,
    pub sinks: usize,
    pub heavy: usize,
    pub far: FarFormula,
    pub calibration: Option<Arc<Calibration>>,
    /// The calibrated metric of received-attention merging.
    pub metric: Option<Array2<f64>>,
    /// How entries are kept.
    pub format: StateFormat,
    /// A cap and a learned sink.
    pub options: Options,
}

impl HybridFormula {
    /// Causal outputs `[head][group] [n, d_v]` of some heads with their query heads; `pooled` heads
    /// share one budget of entries.
    pub fn causal(
        &self,
        q: &[Vec<Array2<f64>>],
        k: &[Array2<f64>],
        v: &[Array2<f64>],
        scale: f64,
        pooled: bool,
    ) -> Vec<Vec<Array2<f64>>> {
        if let FarFormula::Merged(rule) = &self.far {
            let (rule, near) = (self.rule(rule, scale), |h: usize| self.near(&k[h], scale));
            if pooled {
                assert_eq!(self.heavy, 0, "heavy keys have scores of one head");
                return received_pooled(q, k, v, scale, &near(0), &rule);
            }
            return (0..k.len())
                .map(|h| received(&q[h], &k[h], &v[h], scale, &near(h), &rule))
                .collect();
        }
        assert!(!pooled);
        q.iter()
            .zip(k.iter().zip(v))
            .map(|(group, (k, v))| {
                group.iter().map(|q| self.head([q, k, v], scale, Mask::Causal)).collect()
            })
            .collect()
    }

    /// Every query sees every key: those behind the sinks have all gone to the far memory, in
    /// order.
    pub fn full(
        &self,
        q: &Array2<f64>,
        k: &Array2<f64>,
        v: &Array2<f64>,
        scale: f64,
    ) -> Array2<f64> {
        self.head([q, k, v], scale, Mask::Full)
    }

    /// One query head, of a hybrid that does not learn from what is read.
    fn head(&self, [q, k, v]: [&Array2<f64>; 3], scale: f64, mask: Mask) -> Array2<f64> {
        let (near, options, format) = (self.near(k, scale), self.options, self.format);
        let logs = |far: &Array2<f64>| log_weights(q, k, scale, &near, far, mask);
        match &self.far {
            FarFormula::None => {
                let nothing = Array2::from_elem((q.nrows(), k.nrows()), f64::NEG_INFINITY);
                let logs = logs(&nothing).mapv(|score| soft_capped(score, options.soft_cap));
                with_sink(&logs, v, options.sink_logit, mask)
            }
            FarFormula::Features(map) | FarFormula::Taylor(_, map) => {
                let phi_q = features(&**map, q, scale, false);
                let phi_k = features(&**map, k, scale, true);
                with_sink(&logs(&log_products(&phi_q, &phi_k)), v, options.sink_logit, mask)
            }
            FarFormula::Decaying(map, decay) => {
                let phi_q = features(&**map, q, scale, false);
                let phi_k = features(&**map, k, scale, true);
                let far = log_decaying_products(&phi_q, &phi_k, decay, self.window);
                with_sink(&logs(&far), v, options.sink_logit, mask)
            }
            FarFormula::Ward { entries, .. } => {
                let weights = Array1::ones(k.nrows());
                let rule = Ward { entries: *entries, weights, metric: None, format, options };
                ward([q, k, v], scale, &near, &rule, mask)
            }
            FarFormula::WardCalibrated { entries, metric } => {
                let weight = |k: ArrayView1<'_, f64>| self.calibration().expected_attention(k);
                let weights = (k * scale.sqrt()).outer_iter().map(weight).collect();
                let metric = Some((**metric).clone());
                let rule = Ward { entries: *entries, weights, metric, format, options };
                ward([q, k, v], scale, &near, &rule, mask)
            }
            FarFormula::Merged(_) => unreachable!("it learns from what is read"),
        }
    }

    fn calibration(&self) -> &Calibration {
        self.calibration.as_ref().unwrap()
    }

    fn near(&self, k: &Array2<f64>, scale: f64) -> Near {
        let block = match &self.far {
            FarFormula::Ward { block, .. } => *block,
            FarFormula::Merged(received) => received.block,
            _ => 1,
        };
        let score = |k: ArrayView1<'_, f64>| self.calibration().static_score(k);
        let scores = match self.heavy {
            0 => Array1::zeros(0),
            _ => (k * scale.sqrt()).outer_iter().map(score).collect(),
        };
        Near { sinks: self.sinks, window: self.window, block, heavy: self.heavy, scores }
    }

    fn rule(&self, rule: &Received, scale: f64) -> received::Received {
        let cost = match rule.cost {
            MergeCost::Ward { value_weight } => received::Cost::Ward { value_weight },
            _ => received::Cost::Product,
        };
        let metric = match &self.metric {
            Some(metric) if cost == received::Cost::Product => {
                let columns = metric.axis_iter(Axis(1));
                received::Metric::Diagonal(columns.map(|column| column.dot(&column)).collect())
            }
            Some(metric) => received::Metric::Matrix(metric.clone()),
            None if rule.diagonal => received::Metric::QueryDiagonal,
            None => received::Metric::Identity,
        };
        received::Received {
            entries: rule.entries,
            gamma: rule.gamma,
            min_age: rule.min_age,
            cost,
            metric,
            mean_value_square: None,
            format: self.format,
            key_unit: scale.sqrt(),
            options: self.options,
        }
    }
}
