//! Queries, keys and values: from the embedded heads or from a safetensors file.

use crate::args::{MOST_TOKENS, Plan};
use dijiang::Mask;
use half::{bf16, f16};
use ndarray::{Array2, s};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::{BTreeSet, HashMap};
use std::path::Path;

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
    let broken = |error| format!("{file} is not a whole safetensors file: {error}");
    let tensors = SafeTensors::deserialize(bytes).map_err(broken)?;
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(broken)?;
    let no_metadata = HashMap::new();
    let metadata = header.metadata().as_ref().unwrap_or(&no_metadata);

    let names: BTreeSet<&str> = tensors.names().into_iter().filter_map(head_of).collect();
    if names.is_empty() {
        return Err(format!(
            "{file} holds no head: name its tensors `<head>/q`, `<head>/k` and `<head>/v`"
        ));
    }
    names
        .into_iter()
        .map(|name| head(&tensors, metadata, name, plan).map_err(|why| format!("{file}: {why}")))
        .collect()
}

/// The head that a tensor belongs to, if it is one of `<head>[/test|/calibration]/{q,k,v}`.
fn head_of(tensor: &str) -> Option<&str> {
    let (head, part) = tensor.rsplit_once('/')?;
    let head =
        head.strip_suffix("/test").or_else(|| head.strip_suffix("/calibration")).unwrap_or(head);
    (["q", "k", "v"].contains(&part) && !head.is_empty()).then_some(head)
}

fn head(
    tensors: &SafeTensors<'_>,
    metadata: &HashMap<String, String>,
    name: &str,
    plan: &Plan,
) -> Result<Input, String> {
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
    let [q, k, v] = ["q", "k", "v"].map(|part| matrix(tensors, &format!("{split}/{part}")));
    let (q, k, v) = (q?, k?, v?);
    check_pair(&split, &q, &k, mask)?;
    if k.nrows() != v.nrows() {
        return Err(format!(
            "`{split}/k` has {} tokens and `{split}/v` has {}: they must agree",
            k.nrows(),
            v.nrows()
        ));
    }

    let split = format!("{name}/calibration");
    let there = |part| tensors.tensor(&format!("{split}/{part}")).is_ok();
    let calibration = if ["q", "k", "v"].into_iter().any(there) {
        let (cq, ck) =
            (matrix(tensors, &format!("{split}/q"))?, matrix(tensors, &format!("{split}/k"))?);
        check_pair(&split, &cq, &ck, mask)?;
        if cq.ncols() != q.ncols() {
            return Err(format!(
                "`{split}/q` has {} columns where the head has {}",
                cq.ncols(),
                q.ncols()
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
    Ok(Input {
        name: name.to_owned(),
        norm: None,
        mask,
        q: first(q),
        k: first(k),
        v: first(v),
        calibration: calibration.map(|(q, k)| (first(q), first(k))),
        calibration_stride,
    })
}

fn check_pair(split: &str, q: &Array2<f32>, k: &Array2<f32>, mask: Mask) -> Result<(), String> {
    if q.ncols() != k.ncols() {
        return Err(format!(
            "`{split}/q` has {} columns and `{split}/k` has {}: they must agree",
            q.ncols(),
            k.ncols()
        ));
    }
    if mask == Mask::Causal && q.nrows() != k.nrows() {
        return Err(format!(
            "`{split}/q` has {} tokens and `{split}/k` has {}, but the head is causal: they must \
             agree, or pass --full",
            q.nrows(),
            k.nrows()
        ));
    }
    Ok(())
}

fn matrix(tensors: &SafeTensors<'_>, name: &str) -> Result<Array2<f32>, String> {
    let tensor = tensors.tensor(name).map_err(|_| format!("the tensor `{name}` is missing"))?;
    let &[rows, columns] = tensor.shape() else {
        return Err(format!("`{name}` has the shape {:?}: it must be [tokens, d]", tensor.shape()));
    };
    if rows == 0 || columns == 0 {
        return Err(format!(
            "`{name}` has the shape [{rows}, {columns}]: it must hold at least one number"
        ));
    }
    if rows > MOST_TOKENS {
        return Err(format!(
            "`{name}` has {rows} tokens: at most {MOST_TOKENS} can be compared with exact \
             attention"
        ));
    }
    let numbers = numbers(&tensor).ok_or_else(|| {
        format!("`{name}` has the type {:?}: it must be F32, F16, BF16 or F64", tensor.dtype())
    })?;
    if let Some(i) = numbers.iter().position(|x| !x.is_finite()) {
        let (row, column) = (i / columns, i % columns);
        return Err(format!(
            "`{name}` is NaN, infinite or beyond float32 at token {row}, column {column}"
        ));
    }
    Array2::from_shape_vec((rows, columns), numbers)
        .map_err(|error| format!("`{name}` cannot be read: {error}"))
}

fn numbers(tensor: &TensorView<'_>) -> Option<Vec<f32>> {
    let data = tensor.data();
    Some(match tensor.dtype() {
        Dtype::F32 => data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F64 => data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect(),
        Dtype::F16 => data.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::BF16 => {
            data.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect()
        }
        _ => return None,
    })
}
