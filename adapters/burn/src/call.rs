//! A layer on the tensors of the Flex backend, as they lie in memory.

use crate::real::Real;
use burn::backend::Flex;
use burn::backend::tensor::FloatTensor;
use burn::tensor::TensorData;
use dijiang::ndarray::ArrayD;
use dijiang::{Error, Mask, MultiHead, Parameters, RawGradients, RawTensor};

/// A tensor of the backend.
pub(crate) type Primitive = FloatTensor<Flex>;

/// What a layer is called with beside numbers.
#[derive(Clone, Debug)]
pub(crate) struct Call<T: Real> {
    pub(crate) layer: MultiHead<T>,
    pub(crate) mask: Mask,
    pub(crate) key_lengths: Option<Vec<usize>>,
    /// Whether the tensor of log decays is one.
    pub(crate) is_gated: bool,
    /// Names and shapes of the arrays that follow each other in the tensor of parameters.
    pub(crate) parameters: Vec<(String, Vec<usize>)>,
}

/// Queries, keys, values and log decays of four axes, and parameters of one.
#[derive(Clone, Debug)]
pub(crate) struct Inputs {
    pub(crate) q: Primitive,
    pub(crate) k: Primitive,
    pub(crate) v: Primitive,
    pub(crate) log_decay: Primitive,
    pub(crate) parameters: Primitive,
}

/// The gradients by [`Inputs`].
#[derive(Debug)]
pub(crate) struct InputGradients {
    pub(crate) q: Primitive,
    pub(crate) k: Primitive,
    pub(crate) v: Primitive,
    pub(crate) log_decay: Option<Primitive>,
    pub(crate) parameters: Option<Primitive>,
}

impl Inputs {
    /// Copies what has an axis in the reverse order; all else is read where it lies.
    pub(crate) fn readable(self) -> Self {
        let Self { q, k, v, log_decay, parameters } = self;
        let [q, k, v] = [q, k, v].map(readable);
        let parameters = parameters.to_contiguous();
        Self { q, k, v, log_decay: readable(log_decay), parameters }
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
    ) -> Result<Primitive, Error> {
        let [q, k, v] = [&inputs.q, &inputs.k, &inputs.v].map(raw);
        let (qkv, log_decay) = ([q?, k?, v?], self.log_decay(inputs)?);
        let [batch, heads, rows, _] = qkv[0].shape();
        let shape = [batch, heads, rows, qkv[2].shape()[3]];
        let mut out = vec![T::zero(); shape.iter().product()];
        let lengths = self.key_lengths.as_deref();
        layer.forward_raw(qkv, log_decay, self.mask, lengths, &mut out)?;
        Ok(primitive(out, &shape))
    }

    /// The gradients, those by log decays and parameters where they are asked for.
    pub(crate) fn backward(
        &self,
        layer: &MultiHead<T>,
        inputs: &Inputs,
        d_out: Primitive,
        [by_log_decay, by_parameters]: [bool; 2],
    ) -> Result<InputGradients, Error> {
        let [q, k, v] = [&inputs.q, &inputs.k, &inputs.v].map(raw);
        let (qkv, log_decay) = ([q?, k?, v?], self.log_decay(inputs)?);
        let d_out = readable(d_out);
        let zeros = |shape: [usize; 4]| vec![T::zero(); shape.iter().product()];
        let [mut d_q, mut d_k, mut d_v] = qkv.map(|x| zeros(x.shape()));
        let mut d_log_decay = log_decay.filter(|_| by_log_decay).map(|x| zeros(x.shape()));
        let numbers: usize = self.parameters.iter().map(|(_, shape)| size(shape)).sum();
        let mut d_parameters = by_parameters.then(|| self.unpacked(&vec![T::zero(); numbers]));
        let gradients = RawGradients {
            d_q: &mut d_q,
            d_k: &mut d_k,
            d_v: &mut d_v,
            d_log_decay: d_log_decay.as_deref_mut(),
            d_parameters: d_parameters.as_mut(),
        };
        let lengths = self.key_lengths.as_deref();
        layer.backward_raw(qkv, log_decay, self.mask, lengths, raw(&d_out)?, gradients)?;
        let d_parameters = d_parameters.map(|found| {
            let arrays = self.parameters.iter().filter_map(|(name, _)| found.get(name));
            let mut packed = Vec::with_capacity(numbers);
            arrays.for_each(|array| packed.extend(array.iter().copied()));
            primitive(packed, &[numbers])
        });
        let [q, k, v] =
            [(d_q, qkv[0]), (d_k, qkv[1]), (d_v, qkv[2])].map(|(d, x)| primitive(d, &x.shape()));
        let log_decay =
            d_log_decay.zip(log_decay).map(|(d, log_decay)| primitive(d, &log_decay.shape()));
        Ok(InputGradients { q, k, v, log_decay, parameters: d_parameters })
    }

    fn log_decay<'a>(&self, inputs: &'a Inputs) -> Result<Option<RawTensor<'a, T>>, Error> {
        self.is_gated.then(|| raw(&inputs.log_decay)).transpose()
    }
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
