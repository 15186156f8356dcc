//! A layer as an operation of candle that can be differentiated.

use crate::element::{self, Element, Numbers, Operand, storage_of, tensor_of, view_mut};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Storage, Tensor, bail};
use core::ops::Range;
use dijiang::ndarray::{Array2, ArrayD, Axis, IxDyn, Slice};
use dijiang::{LayerForward, LayerGradient, LayerRecord, Mask, MultiHead, Parameters};
use std::sync::{Mutex, PoisonError};

/// Attention of queries, keys, and a third operand: the values, or all else behind each other.
pub(crate) struct LayerOp<T: Element> {
    pub(crate) layer: MultiHead<T>,
    pub(crate) mask: Mask,
    pub(crate) key_lengths: Option<Vec<usize>>,
    /// Which tokens are real, `[batch, n_k]`.
    pub(crate) key_mask: Option<Array2<bool>>,
    pub(crate) packed: Option<Packed>,
    /// What the forward pass keeps, if there may be a backward pass: of each part of the batch.
    pub(crate) records: Option<Mutex<Vec<LayerRecord<T>>>>,
}

/// What lies behind each other in a flat operand: values, log decays, biases, parameters.
#[derive(Clone)]
pub(crate) struct Packed {
    pub(crate) values: [usize; 4],
    pub(crate) log_decay: Option<[usize; 4]>,
    pub(crate) bias: Option<[usize; 4]>,
    /// Whether log decays, and biases, have a gradient.
    pub(crate) trained: [bool; 2],
    /// Names and shapes.
    pub(crate) parameters: Vec<(String, Vec<usize>)>,
}

fn size(dims: &[usize]) -> usize {
    dims.iter().product()
}

impl Packed {
    fn tokens(&self) -> usize {
        let of = |dims: Option<[usize; 4]>| dims.map_or(0, |dims| size(&dims));
        size(&self.values) + of(self.log_decay) + of(self.bias)
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

/// Queries, keys, values, log decays and biases.
#[derive(Clone)]
struct Operands<'a> {
    qkv: [Operand<'a>; 3],
    log_decay: Option<Operand<'a>>,
    bias: Option<Operand<'a>>,
}

impl<'a> Operands<'a> {
    fn sequences(&self, start: usize, len: usize) -> Result<Operands<'a>> {
        let [q, k, v] = &self.qkv;
        let part = |x: &Operand<'a>| x.sequences(start, len);
        // one for all sequences stays
        let some = |x: &Operand<'a>| if x.dims()?[0] == 1 { Ok(x.clone()) } else { part(x) };
        Ok(Operands {
            qkv: [part(q)?, part(k)?, part(v)?],
            log_decay: self.log_decay.as_ref().map(part).transpose()?,
            bias: self.bias.as_ref().map(some).transpose()?,
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
            let qkv = [q, k, Operand::new(storage, layout)];
            return Operands { qkv, log_decay: None, bias: None };
        };
        let part = |at: usize, dims: [usize; 4]| Operand::part(storage, layout, at, dims);
        let log_decay = packed.log_decay.map(|dims| part(size(&packed.values), dims));
        let bias = packed.bias.map(|dims| part(packed.tokens() - size(&dims), dims));
        Operands { qkv: [q, k, part(0, packed.values)], log_decay, bias }
    }

    /// Runs `run` with sequences that go together, with which they are: all, or one after the other
    /// where they are widened, so that only one is there in two types at once.
    fn for_sequences(
        &self,
        operands: &Operands<'_>,
        mut run: impl FnMut(Range<usize>, Part<'_, T>) -> Attempt,
    ) -> Result<()> {
        let batch = operands.qkv[0].dims()?[0];
        let fits = |x: &Operand<'_>| x.layout.dims()[0] == batch;
        let is_whole = operands.qkv.iter().chain(&operands.log_decay).all(fits)
            && operands.bias.as_ref().is_none_or(|x| x.layout.dims()[0] == 1 || fits(x))
            && self.key_lengths.as_ref().is_none_or(|lengths| lengths.len() == batch)
            && self.key_mask.as_ref().is_none_or(|real| real.nrows() == batch);
        // whole as well where it does not fit, so that the core says what
        if !is_whole || operands.qkv.iter().all(|x| x.storage.dtype() == T::DTYPE) {
            let part = self.part(operands, None)?;
            return run(0..batch, part).map_err(refused);
        }
        (0..batch).try_for_each(|b| {
            let part = self.part(&operands.sequences(b, 1)?, Some(b))?;
            run(b..b + 1, part).map_err(|error| match error {
                Failed::Core(dijiang::Error::InHead { head, error, .. }) => {
                    refused(Failed::Core(dijiang::Error::InHead { sequence: b, head, error }))
                }
                error => refused(error),
            })
        })
    }

    /// The numbers of all sequences, or of one.
    fn part<'a>(&'a self, operands: &Operands<'a>, one: Option<usize>) -> Result<Part<'a, T>> {
        let Operands { qkv: [q, k, v], log_decay, bias } = operands;
        let read = |x: &Option<Operand<'a>>| x.as_ref().map(Operand::read).transpose();
        Ok(Part {
            qkv: [q.read()?, k.read()?, v.read()?],
            log_decay: read(log_decay)?,
            bias: read(bias)?,
            lengths: match (&self.key_lengths, one) {
                (Some(lengths), Some(b)) => Some(&lengths[b..=b]),
                (lengths, _) => lengths.as_deref(),
            },
            key_mask: self.key_mask.as_ref().map(|real| match one {
                Some(b) => real.slice_axis(Axis(0), Slice::from(b..=b)).to_owned(),
                None => real.clone(),
            }),
        })
    }

    fn forward(&self, operands: &Operands<'_>) -> Result<(Vec<T>, [usize; 4])> {
        let [batch, heads, n, _] = operands.qkv[0].dims()?;
        let dims = [batch, heads, n, operands.qkv[2].dims()?[3]];
        let mut out = vec![T::default(); size(&dims)];
        let each = size(&dims[1..]);
        let mut records = Vec::new();
        self.for_sequences(operands, |at, part| {
            let dims = [at.len(), heads, n, dims[3]];
            let out = view_mut(&mut out[at.start * each..at.end * each], dims)?;
            let [q, k, v] = &part.qkv;
            let forward = LayerForward {
                log_decay: part.log_decay.as_ref().map(Numbers::view).transpose()?,
                bias: part.bias.as_ref().map(Numbers::view).transpose()?,
                key_mask: part.key_mask.as_ref().map(|real| real.view()),
                ..LayerForward::new([q.view()?, k.view()?, v.view()?], out)
            };
            let mut record = LayerRecord::new();
            let record_here = self.records.is_some().then_some(&mut record);
            let forward = LayerForward { record: record_here, ..forward };
            self.layer.forward_with(forward, self.mask, part.lengths).map_err(Failed::Core)?;
            records.push(record);
            Ok(())
        })?;
        if let Some(kept) = &self.records {
            *kept.lock().unwrap_or_else(PoisonError::into_inner) = records;
        }
        Ok((out, dims))
    }

    /// Gradients by the three operands.
    fn gradients(&self, three: Three<'_>, [out, d_out]: [Operand<'_>; 2]) -> Result<[Vec<T>; 3]> {
        let operands = self.operands(three);
        let zeros = |count: usize| vec![T::default(); count];
        let [mut d_q, mut d_k] = [0, 1].map(|i| zeros(size(three[i].1.dims())));
        let mut d_rest =
            zeros(self.packed.as_ref().map_or(size(three[2].1.dims()), Packed::numbers));
        let tokens = self.packed.as_ref().map_or(d_rest.len(), Packed::tokens);
        let (d_tokens, d_numbers) = d_rest.split_at_mut(tokens);
        let (d_v, d_more) = d_tokens.split_at_mut(size(&operands.qkv[2].dims()?));
        let gates = operands.log_decay.as_ref().map_or(Ok(0), |x| x.dims().map(|x| size(&x)))?;
        let (d_gates, d_bias) = d_more.split_at_mut(gates);
        let names = self.packed.as_ref().map_or(&[][..], |packed| &packed.parameters);
        let zero = |(name, dims): &(String, Vec<usize>)| (name.clone(), ArrayD::zeros(IxDyn(dims)));
        let mut d_parameters: Parameters<T> = names.iter().map(zero).collect();
        let [trains_log_decay, trains_bias] =
            self.packed.as_ref().map_or([false; 2], |packed| packed.trained);
        let is_shared = operands.bias.as_ref().is_some_and(|x| x.layout.dims()[0] == 1);
        let records = self.records.as_ref();
        let records = records.map(|x| x.lock().unwrap_or_else(PoisonError::into_inner));
        let mut records = records.iter().flat_map(|records| records.iter());
        self.for_sequences(&operands, |at, part| {
            let outputs = out.sequences(at.start, at.len())?.read::<T>()?;
            let d_outputs = d_out.sequences(at.start, at.len())?.read::<T>()?;
            let [q, k, v] = &part.qkv;
            let views = [
                view_mut(of_part(&mut d_q, &at, q), q.shape())?,
                view_mut(of_part(&mut d_k, &at, k), k.shape())?,
                view_mut(of_part(d_v, &at, v), v.shape())?,
            ];
            let d_log_decay = match &part.log_decay {
                Some(x) if trains_log_decay => Some(view_mut(of_part(d_gates, &at, x), x.shape())?),
                _ => None,
            };
            // one for all sequences gets the sum
            let d_bias = match &part.bias {
                Some(x) if trains_bias && is_shared => Some(view_mut(d_bias, x.shape())?),
                Some(x) if trains_bias => Some(view_mut(of_part(d_bias, &at, x), x.shape())?),
                _ => None,
            };
            let gradient = LayerGradient {
                log_decay: part.log_decay.as_ref().map(Numbers::view).transpose()?,
                bias: part.bias.as_ref().map(Numbers::view).transpose()?,
                key_mask: part.key_mask.as_ref().map(|real| real.view()),
                d_log_decay,
                d_bias,
                d_parameters: Some(&mut d_parameters).filter(|d| !d.is_empty()),
                record: match records.next() {
                    Some(record) => Some((record, outputs.view()?)),
                    None => None,
                },
                ..LayerGradient::new([q.view()?, k.view()?, v.view()?], d_outputs.view()?, views)
            };
            self.layer.backward_into(gradient, self.mask, part.lengths).map_err(Failed::Core)
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

/// The numbers of some sequences.
struct Part<'a, T: Element> {
    qkv: [Numbers<'a, T>; 3],
    log_decay: Option<Numbers<'a, T>>,
    bias: Option<Numbers<'a, T>>,
    lengths: Option<&'a [usize]>,
    key_mask: Option<Array2<bool>>,
}

/// The gradient by some sequences, of that by all.
fn of_part<'a, T: Element>(
    all: &'a mut [T],
    at: &Range<usize>,
    part: &Numbers<'_, T>,
) -> &'a mut [T] {
    let each = size(&part.shape()[1..]);
    &mut all[at.start * each..at.end * each]
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
        out: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let all = [q, k, rest, out, d_out].map(Tensor::storage_and_layout);
        let mut found = Vec::with_capacity(5);
        for (storage, layout) in &all {
            let Storage::Cpu(storage) = &**storage else { bail!("a gradient is not on the CPU") };
            found.push((storage, *layout));
        }
        let outputs = [3, 4].map(|i: usize| Operand::new(found[i].0, found[i].1));
        let [d_q, d_k, d_rest] = self.gradients([found[0], found[1], found[2]], outputs)?;
        let tensor = |numbers, of: &Tensor| tensor_of(numbers, of.dims(), of.dtype()).map(Some);
        Ok((tensor(d_q, q)?, tensor(d_k, k)?, tensor(d_rest, rest)?))
    }
}
