//! What one softmax over rows hands back, each row seen by a run of the queries of a block: exact
//! tokens, and means of tokens that change from step to step.

use crate::error::Error;
use crate::kernel;
use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::gradients::{affine_columns, dot_columns};
use crate::kernel::loops::products::{Epilogue, Matrix, Product};
use crate::memory::partial::divisor;
use crate::memory::scoring::Scoring;
use crate::memory::softmax_gradient::{Units, add, in_unit};
use crate::memory::unit::product;
use crate::scalar::Scalar;
use crate::views::to_columns;
use core::f64::consts::{LN_2, LOG2_E};
use core::ops::Range;
use ndarray::{ArrayView1, ArrayView2, ArrayViewMut2};

/// Keys and values in their units, the gradients by them, and which queries see them.
#[derive(Debug)]
pub(crate) struct SeenRows<T> {
    dims: [usize; 2],
    /// Rows there are, as padded vectors.
    len: usize,
    keys: Buffer<T>,
    values: Buffer<T>,
    d_keys: Buffer<T>,
    d_values: Buffer<T>,
    /// Added to scores to base 2: log₂ of what a row counts.
    bias: Buffer<T>,
    /// The queries of the block that see a row.
    pub(crate) seen: Vec<Range<usize>>,
}

impl<T: Scalar> SeenRows<T> {
    pub(crate) fn new() -> Self {
        Self {
            dims: [0; 2],
            len: 0,
            keys: Buffer::new(),
            values: Buffer::new(),
            d_keys: Buffer::new(),
            d_values: Buffer::new(),
            bias: Buffer::new(),
            seen: Vec::new(),
        }
    }

    /// Begins with none, for keys and values of so many numbers, and at most `most` rows.
    pub(crate) fn begin(&mut self, dims: [usize; 2], most: usize) {
        (self.dims, self.len) = (dims, 0);
        let [stride, value_stride] = dims.map(padded::<T>);
        self.keys.resize(most * stride);
        self.values.resize(most * value_stride);
        self.bias.resize(most);
        self.seen.clear();
    }

    fn strides(&self) -> [usize; 2] {
        self.dims.map(padded::<T>)
    }

    /// Adds a row for a token, whose key and value are multiplied with the factors.
    pub(crate) fn push(
        &mut self,
        [key, value]: [ArrayView1<'_, T>; 2],
        factors: [T; 2],
        seen: Range<usize>,
    ) -> usize {
        let ([stride, value_stride], row) = (self.strides(), self.len);
        copy_row(key, factors[0], &mut self.keys[row * stride..][..stride]);
        copy_row(value, factors[1], &mut self.values[row * value_stride..][..value_stride]);
        self.bias[row] = T::zero();
        self.end_row(seen)
    }

    fn end_row(&mut self, seen: Range<usize>) -> usize {
        self.seen.push(seen);
        self.len += 1;
        self.len - 1
    }

    /// Adds a row as [`row`](Self::row) gives them, that counts `count`.
    pub(crate) fn push_row(&mut self, rows: [&[T]; 2], count: f64, seen: Range<usize>) -> usize {
        let ([stride, value_stride], row) = (self.strides(), self.len);
        self.keys[row * stride..][..stride].copy_from_slice(rows[0]);
        self.values[row * value_stride..][..value_stride].copy_from_slice(rows[1]);
        self.bias[row] = T::from_f64(libm::log2(count));
        self.end_row(seen)
    }

    /// Adds the mean `x_i + share·(x_j − x_i)` of two rows, that counts `count`.
    pub(crate) fn push_mean(
        &mut self,
        pair: [usize; 2],
        share: T,
        count: f64,
        seen: Range<usize>,
    ) -> usize {
        let (strides, row) = (self.strides(), self.len);
        for (all, stride) in [&mut self.keys, &mut self.values].into_iter().zip(strides) {
            let (rows, to) = all.split_at_mut(row * stride);
            let [x, y] = pair.map(|i| &rows[i * stride..][..stride]);
            for ((to, &x), &y) in to.iter_mut().zip(x).zip(y) {
                let difference = y - x;
                *to = if difference.is_finite() {
                    x + share * difference
                } else {
                    x * (T::one() - share) + y * share
                };
            }
        }
        self.bias[row] = T::from_f64(libm::log2(count));
        self.end_row(seen)
    }

    /// The key and the value of a row, padded.
    pub(crate) fn row(&self, row: usize) -> [&[T]; 2] {
        let [stride, value_stride] = self.strides();
        [&self.keys[row * stride..][..stride], &self.values[row * value_stride..][..value_stride]]
    }

    /// The gradients by them, padded.
    pub(crate) fn gradient(&mut self, row: usize) -> [&mut [T]; 2] {
        let [stride, value_stride] = self.strides();
        [
            &mut self.d_keys[row * stride..][..stride],
            &mut self.d_values[row * value_stride..][..value_stride],
        ]
    }

    /// Begins the gradients: with zeros.
    pub(crate) fn begin_gradients(&mut self) {
        let [stride, value_stride] = self.strides();
        self.d_keys.resize(self.len * stride);
        self.d_values.resize(self.len * value_stride);
        self.d_keys.fill(T::zero());
        self.d_values.fill(T::zero());
    }

    /// Hands the gradient by the mean of a pair on to the two.
    pub(crate) fn split_gradient(&mut self, mean: usize, pair: [usize; 2], share: T) {
        let strides = self.strides();
        for (all, stride) in [&mut self.d_keys, &mut self.d_values].into_iter().zip(strides) {
            let (rows, from) = all.split_at_mut(mean * stride);
            for (row, factor) in pair.into_iter().zip([T::one() - share, share]) {
                let to = &mut rows[row * stride..][..stride];
                kernel::add_scaled(to, factor, &from[..stride]);
            }
        }
    }
}

fn copy_row<T: Scalar>(x: ArrayView1<'_, T>, factor: T, to: &mut [T]) {
    let (numbers, padding) = to.split_at_mut(x.len());
    match x.to_slice() {
        Some(x) => _ = kernel::scale_into(factor, x, numbers),
        None => numbers.iter_mut().zip(x).for_each(|(to, &x)| *to = factor * x),
    }
    padding.fill(T::zero());
}

/// What else stands under the normaliser of a block of queries: weights of `2^log_scale` times
/// `denominator`, and their products with the cotangents, in the unit of those.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Others<'a, T> {
    pub(crate) log_scale: &'a [T],
    pub(crate) denominator: &'a [T],
    pub(crate) products: &'a [T],
}

/// A block of queries and cotangents, and the softmax over the rows that they see.
#[derive(Debug)]
pub(crate) struct SeenBlock<T> {
    queries: usize,
    width: usize,
    /// `[d, width]` and `[d_v, width]`.
    columns: Buffer<T>,
    pub(crate) cotangents: Buffer<T>,
    rows: [Buffer<T>; 2],
    /// `[rows, width]`
    scores: Buffer<T>,
    products: Buffer<T>,
    gradients: Buffer<T>,
    /// `[width]`
    log_scale: Buffer<T>,
    denominator: Buffer<T>,
    inverse: Buffer<T>,
    scratch: Buffer<T>,
    ones: Buffer<T>,
    sums: Buffer<T>,
    /// `d_out·out` of each query, in the units of cotangents and values.
    pub(crate) means: Buffer<T>,
    /// What makes weights of the denominators of the others: `2^log_scale/Z`.
    pub(crate) shares: Buffer<T>,
    /// The natural logarithms of the normalisers.
    pub(crate) log_normalizer: Buffer<T>,
}

impl<T: Scalar> SeenBlock<T> {
    pub(crate) fn new() -> Self {
        Self {
            queries: 0,
            width: 0,
            columns: Buffer::new(),
            cotangents: Buffer::new(),
            rows: [Buffer::new(), Buffer::new()],
            scores: Buffer::new(),
            products: Buffer::new(),
            gradients: Buffer::new(),
            log_scale: Buffer::new(),
            denominator: Buffer::new(),
            inverse: Buffer::new(),
            scratch: Buffer::new(),
            ones: Buffer::new(),
            sums: Buffer::new(),
            means: Buffer::new(),
            shares: Buffer::new(),
            log_normalizer: Buffer::new(),
        }
    }

    /// Takes the queries and cotangents of a block.
    pub(crate) fn begin(
        &mut self,
        [q, d_out]: [ArrayView2<'_, T>; 2],
        scoring: Scoring<T>,
        units: Units,
    ) {
        self.queries = q.nrows();
        self.width = padded::<T>(q.nrows());
        let Self { columns, cotangents, scratch, width, .. } = self;
        scratch.resize(*width);
        columns.resize(q.ncols() * *width);
        let [first, second] = product::<T>(scoring.scale.as_f64() * LOG2_E, &[units.k]);
        to_columns(q, first, scratch, columns);
        if second != T::one() {
            kernel::scale(columns, second);
        }
        cotangents.resize(d_out.ncols() * *width);
        to_columns(d_out, units.d_out.inverse(), scratch, cotangents);
        for size in [&mut self.means, &mut self.shares, &mut self.log_normalizer] {
            size.resize(*width);
            size.fill(T::zero());
        }
    }

    /// The weights of the rows, of `others` and of a learned sink of this logit, whose weight times
    /// the mean is summed over the queries, which are counted from `first`.
    pub(crate) fn weigh(
        &mut self,
        seen: &SeenRows<T>,
        scoring: Scoring<T>,
        others: Option<Others<'_, T>>,
        sink_logit: Option<T>,
        first: usize,
    ) -> Result<f64, Error> {
        let (width, n, rows) = (self.width, self.queries, seen.len);
        let [d, value_dim] = seen.dims;
        let [stride, value_stride] = seen.strides();
        let Self { scores, products, gradients, log_scale, denominator, means, .. } = self;
        scores.resize(rows * width);
        gradients.resize(rows * width);
        let is_capped = scoring.soft_cap.is_some();
        let into = if is_capped { Epilogue::Set } else { Epilogue::Bias(&seen.bias[..rows]) };
        for (rows_of, stride, k, b, c, into) in [
            (&seen.keys, stride, d, &self.columns, &mut *scores, into),
            (&seen.values, value_stride, value_dim, &self.cotangents, gradients, Epilogue::Set),
        ] {
            let a = Matrix::rows(rows_of, stride);
            Product { m: rows, n: width, k, a, b, ldb: width, c, ldc: width, into }.run();
        }
        if let Some(cap) = scoring.soft_cap {
            products.resize(rows * width);
            products.copy_from_slice(scores);
            cap.apply(scores);
            let rows = scores.chunks_exact_mut(width).zip(&*seen.bias);
            rows.for_each(|(row, &bias)| row.iter_mut().for_each(|x| *x += bias));
        }
        for (row, seen) in scores.chunks_exact_mut(width).zip(&seen.seen) {
            row[..seen.start.min(n)].fill(T::neg_infinity());
            row[seen.end.min(n)..n].fill(T::neg_infinity());
        }
        log_scale.resize(width);
        denominator.resize(width);
        // of no row at all, finite
        let nothing = T::max_value() * T::from_f64(-0.25);
        log_scale.fill(nothing);
        denominator.fill(T::zero());
        self.scratch.resize(width);
        kernel::online_softmax(scores, log_scale, denominator, &mut self.scratch);
        dot_columns(scores, gradients, 0, means);

        self.inverse.resize(width);
        self.inverse.fill(T::zero());
        means[n..].fill(T::zero());
        let (sink, mut sum_of_sink) = (sink_logit.map(|x| x * T::from_f64(LOG2_E)), 0.0);
        for t in 0..n {
            if !(denominator[t].is_finite() && log_scale[t].is_finite()) {
                return Err(Error::Overflow { which: "a score", row: first + t });
            }
            let other = others
                .map(|other| [other.log_scale[t], other.denominator[t], other.products[t]])
                .filter(|other| other[0].is_finite());
            let top = log_scale[t].max(sink.unwrap_or(nothing));
            let top = top.max(other.map_or(nothing, |other| other[0]));
            let own = (log_scale[t] - top).exp2();
            let mut total = denominator[t] * own;
            let mut mean = means[t] * own;
            let mut share = T::zero();
            if let Some([log_scale, denominator, product]) = other {
                share = (log_scale - top).exp2();
                total += share * denominator;
                mean += share * product;
            }
            let of_sink = sink.map_or(T::zero(), |sink| (sink - top).exp2());
            let inverse = divisor(total + of_sink, first + t)?.recip();
            self.inverse[t] = own * inverse;
            self.shares[t] = share * inverse;
            means[t] = mean * inverse;
            self.log_normalizer[t] = (top - inverse.log2()) * T::from_f64(LN_2);
            sum_of_sink += (of_sink * inverse).as_f64() * means[t].as_f64();
        }
        self.scratch.resize(width.max(rows));
        kernel::scale_and_sum_rows(scores, &self.inverse, &mut self.scratch);
        // p·(g − mean)
        self.ones.resize(width.max(rows));
        self.ones.fill(T::one());
        self.inverse.iter_mut().zip(&**means).for_each(|(to, &mean)| *to = -mean);
        affine_columns(gradients, &self.ones, &self.ones[..width], &self.inverse);
        kernel::multiply_and_sum_columns(gradients, scores, &mut self.scratch[..width]);
        if let Some(cap) = scoring.soft_cap {
            cap.hand_on(products, gradients);
        }
        Ok(sum_of_sink)
    }

    /// Adds the gradients: by the queries, and by the rows.
    pub(crate) fn hand_on(
        &mut self,
        [q, d_out]: [ArrayView2<'_, T>; 2],
        seen: &mut SeenRows<T>,
        scale: f64,
        units: Units,
        d_q: ArrayViewMut2<'_, T>,
    ) {
        let (rows, n, width) = (seen.len, self.queries, self.width);
        if rows == 0 {
            return;
        }
        let [stride, value_stride] = seen.strides();
        let [query_rows, cotangent_rows] = &mut self.rows;
        let query_rows = in_unit(q, 0..n, stride, units.q, query_rows);
        let cotangent_rows = in_unit(d_out, 0..n, value_stride, units.d_out, cotangent_rows);
        for (weights, b, stride, c) in [
            (&self.scores, cotangent_rows, value_stride, &mut seen.d_values),
            (&self.gradients, query_rows, stride, &mut seen.d_keys),
        ] {
            let a = Matrix::rows(weights, width);
            let into = Epilogue::Add;
            Product { m: rows, n: stride, k: n, a, b, ldb: stride, c, ldc: stride, into }.run();
        }
        self.sums.resize(n * stride);
        Product {
            m: n,
            n: stride,
            k: rows,
            a: Matrix::columns(&self.gradients, width),
            b: &seen.keys,
            ldb: stride,
            c: &mut self.sums,
            ldc: stride,
            into: Epilogue::Set,
        }
        .run();
        let to_q = product(scale, &[units.d_out, units.v, units.k]);
        add(d_q, &mut self.sums, stride, to_q);
    }
}
