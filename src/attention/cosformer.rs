//! cosFormer: ReLU features that forget by a cosine of the distance.

use crate::attention::delegate::attention_by;
use crate::attention::fingerprint::Fingerprint;
use crate::attention::linear::LinearAttention;
use crate::attention::positional::Positional;
use crate::attention::positional::rotate::Positions;
use crate::check;
use crate::error::Error;
use crate::features::elementwise::IdentityFeatures;
use crate::rotary::Rotary;
use crate::rotary::angles::RotaryAngles;
use crate::scalar::Scalar;
use ndarray::{ArrayView2, ArrayViewMut2, Axis};

/// Linear attention whose weight falls with the distance (cosFormer, Qin et al., arXiv 2202.08791,
/// equations 10 to 13):
///
/// ```text
/// o_i = Σ_j w_ij v_j / Σ_j w_ij,    w_ij = φ(q_i)·φ(k_j)·cos(π/2·(i − j)/M),
/// φ(x) = max(0, x) + ε,    M = max_len
/// ```
///
/// which is linear attention over `2·head_dim` features, since
/// `cos(a − b) = cos a·cos b + sin a·sin b`:
///
/// ```text
/// [φ(x_i)·cos(πi/2M), φ(x_i)·sin(πi/2M)]    of the token at position i
/// ```
///
/// Positions count from 0, in a stream from its first token; with [`Mask::Full`](crate::Mask::Full)
/// queries and keys both count from 0, and with [`Mask::CausalTail`](crate::Mask::CausalTail) the
/// first query is at `n_k − n_q`. A position of `max_len` or more would make weights negative
/// and gives [`Error::TooLong`]: choose the longest sequence there will be, as the paper does. A
/// scale would cancel, so there is none.
///
/// ε belongs to the features, as in [`ReluFeatures`](crate::ReluFeatures): it keeps the normaliser
/// from vanishing where the positive parts of a query and of all keys do not meet. The paper's code
/// has a plain ReLU and bounds the normaliser from below by 10⁻⁶ instead; the default ε = 10⁻⁶
/// changes its weights in the sixth digit. It has a [`with_epsilon`](Self::with_epsilon) for
/// others, 0 among them.
///
/// There is nothing to train in it but what gives it queries and keys. In its gradient the ReLU has
/// slope 0 at 0.
///
/// The state of a stream is `4·head_dim·(value_dim + 1) + 1` numbers, and `16·(2·head_dim +
/// value_dim)` for tokens that wait, as that of
/// [`LinearAttention`](crate::LinearAttention).
///
/// ```
/// use dijiang::{Attention, CosFormer, Mask};
/// use ndarray::{Array2, array};
///
/// // three positions, so cosines of 0, 30 and 60 degrees
/// let kernel = CosFormer::<f64>::new(1, 3)?;
/// let (ones, v) = (Array2::ones((3, 1)), array![[1.0], [0.0], [0.0]]);
/// let out = kernel.forward(ones.view(), ones.view(), v.view(), Mask::Causal)?;
/// let (near, far) = ((std::f64::consts::PI / 6.0).cos(), 0.5);
/// assert!((out[[2, 0]] - far / (1.0 + near + far)).abs() < 1e-12);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(
    feature = "serde",
    serde(try_from = "SavedCosFormer", into = "SavedCosFormer", bound = "T: Scalar")
)]
pub struct CosFormer<T: Scalar> {
    kernel: Positional<Cosines, LinearAttention<IdentityFeatures<T>>>,
}

impl<T: Scalar> CosFormer<T> {
    /// Over queries and keys of `head_dim` columns, for sequences of at most `max_len` tokens.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `head_dim` or `max_len` is 0, [`Error::InvalidOption`] if `head_dim`
    /// is too large for an array.
    pub fn new(head_dim: usize, max_len: usize) -> Result<Self, Error> {
        check::at_least_one("head_dim", head_dim)?;
        check::at_least_one("max_len", max_len)?;
        check::array("head_dim", head_dim, 2)?;
        #[allow(clippy::cast_precision_loss)]
        let frequency = core::f64::consts::FRAC_PI_2 / max_len as f64;
        let turn = Rotary::new(2)?.with_frequencies(vec![frequency])?;
        Self::of(Cosines { head_dim, max_len, epsilon: 1e-6, turn })
    }

    fn of(cosines: Cosines) -> Result<Self, Error> {
        let features = IdentityFeatures::new(2 * cosines.head_dim)?;
        Ok(Self {
            kernel: Positional::new(cosines, LinearAttention::new(features).with_scale(1.0)),
        })
    }

    /// Sets ε, 10⁻⁶ unless set. Zero is allowed: then a query whose features meet no key's gives
    /// [`Error::Normalizer`].
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if it is negative or not finite.
    pub fn with_epsilon(self, epsilon: f64) -> Result<Self, Error> {
        check::epsilon::<T>(epsilon)?;
        Self::of(Cosines { epsilon, ..self.kernel.positions().clone() })
    }

    /// The number of positions, M.
    #[must_use]
    pub fn max_len(&self) -> usize {
        self.kernel.positions().max_len
    }
}

attention_by!([T: Scalar] CosFormer<T>, this => this.kernel);

/// `x → [φ(x)·cos, φ(x)·sin]`.
#[derive(Clone, Debug)]
struct Cosines {
    head_dim: usize,
    max_len: usize,
    epsilon: f64,
    /// One pair, whose angle is `π/2M` a position.
    turn: Rotary,
}

impl Positions for Cosines {
    const NAME: &'static str = "cosformer";

    fn fingerprint(&self) -> Fingerprint {
        #[allow(clippy::cast_precision_loss)]
        let max_len = self.max_len as f64;
        Fingerprint::new().with("max_len", [max_len]).with("epsilon", [self.epsilon])
    }

    fn head_dim(&self) -> usize {
        self.head_dim
    }

    fn inner_dim(&self) -> usize {
        2 * self.head_dim
    }

    fn rotary(&self) -> &Rotary {
        &self.turn
    }

    fn check_end(&self, end: usize) -> Result<(), Error> {
        check::length(self.max_len, end)
    }

    fn rotate<T: Scalar>(
        &self,
        angles: &RotaryAngles<T>,
        x: ArrayView2<'_, T>,
        mut out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        let epsilon = T::from_f64(self.epsilon);
        let (cos, sin) = angles.parts();
        for (((x, mut out), &cos), &sin) in
            x.outer_iter().zip(out.outer_iter_mut()).zip(cos).zip(sin)
        {
            let (first, second) = out.view_mut().split_at(Axis(0), self.head_dim);
            for ((&x, first), second) in x.iter().zip(first).zip(second) {
                let feature = x.max(T::zero()) + epsilon;
                (*first, *second) = (feature * cos, feature * sin);
            }
        }
        Ok(())
    }

    fn rotate_back<T: Scalar>(
        &self,
        angles: &RotaryAngles<T>,
        x: ArrayView2<'_, T>,
        d_out: ArrayViewMut2<'_, T>,
        mut d_x: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        let (cos, sin) = angles.parts();
        let tokens = x.outer_iter().zip(d_x.outer_iter_mut()).zip(d_out.outer_iter());
        for (((x, d_x), d_out), (&cos, &sin)) in tokens.zip(cos.iter().zip(sin)) {
            let (first, second) = d_out.split_at(Axis(0), self.head_dim);
            for (((&x, d_x), &first), &second) in x.iter().zip(d_x).zip(first).zip(second) {
                if x > T::zero() {
                    *d_x += first * cos + second * sin;
                }
            }
        }
        Ok(())
    }
}

/// What is saved.
#[cfg(feature = "serde")]
#[derive(serde::Serialize, serde::Deserialize)]
struct SavedCosFormer {
    head_dim: usize,
    max_len: usize,
    epsilon: f64,
}

#[cfg(feature = "serde")]
impl<T: Scalar> From<CosFormer<T>> for SavedCosFormer {
    fn from(kernel: CosFormer<T>) -> Self {
        let Cosines { head_dim, max_len, epsilon, .. } = *kernel.kernel.positions();
        Self { head_dim, max_len, epsilon }
    }
}

#[cfg(feature = "serde")]
impl<T: Scalar> TryFrom<SavedCosFormer> for CosFormer<T> {
    type Error = Error;

    fn try_from(parts: SavedCosFormer) -> Result<Self, Error> {
        Self::new(parts.head_dim, parts.max_len)?.with_epsilon(parts.epsilon)
    }
}
