//! Heads that share one budget of entries.

use crate::attention::sharing::Sharing;
use crate::error::Error;
use crate::multi_head::MultiHead;
use crate::multi_head::layout::HeadUnit;
use crate::scalar::Scalar;
use std::sync::Arc;

impl<T: Scalar> MultiHead<T> {
    /// Lets all kv heads with [`Far::merged`](crate::Far::merged) share one budget of entries, as
    /// many as they have together: the pair that costs least merges, in whichever head, and at
    /// least 4 entries stay in each. So that heads compare, the attention a head received in a step
    /// is scaled: what its query heads give to all but the sinks sums to their number. Heads with
    /// other kernels stay as they are. The kernels of pooled heads, which must do the same, become
    /// one with one set of parameters.
    ///
    /// ```
    /// use dijiang::{Far, HybridAttention, MultiHead};
    ///
    /// let kernel =
    ///     HybridAttention::<f32>::builder(16).window(8).far(Far::merged(10)).build()?;
    /// let layer = MultiHead::new(kernel, 6, 3)?.pooled()?; // 30 entries for three kv heads
    ///     
    /// # let _ = layer;
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if fewer than two kv heads merge with one kernel for all their query
    /// heads (those with several are left as they are), or they are pooled already;
    /// [`Error::InvalidOption`] if the kernels that merge differ in an option, keep heavy keys or
    /// fewer than 4 entries, or have more than 16 384 of them together.
    pub fn pooled(mut self) -> Result<Self, Error> {
        let heads = self.poolable();
        if heads.len() < 2 {
            let why = "it needs two kv heads with `Far::merged` that are not pooled yet, each with \
                       one kernel for all its query heads";
            return Err(Error::Unsupported { what: "pooling the entries of heads", why });
        }
        let sharing = |kv: usize| self.kernels[kv * self.group()].sharing();
        let first = sharing(heads[0]);
        let most = if let Sharing::Layer { max_heads, .. } = first { max_heads } else { 1 };
        if most < 2 || heads.iter().any(|&kv| sharing(kv) != first) {
            return Err(Error::InvalidOption {
                which: "the kernels of pooled heads",
                found: "different ones, with heavy keys, or with fewer than 4 entries".to_owned(),
                needed: "the same options in each, no heavy keys, at least 4 entries",
            });
        }
        if heads.len() > most {
            return Err(Error::InvalidOption {
                which: "entries",
                found: format!("those of {} heads", heads.len()),
                needed: "at most 16384 over all heads of a pool, with the tokens of a block",
            });
        }
        // they do the same: from here on they are one, with one set of parameters
        let kernel = Arc::clone(&self.kernels[heads[0] * self.group()]);
        for &kv in &heads {
            let group = self.group();
            for own in &mut self.kernels[kv * group..(kv + 1) * group] {
                *own = Arc::clone(&kernel);
            }
        }
        let pooled = |unit: &&HeadUnit| matches!(unit, HeadUnit::Group(kv) if heads.contains(kv));
        let mut units: Vec<HeadUnit> =
            self.units.iter().filter(|unit| !pooled(unit)).cloned().collect();
        units.push(HeadUnit::Pool(heads));
        self.units = Arc::new(units);
        Ok(self)
    }

    /// The kv heads that [`pooled`](Self::pooled) would let share their entries: those with
    /// [`Far::merged`](crate::Far::merged), one kernel for all their query heads, and no pool yet.
    /// It needs two; where a choice of exact heads leaves a layer fewer, there is nothing to share.
    #[must_use]
    pub fn poolable(&self) -> Vec<usize> {
        let group = self.group();
        let merges =
            |kv: usize| matches!(self.kernels[kv * group].sharing(), Sharing::Layer { .. });
        (0..self.kv_heads)
            .filter(|&kv| self.units.contains(&HeadUnit::Group(kv)) && merges(kv))
            .collect()
    }
}
