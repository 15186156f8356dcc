//! Writing your own kernel: softmax attention with linear biases (ALiBi, Press et al., arXiv
//! 2108.12409) as a `Memory` of three methods. `MemoryAttention` makes it a kernel, with a forward
//! pass and a stream.
//!
//! `cargo run --example custom_kernel`

use dijiang::{
    Attention, Error, Mask, Memory, MemoryAttention, Partial, Performer, Stream, fidelity,
};
use ndarray::{Array1, Array2, ArrayView2, s};

/// All keys and values, read with the weights `exp(q_t·k_j/√d − slope·(t − j))`.
#[derive(Clone, Debug)]
struct Alibi {
    slope: f32,
    tokens: Vec<(Array1<f32>, Array1<f32>)>,
}

impl Memory<f32> for Alibi {
    fn absorb(&mut self, k: ArrayView2<'_, f32>, v: ArrayView2<'_, f32>) -> Result<(), Error> {
        let tokens = k.outer_iter().zip(v.outer_iter());
        self.tokens.extend(tokens.map(|(k, v)| (k.to_owned(), v.to_owned())));
        Ok(())
    }

    fn read(&self, q: ArrayView2<'_, f32>, answer: &mut Partial<f32>) -> Result<(), Error> {
        let scale = (q.ncols() as f32).sqrt().recip();
        // The query is that of the newest token, so the age of a token is its distance.
        for (age, (k, v)) in self.tokens.iter().rev().enumerate() {
            // Each token is a partial sum of its own: its value with weight 1, at the log scale of
            // its score. Merging keeps to the larger log scale, so that nothing overflows.
            let log_weights = q.dot(k) * scale - self.slope * age as f32;
            let values = Array2::from_shape_fn((q.nrows(), v.len()), |(_, i)| v[i]);
            let ones = Array1::ones(q.nrows());
            answer.merge(&Partial::from_parts(values, ones, log_weights)?)?;
        }
        Ok(())
    }

    fn state_floats(&self) -> usize {
        self.tokens.iter().map(|(k, v)| k.len() + v.len()).sum()
    }
}

fn main() -> Result<(), Error> {
    let random = |seed| Performer::<f32>::iid(16, 100, seed).map(|map| map.projection().to_owned());
    let (q, k, v) = (random(1)?, random(2)?, random(3)?);

    println!("slope    difference from softmax    uniform attention");
    for slope in [0.0, 0.01, 0.1, 1.0] {
        let kernel = MemoryAttention::new(16, move |_| Ok(Alibi { slope, tokens: Vec::new() }))?;
        let report = fidelity::compare(&kernel, q.view(), k.view(), v.view(), Mask::Causal)?;
        println!("{slope:<9}{:<27.3}{:.3}", report.output_error, report.uniform_error);

        // Token by token it is the same.
        let whole = kernel.forward(q.view(), k.view(), v.view(), Mask::Causal)?;
        let mut stream: Box<dyn Stream<f32>> = kernel.stream(16)?;
        let mut out = Array2::zeros((1, 16));
        for t in 0..q.nrows() {
            let row = s![t..=t, ..];
            stream.extend(q.slice(row), k.slice(row), v.slice(row), out.view_mut())?;
            assert_eq!(out, whole.slice(row));
        }
    }
    Ok(())
}
