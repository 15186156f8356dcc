//! Cosines and sines of positions, and which columns they turn together.

use crate::check;
use crate::error::Error;
use crate::scalar::Scalar;
use ndarray::{ArrayViewMut1, ArrayViewMut2, ArrayViewMut3, Axis};

/// Which two columns of a head turn together.
///
/// The two orders are the same embedding of permuted columns: a checkpoint is of one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum RotaryPairs {
    /// `(i, i + dims/2)`: GPT-NeoX, and the LLaMA of Hugging Face (`rotate_half`).
    Halves,
    /// `(2i, 2i + 1)`: the paper, Meta's LLaMA, GGUF files, GPT-J, RetNet.
    Interleaved,
}

/// Cosines and sines of some positions, made by [`Rotary::angles`](crate::Rotary::angles): what the
/// heads of a layer, and the layers of a model, share.
#[derive(Clone, Debug, PartialEq)]
pub struct RotaryAngles<T> {
    head_dim: usize,
    pairs: RotaryPairs,
    tokens: usize,
    /// `[tokens, dims/2]`, as the sines.
    cos: Vec<T>,
    sin: Vec<T>,
}

impl<T: Scalar> RotaryAngles<T> {
    /// Of no position.
    pub(crate) fn new() -> Self {
        Self {
            head_dim: 0,
            pairs: RotaryPairs::Halves,
            tokens: 0,
            cos: Vec::new(),
            sin: Vec::new(),
        }
    }

    /// Sets the positions `first_position..first_position + tokens`, in the memory there is.
    pub(crate) fn set(
        &mut self,
        head_dim: usize,
        pairs: RotaryPairs,
        frequencies: &[f64],
        first_position: usize,
        tokens: usize,
    ) {
        (self.head_dim, self.pairs, self.tokens) = (head_dim, pairs, tokens);
        let Self { cos, sin, .. } = self;
        for part in [&mut *cos, &mut *sin] {
            part.clear();
            part.reserve_exact(tokens * frequencies.len());
        }
        if frequencies.is_empty() {
            return; // These are the angles of any number of tokens.
        }
        for token in 0..tokens {
            #[allow(clippy::cast_precision_loss)]
            // This is exact up to 2^53, and unlike the sum of integers never out of range.
            let position = first_position as f64 + token as f64;
            for frequency in frequencies {
                let (s, c) = libm::sincos(position * frequency);
                cos.push(T::from_f64(c));
                sin.push(T::from_f64(s));
            }
        }
    }

    /// Cosines and sines `[tokens, dims/2]`.
    pub(crate) fn parts(&self) -> (&[T], &[T]) {
        (&self.cos, &self.sin)
    }

    /// How many positions these are.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Turns one head `x [tokens, head_dim]` in place.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if `x` has another shape.
    pub fn rotate_in_place(&self, x: ArrayViewMut2<'_, T>) -> Result<(), Error> {
        self.rotate_heads_in_place(x.insert_axis(Axis(1)))
    }

    /// Turns many heads `x [tokens, heads, head_dim]` in place, of any strides: permute the axes of
    /// another layout.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if `x` has another number of tokens or columns.
    pub fn rotate_heads_in_place(&self, x: ArrayViewMut3<'_, T>) -> Result<(), Error> {
        self.turn_heads::<false>(x)
    }

    /// Turns one head `x [tokens, head_dim]` the other way, in place: see
    /// [`rotate_heads_back_in_place`](Self::rotate_heads_back_in_place).
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if `x` has another shape.
    pub fn rotate_back_in_place(&self, x: ArrayViewMut2<'_, T>) -> Result<(), Error> {
        self.rotate_heads_back_in_place(x.insert_axis(Axis(1)))
    }

    /// Turns many heads `x [tokens, heads, head_dim]` the other way, in place: what was turned is
    /// as it was, but for rounding. A gradient by turned queries or keys becomes that by the
    /// queries or keys themselves, as the other way is the transpose of a rotation.
    ///
    /// ```
    /// use dijiang::Rotary;
    /// use ndarray::Array3;
    ///
    /// let angles = Rotary::new(16)?.angles(5, 10)?;
    /// let x = Array3::from_shape_fn((10, 4, 16), |(t, h, c)| ((t + 7 * h + 3 * c) as f64).sin());
    /// let mut turned = x.clone();
    /// angles.rotate_heads_in_place(turned.view_mut())?;
    /// angles.rotate_heads_back_in_place(turned.view_mut())?;
    /// assert!((turned - x).iter().all(|e| e.abs() < 1e-15));
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if `x` has another number of tokens or columns.
    pub fn rotate_heads_back_in_place(&self, x: ArrayViewMut3<'_, T>) -> Result<(), Error> {
        self.turn_heads::<true>(x)
    }

    fn turn_heads<const BACK: bool>(&self, mut x: ArrayViewMut3<'_, T>) -> Result<(), Error> {
        let (tokens, _, columns) = x.dim();
        check::size("x", "rows", self.tokens, tokens)?;
        check::size("x", "columns", self.head_dim, columns)?;
        let half = self.cos.len().checked_div(self.tokens).unwrap_or(0);
        if half == 0 {
            return Ok(());
        }
        let mut copy = Vec::new();
        let angles = self.cos.chunks_exact(half).zip(self.sin.chunks_exact(half));
        for (mut heads, (cos, sin)) in x.outer_iter_mut().zip(angles) {
            for head in heads.outer_iter_mut() {
                self.turn_token::<BACK>(head, cos, sin, &mut copy);
            }
        }
        Ok(())
    }

    /// Turns one token of one head; columns that are not contiguous are copied out and back.
    fn turn_token<const BACK: bool>(
        &self,
        mut head: ArrayViewMut1<'_, T>,
        cos: &[T],
        sin: &[T],
        copy: &mut Vec<T>,
    ) {
        let dims = 2 * cos.len();
        if let Some(head) = head.as_slice_mut() {
            return self.turn_slice::<BACK>(&mut head[..dims], cos, sin);
        }
        copy.clear();
        copy.extend(head.iter().take(dims));
        self.turn_slice::<BACK>(copy, cos, sin);
        head.iter_mut().zip(&*copy).for_each(|(x, &turned)| *x = turned);
    }

    fn turn_slice<const BACK: bool>(&self, x: &mut [T], cos: &[T], sin: &[T]) {
        let turn = |a: &mut T, b: &mut T, cos: T, sin: T| {
            let sin = if BACK { -sin } else { sin };
            (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
        };
        match self.pairs {
            RotaryPairs::Halves => {
                let (first, second) = x.split_at_mut(cos.len());
                for (((a, b), &cos), &sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    turn(a, b, cos, sin);
                }
            }
            RotaryPairs::Interleaved => {
                for (([a, b], &cos), &sin) in x.as_chunks_mut().0.iter_mut().zip(cos).zip(sin) {
                    turn(a, b, cos, sin);
                }
            }
        }
    }
}
