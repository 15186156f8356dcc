//! How far out along their directions the features of a map lie.

/// The radii of [`DctFeatures`](crate::DctFeatures) and of [`Wpff`](crate::Wpff).
///
/// [`Chi`](Self::Chi) is the default of both. [`Antithetic`](Self::Antithetic) and
/// [`Normal`](Self::Normal) are for [`DctFeatures`](crate::DctFeatures) alone,
/// [`Sobol`](Self::Sobol) is for [`Wpff`](crate::Wpff) alone: the other map answers with
/// [`Error::InvalidOption`](crate::Error::InvalidOption).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Radii {
    /// Stratified quantiles of the chi distribution, `chi_d^{-1}((i − ½)/m)` in random order:
    /// `E ωωᵀ = I`, the softmax kernel. Strata miss the tails a little: at d = 8, m = 16, |x|² = 1
    /// the mean is 3 % low.
    Chi,
    /// `±√d` on each direction, with an even number of features. At m = 2d the features integrate
    /// every polynomial of degree three exactly (a cubature); it is the best positive map without
    /// data that we measured at small norms. It is biased: with `z = x + y` the mean is low by
    /// about `exp(−|z|⁴/4(d + 2))`, an error that more features do not mend.
    Antithetic,
    /// Stratified quantiles of the standard normal distribution, the radii of the released DiJiang
    /// code. Then `E ωωᵀ = I/d`, so with the factors `e^{−|x|²/2}` the features aim at
    /// `exp(x·y/d − ½(1 − 1/d)(|x|² + |y|²))`, to leading order, and the error against `exp(x·y)`
    /// does not fall with m.
    Normal,
    /// Quantiles of the chi distribution at one more coordinate of the Sobol points of the
    /// directions, or at Sobol points of their own where the directions are no Sobol points.
    Sobol,
}
