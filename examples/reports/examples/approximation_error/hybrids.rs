//! The hybrids under test, by name: an exact window and sinks, with every far memory of the crate
//! behind them.

pub mod findings;
pub mod measure;
pub mod plot;
pub mod rows;
pub mod table;

use crate::data::Input;
use dijiang::{
    Attention, Calibration, CalibrationOptions, Error, Far, HybridAttention, Mask, Merged,
    Performer,
};

/// What is behind the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hybrid {
    Window,
    Features,
    Taylor,
    Heavy,
    Ward,
    Merged,
}

impl Hybrid {
    pub const ALL: [Self; 6] =
        [Self::Window, Self::Features, Self::Taylor, Self::Heavy, Self::Ward, Self::Merged];

    pub fn name(self) -> &'static str {
        match self {
            Self::Window => "window",
            Self::Features => "hybrid-features",
            Self::Taylor => "hybrid-taylor",
            Self::Heavy => "hybrid-heavy",
            Self::Ward => "hybrid-ward",
            Self::Merged => "hybrid-merged",
        }
    }

    /// The far memory in the builder of `HybridAttention`.
    pub fn code(self) -> &'static str {
        match self {
            Self::Window => "Far::none",
            Self::Features => "Far::features",
            Self::Taylor | Self::Heavy => "Far::taylor",
            Self::Ward => "Far::ward",
            Self::Merged => "Far::merged",
        }
    }

    pub fn description(self) -> &'static str {
        match self {
            Self::Window => {
                "the last tokens and the first ones (sinks) exact, the rest dropped: the control"
            }
            Self::Features => "window and sinks; FAVOR+ features of what leaves",
            Self::Taylor => {
                "window and sinks; a second-order Taylor map of this rank, fitted on the \
                 calibration split"
            }
            Self::Heavy => "the same with the far keys of the largest static score exact",
            Self::Ward => {
                "window and sinks; far entries merged by Ward's rule, weighted by the attention \
                 expected from the calibration split, or alike"
            }
            Self::Merged => {
                "window and sinks; far entries merged by the attention they receive; needs no \
                 calibration"
            }
        }
    }
}

/// The sizes that are measured.
#[derive(Clone, Debug)]
pub struct Sizes {
    pub window: usize,
    pub sinks: usize,
    heavy: usize,
    ranks: [usize; 2],
    /// Entries of the merging memories, and features, in the table.
    entries: usize,
    /// Tokens that leave at once, where that is tried.
    block: usize,
    /// Entries in the plots.
    curve: Vec<usize>,
    windows: Vec<usize>,
}

impl Sizes {
    pub fn standard() -> Self {
        Self {
            window: 64,
            sinks: 4,
            heavy: 16,
            ranks: [6, 10],
            entries: 64,
            block: 8,
            curve: vec![16, 32, 64, 128, 256],
            windows: vec![32, 64, 128, 256, 512],
        }
    }

    /// For the few tokens of a quick run.
    pub fn quick() -> Self {
        Self {
            window: 8,
            sinks: 2,
            heavy: 2,
            ranks: [2, 4],
            entries: 8,
            block: 4,
            curve: vec![4, 8, 16],
            windows: vec![4, 8, 16, 32],
        }
    }
}

/// What takes the tokens that leave the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    Dropped,
    Features(usize),
    Taylor {
        rank: usize,
        heavy: usize,
    },
    Ward {
        entries: usize,
        calibrated: bool,
    },
    /// By the cost of Ward, if not by that of the product.
    Merged {
        entries: usize,
        block: usize,
        ward: bool,
    },
}

/// One hybrid of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contestant {
    pub window: usize,
    pub sinks: usize,
    pub memory: Memory,
    /// Whether it has a line in the table; the others are points of the plots.
    pub in_table: bool,
}

impl Contestant {
    /// Those that have a meaning on this input, of the ones chosen.
    pub fn all(chosen: &[Hybrid], sizes: &Sizes, input: &Input) -> Vec<Self> {
        let merged = |entries| Memory::Merged { entries, block: 1, ward: false };
        let ward = |entries| Memory::Ward { entries, calibrated: input.calibration.is_some() };
        let taylor = |rank, heavy| Memory::Taylor { rank, heavy };
        let standard = sizes.entries;
        let curve = || sizes.curve.iter().copied();
        let mut contestants = Vec::new();
        for hybrid in chosen.iter().copied().filter(|hybrid| hybrid.applies_to(input)) {
            let of_table = match hybrid {
                Hybrid::Window => vec![Memory::Dropped],
                Hybrid::Features => vec![Memory::Features(standard)],
                Hybrid::Taylor => sizes.ranks.map(|rank| taylor(rank, 0)).to_vec(),
                Hybrid::Heavy => vec![taylor(sizes.ranks[0], sizes.heavy)],
                Hybrid::Ward if input.calibration.is_some() => {
                    vec![Memory::Ward { entries: standard, calibrated: false }, ward(standard)]
                }
                Hybrid::Ward => vec![ward(standard)],
                Hybrid::Merged => vec![
                    merged(standard),
                    Memory::Merged { entries: standard, block: sizes.block, ward: false },
                    Memory::Merged { entries: standard, block: 1, ward: true },
                ],
            };
            let of_plots: Vec<Memory> = match hybrid {
                Hybrid::Features => [standard / 4, 4 * standard].map(Memory::Features).to_vec(),
                Hybrid::Ward => curve().map(ward).collect(),
                Hybrid::Merged => curve().map(merged).collect(),
                Hybrid::Window | Hybrid::Taylor | Hybrid::Heavy => Vec::new(),
            };
            let (window, sinks) =
                if input.mask == Mask::Causal { (sizes.window, sizes.sinks) } else { (0, 0) };
            let of_size = |window, memory, in_table| Self { window, sinks, memory, in_table };
            contestants.extend(of_table.iter().map(|memory| of_size(window, *memory, true)));
            contestants.extend(
                of_plots
                    .iter()
                    .filter(|memory| !of_table.contains(memory))
                    .map(|m| of_size(window, *m, false)),
            );
            if hybrid == Hybrid::Window {
                let others = sizes.windows.iter().filter(|size| **size != window);
                contestants.extend(others.map(|size| of_size(*size, Memory::Dropped, false)));
            }
        }
        let fits =
            |memory| !matches!(memory, Memory::Taylor { rank, .. } if rank > input.head_dim());
        contestants.retain(|contestant| fits(contestant.memory));
        contestants
    }

    pub fn hybrid(&self) -> Hybrid {
        match self.memory {
            Memory::Dropped => Hybrid::Window,
            Memory::Features(_) => Hybrid::Features,
            Memory::Taylor { heavy: 0, .. } => Hybrid::Taylor,
            Memory::Taylor { .. } => Hybrid::Heavy,
            Memory::Ward { .. } => Hybrid::Ward,
            Memory::Merged { .. } => Hybrid::Merged,
        }
    }

    /// Its name with its size.
    pub fn label(&self) -> String {
        match self.memory {
            Memory::Dropped => format!("window {}", self.window),
            Memory::Features(m) => format!("features {m}"),
            Memory::Taylor { rank, heavy: 0 } => format!("taylor {rank}"),
            Memory::Taylor { rank, heavy } => format!("heavy {heavy}, taylor {rank}"),
            Memory::Ward { entries, calibrated: true } => format!("ward {entries}, calibrated"),
            Memory::Ward { entries, calibrated: false } => format!("ward {entries}"),
            Memory::Merged { entries, block: 1, ward: false } => format!("merged {entries}"),
            Memory::Merged { entries, block: 1, .. } => format!("merged {entries}, Ward's cost"),
            Memory::Merged { entries, block, .. } => format!("merged {entries}, block {block}"),
        }
    }

    pub fn is_random(&self) -> bool {
        matches!(self.memory, Memory::Features(_))
    }

    pub fn needs_calibration(&self) -> bool {
        matches!(self.memory, Memory::Taylor { .. } | Memory::Ward { calibrated: true, .. })
    }

    /// The number of features of its map, if it has one.
    pub fn features(&self) -> Option<usize> {
        match self.memory {
            Memory::Features(m) => Some(m),
            Memory::Taylor { rank, .. } => Some((rank + 1) * (rank + 2) / 2),
            _ => None,
        }
    }

    /// The kernel, with what the calibration split says where it needs that.
    pub fn build(
        &self,
        head_dim: usize,
        calibration: Option<&Calibration>,
        seed: u64,
    ) -> Result<Box<dyn Attention<f32>>, Error> {
        let mut builder = HybridAttention::builder(head_dim).window(self.window).sinks(self.sinks);
        if let Some(calibration) = calibration.filter(|_| self.needs_calibration()) {
            builder = builder.calibrated(calibration);
        }
        let builder = match self.memory {
            Memory::Dropped => builder.far(Far::none()),
            Memory::Features(m) => builder.far(Far::features(Performer::new(head_dim, m, seed)?)),
            Memory::Taylor { rank, heavy } => builder.heavy(heavy).far(Far::taylor(rank)),
            Memory::Ward { entries, .. } => builder.far(Far::ward(entries)),
            Memory::Merged { entries, block, ward } => {
                let far = Merged::new(entries).block(block);
                builder.far(if ward { far.value_weight(4.0) } else { far })
            }
        };
        Ok(Box::new(builder.build()?))
    }
}

impl Hybrid {
    /// Where every query sees every key there is no window, so sums of features alone are left for
    /// `features`, nothing for `window`; and there is no order of queries to learn from for
    /// `merged`.
    fn applies_to(self, input: &Input) -> bool {
        let has_meaning =
            input.mask == Mask::Causal || matches!(self, Self::Taylor | Self::Heavy | Self::Ward);
        let has_data = input.calibration.is_some() || !matches!(self, Self::Taylor | Self::Heavy);
        has_meaning && has_data
    }
}

/// What the calibration split of `input` says about far attention.
pub fn calibration(input: &Input, sizes: &Sizes) -> Option<Result<Calibration, Error>> {
    let (q, k) = input.calibration.as_ref()?;
    let options = match input.mask {
        Mask::Causal => CalibrationOptions::new()
            .with_window(sizes.window)
            .with_sinks(sizes.sinks)
            .with_stride(input.calibration_stride),
        mask => CalibrationOptions::new().with_window(0).with_sinks(0).with_mask(mask),
    };
    Some(Calibration::from_samples(q.view(), k.view(), options))
}
