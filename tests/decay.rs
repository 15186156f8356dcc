//! Sums that decay are the recurrence, however a sequence is split and whatever the decays.

mod common;

use common::{assert_close, features, golden, map, matrix, normal, tokens, wide};
use dijiang::{Attention, Error, FeatureMap, LinearAttention, Mask, Scalar, Scratch, Stream};
use ndarray::{Array1, Array2, ArrayView2, Axis, s};
use proptest::prelude::*;
use std::sync::Arc;

/// `S_t = diag(α_t) S_{t−1} + φ(k_t) v_tᵀ`, `o_t = φ(q_t)ᵀ S_t`, as the formula stands, with the features in absolute terms, in f64;
/// `log_decay [n, 1 or features]`.
fn recurrence(
    map: &dyn FeatureMap<f64>,
    [q, k, v]: [&Array2<f64>; 3],
    log_decay: &Array2<f64>,
    scale: f64,
    normalized: bool,
) -> Array2<f64> {
    let absolute = |x, keys| {
        let (values, log_scale) = features(map, x, scale, keys);
        values * log_scale.mapv(f64::exp).insert_axis(Axis(1))
    };
    let (q, k) = (absolute(q, false), absolute(k, true));
    let mut sums = Array2::<f64>::zeros((q.ncols(), v.ncols()));
    let mut normalizer = Array1::<f64>::zeros(q.ncols());
    let mut out = Array2::zeros(v.dim());
    for t in 0..q.nrows() {
        for i in 0..q.ncols() {
            let kept = log_decay[[t, if log_decay.ncols() == 1 { 0 } else { i }]].exp();
            sums.row_mut(i).mapv_inplace(|x| kept * x);
            sums.row_mut(i).scaled_add(k[[t, i]], &v.row(t));
            normalizer[i] = kept * normalizer[i] + k[[t, i]];
        }
        let divisor = if normalized { q.row(t).dot(&normalizer) } else { 1.0 };
        out.row_mut(t).assign(&(q.row(t).dot(&sums) / divisor));
    }
    out
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

const KINDS: [Kind; 5] = [Kind::Constant, Kind::Channels, Kind::PerToken, Kind::PerTokenAndChannel, Kind::Everything];

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
        let random =
            |rows, columns, seed| normal::<f64>(rows, columns, strength, seed).mapv(|x| f64::from((-x.abs()) as f32));
        let all = kind == Kind::Everything;
        let gamma = f64::from((-0.3 * strength).exp() as f32);
        let constant = (all || kind == Kind::Constant).then_some(gamma);
        let channels = (all || kind == Kind::Channels).then(|| random(1, m, seed).row(0).mapv(f64::exp));
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
        let width = gates.as_ref().map_or(1, |gates| gates.ncols()).max(channels.as_ref().map_or(1, Array1::len));
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
                kernel.forward_gated(q.view(), k.view(), v.view(), gates.view(), out.view_mut(), &mut Scratch::new())
            }
        }
        .unwrap();
        out
    }

    /// Feeds pieces of the given sizes, over and over.
    fn feed<T: Scalar>(&self, stream: &mut dyn Stream<T>, [q, k, v]: &[Array2<T>; 3], sizes: &[usize]) -> Array2<T> {
        let gates = self.gates.as_ref().map(|gates| gates.mapv(T::from_f64));
        let mut out = Array2::from_elem(v.dim(), T::nan());
        let mut start = 0;
        for size in sizes.iter().cycle() {
            let end = q.nrows().min(start + size);
            let rows = s![start..end, ..];
            let [q, k, v] = [q, k, v].map(|x| x.slice(rows));
            match &gates {
                None => stream.extend(q, k, v, out.slice_mut(rows)),
                Some(gates) => stream.extend_gated(q, k, v, gates.slice(rows), out.slice_mut(rows)),
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

fn check<T: Scalar>(kind: Kind, name: &str, [n, d, m]: [usize; 3], strength: f64, normalized: bool, sizes: &[usize]) {
    let (map, wide_map) = (map::<T>(name, d, m, 5), map::<f64>(name, d, m, 5));
    let input = tokens::<T>(n, d, 3, 0.7, n as u64 + 1);
    let decays = Decays::new(kind, n, map.num_features(), strength, n as u64);
    let kernel = decays.kernel(map, normalized);
    let [q, k, v] = input.each_ref().map(wide);
    let scale = 1.0 / (d as f64).sqrt();
    let exact = recurrence(&*wide_map, [&q, &k, &v], &decays.total, scale, normalized);
    let what = format!("{kind:?} {name} n={n} d={d} m={m} strength {strength} normalized {normalized} {sizes:?}");
    assert_close(&what, &decays.forward(&kernel, &input), &exact, units::<T>());
    let mut stream = Attention::<T>::stream(&kernel, 3).unwrap();
    assert_close(&what, &decays.feed(&mut *stream, &input, sizes), &exact, units::<T>());
    assert_eq!(stream.len(), n);
    assert_eq!(stream.state_floats(), 2 * wide_map.num_features() * 4 + 2);
}

#[test]
fn every_kind_is_the_recurrence_at_every_size() {
    for kind in KINDS {
        for n in [1, 2, 6, 63, 64, 65, 130, 200] {
            for (strength, normalized) in [(0.01, true), (0.1, false), (1.0, true), (5.0, false), (30.0, true)] {
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

#[test]
fn golden_values() {
    let file = golden("golden/decay");
    for case in file["cases"].as_array().unwrap() {
        println!("{case}");
    }
}
