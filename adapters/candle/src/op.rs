//! A layer as an operation of candle that can be differentiated.

use crate::element::{self, Element, Operand, storage_of, tensor_of};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Storage, Tensor, bail};
use dijiang::ndarray::{ArrayD, IxDyn};
use dijiang::{Mask, MultiHead, Parameters, RawGradients};

/// Attention of queries, keys, and a third operand: the values, or all else behind each other.
pub(crate) struct LayerOp<T: Element> {
    pub(crate) layer: MultiHead<T>,
    pub(crate) mask: Mask,
    pub(crate) key_lengths: Option<Vec<usize>>,
    pub(crate) packed: Option<Packed>,
}

/// What lies behind each other in a flat operand: values, log decays, parameters.
#[derive(Clone)]
pub(crate) struct Packed {
    pub(crate) values: [usize; 4],
    pub(crate) log_decay: Option<[usize; 4]>,
    /// Names and shapes.
    pub(crate) parameters: Vec<(String, Vec<usize>)>,
}

fn size(dims: &[usize]) -> usize {
    dims.iter().product()
}

impl Packed {
    fn tokens(&self) -> usize {
        size(&self.values) + self.log_decay.map_or(0, |dims| size(&dims))
    }

    fn numbers(&self) -> usize {
        self.tokens() + self.parameters.iter().map(|(_, dims)| size(dims)).sum::<usize>()
    }
}

/// What went wrong in some sequences.
enum Failed {
    Core(dijiang::Error),
    Candle(candle_core::Error),
}

type Attempt = core::result::Result<(), Failed>;

impl From<candle_core::Error> for Failed {
    fn from(error: candle_core::Error) -> Self {
        Self::Candle(error)
    }
}

/// As candle's error.
fn refused(failed: Failed) -> candle_core::Error {
    match failed {
        Failed::Core(error) => element::refused(error),
        Failed::Candle(error) => error,
    }
}

/// Queries, keys, values and log decays.
#[derive(Clone)]
struct Operands<'a> {
    qkv: [Operand<'a>; 3],
    log_decay: Option<Operand<'a>>,
}

impl<'a> Operands<'a> {
    fn sequences(&self, start: usize, len: usize) -> Result<Operands<'a>> {
        let [q, k, v] = &self.qkv;
        let part = |x: &Operand<'a>| x.sequences(start, len);
        Ok(Operands {
            qkv: [part(q)?, part(k)?, part(v)?],
            log_decay: self.log_decay.as_ref().map(part).transpose()?,
        })
    }
}

/// The operands and the layouts of three.
type Three<'a> = [(&'a CpuStorage, &'a Layout); 3];

impl<T: Element> LayerOp<T> {
    fn operands<'a>(&self, [q, k, v]: Three<'a>) -> Operands<'a> {
        let [q, k] = [q, k].map(|(storage, layout)| Operand::new(storage, layout));
        let (storage, layout) = v;
        let Some(packed) = &self.packed else {
            return Operands { qkv: [q, k, Operand::new(storage, layout)], log_decay: None };
        };
        let part = |at: usize, dims: [usize; 4]| Operand::part(storage, layout, at, dims);
        let log_decay = packed.log_decay.map(|dims| part(size(&packed.values), dims));
        Operands { qkv: [q, k, part(0, packed.values)], log_decay }
    }

    /// Runs `run` with sequences that go together: all, or one after the other where they are
    /// widened, so that only one is there in two types at once.
    fn for_sequences(
        &self,
        operands: &Operands<'_>,
        mut run: impl FnMut(usize, Operands<'_>, Option<&[usize]>) -> Attempt,
    ) -> Result<()> {
        let batch = operands.qkv[0].dims()?[0];
        let others = operands.qkv.iter().chain(&operands.log_decay);
        let together = others.clone().all(|x| x.storage.dtype() == T::DTYPE)
            || others.clone().any(|x| x.layout.dims()[0] != batch)
            || self.key_lengths.as_ref().is_some_and(|lengths| lengths.len() != batch);
        if together {
            // whole, so that the core sees what does not fit together
            return run(0, operands.clone(), self.key_lengths.as_deref()).map_err(refused);
        }
        (0..batch).try_for_each(|b| {
            let lengths = self.key_lengths.as_ref().map(|lengths| &lengths[b..=b]);
            run(b, operands.sequences(b, 1)?, lengths).map_err(|error| match error {
                Failed::Core(dijiang::Error::InHead { head, error, .. }) => {
                    refused(Failed::Core(dijiang::Error::InHead { sequence: b, head, error }))
                }
                error => refused(error),
            })
        })
    }

    fn forward(&self, operands: &Operands<'_>) -> Result<(Vec<T>, [usize; 4])> {
        let [batch, heads, n, _] = operands.qkv[0].dims()?;
        let dims = [batch, heads, n, operands.qkv[2].dims()?[3]];
        let mut out = vec![T::default(); size(&dims)];
        let each = size(&dims[1..]);
        self.for_sequences(operands, |first, Operands { qkv: [q, k, v], log_decay }, lengths| {
            let count = q.dims()?[0];
            let qkv = [q.read::<T>()?, k.read()?, v.read()?];
            let log_decay = log_decay.map(|x| x.read::<T>()).transpose()?;
            let raw = [qkv[0].raw()?, qkv[1].raw()?, qkv[2].raw()?];
            let log_decay = log_decay.as_ref().map(|x| x.raw()).transpose()?;
            let out = &mut out[first * each..(first + count) * each];
            self.layer.forward_raw(raw, log_decay, self.mask, lengths, out).map_err(Failed::Core)
        })?;
        Ok((out, dims))
    }

    /// Gradients by the three operands.
    fn gradients(&self, three: Three<'_>, d_out: Operand<'_>) -> Result<[Vec<T>; 3]> {
        let operands = self.operands(three);
        let zeros = |count: usize| vec![T::default(); count];
        let [mut d_q, mut d_k] = [0, 1].map(|i| zeros(size(three[i].1.dims())));
        let mut d_rest =
            zeros(self.packed.as_ref().map_or(size(three[2].1.dims()), Packed::numbers));
        let tokens = self.packed.as_ref().map_or(d_rest.len(), Packed::tokens);
        let (d_tokens, d_numbers) = d_rest.split_at_mut(tokens);
        let (d_v, d_gates) = d_tokens.split_at_mut(size(&operands.qkv[2].dims()?));
        let names = self.packed.as_ref().map_or(&[][..], |packed| &packed.parameters);
        let zero = |(name, dims): &(String, Vec<usize>)| (name.clone(), ArrayD::zeros(IxDyn(dims)));
        let mut d_parameters: Parameters<T> = names.iter().map(zero).collect();
        self.for_sequences(&operands, |first, Operands { qkv: [q, k, v], log_decay }, lengths| {
            let part = |x: &Operand<'_>| -> Result<core::ops::Range<usize>> {
                let dims = x.dims()?;
                let each = size(&dims[1..]);
                Ok(first * each..(first + dims[0]) * each)
            };
            let at = [part(&q)?, part(&k)?, part(&v)?];
            let at_gates = log_decay.as_ref().map(part).transpose()?;
            let d_out = d_out.sequences(first, q.dims()?[0])?.read::<T>()?;
            let qkv = [q.read::<T>()?, k.read()?, v.read()?];
            let log_decay = log_decay.map(|x| x.read::<T>()).transpose()?;
            let raw = [qkv[0].raw()?, qkv[1].raw()?, qkv[2].raw()?];
            let log_decay = log_decay.as_ref().map(|x| x.raw()).transpose()?;
            let [at_q, at_k, at_v] = at;
            let gradients = RawGradients {
                d_q: &mut d_q[at_q],
                d_k: &mut d_k[at_k],
                d_v: &mut d_v[at_v],
                d_log_decay: at_gates.map(|at| &mut d_gates[at]),
                d_parameters: Some(&mut d_parameters).filter(|d| !d.is_empty()),
            };
            self.layer
                .backward_raw(raw, log_decay, self.mask, lengths, d_out.raw()?, gradients)
                .map_err(Failed::Core)
        })?;
        let mut left = d_numbers;
        for (name, dims) in names {
            let (here, rest) = left.split_at_mut(size(dims));
            left = rest;
            let found = d_parameters.get(name);
            here.iter_mut().zip(found.iter().flatten()).for_each(|(to, &x)| *to = x);
        }
        Ok([d_q, d_k, d_rest])
    }
}

impl<T: Element> CustomOp3 for LayerOp<T> {
    fn name(&self) -> &'static str {
        "dijiang-attention"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let operands = self.operands([(s1, l1), (s2, l2), (s3, l3)]);
        let (out, dims) = self.forward(&operands)?;
        Ok((storage_of(out, s1.dtype()), Shape::from(&dims[..])))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        rest: &Tensor,
        _out: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let all = [q, k, rest, d_out].map(Tensor::storage_and_layout);
        let mut found = Vec::with_capacity(4);
        for (storage, layout) in &all {
            let Storage::Cpu(storage) = &**storage else { bail!("a gradient is not on the CPU") };
            found.push((storage, *layout));
        }
        let (storage, layout) = found[3];
        let d_out = Operand::new(storage, layout);
        let [d_q, d_k, d_rest] = self.gradients([found[0], found[1], found[2]], d_out)?;
        let tensor = |numbers, of: &Tensor| tensor_of(numbers, of.dims(), of.dtype()).map(Some);
        Ok((tensor(d_q, q)?, tensor(d_k, k)?, tensor(d_rest, rest)?))
    }
}
