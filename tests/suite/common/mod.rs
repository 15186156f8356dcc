//! What the tests share: random input, tolerances in units of epsilon, golden files, and the list
//! of every kernel and every map with its formula in `attention::naive`.
#![allow(dead_code)]

pub mod alibi;
pub mod checker;
pub mod formats;
pub mod gradients;
pub mod hybrid;
pub mod written;

use dijiang::attention::naive::{self, features::Features, options, options::Options};
use dijiang::{
    Attention, CalibratedTaylor, Calibration, CalibrationOptions, DctFeatures, EluFeatures, Far,
    FeatureMap, HybridAttention, IdentityFeatures, LearnedFeatures, LearnedForm, LinearAttention,
    Mask, MergeCost, Merged, Metric, OfficialDijiang, Performer, Points, Radii, ReluFeatures,
    Scalar, SoftmaxAttention, StateFormat, TaylorFeatures, Ward, Wpff,
};
use hybrid::{FarFormula, HybridFormula, Received};
use ndarray::{Array1, Array2, ArrayView2};
use std::sync::Arc;

/// Standard normal numbers times `size`, `[n, d]`.
pub fn normal<T: Scalar>(n: usize, d: usize, size: f64, seed: u64) -> Array2<T> {
    if n * d == 0 {
        return Array2::zeros((n, d));
    }
    let x = Performer::<f64>::iid(d, n, seed).unwrap();
    x.projection().mapv(|x| T::from_f64(x * size))
}

/// Queries, keys and values of `n` tokens, with `|x|` of about `size·√d`.
pub fn tokens<T: Scalar>(n: usize, d: usize, dv: usize, size: f64, seed: u64) -> [Array2<T>; 3] {
    [
        normal(n, d, size, 3 * seed),
        normal(n, d, size, 3 * seed + 1),
        normal(n, dv, 1.0, 3 * seed + 2),
    ]
}

pub fn wide<T: Scalar>(x: &Array2<T>) -> Array2<f64> {
    x.mapv(|x| x.as_f64())
}

/// `φ(√scale·x)` of a map of the crate, row by row, in f64.
pub fn features(map: &dyn FeatureMap<f64>, x: &Array2<f64>, scale: f64, keys: bool) -> Features {
    let mut values = Array2::from_elem((x.nrows(), map.num_features()), f64::NAN);
    let mut log_scale = Array1::from_elem(x.nrows(), f64::NAN);
    let x = x * scale.sqrt();
    if keys {
        map.map_keys(x.view(), values.view_mut(), log_scale.view_mut()).unwrap();
    } else {
        map.map_queries(x.view(), values.view_mut(), log_scale.view_mut()).unwrap();
    }
    Features { values, log_scale }
}

/// Fails unless `|a − b| ≤ units·ε·max|b|` everywhere; says where it is worst.
#[track_caller]
pub fn assert_close<T: Scalar>(what: &str, a: &Array2<T>, b: &Array2<f64>, units: f64) {
    assert_eq!(a.dim(), b.dim(), "{what}: shapes");
    let size = b.iter().fold(0.0_f64, |m, x| m.max(x.abs())).max(f64::MIN_POSITIVE);
    let mut worst = (0.0, (0, 0));
    for (at, (x, y)) in a.indexed_iter().map(|(at, x)| (at, (x.as_f64(), b[at]))) {
        let error = (x - y).abs() / size / T::epsilon().as_f64();
        if error > worst.0 || error.is_nan() {
            worst = (if error.is_nan() { f64::INFINITY } else { error }, at);
        }
    }
    let (units_found, at) = worst;
    assert!(
        units_found <= units,
        "{what}: {units_found:.1} units of epsilon ({}) at {at:?}, allowed {units}: {} instead of \
         {}",
        T::NAME,
        a[at],
        b[at]
    );
}

/// One kernel of the crate, in both number types, with what it promises.
pub struct Subject {
    pub name: String,
    pub head_dim: usize,
    pub f64: Arc<dyn Attention<f64>>,
    pub f32: Arc<dyn Attention<f32>>,
    pub formula: Formula,
    /// Weights are positive: outputs stay in the hull of the values.
    pub positive: bool,
    pub scale: f64,
}

/// What a kernel computes.
pub enum Formula {
    Softmax,
    /// The map in f64 and whether its outputs are normalised.
    Linear(Arc<dyn FeatureMap<f64>>, bool),
    Hybrid(HybridFormula),
    Written(Written),
}

/// The output of queries, keys and values.
type Output = dyn Fn([&Array2<f64>; 3], Mask) -> Array2<f64>;

/// A formula as a function, in f64, and what its kernel promises.
pub struct Written {
    pub output: Box<Output>,
    /// The masks the kernel has a meaning for; without `Causal` it has no streams.
    pub masks: &'static [Mask],
    pub normalized: bool,
    /// Whether large norms may leave the range of f32.
    pub has_features: bool,
    /// The documented size of the state for a value dimension and a number of tokens.
    pub state: Box<dyn Fn(usize, usize) -> usize>,
}

/// A map in one number type by its name.
pub fn map<T: Scalar>(name: &str, d: usize, m: usize, seed: u64) -> Arc<dyn FeatureMap<T>> {
    let even = m.div_ceil(2) * 2;
    match name {
        "performer" => Arc::new(Performer::new(d, m, seed).unwrap()),
        "performer-iid" => Arc::new(Performer::iid(d, m, seed).unwrap()),
        "performer-hyperbolic" => Arc::new(Performer::hyperbolic(d, even, seed).unwrap()),
        "dct" => Arc::new(DctFeatures::new(d, m, seed).unwrap()),
        "dct-antithetic" => Arc::new(
            DctFeatures::new(d, even, seed).unwrap().with_radii(Radii::Antithetic).unwrap(),
        ),
        "dct-normal" => {
            Arc::new(DctFeatures::new(d, m, seed).unwrap().with_radii(Radii::Normal).unwrap())
        }
        "official" => Arc::new(official(d, seed)),
        "wpff" => Arc::new(Wpff::new(d, m, seed).unwrap()),
        "wpff-sobol" => {
            Arc::new(Wpff::with_sampling(d, m, seed, Points::Sobol, Radii::Sobol).unwrap())
        }
        "wpff-weighted" => {
            let weights = Array1::from_shape_fn(m, |i| T::from_f64([0.0, 0.5, 1.0, 2.0][i % 4]));
            let weights = if m == 1 { Array1::ones(1) } else { weights };
            Arc::new(Wpff::new(d, m, seed).unwrap().with_weights(weights).unwrap())
        }
        "taylor" => Arc::new(TaylorFeatures::new(d).unwrap()),
        "taylor-calibrated" => {
            // correlated, so that means, bases and coefficients are far from trivial
            let [q, k, _] = tokens::<f64>(120, d, 1, 0.7, seed);
            let (q, k) = (&q * 0.5 + &k + 0.2, &k - 0.3);
            let calibration =
                Calibration::from_samples(q.view(), k.view(), CalibrationOptions::new()).unwrap();
            Arc::new(CalibratedTaylor::new(d.min(4), &calibration).unwrap())
        }
        "elu" => Arc::new(EluFeatures::new(d).unwrap()),
        "relu" => Arc::new(ReluFeatures::new(d).unwrap()),
        "relu-projected" => {
            Arc::new(ReluFeatures::from_projection(normal(m, d, 1.0, seed)).unwrap())
        }
        "hedgehog" => Arc::new(learned(d, m, true, seed)),
        "learned" => Arc::new(learned(d, m, false, seed)),
        "identity" => Arc::new(IdentityFeatures::new(d).unwrap()),
        _ => panic!("no map {name}"),
    }
}

pub const MAPS: [&str; 17] = [
    "performer",
    "performer-iid",
    "performer-hyperbolic",
    "dct",
    "dct-antithetic",
    "dct-normal",
    "official",
    "wpff",
    "wpff-sobol",
    "wpff-weighted",
    "taylor",
    "taylor-calibrated",
    "elu",
    "relu",
    "relu-projected",
    "hedgehog",
    "learned",
];

/// Maps whose products have either sign, so that nothing can be divided by their sum.
pub const SIGNED_MAPS: [&str; 1] = ["identity"];

/// The released code's map, with radii drawn as it draws them.
pub fn official<T: Scalar>(d: usize, seed: u64) -> OfficialDijiang<T> {
    let radii = normal::<f64>(1, d, 1.0, seed).row(0).mapv(T::from_f64);
    OfficialDijiang::new(radii).unwrap()
}

/// A learned map somewhere on its way: Hedgehog's, or exponentials.
pub fn learned<T: Scalar>(d: usize, m: usize, hedgehog: bool, seed: u64) -> LearnedFeatures<T> {
    let rows = if hedgehog { m.div_ceil(2) } else { m };
    let form = if hedgehog { LearnedForm::Softmax } else { LearnedForm::Exponential };
    let projections = [seed, seed + 1].map(|seed| normal(rows, d, 0.8, seed));
    let biases = [seed + 2, seed + 3].map(|seed| normal(1, rows, 0.5, seed).row(0).to_owned());
    LearnedFeatures::from_parts(form, hedgehog, projections, biases).unwrap()
}

/// Every kernel of the crate.
pub fn subjects(d: usize, m: usize) -> Vec<Subject> {
    let default = 1.0 / (d as f64).sqrt();
    let mut all = vec![Subject {
        name: format!("softmax d={d}"),
        head_dim: d,
        f64: Arc::new(SoftmaxAttention::new(d).unwrap()),
        f32: Arc::new(SoftmaxAttention::new(d).unwrap()),
        formula: Formula::Softmax,
        positive: true,
        scale: default,
    }];
    all.extend(hybrids(d, m));
    for name in MAPS.into_iter().chain(SIGNED_MAPS) {
        for normalized in [true, false] {
            if normalized && SIGNED_MAPS.contains(&name) {
                continue;
            }
            let (wide, narrow) = (map::<f64>(name, d, m, 5), map::<f32>(name, d, m, 5));
            let scale = if name == "official" { 1.0 } else { default };
            let build = |unnormalized| if unnormalized { " unnormalized" } else { "" };
            let (a, b) = (LinearAttention::new(wide.clone()), LinearAttention::new(narrow));
            let (a, b) = if normalized { (a, b) } else { (a.unnormalized(), b.unnormalized()) };
            all.push(Subject {
                name: format!("{name}{} d={d} m={}", build(!normalized), wide.num_features()),
                head_dim: d,
                f64: Arc::new(a.with_scale(scale)),
                f32: Arc::new(b.with_scale(scale)),
                formula: Formula::Linear(wide, normalized),
                positive: true,
                scale,
            });
        }
    }
    all
}

/// Softmax attention with options, its state in a format.
pub fn softmax<T: Scalar>(
    d: usize,
    format: StateFormat,
    all: Options,
    slope: Option<f64>,
) -> Arc<dyn Attention<T>> {
    let mut kernel = SoftmaxAttention::new(d).unwrap().with_state_format(format);
    if let Some(cap) = all.soft_cap {
        kernel = kernel.with_soft_cap(cap).unwrap();
    }
    if let Some(logit) = all.sink_logit {
        kernel = kernel.with_sink_logit(logit).unwrap();
    }
    if let Some(slope) = slope {
        kernel = kernel.with_alibi_slope(slope).unwrap();
    }
    Arc::new(kernel)
}

/// Softmax attention with options, and hybrids with a cap, a learned sink or both.
pub fn optional_subjects(d: usize, m: usize) -> Vec<Subject> {
    let scale = 1.0 / (d as f64).sqrt();
    let capped = Options { soft_cap: Some(1.5), sink_logit: None };
    let with_sink = Options { soft_cap: None, sink_logit: Some(2.0) };
    let both = Options { soft_cap: Some(50.0), sink_logit: Some(-0.5) };
    let cases = [
        (capped, None),
        (with_sink, None),
        (Options::default(), Some(0.25)),
        (both, Some(0.001)),
        (Options { soft_cap: Some(0.1), sink_logit: Some(90.0) }, None),
    ];
    let exact = cases.into_iter().map(|(all, slope)| Subject {
        name: format!("softmax d={d} {all:?} slope {slope:?}"),
        head_dim: d,
        f64: softmax(d, StateFormat::F32, all, slope),
        f32: softmax(d, StateFormat::F32, all, slope),
        positive: true,
        scale,
        formula: Formula::Written(Written {
            masks: &[Mask::Causal, Mask::Full],
            normalized: all.sink_logit.is_none(),
            has_features: false,
            state: Box::new(move |dv, tokens| tokens * (d + dv)),
            output: Box::new(move |[q, k, v], mask| {
                let capped = naive::scores(q, k, scale)
                    .mapv(|score| options::soft_capped(score, all.soft_cap));
                let logs = options::alibi(capped, slope.unwrap_or(0.0), mask);
                options::with_sink(&logs, v, all.sink_logit, mask)
            }),
        }),
    });
    let hybrids = hybrids(d, m).into_iter().enumerate().filter_map(move |(i, mut subject)| {
        let Formula::Hybrid(formula) = &mut subject.formula else { return None };
        let is_features = formula.far.has_features();
        let options = if is_features { with_sink } else { [capped, both, with_sink][i % 3] };
        formula.options = options;
        subject.name = format!("{options:?} {}", subject.name);
        (subject.f64, subject.f32) =
            (Arc::new(hybrid::<f64>(formula, d, m)), Arc::new(hybrid::<f32>(formula, d, m)));
        Some(subject)
    });
    exact.chain(hybrids).collect()
}

/// Some of them, behind positions, and those that are made with positions.
pub fn written_subjects(d: usize, m: usize) -> Vec<Subject> {
    let chosen = [
        "softmax",
        "elu d",
        "performer d",
        "identity unnormalized",
        "hybrid window 9 sinks 2 heavy 0 None",
        "hybrid window 8 sinks 2 heavy 0 Features",
        "hybrid window 7 sinks 1 heavy 0 Ward",
        "hybrid window 0 sinks 4 heavy 0 Ward",
        "hybrid window 20 sinks 4 heavy 0 Merged",
    ];
    let is_chosen = |subject: &Subject| chosen.iter().any(|start| subject.name.starts_with(start));
    let others: Vec<Subject> = subjects(d, m).into_iter().filter(is_chosen).collect();
    assert!(others.len() > chosen.len(), "names have changed: {} are left", others.len());
    written::written(d, others)
}

/// A far memory in one number type; a calibration of its own is for merged entries.
fn far<T: Scalar>(
    formula: &FarFormula,
    calibration: Option<&Calibration>,
    d: usize,
    m: usize,
) -> Far<T> {
    match formula {
        FarFormula::None => Far::none(),
        FarFormula::Features(_) => Far::features(map::<T>("performer", d, m, 5)),
        FarFormula::Decaying(_, decay) => {
            Far::decaying_features(map::<T>("performer", d, m, 5), decay.clone().into())
        }
        FarFormula::Taylor(rank, _) => Far::taylor(*rank),
        FarFormula::Ward { entries, block } => Ward::new(*entries).block(*block).into(),
        FarFormula::WardCalibrated { entries, .. } => Far::ward(*entries),
        FarFormula::Merged(rule) => {
            let far = Merged::new(rule.entries)
                .block(rule.block)
                .decay(rule.gamma)
                .min_age(rule.min_age)
                .cost(rule.cost);
            let far = if rule.diagonal { far } else { far.metric(Metric::Identity) };
            calibration.iter().fold(far, |far, c| far.calibrated(c)).into()
        }
    }
}

/// The kernel of a formula.
pub fn hybrid<T: Scalar>(formula: &HybridFormula, d: usize, m: usize) -> HybridAttention<T> {
    hybrid_in(StateFormat::F32, formula, d, m)
}

/// The same with a state in a format.
pub fn hybrid_in<T: Scalar>(
    format: StateFormat,
    formula: &HybridFormula,
    d: usize,
    m: usize,
) -> HybridAttention<T> {
    let builder = HybridAttention::builder(d)
        .state_format(format)
        .window(formula.window)
        .sinks(formula.sinks)
        .heavy(formula.heavy);
    let Options { soft_cap, sink_logit } = formula.options;
    let builder = soft_cap.iter().fold(builder, |builder, cap| builder.soft_cap(*cap));
    let builder = sink_logit.iter().fold(builder, |builder, logit| builder.sink_logit(*logit));
    let calibration = formula.calibration.as_deref();
    if formula.metric.is_some() && calibration.is_some() {
        return builder.far(far(&formula.far, calibration, d, m)).build().unwrap();
    }
    let builder = builder.far(far(&formula.far, None, d, m));
    let builder = calibration.iter().fold(builder, |builder, c| builder.calibrated(c));
    builder.build().unwrap()
}

/// The two costs of received-attention merging.
pub const PRODUCT: MergeCost = MergeCost::Product;
pub const WARD: MergeCost = MergeCost::Ward { value_weight: 4.0 };

/// The default options of received-attention merging.
pub const RECEIVED: Received =
    Received { entries: 12, block: 1, gamma: 0.98, min_age: 10, cost: PRODUCT, diagonal: true };

/// Hybrids of every far memory, with and without windows, sinks and blocks.
pub fn hybrids(d: usize, m: usize) -> Vec<Subject> {
    let features = || FarFormula::Features(map::<f64>("performer", d, m, 5));
    // some forget at once, some hardly
    let decays = (0..m).map(|i| [0.6, 0.999, 0.97, 0.02, 0.3][i % 5]).collect::<Vec<_>>();
    let decaying = || FarFormula::Decaying(map::<f64>("performer", d, m, 5), decays.clone());
    let merged = |change: fn(&mut Received)| {
        let mut rule = RECEIVED;
        change(&mut rule);
        FarFormula::Merged(rule)
    };
    let [q, k, _] = tokens::<f64>(200, d, 1, 0.7, 77);
    let options = CalibrationOptions::new().with_window(8).with_sinks(1);
    let calibration = Arc::new(Calibration::from_samples(q.view(), k.view(), options).unwrap());
    let rank = d.min(3);
    let taylor =
        || FarFormula::Taylor(rank, Arc::new(CalibratedTaylor::new(rank, &calibration).unwrap()));
    let metric = Arc::new(calibration.metric());
    let ward = || FarFormula::WardCalibrated { entries: 6, metric: metric.clone() };
    let calibrated = [
        (8, 1, 0, taylor()),
        (0, 2, 0, taylor()),
        (8, 1, 3, taylor()),
        (0, 0, 5, taylor()),
        (7, 1, 0, ward()),
        (0, 0, 4, ward()),
        (9, 2, 4, merged(|_| {})),
        (9, 2, 4, merged(|rule| rule.block = 4)),
        (9, 2, 4, merged(|rule| rule.cost = WARD)),
        (9, 2, 4, merged(|rule| (rule.cost, rule.block) = (WARD, 4))),
        (6, 0, 3, FarFormula::None),
        (9, 1, 0, merged(|rule| rule.min_age = 2)),
    ];
    let plain = [
        (9, 2, FarFormula::None),
        (40, 0, FarFormula::None),
        (0, 3, FarFormula::None),
        (8, 2, features()),
        (0, 0, features()),
        (0, 5, features()),
        (7, 1, FarFormula::Ward { entries: 6, block: 1 }),
        (7, 1, FarFormula::Ward { entries: 6, block: 4 }),
        (0, 0, FarFormula::Ward { entries: 10, block: 1 }),
        (0, 4, FarFormula::Ward { entries: 10, block: 8 }),
        (20, 4, merged(|_| {})),
        (20, 4, merged(|rule| rule.block = 8)),
        (20, 4, merged(|rule| (rule.cost, rule.min_age) = (WARD, 16))),
        (20, 4, merged(|rule| (rule.cost, rule.block) = (WARD, 8))),
        (5, 0, merged(|rule| (rule.min_age, rule.diagonal, rule.block) = (0, false, 3))),
        (6, 1, merged(|rule| (rule.min_age, rule.diagonal, rule.gamma) = (3, false, 1.0))),
        (1, 1, merged(|rule| (rule.entries, rule.gamma) = (1, 0.9))),
        (1, 1, merged(|rule| rule.cost = MergeCost::Ward { value_weight: 0.0 })),
        (0, 0, merged(|rule| (rule.entries, rule.block) = (5, 2))),
    ];
    let plain = plain.into_iter().map(|(window, sinks, far)| (window, sinks, 0, far, None));
    let calibrated = calibrated
        .into_iter()
        .map(|(window, sinks, heavy, far)| (window, sinks, heavy, far, Some(calibration.clone())));
    let forgetting = [(8, 2), (0, 0), (0, 4)];
    let forgetting =
        forgetting.into_iter().map(|(window, sinks)| (window, sinks, 0, decaying(), None));
    plain
        .chain(calibrated)
        .chain(forgetting)
        .map(|(window, sinks, heavy, far, calibration)| {
            let name =
                format!("hybrid window {window} sinks {sinks} heavy {heavy} {far:.60?} d={d}");
            // calibrated merging without heavy keys takes its metric from the calibration
            let metric =
                calibration.as_ref().filter(|_| heavy == 0 && matches!(far, FarFormula::Merged(_)));
            let product = matches!(&far, FarFormula::Merged(rule) if rule.cost == PRODUCT);
            let metric = metric.map(|calibration| {
                let metric = calibration.metric();
                if product {
                    return metric;
                }
                let mean = metric.mapv(|x| x * x).sum() / metric.nrows() as f64;
                metric / mean.sqrt()
            });
            let options = Options::default();
            let format = StateFormat::F32;
            let formula =
                HybridFormula { window, sinks, heavy, far, calibration, metric, format, options };
            Subject {
                name,
                head_dim: d,
                f64: Arc::new(hybrid::<f64>(&formula, d, m)),
                f32: Arc::new(hybrid::<f32>(&formula, d, m)),
                positive: true,
                scale: 1.0 / (d as f64).sqrt(),
                formula: Formula::Hybrid(formula),
            }
        })
        .collect()
}

/// The documented size of the state of linear attention whose features do not decay by rates of
/// their own: the sums and their errors, the log scale, and room for sixteen tokens that wait.
pub fn linear_floats(features: usize, dv: usize) -> usize {
    2 * features * (dv + 1) + 1 + 16 * (features + dv)
}

impl Subject {
    pub fn normalized(&self) -> bool {
        match &self.formula {
            Formula::Linear(_, normalized) | Formula::Written(Written { normalized, .. }) => {
                *normalized
            }
            Formula::Softmax => true,
            Formula::Hybrid(hybrid) => hybrid.options.sink_logit.is_none(),
        }
    }

    /// The masks the kernel has a meaning for.
    pub fn masks(&self) -> &'static [Mask] {
        match &self.formula {
            Formula::Hybrid(HybridFormula { window, far, .. })
                if *window > 0
                    || matches!(far, FarFormula::Merged(_) | FarFormula::Decaying(..)) =>
            {
                &[Mask::Causal]
            }
            // with sinks alone, a token that is none of them sees nothing
            Formula::Hybrid(HybridFormula {
                sinks: 0, heavy: 0, far: FarFormula::None, ..
            }) => &[Mask::Causal],
            Formula::Written(written) => written.masks,
            _ => &[Mask::Causal, Mask::Full],
        }
    }

    /// How its state is kept: what its name begins with.
    pub fn format(&self) -> StateFormat {
        let first = self.name.split(' ').next().unwrap();
        first.parse().unwrap_or_default()
    }

    /// Units of epsilon that it may differ from its formula. In `f32` a mean that lies between two
    /// numbers of a format is rounded to another than in `f64`, now and then, and other pairs are
    /// merged from there on: only the size of the output is left.
    pub fn units<T: Scalar>(&self) -> f64 {
        if self.merges() && self.format() != StateFormat::F32 && T::NAME == "f32" {
            0.6 / T::epsilon().as_f64()
        } else {
            checker::units::<T>(60.0)
        }
    }

    /// Whether it merges entries.
    pub fn merges(&self) -> bool {
        let Formula::Hybrid(HybridFormula { far, .. }) = &self.formula else { return false };
        !(far.has_features() || matches!(far, FarFormula::None))
    }

    pub fn has_streams(&self) -> bool {
        self.masks().contains(&Mask::Causal)
    }

    pub fn has_features(&self) -> bool {
        match &self.formula {
            Formula::Softmax => false,
            Formula::Linear(..) => true,
            Formula::Hybrid(hybrid) => hybrid.far.has_features(),
            Formula::Written(written) => written.has_features,
        }
    }

    pub fn grows(&self) -> bool {
        self.state_floats(1, 1000) > self.state_floats(1, 999)
    }

    /// The documented size of the state.
    pub fn state_floats(&self, dv: usize, tokens: usize) -> usize {
        let token = self.head_dim + dv;
        let HybridFormula { window, sinks, heavy, far, metric, .. } = match &self.formula {
            Formula::Softmax => return tokens * token,
            Formula::Linear(map, _) => return linear_floats(map.num_features(), dv),
            Formula::Written(written) => return (written.state)(dv, tokens),
            Formula::Hybrid(hybrid) => hybrid,
        };
        let (received, block, far) = match far {
            FarFormula::None => (0, 1, 0),
            FarFormula::Features(map) | FarFormula::Taylor(_, map) => {
                (0, 1, 2 * map.num_features() * (dv + 1) + 1)
            }
            FarFormula::Decaying(map, _) => (0, 1, 2 * map.num_features() * (dv + 1) + 2),
            FarFormula::Ward { entries, block } => (0, *block, entries * (token + 2)),
            FarFormula::WardCalibrated { entries, .. } => (0, 1, entries * (token + 2)),
            FarFormula::Merged(rule) => {
                let diagonal = rule.diagonal && metric.is_none();
                let units =
                    if diagonal { self.head_dim } else { 0 } + usize::from(rule.counts_values());
                (1, rule.block, rule.entries * (token + 2) + units)
            }
        };
        sinks * token
            + (window + block - 1) * (token + received)
            + heavy * (token + 1 + received)
            + far
    }

    /// The kernel's formula, naively, in f64.
    pub fn oracle(
        &self,
        q: &Array2<f64>,
        k: &Array2<f64>,
        v: &Array2<f64>,
        mask: Mask,
    ) -> Array2<f64> {
        match &self.formula {
            Formula::Softmax => naive::softmax(q, k, v, self.scale, mask),
            Formula::Linear(map, normalized) => {
                let phi_q = features(&**map, q, self.scale, false);
                let phi_k = features(&**map, k, self.scale, true);
                if *normalized {
                    naive::linear::normalized(&phi_q, &phi_k, v, mask)
                } else {
                    naive::linear::unnormalized(&phi_q, &phi_k, v, mask)
                }
            }
            Formula::Hybrid(formula) => {
                let [k, v] = [k, v].map(|x| naive::formats::rounded(x, self.format()));
                if mask == Mask::Full {
                    return formula.full(q, &k, &v, self.scale);
                }
                let q = [vec![q.clone()]];
                formula.causal(&q, &[k], &[v], self.scale, false).remove(0).remove(0)
            }
            Formula::Written(written) => (written.output)([q, k, v], mask),
        }
    }
}

/// A golden file.
pub fn golden(name: &str) -> serde_json::Value {
    let path = format!("{}/data/{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

pub fn vector(value: &serde_json::Value) -> Array1<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

pub fn matrix(value: &serde_json::Value) -> Array2<f64> {
    let rows: Vec<Array1<f64>> = value.as_array().unwrap().iter().map(vector).collect();
    Array2::from_shape_fn((rows.len(), rows[0].len()), |(i, j)| rows[i][j])
}

/// One head of the embedded file.
pub struct Head {
    pub name: &'static str,
    pub mask: Mask,
    pub test: [Array2<f64>; 3],
    pub calibration: [Array2<f64>; 3],
}

/// The heads of `data/heads.safetensors`.
pub fn heads() -> Vec<Head> {
    let bytes =
        std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../data/heads.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let read = |name: String| -> Array2<f64> {
        let tensor = file.tensor(&name).unwrap();
        assert_eq!(tensor.dtype(), safetensors::Dtype::F32);
        let numbers: Vec<f64> = tensor
            .data()
            .chunks_exact(4)
            .map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())))
            .collect();
        Array2::from_shape_vec((tensor.shape()[0], tensor.shape()[1]), numbers).unwrap()
    };
    ["L00H4", "L11H5", "L17H4", "L29H2", "M02H3"]
        .into_iter()
        .map(|name| Head {
            name,
            mask: if name.starts_with('L') { Mask::Causal } else { Mask::Full },
            test: ["q", "k", "v"].map(|x| read(format!("{name}/test/{x}"))),
            calibration: ["q", "k", "v"].map(|x| read(format!("{name}/calibration/{x}"))),
        })
        .collect()
}

/// A view as a user of another layout has it: every second row and column of a larger array,
/// reversed twice.
pub fn strided<T: Scalar>(x: ArrayView2<'_, T>) -> Array2<T> {
    let mut large = Array2::from_elem((2 * x.nrows(), 3 * x.ncols()), T::nan());
    large.slice_mut(ndarray::s![..;2, ..;3]).assign(&x);
    large
}

/// Runs an example as a person does, with the features of the tests. Where `EXAMPLES_FOLDER` is
/// set, the programs there are taken as they are.
pub fn run_example(name: &str, arguments: &[&str]) -> std::process::Output {
    let mut command = if let Some(folder) = std::env::var_os("EXAMPLES_FOLDER") {
        std::process::Command::new(std::path::Path::new(&folder).join(name))
    } else {
        let features = [
            ("rayon", cfg!(feature = "rayon")),
            ("serde", cfg!(feature = "serde")),
            ("safetensors", cfg!(feature = "safetensors")),
        ];
        let mut command = std::process::Command::new(env!("CARGO"));
        command.args(["run", "--quiet", "--example", name]);
        let wanted = features.iter().filter(|(_, is_on)| *is_on);
        wanted.for_each(|(feature, _)| _ = command.args(["--features", feature]));
        command.arg("--");
        command
    };
    command
        .args(arguments)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .output()
        .unwrap()
}
