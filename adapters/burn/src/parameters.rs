//! The numbers of kernels as tensors, by the names that dijiang gives them.

use crate::real::Real;
use burn::tensor::{Device, Tensor, TensorData};
use dijiang::{MultiHead, Parameters};
use std::collections::BTreeMap;

/// The parameters of a layer as tensors, by the names of [`MultiHead::parameters`]: what
/// [`attention_with`](crate::attention_with) is called with, so that they are trained.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use dijiang_burn::TensorParameters;
/// use dijiang_burn::dijiang::{LinearAttention, MultiHead, Performer};
///
/// let layer = MultiHead::new(LinearAttention::new(Performer::<f32>::new(8, 16, 0)?), 4, 2)?;
/// let device = Device::flex().autodiff();
/// let parameters = TensorParameters::of(&layer, &device);
/// let weights: Tensor<1> = parameters.get("heads.0.map.weights").unwrap();
/// let parameters = parameters.with("heads.0.map.weights", weights.require_grad());
/// assert_eq!(parameters.names().count(), 2);
/// # Ok::<(), dijiang_burn::dijiang::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct TensorParameters {
    /// In one row, and the shape of the array.
    arrays: BTreeMap<String, (Tensor<1>, Vec<usize>)>,
}

impl TensorParameters {
    /// None.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// All parameters of a layer, as constants on a device.
    #[must_use]
    pub fn of<T: Real>(layer: &MultiHead<T>, device: &Device) -> Self {
        let mut all = Self::new();
        for (name, array) in layer.parameters().iter() {
            let numbers: Vec<T> = array.iter().copied().collect();
            let data = TensorData::new(numbers, [array.len()]);
            let tensor = Tensor::from_data(data, (device, T::dtype()));
            all.arrays.insert(name.to_owned(), (tensor, array.shape().to_vec()));
        }
        all
    }

    /// Adds a tensor, or puts it in the place of the one of this name.
    #[must_use]
    pub fn with<const D: usize>(mut self, name: impl Into<String>, tensor: Tensor<D>) -> Self {
        let shape = tensor.dims();
        let row = tensor.reshape([shape.iter().product::<usize>()]);
        self.arrays.insert(name.into(), (row, shape.to_vec()));
        self
    }

    /// The tensor of a name, if it has `D` axes.
    #[must_use]
    pub fn get<const D: usize>(&self, name: &str) -> Option<Tensor<D>> {
        let (row, shape) = self.arrays.get(name)?;
        let shape: [usize; D] = shape.clone().try_into().ok()?;
        Some(row.clone().reshape(shape))
    }

    /// The names, in their order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.arrays.keys().map(String::as_str)
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.arrays.is_empty()
    }

    /// The numbers, without their history: for
    /// [`MultiHead::with_parameters`](dijiang::MultiHead::with_parameters).
    ///
    /// # Panics
    ///
    /// Panics if a tensor cannot be read as numbers of type `T`.
    #[must_use]
    pub fn to_arrays<T: Real>(&self) -> Parameters<T> {
        let arrays = self.arrays.iter().map(|(name, (row, shape))| {
            let data = row.to_data().convert::<T>();
            let numbers = data.try_to_vec::<T>().expect("numbers that were converted");
            let array = dijiang::ndarray::ArrayD::from_shape_vec(shape.clone(), numbers);
            (name.clone(), array.expect("as many numbers as the shape has"))
        });
        arrays.collect()
    }

    /// All in one row, with their names and shapes.
    pub(crate) fn packed(&self) -> (Option<Tensor<1>>, Vec<(String, Vec<usize>)>) {
        let rows: Vec<_> = self.arrays.values().map(|(row, _)| row.clone()).collect();
        let shapes = self.arrays.iter().map(|(name, (_, shape))| (name.clone(), shape.clone()));
        ((!rows.is_empty()).then(|| Tensor::cat(rows, 0)), shapes.collect())
    }
}
