//! The numbers of kernels as parameters of a module.

use crate::parameters::TensorParameters;
use crate::real::Real;
use burn::module::{
    Content, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor, Param,
};
use burn::tensor::Device;
use burn::tensor::Tensor;
use dijiang::{Error, MultiHead};

/// The numbers of a layer's kernels as parameters of a module, by the names of
/// [`MultiHead::parameters`]: in a record, `….heads.0.map.weights`.
///
/// ```
/// use burn::module::Module;
/// use burn::tensor::Device;
/// use dijiang_burn::KernelParameters;
/// use dijiang_burn::dijiang::{LinearAttention, MultiHead, Performer};
///
/// let layer = MultiHead::new(LinearAttention::new(Performer::<f32>::new(8, 16, 0)?), 4, 2)?;
/// let parameters = KernelParameters::new(&layer, &Device::flex())?;
/// assert_eq!(parameters.num_params(), 16 * 8 + 16);
/// # Ok::<(), dijiang_burn::dijiang::Error>(())
/// ```
///
/// The `weights` of a map may not be negative. They are used by their absolute value, so that an
/// optimizer may step past zero.
#[derive(Clone, Debug, Default)]
pub struct KernelParameters {
    arrays: Vec<(String, Array)>,
}

#[derive(Clone, Debug)]
enum Array {
    Vector(Param<Tensor<1>>),
    Matrix(Param<Tensor<2>>),
}

impl KernelParameters {
    /// The parameters of a layer, with the numbers that it has.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] if an array has other than one or two axes; those of this version of
    /// dijiang have not.
    pub fn new<T: Real>(layer: &MultiHead<T>, device: &Device) -> Result<Self, Error> {
        let tensors = TensorParameters::of(layer, device);
        let array = |name: &str| {
            let vector = tensors.get(name).map(|x| Array::Vector(Param::from_tensor(x)));
            let matrix = || tensors.get(name).map(|x| Array::Matrix(Param::from_tensor(x)));
            vector.or_else(matrix).ok_or_else(|| Error::Parameter {
                name: name.to_owned(),
                found: "an array of other axes".to_owned(),
                needed: "a vector or a matrix".to_owned(),
            })
        };
        let arrays = tensors.names().map(|name| Ok((name.to_owned(), array(name)?)));
        Ok(Self { arrays: arrays.collect::<Result<_, Error>>()? })
    }

    /// The tensors: what [`attention_with`](crate::attention_with) is called with.
    #[must_use]
    pub fn tensors(&self) -> TensorParameters {
        self.arrays.iter().fold(TensorParameters::new(), |all, (name, array)| match array {
            Array::Vector(x) if name.ends_with(".map.weights") => all.with(name, x.val().abs()),
            Array::Vector(x) => all.with(name, x.val()),
            Array::Matrix(x) => all.with(name, x.val()),
        })
    }

    /// The same without the arrays whose names end in this: they are constants of the kernels then.
    #[must_use]
    pub fn without(mut self, ending: &str) -> Self {
        self.arrays.retain(|(name, _)| !name.ends_with(ending));
        self
    }

    /// Maps every array.
    fn each(self, mut change: impl FnMut(&str, Array) -> Array) -> Self {
        let arrays = self.arrays.into_iter();
        let arrays = arrays.map(|(name, array)| {
            let array = change(&name, array);
            (name, array)
        });
        Self { arrays: arrays.collect() }
    }
}

/// The same for an array of any number of axes.
macro_rules! of_array {
    ($array:expr, $x:ident => $made:expr) => {
        match $array {
            Array::Vector($x) => Array::Vector($made),
            Array::Matrix($x) => Array::Matrix($made),
        }
    };
}

/// How visitors know what is no field of a struct.
const CONTAINER: &str = "Struct:KernelParameters";

impl Module for KernelParameters {
    fn collect_devices(&self, devices: Vec<Device>) -> Vec<Device> {
        self.arrays.iter().fold(devices, |devices, (_, array)| match array {
            Array::Vector(x) => x.collect_devices(devices),
            Array::Matrix(x) => x.collect_devices(devices),
        })
    }

    fn fork(self, device: &Device) -> Self {
        self.each(|_, array| of_array!(array, x => x.fork(device)))
    }

    fn to_device(self, device: &Device) -> Self {
        self.each(|_, array| of_array!(array, x => x.to_device(device)))
    }

    fn train(self) -> Self {
        self.each(|_, array| of_array!(array, x => x.train()))
    }

    fn valid(&self) -> Self {
        self.clone().each(|_, array| of_array!(array, x => x.valid()))
    }

    fn materialize(self) -> Self {
        self.each(|_, array| of_array!(array, x => x.materialize()))
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        for (name, array) in &self.arrays {
            visitor.enter_module(name, CONTAINER);
            match array {
                Array::Vector(x) => x.visit(visitor),
                Array::Matrix(x) => x.visit(visitor),
            }
            visitor.exit_module(name, CONTAINER);
        }
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        self.each(|name, array| {
            mapper.enter_module(name, CONTAINER);
            let array = of_array!(array, x => Module::map(x, mapper));
            mapper.exit_module(name, CONTAINER);
            array
        })
    }
}

impl ModuleDisplayDefault for KernelParameters {
    fn content(&self, content: Content) -> Option<Content> {
        let all = self.arrays.iter().fold(content, |content, (name, array)| match array {
            Array::Vector(x) => content.add(name, x),
            Array::Matrix(x) => content.add(name, x),
        });
        all.optional()
    }

    fn num_params(&self) -> usize {
        Module::num_params(self)
    }
}

impl ModuleDisplay for KernelParameters {}
