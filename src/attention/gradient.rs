//! What a backward pass takes and gives.

use ndarray::{ArrayView2, ArrayView3, ArrayViewMut2, ArrayViewMut3};

/// One head of keys and values, the gradient of a loss by its outputs, and where the gradients by
/// its arguments go: what [`Attention::backward_heads`](crate::Attention::backward_heads) is called
/// with. Shapes are those of [`Head`](crate::Head); gradients are written over what was there.
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
    /// The gradient by the outputs, `[group, n_q, d_v]`.
    pub d_out: ArrayView3<'a, T>,
    /// The gradient by the queries, `[group, n_q, d]`.
    pub d_q: ArrayViewMut3<'a, T>,
    /// The gradient by the keys, summed over the query heads, `[n_k, d]`.
    pub d_k: ArrayViewMut2<'a, T>,
    /// The gradient by the values, summed over the query heads, `[n_k, d_v]`.
    pub d_v: ArrayViewMut2<'a, T>,
    /// The gradient by the log decays, `[n_k, 1 or num_features]`.
    pub d_log_decay: Option<ArrayViewMut2<'a, T>>,
}
