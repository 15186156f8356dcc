//! Many heads are the heads one by one: grouped queries, padding, layouts, streams, threads.

use crate::common::normal;
use dijiang::{Attention, Error, LinearAttention, Mask, MultiHead, Performer, SoftmaxAttention};
use ndarray::{Array2, Array3, Array4, s};
use std::sync::Arc;

fn random(shape: (usize, usize, usize, usize), seed: u64) -> Array4<f64> {
    let (b, h, n, d) = shape;
    Array4::from_shape_vec(
        shape,
        normal::<f64>(b * h * n, d, 1.0, seed).into_raw_vec_and_offset().0,
    )
    .unwrap()
}

fn kernels() -> Vec<Arc<dyn Attention<f64>>> {
    (0..6)
        .map(|seed| -> Arc<dyn Attention<f64>> {
            if seed == 4 {
                Arc::new(SoftmaxAttention::new(8).unwrap())
            } else {
                Arc::new(LinearAttention::new(Performer::new(8, 16, seed).unwrap()))
            }
        })
        .collect()
}

/// Every head alone, query head h on kv head h / 3.
fn one_by_one(
    q: &Array4<f64>,
    k: &Array4<f64>,
    v: &Array4<f64>,
    mask: Mask,
    lengths: &[usize],
) -> Array4<f64> {
    let mut out = Array4::zeros((q.dim().0, q.dim().1, q.dim().2, v.dim().3));
    for (b, &keys) in lengths.iter().enumerate() {
        let queries = if mask == Mask::Causal { keys } else { q.dim().2 };
        for (h, kernel) in kernels().iter().enumerate() {
            let head: Array2<f64> = kernel
                .forward(
                    q.slice(s![b, h, ..queries, ..]),
                    k.slice(s![b, h / 3, ..keys, ..]),
                    v.slice(s![b, h / 3, ..keys, ..]),
                    mask,
                )
                .unwrap();
            out.slice_mut(s![b, h, ..queries, ..]).assign(&head);
        }
    }
    out
}

#[test]
fn heads_are_independent_and_padding_changes_nothing() {
    let layer = MultiHead::per_head(kernels(), 2).unwrap();
    assert_eq!((layer.query_heads(), layer.kv_heads()), (6, 2));
    let q = random((3, 6, 20, 8), 1);
    for lengths in [[20, 20, 20], [20, 7, 1]] {
        for mask in [Mask::Causal, Mask::Full] {
            let (mut k, mut v) = (random((3, 2, 20, 8), 2), random((3, 2, 20, 5), 3));
            let exact = one_by_one(&q, &k, &v, mask, &lengths);
            for (b, &length) in lengths.iter().enumerate() {
                k.slice_mut(s![b, .., length.., ..]).fill(f64::NAN);
                v.slice_mut(s![b, .., length.., ..]).fill(f64::INFINITY);
            }
            let mut out = Array4::from_elem((3, 6, 20, 5), f64::NAN);
            layer
                .forward_into(q.view(), k.view(), v.view(), mask, Some(&lengths), out.view_mut())
                .unwrap();
            assert_eq!(out, exact);
            if lengths == [20, 20, 20] {
                assert_eq!(layer.forward(q.view(), k.view(), v.view(), mask, None).unwrap(), exact);
            }
        }
    }
}

/// Cross attention: another number of keys, and a `[batch, n, heads, d]` layout seen through
/// permuted axes.
#[test]
fn cross_attention_and_other_layouts() {
    let layer = MultiHead::per_head(kernels(), 2).unwrap();
    let (q, k, v) = (random((2, 6, 9, 8), 1), random((2, 2, 33, 8), 2), random((2, 2, 33, 5), 3));
    let exact = one_by_one(&q, &k, &v, Mask::Full, &[33, 33]);
    let permuted = [&q, &k, &v]
        .map(|x| x.view().permuted_axes([0, 2, 1, 3]).as_standard_layout().into_owned());
    let [q2, k2, v2] = permuted.each_ref().map(|x| x.view().permuted_axes([0, 2, 1, 3]));
    let mut buffer = Array4::from_elem((2, 9, 6, 5), f64::NAN);
    layer
        .forward_into(q2, k2, v2, Mask::Full, None, buffer.view_mut().permuted_axes([0, 2, 1, 3]))
        .unwrap();
    assert_eq!(buffer.permuted_axes([0, 2, 1, 3]), exact);
}

#[test]
fn streams_are_the_forward_pass() {
    let layer = MultiHead::per_head(kernels(), 2).unwrap();
    let (q, k, v) = (random((2, 6, 12, 8), 1), random((2, 2, 12, 8), 2), random((2, 2, 12, 5), 3));
    let lengths = [12, 8];
    let exact = one_by_one(&q, &k, &v, Mask::Causal, &lengths);
    let mut stream = layer.stream(2, 5).unwrap();
    let mut out = Array4::from_elem((2, 6, 12, 5), f64::NAN);
    for (piece, lengths) in
        [(0..4, None), (4..8, Some([4, 4])), (8..9, Some([1, 0])), (9..12, Some([3, 0]))]
    {
        let rows = s![.., .., piece, ..];
        stream
            .extend(
                q.slice(rows),
                k.slice(rows),
                v.slice(rows),
                lengths.as_ref().map(|l| &l[..]),
                out.slice_mut(rows),
            )
            .unwrap();
    }
    assert_eq!(stream.lengths(), lengths);
    assert!((&out - &exact).iter().all(|e| e.abs() < 1e-12));
    assert_eq!(stream.head(1, 5).unwrap().len(), 8);
    assert!(stream.head(1, 6).is_none() && stream.head(2, 0).is_none());
    let copy = stream.clone();
    stream.reset();
    assert_eq!((stream.lengths(), copy.lengths()), (vec![0, 0], vec![12, 8]));
    assert_eq!(copy.state_floats(), 2 * 5 * (2 * 16 * 6 + 1 + 16 * (16 + 5)) + 20 * 13);

    // restore one head
    let saved = copy.head(0, 3).unwrap().save().unwrap();
    stream.head_mut(0, 3).unwrap().restore(&saved).unwrap();
    assert_eq!(stream.head(0, 3).unwrap().len(), 12);
}

/// One bad head: no head of any sequence moves.
#[test]
fn a_failed_step_moves_no_head() {
    let layer = MultiHead::per_head(kernels(), 2).unwrap();
    let mut stream = layer.stream(2, 5).unwrap();
    let (q, mut k, v) = (random((2, 6, 3, 8), 1), random((2, 2, 3, 8), 2), random((2, 2, 3, 5), 3));
    let mut out = Array4::zeros((2, 6, 3, 5));
    stream.extend(q.view(), k.view(), v.view(), None, out.view_mut()).unwrap();
    let states = |stream: &dijiang::MultiHeadStream<f64>| -> Vec<_> {
        (0..12).map(|i| stream.head(i / 6, i % 6).unwrap().save().unwrap()).collect()
    };
    let before = states(&stream);
    for bad in [f64::NAN, 1e200] {
        k[[1, 1, 2, 0]] = bad;
        let error = stream.extend(q.view(), k.view(), v.view(), None, out.view_mut()).unwrap_err();
        assert!(matches!(error, Error::InHead { sequence: 1, .. }), "{error}");
        let inner = error.inner();
        assert!(matches!(inner, Error::NotFinite { .. } | Error::Overflow { .. }), "{error}");
        assert_eq!(states(&stream), before);
    }
}

#[test]
fn bad_shapes_are_named() {
    let kernel = || LinearAttention::new(Performer::<f64>::new(8, 16, 0).unwrap());
    assert!(matches!(MultiHead::<f64>::new(kernel(), 0, 1), Err(Error::ZeroSize { .. })));
    assert!(matches!(MultiHead::<f64>::new(kernel(), 4, 0), Err(Error::ZeroSize { .. })));
    assert!(matches!(
        MultiHead::<f64>::new(kernel(), 4, 3),
        Err(Error::InvalidOption { which: "kv_heads", .. })
    ));
    assert!(MultiHead::<f64>::new(kernel(), usize::MAX, 1).is_err());
    let layer = MultiHead::<f64>::new(kernel(), 4, 2).unwrap();
    assert!(
        layer.stream(0, 3).is_err()
            && layer.stream(2, 0).is_err()
            && layer.stream(usize::MAX, 1).is_err()
    );
    let x = |b, h, n, d| Array4::<f64>::zeros((b, h, n, d));
    let good = (x(2, 4, 5, 8), x(2, 2, 5, 8), x(2, 2, 5, 3));
    let run =
        |q: &Array4<f64>, k: &Array4<f64>, v: &Array4<f64>, mask, lengths: Option<&[usize]>| {
            layer.forward(q.view(), k.view(), v.view(), mask, lengths).err()
        };
    assert_eq!(run(&good.0, &good.1, &good.2, Mask::Full, None), None);
    for (q, k, v) in [
        (x(2, 3, 5, 8), good.1.clone(), good.2.clone()),
        (good.0.clone(), x(2, 4, 5, 8), good.2.clone()),
        (good.0.clone(), good.1.clone(), x(2, 1, 5, 3)),
        (x(1, 4, 5, 8), good.1.clone(), good.2.clone()),
        (good.0.clone(), good.1.clone(), x(2, 2, 4, 3)),
        (x(2, 4, 5, 7), good.1.clone(), good.2.clone()),
    ] {
        assert!(matches!(run(&q, &k, &v, Mask::Full, None), Some(Error::Shape { .. })));
    }
    assert!(matches!(
        run(&x(2, 4, 6, 8), &good.1, &good.2, Mask::Causal, None),
        Some(Error::Shape { .. })
    ));
    assert!(matches!(
        run(&good.0, &good.1, &good.2, Mask::Full, Some(&[5])),
        Some(Error::Shape { .. })
    ));
    let too_long = run(&good.0, &good.1, &good.2, Mask::Full, Some(&[5, 6]));
    assert!(matches!(too_long, Some(Error::InvalidOption { which: "key_lengths", .. })));
    // no key at all is no error, with either mask
    assert_eq!(run(&good.0, &good.1, &good.2, Mask::Full, Some(&[5, 0])), None);
    assert_eq!(run(&good.0, &good.1, &good.2, Mask::Causal, Some(&[5, 0])), None);
}

/// Threads change nothing, bit for bit: one thread, two, or the crate built without them.
#[cfg(feature = "rayon")]
#[test]
fn threads_change_nothing() {
    let layer = MultiHead::per_head(kernels(), 2).unwrap();
    let (q, k, v) = (random((3, 6, 40, 8), 1), random((3, 2, 40, 8), 2), random((3, 2, 40, 5), 3));
    let exact = one_by_one(&q, &k, &v, Mask::Causal, &[40, 40, 40]);
    for threads in [1, 2, 5] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let out = pool
            .install(|| layer.forward(q.view(), k.view(), v.view(), Mask::Causal, None))
            .unwrap();
        assert_eq!(out, exact);
    }
}

/// Streams large enough to be shared out: the same numbers, and all heads move or none.
#[cfg(feature = "rayon")]
#[test]
fn threads_change_no_stream() {
    let layer = MultiHead::per_head(kernels(), 2).unwrap();
    let (q, k, v) =
        (random((3, 6, 600, 8), 1), random((3, 2, 600, 8), 2), random((3, 2, 600, 5), 3));
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (mut stream, mut out) =
                (layer.stream(3, 5).unwrap(), Array4::zeros((3, 6, 600, 5)));
            for (start, end) in [(0, 200), (200, 201), (201, 600)] {
                let piece = s![.., .., start..end, ..];
                let (q, k, v) = (q.slice(piece), k.slice(piece), v.slice(piece));
                let mut bad = v.to_owned();
                bad[[2, 1, end - start - 1, 0]] = f64::NAN;
                let mut to = out.slice_mut(piece);
                assert!(stream.extend(q, k, bad.view(), None, to.view_mut()).is_err());
                assert_eq!(stream.lengths(), [start; 3]);
                stream.extend(q, k, v, None, to).unwrap();
            }
            out
        })
    };
    let one = run(1);
    assert_eq!(run(2), one);
    assert_eq!(run(5), one);
}

/// Tokens before heads, as projections leave them: the same numbers, forward and backward.
#[test]
fn rows_that_lie_apart() {
    let layer = MultiHead::per_head(kernels(), 2).unwrap();
    let n = 300;
    let (q, k) = (random((2, n, 6, 8), 1), random((2, n, 2, 8), 2));
    let (v, d_out) = (random((2, n, 2, 5), 3), random((2, n, 6, 5), 4));
    let apart = [&q, &k, &v, &d_out].map(|x| x.view().permuted_axes([0, 2, 1, 3]));
    let together = apart.map(|x| x.as_standard_layout().into_owned());
    let [q, k, v, d_out] = apart;
    let [q1, k1, v1, d1] = together.each_ref().map(|x| x.view());
    for lengths in [None, Some(&[n, 170][..])] {
        let found = layer.forward(q, k, v, Mask::Causal, lengths).unwrap();
        assert_eq!(found, layer.forward(q1, k1, v1, Mask::Causal, lengths).unwrap());
        let found = layer.backward(q, k, v, Mask::Causal, lengths, d_out).unwrap();
        assert_eq!(found, layer.backward(q1, k1, v1, Mask::Causal, lengths, d1).unwrap());
    }
}

/// One state serves the query heads of a kv head where they share the kernel.
#[test]
fn groups_share_a_state() {
    let [q, k, v] =
        [random((2, 6, 80, 8), 11), random((2, 2, 80, 8), 12), random((2, 2, 80, 5), 13)];
    let linear: Arc<dyn Attention<f64>> =
        Arc::new(LinearAttention::new(Performer::new(8, 16, 3).unwrap()));
    let unnormalized: Arc<dyn Attention<f64>> =
        Arc::new(LinearAttention::new(Performer::new(8, 16, 3).unwrap()).unnormalized());
    let softmax: Arc<dyn Attention<f64>> = Arc::new(SoftmaxAttention::new(8).unwrap());
    let sums = 2 * 16 * 6 + 1 + 16 * (16 + 5);
    for (kernel, floats) in [(linear, sums), (unnormalized, sums), (softmax, 80 * 13)] {
        let layer = MultiHead::per_kv_head(vec![kernel.clone(), kernel], 6).unwrap();
        let exact = layer.forward(q.view(), k.view(), v.view(), Mask::Causal, None).unwrap();
        let mut stream = layer.stream(2, 5).unwrap();
        let mut found = Array4::zeros(exact.dim());
        for (start, end) in [(0, 1), (1, 2), (2, 40), (40, 41), (41, 44), (44, 80)] {
            let piece = |x: &Array4<f64>| x.slice(s![.., .., start..end, ..]).to_owned();
            let (q, k, v) = (piece(&q), piece(&k), piece(&v));
            let mut out = Array4::zeros((2, 6, end - start, 5));
            // the last query head of the last sequence fails
            let mut bad = q.clone();
            bad[[1, 5, end - start - 1, 7]] = f64::NAN;
            assert!(stream.extend(bad.view(), k.view(), v.view(), None, out.view_mut()).is_err());
            assert_eq!(stream.lengths(), [start; 2]);
            stream.extend(q.view(), k.view(), v.view(), None, out.view_mut()).unwrap();
            found.slice_mut(s![.., .., start..end, ..]).assign(&out);
        }
        assert!(
            (&found - &exact)
                .iter()
                .all(|e| e.abs() < 1e-12 * exact.iter().fold(1.0_f64, |m, x| m.max(x.abs())))
        );
        assert_eq!(stream.state_floats(), 4 * floats);
        assert_eq!(layer.state_bytes(5, 80).unwrap(), 2 * floats * 8);
    }
}

/// Rows with the heads side by side, contiguous or not, are the same heads.
#[test]
fn rows_of_projections() {
    let (batch, heads, kv_heads, n, d) = (2, 4, 2, 12, 8);
    let [q, k, v] = [
        random((batch, n, heads, d), 1),
        random((batch, n, kv_heads, d), 2),
        random((batch, n, kv_heads, 3), 3),
    ];
    let order = [0, 2, 1, 3];
    for kernel in kernels().into_iter().filter(|kernel| kernel.stream(3).is_ok()) {
        let layer = MultiHead::per_kv_head(vec![kernel; kv_heads], heads).unwrap();
        let mut expected = Array4::zeros((batch, n, heads, 3));
        let mut stream = layer.stream(batch, 3).unwrap();
        let [by_q, by_k, by_v] = [&q, &k, &v].map(|x| x.view().permuted_axes(order));
        stream
            .extend(by_q, by_k, by_v, Some(&[12, 7]), expected.view_mut().permuted_axes(order))
            .unwrap();
        let expected = expected.into_shape_with_order((batch, n, heads * 3)).unwrap();
        let flat = |x: &Array4<f64>| {
            let (b, n, heads, d) = x.dim();
            x.clone().into_shape_with_order((b, n, heads * d)).unwrap()
        };
        let (q, k, v) = (flat(&q), flat(&k), flat(&v));
        let mut stream = layer.stream(batch, 3).unwrap();
        let mut out = Array3::from_elem((batch, n, heads * 3), f64::NAN);
        stream.extend_rows(q.view(), k.view(), v.view(), Some(&[12, 7]), out.view_mut()).unwrap();
        assert_eq!(out, expected);
        // other strides: columns outermost, and every second row
        let turned =
            |x: &Array3<f64>| x.view().permuted_axes([2, 1, 0]).as_standard_layout().into_owned();
        let (q, k, v) = (turned(&q), turned(&k), turned(&v));
        let mut out = Array3::from_elem((heads * 3, 2 * n, batch), f64::NAN);
        let mut stream = layer.stream(batch, 3).unwrap();
        let [q, k, v] = [&q, &k, &v].map(|x| x.view().permuted_axes([2, 1, 0]));
        stream
            .extend_rows(
                q,
                k,
                v,
                Some(&[12, 7]),
                out.slice_mut(s![.., ..;2, ..]).permuted_axes([2, 1, 0]),
            )
            .unwrap();
        let found = out.slice(s![.., ..;2, ..]).permuted_axes([2, 1, 0]);
        assert!(
            (&found - &expected).iter().all(|e| e.abs() < 1e-13),
            "other strides may add in another order"
        );
        assert!(
            out.slice(s![.., 1..;2, ..]).iter().all(|x| x.is_nan()),
            "what lies between is not touched"
        );
    }
    let layer = MultiHead::new(SoftmaxAttention::<f64>::new(d).unwrap(), heads, kv_heads).unwrap();
    let mut stream = layer.stream(1, 3).unwrap();
    let (q, k, v) =
        (Array3::zeros((1, 1, 23)), Array3::zeros((1, 1, 16)), Array3::zeros((1, 1, 6)));
    let mut out = Array3::zeros((1, 1, 12));
    let error = stream.extend_rows(q.view(), k.view(), v.view(), None, out.view_mut()).unwrap_err();
    assert!(
        matches!(error, Error::Shape { which: "q", axis: "columns", expected: 20, found: 23 }),
        "{error}"
    );
    let q = Array3::zeros((1, 1, 32));
    let error = stream
        .extend_rows(q.view(), k.view(), v.view(), None, out.slice_mut(s![.., .., ..11]))
        .unwrap_err();
    assert!(
        matches!(error, Error::Shape { which: "out", axis: "columns", expected: 12, found: 11 }),
        "{error}"
    );
    assert_eq!(stream.lengths(), [0]);
    stream.extend_rows(q.view(), k.view(), v.view(), None, out.view_mut()).unwrap();
}
