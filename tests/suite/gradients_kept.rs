//! Backward passes with sums that a forward pass kept give what those without give.

use crate::common::{assert_close, normal, tokens, wide};
use dijiang::{
    Attention, CosFormer, EluFeatures, FixedGates, Head, HeadGradient, LinearAttention, Mask,
    Performer, Retention, Rotary, RotaryAttention, Scalar, Scratch, SoftmaxAttention,
    SumCheckpoints, Threads,
};
use ndarray::{Array2, Array3, Axis};

const D: usize = 6;
const DV: usize = 3;

/// One head of keys and values, and all that its passes read.
struct Case<T> {
    q: Array3<T>,
    k: Array2<T>,
    v: Array2<T>,
    d_out: Array3<T>,
    log_decay: Option<Array2<T>>,
}

impl<T: Scalar> Case<T> {
    fn new(n: usize, group: usize, gates: usize) -> Self {
        let [_, k, v] = tokens::<T>(n, D, DV, 0.7, 1);
        let of = |columns: usize, seed: u64| {
            let all = normal::<T>(group * n, columns, 0.7, seed);
            all.into_shape_with_order((group, n, columns)).unwrap()
        };
        let log_decay = (gates > 0).then(|| normal::<T>(n, gates, 0.3, 4).mapv(|x| -x * x));
        Self { q: of(D, 2), k, v, d_out: of(DV, 3), log_decay }
    }

    fn forward(
        &self,
        kernel: &dyn Attention<T>,
        mask: Mask,
        threads: Threads,
        kept: &mut SumCheckpoints<T>,
    ) -> Result<Array3<T>, dijiang::Error> {
        let mut out = Array3::zeros(self.d_out.dim());
        let mut head = Head::group(self.q.view(), self.k.view(), self.v.view(), out.view_mut())
            .with_checkpoints(kept);
        if let Some(log_decay) = &self.log_decay {
            head = head.with_log_decay(log_decay.view());
        }
        kernel.forward_heads(&mut [head], mask, &mut Scratch::with_threads(threads))?;
        Ok(out)
    }

    /// By queries, keys, values, log decays and parameters.
    fn backward(
        &self,
        kernel: &dyn Attention<T>,
        mask: Mask,
        kept: Option<&SumCheckpoints<T>>,
    ) -> Vec<Array2<T>> {
        let mut d_q = Array3::zeros(self.q.dim());
        let [mut d_k, mut d_v] = [&self.k, &self.v].map(|x| Array2::zeros(x.dim()));
        let mut d_log_decay = self.log_decay.as_ref().map(|x| Array2::zeros(x.dim()));
        let mut d_parameters = kernel.parameters().zeros_like();
        let keys = [self.k.view(), self.v.view()];
        let d_keys = [d_k.view_mut(), d_v.view_mut()];
        let (q, d_out) = (self.q.view(), self.d_out.view());
        let mut head = HeadGradient::group(q, keys, d_out, d_q.view_mut(), d_keys)
            .with_parameters(&mut d_parameters);
        if let (Some(x), Some(d)) = (&self.log_decay, &mut d_log_decay) {
            head = head.with_log_decay(x.view(), d.view_mut());
        }
        if let Some(kept) = kept {
            head = head.with_checkpoints(kept);
        }
        kernel.backward_heads(&mut [head], mask, &mut Scratch::new()).unwrap();
        let mut all: Vec<_> = d_q.outer_iter().map(|d_q| d_q.to_owned()).collect();
        all.extend([d_k, d_v]);
        all.extend(d_log_decay);
        let flat = |x: &ndarray::ArrayD<T>| x.iter().copied().collect();
        all.extend(
            d_parameters
                .iter()
                .map(|(_, x)| Array2::from_shape_vec((1, x.len()), flat(x)).unwrap()),
        );
        all
    }
}

fn check<T: Scalar>(what: &str, kernel: &dyn Attention<T>, case: &Case<T>, places: usize) {
    let n = case.k.nrows();
    let exact = case.backward(kernel, Mask::Causal, None);
    let mut kept = SumCheckpoints::new();
    let plain = case.forward(kernel, Mask::Causal, Threads::One, &mut SumCheckpoints::new());
    for threads in [Threads::One, Threads::Pool] {
        let out = case.forward(kernel, Mask::Causal, threads, &mut kept).unwrap();
        assert_eq!(Ok(&out), plain.as_ref(), "{what} n={n}: keeping changes nothing");
        if threads == Threads::One {
            assert_eq!(kept.len(), places, "{what} n={n}");
        }
        let found = case.backward(kernel, Mask::Causal, Some(&kept));
        for (i, (found, exact)) in found.iter().zip(&exact).enumerate() {
            assert_close(&format!("{what} n={n} {threads:?}: {i}"), found, &wide(exact), 512.0);
        }
    }
}

fn performer<T: Scalar>(m: usize) -> LinearAttention<Performer<T>> {
    LinearAttention::new(Performer::new(D, m, 1).unwrap())
}

#[test]
fn kept_sums_change_nothing() {
    for (n, places) in [(1, 0), (256, 0), (257, 1), (513, 2), (1000, 3)] {
        check("performer", &performer::<f64>(9), &Case::new(n, 1, 0), places);
        check("performer", &performer::<f32>(9), &Case::new(n, 3, 0), places);
        let elu = LinearAttention::new(EluFeatures::<f64>::new(D).unwrap()).unnormalized();
        check("elu", &elu, &Case::new(n, 1, 0), places);
        check("decay", &elu.with_decay(0.99), &Case::new(n, 2, 0), places);
        let channels = (0..9).map(|i| 0.9 + 0.01 * f64::from(i)).collect();
        let channels = performer::<f64>(9).with_channel_decay(channels);
        check("channels", &channels, &Case::new(n, 1, 0), places);
        for gates in [1, 9] {
            check("gates", &performer::<f64>(9).gated(), &Case::new(n, 2, gates), places);
            check("gates", &performer::<f32>(9).gated(), &Case::new(n, 1, gates), places);
        }
    }
}

/// There are at most 32 places, however long the sequence.
#[test]
fn places_of_long_sequences() {
    for (n, places) in [(8192, 31), (16_500, 28), (40_000, 31)] {
        check("performer", &performer::<f32>(5), &Case::new(n, 1, 0), places);
    }
}

#[test]
fn kernels_inside_others_keep_sums() {
    let rotary = RotaryAttention::new(Rotary::new(D).unwrap(), performer::<f64>(9));
    let retention = Retention::<f64>::new(D, 0.97).unwrap().with_xpos();
    let gates = FixedGates::new(
        performer::<f64>(9).gated(),
        normal::<f64>(600, 1, 0.1, 5).mapv(|x| -x * x),
    );
    let case = Case::new(600, 2, 0);
    check("rotary", &rotary, &case, 2);
    check("retention", &retention, &case, 2);
    check("fixed gates", &gates, &case, 2);
    check("cosformer", &CosFormer::<f64>::new(D, 1000).unwrap(), &case, 2);
}

/// Values that are brought to a unit, and those that are tiny.
#[test]
fn huge_and_tiny_values() {
    for size in [1e30_f32, 1e-30] {
        let mut case = Case::<f32>::new(700, 1, 0);
        case.v.mapv_inplace(|x| x * size);
        check(&format!("{size}"), &performer::<f32>(9), &case, 2);
    }
}

#[test]
fn calls_without_sums_leave_none() {
    let (kernel, case, mut kept) =
        (performer::<f64>(9), Case::new(600, 1, 0), SumCheckpoints::new());
    let fill = |kept: &mut SumCheckpoints<f64>| {
        case.forward(&kernel, Mask::Causal, Threads::One, kept).unwrap();
        assert_eq!(kept.len(), 2);
    };
    fill(&mut kept);
    case.forward(&kernel, Mask::Full, Threads::One, &mut kept).unwrap();
    assert!(kept.is_empty());
    fill(&mut kept);
    let softmax = SoftmaxAttention::new(D).unwrap();
    case.forward(&softmax, Mask::Causal, Threads::One, &mut kept).unwrap();
    assert!(kept.is_empty());
    // a call that fails late
    fill(&mut kept);
    let mut bad = Case::<f64>::new(600, 1, 0);
    bad.k[[599, 0]] = f64::NAN;
    bad.forward(&kernel, Mask::Causal, Threads::One, &mut kept).unwrap_err();
    assert!(kept.is_empty());
    // those of another number of tokens, or of another size, are not used
    fill(&mut kept);
    for (kernel, case) in [(&kernel, Case::new(500, 1, 0)), (&performer(8), Case::new(600, 1, 0))] {
        let found = case.backward(kernel, Mask::Causal, Some(&kept));
        assert_eq!(found, case.backward(kernel, Mask::Causal, None));
    }
    // nor by full attention
    let found = case.backward(&kernel, Mask::Full, Some(&kept));
    assert_eq!(found, case.backward(&kernel, Mask::Full, None));
    kept.clear();
    assert!(kept.is_empty());
    // streams keep nothing
    fill(&mut kept);
    let mut out = Array2::zeros((600, DV));
    let q = case.q.index_axis(Axis(0), 0);
    let head = Head::new(q, case.k.view(), case.v.view(), out.view_mut());
    let mut stream = Attention::<f64>::stream(&kernel, DV).unwrap();
    stream.extend_heads(&mut [head.with_checkpoints(&mut kept)]).unwrap();
    assert!(kept.is_empty());
}
