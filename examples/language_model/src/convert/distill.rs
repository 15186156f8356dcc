//! Before a model is trained its maps learn to answer as exact attention does, layer by layer.

use crate::capture::Capture;
use crate::convert::variables::{AdamW, OfKernels, Variables};
use crate::model::Model;
use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use dijiang::{Mask, MultiHead, Parameters};
use dijiang_candle::{Extras, attention, attention_with};
use indicatif::ProgressBar;
use ndarray::{ArrayD, IxDyn};
use rayon::prelude::*;

/// The highest learning rate of matrices; kernels have multiples of it.
const LEARNING_RATE: f64 = 1e-3;

/// Fits the parameters of every layer to the output of exact attention on a text, behind the matrix
/// that mixes the heads: `‖(ô − o)·W_o‖²/‖o·W_o‖²` of the *layer*, so that heads whose output
/// hardly counts do not (attention transfer: Zhang et al., arXiv 2410.10254, section 3.1). Steps
/// are those of AdamW, on all tokens; the best of each layer stays.
pub fn distill(
    model: &Model,
    layers: &[MultiHead<f32>],
    tokens: &[u32],
    steps: usize,
    bar: &ProgressBar,
) -> Result<Vec<MultiHead<f32>>> {
    let capture = Capture::of(model, tokens)?;
    let exact = model.exact_layers()?;
    let fitted = |(l, layer): (usize, &MultiHead<f32>)| -> Result<MultiHead<f32>> {
        bar.set_message(format!("maps of layer {l}"));
        if layer.parameters().is_empty() {
            return Ok(layer.clone());
        }
        let [q, k, v] = capture.layer(l).map(|x| -> Result<Tensor> {
            let (heads, n, columns) = x.dim();
            let numbers: Vec<f32> = x.iter().copied().collect();
            Ok(Tensor::from_vec(numbers, (1, heads, n, columns), &Device::Cpu)?)
        });
        let qkv = [q?, k?, v?];
        let mix = model.layers()[l].output.weight();
        let mix = Tensor::from_vec(mix.iter().copied().collect(), mix.dim(), &Device::Cpu)?;
        fit(layer, &exact[l], &qkv, &mix, steps).with_context(|| format!("the maps of layer {l}"))
    };
    layers.par_iter().enumerate().map(fitted).collect()
}

/// One layer.
fn fit(
    layer: &MultiHead<f32>,
    exact: &MultiHead<f32>,
    [q, k, v]: &[Tensor; 3],
    mix: &Tensor,
    steps: usize,
) -> Result<MultiHead<f32>> {
    let (_, heads, n, _) = q.dims4()?;
    let columns = heads * v.dim(3)?;
    let mixed = |o: Tensor| o.transpose(1, 2)?.reshape((n, columns))?.matmul(mix);
    let target = mixed(attention(exact, q, k, v, Mask::Causal, None)?)?;
    let size = f64::from(target.sqr()?.sum_all()?.to_scalar::<f32>()?).max(f64::MIN_POSITIVE);
    let mut variables = Variables::default();
    let of_kernels = OfKernels::new(layer, "", &mut variables)?;
    let mut optimizer = AdamW::new(&variables, 0.0, 1.0);
    let mut best: Option<(f64, Vec<(String, Tensor)>)> = None;
    for step in 0..=steps {
        let parameters = of_kernels.used()?;
        let extras = Extras { parameters: &parameters, ..Extras::default() };
        let found = mixed(attention_with(layer, extras, [q, k, v], Mask::Causal, None)?)?;
        let loss = ((found - &target)?.sqr()?.sum_all()? / size)?;
        let value = f64::from(loss.to_scalar::<f32>()?);
        if value.is_finite() && best.as_ref().is_none_or(|(least, _)| value < *least) {
            let kept = parameters.iter().map(|(name, x)| Ok((name.clone(), x.detach().copy()?)));
            best = Some((value, kept.collect::<Result<_>>()?));
        }
        if step < steps {
            optimizer.add(&loss.backward()?, 1.0)?;
            optimizer.step(LEARNING_RATE * (steps - step) as f64 / steps as f64)?;
        }
    }
    let (_, best) = best.context("the output is not finite")?;
    let arrays = best.iter().map(|(name, tensor)| {
        let numbers = tensor.flatten_all()?.to_vec1::<f32>()?;
        Ok((name.clone(), ArrayD::from_shape_vec(IxDyn(tensor.dims()), numbers)?))
    });
    let parameters: Parameters<f32> = arrays.collect::<Result<_>>()?;
    Ok(layer.with_parameters(&parameters)?)
}
