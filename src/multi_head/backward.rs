//! The backward pass of a layer.

mod task;

use crate::attention::gradient::HeadGradient;
use crate::attention::scratch::Scratch;
use crate::error::Error;
use crate::mask::Mask;
use crate::multi_head::MultiHead;
use crate::multi_head::arguments::Arguments;
use crate::multi_head::backward::task::{KernelCall, Task};
use crate::multi_head::gradient::{LayerGradient, LayerGradients};
use crate::multi_head::layout::HeadUnit;
use crate::multi_head::parameters::place;
use crate::multi_head::places::Places;
use crate::multi_head::tasks::{LayerCall, for_each, threads_at_most};
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use crate::views::{head, heads, pairs, pairs_mut};
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
    /// Heads that are [pooled](Self::pooled) are one task.
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
    /// [`Error::Unsupported`] if a kernel has no backward pass.
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
        let arguments = gradient.arguments();
        let dims = [gradient.q.dim(), gradient.k.dim()];
        let out = (dims[0].0, dims[0].1, dims[0].2, gradient.v.dim().3);
        let lengths = if gradient.key_mask.is_some() { None } else { key_lengths };
        let call = self.call(arguments, mask, lengths, out, None)?;
        gradient.check_shapes()?;
        if let Some((record, _)) = gradient.record {
            record.check(dims[0].0 * self.units.len())?;
        }
        if let Some(d_parameters) = &gradient.d_parameters {
            self.parameters().check_names(d_parameters)?;
        }
        let Some(key_mask) = gradient.key_mask else {
            return self.backward_call(&call, gradient);
        };
        let places = Places::new(key_mask, key_lengths, mask, dims)?;
        let LayerGradient { d_out, record, d_q, d_k, d_v, d_log_decay, d_bias, .. } = gradient;
        let gathered = places.gather(&arguments);
        let d_out = places.gather_queries(d_out);
        let outputs = record.map(|(record, out)| (record, places.gather_queries(out)));
        let Arguments { qkv, log_decay, bias } = gathered.view();
        let [mut of_q, mut of_k, mut of_v] = qkv.map(|x| Array4::zeros(x.dim()));
        let zeros = |x: ArrayView4<'_, T>| Array4::zeros(x.dim());
        let mut of_log_decay = log_decay.filter(|_| d_log_decay.is_some()).map(zeros);
        let mut of_bias = bias.filter(|_| d_bias.is_some()).map(zeros);
        let packed = LayerGradient {
            log_decay,
            bias,
            record: outputs.as_ref().map(|(record, out)| (*record, out.view())),
            d_log_decay: of_log_decay.as_mut().map(|x| x.view_mut()),
            d_bias: of_bias.as_mut().map(|x| x.view_mut()),
            d_parameters: gradient.d_parameters,
            ..LayerGradient::new(
                qkv,
                d_out.view(),
                [of_q.view_mut(), of_k.view_mut(), of_v.view_mut()],
            )
        };
        let lengths = Some(&*places.lengths);
        let out = (out.0, out.1, places.queries(), out.3);
        let call = self.call(gathered.view(), mask, lengths, out, Some(&places))?;
        self.backward_call(&call, packed)?;
        places.add_queries(of_q.view(), d_q);
        places.add_keys(of_k.view(), d_k);
        places.add_keys(of_v.view(), d_v);
        if let (Some(from), Some(to)) = (&of_log_decay, d_log_decay) {
            places.add_keys(from.view(), to);
        }
        if let (Some(from), Some(to)) = (&of_bias, d_bias) {
            places.add_pairs(from.view(), to);
        }
        Ok(())
    }

    /// The gradients of a call whose arguments have been checked.
    fn backward_call(
        &self,
        call: &LayerCall<'_, T>,
        gradient: LayerGradient<'_, T>,
    ) -> Result<(), Error> {
        let LayerGradient { q, k, v, log_decay, bias, d_out, record, .. } = gradient;
        let LayerGradient { d_q, d_k, d_v, d_log_decay, mut d_bias, d_parameters, .. } = gradient;
        let mut calls = self.kernel_calls(q.dim().0, d_parameters.as_deref());
        let mut d_k = of_heads(d_k, 1).into_iter();
        let mut d_v = of_heads(d_v, 1).into_iter();
        let mut d_log_decay = d_log_decay.map(|d| of_heads(d, 1).into_iter());
        let mut tasks = Vec::with_capacity(calls.len());
        for ((at, calls), d_q) in calls.iter_mut().enumerate().zip(of_heads(d_q, self.group())) {
            let (sequence, kv) = (at / self.kv_heads, at % self.kv_heads);
            let [queries, keys] = call.real(sequence);
            let query_heads = kv * self.group()..(kv + 1) * self.group();
            let rows = [queries.clone(), keys.clone()];
            let [q, d_out] =
                [&q, &d_out].map(|x| heads(x, sequence, query_heads.clone(), queries.clone()));
            let record = record.map(|(record, out)| {
                (record, heads(&out, sequence, query_heads.clone(), queries.clone()))
            });
            let head = HeadGradient {
                q,
                k: head(&k, sequence, kv, keys.clone()),
                v: head(&v, sequence, kv, keys.clone()),
                log_decay: log_decay.map(|x| head(&x, sequence, kv, keys.clone())),
                key_mask: None,
                bias: bias.map(|x| pairs(&x, sequence, query_heads.clone(), rows)),
                d_out,
                record: None,
                checkpoints: None,
                d_q: rows_of(d_q, queries),
                d_k: next_head(&mut d_k, &keys),
                d_v: next_head(&mut d_v, &keys),
                d_log_decay: d_log_decay.as_mut().map(|d| next_head(d, &keys)),
                d_bias: None,
                d_parameters: None,
            };
            match &mut calls[..] {
                // heads that share their entries are differentiated together
                [KernelCall { unit: HeadUnit::Pool(pool), .. }] if pool.first() != Some(&kv) => {
                    let is_pool = |task: &&mut Task<'_, T>| {
                        task.sequence == sequence
                            && task.calls.first().is_some_and(KernelCall::is_pool)
                    };
                    if let Some(task) = tasks.iter_mut().rev().find(is_pool) {
                        task.others.push((head, calls));
                    }
                }
                _ => tasks.push(Task {
                    sequence,
                    head,
                    record,
                    calls,
                    others: Vec::new(),
                    d_bias: None,
                }),
            }
        }
        // what several heads share is added in order; so that not all of it is there at once, some
        // of them at a time
        let some = if d_bias.is_some() { threads_at_most(tasks.len()) } else { tasks.len() };
        while !tasks.is_empty() {
            let after = tasks.split_off(some.min(tasks.len()));
            let mut now = core::mem::replace(&mut tasks, after);
            for_each(now.iter_mut().collect(), Scratch::with_threads, |scratch, task| {
                task.run(self, call, &d_out, d_bias.is_some(), scratch)
            })?;
            let Some(d_bias) = &mut d_bias else { continue };
            for Task { sequence, calls, d_bias: found, .. } in &now {
                let (Some(found), Some(first)) = (found, calls.first()) else { continue };
                let [queries, keys] = call.real(*sequence);
                let kv = first.unit.first_query_head(self.group()) / self.group();
                let query_heads = kv * self.group()..(kv + 1) * self.group();
                let mut to = pairs_mut(d_bias, *sequence, query_heads, [queries, keys]);
                to += found;
            }
        }
        let Some(d_parameters) = d_parameters else { return Ok(()) };
        for KernelCall { first, d_parameters: found, .. } in calls.into_iter().flatten() {
            if let Some(found) = found {
                d_parameters.add_scaled(T::one(), &found.under(&place(first)))?;
            }
        }
        Ok(())
    }

    /// What is called for each kv head of each sequence: one kernel for all its query heads, or one
    /// for each; with room of its own for the parameters that are asked for.
    fn kernel_calls(&self, batch: usize, asked: Option<&Parameters<T>>) -> Vec<Vec<KernelCall<T>>> {
        let of_kv = |kv: usize| {
            let units = self.units.iter().enumerate();
            let mine = units.filter(|(_, unit)| unit.all_kv_heads(self.group()).contains(&kv));
            let call = |(at, unit): (usize, &HeadUnit)| {
                let first = self.first_with_kernel(unit.first_query_head(self.group()));
                let d_parameters = asked.map(|asked| asked.of(&place(first)).zeros_like());
                let d_parameters = d_parameters.filter(|asked| !asked.is_empty());
                KernelCall { unit: unit.clone(), at, first, d_parameters }
            };
            mine.map(call).collect()
        };
        (0..batch).flat_map(|_| (0..self.kv_heads).map(of_kv)).collect()
    }
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
