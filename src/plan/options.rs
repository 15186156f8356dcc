//! What is asked of a plan.

use crate::attention::Attention;
use crate::check;
use crate::error::Error;
use crate::memory::merged::rule::MergeUnits;
use crate::plan::setting::KernelOptions;
use crate::state_format::StateFormat;

/// What the heads that are not exact may take, on average over them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Budget {
    /// So many slots: window and merged entries; sinks are apart.
    Slots(usize),
    /// So many numbers of the state, whatever they are
    /// ([`Attention::state_floats`](crate::Attention::state_floats)).
    FloatsPerHead(usize),
    /// So many bytes of a state of kernels of `f32`, in the format of the options
    /// ([`Attention::state_bytes`](crate::Attention::state_bytes)).
    BytesPerHead(usize),
}

impl Budget {
    /// What one head may take.
    pub(crate) fn of_a_head(self) -> usize {
        let (Self::Slots(most) | Self::FloatsPerHead(most) | Self::BytesPerHead(most)) = self;
        most
    }

    /// What a setting costs in the unit of the budget.
    pub(crate) fn sizes(self, kernel: KernelOptions, value_dim: usize) -> Result<Sizes, Error> {
        if let Self::Slots(_) = self {
            return Ok(Sizes { fixed: 0, window: 1, entry: 1 });
        }
        // the state is linear in both sizes: the kernel itself says how
        let units = MergeUnits::new(vec![1.0; kernel.head_dim], 1.0)?;
        let floats = |window, entries| {
            let kernel = kernel.merged::<f32>(window, entries, 0.98, Some(&units))?;
            match self {
                Self::BytesPerHead(_) => kernel.state_bytes(value_dim, 1),
                _ => kernel.state_floats(value_dim, 1),
            }
        };
        let (both, wider, larger) = (floats(8, 8)?, floats(9, 8)?, floats(8, 9)?);
        let (window, entry) = (wider - both, larger - both);
        Ok(Sizes { fixed: both - 8 * (window + entry), window, entry })
    }
}

/// The size of a setting: `fixed + window·(slots of the window) + entry·(entries)`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    fixed: usize,
    window: usize,
    entry: usize,
}

impl Sizes {
    pub(crate) fn of(&self, window: usize, entries: usize) -> usize {
        self.fixed + self.window * window + self.entry * entries
    }
}

/// Settings that differ in the number of entries: one curve of costs.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Curve {
    pub(crate) window: usize,
    pub(crate) decay: f64,
    /// Ascending.
    pub(crate) entries: Vec<usize>,
}

/// Entries up to here are measured in every head; larger ones where costs still fall.
pub(crate) const ALWAYS_MEASURED: usize = 512;

/// What is measured, and what is asked of the plan: options of
/// [`StatePlan::fit`](crate::StatePlan::fit).
///
/// ```
/// use dijiang::{Budget, PlanOptions};
///
/// // 128 slots a head, five heads exact besides, for contexts of 4096 tokens
/// let options = PlanOptions::new(Budget::Slots(128)).exact_heads(5).length(4096);
/// // the default grid
/// let up_to_1024 = [4, 8, 16, 32, 64, 128, 256, 512, 1024];
/// let windows: [(usize, &[usize]); 4] = [
///     (64, &up_to_1024),
///     (32, &up_to_1024[..6]),
///     (16, &up_to_1024[..5]),
///     (96, &[96, 192]),
/// ];
/// assert_eq!(options.clone().grid(&[0.95, 0.98], &windows), options);
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct PlanOptions {
    pub(crate) budget: Budget,
    pub(crate) exact_heads: usize,
    pub(crate) length: Option<usize>,
    pub(crate) sinks: usize,
    pub(crate) scale: Option<f64>,
    #[cfg_attr(feature = "serde", serde(default))]
    pub(crate) format: StateFormat,
    pub(crate) grid: Vec<Curve>,
    pub(crate) fingerprint: String,
}

impl PlanOptions {
    /// A plan within `budget`, with no exact heads, 4 sinks and the default grid: decays .95 and
    /// .98; a window of 64 with 4, 8, .. 1024 entries, 32 with 4 .. 128, 16 with 4 .. 64, 96 with
    /// 96 and 192.
    #[must_use]
    pub fn new(budget: Budget) -> Self {
        let entries = [4, 8, 16, 32, 64, 128, 256, 512, 1024];
        let windows: [(usize, &[usize]); 4] =
            [(64, &entries), (32, &entries[..6]), (16, &entries[..5]), (96, &[96, 192])];
        let none = Self {
            budget,
            exact_heads: 0,
            length: None,
            sinks: 4,
            scale: None,
            format: StateFormat::F32,
            grid: Vec::new(),
            fingerprint: String::new(),
        };
        none.grid(&[0.95, 0.98], &windows)
    }

    /// The budget.
    #[must_use]
    pub fn budget(&self) -> Budget {
        self.budget
    }

    /// Sets how many heads stay exact, beside the budget of the others: one by one the head with
    /// the largest remaining cost, after which the others are filled again.
    #[must_use]
    pub fn exact_heads(self, exact_heads: usize) -> Self {
        Self { exact_heads, ..self }
    }

    /// Plans for a context of so many tokens: costs are those of the tokens of its last half, not
    /// of all tokens of the samples. No sample may be shorter.
    #[must_use]
    pub fn length(self, tokens: usize) -> Self {
        Self { length: Some(tokens), ..self }
    }

    /// Sets how many of the first tokens stay exact in every head: 4 unless set.
    #[must_use]
    pub fn sinks(self, sinks: usize) -> Self {
        Self { sinks, ..self }
    }

    /// Sets the factor of `q·k`, `1/√head_dim` unless set.
    #[must_use]
    pub fn scale(self, scale: f64) -> Self {
        Self { scale: Some(scale), ..self }
    }

    /// Sets in how many bits states are kept, those of exact heads as well:
    /// [`StateFormat::F32`] unless set. Costs are measured in this format.
    #[must_use]
    pub fn state_format(self, format: StateFormat) -> Self {
        Self { format, ..self }
    }

    /// Sets the settings that are measured: every decay with every window and the numbers of
    /// entries behind it. Numbers above 512 are measured where the one before lowered the cost to
    /// less than .8 of what it was.
    #[must_use]
    pub fn grid(self, decays: &[f64], windows: &[(usize, &[usize])]) -> Self {
        let curve = |decay: f64, (window, entries): &(usize, &[usize])| {
            let mut entries = entries.to_vec();
            entries.sort_unstable();
            entries.dedup();
            Curve { window: *window, decay, entries }
        };
        let curves = decays.iter().flat_map(|&d| windows.iter().map(move |w| curve(d, w)));
        Self { grid: curves.collect(), ..self }
    }

    /// Names the model, and whatever else the plan depends on: what
    /// [`StatePlan::check_model`](crate::StatePlan::check_model) compares. Empty unless set.
    #[must_use]
    pub fn fingerprint(self, fingerprint: impl Into<String>) -> Self {
        Self { fingerprint: fingerprint.into(), ..self }
    }

    /// What all kernels have in common, for queries of `head_dim` columns.
    pub(crate) fn kernel(&self, head_dim: usize) -> Result<KernelOptions, Error> {
        let scale = check::scale::<f64>(self.scale, head_dim)?;
        Ok(KernelOptions { head_dim, scale, sinks: self.sinks, format: self.format })
    }

    /// The fewest slots of a setting.
    pub(crate) fn least_slots(&self) -> usize {
        let least = |curve: &Curve| curve.window + curve.entries.first().copied().unwrap_or(0);
        self.grid.iter().map(least).min().unwrap_or(0)
    }

    /// Refuses options that no plan can have.
    pub(crate) fn check(&self) -> Result<(), Error> {
        check::at_least_one("budget", self.budget.of_a_head())?;
        check::at_least_one("length", self.length.unwrap_or(1))?;
        let refuse = |found, needed| Err(Error::InvalidOption { which: "grid", found, needed });
        if self.grid.is_empty() {
            let needed = "at least one decay and one window with numbers of entries";
            return refuse("empty".to_owned(), needed);
        }
        for (i, curve) in self.grid.iter().enumerate() {
            let Curve { window, decay, entries } = curve;
            if entries.first().is_none_or(|&entries| entries == 0) || *window == 0 {
                let needed = "windows and numbers of entries of at least 1";
                return refuse(format!("a window of {window} with {entries:?} entries"), needed);
            }
            if self.grid[..i].iter().any(|o| (o.window, o.decay) == (*window, *decay)) {
                let needed = "one list of entries for each window, each decay once";
                return refuse(format!("window {window} with decay {decay} twice"), needed);
            }
            // whatever else the kernel refuses
            for &entries in entries {
                self.kernel(1)?.merged::<f64>(*window, entries, *decay, None)?;
            }
        }
        Ok(())
    }
}
