//! Tensors with known numbers, and attention written in tensor operations: with products in the
//! place of divisions by a number, whose gradients burn rounds to `f32`.

use burn::tensor::{DType, Device, Tensor, TensorData};

/// A device with gradients.
pub fn device() -> Device {
    Device::flex().autodiff()
}

/// Numbers between −1 and 1 in no order, in `f64`.
pub fn wave<const D: usize>(shape: [usize; D], seed: usize, device: &Device) -> Tensor<D> {
    let count: usize = shape.iter().product();
    let number = |i: usize| ((i * 7919 + seed * 104_729 + 1) as f64 * 0.618).sin();
    let data = TensorData::new((0..count).map(number).collect::<Vec<_>>(), shape);
    Tensor::from_data(data, (device, DType::F64))
}

pub fn numbers<const D: usize>(x: Tensor<D>) -> Vec<f64> {
    x.into_data().convert::<f64>().try_to_vec().unwrap()
}

/// Fails unless all numbers are equal but for `tolerance`, relative to the largest.
#[track_caller]
pub fn assert_close<const D: usize>(found: Tensor<D>, expected: Tensor<D>, tolerance: f64) {
    assert_eq!(found.dims(), expected.dims());
    let (found, expected) = (numbers(found), numbers(expected));
    let largest = expected.iter().fold(1e-300_f64, |max, x| max.max(x.abs()));
    let error = found.iter().zip(&expected).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
    assert!(found.iter().all(|x| x.is_finite()), "not finite");
    assert!(error <= tolerance * largest, "error {error:e} of numbers up to {largest:e}");
}

/// Kv heads as often as query heads use them.
pub fn for_query_heads(x: Tensor<4>, heads: usize) -> Tensor<4> {
    let [batch, kv_heads, n, d] = x.dims();
    let group = heads / kv_heads;
    x.reshape([batch, kv_heads, 1, n, d])
        .expand([batch, kv_heads, group, n, d])
        .reshape([batch, heads, n, d])
}

/// `softmax(q·kᵀ/√d)` before the division.
pub fn exponentials(q: Tensor<4>, k: Tensor<4>) -> Tensor<4> {
    let scale = (q.dims()[3] as f64).sqrt().recip();
    (q.matmul(k.swap_dims(2, 3)) * scale).exp()
}

/// Weighted means of the values, where queries see what `is_seen`.
pub fn means(
    weights: Tensor<4>,
    v: Tensor<4>,
    is_seen: impl Fn(usize, usize, usize) -> bool,
) -> Tensor<4> {
    let [batch, heads, rows, columns] = weights.dims();
    let at = |i: usize| is_seen(i / (rows * columns), i / columns % rows, i % columns);
    let seen: Vec<f64> = (0..batch * rows * columns).map(|i| f64::from(u8::from(at(i)))).collect();
    let seen = Tensor::<4>::from_data(
        TensorData::new(seen, [batch, 1, rows, columns]),
        (&weights.device(), weights.dtype()),
    );
    let weights = weights * seen.expand([batch, heads, rows, columns]);
    let sums = weights.clone().sum_dim(3);
    (weights / sums).matmul(v)
}
