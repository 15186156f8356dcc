//! Queries and keys as their positions change them, before a kernel inside gets them.

use crate::attention::fingerprint::Fingerprint;
use crate::check;
use crate::error::Error;
use crate::kernel::all_finite;
use crate::rotary::Rotary;
use crate::rotary::angles::{RotaryAngles, RotaryPairs};
use crate::scalar::Scalar;
use core::fmt::Debug;
use ndarray::{ArrayView2, ArrayView3, ArrayViewMut2, ArrayViewMut3, Axis};

/// What positions do to queries and keys.
pub(crate) trait Positions: Debug + Send + Sync + 'static {
    /// What saved states are marked with.
    const NAME: &'static str;

    /// What tells these positions from others.
    fn fingerprint(&self) -> Fingerprint;

    /// Columns that come.
    fn head_dim(&self) -> usize;

    /// Columns that the kernel inside gets.
    fn inner_dim(&self) -> usize;

    /// The angles of positions.
    fn rotary(&self) -> &Rotary;

    /// Fails unless every position before `end` has a meaning.
    fn check_end(&self, end: usize) -> Result<(), Error>;

    /// Rotates, or changes in another way, `x [n, head_dim]`, at the positions of the angles, to
    /// `out [n, inner_dim]`.
    fn rotate<T: Scalar>(
        &self,
        angles: &RotaryAngles<T>,
        x: ArrayView2<'_, T>,
        out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error>;

    /// Adds the gradient by `x [n, head_dim]` to `d_x`, from that by what [`rotate`](Self::rotate)
    /// gives, `d_out [n, inner_dim]`, whose content is lost.
    fn rotate_back<T: Scalar>(
        &self,
        angles: &RotaryAngles<T>,
        x: ArrayView2<'_, T>,
        d_out: ArrayViewMut2<'_, T>,
        d_x: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error>;
}

impl Positions for Rotary {
    const NAME: &'static str = "rotary";

    fn fingerprint(&self) -> Fingerprint {
        let interleaved = f64::from(u8::from(self.pairs() == RotaryPairs::Interleaved));
        Fingerprint::new()
            .with("rotary pairs", [interleaved])
            .with("rotary frequencies", self.frequencies().iter().copied())
    }

    fn head_dim(&self) -> usize {
        self.head_dim()
    }

    fn inner_dim(&self) -> usize {
        self.head_dim()
    }

    fn rotary(&self) -> &Rotary {
        self
    }

    fn check_end(&self, _end: usize) -> Result<(), Error> {
        Ok(())
    }

    fn rotate<T: Scalar>(
        &self,
        angles: &RotaryAngles<T>,
        x: ArrayView2<'_, T>,
        mut out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        out.assign(&x);
        angles.rotate_in_place(out)
    }

    fn rotate_back<T: Scalar>(
        &self,
        angles: &RotaryAngles<T>,
        _x: ArrayView2<'_, T>,
        mut d_out: ArrayViewMut2<'_, T>,
        mut d_x: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        angles.rotate_back_in_place(d_out.view_mut())?;
        d_x += &d_out;
        Ok(())
    }
}

/// Queries and keys as the kernel inside gets them. Grows to the largest call.
#[derive(Debug)]
pub(crate) struct Rotated<T> {
    angles: RotaryAngles<T>,
    q: Vec<T>,
    k: Vec<T>,
}

impl<T: Scalar> Default for Rotated<T> {
    fn default() -> Self {
        Self { angles: RotaryAngles::new(), q: Vec::new(), k: Vec::new() }
    }
}

impl<T: Scalar> Rotated<T> {
    /// Checks the numbers of `q [group, n_q, d]` and `k [n_k, d]`, whose shapes have been checked,
    /// and changes them from these positions on.
    pub(crate) fn rotate<P: Positions>(
        &mut self,
        positions: &P,
        [first_q, first_k]: [usize; 2],
        q: ArrayView3<'_, T>,
        k: ArrayView2<'_, T>,
    ) -> Result<(ArrayView3<'_, T>, ArrayView2<'_, T>), Error> {
        let ((group, queries, _), keys, dim) = (q.dim(), k.nrows(), positions.inner_dim());
        let ends = [first_q.saturating_add(queries), first_k.saturating_add(keys)];
        positions.check_end(ends[0].max(ends[1]))?;
        // before the change, which would spread what is not finite over other columns
        q.outer_iter().try_for_each(|q| check::finite("q", q))?;
        check::finite("k", k)?;
        let Self { angles, q: rotated_q, k: rotated_k } = self;
        let rotated_q = resized(rotated_q, [group, queries, dim])?;
        let rotated_k = resized(rotated_k, [1, keys, dim])?;
        positions.rotary().set_angles(angles, first_q, queries)?;
        for (q, out) in
            q.outer_iter().zip(view(&mut *rotated_q, group, queries, dim).outer_iter_mut())
        {
            positions.rotate(angles, q, out)?;
        }
        if ends[1] != ends[0] || first_k != first_q {
            positions.rotary().set_angles(angles, first_k, keys)?;
        }
        positions.rotate(
            angles,
            k,
            view(&mut *rotated_k, 1, keys, dim).index_axis_move(Axis(0), 0),
        )?;
        for (x, tokens) in [(&*rotated_q, queries), (&*rotated_k, keys)] {
            if !all_finite(x) {
                let at = x.iter().position(|x| !x.is_finite()).unwrap_or(0);
                return Err(Error::Overflow {
                    which: "the size of the vector",
                    row: at / dim % tokens,
                });
            }
        }
        let q = ArrayView3::from_shape((group, queries, dim), rotated_q).expect("resized");
        Ok((q, ArrayView2::from_shape((keys, dim), rotated_k).expect("resized")))
    }
}

/// So many numbers of a buffer.
pub(super) fn resized<T: Scalar>(
    buffer: &mut Vec<T>,
    shape: [usize; 3],
) -> Result<&mut [T], Error> {
    check::array("the number of tokens", shape[1], shape[0].saturating_mul(shape[2]))?;
    let len = shape.iter().product();
    if buffer.len() < len {
        buffer.resize(len, T::zero());
    }
    Ok(&mut buffer[..len])
}

pub(super) fn view<T>(
    x: &mut [T],
    group: usize,
    tokens: usize,
    dim: usize,
) -> ArrayViewMut3<'_, T> {
    ArrayViewMut3::from_shape((group, tokens, dim), x).expect("resized")
}
