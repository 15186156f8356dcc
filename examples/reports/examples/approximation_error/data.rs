//! Queries, keys and values: from the embedded heads or from a safetensors file.

use crate::args::{MOST_TOKENS, Plan};
use crate::files;
use dijiang::Mask;
use half::{bf16, f16};
use ndarray::{Array2, s};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::{BTreeSet, HashMap};
use std::path::Path;

/// What a tensor may hold.
const SHAPES: &str = "[tokens, d], [heads, tokens, d] or [batch, heads, tokens, d]";

/// More says nothing about attention.
const MOST_STRIDE: usize = 65_536;

static EMBEDDED: &[u8] = include_bytes!("../../../../data/heads.safetensors");

/// One head.
#[derive(Debug)]
pub struct Input {
    pub name: String,
    /// |x̂|² of a synthetic input, `None` for a real head.
    pub norm: Option<f64>,
    pub mask: Mask,
    pub q: Array2<f32>,
    pub k: Array2<f32>,
    pub v: Array2<f32>,
    /// Queries and keys of another text.
    pub calibration: Option<(Array2<f32>, Array2<f32>)>,
    /// Tokens from one row of the calibration split to the next.
    pub calibration_stride: usize,
}

impl Input {
    pub fn tokens(&self) -> usize {
        self.q.nrows()
    }

    pub fn head_dim(&self) -> usize {
        self.q.ncols()
    }

    pub fn value_dim(&self) -> usize {
        self.v.ncols()
    }

    /// The size of the keys and values themselves: the cache of exact attention.
    pub fn exact_floats(&self) -> usize {
        self.k.nrows() * (self.head_dim() + self.value_dim())
    }

    pub fn is_real(&self) -> bool {
        self.norm.is_none()
    }

    /// Mean |x̂|² of the queries and of the keys.
    pub fn squared_norms(&self) -> [f64; 2] {
        [&self.q, &self.k].map(|x| {
            let total: f64 = x.iter().map(|a| f64::from(*a).powi(2)).sum();
            total / (x.nrows() as f64 * (x.ncols() as f64).sqrt())
        })
    }
}

/// The heads that are part of the program.
pub fn embedded(plan: &Plan) -> Result<Vec<Input>, String> {
    let mut inputs = heads(EMBEDDED, "the embedded file", plan)?;
    // data/README.md: every third token of the SmolLM2 heads
    inputs
        .iter_mut()
        .filter(|input| input.name.starts_with('L'))
        .for_each(|input| input.calibration_stride = 3);
    Ok(inputs)
}

/// The heads of a file.
pub fn from_file(path: &Path, plan: &Plan) -> Result<Vec<Input>, String> {
    let shown = format!("`{}`", path.display());
    let bytes = std::fs::read(path).map_err(|error| format!("{shown} cannot be read: {error}"))?;
    heads(&bytes, &shown, plan)
}

fn heads(bytes: &[u8], file: &str, plan: &Plan) -> Result<Vec<Input>, String> {
    let tensors = files::tensors(bytes).map_err(|why| format!("{file} {why}"))?;
    let broken = |error| format!("{file} is not a whole safetensors file: {error}");
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(broken)?;
    let no_metadata = HashMap::new();
    let metadata = header.metadata().as_ref().unwrap_or(&no_metadata);

    let names: BTreeSet<&str> = tensors.names().into_iter().filter_map(head_of).collect();
    if names.is_empty() {
        return Err(format!(
            "{file} holds no head: in it are {}; name the tensors of each head `<head>/q`, \
             `<head>/k` and `<head>/v`, with the shape {SHAPES}",
            files::contents(&tensors)
        ));
    }
    let mut inputs = Vec::new();
    for name in names {
        let found = of_name(&tensors, metadata, name, plan);
        inputs.extend(found.map_err(|why| format!("{file}: {why}"))?);
    }
    Ok(inputs)
}

/// The head that a tensor belongs to, if it is one of `<head>[/test|/calibration]/{q,k,v}`.
fn head_of(tensor: &str) -> Option<&str> {
    let (head, part) = tensor.rsplit_once('/')?;
    let head =
        head.strip_suffix("/test").or_else(|| head.strip_suffix("/calibration")).unwrap_or(head);
    (["q", "k", "v"].contains(&part) && !head.is_empty()).then_some(head)
}

/// All heads under one name: one, or those of every batch.
fn of_name(
    tensors: &SafeTensors<'_>,
    metadata: &HashMap<String, String>,
    name: &str,
    plan: &Plan,
) -> Result<Vec<Input>, String> {
    let causal = match metadata.get(&format!("{name}/causal")).map(String::as_str) {
        None | Some("true") => true,
        Some("false") => false,
        Some(other) => {
            return Err(format!(
                "the metadata `{name}/causal` is `{other}`: write `true` or `false`"
            ));
        }
    };
    let mask = if plan.causal.unwrap_or(causal) { Mask::Causal } else { Mask::Full };
    let calibration_stride = match metadata.get(&format!("{name}/calibration/stride")) {
        None => 1,
        Some(stride) => {
            stride.parse().ok().filter(|stride| (1..=MOST_STRIDE).contains(stride)).ok_or_else(
                || {
                    format!(
                        "the metadata `{name}/calibration/stride` is `{stride}`: write a number \
                         from 1 to {MOST_STRIDE}"
                    )
                },
            )?
        }
    };
    let split = if ["q", "k", "v"]
        .iter()
        .any(|part| tensors.tensor(&format!("{name}/test/{part}")).is_ok())
    {
        format!("{name}/test")
    } else {
        name.to_owned()
    };
    let [q, k, v] = ["q", "k", "v"].map(|part| Stack::new(tensors, format!("{split}/{part}")));
    let (q, k, v) = (q?, k?, v?);
    for other in [&k, &v] {
        other.check_beside(&q)?;
    }
    if k.heads != v.heads {
        return Err(format!(
            "`{}` has {} heads and `{}` has {}: they must agree",
            k.name, k.heads, v.name, v.heads
        ));
    }
    let split = format!("{name}/calibration");
    let there = |part| tensors.tensor(&format!("{split}/{part}")).is_ok();
    let calibration = if ["q", "k", "v"].into_iter().any(there) {
        let [cq, ck] = ["q", "k"].map(|part| Stack::new(tensors, format!("{split}/{part}")));
        let (cq, ck) = (cq?, ck?);
        ck.check_beside(&cq)?;
        if (cq.axes, cq.heads) != (q.axes, q.heads) || ![1, q.batch].contains(&cq.batch) {
            return Err(format!(
                "`{}` has the shape {:?} where the head has {:?}: they must agree but for the \
                 tokens",
                cq.name,
                cq.tensor.shape(),
                q.tensor.shape()
            ));
        }
        Some((cq, ck))
    } else {
        None
    };

    let first = |x: Array2<f32>| {
        let rows = x.nrows().min(plan.tokens);
        x.slice_move(s![..rows, ..])
    };
    let mut inputs = Vec::new();
    for batch in 0..q.batch {
        for head in 0..q.heads {
            let read = |x: &Stack<'_>| x.matrix(batch.min(x.batch - 1), head / (q.heads / x.heads));
            let (q_rows, k_rows, v_rows) = (read(&q)?, read(&k)?, read(&v)?);
            check_pair([&q.name, &k.name], &q_rows, &k_rows, mask)?;
            if k_rows.nrows() != v_rows.nrows() {
                return Err(format!(
                    "`{}` has {} tokens and `{}` has {}: they must agree",
                    k.name,
                    k_rows.nrows(),
                    v.name,
                    v_rows.nrows()
                ));
            }
            let calibration = match &calibration {
                None => None,
                Some((cq, ck)) => {
                    let (cq_rows, ck_rows) = (read(cq)?, read(ck)?);
                    check_pair([&cq.name, &ck.name], &cq_rows, &ck_rows, mask)?;
                    if cq_rows.ncols() != q_rows.ncols() {
                        return Err(format!(
                            "`{}` has {} columns where the head has {}",
                            cq.name,
                            cq_rows.ncols(),
                            q_rows.ncols()
                        ));
                    }
                    Some((first(cq_rows), first(ck_rows)))
                }
            };
            inputs.push(Input {
                name: match q.axes {
                    2 => name.to_owned(),
                    3 => format!("{name}[{head}]"),
                    _ => format!("{name}[{batch},{head}]"),
                },
                norm: None,
                mask,
                q: first(q_rows),
                k: first(k_rows),
                v: first(v_rows),
                calibration,
                calibration_stride,
            });
        }
    }
    Ok(inputs)
}

fn check_pair(
    [q_name, k_name]: [&str; 2],
    q: &Array2<f32>,
    k: &Array2<f32>,
    mask: Mask,
) -> Result<(), String> {
    if q.ncols() != k.ncols() {
        return Err(format!(
            "`{q_name}` has {} columns and `{k_name}` has {}: they must agree",
            q.ncols(),
            k.ncols()
        ));
    }
    if mask == Mask::Causal && q.nrows() != k.nrows() {
        return Err(format!(
            "`{q_name}` has {} tokens and `{k_name}` has {}, but the head is causal: they must \
             agree, or pass --full",
            q.nrows(),
            k.nrows()
        ));
    }
    Ok(())
}

/// A tensor as matrices, one for each head of each batch.
struct Stack<'a> {
    name: String,
    tensor: TensorView<'a>,
    axes: usize,
    batch: usize,
    heads: usize,
    tokens: usize,
    columns: usize,
}

impl<'a> Stack<'a> {
    fn new(tensors: &SafeTensors<'a>, name: String) -> Result<Self, String> {
        let tensor = tensors.tensor(&name).map_err(|_| {
            format!(
                "the tensor `{name}` is missing: a head needs q, k and v; the file holds {}",
                files::contents(tensors)
            )
        })?;
        let (batch, heads, tokens, columns) = match *tensor.shape() {
            [tokens, columns] => (1, 1, tokens, columns),
            [heads, tokens, columns] => (1, heads, tokens, columns),
            [batch, heads, tokens, columns] => (batch, heads, tokens, columns),
            _ => {
                return Err(format!(
                    "`{name}` has the shape {:?}: it must be {SHAPES}",
                    tensor.shape()
                ));
            }
        };
        if tensor.shape().contains(&0) {
            return Err(format!(
                "`{name}` has the shape {:?}, so it holds no tokens: dump at least one",
                tensor.shape()
            ));
        }
        if tokens > MOST_TOKENS {
            return Err(format!(
                "`{name}` has {tokens} tokens: at most {MOST_TOKENS} can be compared with exact \
                 attention, so cut q, k and v"
            ));
        }
        if !matches!(tensor.dtype(), Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64) {
            return Err(format!(
                "`{name}` has the type {:?}: it must be F32, F16, BF16 or F64, so convert it, as \
                 by `.float()`",
                tensor.dtype()
            ));
        }
        let axes = tensor.shape().len();
        Ok(Self { name, tensor, axes, batch, heads, tokens, columns })
    }

    /// Keys and values may have fewer heads than queries, each shared by a group of them.
    fn check_beside(&self, q: &Self) -> Result<(), String> {
        if (self.axes, self.batch) != (q.axes, q.batch) || !q.heads.is_multiple_of(self.heads) {
            return Err(format!(
                "`{}` has the shape {:?} and `{}` has {:?}: they must have the same axes and \
                 batch, and the heads of q must be a multiple of those of k and v",
                q.name,
                q.tensor.shape(),
                self.name,
                self.tensor.shape()
            ));
        }
        Ok(())
    }

    fn matrix(&self, batch: usize, head: usize) -> Result<Array2<f32>, String> {
        let Self { name, tokens, columns, .. } = self;
        let bytes = self.tensor.data();
        let each = bytes.len() / (self.batch * self.heads);
        let start = (batch * self.heads + head) * each;
        let numbers = numbers(self.tensor.dtype(), &bytes[start..start + each]);
        if let Some(i) = numbers.iter().position(|x| !x.is_finite()) {
            let place = match self.axes {
                2 => String::new(),
                3 => format!("head {head}, "),
                _ => format!("batch {batch}, head {head}, "),
            };
            return Err(format!(
                "`{name}` is NaN, infinite or beyond float32 at {place}token {}, column {}: leave \
                 out padding, or dump it again before the numbers overflow",
                i / columns,
                i % columns
            ));
        }
        Array2::from_shape_vec((*tokens, *columns), numbers)
            .map_err(|error| format!("`{name}` cannot be read: {error}"))
    }
}

/// The numbers of one of the types that [`Stack::new`] lets in.
fn numbers(dtype: Dtype, data: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F64 => data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect(),
        Dtype::F16 => data.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::BF16 => {
            data.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect()
        }
        _ => data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
    }
}
