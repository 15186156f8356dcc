//! Attention as an operation of burn's backends, with its gradient.

use crate::call::{Call, Inputs, Primitive};
use crate::real::Real;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Flex, backend_extension};
use core::marker::PhantomData;
use dijiang::{Error, LayerRecord, MultiHead};

/// A backend that can attend.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait AttentionBackend: Backend {
    /// What [`Inputs`] are, one after the other; those that a call does not have are any tensor.
    fn attend<T: Real>(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        log_decay: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        parameters: FloatTensor<Self>,
        call: Call<T>,
    ) -> FloatTensor<Self>;
}

impl AttentionBackend for Flex {
    fn attend<T: Real>(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        log_decay: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        parameters: FloatTensor<Self>,
        call: Call<T>,
    ) -> FloatTensor<Self> {
        let inputs = Inputs { q, k, v, log_decay, bias, parameters }.readable();
        let layer = or_panic(call.trained(&inputs.parameters));
        or_panic(call.forward(&layer, &inputs, None))
    }
}

impl<C: CheckpointStrategy> AttentionBackend for Autodiff<Flex, C> {
    fn attend<T: Real>(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        log_decay: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        parameters: FloatTensor<Self>,
        call: Call<T>,
    ) -> FloatTensor<Self> {
        let (q, of_q) = q.into_parts();
        let (k, of_k) = k.into_parts();
        let (v, of_v) = v.into_parts();
        let (log_decay, of_log_decay) = log_decay.into_parts();
        let (bias, of_bias) = bias.into_parts();
        let (parameters, of_parameters) = parameters.into_parts();
        let nodes = [of_q, of_k, of_v, of_log_decay, of_bias, of_parameters];
        let inputs = Inputs { q, k, v, log_decay, bias, parameters }.readable();
        let layer = or_panic(call.trained(&inputs.parameters));
        match AttentionBackward(PhantomData).prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => {
                let mut record = LayerRecord::new();
                let out = or_panic(call.forward(&layer, &inputs, Some(&mut record)));
                let saved = Saved { call, layer, inputs, out: out.clone(), record };
                prepared.finish(saved, out)
            }
            OpsKind::UnTracked(prepared) => {
                prepared.finish(or_panic(call.forward(&layer, &inputs, None)))
            }
        }
    }
}

/// What a backward pass needs: handles of the inputs and the outputs, a few sums, and no weights.
#[derive(Clone, Debug)]
struct Saved<T: Real> {
    call: Call<T>,
    layer: MultiHead<T>,
    inputs: Inputs,
    out: Primitive,
    record: LayerRecord<T>,
}

#[derive(Debug)]
struct AttentionBackward<T>(PhantomData<T>);

impl<T: Real> Backward<Flex, 6> for AttentionBackward<T> {
    type State = Saved<T>;

    fn backward(self, ops: Ops<Saved<T>, 6>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [of_q, of_k, of_v, of_log_decay, of_bias, of_parameters] = ops.parents;
        let Saved { call, layer, inputs, out, record } = ops.state;
        let d_out = grads.consume::<Flex>(&ops.node);
        let asked = [of_log_decay.is_some(), of_bias.is_some(), of_parameters.is_some()];
        let found = or_panic(call.backward(&layer, &inputs, (&record, &out), d_out, asked));
        let found = [
            (of_q, Some(found.q)),
            (of_k, Some(found.k)),
            (of_v, Some(found.v)),
            (of_log_decay, found.log_decay),
            (of_bias, found.bias),
            (of_parameters, found.parameters),
        ];
        for (node, gradient) in found {
            if let Some((node, gradient)) = node.zip(gradient) {
                grads.register::<Flex>(node.id, gradient);
            }
        }
    }
}

/// Operations of burn panic where they cannot go on.
#[track_caller]
pub(crate) fn or_panic<X>(result: Result<X, Error>) -> X {
    result.unwrap_or_else(|error| panic!("attention: {error}"))
}
