//! Keys and values as an exact softmax reads them: numbers of the kernel, or packed.

use crate::kernel::buffer::Buffer;
use crate::memory::packed::Packed;
use crate::scalar::Scalar;
use crate::views;
use ndarray::ArrayView2;

/// The keys and values of some tokens.
#[derive(Clone, Copy, Debug)]
pub(crate) enum KeyValues<'a, T> {
    /// `k [n, d]` and `v [n, d_v]`.
    Wide(ArrayView2<'a, T>, ArrayView2<'a, T>),
    /// The first so many tokens.
    Packed(&'a Packed, usize),
}

impl<'a, T: Scalar> KeyValues<'a, T> {
    pub(crate) fn tokens(&self) -> usize {
        match self {
            Self::Wide(k, _) => k.nrows(),
            Self::Packed(_, tokens) => *tokens,
        }
    }

    pub(crate) fn value_dim(&self) -> usize {
        match self {
            Self::Wide(_, v) => v.ncols(),
            Self::Packed(packed, _) => packed.dims()[1],
        }
    }

    /// Some tokens of one tile as rows, contiguous, those of values followed by zeros up to
    /// `stride` numbers: where they are if they lie so, else copied.
    pub(crate) fn tile<'t>(
        self,
        first: usize,
        count: usize,
        stride: usize,
        [keys, values]: [&'t mut Buffer<T>; 2],
    ) -> [&'t [T]; 2]
    where
        'a: 't,
    {
        match self {
            Self::Wide(k, v) => [
                contiguous(k, first, count, k.ncols(), keys),
                contiguous(v, first, count, stride, values),
            ],
            Self::Packed(packed, _) => {
                keys.resize(count * packed.dims()[0]);
                values.resize(count * stride);
                packed.read(first..first + count, stride, keys, values);
                [keys, values]
            }
        }
    }
}

/// Some rows, contiguous, each followed by zeros up to `stride` numbers: where they are if they lie
/// so, else copied.
pub(crate) fn contiguous<'a: 't, 't, T: Scalar>(
    x: ArrayView2<'a, T>,
    first: usize,
    count: usize,
    stride: usize,
    copy: &'t mut Buffer<T>,
) -> &'t [T] {
    if x.ncols() == stride
        && let Some(all) = x.to_slice()
    {
        return &all[first * stride..(first + count) * stride];
    }
    copy.resize(count * stride);
    for (row, copy) in
        views::rows(x, first..first + count).outer_iter().zip(copy.chunks_exact_mut(stride))
    {
        let (copy, padding) = copy.split_at_mut(row.len());
        copy.iter_mut().zip(row).for_each(|(copy, &x)| *copy = x);
        padding.fill(T::zero());
    }
    copy
}
