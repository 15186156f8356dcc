//! Importing the feature map of a trained official DiJiang checkpoint: each layer stores P =
//! C·diag(t), with C the orthonormal DCT-II matrix and t the radii.
//!
//! `cargo run --example import_official_radii`

use dijiang::{Attention, LinearAttention, Mask, OfficialDijiang, Performer};
use ndarray::{Array2, ArrayView2};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};

const NAME: &str = "gpt_neox.layers.0.attention.proj_matrix";

/// Stands for the file of a real checkpoint, which is read with `std::fs::read`.
fn checkpoint(d: usize) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let radii = Performer::<f32>::iid(d, 1, 5)?.projection().row(0).to_owned();
    let c = |row: usize, column: usize| {
        let angle = std::f32::consts::PI * ((2 * column + 1) * row) as f32 / (2 * d) as f32;
        (if row == 0 { 1.0 } else { 2.0 } / d as f32).sqrt() * angle.cos()
    };
    let p = Array2::from_shape_fn((d, d), |(row, column)| c(row, column) * radii[column]);
    let bytes: Vec<u8> = p.iter().flat_map(|x| x.to_le_bytes()).collect();
    let tensor = TensorView::new(Dtype::F32, vec![d, d], &bytes)?;
    Ok(serialize([(NAME, tensor)], None)?)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = checkpoint(64)?;
    let tensors = SafeTensors::deserialize(&file)?;
    let tensor = tensors.tensor(NAME)?;
    let numbers: Vec<f32> =
        tensor.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let p = ArrayView2::from_shape((tensor.shape()[0], tensor.shape()[1]), &numbers)?;
    let d = p.ncols();

    // It is an error if the matrix is not of this form, but was trained away from it.
    let map = OfficialDijiang::from_projection(p)?;
    let difference = (&map.projection().t() - &p).fold(0.0_f32, |m, x| m.max(x.abs()));
    println!("largest difference from the stored matrix: {difference:.1e}");

    // The released model gives raw queries and keys to its map: scale 1.
    let kernel = LinearAttention::new(map).with_scale(1.0);
    let x = Performer::<f32>::iid(d, 20, 1)?.projection().mapv(|x| 0.3 * x);
    let out = kernel.forward(x.view(), x.view(), x.view(), Mask::Causal)?;
    println!("output {:?}, state {} numbers", out.dim(), kernel.stream(d)?.state_floats());
    Ok(())
}
