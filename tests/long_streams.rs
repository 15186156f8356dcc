//! A million tokens: accuracy holds and memory does not grow.

#[path = "suite/common/mod.rs"]
mod common;

use common::{features, normal};
use dijiang::attention::naive::linear::Recurrence;
use dijiang::{
    Attention, DctFeatures, Far, HybridAttention, LinearAttention, Mask, Merged, Performer,
    SoftmaxAttention, StateFormat,
};
use ndarray::{Array2, s};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Counts the bytes that are allocated now, and the most there have been.
struct Counter;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

// SAFETY: hands every call on to the system allocator.
unsafe impl GlobalAlloc for Counter {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        MOST.fetch_max(NOW.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: as called.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as called.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTER: Counter = Counter;

const MILLION: usize = 1_000_000;

#[test]
fn a_million_decode_steps_stay_accurate_and_do_not_grow() {
    let _guard = ONE_AT_A_TIME.lock();
    let (d, m, dv) = (8, 16, 4);
    let period = 4096; // tokens repeat after a while, the state does not know
    let [q, k, v] =
        [0, 1, 2].map(|seed| normal::<f32>(period, if seed == 2 { dv } else { d }, 1.0, seed));
    // values with a mean, so that the output is not a small difference of large sums
    let v = v + 1.0_f32;
    let wide_map = Performer::<f64>::new(d, m, 7).unwrap();
    let kernel = LinearAttention::new(Performer::<f32>::new(d, m, 7).unwrap());

    // the oracle: the recurrence in f64
    let scale = 1.0 / (d as f64).sqrt();
    let absolute =
        |x: &Array2<f32>, keys| features(&wide_map, &common::wide(x), scale, keys).absolute();
    let (fq, fk) = (absolute(&q, false), absolute(&k, true));
    let mut state = Recurrence::new(m, dv);
    let wide_v = common::wide(&v);

    let mut stream = Attention::<f32>::stream(&kernel, dv).unwrap();
    let mut out = Array2::<f32>::zeros((1, dv));
    let mut worst = 0.0_f64;
    let floats = stream.state_floats();
    let mut after_warm_up = (0, 0);
    for t in 0..MILLION {
        let row = s![t % period..=t % period, ..];
        stream.extend(q.slice(row), k.slice(row), v.slice(row), out.view_mut()).unwrap();
        state.step(fk.row(t % period), wide_v.row(t % period), |_| 1.0);
        if t % 997 == 0 || t == MILLION - 1 {
            let exact = state.read_normalized(fq.row(t % period));
            let size = exact.dot(&exact).sqrt();
            let error = (out.row(0).mapv(f64::from) - &exact).mapv(|x| x * x).sum().sqrt();
            worst = worst.max(error / size);
        }
        if t == 1000 {
            MOST.store(NOW.load(Relaxed), Relaxed);
            after_warm_up = (NOW.load(Relaxed), MOST.load(Relaxed));
        }
    }
    println!("largest relative error over a million decode steps: {worst:.2e}");
    assert!(worst < 1e-5, "{worst:e}");
    assert_eq!(stream.len(), MILLION);
    assert_eq!(stream.state_floats(), floats);
    assert!(NOW.load(Relaxed) <= after_warm_up.0 + 4096, "memory grew");
    assert!(
        MOST.load(Relaxed) <= after_warm_up.1 + (1 << 20),
        "a step allocated more than scratch"
    );
}

/// Merging memories: the output stays in the hull of the values, the state and the memory of the
/// process keep their size.
#[test]
fn a_million_tokens_through_merging_memories() {
    let _guard = ONE_AT_A_TIME.lock();
    let (d, dv, period) = (8, 4, 4099);
    let [q, k, v] =
        [0, 1, 2].map(|seed| normal::<f32>(period, if seed == 2 { dv } else { d }, 1.5, seed));
    let hull: Vec<(f32, f32)> = v
        .columns()
        .into_iter()
        .map(|c| c.fold((f32::MAX, f32::MIN), |(l, h), &x| (l.min(x), h.max(x))))
        .collect();
    let builder = || HybridAttention::<f32>::builder(d).window(32).sinks(2);
    for (far, piece) in
        [(Far::merged(24), 1), (Merged::new(24).block(8).into(), 1000), (Far::ward(24), 1)]
    {
        let mut stream = builder().far(far).build().unwrap().stream(dv).unwrap();
        let floats = stream.state_floats();
        let mut out = Array2::<f32>::zeros((piece, dv));
        let mut after_warm_up = 0;
        for t in (0..MILLION).step_by(piece) {
            let start = t % (period - piece + 1);
            let rows = s![start..start + piece, ..];
            stream.extend(q.slice(rows), k.slice(rows), v.slice(rows), out.view_mut()).unwrap();
            for (column, (low, high)) in out.columns().into_iter().zip(&hull) {
                assert!(
                    column.iter().all(|x| *x >= low - 1e-4 && *x <= high + 1e-4),
                    "t = {t}: {out}"
                );
            }
            if t == 10_000 {
                after_warm_up = NOW.load(Relaxed);
            }
        }
        assert_eq!((stream.len(), stream.state_floats()), (MILLION, floats));
        assert_eq!(NOW.load(Relaxed), after_warm_up, "memory grew");
    }
}

/// One value again and again: every addition rounds in the same direction, so that plain sums drift
/// by half an epsilon a token.
#[test]
fn the_same_token_again_and_again_does_not_drift() {
    let _guard = ONE_AT_A_TIME.lock();
    let (d, n, dv) = (8, 300_000, 2);
    let row = normal::<f32>(1, d, 1.0, 3);
    let k = row.broadcast((n, d)).unwrap();
    let v = Array2::from_elem((n, dv), 0.7_f32);
    let within = |name: &str, out: &Array2<f32>, value: f32| {
        let error = out.iter().fold(0.0_f32, |worst, x| worst.max((x / value - 1.0).abs()));
        let units = error / f32::EPSILON;
        println!("{name}: {units} epsilon");
        assert!(units < 64.0, "{name}: {units} epsilon");
    };
    let softmax = SoftmaxAttention::<f32>::new(d).unwrap();
    let bf16 = softmax.clone().with_state_format(StateFormat::Bf16);
    let rounded = half::bf16::from_f32(0.7).to_f32();
    for queries in [1, 3, 33] {
        let q = normal::<f32>(queries, d, 1.0, 4);
        let tail = |kernel: &SoftmaxAttention<f32>| {
            kernel.forward(q.view(), k, v.view(), Mask::CausalTail).unwrap()
        };
        within(&format!("softmax, {queries} queries"), &tail(&softmax), 0.7);
        within(&format!("bf16 softmax, {queries} queries"), &tail(&bf16), rounded);
    }
    let maps: [(&str, Box<dyn Attention<f32>>); 2] = [
        ("performer", Box::new(LinearAttention::new(Performer::<f32>::new(d, 16, 0).unwrap()))),
        ("dct", Box::new(LinearAttention::new(DctFeatures::<f32>::new(d, 16, 0).unwrap()))),
    ];
    for (name, kernel) in maps {
        for piece in [1, 100] {
            let mut stream = kernel.stream(dv).unwrap();
            let mut out = Array2::zeros((piece, dv));
            let rows = s![..piece, ..];
            for _ in 0..n / piece {
                let (k, v) = (k.slice(rows), v.slice(rows));
                stream.extend(k, k, v, out.view_mut()).unwrap();
            }
            within(&format!("{name}, {piece} at once"), &out, 0.7);
        }
    }
}

#[test]
fn a_million_token_forward_allocates_scratch_only() {
    let _guard = ONE_AT_A_TIME.lock();
    let (d, dv) = (4, 2);
    let input =
        [0, 1, 2].map(|seed| normal::<f32>(1000, if seed == 2 { dv } else { d }, 1.0, seed));
    let [q, k, v] = input.each_ref().map(|x| {
        let columns = x.ncols();
        x.broadcast((MILLION / 1000, 1000, columns))
            .unwrap()
            .to_owned()
            .into_shape_with_order((MILLION, columns))
            .unwrap()
    });
    let mut out = Array2::<f32>::zeros((MILLION, dv));
    let kernels: [Box<dyn Attention<f32>>; 2] = [
        Box::new(LinearAttention::new(Performer::<f32>::new(d, 8, 0).unwrap())),
        Box::new(LinearAttention::new(DctFeatures::<f32>::new(d, 8, 0).unwrap())),
    ];
    // with feature `rayon`, the first call starts the threads
    kernels[0].forward_into(q.view(), k.view(), v.view(), Mask::Causal, out.view_mut()).unwrap();
    for kernel in kernels {
        for mask in [Mask::Causal, Mask::Full] {
            let before = NOW.load(Relaxed);
            MOST.store(before, Relaxed);
            kernel.forward_into(q.view(), k.view(), v.view(), mask, out.view_mut()).unwrap();
            let scratch = MOST.load(Relaxed) - before;
            assert!(scratch < 1 << 20, "{mask:?}: {scratch} bytes of scratch");
            assert_eq!(NOW.load(Relaxed), before);
        }
        // the last row of a full forward is that of a causal one
        let rows = s![MILLION - 1.., ..];
        let full = out.slice(rows).to_owned();
        kernel.forward_into(q.view(), k.view(), v.view(), Mask::Causal, out.view_mut()).unwrap();
        common::assert_close("last row", &out.slice(rows).to_owned(), &common::wide(&full), 1000.0);
    }
}
