//! Learned maps: exponentials of linear layers, one for queries and one for keys.

use crate::check;
use crate::error::Error;
use crate::features::FeatureMap;
use crate::features::columns::{ColumnGradient, ColumnMap, Columns};
use crate::features::delegate::backward_by_columns;
use crate::features::exponential::{Dense, softmax_to_logits, to_softmax};
use crate::features::gradient::MapGradient;
use crate::features::logits::{LearnedForm, Logits};
use crate::features::side::Side;
use crate::features::sums::ProjectionSums;
use crate::kernel;
use crate::kernel::buffer::Buffer;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use ndarray::{
    Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis, concatenate,
};

/// A map that is trained: exponentials of linear layers, with weights of their own for queries and
/// for keys,
///
/// ```text
/// z = W x + b, or z = [W x + b, −W x − b] if mirrored,
/// φ_i(x) = exp(z_i)/Σ_l exp(z_l)      LearnedForm::Softmax
/// φ_i(x) = exp(z_i − |x|²/2)          LearnedForm::Exponential
/// ```
///
/// The mirrored softmax is the map of Hedgehog (Zhang et al., arXiv 2402.04347, equation 6 and
/// section 4.2); that a pretrained transformer can be finetuned to learned maps of its heads is due
/// to T2R (Kasai et al., arXiv 2103.13076). Without a norm of its own, a learned layer can do what
/// a random projection cannot: spend its features on the directions that a head uses.
///
/// It begins as [any exponential map](Self::from_map) of the crate, calibrated or not, and is then
/// as good as that one, or as [Hedgehog](Self::hedgehog) begins. [`distill`](crate::distill) trains
/// it on the queries, keys and values of a head; its parameters are `query_projection` and
/// `key_projection`, `[p, head_dim]`, `query_bias` and `key_bias`, `[p]`.
///
/// ```
/// use dijiang::{FeatureMap, LearnedFeatures, Performer};
/// use ndarray::{Array1, Array2};
///
/// let fixed = Performer::<f64>::new(4, 8, 0)?;
/// let learned = LearnedFeatures::from_map(&fixed)?;
/// let x = Array2::from_shape_fn((3, 4), |(t, i)| (t as f64 - i as f64) / 4.0);
/// let features = |map: &dyn FeatureMap<f64>| {
///     let (mut values, mut log_scale) = (Array2::zeros((3, 8)), Array1::zeros(3));
///     map.map_keys(x.view(), values.view_mut(), log_scale.view_mut())?;
///     Ok::<_, dijiang::Error>(values * log_scale.mapv(f64::exp).insert_axis(ndarray::Axis(1)))
/// };
/// assert!((features(&fixed)? - features(&learned)?).iter().all(|e| e.abs() < 1e-14));
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "SavedLearned<T>", into = "SavedLearned<T>"))]
#[cfg_attr(
    feature = "serde",
    serde(bound(
        serialize = "T: Scalar + serde::Serialize",
        deserialize = "T: Scalar + serde::Deserialize<'de>"
    ))
)]
pub struct LearnedFeatures<T> {
    form: LearnedForm,
    is_mirrored: bool,
    /// Of queries and of keys.
    sides: [LearnedSide<T>; 2],
}

/// The layer of one side.
#[derive(Clone, Debug)]
struct LearnedSide<T> {
    projection: Array2<T>,
    bias: Array1<T>,
    is_softmax: bool,
    dense: Dense<T>,
}

impl<T: Scalar> LearnedFeatures<T> {
    /// The map of the layers of queries and of keys: projections `[p, head_dim]` and biases `[p]`,
    /// to `p` features, or if mirrored to `2p`.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if a projection has no rows or columns, [`Error::Shape`] if the shapes
    /// do not fit together, [`Error::NotFinite`] if a number is NaN or infinite.
    pub fn from_parts(
        form: LearnedForm,
        is_mirrored: bool,
        [query_projection, key_projection]: [Array2<T>; 2],
        [query_bias, key_bias]: [Array1<T>; 2],
    ) -> Result<Self, Error> {
        let (rows, columns) = query_projection.dim();
        check::size("key_projection", "rows", rows, key_projection.nrows())?;
        check::size("key_projection", "columns", columns, key_projection.ncols())?;
        let side = |projection: Array2<T>, (which, bias): (&'static str, Array1<T>)| {
            check::projection(projection.view())?;
            check::features(columns, rows)?;
            check::size(which, "elements", rows, bias.len())?;
            check::finite(which, bias.view().insert_axis(Axis(0)))?;
            let (all, all_biases) = if is_mirrored {
                (
                    concatenate![Axis(0), projection, projection.mapv(|w| -w)],
                    concatenate![Axis(0), bias, bias.mapv(|b| -b)],
                )
            } else {
                (projection.clone(), bias.clone())
            };
            let dense = Dense::with_bias(all.view(), &all_biases);
            let is_softmax = form == LearnedForm::Softmax;
            let projection = projection.as_standard_layout().into_owned();
            Ok::<_, Error>(LearnedSide { projection, bias, is_softmax, dense })
        };
        let query = side(query_projection, ("query_bias", query_bias))?;
        let key = side(key_projection, ("key_bias", key_bias))?;
        Ok(Self { form, is_mirrored, sides: [query, key] })
    }

    /// How Hedgehog begins: `W = I`, `b = 0`, mirrored, a softmax of `2·head_dim` features.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `head_dim` is 0, [`Error::InvalidOption`] if it is too large for a
    /// matrix.
    pub fn hedgehog(head_dim: usize) -> Result<Self, Error> {
        check::features(head_dim, head_dim)?;
        let [a, b] = [(); 2].map(|()| Array2::eye(head_dim));
        let biases = [(); 2].map(|()| Array1::zeros(head_dim));
        Self::from_parts(LearnedForm::Softmax, true, [a, b], biases)
    }

    /// What begins as an exponential map of the crate: [`Performer`](crate::Performer),
    /// [`Wpff`](crate::Wpff) and [`DctFeatures`](crate::DctFeatures), calibrated or not,
    /// or [`OfficialDijiang`](crate::OfficialDijiang). Features of weight 0 are left out.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if the map is no exponential of linear layers.
    pub fn from_map(map: &dyn FeatureMap<T>) -> Result<Self, Error> {
        let why = "its features are no exponentials of linear layers; take `Performer`, `Wpff`, \
                   `DctFeatures` or `OfficialDijiang`";
        let none = Error::Unsupported { what: "a learned map that begins as this one", why };
        let Logits { form, projection, bias } = map.logits().ok_or(none)?;
        Self::from_parts(form, false, [projection.clone(), projection], [bias.clone(), bias])
    }

    /// The same map with other layers, as [`FeatureMap::with_parameters`] makes it.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] if there is no parameter of a name, or it has another shape; those of
    /// [`from_parts`](Self::from_parts).
    pub fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Self, Error> {
        let mut all = FeatureMap::parameters(self);
        all.set(parameters)?;
        let projections =
            ["query_projection", "key_projection"].map(|name| all.matrix(name).to_owned());
        let biases = ["query_bias", "key_bias"].map(|name| all.vector(name));
        Self::from_parts(self.form, self.is_mirrored, projections, biases)
    }

    /// What is made of the exponents.
    #[must_use]
    pub fn form(&self) -> LearnedForm {
        self.form
    }

    /// Whether each exponent stands beside its negative.
    #[must_use]
    pub fn is_mirrored(&self) -> bool {
        self.is_mirrored
    }

    /// The projections of queries and of keys, `[p, head_dim]`.
    #[must_use]
    pub fn projections(&self) -> [ArrayView2<'_, T>; 2] {
        self.sides.each_ref().map(|side| side.projection.view())
    }

    /// The biases of queries and of keys, `[p]`.
    #[must_use]
    pub fn biases(&self) -> [ArrayView1<'_, T>; 2] {
        self.sides.each_ref().map(|side| side.bias.view())
    }

    fn side(&self, side: Side) -> &LearnedSide<T> {
        &self.sides[usize::from(side == Side::Key)]
    }

    /// The gradient by a layer from that by all its exponents.
    fn layer(&self, sums: &ProjectionSums<T>) -> (Array2<T>, Array1<T>) {
        let (projection, bias): (_, Array1<T>) = (sums.projection(), sums.bias().collect());
        if !self.is_mirrored {
            return (projection, bias);
        }
        let rows = self.sides[0].bias.len();
        let (plain, mirrored) = projection.view().split_at(Axis(0), rows.min(bias.len()));
        let projection = if bias.is_empty() { plain.to_owned() } else { &plain - &mirrored };
        let (plain, mirrored) = bias.view().split_at(Axis(0), rows.min(bias.len()));
        let bias = if bias.is_empty() { plain.to_owned() } else { &plain - &mirrored };
        (projection, bias)
    }
}

impl<T: Scalar> FeatureMap<T> for LearnedFeatures<T> {
    fn head_dim(&self) -> usize {
        self.sides[0].projection.ncols()
    }

    fn num_features(&self) -> usize {
        self.sides[0].dense.num_features()
    }

    fn map_queries(
        &self,
        x: ArrayView2<'_, T>,
        values: ArrayViewMut2<'_, T>,
        log_scale: ArrayViewMut1<'_, T>,
    ) -> Result<(), Error> {
        (self.side(Side::Query) as &dyn ColumnMap<T>).map_queries(x, values, log_scale)
    }

    fn map_keys(
        &self,
        x: ArrayView2<'_, T>,
        values: ArrayViewMut2<'_, T>,
        log_scale: ArrayViewMut1<'_, T>,
    ) -> Result<(), Error> {
        (self.side(Side::Key) as &dyn ColumnMap<T>).map_keys(x, values, log_scale)
    }

    fn backward(&self, gradient: MapGradient<'_, T>) -> Result<(), Error> {
        backward_by_columns(self, gradient)
    }

    fn parameters(&self) -> Parameters<T> {
        let [query, key] = &self.sides;
        Parameters::new()
            .with("query_projection", query.projection.clone().into_dyn())
            .with("query_bias", query.bias.clone().into_dyn())
            .with("key_projection", key.projection.clone().into_dyn())
            .with("key_bias", key.bias.clone().into_dyn())
    }

    fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Box<dyn FeatureMap<T>>, Error> {
        Ok(Box::new(self.with_parameters(parameters)?))
    }

    fn column_map(&self, side: Side) -> Option<&dyn ColumnMap<T>> {
        Some(self.side(side))
    }

    fn logits(&self) -> Option<Logits<T>> {
        None // those of queries and keys differ
    }

    fn add_parameters(&self, sums: [&ProjectionSums<T>; 2], d_parameters: &mut Parameters<T>) {
        let names = [("query_projection", "query_bias"), ("key_projection", "key_bias")];
        for ((of_projection, of_bias), sums) in names.into_iter().zip(sums) {
            let (projection, bias) = self.layer(sums);
            if bias.is_empty() {
                continue;
            }
            if let Some(gradient) = d_parameters.get_mut(of_projection) {
                *gradient += &projection;
            }
            if let Some(gradient) = d_parameters.get_mut(of_bias) {
                *gradient += &bias;
            }
        }
    }
}

impl<T: Scalar> ColumnMap<T> for LearnedSide<T> {
    fn head_dim(&self) -> usize {
        self.dense.head_dim()
    }

    fn num_features(&self) -> usize {
        self.dense.num_features()
    }

    fn map_columns(
        &self,
        columns: &mut Columns<'_, T>,
        scratch: &mut [Buffer<T>; 2],
    ) -> Result<(), Error> {
        self.dense.map_columns(columns, scratch)?;
        if self.is_softmax {
            let [totals, _] = scratch;
            to_softmax(&mut columns.with_features(self.dense.num_features()), totals);
        }
        Ok(())
    }

    fn omega(&self) -> Option<&[T]> {
        if self.is_softmax { None } else { self.dense.omega() }
    }

    fn projected(&self) -> usize {
        self.dense.projected()
    }

    fn backward_columns(
        &self,
        side: Side,
        gradient: &mut ColumnGradient<'_, T>,
        sums: Option<&mut ProjectionSums<T>>,
        scratch: &mut [Buffer<T>; 2],
    ) {
        if !self.is_softmax {
            return self.dense.backward_columns(side, gradient, sums, scratch);
        }
        softmax_to_logits(gradient, &mut scratch[0]);
        self.dense.backward_of_logits(gradient);
        kernel::scale(gradient.d_x, T::from_f64(core::f64::consts::LN_2));
        if let Some(sums) = sums {
            let ColumnGradient { x, width, tokens, ref d_values, .. } = *gradient;
            sums.add(x, [tokens, width], d_values);
        }
    }
}

impl<T: PartialEq> PartialEq for LearnedFeatures<T> {
    fn eq(&self, other: &Self) -> bool {
        let layers = |side: &LearnedSide<T>, other: &LearnedSide<T>| {
            side.projection == other.projection && side.bias == other.bias
        };
        self.form == other.form
            && self.is_mirrored == other.is_mirrored
            && self.sides.iter().zip(&other.sides).all(|(side, other)| layers(side, other))
    }
}

/// What is saved.
#[cfg(feature = "serde")]
#[derive(Clone, serde::Serialize, serde::Deserialize)]
struct SavedLearned<T> {
    form: LearnedForm,
    mirrored: bool,
    query_projection: Array2<T>,
    query_bias: Array1<T>,
    key_projection: Array2<T>,
    key_bias: Array1<T>,
}

#[cfg(feature = "serde")]
impl<T: Scalar> From<LearnedFeatures<T>> for SavedLearned<T> {
    fn from(map: LearnedFeatures<T>) -> Self {
        let [query, key] = map.sides;
        Self {
            form: map.form,
            mirrored: map.is_mirrored,
            query_projection: query.projection,
            query_bias: query.bias,
            key_projection: key.projection,
            key_bias: key.bias,
        }
    }
}

#[cfg(feature = "serde")]
impl<T: Scalar> TryFrom<SavedLearned<T>> for LearnedFeatures<T> {
    type Error = Error;

    fn try_from(saved: SavedLearned<T>) -> Result<Self, Error> {
        let projections = [saved.query_projection, saved.key_projection];
        let biases = [saved.query_bias, saved.key_bias];
        Self::from_parts(saved.form, saved.mirrored, projections, biases)
    }
}
