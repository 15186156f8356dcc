//! Padding anywhere, masks and biases: those of burn's own module, of tensor operations, and of
//! sequences without padding.

use crate::common::{assert_close, device, exponentials, means, numbers, wave};
use burn::module::Module;
use burn::nn::attention::{MhaInput, MultiHeadAttentionConfig};
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Bool, Device, Distribution, Int, Tensor, TensorData, s};
use dijiang::{Far, HybridAttention, LinearAttention, MultiHead, Performer, SoftmaxAttention};
use dijiang_burn::{
    AttentionInput, AttentionOptions, AttentionState, DijiangAttentionConfig, Kernel, attention,
};

const B: usize = 3;
const N: usize = 12;
const D: usize = 6;

/// Of the first sequence every third token is padding, of the last the first ones are.
fn is_pad(b: usize, t: usize) -> bool {
    match b {
        0 => t % 3 == 1,
        1 => false,
        _ => t < 4,
    }
}

fn mask_pad(device: &Device) -> Tensor<2, Bool> {
    let all: Vec<bool> = (0..B * N).map(|i| is_pad(i / N, i % N)).collect();
    Tensor::from_data(TensorData::new(all, [B, N]), device)
}

/// Hides some keys, never the first two.
fn mask_attn(rows: usize, device: &Device) -> Tensor<3, Bool> {
    let hides = |i: usize| i % N > 1 && i * 7 % 5 < 2;
    let all: Vec<bool> = (0..B * rows * N).map(hides).collect();
    Tensor::from_data(TensorData::new(all, [B, rows, N]), device)
}

#[test]
fn the_masks_of_the_module_of_burn() {
    let device = Device::flex().autodiff();
    for is_quiet in [false, true] {
        let theirs = MultiHeadAttentionConfig::new(24, 4)
            .with_dropout(0.0)
            .with_quiet_softmax(is_quiet)
            .init(&device);
        let ours = DijiangAttentionConfig::new(24, 4).with_quiet_softmax(is_quiet);
        let ours = ours.init(&device).load_record(theirs.clone().into_record());
        let random = |n: usize| Tensor::<3>::random([B, n, 24], Distribution::Default, &device);
        let (x, y) = (random(5).require_grad(), random(N).require_grad());
        for (by_pad, by_mask) in [(true, false), (false, true), (true, true)] {
            let mut a = MhaInput::new(x.clone(), y.clone(), y.clone());
            let mut b = AttentionInput::new(x.clone(), y.clone(), y.clone());
            if by_pad {
                (a, b) = (a.mask_pad(mask_pad(&device)), b.mask_pad(mask_pad(&device)));
            }
            if by_mask {
                // a query must see a key, but for a quiet softmax
                let hides = mask_attn(5, &device);
                (a, b) = (a.mask_attn(hides.clone()), b.mask_attn(hides));
            }
            let (expected, found) = (theirs.forward(a).context, ours.forward(b).context);
            assert_close(found.clone(), expected.clone(), 1e-5);
            let [found, expected] = [found, expected].map(|x| x.powi_scalar(2).sum().backward());
            for x in [&x, &y] {
                assert_close(x.grad(&found).unwrap(), x.grad(&expected).unwrap(), 1e-4);
            }
        }
    }
}

#[test]
fn the_options_of_the_attention_of_burn() {
    let device = Device::flex();
    let x = Tensor::<3>::random([B, N, 24], Distribution::Normal(0.0, 2.0), &device);
    for (scale, softcap) in [(Some(0.7), None), (None, Some(1.5)), (Some(0.7), Some(1.5))] {
        let config = DijiangAttentionConfig::new(24, 4).with_scale(scale).with_softcap(softcap);
        let model = config.init(&device);
        let heads = |linear: &burn::nn::Linear| {
            linear.forward(x.clone()).reshape([B, N, 4, 6]).swap_dims(1, 2)
        };
        let options = AttentionModuleOptions { scale, softcap, is_causal: true };
        let [q, k, v] = [&model.query, &model.key, &model.value].map(heads);
        let out = burn::tensor::module::attention(q, k, v, None, None, options);
        let expected = model.output.forward(out.swap_dims(1, 2).reshape([B, N, 24]));
        let found = model.forward(AttentionInput::self_attn(x.clone()).causal()).context;
        assert_close(found, expected, 1e-5);
    }
}

#[test]
fn biases_are_added_and_trained() {
    let device = device();
    let layer = MultiHead::new(SoftmaxAttention::<f64>::new(D).unwrap(), 2, 2).unwrap();
    let all = [1, 2, 3].map(|seed| wave([B, 2, N, D], seed, &device).require_grad());
    let [q, k, v] = all.each_ref().map(|x| x.clone());
    for shape in [[1, 1, N, N], [1, 2, N, N], [B, 1, N, N], [B, 2, N, N]] {
        let bias = wave(shape, 4, &device).require_grad();
        for is_causal in [false, true] {
            let options =
                if is_causal { AttentionOptions::causal() } else { AttentionOptions::full() };
            let options = options.with_attn_bias(bias.clone());
            let found = attention(&layer, q.clone(), k.clone(), v.clone(), &options);
            let weights = exponentials(q.clone(), k.clone()) * bias.clone().exp();
            let expected = means(weights, v.clone(), |_, t, s| !is_causal || s <= t);
            assert_close(found.clone(), expected.clone(), 1e-12);
            let u = wave([B, 2, N, D], 9, &device);
            let [found, expected] = [found, expected].map(|x| (x * u.clone()).sum().backward());
            for x in [&q, &k, &v, &bias] {
                assert_close(x.grad(&found).unwrap(), x.grad(&expected).unwrap(), 1e-11);
            }
        }
    }
}

#[test]
fn padding_anywhere_in_any_kernel_and_in_a_state() {
    let device = device();
    let linear = LinearAttention::new(Performer::<f64>::new(D, 9, 1).unwrap());
    let hybrid = HybridAttention::<f64>::builder(D).window(4).far(Far::merged(3));
    let layers = [
        MultiHead::new(SoftmaxAttention::<f64>::new(D).unwrap(), 2, 2).unwrap(),
        MultiHead::new(linear, 2, 2).unwrap(),
        MultiHead::new(hybrid.build().unwrap(), 2, 2).unwrap(),
    ];
    let all = [1, 2, 3].map(|seed| wave([B, 2, N, D], seed, &device).require_grad());
    let options = AttentionOptions::causal().with_mask_pad(mask_pad(&device));
    for layer in &layers {
        let [q, k, v] = all.each_ref().map(|x| x.clone());
        let out = attention(layer, q, k, v, &options);
        let gradients = out.clone().powi_scalar(2).sum().backward();
        let mut state = AttentionState::new(layer, B, D).unwrap();
        let [q, k, v] = all.each_ref().map(|x| x.clone());
        assert_close(state.forward_with(q, k, v, &options), out.clone(), 1e-12);
        assert_eq!(state.lengths(), [8, 12, 8]);
        for b in 0..B {
            let real: Vec<i64> = (0..N).filter(|&t| !is_pad(b, t)).map(|t| t as i64).collect();
            let at = Tensor::<1, Int>::from_data(real.as_slice(), &device);
            let one = |x: Tensor<4>| x.slice(s![b..=b, .., .., ..]).select(2, at.clone());
            let alone = all.each_ref().map(|x| one(x.clone().inner().autodiff()).require_grad());
            let [q, k, v] = alone.each_ref().map(|x| x.clone());
            let expected = attention(layer, q, k, v, &AttentionOptions::causal());
            assert_close(one(out.clone()), expected.clone(), 1e-13);
            let expected = expected.powi_scalar(2).sum().backward();
            for (x, alone) in all.iter().zip(&alone) {
                let found = one(x.grad(&gradients).unwrap().autodiff());
                assert_close(found, alone.grad(&expected).unwrap().autodiff(), 1e-11);
            }
        }
        let zeros = out.slice(s![2, .., ..4, ..]);
        assert!(numbers(zeros).iter().all(|&x| x == 0.0));
    }
}

#[test]
#[should_panic(expected = "a bias of scores")]
fn sums_have_no_single_pairs_to_hide() {
    let device = Device::flex();
    let model = DijiangAttentionConfig::new(24, 4).with_kernel(Kernel::Dct { features: 8 });
    let x = Tensor::<3>::random([B, N, 24], Distribution::Default, &device);
    let input = AttentionInput::self_attn(x).mask_attn(mask_attn(N, &device));
    let _ = model.init(&device).forward(input);
}

#[test]
#[should_panic(expected = "sees no key")]
fn a_query_must_see_a_key() {
    let device = Device::flex();
    let x = Tensor::<3>::random([B, N, 24], Distribution::Default, &device);
    let hides = mask_attn(N, &device).full_like(true);
    let model = DijiangAttentionConfig::new(24, 4).init(&device);
    let _ = model.forward(AttentionInput::self_attn(x).mask_attn(hides));
}

#[test]
#[should_panic(expected = "`mask_pad` is [3, 10] where [3, 12] is needed")]
fn padding_of_other_keys() {
    let device = Device::flex();
    let x = Tensor::<3>::random([B, N, 24], Distribution::Default, &device);
    let mask = mask_pad(&device).slice(s![.., ..10]);
    let model = DijiangAttentionConfig::new(24, 4).init(&device);
    let _ = model.forward(AttentionInput::self_attn(x).mask_pad(mask));
}

#[test]
#[should_panic(expected = "`mask_attn` is [3, 5, 12] where [3, 12, 12] is needed")]
fn a_mask_of_other_queries() {
    let device = Device::flex();
    let x = Tensor::<3>::random([B, N, 24], Distribution::Default, &device);
    let model = DijiangAttentionConfig::new(24, 4).init(&device);
    let _ = model.forward(AttentionInput::self_attn(x).mask_attn(mask_attn(5, &device)));
}
