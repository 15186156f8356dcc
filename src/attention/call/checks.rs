//! What the arguments of a kernel must be.

use crate::attention::call::{Head, NO_LOG_NORMALIZER, NOT_GATED};
use crate::attention::masks::{check_masks, check_plain};
use crate::check;
use crate::error::Error;
use crate::mask::Mask;
use crate::scalar::Scalar;
use ndarray::Axis;

impl<T: Scalar> Head<'_, T> {
    /// Checks the shapes for a forward pass of a kernel over `head_dim` columns, and refuses key
    /// masks and biases. For kernels of one's own: log decays and finite numbers are checked apart.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the shapes do not fit together, or `mask` is [`Mask::Causal`] and there
    /// are other numbers of queries and keys, or [`Mask::CausalTail`] and there are more queries
    /// than keys; [`Error::ZeroSize`] if there are queries but no keys, or the values have no
    /// columns; [`Error::Unsupported`] if there is a key mask, or there are biases.
    pub fn check_forward(&self, head_dim: usize, mask: Mask) -> Result<(), Error> {
        self.check_forward_masked(head_dim, mask)?;
        check_plain(self.key_mask.is_some(), self.bias.is_some())
    }

    /// As [`check_forward`](Self::check_forward), of kernels that take key masks and biases, whose
    /// shapes and numbers are checked as well.
    pub(crate) fn check_forward_masked(&self, head_dim: usize, mask: Mask) -> Result<(), Error> {
        let Self { k, v, out, .. } = self;
        self.check_sizes(head_dim)?;
        check::at_least_one("v columns", v.ncols())?;
        check::size("out", "rows", self.queries(), out.len_of(Axis(1)))?;
        check::size("out", "columns", v.ncols(), out.len_of(Axis(2)))?;
        check::mask(mask, [self.queries(), k.nrows()])?;
        if self.queries() > 0 {
            check::at_least_one("k rows", k.nrows())?;
        }
        let sizes = [self.group_len(), self.queries(), self.keys()];
        check_masks(self.key_mask, self.bias, sizes)
    }

    /// Checks the shapes for a stream of a kernel over `head_dim` columns, with values of
    /// `value_dim` columns and `group` query heads.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if a shape does not fit, [`Error::Unsupported`] if there is a key mask, or
    /// there are biases.
    pub fn check_extend(
        &self,
        head_dim: usize,
        value_dim: usize,
        group: usize,
    ) -> Result<(), Error> {
        self.check_extend_sizes(head_dim, value_dim, group)?;
        check_plain(self.key_mask.is_some(), self.bias.is_some())
    }

    /// As [`check_extend`](Self::check_extend), of a stream that takes biases and has `before`
    /// tokens; the biases are checked as well.
    pub(crate) fn check_extend_biased(
        &self,
        [head_dim, value_dim]: [usize; 2],
        group: usize,
        before: usize,
    ) -> Result<(), Error> {
        self.check_extend_sizes(head_dim, value_dim, group)?;
        check_plain(self.key_mask.is_some(), false)?;
        check_masks(None, self.bias, [group, self.queries(), before + self.keys()])
    }

    fn check_extend_sizes(
        &self,
        head_dim: usize,
        value_dim: usize,
        group: usize,
    ) -> Result<(), Error> {
        let Self { k, v, out, .. } = self;
        check::size("q", "heads", group, self.group_len())?;
        check::size("v", "columns", value_dim, v.ncols())?;
        self.check_sizes(head_dim)?;
        check::size("out", "rows", self.queries(), out.len_of(Axis(1)))?;
        check::size("out", "columns", v.ncols(), out.len_of(Axis(2)))?;
        check::size("k", "rows", self.queries(), k.nrows())
    }

    fn check_sizes(&self, head_dim: usize) -> Result<(), Error> {
        if let Some(log_normalizer) = &self.log_normalizer {
            check::size("log_normalizer", "heads", self.group_len(), log_normalizer.nrows())?;
            check::size("log_normalizer", "rows", self.queries(), log_normalizer.ncols())?;
        }
        check::size("out", "heads", self.group_len(), self.out.len_of(Axis(0)))?;
        check::size("q", "columns", head_dim, self.q.len_of(Axis(2)))?;
        check::size("k", "columns", head_dim, self.k.ncols())?;
        check::size("v", "rows", self.k.nrows(), self.v.nrows())
    }

    /// Checks that queries, keys and values are finite.
    ///
    /// # Errors
    ///
    /// [`Error::NotFinite`] if a number is NaN or infinite.
    pub fn check_finite(&self) -> Result<(), Error> {
        self.q.outer_iter().try_for_each(|q| check::finite("q", q))?;
        check::finite("k", self.k)?;
        check::finite("v", self.v)
    }

    /// Refuses log decays, for kernels that are not gated.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if there are any.
    pub fn check_not_gated(&self) -> Result<(), Error> {
        if self.log_decay.is_some() { Err(NOT_GATED) } else { Ok(()) }
    }

    /// Refuses to give the logarithms of the sums of the weights, for kernels that do not.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if they are asked for.
    #[inline]
    pub fn check_no_log_normalizer(&self) -> Result<(), Error> {
        if self.log_normalizer.is_some() { Err(NO_LOG_NORMALIZER) } else { Ok(()) }
    }
}
