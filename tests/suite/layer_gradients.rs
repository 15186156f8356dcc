//! The backward pass of a layer is that of its heads: grouped queries, padding, log decays,
//! parameters that heads share, threads.

use crate::common::{assert_close, normal};
use dijiang::{
    Attention, EluFeatures, Error, Far, HeadGradient, HybridAttention, LayerForward, LayerGradient,
    LayerGradients, LayerHead, LayerRecord, LinearAttention, Mask, MultiHead, Padding, Parameters,
    Performer, Rotary, RotaryAttention, Scratch, SoftmaxAttention,
};
use ndarray::{Array2, Array4, ArrayD, Axis, s};
use std::ops::Range;
use std::sync::Arc;

type Kernel = Arc<dyn Attention<f64>>;

const BATCH: usize = 3;
const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const GROUP: usize = 3;
const D: usize = 4;
const DV: usize = 5;

fn random(heads: usize, n: usize, d: usize, seed: u64) -> Array4<f64> {
    let rows = normal::<f64>(BATCH * heads * n, d, 1.0, seed);
    rows.into_shape_with_order((BATCH, heads, n, d)).unwrap()
}

fn performer(seed: u64) -> Kernel {
    Arc::new(LinearAttention::new(Performer::new(D, 9, seed).unwrap()))
}

fn softmax(sinks: Vec<f64>) -> Kernel {
    Arc::new(SoftmaxAttention::new(D).unwrap().with_sink_logits(sinks).unwrap())
}

/// Kernels of the query heads: the same, one for each kv head, one for each, and some of each.
fn layers() -> Vec<(&'static str, Vec<Kernel>)> {
    let rotary: Kernel = Arc::new(RotaryAttention::new(Rotary::new(D).unwrap(), performer(7)));
    let of_kv = [softmax(vec![0.1, 0.5, -0.3]), performer(1)];
    let of_kv = of_kv.iter().flat_map(|kernel| vec![kernel.clone(); GROUP]).collect();
    let mixed = [performer(2), performer(3), softmax(vec![0.2])];
    let mixed = mixed.into_iter().chain(vec![rotary; GROUP]).collect();
    vec![
        ("the same", vec![performer(0); HEADS]),
        ("of each kv head", of_kv),
        ("of each head", (0..HEADS as u64).map(performer).collect()),
        ("mixed", mixed),
    ]
}

fn layer(kernels: &[Kernel]) -> MultiHead<f64> {
    MultiHead::per_head(kernels.to_vec(), KV_HEADS).unwrap()
}

/// The arguments of a call.
#[derive(Clone)]
struct Call {
    q: Array4<f64>,
    k: Array4<f64>,
    v: Array4<f64>,
    log_decay: Option<Array4<f64>>,
    d_out: Array4<f64>,
    mask: Mask,
    padding: Padding,
    lengths: Option<Vec<usize>>,
}

impl Call {
    fn new([n_q, n_k]: [usize; 2], mask: Mask) -> Self {
        Self {
            q: random(HEADS, n_q, D, 1),
            k: random(KV_HEADS, n_k, D, 2),
            v: random(KV_HEADS, n_k, DV, 3),
            log_decay: None,
            d_out: random(HEADS, n_q, DV, 4),
            mask,
            padding: Padding::Right,
            lengths: None,
        }
    }

    /// Real queries and keys of a sequence.
    fn real(&self, sequence: usize) -> [Range<usize>; 2] {
        let (queries, keys) = (self.q.dim().2, self.k.dim().2);
        let Some(lengths) = &self.lengths else { return [0..queries, 0..keys] };
        let length = lengths[sequence];
        match self.padding {
            Padding::Left => [keys - length..keys, keys - length..keys],
            Padding::Right if self.mask == Mask::Causal => [0..length, 0..length],
            Padding::Right if length == 0 => [0..0, 0..0],
            Padding::Right => [0..queries, 0..length],
        }
    }

    /// What is not real holds something.
    fn spoil(&mut self, with: f64) {
        for b in 0..BATCH {
            let [queries, keys] = self.real(b);
            for (x, real) in [
                (&mut self.q, queries.clone()),
                (&mut self.d_out, queries),
                (&mut self.k, keys.clone()),
                (&mut self.v, keys.clone()),
            ]
            .into_iter()
            .chain(self.log_decay.as_mut().map(|x| (x, keys)))
            {
                let mut x = x.index_axis_mut(Axis(0), b);
                x.slice_mut(s![.., ..real.start, ..]).fill(with);
                x.slice_mut(s![.., real.end.., ..]).fill(with);
            }
        }
    }

    /// The gradients, added to some number.
    fn run(&self, layer: &MultiHead<f64>, dirt: f64) -> Result<LayerGradients<f64>, Error> {
        let layer = layer.clone().with_padding(self.padding);
        let mut d = LayerGradients {
            q: Array4::from_elem(self.q.dim(), dirt),
            k: Array4::from_elem(self.k.dim(), dirt),
            v: Array4::from_elem(self.v.dim(), dirt),
            log_decay: self.log_decay.as_ref().map(|x| Array4::from_elem(x.dim(), dirt)),
            parameters: layer.parameters().zeros_like(),
        };
        let arguments = [self.q.view(), self.k.view(), self.v.view()];
        let views = [d.q.view_mut(), d.k.view_mut(), d.v.view_mut()];
        let mut gradient = LayerGradient::new(arguments, self.d_out.view(), views);
        if let (Some(x), Some(d)) = (&self.log_decay, &mut d.log_decay) {
            gradient = gradient.with_log_decay(x.view(), d.view_mut());
        }
        let gradient = gradient.with_parameters(&mut d.parameters);
        layer.backward_into(gradient, self.mask, self.lengths.as_deref())?;
        Ok(d)
    }

    /// The same with what a forward pass kept, without log decays.
    fn run_recorded(&self, layer: &MultiHead<f64>) -> LayerGradients<f64> {
        let layer = layer.clone().with_padding(self.padding);
        let (mut record, mut out) = (LayerRecord::new(), Array4::zeros(self.d_out.dim()));
        let arguments = [self.q.view(), self.k.view(), self.v.view()];
        let forward = LayerForward::new(arguments, out.view_mut()).with_record(&mut record);
        layer.forward_with(forward, self.mask, self.lengths.as_deref()).unwrap();
        assert!(!record.is_empty());
        let mut d = LayerGradients {
            q: Array4::zeros(self.q.dim()),
            k: Array4::zeros(self.k.dim()),
            v: Array4::zeros(self.v.dim()),
            log_decay: None,
            parameters: layer.parameters().zeros_like(),
        };
        let views = [d.q.view_mut(), d.k.view_mut(), d.v.view_mut()];
        let gradient = LayerGradient::new(arguments, self.d_out.view(), views)
            .with_parameters(&mut d.parameters)
            .with_record(&record, out.view());
        layer.backward_into(gradient, self.mask, self.lengths.as_deref()).unwrap();
        d
    }

    /// Head by head, with what `dirt` padding holds; groups of the same kernel go together.
    fn one_by_one(&self, kernels: &[Kernel], dirt: f64) -> LayerGradients<f64> {
        let mut d = LayerGradients {
            q: Array4::from_elem(self.q.dim(), dirt),
            k: Array4::from_elem(self.k.dim(), dirt),
            v: Array4::from_elem(self.v.dim(), dirt),
            log_decay: self.log_decay.as_ref().map(|x| Array4::from_elem(x.dim(), dirt)),
            parameters: Parameters::new(),
        };
        for b in 0..BATCH {
            let [queries, keys] = self.real(b);
            let (queries, keys) = (s![b, .., queries, ..], keys);
            for kv in 0..KV_HEADS {
                let of_group = &kernels[kv * GROUP..(kv + 1) * GROUP];
                let same = of_group.iter().all(|kernel| Arc::ptr_eq(kernel, &of_group[0]));
                let step = if same { GROUP } else { 1 };
                for h in (kv * GROUP..(kv + 1) * GROUP).step_by(step) {
                    let heads = s![h..h + step, .., ..];
                    let keys = s![b, kv, keys.clone(), ..];
                    let [q, d_out] = [&self.q, &self.d_out].map(|x| x.slice(queries));
                    let mut d_q = d.q.slice_mut(queries);
                    let mut d_parameters = kernels[h].parameters().zeros_like();
                    let head = HeadGradient::group(
                        q.slice(heads),
                        [self.k.slice(keys), self.v.slice(keys)],
                        d_out.slice(heads),
                        d_q.slice_mut(heads),
                        [d.k.slice_mut(keys), d.v.slice_mut(keys)],
                    );
                    let head = match (&self.log_decay, &mut d.log_decay) {
                        (Some(x), Some(d)) => head.with_log_decay(x.slice(keys), d.slice_mut(keys)),
                        _ => head,
                    };
                    let mut call = [head.with_parameters(&mut d_parameters)];
                    kernels[h].backward_heads(&mut call, self.mask, &mut Scratch::new()).unwrap();
                    let first = kernels.iter().position(|other| Arc::ptr_eq(other, &kernels[h]));
                    let found = d_parameters.under(&format!("heads.{}", first.unwrap()));
                    let new = found.iter().filter(|(name, _)| d.parameters.get(name).is_none());
                    let new: Parameters<f64> =
                        new.map(|(name, x)| (name.to_owned(), ArrayD::zeros(x.dim()))).collect();
                    d.parameters = d.parameters.and(new);
                    d.parameters.add_scaled(1.0, &found).unwrap();
                }
            }
        }
        d
    }
}

/// Calls with every kind of padding.
fn calls() -> Vec<Call> {
    let mut all = vec![Call::new([20, 20], Mask::Causal), Call::new([7, 12], Mask::Full)];
    for mask in [Mask::Causal, Mask::Full] {
        for padding in [Padding::Right, Padding::Left] {
            for lengths in [vec![20, 7, 1], vec![0, 20, 13], vec![0; 3]] {
                let lengths = Some(lengths);
                all.push(Call { padding, lengths, ..Call::new([20, 20], mask) });
            }
        }
    }
    all.push(Call { lengths: Some(vec![3, 0, 12]), ..Call::new([7, 12], Mask::Full) });
    all
}

#[test]
fn layers_are_their_heads() {
    for (name, kernels) in layers() {
        let layer = layer(&kernels);
        for call in calls() {
            let exact = call.one_by_one(&kernels, 0.0);
            assert_eq!(call.run(&layer, 0.0).unwrap(), exact, "{name}");
            for spoilt in [f64::NAN, f64::INFINITY, 1e300] {
                let mut other = call.clone();
                other.spoil(spoilt);
                assert_eq!(other.run(&layer, 0.0).unwrap(), exact, "{name} {spoilt}");
            }
            // added to what is there; nothing is added to what belongs to padding
            assert_eq!(call.run(&layer, 2.0).unwrap(), call.one_by_one(&kernels, 2.0), "{name}");
            let Call { q, k, v, d_out, mask, .. } = &call;
            let lengths = call.lengths.as_deref();
            let padded = layer.clone().with_padding(call.padding);
            let [q, k, v, d_out] = [q, k, v, d_out].map(|x| x.view());
            assert_eq!(padded.backward(q, k, v, *mask, lengths, d_out).unwrap(), exact, "{name}");
        }
    }
}

/// Heads that share a kernel are heads with copies of it: parameters get the sum.
#[test]
fn shared_kernels_get_the_sum() {
    let kernels = vec![performer(0); HEADS];
    let copies: Vec<Kernel> = (0..HEADS).map(|_| performer(0)).collect();
    for call in calls() {
        let found = call.run(&layer(&kernels), 0.0).unwrap();
        let exact = call.run(&layer(&copies), 0.0).unwrap();
        for (name, found, exact) in
            [("q", &found.q, &exact.q), ("k", &found.k, &exact.k), ("v", &found.v, &exact.v)]
        {
            let rows = |x: &Array4<f64>| {
                let (b, h, n, d) = x.dim();
                x.clone().into_shape_with_order((b * h * n, d)).unwrap()
            };
            assert_close(name, &rows(found), &rows(exact), 1e4);
        }
        assert_eq!(exact.parameters.len(), HEADS * found.parameters.len());
        for name in ["map.projection", "map.weights"] {
            let mut sum = found.parameters.get(&format!("heads.0.{name}")).unwrap().to_owned();
            let size = sum.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
            for h in 0..HEADS {
                sum -= &exact.parameters.get(&format!("heads.{h}.{name}")).unwrap();
            }
            assert!(sum.iter().all(|x| x.abs() <= 1e-11 * size), "{name}");
        }
    }
}

/// Differences of the loss `Σ dO∘O` by every parameter of a layer.
#[test]
fn parameters_of_a_layer_have_their_gradients() {
    for (name, kernels) in layers() {
        let layer = layer(&kernels);
        let call = Call { lengths: Some(vec![20, 7, 1]), ..Call::new([20, 20], Mask::Causal) };
        let loss = |layer: &MultiHead<f64>| {
            let Call { q, k, v, d_out, lengths, .. } = &call;
            let [q, k, v] = [q, k, v].map(|x| x.view());
            (layer.forward(q, k, v, Mask::Causal, lengths.as_deref()).unwrap() * d_out).sum()
        };
        let (found, parameters) = (call.run(&layer, 0.0).unwrap().parameters, layer.parameters());
        assert!(!found.is_empty());
        for (which, gradient) in found.iter() {
            let direction = normal::<f64>(1, gradient.len(), 1.0, 9);
            let losses = [1e-6, -1e-6].map(|step| {
                let mut moved = parameters.get(which).unwrap().to_owned();
                moved.iter_mut().zip(&direction).for_each(|(x, u)| *x += step * u);
                let moved = Parameters::new().with(which, moved);
                loss(&layer.with_parameters(&moved).unwrap())
            });
            let difference = (losses[0] - losses[1]) / 2e-6;
            let terms = gradient.iter().zip(&direction).map(|(g, u)| g * u);
            let (exact, size): (f64, f64) =
                terms.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
            assert!((difference - exact).abs() <= 1e-5 * size, "{name} {which}");
        }
    }
    // the rest stays, and heads go on sharing what they share
    let kernels = [vec![performer(0); 4], vec![performer(1); 2]].concat();
    let layer = MultiHead::per_head(kernels, 3).unwrap();
    let names: Vec<_> = layer.parameters().names().map(str::to_owned).collect();
    let expected = ["projection", "weights"];
    let of = |h: usize| expected.map(|name| format!("heads.{h}.map.{name}"));
    assert_eq!(names, [of(0), of(4)].concat());
    let zeros = Parameters::new().with("heads.0.map.weights", ArrayD::ones(vec![9]) * 0.5);
    let other = layer.with_parameters(&zeros).unwrap().parameters();
    for (name, x) in layer.parameters().iter() {
        let expected = zeros.get(name).unwrap_or(x.view());
        assert_eq!(other.get(name).unwrap(), expected, "{name}");
    }
    let wrong = Parameters::new().with("heads.1.map.weights", ArrayD::ones(vec![9]));
    let error = layer.with_parameters(&wrong).unwrap_err();
    assert!(matches!(error, Error::Parameter { .. }), "{error}");
}

#[test]
fn log_decays_have_their_gradients() {
    let of = |map| -> Kernel { Arc::new(LinearAttention::new(map).unnormalized().gated()) };
    let elu = || of(EluFeatures::new(D).unwrap());
    for kernels in [vec![elu(); HEADS], (0..HEADS).map(|_| elu()).collect()] {
        let layer = layer(&kernels);
        for width in [1, D] {
            for call in calls() {
                if call.mask == Mask::Full {
                    continue;
                }
                let gates = random(KV_HEADS, 20, width, 5).mapv(|x| -x * x);
                let mut call = Call { log_decay: Some(gates), ..call };
                let exact = call.one_by_one(&kernels, 0.0);
                call.spoil(f64::NAN);
                assert_eq!(call.run(&layer, 0.0).unwrap(), exact);
                let padded = layer.clone().with_padding(call.padding);
                let Call { q, k, v, d_out, log_decay, lengths, .. } = &call;
                let [q, k, v, d_out] = [q, k, v, d_out].map(|x| x.view());
                let (gates, lengths) = (log_decay.as_ref().unwrap().view(), lengths.as_deref());
                let found = padded.backward_gated(q, k, v, gates, lengths, d_out).unwrap();
                assert_eq!(found, exact);
                assert!(found.log_decay.is_some());
            }
        }
    }
}

#[test]
fn errors_say_where() {
    for (name, kernels) in layers() {
        let layer = layer(&kernels);
        for padding in [Padding::Right, Padding::Left] {
            let lengths = Some(vec![20, 7, 1]);
            let good = Call { padding, lengths, ..Call::new([20, 20], Mask::Causal) };
            let row = good.real(1)[0].start + 3;
            for (which, heads) in [("q", 5), ("k", 1), ("v", 1), ("d_out", 4)] {
                let mut call = good.clone();
                let x = match which {
                    "q" => &mut call.q,
                    "k" => &mut call.k,
                    "v" => &mut call.v,
                    _ => &mut call.d_out,
                };
                x[[1, heads, row, 2]] = f64::NAN;
                let head = match which {
                    "q" | "d_out" => LayerHead::Query(heads),
                    _ => LayerHead::Kv(heads),
                };
                let error = Box::new(Error::NotFinite { which, row, column: 2 });
                let expected = Error::InHead { sequence: 1, head, error };
                assert_eq!(call.run(&layer, 0.0).unwrap_err(), expected, "{name}");
            }
        }
    }

    let layer = layer(&layers()[0].1);
    let good = Call::new([20, 20], Mask::Causal);
    let zeros = |heads, n, d| Array4::<f64>::zeros((BATCH, heads, n, d));
    let wrong = [
        Call { q: zeros(HEADS, 20, D + 1), ..good.clone() },
        Call { q: zeros(HEADS - 1, 20, D), ..good.clone() },
        Call { k: zeros(KV_HEADS, 19, D), ..good.clone() },
        Call { v: zeros(KV_HEADS + 1, 20, DV), ..good.clone() },
        Call { d_out: zeros(HEADS, 19, DV), ..good.clone() },
        Call { d_out: zeros(HEADS, 20, DV + 1), ..good.clone() },
        Call { d_out: zeros(KV_HEADS, 20, DV), ..good.clone() },
        Call { d_out: Array4::zeros((1, HEADS, 20, DV)), ..good.clone() },
        Call { lengths: Some(vec![1]), ..good.clone() },
        Call {
            padding: Padding::Left,
            lengths: Some(vec![3; 3]),
            ..Call::new([7, 12], Mask::Full)
        },
    ];
    for (i, wrong) in wrong.iter().enumerate() {
        let error = wrong.run(&layer, 0.0).unwrap_err();
        assert!(matches!(error, Error::Shape { .. }), "{i}: {error}");
    }
    let long = Call { lengths: Some(vec![21; 3]), ..good.clone() };
    let error = long.run(&layer, 0.0).unwrap_err();
    assert!(matches!(error, Error::InvalidOption { which: "key_lengths", .. }), "{error}");
    let gates = Some(zeros(KV_HEADS, 20, 1));
    let error = Call { log_decay: gates, ..good.clone() }.run(&layer, 0.0).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
}

/// Only what is asked for is computed.
#[test]
fn views_of_any_kind_and_some_of_the_parameters() {
    let kernels = &layers()[3].1;
    let (layer, call) = (layer(kernels), Call::new([20, 20], Mask::Causal));
    let exact = call.one_by_one(kernels, 0.0);
    // [batch, n, heads, d], as models have it
    let turned =
        |x: &Array4<f64>| x.view().permuted_axes([0, 2, 1, 3]).as_standard_layout().to_owned();
    let [q, k, v, d_out] = [&call.q, &call.k, &call.v, &call.d_out].map(turned);
    let [q, k, v, d_out] = [&q, &k, &v, &d_out].map(|x| x.view().permuted_axes([0, 2, 1, 3]));
    let mut d = [&call.q, &call.k, &call.v].map(|x| turned(&Array4::zeros(x.dim())));
    let [d_q, d_k, d_v] = d.each_mut().map(|x| x.view_mut().permuted_axes([0, 2, 1, 3]));
    let name = "heads.1.map.weights";
    let mut asked = Parameters::new().with(name, ArrayD::ones(vec![9]));
    let gradient = LayerGradient::new([q, k, v], d_out, [d_q, d_k, d_v]);
    layer.backward_into(gradient.with_parameters(&mut asked), Mask::Causal, None).unwrap();
    assert_eq!(asked.names().collect::<Vec<_>>(), [name]);
    let rows = |x: Vec<f64>| Array2::from_shape_vec((1, x.len()), x).unwrap();
    let found = rows(asked.get(name).unwrap().iter().map(|x| x - 1.0).collect());
    let of_name = rows(exact.parameters.get(name).unwrap().iter().copied().collect());
    assert_close(name, &found, &of_name, 64.0);
    for (d, exact) in d.iter().zip([&exact.q, &exact.k, &exact.v]) {
        let d = d.view().permuted_axes([0, 2, 1, 3]);
        assert_close(
            "turned",
            &rows(d.iter().copied().collect()),
            &rows(exact.iter().copied().collect()),
            1e3,
        );
    }
    let mut wrong = Parameters::new().with("heads.4.map.weights", ArrayD::ones(vec![9]));
    let mut d = [&call.q, &call.k, &call.v].map(|x| Array4::zeros(x.dim()));
    let d = d.each_mut().map(|x| x.view_mut());
    let gradient = LayerGradient::new([q, k, v], d_out, d).with_parameters(&mut wrong);
    let error = layer.backward_into(gradient, Mask::Causal, None).unwrap_err();
    assert!(matches!(error, Error::Parameter { .. }), "{error}");
}

/// Several threads give what one gives, bit for bit.
#[test]
fn threads_change_nothing() {
    let on = |threads: usize, work: &(dyn Fn() -> LayerGradients<f64> + Sync)| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
    };
    for (name, kernels) in layers() {
        let layer = layer(&kernels);
        for call in [Call::new([150, 150], Mask::Causal), Call::new([90, 150], Mask::Full)] {
            let run = || call.run(&layer, 0.0).unwrap();
            let one = on(1, &run);
            for threads in [2, 3, 8] {
                assert_eq!(on(threads, &run), one, "{name} {threads} {:?}", call.mask);
            }
        }
    }
}

/// Heads that share their entries are differentiated as one call of their kernel, which they share
/// as well.
#[test]
fn pooled_heads_hand_gradients_on_together() {
    let kernel = || -> Kernel {
        let builder = HybridAttention::builder(D).window(4).sinks(1).far(Far::merged(6));
        Arc::new(builder.sink_logit(0.3).build().unwrap())
    };
    let shared = kernel();
    for kernels in [vec![shared.clone(), shared], vec![kernel(), kernel()]] {
        let layer = MultiHead::per_kv_head(kernels.clone(), HEADS).unwrap().pooled().unwrap();
        for lengths in [None, Some(vec![40, 9, 0])] {
            let call = Call { lengths, ..Call::new([40, 40], Mask::Causal) };
            let found = call.run(&layer, 0.0).unwrap();
            let again = call.run_recorded(&layer);
            assert_eq!((&again.q, &again.k, &again.v), (&found.q, &found.k, &found.v));
            assert_eq!(again.parameters, found.parameters);
            let mut d_sinks = [(); KV_HEADS].map(|()| kernels[0].parameters().zeros_like());
            for b in 0..BATCH {
                let [queries, keys] = call.real(b);
                if queries.is_empty() {
                    continue;
                }
                let mut d: Vec<_> = (0..KV_HEADS)
                    .map(|_| {
                        let d_q = ndarray::Array3::zeros((GROUP, queries.len(), D));
                        let [d_k, d_v] = [D, DV].map(|d| Array2::<f64>::zeros((keys.len(), d)));
                        (d_q, d_k, d_v)
                    })
                    .collect();
                let all = d.iter_mut().zip(&mut d_sinks).enumerate();
                let mut heads: Vec<_> = all
                    .map(|(kv, ((d_q, d_k, d_v), d_sink))| {
                        let group = kv * GROUP..(kv + 1) * GROUP;
                        HeadGradient::group(
                            call.q.slice(s![b, group.clone(), queries.clone(), ..]),
                            [
                                call.k.slice(s![b, kv, keys.clone(), ..]),
                                call.v.slice(s![b, kv, keys.clone(), ..]),
                            ],
                            call.d_out.slice(s![b, group, queries.clone(), ..]),
                            d_q.view_mut(),
                            [d_k.view_mut(), d_v.view_mut()],
                        )
                        .with_parameters(d_sink)
                    })
                    .collect();
                kernels[0].backward_heads(&mut heads, Mask::Causal, &mut Scratch::new()).unwrap();
                drop(heads);
                for (kv, (d_q, d_k, d_v)) in d.iter().enumerate() {
                    let group = kv * GROUP..(kv + 1) * GROUP;
                    assert_eq!(found.q.slice(s![b, group, queries.clone(), ..]), d_q);
                    assert_eq!(found.k.slice(s![b, kv, keys.clone(), ..]), d_k);
                    assert_eq!(found.v.slice(s![b, kv, keys.clone(), ..]), d_v);
                }
            }
            let sink = |kv: usize| d_sinks[kv].get("sink_logits").unwrap()[0];
            let of = |head: usize| found.parameters.get(&format!("heads.{head}.sink_logits"));
            assert!((of(0).unwrap()[0] - sink(0) - sink(1)).abs() < 1e-12);
            assert!(of(GROUP).is_none());
        }
    }
}
