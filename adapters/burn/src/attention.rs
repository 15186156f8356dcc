//! Attention of tensors by a layer of kernels.

use crate::backend::AttentionBackend;
use crate::call::Call;
use crate::parameters::TensorParameters;
use crate::real::{Real, check_dtype};
use burn::backend::Dispatch;
use burn::tensor::{Bool, Tensor};
use dijiang::ndarray::Array2;
use dijiang::{Mask, MultiHead};

/// What [`attention`] is called with beside queries, keys and values.
#[derive(Clone, Debug)]
pub struct AttentionOptions {
    /// Which keys a query sees.
    pub mask: Mask,
    /// How many keys of each sequence are real; the others are padding, never read. With
    /// [`Mask::Causal`] queries beyond are padding too: their outputs and gradients are zero.
    /// `None`: all.
    pub key_lengths: Option<Vec<usize>>,
    /// True where a key is padding, which may lie anywhere, `[batch, n_k]`: each sequence gets what
    /// it would get without it, of every kernel
    /// ([`LayerForward::with_key_mask`](dijiang::LayerForward::with_key_mask)). `None`: nowhere.
    pub mask_pad: Option<Tensor<2, Bool>>,
    /// What is added to scores, `[1 or batch, 1 or query_heads, n_q, n_k]`, in kernels of exact
    /// softmax; it gets a gradient
    /// ([`LayerForward::with_bias`](dijiang::LayerForward::with_bias)).
    pub attn_bias: Option<Tensor<4>>,
    /// Log decays `[batch, kv_heads, n, 1 or num_features]`, for gated kernels, with
    /// [`Mask::Causal`]; they get a gradient.
    pub log_decay: Option<Tensor<4>>,
}

impl AttentionOptions {
    /// Each query sees the keys up to its own.
    #[must_use]
    pub fn causal() -> Self {
        let (key_lengths, mask_pad, attn_bias, log_decay) = (None, None, None, None);
        Self { mask: Mask::Causal, key_lengths, mask_pad, attn_bias, log_decay }
    }

    /// Each query sees every key.
    #[must_use]
    pub fn full() -> Self {
        Self { mask: Mask::Full, ..Self::causal() }
    }

    /// Sets how many keys of each sequence are real.
    #[must_use]
    pub fn with_key_lengths(mut self, key_lengths: Vec<usize>) -> Self {
        self.key_lengths = Some(key_lengths);
        self
    }

    /// Sets where keys are padding, `[batch, n_k]`.
    #[must_use]
    pub fn with_mask_pad(mut self, mask_pad: Tensor<2, Bool>) -> Self {
        self.mask_pad = Some(mask_pad);
        self
    }

    /// Sets what is added to scores, `[1 or batch, 1 or query_heads, n_q, n_k]`.
    #[must_use]
    pub fn with_attn_bias(mut self, attn_bias: Tensor<4>) -> Self {
        self.attn_bias = Some(attn_bias);
        self
    }

    /// Sets the log decays, `[batch, kv_heads, n, 1 or num_features]`.
    #[must_use]
    pub fn with_log_decay(mut self, log_decay: Tensor<4>) -> Self {
        self.log_decay = Some(log_decay);
        self
    }
}

/// Attends in every head: `q [batch, query_heads, n_q, d]`, `k [batch, kv_heads, n_k, d]` and
/// `v [batch, kv_heads, n_k, d_v]` give `[batch, query_heads, n_q, d_v]`.
///
/// Queries and keys are raw: the kernel applies the scale. Tensors are read where they lie, of any
/// strides; only one with a flipped axis is copied. On a device with autodiff the gradients by `q`,
/// `k`, `v`, log decays and biases are those of [`MultiHead::backward_into`], which needs inputs
/// and outputs, a number for each query or some sums, and no weights. The numbers of the kernel
/// itself are constants: [`attention_with`] trains them.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use dijiang_burn::dijiang::{DctFeatures, LinearAttention, MultiHead};
/// use dijiang_burn::{AttentionOptions, attention};
///
/// // 4 query heads on 2 kv heads
/// let layer = MultiHead::new(LinearAttention::new(DctFeatures::<f32>::new(16, 32, 0)?), 4, 2)?;
/// let device = Device::flex().autodiff();
/// let [q, k, v] = [4, 2, 2].map(|heads| {
///     Tensor::<4>::random([3, heads, 10, 16], Distribution::Default, &device).require_grad()
/// });
/// let out = attention(&layer, q.clone(), k, v, &AttentionOptions::causal());
/// assert_eq!(out.dims(), [3, 4, 10, 16]);
/// let gradients = out.sum().backward();
/// assert_eq!(q.grad(&gradients).unwrap().dims(), [3, 4, 10, 16]);
/// # Ok::<(), dijiang_burn::dijiang::Error>(())
/// ```
///
/// # Panics
///
/// With the words of an error of [`MultiHead::forward`] or, in a backward pass, of
/// [`MultiHead::backward`]: shapes that do not fit, numbers that are not finite. If a tensor has
/// other numbers than `T`, or is not on the device of the Flex backend.
#[must_use]
pub fn attention<T: Real>(
    layer: &MultiHead<T>,
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    options: &AttentionOptions,
) -> Tensor<4> {
    attention_with(layer, &TensorParameters::new(), q, k, v, options)
}

/// As [`attention`], with tensors in the place of the layer's parameters of their names, which get
/// a gradient; the other parameters stay what they are in the layer.
///
/// Parameters are copied into the kernels at each call. A map that is costly to make anew from its
/// parameters costs that much.
///
/// # Panics
///
/// As [`attention`], and if there is no parameter of a name, or it has another shape.
#[must_use]
pub fn attention_with<T: Real>(
    layer: &MultiHead<T>,
    parameters: &TensorParameters,
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    options: &AttentionOptions,
) -> Tensor<4> {
    let (row, shapes) = parameters.packed();
    for (which, x) in [("q", &q), ("k", &k), ("v", &v)] {
        check_dtype::<T>(which, x.dtype());
    }
    for (which, x) in [("log_decay", &options.log_decay), ("attn_bias", &options.attn_bias)] {
        if let Some(x) = x {
            check_dtype::<T>(which, x.dtype());
        }
    }
    if let Some(row) = &row {
        check_dtype::<T>("parameters", row.dtype());
    }
    let call = Call {
        layer: layer.clone(),
        mask: options.mask,
        key_lengths: options.key_lengths.clone(),
        key_mask: options.mask_pad.as_ref().map(real_tokens),
        is_biased: options.attn_bias.is_some(),
        is_gated: options.log_decay.is_some(),
        parameters: shapes,
    };
    // an operation has a fixed number of inputs: what is not there is a tensor that nobody reads
    let nothing = Tensor::<1>::zeros([1], &q.device());
    let [log_decay, bias] = [&options.log_decay, &options.attn_bias].map(|x| match x {
        Some(x) => x.clone().into_dispatch(),
        None => nothing.clone().into_dispatch(),
    });
    let parameters = row.unwrap_or(nothing).into_dispatch();
    let [q, k, v] = [q, k, v].map(Tensor::into_dispatch);
    Tensor::from_dispatch(Dispatch::attend(q, k, v, log_decay, bias, parameters, call))
}

/// What is no padding.
pub(crate) fn real_tokens(mask_pad: &Tensor<2, Bool>) -> Array2<bool> {
    let real = mask_pad.to_data().iter::<bool>().map(|is_pad| !is_pad).collect();
    Array2::from_shape_vec(mask_pad.dims(), real).expect("as many as the tensor has")
}
