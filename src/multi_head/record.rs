//! What a forward pass of a layer keeps for its backward pass.

use crate::attention::Attention;
use crate::attention::call::Head;
use crate::attention::gradient::{ForwardRecord, HeadGradient};
use crate::check;
use crate::error::Error;
use crate::memory::linear::checkpoints::SumCheckpoints;
use crate::multi_head::layout::HeadUnit;
use crate::scalar::Scalar;
use ndarray::{Array2, ArrayView3, Axis};
use std::sync::Arc;

/// What a forward pass of a layer keeps so that the backward pass of the same call is faster: the
/// logarithms of the sums of the weights where kernels
/// [give them](crate::Attention::gives_log_normalizer), `n_q` numbers for each query head, and
/// [sums of linear attention, or what a hybrid merged](SumCheckpoints). It is filled anew by each
/// forward pass that is given it, and may be empty.
///
/// ```
/// use dijiang::{LayerForward, LayerGradient, LayerRecord, Mask, MultiHead, SoftmaxAttention};
/// use ndarray::Array4;
///
/// let layer = MultiHead::new(SoftmaxAttention::<f32>::new(8)?, 2, 2)?;
/// let x = Array4::from_shape_fn((1, 2, 50, 8), |(_, h, t, c)| ((7 * h + t * c) as f32).sin());
/// let (mut record, mut out) = (LayerRecord::new(), Array4::zeros(x.dim()));
/// let call = LayerForward::new([x.view(), x.view(), x.view()], out.view_mut());
/// layer.forward_with(call.with_record(&mut record), Mask::Causal, None)?;
///
/// let d_out = Array4::ones(x.dim()); // the loss is the sum of all outputs
/// let [mut d_q, mut d_k, mut d_v] = [(); 3].map(|()| Array4::zeros(x.dim()));
/// let d = [d_q.view_mut(), d_k.view_mut(), d_v.view_mut()];
/// let call = LayerGradient::new([x.view(), x.view(), x.view()], d_out.view(), d);
/// layer.backward_into(call.with_record(&record, out.view()), Mask::Causal, None)?;
/// // each query hands on a weight of one in all
/// assert!((d_v.sum() - (2 * 50 * 8) as f32).abs() < 1e-2);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct LayerRecord<T> {
    /// Sequence after sequence, unit after unit.
    parts: Vec<Part<T>>,
}

/// What is kept of the query heads of a unit.
#[derive(Clone, Debug)]
struct Part<T> {
    /// `[heads, real queries]`, if the kernel gives them.
    log_normalizer: Option<Array2<T>>,
    /// Of each head of keys and values of the unit.
    sums: Vec<SumCheckpoints<T>>,
}

impl<T: Scalar> LayerRecord<T> {
    /// Empty.
    #[must_use]
    pub const fn new() -> Self {
        Self { parts: Vec::new() }
    }

    /// Whether there is nothing that a backward pass could use.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let is_empty = |part: &Part<T>| {
            part.log_normalizer.is_none() && part.sums.iter().all(SumCheckpoints::is_empty)
        };
        self.parts.iter().all(is_empty)
    }

    /// Lets the tasks of units fill it, which are in the order of the units: one task for each, or
    /// one for each of its query heads.
    pub(super) fn attach<'b, 'u>(
        &'b mut self,
        kernels: &[Arc<dyn Attention<T>>],
        units: impl Iterator<Item = &'u HeadUnit>,
        group: usize,
        tasks: &mut [Vec<Head<'b, T>>],
    ) {
        let mut next = 0;
        let mut sizes = Vec::new();
        self.parts.clear();
        for unit in units {
            let (heads, first) = (unit.query_heads(group).len(), next);
            let mut found = 0;
            while found < heads {
                found += tasks[next].iter().map(Head::group_len).sum::<usize>();
                next += 1;
            }
            let gives = kernels[unit.first_query_head(group)].gives_log_normalizer();
            let queries = tasks[first].first().map_or(0, Head::queries);
            let log_normalizer = gives.then(|| Array2::zeros((heads, queries)));
            let sums = vec![SumCheckpoints::new(); unit.kv_heads()];
            self.parts.push(Part { log_normalizer, sums });
            sizes.push(next - first);
        }
        let mut tasks = tasks.iter_mut();
        for (Part { log_normalizer, sums }, size) in self.parts.iter_mut().zip(sizes) {
            // the keys are the same for all query heads, and so are their sums
            let mut sums = sums.iter_mut();
            let mut left = log_normalizer.as_mut().map(|x| x.view_mut());
            for task in tasks.by_ref().take(size) {
                for (head, sums) in task.iter_mut().zip(sums.by_ref()) {
                    head.checkpoints = Some(sums);
                }
                let [head] = &mut task[..] else { continue };
                if let Some(rows) = left.take() {
                    let (of_head, rest) = rows.split_at(Axis(0), head.group_len());
                    (head.log_normalizer, left) = (Some(of_head), Some(rest));
                }
            }
        }
    }

    /// There is a part for each of so many units, or nothing at all.
    pub(super) fn check(&self, units: usize) -> Result<(), Error> {
        if self.parts.is_empty() {
            return Ok(());
        }
        check::size("record", "heads of all sequences", units, self.parts.len())
    }

    /// Hands on the sums of one of the heads of keys and values of a unit.
    pub(super) fn hand_on_sums<'b>(
        &'b self,
        unit: usize,
        place: usize,
        head: &mut HeadGradient<'b, T>,
    ) {
        head.checkpoints = self.parts.get(unit).and_then(|part| part.sums.get(place));
    }

    /// Hands on what there is of a unit, whose outputs are `out [heads, real queries, d_v]`.
    pub(super) fn hand_on<'b>(
        &'b self,
        unit: usize,
        out: ArrayView3<'b, T>,
        head: &mut HeadGradient<'b, T>,
    ) {
        let Some(Part { log_normalizer, sums }) = self.parts.get(unit) else { return };
        head.checkpoints = sums.first();
        head.record = log_normalizer
            .as_ref()
            .map(|log_normalizer| ForwardRecord { out, log_normalizer: log_normalizer.view() });
    }
}
