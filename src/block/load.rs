//! The block from a checkpoint of the released layout.

use crate::block::DijiangBlock;
use crate::block::checkpoint::LayerTensors;
use crate::block::weights::DijiangWeights;
use crate::check;
use crate::decay;
use crate::error::Error;
use crate::features::official_dijiang::OfficialDijiang;
use crate::rotary::Rotary;
use crate::scalar::Scalar;
use safetensors::SafeTensors;

impl<T: Scalar> DijiangBlock<T> {
    /// The block of one layer of a released checkpoint, in F64, F32, F16 or BF16; needs feature
    /// `safetensors`.
    ///
    /// Read are the tensors `query_key_value`, `dense` and `group_norm` (`.weight` and `.bias`),
    /// `W_G` and `proj_matrix` under `prefix`, such as `"gpt_neox.layers.0.attention"`. If the
    /// table of decays `D1` is there too, it must hold those of this block. The others, `D2`,
    /// `mask`, `bias`, `masked_bias` and `rotary_emb.inv_freq`, are not needed.
    ///
    /// ```
    /// use dijiang::{DijiangBlock, Rotary};
    /// use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
    ///
    /// // stands for `std::fs::read("model.safetensors")`: hidden size 8, 2 heads
    /// let zeros = vec![0; 24 * 8 * 4];
    /// let tensor = |name: &str, shape: &[usize]| {
    ///     let bytes = &zeros[..4 * shape.iter().product::<usize>()];
    ///     TensorView::new(Dtype::F32, shape.to_vec(), bytes)
    ///         .map(|view| (format!("gpt_neox.layers.0.attention.{name}"), view))
    /// };
    /// let bytes = serialize(
    ///     [
    ///         tensor("query_key_value.weight", &[24, 8])?,
    ///         tensor("query_key_value.bias", &[24])?,
    ///         tensor("dense.weight", &[8, 8])?,
    ///         tensor("dense.bias", &[8])?,
    ///         tensor("W_G", &[8, 8])?,
    ///         tensor("group_norm.weight", &[8])?,
    ///         tensor("group_norm.bias", &[8])?,
    ///         tensor("proj_matrix", &[4, 4])?,
    ///     ],
    ///     None,
    /// )?;
    ///
    /// let file = SafeTensors::deserialize(&bytes)?;
    /// let rotary = Rotary::gpt_neox(4, 0.5)?; // head dimension, `rotary_pct`
    /// let block = DijiangBlock::<f32>::from_safetensors(
    ///     &file,
    ///     "gpt_neox.layers.0.attention",
    ///     2,
    ///     rotary,
    /// )?;
    /// assert_eq!(block.hidden(), 8);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::Tensor`]: a tensor is missing, of another shape or of another type; `proj_matrix`
    ///   is not of the form `C·diag(t)`; `D1` has other decays;
    /// - those of [`new`](Self::new), where `W_G` is called `gate` and `proj_matrix` `projection`.
    pub fn from_safetensors(
        file: &SafeTensors<'_>,
        prefix: &str,
        heads: usize,
        rotary: Rotary,
    ) -> Result<Self, Error> {
        check::at_least_one("heads", heads)?;
        let tensors = LayerTensors::new(file, prefix);
        let first = tensors.get("query_key_value.weight", "[3·hidden, hidden]")?;
        let &[_, hidden] = first.shape() else {
            return Err(first.error(
                format!("of shape {:?}", first.shape()),
                "one of shape [3·hidden, hidden]".into(),
            ));
        };
        let head_dim = hidden / heads;
        let projection = tensors.matrix::<T>("proj_matrix", head_dim, head_dim)?;
        let map =
            OfficialDijiang::from_projection(projection.view()).map_err(|error| match error {
                Error::InvalidOption { found, needed, .. } => Error::Tensor {
                    name: format!("{prefix}.proj_matrix"),
                    found,
                    needed: needed.to_owned(),
                },
                other => other,
            })?;
        check_decays(&tensors, heads)?;
        let weights = DijiangWeights {
            query_key_value: tensors.matrix(
                "query_key_value.weight",
                hidden.saturating_mul(3),
                hidden,
            )?,
            query_key_value_bias: tensors
                .vector("query_key_value.bias", hidden.saturating_mul(3))?,
            dense: tensors.matrix("dense.weight", hidden, hidden)?,
            dense_bias: tensors.vector("dense.bias", hidden)?,
            gate: tensors.matrix("W_G", hidden, hidden)?,
            group_norm_weight: tensors.vector("group_norm.weight", hidden)?,
            group_norm_bias: tensors.vector("group_norm.bias", hidden)?,
            radii: map.radii().clone(),
        };
        Self::new(weights, heads, rotary)
    }
}

/// `D1 [1, heads, positions, 1]` holds `γ_h` to the power of the position.
fn check_decays(tensors: &LayerTensors<'_>, heads: usize) -> Result<(), Error> {
    let Some(table) = tensors.find("D1") else { return Ok(()) };
    let &[_, _, positions, _] = table.shape() else {
        let found = format!("of shape {:?}", table.shape());
        return Err(table.error(found, format!("one of shape [1, {heads}, positions, 1]")));
    };
    let powers = table.numbers::<f64>(&[1, heads, positions, 1])?;
    if positions < 2 {
        return Ok(());
    }
    for (head, (powers, decay)) in
        powers.chunks_exact(positions).zip(decay::dijiang(heads)).enumerate()
    {
        let same = (powers[1] - decay).abs() <= table.rounding(); // NaN is not the same.
        if !same {
            let found = format!("a table with a decay of {} in head {head}", powers[1]);
            return Err(
                table.error(found, format!("one with {decay:.6}, that of the released code,"))
            );
        }
    }
    Ok(())
}
