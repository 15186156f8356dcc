//! The kernels under test, by name.

use crate::data::Input;
use crate::synthetic::Normal;
use dijiang::{
    Attention, DctFeatures, DistillLoss, DistillOptions, DistillSample, Error, FeatureMap,
    LearnedFeatures, LinearAttention, OfficialDijiang, Performer, Points, Radii, SoftmaxAttention,
    TaylorFeatures, WeightFit, Wpff, distill, fit_weights,
};
use ndarray::Array1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    Performer,
    PerformerIid,
    PerformerHyperbolic,
    Dct,
    DctAntithetic,
    DctNormal,
    Official,
    Wpff,
    WpffSobol,
    WpffWeighted,
    Learned,
    Hedgehog,
    Taylor,
}

/// What the maps of a kind have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Performer,
    Dct,
    Wpff,
    Learned,
    Taylor,
    Official,
}

impl Family {
    pub const ALL: [Self; 6] =
        [Self::Performer, Self::Dct, Self::Wpff, Self::Learned, Self::Taylor, Self::Official];

    pub fn name(self) -> &'static str {
        match self {
            Self::Performer => "FAVOR+",
            Self::Dct => "DCT",
            Self::Wpff => "WPFF",
            Self::Learned => "learned",
            Self::Taylor => "Taylor",
            Self::Official => "released DiJiang",
        }
    }
}

/// What the literature says of the kernel error.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Claim {
    /// Quasi-Monte Carlo: O(1/m).
    Inverse,
    /// Monte Carlo: O(1/√m).
    InverseRoot,
    /// Nothing.
    None,
}

impl Claim {
    pub fn slope(self) -> Option<f64> {
        match self {
            Self::Inverse => Some(-1.0),
            Self::InverseRoot => Some(-0.5),
            Self::None => None,
        }
    }
}

/// Beyond this the fit has more weights than a calibration split has rows, and takes minutes.
const MOST_WEIGHTS: usize = 512;
/// Rows of a calibration split that are used, at most.
const FIT_ROWS: usize = 256;
/// Beyond this a map has more numbers to learn than there is to learn from.
const MOST_LEARNED: usize = 128;
/// Beyond this a state is measured in gigabytes.
const MOST_TAYLOR_FEATURES: usize = 20_000;

impl Kernel {
    pub const ALL: [Self; 13] = [
        Self::Performer,
        Self::PerformerIid,
        Self::PerformerHyperbolic,
        Self::Dct,
        Self::DctAntithetic,
        Self::DctNormal,
        Self::Official,
        Self::Wpff,
        Self::WpffSobol,
        Self::WpffWeighted,
        Self::Learned,
        Self::Hedgehog,
        Self::Taylor,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Performer => "performer",
            Self::PerformerIid => "performer-iid",
            Self::PerformerHyperbolic => "performer-hyperbolic",
            Self::Dct => "dct",
            Self::DctAntithetic => "dct-antithetic",
            Self::DctNormal => "dct-normal",
            Self::Official => "dijiang-official",
            Self::Wpff => "wpff",
            Self::WpffSobol => "wpff-sobol",
            Self::WpffWeighted => "wpff-weighted",
            Self::Learned => "learned-from-wpff",
            Self::Hedgehog => "learned-hedgehog",
            Self::Taylor => "taylor",
        }
    }

    pub fn family(self) -> Family {
        match self {
            Self::Performer | Self::PerformerIid | Self::PerformerHyperbolic => Family::Performer,
            Self::Dct | Self::DctAntithetic | Self::DctNormal => Family::Dct,
            Self::Wpff | Self::WpffSobol | Self::WpffWeighted => Family::Wpff,
            Self::Learned | Self::Hedgehog => Family::Learned,
            Self::Taylor => Family::Taylor,
            Self::Official => Family::Official,
        }
    }

    /// Its name among those of its family.
    pub fn short_name(self) -> &'static str {
        self.name().rsplit('-').next().unwrap_or_default()
    }

    pub fn description(self) -> &'static str {
        match self {
            Self::Performer => "FAVOR+: positive random features, orthogonal",
            Self::PerformerIid => "FAVOR+ with independent Gaussian projections",
            Self::PerformerHyperbolic => "FAVOR+ with pairs ω, −ω",
            Self::Dct => "DCT directions, stratified chi radii",
            Self::DctAntithetic => "DCT directions, radii ±√d",
            Self::DctNormal => "DCT directions, normal radii: estimates exp(q·k/d), not exp(q·k)",
            Self::Official => "the map of the released DiJiang code, on raw q and k",
            Self::Wpff => {
                "weighted positive fixed features: orthogonal directions, stratified radii, \
                 weights 1"
            }
            Self::WpffSobol => "the same with Sobol directions and radii",
            Self::WpffWeighted => "wpff with weights fitted on the calibration split",
            Self::Learned => {
                "linear layers of queries and of keys, from wpff-weighted, trained on the \
                 calibration split"
            }
            Self::Hedgehog => {
                "the same from the unit matrix: softmax([Wx + b, −Wx − b]), 2d features"
            }
            Self::Taylor => "second-order Taylor expansion, m = (d + 1)(d + 2)/2",
        }
    }

    /// Whether its weights are meant to estimate exp(q̂·k̂).
    pub fn aims_at_softmax(self) -> bool {
        !matches!(self, Self::DctNormal | Self::Official | Self::Learned | Self::Hedgehog)
    }

    pub fn claim(self) -> Claim {
        match self {
            Self::Performer | Self::PerformerIid | Self::PerformerHyperbolic => Claim::InverseRoot,
            Self::Dct | Self::DctAntithetic | Self::Wpff | Self::WpffSobol | Self::WpffWeighted => {
                Claim::Inverse
            }
            Self::DctNormal | Self::Official | Self::Learned | Self::Hedgehog | Self::Taylor => {
                Claim::None
            }
        }
    }

    pub fn is_random(self) -> bool {
        !matches!(self, Self::Taylor | Self::Hedgehog)
    }

    /// Whether its number of features follows from `head_dim`.
    pub fn is_fixed(self) -> bool {
        matches!(self, Self::Official | Self::Taylor | Self::Hedgehog)
    }

    /// The numbers of features it is measured at, of those asked for; its own number where that is
    /// fixed.
    pub fn features(self, head_dim: usize, asked: &[usize]) -> Vec<usize> {
        match self {
            Self::Official => vec![head_dim],
            Self::Hedgehog => vec![2 * head_dim],
            Self::Learned => asked.iter().copied().filter(|m| *m <= MOST_LEARNED).collect(),
            Self::Taylor => {
                let m = (head_dim + 1).saturating_mul(head_dim + 2) / 2;
                if m <= MOST_TAYLOR_FEATURES { vec![m] } else { Vec::new() }
            }
            Self::DctAntithetic | Self::PerformerHyperbolic => {
                asked.iter().copied().filter(|m| m.is_multiple_of(2)).collect()
            }
            Self::WpffWeighted => asked.iter().copied().filter(|m| *m <= MOST_WEIGHTS).collect(),
            _ => asked.to_vec(),
        }
    }

    /// Whether the input has what the kernel needs.
    pub fn applies_to(self, input: &Input) -> bool {
        !self.is_fitted() || input.calibration.is_some()
    }

    /// Whether it is fitted to the calibration split.
    fn is_fitted(self) -> bool {
        matches!(self, Self::WpffWeighted | Self::Learned | Self::Hedgehog)
    }

    /// A kernel with the same work to do, which takes no time to make.
    pub fn unfitted(self) -> Self {
        match self {
            Self::WpffWeighted | Self::Learned | Self::Hedgehog => Self::Wpff,
            other => other,
        }
    }

    /// The kernel with `m` features for the heads of `input`; learned ones are trained for so many
    /// steps.
    pub fn build(
        self,
        input: &Input,
        m: usize,
        seed: u64,
        steps: usize,
    ) -> Result<Box<dyn Attention<f32>>, Error> {
        let d = input.head_dim();
        Ok(match self {
            Self::Performer => linear(Performer::new(d, m, seed)?),
            Self::PerformerIid => linear(Performer::iid(d, m, seed)?),
            Self::PerformerHyperbolic => linear(Performer::hyperbolic(d, m, seed)?),
            Self::Dct => linear(DctFeatures::new(d, m, seed)?),
            Self::DctAntithetic => {
                linear(DctFeatures::new(d, m, seed)?.with_radii(Radii::Antithetic)?)
            }
            Self::DctNormal => linear(DctFeatures::new(d, m, seed)?.with_radii(Radii::Normal)?),
            Self::Official => Box::new(official(d, seed)?),
            Self::Wpff => linear(Wpff::new(d, m, seed)?),
            Self::WpffSobol => {
                linear(Wpff::with_sampling(d, m, seed, Points::Sobol, Radii::Sobol)?)
            }
            Self::WpffWeighted => linear(fitted(input, m, seed)?),
            Self::Learned => {
                let map = LearnedFeatures::from_map(&fitted(input, m, seed)?)?;
                trained(map, input, seed, steps)?
            }
            Self::Hedgehog => trained(LearnedFeatures::hedgehog(d)?, input, seed, steps)?,
            Self::Taylor => linear(TaylorFeatures::new(d)?),
        })
    }
}

pub fn linear(map: impl FeatureMap<f32> + 'static) -> Box<dyn Attention<f32>> {
    Box::new(LinearAttention::new(map))
}

/// The map of the released DiJiang code, with random radii.
pub fn official(
    head_dim: usize,
    seed: u64,
) -> Result<LinearAttention<OfficialDijiang<f32>>, Error> {
    let mut normal = Normal::new(seed);
    let radii = Array1::from_shape_simple_fn(head_dim, || normal.sample());
    Ok(LinearAttention::new(OfficialDijiang::new(radii)?).with_scale(1.0))
}

fn fitted(input: &Input, m: usize, seed: u64) -> Result<Wpff<f32>, Error> {
    let map = Wpff::new(input.head_dim(), m, seed)?;
    let Some((q, k)) = &input.calibration else { return Ok(map) };
    let step = q.nrows().div_ceil(FIT_ROWS).max(1) as isize;
    let rows = ndarray::s![..;step, ..];
    let weights =
        fit_weights(&map, q.slice(rows), k.slice(rows), WeightFit::new().with_mask(input.mask))?;
    map.with_weights(weights)
}

/// A map trained on the calibration split, by the cross entropy of the attention matrix.
fn trained(
    map: LearnedFeatures<f32>,
    input: &Input,
    seed: u64,
    steps: usize,
) -> Result<Box<dyn Attention<f32>>, Error> {
    let kernel = LinearAttention::new(map);
    let Some((q, k)) = &input.calibration else { return Ok(Box::new(kernel)) };
    let teacher = SoftmaxAttention::new(q.ncols())?;
    let options = DistillOptions::new()
        .loss(DistillLoss::CrossEntropy)
        .mask(input.mask)
        .steps(steps)
        .seed(seed);
    let rows = ndarray::s![..FIT_ROWS.min(q.nrows()), ..];
    let (q, k) = (q.slice(rows), k.slice(rows));
    // values do not matter where the attention matrices are compared
    let sample = DistillSample { q, k, v: k };
    Ok(distill(&kernel, &teacher, &[sample], options)?.kernel)
}
