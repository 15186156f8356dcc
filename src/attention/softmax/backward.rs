//! The backward pass of softmax attention.

use crate::attention::gradient::{ForwardRecord, HeadGradient};
use crate::attention::softmax::answer::{Outputs, answer_block, of_query_head};
use crate::attention::softmax::options::{SINK_LOGITS, SoftmaxAttention};
use crate::check;
use crate::error::Error;
use crate::kernel::buffer::Buffer;
use crate::mask::Mask;
use crate::memory::key_values::KeyValues;
use crate::memory::online_softmax::Tile;
use crate::memory::scoring::Scoring;
use crate::memory::sight::Sight;
use crate::memory::softmax_gradient::{Answered, GradientTile, QUERY_BLOCK, Units, add_gradients};
use crate::memory::unit::{Unit, product};
use crate::scalar::Scalar;
use crate::state_format::StateFormat;
use crate::views::{rows, rows_mut};
use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis, Slice};

/// What a backward pass keeps in the scratch.
#[derive(Debug)]
pub(super) struct BackwardScratch<T> {
    tile: GradientTile<T>,
    again: Again<T>,
    /// Keys and values without those that a mask hides.
    masked: [Buffer<T>; 2],
}

impl<T: Scalar> Default for BackwardScratch<T> {
    fn default() -> Self {
        let masked = [Buffer::new(), Buffer::new()];
        Self { tile: GradientTile::new(), again: Again::new(), masked }
    }
}

/// What the forward pass of a block of queries gives, computed again.
#[derive(Debug)]
struct Again<T> {
    tile: Tile<T>,
    out: Buffer<T>,
    log_normalizer: Buffer<T>,
}

impl<T: Scalar> Again<T> {
    fn new() -> Self {
        Self { tile: Tile::new(), out: Buffer::new(), log_normalizer: Buffer::new() }
    }

    /// Computes it for some queries, the first of which is in row `row`.
    fn answer(
        &mut self,
        q: ArrayView2<'_, T>,
        key_values: KeyValues<'_, T>,
        options: (Scoring<T>, Option<T>),
        sight: Sight<'_, T>,
        row: usize,
    ) -> Result<(ArrayView2<'_, T>, ArrayView1<'_, T>), Error> {
        let shape = (q.nrows(), key_values.value_dim());
        self.out.resize(shape.0 * shape.1);
        self.log_normalizer.resize(shape.0);
        let to = Outputs {
            out: ArrayViewMut2::from_shape(shape, &mut self.out).expect("counted"),
            log_normalizer: Some(ArrayViewMut1::from(&mut *self.log_normalizer)),
        };
        answer_block(q, key_values, options, sight, row, to, &mut self.tile)?;
        let out = ArrayView2::from_shape(shape, &self.out).expect("counted");
        Ok((out, ArrayView1::from(&*self.log_normalizer)))
    }
}

const PACKED: Error = Error::Unsupported {
    what: "the gradient of attention to keys and values in fewer bits",
    why: "rounding has none; use a kernel with `StateFormat::F32`",
};

impl<T: Scalar> SoftmaxAttention<T> {
    /// Adds the gradients of one head of keys and values.
    pub(super) fn backward_head(
        &self,
        head: &mut HeadGradient<'_, T>,
        mask: Mask,
        scratch: &mut BackwardScratch<T>,
    ) -> Result<(), Error> {
        head.check_not_gated()?;
        head.check_backward_masked(self.head_dim, mask)?;
        self.check_mask(mask)?;
        head.check_finite()?;
        let scoring = self.check(head.group_len())?;
        if self.format != StateFormat::F32 {
            return Err(PACKED);
        }
        if let Some(d_parameters) = &head.d_parameters {
            self.numbers().check_names(d_parameters)?;
        }

        let (group, first) = (head.group_len(), mask.first([head.queries(), head.keys()]));
        let HeadGradient { q, k, v, key_mask, bias, d_out, record, .. } = head;
        let HeadGradient { d_q, d_k, d_v, d_bias, d_parameters, .. } = head;
        let BackwardScratch { tile, again, masked: [masked_k, masked_v] } = scratch;
        let key_values = match key_mask {
            // what they hold must not decide the units of the others
            Some(key_mask) => [without(*k, *key_mask, masked_k), without(*v, *key_mask, masked_v)],
            None => [*k, *v],
        };
        let units = key_values.map(Unit::of);
        for g in 0..group {
            let [q, d_out] = [&*q, &*d_out].map(|x| x.index_axis(Axis(0), g));
            let one = QueryHead {
                q,
                d_out,
                units,
                options: self.of_head(scoring, g),
                sight: Sight {
                    first,
                    window: self.window,
                    key_mask: *key_mask,
                    bias: bias.map(|bias| of_query_head(bias, g)),
                },
                record: record.map(|ForwardRecord { out, log_normalizer }| {
                    (out.index_axis_move(Axis(0), g), log_normalizer.index_axis_move(Axis(0), g))
                }),
            };
            let d_q = d_q.index_axis_mut(Axis(0), g);
            let d_bias = d_bias.as_mut().map(|d| {
                let of_head = if d.len_of(Axis(0)) == 1 { 0 } else { g };
                d.index_axis_mut(Axis(0), of_head)
            });
            let d_tokens = [&mut *d_k, &mut *d_v];
            let d_sink = one.add_gradients(key_values, d_q, d_tokens, d_bias, (tile, again))?;
            if let Some(d) = d_parameters.as_mut().and_then(|d| d.get_mut(SINK_LOGITS)) {
                let of_head = if d.len() > 1 { g } else { 0 };
                let d_sink = T::from_f64(d_sink);
                d.iter_mut().skip(of_head).take(1).for_each(|d| *d += d_sink);
            }
        }
        check_range(head)
    }
}

/// Rows, zero where a mask hides them.
fn without<'a, T: Scalar>(
    x: ArrayView2<'_, T>,
    key_mask: ArrayView1<'_, bool>,
    to: &'a mut Buffer<T>,
) -> ArrayView2<'a, T> {
    to.resize(x.len());
    let rows = x.outer_iter().zip(key_mask);
    for ((x, &is_seen), to) in rows.zip(to.chunks_exact_mut(x.ncols())) {
        to.iter_mut().zip(x).for_each(|(to, &x)| *to = if is_seen { x } else { T::zero() });
    }
    ArrayView2::from_shape(x.dim(), to).expect("counted")
}

/// One query head.
#[derive(Debug)]
struct QueryHead<'a, T> {
    q: ArrayView2<'a, T>,
    d_out: ArrayView2<'a, T>,
    /// Those of keys and values.
    units: [Unit; 2],
    /// How it scores, and its learned sink.
    options: (Scoring<T>, Option<T>),
    sight: Sight<'a, T>,
    /// The outputs and logarithms of normalisers of a forward pass.
    record: Option<(ArrayView2<'a, T>, ArrayView1<'a, T>)>,
}

impl<T: Scalar> QueryHead<'_, T> {
    /// Adds the gradients by queries, keys and values; that by the logit of the sink.
    fn add_gradients(
        &self,
        [k, v]: [ArrayView2<'_, T>; 2],
        mut d_q: ArrayViewMut2<'_, T>,
        [d_k, d_v]: [&mut ArrayViewMut2<'_, T>; 2],
        mut d_bias: Option<ArrayViewMut2<'_, T>>,
        (tile, again): (&mut GradientTile<T>, &mut Again<T>),
    ) -> Result<f64, Error> {
        let Self { q, d_out, units: [k_unit, v_unit], options, sight, record } = self;
        let (scoring, sink_logit) = *options;
        let (n, mut d_sink) = (q.nrows(), 0.0);
        for start in (0..n).step_by(QUERY_BLOCK) {
            let block = start..n.min(start + QUERY_BLOCK);
            let sight = sight.of(block.clone());
            let q = rows(*q, block.clone());
            let (out, log_normalizer) = if let Some((out, mut log_normalizer)) = *record {
                log_normalizer.slice_axis_inplace(Axis(0), Slice::from(block.clone()));
                (rows(out, block.clone()), log_normalizer)
            } else {
                again.answer(q, KeyValues::Wide(k, v), *options, sight, start)?
            };
            let answered = Answered { q, out, log_normalizer, sight };
            let d_out = rows(*d_out, block.clone());
            let units = Units { q: Unit::of(q), k: *k_unit, v: *v_unit, d_out: Unit::of(d_out) };
            let d_q = rows_mut(d_q.view_mut(), block.clone());
            let d_bias = d_bias.as_mut().map(|d| rows_mut(d.view_mut(), block));
            let (d_out, d_tokens) = ((d_out, units), [&mut *d_k, &mut *d_v]);
            add_gradients(answered, [k, v], scoring, d_out, d_q, (d_tokens, d_bias), tile);
            if let Some(logit) = sink_logit {
                let [first, second] = product::<f64>(1.0, &[units.d_out, units.v]);
                let sum = weight_of_sink(logit, log_normalizer, tile.means());
                d_sink -= sum * first * second;
            }
        }
        Ok(d_sink)
    }
}

/// `Σ_t exp(logit − log_normalizer_t)·means_t`.
fn weight_of_sink<T: Scalar>(logit: T, log_normalizer: ArrayView1<'_, T>, means: &[T]) -> f64 {
    let weight = |log: &T| (logit.as_f64() - log.as_f64()).exp();
    log_normalizer.iter().zip(means).map(|(log, mean)| weight(log) * mean.as_f64()).sum()
}

/// Gradients must have stayed in the range of the type.
fn check_range<T: Scalar>(head: &HeadGradient<'_, T>) -> Result<(), Error> {
    let of_q = head.d_q.outer_iter().map(|d_q| ("the gradient by `q`", d_q));
    let of_rest = [("the gradient by `k`", &head.d_k), ("the gradient by `v`", &head.d_v)];
    let of_bias = head.d_bias.iter().flat_map(|d| d.outer_iter());
    let of_bias = of_bias.map(|d| ("the gradient by `bias`", d));
    let of_rest = of_rest.map(|(which, d)| (which, d.view()));
    for (which, d) in of_q.chain(of_rest).chain(of_bias) {
        if let Err(Error::NotFinite { row, .. }) = check::finite(which, d) {
            return Err(Error::Overflow { which, row });
        }
    }
    let Some(d) = head.d_parameters.as_ref().and_then(|d| d.get(SINK_LOGITS)) else {
        return Ok(());
    };
    match d.iter().position(|d| !d.is_finite()) {
        Some(row) => Err(Error::Overflow { which: "the gradient by `sink_logits`", row }),
        None => Ok(()),
    }
}
