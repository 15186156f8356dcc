//! Attention as an operation of burn's backends, with its gradient.

use crate::call::{Call, Inputs};
use crate::real::Real;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Flex, backend_extension};
use core::marker::PhantomData;
use dijiang::{Error, MultiHead};

/// A backend that can attend.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait AttentionBackend: Backend {
    /// What [`Inputs`] are, one after the other; those that a call does not have are any tensor.
    fn attend<T: Real>(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        log_decay: FloatTensor<Self>,
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
        parameters: FloatTensor<Self>,
        call: Call<T>,
    ) -> FloatTensor<Self> {
        let inputs = Inputs { q, k, v, log_decay, parameters }.readable();
        let layer = or_panic(call.trained(&inputs.parameters));
        or_panic(call.forward(&layer, &inputs))
    }
}

impl<C: CheckpointStrategy> AttentionBackend for Autodiff<Flex, C> {
    fn attend<T: Real>(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        log_decay: FloatTensor<Self>,
        parameters: FloatTensor<Self>,
        call: Call<T>,
    ) -> FloatTensor<Self> {
        let (q, of_q) = q.into_parts();
        let (k, of_k) = k.into_parts();
        let (v, of_v) = v.into_parts();
        let (log_decay, of_log_decay) = log_decay.into_parts();
        let (parameters, of_parameters) = parameters.into_parts();
        let nodes = [of_q, of_k, of_v, of_log_decay, of_parameters];
        let inputs = Inputs { q, k, v, log_decay, parameters }.readable();
        let layer = or_panic(call.trained(&inputs.parameters));
        let out = or_panic(call.forward(&layer, &inputs));
        match AttentionBackward(PhantomData).prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => prepared.finish(Saved { call, layer, inputs }, out),
            OpsKind::UnTracked(prepared) => prepared.finish(out),
        }
    }
}

/// What a backward pass needs: handles of the inputs, and no weights.
#[derive(Clone, Debug)]
struct Saved<T: Real> {
    call: Call<T>,
    layer: MultiHead<T>,
    inputs: Inputs,
}

#[derive(Debug)]
struct AttentionBackward<T>(PhantomData<T>);

impl<T: Real> Backward<Flex, 5> for AttentionBackward<T> {
    type State = Saved<T>;

    fn backward(self, ops: Ops<Saved<T>, 5>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [of_q, of_k, of_v, of_log_decay, of_parameters] = ops.parents;
        let Saved { call, layer, inputs } = ops.state;
        let d_out = grads.consume::<Flex>(&ops.node);
        let asked = [of_log_decay.is_some(), of_parameters.is_some()];
        let found = or_panic(call.backward(&layer, &inputs, d_out, asked));
        let found = [
            (of_q, Some(found.q)),
            (of_k, Some(found.k)),
            (of_v, Some(found.v)),
            (of_log_decay, found.log_decay),
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
