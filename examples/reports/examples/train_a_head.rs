//! Trains feature maps on a head of a language model, and shows what they do on another text.
//!
//! ```text
//! cargo run --release --example train_a_head [HEAD]
//! ```
//!
//! The heads are those of `data/README.md`: the calibration split trains, the test split tells.

use dijiang::{
    DctFeatures, DistillLoss, DistillOptions, DistillSample, FeatureMap, LearnedFeatures,
    LinearAttention, Mask, SoftmaxAttention, WeightFit, Wpff, distill, fidelity, fit_weights,
};
use ndarray::Array2;
use safetensors::SafeTensors;
use std::error::Error;

/// Queries, keys and values of a split.
fn split(file: &SafeTensors<'_>, place: &str) -> Result<[Array2<f32>; 3], Box<dyn Error>> {
    let read = |which: &str| -> Result<Array2<f32>, Box<dyn Error>> {
        let tensor = file.tensor(&format!("{place}/{which}"))?;
        let numbers = tensor.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        Ok(Array2::from_shape_vec((tensor.shape()[0], tensor.shape()[1]), numbers.collect())?)
    };
    Ok([read("q")?, read("k")?, read("v")?])
}

fn main() -> Result<(), Box<dyn Error>> {
    let head = std::env::args().nth(1).unwrap_or_else(|| "L00H4".to_owned());
    let mask = if head == "M02H3" { Mask::Full } else { Mask::Causal };
    let file = SafeTensors::deserialize(include_bytes!("../../../data/heads.safetensors"))?;
    let [q, k, v] = &split(&file, &format!("{head}/calibration"))?;
    let test = &split(&file, &format!("{head}/test"))?;
    let (d, m) = (q.ncols(), 64);

    let wpff = Wpff::new(d, m, 0)?;
    let fit = fit_weights(&wpff, q.view(), k.view(), WeightFit::new().with_mask(mask))?;
    let fitted = wpff.with_weights(fit)?;
    let maps: [(&str, Box<dyn FeatureMap<f32>>); 4] = [
        ("fitted wpff, its weights alone", Box::new(fitted.clone())),
        ("learned, from fitted wpff", Box::new(LearnedFeatures::from_map(&fitted)?)),
        ("learned, from dct", Box::new(LearnedFeatures::from_map(&DctFeatures::new(d, m, 0)?)?)),
        ("Hedgehog", Box::new(LearnedFeatures::hedgehog(d)?)),
    ];
    let (teacher, mut uniform) = (SoftmaxAttention::new(d)?, 0.0);
    println!("{head}, {} tokens to train on and {} to test", q.nrows(), test[0].nrows());
    println!("divergence from softmax in training, nats a query; output error on the test text");
    println!("{:<32}step 0      50     150     300   before   after", "");
    for (what, map) in maps {
        let kernel = LinearAttention::new(map);
        let only = if what.contains("alone") { "map.weights" } else { "map" };
        let options = DistillOptions::new().loss(DistillLoss::CrossEntropy).mask(mask).only(only);
        let sample = DistillSample { q: q.view(), k: k.view(), v: v.view() };
        let trained = distill(&kernel, &teacher, &[sample], options)?;
        let losses = [0, 50, 150, 300].map(|step| format!("{:8.3}", trained.steps[step].training));
        let [q, k, v] = test.each_ref().map(|x| x.view());
        let before = fidelity::compare(&kernel, q, k, v, mask)?;
        let after = fidelity::compare(&*trained.kernel, q, k, v, mask)?;
        let errors = format!("{:9.3}{:8.3}", before.output_error, after.output_error);
        println!("{what:<30}{}{errors}", losses.concat());
        uniform = after.uniform_error;
    }
    println!("{:<62}{uniform:9.3}{uniform:8.3}", "uniform attention");
    Ok(())
}
