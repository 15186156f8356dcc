//! What a module is called with.

use crate::attention::AttentionOptions;
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
    /// Padding may lie anywhere: each sequence gets what it would get without it. If the pass is
    /// causal, queries of padding are answered with zero (before the output layer).
    #[must_use]
    pub fn mask_pad(mut self, mask_pad: Tensor<2, Bool>) -> Self {
        self.mask_pad = Some(mask_pad);
        self
    }

    /// Registers an attention mask, `[batch_size, seq_length_1, seq_length_2]`, true where a query
    /// does not see a key.
    ///
    /// That of [`generate_autoregressive_mask`](burn::nn::attention::generate_autoregressive_mask)
    /// is recognised, and every kernel has it; [`causal`](Self::causal) says the same at no cost.
    /// Any other one is a bias of −∞, which [`Kernel::Softmax`](crate::Kernel::Softmax) takes. A
    /// query that sees no key at all is an error, or is answered with zero if the softmax is
    /// [quiet](crate::DijiangAttentionConfig::quiet_softmax).
    #[must_use]
    pub fn mask_attn(mut self, mask_attn: Tensor<3, Bool>) -> Self {
        self.mask_attn = Some(mask_attn);
        self
    }

    /// What the heads are called with.
    pub(crate) fn options(&self) -> AttentionOptions {
        let mask = if self.is_causal { Mask::Causal } else { Mask::Full };
        let mut options = AttentionOptions { mask, ..AttentionOptions::full() };
        let [[batch, queries, _], [_, keys, _]] = [self.query.dims(), self.key.dims()];
        if let Some(mask) = &self.mask_attn {
            let (found, needed) = (mask.dims(), [batch, queries, keys]);
            assert!(
                found == needed,
                "attention: `mask_attn` is {found:?} where {needed:?} is needed"
            );
        }
        if let Some(mask) = &self.mask_pad {
            let (found, needed) = (mask.dims(), [batch, keys]);
            assert!(
                found == needed,
                "attention: `mask_pad` is {found:?} where {needed:?} is needed"
            );
        }
        if let Some(mask) = &self.mask_attn {
            if is_autoregressive(mask) {
                options.mask = Mask::Causal;
            } else {
                let hides = mask.clone().unsqueeze_dim::<4>(1);
                let none = Tensor::<4>::zeros(hides.dims(), &self.query.device());
                options.attn_bias = Some(none.mask_fill(hides, f64::NEG_INFINITY));
            }
        }
        if let Some(mask_pad) = &self.mask_pad {
            match lengths(mask_pad) {
                // padding that comes last need not be taken out
                Some(lengths) => options.key_lengths = Some(lengths),
                None => options.mask_pad = Some(mask_pad.clone()),
            }
        }
        options
    }
}

/// Whether it hides what comes later, and nothing else.
fn is_autoregressive(mask: &Tensor<3, Bool>) -> bool {
    let [_, rows, columns] = mask.dims();
    let is_later = |i: usize| i % columns > i / columns % rows;
    rows == columns && bools(mask.clone()).into_iter().enumerate().all(|(i, x)| x == is_later(i))
}

/// How many tokens of each sequence are no padding, if padding comes last.
fn lengths(mask_pad: &Tensor<2, Bool>) -> Option<Vec<usize>> {
    let [batch, n] = mask_pad.dims();
    let is_pad = bools(mask_pad.clone());
    let length = |b: usize| {
        let row = &is_pad[b * n..(b + 1) * n];
        let length = row.iter().take_while(|&&is_pad| !is_pad).count();
        row[length..].iter().all(|&is_pad| is_pad).then_some(length)
    };
    (0..batch).map(length).collect()
}

fn bools<const D: usize>(mask: Tensor<D, Bool>) -> Vec<bool> {
    mask.into_data().iter::<bool>().collect()
}
