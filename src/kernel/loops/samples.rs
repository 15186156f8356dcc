//! Numbers for the tests of the loops, and how near a result must be.

use crate::kernel::simd::Lanes;
use crate::kernel::simd::machine::Machine;

/// `n` numbers between −1 and 1; another step gives others.
pub(crate) fn numbers<T: Lanes>(n: usize, step: f64) -> Vec<T> {
    (0..n).map(|i| T::from((i as f64 * step + 0.2).sin()).unwrap()).collect()
}

pub(crate) fn wide<T: Lanes>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| x.to_f64().unwrap()).collect()
}

/// Fails where a result of `n` terms is further off than `tolerance` for each of them.
pub(crate) fn assert_near<T: Lanes>(
    machine: Machine,
    n: usize,
    found: T,
    expected: f64,
    tolerance: f64,
) {
    let found = found.to_f64().unwrap();
    assert!(
        (found - expected).abs() <= tolerance * (1.0 + n as f64),
        "{machine:?} {n}: {found} {expected}"
    );
}
