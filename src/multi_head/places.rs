//! Sequences whose real tokens lie anywhere, and the same without the others.

use crate::check;
use crate::error::Error;
use crate::mask::Mask;
use crate::multi_head::arguments::Arguments;
use crate::multi_head::layout::Dim4;
use crate::scalar::Scalar;
use ndarray::{
    Array4, ArrayView1, ArrayView2, ArrayView4, ArrayViewMut2, ArrayViewMut4, Axis, CowArray, Ix4,
};

/// Real tokens, one behind the other.
#[derive(Debug)]
pub(crate) struct Gathered<'a, T> {
    pub(crate) q: CowArray<'a, T, Ix4>,
    pub(crate) k: Array4<T>,
    pub(crate) v: Array4<T>,
    pub(crate) log_decay: Option<Array4<T>>,
    pub(crate) bias: Option<Array4<T>>,
}

impl<T: Scalar> Gathered<'_, T> {
    pub(crate) fn view(&self) -> Arguments<'_, T> {
        Arguments {
            qkv: [self.q.view(), self.k.view(), self.v.view()],
            log_decay: self.log_decay.as_ref().map(|x| x.view()),
            bias: self.bias.as_ref().map(|x| x.view()),
        }
    }
}

/// Where the real tokens of each sequence lie, which are gathered at the beginning of a sequence
/// with a length.
#[derive(Debug)]
pub(crate) struct Places {
    /// Real tokens of each sequence.
    pub(crate) lengths: Vec<usize>,
    keys: Vec<Vec<usize>>,
    /// Row of the gathered queries and of the queries; none where all of them stay.
    queries: Option<Vec<Vec<[usize; 2]>>>,
    /// Rows of gathered queries and keys.
    rows: [usize; 2],
}

impl Places {
    /// From what is true in `[batch, n_k]`.
    pub(crate) fn new(
        key_mask: ArrayView2<'_, bool>,
        key_lengths: Option<&[usize]>,
        mask: Mask,
        [q, k]: [Dim4; 2],
    ) -> Result<Self, Error> {
        if key_lengths.is_some() {
            return Err(BOTH);
        }
        check::size("key_mask", "sequences", k.0, key_mask.nrows())?;
        check::size("key_mask", "columns", k.2, key_mask.ncols())?;
        let real = |row: ArrayView1<'_, bool>| -> Vec<usize> {
            row.iter().enumerate().filter_map(|(t, &real)| real.then_some(t)).collect()
        };
        let keys: Vec<_> = key_mask.outer_iter().map(real).collect();
        let lengths: Vec<_> = keys.iter().map(Vec::len).collect();
        // the first query stands at this key
        let first = mask.first([q.2, k.2]);
        let of_sequence = |first: usize, keys: &[usize]| -> Vec<usize> {
            keys.iter().filter(|&&t| t >= first).map(|&t| t - first).collect()
        };
        let queries =
            first.map(|first| keys.iter().map(|keys| of_sequence(first, keys)).collect::<Vec<_>>());
        let most = |lists: &[Vec<usize>]| lists.iter().map(Vec::len).max().unwrap_or(0);
        let rows = [queries.as_ref().map_or(q.2, |queries| most(queries)), most(&keys)];
        // a tail is aligned at its end
        let start =
            |list: &[usize]| if mask == Mask::CausalTail { rows[0] - list.len() } else { 0 };
        let pairs = |list: Vec<usize>| {
            let start = start(&list);
            list.into_iter().enumerate().map(|(i, t)| [start + i, t]).collect()
        };
        let queries = queries.map(|queries| queries.into_iter().map(pairs).collect());
        Ok(Self { lengths, keys, queries, rows })
    }

    /// Rows of gathered queries.
    pub(crate) fn queries(&self) -> usize {
        self.rows[0]
    }

    /// Real queries of a sequence.
    pub(crate) fn queries_of(&self, sequence: usize) -> usize {
        self.queries.as_ref().map_or(self.rows[0], |queries| queries[sequence].len())
    }

    /// The row of a gathered query of a sequence.
    pub(crate) fn query(&self, sequence: usize, row: usize) -> usize {
        let Some(queries) = &self.queries else { return row };
        let found = queries[sequence].iter().find(|[gathered, _]| *gathered == row);
        found.map_or(row, |[_, t]| *t)
    }

    /// The row of a gathered key of a sequence.
    pub(crate) fn key(&self, sequence: usize, row: usize) -> usize {
        self.keys[sequence].get(row).copied().unwrap_or(row)
    }

    /// The arguments without tokens that are not real.
    pub(crate) fn gather<'a, T: Scalar>(&self, arguments: &Arguments<'a, T>) -> Gathered<'a, T> {
        let Arguments { qkv: [q, k, v], log_decay, bias } = arguments;
        Gathered {
            q: self.gather_queries(*q),
            k: self.gather_keys(*k),
            v: self.gather_keys(*v),
            log_decay: log_decay.map(|x| self.gather_keys(x)),
            bias: bias.map(|x| self.gather_pairs(x)),
        }
    }

    /// Rows `[batch, heads, n_q, columns]` of queries.
    pub(crate) fn gather_queries<'a, T: Scalar>(
        &self,
        x: ArrayView4<'a, T>,
    ) -> CowArray<'a, T, Ix4> {
        let Some(queries) = &self.queries else { return x.into() };
        let (batch, heads, _, columns) = x.dim();
        let mut out = Array4::zeros((batch, heads, self.rows[0], columns));
        for (sequence, pairs) in queries.iter().enumerate() {
            for &[to, from] in pairs {
                row_mut(&mut out.view_mut(), sequence, to).assign(&row(x, sequence, from));
            }
        }
        out.into()
    }

    /// Rows `[batch, heads, n_k, columns]` of keys.
    pub(crate) fn gather_keys<T: Scalar>(&self, x: ArrayView4<'_, T>) -> Array4<T> {
        let (batch, heads, _, columns) = x.dim();
        let mut out = Array4::zeros((batch, heads, self.rows[1], columns));
        for (sequence, keys) in self.keys.iter().enumerate() {
            for (to, &from) in keys.iter().enumerate() {
                row_mut(&mut out.view_mut(), sequence, to).assign(&row(x, sequence, from));
            }
        }
        out
    }

    /// What belongs to queries and keys, `[1 or batch, heads, n_q, n_k]`, of each sequence.
    pub(crate) fn gather_pairs<T: Scalar>(&self, x: ArrayView4<'_, T>) -> Array4<T> {
        let (shared, heads, n_q, _) = x.dim();
        let batch = self.keys.len();
        let mut out = Array4::zeros((batch, heads, self.rows[0], self.rows[1]));
        for sequence in 0..batch {
            let from = x.index_axis(Axis(0), if shared == 1 { 0 } else { sequence });
            let mut out = out.index_axis_mut(Axis(0), sequence);
            let all = || (0..n_q).map(|t| [t, t]).collect();
            let pairs = self.queries.as_ref().map_or_else(all, |pairs| pairs[sequence].clone());
            for [to_row, from_row] in pairs {
                for (to, &at) in self.keys[sequence].iter().enumerate() {
                    for head in 0..heads {
                        out[[head, to_row, to]] = from[[head, from_row, at]];
                    }
                }
            }
        }
        out
    }

    /// Adds gathered rows of queries where they belong.
    pub(crate) fn add_queries<T: Scalar>(
        &self,
        from: ArrayView4<'_, T>,
        mut to: ArrayViewMut4<'_, T>,
    ) {
        let Some(queries) = &self.queries else {
            to += &from;
            return;
        };
        for (sequence, pairs) in queries.iter().enumerate() {
            for &[gathered, at] in pairs {
                let mut to = row_mut(&mut to, sequence, at);
                to += &row(from, sequence, gathered);
            }
        }
    }

    /// Adds gathered rows of keys where they belong.
    pub(crate) fn add_keys<T: Scalar>(
        &self,
        from: ArrayView4<'_, T>,
        mut to: ArrayViewMut4<'_, T>,
    ) {
        for (sequence, keys) in self.keys.iter().enumerate() {
            for (gathered, &at) in keys.iter().enumerate() {
                let mut to = row_mut(&mut to, sequence, at);
                to += &row(from, sequence, gathered);
            }
        }
    }

    /// Adds what belongs to gathered queries and keys, `[batch, heads, n_q, n_k]`, where it
    /// belongs, `[1 or batch, heads, n_q, n_k]`.
    pub(crate) fn add_pairs<T: Scalar>(
        &self,
        from: ArrayView4<'_, T>,
        mut to: ArrayViewMut4<'_, T>,
    ) {
        let (shared, heads, n_q, _) = to.dim();
        for sequence in 0..self.keys.len() {
            let mut to = to.index_axis_mut(Axis(0), if shared == 1 { 0 } else { sequence });
            let all = || (0..n_q).map(|t| [t, t]).collect();
            let pairs = self.queries.as_ref().map_or_else(all, |pairs| pairs[sequence].clone());
            for [gathered, row] in pairs {
                for (key, &at) in self.keys[sequence].iter().enumerate() {
                    for head in 0..heads {
                        to[[head, row, at]] += from[[sequence, head, gathered, key]];
                    }
                }
            }
        }
    }
}

/// A row of all heads of a sequence.
fn row<T>(x: ArrayView4<'_, T>, sequence: usize, t: usize) -> ArrayView2<'_, T> {
    x.index_axis_move(Axis(0), sequence).index_axis_move(Axis(1), t)
}

/// The same, to write.
fn row_mut<'b, T>(
    x: &'b mut ArrayViewMut4<'_, T>,
    sequence: usize,
    t: usize,
) -> ArrayViewMut2<'b, T> {
    x.view_mut().index_axis_move(Axis(0), sequence).index_axis_move(Axis(1), t)
}

const BOTH: Error = Error::Unsupported {
    what: "a mask of keys beside lengths",
    why: "both say which tokens are real: pass one of them",
};
