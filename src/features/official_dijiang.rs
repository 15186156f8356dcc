//! The map of the released DiJiang code: a softmax of radii times frequencies.

use crate::check;
use crate::error::Error;
use crate::features::FeatureMap;
use crate::features::columns::{ColumnGradient, ColumnMap, Columns};
use crate::features::dct::transform::{FastDirections, FastExponential, norm};
use crate::features::delegate::features_by;
use crate::features::exponential::{Weights, softmax_to_logits, to_softmax};
use crate::features::logits::{LearnedForm, Logits};
use crate::features::side::Side;
use crate::features::sums::{ProjectionSums, add_radii};
use crate::kernel;
use crate::kernel::buffer::Buffer;
use crate::kernel::loops::dct::LanesDct;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use crate::scalar::sealed::Dct;
use ndarray::{Array1, Array2, ArrayView2};

/// The map of the released DiJiang code (Chen et al., arXiv 2403.19928; `GPTNeoXAttention` in the
/// code at github.com/YuchuanTian/DiJiang):
///
/// ```text
/// φ(x) = softmax(x C diag(t)),    φ(x)_i = exp(t_i (Cᵀx)_i) / Σ_l exp(t_l (Cᵀx)_l)
/// ```
///
/// with `C` the orthonormal DCT-II matrix and one radius `t_i` for each of the `head_dim` features.
/// The released code takes normal quantiles of uniform numbers and *raw* queries and keys: use it
/// with [`with_scale(1.0)`](crate::LinearAttention::with_scale). It does not estimate `exp(x·y)`;
/// [`DctFeatures`](crate::DctFeatures) does.
///
/// ```
/// use dijiang::{FeatureMap, OfficialDijiang};
/// use ndarray::{Array1, Array2, array};
///
/// let map = OfficialDijiang::<f64>::new(array![0.5, -1.5, 0.0])?;
/// let x = array![[0.3, -0.5, 0.2]];
/// let (mut values, mut log_scale) = (Array2::zeros((1, 3)), Array1::zeros(1));
/// map.map_queries(x.view(), values.view_mut(), log_scale.view_mut())?;
/// let weights = map.projection().dot(&x.row(0)).mapv(f64::exp);
/// let expected = &weights / weights.sum();
/// assert!((&values.row(0) - &expected).iter().all(|e| e.abs() < 1e-15));
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(
    feature = "serde",
    serde(try_from = "SavedOfficialDijiang<T>", into = "SavedOfficialDijiang<T>")
)]
#[cfg_attr(
    feature = "serde",
    serde(bound(
        serialize = "T: Scalar + serde::Serialize",
        deserialize = "T: Scalar + serde::Deserialize<'de>"
    ))
)]
pub struct OfficialDijiang<T> {
    features: FastExponential<T, Frequencies<T>>,
}

impl<T: Scalar> OfficialDijiang<T> {
    /// The map of radii `t [head_dim]`.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if there are no radii, [`Error::NotFinite`] if one is NaN or infinite.
    pub fn new(radii: Array1<T>) -> Result<Self, Error> {
        let head_dim = radii.len();
        check::features(head_dim, head_dim)?;
        check::finite("radii", radii.view().insert_axis(ndarray::Axis(0)))?;
        // rustdct's DCT-III halves its first input.
        let first = |j| if j == 0 { 2.0 } else { 1.0 };
        let norms = (0..head_dim).map(|j| T::from_f64(first(j) * norm(j, head_dim))).collect();
        let radii = radii.as_standard_layout().into_owned();
        let directions = Frequencies { radii, transform: T::plan_dct(head_dim), norms };
        let features = FastExponential::new(directions, &Weights::unscaled(head_dim));
        Ok(Self { features })
    }

    /// The map of the matrix `P = C·diag(t)`, `[d, d]`, that each layer of a released checkpoint
    /// stores as `proj_matrix`; the radii are `t_i = (CᵀP)_ii`.
    ///
    /// Numbers stored in half precision are allowed for: those of a column may differ from
    /// `C·diag(t)` by 1 % of its largest.
    ///
    /// ```
    /// use dijiang::OfficialDijiang;
    /// use ndarray::array;
    ///
    /// let radii = array![0.5, -1.5, 0.0];
    /// let stored = OfficialDijiang::<f32>::new(radii)?.projection().reversed_axes();
    /// let map = OfficialDijiang::from_projection(stored.view())?;
    /// assert!((map.radii() - &array![0.5, -1.5, 0.0]).iter().all(|e| e.abs() < 1e-6));
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the matrix is not square, [`Error::ZeroSize`] if it is empty,
    /// [`Error::NotFinite`] if a number is NaN or infinite, [`Error::InvalidOption`] if it is not
    /// of the form `C·diag(t)`: it was trained away from it, or it is transposed.
    pub fn from_projection(projection: ArrayView2<'_, T>) -> Result<Self, Error> {
        check::projection(projection)?;
        let head_dim = projection.nrows();
        check::size("projection", "columns", head_dim, projection.ncols())?;
        let directions = Self::new(Array1::ones(head_dim))?.projection();
        let mut radii = Array1::zeros(head_dim);
        for (i, (column, direction)) in
            projection.columns().into_iter().zip(directions.rows()).enumerate()
        {
            let pairs = || column.iter().zip(direction).map(|(p, c)| (p.as_f64(), c.as_f64()));
            let radius: f64 = pairs().map(|(p, c)| p * c).sum();
            let largest = pairs().fold(0.0, |m: f64, (_, c)| m.max((radius * c).abs()));
            let difference = pairs().fold(0.0, |m: f64, (p, c)| m.max((p - radius * c).abs()));
            if difference > 0.01 * largest + 1e-6 {
                return Err(Error::InvalidOption {
                    which: "projection",
                    found: format!("a matrix with a difference of {difference:.1e} in column {i}"),
                    needed: "C·diag(t), the orthonormal DCT-II matrix with a radius for each \
                             column",
                });
            }
            radii[i] = T::from_f64(radius);
        }
        Self::new(radii)
    }

    /// The same map with other `radii`, as [`FeatureMap::with_parameters`] makes it.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] if there is no parameter of a name, or it has another shape; those of
    /// [`new`](Self::new).
    pub fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Self, Error> {
        let mut all = FeatureMap::parameters(self);
        all.set(parameters)?;
        Self::new(all.vector("radii"))
    }

    /// The radii `t [head_dim]`, in the order of the features.
    #[must_use]
    pub fn radii(&self) -> &Array1<T> {
        self.features.directions().radii()
    }

    /// The matrix `[head_dim, head_dim]` whose rows are the ω of the features, `ω_i·x` being the
    /// exponent: `t_i` times column `i` of C.
    #[must_use]
    pub fn projection(&self) -> Array2<T> {
        self.features.projection()
    }
}

features_by!([T: Scalar] OfficialDijiang<T>, this => this as &dyn ColumnMap<T>, {
    fn parameters(&self) -> Parameters<T> {
        Parameters::new().with("radii", self.radii().clone().into_dyn())
    }

    fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Box<dyn FeatureMap<T>>, Error> {
        Ok(Box::new(self.with_parameters(parameters)?))
    }

    fn logits(&self) -> Option<Logits<T>> {
        let (projection, bias) = (self.projection(), Array1::zeros(self.radii().len()));
        Some(Logits { form: LearnedForm::Softmax, projection, bias })
    }

    fn add_parameters(&self, sums: [&ProjectionSums<T>; 2], d_parameters: &mut Parameters<T>) {
        if d_parameters.get("radii").is_some() {
            add_radii(sums, d_parameters, self.features.unit_projection().view());
        }
    }
});

impl<T: Scalar> ColumnMap<T> for OfficialDijiang<T> {
    fn head_dim(&self) -> usize {
        self.radii().len()
    }

    fn num_features(&self) -> usize {
        self.radii().len()
    }

    fn map_columns(
        &self,
        columns: &mut Columns<'_, T>,
        scratch: &mut [Buffer<T>; 2],
    ) -> Result<(), Error> {
        self.features.map_columns(columns, scratch)?;
        let [totals, _] = scratch;
        to_softmax(&mut columns.with_features(self.radii().len()), totals);
        Ok(())
    }

    fn projected(&self) -> usize {
        self.radii().len()
    }

    fn backward_columns(
        &self,
        _: Side,
        gradient: &mut ColumnGradient<'_, T>,
        sums: Option<&mut ProjectionSums<T>>,
        scratch: &mut [Buffer<T>; 2],
    ) {
        let [totals, _] = &mut *scratch;
        softmax_to_logits(gradient, totals);
        self.features.backward_of_logits(gradient, scratch);
        kernel::scale(gradient.d_x, T::from_f64(core::f64::consts::LN_2));
        if let Some(sums) = sums {
            let ColumnGradient { x, width, tokens, ref d_values, .. } = *gradient;
            sums.add(x, [tokens, width], d_values);
        }
    }
}

impl<T: PartialEq> PartialEq for OfficialDijiang<T> {
    fn eq(&self, other: &Self) -> bool {
        self.features.directions().radii == other.features.directions().radii
    }
}

/// `ω_i = t_i·(column i of C)`.
#[derive(Clone, Debug)]
struct Frequencies<T> {
    radii: Array1<T>,
    transform: Dct<T>,
    /// Norms of the transform's input.
    norms: Vec<T>,
}

impl<T: Scalar> Frequencies<T> {
    /// The norms, without what the DCT-III halves.
    fn backward_norms(&self) -> impl Iterator<Item = T> {
        let half = T::from_f64(0.5);
        self.norms.iter().enumerate().map(move |(j, &norm)| if j == 0 { half * norm } else { norm })
    }
}

impl<T: Scalar> FastDirections<T> for Frequencies<T> {
    fn head_dim(&self) -> usize {
        self.norms.len()
    }

    fn radii(&self) -> &Array1<T> {
        &self.radii
    }

    fn last_factors(&self) -> &[T] {
        self.radii.as_slice().unwrap_or_default()
    }

    fn scratch_len(&self) -> usize {
        self.norms.len() + self.transform.scratch_len
    }

    fn logits(&self, x: &[T], logits: &mut [T], scratch: &mut [T]) {
        let (block, scratch) = scratch.split_at_mut(self.norms.len());
        for ((y, &x), &norm) in block.iter_mut().zip(x).zip(&self.norms) {
            *y = x * norm;
        }
        T::dct3(&self.transform, block, scratch);
        for ((logit, &y), &radius) in logits.iter_mut().zip(&*block).zip(&self.radii) {
            *logit = y * radius;
        }
    }

    fn with_radii(self, radii: Array1<T>) -> Self {
        Self { radii, ..self }
    }

    fn backward_of_row(&self, a: &[T], d_x: &mut [T], scratch: &mut [T]) {
        let (block, scratch) = scratch.split_at_mut(self.norms.len());
        for ((y, &a), &radius) in block.iter_mut().zip(a).zip(&self.radii) {
            *y = a * radius;
        }
        T::dct2(&self.transform, block, scratch);
        for ((d_x, &y), norm) in d_x.iter_mut().zip(&*block).zip(self.backward_norms()) {
            *d_x = y * norm;
        }
    }

    fn backward_of_columns(
        &self,
        lanes: &LanesDct<T>,
        last_factors: &[T],
        gradient: &mut ColumnGradient<'_, T>,
        [norms, transform]: &mut [Buffer<T>; 2],
    ) {
        let ColumnGradient { width, ref d_values, ref mut d_x, .. } = *gradient;
        norms.resize(self.norms.len());
        norms.iter_mut().zip(self.backward_norms()).for_each(|(to, norm)| *to = norm);
        lanes.dct2(d_values, width, last_factors, norms, d_x, transform);
    }

    fn logits_of_columns(
        &self,
        lanes: &LanesDct<T>,
        last_factors: &[T],
        columns: &mut Columns<'_, T>,
        [_, transform]: &mut [Buffer<T>; 2],
    ) {
        let Columns { x, width, values, .. } = columns.with_features(self.norms.len());
        lanes.dct3(x, width, &self.norms, last_factors, values, transform);
    }
}

/// What is saved.
#[cfg(feature = "serde")]
#[derive(Clone, serde::Serialize, serde::Deserialize)]
struct SavedOfficialDijiang<T> {
    radii: Vec<T>,
}

#[cfg(feature = "serde")]
impl<T: Scalar> From<OfficialDijiang<T>> for SavedOfficialDijiang<T> {
    fn from(map: OfficialDijiang<T>) -> Self {
        Self { radii: map.radii().to_vec() }
    }
}

#[cfg(feature = "serde")]
impl<T: Scalar> TryFrom<SavedOfficialDijiang<T>> for OfficialDijiang<T> {
    type Error = Error;

    fn try_from(saved: SavedOfficialDijiang<T>) -> Result<Self, Error> {
        Self::new(Array1::from(saved.radii))
    }
}
