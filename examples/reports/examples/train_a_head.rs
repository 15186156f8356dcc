//! Trains feature maps on a head of a language model, and shows what that changes on another text.
//!
//! ```text
//! cargo run --release --example train_a_head [HEAD]
//! ```
//!
//! Queries and keys come from `data/heads.safetensors`: its calibration split trains, its test split
//! tells. HEAD is L00H4, L11H5, L17H4, L29H2 or M02H3.

use dijiang::{
    Attention, DctFeatures, DistillLoss, DistillOptions, DistillSample, FeatureMap, LearnedFeatures,
    LinearAttention, Mask, SoftmaxAttention, WeightFit, Wpff, distill_with, fidelity, fit_weights,
};
use ndarray::Array2;
use safetensors::SafeTensors;
use std::error::Error;

fn tensor(file: &SafeTensors<'_>, name: &str) -> Result<Array2<f32>, Box<dyn Error>> {
    let tensor = file.tensor(name)?;
    let (numbers, _) = tensor.data().as_chunks::<4>();
    let numbers = numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    Ok(Array2::from_shape_vec((tensor.shape()[0], tensor.shape()[1]), numbers)?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let name = std::env::args().nth(1).unwrap_or_else(|| "L11H5".to_owned());
    let file = SafeTensors::deserialize(include_bytes!("../../../data/heads.safetensors"))?;
    let [q, k, v] = ["q", "k", "v"].map(|x| tensor(&file, &format!("{name}/test/{x}")));
    let [q, k, v] = [q?, k?, v?];
    let [train_q, train_k] = ["q", "k"].map(|x| tensor(&file, &format!("{name}/calibration/{x}")));
    let (train_q, train_k) = (train_q?, train_k?);
    let (d, m) = (q.ncols(), 64);
    let mask = if name == "M02H3" { Mask::Full } else { Mask::Causal };

    let wpff = Wpff::<f32>::new(d, m, 0)?;
    let fit = WeightFit::new().with_mask(mask);
    let calibrated = fit_weights(&wpff, train_q.view(), train_k.view(), fit)
        .and_then(|weights| wpff.clone().with_weights(weights))?;
    let maps: [(&str, Box<dyn FeatureMap<f32>>); 5] = [
        ("weights of wpff", Box::new(wpff)),
        ("weights of wpff, from fitted ones", Box::new(calibrated.clone())),
        ("learned, from fitted wpff", Box::new(LearnedFeatures::from_map(&calibrated)?)),
        (
            "learned, from dct",
            Box::new(LearnedFeatures::from_map(&DctFeatures::new(d, m, 0)?)?),
        ),
        ("Hedgehog", Box::new(LearnedFeatures::hedgehog(d)?)),
    ];
    // the values of the training text are not needed where rows of weights are compared
    let sample = DistillSample { q: train_q.view(), k: train_k.view(), v: train_k.view() };
    let teacher = SoftmaxAttention::<f32>::new(d)?;
    let error = |kernel: &dyn Attention<f32>| {
        fidelity::compare(kernel, q.view(), k.view(), v.view(), mask)
    };
    println!("{name}: {m} features, {} tokens to train on, {} to test", train_q.nrows(), q.nrows());
    println!(
        "{:<34}{:>14}{:>14}{:>12}{:>12}",
        "", "divergence", "after", "test error", "after"
    );
    for (what, map) in maps {
        let kernel = LinearAttention::new(map);
        let options = DistillOptions::new()
            .loss(DistillLoss::CrossEntropy)
            .mask(mask)
            .steps(300)
            .learning_rate(0.02);
        let fitted = distill_with(&kernel, &teacher, &[sample], options, |step| {
            if step.index % 10 == 0 {
                eprint!("\r{what}: step {}, {:.3} nats ", step.index, step.training);
            }
            true
        })?;
        eprint!("\r{:60}\r", "");
        let (first, best) = (fitted.steps[0].validation, fitted.steps[fitted.best].validation);
        let [before, after] = [error(&kernel)?, error(&*fitted.kernel)?];
        println!(
            "{what:<34}{first:>14.3}{best:>14.3}{:>12.3}{:>12.3}",
            before.output_error, after.output_error
        );
    }
    let uniform = error(&LinearAttention::new(DctFeatures::<f32>::new(d, m, 0)?))?.uniform_error;
    println!("{:<34}{:>52.3}", "uniform attention", uniform);
    Ok(())
}
