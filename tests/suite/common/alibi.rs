//! A kernel of one's own, as a user writes it: softmax attention with linear biases, in three
//! methods.

use super::{Formula, Subject, Written};
use dijiang::attention::naive;
use dijiang::{Attention, Error, Mask, Memory, MemoryAttention, Partial, Scalar};
use ndarray::{Array1, Array2, ArrayView2};
use std::sync::Arc;

/// `w(q_t, k_j) = exp(scale·q_t·k_j − slope·(t − j))` (Press et al., arXiv 2108.12409, section 3).
#[derive(Clone, Debug)]
pub struct Alibi<T> {
    pub scale: f64,
    pub slope: f64,
    pub tokens: Vec<(Array1<T>, Array1<T>)>,
}

impl<T: Scalar> Memory<T> for Alibi<T> {
    fn absorb(&mut self, k: ArrayView2<'_, T>, v: ArrayView2<'_, T>) -> Result<(), Error> {
        let tokens = k.outer_iter().zip(v.outer_iter());
        self.tokens.extend(tokens.map(|(k, v)| (k.to_owned(), v.to_owned())));
        Ok(())
    }

    fn read(&self, q: ArrayView2<'_, T>, answer: &mut Partial<T>) -> Result<(), Error> {
        let (scale, last) = (T::from_f64(self.scale), self.tokens.len());
        for (j, (k, v)) in self.tokens.iter().enumerate() {
            let bias = T::from_f64(self.slope * (last - 1 - j) as f64);
            let log_weights = q.dot(k).mapv(|product| product * scale - bias);
            let values = v.broadcast((q.nrows(), v.len())).expect("one for each query").to_owned();
            answer.merge(&Partial::from_parts(values, Array1::ones(q.nrows()), log_weights)?)?;
        }
        Ok(())
    }

    fn state_floats(&self) -> usize {
        self.tokens.iter().map(|(k, v)| k.len() + v.len()).sum()
    }
}

/// The kernel.
pub fn alibi<T: Scalar>(d: usize, slope: f64) -> MemoryAttention<T> {
    let scale = 1.0 / (d as f64).sqrt();
    MemoryAttention::new(d, move |_| Ok(Alibi { scale, slope, tokens: Vec::new() })).unwrap()
}

/// For the shared checker, against the formula.
pub fn alibi_subject(d: usize, slope: f64) -> Subject {
    let scale = 1.0 / (d as f64).sqrt();
    let f64: Arc<dyn Attention<f64>> = Arc::new(alibi::<f64>(d, slope));
    Subject {
        name: format!("alibi d={d} slope={slope}"),
        head_dim: d,
        f64,
        f32: Arc::new(alibi::<f32>(d, slope)),
        positive: true,
        scale,
        formula: Formula::Written(Written {
            masks: &[Mask::Causal, Mask::Full],
            normalized: true,
            has_features: false,
            state: Box::new(move |dv, tokens| tokens * (d + dv)),
            output: Box::new(move |[q, k, v]: [&Array2<f64>; 3], mask| {
                let mut log_weights = naive::scores(q, k, scale);
                for ((t, j), log_weight) in log_weights.indexed_iter_mut() {
                    // with a full mask every query stands behind the last key
                    let position = if mask == Mask::Causal { t } else { k.nrows() - 1 };
                    *log_weight -= slope * position.abs_diff(j) as f64;
                }
                naive::from_log_weights(&log_weights, v, mask)
            }),
        }),
    }
}
