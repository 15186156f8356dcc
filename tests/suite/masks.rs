//! The causal mask that is aligned at the end: the tail of a sequence gets what it gets of the
//! whole.

use crate::common::formats::{packed_hybrids, packed_softmax};
use crate::common::gradients::{Call, Found, Trained, check_differences};
use crate::common::{
    Subject, assert_close, optional_subjects, strided, subjects, tokens, wide, written_subjects,
};
use dijiang::attention::naive::{self, hybrid::Near, options};
use dijiang::{
    Attention, EluFeatures, Error, Far, Head, HybridAttention, LinearAttention, Linformer, Mask,
    MemoryAttention, Merged, MultiHead, Padding, Performer, Rotary, RotaryAttention, Scalar,
    Scratch, SoftmaxAttention, fidelity,
};
use ndarray::{Array2, Array3, Array4, s};

const SIZES: [[usize; 2]; 12] = [
    [0, 0],
    [0, 5],
    [1, 1],
    [1, 2],
    [1, 64],
    [2, 63],
    [17, 65],
    [63, 64],
    [65, 65],
    [64, 130],
    [70, 130],
    [3, 150],
];

/// Every kernel of the library.
fn all_subjects() -> Vec<Subject> {
    let (d, m) = (4, 7);
    let mut all = subjects(d, m);
    all.extend(optional_subjects(d, m));
    all.extend(written_subjects(d, m));
    all.extend(packed_softmax(d));
    all.extend(packed_hybrids(d, m));
    all
}

/// Whether the queries of all tokens are needed: it learns from them, or has no order of tokens.
fn needs_all(subject: &Subject) -> bool {
    subject.name.contains("Merged(") || !subject.has_streams()
}

fn forward<T: Scalar>(
    kernel: &dyn Attention<T>,
    [q, k, v]: [&Array2<T>; 3],
    mask: Mask,
) -> Result<Array2<T>, Error> {
    kernel.forward(q.view(), k.view(), v.view(), mask)
}

fn check_tail<T: Scalar>(subject: &Subject, kernel: &dyn Attention<T>) {
    for [n_q, n_k] in SIZES {
        let [q, k, v] = tokens::<T>(n_k, subject.head_dim, 3, 0.6, n_k as u64);
        let tail = q.slice(s![n_k - n_q.., ..]).to_owned();
        let what = format!("{} {n_q} of {n_k} {}", subject.name, T::NAME);
        if needs_all(subject) && (n_q < n_k || !subject.has_streams()) {
            let error = forward(kernel, [&tail, &k, &v], Mask::CausalTail).unwrap_err();
            assert!(matches!(error, Error::Unsupported { .. }), "{what}: {error}");
            continue;
        }
        let found = forward(kernel, [&tail, &k, &v], Mask::CausalTail)
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        let whole = forward(kernel, [&q, &k, &v], Mask::Causal).unwrap();
        if n_q == n_k {
            assert_eq!(found, whole, "{what}");
            continue;
        }
        let exact = subject.oracle(&wide(&q), &wide(&k), &wide(&v), Mask::Causal);
        let exact = exact.slice(s![n_k - n_q.., ..]).to_owned();
        assert_close(&what, &found, &exact, 4.0 * subject.units::<T>());
        // and whatever way the arrays lie
        let large = [&tail, &k, &v].map(|x| strided(x.view()));
        let [q, k, v] = [0, 1, 2].map(|i| large[i].slice(s![..;2, ..;3]));
        let of_views = kernel.forward(q, k, v, Mask::CausalTail);
        assert_close(&what, &of_views.unwrap(), &wide(&found), 64.0);
    }
}

#[test]
fn the_tail_of_a_sequence_gets_what_it_gets_of_the_whole() {
    for subject in all_subjects() {
        check_tail::<f64>(&subject, &*subject.f64);
        check_tail::<f32>(&subject, &*subject.f32);
    }
}

#[test]
fn formulas_know_the_tail() {
    let (n_q, n_k) = (5, 12);
    let [q, k, v] = tokens::<f64>(n_k, 4, 3, 0.6, 2);
    let tail = q.slice(s![n_k - n_q.., ..]).to_owned();
    let phi = |x: &Array2<f64>| naive::features::relu(x, 0.1);
    let near = Near::new(3, 1);
    type Formula<'a> = (&'a str, Box<dyn Fn(&Array2<f64>, Mask) -> Array2<f64> + 'a>);
    let formulas: [Formula; 6] = [
        ("softmax", Box::new(|q, mask| naive::softmax(q, &k, &v, 0.5, mask))),
        (
            "alibi",
            Box::new(|q, mask| {
                let logs = options::alibi(naive::scores(q, &k, 0.5), 0.3, mask);
                options::with_sink(&logs, &v, Some(0.2), mask)
            }),
        ),
        ("linear", Box::new(|q, mask| naive::linear::normalized(&phi(q), &phi(&k), &v, mask))),
        ("cosformer", Box::new(|q, mask| naive::positional::cosformer(q, &k, &v, 20, 0.1, mask))),
        ("window", Box::new(|q, mask| naive::hybrid::window_only(q, &k, &v, 0.5, &near, mask))),
        (
            "features",
            Box::new(|q, mask| {
                naive::hybrid::with_features([q, &k, &v], 0.5, &near, [&phi(q), &phi(&k)], mask)
            }),
        ),
    ];
    for (name, formula) in &formulas {
        let whole = formula(&q, Mask::Causal).slice(s![n_k - n_q.., ..]).to_owned();
        assert_close(name, &formula(&tail, Mask::CausalTail), &whole, 16.0);
    }
}

fn rows_of(found: &Found<f64>, n_q: usize) -> Found<f64> {
    let first = found.q.dim().1 - n_q;
    Found { q: found.q.slice(s![.., first.., ..]).to_owned(), ..found.clone() }
}

/// The gradient of a tail is that of the whole whose first cotangents are zero.
fn check_gradient_of_tail(subject: &Trained<'_>) {
    for [n_q, n_k] in SIZES {
        let mut whole = Call::<f64>::new(subject, 2, [n_k, n_k], n_k as u64);
        let first = n_k - n_q;
        whole.d_out.slice_mut(s![.., ..first, ..]).fill(0.0);
        let tail = Call {
            q: whole.q.slice(s![.., first.., ..]).to_owned(),
            d_out: whole.d_out.slice(s![.., first.., ..]).to_owned(),
            ..whole.clone()
        };
        let what = format!("{} {n_q} of {n_k}", subject.name);
        let mut scratch = Scratch::new();
        let mut gradient = |call: &Call<f64>, mask| {
            call.gradient(subject.f64, mask, 0.0, &mut scratch)
                .unwrap_or_else(|error| panic!("{what}: {error}"))
        };
        let found = gradient(&tail, Mask::CausalTail);
        let exact = gradient(&whole, Mask::Causal);
        found.assert_close(&what, &rows_of(&exact, n_q), 1e5);
        if subject.name.contains("Some(90.0)") {
            continue; // too small for f32
        }
        let narrow = tail.narrowed::<f32>();
        let narrow = narrow.gradient(subject.f32, Mask::CausalTail, 0.0, &mut Scratch::new());
        let units = if subject.f32.parameters().is_empty() { 4096.0 } else { 65536.0 };
        narrow.unwrap().assert_close(&format!("{what} f32"), &found, units);
    }
    if !subject.name.contains("WardCalibrated") {
        check_differences(subject, Mask::CausalTail, [5, 70]);
        check_differences(subject, Mask::CausalTail, [66, 131]);
    }
}

fn trained<'a>(subject: &'a Subject) -> Trained<'a> {
    Trained {
        name: &subject.name,
        head_dim: subject.head_dim,
        f64: &*subject.f64,
        f32: &*subject.f32,
        masks: &[Mask::CausalTail],
        gates: 0,
        size: 0.7,
    }
}

#[test]
fn the_gradient_of_a_tail_is_that_of_the_whole() {
    for subject in all_subjects() {
        let call = Call::<f64>::new(&trained(&subject), 1, [4, 4], 1);
        let has_gradient = call.gradient(&*subject.f64, Mask::Causal, 0.0, &mut Scratch::new());
        if has_gradient.is_err() || needs_all(&subject) {
            continue;
        }
        check_gradient_of_tail(&trained(&subject));
    }
}

fn gated<T: Scalar>(normalized: bool) -> LinearAttention<Performer<T>> {
    let kernel = LinearAttention::new(Performer::new(4, 6, 3).unwrap()).with_scale(0.5).gated();
    if normalized { kernel } else { kernel.unnormalized().with_decay(0.95) }
}

#[test]
fn gates_of_all_tokens_have_their_gradient() {
    for gates in [1, 6] {
        for normalized in [true, false] {
            let turn = || Rotary::new(4).unwrap();
            check_gradient_of_tail(&Trained {
                name: &format!("gates {gates} normalized {normalized}"),
                head_dim: 4,
                f64: &gated::<f64>(normalized),
                f32: &gated::<f32>(normalized),
                masks: &[Mask::CausalTail],
                gates,
                size: 0.7,
            });
            check_gradient_of_tail(&Trained {
                name: &format!("rotated gates {gates} normalized {normalized}"),
                head_dim: 4,
                f64: &RotaryAttention::new(turn(), gated::<f64>(normalized)),
                f32: &RotaryAttention::new(turn(), gated::<f32>(normalized)),
                masks: &[Mask::CausalTail],
                gates,
                size: 0.7,
            });
        }
    }
}

/// A tape does not hold all tokens before the tail.
#[test]
fn long_sequences_before_a_tail() {
    let kernel = LinearAttention::new(Performer::<f64>::new(4, 3000, 3).unwrap());
    let narrow = LinearAttention::new(Performer::<f32>::new(4, 3000, 3).unwrap());
    let subject = Trained {
        name: "performer of 3000",
        head_dim: 4,
        f64: &kernel,
        f32: &narrow,
        masks: &[],
        gates: 0,
        size: 0.5,
    };
    check_differences(&subject, Mask::CausalTail, [200, 1200]);
}

/// Groups of query heads, and a memory of one's own.
#[test]
fn groups_of_query_heads() {
    let kernels: [Box<dyn Attention<f64>>; 4] = [
        Box::new(SoftmaxAttention::new(4).unwrap().with_alibi_slopes(vec![0.1, 0.2, 0.4]).unwrap()),
        Box::new(LinearAttention::new(EluFeatures::new(4).unwrap()).with_decay(0.9)),
        Box::new(HybridAttention::builder(4).window(5).sinks(2).far(Far::ward(4)).build().unwrap()),
        Box::new(MemoryAttention::new(4, |dv| dijiang::ExactMemory::new(4, dv, 0.5)).unwrap()),
    ];
    let (n_q, n_k) = (40, 100);
    let [x, k, v] = tokens::<f64>(3 * n_k, 4, 3, 0.6, 2);
    let q = Array3::from_shape_vec((3, n_k, 4), x.into_raw_vec_and_offset().0).unwrap();
    let [k, v] = [k, v].map(|x| x.slice(s![..n_k, ..]).to_owned());
    for kernel in &kernels {
        let run = |q: ndarray::ArrayView3<f64>, mask| {
            let mut out = Array3::from_elem((3, q.dim().1, 3), f64::NAN);
            let mut heads = [Head::group(q, k.view(), v.view(), out.view_mut())];
            kernel.forward_heads(&mut heads, mask, &mut Scratch::new()).unwrap();
            out
        };
        let whole = run(q.view(), Mask::Causal);
        let tail = run(q.slice(s![.., n_k - n_q.., ..]), Mask::CausalTail);
        for (found, exact) in tail.outer_iter().zip(whole.outer_iter()) {
            let exact = exact.slice(s![n_k - n_q.., ..]).to_owned();
            assert_close(&format!("{kernel:?}"), &found.to_owned(), &exact, 64.0);
        }
    }
}

#[test]
fn a_tail_that_has_no_meaning_is_refused() {
    let x = Array2::<f64>::zeros((6, 4));
    let few = Array2::<f64>::zeros((5, 4));
    let softmax = SoftmaxAttention::new(4).unwrap();
    let shape = Error::Shape { which: "k", axis: "rows", expected: 6, found: 5 };
    assert_eq!(forward(&softmax, [&x, &few, &few], Mask::CausalTail), Err(shape.clone()));
    let d_out = x.view();
    let error = softmax.backward(x.view(), few.view(), few.view(), d_out, Mask::CausalTail);
    assert_eq!(error.unwrap_err(), shape);

    let merged = HybridAttention::builder(4).window(2).far(Far::merged(4)).build().unwrap();
    let own = HybridAttention::builder(4).window(2).far(Merged::new(4)).build().unwrap();
    let linformer = Linformer::<f64>::new(4, 10, 2, 0).unwrap();
    let kernels: [&dyn Attention<f64>; 3] = [&merged, &own, &linformer];
    for kernel in kernels {
        for error in [
            forward(kernel, [&few, &x, &x], Mask::CausalTail).unwrap_err(),
            kernel
                .backward(few.view(), x.view(), x.view(), few.view(), Mask::CausalTail)
                .unwrap_err(),
        ] {
            assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        }
    }
    let error = fidelity::compare(&softmax, few.view(), x.view(), x.view(), Mask::CausalTail);
    assert!(matches!(error, Err(Error::Unsupported { .. })));
    assert!(fidelity::compare(&softmax, x.view(), x.view(), x.view(), Mask::CausalTail).is_ok());
}

#[test]
fn errors_name_rows_of_their_arrays() {
    let [x, _, _] = tokens::<f64>(100, 4, 4, 0.5, 1);
    let q = x.slice(s![..30, ..]).to_owned();
    let gates = Array2::from_elem((100, 1), -0.1);
    for which in ["q", "k", "v", "log_decay"] {
        for row in [2, 28, 97] {
            let [mut q, mut k, mut v] = [q.clone(), x.clone(), x.clone()];
            let mut gates = gates.clone();
            match which {
                "q" if row > 30 => continue,
                "q" => q[[row, 1]] = f64::NAN,
                "k" => k[[row, 1]] = f64::NAN,
                "v" => v[[row, 1]] = f64::NAN,
                _ => gates[[row, 0]] = 1.0,
            }
            let mut out = Array2::zeros((30, 4));
            let head = Head::new(q.view(), k.view(), v.view(), out.view_mut());
            let error = gated::<f64>(true)
                .forward_heads(
                    &mut [head.with_log_decay(gates.view())],
                    Mask::CausalTail,
                    &mut Scratch::new(),
                )
                .unwrap_err();
            let (mut d_q, mut d_gates) = (q.clone(), gates.clone());
            let [mut d_k, mut d_v] = [x.clone(), x.clone()];
            let d = [d_q.view_mut(), d_k.view_mut(), d_v.view_mut()];
            let head = dijiang::HeadGradient::new(
                [q.view(), k.view(), v.view()],
                x.slice(s![..30, ..]),
                d,
            );
            let mut heads = [head.with_log_decay(gates.view(), d_gates.view_mut())];
            let back = gated::<f64>(true)
                .backward_heads(&mut heads, Mask::CausalTail, &mut Scratch::new())
                .unwrap_err();
            for error in [error, back] {
                if which == "log_decay" {
                    assert!(error.to_string().contains(&format!("row {row},")), "{error}");
                } else {
                    assert_eq!(error, Error::NotFinite { which, row, column: 1 });
                }
            }
        }
    }
}

/// Sequences of a batch are aligned each at its own end.
#[test]
fn layers_with_lengths() {
    let kernels: [Box<dyn Attention<f64>>; 3] = [
        Box::new(SoftmaxAttention::new(4).unwrap()),
        Box::new(LinearAttention::new(EluFeatures::new(4).unwrap())),
        Box::new(RotaryAttention::new(Rotary::new(4).unwrap(), SoftmaxAttention::new(4).unwrap())),
    ];
    let (n_q, n_k, lengths) = (3, 9, [9, 5, 2, 0, 3]);
    let x = |heads, n, phase: f64| {
        Array4::from_shape_fn((5, heads, n, 4), |(b, h, t, c)| {
            (phase + (b * 97 + h * 31 + t * 7 + c) as f64 * 0.37).sin()
        })
    };
    let (q, k, v, d_out) = (x(4, n_q, 0.1), x(2, n_k, 0.2), x(2, n_k, 0.3), x(4, n_q, 0.4));
    for kernel in kernels {
        for padding in [Padding::Right, Padding::Left] {
            let layer = MultiHead::new(kernel_of(&*kernel), 4, 2).unwrap().with_padding(padding);
            let [mut q, mut k, mut v] = [&q, &k, &v].map(Clone::clone);
            let mut d_out = d_out.clone();
            let real: Vec<_> = lengths
                .iter()
                .map(|&length| match padding {
                    Padding::Right => 0..length,
                    Padding::Left => n_k - length..n_k,
                })
                .collect();
            for (b, (real, &length)) in real.iter().zip(&lengths).enumerate() {
                for t in (0..n_k).filter(|t| !real.contains(t)) {
                    k.slice_mut(s![b, .., t, ..]).fill(f64::NAN);
                    v.slice_mut(s![b, .., t, ..]).fill(f64::NAN);
                }
                let unseen = n_q - n_q.min(length);
                q.slice_mut(s![b, .., ..unseen, ..]).fill(f64::NAN);
                d_out.slice_mut(s![b, .., ..unseen, ..]).fill(f64::NAN);
            }
            let views = [q.view(), k.view(), v.view()];
            let [qv, kv, vv] = views;
            let out = layer.forward(qv, kv, vv, Mask::CausalTail, Some(&lengths)).unwrap();
            let d =
                layer.backward(qv, kv, vv, Mask::CausalTail, Some(&lengths), d_out.view()).unwrap();
            for (b, real) in real.iter().enumerate() {
                let asked = n_q - n_q.min(real.len())..n_q;
                for h in 0..4 {
                    let of = |x: &Array4<f64>, h: usize, rows: &std::ops::Range<usize>| {
                        x.slice(s![b, h, rows.clone(), ..]).to_owned()
                    };
                    let beyond = out.slice(s![b, h, ..asked.start, ..]);
                    assert!(beyond.iter().all(|&x| x == 0.0));
                    if real.is_empty() {
                        continue;
                    }
                    let [q, k, v] = [of(&q, h, &asked), of(&k, h / 2, real), of(&v, h / 2, real)];
                    let alone = forward(&*kernel, [&q, &k, &v], Mask::CausalTail).unwrap();
                    assert_eq!(of(&out, h, &asked), alone, "{padding:?} {b} {h}");
                    let d_out = of(&d_out, h, &asked);
                    let of_head = kernel
                        .backward(q.view(), k.view(), v.view(), d_out.view(), Mask::CausalTail)
                        .unwrap();
                    assert_close("d_q", &of(&d.q, h, &asked), &of_head.q, 64.0);
                }
                let nothing = |x: &Array4<f64>| {
                    (0..n_k)
                        .filter(|t| !real.contains(t))
                        .all(|t| x.slice(s![b, .., t, ..]).iter().all(|&x| x == 0.0))
                };
                assert!(nothing(&d.k) && nothing(&d.v));
            }
            // without lengths there may not be more queries than keys
            let error = layer.forward(kv, qv, qv, Mask::CausalTail, None).unwrap_err();
            assert!(matches!(error, Error::Shape { .. }), "{error}");
        }
    }

    /// The kernel once more, for a layer of its own.
    fn kernel_of(kernel: &dyn Attention<f64>) -> Box<dyn Attention<f64>> {
        kernel.with_parameters(&kernel.parameters()).unwrap()
    }
}

/// Heads of one call to a hybrid go step by step together.
#[test]
fn heads_of_a_hybrid_must_be_of_one_length() {
    let kernel = HybridAttention::<f64>::builder(4).window(3).far(Far::none()).build().unwrap();
    let (x, y) = (Array2::<f64>::zeros((6, 4)), Array2::<f64>::zeros((8, 4)));
    for (mask, q) in [(Mask::Causal, &y), (Mask::CausalTail, &x)] {
        let [mut a, mut b] = [Array2::zeros((6, 4)), Array2::zeros(q.dim())];
        let mut heads = [
            Head::new(x.view(), x.view(), x.view(), a.view_mut()),
            Head::new(q.view(), y.view(), y.view(), b.view_mut()),
        ];
        let error = kernel.forward_heads(&mut heads, mask, &mut Scratch::new()).unwrap_err();
        assert_eq!(error, Error::Shape { which: "k", axis: "rows", expected: 6, found: 8 });
    }
}

/// Sequences of which several threads take their share, where there are any.
#[test]
fn long_tails() {
    let map = || Performer::<f64>::new(4, 12, 3).unwrap();
    let channels = ndarray::Array1::from_shape_fn(12, |i| 0.999 - 0.01 * i as f64);
    let kernels: [Box<dyn Attention<f64>>; 5] = [
        Box::new(LinearAttention::new(map())),
        Box::new(LinearAttention::new(map()).with_decay(0.999)),
        Box::new(LinearAttention::new(map()).with_channel_decay(channels)),
        Box::new(SoftmaxAttention::new(4).unwrap()),
        Box::new(SoftmaxAttention::new(4).unwrap().with_window(300).unwrap()),
    ];
    for [n_q, n_k] in [[1400, 3000], [600, 900], [10, 1200]] {
        let [q, k, v] = tokens::<f64>(n_k, 4, 3, 0.6, 2);
        let tail = q.slice(s![n_k - n_q.., ..]).to_owned();
        for kernel in &kernels {
            let whole = forward(&**kernel, [&q, &k, &v], Mask::Causal).unwrap();
            let whole = whole.slice(s![n_k - n_q.., ..]).to_owned();
            let found = forward(&**kernel, [&tail, &k, &v], Mask::CausalTail).unwrap();
            assert_close(&format!("{kernel:?} {n_q} {n_k}"), &found, &whole, 2000.0);
        }
    }
}
