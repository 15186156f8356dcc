//! Writing your own feature map: two methods say its sizes, one maps rows. Streams, chunks, log
//! scales and errors come with `LinearAttention`.
//!
//! `cargo run --example custom_feature_map`

use dijiang::{Attention, Error, FeatureMap, LinearAttention, Mask, Performer, fidelity};
use ndarray::{ArrayView2, ArrayViewMut1, ArrayViewMut2};

/// φ(x) = (e^{x_1}, .., e^{x_d}, e^{−x_1}, .., e^{−x_d}): the products sum up 2·cosh(x_i + y_i).
#[derive(Debug)]
struct BothSigns {
    head_dim: usize,
}

impl FeatureMap<f32> for BothSigns {
    fn head_dim(&self) -> usize {
        self.head_dim
    }

    fn num_features(&self) -> usize {
        2 * self.head_dim
    }

    fn map_queries(
        &self,
        x: ArrayView2<'_, f32>,
        mut values: ArrayViewMut2<'_, f32>,
        mut log_scale: ArrayViewMut1<'_, f32>,
    ) -> Result<(), Error> {
        for ((x, mut values), log_scale) in
            x.outer_iter().zip(values.outer_iter_mut()).zip(&mut log_scale)
        {
            // Take the largest exponent out of each row: then nothing overflows, whatever the norm.
            // A row may depend on itself only, or the future would leak into the past.
            let largest = x.fold(0.0_f32, |m, a| m.max(a.abs()));
            for (i, &a) in x.iter().enumerate() {
                values[i] = (a - largest).exp();
                values[self.head_dim + i] = (-a - largest).exp();
            }
            *log_scale = largest;
        }
        Ok(())
    }
}

fn main() -> Result<(), Error> {
    let random = |seed| Performer::<f32>::iid(16, 200, seed).map(|map| map.projection().to_owned());
    let (q, k, v) = (random(1)?, random(2)?, random(3)?);

    let kernels: [(&str, Box<dyn Attention<f32>>); 2] = [
        ("both signs", Box::new(LinearAttention::new(BothSigns { head_dim: 16 }))),
        ("FAVOR+", Box::new(LinearAttention::new(Performer::new(16, 32, 0)?))),
    ];
    for (name, kernel) in &kernels {
        let report = fidelity::compare(&**kernel, q.view(), k.view(), v.view(), Mask::Causal)?;
        println!(
            "{name:<12}error {:.3}, uniform attention {:.3}",
            report.output_error, report.uniform_error
        );
    }
    Ok(())
}
