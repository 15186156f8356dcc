//! Weights that stay quantised in memory, in place of `f32`.
//!
//! A decode step reads every weight once, so its time is that of the memory: 4 bits and a share of
//! two scales are a fifth of `f32`. Activations stay `f32`, and weights are widened in registers,
//! so a product is that of the `f32` weights up to the rounding of its sum.

mod blocks;
mod product;

use crate::quantised::blocks::{Blocks, Form};
use crate::quantised::product::{GROUP, Product, Widths};
use candle_core::quantized::GgmlDType;
use faer::linalg::matmul::matmul;
use faer::reborrow::ReborrowMut;
use faer::{Accum, MatMut, MatRef, Par};
use ndarray::{Array2, ArrayView2, ArrayViewMut1};
use pulp::Arch;
use rayon::prelude::*;
use std::array::from_fn;

/// The most rows of `x` for which weights are widened in registers. For more of them a part of the
/// weights at a time is widened in memory, and multiplied as `f32` weights are.
pub const FEW: usize = 32;

/// Numbers of the part that is widened in memory: 1 MiB, which stays near the core.
const PART: usize = 1 << 18;

/// Words of a task of their own, from where a thread more pays.
const TASK: usize = 1 << 14;

/// The weight of a linear layer, `w = d·q + m` with whole `q` of 4 or 8 bits, and `d` and `m` for
/// 32 or 16 inputs of an output.
///
/// The numbers are those of the file. 16 outputs lie side by side, so that a register of any width
/// holds one input of as many outputs: `words [group, block, word, 16]`, of which each holds 8 or 4
/// inputs of an output, and `scales`, `mins` `[group, block, 16]`.
#[derive(Clone, Debug)]
pub struct Quantised {
    inputs: usize,
    outputs: usize,
    widths: Widths,
    words: Vec<u32>,
    scales: Vec<f32>,
    /// Empty where every `m` is 0.
    mins: Vec<f32>,
}

impl Quantised {
    /// Whether weights of this type can stay as they are, in rows of so many inputs.
    #[must_use]
    pub fn can_hold(kind: GgmlDType, inputs: usize) -> bool {
        Form::of(kind).is_some() && inputs.is_multiple_of(kind.block_size())
    }

    /// The weights of a file, `[outputs, inputs]`; none where they cannot stay as they are, or
    /// where there are more or fewer bytes than that.
    #[must_use]
    pub fn new(kind: GgmlDType, bytes: &[u8], inputs: usize, outputs: usize) -> Option<Self> {
        let form = Form::of(kind).filter(|_| Self::can_hold(kind, inputs))?;
        let row = inputs / kind.block_size() * kind.type_size();
        if row == 0 || bytes.len() != row * outputs {
            return None;
        }
        let Form { widths, has_mins } = form;
        let (blocks, groups) = (inputs / widths.block, outputs.div_ceil(GROUP));
        let mut words = vec![0; groups * blocks * widths.words() * GROUP];
        let mut scales = vec![0.0; groups * blocks * GROUP];
        let mut mins = vec![0.0; if has_mins { scales.len() } else { groups }];
        words
            .par_chunks_mut(blocks * widths.words() * GROUP)
            .zip(scales.par_chunks_mut(blocks * GROUP))
            .zip(mins.par_chunks_mut(if has_mins { blocks * GROUP } else { 1 }))
            .zip(bytes.par_chunks(row * GROUP))
            .for_each(|(((words, scales), mins), bytes)| {
                for (lane, bytes) in bytes.chunks(row).enumerate() {
                    let mut block = 0;
                    Blocks::each(kind, bytes, &mut |d, m, numbers| {
                        scales[block * GROUP + lane] = d;
                        if has_mins {
                            mins[block * GROUP + lane] = m;
                        }
                        let words = words[block * widths.words() * GROUP..].chunks_mut(GROUP);
                        for (word, numbers) in words.zip(numbers.chunks(widths.numbers())) {
                            word[lane] = widths.packed(numbers);
                        }
                        block += 1;
                    });
                }
            });
        if !has_mins {
            mins.clear();
        }
        Some(Self { inputs, outputs, widths, words, scales, mins })
    }

    /// `[inputs, outputs]`
    #[must_use]
    pub fn dim(&self) -> (usize, usize) {
        (self.inputs, self.outputs)
    }

    /// Whether every scale is a finite number.
    #[must_use]
    pub fn is_finite(&self) -> bool {
        self.scales.iter().chain(&self.mins).all(|x| x.is_finite())
    }

    /// Bytes in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        4 * (self.words.len() + self.scales.len() + self.mins.len())
    }

    /// The weights as `f32`, `[inputs, outputs]`.
    #[must_use]
    pub fn widened(&self) -> Array2<f32> {
        let mut wide = Array2::zeros(self.dim());
        if let Some(wide) = wide.as_slice_mut() {
            self.widen(0, self.outputs, wide);
        }
        wide
    }

    /// The weights of one output.
    pub fn widen_output(&self, output: usize, mut to: ArrayViewMut1<'_, f32>) {
        let (group, lane) = (output / GROUP, output % GROUP);
        for (block, mut to) in to.exact_chunks_mut(self.widths.block).into_iter().enumerate() {
            let (words, scales, mins) = self.block(group, block);
            for (i, to) in to.iter_mut().enumerate() {
                let (word, at) = (i / self.widths.numbers(), i % self.widths.numbers());
                let number = self.widths.number(words[word * GROUP + lane], at) as f32;
                *to = number * scales[lane] + mins[lane];
            }
        }
    }

    /// The weights of the outputs `first..first + count`, `[inputs, count]`; `first` begins a
    /// group.
    fn widen(&self, first: usize, count: usize, to: &mut [f32]) {
        to.par_chunks_mut(self.widths.block * count).enumerate().for_each(|(block, rows)| {
            Arch::new().dispatch(|| {
                for column in (0..count).step_by(GROUP) {
                    let (words, scales, mins) = self.block((first + column) / GROUP, block);
                    let lanes = GROUP.min(count - column);
                    let mut rows = rows.chunks_mut(count);
                    for words in words.as_chunks::<GROUP>().0 {
                        for (at, row) in (0..self.widths.numbers()).zip(&mut rows) {
                            let number = |lane: usize| self.widths.number(words[lane], at) as f32;
                            let wide: [f32; GROUP] =
                                from_fn(|lane| number(lane) * scales[lane] + mins[lane]);
                            row[column..column + lanes].copy_from_slice(&wide[..lanes]);
                        }
                    }
                }
            });
        });
    }

    /// Words, scales and minima of a block, for a group of outputs.
    #[inline(always)]
    fn block(&self, group: usize, block: usize) -> (&[u32], [f32; GROUP], [f32; GROUP]) {
        let at = group * self.blocks() + block;
        let words = self.widths.words() * GROUP;
        let lanes = |of: &[f32]| of.as_chunks().0.get(at).copied().unwrap_or([0.0; GROUP]);
        (&self.words[at * words..(at + 1) * words], lanes(&self.scales), lanes(&self.mins))
    }

    #[inline(always)]
    fn blocks(&self) -> usize {
        self.inputs / self.widths.block
    }

    /// `x [n, inputs]` gives `[n, outputs]`. A token has the same bits in any chunk of at most
    /// [`FEW`], and other bits in a larger one, which differ by rounding.
    #[must_use]
    pub fn apply(&self, x: &Array2<f32>) -> Array2<f32> {
        let x = x.as_standard_layout();
        let mut y = Array2::zeros((x.nrows(), self.outputs));
        match x.nrows() {
            0 => {}
            n if n <= FEW => self.apply_to_few(x.view(), &mut y),
            _ => self.apply_to_many(x.view(), &mut y),
        }
        y
    }

    fn apply_to_few(&self, x: ArrayView2<'_, f32>, y: &mut Array2<f32>) {
        let (n, blocks) = (x.nrows(), self.blocks());
        let Some(x) = x.to_slice() else { return };
        let numbered = x.iter().zip((0..self.inputs).cycle());
        let scaled: Vec<f32> = numbered.map(|(x, i)| x * self.widths.factor(i)).collect();
        let sums: Vec<f32> = match self.mins.is_empty() {
            true => Vec::new(),
            false => x.chunks(self.widths.block).map(|x| x.iter().sum()).collect(),
        };
        let group = blocks * self.widths.words() * GROUP;
        let groups = self.outputs.div_ceil(GROUP);
        let product = |groups: std::ops::Range<usize>, out: &mut [f32]| {
            let scales = groups.start * blocks * GROUP..groups.end * blocks * GROUP;
            Product {
                words: &self.words[groups.start * group..groups.end * group],
                scales: &self.scales[scales.clone()],
                mins: self.mins.get(scales).unwrap_or_default(),
                x: &scaled,
                sums: &sums,
                out,
                rows: n,
                blocks,
            }
            .run(self.widths);
        };
        // [group, row, 16]
        let mut out = vec![0.0; groups * n * GROUP];
        let share = groups.div_ceil(rayon::current_num_threads()).max(TASK.div_ceil(group));
        if share >= groups {
            product(0..groups, &mut out);
        } else {
            out.par_chunks_mut(share * n * GROUP).enumerate().for_each(|(i, out)| {
                product(i * share..i * share + out.len() / (n * GROUP), out);
            });
        }
        for (row, mut y) in y.outer_iter_mut().enumerate() {
            let found = out.chunks(GROUP).skip(row).step_by(n).flatten();
            y.iter_mut().zip(found).for_each(|(y, found)| *y = *found);
        }
    }

    fn apply_to_many(&self, x: ArrayView2<'_, f32>, y: &mut Array2<f32>) {
        let (n, inputs, outputs) = (x.nrows(), self.inputs, self.outputs);
        let part = (PART / inputs / GROUP).max(1) * GROUP;
        let mut wide = vec![0.0; inputs * part.min(outputs)];
        let (Some(x), Some(y)) = (x.to_slice(), y.as_slice_mut()) else { return };
        let x = MatRef::from_row_major_slice(x, n, inputs);
        let mut y = MatMut::from_row_major_slice_mut(y, n, outputs);
        for first in (0..outputs).step_by(part) {
            let count = part.min(outputs - first);
            let wide = &mut wide[..inputs * count];
            self.widen(first, count, wide);
            let wide = MatRef::from_row_major_slice(&*wide, inputs, count);
            let y = y.rb_mut().subcols_mut(first, count);
            matmul(y, Accum::Replace, x, wide, 1.0, Par::rayon(0));
        }
    }
}
