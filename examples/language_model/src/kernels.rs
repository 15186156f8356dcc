//! Kernels by name: `merged:64,pool,exact=9`.

use crate::capture::Capture;
use crate::model::Config;
use anyhow::{Context, Result, anyhow, bail, ensure};
use dijiang::{
    Attention, Calibration, CalibrationOptions, DctFeatures, EluFeatures, Far, FeatureMap,
    HybridAttention, LearnedFeatures, LinearAttention, Merged, Metric, MultiHead, OfficialDijiang,
    Performer, ReluFeatures, Scalar, SoftmaxAttention, StateFormat, Ward, Wpff, projection,
};
use ndarray::{Array1, s};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

/// What the command line says of names.
pub const GRAMMAR: &str = "\
A kernel is NAME[:SIZE][,OPTION]...

  softmax            exact attention
  window:W           the last W tokens and 4 sinks, nothing else
  merged:S           a window of 64, 4 sinks, S entries merged by the attention they received
  ward:S             the same, merged by Ward's rule
  taylor:R           the same, a second-order Taylor map of rank R (always calibrated)
  performer:M  dct:M  wpff:M
                     linear attention with M features; with window=W, behind an exact window; with
                     sinks=N, behind the first N tokens
  learned:M  hedgehog
                     the same with maps that are trained (`convert`): M features that begin as
                     those of dct, or two for each column, as Hedgehog begins
  official           the map of the released DiJiang code with fresh radii
  elu  relu          linear attention with elementwise maps

  window=W  sinks=N  heavy=N         of hybrids
  decay=G  min-age=N  block=N  value-weight=X  metric=identity
                                     of merged (block: of ward too; decay: of maps too, where
                                     every feature has one of its own, which is trained: they
                                     begin spread from one half to G, or
                                     are G if it is less)
  calibrated         fit the kernel of each head to the calibration text (not learned, hedgehog,
                     official, elu, relu)
  seed=N             of random maps
  state=FORMAT       f32, bf16 or q8: bits of caches, windows, sinks and entries (softmax, hybrids,
                     merged,plan=FILE)
  pool               merged: the kv heads of a layer share their entries
  exact=N            keep the N kv heads exact in which this kernel is furthest from exact \
                           attention on the
                     calibration text
  by=KERNEL          with exact: choose them by this kernel's errors instead (a name without \
                           options)
  plan=FILE          what `plan` wrote: window, entries and decay of every head, for `merged`
                     without a size and options; three come along, see `plans/README.md`. Of
                     any kernel, what `heads` wrote: the heads that stay exact
  adapted=FILE       what `convert` wrote: the weights that the model learned for this kernel";

/// A kernel for every head of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    name: String,
    family: Family,
    options: Options,
    exact: Exact,
    adapted: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Softmax,
    Window,
    Merged(usize),
    Ward(usize),
    Taylor(usize),
    Map(Map),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Map {
    Performer(usize),
    Dct(usize),
    Wpff(usize),
    Learned(usize),
    Hedgehog,
    Official,
    Elu,
    Relu,
}

/// Options as given; what was not given is the default of the crate.
#[derive(Clone, Debug, Default, PartialEq)]
struct Options {
    window: Option<usize>,
    sinks: Option<usize>,
    heavy: Option<usize>,
    decay: Option<f64>,
    min_age: Option<usize>,
    block: Option<usize>,
    value_weight: Option<f64>,
    metric: Option<Metric>,
    seed: Option<u64>,
    state: Option<StateFormat>,
    calibrated: bool,
    pool: bool,
}

/// Which kv heads stay exact.
#[derive(Clone, Debug, PartialEq)]
pub enum Exact {
    /// None beyond what the kernel is.
    None,
    /// So many, chosen on the calibration text by the errors of this kernel, or of the kernel
    /// itself.
    Count(usize, Option<Box<Kernel>>),
    /// Those of a file.
    Plan(PathBuf),
}

type AnyKernel<T> = Arc<dyn Attention<T>>;

/// Rows of the calibration text that fits see; exact heads are chosen on all of it.
const CALIBRATION_ROWS: usize = 512;

impl FromStr for Kernel {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(',').map(str::trim);
        let head = parts.next().unwrap_or_default();
        let (name, size) = match head.split_once(':') {
            Some((name, size)) => (name, Some(size)),
            None => (head, None),
        };
        let mut options = Options::default();
        let mut exact = Exact::None;
        let mut by = None;
        let mut adapted = None;
        let mut given = Vec::new();
        for part in parts {
            let (key, value) =
                part.split_once('=').map_or((part, None), |(key, value)| (key, Some(value)));
            ensure!(!given.contains(&key), "`{key}` is given twice in `{text}`");
            given.push(key);
            match (key, value) {
                ("pool", None) => options.pool = true,
                ("calibrated", None) => options.calibrated = true,
                ("window", Some(x)) => options.window = Some(count(key, x, 0..=MOST_TOKENS)?),
                ("sinks", Some(x)) => options.sinks = Some(count(key, x, 0..=MOST_TOKENS)?),
                ("heavy", Some(x)) => options.heavy = Some(count(key, x, 0..=MOST_TOKENS)?),
                ("decay", Some(x)) => {
                    let needed = "a number above 0, at most 1";
                    options.decay = Some(number(key, x, |x| *x > 0.0 && *x <= 1.0, needed)?);
                }
                ("min-age", Some(x)) => options.min_age = Some(count(key, x, 0..=MOST_TOKENS)?),
                ("block", Some(x)) => options.block = Some(count(key, x, 1..=MOST_ENTRIES)?),
                ("value-weight", Some(x)) => {
                    let needed = "a finite number that is not negative";
                    let fits = |x: &f64| *x >= 0.0 && x.is_finite();
                    options.value_weight = Some(number(key, x, fits, needed)?);
                }
                ("metric", Some("identity")) => options.metric = Some(Metric::Identity),
                ("metric", Some("query-diagonal")) => options.metric = Some(Metric::QueryDiagonal),
                ("seed", Some(x)) => {
                    options.seed = Some(number(key, x, |_| true, "a whole number below 2^64")?);
                }
                ("state", Some(x)) => options.state = Some(x.parse()?),
                ("exact", Some(x)) => exact = Exact::Count(count(key, x, 0..=MOST_TOKENS)?, None),
                ("by", Some(x)) => by = Some(Box::new(x.parse()?)),
                ("plan", Some(x)) => exact = Exact::Plan(PathBuf::from(x)),
                ("adapted", Some(x)) => adapted = Some(PathBuf::from(x)),
                _ => bail!("`{part}` is not an option of a kernel\n\n{GRAMMAR}"),
            }
        }
        ensure!(
            !(given.contains(&"exact") && given.contains(&"plan")),
            "`exact` and `plan` are two choices of heads"
        );
        if by.is_some() {
            let Exact::Count(count, _) = exact else {
                bail!("`by` says how to choose heads: it needs `exact=N`")
            };
            exact = Exact::Count(count, by);
        }
        let sized = |what, default, most| match size {
            Some(size) => count(what, size, 1..=most),
            None => Ok(default),
        };
        let features = |default| sized("features", default, MOST_FEATURES);
        let family = match name {
            "softmax" => Family::Softmax,
            "window" => Family::Window,
            "merged" => Family::Merged(sized("entries", 64, MOST_ENTRIES)?),
            "ward" => Family::Ward(sized("entries", 64, MOST_ENTRIES)?),
            "taylor" => Family::Taylor(sized("rank", 6, MOST_FEATURES)?),
            "performer" => Family::Map(Map::Performer(features(256)?)),
            "dct" => Family::Map(Map::Dct(features(128)?)),
            "wpff" => Family::Map(Map::Wpff(features(128)?)),
            "learned" => Family::Map(Map::Learned(features(128)?)),
            "hedgehog" => Family::Map(Map::Hedgehog),
            "official" => Family::Map(Map::Official),
            "elu" => Family::Map(Map::Elu),
            "relu" => Family::Map(Map::Relu),
            _ => bail!("there is no kernel `{name}`\n\n{GRAMMAR}"),
        };
        if let (Family::Merged(entries) | Family::Ward(entries), Some(block)) =
            (family, options.block)
        {
            ensure!(
                entries + block <= MOST_ENTRIES + 1,
                "`entries` is {entries} and `block` is {block}, together more than {}",
                MOST_ENTRIES + 1
            );
        }
        let sizeless = matches!(
            family,
            Family::Softmax | Family::Map(Map::Hedgehog | Map::Official | Map::Elu | Map::Relu)
        );
        ensure!(size.is_none() || !sizeless, "`{name}` has no size");
        if family == Family::Window {
            ensure!(
                size.is_some() != options.window.is_some(),
                "`window` needs one size: `window:128`"
            );
            if let Some(size) = size {
                options.window = Some(count("window", size, 0..=MOST_TOKENS)?);
            }
        }
        if matches!(family, Family::Softmax) && exact != Exact::None {
            bail!("`softmax` is exact in every head already");
        }
        if options.pool && (options.calibrated || options.heavy.is_some_and(|n| n > 0)) {
            bail!(
                "heads that share their entries (`pool`) need one kernel: no `calibrated`, no \
                 `heavy`"
            );
        }
        let kernel = Self {
            name: text.split(',').map(str::trim).collect::<Vec<_>>().join(","),
            family,
            options,
            exact,
            adapted,
        };
        for key in given.iter().filter(|key| !["exact", "by", "plan", "adapted"].contains(key)) {
            ensure!(kernel.takes(key), "`{key}` means nothing to `{head}`{}", kernel.hint(key));
        }
        Ok(kernel)
    }
}

impl Kernel {
    /// The name it was made of.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether two names say the same kernel, whatever was learned for it and in how many bits its
    /// states are kept.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        let options = |of: &Self| Options { state: None, ..of.options.clone() };
        self.family == other.family
            && options(self) == options(other)
            && match (&self.exact, &other.exact) {
                // what chose the heads is compared by the heads themselves
                (Exact::None, Exact::None) => true,
                (Exact::None, _) | (_, Exact::None) => false,
                _ => true,
            }
    }

    /// Which heads stay exact.
    #[must_use]
    pub fn exact(&self) -> &Exact {
        &self.exact
    }

    /// The kernel with states in full: rounding has no gradient.
    #[must_use]
    pub fn in_full(&self) -> Self {
        let options = Options { state: Some(StateFormat::F32), ..self.options.clone() };
        Self { options, ..self.clone() }
    }

    /// The kernel with what a model learned for it.
    #[must_use]
    pub fn with_adapted(&self, file: &Path) -> Self {
        let name = format!("{},adapted={}", self.name, file.display());
        Self { name, adapted: Some(file.to_owned()), ..self.clone() }
    }

    /// What the model learned for it, if it is to be used.
    #[must_use]
    pub fn adapted(&self) -> Option<&Path> {
        self.adapted.as_deref()
    }

    /// The kernel in heads that do not stay exact, each with a memory of its own: what exact heads
    /// are chosen by.
    #[must_use]
    pub fn alone(&self) -> Self {
        let options = Options { pool: false, ..self.options.clone() };
        let name = without_choice(&self.name);
        let name = name.split(',').filter(|part| *part != "pool").collect::<Vec<_>>().join(",");
        Self { name, family: self.family, options, exact: Exact::None, adapted: None }
    }

    /// Whether it is exact attention.
    #[must_use]
    pub fn is_softmax(&self) -> bool {
        self.family == Family::Softmax
    }

    /// Whether it is `merged` as it is, apart from the choice of heads: a plan says all the rest.
    #[must_use]
    pub fn is_plain_merged(&self) -> bool {
        let name = without_choice(&self.name);
        name.split(',').filter(|part| !part.starts_with("state=")).eq(["merged"])
    }

    /// In how many bits states are kept, if that was said.
    #[must_use]
    pub fn given_state(&self) -> Option<StateFormat> {
        self.options.state
    }

    fn state(&self) -> StateFormat {
        self.options.state.unwrap_or_default()
    }

    /// Whether it is linear attention, with no window and no exact heads beside it.
    #[must_use]
    pub fn is_map_alone(&self) -> bool {
        matches!(self.family, Family::Map(_)) && !self.is_hybrid() && self.exact == Exact::None
    }

    /// Whether it needs the calibration text, apart from the choice of exact heads.
    #[must_use]
    pub fn is_fitted(&self) -> bool {
        self.options.calibrated
            || matches!(self.family, Family::Taylor(_))
            || self.options.heavy.is_some_and(|n| n > 0)
    }

    /// Whether an option has a meaning here.
    fn takes(&self, key: &str) -> bool {
        let fitted =
            matches!(self.family, Family::Map(Map::Performer(_) | Map::Dct(_) | Map::Wpff(_)));
        match key {
            "window" | "sinks" => !matches!(
                self.family,
                Family::Softmax | Family::Map(Map::Official | Map::Elu | Map::Relu)
            ),
            "heavy" => self.is_hybrid(),
            "state" => self.is_hybrid() || self.family == Family::Softmax,
            "decay" => matches!(self.family, Family::Merged(_) | Family::Map(_)),
            "min-age" | "value-weight" | "metric" | "pool" => {
                matches!(self.family, Family::Merged(_))
            }
            "block" => matches!(self.family, Family::Merged(_) | Family::Ward(_)),
            "seed" => fitted || matches!(self.family, Family::Map(Map::Official | Map::Learned(_))),
            "calibrated" => {
                fitted
                    || matches!(
                        self.family,
                        Family::Merged(_) | Family::Ward(_) | Family::Taylor(_)
                    )
            }
            _ => false,
        }
    }

    fn hint(&self, key: &str) -> &'static str {
        match (self.family, key) {
            (Family::Map(Map::Performer(_) | Map::Dct(_) | Map::Wpff(_)), "heavy") => {
                ": give it a window first"
            }
            _ => "",
        }
    }

    fn is_hybrid(&self) -> bool {
        match self.family {
            Family::Softmax => false,
            Family::Window | Family::Merged(_) | Family::Ward(_) | Family::Taylor(_) => true,
            Family::Map(_) => self.options.window.is_some() || self.options.sinks.is_some(),
        }
    }

    /// The kernel of every kv head, layer by layer; those that have parameters apart from each
    /// other.
    pub fn heads<T: Scalar>(
        &self,
        config: &Config,
        capture: Option<&Capture>,
    ) -> Result<Vec<Vec<AnyKernel<T>>>> {
        let d = config.head_dim;
        if !self.is_fitted() {
            let kernel = self.build(d, None)?;
            if kernel.parameters().is_empty() {
                return Ok(vec![vec![kernel; config.kv_heads]; config.layers]);
            }
            let layer = || (0..config.kv_heads).map(|_| self.build(d, None)).collect();
            return (0..config.layers).map(|_| layer()).collect();
        }
        let capture = capture.context("a calibrated kernel needs a calibration text")?;
        let head = |layer, kv_head| -> Result<AnyKernel<T>> {
            let sample = capture.sample(layer, kv_head);
            let stride = sample.k.nrows().div_ceil(CALIBRATION_ROWS).max(1);
            let (window, sinks) =
                if self.is_hybrid() { (self.window(), self.sinks()) } else { (0, 0) };
            let options =
                CalibrationOptions::new().with_window(window).with_sinks(sinks).with_stride(stride);
            let (q, k) = (sample.q.slice(s![.., ..;stride, ..]), sample.k.slice(s![..;stride, ..]));
            let calibration = Calibration::from_group(q, k, options);
            let built = calibration
                .map_err(|error| anyhow!(error))
                .and_then(|fit| self.build(d, Some(&fit)));
            built.with_context(|| format!("kv head {kv_head} of layer {layer}"))
        };
        (0..config.layers)
            .map(|layer| (0..config.kv_heads).map(|kv| head(layer, kv)).collect())
            .collect()
    }

    /// The attention of every layer, with these kv heads exact, `(layer, kv head)`.
    pub fn layers<T: Scalar>(
        &self,
        config: &Config,
        capture: Option<&Capture>,
        exact_heads: &[(usize, usize)],
    ) -> Result<Vec<MultiHead<T>>> {
        let exact = SoftmaxAttention::new(config.head_dim)?.with_state_format(self.state());
        let exact: AnyKernel<T> = Arc::new(exact);
        let heads = self.heads(config, capture)?;
        let layer = |(l, kernels): (usize, Vec<AnyKernel<T>>)| -> Result<MultiHead<T>> {
            let choose = |(kv, kernel)| match exact_heads {
                heads if heads.contains(&(l, kv)) => Arc::clone(&exact),
                _ => kernel,
            };
            let kernels = kernels.into_iter().enumerate().map(choose).collect();
            let layer = MultiHead::per_kv_head(kernels, config.heads)?;
            // where the plan leaves one head of a layer, it has nobody to share with
            Ok(if self.options.pool && layer.poolable().len() > 1 {
                layer.pooled()?
            } else {
                layer
            })
        };
        heads.into_iter().enumerate().map(layer).collect()
    }

    /// The kernel of one head.
    fn build<T: Scalar>(&self, d: usize, fit: Option<&Calibration>) -> Result<AnyKernel<T>> {
        let seed = self.options.seed.unwrap_or(0);
        let calibrated = fit.filter(|_| self.options.calibrated);
        Ok(match self.family {
            Family::Softmax => Arc::new(SoftmaxAttention::new(d)?.with_state_format(self.state())),
            Family::Window => self.hybrid(d, Far::none(), fit)?,
            Family::Merged(entries) => self.hybrid(d, self.merged(entries, calibrated), fit)?,
            Family::Ward(entries) => {
                let mut far = Ward::new(entries);
                if let Some(block) = self.options.block {
                    far = far.block(block);
                }
                if let Some(fit) = calibrated {
                    far = far.calibrated(fit);
                }
                self.hybrid(d, far, fit)?
            }
            Family::Taylor(rank) => self.hybrid(d, Far::taylor(rank), fit)?,
            Family::Map(Map::Performer(m)) => {
                let mut map = Performer::new(d, m, seed)?;
                if let Some(fit) = calibrated {
                    map = map.calibrated(fit)?;
                }
                self.with_map(d, map, fit)?
            }
            Family::Map(Map::Dct(m)) => {
                let mut map = DctFeatures::new(d, m, seed)?;
                if let Some(fit) = calibrated {
                    map = map.calibrated(fit)?;
                }
                self.with_map(d, map, fit)?
            }
            Family::Map(Map::Wpff(m)) => {
                let mut map = Wpff::new(d, m, seed)?;
                if let Some(fit) = calibrated {
                    map = map.calibrated(fit)?;
                }
                self.with_map(d, map, fit)?
            }
            Family::Map(Map::Official) => {
                let mut random = ChaCha8Rng::seed_from_u64(seed);
                let mut radius = || {
                    let uniform = (f64::from(random.next_u32()) + 0.5) / 2_f64.powi(32);
                    projection::normal_quantile(uniform).map(T::from_f64)
                };
                let radii = (0..d).map(|_| radius()).collect::<Result<Array1<T>, _>>()?;
                Arc::new(self.linear(OfficialDijiang::new(radii)?).with_scale(1.0))
            }
            Family::Map(Map::Learned(m)) => {
                let map = LearnedFeatures::from_map(&DctFeatures::<T>::new(d, m, seed)?)?;
                self.with_map(d, map, fit)?
            }
            Family::Map(Map::Hedgehog) => self.with_map(d, LearnedFeatures::hedgehog(d)?, fit)?,
            Family::Map(Map::Elu) => Arc::new(self.linear(EluFeatures::new(d)?)),
            Family::Map(Map::Relu) => Arc::new(self.linear(ReluFeatures::new(d)?)),
        })
    }

    /// A map in linear attention, or behind a window.
    fn with_map<T: Scalar>(
        &self,
        d: usize,
        map: impl FeatureMap<T> + 'static,
        fit: Option<&Calibration>,
    ) -> Result<AnyKernel<T>> {
        if self.is_hybrid() {
            let features = map.num_features();
            let far = match self.options.decay {
                Some(longest) => Far::decaying_features(map, decays(features, longest)),
                None => Far::features(map),
            };
            self.hybrid(d, far, fit)
        } else {
            Ok(Arc::new(self.linear(map)))
        }
    }

    /// A map in linear attention, with a decay for each feature if one is given.
    fn linear<T: Scalar, F: FeatureMap<T>>(&self, map: F) -> LinearAttention<F> {
        let decays = self.options.decay.map(|longest| decays(map.num_features(), longest));
        decays.into_iter().fold(LinearAttention::new(map), LinearAttention::with_channel_decay)
    }

    fn merged(&self, entries: usize, calibrated: Option<&Calibration>) -> Merged {
        let options = &self.options;
        let mut far = Merged::new(entries);
        if let Some(decay) = options.decay {
            far = far.decay(decay);
        }
        if let Some(min_age) = options.min_age {
            far = far.min_age(min_age);
        }
        if let Some(block) = options.block {
            far = far.block(block);
        }
        if let Some(value_weight) = options.value_weight {
            far = far.value_weight(value_weight);
        }
        if let Some(metric) = options.metric {
            far = far.metric(metric);
        }
        if let Some(fit) = calibrated {
            far = far.calibrated(fit);
        }
        far
    }

    fn hybrid<T: Scalar>(
        &self,
        d: usize,
        far: impl Into<Far<T>>,
        fit: Option<&Calibration>,
    ) -> Result<AnyKernel<T>> {
        let heavy = self.options.heavy.unwrap_or(0);
        let mut builder = HybridAttention::builder(d)
            .window(self.window())
            .sinks(self.sinks())
            .heavy(heavy)
            .state_format(self.state())
            .far(far);
        if let Some(fit) = fit.filter(|_| heavy > 0 || matches!(self.family, Family::Taylor(_))) {
            builder = builder.calibrated(fit);
        }
        Ok(Arc::new(builder.build()?))
    }

    /// A map behind sinks needs no window.
    fn window(&self) -> usize {
        let default = if matches!(self.family, Family::Map(_)) { 0 } else { 64 };
        self.options.window.unwrap_or(default)
    }

    fn sinks(&self) -> usize {
        self.options.sinks.unwrap_or(4)
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// A name without the choice of exact heads, and what was learned.
#[must_use]
pub fn without_choice(name: &str) -> String {
    let about_heads = |part: &&str| CHOICES.iter().any(|key| part.starts_with(key));
    name.split(',').filter(|part| !about_heads(part)).collect::<Vec<_>>().join(",")
}

const CHOICES: [&str; 4] = ["exact=", "by=", "plan=", "adapted="];

/// Bytes of the states of all layers after so many tokens.
pub fn state_bytes(layers: &[MultiHead<f32>], config: &Config, tokens: usize) -> Result<usize> {
    layers.iter().try_fold(0_usize, |sum, layer| {
        Ok(sum.saturating_add(layer.state_bytes(config.value_dim, tokens)?))
    })
}

/// The most tokens that a part of a kernel may hold, and the most features: what no context and no
/// memory is large enough for. More would be a slip.
const MOST_TOKENS: usize = 1 << 20;
/// The crate merges 16 384 entries at most, with those of a block.
const MOST_ENTRIES: usize = (1 << 14) - 1;
const MOST_FEATURES: usize = 1 << 16;

fn count(what: &str, text: &str, within: RangeInclusive<usize>) -> Result<usize> {
    let needed = format!("a whole number from {} to {}", within.start(), within.end());
    number(what, text, |n| within.contains(n), &needed)
}

/// A number as it was written, or an error with it.
fn number<N: FromStr>(
    what: &str,
    text: &str,
    fits: impl Fn(&N) -> bool,
    needed: &str,
) -> Result<N> {
    match text.trim().parse() {
        Ok(number) if fits(&number) => Ok(number),
        _ => bail!("`{what}` is {}, not {needed}", if text.is_empty() { "empty" } else { text }),
    }
}

/// Decays `γ_i` of features from one half, or less, to the longest, their `1 − γ_i` evenly in
/// ratios, so that some features hold the last words and some the whole text.
fn decays(features: usize, longest: f64) -> Array1<f64> {
    const GOLDEN: f64 = 0.618_033_988_749_895;
    let shortest = 0.5_f64.min(longest);
    // neighbouring features are often alike, and get decays far apart
    Array1::from_shape_fn(features, |i| {
        let share = ((i + 1) as f64 * GOLDEN).fract();
        1.0 - (1.0 - shortest).powf(1.0 - share) * (1.0 - longest).powf(share)
    })
}
