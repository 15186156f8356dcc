//! The two number types of the crate: `f32` and `f64`.

use ndarray::LinalgScalar;
use num_traits::{Float, NumAssign};

/// A number that attention can be computed in: `f32` or `f64`.
///
/// Sealed: the kernels are tuned for these two. Code that is generic over `T: Scalar` may use the
/// arithmetic of [`num_traits::Float`].
///
/// ```
/// use dijiang::Scalar;
///
/// fn half<T: Scalar>(x: T) -> T {
///     x * T::from_f64(0.5)
/// }
/// assert_eq!(half(3.0_f32), 1.5);
/// assert_eq!(half(3.0_f64).as_f64(), 1.5);
/// ```
pub trait Scalar:
    sealed::Sealed
    + LinalgScalar
    + Float
    + NumAssign
    + core::iter::Sum
    + core::fmt::Debug
    + core::fmt::Display
    + Default
    + Send
    + Sync
{
    /// The name of the type, `"f32"` or `"f64"`, for messages.
    const NAME: &'static str;

    /// Rounds an `f64` to this type.
    fn from_f64(value: f64) -> Self;

    /// Widens to `f64` without loss.
    fn as_f64(self) -> f64;
}

impl Scalar for f32 {
    const NAME: &'static str = "f32";

    #[inline]
    #[allow(clippy::cast_possible_truncation)]
    fn from_f64(value: f64) -> Self {
        value as f32
    }

    #[inline]
    fn as_f64(self) -> f64 {
        f64::from(self)
    }
}

impl Scalar for f64 {
    const NAME: &'static str = "f64";

    #[inline]
    fn from_f64(value: f64) -> Self {
        value
    }

    #[inline]
    fn as_f64(self) -> f64 {
        self
    }
}

pub(crate) mod sealed {
    use rustdct::TransformType2And3;
    use std::sync::Arc;

    /// What the inner loops need to know about a number type.
    pub trait Sealed: crate::kernel::compiled::Compiled {
        /// Values below this can be summed 2⁴⁰ times with features up to 2¹⁰ without overflow.
        const SAFE_VALUE: f64;

        /// Plans an unnormalised DCT-II / DCT-III of `len` points.
        fn plan_dct(len: usize) -> Dct<Self>;

        /// The DCT-II of `buffer`, in place, without normalisation.
        fn dct2(plan: &Dct<Self>, buffer: &mut [Self], scratch: &mut [Self]);

        /// The DCT-III of `buffer`, in place, without normalisation.
        fn dct3(plan: &Dct<Self>, buffer: &mut [Self], scratch: &mut [Self]);
    }

    /// A planned transform: what rustdct's `Arc<dyn TransformType2And3>` is, with the number type
    /// erased so that the bound `DctNum` (whose method names clash with `Float`) stays out of
    /// [`super::Scalar`].
    #[derive(Clone)]
    pub struct Dct<T> {
        plan: Plan,
        pub(crate) scratch_len: usize,
        pub(crate) len: usize,
        number: core::marker::PhantomData<T>,
    }

    #[derive(Clone)]
    enum Plan {
        F32(Arc<dyn TransformType2And3<f32>>),
        F64(Arc<dyn TransformType2And3<f64>>),
    }

    impl<T> core::fmt::Debug for Dct<T> {
        fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
            f.debug_struct("Dct").field("len", &self.len).finish_non_exhaustive()
        }
    }

    macro_rules! sealed {
        ($t:ty, $variant:ident, $safe_value:expr) => {
            impl Sealed for $t {
                const SAFE_VALUE: f64 = $safe_value;

                fn plan_dct(len: usize) -> Dct<Self> {
                    let plan = crate::kernel::row_dct::plan::<$t>(len);
                    let scratch_len = plan.get_scratch_len();
                    Dct {
                        plan: Plan::$variant(plan),
                        scratch_len,
                        len,
                        number: core::marker::PhantomData,
                    }
                }

                fn dct2(plan: &Dct<Self>, buffer: &mut [Self], scratch: &mut [Self]) {
                    if let Plan::$variant(transform) = &plan.plan {
                        transform.process_dct2_with_scratch(buffer, scratch);
                    }
                }

                fn dct3(plan: &Dct<Self>, buffer: &mut [Self], scratch: &mut [Self]) {
                    if let Plan::$variant(transform) = &plan.plan {
                        transform.process_dct3_with_scratch(buffer, scratch);
                    }
                }
            }
        };
    }

    sealed!(f32, F32, 1e18);
    sealed!(f64, F64, 1e280);
}
