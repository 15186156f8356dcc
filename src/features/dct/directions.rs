//! Random directions of the DCT: `C S_b C S_0`, projected on by two fast transforms.

use crate::features::columns::{ColumnGradient, Columns};
use crate::features::dct::transform::{FastDirections, norm};
use crate::kernel;
use crate::kernel::buffer::Buffer;
use crate::kernel::loops::dct::LanesDct;
use crate::scalar::Scalar;
use crate::scalar::sealed::Dct;
use ndarray::Array1;

/// `ω_i = r_i·(row of C S_b)·(C S_0)`, with a fresh `S_b` for each block of `head_dim` directions.
#[derive(Clone, Debug)]
pub(crate) struct MixedDirections<T> {
    /// Directions; feature i lies on direction i mod `count`.
    count: usize,
    /// The diagonal of S_0.
    mixing: Vec<T>,
    /// The diagonals of S_b, block after block.
    signs: Vec<T>,
    radii: Array1<T>,
    transform: Dct<T>,
    /// The diagonal of each S_b times the norms of the first transform.
    inner: Vec<T>,
    /// Radii times the norms of the second transform.
    outer: Vec<T>,
}

impl<T: Scalar> MixedDirections<T> {
    /// `mixing [head_dim]` and `signs`, a multiple of `head_dim` for the blocks of `count`
    /// directions, hold −1 and 1.
    pub(crate) fn new(count: usize, mixing: Vec<f64>, signs: Vec<f64>, radii: Array1<T>) -> Self {
        let head_dim = mixing.len();
        let inner = (0..signs.len())
            .map(|i| T::from_f64(signs[i] * norm(i % head_dim, head_dim)))
            .collect();
        let outer = radii
            .iter()
            .enumerate()
            .map(|(i, r)| *r * T::from_f64(norm(i % count % head_dim, head_dim)))
            .collect();
        let cast = |x: Vec<f64>| x.into_iter().map(T::from_f64).collect();
        let transform = T::plan_dct(head_dim);
        Self { count, mixing: cast(mixing), signs: cast(signs), radii, transform, inner, outer }
    }
}

#[cfg(feature = "serde")]
impl<T: Scalar> MixedDirections<T> {
    /// The number of directions, the signs of `S_0` and of the `S_b`, and the radii.
    pub(crate) fn parts(&self) -> (usize, [Vec<i8>; 2], Vec<T>) {
        let signs = |x: &Vec<T>| x.iter().map(|s| if *s > T::zero() { 1 } else { -1 }).collect();
        (self.count, [&self.mixing, &self.signs].map(signs), self.radii.to_vec())
    }
}

impl<T: Scalar> FastDirections<T> for MixedDirections<T> {
    fn head_dim(&self) -> usize {
        self.mixing.len()
    }

    fn radii(&self) -> &Array1<T> {
        &self.radii
    }

    fn last_factors(&self) -> &[T] {
        &self.outer
    }

    fn scratch_len(&self) -> usize {
        2 * self.mixing.len() + self.transform.scratch_len
    }

    fn logits(&self, x: &[T], logits: &mut [T], scratch: &mut [T]) {
        let d = self.mixing.len();
        let (mixed, rest) = scratch.split_at_mut(d);
        let (block, scratch) = rest.split_at_mut(d);
        for ((y, &x), &sign) in mixed.iter_mut().zip(x).zip(&self.mixing) {
            *y = x * sign;
        }
        T::dct2(&self.transform, mixed, scratch);
        for (b, inner) in self.inner.chunks_exact(d).enumerate() {
            for ((z, &y), &factor) in block.iter_mut().zip(&*mixed).zip(inner) {
                *z = y * factor;
            }
            T::dct2(&self.transform, block, scratch);
            let (first, last) = (b * d, self.count.min(b * d + d));
            // Features on the same directions differ in their radii.
            for (logits, outer) in
                logits.chunks_exact_mut(self.count).zip(self.outer.chunks_exact(self.count))
            {
                for ((logit, &z), &factor) in
                    logits[first..last].iter_mut().zip(&*block).zip(&outer[first..last])
                {
                    *logit = z * factor;
                }
            }
        }
    }

    fn with_radii(self, radii: Array1<T>) -> Self {
        let wide = |x: Vec<T>| x.into_iter().map(T::as_f64).collect();
        Self::new(self.count, wide(self.mixing), wide(self.signs), radii)
    }

    // The transpose of a DCT-II is a DCT-III whose first number is not halved.
    fn backward_of_row(&self, a: &[T], d_x: &mut [T], scratch: &mut [T]) {
        let (d, two) = (self.mixing.len(), T::from_f64(2.0));
        let (mixed, rest) = scratch.split_at_mut(d);
        let (block, scratch) = rest.split_at_mut(d);
        mixed.fill(T::zero());
        for (b, inner) in self.inner.chunks_exact(d).enumerate() {
            let (first, last) = (b * d, self.count.min(b * d + d));
            block.fill(T::zero());
            for (a, outer) in a.chunks_exact(self.count).zip(self.outer.chunks_exact(self.count)) {
                for ((z, &a), &factor) in
                    block.iter_mut().zip(&a[first..last]).zip(&outer[first..last])
                {
                    *z += a * factor;
                }
            }
            block[0] *= two;
            T::dct3(&self.transform, block, scratch);
            for ((y, &z), &factor) in mixed.iter_mut().zip(&*block).zip(inner) {
                *y += z * factor;
            }
        }
        mixed[0] *= two;
        T::dct3(&self.transform, mixed, scratch);
        for ((d_x, &y), &sign) in d_x.iter_mut().zip(&*mixed).zip(&self.mixing) {
            *d_x = y * sign;
        }
    }

    fn backward_of_columns(
        &self,
        lanes: &LanesDct<T>,
        last_factors: &[T],
        gradient: &mut ColumnGradient<'_, T>,
        [scratch, transform]: &mut [Buffer<T>; 2],
    ) {
        let ColumnGradient { width, ref d_values, ref mut d_x, .. } = *gradient;
        let (d, size) = (self.mixing.len(), self.mixing.len() * width);
        scratch.resize(3 * size + d);
        let (mixed, rest) = scratch.split_at_mut(size);
        let (block, rest) = rest.split_at_mut(size);
        let (part, rest) = rest.split_at_mut(size);
        let twos = &mut rest[..d];
        twos.fill(T::one());
        twos[0] = T::from_f64(2.0);
        mixed.fill(T::zero());
        for (b, inner) in self.inner.chunks_exact(d).enumerate() {
            let (first, last) = (b * d, self.count.min(b * d + d));
            block.fill(T::zero());
            for (a, outer) in
                d_values.chunks_exact(self.count * width).zip(last_factors.chunks_exact(self.count))
            {
                let rows = a[first * width..last * width].chunks_exact(width);
                for ((z, a), &factor) in
                    block.chunks_exact_mut(width).zip(rows).zip(&outer[first..last])
                {
                    kernel::add_scaled(z, factor, a);
                }
            }
            lanes.dct3(block, width, twos, inner, part, transform);
            kernel::add_scaled(mixed, T::one(), part);
        }
        lanes.dct3(mixed, width, twos, &self.mixing, d_x, transform);
    }

    fn logits_of_columns(
        &self,
        lanes: &LanesDct<T>,
        last_factors: &[T],
        columns: &mut Columns<'_, T>,
        [scratch, transform]: &mut [Buffer<T>; 2],
    ) {
        let Columns { x, width, values, .. } = columns.with_features(self.radii.len());
        let d = self.mixing.len();
        scratch.resize(d * width + d);
        let (mixed, ones) = scratch.split_at_mut(d * width);
        ones.fill(T::one());
        lanes.dct2(x, width, &self.mixing, ones, mixed, transform);
        for (b, inner) in self.inner.chunks_exact(d).enumerate() {
            let (first, last) = (b * d, self.count.min(b * d + d));
            // Features on the same directions differ in their radii.
            for (values, outer) in values
                .chunks_exact_mut(self.count * width)
                .zip(last_factors.chunks_exact(self.count))
            {
                let values = &mut values[first * width..last * width];
                lanes.dct2(mixed, width, inner, &outer[first..last], values, transform);
            }
        }
    }
}

impl<T: PartialEq> PartialEq for MixedDirections<T> {
    fn eq(&self, other: &Self) -> bool {
        self.count == other.count
            && self.mixing == other.mixing
            && self.signs == other.signs
            && self.radii == other.radii
    }
}
