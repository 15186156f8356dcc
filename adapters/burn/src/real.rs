//! The numbers that tensors and kernels share.

use burn::backend::Flex;
use burn::backend::tensor::FloatTensor;
use burn::serde::Serialize;
use burn::serde::de::DeserializeOwned;
use burn::tensor::{DType, Element};
use dijiang::Scalar;

/// What kernels compute in: `f32` and `f64`. Tensors that a kernel is called with have the same
/// numbers; cast them if not (`Tensor::cast`).
pub trait Real: Scalar + Element + Serialize + DeserializeOwned + sealed::Sealed {
    /// All numbers that a tensor lies in, of which it may be a part.
    #[doc(hidden)]
    fn numbers(tensor: &FloatTensor<Flex>) -> &[Self];
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! real {
    ($($number:ty),*) => {$(
        impl sealed::Sealed for $number {}

        impl Real for $number {
            fn numbers(tensor: &FloatTensor<Flex>) -> &[Self] {
                tensor.storage()
            }
        }
    )*};
}
real!(f32, f64);

/// Panics if a tensor has other numbers than the layer.
#[track_caller]
pub(crate) fn check_dtype<T: Real>(which: &str, found: DType) {
    let needed = T::dtype();
    assert!(
        found == needed,
        "attention: `{which}` is {found:?}, the layer is {needed:?}; cast one of them"
    );
}
