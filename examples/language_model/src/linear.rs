//! The matrix products of the layers.

use crate::quantised::{FEW, Quantised};
use clap::ValueEnum;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use ndarray::{ArcArray2, Array2, ArrayViewMut1, CowArray, Ix2};
use std::sync::Arc;

/// How weights are kept in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Weights {
    /// As `f32`: a token has the same bits alone and in a chunk
    #[default]
    F32,
    /// As in the file, where they are quantised: decode steps are fast, in other bits than chunks
    Quantised,
}

/// A linear layer without bias, `y = x·W`, or `y = x·(W + A·B)`. Clones share the weight.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Weight,
    /// `A [in, r]` and `B [r, out]`, beside a weight that stays quantised.
    low_rank: Option<Arc<[Array2<f32>; 2]>>,
}

/// `[in, out]`
#[derive(Clone, Debug)]
enum Weight {
    F32(ArcArray2<f32>),
    Quantised(Arc<Quantised>),
}

impl Linear {
    /// A layer of this weight, `[in, out]`.
    #[must_use]
    pub fn new(weight: Array2<f32>) -> Self {
        let weight = weight.as_standard_layout().into_owned().into_shared();
        Self { weight: Weight::F32(weight), low_rank: None }
    }

    /// A layer of a weight that stays quantised.
    #[must_use]
    pub fn quantised(weight: Quantised) -> Self {
        Self { weight: Weight::Quantised(Arc::new(weight)), low_rank: None }
    }

    /// The layer of `W + A·B` (Hu et al., arXiv 2106.09685), for `A [in, r]` and `B [r, out]`:
    /// where the weight is quantised the two stay beside it.
    #[must_use]
    pub fn with_low_rank(&self, down: Array2<f32>, up: Array2<f32>) -> Self {
        match &self.weight {
            Weight::F32(weight) => Self::new(down.dot(&up) + weight),
            weight => Self { weight: weight.clone(), low_rank: Some(Arc::new([down, up])) },
        }
    }

    /// Inputs and outputs.
    #[must_use]
    pub fn dim(&self) -> (usize, usize) {
        match &self.weight {
            Weight::F32(weight) => weight.dim(),
            Weight::Quantised(weight) => weight.dim(),
        }
    }

    /// `[in, out]`; made anew where the weight is quantised.
    #[must_use]
    pub fn weight(&self) -> CowArray<'_, f32, Ix2> {
        let quantised = match &self.weight {
            Weight::F32(weight) => return weight.view().into(),
            Weight::Quantised(weight) => weight.widened(),
        };
        match self.low_rank.as_deref() {
            Some([down, up]) => (quantised + down.dot(up)).into(),
            None => quantised.into(),
        }
    }

    /// The same, shared where it is there.
    #[must_use]
    pub fn shared_weight(&self) -> ArcArray2<f32> {
        match &self.weight {
            Weight::F32(weight) => weight.clone(),
            Weight::Quantised(_) => self.weight().into_owned().into_shared(),
        }
    }

    /// Copies the weights of one output, `[in]`, of a layer without factors beside its weight.
    pub fn copy_output(&self, output: usize, mut to: ArrayViewMut1<'_, f32>) {
        match &self.weight {
            Weight::F32(weight) => to.assign(&weight.column(output)),
            Weight::Quantised(weight) => weight.widen_output(output, to),
        }
    }

    /// Bytes of the weight in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let factors = self.low_rank.iter().flat_map(|both| both.iter()).map(Array2::len);
        let weight = match &self.weight {
            Weight::F32(weight) => weight.len() * size_of::<f32>(),
            Weight::Quantised(weight) => weight.bytes(),
        };
        weight + factors.sum::<usize>() * size_of::<f32>()
    }

    /// `x [n, in]` gives `[n, out]`, on all threads.
    ///
    /// With `f32` weights a single row is computed twice. The matrix product adds the terms of a
    /// row in one order for any `n > 1`, in another for `n = 1`; so a token has the same bits alone
    /// and in a chunk, and a third more time is the price. With quantised weights that holds for
    /// chunks of up to [`FEW`] tokens, and then again for larger ones.
    #[must_use]
    pub fn apply(&self, x: &Array2<f32>) -> Array2<f32> {
        let weight = match &self.weight {
            Weight::F32(weight) => weight,
            Weight::Quantised(weight) => {
                let mut y = weight.apply(x);
                match self.low_rank.as_deref() {
                    // a token has the same bits alone and among few
                    Some([down, up]) if x.nrows() <= FEW => {
                        for (mut y, x) in y.outer_iter_mut().zip(x.outer_iter()) {
                            y += &x.dot(down).dot(up);
                        }
                    }
                    Some([down, up]) => y += &x.dot(down).dot(up),
                    None => {}
                }
                return y;
            }
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
