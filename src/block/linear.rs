//! A linear layer.

use crate::kernel;
use crate::scalar::Scalar;
use ndarray::linalg::general_mat_mul;
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2};

/// `x W + b`.
#[derive(Debug)]
pub(crate) struct Linear<T> {
    /// `[inputs, outputs]`, in the order of rows: one token is then a sum of rows.
    weight: Array2<T>,
    bias: Option<Array1<T>>,
}

impl<T: Scalar> Linear<T> {
    pub(crate) fn new(weight: ArrayView2<'_, T>, bias: Option<Array1<T>>) -> Self {
        Self { weight: weight.as_standard_layout().into_owned(), bias }
    }

    /// `[in, out]`.
    pub(crate) fn weight(&self) -> ArrayView2<'_, T> {
        self.weight.view()
    }

    /// `[out]`, zeros if there is none.
    pub(crate) fn bias(&self) -> Array1<T> {
        self.bias.clone().unwrap_or_else(|| Array1::zeros(self.weight.ncols()))
    }

    pub(crate) fn apply(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        let mut out = Array2::zeros((x.nrows(), self.weight.ncols()));
        self.apply_into(x, out.view_mut());
        out
    }

    pub(crate) fn apply_into(&self, x: ArrayView2<'_, T>, mut out: ArrayViewMut2<'_, T>) {
        match &self.bias {
            Some(bias) => out.assign(bias),
            None => out.fill(T::zero()),
        }
        if x.nrows() == 1
            && let (Some(x), Some(weight), Some(out)) =
                (x.as_slice(), self.weight.as_slice(), out.as_slice_mut())
        {
            kernel::add_row_times_matrix(x, weight, self.weight.ncols(), out);
        } else {
            general_mat_mul(T::one(), &x, &self.weight, T::one(), &mut out);
        }
    }
}
