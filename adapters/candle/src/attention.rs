//! Attention of a layer over tensors.

use crate::element::{Element, check_device, check_dtype};
use crate::op::{LayerOp, Packed};
use crate::parameters::layer_with;
use candle_core::{DType, Device, Result, Tensor, bail};
use dijiang::ndarray::Array2;
use dijiang::{Mask, MultiHead};
use std::sync::Mutex;

/// Attends in every head: `q [batch, query_heads, n_q, d]`, `k [batch, kv_heads, n_k, d]`,
/// `v [batch, kv_heads, n_k, d_v]` give `[batch, query_heads, n_q, d_v]`, as
/// [`MultiHead::forward`] says. Gradients by the three go through the crate's own backward pass.
///
/// Tensors may have any strides, and are read where they lie. Those of
/// `F16` and `BF16` are widened, one sequence after the other, and the result has their type.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use dijiang::{DctFeatures, LinearAttention, Mask, MultiHead};
///
/// let layer = MultiHead::new(LinearAttention::new(DctFeatures::<f32>::new(16, 32, 0)?), 4, 2)?;
/// let q = Var::randn(0f32, 1., (2, 4, 100, 16), &Device::Cpu)?;
/// let k = Tensor::randn(0f32, 1., (2, 2, 100, 16), &Device::Cpu)?;
/// let v = Tensor::randn(0f32, 1., (2, 2, 100, 8), &Device::Cpu)?;
/// let out = dijiang_candle::attention(&layer, &q, &k, &v, Mask::Causal, None)?;
/// assert_eq!(out.dims(), [2, 4, 100, 8]);
/// let gradients = out.sqr()?.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&q).unwrap().dims(), q.dims());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// What the core reports, in its words; another type than that of the layer; a tensor on another
/// device (see [`via_host`]). Where a kernel has no backward pass, `backward` fails.
pub fn attention<T: Element>(
    layer: &MultiHead<T>,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Mask,
    key_lengths: Option<&[usize]>,
) -> Result<Tensor> {
    attention_with(layer, Extras::default(), [q, k, v], mask, key_lengths)
}

/// What a call may bring beside queries, keys and values; all but a mask can be trained.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extras<'a> {
    /// Log decays `[batch, kv_heads, n_k, 1 or num_features]`, of gated kernels; the mask is then
    /// [`Mask::Causal`].
    pub log_decay: Option<&'a Tensor>,
    /// Which tokens are real, `[batch, n_k]` of type `U8` and not 0: padding may lie anywhere, for
    /// every kernel ([`LayerForward::with_key_mask`](dijiang::LayerForward::with_key_mask)).
    pub key_mask: Option<&'a Tensor>,
    /// What is added to scores, `[1 or batch, 1 or query_heads, n_q, n_k]`, for kernels that take
    /// it ([`LayerForward::with_bias`](dijiang::LayerForward::with_bias)).
    pub bias: Option<&'a Tensor>,
    /// Numbers in the place of [parameters](MultiHead::parameters) of the layer, by their names
    /// ([`parameters`](crate::parameters())).
    pub parameters: &'a [(String, Tensor)],
}

/// As [`attention`], with log decays, masks of keys, biases, and parameters of the layer from
/// tensors.
///
/// Values and extras are copied behind each other, as an operation of candle has three operands.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use dijiang::{LearnedFeatures, LinearAttention, Mask, MultiHead};
/// use dijiang_candle::{Extras, attention_with, parameters};
///
/// let layer = MultiHead::new(LinearAttention::new(LearnedFeatures::<f32>::hedgehog(8)?), 2, 2)?;
/// let vars = parameters(&layer)?
///     .into_iter()
///     .map(|(name, tensor)| Ok((name, Var::from_tensor(&tensor)?)))
///     .collect::<candle_core::Result<Vec<_>>>()?;
/// let named: Vec<_> =
///     vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
/// let x = Tensor::randn(0f32, 1., (1, 2, 50, 8), &Device::Cpu)?;
/// let extras = Extras { parameters: &named, ..Extras::default() };
/// let out = attention_with(&layer, extras, [&x, &x, &x], Mask::Causal, None)?;
/// let gradients = out.sqr()?.sum_all()?.backward()?;
/// assert!(vars.iter().all(|(_, var)| gradients.get(var).is_some()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// As [`attention`]; a name that the layer does not have, or another shape.
pub fn attention_with<T: Element>(
    layer: &MultiHead<T>,
    extras: Extras<'_>,
    [q, k, v]: [&Tensor; 3],
    mask: Mask,
    key_lengths: Option<&[usize]>,
) -> Result<Tensor> {
    for (which, tensor) in [("q", q), ("k", k), ("v", v)] {
        check_device(which, tensor)?;
        check_dtype::<T>(which, tensor.dtype())?;
        if tensor.rank() != 4 {
            bail!("`{which}` has shape {:?} where [batch, heads, n, d] is needed", tensor.shape());
        }
        if tensor.dtype() != q.dtype() {
            bail!("`{which}` is {:?} and `q` {:?}: give both one type", tensor.dtype(), q.dtype());
        }
    }
    let key_lengths = key_lengths.map(<[usize]>::to_vec);
    let Extras { log_decay, key_mask, bias, parameters } = extras;
    let key_mask = key_mask.map(real_tokens).transpose()?;
    // outputs of 16 bits are too coarse to compute with
    let is_kept = |rest: &Tensor| {
        q.dtype() == T::DTYPE && [q, k, rest].iter().any(|tensor| tensor.track_op())
    };
    let records = |rest: &Tensor| is_kept(rest).then(Mutex::default);
    if log_decay.is_none() && bias.is_none() && parameters.is_empty() {
        let (layer, records) = (layer.clone(), records(v));
        let op = LayerOp { layer, mask, key_lengths, key_mask, packed: None, records };
        return q.apply_op3(k, v, op);
    }
    // in the type of the layer, so that no gradient by a parameter is rounded to 16 bits
    let mut parts = vec![v.to_dtype(T::DTYPE)?.flatten_all()?];
    if let Some(log_decay) = log_decay {
        check_device("log_decay", log_decay)?;
        check_dtype::<T>("log_decay", log_decay.dtype())?;
        if mask != Mask::Causal {
            bail!("log decays need an order of tokens: use `Mask::Causal`");
        }
        parts.push(log_decay.to_dtype(T::DTYPE)?.flatten_all()?);
    }
    if let Some(bias) = bias {
        check_device("bias", bias)?;
        check_dtype::<T>("bias", bias.dtype())?;
        parts.push(bias.to_dtype(T::DTYPE)?.flatten_all()?);
    }
    for (name, tensor) in parameters {
        check_device(name, tensor)?;
        parts.push(tensor.to_dtype(T::DTYPE)?.flatten_all()?);
    }
    let packed = Packed {
        values: v.dims4()?.into(),
        log_decay: log_decay.map(|x| x.dims4().map(Into::into)).transpose()?,
        bias: bias.map(|x| x.dims4().map(Into::into)).transpose()?,
        trained: [log_decay, bias].map(|x| x.is_some_and(Tensor::track_op)),
        parameters: parameters
            .iter()
            .map(|(name, tensor)| (name.clone(), tensor.dims().to_vec()))
            .collect(),
    };
    let layer = layer_with(layer, parameters)?;
    let rest = Tensor::cat(&parts, 0)?;
    let records = records(&rest);
    let op = LayerOp { layer, mask, key_lengths, key_mask, packed: Some(packed), records };
    q.apply_op3(k, &rest, op)
}

/// Which tokens a mask of keys `[batch, n_k]` calls real.
pub(crate) fn real_tokens(key_mask: &Tensor) -> Result<Array2<bool>> {
    check_device("key_mask", key_mask)?;
    if key_mask.dtype() != DType::U8 || key_mask.rank() != 2 {
        bail!(
            "`key_mask` is {:?} of shape {:?} where U8 of [batch, n_k] is needed",
            key_mask.dtype(),
            key_mask.shape()
        );
    }
    let real = key_mask.flatten_all()?.to_vec1::<u8>()?.into_iter().map(|x| x != 0).collect();
    Array2::from_shape_vec(key_mask.dims2()?, real).map_err(candle_core::Error::wrap)
}

/// Runs `run` with tensors of another device on the CPU, and brings the result back to that of the
/// first. Gradients take the same way.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use dijiang::{Mask, MultiHead, SoftmaxAttention};
/// use dijiang_candle::{attention, via_host};
///
/// let layer = MultiHead::new(SoftmaxAttention::<f32>::new(8)?, 2, 2)?;
/// let device = Device::cuda_if_available(0)?;
/// let x = Tensor::randn(0f32, 1., (1, 2, 50, 8), &device)?;
/// let out = via_host([&x, &x, &x], |[q, k, v]| {
///     attention(&layer, &q, &k, &v, Mask::Causal, None)
/// })?;
/// assert!(out.device().same_device(&device));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// Those of the copies, and of `run`.
pub fn via_host<const N: usize>(
    tensors: [&Tensor; N],
    run: impl FnOnce([Tensor; N]) -> Result<Tensor>,
) -> Result<Tensor> {
    let mut here = Vec::with_capacity(N);
    for tensor in tensors {
        here.push(tensor.to_device(&Device::Cpu)?);
    }
    let device = tensors.first().map_or(&Device::Cpu, |first| first.device());
    match here.try_into() {
        Ok(here) => run(here)?.to_device(device),
        Err(_) => bail!("there are {N} tensors"),
    }
}
