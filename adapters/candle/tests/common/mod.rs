//! What the tests of tensors share.

use candle_core::{DType, Device, Result, Tensor, Var};

/// Columns of queries and keys.
pub const D_HEAD: usize = 6;

/// Numbers between −1.3 and 1.3, the same at every call.
pub fn normal(shape: (usize, usize, usize, usize), seed: usize) -> Result<Var> {
    let (b, h, n, d) = shape;
    let number = |i: usize| ((i * 7919 + seed * 104_729 + 17) as f64 * 0.618_034).sin() * 1.3;
    let numbers: Vec<f64> = (0..b * h * n * d).map(number).collect();
    Var::from_tensor(&Tensor::from_vec(numbers, shape, &Device::Cpu)?)
}

/// All numbers of a tensor.
pub fn numbers(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Fails unless `|a − b| ≤ tolerance·max|b|` everywhere.
#[track_caller]
pub fn assert_close(what: &str, a: &Tensor, b: &Tensor, tolerance: f64) {
    assert_eq!(a.dims(), b.dims(), "{what}");
    let (a, b) = (numbers(a), numbers(b));
    let size = b.iter().fold(1e-3, |m: f64, x| m.max(x.abs()));
    let error = a.iter().zip(&b).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs())) / size;
    assert!(error <= tolerance, "{what}: {error:.1e}");
}
