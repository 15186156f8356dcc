//! The attention block of the released DiJiang models: projections, rotary embedding, decaying
//! linear attention, group norm, gate.

#[cfg(feature = "safetensors")]
mod checkpoint;
pub(crate) mod gradient;
mod linear;
#[cfg(feature = "safetensors")]
mod load;
pub(crate) mod stream;
pub(crate) mod weights;

use crate::attention::Attention;
use crate::attention::fingerprint::Fingerprint;
use crate::attention::linear::LinearAttention;
use crate::block::linear::Linear;
use crate::block::weights::DijiangWeights;
use crate::check;
use crate::decay;
use crate::error::Error;
use crate::features::official_dijiang::OfficialDijiang;
use crate::multi_head::MultiHead;
use crate::rotary::Rotary;
use crate::scalar::Scalar;
use ndarray::{
    Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut2, ArrayViewMut3, ArrayViewMut4, Axis,
};
use std::sync::Arc;

/// The attention block of the released DiJiang models (Chen et al., arXiv 2403.19928;
/// `GPTNeoXAttention` in the code at github.com/YuchuanTian/DiJiang), with the decay, gate and norm
/// of RetNet (Sun et al., arXiv 2307.08621):
///
/// ```text
/// [q | k | v] of each head = x W_qkvᵀ + b_qkv,    then q and k turned by their position (Rotary)
/// o_n = Σ_{j≤n} γ_h^{n−j} (φ(q_n)·φ(k_j)) v_j,    φ(x) = softmax(x C diag(t))
/// y   = (swish(x W_G) ⊙ GroupNorm([o of head 0 | o of head 1 | …])) W_oᵀ + b_o
/// swish(z) = z/(1 + e^{−z}),    γ from decay::dijiang
/// ```
///
/// Queries and keys are raw (scale 1), and nothing divides by the sum of weights: the norm takes
/// its place.
///
/// The norm is that of the released code, per token, with the biased variance. It has `d` groups,
/// not one for each head: a group is `heads` *neighbouring* columns, which are not those of a head.
///
/// `x` is what the layer norm before gives: `[n, hidden]`, and so is the output; the residual is
/// the caller's. The [stream](Self::stream) has a state of fixed size, where a model with softmax
/// attention keeps `2·hidden` numbers for every token.
///
/// ```
/// use dijiang::{DijiangBlock, DijiangWeights, Rotary};
/// use ndarray::{Array1, Array2};
///
/// let (hidden, heads) = (16, 2);
/// let matrix = |rows, phase: f32| {
///     Array2::from_shape_fn((rows, hidden), |(i, j)| {
///         0.2 * (phase + (7 * i + 3 * j) as f32).sin()
///     })
/// };
/// let weights = DijiangWeights {
///     query_key_value: matrix(3 * hidden, 0.0),
///     query_key_value_bias: Array1::zeros(3 * hidden),
///     dense: matrix(hidden, 1.0),
///     dense_bias: Array1::zeros(hidden),
///     gate: matrix(hidden, 2.0),
///     group_norm_weight: Array1::ones(hidden),
///     group_norm_bias: Array1::zeros(hidden),
///     radii: Array1::linspace(-1.5, 1.5, hidden / heads),
/// };
/// let block = DijiangBlock::new(weights, heads, Rotary::gpt_neox(hidden / heads, 0.25)?)?;
///
/// let x = matrix(10, 3.0);
/// let whole = block.forward(x.view())?;
/// let mut stream = block.stream()?;
/// for (token, expected) in x.rows().into_iter().zip(whole.rows()) {
///     let mut out = Array2::zeros((1, hidden));
///     stream.extend(token.insert_axis(ndarray::Axis(0)), out.view_mut())?;
///     assert!((&out.row(0) - &expected).iter().all(|e| e.abs() < 1e-5));
/// }
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct DijiangBlock<T: Scalar> {
    shared: Arc<SharedWeights<T>>,
    heads: MultiHead<T>,
    rotary: Rotary,
    epsilon: f64,
}

/// What copies of a block share.
#[derive(Debug)]
struct SharedWeights<T> {
    query_key_value: Linear<T>,
    gate: Linear<T>,
    dense: Linear<T>,
    norm_weight: Array1<T>,
    norm_bias: Array1<T>,
    radii: Array1<T>,
    /// Tells blocks apart whose states mean different things.
    fingerprint: Fingerprint,
    /// The largest each column can be after the norm.
    norm_bounds: Vec<f64>,
    /// The largest bias and weight of `dense`.
    dense_bounds: [f64; 2],
}

impl<T: Scalar> DijiangBlock<T> {
    /// A block of `heads` heads; `rotary` is [`Rotary::gpt_neox`] of the model's `rotary_pct`
    /// (Pythia: 0.25).
    ///
    /// # Errors
    ///
    /// - [`Error::ZeroSize`]: `heads` or the hidden size is 0;
    /// - [`Error::InvalidOption`]: the hidden size, the columns of `query_key_value`, is not a
    ///   multiple of `heads`;
    /// - [`Error::Shape`]: a weight has another shape than [`DijiangWeights`] says, or `rotary` is
    ///   for another head dimension;
    /// - [`Error::NotFinite`]: NaN or infinity in a weight.
    pub fn new(weights: DijiangWeights<T>, heads: usize, rotary: Rotary) -> Result<Self, Error> {
        let head_dim = weights.check(heads)?;
        check::size("rotary", "columns", head_dim, rotary.head_dim())?;
        let fingerprint = weights.fingerprint(&rotary);
        let radii = weights.radii.clone();
        let kernel = LinearAttention::new(OfficialDijiang::new(weights.radii)?)
            .with_scale(1.0)
            .unnormalized();
        let kernels = decay::dijiang(heads)
            .into_iter()
            .map(|decay| Arc::new(kernel.clone().with_decay(decay)) as Arc<dyn Attention<T>>)
            .collect();
        let largest =
            |x: ArrayView1<'_, T>| x.iter().fold(0.0, |m: f64, x| m.max(x.as_f64().abs()));
        #[allow(clippy::cast_precision_loss)]
        // One number among so many is off the mean by this many standard deviations at most.
        let deviation = (heads as f64).sqrt();
        let norm = weights.group_norm_weight.iter().zip(&weights.group_norm_bias);
        let shared = SharedWeights {
            fingerprint,
            norm_bounds: norm
                .map(|(w, b)| deviation * w.as_f64().abs() + b.as_f64().abs())
                .collect(),
            dense_bounds: [
                largest(weights.dense_bias.view()),
                weights.dense.rows().into_iter().map(largest).fold(0.0, f64::max),
            ],
            query_key_value: Linear::new(
                weights.query_key_value.t(),
                Some(weights.query_key_value_bias),
            ),
            gate: Linear::new(weights.gate.view(), None),
            dense: Linear::new(weights.dense.t(), Some(weights.dense_bias)),
            norm_weight: weights.group_norm_weight,
            norm_bias: weights.group_norm_bias,
            radii,
        };
        Ok(Self {
            shared: Arc::new(shared),
            heads: MultiHead::per_head(kernels, heads)?,
            rotary,
            epsilon: 1e-5,
        })
    }

    /// Sets what the norm adds to the variance, 10⁻⁵ unless set.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if it is not positive and finite.
    pub fn with_epsilon(mut self, epsilon: f64) -> Result<Self, Error> {
        if !(epsilon > 0.0 && epsilon.is_finite()) {
            let found = epsilon.to_string();
            return Err(Error::InvalidOption {
                which: "epsilon",
                found,
                needed: "a positive finite number",
            });
        }
        self.epsilon = epsilon;
        Ok(self)
    }

    /// Columns of a token.
    #[must_use]
    pub fn hidden(&self) -> usize {
        self.shared.norm_weight.len()
    }

    /// Heads.
    #[must_use]
    pub fn heads(&self) -> usize {
        self.heads.query_heads()
    }

    /// Columns of a head, and groups of the norm.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.hidden() / self.heads()
    }

    /// Queries, keys and values `[n, heads·3d]` of tokens at the positions from `first_position`
    /// on, queries and keys turned.
    fn query_key_value(
        &self,
        x: ArrayView2<'_, T>,
        first_position: usize,
    ) -> Result<Array2<T>, Error> {
        let mut rows = self.shared.query_key_value.apply(x);
        let angles = self.rotary.angles(first_position, x.nrows())?;
        let [queries, keys, _] = thirds(as_heads(&mut rows, self.heads())?);
        angles.rotate_heads_in_place(queries)?;
        angles.rotate_heads_in_place(keys)?;
        in_range("the projection to queries, keys and values", &rows)?;
        Ok(rows)
    }

    /// `swish(x W_G)`; an error if numbers behind the attention might overflow with it, since
    /// nothing may fail there.
    fn gate(&self, x: ArrayView2<'_, T>) -> Result<Array2<T>, Error> {
        let shared = &*self.shared;
        let mut gate = shared.gate.apply(x);
        in_range("the gate", &gate)?;
        gate.mapv_inplace(|z| z / (T::one() + (-z).exp()));
        let limit = 0.25 * T::max_value().as_f64();
        for (row, gate) in gate.rows().into_iter().enumerate() {
            let gated: f64 = gate
                .iter()
                .zip(&shared.norm_bounds)
                .map(|(z, bound)| z.as_f64().abs() * bound)
                .sum();
            if !(gated < limit && shared.dense_bounds[0] + gated * shared.dense_bounds[1] < limit) {
                return Err(Error::Overflow { which: "the gated output", row });
            }
        }
        Ok(gate)
    }

    /// What is left once the heads are done: `(gate ⊙ GroupNorm(mixed)) W_oᵀ + b_o`. It cannot
    /// fail.
    fn finish(&self, mut mixed: Array2<T>, gate: &Array2<T>, out: ArrayViewMut2<'_, T>) {
        let group = self.heads();
        let SharedWeights { norm_weight, norm_bias, .. } = &*self.shared;
        for (mut row, gate) in mixed.rows_mut().into_iter().zip(gate.rows()) {
            let gates = gate.into_iter().zip(norm_weight.iter().zip(norm_bias));
            let mut gates =
                gates.map(|(gate, (weight, bias))| [gate, weight, bias].map(|x| x.as_f64()));
            for group in row.exact_chunks_mut(group) {
                let (mean, factor, scale) = moments(group.view(), self.epsilon);
                for (x, [gate, weight, bias]) in group.into_iter().zip(&mut gates) {
                    *x = T::from_f64(gate * ((x.as_f64() / scale - mean) * factor * weight + bias));
                }
            }
        }
        self.shared.dense.apply_into(mixed.view(), out);
    }
}

/// The mean and the factor `1/√(variance + ε)` of a group divided by `scale`, which keeps squares
/// within range.
#[allow(clippy::cast_precision_loss)]
fn moments<T: Scalar>(group: ArrayView1<'_, T>, epsilon: f64) -> (f64, f64, f64) {
    let count = group.len() as f64;
    let largest = group.iter().fold(0.0, |m: f64, x| m.max(x.as_f64().abs()));
    let scale = if largest > 1e150 { largest } else { 1.0 };
    let mean = group.iter().map(|x| x.as_f64() / scale).sum::<f64>() / count;
    let squares: f64 = group.iter().map(|x| x.as_f64() / scale - mean).map(|x| x * x).sum();
    let variance = squares / count + epsilon / scale / scale;
    (mean, variance.max(f64::MIN_POSITIVE).sqrt().recip(), scale)
}

/// `[n, heads·columns]` as `[n, heads, columns]`.
fn as_heads<T>(rows: &mut Array2<T>, heads: usize) -> Result<ArrayViewMut3<'_, T>, Error> {
    let (n, columns) = rows.dim();
    let shape = (n, heads, columns / heads);
    let error =
        Error::Shape { which: "x", axis: "columns", expected: shape.1 * shape.2, found: columns };
    rows.view_mut().into_shape_with_order(shape).map_err(|_| error)
}

/// `[n, heads, d]` as `[1, heads, n, d]`, one sequence.
fn heads_first<T>(x: ArrayViewMut3<'_, T>) -> ArrayViewMut4<'_, T> {
    x.permuted_axes([1, 0, 2]).insert_axis(Axis(0))
}

/// Queries, keys and values of heads that have them side by side.
fn thirds<T>(heads: ArrayViewMut3<'_, T>) -> [ArrayViewMut3<'_, T>; 3] {
    let d = heads.len_of(Axis(2)) / 3;
    let (queries, rest) = heads.split_at(Axis(2), d);
    let (keys, values) = rest.split_at(Axis(2), d);
    [queries, keys, values]
}

/// Finite numbers led to these.
fn in_range<T: Scalar>(which: &'static str, x: &Array2<T>) -> Result<(), Error> {
    check::finite(which, x.view()).map_err(|error| match error {
        Error::NotFinite { row, .. } => Error::Overflow { which, row },
        other => other,
    })
}
