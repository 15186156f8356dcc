//! Which keys a query sees.

/// Which keys a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Mask {
    /// Every query sees every key (encoders, cross attention).
    Full,
    /// Query `t` sees keys `0..=t` (decoders); needs as many queries as keys.
    Causal,
    /// Causal, aligned at the end: of `n_q` queries and `n_k ≥ n_q` keys, query `t` stands at
    /// position `n_k − n_q + t` and sees the keys up to there. This is the tail of a prompt against
    /// all its keys. With as many queries as keys it is [`Causal`](Self::Causal), bit for bit.
    ///
    /// ```
    /// use dijiang::{Attention, Mask, SoftmaxAttention};
    /// use ndarray::array;
    ///
    /// let kernel = SoftmaxAttention::<f64>::new(1)?;
    /// let (q, k) = (array![[0.0], [0.0]], array![[1.0], [2.0], [3.0]]);
    /// // the two queries stand at the last two keys
    /// let out = kernel.forward(q.view(), k.view(), k.view(), Mask::CausalTail)?;
    /// assert_eq!(out, array![[1.5], [2.0]]);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    CausalTail,
}

impl Mask {
    /// The position of the first of some queries, which sees the keys up to there; none if all
    /// queries see all keys.
    pub(crate) fn first(self, [queries, keys]: [usize; 2]) -> Option<usize> {
        match self {
            Self::Full => None,
            Self::Causal => Some(0),
            Self::CausalTail => Some(keys.saturating_sub(queries)),
        }
    }

    /// How many keys query `t` sees.
    pub(crate) fn seen(self, t: usize, sizes: [usize; 2]) -> usize {
        self.first(sizes).map_or(sizes[1], |first| first + t + 1)
    }

    /// The same, and [`Causal`](Self::Causal) where a tail is all there is.
    pub(crate) fn settled(self, [queries, keys]: [usize; 2]) -> Self {
        if self == Self::CausalTail && queries == keys { Self::Causal } else { self }
    }
}
