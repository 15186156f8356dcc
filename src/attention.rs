//! The trait of every kernel: [`Attention`], what a model holds.

pub(crate) mod alibi;
pub(crate) mod call;
pub(crate) mod cosformer;
pub(crate) mod delegate;
pub(crate) mod fingerprint;
pub(crate) mod fixed_gates;
pub(crate) mod gradient;
pub(crate) mod hybrid;
pub(crate) mod linear;
pub(crate) mod linformer;
pub(crate) mod masks;
pub(crate) mod memory_attention;
pub mod naive;
pub(crate) mod positional;
pub(crate) mod retention;
pub(crate) mod rotary;
pub(crate) mod scratch;
pub(crate) mod sharing;
pub(crate) mod softmax;
pub(crate) mod stream;
pub(crate) mod threads;

use crate::attention::call::Head;
use crate::attention::gradient::{Gradients, HeadGradient};
use crate::attention::scratch::Scratch;
use crate::attention::sharing::Sharing;
use crate::attention::stream::{Stream, StreamOptions};
use crate::check;
use crate::error::Error;
use crate::mask::Mask;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use core::fmt::Debug;
use ndarray::{Array2, ArrayView2, ArrayViewMut2};

/// An attention kernel: every kernel of the crate implements it, and a model holds it as
/// `Box<dyn Attention<T>>`.
///
/// The output is a weighted mean of the values,
///
/// ```text
/// o_t = Σ_j w(q_t, k_j) v_j / Σ_j w(q_t, k_j),
/// ```
///
/// and the kernels differ in the weight `w`. Softmax attention has `w(q, k) = exp(scale·q·k)`.
///
/// `Arc<A>` and `Box<A>` are kernels where `A` is one.
///
/// # Shapes
///
/// Tokens are rows: `q [n_q, d]`, `k [n_k, d]`, `v [n_k, d_v]`, `out [n_q, d_v]`. Views may have
/// any strides.
///
/// # Example
///
/// ```
/// use dijiang::{Attention, LinearAttention, Mask, Performer, SoftmaxAttention};
/// use ndarray::Array2;
///
/// let kernels: Vec<Box<dyn Attention<f32>>> = vec![
///     Box::new(SoftmaxAttention::new(8)?),
///     Box::new(LinearAttention::new(Performer::new(8, 32, 0)?)),
/// ];
/// let x = Array2::from_shape_fn((5, 8), |(i, j)| ((i * 8 + j) as f32).sin());
/// for kernel in &kernels {
///     let out = kernel.forward(x.view(), x.view(), x.view(), Mask::Causal)?;
///     assert_eq!(out.dim(), (5, 8));
///     // the first token sees only itself
///     assert!((&out.row(0) - &x.row(0)).iter().all(|e| e.abs() < 1e-6));
/// }
/// # Ok::<(), dijiang::Error>(())
/// ```
///
/// # Implementing it
///
/// Two methods are required: [`forward_heads`](Self::forward_heads), the whole sequence at once,
/// and [`stream`](Self::stream), token by token. If the kernel is a sum over the keys that a
/// [`Memory`](crate::Memory) can keep, write the memory and let
/// [`MemoryAttention`](crate::MemoryAttention) do both.
///
/// <style>pre.item-decl { max-height: 11em; overflow: auto; }</style>
pub trait Attention<T: Scalar>: Debug + Send + Sync {
    /// Attends with the query heads of a head of keys and values, and writes the outputs over
    /// whatever they held. Every other way to call a kernel comes down to this one.
    ///
    /// `heads` is one head, in working memory of the caller: a kernel of this crate allocates
    /// nothing once the memory has met arguments of these sizes. A kernel of [`Sharing::Layer`]
    /// takes several heads of keys and values, which then share one budget; of other kernels each
    /// head is answered by itself.
    ///
    /// Log decays are data of the tokens ([`Head::log_decay`]), computed as keys and values are,
    /// and so an argument. Kernels that are not [gated](crate::LinearAttention::gated) refuse them.
    /// What only knows `q`, `k` and `v` ([`fidelity`](crate::fidelity), for example) takes a gated
    /// kernel together with the log decays of a sequence: [`FixedGates`](crate::FixedGates).
    ///
    /// # Errors
    ///
    /// - [`Error::Shape`]: the shapes do not fit together, or `mask` is [`Mask::Causal`] and
    ///   `n_q ≠ n_k`, or [`Mask::CausalTail`] and `n_q > n_k`;
    /// - [`Error::ZeroSize`]: there are queries but no keys, or `v` has no columns;
    /// - [`Error::NotFinite`]: NaN or infinity in `q`, `k` or `v`;
    /// - [`Error::Overflow`], [`Error::Normalizer`]: finite input led out of the range of `T`;
    /// - [`Error::NothingSeen`]: a key mask or biases hide all keys from a query;
    /// - [`Error::InvalidOption`]: an option of the kernel cannot be used, such as a scale that is
    ///   not positive, or a log decay is positive or NaN;
    /// - [`Error::Unsupported`]: the kernel has no such mask, takes no key masks or biases, log
    ///   decays are missing or not expected, or the kernel does not give the
    ///   [logarithms of normalisers](Head::with_log_normalizer) that are asked for.
    ///
    /// After an error the content of the outputs is unspecified.
    fn forward_heads(
        &self,
        heads: &mut [Head<'_, T>],
        mask: Mask,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error>;

    /// Starts an empty causal stream for values of `value_dim` columns: the state a decoder keeps.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `value_dim` is 0, [`Error::InvalidOption`] if an option of the kernel
    /// cannot be used, [`Error::Unsupported`] if the kernel has no causal form.
    fn stream(&self, value_dim: usize) -> Result<Box<dyn Stream<T>>, Error>;

    /// Attends to `k` and `v` with every row of `q`, and allocates the output `[n_q, d_v]`.
    ///
    /// # Errors
    ///
    /// Those of [`forward_heads`](Self::forward_heads).
    fn forward(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mask: Mask,
    ) -> Result<Array2<T>, Error> {
        let mut out = Array2::zeros((q.nrows(), v.ncols()));
        self.forward_into(q, k, v, mask, out.view_mut())?;
        Ok(out)
    }

    /// Attends to `k` and `v` with every row of `q`, and writes the output over whatever `out`
    /// held.
    ///
    /// # Errors
    ///
    /// Those of [`forward_heads`](Self::forward_heads).
    fn forward_into(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mask: Mask,
        out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        self.forward_heads(&mut [Head::new(q, k, v, out)], mask, &mut Scratch::new())
    }

    /// Starts an empty causal stream that serves several query heads with one state, or several
    /// heads of keys and values with one budget.
    ///
    /// # Errors
    ///
    /// As [`stream`](Self::stream); [`Error::ZeroSize`] if a number of heads is 0,
    /// [`Error::Unsupported`] if a state of this kernel serves no more than one head: unless
    /// overridden, each query head needs a stream of its own.
    fn stream_with(&self, options: StreamOptions) -> Result<Box<dyn Stream<T>>, Error> {
        check::at_least_one("group", options.group)?;
        check::at_least_one("heads", options.heads)?;
        if options.group == 1 && options.heads == 1 {
            return self.stream(options.value_dim);
        }
        let why = "its type does not implement `Attention::stream_with`; begin one for each head";
        Err(Error::Unsupported { what: "one stream of several heads of this kernel", why })
    }

    /// The size of the state of a stream that has absorbed `tokens` tokens, in numbers of type `T`:
    /// what [`Stream::state_floats`] will say. To be overridden where it depends on the number of
    /// tokens.
    ///
    /// # Errors
    ///
    /// As [`stream`](Self::stream).
    fn state_floats(&self, value_dim: usize, tokens: usize) -> Result<usize, Error> {
        let _ = tokens;
        Ok(self.stream(value_dim)?.state_floats())
    }

    /// The same in bytes: what [`Stream::state_bytes`] will say. To be overridden where numbers are
    /// kept in fewer bits than `T` has ([`StateFormat`](crate::StateFormat)).
    ///
    /// # Errors
    ///
    /// As [`stream`](Self::stream).
    fn state_bytes(&self, value_dim: usize, tokens: usize) -> Result<usize, Error> {
        Ok(self.state_floats(value_dim, tokens)?.saturating_mul(size_of::<T>()))
    }

    /// How far the heads of a layer depend on each other, and share a state.
    fn sharing(&self) -> Sharing {
        Sharing::default()
    }

    /// Whether a forward pass can give the [logarithms of
    /// normalisers](Head::with_log_normalizer), which make the backward pass faster. Not unless
    /// overridden.
    fn gives_log_normalizer(&self) -> bool {
        false
    }

    /// Computes the gradient of a loss by queries, keys, values, log decays and parameters from
    /// that by the outputs, and adds it to what is there ([`HeadGradient`]).
    ///
    /// What the forward pass computed is computed again, in memory that does not depend on the
    /// number of tokens. A loss over several heads, sequences or calls needs one call for each.
    ///
    /// # Errors
    ///
    /// Those of [`forward_heads`](Self::forward_heads); [`Error::NotFinite`] for cotangents that
    /// are not finite, [`Error::Overflow`] if a gradient leaves the range of `T`;
    /// [`Error::Unsupported`] if the kernel has no backward pass, or
    /// one of its parts, such as a feature map of one's own, has none.
    fn backward_heads(
        &self,
        heads: &mut [HeadGradient<'_, T>],
        mask: Mask,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        let _ = (heads, mask, scratch);
        let why = "its type does not implement `Attention::backward_heads`; `SoftmaxAttention`, \
                   `LinearAttention`, `HybridAttention` and what is built of them have one";
        Err(Error::Unsupported { what: "the gradient of this kernel", why })
    }

    /// Computes the gradients of a loss from that by the outputs, `d_out [n_q, d_v]`, and allocates
    /// them: for kernels without log decays.
    ///
    /// ```
    /// use dijiang::{Attention, Mask, SoftmaxAttention};
    /// use ndarray::array;
    ///
    /// let kernel = SoftmaxAttention::<f64>::new(1)?;
    /// let (q, k, v) = (array![[0.0]], array![[1.0], [2.0]], array![[3.0], [5.0]]);
    /// let d = kernel.backward(q.view(), k.view(), v.view(), array![[1.0]].view(), Mask::Full)?;
    /// assert_eq!(d.v, array![[0.5], [0.5]]); // the weights
    /// assert_eq!(d.q, array![[0.5]]); // the covariance of keys and values
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`backward_heads`](Self::backward_heads).
    fn backward(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        d_out: ArrayView2<'_, T>,
        mask: Mask,
    ) -> Result<Gradients<T>, Error> {
        let mut d = Gradients {
            q: Array2::zeros(q.dim()),
            k: Array2::zeros(k.dim()),
            v: Array2::zeros(v.dim()),
            parameters: self.parameters().zeros_like(),
        };
        let gradients = [d.q.view_mut(), d.k.view_mut(), d.v.view_mut()];
        let head = HeadGradient::new([q, k, v], d_out, gradients);
        let head = head.with_parameters(&mut d.parameters);
        self.backward_heads(&mut [head], mask, &mut Scratch::new())?;
        Ok(d)
    }

    /// The numbers of the kernel that can be trained, by name: what
    /// [`backward_heads`](Self::backward_heads) gives gradients by. None unless overridden.
    fn parameters(&self) -> Parameters<T> {
        Parameters::new()
    }

    /// The same kernel with other numbers in the place of those of these names. Kernels and maps
    /// are immutable, so this is a new one.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] if there is no parameter of a name, or it has another shape, and the
    /// errors of the constructors; [`Error::Unsupported`] unless overridden.
    fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Box<dyn Attention<T>>, Error> {
        let _ = parameters;
        let why = "its type does not implement `Attention::with_parameters`";
        Err(Error::Unsupported { what: "this kernel with other parameters", why })
    }

    /// The unnormalised weights of single pairs, where they depend on the pair alone.
    fn pair_weights(&self) -> Option<&dyn PairWeights<T>> {
        None
    }
}

/// A kernel whose weight `w(q, k)` depends on query and key alone.
pub trait PairWeights<T: Scalar> {
    /// The natural logarithm of the unnormalised weight `w(q_i, k_j)` of every pair, `[n_q, n_k]`;
    /// weights that are not positive give −∞.
    ///
    /// This shows how well a kernel estimates `exp(scale·q·k)` before the normaliser hides a common
    /// factor. It is a tool for measuring: it takes O(n_q·n_k) memory.
    ///
    /// # Errors
    ///
    /// As [`Attention::forward_heads`].
    fn log_weights(&self, q: ArrayView2<'_, T>, k: ArrayView2<'_, T>)
    -> Result<Array2<f64>, Error>;
}
