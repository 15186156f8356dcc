//! Retention: products of turned queries and keys that decay with the distance.

use crate::attention::Attention;
use crate::attention::delegate::forward_by;
use crate::attention::gradient::HeadGradient;
use crate::attention::linear::LinearAttention;
use crate::attention::positional::Positional;
use crate::attention::scratch::Scratch;
use crate::check;
use crate::error::Error;
use crate::features::elementwise::IdentityFeatures;
use crate::mask::Mask;
use crate::parameters::Parameters;
use crate::rotary::Rotary;
use crate::rotary::angles::RotaryPairs;
use crate::scalar::Scalar;
use ndarray::Array1;

/// Retention, the attention of RetNet (Sun et al., arXiv 2307.08621, equations 5 to 7):
///
/// ```text
/// o_n = scale·Σ_{m ≤ n} γ^{n−m} (R_n q_n)·(R_m k_m) v_m,    scale = 1/√head_dim unless set
/// ```
///
/// with R the rotation by the position ([`Rotary`]) and γ the `decay` of the head;
/// [`decay::retention`](crate::decay::retention) has the paper's. Nothing is divided by: RetNet
/// normalises each head's output afterwards (group norm) and gates it (swish). Those are parts of
/// its layer, and not of this kernel; so are the factors of the released code that the norm
/// cancels.
///
/// Unless set with [`with_rotary`](Self::with_rotary), columns turn in pairs `(2i, 2i + 1)` by
/// `θ_i = 10000^{−i/(d/2 − 1)}`, as in the released code (a rotary embedding of most models has
/// `10000^{−2i/d}`); an odd last column does not turn. With [`with_xpos`](Self::with_xpos) pairs
/// also decay by factors of their own.
///
/// It is linear attention over [`IdentityFeatures`] with a decay: a state of
/// `2·head_dim·(value_dim + 1) + 2` numbers (and in a stream without xPos `16·(head_dim +
/// value_dim)` for tokens that wait), chunks of tokens at once (the paper's chunkwise form),
/// one by one in a stream (the recurrent one). Only the decay from one token to a later one is
/// formed, so no length is too large. A decay needs an order: [`Mask::Full`](crate::Mask::Full)
/// gives [`Error::Unsupported`] unless the decay is 1 and there is no xPos.
///
/// A γ other than 1 can be trained: it is the parameter `decay [1]`. Decays of xPos stay.
///
/// ```
/// use dijiang::{Attention, Mask, MultiHead, Retention, decay};
/// use ndarray::{Array4, array};
/// use std::sync::Arc;
///
/// // one column does not turn: what is left is the decay
/// let kernel = Retention::<f64>::new(1, 0.5)?;
/// let ones = array![[1.0], [1.0], [1.0]];
/// let out = kernel.forward(ones.view(), ones.view(), ones.view(), Mask::Causal)?;
/// assert!((out - array![[1.0], [1.5], [1.75]]).iter().all(|e| e.abs() < 1e-14));
///
/// // the heads of a layer
/// let heads = decay::retention(4).into_iter().map(|decay| {
///     let head: Arc<dyn Attention<f32>> = Arc::new(Retention::new(16, decay)?);
///     Ok(head)
/// });
/// let layer = MultiHead::per_head(heads.collect::<Result<_, dijiang::Error>>()?, 4)?;
/// let x = Array4::from_elem((1, 4, 10, 16), 0.1);
/// assert_eq!(
///     layer.forward(x.view(), x.view(), x.view(), Mask::Causal, None)?.dim(),
///     (1, 4, 10, 16)
/// );
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "Options", into = "Options", bound = "T: Scalar"))]
pub struct Retention<T: Scalar> {
    options: Options,
    kernel: Positional<Rotary, LinearAttention<IdentityFeatures<T>>>,
}

/// What a kernel is made of, and what is saved.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
struct Options {
    decay: f64,
    scale: Option<f64>,
    rotary: Rotary,
    xpos: bool,
}

/// The tokens over which a pair of columns decays by its whole ζ_i (the `scale_base` of the xPos
/// code).
const XPOS_TOKENS: f64 = 512.0;

impl<T: Scalar> Retention<T> {
    /// Retention over queries and keys of `head_dim` columns, with γ = `decay`.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `head_dim` is 0, [`Error::InvalidOption`] if `decay` is not from 0 to
    /// 1.
    #[allow(clippy::cast_precision_loss)]
    pub fn new(head_dim: usize, decay: f64) -> Result<Self, Error> {
        let rotary = Rotary::partial(head_dim, 0)?;
        check_decay(decay)?;
        let last = (head_dim / 2).saturating_sub(1).max(1) as f64;
        let frequencies =
            (0..head_dim / 2).map(|i| libm::pow(10_000.0, -(i as f64) / last)).collect();
        let rotary = rotary.with_frequencies(frequencies)?.with_pairs(RotaryPairs::Interleaved);
        Ok(Self::of(
            Options { decay, scale: None, rotary, xpos: false },
            IdentityFeatures::new(head_dim)?,
        ))
    }

    /// Sets the rotation. One with no columns that turn leaves the decay alone.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if it is of another `head_dim`.
    pub fn with_rotary(self, rotary: Rotary) -> Result<Self, Error> {
        check::size("rotary", "columns", self.options.rotary.head_dim(), rotary.head_dim())?;
        Ok(self.with(|options| options.rotary = rotary))
    }

    /// Lets the products of pair i decay by `ζ_i^{(n−m)/512}` as well (xPos, Sun et al., arXiv
    /// 2212.10554, with the 512 of its code):
    ///
    /// ```text
    /// ζ_i = (2i/dims + 0.4)/1.4,    i = 0 .. dims/2,    for the columns that turn;
    /// others do not decay
    /// ```
    ///
    /// The paper multiplies queries by `ζ^n` and keys by `ζ^{−m}`, which leave the range of `f32`
    /// after some 36 000 tokens; here it is a decay of each feature of the state. xPos has the
    /// frequencies of [`Rotary::with_base`].
    ///
    /// ```
    /// use dijiang::{Retention, Rotary, RotaryPairs};
    ///
    /// let rotary = Rotary::new(16)?.with_pairs(RotaryPairs::Interleaved);
    /// let xpos = Retention::<f32>::new(16, 1.0)?.with_rotary(rotary)?.with_xpos();
    /// # let _ = xpos;
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    #[must_use]
    pub fn with_xpos(self) -> Self {
        self.with(|options| options.xpos = true)
    }

    /// Sets the factor of the products, `1/√head_dim` unless set. One that is not positive and
    /// finite is reported by the first call that would use it.
    #[must_use]
    pub fn with_scale(self, scale: f64) -> Self {
        self.with(|options| options.scale = Some(scale))
    }

    /// γ.
    #[must_use]
    pub fn decay(&self) -> f64 {
        self.options.decay
    }

    /// The rotation.
    #[must_use]
    pub fn rotary(&self) -> &Rotary {
        &self.options.rotary
    }

    fn with(mut self, change: impl FnOnce(&mut Options)) -> Self {
        change(&mut self.options);
        Self::of(self.options, self.kernel.kernel().map().clone())
    }

    fn of(options: Options, features: IdentityFeatures<T>) -> Self {
        let mut kernel = LinearAttention::new(features).unnormalized().with_decay(options.decay);
        if options.xpos {
            kernel = kernel.with_channel_decay(xpos_decays(&options.rotary));
        }
        if let Some(scale) = options.scale {
            kernel = kernel.with_scale(scale);
        }
        Self { kernel: Positional::new(options.rotary.clone(), kernel), options }
    }
}

/// γ must be from 0 to 1.
fn check_decay(decay: f64) -> Result<(), Error> {
    if (0.0..=1.0).contains(&decay) {
        return Ok(());
    }
    let found = decay.to_string();
    Err(Error::InvalidOption { which: "decay", found, needed: "from 0 to 1" })
}

/// `ζ_i^{1/512}` of each column.
#[allow(clippy::cast_precision_loss)]
fn xpos_decays(rotary: &Rotary) -> Array1<f64> {
    let pairs = rotary.dims() / 2;
    let of_pair = |i: usize| {
        let zeta = (i as f64 / pairs as f64 + 0.4) / 1.4;
        libm::pow(zeta, 1.0 / XPOS_TOKENS)
    };
    Array1::from_shape_fn(rotary.head_dim(), |column| match rotary.pairs() {
        _ if column >= 2 * pairs => 1.0,
        RotaryPairs::Halves => of_pair(column % pairs),
        RotaryPairs::Interleaved => of_pair(column / 2),
    })
}

impl<T: Scalar> Attention<T> for Retention<T> {
    forward_by!(this => this.kernel);

    fn backward_heads(
        &self,
        heads: &mut [HeadGradient<'_, T>],
        mask: Mask,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        heads.iter_mut().try_for_each(|head| {
            if let Some(d_parameters) = &head.d_parameters {
                self.parameters().check_names(d_parameters)?;
            }
            let asked = head.d_parameters.as_ref().and_then(|d| d.get(DECAY));
            let mut inside = asked.map(|d| Parameters::new().with(INSIDE, d.to_owned()));
            let inner = HeadGradient { d_parameters: inside.as_mut(), ..head.reborrow() };
            self.kernel.backward_heads(&mut [inner], mask, scratch)?;
            let found = inside.as_ref().and_then(|inside| inside.get(INSIDE));
            if let (Some(d_parameters), Some(found)) = (&mut head.d_parameters, found) {
                d_parameters.insert(DECAY, found.to_owned());
            }
            Ok(())
        })
    }

    fn parameters(&self) -> Parameters<T> {
        match self.kernel.parameters().get(INSIDE) {
            Some(decay) => Parameters::new().with(DECAY, decay.to_owned()),
            None => Parameters::new(),
        }
    }

    fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Box<dyn Attention<T>>, Error> {
        self.parameters().check_names(parameters)?;
        let mut decay = self.options.decay;
        if let Some(&x) = parameters.get(DECAY).as_ref().and_then(|x| x.first()) {
            decay = x.as_f64();
        }
        check_decay(decay)?;
        Ok(Box::new(self.clone().with(|options| options.decay = decay)))
    }
}

/// The name of γ among the parameters, and among those of the kernel inside.
const DECAY: &str = "decay";
const INSIDE: &str = "kernel.decay.common";

#[cfg(feature = "serde")]
impl<T: Scalar> From<Retention<T>> for Options {
    fn from(kernel: Retention<T>) -> Self {
        kernel.options
    }
}

#[cfg(feature = "serde")]
impl<T: Scalar> TryFrom<Options> for Retention<T> {
    type Error = Error;

    fn try_from(options: Options) -> Result<Self, Error> {
        /// Decays of so many columns are made of what is saved.
        const MOST: usize = 1 << 20;
        check_decay(options.decay)?;
        let head_dim = options.rotary.head_dim();
        if head_dim > MOST {
            let (found, needed) = (head_dim.to_string(), "at most 2^20 in what is read");
            return Err(Error::InvalidOption { which: "head_dim", found, needed });
        }
        Ok(Self::of(options, IdentityFeatures::new(head_dim)?))
    }
}
