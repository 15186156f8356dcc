//! Checkpoints that are damaged, cut off, or no checkpoints: an error, or something that works.

use crate::fuzzed::damage::damaged;
use arbitrary::{Result, Unstructured};
use dijiang::{DijiangBlock, OfficialDijiang, Rotary, Scalar};
use ndarray::Array2;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use std::cell::OnceCell;

/// Reads files of queries, keys and values for the report of approximation errors.
#[path = "../../../examples/reports/examples/approximation_error/files.rs"]
mod heads;

/// A safetensors file, as a layer of a released checkpoint and as one of heads.
pub fn files(bytes: &[u8]) {
    let _ = run(&mut Unstructured::new(bytes));
}

const DIM: usize = 4;
const HEADS: usize = 2;
const HIDDEN: usize = DIM * HEADS;

/// Bytes of the header, about.
const HEADER: usize = 900;

thread_local! {
    static WHOLE: OnceCell<Vec<u8>> = const { OnceCell::new() };
}

/// A checkpoint that can be read.
fn whole() -> Vec<u8> {
    let radii = crate::common::normal::<f64>(1, DIM, 1.0, 8).row(0).to_owned();
    let projection = OfficialDijiang::new(radii).expect("radii").projection().t().to_owned();
    let numbers = crate::common::normal::<f64>(1, 3 * HIDDEN * HIDDEN, 0.3, 1);
    let tensors = [
        ("query_key_value.weight", vec![3 * HIDDEN, HIDDEN]),
        ("query_key_value.bias", vec![3 * HIDDEN]),
        ("dense.weight", vec![HIDDEN, HIDDEN]),
        ("dense.bias", vec![HIDDEN]),
        ("W_G", vec![HIDDEN, HIDDEN]),
        ("group_norm.weight", vec![HIDDEN]),
        ("group_norm.bias", vec![HIDDEN]),
        ("proj_matrix", vec![DIM, DIM]),
    ];
    let bytes = tensors.map(|(name, shape)| {
        let count = shape.iter().product();
        let numbers: Vec<f64> = match name {
            "proj_matrix" => projection.iter().copied().collect(),
            _ => numbers.iter().take(count).copied().collect(),
        };
        let bytes = numbers.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect::<Vec<u8>>();
        (name, shape, bytes)
    });
    let views = bytes.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).expect("as many");
        (format!("l.{name}"), view)
    });
    serialize(views, None).expect("a file")
}

fn run(u: &mut Unstructured<'_>) -> Result<()> {
    let bytes = match u.ratio(1, 8)? {
        true => u.bytes(u.len())?.to_vec(),
        false => damaged(u, WHOLE.with(|all| all.get_or_init(whole).clone()), HEADER)?,
    };
    match heads::tensors(&bytes) {
        Ok(tensors) => _ = heads::contents(&tensors),
        Err(error) => assert!(!error.is_empty()),
    }
    if let Ok(file) = SafeTensors::deserialize(&bytes) {
        block::<f32>(&file);
        block::<f64>(&file);
    }
    Ok(())
}

fn block<T: Scalar>(file: &SafeTensors<'_>) {
    let rotary = Rotary::gpt_neox(DIM, 0.5).expect("a rotation");
    match DijiangBlock::<T>::from_safetensors(file, "l", HEADS, rotary) {
        Ok(block) => {
            let x = Array2::<T>::ones((3, block.hidden()));
            if let Ok(out) = block.forward(x.view()) {
                assert!(out.iter().all(|x| x.is_finite()), "not finite");
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
