//! The forward pass of a layer with all that it can be called with.

use crate::error::Error;
use crate::mask::Mask;
use crate::multi_head::MultiHead;
use crate::multi_head::arguments::{Arguments, LayerForward};
use crate::multi_head::places::Places;
use crate::scalar::Scalar;
use ndarray::Array4;

impl<T: Scalar> MultiHead<T> {
    /// As [`forward_into`](Self::forward_into) and, with log decays,
    /// [`forward_gated`](Self::forward_gated), with all that a layer can be called with:
    /// [`LayerForward`] has an example.
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward); [`Error::Unsupported`] if a kernel is not gated or takes no
    /// biases, or there are both a key mask and `key_lengths`; [`Error::NothingSeen`] if biases
    /// hide all keys from a query. After an error the content of the outputs, and of a record, is
    /// unspecified.
    pub fn forward_with(
        &self,
        forward: LayerForward<'_, T>,
        mask: Mask,
        key_lengths: Option<&[usize]>,
    ) -> Result<(), Error> {
        let LayerForward { q, k, v, log_decay, key_mask, bias, mut out, record } = forward;
        let arguments = Arguments { qkv: [q, k, v], log_decay, bias };
        let Some(key_mask) = key_mask else {
            let call = self.call(arguments, mask, key_lengths, out.dim(), None)?;
            return call.forward(&self.kernels, &self.units, out, record);
        };
        self.call(arguments, mask, None, out.dim(), None)?;
        let places = Places::new(key_mask, key_lengths, mask, [q.dim(), k.dim()])?;
        let gathered = places.gather(&arguments);
        let (batch, heads, ..) = out.dim();
        let mut packed = Array4::zeros((batch, heads, places.queries(), v.dim().3));
        let lengths = Some(&*places.lengths);
        let call = self.call(gathered.view(), mask, lengths, packed.dim(), Some(&places))?;
        call.forward(&self.kernels, &self.units, packed.view_mut(), record)?;
        out.fill(T::zero());
        places.add_queries(packed.view(), out);
        Ok(())
    }
}
