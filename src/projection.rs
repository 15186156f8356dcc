//! Directions and radii: what seeded maps are made of.
//!
//! Random numbers come from ChaCha8 (Bernstein 2008) seeded by `seed_from_u64`, uniform numbers are
//! `(n + ½)·2⁻⁵³` with the upper 53 bits `n` of an output, and every other distribution is the
//! quantile of a uniform number, computed with `libm`. So a seed gives the same map on every
//! machine; a release that changed it would be a breaking one.
//!
//! # Sobol points
//!
//! Owen-scrambled Sobol points come from `sobol_burley`, whose tables have 256 dimensions and 65
//! 536 points. Beyond them: dimension `j` is dimension `j mod 256` under scramble `j / 256`, point
//! `i` is point `i mod 65 536` under a further scramble `i / 65 536`. Each such part is a Sobol net
//! in itself, independent of the others. Its numbers carry 24 bits; half a step is added, so that
//! none is zero.

mod quantile;

use crate::check;
use crate::error::Error;
use crate::kernel;
use ndarray::{Array2, ArrayView1, ArrayViewMut1};
use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};

/// The quantile of the standard normal distribution: the x with Φ(x) = t, for 0 < t < 1.
///
/// Wichura's algorithm AS 241 (Applied Statistics 37, 1988), routine PPND16: relative error about
/// 1e-16.
///
/// ```
/// let x = dijiang::projection::normal_quantile(0.975)?;
/// assert!((x - 1.959963984540054).abs() < 1e-15);
/// # Ok::<(), dijiang::Error>(())
/// ```
///
/// # Errors
///
/// [`Error::InvalidOption`] unless 0 < t < 1.
pub fn normal_quantile(t: f64) -> Result<f64, Error> {
    check_probability(t)?;
    Ok(quantile::normal(t))
}

/// The quantile of the chi distribution with `degrees` degrees of freedom, the law of the length of
/// a standard normal vector: the x with `P(degrees/2, x²/2) = t`, for 0 < t < 1, P being the
/// regularised lower incomplete gamma function.
///
/// ```
/// let x = dijiang::projection::chi_quantile(2, 0.5)?;
/// assert!((x - (2.0 * 2f64.ln()).sqrt()).abs() < 1e-15); // closed form for two degrees
///     
/// # Ok::<(), dijiang::Error>(())
/// ```
///
/// # Errors
///
/// [`Error::ZeroSize`] if `degrees` is 0, [`Error::InvalidOption`] unless 0 < t < 1.
pub fn chi_quantile(degrees: usize, t: f64) -> Result<f64, Error> {
    check::at_least_one("degrees", degrees)?;
    check_probability(t)?;
    #[allow(clippy::cast_precision_loss)]
    let shape = degrees as f64 / 2.0;
    Ok((2.0 * quantile::gamma(shape, t)).sqrt())
}

fn check_probability(t: f64) -> Result<(), Error> {
    if t > 0.0 && t < 1.0 {
        Ok(())
    } else {
        Err(Error::InvalidOption {
            which: "t",
            found: t.to_string(),
            needed: "strictly between 0 and 1",
        })
    }
}

/// The named generator behind every seed.
pub(crate) struct Generator(ChaCha8Rng);

impl Generator {
    pub(crate) fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Uniform in (0, 1).
    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn uniform(&mut self) -> f64 {
        ((self.0.next_u64() >> 11) as f64 + 0.5) * (0.5_f64).powi(53)
    }

    /// Standard normal.
    pub(crate) fn normal(&mut self) -> f64 {
        quantile::normal(self.uniform())
    }

    /// −1 or 1.
    pub(crate) fn sign(&mut self) -> f64 {
        if self.0.next_u64() >> 63 == 0 { 1.0 } else { -1.0 }
    }

    /// A number below `count`.
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub(crate) fn index(&mut self, count: usize) -> usize {
        ((self.uniform() * count as f64) as usize).min(count.saturating_sub(1))
    }

    /// Fisher–Yates.
    #[allow(clippy::cast_possible_truncation)]
    pub(crate) fn shuffle(&mut self, x: &mut [f64]) {
        for i in (1..x.len()).rev() {
            let below = u128::from(self.0.next_u64()) * (i as u128 + 1);
            x.swap(i, (below >> 64) as usize);
        }
    }
}

/// `[num_features, head_dim]` independent standard normal numbers.
pub(crate) fn gaussian(
    head_dim: usize,
    num_features: usize,
    seed: u64,
) -> Result<Array2<f64>, Error> {
    check::features(head_dim, num_features)?;
    let mut generator = Generator::new(seed);
    Ok(Array2::from_shape_simple_fn((num_features, head_dim), || generator.normal()))
}

/// Orthogonal directions with independent chi lengths: each row is N(0, I), rows of a block are
/// orthogonal.
pub(crate) fn orthogonal_gaussian(
    head_dim: usize,
    num_features: usize,
    seed: u64,
) -> Result<Array2<f64>, Error> {
    check::features(head_dim, num_features)?;
    let mut generator = Generator::new(seed);
    let mut projection = orthogonal_directions(head_dim, num_features, &mut generator);
    for mut row in projection.outer_iter_mut() {
        let length = chi_quantile(head_dim, generator.uniform())?;
        row.mapv_inplace(|x| x * length);
    }
    Ok(projection)
}

/// Unit vectors in blocks of `head_dim` orthogonal ones, each block Haar distributed: Gram–Schmidt
/// of normal vectors, done twice for orthogonality to the last digit.
pub(crate) fn orthogonal_directions(
    head_dim: usize,
    num_features: usize,
    generator: &mut Generator,
) -> Array2<f64> {
    let mut directions = Array2::zeros((num_features, head_dim));
    for block in 0..num_features.div_ceil(head_dim) {
        let first = block * head_dim;
        for i in first..num_features.min(first + head_dim) {
            let (before, mut rest) = directions.view_mut().split_at(ndarray::Axis(0), i);
            let mut row = rest.row_mut(0);
            row.iter_mut().for_each(|x| *x = generator.normal());
            for _ in 0..2 {
                for j in first..i {
                    let other = before.row(j);
                    let along = dot(row.view(), other);
                    row.scaled_add(-along, &other);
                }
                normalize(&mut row);
            }
        }
    }
    directions
}

/// The crate's own sum, in a fixed order: the same on every machine, whatever `ndarray` links to.
fn dot(a: ArrayView1<'_, f64>, b: ArrayView1<'_, f64>) -> f64 {
    kernel::dot(a.to_slice().unwrap_or_default(), b.to_slice().unwrap_or_default())
}

fn normalize(row: &mut ArrayViewMut1<'_, f64>) {
    let length = dot(row.view(), row.view()).sqrt();
    row.mapv_inplace(|x| x / length);
}

/// One Owen-scrambled Sobol sequence.
pub(crate) struct Sobol {
    seed: u32,
}

impl Sobol {
    #[allow(clippy::cast_possible_truncation)]
    pub(crate) fn new(generator: &mut Generator) -> Self {
        Self { seed: generator.0.next_u64() as u32 }
    }

    /// Coordinate `dimension` of point `index`, in (0, 1).
    #[allow(clippy::cast_possible_truncation)]
    pub(crate) fn point(&self, index: usize, dimension: usize) -> f64 {
        const POINTS: usize = 1 << 16;
        const DIMENSIONS: usize = sobol_burley::NUM_DIMENSIONS as usize;
        // The multipliers are odd, so different parts get different seeds.
        let part = ((index / POINTS) as u32)
            .wrapping_mul(0x9E37_79B1)
            .wrapping_add(((dimension / DIMENSIONS) as u32).wrapping_mul(0x85EB_CA6B));
        let x = sobol_burley::sample(
            (index % POINTS) as u32,
            (dimension % DIMENSIONS) as u32,
            self.seed.wrapping_add(part),
        );
        f64::from(x) + (0.5_f64).powi(25)
    }
}

/// Sobol points sent to the sphere: normal quantiles, normalised.
pub(crate) fn sobol_directions(head_dim: usize, num_features: usize, sobol: &Sobol) -> Array2<f64> {
    let mut directions = Array2::from_shape_fn((num_features, head_dim), |(i, j)| {
        quantile::normal(sobol.point(i, j))
    });
    for mut row in directions.outer_iter_mut() {
        normalize(&mut row);
    }
    directions
}

/// `chi_d^{-1}((i + ½)/m)` in random order.
pub(crate) fn stratified_chi(
    head_dim: usize,
    num_features: usize,
    generator: &mut Generator,
) -> Result<Vec<f64>, Error> {
    stratified(num_features, generator, |t| chi_quantile(head_dim, t))
}

/// `Φ^{-1}((i + ½)/m)` in random order.
pub(crate) fn stratified_normal(
    num_features: usize,
    generator: &mut Generator,
) -> Result<Vec<f64>, Error> {
    stratified(num_features, generator, normal_quantile)
}

#[allow(clippy::cast_precision_loss)]
fn stratified(
    count: usize,
    generator: &mut Generator,
    quantile: impl Fn(f64) -> Result<f64, Error>,
) -> Result<Vec<f64>, Error> {
    let mut x = (0..count)
        .map(|i| quantile((i as f64 + 0.5) / count as f64))
        .collect::<Result<Vec<_>, _>>()?;
    generator.shuffle(&mut x);
    Ok(x)
}
