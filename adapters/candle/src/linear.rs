//! Linear attention over features of one's own.

use crate::attention::{Extras, attention_with};
use crate::element::{Element, refused};
use crate::scaled::ScaledFeatures;
use candle_core::{D, DType, Result, Tensor, bail};
use dijiang::{FeatureMap, IdentityFeatures, LinearAttention, Mask, MultiHead};

/// Tokens that are taken together by tensor operations.
const CHUNK: usize = 64;

/// A log decay that leaves nothing in any type, and is a number.
const LEAST_LOG_DECAY: f64 = -100.0;

/// Causal linear attention, `o_t = Σ_{s≤t} (φ_q(t)·φ_k(s)) v_s / Σ_{s≤t} φ_q(t)·φ_k(s)`:
/// `phi_q [batch, query_heads, n, m]`, `phi_k [batch, kv_heads, n, m]`,
/// `v [batch, kv_heads, n, d_v]` give `[batch, query_heads, n, d_v]`. With
/// `log_decay [batch, kv_heads, n, 1 or m]`, each at most 0, token `t` first multiplies what came
/// before it by `e^{log_decay_t}`. Everything can be trained.
///
/// On the CPU this is the crate's own kernel; on another device, operations of candle
/// ([`linear_attention_in_operations`]).
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use dijiang_candle::linear_attention;
///
/// // φ(x) = elu(x) + 1
/// let x = Var::randn(0f32, 1., (2, 4, 100, 16), &Device::Cpu)?;
/// let phi = (x.elu(1.0)? + 1.0)?;
/// let out = linear_attention(&phi, &phi, &x, None)?;
/// assert!(out.sum_all()?.backward()?.get(&x).is_some());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// What the core reports: shapes, numbers that are not finite, a denominator that is not positive.
pub fn linear_attention(
    phi_q: &Tensor,
    phi_k: &Tensor,
    v: &Tensor,
    log_decay: Option<&Tensor>,
) -> Result<Tensor> {
    if !phi_q.device().is_cpu() {
        return linear_attention_in_operations([phi_q, phi_k, v], None, log_decay);
    }
    let m = phi_k.dim(D::Minus1)?;
    match phi_q.dtype() {
        DType::F64 => {
            let map = IdentityFeatures::<f64>::new(m).map_err(refused)?;
            of_map(map, [phi_q, phi_k, v], log_decay)
        }
        _ => {
            let map = IdentityFeatures::<f32>::new(m).map_err(refused)?;
            of_map(map, [phi_q, phi_k, v], log_decay)
        }
    }
}

/// As [`linear_attention`], of features in units of their own, `φ = values·e^{log_scale}`: what
/// [`features`](crate::features()) gives, of queries and of keys. No exponential overflows.
///
/// Log scales are constants of the gradient, as [`features`](crate::features()) says.
///
/// ```
/// use candle_core::{Device, Var};
/// use dijiang::{Performer, Side};
/// use dijiang_candle::{features, linear_attention_scaled};
/// use std::sync::Arc;
///
/// let map = Arc::new(Performer::<f32>::new(16, 64, 0)?);
/// let x = Var::randn(0f32, 4., (1, 2, 100, 16), &Device::Cpu)?; // e^{−|x|²/2} is 0
/// let q = features(&map, Side::Query, &x)?;
/// let k = features(&map, Side::Key, &x)?;
/// let out = linear_attention_scaled((&q.0, &q.1), (&k.0, &k.1), &x, None)?;
/// assert!(out.abs()?.max_all()?.to_scalar::<f32>()?.is_finite());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// As [`linear_attention`].
pub fn linear_attention_scaled(
    phi_q: (&Tensor, &Tensor),
    phi_k: (&Tensor, &Tensor),
    v: &Tensor,
    log_decay: Option<&Tensor>,
) -> Result<Tensor> {
    if !v.device().is_cpu() {
        // those of the queries are the same in numerator and denominator
        let tensors = [phi_q.0, phi_k.0, v];
        return linear_attention_in_operations(tensors, Some(phi_k.1), log_decay);
    }
    let m = phi_k.0.dim(D::Minus1)?;
    let with_scale = |(values, log_scale): (&Tensor, &Tensor)| {
        Tensor::cat(&[values, &log_scale.detach()], D::Minus1)
    };
    let (q, k) = (with_scale(phi_q)?, with_scale(phi_k)?);
    let wide = v.to_dtype(q.dtype())?;
    let out = match q.dtype() {
        DType::F64 => of_map::<f64>(ScaledFeatures::new(m), [&q, &k, &wide], log_decay),
        _ => of_map::<f32>(ScaledFeatures::new(m), [&q, &k, &wide], log_decay),
    };
    out?.to_dtype(v.dtype())
}

fn of_map<T: Element>(
    map: impl FeatureMap<T> + 'static,
    [q, k, v]: [&Tensor; 3],
    log_decay: Option<&Tensor>,
) -> Result<Tensor> {
    let kernel = LinearAttention::new(map).with_scale(1.0);
    let kernel = if log_decay.is_some() { kernel.gated() } else { kernel };
    let layer = MultiHead::new(kernel, q.dim(1)?, k.dim(1)?).map_err(refused)?;
    attention_with(&layer, Extras { log_decay, ..Extras::default() }, [q, k, v], Mask::Causal, None)
}

/// As [`linear_attention`], in operations of candle, which run and differentiate on every device:
/// chunks of 64 tokens, one after the other. `log_scale [batch, kv_heads, n, 1]` is that of the
/// keys; sums are kept in units of their running maximum.
///
/// # Errors
///
/// Those of candle; shapes that do not fit, log decays by feature among them (give one for each
/// token). Decays below `e^{−100}` are taken for that.
pub fn linear_attention_in_operations(
    [phi_q, phi_k, v]: [&Tensor; 3],
    log_scale: Option<&Tensor>,
    log_decay: Option<&Tensor>,
) -> Result<Tensor> {
    let (batch, heads, n, m) = phi_q.dims4()?;
    let (_, kv_heads, _, d_v) = v.dims4()?;
    let of_keys = [("phi_k", Some(phi_k), m), ("v", Some(v), d_v), ("log_scale", log_scale, 1)];
    for (which, tensor, columns) in of_keys.into_iter().chain([("log_decay", log_decay, 1)]) {
        let expected = (batch, kv_heads, n, columns);
        if let Some(tensor) = tensor
            && tensor.dims4()? != expected
        {
            bail!("`{which}` has shape {:?} where {expected:?} is needed", tensor.shape());
        }
    }
    if n == 0 {
        return Tensor::zeros((batch, heads, 0, d_v), v.dtype(), v.device());
    }
    if kv_heads == 0 || heads % kv_heads != 0 {
        bail!("`phi_q` has {heads} heads, which is no multiple of the {kv_heads} of `v`");
    }
    let group = heads / kv_heads;
    let of_group = |x: &Tensor| -> Result<Tensor> {
        let (_, _, n, columns) = x.dims4()?;
        let x = x.unsqueeze(2)?.expand((batch, kv_heads, group, n, columns))?;
        x.reshape((batch, heads, n, columns))
    };
    let (k, v) = (of_group(phi_k)?, of_group(v)?);
    let log_decay = log_decay.map(|x| of_group(&x.maximum(LEAST_LOG_DECAY)?)).transpose()?;
    let log_scale = log_scale.map(|x| of_group(&x.detach())).transpose()?;
    let ones = Tensor::ones((batch, heads, n, 1), v.dtype(), v.device())?;
    let v = Tensor::cat(&[&v, &ones], D::Minus1)?;
    let mut sums = Tensor::zeros((batch, heads, m, d_v + 1), v.dtype(), v.device())?;
    let mut unit: Option<Tensor> = None;
    let mut outputs = Vec::with_capacity(n.div_ceil(CHUNK));
    for start in (0..n).step_by(CHUNK) {
        let len = CHUNK.min(n - start);
        let part = |x: &Tensor| x.narrow(2, start, len)?.contiguous();
        let (q, mut k, v) = (part(phi_q)?, part(&k)?, part(&v)?);
        if let Some(log_scale) = &log_scale {
            let log_scale = part(log_scale)?;
            let mut largest = log_scale.max_keepdim(2)?;
            if let Some(unit) = &unit {
                largest = largest.maximum(unit)?;
                sums = sums.broadcast_mul(&(unit - &largest)?.exp()?)?;
            }
            k = k.broadcast_mul(&log_scale.broadcast_sub(&largest)?.exp()?)?;
            unit = Some(largest);
        }
        let mut weights = q.matmul(&k.t()?.contiguous()?)?;
        let mask = Tensor::tril2(len, v.dtype(), v.device())?;
        let out = if let Some(log_decay) = &log_decay {
            // b_t, the decay from the sums to token t; e^{b_t − b_s} between two tokens
            let b = part(log_decay)?.cumsum(2)?;
            let between = b.broadcast_sub(&b.t()?)?.broadcast_mul(&mask)?.exp()?;
            weights = weights.mul(&between)?.broadcast_mul(&mask)?;
            let last = b.narrow(2, len - 1, 1)?;
            let past = q.matmul(&sums)?.broadcast_mul(&b.exp()?)?;
            let left = last.broadcast_sub(&b)?.exp()?;
            k = k.broadcast_mul(&left)?;
            sums = sums.broadcast_mul(&last.exp()?)?;
            past
        } else {
            weights = weights.broadcast_mul(&mask)?;
            q.matmul(&sums)?
        };
        outputs.push((out + weights.matmul(&v)?)?);
        sums = (sums + k.t()?.contiguous()?.matmul(&v)?)?;
    }
    let out = Tensor::cat(&outputs, 2)?;
    let (numerator, denominator) = (out.narrow(3, 0, d_v)?, out.narrow(3, d_v, 1)?);
    numerator.broadcast_div(&denominator)
}
