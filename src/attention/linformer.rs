//! Linformer: softmax attention over projected keys and values.

mod gradient;
mod projected;

use crate::attention::Attention;
use crate::attention::call::Head;
use crate::attention::gradient::HeadGradient;
use crate::attention::linformer::gradient::ProjectionGradient;
use crate::attention::linformer::projected::Projected;
use crate::attention::scratch::Scratch;
use crate::attention::sharing::Sharing;
use crate::attention::softmax::options::SoftmaxAttention;
use crate::attention::stream::Stream;
use crate::error::Error;
use crate::kernel::buffer::Buffer;
use crate::mask::Mask;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use crate::{check, projection};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};
use std::sync::Arc;

/// Softmax attention over `rank` projected keys and values in place of all of them (Linformer, Wang
/// et al., arXiv 2006.04768, equation 7):
///
/// ```text
/// O = softmax(scale·Q (E K)ᵀ) (F V),    E, F [rank, max_len],    scale = 1/√head_dim unless set
/// ```
///
/// so time is O(n·rank·(d + d_v)). A sequence of `n ≤ max_len` tokens uses the first `n` columns of
/// E and F, as if padded with zeros; a longer one gives [`Error::TooLong`]. Sums over tokens carry
/// their rounding errors along.
///
/// Every projected key mixes all positions, so there is no causal form: with [`Mask::Causal`] a
/// query would see the future. That mask and [`stream`](Attention::stream) give
/// [`Error::Unsupported`].
///
/// The matrices belong to a trained model ([`from_projections`](Self::from_projections)); random
/// ones are where training begins. Outputs are weighted means of the rows of F V, not of the
/// values: they leave the hull of the values, and values of ones give ones only if the rows of F
/// sum to one.
///
/// Both are parameters, `e` and `f`, or `e` alone where they are [`shared`](Self::shared). Columns
/// beyond the sequence of a call have the gradient 0.
///
/// ```
/// use dijiang::{Attention, Linformer, Mask};
/// use ndarray::{Array2, array};
///
/// // two projected tokens, the means of the first and of the second half
/// let halves = array![[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]];
/// let kernel = Linformer::<f64>::from_projections(1, halves.clone(), halves)?;
/// let (q, k, v) = (
///     array![[50.0]],
///     array![[1.0], [1.0], [-1.0], [-1.0]],
///     array![[1.0], [2.0], [3.0], [4.0]],
/// );
/// let out = kernel.forward(q.view(), k.view(), v.view(), Mask::Full)?;
/// assert!((out[[0, 0]] - 1.5).abs() < 1e-12);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "SavedLinformer<T>", into = "SavedLinformer<T>"))]
#[cfg_attr(
    feature = "serde",
    serde(bound(
        serialize = "T: Scalar + serde::Serialize",
        deserialize = "T: Scalar + serde::Deserialize<'de>"
    ))
)]
pub struct Linformer<T> {
    /// E and F, in rows: the same one where they are shared.
    projections: [Arc<Array2<T>>; 2],
    head_dim: usize,
    scale: Option<f64>,
    softmax: SoftmaxAttention<T>,
}

impl<T: Scalar> Linformer<T> {
    /// Random projections: entries of E, then those of F, independent, N(0, 1/rank) (the
    /// distribution of the paper's theorem 2).
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if a size is 0, [`Error::InvalidOption`] if one is too large for an
    /// array.
    pub fn new(head_dim: usize, rank: usize, max_len: usize, seed: u64) -> Result<Self, Error> {
        check_sizes(head_dim, rank, max_len)?;
        let both = random(rank, 2 * rank, max_len, seed)?;
        let (e, f) = both.view().split_at(Axis(0), rank);
        Self::from_projections(head_dim, e.to_owned(), f.to_owned())
    }

    /// One random projection for keys and values, E = F (key-value sharing in the paper): the E of
    /// [`new`](Self::new).
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn shared(head_dim: usize, rank: usize, max_len: usize, seed: u64) -> Result<Self, Error> {
        check_sizes(head_dim, rank, max_len)?;
        let e = Arc::new(random(rank, rank, max_len, seed)?);
        Self::of(head_dim, [Arc::clone(&e), e])
    }

    /// The projections of a trained model: E of the keys and F of the values, both
    /// `[rank, max_len]`, over queries and keys of `head_dim` columns.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if a size is 0, [`Error::Shape`] if F has another shape than E,
    /// [`Error::NotFinite`] if one holds NaN or infinity.
    pub fn from_projections(head_dim: usize, e: Array2<T>, f: Array2<T>) -> Result<Self, Error> {
        check::size("f", "rows", e.nrows(), f.nrows())?;
        check::size("f", "columns", e.ncols(), f.ncols())?;
        Self::of(
            head_dim,
            [e, f].map(|projection| Arc::new(projection.as_standard_layout().into_owned())),
        )
    }

    fn of(head_dim: usize, projections: [Arc<Array2<T>>; 2]) -> Result<Self, Error> {
        let [e, f] = &projections;
        check_sizes(head_dim, e.nrows(), e.ncols())?;
        check::finite("e", e.view())?;
        check::finite("f", f.view())?;
        Ok(Self { projections, head_dim, scale: None, softmax: SoftmaxAttention::new(head_dim)? })
    }

    /// Sets the factor of the scores, `1/√head_dim` unless set. One that is not positive and finite
    /// is reported by the first call that would use it.
    #[must_use]
    pub fn with_scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self.softmax = self.softmax.with_scale(scale);
        self
    }

    /// E and F `[rank, max_len]`.
    #[must_use]
    pub fn projections(&self) -> [ArrayView2<'_, T>; 2] {
        self.projections.each_ref().map(|projection| projection.view())
    }

    /// The longest sequence of keys.
    #[must_use]
    pub fn max_len(&self) -> usize {
        self.projections[0].ncols()
    }
}

fn check_sizes(head_dim: usize, rank: usize, max_len: usize) -> Result<(), Error> {
    check::at_least_one("head_dim", head_dim)?;
    check::at_least_one("rank", rank)?;
    check::at_least_one("max_len", max_len)?;
    check::array("rank", rank, head_dim)
}

/// `[rows, max_len]` numbers of variance 1/rank.
#[allow(clippy::cast_precision_loss)]
fn random<T: Scalar>(
    rank: usize,
    rows: usize,
    max_len: usize,
    seed: u64,
) -> Result<Array2<T>, Error> {
    let factor = 1.0 / (rank as f64).sqrt();
    Ok(projection::gaussian(max_len, rows, seed)?.mapv(|x| T::from_f64(x * factor)))
}

/// Projected keys and values, in the scratch.
#[derive(Debug)]
struct LinformerScratch<T>([Projected<T>; 2]);

impl<T: Scalar> Default for LinformerScratch<T> {
    fn default() -> Self {
        Self([Projected::new(), Projected::new()])
    }
}

impl<T: Scalar> Attention<T> for Linformer<T> {
    fn forward_heads(
        &self,
        heads: &mut [Head<'_, T>],
        mask: Mask,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        let [e, f] = &self.projections;
        scratch.with_part(|LinformerScratch([keys, values]), scratch| {
            heads.iter_mut().try_for_each(|head| {
                head.check_not_gated()?;
                head.check_forward(self.head_dim, mask)?;
                if mask != Mask::Full {
                    return Err(NOT_CAUSAL);
                }
                check::length(self.max_len(), head.keys())?;
                head.check_finite()?;
                keys.set("a projected key", e, head.k)?;
                values.set("a projected value", f, head.v)?;
                let (head_dim, value_dim) = (head.k.ncols(), head.v.ncols());
                let k = keys.view(e.nrows(), head_dim);
                let v = values.view(f.nrows(), value_dim);
                let projected = Head { k, v, ..head.reborrow() };
                self.softmax.forward_heads(&mut [projected], Mask::Full, scratch)
            })
        })
    }

    fn stream(&self, _value_dim: usize) -> Result<Box<dyn Stream<T>>, Error> {
        Err(NOT_CAUSAL)
    }

    fn sharing(&self) -> Sharing {
        Sharing::Head
    }

    fn backward_heads(
        &self,
        heads: &mut [HeadGradient<'_, T>],
        mask: Mask,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        scratch.with_part(|part: &mut BackwardScratch<T>, scratch| {
            heads.iter_mut().try_for_each(|head| self.backward_head(head, mask, part, scratch))
        })
    }

    fn parameters(&self) -> Parameters<T> {
        let [e, f] = &self.projections;
        let parameters = Parameters::new().with(E, (**e).clone().into_dyn());
        if Arc::ptr_eq(e, f) { parameters } else { parameters.with(F, (**f).clone().into_dyn()) }
    }

    fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Box<dyn Attention<T>>, Error> {
        let mut own = self.parameters();
        own.set(parameters)?;
        let e = Arc::new(own.matrix(E).as_standard_layout().into_owned());
        let f = match own.get(F) {
            Some(_) => Arc::new(own.matrix(F).as_standard_layout().into_owned()),
            None => Arc::clone(&e),
        };
        let kernel = Self::of(self.head_dim, [e, f])?;
        Ok(Box::new(match self.scale {
            Some(scale) => kernel.with_scale(scale),
            None => kernel,
        }))
    }
}

impl<T: Scalar> Linformer<T> {
    fn backward_head(
        &self,
        head: &mut HeadGradient<'_, T>,
        mask: Mask,
        part: &mut BackwardScratch<T>,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        let BackwardScratch { forward, d_keys, d_values, of_projection } = part;
        let LinformerScratch([keys, values]) = forward;
        head.check_not_gated()?;
        head.check_backward(self.head_dim, mask)?;
        if mask != Mask::Full {
            return Err(NOT_CAUSAL);
        }
        check::length(self.max_len(), head.keys())?;
        head.check_finite()?;
        let ([e, f], value_dim) = (&self.projections, head.v.ncols());
        keys.set("a projected key", e, head.k)?;
        values.set("a projected value", f, head.v)?;
        let (k, v) = (keys.view(e.nrows(), self.head_dim), values.view(f.nrows(), value_dim));
        let [mut d_keys, mut d_values] = [(d_keys, k), (d_values, v)].map(|(d, x)| {
            d.resize(x.len());
            d.fill(T::zero());
            ArrayViewMut2::from_shape(x.dim(), d).expect("resized")
        });
        let (d_k, d_v) = (d_keys.view_mut(), d_values.view_mut());
        let projected = HeadGradient { k, v, d_k, d_v, d_parameters: None, ..head.reborrow() };
        self.softmax.backward_heads(&mut [projected], Mask::Full, scratch)?;

        let name_of_f = if Arc::ptr_eq(e, f) { E } else { F };
        for (name, projection, d_y, x, d_x) in [
            (E, e, d_keys.view(), head.k, head.d_k.view_mut()),
            (name_of_f, f, d_values.view(), head.v, head.d_v.view_mut()),
        ] {
            let d_projection = match &mut head.d_parameters {
                Some(d_parameters) => d_parameters.matrix_mut(name, projection)?,
                None => None,
            };
            let Some(mut d_projection) = d_projection else {
                of_projection.add(projection, x, d_y, d_x, None);
                continue;
            };
            of_projection.add(projection, x, d_y, d_x, Some(d_projection.view_mut()));
            let which = if name == E { "the gradient by `e`" } else { "the gradient by `f`" };
            check::gradient(which, d_projection.view())?;
        }
        check::gradient("the gradient by `k`", head.d_k.view())?;
        check::gradient("the gradient by `v`", head.d_v.view())
    }
}

/// The names of the projections among the parameters.
const E: &str = "e";
const F: &str = "f";

/// What a backward pass keeps in the scratch.
#[derive(Debug)]
struct BackwardScratch<T> {
    forward: LinformerScratch<T>,
    /// The gradients by projected keys and values.
    d_keys: Buffer<T>,
    d_values: Buffer<T>,
    of_projection: ProjectionGradient<T>,
}

impl<T: Scalar> Default for BackwardScratch<T> {
    fn default() -> Self {
        let [d_keys, d_values] = [(); 2].map(|()| Buffer::new());
        let of_projection = ProjectionGradient::new();
        Self { forward: LinformerScratch::default(), d_keys, d_values, of_projection }
    }
}

const NOT_CAUSAL: Error = Error::Unsupported {
    what: "causal attention with Linformer",
    why: "each projected key mixes all positions, so a query would see the future; use \
          `Mask::Full`, or another kernel",
};

/// What is saved; F is left out where it is E.
#[cfg(feature = "serde")]
#[derive(serde::Serialize, serde::Deserialize)]
struct SavedLinformer<T> {
    head_dim: usize,
    scale: Option<f64>,
    e: Array2<T>,
    f: Option<Array2<T>>,
}

#[cfg(feature = "serde")]
impl<T: Clone> From<Linformer<T>> for SavedLinformer<T> {
    fn from(kernel: Linformer<T>) -> Self {
        let [e, f] = &kernel.projections;
        let f = if Arc::ptr_eq(e, f) { None } else { Some((**f).clone()) };
        Self { head_dim: kernel.head_dim, scale: kernel.scale, e: (**e).clone(), f }
    }
}

#[cfg(feature = "serde")]
impl<T: Scalar> TryFrom<SavedLinformer<T>> for Linformer<T> {
    type Error = Error;

    fn try_from(parts: SavedLinformer<T>) -> Result<Self, Error> {
        let kernel = if let Some(f) = parts.f {
            Self::from_projections(parts.head_dim, parts.e, f)?
        } else {
            let e = Arc::new(parts.e.as_standard_layout().into_owned());
            Self::of(parts.head_dim, [Arc::clone(&e), e])?
        };
        Ok(match parts.scale {
            Some(scale) => kernel.with_scale(scale),
            None => kernel,
        })
    }
}
