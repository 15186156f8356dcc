//! The backward pass of linear attention, and its parameters.

use crate::attention::call::{NO_FULL_DECAY, NOT_GATED};
use crate::attention::gradient::HeadGradient;
use crate::check;
use crate::error::Error;
use crate::features::FeatureMap;
use crate::mask::Mask;
use crate::memory::answer::Readout;
use crate::memory::linear::backward::call::{Backward, TokenGradients};
use crate::memory::linear::backward::work::BackwardWork;
use crate::memory::linear::decay::{Decay, LogDecay};
use crate::memory::linear::pass::{Pass, Tokens};
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use ndarray::Axis;

/// What a backward pass keeps in the scratch.
#[derive(Debug)]
pub(super) struct BackwardScratch<T> {
    work: BackwardWork<T>,
    log_decay: LogDecay<T>,
}

impl<T: Scalar> Default for BackwardScratch<T> {
    fn default() -> Self {
        Self { work: BackwardWork::new(), log_decay: LogDecay::new() }
    }
}

/// A map with other parameters, if some are its own, and decays.
type Changed<T> = (Option<Box<dyn FeatureMap<T>>>, Decay);

/// What a linear kernel is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct LinearParts<'a, T> {
    pub(super) map: &'a dyn FeatureMap<T>,
    pub(super) scale: Option<f64>,
    pub(super) readout: Readout,
    pub(super) decay: &'a Decay,
}

impl<T: Scalar> LinearParts<'_, T> {
    /// The gradients of one head, of checked shapes but for the log decays.
    pub(super) fn backward_head(
        &self,
        head: &mut HeadGradient<'_, T>,
        mask: Mask,
        BackwardScratch { work, log_decay }: &mut BackwardScratch<T>,
    ) -> Result<(), Error> {
        let scale = check::scale::<T>(self.scale, self.map.head_dim())?;
        let (features, value_dim) = (self.map.num_features(), head.v.ncols());
        let decay = log_decay.set(self.decay, features)?.then_some(&*log_decay);
        check_gates(decay, features, head)?;
        let mask = mask.settled([head.queries(), head.keys()]);
        if mask == Mask::Full && decay.is_some() {
            return Err(NO_FULL_DECAY);
        }
        let pass = Pass::new(self.map, value_dim, scale)?.with_decay(decay);
        let HeadGradient { q, k, v, log_decay, d_out, d_q, d_k, d_v, .. } = head;
        let HeadGradient { d_log_decay, d_parameters, checkpoints, .. } = head;
        if q.is_empty() {
            return Ok(());
        }
        let asked = d_parameters.as_deref();
        if let Some(asked) = asked {
            self.parameters().check_names(asked)?;
        }
        let of_map = asked.map(|asked| asked.of("map").zeros_like());
        let of_map = of_map.filter(|of_map| !of_map.is_empty());
        let trains_decay = Decay::is_trained(asked);
        work.begin(&pass, of_map);
        let heads = q.outer_iter().zip(d_out.outer_iter()).zip(d_q.outer_iter_mut());
        for ((q, d_out), d_q) in heads {
            let with_decays = decay.is_some() && (d_log_decay.is_some() || trains_decay);
            let tokens = Tokens { q, k: *k, v: *v, log_decay: *log_decay };
            let (readout, checkpoints) = (self.readout, *checkpoints);
            let asked = true;
            let backward = Backward { pass, tokens, readout, with_decays, asked, checkpoints };
            let mut out = TokenGradients {
                d_out,
                d_q,
                d_k: d_k.view_mut(),
                d_v: d_v.view_mut(),
                d_log_decay: d_log_decay.as_mut().map(|x| x.view_mut()),
                is_finite: true,
            };
            match mask {
                Mask::Causal => backward.causal(&mut out, work)?,
                Mask::CausalTail => backward.causal_tail(&mut out, work)?,
                Mask::Full => backward.full(&mut out, work)?,
            }
            if !out.is_finite {
                check::gradient("the gradient by `q`", out.d_q.view())?;
                check::gradient("the gradient by `k`", out.d_k.view())?;
                check::gradient("the gradient by `v`", out.d_v.view())?;
            }
            if let (true, Some(d_parameters)) = (trains_decay, d_parameters.as_deref_mut()) {
                self.decay.add_gradients(work.decay_sums(), d_parameters)?;
            }
        }
        if let Some(d_log_decay) = d_log_decay {
            check::gradient("the gradient by `log_decay`", d_log_decay.view())?;
        }
        if let (Some(of_map), Some(d_parameters)) = (work.end(&pass), d_parameters) {
            d_parameters.add_scaled(T::one(), &of_map.under("map"))?;
            d_parameters.check_gradients()?;
        }
        Ok(())
    }

    /// The parameters of the map, under `map`, and the decays.
    pub(super) fn parameters(&self) -> Parameters<T> {
        let mut all = self.map.parameters().under("map");
        self.decay.add_parameters(&mut all);
        all
    }

    /// The map with other parameters, if some are its own, and the decays with others.
    pub(super) fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Changed<T>, Error> {
        self.parameters().check_names(parameters)?;
        let decay = self.decay.with_parameters(parameters);
        decay.check(self.map.num_features())?;
        let of_map = parameters.of("map");
        let is_same = of_map.is_empty();
        Ok((if is_same { None } else { Some(self.map.with_parameters(&of_map)?) }, decay))
    }
}

/// Checks the log decays of a head, and the room for the gradient by them.
fn check_gates<T: Scalar>(
    decay: Option<&LogDecay<T>>,
    features: usize,
    head: &HeadGradient<'_, T>,
) -> Result<(), Error> {
    let gated = decay.is_some_and(|decay| decay.gated);
    let Some(log_decay) = head.log_decay else {
        if head.d_log_decay.is_some() && !gated {
            return Err(NOT_GATED);
        }
        return if gated { Err(MISSING_GATES) } else { Ok(()) };
    };
    if !gated {
        return Err(NOT_GATED);
    }
    check::size("log_decay", "rows", head.keys(), log_decay.nrows())?;
    if log_decay.ncols() != 1 {
        check::size("log_decay", "columns", features, log_decay.ncols())?;
    }
    let Some(d_log_decay) = &head.d_log_decay else { return Ok(()) };
    check::size("d_log_decay", "rows", log_decay.nrows(), d_log_decay.len_of(Axis(0)))?;
    check::size("d_log_decay", "columns", log_decay.ncols(), d_log_decay.len_of(Axis(1)))
}

const MISSING_GATES: Error = Error::Unsupported {
    what: "a call of a gated kernel without log decays",
    why: "set `HeadGradient::log_decay`, with `with_log_decay`",
};
