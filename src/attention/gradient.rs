//! What a backward pass takes and gives.

use crate::attention::call::NOT_GATED;
use crate::attention::masks::{check_masks, check_plain};
use crate::check;
use crate::error::Error;
use crate::mask::Mask;
use crate::memory::linear::checkpoints::SumCheckpoints;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayView3, ArrayViewMut2, ArrayViewMut3, Axis};

/// The place of a kernel inside another one, in the names of its parameters.
pub(crate) const KERNEL: &str = "kernel";

/// One head of keys and values, the gradient of a loss by its outputs, and where the gradients by
/// its arguments go: what [`Attention::backward_heads`](crate::Attention::backward_heads) is called
/// with. Shapes are those of [`Head`](crate::Head), and views may have any strides.
///
/// Gradients are *added* to what `d_q`, `d_k`, `d_v`, `d_log_decay`, `d_bias` and `d_parameters`
/// hold, as a sum over several uses of an argument needs it: begin with zeros. After an error their
/// content is unspecified.
///
/// ```
/// use dijiang::{Attention, HeadGradient, LinearAttention, Mask, Performer, Scratch};
/// use ndarray::Array2;
///
/// let kernel = LinearAttention::new(Performer::<f32>::new(8, 16, 0)?);
/// let x = Array2::from_shape_fn((20, 8), |(t, c)| ((t * 8 + c) as f32).sin());
/// // the loss is the sum of all outputs
/// let d_out = Array2::ones((20, 8));
/// let [mut d_q, mut d_k, mut d_v] = [(); 3].map(|()| Array2::zeros((20, 8)));
/// let mut d_parameters = Attention::<f32>::parameters(&kernel).zeros_like();
/// let head = HeadGradient::new(
///     [x.view(), x.view(), x.view()],
///     d_out.view(),
///     [d_q.view_mut(), d_k.view_mut(), d_v.view_mut()],
/// );
/// let mut heads = [head.with_parameters(&mut d_parameters)];
/// kernel.backward_heads(&mut heads, Mask::Causal, &mut Scratch::new())?;
/// // each query hands on a weight of one in all
/// assert!((d_v.sum() - 160.0).abs() < 1e-3);
/// assert_eq!(d_parameters.get("map.projection").unwrap().shape(), [16, 8]);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug)]
pub struct HeadGradient<'a, T> {
    /// Queries `[group, n_q, d]`.
    pub q: ArrayView3<'a, T>,
    /// Keys `[n_k, d]`.
    pub k: ArrayView2<'a, T>,
    /// Values `[n_k, d_v]`.
    pub v: ArrayView2<'a, T>,
    /// Log decays `[n_k, 1 or num_features]`, of gated kernels.
    pub log_decay: Option<ArrayView2<'a, T>>,
    /// Which keys may be seen, `[n_k]`.
    pub key_mask: Option<ArrayView1<'a, bool>>,
    /// What is added to scores, `[1 or group, n_q, n_k]`.
    pub bias: Option<ArrayView3<'a, T>>,
    /// The gradient by the outputs, `[group, n_q, d_v]`.
    pub d_out: ArrayView3<'a, T>,
    /// What the forward pass gave, for kernels that can make use of it.
    pub record: Option<ForwardRecord<'a, T>>,
    /// Sums that the forward pass has kept, for linear attention.
    pub checkpoints: Option<&'a SumCheckpoints<T>>,
    /// The gradient by the queries, `[group, n_q, d]`.
    pub d_q: ArrayViewMut3<'a, T>,
    /// The gradient by the keys, summed over the query heads, `[n_k, d]`.
    pub d_k: ArrayViewMut2<'a, T>,
    /// The gradient by the values, summed over the query heads, `[n_k, d_v]`.
    pub d_v: ArrayViewMut2<'a, T>,
    /// The gradient by the log decays, summed over the query heads, `[n_k, 1 or num_features]`;
    /// none is computed where there is no room for it.
    pub d_log_decay: Option<ArrayViewMut2<'a, T>>,
    /// The gradient by the biases, of their shape; none is computed where there is no room for it.
    pub d_bias: Option<ArrayViewMut3<'a, T>>,
    /// The gradient by the [parameters](crate::Attention::parameters) of the kernel, by their
    /// names; none is computed for names that are not there, and names that the kernel does not
    /// have are an error.
    pub d_parameters: Option<&'a mut Parameters<T>>,
}

/// What a forward pass of the same kernel gave for the same arguments, so that a backward pass need
/// not compute it again. Gradients are wrong where it is that of others.
///
/// Exact softmax then leaves out its first pass over the scores. Linear attention needs neither:
/// it gets both on the way, for less than reading them would cost, and can use
/// [`SumCheckpoints`](crate::SumCheckpoints) instead. Hybrids need neither as well.
#[derive(Debug)]
pub struct ForwardRecord<'a, T> {
    /// The outputs, `[group, n_q, d_v]`.
    pub out: ArrayView3<'a, T>,
    /// The natural logarithms of the sums of the weights, `[group, n_q]`: what
    /// [`Head::with_log_normalizer`](crate::Head::with_log_normalizer) asks for.
    pub log_normalizer: ArrayView2<'a, T>,
}

impl<T> Clone for ForwardRecord<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for ForwardRecord<'_, T> {}

impl<T> ForwardRecord<'_, T> {
    /// The same, borrowed for a shorter time.
    #[must_use]
    pub fn reborrow(&self) -> ForwardRecord<'_, T> {
        ForwardRecord { out: self.out.reborrow(), log_normalizer: self.log_normalizer.reborrow() }
    }
}

/// The gradients that [`Attention::backward`](crate::Attention::backward) gives.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients<T> {
    /// By the queries, `[n_q, d]`.
    pub q: Array2<T>,
    /// By the keys, `[n_k, d]`.
    pub k: Array2<T>,
    /// By the values, `[n_k, d_v]`.
    pub v: Array2<T>,
    /// By the [parameters](crate::Attention::parameters) of the kernel.
    pub parameters: Parameters<T>,
}

impl<'a, T> HeadGradient<'a, T> {
    /// One query head: `q [n_q, d]`, `k [n_k, d]`, `v [n_k, d_v]`, `d_out [n_q, d_v]`, and the
    /// gradients by the first three.
    #[must_use]
    pub fn new(
        [q, k, v]: [ArrayView2<'a, T>; 3],
        d_out: ArrayView2<'a, T>,
        [d_q, d_k, d_v]: [ArrayViewMut2<'a, T>; 3],
    ) -> Self {
        let [q, d_out] = [q, d_out].map(|x| x.insert_axis(Axis(0)));
        Self::group(q, [k, v], d_out, d_q.insert_axis(Axis(0)), [d_k, d_v])
    }

    /// Several query heads: `q [group, n_q, d]`, `k [n_k, d]` and `v [n_k, d_v]`,
    /// `d_out [group, n_q, d_v]`, and the gradients by queries, and by keys and values.
    #[must_use]
    pub fn group(
        q: ArrayView3<'a, T>,
        [k, v]: [ArrayView2<'a, T>; 2],
        d_out: ArrayView3<'a, T>,
        d_q: ArrayViewMut3<'a, T>,
        [d_k, d_v]: [ArrayViewMut2<'a, T>; 2],
    ) -> Self {
        Self {
            q,
            k,
            v,
            log_decay: None,
            key_mask: None,
            bias: None,
            d_out,
            record: None,
            checkpoints: None,
            d_q,
            d_k,
            d_v,
            d_log_decay: None,
            d_bias: None,
            d_parameters: None,
        }
    }

    /// Brings the log decays of the tokens and room for the gradient by them, both
    /// `[n_k, 1 or num_features]`.
    #[must_use]
    pub fn with_log_decay(
        self,
        log_decay: ArrayView2<'a, T>,
        d_log_decay: ArrayViewMut2<'a, T>,
    ) -> Self {
        Self { log_decay: Some(log_decay), d_log_decay: Some(d_log_decay), ..self }
    }

    /// Says which keys may be seen, `[n_k]`; the others get no gradient
    /// ([`Head::with_key_mask`](crate::Head::with_key_mask)).
    #[must_use]
    pub fn with_key_mask(self, key_mask: ArrayView1<'a, bool>) -> Self {
        Self { key_mask: Some(key_mask), ..self }
    }

    /// Brings the biases of the scores, `[1 or group, n_q, n_k]`
    /// ([`Head::with_bias`](crate::Head::with_bias)), and room of the same shape for the gradient
    /// by them, if it is wanted: that by the scores, summed over the query heads that share one.
    ///
    /// ```
    /// use dijiang::{Attention, HeadGradient, Mask, Scratch, SoftmaxAttention};
    /// use ndarray::{Array3, array};
    ///
    /// let kernel = SoftmaxAttention::<f64>::new(1)?;
    /// let (q, k, v) = (array![[0.0]], array![[1.0], [2.0]], array![[3.0], [5.0]]);
    /// let [mut d_q, mut d_k, mut d_v] = [&q, &k, &v].map(|x| x.mapv(|_| 0.0));
    /// let (bias, mut d_bias) = (Array3::zeros((1, 1, 2)), Array3::zeros((1, 1, 2)));
    /// let d_out = array![[1.0]];
    /// let d = [d_q.view_mut(), d_k.view_mut(), d_v.view_mut()];
    /// let head = HeadGradient::new([q.view(), k.view(), v.view()], d_out.view(), d);
    /// let mut heads = [head.with_bias(bias.view(), Some(d_bias.view_mut()))];
    /// kernel.backward_heads(&mut heads, Mask::Full, &mut Scratch::new())?;
    /// assert_eq!(d_bias, array![[[-0.5, 0.5]]]); // weights times values less their mean
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    #[must_use]
    pub fn with_bias(self, bias: ArrayView3<'a, T>, d_bias: Option<ArrayViewMut3<'a, T>>) -> Self {
        Self { bias: Some(bias), d_bias, ..self }
    }

    /// Brings what the forward pass gave.
    #[must_use]
    pub fn with_record(self, record: ForwardRecord<'a, T>) -> Self {
        Self { record: Some(record), ..self }
    }

    /// Brings the sums that a forward pass of the same kernel kept for the same arguments
    /// ([`Head::with_checkpoints`](crate::Head::with_checkpoints)); gradients are wrong where they
    /// are those of others. Causal linear attention, what is built of it, and hybrids with merged
    /// entries then need not compute it again; other kernels have no use for them.
    #[must_use]
    pub fn with_checkpoints(self, checkpoints: &'a SumCheckpoints<T>) -> Self {
        Self { checkpoints: Some(checkpoints), ..self }
    }

    /// Asks for the gradient by parameters of these names.
    #[must_use]
    pub fn with_parameters(self, d_parameters: &'a mut Parameters<T>) -> Self {
        Self { d_parameters: Some(d_parameters), ..self }
    }

    /// The same head, borrowed for a shorter time.
    pub fn reborrow(&mut self) -> HeadGradient<'_, T> {
        let d_parameters: Option<&mut Parameters<T>> = match &mut self.d_parameters {
            Some(d_parameters) => Some(d_parameters),
            None => None,
        };
        HeadGradient {
            q: self.q,
            k: self.k,
            v: self.v,
            log_decay: self.log_decay,
            key_mask: self.key_mask,
            bias: self.bias,
            d_out: self.d_out,
            record: self.record.as_ref().map(ForwardRecord::reborrow),
            checkpoints: self.checkpoints,
            d_q: self.d_q.view_mut(),
            d_k: self.d_k.view_mut(),
            d_v: self.d_v.view_mut(),
            d_log_decay: self.d_log_decay.as_mut().map(|x| x.view_mut()),
            d_bias: self.d_bias.as_mut().map(|x| x.view_mut()),
            d_parameters,
        }
    }

    /// Runs `backward` with the head as a kernel inside gets it: gradients by its parameters have
    /// names that begin with its place here.
    pub(crate) fn with_kernel_inside(
        &mut self,
        backward: impl FnOnce(HeadGradient<'_, T>) -> Result<(), Error>,
    ) -> Result<(), Error>
    where
        T: Scalar,
    {
        let mut inside = self.d_parameters.as_ref().map(|d| d.of(KERNEL));
        let d_parameters = inside.as_mut().filter(|inside| !inside.is_empty());
        backward(HeadGradient { d_parameters, ..self.reborrow() })?;
        match (&mut self.d_parameters, inside) {
            (Some(d_parameters), Some(inside)) => d_parameters.set(&inside.under(KERNEL)),
            _ => Ok(()),
        }
    }

    /// Query heads.
    #[must_use]
    pub fn group_len(&self) -> usize {
        self.q.len_of(Axis(0))
    }

    /// Queries of each query head.
    #[must_use]
    pub fn queries(&self) -> usize {
        self.q.len_of(Axis(1))
    }

    /// Keys.
    #[must_use]
    pub fn keys(&self) -> usize {
        self.k.nrows()
    }
}

impl<T: Scalar> HeadGradient<'_, T> {
    /// Checks the shapes for a kernel over `head_dim` columns, as
    /// [`Head::check_forward`](crate::Head::check_forward) does, and refuses key masks and biases.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the shapes do not fit together, or `mask` is [`Mask::Causal`] and there
    /// are other numbers of queries and keys, or [`Mask::CausalTail`] and there are more queries
    /// than keys; [`Error::ZeroSize`] if there are queries but no keys, or the values have no
    /// columns; [`Error::Unsupported`] if there is a key mask, or there are biases.
    pub fn check_backward(&self, head_dim: usize, mask: Mask) -> Result<(), Error> {
        self.check_backward_masked(head_dim, mask)?;
        check_plain(self.key_mask.is_some(), self.bias.is_some() || self.d_bias.is_some())
    }

    /// As [`check_backward`](Self::check_backward), of kernels that take key masks and biases,
    /// whose shapes and numbers are checked as well.
    pub(crate) fn check_backward_masked(&self, head_dim: usize, mask: Mask) -> Result<(), Error> {
        let Self { q, k, v, d_out, d_q, d_k, d_v, .. } = self;
        check::size("d_out", "heads", self.group_len(), d_out.len_of(Axis(0)))?;
        check::size("q", "columns", head_dim, q.len_of(Axis(2)))?;
        check::size("k", "columns", head_dim, k.ncols())?;
        check::size("v", "rows", k.nrows(), v.nrows())?;
        check::at_least_one("v columns", v.ncols())?;
        check::size("d_out", "rows", self.queries(), d_out.len_of(Axis(1)))?;
        check::size("d_out", "columns", v.ncols(), d_out.len_of(Axis(2)))?;
        check::mask(mask, [self.queries(), k.nrows()])?;
        if self.queries() > 0 {
            check::at_least_one("k rows", k.nrows())?;
        }
        check::size("d_q", "heads", self.group_len(), d_q.len_of(Axis(0)))?;
        check::size("d_q", "rows", self.queries(), d_q.len_of(Axis(1)))?;
        check::size("d_q", "columns", head_dim, d_q.len_of(Axis(2)))?;
        for (which, gradient, x) in [("d_k", d_k, k), ("d_v", d_v, v)] {
            check::size(which, "rows", x.nrows(), gradient.nrows())?;
            check::size(which, "columns", x.ncols(), gradient.ncols())?;
        }
        check_masks(self.key_mask, self.bias, [self.group_len(), self.queries(), self.keys()])?;
        if let Some(d_bias) = &self.d_bias {
            let Some(bias) = &self.bias else { return Err(NO_BIAS_TO_TRAIN) };
            for (axis, name) in [(0, "heads"), (1, "rows"), (2, "columns")] {
                check::size("d_bias", name, bias.len_of(Axis(axis)), d_bias.len_of(Axis(axis)))?;
            }
        }
        if let Some(ForwardRecord { out, log_normalizer }) = self.record {
            for (axis, name) in [(0, "heads"), (1, "rows"), (2, "columns")] {
                check::size("record.out", name, d_out.len_of(Axis(axis)), out.len_of(Axis(axis)))?;
            }
            check::size(
                "record.log_normalizer",
                "heads",
                self.group_len(),
                log_normalizer.nrows(),
            )?;
            check::size("record.log_normalizer", "rows", self.queries(), log_normalizer.ncols())?;
        }
        Ok(())
    }

    /// Checks that queries, keys, values, cotangents and what a forward pass gave are finite.
    ///
    /// # Errors
    ///
    /// [`Error::NotFinite`] if a number is NaN or infinite.
    pub fn check_finite(&self) -> Result<(), Error> {
        self.q.outer_iter().try_for_each(|q| check::finite("q", q))?;
        check::finite("k", self.k)?;
        check::finite("v", self.v)?;
        self.d_out.outer_iter().try_for_each(|d_out| check::finite("d_out", d_out))?;
        if let Some(ForwardRecord { out, log_normalizer }) = self.record {
            out.outer_iter().try_for_each(|out| check::finite("record.out", out))?;
            check::finite("record.log_normalizer", log_normalizer)?;
        }
        Ok(())
    }

    /// Refuses log decays, for kernels that are not gated.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if there are any.
    pub fn check_not_gated(&self) -> Result<(), Error> {
        if self.log_decay.is_some() || self.d_log_decay.is_some() { Err(NOT_GATED) } else { Ok(()) }
    }
}

pub(crate) const NO_BIAS_TO_TRAIN: Error = Error::Unsupported {
    what: "a gradient by biases that are not there",
    why: "bring them with `with_bias`",
};
