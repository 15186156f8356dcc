//! Which heads of a model to keep exact, so that the others can have a memory of fixed size.

use crate::attention::Attention;
use crate::error::Error;
use crate::multi_head::MultiHead;
use crate::scalar::Scalar;
use crate::selection::HeadErrors;
use std::sync::Arc;

/// The heads that stay exact, and the table they were chosen from.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "SavedExactHeads")
)]
pub struct ExactHeads {
    heads: Vec<(usize, usize)>,
    errors: HeadErrors,
}

impl ExactHeads {
    /// Layer and kv head of each, in order.
    #[must_use]
    pub fn heads(&self) -> &[(usize, usize)] {
        &self.heads
    }

    /// Whether this head stays exact.
    #[must_use]
    pub fn contains(&self, layer: usize, kv_head: usize) -> bool {
        self.heads.binary_search(&(layer, kv_head)).is_ok()
    }

    /// The errors it was decided from.
    #[must_use]
    pub fn errors(&self) -> &HeadErrors {
        &self.errors
    }

    /// Attention of one layer, for `query_heads` query heads: `exact` in the chosen kv heads,
    /// `kernel` in the others. The layer has as many kv heads as the table has of it.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if the table has no head of this layer, or misses one between;
    /// those of [`MultiHead::per_kv_head`].
    pub fn layer<T: Scalar>(
        &self,
        layer: usize,
        query_heads: usize,
        exact: &Arc<dyn Attention<T>>,
        kernel: &Arc<dyn Attention<T>>,
    ) -> Result<MultiHead<T>, Error> {
        let mut heads: Vec<usize> = self
            .errors
            .ranked
            .iter()
            .filter(|error| error.layer == layer)
            .map(|error| error.kv_head)
            .collect();
        heads.sort_unstable();
        if heads.is_empty() || heads.iter().enumerate().any(|(i, &head)| i != head) {
            return Err(Error::InvalidOption {
                which: "layer",
                found: format!("{layer}, with kv heads {heads:?}"),
                needed: "one whose kv heads were all measured, numbered from 0",
            });
        }
        let choose = |kv: usize| Arc::clone(if self.contains(layer, kv) { exact } else { kernel });
        MultiHead::per_kv_head(heads.into_iter().map(choose).collect(), query_heads)
    }

    /// Bytes of the state of one sequence after `tokens` tokens, over all heads of the table.
    ///
    /// # Errors
    ///
    /// Those of [`Attention::state_bytes`].
    pub fn state_bytes<T: Scalar>(
        &self,
        tokens: usize,
        exact: &dyn Attention<T>,
        kernel: &dyn Attention<T>,
    ) -> Result<usize, Error> {
        let bytes = |kernel: &dyn Attention<T>| kernel.state_bytes(self.errors.value_dim, tokens);
        let (exact, small) = (bytes(exact)?, bytes(kernel)?);
        let kept = self.heads.len();
        let small = small.saturating_mul(self.errors.ranked.len() - kept);
        Ok(exact.saturating_mul(kept).saturating_add(small))
    }
}

impl HeadErrors {
    /// Keeps the `count` worst heads exact, or all if there are fewer.
    #[must_use]
    pub fn keep(&self, count: usize) -> ExactHeads {
        let count = count.min(self.ranked.len());
        let mut heads: Vec<_> =
            self.ranked[..count].iter().map(|error| (error.layer, error.kv_head)).collect();
        heads.sort_unstable();
        ExactHeads { heads, errors: self.clone() }
    }

    /// Keeps these heads exact, layer and kv head of each: a choice of one's own.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if a head is not in the table, or given twice.
    pub fn choose(&self, heads: &[(usize, usize)]) -> Result<ExactHeads, Error> {
        let mut sorted = heads.to_vec();
        sorted.sort_unstable();
        let twice = sorted.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0]);
        let measured =
            |head: &(usize, usize)| self.ranked.iter().any(|e| (e.layer, e.kv_head) == *head);
        match twice.or_else(|| sorted.iter().copied().find(|head| !measured(head))) {
            Some((layer, kv_head)) => Err(Error::InvalidOption {
                which: "heads",
                found: format!("kv head {kv_head} of layer {layer}"),
                needed: "heads of the table, each once",
            }),
            None => Ok(ExactHeads { heads: sorted, errors: self.clone() }),
        }
    }

    /// Keeps as many of the worst heads exact as `bytes` allow for the state of one sequence of
    /// `tokens` tokens, over all heads of the table.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if not even the memory without exact heads fits; those of
    /// [`Attention::state_bytes`].
    pub fn keep_within<T: Scalar>(
        &self,
        bytes: usize,
        tokens: usize,
        exact: &dyn Attention<T>,
        kernel: &dyn Attention<T>,
    ) -> Result<ExactHeads, Error> {
        let of = |kernel: &dyn Attention<T>| kernel.state_bytes(self.value_dim, tokens);
        let (exact, small) = (of(exact)?, of(kernel)?);
        let all = self.ranked.len();
        if exact <= small && exact.saturating_mul(all) <= bytes {
            return Ok(self.keep(all)); // So short a context needs no compression.
        }
        let Some(rest) = bytes.checked_sub(small.saturating_mul(all)) else {
            return Err(Error::InvalidOption {
                which: "bytes",
                found: bytes.to_string(),
                needed: "at least the state of every head without exact ones",
            });
        };
        Ok(self.keep(rest / (exact - small.min(exact)).max(1)))
    }
}

/// An [`ExactHeads`] as it is read, perhaps from a file that a person changed.
#[cfg(feature = "serde")]
#[derive(serde::Deserialize)]
#[serde(rename = "ExactHeads")]
struct SavedExactHeads {
    heads: Vec<(usize, usize)>,
    errors: HeadErrors,
}

#[cfg(feature = "serde")]
impl TryFrom<SavedExactHeads> for ExactHeads {
    type Error = Error;

    fn try_from(saved: SavedExactHeads) -> Result<Self, Error> {
        saved.errors.choose(&saved.heads)
    }
}
