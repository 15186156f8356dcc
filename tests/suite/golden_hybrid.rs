//! The golden files of the hybrids, within the tolerances they state.

use crate::common::{assert_close, golden, matrix, vector};
use dijiang::{
    Attention, CalibratedTaylor, Calibration, CalibrationOptions, Error, ExactMemory, Far,
    FeatureMap, Head, HybridAttention, LinearMemory, Mask, Memory, MergeUnits, Merged,
    MergedMemory, Metric, Partial, Performer, SoftmaxAttention, StateFormat, StreamOptions, Taylor,
    TaylorFit,
};
use ndarray::{Array2, Array3, ArrayView1, ArrayView2, Axis, s};
use serde_json::Value;
use std::sync::{Arc, Mutex};

/// 1e-11, the tolerance of the files, in units of epsilon.
const TOLERANCE: f64 = 1e-11 / f64::EPSILON;

fn number(value: &Value) -> usize {
    usize::try_from(value.as_u64().unwrap()).unwrap()
}

fn forward(kernel: &dyn Attention<f64>, [q, k, v]: [&Array2<f64>; 3]) -> Array2<f64> {
    kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap()
}

/// Token by token, and in uneven pieces: the same bits.
fn check_stream(kernel: &dyn Attention<f64>, [q, k, v]: [&Array2<f64>; 3], whole: &Array2<f64>) {
    for sizes in [vec![1; q.nrows()], vec![5, 1, 2, q.nrows()]] {
        let mut stream = kernel.stream(v.ncols()).unwrap();
        let (mut out, mut start) = (Array2::zeros(whole.dim()), 0);
        for size in sizes {
            let rows = s![start..q.nrows().min(start + size), ..];
            stream
                .extend(q.slice(rows), k.slice(rows), v.slice(rows), out.slice_mut(rows))
                .unwrap();
            start = q.nrows().min(start + size);
        }
        assert_eq!(out, whole);
    }
}

/// A linear memory that notes the log normalisers it is told.
#[derive(Clone, Debug)]
struct Listening<F> {
    memory: LinearMemory<f64, F>,
    heard: Arc<Mutex<Vec<f64>>>,
}

impl<F: FeatureMap<f64> + Clone + 'static> Memory<f64> for Listening<F> {
    fn absorb(&mut self, k: ArrayView2<'_, f64>, v: ArrayView2<'_, f64>) -> Result<(), Error> {
        self.memory.absorb(k, v)
    }
    fn read(&self, q: ArrayView2<'_, f64>, answer: &mut Partial<f64>) -> Result<(), Error> {
        self.memory.read(q, answer)
    }
    fn state_floats(&self) -> usize {
        self.memory.state_floats()
    }
    fn received(&mut self, _q: ArrayView2<'_, f64>, log_normalizer: ArrayView1<'_, f64>) {
        self.heard.lock().unwrap().extend(log_normalizer);
    }
}

#[test]
fn hybrid() {
    let file = golden("golden/hybrid");
    let (window, sinks) = (number(&file["window"]), number(&file["sinks"]));
    for case in file["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let [q, k, v] = ["q", "k", "v"].map(|x| matrix(&case[x]));
        let map = Performer::from_projection(matrix(&case["W"])).unwrap();
        let build =
            |far| HybridAttention::builder(4).window(window).sinks(sinks).far(far).build().unwrap();
        let kernel = build(Far::features(map.clone()));
        let out = forward(&kernel, [&q, &k, &v]);
        assert_close(name, &out, &matrix(&case["output"]), TOLERANCE);
        check_stream(&kernel, [&q, &k, &v], &out);
        let eye = Array2::eye(q.nrows());
        assert_close(name, &forward(&kernel, [&q, &k, &eye]), &matrix(&case["weights"]), TOLERANCE);
        let dropped = build(Far::none());
        let out = forward(&dropped, [&q, &k, &v]);
        assert_close(name, &out, &matrix(&case["output_far_dropped"]), TOLERANCE);
        check_stream(&dropped, [&q, &k, &v], &out);
        let exact = forward(&SoftmaxAttention::new(4).unwrap(), [&q, &k, &v]);
        assert_close(name, &exact, &matrix(&case["output_exact_softmax"]), TOLERANCE);

        let heard = Arc::new(Mutex::new(Vec::new()));
        let (map, ear) = (Arc::new(map), Arc::clone(&heard));
        let own = build(Far::memory(move |value_dim, scale| {
            let memory = LinearMemory::new(Arc::clone(&map), value_dim, scale)?;
            Ok(Box::new(Listening { memory, heard: Arc::clone(&ear) }))
        }));
        let out = forward(&own, [&q, &k, &v]);
        assert_close(name, &out, &matrix(&case["output"]), TOLERANCE);
        let exact = vector(&case["log_normaliser"]);
        for (found, exact) in heard.lock().unwrap().iter().zip(&exact) {
            assert!((found - exact).abs() <= 1e-12 * exact.abs(), "{name}: {found} {exact}");
        }
        assert_eq!(heard.lock().unwrap().len(), exact.len());
    }
}

#[test]
fn taylor2() {
    let file = golden("golden/taylor2");
    for case in file["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let [q, k, v] = ["q", "k", "v"].map(|x| matrix(&case[x]));
        let (window, sinks, rank) =
            (number(&case["window"]), number(&case["sinks"]), number(&case["r"]));
        let options = CalibrationOptions::new().with_window(window).with_sinks(sinks);
        let samples = [matrix(&case["calibration_q"]), matrix(&case["calibration_k"])];
        let calibration =
            Calibration::from_samples(samples[0].view(), samples[1].view(), options).unwrap();
        let builder =
            || HybridAttention::builder(6).window(window).sinks(sinks).calibrated(&calibration);
        let far = || Taylor::new(rank).fit(TaylorFit::Clamped);
        let check = |kernel: HybridAttention<f64>, column: &str| {
            let out = forward(&kernel, [&q, &k, &v]);
            assert_close(name, &out, &matrix(&case[column]), TOLERANCE);
            check_stream(&kernel, [&q, &k, &v], &out);
        };
        check(builder().far(far()).build().unwrap(), "output");
        check(builder().far(far()).heavy(number(&case["heavy"])).build().unwrap(), "output_heavy");
        let dropped = HybridAttention::builder(6)
            .window(window)
            .sinks(sinks)
            .far(Far::none())
            .build()
            .unwrap();
        check(dropped, "output_far_dropped");

        let heard = Arc::new(Mutex::new(Vec::new()));
        let map =
            Arc::new(CalibratedTaylor::with_fit(rank, &calibration, TaylorFit::Clamped).unwrap());
        let ear = Arc::clone(&heard);
        let far = Far::memory(move |value_dim, scale| {
            let memory = LinearMemory::new(Arc::clone(&map), value_dim, scale)?;
            Ok(Box::new(Listening { memory, heard: Arc::clone(&ear) }))
        });
        forward(
            &HybridAttention::builder(6).window(window).sinks(sinks).far(far).build().unwrap(),
            [&q, &k, &v],
        );
        let exact = vector(&case["log_normaliser"]);
        for (found, exact) in heard.lock().unwrap().iter().zip(&exact) {
            assert!(
                (found - exact).abs() <= 1e-9 * exact.abs().max(1.0),
                "{name}: {found} {exact}"
            );
        }
        assert_eq!(heard.lock().unwrap().len(), exact.len());
    }
}

/// A merged memory that gives the tokens the weights of a list, in order, and shows its entries.
#[derive(Clone, Debug)]
struct Weighted {
    memory: MergedMemory<f64>,
    weights: Vec<f64>,
    trace: Arc<Mutex<Vec<MergedMemory<f64>>>>,
}

impl Memory<f64> for Weighted {
    fn absorb(&mut self, k: ArrayView2<'_, f64>, v: ArrayView2<'_, f64>) -> Result<(), Error> {
        let seen = self.memory.len();
        self.memory.absorb_weighted(
            k,
            v,
            ArrayView1::from(&self.weights[seen..seen + k.nrows()]),
        )?;
        self.trace.lock().unwrap().push(self.memory.clone());
        Ok(())
    }
    fn read(&self, q: ArrayView2<'_, f64>, answer: &mut Partial<f64>) -> Result<(), Error> {
        self.memory.read(q, answer)
    }
    fn state_floats(&self) -> usize {
        self.memory.state_floats()
    }
}

fn check_entries(what: &str, memory: &MergedMemory<f64>, entries: &Value, key_scale: f64) {
    let entries = entries.as_array().unwrap();
    assert_eq!(memory.entries(), entries.len(), "{what}");
    let column = |x: &str| {
        let numbers: Vec<f64> = entries.iter().map(|e| e[x].as_f64().unwrap()).collect();
        Array2::from_shape_vec((numbers.len(), 1), numbers).unwrap()
    };
    let rows = |x: &str| {
        let rows: Vec<_> = entries.iter().map(|e| vector(&e[x])).collect();
        Array2::from_shape_fn((rows.len(), rows[0].len()), |(i, j)| rows[i][j])
    };
    let own = |x: &[f64]| Array2::from_shape_vec((x.len(), 1), x.to_vec()).unwrap();
    assert_close(what, &(memory.keys() * key_scale), &rows("key"), TOLERANCE);
    assert_close(what, &memory.values(), &rows("value"), TOLERANCE);
    assert_close(what, &own(memory.counts()), &column("count"), TOLERANCE);
    assert_close(what, &own(memory.weights()), &column("weight"), TOLERANCE);
}

#[test]
fn merged() {
    for case in golden("golden/merged")["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let [q, k, v] = ["q", "k", "v"].map(|x| matrix(&case[x]));
        let (window, sinks, entries) =
            (number(&case["window"]), number(&case["sinks"]), number(&case["entries_max"]));
        let (metric, weights) = (matrix(&case["R"]), vector(&case["a"]));
        let trace = Arc::new(Mutex::new(Vec::new()));
        let (seen, first) = (Arc::clone(&trace), weights.slice(s![sinks..]).to_vec());
        let plain = metric == Array2::<f64>::eye(4) && weights.iter().all(|&a| a == 1.0);
        let far = Far::memory(move |value_dim, scale| {
            let memory =
                MergedMemory::new(4, value_dim, entries, scale)?.with_metric(metric.clone())?;
            Ok(Box::new(Weighted { memory, weights: first.clone(), trace: Arc::clone(&seen) }))
        });
        let build =
            |far| HybridAttention::builder(4).window(window).sinks(sinks).far(far).build().unwrap();
        let out = forward(&build(far), [&q, &k, &v]);
        assert_close(name, &out, &matrix(&case["output"]), TOLERANCE);
        let steps = case["trace"].as_array().unwrap();
        let trace = trace.lock().unwrap();
        assert_eq!(trace.len(), steps.len());
        for (memory, step) in trace.iter().zip(steps) {
            check_entries(name, memory, &step["entries"], 1.0);
        }
        if plain || name.contains("ties") {
            let kernel = build(Far::ward(entries));
            let out = forward(&kernel, [&q, &k, &v]);
            assert_close(name, &out, &matrix(&case["output"]), TOLERANCE);
            check_stream(&kernel, [&q, &k, &v], &out);
        }
    }
}

/// The entries of each step and the attention received in the window are compared inside of the
/// crate.
#[test]
fn received() {
    for case in golden("golden/received")["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let group = number(&case["group"]);
        let heads: Vec<Array2<f64>> = case["q"].as_array().unwrap().iter().map(matrix).collect();
        let (k, v) = (matrix(&case["k"]), matrix(&case["v"]));
        let exact: Vec<Array2<f64>> =
            case["output"].as_array().unwrap().iter().map(matrix).collect();
        let far = Merged::new(number(&case["entries_max"]))
            .decay(case["gamma"].as_f64().unwrap())
            .min_age(number(&case["min_age"]))
            .value_weight(case["beta"].as_f64().unwrap().powi(2))
            .metric(Metric::Identity)
            .block(number(&case["block"]));
        let kernel = HybridAttention::builder(k.ncols())
            .window(number(&case["window"]))
            .sinks(number(&case["sinks"]))
            .far(far)
            .build()
            .unwrap();
        if group == 1 {
            let out = forward(&kernel, [&heads[0], &k, &v]);
            assert_close(name, &out, &exact[0], TOLERANCE);
            check_stream(&kernel, [&heads[0], &k, &v], &out);
        }
        let q = Array3::from_shape_fn((group, k.nrows(), k.ncols()), |(g, t, c)| heads[g][[t, c]]);
        let mut first: Option<Array3<f64>> = None;
        for size in [k.nrows(), 1, 3, 7] {
            let mut stream =
                kernel.stream_with(StreamOptions::new(v.ncols()).group(group)).unwrap();
            let mut out = Array3::zeros((group, k.nrows(), v.ncols()));
            for start in (0..k.nrows()).step_by(size) {
                let end = k.nrows().min(start + size);
                let (q, rows) = (q.slice(s![.., start..end, ..]), s![start..end, ..]);
                let out = out.slice_mut(s![.., start..end, ..]);
                stream
                    .extend_heads(&mut [Head::group(q, k.slice(rows), v.slice(rows), out)])
                    .unwrap();
            }
            for (found, exact) in out.outer_iter().zip(&exact) {
                assert_close(name, &found.to_owned(), exact, TOLERANCE);
            }
            assert!(first.as_ref().is_none_or(|first| *first == out), "{name}: pieces of {size}");
            first = Some(out);
        }
    }
}

/// Outputs of memories in fewer bits against those of wide numbers. Of entries that are rounded
/// other pairs may be the nearest: then outputs differ by what a merge makes of them.
#[test]
fn product_cost_by_format() {
    let tolerances =
        [(StateFormat::F32, 1e-10), (StateFormat::Bf16, 0.008), (StateFormat::Q8, 0.016)];
    for case in golden("golden/product_cost")["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let q: Vec<Array2<f64>> = case["q"].as_array().unwrap().iter().map(matrix).collect();
        let (k, v) = (matrix(&case["k"]), matrix(&case["v"]));
        let q = Array3::from_shape_fn((q.len(), k.nrows(), k.ncols()), |(g, t, c)| q[g][[t, c]]);
        let exact: Vec<_> = case["output"].as_array().unwrap().iter().map(matrix).collect();
        let square = case["value_norm_squared"].as_f64().unwrap();
        let units = MergeUnits::new(vector(&case["metric"]).to_vec(), square).unwrap();
        let far = Merged::new(number(&case["entries"]))
            .decay(case["decay"].as_f64().unwrap())
            .min_age(number(&case["min_age"]))
            .units(units);
        for (format, tolerance) in tolerances {
            let kernel = HybridAttention::builder(k.ncols())
                .window(number(&case["window"]))
                .sinks(number(&case["sinks"]))
                .scale(case["scale"].as_f64().unwrap())
                .far(far.clone())
                .state_format(format)
                .build()
                .unwrap();
            let options = StreamOptions::new(v.ncols()).group(q.len_of(Axis(0)));
            let mut stream = kernel.stream_with(options).unwrap();
            let mut out = Array3::<f64>::zeros((q.len_of(Axis(0)), k.nrows(), v.ncols()));
            let head = Head::group(q.view(), k.view(), v.view(), out.view_mut());
            stream.extend_heads(&mut [head]).unwrap();
            let (mut error, mut norm) = (0.0, 0.0);
            for (found, exact) in out.outer_iter().zip(&exact) {
                error += (&found - exact).mapv(|x| x * x).sum();
                norm += exact.mapv(|x| x * x).sum();
            }
            let error = (error / norm).sqrt();
            println!("{name}, {format:?}: {error:.1e}");
            assert!(error <= tolerance, "{name}, {format:?}: {error:e}");
        }
    }
}

/// A memory of one's own beside the window is the sum of both under one normaliser.
#[test]
fn partial_sums_of_window_and_memory() {
    let [q, k, v] = crate::common::tokens::<f64>(30, 4, 3, 1.0, 3);
    let mut memory = MergedMemory::new(4, 3, 5, 0.5).unwrap();
    memory.absorb(k.slice(s![..24, ..]), v.slice(s![..24, ..])).unwrap();
    let mut window = ExactMemory::new(4, 3, 0.5).unwrap();
    window.absorb(k.slice(s![24.., ..]), v.slice(s![24.., ..])).unwrap();
    let mut answer = Partial::new(1, 3).unwrap();
    let last = q.slice(s![29.., ..]);
    memory.read(last, &mut answer).unwrap();
    window.read(last, &mut answer).unwrap();
    let mut out = Array2::zeros((1, 3));
    answer.normalize_into(out.view_mut()).unwrap();
    let kernel = HybridAttention::builder(4).window(6).sinks(0).far(Far::ward(5)).build().unwrap();
    let whole = forward(&kernel, [&q, &k, &v]);
    assert_close("last token", &out, &whole.row(29).insert_axis(Axis(0)).to_owned(), 64.0);
}
