//! The forward pass of a LLaMA in `f64` from the formulas, on the weights as a file holds them.

use super::{RMS_EPSILON, Sizes};
use candle_core::Device;
use candle_core::quantized::gguf_file::Content;
use dijiang::Mask;
use dijiang::attention::naive::{self, positional};
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
        self.logits_changed(tokens, &|_, _| {})
    }

    /// The same, where `change` is given each layer and what its heads put out, `[n][heads · d_v]`.
    pub fn logits_changed(
        &self,
        tokens: &[u32],
        change: &dyn Fn(usize, &mut [Vec<f64>]),
    ) -> Array2<f64> {
        let embedding = self.matrix("token_embd");
        let mut x: Vec<Row> =
            tokens.iter().map(|&token| embedding[token as usize].clone()).collect();
        let scales = self.sizes.scales;
        times(&mut x, scales.embedding);
        for l in 0..self.sizes.layers {
            let layer = |part: &str| format!("blk.{l}.{part}");
            let h = self.norm(&x, &layer("attn_norm"));
            let q = self.linear(&h, &layer("attn_q"));
            let k = self.linear(&h, &layer("attn_k"));
            let v = self.linear(&h, &layer("attn_v"));
            let mut mixed = self.attention(&q, &k, &v);
            change(l, &mut mixed);
            let mut added = self.linear(&mixed, &layer("attn_output"));
            times(&mut added, scales.residual);
            add(&mut x, &added);

            let h = self.norm(&x, &layer("ffn_norm"));
            let mut gated = self.linear(&h, &layer("ffn_gate"));
            let up = self.linear(&h, &layer("ffn_up"));
            for t in 0..tokens.len() {
                for (g, u) in gated[t].iter_mut().zip(&up[t]) {
                    *g = *g / (1.0 + (-*g).exp()) * u;
                }
            }
            let mut added = self.linear(&gated, &layer("ffn_down"));
            times(&mut added, scales.residual);
            add(&mut x, &added);
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

    /// Causal softmax attention with rotary embedding; query head `h` reads the keys and values of
    /// head `h / (heads / kv_heads)`.
    fn attention(&self, q: &[Row], k: &[Row], v: &[Row]) -> Vec<Row> {
        let (d, dv) = (self.sizes.head_dim(), self.sizes.value_dim());
        let group = self.sizes.heads / self.sizes.kv_heads;
        let pairs = self.pairs();
        let scale = self.sizes.scales.attention.unwrap_or(1.0 / (d as f64).sqrt());
        let head = |x: &[Row], h: usize, columns: usize| {
            Array2::from_shape_fn((x.len(), columns), |(t, c)| x[t][h * columns + c])
        };
        let mut mixed = vec![Row::new(); q.len()];
        for h in 0..self.sizes.heads {
            let q = positional::rotate(&head(q, h, d), 0, &pairs);
            let k = positional::rotate(&head(k, h / group, d), 0, &pairs);
            let v = head(v, h / group, dv);
            let out = naive::softmax(&q, &k, &v, scale, Mask::Causal);
            for (row, out) in mixed.iter_mut().zip(out.outer_iter()) {
                row.extend(out);
            }
        }
        mixed
    }

    /// The pairs `(2i, 2i + 1)` of each head and their angles `base^(−2i/dims)/stretch/factor_i`.
    fn pairs(&self) -> Vec<positional::Pair> {
        let base = f64::from(self.sizes.rope_base as f32);
        let mut angles = positional::rotary_angles(self.sizes.rope_dims(), base);
        for (i, angle) in angles.iter_mut().enumerate() {
            let factor =
                if self.sizes.rope_factors { self.matrix("rope_freqs")[0][i] } else { 1.0 };
            *angle = *angle / self.sizes.stretch() / factor;
        }
        positional::interleaved(&angles)
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

fn times(x: &mut [Row], factor: Option<f64>) {
    x.iter_mut().flatten().for_each(|x| *x *= factor.unwrap_or(1.0));
}

fn add(x: &mut [Row], y: &[Row]) {
    for (x, y) in x.iter_mut().zip(y) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += y;
        }
    }
}
