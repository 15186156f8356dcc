//! A module in the place of `burn::nn::attention::MultiHeadAttention`.

use crate::attention::attention_with;
use crate::backend::or_panic;
use crate::input::AttentionInput;
use crate::kernel::{Kernel, KernelOptions, Layer};
use crate::kernel_parameters::KernelParameters;
use crate::state::AttentionState;
use burn::config::Config;
use burn::module::{Content, DisplaySettings, Initializer, Module, ModuleDisplay};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Tensor, assert_shape};
use dijiang::ndarray::Array4;
use dijiang::{Error, Mask, MultiHead};

/// The configuration of a [`DijiangAttention`]. Options that
/// [`MultiHeadAttentionConfig`](burn::nn::attention::MultiHeadAttentionConfig) has as well mean the
/// same. It has no `dropout`, which is one of attention weights, and no `min_float`: no weights are
/// there, and no scores.
#[derive(Config, Debug)]
#[allow(clippy::struct_excessive_bools)] // options of burn's own configuration
pub struct DijiangAttentionConfig {
    /// The size of each linear layer.
    pub d_model: usize,
    /// The number of heads.
    pub n_heads: usize,
    /// The number of heads of keys and values, a divisor of `n_heads`. Default: `n_heads`
    #[config(default = "None")]
    pub n_kv_heads: Option<usize>,
    /// The kernel of the heads, unless [`init_with`](Self::init_with) gets a layer. Default:
    /// [`Kernel::Softmax`]
    #[config(default = "Kernel::Softmax")]
    pub kernel: Kernel,
    /// Whether the numbers of the kernels are parameters of the module; else they are constants
    /// that the seed gives, and no part of a record. Default: true
    #[config(default = true)]
    pub train_kernel: bool,
    /// Adds one to the divisor of the softmax, for [`Kernel::Softmax`] and [`Kernel::Hybrid`].
    /// Default: false
    #[config(default = false)]
    pub quiet_softmax: bool,
    /// What scores are multiplied with, `1/√d_k` unless set.
    pub scale: Option<f64>,
    /// Caps scores softly, `softcap·tanh(score/softcap)`, for [`Kernel::Softmax`] and
    /// [`Kernel::Hybrid`].
    pub softcap: Option<f64>,
    /// The seed of the random directions of kernels. A record does not hold those of
    /// [`Kernel::Dct`]: load it into a module of the same seed. Default: 0
    #[config(default = 0)]
    pub seed: u64,
    /// The type of function used to initialize the linear layers.
    #[config(default = "Initializer::KaimingUniform{gain:1.0/3.0_f64.sqrt(), fan_out_only:false}")]
    pub initializer: Initializer,
    /// Enable bias for the key [Linear] layer.
    #[config(default = true)]
    pub key_bias: bool,
    /// Enable bias for the value [Linear] layer.
    #[config(default = true)]
    pub value_bias: bool,
    /// Enable bias for the query [Linear] layer.
    #[config(default = true)]
    pub query_bias: bool,
    /// Enable bias for the output [Linear] layer.
    #[config(default = true)]
    pub output_bias: bool,
}

/// Multi-head attention by kernels of dijiang, with the projections and the records of
/// [`MultiHeadAttention`](burn::nn::attention::MultiHeadAttention): the linear layers `query`,
/// `key`, `value` and `output` have the same names and, with as many kv heads as heads, the same
/// shapes. A record of that module loads into this one; where the kernels have parameters, with
/// `allow_partial(true)`.
///
/// Numbers are `f32`, on the device of the Flex backend.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use dijiang_burn::{AttentionInput, DijiangAttentionConfig, Kernel};
///
/// let device = Device::flex().autodiff();
/// let config = DijiangAttentionConfig::new(32, 4).with_kernel(Kernel::Dct { features: 32 });
/// let attention = config.init(&device);
/// let x = Tensor::<3>::random([2, 10, 32], Distribution::Default, &device);
/// let out = attention.forward(AttentionInput::self_attn(x).causal());
/// assert_eq!(out.context.dims(), [2, 10, 32]);
/// ```
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct DijiangAttention {
    /// Linear layer to transform the input features into the query space.
    pub query: Linear,
    /// Linear layer to transform the input features into the key space.
    pub key: Linear,
    /// Linear layer to transform the input features into the value space.
    pub value: Linear,
    /// Linear layer to transform the output features back to the original space.
    pub output: Linear,
    /// The numbers of the kernels, as far as they are trained.
    pub kernel: KernelParameters,
    /// The size of each linear layer.
    pub d_model: usize,
    /// The number of heads.
    pub n_heads: usize,
    /// The number of heads of keys and values.
    pub n_kv_heads: usize,
    /// Size of the key and query vectors.
    pub d_k: usize,
    #[module(skip)]
    layer: Layer,
}

/// The output of a [`DijiangAttention`]; there are no attention weights.
#[derive(Debug, Clone)]
pub struct AttentionOutput {
    /// The context tensor `[batch_size, seq_length_1, d_model]`.
    pub context: Tensor<3>,
}

impl ModuleDisplay for DijiangAttention {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new().with_new_line_after_attribute(false).optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        content
            .add("d_model", &self.d_model)
            .add("n_heads", &self.n_heads)
            .add("n_kv_heads", &self.n_kv_heads)
            .add("d_k", &self.d_k)
            .optional()
    }
}

impl DijiangAttentionConfig {
    /// Initialize a new [`DijiangAttention`] module.
    ///
    /// # Panics
    ///
    /// With the words of the error of [`try_init`](Self::try_init).
    #[must_use]
    pub fn init(&self, device: &Device) -> DijiangAttention {
        or_panic(self.try_init(device))
    }

    /// As [`init`](Self::init), where the configuration is not known to be good.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if heads do not divide `d_model`, or kv heads the heads, and those
    /// of the kernels.
    pub fn try_init(&self, device: &Device) -> Result<DijiangAttention, Error> {
        let heads = [self.n_heads, self.n_kv_heads.unwrap_or(self.n_heads), self.d_k()?];
        let Self { seed, scale, softcap, quiet_softmax: is_quiet, .. } = *self;
        let options = KernelOptions { seed, is_quiet, scale, softcap };
        let layer = self.kernel.layer(heads, options)?;
        let mut attention = self.try_init_with(layer, device)?;
        // the one of a quiet softmax is a constant
        attention.kernel = attention.kernel.without(".sink_logits");
        Ok(attention)
    }

    /// Initialize a new [`DijiangAttention`] module with any layer of dijiang: positions, maps with
    /// options, other kernels in every head. `kernel`, its options and `seed` are not used, and
    /// unless `n_kv_heads` is set it is that of the layer. All [parameters](MultiHead::parameters)
    /// of the layer are trained, unless `train_kernel` is false.
    ///
    /// ```
    /// use burn::tensor::{Device, Distribution, Tensor};
    /// use dijiang_burn::dijiang::{
    ///     DctFeatures, LinearAttention, MultiHead, Rotary, RotaryAttention,
    /// };
    /// use dijiang_burn::{AttentionInput, DijiangAttentionConfig};
    ///
    /// // queries and keys of 16 columns turn with their positions
    /// let kernel = LinearAttention::new(DctFeatures::<f32>::new(16, 32, 0)?);
    /// let kernel = RotaryAttention::new(Rotary::new(16)?, kernel);
    /// let layer = MultiHead::new(kernel, 4, 2)?;
    ///
    /// let device = Device::flex().autodiff();
    /// let attention = DijiangAttentionConfig::new(64, 4).init_with(layer, &device);
    /// let trained = attention.kernel.tensors();
    /// assert!(trained.names().eq(["heads.0.kernel.map.radii", "heads.0.kernel.map.weights"]));
    /// let x = Tensor::<3>::random([2, 10, 64], Distribution::Default, &device);
    /// let out = attention.forward(AttentionInput::self_attn(x).causal());
    /// assert_eq!(out.context.dims(), [2, 10, 64]);
    /// # Ok::<(), dijiang_burn::dijiang::Error>(())
    /// ```
    ///
    /// # Panics
    ///
    /// With the words of the error of [`try_init_with`](Self::try_init_with).
    #[must_use]
    pub fn init_with(&self, layer: MultiHead<f32>, device: &Device) -> DijiangAttention {
        or_panic(self.try_init_with(layer, device))
    }

    /// As [`init_with`](Self::init_with), where the layer is not known to fit.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if heads do not divide `d_model`, or the layer has other heads or
    /// kv heads than the configuration; [`Error::Shape`] if its kernels take no queries and keys of
    /// `d_model / n_heads` columns.
    pub fn try_init_with(
        &self,
        layer: MultiHead<f32>,
        device: &Device,
    ) -> Result<DijiangAttention, Error> {
        let (d_model, d_k) = (self.d_model, self.d_k()?);
        let (n_heads, n_kv_heads) = (layer.query_heads(), layer.kv_heads());
        let asked_kv_heads = self.n_kv_heads.unwrap_or(n_kv_heads);
        for (which, found, expected, needed) in [
            ("n_heads", self.n_heads, n_heads, "the number of query heads of the layer"),
            ("n_kv_heads", asked_kv_heads, n_kv_heads, "the number of kv heads of the layer"),
        ] {
            if found != expected {
                return Err(Error::InvalidOption { which, found: found.to_string(), needed });
            }
        }
        check_columns(&layer, d_k)?;
        let kernel = if self.train_kernel {
            KernelParameters::new(&layer, device)?
        } else {
            KernelParameters::default()
        };
        let linear = |columns: usize, has_bias: bool| {
            let config = LinearConfig::new(d_model, columns).with_bias(has_bias);
            config.with_initializer(self.initializer.clone()).init(device)
        };
        Ok(DijiangAttention {
            query: linear(d_model, self.query_bias),
            key: linear(n_kv_heads * d_k, self.key_bias),
            value: linear(n_kv_heads * d_k, self.value_bias),
            output: linear(d_model, self.output_bias),
            kernel,
            d_model,
            n_heads,
            n_kv_heads,
            d_k,
            layer: Layer(layer),
        })
    }

    /// The columns of a head.
    fn d_k(&self) -> Result<usize, Error> {
        let (d_model, n_heads) = (self.d_model, self.n_heads);
        if n_heads == 0 || !d_model.is_multiple_of(n_heads) {
            return Err(Error::InvalidOption {
                which: "n_heads",
                found: n_heads.to_string(),
                needed: "a divisor of `d_model`",
            });
        }
        Ok(d_model / n_heads)
    }
}

/// Whether kernels take queries and keys of so many columns: a call with one token tells. That it
/// fails for another reason is no matter, such a kernel may still be called in other ways.
fn check_columns(layer: &MultiHead<f32>, d_k: usize) -> Result<(), Error> {
    let [q, k] = [layer.query_heads(), layer.kv_heads()].map(|n| Array4::zeros((1, n, 1, d_k)));
    match layer.forward(q.view(), k.view(), k.view(), Mask::Causal, None) {
        Err(error @ Error::Shape { .. }) => Err(error),
        _ => Ok(()),
    }
}

impl DijiangAttention {
    /// Applies the forward pass on the input tensors.
    ///
    /// # Shapes
    ///
    /// - query: `[batch_size, seq_length_1, d_model]`
    /// - key: `[batch_size, seq_length_2, d_model]`
    /// - value: `[batch_size, seq_length_2, d_model]`
    /// - output: `[batch_size, seq_length_1, d_model]`
    ///
    /// # Panics
    ///
    /// As [`attention`](crate::attention); if the last axis of an input is not `d_model`, or the
    /// kernel cannot have the mask ([`AttentionInput::mask_attn`]).
    #[must_use]
    pub fn forward(&self, input: AttentionInput) -> AttentionOutput {
        let options = input.options();
        let [q, k, v] = self.heads_of([input.query, input.key, input.value]);
        let tensors = self.kernel.tensors();
        self.merged(attention_with(&self.layer.0, &tensors, q, k, v, &options))
    }

    /// The empty state of `batch` sequences, for [`forward_state`](Self::forward_state), with the
    /// parameters that the kernels have now.
    ///
    /// # Errors
    ///
    /// Those of [`MultiHead::stream`](dijiang::MultiHead::stream) and of
    /// [`MultiHead::with_parameters`](dijiang::MultiHead::with_parameters).
    pub fn state(&self, batch: usize) -> Result<AttentionState<f32>, Error> {
        let layer = self.layer.0.with_parameters(&self.kernel.tensors().to_arrays())?;
        AttentionState::new(&layer, batch, self.d_k)
    }

    /// Applies the forward pass to the next tokens of every sequence, `[batch_size, n, d_model]`,
    /// causally: the others are in the state. Unlike with a cache of burn only new tokens are
    /// handed over. The output has no history: decode with a module that is `valid()`.
    ///
    /// # Panics
    ///
    /// As [`AttentionState::forward`].
    #[must_use]
    pub fn forward_state(&self, x: Tensor<3>, state: &mut AttentionState<f32>) -> AttentionOutput {
        let [q, k, v] = self.heads_of([x.clone(), x.clone(), x]);
        self.merged(state.forward(q, k, v))
    }

    /// As [`forward_state`](Self::forward_state), where the first `lengths[b]` tokens of sequence
    /// `b` are real: prompts of several lengths. Those of padding are answered with zero (before
    /// the output layer).
    ///
    /// # Panics
    ///
    /// As [`AttentionState::forward`].
    #[must_use]
    pub fn forward_state_padded(
        &self,
        x: Tensor<3>,
        lengths: &[usize],
        state: &mut AttentionState<f32>,
    ) -> AttentionOutput {
        let [q, k, v] = self.heads_of([x.clone(), x.clone(), x]);
        self.merged(state.forward_padded(q, k, v, lengths))
    }

    /// The projections as heads, which are views of them.
    fn heads_of(&self, [query, key, value]: [Tensor<3>; 3]) -> [Tensor<4>; 3] {
        let [batch_size, _, _] = query.dims();
        let [_, seq_length_2, _] = key.dims();
        assert_shape!(query, [_, _, self.d_model]);
        assert_shape!(key, [batch_size, _, self.d_model]);
        assert_shape!(value, [batch_size, seq_length_2, self.d_model]);
        let heads = |x: Tensor<3>, linear: &Linear, heads: usize| {
            let [batch, n, _] = x.dims();
            linear.forward(x).reshape([batch, n, heads, self.d_k]).swap_dims(1, 2)
        };
        [
            heads(query, &self.query, self.n_heads),
            heads(key, &self.key, self.n_kv_heads),
            heads(value, &self.value, self.n_kv_heads),
        ]
    }

    fn merged(&self, out: Tensor<4>) -> AttentionOutput {
        let [batch, _, n, _] = out.dims();
        let rows = out.swap_dims(1, 2).reshape([batch, n, self.d_model]);
        AttentionOutput { context: self.output.forward(rows) }
    }
}
