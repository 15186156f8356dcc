//! Operations of candle for the layers of a model, large enough that little is left to add up:
//! their products are faer's, and weights that are not trained are shared with the model.

mod feed_forward;
mod norm;
mod projection;

pub(super) use feed_forward::FeedForward;
pub(super) use norm::RmsNorm;
pub(super) use projection::{Heads, Projection, Side};

use crate::elementwise::Exponential;
use crate::linear::Linear;
use candle_core::{CpuStorage, Layout, Result, Shape, Storage, Tensor, bail};
use dijiang_candle::Element;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use ndarray::ArcArray2;

/// What a model is trained in: `f32`, and `f64` to check it.
pub trait Real: Element + Exponential + faer::traits::ComplexField {
    /// The weight of a layer, shared where it can be.
    fn weight(of: &Linear) -> ArcArray2<Self>;
}

impl Real for f32 {
    fn weight(of: &Linear) -> ArcArray2<Self> {
        of.shared_weight()
    }
}

impl Real for f64 {
    fn weight(of: &Linear) -> ArcArray2<Self> {
        of.weight().mapv(f64::from).into_shared()
    }
}

/// Rows that a thread takes at once.
const ROWS: usize = 32;

/// Numbers that a thread takes at once.
const PART: usize = 1 << 14;

/// The numbers of a contiguous operand.
fn operand<'a, T: Real>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&T::cpu_storage_as_slice(storage)?[start..end]),
        None => bail!("rows in their order are needed"),
    }
}

/// Runs `run` with the numbers of contiguous tensors.
pub(super) fn read<T: Real, R, const N: usize>(
    tensors: [&Tensor; N],
    run: impl FnOnce([&[T]; N]) -> R,
) -> Result<R> {
    let held = tensors.map(Tensor::storage_and_layout);
    let mut numbers: [&[T]; N] = [&[]; N];
    for (numbers, (storage, layout)) in numbers.iter_mut().zip(&held) {
        let Storage::Cpu(storage) = &**storage else { bail!("a tensor is not on the CPU") };
        *numbers = operand(storage, layout)?;
    }
    Ok(run(numbers))
}

fn result<T: Real>(numbers: Vec<T>, dims: &[usize]) -> (CpuStorage, Shape) {
    (T::to_cpu_storage_owned(numbers), Shape::from(dims))
}

fn tensor_like<T: Real>(numbers: Vec<T>, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(numbers, like.shape(), like.device())
}

/// A matrix by its rows, `[rows, columns]`.
pub(super) fn rows<T: Real>(numbers: &[T], columns: usize) -> MatRef<'_, T> {
    MatRef::from_row_major_slice(numbers, numbers.len() / columns, columns)
}

/// `y ← a·b`, or `y ← y + factor·a·b`, on all threads.
pub(super) fn multiply<T: Real>(y: &mut [T], add: Option<f64>, a: MatRef<'_, T>, b: MatRef<'_, T>) {
    let (accum, factor) = match add {
        Some(factor) => (Accum::Add, T::rounded(factor)),
        None => (Accum::Replace, T::rounded(1.0)),
    };
    let y = MatMut::from_row_major_slice_mut(y, a.nrows(), b.ncols());
    matmul(y, accum, a, b, factor, Par::rayon(0));
}

/// The matrix of a shared weight.
pub(super) fn matrix<T: Real>(weight: &ArcArray2<T>) -> MatRef<'_, T> {
    rows(weight.as_slice().expect("in standard layout"), weight.ncols())
}

fn zeros<T: Real>(count: usize) -> Vec<T> {
    vec![T::default(); count]
}
