//! A layer with its projections, as a module of candle.

use crate::attention::{Extras, attention_with};
use crate::element::Element;
use crate::parameters::{layer_with, parameters};
use crate::state::AttentionState;
use candle_core::{Module, Result, Tensor, Var, bail};
use candle_nn::{Init, Linear, VarBuilder, linear_b};
use dijiang::{Mask, MultiHead};

/// Sizes of a [`DijiangAttention`]. The heads are those of its layer.
///
/// ```
/// use dijiang_candle::DijiangAttentionConfig;
///
/// let config = DijiangAttentionConfig::new(512, 64); // columns of the model, and of a head
/// let config = DijiangAttentionConfig { bias: true, ..config };
/// assert_eq!(config.value_dim, 64);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DijiangAttentionConfig {
    /// Columns of the hidden states.
    pub hidden_size: usize,
    /// Columns of the queries and keys of a head.
    pub head_dim: usize,
    /// Columns of the values of a head.
    pub value_dim: usize,
    /// Whether the projections have a bias.
    pub bias: bool,
    /// Which tokens a token sees.
    pub mask: Mask,
}

impl DijiangAttentionConfig {
    /// Values as wide as keys, no bias, [`Mask::Causal`].
    #[must_use]
    pub fn new(hidden_size: usize, head_dim: usize) -> Self {
        let (value_dim, bias, mask) = (head_dim, false, Mask::Causal);
        Self { hidden_size, head_dim, value_dim, bias, mask }
    }
}

/// Attention with its projections, `q_proj`, `k_proj`, `v_proj` and `o_proj` under their names in
/// released models, and any kernel. The [parameters](MultiHead::parameters) of the kernel are
/// variables under `kernel`, by the names of the core.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use dijiang::{DctFeatures, LinearAttention, MultiHead};
/// use dijiang_candle::{DijiangAttention, DijiangAttentionConfig};
///
/// let varmap = VarMap::new();
/// let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
/// let layer = MultiHead::new(LinearAttention::new(DctFeatures::<f32>::new(16, 32, 0)?), 4, 2)?;
/// let attention = DijiangAttention::new(layer, DijiangAttentionConfig::new(64, 16), vb)?;
/// let x = Tensor::randn(0f32, 1., (2, 100, 64), &Device::Cpu)?;
/// assert_eq!(attention.forward(&x)?.dims(), [2, 100, 64]);
///
/// // token by token, in a state of constant size
/// let mut state = attention.state(2)?;
/// let out = attention.forward_step(&x.narrow(1, 0, 1)?, &mut state)?;
/// assert_eq!(out.dims(), [2, 1, 64]);
/// assert!(varmap.data().lock().unwrap().contains_key("kernel.heads.0.map.weights"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct DijiangAttention<T: Element> {
    layer: MultiHead<T>,
    config: DijiangAttentionConfig,
    projections: [Linear; 4],
    parameters: Vec<(String, Tensor)>,
}

impl<T: Element> DijiangAttention<T> {
    /// A layer whose weights come from `vb`. Parameters of the kernel that `vb` does not have yet
    /// begin as those of `layer`.
    ///
    /// # Errors
    ///
    /// Those of the builder: another shape, or a tensor that is not there.
    #[allow(clippy::needless_pass_by_value)] // as modules of candle are made
    pub fn new(
        layer: MultiHead<T>,
        config: DijiangAttentionConfig,
        vb: VarBuilder,
    ) -> Result<Self> {
        let DijiangAttentionConfig { hidden_size, head_dim, value_dim, bias, .. } = config;
        let (heads, kv_heads) = (layer.query_heads(), layer.kv_heads());
        let projection = |from: usize, to: usize, name: &str| linear_b(from, to, bias, vb.pp(name));
        let projections = [
            projection(hidden_size, heads * head_dim, "q_proj")?,
            projection(hidden_size, kv_heads * head_dim, "k_proj")?,
            projection(hidden_size, kv_heads * value_dim, "v_proj")?,
            projection(heads * value_dim, hidden_size, "o_proj")?,
        ];
        let vb = vb.pp("kernel");
        let mut named = parameters(&layer)?;
        for (name, begins) in &mut named {
            let is_there = vb.contains_tensor(name);
            let tensor = vb.get_with_hints(begins.dims(), name, Init::Const(0.0))?;
            if !is_there {
                if !tensor.is_variable() {
                    bail!("`{name}` is not there, and the builder makes no variables");
                }
                // the same variable: a builder knows no initial values but for distributions
                Var::from_tensor(&tensor)?.set(&begins.to_dtype(tensor.dtype())?)?;
            }
            *begins = tensor;
        }
        let layer = layer_with(&layer, &named)?;
        Ok(Self { layer, config, projections, parameters: named })
    }

    /// The layer with the parameters as they are now.
    ///
    /// # Errors
    ///
    /// Those of [`MultiHead::with_parameters`]: a parameter that training has made unusable.
    pub fn layer(&self) -> Result<MultiHead<T>> {
        layer_with(&self.layer, &self.parameters)
    }

    /// An empty state of `batch` sequences, with the parameters as they are now.
    ///
    /// # Errors
    ///
    /// Those of [`AttentionState::new`].
    pub fn state(&self, batch: usize) -> Result<AttentionState<T>> {
        AttentionState::new(&self.layer()?, batch, self.config.value_dim)
    }

    /// Queries, keys and values of hidden states `[batch, n, hidden_size]`, as views
    /// `[batch, heads, n, columns]`.
    fn projected(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        let (batch, n, _) = x.dims3()?;
        let [q, k, v, _] = &self.projections;
        let heads = |x: Tensor, columns: usize| -> Result<Tensor> {
            x.reshape((batch, n, (), columns))?.transpose(1, 2)
        };
        let DijiangAttentionConfig { head_dim, value_dim, .. } = self.config;
        Ok([
            heads(q.forward(x)?, head_dim)?,
            heads(k.forward(x)?, head_dim)?,
            heads(v.forward(x)?, value_dim)?,
        ])
    }

    /// `[batch, heads, n, value_dim]` to hidden states.
    fn merged(&self, out: &Tensor) -> Result<Tensor> {
        let (batch, _, n, _) = out.dims4()?;
        self.projections[3].forward(&out.transpose(1, 2)?.reshape((batch, n, ()))?)
    }

    /// Hidden states `[batch, n, hidden_size]` to the same. `key_lengths` says how many tokens of
    /// each sequence are real.
    ///
    /// # Errors
    ///
    /// Those of [`attention_with`](crate::attention_with).
    pub fn forward_padded(&self, x: &Tensor, key_lengths: Option<&[usize]>) -> Result<Tensor> {
        self.forward_with(x, Extras::default(), key_lengths)
    }

    /// As [`forward_padded`](Self::forward_padded), with log decays, a mask of keys, or biases.
    ///
    /// # Errors
    ///
    /// Those of [`attention_with`](crate::attention_with); if there are parameters, which are the
    /// module's own.
    pub fn forward_with(
        &self,
        x: &Tensor,
        extras: Extras<'_>,
        key_lengths: Option<&[usize]>,
    ) -> Result<Tensor> {
        if !extras.parameters.is_empty() {
            bail!("a module has parameters of its own: use `attention_with` for others");
        }
        let [q, k, v] = self.projected(x)?;
        let tracked = self.parameters.iter().any(|(_, tensor)| tensor.track_op());
        let parameters = if tracked { &self.parameters[..] } else { &[] };
        let extras = Extras { parameters, ..extras };
        let mask = self.config.mask;
        self.merged(&attention_with(&self.layer, extras, [&q, &k, &v], mask, key_lengths)?)
    }

    /// The next tokens of a state, `[batch, n, hidden_size]` to the same.
    ///
    /// # Errors
    ///
    /// Those of [`AttentionState::forward`].
    pub fn forward_step(&self, x: &Tensor, state: &mut AttentionState<T>) -> Result<Tensor> {
        let [q, k, v] = self.projected(x)?;
        self.merged(&state.forward(&q, &k, &v)?)
    }
}

impl<T: Element> Module for DijiangAttention<T> {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_padded(x, None)
    }
}
