//! With feature `rayon`, several threads give what one gives, bit for bit; without, there is one
//! anyway.

use crate::common::normal;
use dijiang::{
    Attention, DctFeatures, EluFeatures, Error, FixedGates, LinearAttention, Mask, MultiHead,
    Performer, Retention, SoftmaxAttention,
};
use ndarray::{Array2, Array4, ArrayView4, s};

/// Runs `work` in a pool of so many threads.
fn on<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

fn kernels() -> Vec<(&'static str, Box<dyn Attention<f32>>)> {
    vec![
        ("performer", Box::new(LinearAttention::new(Performer::new(8, 37, 0).unwrap()))),
        ("dct", Box::new(LinearAttention::new(DctFeatures::new(64, 64, 0).unwrap()))),
        (
            "unnormalized",
            Box::new(LinearAttention::new(Performer::new(8, 16, 0).unwrap()).unnormalized()),
        ),
        ("softmax", Box::new(SoftmaxAttention::new(8).unwrap())),
        (
            "decay",
            Box::new(
                LinearAttention::new(Performer::new(8, 37, 0).unwrap())
                    .with_decay(1.0 - 1.0 / 32.0),
            ),
        ),
        ("retention", Box::new(Retention::new(8, 0.99).unwrap())),
        ("gates", gated(1, false)),
        ("gates and resets", gated(1, true)),
        ("gates of each feature", gated(8, false)),
    ]
}

/// ELU features with gates of each token.
fn gated(columns: usize, resets: bool) -> Box<dyn Attention<f32>> {
    let mut log_decay = normal::<f32>(2 * N, columns, 0.05, 9).mapv(|x| -x.abs());
    for row in [100, 3000, 3001, 6016, 8000].into_iter().filter(|_| resets) {
        log_decay.row_mut(row).fill(f32::NEG_INFINITY);
    }
    Box::new(FixedGates::new(
        LinearAttention::new(EluFeatures::<f32>::new(8).unwrap()).gated(),
        log_decay,
    ))
}

/// Sums that decay have an order.
fn has_full(name: &str) -> bool {
    !["decay", "retention", "gates", "gates and resets", "gates of each feature"].contains(&name)
}

fn head_dim(name: &str) -> usize {
    if name == "dct" { 64 } else { 8 }
}

/// Long enough for several blocks of chunks and a piece.
const N: usize = 4 * 32 * 64 + 77;

/// Ordinary tokens; keys that grow, so that groups end; one huge key; huge values.
fn inputs(d: usize) -> Vec<(&'static str, [Array2<f32>; 3])> {
    let ordinary =
        || [1, 2, 3].map(|seed| normal::<f32>(N, if seed == 3 { 5 } else { d }, 0.5, seed));
    let [mut growing, mut outlier, mut large] = [ordinary(), ordinary(), ordinary()];
    for (t, mut key) in growing[1].outer_iter_mut().enumerate() {
        key.mapv_inplace(|x| x * (1.0 + t as f32 / 500.0));
    }
    outlier[1].row_mut(5000).fill(40.0);
    large[2].row_mut(3000).fill(1e30);
    vec![("ordinary", ordinary()), ("growing", growing), ("outlier", outlier), ("large", large)]
}

#[test]
fn a_long_head_on_many_threads_is_that_on_one() {
    for (name, kernel) in kernels() {
        for (input, [q, k, v]) in inputs(head_dim(name)) {
            for mask in [Mask::Causal, Mask::Full] {
                if (name == "softmax" && input != "ordinary")
                    || (mask == Mask::Full && !has_full(name))
                {
                    continue; // n² scores: once is enough
                }
                let forward = || kernel.forward(q.view(), k.view(), v.view(), mask).unwrap();
                let one = on(1, forward);
                for threads in [2, 3] {
                    assert!(
                        on(threads, forward) == one,
                        "{name}, {input} keys, {mask:?}, {threads} threads"
                    );
                }
            }
        }
    }
}

#[test]
fn a_long_stream_on_many_threads_is_that_on_one() {
    for (name, kernel) in kernels() {
        let [q, k, v] = &inputs(head_dim(name))[1].1;
        let run = || {
            let mut out = Array2::zeros((N, 5));
            let mut stream = kernel.stream(5).unwrap();
            for rows in [0..3000, 3000..3001, 3001..N] {
                let rows = s![rows, ..];
                stream
                    .extend(q.slice(rows), k.slice(rows), v.slice(rows), out.slice_mut(rows))
                    .unwrap();
            }
            (out, stream.save().unwrap())
        };
        assert!(on(1, run) == on(2, run), "{name}");
    }
}

#[test]
fn errors_on_many_threads_name_the_row_and_keep_the_state() {
    for (name, kernel) in kernels() {
        let [q, k, v] = &inputs(head_dim(name))[0].1;
        let mut stream = kernel.stream(5).unwrap();
        let mut out = Array2::zeros((N, 5));
        on(2, || {
            let rows = s![..300, ..];
            stream
                .extend(q.slice(rows), k.slice(rows), v.slice(rows), out.slice_mut(rows))
                .unwrap();
            let before = stream.save().unwrap();
            let mut bad = k.clone();
            bad[[7000, 2]] = f32::NAN;
            let result = stream.extend(q.view(), bad.view(), v.view(), out.view_mut());
            assert_eq!(
                result,
                Err(Error::NotFinite { which: "k", row: 7000, column: 2 }),
                "{name}"
            );
            assert!(stream.save().unwrap() == before, "{name}");
        });
    }
}

/// Heads side by side that are long themselves.
#[test]
fn long_heads_side_by_side() {
    let [q, k, v] = &inputs(8)[0].1;
    let two = |x: &Array2<f32>| {
        let (n, d) = x.dim();
        Array4::from_shape_fn((1, 2, n, d), |(_, h, t, i)| {
            x[[if h == 0 { t } else { n - 1 - t }, i]]
        })
    };
    let [q, k, v] = [q, k, v].map(two);
    let layer =
        MultiHead::new(LinearAttention::new(Performer::<f32>::new(8, 37, 0).unwrap()), 2, 2)
            .unwrap();
    let views: [ArrayView4<f32>; 3] = [q.view(), k.view(), v.view()];
    let run = || layer.forward(views[0], views[1], views[2], Mask::Causal, None).unwrap();
    let one = on(1, run);
    for threads in [2, 3] {
        assert_eq!(on(threads, run), one);
    }
}
