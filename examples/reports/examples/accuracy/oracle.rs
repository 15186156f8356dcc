//! The formulas, in sums of twice the digits of `f64`.

use crate::text::{HEAD_DIM, Text};
use dijiang::{Error, FeatureMap};
use ndarray::{Array2, ArrayView1};
use reports::lengths::features;

/// A sum and what rounding has left of it (Dekker 1971; Ogita, Rump and Oishi, "Accurate sum and
/// dot product", SIAM J. Sci. Comput. 26, 2005, algorithms 3.1 and 5.3).
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    high: f64,
    low: f64,
}

impl Sum {
    fn add(&mut self, x: f64) {
        let sum = self.high + x;
        let added = sum - self.high;
        self.low += (self.high - (sum - added)) + (x - added);
        self.high = sum;
    }

    fn add_product(&mut self, a: f64, b: f64) {
        let product = a * b;
        self.low += a.mul_add(b, -product);
        self.add(product);
    }

    fn times(&mut self, factor: f64) {
        let product = self.high * factor;
        self.low = self.low * factor + self.high.mul_add(factor, -product);
        self.high = product;
    }

    fn value(self) -> f64 {
        self.high + self.low
    }
}

/// An answer, and the weighted mean of the sizes of the values.
#[derive(Clone, Copy, Debug)]
pub struct Exact {
    answer: f64,
    size: f64,
}

impl Exact {
    /// `numerator / normaliser`
    fn of([value, size, normalizer]: [Sum; 3]) -> Self {
        let normalizer = normalizer.value();
        Self { answer: value.value() / normalizer, size: size.value() / normalizer }
    }

    /// How far `found` is from it, in units of `epsilon`.
    pub fn error(self, found: f64, epsilon: f64) -> f64 {
        (found - self.answer).abs() / (self.size * epsilon)
    }
}

/// The recurrence of linear attention: for each feature the sums of `φ(k)·v`, `φ(k)·|v|`, `φ(k)`.
pub struct Recurrence {
    queries: Array2<f64>,
    keys: Array2<f64>,
    decay: f64,
    sums: Vec<[Sum; 3]>,
}

impl Recurrence {
    /// With the features of all rows of a text.
    pub fn new(map: &dyn FeatureMap<f64>, decay: f64, text: &Text) -> Result<Self, Error> {
        let sums = vec![Default::default(); map.num_features()];
        let scale = 1.0 / (HEAD_DIM as f64).sqrt();
        let of = |keys| features(map, text.rows(usize::from(keys)), scale, keys);
        let [queries, keys] = [of(false)?, of(true)?];
        Ok(Self { queries, keys, decay, sums })
    }

    /// Takes token `t`.
    pub fn step(&mut self, text: &Text, t: usize) {
        let v = text.row(2, t)[0];
        for (sums, &k) in self.sums.iter_mut().zip(self.keys.row(Text::at(1, t))) {
            if self.decay != 1.0 {
                sums.iter_mut().for_each(|sum| sum.times(self.decay));
            }
            sums[0].add_product(k, v);
            sums[1].add_product(k, v.abs());
            sums[2].add(k);
        }
    }

    /// The answer to the query of token `t`.
    pub fn answer(&self, t: usize) -> Exact {
        let mut all = [Sum::default(); 3];
        for (sums, &q) in self.sums.iter().zip(self.queries.row(Text::at(0, t))) {
            for (to, sum) in all.iter_mut().zip(sums) {
                to.add_product(q, sum.high);
                to.low += q * sum.low;
            }
        }
        Exact::of(all)
    }
}

/// Softmax attention of the query of token `n − 1` over the first `n` tokens.
pub fn softmax(text: &Text, n: usize) -> Exact {
    let q = text.row(0, n - 1);
    let scale = 1.0 / (HEAD_DIM as f64).sqrt();
    let score = |k: ArrayView1<'_, f64>| {
        let mut sum = Sum::default();
        q.iter().zip(k).for_each(|(&q, &k)| sum.add_product(q, k));
        sum.value() * scale
    };
    // tokens share keys
    let weights: Vec<f64> = text.rows(1).outer_iter().map(|k| score(k).exp()).collect();
    let mut all = [Sum::default(); 3];
    for t in 0..n {
        let (weight, v) = (weights[Text::at(1, t)], text.row(2, t)[0]);
        all[0].add_product(weight, v);
        all[1].add_product(weight, v.abs());
        all[2].add(weight);
    }
    Exact::of(all)
}
