//! Tensors of a checkpoint, by name, in any floating-point type.

use crate::error::Error;
use crate::scalar::Scalar;
use half::{bf16, f16};
use ndarray::{Array1, Array2};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

/// The tensors whose names begin with a prefix and a dot.
pub(crate) struct LayerTensors<'a> {
    file: &'a SafeTensors<'a>,
    prefix: &'a str,
}

/// A tensor with its full name.
pub(crate) struct NamedTensor<'a> {
    name: String,
    view: TensorView<'a>,
}

impl<'a> LayerTensors<'a> {
    pub(crate) fn new(file: &'a SafeTensors<'a>, prefix: &'a str) -> Self {
        Self { file, prefix }
    }

    /// A tensor, if it is there.
    pub(crate) fn find(&self, name: &str) -> Option<NamedTensor<'a>> {
        let name = format!("{}.{name}", self.prefix);
        let view = self.file.tensor(&name).ok()?;
        Some(NamedTensor { name, view })
    }

    /// A tensor that must be there, of a shape described for whoever reads the error.
    pub(crate) fn get(&self, name: &str, shape: &str) -> Result<NamedTensor<'a>, Error> {
        self.find(name).ok_or_else(|| Error::Tensor {
            name: format!("{}.{name}", self.prefix),
            found: "missing".to_owned(),
            needed: format!("one of shape {shape}"),
        })
    }

    pub(crate) fn matrix<T: Scalar>(
        &self,
        name: &str,
        rows: usize,
        columns: usize,
    ) -> Result<Array2<T>, Error> {
        let shape = [rows, columns];
        let tensor = self.get(name, &format!("{shape:?}"))?;
        let numbers = tensor.numbers(&shape)?;
        Array2::from_shape_vec(shape, numbers).map_err(|_| tensor.shape_error(&shape))
    }

    pub(crate) fn vector<T: Scalar>(&self, name: &str, len: usize) -> Result<Array1<T>, Error> {
        let shape = [len];
        self.get(name, &format!("{shape:?}"))?.numbers(&shape).map(Array1::from)
    }
}

impl NamedTensor<'_> {
    pub(crate) fn shape(&self) -> &[usize] {
        self.view.shape()
    }

    /// The numbers, if they are of this shape, in the order of rows.
    pub(crate) fn numbers<T: Scalar>(&self, shape: &[usize]) -> Result<Vec<T>, Error> {
        if self.shape() != shape {
            return Err(self.shape_error(shape));
        }
        let data = self.view.data();
        Ok(match self.view.dtype() {
            Dtype::F64 => read(data, |b| T::from_f64(f64::from_le_bytes(b))),
            Dtype::F32 => read(data, |b| T::from_f64(f64::from(f32::from_le_bytes(b)))),
            Dtype::F16 => read(data, |b| T::from_f64(f16::from_le_bytes(b).to_f64())),
            Dtype::BF16 => read(data, |b| T::from_f64(bf16::from_le_bytes(b).to_f64())),
            other => {
                return Err(
                    self.error(format!("of type {other}"), "F64, F32, F16 or BF16".to_owned())
                );
            }
        })
    }

    /// How much a stored number near one may differ from what was meant.
    pub(crate) fn rounding(&self) -> f64 {
        match self.view.dtype() {
            Dtype::BF16 => 1.0 / 256.0,
            Dtype::F16 => 1.0 / 2048.0,
            _ => 1e-6, // The code that wrote it computes in single precision.
        }
    }

    pub(crate) fn error(&self, found: String, needed: String) -> Error {
        Error::Tensor { name: self.name.clone(), found, needed }
    }

    pub(crate) fn shape_error(&self, shape: &[usize]) -> Error {
        self.error(format!("of shape {:?}", self.shape()), format!("one of shape {shape:?}"))
    }
}

fn read<T, const BYTES: usize>(data: &[u8], number: impl Fn([u8; BYTES]) -> T) -> Vec<T> {
    data.as_chunks().0.iter().map(|bytes| number(*bytes)).collect()
}
