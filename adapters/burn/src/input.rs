//! What a module is called with.

use burn::tensor::{Bool, Tensor};
use dijiang::Mask;

/// The input of a [`DijiangAttention`](crate::DijiangAttention), made as
/// [`MhaInput`](burn::nn::attention::MhaInput) is.
#[derive(Debug, Clone)]
pub struct AttentionInput {
    /// Shape `[batch_size, seq_length_1, d_model]`
    pub query: Tensor<3>,
    /// Shape `[batch_size, seq_length_2, d_model]`
    pub key: Tensor<3>,
    /// Shape `[batch_size, seq_length_2, d_model]`
    pub value: Tensor<3>,
    is_causal: bool,
    mask_pad: Option<Tensor<2, Bool>>,
    mask_attn: Option<Tensor<3, Bool>>,
}

impl AttentionInput {
    /// The query, key and value are the given tensor, `[batch_size, seq_length, d_model]`.
    #[must_use]
    pub fn self_attn(tensor: Tensor<3>) -> Self {
        Self::new(tensor.clone(), tensor.clone(), tensor)
    }

    /// A query, a key and a value.
    #[must_use]
    pub fn new(query: Tensor<3>, key: Tensor<3>, value: Tensor<3>) -> Self {
        Self { query, key, value, is_causal: false, mask_pad: None, mask_attn: None }
    }

    /// Lets each query see the keys up to its own only; there are as many keys as queries.
    #[must_use]
    pub fn causal(mut self) -> Self {
        self.is_causal = true;
        self
    }

    /// Registers the padding mask, `[batch_size, seq_length_2]`, true where a key is padding.
    ///
    /// Padding comes last in each sequence; with a mask that says else the forward pass panics. If
    /// the pass is causal, queries of padding are answered with zero (before the output layer).
    #[must_use]
    pub fn mask_pad(mut self, mask_pad: Tensor<2, Bool>) -> Self {
        self.mask_pad = Some(mask_pad);
        self
    }

    /// Registers an attention mask, `[batch_size, seq_length_1, seq_length_2]`, true where a query
    /// does not see a key.
    ///
    /// Kernels can have one: that of
    /// [`generate_autoregressive_mask`](burn::nn::attention::generate_autoregressive_mask). It is
    /// read and compared; with any other one the forward pass panics. [`causal`](Self::causal) says
    /// the same at no cost.
    #[must_use]
    pub fn mask_attn(mut self, mask_attn: Tensor<3, Bool>) -> Self {
        self.mask_attn = Some(mask_attn);
        self
    }

    /// Which keys a query sees.
    pub(crate) fn mask(&self) -> Mask {
        let Some(mask) = &self.mask_attn else {
            return if self.is_causal { Mask::Causal } else { Mask::Full };
        };
        let [_, rows, columns] = mask.dims();
        let hides = bools(mask.clone());
        let is_later = |i: usize| i % columns > i / columns % rows;
        let is_autoregressive = (0..hides.len()).all(|i| hides[i] == is_later(i));
        assert!(
            is_autoregressive && self.is_fitting(mask.dims()),
            "attention: `mask_attn` is not the autoregressive mask of these sequences; kernels \
             have no other one"
        );
        Mask::Causal
    }

    fn is_fitting(&self, dims: [usize; 3]) -> bool {
        dims == [self.query.dims()[0], self.query.dims()[1], self.key.dims()[1]]
    }

    /// How many keys of each sequence are no padding.
    pub(crate) fn key_lengths(&self) -> Option<Vec<usize>> {
        let mask = self.mask_pad.clone()?;
        let [batch, n] = mask.dims();
        assert!(
            [batch, n] == [self.key.dims()[0], self.key.dims()[1]],
            "attention: `mask_pad` is [{batch}, {n}] for keys {:?}",
            self.key.dims()
        );
        let is_pad = bools(mask);
        let length = |row: &[bool]| {
            let length = row.iter().take_while(|&&is_pad| !is_pad).count();
            assert!(
                row[length..].iter().all(|&is_pad| is_pad),
                "attention: `mask_pad` has padding before a token; kernels need it last"
            );
            length
        };
        Some((0..batch).map(|b| length(&is_pad[b * n..(b + 1) * n])).collect())
    }
}

fn bools<const D: usize>(mask: Tensor<D, Bool>) -> Vec<bool> {
    mask.into_data().iter::<bool>().collect()
}
