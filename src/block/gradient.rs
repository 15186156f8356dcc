//! The backward pass of a block, and its parameters.

use crate::block::weights::DijiangWeights;
use crate::block::{DijiangBlock, as_heads, heads_first, moments, thirds};
use crate::check;
use crate::error::Error;
use crate::mask::Mask;
use crate::multi_head::arguments::LayerForward;
use crate::multi_head::gradient::LayerGradient;
use crate::multi_head::record::LayerRecord;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use ndarray::{Array1, Array2, ArrayView2, Axis};

/// The gradients that [`DijiangBlock::backward`] gives.
#[derive(Clone, Debug, PartialEq)]
pub struct DijiangBlockGradients<T> {
    /// By the input, `[n, hidden]`.
    pub x: Array2<T>,
    /// By the [parameters](DijiangBlock::parameters).
    pub parameters: Parameters<T>,
}

/// What the group norm and the gate make of a row, and the gradients by them.
#[derive(Debug)]
struct Finished<T> {
    /// The input of the last projection.
    gated: Array2<T>,
    d_mixed: Array2<T>,
    d_gate: Array2<T>,
    norm_weight: Array1<f64>,
    norm_bias: Array1<f64>,
}

fn vector<T: Scalar>(x: &Array1<f64>) -> Array1<T> {
    x.mapv(T::from_f64)
}

impl<T: Scalar> DijiangBlock<T> {
    /// The numbers of the block, by the names that [`DijiangWeights`] has for them.
    #[must_use]
    pub fn parameters(&self) -> Parameters<T> {
        let weights = self.weights();
        Parameters::new()
            .with("query_key_value", weights.query_key_value.into_dyn())
            .with("query_key_value_bias", weights.query_key_value_bias.into_dyn())
            .with("dense", weights.dense.into_dyn())
            .with("dense_bias", weights.dense_bias.into_dyn())
            .with("gate", weights.gate.into_dyn())
            .with("group_norm_weight", weights.group_norm_weight.into_dyn())
            .with("group_norm_bias", weights.group_norm_bias.into_dyn())
            .with("radii", weights.radii.into_dyn())
    }

    /// The same block with other numbers in the place of those of these names.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] if there is no parameter of a name, or it has another shape; those of
    /// [`new`](Self::new).
    pub fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Self, Error> {
        let mut all = self.parameters();
        all.set(parameters)?;
        let weights = DijiangWeights {
            query_key_value: all.matrix("query_key_value").to_owned(),
            query_key_value_bias: all.vector("query_key_value_bias"),
            dense: all.matrix("dense").to_owned(),
            dense_bias: all.vector("dense_bias"),
            gate: all.matrix("gate").to_owned(),
            group_norm_weight: all.vector("group_norm_weight"),
            group_norm_bias: all.vector("group_norm_bias"),
            radii: all.vector("radii"),
        };
        Self::new(weights, self.heads(), self.rotary.clone())?.with_epsilon(self.epsilon)
    }

    /// The weights, as they came.
    fn weights(&self) -> DijiangWeights<T> {
        let shared = &*self.shared;
        DijiangWeights {
            query_key_value: shared.query_key_value.weight().t().to_owned(),
            query_key_value_bias: shared.query_key_value.bias(),
            dense: shared.dense.weight().t().to_owned(),
            dense_bias: shared.dense.bias(),
            gate: shared.gate.weight().to_owned(),
            group_norm_weight: shared.norm_weight.clone(),
            group_norm_bias: shared.norm_bias.clone(),
            radii: shared.radii.clone(),
        }
    }

    /// The gradients of a loss by the input `x [n, hidden]` of a whole sequence and by every
    /// parameter, from that by the output, `d_out [n, hidden]`. The forward pass is computed again.
    ///
    /// ```
    /// # use dijiang::{DijiangBlock, DijiangWeights, Rotary};
    /// # use ndarray::{Array1, Array2};
    /// # let matrix = |rows, phase: f64| {
    /// #     Array2::from_shape_fn((rows, 8), |(i, j)| (phase + (7 * i + 3 * j) as f64).sin())
    /// # };
    /// # let weights = DijiangWeights {
    /// #     query_key_value: matrix(24, 0.0),
    /// #     query_key_value_bias: Array1::zeros(24),
    /// #     dense: matrix(8, 1.0),
    /// #     dense_bias: Array1::zeros(8),
    /// #     gate: matrix(8, 2.0),
    /// #     group_norm_weight: Array1::ones(8),
    /// #     group_norm_bias: Array1::zeros(8),
    /// #     radii: Array1::linspace(-1.5, 1.5, 4),
    /// # };
    /// // `block` as in the example of `DijiangBlock`
    /// let block = DijiangBlock::new(weights, 2, Rotary::gpt_neox(4, 0.5)?)?;
    /// let (x, d_out) = (matrix(5, 3.0), matrix(5, 4.0));
    /// let d = block.backward(x.view(), d_out.view())?;
    /// let mut parameters = block.parameters();
    /// parameters.add_scaled(-0.01, &d.parameters)?;
    /// let block = block.with_parameters(&parameters)?; // a step later
    /// # let _ = block;
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`forward`](Self::forward); [`Error::Shape`] and [`Error::NotFinite`] of `d_out`;
    /// [`Error::Overflow`] if a gradient leaves the range of `T`.
    pub fn backward(
        &self,
        x: ArrayView2<'_, T>,
        d_out: ArrayView2<'_, T>,
    ) -> Result<DijiangBlockGradients<T>, Error> {
        check::size("x", "columns", self.hidden(), x.ncols())?;
        check::size("d_out", "rows", x.nrows(), d_out.nrows())?;
        check::size("d_out", "columns", x.ncols(), d_out.ncols())?;
        check::finite("x", x)?;
        check::finite("d_out", d_out)?;
        let mut parameters = self.parameters().zeros_like();
        if x.nrows() == 0 {
            return Ok(DijiangBlockGradients { x: Array2::zeros(x.dim()), parameters });
        }
        let (heads, shared) = (self.heads(), &*self.shared);
        let gate = self.gate(x)?;
        let mut rows = self.query_key_value(x, 0)?;
        let mut mixed = Array2::zeros(x.dim());
        let [q, k, v] = thirds(as_heads(&mut rows, heads)?).map(heads_first);
        let mut record = LayerRecord::new();
        let out = heads_first(as_heads(&mut mixed, heads)?);
        let call = LayerForward::new([q.view(), k.view(), v.view()], out);
        self.heads.forward_with(call.with_record(&mut record), Mask::Causal, None)?;

        let d_gated = d_out.dot(&shared.dense.weight().t());
        let Finished { gated, mut d_mixed, d_gate, norm_weight, norm_bias } =
            self.finish_back(&mixed, &gate, &d_gated);
        let mut d_rows = Array2::zeros((x.nrows(), 3 * self.hidden()));
        {
            let inputs = [q.view(), k.view(), v.view()];
            let d_heads = heads_first(as_heads(&mut d_mixed, heads)?);
            let gradients = thirds(as_heads(&mut d_rows, heads)?).map(heads_first);
            let mut of_heads = self.heads.parameters().zeros_like();
            let call = LayerGradient::new(inputs, d_heads.view(), gradients);
            let outputs = heads_first(as_heads(&mut mixed, heads)?);
            let call = call.with_parameters(&mut of_heads).with_record(&record, outputs.view());
            self.heads.backward_into(call, Mask::Causal, None)?;
            if let Some(d_radii) = parameters.get_mut("radii") {
                for (_, own) in of_heads.iter().filter(|(name, _)| name.ends_with("map.radii")) {
                    *d_radii += own;
                }
            }
            let angles = self.rotary.angles(0, x.nrows())?;
            let [d_q, d_k, _] = thirds(as_heads(&mut d_rows, heads)?);
            angles.rotate_heads_back_in_place(d_q)?;
            angles.rotate_heads_back_in_place(d_k)?;
        }
        // silu(z) = z·σ(z), with the derivative σ + z·σ·(1 − σ)
        let mut d_z = shared.gate.apply(x);
        d_z.zip_mut_with(&d_gate, |z, &d| {
            let sigma = T::one() / (T::one() + (-*z).exp());
            *z = d * (sigma + *z * sigma * (T::one() - sigma));
        });
        let d_x =
            d_rows.dot(&shared.query_key_value.weight().t()) + d_z.dot(&shared.gate.weight().t());
        for (name, gradient) in [
            ("query_key_value", d_rows.t().dot(&x).into_dyn()),
            ("query_key_value_bias", d_rows.sum_axis(Axis(0)).into_dyn()),
            ("dense", d_out.t().dot(&gated).into_dyn()),
            ("dense_bias", d_out.sum_axis(Axis(0)).into_dyn()),
            ("gate", x.t().dot(&d_z).into_dyn()),
            ("group_norm_weight", vector(&norm_weight).into_dyn()),
            ("group_norm_bias", vector(&norm_bias).into_dyn()),
        ] {
            parameters.insert(name, gradient);
        }
        parameters.check_gradients()?;
        check::gradient("the gradient by `x`", d_x.view())?;
        Ok(DijiangBlockGradients { x: d_x, parameters })
    }

    /// Back through `gated = gate·(norm(mixed)·weight + bias)`: with the normed numbers x̂, their
    /// gradients `g_i = d_i·gate_i·weight_i`, and means over a group,
    ///
    /// ```text
    /// d_mixed_i = (g_i − mean(g) − x̂_i·mean(g x̂))/√(variance + ε).
    /// ```
    fn finish_back(&self, mixed: &Array2<T>, gate: &Array2<T>, d_gated: &Array2<T>) -> Finished<T> {
        let hidden = self.hidden();
        let [weight, bias] =
            [&self.shared.norm_weight, &self.shared.norm_bias].map(|x| x.mapv(T::as_f64).to_vec());
        let mut all = Finished {
            gated: Array2::zeros(mixed.dim()),
            d_mixed: Array2::zeros(mixed.dim()),
            d_gate: Array2::zeros(mixed.dim()),
            norm_weight: Array1::zeros(hidden),
            norm_bias: Array1::zeros(hidden),
        };
        let group = self.heads();
        #[allow(clippy::cast_precision_loss)]
        let count = group as f64;
        for (t, row) in mixed.outer_iter().enumerate() {
            for (g, numbers) in row.exact_chunks(group).into_iter().enumerate() {
                let (mean, factor, scale) = moments(numbers, self.epsilon);
                let normed: Vec<f64> =
                    numbers.iter().map(|x| (x.as_f64() / scale - mean) * factor).collect();
                let mut d_normed = vec![0.0; group];
                for (i, (&x, d_normed)) in normed.iter().zip(&mut d_normed).enumerate() {
                    let c = g * group + i;
                    let (gate, d) = (gate[[t, c]].as_f64(), d_gated[[t, c]].as_f64());
                    let affine = x * weight[c] + bias[c];
                    all.gated[[t, c]] = T::from_f64(gate * affine);
                    all.d_gate[[t, c]] = T::from_f64(d * affine);
                    all.norm_weight[c] += d * gate * x;
                    all.norm_bias[c] += d * gate;
                    *d_normed = d * gate * weight[c];
                }
                let of_mean = d_normed.iter().sum::<f64>() / count;
                let of_variance =
                    normed.iter().zip(&d_normed).map(|(x, d)| x * d).sum::<f64>() / count;
                for (i, (x, d)) in normed.iter().zip(&d_normed).enumerate() {
                    let d_mixed = (d - of_mean - x * of_variance) * factor / scale;
                    all.d_mixed[[t, g * group + i]] = T::from_f64(d_mixed);
                }
            }
        }
        all
    }
}
