//! The sums of a late memory and what works on them.

use crate::error::Error;
use crate::features::side::Side;
use crate::kernel::buffer::{Buffer, padded};
use crate::memory::linear::backward::late::decay::LateDecay;
use crate::memory::linear::backward::map::MapBuffers;
use crate::memory::linear::backward::rows::scaled_rows;
use crate::memory::linear::pass::{Pass, PassBuffers};
use crate::memory::linear::state::State;
use crate::memory::softmax_gradient::Units;
use crate::memory::unit;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use ndarray::ArrayView2;

/// Tokens that enter within a block, which is from row `row` on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entering<'a, T> {
    /// `[n, d]` and `[n, d_v]`.
    pub(crate) k: ArrayView2<'a, T>,
    pub(crate) v: ArrayView2<'a, T>,
    pub(crate) row: usize,
}

/// A block of queries of one head `[n, d]` with their cotangents `[n, d_v]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asking<'a, T> {
    pub(crate) q: ArrayView2<'a, T>,
    pub(crate) d_out: ArrayView2<'a, T>,
    /// Row of the first.
    pub(crate) row: usize,
}

/// The sums, and working memory.
#[derive(Debug)]
pub(crate) struct LateSums<T> {
    pub(super) pass: PassBuffers<T>,
    pub(super) map: MapBuffers<T>,
    /// Over tokens, then over queries.
    pub(super) state: State<T>,
    pub(super) units: Units,
    pub(super) decay: LateDecay<T>,
    /// Tokens that enter, as columns: features as they were mapped, and as the sums take them.
    pub(super) entering: usize,
    pub(super) width: usize,
    pub(super) keys: Buffer<T>,
    pub(super) key_scale: Buffer<T>,
    pub(super) brought: Buffer<T>,
    pub(super) factors: Buffer<T>,
    pub(super) key_sums: Buffer<T>,
    pub(super) values: Buffer<T>,
    pub(super) value_rows: Buffer<T>,
    /// Of queries and those tokens.
    pub(super) scores: Buffer<T>,
    pub(super) d_scores: Buffer<T>,
    pub(super) d_features: Buffer<T>,
    /// Queries as they decay, if they do.
    pub(super) asked: Buffer<T>,
    /// `[width]` of queries.
    pub(super) log_scale: Buffer<T>,
    pub(super) denominator: Buffer<T>,
    pub(super) products: Buffer<T>,
    pub(super) minus: Buffer<T>,
    pub(super) ones: Buffer<T>,
    pub(super) d_out_rows: Buffer<T>,
    pub(super) d_keys: Buffer<T>,
    pub(super) d_values: Buffer<T>,
    pub(super) scratch: Buffer<T>,
}

impl<T: Scalar> LateSums<T> {
    pub(crate) fn new() -> Self {
        Self {
            pass: PassBuffers::new(),
            map: MapBuffers::new(),
            state: State::new(),
            units: Units::ones(),
            decay: LateDecay::new(),
            entering: 0,
            width: 0,
            keys: Buffer::new(),
            key_scale: Buffer::new(),
            brought: Buffer::new(),
            factors: Buffer::new(),
            key_sums: Buffer::new(),
            values: Buffer::new(),
            value_rows: Buffer::new(),
            scores: Buffer::new(),
            d_scores: Buffer::new(),
            d_features: Buffer::new(),
            asked: Buffer::new(),
            log_scale: Buffer::new(),
            denominator: Buffer::new(),
            products: Buffer::new(),
            minus: Buffer::new(),
            ones: Buffer::new(),
            d_out_rows: Buffer::new(),
            d_keys: Buffer::new(),
            d_values: Buffer::new(),
            scratch: Buffer::new(),
        }
    }

    /// Begins the gradients by parameters of these names, if any are asked for, and by decays.
    pub(crate) fn begin(
        &mut self,
        pass: &Pass<'_, T>,
        value_dim: usize,
        units: Units,
        parameters: Option<Parameters<T>>,
        asks_decay: bool,
    ) {
        self.units = units;
        self.map.begin(pass.feature_map(), parameters);
        self.decay.begin(pass.log_decay(), asks_decay);
        self.state.reset(pass.num_features(), value_dim);
    }

    /// Ends them.
    pub(crate) fn end(&mut self, pass: &Pass<'_, T>) -> Option<Parameters<T>> {
        self.map.end(pass.feature_map())
    }

    /// The longest block that can be taken at once, up to this one.
    pub(crate) fn block(&self, longest: usize) -> usize {
        self.decay.block(longest)
    }

    /// The gradient by the logarithms of decays; empty if it was not asked for.
    pub(crate) fn decay_sums(&self) -> Vec<f64> {
        let [first, second] = unit::product::<f64>(1.0, &[self.units.d_out, self.units.v]);
        self.decay.sums().map(|sum| sum * first * second).collect()
    }

    /// Begins the second pass.
    pub(crate) fn turn(&mut self, pass: &Pass<'_, T>) {
        let value_dim = self.state.value_dim;
        self.state.reset(pass.num_features(), value_dim);
    }

    /// Maps the tokens that enter.
    pub(super) fn map_entering(
        &mut self,
        pass: &Pass<'_, T>,
        tokens: Entering<'_, T>,
    ) -> Result<(), Error> {
        let (m, value_dim) = (pass.num_features(), tokens.v.ncols());
        self.entering = tokens.k.nrows();
        self.width = padded::<T>(self.entering);
        if self.entering == 0 {
            return Ok(());
        }
        self.pass.chunk.resize_padded(self.entering, m, value_dim);
        pass.map(Side::Key, tokens.k, &mut self.pass, tokens.row)?;
        let chunk = &self.pass.chunk;
        self.keys.resize(m * self.width);
        self.keys.copy_from_slice(&chunk.keys[..m * self.width]);
        self.key_scale.resize(self.width);
        self.key_scale.copy_from_slice(&chunk.key_scale);
        self.scratch.resize(self.entering);
        self.scratch.fill(self.units.v.inverse());
        scaled_rows(tokens.v, &self.scratch, &mut self.value_rows);
        Ok(())
    }
}
