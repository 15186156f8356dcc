//! Conversions of a tiny model.

use crate::common::{Sizes, Written, logits, session, tokens};
use candle_core::{Device, Tensor};
use indicatif::ProgressBar;
use language_model::convert::contexts::contexts;
use language_model::convert::distill::distill;
use language_model::convert::exact::Exact;
use language_model::convert::held_out::HeldOut;
use language_model::convert::learned::Learned;
use language_model::convert::loss::{Goal, Question};
use language_model::convert::options::{LossKind, Options};
use language_model::convert::student::{Student, Trained};
use language_model::convert::{Conversion, Real};
use language_model::kernels::Kernel;
use language_model::linear::Weights;
use language_model::model::{Model, Scales};
use language_model::perplexity::{longest, losses};
use language_model::session::Session;
use language_model::texts::Text;
use std::fs;
use std::path::{Path, PathBuf};

fn kernel(name: &str) -> Kernel {
    name.parse().unwrap()
}

/// Settings of a training that takes a moment.
fn options() -> Options {
    Options {
        loss: LossKind::Kl,
        trained: Trained::LowRank(4),
        tokens: 24 * 2 * 40,
        context: 40,
        batch: 2,
        learning_rate: 3e-3,
        weight_decay: 0.01,
        clip: 1.0,
        distill: 10,
        points: 2,
        seed: 5,
    }
}

fn texts() -> Vec<Text> {
    [("a", 700, 11), ("b", 500, 12)]
        .map(|(name, count, seed)| Text { name: name.to_owned(), tokens: tokens(count, 262, seed) })
        .to_vec()
}

struct Place {
    session: Session,
    written: Written,
}

impl Place {
    fn new() -> Self {
        let (session, written) = session(&Sizes::default(), 200);
        Self { session, written }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.written.folder.path().join(name)
    }

    fn run(&self, name: &str, options: Options, output: &Path) -> anyhow::Result<Learned> {
        self.run_on(texts(), name, options, output)
    }

    fn run_on(
        &self,
        texts: Vec<Text>,
        name: &str,
        options: Options,
        output: &Path,
    ) -> anyhow::Result<Learned> {
        let kernel = kernel(name);
        let conversion = Conversion {
            session: &self.session,
            kernel: &kernel,
            texts: &texts,
            options,
            output,
            exact: None,
        };
        conversion.run(&ProgressBar::hidden())
    }
}

/// Embeddings as the student takes them.
fn embedded<T: Real>(model: &Model, read: &[u32]) -> Tensor {
    let x = model.embedded(read).unwrap();
    let numbers: Vec<T> = x.iter().map(|&x| T::rounded(f64::from(x))).collect();
    Tensor::from_vec(numbers, x.dim(), &Device::Cpu).unwrap()
}

/// The gradient of the loss by every variable, along a direction, is what differences say.
fn check_gradients(sizes: &Sizes, name: &str, trained: Trained, goal: LossKind) {
    const STEP: f64 = 1e-5;
    let model = sizes.write().model();
    let layers = kernel(name).layers::<f64>(model.config(), None, &[]).unwrap();
    let student = Student::<f64>::new(&model, &layers, trained, 3).unwrap();
    let noise = |i: usize, seed: usize| ((i * 7 + seed * 13) as f64 * 0.37).sin();
    for (seed, variable) in student.variables().iter().enumerate() {
        // factors that begin as zeros would hide the gradients of others
        let noise = (0..variable.var.elem_count()).map(|i| 0.02 * noise(i, seed).abs()).collect();
        let noise: Tensor = Tensor::from_vec(noise, variable.var.shape(), &Device::Cpu).unwrap();
        variable.var.set(&(variable.var.as_tensor() + noise).unwrap()).unwrap();
    }
    let n = 18;
    let (read, next) = (tokens(n, 300, 1), tokens(n, 300, 2));
    let exact: Vec<f64> = (0..n * sizes.width).map(|i| 2.0 * noise(i, 3)).collect();
    let places: Vec<usize> = (1..n).step_by(2).collect();
    let found = || {
        let hidden = student.forward(embedded::<f64>(&model, &read)).unwrap();
        let numbers = hidden.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let goal = match goal {
            LossKind::Kl => Goal::Exact(&exact),
            LossKind::Ce => Goal::Text,
        };
        let (hidden_rows, head) = (&numbers, student.head());
        let asked = Question { hidden: hidden_rows, head, places: &places, next: &next, goal };
        let (found, gradient) = asked.gradient().unwrap();
        (found.loss, gradient, hidden)
    };
    let (_, gradient, hidden) = found();
    let weights = Tensor::from_vec(gradient, hidden.shape(), &Device::Cpu).unwrap();
    let gradients = (hidden * weights).unwrap().sum_all().unwrap().backward().unwrap();
    for (seed, variable) in student.variables().iter().enumerate() {
        let what = format!("{name}, {trained:?}, {}", variable.name);
        let var = &variable.var;
        let direction: Vec<f64> = (0..var.elem_count()).map(|i| noise(i, seed + 50)).collect();
        let gradient = gradients.get(var.as_tensor()).unwrap_or_else(|| panic!("{what}: none"));
        let gradient = gradient.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let slope: f64 = gradient.iter().zip(&direction).map(|(g, d)| g * d).sum();
        let size: f64 = gradient.iter().map(|g| g.abs()).sum();
        let direction = Tensor::from_vec(direction, var.shape(), &Device::Cpu).unwrap();
        let middle = var.as_tensor().copy().unwrap();
        let along = |step: f64| {
            var.set(&(&middle + (&direction * step).unwrap()).unwrap()).unwrap();
            found().0
        };
        let expected = (along(STEP) - along(-STEP)) / (2.0 * STEP);
        var.set(&middle).unwrap();
        assert!(
            (slope - expected).abs() < 1e-6 * size + 1e-9,
            "{what}: {slope}, by differences {expected}"
        );
    }
}

#[test]
fn gradients_of_the_whole_model() {
    let sizes = Sizes::default();
    let low_rank = Trained::LowRank(2);
    check_gradients(&sizes, "softmax", low_rank, LossKind::Kl);
    check_gradients(&sizes, "softmax", Trained::Attention, LossKind::Ce);
    for name in [
        "window:4",
        "dct:8,decay=0.9",
        "performer:8,sinks=2",
        "learned:8,window=3",
        "hedgehog",
        "wpff:8,decay=0.97",
        "dct:8,sinks=3,decay=0.9",
    ] {
        check_gradients(&sizes, name, low_rank, LossKind::Kl);
    }
    let scales = Scales { embedding: Some(3.0), residual: Some(0.7), attention: Some(0.2) };
    let odd = Sizes {
        key_length: Some(10),
        value_length: Some(7),
        rope_dims: Some(6),
        tied: false,
        scales,
        ..sizes
    };
    check_gradients(&odd, "dct:8", Trained::RandomAttention, LossKind::Kl);
    check_gradients(&odd, "softmax", low_rank, LossKind::Ce);
}

/// Before it learns anything, and behind it, a student is the model with the same attention.
#[test]
fn a_student_is_the_model() {
    let place = Place::new();
    let session = &place.session;
    for name in ["softmax", "merged:6,window=8,pool,exact=2", "dct:16", "learned:8,decay=0.95"] {
        let layers = session.attention(&kernel(name)).unwrap().layers;
        let student = Student::<f32>::new(&session.model, &layers, Trained::LowRank(3), 1).unwrap();
        for read in [tokens(50, 300, 1), tokens(50, 300, 2)] {
            let hidden = student.forward(embedded::<f32>(&session.model, &read)).unwrap();
            let hidden = hidden.to_vec2::<f32>().unwrap();
            let mut state = session.model.state(&layers).unwrap();
            let expected = session.model.extend(&mut state, &read).unwrap();
            for (row, expected) in hidden.iter().zip(expected.outer_iter()) {
                let error =
                    row.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(error < 2e-3, "{name}: off by {error}");
            }
        }
    }
}

/// The loss falls, and what was learned is what the file says.
#[test]
fn losses_fall_and_files_hold_what_was_learned() {
    let place = Place::new();
    let session = &place.session;
    for (i, (name, trained)) in [
        ("merged:4,window=8,pool", Trained::LowRank(4)),
        ("merged:4,window=8,exact=2", Trained::LowRank(4)),
        ("dct:16", Trained::Attention),
        ("learned:16,decay=0.98", Trained::LowRank(4)),
        ("performer:16,sinks=2", Trained::RandomAttention),
    ]
    .into_iter()
    .enumerate()
    {
        let path = place.path(&format!("{i}.safetensors"));
        // four contexts, again and again
        let text = Text { name: "short".to_owned(), tokens: tokens(161, 262, 11) };
        let options = Options { trained, ..options() };
        let learned = place.run_on(vec![text], name, options, &path).unwrap();
        let history = &learned.about.history;
        let mean = |range: std::ops::Range<usize>| -> f64 {
            let steps = &history.steps[range.clone()];
            steps.iter().map(|step| step.loss).sum::<f64>() / range.len() as f64
        };
        let (first, last) = (mean(0..4), mean(20..24));
        assert!(last < 0.97 * first, "{name}: {first} to {last}");
        assert_eq!(Learned::load(&path).unwrap(), learned, "{name}");
        assert!(!path.with_extension("safetensors.checkpoint").exists());

        // the last point of the curve is what the program finds with the file
        let adapted = kernel(&format!("{name},adapted={}", path.display()));
        let attention = session.attention(&adapted).unwrap();
        let texts = session.corpus.evaluation().unwrap();
        let context = longest(texts, 2048);
        let bar = ProgressBar::hidden();
        let model = attention.model(session);
        let found = losses(model, &attention.layers, texts, context, &bar).unwrap();
        let points = &history.points;
        let [first, last] = [&points[0], points.last().unwrap()].map(|point| point.said);
        for (here, there) in last.halves.into_iter().zip(found.halves()) {
            assert!((here.unwrap() - there.unwrap()).abs() < 1e-5, "{name}: {here:?}, {there:?}");
        }
        // and, bit for bit, what is measured with it
        let windows = texts.iter().map(|text| &text.tokens[..]).collect();
        let held_out = HeldOut::new(windows, &Exact::new(&session.model, None).unwrap()).unwrap();
        let with_file = held_out.measure(model, &attention.layers, &bar).unwrap();
        assert_eq!(last, with_file, "{name}");
        assert!(last.divergence.iter().all(|&nats| nats.unwrap() > 0.0), "{name}: {last:?}");
        let at: Vec<usize> = points.iter().map(|point| point.tokens).collect();
        assert_eq!(at, [0, 960, 1920]);
        assert_ne!(first.halves, last.halves);
    }
    let of_text = Options { loss: LossKind::Ce, ..options() };
    let steps = place.run("softmax", of_text, &place.path("s")).unwrap().about.history.steps;
    assert!(steps[22].loss + steps[23].loss < steps[0].loss + steps[1].loss);
}

/// A run that was stopped goes on, and ends where it would have, bit for bit.
#[test]
fn resumed_is_uninterrupted() {
    let place = Place::new();
    for (i, name) in ["merged:4,window=8,pool", "dct:8,decay=0.9"].into_iter().enumerate() {
        let [whole, stopped] =
            ["whole", "stopped"].map(|part| place.path(&format!("{part}{i}.safetensors")));
        let whole = place.run(name, options(), &whole).unwrap();
        // the end cannot be written
        let blocked = place.path(&format!("stopped{i}.safetensors.part"));
        fs::create_dir(&blocked).unwrap();
        let error = place.run(name, options(), &stopped).unwrap_err();
        assert!(format!("{error:#}").contains("cannot write"), "{error:#}");
        fs::remove_dir(&blocked).unwrap();
        // others do not go on from it
        let other = Options { seed: 6, ..options() };
        let error = format!("{:#}", place.run(name, other, &stopped).unwrap_err());
        assert!(error.contains("is of another conversion: `options`"), "{error}");
        let bar = ProgressBar::hidden();
        let (texts, kernel) = (texts(), kernel(name));
        let conversion = Conversion {
            session: &place.session,
            kernel: &kernel,
            texts: &texts,
            options: options(),
            output: &stopped,
            exact: Some(&place.path("exact")),
        };
        let resumed = conversion.run(&bar).unwrap();
        assert_eq!(bar.position(), 24 * 2 * 40);
        assert_eq!(resumed.arrays, whole.arrays, "{name}");
        assert_eq!(resumed.about.history.steps, whole.about.history.steps);
        assert_eq!(resumed.about.history.points, whole.about.history.points);
        // a finished one is read, and not overwritten by others
        assert_eq!(place.run(name, options(), &stopped).unwrap(), resumed);
        let error = place.run("window:8", options(), &stopped).unwrap_err().to_string();
        assert!(error.contains("is of another conversion: `"), "{error}");
    }
}

/// What the exact model says is read from the folder that keeps it.
#[test]
fn exact_states_are_kept() {
    let place = Place::new();
    let folder = place.path("kept");
    let read = tokens(30, 300, 1);
    let of = |folder: Option<&Path>| {
        Exact::new(&place.session.model, folder).unwrap().hidden(&read).unwrap()
    };
    let plain = of(None);
    assert_eq!(of(Some(&folder)), plain);
    let files: Vec<PathBuf> =
        fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 1);
    assert_eq!(of(Some(&folder)), plain);
    // damaged: computed again
    fs::write(&files[0], [0; 5]).unwrap();
    assert_eq!(of(Some(&folder)), plain);
}

/// Against itself the exact model has no divergence; others do, and losses are those of
/// `perplexity`.
#[test]
fn held_out_windows_are_measured_against_the_exact_model() {
    let place = Place::new();
    let model = &place.session.model;
    let exact = Exact::new(model, None).unwrap();
    let bar = ProgressBar::hidden();
    // halves of 30, and a text that ends in the first one; a single token foretells nothing
    let texts = [(61, 1), (21, 2), (1, 3)]
        .map(|(count, seed)| Text { name: format!("{count}"), tokens: tokens(count, 262, seed) });
    let windows = texts.iter().map(|text| &text.tokens[..]).collect();
    let held_out = HeldOut::new(windows, &exact).unwrap();
    for name in ["softmax", "window:8"] {
        let layers = place.session.attention(&kernel(name)).unwrap().layers;
        let said = held_out.measure(model, &layers, &bar).unwrap();
        let found = losses(model, &layers, &texts[..2], 60, &bar).unwrap().halves();
        for (here, there) in said.halves.into_iter().zip(found) {
            assert!((here.unwrap() - there.unwrap()).abs() < 1e-5, "{name}");
        }
        for half in 0..2 {
            let [own, exact] = [said.halves, said.exact].map(|halves| halves[half].unwrap());
            let divergence = said.divergence[half].unwrap();
            if name == "softmax" {
                assert!((own - exact).abs() < 1e-5 && divergence.abs() < 1e-5, "{said:?}");
            } else {
                assert!((own - exact).abs() > 1e-3 && divergence > 1e-3, "{said:?}");
            }
        }
    }
    assert_eq!(bar.position(), 2 * (2 * 80));
    // one prediction is in the second half
    let short = HeldOut::new(vec![&texts[0].tokens[..2]], &exact).unwrap();
    let layers = place.session.attention(&kernel("window:8")).unwrap().layers;
    let said = short.measure(model, &layers, &bar).unwrap();
    assert!(said.halves[0].is_none() && said.divergence[1].unwrap().abs() < 1e-5, "{said:?}");
}

#[test]
fn files_of_others_are_refused() {
    let place = Place::new();
    let session = &place.session;
    let path = place.path("learned.safetensors");
    let name = "merged:4,window=8,exact=1";
    let options = Options { tokens: 80, points: 0, ..options() };
    let learned = place.run(name, options, &path).unwrap();
    let refused = |session: &Session, name: &str| {
        let kernel = kernel(&format!("{name},adapted={}", path.display()));
        let error = format!("{:#}", session.attention(&kernel).unwrap_err());
        assert!(error.contains("learned.safetensors"), "{error}");
        error
    };
    session.attention(&kernel(&format!("{name},state=q8,adapted={}", path.display()))).unwrap();
    for other in ["merged:5,window=8,exact=1", "window:8", "merged:4,window=8", "softmax"] {
        assert!(refused(session, other).contains("use it as `merged:4,window=8,exact=1,adapted="));
    }
    let (other, _written) = crate::common::session(&Sizes { seed: 2, ..Sizes::default() }, 200);
    assert!(refused(&other, name).contains("was learned for the model `tiny"));
    // another choice of exact heads
    let mut changed = learned.clone();
    changed.about.exact = vec![(1, 1), (1, 0)];
    changed.save(&path).unwrap();
    assert!(refused(session, name).contains("other exact heads"));
    // a part is missing, or of another shape, or no number
    let mut changed = learned.clone();
    changed.arrays.remove("layers.1.key.up");
    changed.save(&path).unwrap();
    assert!(refused(session, name).contains("`layers.1.key.up` is missing"));
    let mut changed = learned.clone();
    let short = ndarray::ArrayD::zeros(ndarray::IxDyn(&[3]));
    changed.arrays.insert("norm".to_owned(), short);
    changed.save(&path).unwrap();
    assert!(refused(session, name).contains("`norm` has 3 numbers"));
    learned.save(&path).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    assert!(refused(session, name).contains("not finite"));
    let mut changed = learned;
    changed.arrays.get_mut("norm").unwrap()[[0]] = f32::NAN;
    assert!(changed.save(&path).unwrap_err().to_string().contains("not finite"));
    fs::write(&path, "no file of tensors").unwrap();
    assert!(refused(session, name).contains("cannot be used"));
    fs::remove_file(&path).unwrap();
    assert!(refused(session, name).contains("cannot read"));
}

/// Kernels that are fitted belong to the text they were fitted to.
#[test]
fn another_calibration_is_refused() {
    let place = Place::new();
    let path = place.path("fitted.safetensors");
    let options = Options { tokens: 80, points: 0, distill: 0, ..options() };
    let name = "merged:4,window=8,calibrated";
    place.run(name, options, &path).unwrap();
    let adapted = kernel(&format!("{name},adapted={}", path.display()));
    place.session.attention(&adapted).unwrap();
    let (other, _written) = session(&Sizes::default(), 150);
    let error = format!("{:#}", other.attention(&adapted).unwrap_err());
    assert!(error.contains("tokens: 200") && error.contains("tokens: 150"), "{error}");
    assert!(error.contains("`--calibration`"), "{error}");
}

/// A run that diverges says so and keeps the last good state.
#[test]
fn a_run_that_diverges_keeps_the_last_good_state() {
    let place = Place::new();
    let path = place.path("diverged.safetensors");
    let options = Options { learning_rate: 1e4, points: 0, ..options() };
    let error = place.run("dct:8", options, &path).unwrap_err().to_string();
    assert!(error.contains("the training stopped at step "), "{error}");
    assert!(error.contains("last good state"), "{error}");
    let kept = Learned::load(&path).unwrap();
    assert!(kept.arrays.values().flatten().all(|x| x.is_finite() && x.abs() < 1e3));
    place.session.attention(&kernel(&format!("dct:8,adapted={}", path.display()))).unwrap();
}

#[test]
fn texts_are_read_in_a_random_order_once_before_any_is_again() {
    let texts = texts();
    let of = |seed| -> Vec<&[u32]> { contexts(&texts, 40, seed).unwrap().take(60).collect() };
    let (order, other) = (of(1), of(2));
    assert_eq!(order, of(1));
    assert_ne!(order, other);
    // 17 and 12 windows, the same for every seed
    let sorted = |windows: &[&[u32]]| {
        let mut windows: Vec<Vec<u32>> = windows.iter().map(|window| window.to_vec()).collect();
        windows.sort_unstable();
        windows.dedup();
        windows
    };
    assert_eq!(sorted(&order[..29]).len(), 29);
    assert_eq!(sorted(&order[..29]), sorted(&other[..29]));
    assert!(order.iter().all(|window| window.len() == 41));
    let error = contexts(&texts, 700, 1).err().unwrap().to_string();
    assert!(error.contains("701 tokens") && error.contains("--train-text"), "{error}");
}

/// Maps come closer to exact attention, layer by layer.
#[test]
fn maps_learn_to_answer_as_exact_attention() {
    let place = Place::new();
    let session = &place.session;
    let read = tokens(120, 262, 3);
    for name in ["hedgehog", "dct:16,decay=0.99"] {
        let before = session.attention(&kernel(name)).unwrap().layers;
        let bar = ProgressBar::hidden();
        let after = distill(&session.model, &before, &read, 40, &bar).unwrap();
        let exact = session.attention(&kernel("softmax")).unwrap().layers;
        let of = |layers: &[_]| {
            logits(&session.model, &mut session.model.state(layers).unwrap(), &read, &[])
        };
        let expected = of(&exact);
        let error = |layers: &[_]| (of(layers) - &expected).iter().map(|x| x * x).sum::<f32>();
        let (before, after) = (error(&before), error(&after));
        assert!(after < before, "{name}: {before} to {after}");
    }
}

/// Weights that stay quantised have factors beside them.
#[test]
fn quantised_models_take_what_was_learned() {
    let sizes = Sizes { weights: candle_core::quantized::GgmlDType::Q8_0, ..Sizes::default() };
    let (session, written) = session(&sizes, 200);
    let place = Place { session, written };
    let path = place.path("learned.safetensors");
    let options = Options { points: 0, learning_rate: 2e-2, ..options() };
    let learned = place.run("merged:4,window=8", options, &path).unwrap();
    let of = |weights| {
        let mut file = language_model::gguf::Gguf::open(&place.written.path).unwrap();
        let model = Model::from_gguf(&mut file, weights).unwrap();
        let model = learned.model(&model).unwrap();
        let layers = kernel("merged:4,window=8").layers(model.config(), None, &[]).unwrap();
        let mut state = model.state(&layers).unwrap();
        let single = logits(&model, &mut state, &tokens(40, 300, 7), &[1; 39]);
        state.reset();
        let chunk = logits(&model, &mut state, &tokens(40, 300, 7), &[]);
        (model.weight_bytes(), single, chunk)
    };
    let (full, exact, _) = of(Weights::F32);
    let (few, single, chunk) = of(Weights::Quantised);
    assert!(few < full);
    let size = exact.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
    for found in [single, chunk] {
        let error = (found - &exact).iter().fold(0.0_f32, |m, x| m.max(x.abs()));
        assert!(error < 1e-3 * size, "off by {error} of {size}");
    }
}
