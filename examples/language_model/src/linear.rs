//! The matrix products of the layers.

use crate::quantised::Quantised;
use clap::ValueEnum;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use ndarray::{Array2, ArrayViewMut1, CowArray, Ix2};

/// How weights are kept in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Weights {
    /// As `f32`: a token has the same bits alone and in a chunk
    #[default]
    F32,
    /// As in the file, where they are quantised: decode steps are fast, in other bits than chunks
    Quantised,
}

/// A linear layer without bias, `y = x·W`.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Weight,
}

/// `[in, out]`
#[derive(Clone, Debug)]
enum Weight {
    F32(Array2<f32>),
    Quantised(Quantised),
}

impl Linear {
    /// A layer of this weight, `[in, out]`.
    #[must_use]
    pub fn new(weight: Array2<f32>) -> Self {
        Self { weight: Weight::F32(weight.as_standard_layout().into_owned()) }
    }

    /// A layer of a weight that stays quantised.
    #[must_use]
    pub fn quantised(weight: Quantised) -> Self {
        Self { weight: Weight::Quantised(weight) }
    }

    /// `[in, out]`; made anew where the weight is quantised.
    #[must_use]
    pub fn weight(&self) -> CowArray<'_, f32, Ix2> {
        match &self.weight {
            Weight::F32(weight) => weight.view().into(),
            Weight::Quantised(weight) => weight.widened().into(),
        }
    }

    /// Copies the weights of one output, `[in]`.
    pub fn copy_output(&self, output: usize, mut to: ArrayViewMut1<'_, f32>) {
        match &self.weight {
            Weight::F32(weight) => to.assign(&weight.column(output)),
            Weight::Quantised(weight) => weight.widen_output(output, to),
        }
    }

    /// Bytes of the weight in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.weight {
            Weight::F32(weight) => weight.len() * size_of::<f32>(),
            Weight::Quantised(weight) => weight.bytes(),
        }
    }

    /// `x [n, in]` gives `[n, out]`, on all threads.
    ///
    /// With `f32` weights a single row is computed twice. The matrix product adds the terms of a
    /// row in one order for any `n > 1`, in another for `n = 1`; so a token has the same bits alone
    /// and in a chunk, and a third more time is the price. With quantised weights that holds for
    /// chunks of up to [`FEW`](crate::quantised::FEW) tokens, and then again for larger ones.
    #[must_use]
    pub fn apply(&self, x: &Array2<f32>) -> Array2<f32> {
        let weight = match &self.weight {
            Weight::F32(weight) => weight,
            Weight::Quantised(weight) => return weight.apply(x),
        };
        let (rows, inputs, outputs) = (x.nrows(), weight.nrows(), weight.ncols());
        if rows == 1 {
            let twice = ndarray::concatenate![ndarray::Axis(0), *x, *x];
            let mut y = self.apply(&twice);
            y.slice_collapse(ndarray::s![..1, ..]);
            return y.as_standard_layout().into_owned();
        }
        let x = x.as_standard_layout();
        let mut y = Array2::zeros((rows, outputs));
        if let (Some(x), Some(w), Some(y)) = (x.as_slice(), weight.as_slice(), y.as_slice_mut()) {
            matmul(
                MatMut::from_row_major_slice_mut(y, rows, outputs),
                Accum::Replace,
                MatRef::from_row_major_slice(x, rows, inputs),
                MatRef::from_row_major_slice(w, inputs, outputs),
                1.0,
                Par::rayon(0),
            );
        }
        y
    }
}
