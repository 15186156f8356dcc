//! A layer on the tensors of the Flex backend, as they lie in memory.

use crate::real::Real;
use burn::backend::Flex;
use burn::backend::tensor::FloatTensor;
use burn::tensor::TensorData;
use dijiang::ndarray::{Array2, ArrayD, ArrayView4, ArrayViewMut4};
use dijiang::{
    Error, LayerForward, LayerGradient, LayerRecord, Mask, MultiHead, Parameters, RawTensor,
};

/// A tensor of the backend.
pub(crate) type Primitive = FloatTensor<Flex>;

/// What a layer is called with beside numbers.
#[derive(Clone, Debug)]
pub(crate) struct Call<T: Real> {
    pub(crate) layer: MultiHead<T>,
    pub(crate) mask: Mask,
    pub(crate) key_lengths: Option<Vec<usize>>,
    /// Which tokens are real, `[batch, n_k]`.
    pub(crate) key_mask: Option<Array2<bool>>,
    /// Whether the tensor of biases is one.
    pub(crate) is_biased: bool,
    /// Whether the tensor of log decays is one.
    pub(crate) is_gated: bool,
    /// Names and shapes of the arrays that follow each other in the tensor of parameters.
    pub(crate) parameters: Vec<(String, Vec<usize>)>,
}

/// Queries, keys, values, log decays and biases of four axes, and parameters of one.
#[derive(Clone, Debug)]
pub(crate) struct Inputs {
    pub(crate) q: Primitive,
    pub(crate) k: Primitive,
    pub(crate) v: Primitive,
    pub(crate) log_decay: Primitive,
    pub(crate) bias: Primitive,
    pub(crate) parameters: Primitive,
}

/// The gradients by [`Inputs`].
#[derive(Debug)]
pub(crate) struct InputGradients {
    pub(crate) q: Primitive,
    pub(crate) k: Primitive,
    pub(crate) v: Primitive,
    pub(crate) log_decay: Option<Primitive>,
    pub(crate) bias: Option<Primitive>,
    pub(crate) parameters: Option<Primitive>,
}

impl Inputs {
    /// Copies what has an axis in the reverse order; all else is read where it lies.
    pub(crate) fn readable(self) -> Self {
        let Self { q, k, v, log_decay, bias, parameters } = self;
        let [q, k, v, log_decay, bias] = [q, k, v, log_decay, bias].map(readable);
        Self { q, k, v, log_decay, bias, parameters: parameters.to_contiguous() }
    }
}

/// Copies a tensor that has an axis in the reverse order.
pub(crate) fn readable(x: Primitive) -> Primitive {
    if x.layout().strides().iter().any(|&stride| stride < 0) { x.to_contiguous() } else { x }
}

impl<T: Real> Call<T> {
    /// The layer with the numbers of the tensor.
    pub(crate) fn trained(&self, parameters: &Primitive) -> Result<MultiHead<T>, Error> {
        if self.parameters.is_empty() {
            return Ok(self.layer.clone());
        }
        self.layer.with_parameters(&self.unpacked(contiguous(parameters)))
    }

    /// Arrays that follow each other, by name.
    fn unpacked(&self, mut numbers: &[T]) -> Parameters<T> {
        let arrays = self.parameters.iter().map(|(name, shape)| {
            let (array, rest) = numbers.split_at(size(shape));
            numbers = rest;
            let array = ArrayD::from_shape_vec(shape.clone(), array.to_vec());
            (name.clone(), array.expect("as many numbers as the shape has"))
        });
        arrays.collect()
    }

    pub(crate) fn forward(
        &self,
        layer: &MultiHead<T>,
        inputs: &Inputs,
        record: Option<&mut LayerRecord<T>>,
    ) -> Result<Primitive, Error> {
        let qkv = inputs.qkv()?;
        let ((batch, heads, rows, _), (.., columns)) = (qkv[0].dim(), qkv[2].dim());
        let mut out = vec![T::zero(); batch * heads * rows * columns];
        let forward = LayerForward {
            log_decay: self.log_decay(inputs)?,
            key_mask: self.key_mask.as_ref().map(|real| real.view()),
            bias: self.bias(inputs)?,
            record,
            ..LayerForward::new(qkv, view_mut(&mut out, (batch, heads, rows, columns)))
        };
        layer.forward_with(forward, self.mask, self.key_lengths.as_deref())?;
        Ok(primitive(out, &[batch, heads, rows, columns]))
    }

    /// The gradients, those by log decays, biases and parameters where they are asked for.
    pub(crate) fn backward(
        &self,
        layer: &MultiHead<T>,
        inputs: &Inputs,
        (record, out): (&LayerRecord<T>, &Primitive),
        d_out: Primitive,
        [by_log_decay, by_bias, by_parameters]: [bool; 3],
    ) -> Result<InputGradients, Error> {
        let qkv = inputs.qkv()?;
        let (log_decay, bias) = (self.log_decay(inputs)?, self.bias(inputs)?);
        let d_out = readable(d_out);
        let mut d_qkv = qkv.map(|x| vec![T::zero(); x.len()]);
        let zeros = |x: ArrayView4<'_, T>| vec![T::zero(); x.len()];
        let mut d_log_decay = log_decay.filter(|_| by_log_decay).map(zeros);
        let mut d_bias = bias.filter(|_| by_bias).map(zeros);
        let numbers: usize = self.parameters.iter().map(|(_, shape)| size(shape)).sum();
        let mut d_parameters = by_parameters.then(|| self.unpacked(&vec![T::zero(); numbers]));
        let [d_q, d_k, d_v] = &mut d_qkv;
        let views =
            [view_mut(d_q, qkv[0].dim()), view_mut(d_k, qkv[1].dim()), view_mut(d_v, qkv[2].dim())];
        let gradient = LayerGradient {
            log_decay,
            key_mask: self.key_mask.as_ref().map(|real| real.view()),
            bias,
            record: Some((record, raw(out)?.view())),
            d_log_decay: d_log_decay.as_mut().zip(log_decay).map(|(d, x)| view_mut(d, x.dim())),
            d_bias: d_bias.as_mut().zip(bias).map(|(d, x)| view_mut(d, x.dim())),
            d_parameters: d_parameters.as_mut(),
            ..LayerGradient::new(qkv, raw(&d_out)?.view(), views)
        };
        layer.backward_into(gradient, self.mask, self.key_lengths.as_deref())?;
        let d_parameters = d_parameters.map(|found| {
            let arrays = self.parameters.iter().filter_map(|(name, _)| found.get(name));
            let mut packed = Vec::with_capacity(numbers);
            arrays.for_each(|array| packed.extend(array.iter().copied()));
            primitive(packed, &[numbers])
        });
        let of = |d: Vec<T>, x: ArrayView4<'_, T>| primitive(d, x.shape());
        let [d_q, d_k, d_v] = d_qkv;
        Ok(InputGradients {
            q: of(d_q, qkv[0]),
            k: of(d_k, qkv[1]),
            v: of(d_v, qkv[2]),
            log_decay: d_log_decay.zip(log_decay).map(|(d, x)| of(d, x)),
            bias: d_bias.zip(bias).map(|(d, x)| of(d, x)),
            parameters: d_parameters,
        })
    }

    fn log_decay<'a>(&self, inputs: &'a Inputs) -> Result<Option<ArrayView4<'a, T>>, Error> {
        self.is_gated.then(|| Ok(raw(&inputs.log_decay)?.view())).transpose()
    }

    fn bias<'a>(&self, inputs: &'a Inputs) -> Result<Option<ArrayView4<'a, T>>, Error> {
        self.is_biased.then(|| Ok(raw(&inputs.bias)?.view())).transpose()
    }
}

impl Inputs {
    fn qkv<T: Real>(&self) -> Result<[ArrayView4<'_, T>; 3], Error> {
        Ok([raw(&self.q)?.view(), raw(&self.k)?.view(), raw(&self.v)?.view()])
    }
}

/// Contiguous numbers to write to.
pub(crate) fn view_mut<T>(
    numbers: &mut [T],
    dim: (usize, usize, usize, usize),
) -> ArrayViewMut4<'_, T> {
    ArrayViewMut4::from_shape(dim, numbers).expect("as many numbers as the shape has")
}

fn size(shape: &[usize]) -> usize {
    shape.iter().product()
}

/// A tensor of four axes without one in the reverse order, where it lies.
pub(crate) fn raw<T: Real>(x: &Primitive) -> Result<RawTensor<'_, T>, Error> {
    let layout = x.layout();
    let axes = |of: &dyn Fn(usize) -> usize| [0, 1, 2, 3].map(of);
    let shape = axes(&|axis| layout.shape()[axis]);
    let strides = axes(&|axis| layout.strides()[axis].unsigned_abs());
    RawTensor::new(&T::numbers(x)[layout.start_offset()..], shape, strides)
}

/// The numbers of a tensor that is contiguous.
fn contiguous<T: Real>(x: &Primitive) -> &[T] {
    let start = x.layout().start_offset();
    &T::numbers(x)[start..start + x.layout().num_elements()]
}

/// A tensor that takes the numbers over.
pub(crate) fn primitive<T: Real>(numbers: Vec<T>, shape: &[usize]) -> Primitive {
    Primitive::from_data(TensorData::new(numbers, shape.to_vec()))
}
