//! Layers over the memory of other libraries: slices with a shape and strides.

use crate::error::Error;
use crate::mask::Mask;
use crate::multi_head::MultiHead;
use crate::multi_head::arguments::LayerForward;
use crate::multi_head::gradient::LayerGradient;
use crate::multi_head::stream::MultiHeadStream;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use ndarray::{ArrayView4, ArrayViewMut4, Dim, ShapeBuilder};

/// A tensor `[batch, heads, n, columns]` where another library has it: `data` begins with its first
/// number, and from one index of an axis to the next it is `strides` numbers. A stride may be 0 (an
/// axis that is broadcast), and axes may be in any order.
///
/// ```
/// use dijiang::{Mask, MultiHead, RawTensor, SoftmaxAttention};
///
/// let layer = MultiHead::new(SoftmaxAttention::<f32>::new(4)?, 2, 1)?;
/// // rows of a projection, [batch, n, heads · d], seen as heads
/// let rows = [0.5_f32; 3 * 5 * 8];
/// let q = RawTensor::new(&rows, [3, 2, 5, 4], [40, 4, 8, 1])?;
/// let kv = RawTensor::new(&rows, [3, 1, 5, 4], [40, 4, 8, 1])?;
/// let mut out = vec![0.0; 3 * 2 * 5 * 4];
/// layer.forward_raw([q, kv, kv], None, Mask::Causal, None, &mut out)?;
/// assert!(out.iter().all(|x| (x - 0.5).abs() < 1e-6));
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct RawTensor<'a, T> {
    view: ArrayView4<'a, T>,
}

impl<'a, T> RawTensor<'a, T> {
    /// A tensor of this shape and these strides.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if it goes beyond the data.
    pub fn new(data: &'a [T], shape: [usize; 4], strides: [usize; 4]) -> Result<Self, Error> {
        // larger ones would be read as negative
        let view = strides.iter().all(|&stride| isize::try_from(stride).is_ok());
        let view = view.then(|| ArrayView4::from_shape(Dim(shape).strides(Dim(strides)), data));
        let view = view.and_then(Result::ok);
        view.map(|view| Self { view }).ok_or_else(|| Error::InvalidOption {
            which: "strides",
            found: format!("{strides:?} of shape {shape:?} in {} numbers", data.len()),
            needed: "a tensor within its data",
        })
    }

    /// A tensor whose numbers follow each other, the last axis fastest.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn contiguous(data: &'a [T], shape: [usize; 4]) -> Result<Self, Error> {
        let [_, heads, n, columns] = shape;
        let row = n.saturating_mul(columns);
        Self::new(data, shape, [heads.saturating_mul(row), row, columns, 1])
    }

    /// The same as a view of arrays.
    #[must_use]
    pub fn view(&self) -> ArrayView4<'a, T> {
        self.view
    }

    /// `[batch, heads, n, columns]`.
    #[must_use]
    pub fn shape(&self) -> [usize; 4] {
        self.view.dim().into()
    }
}

/// Where the gradients by the arguments of a layer are added: contiguous, of the shapes of the
/// arguments.
#[derive(Debug)]
pub struct RawGradients<'a, T> {
    /// By the queries.
    pub d_q: &'a mut [T],
    /// By the keys, summed over the query heads that use them.
    pub d_k: &'a mut [T],
    /// By the values, summed over the query heads that use them.
    pub d_v: &'a mut [T],
    /// By the log decays; none is computed where there is no room for it.
    pub d_log_decay: Option<&'a mut [T]>,
    /// By the [parameters](MultiHead::parameters) of the layer; none is computed for names that are
    /// not there.
    pub d_parameters: Option<&'a mut Parameters<T>>,
}

/// A contiguous tensor to write to.
fn contiguous<'a, T>(
    which: &'static str,
    data: &'a mut [T],
    shape: [usize; 4],
) -> Result<ArrayViewMut4<'a, T>, Error> {
    let found = data.len();
    let size = shape.iter().try_fold(1_usize, |size, &axis| size.checked_mul(axis));
    if size != Some(found) {
        let expected = size.unwrap_or(usize::MAX);
        return Err(Error::Shape { which, axis: "numbers", expected, found });
    }
    ArrayViewMut4::from_shape(shape, data).map_err(|_| Error::Shape {
        which,
        axis: "numbers",
        expected: found,
        found,
    })
}

impl<T: Scalar> MultiHead<T> {
    /// As [`forward_into`](Self::forward_into), with log decays as
    /// [`forward_gated`](Self::forward_gated): `out` is contiguous,
    /// `[batch, query_heads, n_q, d_v]`.
    ///
    /// # Errors
    ///
    /// As [`forward_gated`](Self::forward_gated); [`Error::Shape`] if `out` has another length.
    pub fn forward_raw(
        &self,
        [q, k, v]: [RawTensor<'_, T>; 3],
        log_decay: Option<RawTensor<'_, T>>,
        mask: Mask,
        key_lengths: Option<&[usize]>,
        out: &mut [T],
    ) -> Result<(), Error> {
        let out = contiguous("out", out, outputs(q, v))?;
        let forward = LayerForward::new([q.view, k.view, v.view], out);
        let log_decay = log_decay.map(|x| x.view);
        self.forward_with(LayerForward { log_decay, ..forward }, mask, key_lengths)
    }

    /// As [`backward_into`](Self::backward_into): gradients are added.
    ///
    /// # Errors
    ///
    /// As [`backward_into`](Self::backward_into).
    pub fn backward_raw(
        &self,
        [q, k, v]: [RawTensor<'_, T>; 3],
        log_decay: Option<RawTensor<'_, T>>,
        mask: Mask,
        key_lengths: Option<&[usize]>,
        d_out: RawTensor<'_, T>,
        gradients: RawGradients<'_, T>,
    ) -> Result<(), Error> {
        let RawGradients { d_q, d_k, d_v, d_log_decay, d_parameters } = gradients;
        let views = [
            contiguous("d_q", d_q, q.shape())?,
            contiguous("d_k", d_k, k.shape())?,
            contiguous("d_v", d_v, v.shape())?,
        ];
        let d_log_decay = match (d_log_decay, log_decay) {
            (Some(d), Some(x)) => Some(contiguous("d_log_decay", d, x.shape())?),
            (Some(d), None) => Some(contiguous("d_log_decay", d, [0; 4])?),
            (None, _) => None,
        };
        let gradient = LayerGradient {
            log_decay: log_decay.map(|x| x.view),
            d_log_decay,
            d_parameters,
            ..LayerGradient::new([q.view, k.view, v.view], d_out.view, views)
        };
        self.backward_into(gradient, mask, key_lengths)
    }
}

impl<T: Scalar> MultiHeadStream<T> {
    /// As [`extend`](Self::extend), with log decays as [`extend_gated`](Self::extend_gated): `out`
    /// is contiguous, `[batch, query_heads, n, value_dim]`.
    ///
    /// # Errors
    ///
    /// As [`extend_gated`](Self::extend_gated); [`Error::Shape`] if `out` has another length.
    pub fn extend_raw(
        &mut self,
        [q, k, v]: [RawTensor<'_, T>; 3],
        log_decay: Option<RawTensor<'_, T>>,
        lengths: Option<&[usize]>,
        out: &mut [T],
    ) -> Result<(), Error> {
        let out = contiguous("out", out, outputs(q, v))?;
        let step = LayerForward::new([q.view, k.view, v.view], out);
        let log_decay = log_decay.map(|x| x.view);
        self.extend_with(LayerForward { log_decay, ..step }, lengths)
    }
}

/// The shape of the outputs.
fn outputs<T>(q: RawTensor<'_, T>, v: RawTensor<'_, T>) -> [usize; 4] {
    let [batch, heads, n, _] = q.shape();
    [batch, heads, n, v.shape()[3]]
}
