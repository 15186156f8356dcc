//! The gradients of some heads of a hybrid kernel.

use crate::attention::gradient::HeadGradient;
use crate::attention::hybrid::backward::entries::EntriesWork;
use crate::attention::hybrid::backward::features::FeaturesWork;
use crate::attention::hybrid::backward::head::OneHead;
use crate::attention::hybrid::backward::log::Recorder;
use crate::attention::hybrid::config::{Config, FarKind};
use crate::attention::hybrid::parameters::SINK_LOGITS;
use crate::attention::hybrid::state::{HybridScratch, HybridState};
use crate::check;
use crate::error::Error;
use crate::mask::Mask;
use crate::scalar::Scalar;
use crate::state_format::StateFormat;

/// What a backward pass keeps in the scratch.
#[derive(Debug)]
pub(crate) struct BackwardParts<T: Scalar> {
    state: HybridState<T>,
    scratch: HybridScratch<T>,
    entries: EntriesWork<T>,
    features: FeaturesWork<T>,
    recorder: Recorder<T>,
    d_sinks: Vec<f64>,
}

impl<T: Scalar> Default for BackwardParts<T> {
    fn default() -> Self {
        Self {
            state: HybridState::new(),
            scratch: HybridScratch::new(),
            entries: EntriesWork::new(),
            features: FeaturesWork::new(),
            recorder: Recorder::new(),
            d_sinks: Vec::new(),
        }
    }
}

const OWN: Error = Error::Unsupported {
    what: "the gradient of a hybrid with a memory of your own",
    why: "nothing is known of it; use `Far::features`, `Far::ward`, `Far::merged` or `Far::none`",
};

const PACKED: Error = Error::Unsupported {
    what: "the gradient of a hybrid that keeps tokens in fewer bits",
    why: "rounding has none; build the kernel with `StateFormat::F32`",
};

/// Adds the gradients of checked heads, which share one budget.
pub(crate) fn add_gradients<T: Scalar>(
    config: &Config<T>,
    heads: &mut [HeadGradient<'_, T>],
    mask: Mask,
    parts: &mut BackwardParts<T>,
) -> Result<(), Error> {
    if config.format != StateFormat::F32 {
        return Err(PACKED);
    }
    if matches!(config.far, FarKind::Own(_)) {
        return Err(OWN);
    }
    let Some((first, rest)) = heads.split_first() else { return Ok(()) };
    for head in rest {
        check::size("k", "rows", first.keys(), head.keys())?;
        check::size("v", "columns", first.v.ncols(), head.v.ncols())?;
        check::size("q", "heads", first.group_len(), head.group_len())?;
    }
    if first.q.is_empty() {
        return Ok(());
    }
    let BackwardParts { state, scratch, entries, features, recorder, d_sinks } = parts;
    recorder.record(config, heads, mask, state, scratch)?;
    for (head, log) in heads.iter_mut().zip(&recorder.logs) {
        let mut one = OneHead::new(config, head, mask, d_sinks);
        match &config.far {
            FarKind::Linear(far) => one.by_features(log, far, features)?,
            _ => one.by_entries(log, entries)?,
        }
        one.end();
        check_range(head)?;
    }
    Ok(())
}

/// Gradients must have stayed in the range of the type.
fn check_range<T: Scalar>(head: &HeadGradient<'_, T>) -> Result<(), Error> {
    head.d_q.outer_iter().try_for_each(|d_q| check::gradient("the gradient by `q`", d_q))?;
    check::gradient("the gradient by `k`", head.d_k.view())?;
    check::gradient("the gradient by `v`", head.d_v.view())?;
    let d = head.d_parameters.as_ref().and_then(|d| d.get(SINK_LOGITS));
    match d.and_then(|d| d.iter().position(|d| !d.is_finite())) {
        Some(row) => Err(Error::Overflow { which: "the gradient by `sink_logits`", row }),
        None => Ok(()),
    }
}
