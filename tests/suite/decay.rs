//! Sums that decay are the recurrence, however a sequence is split and whatever the decays.

use crate::common::{
    assert_close, features, golden, linear_floats, map, matrix, normal, tokens, vector, wide,
};
use dijiang::attention::naive::{features::elu, linear};
use dijiang::{
    Attention, EluFeatures, Error, FeatureMap, Head, HybridAttention, IdentityFeatures,
    LinearAttention, Mask, Memory, MultiHead, OfficialDijiang, Retention, Scalar, Scratch,
    SoftmaxAttention, Stream,
};
use ndarray::{Array1, Array2, Array4, ArrayView2, Axis, s};
use proptest::prelude::*;
use serde_json::Value;
use std::sync::Arc;

/// The recurrence of `attention::naive`, with the features of a map.
fn recurrence(
    map: &dyn FeatureMap<f64>,
    [q, k, v]: [&Array2<f64>; 3],
    log_decay: &Array2<f64>,
    scale: f64,
    normalized: bool,
) -> Array2<f64> {
    let phi_q = features(map, q, scale, false).absolute();
    let phi_k = features(map, k, scale, true).absolute();
    if normalized {
        linear::gated(&phi_q, &phi_k, v, log_decay)
    } else {
        linear::gated_unnormalized(&phi_q, &phi_k, v, log_decay)
    }
}

/// A linear kernel over one of the maps, in `T`.
type Kernel<T> = LinearAttention<Arc<dyn FeatureMap<T>>>;

/// Where log decays come from.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// γ of the kernel.
    Constant,
    /// γ_i of the kernel.
    Channels,
    /// One number with each token.
    PerToken,
    /// One for each feature with each token.
    PerTokenAndChannel,
    /// All of them.
    Everything,
}

const KINDS: [Kind; 5] =
    [Kind::Constant, Kind::Channels, Kind::PerToken, Kind::PerTokenAndChannel, Kind::Everything];

/// Decays of a sequence: what the kernel is given, what comes with the tokens, and both together.
struct Decays {
    constant: Option<f64>,
    channels: Option<Array1<f64>>,
    gates: Option<Array2<f64>>,
    total: Array2<f64>,
}

impl Decays {
    /// Of size `strength` on average, of the tokens with some that keep all, and some resets.
    fn new(kind: Kind, n: usize, m: usize, strength: f64, seed: u64) -> Self {
        let random = |rows, columns, seed| {
            normal::<f64>(rows, columns, strength, seed).mapv(|x| f64::from((-x.abs()) as f32))
        };
        let all = kind == Kind::Everything;
        let gamma = f64::from((-0.3 * strength).exp() as f32);
        let constant = (all || kind == Kind::Constant).then_some(gamma);
        let channels =
            (all || kind == Kind::Channels).then(|| random(1, m, seed).row(0).mapv(f64::exp));
        let columns = match kind {
            Kind::PerToken => Some(1),
            Kind::PerTokenAndChannel | Kind::Everything => Some(m),
            _ => None,
        };
        let gates = columns.map(|columns| {
            let mut gates = random(n, columns, seed + 1);
            for (i, gate) in gates.iter_mut().enumerate() {
                match (i * 7919 + seed as usize) % 41 {
                    0 => *gate = f64::NEG_INFINITY,
                    1..5 => *gate = 0.0,
                    5 => *gate = -300.0,
                    _ => {}
                }
            }
            if n > 20 {
                gates.row_mut(n / 2).fill(f64::NEG_INFINITY);
            }
            gates
        });
        let width = gates
            .as_ref()
            .map_or(1, |gates| gates.ncols())
            .max(channels.as_ref().map_or(1, Array1::len));
        let total = Array2::from_shape_fn((n, width), |(t, i)| {
            constant.map_or(0.0, f64::ln)
                + channels.as_ref().map_or(0.0, |channels| channels[i].ln())
                + gates.as_ref().map_or(0.0, |gates| gates[[t, i.min(gates.ncols() - 1)]])
        });
        Self { constant, channels, gates, total }
    }

    fn kernel<T: Scalar>(&self, map: Arc<dyn FeatureMap<T>>, normalized: bool) -> Kernel<T> {
        let mut kernel = LinearAttention::new(map);
        if let Some(constant) = self.constant {
            kernel = kernel.with_decay(constant);
        }
        if let Some(channels) = &self.channels {
            kernel = kernel.with_channel_decay(channels.clone());
        }
        if self.gates.is_some() {
            kernel = kernel.gated();
        }
        if normalized { kernel } else { kernel.unnormalized() }
    }

    fn forward<T: Scalar>(&self, kernel: &Kernel<T>, [q, k, v]: &[Array2<T>; 3]) -> Array2<T> {
        let mut out = Array2::from_elem(v.dim(), T::nan());
        match &self.gates {
            None => kernel.forward_into(q.view(), k.view(), v.view(), Mask::Causal, out.view_mut()),
            Some(gates) => {
                let gates = gates.mapv(T::from_f64);
                kernel.forward_heads(
                    &mut [Head::new(q.view(), k.view(), v.view(), out.view_mut())
                        .with_log_decay(gates.view())],
                    Mask::Causal,
                    &mut Scratch::new(),
                )
            }
        }
        .unwrap();
        out
    }

    /// Feeds pieces of the given sizes, over and over.
    fn feed<T: Scalar>(
        &self,
        stream: &mut dyn Stream<T>,
        [q, k, v]: &[Array2<T>; 3],
        sizes: &[usize],
    ) -> Array2<T> {
        let gates = self.gates.as_ref().map(|gates| gates.mapv(T::from_f64));
        let mut out = Array2::from_elem(v.dim(), T::nan());
        let mut start = 0;
        for size in sizes.iter().cycle() {
            let end = q.nrows().min(start + size);
            let rows = s![start..end, ..];
            let [q, k, v] = [q, k, v].map(|x| x.slice(rows));
            match &gates {
                None => stream.extend(q, k, v, out.slice_mut(rows)),
                Some(gates) => {
                    stream
                        .extend_heads(&mut [Head::new(q, k, v, out.slice_mut(rows))
                            .with_log_decay(gates.slice(rows))])
                }
            }
            .unwrap();
            start = end;
            if start == out.nrows() {
                return out;
            }
        }
        unreachable!("sizes are not all zero")
    }
}

/// Units of epsilon, with room for the rounding of exponents in f32.
fn units<T: Scalar>() -> f64 {
    if T::NAME == "f64" { 4096.0 } else { 1024.0 }
}

fn check<T: Scalar>(
    kind: Kind,
    name: &str,
    [n, d, m]: [usize; 3],
    strength: f64,
    normalized: bool,
    sizes: &[usize],
) {
    let (map, wide_map) = (map::<T>(name, d, m, 5), map::<f64>(name, d, m, 5));
    let input = tokens::<T>(n, d, 3, 0.7, n as u64 + 1);
    let decays = Decays::new(kind, n, map.num_features(), strength, n as u64);
    let kernel = decays.kernel(map, normalized);
    let [q, k, v] = input.each_ref().map(wide);
    let scale = 1.0 / (d as f64).sqrt();
    let exact = recurrence(&*wide_map, [&q, &k, &v], &decays.total, scale, normalized);
    let what = format!(
        "{kind:?} {name} n={n} d={d} m={m} strength {strength} normalized {normalized} {sizes:?}"
    );
    assert_close(&what, &decays.forward(&kernel, &input), &exact, units::<T>());
    let mut stream = Attention::<T>::stream(&kernel, 3).unwrap();
    assert_close(&what, &decays.feed(&mut *stream, &input, sizes), &exact, units::<T>());
    assert_eq!(stream.len(), n);
    let m = wide_map.num_features();
    // where features decay by rates of their own, no token waits
    let floats = if decays.channels.is_some() { 2 * m * 4 + 1 } else { linear_floats(m, 3) };
    assert_eq!(stream.state_floats(), floats + 1);
}

#[test]
fn every_kind_is_the_recurrence_at_every_size() {
    for kind in KINDS {
        for n in [1, 2, 6, 63, 64, 65, 130, 200] {
            for (strength, normalized) in
                [(0.01, true), (0.1, false), (1.0, true), (5.0, false), (30.0, true)]
            {
                check::<f64>(kind, "performer", [n, 8, 20], strength, normalized, &[1]);
                check::<f32>(kind, "performer", [n, 8, 20], strength, normalized, &[7, 1, 64]);
                check::<f32>(kind, "relu", [n, 5, 5], strength, normalized, &[1]);
                check::<f64>(kind, "elu", [n, 1, 1], strength, normalized, &[3]);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Any decays, any split, any sizes.
    #[test]
    fn forward_is_chunks_is_token_by_token(
        kind in prop::sample::select(KINDS.to_vec()),
        name in prop::sample::select(vec!["performer", "elu", "relu", "official", "dct", "taylor"]),
        n in 1usize..220,
        d in 1usize..12,
        m in 1usize..40,
        log_strength in -9.0..4.0_f64,
        normalized in any::<bool>(),
        sizes in prop::collection::vec(0usize..90, 1..6),
    ) {
        let mut sizes = sizes;
        sizes.push(1);
        let strength = log_strength.exp();
        check::<f64>(kind, name, [n, d, m], strength, normalized, &sizes);
        check::<f32>(kind, name, [n, d, m], strength, normalized, &sizes);
    }
}

/// The state, read by queries of one token that is nothing itself: keys and values of zero.
fn final_state(
    stream: &mut dyn Stream<f64>,
    gated: bool,
    gamma: f64,
    d: usize,
    dv: usize,
) -> Array2<f64> {
    let (key, value, keep) = (Array2::zeros((1, d)), Array2::zeros((1, dv)), Array2::zeros((1, 1)));
    let mut state = Array2::zeros((d, dv));
    for (i, mut row) in state.outer_iter_mut().enumerate() {
        let query = Array2::from_shape_fn((1, d), |(_, j)| f64::from(i == j));
        let mut copy = stream.clone_box();
        let out = row.view_mut().insert_axis(Axis(0));
        if gated {
            copy.extend_heads(&mut [
                Head::new(query.view(), key.view(), value.view(), out).with_log_decay(keep.view())
            ])
            .unwrap();
        } else {
            copy.extend(query.view(), key.view(), value.view(), out).unwrap();
            row /= gamma;
        }
    }
    state
}

#[test]
fn golden_values() {
    let file = golden("golden/decay");
    let units = 1e-12 / f64::EPSILON;
    for case in file["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let (q, k, v) = (matrix(&case["q"]), matrix(&case["k"]), matrix(&case["v"]));
        let kernel = LinearAttention::new(IdentityFeatures::<f64>::new(4).unwrap())
            .unnormalized()
            .with_scale(1.0);
        let gamma = case["gamma"].as_f64();
        let gates = match (&case["a"], &case["alpha"]) {
            (Value::Null, Value::Null) => None,
            (Value::Null, alpha) => Some(matrix(alpha).mapv(f64::ln)),
            (a, _) => Some(vector(a).mapv(f64::ln).insert_axis(Axis(1))),
        };
        let kernel = match gamma {
            Some(gamma) => kernel.with_decay(gamma),
            None => kernel.gated(),
        };
        for size in [11, 4, 1] {
            let mut stream = Attention::<f64>::stream(&kernel, 3).unwrap();
            let mut out = Array2::from_elem((11, 3), f64::NAN);
            for start in (0..11).step_by(size) {
                let rows = s![start..11.min(start + size), ..];
                let (q, k, v, out) =
                    (q.slice(rows), k.slice(rows), v.slice(rows), out.slice_mut(rows));
                match &gates {
                    Some(gates) => stream.extend_heads(&mut [
                        Head::new(q, k, v, out).with_log_decay(gates.slice(rows))
                    ]),
                    None => stream.extend(q, k, v, out),
                }
                .unwrap();
            }
            assert_close(name, &out, &matrix(&case["output"]), units);
            let state = final_state(&mut *stream, gates.is_some(), gamma.unwrap_or(1.0), 4, 3);
            assert_close(name, &state, &matrix(&case["final_state"]), units);
        }
    }
}

#[test]
fn golden_official_dijiang() {
    for case in golden("golden/official_dijiang")["cases"].as_array().unwrap() {
        let radii = vector(&case["radii_t"]);
        for (h, gamma) in vector(&case["gamma"]).into_iter().enumerate() {
            let heads = case["heads"].as_u64().unwrap() as usize;
            assert!((dijiang::decay::dijiang(heads)[h] - gamma).abs() < 1e-15);
            let [q, k, v] = ["q", "k", "v"].map(|x| matrix(&case[x][h]));
            let map = OfficialDijiang::new(radii.clone()).unwrap();
            let kernel = LinearAttention::new(map).with_scale(1.0).unnormalized().with_decay(gamma);
            let exact = matrix(&case["output_unnormalised_decay"][h]);
            let out = kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap();
            assert_close("official", &out, &exact, 1e-12 / f64::EPSILON);
            let mut stream = Attention::<f64>::stream(&kernel, 8).unwrap();
            let steps = crate::common::checker::feed(&mut *stream, &[q, k, v], &[1; 12]);
            assert_close("official, step by step", &steps, &exact, 1e-12 / f64::EPSILON);
        }
    }
}

/// A million tokens in `f32`, by chunks and token by token, stay within 1e-4 of the recurrence in
/// `f64`.
#[test]
fn a_million_tokens_in_f32_are_the_recurrence_in_f64() {
    let (n, d, dv, period) = (1_000_000, 4, 3, 4096);
    let [q, k, v] = [0, 1, 2].map(|seed| {
        normal::<f32>(period, if seed == 2 { dv } else { d }, 1.0, seed).mapv(|x| x + 0.5)
    });
    let scalar = normal::<f32>(period, 1, 0.002, 3).mapv(|x| -x.abs());
    let each = normal::<f32>(period, d, 0.002, 4).mapv(|x| -x.abs());
    let channels = Array1::from_vec(vec![1.0 - 1.0 / 32.0, 0.9999, 1.0, 1.0 - 1e-6]);
    let plain = || LinearAttention::new(EluFeatures::<f32>::new(d).unwrap()).with_scale(1.0);
    type Case<'a> = (&'a str, LinearAttention<EluFeatures<f32>>, Option<&'a Array2<f32>>, f64);
    let kernels: Vec<Case> = vec![
        ("1/32", plain().with_decay(1.0 - 1.0 / 32.0), None, 1.0 - 1.0 / 32.0),
        (
            "1/32, not normalised",
            plain().with_decay(1.0 - 1.0 / 32.0).unnormalized(),
            None,
            1.0 - 1.0 / 32.0,
        ),
        ("1e-5", plain().with_decay(1.0 - 1e-5).unnormalized(), None, 1.0 - 1e-5),
        ("each feature", plain().with_channel_decay(channels.clone()).unnormalized(), None, 1.0),
        ("each token", plain().gated().unnormalized(), Some(&scalar), 1.0),
        ("each token and feature", plain().gated(), Some(&each), 1.0),
    ];
    let (phi_q, phi_k) = (elu(&wide(&q)).values, elu(&wide(&k)).values);
    let wide_v = wide(&v);
    for (name, kernel, gates, gamma) in kernels {
        let normalized = !format!("{kernel:?}").contains("Unnormalized");
        let mut streams = [64, 1].map(|size| (size, kernel.stream(dv).unwrap()));
        let mut out = Array2::<f32>::zeros((64, dv));
        let mut state = linear::Recurrence::new(d, dv);
        let mut worst = [0.0_f64; 2];
        for start in (0..n).step_by(64) {
            let first = start % period;
            let mut exact = Array2::<f64>::zeros((64, dv));
            for t in 0..64 {
                let row = first + t;
                state.step(phi_k.row(row), wide_v.row(row), |i| {
                    let gate = gates
                        .map_or(0.0, |gates| f64::from(gates[[row, i.min(gates.ncols() - 1)]]));
                    let own = if name == "each feature" { channels[i] } else { 1.0 };
                    gamma * own * gate.exp()
                });
                let query = phi_q.row(row);
                exact.row_mut(t).assign(&match normalized {
                    true => state.read_normalized(query),
                    false => state.read(query),
                });
            }
            for ((size, stream), worst) in streams.iter_mut().zip(&mut worst) {
                for t in (0..64).step_by(*size) {
                    let (rows, here) = (s![first + t..first + t + *size, ..], s![t..t + *size, ..]);
                    let (q, k, v, out) =
                        (q.slice(rows), k.slice(rows), v.slice(rows), out.slice_mut(here));
                    match gates {
                        Some(gates) => stream.extend_heads(&mut [
                            Head::new(q, k, v, out).with_log_decay(gates.slice(rows))
                        ]),
                        None => stream.extend(q, k, v, out),
                    }
                    .unwrap();
                }
                let size = exact.fold(0.0_f64, |m, x| m.max(x.abs()));
                let error = ndarray::Zip::from(&out)
                    .and(&exact)
                    .fold(0.0_f64, |m, &a, &b| m.max((f64::from(a) - b).abs()));
                *worst = worst.max(error / size);
            }
        }
        println!("{name}: {:.1e} by chunks, {:.1e} token by token", worst[0], worst[1]);
        assert!(worst.iter().all(|&error| error < 1e-4), "{name}: {worst:?}");
    }
}

/// A gated kernel with 5 features, tokens, and their log decays, one for each feature or one for
/// all.
fn gated(columns: usize) -> (LinearAttention<EluFeatures<f32>>, [Array2<f32>; 3], Array2<f32>) {
    let kernel = LinearAttention::new(EluFeatures::<f32>::new(5).unwrap()).gated();
    (
        kernel,
        tokens::<f32>(140, 5, 2, 0.7, 3),
        normal::<f32>(140, columns, 0.1, 4).mapv(|x| -x.abs()),
    )
}

#[test]
fn bad_log_decays_are_refused_and_leave_the_state() {
    for columns in [1, 5] {
        let (kernel, [q, k, v], gates) = gated(columns);
        let mut stream = kernel.stream(2).unwrap();
        let mut out = Array2::zeros((140, 2));
        stream
            .extend_heads(&mut [Head::new(q.view(), k.view(), v.view(), out.view_mut())
                .with_log_decay(gates.view())])
            .unwrap();
        let state = stream.save().unwrap();
        let mut refuse = |rows: core::ops::Range<usize>, gates: &Array2<f32>, which: &str| {
            let part = s![rows, ..];
            let (q, k, v, out) = (q.slice(part), k.slice(part), v.slice(part), out.slice_mut(part));
            let error = stream
                .extend_heads(&mut [Head::new(q, k, v, out).with_log_decay(gates.view())])
                .unwrap_err();
            assert!(error.to_string().contains(which), "{error}");
            assert_eq!(stream.save().unwrap(), state, "{error}");
        };
        for bad in [0.1, f32::NAN, f32::INFINITY, f32::MIN_POSITIVE] {
            for row in [0, 63, 64, 139] {
                let mut changed = gates.clone();
                changed[[row, columns - 1]] = bad;
                refuse(0..140, &changed, &format!("{bad} at row {row}, column {}", columns - 1));
                refuse(row..row + 1, &changed.slice(s![row..=row, ..]).to_owned(), "at row 0");
            }
        }
        refuse(0..140, &Array2::zeros((139, columns)), "139 rows");
        refuse(0..140, &Array2::zeros((140, 3)), "3 columns");
        refuse(0..140, &Array2::zeros((140, 0)), "0 columns");
        refuse(0..1, &Array2::zeros((0, columns)), "0 rows");
        // without them, and where there are none
        let error = stream.extend(q.view(), k.view(), v.view(), out.view_mut()).unwrap_err();
        assert!(
            matches!(error, Error::Unsupported { .. })
                && error.to_string().contains("extend_heads"),
            "{error}"
        );
        let error = kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert_eq!(stream.save().unwrap(), state);
        let none = s![..0, ..];
        stream
            .extend_heads(&mut [Head::new(
                q.slice(none),
                k.slice(none),
                v.slice(none),
                out.slice_mut(none),
            )
            .with_log_decay(gates.slice(none))])
            .unwrap();
        assert_eq!(stream.save().unwrap(), state);
    }
    let (_, [q, k, v], gates) = gated(1);
    let plain = LinearAttention::new(EluFeatures::<f32>::new(5).unwrap()).with_decay(0.9);
    let window = HybridAttention::<f32>::builder(5).window(4).build().unwrap();
    let kernels: [&dyn Attention<f32>; 4] =
        [&SoftmaxAttention::new(5).unwrap(), &plain, &window, &Retention::new(5, 0.9).unwrap()];
    for kernel in kernels {
        let mut out = Array2::zeros((140, 2));
        let [q, k, v] = [&q, &k, &v].map(|x| x.view());
        let error = kernel
            .forward_heads(
                &mut [Head::new(q, k, v, out.view_mut()).with_log_decay(gates.view())],
                Mask::Causal,
                &mut Scratch::new(),
            )
            .unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        let error = kernel
            .stream(2)
            .unwrap()
            .extend_heads(&mut [Head::new(q, k, v, out.view_mut()).with_log_decay(gates.view())])
            .unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }
}

#[test]
fn unusable_decays_are_reported_by_the_first_call() {
    let kernel = || LinearAttention::new(EluFeatures::<f64>::new(3).unwrap());
    let x = Array2::<f64>::ones((2, 3));
    let refused = |kernel: LinearAttention<EluFeatures<f64>>| {
        let errors = [
            kernel.forward(x.view(), x.view(), x.view(), Mask::Causal).unwrap_err(),
            Attention::<f64>::stream(&kernel, 3).unwrap_err(),
            kernel.memory::<f64>(3).unwrap_err(),
            Attention::<f64>::state_floats(&kernel, 3, 7).unwrap_err(),
        ];
        assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
        errors[0].clone()
    };
    for bad in [-0.1, 1.0 + f64::EPSILON, f64::NAN, f64::INFINITY] {
        assert!(matches!(
            refused(kernel().with_decay(bad)),
            Error::InvalidOption { which: "decay", .. }
        ));
        let one = Array1::from_vec(vec![0.5, bad, 1.0]);
        assert!(matches!(
            refused(kernel().with_channel_decay(one)),
            Error::InvalidOption { which: "decay", .. }
        ));
    }
    let short = refused(kernel().with_channel_decay(Array1::ones(2)));
    assert_eq!(short, Error::Shape { which: "decay", axis: "elements", expected: 3, found: 2 });
    // a decay of 1 is none
    let plain = kernel().forward(x.view(), x.view(), x.view(), Mask::Full).unwrap();
    assert_eq!(
        kernel().with_decay(1.0).forward(x.view(), x.view(), x.view(), Mask::Full).unwrap(),
        plain
    );
    let decays = kernel().with_decay(0.5);
    for error in [
        decays.forward(x.view(), x.view(), x.view(), Mask::Full).unwrap_err(),
        decays.memory::<f64>(3).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }
    assert!(Attention::<f64>::pair_weights(&decays).is_none());
    // nothing is kept: every token sees itself alone
    let v = normal::<f64>(2, 3, 1.0, 1);
    let own = kernel().with_decay(0.0).forward(x.view(), x.view(), v.view(), Mask::Causal).unwrap();
    assert_close("decay 0", &own, &v, 4.0);
}

#[test]
fn a_stream_goes_on_from_a_memory_and_then_decays() {
    let kernel = LinearAttention::new(EluFeatures::<f64>::new(3).unwrap()).unnormalized();
    let [q, k, v] = tokens::<f64>(9, 3, 2, 0.7, 1);
    let mut memory = kernel.memory(2).unwrap();
    memory.absorb(k.slice(s![..8, ..]), v.slice(s![..8, ..])).unwrap();
    let mut exact = Array2::zeros((1, 2));
    kernel
        .stream_from(memory.clone())
        .extend(row(&q), row(&(&k * 0.0)), row(&(&v * 0.0)), exact.view_mut())
        .unwrap();
    let mut out = Array2::zeros((1, 2));
    let mut stream = kernel.clone().with_decay(0.25).stream_from(memory.clone());
    assert_eq!(stream.state_floats(), memory.state_floats() + 16 * (3 + 2) + 1);
    stream.extend(row(&q), row(&(&k * 0.0)), row(&(&v * 0.0)), out.view_mut()).unwrap();
    assert_close("decayed memory", &out, &(exact * 0.25), 16.0);
    let mut bad = kernel.with_decay(2.0).stream_from(memory);
    let error = bad.extend(row(&q), row(&k), row(&v), out.view_mut()).unwrap_err();
    assert!(matches!(error, Error::InvalidOption { which: "decay", .. }), "{error}");
}

/// The last row.
fn row(x: &Array2<f64>) -> ArrayView2<'_, f64> {
    x.slice(s![x.nrows() - 1.., ..])
}

#[test]
fn layouts_of_log_decays_do_not_matter() {
    for columns in [1, 5] {
        let (kernel, [q, k, v], gates) = gated(columns);
        let forward = |gates: ArrayView2<'_, f32>| {
            let mut out = Array2::from_elem((140, 2), f32::NAN);
            kernel
                .forward_heads(
                    &mut [Head::new(q.view(), k.view(), v.view(), out.view_mut())
                        .with_log_decay(gates)],
                    Mask::Causal,
                    &mut Scratch::new(),
                )
                .unwrap();
            out
        };
        let exact = forward(gates.view());
        let large = crate::common::strided(gates.view());
        assert_eq!(forward(large.slice(s![..;2, ..;3])), exact);
        assert_eq!(forward(gates.t().as_standard_layout().t()), exact);
        let reversed = gates.slice(s![..;-1, ..]).to_owned();
        assert_eq!(forward(reversed.slice(s![..;-1, ..])), exact);
        // one number for all is the same as the same number for each
        let first = gates.slice(s![.., ..1]);
        let each = forward(first.broadcast((140, 5)).unwrap());
        assert_close("broadcast", &forward(first), &wide(&each), 64.0);
    }
}

#[test]
fn layers_of_gated_heads_are_their_heads() {
    let (batch, heads, kv_heads, n, d, dv) = (2, 6, 2, 75, 5, 3);
    for columns in [1, d] {
        let random = |heads, columns, seed| {
            let flat = normal::<f64>(batch * heads * n, columns, 0.7, seed);
            flat.into_shape_with_order((batch, heads, n, columns)).unwrap()
        };
        let (q, k, v) = (random(heads, d, 1), random(kv_heads, d, 2), random(kv_heads, dv, 3));
        let gates = random(kv_heads, columns, 4).mapv(|x| -x.abs());
        let kernel = LinearAttention::new(EluFeatures::<f64>::new(d).unwrap()).gated();
        let layer = MultiHead::new(kernel.clone(), heads, kv_heads).unwrap();
        let lengths = [n, 40];
        let mut out = Array4::from_elem((batch, heads, n, dv), f64::NAN);
        layer
            .forward_gated(
                q.view(),
                k.view(),
                v.view(),
                gates.view(),
                Some(&lengths),
                out.view_mut(),
            )
            .unwrap();
        for (b, length) in lengths.into_iter().enumerate() {
            for h in 0..heads {
                let kv = h / (heads / kv_heads);
                let part = |x: &Array4<f64>, h| x.slice(s![b, h, ..length, ..]).to_owned();
                let mut exact = Array2::zeros((length, dv));
                let (q, k, v, gates) = (part(&q, h), part(&k, kv), part(&v, kv), part(&gates, kv));
                kernel
                    .forward_heads(
                        &mut [Head::new(q.view(), k.view(), v.view(), exact.view_mut())
                            .with_log_decay(gates.view())],
                        Mask::Causal,
                        &mut Scratch::new(),
                    )
                    .unwrap();
                assert_close("head", &part(&out, h), &exact, 1.0);
                assert!(out.slice(s![b, h, length.., ..]).iter().all(|x| *x == 0.0));
            }
        }
        // any split, one state for each kv head, and an error moves none
        let mut stream = layer.stream(batch, dv).unwrap();
        let mut steps = Array4::from_elem(out.dim(), f64::NAN);
        let mut start = 0;
        for size in [1, 64, 2, 8] {
            let part = s![.., .., start..start + size, ..];
            let lengths = lengths.map(|length| size.min(length.saturating_sub(start)));
            let [q, k, v] = [&q, &k, &v].map(|x| x.slice(part));
            let mut bad = gates.slice(part).to_owned();
            bad[[0, kv_heads - 1, size - 1, columns - 1]] = 1.0;
            let floats = stream.clone();
            let error = stream
                .extend_gated(q, k, v, bad.view(), Some(&lengths), steps.slice_mut(part))
                .unwrap_err();
            let inner = error.inner();
            assert!(matches!(inner, Error::InvalidOption { which: "log_decay", .. }), "{error}");
            for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
                let save = |stream: &dijiang::MultiHeadStream<f64>| {
                    stream.head(b, h).unwrap().save().unwrap()
                };
                assert_eq!(save(&stream), save(&floats));
            }
            stream
                .extend_gated(q, k, v, gates.slice(part), Some(&lengths), steps.slice_mut(part))
                .unwrap();
            start += size;
        }
        assert_eq!(stream.lengths(), lengths);
        assert_eq!(stream.state_floats(), batch * kv_heads * (linear_floats(d, dv) + 1));
        let flat =
            |x: &Array4<f64>| x.clone().into_shape_with_order((batch * heads * n, dv)).unwrap();
        assert_close("stream", &flat(&steps), &flat(&out), 4096.0);

        let wrong = Array4::zeros((batch, kv_heads, n - 1, columns));
        let error = layer
            .forward_gated(q.view(), k.view(), v.view(), wrong.view(), None, out.view_mut())
            .unwrap_err();
        assert_eq!(
            error,
            Error::Shape { which: "log_decay", axis: "rows", expected: n, found: n - 1 }
        );
        let error = layer.forward(q.view(), k.view(), v.view(), Mask::Causal, None).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        for group in [1, 3] {
            let window = HybridAttention::<f64>::builder(d).window(4).build().unwrap();
            let others: [Arc<dyn Attention<f64>>; 2] =
                [Arc::new(SoftmaxAttention::new(d).unwrap()), Arc::new(window)];
            for other in others {
                let layer = MultiHead::new(other, 2 * group, 2).unwrap();
                let q = q.slice(s![.., ..2 * group, .., ..]);
                let mut out = out.slice_mut(s![.., ..2 * group, .., ..]);
                let (k, v, gates) = (k.view(), v.view(), gates.view());
                let errors = [
                    layer.forward_gated(q, k, v, gates, None, out.view_mut()).unwrap_err(),
                    layer
                        .stream(batch, dv)
                        .unwrap()
                        .extend_gated(q, k, v, gates, None, out)
                        .unwrap_err(),
                ];
                assert!(
                    errors.iter().all(|error| matches!(error, Error::Unsupported { .. })),
                    "{errors:?}"
                );
            }
        }
    }
}
