//! The matrix products of the layers.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use ndarray::{Array2, ArrayView2};

/// A linear layer without bias, `y = x·W`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[in, out]`
    weight: Array2<f32>,
}

impl Linear {
    /// A layer of this weight, `[in, out]`.
    #[must_use]
    pub fn new(weight: Array2<f32>) -> Self {
        Self { weight: weight.as_standard_layout().into_owned() }
    }

    /// `[in, out]`
    #[must_use]
    pub fn weight(&self) -> ArrayView2<'_, f32> {
        self.weight.view()
    }

    /// `x [n, in]` gives `[n, out]`, on all threads.
    ///
    /// A single row is computed twice. The matrix product adds the terms of a row in one order for
    /// any `n > 1`, in another for `n = 1`; so a token has the same bits alone and in a chunk, and
    /// a third more time is the price.
    #[must_use]
    pub fn apply(&self, x: &Array2<f32>) -> Array2<f32> {
        let (rows, inputs, outputs) = (x.nrows(), self.weight.nrows(), self.weight.ncols());
        if rows == 1 {
            let twice = ndarray::concatenate![ndarray::Axis(0), *x, *x];
            let mut y = self.apply(&twice);
            y.slice_collapse(ndarray::s![..1, ..]);
            return y.as_standard_layout().into_owned();
        }
        let x = x.as_standard_layout();
        let mut y = Array2::zeros((rows, outputs));
        if let (Some(x), Some(w), Some(y)) =
            (x.as_slice(), self.weight.as_slice(), y.as_slice_mut())
        {
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
