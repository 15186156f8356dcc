//! The weights of a released attention block, and their check.

use crate::attention::fingerprint::Fingerprint;
use crate::attention::positional::rotate::Positions;
use crate::check;
use crate::error::Error;
use crate::rotary::Rotary;
use crate::scalar::Scalar;
use ndarray::{Array1, Array2, Axis};

/// The weights of a [`DijiangBlock`](crate::DijiangBlock), in the layouts of the released
/// checkpoints. With `d = hidden/heads`:
#[derive(Clone, Debug, PartialEq)]
pub struct DijiangWeights<T> {
    /// `[3·hidden, hidden]`, as `torch.nn.Linear` has it: rows are outputs, of head 0 its `d`
    /// queries, `d` keys, `d` values, then of head 1.
    pub query_key_value: Array2<T>,
    /// `[3·hidden]`
    pub query_key_value_bias: Array1<T>,
    /// The output projection `[hidden, hidden]`: rows are outputs.
    pub dense: Array2<T>,
    /// `[hidden]`
    pub dense_bias: Array1<T>,
    /// `W_G [hidden, hidden]`: *columns* are outputs, it is no `Linear`.
    pub gate: Array2<T>,
    /// `[hidden]`
    pub group_norm_weight: Array1<T>,
    /// `[hidden]`
    pub group_norm_bias: Array1<T>,
    /// The radii `t [d]` of the feature map, which all heads share. A checkpoint has
    /// `proj_matrix = C·diag(t)`:
    /// [`OfficialDijiang::from_projection`](crate::OfficialDijiang::from_projection) finds them.
    pub radii: Array1<T>,
}

impl<T: Scalar> DijiangWeights<T> {
    /// Every shape, and that numbers are finite; returns the head dimension.
    pub(crate) fn check(&self, heads: usize) -> Result<usize, Error> {
        let hidden = self.query_key_value.ncols();
        check::at_least_one("heads", heads)?;
        check::at_least_one("query_key_value columns", hidden)?;
        if !hidden.is_multiple_of(heads) {
            let found = format!("{heads} with a hidden size of {hidden}");
            return Err(Error::InvalidOption {
                which: "heads",
                found,
                needed: "a divisor of the hidden size",
            });
        }
        let head_dim = hidden / heads;
        let matrices = [
            ("query_key_value", self.query_key_value.view(), 3 * hidden),
            ("dense", self.dense.view(), hidden),
            ("gate", self.gate.view(), hidden),
        ];
        for (which, matrix, rows) in matrices {
            check::size(which, "rows", rows, matrix.nrows())?;
            check::size(which, "columns", hidden, matrix.ncols())?;
            check::finite(which, matrix)?;
        }
        let vectors = [
            ("query_key_value_bias", self.query_key_value_bias.view(), 3 * hidden),
            ("dense_bias", self.dense_bias.view(), hidden),
            ("group_norm_weight", self.group_norm_weight.view(), hidden),
            ("group_norm_bias", self.group_norm_bias.view(), hidden),
            ("radii", self.radii.view(), head_dim),
        ];
        for (which, vector, len) in vectors {
            check::size(which, "elements", len, vector.len())?;
            check::finite(which, vector.insert_axis(Axis(0)))?;
        }
        Ok(head_dim)
    }

    /// What the state of a block depends on.
    pub(crate) fn fingerprint(&self, rotary: &Rotary) -> Fingerprint {
        let weights = self.query_key_value.iter().chain(&self.query_key_value_bias);
        Fingerprint::new()
            .with("projection to queries, keys and values", weights.map(|x| x.as_f64()))
            .with("radii", self.radii.iter().map(|x| x.as_f64()))
            .and(rotary.fingerprint())
    }
}
