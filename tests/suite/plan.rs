//! Plans: the costs are what the formula says, and the settings are the best within the budget.

use crate::common::normal;
use dijiang::attention::naive;
use dijiang::{
    Attention, Budget, Error, Head, HeadPlan, HeadSample, HeadSetting, HybridAttention, Mask,
    Merged, ModelSizes, MultiHead, PlanOptions, PlanSample, Scratch, SoftmaxAttention, StatePlan,
    StatePlanner,
};
use ndarray::{Array2, Array3, Array4, Axis, s};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Two layers of two kv heads, each for two query heads, of one text.
struct Text {
    q: Vec<Array3<f64>>,
    kv: Vec<[Array2<f64>; 2]>,
    g: Vec<Array3<f64>>,
}

const LAYERS: usize = 2;
const KV_HEADS: usize = 2;
const GROUP: usize = 2;
const D: usize = 4;
const DV: usize = 3;

fn cube(n: usize, d: usize, size: f64, seed: u64) -> Array3<f64> {
    let numbers = normal::<f64>(GROUP * n, d, size, seed).into_raw_vec_and_offset().0;
    Array3::from_shape_vec((GROUP, n, d), numbers).unwrap()
}

impl Text {
    fn new(n: usize, seed: u64) -> Self {
        let size = [0.5, 2.0, 0.2, 1.0];
        let heads = LAYERS * KV_HEADS;
        let seed = |part: usize, h: usize| seed + (100 * part + h) as u64;
        let kv = |h| [normal(n, D, 1.0, seed(1, h)), normal(n, DV, 1.0, seed(2, h))];
        Self {
            q: (0..heads).map(|h| cube(n, D, size[h], seed(0, h))).collect(),
            kv: (0..heads).map(kv).collect(),
            g: (0..heads).map(|h| cube(n, DV, 0.1, seed(3, h))).collect(),
        }
    }

    fn sample(&self, h: usize) -> PlanSample<'_, f64> {
        let [k, v] = &self.kv[h];
        let (layer, kv_head) = (h / KV_HEADS, h % KV_HEADS);
        let (q, k, v) = (self.q[h].view(), k.view(), v.view());
        PlanSample::from(HeadSample { layer, kv_head, q, k, v }).with_sensitivity(self.g[h].view())
    }

    fn samples(&self) -> Vec<PlanSample<'_, f64>> {
        (0..LAYERS * KV_HEADS).map(|h| self.sample(h)).collect()
    }
}

fn without(sample: PlanSample<'_, f64>) -> PlanSample<'_, f64> {
    PlanSample { sensitivity: None, ..sample }
}

const WINDOWS: [(usize, &[usize]); 2] = [(8, &[4, 8, 16]), (4, &[4, 8])];

fn options(budget: Budget) -> PlanOptions {
    PlanOptions::new(budget).sinks(2).grid(&[0.9, 0.98], &WINDOWS)
}

fn merged(window: usize, entries: usize, decay: f64) -> HybridAttention<f64> {
    let far = Merged::new(entries).decay(decay).min_age(16.min(window / 2));
    HybridAttention::builder(D).window(window).sinks(2).far(far).build().unwrap()
}

/// The outputs of a hybrid, and those of softmax by its formula.
fn outputs(text: &Text, h: usize, setting: HeadSetting) -> [Array3<f64>; 2] {
    let [k, v] = &text.kv[h];
    let n = k.nrows();
    let mut exact = Array3::zeros((GROUP, n, DV));
    for g in 0..GROUP {
        let q = text.q[h].index_axis(Axis(0), g).to_owned();
        let out = naive::softmax(&q, k, v, 1.0 / (D as f64).sqrt(), Mask::Causal);
        exact.index_axis_mut(Axis(0), g).assign(&out);
    }
    let mut found = exact.clone();
    if let HeadSetting::Merged { window, entries, decay } = setting {
        let head = Head::group(text.q[h].view(), k.view(), v.view(), found.view_mut());
        let kernel = merged(window, entries, decay);
        kernel.forward_heads(&mut [head], Mask::Causal, &mut Scratch::new()).unwrap();
    }
    [exact, found]
}

/// `mean_t ½ (Σ_heads g_t·(õ_t − o_t))²` over some tokens, as it reads.
fn cost(text: &Text, h: usize, setting: HeadSetting, tokens: std::ops::Range<usize>) -> f64 {
    let [exact, found] = outputs(text, h, setting);
    let count = tokens.len() as f64;
    let of_token = |t: usize| {
        let change: f64 = (0..GROUP)
            .flat_map(|g| (0..DV).map(move |c| [g, t, c]))
            .map(|at| text.g[h][at] * (found[at] - exact[at]))
            .sum();
        0.5 * change * change
    };
    tokens.map(of_token).sum::<f64>() / count
}

/// The squared relative output error, as it reads.
fn relative(text: &Text, h: usize, setting: HeadSetting) -> f64 {
    let [exact, found] = outputs(text, h, setting);
    (&found - &exact).mapv(|x| x * x).sum() / exact.mapv(|x| x * x).sum()
}

fn close(found: f64, expected: f64) -> bool {
    (found - expected).abs() <= 1e-9 * expected.abs().max(1e-12)
}

/// Every measured setting of the grid, one by one: a grid of a single setting leaves no choice.
#[test]
fn costs_are_those_of_the_formula() {
    let text = Text::new(60, 1);
    for (window, sizes) in WINDOWS {
        for &entries in sizes {
            for decay in [0.9, 0.98] {
                let options = options(Budget::Slots(100)).grid(&[decay], &[(window, &[entries])]);
                let plan = StatePlan::fit(&text.samples(), &options).unwrap();
                let without: Vec<_> = text.samples().into_iter().map(without).collect();
                let plain = StatePlan::fit(&without, &options).unwrap();
                let setting = HeadSetting::Merged { window, entries, decay };
                for (h, (head, plain)) in plan.heads().iter().zip(plain.heads()).enumerate() {
                    assert_eq!((head.setting, plain.setting), (setting, setting));
                    let expected = cost(&text, h, setting, 0..60);
                    assert!(close(head.cost, expected), "{} for {expected}", head.cost);
                    let expected = relative(&text, h, setting);
                    assert!(close(plain.cost, expected), "{} for {expected}", plain.cost);
                }
                assert!(plan.has_sensitivities() && !plain.has_sensitivities());
            }
        }
    }
}

/// Costs at measured settings; between them ln C on a line over ln entries.
fn curve(text: &Text, h: usize, window: usize, sizes: &[usize], decay: f64) -> Vec<(usize, f64)> {
    let at = |entries| cost(text, h, HeadSetting::Merged { window, entries, decay }, 0..60);
    let mut curve = Vec::new();
    for pair in sizes.windows(2) {
        let [left, right] = [pair[0], pair[1]];
        let ends = [at(left).ln(), at(right).ln()];
        for entries in left..right {
            let part = (entries as f64 / left as f64).ln() / (right as f64 / left as f64).ln();
            curve.push((entries, (ends[0] + part * (ends[1] - ends[0])).exp()));
        }
    }
    let last = *sizes.last().unwrap();
    curve.push((last, at(last)));
    curve
}

/// The best cost of a head for each number of slots, of all settings.
fn best_by_slots(text: &Text, h: usize) -> Vec<f64> {
    let mut best = vec![f64::INFINITY; 25];
    for decay in [0.9, 0.98] {
        for (window, sizes) in WINDOWS {
            for (entries, cost) in curve(text, h, window, sizes, decay) {
                let slot = &mut best[window + entries];
                *slot = slot.min(cost);
            }
        }
    }
    best
}

/// The least total cost of all heads within each number of slots: every combination.
fn least_by_total(best: &[Vec<f64>], most: usize) -> Vec<f64> {
    let mut least = vec![0.0; most + 1];
    for of_head in best {
        let with = |total: usize| {
            let sizes = 0..=total.min(of_head.len() - 1);
            sizes.map(|size| least[total - size] + of_head[size]).fold(f64::INFINITY, f64::min)
        };
        least = (0..=most).map(with).collect();
    }
    least
}

#[test]
fn no_other_settings_within_the_budget_cost_less() {
    for seed in [1, 2, 3] {
        let text = Text::new(60, 1000 * seed);
        let best: Vec<_> = (0..4).map(|h| best_by_slots(&text, h)).collect();
        let mut planner = StatePlanner::new(&options(Budget::Slots(12))).unwrap();
        planner.add(&text.samples()).unwrap();
        let mut last = f64::INFINITY;
        for slots in 8..=26 {
            let plan = planner.plan_within(Budget::Slots(slots)).unwrap();
            let used: usize = plan.heads().iter().map(|h| h.setting.slots().unwrap()).sum();
            let least = least_by_total(&best, 4 * slots);
            assert!(used <= 4 * slots, "{slots}: {used}");
            // each head's cost is that of the best setting of its size
            for (h, head) in plan.heads().iter().enumerate() {
                assert!(close(head.cost, best[h][head.setting.slots().unwrap()]), "{head:?}");
            }
            // what is spent is spent as well as it can be, but for a last step that does not fit
            let optimum = least[4 * slots];
            let step = (0..4)
                .map(|h| best[h].iter().copied().filter(|c| c.is_finite()).fold(0.0, f64::max));
            let worst = step.fold(0.0, f64::max);
            assert!(plan.cost() >= optimum * (1.0 - 1e-9));
            assert!(plan.cost() - optimum <= 0.02 * worst, "{slots}: {} {optimum}", plan.cost());
            assert!(plan.cost() <= last * (1.0 + 1e-9), "a larger budget costs more");
            last = plan.cost();
        }
    }
}
