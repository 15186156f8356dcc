//! The backward pass of a head of keys and values with its query heads.

use crate::attention::gradient::HeadGradient;
use crate::attention::scratch::Scratch;
use crate::error::{Error, LayerHead};
use crate::multi_head::MultiHead;
use crate::multi_head::layout::{HeadUnit, in_head};
use crate::multi_head::record::LayerRecord;
use crate::multi_head::rows::Rows;
use crate::multi_head::tasks::LayerCall;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use ndarray::{Array3, ArrayView3, ArrayView4, Axis, Slice};

/// A head of keys and values with all its query heads, and the kernels that it is for.
#[derive(Debug)]
pub(super) struct Task<'a, T> {
    pub(super) sequence: usize,
    pub(super) head: HeadGradient<'a, T>,
    pub(super) record: Option<(&'a LayerRecord<T>, ArrayView3<'a, T>)>,
    pub(super) calls: &'a mut [KernelCall<T>],
    /// The other heads of a pool, with theirs.
    pub(super) others: Vec<(HeadGradient<'a, T>, &'a mut [KernelCall<T>])>,
    /// The gradient by the biases of these heads, once it is there.
    pub(super) d_bias: Option<Array3<T>>,
}

/// A kernel with the query heads that it is called with, and the gradient by its parameters.
#[derive(Clone, Debug)]
pub(super) struct KernelCall<T> {
    pub(super) unit: HeadUnit,
    /// Its place among the units of a layer.
    pub(super) at: usize,
    /// The first query head that has it.
    pub(super) first: usize,
    pub(super) d_parameters: Option<Parameters<T>>,
}

impl<T> KernelCall<T> {
    /// Whether it is for heads that share their entries.
    pub(super) fn is_pool(&self) -> bool {
        matches!(self.unit, HeadUnit::Pool(_))
    }
}

impl<T: Scalar> Task<'_, T> {
    /// Calls the kernels, one after the other.
    pub(super) fn run(
        &mut self,
        layer: &MultiHead<T>,
        call: &LayerCall<'_, T>,
        d_out: &ArrayView4<'_, T>,
        by_bias: bool,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        if self.calls.first().is_some_and(KernelCall::is_pool) {
            return self.run_pool(layer, call, d_out, scratch);
        }
        scratch.with_part(|rows: &mut Rows<T>, scratch| {
            self.run_together(layer, call, d_out, by_bias, rows, scratch)
        })
    }

    /// Calls the kernel of a pool with all its heads.
    fn run_pool(
        &mut self,
        layer: &MultiHead<T>,
        call: &LayerCall<'_, T>,
        d_out: &ArrayView4<'_, T>,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        let Self { sequence, head, calls, others, record, .. } = self;
        let others = others.iter_mut().map(|(head, calls)| (head, &mut **calls));
        let all = core::iter::once((head, &mut **calls)).chain(others);
        let (mut heads, mut unit) = (Vec::with_capacity(layer.kv_heads()), None);
        for (place, (head, calls)) in all.enumerate() {
            let mut head = head.reborrow();
            for call in calls {
                if let Some((record, _)) = record {
                    let unit = *sequence * layer.units.len() + call.at;
                    record.hand_on_sums(unit, place, &mut head);
                }
                head.d_parameters = call.d_parameters.as_mut();
                unit = Some(&call.unit);
            }
            heads.push(head);
        }
        let Some(unit) = unit else { return Ok(()) };
        layer.kernels[unit.first_query_head(layer.group())]
            .backward_heads(&mut heads, call.mask, scratch)
            .map_err(|error| error_in(call, d_out, *sequence, unit, error))
    }

    fn run_together(
        &mut self,
        layer: &MultiHead<T>,
        call: &LayerCall<'_, T>,
        d_out: &ArrayView4<'_, T>,
        by_bias: bool,
        rows: &mut Rows<T>,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        let (sequence, group) = (self.sequence, layer.group());
        let mut all = rows.of_gradient(&mut self.head);
        let mut d_bias = all.bias.filter(|_| by_bias).map(|bias| Array3::zeros(bias.dim()));
        for KernelCall { unit, at, d_parameters, .. } in &mut *self.calls {
            let mut head = all.reborrow();
            head.d_bias = d_bias.as_mut().map(|d| d.view_mut());
            let mut record = self.record;
            if let HeadUnit::Query(h) = unit {
                let at = Slice::from(*h % group..*h % group + 1);
                head.q.slice_axis_inplace(Axis(0), at);
                head.d_out.slice_axis_inplace(Axis(0), at);
                head.d_q.slice_axis_inplace(Axis(0), at);
                if let Some((_, out)) = &mut record {
                    out.slice_axis_inplace(Axis(0), at);
                }
                if let Some(bias) = head.bias.as_mut().filter(|x| x.len_of(Axis(0)) > 1) {
                    bias.slice_axis_inplace(Axis(0), at);
                }
                if let Some(d_bias) = head.d_bias.as_mut().filter(|x| x.len_of(Axis(0)) > 1) {
                    d_bias.slice_axis_inplace(Axis(0), at);
                }
            }
            if let Some((record, out)) = record {
                record.hand_on(sequence * layer.units.len() + *at, out, &mut head);
            }
            head.d_parameters = d_parameters.as_mut();
            layer.kernels[unit.first_query_head(group)]
                .backward_heads(&mut [head], call.mask, scratch)
                .map_err(|error| error_in(call, d_out, sequence, unit, error))?;
        }
        self.d_bias = d_bias;
        Ok(())
    }
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
            let error = call.in_place(sequence, false, error.in_chunk(first));
            return in_head(sequence, LayerHead::Query(head), error);
        }
    }
    call.error(sequence, unit, error)
}
