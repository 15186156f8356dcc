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

/// A memory that holds the whole text costs nothing, and is taken where the budget allows.
#[test]
fn what_holds_the_text_is_free() {
    let text = Text::new(26, 1);
    let plan = StatePlan::fit(&text.samples(), &options(Budget::Slots(100))).unwrap();
    for (h, head) in plan.heads().iter().enumerate() {
        assert_eq!((head.setting.slots(), head.cost), (Some(24), 0.0));
        assert!(cost(&text, h, head.setting, 0..26) < 1e-25);
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

/// Where costs per slot only fall, what remains after the multiplier is one slot at a time, and
/// the plan is the optimum itself.
#[test]
fn plans_of_one_convex_curve_are_optimal() {
    let text = Text::new(60, 7);
    let sizes = [4, 16];
    let mut best = Vec::new();
    for h in 0..4 {
        let mut of_head = vec![f64::INFINITY; 25];
        for (entries, cost) in curve(&text, h, 8, &sizes, 0.98) {
            of_head[8 + entries] = cost;
        }
        // one line of logarithms is convex
        assert!(of_head[12..].windows(3).all(|c| c[0] + c[2] >= 2.0 * c[1]), "{of_head:?}");
        best.push(of_head);
    }
    let options = options(Budget::Slots(12)).grid(&[0.98], &[(8, &sizes)]);
    let mut planner = StatePlanner::new(&options).unwrap();
    planner.add(&text.samples()).unwrap();
    for slots in 12..=24 {
        let plan = planner.plan_within(Budget::Slots(slots)).unwrap();
        let least = least_by_total(&best, 4 * slots)[4 * slots];
        assert!((plan.cost() - least).abs() <= 1e-9 * least, "{slots}: {} {least}", plan.cost());
        let used: usize = plan.heads().iter().map(|h| h.setting.slots().unwrap()).sum();
        assert_eq!(used, 4 * slots, "the total is met");
    }
}

/// Several texts of a head: the mean by weights, in one call or in several.
#[test]
fn texts_are_weighed() {
    let [a, b] = [Text::new(60, 1), Text::new(44, 2)];
    let grid = options(Budget::Slots(100)).grid(&[0.98], &[(8, &[8])]);
    let setting = HeadSetting::Merged { window: 8, entries: 8, decay: 0.98 };
    let light = b.samples().into_iter().map(|sample| sample.with_weight(0.25));
    let both: Vec<_> = a.samples().into_iter().chain(light).collect();
    let plan = StatePlan::fit(&both, &grid).unwrap();
    for (h, head) in plan.heads().iter().enumerate() {
        let [of_a, of_b] = [cost(&a, h, setting, 0..60), cost(&b, h, setting, 0..44)];
        assert!(close(head.cost, (of_a + 0.25 * of_b) / 1.25));
        // the units of entries, from the same texts
        let (metric, norm) = (head.metric.as_ref().unwrap(), head.value_norm_squared.unwrap());
        let mean = |text: &Text, c: usize| {
            let column = text.q[h].index_axis(Axis(2), c);
            column.mapv(|x| 0.5 * x * x).mean().unwrap()
        };
        for (c, r) in metric.iter().enumerate() {
            assert!(close(*r, (mean(&a, c) + 0.25 * mean(&b, c)) / 1.25));
        }
        let mean = |text: &Text| {
            let v = text.kv[h][1].slice(s![2.., ..]);
            v.mapv(|x| x * x).sum() / v.nrows() as f64
        };
        assert!(close(norm, (mean(&a) + 0.25 * mean(&b)) / 1.25));
    }
    let mut planner = StatePlanner::new(&grid).unwrap();
    planner.add(&both[..4]).unwrap();
    both[4..].iter().rev().for_each(|sample| planner.add(&[*sample]).unwrap());
    assert_eq!(planner.plan().unwrap(), plan);
}

/// A plan for a length takes the costs of its last half; the table has them all.
#[test]
fn lengths() {
    let text = Text::new(600, 3);
    let grid = options(Budget::Slots(14)).grid(&[0.98], &[(8, &[4, 16, 64])]);
    let mut planner = StatePlanner::new(&grid.clone().length(300)).unwrap();
    planner.add(&text.samples()).unwrap();
    let lengths = |plan: &StatePlan| -> Vec<usize> {
        plan.cost_by_length().iter().map(|(length, _)| *length).collect()
    };
    let plan = planner.plan().unwrap();
    assert_eq!((lengths(&plan), plan.length()), (vec![256, 300, 512], Some(300)));
    for (h, head) in plan.heads().iter().enumerate() {
        let HeadSetting::Merged { entries, .. } = head.setting else { panic!("{head:?}") };
        for (length, found) in head.cost_by_length.iter().copied() {
            let range = length / 2..length;
            if [4, 16, 64].contains(&entries) {
                assert!(close(found, cost(&text, h, head.setting, range)));
            }
            assert!(length != 300 || found == head.cost);
        }
    }
    let sum: f64 = plan.heads().iter().map(|head| head.cost_by_length[2].1).sum();
    assert_eq!(plan.cost_by_length()[2], (512, sum));

    // another length from the same costs, or all tokens
    let at = |options: &PlanOptions| planner.plan_with(options);
    let longer = at(&grid.clone().length(512)).unwrap();
    assert!(longer.cost_by_length()[2].1 <= plan.cost_by_length()[2].1 * (1.0 + 1e-12));
    let whole = at(&grid).unwrap();
    assert_eq!(whole.length(), None);
    let error = at(&grid.clone().length(400)).unwrap_err().to_string();
    assert!(error.contains("400, where costs are known at [256, 300, 512]"), "{error}");

    // samples that are too short for it
    let error = StatePlan::fit(&text.samples(), &grid.length(601)).unwrap_err().to_string();
    assert!(error.contains("`length` is 601, where a sample has 600 tokens"), "{error}");
    // a length that not all samples reach is not one of the plan
    let short = Text::new(300, 4);
    let mut planner = StatePlanner::new(&options(Budget::Slots(12))).unwrap();
    planner.add(&text.samples()).unwrap();
    planner.add(&[short.sample(2)]).unwrap();
    assert_eq!(lengths(&planner.plan().unwrap()), [256]);
}

/// One by one the costliest head is taken out, and the others are filled again.
#[test]
fn exact_heads() {
    let text = Text::new(60, 5);
    let options = options(Budget::Slots(12));
    let mut planner = StatePlanner::new(&options).unwrap();
    planner.add(&text.samples()).unwrap();
    let mut exact: Vec<(usize, usize)> = Vec::new();
    for count in 0..=4 {
        let plan = planner.plan_with(&options.clone().exact_heads(count)).unwrap();
        assert_eq!(plan.exact_heads(), exact);
        let others: Vec<_> = plan.heads().iter().filter(|h| !h.setting.is_exact()).collect();
        let used: usize = others.iter().map(|head| head.setting.slots().unwrap()).sum();
        assert!(used <= 12 * others.len());
        for head in plan.heads().iter().filter(|head| head.setting.is_exact()) {
            assert_eq!(head.cost, 0.0);
        }
        let costs = |a: &&&HeadPlan, b: &&&HeadPlan| a.cost.total_cmp(&b.cost);
        if let Some(worst) = others.iter().max_by(costs) {
            exact.push((worst.layer, worst.kv_head));
            exact.sort_unstable();
        }
        // the state: exact heads grow, the others do not
        let [at_50, at_70] = [50, 70].map(|tokens| plan.state_floats(tokens).unwrap());
        assert_eq!(at_70 - at_50, count * 20 * (D + DV));
    }
    let error = planner.plan_with(&options.exact_heads(5)).unwrap_err();
    assert!(matches!(error, Error::InvalidOption { which: "exact_heads", .. }));
}

/// Floats and bytes are those of the state, and as much is used as fits.
#[test]
fn budgets() {
    let text = Text::new(60, 6);
    let mut planner = StatePlanner::new(&options(Budget::Slots(12))).unwrap();
    planner.add(&text.samples()).unwrap();
    let smallest = merged(4, 4, 0.98).state_floats(DV, 1).unwrap();
    let largest = merged(8, 16, 0.98).state_floats(DV, 1).unwrap();
    for floats in [smallest, 140, 150, 171, largest] {
        let plan = planner.plan_within(Budget::FloatsPerHead(floats)).unwrap();
        let used = plan.state_floats(1000).unwrap();
        assert!(used <= 4 * floats, "{floats}: {used}");
        assert!(used + D + DV + 2 > 4 * floats || plan.cost() < 1e-12, "{floats}: {used}");
        let bytes = planner.plan_within(Budget::BytesPerHead(4 * floats + 3)).unwrap();
        assert_eq!(bytes.heads(), plan.heads());
        assert_eq!(bytes.state_bytes::<f32>(1000).unwrap(), 4 * used);
    }
    for (budget, least) in [
        (Budget::Slots(7), 8),
        (Budget::FloatsPerHead(smallest - 1), smallest),
        (Budget::BytesPerHead(4 * smallest - 1), 4 * smallest),
    ] {
        let error = planner.plan_within(budget).unwrap_err().to_string();
        assert!(error.contains(&format!("the smallest settings take {least}")), "{error}");
    }
}

/// The layers of a plan are those built by hand, bit for bit.
#[test]
fn layers_are_those_built_by_hand() {
    let text = Text::new(60, 8);
    let options = options(Budget::Slots(13)).exact_heads(1).fingerprint("a model");
    let plan = StatePlan::fit(&text.samples(), &options).unwrap();
    for layer in 0..LAYERS {
        let by_hand = |head: &HeadPlan| -> Arc<dyn Attention<f64>> {
            match head.setting {
                HeadSetting::Merged { window, entries, decay } => {
                    Arc::new(merged(window, entries, decay))
                }
                _ => Arc::new(SoftmaxAttention::new(D).unwrap()),
            }
        };
        let heads = plan.heads().iter().filter(|head| head.layer == layer);
        let expected = MultiHead::per_kv_head(heads.map(by_hand).collect(), 4).unwrap();
        let found = plan.layer::<f64>(layer, 4).unwrap();
        let q = Array4::from_shape_fn((1, 4, 60, D), |(_, h, t, c)| {
            text.q[2 * layer + h / 2][[h % 2, t, c]]
        });
        let [k, v] = [(0, D), (1, DV)].map(|(part, d)| {
            Array4::from_shape_fn((1, 2, 60, d), |(_, h, t, c)| {
                text.kv[2 * layer + h][part][[t, c]]
            })
        });
        let run = |layer: &MultiHead<f64>| {
            layer.forward(q.view(), k.view(), v.view(), Mask::Causal, None).unwrap()
        };
        assert_eq!(run(&found), run(&expected));
        for (kv, head) in plan.heads().iter().filter(|head| head.layer == layer).enumerate() {
            assert_eq!(plan.head(layer, kv), Some(head));
        }
    }
    let bytes = |layer| plan.layer::<f64>(layer, 4).unwrap().state_bytes(DV, 500).unwrap();
    assert_eq!(bytes(0) + bytes(1), plan.state_bytes::<f64>(500).unwrap());

    // another model
    let sizes = ModelSizes { layers: 2, query_heads: 4, kv_heads: 2, head_dim: D, value_dim: DV };
    assert_eq!(plan.sizes(), &sizes);
    plan.check_model(&sizes, "a model").unwrap();
    let refused = |sizes, name| plan.check_model(&sizes, name).unwrap_err().to_string();
    assert_eq!(
        refused(ModelSizes { layers: 30, ..sizes }, "a model"),
        "the plan is of a model with layers 2 where this one has 30: make a plan of this model"
    );
    assert!(refused(ModelSizes { head_dim: 64, ..sizes }, "").contains("head dimension 4"));
    assert!(refused(sizes, "b model").contains(r#"fingerprint "a model" where this one has "b"#));
    assert!(plan.layer::<f64>(2, 4).is_err() && plan.layer::<f64>(0, 6).is_err());
    assert!(plan.kernel::<f64>(0, 2).is_err() && plan.head(0, 2).is_none());
}

#[test]
fn tables_have_every_head() {
    let text = Text::new(600, 9);
    let options = options(Budget::Slots(13)).exact_heads(1).length(512);
    let plan = StatePlan::fit(&text.samples(), &options).unwrap();
    let table = plan.to_string();
    let heads = table.lines().skip(1).take_while(|line| !line.is_empty());
    assert_eq!(heads.clone().count(), 4, "{table}");
    assert_eq!(heads.filter(|line| line.contains("exact")).count(), 1, "{table}");
    for part in
        ["4 heads, 1 of them exact", "13 slots a head, for 512 tokens", "nats", "257 .. 512"]
    {
        assert!(table.contains(part), "no {part} in\n{table}");
    }
}

/// The same plan on any number of threads; progress counts every sample once.
#[test]
fn threads_change_nothing() {
    let text = Text::new(60, 10);
    let fit = |threads: usize| {
        let calls = AtomicUsize::new(0);
        let progress = |done: usize, all: usize| {
            assert!((1..=all).contains(&done) && all == 4);
            calls.fetch_add(1, Ordering::Relaxed);
        };
        let mut planner = StatePlanner::new(&options(Budget::Slots(12))).unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| planner.add_with_progress(&text.samples(), &progress)).unwrap();
        assert_eq!(calls.into_inner(), 4);
        planner
    };
    let one = fit(1);
    assert_eq!(fit(2), one);
    assert_eq!(fit(3).plan().unwrap(), one.plan().unwrap());
}

/// Large memories are measured where costs still fall by more than a fifth, and nowhere else.
#[test]
fn large_memories_are_measured_where_they_pay() {
    let text = Text::new(1400, 11);
    let of = |entries: &[usize]| {
        let options = options(Budget::Slots(4000)).grid(&[0.98], &[(8, entries)]);
        let samples = [text.sample(0), text.sample(1), text.sample(2), text.sample(3)];
        StatePlan::fit(&samples.map(without), &options).unwrap()
    };
    let entries = |head: &HeadPlan| head.setting.slots().unwrap() - 8;
    let [at_500, at_512] = [of(&[500]), of(&[512])];
    let mut found = [0, 0];
    for (h, head) in of(&[500, 512, 1024]).heads().iter().enumerate() {
        let falls = at_512.heads()[h].cost < 0.8 * at_500.heads()[h].cost;
        found[usize::from(falls)] += 1;
        assert_eq!(entries(head) > 512, falls, "{head:?}");
    }
    assert!(found.iter().all(|&heads| heads > 0), "{found:?}");
    // from 4 to 512 they fall by more in every head
    assert!(of(&[4, 512, 1024]).heads().iter().all(|head| entries(head) == 1024));
}

fn with<'a>(good: PlanSample<'a, f64>, sample: HeadSample<'a, f64>) -> PlanSample<'a, f64> {
    PlanSample { sample, ..good }
}

#[test]
fn bad_input() {
    let text = Text::new(60, 12);
    let plain = || options(Budget::Slots(12));
    let mut planner = StatePlanner::new(&plain()).unwrap();
    assert_eq!(planner.plan(), Err(Error::ZeroSize { which: "samples" }));
    assert_eq!(planner.add::<f64>(&[]), Err(Error::ZeroSize { which: "samples" }));
    planner.add(&text.samples()).unwrap();
    let before = planner.clone();
    let mut refused = |samples: &[PlanSample<'_, f64>], message: &str| {
        let error = planner.add(samples).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
        assert_eq!(planner, before, "{message}");
    };
    let good = text.sample(0);
    refused(&[good, without(good)], "`sensitivity` is mixed");
    refused(&[good.with_weight(0.0)], "`weight` is 0");
    refused(&[good.with_weight(f64::NAN)], "`weight` is NaN");
    let g = text.g[0].slice(s![.., ..59, ..]);
    refused(&[good.with_sensitivity(g)], "`sensitivity` has 59 rows where 60");
    let mut nan = text.g[0].clone();
    nan[[1, 7, 2]] = f64::NAN;
    refused(
        &[text.sample(1), good.with_sensitivity(nan.view())],
        "`sensitivity` is NaN or infinite at row 7, column 2",
    );
    let mut q = text.q[0].clone();
    q[[0, 3, 1]] = f64::INFINITY;
    let HeadSample { k, v, .. } = good.sample;
    refused(
        &[with(good, HeadSample { q: q.view(), ..good.sample })],
        "`q` is NaN or infinite at row 3",
    );
    let q = text.q[0].slice(s![..1, .., ..]);
    refused(&[with(good, HeadSample { q, ..good.sample })], "`q` has 1 heads where 2");
    let k = k.slice(s![.., ..3]);
    refused(&[with(good, HeadSample { k, ..good.sample })], "`k` has 3 columns where 4");
    let v = v.slice(s![..50, ..]);
    refused(&[with(good, HeadSample { v, ..good.sample })], "`v` has 50 rows where 60");
    let short = Text::new(10, 1);
    refused(&[short.sample(0)], "`samples` is 10 tokens long, where the smallest setting holds 10");

    let missing = StatePlan::fit(&[text.sample(0), text.sample(3)], &plain()).unwrap_err();
    assert!(missing.to_string().contains("without kv head 1 of layer 0"), "{missing}");
    for (options, which) in [
        (plain().grid(&[], &WINDOWS), "grid"),
        (plain().grid(&[0.9], &[(8, &[])]), "grid"),
        (plain().grid(&[0.9], &[(0, &[4])]), "grid"),
        (plain().grid(&[0.9, 0.9], &WINDOWS), "grid"),
        (plain().grid(&[1.5], &WINDOWS), "decay"),
        (plain().scale(-1.0), "scale"),
    ] {
        match StatePlanner::new(&options) {
            Err(Error::InvalidOption { which: found, .. }) => assert_eq!(found, which),
            other => panic!("{other:?}"),
        }
    }
    assert!(StatePlanner::new(&options(Budget::Slots(0))).is_err());
    assert!(StatePlanner::new(&plain().length(0)).is_err());
    let error = before.plan_with(&plain().sinks(3)).unwrap_err();
    assert!(matches!(error, Error::InvalidOption { which: "options", .. }));
}

/// Plans and costs come back from files; what a person broke does not.
#[cfg(feature = "serde")]
#[test]
fn files() {
    use serde_json::{Value, json};

    let text = Text::new(600, 13);
    let options = options(Budget::Slots(12)).exact_heads(1).fingerprint("a model");
    let mut planner = StatePlanner::new(&options).unwrap();
    planner.add(&text.samples()).unwrap();
    let plan = planner.plan().unwrap();
    let value = serde_json::to_value(&plan).unwrap();
    let text = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<StatePlan>(&text).unwrap(), plan);
    type Change = fn(&mut Value);
    let changes: [(Change, &str); 12] = [
        (|plan| plan["heads"][1]["kv_head"] = json!(0), "kv head 0 of layer 0 at place 1"),
        (|plan| plan["heads"].as_array_mut().unwrap().truncate(3), "one of 3 heads for 4"),
        (|plan| plan["heads"][2]["cost"] = json!(-1.0), "a cost of kv head 0 of layer 1"),
        (|plan| plan["heads"][0]["cost_by_length"][0][0] = json!(7), "lengths of kv head 1"),
        (|plan| plan["heads"][0]["metric"] = json!([1.0]), "`metric` has 1 elements where 4"),
        (|plan| plan["heads"][0]["value_norm_squared"] = json!(-1.0), "a unit of kv head 0"),
        (|plan| plan["sizes"]["layers"] = json!(0), "`layers` is 0"),
        (|plan| plan["sizes"]["query_heads"] = json!(5), "`query_heads` is 5"),
        (|plan| plan["sizes"]["layers"] = json!(usize::MAX), "`layers` is 18446744073709551615"),
        (|plan| plan["scale"] = json!(0.0), "`scale` is 0"),
        (|plan| plan["length"] = json!(0), "`length` is 0"),
        (
            |plan| {
                let merged = json!({"window": 8, "entries": 0, "decay": 0.9});
                plan["heads"][0]["setting"] = json!({ "merged": merged });
            },
            "entries",
        ),
    ];
    for (change, message) in changes {
        let mut value = value.clone();
        change(&mut value);
        let error = serde_json::from_value::<StatePlan>(value).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }

    let value = serde_json::to_value(&planner).unwrap();
    let text = serde_json::to_string(&planner).unwrap();
    let again = serde_json::from_str::<StatePlanner>(&text).unwrap();
    assert_eq!(again, planner);
    assert_eq!(again.plan().unwrap(), plan);
    let changes: [(Change, &str); 7] = [
        (|costs| costs["heads"][1]["kv_head"] = json!(0), "heads in disorder"),
        (|costs| costs["heads"][1]["curves"] = json!([]), "`planner` has 0 curves where 4"),
        (|costs| costs["heads"][0]["curves"][0][0]["entries"] = json!(5), "a curve of kv head 0"),
        (|costs| costs["heads"][0]["curves"][0][0]["sums"]["0"] = json!(-1.0), "a cost of kv"),
        (|costs| costs["heads"][0]["weights"]["0"] = json!(0.0), "with weights of kv head 0"),
        (|costs| costs["shape"] = Value::Null, "without shapes"),
        (|costs| costs["options"]["grid"][0]["decay"] = json!(2.0), "`decay` is 2"),
    ];
    for (change, message) in changes {
        let mut value = value.clone();
        change(&mut value);
        let error = serde_json::from_value::<StatePlanner>(value).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}
