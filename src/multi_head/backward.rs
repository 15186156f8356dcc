//! The backward pass of a layer.

use crate::attention::gradient::HeadGradient;
use crate::attention::scratch::Scratch;
use crate::error::{Error, LayerHead};
use crate::mask::Mask;
use crate::multi_head::MultiHead;
use crate::multi_head::gradient::{LayerGradient, LayerGradients};
use crate::multi_head::layout::{HeadUnit, in_head};
use crate::multi_head::parameters::place;
use crate::multi_head::tasks::{LayerCall, for_each};
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use crate::views::{head, heads};
use core::ops::Range;
use ndarray::{Array4, ArrayView4, ArrayViewMut2, ArrayViewMut3, ArrayViewMut4, Axis, Slice};

impl<T: Scalar> MultiHead<T> {
    /// Computes the gradients of a loss by queries, keys, values and
    /// [parameters](Self::parameters) from that by the outputs,
    /// `d_out [b, query_heads, n_q, d_v]`, and allocates them. The other arguments are those of
    /// [`forward`](Self::forward).
    ///
    /// Keys and values get the sum over the query heads that use them. Padding gets no gradient,
    /// and what it holds, of `d_out` as well, is never read. With feature `rayon`, batch × kv heads
    /// are shared out over the threads of the current pool; the result is the same, bit for bit.
    ///
    /// ```
    /// use dijiang::{Mask, MultiHead, SoftmaxAttention};
    /// use ndarray::{Array4, s};
    ///
    /// let layer = MultiHead::new(SoftmaxAttention::<f32>::new(16)?, 4, 2)?;
    /// let q = Array4::from_elem((3, 4, 10, 16), 0.1);
    /// let k = Array4::from_elem((3, 2, 10, 16), 0.2);
    /// let v = Array4::from_elem((3, 2, 10, 8), 0.3);
    /// let d_out = Array4::ones((3, 4, 10, 8));
    /// let (mask, lengths) = (Mask::Full, [10, 7, 1]);
    /// let d = layer.backward(q.view(), k.view(), v.view(), mask, Some(&lengths), d_out.view())?;
    /// // ten queries of two heads see one key of the last sequence
    /// assert!(d.v.slice(s![2, .., 0, ..]).iter().all(|x| (x - 20.0).abs() < 1e-4));
    /// assert!(d.v.slice(s![2, .., 1.., ..]).iter().all(|&x| x == 0.0));
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`forward`](Self::forward), and of
    /// [`Attention::backward_heads`](crate::Attention::backward_heads) in an [`Error::InHead`];
    /// [`Error::Unsupported`] if a kernel has no backward pass, or heads are
    /// [pooled](Self::pooled).
    pub fn backward(
        &self,
        q: ArrayView4<'_, T>,
        k: ArrayView4<'_, T>,
        v: ArrayView4<'_, T>,
        mask: Mask,
        key_lengths: Option<&[usize]>,
        d_out: ArrayView4<'_, T>,
    ) -> Result<LayerGradients<T>, Error> {
        self.backward_all([q, k, v], None, mask, key_lengths, d_out)
    }

    /// As [`backward`](Self::backward) with [`Mask::Causal`], of gated kernels, and the gradient by
    /// the log decays as well: `log_decay [b, kv_heads, n, 1 or num_features]`.
    ///
    /// ```
    /// use dijiang::{EluFeatures, LinearAttention, MultiHead};
    /// use ndarray::Array4;
    ///
    /// let kernel = LinearAttention::new(EluFeatures::<f32>::new(16)?).unnormalized().gated();
    /// let layer = MultiHead::new(kernel, 4, 2)?;
    /// let q = Array4::zeros((1, 4, 10, 16));
    /// let (k, v) = (Array4::zeros((1, 2, 10, 16)), Array4::ones((1, 2, 10, 8)));
    /// let log_decay = Array4::from_elem((1, 2, 10, 1), -0.1);
    /// let d_out = Array4::ones((1, 4, 10, 8));
    /// let d = layer.backward_gated(
    ///     q.view(),
    ///     k.view(),
    ///     v.view(),
    ///     log_decay.view(),
    ///     None,
    ///     d_out.view(),
    /// )?;
    /// // the larger a log decay, the more is left of what came before, of which the first has none
    /// let of_gates = d.log_decay.unwrap();
    /// assert!(of_gates[[0, 0, 0, 0]].abs() < 1e-5 && of_gates[[0, 0, 1, 0]] > 1.0);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`backward`](Self::backward); [`Error::Unsupported`] if a kernel is not gated.
    pub fn backward_gated(
        &self,
        q: ArrayView4<'_, T>,
        k: ArrayView4<'_, T>,
        v: ArrayView4<'_, T>,
        log_decay: ArrayView4<'_, T>,
        key_lengths: Option<&[usize]>,
        d_out: ArrayView4<'_, T>,
    ) -> Result<LayerGradients<T>, Error> {
        self.backward_all([q, k, v], Some(log_decay), Mask::Causal, key_lengths, d_out)
    }

    fn backward_all(
        &self,
        [q, k, v]: [ArrayView4<'_, T>; 3],
        log_decay: Option<ArrayView4<'_, T>>,
        mask: Mask,
        key_lengths: Option<&[usize]>,
        d_out: ArrayView4<'_, T>,
    ) -> Result<LayerGradients<T>, Error> {
        let mut d = LayerGradients {
            q: Array4::zeros(q.dim()),
            k: Array4::zeros(k.dim()),
            v: Array4::zeros(v.dim()),
            log_decay: log_decay.map(|x| Array4::zeros(x.dim())),
            parameters: self.parameters().zeros_like(),
        };
        let views = [d.q.view_mut(), d.k.view_mut(), d.v.view_mut()];
        let gradient = LayerGradient {
            log_decay,
            d_log_decay: d.log_decay.as_mut().map(|x| x.view_mut()),
            ..LayerGradient::new([q, k, v], d_out, views)
        };
        self.backward_into(gradient.with_parameters(&mut d.parameters), mask, key_lengths)?;
        Ok(d)
    }

    /// As [`backward`](Self::backward) and, with log decays,
    /// [`backward_gated`](Self::backward_gated), adding to the views of others:
    /// [`LayerGradient`] has an example.
    ///
    /// # Errors
    ///
    /// As [`backward`](Self::backward); [`Error::Shape`] if a gradient has another shape than its
    /// argument, [`Error::Parameter`] if a name that is asked for is not one of the
    /// [parameters](Self::parameters). After an error the content of the gradients is unspecified.
    pub fn backward_into(
        &self,
        gradient: LayerGradient<'_, T>,
        mask: Mask,
        key_lengths: Option<&[usize]>,
    ) -> Result<(), Error> {
        let LayerGradient { q, k, v, log_decay, .. } = gradient;
        let out = (q.dim().0, q.dim().1, q.dim().2, v.dim().3);
        let call = self.call([q, k, v], log_decay, mask, key_lengths, out)?;
        gradient.check_shapes()?;
        if self.units.iter().any(|unit| matches!(unit, HeadUnit::Pool(_))) {
            return Err(POOLED);
        }
        if let Some(d_parameters) = &gradient.d_parameters {
            self.parameters().check_names(d_parameters)?;
        }
        let LayerGradient { d_out, d_q, d_k, d_v, d_log_decay, d_parameters, .. } = gradient;
        let mut calls = self.kernel_calls(q.dim().0, d_parameters.as_deref());
        let mut d_k = of_heads(d_k, 1).into_iter();
        let mut d_v = of_heads(d_v, 1).into_iter();
        let mut d_log_decay = d_log_decay.map(|d| of_heads(d, 1).into_iter());
        let mut tasks = Vec::with_capacity(calls.len());
        for ((at, calls), d_q) in calls.iter_mut().enumerate().zip(of_heads(d_q, self.group())) {
            let (sequence, kv) = (at / self.kv_heads, at % self.kv_heads);
            let [queries, keys] = call.real(sequence);
            let query_heads = kv * self.group()..(kv + 1) * self.group();
            let head = HeadGradient {
                q: heads(&q, sequence, query_heads.clone(), queries.clone()),
                k: head(&k, sequence, kv, keys.clone()),
                v: head(&v, sequence, kv, keys.clone()),
                log_decay: log_decay.map(|x| head(&x, sequence, kv, keys.clone())),
                d_out: heads(&d_out, sequence, query_heads, queries.clone()),
                key_mask: None,
                bias: None,
                record: None,
                checkpoints: None,
                d_q: rows_of(d_q, queries),
                d_k: next_head(&mut d_k, &keys),
                d_v: next_head(&mut d_v, &keys),
                d_log_decay: d_log_decay.as_mut().map(|d| next_head(d, &keys)),
                d_bias: None,
                d_parameters: None,
            };
            tasks.push(Task { sequence, head, calls });
        }
        for_each(tasks, Scratch::with_threads, |scratch, Task { sequence, mut head, calls }| {
            calls.iter_mut().try_for_each(|KernelCall { unit, d_parameters }| {
                let mut part = part(&mut head, unit, self.group());
                part.d_parameters = d_parameters.as_mut();
                self.kernels[unit.first_query_head(self.group())]
                    .backward_heads(&mut [part], mask, scratch)
                    .map_err(|error| error_in(&call, &d_out, sequence, unit, error))
            })
        })?;
        let Some(d_parameters) = d_parameters else { return Ok(()) };
        for KernelCall { unit, d_parameters: found } in calls.into_iter().flatten() {
            if let Some(found) = found {
                let first = self.first_with_kernel(unit.first_query_head(self.group()));
                d_parameters.add_scaled(T::one(), &found.under(&place(first)))?;
            }
        }
        Ok(())
    }

    /// What is called for each kv head of each sequence: one kernel for all its query heads, or one
    /// for each; with room of its own for the parameters that are asked for.
    fn kernel_calls(&self, batch: usize, asked: Option<&Parameters<T>>) -> Vec<Vec<KernelCall<T>>> {
        let of_unit = |unit: &HeadUnit| {
            let first = self.first_with_kernel(unit.first_query_head(self.group()));
            let d_parameters = asked.map(|asked| asked.of(&place(first)).zeros_like());
            let d_parameters = d_parameters.filter(|asked| !asked.is_empty());
            KernelCall { unit: unit.clone(), d_parameters }
        };
        let of_kv = |kv: usize| {
            let units = self.units.iter();
            units.filter(|unit| unit.all_kv_heads(self.group()) == [kv]).map(of_unit).collect()
        };
        (0..batch).flat_map(|_| (0..self.kv_heads).map(of_kv)).collect()
    }
}

const POOLED: Error = Error::Unsupported {
    what: "the gradient of heads that share one budget of entries",
    why: "merging is a choice, and choices have none; use the layer before `MultiHead::pooled`",
};

/// A head of keys and values with all its query heads, and the kernels that it is for.
#[derive(Debug)]
struct Task<'a, T> {
    sequence: usize,
    head: HeadGradient<'a, T>,
    calls: &'a mut [KernelCall<T>],
}

/// A kernel with the query heads that it is called with, and the gradient by its parameters.
#[derive(Clone, Debug)]
struct KernelCall<T> {
    unit: HeadUnit,
    d_parameters: Option<Parameters<T>>,
}

/// The query heads of a unit, of those of its kv head.
fn part<'b, T: Scalar>(
    head: &'b mut HeadGradient<'_, T>,
    unit: &HeadUnit,
    group: usize,
) -> HeadGradient<'b, T> {
    let mut part = head.reborrow();
    if let HeadUnit::Query(h) = unit {
        let at = Slice::from(h % group..h % group + 1);
        part.q.slice_axis_inplace(Axis(0), at);
        part.d_out.slice_axis_inplace(Axis(0), at);
        part.d_q.slice_axis_inplace(Axis(0), at);
    }
    part
}

/// `[batch, heads, n, d]` as parts `[count, n, d]`, sequence after sequence.
fn of_heads<T>(mut x: ArrayViewMut4<'_, T>, count: usize) -> Vec<ArrayViewMut3<'_, T>> {
    let mut parts = Vec::with_capacity(x.len_of(Axis(0)) * x.len_of(Axis(1)) / count);
    while x.len_of(Axis(0)) > 0 {
        let (first, rest) = x.split_at(Axis(0), 1);
        x = rest;
        let mut left = first.index_axis_move(Axis(0), 0);
        while left.len_of(Axis(0)) > 0 {
            let (part, rest) = left.split_at(Axis(0), count);
            left = rest;
            parts.push(part);
        }
    }
    parts
}

/// Rows of the next one of parts `[1, n, d]`, one for each kv head.
fn next_head<'a, T>(
    parts: &mut impl Iterator<Item = ArrayViewMut3<'a, T>>,
    range: &Range<usize>,
) -> ArrayViewMut2<'a, T> {
    let part = parts.next().expect("one for each kv head");
    rows_of(part, range.clone()).index_axis_move(Axis(0), 0)
}

/// Rows of `[heads, n, d]`.
fn rows_of<T>(mut x: ArrayViewMut3<'_, T>, range: Range<usize>) -> ArrayViewMut3<'_, T> {
    x.slice_axis_inplace(Axis(1), Slice::from(range));
    x
}

/// An error of a unit, of the head in which it is found; rows are those of the arrays.
#[cold]
fn error_in<T: Scalar>(
    call: &LayerCall<'_, T>,
    d_out: &ArrayView4<'_, T>,
    sequence: usize,
    unit: &HeadUnit,
    error: Error,
) -> Error {
    if let Error::NotFinite { which: "d_out", row, column } = error {
        let first = call.real(sequence)[0].start;
        let is_bad = |&head: &usize| {
            let number = d_out.get([sequence, head, first + row, column]);
            number.is_some_and(|x| !x.is_finite())
        };
        if let Some(head) = unit.query_heads(call.group).into_iter().find(is_bad) {
            return in_head(sequence, LayerHead::Query(head), error.in_chunk(first));
        }
    }
    call.error(sequence, unit, error)
}
