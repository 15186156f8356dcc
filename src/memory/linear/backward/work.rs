//! The working memory of a backward pass.

use crate::kernel::buffer::Buffer;
use crate::memory::linear::backward::gates::GateGradients;
use crate::memory::linear::backward::map::MapBuffers;
use crate::memory::linear::backward::tape::Tape;
use crate::memory::linear::checkpoints::Checkpoint;
use crate::memory::linear::pass::{Pass, PassBuffers};
use crate::memory::linear::state::State;
use crate::memory::linear::state_decay::StateDecay;
use crate::parameters::Parameters;
use crate::scalar::Scalar;

/// Working memory, which grows to what the largest call needed and holds nothing between calls.
#[derive(Debug)]
pub(crate) struct BackwardWork<T> {
    pub(super) pass: PassBuffers<T>,
    pub(super) tape: Tape<T>,
    pub(super) state: State<T>,
    pub(super) suffix: State<T>,
    /// The sums before parts of the sequence.
    pub(super) checkpoints: Vec<Checkpoint<T>>,
    /// What is done to sums on the way back.
    pub(super) decay: StateDecay<T>,
    pub(super) map: MapBuffers<T>,
    pub(super) gates: GateGradients<T>,
    pub(super) buffers: Buffers<T>,
}

impl<T: Scalar> BackwardWork<T> {
    pub(crate) fn new() -> Self {
        Self {
            pass: PassBuffers::new(),
            tape: Tape::new(),
            state: State::new(),
            suffix: State::new(),
            checkpoints: Vec::new(),
            decay: StateDecay::new(),
            map: MapBuffers::new(),
            gates: GateGradients::new(),
            buffers: Buffers::new(),
        }
    }

    /// Begins the gradients by the parameters of a map, if any are asked for.
    pub(crate) fn begin(&mut self, pass: &Pass<'_, T>, parameters: Option<Parameters<T>>) {
        self.map.begin(pass.feature_map(), parameters);
    }

    /// Ends them.
    pub(crate) fn end(&mut self, pass: &Pass<'_, T>) -> Option<Parameters<T>> {
        self.map.end(pass.feature_map())
    }

    /// The gradient by the log decays of the last call, one for all features or one for each,
    /// summed over its tokens.
    pub(crate) fn decay_sums(&self) -> &[f64] {
        self.gates.sums()
    }
}

/// Memory of one group.
#[derive(Debug)]
pub(super) struct Buffers<T> {
    /// Cotangents as columns `[value_dim, width]`, and as rows, each times its factor.
    pub(super) d_out: Buffer<T>,
    pub(super) d_out_rows: Buffer<T>,
    /// Values as columns.
    pub(super) values: Buffer<T>,
    pub(super) squares: Buffer<T>,
    pub(super) denominator: Buffer<T>,
    pub(super) inverse: Buffer<T>,
    pub(super) d_normalizer: Buffer<T>,
    /// The same for what the sums answer, which may have another log scale.
    pub(super) of_sums: [Buffer<T>; 2],
    /// Gradients by masked scores `[width, width]`: of keys and queries, and of queries and keys.
    pub(super) d_scores: Buffer<T>,
    pub(super) d_scores_by_query: Buffer<T>,
    /// `[num_features, width]`.
    pub(super) d_features: Buffer<T>,
    pub(super) features: Buffer<T>,
    /// `[width, value_dim]` with padded rows.
    pub(super) d_values: Buffer<T>,
    /// `[num_features]`.
    pub(super) sums: Buffer<T>,
}

impl<T: Scalar> Buffers<T> {
    pub(super) fn new() -> Self {
        Self {
            d_out: Buffer::new(),
            d_out_rows: Buffer::new(),
            values: Buffer::new(),
            squares: Buffer::new(),
            denominator: Buffer::new(),
            inverse: Buffer::new(),
            d_normalizer: Buffer::new(),
            of_sums: [Buffer::new(), Buffer::new()],
            d_scores: Buffer::new(),
            d_scores_by_query: Buffer::new(),
            d_features: Buffer::new(),
            features: Buffer::new(),
            d_values: Buffer::new(),
            sums: Buffer::new(),
        }
    }
}
