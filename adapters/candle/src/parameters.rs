//! Parameters of a layer as tensors, by the same names.

use crate::element::{Element, refused};
use candle_core::{DType, Device, Result, Tensor};
use dijiang::ndarray::{ArrayD, IxDyn};
use dijiang::{MultiHead, Parameters};

/// The [parameters](MultiHead::parameters) of a layer as tensors on the CPU, by their names: where
/// [`Var`](candle_core::Var)s begin.
///
/// ```
/// use dijiang::{LinearAttention, MultiHead, Performer};
///
/// let kernel = LinearAttention::new(Performer::<f32>::new(8, 16, 0)?);
/// let parameters = dijiang_candle::parameters(&MultiHead::new(kernel, 4, 4)?)?;
/// assert_eq!(parameters[0].0, "heads.0.map.projection");
/// assert_eq!(parameters[0].1.dims(), [16, 8]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// Those of [`Tensor::from_slice`].
pub fn parameters<T: Element>(layer: &MultiHead<T>) -> Result<Vec<(String, Tensor)>> {
    tensors(&layer.parameters())
}

pub(crate) fn tensors<T: Element>(parameters: &Parameters<T>) -> Result<Vec<(String, Tensor)>> {
    let tensor = |(name, array): (&str, &ArrayD<T>)| {
        let numbers: Vec<T> = array.iter().copied().collect();
        Ok((name.to_owned(), Tensor::from_vec(numbers, array.shape(), &Device::Cpu)?))
    };
    parameters.iter().map(tensor).collect()
}

/// A layer with the numbers of tensors in the place of those of these names.
pub(crate) fn layer_with<T: Element>(
    layer: &MultiHead<T>,
    tensors: &[(String, Tensor)],
) -> Result<MultiHead<T>> {
    if tensors.is_empty() {
        return Ok(layer.clone());
    }
    let array = |(name, tensor): &(String, Tensor)| {
        let dtype = if T::DTYPE == DType::F64 { DType::F64 } else { DType::F32 };
        let numbers = tensor.detach().to_dtype(dtype)?.flatten_all()?.to_vec1::<T>()?;
        let array = ArrayD::from_shape_vec(IxDyn(tensor.dims()), numbers);
        Ok((name.clone(), array.map_err(candle_core::Error::wrap)?))
    };
    let parameters: Parameters<T> = tensors.iter().map(array).collect::<Result<_>>()?;
    layer.with_parameters(&parameters).map_err(refused)
}
