//! What the benchmarks of this repository time and nobody else should use: pieces of the inner
//! loops, without the rest.

use crate::features::FeatureMap;
use crate::features::columns::Columns;
use crate::features::side::Side;
use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::loops::products::{Epilogue, Matrix};
use crate::kernel::{self, chunk_len};
use crate::scalar::Scalar;
use crate::views;
use ndarray::{Array2, ArrayView2};

/// A matrix product of the crate's own, in `f32`.
#[derive(Debug)]
pub struct Product {
    size: [usize; 3],
    by_rows: bool,
    a: Buffer<f32>,
    b: Buffer<f32>,
    c: Buffer<f32>,
}

impl Product {
    /// `[m, k]·[k, n]`, n a multiple of 16.
    #[must_use]
    pub fn new(m: usize, n: usize, k: usize) -> Self {
        let numbers = |len: usize| {
            let mut buffer = Buffer::zeros(len);
            buffer.iter_mut().zip(0_u16..).for_each(|(x, i)| *x = f32::from(i % 7) - 3.0);
            buffer
        };
        let [a, b, c] = [m * k, k * n, m * n].map(numbers);
        Self { size: [m, n, k], by_rows: false, a, b, c }
    }

    /// The same with A by its rows.
    #[must_use]
    pub fn by_rows(self) -> Self {
        Self { by_rows: true, ..self }
    }

    /// Computes it.
    pub fn run(&mut self) {
        let Self { size: [m, n, k], by_rows, a, b, c } = self;
        let (m, n, k) = (*m, *n, *k);
        kernel::loops::products::Product {
            m,
            n,
            k,
            a: if *by_rows { Matrix::rows(a, k) } else { Matrix::columns(a, m) },
            b,
            ldb: n,
            c,
            ldc: n,
            into: Epilogue::Set,
        }
        .run();
    }
}

/// A map of this crate on the layout of the inner loops, tokens as columns.
#[derive(Debug)]
pub struct Map<T> {
    features: Box<dyn FeatureMap<T>>,
    x: Array2<T>,
    vectors: Buffer<T>,
    squares: Buffer<T>,
    values: Buffer<T>,
    log_scale: Buffer<T>,
    scratch: [Buffer<T>; 2],
}

impl<T: Scalar> Map<T> {
    /// The rows of `x` will be mapped.
    #[must_use]
    pub fn new(map: Box<dyn FeatureMap<T>>, x: ArrayView2<'_, T>) -> Self {
        Self {
            vectors: Buffer::zeros(map.head_dim() * chunk_len::<T>()),
            squares: Buffer::zeros(chunk_len::<T>()),
            values: Buffer::zeros(padded::<T>(map.num_features()) * chunk_len::<T>()),
            log_scale: Buffer::zeros(chunk_len::<T>()),
            scratch: [Buffer::new(), Buffer::new()],
            x: x.to_owned(),
            features: map,
        }
    }

    /// Maps every row, chunk by chunk; returns whether all were in range.
    pub fn run(&mut self) -> bool {
        let Self { features, x, vectors, squares, values, log_scale, scratch } = self;
        let Some(map) = features.column_map(Side::Query) else { return false };
        (0..x.nrows()).step_by(chunk_len::<T>()).all(|start| {
            let rows = views::rows(x.view(), start..x.nrows().min(start + chunk_len::<T>()));
            views::to_columns(rows, T::one(), squares, vectors);
            let (width, tokens) = (chunk_len::<T>(), rows.nrows());
            let mut columns = Columns { x: vectors, squares, width, tokens, values, log_scale };
            map.map_columns(&mut columns, scratch).is_ok()
        })
    }
}
