//! Numbers of tensors, read where they lie.

use candle_core::{CpuStorage, DType, Device, Layout, Result, Tensor, WithDType, bail};
use dijiang::ndarray::{ArrayView4, ArrayViewMut4};
use dijiang::{RawTensor, Scalar};
use half::{bf16, f16};
use std::borrow::Cow;

/// The numbers that a layer computes with: `f32`, which also takes `f16` and `bf16` tensors, and
/// `f64`.
pub trait Element: Scalar + WithDType {}

impl Element for f32 {}
impl Element for f64 {}

/// What the core found, as candle's error: the same words.
pub(crate) fn refused(error: dijiang::Error) -> candle_core::Error {
    candle_core::Error::wrap(error)
}

/// Fails unless a layer of `T` can take tensors of this type.
pub(crate) fn check_dtype<T: Element>(which: &str, dtype: DType) -> Result<()> {
    let is_half = matches!(dtype, DType::F16 | DType::BF16);
    if dtype == T::DTYPE || is_half && T::DTYPE == DType::F32 {
        return Ok(());
    }
    let halves = if T::DTYPE == DType::F32 { ", F16 or BF16" } else { "" };
    bail!(
        "`{which}` is {dtype:?} where a layer of {} takes {:?}{halves}: convert it with `to_dtype`",
        T::NAME,
        T::DTYPE
    )
}

/// Fails unless a tensor is where the kernels run.
pub(crate) fn check_device(which: &str, tensor: &Tensor) -> Result<()> {
    if tensor.device().is_cpu() {
        return Ok(());
    }
    bail!(
        "`{which}` is on {:?}, and the kernels of dijiang run on the CPU: move it there with \
         `to_device(&Device::Cpu)`, or let `via_host` do so",
        tensor.device().location()
    )
}

/// A tensor of four axes in the memory of candle.
#[derive(Clone)]
pub(crate) struct Operand<'a> {
    pub(crate) storage: &'a CpuStorage,
    pub(crate) layout: Layout,
}

impl<'a> Operand<'a> {
    pub(crate) fn new(storage: &'a CpuStorage, layout: &Layout) -> Self {
        Self { storage, layout: layout.clone() }
    }

    /// A part of a flat tensor.
    pub(crate) fn part(
        storage: &'a CpuStorage,
        flat: &Layout,
        at: usize,
        dims: [usize; 4],
    ) -> Self {
        let start = flat.start_offset() + at;
        Self { storage, layout: Layout::contiguous_with_offset(&dims[..], start) }
    }

    pub(crate) fn dims(&self) -> Result<[usize; 4]> {
        Ok(self.layout.shape().dims4()?.into())
    }

    /// Some of the sequences.
    pub(crate) fn sequences(&self, start: usize, len: usize) -> Result<Self> {
        Ok(Self { storage: self.storage, layout: self.layout.narrow(0, start, len)? })
    }

    /// Its numbers: those of candle, or wider ones.
    pub(crate) fn read<T: Element>(&self) -> Result<Numbers<'a, T>> {
        let (start, shape) = (self.layout.start_offset(), self.dims()?);
        let strides = self.layout.stride();
        Ok(match self.storage {
            CpuStorage::F16(data) => Numbers::widened(data, &self.layout, shape, f16::to_f64),
            CpuStorage::BF16(data) => Numbers::widened(data, &self.layout, shape, bf16::to_f64),
            storage => Numbers {
                data: Cow::Borrowed(
                    T::cpu_storage_as_slice(storage)?.get(start..).unwrap_or_default(),
                ),
                shape,
                strides: [strides[0], strides[1], strides[2], strides[3]],
            },
        })
    }
}

/// Numbers with a shape and strides.
pub(crate) struct Numbers<'a, T: Clone> {
    data: Cow<'a, [T]>,
    shape: [usize; 4],
    strides: [usize; 4],
}

impl<T: Element> Numbers<'_, T> {
    fn widened<H: Copy>(
        data: &[H],
        layout: &Layout,
        shape: [usize; 4],
        wide: impl Fn(H) -> f64,
    ) -> Self {
        let [batch, heads, n, columns] = shape;
        let (start, strides) = (layout.start_offset(), layout.stride());
        let mut numbers = Vec::with_capacity(batch * heads * n * columns);
        for b in 0..batch {
            for h in 0..heads {
                for t in 0..n {
                    let row = start + b * strides[0] + h * strides[1] + t * strides[2];
                    let at = |c: usize| data[row + c * strides[3]];
                    numbers.extend((0..columns).map(|c| <T as Scalar>::from_f64(wide(at(c)))));
                }
            }
        }
        let strides = [heads * n * columns, n * columns, columns, 1];
        Self { data: Cow::Owned(numbers), shape, strides }
    }

    /// In the order of the axes.
    pub(crate) fn to_vec(&self) -> Result<Vec<T>> {
        Ok(self.view()?.iter().copied().collect())
    }

    pub(crate) fn view(&self) -> Result<ArrayView4<'_, T>> {
        let raw = RawTensor::new(&self.data, self.shape, self.strides).map_err(refused)?;
        Ok(raw.view())
    }

    pub(crate) fn shape(&self) -> [usize; 4] {
        self.shape
    }
}

/// Contiguous numbers to write to.
pub(crate) fn view_mut<T>(numbers: &mut [T], dims: [usize; 4]) -> Result<ArrayViewMut4<'_, T>> {
    ArrayViewMut4::from_shape(dims, numbers).map_err(candle_core::Error::wrap)
}

/// Numbers as candle keeps them, in a narrower type if need be.
pub(crate) fn storage_of<T: Element>(numbers: Vec<T>, dtype: DType) -> CpuStorage {
    let wide = |x: T| x.as_f64();
    match dtype {
        DType::F16 => {
            CpuStorage::F16(numbers.into_iter().map(|x| f16::from_f64(wide(x))).collect())
        }
        DType::BF16 => {
            CpuStorage::BF16(numbers.into_iter().map(|x| bf16::from_f64(wide(x))).collect())
        }
        _ => T::to_cpu_storage_owned(numbers),
    }
}

/// The same as a tensor without history.
pub(crate) fn tensor_of<T: Element>(
    numbers: Vec<T>,
    dims: &[usize],
    dtype: DType,
) -> Result<Tensor> {
    Tensor::from_vec(numbers, dims, &Device::Cpu)?.to_dtype(dtype)
}
