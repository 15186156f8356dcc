//! Memories: sets of tokens that answer queries with partial sums.

pub(crate) mod answer;
pub(crate) mod exact;
pub(crate) mod key_values;
pub(crate) mod linear;
pub(crate) mod merged;
pub(crate) mod online_softmax;
pub(crate) mod packed;
pub(crate) mod packed_softmax;
pub(crate) mod partial;
pub(crate) mod row_code;
pub(crate) mod score_tile;
pub(crate) mod scoring;
pub(crate) mod seen_rows;
pub(crate) mod sight;
pub(crate) mod slots;
pub(crate) mod softmax_gradient;
pub(crate) mod unit;

use crate::error::Error;
use crate::memory::partial::Partial;
use crate::scalar::Scalar;
use core::fmt::Debug;
use ndarray::{ArrayView1, ArrayView2};

/// A set of tokens that absorbs (key, value) pairs and answers queries with partial sums.
///
/// An exact memory keeps the pairs, a linear memory a sum of features; several memories under one
/// normaliser make a hybrid. Implement it to bring a memory of your own: three methods, and
/// [`Clone`], through which it is copied ([`CloneMemory`]). Whoever holds a memory counts the
/// tokens that it gave, and keeps a copy of the empty one to begin anew.
///
/// ```
/// use dijiang::{Error, Memory, Partial};
/// use ndarray::{Array1, Array2, ArrayView2, Axis};
///
/// /// Weighs all tokens alike: its answer is the mean of the values.
/// #[derive(Clone, Debug)]
/// struct Uniform {
///     values: Array1<f64>,
///     tokens: f64,
/// }
///
/// impl Memory<f64> for Uniform {
///     fn absorb(&mut self, _k: ArrayView2<'_, f64>, v: ArrayView2<'_, f64>) -> Result<(), Error> {
///         self.values += &v.sum_axis(Axis(0));
///         self.tokens += v.nrows() as f64;
///         Ok(())
///     }
///
///     fn read(&self, q: ArrayView2<'_, f64>, answer: &mut Partial<f64>) -> Result<(), Error> {
///         let n = q.nrows();
///         let values = self.values.broadcast((n, self.values.len())).expect("rows").to_owned();
///         let log_scale = if self.tokens > 0.0 { 0.0 } else { f64::NEG_INFINITY };
///         answer.merge(&Partial::from_parts(
///             values,
///             Array1::from_elem(n, self.tokens),
///             Array1::from_elem(n, log_scale),
///         )?)
///     }
///
///     fn state_floats(&self) -> usize {
///         self.values.len() + 1
///     }
/// }
///
/// let empty: Box<dyn Memory<f64>> = Box::new(Uniform { values: Array1::zeros(1), tokens: 0.0 });
/// let mut memory = empty.clone();
/// let x = Array2::from_shape_vec((3, 1), vec![1.0, 2.0, 6.0]).expect("three numbers");
/// memory.absorb(x.view(), x.view())?;
/// let (mut answer, mut out) = (Partial::new(3, 1)?, Array2::zeros((3, 1)));
/// memory.read(x.view(), &mut answer)?;
/// answer.normalize_into(out.view_mut())?;
/// assert_eq!(out, Array2::from_elem((3, 1), 3.0));
/// memory = empty; // begins anew
/// # let _ = memory;
/// # Ok::<(), dijiang::Error>(())
/// ```
///
/// <style>pre.item-decl { max-height: 11em; overflow: auto; }</style>
pub trait Memory<T: Scalar>: CloneMemory<T> + Debug + Send {
    /// Takes `k [n, d]` and `v [n, value_dim]` in.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`], [`Error::NotFinite`], [`Error::Overflow`]. The memory is then unchanged.
    fn absorb(&mut self, k: ArrayView2<'_, T>, v: ArrayView2<'_, T>) -> Result<(), Error>;

    /// Merges this memory's sums for the queries `q [n, d]` into `answer`.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`], [`Error::NotFinite`], [`Error::Overflow`]. The content of `answer` is then
    /// unspecified.
    fn read(&self, q: ArrayView2<'_, T>, answer: &mut Partial<T>) -> Result<(), Error>;

    /// The size of the memory now, in numbers of type `T`.
    fn state_floats(&self) -> usize;

    /// The size of the memory now, in bytes: to be overridden where numbers are kept in fewer bits
    /// than `T` has ([`StateFormat`](crate::StateFormat)).
    fn state_bytes(&self) -> usize {
        self.state_floats() * size_of::<T>()
    }

    /// Told after a read of `q [n, d]` what all memories under the common normaliser came to:
    /// `log_normalizer [n]`, the logarithms of the sums of all weights. So an entry with weight w
    /// received the probability `w·e^{−log_normalizer}`, and a memory can learn what is asked for.
    /// It does nothing unless overridden.
    fn received(&mut self, q: ArrayView2<'_, T>, log_normalizer: ArrayView1<'_, T>) {
        let _ = (q, log_normalizer);
    }
}

/// Copies of a memory whose type is not known: every [`Memory`] that is [`Clone`] has them, so
/// that none writes this method.
///
/// `Clone` itself cannot be asked of a `dyn Memory`, since it returns a value of the type.
/// `Box<dyn Memory<T>>` is `Clone` through this.
pub trait CloneMemory<T: Scalar> {
    /// A copy with a state of its own.
    fn clone_box(&self) -> Box<dyn Memory<T>>;
}

impl<T: Scalar, M: Memory<T> + Clone + 'static> CloneMemory<T> for M {
    fn clone_box(&self) -> Box<dyn Memory<T>> {
        Box::new(self.clone())
    }
}

impl<T: Scalar> Clone for Box<dyn Memory<T>> {
    fn clone(&self) -> Self {
        (**self).clone_box()
    }
}
