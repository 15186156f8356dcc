//! The answers to a block of queries in the layout of the inner loops.

use crate::check;
use crate::error::{Error, SUM_OF_VALUES};
use crate::kernel;
use crate::kernel::buffer::{Buffer, padded};
use crate::memory::partial::{Partial, add_sums, divisor};
use crate::scalar::Scalar;
use ndarray::ArrayViewMut2;

/// A [`Partial`] in the making, as inner loops want it: `numerator [tokens, value_dim]` with padded
/// rows, and room beyond the tokens.
#[derive(Debug)]
pub(crate) struct Answer<T> {
    pub(crate) numerator: Buffer<T>,
    pub(crate) denominator: Buffer<T>,
    pub(crate) log_scale: Buffer<T>,
    factors: Buffer<T>,
    pub(crate) tokens: usize,
}

impl<T: Scalar> Answer<T> {
    pub(crate) fn new() -> Self {
        Self {
            numerator: Buffer::new(),
            denominator: Buffer::new(),
            log_scale: Buffer::new(),
            factors: Buffer::new(),
            tokens: 0,
        }
    }

    pub(crate) fn resize(&mut self, tokens: usize, width: usize, stride: usize) {
        self.tokens = tokens;
        self.numerator.resize(tokens * stride);
        self.denominator.resize(width);
        self.log_scale.resize(width);
    }

    /// Sets the log scales: those of the queries, and one of the sums. Returns whether every
    /// normaliser can be divided by.
    pub(crate) fn set_scales(&mut self, queries: &[T], sums: T) -> bool {
        self.log_scale
            .iter_mut()
            .zip(queries)
            .for_each(|(log_scale, &query)| *log_scale = query + sums);
        self.denominator
            .iter()
            .take(self.tokens)
            .all(|&denominator| divisor(denominator, 0).is_ok())
    }

    /// Writes the rows to `out`, normalised or in absolute terms; errors count rows from
    /// `first_row`.
    pub(crate) fn write(
        &mut self,
        first_row: usize,
        readout: Readout,
        mut out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        let value_dim = out.ncols();
        let stride = padded::<T>(value_dim);
        self.factors.resize(self.tokens);
        for (t, factor) in self.factors.iter_mut().enumerate() {
            *factor = match readout {
                Readout::Normalized => divisor(self.denominator[t], first_row + t)?.recip(),
                // in two steps: the factor alone may leave the range of a product that does not
                Readout::Unnormalized => (self.log_scale[t] * T::from_f64(0.5)).exp(),
            };
        }
        if readout == Readout::Unnormalized {
            kernel::scale_rows_in_place(&mut self.numerator, stride, &self.factors);
        }
        let finite = if let Some(out) = out.as_slice_mut() {
            kernel::scale_rows(&self.numerator, stride, &self.factors, value_dim, out)
        } else {
            kernel::scale_rows_in_place(&mut self.numerator, stride, &self.factors);
            for (mut out, row) in out.outer_iter_mut().zip(self.numerator.chunks_exact(stride)) {
                out.iter_mut().zip(row).for_each(|(out, &sum)| *out = sum);
            }
            kernel::all_finite(&self.numerator)
        };
        if finite {
            return Ok(());
        }
        let row = out.outer_iter().position(|row| !check::row_is_finite(row)).unwrap_or(0);
        Err(Error::Overflow { which: SUM_OF_VALUES, row: first_row + row })
    }

    /// Adds one row of sums of other tokens.
    pub(crate) fn add_row(&mut self, row: usize, numerator: &[T], denominator: T, log_scale: T) {
        let stride = self.numerator.len() / self.tokens;
        let sums = &mut self.numerator[row * stride..(row + 1) * stride];
        let scalars = (&mut self.denominator[row], &mut self.log_scale[row]);
        add_sums(sums, scalars, numerator, denominator, log_scale);
    }

    /// Adds a token without a value and with this logit to a row; returns the factor of what was
    /// there.
    pub(crate) fn add_sink(&mut self, row: usize, logit: T) -> T {
        let before = self.log_scale[row];
        self.add_row(row, &[], T::one(), logit);
        (before - self.log_scale[row]).exp()
    }

    /// Takes back what rounding has added to means of the largest number, of weights that are not
    /// negative and denominators below one.
    pub(crate) fn clamp(&mut self) {
        let largest = T::max_value() * (T::one() - T::epsilon() * T::from_f64(4.0));
        let stride = self.numerator.len() / self.tokens.max(1);
        for (sums, &denominator) in
            self.numerator.chunks_exact_mut(stride.max(1)).zip(&*self.denominator)
        {
            let limit = denominator * largest;
            let clamp = |x: &mut T| {
                if x.abs() > limit {
                    *x = limit.copysign(*x);
                }
            };
            sums.iter_mut().for_each(clamp);
        }
    }

    /// The first row whose denominator is not finite: a score has overflowed.
    pub(crate) fn first_overflow(&self) -> Option<usize> {
        self.denominator.iter().take(self.tokens).position(|denominator| !denominator.is_finite())
    }

    /// As [`add_to`](Self::add_to), unless a score or a sum of values has left the range of the
    /// type.
    pub(crate) fn add_in_range_to(
        &self,
        answer: &mut Partial<T>,
        first: usize,
    ) -> Result<(), Error> {
        if let Some(row) = self.first_overflow() {
            return Err(Error::Overflow { which: "a score", row: first + row });
        }
        if !kernel::all_finite(&self.numerator) {
            return Err(Error::Overflow { which: SUM_OF_VALUES, row: first });
        }
        self.add_to(answer, first);
        Ok(())
    }

    /// Merges the rows into `answer` from row `first` on.
    pub(crate) fn add_to(&self, answer: &mut Partial<T>, first: usize) {
        let value_dim = answer.numerator.ncols();
        for (i, numerator) in self.numerator.chunks_exact(padded::<T>(value_dim)).enumerate() {
            answer.add(first + i, &numerator[..value_dim], self.denominator[i], self.log_scale[i]);
        }
    }
}

/// Tokens whose sums are added to those of others at once.
pub(crate) const SPAN: usize = 512;

/// Sums over all tokens, of the sums over some of them at a time, with the rounding error of every
/// addition carried along: the error does not grow with the number of tokens. Log scales are to
/// base 2.
#[derive(Debug)]
pub(crate) struct Total<T> {
    numerator: [Buffer<T>; 2],
    denominator: [Buffer<T>; 2],
    log_scale: Buffer<T>,
}

impl<T: Scalar> Total<T> {
    pub(crate) fn new() -> Self {
        let pair = || [Buffer::new(), Buffer::new()];
        Self { numerator: pair(), denominator: pair(), log_scale: Buffer::new() }
    }

    /// Begins with no tokens, for answers of this size.
    pub(crate) fn begin(&mut self, answer: &Answer<T>) {
        let sizes = [answer.numerator.len(), answer.denominator.len()];
        for (pair, size) in [&mut self.numerator, &mut self.denominator].into_iter().zip(sizes) {
            for buffer in pair {
                buffer.resize(size);
                buffer.fill(T::zero());
            }
        }
        self.log_scale.resize(answer.log_scale.len());
        self.log_scale.fill(T::neg_infinity());
    }

    /// Adds the sums over some tokens.
    pub(crate) fn add(&mut self, answer: &Answer<T>) {
        let Self { numerator: [sums, low], denominator: [weights, weights_low], log_scale } = self;
        let stride = sums.len() / answer.tokens.max(1);
        for t in 0..answer.tokens {
            if answer.denominator[t] == T::zero() {
                continue; // nothing is seen
            }
            let (old, found) = (log_scale[t], answer.log_scale[t]);
            let new = old.max(found);
            let [kept, factor] =
                [old, found].map(|x| if x == new { T::one() } else { (x - new).exp2() });
            let (row, one) = (t * stride..(t + 1) * stride, t..t + 1);
            let parts = [
                (&mut sums[row.clone()], &mut low[row.clone()], &answer.numerator[row]),
                (
                    &mut weights[one.clone()],
                    &mut weights_low[one.clone()],
                    &answer.denominator[one],
                ),
            ];
            for (sum, low, x) in parts {
                if kept != T::one() {
                    kernel::scale(sum, kept);
                    kernel::scale(low, kept);
                }
                kernel::add_compensated(sum, low, factor, x);
            }
            log_scale[t] = new;
        }
    }

    /// Adds the sums over the last tokens, and sets `answer` to those over all.
    pub(crate) fn end(&mut self, answer: &mut Answer<T>) {
        self.add(answer);
        core::mem::swap(&mut self.numerator[0], &mut answer.numerator);
        core::mem::swap(&mut self.denominator[0], &mut answer.denominator);
        core::mem::swap(&mut self.log_scale, &mut answer.log_scale);
    }
}

/// Runs `run` with the share that weights are to be multiplied with before they meet the values:
/// one, and where a sum of weighted values has then left the range of the type, so little that of
/// so many weights, each at most one, none can.
pub(crate) fn in_range<T: Scalar>(
    weights: usize,
    mut run: impl FnMut(T) -> Result<(), Error>,
) -> Result<(), Error> {
    match run(T::one()) {
        Err(error) if error.is_of_values() => {
            let bits = weights.max(1).next_power_of_two().trailing_zeros() + 1;
            run(T::from_f64(0.5_f64.powi(bits.cast_signed())))
        }
        result => result,
    }
}

/// Whether sums are divided by the sum of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Readout {
    Normalized,
    Unnormalized,
}
