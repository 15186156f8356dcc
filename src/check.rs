//! Checks of arguments, shared by every public function.

use crate::error::Error;
use crate::kernel;
use crate::mask::Mask;
use crate::scalar::Scalar;
use ndarray::{ArrayView1, ArrayView2};

/// `found` must equal `expected`.
pub(crate) fn size(
    which: &'static str,
    axis: &'static str,
    expected: usize,
    found: usize,
) -> Result<(), Error> {
    if expected == found { Ok(()) } else { Err(Error::Shape { which, axis, expected, found }) }
}

/// A size must be at least one.
pub(crate) fn at_least_one(which: &'static str, found: usize) -> Result<(), Error> {
    if found == 0 { Err(Error::ZeroSize { which }) } else { Ok(()) }
}

/// Every element must be finite.
pub(crate) fn finite<T: Scalar>(which: &'static str, x: ArrayView2<'_, T>) -> Result<(), Error> {
    if x.as_slice().is_some_and(kernel::all_finite) {
        return Ok(());
    }
    for (row, values) in x.outer_iter().enumerate() {
        if !row_is_finite(values) {
            let column = values.iter().position(|a| !a.is_finite()).unwrap_or(0);
            return Err(Error::NotFinite { which, row, column });
        }
    }
    Ok(())
}

/// Fails unless a gradient is finite: finite input led out of the range of `T`.
pub(crate) fn gradient<T: Scalar>(which: &'static str, x: ArrayView2<'_, T>) -> Result<(), Error> {
    finite(which, x).map_err(|error| match error {
        Error::NotFinite { row, .. } => Error::Overflow { which, row },
        other => other,
    })
}

/// Whether every element of a row is finite.
pub(crate) fn row_is_finite<T: Scalar>(row: ArrayView1<'_, T>) -> bool {
    match row.to_slice() {
        Some(slice) => kernel::all_finite(slice),
        None => row.iter().all(|a| a.is_finite()),
    }
}

/// A scale must be positive and finite in `T`; returns the scale a kernel uses.
pub(crate) fn scale<T: Scalar>(chosen: Option<f64>, head_dim: usize) -> Result<f64, Error> {
    let scale = chosen.unwrap_or_else(|| default_scale(head_dim));
    // its root must not vanish either, nor either of them overflow
    let usable = |x: T| x.is_finite() && x > T::zero();
    if usable(T::from_f64(scale)) && usable(T::from_f64(scale.sqrt())) {
        Ok(scale)
    } else {
        Err(Error::InvalidOption {
            which: "scale",
            found: scale.to_string(),
            needed: "a positive finite number",
        })
    }
}

/// Logits of learned sinks: at least one, finite in `T`.
pub(crate) fn sink_logits<T: Scalar>(logits: &[f64]) -> Result<(), Error> {
    at_least_one("sink_logits", logits.len())?;
    match logits.iter().find(|logit| !T::from_f64(**logit).is_finite()) {
        Some(bad) => Err(Error::InvalidOption {
            which: "sink_logit",
            found: bad.to_string(),
            needed: "a finite number",
        }),
        None => Ok(()),
    }
}

/// An option that is none, one for all query heads, or one for each of a group.
pub(crate) fn query_heads(list: &[f64], group: usize) -> Result<(), Error> {
    if list.len() > 1 { size("q", "heads", list.len(), group) } else { Ok(()) }
}

/// 1/√d.
#[allow(clippy::cast_precision_loss)]
pub(crate) fn default_scale(head_dim: usize) -> f64 {
    1.0 / (head_dim as f64).sqrt()
}

/// A number that is added to features: finite in `T`, not negative.
pub(crate) fn epsilon<T: Scalar>(epsilon: f64) -> Result<(), Error> {
    if epsilon >= 0.0 && T::from_f64(epsilon).is_finite() {
        return Ok(());
    }
    let found = epsilon.to_string();
    Err(Error::InvalidOption {
        which: "epsilon",
        found,
        needed: "a finite number that is not negative",
    })
}

/// A sequence must not be longer than the kernel can take.
pub(crate) fn length(max_len: usize, found: usize) -> Result<(), Error> {
    if found <= max_len { Ok(()) } else { Err(Error::TooLong { max_len, found }) }
}

/// Keys and values: `k [n, d]`, `v [n, d_v]`, finite.
pub(crate) fn keys_values<T: Scalar>(
    head_dim: usize,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
) -> Result<(), Error> {
    size("k", "columns", head_dim, k.ncols())?;
    size("v", "rows", k.nrows(), v.nrows())?;
    finite("k", k)?;
    finite("v", v)
}

/// Queries: `q [n, d]`, finite.
pub(crate) fn queries<T: Scalar>(head_dim: usize, q: ArrayView2<'_, T>) -> Result<(), Error> {
    size("q", "columns", head_dim, q.ncols())?;
    finite("q", q)
}

/// Features that come in pairs.
pub(crate) fn even(num_features: usize) -> Result<(), Error> {
    if num_features.is_multiple_of(2) {
        Ok(())
    } else {
        Err(Error::InvalidOption {
            which: "num_features",
            found: num_features.to_string(),
            needed: "even, since the features come in pairs of ω and −ω",
        })
    }
}

/// Sizes of a feature map.
pub(crate) fn features(head_dim: usize, num_features: usize) -> Result<(), Error> {
    at_least_one("head_dim", head_dim)?;
    at_least_one("num_features", num_features)?;
    array("num_features", num_features, head_dim)
}

/// An array that can be allocated: at most 2³² numbers.
pub(crate) fn array(which: &'static str, rows: usize, columns: usize) -> Result<(), Error> {
    match rows.checked_mul(columns) {
        Some(size) if size as u128 <= 1 << 32 => Ok(()),
        _ => Err(Error::InvalidOption {
            which,
            found: rows.to_string(),
            needed: "small enough for an array of at most 2^32 numbers",
        }),
    }
}

/// Memories that are merged must weigh alike.
pub(crate) fn same_scale<T: Scalar>(expected: T, found: T) -> Result<(), Error> {
    if expected == found {
        Ok(())
    } else {
        Err(Error::InvalidOption {
            which: "other",
            found: format!("a memory of scale {found}"),
            needed: "a memory of the same scale",
        })
    }
}

/// A projection `[num_features, head_dim]`: not empty, finite.
pub(crate) fn projection<T: Scalar>(projection: ArrayView2<'_, T>) -> Result<(), Error> {
    at_least_one("projection rows", projection.nrows())?;
    at_least_one("projection columns", projection.ncols())?;
    finite("projection", projection)
}

/// The mask has a meaning for `[n_q, n_k]` queries and keys.
pub(crate) fn mask(mask: Mask, [queries, keys]: [usize; 2]) -> Result<(), Error> {
    match mask {
        Mask::Full => Ok(()),
        Mask::CausalTail if queries <= keys => Ok(()),
        Mask::Causal | Mask::CausalTail => size("k", "rows", queries, keys),
    }
}

/// Refuses masks that leave out queries of a sequence, where all of them are needed.
pub(crate) fn whole(mask: Mask, sizes: [usize; 2]) -> Result<Mask, Error> {
    match mask.settled(sizes) {
        Mask::CausalTail => Err(Error::Unsupported {
            what: "a measurement of the tail of a sequence",
            why: "it needs the queries of all tokens; use `Mask::Causal` with all of them",
        }),
        mask => Ok(mask),
    }
}
