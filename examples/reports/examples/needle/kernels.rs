//! The kernels, most of them with about the same state: 17 thousand numbers.

use crate::task::{HEAD_DIM, SINKS, Sort, Task, Tokens};
use dijiang::{
    Attention, Calibration, CalibrationOptions, Error, Far, FeatureMap, HybridAttention,
    LinearAttention, Merged, Performer, SoftmaxAttention, Taylor, Ward,
};
use ndarray::{ArrayView2, ArrayViewMut1, ArrayViewMut2, s};
use plotters::style::RGBColor;
use reports::plots::Shape;
use std::sync::OnceLock;

/// Makes a kernel from a seed, for what is drawn at random.
type Build = fn(u64) -> Result<Box<dyn Attention<f32>>, Error>;

/// A kernel and its look in plots.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    pub name: &'static str,
    pub about: &'static str,
    pub kind: Kind,
    /// Of Okabe and Ito's palette.
    pub colour: RGBColor,
    pub shape: Shape,
    pub build: Build,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Exact: its state grows.
    Reference,
    /// Looks at nothing, or remembers nothing but the last tokens.
    Baseline,
    Memory,
}

const WINDOW: usize = 64;
const ENTRIES: usize = 64;
/// As many tokens as make up for the far memory.
const EQUAL_WINDOW: usize = 129;

pub const KERNELS: [Kernel; 10] = [
    Kernel {
        name: "softmax",
        about: "exact attention over everything; its state grows",
        kind: Kind::Reference,
        colour: RGBColor(140, 140, 140),
        shape: Shape::Disc,
        build: |_| Ok(Box::new(SoftmaxAttention::new(HEAD_DIM)?)),
    },
    Kernel {
        name: "uniform",
        about: "the mean of all values so far: looks at nothing",
        kind: Kind::Baseline,
        colour: RGBColor(140, 140, 140),
        shape: Shape::Cross,
        build: |_| Ok(Box::new(LinearAttention::new(Constant))),
    },
    Kernel {
        name: "window 129",
        about: "4 sinks and the last 129 tokens, which is as many numbers as the memories below \
                keep",
        kind: Kind::Baseline,
        colour: RGBColor(204, 121, 167),
        shape: Shape::Ring,
        build: |_| hybrid(EQUAL_WINDOW, Far::none()),
    },
    Kernel {
        name: "FAVOR+ 64",
        about: "4 sinks, the last 64 tokens, and 64 positive random features of all others",
        kind: Kind::Memory,
        colour: RGBColor(0, 114, 178),
        shape: Shape::Cross,
        build: |seed| hybrid(WINDOW, Far::features(Performer::new(HEAD_DIM, ENTRIES, seed)?)),
    },
    Kernel {
        name: "Ward 64",
        about: "4 sinks, the last 64 tokens, and 64 entries merged by Ward's rule on keys, \
                without a calibration",
        kind: Kind::Memory,
        colour: RGBColor(230, 159, 0),
        shape: Shape::Triangle,
        build: |_| hybrid(WINDOW, Far::ward(ENTRIES)),
    },
    Kernel {
        name: "merged 64",
        about: "4 sinks, the last 64 tokens, and 64 entries merged by the attention they received",
        kind: Kind::Memory,
        colour: RGBColor(0, 158, 115),
        shape: Shape::Disc,
        build: |_| hybrid(WINDOW, Far::merged(ENTRIES)),
    },
    Kernel {
        name: "merged 64, B = 8",
        about: "the same, with eight tokens leaving the window at once, so that it holds up to 71",
        kind: Kind::Memory,
        colour: RGBColor(213, 94, 0),
        shape: Shape::Triangle,
        build: |_| hybrid(WINDOW, Merged::new(ENTRIES).block(8)),
    },
    Kernel {
        name: "merged 64, γ = 1",
        about: "merged 64, with attention received that does not fade (γ is .98 unless set)",
        kind: Kind::Memory,
        colour: RGBColor(86, 180, 233),
        shape: Shape::Disc,
        build: |_| hybrid(WINDOW, Merged::new(ENTRIES).decay(1.0)),
    },
    Kernel {
        name: "Ward 64, calibrated",
        about: "Ward 64, with the metric and the expected attention of another stream",
        kind: Kind::Memory,
        colour: RGBColor(230, 159, 0),
        shape: Shape::Ring,
        build: |_| hybrid(WINDOW, Ward::new(ENTRIES).calibrated(calibration()?)),
    },
    Kernel {
        name: "Taylor 6, calibrated",
        about: "4 sinks, the last 64 tokens, and a second-order map of rank 6 fitted to another \
                stream; a smaller state",
        kind: Kind::Memory,
        colour: RGBColor(0, 114, 178),
        shape: Shape::Ring,
        build: |_| hybrid(WINDOW, Taylor::new(6).calibrated(calibration()?)),
    },
];

/// Tokens of the stream that is fitted to: one that no kernel is asked about.
const CALIBRATION_TOKENS: usize = 512;

/// What a stream of refreshed pairs says of its far attention.
fn calibration() -> Result<&'static Calibration, Error> {
    static CALIBRATION: OnceLock<Result<Calibration, Error>> = OnceLock::new();
    let fit = || {
        let Tokens { q, k, .. } = Task::new(Sort::Refreshed, 8, &[512], u64::MAX).tokens;
        let first = s![..CALIBRATION_TOKENS.min(q.nrows()), ..];
        Calibration::from_samples(
            q.slice(first),
            k.slice(first),
            CalibrationOptions::new().with_sinks(SINKS),
        )
    };
    CALIBRATION.get_or_init(fit).as_ref().map_err(Clone::clone)
}

fn hybrid(window: usize, far: impl Into<Far<f32>>) -> Result<Box<dyn Attention<f32>>, Error> {
    Ok(Box::new(HybridAttention::builder(HEAD_DIM).window(window).sinks(SINKS).far(far).build()?))
}

/// One feature, always 1: uniform attention.
#[derive(Debug)]
struct Constant;

impl FeatureMap<f32> for Constant {
    fn head_dim(&self) -> usize {
        HEAD_DIM
    }

    fn num_features(&self) -> usize {
        1
    }

    fn map_queries(
        &self,
        _x: ArrayView2<'_, f32>,
        mut values: ArrayViewMut2<'_, f32>,
        mut log_scale: ArrayViewMut1<'_, f32>,
    ) -> Result<(), Error> {
        values.fill(1.0);
        log_scale.fill(0.0);
        Ok(())
    }
}
