//! Any kernel with rotary position embedding inside.

use crate::attention::Attention;
use crate::attention::delegate::attention_by;
use crate::attention::positional::Positional;
use crate::rotary::Rotary;
use crate::scalar::Scalar;

/// A kernel whose queries and keys are turned by their positions first ([`Rotary`]), for models
/// that hand out raw ones:
///
/// ```text
/// o_t = A(R_t q_t; R_0 k_0, v_0; R_1 k_1, v_1; ..),    R_t the rotation of position t
/// ```
///
/// Positions count from 0: in a stream, its next token has the position
/// [`len`](crate::Stream::len). With [`Mask::Full`](crate::Mask::Full) queries and keys both count
/// from 0, so with `n_q ≠ n_k` row `i` of both is at the same position; turn them with
/// [`Rotary::rotate`] where that is not meant. Streams have the size, checkpoints and saved states
/// of the kernel's own.
///
/// Its parameters are those of the kernel, under `kernel`: `kernel.map.projection`.
///
/// Each head computes the angles of its tokens again, and one copy of `q` and `k` of a call; in a
/// layer of many heads [`Rotary::angles`] and
/// [`RotaryAngles::rotate_heads_in_place`](crate::RotaryAngles::rotate_heads_in_place) before the
/// kernels are cheaper. [Gated](crate::LinearAttention::gated) kernels get the log decays of their
/// tokens.
///
/// ```
/// use dijiang::{Attention, Far, HybridAttention, Mask, Rotary, RotaryAttention};
/// use ndarray::Array2;
///
/// let hybrid = HybridAttention::<f32>::builder(8)
///     .window(16)
///     .sinks(2)
///     .far(Far::merged(12))
///     .build()?;
/// let rotary = Rotary::new(8)?;
/// let kernel = RotaryAttention::new(rotary.clone(), hybrid.clone());
/// let x = Array2::from_shape_fn((60, 8), |(i, j)| ((i * 8 + j) as f32 * 0.3).sin());
/// let out = kernel.forward(x.view(), x.view(), x.view(), Mask::Causal)?;
///
/// let mut turned = x.clone();
/// rotary.rotate_in_place(turned.view_mut(), 0)?;
/// assert_eq!(out, hybrid.forward(turned.view(), turned.view(), x.view(), Mask::Causal)?);
/// # Ok::<(), dijiang::Error>(())
/// ```
///
/// # Errors
///
/// Those of the kernel; a kernel of another `head_dim` than the rotation reports
/// [`Error::Shape`](crate::Error::Shape) in every call.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct RotaryAttention<A>(Positional<Rotary, A>);

impl<A> RotaryAttention<A> {
    /// `kernel` behind `rotary`, of the same `head_dim`. The kernel may be an
    /// `Arc<dyn Attention<T>>`.
    pub fn new(rotary: Rotary, kernel: A) -> Self {
        Self(Positional::new(rotary, kernel))
    }

    /// The rotation.
    #[must_use]
    pub fn rotary(&self) -> &Rotary {
        self.0.positions()
    }

    /// The kernel inside.
    #[must_use]
    pub fn kernel(&self) -> &A {
        self.0.kernel()
    }
}

attention_by!([T: Scalar, A: Attention<T>] RotaryAttention<A>, this => this.0);
