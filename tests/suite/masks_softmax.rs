//! Masks of keys and biases of scores: softmax attention against the formula, and all others, which
//! refuse them.

use crate::common::gradients::{Call, Trained};
use crate::common::{
    Subject, assert_close, normal, optional_subjects, strided, subjects, tokens, wide,
    written_subjects,
};
use dijiang::attention::naive::gradient::biased_gradient;
use dijiang::attention::naive::options::{
    Options, alibi, biased, key_masked, soft_capped, with_sink,
};
use dijiang::attention::naive::{self, formats};
use dijiang::{
    Attention, Error, ForwardRecord, Head, HeadGradient, Mask, Parameters, Rotary, RotaryAttention,
    Scalar, Scratch, SoftmaxAttention, StateFormat,
};
use ndarray::{Array1, Array2, Array3, ArrayView3, Axis, s};

const SIZES: [[usize; 2]; 9] =
    [[0, 0], [1, 1], [1, 2], [5, 63], [64, 64], [65, 65], [64, 130], [130, 130], [1, 600]];

/// The options of a kernel over four columns.
#[derive(Clone, Copy, Debug, Default)]
struct Chosen {
    soft_cap: Option<f64>,
    sink_logit: Option<f64>,
    slope: f64,
    format: StateFormat,
}

impl Chosen {
    fn all() -> Vec<Self> {
        let plain = Self::default();
        vec![
            plain,
            Self { soft_cap: Some(0.7), ..plain },
            Self { sink_logit: Some(0.3), slope: 0.1, ..plain },
            Self { soft_cap: Some(2.0), sink_logit: Some(-1.0), slope: 0.02, ..plain },
            Self { format: StateFormat::Q8, ..plain },
        ]
    }

    fn kernel<T: Scalar>(self) -> SoftmaxAttention<T> {
        let mut kernel = SoftmaxAttention::new(4).unwrap().with_state_format(self.format);
        if let Some(cap) = self.soft_cap {
            kernel = kernel.with_soft_cap(cap).unwrap();
        }
        if let Some(logit) = self.sink_logit {
            kernel = kernel.with_sink_logit(logit).unwrap();
        }
        if self.slope > 0.0 {
            kernel = kernel.with_alibi_slope(self.slope).unwrap();
        }
        kernel
    }
}

/// Arguments: biases for all query heads or each, some of them −∞, and a mask that leaves the first
/// key.
#[derive(Clone)]
struct Input<T> {
    q: Array3<T>,
    k: Array2<T>,
    v: Array2<T>,
    d_out: Array3<T>,
    key_mask: Option<Array1<bool>>,
    bias: Option<Array3<T>>,
}

fn three<T: Scalar>(heads: usize, n: usize, d: usize, seed: u64) -> Array3<T> {
    let all = normal::<T>(heads * n, d, 0.8, seed).into_raw_vec_and_offset().0;
    Array3::from_shape_vec((heads, n, d), all).unwrap()
}

impl<T: Scalar> Input<T> {
    fn new(group: usize, [n_q, n_k]: [usize; 2], biases: usize, masked: bool) -> Self {
        let [_, k, v] = tokens::<T>(n_k, 4, 3, 0.8, 5);
        let mut bias = three::<T>(biases, n_q, n_k.max(1), 9).slice_move(s![.., .., ..n_k]);
        for ((_, t, j), bias) in bias.indexed_iter_mut() {
            if j > 0 && (t * 7 + j * 3) % 11 < 3 {
                *bias = T::neg_infinity();
            }
        }
        Self {
            q: three(group, n_q, 4, 6),
            k,
            v,
            d_out: three(group, n_q, 3, 7),
            key_mask: masked
                .then(|| (0..n_k).map(|j| j == 0 || j % 3 > 0 && j % 70 < 50).collect()),
            bias: (biases > 0).then_some(bias),
        }
    }

    fn head<'a>(&'a self, out: &'a mut Array3<T>) -> Head<'a, T> {
        let mut head = Head::group(self.q.view(), self.k.view(), self.v.view(), out.view_mut());
        if let Some(key_mask) = &self.key_mask {
            head = head.with_key_mask(key_mask.view());
        }
        if let Some(bias) = &self.bias {
            head = head.with_bias(bias.view());
        }
        head
    }

    fn forward(&self, kernel: &dyn Attention<T>, mask: Mask) -> Result<Array3<T>, Error> {
        let mut out = Array3::from_elem(self.d_out.dim(), T::nan());
        kernel.forward_heads(&mut [self.head(&mut out)], mask, &mut Scratch::new())?;
        Ok(out)
    }

    /// What is added to the scores of a query head: distances, biases, and −∞ for masked keys.
    fn added(&self, chosen: Chosen, g: usize, mask: Mask) -> Array2<f64> {
        let all = Array2::zeros((self.q.dim().1, self.k.nrows()));
        let mut all = alibi(all, chosen.slope, mask);
        if let Some(bias) = &self.bias {
            let bias = bias.index_axis(Axis(0), if bias.dim().0 == 1 { 0 } else { g });
            all = biased(all, &wide(&bias.to_owned()));
        }
        match &self.key_mask {
            Some(key_mask) => key_masked(all, key_mask),
            None => all,
        }
    }

    fn exact(&self, chosen: Chosen, g: usize, mask: Mask) -> Array2<f64> {
        let q = wide(&self.q.index_axis(Axis(0), g).to_owned());
        let [k, v] = [&self.k, &self.v].map(|x| formats::rounded(&wide(x), chosen.format));
        let scores = naive::scores(&q, &k, 0.5).mapv(|s| soft_capped(s, chosen.soft_cap));
        with_sink(&(scores + self.added(chosen, g, mask)), &v, chosen.sink_logit, mask)
    }

    fn gradient(&self, kernel: &dyn Attention<T>, mask: Mask) -> Result<Found<T>, Error> {
        self.gradient_with(kernel, mask, None)
    }

    /// From buffers of ones, which are taken away again.
    fn gradient_with(
        &self,
        kernel: &dyn Attention<T>,
        mask: Mask,
        record: Option<ForwardRecord<'_, T>>,
    ) -> Result<Found<T>, Error> {
        let ones = |x: &Array2<T>| Array2::from_elem(x.dim(), T::one());
        let mut d = Found {
            q: Array3::from_elem(self.q.dim(), T::one()),
            k: ones(&self.k),
            v: ones(&self.v),
            bias: self.bias.as_ref().map(|x| Array3::from_elem(x.dim(), T::one())),
            parameters: kernel.parameters().zeros_like(),
        };
        let mut head = HeadGradient::group(
            self.q.view(),
            [self.k.view(), self.v.view()],
            self.d_out.view(),
            d.q.view_mut(),
            [d.k.view_mut(), d.v.view_mut()],
        );
        if let Some(key_mask) = &self.key_mask {
            head = head.with_key_mask(key_mask.view());
        }
        if let (Some(bias), Some(d_bias)) = (&self.bias, &mut d.bias) {
            head = head.with_bias(bias.view(), Some(d_bias.view_mut()));
        }
        if let Some(record) = &record {
            head = head.with_record(record.reborrow());
        }
        let mut heads = [head.with_parameters(&mut d.parameters)];
        kernel.backward_heads(&mut heads, mask, &mut Scratch::new())?;
        d.q.mapv_inplace(|x| x - T::one());
        d.k.mapv_inplace(|x| x - T::one());
        d.v.mapv_inplace(|x| x - T::one());
        d.bias.iter_mut().for_each(|x| x.mapv_inplace(|x| x - T::one()));
        Ok(d)
    }
}

#[derive(Clone, Debug)]
struct Found<T> {
    q: Array3<T>,
    k: Array2<T>,
    v: Array2<T>,
    bias: Option<Array3<T>>,
    parameters: Parameters<T>,
}

fn inputs<T: Scalar>(sizes: [usize; 2]) -> Vec<Input<T>> {
    [(0, true), (1, false), (3, false), (3, true), (1, true)]
        .map(|(biases, masked)| Input::new(3, sizes, biases, masked))
        .to_vec()
}

fn masks([n_q, n_k]: [usize; 2]) -> Vec<Mask> {
    let causal = (n_q == n_k).then_some(Mask::Causal);
    [Mask::Full, Mask::CausalTail].into_iter().chain(causal).collect()
}

fn check_forward<T: Scalar>(units: f64) {
    for chosen in Chosen::all() {
        let kernel = chosen.kernel::<T>();
        for sizes in SIZES {
            for (i, input) in inputs::<T>(sizes).iter().enumerate() {
                for mask in masks(sizes) {
                    let what = format!("{chosen:?} {sizes:?} {mask:?} {i}");
                    let out = input.forward(&kernel, mask).unwrap();
                    for (g, out) in out.outer_iter().enumerate() {
                        let exact = input.exact(chosen, g, mask);
                        assert_close(&what, &out.to_owned(), &exact, units);
                    }
                }
            }
        }
    }
}

#[test]
fn the_formula_with_masks_and_biases() {
    check_forward::<f64>(300.0);
    check_forward::<f32>(300.0);
}

fn check_backward<T: Scalar>(units: f64) {
    for chosen in Chosen::all().into_iter().filter(|chosen| chosen.format == StateFormat::F32) {
        let kernel = chosen.kernel::<T>();
        for sizes in SIZES {
            for (i, input) in inputs::<T>(sizes).iter().enumerate() {
                for mask in masks(sizes) {
                    let what = format!("{chosen:?} {sizes:?} {mask:?} {i}");
                    check_gradient(&what, chosen, &kernel, input, mask, units);
                }
            }
        }
    }
}

fn check_gradient<T: Scalar>(
    what: &str,
    chosen: Chosen,
    kernel: &SoftmaxAttention<T>,
    input: &Input<T>,
    mask: Mask,
    units: f64,
) {
    let d = input.gradient(kernel, mask).unwrap();
    let [k, v] = [&input.k, &input.v].map(wide);
    let options = Options { soft_cap: chosen.soft_cap, sink_logit: chosen.sink_logit };
    let mut sums = [Array2::zeros(k.dim()), Array2::zeros(v.dim())];
    let mut of_bias = d.bias.as_ref().map(|x| Array3::<f64>::zeros(x.dim()));
    let mut of_sink = 0.0;
    // buffers held ones, of which rounding is left
    let near = |which: &str, found: &Array2<T>, exact: &Array2<f64>| {
        let one = Array2::from_elem((1, exact.ncols()), 1.0);
        let with_one = ndarray::concatenate![Axis(0), *exact, one];
        let ones = Array2::from_elem((1, exact.ncols()), T::one());
        let found = ndarray::concatenate![Axis(0), *found, ones];
        assert_close(&format!("{what}: {which}"), &found, &with_one, units);
    };
    for g in 0..3 {
        let [q, d_out] =
            [&input.q, &input.d_out].map(|x| wide(&x.index_axis(Axis(0), g).to_owned()));
        let added = input.added(chosen, g, mask);
        let (exact, by_bias) = biased_gradient([&q, &k, &v], &d_out, 0.5, options, &added, mask);
        near("q", &d.q.index_axis(Axis(0), g).to_owned(), &exact.q);
        sums[0] += &exact.k;
        sums[1] += &exact.v;
        of_sink += exact.sink_logit;
        if let Some(all) = &mut of_bias {
            let of_head = if all.dim().0 == 1 { 0 } else { g };
            let mut sum = all.index_axis_mut(Axis(0), of_head);
            sum += &by_bias;
        }
    }
    near("k", &d.k, &sums[0]);
    near("v", &d.v, &sums[1]);
    if let (Some(found), Some(exact)) = (&d.bias, &of_bias) {
        for (found, exact) in found.outer_iter().zip(exact.outer_iter()) {
            near("bias", &found.to_owned(), &exact.to_owned());
        }
    }
    if let Some(found) = d.parameters.get("sink_logits") {
        let error = (found.sum().as_f64() - of_sink).abs();
        assert!(error <= units * T::epsilon().as_f64() * (1.0 + of_sink.abs()), "{what}: {error}");
    }
    if let Some(key_mask) = &input.key_mask {
        for (j, _) in key_mask.iter().enumerate().filter(|(_, seen)| !**seen) {
            assert!(d.k.row(j).iter().chain(d.v.row(j)).all(|&x| x == T::zero()), "{what}: {j}");
        }
    }
}

#[test]
fn the_gradient_with_masks_and_biases() {
    check_backward::<f64>(4000.0);
    check_backward::<f32>(4000.0);
}

/// Central differences, along a random direction by each argument.
#[test]
fn differences_of_the_forward_pass() {
    for chosen in Chosen::all().into_iter().filter(|chosen| chosen.format == StateFormat::F32) {
        let kernel = chosen.kernel::<f64>();
        let rotary = RotaryAttention::new(Rotary::new(4).unwrap(), kernel.clone());
        let kernels: [&dyn Attention<f64>; 2] = [&kernel, &rotary];
        for (kernel, (sizes, mask)) in kernels.into_iter().flat_map(|kernel| {
            let calls =
                [([70, 70], Mask::Causal), ([40, 90], Mask::Full), ([9, 130], Mask::CausalTail)];
            calls.map(|call| (kernel, call))
        }) {
            for input in inputs::<f64>(sizes) {
                let d = input.gradient(kernel, mask).unwrap();
                let loss = |input: &Input<f64>| {
                    (input.forward(kernel, mask).unwrap() * &input.d_out).sum()
                };
                let step = 1e-5;
                let check = |which: &str, exact: f64, moved: [Input<f64>; 2]| {
                    let [up, down] = moved.map(|moved| loss(&moved));
                    let found = (up - down) / (2.0 * step);
                    let error = (found - exact).abs();
                    assert!(
                        error <= 1e-7 * (1.0 + exact.abs()),
                        "{chosen:?} {sizes:?} {mask:?} by {which}: {exact}, by difference {found}"
                    );
                };
                let both = [step, -step];
                let u = three::<f64>(3, sizes[0], 4, 20);
                let moved = both.map(|s| Input { q: &input.q + &u * s, ..input.clone() });
                check("q", (&d.q * &u).sum(), moved);
                let u = normal::<f64>(sizes[1], 4, 1.0, 21);
                let moved = both.map(|s| Input { k: &input.k + &u * s, ..input.clone() });
                check("k", (&d.k * &u).sum(), moved);
                let u = normal::<f64>(sizes[1], 3, 1.0, 22);
                let moved = both.map(|s| Input { v: &input.v + &u * s, ..input.clone() });
                check("v", (&d.v * &u).sum(), moved);
                if let (Some(bias), Some(d_bias)) = (&input.bias, &d.bias) {
                    let u = three::<f64>(bias.dim().0, sizes[0], sizes[1], 23);
                    let moved = both.map(|s| Input { bias: Some(bias + &u * s), ..input.clone() });
                    check("bias", (d_bias * &u).sum(), moved);
                }
            }
        }
    }
}

/// Numbers of keys that are not seen do not matter, however large; nor do views.
#[test]
fn masked_keys_do_not_matter() {
    let kernel = SoftmaxAttention::<f32>::new(4).unwrap();
    for mask in [Mask::Full, Mask::Causal] {
        let input = Input::<f32>::new(3, [130, 130], 3, true);
        let mut other = input.clone();
        let key_mask = input.key_mask.as_ref().unwrap();
        for (j, _) in key_mask.iter().enumerate().filter(|(_, seen)| !**seen) {
            other.k.row_mut(j).fill(f32::MAX);
            other.v.row_mut(j).fill(-f32::MAX);
        }
        let [a, b] = [&input, &other].map(|input| input.forward(&kernel, mask).unwrap());
        assert_eq!(a, b);
        for ((_, t, j), bias) in other.bias.as_mut().unwrap().indexed_iter_mut() {
            if !key_mask[j] || (mask == Mask::Causal && j > t) {
                *bias = 1e30;
            }
        }
        let b = other.forward(&kernel, mask).unwrap();
        for (a, b) in a.outer_iter().zip(b.outer_iter()) {
            assert_close("biases of hidden keys", &b.to_owned(), &wide(&a.to_owned()), 8.0);
        }
    }
    // nor in a backward pass with a cap, whose slope has no value there
    let capped = SoftmaxAttention::<f32>::new(4).unwrap().with_soft_cap(2.0).unwrap();
    let mut input = Input::<f32>::new(3, [70, 70], 0, true);
    let key_mask = input.key_mask.clone().unwrap();
    for (j, _) in key_mask.iter().enumerate().filter(|(_, seen)| !**seen) {
        input.k.row_mut(j).fill(1e38);
        input.v.row_mut(j).fill(1e10);
    }
    let mut small = input.clone();
    for (j, _) in key_mask.iter().enumerate().filter(|(_, seen)| !**seen) {
        small.k.row_mut(j).fill(0.5);
        small.v.row_mut(j).fill(0.5);
    }
    small.q.mapv_inplace(|x| 20.0 * x);
    input.q.mapv_inplace(|x| 20.0 * x);
    let [d, exact] = [&input, &small].map(|input| input.gradient(&capped, Mask::Causal).unwrap());
    assert!(d.q.iter().any(|x| x.abs() > 0.1), "{}", d.q);
    assert_eq!((d.q, d.k, d.v), (exact.q, exact.k, exact.v));
    // leaving the tokens out gives the same
    let input = Input::<f32>::new(3, [40, 130], 0, true);
    let kept: Vec<usize> = (0..130).filter(|&j| input.key_mask.as_ref().unwrap()[j]).collect();
    let [k, v] = [&input.k, &input.v].map(|x| x.select(Axis(0), &kept));
    let left = Input { k, v, key_mask: None, ..input.clone() };
    let [a, b] = [&input, &left].map(|input| input.forward(&kernel, Mask::Full).unwrap());
    for (a, b) in a.outer_iter().zip(b.outer_iter()) {
        assert_close("left out", &a.to_owned(), &wide(&b.to_owned()), 16.0);
    }
}

#[test]
fn views_may_lie_in_any_way() {
    let kernel = SoftmaxAttention::<f64>::new(4).unwrap();
    let input = Input::<f64>::new(2, [70, 70], 1, true);
    let plain = input.forward(&kernel, Mask::Causal).unwrap();
    let gradient = input.gradient(&kernel, Mask::Causal).unwrap();
    let large = strided(input.bias.as_ref().unwrap().index_axis(Axis(0), 0));
    let bias = large.slice(s![..;2, ..;3]).insert_axis(Axis(0));
    let mut turned = Array3::<f64>::zeros((70, 70, 1));
    let mut key_mask = Array1::from_elem(140, false);
    key_mask.slice_mut(s![..;2]).assign(input.key_mask.as_ref().unwrap());
    let key_mask = key_mask.slice(s![..;2]);
    let mut out = Array3::zeros(plain.dim());
    let head = Head::group(input.q.view(), input.k.view(), input.v.view(), out.view_mut());
    let mut heads = [head.with_bias(bias).with_key_mask(key_mask)];
    kernel.forward_heads(&mut heads, Mask::Causal, &mut Scratch::new()).unwrap();
    assert_eq!(out, plain);
    let mut d_q = Array3::zeros(input.q.dim());
    let [mut d_k, mut d_v] = [&input.k, &input.v].map(|x| Array2::zeros(x.dim()));
    let head = HeadGradient::group(
        input.q.view(),
        [input.k.view(), input.v.view()],
        input.d_out.view(),
        d_q.view_mut(),
        [d_k.view_mut(), d_v.view_mut()],
    );
    let d_bias = turned.view_mut().permuted_axes([2, 1, 0]);
    let mut heads = [head.with_bias(bias, Some(d_bias)).with_key_mask(key_mask)];
    kernel.backward_heads(&mut heads, Mask::Causal, &mut Scratch::new()).unwrap();
    let found = turned.permuted_axes([2, 1, 0]).index_axis_move(Axis(0), 0);
    let exact = gradient.bias.unwrap().index_axis_move(Axis(0), 0);
    assert_close("d_bias", &found, &exact, 64.0);
    assert_close("d_k", &d_k, &gradient.k, 64.0);

    // a backward pass with what the forward pass gave
    let mut log_normalizer = Array2::zeros((2, 70));
    let mut heads = [input.head(&mut out).with_log_normalizer(log_normalizer.view_mut())];
    kernel.forward_heads(&mut heads, Mask::Causal, &mut Scratch::new()).unwrap();
    let record = ForwardRecord { out: out.view(), log_normalizer: log_normalizer.view() };
    let found = input.gradient_with(&kernel, Mask::Causal, Some(record)).unwrap();
    assert_close("with a record", &found.k, &gradient.k, 64.0);
}

/// A query that sees nothing is an error, or zero with a sink.
#[test]
fn queries_that_see_nothing() {
    let kernel = SoftmaxAttention::<f32>::new(4).unwrap();
    let with_sink = kernel.clone().with_sink_logit(-3.0).unwrap();
    for n in [1, 70, 200] {
        for by_bias in [false, true] {
            let mut input = Input::<f32>::new(2, [n, n], usize::from(by_bias), !by_bias);
            let blind = n / 2;
            if let Some(bias) = &mut input.bias {
                let lowest = if n == 70 { f32::MIN } else { f32::NEG_INFINITY };
                bias.slice_mut(s![.., blind, ..]).fill(lowest);
            }
            if let Some(key_mask) = &mut input.key_mask {
                key_mask.slice_mut(s![..=blind]).fill(false);
                key_mask.slice_mut(s![blind + 1..]).fill(true);
            }
            let first = if by_bias { blind } else { 0 };
            let error = Error::NothingSeen { row: first };
            assert_eq!(input.forward(&kernel, Mask::Causal), Err(error.clone()));
            assert_eq!(input.gradient(&kernel, Mask::Causal).unwrap_err(), error);
            assert!(error.to_string().contains("sees no key"), "{error}");
            let out = input.forward(&with_sink, Mask::Causal).unwrap();
            assert!(out.slice(s![.., first..=blind, ..]).iter().all(|&x| x == 0.0));
            if blind + 1 < n {
                assert!(out.slice(s![.., blind + 1.., ..]).iter().all(|&x| x != 0.0));
            }
            let d = input.gradient(&with_sink, Mask::Causal).unwrap();
            assert!(d.q.slice(s![.., first..=blind, ..]).iter().all(|&x| x == 0.0));
            assert!(d.k.iter().chain(&d.v).all(|x| x.is_finite()));
            if n == 1 {
                assert_eq!(d.parameters.get("sink_logits").unwrap().sum(), 0.0);
            }
        }
    }
}

fn head_of<'a>(
    q: ArrayView3<'a, f64>,
    x: &'a Array2<f64>,
    out: &'a mut Array3<f64>,
) -> Head<'a, f64> {
    Head::group(q, x.view(), x.view(), out.view_mut())
}

#[test]
fn bad_masks_and_biases_are_refused() {
    let kernel = SoftmaxAttention::<f64>::new(4).unwrap();
    let input = Input::<f64>::new(2, [6, 6], 2, true);
    let run = |change: &dyn Fn(&mut Input<f64>)| {
        let mut input = input.clone();
        change(&mut input);
        let error = input.forward(&kernel, Mask::Causal).unwrap_err();
        assert_eq!(input.gradient(&kernel, Mask::Causal).unwrap_err(), error);
        error
    };
    for bad in [f64::NAN, f64::INFINITY] {
        let error = run(&|x| x.bias.as_mut().unwrap()[[1, 2, 3]] = bad);
        assert_eq!(error, Error::NotFinite { which: "bias", row: 2, column: 3 });
    }
    // numbers of masked keys must be finite all the same
    let error = run(&|x| {
        x.key_mask.as_mut().unwrap()[2] = false;
        x.k[[2, 1]] = f64::NAN;
    });
    assert_eq!(error, Error::NotFinite { which: "k", row: 2, column: 1 });
    let shapes = [
        (run(&|x| x.key_mask = Some(Array1::from_elem(5, true))), "key_mask"),
        (run(&|x| x.bias = Some(Array3::zeros((3, 6, 6)))), "bias"),
        (run(&|x| x.bias = Some(Array3::zeros((2, 5, 6)))), "bias"),
        (run(&|x| x.bias = Some(Array3::zeros((1, 6, 7)))), "bias"),
    ];
    for (error, name) in shapes {
        assert!(matches!(error, Error::Shape { which, .. } if which == name), "{error}");
    }
    let Input { q, k, v, d_out, bias, .. } = &input;
    let mut d_q = Array3::zeros(q.dim());
    let [mut d_k, mut d_v] = [k, v].map(|x| Array2::zeros(x.dim()));
    let mut d_bias = Array3::zeros((1, 6, 6));
    let d = [d_k.view_mut(), d_v.view_mut()];
    let kv = [k.view(), v.view()];
    let mut head = HeadGradient::group(q.view(), kv, d_out.view(), d_q.view_mut(), d);
    head.d_bias = Some(d_bias.view_mut());
    let run = |head: HeadGradient<'_, f64>| {
        kernel.backward_heads(&mut [head], Mask::Causal, &mut Scratch::new()).unwrap_err()
    };
    assert!(matches!(run(head.reborrow()), Error::Unsupported { .. }));
    head.bias = Some(bias.as_ref().unwrap().view());
    assert!(matches!(run(head), Error::Shape { which: "d_bias", .. }));
}

fn all_subjects() -> Vec<Subject> {
    let (d, m) = (4, 7);
    let mut all = subjects(d, m);
    all.extend(optional_subjects(d, m));
    all.extend(written_subjects(d, m));
    all
}

/// Piece by piece, with the biases of all tokens so far.
#[test]
fn streams_take_biases() {
    for chosen in Chosen::all() {
        for (group, biases) in [(1, 1), (2, 1), (3, 3)] {
            let input = Input::<f64>::new(group, [70, 70], biases, false);
            let bias = input.bias.as_ref().unwrap();
            let kernel = chosen.kernel::<f64>();
            let rotary = RotaryAttention::new(Rotary::new(4).unwrap(), kernel.clone());
            for kernel in [&kernel as &dyn Attention<f64>, &rotary] {
                let exact = input.forward(kernel, Mask::Causal).unwrap();
                let options = dijiang::StreamOptions::new(3).group(group);
                let mut stream = kernel.stream_with(options).unwrap();
                let mut at = 0;
                for n in [1, 1, 5, 0, 40, 1, 22] {
                    let (piece, rows) = (s![.., at..at + n, ..], s![at..at + n, ..]);
                    let mut out = Array3::from_elem((group, n, 3), f64::NAN);
                    let bias = bias.slice(s![.., at..at + n, ..at + n]);
                    let mut extend = |bias: ArrayView3<'_, f64>| {
                        let [k, v] = [&input.k, &input.v].map(|x| x.slice(rows));
                        let head = Head::group(input.q.slice(piece), k, v, out.view_mut());
                        let head = head.with_bias(bias);
                        stream.extend_heads(&mut [head])
                    };
                    if n > 0 && chosen.sink_logit.is_none() {
                        let blind = bias.mapv(|_| f64::NEG_INFINITY);
                        let error = extend(blind.view()).unwrap_err();
                        assert_eq!(error, Error::NothingSeen { row: 0 });
                    }
                    extend(bias).unwrap();
                    at += n;
                    assert_eq!(stream.len(), at);
                    let exact = exact.slice(piece);
                    for (out, exact) in out.outer_iter().zip(exact.outer_iter()) {
                        assert_close("stream", &out.to_owned(), &exact.to_owned(), 1e3);
                    }
                }
            }
        }
    }
}

/// No kernel but those made of softmax attention takes them, and no stream takes a mask of keys.
#[test]
fn other_kernels_refuse_masks_and_biases() {
    let (x, bias) = (Array2::<f64>::zeros((5, 4)), Array3::zeros((1, 5, 5)));
    let key_mask = Array1::from_elem(5, true);
    let q = x.view().insert_axis(Axis(0));
    let unsupported = |what: &str, result: Result<(), Error>| {
        let error = result.expect_err(what);
        assert!(matches!(error, Error::Unsupported { .. }), "{what}: {error}");
    };
    for subject in all_subjects() {
        let (kernel, mut out) = (&*subject.f64, Array3::zeros((1, 5, 4)));
        let takes = subject.name.contains("softmax");
        let mask = subject.masks()[0];
        let mut scratch = Scratch::new();
        let name = &subject.name;
        let head = head_of(q, &x, &mut out).with_key_mask(key_mask.view());
        let result = kernel.forward_heads(&mut [head], mask, &mut scratch);
        if takes {
            result.unwrap();
        } else {
            unsupported(name, result);
        }
        let head = head_of(q, &x, &mut out).with_bias(bias.view());
        let result = kernel.forward_heads(&mut [head], mask, &mut scratch);
        if takes {
            result.unwrap();
        } else {
            unsupported(name, result);
        }
        if let Ok(mut stream) = kernel.stream(4) {
            let head = head_of(q, &x, &mut out).with_key_mask(key_mask.view());
            unsupported(name, stream.extend_heads(&mut [head]));
            let head = head_of(q, &x, &mut out).with_bias(bias.view());
            let result = stream.extend_heads(&mut [head]);
            if takes {
                result.unwrap();
            } else {
                unsupported(name, result);
                assert_eq!(stream.len(), 0);
            }
        }
        let trained = Trained {
            name,
            head_dim: 4,
            f64: kernel,
            f32: &*subject.f32,
            masks: &[],
            gates: 0,
            size: 0.5,
        };
        let call = Call::<f64>::new(&trained, 1, [5, 5], 1);
        if takes || call.gradient(kernel, mask, 0.0, &mut scratch).is_err() {
            continue;
        }
        let run = |key_mask: bool, scratch: &mut Scratch<f64>| {
            let mut d_q = call.q.clone();
            let (mut d_k, mut d_v) = (call.k.clone(), call.v.clone());
            let head = HeadGradient::group(
                call.q.view(),
                [call.k.view(), call.v.view()],
                call.d_out.view(),
                d_q.view_mut(),
                [d_k.view_mut(), d_v.view_mut()],
            );
            let mask_of_keys = Array1::from_elem(5, true);
            let head = match key_mask {
                true => head.with_key_mask(mask_of_keys.view()),
                false => head.with_bias(bias.view(), None),
            };
            kernel.backward_heads(&mut [head], mask, scratch)
        };
        unsupported(name, run(true, &mut scratch));
        unsupported(name, run(false, &mut scratch));
    }
}
