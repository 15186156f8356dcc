//! The backward pass of softmax attention: against golden values, against its formula over many
//! sizes and options, against differences of the forward pass, and at the ends of the range.

use crate::common::{assert_close, golden, matrix, normal};
use dijiang::attention::naive::gradient::softmax_gradient;
use dijiang::attention::naive::options::Options;
use dijiang::{
    Attention, EluFeatures, Error, ForwardRecord, Head, HeadGradient, HybridAttention,
    LinearAttention, Mask, Parameters, Scalar, Scratch, SoftmaxAttention, StateFormat,
};
use ndarray::{Array1, Array2, Array3, ArrayView3, ArrayViewMut3, Axis, s};

/// Where the numbers of an array lie.
#[derive(Clone, Copy, Debug)]
enum Layout {
    Contiguous,
    /// Every second row and third column of a larger array.
    Strided,
    /// Column after column.
    Transposed,
}

const LAYOUTS: [Layout; 3] = [Layout::Contiguous, Layout::Strided, Layout::Transposed];

impl Layout {
    fn store<T: Scalar>(self, x: &Array3<T>) -> Array3<T> {
        let (a, b, c) = x.dim();
        match self {
            Self::Contiguous => x.clone(),
            Self::Strided => {
                let mut large = Array3::from_elem((a, 2 * b, 3 * c), T::nan());
                large.slice_mut(s![.., ..;2, ..;3]).assign(x);
                large
            }
            Self::Transposed => x.view().permuted_axes([2, 0, 1]).as_standard_layout().into_owned(),
        }
    }

    fn view<T>(self, x: &Array3<T>) -> ArrayView3<'_, T> {
        match self {
            Self::Contiguous => x.view(),
            Self::Strided => x.slice(s![.., ..;2, ..;3]),
            Self::Transposed => x.view().permuted_axes([1, 2, 0]),
        }
    }

    fn view_mut<T>(self, x: &mut Array3<T>) -> ArrayViewMut3<'_, T> {
        match self {
            Self::Contiguous => x.view_mut(),
            Self::Strided => x.slice_mut(s![.., ..;2, ..;3]),
            Self::Transposed => x.view_mut().permuted_axes([1, 2, 0]),
        }
    }
}

/// Queries and cotangents of a group, keys and values, in f64.
#[derive(Clone, Debug)]
struct Input {
    q: Array3<f64>,
    k: Array2<f64>,
    v: Array2<f64>,
    d_out: Array3<f64>,
}

impl Input {
    fn new(group: usize, [n_q, n_k]: [usize; 2], [d, d_v]: [usize; 2], seed: u64) -> Self {
        let heads = |columns, seed| {
            let rows: Array2<f64> = normal(group * n_q, columns, 1.0, seed);
            rows.into_shape_with_order((group, n_q, columns)).unwrap()
        };
        Self {
            q: heads(d, 4 * seed),
            k: normal(n_k, d, 1.0, 4 * seed + 1),
            v: normal(n_k, d_v, 1.0, 4 * seed + 2),
            d_out: heads(d_v, 4 * seed + 3),
        }
    }

    /// The same, rounded to a type.
    fn rounded<T: Scalar>(mut self) -> Self {
        let round = |x: f64| T::from_f64(x).as_f64();
        self.q.mapv_inplace(round);
        self.k.mapv_inplace(round);
        self.v.mapv_inplace(round);
        self.d_out.mapv_inplace(round);
        self
    }
}

/// The options of a kernel.
#[derive(Clone, Debug, Default)]
struct Chosen {
    scale: Option<f64>,
    soft_cap: Option<f64>,
    sink_logits: Vec<f64>,
    slopes: Vec<f64>,
}

impl Chosen {
    fn kernel<T: Scalar>(&self, d: usize) -> SoftmaxAttention<T> {
        let mut kernel = SoftmaxAttention::new(d).unwrap();
        if let Some(scale) = self.scale {
            kernel = kernel.with_scale(scale);
        }
        if let Some(cap) = self.soft_cap {
            kernel = kernel.with_soft_cap(cap).unwrap();
        }
        if !self.sink_logits.is_empty() {
            kernel = kernel.with_sink_logits(self.sink_logits.clone()).unwrap();
        }
        if !self.slopes.is_empty() {
            kernel = kernel.with_alibi_slopes(self.slopes.clone()).unwrap();
        }
        kernel
    }

    /// What a group of so many query heads can have.
    fn all(group: usize) -> Vec<Self> {
        let of_heads = |x: f64| (0..group).map(|g| x + 0.3 * g as f64).collect::<Vec<_>>();
        vec![
            Self::default(),
            Self { scale: Some(0.7), ..Self::default() },
            Self { soft_cap: Some(1.5), ..Self::default() },
            Self { sink_logits: vec![0.4], ..Self::default() },
            Self { slopes: vec![0.06], ..Self::default() },
            Self { sink_logits: of_heads(-0.5), slopes: of_heads(0.01), ..Self::default() },
            Self {
                scale: Some(0.3),
                soft_cap: Some(3.0),
                sink_logits: of_heads(1.0),
                slopes: vec![0.02],
            },
        ]
    }
}

/// Gradients by queries, keys, values and logits of sinks.
#[derive(Clone, Debug, PartialEq)]
struct Found<T> {
    q: Array3<T>,
    k: Array2<T>,
    v: Array2<T>,
    sinks: Array1<T>,
}

/// What the formula gives, the sums over query heads where they share.
fn formula(chosen: &Chosen, input: &Input, mask: Mask) -> Found<f64> {
    let Input { q, k, v, d_out } = input;
    let scale = chosen.scale.unwrap_or(1.0 / (k.ncols() as f64).sqrt());
    let mut d = Found {
        q: Array3::zeros(q.dim()),
        k: Array2::zeros(k.dim()),
        v: Array2::zeros(v.dim()),
        sinks: Array1::zeros(chosen.sink_logits.len()),
    };
    for g in 0..q.len_of(Axis(0)) {
        let of_head = |list: &[f64]| list.get(g).or(list.first()).copied();
        let sink_logit = of_head(&chosen.sink_logits);
        let options = Options { soft_cap: chosen.soft_cap, sink_logit };
        let [q, d_out] = [q, d_out].map(|x| x.index_axis(Axis(0), g).to_owned());
        let slope = of_head(&chosen.slopes).unwrap_or(0.0);
        let of_g = softmax_gradient([&q, k, v], &d_out, scale, options, slope, mask);
        d.q.index_axis_mut(Axis(0), g).assign(&of_g.q);
        d.k += &of_g.k;
        d.v += &of_g.v;
        let sinks = d.sinks.len();
        if sinks > 0 {
            d.sinks[g % sinks] += of_g.sink_logit;
        }
    }
    d
}

/// How a backward pass is called.
#[derive(Clone, Copy, Debug)]
struct Way {
    layout: Layout,
    /// What gradients begin with.
    before: f64,
    record: bool,
}

const PLAIN: Way = Way { layout: Layout::Contiguous, before: 0.0, record: false };

/// What the backward pass gives, less what was there before.
fn backward<T: Scalar>(
    kernel: &dyn Attention<T>,
    input: &Input,
    mask: Mask,
    way: Way,
) -> Result<Found<T>, Error> {
    let Way { layout, before, record } = way;
    let narrow = |x: &Array3<f64>| layout.store(&x.mapv(T::from_f64));
    let [k, v] = [&input.k, &input.v].map(|x| narrow(&x.clone().insert_axis(Axis(0))));
    let [q, d_out] = [&input.q, &input.d_out].map(narrow);
    let [k_view, v_view] = [&k, &v].map(|x| layout.view(x).index_axis_move(Axis(0), 0));
    let (q_view, d_out_view) = (layout.view(&q), layout.view(&d_out));
    let before = T::from_f64(before);
    let filled = |view: ArrayView3<'_, T>| layout.store(&view.mapv(|_| before));
    let [mut d_q, mut d_k, mut d_v] = [&q, &k, &v].map(|x| filled(layout.view(x)));
    let mut d_parameters = kernel.parameters().zeros_like();
    d_parameters.iter_mut().for_each(|(_, x)| x.fill(before));
    let mut scratch = Scratch::new();

    let mut out = layout.store(&Array3::from_elem(d_out_view.dim(), T::nan()));
    let mut logs = Array2::from_elem((q_view.len_of(Axis(0)), q_view.len_of(Axis(1))), T::nan());
    if record {
        let head = Head::group(q_view, k_view, v_view, layout.view_mut(&mut out));
        let head = head.with_log_normalizer(logs.view_mut());
        kernel.forward_heads(&mut [head], mask, &mut scratch)?;
    }
    let [d_k_view, d_v_view] =
        [&mut d_k, &mut d_v].map(|x| layout.view_mut(x).index_axis_move(Axis(0), 0));
    let d_q_view = layout.view_mut(&mut d_q);
    let mut head =
        HeadGradient::group(q_view, [k_view, v_view], d_out_view, d_q_view, [d_k_view, d_v_view])
            .with_parameters(&mut d_parameters);
    if record {
        let record = ForwardRecord { out: layout.view(&out), log_normalizer: logs.view() };
        head = head.with_record(record);
    }
    kernel.backward_heads(&mut [head], mask, &mut scratch)?;
    let less = |x: &Array3<T>| layout.view(x).mapv(|x| x - before);
    let [d_k, d_v] = [&d_k, &d_v].map(|x| less(x).index_axis_move(Axis(0), 0));
    let sinks = d_parameters.get("sink_logits").map(|x| x.iter().map(|&x| x - before).collect());
    Ok(Found { q: less(&d_q), k: d_k, v: d_v, sinks: sinks.unwrap_or_default() })
}

fn largest(x: impl IntoIterator<Item = f64>) -> f64 {
    x.into_iter().fold(0.0, |largest, x| largest.max(x.abs()))
}

/// Fails where a gradient is further off than so many units of epsilon of the largest one, or of
/// what was there before, or of a term of its sum.
#[track_caller]
fn assert_near<T: Scalar>(
    what: &str,
    found: &Found<T>,
    exact: &Found<f64>,
    input: &Input,
    (scale, before): (f64, f64),
    units: f64,
) {
    let [q, k, v, d_out] = [
        largest(input.q.iter().copied()),
        largest(input.k.iter().copied()),
        largest(input.v.iter().copied()),
        largest(input.d_out.iter().copied()),
    ];
    let wide = |x: &Array2<T>| x.mapv(|x| x.as_f64()).into_dyn();
    let parts = [
        ("q", found.q.mapv(|x| x.as_f64()).into_dyn(), exact.q.clone().into_dyn(), scale * v * k),
        ("k", wide(&found.k), exact.k.clone().into_dyn(), scale * v * q),
        ("v", wide(&found.v), exact.v.clone().into_dyn(), 1.0),
        ("sinks", found.sinks.mapv(|x| x.as_f64()).into_dyn(), exact.sinks.clone().into_dyn(), v),
    ];
    for (name, found, exact, term) in parts {
        assert_eq!(found.shape(), exact.shape(), "{what} d_{name}");
        let size = largest(exact.iter().copied()).max(before).max(0.1 * d_out * term);
        let error = largest((&found - &exact).iter().map(|x| if x.is_nan() { 1e300 } else { *x }));
        let error = error / (size * T::epsilon().as_f64()).max(f64::MIN_POSITIVE);
        assert!(error <= units, "{what} d_{name} ({}): {error:.1} units, {units}", T::NAME);
    }
}

#[test]
fn golden_values() {
    let file = golden("golden/gradients");
    let named = |case: &&serde_json::Value| {
        ["softmax causal", "softmax full", "softmax cross"]
            .contains(&case["name"].as_str().unwrap())
    };
    let cases: Vec<_> = file["cases"].as_array().unwrap().iter().filter(named).collect();
    assert_eq!(cases.len(), 3);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let [q, k, v, d_out] = ["q", "k", "v", "d_output"].map(|x| matrix(&case[x]));
        let scale = case["scale"].as_f64().unwrap();
        let mask = if case["causal"].as_bool().unwrap() { Mask::Causal } else { Mask::Full };
        let wanted = ["d_q", "d_k", "d_v"].map(|x| matrix(&case[x]));

        let d = softmax_gradient([&q, &k, &v], &d_out, scale, Options::default(), 0.0, mask);
        for (found, wanted) in [&d.q, &d.k, &d.v].into_iter().zip(&wanted) {
            assert_close(name, found, wanted, 1e-10 / f64::EPSILON);
        }
        let chosen = Chosen { scale: Some(scale), ..Chosen::default() };
        let [q, d_out] = [q, d_out].map(|x| x.insert_axis(Axis(0)));
        let input = Input { q, k, v, d_out };
        for record in [false, true] {
            for layout in LAYOUTS {
                let way = Way { layout, before: 0.0, record };
                let d = backward(&chosen.kernel::<f64>(6), &input, mask, way).unwrap();
                let d_q = d.q.index_axis_move(Axis(0), 0);
                for (found, wanted) in [&d_q, &d.k, &d.v].into_iter().zip(&wanted) {
                    assert_close(name, found, wanted, 1e-10 / f64::EPSILON);
                }
                let d = backward(&chosen.kernel::<f32>(6), &input, mask, way).unwrap();
                let d_q = d.q.index_axis_move(Axis(0), 0);
                for (found, wanted) in [&d_q, &d.k, &d.v].into_iter().zip(&wanted) {
                    assert_close(name, found, wanted, 16.0);
                }
            }
        }
    }
}

fn check<T: Scalar>(chosen: &Chosen, input: &Input, mask: Mask, way: Way, units: f64) {
    let input = input.clone().rounded::<T>();
    let (d, scale) = (input.k.ncols(), chosen.scale.unwrap_or(1.0));
    let what = format!("{chosen:?} {:?} {:?} {mask:?} {way:?}", input.q.dim(), input.v.dim());
    let exact = formula(chosen, &input, mask);
    let found = backward(&chosen.kernel::<T>(d), &input, mask, way);
    let found = found.unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_near(&what, &found, &exact, &input, (scale, way.before), units);
}

#[test]
fn the_formula_at_every_size() {
    let mut round = 0;
    for n in [0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300] {
        for d in [1, 3, 8, 64, 80] {
            for d_v in [1, 3, 64] {
                for mask in [Mask::Causal, Mask::Full] {
                    round += 1;
                    let group = 1 + round % 3;
                    let all = Chosen::all(group);
                    let chosen = &all[round % all.len()];
                    let layout = LAYOUTS[round / 2 % 3];
                    let before = if round % 4 < 2 { 0.0 } else { 0.75 };
                    let way = Way { layout, before, record: round % 5 < 2 };
                    let n_k = if mask == Mask::Full && n > 0 { n / 2 + 9 } else { n };
                    let input = Input::new(group, [n, n_k], [d, d_v], round as u64);
                    check::<f32>(chosen, &input, mask, way, 100.0);
                    check::<f64>(chosen, &input, mask, way, 100.0);
                }
            }
        }
    }
}

#[test]
fn every_option_in_every_way() {
    for group in [1, 3] {
        for chosen in Chosen::all(group) {
            for mask in [Mask::Causal, Mask::Full] {
                let input = Input::new(group, [100, 100], [24, 5], 7);
                for layout in LAYOUTS {
                    for record in [false, true] {
                        let way = Way { layout, before: 2.0, record };
                        check::<f32>(&chosen, &input, mask, way, 100.0);
                        check::<f64>(&chosen, &input, mask, way, 100.0);
                    }
                }
            }
        }
    }
}

/// Gradients are linear in cotangents, and those by queries and keys in values: factors that are
/// powers of two come out exactly, as long as the numbers themselves do not leave the range.
#[test]
fn huge_and_tiny_numbers() {
    let chosen = Chosen { sink_logits: vec![0.3], ..Chosen::default() };
    for mask in [Mask::Causal, Mask::Full] {
        let input = Input::new(2, [150, 150], [16, 9], 3);
        for record in [false, true] {
            let way = Way { record, ..PLAIN };
            let plain = backward(&chosen.kernel::<f32>(16), &input, mask, way).unwrap();
            for exponent in [-100, -60, 60, 100] {
                // of cotangents
                let factor = 2.0_f64.powi(exponent);
                let scaled = Input { d_out: &input.d_out * factor, ..input.clone() };
                let found = backward(&chosen.kernel::<f32>(16), &scaled, mask, way).unwrap();
                let back = |x: f32| (f64::from(x) / factor) as f32;
                let found = Found {
                    q: found.q.mapv(back),
                    k: found.k.mapv(back),
                    v: found.v.mapv(back),
                    sinks: found.sinks.mapv(back),
                };
                let exact = formula(&chosen, &input.clone().rounded::<f32>(), mask);
                assert_near("cotangents", &found, &exact, &input, (1.0, 0.0), 100.0);
                assert_near("plain", &plain, &exact, &input, (1.0, 0.0), 100.0);

                // of values, and the inverse of cotangents
                let scaled = Input { v: &input.v * factor, ..input.clone() };
                let scaled = Input { d_out: &input.d_out / factor, ..scaled };
                let found = backward(&chosen.kernel::<f32>(16), &scaled, mask, way).unwrap();
                let v = found.v.mapv(|x| (f64::from(x) * factor) as f32);
                let found = Found { v, ..found };
                assert_near("values", &found, &exact, &input, (1.0, 0.0), 100.0);

                // of queries, and the inverse of keys
                let scaled = Input { q: &input.q * factor, k: &input.k / factor, ..input.clone() };
                let found = backward(&chosen.kernel::<f32>(16), &scaled, mask, way).unwrap();
                let q = found.q.mapv(|x| (f64::from(x) * factor) as f32);
                let k = found.k.mapv(|x| (f64::from(x) / factor) as f32);
                let found = Found { q, k, ..found };
                assert_near("queries", &found, &exact, &input, (1.0, 0.0), 100.0);
            }
        }
        // values near the largest number, whose sums leave the range where weights are not shared
        let edge = Input { v: input.v.mapv(|x| x.signum() * 3e38), ..input.clone() };
        let edge = Input { d_out: &edge.d_out * 1e-30, ..edge };
        check::<f32>(&chosen, &edge, mask, PLAIN, 100.0);
        check::<f32>(&chosen, &edge, mask, Way { record: true, ..PLAIN }, 100.0);
        let edge = Input { v: input.v.mapv(|x| x.signum() * 1e308), ..input.clone() };
        let edge = Input { d_out: &edge.d_out * 1e-300, ..edge };
        check::<f64>(&chosen, &edge, mask, PLAIN, 100.0);
    }
}

/// Blocks of queries with cotangents of very different size keep the digits of their gradients.
#[test]
fn tiny_cotangents_beside_large_ones() {
    let kernel = SoftmaxAttention::<f32>::new(16).unwrap();
    let plain = Input::new(1, [150, 150], [16, 9], 3);
    let mut mixed = plain.clone();
    let factor = 2.0_f64.powi(-110);
    mixed.d_out.slice_mut(s![.., 64.., ..]).mapv_inplace(|x| x * factor);
    for mask in [Mask::Causal, Mask::Full] {
        let [plain, mixed] =
            [&plain, &mixed].map(|input| backward(&kernel, input, mask, PLAIN).unwrap());
        for (plain, mixed) in plain.q.iter().zip(&mixed.q).skip(64 * 16) {
            let error = (f64::from(*mixed) / factor - f64::from(*plain)).abs();
            assert!(error < 1e-6, "{mask:?}: {error:e}");
        }
    }
}

#[test]
fn scores_of_any_size() {
    for size in [5.0, 20.0, 1e3] {
        for mask in [Mask::Causal, Mask::Full] {
            for chosen in Chosen::all(1) {
                let mut input = Input::new(1, [90, 90], [16, 5], 5);
                input.q *= size;
                // exponents carry their rounding, of which the size of the scores is a measure
                for record in [false, true] {
                    let way = Way { record, ..PLAIN };
                    check::<f32>(&chosen, &input, mask, way, 20.0 * size);
                    check::<f64>(&chosen, &input, mask, way, 20.0 * size);
                }
            }
        }
    }
}

#[test]
fn gradients_out_of_range_are_reported() {
    let kernel = SoftmaxAttention::<f32>::new(2).unwrap();
    let input = Input {
        q: Array3::from_shape_fn((1, 300, 2), |(_, t, c)| (t + c) as f64 * 1e-3),
        k: Array2::from_shape_fn((300, 2), |(t, c)| (t + 2 * c) as f64 * 1e-3),
        v: Array2::from_shape_fn((300, 1), |(t, _)| (t as f64).sin()),
        d_out: Array3::from_elem((1, 300, 1), 3e38),
    };
    let error = backward(&kernel, &input, Mask::Causal, PLAIN).unwrap_err();
    assert_eq!(error, Error::Overflow { which: "the gradient by `v`", row: 0 });
    let mut input = Input { d_out: &input.d_out * 1e-3, ..input };
    input.v *= 1e38;
    let error = backward(&kernel, &input, Mask::Causal, PLAIN).unwrap_err();
    assert!(
        matches!(error, Error::Overflow { which: "the gradient by `q`", row: 1..=300 }),
        "{error}"
    );
}

/// The loss `Σ d_out·out`.
fn loss(chosen: &Chosen, input: &Input, mask: Mask) -> f64 {
    let Input { q, k, v, d_out } = input;
    let mut out = Array3::zeros(d_out.dim());
    let mut heads = [Head::group(q.view(), k.view(), v.view(), out.view_mut())];
    let kernel = chosen.kernel::<f64>(k.ncols());
    kernel.forward_heads(&mut heads, mask, &mut Scratch::new()).unwrap();
    (out * d_out).sum()
}

#[test]
fn differences_of_the_forward_pass() {
    for group in [1, 2] {
        for (i, chosen) in Chosen::all(group).iter().enumerate() {
            for mask in [Mask::Causal, Mask::Full] {
                let n_k = if mask == Mask::Full { 31 } else { 70 };
                let input = Input::new(group, [70, n_k], [9, 4], i as u64);
                let towards = Input::new(group, [70, n_k], [9, 4], 100 + i as u64);
                let d = backward(&chosen.kernel::<f64>(9), &input, mask, PLAIN).unwrap();
                let moved = |by: f64| {
                    let input = Input {
                        q: &input.q + &(&towards.q * by),
                        k: &input.k + &(&towards.k * by),
                        v: &input.v + &(&towards.v * by),
                        d_out: input.d_out.clone(),
                    };
                    let sink_logits =
                        chosen.sink_logits.iter().map(|logit| logit + 0.5 * by).collect();
                    loss(&Chosen { sink_logits, ..chosen.clone() }, &input, mask)
                };
                let found = (&d.q * &towards.q).sum()
                    + (&d.k * &towards.k).sum()
                    + (&d.v * &towards.v).sum()
                    + 0.5 * d.sinks.sum();
                let step = 1e-4;
                // of the fourth order
                let difference = (8.0 * (moved(step) - moved(-step))
                    - (moved(2.0 * step) - moved(-2.0 * step)))
                    / (12.0 * step);
                let error = (found - difference).abs() / difference.abs().max(1.0);
                assert!(error < 1e-9, "{chosen:?} {mask:?}: {found} {difference}");
            }
        }
    }
}

#[test]
fn keys_learn_nothing_from_earlier_queries() {
    let input = Input::new(2, [150, 150], [16, 5], 11);
    let chosen = Chosen { soft_cap: Some(2.0), slopes: vec![0.01], ..Chosen::default() };
    for record in [false, true] {
        let way = Way { record, ..PLAIN };
        let run =
            |input: &Input| backward(&chosen.kernel::<f64>(16), input, Mask::Causal, way).unwrap();
        let before = run(&input);
        for j in [1, 15, 16, 63, 64, 65, 130, 149] {
            let mut other = input.clone();
            other.d_out.slice_mut(s![.., ..j, ..]).mapv_inplace(|x| 1.0 - 3.0 * x);
            let after = run(&other);
            let late = s![j.., ..];
            for (a, b) in [(&before.k, &after.k), (&before.v, &after.v)] {
                let [a, b] = [a, b].map(|x| x.slice(late));
                assert_eq!(a, b, "{j}");
            }
            assert_eq!(before.q.slice(s![.., j.., ..]), after.q.slice(s![.., j.., ..]));
            assert_ne!(before.k, after.k);
        }
    }
}

#[test]
fn a_kernel_gets_other_logits_by_name() {
    let kernel = SoftmaxAttention::<f64>::new(4).unwrap();
    assert!(Attention::parameters(&kernel).is_empty());
    let unknown = Parameters::new().with("sink_logits", Array1::from(vec![1.0]).into_dyn());
    let error = kernel.with_parameters(&unknown).unwrap_err();
    assert!(matches!(error, Error::Parameter { .. }), "{error}");

    let kernel = kernel.with_sink_logits(vec![0.5, -1.0]).unwrap();
    let parameters = Attention::parameters(&kernel);
    assert_eq!(parameters.names().collect::<Vec<_>>(), ["sink_logits"]);
    let other = Parameters::new().with("sink_logits", Array1::from(vec![2.0, 3.0]).into_dyn());
    let changed = kernel.with_parameters(&other).unwrap();
    assert_eq!(changed.parameters(), other);
    assert_eq!(kernel.with_parameters(&Parameters::new()).unwrap().parameters(), parameters);
    let error = kernel.with_parameters(&unknown).unwrap_err();
    assert!(matches!(error, Error::Parameter { .. }), "{error}");

    // gradients by other names are refused, and by none are not computed
    let input = Input::new(2, [5, 5], [4, 3], 1);
    let Input { q, k, v, d_out } = &input;
    let mut d_q = Array3::zeros(q.dim());
    let [mut d_k, mut d_v] = [k, v].map(|x| Array2::zeros(x.dim()));
    let mut wrong = Parameters::new().with("slopes", Array1::zeros(2).into_dyn());
    let d = [d_k.view_mut(), d_v.view_mut()];
    let kv = [k.view(), v.view()];
    let mut head = HeadGradient::group(q.view(), kv, d_out.view(), d_q.view_mut(), d);
    kernel.backward_heads(&mut [head.reborrow()], Mask::Full, &mut Scratch::new()).unwrap();
    let head = head.with_parameters(&mut wrong);
    let error = kernel.backward_heads(&mut [head], Mask::Full, &mut Scratch::new()).unwrap_err();
    assert!(matches!(error, Error::Parameter { .. }), "{error}");
}

#[test]
fn bad_input_is_refused() {
    let kernel = SoftmaxAttention::<f32>::new(4).unwrap();
    let run = |change: &dyn Fn(&mut Input), mask| {
        let mut input = Input::new(1, [6, 6], [4, 3], 1);
        change(&mut input);
        backward(&kernel, &input, mask, PLAIN).unwrap_err()
    };
    for (which, error) in [
        ("q", run(&|x| x.q[[0, 2, 1]] = f64::NAN, Mask::Full)),
        ("k", run(&|x| x.k[[2, 1]] = f64::INFINITY, Mask::Full)),
        ("v", run(&|x| x.v[[2, 1]] = f64::NAN, Mask::Causal)),
        ("d_out", run(&|x| x.d_out[[0, 2, 1]] = f64::NEG_INFINITY, Mask::Causal)),
    ] {
        assert_eq!(error, Error::NotFinite { which, row: 2, column: 1 });
    }
    let shapes = [
        run(&|x| x.q = Array3::zeros((1, 6, 5)), Mask::Full),
        run(&|x| x.k = Array2::zeros((6, 3)), Mask::Full),
        run(&|x| x.v = Array2::zeros((5, 3)), Mask::Full),
        run(&|x| x.d_out = Array3::zeros((1, 5, 3)), Mask::Full),
        run(&|x| x.d_out = Array3::zeros((1, 6, 2)), Mask::Full),
        run(&|x| x.d_out = Array3::zeros((2, 6, 3)), Mask::Full),
        run(&|x| *x = Input::new(1, [5, 6], [4, 3], 1), Mask::Causal),
    ];
    for error in shapes {
        assert!(matches!(error, Error::Shape { .. }), "{error}");
    }
    let error = run(&|x| *x = Input::new(1, [5, 0], [4, 3], 1), Mask::Full);
    assert_eq!(error, Error::ZeroSize { which: "k rows" });

    let input = Input::new(1, [6, 6], [4, 3], 1);
    let packed = kernel.clone().with_state_format(StateFormat::Q8);
    let error = backward(&packed, &input, Mask::Full, PLAIN).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("StateFormat::F32"), "{error}");
    let error = backward(&kernel.clone().with_scale(-1.0), &input, Mask::Full, PLAIN).unwrap_err();
    assert!(matches!(error, Error::InvalidOption { .. }), "{error}");
    let many = kernel.with_sink_logits(vec![0.0, 1.0]).unwrap();
    let error = backward(&many, &input, Mask::Full, PLAIN).unwrap_err();
    assert!(matches!(error, Error::Shape { .. }), "{error}");
}

#[test]
fn gates_and_bad_records_are_refused() {
    let kernel = SoftmaxAttention::<f64>::new(4).unwrap();
    let Input { q, k, v, d_out } = Input::new(1, [6, 6], [4, 3], 1);
    let mut d_q = Array3::zeros(q.dim());
    let [mut d_k, mut d_v] = [&k, &v].map(|x| Array2::zeros(x.dim()));
    let mut run = |gates: bool, record: Option<(&Array3<f64>, &Array2<f64>)>| {
        let (log_decay, mut d_log_decay) = (Array2::zeros((6, 1)), Array2::zeros((6, 1)));
        let d = [d_k.view_mut(), d_v.view_mut()];
        let kv = [k.view(), v.view()];
        let mut head = HeadGradient::group(q.view(), kv, d_out.view(), d_q.view_mut(), d);
        if gates {
            head = head.with_log_decay(log_decay.view(), d_log_decay.view_mut());
        }
        if let Some((out, logs)) = record {
            let record = ForwardRecord { out: out.view(), log_normalizer: logs.view() };
            head = head.with_record(record);
        }
        kernel.backward_heads(&mut [head], Mask::Causal, &mut Scratch::new()).unwrap_err()
    };
    assert!(matches!(run(true, None), Error::Unsupported { .. }));
    let (out, logs) = (Array3::zeros((1, 6, 3)), Array2::zeros((1, 6)));
    for (out, logs) in [
        (Array3::zeros((1, 6, 2)), logs.clone()),
        (Array3::zeros((2, 6, 3)), logs.clone()),
        (out.clone(), Array2::zeros((1, 5))),
        (out.clone(), Array2::zeros((2, 6))),
    ] {
        let error = run(false, Some((&out, &logs)));
        assert!(matches!(error, Error::Shape { .. }), "{error}");
    }
    let logs = Array2::from_elem((1, 6), f64::NAN);
    let error = run(false, Some((&out, &logs)));
    assert!(matches!(error, Error::NotFinite { which: "record.log_normalizer", .. }), "{error}");
}

#[test]
fn only_softmax_gives_log_normalizers() {
    let x = Array2::<f64>::zeros((6, 4));
    let (mut out, mut logs) = (Array2::zeros((6, 4)), Array2::zeros((1, 6)));
    let kernels: [Box<dyn Attention<f64>>; 2] = [
        Box::new(LinearAttention::new(EluFeatures::new(4).unwrap())),
        Box::new(HybridAttention::builder(4).window(3).build().unwrap()),
    ];
    for kernel in kernels {
        let head = Head::new(x.view(), x.view(), x.view(), out.view_mut());
        let mut heads = [head.with_log_normalizer(logs.view_mut())];
        let error = kernel.forward_heads(&mut heads, Mask::Causal, &mut Scratch::new());
        assert!(matches!(error, Err(Error::Unsupported { .. })));
    }
    let kernel = SoftmaxAttention::<f64>::new(4).unwrap();
    let head = Head::new(x.view(), x.view(), x.view(), out.view_mut());
    let mut heads = [head.with_log_normalizer(logs.view_mut())];
    let error = kernel.stream(4).unwrap().extend_heads(&mut heads);
    assert!(matches!(error, Err(Error::Unsupported { .. })));
    let mut wrong = Array2::zeros((1, 5));
    let head = Head::new(x.view(), x.view(), x.view(), out.view_mut());
    let mut heads = [head.with_log_normalizer(wrong.view_mut())];
    let error = kernel.forward_heads(&mut heads, Mask::Causal, &mut Scratch::new());
    assert!(matches!(error, Err(Error::Shape { which: "log_normalizer", .. })));
}

/// The logarithms of the normalisers that a forward pass gives, of so many tokens that threads take
/// part where they may.
#[test]
fn log_normalizers_of_the_forward_pass() {
    for chosen in Chosen::all(2) {
        for mask in [Mask::Causal, Mask::Full] {
            let input = Input::new(2, [600, 600], [9, 4], 2);
            let Input { q, k, v, d_out } = &input;
            let mut out = Array3::zeros(d_out.dim());
            let mut logs = Array2::from_elem((2, 600), f64::NAN);
            let kernel = chosen.kernel::<f64>(9);
            let head = Head::group(q.view(), k.view(), v.view(), out.view_mut());
            let mut heads = [head.with_log_normalizer(logs.view_mut())];
            kernel.forward_heads(&mut heads, mask, &mut Scratch::new()).unwrap();
            for g in 0..2 {
                let of_head = |list: &[f64]| list.get(g).or(list.first()).copied();
                for t in [0, 1, 64, 149, 599] {
                    let scale = chosen.scale.unwrap_or(1.0 / 3.0);
                    let seen = if mask == Mask::Causal { t + 1 } else { 600 };
                    let score = |j: usize| {
                        let product = scale * q.index_axis(Axis(0), g).row(t).dot(&k.row(j));
                        let score = chosen.soft_cap.map_or(product, |c| c * (product / c).tanh());
                        let distance = (seen - 1 - j) as f64;
                        score - of_head(&chosen.slopes).unwrap_or(0.0) * distance
                    };
                    let sum: f64 = (0..seen).map(|j| score(j).exp()).sum();
                    let sum = sum + of_head(&chosen.sink_logits).map_or(0.0, f64::exp);
                    assert!((logs[[g, t]] - sum.ln()).abs() < 1e-13, "{chosen:?} {mask:?} {t}");
                }
            }
        }
    }
}
