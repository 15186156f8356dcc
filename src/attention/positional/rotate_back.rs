//! Gradients by queries and keys, from those by what their positions make of them.

use crate::attention::gradient::HeadGradient;
use crate::attention::positional::rotate::{Positions, Rotated, resized, view};
use crate::check;
use crate::error::Error;
use crate::mask::Mask;
use crate::rotary::angles::RotaryAngles;
use crate::scalar::Scalar;
use ndarray::Axis;

/// Queries and keys as the kernel inside gets them, and the gradients by them. Grows to the largest
/// call.
#[derive(Debug)]
pub(super) struct RotatedGradients<T> {
    rotated: Rotated<T>,
    angles: RotaryAngles<T>,
    d_q: Vec<T>,
    d_k: Vec<T>,
}

impl<T: Scalar> Default for RotatedGradients<T> {
    fn default() -> Self {
        let (rotated, angles) = (Rotated::default(), RotaryAngles::new());
        Self { rotated, angles, d_q: Vec::new(), d_k: Vec::new() }
    }
}

impl<T: Scalar> RotatedGradients<T> {
    /// Adds the gradients of a head, of checked shapes, of which `backward` gives those inside.
    pub(super) fn add<P: Positions>(
        &mut self,
        positions: &P,
        mask: Mask,
        head: &mut HeadGradient<'_, T>,
        backward: impl FnOnce(&mut HeadGradient<'_, T>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Self { rotated, angles, d_q, d_k } = self;
        let (group, queries, keys) = (head.group_len(), head.queries(), head.keys());
        let dim = positions.inner_dim();
        let first = mask.first([queries, keys]).unwrap_or(0);
        let (q, k) = rotated.rotate(positions, [first, 0], head.q, head.k)?;
        let d_q = resized(d_q, [group, queries, dim])?;
        let d_k = resized(d_k, [1, keys, dim])?;
        d_q.fill(T::zero());
        d_k.fill(T::zero());
        let mut d_q = view(d_q, group, queries, dim);
        let mut d_k = view(d_k, 1, keys, dim).index_axis_move(Axis(0), 0);
        let views = (d_q.view_mut(), d_k.view_mut());
        backward(&mut HeadGradient { q, k, d_q: views.0, d_k: views.1, ..head.reborrow() })?;

        positions.rotary().set_angles(angles, first, queries)?;
        let d_outs = d_q.outer_iter_mut().zip(head.d_q.outer_iter_mut());
        for (q, (d_out, mut d_q)) in head.q.outer_iter().zip(d_outs) {
            positions.rotate_back(angles, q, d_out, d_q.view_mut())?;
            check::gradient("the gradient by `q`", d_q.view())?;
        }
        if keys != queries {
            positions.rotary().set_angles(angles, 0, keys)?;
        }
        positions.rotate_back(angles, head.k, d_k, head.d_k.view_mut())?;
        check::gradient("the gradient by `k`", head.d_k.view())
    }
}
