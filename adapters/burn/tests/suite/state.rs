use crate::common::{assert_close, device, numbers, wave};
use burn::tensor::{DType, Device, Tensor, s};
use dijiang::{
    DctFeatures, EluFeatures, Far, HybridAttention, LinearAttention, MultiHead, Performer,
    SoftmaxAttention,
};
use dijiang_burn::{AttentionOptions, AttentionState, StateError, attention};

const D: usize = 8;
const N: usize = 30;

fn layers() -> [MultiHead<f64>; 4] {
    let hybrid = HybridAttention::builder(D).window(5).far(Far::merged(4)).build().unwrap();
    [
        MultiHead::new(SoftmaxAttention::new(D).unwrap(), 4, 2),
        MultiHead::new(LinearAttention::new(DctFeatures::<f64>::new(D, 16, 1).unwrap()), 4, 2),
        MultiHead::new(LinearAttention::new(Performer::<f64>::new(D, 16, 1).unwrap()), 4, 4),
        MultiHead::new(hybrid, 4, 1),
    ]
    .map(Result::unwrap)
}

fn inputs(layer: &MultiHead<f64>, batch: usize, device: &Device) -> [Tensor<4>; 3] {
    let (heads, kv_heads) = (layer.query_heads(), layer.kv_heads());
    // as projections leave them, tokens before heads
    [
        wave([batch, N, heads, D], 1, device),
        wave([batch, N, kv_heads, D], 2, device),
        wave([batch, N, kv_heads, 3], 3, device),
    ]
    .map(|x| x.swap_dims(1, 2))
}

/// Some tokens.
fn part([q, k, v]: &[Tensor<4>; 3], from: usize, to: usize) -> [Tensor<4>; 3] {
    [q, k, v].map(|x| x.clone().slice(s![.., .., from..to, ..]))
}

fn step(state: &mut AttentionState<f64>, [q, k, v]: [Tensor<4>; 3]) -> Tensor<4> {
    state.forward(q, k, v)
}

#[test]
fn a_prompt_and_single_tokens_are_the_whole_pass() {
    for layer in layers() {
        let all = inputs(&layer, 2, &Device::flex());
        let [q, k, v] = all.clone();
        let whole = attention(&layer, q, k, v, &AttentionOptions::causal());
        let mut state = AttentionState::new(&layer, 2, 3).unwrap();
        assert!(state.is_empty());
        let mut outs = vec![step(&mut state, part(&all, 0, 11))];
        outs.extend((11..N).map(|t| step(&mut state, part(&all, t, t + 1))));
        assert_close(Tensor::cat(outs, 2), whole, 1e-10);
        assert_eq!((state.len(), state.lengths()), (N, vec![N, N]));
    }
}

#[test]
fn a_state_that_does_not_grow() {
    let [softmax, linear, _, hybrid] = layers();
    for (layer, grows) in [(softmax, true), (linear, false), (hybrid, false)] {
        let all = inputs(&layer, 1, &Device::flex());
        let mut state = AttentionState::new(&layer, 1, 3).unwrap();
        step(&mut state, part(&all, 0, 15));
        let bytes = state.state_bytes();
        step(&mut state, part(&all, 15, N));
        assert_eq!(state.state_bytes() > bytes, grows);
    }
}

#[test]
fn gates_of_single_tokens() {
    let kernel = LinearAttention::new(EluFeatures::<f64>::new(D).unwrap()).gated();
    let layer = MultiHead::new(kernel, 4, 2).unwrap();
    let all = inputs(&layer, 2, &Device::flex());
    let gates = (wave([2, N, 2, 1], 4, &Device::flex()) - 1.2).swap_dims(1, 2);
    let [q, k, v] = all.clone();
    let options = AttentionOptions::causal().with_log_decay(gates.clone());
    let whole = attention(&layer, q, k, v, &options);
    let mut state = AttentionState::new(&layer, 2, 3).unwrap();
    let outs = (0..N).map(|t| {
        let [q, k, v] = part(&all, t, t + 1);
        state.forward_gated(q, k, v, gates.clone().slice(s![.., .., t..=t, ..]))
    });
    assert_close(Tensor::cat(outs.collect(), 2), whole, 1e-10);
}

#[test]
fn back_to_a_checkpoint() {
    for layer in layers() {
        let all = inputs(&layer, 1, &Device::flex());
        let mut state = AttentionState::new(&layer, 1, 3).unwrap();
        step(&mut state, part(&all, 0, 9));
        assert!(state.rollback().is_err());
        state.checkpoint();
        let first = step(&mut state, part(&all, 9, 14));
        step(&mut state, part(&all, 14, 20));
        state.rollback().unwrap();
        assert_eq!(state.len(), 9);
        assert_close(step(&mut state, part(&all, 9, 14)), first, 1e-12);
    }
}

#[test]
fn sequences_of_a_batch() {
    let [layer, ..] = layers();
    let all = inputs(&layer, 2, &Device::flex());
    let mut state = AttentionState::new(&layer, 2, 3).unwrap();
    let [q, k, v] = part(&all, 0, 6);
    let out = state.forward_padded(q, k, v, &[6, 4]);
    assert!(numbers(out.slice(s![1, .., 4.., ..])).iter().all(|&x| x == 0.0));
    assert_eq!(state.lengths(), [6, 4]);
    state.reorder(&[1, 0, 1]).unwrap();
    assert_eq!(state.lengths(), [4, 6, 4]);
    assert!(state.reorder(&[3]).is_err());
    state.reset_sequence(1).unwrap();
    assert_eq!(state.lengths(), [4, 0, 4]);
    assert!(state.reset_sequence(3).is_err());
    let mut copy = state.clone();
    state.reset();
    assert!(state.is_empty());
    copy.reorder(&[1]).unwrap();
    let [q, k, v] = inputs(&layer, 1, &Device::flex());
    let whole = attention(&layer, q.clone(), k.clone(), v.clone(), &AttentionOptions::causal());
    assert_close(copy.forward(q, k, v), whole, 1e-12);
}

#[test]
fn bytes_of_a_state() {
    for layer in layers() {
        let all = inputs(&layer, 2, &Device::flex());
        let mut state = AttentionState::new(&layer, 2, 3).unwrap();
        step(&mut state, part(&all, 0, 17));
        let bytes = state.save().unwrap();
        let mut other = AttentionState::new(&layer, 2, 3).unwrap();
        other.load(&bytes).unwrap();
        assert_eq!(other.lengths(), [17, 17]);
        let [a, b] = [&mut state, &mut other].map(|state| step(state, part(&all, 17, N)));
        assert_eq!(numbers(a), numbers(b));

        assert!(matches!(other.load(&bytes[1..]), Err(StateError::Bytes(_))));
        let mut smaller = AttentionState::new(&layer, 1, 3).unwrap();
        let error = smaller.load(&bytes).unwrap_err();
        assert!(error.to_string().contains("number of heads and sequences"), "{error}");
        assert!(smaller.is_empty());
    }
}

#[test]
fn devices_with_gradients() {
    let [layer, ..] = layers();
    let [q, k, v] = inputs(&layer, 1, &device());
    let mut state = AttentionState::new(&layer, 1, 3).unwrap();
    let out = state.forward(q.require_grad(), k, v);
    assert!(out.is_autodiff() && !out.is_tracked());
}

#[test]
#[should_panic(expected = "`k` is F32, the layer is F64")]
fn numbers_of_another_type() {
    let [layer, ..] = layers();
    let [q, k, v] = inputs(&layer, 1, &Device::flex());
    let mut state = AttentionState::new(&layer, 1, 3).unwrap();
    let _ = state.forward(q, k.cast(DType::F32), v);
}

#[test]
#[should_panic(expected = "attention: `v` has 3 columns where 4 are needed")]
fn values_of_another_size() {
    let [layer, ..] = layers();
    let [q, k, v] = inputs(&layer, 1, &Device::flex());
    let mut state = AttentionState::new(&layer, 1, 4).unwrap();
    let _ = state.forward(q, k, v);
}
