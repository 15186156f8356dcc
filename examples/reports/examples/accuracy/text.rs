//! Texts without end.

use dijiang::{Error, Performer, Scalar};
use ndarray::{Array2, ArrayView1, s};

/// Columns of queries and keys.
pub const HEAD_DIM: usize = 8;

/// Different rows; a prime.
const ROWS: usize = 8191;

/// What tokens are like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Normal queries and keys, and values with a mean.
    Normal,
    /// One key and one value again and again.
    Constant,
    /// Values as of a Cauchy distribution, which has no mean, and keys of very different sizes.
    Heavy,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::Normal, Self::Constant, Self::Heavy];

    pub fn name(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Constant => "constant",
            Self::Heavy => "heavy tails",
        }
    }
}

/// Rows that tokens are made of, exact in either type of numbers.
pub struct Text {
    rows: [Array2<f64>; 3],
}

impl Text {
    pub fn new(kind: Kind) -> Result<Self, Error> {
        let normal = |columns, seed| -> Result<Array2<f64>, Error> {
            let rows = Performer::<f32>::iid(columns, ROWS, seed)?;
            Ok(rows.projection().mapv(f64::from))
        };
        let (q, mut k, mut v) = (normal(HEAD_DIM, 1)?, normal(HEAD_DIM, 2)?, normal(1, 3)?);
        match kind {
            Kind::Normal => v += 1.0,
            Kind::Constant => {
                let one = k.row(0).to_owned();
                k.outer_iter_mut().for_each(|mut row| row.assign(&one));
                v.fill(0.7);
            }
            Kind::Heavy => {
                v /= &normal(1, 4)?;
                let sizes = normal(1, 5)?;
                k.outer_iter_mut().zip(&sizes).for_each(|(mut row, size)| row *= *size);
            }
        }
        let exact = |x: f64| f64::from(x as f32);
        Ok(Self { rows: [q, k.mapv(exact), v.mapv(exact)] })
    }

    /// The different rows of queries, keys or values.
    pub fn rows(&self, which: usize) -> &Array2<f64> {
        &self.rows[which]
    }

    /// Which of them token `t` has: each array goes through its rows in another order, which
    /// changes whenever all have been seen.
    pub fn at(which: usize, t: usize) -> usize {
        [t, 3 * t + t / ROWS, 7 * t + t / (ROWS * ROWS) + t / ROWS * 5][which] % ROWS
    }

    pub fn row(&self, which: usize, t: usize) -> ArrayView1<'_, f64> {
        self.rows[which].row(Self::at(which, t))
    }

    /// Queries, keys or values of the tokens `from..from + n`.
    pub fn read<T: Scalar>(&self, which: usize, from: usize, n: usize) -> Array2<T> {
        let mut rows = Array2::zeros((n, self.rows[which].ncols()));
        for i in 0..n {
            let row = self.row(which, from + i);
            rows.slice_mut(s![i, ..]).zip_mut_with(&row, |to, &x| *to = T::from_f64(x));
        }
        rows
    }
}
