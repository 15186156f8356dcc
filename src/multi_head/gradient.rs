//! What a backward pass of a layer takes and gives.

use crate::attention::gradient::NO_BIAS_TO_TRAIN;
use crate::check;
use crate::error::Error;
use crate::multi_head::arguments::Arguments;
use crate::multi_head::layout::Dim4;
use crate::multi_head::record::LayerRecord;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use ndarray::{Array4, ArrayView2, ArrayView4, ArrayViewMut4};

/// The arguments of a layer, the gradient of a loss by its outputs, and where the gradients by the
/// arguments go: what [`MultiHead::backward_into`](crate::MultiHead::backward_into) is called with.
/// Views may have any strides.
///
/// Gradients are *added* to what `d_q`, `d_k`, `d_v`, `d_log_decay`, `d_bias` and `d_parameters`
/// hold: begin with zeros. After an error their content is unspecified.
///
/// ```
/// use dijiang::{LayerGradient, LinearAttention, Mask, MultiHead, Performer};
/// use ndarray::Array4;
///
/// let layer = MultiHead::new(LinearAttention::new(Performer::<f32>::new(8, 16, 0)?), 4, 2)?;
/// let wave = |heads| {
///     Array4::from_shape_fn((3, heads, 10, 8), |(b, h, t, c)| ((b + 5 * h + t * c) as f32).sin())
/// };
/// let (q, k, d_out) = (wave(4), wave(2), Array4::ones((3, 4, 10, 8)));
/// let [mut d_q, mut d_k, mut d_v] = [4, 2, 2].map(|heads| Array4::zeros((3, heads, 10, 8)));
/// let mut d_parameters = layer.parameters().zeros_like();
/// let gradient = LayerGradient::new(
///     [q.view(), k.view(), k.view()],
///     d_out.view(),
///     [d_q.view_mut(), d_k.view_mut(), d_v.view_mut()],
/// );
/// let gradient = gradient.with_parameters(&mut d_parameters);
/// layer.backward_into(gradient, Mask::Causal, None)?;
/// // each query hands on a weight of one in all
/// assert!((d_v.sum() - (3 * 4 * 10 * 8) as f32).abs() < 1e-2);
/// assert_eq!(d_parameters.get("heads.0.map.projection").unwrap().shape(), [16, 8]);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug)]
pub struct LayerGradient<'a, T> {
    /// Queries `[batch, query_heads, n_q, d]`.
    pub q: ArrayView4<'a, T>,
    /// Keys `[batch, kv_heads, n_k, d]`.
    pub k: ArrayView4<'a, T>,
    /// Values `[batch, kv_heads, n_k, d_v]`.
    pub v: ArrayView4<'a, T>,
    /// Log decays `[batch, kv_heads, n_k, 1 or num_features]`, of gated kernels.
    pub log_decay: Option<ArrayView4<'a, T>>,
    /// Which tokens are real, `[batch, n_k]`; the others get no gradient
    /// ([`LayerForward::with_key_mask`](crate::LayerForward::with_key_mask)).
    pub key_mask: Option<ArrayView2<'a, bool>>,
    /// What is added to scores, `[1 or batch, 1 or query_heads, n_q, n_k]`.
    pub bias: Option<ArrayView4<'a, T>>,
    /// The gradient by the outputs, `[batch, query_heads, n_q, d_v]`.
    pub d_out: ArrayView4<'a, T>,
    /// What the forward pass of the same call has kept, and its outputs
    /// `[batch, query_heads, n_q, d_v]`.
    pub record: Option<(&'a LayerRecord<T>, ArrayView4<'a, T>)>,
    /// The gradient by the queries, of their shape.
    pub d_q: ArrayViewMut4<'a, T>,
    /// The gradient by the keys, summed over the query heads that use them, of their shape.
    pub d_k: ArrayViewMut4<'a, T>,
    /// The gradient by the values, summed over the query heads that use them, of their shape.
    pub d_v: ArrayViewMut4<'a, T>,
    /// The gradient by the log decays, of their shape; none is computed where there is no room for
    /// it.
    pub d_log_decay: Option<ArrayViewMut4<'a, T>>,
    /// The gradient by the biases, of their shape, summed over what shares one; none is computed
    /// where there is no room for it.
    pub d_bias: Option<ArrayViewMut4<'a, T>>,
    /// The gradient by the [parameters](crate::MultiHead::parameters) of the layer, by their names;
    /// none is computed for names that are not there.
    pub d_parameters: Option<&'a mut Parameters<T>>,
}

/// The gradients that [`MultiHead::backward`](crate::MultiHead::backward) and
/// [`MultiHead::backward_gated`](crate::MultiHead::backward_gated) give.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerGradients<T> {
    /// By the queries, `[batch, query_heads, n_q, d]`.
    pub q: Array4<T>,
    /// By the keys, `[batch, kv_heads, n_k, d]`.
    pub k: Array4<T>,
    /// By the values, `[batch, kv_heads, n_k, d_v]`.
    pub v: Array4<T>,
    /// By the log decays, `[batch, kv_heads, n_k, 1 or num_features]`, if there are any.
    pub log_decay: Option<Array4<T>>,
    /// By the [parameters](crate::MultiHead::parameters) of the layer, summed over the sequences.
    pub parameters: Parameters<T>,
}

impl<'a, T> LayerGradient<'a, T> {
    /// Queries, keys and values, the gradient by the outputs, and the gradients by the first three:
    /// shapes are those of the [fields](Self#fields).
    #[must_use]
    pub fn new(
        [q, k, v]: [ArrayView4<'a, T>; 3],
        d_out: ArrayView4<'a, T>,
        [d_q, d_k, d_v]: [ArrayViewMut4<'a, T>; 3],
    ) -> Self {
        Self {
            q,
            k,
            v,
            log_decay: None,
            key_mask: None,
            bias: None,
            d_out,
            record: None,
            d_q,
            d_k,
            d_v,
            d_log_decay: None,
            d_bias: None,
            d_parameters: None,
        }
    }

    /// Brings the log decays of the tokens and room for the gradient by them, both
    /// `[batch, kv_heads, n_k, 1 or num_features]`.
    #[must_use]
    pub fn with_log_decay(
        self,
        log_decay: ArrayView4<'a, T>,
        d_log_decay: ArrayViewMut4<'a, T>,
    ) -> Self {
        Self { log_decay: Some(log_decay), d_log_decay: Some(d_log_decay), ..self }
    }

    /// Says which tokens are real, `[batch, n_k]`.
    #[must_use]
    pub fn with_key_mask(self, key_mask: ArrayView2<'a, bool>) -> Self {
        Self { key_mask: Some(key_mask), ..self }
    }

    /// Brings biases of scores, `[1 or batch, 1 or query_heads, n_q, n_k]`, and room of their shape
    /// for the gradient by them, if it is wanted.
    #[must_use]
    pub fn with_bias(self, bias: ArrayView4<'a, T>, d_bias: Option<ArrayViewMut4<'a, T>>) -> Self {
        Self { bias: Some(bias), d_bias, ..self }
    }

    /// Brings what the forward pass of the same call has kept, and its outputs: gradients are wrong
    /// where they are those of another one.
    #[must_use]
    pub fn with_record(self, record: &'a LayerRecord<T>, out: ArrayView4<'a, T>) -> Self {
        Self { record: Some((record, out)), ..self }
    }

    /// Asks for the gradient by parameters of these names.
    #[must_use]
    pub fn with_parameters(self, d_parameters: &'a mut Parameters<T>) -> Self {
        Self { d_parameters: Some(d_parameters), ..self }
    }
}

impl<'a, T: Scalar> LayerGradient<'a, T> {
    /// The arguments, for a shorter time.
    pub(super) fn arguments<'b>(&self) -> Arguments<'b, T>
    where
        'a: 'b,
    {
        let Self { q, k, v, log_decay, bias, .. } = self;
        let qkv = [*q, *k, *v].map(ArrayView4::reborrow);
        let [log_decay, bias] = [log_decay, bias].map(|x| x.map(ArrayView4::reborrow));
        Arguments { qkv, log_decay, bias }
    }

    /// Gradients have the shapes of what they are gradients by.
    pub(super) fn check_shapes(&self) -> Result<(), Error> {
        let Self { q, k, v, d_out, d_q, d_k, d_v, .. } = self;
        let (batch, heads, tokens, _) = q.dim();
        check_dim("d_out", (batch, heads, tokens, v.dim().3), d_out.dim())?;
        check_dim("d_q", q.dim(), d_q.dim())?;
        check_dim("d_k", k.dim(), d_k.dim())?;
        check_dim("d_v", v.dim(), d_v.dim())?;
        if let Some((_, out)) = &self.record {
            check_dim("record.out", d_out.dim(), out.dim())?;
        }
        match (&self.log_decay, &self.d_log_decay) {
            (_, None) => {}
            (Some(x), Some(d)) => check_dim("d_log_decay", x.dim(), d.dim())?,
            (None, Some(_)) => return Err(NO_LOG_DECAY),
        }
        match (&self.bias, &self.d_bias) {
            (_, None) => Ok(()),
            (Some(x), Some(d)) => check_dim("d_bias", x.dim(), d.dim()),
            (None, Some(_)) => Err(NO_BIAS_TO_TRAIN),
        }
    }
}

const NO_LOG_DECAY: Error = Error::Unsupported {
    what: "the gradient by log decays that are not there",
    why: "set `LayerGradient::log_decay`, with `with_log_decay`",
};

fn check_dim(which: &'static str, expected: Dim4, found: Dim4) -> Result<(), Error> {
    check::size(which, "sequences", expected.0, found.0)?;
    check::size(which, "heads", expected.1, found.1)?;
    check::size(which, "rows", expected.2, found.2)?;
    check::size(which, "columns", expected.3, found.3)
}
