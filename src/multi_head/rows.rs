//! Rows that lie apart, as the projections of many heads leave them, one behind the other: they are
//! read several times, and far apart they push each other out of the caches.

use crate::attention::call::Head;
use crate::attention::gradient::HeadGradient;
use crate::kernel::buffer::Buffer;
use crate::scalar::Scalar;
use ndarray::{ArrayView2, ArrayView3, ArrayViewMut1, Axis};

/// With fewer queries rows are not read often enough.
const WORTH_A_COPY: usize = 128;

/// Copies of the arrays of a head.
#[derive(Debug)]
pub(crate) struct Rows<T> {
    q: Buffer<T>,
    k: Buffer<T>,
    v: Buffer<T>,
    d_out: Buffer<T>,
}

impl<T: Scalar> Default for Rows<T> {
    fn default() -> Self {
        Self { q: Buffer::new(), k: Buffer::new(), v: Buffer::new(), d_out: Buffer::new() }
    }
}

impl<T: Scalar> Rows<T> {
    /// A head whose keys and values lie together.
    pub(super) fn of_head<'b>(&'b mut self, head: &'b mut Head<'_, T>) -> Head<'b, T> {
        let Self { k, v, .. } = self;
        let head = head.reborrow();
        if head.queries() < WORTH_A_COPY {
            return head;
        }
        Head { k: together(head.k, k), v: together(head.v, v), ..head }
    }

    /// The same, with queries and the gradient by the outputs.
    pub(super) fn of_gradient<'b>(
        &'b mut self,
        head: &'b mut HeadGradient<'_, T>,
    ) -> HeadGradient<'b, T> {
        let Self { q, k, v, d_out } = self;
        let head = head.reborrow();
        if head.queries() < WORTH_A_COPY {
            return head;
        }
        HeadGradient {
            q: all_together(head.q, q),
            k: together(head.k, k),
            v: together(head.v, v),
            d_out: all_together(head.d_out, d_out),
            ..head
        }
    }
}

/// Rows, copied if they lie apart.
fn together<'b, T: Scalar>(x: ArrayView2<'b, T>, to: &'b mut Buffer<T>) -> ArrayView2<'b, T> {
    all_together(x.insert_axis(Axis(0)), to).index_axis_move(Axis(0), 0)
}

/// The same of several heads.
fn all_together<'b, T: Scalar>(x: ArrayView3<'b, T>, to: &'b mut Buffer<T>) -> ArrayView3<'b, T> {
    if x.outer_iter().all(|x| x.is_standard_layout()) {
        return x;
    }
    to.resize(x.len());
    let size = x.len_of(Axis(1)) * x.len_of(Axis(2));
    for (x, to) in x.outer_iter().zip(to.chunks_exact_mut(size.max(1))) {
        for (x, to) in x.outer_iter().zip(to.chunks_exact_mut(x.ncols().max(1))) {
            ArrayViewMut1::from(to).assign(&x);
        }
    }
    ArrayView3::from_shape(x.dim(), to).unwrap_or(x)
}
