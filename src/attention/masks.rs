//! Masks of keys and biases of scores: what they must be, and who refuses them.

use crate::check;
use crate::error::Error;
use crate::scalar::Scalar;
use ndarray::{ArrayView1, ArrayView3};

/// Refuses key masks and biases.
#[inline]
pub(crate) fn check_plain(key_mask: bool, bias: bool) -> Result<(), Error> {
    match (key_mask, bias) {
        (false, false) => Ok(()),
        (true, _) => Err(NO_KEY_MASK),
        (false, true) => Err(NO_BIAS),
    }
}

/// Checks the shapes of a key mask and of biases for `[group, n_q, n_k]`, and the numbers of the
/// latter.
pub(crate) fn check_masks<T: Scalar>(
    key_mask: Option<ArrayView1<'_, bool>>,
    bias: Option<ArrayView3<'_, T>>,
    [group, queries, keys]: [usize; 3],
) -> Result<(), Error> {
    if let Some(key_mask) = key_mask {
        check::size("key_mask", "elements", keys, key_mask.len())?;
    }
    let Some(bias) = bias else { return Ok(()) };
    let (heads, rows, columns) = bias.dim();
    if heads != 1 {
        check::size("bias", "heads", group, heads)?;
    }
    check::size("bias", "rows", queries, rows)?;
    check::size("bias", "columns", keys, columns)?;
    for bias in bias.outer_iter() {
        let usable = |&bias: &T| bias < T::infinity();
        if bias.iter().fold(true, |all, bias| all & usable(bias)) {
            continue;
        }
        if let Some(((row, column), _)) = bias.indexed_iter().find(|(_, bias)| !usable(bias)) {
            return Err(Error::NotFinite { which: "bias", row, column });
        }
    }
    Ok(())
}

const NO_KEY_MASK: Error = Error::Unsupported {
    what: "a mask of keys",
    why: "only `SoftmaxAttention` and what is built of it take one, and no stream; leave out the \
          tokens that are not to be seen",
};

const NO_BIAS: Error = Error::Unsupported {
    what: "a bias of scores",
    why: "only `SoftmaxAttention` and what is built of it take one, and of streams those without \
          a window",
};
