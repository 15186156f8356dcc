//! Transforms of one row of points, planned as rustdct does.
//!
//! The choices are those of rustdct's own planner, but for sizes that go through an FFT it is a
//! scalar one: the vectorised planner of rustfft would triple the time this crate takes to compile,
//! and chunks of vectors, not one vector, are what to vectorise.

use rustdct::algorithm::type2and3_butterflies::{
    Type2And3Butterfly2, Type2And3Butterfly3, Type2And3Butterfly4, Type2And3Butterfly8,
    Type2And3Butterfly16,
};
use rustdct::algorithm::{Type2And3ConvertToFft, Type2And3SplitRadix};
use rustdct::rustfft::FftPlannerScalar;
use rustdct::{DctNum, TransformType2And3};
use std::sync::Arc;

/// An unnormalised DCT-II / DCT-III of `len` points.
pub(crate) fn plan<T: DctNum>(len: usize) -> Arc<dyn TransformType2And3<T>> {
    match len {
        2 => Arc::new(Type2And3Butterfly2::new()),
        3 => Arc::new(Type2And3Butterfly3::new()),
        4 => Arc::new(Type2And3Butterfly4::new()),
        8 => Arc::new(Type2And3Butterfly8::new()),
        16 => Arc::new(Type2And3Butterfly16::new()),
        _ if len.is_power_of_two() && len > 2 => {
            Arc::new(Type2And3SplitRadix::new(plan(len / 2), plan(len / 4)))
        }
        _ => Arc::new(Type2And3ConvertToFft::new(FftPlannerScalar::new().plan_fft_forward(len))),
    }
}
