//! One kernel against exact softmax attention: when a feature map works, and when it does not.
//!
//! `cargo run --example quick_start`

use dijiang::{Attention, DctFeatures, LinearAttention, Mask, Performer, Radii, fidelity};
use ndarray::Array2;

/// Standard normal numbers times `size`.
fn random(tokens: usize, dim: usize, size: f32, seed: u64) -> Result<Array2<f32>, dijiang::Error> {
    Ok(Performer::<f32>::iid(dim, tokens, seed)?.projection().mapv(|x| x * size))
}

fn main() -> Result<(), dijiang::Error> {
    let (tokens, head_dim) = (256, 64);

    // A feature map is built once from a seed and never changes. This one has two features per
    // dimension.
    let map = DctFeatures::<f32>::new(head_dim, 2 * head_dim, 7)?.with_radii(Radii::Antithetic)?;
    let kernel = LinearAttention::new(map);

    println!("|x̂|²    output error    uniform attention    verdict");
    for squared_norm in [0.25_f32, 1.0, 4.0, 16.0] {
        // Kernels take raw q and k and apply the scale 1/√d themselves: x̂ = d^(−1/4)·x, |x̂|² =
        // √d·size².
        let size = (squared_norm / (head_dim as f32).sqrt()).sqrt();
        let (q, k) = (random(tokens, head_dim, size, 1)?, random(tokens, head_dim, size, 2)?);
        let v = random(tokens, head_dim, 1.0, 3)?;

        let out = kernel.forward(q.view(), k.view(), v.view(), Mask::Full)?;
        assert_eq!(out.dim(), (tokens, head_dim));

        // Never look at an error alone: uniform attention does not look at q and k at all.
        let report = fidelity::compare(&kernel, q.view(), k.view(), v.view(), Mask::Full)?;
        let verdict = if report.output_error < 0.5 * report.uniform_error {
            "approximates softmax"
        } else if report.output_error < report.uniform_error {
            "hardly better than not looking"
        } else {
            "worse than not looking: use SoftmaxAttention"
        };
        println!(
            "{squared_norm:<8}{:<16.3}{:<21.3}{verdict}",
            report.output_error, report.uniform_error
        );
    }
    Ok(())
}
