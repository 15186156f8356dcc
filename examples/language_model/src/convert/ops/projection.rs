//! The products of attention: to heads, and from heads.

use super::{Real, matrix, multiply, operand, read, result, rows, tensor_like, zeros};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use dijiang::RotaryAngles;
use ndarray::{ArcArray2, ArrayViewMut3};
use rayon::prelude::*;
use std::borrow::Cow;
use std::sync::Arc;

/// `y = x·W` with a weight that is trained, an operand, or `y = x·W + s·(x·A)·B` with one that is
/// not and factors that are (Hu et al., arXiv 2106.09685, section 4.1).
#[derive(Clone)]
pub(in crate::convert) struct Projection<T: Real> {
    /// `[in, out]`; an operand takes its place where it is trained.
    pub(in crate::convert) weight: ArcArray2<T>,
    /// `s`
    pub(in crate::convert) scale: f64,
    /// Which of both is heads.
    pub(in crate::convert) side: Side<T>,
    /// The heads there.
    pub(in crate::convert) heads: Heads,
}

/// Heads of a sequence, `[1, heads, tokens, columns]`.
#[derive(Clone, Copy)]
pub(in crate::convert) struct Heads {
    pub(in crate::convert) heads: usize,
    pub(in crate::convert) tokens: usize,
    pub(in crate::convert) columns: usize,
}

/// Which side of a product is heads, where the other is rows `[tokens, columns]`.
#[derive(Clone)]
pub(in crate::convert) enum Side<T: Real> {
    /// What is put in.
    Input,
    /// What comes out: values.
    Output,
    /// What comes out, turned by the angles of its position, times a factor: queries and keys.
    Turned(Arc<RotaryAngles<T>>, f64),
}

impl Heads {
    fn dims(self) -> [usize; 4] {
        [1, self.heads, self.tokens, self.columns]
    }

    /// Heads as rows.
    fn in_rows<T: Real>(self, x: &[T]) -> Vec<T> {
        swapped(x, [self.heads, self.tokens, self.columns])
    }

    /// Rows as heads.
    fn in_heads<T: Real>(self, x: &[T]) -> Vec<T> {
        swapped(x, [self.tokens, self.heads, self.columns])
    }
}

/// `[a, b, columns]` as `[b, a, columns]`.
fn swapped<T: Real>(x: &[T], [a, b, columns]: [usize; 3]) -> Vec<T> {
    let mut y = zeros::<T>(x.len());
    y.par_chunks_mut(a * columns).enumerate().for_each(|(j, y)| {
        for (i, y) in y.chunks_exact_mut(columns).enumerate() {
            y.copy_from_slice(&x[(i * b + j) * columns..][..columns]);
        }
    });
    y
}

/// Turns heads by the angles of their positions, forth or back, times a factor.
fn turn<T: Real>(
    x: &mut [T],
    heads: Heads,
    angles: &RotaryAngles<T>,
    factor: f64,
    back: bool,
) -> Result<()> {
    let Heads { tokens, columns, .. } = heads;
    x.par_chunks_mut(tokens * columns).try_for_each(|x| {
        if factor != 1.0 {
            let factor = T::rounded(factor);
            x.iter_mut().for_each(|x| *x *= factor);
        }
        let head = ArrayViewMut3::from_shape((tokens, 1, columns), x);
        let head = head.map_err(candle_core::Error::wrap)?;
        let turned = match back {
            false => angles.rotate_heads_in_place(head),
            true => angles.rotate_heads_back_in_place(head),
        };
        turned.map_err(candle_core::Error::wrap)
    })
}

impl<T: Real> Projection<T> {
    /// What is put in, as rows.
    fn input<'a>(&self, x: &'a [T]) -> Cow<'a, [T]> {
        match self.side {
            Side::Input => self.heads.in_rows(x).into(),
            Side::Output | Side::Turned(..) => x.into(),
        }
    }

    /// Rows that come out, in their places.
    fn output(&self, y: Vec<T>) -> Result<(CpuStorage, Shape)> {
        let heads = self.heads;
        let (y, dims) = match &self.side {
            Side::Input => return Ok(result(y, &[heads.tokens, self.weight.ncols()])),
            Side::Output => (heads.in_heads(&y), heads.dims()),
            Side::Turned(angles, factor) => {
                let mut y = heads.in_heads(&y);
                turn(&mut y, heads, angles, *factor, false)?;
                (y, heads.dims())
            }
        };
        Ok(result(y, &dims))
    }

    /// The gradient by rows that come out.
    fn d_output<'a>(&self, d_y: &'a [T]) -> Result<Cow<'a, [T]>> {
        Ok(match &self.side {
            Side::Input => d_y.into(),
            Side::Output => self.heads.in_rows(d_y).into(),
            Side::Turned(angles, factor) => {
                let mut d_y = d_y.to_vec();
                turn(&mut d_y, self.heads, angles, *factor, true)?;
                self.heads.in_rows(&d_y).into()
            }
        })
    }

    /// The gradient by what is put in, in its places.
    fn d_input(&self, d_x: Vec<T>) -> Vec<T> {
        match self.side {
            Side::Input => self.heads.in_heads(&d_x),
            Side::Output | Side::Turned(..) => d_x,
        }
    }
}

/// A weight that is trained.
impl<T: Real> CustomOp2 for Projection<T> {
    fn name(&self) -> &'static str {
        "projection"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        at: &Layout,
        weight: &CpuStorage,
        weight_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (inputs, outputs) = self.weight.dim();
        let x = self.input(operand(x, at)?);
        let mut y = zeros::<T>(x.len() / inputs * outputs);
        let weight = operand(weight, weight_at)?;
        multiply(&mut y, None, rows(&x, inputs), rows(weight, outputs));
        self.output(y)
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        d_y: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (inputs, outputs) = self.weight.dim();
        let [d_x, d_weight] = read([x, weight, &d_y.contiguous()?], |[x, weight, d_y]| {
            let (x, d_y) = (self.input(x), self.d_output(d_y)?);
            let mut d_weight = zeros::<T>(weight.len());
            multiply(&mut d_weight, None, rows(&x, inputs).transpose(), rows(&d_y, outputs));
            let mut d_x = zeros::<T>(x.len());
            multiply(&mut d_x, None, rows(&d_y, outputs), rows(weight, outputs).transpose());
            Ok::<_, candle_core::Error>([self.d_input(d_x), d_weight])
        })??;
        Ok((Some(tensor_like(d_x, x)?), Some(tensor_like(d_weight, weight)?)))
    }
}

/// Factors that are trained.
impl<T: Real> CustomOp3 for Projection<T> {
    fn name(&self) -> &'static str {
        "low-rank projection"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        at: &Layout,
        down: &CpuStorage,
        down_at: &Layout,
        up: &CpuStorage,
        up_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (inputs, outputs) = self.weight.dim();
        let rank = down_at.shape().dims2()?.1;
        let (down, up) = (operand::<T>(down, down_at)?, operand::<T>(up, up_at)?);
        let x = self.input(operand(x, at)?);
        let n = x.len() / inputs;
        let [mut y, mut inner] = [outputs, rank].map(|columns| zeros::<T>(n * columns));
        multiply(&mut y, None, rows(&x, inputs), matrix(&self.weight));
        multiply(&mut inner, None, rows(&x, inputs), rows(down, rank));
        multiply(&mut y, Some(self.scale), rows(&inner, rank), rows(up, outputs));
        self.output(y)
    }

    fn bwd(
        &self,
        x: &Tensor,
        down: &Tensor,
        up: &Tensor,
        _: &Tensor,
        d_y: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let ((inputs, outputs), rank) = (self.weight.dim(), down.dim(1)?);
        let operands = [x, down, up, &d_y.contiguous()?];
        let [d_x, d_down, d_up] = read(operands, |[x, down, up, d_y]| {
            let (x, d_y) = (self.input(x), self.d_output(d_y)?);
            let (a, b) = (rows(down, rank), rows(up, outputs));
            let (x, d_y) = (rows(&x, inputs), rows(&d_y, outputs));
            let mut inner = zeros::<T>(x.nrows() * rank);
            // d_B = s·(x·A)ᵀ·d_y
            multiply(&mut inner, None, x, a);
            let mut d_up = zeros::<T>(rank * outputs);
            multiply(&mut d_up, Some(self.scale), rows(&inner, rank).transpose(), d_y);
            // d_A = s·xᵀ·(d_y·Bᵀ)
            multiply(&mut inner, None, d_y, b.transpose());
            let mut d_down = zeros::<T>(inputs * rank);
            multiply(&mut d_down, Some(self.scale), x.transpose(), rows(&inner, rank));
            // d_x = d_y·Wᵀ + s·(d_y·Bᵀ)·Aᵀ
            let mut d_x = zeros::<T>(x.nrows() * inputs);
            multiply(&mut d_x, None, d_y, matrix(&self.weight).transpose());
            multiply(&mut d_x, Some(self.scale), rows(&inner, rank), a.transpose());
            Ok::<_, candle_core::Error>([self.d_input(d_x), d_down, d_up])
        })??;
        Ok((
            Some(tensor_like(d_x, x)?),
            Some(tensor_like(d_down, down)?),
            Some(tensor_like(d_up, up)?),
        ))
    }
}
