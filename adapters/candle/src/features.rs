//! Feature maps over tensors.

use crate::element::{Element, Operand, check_device, check_dtype, refused, storage_of, tensor_of};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Storage, Tensor, bail};
use dijiang::ndarray::{Array1, Array2, ArrayView2};
use dijiang::{FeatureMap, MapGradient, Side};
use std::fmt;
use std::sync::Arc;

/// The features of queries or keys, `x [.., d]`: values `[.., m]` and their natural log scales
/// `[.., 1]`, so that `φ(x) = values·e^{log_scale}` cannot overflow. The gradient goes through the
/// values; log scales are constants of it, as [`MapGradient`] explains, so use the two together:
/// [`linear_attention_scaled`](crate::linear_attention_scaled) does. Both have the type of the map,
/// also where `x` is `F16` or `BF16`.
///
/// ```
/// use candle_core::{Device, Var};
/// use dijiang::{Performer, Side};
/// use std::sync::Arc;
///
/// let map = Arc::new(Performer::<f32>::new(16, 64, 0)?);
/// let x = Var::randn(0f32, 1., (2, 4, 100, 16), &Device::Cpu)?;
/// let (values, log_scale) = dijiang_candle::features(&map, Side::Key, &x)?;
/// assert_eq!((values.dims(), log_scale.dims()), (&[2, 4, 100, 64][..], &[2, 4, 100, 1][..]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// What the map reports; another type than that of the map; a tensor on another device.
pub fn features<T: Element, F: FeatureMap<T> + 'static>(
    map: &Arc<F>,
    side: Side,
    x: &Tensor,
) -> Result<(Tensor, Tensor)> {
    check_device("x", x)?;
    check_dtype::<T>("x", x.dtype())?;
    let Some((&columns, outer)) = x.dims().split_last() else {
        bail!(
            "`x` is a number where vectors are needed: give it the shape [.., {}]",
            map.head_dim()
        )
    };
    if columns != map.head_dim() {
        bail!("`x` has {columns} columns where {} are needed", map.head_dim());
    }
    let (rows, m) = (outer.iter().product::<usize>(), map.num_features());
    let op = MapOp { map: Arc::clone(map), side, element: std::marker::PhantomData::<T> };
    // 16 bits are too few for what enters an exponential
    let both = x.to_dtype(T::DTYPE)?.reshape((1, 1, rows, columns))?.apply_op1(op)?;
    let shape = |columns: usize| [outer, &[columns]].concat();
    let values = both.narrow(D::Minus1, 0, m)?.reshape(shape(m))?;
    let log_scale = both.narrow(D::Minus1, m, 1)?.detach().reshape(shape(1))?;
    Ok((values, log_scale))
}

/// A map whose result has its log scales as a last column.
struct MapOp<T, F> {
    map: Arc<F>,
    side: Side,
    element: std::marker::PhantomData<T>,
}

impl<T, F> fmt::Debug for MapOp<T, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MapOp").field("side", &self.side).finish_non_exhaustive()
    }
}

impl<T: Element, F: FeatureMap<T>> MapOp<T, F> {
    fn map(&self, x: ArrayView2<'_, T>) -> Result<(Array2<T>, Array1<T>)> {
        let mut values = Array2::zeros((x.nrows(), self.map.num_features()));
        let mut log_scale = Array1::zeros(x.nrows());
        let (to, scales) = (values.view_mut(), log_scale.view_mut());
        match self.side {
            Side::Query => self.map.map_queries(x, to, scales),
            Side::Key => self.map.map_keys(x, to, scales),
        }
        .map_err(refused)?;
        Ok((values, log_scale))
    }
}

/// The rows of `[1, 1, n, d]`.
fn rows<T: Element>(operand: &Operand<'_>) -> Result<Array2<T>> {
    let [_, _, n, columns] = operand.dims()?;
    let numbers = operand.read::<T>()?.to_vec()?;
    Array2::from_shape_vec((n, columns), numbers).map_err(candle_core::Error::wrap)
}

impl<T: Element, F: FeatureMap<T>> CustomOp1 for MapOp<T, F> {
    fn name(&self) -> &'static str {
        "dijiang-features"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = rows::<T>(&Operand::new(storage, layout))?;
        let (values, log_scale) = self.map(x.view())?;
        let m = values.ncols();
        let mut both: Vec<T> = Vec::with_capacity(x.nrows() * (m + 1));
        for (values, scale) in values.outer_iter().zip(&log_scale) {
            both.extend(values.iter().chain([scale]));
        }
        let shape = Shape::from((1, 1, x.nrows(), m + 1));
        Ok((storage_of(both, storage.dtype()), shape))
    }

    fn bwd(&self, x: &Tensor, _both: &Tensor, d_both: &Tensor) -> Result<Option<Tensor>> {
        let read = |tensor: &Tensor| -> Result<Array2<T>> {
            let (storage, layout) = tensor.storage_and_layout();
            let Storage::Cpu(storage) = &*storage else { bail!("a gradient is not on the CPU") };
            rows::<T>(&Operand::new(storage, layout))
        };
        let (vectors, d_both) = (read(x)?, read(d_both)?);
        let (values, log_scale) = self.map(vectors.view())?;
        let d_values = Array2::from_shape_fn(values.dim(), |at| d_both[at]);
        let mut d_x = Array2::zeros(vectors.dim());
        self.map
            .backward(MapGradient {
                side: self.side,
                x: vectors.view(),
                values: values.view(),
                log_scale: log_scale.view(),
                d_values: d_values.view(),
                d_x: d_x.view_mut(),
                d_parameters: None,
            })
            .map_err(refused)?;
        let numbers = d_x.into_raw_vec_and_offset().0;
        tensor_of(numbers, x.dims(), x.dtype()).map(Some)
    }
}
