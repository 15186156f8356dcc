//! Queries, keys and values of every head on a text: what kernels are calibrated to and exact heads
//! are chosen by.

use crate::model::Model;
use anyhow::{Result, ensure};
use dijiang::HeadSample;
use ndarray::{Array3, ArrayView3, Axis, s};

/// What the attention of each layer was given while the model, all exact, read a text.
#[derive(Clone, Debug)]
pub struct Capture {
    /// Query heads of a kv head.
    group: usize,
    layers: Vec<Captured>,
}

/// Queries `[heads, n, d]`, keys `[kv_heads, n, d]` and values `[kv_heads, n, d_v]` of a layer.
#[derive(Clone, Debug)]
struct Captured {
    q: Array3<f32>,
    k: Array3<f32>,
    v: Array3<f32>,
}

impl Capture {
    /// Reads `tokens` with exact attention.
    pub fn of(model: &Model, tokens: &[u32]) -> Result<Self> {
        ensure!(!tokens.is_empty(), "the calibration text is empty");
        let mut state = model.state(&model.exact_layers()?)?;
        let mut layers = Vec::with_capacity(model.config().layers);
        model.extend_observed(&mut state, tokens, &mut |seen| {
            layers.push(Captured {
                q: seen.q.to_owned(),
                k: seen.k.to_owned(),
                v: seen.v.to_owned(),
            });
            Ok(())
        })?;
        Ok(Self { group: model.config().group(), layers })
    }

    /// One sample for each kv head of the model.
    #[must_use]
    pub fn samples(&self) -> Vec<HeadSample<'_, f32>> {
        let sample = |(layer, of): (usize, &'_ Captured)| {
            (0..of.k.len_of(Axis(0))).map(move |kv_head| (layer, kv_head)).collect::<Vec<_>>()
        };
        self.layers
            .iter()
            .enumerate()
            .flat_map(sample)
            .map(|(layer, kv_head)| self.sample(layer, kv_head))
            .collect()
    }

    /// Queries, keys and values of a layer.
    #[must_use]
    pub fn layer(&self, layer: usize) -> [ArrayView3<'_, f32>; 3] {
        let Captured { q, k, v } = &self.layers[layer];
        [q, k, v].map(|x| x.view())
    }

    /// The sample of one kv head.
    #[must_use]
    pub fn sample(&self, layer: usize, kv_head: usize) -> HeadSample<'_, f32> {
        let of = &self.layers[layer];
        HeadSample {
            layer,
            kv_head,
            q: of.q.slice(s![kv_head * self.group..(kv_head + 1) * self.group, .., ..]),
            k: of.k.index_axis(Axis(0), kv_head),
            v: of.v.index_axis(Axis(0), kv_head),
        }
    }
}
