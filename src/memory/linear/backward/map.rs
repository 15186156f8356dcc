//! From gradients by features to those by queries or keys.

use crate::check;
use crate::error::Error;
use crate::features::FeatureMap;
use crate::features::columns::ColumnGradient;
use crate::features::exponential::exponential_rows;
use crate::features::gradient::MapGradient;
use crate::features::side::Side;
use crate::features::sums::ProjectionSums;
use crate::kernel;
use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::gradients::add_exponential_rows;
use crate::memory::linear::backward::rows::{add_rows, scaled_rows};
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use crate::views;
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2};

/// What a map has made of some rows, and the gradients by it: arrays of features are
/// `[num_features, width]`, zero beyond the rows in `d_values`, which may be changed.
#[derive(Debug)]
pub(super) struct Mapped<'a, T> {
    pub(super) side: Side,
    /// The rows, not scaled yet.
    pub(super) x: ArrayView2<'a, T>,
    pub(super) width: usize,
    pub(super) values: &'a [T],
    pub(super) log_scale: &'a [T],
    pub(super) d_values: &'a mut [T],
}

/// Memory for that, with the sums of what the parameters get.
#[derive(Debug)]
pub(super) struct MapBuffers<T> {
    x: Buffer<T>,
    squares: Buffer<T>,
    d_x: Buffer<T>,
    rows: Buffer<T>,
    factors: Buffer<T>,
    scratch: [Buffer<T>; 2],
    /// Of queries and of keys; for maps that take tokens as rows, the gradients themselves.
    pub(super) sums: [ProjectionSums<T>; 2],
    pub(super) parameters: Option<Parameters<T>>,
}

impl<T: Scalar> MapBuffers<T> {
    pub(super) fn new() -> Self {
        Self {
            x: Buffer::new(),
            squares: Buffer::new(),
            d_x: Buffer::new(),
            rows: Buffer::new(),
            factors: Buffer::new(),
            scratch: [Buffer::new(), Buffer::new()],
            sums: [ProjectionSums::new(), ProjectionSums::new()],
            parameters: None,
        }
    }

    /// Begins with no sums, for parameters of these names, if any are asked for.
    pub(super) fn begin(&mut self, map: &dyn FeatureMap<T>, parameters: Option<Parameters<T>>) {
        self.parameters = parameters;
        for (sums, side) in self.sums.iter_mut().zip([Side::Query, Side::Key]) {
            let logits = match (map.column_map(side), &self.parameters) {
                (Some(map), Some(_)) => map.projected(),
                _ => 0,
            };
            sums.reset(logits, map.head_dim());
        }
    }

    /// Ends the sums: the gradients by the parameters of the map.
    pub(super) fn end(&mut self, map: &dyn FeatureMap<T>) -> Option<Parameters<T>> {
        let mut parameters = self.parameters.take()?;
        map.add_parameters(self.sums.each_ref(), &mut parameters);
        Some(parameters)
    }

    /// Adds the gradients by the rows of `x`, of a map that gets `root·x`; returns whether all
    /// numbers are known to be finite.
    pub(super) fn add(
        &mut self,
        (map, root): (&dyn FeatureMap<T>, T),
        mapped: Mapped<'_, T>,
        d_x: ArrayViewMut2<'_, T>,
    ) -> Result<bool, Error> {
        let Some(columns) = map.column_map(mapped.side) else {
            self.add_by_rows(map, root, mapped, d_x)?;
            return Ok(false);
        };
        if let Some(omega) = columns.omega() {
            return Ok(self.add_exponential(omega, root, mapped, d_x));
        }
        let Mapped { side, x, width, values, d_values, .. } = mapped;
        let (tokens, head_dim) = x.dim();
        self.x.resize(head_dim * width);
        self.squares.resize(width);
        self.d_x.resize(head_dim * width);
        views::to_columns(x, root, &mut self.squares, &mut self.x);
        let mut gradient =
            ColumnGradient { x: &self.x, width, tokens, values, d_values, d_x: &mut self.d_x };
        let own = &mut self.sums[usize::from(side == Side::Key)];
        let own = self.parameters.is_some().then_some(own);
        columns.backward_columns(side, &mut gradient, own, &mut self.scratch);
        let stride = padded::<T>(head_dim);
        self.rows.resize(width * stride);
        self.squares.resize(stride);
        let row = |p: usize| &self.d_x[p * width..(p + 1) * width];
        kernel::transpose(head_dim, &row, root, &mut self.squares, &mut self.rows);
        Ok(add_rows(&self.rows, T::one(), d_x))
    }

    /// The same through an exponential map, `dx_t = root·(Σ_i a_it ω_i − (Σ_i a_it)·root·x_t)`.
    fn add_exponential(
        &mut self,
        omega: &[T],
        root: T,
        Mapped { side, x, width, values, d_values, .. }: Mapped<'_, T>,
        mut d_x: ArrayViewMut2<'_, T>,
    ) -> bool {
        let ((tokens, head_dim), stride) = (x.dim(), padded::<T>(x.ncols()));
        self.squares.resize(width);
        kernel::multiply_and_sum_columns(d_values, values, &mut self.squares);
        self.rows.resize(tokens * stride);
        let sizes = [tokens, values.len() / width, head_dim];
        exponential_rows(omega, sizes, d_values, &mut self.rows);
        let mut is_finite = false;
        if let (Some(sum), Some(x)) = (d_x.as_slice_mut(), x.to_slice()) {
            is_finite = add_exponential_rows(&self.rows, x, &self.squares, root, head_dim, sum);
        } else {
            let rows = self.rows.chunks_exact(stride).zip(&*self.squares);
            for ((mut sum, x), (row, &total)) in d_x.outer_iter_mut().zip(x.outer_iter()).zip(rows)
            {
                for ((sum, &x), &row) in sum.iter_mut().zip(x).zip(row) {
                    *sum += root * (row - total * root * x);
                }
            }
        }
        if self.parameters.is_some() {
            self.factors.resize(tokens);
            self.factors.fill(root);
            scaled_rows(x, &self.factors, &mut self.rows);
            let own = &mut self.sums[usize::from(side == Side::Key)];
            own.add_rows(&self.rows, [tokens, width], d_values);
        }
        is_finite
    }

    /// The same through a map that takes tokens as rows.
    fn add_by_rows(
        &mut self,
        map: &dyn FeatureMap<T>,
        root: T,
        mapped: Mapped<'_, T>,
        mut d_x: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        let Mapped { side, x, width, values, log_scale, d_values } = mapped;
        let (tokens, features) = (x.nrows(), map.num_features());
        let as_rows = |columns: &[T]| {
            Array2::from_shape_fn((tokens, features), |(t, i)| columns[i * width + t])
        };
        let d_values = as_rows(d_values);
        check::gradient("the gradient by a feature", d_values.view())?;
        let mut own = Array2::zeros(x.dim());
        map.backward(MapGradient {
            side,
            x: x.mapv(|x| x * root).view(),
            values: as_rows(values).view(),
            log_scale: Array1::from(log_scale[..tokens].to_vec()).view(),
            d_values: d_values.view(),
            d_x: own.view_mut(),
            d_parameters: self.parameters.as_mut(),
        })?;
        d_x.zip_mut_with(&own, |sum, &x| *sum += root * x);
        Ok(())
    }
}
