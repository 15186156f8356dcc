//! The forward pass of a LLaMA in `f64`, loop by loop from the formulas, on the weights as a file
//! holds them.

use super::{RMS_EPSILON, Sizes};
use candle_core::Device;
use candle_core::quantized::gguf_file::Content;
use ndarray::Array2;
use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

type Row = Vec<f64>;

pub struct Naive {
    sizes: Sizes,
    /// Rows of each tensor; a vector is one row.
    weights: HashMap<String, Vec<Row>>,
}

impl Naive {
    pub fn read(sizes: &Sizes, path: &Path) -> Self {
        let mut file = File::open(path).unwrap();
        let content = Content::read(&mut file).unwrap();
        let mut weights = HashMap::new();
        for (name, info) in &content.tensor_infos {
            let tensor = info.read(&mut file, content.tensor_data_offset, &Device::Cpu).unwrap();
            let values = tensor
                .dequantize(&Device::Cpu)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap();
            let columns = *info.shape.dims().last().unwrap();
            let rows = values
                .chunks(columns)
                .map(|row| row.iter().map(|&x| f64::from(x)).collect())
                .collect();
            weights.insert(name.clone(), rows);
        }
        Self { sizes: sizes.clone(), weights }
    }

    /// The scores of every token of the vocabulary, after each of `tokens`.
    pub fn logits(&self, tokens: &[u32]) -> Array2<f64> {
        let embedding = self.matrix("token_embd");
        let mut x: Vec<Row> =
            tokens.iter().map(|&token| embedding[token as usize].clone()).collect();
        for l in 0..self.sizes.layers {
            let layer = |part: &str| format!("blk.{l}.{part}");
            let h = self.norm(&x, &layer("attn_norm"));
            let mut q = self.linear(&h, &layer("attn_q"));
            let mut k = self.linear(&h, &layer("attn_k"));
            let v = self.linear(&h, &layer("attn_v"));
            for t in 0..tokens.len() {
                self.rotate(&mut q[t], t);
                self.rotate(&mut k[t], t);
            }
            let mixed = self.attention(&q, &k, &v);
            add(&mut x, &self.linear(&mixed, &layer("attn_output")));

            let h = self.norm(&x, &layer("ffn_norm"));
            let mut gated = self.linear(&h, &layer("ffn_gate"));
            let up = self.linear(&h, &layer("ffn_up"));
            for t in 0..tokens.len() {
                for (g, u) in gated[t].iter_mut().zip(&up[t]) {
                    *g = *g / (1.0 + (-*g).exp()) * u;
                }
            }
            add(&mut x, &self.linear(&gated, &layer("ffn_down")));
        }
        let hidden = self.norm(&x, "output_norm");
        let scores = self.linear(&hidden, if self.sizes.tied { "token_embd" } else { "output" });
        Array2::from_shape_fn((tokens.len(), self.sizes.vocabulary), |(t, token)| scores[t][token])
    }

    /// `−ln` of the probability of each token but the first, given those before.
    pub fn losses(&self, tokens: &[u32]) -> Vec<f64> {
        let logits = self.logits(&tokens[..tokens.len() - 1]);
        let loss = |(row, &next): (ndarray::ArrayView1<'_, f64>, &u32)| {
            let largest = row.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
            let sum: f64 = row.iter().map(|x| (x - largest).exp()).sum();
            sum.ln() + largest - row[next as usize]
        };
        logits.outer_iter().zip(&tokens[1..]).map(loss).collect()
    }

    /// Causal softmax attention; query head `h` reads the keys and values of head
    /// `h / (heads / kv_heads)`.
    fn attention(&self, q: &[Row], k: &[Row], v: &[Row]) -> Vec<Row> {
        let (d, dv) = (self.sizes.head_dim(), self.sizes.value_dim());
        let group = self.sizes.heads / self.sizes.kv_heads;
        let mut mixed = vec![vec![0.0; self.sizes.heads * dv]; q.len()];
        for h in 0..self.sizes.heads {
            let kv = h / group;
            for t in 0..q.len() {
                let score = |s: usize| -> f64 {
                    (0..d).map(|c| q[t][h * d + c] * k[s][kv * d + c]).sum::<f64>()
                        / (d as f64).sqrt()
                };
                let scores: Vec<f64> = (0..=t).map(score).collect();
                let largest = scores.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
                let shares: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
                let sum: f64 = shares.iter().sum();
                for (s, share) in shares.iter().enumerate() {
                    for c in 0..dv {
                        mixed[t][h * dv + c] += share / sum * v[s][kv * dv + c];
                    }
                }
            }
        }
        mixed
    }

    /// Turns the pair `(2i, 2i + 1)` of each head by `t·base^(−2i/dims)/stretch/factor_i`.
    fn rotate(&self, row: &mut [f64], t: usize) {
        let dims = self.sizes.rope_dims();
        for head in row.chunks_mut(self.sizes.head_dim()) {
            for i in 0..dims / 2 {
                let base = f64::from(self.sizes.rope_base as f32);
                let factor =
                    if self.sizes.rope_factors { self.matrix("rope_freqs")[0][i] } else { 1.0 };
                let frequency = 1.0 / base.powf(2.0 * i as f64 / dims as f64);
                let (sin, cos) = (t as f64 * frequency / self.sizes.stretch() / factor).sin_cos();
                let (a, b) = (head[2 * i], head[2 * i + 1]);
                head[2 * i] = a * cos - b * sin;
                head[2 * i + 1] = a * sin + b * cos;
            }
        }
    }

    /// `x/√(mean x² + ε) ⊙ gain`
    fn norm(&self, x: &[Row], name: &str) -> Vec<Row> {
        let gain = &self.matrix(name)[0];
        let of_row = |row: &Row| {
            let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
            row.iter()
                .zip(gain)
                .map(|(x, gain)| x / (mean + f64::from(RMS_EPSILON)).sqrt() * gain)
                .collect()
        };
        x.iter().map(of_row).collect()
    }

    /// `W·x` of every row, `W [out, in]`.
    fn linear(&self, x: &[Row], name: &str) -> Vec<Row> {
        let dot = |a: &Row, b: &Row| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
        x.iter().map(|x| self.matrix(name).iter().map(|w| dot(w, x)).collect()).collect()
    }

    fn matrix(&self, name: &str) -> &[Row] {
        &self.weights[&format!("{name}.weight")]
    }
}

fn add(x: &mut [Row], y: &[Row]) {
    for (x, y) in x.iter_mut().zip(y) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += y;
        }
    }
}
