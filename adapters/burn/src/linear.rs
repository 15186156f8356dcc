//! Linear attention of features that the caller computes, in tensor operations.

use burn::tensor::{Bool, Tensor, s};

/// What [`linear_attention`] is called with beside features and values.
#[derive(Clone, Debug)]
pub struct LinearOptions {
    /// Logarithms `[batch, kv_heads, n]` of a factor of each key's features, so that exponential
    /// features neither overflow nor vanish: where `φ(k) = exp(z)`, hand over `exp(z − max z)` and
    /// `max z`. Those of queries cancel.
    pub log_scale: Option<Tensor<3>>,
    /// Log decays `[batch, kv_heads, n]`: what came before token `t` is multiplied by
    /// `exp(log_decay[t])`. They are finite: −100 leaves nothing.
    pub log_decay: Option<Tensor<3>>,
    /// Tokens that attend to each other by a matrix of weights before the sums take them in: 64
    /// unless set.
    pub chunk: usize,
}

impl Default for LinearOptions {
    fn default() -> Self {
        Self { log_scale: None, log_decay: None, chunk: 64 }
    }
}

impl LinearOptions {
    /// Sets the log scales of keys, `[batch, kv_heads, n]`.
    #[must_use]
    pub fn with_log_scale(mut self, log_scale: Tensor<3>) -> Self {
        self.log_scale = Some(log_scale);
        self
    }

    /// Sets the log decays, `[batch, kv_heads, n]`.
    #[must_use]
    pub fn with_log_decay(mut self, log_decay: Tensor<3>) -> Self {
        self.log_decay = Some(log_decay);
        self
    }

    /// Sets the tokens of a chunk.
    #[must_use]
    pub fn with_chunk(mut self, chunk: usize) -> Self {
        self.chunk = chunk;
        self
    }
}

/// Causal linear attention of features of your own: `phi_q [batch, query_heads, n, m]`,
/// `phi_k [batch, kv_heads, n, m]` and `v [batch, kv_heads, n, d_v]` give
/// `[batch, query_heads, n, d_v]`,
///
/// ```text
/// o_t = Σ_{s ≤ t} w_ts v_s / Σ_{s ≤ t} w_ts,
/// w_ts = φ_q(t)·φ_k(s)·exp(log_scale_s + Σ_{s < i ≤ t} log_decay_i)
/// ```
///
/// in chunks of tensor operations, so that it runs and differentiates on every backend, by every
/// argument: features can be a network. Exponents are taken relative to the largest that a query
/// sees. Where features come from a map of dijiang, [`attention`](crate::attention) is faster.
///
/// Nothing is checked but shapes: where no feature of a query meets one of its keys, the output is
/// NaN.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor, activation};
/// use dijiang_burn::{LinearOptions, linear_attention};
///
/// let device = Device::flex().autodiff();
/// let x = || Tensor::<4>::random([1, 2, 100, 8], Distribution::Default, &device).require_grad();
/// let (q, k, v) = (x(), x(), x());
/// let phi = |x: Tensor<4>| activation::softmax(x, 3);
/// let out = linear_attention(phi(q.clone()), phi(k), v, &LinearOptions::default());
/// assert!(q.grad(&out.sum().backward()).is_some());
/// ```
///
/// # Panics
///
/// If shapes do not fit together, there is no token, or a chunk has none.
#[must_use]
pub fn linear_attention(
    phi_q: Tensor<4>,
    phi_k: Tensor<4>,
    v: Tensor<4>,
    options: &LinearOptions,
) -> Tensor<4> {
    check_shapes(&phi_q, &phi_k, &v, options);
    let [batch, heads, n, m] = phi_q.dims();
    let [_, kv_heads, _, columns] = v.dims();
    assert!(n > 0, "attention: there are no tokens to attend to");
    let (units, group) = (batch * kv_heads, heads / kv_heads);
    let q = phi_q.reshape([units, group, n, m]);
    let k = phi_k.reshape([units, 1, n, m]);
    // with a column of ones, whose sums are the divisors
    let ones = Tensor::ones([batch, kv_heads, n, 1], (&v.device(), v.dtype()));
    let v = Tensor::cat(vec![v, ones], 3).reshape([units, 1, n, columns + 1]);
    let chunks = n.div_ceil(options.chunk);
    let rows = |x: &Option<Tensor<3>>| match x {
        Some(x) => {
            let row = x.clone().reshape([units, 1, n]);
            parts(row, options.chunk).into_iter().map(Some).collect()
        }
        None => vec![None; chunks],
    };
    let logarithms = rows(&options.log_scale).into_iter().zip(rows(&options.log_decay));
    let [q, k, v] = [q, k, v].map(|x| parts(x, options.chunk).into_iter());
    let (mut sums, mut outs) = (None, Vec::with_capacity(chunks));
    for (((q, k), v), (log_scale, log_decay)) in q.zip(k).zip(v).zip(logarithms) {
        let chunk = Chunk { q, k, v };
        let (out, left) = match logs(log_scale, log_decay) {
            None => chunk.plain(sums),
            Some((logs, decay)) => chunk.scaled(&logs, decay, sums),
        };
        outs.push(out);
        sums = Some(left);
    }
    let out = Tensor::cat(outs, 2);
    let sums = out.clone().slice(s![.., .., .., columns..]);
    let out = out.slice(s![.., .., .., ..columns]) / sums;
    out.reshape([batch, heads, n, columns])
}

/// Rows of the third axis, so many at a time: halves of halves, as the gradient of each part is as
/// large as what the part is of.
fn parts<const D: usize>(x: Tensor<D>, chunk: usize) -> Vec<Tensor<D>> {
    let n = x.dims()[2];
    if n <= chunk {
        return vec![x];
    }
    let half = n.div_ceil(chunk).div_ceil(2) * chunk;
    let mut all = parts(x.clone().narrow(2, 0, half), chunk);
    all.extend(parts(x.narrow(2, half, n - half), chunk));
    all
}

/// Products of the keys' features with the values and ones, `[units, 1, m, d_v + 1]`, times the
/// exponential of a log scale `[units, 1, 1]`, if they have one.
struct Sums {
    values: Tensor<4>,
    log_scale: Option<Tensor<3>>,
}

/// What each key's features are to be multiplied with, as logarithms seen from the beginning of a
/// chunk, and the decay from there to its end; none if there is nothing of the kind.
fn logs(
    log_scale: Option<Tensor<3>>,
    log_decay: Option<Tensor<3>>,
) -> Option<(Tensor<3>, Option<Tensor<3>>)> {
    let Some(log_decay) = log_decay else {
        return log_scale.map(|log_scale| (log_scale, None));
    };
    let decayed = log_decay.cumsum(2);
    let last = decayed.dims()[2] - 1;
    let to_end = decayed.clone().slice(s![.., .., last..]);
    let logs = match log_scale {
        Some(log_scale) => log_scale - decayed,
        None => -decayed,
    };
    Some((logs, Some(to_end)))
}

struct Chunk {
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
}

impl Chunk {
    /// Where keys count as they are.
    fn plain(self, sums: Option<Sums>) -> (Tensor<4>, Sums) {
        let Self { q, k, v } = self;
        let later = self::later(&q);
        let weights = q.clone().matmul(k.clone().transpose());
        let hidden = later.expand(weights.dims());
        let mut out = weights.mask_fill(hidden, 0.0).matmul(v.clone());
        let mut values = k.transpose().matmul(v);
        if let Some(sums) = sums {
            out = out + q.matmul(sums.values.clone());
            values = values + sums.values;
        }
        (out, Sums { values, log_scale: None })
    }

    /// Where keys have logarithms `[units, 1, n]`. All is relative to the largest that a query
    /// sees; it cancels in the end, so it is a constant.
    fn scaled(
        self,
        logs: &Tensor<3>,
        decay: Option<Tensor<3>>,
        sums: Option<Sums>,
    ) -> (Tensor<4>, Sums) {
        let Self { q, k, v } = self;
        let before = sums.map(|sums| {
            let log_scale = sums.log_scale.expect("sums of chunks with logarithms");
            (sums.values, log_scale)
        });
        let mut largest = logs.clone().without_autodiff().cummax(2);
        if let Some((_, log_scale)) = &before {
            let log_scale = log_scale.clone().without_autodiff().expand(largest.dims());
            largest = largest.max_pair(log_scale);
        }
        let last = largest.dims()[2] - 1;
        let at_end = largest.clone().slice(s![.., .., last..]);
        let rows = largest.unsqueeze_dim::<4>(3); // of queries
        let exponents = logs.clone().unsqueeze_dim::<4>(2) - rows.clone();
        let later = self::later(&q).expand(exponents.dims());
        let seen = exponents.mask_fill(later, f32::NEG_INFINITY).exp();
        let weights = q.clone().matmul(k.clone().transpose()) * seen;
        let mut out = weights.matmul(v.clone());
        let factors = (logs.clone() - at_end.clone()).exp().unsqueeze_dim::<4>(3);
        let mut values = (k * factors).transpose().matmul(v);
        if let Some((before, log_scale)) = before {
            let log_scale = log_scale.unsqueeze_dim::<4>(3);
            out = out + q.matmul(before.clone()) * (log_scale.clone() - rows).exp();
            values = values + before * (log_scale - at_end.clone().unsqueeze_dim(3)).exp();
        }
        let log_scale = Some(match decay {
            Some(decay) => at_end + decay,
            None => at_end,
        });
        (out, Sums { values, log_scale })
    }
}

/// True where a key comes after a query, `[1, 1, n, n]`.
fn later(q: &Tensor<4>) -> Tensor<4, Bool> {
    let n = q.dims()[2];
    Tensor::<2, Bool>::tril_mask([n, n], 0, &q.device()).unsqueeze()
}

fn check_shapes(phi_q: &Tensor<4>, phi_k: &Tensor<4>, v: &Tensor<4>, options: &LinearOptions) {
    let ([batch, heads, n, m], [_, kv_heads, _, columns]) = (phi_q.dims(), v.dims());
    assert!(
        kv_heads > 0 && heads > 0 && heads.is_multiple_of(kv_heads),
        "linear_attention: `phi_q` has {heads} heads, no multiple of the {kv_heads} of `v`"
    );
    let [of_keys, of_values] = [m, columns].map(|columns| [batch, kv_heads, n, columns]);
    for (which, found, needed) in [("phi_k", phi_k.dims(), of_keys), ("v", v.dims(), of_values)] {
        assert!(found == needed, "linear_attention: `{which}` is {found:?} where {needed:?} fits");
    }
    let rows = [("log_scale", &options.log_scale), ("log_decay", &options.log_decay)];
    for (which, found) in rows.into_iter().filter_map(|(which, x)| Some((which, x.as_ref()?))) {
        let (found, needed) = (found.dims(), [batch, kv_heads, n]);
        assert!(found == needed, "linear_attention: `{which}` is {found:?} where {needed:?} fits");
    }
    assert!(options.chunk > 0, "linear_attention: a chunk of no tokens");
}
