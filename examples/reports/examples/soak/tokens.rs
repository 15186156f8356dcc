//! A text without end that can be read from any place on.

use dijiang::Performer;
use ndarray::{Array1, Array2, ArrayView1, s};

/// Columns of queries and keys.
pub const HEAD_DIM: usize = 16;

/// Columns of values; the first is all ones.
pub const VALUE_DIM: usize = 4;

/// Different rows; a prime.
const ROWS: usize = 8191;

/// Rows that tokens are made of.
pub struct Tokens {
    rows: [Array2<f32>; 3],
}

impl Tokens {
    pub fn new() -> Result<Self, dijiang::Error> {
        let normal = |columns, seed| -> Result<Array2<f32>, dijiang::Error> {
            Ok(Performer::<f32>::iid(columns, ROWS, seed)?.projection().to_owned())
        };
        // values with a mean, so that an answer is not a small difference of large sums
        let mut values = normal(VALUE_DIM, 3)? + 1.0;
        values.column_mut(0).fill(1.0);
        Ok(Self { rows: [normal(HEAD_DIM, 1)?, normal(HEAD_DIM, 2)?, values] })
    }

    /// The rows of token `t`: each array goes through its rows in another order, which changes
    /// whenever all have been seen.
    pub fn row(&self, which: usize, t: usize) -> ArrayView1<'_, f32> {
        let at = [t, 3 * t + t / ROWS, 7 * t + t / (ROWS * ROWS) + t / ROWS * 5][which];
        self.rows[which].row(at % ROWS)
    }

    /// What lies between the smallest and the largest values, next to `found`.
    pub fn nearest(&self, found: ArrayView1<'_, f32>) -> Array1<f64> {
        let within = |(&x, values): (&f32, ArrayView1<'_, f32>)| {
            let low = values.fold(f32::MAX, |low, &x| low.min(x));
            let high = values.fold(f32::MIN, |high, &x| high.max(x));
            f64::from(x.clamp(low, high))
        };
        found.iter().zip(self.rows[2].columns()).map(within).collect()
    }

    /// Queries, keys and values of the tokens `from..from + n`.
    pub fn read(&self, from: usize, n: usize) -> [Array2<f32>; 3] {
        [0, 1, 2].map(|which| {
            let mut rows = Array2::zeros((n, self.rows[which].ncols()));
            for i in 0..n {
                rows.slice_mut(s![i, ..]).assign(&self.row(which, from + i));
            }
            rows
        })
    }
}
